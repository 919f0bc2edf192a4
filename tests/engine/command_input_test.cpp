// Bad input to the real binary: exit code 2, one line that says what is wrong and how to mend it, nothing left behind.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cstring>

#include "kernels/device.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

class CommandInput : public CommandTest {
  protected:
    // One line on stderr that holds each of `parts`.
    static void expect_one_line(const Outcome& o, const Words& parts) {
        EXPECT_EQ(o.code, 2) << o.err;
        EXPECT_TRUE(o.err.starts_with("fiedler")) << o.err;
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
        EXPECT_TRUE(o.err.ends_with('\n')) << o.err;
        EXPECT_EQ(o.err.find("internal"), o.err.npos) << o.err;
        for (const std::string& part : parts) EXPECT_HAS(o.err, part);
    }
    // Refused, and the world is as it was before.
    Outcome refused(const Words& words, const Words& parts) const {
        SCOPED_TRACE(fmt::format("fiedler {}", fmt::join(words, " ")));
        const auto before = paths_below(world_.path());
        const Outcome o = run(words);
        expect_one_line(o, parts);
        EXPECT_EQ(paths_below(world_.path()), before);
        return o;
    }
    Outcome refused_training(const Knobs& changes, const Words& parts) const {
        Knobs k = tiny({{"data", "corpus"}, {"out", "run"}, {"steps", "5"}});
        for (const auto& [name, value] : changes) k[name] = value;
        return refused(words_of("train", k), parts);
    }
    // A corpus that neither `prepare`, `train` nor `eval` takes.
    void refused_corpus(const std::string& corpus, const Words& parts) {
        refused_training({{"data", corpus}}, parts);
        refused({"prepare", corpus, "--vocab", "512", "--data-cache", "cache"}, parts);
        refused({"eval", "model", "--data", corpus, "--data-cache", "cache"}, parts);
    }
    void make_model() {
        ASSERT_NO_FATAL_FAILURE(trained("model", {{"data", dataset()}, {"steps", "4"}, {"checkpoint-every", "2"}}));
    }
    void flip(const std::string& name, std::size_t at, std::size_t count = 1) const {
        std::string bytes = slurp(path(name));
        ASSERT_GT(bytes.size(), at + count) << name;
        for (std::size_t i = at; i < at + count; ++i) bytes[i] = static_cast<char>(bytes[i] ^ 0x55);
        world_.put(name, bytes);
    }
    void put32(const std::string& name, std::size_t index, std::int32_t value) const {
        std::string bytes = slurp(path(name));
        ASSERT_GT(bytes.size(), 4 * index + 4) << name;
        std::memcpy(bytes.data() + 4 * index, &value, 4);
        world_.put(name, bytes);
    }
    void truncate(const std::string& name, std::size_t bytes) const {
        world_.put(name, slurp(path(name)).substr(0, bytes));
    }
    void copy(const std::string& from, const std::string& to) const {
        std::filesystem::remove_all(path(to));
        std::filesystem::copy(path(from), path(to), std::filesystem::copy_options::recursive);
    }
};

// ---- corpora

TEST_F(CommandInput, CorporaThatAreNone) {
    make_model();
    refused_corpus("nothere", {"nothere: cannot read the corpus", "No such file"});
    world_.put("empty.txt", "");
    refused_corpus("empty.txt", {"empty.txt: the file is empty"});
    std::filesystem::create_directory(path("empty"));
    refused_corpus("empty", {"empty: the corpus is empty"});
    world_.put("binary.txt", std::string("text\0more", 9));
    refused_corpus("binary.txt", {"binary.txt: a binary file", "offset 4"});
    world_.put("latin.txt", "caf\xe9 au lait\n");
    refused_corpus("latin.txt", {"latin.txt: not valid UTF-8 at byte offset 3", "iconv"});
    world_.put("binaries/a", std::string("\0\1\2", 3));
    refused_corpus("binaries", {"binaries: the corpus is empty", "1 binary file"});
    world_.put("records.jsonl", "{\"text\": \"fine\"}\n{\"txt\": 1}\n");
    refused_corpus("records.jsonl", {"records.jsonl:2", "text"});
    refused_training({{"data", "corpus/f100.c"}, {"vocab", "60000"}}, {"too small for a vocabulary of 60000"});
    Knobs none = tiny();
    refused(words_of("train", none), {"data: nothing to train on", "--data"});
}

