#include "engine/graph.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Size = std::size_t;

std::vector<Edge> path_edges(std::int32_t n) {
    std::vector<Edge> edges;
    for (std::int32_t i = 0; i + 1 < n; ++i) edges.push_back({i, i + 1});
    return edges;
}

std::vector<Edge> random_edges(std::int32_t nodes, Size count, std::uint64_t seed) {
    std::vector<Edge> edges(count);
    for (Size i = 0; i < count; ++i) {
        const auto below = [&](std::uint64_t n, std::uint64_t stream) {
            return static_cast<std::int32_t>(rng::below(n, seed, stream, i));
        };
        const auto n = static_cast<std::uint64_t>(nodes);
        const bool hub = below(4, 3) == 0;  // a quarter of the edges have their end at node 0
        edges[i] = {below(n, 0), hub ? 0 : below(n, 1), static_cast<float>(below(8, 2)) * 0.37f};
    }
    return edges;
}

void expect_same(const Graph& a, const Graph& b) {
    EXPECT_EQ(a.nodes, b.nodes);
    EXPECT_EQ(a.offsets, b.offsets);
    EXPECT_EQ(a.columns, b.columns);
    EXPECT_EQ(a.weights, b.weights);
    EXPECT_EQ(a.names, b.names);
}

void expect_sound(const Graph& g) {
    ASSERT_EQ(g.offsets.size(), static_cast<Size>(g.nodes) + 1);
    ASSERT_EQ(g.offsets.back(), static_cast<std::int64_t>(g.columns.size()));
    std::map<std::pair<std::int64_t, std::int64_t>, float> weights;
    for (std::int64_t i = 0; i < g.nodes; ++i)
        for (auto k = static_cast<Size>(g.offsets[static_cast<Size>(i)]);
             k < static_cast<Size>(g.offsets[static_cast<Size>(i) + 1]); ++k) {
            EXPECT_NE(g.columns[k], i);
            EXPECT_TRUE(std::isfinite(g.weights[k]) && g.weights[k] > 0);
            EXPECT_TRUE(k == static_cast<Size>(g.offsets[static_cast<Size>(i)]) || g.columns[k - 1] < g.columns[k]);
            weights[{i, g.columns[k]}] = g.weights[k];
        }
    for (const auto& [ij, w] : weights) {
        const auto mirrored = weights.find({ij.second, ij.first});
        EXPECT_TRUE(mirrored != weights.end() && mirrored->second == w) << ij.first << " " << ij.second;
    }
}

using Dense = std::vector<std::vector<double>>;
template <class A>
Dense dense_of(const LaplacianMatrix<A>& l) {
    Dense d(static_cast<Size>(l.nodes), std::vector<double>(static_cast<Size>(l.nodes), 0));
    for (Size i = 0; i < d.size(); ++i)
        for (auto k = static_cast<Size>(l.offsets[i]); k < static_cast<Size>(l.offsets[i + 1]); ++k)
            d[i][static_cast<Size>(l.columns[k])] = static_cast<double>(l.values[k]);
    return d;
}

TEST(Graph, JoinsWhatIsListedTwiceAndSaysSo) {
    GraphNotes notes;
    const Graph g = build_graph(5,
                                {{0, 1, 1},
                                 {0, 1, 2},   // a duplicate: 3
                                 {1, 0, 1},   // both ways: (3 + 1) / 2 = 2
                                 {2, 1, 5},   // one way, from the larger node
                                 {2, 3, 4},   //
                                 {3, 2, 4},   // both ways, equal
                                 {2, 2, 9},   // self loop
                                 {3, 3, 0},   // self loop before zero
                                 {1, 3, 0}},  // zero
                                &notes);
    expect_sound(g);
    EXPECT_EQ(g.offsets, (std::vector<std::int64_t>{0, 1, 3, 5, 6, 6}));
    EXPECT_EQ(g.columns, (std::vector<std::int32_t>{1, 0, 2, 1, 3, 2}));
    EXPECT_EQ(g.weights, (std::vector<float>{2, 2, 5, 5, 4, 4}));
    EXPECT_EQ(g.edges(), 3);
    EXPECT_EQ(notes.lines, 9);
    EXPECT_EQ(notes.self_loops, 2);
    EXPECT_EQ(notes.zeros, 1);
    EXPECT_EQ(notes.duplicates, 1);
    EXPECT_EQ(notes.both_ways, 2);
    EXPECT_EQ(notes.unequal, 1);
}

