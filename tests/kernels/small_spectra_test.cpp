// small_spectra: closed forms, every size class and its edges, padding, signs, clusters, bad entries, and the GPU held to
// the same conditions. Vectors are never compared element by element: residual, orthogonality and eigenvalues are.
#include "kernels/small_spectra.h"

#include <Eigen/Dense>
#include <algorithm>
#include <numbers>
#include <numeric>

#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Dense = Eigen::MatrixXd;

// ---- graphs: dense Laplacians whose entries are floats ----

Dense link(Dense l, int a, int b, double weight = 1) {
    weight = double(float(weight));
    l(a, b) -= weight, l(b, a) -= weight, l(a, a) += weight, l(b, b) += weight;
    return l;
}
Dense rounded(const Dense& l) { return l.cast<float>().cast<double>(); }
Dense path(int n) {
    Dense l = Dense::Zero(n, n);
    for (int i = 0; i + 1 < n; ++i) l = link(std::move(l), i, i + 1);
    return l;
}
Dense cycle(int n) { return link(path(n), n - 1, 0); }
Dense complete(int n) { return double(n) * Dense::Identity(n, n) - Dense::Ones(n, n); }
Dense star(int n) {
    Dense l = Dense::Zero(n, n);
    for (int i = 1; i < n; ++i) l = link(std::move(l), 0, i);
    return l;
}
Dense product(const Dense& a, const Dense& b) {  // Cartesian product of graphs: eigenvalues add
    const auto n = a.rows(), m = b.rows();
    Dense l = Dense::Zero(n * m, n * m);
    for (Eigen::Index i = 0; i < n; ++i)
        for (Eigen::Index j = 0; j < n; ++j) {
            l.block(i * m, j * m, m, m) += a(i, j) * Dense::Identity(m, m);
            if (i == j) l.block(i * m, j * m, m, m) += b;
        }
    return l;
}
Dense hypercube(int d) { return d == 0 ? Dense(Dense::Zero(1, 1)) : product(hypercube(d - 1), path(2)); }
Dense both(const Dense& a, const Dense& b) {
    Dense l = Dense::Zero(a.rows() + b.rows(), a.rows() + b.rows());
    l.topLeftCorner(a.rows(), a.rows()) = a;
    l.bottomRightCorner(b.rows(), b.rows()) = b;
    return l;
}
Dense molecule(int n, std::uint64_t seed) {  // a tree of low degree and a few rings
    std::mt19937_64 g(seed);
    Dense l = Dense::Zero(n, n);
    for (int i = 1; i < n; ++i) l = link(std::move(l), i, std::max(0, i - 1 - int(g() % 4)));
    for (int r = 0; n > 6 && r < n / 8 + 1; ++r) {
        const int a = int(g() % std::uint64_t(n - 5));
        if (l(a, a + 5) == 0) l = link(std::move(l), a, a + 5);
    }
    return l;
}
Dense random_graph(int n, double degree, std::uint64_t seed) {  // weighted
    std::mt19937_64 g(seed);
    std::uniform_real_distribution<double> u(0, 1);
    Dense l = Dense::Zero(n, n);
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < i; ++j)
            if (u(g) * n < degree) l = link(std::move(l), i, j, 0.1 + u(g));
    return rounded(l);
}
Dense random_symmetric(int n, std::uint64_t seed) {  // indefinite
    const Values v = random_values(std::size_t(n * n), seed);
    const Dense a = Eigen::Map<const Dense>(v.data(), n, n);
    return rounded(a + a.transpose());
}
Dense shuffled(const Dense& l, std::uint64_t seed) {
    std::vector<int> order(std::size_t(l.rows()));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    return l(order, order);
}

// ---- a batch, its run and what must hold ----

struct Batch {
    std::vector<Dense> graphs;
    std::vector<std::int32_t> nodes{0}, columns;
    std::vector<std::int64_t> rows{0};
    Values entries;
    std::int64_t largest = 1;

