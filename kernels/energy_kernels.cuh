// kernels/energy_kernels.cuh: energy's two kernels (see energy.cu), for any way of multiplying: struct P has
//   forward_threads(D, R), backward_threads(D, R)        threads of a block
//   forward_at_least(D, R), backward_at_least(D, R)      blocks that fit on a multiprocessor at least; 0: left to ptxas
//   forward_blocks(D, R), backward_blocks(D, R)          blocks of a launch for each multiprocessor: those that run at once,
//               as registers allow. A second wave would load the matrix again
//   kGroupThreads, group_sync()                          threads that share heads, and go from tile to tile together;
//               0: the block
//   ForwardSupply<D, R>, BackwardSupply<D, R>            what brings the vectors (see DirectSupply): kBytes of shared
//               memory
//   kPrepared   the matrix comes as energy_prepare() left it, by the supply: start(), begin(), wait_for_matrix()
//   kAligned    rows of scalars are aligned to what one access takes
//   kInOrder    the chunks of a vector are in order (see position()), and the supply takes dx, too: put(), send(). The
//               gradients of the scalars are asked for a step ahead
//   kManyHeads  the vectors of a group may be of so many heads: 1 or 4
//   Map, map_of<D>(x, log2)                              what the supply has to know of x, and then of dx; log2 of how
//               many heads are side by side
//   kParts      of the matrix
//   kHalves     backward, R > 1: the second product is of f16, by one more part of the matrix, see matrix_scale()
//   allow<bytes>(kernel)                   host: the kernel may have so much dynamic shared memory
//   publish_matrix()                       before the barrier after which the matrix in shared memory is multiplied with
//   quotient(x, y)                         x / y, where y is neither denormal nor infinite
//   Matrix, matrix<D>(parts)               what the products below take for the parts of the matrix in shared memory
//   multiply<D, R, kBackward>(v, matrix, used, meanwhile, take)   y = M x of the vectors of a warp, as product() gives it;
//               all parts if R > 1. meanwhile(): once, before take. Forward with R = 1 M may be the triangle (energy_prepare)
//   turn<D>(hi, mid, matrix, take)         z = M' y; y as the sum of two bf16 parts, in the layout of A (kernels/mma.cuh):
//                                          take(q, z) for q = 0, 2, .. of D / 8 with z[k] of chunk q + k
//   turn_halves<D>(y, matrix, take)        the same of f16; y as one part
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels/dependent_launch.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/energy_lanes.cuh"
#include "kernels/energy_place.cuh"

namespace fiedler::energy_kernels {

using namespace energy_product;

// ---- energies ----

// x'x of the vectors g and g + 8. With kInOrder by f32: mma.sync would wait for the products of warpgroups, which take
// the same units. Otherwise the squares are the diagonal of the product of the vectors with themselves: of the lanes of
// vector g, number g / 2 % 4 has it.
template <int D, bool kInOrder>
__device__ __forceinline__ void squares(float (&square)[2], Vectors<D>& v) {
    if constexpr (kInOrder) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float even = 0.f, odd = 0.f;
#pragma unroll
            for (int q = 0; q < D / 8; ++q) {
                const float x = low_half(v.x[half][q]), y = high_half(v.x[half][q]);
                even = fmaf(x, x, even), odd = fmaf(y, y, odd);
            }
            square[half] = sum_of_lanes(even + odd, 4);
            forget_unpacked(v);
        }
    } else {
        float low[4] = {}, high[4] = {};
#pragma unroll
        for (int s = 0; s < D / 16; ++s) {
            const std::uint32_t a[4] = {v.x[0][2 * s], v.x[1][2 * s], v.x[0][2 * s + 1], v.x[1][2 * s + 1]};
            mma_bf16(low, a, a[0], a[2]);
            mma_bf16(high, a, a[1], a[3]);
        }
        const int g = threadIdx.x % kWarp / 4, from = 4 * g + g / 2;
        const float mine[2] = {g % 2 == 0 ? low[0] : low[1], g % 2 == 0 ? high[2] : high[3]};
#pragma unroll
        for (int half = 0; half < 2; ++half) square[half] = __shfl_sync(0xffffffffu, mine[half], from);
    }
}

