// kernels/dot_backward_sm90.cuh: the two passes of the backward pass of dot.h for sm_90a (kernel; launched by dot_sm90.cu).
//
// Rows are queries (x = Q, y = dO; columns K, V) for dq, or keys (x = K, y = V; columns Q, dO) for dk and dv:
//     S = x X', dP = y Y'     A: the rows' own, in shared memory; B: the columns, rows of D, as they lie
//     first += dS X           A: dS, rounded;   B: X as it lies          (dq or dk)
//     second += P Y           A: P, rounded;    B: Y as it lies          (dv)
// dP goes on behind the weights of a tile, second behind its dS; S and dP of the next tile are asked for at once after
// the last product of a tile.
#pragma once
#include "kernels/dot_sm90.cuh"

namespace fiedler::dot_sm90_tile {

struct BackwardMaps {
    CUtensorMap rows[2], columns[2];  // x, y; X, Y
};

template <int kGroups, bool kKeyRows>
struct BackwardShape {
    static constexpr int kThreads = kGroups * kGroupThreads;
    using Memory = Shared<kGroups, 2, 5, kKeyRows>;
};

// lse in base 2 and delta of the queries: of the thread's rows, or of two columns.
struct Numbers {
    float lse2[2], delta[2];
};
__device__ inline Numbers of_rows(const DotBackward<bf16>& p, int head, int first) {
    Numbers x;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const std::int64_t token = first + static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * r;
        x.lse2[r] = p.lse.data[token * p.lse.ld + head] * kLog2e;
        x.delta[r] = p.delta.data[token * p.delta.ld + head];
    }
    return x;
}
// numbers: [lse, delta][column]; n: which 8 columns.
__device__ inline float2 pair_of(const float* numbers, int n) {
    return *reinterpret_cast<const float2*>(numbers + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2);
}

// Scores to weights.
template <bool kKeyRows>
__device__ void weigh(Sums& s, const Numbers& mine, const float (&numbers)[2][kTile], float scale2) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        float lse2[2] = {mine.lse2[0], mine.lse2[1]};
        if constexpr (kKeyRows) {
            const float2 x = pair_of(numbers[0], n);
            lse2[0] = x.x * kLog2e, lse2[1] = x.y * kLog2e;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = exp2_fast(fmaf(s[n][e], scale2, -lse2[kKeyRows ? e % 2 : e / 2]));
    }
}
// dP to dS, with weights w.
template <bool kKeyRows>
__device__ void differentiate(Sums& dp, const Sums& w, const Numbers& mine, const float (&numbers)[2][kTile]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        float delta[2] = {mine.delta[0], mine.delta[1]};
        if constexpr (kKeyRows) {
            const float2 x = pair_of(numbers[1], n);
            delta[0] = x.x, delta[1] = x.y;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) dp[n][e] = w[n][e] * (dp[n][e] - delta[kKeyRows ? e % 2 : e / 2]);
    }
}

template <int kGroups, bool kKeyRows>
__global__ void __launch_bounds__(kGroups* kGroupThreads, 1)
    dot_backward_sm90_kernel(const DotBackward<bf16> p, const Cut cut, const __grid_constant__ BackwardMaps maps) {
    using Memory = typename BackwardShape<kGroups, kKeyRows>::Memory;
    constexpr int kStageBytes = 2 * kTileBytes;
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Memory*>(memory);
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
    const Stream stream = Stream::of<kGroups, kKeyRows>(cut, group);
    shared.begin(stream.groups);
    if (group >= stream.groups) return;
    Loader<Memory> loader{shared, maps.columns, stream};
    if constexpr (kKeyRows) {
        const int column = static_cast<int>(threadIdx.x) % kTile;
        const bool is_lse = threadIdx.x < kTile;
        loader.ld = is_lse ? p.lse.ld : p.delta.ld;
        loader.number = (is_lse ? p.lse.data : p.delta.data) + column * loader.ld + stream.head;
    }
    if (threadIdx.x == 0) shared.load_own(maps.rows, stream, stream.rows);
    loader.load_until(Memory::kStages);
    __syncwarp();
    const Operand of_x = operand_of(shared.stages[0][0]), of_y = operand_of(shared.stages[0][1]);
    const int row = stream.rows + static_cast<int>(threadIdx.x) / kWarp % kGroupWarps * 16;  // the warp's first
    const float scale2 = p.scale * kLog2e;
    Numbers mine = {};
    if constexpr (!kKeyRows) mine = of_rows(p, stream.head, row);

    hopper::barrier_wait(&shared.own_full, 0);
    const Operand x = shared.own_operand(0, group), y = shared.own_operand(1, group);
    for (int k = 0; k < stream.skipped; ++k) shared.release(k);
    Ring<Memory::kStages> ring(stream.skipped);
    Sums s, dp, first = {};
    [[maybe_unused]] Sums second = {};
    Operands ds;
    [[maybe_unused]] Operands w;
    pin(first);
    if constexpr (kKeyRows) pin(second);
    int before = -1;  // the stage of the tile before
#pragma unroll 1
    for (int k = stream.skipped; k < stream.count; ++k) {
        const int stage = ring.stage;
        hopper::barrier_wait(&shared.full[stage], ring.parity);
        multiply_rows(s, x, advance(of_x, stage * kStageBytes));
        multiply_rows(dp, y, advance(of_y, stage * kStageBytes));
        hopper::product_wait<1>();  // all but dP
        pin(s), pin(first), pin(ds);
        if constexpr (kKeyRows) pin(second), pin(w);
        if (before >= 0) shared.release(before);
        // Tile k - 1 may be in use by another warpgroup.
        loader.load_until(k + Memory::kStages - 1);
        __syncwarp();
        const auto& numbers = shared.numbers[kKeyRows ? stage : 0];
        if (cut.causal && k == stream.skipped) hide<kKeyRows>(s);
        weigh<kKeyRows>(s, mine, numbers, scale2);
        if constexpr (kKeyRows) {
            round_to_operands(w, s);
            pin(w);
            multiply_add(second, w, advance(of_y, stage * kStageBytes));
            hopper::product_wait<1>();
        } else {
            hopper::product_wait<0>();
        }
        pin(dp);
        differentiate<kKeyRows>(dp, s, mine, numbers);
        round_to_operands(ds, dp);
        pin(ds), pin(s), pin(dp);
        multiply_add(first, ds, advance(of_x, stage * kStageBytes));
        before = stage;
        ring.step();
    }
    hopper::product_wait<0>();
    pin(first);
    const float scale[2] = {p.scale, p.scale};
    dot::store_rows<kWidth>(kKeyRows ? p.dk : p.dq, stream.head, row, first, scale, shared.own[0]);
    if constexpr (kKeyRows) {
        pin(second);
        const float one[2] = {1.f, 1.f};
        dot::store_rows<kWidth>(p.dv, stream.head, row, second, one, shared.own[1]);
    }
}

}  // namespace fiedler::dot_sm90_tile
