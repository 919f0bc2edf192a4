// The solver in f32, as it runs on the GPU, on the CPU: what keeps rounding errors and overflow out of it.
#include "engine/subspace_solver.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <random>

#include "engine/dense_eigen.h"

namespace fiedler {
namespace {

SolverResult solve_in_f32(const Graph& g, LaplacianKind kind, std::int64_t wanted, std::int64_t block) {
    std::vector<SolverLevel<float>> levels(1);
    levels[0].matrix = laplacian_of<float>(g, kind);
    levels[0].components = {0, g.nodes};
    SolverSettings settings;
    settings.wanted = wanted, settings.block = block, settings.max_iterations = 100;
    Cpu cpu;
    SubspaceSolver<Cpu, float> solver(cpu, levels, settings);
    const auto estimate = solver.estimate(block);
    solver.set_tolerance(
        std::max(1e-6 * std::min(estimate.upper, 2.0), rounding_floor(levels[0].matrix, estimate.upper)));
    return solver.solve({}, 0, [](const float*, std::int64_t, std::int64_t) {});
}
void expect_values(const SolverResult& r, const std::vector<double>& expected, double accuracy) {
    ASSERT_TRUE(r.complete) << r.why;
    ASSERT_EQ(r.eigenvalues.size(), expected.size());
    for (std::size_t j = 0; j < expected.size(); ++j)
        EXPECT_NEAR(r.eigenvalues[j], expected[j], accuracy) << "pair " << j;
}

// The wanted pairs end within an eigenvalue of high multiplicity: long filters bring noise only.
TEST(SubspaceSolverF32, EndsWithinARepeatedEigenvalue) {
    std::vector<Edge> edges;
    for (int i = 0; i < 1024; ++i)
        for (int b = 1; b < 1024; b *= 2)
            if (!(i & b)) edges.push_back({i, i | b, 1});
    std::vector<double> expected(24, 0.4);
    std::fill_n(expected.begin(), 10, 0.2);
    expect_values(solve_in_f32(build_graph(1024, edges), LaplacianKind::normalised, 24, 48), expected, 2e-6);
}

// Cliques joined to a chain by an edge each: cliques - 1 tiny eigenvalues, about as many pairs of nearly equal ones near 1
// (1e-5 apart, where the cliques are large), and hundreds of equal ones just above. The block has not seen the tiny ones
// when the first filter raises them (no overflow); they are locked, however many, so that longer filters can tell the
// others apart; a sum that loses small entries beside the diagonal would mix them.
Graph chain_of_cliques(int cliques, int size) {
    std::vector<Edge> edges;
    for (int c = 0; c < cliques; ++c) {
        for (int i = 0; i < size; ++i)
            for (int j = i + 1; j < size; ++j) edges.push_back({c * size + i, c * size + j, 1});
        if (c > 0) edges.push_back({c * size - 1, c * size, 1});
    }
    return build_graph(std::int64_t(cliques) * size, edges);
}
TEST(SubspaceSolverF32, ChainsOfCliques) {
    struct Case {
        int cliques, size;
        std::vector<std::int64_t> wanted;  // fewer than the tiny ones, all of them, some of those near 1, some beyond
    };
    for (const Case& c : {Case{4, 300, {2, 3, 19}}, Case{8, 60, {7, 19}}, Case{11, 50, {5, 19}}, Case{20, 30, {48}}}) {
        const Graph g = chain_of_cliques(c.cliques, c.size);
        std::vector<double> values, vectors;
        dense_spectrum(laplacian_of<double>(g, LaplacianKind::normalised), values, vectors);
        for (const std::int64_t wanted : c.wanted) {
            SCOPED_TRACE(fmt::format("{} cliques of {}, {} pairs", c.cliques, c.size, wanted));
            const std::int64_t block = (wanted + std::max<std::int64_t>(16, wanted / 4) + 15) / 16 * 16;
            const SolverResult r = solve_in_f32(g, LaplacianKind::normalised, wanted, block);
            expect_values(r, {values.begin() + 1, values.begin() + 1 + wanted}, 1e-6);
            EXPECT_LE(r.iterations, 10);
        }
    }
}

// Eigenvalues of 1e-6 and less of the norm, by sums in double.
TEST(SubspaceSolverF32, ResolvesTheSmallEigenvaluesOfAPath) {
    std::vector<Edge> edges;
    for (int i = 0; i + 1 < 4000; ++i) edges.push_back({i, i + 1, 1});
    const SolverResult r = solve_in_f32(build_graph(4000, edges), LaplacianKind::combinatorial, 12, 32);
    ASSERT_TRUE(r.complete) << r.why;
    for (std::size_t j = 0; j < 12; ++j) {
        const double exact = 2 - 2 * std::cos(std::numbers::pi * double(j + 1) / 4000);
        EXPECT_NEAR(r.eigenvalues[j], exact, 0.02 * exact) << "pair " << j;
    }
}

// The edge of a bulk: a Krylov start saves products, and narrow panels change nothing but rounding.
TEST(SubspaceSolverF32, KrylovStartAtTheEdgeOfABulk) {
    std::mt19937 random(3);
    std::vector<Edge> edges;
    for (std::int32_t i = 1; i < 6000; ++i)
        for (int k = 0; k < 5; ++k) edges.push_back({i, std::int32_t(random() % unsigned(i)), 1});
    const Graph g = build_graph(6000, edges);
    std::vector<SolverLevel<float>> levels(1);
    levels[0].matrix = laplacian_of<float>(g, LaplacianKind::normalised);
    levels[0].components = {0, g.nodes};
    std::vector<float> vectors;
    const auto solve = [&](std::int64_t basis, std::int64_t panel) {
        SolverSettings settings;
        settings.wanted = 40, settings.block = 64, settings.tolerance = 1e-4;
        settings.basis = basis, settings.panel = panel;
        Cpu cpu;
        SubspaceSolver<Cpu, float> solver(cpu, levels, settings);
        (void)solver.estimate(settings.block);
        vectors.clear();
        return solver.solve({}, 0, [&](const float* rows, std::int64_t first, std::int64_t count) {
            EXPECT_EQ(std::int64_t(vectors.size()), first * 40);
            vectors.insert(vectors.end(), rows, rows + count * 40);
        });
    };
    const SolverResult plain = solve(0, 0);
    const std::int64_t columns = krylov_columns(g.nodes, 40);
    EXPECT_GT(columns, 64);
    for (const std::int64_t panel : {0, 8}) {
        SCOPED_TRACE(panel);
        const SolverResult r = solve(columns, panel);
        expect_values(r, plain.eigenvalues, 1e-6);
        EXPECT_LT(double(r.products), 0.8 * double(plain.products));
        for (const double residual : r.residuals) EXPECT_LE(residual, 1e-4);
        const std::vector<float> before = vectors;
        (void)solve(columns, panel);
        EXPECT_EQ(vectors, before);
    }
}

// Filters in half precision find the same pairs: from a Krylov space, from random vectors (the whole block, and beside
// locked pairs), in several components, and where eigenvalues far below what the block has seen leave the range of f16.
Graph three_bulks() {
    std::mt19937 random(4);
    std::vector<Edge> edges;
    for (const std::int32_t begin : {0, 900, 902})
        for (std::int32_t i = 1; i < (begin == 900 ? 2 : 900); ++i)
            for (int k = 0; k < 6; ++k) edges.push_back({begin + i, begin + std::int32_t(random() % unsigned(i)), 1});
    return build_graph(1802, edges);
}
// Points along a strip, in its order, each joined to a few random ones near it.
Graph random_mesh(std::int32_t nodes) {
    std::mt19937 random(5);
    std::vector<Edge> edges;
    for (std::int32_t i = 0; i < nodes; ++i)
        for (int k = 0; k < 6; ++k)
            if (const auto j = i + 1 + static_cast<std::int32_t>(random() % 12); j < nodes) edges.push_back({i, j, 1});
    return build_graph(nodes, edges);
}
constexpr int kHalfCases = 7;
// only: of the cases; all where negative.
template <class Dev>
void expect_halves_find_the_same(Dev& dev, int only) {
    struct Case {
        const char* name;
        Graph graph;
        std::vector<std::int64_t> components;
        bool krylov, multilevel;
        std::int64_t half;
        double share;  // of the products, at least, in half precision
        double most;   // products, by those of f32 alone; two in half precision for one
        LaplacianKind kind = LaplacianKind::normalised;
    };
    const auto whole = [](const Graph& g) { return std::vector<std::int64_t>{0, g.nodes}; };
    const Graph bulks = three_bulks(), cliques = chain_of_cliques(6, 240);
    std::vector<Edge> ring;
    for (int i = 0; i < 1500; ++i)
        for (int k = 1; k <= 5; ++k) ring.push_back({i, (i + k) % 1500, 1});
    const Graph near = build_graph(1500, ring), mesh = random_mesh(12000);
    std::vector<Edge> light = ring, uneven = ring;  // degrees of 0.5, so that L is of the others' size
    for (Edge& e : light) e.weight = 0.05f;
    for (std::size_t k = 0; k < uneven.size(); ++k) uneven[k].weight = k % 3 == 0 ? 0.5f : 1;
    const Graph equal = build_graph(1500, light), weighted = build_graph(1500, uneven);
    const auto combinatorial = LaplacianKind::combinatorial;
    const std::vector<Case> cases = {
        Case{"Krylov", bulks, {0, 900, 902, 1802}, true, false, 16, 0.5, 2},
        Case{"components", bulks, {0, 900, 902, 1802}, false, false, 16, 0.02, 1.2},
        Case{"ring", near, whole(near), false, false, 32, 0.02, 1.2},
        Case{"ring, combinatorial", equal, whole(equal), false, false, 32, 0.02, 1.2, combinatorial},
        Case{"ring, weighted", weighted, whole(weighted), false, false, 32, 0.02, 1.2},
        Case{"cliques", cliques, whole(cliques), true, false, 16, 0.02, 2.5},
        Case{"mesh", mesh, whole(mesh), false, true, 32, 0.5, 1}};
    ASSERT_EQ(cases.size(), std::size_t(kHalfCases));
    for (int i = 0; i < kHalfCases; ++i) {
        if (only >= 0 && only != i) continue;
        const Case& c = cases[std::size_t(i)];
        SCOPED_TRACE(c.name);
        const auto levels = solver_levels<float>(c.graph, c.components, c.kind, c.multilevel ? 48 : 0);
        std::vector<float> vectors;
        const auto solve = [&](std::int64_t half) {
            SolverSettings settings;
            settings.wanted = 20, settings.block = 48, settings.tolerance = 2e-5;
            settings.basis = c.krylov ? krylov_columns(c.graph.nodes, settings.wanted, half) : 0;
            settings.half = half, settings.panel = half == 16 ? 8 : 0;
            SubspaceSolver<Dev, float> solver(dev, levels, settings);
            (void)solver.estimate(settings.block);
            vectors.clear();
            return solver.solve({}, 0, [&](const float* rows, std::int64_t, std::int64_t count) {
                vectors.insert(vectors.end(), rows, rows + count * 20);
            });
        };
        const SolverResult plain = solve(0), r = solve(c.half);
        expect_values(r, plain.eigenvalues, 1e-6);
        EXPECT_EQ(plain.half_products, 0);
        EXPECT_GT(double(r.half_products), c.share * double(r.products));
        EXPECT_LT(double(r.products) - double(r.half_products) / 2, c.most * double(plain.products));
        for (const double residual : r.residuals) EXPECT_LE(residual, 2e-5);
        const std::vector<float> before = vectors;
        (void)solve(c.half);
        EXPECT_EQ(vectors, before);
    }
}
TEST(SubspaceSolverF32, HalvesFindTheSame) {
    Cpu cpu;
    expect_halves_find_the_same(cpu, -1);
}

// The same ways on graphs of some hundred nodes, a solve or two each: short enough for compute-sanitizer's racecheck.
template <class Dev>
void expect_small_solve(Dev& dev, bool krylov, bool multilevel) {
    std::vector<Edge> ring;
    for (int i = 0; i < 480; ++i)
        for (int k = 1; k <= 4; ++k) ring.push_back({i, (i + k * k) % 480, 1});
    const Graph g = build_graph(480, ring);
    const auto levels = solver_levels<float>(g, {0, 480}, LaplacianKind::normalised, multilevel ? 24 : 0);
    const auto solve = [&](std::int64_t half) {
        SolverSettings settings;
        settings.wanted = 6, settings.block = 24, settings.tolerance = 2e-5;
        settings.basis = krylov ? 64 : 0;
        settings.half = half, settings.panel = half > 0 ? 8 : 0;
        SubspaceSolver<Dev, float> solver(dev, levels, settings);
        (void)solver.estimate(settings.block);
        return solver.solve({}, 0, [](const float*, std::int64_t, std::int64_t) {});
    };
    const SolverResult plain = solve(0), r = solve(16);
    EXPECT_GT(r.half_products, 0);
    expect_values(r, plain.eigenvalues, 1e-5);
    // What is wrong in a filter the next ones mend: it shows in the products, two in half precision for one.
    EXPECT_LT(double(r.products) - double(r.half_products) / 2, (krylov ? 2.5 : 1.15) * double(plain.products));
}
TEST(SubspaceSolverF32, SmallSolves) {
    Cpu cpu;
    expect_small_solve(cpu, false, false);
    expect_small_solve(cpu, true, false);
    expect_small_solve(cpu, false, true);
}
#if FIEDLER_CUDA
class SubspaceSolverGpuSmall : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Each, SubspaceSolverGpuSmall, testing::Range(0, 3));
TEST_P(SubspaceSolverGpuSmall, Solves) {
    std::string why;
    if (cuda_device_count(&why) == 0) GTEST_SKIP() << "no GPU: " << why;
    Cuda gpu(0);
    expect_small_solve(gpu, GetParam() == 1, GetParam() == 2);
}
class SubspaceSolverGpu : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Each, SubspaceSolverGpu, testing::Range(0, kHalfCases));
TEST_P(SubspaceSolverGpu, HalvesFindTheSame) {
    std::string why;
    if (cuda_device_count(&why) == 0) GTEST_SKIP() << "no GPU: " << why;
    Cuda gpu(0);
    expect_halves_find_the_same(gpu, GetParam());
}
#endif

// What is called complete is: the residuals are those of the vectors handed out.
TEST(SubspaceSolverF32, CompleteMeansWithinTheTolerance) {
    std::vector<Edge> edges;
    for (int i = 0; i < 2000; ++i)
        for (int k = 1; k <= 3; ++k) edges.push_back({i, (i + k * k * 7) % 2000, 1});
    const SolverResult r = solve_in_f32(build_graph(2000, edges), LaplacianKind::normalised, 30, 48);
    ASSERT_TRUE(r.complete) << r.why;
    for (const double residual : r.residuals) EXPECT_LE(residual, 2.5e-6);
}

}  // namespace
}  // namespace fiedler
