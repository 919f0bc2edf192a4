// kernels/energy_product.cuh: what energy's kernels multiply with: the matrix in shared memory, as the sum of two or
// three bf16 parts, and its products with the vectors of 16 tokens (see energy.cu).
#pragma once
#include <cfloat>

#include "kernels/common.cuh"
#include "kernels/energy.h"
#include "kernels/mma.cuh"

namespace fiedler::energy_product {

constexpr int kThreads = 256;
constexpr int kTokens = 16;  // of one warp at a time: vectors, where they are of several heads
constexpr int kMaxScalars = 16;

// ---- layout ----

// Positions come in chunks of 8 (one 8 x 8 tile of the tensor core); in chunk q lane t holds positions 8q + 2t, + 1. A
// lane loads kRun neighbouring values, d = kRun t .. kRun t + kRun - 1 of a group of 4 kRun: two for each chunk.
template <int D>
struct Shape {
    static constexpr int kRun = D < 32 ? D / 4 : 8;
    static constexpr int kGroup = 4 * kRun, kGroups = D / kGroup, kGroupChunks = kGroup / 8;
};
// With kInOrder they are in order instead: so lies what ldmatrix reads and stmatrix writes, 8 x 8 numbers at a time.
template <int D, bool kInOrder>
__device__ __forceinline__ int position(int d) {
    if (kInOrder) return d;
    using S = Shape<D>;
    const int in_group = d % S::kGroup, t = in_group / S::kRun, pair = in_group % S::kRun / 2;
    return d - in_group + 8 * pair + 2 * t + d % 2;
}
// Byte offset of (row, chunk) in one part of the matrix. Rows are of at most 128 bytes: with D = 128 the second half of all
// of them comes after the first. The chunks of a row are exchanged so that the same chunk of eight neighbouring rows lies
// in eight different 16-byte columns of shared memory: no bank conflicts. Rows 8 apart are exchanged alike, and exchanging
// is an exclusive or:
//     offset(row + 8 i, chunk ^ k) = (offset(row, chunk) ^ chunk_bits(k)) + 8 kRowBytes i
template <int D>
constexpr int kRowBytes = D < 64 ? 2 * D : 128;
template <int D>
__device__ __forceinline__ constexpr unsigned chunk_bits(unsigned chunk) {
    return chunk % 8 * 16 + chunk / 8 * (kRowBytes<D> * D);
}
template <int D>
__device__ __forceinline__ unsigned matrix_offset(unsigned row, unsigned chunk) {
    const unsigned swizzle = D >= 64 ? row % 8 : D == 32 ? row / 2 % 4 : row / 4 % 2;
    return row * kRowBytes<D> + chunk_bits<D>(chunk ^ swizzle);
}

struct Shared {
    nv_bf16* parts;         // of the matrix, [D * D] each; halves (f16) may be one more
    unsigned char* stages;  // of all warps, for vectors on their way
    int* offsets;           // [D + 1] while Lf is being loaded (R = 1)
    float* partials;        // later: of each warp and each of its heads [kMaxScalars + 1]
};
template <int D>
constexpr std::size_t kStageBytes = sizeof(nv_bf16) * kTokens* D;  // the vectors of a warp
constexpr int kMaxWarps = 32;
constexpr std::size_t kPartialBytes = sizeof(float) * kMaxWarps * (kMaxScalars + 1);
template <int D>
__device__ __forceinline__ Shared carve(unsigned char* base, int parts, int stage_bytes) {
    static_assert((D + 1) * sizeof(int) <= kPartialBytes);
    Shared s;
    s.parts = reinterpret_cast<nv_bf16*>(base);
    s.stages = base + sizeof(nv_bf16) * parts * D * D;
    s.partials = reinterpret_cast<float*>(s.stages + stage_bytes);
    s.offsets = reinterpret_cast<int*>(s.partials);
    return s;
}

// ---- pairs of 16-bit numbers ----

__device__ __forceinline__ float low_half(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- the matrix ----

// Writes entry (row, column position) as the sum of so many bf16 numbers; true if one is not enough.
template <int D, int kParts>
__device__ __forceinline__ bool store_split(nv_bf16* parts, int row, int column, float value) {
    const int at = static_cast<int>(matrix_offset<D>(row, column / 8)) / 2 + column % 8;
    bool split = false;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const nv_bf16 x = __float2bfloat16_rn(value);
        parts[part * D * D + at] = x;
        value -= __bfloat162float(x);
        if (part == 0) split = value != 0.f;
    }
    return split;
}

// Asked for here: the compiler keeps such loads on their side of a barrier.
__device__ __forceinline__ float load_now(const float* p) {
    float x;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];\n" : "=f"(x) : "l"(p));
    return x;
}
__device__ __forceinline__ int load_now(const int* p) {
    int x;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];\n" : "=r"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ float4 load_four_now(const float* p, bool aligned) {
    if (!aligned) return {load_now(p), load_now(p + 1), load_now(p + 2), load_now(p + 3)};
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];\n"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(p));
    return x;
}