    explicit Batch(std::vector<Dense> l) : graphs(std::move(l)) {
        for (const Dense& a : graphs) {
            for (int i = 0; i < a.rows(); ++i) {
                for (int j = 0; j < a.rows(); ++j)
                    if (a(i, j) != 0) columns.push_back(j), entries.push_back(a(i, j));
                rows.push_back(std::int64_t(columns.size()));
            }
            nodes.push_back(nodes.back() + std::int32_t(a.rows()));
            largest = std::max<std::int64_t>(largest, a.rows());
        }
    }
    std::int64_t count() const { return std::int64_t(graphs.size()); }
};
struct Result {
    std::int64_t k;
    Values values, vectors, residual;
    std::vector<std::int32_t> status;
    Values row(std::int64_t g) const { return {values.begin() + g * k, values.begin() + (g + 1) * k}; }
};
constexpr double kFiller = -7;

template <class A, class Dev>
Result run(const Dev& d, const Batch& b, std::int64_t k, std::int64_t gap = 3, bool with_vectors = true) {
    const std::int64_t graphs = b.count(), nodes = b.nodes.back();
    const Buffer<std::int32_t, Dev> offsets(d, b.nodes), columns(d, b.columns), status(d, std::size_t(graphs));
    const Buffer<std::int64_t, Dev> rows(d, b.rows);
    const Buffer<A, Dev> matrix(d, to<A>(b.entries)), residual(d, std::size_t(graphs));
    const Padded<A, Dev> values(d, graphs, k, k + gap), vectors(d, nodes, k, k + gap);
    SmallSpectra<A> p;
    p.values = values.mat(), p.residual = residual.vec(), p.status = status.vec();
    if (with_vectors) p.vectors = vectors.mat();
    p.node_offsets = offsets.vec(), p.row_offsets = rows.vec(), p.columns = columns.vec(), p.matrix = matrix.vec();
    p.filler = A(kFiller);
    const SmallSpectraOrder order = small_spectra_order(b.nodes.data(), graphs);
    const Buffer<std::int32_t, Dev> sorted(d, order.graphs);
    const Buffer<A, Dev> scratch(d, std::size_t(small_spectra_scratch_elements(order.first)));
    if constexpr (!std::is_same_v<Dev, Cpu>) p.order = sorted.vec(), p.first = order.first, p.scratch = scratch.vec();
    small_spectra(d, p);
    return {k, values.values(), vectors.values(), residual.values(), status.host()};
}

// Bounds relative to the norm of the matrix, or half its largest row sum of magnitudes where that is more (never for a
// Laplacian): the shift goes by row sums, and makes the matrix that is rotated at most 3 times as large. Rounding in A with
// unit u: each of about 10 n rotations a column takes part in changes its entries by 0.4 u of themselves, independently:
// 3 x 0.4 u sqrt(10 n), about 4 u sqrt(n), in the residual, and a few units for short columns. Eigenvalues are held to the
// contract's 1e-6 (16 u), orthogonality to as much.
struct Bounds {
    double unit;
    double value() const { return 16 * unit; }
    double orthogonality() const { return 16 * unit; }
    double residual(double n) const { return unit * (8 + 4 * std::sqrt(n)); }
};
template <class A>
Bounds bounds_of(double factor = 1) {
    return {factor * 0.5 * double(std::numeric_limits<A>::epsilon())};
}