TEST(Graph, AgreesWithAMapOfPairs) {
    constexpr std::int32_t kNodes = 57;
    const std::vector<Edge> edges = random_edges(kNodes, 700, 5);
    std::map<std::pair<int, int>, double> sums;
    GraphNotes expected;
    for (const Edge& e : edges) {
        if (e.from == e.to) {
            ++expected.self_loops;
        } else if (e.weight == 0) {
            ++expected.zeros;
        } else {
            expected.duplicates += sums.count({e.from, e.to}) ? 1 : 0;
            sums[{e.from, e.to}] += e.weight;
        }
    }
    GraphNotes notes;
    const Graph g = build_graph(kNodes, edges, &notes);
    expect_sound(g);
    Size entries = 0;
    for (int i = 0; i < kNodes; ++i)
        for (int j = 0; j < kNodes; ++j) {
            const bool there = sums.count({i, j}) > 0, back = sums.count({j, i}) > 0;
            if (!there && !back) continue;
            ++entries;
            double w = (there ? sums[{i, j}] : 0) + (back ? sums[{j, i}] : 0);
            if (there && back) w /= 2;
            if (there && back && i < j) {
                ++expected.both_ways;
                expected.unequal += static_cast<float>(sums[{i, j}]) != static_cast<float>(sums[{j, i}]);
            }
            const auto row = g.columns.begin() + g.offsets[static_cast<Size>(i)];
            const auto at = std::lower_bound(row, g.columns.begin() + g.offsets[static_cast<Size>(i) + 1], j);
            ASSERT_EQ(*at, j);
            // Sums of a few floats are exact in double to far below float's spacing.
            EXPECT_FLOAT_EQ(g.weights[static_cast<Size>(at - g.columns.begin())], static_cast<float>(w));
        }
    EXPECT_EQ(g.columns.size(), entries);
    EXPECT_EQ(notes.self_loops, expected.self_loops);
    EXPECT_EQ(notes.zeros, expected.zeros);
    EXPECT_EQ(notes.duplicates, expected.duplicates);
    EXPECT_EQ(notes.both_ways, expected.both_ways);
    EXPECT_EQ(notes.unequal, expected.unequal);
    EXPECT_GT(notes.unequal, 0);
}

TEST(Graph, DependsOnNeitherThreadsNorOrder) {
    constexpr std::int32_t kNodes = 5000;  // more rows than ranges
    std::vector<Edge> edges = random_edges(kNodes, 60000, 7);
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    GraphNotes one_notes;
    const Graph one = build_graph(kNodes, edges, &one_notes);
    const LaplacianMatrix<float> one_laplacian = laplacian_of<float>(one, LaplacianKind::normalised);
    expect_sound(one);
    for (const int n : {2, 5}) {
        omp_set_num_threads(n);
        std::rotate(edges.begin(), edges.begin() + 12345, edges.end());
        GraphNotes notes;
        const Graph g = build_graph(kNodes, edges, &notes);
        expect_same(one, g);
        EXPECT_EQ(notes.duplicates, one_notes.duplicates);
        EXPECT_EQ(notes.both_ways, one_notes.both_ways);
        EXPECT_EQ(notes.unequal, one_notes.unequal);
        EXPECT_EQ(notes.self_loops, one_notes.self_loops);
        const LaplacianMatrix<float> l = laplacian_of<float>(g, LaplacianKind::normalised);
        EXPECT_EQ(l.values, one_laplacian.values);
        EXPECT_EQ(l.upper_bound, one_laplacian.upper_bound);
    }
    omp_set_num_threads(threads);
}

