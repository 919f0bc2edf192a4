#include "engine/shard.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine/error.h"

namespace fiedler {

static_assert(std::endian::native == std::endian::little, "shards are little-endian and mapped as they are");

namespace {

using Header = std::array<std::int32_t, 256>;
static_assert(sizeof(Header) == kShardHeaderBytes);

constexpr std::int32_t kMagic16 = 20240520, kVersion16 = 1;
constexpr std::int32_t kMagic32 = 20240801, kVersion32 = 7;
constexpr std::int32_t kMarker = 0x4c444946;  // "FIDL"
enum Field { kMagic, kVersion, kCount, kVocab, kTokenBytes, kCountLow, kCountHigh, kHashLow, kHashHigh, kMark };

std::uint64_t join(std::int32_t low, std::int32_t high) {
    return static_cast<std::uint32_t>(low) | (static_cast<std::uint64_t>(static_cast<std::uint32_t>(high)) << 32);
}
std::int32_t low_half(std::uint64_t x) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(x)); }
std::int32_t high_half(std::uint64_t x) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(x >> 32)); }

void check_version(const std::string& path, std::int32_t found, std::int32_t known) {
    if (found > known)
        input_error(
            "{}: shard version {} is newer than this program reads ({}); update Fiedler or prepare the data again",
            path, found, known);
    if (found < known) input_error("{}: shard version {} is not known; prepare the data again", path, found);
}

ShardInfo parse_header(const std::string& path, const MappedFile& file) {
    if (file.size() < static_cast<std::size_t>(kShardHeaderBytes))
        input_error("{}: truncated, {} bytes where the header alone has {}; prepare or download it again", path,
                    file.size(), kShardHeaderBytes);
    Header h;
    std::memcpy(h.data(), file.data(), sizeof h);
    ShardInfo info;
    info.path = path;
    if (h[kMagic] == kMagic16) {
        check_version(path, h[kVersion], kVersion16);
        info.token_bytes = 2;
    } else if (h[kMagic] == kMagic32) {
        check_version(path, h[kVersion], kVersion32);
        info.token_bytes = 4;
    } else {
        input_error(
            "{}: not a token shard (its first number is {}, not {} or {}); give a folder made by `fiedler prepare`",
            path, h[kMagic], kMagic16, kMagic32);
    }
    info.foreign = h[kMark] != kMarker;
    info.tokens = h[kCount];
    if (!info.foreign) {
        info.vocab_size = h[kVocab];
        info.tokens = static_cast<std::int64_t>(join(h[kCountLow], h[kCountHigh]));
        info.checksum = join(h[kHashLow], h[kHashHigh]);
        if (h[kTokenBytes] != info.token_bytes || h[kCount] != low_half(static_cast<std::uint64_t>(info.tokens)) ||
            info.vocab_size <= 0)
            input_error("{}: corrupt header; prepare the data again", path);
    }
    const auto payload = static_cast<std::int64_t>(file.size()) - kShardHeaderBytes;
    if (info.tokens < 0 || info.tokens > std::numeric_limits<std::int64_t>::max() / 4)
        input_error("{}: corrupt header (token count {}); prepare the data again", path, info.tokens);
    const std::int64_t expected = info.tokens * info.token_bytes;
    if (payload < expected)
        input_error("{}: truncated, {} of {} tokens are there; prepare or download it again", path,
                    payload / info.token_bytes, info.tokens);
    if (payload > expected)
        input_error("{}: corrupt, {} bytes follow the {} tokens its header names; prepare or download it again", path,
                    payload - expected, info.tokens);
    return info;
}

template <class T>
std::uint32_t largest(const std::byte* bytes, std::int64_t count) {
    const T* tokens = reinterpret_cast<const T*>(bytes);  // the payload starts 1,024 bytes into a page
    T most = 0;
    for (std::int64_t i = 0; i < count; ++i) most = std::max(most, tokens[i]);
    return most;
}

}  // namespace

struct ShardWriter::Hash {
    XXH3_state_t state;
};