template <int R, class P>
constexpr bool kHalves = R > 1 && P::kHalves;
template <int R, class P, bool kBackward>
constexpr int kMatrixParts = P::kParts + (kBackward && kHalves<R, P> ? 1 : 0);
template <int D>
constexpr std::int64_t kTriangleOffset = energy_triangle_offset(D);
// Asks for the matrix where it is prepared, and then for the first vectors.
template <int D, int R, class P, bool kBackward, class Supply>
__device__ __forceinline__ void start(const FeatureLaplacian<float>& lap, const Shared& s, Supply& supply) {
    if constexpr (P::kPrepared) {
        const EnergyMatrix& matrix = R == 1 ? lap.of_one : lap.of_several;
        constexpr std::int64_t kBefore = R == 1 && !kBackward ? kTriangleOffset<D> : 0;
        supply.start(s.parts, static_cast<const std::byte*>(matrix.data) + kBefore,
                     kMatrixParts<R, P, kBackward> * (2 * D * D));
    }
}
// R = 1: how many parts of the matrix are not zero, if it is not prepared. R > 1, halves: its matrix_scale(). Ends with a
// barrier, or a wait for the matrix.
template <int D, int R, class P, class Supply, class Meanwhile>
__device__ __forceinline__ int load_matrix(const FeatureLaplacian<float>& lap, const Shared& s, Supply& supply,
                                           Meanwhile&& meanwhile) {
    if constexpr (P::kPrepared) {
        meanwhile();
        supply.begin();
        __syncthreads();  // its barrier is there
        supply.wait_for_matrix();
        return lap.of_several.log2;
    } else if constexpr (R == 1) {
        return load_sparse<D, P>(lap, s, meanwhile);
    } else {
        return load_eigenvectors<D, P, false>(lap, s, meanwhile);
    }
}
template <int D, int R, class P, bool kBackward>
constexpr std::size_t kSharedBytes = sizeof(nv_bf16) * kMatrixParts<R, P, kBackward>* D* D
                                     + P::kManyHeads* kPartialBytes;  // no stages

// x'x + eps of the vectors g and g + 8, and 1 / that.
struct Sizes {
    float square[2], inverse[2];  // the latter backward
};
// y = M x as the tiles come: tile(j, y) with the rows of each. The vectors' sizes and the energies of the lane's bands;
// forward, times their sizes. meanwhile(): what may be done while the product is on its way.
template <int D, int R, class P, bool kBackward, class Meanwhile, class Tile>
__device__ __forceinline__ void energies(Scalars<D, R>& energy, Sizes& sizes, Vectors<D>& v,
                                         const typename P::Matrix& matrix, int used, float eps, Meanwhile&& meanwhile,
                                         Tile&& tile) {
    using B = Bands<D, R>;
    constexpr bool kTogether = R == 1 && P::kInOrder;  // x is unpacked once for both sums
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        sizes.square[half] = 0.f;
#pragma unroll
        for (int b = 0; b < B::kBands; ++b) energy[half][b] = 0.f;
    }
    const auto take = [&](int j, const float(&pair)[2][4]) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float y = pair[k][2 * half + e];
                    const std::uint32_t both = v.x[half][j + k];
                    const float x = e == 0 ? low_half(both) : high_half(both);
                    energy[half][B::of(j + k, e)] += y * (R > 1 ? y : x);
                    if constexpr (kTogether) sizes.square[half] = fmaf(x, x, sizes.square[half]);
                }
            tile(j + k, pair[k]);
        }
    };
    const auto finish_size = [&](int half) {
        sizes.square[half] += eps;
        if constexpr (kBackward) sizes.inverse[half] = P::quotient(1.f, sizes.square[half]);
    };
    P::template multiply<D, R, kBackward>(
        v, matrix, R > 1 ? P::kParts : used,
        [&] {
            meanwhile();
            if constexpr (!kTogether) {
                squares<D, P::kInOrder>(sizes.square, v);
                finish_size(0), finish_size(1);
            }
        },
        take);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (kTogether) {
            sizes.square[half] = sum_of_lanes(sizes.square[half], 4);
            finish_size(half);
        }
#pragma unroll
        for (int b = 0; b < B::kBands; ++b) {
            float& e = energy[half][b];
            e = sum_of_lanes(e, B::kLanes) * (kBackward ? sizes.inverse[half] : 1.f);
            if (R == 1 && e < 0.f) e = 0.f;  // rounding can leave a vanishing energy below zero; a NaN stays a NaN
        }
    }
}

