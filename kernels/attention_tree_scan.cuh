// kernels/attention_tree_scan.cuh: decayed sums along the order of a node, tile by tile.
//
// A state is a sum over entries, of payloads times exp(log weight - distance), relative to exp(scale): a vector of D and a
// number. Keys bring v and 1 with the log weight F_e - F_j, e the last token of the node's first half; queries (backward)
// dO and delta with F_i - F_e - lse_i. Parts: 0 keys below, 1 keys above, 2 queries below, 3 queries above.
//   sums   a warp for each tile: its own entries, decayed to its far edge: upwards for the parts below, down for those above
//   scan   along the tiles of a node, exclusive: what a tile finds at its near edge, of all tiles before it
#pragma once
#include "kernels/attention_tile.cuh"
#include "kernels/attention_tree_plan.h"

namespace fiedler::attention_tree {

constexpr float kNone = -1e30f;  // the scale of an empty sum: finite, so that no difference of two is NaN
constexpr float kLead = 8.f;     // a sum keeps its scale until a term is e^8 times heavier: rescaling rounds
constexpr int kTileThreads = 128;

// What the kernels of one level and group of heads look at.
struct Scene {
    Level level;
    Blocks tiles, nodes;
    std::int64_t tokens;
    int group, heads, first_head;  // of the group, of all, the group's first
    const Entry* work;
    std::int64_t work_entries;  // of a head
    const float* gates;         // F [group, tokens]
    const float2* query_ends;   // lse, delta [group, tokens]; forward: lse of the leaf
    const float2* bounds;       // [group, nodes]: what a key, a query must reach to count; null: all count
    const nv_bf16 *v, *dout;    // column 0 of the group's first head
    std::int64_t ldv, lddo;
    float *states, *local_scales, *scales;  // [part, group, slots] rows of D + 4, and numbers
    float2* edges;                          // [group, slots]: scalars of a tile's first and last position

    __device__ const Entry* order(int head) const { return work + head * work_entries; }
    __device__ const float* gates_of(int head) const { return gates + head * tokens; }
    __device__ const float2* ends_of(int head) const { return query_ends + head * tokens; }
    __device__ float gate_at_half(const Node& node, int head) const {
        return level.node == 0 ? 0.f : gates_of(head)[node.mid - 1];
    }
    __device__ float2 bounds_of(const Node& node, int head, int sequence) const {
        if (bounds == nullptr) return {0.f, 0.f};
        const int begin = level.seq.first(node.lo);
        const int slot = nodes.slot(sequence, begin, static_cast<int>((node.lo - begin) / level.node));
        return bounds[head * std::int64_t(nodes.slots) + slot];
    }
    // Whether an entry with gate sum F (a query: with this lse) can matter. NaN does.
    __device__ bool counts(const float2& bound, bool query, float F, float lse) const {
        return bounds == nullptr || !((query ? bound.y + (F - lse) : bound.x - F) < 0.f);
    }
    __device__ std::int64_t row(int part, int head, int slot) const {
        return (part * std::int64_t(group) + head) * tiles.slots + slot;
    }
    __device__ float2& edges_of(int head, int slot) const { return edges[head * std::int64_t(tiles.slots) + slot]; }
    template <int D>
    __device__ const nv_bf16* payload(int role, int head, int token) const {
        return role == 0 ? v + token * ldv + head * D : dout + token * lddo + head * D;
    }
};

// Columns of a lane when a warp holds one row of D.
template <int D>
struct Columns {
    static constexpr int kCount = D >= kWarp ? D / kWarp : 1, kLanes = D / kCount;
};
template <int N>
__device__ void load_columns(float (&x)[N], const nv_bf16* from) {
    if constexpr (N == 1) {
        x[0] = to_float(*from);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const auto pair = *reinterpret_cast<const __nv_bfloat162*>(from + i);
            x[i] = __low2float(pair), x[i + 1] = __high2float(pair);
        }
    }
}

