#include "engine/shard.h"

#include <cstring>
#include <numeric>
#include <vector>

#include "engine/files.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

std::vector<std::int32_t> counting(std::int32_t n, std::int32_t modulus) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(n));
    for (std::int32_t i = 0; i < n; ++i) tokens[static_cast<std::size_t>(i)] = i % modulus;
    return tokens;
}

ShardInfo write_shard(const std::string& path, const std::vector<std::int32_t>& tokens, std::int32_t vocab) {
    ShardWriter writer(path, vocab);
    const std::span<const std::int32_t> all(tokens);
    writer.append(all.first(all.size() / 3));
    writer.append(all.subspan(all.size() / 3));
    return writer.finish();
}

// A file as llm.c writes it: header of three numbers, nothing else.
std::string llmc_bytes(std::int32_t magic, std::int32_t version, const std::string& payload, std::int32_t count) {
    std::int32_t header[256] = {magic, version, count};
    return std::string(reinterpret_cast<const char*>(header), sizeof header) + payload;
}
template <class T>
std::string raw(const std::vector<T>& v) {
    return std::string(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(T));
}

void change_int(const std::string& path, std::size_t index, std::int32_t value) {
    std::string bytes = slurp(path);
    std::memcpy(bytes.data() + 4 * index, &value, 4);
    std::ofstream(path, std::ios::binary) << bytes;
}

TEST(Shard, RoundTripInBothWidths) {
    const TempFolder t;
    for (const std::int32_t vocab : {300, 65536, 65537, 128256}) {
        const auto tokens = counting(70001, vocab);
        const ShardInfo written = write_shard(t / "s.bin", tokens, vocab);
        const Shard shard(t / "s.bin");
        EXPECT_EQ(shard.info().token_bytes, vocab <= 65536 ? 2 : 4);
        EXPECT_EQ(shard.info().vocab_size, vocab);
        EXPECT_EQ(shard.info().checksum, written.checksum);
        EXPECT_FALSE(shard.info().foreign);
        EXPECT_EQ(shard.info().max_token, std::min(vocab, 70001) - 1);
        ASSERT_EQ(shard.tokens(), 70001);
        std::vector<std::int32_t> back(tokens.size());
        shard.copy(0, 70001, back.data());
        EXPECT_EQ(back, tokens);
        EXPECT_EQ(shard[70000], tokens[70000]);
    }
}

TEST(Shard, EmptyOneIsValid) {
    const TempFolder t;
    write_shard(t / "s.bin", {}, 300);
    EXPECT_EQ(Shard(t / "s.bin").tokens(), 0);
}

TEST(Shard, HeaderIsThatOfLlmC) {
    const TempFolder t;
    write_shard(t / "s.bin", counting(10, 300), 300);
    const std::string bytes = slurp(t / "s.bin");
    ASSERT_EQ(bytes.size(), 1024u + 20);
    std::int32_t header[10];
    std::memcpy(header, bytes.data(), sizeof header);
    EXPECT_EQ(header[0], 20240520);
    EXPECT_EQ(header[1], 1);
    EXPECT_EQ(header[2], 10);
    EXPECT_EQ(header[3], 300);
}

TEST(Shard, ReadsLlmCFiles) {
    const TempFolder t;
    t.put("gpt2.bin", llmc_bytes(20240520, 1, raw<std::uint16_t>({50256, 1, 2, 65535}), 4));
    const Shard gpt2(t / "gpt2.bin");
    EXPECT_TRUE(gpt2.info().foreign);
    EXPECT_EQ(gpt2.info().vocab_size, 0);
    EXPECT_EQ(gpt2.info().max_token, 65535);
    EXPECT_EQ(gpt2[0], 50256);
    t.put("llama3.bin", llmc_bytes(20240801, 7, raw<std::uint32_t>({128000, 5}), 2));
    const Shard llama3(t / "llama3.bin");
    EXPECT_EQ(llama3.info().token_bytes, 4);
    EXPECT_EQ(llama3[0], 128000);
}

TEST(Shard, RefusesWhatIsNotWhole) {
    const TempFolder t;
    const std::string path = t / "s.bin";
    const auto fresh = [&] { write_shard(path, counting(1000, 300), 300); };
    const auto error = [&] { return input_error_of([&] { Shard s(path); }); };

    fresh();
    std::filesystem::resize_file(path, 1024 + 1999);
    EXPECT_HAS(error(), path);
    EXPECT_HAS(error(), "truncated, 999 of 1000 tokens");
    std::filesystem::resize_file(path, 100);
    EXPECT_HAS(error(), "truncated");
    std::filesystem::resize_file(path, 0);
    EXPECT_HAS(error(), "truncated");

    fresh();
    std::filesystem::resize_file(path, 1024 + 2001);
    EXPECT_HAS(error(), "corrupt");
    fresh();
    change_int(path, 256 + 77, 0x00110022);  // two tokens, both within the vocabulary
    EXPECT_HAS(error(), "checksum");
    fresh();
    change_int(path, 3, 200);  // a vocabulary smaller than its tokens
    EXPECT_HAS(error(), "outside its vocabulary of 200");
    fresh();
    change_int(path, 4, 4);
    EXPECT_HAS(error(), "corrupt header");
    fresh();
    change_int(path, 1, 2);
    EXPECT_HAS(error(), "newer");
    fresh();
    change_int(path, 1, 0);
    EXPECT_HAS(error(), "not known");
    fresh();
    change_int(path, 0, 20240326);
    EXPECT_HAS(error(), "not a token shard");
    EXPECT_FALSE(looks_like_shard(path));
    t.put("s.bin", llmc_bytes(20240801, 8, "", 0));
    EXPECT_HAS(error(), "newer");
    t.put("s.bin", llmc_bytes(20240520, 1, "ab", -1));
    EXPECT_HAS(error(), "corrupt header");
    EXPECT_HAS(input_error_of([&] { Shard s(t / "missing.bin"); }), "missing.bin");
}

TEST(Shard, WriterRefusesTokensOutsideTheVocabulary) {
    const TempFolder t;
    ShardWriter writer(t / "s.bin", 300);
    EXPECT_THROW(writer.append(std::vector<std::int32_t>{300}), RunError);
    EXPECT_THROW(writer.append(std::vector<std::int32_t>{-1}), RunError);
}

}  // namespace
}  // namespace fiedler::test
