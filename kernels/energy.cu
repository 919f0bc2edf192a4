// kernels/energy.cu: Rayleigh-quotient scalars on the GPU (contract in energy.h), on tensor cores without losing f32.
//
// x is bf16, so it is exact as it is; each f32 entry of the matrix (Lf for R = 1, the eigenvectors for R > 1) is the
// sum of three bf16 parts (3 x 8 bits of significand), kept in shared memory. y = M x is then up to three bf16 products
// with f32 accumulation per 16 columns, added up in f32. A matrix whose entries are bf16 numbers (the Laplacian of an
// unweighted graph: small integers) needs one product only, which is why Lf is treated as dense: at D <= 128 that is
// faster than indexing a sparse matrix, and takes any sparsity, up to full.
//
// A warp takes 16 tokens of one head. With g = lane / 4 and t = lane % 4 a lane holds values of tokens g and g + 8.
// The columns of x are renumbered so that what a lane loads by 16-byte accesses is what the tensor core wants of it
// (position() below); the matrix is stored with the same renumbering. With R = 1 its rows are renumbered as well: y
// then lies on the lanes exactly as x does, and x'Lx and dx = .. (Lx - E x) need no exchange.
#include <bit>

#include "kernels/common.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/energy.h"
#include "kernels/mma.cuh"

