// kernels/attention_forward_sm90.cu: the forward pass of scalar-distance attention for sm_90a, one scalar; what a block
// does with its tiles is in attention_forward_sm90.cuh.
//
// A first kernel makes the factors of all keys, and what a block must know of its queries.
#include "kernels/attention_forward_sm90.h"

#include "kernels/attention_forward_sm90.cuh"

namespace fiedler {
namespace {

using namespace attention_forward_sm90_tile;

// Makes a tile of `tiles`, of 128 tokens and a head.
__global__ void __launch_bounds__(kKeys) attention_factors_kernel(AttentionForward<bf16> p, StoredTile* tiles) {
    dependents_may_start();
    enum { kB, kMinusB, kF, kMinusF, kA, kMinusA, kDistance, kReach, kCount };
    __shared__ int extremes[kKeys / kWarp][kCount];
    const int head = blockIdx.x, thread = threadIdx.x;
    const std::int64_t token = std::int64_t(blockIdx.y) * kKeys + thread;
    const float a = p.a.data[token * p.a.ld + head], b = p.b.data[token * p.b.ld + head],
                F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head], own = fabsf(a - b);
    const float of_lane[kCount] = {b, -b, F, -F, a, -a, own, F + own};
#pragma unroll
    for (int i = 0; i < kCount; ++i) extremes[thread / kWarp][i] = largest_of_warp(of_lane[i]);
    __syncthreads();
    float most[kCount];  // NaN, if any, in one of x and -x
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        int x = extremes[0][i];
#pragma unroll
        for (int w = 1; w < kKeys / kWarp; ++w) x = max(x, extremes[w][i]);
        most[i] = from_ordered(x);
    }
    StoredTile& tile = tiles[std::int64_t(blockIdx.y) * gridDim.x + head];
    const auto middle = [](float most, float minus_least) { return rintf(0.5f * (most - minus_least) * kLog2e); };
    const float centre = middle(most[kB], most[kMinusB]), gate = middle(most[kF], most[kMinusF]);
    const float2 factors = {factor_of(1.f, b, centre, gate, F), factor_of(-1.f, b, centre, gate, F)};
    tile.own.factors[thread] = factors;
    const float2 next = {__shfl_down_sync(0xffffffffu, factors.x, 1), __shfl_down_sync(0xffffffffu, factors.y, 1)};
    if (thread % 2 == 0)
        reinterpret_cast<uint2*>(tile.keys.pairs)[(thread / 16 * 4 + thread % 8 / 2) * 2 + thread % 16 / 8] = {
            pack_bf16(factors.x, next.x), pack_bf16(factors.y, next.y)};
    const float of_centre = middle(most[kA], most[kMinusA]), of_gate = ceilf(most[kF] * kLog2e);
    const std::uint32_t rho = twice(expf(-2.f * beyond(a, of_centre)));
    tile.own.rho[thread] = rho;
    tile.own.top[thread] = beyond(F, of_gate) - 0.5f * logf(first_of_two(rho));
    if (thread == 0) {
        const auto spread = [&](int x, int minus_x, float middle) {  // NaN stays
            const float above = beyond(most[x], middle), below = beyond(most[minus_x], -middle);
            return above > below || above != above ? above : below;
        };
        tile.keys.centre = centre, tile.keys.gate = gate;
        tile.keys.least = most[kF] == most[kF] ? -most[kMinusF] : NAN;
        tile.keys.spread = spread(kB, kMinusB, centre) + spread(kF, kMinusF, gate);
        tile.own.of = {of_centre, of_gate, most[kReach],
                       spread(kA, kMinusA, of_centre) <= kRange && most[kDistance] <= kOwnDistance &&
                           -beyond(-most[kMinusF], of_gate) <= kGateRange};
    }
}

