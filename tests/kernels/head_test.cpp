// head: the naive formulas, finite differences, chunks; on the GPU both ways that compute in bf16 against the double
// reference (in fp8: head_fp8_test.cpp).
#include "tests/kernels/head_problem.h"
#include "tests/support/gradcheck.h"
#include "tests/support/rounding_cpu.h"

namespace fiedler::test {
namespace {

template <class T, class Dev = Cpu>
Answer on_cpu(const Problem& q, std::int64_t chunk, const Dev& dev = {}) {
    const Operands<T, Cpu> o(dev, q, chunk);
    head(dev, o.call);
    return o.answer();
}

TEST(Head, MatchesNaiveFormula) {
    for (auto [n, c, v] : {std::array{1, 1, 1}, {3, 5, 2}, {7, 16, 33}, {18, 12, 514}}) {
        SCOPED_TRACE(testing::Message() << n << " x " << c << " x " << v);
        const Problem q(n, c, v);
        const Answer ref = naive(q);
        for (const std::int64_t chunk : {1, 5, 64}) {
            const Answer got = on_cpu<double>(q, chunk);
            EXPECT_TRUE(close_to(got.losses, ref.losses, 1e-13));
            EXPECT_TRUE(close_to(got.dx, ref.dx, 1e-12));
            EXPECT_TRUE(close_to(got.dw, ref.dw, 1e-12));
        }
    }
}

TEST(Head, GradientMatchesFiniteDifferences) {
    Problem q(4, 6, 9);
    q.dw.assign(q.dw.size(), 0.0);
    const auto objective = [&] {
        const Operands<double, Cpu> o(Cpu{}, q, 3, false);
        head(Cpu{}, o.call);
        return q.scale * inner(Values(4, 1.0), o.losses.values());
    };
    const Answer got = on_cpu<double>(q, 3);
    EXPECT_TRUE(gradient_matches(got.dx, q.x, objective));
    EXPECT_TRUE(gradient_matches(got.dw, q.w, objective));
}

TEST(Head, BrokenContractThrows) {
    const Problem q(3, 4, 5);
    const Operands<double, Cpu> o(Cpu{}, q, 2);
    Head<double> p = o.call;
    p.dw = {};
    EXPECT_THROW(head(Cpu{}, p), ContractError);
    p = o.call, p.w = p.w.columns(0, 3);
    EXPECT_THROW(head(Cpu{}, p), ContractError);
    p = o.call, p.logits = p.logits.columns(0, 4);
    EXPECT_THROW(head(Cpu{}, p), ContractError);
    p = o.call, p.targets = p.targets.slice(0, 2);
    EXPECT_THROW(head(Cpu{}, p), ContractError);
}

#if FIEDLER_CUDA

#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif

constexpr const char* name_of(HeadPath p) { return p == HeadPath::sm90 ? "sm90" : "products"; }
bool takes(HeadPath path, std::int64_t c, std::int64_t v) {
    return path == HeadPath::products || (FIEDLER_SM90A && gpu().arch == 90 && c % 64 == 0 && c <= 768 && v % 8 == 0);
}

// What naive evaluation in the GPU's precision gives, with the roundings of the contract: the sm_90 way rounds the
// exponentials, -s, x times its factor, the product for dx, and that times the factor.
Answer low_of(const Problem& q, HeadPath path) {
    if (path == HeadPath::products) return on_cpu<float>(q, q.n, RoundingCpu{});
    const auto rounded = [](float x) { return float(bf16(x)); };
    Answer a{Values(std::size_t(q.n), 0.0), Values(count(q.n, q.c), 0.0), {}};
    const std::vector<float> x = to<float>(q.x), w = to<float>(q.w);
    std::vector<float> dw(count(q.v, q.c), 0.f), logits(count(q.n, q.v));
    const Cpu cpu;
    matmul_forward(
        cpu, MatmulForward<float, float>{
                 .y = {logits.data(), q.n, q.v}, .x = {x.data(), q.n, q.c}, .w = {w.data(), q.v, q.c}, .residual = {}});
    std::vector<float> scaled = x, factors(std::size_t(q.n), 0.f), dx(count(q.n, q.c));
    for (std::int64_t i = 0; i < q.n; ++i) {
        const std::int32_t t = q.targets[std::size_t(i)];
        float* e = logits.data() + i * q.v;
        const float base = t < 0 ? INFINITY : e[t];
        float sum = 0;
        for (std::int64_t j = 0; j < q.v; ++j) {
            const float value = j == t ? 0.f : std::exp(e[j] - base);
            sum += value, e[j] = rounded(value);
        }
        if (t >= 0) e[t] = rounded(-sum), factors[std::size_t(i)] = float(q.scale) / (1 + sum);
        a.losses[std::size_t(i)] = t >= 0 ? double(std::log1p(sum)) : 0.0;
        for (std::int64_t k = 0; k < q.c; ++k) {
            float& value = scaled[std::size_t(i * q.c + k)];
            value = rounded(value * factors[std::size_t(i)]);
        }
    }
    const Mat<const float> e(logits.data(), q.n, q.v);
    matmul_dw(cpu, MatmulDw<float>{.dw = {dw.data(), q.v, q.c}, .dy = e, .x = {scaled.data(), q.n, q.c}});
    matmul_dx(cpu, MatmulDx<float>{.dx = {dx.data(), q.n, q.c}, .dy = e, .w = {w.data(), q.v, q.c}});
    for (std::size_t i = 0; i < dx.size(); ++i) a.dx[i] = rounded(rounded(dx[i]) * factors[i / std::size_t(q.c)]);
    a.dw = from(dw);
    for (std::size_t i = 0; i < dw.size(); ++i) a.dw[i] = float(q.dw[i] + a.dw[i]);
    return a;
}

void check_on_gpu(const Problem& q, std::int64_t chunk, HeadPath path) {
    SCOPED_TRACE(testing::Message() << name_of(path) << ": " << q.n << " x " << q.c << " x " << q.v << ", chunk "
                                    << chunk);
    const Answer ref = on_cpu<double>(q, q.n), low = low_of(q, path);
    const auto run = [&](bool gradient) {
        const Operands<bf16, Cuda> o(gpu(), q, chunk, gradient);
        EXPECT_EQ(head_by_path(gpu(), o.call, path), takes(path, q.c, q.v));
        if (!gradient) {
            const Values dw = o.dw.values();
            EXPECT_TRUE(identical(dw.data(), q.dw.data(), dw.size() * sizeof(double))) << "dw without a gradient";
        }
        return o.answer();
    };
    const Answer got = run(true);
    if (!takes(path, q.c, q.v)) return;
    EXPECT_TRUE(close(got.losses, ref.losses, low.losses));
    EXPECT_TRUE(close(got.dx, ref.dx, low.dx));
    EXPECT_TRUE(close(got.dw, ref.dw, low.dw));
    const Answer again = run(true);
    EXPECT_EQ(got.losses, again.losses);
    EXPECT_EQ(got.dx, again.dx);
    EXPECT_EQ(got.dw, again.dw);
    EXPECT_EQ(got.losses, run(false).losses) << "the loss depends on whether the gradient is asked for";
}
void check_all(HeadPath path, const std::vector<std::array<std::int64_t, 3>>& sizes, std::int64_t chunk) {
    for (const auto& [n, c, v] : sizes) {
        Problem q(n, c, v);
        q.round();
        check_on_gpu(q, chunk, path);
    }
}

TEST(Head, GpuProductsMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all(HeadPath::products, {{1, 64, 8}, {9, 40, 30}, {130, 64, 515}, {65, 384, 2048}}, 48);
}
TEST(Head, GpuSm90MatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all(HeadPath::sm90,
              {{1, 64, 8}, {3, 64, 192}, {63, 64, 200}, {64, 128, 184}, {65, 384, 2048}, {130, 384, 1000}}, 200);
}
TEST(Head, GpuSm90EveryDepth) {  // panels of 192, 128 and 96 columns, whole and not
    FIEDLER_GPU_OR_SKIP();
    for (std::int64_t c = 64; c <= 768; c += 64) check_all(HeadPath::sm90, {{70, c, 584}}, 128);
}
TEST(Head, GpuSm90Chunks) {  // the last one shorter
    FIEDLER_GPU_OR_SKIP();
    check_all(HeadPath::sm90, {{300, 128, 600}}, 128);
    check_all(HeadPath::sm90, {{70, 64, 264}}, 1);
}
TEST(Head, GpuSm90MorePanelsThanMultiprocessors) {
    FIEDLER_GPU_OR_SKIP();
    check_all(HeadPath::sm90, {{200, 64, 50304}}, 200);
}
TEST(Head, GpuSm90ManyTilesOfABlock) {
    FIEDLER_GPU_OR_SKIP();
    check_all(HeadPath::sm90, {{4133, 64, 2048}}, 4133);
}
TEST(Head, GpuTakesOtherShapesAnotherWay) {
    FIEDLER_GPU_OR_SKIP();
    check_all(HeadPath::sm90, {{9, 64, 30}, {9, 72, 64}, {9, 832, 64}}, 16);
    for (const auto& [n, c, v] : {std::array<std::int64_t, 3>{9, 64, 30}, {9, 64, 64}}) {
        Problem q(n, c, v);
        q.round();
        const Operands<bf16, Cuda> o(gpu(), q, 16);
        head(gpu(), o.call);
        EXPECT_TRUE(close_to(o.losses.values(), naive(q).losses, 0.02));
    }
}
TEST(Head, GpuSm90LargeLosses) {  // far from the target, and beyond what exponentials hold
    FIEDLER_GPU_OR_SKIP();
    if (!takes(HeadPath::sm90, 64, 64)) GTEST_SKIP() << "not an sm_90 device, or not in this build";
    Problem q(5, 64, 64);
    q.targets.assign(5, 7);
    q.x.assign(q.x.size(), 0.0), q.w.assign(q.w.size(), 0.0);
    q.w[std::size_t(9 * 64)] = 1;
    const double far[] = {80, -80, 0, 200, -200};  // logit of word 9; the target's is 0
    for (std::size_t i = 0; i < 5; ++i) q.x[i * 64] = far[i];
    q.round();
    const Operands<bf16, Cuda> o(gpu(), q, 5);
    ASSERT_TRUE(head_by_path(gpu(), o.call, HeadPath::sm90));
    const Values got = o.losses.values(), ref = naive(q).losses;
    for (std::size_t i = 0; i < 5; ++i)
        if (i == 3)
            EXPECT_TRUE(std::isinf(got[i]) && got[i] > 0) << got[i];
        else
            EXPECT_NEAR(got[i], ref[i], 2e-6 * (1 + ref[i]));
}
TEST(Head, GpuNanShows) {
    FIEDLER_GPU_OR_SKIP();
    for (const HeadPath path : {HeadPath::products, HeadPath::sm90}) {
        if (!takes(path, 64, 264)) continue;
        SCOPED_TRACE(name_of(path));
        Problem q(70, 64, 264);
        q.x[std::size_t(67 * 64 + 63)] = std::nan("");
        q.targets[5] = 264;  // no such word
        const Operands<bf16, Cuda> o(gpu(), q, 70, false);
        ASSERT_TRUE(head_by_path(gpu(), o.call, path));
        const Values losses = o.losses.values();
        for (std::size_t i = 0; i < 70; ++i) EXPECT_EQ(std::isnan(losses[i]), i == 67 || i == 5) << i;
    }
}
TEST(Head, GpuIsRecordedInAGraph) {
    FIEDLER_GPU_OR_SKIP();
    Problem q(200, 128, 520);
    q.round();
    expect_recorded(Operands<bf16, Cuda>(gpu(), q, 128));
}

#endif

}  // namespace
}  // namespace fiedler::test
