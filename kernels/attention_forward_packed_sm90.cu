// kernels/attention_forward_packed_sm90.cu: the forward pass of scalar-distance attention for sm_90a, several scalars; what a
// block does with its tiles is in attention_forward_packed_sm90.cuh.
//
// A first kernel packs all keys. Then blocks stream tiles of keys as those of attention_forward_sm90.cu do: latest first, a
// thread asks TMA for them two tiles ahead, into a ring of three stages; warps tell each other that a stage is free.
#include "kernels/attention_forward_packed_sm90.h"

#include "kernels/attention_forward_packed_sm90.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
namespace {

using namespace attention_forward_packed_sm90_tile;

// `to` = the numbers of scalars of a token and head; zeros beyond.
template <int R>
__device__ void load_scalars(float (&to)[R], const Mat<const float>& x, std::int64_t token, int head, int scalars) {
    load_numbers(to, x.data + token * x.ld + head * scalars, scalars, whole_scalars<R>(x.data, scalars));
}

// Makes a tile of `tiles`, of 128 tokens and a head.
template <int R>
__global__ void __launch_bounds__(kKeys) attention_pack_kernel(AttentionForward<bf16> p, KeyTile<R>* tiles) {
    dependents_may_start();
    __shared__ int extremes[kKeys / kWarp][3];
    const int head = blockIdx.x, thread = threadIdx.x;
    const std::int64_t token = std::int64_t(blockIdx.y) * kKeys + thread;
    float b[R];
    load_scalars(b, p.b, token, head, p.scalars);
    const float F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
    bool in_range = true;
#pragma unroll
    for (int r = 0; r < R; ++r) in_range &= packs(b[r]), b[r] = packed_number(b[r]);
    const float of_lane[3] = {F, -F, in_range ? 0.f : 1.f};
#pragma unroll
    for (int i = 0; i < 3; ++i) extremes[thread / kWarp][i] = largest_of_warp(of_lane[i]);
    __syncthreads();
    float most[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        int x = extremes[0][i];
#pragma unroll
        for (int w = 1; w < kKeys / kWarp; ++w) x = max(x, extremes[w][i]);
        most[i] = from_ordered(x);
    }
    KeyTile<R>& tile = tiles[std::int64_t(blockIdx.y) * gridDim.x + head];
    // Of two neighbours each writes half of the scalars of both.
    const bool odd = thread & 1;
    std::uint32_t two[R / 2];
#pragma unroll
    for (int r = 0; r < R / 2; ++r) {
        const float keep = odd ? b[r + R / 2] : b[r], send = odd ? b[r] : b[r + R / 2];
        const float other = __shfl_xor_sync(0xffffffffu, send, 1);
        two[r] = odd ? pack_half(other, keep) : pack_half(keep, other);
    }
    const int from = odd ? R / 2 : 0;
    std::uint32_t* to = &tile.packed[thread / 8][from / 4][thread % 8 / 2][from % 4];
    if constexpr (R == 8)
        *reinterpret_cast<uint4*>(to) = {two[0], two[1], two[2], two[3]};
    else if constexpr (R == 4)
        *reinterpret_cast<uint2*>(to) = {two[0], two[1]};
    else
        *to = two[0];
    tile.gate[thread] = (most[0] - F) * kLog2e;
    if (thread == 0) {
        tile.most = most[0];
        tile.least = most[2] > 0.f ? -INFINITY : most[0] == most[0] ? -most[1] : NAN;
    }
}

// What a block must know of its queries, a thread for each; ends without a barrier.
template <int R>
__device__ void note_queries(Shared<R>& shared, const AttentionForward<bf16>& p, int head, int first) {
    const int query = threadIdx.x;
    const std::int64_t token = first + query;
    float a[R], b[R];
    load_scalars(a, p.a, token, head, p.scalars);
    load_scalars(b, p.b, token, head, p.scalars);
    const float F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
    float own = 0.f, spread = 0.f;
#pragma unroll
    for (int r = 0; r < R; r += 2) {
        own += fabsf(a[r] - b[r]);
        own += fabsf(a[r + 1] - b[r + 1]);
        spread = fmaxf(spread, fmaxf(fabsf(a[r]), fabsf(a[r + 1])));
        shared.packed[query][r / 2] = pack_half(packed_number(a[r]), packed_number(a[r + 1]));
    }
    shared.gate[query] = F, shared.sum[query] = 0.f;
    const float of_lane[5] = {F, -F, spread, own, F + own};
#pragma unroll
    for (int i = 0; i < 5; ++i) shared.extremes[query / kWarp][i] = largest_of_warp(of_lane[i]);
}
template <int R>
__device__ References references_of(const Shared<R>& shared) {
    float most[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) {
        int x = shared.extremes[0][i];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) x = max(x, shared.extremes[w][i]);
        most[i] = from_ordered(x);
    }
    return {most[0], most[4],
            most[2] <= kPackedRange && most[3] <= kOwnDistance<R> && most[0] + most[1] <= kGateRange<R>};
}

