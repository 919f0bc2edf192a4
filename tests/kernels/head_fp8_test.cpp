// head in 8 bits: on the host, that its formula with all its roundings is near the exact one; on the GPU, that it is this
// formula. The order of the tile's rows and columns, factors, the target's term: a mistake in one of them is far outside.
#include <bit>
#include <cmath>
#include <numbers>

#include "kernels/head_fp8_sm90.h"
#include "tests/kernels/head_problem.h"

namespace fiedler::test {
namespace {

#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif

// To so many bits of mantissa, with subnormals from 2^least on, saturating at `most`; half-way cases to even.
double rounded(double x, int bits, int least, double most) {
    if (std::isnan(x) || x == 0) return x;
    const double step = std::ldexp(1.0, std::max(std::ilogb(x), least) - bits);
    return std::clamp(std::nearbyint(x / step) * step, -most, most);
}
double e4m3_of(double x) { return rounded(x, 3, -6, 448); }
double e5m2_of(double x) { return rounded(x, 2, -14, 57344); }
double bf16_of(double x) { return float(bf16(float(x))); }

TEST(Head, EightBitFloats) {  // the emulation's own
    EXPECT_EQ(e4m3_of(1.0625), 1.0);
    EXPECT_EQ(e4m3_of(1.1875), 1.25);
    EXPECT_EQ(e4m3_of(1000), 448);
    EXPECT_EQ(e4m3_of(-3 * std::ldexp(1.0, -10)), -2 * std::ldexp(1.0, -9));
    EXPECT_EQ(e4m3_of(std::ldexp(1.0, -11)), 0);
    EXPECT_EQ(e5m2_of(1.125), 1.0);
    EXPECT_EQ(e5m2_of(1.375), 1.5);
    EXPECT_EQ(e5m2_of(1e9), 57344);
    EXPECT_EQ(e5m2_of(std::ldexp(3.0, -18)), std::ldexp(1.0, -16));
}

// The power of two that takes `largest` to at most 448, and above 224.
double factor_of(double largest) {
    double factor = std::ldexp(1.0, 8 - std::ilogb(largest));
    return largest * factor > 448 ? factor / 2 : factor;
}
double largest_of(const double* v, std::int64_t n) {
    double most = 0;
    for (std::int64_t i = 0; i < n; ++i) most = std::max(most, std::abs(v[i]));
    return most;
}

// A row in int8, and its scale.
struct Whole {
    Values q;
    double scale;

    static float upwards(float x, int bits) {  // without the last bits of its mantissa
        const std::uint32_t last = (1u << bits) - 1;
        return std::bit_cast<float>((std::bit_cast<std::uint32_t>(x) + last) & ~last);
    }
    Whole(const double* x, std::int64_t n) : q(x, x + n) {
        const float most = std::clamp(float(largest_of(x, n)), 0x1p-100f, 0x1p100f);
        double square = 0;
        for (const double v : q) square += std::pow(v * (127.f / most), 2);
        const float length = upwards(float(std::sqrt(square)) / 2030, 16);
        const float up = upwards(most / 127.f * std::max(1.f, length), 2);
        scale = up;
        const double down = 1.f / up;
        for (double& v : q) v = std::nearbyint(v * down);  // the product is exact in double
    }
    double dot(const Whole& other) const {
        double sum = 0;
        for (std::size_t k = 0; k < q.size(); ++k) sum += q[k] * other.q[k];
        return sum;
    }
};
std::vector<Whole> whole_rows(const Values& m, std::int64_t columns) {
    std::vector<Whole> rows;
    for (std::size_t at = 0; at < m.size(); at += std::size_t(columns)) rows.emplace_back(m.data() + at, columns);
    return rows;
}

TEST(Head, WholeRows) {  // the emulation's own, and the bound on the sum of its products
    const Values zeros(128, 0.0);
    EXPECT_EQ(Whole(zeros.data(), 128).q, zeros);
    Values peak(128, 0.0);
    peak[5] = -3, peak[6] = 0.01, peak[7] = 0.02;
    const Whole of_peak(peak.data(), 128);
    EXPECT_GE(of_peak.scale, 3. / 127);
    EXPECT_LE(of_peak.scale, 3. / 127 * (1 + std::ldexp(1, -20)));
    EXPECT_EQ(of_peak.q[5], -127);
    EXPECT_EQ(of_peak.q[6], 0);
    EXPECT_EQ(of_peak.q[7], 1);
    for (const std::int64_t c : {128, 256, 384, 768}) {
        Values flat(std::size_t(c), 0.71);
        const Whole of_flat(flat.data(), c);
        EXPECT_LE(of_flat.dot(of_flat), 1 << 22);
        EXPECT_GE(of_flat.dot(of_flat), 126 * 126 * std::min<std::int64_t>(c, 256));
    }
}

// What the contract says of fp8, in double but for the roundings that it names.
struct Emulation {
    const Problem& q;
    Answer a;
    Values w8;                           // in e4m3
    std::vector<Whole> w_whole;          // in int8
    double w_factor, largest_logit = 0;  // of all, in nats

