// kernels/energy_product.cuh: what energy's kernels multiply with: the matrix in shared memory, as the sum of three bf16
// parts, and its products with the vectors of 16 tokens (see energy.cu).
#pragma once
#include <cfloat>

#include "kernels/common.cuh"
#include "kernels/energy.h"
#include "kernels/mma.cuh"

namespace fiedler::energy_product {

constexpr int kThreads = 256;
constexpr int kTokens = 16;  // of one warp at a time
constexpr int kMaxBlocks = kEnergyBlocks;
constexpr int kMaxScalars = 16;
constexpr int kParts = 3;

// ---- layout ----

// Positions come in chunks of 8 (one 8 x 8 tile of the tensor core); in chunk q lane t holds positions 8q + 2t, + 1. A
// lane loads kRun neighbouring values, d = kRun t .. kRun t + kRun - 1 of a group of 4 kRun: two for each chunk.
template <int D>
struct Shape {
    static constexpr int kRun = D < 32 ? D / 4 : 8;
    static constexpr int kGroup = 4 * kRun, kGroups = D / kGroup, kGroupChunks = kGroup / 8;
};
template <int D>
__device__ __forceinline__ int position(int d) {
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
    nv_bf16* parts;         // [kParts][D * D]
    unsigned char* stages;  // of all warps (Supply)
    int* offsets;           // [D + 1] while Lf is being loaded (R = 1)
    float* partials;        // [warps][kMaxScalars + 1] later
};
template <int D>
constexpr std::size_t kStageBytes = sizeof(nv_bf16) * kTokens* D;  // the vectors of a warp
constexpr int kMaxWarps = 24;
template <int D>
constexpr std::size_t shared_bytes(int stages) {  // those of all warps
    return sizeof(nv_bf16) * kParts * D * D + sizeof(float) * kMaxWarps * (kMaxScalars + 1) + kStageBytes<D> * stages;
}
template <int D>
__device__ __forceinline__ Shared carve(unsigned char* base) {
    static_assert(D + 1 <= kMaxWarps * (kMaxScalars + 1));
    Shared s;
    s.parts = reinterpret_cast<nv_bf16*>(base);
    s.partials = reinterpret_cast<float*>(base + sizeof(nv_bf16) * kParts * D * D);
    s.offsets = reinterpret_cast<int*>(s.partials);
    s.stages = reinterpret_cast<unsigned char*>(s.partials + kMaxWarps * (kMaxScalars + 1));
    return s;
}

// ---- the matrix ----

// Writes entry (row, column position) as the sum of three bf16 numbers; true if one is not enough.
template <int D>
__device__ __forceinline__ bool store_split(nv_bf16* parts, int row, int column, float value) {
    const int at = static_cast<int>(matrix_offset<D>(row, column / 8)) / 2 + column % 8;
    const nv_bf16 hi = __float2bfloat16_rn(value);
    const float rest = value - __bfloat162float(hi);
    const nv_bf16 mid = __float2bfloat16_rn(rest);
    parts[at] = hi;
    parts[D * D + at] = mid;
    parts[2 * D * D + at] = __float2bfloat16_rn(rest - __bfloat162float(mid));
    return rest != 0.f;
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

// The matrix, of which no line is in the cache yet, is asked for first: with the vectors before it everything would wait for
// it longer. Both ways to load it call meanwhile() when that is done, and P::publish_matrix() before the barrier that they
// end with.

// Returns, in every thread, the number of parts that are not all zero: 1 or 3.
template <int D, class P, class Meanwhile>
__device__ int load_sparse(const FeatureLaplacian<float>& lap, const Shared& s, Meanwhile&& meanwhile) {
    const int entries = int(lap.values.size);
    int e = threadIdx.x, column = 0;
    float value = 0.f;
    const auto load = [&] {
        if (e < entries) value = load_now(lap.values.data + e), column = load_now(lap.columns.data + e);
    };
    const int offset = int(threadIdx.x) <= D ? load_now(lap.offsets.data + threadIdx.x) : 0;  // D < threads
    load();
    __syncthreads();  // what comes next is asked for after this
    meanwhile();
    for (int i = threadIdx.x; i < kParts * D * D / 8; i += blockDim.x)
        reinterpret_cast<uint4*>(s.parts)[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x <= D) s.offsets[threadIdx.x] = offset;
    __syncthreads();
    bool split = false;
    for (; e < s.offsets[D]; e += blockDim.x, load()) {
        int row = 0, above = D;  // offsets[row] <= e < offsets[above]
        while (above - row > 1) {
            const int middle = (row + above) / 2;
            if (s.offsets[middle] <= e)
                row = middle;
            else
                above = middle;
        }
        split |= store_split<D>(s.parts, position<D>(row), position<D>(column), value);
    }
    P::publish_matrix();
    return __syncthreads_or(split) ? kParts : 1;
}
// The root of mu to about one unit of rounding, and what is missing from it; 0 where there is none, or rounding has left an
// eigenvalue below zero.
struct Root {
    float value = 0.f, rest = 0.f;
    __device__ explicit Root(float mu) {
        if (mu < FLT_MIN) return;  // a NaN stays a NaN
        const float r = rsqrtf(mu);
        value = mu * r;
        rest = fmaf(-value, value, mu) * (0.5f * r);
    }
    // The root times u as what float holds of it and the rest.
    __device__ float2 times(float u) const {
        const float x = value * u;
        return {x, fmaf(rest, u, fmaf(value, u, -x))};
    }
};
// Rows are the eigenvectors times the roots of their eigenvalues: squares of products with them are energies. Lane t has
// D / 4 neighbouring ones, its rows of the tiles one after the other. A thread takes four neighbouring values at a time.
template <int D, class P, class Meanwhile>
__device__ void load_eigenvectors(const FeatureLaplacian<float>& lap, const Shared& s, Meanwhile&& meanwhile) {
    using S = Shape<D>;
    constexpr int kQuads = D * D / 4, kPart = D * D / 2, kAtOnce = 2;
    auto* parts = reinterpret_cast<__nv_bfloat162*>(s.parts);
    const bool aligned = reinterpret_cast<std::uintptr_t>(lap.eigenvectors.data) % 16 == 0;
    float4 u[kAtOnce];
    float mu[kAtOnce];
    int i = threadIdx.x;
    const auto load = [&] {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int quad = i + n * blockDim.x;
            if (quad >= kQuads) continue;
            u[n] = load_four_now(lap.eigenvectors.data + 4 * quad, aligned);
            mu[n] = load_now(lap.eigenvalues.data + quad / (D / 4));
        }
    };
    load();
    __syncthreads();  // what comes next is asked for after this
    meanwhile();
    for (; i < kQuads; i += kAtOnce * blockDim.x, load()) {
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            const int quad = i + n * blockDim.x, m = quad / (D / 4), d = quad % (D / 4) * 4;
            if (quad >= kQuads) continue;
            const Root root(mu[n]);
            const int of_lane = m % (D / 4), row = of_lane / 2 * 8 + m / (D / 4) * 2 + of_lane % 2;
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const int run = d / S::kRun;  // see position()
                const int chunk = run / 4 * S::kGroupChunks + (d % S::kRun + k) / 2;
                const int at = static_cast<int>(matrix_offset<D>(row, chunk)) / 4 + run % 4;
                const float2 x = root.times(k == 0 ? u[n].x : u[n].z), y = root.times(k == 0 ? u[n].y : u[n].w);
                const auto hi = __floats2bfloat162_rn(x.x, y.x);
                const float x1 = x.x - __low2float(hi) + x.y, y1 = y.x - __high2float(hi) + y.y;
                const auto mid = __floats2bfloat162_rn(x1, y1);
                parts[at] = hi;
                parts[kPart + at] = mid;
                parts[2 * kPart + at] = __floats2bfloat162_rn(x1 - __low2float(mid), y1 - __high2float(mid));
            }
        }
    }
    P::publish_matrix();
    __syncthreads();
}

