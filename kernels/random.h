// kernels/random.h: random bits as a pure function of (seed, stream, index), the same on every machine, host or device.
// engine/rng.h builds numbers from them.
//
// The sequence over the index is SplitMix64 (Steele, Lea, Flood 2014) started at a hash of seed and stream.
#pragma once
#include <cstdint>

#include "kernels/packed.h"

namespace fiedler::rng {

inline constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15ull;

FIEDLER_HD inline std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Where a stream's sequence starts, and its index-th member.
FIEDLER_HD inline std::uint64_t stream_start(std::uint64_t seed, std::uint64_t stream) {
    return mix(mix(seed + kGolden) ^ (stream + 1) * 0xd1342543de82ef95ull);
}
FIEDLER_HD inline std::uint64_t member(std::uint64_t start, std::uint64_t index) {
    return mix(start + (index + 1) * kGolden);
}
FIEDLER_HD inline std::uint64_t bits(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
    return member(stream_start(seed, stream), index);
}

inline constexpr std::uint64_t kSampleStream = 0x73616d706c65;  // "sample": of the tokens that a text is made of

}  // namespace fiedler::rng