    Emulation(const Problem& problem, std::int64_t chunk)
        : q(problem),
          a{Values(std::size_t(q.n), 0.0), Values(count(q.n, q.c), 0.0), q.dw},
          w8(q.w),
          w_whole(whole_rows(q.w, q.c)) {
        w_factor = factor_of(largest_of(q.w.data(), q.v * q.c));
        for (double& v : w8) v = e4m3_of(v * w_factor) / w_factor;
        for (std::int64_t first = 0; first < q.n; first += chunk) add_chunk(first, std::min(chunk, q.n - first));
    }
    double dot(const double* x, const double* w) const {
        double sum = 0;
        for (std::int64_t k = 0; k < q.c; ++k) sum += x[k] * w[k];
        return sum;
    }
    std::int32_t target(std::int64_t i) const { return q.targets[std::size_t(i)]; }
    const double* x(std::int64_t i) const { return q.x.data() + i * q.c; }
    const double* w(std::int64_t j) const { return q.w.data() + j * q.c; }

    void add_chunk(std::int64_t first, std::int64_t rows) {
        std::vector<std::int64_t> sample;
        for (std::int64_t k = 0; k < 192; ++k) {
            const std::int32_t t = target(first + k * rows / 192);
            sample.push_back(t < 0 ? k % q.v : t);
        }
        Values e(count(rows, q.v)), scaled(count(rows, q.c)), s(static_cast<std::size_t>(rows));
        double most = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
            if (target(first + r) < 0) continue;
            const double factor = add_row(first + r, sample, e.data() + r * q.v, s[std::size_t(r)]);
            for (std::int64_t k = 0; k < q.c; ++k) scaled[std::size_t(r * q.c + k)] = x(first + r)[k] * factor;
            most = std::max(most, largest_of(scaled.data() + r * q.c, q.c));
        }
        const double to = factor_of(most);
        for (double& v : scaled) v = e4m3_of(v * to) / to;
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int32_t t = target(first + r);
            if (t < 0) continue;
            e[std::size_t(r * q.v + t)] = -e5m2_of(s[std::size_t(r)]);
            for (std::int64_t j = 0; j < q.v; ++j)
                for (std::int64_t k = 0; k < q.c; ++k)
                    a.dw[std::size_t(j * q.c + k)] += e[std::size_t(r * q.v + j)] * scaled[std::size_t(r * q.c + k)];
        }
    }
    // Loss and dx of a row; its exponentials, rounded, and their sum before. Returns the factor of the row.
    double add_row(std::int64_t i, const std::vector<std::int64_t>& sample, double* e, double& s) {
        const std::int32_t t = target(i);
        const Whole x_whole(x(i), q.c);
        Values l(std::size_t(q.v));
        for (std::int64_t j = 0; j < q.v; ++j) {
            const Whole& w_row = w_whole[std::size_t(j)];
            l[std::size_t(j)] = x_whole.dot(w_row) * w_row.scale * x_whole.scale;
            largest_logit = std::max(largest_logit, std::abs(l[std::size_t(j)]));
        }
        const double of_target = dot(x(i), w(t));
        double base = of_target;
        for (const std::int64_t j : sample) base = std::max(base, l[std::size_t(j)]);
        base -= std::log(16.0);
        s = 0;
        for (std::int64_t j = 0; j < q.v; ++j) {
            const double value = j == t ? 0 : std::exp(l[std::size_t(j)] - base);
            s += value, e[j] = e5m2_of(value);
        }
        const double of = std::exp(of_target - base), factor = q.scale / (s + of);
        a.losses[std::size_t(i)] = std::log1p(s / of);
        double* const dx = a.dx.data() + i * q.c;
        Values sum(std::size_t(q.c), 0.0);
        for (std::int64_t j = 0; j < q.v; ++j)
            for (std::int64_t k = 0; k < q.c; ++k) sum[std::size_t(k)] += e[j] * w8[std::size_t(j * q.c + k)];
        for (std::int64_t k = 0; k < q.c; ++k)
            dx[k] = bf16_of(factor * (bf16_of(sum[std::size_t(k)]) - s * w8[std::size_t(t * q.c + k)]));
        return factor;
    }
};

