// kernels/attention_forward_sm90.cu: the forward pass of scalar-distance attention for sm_90a, one scalar; what a block
// does with its tiles is in attention_forward_sm90.cuh.
//
// A first kernel makes the factors of all keys, and what a block must know of its queries. Then blocks stream tiles of
// keys, latest first, so that the queries' own tokens come before those that the gate may have closed: a thread asks TMA
// for values and factors two tiles ahead, into a ring of three stages; warps tell each other that a stage is free, and meet
// nowhere else but in their products and at the end.
#include "kernels/attention_forward_sm90.h"

#include "kernels/attention_forward_sm90.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/tensor_map.h"

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

// Thread 0: tile k is on its way, and with the first one what the block has of its own; without values where nothing of it
// counts.
__device__ void load(Shared& shared, int k, bool with_values) {
    const Tiles& tiles = shared.tiles;
    const int stage = k % kStages;
    if (k >= kStages) hopper::barrier_wait(&shared.empty[stage], (k / kStages - 1) & 1);
    hopper::Barrier* full = &shared.full[stage];
    constexpr int kBytes = sizeof(KeyTile), kValueBytes = kKeys * kWidth * 2, kOwnBytes = sizeof(OwnTile);
    hopper::barrier_arrive_expecting(full, kBytes + (with_values ? kValueBytes : 0) + (k == 0 ? kOwnBytes : 0));
    if (with_values)
        hopper::load_box(shared.values[stage], tiles.values, tiles.head * kWidth, tiles.first_token(k), full);
    hopper::load_bytes(&shared.keys[stage], &tiles(k).keys, kBytes, full);
    if (k == 0) hopper::load_bytes(&shared.own, &tiles.own(), kOwnBytes, full);
}

struct Problem {
    CUtensorMap values, results;  // V and o, [tokens, heads D]
    AttentionForward<bf16> p;
    const StoredTile* tiles;
    int sequences, together;  // (sequence, head) pairs whose V stays in L2 together
};

// Blocks start in the order x, y, z: within the pairs that stay together, those with the longest rows come first.
__global__ void __launch_bounds__(kThreads, tuning::kAttentionForwardSm90Blocks)
    attention_forward_sm90_kernel(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const AttentionForward<bf16>& p = problem.p;
    const int pair = static_cast<int>(blockIdx.z) * problem.together + static_cast<int>(blockIdx.x);
    const int sequence = pair / p.heads, head = pair % p.heads, of_sequence = static_cast<int>(gridDim.y);
    const int in_sequence = of_sequence - 1 - static_cast<int>(blockIdx.y);  // in tiles
    if (sequence >= problem.sequences) return;
    const int first = (sequence * of_sequence + in_sequence) * kQueries;
    const float faded = p.skip ? kFaded : INFINITY;
    const auto counts = [=](float reach, float least) { return !(reach - least < -faded); };
    const Tiles& tiles = shared.tiles;
    const References& of = shared.own.of;
    const bool loads = threadIdx.x == 0;
    float least = 0.f;  // of the tile that is asked for next, thread 0
    if (loads) {
        const int count = p.causal ? in_sequence + 1 : of_sequence;
        shared.tiles = {
            problem.tiles + head, &problem.values, p.heads, head, sequence * of_sequence + count - 1, count, first};
        for (int i = 0; i < kStages; ++i)
            hopper::barrier_init(&shared.full[i], 1), hopper::barrier_init(&shared.empty[i], kWarps);
        hopper::barrier_init_done();
    }
    static_assert(sizeof(shared.ones) == kThreads * sizeof(uint4));
    reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] = {kTwoOnes, kTwoOnes, kTwoOnes, kTwoOnes};
    shared.sum[threadIdx.x] = 0.f;
    hopper::publish_shared();
    __syncthreads();
    if (loads) {
        wait_for_previous();  // the factors; what other threads read is older
        // Causal: no query is far from itself; otherwise there is no gate. The second tile's values come in any case, too:
        // whether they count would have to be waited for.
        load(shared, 0, true);
        if (tiles.count > 1) load(shared, 1, true);
        if (tiles.count > 2) least = tiles.least(2);
    }
    Queries queries(shared);
    int k = 0, stage = 0, parity = 0;  // the tile, its place in the ring
    const auto tile = [&] {            // its numbers, when it is there
        hopper::barrier_wait(&shared.full[stage], parity);
        return *reinterpret_cast<const float4*>(&shared.keys[stage].centre);
    };
    const auto ask = [&] {  // for the tile after the next
        if (!loads || k + 2 >= tiles.count) return;
        const bool with_values = counts(of.reach, least);
        if (k + 3 < tiles.count) least = tiles.least(k + 3);
        load(shared, k + 2, with_values);
    };
    const auto done = [&] {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) hopper::barrier_arrive(&shared.empty[stage]);
        if (++stage == kStages) stage = 0, parity ^= 1;
        ++k;
    };
    const auto bounded = [&](const float4& of_tile) {
        return of.bounded && -beyond(of_tile.z, of.gate) <= kGateRange && of_tile.w <= kTileSpread;
    };
    if (p.causal) {
        const float4 of_tile = tile();
        if (bounded(of_tile)) {
            ask();
            queries.add_diagonal(stage, Powers(of, of_tile));
            done();
        }
    }
    if (!p.causal || k > 0) {  // a loop of its own: products in a row want that nothing else changes their sums in it
#pragma unroll 1
        for (; k < tiles.count; done()) {
            const float4 of_tile = tile();
            const bool seen = counts(of.reach, of_tile.z);
            if (seen && !bounded(of_tile)) break;
            ask();
            if (seen) queries.add(stage, Powers(of, of_tile));
        }
    }
    const bool careful = k < tiles.count;
    if (careful) {
        queries.begin_carefully(p, tiles.head, tiles.first, k > 0);
#pragma unroll 1
        for (; k < tiles.count; done()) {
            ask();
            if (counts(of.reach, tile().z))
                queries.add_carefully(p, tiles.head, stage, tiles.first_token(k), p.causal && k == 0);
        }
    }
    queries.finish(p, tiles.head, tiles.first, careful);
    hopper::publish_shared();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
            const int row = Queries::row(m, 0);  // of lane 0: the warp's first of the product
            hopper::store_box(&problem.results, tiles.head * kWidth, tiles.first + row,
                              shared.values[0] + row * kWidth);
        }
        hopper::store_wait();
    }
}

}  // namespace

