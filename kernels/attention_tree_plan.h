// kernels/attention_tree_plan.h: the geometry of kernels/attention_tree on the GPU: nodes, blocks of positions, entries
// of the sorted runs, and the layout of scratch. CUDA-free, so that all of it is tested on the host.
//
//   position   where an entry stands in the order of its node. Causal: a node of tokens [lo, hi) with the halves [lo, mid)
//              and [mid, hi) orders the keys of the first and the queries of the second: as many as it has tokens, so
//              positions are tokens. Bidirectional: a sequence orders all its keys and queries: two positions a token.
//   block      `size` consecutive positions of one sequence, counted from its begin; the last may be shorter. Tiles (64),
//              leaves and nodes are blocks, and tiles never straddle leaves or nodes.
//   slot       the number of a block. Uniform packing: without gaps. Ragged: begin / size + sequence + k for block k: the
//              host need not know the lengths, and no two blocks share one; a table says which slots are in use.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#include "kernels/packed.h"

namespace fiedler {

struct AttentionTreeTuning {
    std::int32_t leaf = 1024;   // tokens of a dense leaf: a power of two, 64 to 2048
    std::int32_t together = 0;  // heads whose sums are in scratch at a time; 0: all
};
// Measured on an H100 at 65,536 tokens: forward, a level saved is worth leaves of twice the pairs (1.16 ms against 1.24);
// backward it is not (2.07 against 2.03).
inline constexpr AttentionTreeTuning kAttentionTreeForward{.leaf = 2048, .together = 0},
    kAttentionTreeBackward{.leaf = 1024, .together = 0};
constexpr bool is_valid(AttentionTreeTuning t) {
    return t.leaf >= 64 && t.leaf <= 2048 && (t.leaf & (t.leaf - 1)) == 0 && t.together >= 0;
}

namespace attention_tree {

constexpr std::int32_t kTile = 64;

// ---- entries of sorted runs ---------------------------------------------------------------------------------------
// Order of the scalar in the upper half (unsigned order of the bits is the order of the floats; -0 is taken for 0), in
// the lower half the token and, in bit 31, whether it is a query. All entries of a run differ.
using Entry = std::uint64_t;
constexpr std::uint32_t kQuery = 0x80000000u;

FIEDLER_HD inline std::uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    return std::bit_cast<std::uint32_t>(x);
#endif
}
FIEDLER_HD inline float float_of(std::uint32_t u) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(u);
#else
    return std::bit_cast<float>(u);
#endif
}
FIEDLER_HD inline Entry entry_of(float x, std::int32_t token, bool query) {
    const std::uint32_t u = bits_of(x == 0.f ? 0.f : x);
    const std::uint32_t order = (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
    return static_cast<Entry>(order) << 32 | (static_cast<std::uint32_t>(token) | (query ? kQuery : 0u));
}
FIEDLER_HD inline float scalar_of(Entry e) {
    const auto order = static_cast<std::uint32_t>(e >> 32);
    return float_of((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}
FIEDLER_HD inline bool is_query(Entry e) { return (static_cast<std::uint32_t>(e) & kQuery) != 0; }
FIEDLER_HD inline std::int32_t token_of(Entry e) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(e) & ~kQuery);
}

// ---- nodes ----------------------------------------------------------------------------------------------------------
// Positions [lo, hi); causal: keys are the tokens [lo, mid), queries [mid, hi). Bidirectional: mid = lo.
struct Node {
    std::int32_t lo = 0, mid = 0, hi = 0;
    FIEDLER_HD bool works() const { return mid < hi; }
    FIEDLER_HD std::int32_t tiles() const { return (hi - lo + kTile - 1) / kTile; }
};
// The levels in which a token takes part, as a query or as a key, begin and end with these. Its sums come from the leaf
// at the first, in bf16, are in f32 scratch from the first to the last, and become its result at the last.
struct Touch {
    bool first = true, last = true;
};
struct Level {
    Packed seq;
    std::int64_t node = 0;  // tokens of a node; 0: bidirectional, a sequence is a node
    std::int32_t leaf = 1;  // node = leaf 2^(number + 1)
    std::int32_t number = 0;

    FIEDLER_HD std::int32_t axis() const { return node == 0 ? 2 : 1; }  // positions of a token
    FIEDLER_HD Node at(std::int32_t position) const {
        if (node == 0) {
            const std::int32_t token = position / 2, lo = 2 * seq.first(token);
            return {lo, lo, 2 * seq.last(token)};
        }
        const std::int64_t first = seq.first(position), last = seq.last(position);
        const std::int64_t lo = first + (position - first) / node * node;
        const std::int64_t mid = lo + node / 2, hi = lo + node;
        return {static_cast<std::int32_t>(lo), static_cast<std::int32_t>(mid < last ? mid : last),
                static_cast<std::int32_t>(hi < last ? hi : last)};
    }
    // A query of level l has bit l of its leaf's number set, a key of level l has it clear, and a node that works beyond
    // works below too: its second half begins later.
    FIEDLER_HD Touch of_query(std::int32_t token) const {
        if (node == 0) return {};
        const auto at = static_cast<std::uint32_t>((token - seq.first(token)) / leaf);
        return {(at & ((1u << number) - 1)) == 0, (at >> number) == 1u};
    }
    FIEDLER_HD Touch of_key(std::int32_t token) const {
        if (node == 0) return {};
        const std::int32_t begin = seq.first(token), length = seq.last(token) - begin;
        const auto at = static_cast<std::uint32_t>((token - begin) / leaf);
        const std::uint32_t below = (1u << number) - 1;
        std::int32_t next = number + 1;
        while ((at >> next & 1u) != 0) ++next;
        const std::int64_t half = std::int64_t((at >> next | 1u)) << next;  // leaves before that node's second half
        return {(at & below) == below, half * leaf >= length};
    }
};

// ---- blocks ---------------------------------------------------------------------------------------------------------
struct Block {
    std::int32_t start = -1, sequence = 0;  // first position; -1: the slot is not in use
};
struct Blocks {
    std::int64_t size = 1;
    std::int32_t slots = 0, axis = 1;
    std::int32_t length = 0, per_sequence = 0;  // uniform: positions and blocks of a sequence
    Block* table = nullptr;                     // ragged: [slots]

    static Blocks of(const Packed& seq, std::int64_t size, std::int32_t axis) {
        Blocks b;
        b.size = size, b.axis = axis;
        if (seq.length > 0) {
            b.length = seq.length * axis;
            b.per_sequence = static_cast<std::int32_t>((b.length + size - 1) / size);
            b.slots = seq.count * b.per_sequence;
        } else {
            b.slots = static_cast<std::int32_t>(std::int64_t(seq.tokens) * axis / size) + seq.count + 1;
        }
        return b;
    }
    // The slot of block k of a sequence that begins at position `begin`.
    FIEDLER_HD std::int32_t slot(std::int32_t sequence, std::int32_t begin, std::int32_t k) const {
        return length > 0 ? sequence * per_sequence + k : static_cast<std::int32_t>(begin / size) + sequence + k;
    }
    FIEDLER_HD Block at(std::int32_t slot) const {
        if (slot >= slots) return {};
        if (length == 0) return table[slot];
        const std::int32_t sequence = slot / per_sequence, k = slot % per_sequence;
        return {static_cast<std::int32_t>(std::int64_t(sequence) * length + k * size), sequence};
    }
    // Ragged: what the table says of block k of a sequence, if it has one. The table is all -1 before.
    FIEDLER_HD bool note(const Packed& seq, std::int32_t sequence, std::int32_t k) const {
        const std::int32_t begin = seq.sequence_begin(sequence) * axis, end = seq.sequence_end(sequence) * axis;
        const std::int64_t start = begin + k * size;
        if (start >= end) return false;
        table[slot(sequence, begin, k)] = {static_cast<std::int32_t>(start), sequence};
        return true;
    }
};

// ---- merging --------------------------------------------------------------------------------------------------------
// Two runs to be merged, and where the result begins. a, b: first entries, counted from those of token 0.
struct Pair {
    std::int32_t a = 0, a_count = 0, b = 0, b_count = 0, out = 0;
};
FIEDLER_HD inline Pair halves_of(const Node& n) { return {n.lo, n.mid - n.lo, n.mid, n.hi - n.mid, n.lo}; }
FIEDLER_HD inline Pair whole_of(const Node& n) {  // bidirectional: keys and queries of one sequence
    const std::int32_t count = (n.hi - n.lo) / 2;
    return {n.lo / 2, count, n.lo / 2, count, n.lo};
}
// How many of the first d merged entries come from a: the first i in [lo, hi) with a[i] > b[d - 1 - i], else hi. One
// round probes 32 places; taken: how many probes, in order, had a[i] < b[d - 1 - i].
struct Cut {
    std::int32_t lo, hi;
    FIEDLER_HD Cut(std::int32_t a_count, std::int32_t b_count, std::int32_t d)
        : lo(d > b_count ? d - b_count : 0), hi(d < a_count ? d : a_count) {}
    FIEDLER_HD bool open() const { return lo < hi; }
    FIEDLER_HD std::int32_t probe(std::int32_t lane) const {
        return lo + static_cast<std::int32_t>(std::int64_t(hi - lo) * lane / 32);
    }
    FIEDLER_HD void narrow(std::int32_t taken) {
        const std::int32_t below = taken > 0 ? probe(taken - 1) + 1 : lo, above = taken < 32 ? probe(taken) : hi;
        lo = below, hi = above;
    }
};

// ---- levels ---------------------------------------------------------------------------------------------------------
// Times that runs are merged before one covers the longest sequence: the levels of a causal tree.
inline std::int32_t levels_of(std::int64_t longest, std::int64_t leaf) {
    std::int32_t n = 0;
    while ((leaf << n) < longest) ++n;
    return n;
}
inline std::int64_t longest_of(const Packed& seq, std::int32_t longest) {
    return seq.length > 0 ? seq.length : longest > 0 ? longest : seq.tokens;
}

// ---- scratch --------------------------------------------------------------------------------------------------------
// Where everything lies in scratch, in bytes, for `group` heads at a time. A state is a row of D + 4 floats: a vector, its
// number, and room to keep rows at 16 bytes; parts: of keys below, of keys above, and backward also of queries.
constexpr std::int32_t kMaxLevels = 32;
struct Layout {
    std::int32_t group = 1, levels = 0, parts = 2;
    std::int64_t width = 0, leaf = 0;
    bool causal = true, even_leaves = false;  // even: no leaf of a uniform packing is shorter
    Blocks tiles, leaves, positions;          // positions: bidirectional, blocks of `leaf` positions
    Blocks nodes[kMaxLevels];                 // of each level; bidirectional: [0], whole sequences
    std::int64_t begins = 0, ends = 0, tables = 0, table_bytes = 0, runs = 0, work = 0, gates = 0, query_ends = 0,
                 leaf_bounds = 0, bounds = 0;
    std::int64_t states = 0, local_scales = 0, scales = 0, edges = 0, sums = 0, weights = 0, partial = 0, bytes = 0;
    std::int64_t run_entries = 0, work_entries = 0, state_rows = 0;  // of a head; of a part and head

    Layout(const Packed& seq, std::int32_t longest, std::int32_t heads, std::int64_t width_, bool causal_,
           AttentionTreeTuning tuning, bool backward, std::int64_t partial_floats) {
        group = tuning.together > 0 && tuning.together < heads ? tuning.together : heads;
        levels = levels_of(longest_of(seq, longest), tuning.leaf);
        parts = backward ? 4 : 2, width = width_, leaf = tuning.leaf, causal = causal_;
        even_leaves = seq.length > 0 && seq.length % leaf == 0;
        const std::int32_t axis = causal ? 1 : 2;
        const auto tokens = std::int64_t(seq.tokens), scalars = tokens * group;
        run_entries = tokens, work_entries = tokens * axis;
        place_blocks(seq, axis);
        state_rows = tiles.slots;
        const bool packs_leaves = causal && !even_leaves;
        begins = take(packs_leaves ? tokens * 4 : 0), ends = take(packs_leaves ? tokens * 4 : 0);
        runs = take(4 * scalars * 8), work = take(scalars * axis * 8), gates = take(scalars * 4);
        query_ends = take(scalars * 8);
        leaf_bounds = take(causal ? std::int64_t(group) * leaves.slots * 8 : 0);
        bounds = take(causal ? std::int64_t(group) * nodes[0].slots * 8 : 0);  // the most nodes of a level
        states = take(std::int64_t(parts) * group * state_rows * (width + 4) * 4);
        local_scales = take(std::int64_t(parts) * group * state_rows * 4);
        scales = take(std::int64_t(parts) * group * state_rows * 4), edges = take(group * state_rows * 8);
        sums = take(scalars * width * 4), weights = take(backward ? 0 : scalars * 8);
        partial = take(backward ? partial_floats * 4 : 0);
    }
    std::int64_t node_tokens(std::int32_t level) const { return leaf << (level + 1); }
    // Work levels: those in which queries meet keys.
    std::int32_t work_levels() const { return causal ? levels : 1; }

  private:
    std::int64_t take(std::int64_t n) {
        const std::int64_t at = bytes;
        bytes += (n + 255) / 256 * 256;
        return at;
    }
    void place_blocks(const Packed& seq, std::int32_t axis) {
        tiles = Blocks::of(seq, kTile, axis), leaves = Blocks::of(seq, leaf, 1), positions = Blocks::of(seq, leaf, 2);
        for (std::int32_t l = 0; l < work_levels(); ++l)
            nodes[l] = Blocks::of(seq, causal ? node_tokens(l) : std::int64_t(1) << 40, axis);
        if (seq.length > 0) return;
        tables = bytes;
        const auto slots_of = [](const Blocks& b) { return std::int64_t(b.slots) * std::int64_t(sizeof(Block)); };
        take(slots_of(tiles)), take(slots_of(leaves)), take(slots_of(positions));
        for (std::int32_t l = 0; l < work_levels(); ++l) take(slots_of(nodes[l]));
        table_bytes = bytes - tables;
    }

  public:
    // The tables of ragged packings in scratch: the same steps as above.
    void set_tables(unsigned char* scratch) {
        if (table_bytes == 0) return;
        std::int64_t at = tables;
        const auto set = [&](Blocks& b) {
            b.table = reinterpret_cast<Block*>(scratch + at);
            at += (std::int64_t(b.slots) * std::int64_t(sizeof(Block)) + 255) / 256 * 256;
        };
        set(tiles), set(leaves), set(positions);
        for (std::int32_t l = 0; l < work_levels(); ++l) set(nodes[l]);
    }
};

}  // namespace attention_tree
}  // namespace fiedler