// The dataset itself is whole and stays: it serves the next try.
TEST_F(CommandInput, CorpusSmallerThanABatch) {
    const Outcome o = train("run", {{"data", "corpus/f100.c"}, {"batch-tokens", "8192"}});
    expect_one_line(o, {"smaller than one batch", "128 x 64 + 1 = 8193"});
    EXPECT_FALSE(std::filesystem::exists(path("run")));
    int datasets = 0;
    for (const auto& entry : std::filesystem::directory_iterator(path("cache"))) {
        EXPECT_EQ(run({"inspect", entry.path().string()}).code, 0) << entry.path();
        ++datasets;
    }
    EXPECT_EQ(datasets, 1);
    EXPECT_EQ(train("run", {{"data", "corpus/f100.c"}, {"steps", "2"}}).code, 0);
    // No whole window of validation tokens.
    const Outcome val = train("long", {{"data", "corpus/f100.c"}, {"context", "1024"}, {"batch-tokens", "1024"}});
    expect_one_line(val, {"validation split", "1024 + 1"});
    EXPECT_FALSE(std::filesystem::exists(path("long")));
}

// ---- knobs

TEST_F(CommandInput, KnobsThatDoNotExistOrDoNotFit) {
    refused({"frobnicate"}, {"no such command"});
    refused({"tran"}, {"did you mean train"});
    refused_training({{"preset", "huge"}}, {"no preset 'huge'", "tiny", "fiedler30m"});
    refused_training({{"chanels", "64"}}, {"no knob 'chanels'", "did you mean channels"});
    refused_training({{"max-tokens", "3"}}, {"--max-tokens is a knob of other commands"});
    refused_training({{"steps", "many"}}, {"steps = 'many'", "whole number"});
    refused({"train", "--steps"}, {"--steps needs a value"});
    refused_training({{"lr", "-1"}}, {"lr = '-1'", "0 to 100"});
    refused_training({{"schedule", "linear"}}, {"schedule = 'linear'", "wsd, cosine, constant"});
    refused_training({{"memory-budget", "lots"}}, {"memory-budget = 'lots'", "24GiB"});
    refused_training({{"channels", "33"}}, {"33 is not divisible by heads = 2"});
    refused_training({{"heads", "3"}}, {"32 is not divisible by heads = 3"});
    refused_training({{"heads", "4"}}, {"a head must be 16, 32, 64 or 128 wide"});
    refused_training({{"scalars", "3"}, {"scalar-kind", "energy"}}, {"3 bands do not divide the head width 16"});
    refused_training({{"pattern", "sx"}}, {"'x' at position 2"});
    refused_training({{"pattern", "sss"}}, {"3 layers", "layers = 2"});
    refused_training({{"batch-tokens", "500"}}, {"500 is not a multiple of context = 64", "448 or 512"});
    refused_training({{"micro-batch", "3"}}, {"3 does not divide the 8 sequences"});
    refused({"plan", "--preset", "huge"}, {"no preset 'huge'"});
    refused({"plan", "--heads", "3"}, {"128 is not divisible by heads = 3"});
    refused({"train", "two\nlines"}, {"two lines"});
}

