// kernels/energy_place.cuh: which vectors are whose in energy's kernels (see energy_kernels.cuh).
#pragma once
#include <algorithm>

#include "kernels/energy_product.cuh"

namespace fiedler::energy_kernels {

using namespace energy_product;

// What a thread's group works on: tiles of vectors of 2^heads_log2 neighbouring heads, columns [first D, ..) of x: of a
// token all heads, then of the next. Groups with neighbouring columns are of neighbouring blocks: what is read at one
// time lies together. Those of one block have different places among the `per_column` groups of the same columns: so
// blocks have about as many tiles to do.
template <int kGroup>  // threads of a group
struct Place {
    static constexpr int kWarps = kGroup / kWarp, kVectors = kWarps * kTokens;  // of a group, at once
    int first, index;  // which group of the columns; per_column and more: there is nothing to do
    int heads_log2;
    bool second;  // side of the thread's vectors, and their head
    int head;
    __device__ __forceinline__ Place(int heads, int columns, int log2) : heads_log2(log2) {
        const int all = blockIdx.x + threadIdx.x / kGroup * gridDim.x, alike = columns >> log2;
        index = all / alike, first = (all - index * alike) << log2;
        const int column = first + (threadIdx.x % kWarp / 4 & ((1 << log2) - 1));
        second = column >= heads, head = second ? column - heads : column;
    }
    __device__ static __forceinline__ int warp() { return threadIdx.x % kGroup / kWarp; }
    // Of what a group takes at once: all tokens, that of the thread's vector g, and how much further on that of g + 8 is.
    __device__ __forceinline__ int tokens_at_once() const { return kVectors >> heads_log2; }
    __device__ __forceinline__ int token() const { return (warp() * kTokens + threadIdx.x % kWarp / 4) >> heads_log2; }
    __device__ __forceinline__ int further() const { return 8 >> heads_log2; }
    __device__ __forceinline__ int first_token(int per_column, int tokens) const {
        return index < per_column ? index * tokens_at_once() : ceil_div(tokens, kTokens) * kTokens;
    }
};
// How many groups share the tiles of the same columns, and the blocks that they are in.
struct Share {
    int per_column, heads_log2;
    unsigned blocks;
};

constexpr int kMultiprocessors = int(kEnergyMultiprocessors);
// All groups get the same number of rounds, or one less. Neighbouring heads' numbers of a token lie together: to read or
// write them at the same time takes far fewer accesses.
template <class P>
Share share_of(std::int64_t tokens, std::int64_t columns, int threads, int blocks) {
    const int heads_log2 = P::kManyHeads == 1 ? 0 : columns % 4 == 0 ? 2 : columns % 2 == 0 ? 1 : 0;
    const int group = P::kGroupThreads ? P::kGroupThreads : threads, in_block = threads / group;
    const std::int64_t alike = columns >> heads_log2, at_once = group / kWarp * kTokens >> heads_log2;
    const std::int64_t work = ceil_div(tokens, at_once);
    const std::int64_t most = std::max<std::int64_t>(1, blocks * kMultiprocessors * in_block / alike);
    const std::int64_t per_column = ceil_div(work, ceil_div(work, most));
    return {int(per_column), heads_log2, unsigned(ceil_div(per_column * alike, std::int64_t(in_block)))};
}

}  // namespace fiedler::energy_kernels