namespace fiedler {

namespace {
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
// Byte offset of (row, chunk) in one part of the matrix. The chunks of a row are exchanged so that the same chunk of
// eight neighbouring rows lies in eight different 16-byte columns of shared memory: no bank conflicts. Rows 8 apart are
// exchanged alike, and exchanging is an exclusive or:
//     offset(row + 8 i, chunk ^ k) = (offset(row, chunk) ^ 16 k) + 16 D i
template <int D>
__device__ __forceinline__ unsigned matrix_offset(unsigned row, unsigned chunk) {
    const unsigned swizzle = D >= 64 ? row % 8 : D == 32 ? row / 2 % 4 : row / 4 % 2;
    return row * 2 * D + ((chunk ^ swizzle) * 16);
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
    for (int i = threadIdx.x; i <= D; i += kThreads) offsets[i] = lap.offsets.data[i];
    for (int i = threadIdx.x; i < kParts * D * D / 8; i += kThreads)
        reinterpret_cast<uint4*>(s.parts)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    bool split = false;
    const int entries = offsets[D];
    for (int e = threadIdx.x; e < entries; e += kThreads) {
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
#pragma unroll 4
    for (int i = threadIdx.x; i < D * D; i += kThreads)
        store_split<D>(s.parts, i / D, position<D>(i % D), lap.eigenvectors.data[i]);
    for (int i = threadIdx.x; i < D; i += kThreads) s.mu[i] = lap.eigenvalues.data[i];
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

// y = M x. y[j] holds rows 8j + 2t, + 1 of M: [0], [1] for token g, [2], [3] for token g + 8.
template <int D, int kUsed>
__device__ __forceinline__ void product(float (&y)[D / 8][4], const Vectors<D>& v, const nv_bf16* parts) {
    const unsigned lane = threadIdx.x % kWarp;  // it gives a row of tile (j, 2s), (j, 2s + 1), (j + 1, 2s) or (.., ..)
    const unsigned mine = matrix_offset<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const auto* bytes = reinterpret_cast<const unsigned char*>(parts);
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
        __syncwarp();  // bounds how far ahead the compiler loads
#pragma unroll
        for (int k = 0; k < 4; ++k) y[j][k] = y[j + 1][k] = 0.f;
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
            const std::uint32_t a[4] = {v.x[0][2 * s], v.x[1][2 * s], v.x[0][2 * s + 1], v.x[1][2 * s + 1]};
            float c[2][4] = {};
#pragma unroll
            for (int part = kUsed - 1; part >= 0; --part) {  // small parts first
                std::uint32_t b[4];
                ldmatrix_x4(b, bytes + (mine ^ (32 * s)) + (16 * D * j + 2 * D * D * part));
                mma_bf16(c[0], a, b[0], b[1]);
                mma_bf16(c[1], a, b[2], b[3]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                y[j][k] += c[0][k];
                y[j + 1][k] += c[1][k];
            }
        }
    }
}

// ---- energies ----

// R bands of kWidth eigenpairs. A lane sees two rows of every tile, so its share of the bands comes in kSlots slots:
// slot s is the part of band(s, t) that lies in the lane's own rows; kLanes neighbouring lanes share a band.
template <int D, int R>
struct Bands {
    static constexpr int kWidth = D / R;
    static constexpr int kSlots = kWidth >= 8 ? R : kWidth == 1 ? D / 4 : D / 8;
    static constexpr int kLanes = kWidth >= 8 ? 4 : kWidth == 4 ? 2 : 1;
    static constexpr int kTiles = kWidth >= 8 ? kWidth / 8 : 1;  // of one slot
    __device__ static constexpr int tile(int slot) { return kWidth == 1 ? slot / 2 : slot * kTiles; }
    __device__ static int band(int slot, int t) {
        if (kWidth >= 8) return slot;
        if (kWidth == 1) return slot / 2 * 8 + 2 * t + slot % 2;
        return (8 * slot + 2 * t) / kWidth;
    }
    __device__ static constexpr bool takes(int slot, int element) { return kWidth > 1 || element == slot % 2; }
};

__device__ __forceinline__ float sum_of_lanes(float x, int lanes) {  // over 1, 2 or 4 neighbouring lanes
    if (lanes >= 2) x += __shfl_xor_sync(0xffffffffu, x, 1);
    if (lanes >= 4) x += __shfl_xor_sync(0xffffffffu, x, 2);
    return x;
}
template <int D>
__device__ __forceinline__ float inverse_square(const Vectors<D>& v, int half, float eps) {
    float sum = 0.f;
#pragma unroll
    for (int q = 0; q < D / 8; ++q) {
        const float lo = low_half(v.x[half][q]), hi = high_half(v.x[half][q]);
        sum += lo * lo + hi * hi;
    }
    return 1.f / (sum_of_lanes(sum, 4) + eps);
}
// Energy of the slot's band for token g (half 0) or g + 8 (half 1); the same in the kLanes lanes that share it.
// R > 1: leaves mu_m y_m in place of y_m.
template <int D, int R>
__device__ __forceinline__ float slot_energy(const Vectors<D>& v, float (&y)[D / 8][4], const float* mu, int slot,
                                             int half, float inverse) {
    using B = Bands<D, R>;
    const int t = threadIdx.x % 4;
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < B::kTiles; ++n) {
        const int j = B::tile(slot) + n;
        float &y0 = y[j][2 * half], &y1 = y[j][2 * half + 1];
        if constexpr (R == 1) {
            sum += y0 * low_half(v.x[half][j]) + y1 * high_half(v.x[half][j]);
        } else {
            const float2 m = *reinterpret_cast<const float2*>(mu + 8 * j + 2 * t);
            if (B::takes(slot, 0)) sum += y0 * (m.x * y0), y0 *= m.x;
            if (B::takes(slot, 1)) sum += y1 * (m.y * y1), y1 *= m.y;
        }
    }
    const float energy = sum_of_lanes(sum, B::kLanes) * inverse;
    return energy < 0.f ? 0.f : energy;  // rounding can leave a vanishing energy below zero; a NaN stays a NaN
}

template <int D, int R>
__device__ __forceinline__ int load_matrix(const FeatureLaplacian<float>& lap, const Shared& s) {
    if constexpr (R == 1) return load_sparse<D>(lap, s);
    load_eigenvectors<D>(lap, s);
    return kParts;
}
template <int D, int R>
__device__ __forceinline__ void multiply(float (&y)[D / 8][4], const Vectors<D>& v, const nv_bf16* parts, int used) {
    if (R == 1 && used == 1)
        product<D, 1>(y, v, parts);
    else
        product<D, kParts>(y, v, parts);
}

// ---- forward ----

template <int D, int R>
__global__ void __launch_bounds__(kThreads) energy_forward_kernel(EnergyForward<bf16> p) {
    using B = Bands<D, R>;
    extern __shared__ __align__(16) unsigned char memory[];
    const Shared shared = carve<D>(memory);
    const int head = blockIdx.y, lane = threadIdx.x % kWarp, t = lane % 4;
    if (threadIdx.x < R) shared.tau[threadIdx.x] = p.raw ? 0.f : expf(p.log_tau.data[threadIdx.x]);
    const int used = load_matrix<D, R>(p.lap, shared);  // ends with a barrier
    const float inverse_temp = p.raw ? 1.f : expf(-p.log_temp.data[head]);
    const auto* x = reinterpret_cast<const nv_bf16*>(p.x.data) + head * D;
    const std::int64_t tokens = p.x.rows, tiles = ceil_div(tokens, std::int64_t(kTokens));
    for (std::int64_t tile = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; tile < tiles;
         tile += std::int64_t(gridDim.x) * kWarps) {
        const std::int64_t token = tile * kTokens + lane / 4;
        Vectors<D> v;
        load_vectors(v, x, p.x.ld, token, tokens);
        float y[D / 8][4];
        multiply<D, R>(y, v, shared.parts, used);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = inverse_square(v, half, p.eps);
            float* a = p.a.data + (token + 8 * half) * p.a.ld + head * R;
            float mine = 0.f;  // lanes that share a band take turns, so that neighbouring bands are written together
#pragma unroll
            for (int slot = 0; slot < B::kSlots; ++slot) {
                const float energy = slot_energy<D, R>(v, y, shared.mu, slot, half, inverse);
                if (slot % B::kLanes == t % B::kLanes) mine = energy;
                if (slot % B::kLanes < B::kLanes - 1 && slot < B::kSlots - 1) continue;
                const int owned = slot / B::kLanes * B::kLanes + t % B::kLanes, band = B::band(owned, t);
                if (owned < B::kSlots && token + 8 * half < tokens)
                    a[band] = p.raw ? mine : mine / (mine + shared.tau[band]) * inverse_temp;
            }
        }
    }
}

// ---- backward ----

// R > 1: the rows of y, weighted, times the eigenvectors: z_d = sum_m y_m U_md. Both factors as the sum of two bf16
// parts: the product keeps 16 bits, twice what dx is rounded to. What is left of v.x is dx.
template <int D>
__device__ __forceinline__ void backward_product(Vectors<D>& v, const float (&y)[D / 8][4], const nv_bf16* parts,
                                                 const float (&inverse)[2], const float (&weighted)[2]) {
    const unsigned lane = threadIdx.x % kWarp;  // tiles: rows 16 s, chunk q; 16 s + 8, q; 16 s, q + 1; 16 s + 8, q + 1
    const unsigned mine = matrix_offset<D>(lane % 16, lane / 16);
    const auto* bytes = reinterpret_cast<const unsigned char*>(parts);
    std::uint32_t hi[D / 16][4], mid[D / 16][4];
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float y0 = y[2 * s + k / 2][k % 2 * 2], y1 = y[2 * s + k / 2][k % 2 * 2 + 1];
            hi[s][k] = pack_bf16(y0, y1);
            mid[s][k] = pack_bf16(y0 - low_half(hi[s][k]), y1 - high_half(hi[s][k]));
            asm volatile("" : "+r"(hi[s][k]), "+r"(mid[s][k]));  // one after the other: the pair takes the place of y
        }
    }
