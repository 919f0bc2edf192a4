// engine/rng.h: random numbers as a pure function of (seed, stream, index): nothing to save, nothing to share between
// threads, and the same numbers on every machine. A stream is one use of randomness (weights of one tensor, order of
// one epoch, ...); the index counts within it. The bits are those of kernels/random.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <numbers>

#include "kernels/random.h"

namespace fiedler::rng {

// In [0, 1), with 53 random bits.
inline double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
    return static_cast<double>(bits(seed, stream, index) >> 11) * 0x1p-53;
}

// Standard normal, by Box and Muller; index i uses the raw numbers 2i and 2i + 1 of the stream.
inline double normal(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
    const double radius = std::sqrt(-2 * std::log1p(-uniform(seed, stream, 2 * index)));
    return radius * std::cos(2 * std::numbers::pi * uniform(seed, stream, 2 * index + 1));
}

// In [0, n), n > 0: the high half of a 128-bit product (its bias is below n / 2^64).
inline std::uint64_t below(std::uint64_t n, std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
    __extension__ using Wide = unsigned __int128;
    return static_cast<std::uint64_t>((Wide(bits(seed, stream, index)) * n) >> 64);
}

// A shuffle of [0, n) without a table: permutation(i) is where i goes. A keyed Feistel network on the next even number
// of bits, applied again until the result falls below n (at most four times on average).
class Permutation {
  public:
    Permutation(std::uint64_t n, std::uint64_t seed, std::uint64_t stream) : n_(n), seed_(seed), stream_(stream) {
        while (half_ < 32 && (std::uint64_t{1} << (2 * half_)) < n) ++half_;
    }
    std::uint64_t size() const { return n_; }
    std::uint64_t operator()(std::uint64_t i) const {
        do i = scramble(i);
        while (i >= n_);
        return i;
    }

  private:
    std::uint64_t scramble(std::uint64_t x) const {
        const std::uint64_t mask = (std::uint64_t{1} << half_) - 1;
        std::uint64_t left = x >> half_, right = x & mask;
        for (std::uint64_t round = 0; round < 6; ++round) {
            const std::uint64_t next = left ^ (bits(seed_, stream_, (round << 32) | right) >> (64 - half_));
            left = right;
            right = next & mask;
        }
        return (left << half_) | right;
    }
    std::uint64_t n_, seed_, stream_;
    unsigned half_ = 1;  // bits of each half
};

}  // namespace fiedler::rng