// The sum lies half-way between two floats; in double, 2^53 + 2^29 + 1 + 1 loses both ones, 1 + 1 + 2^29 + 2^53 none.
TEST(Graph, SumsOfDuplicatesDoNotDependOnTheirOrder) {
    const std::vector<Edge> up{{0, 1, 1}, {0, 1, 1}, {0, 1, 0x1p29f}, {0, 1, 0x1p53f}};
    const std::vector<Edge> down(up.rbegin(), up.rend());
    EXPECT_EQ(build_graph(2, up).weights, (std::vector<float>(2, 0x1p53f + 0x1p30f)));
    EXPECT_EQ(build_graph(2, down).weights, build_graph(2, up).weights);
}

TEST(Graph, RefusesBadEdges) {
    const auto message = [](std::int64_t nodes, std::vector<Edge> edges) {
        return input_error_of([&] { build_graph(nodes, std::move(edges)); });
    };
    const float inf = std::numeric_limits<float>::infinity();
    EXPECT_HAS(message(3, {{0, 1}, {1, 3}, {-1, 0}}), "edge 1 (1, 3): its nodes must be from 0 to 2");
    EXPECT_HAS(message(3, {{0, -1}}), "edge 0 (0, -1)");
    EXPECT_HAS(message(3, {{0, 1, -2}}), "weight -2 must be finite and not negative");
    EXPECT_HAS(message(3, {{0, 1, NAN}}), "weight nan must");
    EXPECT_HAS(message(3, {{0, 1, inf}}), "weight inf must");
    EXPECT_HAS(message(3, {{1, 1, inf}}), "weight inf must");  // a self loop is looked at before it is dropped
    EXPECT_HAS(message(-1, {}), "-1 nodes");
    EXPECT_HAS(message(std::int64_t{1} << 31, {}), "2147483648 nodes");
    const float most = std::numeric_limits<float>::max();
    EXPECT_HAS(message(4, {{2, 3, most}, {2, 3, most}}), "edge (2, 3): the sum of its duplicates is beyond float");
    EXPECT_EQ(build_graph(2, {{0, 1, most}, {1, 0, most}}).weights,
              (std::vector<float>{most, most}));  // the mean is not
}

TEST(Graph, WithoutEdgesOrNodes) {
    const Graph none = build_graph(0, {});
    EXPECT_EQ(none.offsets, std::vector<std::int64_t>{0});
    EXPECT_EQ(find_components(none).count, 0);
    EXPECT_EQ(statistics_of(none, find_components(none)).nodes, 0);
    EXPECT_EQ(laplacian_of<float>(none, LaplacianKind::combinatorial).offsets, std::vector<std::int64_t>{0});
    std::vector<std::int32_t> kept{7};
    EXPECT_EQ(largest_component(none, find_components(none), kept).nodes, 0);
    EXPECT_TRUE(kept.empty());

    const Graph lonely = build_graph(3, {});
    const Components c = find_components(lonely);
    EXPECT_EQ(c.count, 3);
    EXPECT_EQ(c.of_node, (std::vector<std::int32_t>{0, 1, 2}));
    for (const LaplacianKind kind : {LaplacianKind::combinatorial, LaplacianKind::normalised}) {
        const auto l = laplacian_of<double>(lonely, kind);
        EXPECT_EQ(l.values, (std::vector<double>{0, 0, 0}));
        EXPECT_EQ(l.columns, (std::vector<std::int32_t>{0, 1, 2}));
        EXPECT_EQ(l.null_weight, (std::vector<double>{1, 1, 1}));
    }
    EXPECT_EQ(statistics_of(lonely, c).text(),
              "nodes 3, edges 0, isolated 3\ncomponents 3 (largest 1)\n"
              "degree min 0, median 0, mean 0, max 0, bandwidth 0");
}