void check_pairs(const Dense& a, const Values& mu, const Dense& x, double reported, const Bounds& bounds) {
    const Eigen::Index n = a.rows(), pairs = x.cols();
    const Eigen::VectorXd exact = Eigen::SelfAdjointEigenSolver<Dense>(a).eigenvalues();
    const double norm = std::max(exact.cwiseAbs().maxCoeff(), a.cwiseAbs().rowwise().sum().maxCoeff() / 2);
    double residual = 0, value = 0;
    for (Eigen::Index j = 0; j < pairs; ++j) {
        value = std::max(value, std::abs(mu[std::size_t(j)] - exact[j]));
        residual = std::max(residual, (a * x.col(j) - mu[std::size_t(j)] * x.col(j)).norm());
        EXPECT_TRUE(j == 0 || mu[std::size_t(j)] >= mu[std::size_t(j - 1)]) << "not ascending at " << j;
        Eigen::Index largest = 0;
        for (Eigen::Index i = 1; i < n; ++i)
            if (std::abs(x(i, j)) > std::abs(x(largest, j))) largest = i;
        EXPECT_GT(x(largest, j), 0) << "sign of vector " << j;
    }
    const double off = (x.transpose() * x - Dense::Identity(pairs, pairs)).cwiseAbs().maxCoeff();
    EXPECT_LE(value, bounds.value() * norm) << "eigenvalues, norm " << norm;
    EXPECT_LE(off, bounds.orthogonality()) << "orthogonality";
    EXPECT_LE(residual, bounds.residual(double(n)) * norm) << "residual, norm " << norm;
    EXPECT_NEAR(reported, residual, 8 * bounds.unit * norm) << "residual as reported";
}

void check_batch(const Batch& b, const Result& r, const Bounds& bounds) {
    for (std::int64_t g = 0; g < b.count(); ++g) {
        const Dense& a = b.graphs[std::size_t(g)];
        const Eigen::Index n = a.rows(), pairs = std::min<Eigen::Index>(n, r.k), first = b.nodes[std::size_t(g)];
        SCOPED_TRACE(testing::Message() << "graph " << g << " of " << n << " nodes, k " << r.k);
        EXPECT_EQ(r.status[std::size_t(g)], kSmallSpectraDone);
        const Values mu = r.row(g);
        for (Eigen::Index j = pairs; j < r.k; ++j) EXPECT_EQ(mu[std::size_t(j)], kFiller);
        Dense x(n, r.k);
        for (Eigen::Index i = 0; i < n; ++i)
            for (Eigen::Index j = 0; j < r.k; ++j) x(i, j) = r.vectors[std::size_t((first + i) * r.k + j)];
        ASSERT_TRUE(x.allFinite());
        EXPECT_TRUE(pairs == r.k || n == 0 || x.rightCols(r.k - pairs).isZero(0)) << "padding";
        if (n > 0)
            check_pairs(a, mu, x.leftCols(pairs), r.residual[std::size_t(g)], bounds);
        else
            EXPECT_EQ(r.residual[std::size_t(g)], 0);
    }
}
void expect_same(const Result& a, const Result& b) {
    const auto same = [](const Values& x, const Values& y) {
        ASSERT_EQ(x.size(), y.size());
        EXPECT_TRUE(identical(x.data(), y.data(), x.size() * sizeof(double)));
    };
    same(a.values, b.values), same(a.vectors, b.vectors), same(a.residual, b.residual);
    EXPECT_EQ(a.status, b.status);
}

// ---- the cases, for any device and precision ----