// The entries of a tile that a warp sums up.
struct alignas(16) Members {
    int token[kTile];
    float2 weight[kTile];  // in the sum upwards, in the sum downwards
};
template <int D>
struct TileSum {
    float up[Columns<D>::kCount], down[Columns<D>::kCount];  // the lane's columns
    float up_number, down_number, up_scale, down_scale;
};
// Entries of a role (0 keys, 1 queries) at positions [from, to), 64 at the most: upwards to scalar `high`, downwards to
// `low`. A warp.
template <int D>
__device__ TileSum<D> sum_tile(const Scene& s, const Node& node, const float2& bound, int head, int role, int from,
                               int to, float low, float high, Members& members) {
    constexpr int kCount = Columns<D>::kCount;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const float gate = s.gate_at_half(node, head);
    float up[2], down[2], number[2];
    int token[2], place[2], n = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int position = from + r * kWarp + lane;
        const Entry e = position < to ? s.order(head)[position] : 0;
        bool member = position < to && is_query(e) == (role != 0);
        token[r] = token_of(e), number[r] = 1.f, up[r] = down[r] = kNone;
        if (member) {
            const float F = s.gates_of(head)[token[r]], x = scalar_of(e);
            const float2 ends = role != 0 ? s.ends_of(head)[token[r]] : float2{0.f, 1.f};
            const float log_weight = role != 0 ? F - gate - ends.x : gate - F;
            member = s.counts(bound, role != 0, F, ends.x);
            if (member) number[r] = ends.y, up[r] = log_weight - (high - x), down[r] = log_weight - (x - low);
        }
        const unsigned mask = __ballot_sync(0xffffffffu, member);
        place[r] = member ? n + __popc(mask & ((1u << lane) - 1)) : -1;
        n += __popc(mask);
    }
    TileSum<D> sum;
    sum.up_scale = warp_max(fmaxf(up[0], up[1])), sum.down_scale = warp_max(fmaxf(down[0], down[1]));
    float up_number = 0.f, down_number = 0.f;
    __syncwarp();  // members may have been read until now
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (place[r] < 0) continue;
        const float2 w = {exp_fast(up[r] - sum.up_scale), exp_fast(down[r] - sum.down_scale)};
        members.token[place[r]] = token[r], members.weight[place[r]] = w;
        up_number = fmaf(w.x, number[r], up_number), down_number = fmaf(w.y, number[r], down_number);
    }
    sum.up_number = warp_sum(up_number), sum.down_number = warp_sum(down_number);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum.up[i] = sum.down[i] = 0.f;
    __syncwarp();
    if (lane >= Columns<D>::kLanes) return sum;
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int k = 0; k < n; k += kAtOnce) {
        float x[kAtOnce][kCount];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u)
            load_columns(x[u], s.payload<D>(role, head, members.token[min(k + u, n - 1)]) + lane * kCount);
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const float2 w = k + u < n ? members.weight[min(k + u, n - 1)] : float2{0.f, 0.f};
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                sum.up[i] = fmaf(w.x, x[u][i], sum.up[i]);
                sum.down[i] = fmaf(w.y, x[u][i], sum.down[i]);
            }
        }
    }
    return sum;
}

template <int D>
__device__ void store_state(const Scene& s, int part, int head, int slot, const float (&x)[Columns<D>::kCount],
                            float number, float scale) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t row = s.row(part, head, slot);
    float* to = s.states + row * (D + 4);
    if (lane < Columns<D>::kLanes) {
#pragma unroll
        for (int i = 0; i < Columns<D>::kCount; ++i) to[lane * Columns<D>::kCount + i] = x[i];
    }
    if (lane < 4) to[D + lane] = lane == 0 ? number : 0.f;
    if (lane == 0) s.local_scales[row] = scale;
}

