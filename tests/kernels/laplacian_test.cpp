// laplacian: naive loops, long rows, places in wider blocks, closed forms, and the GPU against the reference.
#include "kernels/laplacian.h"

#include <utility>

#include "tests/support/panel.h"
#include "tests/support/path_graph.h"

namespace fiedler::test {
namespace {

struct Csr {
    std::vector<std::int64_t> offsets{0};
    std::vector<std::int32_t> columns;
    Values values;
    std::int64_t rows() const { return std::int64_t(offsets.size()) - 1; }
};
// Rows of 0 to 2 mean entries, but those listed: (row, entries). Columns may repeat, as long rows need.
Csr random_csr(std::int64_t rows, std::int64_t mean, const std::vector<std::pair<std::int64_t, std::int64_t>>& longer,
               std::uint64_t seed) {
    std::vector<std::int32_t> counts = random_ints(std::size_t(rows), seed, 0, std::int32_t(2 * mean + 1));
    for (const auto& [row, count] : longer) counts[std::size_t(row)] = std::int32_t(count);
    Csr l;
    for (const auto count : counts) l.offsets.push_back(l.offsets.back() + count);
    const auto entries = std::size_t(l.offsets.back());
    l.columns = random_ints(entries, seed + 1, 0, std::int32_t(rows));
    l.values = round_to<float>(random_values(entries, seed + 2));
    return l;
}

struct Problem {
    Csr matrix;
    std::int64_t m;
    double alpha = 1, beta = 0, gamma = 0;
    Values x, z;
    Problem(Csr l, std::int64_t columns) : matrix(std::move(l)), m(columns) {
        const auto n = std::size_t(matrix.rows() * m);
        x = round_to<float>(random_values(n, 11));
        z = round_to<float>(random_values(n, 12));
    }
    Problem& filter() {
        alpha = 0.75, beta = -1.25, gamma = -0.5;
        return *this;
    }
};
template <class A>
Values naive(const Problem& p) {
    Values y(p.x.size());
    for (std::int64_t i = 0; i < p.matrix.rows(); ++i)
        for (std::int64_t j = 0; j < p.m; ++j) {
            A sum = 0;
            const auto at = [&](const Values& v, std::int64_t row) { return A(v[std::size_t(row * p.m + j)]); };
            for (std::int64_t e = p.matrix.offsets[std::size_t(i)]; e < p.matrix.offsets[std::size_t(i + 1)]; ++e)
                sum += A(p.matrix.values[std::size_t(e)]) * at(p.x, p.matrix.columns[std::size_t(e)]);
            y[std::size_t(i * p.m + j)] = double(A(p.alpha) * sum + A(p.beta) * at(p.x, i) + A(p.gamma) * at(p.z, i));
        }
    return y;
}

struct Layout {
    bool apart = true;   // within wider blocks
    bool alias = false;  // Y is Z
    std::int64_t panel = 0;
};
template <class T, class Dev>
Values run(const Dev& d, const Problem& p, const Layout& layout = {}) {
    const std::int64_t n = p.matrix.rows();
    const Place place = place_for(p.m, layout.apart);
    const Buffer<std::int64_t, Dev> offsets(d, p.matrix.offsets);
    const Buffer<std::int32_t, Dev> columns(d, p.matrix.columns);
    const Buffer<T, Dev> values(d, to<T>(p.matrix.values));
    const LongRows long_rows = find_long_rows(p.matrix.offsets.data(), n);
    const Buffer<std::int32_t, Dev> rows(d, long_rows.rows), first(d, long_rows.first);
    const Buffer<std::int64_t, Dev> begin(d, long_rows.begin), end(d, long_rows.end);
    const auto pieces = std::int64_t(long_rows.begin.size());
    const Buffer<T, Dev> scratch(d, std::size_t(laplacian_scratch_elements(pieces, p.m)));
    const Panel<T, Dev> x(d, n, p.m, place, p.x), z(d, n, p.m, place_for(p.m, !layout.apart), p.z),
        out(d, n, p.m, place);
    const Panel<T, Dev>& y = layout.alias ? z : out;
    LaplacianApply<T> a;
    a.y = y.mat(), a.x = x.mat();
    if (p.gamma != 0) a.z = z.mat();
    a.matrix.rows = n;
    a.matrix.offsets = offsets.vec(), a.matrix.columns = columns.vec(), a.matrix.values = values.vec();
    if (pieces > 0) a.matrix.long_rows = {rows.vec(), first.vec(), begin.vec(), end.vec()}, a.scratch = scratch.vec();
    a.alpha = T(p.alpha), a.beta = T(p.beta), a.gamma = T(p.gamma), a.panel = layout.panel;
    laplacian_apply(d, a);
    return y.values();
}

// Rows around those of a block and of a piece; widths around those of the panels and of a lane.
const std::vector<std::int64_t> kRows = {1, 3, 7, 15, 16, 17, 63, 64, 65, 129, 300};
const std::vector<std::int64_t> kWidths = {1, 3, 4, 7, 16, 17, 32, 33, 60, 64, 68, 96, 100, 127, 128, 129, 148, 264};

template <class T, class Dev>
void check_all(const Dev& d, double ulp) {
    for (const std::int64_t n : kRows)
        for (const std::int64_t m : kWidths) {
            SCOPED_TRACE(testing::Message() << n << " x " << m);
            const Problem p = Problem(random_csr(n, n < 64 ? 9 : 40, {}, std::uint64_t(n)), m).filter();
            const Values ref = naive<double>(p), got = run<T>(d, p);
            EXPECT_TRUE(close(got, ref, naive<T>(p), ulp));
            EXPECT_EQ(run<T>(d, p, {true, true, 0}), got);
        }
}
Problem power_law(std::int64_t m) {
    return Problem(random_csr(
                       700, 12,
                       {{0, 513}, {3, 512}, {17, 511}, {18, 1024}, {19, 1025}, {20, 0}, {350, 100000}, {699, 5000}}, 5),
                   m)
        .filter();
}
template <class T, class Dev>
void check_long_rows(const Dev& d, double ulp) {
    for (const std::int64_t m : {1, 5, 32, 96, 160}) {
        SCOPED_TRACE(m);
        Problem p = power_law(m);
        const Values got = run<T>(d, p);
        EXPECT_TRUE(close(got, naive<double>(p), naive<T>(p), ulp));
        EXPECT_EQ(run<T>(d, p, {true, true, 0}), got);
    }
}
template <class T, class Dev>
void check_optional_terms(const Dev& d, double ulp) {
    for (const bool beta : {false, true})
        for (const bool gamma : {false, true}) {
            Problem p(random_csr(50, 12, {{7, 600}}, 3), 20);
            p.beta = beta ? 0.5 : 0, p.gamma = gamma ? 2 : 0;
            EXPECT_TRUE(close(run<T>(d, p), naive<double>(p), naive<T>(p), ulp)) << beta << gamma;
        }
}
// L u = mu u, for all eigenvectors of a path at once.
template <class T, class Dev>
void check_path(const Dev& d, double tolerance) {
    const int n = 70;
    const PathGraph path(n);
    Csr l;
    l.offsets.assign(path.offsets.begin(), path.offsets.end());
    l.columns = path.columns, l.values = path.values;
    Problem p(l, n);
    Values expected(p.x.size());
    for (std::size_t k = 0; k < p.x.size(); ++k) {
        const std::size_t i = k / n, j = k % n;
        p.x[k] = path.eigenvectors[j * n + i];
        expected[k] = path.eigenvalues[j] * p.x[k];
    }
    EXPECT_TRUE(close_to(run<T>(d, p), expected, tolerance));
}

// Entries of 0.4 units in the last place of the sum: added one by one, all of them are lost; a run's sum loses at most half
// a unit (and a pair of pieces, added, another half).
template <class Dev>
void check_small_entries(const Dev& d, std::int64_t panel = 0) {
    constexpr int kSmall = 900;
    constexpr double kUnit = 0x1p-24;
    Csr l;
    for (int i = 0; i <= kSmall; ++i) {
        l.columns.push_back(i), l.values.push_back(i == 0 ? 0.75 : 0.4 * kUnit);
        l.offsets.push_back(kSmall + 1);  // row 0 has all
    }
    l.values = round_to<float>(l.values);
    Problem p(l, 20);
    p.x.assign(p.x.size(), 1);
    const Values got = run<float>(d, p, {true, false, panel});
    for (std::size_t j = 0; j < 20; ++j)
        EXPECT_NEAR(got[j], 0.75 + kSmall * 0.4 * kUnit, (kSmall / double(kLaplacianRun) + 2) * kUnit / 2) << j;
}

TEST(Laplacian, DoubleMatchesNaiveLoops) { check_all<double>(Cpu{}, 1e-15); }
TEST(Laplacian, FloatMatchesDouble) { check_all<float>(Cpu{}, 1.2e-7); }
TEST(Laplacian, LongRows) {
    check_long_rows<double>(Cpu{}, 1e-15);
    check_long_rows<float>(Cpu{}, 1.2e-7);
}
TEST(Laplacian, SmallEntriesBesideALargeOne) { check_small_entries(Cpu{}); }
TEST(Laplacian, OptionalTerms) { check_optional_terms<double>(Cpu{}, 1e-15); }
TEST(Laplacian, PathGraphHasCosines) {
    check_path<double>(Cpu{}, 4 * 0x1p-53 * std::numbers::pi * 70);  // the cosines' arguments, up to 70 pi, are rounded
    check_path<float>(Cpu{}, 4 * 1.2e-7);
}
TEST(Laplacian, ThreadsDoNotMatter) {
    const Problem p = power_law(96);
    EXPECT_EQ(run<float>(Cpu{1}, p), run<float>(Cpu{5}, p));
}
TEST(Laplacian, LongRowsAreCutIntoPieces) {
    const std::int64_t piece = kLaplacianPiece;
    const Csr l = random_csr(5, 1, {{0, piece}, {1, piece + 1}, {2, 0}, {3, 3 * piece}, {4, 1}}, 1);
    const LongRows r = find_long_rows(l.offsets.data(), l.rows());
    EXPECT_EQ(r.rows, (std::vector<std::int32_t>{1, 3}));
    EXPECT_EQ(r.first, (std::vector<std::int32_t>{0, 2, 5}));
    const std::int64_t a = piece, b = 2 * piece + 1;
    EXPECT_EQ(r.begin, (std::vector<std::int64_t>{a, a + piece, b, b + piece, b + 2 * piece}));
    EXPECT_EQ(r.end, (std::vector<std::int64_t>{a + piece, b, b + piece, b + 2 * piece, b + 3 * piece}));
}
TEST(Laplacian, BrokenContractThrows) {
    const Buffer<double, Cpu> x(Cpu{}, 4), y(Cpu{}, 4);
    const std::vector<std::int64_t> offsets = {0, 1, 2};
    const std::vector<std::int32_t> columns = {0, 1};
    const std::vector<double> values = {1, 1};
    LaplacianApply<double> p;
    p.matrix = {2, {offsets.data(), 3}, {columns.data(), 2}, {values.data(), 2}, {}};
    p.x = x.mat(2, 2), p.y = x.mat(2, 2);
    EXPECT_THROW(laplacian_apply(Cpu{}, p), ContractError);  // y is x
    p.y = y.mat(2, 2), p.gamma = 1;
    EXPECT_THROW(laplacian_apply(Cpu{}, p), ContractError);  // no z
}

#if FIEDLER_CUDA
TEST(Laplacian, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all<float>(gpu(), 1.2e-7);
    check_optional_terms<float>(gpu(), 1.2e-7);
    check_path<float>(gpu(), 4 * 1.2e-7);
}
TEST(Laplacian, GpuLongRows) {
    FIEDLER_GPU_OR_SKIP();
    check_long_rows<float>(gpu(), 1.2e-7);
}
TEST(Laplacian, GpuSmallEntriesBesideALargeOne) {
    FIEDLER_GPU_OR_SKIP();
    check_small_entries(gpu());
}
TEST(Laplacian, GpuPanelsAndRunsAreBitEqual) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t m : {6, 40, 96, 130}) {
        const Problem p = power_law(m);
        const Values got = run<float>(gpu(), p);
        for (const std::int64_t panel : {0, 16, 32, 64, 128})
            for (const bool apart : {false, true})
                EXPECT_EQ(run<float>(gpu(), p, {apart, false, panel}), got) << m << ", panel " << panel;
    }
}
TEST(Laplacian, GpuNarrowPanels) {
    FIEDLER_GPU_OR_SKIP();
    check_small_entries(gpu(), 8);
    std::vector<Problem> problems;
    for (const std::int64_t n : kRows)
        for (const std::int64_t m : {1, 3, 4, 5, 7, 8, 9, 12, 16, 35})
            problems.push_back(Problem(random_csr(n, n < 64 ? 9 : 40, {}, std::uint64_t(n)), m).filter());
    for (const std::int64_t m : {1, 6, 8, 20}) problems.push_back(power_law(m));
    for (const Problem& p : problems) {
        SCOPED_TRACE(testing::Message() << p.matrix.rows() << " x " << p.m);
        const Values got = run<float>(gpu(), p, {true, false, 8});
        EXPECT_TRUE(close(got, naive<double>(p), naive<float>(p), 1.2e-7));
        EXPECT_EQ(run<float>(gpu(), p, {true, true, 8}), got);
        EXPECT_EQ(run<float>(gpu(), p, {false, false, 8}), got);
    }
}
TEST(Laplacian, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Problem p(random_csr(20, 3, {}, 1), 8);
    EXPECT_THROW(run<float>(gpu(), p, {true, false, 24}), ContractError);
    const Buffer<float, Cuda> x(gpu(), 64), y(gpu(), 64);
    const Buffer<std::int64_t, Cuda> offsets(gpu(), std::vector<std::int64_t>(5, 0));
    const Buffer<std::int32_t, Cuda> columns(gpu(), 1);
    LaplacianApply<float> a;
    a.matrix = {4, offsets.vec(), columns.vec(), x.vec().slice(0, 1), {}};
    a.y = {y.data(), 4, 6, 8};
    a.x = Mat<const float>{x.data(), 4, 6, 6};  // rows are not 16-byte aligned
    EXPECT_THROW(laplacian_apply(gpu(), a), ContractError);
    a.x = Mat<const float>{x.data(), 4, 6, 8};
    EXPECT_NO_THROW(laplacian_apply(gpu(), a));
}
#endif

}  // namespace
}  // namespace fiedler::test