struct Known {
    Dense l;
    Values mu;
};
std::vector<Known> closed_forms(int n) {
    const auto wave = [&](double m, double of) { return 2 - 2 * std::cos(std::numbers::pi * m / of); };
    Values path_mu, cycle_mu, complete_mu(std::size_t(n), n), star_mu(std::size_t(n), 1);
    for (int m = 0; m < n; ++m) path_mu.push_back(wave(m, n)), cycle_mu.push_back(wave(2 * m, n));
    complete_mu[0] = star_mu[0] = 0, star_mu.back() = n;
    std::vector<Known> all = {{path(n), path_mu}, {cycle(n), cycle_mu}, {complete(n), complete_mu}, {star(n), star_mu}};
    const int half = n / 2;  // two cycles and a lone node, if n is odd
    Values pair_mu(std::size_t(n % 2), 0.0);
    for (int m = 0; m < half; ++m) pair_mu.insert(pair_mu.end(), 2, wave(2 * m, half));
    Dense pair = both(cycle(half), cycle(half));
    if (n % 2) pair = both(pair, path(1));
    all.push_back({pair, pair_mu});
    const int width = std::max(2, int(std::sqrt(n))), height = n / width;
    Values grid_mu;
    for (int a = 0; a < width; ++a)
        for (int b = 0; b < height; ++b) grid_mu.push_back(wave(a, width) + wave(b, height));
    all.push_back({product(path(width), path(height)), grid_mu});
    return all;
}
Known known_hypercube(int d) {
    Values mu;
    for (int i = 0; i < 1 << d; ++i) mu.push_back(2 * std::popcount(unsigned(i)));
    return {hypercube(d), mu};
}

template <class A, class Dev>
void check_closed_forms(const Dev& d, const std::vector<int>& sizes, int dimensions, const Bounds& bounds) {
    std::vector<Known> known;
    for (const int n : sizes)
        for (Known& one : closed_forms(n)) known.push_back(std::move(one));
    for (int i = 0; i <= dimensions; ++i) known.push_back(known_hypercube(i));
    std::vector<Dense> graphs;
    for (const Known& one : known) graphs.push_back(one.l);
    const Batch b(graphs);
    const Result r = run<A>(d, b, b.largest);
    check_batch(b, r, bounds);
    for (std::size_t g = 0; g < known.size(); ++g) {
        Values& mu = known[g].mu;
        std::sort(mu.begin(), mu.end());
        Values got = r.row(std::int64_t(g));
        got.resize(mu.size());
        for (std::size_t j = 0; j < mu.size(); ++j)
            EXPECT_NEAR(got[j], mu[j], bounds.value() * mu.back()) << "graph " << g << " of " << mu.size() << ", " << j;
    }
}

const std::vector<int> kSmall = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14,
                                 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
                                 30, 31, 32, 33, 39, 40, 41, 47, 48, 49, 55, 56, 57, 63};
const std::vector<int> kLarge = {64, 65, 66, 96, 97, 127, 128, 129, 160, 255, 256, 257};
const std::vector<int> kLargest = {384, 385, 511, 512};
std::vector<Dense> graphs_of(const std::vector<int>& sizes) {
    std::vector<Dense> all;
    for (const int n : sizes) {
        const auto seed = std::uint64_t(n);
        all.push_back(molecule(n, seed));
        all.push_back(random_graph(n, 6, seed));
        all.push_back(random_symmetric(n, seed));
    }
    std::shuffle(all.begin(), all.end(), std::mt19937_64(5));
    return all;
}
template <class A, class Dev>
void check_sizes(const Dev& d, const std::vector<int>& sizes, const std::vector<std::int64_t>& ks,
                 const Bounds& bounds) {
    const Batch b(graphs_of(sizes));
    for (const std::int64_t k : ks) check_batch(b, run<A>(d, b, k), bounds);
    check_batch(b, run<A>(d, b, b.largest + 2, 0), bounds);
}

// Clusters: copies of a graph joined by weak links, weak loops, weights over many orders of magnitude, scaled matrices.
std::vector<Dense> hard_graphs(int n) {
    std::vector<Dense> all;
    for (const double weak : {1e-1, 1e-3, 1e-5, 1e-6, 1e-7, 1e-9}) {
        all.push_back(rounded(link(both(cycle(n / 2), cycle(n / 2)), 0, n / 2, weak)));
        Dense loops = complete(n);
        for (int i = 0; i < n; ++i) loops(i, i) += weak * i;
        all.push_back(rounded(loops));
        all.push_back(rounded(link(product(path(n / 4), cycle(4)), 0, 2, weak)));
    }
    Dense graded = Dense::Zero(n, n);
    for (int i = 0; i + 1 < n; ++i) graded = link(std::move(graded), i, i + 1, std::pow(10, -9.0 * i / n));
    all.push_back(rounded(graded));
    for (const double scale : {1e-25, 1e-10, 1e10, 1e30}) all.push_back(rounded(scale * random_graph(n, 4, 9)));
    all.push_back(Dense::Zero(n, n));
    all.push_back(-3 * Dense::Identity(n, n));
    all.push_back(-molecule(n, 3));
    return all;
}
template <class A, class Dev>
void check_hard(const Dev& d, const std::vector<int>& sizes, const Bounds& bounds) {
    for (const int n : sizes) {
        const Batch b(hard_graphs(n));
        check_batch(b, run<A>(d, b, n), bounds);
    }
}

