#include "engine/graph.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <span>
#include <type_traits>

#include "engine/error.h"
#include "kernels/parallel.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fiedler {

void* raw_memory(std::size_t bytes) {
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    const bool huge = bytes >= 2 * kHuge;
    void* p = huge ? std::aligned_alloc(kHuge, (bytes + kHuge - 1) / kHuge * kHuge)
                   : std::malloc(std::max<std::size_t>(bytes, 1));
    if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (huge) (void)madvise(p, bytes, MADV_HUGEPAGE);  // a wish: without it all goes on, with more page faults
#endif
    return p;
}
void free_raw_memory(void* p) noexcept { std::free(p); }

namespace {

using Size = std::size_t;

// Small graphs (molecules come by the thousand) are not worth waking threads for.
constexpr std::int64_t kSmall = 20000;
Cpu threads_for(std::int64_t items) { return Cpu{items < kSmall ? 1 : 0}; }

// A listed edge as one of its two rows sees it. Sorted by all three fields, equal listed edges stand side by side in an
// order that is independent of the list's, and what came as (row, column) before what came as (column, row).
struct HalfEdge {
    std::uint32_t row = 0;
    std::uint32_t key = 0;  // 2 column + (1 when listed as (column, row))
    float weight = 0;
    std::uint32_t column() const { return key >> 1; }
    bool reversed() const { return key & 1; }
    std::uint64_t place() const { return std::uint64_t{row} << 32 | key; }
    bool operator<(const HalfEdge& b) const { return place() != b.place() ? place() < b.place() : weight < b.weight; }
};

// Rows cut into ranges of 2^shift; the half-edges of one range fit a core's cache as long as no node is a giant hub.
struct RowRanges {
    int shift = 0;
    std::int64_t count = 1;
    explicit RowRanges(std::int64_t nodes) {
        constexpr std::int64_t kMost = 2048;
        while (((nodes - 1) >> shift) + 1 > kMost) ++shift;
        count = nodes > 0 ? ((nodes - 1) >> shift) + 1 : 0;
    }
    std::int64_t of(std::int32_t row) const { return row >> shift; }
};

void check_edges(std::int64_t nodes, const std::vector<Edge>& edges) {
    const auto count = static_cast<std::int64_t>(edges.size());
    std::int64_t bad = count;
#pragma omp parallel for schedule(static) reduction(min : bad) if (count >= kSmall)
    for (std::int64_t i = 0; i < count; ++i) {
        const Edge& e = edges[static_cast<Size>(i)];
        const bool good = e.from >= 0 && e.from < nodes && e.to >= 0 && e.to < nodes && e.weight >= 0 &&
                          e.weight <= std::numeric_limits<float>::max();
        if (!good && i < bad) bad = i;
    }
    if (bad == count) return;
    const Edge& e = edges[static_cast<Size>(bad)];
    if (e.from < 0 || e.from >= nodes || e.to < 0 || e.to >= nodes)
        input_error("edge {} ({}, {}): its nodes must be from 0 to {}; correct the edge or the number of nodes", bad,
                    e.from, e.to, nodes - 1);
    input_error("edge {} ({}, {}): weight {} must be finite and not negative; correct or drop it", bad, e.from, e.to,
                e.weight);
}

// Both half-edges of every edge kept, range after range; starts[r] is where range r begins. Takes the list's memory.
std::vector<HalfEdge> split_by_range(const RowRanges& ranges, std::vector<Edge>& edges,
                                     std::vector<std::int64_t>& starts, GraphNotes& notes) {
    const auto count = static_cast<std::int64_t>(edges.size());
    const auto width = static_cast<Size>(ranges.count);
    const int chunks =
        thread_count(threads_for(count));  // the order inside a range depends on it: it is sorted away later
    std::vector<std::vector<std::int64_t>> at(static_cast<Size>(chunks), std::vector<std::int64_t>(width, 0));
    std::int64_t loops = 0, zeros = 0;
    const auto for_chunk = [&](int c, auto&& body) {
        for (std::int64_t i = count * c / chunks; i < count * (c + 1) / chunks; ++i) body(edges[static_cast<Size>(i)]);
    };
    const auto kept = [](const Edge& e) { return e.from != e.to && e.weight > 0; };
#pragma omp parallel for schedule(static) reduction(+ : loops, zeros) if (chunks > 1)
    for (int c = 0; c < chunks; ++c)
        for_chunk(c, [&, n = at[static_cast<Size>(c)].data()](const Edge& e) {
            if (kept(e)) {
                ++n[ranges.of(e.from)];
                ++n[ranges.of(e.to)];
            } else {
                (e.from == e.to ? loops : zeros) += 1;
            }
        });
    notes.self_loops = loops;
    notes.zeros = zeros;

    starts.assign(width + 1, 0);
    std::int64_t total = 0;
    for (Size r = 0; r < width; ++r) {
        starts[r] = total;
        for (auto& n : at) total += std::exchange(n[r], total);
    }
    starts[width] = total;

    std::vector<HalfEdge> halves(static_cast<Size>(total));
    parallel_for(threads_for(count), chunks, [&](std::int64_t c) {
        for_chunk(static_cast<int>(c), [&, n = at[static_cast<Size>(c)].data()](const Edge& e) {
            if (!kept(e)) return;
            const auto from = static_cast<std::uint32_t>(e.from), to = static_cast<std::uint32_t>(e.to);
            halves[static_cast<Size>(n[ranges.of(e.from)]++)] = {from, 2 * to, e.weight};
            halves[static_cast<Size>(n[ranges.of(e.to)]++)] = {to, 2 * from + 1, e.weight};
        });
    });
    edges = {};
    return halves;
}

// Sorts one range and joins what lies between the same two nodes, in place; returns how many are left. Notes count an
// edge in the row of its smaller node. An infinite weight: the sum is beyond float.
std::int64_t join_equal(HalfEdge* first, HalfEdge* last, GraphNotes& notes) {
    std::sort(first, last);
    HalfEdge* out = first;
    for (HalfEdge* at = first; at != last;) {
        const std::uint32_t row = at->row, column = at->column();
        double sums[2] = {0, 0};
        std::int64_t listed[2] = {0, 0};
        for (; at != last && at->row == row && at->column() == column; ++at) {
            sums[at->reversed()] += at->weight;
            ++listed[at->reversed()];
        }
        const bool both = listed[0] > 0 && listed[1] > 0;
        if (row < column) {
            notes.duplicates += std::max<std::int64_t>(listed[0] - 1, 0) + std::max<std::int64_t>(listed[1] - 1, 0);
            notes.both_ways += both;
            notes.unequal += both && static_cast<float>(sums[0]) != static_cast<float>(sums[1]);
        }
        const double sum = sums[0] + sums[1];
        *out++ = {row, 2 * column, static_cast<float>(both ? sum / 2 : sum)};
    }
    return out - first;
}

void check_sums(const Graph& g) {
    for (std::int64_t i = 0; i < g.nodes; ++i)
        for (std::int64_t k = g.offsets[static_cast<Size>(i)]; k < g.offsets[static_cast<Size>(i) + 1]; ++k)
            if (!std::isfinite(g.weights[static_cast<Size>(k)]))
                input_error("edge ({}, {}): the sum of its duplicates is beyond float; scale the weights down", i,
                            g.columns[static_cast<Size>(k)]);
}

}  // namespace