// Both ways to load the matrix call meanwhile() when they have asked for it, and P::publish_matrix() before the barrier
// that they end with.

template <int D, int kParts>
__device__ __forceinline__ void clear_parts(const Shared& s) {
    for (int i = threadIdx.x; i < kParts * D * D / 8; i += blockDim.x)
        reinterpret_cast<uint4*>(s.parts)[i] = make_uint4(0, 0, 0, 0);
}

// Entries [first, end) of Lf to their places: entry(e) is the value of one and its column. True if one part is not
// enough for one of them. A thread that has one entry at most looks for its row; where there are more, a warp takes a
// row.
template <int D, int kParts, bool kInOrder, class Entry>
__device__ __forceinline__ bool store_entries(const Shared& s, int first, int end, Entry&& entry) {
    bool split = false;
    const auto store = [&](int row, int e) {
        const uint2 one = entry(e);
        const int at_row = position<D, kInOrder>(row), at_column = position<D, kInOrder>(int(one.y));
        split |= store_split<D, kParts>(s.parts, at_row, at_column, __uint_as_float(one.x));
    };
    if (end - first <= int(blockDim.x)) {
        const int e = first + int(threadIdx.x);
        if (e >= end) return false;
        int row = 0, above = D;  // offsets[row] <= e < offsets[above]
        while (above - row > 1) {
            const int middle = (row + above) / 2;
            if (s.offsets[middle] <= e)
                row = middle;
            else
                above = middle;
        }
        store(row, e);
    } else {
#pragma unroll 1
        for (int row = threadIdx.x / kWarp; row < D; row += blockDim.x / kWarp) {
            const int last = min(s.offsets[row + 1], end);
#pragma unroll 1
            for (int e = max(s.offsets[row], first) + int(threadIdx.x % kWarp); e < last; e += kWarp) store(row, e);
        }
    }
    return split;
}
// Returns, in every thread, the number of parts that are not all zero: 1 or all.
template <int D, class P, class Meanwhile>
__device__ int load_sparse(const FeatureLaplacian<float>& lap, const Shared& s, Meanwhile&& meanwhile) {
    const int entries = int(lap.values.size);
    const int offset = int(threadIdx.x) <= D ? load_now(lap.offsets.data + threadIdx.x) : 0;  // D < threads
    constexpr int kLine = 32;                                                                 // values of 128 bytes
    for (int e = threadIdx.x * kLine; e < entries; e += blockDim.x * kLine)
        asm volatile("prefetch.global.L2 [%0];\nprefetch.global.L2 [%1];\n" ::"l"(lap.values.data + e),
                     "l"(lap.columns.data + e));
    meanwhile();
    clear_parts<D, P::kParts>(s);
    if (threadIdx.x <= D) s.offsets[threadIdx.x] = offset;
    __syncthreads();
    const bool split = store_entries<D, P::kParts, P::kInOrder>(s, 0, entries, [&](int e) {
        return make_uint2(__float_as_uint(load_now(lap.values.data + e)), unsigned(load_now(lap.columns.data + e)));
    });
    P::publish_matrix();
    return __syncthreads_or(split) ? P::kParts : 1;
}
// The root of mu to about one unit of rounding, and what is missing from it; 0 where there is none, or rounding has left an
// eigenvalue below zero.
struct Root {
    float value = 0.f, rest = 0.f;
    __device__ explicit Root(float mu) {
        if (mu < FLT_MIN) return;  // a NaN stays a NaN
        float r;
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(mu));
        value = mu * r;
        rest = fmaf(-value, value, mu) * (0.5f * r);
    }
    // The root times u as what float holds of it and the rest.
    __device__ float2 times(float u) const {
        const float x = value * u;
        return {x, fmaf(rest, u, fmaf(value, u, -x))};
    }
};
// The f16 part is the matrix times a power of two which makes the root of the largest eigenvalue 2^7 to 2^8: numbers
// down to 2^-22 of it have as many bits as any, and eigenvectors may be 2^7 long. `log2` of that power.
template <int D>
__device__ __forceinline__ int matrix_scale(const float* mu) {
    constexpr int kMost = 40;
    int top = 0;  // positive floats are ordered as their bits are
#pragma unroll
    for (int i = threadIdx.x % kWarp; i < D; i += kWarp) top = max(top, __float_as_int(mu[i]));
    top = __reduce_max_sync(0xffffffffu, top);
    return min(8 - (((top >> 23) - 125) >> 1), kMost);
}
__device__ __forceinline__ float power_of_two(int n) { return __int_as_float((127 + n) << 23); }