template <int D, int R, class P>
using ForwardPlace = Place<P::kGroupThreads ? P::kGroupThreads : P::forward_threads(D, R)>;
template <int D, int R, class P>
using BackwardPlace = Place<P::kGroupThreads ? P::kGroupThreads : P::backward_threads(D, R)>;

// ---- forward ----

template <int D, int R, class P>
__global__ void __launch_bounds__(P::forward_threads(D, R), P::forward_at_least(D, R))
    energy_forward_kernel(const EnergyForward<bf16> p, int per_column, int heads_log2,
                          const __grid_constant__ typename P::Map map) {
    using B = Bands<D, R>;
    extern __shared__ __align__(1024) unsigned char memory[];
    using Supply = typename P::template ForwardSupply<D, R>;
    const Shared shared = carve<D>(memory, kMatrixParts<R, P, false>, Supply::kBytes);
    const int tokens = int(p.x.rows);  // ints hold them, and some steps more: see energy.cu
    using Place = ForwardPlace<D, R, P>;
    const Place place(p.heads, p.b.data ? 2 * p.heads : p.heads, P::kManyHeads > 1 ? heads_log2 : 0);
    const int step = per_column * place.tokens_at_once(), begin = place.first_token(per_column, tokens);
    Supply supply(p.x, map, shared.stages, place.first, begin, step);
    start<D, R, P, false>(p.lap, shared, supply);
    const bool aligned = P::kAligned || kept(are_aligned(place.second ? p.b : p.a, B::kBands));
    // The token of the thread's vector g, and what is left from it on; the other's is `further` on.
    const int token = begin + place.token(), further = place.further();
    float* a = (place.second ? p.b : p.a).data + token * p.a.ld + place.head * R + B::first();
    const std::int64_t other = P::kManyHeads > 1 ? kept(further * p.a.ld) : further * p.a.ld;
    int left = tokens - token;
    Parameters<D, R> parameters;
    const auto matrix = P::template matrix<D>(shared.parts);
    const int used = load_matrix<D, R, P>(p.lap, shared, supply, [&] {
        if (!p.raw) parameters.load(p.log_tau.data, p.log_temp.data + place.head);
    });
    parameters.finish();
    const Lambda<D, R> lambda(parameters, p.eps, p.raw);
    constexpr bool kMeanwhile = R > 1;  // with one scalar a branch there spills
    while (P::kGroupThreads ? left + place.token() > 0
                            : __any_sync(0xffffffffu, left > 0)) {  // one for all that take part
        Vectors<D> v;
        supply.next(v);
        Scalars<D, R> energy;
        Sizes sizes;
        energies<D, R, P, false>(
            energy, sizes, v, matrix, used, p.eps,
            [&] {
                if constexpr (kMeanwhile) supply.refill();
            },
            [](int, const float(&)[4]) {});
        if constexpr (!kMeanwhile) supply.refill();
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int b = 0; b < B::kBands; ++b) {
                float& e = energy[half][b];
                e = lambda.template of<P>(b, e, sizes.square[half]);
            }
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (B::counts() && half * further < left) store_row(a + half * other, energy[half], aligned);
        a += step * p.a.ld, left -= step;
    }
}

// ---- backward ----