// Thread 0: tile k is on its way; without values where nothing of it counts.
template <int R>
__device__ void load(Shared<R>& shared, int k, bool with_values) {
    const Tiles<R>& tiles = shared.tiles;
    const int stage = k % kStages;
    if (k >= kStages) hopper::barrier_wait(&shared.empty[stage], (k / kStages - 1) & 1);
    hopper::Barrier* full = &shared.full[stage];
    constexpr int kBytes = sizeof(KeyTile<R>), kValueBytes = kKeys * kWidth * 2;
    hopper::barrier_arrive_expecting(full, kBytes + (with_values ? kValueBytes : 0));
    if (with_values)
        hopper::load_box(shared.values[stage], tiles.values, tiles.head * kWidth, tiles.first_token(k), full);
    hopper::load_bytes(&shared.keys[stage], &tiles(k), kBytes, full);
}

template <int R>
struct Problem {
    CUtensorMap values, results;  // V and o, [tokens, heads D]
    AttentionForward<bf16> p;
    const KeyTile<R>* tiles;
    int sequences, together;  // (sequence, head) pairs whose V stays in L2 together
};

// Blocks start in the order x, y, z: within the pairs that stay together, those with the longest rows come first.
template <int R>
__global__ void __launch_bounds__(kThreads, tuning::kAttentionForwardPackedSm90Blocks)
    attention_forward_packed_sm90_kernel(const __grid_constant__ Problem<R> problem) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<R>*>(memory);
    const AttentionForward<bf16>& p = problem.p;
    const int pair = static_cast<int>(blockIdx.z) * problem.together + static_cast<int>(blockIdx.x);
    const int sequence = pair / p.heads, head = pair % p.heads, of_sequence = static_cast<int>(gridDim.y);
    const int in_sequence = of_sequence - 1 - static_cast<int>(blockIdx.y);  // in tiles
    if (sequence >= problem.sequences) return;
    const int first = (sequence * of_sequence + in_sequence) * kQueries;
    const float faded = p.skip ? kFaded : INFINITY;
    const auto counts = [=](float reach, float least) { return !(reach - least < -faded); };
    const Tiles<R>& tiles = shared.tiles;
    const References& of = shared.of;
    const bool loads = threadIdx.x == 0;
    float least = 0.f;  // of the tile that is asked for next, thread 0
    if (loads) {
        const int count = p.causal ? in_sequence + 1 : of_sequence;
        shared.tiles = {
            problem.tiles + head, &problem.values, p.heads, head, sequence * of_sequence + count - 1, count, first};
        for (int i = 0; i < kStages; ++i)
            hopper::barrier_init(&shared.full[i], 1), hopper::barrier_init(&shared.empty[i], kWarps);
        hopper::barrier_init_done();
        wait_for_previous();    // the packed keys; what else is read is older
        load(shared, 0, true);  // causal: no query is far from itself; otherwise there is no gate
        if (count > 1) load(shared, 1, true);
        if (count > 2) least = tiles.least(2);
    }
    static_assert(sizeof(shared.ones) == kThreads * sizeof(uint4));
    reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
    note_queries(shared, p, head, first);
    hopper::publish_shared();
    __syncthreads();
    if (loads) shared.of = references_of(shared);
    __syncthreads();
    Queries<R> queries(shared);
    int k = 0, stage = 0, parity = 0;  // the tile, its place in the ring
    const auto tile = [&] {            // its largest and least gate, when it is there
        hopper::barrier_wait(&shared.full[stage], parity);
        return *reinterpret_cast<const float2*>(&shared.keys[stage].most);
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
    const auto bounded = [&](const float2& of_tile) { return of.bounded && of.gate - of_tile.y <= kGateRange<R>; };
    const auto above = [&](const float2& of_tile) { return (of.gate - of_tile.x) * kLog2e; };
    if (p.causal) {
        const float2 of_tile = tile();
        if (bounded(of_tile)) {
            ask();
            queries.add_diagonal(stage, above(of_tile));
            done();
        }
    }
    if (!p.causal || k > 0) {  // a loop of its own: products in a row want that nothing else changes their sums in it
#pragma unroll 1
        for (; k < tiles.count; done()) {
            const float2 of_tile = tile();
            const bool seen = counts(of.reach, of_tile.y);
            if (seen && !bounded(of_tile)) break;
            ask();
            if (seen) queries.add(stage, above(of_tile));
        }
    }
    const bool careful = k < tiles.count;
    if (careful) {
        queries.begin_carefully(k > 0);
#pragma unroll 1
        for (; k < tiles.count; done()) {
            ask();
            if (counts(of.reach, tile().y))
                queries.add_carefully(p, tiles.head, stage, tiles.first_token(k), p.causal && k == 0);
        }
    }
    queries.finish(p, tiles.head, tiles.first, careful);
    hopper::publish_shared();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
            const int row = Queries<R>::row(m, 0);  // of lane 0: the warp's first of the product
            hopper::store_box(&problem.results, tiles.head * kWidth, tiles.first + row,
                              shared.values[0] + row * kWidth);
        }
        hopper::store_wait();
    }
}

