// Nearest-neighbour graphs: brute force, closed forms, weights by their formulas, features, and the GPU like the CPU.
#include "engine/knn_graph.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "engine/error.h"
#include "tests/support/buffer.h"
#include "tests/support/compare.h"

namespace fiedler::test {
namespace {

using Vectors = std::vector<float>;
using Edges = std::map<std::pair<int, int>, float>;  // both directions

Vectors random_vectors(std::int64_t n, std::int64_t d, std::uint64_t seed = 1) {
    return to<float>(random_values(static_cast<std::size_t>(n * d), seed));
}
KnnOptions options(std::int64_t m, KnnMetric metric, KnnWeight weight = KnnWeight::binary) {
    KnnOptions o;
    o.neighbours = m, o.metric = metric, o.weight = weight;
    return o;
}
Graph graph(const Vectors& x, std::int64_t d, const KnnOptions& o) {
    return knn_graph(x.data(), std::int64_t(x.size()) / d, d, o);
}
Edges edges_of(const Graph& g) {
    Edges e;
    for (std::int64_t i = 0; i < g.nodes; ++i)
        for (auto k = std::size_t(g.offsets[std::size_t(i)]); k < std::size_t(g.offsets[std::size_t(i) + 1]); ++k)
            e[{int(i), g.columns[k]}] = g.weights[k];
    return e;
}
double value_of(const Vectors& x, std::int64_t d, KnnMetric metric, std::int64_t a, std::int64_t b) {
    double distance = 0, dot = 0, aa = 0, bb = 0;
    for (std::int64_t k = 0; k < d; ++k) {
        const double u = x[std::size_t(a * d + k)], v = x[std::size_t(b * d + k)];
        distance += (u - v) * (u - v), dot += u * v, aa += u * u, bb += v * v;
    }
    return metric == KnnMetric::euclidean ? distance : aa * bb == 0 ? 1 : 1 - dot / std::sqrt(aa * bb);
}
void expect_same(const KnnLists& a, const KnnLists& b) {
    EXPECT_EQ(a.ids, b.ids);
    ASSERT_EQ(a.values.size(), b.values.size());
    EXPECT_TRUE(identical(a.values.data(), b.values.data(), a.values.size() * sizeof(double)));
}
template <class Call>
std::string error_of(Call&& call) {
    try {
        call();
    } catch (const InputError& e) {
        return e.what();
    }
    return "no error";
}

TEST(KnnGraph, ListsOfSeveralBlocks) {  // more vectors than a block of queries has
    const std::int64_t n = 4500, d = 6, m = 5;
    const Vectors x = random_vectors(n, d);
    for (const KnnMetric metric : {KnnMetric::euclidean, KnnMetric::cosine}) {
        const KnnLists lists = nearest_neighbours(x.data(), n, d, options(m, metric));
        ASSERT_EQ(lists.per_node, m);
        for (std::int64_t q = 0; q < n; q += 97) {
            std::vector<std::pair<double, int>> all;
            for (std::int64_t k = 0; k < n; ++k)
                if (k != q) all.emplace_back(value_of(x, d, metric, q, k), int(k));
            std::partial_sort(all.begin(), all.begin() + m, all.end());
            for (std::int64_t e = 0; e < m; ++e) {
                EXPECT_EQ(lists.ids[std::size_t(q * m + e)], all[std::size_t(e)].second) << "query " << q;
                EXPECT_NEAR(lists.values[std::size_t(q * m + e)], all[std::size_t(e)].first, 1e-14);
            }
        }
    }
}
TEST(KnnGraph, ThreadsDoNotMatter) {
    const Vectors x = random_vectors(900, 20);
    KnnOptions one = options(7, KnnMetric::cosine), three = one;
    one.threads = 1, three.threads = 3;
    expect_same(nearest_neighbours(x.data(), 900, 20, one), nearest_neighbours(x.data(), 900, 20, three));
}

TEST(KnnGraph, PointsOnALine) {
    const int n = 50;
    Vectors x;
    for (int i = 0; i < n; ++i) x.push_back(1e6f + float(i));
    Edges expected;
    const auto add = [&](int a, int b) { expected[{a, b}] = expected[{b, a}] = 1; };
    for (int i = 0; i + 1 < n; ++i) add(i, i + 1);
    add(0, 2), add(n - 1, n - 3);  // the ends have both of their two neighbours on one side
    EXPECT_EQ(edges_of(graph(x, 1, options(2, KnnMetric::euclidean))), expected);
}
TEST(KnnGraph, Grid) {
    const int side = 12;
    Vectors x;
    for (int i = 0; i < side * side; ++i) x.push_back(float(i / side)), x.push_back(float(i % side));
    const Edges edges = edges_of(graph(x, 2, options(4, KnnMetric::euclidean)));
    const auto border = [&](int i) {
        return i / side == 0 || i % side == 0 || i / side == side - 1 || i % side == side - 1;
    };
    std::size_t grid = 0;
    for (const auto& [ends, weight] : edges) {
        const auto [a, b] = ends;
        const bool adjacent = std::abs(a / side - b / side) + std::abs(a % side - b % side) == 1;
        grid += adjacent;
        EXPECT_TRUE(adjacent || border(a) || border(b)) << a << ", " << b;
        EXPECT_EQ(weight, 1.f);
    }
    EXPECT_EQ(grid, std::size_t(4 * side * (side - 1)));
    // Node 0 has two neighbours at 1, one at sqrt 2, and of the two at distance 2 the smaller index.
    EXPECT_TRUE(edges.count({0, 1}) && edges.count({0, side}) && edges.count({0, side + 1}) && edges.count({0, 2}));
    EXPECT_FALSE(edges.count({0, 2 * side}));
}

TEST(KnnGraph, WeightsAreTheirFormulas) {
    const std::int64_t n = 120, d = 5, m = 6;
    const Vectors x = random_vectors(n, d, 3);
    for (const KnnMetric metric : {KnnMetric::euclidean, KnnMetric::cosine}) {
        const bool cosine = metric == KnnMetric::cosine;
        const auto square = [&](std::int64_t a, std::int64_t b) {
            return (cosine ? 2 : 1) * value_of(x, d, metric, a, b);
        };
        std::vector<double> scale;  // of every node, by sorting
        std::vector<std::vector<std::pair<double, int>>> near(static_cast<std::size_t>(n));
        for (std::int64_t i = 0; i < n; ++i) {
            auto& mine = near[std::size_t(i)];
            for (std::int64_t j = 0; j < n; ++j)
                if (j != i) mine.emplace_back(square(i, j), int(j));
            std::sort(mine.begin(), mine.end());
            mine.resize(std::size_t(m));
            scale.push_back(std::sqrt(mine.back().first));
        }
        for (const KnnWeight weight : {KnnWeight::binary, KnnWeight::similarity, KnnWeight::gaussian}) {
            Edges expected;
            for (std::int64_t i = 0; i < n; ++i)
                for (const auto& [s, j] : near[std::size_t(i)]) {
                    const double similarity = cosine ? 1 - s / 2 : 1 / (1 + std::sqrt(s));
                    const double w = weight == KnnWeight::binary ? 1
                                     : weight == KnnWeight::similarity
                                         ? similarity
                                         : std::exp(-s / (scale[std::size_t(i)] * scale[std::size_t(j)]));
                    if (cosine && similarity < kLeastSimilarity) continue;
                    expected[{int(i), j}] = expected[{j, int(i)}] = float(std::max(w, kLeastWeight));
                }
            const Edges got = edges_of(graph(x, d, options(m, metric, weight)));
            ASSERT_EQ(got.size(), expected.size());
            for (const auto& [ends, w] : expected) {
                ASSERT_TRUE(got.count(ends));
                EXPECT_NEAR(got.at(ends), w, 1.2e-7 * w);
                EXPECT_EQ(got.at(ends), got.at({ends.second, ends.first}));
            }
        }
    }
}
TEST(KnnGraph, CosineWithoutSimilarityIsNoEdge) {
    // East, a little north of east, north, west, nothing. North and east are orthogonal, west is the opposite.
    const Vectors x = {1, 0, 3, 0.3f, 0, 2, -1, 0, 0, 0};
    for (const KnnWeight weight : {KnnWeight::binary, KnnWeight::similarity, KnnWeight::gaussian}) {
        const Graph g = graph(x, 2, options(4, KnnMetric::cosine, weight));
        EXPECT_EQ(g.nodes, 5);
        const Edges edges = edges_of(g);
        EXPECT_EQ(edges.size(), 4u);
        EXPECT_TRUE(edges.count({0, 1}) && edges.count({1, 2}));
    }
    const Edges similar = edges_of(graph(x, 2, options(4, KnnMetric::cosine, KnnWeight::similarity)));
    EXPECT_NEAR(similar.at({0, 1}), 1 / std::sqrt(1.01), 1e-7);
}
TEST(KnnGraph, GaussianKeepsEveryNeighbour) {
    // Four duplicates (scale 0), and a point far away that lists two of them.
    const Vectors x = {5, 5, 5, 5, 1e30f};
    const Edges edges = edges_of(graph(x, 1, options(2, KnnMetric::euclidean, KnnWeight::gaussian)));
    EXPECT_EQ(edges.at({0, 1}), 1.f);
    EXPECT_EQ(edges.at({2, 0}), 1.f);
    EXPECT_EQ(edges.at({4, 0}), float(kLeastWeight));
    EXPECT_EQ(edges.at({4, 1}), float(kLeastWeight));
    EXPECT_EQ(edges.count({4, 2}), 0u);
    EXPECT_EQ(edges_of(graph({0, 3e38f}, 1, options(1, KnnMetric::euclidean, KnnWeight::similarity))).at({0, 1}),
              std::numeric_limits<float>::min());
}
TEST(KnnGraph, FewVectors) {
    EXPECT_EQ(graph({7}, 1, options(3, KnnMetric::cosine)).nodes, 1);
    EXPECT_EQ(graph({7}, 1, options(3, KnnMetric::cosine)).edges(), 0);
    EXPECT_EQ(graph(random_vectors(4, 3), 3, options(64, KnnMetric::euclidean)).edges(), 6);
}
TEST(KnnGraph, BadInputIsRefused) {
    Vectors x = random_vectors(6, 3);
    const auto says = [&](const KnnOptions& o) { return error_of([&] { graph(x, 3, o); }); };
    EXPECT_EQ(says(options(0, KnnMetric::cosine)), "neighbours: 0 must be from 1 to 64");
    EXPECT_EQ(says(options(65, KnnMetric::cosine)), "neighbours: 65 must be from 1 to 64");
    EXPECT_NE(error_of([&] { knn_graph(x.data(), 0, 3, {}); }), "no error");
    EXPECT_NE(error_of([&] { knn_graph(x.data(), 1, 0, {}); }), "no error");
    std::string why;
    if (!gpu_present(why)) {
        KnnOptions o;
        o.cuda = true;
        EXPECT_EQ(says(o), "no GPU: " + why + "; use the CPU");
    }
    x[13] = NAN, x[14] = 1;
    EXPECT_EQ(says({}), "vector 4, component 1: nan is not finite; remove or replace it");
    EXPECT_EQ(error_of([&] { feature_graph(x.data(), 6, 3, {}); }),
              "vector 4, component 1: nan is not finite; remove or replace it");
}
TEST(KnnGraph, ProgressEndsWithAll) {
    KnnOptions o;
    std::vector<std::int64_t> done;
    o.progress = [&](std::int64_t at, std::int64_t total) {
        done.push_back(at);
        EXPECT_EQ(total, 5000);
    };
    graph(random_vectors(5000, 2), 2, o);
    ASSERT_GE(done.size(), 2u);
    EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
    EXPECT_EQ(done.back(), 5000);
}

// Columns 0 .. 3 live on the first half of the vectors, 4 .. 7 on the second; column 8 is constant.
Vectors two_bands(std::int64_t n) {
    Vectors x = random_vectors(n, 9, 5);
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t k = 0; k < 9; ++k) {
            float& value = x[std::size_t(i * 9 + k)];
            if (k == 8)
                value = 0.1f;
            else if ((i < n / 2) != (k < 4))
                value = 0;
        }
    return x;
}
TEST(FeatureGraph, ColumnsThatLiveTogether) {
    const std::int64_t n = 200;
    Vectors x = two_bands(n);
    FeatureOptions o;
    o.neighbours = 3;
    const Graph g = feature_graph(x.data(), n, 9, o);
    ASSERT_EQ(g.nodes, 9);
    const Edges edges = edges_of(g);
    for (int a = 0; a < 8; ++a)
        for (int b = 0; b < 8; ++b)
            EXPECT_EQ(edges.count({a, b}), std::size_t(a != b && (a < 4) == (b < 4))) << a << ", " << b;
    double dot = 0, aa = 0, bb = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const double u = std::abs(x[std::size_t(i * 9 + 1)]), v = std::abs(x[std::size_t(i * 9 + 2)]);
        dot += u * v, aa += u * u, bb += v * v;
    }
    EXPECT_NEAR(edges.at({1, 2}), dot / std::sqrt(aa * bb), 1e-7);
    for (float& value : x) value = -value;  // signs do not matter
    EXPECT_EQ(edges_of(feature_graph(x.data(), n, 9, o)), edges);
}
TEST(FeatureGraph, CosineAndCorrelation) {
    const std::int64_t n = 300;
    Vectors x(std::size_t(4 * n));  // a, a + 10 noise-free, -a, constant
    const Values a = random_values(std::size_t(n), 8);
    for (std::int64_t i = 0; i < n; ++i) {
        const float v = float(a[std::size_t(i)]);
        x[std::size_t(4 * i)] = v, x[std::size_t(4 * i + 1)] = v + 10, x[std::size_t(4 * i + 2)] = -v;
        x[std::size_t(4 * i + 3)] = 0.1f;
    }
    FeatureOptions o;
    o.similarity = FeatureSimilarity::correlation;
    const Edges correlated = edges_of(feature_graph(x.data(), n, 4, o));
    ASSERT_EQ(correlated.size(), 2u);
    EXPECT_NEAR(correlated.at({0, 1}), 1, 1e-6);
    o.similarity = FeatureSimilarity::cosine;
    const Edges plain = edges_of(feature_graph(x.data(), n, 4, o));
    EXPECT_NEAR(plain.at({1, 3}), 1, 0.01);
    EXPECT_EQ(plain.count({0, 2}), 0u);
    o.similarity = FeatureSimilarity::absolute;
    EXPECT_EQ(edges_of(feature_graph(x.data(), n, 4, o)).at({0, 2}), 1.f);
}