bool attention_forward_sm90_takes(const Cuda& device, const AttentionForward<bf16>& p) {
    return device.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth && p.scalars == 1 && p.window == 0 &&
           p.seq.length > 0 && p.seq.length % kQueries == 0 &&
           p.scratch.size >= attention_forward_scratch_elements(p.v.rows, p.heads, 1) &&
           reinterpret_cast<std::uintptr_t>(p.scratch.data) % alignof(StoredTile) == 0;
}

void attention_forward_sm90(const Cuda& device, const AttentionForward<bf16>& p) {
    constexpr int kBytes = offsetof(Shared, empty) + sizeof(Shared::empty);  // sizeof() ends at a multiple of 1024
    static_assert(tuning::kAttentionForwardSm90Blocks * (kBytes + 1024) <= 227 * 1024);
    const auto map = [](const auto& m, cuuint32_t rows) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, rows});
    };
    auto* tiles = reinterpret_cast<StoredTile*>(p.scratch.data);
    const dim3 grid(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.seq.tokens / kKeys));
    attention_factors_kernel<<<grid, kKeys, 0, stream_of(device)>>>(p, tiles);
    LAUNCH_CHECK("attention_factors");
    // As Order::of of the other architectures.
    const std::int64_t pairs = std::int64_t(p.seq.count) * p.heads;
    const std::int64_t fitting = attention_forward_tile::kResident / (std::int64_t(p.seq.length) * kWidth * 2);
    const Problem problem{map(p.v, kKeys), map(p.o, 16), p,
                          tiles,           p.seq.count,  static_cast<int>(std::clamp<std::int64_t>(fitting, 1, pairs))};
    const dim3 blocks(static_cast<unsigned>(problem.together), static_cast<unsigned>(p.seq.length / kQueries),
                      static_cast<unsigned>(ceil_div(pairs, std::int64_t(problem.together))));
    CUDA_CHECK(
        cudaFuncSetAttribute(attention_forward_sm90_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    launch_dependent(attention_forward_sm90_kernel, blocks, kThreads, kBytes, stream_of(device), problem);
    LAUNCH_CHECK("attention_forward_sm90");
}

}  // namespace fiedler