Graph build_graph(std::int64_t nodes, std::vector<Edge> edges, GraphNotes* notes_out) {
    if (nodes < 0 || nodes > std::numeric_limits<std::int32_t>::max())
        input_error("a graph of {} nodes: must be from 0 to 2147483647; split the graph", nodes);
    check_edges(nodes, edges);
    GraphNotes notes;
    notes.lines = static_cast<std::int64_t>(edges.size());
    const RowRanges ranges(nodes);
    std::vector<std::int64_t> starts;
    std::vector<HalfEdge> halves = split_by_range(ranges, edges, starts, notes);

    Graph g;
    g.nodes = nodes;
    g.offsets.assign(static_cast<Size>(nodes) + 1, 0);
    std::vector<std::int64_t> kept(static_cast<Size>(ranges.count));
    std::vector<GraphNotes> range_notes(kept.size());
    parallel_for_uneven(threads_for(notes.lines), ranges.count, [&](std::int64_t r) {
        const auto i = static_cast<Size>(r);
        HalfEdge* first = halves.data() + starts[i];
        kept[i] = join_equal(first, halves.data() + starts[i + 1], range_notes[i]);
        for (std::int64_t k = 0; k < kept[i]; ++k) ++g.offsets[first[k].row + 1];
    });
    for (const GraphNotes& n : range_notes) {
        notes.duplicates += n.duplicates;
        notes.both_ways += n.both_ways;
        notes.unequal += n.unequal;
    }
    std::partial_sum(g.offsets.begin(), g.offsets.end(), g.offsets.begin());

    g.columns.resize(static_cast<Size>(g.offsets.back()));
    g.weights.resize(g.columns.size());
    int finite = 1;
#pragma omp parallel for schedule(dynamic, 1) reduction(& : finite) if (notes.lines >= kSmall)
    for (std::int64_t r = 0; r < ranges.count; ++r) {
        const HalfEdge* from = halves.data() + starts[static_cast<Size>(r)];
        auto to = static_cast<Size>(g.offsets[static_cast<Size>(r << ranges.shift)]);
        for (std::int64_t k = 0; k < kept[static_cast<Size>(r)]; ++k, ++to) {
            g.columns[to] = static_cast<std::int32_t>(from[k].column());
            g.weights[to] = from[k].weight;
            finite &= std::isfinite(from[k].weight) ? 1 : 0;
        }
    }
    if (!finite) check_sums(g);
    if (notes_out) *notes_out = notes;
    return g;
}

