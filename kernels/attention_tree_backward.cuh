// kernels/attention_tree_backward.cuh: one level's share of all four gradients. A block takes a tile of 64 positions:
// pairs of its keys (rows) and queries (columns) on the tensor cores, as kernels/attention_backward.cuh does,
//     dP' = V dO'      ds' = P' (dP' - delta)      dv += P' dO      da, db, dF: sums of ds along columns and rows
// and for the other tiles a query meets the states of keys, a key those of queries:
//     ds of all keys below = w (dO . S - delta n),  of all queries below = w (v . S - n),  S and n a state's vector and number
//
// Ties. In da and db a pair with a = b has the sign 0, so sums of the keys below must be of those strictly below. Only the
// entries at a tile's first and last scalar can have ties in other tiles. Where they do, a strict state is made of the
// state of the tile in which the run of ties begins (ends) and of that tile's entries outside the run.
#pragma once
#include "kernels/attention_tree_tile.cuh"

namespace fiedler::attention_tree {

struct Gradients {
    nv_bf16* dv;  // what the leaves give, then the result: column 0 of the group's first head
    std::int64_t lddv;
    float* sums;          // [group, tokens, D]: between (Touch)
    float *da, *db, *dF;  // [tokens, heads], of the group's first head; dF may be null
};

constexpr int kTileWarps = kTileThreads / kWarp;

// Blocks of a multiprocessor, the bound on registers: what nothing spills at.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr int kBackwardBlocks = 4;
#else
constexpr int kBackwardBlocks = 5;
#endif

template <int D>
struct BackwardShared {
    Rows<D> values, douts;
    Sides sides;
    State<D> all[4], strict[4];  // by part
    union {                      // by turns
        Members members[kTileWarps];
        float columns[kTileWarps][kTile];  // a warp's share of -da
    };
    float signed_rows[kTile], rows[kTile];  // sums of sign ds and ds of a key's pairs
    bool tied[2];                           // whether ties of the first, the last scalar are in other tiles
};

// The first of positions [lo, hi) whose scalar is not less than x (after: is greater than x), else hi.
__device__ inline int first_position(const Entry* order, int lo, int hi, float x, bool after) {
    while (lo < hi) {
        const int mid = (lo + hi) / 2;
        const float y = scalar_of(order[mid]);
        if (y < x || (after && y == x))
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

// A strict state for part `part`, by one warp.
template <int D>
__device__ void make_strict(BackwardShared<D>& shared, const Scene& s, const Node& node, const float2& bound, int head,
                            int slot, int start, int count, int part) {
    constexpr int kCount = Columns<D>::kCount;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, side = part % 2;
    State<D>& to = shared.strict[part];
    if (!shared.tied[side]) {
        for (int i = lane; i < D; i += kWarp) to.sum[i] = shared.all[part].sum[i];
        if (lane == 0) to.number = shared.all[part].number, to.scale = shared.all[part].scale;
        return;
    }
    // [from, to_end): the entries of tile `tile` beyond the run of ties.
    const Entry* order = s.order(head);
    const float x = side == 0 ? shared.sides.low : shared.sides.high;
    const int run = side == 0 ? first_position(order, node.lo, start, x, false)
                              : first_position(order, start + count, node.hi, x, true);
    const int inside = side == 0 ? run : run - 1;  // a position of the run
    const int tile = node.lo + (inside - node.lo) / kTile * kTile, its_slot = slot + (tile - start) / kTile;
    const int from = side == 0 ? tile : run, to_end = side == 0 ? run : min(tile + kTile, node.hi);
    const TileSum<D> own = sum_tile<D>(s, node, bound, head, part / 2, from, to_end, x, x, shared.members[part]);
    const float own_scale = side == 0 ? own.up_scale : own.down_scale;

    const std::int64_t row = s.row(part, head, its_slot);
    const float2 edges = s.edges_of(head, its_slot);
    const float before_scale = s.scales[row] - fabsf(x - (side == 0 ? edges.x : edges.y));
    const float scale = fmaxf(own_scale, before_scale);
    const float own_factor = exp_fast(own_scale - scale), before_factor = exp_fast(before_scale - scale);
    const float* before = s.states + row * (D + 4);
    if (lane < Columns<D>::kLanes) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const int column = lane * kCount + i;
            to.sum[column] = own_factor * (side == 0 ? own.up[i] : own.down[i]) + before_factor * before[column];
        }
    }
    if (lane != 0) return;
    to.number = own_factor * (side == 0 ? own.up_number : own.down_number) + before_factor * before[D];
    to.scale = scale;
}

// 16 keys of a warp, from row `first`, against all queries of the tile.
template <int D>
struct Pairs {
    BackwardShared<D>& shared;
    int first;
    float dv[D / 8][4], scalar[2], log_weight[2], signed_sum[2] = {}, sum[2] = {};