TEST(Graph, ComponentsAreNumberedByTheirSmallestNode) {
    // {0, 6}, {1, 2, 5, 7}, {3}, {4, 8}
    const Graph g = build_graph(9, {{6, 0}, {7, 5}, {2, 7}, {5, 1}, {8, 4}});
    const Components c = find_components(g);
    EXPECT_EQ(c.count, 4);
    EXPECT_EQ(c.of_node, (std::vector<std::int32_t>{0, 1, 1, 2, 3, 1, 0, 1, 3}));
    EXPECT_EQ(c.sizes, (std::vector<std::int64_t>{2, 4, 1, 2}));
}

// Most nodes are next to a hub, some hang on long tails behind it, and others are apart, in any order of numbers.
TEST(Graph, ComponentsAroundAHub) {
    constexpr std::int32_t kNodes = 6000, kLeaves = 5000, kTail = 25;
    const auto name = [](std::int32_t i) { return std::int32_t((i * std::int64_t{7919} + 1234) % kNodes); };
    std::vector<Edge> edges;
    for (std::int32_t i = 1; i <= kLeaves; ++i) edges.push_back({name(0), name(i)});
    std::vector<std::int32_t> owner(kNodes, 0);  // the component, by any of its nodes
    for (std::int32_t i = kLeaves + 1; i < kNodes; ++i) {
        const std::int32_t tail = (i - kLeaves - 1) / kTail, place = (i - kLeaves - 1) % kTail;
        const bool apart = tail % 2 == 1;
        if (place > 0) edges.push_back({name(i - 1), name(i)});
        if (place == 0 && !apart) edges.push_back({name(tail + 1), name(i)});
        owner[static_cast<std::size_t>(i)] = apart ? tail : 0;
    }
    const Components c = find_components(build_graph(kNodes, edges));
    std::vector<std::int32_t> number(kNodes, -1), expected(kNodes);
    std::int32_t count = 0;
    std::vector<std::int32_t> inverse(kNodes);
    for (std::int32_t i = 0; i < kNodes; ++i) inverse[static_cast<std::size_t>(name(i))] = i;
    for (std::int32_t i = 0; i < kNodes; ++i) {
        const auto mine =
            static_cast<std::size_t>(owner[static_cast<std::size_t>(inverse[static_cast<std::size_t>(i)])]);
        if (number[mine] < 0) number[mine] = count++;
        expected[static_cast<std::size_t>(i)] = number[mine];
    }
    EXPECT_EQ(c.count, count);
    EXPECT_EQ(c.of_node, expected);
    EXPECT_EQ(std::accumulate(c.sizes.begin(), c.sizes.end(), std::int64_t{0}), kNodes);
}

// What a solver may leave out (half_panel.h).
TEST(Graph, EqualWeightsAreKnown) {
    const std::vector<Edge> edges = {{0, 1, 2.5f}, {1, 2, 2.5f}, {2, 3, 2.5f}};
    for (const LaplacianKind kind : {LaplacianKind::combinatorial, LaplacianKind::normalised}) {
        const auto l = laplacian_of<float>(build_graph(4, edges), kind);
        EXPECT_EQ(l.equal_weight, 2.5f);
        EXPECT_EQ(l.kind, kind);
    }
    std::vector<Edge> others = edges;
    others[2].weight = 2;
    EXPECT_EQ(laplacian_of<float>(build_graph(4, others), LaplacianKind::normalised).equal_weight, 0);
    EXPECT_EQ(laplacian_of<float>(build_graph(4, edges), std::vector<double>(4, 1.0)).equal_weight, 0);
}

TEST(Graph, ComponentsOfALongPathInAnyOrder) {
    constexpr std::int32_t kNodes = 20000;
    std::vector<Edge> edges;
    for (std::int32_t i = 0; i + 1 < kNodes; ++i)  // 7919 and 20000 have no common factor: one cycle less one edge
        edges.push_back({static_cast<std::int32_t>(i * std::int64_t{7919} % kNodes),
                         static_cast<std::int32_t>((i + 1) * std::int64_t{7919} % kNodes)});
    EXPECT_EQ(find_components(build_graph(kNodes, edges)).count, 1);
    edges.erase(edges.begin() + 4999);
    const Components two = find_components(build_graph(kNodes, edges));
    EXPECT_EQ(two.count, 2);
    EXPECT_EQ(two.sizes, (std::vector<std::int64_t>{5000, 15000}));
}