namespace {

constexpr std::int64_t kHub =
    100;  // times the mean number of neighbours: a node from where most of a graph may be near

// Union by the smaller number, without locks: a root's parent is itself, any other node's a smaller node, so whatever the
// order of the links, what remains is one root for each component, its smallest node.
class Forest {
  public:
    explicit Forest(std::vector<std::int32_t>& parent) : parent_(parent) {}
    std::int32_t up(std::int32_t i) const { return at(i).load(std::memory_order_relaxed); }
    void link(std::int32_t i, std::int32_t j) const {
        std::int32_t a = up(i), b = up(j);
        while (a != b) {
            const std::int32_t low = std::min(a, b);
            std::int32_t high = std::max(a, b), expected = high;
            if (at(high).compare_exchange_strong(expected, low, std::memory_order_relaxed) || expected == low) return;
            a = up(expected), b = up(low);  // high is no root any more: go on from above it
        }
    }
    void compress(std::int32_t i) const {  // the root becomes the parent
        std::int32_t root = up(i);
        while (up(root) != root) root = up(root);
        at(i).store(root, std::memory_order_relaxed);
    }

  private:
    std::atomic_ref<std::int32_t> at(std::int32_t i) const {
        return std::atomic_ref<std::int32_t>(parent_[static_cast<Size>(i)]);
    }
    std::vector<std::int32_t>& parent_;
};

// Nodes within a few steps of the one with the most neighbours, where these are most nodes, as in networks with hubs: their
// parent is the smallest of them. False: they are not, and nothing is done. Nodes look for a neighbour that is found
// already, in whatever state the others are: a sweep finds one step or more, and the forest's result is the same.
template <class ForNodes>
bool join_around_hub(const Graph& g, std::vector<std::int32_t>& parent, const ForNodes& for_nodes) {
    constexpr int kSweeps = 8;
    const auto degree = [&](std::int64_t i) { return g.offsets[Size(i) + 1] - g.offsets[Size(i)]; };
    std::int64_t hub = 0;
    for (std::int64_t i = 1; i < g.nodes; ++i)
        if (degree(i) > degree(hub)) hub = i;
    if (degree(hub) * g.nodes < kHub * std::int64_t(g.columns.size())) return false;
    std::vector<std::uint8_t> found(parent.size(), 0);
    found[Size(hub)] = 1;
    std::int64_t count = 1;
    for (int sweep = 0, going = 1; sweep < kSweeps && going; ++sweep) {
        for_nodes([&](std::int32_t i) {
            const auto at = [&](std::int32_t j) { return std::atomic_ref<std::uint8_t>(found[Size(j)]); };
            if (at(i).load(std::memory_order_relaxed)) return;
            for (auto k = g.offsets[Size(i)]; k < g.offsets[Size(i) + 1]; ++k)
                if (at(g.columns[Size(k)]).load(std::memory_order_relaxed)) {
                    at(i).store(1, std::memory_order_relaxed);
                    return;
                }
        });
        const auto now = std::int64_t(std::count(found.begin(), found.end(), 1));
        going = now - count > g.nodes / 64;
        count = now;
    }
    if (count < g.nodes / 2) return false;
    const auto first = std::int32_t(std::find(found.begin(), found.end(), 1) - found.begin());
    for_nodes([&](std::int32_t i) {
        if (found[Size(i)]) parent[Size(i)] = first;
    });
    return true;
}

// Of a sample of nodes, the root that most of them have.
std::int32_t frequent_root(const std::vector<std::int32_t>& parent) {
    constexpr Size kSamples = 1024;
    std::vector<std::int32_t> roots;
    for (Size k = 0; k < kSamples; ++k) roots.push_back(parent[k * parent.size() / kSamples]);
    std::sort(roots.begin(), roots.end());
    std::int32_t best = roots[0];
    Size most = 0;
    for (Size first = 0, last = 0; first < kSamples; first = last) {
        while (last < kSamples && roots[last] == roots[first]) ++last;
        if (last - first > most) most = last - first, best = roots[first];
    }
    return best;
}

}  // namespace

