// kernels/dot_forward_sm90.cuh: the forward pass of dot.h for sm_90a (kernel; launched by dot_sm90.cu). Rows are queries.
//
//     S = Q K'   A: Q; B: K, rows of D, as it lies            O += P V   A: P, rounded; B: V as it lies
//
// Causal: latest keys first. The scores of a tile are asked for together with the product of the weights before it, which
// goes on behind the tile's softmax.
#pragma once
#include "kernels/dot_sm90.cuh"

namespace fiedler::dot_sm90_tile {

// Softmax state of a thread's two rows.
struct Softmax {
    float largest[2] = {-INFINITY, -INFINITY};  // raw score
    float sum[2] = {0.f, 0.f};                  // this thread's share

    // Scores become weights relative to the rows' largest score so far; decay: what earlier sums are multiplied by.
    __device__ void add(Sums& s, float (&decay)[2], float scale2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = largest[r];
#pragma unroll
            for (int n = 0; n < 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            top = dot::quad_max(top);
            const float shift = top == -INFINITY ? 0.f : top * scale2;  // never -inf - (-inf)
            decay[r] = exp2_fast(fmaf(largest[r], scale2, -shift));
            largest[r] = top;
            float of_tile = 0.f;
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    s[n][e] = exp2_fast(fmaf(s[n][e], scale2, -shift));
                    of_tile += s[n][e];
                }
            sum[r] = fmaf(sum[r], decay[r], of_tile);
        }
    }
};

struct ForwardMaps {
    CUtensorMap queries[1], columns[2];  // Q; K, V
};

template <int kGroups, int kBlocks>
struct ForwardShape {
    static constexpr int kThreads = kGroups * kGroupThreads;
    using Memory = Shared<kGroups, 1, kBlocks == 1 ? 6 : 5, false>;
};

template <int kGroups, int kBlocks>
__global__ void __launch_bounds__(kGroups* kGroupThreads, kBlocks)
    dot_forward_sm90_kernel(const DotForward<bf16> p, const Cut cut, const __grid_constant__ ForwardMaps maps) {
    using Memory = typename ForwardShape<kGroups, kBlocks>::Memory;
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Memory*>(memory);
    const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
    const Stream stream = Stream::of<kGroups, false>(cut, group);
    shared.begin(stream.groups);
    if (group >= stream.groups) return;
    Loader<Memory> loader{shared, maps.columns, stream};
    if (threadIdx.x == 0) shared.load_own(maps.queries, stream, stream.rows);
    loader.load_until(Memory::kStages);
    __syncwarp();
    const Operand keys = operand_of(shared.stages[0][0]), values = operand_of(shared.stages[0][1]);
    const float scale2 = p.scale * kLog2e;

    hopper::barrier_wait(&shared.own_full, 0);
    Operands q, w;  // queries, weights
    shared.take_own(q, 0);
    for (int k = 0; k < stream.skipped; ++k) shared.release(k);
    Ring<Memory::kStages> ring(stream.skipped);
    hopper::barrier_wait(&shared.full[ring.stage], 0);
    Sums s, o = {};
    pin(q);
    multiply_rows(s, q, advance(keys, ring.stage * 2 * kTileBytes));
    hopper::product_wait<0>();
    pin(s);
    if (cut.causal) hide<false>(s);
    Softmax softmax;
    float decay[2];
    softmax.add(s, decay, scale2);
    round_to_operands(w, s);
#pragma unroll 1
    for (int k = stream.skipped + 1; k < stream.count; ++k) {
        // Tile k - 1 is still in use; k - 2 may be by another warpgroup.
        loader.load_until(k + Memory::kStages - 2);
        __syncwarp();
        const int before = ring.stage;
        ring.step();
        hopper::barrier_wait(&shared.full[ring.stage], ring.parity);
        pin(q), pin(s), pin(w), pin(o);
        multiply_rows(s, q, advance(keys, ring.stage * 2 * kTileBytes));
        multiply_add(o, w, advance(values, before * 2 * kTileBytes));
        hopper::product_wait<1>();
        pin(s);
        softmax.add(s, decay, scale2);
        hopper::product_wait<0>();
        pin(o), pin(w);
        shared.release(before);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[n][e] *= decay[e / 2];
        round_to_operands(w, s);
    }
    pin(w), pin(o);
    multiply_add(o, w, advance(values, ring.stage * 2 * kTileBytes));
    hopper::product_wait<0>();
    pin(o);

    const int row = stream.rows + static_cast<int>(threadIdx.x) / kWarp % kGroupWarps * 16;  // the warp's first
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = dot::quad_sum(softmax.sum[r]);
        inverse[r] = 1.f / sum;
        const std::int64_t token = row + static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * r;
        if (threadIdx.x % 4 == 0) p.lse.data[token * p.lse.ld + stream.head] = softmax.largest[r] * p.scale + logf(sum);
    }
    dot::store_rows<kWidth>(p.o, stream.head, row, o, inverse, shared.own[0]);
}

}  // namespace fiedler::dot_sm90_tile