// For each row, |got - want| / |want| in the 2-norm; rows of less than 1e-3 of the longest are held against that. The
// largest, and how many are above `limit`.
struct RowErrors {
    double most = 0;
    std::int64_t above = 0;
};
RowErrors errors_of_rows(const Values& got, const Values& want, std::int64_t columns, double limit) {
    EXPECT_EQ(got.size(), want.size());
    const std::int64_t rows = std::int64_t(want.size()) / columns;
    const auto norm = [&](std::int64_t r, bool difference) {
        double sum = 0;
        for (std::int64_t i = r * columns; i < (r + 1) * columns; ++i) {
            const double v = want[std::size_t(i)] - (difference ? got[std::size_t(i)] : 0);
            sum += v * v;
        }
        return std::sqrt(sum);
    };
    double longest = 0;
    for (std::int64_t r = 0; r < rows; ++r) longest = std::max(longest, norm(r, false));
    RowErrors e;
    for (std::int64_t r = 0; r < rows; ++r) {
        const double error = norm(r, true) / std::max(norm(r, false), 1e-3 * longest);
        e.most = std::isnan(error) ? INFINITY : std::max(e.most, error);
        if (!(error <= limit)) ++e.above;
    }
    return e;
}
double largest_difference(const Values& got, const Values& want) {
    double most = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double error = std::abs(got[i] - want[i]);
        most = std::isnan(error) ? INFINITY : std::max(most, error);
    }
    return most;
}
Values added(const Values& dw, const Problem& q) {  // what was added to dw
    Values v = dw;
    for (std::size_t i = 0; i < v.size(); ++i) v[i] -= q.dw[i];
    return v;
}

Problem rounded_problem(std::int64_t n, std::int64_t c, std::int64_t v, double spread = 2) {
    Problem q(n, c, v, spread);
    q.round();
    return q;
}
// Few elements that are not 0. In the last two columns, of which either x or w has nothing but zeros, the other has its
// largest, by which scales are 1/64: logits are multiples of 11/64, exact.
Problem exact_problem(std::int64_t n, std::int64_t c, std::int64_t v) {
    Problem q(n, c, v);
    q.x.assign(q.x.size(), 0.0);
    const Values r = random_uniform(count(std::max(n, v), c), 7, 0, 1);
    for (std::int64_t i = 0; i < n; ++i)
        for (int k = 0; k < 4; ++k)
            q.x[std::size_t(i * c + (i * 37 + k * 29 + i / 64 * 5) % (c - 2))] =
                (k % 2 ? -0.6875 : 0.6875) * (1 << i % 3) / 2;
    for (std::size_t j = 0; j < q.w.size(); ++j) q.w[j] = r[j] < 0.3 ? -1 : r[j] < 0.5 ? 0.5 : r[j] < 0.8 ? 1 : 1.5;
    for (std::int64_t j = 0; j < v; ++j)
        q.w[std::size_t((j + 1) * c - 2)] = 0, q.w[std::size_t((j + 1) * c - 1)] = 127. / 64;
    for (std::int64_t i = 0; i < n; ++i) q.x[std::size_t((i + 1) * c - 2)] = 127. / 64;
    q.round();
    return q;
}