// Afforest (Sutton, Ben-Nun, Barak 2018): two edges of every node join most of what belongs together; of the component
// that most nodes are in by then, no other edge needs to be looked at, as the nodes outside it list theirs to it too. Where
// there are hubs, a few steps from the largest do that better: the first edges of nodes in random order make long chains.
Components find_components(const Graph& g) {
    constexpr std::int64_t kFirst = 2;
    Components c;
    if (g.nodes == 0) return c;
    c.of_node.resize(static_cast<Size>(g.nodes));
    std::vector<std::int32_t>& parent = c.of_node;
    const Forest forest(parent);
    const Cpu cpu = threads_for(g.nodes);
    const auto for_nodes = [&](auto&& body) {
        constexpr std::int64_t kChunk = 1024;
        parallel_for_uneven(cpu, (g.nodes + kChunk - 1) / kChunk, [&](std::int64_t chunk) {
            const std::int64_t last = std::min((chunk + 1) * kChunk, g.nodes);
            for (std::int64_t i = chunk * kChunk; i < last; ++i) body(static_cast<std::int32_t>(i));
        });
    };
    const auto link = [&](std::int32_t i, std::int64_t first, std::int64_t last) {
        const std::int64_t begin = g.offsets[static_cast<Size>(i)], end = g.offsets[static_cast<Size>(i) + 1];
        for (std::int64_t k = begin + first; k < std::min(end, last < 0 ? end : begin + last); ++k)
            forest.link(i, g.columns[static_cast<Size>(k)]);
    };
    for_nodes([&](std::int32_t i) { parent[static_cast<Size>(i)] = i; });
    const std::int64_t first = join_around_hub(g, parent, for_nodes) ? 0 : kFirst;
    for (std::int64_t k = 0; k < first; ++k) {
        for_nodes([&](std::int32_t i) { link(i, k, k + 1); });
        for_nodes([&](std::int32_t i) { forest.compress(i); });
    }
    const std::int32_t largest = frequent_root(parent);
    for_nodes([&](std::int32_t i) {
        if (forest.up(i) != largest) link(i, first, -1);
    });
    for_nodes([&](std::int32_t i) { forest.compress(i); });
    // Roots are the smallest nodes of their components and parents come first: one ascending pass numbers all.
    for (Size i = 0; i < parent.size(); ++i) {
        const bool root = parent[i] == static_cast<std::int32_t>(i);
        if (root) c.sizes.push_back(0);
        c.of_node[i] = root ? c.count++ : c.of_node[static_cast<Size>(parent[i])];
        ++c.sizes[static_cast<Size>(c.of_node[i])];
    }
    return c;
}