void expect_eigenpairs(const HostLaplacian& l) {
    const auto n = std::size_t(l.dim);
    double residual = 0, overlap = 0;
    for (std::size_t m = 0; m < n; ++m) {
        const double* u = l.eigenvectors.data() + m * n;
        for (std::size_t i = 0; i < n; ++i) {
            double sum = -l.eigenvalues[m] * u[i];
            for (auto e = std::size_t(l.offsets[i]); e < std::size_t(l.offsets[i + 1]); ++e)
                sum += l.values[e] * u[l.columns[e]];
            residual = std::max(residual, std::abs(sum));
        }
        for (std::size_t k = 0; k <= m; ++k) {
            double dot = k == m ? -1 : 0;
            for (std::size_t i = 0; i < n; ++i) dot += u[i] * l.eigenvectors[k * n + i];
            overlap = std::max(overlap, std::abs(dot));
        }
        const double* largest =
            std::max_element(u, u + n, [](double a, double b) { return std::abs(a) < std::abs(b) * (1 - 1e-9); });
        EXPECT_GT(*largest, 0) << "sign of eigenvector " << m;
    }
    EXPECT_LT(residual, 1e-12);
    EXPECT_LT(overlap, 1e-12);
    EXPECT_TRUE(std::is_sorted(l.eigenvalues.begin(), l.eigenvalues.end()));
}
TEST(FeatureLaplacian, PathHasItsClosedForm) {
    const int n = 40;
    std::vector<Edge> edges;
    for (int i = 0; i + 1 < n; ++i) edges.push_back({i, i + 1, 1});
    std::int64_t components = 0;
    const HostLaplacian l = feature_laplacian(build_graph(n, edges), &components), path = path_laplacian(n);
    EXPECT_EQ(components, 1);
    EXPECT_EQ(l.offsets, path.offsets);
    EXPECT_EQ(l.columns, path.columns);
    EXPECT_EQ(l.values, path.values);
    EXPECT_TRUE(close_to(l.eigenvalues, path.eigenvalues, 1e-13));
    expect_eigenpairs(l);
    for (std::size_t m = 0; m < std::size_t(n); ++m) {
        double dot = 0;
        for (std::size_t i = 0; i < std::size_t(n); ++i)
            dot += l.eigenvectors[m * n + i] * path.eigenvectors[m * n + i];
        EXPECT_NEAR(std::abs(dot), 1, 1e-12);
    }
}
TEST(FeatureLaplacian, ComponentsAreReported) {
    const Vectors x = two_bands(100);
    FeatureOptions o;
    o.similarity = FeatureSimilarity::correlation;  // the constant column is isolated
    const Graph g = feature_graph(x.data(), 100, 9, o);
    std::int64_t components = 0;
    const HostLaplacian l = feature_laplacian(g, &components);
    EXPECT_EQ(components, find_components(g).count);
    EXPECT_GE(components, 2);
    EXPECT_EQ(std::count(l.eigenvalues.begin(), l.eigenvalues.end(), 0.0), components);
    expect_eigenpairs(l);
    for (std::size_t m = 0; m < 9; ++m) {  // each on one component
        std::vector<bool> seen(std::size_t(components), false);
        const Components parts = find_components(g);
        for (std::size_t i = 0; i < 9; ++i)
            if (l.eigenvectors[m * 9 + i] != 0) seen[std::size_t(parts.of_node[i])] = true;
        EXPECT_EQ(std::count(seen.begin(), seen.end(), true), 1);
    }
    EXPECT_NE(error_of([] { feature_laplacian(Graph{}); }), "no error");
}