// Rows are the eigenvectors times the roots of their eigenvalues: squares of products with them are energies. Lane t
// has D / 4 neighbouring ones, its rows of the tiles one after the other. Four neighbouring values of one, where they
// belong; as f16 too, times `scale`, with kHalf.
template <int D, int kParts, bool kInOrder, bool kHalf>
__device__ __forceinline__ void store_four(const Shared& s, unsigned four, const float4& u, float mu, float scale) {
    using S = Shape<D>;
    constexpr int kPart = D * D / 2;
    auto* parts = reinterpret_cast<std::uint32_t*>(s.parts);
    const Root root(mu);
    const unsigned m = four / (D / 4), d = four % (D / 4) * 4;
    const unsigned of_lane = m % (D / 4), row = of_lane / 2 * 8 + m / (D / 4) * 2 + of_lane % 2;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        const unsigned run = d / S::kRun;  // see position()
        const unsigned chunk = kInOrder ? d / 8 : run / 4 * S::kGroupChunks + (d % S::kRun + k) / 2;
        const unsigned at = matrix_offset<D>(row, chunk) / 4 + (kInOrder ? (d % 8 + k) / 2 : run % 4);
        float2 x = root.times(k == 0 ? u.x : u.z), y = root.times(k == 0 ? u.y : u.w);
        if constexpr (kHalf) parts[kParts * kPart + at] = pack_half(x.x * scale, y.x * scale);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            const std::uint32_t pair = pack_bf16(x.x, y.x);
            parts[part * kPart + at] = pair;
            x = {x.x - low_half(pair) + x.y, 0.f}, y = {y.x - high_half(pair) + y.y, 0.f};
        }
    }
}
// With kHalf the part after the others is of f16. Returns its matrix_scale().
template <int D, class P, bool kHalf, class Meanwhile>
__device__ int load_eigenvectors(const FeatureLaplacian<float>& lap, const Shared& s, Meanwhile&& meanwhile) {
    constexpr int kFours = D * D / 4, kAtOnce = 2;
    const bool aligned = reinterpret_cast<std::uintptr_t>(lap.eigenvectors.data) % 16 == 0;
    float4 u[kAtOnce];
    float mu[kAtOnce];
    int i = threadIdx.x;
    const auto load = [&] {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int four = i + n * blockDim.x;
            if (four >= kFours) continue;
            u[n] = load_four_now(lap.eigenvectors.data + 4 * four, aligned);
            mu[n] = load_now(lap.eigenvalues.data + four / (D / 4));
        }
    };
    load();
    __syncthreads();  // what comes next is asked for after this
    meanwhile();
    const int log2 = kHalf ? matrix_scale<D>(lap.eigenvalues.data) : 0;
    for (; i < kFours; i += kAtOnce * blockDim.x, load()) {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int four = i + n * blockDim.x;
            if (four < kFours) store_four<D, P::kParts, P::kInOrder, kHalf>(s, four, u[n], mu[n], power_of_two(log2));
        }
    }
    P::publish_matrix();
    __syncthreads();
    return log2;
}

