// engine/shard.h: token shards, the flat files a training run reads (data/README.md has the layout byte by byte).
//
// 256 little-endian int32 of header, then the tokens: uint16 (magic 20240520, version 1) for vocabularies up to 65,536,
// uint32 (magic 20240801, version 7) above. llm.c's shards have the same first three fields and are read too.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "engine/files.h"

namespace fiedler {

constexpr std::int64_t kShardHeaderBytes = 1024;

struct ShardInfo {
    std::string path;
    std::int64_t tokens = 0;
    std::int32_t vocab_size = 0;  // 0: the file does not say (llm.c)
    std::int32_t max_token = -1;  // largest token in it
    int token_bytes = 2;
    bool foreign = false;        // not written by Fiedler
    std::uint64_t checksum = 0;  // XXH3-64 of the tokens; 0: absent
};

// Writes a shard under its final name: write into a StagedFolder, so that a half-written one is never seen.
class ShardWriter {
  public:
    ShardWriter(const std::string& path, std::int32_t vocab_size);
    ~ShardWriter();
    void append(std::span<const std::int32_t> tokens);
    std::int64_t tokens() const { return info_.tokens; }
    ShardInfo finish();  // writes the header, makes the file durable

  private:
    FileWriter file_;
    ShardInfo info_;
    struct Hash;
    std::unique_ptr<Hash> hash_;
};

// A shard mapped into memory. Opening it reads it once and checks size, token range and, where there is one, checksum.
class Shard {
  public:
    explicit Shard(const std::string& path);
    const ShardInfo& info() const { return info_; }
    std::int64_t tokens() const { return info_.tokens; }
    std::int32_t operator[](std::int64_t i) const;
    void copy(std::int64_t first, std::int64_t count, std::int32_t* out) const;

  private:
    MappedFile file_;
    ShardInfo info_;
};

// Does the file begin like a shard (of any version)? False for what cannot be read.
bool looks_like_shard(const std::string& path);

}  // namespace fiedler
