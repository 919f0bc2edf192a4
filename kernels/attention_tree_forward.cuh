// kernels/attention_tree_forward.cuh: one level's share of the outputs. A block takes a tile of 64 positions: for each of
// its queries the keys of the tile as pairs, on the tensor cores, those of all other tiles by their two states; and adds
// the sum to what the query has from the leaves and the levels below: sum_j exp(s_ij - top) v_j in f32, top and
// sum_j exp(s_ij - top).
#pragma once
#include "kernels/attention_tree_tile.cuh"

namespace fiedler::attention_tree {

struct Outputs {
    float* sums;      // [group, tokens, D]
    float2* weights;  // [group, tokens]: top, sum
    bool skip;
};

template <int D>
struct ForwardShared {
    Rows<D> values;
    Sides sides;
    State<D> below, above;
};

// The two queries of a thread, rows g and g + 8 of its warp's 16: their shares of the three parts and what they have.
template <int D>
struct Queries {
    const ForwardShared<D>& shared;
    int row[2];
    float scalar[2], log_weight[2], top[2], keep[2], below[2], above[2], sum[2], kept[2];
    bool adds[2];

    __device__ Queries(const ForwardShared<D>& sh, const float2* weights, int first, bool skip) : shared(sh) {
        const Side &keys = sh.sides.keys, &queries = sh.sides.queries;
        const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            row[k] = first + lane / 4 + 8 * k;
            adds[k] = row[k] < queries.count;
            scalar[k] = queries.scalar[row[k]], log_weight[k] = adds[k] ? queries.log_weight[row[k]] : 0.f;
            const float2 has = adds[k] ? weights[queries.token[row[k]]] : float2{0.f, 1.f};
            float best = kNone;
            for (int j = t; j < keys.count; j += 4)
                best = fmaxf(best, keys.log_weight[j] - fabsf(scalar[k] - keys.scalar[j]));
            best = attention_tile::row_max(best) + log_weight[k];
            const float low = sh.below.scale - (scalar[k] - sh.sides.low) + log_weight[k];
            const float high = sh.above.scale - (sh.sides.high - scalar[k]) + log_weight[k];
            top[k] = adds[k] ? fmaxf(fmaxf(has.x, best), fmaxf(low, high)) : 0.f;
            keep[k] = exp_fast(has.x - top[k]), below[k] = exp_fast(low - top[k]), above[k] = exp_fast(high - top[k]);
            if (!adds[k]) below[k] = above[k] = 0.f;
            kept[k] = keep[k] * has.y;
            sum[k] = below[k] * sh.below.number + above[k] * sh.above.number;
            const float most = sum[k] + static_cast<float>(keys.count) * exp_fast(best - top[k]);
            if (skip && most < 0x1p-24f * kept[k]) adds[k] = false;
        }
    }
    __device__ float weight(int k, float key_scalar, float key_weight) const {
        return exp_fast(key_weight + log_weight[k] - fabsf(scalar[k] - key_scalar) - top[k]);
    }
    // The pairs of 16 keys as an A operand; sums take the weights before they are rounded.
    __device__ void weigh(std::uint32_t (&a)[4], int key, float (&sums)[2]) const {
        const Side& keys = shared.sides.keys;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = key + 8 * half + 2 * (static_cast<int>(threadIdx.x) % 4);
            const float2 x = *reinterpret_cast<const float2*>(keys.scalar + j);
            const float2 w = *reinterpret_cast<const float2*>(keys.log_weight + j);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float p0 = weight(k, x.x, w.x), p1 = weight(k, x.y, w.y);
                sums[k] += p0 + p1;
                a[2 * half + k] = pack_bf16(p0, p1);
            }
        }
    }
};

template <int D>
__device__ void add_tile(const ForwardShared<D>& shared, const Outputs& out, std::int64_t base, int first) {
    Queries<D> q(shared, out.weights + base, first, out.skip);
    if (__ballot_sync(0xffffffffu, q.adds[0] || q.adds[1]) == 0) return;
    float acc[D / 8][4] = {}, pairs[2] = {};
    for (int key = 0; key < shared.sides.keys.count; key += 16) {
        std::uint32_t a[4], b[4];
        q.weigh(a, key, pairs);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            shared.values.rows_inside(b, key, 16 * n);
            mma_bf16(acc[2 * n], a, b[0], b[1]);
            mma_bf16(acc[2 * n + 1], a, b[2], b[3]);
        }
    }
    const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float sum = q.kept[k] + (q.sum[k] + attention_tile::row_sum(pairs[k]));
        if (!q.adds[k]) continue;
        const std::int64_t at = base + shared.sides.queries.token[q.row[k]];
        if (t == 0) out.weights[at] = {q.top[k], sum};
        float* to = out.sums + at * D;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const int column = 8 * n + 2 * t;
            const float2 low = *reinterpret_cast<const float2*>(shared.below.sum + column);
            const float2 high = *reinterpret_cast<const float2*>(shared.above.sum + column);
            float2 x = *reinterpret_cast<const float2*>(to + column);
            x.x = fmaf(x.x, q.keep[k], fmaf(q.below[k], low.x, fmaf(q.above[k], high.x, acc[n][2 * k])));
            x.y = fmaf(x.y, q.keep[k], fmaf(q.below[k], low.y, fmaf(q.above[k], high.y, acc[n][2 * k + 1])));
            *reinterpret_cast<float2*>(to + column) = x;
        }
    }
}

