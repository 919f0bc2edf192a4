// kernels/tuning.h: block shapes of the fused kernels, with the reason of each: numbers that a kernel reads, no code.
#pragma once

namespace fiedler::tuning {

// Forward pass of scalar-distance attention (kernels/attention.cu). A group is four warps of `row_tiles` x 16 queries
// with one reference for their exponents; `groups` of them make a block and share the tiles of V.
struct AttentionForward {
    int row_tiles;  // 16-row tiles of a warp: each fragment of V read from shared memory feeds so many mma
    int groups;     // in a block
    int keys;       // of a stage: two are in shared memory, one computed with, one on its way
    int blocks;     // that fit on a multiprocessor: the bound on registers, 65,536 / (128 groups blocks)
};

// row_tiles: a fragment of V costs 512 bytes of shared memory reads, four cycles of a multiprocessor, and four mma of
//   one 16-row tile take 6.5 cycles of it on sm_90: with one tile a warp the reads, with two the tensor cores are the
//   limit. Two tiles hold 2 x D/2 accumulators and 2 R registers of scalars a thread: too many beyond D = 64 or R = 8.
// groups: one scalar costs so little that L2 is the next limit; 256 queries a block halve what V, b and F are read.
//   More scalars compute four times as long for the same tile, and small blocks balance better.
// keys: what a stage costs beside the pairs, some 150 instructions a warp, is spread over 128 keys where pairs are cheap;
//   two blocks of that are the most that fit into the 100 KiB of sm_86, sm_89 and sm_120.
// blocks: 16 warps a multiprocessor at 128 registers, 12 at 168; nothing spills on sm_80 to sm_120. The same on every
//   architecture: all have 65,536 registers, and shared memory stays below 100 KiB / blocks.
constexpr AttentionForward attention_forward(int width, int scalars) {
    const bool large = width == 128 || scalars == 16;
    if (scalars == 1) return {large ? 1 : 2, 2, large ? 64 : 128, 2};
    return {large ? 1 : 2, 1, 64, 3};
}
// Keys of a stage with more than one scalar. On an H100 half of the time is spent beside the pairs at 64: 128 where
// three blocks of that fit into the shared memory of a multiprocessor, and each into the 48 KiB that need not be asked
// for.
constexpr int attention_forward_keys(int arch, int width, int scalars) {
    const bool large = arch == 80 || arch == 90 || arch == 100;
    return large && scalars <= 8 && width <= 64 ? 128 : 64;
}

// Blocks of the forward pass on sm_90a, D = 64, one scalar (kernels/attention_forward_sm90.cu), that fit on a
// multiprocessor: one warpgroup with 128 queries each, 128 registers a thread.
constexpr int kAttentionForwardSm90Blocks = 4;
// The same of two to eight scalars (kernels/attention_forward_packed_sm90.cu), 168 registers a thread.
constexpr int kAttentionForwardPackedSm90Blocks = 3;

// Backward pass of scalar-distance attention (kernels/attention_backward.cuh; more than one scalar:
// attention_backward_packed.cuh). A block's warps have `row_tiles` x 16 keys each and stream the queries that see them.
struct AttentionBackward {
    int warps, row_tiles;
    bool values;  // whether V of the keys stays in registers; else it is read from shared memory
    int blocks;   // that fit on a multiprocessor: the bound on registers, 65,536 / (32 warps blocks)
    constexpr int keys() const { return 16 * warps * row_tiles; }  // of a block
};

// row_tiles: what is read for 16 queries (dO twice) and, with one scalar, what their sums over keys cost (exchange between
//   threads) are shared by the rows of a warp; dv takes row_tiles D/2 registers: two tiles are too many for D = 128.
//   With more scalars a pair costs so much that one tile, and more warps to hide each other's latency, are faster.
// warps: a tile of 64 queries costs a block some 300 instructions a warp beside the pairs, whatever its keys.
// values: row_tiles D/4 registers against a read of row_tiles D/16 fragments for 16 queries.
// blocks: what nothing spills at, on sm_80 to sm_120. Shared memory of a block stays below 99 KiB; with two to eight
//   scalars two blocks fit where a multiprocessor has more than 128 KiB.
constexpr AttentionBackward attention_backward(int width, int scalars) {
    if (scalars == 1) return width == 128 ? AttentionBackward{4, 1, true, 2} : AttentionBackward{4, 2, false, 3};
    if (scalars == 16 || width == 128) return {4, 1, scalars < 16 || width < 128, 2};
    return {8, 1, false, 2};
}

// The same on sm_90a, D = 64: a block is one warpgroup. One scalar: kernels/attention_backward_one_sm90.cuh; two to eight:
// kernels/attention_backward_packed_sm90.cuh.
struct AttentionBackwardSm90 {
    int keys;    // of a block at a time
    int blocks;  // that fit on a multiprocessor
};

// keys: dv and dP of keys / 2 numbers each stay in a thread, and of one scalar's sums two for keys / 4 of them. Measured with
//   eight scalars, 64 x 1,024 tokens: 32 keys and four blocks of 128 registers take 10 % longer; what a round costs beside
//   the pairs is shared by fewer of them.
// blocks: registers, 168 a thread. While one warpgroup waits for its products or at its barrier, the others compute.
constexpr AttentionBackwardSm90 attention_backward_sm90() { return {64, 3}; }

// The sum of the rounded weights: as a product with ones, an eighth more tensor-core work for D = 64, or with two more
// instructions a pair. arch: 80 to 120. GeForce cards take 32 cycles for a product that others do in 8 or less. On
// sm_80 eight scalars leave no registers for the product.
constexpr bool sums_on_tensor_cores(int arch, int scalars) {
    return arch == 90 || arch == 100 || (arch == 80 && scalars < 8);
}

// Sums of f16 distances, of R > 1 scalars, in f32: as products with -1 on the diagonal, R / 8 more of them than P V's D
// / 8 (kernels/attention_packed.cuh), or, for the same reason, with conversions.
constexpr bool scores_on_tensor_cores(int arch) { return arch == 80 || arch == 90 || arch == 100; }

// Columns of a panel of weights of kernels/panel_sm90.cuh, for this inner dimension.
//
// The more, the fewer times the rows of the other operand are read; 147 KiB of the 227 of a block are the panel's, and
// each of its 256 threads that multiply keeps half as many sums in registers.
constexpr int panel_columns(long long depth) { return depth <= 384 ? 192 : depth <= 576 ? 128 : 96; }

// Sequences from this length on go through attention_tree. On an H200 dense attention is the faster one at 4,096 still
// (`fiedler bench attention_tree`); where they meet on a CPU has not been measured.
constexpr long long attention_tree_from(bool cuda) { return cuda ? 8192 : 4096; }
// Bidirectional attention is one node of the tree, whatever the length. On two CPU cores it wins from some hundred nodes.
constexpr long long attention_tree_from_bidirectional(bool cuda) { return cuda ? 8192 : 512; }
// Decoders from this length on keep attention_runs on the CPU. At 1,048,576 keys a query is thousands of times faster so;
// where they meet has not been measured.
constexpr long long kAttentionRunsFrom = 1024;

}  // namespace fiedler::tuning