// ---- products ----

// 16 head vectors of one warp: two bf16 of chunk q of vector g (x[0][q]) and of vector g + 8 (x[1][q]).
template <int D>
struct Vectors {
    std::uint32_t x[2][D / 8];
};

// Keeps the compiler from holding the unpacked f32 values from one use of v to the next: registers would run out.
template <int D>
__device__ __forceinline__ void forget_unpacked(Vectors<D>& v) {
#pragma unroll
    for (int q = 0; q < D / 8; ++q) asm volatile("" : "+r"(v.x[0][q]), "+r"(v.x[1][q]));
}

// Between registers and the lane's piece of token g's row, of which so many tokens are left; zeros beyond them.
template <int D>
__device__ __forceinline__ void load_vectors(Vectors<D>& v, const nv_bf16* piece, std::int64_t ld, int left) {
    using S = Shape<D>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool inside = 8 * half < left;
        const nv_bf16* row = piece + 8 * half * ld;
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) {
            const nv_bf16* from = row + group * S::kGroup;
            std::uint32_t* to = v.x[half] + group * S::kGroupChunks;
            if constexpr (S::kRun == 8) {
                const uint4 r = inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
                to[0] = r.x, to[1] = r.y, to[2] = r.z, to[3] = r.w;
            } else {
                const uint2 r = inside ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
                to[0] = r.x, to[1] = r.y;
            }
        }
    }
}
template <int D>
__device__ __forceinline__ void store_group(const Vectors<D>& v, int group, nv_bf16* piece, std::int64_t ld, int left) {
    using S = Shape<D>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (8 * half >= left) continue;
        nv_bf16* to = piece + 8 * half * ld + group * S::kGroup;
        const std::uint32_t* from = v.x[half] + group * S::kGroupChunks;
        if constexpr (S::kRun == 8)
            *reinterpret_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
        else
            *reinterpret_cast<uint2*>(to) = make_uint2(from[0], from[1]);
    }
}

// Asks for the vectors of a warp's tokens, from `first` on in steps: they are on their way while the matrix is loaded.
template <int D>
__device__ __forceinline__ void prefetch_vectors(const nv_bf16* base, std::int64_t ld, int first, int step,
                                                 int tokens) {
    constexpr int kLine = 64;  // values of 128 bytes
    const int lane = threadIdx.x % kWarp, line = lane / kTokens * kLine;
    if (line >= D) return;
    for (int token = first + lane % kTokens; token < tokens; token += step)
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(base + token * ld + line));
}

// Vectors of a warp's tokens, of one head, tile by tile in steps, from memory to registers; those to come are asked of the L2 cache.
template <int D>
struct DirectSupply {
    static constexpr int kBytes = 0;
    const nv_bf16* row;  // the lane's piece of token g of the next tile
    std::int64_t ld, step;
    int left, step_tokens;  // tokens from that one on

