// kernels/energy_kernels.cuh: energy's two kernels (see energy.cu), for any way of multiplying: struct P has
//   kTogether   warps that multiply together: all of them take every step of the loop
//   forward_at_least(D, R), backward_at_least(D, R)      blocks that fit on a multiprocessor at least; 0: left to ptxas
//   forward_blocks(D, R), backward_blocks(D, R)          blocks of a launch for each multiprocessor: those that run at once,
//               as registers allow. A second wave would load the matrix again
//   kAhead<D>   whether there are registers for the first vectors while the matrix is loaded, and backward for the
//               gradients of the scalars during the product
//   quotient(x, y)                         x / y, where y is neither denormal nor infinite
//   multiply<D>(v, parts, used, take)      y = M x of the vectors of a warp, as product() gives it
//   turn<D>(hi, mid, parts, take)          z = U' y; y as the sum of two bf16 parts, in the layout of A (kernels/mma.cuh):
//                                          take(q, z) for q = 0, 2, .. of D / 8 with z[k] of chunk q + k
#pragma once
#include <type_traits>

#include "kernels/dependent_launch.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/energy_product.cuh"

namespace fiedler::energy_kernels {

using namespace energy_product;

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
    // Slots that are complete with the tiles before this one.
    __device__ static constexpr int complete(int tile) { return kWidth == 1 ? 2 * tile : tile / kTiles; }
};

