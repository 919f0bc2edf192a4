// The eigen-solver against closed forms, against the dense solver, and against itself: order, threads, starts.
#include "engine/spectrum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <ostream>
#include <random>
#include <tuple>

#include "engine/error.h"
#include "kernels/device.h"

namespace fiedler {

// For the names of tests with parameters.
void PrintTo(SpectrumMethod method, std::ostream* out) { *out << name_of(method); }
void PrintTo(LaplacianKind kind, std::ostream* out) {
    *out << (kind == LaplacianKind::normalised ? "normalised" : "combinatorial");
}

namespace {

constexpr double kPi = std::numbers::pi;
using Size = std::size_t;

Graph path(int n) {
    std::vector<Edge> e;
    for (int i = 0; i + 1 < n; ++i) e.push_back({i, i + 1, 1});
    return build_graph(n, e);
}
Graph cycle(int n) {
    std::vector<Edge> e;
    for (int i = 0; i < n; ++i) e.push_back({i, (i + 1) % n, 1});
    return build_graph(n, e);
}
Graph complete(int n) {
    std::vector<Edge> e;
    for (int i = 0; i < n; ++i)
        for (int j = i + 1; j < n; ++j) e.push_back({i, j, 1});
    return build_graph(n, e);
}
Graph star(int n) {
    std::vector<Edge> e;
    for (int i = 1; i < n; ++i) e.push_back({0, i, 1});
    return build_graph(n, e);
}
Graph grid(int a, int b) {
    std::vector<Edge> e;
    for (int i = 0; i < a; ++i)
        for (int j = 0; j < b; ++j) {
            if (i + 1 < a) e.push_back({i * b + j, (i + 1) * b + j, 1});
            if (j + 1 < b) e.push_back({i * b + j, i * b + j + 1, 1});
        }
    return build_graph(a * b, e);
}
Graph hypercube(int d) {
    std::vector<Edge> e;
    for (int i = 0; i < 1 << d; ++i)
        for (int b = 0; b < d; ++b)
            if (!(i >> b & 1)) e.push_back({i, i | 1 << b, 1});
    return build_graph(1 << d, e);
}
// Complete graphs in a row, an edge between neighbours: a few tiny eigenvalues far below hundreds that are all alike.
Graph clique_chain(int cliques, int size) {
    std::vector<Edge> e;
    for (int c = 0; c < cliques; ++c) {
        for (int i = 0; i < size; ++i)
            for (int j = i + 1; j < size; ++j) e.push_back({c * size + i, c * size + j, 1});
        if (c > 0) e.push_back({c * size - 1, c * size, 1});
    }
    return build_graph(cliques * size, e);
}
Graph random_graph(int n, int degree, int seed) {
    std::mt19937 g(static_cast<unsigned>(seed));
    std::vector<Edge> e;
    for (int i = 1; i < n; ++i) e.push_back({i, static_cast<int>(g() % static_cast<unsigned>(i)), 1});
    for (int i = 0; i < n * (degree / 2 - 1); ++i) {
        const auto a = static_cast<int>(g() % static_cast<unsigned>(n)),
                   b = static_cast<int>(g() % static_cast<unsigned>(n));
        e.push_back({a, b, 0.25f + static_cast<float>(g() % 1000) / 1000.f});
    }
    return build_graph(n, e);
}
Graph disjoint(const std::vector<Graph>& parts) {
    std::vector<Edge> e;
    std::int32_t first = 0;
    for (const Graph& g : parts) {
        for (std::int64_t i = 0; i < g.nodes; ++i)
            for (auto k = Size(g.offsets[Size(i)]); k < Size(g.offsets[Size(i) + 1]); ++k)
                if (g.columns[k] > i) e.push_back({first + static_cast<int>(i), first + g.columns[k], g.weights[k]});
        first += static_cast<std::int32_t>(g.nodes);
    }
    return build_graph(first, e);
}

std::vector<double> sorted(std::vector<double> v, std::int64_t k) {
    std::sort(v.begin(), v.end());
    v.resize(Size(k));
    return v;
}

// Residuals and orthogonality recomputed in double from the returned vectors, count and order; eigenvalues against the
// expected ones. accuracy: of eigenvalues, as a share of the spectrum's bound.
void expect_spectrum(const Graph& g, const Spectrum& s, const std::vector<double>& expected, double accuracy) {
    ASSERT_EQ(s.status, SpectrumStatus::complete) << s.why;
    ASSERT_EQ(s.count(), std::int64_t(expected.size()));
    ASSERT_EQ(s.vectors.size(), Size(g.nodes) * expected.size());
    ASSERT_EQ(s.residuals.size(), expected.size());
    const LaplacianMatrix<double> m = laplacian_of<double>(g, s.kind);
    const double scale = std::max(1.0, m.upper_bound);
    const Size k = expected.size();
    for (Size j = 0; j < k; ++j) {
        EXPECT_LE(std::fabs(s.eigenvalues[j] - expected[j]), accuracy * scale) << "pair " << j << ": " << s.why;
        EXPECT_GE(s.eigenvalues[j], j > 0 ? s.eigenvalues[j - 1] : 0);
        double square = 0;
        float largest = 0;
        for (Size i = 0; i < Size(g.nodes); ++i) {
            double sum = -s.eigenvalues[j] * s.vectors[i * k + j];
            for (auto e = Size(m.offsets[i]); e < Size(m.offsets[i + 1]); ++e)
                sum += m.values[e] * s.vectors[Size(m.columns[e]) * k + j];
            square += sum * sum;
            if (std::fabs(s.vectors[i * k + j]) > std::fabs(largest)) largest = s.vectors[i * k + j];
        }
        EXPECT_LE(std::sqrt(square), 1.1 * s.tolerance + 3e-7 * scale) << "pair " << j;
        EXPECT_GT(largest, 0) << "sign of pair " << j;
    }
    double worst = 0;
    for (Size a = 0; a < k; ++a)
        for (Size b = 0; b <= a; ++b) {
            double dot = 0;
            for (Size i = 0; i < Size(g.nodes); ++i) dot += double(s.vectors[i * k + a]) * s.vectors[i * k + b];
            worst = std::max(worst, std::fabs(dot - (a == b ? 1 : 0)));
        }
    EXPECT_LE(worst, 5e-6);
}

struct Closed {
    const char* name;
    Graph graph;
    LaplacianKind kind;
    std::vector<double> all;  // eigenvalues, in any order
};
std::vector<Closed> closed_forms() {
    const auto C = LaplacianKind::combinatorial, N = LaplacianKind::normalised;
    std::vector<Closed> list;
    const auto add = [&](const char* name, Graph g, LaplacianKind kind, auto&& value) {
        Closed c{name, std::move(g), kind, {}};
        for (std::int64_t m = 0; m < c.graph.nodes; ++m) c.all.push_back(value(double(m)));
        list.push_back(std::move(c));
    };
    add("path", path(900), C, [](double m) { return 2 - 2 * std::cos(kPi * m / 900); });
    add("path normalised", path(700), N, [](double m) { return 1 - std::cos(kPi * m / 699); });
    add("cycle", cycle(1000), C, [](double m) { return 2 - 2 * std::cos(2 * kPi * m / 1000); });
    add("cycle normalised", cycle(801), N, [](double m) { return 1 - std::cos(2 * kPi * m / 801); });
    add("complete", complete(500), C, [](double m) { return m == 0 ? 0. : 500.; });
    add("complete normalised", complete(450), N, [](double m) { return m == 0 ? 0. : 450. / 449; });
    add("star", star(800), C, [](double m) { return m == 0 ? 0. : m == 799 ? 800. : 1.; });
    add("star normalised", star(800), N, [](double m) { return m == 0 ? 0. : m == 799 ? 2. : 1.; });
    add("grid", grid(40, 25), C, [](double m) {
        const double a = std::floor(m / 25), b = m - 25 * a;
        return 4 - 2 * std::cos(kPi * a / 40) - 2 * std::cos(kPi * b / 25);
    });
    add("hypercube", hypercube(10), C, [](double m) { return 2. * __builtin_popcount(unsigned(m)); });
    add("hypercube normalised", hypercube(10), N, [](double m) { return 0.2 * __builtin_popcount(unsigned(m)); });
    return list;
}

SpectrumOptions options(std::int64_t k, LaplacianKind kind, SpectrumMethod method = SpectrumMethod::automatic) {
    SpectrumOptions o;
    o.k = k, o.kind = kind, o.method = method;
    return o;
}

void expect_closed_form(const Closed& c, SpectrumMethod method, bool cuda, double accuracy, std::int64_t k = 25) {
    SCOPED_TRACE(std::string(c.name) + ", " + name_of(method));
    const Spectrum s = solve_spectrum(c.graph, options(k, c.kind, method), cuda);
    EXPECT_EQ(s.method, method);
    EXPECT_EQ(s.zeros, 1);
    expect_spectrum(c.graph, s, sorted(c.all, k), accuracy);
}

// Three components, an isolated node, repeated eigenvalues across components.
void expect_union(SpectrumMethod method, bool cuda, double accuracy) {
    const Graph g = disjoint({cycle(300), grid(20, 20), Graph{1, {0, 0}, {}, {}, {}}, cycle(300), path(2)});
    std::vector<double> all{0, 0, 2};
    for (int m = 0; m < 300; ++m) all.insert(all.end(), 2, 2 - 2 * std::cos(2 * kPi * m / 300));
    for (int m = 0; m < 400; ++m)
        all.push_back(4 - 2 * std::cos(kPi * (m / 20) / 20) - 2 * std::cos(kPi * (m % 20) / 20));
    const Spectrum s = solve_spectrum(g, options(40, LaplacianKind::combinatorial, method), cuda);
    EXPECT_EQ(s.zeros, 5);
    expect_spectrum(g, s, sorted(all, 40), accuracy);
    SpectrumOptions beyond = options(35, LaplacianKind::combinatorial, method);
    beyond.beyond_null = true;
    std::vector<double> nonzero = sorted(all, 40);
    nonzero.erase(nonzero.begin(), nonzero.begin() + 5);
    expect_spectrum(g, solve_spectrum(g, beyond, cuda), nonzero, accuracy);
}

void expect_agrees_with_dense(LaplacianKind kind, SpectrumMethod method, bool cuda, double accuracy) {
    for (const Graph& g : {random_graph(600, 8, 1), disjoint({random_graph(400, 4, 3), path(150)})}) {
        const Spectrum exact = solve_spectrum(g, options(60, kind, SpectrumMethod::dense), false);
        expect_spectrum(g, solve_spectrum(g, options(60, kind, method), cuda), exact.eigenvalues, accuracy);
    }
}

// A closed form, a union, an isolated node and repeated eigenvalues on graphs that take a few filters: short enough for
// compute-sanitizer's racecheck.
void expect_small(SpectrumMethod method, bool cuda, double accuracy) {
    std::vector<double> of_cube, of_union{0, 0, 2};
    for (unsigned m = 0; m < 512; ++m) of_cube.push_back(2. * __builtin_popcount(m));
    expect_closed_form({"hypercube", hypercube(9), LaplacianKind::combinatorial, of_cube}, method, cuda, accuracy, 10);
    const Graph g = disjoint({hypercube(8), Graph{1, {0, 0}, {}, {}, {}}, hypercube(8), path(2)});
    for (unsigned m = 0; m < 512; ++m) of_union.push_back(2. * __builtin_popcount(m % 256));
    const Spectrum s = solve_spectrum(g, options(21, LaplacianKind::combinatorial, method), cuda);
    EXPECT_EQ(s.method, method);
    EXPECT_EQ(s.zeros, 4);
    expect_spectrum(g, s, sorted(of_union, 21), accuracy);
}

constexpr SpectrumMethod kIterative[] = {SpectrumMethod::filter, SpectrumMethod::multilevel};
constexpr LaplacianKind kKinds[] = {LaplacianKind::normalised, LaplacianKind::combinatorial};

TEST(Spectrum, ClosedForms) {
    for (const Closed& c : closed_forms())
        for (const auto method : {SpectrumMethod::dense, SpectrumMethod::filter, SpectrumMethod::multilevel})
            expect_closed_form(c, method, false, 1e-9);
}
TEST(Spectrum, SmallForms) {
    for (const auto method : kIterative) expect_small(method, false, 1e-9);
}
TEST(Spectrum, UnionsAndIsolatedNodes) {
    for (const auto method : kIterative) expect_union(method, false, 1e-9);
}
TEST(Spectrum, AgreesWithDense) {
    for (const auto kind : kKinds)
        for (const auto method : kIterative) expect_agrees_with_dense(kind, method, false, 1e-9);
}

// In double. In f32 such a spectrum may end as a partial result: SubspaceSolverF32.
TEST(Spectrum, TinyEigenvaluesBelowACluster) {
    const Graph g = clique_chain(4, 300);
    for (const auto kind : {LaplacianKind::normalised, LaplacianKind::combinatorial}) {
        const Spectrum exact = solve_spectrum(g, options(20, kind, SpectrumMethod::dense), false);
        for (const auto method : {SpectrumMethod::filter, SpectrumMethod::multilevel})
            expect_spectrum(g, solve_spectrum(g, options(20, kind, method), false), exact.eigenvalues, 1e-9);
    }
}

TEST(Spectrum, SmallGraphsAndAllPairs) {
    for (const int n : {1, 2, 3, 7}) {
        const Graph g = path(n);
        std::vector<double> all;
        for (int m = 0; m < n; ++m) all.push_back(2 - 2 * std::cos(kPi * m / n));
        expect_spectrum(g, solve_spectrum(g, options(n + 5, LaplacianKind::combinatorial), false), all, 1e-9);
    }
}

TEST(Spectrum, NodeOrderChangesOnlyTheOrder) {
    const Graph g = random_graph(900, 6, 5);
    std::vector<std::int32_t> order(900);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(7));
    const Graph shuffled = permute(g, order);
    const auto o = options(12, LaplacianKind::normalised, SpectrumMethod::filter);
    const Spectrum a = solve_spectrum(g, o, false), b = solve_spectrum(shuffled, o, false);
    for (Size j = 0; j < 12; ++j) {
        EXPECT_NEAR(a.eigenvalues[j], b.eigenvalues[j], 1e-9);
        for (Size i = 0; i < 900; ++i)  // simple eigenvalues: the vectors themselves
            EXPECT_NEAR(a.vectors[Size(order[i]) * 12 + j], b.vectors[i * 12 + j], 1e-3);
    }
}

TEST(Spectrum, ThreadsAndRepetitionChangeNothing) {
    const Graph g = grid(40, 30);
    for (const auto method : {SpectrumMethod::filter, SpectrumMethod::multilevel}) {
        SpectrumOptions o = options(20, LaplacianKind::normalised, method);
        o.threads = 1;
        const Spectrum a = solve_spectrum(g, o, false), again = solve_spectrum(g, o, false);
        o.threads = 3;
        const Spectrum b = solve_spectrum(g, o, false);
        EXPECT_EQ(a.vectors, again.vectors);
        EXPECT_EQ(a.vectors, b.vectors);
        EXPECT_EQ(a.eigenvalues, b.eigenvalues);
    }
}

// Starts that lack an eigenvector altogether: converged at once, and wrong, but for the completeness check.
void expect_overlooked_pair_found(bool cuda) {
    const Graph g = path(600);
    const Spectrum exact = solve_spectrum(g, options(80, LaplacianKind::normalised, SpectrumMethod::dense), false);
    SpectrumOptions o = options(21, LaplacianKind::normalised, SpectrumMethod::filter);
    for (Size i = 0; i < 600; ++i)
        for (Size j = 0; j < 70; ++j)
            if (j != 0 && j != 4) o.start.push_back(exact.vectors[i * 80 + j]);
    o.start_columns = 68;
    const Spectrum s = solve_spectrum(g, o, cuda);
    std::vector<double> expected(exact.eigenvalues.begin(), exact.eigenvalues.begin() + 21);
    expect_spectrum(g, s, expected, 1e-6);
}
TEST(Spectrum, OverlookedPairIsFound) { expect_overlooked_pair_found(false); }

TEST(Spectrum, WarmStartSavesWork) {
    const Graph g = random_graph(3000, 8, 11);
    SpectrumOptions o = options(30, LaplacianKind::normalised, SpectrumMethod::filter);
    const Spectrum cold = solve_spectrum(g, o, false);
    o.start = cold.vectors;
    o.start_columns = 30;
    const Spectrum warm = solve_spectrum(g, o, false);
    EXPECT_EQ(warm.status, SpectrumStatus::complete);
    EXPECT_LT(warm.products, cold.products);
    for (Size j = 0; j < 30; ++j) EXPECT_NEAR(cold.eigenvalues[j], warm.eigenvalues[j], 1e-8);
}

TEST(Spectrum, PartialResultsSayso) {
    const Graph g = random_graph(3000, 8, 11);
    SpectrumOptions o = options(30, LaplacianKind::normalised, SpectrumMethod::filter);
    o.max_iterations = 1;
    const Spectrum s = solve_spectrum(g, o, false);
    EXPECT_EQ(s.status, SpectrumStatus::partial);
    EXPECT_NE(s.why.find("not converged after 1 iteration"), std::string::npos) << s.why;
    EXPECT_GT(*std::max_element(s.residuals.begin(), s.residuals.end()), s.tolerance);
    o.max_iterations = 100;
    int asked = 0;
    o.stop = [&] { return ++asked > 1; };
    const Spectrum stopped = solve_spectrum(g, o, false);
    EXPECT_EQ(stopped.status, SpectrumStatus::partial);
    EXPECT_NE(stopped.why.find("stopped"), std::string::npos) << stopped.why;
}

TEST(Spectrum, ProgressEndsConverged) {
    SpectrumOptions o = options(20, LaplacianKind::normalised, SpectrumMethod::filter);
    SpectrumProgress last;
    int calls = 0;
    o.progress = [&](const SpectrumProgress& p) { last = p, ++calls; };
    solve_spectrum(grid(30, 30), o, false);
    EXPECT_GT(calls, 1);
    EXPECT_EQ(last.wanted, 19);
    EXPECT_EQ(last.converged, 19);
}

std::string refusal(const Graph& g, const SpectrumOptions& o) {
    try {
        solve_spectrum(g, o, false);
    } catch (const InputError& e) {
        return e.what();
    }
    return "accepted";
}
TEST(Spectrum, RefusesBadInput) {
    const Graph three = disjoint({path(300), path(300), path(300)});
    EXPECT_NE(refusal(path(10), options(0, LaplacianKind::normalised)).find("k is 0"), std::string::npos);
    EXPECT_NE(refusal(Graph{}, options(1, LaplacianKind::normalised)).find("empty"), std::string::npos);
    EXPECT_NE(refusal(three, options(3, LaplacianKind::normalised)).find("3 components and k is 3"), std::string::npos);
    EXPECT_NE(refusal(path(4000), options(600, LaplacianKind::normalised)).find("at most 512"), std::string::npos);
    SpectrumOptions o = options(5, LaplacianKind::normalised, SpectrumMethod::filter);
    o.tolerance = -1;
    EXPECT_NE(refusal(path(3000), o).find("tolerance"), std::string::npos);
    o = options(5, LaplacianKind::normalised, SpectrumMethod::filter);
    o.memory_budget = 1000;
    EXPECT_NE(refusal(path(3000), o).find("budget"), std::string::npos);
    o = options(5, LaplacianKind::normalised, SpectrumMethod::filter);
    o.start_columns = 2;
    EXPECT_NE(refusal(path(3000), o).find("start"), std::string::npos);
    o = options(2, LaplacianKind::normalised);
    o.beyond_null = true;
    EXPECT_NE(refusal(Graph{4, {0, 0, 0, 0, 0}, {}, {}, {}}, o).find("no edges"), std::string::npos);
}

// In f32 with f64 sums: eigenvalues to 1e-6 of the norm. One solve or two a test, so that several processes share them
// under compute-sanitizer.
class SpectrumGpu : public testing::Test {
  protected:
    void SetUp() override {
        std::string why;
        if (cuda_device_count(&why) == 0) GTEST_SKIP() << "no GPU: " << why;
    }
};
class SpectrumGpuMethod : public SpectrumGpu, public testing::WithParamInterface<SpectrumMethod> {};
class SpectrumGpuForm : public SpectrumGpu, public testing::WithParamInterface<std::tuple<int, SpectrumMethod>> {};
class SpectrumGpuKind : public SpectrumGpu,
                        public testing::WithParamInterface<std::tuple<LaplacianKind, SpectrumMethod>> {};
constexpr int kClosedForms = 11;
INSTANTIATE_TEST_SUITE_P(Each, SpectrumGpuMethod, testing::ValuesIn(kIterative));
INSTANTIATE_TEST_SUITE_P(Each, SpectrumGpuForm,
                         testing::Combine(testing::Range(0, kClosedForms), testing::ValuesIn(kIterative)));
INSTANTIATE_TEST_SUITE_P(Each, SpectrumGpuKind,
                         testing::Combine(testing::ValuesIn(kKinds), testing::ValuesIn(kIterative)));
TEST_P(SpectrumGpuForm, Closed) {
    const std::vector<Closed> forms = closed_forms();
    ASSERT_EQ(forms.size(), Size(kClosedForms));
    expect_closed_form(forms[Size(std::get<0>(GetParam()))], std::get<1>(GetParam()), true, 1e-6);
}
TEST_P(SpectrumGpuMethod, SmallForms) { expect_small(GetParam(), true, 1e-6); }
TEST_P(SpectrumGpuMethod, UnionsAndIsolatedNodes) { expect_union(GetParam(), true, 1e-6); }
TEST_P(SpectrumGpuKind, AgreesWithDense) {
    expect_agrees_with_dense(std::get<0>(GetParam()), std::get<1>(GetParam()), true, 1e-6);
}
TEST_P(SpectrumGpuMethod, RepetitionChangesNothing) {
    const Graph g = grid(60, 50);
    const SpectrumOptions o = options(20, LaplacianKind::normalised, GetParam());
    EXPECT_EQ(solve_spectrum(g, o, true).vectors, solve_spectrum(g, o, true).vectors);
}
TEST_F(SpectrumGpu, OverlookedPairIsFound) { expect_overlooked_pair_found(true); }
// More than a cache holds: filtered in narrow panels, from a Krylov space.
TEST_F(SpectrumGpu, ManyNodesWithoutLocality) {
    const Graph g = random_graph(500000, 8, 5);
    SpectrumOptions o = options(30, LaplacianKind::normalised, SpectrumMethod::filter);
    o.tolerance = 1e-4;
    const Spectrum s = solve_spectrum(g, o, true);
    expect_spectrum(g, s, s.eigenvalues, 1);
    EXPECT_EQ(solve_spectrum(g, o, true).vectors, s.vectors);
}

}  // namespace
}  // namespace fiedler