// A graph alone, and among others; twice; without vectors; with its nodes in another order.
template <class A, class Dev>
void check_repeatable(const Dev& d, const std::vector<int>& sizes, const Bounds& bounds) {
    const Batch b(graphs_of(sizes));
    const std::int64_t k = 12;
    const Result r = run<A>(d, b, k);
    expect_same(r, run<A>(d, b, k));
    const Result bare = run<A>(d, b, k, 3, false);
    EXPECT_EQ(bare.values, r.values);
    EXPECT_EQ(bare.residual, r.residual);
    for (const Values& v : {bare.vectors})
        EXPECT_TRUE(std::none_of(v.begin(), v.end(), [](double x) { return x == x; }));
    for (std::int64_t g = 0; g < b.count(); ++g) {
        const Dense& l = b.graphs[std::size_t(g)];
        if (l.rows() == 0) continue;
        const Batch one({l}), other({shuffled(l, 11)});
        const Result alone = run<A>(d, one, k), moved = run<A>(d, other, k);
        const auto at = r.vectors.begin() + b.nodes[std::size_t(g)] * k;
        EXPECT_EQ(alone.values, r.row(g));
        EXPECT_EQ(alone.vectors, Values(at, at + l.rows() * k)) << "graph " << g << " depends on the others";
        const Eigen::VectorXd exact = Eigen::SelfAdjointEigenSolver<Dense>(l).eigenvalues();
        const double tolerance = 2 * bounds.value() * exact.cwiseAbs().maxCoeff();
        for (std::size_t j = 0; j < std::size_t(k); ++j) EXPECT_NEAR(moved.values[j], alone.values[j], tolerance);
    }
}

// Entries that are not finite, columns out of range: said, and the neighbours are as they would be without.
template <class A, class Dev>
void check_invalid(const Dev& d, int n) {
    const std::vector<Dense> graphs(9, cycle(n));
    const Batch good(graphs);
    const Result ref = run<A>(d, good, n + 1);
    const std::size_t each = good.entries.size() / 9;
    Batch bad = good;
    bad.entries[each + 4] = std::nan("");
    bad.entries[4 * each] = INFINITY;
    bad.columns[6 * each + 5] = n;
    bad.columns[8 * each] = -1;
    const Result r = run<A>(d, bad, n + 1);
    for (std::int64_t g = 0; g < 9; ++g) {
        SCOPED_TRACE(testing::Message() << "graph " << g << " of " << n << " nodes");
        const bool broken = g == 1 || g == 4 || g == 6 || g == 8;
        EXPECT_EQ(r.status[std::size_t(g)], broken ? kSmallSpectraInvalid : kSmallSpectraDone);
        EXPECT_EQ(std::isnan(r.residual[std::size_t(g)]), broken);
        for (std::int64_t j = 0; j < n; ++j) {
            const auto at = std::size_t(g * (n + 1) + j);
            EXPECT_TRUE(broken ? std::isnan(r.values[at]) : r.values[at] == ref.values[at]);
            for (std::int64_t i = g * n; i < (g + 1) * n; ++i)
                EXPECT_EQ(std::isnan(r.vectors[std::size_t(i * (n + 1) + j)]), broken);
        }
        EXPECT_EQ(r.values[std::size_t(g * (n + 1) + n)], kFiller);
    }
}
template <class A, class Dev>
void check_duplicates(const Dev& d, int n) {  // every entry in two halves, and the rows backwards
    const Batch whole({molecule(n, 1)});
    Batch halves = whole;
    halves.columns.clear(), halves.entries.clear();
    for (std::size_t i = 0; i + 1 < whole.rows.size(); ++i) {
        for (int part = 0; part < 2; ++part)
            for (std::int64_t e = whole.rows[i + 1] - 1; e >= whole.rows[i]; --e) {
                halves.columns.push_back(whole.columns[std::size_t(e)]);
                halves.entries.push_back(whole.entries[std::size_t(e)] / 2);
            }
        halves.rows[i + 1] = std::int64_t(halves.columns.size());
    }
    check_batch(whole, run<A>(d, halves, n), bounds_of<A>(sizeof(A) == 8 ? 16 : 1));
}

