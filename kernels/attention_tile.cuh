// kernels/attention_tile.cuh: the tiles of scalar-distance attention. A block owns 64 consecutive tokens (rows) of one
// head, 16 a warp, and streams over tiles of 64 tokens (columns). Within a warp, with g = lane / 4 and t = lane % 4, a
// thread holds rows g and g + 8 of its warp and, in each run of 8 columns, columns 2t and 2t + 1: the C layout of mma
// m16n8k16 (kernels/mma.cuh).
#pragma once
#include "kernels/attention.h"
#include "kernels/common.cuh"
#include "kernels/mma.cuh"

namespace fiedler::attention_tile {

#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__ / 10;
#else
constexpr int kArch = 0;  // the host's pass over device code
#endif
constexpr int kTile = 64;      // rows of a block, columns of a streamed tile
constexpr int kWarpRows = 16;  // rows of a warp
constexpr int kThreads = kTile / kWarpRows * kWarp;

// Heaviside step of x: 0, 1/2 at exactly 0, 1; so sign(x) = 2 step(x) - 1. One instruction: x 2^127 + 1/2, clamped to
// [0, 1], which no |x| of at least 2^-128 escapes.
__device__ inline float half_step(float x) {
    float y;
    asm("fma.rn.sat.f32 %0, %1, 0f7F000000, 0f3F000000;" : "=f"(y) : "f"(x));
    return y;
}
// x y + z, 0 where that is hardly more than subnormal: twice a sum of halves leaves so much of the sum where a half was
// subnormal, and so not exact.
__device__ inline float fma_flushed(float x, float y, float z) {
    const float r = fmaf(x, y, z);
    return fabsf(r) < 0x1p-120f ? 0.f : r;
}
// 4 bytes global -> shared without registers; zero when !valid (then src is not read).
__device__ inline void cp_async4(void* dst, const void* src, bool valid) {
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(bytes));
}
// The warp's number in its block, in a form that the compiler knows to be the same in all lanes.
__device__ inline int warp_number() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarp, 0); }
// Sum over the four lanes that share a row.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
// The numbers of f32 in their order, as integers; NaN of either sign beyond the infinities.
__device__ inline int ordered(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ inline float from_ordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }
__device__ inline int least_of_warp(float x) { return __reduce_min_sync(0xffffffffu, ordered(x)); }  // ordered()
__device__ inline int largest_of_warp(float x) { return __reduce_max_sync(0xffffffffu, ordered(x)); }

// The row's running maximum, in shared memory and the same for its four lanes, takes in the lane's `best`. Scores are to be
// lowered by `shift`, and what has been summed up so far goes times `rescale`.
struct Raised {
    float shift, rescale;
};
__device__ inline Raised raise_top(float& kept, float best) {
    const float old = kept, top = fmaxf(old, row_max(best));
    const float shift = top == -INFINITY ? 0.f : top;  // nothing seen so far: every weight is exp(-inf)
    __syncwarp();
    kept = top;
    __syncwarp();
    return {shift, exp_fast(old - shift)};
}
// Scores of row k of 16 keys (two C tiles) to weights relative to the running maximum. Returns what all that has been
// summed for the row is to be multiplied by.
__device__ inline float soften_row(float (&s)[2][4], int k, float& kept) {
    float best = -INFINITY;
#pragma unroll
    for (int e = 0; e < 4; ++e) best = fmaxf(best, s[e / 2][2 * k + e % 2]);
    const auto [shift, rescale] = raise_top(kept, best);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        float& w = s[e / 2][2 * k + e % 2];
        w = exp_fast(w - shift);
    }
    return rescale;
}

// What a run of rows [first, last] sees: nothing outside [lo, hi), and every row all of [full_lo, full_hi). Sight's
// ends never decrease along the tokens, so the first and the last row decide.
struct Band {
    int lo = 0, hi = 0, full_lo = 0, full_hi = 0;

    __device__ Band(const Sight& sight, int first, int last) {
        if (first > last) return;  // no rows: sees nothing
        lo = sight.lo(first), full_lo = sight.lo(last);
        hi = sight.hi(last), full_hi = sight.hi(first);
    }
    __device__ explicit Band(const int4& ends) : lo(ends.x), hi(ends.y), full_lo(ends.z), full_hi(ends.w) {}
    __device__ int4 ends() const { return {lo, hi, full_lo, full_hi}; }
    __device__ bool misses(int column, int n) const { return column >= hi || column + n <= lo; }
    __device__ bool covers(int column, int n) const { return column >= full_lo && column + n <= full_hi; }
};

// The two rows of a thread: token, whether it exists, and the columns [lo, hi) that it sees.
struct Rows {
    int first, tokens, lo[2], hi[2];

    __device__ Rows(const Sight& sight, int warp_first)
        : first(warp_first + static_cast<int>(threadIdx.x) % kWarp / 4), tokens(sight.seq.tokens) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            lo[k] = valid(k) ? sight.lo(token(k)) : 0;
            hi[k] = valid(k) ? sight.hi(token(k)) : 0;
        }
    }
    __device__ int token(int k) const { return first + 8 * k; }
    __device__ bool valid(int k) const { return token(k) < tokens; }
    __device__ bool sees(int k, int column) const { return column >= lo[k] && column < hi[k]; }
};

// [64 x D] bf16 in shared memory. Rows are padded by 16 bytes, an odd number of 16-byte units in all, so that the eight
// rows of an ldmatrix lie in different banks.
template <int D>
struct alignas(16) ValueTile {
    static constexpr int kStride = D + 8;
    nv_bf16 data[kTile * kStride];