// dx has the target's term, its largest, with the noise of three bits of mantissa, dw with that of two.
TEST(Head, FormulaOfFp8IsNearTheExactOne) {
    struct Bounds {
        double spread, loss, dx, dw;
    };
    for (const Bounds& b : {Bounds{1, 0.005, 0.06, 0.15}, Bounds{2, 0.03, 0.08, 0.2}}) {
        SCOPED_TRACE(b.spread);
        const Problem q = rounded_problem(128, 384, 1008, b.spread);
        const Answer exact = naive(q);
        const Emulation low(q, 64);
        EXPECT_LT(largest_difference(low.a.losses, exact.losses), b.loss);
        EXPECT_LT(errors_of_rows(low.a.dx, exact.dx, q.c, 1).most, b.dx);
        const RowErrors dw = errors_of_rows(added(low.a.dw, q), added(exact.dw, q), q.c, b.dw / 2);
        EXPECT_LT(dw.most, b.dw);
        EXPECT_LT(dw.above, q.v / 3);
    }
    const Problem q = exact_problem(128, 128, 208);
    EXPECT_LT(largest_difference(Emulation(q, 64).a.losses, naive(q).losses), 1e-12);
}

#if FIEDLER_CUDA

bool takes(std::int64_t n, std::int64_t chunk, std::int64_t c, std::int64_t v) {
    return FIEDLER_SM90A && gpu().arch == 90 && head_fp8_takes(n, chunk, v, c);
}
#define FIEDLER_FP8_OR_SKIP() \
    FIEDLER_GPU_OR_SKIP();    \
    if (!FIEDLER_SM90A || gpu().arch != 90) GTEST_SKIP() << "not an sm_90 device, or not in this build: NOT TESTED"

Answer on_gpu(const Problem& q, std::int64_t chunk) {
    const Operands<bf16, Cuda> o(gpu(), q, chunk);
    EXPECT_TRUE(head_by_path(gpu(), o.call, HeadPath::fp8));
    return o.answer();
}

// Sums of logits are exact; what is left are some eight roundings of f32 on the way from a sum to its exponential, of
// numbers up to the largest logit: an exponential is off by a share of `slack` at most. A few are then rounded to the other
// side, which can be seen in a row that has few large ones. What is left between got and emulation is far below the noise
// of fp8 itself in all but one row of `share`.
void check_on_gpu(const Problem& q, std::int64_t chunk, std::int64_t share = 20) {
    SCOPED_TRACE(testing::Message() << q.n << " x " << q.c << " x " << q.v << ", chunk " << chunk);
    ASSERT_TRUE(takes(q.n, chunk, q.c, q.v));
    const Answer exact = naive(q);
    const Emulation want(q, chunk);
    const double slack = (1 + want.largest_logit) * std::ldexp(1.0, -21);
    const Answer got = on_gpu(q, chunk);
    const Values added_got = added(got.dw, q), added_want = added(want.a.dw, q);
    EXPECT_LE(largest_difference(got.losses, want.a.losses), 1e-5 + 2 * slack);
    const auto near = [&](const Values& from_got, const Values& from_want) {
        const RowErrors e = errors_of_rows(from_got, from_want, q.c, 0.01);  // twice to bf16: 0.004 at most
        EXPECT_LE(e.above, 1 + std::int64_t(from_want.size()) / q.c / share);
        EXPECT_LE(e.most, 0.3);
    };
    near(got.dx, want.a.dx);
    near(added_got, added_want);
    const auto distance = [&](const Values& from_got, const Values& from_want, const Values& to) {
        const double own = errors_of_rows(from_want, to, q.c, 1).most,
                     error = errors_of_rows(from_got, to, q.c, 1).most;
        EXPECT_LE(error, 1.5 * own + 0.05) << "farther from the exact answer than the formula";
    };
    distance(got.dx, want.a.dx, exact.dx);
    distance(added_got, added_want, added(exact.dw, q));
    for (std::size_t i = 0; i < q.targets.size(); ++i)
        if (q.targets[i] < 0) {
            EXPECT_EQ(got.losses[i], 0);
            EXPECT_EQ(largest_of(got.dx.data() + std::int64_t(i) * q.c, q.c), 0);
        }
    const Answer again = on_gpu(q, chunk);
    EXPECT_EQ(got.losses, again.losses);
    EXPECT_EQ(got.dx, again.dx);
    EXPECT_EQ(got.dw, again.dw);
}

