// kernels/gate_scan.cuh: what the forget gate's kernels (gate.cu) count with: log-sigmoid, and cumulative sums over a tile of
// tokens for two heads.
#pragma once
#include "kernels/common.cuh"

namespace fiedler {
namespace gate_scan {

constexpr int kHeads = 2;       // of a block
constexpr int kMaxWarps = 8;    // of a block that has one tile
constexpr int kAloneWarps = 8;  // of a block whose warps have a sequence each
constexpr unsigned kWholeWarp = 0xffffffffu;
static_assert(kAloneWarps <= kMaxWarps);

// log(1 + x) / x for x in [0, 1], or NaN: the polynomial whose relative error is least, 4e-8.
__device__ inline float log1p_over_x(float x) {
    constexpr float kTerms[] = {0.00536482269f, -0.0300657861f, 0.0792045221f,
                                -0.137538016f,  0.191536546f,   -0.248571634f,
                                0.33321324f,    -0.499996483f,  1.f};
    float sum = kTerms[0];
#pragma unroll
    for (int i = 1; i < 9; ++i) sum = fmaf(sum, x, kTerms[i]);
    return sum;
}
// logsigmoid(u). exp_fast, since short sequences wait for instructions.
__device__ inline float log_sigmoid(float u) {
    const float e = exp_fast(-fabsf(u));
    return fmaf(-e, log1p_over_x(e), fminf(u, 0.f));  // a NaN stays one, by e
}
// sigmoid(-u): the exponential is at most 1, the divisor at most 2.
__device__ inline float sigmoid_of_minus(float u) {
    const float e = exp_fast(-fabsf(u));
    return (u > 0.f ? e : 1.f) * reciprocal(1.f + e);
}

template <int kLanes = kWarp, int N, class A>
__device__ void warp_inclusive_scan(A (&x)[N]) {  // right in the first kLanes lanes
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int o = 1; o < kLanes; o *= 2) {
        A below[N];
#pragma unroll
        for (int n = 0; n < N; ++n) below[n] = __shfl_up_sync(kWholeWarp, x[n], o);
        if (lane >= o) {
#pragma unroll
            for (int n = 0; n < N; ++n) x[n] += below[n];
        }
    }
}

// One number of each of a block's heads at one token. The second head may not exist; where there are two everywhere, pairs
// may be aligned to their size.
template <bool kPairs>
struct Place {
    bool both;
    __device__ void load(float (&v)[kHeads], const float* p) const {
        if (kPairs) {
            const float2 pair = *reinterpret_cast<const float2*>(p);
            v[0] = pair.x, v[1] = pair.y;
        } else {
            v[0] = p[0], v[1] = both ? p[1] : 0.f;
        }
    }
    __device__ void store(float* p, const float (&v)[kHeads]) const {
        if (kPairs) {
            *reinterpret_cast<float2*>(p) = {v[0], v[1]};
        } else {
            p[0] = v[0];
            if (both) p[1] = v[1];
        }
    }
    __device__ void store(nv_bf16* p, const float (&v)[kHeads]) const {
        if (kPairs) {
            *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(v[0], v[1]);
        } else {
            p[0] = from_float<nv_bf16>(v[0]);
            if (both) p[1] = from_float<nv_bf16>(v[1]);
        }
    }
};

template <int kRun>
using Tile = float[kRun][kHeads];

// Where a warp's tokens change places, between kWarp apart (as in memory) and kRun in a row for each lane. Eight lanes at a
// time read 16 bytes each: a gap behind each run gives them different banks.
template <int kRun>
struct Exchange {
    static constexpr int kGap = kRun >= 4 ? 2 : 0;
    float2 pairs[kRun > 1 ? kWarp*(kRun + kGap) : 1];
    static __device__ int at(int token) { return token / kRun * (kRun + kGap) + token % kRun; }
    __device__ void to_runs(Tile<kRun>& x) {
        if (kRun == 1) return;
        const int lane = threadIdx.x % kWarp;
        __syncwarp();  // what was read before may be replaced
#pragma unroll
        for (int k = 0; k < kRun; ++k) pairs[at(lane + k * kWarp)] = {x[k][0], x[k][1]};
        __syncwarp();
        const auto* const own = reinterpret_cast<const float4*>(pairs + at(lane * kRun));
#pragma unroll
        for (int k = 0; k < kRun / 2; ++k) {
            const float4 two = own[k];
            x[2 * k][0] = two.x, x[2 * k][1] = two.y, x[2 * k + 1][0] = two.z, x[2 * k + 1][1] = two.w;
        }
    }
    __device__ void from_runs(Tile<kRun>& x) {  // after to_runs
        if (kRun == 1) return;
        const int lane = threadIdx.x % kWarp;
        auto* const own = reinterpret_cast<float4*>(pairs + at(lane * kRun));
#pragma unroll
        for (int k = 0; k < kRun / 2; ++k) own[k] = {x[2 * k][0], x[2 * k][1], x[2 * k + 1][0], x[2 * k + 1][1]};
        __syncwarp();
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
            const float2 pair = pairs[at(lane + k * kWarp)];
            x[k][0] = pair.x, x[k][1] = pair.y;
        }
    }
};
template <bool kAlone, int kRun>
struct Shared {
    alignas(16) Exchange<kRun> exchange[kAlone ? kAloneWarps : kMaxWarps];
    alignas(16) float2 sums[2][kMaxWarps];
};

