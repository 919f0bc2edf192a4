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
// (position() in energy_product.cuh); the matrix is stored with the same renumbering. With R = 1 its rows are
// renumbered as well: y then lies on the lanes exactly as x does, and x'Lx and dx = .. (Lx - E x) need no exchange.
#include <bit>

#include "kernels/common.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/energy.h"
#include "kernels/energy_product.cuh"

namespace fiedler {

namespace {
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
template <int D, int R, class Take>
__device__ __forceinline__ void multiply(const Vectors<D>& v, const nv_bf16* parts, int used, Take&& take) {
    if (R == 1 && used == 1)
        product<D, 1>(v, parts, take);
    else
        product<D, kParts>(v, parts, take);
}

// y = M x and the energies of its bands, as the tiles come: tile(j, y) with the rows of each, times mu where R > 1; then
// take(slot, half, energy) of the slots that are complete with it. inverse: of the squares of the tokens' vectors.
template <int D, int R, class Tile, class Take>
__device__ __forceinline__ void energies(const Vectors<D>& v, const Shared& shared, int used, const float (&inverse)[2],
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
        multiply<D, R>(v, shared.parts, used, [&](int j, const float(&pair)[2][4]) {
#pragma unroll
            for (int k = 0; k < 8; ++k) y[j + k / 4][k % 4] = pair[k / 4][k % 4];
        });
#pragma unroll
        for (int j = 0; j < D / 8; ++j) each(j, y[j]);
    } else {
        multiply<D, R>(v, shared.parts, used, [&](int j, float(&pair)[2][4]) {
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

// Blocks that fit on a multiprocessor at least; 0: left to ptxas, which for sm_120 takes two once where that spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
template <int D, int R>
constexpr int kForwardAtLeast = D == 128 && R == 16 ? 1 : 0;
#else
template <int D, int R>
constexpr int kForwardAtLeast = 0;
#endif

template <int D, int R>
__global__ void __launch_bounds__(kThreads, kForwardAtLeast<D, R>) energy_forward_kernel(EnergyForward<bf16> p) {
    using B = Bands<D, R>;
    extern __shared__ __align__(16) unsigned char memory[];
    const Shared shared = carve<D>(memory);
    const int head = blockIdx.y, lane = threadIdx.x % kWarp, t = lane % 4;
    const auto* x = reinterpret_cast<const nv_bf16*>(p.x.data) + head * D;
    const std::int64_t tokens = p.x.rows, tiles = ceil_div(tokens, std::int64_t(kTokens));
    const std::int64_t step = std::int64_t(gridDim.x) * kWarps;
    std::int64_t tile = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    prefetch_vectors<D>(x, p.x.ld, tile, step, tokens);
    if (threadIdx.x < R) shared.tau[threadIdx.x] = p.raw ? 0.f : expf(p.log_tau.data[threadIdx.x]);
    const int used = load_matrix<D, R>(p.lap, shared);  // ends with a barrier
    const float inverse_temp = p.raw ? 1.f : expf(-p.log_temp.data[head]);
    for (; tile < tiles; tile += step) {
        const std::int64_t token = tile * kTokens + lane / 4;
        Vectors<D> v;
        load_vectors(v, x, p.x.ld, token, tokens);
        const float inverse[2] = {inverse_square(v, 0, p.eps), inverse_square(v, 1, p.eps)};
        if (kForgets<D, R>) forget_unpacked(v);
        float mine[2] = {};  // lanes that share a band take turns, so that neighbouring bands are written together
        energies<D, R>(
            v, shared, used, inverse, [](int, const float(&)[4]) {},
            [&](int slot, int half, float energy) {
                if (slot % B::kLanes == t % B::kLanes) mine[half] = energy;
                if (slot % B::kLanes < B::kLanes - 1 && slot < B::kSlots - 1) return;
                const int owned = slot / B::kLanes * B::kLanes + t % B::kLanes, band = B::band(owned, t);
                if (owned < B::kSlots && token + 8 * half < tokens)
                    p.a.data[(token + 8 * half) * p.a.ld + head * R + band] =
                        p.raw ? mine[half] : mine[half] / (mine[half] + shared.tau[band]) * inverse_temp;
            });
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

// g of a slot: the sums, share += g_r E_r, and (R > 1) g_r mu_m y_m in place of mu_m y_m.
template <int D, int R>
__device__ __forceinline__ float weigh(const EnergyBackward<bf16>& p, const Shared& shared, float (&y)[D / 8][4],
                                       std::int64_t token, int slot, int half, float energy, float inverse_temp,
                                       Sums<D, R>& sums, float& share) {
    using B = Bands<D, R>;
    const int t = threadIdx.x % 4, band = B::band(slot, t);
    const bool inside = token + 8 * half < p.x.rows;
    const bool counted = t % B::kLanes == 0;  // each band once over the four lanes
    const float da = inside ? p.da.data[(token + 8 * half) * p.da.ld + blockIdx.y * R + band] * inverse_temp : 0.f;
    const float tau = shared.tau[band], inverse_sum = inside ? 1.f / (energy + tau) : 0.f;
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
template <int D, int R>
__global__ void __launch_bounds__(kBackwardThreads<D, R>) energy_backward_kernel(EnergyBackward<bf16> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Shared shared = carve<D>(memory);
    const int head = blockIdx.y, lane = threadIdx.x % kWarp;
    const auto* x = reinterpret_cast<const nv_bf16*>(p.x.data) + head * D;
    auto* dx = reinterpret_cast<nv_bf16*>(p.dx.data) + head * D;
    constexpr int kBlockWarps = kBackwardThreads<D, R> / kWarp;
    const std::int64_t tokens = p.x.rows, tiles = ceil_div(tokens, std::int64_t(kTokens));
    const std::int64_t step = std::int64_t(gridDim.x) * kBlockWarps;
    std::int64_t tile = std::int64_t(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
    prefetch_vectors<D>(x, p.x.ld, tile, step, tokens);
    if (threadIdx.x < R) shared.tau[threadIdx.x] = expf(p.log_tau.data[threadIdx.x]);
    const int used = load_matrix<D, R>(p.lap, shared);  // ends with a barrier
    const float inverse_temp = expf(-p.log_temp.data[head]);
    Sums<D, R> sums;
    for (; tile < tiles; tile += step) {
        const std::int64_t token = tile * kTokens + lane / 4;
        Vectors<D> v;
        load_vectors(v, x, p.x.ld, token, tokens);
        const float inverse[2] = {inverse_square(v, 0, p.eps), inverse_square(v, 1, p.eps)};
        forget_unpacked(v);
        float y[D / 8][4], weighted[2] = {}, g[2] = {};
        energies<D, R>(
            v, shared, used, inverse,
            [&](int j, const float(&tile)[4]) {
#pragma unroll
                for (int k = 0; k < 4; ++k) y[j][k] = tile[k];
            },
            [&](int slot, int half, float energy) {
                g[half] = weigh<D, R>(p, shared, y, token, slot, half, energy, inverse_temp, sums, weighted[half]);
            });
#pragma unroll
        for (int half = 0; half < 2; ++half) weighted[half] = sum_of_lanes(weighted[half], 4);
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

// Blocks of a launch: those that run at once on the 132 multiprocessors of an H200, as registers allow. A second wave would
// load the matrix again. Fixed, so that the order of the sums is fixed too.
constexpr int kMultiprocessors = kMaxBlocks / 4;
template <int D>
constexpr int kForwardBlocks = kMultiprocessors*(D == 128  ? 2
                                                 : D == 64 ? 3
                                                           : 4);
template <int D, int R>
constexpr int kBackwardBlocks = kMultiprocessors*(D == 128  ? 1
                                                  : D == 64 ? (R == 1 ? 2 : 3)
                                                  : D == 32 ? 3
                                                            : 4);

// Blocks per head: every block gets the same number of rounds.
unsigned blocks_per_head(std::int64_t tokens, std::int64_t heads, int threads, int blocks) {
    const std::int64_t work = ceil_div(tokens, std::int64_t(kTokens) * (threads / kWarp));
    const std::int64_t most = heads < blocks ? blocks / heads : 1;
    return static_cast<unsigned>(ceil_div(work, ceil_div(work, most)));
}

template <int D, int R>
void launch(const Cuda& d, const EnergyForward<bf16>& p) {
    constexpr int bytes = static_cast<int>(shared_bytes<D>());
    const auto kernel = energy_forward_kernel<D, R>;
    allow_shared<bytes>(kernel);
    const unsigned blocks = blocks_per_head(p.x.rows, p.heads, kThreads, kForwardBlocks<D>);
    kernel<<<dim3(blocks, unsigned(p.heads)), kThreads, bytes, stream_of(d)>>>(p);
    LAUNCH_CHECK("energy_forward");
}
template <int D, int R>
void launch(const Cuda& d, const EnergyBackward<bf16>& p) {
    constexpr int bytes = static_cast<int>(shared_bytes<D>());
    constexpr int threads = kBackwardThreads<D, R>;
    const auto kernel = energy_backward_kernel<D, R>;
    allow_shared<bytes>(kernel);
    const unsigned blocks = blocks_per_head(p.x.rows, p.heads, threads, kBackwardBlocks<D, R>);
    kernel<<<dim3(blocks, unsigned(p.heads)), threads, bytes, stream_of(d)>>>(p);
    LAUNCH_CHECK("energy_backward");
    const int totals = (p.dlog_tau ? R : 0) + (p.dlog_temp ? p.heads : 0);
    if (totals == 0) return;
    energy_totals_kernel<<<unsigned(totals), kThreads, 0, stream_of(d)>>>(p.scratch.data, int(blocks), p.heads, R,
                                                                          p.dlog_tau.data, p.dlog_temp.data);
    LAUNCH_CHECK("energy_totals");
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
}

}  // namespace fiedler
