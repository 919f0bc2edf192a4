// kernels/random.h: random numbers as a pure function of (seed, stream, index), on the host and on the device: what
// engine/rng.h is made of. The sequence over the index is SplitMix64 (Steele, Lea, Flood 2014) started at a hash of seed
// and stream.
#pragma once
#include <cstdint>

#include "kernels/packed.h"

namespace fiedler::rng {

FIEDLER_HD inline std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

FIEDLER_HD inline std::uint64_t bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
    constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ull;
    const std::uint64_t start = mix(mix(seed + kGolden) ^ (stream + 1) * 0xd1342543de82ef95ull);
    return mix(start + (index + 1) * kGolden);
}

inline constexpr std::uint64_t kSampleStream = 0x73616d706c65;  // "sample": of the tokens that a text is made of

}  // namespace fiedler::rng
