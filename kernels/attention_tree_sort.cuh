// kernels/attention_tree_sort.cuh: the orders of attention_tree: leaves sorted in shared memory, then runs merged, level
// by level. A merging block finds its piece of both runs by a search along its diagonals, 32 places at a time, and the
// place of each entry by a search in shared memory.
#pragma once
#include "kernels/attention_tree_plan.h"
#include "kernels/common.cuh"

namespace fiedler::attention_tree {

constexpr int kSortThreads = 256;

// Two sets of runs, [set][keys, queries][head][tokens]: a level reads one and writes the other.
struct Runs {
    Entry* data;
    std::int64_t tokens;
    int group;
    __device__ Entry* of(int set, int queries, int head) const {
        return data + ((set * 2 + queries) * std::int64_t(group) + head) * tokens;
    }
};

// Ragged packings: which slots are in use. A block for each sequence.
__global__ void __launch_bounds__(kSortThreads) attention_tree_table_kernel(Packed seq, Blocks blocks) {
    for (int k = threadIdx.x; blocks.note(seq, static_cast<int>(blockIdx.x), k); k += kSortThreads) {
    }
}
// Leaves as a packing of their own.
__global__ void __launch_bounds__(kSortThreads)
    attention_tree_leaves_kernel(Packed seq, int leaf, std::int32_t* begin, std::int32_t* end) {
    const int i = static_cast<int>(blockIdx.x) * kSortThreads + static_cast<int>(threadIdx.x);
    if (i >= seq.tokens) return;
    const int first = seq.first(i), last = seq.last(i), lo = first + (i - first) / leaf * leaf;
    begin[i] = lo, end[i] = min(lo + leaf, last);
}

// x: the scalars of the first head of the group, keys' and queries'.
struct Scalars {
    const float *b, *a;
    std::int64_t ld;
};
__global__ void __launch_bounds__(kSortThreads)
    attention_tree_sort_kernel(Packed seq, Blocks leaves, Scalars scalars, Runs runs) {
    extern __shared__ __align__(16) unsigned char sort_memory[];
    auto* entries = reinterpret_cast<Entry*>(sort_memory);
    const int start = leaves.at(static_cast<int>(blockIdx.x)).start, head = blockIdx.y, thread = threadIdx.x;
    if (start < 0) return;
    const bool query = blockIdx.z != 0;
    const float* x = (query ? scalars.a : scalars.b) + head;
    const int n = min(static_cast<int>(leaves.size), seq.last(start) - start);
    int padded = 1;
    while (padded < n) padded *= 2;
    for (int i = thread; i < padded; i += kSortThreads)
        entries[i] = i < n ? entry_of(x[(start + i) * scalars.ld], start + i, query) : ~Entry(0);
    for (int run = 2; run <= padded; run *= 2)  // bitonic
        for (int apart = run / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (int t = thread; t < padded / 2; t += kSortThreads) {
                const int i = 2 * (t & ~(apart - 1)) + (t & (apart - 1)), j = i + apart;
                const Entry p = entries[i], q = entries[j];
                if ((p > q) == ((i & run) == 0)) entries[i] = q, entries[j] = p;
            }
        }
    __syncthreads();
    Entry* to = runs.of(0, query, head) + start;
    for (int i = thread; i < n; i += kSortThreads) to[i] = entries[i];
}

// How many of the first d merged entries are from a; all lanes take part.
__device__ inline int cut_runs(const Entry* a, int a_count, const Entry* b, int b_count, int d) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    Cut cut(a_count, b_count, d);
    while (cut.open()) {
        const int i = cut.probe(lane);
        cut.narrow(__popc(__ballot_sync(0xffffffffu, a[i] < b[d - 1 - i])));
    }
    return cut.lo;
}
// How many of the n ascending entries are less than e.
__device__ inline int place_among(const Entry* entries, int n, Entry e) {
    int lo = 0, hi = n;
    while (lo < hi) {
        const int mid = (lo + hi) / 2;
        if (entries[mid] < e)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

// What a merge makes: the sorted keys and queries of a node from its halves', or its order of work from the keys of the
// first half and the queries of the second (bidirectional: from the keys and queries of the sequence).
enum class Merged : int { kKeys, kQueries, kWork };
struct Merge {
    Level level;
    Blocks blocks;  // of the output
    Runs runs;
    Entry* work;
    std::int64_t work_entries;  // of a head
    int set;                    // of runs to read
    int first;                  // Merged of blockIdx.z = 0
};
__global__ void __launch_bounds__(kSortThreads) attention_tree_merge_kernel(Merge p) {
    extern __shared__ __align__(16) unsigned char merge_memory[];
    __shared__ int cuts[2];
    const int size = static_cast<int>(p.blocks.size), thread = threadIdx.x, head = blockIdx.y;
    auto* in = reinterpret_cast<Entry*>(merge_memory);
    Entry* merged = in + size;
    const int start = p.blocks.at(static_cast<int>(blockIdx.x)).start;
    if (start < 0) return;
    const auto what = static_cast<Merged>(p.first + static_cast<int>(blockIdx.z));
    const Node node = p.level.at(start);
    if (what == Merged::kWork && !node.works()) return;
    const Pair pair = p.level.node == 0 ? whole_of(node) : halves_of(node);
    const Entry* a = p.runs.of(p.set, what == Merged::kQueries, head) + pair.a;
    const Entry* b = p.runs.of(p.set, what != Merged::kKeys, head) + pair.b;
    Entry* out =
        what == Merged::kWork ? p.work + head * p.work_entries : p.runs.of(1 - p.set, what == Merged::kQueries, head);

    const int from = start - pair.out, to = min(from + size, pair.a_count + pair.b_count), warp = thread / kWarp;
    if (warp < 2) {
        const int cut = cut_runs(a, pair.a_count, b, pair.b_count, warp == 0 ? from : to);
        if (thread % kWarp == 0) cuts[warp] = cut;
    }
    __syncthreads();
    const int a_from = cuts[0], a_n = cuts[1] - a_from, b_from = from - a_from, n = to - from;
    for (int i = thread; i < n; i += kSortThreads) in[i] = i < a_n ? a[a_from + i] : b[b_from + i - a_n];
    __syncthreads();
    for (int i = thread; i < n; i += kSortThreads) {
        const Entry e = in[i];
        const int others = i < a_n ? place_among(in + a_n, n - a_n, e) : place_among(in, a_n, e) - a_n;
        merged[i + others] = e;
    }
    __syncthreads();
    for (int i = thread; i < n; i += kSortThreads) out[start + i] = merged[i];
}

}  // namespace fiedler::attention_tree
