// Aggregated graphs and breadth-first order: what is promised of them, and that threads do not matter.
#include "engine/coarsen.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <deque>
#include <map>
#include <numeric>

#include "engine/rng.h"
#include "kernels/device.h"

namespace fiedler {
namespace {

using Size = std::size_t;

// Two components of random edges, whose fronts are thousands of nodes wide, a long cycle, and isolated nodes.
Graph wide_graph(std::uint64_t seed) {
    constexpr std::int32_t kRandom = 60000, kCycle = 40000, kIsolated = 7;
    std::vector<Edge> edges;
    for (std::uint64_t i = 0; i < 180000; ++i) {
        const auto a = static_cast<std::int32_t>(rng::below(kRandom / 2, seed, 1, i));
        const auto b = static_cast<std::int32_t>(rng::below(kRandom / 2, seed, 2, i));
        const auto weight = 0.5f + static_cast<float>(rng::uniform(seed, 3, i));
        edges.push_back({2 * a, 2 * b, weight});
        edges.push_back({2 * a + 1, 2 * b + 1, weight});
    }
    for (std::int32_t i = 0; i < kCycle; ++i) edges.push_back({kRandom + i, kRandom + (i + 1) % kCycle, 1});
    return build_graph(kRandom + kCycle + kIsolated, edges);
}

class Threads {  // as many as are asked for, whatever the machine has
  public:
    explicit Threads(int n) : before_(omp_get_max_threads()) { omp_set_num_threads(n); }
    ~Threads() { omp_set_num_threads(before_); }
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

  private:
    int before_;
};

std::vector<std::int32_t> plain_search(const Graph& g) {
    std::vector<std::int32_t> order;
    std::vector<bool> reached(static_cast<Size>(g.nodes), false);
    for (std::int32_t start = 0; start < g.nodes; ++start) {
        if (reached[static_cast<Size>(start)]) continue;
        std::deque<std::int32_t> queue{start};
        reached[static_cast<Size>(start)] = true;
        while (!queue.empty()) {
            const auto i = static_cast<Size>(queue.front());
            order.push_back(queue.front());
            queue.pop_front();
            for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k)
                if (!reached[static_cast<Size>(g.columns[k])]) {
                    reached[static_cast<Size>(g.columns[k])] = true;
                    queue.push_back(g.columns[k]);
                }
        }
    }
    return order;
}

TEST(Coarsen, BreadthFirstOrderIsThatOfAQueue) {
    const Graph g = wide_graph(1);
    const Components components = find_components(g);
    const std::vector<std::int32_t> expected = plain_search(g);
    for (const int threads : {1, 2, 5}) {
        const Threads these(threads);
        EXPECT_EQ(breadth_first_order(g, components), expected) << threads << " threads";
    }
}

TEST(Coarsen, GroupsPartitionComponentsInOrder) {
    Graph g = wide_graph(2);
    g = keep_nodes(g, breadth_first_order(g, find_components(g)));
    const Components components = find_components(g);
    std::vector<double> masses(static_cast<Size>(g.nodes));
    for (Size i = 0; i < masses.size(); ++i) masses[i] = 1 + double(i % 7);
    const CoarseGraph c = coarsen(g, masses);
    ASSERT_EQ(c.group.size(), masses.size());
    EXPECT_LT(c.graph.nodes, g.nodes * 6 / 10);
    std::vector<double> sums(static_cast<Size>(c.graph.nodes), 0.0);
    std::vector<std::int32_t> component(static_cast<Size>(c.graph.nodes), -1);
    std::int32_t next = 0;
    for (Size i = 0; i < masses.size(); ++i) {
        const auto group = static_cast<Size>(c.group[i]);
        ASSERT_LT(c.group[i], c.graph.nodes);
        sums[group] += masses[i];
        const std::int32_t own = components.of_node[i];
        ASSERT_TRUE(component[group] < 0 || component[group] == own) << "a group in two components";
        component[group] = own;
        if (c.group[i] == next) ++next;
    }
    EXPECT_EQ(next, c.graph.nodes) << "groups are not numbered by their first nodes";
    EXPECT_TRUE(std::is_sorted(component.begin(), component.end()));
    for (Size a = 0; a < sums.size(); ++a) ASSERT_DOUBLE_EQ(c.masses[a], sums[a]);
}

TEST(Coarsen, WeightsBetweenGroupsAddUp) {
    const Graph g = wide_graph(3);
    const CoarseGraph c = coarsen(g, std::vector<double>(static_cast<Size>(g.nodes), 1.0));
    std::map<std::pair<std::int32_t, std::int32_t>, double> expected;
    for (Size i = 0; i < static_cast<Size>(g.nodes); ++i)
        for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k) {
            const std::int32_t a = c.group[i], b = c.group[static_cast<Size>(g.columns[k])];
            if (a != b) expected[{a, b}] += g.weights[k];
        }
    ASSERT_EQ(c.graph.columns.size(), expected.size());
    auto entry = expected.begin();
    for (Size a = 0; a < static_cast<Size>(c.graph.nodes); ++a)
        for (auto k = static_cast<Size>(c.graph.offsets[a]); k < static_cast<Size>(c.graph.offsets[a + 1]); ++k) {
            ASSERT_EQ(entry->first, std::pair(static_cast<std::int32_t>(a), c.graph.columns[k]));
            ASSERT_NEAR(entry->second, c.graph.weights[k], 1e-5 * entry->second);
            ++entry;
        }
}

TEST(Coarsen, ThreadsDoNotMatter) {
    const Graph g = wide_graph(4);
    const std::vector<double> masses(static_cast<Size>(g.nodes), 1.0);
    const auto with = [&](int threads) {
        const Threads these(threads);
        return coarsen(g, masses);
    };
    const CoarseGraph one = with(1);
    for (const int threads : {2, 5}) {
        const CoarseGraph many = with(threads);
        EXPECT_EQ(many.group, one.group);
        EXPECT_EQ(many.graph.offsets, one.graph.offsets);
        EXPECT_EQ(many.graph.columns, one.graph.columns);
        EXPECT_EQ(many.graph.weights, one.graph.weights);
    }
}

}  // namespace
}  // namespace fiedler
