// Near-linear scalar-distance attention on the GPU: leaves by the dense kernels, then level by level
//     merge   the order of a node, and the sorted runs of the next level     kernels/attention_tree_sort.cuh
//     sums    of every tile of 64 positions                                  kernels/attention_tree_scan.cuh
//     scan    along the tiles of a node
//     pairs   of a tile, and look-ups                kernels/attention_tree_forward.cuh, attention_tree_backward.cuh
//
// Bytes of a level, for each token and head, D = 64 (half the tokens are keys, half queries). Forward 490: rows of v for the
// sums and again for the pairs, 2 x 64; f32 sums of o read and written, 256; orders and merges, 64; states of tiles, written
// once, read twice and written by the scan, and read, 42. Backward 670: rows of v and dO, each twice, 256; f32 sums of dv,
// 256; orders and merges, 72; states, 85.
#include "kernels/attention_tree.h"

#include "kernels/attention_tree_backward.cuh"
#include "kernels/attention_tree_forward.cuh"
#include "kernels/attention_tree_sort.cuh"

namespace fiedler {
namespace {

using namespace attention_tree;

template <class Launch>
void with_width(std::int64_t width, Launch&& launch) {
    if (width == 16) return launch.template operator()<16>();
    if (width == 32) return launch.template operator()<32>();
    if (width == 64) return launch.template operator()<64>();
    FIEDLER_REQUIRE("attention_tree", width == 128);
    launch.template operator()<128>();
}

unsigned grid_of(std::int64_t items, std::int64_t of_block) { return static_cast<unsigned>(ceil_div(items, of_block)); }

// One call: scratch cut up, and the steps that both passes share. P: AttentionTreeForward or Backward.
template <class P>
struct Call {
    const Cuda& device;
    const P& p;
    Layout layout;
    std::int64_t width;
    int axis;

    Call(const Cuda& d, const P& args, bool backward, std::int64_t partial_floats)
        : device(d),
          p(args),
          layout(args.seq, args.longest, args.heads, args.v.cols / args.heads, args.causal, args.tuning, backward,
                 partial_floats),
          width(args.v.cols / args.heads),
          axis(args.causal ? 1 : 2) {
        FIEDLER_REQUIRE("attention_tree", width == 16 || width == 32 || width == 64 || width == 128);
        FIEDLER_REQUIRE("attention_tree", p.scratch.data != nullptr && p.scratch.size >= layout.bytes);
        FIEDLER_REQUIRE("attention_tree", reinterpret_cast<std::uintptr_t>(p.scratch.data) % 256 == 0);
        layout.set_tables(p.scratch.data);
    }
    template <class T>
    T* at(std::int64_t offset) const {
        return reinterpret_cast<T*>(p.scratch.data + offset);
    }
    cudaStream_t stream() const { return stream_of(device); }

    void fill_tables() const {
        if (layout.table_bytes == 0) return;
        fill_bytes(device, p.scratch.data + layout.tables, 0xff, static_cast<std::size_t>(layout.table_bytes));
        const auto fill = [&](const Blocks& b) {
            attention_tree_table_kernel<<<static_cast<unsigned>(p.seq.count), kSortThreads, 0, stream()>>>(p.seq, b);
            LAUNCH_CHECK("attention_tree_table");
        };
        fill(layout.tiles), fill(layout.leaves);
        if (!p.causal) fill(layout.positions);
        for (int l = 0; l < layout.work_levels(); ++l) fill(layout.nodes[l]);
    }
    // Leaves as sequences of their own.
    Packed leaf_packing() const {
        const int leaf = static_cast<int>(layout.leaf);
        if (layout.even_leaves) return Packed::uniform(p.seq.tokens / leaf, leaf);
        Packed leaves = p.seq;
        leaves.length = 0, leaves.count = 1;
        leaves.begin = at<std::int32_t>(layout.begins), leaves.end = at<std::int32_t>(layout.ends);
        leaves.offsets = leaves.begin;  // there, as a packing must have them; the dense kernels do not look
        attention_tree_leaves_kernel<<<grid_of(p.seq.tokens, kSortThreads), kSortThreads, 0, stream()>>>(
            p.seq, leaf, at<std::int32_t>(layout.begins), at<std::int32_t>(layout.ends));
        LAUNCH_CHECK("attention_tree_leaves");
        return leaves;
    }
    Runs runs() const { return {at<Entry>(layout.runs), layout.run_entries, layout.group}; }

