// The solver in f32, as it runs on the GPU, on the CPU: what keeps rounding errors and overflow out of it.
#include "engine/subspace_solver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>

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
    return solver.solve({}, 0);
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

// Hundreds of equal eigenvalues and three tiny ones, which the block has not seen when the first filter raises them: no
// overflow, and the tiny ones are right. Those between, 0.003 below the rest, are beyond f32: that must be said.
TEST(SubspaceSolverF32, UnseenEigenvaluesDoNotOverflow) {
    std::vector<Edge> edges;
    for (int c = 0; c < 4; ++c) {
        for (int i = 0; i < 300; ++i)
            for (int j = i + 1; j < 300; ++j) edges.push_back({c * 300 + i, c * 300 + j, 1});
        if (c > 0) edges.push_back({c * 300 - 1, c * 300, 1});
    }
    const SolverResult r = solve_in_f32(build_graph(1200, edges), LaplacianKind::normalised, 19, 48);
    const double tiny[] = {6.48721719e-06, 2.21490034e-05, 3.78111551e-05};  // by a dense solver in double
    for (std::size_t j = 0; j < 3; ++j) EXPECT_NEAR(r.eigenvalues[j], tiny[j], 2e-6);
    const double worst = *std::max_element(r.residuals.begin(), r.residuals.end());
    EXPECT_EQ(r.complete, worst <= 1e-5) << worst;
    for (std::size_t j = 0; j < 19; ++j) EXPECT_NEAR(r.eigenvalues[j], j < 3 ? 0 : 1, 0.01) << "pair " << j;
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