#pragma unroll
    for (int q = 0; q < D / 8; q += 2) {
        __syncwarp();  // as in product()
        float z[2][4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
            const unsigned char* at = bytes + (mine ^ (16 * q)) + 32 * D * s;
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
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                std::uint32_t& pair = v.x[half][q + k];
                const float f = 2.f * inverse[half], w = weighted[half];
                pair = pack_bf16(f * (z[k][2 * half] - w * low_half(pair)),
                                 f * (z[k][2 * half + 1] - w * high_half(pair)));
            }
        }
    }
}
// R = 1: dx = 2 g (Lx - E x) / (x'x + eps), in place of x.
template <int D>
__device__ __forceinline__ void backward_sparse(Vectors<D>& v, const float (&y)[D / 8][4], const float (&inverse)[2],
                                                const float (&weighted)[2], const float (&g)[2]) {
#pragma unroll
    for (int q = 0; q < D / 8; ++q) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            std::uint32_t& pair = v.x[half][q];
            const float f = 2.f * inverse[half], w = weighted[half];
            pair = pack_bf16(f * (g[half] * y[q][2 * half] - w * low_half(pair)),
                             f * (g[half] * y[q][2 * half + 1] - w * high_half(pair)));
        }
    }
}

// A lane's sums over its tokens.
template <int D, int R>
struct Sums {
    float log_tau[Bands<D, R>::kSlots] = {};
    float log_temp = 0.f;
};

