// kernels/attention_backward_tile_sm90.cuh: what both kernels of the backward pass of scalar-distance attention for sm_90a
// share, that of one scalar (attention_backward_one_sm90.cu) and that of several (attention_backward_packed_sm90.cu).
#pragma once
#include <algorithm>

#include "kernels/attention_backward.cuh"
#include "kernels/hopper.cuh"
#include "kernels/warpgroup_tile.cuh"

namespace fiedler::attention_backward_sm90_tile {

using namespace attention_tile;

constexpr int kWidth = 64;
constexpr int kTileElements = kTile * kWidth;

// ---- operands and products ---------------------------------------------------------------------------------------
// Tiles are rows of 64 bf16 with TMA's 128-byte swizzle (hopper.cuh), written by TMA and stmatrix.
//
// An operand whose rows run along M (or N) instead of the inner dimension, PTX ISA "M/N-major": with this swizzle its
// unit is 64 of M (128 bytes, one row of the tile) by 8 of K (eight rows, 1024 bytes). The stride of the descriptor is
// the distance of units along K, 1024 bytes as hopper::operand has it; its leading distance, that of units along M,
// is not used, because M = 64 is one unit. So the descriptor is the same; a step of 16 along K is two units, 2048 bytes.

using namespace warpgroup_tile;

// d += X' Y' with the inner dimension X's 64 rows and the 64 columns of Y.
template <int N>
__device__ void multiply_turned(float (&d)[N / 2], Operand x, Operand y) {
    hopper::product_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s) multiply<N, true>(d, advance(x, s * kRowStep), advance(y, s * kColumnStep), true);
    hopper::product_commit();
}

// Four 8 x 8 tiles of 16-bit values, turned: lane l gives where column l % 8 of tile l / 8 goes, 16 bytes.
__device__ inline void store_turned(std::uint32_t to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                    std::uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
// Where a thread's tiles of 16 columns go, of its warp's 16 rows: columns become rows of 64, swizzled. Tile m of the four
// is columns 8 (m / 2) .., rows 8 (m % 2) ..; the next 16 columns are 16 kRowBytes further on.
__device__ inline std::uint32_t place_of_turned(unsigned thread) {
    const unsigned lane = thread % kWarp, column = lane / 16 * 8 + lane % 8;
    const unsigned piece = (thread / kWarp * 2 + lane / 8 % 2) ^ lane % 8;
    return column * kRowBytes + piece * 16;
}
// The first of a thread's two rows of 64; the second is 8 further on.
__device__ inline unsigned first_row(unsigned thread) { return thread / kWarp * 16 + thread % kWarp / 4; }
__device__ inline int lane_of_row() { return static_cast<int>(static_cast<unsigned>(thread_anew()) % 4); }  // t

// Sums over the eight lanes g; a lane keeps an eighth of the values, those from `offset` on.
template <int V, int mask = 16>
__device__ void scatter_sums(float* x, int& offset) {
    if constexpr (mask >= 4) {
        const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
        for (int i = 0; i < V / 2; ++i) {
            const float keep = upper ? x[i + V / 2] : x[i], send = upper ? x[i] : x[i + V / 2];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, send, mask);
        }
        if (upper) offset += V / 2;
        scatter_sums<V / 2, mask / 2>(x, offset);
    }
}

// Tiles of queries that see the keys from `first` on.
struct Range {
    int begin, end;
    __device__ Range(const AttentionBackward<bf16>& p, int first) {
        const unsigned length = static_cast<unsigned>(p.seq.length), before = unsigned(first) / length * length;
        end = static_cast<int>((before + length) / kTile);
        begin = static_cast<int>((p.causal ? unsigned(first) : before) / kTile);
    }
};

// What both kernels ask for beside their numbers of scalars.
inline bool takes(const Cuda& device, const AttentionBackward<bf16>& p) {
    return device.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth &&
           p.seq.tokens < 65536 * 32 &&  // groups are counted in 16 bits
           p.window == 0 && p.seq.length > 0 && p.seq.length % kTile == 0 && p.lse.ld == p.heads &&
           p.delta.ld == p.heads && (!p.F || (p.F.ld == p.heads && p.dF.ld == p.heads)) &&
           reinterpret_cast<std::uintptr_t>(p.partial.data) % 16 == 0 &&
           p.partial.size >= attention_numbers_elements(p.seq.tokens, p.heads, kWidth, p.scalars) +
                                 attention_slab_elements(p.seq.tokens, p.heads, p.scalars);
}

// How the blocks share the work: groups of tiles of `keys` keys. before: floats of `partial` that are not slabs.
inline BackwardGroups groups_of(const AttentionBackward<bf16>& p, int keys, std::int64_t before) {
    BackwardGroups groups;
    groups.partial = p.partial.data + before;
    groups.slab_floats = attention_slab_elements(p.seq.tokens, p.heads, p.scalars);
    const auto most =
        std::min<std::int64_t>((p.partial.size - before) / groups.slab_floats, attention_most_slabs(p.scalars));
    const AttentionSlabs slabs = attention_slabs(p.seq, p.longest, p.window, p.causal, keys, most);
    const int span = slabs.tiles * keys;
    groups.slabs = slabs.slabs, groups.tiles = slabs.tiles;
    groups.count = ceil_div(p.seq.tokens, span);
    groups.per_sequence = p.seq.length % span == 0 ? p.seq.length / span : 0;
    return groups;
}
// A block for each of them. Causal: the first keys of a sequence are seen by most queries, and start first. Heads of a
// group are neighbours.
inline dim3 blocks_of(const AttentionBackward<bf16>& p, const BackwardGroups& groups) {
    const int of_sequence = groups.per_sequence > 0 ? groups.per_sequence : groups.count;
    return dim3(static_cast<unsigned>(p.heads), static_cast<unsigned>(groups.count / of_sequence),
                static_cast<unsigned>(of_sequence));
}

}  // namespace fiedler::attention_backward_sm90_tile
