#include "engine/coarsen.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>

#include "kernels/parallel.h"

namespace fiedler {
namespace {

using Size = std::size_t;

// Nodes of a range are grouped among themselves, ranges side by side. Fixed, so that the result does not depend on the
// number of threads.
constexpr std::int64_t kRange = 32768;

// The strongest free neighbours of node i within [first, last), strongest first; of equals the one with the smaller number.
int free_neighbours(const Graph& g, const std::vector<std::int32_t>& group, std::int64_t i, std::int64_t first,
                    std::int64_t last, std::int32_t (&chosen)[kAggregateSize]) {
    float strength[kAggregateSize] = {};
    int count = 0;
    for (auto k = static_cast<Size>(g.offsets[static_cast<Size>(i)]);
         k < static_cast<Size>(g.offsets[static_cast<Size>(i) + 1]); ++k) {
        const std::int32_t j = g.columns[k];
        if (j < first || j >= last || group[static_cast<Size>(j)] >= 0) continue;
        int at = count < kAggregateSize - 1 ? count++ : kAggregateSize - 1;
        if (at == kAggregateSize - 1 && g.weights[k] <= strength[at - 1]) continue;
        if (at == kAggregateSize - 1) --at;
        for (; at > 0 && g.weights[k] > strength[at - 1]; --at) {
            chosen[at] = chosen[at - 1];
            strength[at] = strength[at - 1];
        }
        chosen[at] = j;
        strength[at] = g.weights[k];
    }
    return count;
}

// The strongest neighbour of node i within [first, last) that has a group; -1: there is none.
std::int32_t grouped_neighbour(const Graph& g, const std::vector<std::int32_t>& group, std::int64_t i,
                               std::int64_t first, std::int64_t last) {
    std::int32_t best = -1;
    float strength = 0;
    for (auto k = static_cast<Size>(g.offsets[static_cast<Size>(i)]);
         k < static_cast<Size>(g.offsets[static_cast<Size>(i) + 1]); ++k) {
        const std::int32_t j = g.columns[k];
        if (j < first || j >= last || group[static_cast<Size>(j)] < 0 || g.weights[k] <= strength) continue;
        best = j;
        strength = g.weights[k];
    }
    return best;
}

// Groups the nodes of a range, numbered from 0 in the order of their seeds; returns how many there are. A node without free
// neighbours joins its strongest neighbour's group, or, if all its neighbours are of other ranges, is a group of its own.
std::int32_t group_range(const Graph& g, std::int64_t first, std::int64_t last, std::vector<std::int32_t>& group) {
    std::int32_t groups = 0, chosen[kAggregateSize] = {};
    std::vector<std::int32_t> left;
    for (std::int64_t i = first; i < last; ++i) {
        if (group[static_cast<Size>(i)] >= 0) continue;
        const int count = free_neighbours(g, group, i, first, last, chosen);
        if (count == 0 && grouped_neighbour(g, group, i, first, last) >= 0) {
            left.push_back(static_cast<std::int32_t>(i));
            continue;
        }
        group[static_cast<Size>(i)] = groups;
        for (int k = 0; k < count; ++k) group[static_cast<Size>(chosen[k])] = groups;
        ++groups;
    }
    std::vector<std::int32_t> joined;  // all at once: whom a node joins must not depend on who joined before
    for (const std::int32_t i : left)
        joined.push_back(group[static_cast<Size>(grouped_neighbour(g, group, i, first, last))]);
    for (Size k = 0; k < left.size(); ++k) group[static_cast<Size>(left[k])] = joined[k];
    return groups;
}

// Seeds in the order of the nodes, so that the groups of a component are numbered one after the other.
std::vector<std::int32_t> group_nodes(const Graph& g, std::int32_t& groups) {
    std::vector<std::int32_t> group(static_cast<Size>(g.nodes), -1);
    const std::int64_t ranges = (g.nodes + kRange - 1) / kRange;
    std::vector<std::int32_t> before(static_cast<Size>(ranges) + 1, 0);  // groups of the ranges before
    const auto last_of = [&](std::int64_t r) { return std::min((r + 1) * kRange, g.nodes); };
    parallel_for_uneven(Cpu{}, ranges, [&](std::int64_t r) {
        before[static_cast<Size>(r) + 1] = group_range(g, r * kRange, last_of(r), group);
    });
    std::partial_sum(before.begin(), before.end(), before.begin());
    parallel_for(Cpu{}, ranges, [&](std::int64_t r) {
        for (std::int64_t i = r * kRange; i < last_of(r); ++i)
            group[static_cast<Size>(i)] += before[static_cast<Size>(r)];
    });
    groups = before.back();
    return group;
}

struct Members {  // of every group, ascending
    std::vector<std::int64_t> offsets;
    std::vector<std::int32_t> nodes;
    Members(const std::vector<std::int32_t>& group, std::int32_t groups)
        : offsets(static_cast<Size>(groups) + 1, 0), nodes(group.size()) {
        for (const std::int32_t a : group) ++offsets[static_cast<Size>(a) + 1];
        for (Size a = 0; a < static_cast<Size>(groups); ++a) offsets[a + 1] += offsets[a];
        std::vector<std::int64_t> at(offsets.begin(), offsets.end() - 1);
        for (Size i = 0; i < group.size(); ++i)
            nodes[static_cast<Size>(at[static_cast<Size>(group[i])]++)] = static_cast<std::int32_t>(i);
    }
};

// Rows [first, last) of the aggregated graph, appended to the given lists. seen: scratch, [groups] of -1, left as found.
void add_rows(const Graph& g, const std::vector<std::int32_t>& group, const Members& members, std::int64_t first,
              std::int64_t last, std::vector<std::int32_t>& seen, std::vector<std::int64_t>& counts,
              std::vector<std::int32_t>& columns, std::vector<float>& weights) {
    std::vector<std::pair<std::int32_t, double>> row;
    for (std::int64_t a = first; a < last; ++a) {
        row.clear();
        for (auto m = members.offsets[static_cast<Size>(a)]; m < members.offsets[static_cast<Size>(a) + 1]; ++m) {
            const auto i = static_cast<Size>(members.nodes[static_cast<Size>(m)]);
            for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k) {
                const std::int32_t b = group[static_cast<Size>(g.columns[k])];
                if (b == a) continue;
                std::int32_t& place = seen[static_cast<Size>(b)];
                if (place < 0) {
                    place = static_cast<std::int32_t>(row.size());
                    row.emplace_back(b, 0.0);
                }
                row[static_cast<Size>(place)].second += g.weights[k];
            }
        }
        for (const auto& entry : row) seen[static_cast<Size>(entry.first)] = -1;
        std::sort(row.begin(), row.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
        counts.push_back(static_cast<std::int64_t>(row.size()));
        for (const auto& [column, weight] : row) {
            columns.push_back(column);
            weights.push_back(static_cast<float>(weight));
        }
    }
}

Graph contract(const Graph& g, const std::vector<std::int32_t>& group, std::int32_t groups) {
    const Members members(group, groups);
    const int threads = thread_count(Cpu{});
    const std::int64_t parts = std::min<std::int64_t>(groups, threads);  // the result does not depend on it
    std::vector<std::vector<std::int64_t>> counts(static_cast<Size>(parts));
    std::vector<std::vector<std::int32_t>> columns(counts.size());
    std::vector<std::vector<float>> weights(counts.size());
    parallel_for(Cpu{}, parts, [&](std::int64_t p) {
        const auto i = static_cast<Size>(p);
        std::vector<std::int32_t> seen(static_cast<Size>(groups), -1);
        add_rows(g, group, members, groups * p / parts, groups * (p + 1) / parts, seen, counts[i], columns[i],
                 weights[i]);
    });
    Graph out;
    out.nodes = groups;
    out.offsets.reserve(static_cast<Size>(groups) + 1);
    std::vector<std::int64_t> at(counts.size());
    for (Size p = 0; p < counts.size(); ++p) {
        at[p] = out.offsets.back();
        for (const std::int64_t n : counts[p]) out.offsets.push_back(out.offsets.back() + n);
    }
    out.columns.resize(static_cast<Size>(out.offsets.back()));
    out.weights.resize(out.columns.size());
    parallel_for(Cpu{}, parts, [&](std::int64_t p) {
        const auto i = static_cast<Size>(p);
        std::copy(columns[i].begin(), columns[i].end(), out.columns.begin() + at[i]);
        std::copy(weights[i].begin(), weights[i].end(), out.weights.begin() + at[i]);
        columns[i] = {}, weights[i] = {};
    });
    return out;
}

}  // namespace

CoarseGraph coarsen(const Graph& g, const std::vector<double>& masses) {
    CoarseGraph out;
    std::int32_t groups = 0;
    out.group = group_nodes(g, groups);
    out.graph = contract(g, out.group, groups);
    out.masses.assign(static_cast<Size>(groups), 0.0);
    for (Size i = 0; i < masses.size(); ++i) out.masses[static_cast<Size>(out.group[i])] += masses[i];
    return out;
}

std::vector<CoarseGraph> coarsen_all(const Graph& g, const std::vector<double>& masses, std::int64_t enough,
                                     std::int64_t least) {
    std::vector<CoarseGraph> levels;
    const Graph* finer = &g;
    const std::vector<double>* finer_masses = &masses;
    while (finer->nodes > enough) {
        CoarseGraph next = coarsen(*finer, *finer_masses);
        if (4 * next.graph.nodes > 3 * finer->nodes || next.graph.nodes < least) break;
        levels.push_back(std::move(next));
        finer = &levels.back().graph;
        finer_masses = &levels.back().masses;
    }
    return levels;
}

namespace {

constexpr std::int64_t kSerialFront = 512;  // nodes of a front that are not worth waking threads for

// Breadth-first search, front after front. A front's nodes are looked at side by side: each unreached neighbour is given
// to the node of the front that comes first, and follows the others of that node in the order of its row, which is the
// order in which one thread would have found them.
class BreadthFirst {
  public:
    explicit BreadthFirst(const Graph& g) : g_(g), finder_(static_cast<Size>(g.nodes)) {
        order_.reserve(finder_.size());
        parallel_for(Cpu{}, g.nodes, [&](std::int64_t i) { finder_[static_cast<Size>(i)] = kNobody; });
    }
    void search(std::int32_t start) {
        finder_[static_cast<Size>(start)] = 0;
        Size first = order_.size();
        order_.push_back(start);
        while (first < order_.size()) {
            const Size last = order_.size();
            if (last - first < static_cast<Size>(kSerialFront))
                for (Size at = first; at < last; ++at) follow(at);
            else
                follow_together(first, last);
            first = last;
        }
    }
    std::vector<std::int32_t> take() { return std::move(order_); }