template <int R>
void launch(const Cuda& device, const AttentionForward<bf16>& p) {
    constexpr int kBytes =
        offsetof(Shared<R>, empty) + sizeof(Shared<R>::empty);  // sizeof() ends at a multiple of 1024
    static_assert(tuning::kAttentionForwardPackedSm90Blocks * (kBytes + 1024) <= 227 * 1024);
    const auto map = [](const auto& m, cuuint32_t rows) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, rows});
    };
    auto* tiles = reinterpret_cast<KeyTile<R>*>(p.scratch.data);
    const dim3 grid(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.seq.tokens / kKeys));
    attention_pack_kernel<R><<<grid, kKeys, 0, stream_of(device)>>>(p, tiles);
    LAUNCH_CHECK("attention_pack");
    // As Order::of of the other architectures.
    const std::int64_t pairs = std::int64_t(p.seq.count) * p.heads;
    const std::int64_t fitting = attention_forward_tile::kResident / (std::int64_t(p.seq.length) * kWidth * 2);
    const Problem<R> problem{
        map(p.v, kKeys), map(p.o, 16), p,
        tiles,           p.seq.count,  static_cast<int>(std::clamp<std::int64_t>(fitting, 1, pairs))};
    const dim3 blocks(static_cast<unsigned>(problem.together), static_cast<unsigned>(p.seq.length / kQueries),
                      static_cast<unsigned>(ceil_div(pairs, std::int64_t(problem.together))));
    const auto kernel = attention_forward_packed_sm90_kernel<R>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    launch_dependent(kernel, blocks, kThreads, kBytes, stream_of(device), problem);
    LAUNCH_CHECK("attention_forward_packed_sm90");
}

}  // namespace

bool attention_forward_packed_sm90_takes(const Cuda& device, const AttentionForward<bf16>& p) {
    return device.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth && p.scalars >= 2 && p.scalars <= 8 &&
           p.window == 0 && p.seq.length > 0 && p.seq.length % kQueries == 0 && p.seq.tokens / kKeys < 65536 &&
           p.scratch.size >= attention_forward_scratch_elements(p.v.rows, p.heads, p.scalars) &&
           reinterpret_cast<std::uintptr_t>(p.scratch.data) % alignof(KeyTile<8>) == 0;
}

void attention_forward_packed_sm90(const Cuda& device, const AttentionForward<bf16>& p) {
    switch (attention_padded_scalars(p.scalars)) {
        case 2:
            return launch<2>(device, p);
        case 4:
            return launch<4>(device, p);
        default:
            return launch<8>(device, p);
    }
}

}  // namespace fiedler