#if FIEDLER_SM90A  // head_fp8_sm90.h's steps are in this build

// Rows as words and as rows of a chunk: to the bit. Zeros, an element that leaves nothing of the others, all of one size
// (where the length makes the scale), next to nothing, next to too much, and what is no number.
TEST(Head, GpuInt8RowsAreAsStated) {
    FIEDLER_FP8_OR_SKIP();
    for (const std::int64_t c : {128, 384, 768}) {
        SCOPED_TRACE(c);
        const std::int64_t n = 64;
        Values x = random_values(count(n, c), 1, 1);
        const auto fill = [&](std::int64_t row, auto&& value) {
            for (std::int64_t k = 0; k < c; ++k) x[std::size_t(row * c + k)] = value(k);
        };
        fill(0, [](std::int64_t) { return 0; });
        fill(1, [](std::int64_t k) { return k == 77 ? 1000 : 1; });
        fill(2, [](std::int64_t k) { return k % 3 ? 0.4375 : -0.4375; });
        fill(3, [](std::int64_t k) { return std::ldexp(double(k + 1), -120); });
        fill(4, [](std::int64_t k) { return std::ldexp(k % 2 ? 1 : -1, 100); });
        fill(5, [](std::int64_t k) { return k == 3 ? std::ldexp(1, 101) : 1; });
        fill(6, [](std::int64_t k) { return k == 3 ? double(INFINITY) : 1; });
        fill(7, [](std::int64_t k) { return k == 3 ? std::nan("") : 1; });
        x = round_to<bf16>(x);
        const std::vector<Whole> want = whole_rows(x, c);
        const Buffer<bf16, Cuda> of_x(gpu(), x);
        const Buffer<std::int32_t, Cuda> targets(gpu(), std::vector<std::int32_t>(std::size_t(n), 0));
        const Buffer<std::int8_t, Cuda> words(gpu(), count(n, c)), rows(gpu(), count(n, c));
        const Buffer<float, Cuda> scales(gpu(), std::size_t(n)), octaves(gpu(), std::size_t(n));
        const Buffer<float, Cuda> lengths(gpu(), std::size_t(n)), logits(gpu(), std::size_t(n));
        const Buffer<std::uint32_t, Cuda> largest(gpu(), 1);
        head_fp8_words(gpu(),
                       {.y = words.mat(n, c), .scales = scales.data(), .largest = largest.data(), .x = of_x.mat(n, c)});
        head_fp8_rows(gpu(), {.y = rows.mat(n, c),
                              .largest = lengths.data(),
                              .octaves = octaves.data(),
                              .target_logits = logits.data(),
                              .x = of_x.mat(n, c),
                              .w = of_x.mat(n, c),
                              .targets = targets.data()});
        const std::vector<std::int8_t> q = words.host();
        EXPECT_EQ(q, rows.host());
        const std::vector<float> s = scales.host(), o = octaves.host();
        for (std::int64_t i = 0; i < n; ++i) {
            if (i >= 5 && i < 8) {
                EXPECT_TRUE(std::isnan(s[std::size_t(i)]) && std::isnan(o[std::size_t(i)])) << i;
                continue;
            }
            EXPECT_EQ(s[std::size_t(i)], want[std::size_t(i)].scale) << i;
            EXPECT_EQ(o[std::size_t(i)], s[std::size_t(i)] * std::numbers::log2e_v<float>) << i;
            double square = 0;
            std::int64_t off = 0;
            for (std::int64_t k = 0; k < c; ++k) {
                const double got = q[std::size_t(i * c + k)];
                square += got * got, off += got != want[std::size_t(i)].q[std::size_t(k)];
            }
            EXPECT_EQ(off, 0) << i;
            EXPECT_LE(square, 1 << 22) << i;
        }
        EXPECT_TRUE(std::isnan(std::bit_cast<float>(largest.host()[0])));
    }
}
// Sums up to 2^22 on both sides, and next to it, in every tile, panel and place: with the base two octaves below the logit
// each word adds exactly 4.
TEST(Head, GpuInt8SumsAreExactUpToTheirBound) {
    FIEDLER_FP8_OR_SKIP();
    for (const std::int64_t c : {384, 768}) {
        const std::int64_t n = 512, v = 400, panels = 3;
        // 260 products of 127 and 127 and one of 127 and 6, and 2 more: 2^22.
        std::vector<std::int8_t> x(count(n, c)), w(count(v, c));
        for (std::int64_t j = 0; j < v; ++j)
            for (std::int64_t k = 0; k < 262; ++k) w[std::size_t(j * c + k)] = k < 260 ? 127 : k == 260 ? 6 : 1;
        Values base;
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t last = i / 2 % 4 - 1, sign = i % 2 ? 1 : -1;  // from -1 to 2
            for (std::int64_t k = 0; k < 262; ++k)
                x[std::size_t(i * c + k)] = std::int8_t(sign * (k < 261 ? 127 : last));
            base.push_back(double(sign * ((1 << 22) - 2 + last)) - 2);
        }
        const Buffer<std::int8_t, Cuda> of_x(gpu(), x), of_w(gpu(), w);
        const Buffer<float, Cuda> ones(gpu(), Values(std::size_t(n), 1)), bases(gpu(), base);
        const Buffer<float, Cuda> sums(gpu(), count(panels, n));
        const Buffer<e5m2, Cuda> e(gpu(), count(n, v)), turned(gpu(), count(n, v));
        const Buffer<std::int32_t, Cuda> targets(gpu(), std::vector<std::int32_t>(std::size_t(n), -1));
        head_fp8_exponentials(gpu(), {.e = e.mat(n, v),
                                      .turned = turned.mat(v, n),
                                      .sums = sums.mat(panels, n),
                                      .x = of_x.mat(n, c),
                                      .w = of_w.mat(v, c),
                                      .scales = ones.data(),
                                      .octaves = ones.data(),
                                      .base = bases.data(),
                                      .targets = targets.data()});
        const Values got = sums.values();
        for (std::int64_t p = 0; p < panels; ++p)
            for (std::int64_t i = 0; i < n; ++i)
                ASSERT_EQ(got[std::size_t(p * n + i)], p < 2 ? 4 * 192 : 4 * 16) << c << ' ' << p << ' ' << i;
        for (const auto& all : {e.host(), turned.host()})
            for (const e5m2 value : all) ASSERT_EQ(value.bits, 0x44);  // 4
    }
}