    __device__ Pairs(BackwardShared<D>& sh, int first_row) : shared(sh), first(first_row) {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) dv[n][0] = dv[n][1] = dv[n][2] = dv[n][3] = 0.f;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            scalar[k] = sh.sides.keys.scalar[row(k)], log_weight[k] = sh.sides.keys.log_weight[row(k)];
        }
    }
    __device__ int row(int k) const { return first + static_cast<int>(threadIdx.x) % kWarp / 4 + 8 * k; }

    // 16 queries, from `query`. dp[h][2 k + e]: row k, column 8 h + 2 t + e.
    __device__ void add_queries(int query) {
        float dp[2][4] = {};
        std::uint32_t a[4], b[4];
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            shared.values.rows_outside(a, first, 16 * k);
            shared.douts.columns_inside(b, query, 16 * k);
            mma_bf16(dp[0], a, b[0], b[1]);
            mma_bf16(dp[1], a, b[2], b[3]);
        }
        const Side& queries = shared.sides.queries;
        const int lane = static_cast<int>(threadIdx.x) % kWarp, t = lane % 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int j = query + 8 * h + 2 * t;
            float p[4], column[2] = {};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float x = queries.scalar[j + e], w = queries.log_weight[j + e], delta = queries.number[j + e];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float d = x - scalar[k], weight = exp_fast(log_weight[k] + w - fabsf(d));
                    const float ds = weight * (dp[h][2 * k + e] - delta);
                    const float signed_ds = d > 0.f ? ds : d < 0.f ? -ds : 0.f;
                    p[2 * k + e] = weight, sum[k] += ds, signed_sum[k] += signed_ds, column[e] += signed_ds;
                }
#pragma unroll
                for (int o = 4; o < kWarp; o *= 2) column[e] += __shfl_xor_sync(0xffffffffu, column[e], o);
            }
            a[2 * h] = pack_bf16(p[0], p[1]), a[2 * h + 1] = pack_bf16(p[2], p[3]);
            if (lane < 4) {
                float* to = shared.columns[first / 16] + j;
                to[0] = column[0], to[1] = column[1];
            }
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            shared.douts.rows_inside(b, query, 16 * n);
            mma_bf16(dv[2 * n], a, b[0], b[1]);
            mma_bf16(dv[2 * n + 1], a, b[2], b[3]);
        }
    }
    // The pairs' sums to shared memory, and dv, with what the queries of other tiles give, to its sums.
    __device__ void store(const Scene& s, const Gradients& out, int head) {
        const State<D>&below = shared.all[2], &above = shared.all[3];
        const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float signed_total = attention_tile::row_sum(signed_sum[k]), total = attention_tile::row_sum(sum[k]);
            if (row(k) >= shared.sides.keys.count) continue;
            if (t == 0) shared.signed_rows[row(k)] = signed_total, shared.rows[row(k)] = total;
            const float from_below = exp_fast(below.scale - (scalar[k] - shared.sides.low) + log_weight[k]);
            const float from_above = exp_fast(above.scale - (shared.sides.high - scalar[k]) + log_weight[k]);
            const int token = shared.sides.keys.token[row(k)];
            const SumRow<D> to{out.sums + (head * s.tokens + token) * D, out.dv + token * out.lddv + head * D,
                               s.level.of_key(token), s.level.node == 0};
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const int column = 8 * n + 2 * t;
                const float2 low = *reinterpret_cast<const float2*>(below.sum + column);
                const float2 high = *reinterpret_cast<const float2*>(above.sum + column);
                float2 x = to.read(column);
                x.x += fmaf(from_below, low.x, fmaf(from_above, high.x, dv[n][2 * k]));
                x.y += fmaf(from_below, low.y, fmaf(from_above, high.y, dv[n][2 * k + 1]));
                to.write(column, x);
            }
        }
    }
};

// ds of one row with all that a state holds. Two threads share a row: each takes half of the columns.
template <int D>
__device__ float ds_of_state(const nv_bf16* row, const State<D>& state, float log_weight, float number, bool is_key) {
    const int half = static_cast<int>(threadIdx.x) % 2 * (D / 2);
    float dot = 0.f;
#pragma unroll 2
    for (int i = 0; i < D / 2; i += 8) {
        const Pack<nv_bf16> x = load16(row + half + i);
#pragma unroll
        for (int k = 0; k < 8; ++k) dot = fmaf(to_float(x.v[k]), state.sum[half + i + k], dot);
    }
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    return exp_fast(state.scale + log_weight) * (dot - (is_key ? state.number : number * state.number));
}