// Many small ones beside a large one, against a plain search, and with all threads.
TEST(Graph, ComponentsOfManySizes) {
    constexpr std::int32_t kNodes = 60000;
    std::vector<Edge> edges;
    for (std::int32_t i = 0; i < kNodes / 2; ++i) edges.push_back({i, (i * 7 + 1) % (kNodes / 2), 1});
    for (std::int32_t i = kNodes / 2; i + 1 < kNodes; ++i)
        if (i % 10 < i % 7 + 2) edges.push_back({kNodes - 1 - i % 10000, i, 1});
    const Graph g = build_graph(kNodes, edges);
    std::vector<std::int32_t> expected(kNodes, -1);
    std::int32_t count = 0;
    for (std::int32_t start = 0; start < kNodes; ++start) {
        if (expected[Size(start)] >= 0) continue;
        std::vector<std::int32_t> open{start};
        expected[Size(start)] = count;
        while (!open.empty()) {
            const auto i = Size(open.back());
            open.pop_back();
            for (auto k = Size(g.offsets[i]); k < Size(g.offsets[i + 1]); ++k)
                if (expected[Size(g.columns[k])] < 0) {
                    expected[Size(g.columns[k])] = count;
                    open.push_back(g.columns[k]);
                }
        }
        ++count;
    }
    const Components c = find_components(g);
    EXPECT_EQ(c.count, count);
    EXPECT_EQ(c.of_node, expected);
}

TEST(Graph, Statistics) {
    const Graph g = build_graph(6, {{0, 1, 2}, {0, 2, 1}, {0, 4, 0.5f}});  // a star, and nodes 3 and 5 alone
    const GraphStatistics s = statistics_of(g, find_components(g));
    EXPECT_EQ(s.isolated, 2);
    EXPECT_EQ(s.components, 3);
    EXPECT_EQ(s.largest_component, 4);
    EXPECT_EQ(s.degree_min, 0);
    EXPECT_EQ(s.degree_median, 1);
    EXPECT_EQ(s.degree_max, 3);
    EXPECT_EQ(s.degree_mean, 1);
    EXPECT_EQ(s.bandwidth, 4);
    EXPECT_EQ(s.weight_sum, 3.5);
    EXPECT_EQ(s.text(),
              "nodes 6, edges 3, isolated 2\ncomponents 3 (largest 4)\n"
              "degree min 0, median 1, mean 1, max 3, bandwidth 4\nweights min 0.5, mean 1.16667, max 2");
    const Graph path = build_graph(2708, path_edges(2708));
    EXPECT_EQ(statistics_of(path, find_components(path)).text(),
              "nodes 2,708, edges 2,707, isolated 0\ncomponents 1 (largest 2,708)\n"
              "degree min 1, median 2, mean 1.999, max 2, bandwidth 1\nweights all 1");
}

// ---- Laplacians -----------------------------------------------------------------------------------------------------