// ---- the tests ----

TEST(SmallSpectra, MeetingsAreEveryPairOnce) {
    for (const int pairs : {1, 2, 5, 16}) {
        const int n = 2 * pairs;
        std::vector<int> met(std::size_t(n * n), 0);
        for (int round = 0; round < n - 1; ++round) {
            std::vector<int> busy(std::size_t(n), 0);
            for (int pair = 0; pair < pairs; ++pair) {
                const auto [a, b] = small_spectra_meeting(pairs, round, pair);
                ++busy[std::size_t(a)], ++busy[std::size_t(b)];
                ++met[std::size_t(a * n + b)], ++met[std::size_t(b * n + a)];
            }
            EXPECT_TRUE(std::all_of(busy.begin(), busy.end(), [](int x) { return x == 1; }));
        }
        for (int i = 0; i < n * n; ++i) EXPECT_EQ(met[std::size_t(i)], i % n != i / n);
    }
}
TEST(SmallSpectra, OrderIsBySizeClass) {
    const std::vector<std::int32_t> sizes = {30, 0, 4, 5, 512, 30, 65, 64, 33, 1},
                                    expected = {1, 2, 9, 3, 0, 5, 8, 7, 6, 4};
    const Ragged offsets(sizes);
    const SmallSpectraOrder order = small_spectra_order(offsets.offsets.data(), std::int64_t(sizes.size()));
    EXPECT_EQ(order.graphs, expected);
    EXPECT_EQ(order.first, (SmallSpectraClasses{0, 3, 4, 4, 4, 4, 4, 4, 6, 7, 7, 7, 8, 9, 9, 9, 10}));
    EXPECT_EQ(small_spectra_scratch_elements(order.first), 512 * 512);
    const Ragged large({5, 513});
    EXPECT_THROW(small_spectra_order(large.offsets.data(), 2), ContractError);
    const std::vector<std::int32_t> falling = {0, 5, 3};
    EXPECT_THROW(small_spectra_order(falling.data(), 2), ContractError);
}
// Cpu, double: Householder reduction and QL are good to a small multiple of n units; two solvers are compared.
TEST(SmallSpectra, ClosedForms) {
    check_closed_forms<double>(Cpu{}, {2, 3, 4, 7, 16, 31, 64, 100}, 7, bounds_of<double>(16));
    check_closed_forms<float>(Cpu{}, {2, 3, 4, 7, 16, 31, 64, 100}, 7, bounds_of<float>());
}
TEST(SmallSpectra, EverySize) {
    check_sizes<double>(Cpu{}, kSmall, {1, 7}, bounds_of<double>(16));
    check_sizes<float>(Cpu{}, kSmall, {1, 7}, bounds_of<float>());
    check_sizes<float>(Cpu{}, {64, 65, 128, 257}, {33}, bounds_of<float>());
}
TEST(SmallSpectra, Clusters) {
    check_hard<double>(Cpu{}, {8, 24}, bounds_of<double>(16));
    check_hard<float>(Cpu{}, {8, 24}, bounds_of<float>());
}
TEST(SmallSpectra, Repeatable) {
    check_repeatable<float>(Cpu{}, kSmall, bounds_of<float>());
    const Batch b(graphs_of(kSmall));
    expect_same(run<float>(Cpu{1}, b, 20), run<float>(Cpu{3}, b, 20));
}
TEST(SmallSpectra, BadEntriesAreSaid) { check_invalid<float>(Cpu{}, 6); }
TEST(SmallSpectra, DuplicatesAddUp) { check_duplicates<double>(Cpu{}, 20); }