// g of every slot: energies, the sums, weighted = sum_r g_r E_r, and (R > 1) g_r mu_m y_m in place of y_m.
template <int D, int R>
__device__ __forceinline__ void weigh(const EnergyBackward<bf16>& p, const Shared& shared, const Vectors<D>& v,
                                      float (&y)[D / 8][4], std::int64_t token, int half, float inverse,
                                      float inverse_temp, Sums<D, R>& sums, float& weighted, float& last_g) {
    using B = Bands<D, R>;
    const int t = threadIdx.x % 4;
    const bool inside = token + 8 * half < p.x.rows;
    const float* da = p.da.data + (token + 8 * half) * p.da.ld + blockIdx.y * R;
    const bool counted = t % B::kLanes == 0;  // each band once over the four lanes
    float share = 0.f;
#pragma unroll
    for (int slot = 0; slot < B::kSlots; ++slot) {
        const int band = B::band(slot, t);
        const float d = inside ? da[band] * inverse_temp : 0.f;
        const float energy = slot_energy<D, R>(v, y, shared.mu, slot, half, inverse);
        const float tau = shared.tau[band], inverse_sum = inside ? 1.f / (energy + tau) : 0.f;
        const float lambda = energy * inverse_sum, rest = tau * inverse_sum;  // rest = 1 - lambda
        const float g = d * rest * inverse_sum;
        share += counted ? g * energy : 0.f;
        sums.log_tau[slot] -= d * lambda * rest;
        sums.log_temp -= counted ? d * lambda : 0.f;
        last_g = g;
        if constexpr (R > 1) {
#pragma unroll
            for (int n = 0; n < B::kTiles; ++n) {
                const int j = B::tile(slot) + n;
                if (B::takes(slot, 0)) y[j][2 * half] *= g;
                if (B::takes(slot, 1)) y[j][2 * half + 1] *= g;
            }
        }
    }
    weighted = sum_of_lanes(share, 4);
}

