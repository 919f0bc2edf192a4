// kernels/dot_tile.cuh: tiles of bf16 rows in shared memory for dot.cu, and which part of the score matrix a warp sees.
//
// A tile is rows x D values. Its 16-byte chunks are permuted within each row (swizzle) so that the eight rows of one
// ldmatrix, and the eight rows of one accumulator store, fall on different banks for every D.
#pragma once
#include "kernels/attention.h"
#include "kernels/common.cuh"
#include "kernels/mma.cuh"

namespace fiedler::dot {

constexpr int kRows = 64;      // rows of the score matrix that a block owns
constexpr int kWarpRows = 16;  // and a warp
constexpr int kThreads = kRows / kWarpRows * kWarp;

// Offset in elements of 8-value chunk `chunk` of row `row`.
template <int D>
__device__ inline int swizzle(int row, int chunk) {
    constexpr int chunks = D / 8;                              // in a row
    constexpr int shared_line = chunks >= 8 ? 1 : 8 / chunks;  // rows in 128 bytes, one pass over all banks
    constexpr int period = chunks >= 8 ? 8 : chunks;
    return row * D + ((chunk ^ (row / shared_line % period)) * 8);
}

// A head's columns of a [tokens, heads D] matrix.
struct Columns {
    const nv_bf16* data;
    std::int64_t ld;
    int tokens;
};
template <int D>
__device__ inline Columns head_columns(const Mat<const bf16>& m, int head) {
    return {reinterpret_cast<const nv_bf16*>(m.data) + std::int64_t(head) * D, m.ld, int(m.rows)};
}

// Rows [first, first + kCount) -> shared memory, asynchronously, by the whole block; zero beyond the last token.
template <int D, int kCount>
__device__ inline void load_tile(nv_bf16* tile, const Columns& m, int first) {
    constexpr int chunks = D / 8, total = kCount * chunks;
#pragma unroll
    for (int i = 0; i < total; i += kThreads) {
        const int at = i + int(threadIdx.x);
        if (total % kThreads != 0 && at >= total) break;
        const int row = at / chunks, chunk = at % chunks;
        const bool inside = first + row < m.tokens;
        const nv_bf16* source = m.data + (inside ? (first + row) * m.ld + chunk * 8 : 0);
        cp_async16(tile + swizzle<D>(row, chunk), source, inside);
    }
}
// 4 bytes global -> shared; zero when !valid (then src is not read).
__device__ inline void cp_async4(void* dst, const void* src, bool valid) {
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(bytes));
}

// A operand: rows [row, row + 16), values [16 k, 16 k + 16).
template <int D>
__device__ inline void load_a(std::uint32_t (&a)[4], const nv_bf16* tile, int row, int k) {
    const int lane = threadIdx.x % kWarp;
    ldmatrix_x4(a, tile + swizzle<D>(row + lane % 16, 2 * k + lane / 16));
}
// B operand of A X': rows [row, row + 16) of X are 16 columns of the product, the first 8 in b[0] and b[1], the others
// in b[2] and b[3].
template <int D>
__device__ inline void load_b_transposed(std::uint32_t (&b)[4], const nv_bf16* tile, int row, int k) {
    const int lane = threadIdx.x % kWarp;
    ldmatrix_x4(b, tile + swizzle<D>(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
}
// B operand of A X: rows [row, row + 16) of X are summed over; columns [16 n, 16 n + 16), as above.
template <int D>
__device__ inline void load_b(std::uint32_t (&b)[4], const nv_bf16* tile, int row, int n) {
    const int lane = threadIdx.x % kWarp;
    ldmatrix_x4_trans(b, tile + swizzle<D>(row + lane % 16, 2 * n + lane / 16));
}
// Two neighbouring 16 x 8 accumulators, rounded: one A operand.
__device__ inline void to_a(std::uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack_bf16(left[0], left[1]);
    a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]);
    a[3] = pack_bf16(right[2], right[3]);
}
// sum += a X over 16 rows of X, all D columns.
template <int D>
__device__ inline void multiply_add(float (&sum)[D / 8][4], const std::uint32_t (&a)[4], const nv_bf16* tile, int row) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        std::uint32_t b[4];
        load_b<D>(b, tile, row, n);
        mma_bf16(sum[2 * n], a, b[0], b[1]);
        mma_bf16(sum[2 * n + 1], a, b[2], b[3]);
    }
}

// Columns [lo, hi).
struct Band {
    int lo = 0, hi = 0;
    __device__ bool meets(int first, int count) const { return first < hi && first + count > lo; }
    __device__ bool holds(int first, int count) const { return lo <= first && first + count <= hi; }
    __device__ bool has(int column) const { return lo <= column && column < hi; }
};
// Columns that some row of [first, end) sees, and that all see; rows beyond the last token see nothing.
__device__ inline Band any_of(const Sight& sight, int first, int end) {
    const int last = min(end, sight.seq.tokens) - 1;
    return last < first ? Band{} : Band{sight.lo(first), sight.hi(last)};
}
__device__ inline Band all_of(const Sight& sight, int first, int end) {
    const int last = min(end, sight.seq.tokens) - 1;
    return last < first ? Band{} : Band{sight.lo(last), sight.hi(first)};
}

// What one thread needs to know of its rows: g and g + 8 of its warp's 16.
struct Rows {
    int first;      // of the warp, on the token axis
    Band any, all;  // columns that some, all of the warp's rows see
    Band mine[2];

    __device__ Rows(const Sight& sight, int block_first) {
        const int warp = threadIdx.x / kWarp, group = threadIdx.x % kWarp / 4;
        first = block_first + warp * kWarpRows;
        any = any_of(sight, first, first + kWarpRows);
        all = all_of(sight, first, first + kWarpRows);
        for (int r = 0; r < 2; ++r) mine[r] = any_of(sight, first + group + 8 * r, first + group + 8 * r + 1);
    }
    // Hides the scores of a 16 x 8 accumulator, whose first column is `column`, that the mask excludes.
    __device__ void mask(float (&s)[4], int column) const {
        const int c = column + int(threadIdx.x) % 4 * 2;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (!mine[e / 2].has(c + e % 2)) s[e] = -INFINITY;
    }
};

// Over the four threads that share a row of an accumulator.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// A warp's 16 x D accumulator, row r scaled by factor[r / 8], rounded -> rows `first`.. of a head's columns, by 16-byte
// stores. `tile` is a kRows x D tile that no other warp reads; only this warp's 16 rows of it are used.
template <int D>
__device__ inline void store_rows(const Mat<bf16>& m, int head, int first, const float (&sum)[D / 8][4],
                                  const float (&factor)[2], nv_bf16* tile) {
    const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows;
    __syncwarp();  // the tile may still be read by this warp, from an earlier call
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            nv_bf16* at = tile + swizzle<D>(row + lane / 4 + 8 * r, n) + lane % 4 * 2;
            *reinterpret_cast<std::uint32_t*>(at) = pack_bf16(sum[n][2 * r] * factor[r], sum[n][2 * r + 1] * factor[r]);
        }
    __syncwarp();
    constexpr int chunks = D / 8;
    nv_bf16* out = reinterpret_cast<nv_bf16*>(m.data) + std::int64_t(head) * D;
#pragma unroll
    for (int i = lane; i < kWarpRows * chunks; i += kWarp) {
        const int r = i / chunks, chunk = i % chunks;
        if (first + r < m.rows)
            store16(out + (first + r) * m.ld + chunk * 8, load16(tile + swizzle<D>(row + r, chunk)));
    }
}

}  // namespace fiedler::dot