// Cumulative sums over a tile, in place. kAlone: the tile is the warp's own. One barrier where it is not; shared sums must
// not be written by the next tile but one barrier later, hence two of them in turn.
template <bool kAlone, int kRun>
__device__ void cumulative_sums(Tile<kRun>& x, Shared<kAlone, kRun>& shared, int turn) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    Exchange<kRun>& exchange = shared.exchange[warp];
    exchange.to_runs(x);
#pragma unroll
    for (int k = 1; k < kRun; ++k) x[k][0] += x[k - 1][0], x[k][1] += x[k - 1][1];
    float sum[kHeads] = {x[kRun - 1][0], x[kRun - 1][1]}, before[kHeads];
    warp_inclusive_scan(sum);
    if (lane == kWarp - 1) shared.sums[turn][warp] = {sum[0], sum[1]};
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        before[h] = __shfl_up_sync(kWholeWarp, sum[h], 1);
        if (lane == 0) before[h] = 0.f;
    }
    if (kAlone) {
        __syncwarp();
    } else {
        __syncthreads();
        float4 two[kMaxWarps / 2];  // warps' sums; of those that do not exist anything, which is not added
        const auto* const sums = reinterpret_cast<const float4*>(shared.sums[turn]);
#pragma unroll
        for (int w = 0; w < kMaxWarps / 2; ++w) two[w] = sums[w];
        float2 of_warps{};
#pragma unroll
        for (int w = 0; w < kMaxWarps / 2; ++w) {
            if (2 * w < warp) of_warps.x += two[w].x, of_warps.y += two[w].y;
            if (2 * w + 1 < warp) of_warps.x += two[w].z, of_warps.y += two[w].w;
        }
        before[0] += of_warps.x, before[1] += of_warps.y;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k][0] += before[0], x[k][1] += before[1];
    exchange.from_runs(x);
}

// What is carried into a tile, as two floats: added to a sum it costs two instructions, and loses what a float loses.
struct Carried {
    float high = 0.f, low = 0.f;
    __device__ float plus(float x) const { return high + (low + x); }
    // What is lost where high and x are added is found by subtractions: doubles would have to be converted.
    __device__ void add(float x) {
        const float sum = high + x, of_x = sum - high, lost = (high - (sum - of_x)) + (x - of_x) + low;
        high = isfinite(sum) ? sum + lost : sum;
        low = isfinite(sum) ? lost - (high - sum) : 0.f;
    }
};
template <int kRun>
__device__ void add_carried(Tile<kRun>& x, const Carried (&carried)[kHeads]) {
#pragma unroll
    for (int k = 0; k < kRun; ++k)
#pragma unroll
        for (int h = 0; h < kHeads; ++h) x[k][h] = carried[h].plus(x[k][h]);
}
// The sums of a tile, after cumulative_sums.
template <bool kAlone, int kRun>
__device__ void add_tile(Carried (&carried)[kHeads], const Shared<kAlone, kRun>& shared, int turn) {
    float2 total{};
    const int first = kAlone ? threadIdx.x / kWarp : 0, stop = kAlone ? first + 1 : blockDim.x / kWarp;
#pragma unroll 1
    for (int w = first; w < stop; ++w) total.x += shared.sums[turn][w].x, total.y += shared.sums[turn][w].y;
    carried[0].add(total.x), carried[1].add(total.y);
}

}  // namespace gate_scan
}  // namespace fiedler