#if FIEDLER_CUDA
TEST(SmallSpectra, GpuClosedForms) {
    FIEDLER_GPU_OR_SKIP();
    check_closed_forms<float>(gpu(), {2, 3, 4, 7, 9, 16, 31, 32, 33, 50, 64, 65, 100, 128, 130}, 8, bounds_of<float>());
}
TEST(SmallSpectra, GpuLargestClosedForms) {
    FIEDLER_GPU_OR_SKIP();
    check_closed_forms<float>(gpu(), {512}, 9, bounds_of<float>());
}
TEST(SmallSpectra, GpuEverySize) {
    FIEDLER_GPU_OR_SKIP();
    check_sizes<float>(gpu(), kSmall, {1, 7, 33}, bounds_of<float>());
}
TEST(SmallSpectra, GpuEveryLargeSize) {
    FIEDLER_GPU_OR_SKIP();
    check_sizes<float>(gpu(), kLarge, {33}, bounds_of<float>());
    check_sizes<float>(gpu(), kLargest, {}, bounds_of<float>());
}
TEST(SmallSpectra, GpuClusters) {
    FIEDLER_GPU_OR_SKIP();
    check_hard<float>(gpu(), {4, 8, 12, 16, 20, 24, 28, 32, 40, 64, 96, 160}, bounds_of<float>());
}
TEST(SmallSpectra, GpuRepeatable) {
    FIEDLER_GPU_OR_SKIP();
    check_repeatable<float>(gpu(), kSmall, bounds_of<float>());
    check_repeatable<float>(gpu(), {65, 140}, bounds_of<float>());
}
TEST(SmallSpectra, GpuBadEntriesAreSaid) {
    FIEDLER_GPU_OR_SKIP();
    for (const int n : {4, 6, 20, 32, 64, 70}) check_invalid<float>(gpu(), n);
}
TEST(SmallSpectra, GpuDuplicatesAddUp) {
    FIEDLER_GPU_OR_SKIP();
    for (const int n : {3, 20, 64, 100}) check_duplicates<float>(gpu(), n);
}
TEST(SmallSpectra, GpuMoreGraphsThanSlots) {  // blocks take several graphs, one after another
    FIEDLER_GPU_OR_SKIP();
    const std::size_t count = std::size_t(small_spectra_slots(128)) + 40;
    const Batch b(std::vector<Dense>(count, molecule(65, 2)));
    const Result r = run<float>(gpu(), b, 3);
    check_batch(Batch({b.graphs[0]}), {3, r.row(0), r.vectors, r.residual, r.status}, bounds_of<float>());
    for (std::int64_t g = 1; g < b.count(); ++g) EXPECT_EQ(r.row(g), r.row(0)) << g;
    for (std::size_t i = 65 * 3; i < r.vectors.size(); ++i) ASSERT_EQ(r.vectors[i], r.vectors[i - 65 * 3]) << i;
}
TEST(SmallSpectra, GpuNeedsScratch) {
    FIEDLER_GPU_OR_SKIP();
    SmallSpectra<float> p;
    EXPECT_THROW(small_spectra(gpu(), p), ContractError);
}
#endif

}  // namespace
}  // namespace fiedler::test