TEST_F(CommandInput, ConfigFiles) {
    refused_training({{"config", "nothere.toml"}}, {"nothere.toml: cannot be read"});
    world_.put("unknown.toml", "steps = 3\nchanels = 64\n");
    refused_training({{"config", "unknown.toml"}}, {"unknown.toml:2: there is no knob 'chanels'", "channels"});
    world_.put("value.toml", "[model]\ngate = maybe\n");
    refused_training({{"config", "value.toml"}}, {"value.toml:2", "gate = 'maybe'", "true or false"});
    world_.put("section.toml", "[train]\ngate = true\n");
    refused_training({{"config", "section.toml"}}, {"section.toml:2", "[model]"});
    world_.put("list.toml", "gate = [true\n");
    refused_training({{"config", "list.toml"}}, {"list.toml"});
    world_.put("binary.toml", std::string("\x7f"
                                          "ELF\0\n\n=\n",
                                          9));
    refused_training({{"config", "binary.toml"}}, {"binary.toml"});
}

// What stands between two texts.
std::string between(const std::string& text, const std::string& before, const std::string& after) {
    const std::size_t at = text.find(before);
    if (at == text.npos) return "";
    const std::size_t first = at + before.size();
    return text.substr(first, text.find(after, first) - first);
}

// The message's own advice, followed, works.
TEST_F(CommandInput, BudgetTooSmall) {
    const Words small = {"plan", "--preset", "tiny", "--memory-budget", "1MiB"};
    const Outcome gpu = refused(small, {"memory-budget: 1.0 MiB is", "MiB too small", "would fit"});
    const std::string fits = between(gpu.err, "--memory-budget ", " would fit");
    ASSERT_FALSE(fits.empty()) << gpu.err;
    EXPECT_EQ(run({"plan", "--preset", "tiny", "--memory-budget", fits}).code, 0) << fits;
    const std::string one_less = std::to_string(std::stoi(fits) - 1) + "MiB";
    EXPECT_EQ(run({"plan", "--preset", "tiny", "--memory-budget", one_less}).code, 2) << one_less;

    // The user's own choices are kept to, in what is counted and in what is advised.
    Words strict = {"plan", "--preset",      "tiny", "--device",        "cpu",  "--recompute",
                    "none", "--micro-batch", "8",    "--memory-budget", "30MiB"};
    const Outcome cpu =
        refused(strict, {"needs", "micro-batch 8 and recompute none", "--micro-batch 1 --recompute layer would fit"});
    EXPECT_EQ(run({"plan", "--preset", "tiny", "--device", "cpu", "--recompute", "layer", "--micro-batch", "1",
                   "--memory-budget", "30MiB"})
                  .code,
              0);
    strict.back() = "1MiB";
    const Outcome less = refused(strict, {"micro-batch 8 and recompute none"});
    strict.back() = between(less.err, "--memory-budget ", " would fit");
    EXPECT_EQ(run(strict).code, 0) << less.err;

    const Outcome training =
        refused_training({{"memory-budget", "300KiB"}}, {"memory-budget: 300.0 KiB is", "KiB too small"});
    const std::string enough = between(training.err, "--memory-budget ", " would fit");
    const Outcome o = train("run", {{"data", "corpus"}, {"steps", "2"}, {"memory-budget", enough}});
    EXPECT_EQ(o.code, 0) << o.err;
}

TEST_F(CommandInput, NoDevice) {
    if (cuda_device_count() > 0) GTEST_SKIP() << "SKIPPED: there is a GPU here";
    make_model();
    const Words parts = {"device: cuda was asked for, but there is none", "--device cpu"};
    refused_training({{"device", "cuda"}}, parts);
    refused({"eval", "model", "--data", "corpus", "--device", "cuda", "--data-cache", "cache"}, parts);
    refused({"generate", "model", "--device", "cuda"}, parts);
}

// ---- outputs