// R > 1: the rows of y times the matrix: dx = [f] sum_m g_m y_m M_m - w x, in place of x; store(group) when a group of
// its chunks is done. With halves one product of numbers of 11 bits, 3 more than dx is rounded to; the matrix' f16 part
// is behind the others. Otherwise both factors as the sum of two bf16 parts, and no f: the product keeps 16 bits.
template <int D, int R, class P, class Supply, class Store>
__device__ __forceinline__ void backward_product(Vectors<D>& v, const float (&y)[D / 8][4], const Scalars<D, R>& g,
                                                 const float (&f)[2], const float (&w)[2],
                                                 const typename P::Matrix& matrix, const Supply& supply,
                                                 Store&& store) {
    std::uint32_t hi[D / 16][4], mid[D / 16][4];
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int j = 2 * s + k / 2, half = k % 2;
            const float y0 = y[j][2 * half] * g[half][Bands<D, R>::of(j, 0)];
            const float y1 = y[j][2 * half + 1] * g[half][Bands<D, R>::of(j, 1)];
            if constexpr (P::kHalves) {
                hi[s][k] = pack_half(y0, y1);
                asm volatile("" : "+r"(hi[s][k]));
            } else {
                hi[s][k] = pack_bf16(y0, y1);
                mid[s][k] = pack_bf16(y0 - low_half(hi[s][k]), y1 - high_half(hi[s][k]));
                asm volatile(""
                             : "+r"(hi[s][k]), "+r"(mid[s][k]));  // one after the other: the pair takes the place of y
            }
        }
    }
    const auto take = [&](int q, const float(&z)[2][4]) {
        constexpr int kChunks = Shape<D>::kGroupChunks;
        if (q % kChunks == 0) supply.again(v, q / kChunks);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                std::uint32_t& pair = v.x[half][q + k];
                const float z0 = z[k][2 * half] * (P::kHalves ? f[half] : 1.f);
                const float z1 = z[k][2 * half + 1] * (P::kHalves ? f[half] : 1.f);
                pair = pack_bf16(fmaf(-w[half], low_half(pair), z0), fmaf(-w[half], high_half(pair), z1));
            }
        }
        if (q % kChunks == kChunks - 2) store(q / kChunks);
    };
    if constexpr (P::kHalves)
        P::template turn_halves<D>(hi, matrix, take);
    else
        P::template turn<D>(hi, mid, matrix, take);
}
// R = 1: dx = g Lx - w x, likewise.
template <int D, class Supply, class Store>
__device__ __forceinline__ void backward_sparse(Vectors<D>& v, const float (&y)[D / 8][4], const float (&g)[2],
                                                const float (&w)[2], const Supply& supply, Store&& store) {
    constexpr int kChunks = Shape<D>::kGroupChunks;
#pragma unroll
    for (int q = 0; q < D / 8; ++q) {
        if (D == 128 && q % kChunks == 0) supply.again(v, q / kChunks);  // registers
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            std::uint32_t& pair = v.x[half][q];
            pair = pack_bf16(fmaf(g[half], y[q][2 * half], -w[half] * low_half(pair)),
                             fmaf(g[half], y[q][2 * half + 1], -w[half] * high_half(pair)));
        }
        if (q % kChunks == kChunks - 1) store(q / kChunks);
    }
}

// A lane's sums over its tokens, times exp(log_temp).
template <int D, int R>
struct Sums {
    float log_tau[Bands<D, R>::kBands] = {};
    float log_temp = 0.f;
};

// da of a lane's bands, of the token of vector g in `row` and of the other's, so much further on; zeros beyond the last
// token.
template <int D, int R>
__device__ __forceinline__ void load_gradients(Scalars<D, R>& da, const float* row, int further, std::int64_t ld,
                                               int left, bool aligned) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half * further < left) {
            load_row(da[half], row + half * further * ld, aligned);
        } else {
#pragma unroll
            for (float& x : da[half]) x = 0.f;
        }
    }
}
// g_r exp(log_temp) of one token's bands, in place of da_r; returns the sum over r of that times E_r. Adds to the sums.
template <int D, int R, class P>
__device__ __forceinline__ float weigh(float (&da)[Bands<D, R>::kBands], const float (&energy)[Bands<D, R>::kBands],
                                       const Parameters<D, R>& parameters, bool inside, Sums<D, R>& sums) {
    using B = Bands<D, R>;
    float share = 0.f;
#pragma unroll
    for (int b = 0; b < B::kBands; ++b) {
        const float inverse_sum = inside ? P::quotient(1.f, energy[b] + parameters.tau[b]) : 0.f;
        const float rest = parameters.tau[b] * inverse_sum, d = da[b] * inverse_sum;  // rest = 1 - lambda
        da[b] = d * rest;
        const float part = da[b] * energy[b];
        sums.log_tau[b] -= part;
        sums.log_temp = fmaf(-d, energy[b], sums.log_temp);
        share += part;
    }
    return sum_of_lanes(B::counts() ? share : 0.f, 4);
}
// The largest |g_r| of a token; more than 0.
template <int n>
__device__ __forceinline__ float largest(const float (&g)[n]) {
    float most = 1e-30f;
#pragma unroll
    for (const float x : g) most = fmaxf(most, fabsf(x));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    return fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
}