// What attend() asks for (attention_forward_tile_sm90.cuh).
struct Way {
    using Shared = attention_forward_sm90_tile::Shared;
    using Queries = attention_forward_sm90_tile::Queries;
    using Numbers = float4;  // c', G, F, the spread
    static constexpr int kOwnBytes = sizeof(OwnTile);
    static constexpr bool kLooksAhead = false;
    static __device__ References of(std::uint32_t base) {
        const float4 x = hopper::load_four<offsetof(Shared, own) + offsetof(OwnTile, of)>(base);
        return {x.x, x.y, x.z, __float_as_int(x.w)};
    }
    static __device__ const KeyTile& keys(const StoredTile& tile) { return tile.keys; }
    static __device__ Numbers numbers(std::uint32_t base, int stage) {
        constexpr int kNumbers = offsetof(Shared, keys) + offsetof(KeyTile, centre);
        return hopper::load_four<kNumbers>(base + stage * unsigned(sizeof(KeyTile)));
    }
    static __device__ float least(const Numbers& x) { return x.z; }
    static __device__ float least(const KeyTile& x) { return x.least; }
    static __device__ bool bounded(const References& of, const Numbers& x) {
        return (of.bounded != 0) & (-beyond(x.z, of.gate) <= kGateRange) & (x.w <= kTileSpread);
    }
    static __device__ Powers by(const References& of, const Numbers& x) { return Powers(of, x); }
    static __device__ void begin_carefully(Queries& queries, const AttentionForward<bf16>& p,
                                           const Tiles<StoredTile>& tiles, bool summed) {
        queries.begin_carefully(p, tiles.head, tiles.first, summed);
    }
    static __device__ void load_own(Shared& shared, hopper::Barrier* full) {
        const Tiles<StoredTile>& tiles = shared.tiles;
        hopper::load_bytes(&shared.own, &tiles.data[std::int64_t(tiles.first / kKeys) * tiles.heads].own, kOwnBytes,
                           full);
    }
};

// Blocks start in the order x, y, z: within the pairs that stay together, those with the longest rows come first.
__global__ void __launch_bounds__(kThreads, tuning::kAttentionForwardSm90Blocks)
    attention_forward_sm90_kernel(const __grid_constant__ ForwardProblem<StoredTile> problem) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const AttentionForward<bf16>& p = problem.p;
    const int pair = static_cast<int>(blockIdx.z) * problem.together + static_cast<int>(blockIdx.x);
    const int sequence = pair / p.heads, head = pair % p.heads, of_sequence = static_cast<int>(gridDim.y);
    const int in_sequence = of_sequence - 1 - static_cast<int>(blockIdx.y);  // in tiles
    if (sequence >= problem.sequences) return;
    const int first = (sequence * of_sequence + in_sequence) * kQueries;
    const float faded = p.skip ? kFaded : INFINITY;
    const bool loads = threadIdx.x == 0;
    float least = 0.f;
    if (loads) begin_tiles<Way>(shared, problem, head, first, sequence * of_sequence, in_sequence, of_sequence);
    static_assert(sizeof(shared.ones) == kThreads * sizeof(uint4));
    reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] = {kTwoOnes, kTwoOnes, kTwoOnes, kTwoOnes};
    shared.sum[threadIdx.x] = 0.f;
    hopper::publish_shared();
    __syncthreads();
    if (loads) least = load_first<Way>(shared, shared.tiles.count);
    attend<Way>(shared, problem, loads, least, faded);
}

}  // namespace

bool attention_forward_sm90_takes(const Cuda& device, const AttentionForward<bf16>& p) {
    return p.scalars == 1 && takes(device, p, alignof(StoredTile));
}

void attention_forward_sm90(const Cuda& device, const AttentionForward<bf16>& p) {
    launch<Way, tuning::kAttentionForwardSm90Blocks>(device, p, reinterpret_cast<StoredTile*>(p.scratch.data),
                                                     attention_factors_kernel, attention_forward_sm90_kernel);
}

}  // namespace fiedler
