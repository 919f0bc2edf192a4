// The .fdl file: written, read back by the engine and by NumPy, and refused whenever it is not what it says it is.
#include "engine/weights.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "engine/error.h"
#include "kernels/dtype.h"

namespace fiedler {
namespace {

class Weights : public testing::Test {
  protected:
    void SetUp() override {
        make_folders(folder_);
        std::iota(floats_.begin(), floats_.end(), -3.5f);
        for (std::size_t i = 0; i < halves_.size(); ++i) halves_[i] = bf16(0.25f * static_cast<float>(i));
        write_weights(path_, config_, tensors_);
    }
    void TearDown() override { std::filesystem::remove_all(folder_); }

    void put(std::string_view bytes) const {
        std::ofstream(path_, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
    // Changes the file and repairs the checksums that would hide the change.
    void patch(const std::function<void(std::string&)>& change, bool repair_header = true) {
        std::string bytes = read_file(path_);
        change(bytes);
        if (repair_header && bytes.size() >= 1024) {
            const std::uint64_t hash = hash_bytes(bytes.data(), 1016);
            std::memcpy(bytes.data() + 1016, &hash, 8);
        }
        put(bytes);
    }
    // The file with another table, everything else consistent with it.
    void retable(const std::function<void(Json&)>& change) {
        patch([&](std::string& bytes) {
            std::uint64_t size = 0, payload = 0;
            std::memcpy(&size, bytes.data() + 16, 8);
            std::memcpy(&payload, bytes.data() + 48, 8);
            Json table = Json::parse(bytes.substr(1024, size));
            change(table);
            const std::string text = table.dump();
            const std::uint64_t moved = (1024 + text.size() + 255) / 256 * 256, hash = hash_bytes(text),
                                n = text.size();
            std::string head = bytes.substr(0, 1024) + text;
            head.resize(moved, '\0');
            bytes = head + bytes.substr(payload);
            std::memcpy(bytes.data() + 16, &n, 8);
            std::memcpy(bytes.data() + 32, &hash, 8);
            std::memcpy(bytes.data() + 48, &moved, 8);
        });
    }
    testing::AssertionResult refused(const std::string& part) {
        try {
            WeightsFile file(path_);
        } catch (const InputError& e) {
            const std::string text = e.what();
            if (text.find(path_) == 0 && text.find(part) != std::string::npos && text.find('\n') == std::string::npos)
                return testing::AssertionSuccess();
            return testing::AssertionFailure() << "no '" << part << "' in: " << text;
        }
        return testing::AssertionFailure() << "was read";
    }

    std::string folder_ =
        (std::filesystem::temp_directory_path() / ("fiedler_fdl_" + std::to_string(getpid()))).string();
    std::string path_ = join_path(folder_, "weights.fdl");
    std::vector<float> floats_ = std::vector<float>(15);
    std::vector<bf16> halves_ = std::vector<bf16>(200);
    Json config_ = {{"layers", 2}, {"pattern", "sb"}};
    std::vector<WeightTensor> tensors_ = {{"embedding.weight", "bf16", {10, 20}, halves_.data()},
                                          {"layers.0.bias", "f32", {15}, floats_.data()},
                                          {"head.weight", "bf16", {4, 50}, halves_.data()}};
};

TEST_F(Weights, ComeBackAsTheyWereWritten) {
    const WeightsFile file(path_);
    EXPECT_EQ(file.config(), config_);
    ASSERT_EQ(file.tensors().size(), 3u);
    for (std::size_t i = 0; i < 3; ++i) {
        const WeightTensor& t = file.tensors()[i];
        EXPECT_EQ(t.name, tensors_[i].name);
        EXPECT_EQ(t.dtype, tensors_[i].dtype);
        EXPECT_EQ(t.shape, tensors_[i].shape);
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.data) % 256, 0u);
        EXPECT_EQ(std::memcmp(t.data, tensors_[i].data, t.bytes()), 0);
    }
    std::vector<float> out(200);
    file.read_f32("embedding.weight", {10, 20}, out.data());
    EXPECT_EQ(out[199], static_cast<float>(halves_[199]));
    file.read_f32("layers.0.bias", {15}, out.data());
    EXPECT_EQ(out[14], 10.5f);
    EXPECT_THROW(file.read_f32("layers.0.bias", {3, 5}, out.data()), InputError);
    EXPECT_THROW(file.read_f32("layers.1.bias", {15}, out.data()), InputError);
    EXPECT_TRUE(is_weights_file(path_));
    EXPECT_FALSE(is_weights_file(folder_));
}

TEST_F(Weights, AreWrittenTheSameEachTime) {
    const std::string first = read_file(path_);
    write_weights(path_, config_, tensors_);
    EXPECT_EQ(read_file(path_), first);
    EXPECT_EQ(first.size() % 256, 0u);
}

TEST_F(Weights, NumPyReadsThem) {
    const std::string tool = FIEDLER_SOURCE_DIR "/tools/read_fdl.py";
    if (std::system("python3 -c 'import numpy' 2>/dev/null") != 0) GTEST_SKIP() << "NO NUMPY, NOT TESTED";
    const std::string out = join_path(folder_, "out.txt");
    ASSERT_EQ(std::system(("python3 '" + tool + "' '" + path_ + "' layers.0.bias > '" + out + "'").c_str()), 0);
    const std::string text = read_file(out);
    EXPECT_NE(text.find("-3.5"), std::string::npos) << text;
    EXPECT_NE(text.find("10.5"), std::string::npos) << text;
}

TEST_F(Weights, TruncationAtEveryLengthIsRefused) {
    const std::string whole = read_file(path_);
    for (std::size_t n = 0; n < whole.size(); n += n < 1100 ? 37 : 101) {
        put(std::string_view(whole).substr(0, n));
        EXPECT_TRUE(refused(n < 4 ? "is not a Fiedler weights file" : "is truncated")) << n;
    }
    put(whole + "x");
    EXPECT_TRUE(refused("follow its end"));
}

TEST_F(Weights, EveryFlippedByteIsRefused) {
    const std::string whole = read_file(path_);
    for (std::size_t at = 0; at < whole.size(); at += at < 1200 ? 1 : 13) {
        std::string bytes = whole;
        bytes[at] = static_cast<char>(bytes[at] ^ 0x20);
        put(bytes);
        // Bytes between the table and the payload belong to nobody; they are the only ones without a checksum.
        std::uint64_t size = 0, payload = 0;
        std::memcpy(&size, whole.data() + 16, 8);
        std::memcpy(&payload, whole.data() + 48, 8);
        if (at >= 1024 + size && at < payload)
            EXPECT_NO_THROW(WeightsFile{path_});
        else
            EXPECT_TRUE(refused("")) << at;
    }
}

TEST_F(Weights, ForeignAndNewerFilesAreRefused) {
    patch([](std::string& b) { b[4] = 2; });
    EXPECT_TRUE(refused("version 2, and this fiedler reads version 1: use a newer fiedler"));
    put(std::string(5000, 'x'));
    EXPECT_TRUE(refused("is not a Fiedler weights file"));
    put("");
    EXPECT_TRUE(refused("is not a Fiedler weights file"));
    std::filesystem::remove(path_);
    EXPECT_TRUE(refused(""));
}

TEST_F(Weights, LyingTablesAreRefused) {
    const std::string whole = read_file(path_);
    const auto tensor = [](Json& t, int i) -> Json& { return t["tensors"][static_cast<std::size_t>(i)]; };
    const std::vector<std::pair<std::function<void(Json&)>, const char*>> lies = {
        {[&](Json& t) { tensor(t, 1)["offset"] = 0; }, "over another"},
        {[&](Json& t) { tensor(t, 1)["offset"] = 513; }, "outside the payload or over another"},
        {[&](Json& t) { tensor(t, 2)["offset"] = 1024; }, "outside the payload"},
        {[&](Json& t) { tensor(t, 2)["offset"] = -256; }, "outside the payload"},
        {[&](Json& t) { tensor(t, 2)["offset"] = std::int64_t{1} << 62; }, "outside the payload"},
        {[&](Json& t) { tensor(t, 2)["bytes"] = 16; }, "shape"},
        {[&](Json& t) {
             tensor(t, 2)["shape"] = {std::int64_t{1} << 40, std::int64_t{1} << 40};
         },
         "shape"},
        {[&](Json& t) {
             tensor(t, 2)["shape"] = {-4, -50};
         },
         "shape"},
        {[&](Json& t) { tensor(t, 2)["shape"] = Json::array(); }, "shape"},
        {[&](Json& t) { tensor(t, 2)["dtype"] = "fp8"; }, "newer fiedler"},
        {[&](Json& t) { tensor(t, 2)["name"] = "layers.0.bias"; }, "two tensors"},
        {[&](Json& t) { tensor(t, 2).erase("shape"); }, "lacks a field"},
        {[&](Json& t) { tensor(t, 2) = 7; }, "lacks a field"},
        {[&](Json& t) { t["tensors"].erase(2); }, "counts 3 tensors and its table 2"},
        {[&](Json& t) { t = Json::array(); }, "JSON"},
    };
    for (const auto& [lie, part] : lies) {
        put(whole);
        retable([](Json&) {});
        ASSERT_NO_THROW(WeightsFile{path_});
        retable(lie);
        EXPECT_TRUE(refused(part));
    }
    put(whole);
    patch([](std::string& b) { std::memset(b.data() + 8, 0x7f, 4); });  // 2 billion tensors
    EXPECT_TRUE(refused("counts 2139062143 tensors"));
    for (const std::size_t field : {16, 24, 40, 48}) {  // sizes and offsets of table and payload
        put(whole);
        patch([&](std::string& b) { std::memset(b.data() + field, 0xff, 8); });
        EXPECT_TRUE(refused("corrupt")) << field;
    }
}

TEST_F(Weights, AFailedWriteLeavesTheOldFile) {
    const std::string before = read_file(path_);
    tensors_[1].data = nullptr;
    EXPECT_THROW(write_weights(path_, config_, tensors_), std::logic_error);
    EXPECT_EQ(read_file(path_), before);
    tensors_[1].data = floats_.data();
    EXPECT_THROW(write_weights(join_path(folder_, "no/such/weights.fdl"), config_, tensors_), InputError);
}

}  // namespace
}  // namespace fiedler