// ---- products ----

// 16 head vectors of one warp: two bf16 of chunk q of token g (x[0][q]) and of token g + 8 (x[1][q]).
template <int D>
struct Vectors {
    std::uint32_t x[2][D / 8];
};
__device__ __forceinline__ float low_half(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

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

// Asks for the vectors of a warp's tokens, from `tile` on in steps: they are on their way while the matrix is loaded.
template <int D>
__device__ __forceinline__ void prefetch_vectors(const nv_bf16* base, std::int64_t ld, int tile, int step, int tokens) {
    constexpr int kLine = 64;  // values of 128 bytes
    const int lane = threadIdx.x % kWarp, line = lane / kTokens * kLine;
    if (line >= D) return;
    for (int token = tile * kTokens + lane % kTokens; token < tokens; token += step * kTokens)
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(base + token * ld + line));
}

// Vectors of a warp's tokens, tile by tile in steps. With stages they are copied into shared memory, each lane's own pieces
// for itself: no lane waits for another.
template <int D, int kStages>
struct Supply {
    using S = Shape<D>;
    static constexpr int kPiece = S::kRun * 2, kStage = int(kStageBytes<D>);
    static constexpr std::uint32_t kLast = kStages > 0 ? (kStages - 1) * kStage : 0;
    const nv_bf16* row;  // the lane's piece of token g of the tile that is asked for next
    std::int64_t ld, step;
    int left, step_tokens;      // tokens from that one on
    std::uint32_t base, stage;  // shared: the lane's own place in the first stage, and in the one that was taken