GraphStatistics statistics_of(const Graph& g, const Components& c) {
    GraphStatistics s;
    s.nodes = g.nodes;
    s.edges = g.edges();
    s.components = c.count;
    for (const std::int64_t size : c.sizes) s.largest_component = std::max(s.largest_component, size);
    if (g.nodes == 0) return s;

    std::vector<std::int64_t> degrees(static_cast<Size>(g.nodes));
    s.weight_min = s.edges > 0 ? std::numeric_limits<double>::infinity() : 0;
    for (Size i = 0; i < degrees.size(); ++i) {
        degrees[i] = g.offsets[i + 1] - g.offsets[i];
        s.isolated += degrees[i] == 0;
        for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k) {
            const auto apart = static_cast<std::int64_t>(i) - g.columns[k];
            if (apart <= 0) break;  // each edge once
            const double w = g.weights[k];
            s.bandwidth = std::max(s.bandwidth, apart);
            s.weight_min = std::min(s.weight_min, w);
            s.weight_max = std::max(s.weight_max, w);
            s.weight_sum += w;
        }
    }
    s.degree_mean = 2.0 * static_cast<double>(s.edges) / static_cast<double>(g.nodes);
    const auto middle = degrees.begin() + static_cast<std::ptrdiff_t>((degrees.size() - 1) / 2);
    std::nth_element(degrees.begin(), middle, degrees.end());
    s.degree_median = *middle;
    s.degree_min = *std::min_element(degrees.begin(), middle + 1);
    s.degree_max = *std::max_element(middle, degrees.end());
    return s;
}

std::string GraphStatistics::text() const {
    const auto n = [](std::int64_t value) { return fmt::group_digits(value); };
    std::string text = fmt::format("nodes {}, edges {}, isolated {}\ncomponents {} (largest {})", n(nodes), n(edges),
                                   n(isolated), n(components), n(largest_component)) +
                       fmt::format("\ndegree min {}, median {}, mean {:.4g}, max {}, bandwidth {}", n(degree_min),
                                   n(degree_median), degree_mean, n(degree_max), n(bandwidth));
    if (edges == 0) return text;
    const bool all_equal = weight_min == weight_max;
    return text + (all_equal ? fmt::format("\nweights all {:.6g}", weight_min)
                             : fmt::format("\nweights min {:.6g}, mean {:.6g}, max {:.6g}", weight_min,
                                           weight_sum / static_cast<double>(edges), weight_max));
}

const char* name_of(LaplacianKind kind) {
    return kind == LaplacianKind::combinatorial ? "combinatorial" : "normalised";
}