TEST(Laplacian, MatchesADenseComputation) {
    constexpr Size kNodes = 23;
    const Graph g = build_graph(kNodes + 2, random_edges(kNodes, 60, 11));  // and two isolated nodes
    Dense a(kNodes + 2, std::vector<double>(kNodes + 2, 0));
    for (Size i = 0; i < a.size(); ++i)
        for (auto k = static_cast<Size>(g.offsets[i]); k < static_cast<Size>(g.offsets[i + 1]); ++k)
            a[i][static_cast<Size>(g.columns[k])] = g.weights[k];
    for (const LaplacianKind kind : {LaplacianKind::combinatorial, LaplacianKind::normalised}) {
        const bool normalised = kind == LaplacianKind::normalised;
        const auto l64 = laplacian_of<double>(g, kind);
        const auto l32 = laplacian_of<float>(g, kind);
        const Dense d64 = dense_of(l64);
        double bound = 0;
        for (Size i = 0; i < a.size(); ++i) {
            const auto sum = [&](Size row) { return std::accumulate(a[row].begin(), a[row].end(), 0.0); };
            bool diagonal = false;
            for (auto k = static_cast<Size>(l64.offsets[i]); k < static_cast<Size>(l64.offsets[i + 1]); ++k) {
                diagonal |= l64.columns[k] == static_cast<std::int32_t>(i);
                EXPECT_TRUE(k == static_cast<Size>(l64.offsets[i]) || l64.columns[k - 1] < l64.columns[k]);
                EXPECT_EQ(l32.values[k], static_cast<float>(l64.values[k]));  // rounded once
            }
            EXPECT_TRUE(diagonal);
            EXPECT_EQ(l64.null_weight[i], normalised && sum(i) > 0 ? std::sqrt(sum(i)) : 1.0);
            for (Size j = 0; j < a.size(); ++j) {
                const double di = sum(i), dj = sum(j);
                double expected = (i == j ? di : 0) - a[i][j];
                if (normalised) expected = di > 0 && dj > 0 ? expected / std::sqrt(di) / std::sqrt(dj) : 0;
                EXPECT_NEAR(d64[i][j], expected, 4 * std::numeric_limits<double>::epsilon() * std::abs(expected));
                EXPECT_EQ(d64[i][j], d64[j][i]);
                bound = std::max(bound, 2 * di);
            }
        }
        EXPECT_EQ(l64.columns, l32.columns);
        // The row's sum of magnitudes: up to 25 roundings of its own.
        EXPECT_NEAR(l64.upper_bound, normalised ? 2 : bound, bound * 25 * std::numeric_limits<double>::epsilon());
    }
}

// Cycle: eigenvectors cos(2 pi m i / n), eigenvalues 2 - 2 cos(2 pi m / n); all degrees are 2, so normalised: half.
TEST(Laplacian, EigenpairsOfACycle) {
    constexpr std::int32_t kNodes = 12;
    std::vector<Edge> edges = path_edges(kNodes);
    edges.push_back({kNodes - 1, 0});
    const Graph g = build_graph(kNodes, edges);
    for (const LaplacianKind kind : {LaplacianKind::combinatorial, LaplacianKind::normalised}) {
        const Dense l = dense_of(laplacian_of<double>(g, kind));
        for (int m = 0; m < kNodes; ++m) {
            const auto x = [&](Size i) { return std::cos(2 * M_PI * m * static_cast<double>(i) / kNodes); };
            const double lambda =
                (2 - 2 * std::cos(2 * M_PI * m / kNodes)) / (kind == LaplacianKind::normalised ? 2 : 1);
            for (Size i = 0; i < kNodes; ++i) {
                double y = 0;
                for (Size j = 0; j < kNodes; ++j) y += l[i][j] * x(j);
                EXPECT_NEAR(y, lambda * x(i), 1e-14);  // 12 products of at most 2, each rounded to 2^-53
            }
        }
    }
}

TEST(Laplacian, NullVectorIsTheSquareRootOfTheNullWeights) {
    const Graph g = build_graph(9, {{0, 1, 3}, {1, 2, 0.7f}, {2, 0, 5}, {4, 5, 1.5f}, {5, 6, 2}, {6, 7, 1e-3f}});
    for (const LaplacianKind kind : {LaplacianKind::combinatorial, LaplacianKind::normalised}) {
        const auto l = laplacian_of<double>(g, kind);
        const Dense d = dense_of(l);
        for (Size i = 0; i < 9; ++i) {
            double y = 0;
            for (Size j = 0; j < 9; ++j) y += d[i][j] * l.null_weight[j];
            EXPECT_NEAR(y, 0, 1e-14);
        }
    }
}