// da, db and dF: thread pairs 0 to 63 take the keys, then the queries.
template <int D>
__device__ void add_scalars(const BackwardShared<D>& shared, const Scene& s, const Gradients& out, int head) {
    const Sides& sides = shared.sides;
    const int pair = static_cast<int>(threadIdx.x) / 2;
    const bool key = pair < sides.keys.count;
    const int place = key ? pair : pair - sides.keys.count;
    const bool valid = key || place < sides.queries.count;
    const Side& side = key ? sides.keys : sides.queries;
    const int at = valid ? place : 0;  // of no use, but there, where nothing is
    const nv_bf16* row = (key ? shared.values.data : shared.douts.data) + at * Rows<D>::kStride;
    const float x = side.scalar[at], number = side.number[at];
    const float low = side.log_weight[at] - (x - sides.low), high = side.log_weight[at] - (sides.high - x);
    const int part = key ? 2 : 0;  // a key meets queries, a query keys
    const State<D>&below = shared.all[part], &above = shared.all[part + 1];
    const bool low_tie = shared.tied[0] && x == sides.low, high_tie = shared.tied[1] && x == sides.high;
    // All lanes take part in the sums over two lanes.
    const float ds_below = ds_of_state<D>(row, below, low, number, key);
    const float ds_above = ds_of_state<D>(row, above, high, number, key);
    float strict_below = ds_below, strict_above = ds_above;
    if (shared.tied[0]) {
        const float ds = ds_of_state<D>(row, shared.strict[part], low, number, key);
        if (low_tie) strict_below = ds;
    }
    if (shared.tied[1]) {
        const float ds = ds_of_state<D>(row, shared.strict[part + 1], high, number, key);
        if (high_tie) strict_above = ds;
    }
    if (!valid || threadIdx.x % 2 != 0) return;
    const std::int64_t to = side.token[at] * std::int64_t(s.heads) + head;
    if (key) {
        out.db[to] += shared.signed_rows[at] + (strict_above - strict_below);
        if (out.dF != nullptr) out.dF[to] -= shared.rows[at] + (ds_below + ds_above);
    } else {
        float pairs = 0.f;
        for (int w = 0; w < kTileWarps && 16 * w < sides.keys.count; ++w) pairs += shared.columns[w][at];
        out.da[to] -= pairs + (strict_below - strict_above);
    }
}

// Grid: tiles, heads.
template <int D>
__global__ void __launch_bounds__(kTileThreads, D == 128 ? 3 : kBackwardBlocks)
    attention_tree_backward_kernel(Scene s, Gradients out) {
    __shared__ BackwardShared<D> shared;
    const int slot = blockIdx.x, head = blockIdx.y, warp = static_cast<int>(threadIdx.x) / kWarp;
    const Block tile = s.tiles.at(slot);
    const int start = tile.start;
    if (start < 0) return;
    const Node node = s.level.at(start);
    if (!node.works()) return;
    const float2 bound = s.bounds_of(node, head, tile.sequence);
    const int count = min(kTile, node.hi - start);
    load_sides<true>(shared.sides, s, node, bound, head, start, count);
    const Side &keys = shared.sides.keys, &queries = shared.sides.queries;
    if (keys.count + queries.count == 0) return;
    shared.values.gather(s.payload<D>(0, head, 0), s.ldv, keys.token, keys.count);
    shared.douts.gather(s.payload<D>(1, head, 0), s.lddo, queries.token, queries.count);
    cp_async_commit();
#pragma unroll
    for (int part = 0; part < 4; ++part) shared.all[part].load(s, part, head, slot);
    if (threadIdx.x == 0) {
        const Entry* order = s.order(head);
        shared.tied[0] = start > node.lo && scalar_of(order[start - 1]) == shared.sides.low;
        shared.tied[1] = start + count < node.hi && scalar_of(order[start + count]) == shared.sides.high;
    }
    __syncthreads();
    if (shared.tied[0] || shared.tied[1]) {  // the same in all threads
        make_strict<D>(shared, s, node, bound, head, slot, start, count, warp);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (16 * warp < keys.count) {
        Pairs<D> pairs(shared, 16 * warp);
        for (int query = 0; query < queries.count; query += 16) pairs.add_queries(query);
        pairs.store(s, out, head);
    }
    __syncthreads();
    add_scalars<D>(shared, s, out, head);
}

// delta = dO . o, and zero gradients of the scalars, where no dense pass made them. Grid: tokens, heads.
struct Deltas {
    const nv_bf16 *dout, *o;
    std::int64_t lddo, ldo, tokens, heads;
    int width;
    float *delta, *da, *db;
};
__global__ void __launch_bounds__(256) attention_tree_delta_kernel(Deltas p) {
    const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.tokens) return;
    const int head = blockIdx.y;
    const nv_bf16 *g = p.dout + i * p.lddo + head * p.width, *o = p.o + i * p.ldo + head * p.width;
    float sum = 0.f;
    for (int k = 0; k < p.width; k += 8) {
        const Pack<nv_bf16> x = load16(g + k), y = load16(o + k);
#pragma unroll
        for (int n = 0; n < 8; ++n) sum = fmaf(to_float(x.v[n]), to_float(y.v[n]), sum);
    }
    const std::int64_t at = i * p.heads + head;
    p.delta[at] = sum, p.da[at] = 0.f, p.db[at] = 0.f;
}

}  // namespace fiedler::attention_tree