TEST_F(CommandInput, OutputsThatCannotBe) {
    make_model();
    world_.put("file", "not a folder\n");
    refused_training({{"out", "file/run"}}, {"file/run: cannot create this folder"});
    refused_training({{"out", "file"}}, {"file: "});
    refused_training({{"out", "/proc/fiedler"}}, {"/proc/fiedler: cannot create"});
    refused_training({{"data-cache", "file/cache"}}, {"file/cache: cannot create"});
    refused({"prepare", "corpus", "--vocab", "512", "--data-cache", "file"}, {"file"});
    refused_training({{"out", "model"}}, {"model already holds a run", "--resume", "--out"});
    if (::geteuid() == 0) return;  // root may write anywhere
    std::filesystem::create_directory(path("locked"));
    std::filesystem::permissions(path("locked"),
                                 std::filesystem::perms::owner_read | std::filesystem::perms::owner_exec);
    refused_training({{"out", "locked"}}, {"locked: cannot write"});
    refused_training({{"out", "locked/run"}}, {"locked/run"});
}

TEST_F(CommandInput, NothingToResume) {
    refused_training({{"resume", ""}}, {"run: there is no such run"});
    refused({"train", "--resume"}, {"runs/tiny: there is no such run"});
    refused({"train", "--resume", "nothere"}, {"nothere: there is no such run"});
    refused({"train", "--resume", "corpus"}, {"corpus: holds no complete checkpoint"});
    make_model();
    refused({"train", "--resume", "model", "--heads", "1"}, {"heads = 1 cannot be changed on --resume"});
    world_.put("other.txt", c_text(400, 99));
    ASSERT_EQ(run({"prepare", "other.txt", "--vocab", "512", "--data-cache", "cache"}).code, 0);
    const std::string config = slurp(path("model/config.toml")), log = slurp(path("model/log.jsonl"));
    refused({"train", "--resume", "model", "--data", "other.txt", "--steps", "9"},
            {"is not what the checkpoint", "was trained on"});
    EXPECT_EQ(slurp(path("model/config.toml")), config);  // the run is as it was
    EXPECT_EQ(slurp(path("model/log.jsonl")), log);
}