TEST(Laplacian, WithMassesOfTheCallersChoice) {
    const Graph g = build_graph(4, {{0, 1, 3}, {1, 2, 0.5f}});
    const std::vector<double> masses{4, 9, 16, 25};
    const auto l = laplacian_of<double>(g, masses);
    EXPECT_EQ(l.null_weight, (std::vector<double>{2, 3, 4, 5}));
    const Dense d = dense_of(l);
    const Dense unscaled{{3, -3, 0, 0}, {-3, 3.5, -0.5, 0}, {0, -0.5, 0.5, 0}, {0, 0, 0, 0}};
    double bound = 0;
    for (Size i = 0; i < 4; ++i) {
        double sum = 0;
        for (Size j = 0; j < 4; ++j) {
            const double expected = unscaled[i][j] / (l.null_weight[i] * l.null_weight[j]);
            EXPECT_DOUBLE_EQ(d[i][j], expected);
            sum += std::abs(expected);
        }
        bound = std::max(bound, sum);
    }
    EXPECT_DOUBLE_EQ(l.upper_bound, bound);
}

TEST(Laplacian, DegreesBeyondFloatAreRefused) {
    const float most = std::numeric_limits<float>::max();
    const Graph g = build_graph(3, {{0, 1, most}, {0, 2, most}});
    EXPECT_HAS(input_error_of([&] { laplacian_of<float>(g, LaplacianKind::combinatorial); }),
               "node 0: its weights add");
    EXPECT_EQ(laplacian_of<double>(g, LaplacianKind::combinatorial).values[0], 2 * double{most});
    const auto l = laplacian_of<float>(g, LaplacianKind::normalised);
    EXPECT_FLOAT_EQ(l.values[1], static_cast<float>(-1 / std::sqrt(2.0)));
}

// ---- renumbering ----------------------------------------------------------------------------------------------------

TEST(Graph, PermutesNodesAndNames) {
    constexpr std::int32_t kNodes = 40;
    Graph g = build_graph(kNodes, random_edges(kNodes, 150, 3));
    for (int i = 0; i < kNodes; ++i) g.names.push_back("n" + std::to_string(i));
    std::vector<std::int32_t> order(kNodes), back(kNodes);
    for (std::int32_t i = 0; i < kNodes; ++i) order[static_cast<Size>(i)] = (i * 17 + 5) % kNodes;
    for (std::int32_t i = 0; i < kNodes; ++i) back[static_cast<Size>(order[static_cast<Size>(i)])] = i;
    const Graph p = permute(g, order);
    expect_sound(p);
    const Dense l = dense_of(laplacian_of<double>(g, LaplacianKind::normalised));
    const Dense q = dense_of(laplacian_of<double>(p, LaplacianKind::normalised));
    for (Size i = 0; i < kNodes; ++i) {
        EXPECT_EQ(p.names[i], g.names[static_cast<Size>(order[i])]);
        for (Size j = 0; j < kNodes; ++j)  // degrees are summed in another order
            EXPECT_NEAR(q[i][j], l[static_cast<Size>(order[i])][static_cast<Size>(order[j])], 1e-15);
    }
    expect_same(permute(p, back), g);
    EXPECT_EQ(find_components(p).count, find_components(g).count);
    EXPECT_HAS(input_error_of([&] { permute(g, {0, 1}); }), "2 nodes for a graph of 40");
    order[3] = order[4];
    EXPECT_HAS(input_error_of([&] { permute(g, order); }), "at place 4");
}

TEST(Graph, LargestComponent) {
    Graph g = build_graph(8, {{0, 5, 2}, {1, 6, 3}, {6, 4, 7}, {2, 3}, {3, 7}});  // {1, 4, 6} and {2, 3, 7}: the first
    for (const char c : std::string("abcdefgh")) g.names.emplace_back(1, c);
    std::vector<std::int32_t> kept;
    const Graph big = largest_component(g, find_components(g), kept);
    expect_sound(big);
    EXPECT_EQ(kept, (std::vector<std::int32_t>{1, 4, 6}));
    EXPECT_EQ(big.names, (std::vector<std::string>{"b", "e", "g"}));
    EXPECT_EQ(big.columns, (std::vector<std::int32_t>{2, 2, 0, 1}));
    EXPECT_EQ(big.weights, (std::vector<float>{3, 7, 3, 7}));
}

}  // namespace
}  // namespace fiedler::test
