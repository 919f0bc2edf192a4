// half_panel: exact scaling, products and deflation against double within a computed tolerance, and the GPU likewise.
#include "kernels/half_panel.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "tests/support/panel.h"

namespace fiedler::test {
namespace {

using Sizes = std::vector<std::int64_t>;
using Halves = std::vector<f16>;

std::size_t scratch(const Cpu&, std::int64_t) { return 1; }
#if FIEDLER_CUDA
std::size_t scratch(const Cuda&, std::int64_t elements) { return std::size_t(elements); }
#endif

Halves random_halves(std::int64_t n, std::uint64_t seed, double scale) {
    Halves h;
    for (const double v : random_values(std::size_t(n), seed, scale)) h.push_back(f16(float(v)));
    return h;
}
std::vector<std::uint16_t> bits(const Halves& h) {
    std::vector<std::uint16_t> b;
    for (const f16 v : h) b.push_back(v.bits);
    return b;
}
// What rounding to f16 may change: half a unit in the last place, of subnormals 2^-25.
double half_unit(double value) { return std::max(0x1p-25, std::fabs(value) * 0x1p-11); }

// ---- pack and unpack -------------------------------------------------------------------------------------------------

struct Packed16 {
    Halves y;
    std::vector<float> scale;
    Values back;
};
template <class Dev>
Packed16 pack_and_unpack(const Dev& d, const Values& values, std::int64_t n, std::int64_t m, std::int64_t w, bool apart,
                         const std::vector<float>& given = {}, const std::vector<float>& units = {}) {
    const Panel<float, Dev> x(d, n, m, place_for(m, apart), values), back(d, n, m, place_for(m, !apart));
    const Buffer<f16, Dev> y(d, std::size_t(n * w));
    const Buffer<float, Dev> scale(d, given.empty() ? std::vector<float>(std::size_t(w), -1.f) : given);
    const Buffer<float, Dev> space(d, scratch(d, half_pack_scratch(w))), v(d, units);
    const Vec<const float> rows = units.empty() ? Vec<const float>() : Vec<const float>(v.vec());
    half_pack(d, HalfPack{y.mat(n, w), x.mat(), scale.vec(), !given.empty(), space.vec(), rows});
    half_unpack(d, HalfUnpack{back.mat(), y.mat(n, w), scale.vec(), rows});
    EXPECT_EQ(x.values().size(), values.size());  // and the columns of others are as they were
    return {y.host(), scale.host(), back.values()};
}
// Columns from the smallest numbers to the largest ones, one of zeros, and one that ends at an infinity.
template <class Dev>
void check_packing(const Dev& d) {
    for (const std::int64_t n : {1, 5, 64, 1000, 70000})
        for (const std::int64_t m : {1, 3, 4, 7, 8, 9, 14, 16, 31, 32}) {
            if (n > 1000 && m != 14) continue;
            const std::int64_t w = half_panel_width(m);
            SCOPED_TRACE(testing::Message() << n << " x " << m);
            Values x = round_to<float>(random_values(std::size_t(n * m), 7));
            const double sizes[] = {1, 1e-3, 0, 1e-36, 1e35, 0x1p-20, 3e-9};
            for (std::int64_t k = 0; k < n * m; ++k) x[std::size_t(k)] *= sizes[k % m % 7];
            x = round_to<float>(x);
            if (m > 8) x[std::size_t((n - 1) * m + 8)] = std::numeric_limits<double>::infinity();
            const Packed16 got = pack_and_unpack(d, x, n, m, w, true);
            for (std::int64_t j = 0; j < w; ++j) {
                double largest = 0;
                for (std::int64_t i = 0; j < m && i < n; ++i)
                    largest = std::max(largest, std::fabs(x[std::size_t(i * m + j)]));
                const float s = got.scale[std::size_t(j)];
                int exponent = 0;
                ASSERT_EQ(std::frexp(s, &exponent), 0.5f) << "not a power of two: " << s;
                if (largest == 0 || std::isinf(largest)) {
                    EXPECT_EQ(s, 1.f) << j;
                } else if (largest >= 0x1p-118) {
                    EXPECT_TRUE(s * largest >= 256 && s * largest < 512) << j << ": " << s << " x " << largest;
                } else {
                    EXPECT_EQ(s, 0x1p126f) << j;
                }
                for (std::int64_t i = 0; i < n; ++i) {
                    const f16 expected(j < m ? s * float(x[std::size_t(i * m + j)]) : 0.f);
                    ASSERT_EQ(got.y[std::size_t(i * w + j)].bits, expected.bits) << i << ", " << j;
                    if (j < m) {
                        ASSERT_EQ(got.back[std::size_t(i * m + j)], double(float(expected) / s)) << i << ", " << j;
                    }
                }
            }
            EXPECT_EQ(bits(pack_and_unpack(d, x, n, m, w, false).y), bits(got.y));
            std::vector<float> doubled = got.scale;
            for (float& s : doubled) s *= 2;
            const Packed16 again = pack_and_unpack(d, x, n, m, w, true, doubled);
            EXPECT_EQ(again.scale, doubled);
            EXPECT_EQ(float(again.y[0]), 2 * float(got.y[0]));
        }
}

// In units of each row: the panel is that of the quotients, and what comes back has the units again.
template <class Dev>
void check_units(const Dev& d) {
    for (const std::int64_t n : {1, 5, 1000, 70000})
        for (const std::int64_t m : {3, 8, 14, 32}) {
            const std::int64_t w = half_panel_width(m);
            SCOPED_TRACE(testing::Message() << n << " x " << m);
            const Values x = round_to<float>(random_values(std::size_t(n * m), 7));
            const std::vector<float> v = to<float>(random_uniform(std::size_t(n), 9, 1e-3, 2));
            Values quotients = x;
            for (std::int64_t k = 0; k < n * m; ++k)
                quotients[std::size_t(k)] = double(float(x[std::size_t(k)]) / v[std::size_t(k / m)]);
            const Packed16 got = pack_and_unpack(d, x, n, m, w, true, {}, v);
            const Packed16 plain = pack_and_unpack(d, quotients, n, m, w, true);
            EXPECT_EQ(got.scale, plain.scale);
            EXPECT_EQ(bits(got.y), bits(plain.y));
            for (std::int64_t k = 0; k < n * m; ++k)
                ASSERT_EQ(got.back[std::size_t(k)], double(v[std::size_t(k / m)] * float(plain.back[std::size_t(k)])));
        }
}

// ---- apply -----------------------------------------------------------------------------------------------------------

struct Problem {
    std::int64_t n, w;
    std::vector<std::int64_t> offsets{0};
    std::vector<std::int32_t> columns;
    Values values;
    Halves x, z, r;
    float alpha = 0.75f, beta = -1.25f, gamma = -0.5f;
    HalfOperator l = HalfOperator::weighted;
    bool deviations = false;  // R diag(delta) is added
    static float delta(std::int64_t j) { return 0.25f - 0.03125f * float(j); }
    // Rows of 0 to 2 mean entries, but those listed: (row, entries). Columns may repeat, as long rows need.
    Problem(std::int64_t rows, std::int64_t width, std::int64_t mean,
            const std::vector<std::pair<std::int64_t, std::int64_t>>& longer = {})
        : n(rows), w(width) {
        auto counts = random_ints(std::size_t(n), 3, 0, std::int32_t(2 * mean + 1));
        for (const auto& [row, count] : longer) counts[std::size_t(row)] = std::int32_t(count);
        for (const auto count : counts) offsets.push_back(offsets.back() + count);
        columns = random_ints(std::size_t(offsets.back()), 4, 0, std::int32_t(n));
        values = round_to<float>(random_values(columns.size(), 5));
        x = random_halves(n * w, 6, 100), z = random_halves(n * w, 7, 100), r = random_halves(n * w, 8, 100);
    }
};
template <class Dev>
Halves run(const Dev& d, const Problem& p, bool alias = true) {
    const Buffer<std::int64_t, Dev> offsets(d, p.offsets);
    const Buffer<std::int32_t, Dev> columns(d, p.columns);
    const Buffer<float, Dev> values(d, to<float>(p.values));
    const LongRows r = find_long_rows(p.offsets.data(), p.n);
    const Buffer<std::int32_t, Dev> rows(d, r.rows), first(d, r.first);
    const Buffer<std::int64_t, Dev> begin(d, r.begin), end(d, r.end);
    const auto pieces = std::int64_t(r.begin.size());
    const Buffer<float, Dev> space(d, std::size_t(laplacian_scratch_elements(pieces, p.w)));
    const Buffer<f16, Dev> x(d, p.x), z(d, p.z), r16(d, p.r), out(d, p.x.size());
    const Buffer<f16, Dev>& y = alias ? z : out;
    HalfApply a;
    a.y = y.mat(p.n, p.w), a.x = x.mat(p.n, p.w);
    if (p.gamma != 0) a.z = z.mat(p.n, p.w);
    a.matrix = {p.n, offsets.vec(), columns.vec(), values.vec(), {}};
    if (pieces > 0) a.matrix.long_rows = {rows.vec(), first.vec(), begin.vec(), end.vec()}, a.scratch = space.vec();
    a.alpha = p.alpha, a.beta = p.beta, a.gamma = p.gamma, a.l = p.l;
    if (p.l != HalfOperator::weighted) a.matrix.values = {};  // nobody reads them
    if (p.deviations) a.r = r16.mat(p.n, p.w);
    for (std::int64_t j = 0; p.deviations && j < p.w; ++j) a.delta[std::size_t(j)] = p.delta(j);
    half_apply(d, a);
    return y.host();
}
// Each of the row's c additions errs by 2^-24 of the sum so far, at most the sum of magnitudes; each product likewise.
void expect_product(const Halves& got, const Problem& p) {
    for (std::int64_t i = 0; i < p.n; ++i)
        for (std::int64_t j = 0; j < p.w; ++j) {
            double sum = 0, size = 0;
            const auto at = [&](const Halves& v, std::int64_t row) {
                return double(float(v[std::size_t(row * p.w + j)]));
            };
            const auto add = [&](double term) { sum += term, size += std::fabs(term); };
            const std::int64_t begin = p.offsets[std::size_t(i)], end = p.offsets[std::size_t(i) + 1];
            const double degree = double(end - begin - 1);  // one entry is taken for the diagonal's
            const double share = p.l == HalfOperator::degree ? 1 : degree > 0 ? 1 / degree : 0;
            for (std::int64_t e = begin; e < end; ++e) {
                const double value = p.l == HalfOperator::weighted ? p.values[std::size_t(e)] : -share;
                add(double(p.alpha) * value * at(p.x, p.columns[std::size_t(e)]));
            }
            if (p.l != HalfOperator::weighted) add(double(p.alpha) * share * (degree + 1) * at(p.x, i));
            if (p.deviations) add(double(p.delta(j)) * at(p.r, i));
            add(double(p.beta) * at(p.x, i));
            add(double(p.gamma) * at(p.z, i));
            const double additions = std::min(double(end - begin), double(kLaplacianPiece)) + 220;
            const double f32 = 0x1p-24 * additions * size;
            ASSERT_LE(std::fabs(at(got, i) - sum), half_unit(std::fabs(sum) + f32) + f32)
                << "row " << i << ", column " << j;
        }
}
template <class Dev>
void check_products(const Dev& d) {
    for (const std::int64_t w : {8, 16, 32}) {
        for (const std::int64_t n : {1, 3, 15, 16, 17, 31, 33, 64, 65, 300})
            for (const bool beta : {true, false})
                for (const bool gamma : {true, false}) {
                    SCOPED_TRACE(testing::Message() << n << " x " << w << beta << gamma);
                    Problem p(n, w, n < 64 ? 9 : 40);
                    if (!beta) p.beta = 0;
                    if (!gamma) p.gamma = 0;
                    const Halves got = run(d, p, false);
                    expect_product(got, p);
                    if (gamma) {
                        EXPECT_EQ(bits(run(d, p, true)), bits(got));
                    }
                }
        const std::vector<std::pair<std::int64_t, std::int64_t>> longer = {
            {0, 513}, {3, 512}, {17, 511}, {18, 1024}, {19, 1025}, {20, 0}, {350, 30000}, {699, 5000}};
        Problem p(700, w, 12, longer);
        for (const bool deviations : {false, true})
            for (const HalfOperator l : {HalfOperator::weighted, HalfOperator::walk, HalfOperator::degree}) {
                SCOPED_TRACE(testing::Message() << "long rows x " << w << ", operator " << int(l) << deviations);
                p.l = l, p.deviations = deviations, p.alpha = l == HalfOperator::degree ? 1e-5f : 0.75f;
                const Halves got = run(d, p);
                expect_product(got, p);
                EXPECT_EQ(bits(run(d, p)), bits(got));
            }
    }
}
// Too large becomes an infinity, and stays one or a NaN: that is how a filter that leaves the range is found out.
template <class Dev>
void check_overflow(const Dev& d) {
    Problem p(40, 16, 5);
    p.beta = 1, p.gamma = 1;
    p.x[std::size_t(7 * 16 + 3)] = f16(60000.f), p.z[std::size_t(7 * 16 + 3)] = f16(60000.f);
    p.alpha = 0;
    const Halves got = run(d, p);
    EXPECT_TRUE(std::isinf(float(got[std::size_t(7 * 16 + 3)])));
    EXPECT_TRUE(std::isfinite(float(got[std::size_t(7 * 16 + 2)])));
    p.z = got;
    EXPECT_FALSE(std::isfinite(float(run(d, p)[std::size_t(7 * 16 + 3)])));
}

// ---- deflate ---------------------------------------------------------------------------------------------------------

struct DeflateCase {
    std::int64_t n = 0, w;
    bool walk;
    Sizes offsets{0};
    Halves x;
    Values v;
    DeflateCase(const Sizes& sizes, std::int64_t width, bool in_units = false) : w(width), walk(in_units) {
        for (const auto size : sizes) offsets.push_back(offsets.back() + size);
        n = offsets.back();
        x = random_halves(n * w, 1, 100);
        v = random_uniform(std::size_t(n), 2, 0.5, 1.5);
        for (std::size_t c = 0; c + 1 < offsets.size(); ++c) {
            const auto first = v.begin() + offsets[c], last = v.begin() + offsets[c + 1];
            const double norm = std::sqrt(std::inner_product(first, last, first, 0.0));
            std::for_each(first, last, [&](double& value) { value = float(value / norm); });
        }
    }
};
template <class Dev>
Halves run(const Dev& d, const DeflateCase& p) {
    const Buffer<f16, Dev> x(d, p.x);
    const Buffer<float, Dev> v(d, to<float>(p.v));
    const Buffer<std::int64_t, Dev> offsets(d, p.offsets);
    const Buffer<double, Dev> space(d, scratch(d, eigen_deflate_scratch(p.n, p.w)));
    half_deflate(d, HalfDeflate{x.mat(p.n, p.w), v.vec(), offsets.vec(), space.vec(), p.walk});
    return x.host();
}
template <class Dev>
void check_deflate(const Dev& d) {
    const std::int64_t piece = kEigenDeflatePiece;
    std::vector<Sizes> cases = {{1}, {3, 1, 7}, {piece - 1}, {piece}, {piece + 1}, Sizes(600, 1)};
    cases.push_back({2 * piece, 2 * piece + 1, piece + 1, piece, 2 * piece - 1});
    cases.push_back({1, 300, piece, 1, 1000, 5, 20000, 2, 5000});
    for (const Sizes& sizes : cases)
        for (const std::int64_t width : {8, 16, 32, -16}) {
            const std::int64_t w = std::abs(width);
            const DeflateCase p(sizes, w, width < 0);
            SCOPED_TRACE(testing::Message() << sizes.size() << " components, " << p.n << " x " << w << p.walk);
            const Halves got = run(d, p);
            EXPECT_EQ(bits(run(d, p)), bits(got));
            for (std::size_t c = 0; c + 1 < p.offsets.size(); ++c)
                for (std::int64_t j = 0; j < w; ++j) {
                    double sum = 0, size = 0;
                    const auto at = [&](const Halves& h, std::int64_t i) {
                        return double(float(h[std::size_t(i * w + j)]));
                    };
                    for (std::int64_t i = p.offsets[c]; i < p.offsets[c + 1]; ++i) {
                        const double v = p.v[std::size_t(i)];
                        sum += (p.walk ? v * v : v) * at(p.x, i);
                        size += std::fabs((p.walk ? v * v : v) * at(p.x, i));
                    }
                    for (std::int64_t i = p.offsets[c]; i < p.offsets[c + 1]; ++i) {
                        const double v = p.walk ? 1 : p.v[std::size_t(i)], x = at(p.x, i), expected = x - v * sum;
                        const double f32 =
                            0x1p-24 * (v * double(piece) * size + 2 * (std::fabs(x) + v * std::fabs(sum)));
                        ASSERT_LE(std::fabs(at(got, i) - expected), half_unit(std::fabs(expected) + f32) + f32) << i;
                    }
                }
        }
}

TEST(HalfPanel, PackScalesByPowersOfTwo) { check_packing(Cpu{}); }
TEST(HalfPanel, UnitsOfRows) { check_units(Cpu{}); }
TEST(HalfPanel, ProductsMatchDouble) { check_products(Cpu{}); }
TEST(HalfPanel, OverflowShows) { check_overflow(Cpu{}); }
TEST(HalfPanel, DeflateMatchesDouble) { check_deflate(Cpu{}); }
TEST(HalfPanel, ThreadsDoNotMatter) {
    const Problem p(2000, 16, 12);
    EXPECT_EQ(bits(run(Cpu{1}, p)), bits(run(Cpu{5}, p)));
    const DeflateCase q({1, 5000, 700}, 32);
    EXPECT_EQ(bits(run(Cpu{1}, q)), bits(run(Cpu{5}, q)));
}
TEST(HalfPanel, BrokenContractThrows) {
    Halves x(64), y(64);
    std::vector<float> scale(16), block(64);
    HalfPack pack{{x.data(), 4, 16}, {block.data(), 4, 12, 16}, {scale.data(), 16}, false, {}};
    EXPECT_NO_THROW(half_pack(Cpu{}, pack));
    pack.y = {x.data(), 4, 12, 16};  // no panel
    EXPECT_THROW(half_pack(Cpu{}, pack), ContractError);
    pack.y = {x.data(), 4, 8}, pack.scale.size = 8;  // too narrow
    EXPECT_THROW(half_pack(Cpu{}, pack), ContractError);
    const Sizes offsets(5, 0);
    const std::vector<std::int32_t> columns(1);
    HalfApply a;
    a.matrix = {4, {offsets.data(), 5}, {columns.data(), 0}, {scale.data(), 0}, {}};
    a.x = {x.data(), 4, 16}, a.y = {y.data(), 4, 16};
    EXPECT_NO_THROW(half_apply(Cpu{}, a));
    a.gamma = 1;  // no z
    EXPECT_THROW(half_apply(Cpu{}, a), ContractError);
    a.gamma = 0, a.y = {x.data(), 4, 16};  // y is x
    EXPECT_THROW(half_apply(Cpu{}, a), ContractError);
}

#if FIEDLER_CUDA
TEST(HalfPanel, GpuPackScalesByPowersOfTwo) {
    FIEDLER_GPU_OR_SKIP();
    check_packing(gpu());
    check_units(gpu());
}
TEST(HalfPanel, GpuProductsMatchDouble) {
    FIEDLER_GPU_OR_SKIP();
    check_products(gpu());
    check_overflow(gpu());
}
TEST(HalfPanel, GpuDeflateMatchesDouble) {
    FIEDLER_GPU_OR_SKIP();
    check_deflate(gpu());
}
#endif

}  // namespace
}  // namespace fiedler::test