// Scratch: partial[(k * columns + head * sides + side) * per_column + index], k < R: dlog_tau, k = R: dlog_temp. So
// what is added up lies side by side: of a tau everything, of a head's temperature both sides (see note_sums()).
template <int D, int R, class P>
__device__ __forceinline__ void store_sums(const EnergyBackward<bf16>& p, const Shared& shared, const Sums<D, R>& sums,
                                           float inverse_temp, int per_column, int heads_log2) {
    using Place = BackwardPlace<D, R, P>;
    using B = Bands<D, R>;
    constexpr int kNumbers = kMaxScalars + 1, kOfWarp = P::kManyHeads * kNumbers;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int lanes = 4 << heads_log2;  // of one vector of each head
    const auto sum_of_vectors = [&](float sum) {
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2)
            if (offset >= lanes) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        return sum;
    };
    float* mine = shared.partials + warp * kOfWarp + lane / 4 * kNumbers;
#pragma unroll
    for (int b = 0; b < B::kBands; ++b) {
        const float sum = sum_of_vectors(sums.log_tau[b]);
        if (lane < lanes && B::counts()) mine[B::first() + b] = sum * inverse_temp;
    }
    const float log_temp = sum_of_vectors(sum_of_lanes(B::counts() ? sums.log_temp : 0.f, 4));
    if (lane < lanes && lane % 4 == 0) mine[R] = log_temp * inverse_temp;
    P::group_sync();
    const int sides = p.db.data ? 2 : 1, item = Place::warp() * kWarp + lane, k = item >> heads_log2;
    const int offset = item - (k << heads_log2);
    const Place place(p.heads, kept(sides * p.heads), heads_log2);  // once more: registers
    if (k > R || place.index >= per_column) return;
    mine = shared.partials + (warp - Place::warp()) * kOfWarp + offset * kNumbers + k;  // of the group's first warp
    float sum = 0.f;
#pragma unroll 1
    for (int w = 0; w < Place::kWarps; ++w) sum += mine[w * kOfWarp];
    const int column = place.first + offset, second = column >= p.heads;
    const int row = (k * p.heads + column - second * p.heads) * sides + second;
    p.scratch.data[std::int64_t(row) * per_column + place.index] = sum;
}

template <int D, int R, class P>
__global__ void __launch_bounds__(P::backward_threads(D, R), P::backward_at_least(D, R))
    energy_backward_kernel(const EnergyBackward<bf16> p, int per_column, int heads_log2,
                           const __grid_constant__ typename P::Map map,
                           const __grid_constant__ typename P::Map dx_map) {
    dependents_may_start();
    using B = Bands<D, R>;
    extern __shared__ __align__(1024) unsigned char memory[];
    using Supply = typename P::template BackwardSupply<D, R>;
    const Shared shared = carve<D>(memory, kMatrixParts<R, P, true>, Supply::kBytes);
    const int tokens = int(p.x.rows);  // ints hold them, and some steps more: see energy.cu
    using Place = BackwardPlace<D, R, P>;
    const Place place(p.heads, p.db.data ? 2 * p.heads : p.heads, P::kManyHeads > 1 ? heads_log2 : 0);
    const int lane = threadIdx.x % kWarp;
    const int step = per_column * place.tokens_at_once(), begin = place.first_token(per_column, tokens);
    constexpr bool kAhead = P::kInOrder;
    Supply supply(p.x, map, shared.stages, place.first, begin, step);
    start<D, R, P, true>(p.lap, shared, supply);
    const bool aligned = P::kAligned || kept(are_aligned(place.second ? p.db : p.da, B::kBands));
    // The token of the thread's vector g, and what is left from it on; the other's is `further` on.
    const int token = begin + place.token(), further = place.further();
    auto* dx = reinterpret_cast<nv_bf16*>(p.dx.data) + token * p.dx.ld + place.first * D + lane % 4 * Shape<D>::kRun;
    const float* da = (place.second ? p.db : p.da).data + token * p.da.ld + place.head * R + B::first();
    int left = tokens - token;
    Scalars<D, R> ahead;
    Parameters<D, R> parameters;
    const auto matrix = P::template matrix<D>(shared.parts);
    const int used = load_matrix<D, R, P>(p.lap, shared, supply, [&] {
        parameters.load(p.log_tau.data, p.log_temp.data + place.head);
        if (kAhead) load_gradients<D, R>(ahead, da, further, p.da.ld, left, aligned);
    });
    parameters.finish();
    Sums<D, R> sums;
    while (P::kGroupThreads ? left + place.token() > 0
                            : __any_sync(0xffffffffu, left > 0)) {  // one for all that take part
        Vectors<D> v;
        supply.next(v);
        Scalars<D, R> g;
        const int now = left;
        if constexpr (kAhead) {
#pragma unroll
            for (int i = 0; i < 2 * B::kBands; ++i)
                g[i / B::kBands][i % B::kBands] = ahead[i / B::kBands][i % B::kBands];
            da += step * p.da.ld, left -= step;
            load_gradients<D, R>(ahead, da, further, p.da.ld, left, aligned);
        } else {
            load_gradients<D, R>(g, da, further, p.da.ld, left, aligned);
            da += step * p.da.ld, left -= step;
        }
        float y[D / 8][4], w[2], f[2];
        Scalars<D, R> energy;
        Sizes sizes;
        energies<D, R, P, true>(
            energy, sizes, v, matrix, used, p.eps, [] {},
            [&](int j, const float(&tile)[4]) {
#pragma unroll
                for (int k = 0; k < 4; ++k) y[j][k] = tile[k];
            });
        supply.refill();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            f[half] = 2.f * parameters.inverse_temp * sizes.inverse[half];
            w[half] = f[half] * weigh<D, R, P>(g[half], energy[half], parameters, half * further < now, sums);
            float unit = f[half];
            if constexpr (kHalves<R, P>) {  // |y_m| is at most 2^(8 - used) |x|: then |g_m y_m unit| < 2^14
                const float most = largest(g[half]) * root_of(sizes.square[half]);
                f[half] *= most * power_of_two(-6 - 2 * used);
                unit = reciprocal(most) * power_of_two(6 + used);
            }
#pragma unroll
            for (float& x : g[half]) x *= unit;
        }
        const auto store = [&](int group) {
            if constexpr (P::kInOrder)
                supply.put(v, group);
            else
                store_group(v, group, dx, p.dx.ld, now);
        };
        if constexpr (R == 1) {
            forget_unpacked(v);
            const float of_y[2] = {g[0][0], g[1][0]};
            backward_sparse<D>(v, y, of_y, w, supply, store);
        } else {
            backward_product<D, R, P>(v, y, g, f, w, matrix, supply, store);
        }
        if constexpr (P::kInOrder)
            supply.send(dx_map, place.first, tokens - now - place.token());
        else
            dx += step * p.dx.ld;
    }
    supply.finish();
    if (p.scratch.data)
        store_sums<D, R, P>(p, shared, sums, parameters.inverse_temp, per_column, P::kManyHeads > 1 ? heads_log2 : 0);
}