// Scratch: partial[(k * heads + head) * gridDim.x + blockIdx.x], k < R: dlog_tau, k = R: dlog_temp.
template <int D, int R>
__device__ __forceinline__ void store_sums(const EnergyBackward<bf16>& p, const Shared& shared,
                                           const Sums<D, R>& sums) {
    using B = Bands<D, R>;
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    float* mine = shared.partials + threadIdx.x / kWarp * (kMaxScalars + 1);
#pragma unroll
    for (int slot = 0; slot < B::kSlots; ++slot) {
        float sum = sums.log_tau[slot];
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane < 4 && t % B::kLanes == 0) mine[B::band(slot, t)] = sum;
    }
    const float log_temp = warp_sum(sums.log_temp);
    if (lane == 0) mine[R] = log_temp;
    __syncthreads();
    if (threadIdx.x > R) return;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += shared.partials[w * (kMaxScalars + 1) + threadIdx.x];
    p.scratch.data[(std::int64_t(threadIdx.x) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

template <int D, int R>
__global__ void __launch_bounds__(kThreads) energy_backward_kernel(EnergyBackward<bf16> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Shared shared = carve<D>(memory);
    const int head = blockIdx.y, lane = threadIdx.x % kWarp;
    if (threadIdx.x < R) shared.tau[threadIdx.x] = expf(p.log_tau.data[threadIdx.x]);
    const int used = load_matrix<D, R>(p.lap, shared);  // ends with a barrier
    const float inverse_temp = expf(-p.log_temp.data[head]);
    const std::int64_t tokens = p.x.rows, tiles = ceil_div(tokens, std::int64_t(kTokens));
    const auto* x = reinterpret_cast<const nv_bf16*>(p.x.data) + head * D;
    auto* dx = reinterpret_cast<nv_bf16*>(p.dx.data) + head * D;
    Sums<D, R> sums;
    for (std::int64_t tile = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; tile < tiles;
         tile += std::int64_t(gridDim.x) * kWarps) {
        const std::int64_t token = tile * kTokens + lane / 4;
        Vectors<D> v;
        load_vectors(v, x, p.x.ld, token, tokens);
        float y[D / 8][4], inverse[2], weighted[2], g[2];
        multiply<D, R>(y, v, shared.parts, used);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (R > 1) forget_unpacked(v);
            inverse[half] = inverse_square(v, half, p.eps);
            weigh<D, R>(p, shared, v, y, token, half, inverse[half], inverse_temp, sums, weighted[half], g[half]);
        }
        forget_unpacked(v);
        if constexpr (R == 1)
            backward_sparse<D>(v, y, inverse, weighted, g);
        else
            backward_product<D>(v, y, shared.parts, inverse, weighted);
        store_vectors(v, dx, p.dx.ld, token, tokens);
    }
    if (p.scratch.data) store_sums<D, R>(p, shared, sums);
}

// One block per total: R of dlog_tau (if wanted), then one per head of dlog_temp (if wanted).
__global__ void __launch_bounds__(kThreads)
    energy_totals_kernel(const float* partial, int blocks, int heads, int scalars, float* dlog_tau, float* dlog_temp) {
    __shared__ float shared[kWarps];
    const int taus = dlog_tau ? scalars : 0, total = blockIdx.x;
    const bool is_tau = total < taus;
    const float* mine = is_tau ? partial + std::int64_t(total) * heads * blocks
                               : partial + (std::int64_t(scalars) * heads + (total - taus)) * blocks;
    const int count = is_tau ? heads * blocks : blocks;
    float sum = 0.f;
    for (int i = threadIdx.x; i < count; i += kThreads) sum += mine[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) (is_tau ? dlog_tau[total] : dlog_temp[total - taus]) += sum;
}

// ---- launch ----

// Blocks per head: every block gets the same number of rounds, and about kMaxBlocks run in all.
unsigned blocks_per_head(std::int64_t tokens, std::int64_t heads) {
    const std::int64_t work = ceil_div(tokens, std::int64_t(kTokens) * kWarps);
    const std::int64_t most = heads < kMaxBlocks ? kMaxBlocks / heads : 1;
    return static_cast<unsigned>(ceil_div(work, ceil_div(work, most)));
}

template <int D, int R>
void launch(const Cuda& d, const EnergyForward<bf16>& p) {
    constexpr int bytes = static_cast<int>(shared_bytes<D>());
    const auto kernel = energy_forward_kernel<D, R>;
    allow_shared<bytes>(kernel);
    kernel<<<dim3(blocks_per_head(p.x.rows, p.heads), static_cast<unsigned>(p.heads)), kThreads, bytes, stream_of(d)>>>(
        p);
    LAUNCH_CHECK("energy_forward");
}
template <int D, int R>
void launch(const Cuda& d, const EnergyBackward<bf16>& p) {
    constexpr int bytes = static_cast<int>(shared_bytes<D>());
    const auto kernel = energy_backward_kernel<D, R>;
    allow_shared<bytes>(kernel);
    kernel<<<dim3(blocks_per_head(p.x.rows, p.heads), static_cast<unsigned>(p.heads)), kThreads, bytes, stream_of(d)>>>(
        p);
    LAUNCH_CHECK("energy_backward");
}
template <int D, class P>
void launch_scalars(const Cuda& d, const P& p) {
    switch (p.scalars) {
        case 1:
            return launch<D, 1>(d, p);
        case 2:
            return launch<D, 2>(d, p);
        case 4:
            return launch<D, 4>(d, p);
        case 8:
            return launch<D, 8>(d, p);
        default:
            return launch<D, 16>(d, p);  // check(): R divides D, a power of two, and is at most 16
    }
}
template <class P>
void launch_any(const Cuda& d, const P& p) {
    switch (p.lap.dim) {
        case 16:
            return launch_scalars<16>(d, p);
        case 32:
            return launch_scalars<32>(d, p);
        case 64:
            return launch_scalars<64>(d, p);
        case 128:
            return launch_scalars<128>(d, p);
        default:
            contract_failed("energy", "D in {16, 32, 64, 128} on Cuda");
    }
}
}  // namespace

void energy_forward(const Cuda& d, const EnergyForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("energy", is_aligned16(p.x));
    if (p.x.rows > 0) launch_any(d, p);
}

void energy_backward(const Cuda& d, const EnergyBackward<bf16>& given) {
    EnergyBackward<bf16> p = given;
    check(p);
    FIEDLER_REQUIRE("energy", is_aligned16(p.x) && is_aligned16(p.dx));
    if (p.x.rows == 0) return;
    const bool sums = p.dlog_tau || p.dlog_temp;
    FIEDLER_REQUIRE("energy",
                    !sums || (p.scratch && p.scratch.size >= energy_scratch_elements(p.x.rows, p.heads, p.scalars)));
    if (!sums) p.scratch = {};
    launch_any(d, p);
    if (!sums) return;
    const int totals = (p.dlog_tau ? p.scalars : 0) + (p.dlog_temp ? p.heads : 0);
    energy_totals_kernel<<<static_cast<unsigned>(totals), kThreads, 0, stream_of(d)>>>(
        p.scratch.data, static_cast<int>(blocks_per_head(p.x.rows, p.heads)), p.heads, p.scalars, p.dlog_tau.data,
        p.dlog_temp.data);
    LAUNCH_CHECK("energy_totals");
}

}  // namespace fiedler