// Grid: tiles in fours, heads, roles.
template <int D>
__global__ void __launch_bounds__(kTileThreads, 8) attention_tree_sums_kernel(Scene s) {
    __shared__ Members members[kTileThreads / kWarp];
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int slot = static_cast<int>(blockIdx.x) * (kTileThreads / kWarp) + warp, head = blockIdx.y, role = blockIdx.z;
    const Block tile = s.tiles.at(slot);
    const int start = tile.start;
    if (start < 0) return;
    const Node node = s.level.at(start);
    if (!node.works()) return;
    const int end = min(start + kTile, node.hi);
    const float low = scalar_of(s.order(head)[start]), high = scalar_of(s.order(head)[end - 1]);
    if (role == 0 && lane == 0) s.edges_of(head, slot) = {low, high};
    const TileSum<D> sum =
        sum_tile<D>(s, node, s.bounds_of(node, head, tile.sequence), head, role, start, end, low, high, members[warp]);
    store_state<D>(s, 2 * role, head, slot, sum.up, sum.up_number, sum.up_scale);
    store_state<D>(s, 2 * role + 1, head, slot, sum.down, sum.down_number, sum.down_scale);
}

// ---- what may be skipped --------------------------------------------------------------------------------------------
// A pair's weight is at most exp((F_i - lse_i) - F_j), lse_i of what the query has at least. A key counts if it can have
// 2^-24 of any query of the node, over the number of keys; a query if any key of the node can.
constexpr int kBoundThreads = 128;
struct BoundOf {
    Level level;
    Blocks leaves, nodes;
    std::int64_t tokens;
    const float* gates;
    const float2* query_ends;
    float2 *leaf_bounds,
        *bounds;  // [group, leaves]: largest -F_j and F_i - lse_i; [group, nodes]: what is to be reached
};
__device__ inline float2 block_max_of(float2 x) {
    __shared__ float shared[kBoundThreads / kWarp];
    const float first = block_max(x.x, shared);
    return {first, block_max(x.y, shared)};
}
// Grid: leaves, heads.
__global__ void __launch_bounds__(kBoundThreads) attention_tree_leaf_bounds_kernel(BoundOf p) {
    const int head = blockIdx.y, start = p.leaves.at(static_cast<int>(blockIdx.x)).start;
    if (start < 0) return;
    const int end = min(start + static_cast<int>(p.leaves.size), p.level.seq.last(start));
    float2 most = {kNone, kNone};
    for (int i = start + static_cast<int>(threadIdx.x); i < end; i += kBoundThreads) {
        const float F = p.gates[head * p.tokens + i], lse = p.query_ends[head * p.tokens + i].x;
        most = {fmaxf(most.x, -F), fmaxf(most.y, F - lse)};
    }
    most = block_max_of(most);
    if (threadIdx.x == 0) p.leaf_bounds[head * std::int64_t(p.leaves.slots) + blockIdx.x] = most;
}
// Grid: nodes, heads.
__global__ void __launch_bounds__(kBoundThreads) attention_tree_bounds_kernel(BoundOf p) {
    const int head = blockIdx.y;
    const Block block = p.nodes.at(static_cast<int>(blockIdx.x));
    if (block.start < 0) return;
    const Node node = p.level.at(block.start);
    if (!node.works()) return;
    const int leaf = static_cast<int>(p.leaves.size), begin = p.level.seq.first(node.lo);
    const int first = p.leaves.slot(block.sequence, begin, (node.lo - begin) / leaf);
    const int halves = (node.mid - node.lo) / leaf, all = ceil_div(node.hi - node.lo, leaf);
    const float2* bounds = p.leaf_bounds + head * std::int64_t(p.leaves.slots) + first;
    float2 most = {kNone, kNone};
    for (int i = threadIdx.x; i < all; i += kBoundThreads) {
        if (i < halves)
            most.x = fmaxf(most.x, bounds[i].x);
        else
            most.y = fmaxf(most.y, bounds[i].y);
    }
    most = block_max_of(most);
    const float room = logf(static_cast<float>(node.mid - node.lo)) + 24.f * kLn2;
    if (threadIdx.x == 0) p.bounds[head * std::int64_t(p.nodes.slots) + blockIdx.x] = {most.y + room, most.x + room};
}