  private:
    static constexpr std::int32_t kNobody = std::numeric_limits<std::int32_t>::max();

    template <class Body>
    void for_neighbours(Size at, Body&& body) const {
        const auto i = static_cast<Size>(order_[at]);
        for (auto k = static_cast<Size>(g_.offsets[i]); k < static_cast<Size>(g_.offsets[i + 1]); ++k)
            body(g_.columns[k]);
    }
    void follow(Size at) {
        for_neighbours(at, [&](std::int32_t j) {
            if (finder_[static_cast<Size>(j)] != kNobody) return;
            finder_[static_cast<Size>(j)] = static_cast<std::int32_t>(at);
            order_.push_back(j);
        });
    }
    void follow_together(Size first, Size last) {
        const auto count = static_cast<std::int64_t>(last - first);
        parallel_for(Cpu{}, count, [&](std::int64_t f) {  // the smallest place of a finder, among this front's
            const Size at = first + static_cast<Size>(f);
            for_neighbours(at, [&](std::int32_t j) {
                std::atomic_ref<std::int32_t> finder(finder_[static_cast<Size>(j)]);
                std::int32_t now = finder.load(std::memory_order_relaxed);
                while (now > static_cast<std::int32_t>(at) &&
                       !finder.compare_exchange_weak(now, static_cast<std::int32_t>(at), std::memory_order_relaxed)) {
                }
            });
        });
        const std::int64_t parts = std::min<std::int64_t>(count, 2 * thread_count(Cpu{}));
        std::vector<std::vector<std::int32_t>> found(static_cast<Size>(parts));
        parallel_for(Cpu{}, parts, [&](std::int64_t p) {
            for (std::int64_t f = count * p / parts; f < count * (p + 1) / parts; ++f) {
                const Size at = first + static_cast<Size>(f);
                for_neighbours(at, [&](std::int32_t j) {
                    if (finder_[static_cast<Size>(j)] == static_cast<std::int32_t>(at))
                        found[static_cast<Size>(p)].push_back(j);
                });
            }
        });
        for (const std::vector<std::int32_t>& part : found) order_.insert(order_.end(), part.begin(), part.end());
    }

    const Graph& g_;
    RawVector<std::int32_t> finder_;  // of each node: the place in the order of the node that found it
    std::vector<std::int32_t> order_;
};

}  // namespace

std::vector<std::int32_t> breadth_first_order(const Graph& g, const Components& components) {
    BreadthFirst search(g);
    std::int32_t next_component = 0;
    for (std::int32_t start = 0; next_component < components.count; ++start)
        if (components.of_node[static_cast<Size>(start)] == next_component) {  // numbered by their first nodes
            ++next_component;
            search.search(start);
        }
    return search.take();
}

}  // namespace fiedler