    template <class Map>
    __device__ __forceinline__ DirectSupply(const Mat<const bf16>& x, const Map&, const void*, int column,
                                            int first_token, int step_of_tokens)
        : ld(x.ld), step(step_of_tokens * x.ld), step_tokens(step_of_tokens) {
        const int lane = threadIdx.x % kWarp, tokens = int(x.rows);
        const int first = first_token + (threadIdx.x - lane) / kWarp * kTokens, token = first + lane / 4;
        const nv_bf16* base = reinterpret_cast<const nv_bf16*>(x.data) + column * D;
        row = base + token * ld + lane % 4 * Shape<D>::kRun;
        left = tokens - token;
        prefetch_vectors<D>(base, ld, first, step_tokens, tokens);
    }
    // The next tile's vectors.
    __device__ __forceinline__ void next(Vectors<D>& v) {
        load_vectors(v, row, ld, left);
        row += step, left -= step_tokens;
    }
    __device__ __forceinline__ void refill() {}
    // A group's once more, where v need not have been kept in registers.
    __device__ __forceinline__ void again(Vectors<D>&, int) const {}
    __device__ __forceinline__ void finish() const {}
};

// y = M x, two tiles at a time: take(j, y) for j = 0, 2, .. of D / 8, with y[k] the rows 8 (j + k) + 2t, + 1 of M: [0], [1]
// for token g, [2], [3] for token g + 8.
template <int D, int kUsed, class Take>
__device__ __forceinline__ void product(const Vectors<D>& v, const nv_bf16* parts, Take&& take) {
    const unsigned lane = threadIdx.x % kWarp;  // it gives a row of tile (j, 2s), (j, 2s + 1), (j + 1, 2s) or (.., ..)
    const unsigned mine = matrix_offset<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const auto* bytes = reinterpret_cast<const unsigned char*>(parts);
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        __syncwarp();  // bounds how far ahead the compiler loads
        float y[2][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
            const std::uint32_t a[4] = {v.x[0][2 * s], v.x[1][2 * s], v.x[0][2 * s + 1], v.x[1][2 * s + 1]};
            float c[2][4] = {};
#pragma unroll
            for (int part = kUsed - 1; part >= 0; --part) {  // small parts first
                std::uint32_t b[4];
                ldmatrix_x4(b, bytes + (mine ^ chunk_bits<D>(2 * s)) + (8 * kRowBytes<D> * j + 2 * D * D * part));
                mma_bf16(c[0], a, b[0], b[1]);
                mma_bf16(c[1], a, b[2], b[3]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                y[0][k] += c[0][k];
                y[1][k] += c[1][k];
            }
        }
        take(j, y);
    }
}

// z = y M, y as the sum of two bf16 parts, M as that of its first two: the product keeps 16 bits. take(q, z) for q = 0, 2, ..
// of D / 8, with z[k] columns 8 (q + k) + 2t, + 1, by position: [0], [1] for token g, [2], [3] for token g + 8.
template <int D, class Take>
__device__ __forceinline__ void turned_product(const std::uint32_t (&hi)[D / 16][4],
                                               const std::uint32_t (&mid)[D / 16][4], const nv_bf16* parts,
                                               Take&& take) {
    const unsigned lane = threadIdx.x % kWarp;  // tiles: rows 16 s, chunk q; 16 s + 8, q; 16 s, q + 1; 16 s + 8, q + 1
    const unsigned mine = matrix_offset<D>(lane % 16, lane / 16);
    const auto* bytes = reinterpret_cast<const unsigned char*>(parts);
#pragma unroll
    for (int q = 0; q < D / 8; q += 2) {
        __syncwarp();  // as in product()
        float z[2][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
            const unsigned char* at = bytes + (mine ^ chunk_bits<D>(q)) + 16 * kRowBytes<D> * s;
            std::uint32_t b[4];
            ldmatrix_x4_trans(b, at + 2 * D * D);
            mma_bf16(z[0], hi[s], b[0], b[1]);
            mma_bf16(z[1], hi[s], b[2], b[3]);
            ldmatrix_x4_trans(b, at);
            mma_bf16(z[0], mid[s], b[0], b[1]);
            mma_bf16(z[1], mid[s], b[2], b[3]);
            mma_bf16(z[0], hi[s], b[0], b[1]);
            mma_bf16(z[1], hi[s], b[2], b[3]);
        }
        take(q, z);
    }
}

}  // namespace fiedler::energy_product
