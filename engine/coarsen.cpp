#include "engine/coarsen.h"

#include <algorithm>

#include "kernels/parallel.h"

namespace fiedler {
namespace {

using Size = std::size_t;

// Seeds in the order of the nodes, so that the groups of a component are numbered one after the other.
std::vector<std::int32_t> group_nodes(const Graph& g, std::int32_t& groups) {
    std::vector<std::int32_t> group(static_cast<Size>(g.nodes), -1);
    groups = 0;
    std::int32_t chosen[kAggregateSize] = {};
    float strength[kAggregateSize] = {};
    for (Size i = 0; i < group.size(); ++i) {
        if (group[i] >= 0) continue;
        const auto first = static_cast<Size>(g.offsets[i]), last = static_cast<Size>(g.offsets[i + 1]);
        int count = 0;  // the strongest free neighbours, strongest first; of equals the one with the smaller number
        for (Size k = first; k < last; ++k) {
            if (group[static_cast<Size>(g.columns[k])] >= 0) continue;
            int at = count < kAggregateSize - 1 ? count++ : kAggregateSize - 1;
            if (at == kAggregateSize - 1 && g.weights[k] <= strength[at - 1]) continue;
            if (at == kAggregateSize - 1) --at;
            for (; at > 0 && g.weights[k] > strength[at - 1]; --at) {
                chosen[at] = chosen[at - 1];
                strength[at] = strength[at - 1];
            }
            chosen[at] = g.columns[k];
            strength[at] = g.weights[k];
        }
        if (count == 0 && last > first) continue;  // joins a neighbour's group below
        group[i] = groups;
        for (int k = 0; k < count; ++k) group[static_cast<Size>(chosen[k])] = groups;
        ++groups;
    }
    std::vector<std::int32_t> left;
    for (Size i = 0; i < group.size(); ++i) {
        if (group[i] >= 0) continue;
        Size best = static_cast<Size>(g.offsets[i]);  // all its neighbours have groups, else it would have one
        for (auto k = best; k < static_cast<Size>(g.offsets[i + 1]); ++k)
            if (g.weights[k] > g.weights[best]) best = k;
        left.push_back(g.columns[best]);
    }
    Size at = 0;
    for (std::int32_t& of_node : group)
        if (of_node < 0) of_node = -2 - left[at++];  // not yet: whom a node joins must not depend on who joined before
    for (std::int32_t& of_node : group)
        if (of_node < -1) of_node = group[static_cast<Size>(-2 - of_node)];
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

std::vector<std::int32_t> breadth_first_order(const Graph& g, const Components& components) {
    std::vector<std::int32_t> order;
    order.reserve(static_cast<Size>(g.nodes));
    std::vector<char> reached(static_cast<Size>(g.nodes), 0);
    std::int32_t next_component = 0;
    for (Size start = 0; start < reached.size(); ++start) {
        if (components.of_node[start] != next_component) continue;  // numbered by their first nodes
        ++next_component;
        order.push_back(static_cast<std::int32_t>(start));
        reached[start] = 1;
        for (Size at = order.size() - 1; at < order.size(); ++at) {
            const auto i = static_cast<Size>(order[at]);
            for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k) {
                const auto j = static_cast<Size>(g.columns[k]);
                if (reached[j]) continue;
                reached[j] = 1;
                order.push_back(g.columns[k]);
            }
        }
    }
    return order;
}

}  // namespace fiedler
