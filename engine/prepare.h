// engine/prepare.h: from a corpus to a dataset folder: tokenizer, shards with a held-out split by document, manifest.
#pragma once
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>

#include "engine/corpus.h"
#include "engine/dataset.h"

namespace fiedler {

struct PrepareOptions {
    CorpusOptions corpus;
    int vocab_size = 16384;
    std::string tokenizer;          // use this SentencePiece model instead of training one (vocab_size is then its own)
    double val_fraction = 0.05;     // share of the documents held out: 0 none, 1 all of them
    std::int64_t sample_bytes = 0;  // text the tokenizer learns from; 0: by vocabulary size
    std::int64_t shard_tokens = 100'000'000;
    int threads = 0;                  // 0: all; the result does not depend on it
    bool replace = false;             // an existing dataset at the output gives way
    std::function<bool()> cancelled;  // polled; true: RunError, nothing left behind
};

// Writes the dataset folder `output`; progress and a summary go to log (nullptr: silent). The same corpus and options
// give the same bytes. Nothing is at `output` before everything is.
DatasetInfo prepare(const PrepareOptions& options, const std::string& output, std::FILE* log);

struct Prepared {
    std::string folder;   // for Dataset::open
    bool reused = false;  // was there already
};
// What `train --data PATH` does: a dataset is taken as it is; a corpus is prepared into a folder below `cache` named by
// its fingerprint, or found there when neither the corpus nor the options changed.
Prepared prepare_if_needed(const PrepareOptions& options, const std::string& cache, std::FILE* log);

std::string dataset_fingerprint(const Corpus& corpus, const PrepareOptions& options);

}  // namespace fiedler
