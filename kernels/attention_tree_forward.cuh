// kernels/attention_tree_forward.cuh: one level's share of the outputs. A block takes a tile of 64 positions: for each of
// its queries the keys of the tile as pairs, on the tensor cores, those of all other tiles by their two states; and adds
// the sum to what the query has from the leaves and the levels below: sum_j exp(s_ij - top) v_j in f32, top and
// sum_j exp(s_ij - top).
#pragma once
#include "kernels/attention_tree_tile.cuh"

namespace fiedler::attention_tree {

// o and lse hold what the leaves give, and then the results; sums and weights what is between (Touch).
struct Outputs {
    nv_bf16* o;  // column 0 of the group's first head
    std::int64_t ldo;
    float* lse;       // [tokens, heads], of the group's first head
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
    Touch touch[2];

    __device__ Queries(const ForwardShared<D>& sh, const Scene& s, const Outputs& out, int head, int first)
        : shared(sh) {
        const Side &keys = sh.sides.keys, &queries = sh.sides.queries;
        const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            row[k] = first + lane / 4 + 8 * k;
            adds[k] = row[k] < queries.count;
            scalar[k] = queries.scalar[row[k]], log_weight[k] = adds[k] ? queries.log_weight[row[k]] : 0.f;
            float2 has = {0.f, 1.f};
            if (adds[k]) {
                const int token = queries.token[row[k]];
                touch[k] = s.level.of_query(token);
                if (!touch[k].first)
                    has = out.weights[head * s.tokens + token];
                else
                    has = s.level.node == 0 ? float2{kNone, 0.f}
                                            : float2{out.lse[token * std::int64_t(s.heads) + head], 1.f};
            }
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
            // What is first but not last has to get to the sums, what is last but not first to the results.
            if (out.skip && touch[k].first == touch[k].last && most < 0x1p-24f * kept[k]) adds[k] = false;
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
__device__ void add_tile(const ForwardShared<D>& shared, const Scene& s, const Outputs& out, int head, int first) {
    Queries<D> q(shared, s, out, head, first);
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
        const std::int64_t token = shared.sides.queries.token[q.row[k]], at = head * s.tokens + token;
        const bool last = q.touch[k].last;
        if (t == 0) {
            if (last)
                out.lse[token * s.heads + head] = q.top[k] + logf(sum);
            else
                out.weights[at] = {q.top[k], sum};
        }
        const float factor = last ? 1.f / sum : 1.f, keep = q.keep[k] * factor;
        const float below = q.below[k] * factor, above = q.above[k] * factor;
        const SumRow<D> row{out.sums + at * D, out.o + token * out.ldo + head * D, q.touch[k], s.level.node == 0};
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const int column = 8 * n + 2 * t;
            const float2 low = *reinterpret_cast<const float2*>(shared.below.sum + column);
            const float2 high = *reinterpret_cast<const float2*>(shared.above.sum + column);
            float2 x = row.read(column);
            x.x = fmaf(x.x, keep, fmaf(below, low.x, fmaf(above, high.x, acc[n][2 * k] * factor)));
            x.y = fmaf(x.y, keep, fmaf(below, low.y, fmaf(above, high.y, acc[n][2 * k + 1] * factor)));
            row.write(column, x);
        }
    }
}

// Grid: tiles, heads.
template <int D>
__global__ void __launch_bounds__(kTileThreads) attention_tree_forward_kernel(Scene s, Outputs out) {
    __shared__ ForwardShared<D> shared;
    const int slot = blockIdx.x, head = blockIdx.y;
    const Block tile = s.tiles.at(slot);
    const int start = tile.start;
    if (start < 0) return;
    const Node node = s.level.at(start);
    if (!node.works()) return;
    const float2 bound = s.bounds_of(node, head, tile.sequence);
    load_sides<false>(shared.sides, s, node, bound, head, start, min(kTile, node.hi - start));
    if (shared.sides.queries.count == 0) return;
    shared.values.gather(s.payload<D>(0, head, 0), s.ldv, shared.sides.keys.token, shared.sides.keys.count);
    cp_async_commit();
    shared.below.load(s, 0, head, slot);
    shared.above.load(s, 1, head, slot);
    cp_async_wait<0>();
    __syncthreads();
    const int first = static_cast<int>(threadIdx.x) / kWarp * 16;
    if (first < shared.sides.queries.count) add_tile<D>(shared, s, out, head, first);
}

// F, lse and delta by heads, zero where there is none. Grid: tokens; a thread takes one token of all heads.
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
        p.query_ends[h * p.tokens + i] = {p.lse == nullptr ? 0.f : p.lse[i * p.heads + h],
                                          p.delta == nullptr ? 0.f : p.delta[i * p.heads + h]};
    }
}

}  // namespace fiedler::attention_tree