// Grid: tiles, heads.
template <int D>
__global__ void __launch_bounds__(kTileThreads) attention_tree_forward_kernel(Scene s, Outputs out) {
    __shared__ ForwardShared<D> shared;
    const int slot = blockIdx.x, head = blockIdx.y;
    const int start = s.tiles.at(slot).start;
    if (start < 0) return;
    const Node node = s.level.at(start);
    if (!node.works()) return;
    load_sides<false>(shared.sides, s, node, head, start, min(kTile, node.hi - start));
    if (shared.sides.queries.count == 0) return;
    shared.values.gather(s.payload<D>(0, head, 0), s.ldv, shared.sides.keys.token, shared.sides.keys.count);
    cp_async_commit();
    shared.below.load(s, 0, head, slot);
    shared.above.load(s, 1, head, slot);
    cp_async_wait<0>();
    __syncthreads();
    const int first = static_cast<int>(threadIdx.x) / kWarp * 16;
    if (first < shared.sides.queries.count) add_tile<D>(shared, out, head * s.tokens, first);
}

// F by heads (zero: no gate), and backward also lse and delta. Grid: tokens; a thread takes one token of all heads.
struct Numbers {
    const float *F, *lse, *delta;  // of the group's first head; null: absent
    std::int64_t heads, tokens;
    int group;
    float* gates;
    float2* query_ends;
};
__global__ void __launch_bounds__(256) attention_tree_numbers_kernel(Numbers p) {
    const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.tokens) return;
    for (int h = 0; h < p.group; ++h) {
        p.gates[h * p.tokens + i] = p.F == nullptr ? 0.f : p.F[i * p.heads + h];
        if (p.query_ends != nullptr)
            p.query_ends[h * p.tokens + i] = {p.lse[i * p.heads + h], p.delta[i * p.heads + h]};
    }
}

// Rows of bf16 and their sums in f32: eight columns a thread. Grid: tokens x D / 8, heads.
struct Rounded {
    nv_bf16* rows;  // column 0 of the group's first head
    std::int64_t ld, tokens;
    int width;
    float* sums;      // [group, tokens, D]
    float2* weights;  // [group, tokens]: top, sum; null: backward
    float* lse;       // of the group's first head
    std::int64_t heads;
    bool empty;  // there is nothing in rows and lse yet
};
__device__ inline bool place_of(const Rounded& p, std::int64_t& token, int& column) {
    const int parts = p.width / 8;
    const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    token = i / parts, column = static_cast<int>(i % parts) * 8;
    return token < p.tokens;
}
__global__ void __launch_bounds__(256) attention_tree_begin_kernel(Rounded p) {
    std::int64_t token;
    int column;
    if (!place_of(p, token, column)) return;
    const int head = blockIdx.y;
    float* to = p.sums + (head * p.tokens + token) * p.width + column;
    Pack<nv_bf16> x{};
    if (!p.empty) x = load16(p.rows + token * p.ld + head * p.width + column);
    Pack<float> low, high;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        low.v[k] = p.empty ? 0.f : to_float(x.v[k]), high.v[k] = p.empty ? 0.f : to_float(x.v[4 + k]);
    store16(to, low), store16(to + 4, high);
    if (p.weights != nullptr && column == 0)
        p.weights[head * p.tokens + token] = p.empty ? float2{kNone, 0.f} : float2{p.lse[token * p.heads + head], 1.f};
}
__global__ void __launch_bounds__(256) attention_tree_end_kernel(Rounded p) {
    std::int64_t token;
    int column;
    if (!place_of(p, token, column)) return;
    const int head = blockIdx.y;
    const float* from = p.sums + (head * p.tokens + token) * p.width + column;
    const Pack<float> low = load16(from), high = load16(from + 4);
    float2 weight = {0.f, 1.f};
    if (p.weights != nullptr) weight = p.weights[head * p.tokens + token];
    const float factor = 1.f / weight.y;
    Pack<nv_bf16> x;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        x.v[k] = from_float<nv_bf16>(low.v[k] * factor), x.v[4 + k] = from_float<nv_bf16>(high.v[k] * factor);
    store16(p.rows + token * p.ld + head * p.width + column, x);
    if (p.weights != nullptr && column == 0) p.lse[token * p.heads + head] = weight.x + logf(weight.y);
}

}  // namespace fiedler::attention_tree