ShardWriter::ShardWriter(const std::string& path, std::int32_t vocab_size)
    : file_(path), hash_(std::make_unique<Hash>()) {
    info_.path = path;
    info_.vocab_size = vocab_size;
    info_.token_bytes = vocab_size <= 65536 ? 2 : 4;
    XXH3_64bits_reset(&hash_->state);
    const Header empty{};
    file_.write(empty.data(), sizeof empty);
}
ShardWriter::~ShardWriter() = default;

void ShardWriter::append(std::span<const std::int32_t> tokens) {
    for (const std::int32_t token : tokens) {
        if (token < 0 || token >= info_.vocab_size)
            run_error("{}: token {} outside the vocabulary of {}", info_.path, token, info_.vocab_size);
        info_.max_token = std::max(info_.max_token, token);
    }
    const auto put = [&](const void* bytes, std::size_t count) {
        XXH3_64bits_update(&hash_->state, bytes, count);
        file_.write(bytes, count);
    };
    if (info_.token_bytes == 2) {
        const std::vector<std::uint16_t> narrow(tokens.begin(), tokens.end());
        put(narrow.data(), narrow.size() * 2);
    } else {
        put(tokens.data(), tokens.size() * 4);
    }
    info_.tokens += static_cast<std::int64_t>(tokens.size());
}

ShardInfo ShardWriter::finish() {
    info_.checksum = XXH3_64bits_digest(&hash_->state);
    const auto count = static_cast<std::uint64_t>(info_.tokens);
    Header h{};
    h[kMagic] = info_.token_bytes == 2 ? kMagic16 : kMagic32;
    h[kVersion] = info_.token_bytes == 2 ? kVersion16 : kVersion32;
    h[kCount] = low_half(count);
    h[kVocab] = info_.vocab_size;
    h[kTokenBytes] = info_.token_bytes;
    h[kCountLow] = low_half(count);
    h[kCountHigh] = high_half(count);
    h[kHashLow] = low_half(info_.checksum);
    h[kHashHigh] = high_half(info_.checksum);
    h[kMark] = kMarker;
    file_.overwrite(0, h.data(), sizeof h);
    file_.close();
    return info_;
}

Shard::Shard(const std::string& path) : file_(path), info_(parse_header(path, file_)) {
    const std::byte* payload = file_.data() + kShardHeaderBytes;
    const auto bytes = static_cast<std::size_t>(info_.tokens * info_.token_bytes);
    if (info_.checksum != 0 && XXH3_64bits(payload, bytes) != info_.checksum)
        input_error("{}: corrupt, the checksum of its tokens does not match; prepare the data again", path);
    if (info_.tokens == 0) return;
    const std::uint32_t most = info_.token_bytes == 2 ? largest<std::uint16_t>(payload, info_.tokens)
                                                      : largest<std::uint32_t>(payload, info_.tokens);
    if (most > 0x7fffffffu || (info_.vocab_size > 0 && most >= static_cast<std::uint32_t>(info_.vocab_size)))
        input_error("{}: corrupt, holds token {} outside its vocabulary of {}; prepare the data again", path, most,
                    info_.vocab_size);
    info_.max_token = static_cast<std::int32_t>(most);
}

std::int32_t Shard::operator[](std::int64_t i) const {
    std::int32_t token;
    copy(i, 1, &token);
    return token;
}

void Shard::copy(std::int64_t first, std::int64_t count, std::int32_t* out) const {
    const std::byte* payload = file_.data() + kShardHeaderBytes;
    if (info_.token_bytes == 2) {
        const auto* tokens = reinterpret_cast<const std::uint16_t*>(payload) + first;
        std::copy(tokens, tokens + count, out);
    } else if (count > 0) {  // an empty list of tokens has no memory to copy to
        std::memcpy(out, payload + first * 4, static_cast<std::size_t>(count) * 4);
    }
}

bool looks_like_shard(const std::string& path) {
    if (!file_exists(path)) return false;
    std::int32_t magic = 0;
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (!file) return false;
    const bool read = std::fread(&magic, sizeof magic, 1, file) == 1;
    std::fclose(file);
    return read && (magic == kMagic16 || magic == kMagic32);
}

}  // namespace fiedler
