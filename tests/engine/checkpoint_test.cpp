// Checkpoints: complete or not there; torn ones are passed over; the last complete one is always found.
#include "engine/checkpoint.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "engine/error.h"

namespace fiedler {
namespace {
namespace fs = std::filesystem;

class Checkpoints : public testing::Test {
  protected:
    void SetUp() override {
        make_folders(run_);
        write_file_atomic(join_path(run_, "tokenizer.model"), "a tokenizer");
        std::iota(block_.begin(), block_.end(), 0.5f);
    }
    void TearDown() override { fs::remove_all(run_); }

    CheckpointMeta meta(std::int64_t step) const {
        CheckpointMeta m;
        m.step = step;
        m.tokens = step * 4096;
        m.seed = 7;
        m.config = {{"layers", 4}, {"lr", 3e-3}};
        m.data = {{"epoch", 1}, {"document", step}};
        m.state = {{"losses", {1.1, 0.1 + 0.2, 1e-300}}, {"path", "not UTF-8: \xff"}};
        return m;
    }
    std::string save(std::int64_t step, std::int64_t keep = 100, float value = 1) {
        block_[0] = value;
        CheckpointWriter writer(run_, step);
        writer.add("master", block_.data(), block_.size() * 4);
        writer.add("empty", nullptr, 0);
        writer.add_copy(join_path(run_, "tokenizer.model"), "tokenizer.model");
        return writer.commit(meta(step), keep);
    }
    std::vector<std::string> folders() const {
        std::vector<std::string> all;
        for (const auto& entry : fs::directory_iterator(run_))
            if (entry.is_directory()) all.push_back(entry.path().filename().string());
        std::sort(all.begin(), all.end());
        return all;
    }
    std::string latest() {
        notices_.clear();
        const std::string found = latest_checkpoint(run_, [this](const std::string& n) { notices_.push_back(n); });
        return fs::path(found).filename().string();
    }
    testing::AssertionResult refused(const std::string& folder, const std::string& part) {
        try {
            Checkpoint checkpoint(folder);
        } catch (const InputError& e) {
            const std::string text = e.what();
            if (text.find(part) != std::string::npos && text.find('\n') == std::string::npos)
                return testing::AssertionSuccess();
            return testing::AssertionFailure() << "no '" << part << "' in: " << text;
        }
        return testing::AssertionFailure() << "was read";
    }

