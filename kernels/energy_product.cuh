// kernels/energy_product.cuh: what energy's kernels multiply with: the matrix in shared memory, as the sum of three bf16
// parts, and its products with the vectors of 16 tokens (see energy.cu).
#pragma once
#include "kernels/common.cuh"
#include "kernels/energy.h"
#include "kernels/mma.cuh"

namespace fiedler::energy_product {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
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
    nv_bf16* parts;   // [kParts][D * D]
    float* mu;        // [D] eigenvalues (R > 1); int offsets[D + 1] while Lf is being loaded (R = 1)
    float* tau;       // [kMaxScalars]
    float* partials;  // [kWarps][kMaxScalars + 1]
};
template <int D>
constexpr std::size_t shared_bytes() {
    return sizeof(nv_bf16) * kParts * D * D + sizeof(float) * ((D + 4) + kMaxScalars + kWarps * (kMaxScalars + 1));
}
template <int D>
__device__ __forceinline__ Shared carve(unsigned char* base) {
    Shared s;
    s.parts = reinterpret_cast<nv_bf16*>(base);
    s.mu = reinterpret_cast<float*>(base + sizeof(nv_bf16) * kParts * D * D);
    s.tau = s.mu + D + 4;
    s.partials = s.tau + kMaxScalars;
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

// Returns, in every thread, the number of parts that are not all zero: 1 or 3. Ends with a barrier.
template <int D>
__device__ int load_sparse(const FeatureLaplacian<float>& lap, const Shared& s) {
    int* offsets = reinterpret_cast<int*>(s.mu);
    for (int i = threadIdx.x; i <= D; i += blockDim.x) offsets[i] = lap.offsets.data[i];
    for (int i = threadIdx.x; i < kParts * D * D / 8; i += blockDim.x)
        reinterpret_cast<uint4*>(s.parts)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    bool split = false;
    const int entries = offsets[D];
    for (int e = threadIdx.x; e < entries; e += blockDim.x) {
        const float value = lap.values.data[e];
        const int column = lap.columns.data[e];
        int row = 0, above = D;  // offsets[row] <= e < offsets[above]
        while (above - row > 1) {
            const int middle = (row + above) / 2;
            if (offsets[middle] <= e)
                row = middle;
            else
                above = middle;
        }
        split |= store_split<D>(s.parts, position<D>(row), position<D>(column), value);
    }
    return __syncthreads_or(split) ? kParts : 1;
}
template <int D>
__device__ void load_eigenvectors(const FeatureLaplacian<float>& lap, const Shared& s) {
    constexpr int kPairs = D * D / 2;
    auto* parts = reinterpret_cast<__nv_bfloat162*>(s.parts);
#pragma unroll 8
    for (int i = threadIdx.x; i < kPairs; i += blockDim.x) {
        const int row = i / (D / 2), d = i % (D / 2) * 2, column = position<D>(d);  // d + 1 comes after it
        const float x = lap.eigenvectors.data[2 * i], y = lap.eigenvectors.data[2 * i + 1];
        const int at = static_cast<int>(matrix_offset<D>(row, column / 8) + column % 8 * 2) / 4;
        const auto hi = __floats2bfloat162_rn(x, y);
        const float x1 = x - __low2float(hi), y1 = y - __high2float(hi);
        const auto mid = __floats2bfloat162_rn(x1, y1);
        parts[at] = hi;
        parts[kPairs + at] = mid;
        parts[2 * kPairs + at] = __floats2bfloat162_rn(x1 - __low2float(mid), y1 - __high2float(mid));
    }
    for (int i = threadIdx.x; i < D; i += blockDim.x) s.mu[i] = lap.eigenvalues.data[i];
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

template <int D>
__device__ __forceinline__ void load_vectors(Vectors<D>& v, const nv_bf16* base, std::int64_t ld, std::int64_t token,
                                             std::int64_t tokens) {
    using S = Shape<D>;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool inside = token + 8 * half < tokens;
        const nv_bf16* row = base + (token + 8 * half) * ld + t * S::kRun;
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
__device__ __forceinline__ void store_vectors(const Vectors<D>& v, nv_bf16* base, std::int64_t ld, std::int64_t token,
                                              std::int64_t tokens) {
    using S = Shape<D>;
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (token + 8 * half >= tokens) continue;
        nv_bf16* row = base + (token + 8 * half) * ld + t * S::kRun;
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) {
            const std::uint32_t* from = v.x[half] + group * S::kGroupChunks;
            if constexpr (S::kRun == 8)
                *reinterpret_cast<uint4*>(row + group * S::kGroup) = make_uint4(from[0], from[1], from[2], from[3]);
            else
                *reinterpret_cast<uint2*>(row + group * S::kGroup) = make_uint2(from[0], from[1]);
        }
    }
}

// Asks for the vectors of a warp's tokens, from `tile` on in steps: they are on their way while the matrix is loaded.
template <int D>
__device__ __forceinline__ void prefetch_vectors(const nv_bf16* base, std::int64_t ld, std::int64_t tile,
                                                 std::int64_t step, std::int64_t tokens) {
    constexpr int kLine = 64;  // values of 128 bytes
    const int lane = threadIdx.x % kWarp, line = lane / kTokens * kLine;
    if (line >= D) return;
    for (std::int64_t token = tile * kTokens + lane % kTokens; token < tokens; token += step * kTokens)
        asm volatile("prefetch.global.L2 [%0];\n" ::"l"(base + token * ld + line));
}

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
