// kernels/attention_forward_sm90.cu: the forward pass of scalar-distance attention for sm_90a, one scalar; what a block
// does with its tiles is in attention_forward_sm90.cuh.
//
// A first kernel makes the factors of all keys. Then blocks stream tiles of keys, latest first, so that the queries' own
// tokens come before those that the gate may have closed: a thread asks TMA for values and factors two tiles ahead, into a
// ring of three stages; warps tell each other that a stage is free, and meet nowhere else but in their products.
#include "kernels/attention_forward_sm90.h"

#include "kernels/attention_forward_sm90.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
namespace {

using namespace attention_forward_sm90_tile;

__global__ void __launch_bounds__(kKeys) attention_factors_kernel(AttentionForward<bf16> p, KeyTile* tiles) {
    __shared__ float extremes[kKeys / kWarp][4];
    const int head = blockIdx.x;
    const std::int64_t token = std::int64_t(blockIdx.y) * kKeys + threadIdx.x;
    const float b = p.b.data[token * p.b.ld + head], F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
    const float of_lane[4] = {b, -b, F, -F};
#pragma unroll
    for (int i = 0; i < 4; ++i) extremes[threadIdx.x / kWarp][i] = from_ordered(largest_of_warp(of_lane[i]));
    __syncthreads();
    float most[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        most[i] = extremes[0][i];
        for (int w = 1; w < kKeys / kWarp; ++w) most[i] = fmaxf(most[i], extremes[w][i]);
    }
    const float centre = 0.5f * (most[0] - most[1]), gate = 0.5f * (most[2] - most[3]);
    const bool numbers = !__syncthreads_or(b != b || F != F);  // fmaxf lets NaN go
    KeyTile& tile = tiles[std::int64_t(blockIdx.y) * gridDim.x + head];
    const float apart = b - centre, above = gate - F, low = gate - (above + F);
    tile.factors[threadIdx.x] = {exp_of_sum(above, apart, low), exp_of_sum(above, -apart, low)};
    if (threadIdx.x == 0) {
        tile.centre = centre, tile.gate = gate, tile.least = numbers ? -most[3] : NAN;
        tile.spread = numbers ? 0.5f * (most[0] + most[1]) + 0.5f * (most[2] + most[3]) : NAN;
    }
}

// The tiles of keys that a block sees, in its order: number k is `last` - k of the token axis.
struct Tiles {
    const KeyTile* data;  // of the head and the token axis' first tile
    const CUtensorMap* values;
    int heads, head, last, count;

    __device__ const KeyTile& operator()(int k) const { return data[std::int64_t(last - k) * heads]; }
    __device__ int first_token(int k) const { return (last - k) * kKeys; }
    // Thread 0: tile k is on its way; without values where nothing of it counts.
    __device__ void load(Shared& shared, int k, bool with_values) const {
        const int stage = k % kStages;
        if (k >= kStages) hopper::barrier_wait(&shared.empty[stage], (k / kStages - 1) & 1);
        hopper::Barrier* full = &shared.full[stage];
        constexpr int kBytes = sizeof(KeyTile), kValueBytes = kKeys * kWidth * 2;
        hopper::barrier_arrive_expecting(full, with_values ? kBytes + kValueBytes : kBytes);
        if (with_values) hopper::load_box(shared.values[stage], values, head * kWidth, first_token(k), full);
        hopper::load_bytes(&shared.keys[stage], &(*this)(k), kBytes, full);
    }
};

__device__ void begin(Shared& shared) {
    constexpr std::uint32_t kOnes = 0x3f803f80u;
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(shared.ones) / 4); i += kThreads)
        reinterpret_cast<std::uint32_t*>(shared.ones)[i] = kOnes;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i)
            hopper::barrier_init(&shared.full[i], 1), hopper::barrier_init(&shared.empty[i], kWarps);
        hopper::barrier_init_done();
    }
    hopper::publish_shared();
}

struct Problem {
    CUtensorMap values, results;  // V and o, [tokens, heads D]
    AttentionForward<bf16> p;
    const KeyTile* tiles;
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
    const Numbers of_thread(p, head, first);
    Tiles tiles{problem.tiles + head, &problem.values, p.heads, head, 0, p.causal ? in_sequence + 1 : of_sequence};
    tiles.last = sequence * of_sequence + tiles.count - 1;
    static_assert(kQueries == kKeys);
    begin(shared);
    const bool loads = threadIdx.x == 0;
    if (loads) tiles.load(shared, 0, true);  // causal: no query is far from itself; otherwise there is no gate
    refer(shared, of_thread);
    const References& of = shared.references[threadIdx.x / kWarp];
    const float faded = p.skip ? kFaded : INFINITY;
    const auto counts = [&](float least) { return !(of.reach - least < -faded); };
    float least = 0.f;  // of the tile that is asked for next, thread 0
    if (loads) {
        if (tiles.count > 1) tiles.load(shared, 1, counts(tiles(1).least));
        if (tiles.count > 2) least = tiles(2).least;
    }
    Queries queries(shared, of.centre);
    bool careful = false;
    int stage = 0, parity = 0;
#pragma unroll 1
    for (int k = 0; k < tiles.count; ++k) {
        if (loads && k + 2 < tiles.count) {
            const bool with_values = counts(least);
            if (k + 3 < tiles.count) least = tiles(k + 3).least;
            tiles.load(shared, k + 2, with_values);
        }
        hopper::barrier_wait(&shared.full[stage], parity);
        const float4 of_tile = *reinterpret_cast<const float4*>(&shared.keys[stage].centre);
        if (counts(of_tile.z)) {
            const bool out = !of.bounded || !(of.gate - of_tile.z <= kGateRange) || !(of_tile.w <= kTileSpread);
            const bool diagonal = p.causal && k == 0;
            if (!careful && out) {
                queries.begin_carefully(of, k > 0);
                careful = true;
            }
            if (careful)
                queries.add_carefully(p, head, stage, tiles.first_token(k), diagonal);
            else if (diagonal)
                queries.add_diagonal(stage, of.factors(of_tile));
            else
                queries.add(stage, of.factors(of_tile));
        }
        queries.wait();
        if (threadIdx.x % kWarp == 0) hopper::barrier_arrive(&shared.empty[stage]);
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    queries.finish(p, of, head, first, careful);
    hopper::publish_shared();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
            const int row = Queries::row(m, 0);  // of lane 0: the warp's first of the product
            hopper::store_box(&problem.results, head * kWidth, first + row, shared.results + row * kWidth);
        }
        hopper::store_wait();
    }
}

}  // namespace

bool attention_forward_sm90_takes(const Cuda& device, const AttentionForward<bf16>& p) {
    return device.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth && p.scalars == 1 && p.window == 0 &&
           p.seq.length > 0 && p.seq.length % kQueries == 0 &&
           p.scratch.size >= attention_forward_scratch_elements(p.v.rows, p.heads);
}

void attention_forward_sm90(const Cuda& device, const AttentionForward<bf16>& p) {
    constexpr int kBytes = sizeof(Shared);
    static_assert(tuning::kAttentionForwardSm90Blocks * (kBytes + 1024) <= 227 * 1024);
    const auto map = [](const auto& m, cuuint32_t rows) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, rows});
    };
    auto* tiles = reinterpret_cast<KeyTile*>(p.scratch.data);
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
    attention_forward_sm90_kernel<<<blocks, kThreads, kBytes, stream_of(device)>>>(problem);
    LAUNCH_CHECK("attention_forward_sm90");
}

}  // namespace fiedler