namespace {

// d_i in double, each summed in the order of its row.
RawVector<double> degrees_of(const Graph& g) {
    RawVector<double> degrees;
    degrees.resize(static_cast<Size>(g.nodes));
    parallel_for(threads_for(g.nodes + g.edges()), g.nodes, [&](std::int64_t row) {
        const auto i = static_cast<Size>(row);
        double sum = 0;
        for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k)
            sum += g.weights[k];
        degrees[i] = sum;
    });
    return degrees;
}

// Of all edges; 0: there is none.
float equal_weight(const Graph& g) {
    if (g.weights.empty()) return 0;
    const float first = g.weights[0];
    bool equal = true;
#pragma omp parallel for schedule(static) reduction(&& : equal) if (g.nodes + g.edges() >= kSmall)
    for (std::int64_t k = 0; k < std::int64_t(g.weights.size()); ++k) equal = equal && g.weights[Size(k)] == first;
    return equal ? first : 0;
}

template <class A>
LaplacianMatrix<A> laplacian_with(const Graph& g, const RawVector<double>& degrees, std::span<const double> masses) {
    LaplacianMatrix<A> m;
    m.nodes = g.nodes;
    m.offsets.resize(static_cast<Size>(g.nodes) + 1);
    m.columns.resize(g.columns.size() + static_cast<Size>(g.nodes));
    m.values.resize(m.columns.size());
    m.null_weight.resize(static_cast<Size>(g.nodes));
    m.offsets.back() = static_cast<std::int64_t>(m.columns.size());

    double most = 0;  // row sum of |L|, over rows (Gershgorin)
#pragma omp parallel for schedule(static) reduction(max : most) if (g.nodes + g.edges() >= kSmall)
    for (std::int64_t row = 0; row < g.nodes; ++row) {
        const auto i = static_cast<Size>(row);
        m.offsets[i] = g.offsets[i] + row;  // one diagonal in each row before
        m.null_weight[i] = static_cast<A>(std::sqrt(masses[i]));
        auto to = static_cast<Size>(m.offsets[i]);
        const double diagonal = degrees[i] / masses[i];
        double sum = diagonal;
        const auto put = [&](std::int64_t column, double value) {
            m.columns[to] = static_cast<std::int32_t>(column);
            m.values[to++] = static_cast<A>(value);
        };
        bool placed = false;
        for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k) {
            const std::int32_t j = g.columns[k];
            if (!placed && j > row) put(row, diagonal), placed = true;
            const double value = g.weights[k] / std::sqrt(masses[i] * masses[static_cast<Size>(j)]);
            put(j, -value);
            sum += value;
        }
        if (!placed) put(row, diagonal);
        most = std::max(most, sum);
    }
    m.upper_bound = most;
    return m;
}

}  // namespace

template <class A>
LaplacianMatrix<A> laplacian_of(const Graph& g, LaplacianKind kind) {
    const RawVector<double> degrees = degrees_of(g);
    RawVector<double> masses;
    masses.resize(degrees.size());
    parallel_for(threads_for(g.nodes), g.nodes, [&](std::int64_t i) {
        const double degree = degrees[static_cast<Size>(i)];
        masses[static_cast<Size>(i)] = kind == LaplacianKind::normalised && degree > 0 ? degree : 1;
    });
    for (Size i = 0; kind == LaplacianKind::combinatorial && i < degrees.size(); ++i)
        if (degrees[i] > std::numeric_limits<A>::max())
            input_error("node {}: its weights add up to {:.4g}, beyond float; scale the weights down", i, degrees[i]);
    LaplacianMatrix<A> m = laplacian_with<A>(g, degrees, masses);
    if (kind == LaplacianKind::normalised) m.upper_bound = 2;
    m.kind = kind;
    m.equal_weight = equal_weight(g);
    return m;
}
template <class A>
LaplacianMatrix<A> laplacian_of(const Graph& g, const std::vector<double>& masses) {
    return laplacian_with<A>(g, degrees_of(g), masses);
}
template LaplacianMatrix<float> laplacian_of<float>(const Graph&, LaplacianKind);
template LaplacianMatrix<double> laplacian_of<double>(const Graph&, LaplacianKind);
template LaplacianMatrix<float> laplacian_of<float>(const Graph&, const std::vector<double>&);
template LaplacianMatrix<double> laplacian_of<double>(const Graph&, const std::vector<double>&);