#if FIEDLER_CUDA
TEST(KnnGraph, GpuMatchesCpuBitForBit) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t d : {1, 3, 130}) {
        const std::int64_t n = 9000;  // more than a block
        const Vectors x = random_vectors(n, d);
        for (const KnnMetric metric : {KnnMetric::euclidean, KnnMetric::cosine}) {
            KnnOptions o = options(20, metric);
            const KnnLists cpu = nearest_neighbours(x.data(), n, d, o);
            o.cuda = true;
            expect_same(nearest_neighbours(x.data(), n, d, o), cpu);
            o.budget = std::size_t(48) << 20;  // smaller blocks
            expect_same(nearest_neighbours(x.data(), n, d, o), cpu);
        }
    }
}
TEST(KnnGraph, GpuBudgetIsKept) {
    FIEDLER_GPU_OR_SKIP();
    const Vectors x = random_vectors(3000, 10);
    KnnOptions o;
    o.cuda = true, o.budget = 1 << 20;
    EXPECT_NE(error_of([&] { graph(x, 10, o); }).find("budget"), std::string::npos);
}
TEST(FeatureGraph, GpuMatchesCpu) {
    FIEDLER_GPU_OR_SKIP();
    const Vectors x = random_vectors(20000, 70);
    FeatureOptions o;
    const Edges cpu = edges_of(feature_graph(x.data(), 20000, 70, o));
    o.cuda = true;
    EXPECT_EQ(edges_of(feature_graph(x.data(), 20000, 70, o)), cpu);
}
#endif

}  // namespace
}  // namespace fiedler::test