    std::string run_ = (fs::temp_directory_path() / ("fiedler_run_" + std::to_string(getpid()))).string();
    std::vector<float> block_ = std::vector<float>(1000);
    std::vector<std::string> notices_;
};

TEST_F(Checkpoints, ComeBackAsTheyWereWritten) {
    const std::string folder = save(1000);
    EXPECT_EQ(fs::path(folder).filename(), "step_00001000");
    const Checkpoint c(folder);
    EXPECT_EQ(c.meta().step, 1000);
    EXPECT_EQ(c.meta().tokens, 4096000);
    EXPECT_EQ(c.meta().seed, 7);
    EXPECT_EQ(c.meta().config, meta(1000).config);
    EXPECT_EQ(c.meta().data, meta(1000).data);
    EXPECT_EQ(c.meta().state["losses"], meta(1000).state["losses"]);  // bit-equal doubles
    EXPECT_EQ(std::memcmp(c.block("master", 4000), block_.data(), 4000), 0);
    EXPECT_EQ(c.block_bytes("empty"), 0u);
    EXPECT_EQ(c.names(), (std::vector<std::string>{"empty", "master", "tokenizer.model"}));
    EXPECT_EQ(read_file(c.file("tokenizer.model")), "a tokenizer");
    EXPECT_THROW(c.block("master", 4004), InputError);
    EXPECT_THROW(c.block("moment1"), InputError);
    EXPECT_EQ(folders(), std::vector<std::string>{"step_00001000"});
}

TEST_F(Checkpoints, TheNewestCompleteOneIsFound) {
    EXPECT_EQ(latest(), "");
    EXPECT_THROW(find_checkpoint(run_), InputError);
    EXPECT_THROW(find_checkpoint(run_ + "/none"), InputError);
    save(900);
    save(100000000);
    const std::string middle = save(20000);
    EXPECT_EQ(latest(), "step_100000000");
    EXPECT_EQ(find_checkpoint(run_), join_path(run_, "step_100000000"));
    EXPECT_EQ(find_checkpoint(middle), middle);
    EXPECT_TRUE(notices_.empty());
}

TEST_F(Checkpoints, TornOnesArePassedOverWithANotice) {
    save(1);
    for (const int damage : {0, 1, 2, 3, 4, 5}) {
        const std::string folder = save(2), shard = join_path(folder, "master.bin"),
                          manifest = join_path(folder, "manifest.json");
        ASSERT_EQ(latest(), "step_00000002");
        switch (damage) {
            case 0:
                fs::remove(manifest);
                break;
            case 1:
                fs::resize_file(shard, 3999);
                break;
            case 2:
                fs::remove(shard);
                break;
            case 3: {
                std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
                file.seekp(2000).put('x');
                break;
            }
            case 4:
                fs::resize_file(manifest, fs::file_size(manifest) / 2);
                break;
            case 5: {
                std::string text = read_file(manifest);
                text.replace(text.find("8192"), 4, "8193");
                write_file_atomic(manifest, text);
                break;
            }
        }
        EXPECT_EQ(latest(), "step_00000001") << damage;
        ASSERT_EQ(notices_.size(), 1u) << damage;
        EXPECT_NE(notices_[0].find("step_00000002"), std::string::npos);
        EXPECT_EQ(notices_[0].find('\n'), std::string::npos);
        EXPECT_TRUE(refused(folder, "step_00000002")) << damage;
        EXPECT_THROW(find_checkpoint(folder), InputError);  // asked for by name, it is not replaced by another
    }
}

TEST_F(Checkpoints, NewerAndForeignOnesAreRefusedNotPassedOver) {
    save(1);
    const std::string manifest = join_path(save(2), "manifest.json");
    std::string text = read_file(manifest);
    text.replace(text.find("\"version\": 1"), 12, "\"version\": 2");
    write_file_atomic(manifest, text);
    EXPECT_THROW(latest(), InputError);
    EXPECT_TRUE(refused(join_path(run_, "step_00000002"), "version 2"));
    write_file_atomic(manifest, R"({"architectures": ["GPT2"]})");
    EXPECT_TRUE(refused(join_path(run_, "step_00000002"), "not the manifest of a Fiedler checkpoint"));
    write_file_atomic(manifest, "[1, 2]");
    EXPECT_TRUE(refused(join_path(run_, "step_00000002"), "not the manifest"));
}

TEST_F(Checkpoints, FilesOutsideTheFolderAreRefused) {
    const std::string manifest = join_path(save(1), "manifest.json");
    Json m = Json::parse(read_file(manifest));
    m["files"][0]["file"] = "../tokenizer.model";
    m.erase("xxh3");
    m["xxh3"] = hex64(hash_bytes(m.dump()));
    write_file_atomic(manifest, m.dump());
    EXPECT_TRUE(refused(join_path(run_, "step_00000001"), "is no file of a checkpoint"));
}

TEST_F(Checkpoints, KeepDeletesTheOldestOnceTheNewOneIsComplete) {
    for (const int step : {1, 2, 3, 4}) save(step, 2);
    EXPECT_EQ(folders(), (std::vector<std::string>{"step_00000003", "step_00000004"}));
    fs::remove(join_path(run_, "step_00000003/manifest.json"));  // torn: neither counted nor kept
    save(5, 2);
    EXPECT_EQ(folders(), (std::vector<std::string>{"step_00000004", "step_00000005"}));
    save(2, 1);  // an older step of a run that went back: what is newer stays
    EXPECT_EQ(folders(), (std::vector<std::string>{"step_00000002", "step_00000004", "step_00000005"}));
}

TEST_F(Checkpoints, TheSameStepIsReplacedWhole) {
    save(1, 2, 1.f);
    const Checkpoint c(save(1, 2, 2.f));
    EXPECT_EQ(*static_cast<const float*>(c.block("master")), 2.f);
    EXPECT_EQ(folders(), std::vector<std::string>{"step_00000001"});
}

TEST_F(Checkpoints, AnAbandonedOneLeavesNothing) {
    save(1);
    {
        CheckpointWriter writer(run_, 2);
        writer.add("master", block_.data(), 4000);
    }
    EXPECT_EQ(folders(), std::vector<std::string>{"step_00000001"});
}

// A process killed at a random moment of its writing, many times: the last complete checkpoint is found and whole.
TEST_F(Checkpoints, SurviveKill9WhileWriting) {
    save(1);
    std::vector<char> large(2 << 20, 'w');
    for (int round = 0; round < 8; ++round) {
        const pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            for (std::int64_t step = 2;; ++step) {
                CheckpointWriter writer(run_, 2 + step % 3);
                for (const char* name : {"master", "moment1", "moment2"}) writer.add(name, large.data(), large.size());
                writer.commit(meta(2 + step % 3), 2);
            }
        }
        usleep(static_cast<useconds_t>(500 + 9700 * round));
        kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        ASSERT_TRUE(WIFSIGNALED(status)) << "the child ended by itself";
        const std::string found = latest();
        ASSERT_NE(found, "") << round;
        const Checkpoint c(join_path(run_, found));  // verifies every checksum
        EXPECT_EQ(checkpoint_name(c.meta().step), found);
    }
    save(100, 2);  // and the next complete one clears the left-overs away
    for (const std::string& name : folders()) EXPECT_FALSE(name.starts_with(".step_")) << name;
}

TEST_F(Checkpoints, AFullDiskOrUnwritableFolderIsAnInputError) {
    write_file_atomic(join_path(run_, "file"), "x");
    EXPECT_THROW(CheckpointWriter(join_path(run_, "file"), 1), InputError);
    CheckpointWriter writer(run_, 1);
    EXPECT_THROW(writer.add_copy(join_path(run_, "no tokenizer"), "tokenizer.model"), InputError);
    EXPECT_THROW(writer.commit(meta(2), 1), std::logic_error);
}

}  // namespace
}  // namespace fiedler