    Scene scene(int first_head, int level) const {
        Scene s{};
        s.level = level_of(level);
        s.tiles = layout.tiles, s.nodes = layout.nodes[level];
        s.tokens = p.seq.tokens;
        s.group = layout.group, s.heads = p.heads, s.first_head = first_head;
        s.work = at<Entry>(layout.work), s.work_entries = layout.work_entries;
        s.gates = at<float>(layout.gates), s.query_ends = at<float2>(layout.query_ends);
        s.v = nv(p.v.data) + first_head * width, s.ldv = p.v.ld;
        s.states = at<float>(layout.states), s.local_scales = at<float>(layout.local_scales);
        s.scales = at<float>(layout.scales), s.edges = at<float2>(layout.edges);
        return s;
    }
    void sort_leaves(int first_head, int heads) const {
        const Scalars scalars{p.b.data + first_head, p.a.data + first_head, p.heads};
        const dim3 grid(static_cast<unsigned>(layout.leaves.slots), static_cast<unsigned>(heads), 2);
        attention_tree_sort_kernel<<<grid, kSortThreads, layout.leaf * sizeof(Entry), stream()>>>(p.seq, layout.leaves,
                                                                                                  scalars, runs());
        LAUNCH_CHECK("attention_tree_sort");
    }
    Level level_of(int number) const {
        if (!p.causal) return {p.seq, 0};
        return {p.seq, layout.node_tokens(number), static_cast<std::int32_t>(layout.leaf), number};
    }
    void merge(int heads, int set, Merged first, int outputs, const Level& level) const {
        Merge m{};
        m.level = level, m.blocks = level.node == 0 ? layout.positions : layout.leaves;
        m.runs = runs(), m.work = at<Entry>(layout.work), m.work_entries = layout.work_entries;
        m.set = set, m.first = static_cast<int>(first);
        const dim3 grid(static_cast<unsigned>(m.blocks.slots), static_cast<unsigned>(heads),
                        static_cast<unsigned>(outputs));
        attention_tree_merge_kernel<<<grid, kSortThreads, 2 * layout.leaf * sizeof(Entry), stream()>>>(m);
        LAUNCH_CHECK("attention_tree_merge");
    }
    // Sums of the tiles, for roles keys (and queries), and what the tiles before each add up to.
    template <int D>
    void scan(const Scene& s, int heads, int roles) const {
        const dim3 sums(grid_of(layout.tiles.slots, kTileThreads / kWarp), static_cast<unsigned>(heads),
                        static_cast<unsigned>(roles));
        attention_tree_sums_kernel<D><<<sums, kTileThreads, 0, stream()>>>(s);
        LAUNCH_CHECK("attention_tree_sums");
        constexpr int kQuarters = D / 4 + 1;
        const std::int64_t positions = longest_of(p.seq, p.longest) * axis;
        const std::int64_t tiles =
            ceil_div(s.level.node > 0 ? std::min(s.level.node, positions) : positions, std::int64_t(kTile));
        const int segments = static_cast<int>(std::clamp<std::int64_t>(tiles / 8, 1, 1024 / kQuarters));
        const dim3 nodes(static_cast<unsigned>(s.nodes.slots), static_cast<unsigned>(heads),
                         static_cast<unsigned>(2 * roles));
        const int threads = ceil_div(segments * kQuarters, kWarp) * kWarp;
        attention_tree_scan_kernel<D>
            <<<nodes, static_cast<unsigned>(threads), segments * kQuarters * sizeof(Carried), stream()>>>(s, segments);
        LAUNCH_CHECK("attention_tree_scan");
    }
    // `work` does what a level is for, once its order is there.
    template <class Work>
    void levels(int first_head, int heads, Work&& work) const {
        sort_leaves(first_head, heads);
        for (int l = 0; l < layout.levels; ++l) {
            const Level level{p.seq, layout.node_tokens(l), static_cast<std::int32_t>(layout.leaf), l};
            if (!p.causal) {
                merge(heads, l % 2, Merged::kKeys, 2, level);
            } else if (l + 1 < layout.levels) {
                merge(heads, l % 2, Merged::kKeys, 3, level);
                work(l);
            } else {
                merge(heads, l % 2, Merged::kWork, 1, level);
                work(l);
            }
        }
        if (p.causal) return;
        merge(heads, layout.levels % 2, Merged::kWork, 1, level_of(0));
        work(0);
    }
    void numbers(int first_head, int heads, const float* lse, const float* delta) const {
        Numbers n{};
        n.F = p.F ? p.F.data + first_head : nullptr;
        n.heads = p.heads, n.tokens = p.seq.tokens, n.group = heads, n.gates = at<float>(layout.gates);
        n.query_ends = at<float2>(layout.query_ends);
        if (lse != nullptr) n.lse = lse + first_head;
        if (delta != nullptr) n.delta = delta + first_head;
        attention_tree_numbers_kernel<<<grid_of(p.seq.tokens, 256), 256, 0, stream()>>>(n);
        LAUNCH_CHECK("attention_tree_numbers");
    }
    BoundOf bound_of(const Scene& s) const {
        BoundOf b{};
        b.level = s.level, b.leaves = layout.leaves, b.nodes = s.nodes, b.tokens = s.tokens;
        b.gates = s.gates, b.query_ends = s.query_ends;
        b.leaf_bounds = at<float2>(layout.leaf_bounds), b.bounds = at<float2>(layout.bounds);
        return b;
    }
    // What a level may leave out; the bounds of the leaves are there from the first level on.
    void set_bounds(Scene& s, int heads, int level) const {
        if (!p.skip || !p.causal) return;
        const BoundOf b = bound_of(s);
        if (level == 0) {
            const dim3 grid(static_cast<unsigned>(b.leaves.slots), static_cast<unsigned>(heads));
            attention_tree_leaf_bounds_kernel<<<grid, kBoundThreads, 0, stream()>>>(b);
            LAUNCH_CHECK("attention_tree_leaf_bounds");
        }
        const dim3 grid(static_cast<unsigned>(b.nodes.slots), static_cast<unsigned>(heads));
        attention_tree_bounds_kernel<<<grid, kBoundThreads, 0, stream()>>>(b);
        LAUNCH_CHECK("attention_tree_bounds");
        s.bounds = b.bounds;
    }
    dim3 tile_grid(int heads) const {
        return dim3(static_cast<unsigned>(layout.tiles.slots), static_cast<unsigned>(heads));
    }
};

// The dense family's arguments for the leaves.
template <class Dense, class P>
Dense dense_of(const P& p, const Packed& leaves) {
    Dense d;
    d.a = p.a, d.b = p.b, d.F = p.F, d.v = p.v, d.seq = leaves, d.heads = p.heads;
    return d;
}

void forward_heads(const Call<AttentionTreeForward<bf16>>& call, int first_head, int heads) {
    const auto& p = call.p;
    call.numbers(first_head, heads, p.causal ? p.lse.data : nullptr, nullptr);
    const Outputs out{
        nv(p.o.data) + first_head * call.width, p.o.ld, p.lse.data + first_head, call.at<float>(call.layout.sums),
        call.at<float2>(call.layout.weights),   p.skip};
    with_width(call.width, [&]<int D>() {
        call.levels(first_head, heads, [&](int level) {
            Scene s = call.scene(first_head, level);
            call.set_bounds(s, heads, level);
            call.template scan<D>(s, heads, 1);
            attention_tree_forward_kernel<D><<<call.tile_grid(heads), kTileThreads, 0, call.stream()>>>(s, out);
            LAUNCH_CHECK("attention_tree_forward");
        });
    });
}

void backward_heads(const Call<AttentionTreeBackward<bf16>>& call, int first_head, int heads) {
    const auto& p = call.p;
    call.numbers(first_head, heads, p.lse.data, p.delta.data);
    const Gradients out{nv(p.dv.data) + first_head * call.width,
                        p.dv.ld,
                        call.at<float>(call.layout.sums),
                        p.da.data + first_head,
                        p.db.data + first_head,
                        p.dF ? p.dF.data + first_head : nullptr};
    with_width(call.width, [&]<int D>() {
        call.levels(first_head, heads, [&](int level) {
            Scene s = call.scene(first_head, level);
            s.dout = nv(p.do_.data) + first_head * D, s.lddo = p.do_.ld;
            call.set_bounds(s, heads, level);
            call.template scan<D>(s, heads, 2);
            attention_tree_backward_kernel<D><<<call.tile_grid(heads), kTileThreads, 0, call.stream()>>>(s, out);
            LAUNCH_CHECK("attention_tree_backward");
        });
    });
}

template <class P, class Heads>
void for_heads(const Call<P>& call, Heads&& heads) {
    const int group = call.layout.group;
    for (int first = 0; first < call.p.heads; first += group) heads(call, first, std::min(group, call.p.heads - first));
}

}  // namespace

void attention_tree_forward(const Cuda& device, const AttentionTreeForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("attention_tree", is_aligned16(p.v) && is_aligned16(p.o));
    const Call<AttentionTreeForward<bf16>> call(device, p, false, 0);
    if (p.causal) {
        auto leaf = dense_of<AttentionForward<bf16>>(p, call.leaf_packing());
        leaf.o = p.o, leaf.lse = p.lse;
        attention_forward(device, leaf);
        if (call.layout.levels == 0) return;
    }
    call.fill_tables();
    for_heads(call, forward_heads);
}

void attention_tree_backward(const Cuda& device, const AttentionTreeBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("attention_tree",
                    is_aligned16(p.v) && is_aligned16(p.o) && is_aligned16(p.do_) && is_aligned16(p.dv));
    const std::int64_t partial = attention_tree_partial_floats(p.seq, p.heads, p.v.cols / p.heads, p.causal, p.tuning);
    const Call<AttentionTreeBackward<bf16>> call(device, p, true, partial);
    if (p.causal) {
        auto leaf = dense_of<AttentionBackward<bf16>>(p, call.leaf_packing());
        leaf.o = p.o, leaf.do_ = p.do_, leaf.lse = p.lse, leaf.longest = static_cast<std::int32_t>(call.layout.leaf);
        leaf.da = p.da, leaf.db = p.db, leaf.dF = p.dF, leaf.dv = p.dv, leaf.delta = p.delta;
        leaf.partial = {call.at<float>(call.layout.partial), partial};
        attention_backward(device, leaf);
        if (call.layout.levels == 0) return;
    } else {
        const Deltas d{nv(p.do_.data), nv(p.o.data), p.do_.ld, p.o.ld, p.v.rows, p.heads, static_cast<int>(call.width),
                       p.delta.data,   p.da.data,    p.db.data};
        const dim3 grid(grid_of(p.v.rows, 256), static_cast<unsigned>(p.heads));
        attention_tree_delta_kernel<<<grid, 256, 0, call.stream()>>>(d);
        LAUNCH_CHECK("attention_tree_delta");
    }
    call.fill_tables();
    for_heads(call, backward_heads);
}

}  // namespace fiedler