#endif

TEST(Head, GpuFp8MatchesItsFormula) {  // panels whole and not, down to one of 16 columns
    FIEDLER_FP8_OR_SKIP();
    for (const auto& [n, c, v] :
         {std::array<std::int64_t, 3>{64, 128, 16}, {64, 128, 192}, {64, 128, 208}, {128, 384, 576}, {192, 256, 1072}})
        check_on_gpu(rounded_problem(n, c, v), n);
}
TEST(Head, GpuFp8EveryDepth) {
    FIEDLER_FP8_OR_SKIP();
    for (std::int64_t c = 128; c <= 768; c += 128) check_on_gpu(rounded_problem(128, c, 400), 128);
}
TEST(Head, GpuFp8Chunks) {  // the last one shorter; a chunk longer than the rows
    FIEDLER_FP8_OR_SKIP();
    check_on_gpu(rounded_problem(320, 128, 592), 128);
    check_on_gpu(rounded_problem(192, 128, 208), 64);
    check_on_gpu(rounded_problem(64, 128, 208), 1000);
}
TEST(Head, GpuFp8LargeVocabularies) {
    FIEDLER_FP8_OR_SKIP();
    check_on_gpu(rounded_problem(64, 128, 50304), 64);
    check_on_gpu(rounded_problem(64, 128, 16400), 64);
}
TEST(Head, GpuFp8ManyTilesOfABlock) {
    FIEDLER_FP8_OR_SKIP();
    check_on_gpu(rounded_problem(1024, 128, 12672), 1024);  // half as many panels as multiprocessors: eight tiles
}
TEST(Head, GpuFp8WideLogits) {
    FIEDLER_FP8_OR_SKIP();
    check_on_gpu(rounded_problem(128, 128, 400, 12), 128, 8);  // rows of one large exponential
}
// Everything but exponentials and what follows from them is exact: what is in a wrong place cannot hide in the noise.
TEST(Head, GpuFp8EveryElementIsInItsPlace) {
    FIEDLER_FP8_OR_SKIP();
    for (const auto& [n, c, v, chunk] :
         {std::array<std::int64_t, 4>{64, 128, 208, 64}, {256, 128, 784, 128}, {192, 384, 400, 192}}) {
        SCOPED_TRACE(testing::Message() << n << " x " << c << " x " << v << ", chunk " << chunk);
        const Problem q = exact_problem(n, c, v);
        const Emulation want(q, chunk);
        const Answer got = on_gpu(q, chunk);
        EXPECT_LE(largest_difference(got.losses, want.a.losses), 2e-5);
        const RowErrors dx = errors_of_rows(got.dx, want.a.dx, c, 6e-3);
        // A few exponentials may be rounded to the other side.
        EXPECT_LE(dx.above, 2);
        EXPECT_LE(dx.most, 0.1);
        // A column of one sign in every row is a sum of many terms, with what the tensor core keeps of it.
        const auto without_scales = [&](Values dw) {
            for (std::int64_t j = 0; j < v; ++j) dw[std::size_t((j + 1) * c - 2)] = 0;
            return dw;
        };
        const RowErrors dw =
            errors_of_rows(without_scales(added(got.dw, q)), without_scales(added(want.a.dw, q)), c, 2e-3);
        EXPECT_LE(dw.above, 1 + v / 50);
        EXPECT_LE(dw.most, 0.1);
    }
}
// Where the softmax is right, gradients of the examples add up to nothing, whatever the rounding has made of w: here x is
// zero, every word is as probable as any other, and a target once. With the target's own term of another w than the other
// terms', dx would add up to 8 times as much as e4m3 does to a word, 0.2 of its length.
TEST(Head, GpuFp8RoundingCancelsWhereTheSoftmaxIsRight) {
    FIEDLER_FP8_OR_SKIP();
    Problem q(64, 384, 64);
    q.x.assign(q.x.size(), 0.0), q.scale = 1;
    for (std::int32_t i = 0; i < 64; ++i) q.targets[std::size_t(i)] = i;
    q.round();
    const Answer got = on_gpu(q, 64);
    double sum = 0, one = 0;
    for (std::int64_t k = 0; k < q.c; ++k) {
        double of_column = 0;
        for (std::int64_t i = 0; i < q.n; ++i) of_column += got.dx[std::size_t(i * q.c + k)];
        sum += of_column * of_column, one += std::pow(got.dx[std::size_t(k)], 2);
    }
    EXPECT_LE(std::sqrt(sum), 0.05 * std::sqrt(one));  // roundings to bf16: 8 times 0.0011, twice
    for (const double loss : got.losses) EXPECT_NEAR(loss, std::log(64.0), 1e-5);
}
TEST(Head, GpuFp8LargeLosses) {  // wrong and sure of it: saturated, and beyond what exponentials hold
    FIEDLER_FP8_OR_SKIP();
    Problem q(64, 128, 64);
    q.targets.assign(64, 7);
    q.x.assign(q.x.size(), 0.0), q.w.assign(q.w.size(), 0.0);
    q.w[9 * 128] = 1;
    const double far[] = {80, -80, 0, 192, -192, 8, 10, 20};  // logit of word 9; all others are 0
    for (std::size_t i = 0; i < 64; ++i) q.x[i * 128] = far[i % 8];
    q.round();
    const Answer got = on_gpu(q, 64), want = naive(q);
    for (std::size_t i = 0; i < 64; ++i) {
        const double* const dx = got.dx.data() + i * 128;
        if (i % 8 == 3) {
            EXPECT_TRUE(std::isinf(got.losses[i]) && got.losses[i] > 0) << got.losses[i];
            continue;
        }
        EXPECT_NEAR(got.losses[i], want.losses[i], 1e-5 * (1 + want.losses[i]));
        // e saturates at 57,344 = 16 exp(8.18): p of word 9 comes out as at most that over the sum.
        const double e = 16 * std::exp(far[i % 8]), sum = e + 63 * 16, p = e5m2_of(e) / sum;
        EXPECT_NEAR(dx[0], q.scale * p, 0.01 * q.scale * p + 1e-9) << far[i % 8];
    }
}
TEST(Head, GpuFp8WhatIsNotANumberShows) {
    FIEDLER_FP8_OR_SKIP();
    const auto losses = [&](const Problem& q) { return on_gpu(q, q.n).losses; };
    Problem q = rounded_problem(128, 128, 208);
    q.x[67 * 128 + 127] = std::nan(""), q.x[70 * 128] = INFINITY, q.x[71 * 128] = -INFINITY;
    q.targets[5] = 208;  // no such word
    const Values of_x = losses(q);
    for (std::size_t i = 0; i < 128; ++i)
        EXPECT_EQ(std::isfinite(of_x[i]), i != 67 && i != 70 && i != 71 && i != 5) << i;
    const Answer gradients = on_gpu(q, 128);
    EXPECT_TRUE(std::isnan(gradients.dx[67 * 128]));
    EXPECT_FALSE(std::isnan(gradients.dx[66 * 128]));
    EXPECT_TRUE(std::isnan(gradients.dw[0]));
    for (const double bad : {std::nan(""), double(INFINITY)}) {
        Problem of_w = rounded_problem(64, 128, 208);
        of_w.w[100 * 128 + 3] = bad;
        const Values got = losses(of_w);
        for (std::size_t i = 0; i < 64; ++i) EXPECT_EQ(std::isfinite(got[i]), of_w.targets[i] < 0) << i;
    }
}
TEST(Head, GpuFp8IsTakenOnlyWhereItCanBe) {
    FIEDLER_GPU_OR_SKIP();
    // Rows, chunks, depth and vocabulary that it does not take, and no gradient: to the bit as without asking for it.
    const auto same = [&](std::int64_t n, std::int64_t c, std::int64_t v, std::int64_t chunk, bool gradient) {
        SCOPED_TRACE(testing::Message() << n << " x " << c << " x " << v << ", chunk " << chunk);
        const Problem q = rounded_problem(n, c, v);
        Operands<bf16, Cuda> asked(gpu(), q, chunk, gradient), plain(gpu(), q, chunk, gradient);
        EXPECT_FALSE(head_by_path(gpu(), asked.call, HeadPath::fp8));
        asked.call.precision = HeadPrecision::fp8;
        asked.call.fp8_scratch = {};
        head(gpu(), asked.call), head(gpu(), plain.call);
        EXPECT_EQ(asked.losses.values(), plain.losses.values());
        if (!gradient) return;
        EXPECT_EQ(asked.dx.values(), plain.dx.values());
        EXPECT_EQ(asked.dw.values(), plain.dw.values());
    };
    same(65, 128, 208, 64, true);
    same(128, 128, 208, 100, true);
    same(64, 192, 208, 64, true);
    same(64, 896, 208, 64, true);
    same(64, 128, 200, 64, true);
    same(64, 128, 208, 64, false);
    if (!takes(64, 64, 128, 208)) return;
    const Problem q = rounded_problem(64, 128, 208);
    Operands<bf16, Cuda> o(gpu(), q, 64);
    o.call.precision = HeadPrecision::fp8;
    head(gpu(), o.call);
    EXPECT_EQ(o.losses.values(), on_gpu(q, 64).losses);
    o.call.fp8_scratch.size -= 1;
    EXPECT_THROW(head(gpu(), o.call), ContractError);
    o.call.fp8_scratch = {};
    EXPECT_THROW(head(gpu(), o.call), ContractError);
}
TEST(Head, GpuFp8IsRecordedInAGraph) {
    FIEDLER_FP8_OR_SKIP();
    const Problem q = rounded_problem(192, 128, 528);
    Operands<bf16, Cuda> o(gpu(), q, 128);
    o.call.precision = HeadPrecision::fp8;
    expect_recorded(o);
}

#endif

}  // namespace
}  // namespace fiedler::test