// ---- launch ----

template <int D, int R, class P>
void launch(const Cuda& d, const EnergyForward<bf16>& p) {
    constexpr int threads = P::forward_threads(D, R);
    constexpr std::size_t bytes = kSharedBytes<D, R, P, false> + P::template ForwardSupply<D, R>::kBytes;
    const auto kernel = energy_forward_kernel<D, R, P>;
    P::template allow<bytes>(kernel);
    const Share share = share_of<P>(p.x.rows, energy_columns(p), threads, P::forward_blocks(D, R));
    kernel<<<share.blocks, threads, bytes, stream_of(d)>>>(p, share.per_column, share.heads_log2,
                                                           P::template map_of<D>(p.x, share.heads_log2));
    LAUNCH_CHECK("energy_forward");
}
// Returns how many groups of each column have left their sums.
template <int D, int R, class P>
int launch(const Cuda& d, const EnergyBackward<bf16>& p) {
    constexpr int threads = P::backward_threads(D, R);
    constexpr int kGroups = P::kGroupThreads ? threads / P::kGroupThreads : 1;  // of a block
    static_assert(kMultiprocessors * P::backward_blocks(D, R) * kGroups * P::kManyHeads <= kEnergySums);
    constexpr std::size_t bytes = kSharedBytes<D, R, P, true> + P::template BackwardSupply<D, R>::kBytes;
    const auto kernel = energy_backward_kernel<D, R, P>;
    P::template allow<bytes>(kernel);
    const Share share = share_of<P>(p.x.rows, energy_columns(p), threads, P::backward_blocks(D, R));
    kernel<<<share.blocks, threads, bytes, stream_of(d)>>>(p, share.per_column, share.heads_log2,
                                                           P::template map_of<D>(p.x, share.heads_log2),
                                                           P::template map_of<D>(p.dx, share.heads_log2));
    LAUNCH_CHECK("energy_backward");
    return share.per_column;
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
// Forward, or backward, which returns what note_sums() wants to know.
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
