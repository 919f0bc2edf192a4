// eigen: naive loops by the contract's rule of summation, identities, and the GPU against the reference.
#include "kernels/eigen.h"

#include <algorithm>
#include <numeric>

#include "tests/support/padded.h"
#include "tests/support/panel.h"

namespace fiedler::test {
namespace {

using Sizes = std::vector<std::int64_t>;

Values block(std::int64_t n, std::int64_t m, std::uint64_t seed) {
    return round_to<float>(random_values(std::size_t(n * m), seed));
}
double at(const Values& v, std::int64_t cols, std::int64_t i, std::int64_t j) { return v[std::size_t(i * cols + j)]; }
void append(Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); }

// sum of term(i) over rows [first, last): runs in A, then double.
template <class A, class Term>
double sum_over(std::int64_t first, std::int64_t last, Term&& term) {
    double total = 0;
    for (std::int64_t r = first; r < last; r += kEigenRun) {
        A run = 0;
        for (std::int64_t i = r; i < std::min(r + kEigenRun, last); ++i) run += term(i);
        total += double(run);
    }
    return total;
}
// Rounding unit of a sum over n rows, relative to the sum of squares: that of T within runs, of double across them.
template <class T>
double ulp_of_sum(double ulp, std::int64_t n) {
    return std::is_same_v<T, double> ? ulp : ulp * std::sqrt(double(kEigenRun) / double(std::max(n, kEigenRun)));
}

std::int64_t scratch(const Cpu&, std::int64_t) { return 1; }
#if FIEDLER_CUDA
std::int64_t scratch(const Cuda&, std::int64_t elements) { return elements; }
#endif

// ---- gram ----------------------------------------------------------------------------------------------------------

struct GramCase {
    std::int64_t n, mx, my;
    bool same = false;
    Values x, y;
    GramCase(std::int64_t rows, std::int64_t a, std::int64_t b) : n(rows), mx(a), my(b), same(a == 0) {
        if (same) mx = my;
        x = block(n, mx, 1);
        y = same ? x : block(n, my, 2);
    }
};
template <class A>
Values naive(const GramCase& p) {
    Values g;
    for (std::int64_t i = 0; i < p.mx; ++i)
        for (std::int64_t j = 0; j < p.my; ++j)
            g.push_back(
                sum_over<A>(0, p.n, [&](std::int64_t r) { return A(at(p.x, p.mx, r, i)) * A(at(p.y, p.my, r, j)); }));
    return g;
}
template <class T, class Dev>
Values run(const Dev& d, const GramCase& p, bool apart = true) {
    const Panel<T, Dev> x(d, p.n, p.mx, place_for(p.mx, apart), p.x), y(d, p.n, p.my, place_for(p.my, !apart), p.y);
    const Padded<double, Dev> g(d, p.mx, p.my, p.my + 3);
    const Buffer<double, Dev> space(d, std::size_t(scratch(d, eigen_scratch_elements(p.n, p.mx, p.my))));
    eigen_gram(d, EigenGram<T>{g.mat(), x.mat(), p.same ? x.mat() : y.mat(), space.vec()});
    return g.values();
}
template <class T, class Dev>
void check_gram(const Dev& d, const std::vector<Sizes>& shapes, double ulp) {
    for (const Sizes& s : shapes) {
        SCOPED_TRACE(testing::Message() << s[0] << " rows, " << s[1] << " x " << s[2]);
        const GramCase p(s[0], s[1], s[2]);
        const Values got = run<T>(d, p);
        EXPECT_TRUE(close(got, naive<double>(p), naive<T>(p), ulp_of_sum<T>(ulp, p.n)));
        EXPECT_EQ(run<T>(d, p, false), got);
        for (std::int64_t i = 0; p.same && i < p.mx; ++i)
            for (std::int64_t j = 0; j < i; ++j) ASSERT_EQ(at(got, p.my, i, j), at(got, p.my, j, i));
    }
}
// Rows around a stage, a run and a chunk; widths around a tile and a panel. 0: X'X.
const std::vector<Sizes> kGramShapes = {{1, 1, 1},     {3, 0, 1},    {7, 3, 5},     {63, 0, 31},   {64, 0, 32},
                                        {65, 0, 33},   {127, 0, 64}, {128, 64, 65}, {129, 0, 96},  {200, 97, 4},
                                        {1000, 0, 97}, {70, 0, 128}, {70, 128, 32}, {130, 0, 129}, {100, 130, 1},
                                        {90, 0, 200},  {90, 33, 160}};

// Sums of integers: those of a run are exact in float, those of more rows only in double.
template <class T, class Dev>
void check_exact_sums(const Dev& d) {
    GramCase p(150000, 65, 2);
    std::fill(p.x.begin(), p.x.end(), 1.0);
    const auto numbers = random_ints(p.y.size(), 3, 0, 1 << 18);
    p.y.assign(numbers.begin(), numbers.end());
    Values expected(std::size_t(p.mx * p.my), 0.0);
    for (std::size_t k = 0; k < p.y.size(); ++k) expected[k % 2] += p.y[k];
    for (std::size_t k = 2; k < expected.size(); ++k) expected[k] = expected[k % 2];
    EXPECT_EQ(run<T>(d, p), expected);
}

// ---- rotate --------------------------------------------------------------------------------------------------------

struct RotateCase {
    std::int64_t n, mx, my;
    double alpha, beta;
    Values x, q, y;
    RotateCase(std::int64_t rows, std::int64_t a, std::int64_t b, double alpha_, double beta_)
        : n(rows),
          mx(a),
          my(b),
          alpha(alpha_),
          beta(beta_),
          x(block(n, mx, 1)),
          q(block(mx, my, 2)),
          y(block(n, my, 3)) {
        for (double& v : q) v *= 1 + 1e-9;  // not an f32
    }
};
template <class A>
Values naive(const RotateCase& p) {
    Values y;
    for (std::int64_t i = 0; i < p.n; ++i)
        for (std::int64_t j = 0; j < p.my; ++j) {
            A sum = 0;
            for (std::int64_t k = 0; k < p.mx; ++k) sum += A(at(p.x, p.mx, i, k)) * A(at(p.q, p.my, k, j));
            y.push_back(double(A(p.alpha) * sum + (p.beta != 0 ? A(at(p.y, p.my, i, j)) : A(0))));
        }
    return y;
}
template <class T, class Dev>
Values run(const Dev& d, const RotateCase& p, bool apart = true) {
    const Panel<T, Dev> x(d, p.n, p.mx, place_for(p.mx, apart), p.x);
    const Panel<T, Dev> y(d, p.n, p.my, place_for(p.my, apart), p.beta != 0 ? p.y : Values{});
    const Padded<double, Dev> q(d, p.mx, p.my, p.my + 1, p.q);
    const Buffer<double, Dev> space(d, std::size_t(scratch(d, eigen_scratch_elements(p.n, p.mx, p.my))));
    eigen_rotate(d, EigenRotate<T>{y.mat(), x.mat(), q.mat(), p.alpha, p.beta, space.vec()});
    return y.values();
}
template <class T, class Dev>
void check_rotate(const Dev& d, double ulp) {
    const std::vector<Sizes> shapes = {{1, 1, 1},      {3, 5, 2},     {7, 4, 4},      {127, 16, 31}, {128, 17, 32},
                                       {129, 33, 33},  {200, 64, 64}, {64, 96, 96},   {300, 97, 98}, {70, 128, 128},
                                       {65, 100, 129}, {40, 150, 1},  {40, 130, 192}, {33, 9, 290}};
    for (const Sizes& s : shapes)
        for (const double beta : {0.0, 1.0}) {
            SCOPED_TRACE(testing::Message() << s[0] << " rows, " << s[1] << " x " << s[2] << ", beta " << beta);
            const RotateCase p(s[0], s[1], s[2], beta == 0 ? 1 : -0.75, beta);
            const Values got = run<T>(d, p);
            EXPECT_TRUE(close(got, naive<double>(p), naive<T>(p), ulp));
            EXPECT_EQ(run<T>(d, p, false), got);
        }
}
// Q = R^-1 with X'X = R'R makes X orthonormal.
template <class T, class Dev>
void check_orthonormal(const Dev& d, double tolerance) {
    const std::int64_t n = 3000, m = 40;
    const GramCase p(n, 0, m);
    const Values g = run<T>(d, p);
    Values r(g.size(), 0.0), q(g.size(), 0.0), identity(g.size(), 0.0);
    const auto entry = [&](Values& v, std::int64_t i, std::int64_t j) -> double& { return v[std::size_t(i * m + j)]; };
    for (std::int64_t i = 0; i < m; ++i) {
        for (std::int64_t j = i; j < m; ++j) {
            double sum = at(g, m, i, j);
            for (std::int64_t k = 0; k < i; ++k) sum -= at(r, m, k, i) * at(r, m, k, j);
            entry(r, i, j) = j == i ? std::sqrt(sum) : sum / at(r, m, i, i);
        }
        entry(identity, i, i) = 1;
    }
    for (std::int64_t j = 0; j < m; ++j)
        for (std::int64_t i = j; i >= 0; --i) {
            double sum = i == j ? 1 : 0;
            for (std::int64_t k = i + 1; k <= j; ++k) sum -= at(r, m, i, k) * at(q, m, k, j);
            entry(q, i, j) = sum / at(r, m, i, i);
        }
    RotateCase rotation(n, m, m, 1, 0);
    rotation.x = p.x, rotation.q = q;
    GramCase after(n, 0, m);
    after.x = after.y = run<T>(d, rotation);
    EXPECT_TRUE(close_to(run<T>(d, after), identity, tolerance));
}

// ---- norms ---------------------------------------------------------------------------------------------------------

struct NormCase {
    std::int64_t n, m;
    bool shifted;
    Values w, x, theta;
    NormCase(std::int64_t rows, std::int64_t cols, bool shift)
        : n(rows),
          m(cols),
          shifted(shift),
          w(block(n, m, 1)),
          x(block(n, m, 2)),
          theta(random_values(std::size_t(m), 3)) {
        // Residuals as of an eigenvector: w = theta x but for the last bits.
        for (std::size_t k = 0; shifted && k < w.size(); ++k)
            w[k] = float(theta[k % std::size_t(m)] * x[k] * (1 + 1e-5 * w[k]));
    }
};
template <class A>
Values naive(const NormCase& p) {
    Values out;
    for (std::int64_t j = 0; j < p.m; ++j)
        out.push_back(sum_over<A>(0, p.n, [&](std::int64_t i) {
            const A r = A(at(p.w, p.m, i, j) - (p.shifted ? p.theta[std::size_t(j)] * at(p.x, p.m, i, j) : 0.0));
            return r * r;
        }));
    return out;
}
template <class T, class Dev>
Values run(const Dev& d, const NormCase& p, bool apart = true) {
    const Panel<T, Dev> w(d, p.n, p.m, place_for(p.m, apart), p.w), x(d, p.n, p.m, place_for(p.m, !apart), p.x);
    const Buffer<double, Dev> theta(d, p.theta), out(d, std::size_t(p.m)),
        space(d, std::size_t(scratch(d, eigen_scratch_elements(p.n, p.m, 1))));
    EigenNorms<T> a;
    a.out = out.vec(), a.w = w.mat(), a.scratch = space.vec();
    if (p.shifted) a.x = x.mat(), a.theta = theta.vec();
    eigen_norms(d, a);
    return out.values();
}
template <class T, class Dev>
void check_norms(const Dev& d, double ulp) {
    for (const std::int64_t n : {1, 3, 7, 63, 64, 65, 300, 5000})
        for (const bool shifted : {false, true}) {
            SCOPED_TRACE(testing::Message() << n << " rows, " << shifted);
            Values got, ref, low;
            for (const std::int64_t m : {1, 3, 4, 31, 32, 33, 96}) {
                const NormCase p(n, m, shifted);
                const Values one = run<T>(d, p);
                EXPECT_EQ(run<T>(d, p, false), one);
                append(got, one), append(ref, naive<double>(p)), append(low, naive<T>(p));
            }
            EXPECT_TRUE(close(got, ref, low, ulp_of_sum<T>(ulp, n)));
        }
}

// ---- deflate -------------------------------------------------------------------------------------------------------

struct DeflateCase {
    std::int64_t n, m;
    std::vector<std::int64_t> offsets{0};
    Values x, v;
    DeflateCase(const Sizes& sizes, std::int64_t cols) : m(cols) {
        for (const auto size : sizes) offsets.push_back(offsets.back() + size);
        n = offsets.back();
        x = block(n, m, 1);
        v = random_uniform(std::size_t(n), 2, 0.5, 1.5);
        for (std::size_t c = 0; c + 1 < offsets.size(); ++c) {
            const auto first = v.begin() + offsets[c], last = v.begin() + offsets[c + 1];
            const double norm = std::sqrt(std::inner_product(first, last, first, 0.0));
            std::for_each(first, last, [&](double& value) { value = float(value / norm); });
        }
    }
};
template <class A>
Values naive(const DeflateCase& p) {
    Values out = p.x;
    for (std::size_t c = 0; c + 1 < p.offsets.size(); ++c)
        for (std::int64_t j = 0; j < p.m; ++j) {
            const A total = A(sum_over<A>(p.offsets[c], p.offsets[c + 1], [&](std::int64_t i) {
                return A(p.v[std::size_t(i)]) * A(at(p.x, p.m, i, j));
            }));
            for (std::int64_t i = p.offsets[c]; i < p.offsets[c + 1]; ++i)
                out[std::size_t(i * p.m + j)] = double(A(at(p.x, p.m, i, j)) - A(p.v[std::size_t(i)]) * total);
        }
    return out;
}
template <class T, class Dev>
Values run(const Dev& d, const DeflateCase& p, bool apart = true) {
    const Panel<T, Dev> x(d, p.n, p.m, place_for(p.m, apart), p.x);
    const Buffer<T, Dev> v(d, to<T>(p.v));
    const Buffer<std::int64_t, Dev> offsets(d, p.offsets);
    const auto components = std::int64_t(p.offsets.size()) - 1;
    const Buffer<double, Dev> space(d, std::size_t(scratch(d, eigen_deflate_scratch(p.n, p.m, components))));
    eigen_deflate(d, EigenDeflate<T>{x.mat(), v.vec(), offsets.vec(), space.vec()});
    return x.values();
}
Sizes random_sizes(std::size_t count, std::int32_t most) {
    const auto sizes = random_ints(count, 9, 1, most);
    return {sizes.begin(), sizes.end()};
}
template <class T, class Dev>
void check_deflate(const Dev& d, double ulp) {
    const std::int64_t piece = kEigenDeflatePiece;
    const std::vector<Sizes> cases = {{1},
                                      {3, 1, 7},
                                      {piece - 1},
                                      {piece},
                                      {piece + 1},
                                      {2 * piece, 2 * piece + 1, piece + 1, piece, 2 * piece - 1},
                                      {1, 300, piece, 1, 1000, 5, 20000, 2, 5000},
                                      {piece + 1, 1, 1, piece + 1, piece + 2, 3},
                                      Sizes(600, 1),
                                      random_sizes(500, 40),
                                      random_sizes(60, 900)};
    for (std::size_t k = 0; k < cases.size(); ++k)
        for (const std::int64_t m : {1, 6, 32, 97}) {
            if (m == 97 && k == 6) continue;  // large
            SCOPED_TRACE(testing::Message() << "case " << k << ", " << m << " columns");
            const DeflateCase p(cases[k], m);
            const Values got = run<T>(d, p);
            EXPECT_TRUE(close(got, naive<double>(p), naive<T>(p), ulp));
            EXPECT_EQ(run<T>(d, p, false), got);
        }
}

// ---- gather and random ---------------------------------------------------------------------------------------------

template <class T, class Dev>
void check_gather(const Dev& d) {
    for (const std::int64_t m : {1, 3, 32, 65, 96, 129, 300})
        for (const bool scaled : {false, true}) {
            const std::int64_t n = 77, from = 30;
            const Values x = block(from, m, 1), factor = round_to<float>(random_values(std::size_t(n), 2));
            const auto index = random_ints(std::size_t(n), 3, 0, std::int32_t(from));
            const Panel<T, Dev> in(d, from, m, place_for(m, true), x), out(d, n, m, place_for(m, true));
            const Buffer<T, Dev> scale(d, to<T>(factor));
            const Buffer<std::int32_t, Dev> rows(d, index);
            EigenGather<T> p{out.mat(), in.mat(), rows.vec(), {}};
            if (scaled) p.scale = scale.vec();
            eigen_gather(d, p);
            Values expected;
            for (std::int64_t k = 0; k < n * m; ++k) {
                const auto i = std::size_t(k / m);
                expected.push_back(double(T(scaled ? factor[i] : 1) * T(at(x, m, index[i], k % m))));
            }
            EXPECT_EQ(out.values(), expected) << m << " columns, " << scaled;
        }
}
template <class T, class Dev>
Values random_block(const Dev& d, std::int64_t n, std::int64_t m, std::uint64_t seed, std::int64_t first) {
    const Panel<T, Dev> x(d, n, m, place_for(m, true));
    eigen_random(d, EigenRandom<T>{x.mat(), seed, first});
    return x.values();
}

TEST(Eigen, GramDoubleMatchesNaiveLoops) { check_gram<double>(Cpu{}, kGramShapes, 1e-15); }
TEST(Eigen, GramFloatMatchesDouble) {
    check_gram<float>(Cpu{}, kGramShapes, 1.2e-7);
    check_gram<float>(Cpu{}, {{20000, 0, 20}, {20000, 5, 9}}, 1.2e-7);
    check_exact_sums<float>(Cpu{});
}
TEST(Eigen, RotateDoubleMatchesNaiveLoops) { check_rotate<double>(Cpu{}, 1e-15); }
TEST(Eigen, RotateFloatMatchesDouble) { check_rotate<float>(Cpu{}, 1.2e-7); }
TEST(Eigen, CholeskyMakesOrthonormal) {
    check_orthonormal<double>(Cpu{}, 1e-14);
    check_orthonormal<float>(Cpu{}, 1.2e-7);
}
TEST(Eigen, NormsMatchNaiveLoops) {
    check_norms<double>(Cpu{}, 1e-15);
    check_norms<float>(Cpu{}, 1.2e-7);
}
TEST(Eigen, DeflateMatchesNaiveLoops) {
    check_deflate<double>(Cpu{}, 1e-15);
    check_deflate<float>(Cpu{}, 1.2e-7);
}
TEST(Eigen, GatherIsExact) {
    check_gather<double>(Cpu{});
    check_gather<float>(Cpu{});
}
TEST(Eigen, RandomIsAFunctionOfSeedColumnAndRow) {
    const Values all = random_block<double>(Cpu{}, 500, 7, 42, 0), part = random_block<float>(Cpu{}, 300, 2, 42, 3);
    for (std::int64_t i = 0; i < 300; ++i)
        for (std::int64_t j = 0; j < 2; ++j) ASSERT_EQ(at(part, 2, i, j), at(all, 7, i, j + 3));
    EXPECT_NE(random_block<double>(Cpu{}, 500, 7, 43, 0), all);
}
TEST(Eigen, RandomIsUniformAndUncorrelated) {
    const std::int64_t n = 100000, m = 4;
    GramCase p(n, 0, m);
    p.x = p.y = random_block<double>(Cpu{}, n, m, 1, 0);
    const auto [low, high] = std::minmax_element(p.x.begin(), p.x.end());
    EXPECT_GE(*low, -1.0);
    EXPECT_LT(*high, 1.0);
    const Values g = run<double>(Cpu{}, p);
    const double deviation = 6 / std::sqrt(double(n));  // six standard deviations and more
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < m; ++j)
            EXPECT_NEAR(at(g, m, i, j) / double(n), i == j ? 1.0 / 3 : 0.0, deviation / 3);
    EXPECT_NEAR(std::accumulate(p.x.begin(), p.x.end(), 0.0) / double(n * m), 0.0, deviation / std::sqrt(12.0));
}
TEST(Eigen, ThreadsDoNotMatter) {
    const GramCase g(3000, 0, 50);
    EXPECT_EQ(run<float>(Cpu{1}, g), run<float>(Cpu{5}, g));
    const RotateCase r(3000, 20, 30, 1, 0);
    EXPECT_EQ(run<float>(Cpu{1}, r), run<float>(Cpu{5}, r));
    const NormCase w(9000, 5, true);
    EXPECT_EQ(run<float>(Cpu{1}, w), run<float>(Cpu{5}, w));
    const DeflateCase x({3, 20000, 17, 9000}, 5);
    EXPECT_EQ(run<float>(Cpu{1}, x), run<float>(Cpu{5}, x));
}
TEST(Eigen, BrokenContractThrows) {
    const Buffer<double, Cpu> x(Cpu{}, 6), g(Cpu{}, 4);
    EXPECT_THROW(eigen_gram(Cpu{}, EigenGram<double>{g.mat(2, 2), x.mat(3, 2), x.mat(2, 2), {}}), ContractError);
    EXPECT_THROW(eigen_rotate(Cpu{}, EigenRotate<double>{x.mat(3, 2), x.mat(3, 2), g.mat(2, 2), 1, 0, {}}),
                 ContractError);
    EXPECT_THROW(eigen_norms(Cpu{}, EigenNorms<double>{g.vec(), x.mat(3, 2), {}, {}, {}}), ContractError);
    EXPECT_THROW(eigen_deflate(Cpu{}, EigenDeflate<double>{x.mat(3, 2), g.vec(), {}, {}}), ContractError);
}

