// engine/evaluate.h: validation: mean loss, bits per byte, and the unigram entropy of the same tokens.
#pragma once
#include <functional>
#include <optional>
#include <vector>

#include "engine/dataset.h"
#include "engine/engine.h"

namespace fiedler {

// Mean loss of the tokens that have from `begin` to `end` - 1 tokens before them in their sequence.
struct LossAtPosition {
    std::int64_t begin = 0, end = 0, tokens = 0;
    double loss = 0;  // nats
};

struct Evaluation {
    double loss = 0;             // nats a token
    double unigram_entropy = 0;  // nats a token, of the same targets: what a model that ignores context can reach
    std::optional<double> bits_per_byte;
    std::int64_t tokens = 0;
    double seconds = 0;
    std::vector<LossAtPosition> by_position;  // 0-15, 16-31, 32-63, ...; empty where it was not asked for
};

// What has a loss: windows of `context` tokens, at most `rows` of them in a batch.
struct LossSource {
    std::int64_t context = 0, rows = 1;
    std::function<double(const Batch&)> loss_sum;
    std::function<std::vector<float>(const Batch&)> token_losses =
        {};  // of each target, 0 where ignored; may be absent
};
// by_position: token_losses must be there.
Evaluation evaluate(const LossSource&, const Dataset&, std::int64_t max_tokens, bool document_mask,
                    bool by_position = false);
// At most max_tokens tokens (0: all), in windows of the engine's context that do not overlap.
Evaluation evaluate(Engine&, const Dataset&, std::int64_t max_tokens, bool document_mask);

}  // namespace fiedler