    __device__ __forceinline__ Supply(const unsigned char* stages, const nv_bf16* x, std::int64_t row_ld, int tile,
                                      int step_tiles, int tokens)
        : ld(row_ld), step(step_tiles * kTokens * row_ld), step_tokens(step_tiles * kTokens) {
        const int token = tile * kTokens + threadIdx.x % kWarp / 4;
        row = x + token * ld + threadIdx.x % 4 * S::kRun;
        left = tokens - token;
        if constexpr (kStages == 0) {
            prefetch_vectors<D>(x, ld, tile, step_tiles, tokens);
        } else {
            base = shared_address(stages) + threadIdx.x / kWarp * (kStages * kStage) + threadIdx.x % kWarp * kPiece;
            stage = base;
        }
    }
    // Asks for the first tiles.
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) ask();
    }
    // Asks for the next tile, in place of the one that was taken; `stage` is then that of the oldest one.
    __device__ __forceinline__ void ask() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const nv_bf16* from = row + half * 8 * ld;
            const bool inside = 8 * half < left;
#pragma unroll
            for (int group = 0; group < S::kGroups; ++group) {
                const std::uint32_t at = stage + (half * S::kGroups + group) * kWarp * kPiece;
                if constexpr (kPiece == 16)
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at),
                                 "l"(from + group * S::kGroup), "r"(inside ? 16 : 0));
                else
                    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(at),
                                 "l"(from + group * S::kGroup), "r"(inside ? 8 : 0));
            }
        }
        cp_async_commit();
        advance();
        stage = stage == base + kLast ? base : stage + kStage;
    }
    __device__ __forceinline__ void advance() { row += step, left -= step_tokens; }
    // The next tile's vectors.
    __device__ __forceinline__ void next(Vectors<D>& v) {
        if constexpr (kStages == 0) {
            load_vectors(v, row, ld, left);
            advance();
        } else {
            ask();
            cp_async_wait<kStages - 1>();
#pragma unroll
            for (int group = 0; group < S::kGroups; ++group) again(v, group);
        }
    }
    // A group's once more, where v need not have been kept in registers.
    __device__ __forceinline__ void again(Vectors<D>& v, int group) const {
        if constexpr (kStages > 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const std::uint32_t at = stage + (half * S::kGroups + group) * kWarp * kPiece;
                std::uint32_t* x = v.x[half] + group * S::kGroupChunks;
                if constexpr (kPiece == 16)
                    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
                                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                                 : "r"(at)
                                 : "memory");
                else
                    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];\n" : "=r"(x[0]), "=r"(x[1]) : "r"(at) : "memory");
            }
        }
    }
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