#if FIEDLER_CUDA
TEST(Eigen, GpuGram) {
    FIEDLER_GPU_OR_SKIP();
    check_gram<float>(gpu(), kGramShapes, 1.2e-7);
    // Several runs in a chunk, several chunks, and all ways of splitting a tile's rows.
    check_gram<float>(gpu(), {{20000, 0, 20}, {17001, 0, 64}, {16500, 40, 9}, {20011, 0, 96}, {50000, 3, 5}}, 1.2e-7);
    check_gram<float>(gpu(), {{2000, 0, 576}, {300, 576, 130}}, 1.2e-7);
    check_exact_sums<float>(gpu());
}
TEST(Eigen, GpuRotate) {
    FIEDLER_GPU_OR_SKIP();
    check_rotate<float>(gpu(), 1.2e-7);
    check_orthonormal<float>(gpu(), 4 * 1.2e-7);
}
TEST(Eigen, GpuNorms) {
    FIEDLER_GPU_OR_SKIP();
    check_norms<float>(gpu(), 1.2e-7);
}
TEST(Eigen, GpuDeflate) {
    FIEDLER_GPU_OR_SKIP();
    check_deflate<float>(gpu(), 1.2e-7);
}
TEST(Eigen, GpuGatherAndRandomAreExact) {
    FIEDLER_GPU_OR_SKIP();
    check_gather<float>(gpu());
    for (const std::int64_t m : {1, 6, 33, 96})
        EXPECT_EQ(random_block<float>(gpu(), 1000, m, 7, 5), random_block<double>(Cpu{}, 1000, m, 7, 5));
}
TEST(Eigen, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<float, Cuda> x(gpu(), 64);
    const Buffer<double, Cuda> g(gpu(), 36), space(gpu(), std::size_t(eigen_scratch_elements(8, 6, 6)));
    const auto gram = [&](std::int64_t ld, Vec<double> scratch) {
        const Mat<const float> block{x.data(), 8, 6, ld};
        eigen_gram(gpu(), EigenGram<float>{g.mat(6, 6), block, block, scratch});
    };
    EXPECT_THROW(gram(6, space.vec()), ContractError);
    EXPECT_THROW(gram(8, {}), ContractError);
    EXPECT_NO_THROW(gram(8, space.vec()));
}
#endif

}  // namespace
}  // namespace fiedler::test