// Limits on file sizes: the run's checkpoint or the dataset's shard does not fit.
TEST_F(CommandInput, FilesBeyondALimit) {
    const auto limited = [&](const Knobs& changes, rlim_t bytes) {
        Knobs k = tiny({{"out", "run"}, {"steps", "4"}, {"checkpoint-every", "2"}});
        for (const auto& [name, value] : changes) k[name] = value;
        return Child(FIEDLER_BINARY, words_of("train", k), world_.path(), bytes).wait();
    };
    const auto before = paths_below(world_.path());
    expect_one_line(limited({{"data", "corpus"}}, 40'000), {"train_000000.bin: cannot write", "limit on file sizes"});
    EXPECT_EQ(paths_below(world_.path()), before);
    const auto prepared = (dataset(), paths_below(world_.path()));
    expect_one_line(limited({{"data", dataset()}}, 2'000), {"run/", "cannot write"});  // not even the tokenizer
    EXPECT_EQ(paths_below(world_.path()), prepared);
    expect_one_line(limited({{"data", dataset()}}, 40'000), {"master.bin: cannot write", "limit on file sizes"});
    for (const std::string& entry : paths_below(path("run"))) EXPECT_EQ(entry.find("step_"), entry.npos) << entry;
    EXPECT_EQ(records_of(path("run/log.jsonl"), "step").size(), 2u);
}

// A file system of 400 KiB, where that is allowed to be made.
TEST_F(CommandInput, FullDisk) {
    std::filesystem::create_directory(path("disk"));
    if (::mount("none", path("disk").c_str(), "tmpfs", 0, "size=400k") != 0)
        GTEST_SKIP() << "SKIPPED: no right to mount a small file system";
    struct Unmount {
        std::string at;
        ~Unmount() { ::umount2(at.c_str(), MNT_DETACH); }
    } unmount{path("disk")};
    Knobs k =
        tiny({{"data", dataset()}, {"out", "disk/run"}, {"steps", "20"}, {"checkpoint-every", "5"}, {"keep", "1"}});
    ASSERT_NO_FATAL_FAILURE(trained("whole", {{"data", dataset()}, {"steps", "20"}}));
    k["channels"] = "64";  // a checkpoint of 1.3 MB
    expect_one_line(run(words_of("train", k)), {"disk/run/.step_00000005", "the disk is full"});
    for (const std::string& entry : paths_below(path("disk"))) EXPECT_EQ(entry.find("step_"), entry.npos) << entry;
    std::filesystem::remove_all(path("disk/run"));

    world_.put("disk/fill", std::string(99 * 4096, 'x'));  // one page is left: not even the tokenizer fits
    expect_one_line(run(words_of("train", k)), {"disk/run/", "the disk is full"});
    EXPECT_EQ(paths_below(path("disk")), std::set<std::string>{"fill"});
    expect_one_line(run({"prepare", "corpus", "--vocab", "512", "--data-cache", "disk/cache"}),
                    {"disk/cache/", "the disk is full"});
    EXPECT_EQ(paths_below(path("disk")), std::set<std::string>{"fill"});
}

TEST_F(CommandInput, OutputThatNobodyTakes) {
    for (const Words& words : {Words{"plan"}, Words{"train", "--help"}, Words{"inspect", dataset()}}) {
        std::string line = "exec " FIEDLER_BINARY;
        for (const std::string& w : words) line += " " + w;
        expect_one_line(Child("sh", {"-c", line + " > /dev/full"}, world_.path()).wait(), {"write"});
    }
}

// ---- damaged files

TEST_F(CommandInput, Checkpoints) {
    make_model();
    const std::string newest = "broken/step_00000004";
    const auto expect_refused = [&](const Words& parts) {
        refused({"train", "--resume", newest}, parts);
        refused({"generate", newest}, parts);
        refused({"eval", newest, "--data", dataset()}, parts);
        refused({"inspect", newest}, parts);
    };
    for (const char* file : {"master.bin", "moment1.bin", "moment2.bin", "tokenizer.model"}) {
        copy("model", "broken");
        truncate(newest + "/" + file, 100);
        expect_refused({newest + "/" + file, "torn"});
        copy("model", "broken");
        flip(newest + "/" + file, 70);
        expect_refused({newest + "/" + file, "corrupt"});
        std::filesystem::remove(path(newest + "/" + file));
        expect_refused({newest, file, "missing"});
    }
    copy("model", "broken");
    truncate(newest + "/manifest.json", 200);
    expect_refused({newest, "torn"});
    std::string manifest = slurp(path("model/step_00000004/manifest.json"));
    const std::size_t seed = manifest.find("\"seed\": 1");
    ASSERT_NE(seed, manifest.npos);
    world_.put(newest + "/manifest.json", manifest.substr(0, seed) + "\"seed\": 2" + manifest.substr(seed + 9));
    expect_refused({newest, "corrupt", "checksum"});
    const std::size_t version = manifest.find("\"version\": 1");
    ASSERT_NE(version, manifest.npos);
    world_.put(newest + "/manifest.json",
               manifest.substr(0, version) + "\"version\": 9" + manifest.substr(version + 12));
    expect_refused({newest, "version 9", "version 1"});
    refused({"train", "--resume", "broken"}, {newest, "version 9"});  // no silent step back to the one before
    world_.put(newest + "/manifest.json", "{\"format\": \"another program\"}\n");
    expect_refused({newest, "is not the manifest of a Fiedler checkpoint"});
    world_.put(newest + "/manifest.json", "nonsense");
    expect_refused({newest, "is no JSON"});

    // All of a run's checkpoints damaged: still one line.
    copy("model", "broken");
    truncate("broken/step_00000002/master.bin", 10);
    truncate("broken/step_00000004/master.bin", 10);
    refused({"train", "--resume", "broken"}, {"broken: holds no complete checkpoint", "step_00000004/master.bin"});
}

TEST_F(CommandInput, WeightFiles) {
    make_model();
    const std::string file = "broken/weights.fdl";
    const auto expect_refused = [&](const Words& parts) {
        refused({"generate", file}, parts);
        refused({"eval", file, "--data", dataset()}, parts);
        refused({"inspect", file}, parts);
    };
    const std::size_t size = slurp(path("model/weights.fdl")).size();
    for (const std::size_t bytes : {std::size_t{500}, std::size_t{1500}, size - 1}) {
        copy("model", "broken");
        truncate(file, bytes);
        expect_refused({file, "truncated"});
    }
    for (const std::size_t at : {std::size_t{40}, std::size_t{1100}, size - 300}) {  // header, table, tensors
        copy("model", "broken");
        flip(file, at, 3);
        expect_refused({file, "corrupt"});
    }
    copy("model", "broken");
    world_.put(file, slurp(path("model/weights.fdl")) + "more");
    expect_refused({file, "corrupt", "4 bytes follow"});
    copy("model", "broken");
    put32(file, 1, 2);
    expect_refused({file, "version 2", "newer"});
    world_.put(file, std::string(5000, 'z'));
    expect_refused({file});
    world_.put(file, "");
    expect_refused({file});
    refused({"generate", "nothere"}, {"nothere: there is no such model"});
    refused({"generate", "model", "--prompt-file", "nothere"}, {"nothere: cannot read"});
    refused({"inspect", "nothere"}, {"nothere: there is no such file"});
    refused({"inspect", "corpus/f100.c"}, {"no file that Fiedler writes"});
    copy("model", "broken");
    world_.put("broken/tokenizer.model", "no tokenizer");
    refused({"generate", "broken"}, {"broken/tokenizer.model"});
}

TEST_F(CommandInput, Shards) {
    make_model();
    const std::string file = "broken/train_000000.bin";
    const auto expect_refused = [&](const Words& parts) {
        refused_training({{"data", "broken"}}, parts);
        refused_training({{"data", file}}, parts);
        refused({"inspect", file}, parts);
        refused({"inspect", "broken"}, parts);
        refused({"eval", "model", "--data", "broken"}, parts);
    };
    const std::size_t size = slurp(path(dataset() + "/train_000000.bin")).size();
    for (const std::size_t bytes : {std::size_t{300}, size / 2, size - 1}) {
        copy(dataset(), "broken");
        truncate(file, bytes);
        expect_refused({file, "truncated"});
    }
    copy(dataset(), "broken");
    flip(file, size / 2);
    expect_refused({file, "corrupt"});
    copy(dataset(), "broken");
    put32(file, 1, 2);
    expect_refused({file, "version 2", "newer"});
    copy(dataset(), "broken");
    flip(file, 2 * 4);
    expect_refused({file, "corrupt"});
    world_.put(file, std::string(5000, 'z'));
    refused_training({{"data", "broken"}}, {file, "not a token shard"});
    refused_training({{"data", file}}, {file, "not a token shard"});
    refused({"inspect", file}, {file});

    copy(dataset(), "broken");
    std::filesystem::copy_file(path("broken/val_000000.bin"), path(file),
                               std::filesystem::copy_options::overwrite_existing);
    refused_training({{"data", "broken"}}, {file, "does not belong to this dataset"});
    copy(dataset(), "broken");
    flip("broken/tokenizer.model", 500);
    refused_training({{"data", "broken"}}, {"broken/tokenizer.model", "corrupt"});
    copy(dataset(), "broken");
    truncate("broken/dataset.json", 100);
    refused_training({{"data", "broken"}}, {"broken/dataset.json", "corrupt"});
    world_.put("broken/dataset.json", "{\"format\": \"fiedler dataset\", \"version\": 7}");
    refused_training({{"data", "broken"}}, {"broken/dataset.json", "version 7", "newer"});
    refused_training({{"data", dataset()}, {"vocab", "600"}}, {"--vocab 512"});
}

}  // namespace
}  // namespace fiedler::test
