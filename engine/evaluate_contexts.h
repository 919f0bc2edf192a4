// engine/evaluate_contexts.h: the loss of the same held-out tokens for several context lengths (strided evaluation).
//
// For a context of c tokens the split is read in windows of c tokens that advance by c / 2, and only the last half of a
// window is scored: each of its targets is predicted from c / 2 + 1 to c tokens (fewer where a document mask hides those
// of other documents). What is scored lies in blocks of half of the longest context, so that every context scores the
// same targets, and the blocks' losses can be compared in pairs.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "engine/dataset.h"
#include "engine/evaluate.h"

namespace fiedler {

struct ScoredBlocks {
    std::int64_t tokens = 0;          // of a block, all scored
    std::vector<std::int64_t> first;  // of each block: where its first input lies in the split; the target is the next
    std::int64_t scored() const { return static_cast<std::int64_t>(first.size()) * tokens; }
};
// All blocks that have half of `longest` tokens before them; max_tokens > 0: at most so many tokens, but one block at
// least, spread evenly. longest: even. InputError where the split has not even one.
ScoredBlocks scored_blocks(const Dataset&, std::int64_t longest, std::int64_t max_tokens);

struct TargetStatistics {
    double unigram_entropy = 0;         // nats a token
    std::optional<std::int64_t> bytes;  // absent without a tokenizer
};
TargetStatistics statistics_of(const ScoredBlocks&, const Dataset&);

struct ContextLoss {
    std::int64_t context = 0, windows = 0;
    double loss = 0;                  // nats a token
    std::vector<double> block_means;  // of each block, nats a token
    double seconds = 0;
};
// At the source's context, even and at most twice a block. A source without token_losses must take one row at a time.
ContextLoss loss_at_context(const LossSource&, const Dataset&, const ScoredBlocks&, bool document_mask);

struct PairedDifference {
    double mean = 0;                       // nats a token
    std::optional<double> standard_error;  // over the blocks; absent where there is one only
};
PairedDifference paired_difference(const ContextLoss& of, const ContextLoss& against);  // of the same blocks

}  // namespace fiedler
