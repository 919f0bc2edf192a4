// engine/dataset.h: what a training run reads: windows of tokens from the shards of a dataset folder.
//
// A dataset is a folder made by prepare() (dataset.json, tokenizer.model, train_*.bin, val_*.bin), or llm.c's shards:
// a folder of .bin files, or one .bin file (its last twentieth is then held out).
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/batch.h"
#include "engine/shard.h"
#include "engine/tokenizer.h"

namespace fiedler {

struct SplitInfo {
    std::int64_t documents = 0, bytes = 0, tokens = 0;  // bytes of text, separators not counted; 0 for foreign shards
    std::vector<std::string> files;                     // shard names within the folder
    std::vector<std::uint64_t> checksums;               // of the shards, as the manifest records them
};

// dataset.json, or what could be found out about foreign shards.
struct DatasetInfo {
    std::string folder;
    std::string split;  // "by document", "by position" (a single document), "none", or "foreign"
    std::string fingerprint;
    std::string skipped;  // what of the corpus was left out; empty: nothing
    std::int32_t vocab_size = 0;
    std::int32_t separator = -1;   // -1: not known
    bool separator_leads = false;  // it begins a document (llm.c) instead of ending it
    std::string tokenizer;         // file name within the folder; empty: none
    std::uint64_t tokenizer_checksum = 0;
    SplitInfo train, val;
    double unigram_entropy = 0;  // nats per token of the val split
};
std::string manifest_text(const DatasetInfo& info);    // dataset.json
DatasetInfo read_manifest(const std::string& folder);  // InputError when missing, corrupt or newer
bool is_dataset(const std::string& path);              // a dataset folder, or llm.c shards

// Tokens of several shards as one axis.
class TokenStream {
  public:
    void add(Shard shard);
    std::int64_t size() const { return starts_.back(); }
    void copy(std::int64_t first, std::int64_t count, std::int32_t* out) const;
    // A part of another stream, sharing its shards.
    TokenStream slice(std::int64_t first, std::int64_t count) const;
    const std::vector<std::shared_ptr<const Shard>>& shards() const { return shards_; }

  private:
    std::vector<std::shared_ptr<const Shard>> shards_;
    std::vector<std::int64_t> starts_{0};  // starts_[s]: position of shard s; the last: the size
    std::int64_t offset_ = 0;              // of position 0 within the first shard
};

struct TrainWindows {                   // which windows a training run reads
    std::int64_t rows = 0, length = 0;  // B and T
    std::uint64_t seed = 0;
    bool document_mask = false;
    int rank = 0, world = 1;  // this process reads every world-th window
};

class Dataset {
  public:
    static Dataset open(const std::string& path);
    const DatasetInfo& info() const { return info_; }
    const Tokenizer* tokenizer() const { return tokenizer_.get(); }  // nullptr for foreign shards
    const TokenStream& train() const { return train_; }
    const TokenStream& val() const { return val_; }

    // Training. Windows are numbered without end; window g belongs to epoch g / windows_per_epoch. An epoch shifts the
    // grid of windows by a random phase and shuffles it, so `cursor`, the windows consumed so far by all ranks, is the
    // whole state. A batch takes windows cursor + rank, cursor + rank + world, ...: advance by rows * world after it.
    void require_train(std::int64_t rows, std::int64_t length) const;  // InputError: less than one batch
    std::int64_t windows_per_epoch(std::int64_t length) const;
    void train_batch(std::int64_t cursor, const TrainWindows& windows, Batch& batch) const;

    // Validation: `count` windows that do not overlap, in order: all if max_windows is 0 or large, else spread evenly.
    std::int64_t val_windows(std::int64_t length, std::int64_t max_windows = 0) const;  // InputError: not even one
    void val_batch(std::int64_t first, std::int64_t count, std::int64_t rows, std::int64_t length, bool document_mask,
                   Batch& batch) const;
    // Windows at these places instead.
    void val_batch_at(std::span<const std::int64_t> starts, std::int64_t rows, std::int64_t length, bool document_mask,
                      Batch& batch) const;
    double val_entropy(std::int64_t count,
                       std::int64_t length) const;  // unigram, nats a token, of these windows' targets
    // Bytes of text that the targets stand for (padding and separators: none); nothing without a tokenizer.
    std::optional<std::int64_t> target_bytes(const Batch& batch) const;

  private:
    static Dataset open_prepared(const std::string& folder);
    static Dataset open_foreign(const std::string& path);
    std::int64_t val_start(std::int64_t window, std::int64_t count, std::int64_t length) const;
    void finish(Batch& batch, bool document_mask) const;
    DatasetInfo info_;
    std::shared_ptr<const Tokenizer> tokenizer_;
    TokenStream train_, val_;
};

double entropy_of_counts(const std::vector<std::int64_t>& counts);  // nats

}  // namespace fiedler