__device__ __forceinline__ float sum_of_lanes(float x, int lanes) {  // over 1, 2 or 4 neighbouring lanes
    if (lanes >= 2) x += __shfl_xor_sync(0xffffffffu, x, 1);
    if (lanes >= 4) x += __shfl_xor_sync(0xffffffffu, x, 2);
    return x;
}
// x / y. With R = 1 there are two of them to a lane, and their branches keep the compiler from unpacking x early.
template <int R, class P>
__device__ __forceinline__ float ratio(float x, float y) {
    if constexpr (R == 1) return x / y;
    return P::quotient(x, y);
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
// A tile's share of the energy of the slot's band, before the division, for token g (half 0) or g + 8 (half 1). R > 1:
// leaves mu_m y_m in place of y_m.
template <int D, int R>
__device__ __forceinline__ float tile_energy(const Vectors<D>& v, float (&y)[4], const float* mu, int tile, int slot,
                                             int half) {
    using B = Bands<D, R>;
    float &y0 = y[2 * half], &y1 = y[2 * half + 1];
    if constexpr (R == 1) return y0 * low_half(v.x[half][tile]) + y1 * high_half(v.x[half][tile]);
    const float2 m = *reinterpret_cast<const float2*>(mu + 8 * tile + threadIdx.x % 4 * 2);
    float sum = 0.f;
    if (B::takes(slot, 0)) sum += y0 * (m.x * y0), y0 *= m.x;
    if (B::takes(slot, 1)) sum += y1 * (m.y * y1), y1 *= m.y;
    return sum;
}
// From the lane's sum over the tiles of a slot: the same in the kLanes lanes that share the band.
template <int D, int R>
__device__ __forceinline__ float band_energy(float sum, float inverse) {
    const float energy = sum_of_lanes(sum, Bands<D, R>::kLanes) * inverse;
    return energy < 0.f ? 0.f : energy;  // rounding can leave a vanishing energy below zero; a NaN stays a NaN
}

template <int D, int R>
__device__ __forceinline__ int load_matrix(const FeatureLaplacian<float>& lap, const Shared& s) {
    if constexpr (R == 1) return load_sparse<D>(lap, s);
    load_eigenvectors<D>(lap, s);
    return kParts;
}
// y = M x and the energies of its bands, as the tiles come: tile(j, y) with the rows of each, times mu where R > 1; then
// take(slot, half, energy) of the slots that are complete with it. inverse: of the squares of the tokens' vectors.
template <int D, int R, class P, class Tile, class Take>
__device__ __forceinline__ void energies(Vectors<D>& v, const Shared& shared, int used, const float (&inverse)[2],
                                         Tile&& tile, Take&& take) {
    using B = Bands<D, R>;
    constexpr int kOfTile = B::kWidth == 1 ? 2 : 1;  // slots that have a part in a tile
    float sum[kOfTile][2] = {};
    const auto each = [&](int j, float(&y)[4]) {
        const int slot = B::complete(j);
#pragma unroll
        for (int n = 0; n < kOfTile; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) sum[n][half] += tile_energy<D, R>(v, y, shared.mu, j, slot + n, half);
        tile(j, y);
        if (slot == B::complete(j + 1)) return;
#pragma unroll
        for (int n = 0; n < kOfTile; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                take(slot + n, half, band_energy<D, R>(sum[n][half], inverse[half]));
                sum[n][half] = 0.f;
            }
    };
    if constexpr (D < 64) {  // few tiles: rather none waits for the energies of those before
        float y[D / 8][4];
        P::template multiply<D>(v, shared.parts, used, [&](int j, const float(&pair)[2][4]) {
#pragma unroll
            for (int k = 0; k < 8; ++k) y[j + k / 4][k % 4] = pair[k / 4][k % 4];
        });
#pragma unroll
        for (int j = 0; j < D / 8; ++j) each(j, y[j]);
    } else {
        P::template multiply<D>(v, shared.parts, used, [&](int j, float(&pair)[2][4]) {
#pragma unroll
            for (int k = 0; k < 2; ++k) each(j + k, pair[k]);
        });
    }
}

// ---- forward ----

// Whether forward forgets what the squares have unpacked: where ptxas makes fewer registers of it, not spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
template <int D, int R>
constexpr bool kForgets = true;
#else
template <int D, int R>
constexpr bool kForgets = R > 1;
#endif

template <int D, int R, class P>
__global__ void __launch_bounds__(kThreads, P::forward_at_least(D, R)) energy_forward_kernel(EnergyForward<bf16> p) {
    using B = Bands<D, R>;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared = carve<D>(memory);
    const int head = blockIdx.y, lane = threadIdx.x % kWarp, t = lane % 4;
    const auto* x = reinterpret_cast<const nv_bf16*>(p.x.data) + head * D;
    const std::int64_t tokens = p.x.rows, tiles = ceil_div(tokens, std::int64_t(kTokens));
    const std::int64_t step = std::int64_t(gridDim.x) * kWarps;
    std::int64_t tile = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    prefetch_vectors<D>(x, p.x.ld, tile, step, tokens);
    Vectors<D> v;
    constexpr bool kAhead = P::template kAhead<D>;  // the first ones are on their way while the matrix is loaded
    if (kAhead) load_vectors(v, x, p.x.ld, tile * kTokens + lane / 4, tokens);
    if (threadIdx.x < R) shared.tau[threadIdx.x] = p.raw ? 0.f : expf(p.log_tau.data[threadIdx.x]);
    const int used = load_matrix<D, R>(p.lap, shared);  // ends with a barrier
    P::matrix_is_there();
    const float inverse_temp = p.raw ? 1.f : expf(-p.log_temp.data[head]);
    for (; tile - threadIdx.x / kWarp % P::kTogether < tiles; tile += step) {
        const std::int64_t token = tile * kTokens + lane / 4;
        if (!kAhead || tile >= step) load_vectors(v, x, p.x.ld, token, tokens);
        const float inverse[2] = {inverse_square(v, 0, p.eps), inverse_square(v, 1, p.eps)};
        if (kForgets<D, R>) forget_unpacked(v);
        float mine[2] = {};  // lanes that share a band take turns, so that neighbouring bands are written together
        energies<D, R, P>(
            v, shared, used, inverse, [](int, const float(&)[4]) {},
            [&](int slot, int half, float energy) {
                if (slot % B::kLanes == t % B::kLanes) mine[half] = energy;
                if (slot % B::kLanes < B::kLanes - 1 && slot < B::kSlots - 1) return;
                const int owned = slot / B::kLanes * B::kLanes + t % B::kLanes, band = B::band(owned, t);
                if (owned < B::kSlots && token + 8 * half < tokens)
                    p.a.data[(token + 8 * half) * p.a.ld + head * R + band] =
                        p.raw ? mine[half] : ratio<R, P>(mine[half], mine[half] + shared.tau[band]) * inverse_temp;
            });
    }
}

// ---- backward ----

// R > 1: the rows of y, weighted, times the eigenvectors: z_d = sum_m y_m U_md. Both factors as the sum of two bf16
// parts: the product keeps 16 bits, twice what dx is rounded to. What is left of v.x is dx.
template <int D, class P>
__device__ __forceinline__ void backward_product(Vectors<D>& v, const float (&y)[D / 8][4], const nv_bf16* parts,
                                                 const float (&inverse)[2], const float (&weighted)[2]) {
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
    P::template turn<D>(hi, mid, parts, [&](int q, const float(&z)[2][4]) {
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
    });
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

// da of a lane's slots: asked for before the product where there are registers for it, so that no slot waits for its own.
template <int D, int R, bool kAhead>
struct Gradients {
    const float* rows[2];  // null beyond the last token
    float ahead[kAhead ? Bands<D, R>::kSlots : 1][2];
    __device__ __forceinline__ Gradients(const EnergyBackward<bf16>& p, std::int64_t token) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const std::int64_t row = token + 8 * half;
            rows[half] = row < p.x.rows ? p.da.data + row * p.da.ld + blockIdx.y * R : nullptr;
            if constexpr (kAhead) {
#pragma unroll
                for (int slot = 0; slot < Bands<D, R>::kSlots; ++slot) ahead[slot][half] = load(slot, half);
            }
        }
    }
    __device__ __forceinline__ float load(int slot, int half) const {
        return rows[half] ? rows[half][Bands<D, R>::band(slot, threadIdx.x % 4)] : 0.f;
    }
    __device__ __forceinline__ float at(int slot, int half) const {
        if constexpr (kAhead) return ahead[slot][half];
        return load(slot, half);
    }
};