// Four columns of a sum that is carried along: exp(scale - |x - at|) sum at scalar x.
struct Carried {
    float scale = kNone, at = 0.f;
    float4 sum = {0.f, 0.f, 0.f, 0.f};

    __device__ void add(float other_scale, float x, const float4& other) {
        const float carried = scale - fabsf(x - at);
        if (other_scale > carried + kLead) {
            const float keep = exp_fast(carried - other_scale);
            sum = {fmaf(sum.x, keep, other.x), fmaf(sum.y, keep, other.y), fmaf(sum.z, keep, other.z),
                   fmaf(sum.w, keep, other.w)};
            scale = other_scale, at = x;
        } else {
            const float w = exp_fast(other_scale - carried);
            sum = {fmaf(w, other.x, sum.x), fmaf(w, other.y, sum.y), fmaf(w, other.z, sum.z), fmaf(w, other.w, sum.w)};
        }
    }
};

// Grid: nodes, heads, parts. Threads: `segments` of the node's tiles, each with the D / 4 + 1 quarters of a state: every
// segment is summed, then begins with the sum of those before it. In place; scales go to another array, since all quarters
// read them.
template <int D>
__global__ void __launch_bounds__(1024) attention_tree_scan_kernel(Scene s, int segments) {
    constexpr int kQuarters = D / 4 + 1, kAhead = 4;
    extern __shared__ __align__(16) unsigned char scan_memory[];
    auto* totals = reinterpret_cast<Carried*>(scan_memory);  // [segments][kQuarters]
    const Block block = s.nodes.at(static_cast<int>(blockIdx.x));
    if (block.start < 0) return;
    const Node node = s.level.at(block.start);
    if (!node.works()) return;
    const int head = blockIdx.y, part = blockIdx.z, tiles = node.tiles();
    const bool above = part % 2 != 0;
    const int first = s.level.axis() * s.level.seq.first(block.start / s.level.axis());
    const int slot = s.tiles.slot(block.sequence, first, (block.start - first) / kTile);
    const int segment = static_cast<int>(threadIdx.x) / kQuarters, quarter = static_cast<int>(threadIdx.x) % kQuarters;
    const int length = ceil_div(tiles, segments), from = min(segment * length, tiles), to = min(from + length, tiles);
    const bool works = segment < segments;

    // Tile number k of the walk, which goes down for the parts above.
    const auto slot_of = [&](int k) { return slot + (above ? tiles - 1 - k : k); };
    const auto walk = [&](Carried& carried, bool writes) {
        for (int k = from; k < to; k += kAhead) {
            float4 own[kAhead];
            float scale[kAhead];
            float2 edges[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                const int at = slot_of(min(k + u, to - 1));
                const std::int64_t row = s.row(part, head, at);
                own[u] = *reinterpret_cast<const float4*>(s.states + row * (D + 4) + 4 * quarter);
                scale[u] = s.local_scales[row], edges[u] = s.edges_of(head, at);
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
                if (k + u >= to) break;
                const float near = above ? edges[u].y : edges[u].x, far = above ? edges[u].x : edges[u].y;
                if (writes) {
                    const std::int64_t row = s.row(part, head, slot_of(k + u));
                    *reinterpret_cast<float4*>(s.states + row * (D + 4) + 4 * quarter) = carried.sum;
                    if (quarter == 0) s.scales[row] = carried.scale - fabsf(near - carried.at);
                }
                carried.add(scale[u], far, own[u]);
            }
        }
    };
    if (segments > 1) {
        Carried total;
        if (works && segment + 1 < segments) {
            walk(total, false);
            totals[segment * kQuarters + quarter] = total;
        }
        __syncthreads();
    }
    if (!works) return;
    Carried carried;
    for (int i = 0; i < segment; ++i) {
        const Carried& total = totals[i * kQuarters + quarter];
        carried.add(total.scale, total.at, total.sum);
    }
    walk(carried, true);
}

}  // namespace fiedler::attention_tree