namespace {

// Rows `order` of g with columns renumbered by `number`, sorted again.
Graph take_rows(const Graph& g, const std::vector<std::int32_t>& order, std::span<const std::int32_t> number) {
    Graph out;
    out.nodes = static_cast<std::int64_t>(order.size());
    out.offsets.assign(order.size() + 1, 0);
    parallel_for(threads_for(out.nodes), out.nodes, [&](std::int64_t i) {
        const auto old = static_cast<Size>(order[static_cast<Size>(i)]);
        out.offsets[static_cast<Size>(i) + 1] = g.offsets[old + 1] - g.offsets[old];
    });
    std::partial_sum(out.offsets.begin(), out.offsets.end(), out.offsets.begin());
    for (Size i = 0; !g.names.empty() && i < order.size(); ++i)
        out.names.push_back(g.names[static_cast<Size>(order[i])]);
    out.columns.resize(static_cast<Size>(out.offsets.back()));
    out.weights.resize(out.columns.size());
#pragma omp parallel if (out.nodes + g.edges() >= kSmall)
    {
        std::vector<std::pair<std::int32_t, float>> row;
#pragma omp for schedule(static)
        for (std::int64_t r = 0; r < out.nodes; ++r) {
            const auto i = static_cast<Size>(r), old = static_cast<Size>(order[i]);
            row.clear();
            for (auto k = static_cast<Size>(g.offsets[old]); k < static_cast<Size>(g.offsets[old + 1]); ++k)
                row.emplace_back(number[static_cast<Size>(g.columns[k])], g.weights[k]);
            std::sort(row.begin(), row.end());  // no column twice: the weights are never compared
            auto to = static_cast<Size>(out.offsets[i]);
            for (const auto& [column, weight] : row) {
                out.columns[to] = column;
                out.weights[to++] = weight;
            }
        }
    }
    return out;
}

}  // namespace

Graph permute(const Graph& g, const std::vector<std::int32_t>& order) {
    std::vector<std::int32_t> number(static_cast<Size>(g.nodes), -1);
    if (order.size() != number.size())
        input_error("an order of {} nodes for a graph of {}; give each node once", order.size(), g.nodes);
    for (Size i = 0; i < order.size(); ++i) {
        const std::int32_t old = order[i];
        if (old < 0 || old >= g.nodes || number[static_cast<Size>(old)] >= 0)
            input_error(
                "an order with node {} at place {}, which is outside the graph or there twice; give each node once",
                old, i);
        number[static_cast<Size>(old)] = static_cast<std::int32_t>(i);
    }
    return take_rows(g, order, number);
}

Graph keep_nodes(const Graph& g, const std::vector<std::int32_t>& kept) {
    RawVector<std::int32_t> number;  // of those left out: not read
    number.resize(static_cast<Size>(g.nodes));
    for (Size i = 0; i < kept.size(); ++i) number[static_cast<Size>(kept[i])] = static_cast<std::int32_t>(i);
    return take_rows(g, kept, number);
}

Graph largest_component(const Graph& g, const Components& c, std::vector<std::int32_t>& kept) {
    kept.clear();
    if (g.nodes == 0) return g;
    const auto largest = static_cast<std::int32_t>(std::max_element(c.sizes.begin(), c.sizes.end()) - c.sizes.begin());
    for (std::int32_t i = 0; i < g.nodes; ++i)
        if (c.of_node[static_cast<Size>(i)] == largest) kept.push_back(i);
    return keep_nodes(g, kept);
}

}  // namespace fiedler