// g of a slot: the sums, share += g_r E_r, and (R > 1) g_r mu_m y_m in place of mu_m y_m.
template <int D, int R, class P>
__device__ __forceinline__ float weigh(const EnergyBackward<bf16>& p, const Shared& shared, float (&y)[D / 8][4],
                                       std::int64_t token, int slot, int half, float energy, float gradient,
                                       float inverse_temp, Sums<D, R>& sums, float& share) {
    using B = Bands<D, R>;
    const int t = threadIdx.x % 4, band = B::band(slot, t);
    const bool inside = token + 8 * half < p.x.rows;
    const bool counted = t % B::kLanes == 0;  // each band once over the four lanes
    const float da = gradient * inverse_temp;
    const float tau = shared.tau[band], inverse_sum = inside ? ratio<R, P>(1.f, energy + tau) : 0.f;
    const float lambda = energy * inverse_sum, rest = tau * inverse_sum;  // rest = 1 - lambda
    const float g = da * rest * inverse_sum;
    share += counted ? g * energy : 0.f;
    sums.log_tau[slot] -= da * lambda * rest;
    sums.log_temp -= counted ? da * lambda : 0.f;
    if constexpr (R > 1) {
#pragma unroll
        for (int n = 0; n < B::kTiles; ++n) {
            const int j = B::tile(slot) + n;
            if (B::takes(slot, 0)) y[j][2 * half] *= g;
            if (B::takes(slot, 1)) y[j][2 * half + 1] *= g;
        }
    }
    return g;
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
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += shared.partials[w * (kMaxScalars + 1) + threadIdx.x];
    p.scratch.data[(std::int64_t(threadIdx.x) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

// With up to 150 registers a thread three blocks of 128 fit on a multiprocessor, but one of 256.
template <int D, int R>
constexpr int kBackwardThreads = D == 64 && R > 1 ? 128 : kThreads;
template <int D, int R, class P>
__global__ void __launch_bounds__(kBackwardThreads<D, R>, P::backward_at_least(D, R))
    energy_backward_kernel(EnergyBackward<bf16> p) {
    dependents_may_start();
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared = carve<D>(memory);
    const int head = blockIdx.y, lane = threadIdx.x % kWarp;
    const auto* x = reinterpret_cast<const nv_bf16*>(p.x.data) + head * D;
    auto* dx = reinterpret_cast<nv_bf16*>(p.dx.data) + head * D;
    constexpr int kBlockWarps = kBackwardThreads<D, R> / kWarp;
    const std::int64_t tokens = p.x.rows, tiles = ceil_div(tokens, std::int64_t(kTokens));
    const std::int64_t step = std::int64_t(gridDim.x) * kBlockWarps;
    std::int64_t tile = std::int64_t(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
    prefetch_vectors<D>(x, p.x.ld, tile, step, tokens);
    Vectors<D> v;
    constexpr bool kAhead = P::template kAhead<D>;  // the first ones are on their way while the matrix is loaded
    if (kAhead) load_vectors(v, x, p.x.ld, tile * kTokens + lane / 4, tokens);
    if (threadIdx.x < R) shared.tau[threadIdx.x] = expf(p.log_tau.data[threadIdx.x]);
    const int used = load_matrix<D, R>(p.lap, shared);  // ends with a barrier
    P::matrix_is_there();
    const float inverse_temp = expf(-p.log_temp.data[head]);
    Sums<D, R> sums;
    for (; tile - threadIdx.x / kWarp % P::kTogether < tiles; tile += step) {
        const std::int64_t token = tile * kTokens + lane / 4;
        if (!kAhead || tile >= step) load_vectors(v, x, p.x.ld, token, tokens);
        const float inverse[2] = {inverse_square(v, 0, p.eps), inverse_square(v, 1, p.eps)};
        forget_unpacked(v);
        const Gradients<D, R, kAhead> gradients(p, token);
        float y[D / 8][4], weighted[2] = {}, g[2] = {};
        energies<D, R, P>(
            v, shared, used, inverse,
            [&](int j, const float(&tile)[4]) {
#pragma unroll
                for (int k = 0; k < 4; ++k) y[j][k] = tile[k];
            },
            [&](int slot, int half, float energy) {
                g[half] = weigh<D, R, P>(p, shared, y, token, slot, half, energy, gradients.at(slot, half),
                                         inverse_temp, sums, weighted[half]);
            });
#pragma unroll
        for (int half = 0; half < 2; ++half) weighted[half] = sum_of_lanes(weighted[half], 4);
        forget_unpacked(v);
        if constexpr (R == 1)
            backward_sparse<D>(v, y, inverse, weighted, g);
        else
            backward_product<D, P>(v, y, shared.parts, inverse, weighted);
        store_vectors(v, dx, p.dx.ld, token, tokens);
    }
    if (p.scratch.data) store_sums<D, R>(p, shared, sums);
}

// ---- launch ----

// Of an H200. Fixed, so that the order of the sums is fixed too.
constexpr int kMultiprocessors = kMaxBlocks / 4;
// Blocks per head: every block gets the same number of rounds.
inline unsigned blocks_per_head(std::int64_t tokens, std::int64_t heads, int threads, int blocks) {
    const std::int64_t work = ceil_div(tokens, std::int64_t(kTokens) * (threads / kWarp));
    const std::int64_t most = heads < blocks ? blocks / heads : 1;
    return static_cast<unsigned>(ceil_div(work, ceil_div(work, most)));
}

template <int D, int R, class P>
void launch(const Cuda& d, const EnergyForward<bf16>& p) {
    constexpr int bytes = static_cast<int>(shared_bytes<D>());
    const auto kernel = energy_forward_kernel<D, R, P>;
    allow_shared<bytes>(kernel);
    const unsigned blocks = blocks_per_head(p.x.rows, p.heads, kThreads, P::forward_blocks(D, R) * kMultiprocessors);
    kernel<<<dim3(blocks, unsigned(p.heads)), kThreads, bytes, stream_of(d)>>>(p);
    LAUNCH_CHECK("energy_forward");
}
// Returns the blocks of a head.
template <int D, int R, class P>
int launch(const Cuda& d, const EnergyBackward<bf16>& p) {
    constexpr int bytes = static_cast<int>(shared_bytes<D>());
    constexpr int threads = kBackwardThreads<D, R>;
    const auto kernel = energy_backward_kernel<D, R, P>;
    allow_shared<bytes>(kernel);
    const unsigned blocks = blocks_per_head(p.x.rows, p.heads, threads, P::backward_blocks(D, R) * kMultiprocessors);
    kernel<<<dim3(blocks, unsigned(p.heads)), threads, bytes, stream_of(d)>>>(p);
    LAUNCH_CHECK("energy_backward");
    return int(blocks);
}

// f(x) as a constant: x is one of these numbers.
template <int kLast, class F>
auto with_one_of(int, F&& f) {
    return f(std::integral_constant<int, kLast>());
}
template <int kFirst, int kSecond, int... kMore, class F>
auto with_one_of(int x, F&& f) {
    return x == kFirst ? f(std::integral_constant<int, kFirst>()) : with_one_of<kSecond, kMore...>(x, f);
}
// Forward, or backward, which returns the blocks of a head.
template <class P, class Problem>
auto launch_with(const Cuda& d, const Problem& p) {
    const int dim = p.lap.dim;
    if (dim != 16 && dim != 32 && dim != 64 && dim != 128) contract_failed("energy", "D in {16, 32, 64, 128} on Cuda");
    return with_one_of<16, 32, 64, 128>(dim, [&](auto width) {
        return with_one_of<1, 2, 4, 8, 16>(p.scalars, [&](auto scalars) {  // check(): R divides D and is at most 16
            return launch<decltype(width)::value, decltype(scalars)::value, P>(d, p);
        });
    });
}

}  // namespace fiedler::energy_kernels
