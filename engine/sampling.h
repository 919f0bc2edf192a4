// engine/sampling.h: choosing the next token from logits. A pure function of logits, settings, seed and position.
#pragma once
#include <cstdint>
#include <vector>

namespace fiedler {

struct SamplingSettings {
    double temperature = 0.8;  // 0: greedy
    std::int64_t top_k = 0;    // 0: all
    double top_p = 1;          // the smallest set of most likely tokens whose probability reaches top_p
    std::uint64_t seed = 1;
};

// position: of the token to be drawn in its sequence; with the seed it decides the random number. Ties: lowest token.
std::int32_t sample(const std::vector<float>& logits, const SamplingSettings&, std::uint64_t position);

}  // namespace fiedler