    // src: column 0 of the head. Tokens from `tokens` on become zeros.
    __device__ void load(const nv_bf16* src, std::int64_t ld, int first, int tokens) {
        constexpr int kParts = D / 8;
#pragma unroll 1
        for (int k = 0; k < kTile * kParts / kThreads; ++k) {
            const int e = static_cast<int>(threadIdx.x) + k * kThreads, row = e / kParts, part = e % kParts * 8;
            const bool valid = first + row < tokens;
            cp_async16(data + row * kStride + part, src + (valid ? first + row : 0) * ld + part, valid);
        }
    }
    // B operands whose inner dimension is the tile's 16 rows from `row`: two tiles of 8 columns, from `column`.
    __device__ void rows_inside(std::uint32_t (&b)[4], int row, int column) const {
        const int lane = threadIdx.x % kWarp;
        ldmatrix_x4_trans(b, data + (row + lane % 16) * kStride + column + lane / 16 * 8);
    }
    // B operands whose inner dimension is the 16 columns from `column`: two tiles of 8 rows, from `row`.
    __device__ void columns_inside(std::uint32_t (&b)[4], int row, int column) const {
        const int lane = threadIdx.x % kWarp;
        ldmatrix_x4(b, data + (row + lane % 8 + lane / 16 * 8) * kStride + column + lane / 8 % 2 * 8);
    }
};

// A operands of 16 rows x D, straight from global memory; src: column 0 of the head.
template <int D>
__device__ void load_operand(std::uint32_t (&a)[D / 16][4], const nv_bf16* src, std::int64_t ld, const Rows& rows) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int row = part % 2, column = 16 * k + part / 2 * 8 + 2 * t;
            a[k][part] =
                rows.valid(row) ? *reinterpret_cast<const std::uint32_t*>(src + rows.token(row) * ld + column) : 0u;
        }
}

// One number for each of 64 columns, in shared memory.
struct alignas(16) ColumnTile {
    float data[kTile];

    // src: the head's number of token 0, ld floats from token to token; absent: all zero, as beyond the last token.
    // some_address is any valid one: it is named, not read, where there is nothing to read.
    __device__ void load(const float* src, std::int64_t ld, int first, int tokens, const float* some_address) {
        const int column = threadIdx.x;
        if (column >= kTile) return;
        const bool valid = src != nullptr && first + column < tokens;
        cp_async4(data + column, valid ? src + (first + column) * ld : some_address, valid);
    }
    __device__ float2 pair(int column) const { return *reinterpret_cast<const float2*>(data + column); }
};

// The number of each of a thread's two rows; zero where there is none.
__device__ inline void load_row_numbers(float (&x)[2], const float* src, std::int64_t ld, const Rows& rows) {
#pragma unroll
    for (int k = 0; k < 2; ++k) x[k] = src != nullptr && rows.valid(k) ? src[rows.token(k) * ld] : 0.f;
}
// A thread's part of two rows of 16-bit results, tiles of 8 columns side by side; dst: column 0 of the head.
template <int D>
__device__ void store_rows(nv_bf16* dst, std::int64_t ld, const float (&c)[D / 8][4], const float (&scale)[2],
                           const Rows& rows) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        if (!rows.valid(k)) continue;
        nv_bf16* row = dst + rows.token(k) * ld + 2 * t;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            *reinterpret_cast<std::uint32_t*>(row + 8 * n) =
                pack_bf16(c[n][2 * k] * scale[k], c[n][2 * k + 1] * scale[k]);
    }
}

// Natural logarithm of the ratio below which a weight is nothing: exp(-25) = 1.4e-11, so that even a thousand of them
// stay under the rounding of f32. A warp skips a tile whose gate alone puts every weight below that.
constexpr float kFaded = 25.f;

// Largest of a number over the 64 columns of a tile: two a lane.
template <class Number>
__device__ float tile_max(Number&& number) {
    const int lane = threadIdx.x % kWarp;
    return warp_max(fmaxf(number(lane), number(lane + kWarp)));
}

template <class Args>
__device__ const float* gate_of_head(const Args& p, int head) {
    return p.F.data == nullptr ? nullptr : p.F.data + head;
}

// launch.template operator()<D, R>() for this head width and the least R that holds the scalars.
template <int D, class Launch>
void with_scalars(int scalars, Launch&& launch) {
    if (scalars == 1) return launch.template operator()<D, 1>();
    if (scalars == 2) return launch.template operator()<D, 2>();
    if (scalars <= 4) return launch.template operator()<D, 4>();
    if (scalars <= 8) return launch.template operator()<D, 8>();
    return launch.template operator()<D, 16>();
}
template <class Launch>
void with_sizes(int width, int scalars, Launch&& launch) {
    if (width == 16) return with_scalars<16>(scalars, launch);
    if (width == 32) return with_scalars<32>(scalars, launch);
    if (width == 64) return with_scalars<64>(scalars, launch);
    return with_scalars<128>(scalars, launch);
}
inline void check_width(std::int64_t width) {
    FIEDLER_REQUIRE("attention", width == 16 || width == 32 || width == 64 || width == 128);
}
template <class Args>
dim3 tiles_of(const Args& p) {
    return dim3(static_cast<unsigned>(ceil_div(p.seq.tokens, kTile)), static_cast<unsigned>(p.heads));
}

}  // namespace fiedler::attention_tile
