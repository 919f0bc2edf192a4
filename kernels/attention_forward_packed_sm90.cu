// kernels/attention_forward_packed_sm90.cu: the forward pass of scalar-distance attention for sm_90a, several scalars; what a
// block does with its tiles is in attention_forward_packed_sm90.cuh.
//
// A first kernel packs all keys.
#include "kernels/attention_forward_packed_sm90.h"

#include "kernels/attention_forward_packed_sm90.cuh"

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
    if constexpr (kTurned<R>)
#pragma unroll
        for (int r = 0; r < R; r += 2) turn_scalars(b[r], b[r + 1]);
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

// What a block must know of its queries, a thread for each, from what global memory has of its query; ends without a
// barrier.
template <int R>
__device__ void note_queries(Shared<R>& shared, const float (&a)[R], const float (&b)[R], float F) {
    const int query = threadIdx.x;
    float own = 0.f, spread = 0.f;
#pragma unroll
    for (int r = 0; r < R; r += 2) {
        own += fabsf(a[r] - b[r]);
        own += fabsf(a[r + 1] - b[r + 1]);
        spread = fmaxf(spread, fmaxf(fabsf(a[r]), fabsf(a[r + 1])));
        float x = packed_number(a[r]), y = packed_number(a[r + 1]);
        if constexpr (kTurned<R>) turn_scalars(x, y);
        shared.packed[query][r / 2] = pack_half(x, y);
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

// What attend() asks for (attention_forward_tile_sm90.cuh).
template <int R>
struct Way {
    using Shared = attention_forward_packed_sm90_tile::Shared<R>;
    using Queries = attention_forward_packed_sm90_tile::Queries<R>;
    using Numbers = float2;  // largest and least gate
    static constexpr int kOwnBytes = 0;
    static constexpr bool kLooksAhead = true;
    static __device__ References of(std::uint32_t base) {
        const float4 x = hopper::load_four<offsetof(Shared, of)>(base);
        return {x.x, x.y, __float_as_int(x.z)};
    }
    static __device__ const KeyTile<R>& keys(const KeyTile<R>& tile) { return tile; }
    static __device__ Numbers numbers(std::uint32_t base, int stage) {
        using Keys = KeyTile<R>;
        const std::uint32_t of_tile = base + stage * unsigned(sizeof(Keys));
        return {__uint_as_float(hopper::load_word<offsetof(Shared, keys) + offsetof(Keys, most)>(of_tile)),
                __uint_as_float(hopper::load_word<offsetof(Shared, keys) + offsetof(Keys, least)>(of_tile))};
    }
    static __device__ float least(const Numbers& x) { return x.y; }
    static __device__ float least(const KeyTile<R>& x) { return x.least; }
    static __device__ bool bounded(const References& of, const Numbers& x) {
        return (of.bounded != 0) & (of.gate - x.y <= kGateRange<R>);
    }
    static __device__ float by(const References& of, const Numbers& x) { return (of.gate - x.x) * kLog2e; }
    static __device__ void begin_carefully(Queries& queries, const AttentionForward<bf16>&, const Tiles<KeyTile<R>>&,
                                           bool summed) {
        queries.begin_carefully(summed);
    }
};

// Blocks start as those of attention_forward_sm90.cu do.
template <int R>
__global__ void __launch_bounds__(kThreads, tuning::kAttentionForwardPackedSm90Blocks)
    attention_forward_packed_sm90_kernel(const __grid_constant__ ForwardProblem<KeyTile<R>> problem) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<R>*>(memory);
    const AttentionForward<bf16>& p = problem.p;
    const int pair = static_cast<int>(blockIdx.z) * problem.together + static_cast<int>(blockIdx.x);
    const int sequence = pair / p.heads, head = pair % p.heads, of_sequence = static_cast<int>(gridDim.y);
    const int in_sequence = of_sequence - 1 - static_cast<int>(blockIdx.y);  // in tiles
    if (sequence >= problem.sequences) return;
    const int first = (sequence * of_sequence + in_sequence) * kQueries;
    const float faded = p.skip ? kFaded : INFINITY;
    const bool loads = threadIdx.x == 0;
    const std::int64_t token = first + static_cast<int>(threadIdx.x);
    float a[R], b[R], least = 0.f;  // a, b and F are on their way while barriers and the first tiles are seen to
    load_scalars(a, p.a, token, head, p.scalars);
    load_scalars(b, p.b, token, head, p.scalars);
    const float F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
    if (loads) {
        const int count =
            begin_tiles<Way<R>>(shared, problem, head, first, sequence * of_sequence, in_sequence, of_sequence);
        least = load_first<Way<R>>(shared, count);
    }
    static_assert(sizeof(shared.ones) == kThreads * sizeof(uint4));
    reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] = {kTwoOnes, kTwoOnes, kTwoOnes, kTwoOnes};
    note_queries(shared, a, b, F);
    hopper::publish_shared();
    __syncthreads();
    if (loads) shared.of = references_of(shared);
    __syncthreads();
    attend<Way<R>>(shared, problem, loads, least, faded);
}

template <int R>
void launch_for(const Cuda& device, const AttentionForward<bf16>& p) {
    launch<Way<R>, tuning::kAttentionForwardPackedSm90Blocks>(device, p, reinterpret_cast<KeyTile<R>*>(p.scratch.data),
                                                              attention_pack_kernel<R>,
                                                              attention_forward_packed_sm90_kernel<R>);
}

}  // namespace

bool attention_forward_packed_sm90_takes(const Cuda& device, const AttentionForward<bf16>& p) {
    return p.scalars >= 2 && p.scalars <= 8 && takes(device, p, alignof(KeyTile<8>));
}

void attention_forward_packed_sm90(const Cuda& device, const AttentionForward<bf16>& p) {
    attention_tile::with_padded_scalars(p.scalars,
                                        [&](auto scalars) { launch_for<decltype(scalars)::value>(device, p); });
}

}  // namespace fiedler
