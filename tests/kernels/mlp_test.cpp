// mlp: naive loops in double, finite differences, and both ways of the GPU at sizes around their tiles.
#include "kernels/mlp.h"

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

std::size_t count(std::int64_t a, std::int64_t b) { return static_cast<std::size_t>(a * b); }

// n rows, C and M columns. About half of the h that the backward pass is given is 0, as after a ReLU.
struct Problem {
    std::int64_t n, c, m;
    Values x, w1, dy, w2, h;

    Problem(std::int64_t rows, std::int64_t channels, std::int64_t hidden) : n(rows), c(channels), m(hidden) {
        const double scale = 1 / std::sqrt(double(c));
        x = random_values(count(n, c), 1);
        w1 = random_values(count(m, c), 2, scale);
        dy = random_values(count(n, c), 3);
        w2 = random_values(count(c, m), 4, scale);
        h = random_values(count(n, m), 5);
        for (double& v : h) v = std::max(v, 0.0) * v;
    }
    template <class T>
    void round() {
        for (Values* v : {&x, &w1, &dy, &w2, &h}) *v = round_to<T>(*v);
    }
};

// sum_k a(i, k) b(j, k) for all i, j.
template <class A, class B>
Values product(std::int64_t rows, std::int64_t cols, std::int64_t depth, A&& a, B&& b) {
    Values r(count(rows, cols), 0.0);
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < cols; ++j)
            for (std::int64_t k = 0; k < depth; ++k) r[std::size_t(i * cols + j)] += a(i, k) * b(j, k);
    return r;
}
double activation(double u) { return std::max(u, 0.0) * std::max(u, 0.0); }
Values naive_forward(const Problem& q) {
    Values h = product(
        q.n, q.m, q.c, [&](auto i, auto k) { return q.x[std::size_t(i * q.c + k)]; },
        [&](auto j, auto k) { return q.w1[std::size_t(j * q.c + k)]; });
    for (double& v : h) v = activation(v);
    return h;
}
Values naive_backward(const Problem& q) {
    Values du = product(
        q.n, q.m, q.c, [&](auto i, auto k) { return q.dy[std::size_t(i * q.c + k)]; },
        [&](auto j, auto k) { return q.w2[std::size_t(k * q.m + j)]; });
    for (std::size_t i = 0; i < du.size(); ++i) du[i] *= 2 * std::sqrt(q.h[i]);
    return du;
}

// The operands of a problem in the memory of Dev, every matrix with columns of others after its own.
template <class T, class Dev>
struct Operands {
    Padded<T, Dev> x, w1, dy, w2, h_in, h, du;
    Operands(const Dev& dev, const Problem& q, std::int64_t pad)
        : x(dev, q.n, q.c, padded(q.c, pad), q.x),
          w1(dev, q.m, q.c, padded(q.c, pad) + pad, q.w1),
          dy(dev, q.n, q.c, padded(q.c, pad) + 2 * pad, q.dy),
          w2(dev, q.c, q.m, padded(q.m, pad), q.w2),
          h_in(dev, q.n, q.m, padded(q.m, pad) + pad, q.h),
          h(dev, q.n, q.m, padded(q.m, pad)),
          du(dev, q.n, q.m, padded(q.m, pad) + 2 * pad) {}
    static std::int64_t padded(std::int64_t cols, std::int64_t pad) {
        const std::int64_t grain = std::is_same_v<Dev, Cpu> ? 1 : 8;  // 16 bytes
        return (cols + grain - 1) / grain * grain + pad;
    }
    void poison() { h.buffer.poison(), du.buffer.poison(); }
    MlpForward<T> forward() const { return {h.mat(), x.mat(), w1.mat()}; }
    MlpBackward<T> backward() const { return {du.mat(), dy.mat(), w2.mat(), h_in.mat()}; }
};

template <class T>
Values forward(const Cpu& cpu, const Problem& q) {
    const Operands<T, Cpu> o(cpu, q, 3);
    mlp_forward(cpu, o.forward());
    return o.h.values();
}
template <class T>
Values backward(const Cpu& cpu, const Problem& q) {
    const Operands<T, Cpu> o(cpu, q, 3);
    mlp_backward(cpu, o.backward());
    return o.du.values();
}

template <class T>
class MlpCpu : public testing::Test {};
using CpuTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(MlpCpu, CpuTypes);

TYPED_TEST(MlpCpu, MatchesNaiveLoops) {
    using T = TypeParam;
    const double tolerance = std::is_same_v<T, double> ? 1e-13 : 2e-5;
    for (auto [n, c, m] : {std::array{1, 1, 1}, {1, 64, 96}, {3, 7, 5}, {17, 64, 33}, {65, 130, 70}, {300, 20, 18}}) {
        SCOPED_TRACE(testing::Message() << n << " x " << c << " x " << m);
        Problem q(n, c, m);
        q.template round<T>();
        EXPECT_TRUE(close_to(forward<T>(Cpu{}, q), naive_forward(q), tolerance));
        EXPECT_TRUE(close_to(backward<T>(Cpu{}, q), naive_backward(q), tolerance));
    }
}

TEST(Mlp, DoesNotDependOnThreads) {
    const Problem q(301, 40, 130);
    for (const int threads : {2, 3, 8}) {
        EXPECT_EQ(forward<float>(Cpu{threads}, q), forward<float>(Cpu{1}, q));
        EXPECT_EQ(backward<float>(Cpu{threads}, q), backward<float>(Cpu{1}, q));
    }
}

// y = h W2' with h from u = x I': then du is the gradient of <dy, y> with respect to u.
TEST(Mlp, GradientMatchesFiniteDifferences) {
    const Cpu cpu;
    constexpr std::int64_t n = 5, c = 3, m = 7;
    Problem q(n, c, m);
    Values u = random_values(count(n, m), 8), identity(count(m, m), 0.0);
    for (std::int64_t j = 0; j < m; ++j) identity[std::size_t(j * m + j)] = 1;
    const auto hidden = [&] {
        Values h(count(n, m));
        mlp_forward(cpu, MlpForward<double>{{h.data(), n, m}, {u.data(), n, m}, {identity.data(), m, m}});
        return h;
    };
    const auto objective = [&] {
        const Values h = hidden();
        return inner(q.dy, product(
                               n, c, m, [&](auto i, auto k) { return h[std::size_t(i * m + k)]; },
                               [&](auto j, auto k) { return q.w2[std::size_t(j * m + k)]; }));
    };
    const Values h = hidden();
    Values du(count(n, m));
    mlp_backward(cpu,
                 MlpBackward<double>{{du.data(), n, m}, {q.dy.data(), n, c}, {q.w2.data(), c, m}, {h.data(), n, m}});
    EXPECT_TRUE(gradient_matches(du, u, objective));
}

TEST(Mlp, NanIsNotHidden) {
    Problem q(3, 4, 2);
    q.x[5] = q.dy[5] = std::nan("");
    for (double& v : q.h) v = 1;
    const Values h = forward<float>(Cpu{}, q), du = backward<float>(Cpu{}, q);
    for (std::size_t i = 0; i < h.size(); ++i) {
        EXPECT_EQ(std::isnan(h[i]), i / 2 == 1) << i;
        EXPECT_EQ(std::isnan(du[i]), i / 2 == 1) << i;
    }
}

TEST(Mlp, BrokenContractThrows) {
    const Cpu cpu;
    Values a(6), b(6), d(9), e(9);
    const Mat<double> h(d.data(), 3, 3), x(a.data(), 3, 2), w1(b.data(), 3, 2), w2(b.data(), 2, 3);
    EXPECT_NO_THROW(mlp_forward(cpu, MlpForward<double>{h, x, w1}));
    EXPECT_THROW(mlp_forward(cpu, MlpForward<double>{h, x, w2}), ContractError);
    EXPECT_THROW(mlp_forward(cpu, MlpForward<double>{h.columns(0, 2), x, w1}), ContractError);
    const Mat<double> other(e.data(), 3, 3);
    EXPECT_NO_THROW(mlp_backward(cpu, MlpBackward<double>{h, x, w2, other}));
    EXPECT_THROW(mlp_backward(cpu, MlpBackward<double>{h, x, w1, other}), ContractError);
    EXPECT_THROW(mlp_backward(cpu, MlpBackward<double>{h, x, w2, other.columns(0, 2)}), ContractError);
    EXPECT_THROW(mlp_backward(cpu, MlpBackward<double>{h, x, w2, h}), ContractError);
}

#if FIEDLER_CUDA

#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif

constexpr const char* name_of(MlpPath p) { return p == MlpPath::sm90 ? "sm90" : "general"; }
bool takes(MlpPath path, std::int64_t c, std::int64_t m) {
    return path == MlpPath::general || (FIEDLER_SM90A && gpu().arch == 90 && c % 64 == 0 && c <= 768 && m % 8 == 0);
}

// What naive evaluation in the GPU's precision gives: f32 sums, then one rounding, or on the general way also one of
// the product.
struct Expected {
    Values h, du, low_h, low_du;
    Expected(const Problem& q, MlpPath path) {
        const Cpu cpu;
        h = forward<double>(cpu, q), du = backward<double>(cpu, q);
        low_h = forward<float>(cpu, q), low_du = backward<float>(cpu, q);
        if (path == MlpPath::general) {
            for (double& v : low_h) v = activation(widen(narrow<bf16>(std::sqrt(v))));
            for (std::size_t i = 0; i < low_du.size(); ++i) {
                const double gate = 2 * std::sqrt(q.h[i]);
                if (gate > 0) low_du[i] = widen(narrow<bf16>(low_du[i] / gate)) * gate;
            }
        }
        low_h = round_to<bf16>(low_h), low_du = round_to<bf16>(low_du);
    }
};

void check_on_gpu(const Problem& q, const Expected& e, Operands<bf16, Cuda>& o, MlpPath path) {
    ASSERT_EQ(mlp_by_path(gpu(), o.forward(), path), takes(path, q.c, q.m));
    ASSERT_EQ(mlp_by_path(gpu(), o.backward(), path), takes(path, q.c, q.m));
    if (!takes(path, q.c, q.m)) return;
    EXPECT_TRUE(close(o.h.values(), e.h, e.low_h));
    EXPECT_TRUE(close(o.du.values(), e.du, e.low_du));
    const std::vector<bf16> h = o.h.buffer.host(), du = o.du.buffer.host();
    o.poison();
    mlp_by_path(gpu(), o.forward(), path);
    mlp_by_path(gpu(), o.backward(), path);
    EXPECT_TRUE(identical(h.data(), o.h.buffer.host().data(), o.h.buffer.bytes())) << "two runs differ";
    EXPECT_TRUE(identical(du.data(), o.du.buffer.host().data(), o.du.buffer.bytes())) << "two runs differ";
}

using Sizes = std::vector<std::int64_t>;
void check_all(MlpPath path, const Sizes& rows, const Sizes& channels, const Sizes& hidden) {
    for (const std::int64_t n : rows)
        for (const std::int64_t c : channels)
            for (const std::int64_t m : hidden) {
                SCOPED_TRACE(testing::Message() << name_of(path) << ": " << n << " x " << c << " x " << m);
                Problem q(n, c, m);
                q.round<bf16>();
                const Expected e(q, path);
                for (const std::int64_t pad : {8, 40}) {
                    Operands<bf16, Cuda> o(gpu(), q, pad);
                    check_on_gpu(q, e, o, path);
                }
            }
}

TEST(Mlp, GpuGeneralMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all(MlpPath::general, {1, 3, 127, 128, 129}, {64, 384}, {8, 200, 1536});
    check_all(MlpPath::general, {1, 9, 130}, {7, 20, 100}, {1, 6, 33, 1029});
}
TEST(Mlp, GpuGeneralManyRows) {  // strided rows beyond the blocks of one launch, and one long row
    FIEDLER_GPU_OR_SKIP();
    check_all(MlpPath::general, {1000, 4133}, {64}, {264});
    check_all(MlpPath::general, {70001}, {8}, {12});
    Problem q(1001, 64, 48);
    q.round<bf16>();
    Operands<bf16, Cuda> o(gpu(), q, 0);
    check_on_gpu(q, Expected(q, MlpPath::general), o, MlpPath::general);
}
TEST(Mlp, GpuSm90MatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all(MlpPath::sm90, {1, 3, 63, 64, 65, 127, 128, 129}, {64, 384}, {8, 192, 200, 1536});
}
TEST(Mlp, GpuSm90EveryDepth) {  // panels of 192, 128 and 96 columns, whole and not
    FIEDLER_GPU_OR_SKIP();
    check_all(MlpPath::sm90, {129, 200}, {64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768}, {96, 520});
}
TEST(Mlp, GpuSm90ManyTilesOfABlock) {  // the ring goes round, the two warpgroups take many turns
    FIEDLER_GPU_OR_SKIP();
    check_all(MlpPath::sm90, {1000, 4133}, {384}, {1536});
    check_all(MlpPath::sm90, {2100}, {576, 768}, {520});
    check_all(MlpPath::sm90, {20001}, {64}, {520});
    check_all(MlpPath::sm90, {300}, {64}, {26000});  // more panels than multiprocessors
}
TEST(Mlp, GpuTrainingShape) {
    FIEDLER_GPU_OR_SKIP();
    for (const MlpPath path : {MlpPath::general, MlpPath::sm90}) check_all(path, {4096}, {384}, {1536});
}
TEST(Mlp, GpuTakesOtherShapesAnotherWay) {
    FIEDLER_GPU_OR_SKIP();
    check_all(MlpPath::sm90, {65}, {64}, {20});   // M not a multiple of 8
    check_all(MlpPath::sm90, {65}, {72}, {64});   // C not a multiple of 64
    check_all(MlpPath::sm90, {65}, {832}, {64});  // C too large
}
TEST(Mlp, GpuEntryPointsAgreeWithOneOfTheWays) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t n : {0, 1, 64, 2000}) {
        SCOPED_TRACE(n);
        Problem q(std::max<std::int64_t>(n, 1), 128, 256);
        q.round<bf16>();
        Operands<bf16, Cuda> o(gpu(), q, 8);
        const auto some = [&](auto p) {
            if constexpr (requires { p.x; })
                p.h = p.h.slice_rows(0, n), p.x = p.x.slice_rows(0, n);
            else
                p.du = p.du.slice_rows(0, n), p.dy = p.dy.slice_rows(0, n), p.h = p.h.slice_rows(0, n);
            return p;
        };
        mlp_forward(gpu(), some(o.forward()));
        mlp_backward(gpu(), some(o.backward()));
        const std::vector<bf16> h = o.h.buffer.host(), du = o.du.buffer.host();
        int agree = 0;
        for (const MlpPath path : {MlpPath::general, MlpPath::sm90}) {
            o.poison();
            const bool ran = mlp_by_path(gpu(), some(o.forward()), path);
            EXPECT_EQ(mlp_by_path(gpu(), some(o.backward()), path), ran);
            EXPECT_EQ(ran, n > 0 && takes(path, q.c, q.m));
            agree += bool(identical(h.data(), o.h.buffer.host().data(), o.h.buffer.bytes())) &&
                     bool(identical(du.data(), o.du.buffer.host().data(), o.du.buffer.bytes()));
        }
        EXPECT_GE(agree, 1);
    }
}
TEST(Mlp, GpuNanIsNotHidden) {
    FIEDLER_GPU_OR_SKIP();
    for (const MlpPath path : {MlpPath::general, MlpPath::sm90}) {
        if (!takes(path, 64, 264)) continue;
        SCOPED_TRACE(name_of(path));
        Problem q(130, 64, 264);
        for (double& v : q.h) v = 1;
        q.x[std::size_t(67 * 64 + 63)] = q.dy[std::size_t(67 * 64 + 63)] = std::nan("");
        q.h[std::size_t(5 * 264 + 7)] = std::nan("");
        Operands<bf16, Cuda> o(gpu(), q, 8);
        ASSERT_TRUE(mlp_by_path(gpu(), o.forward(), path));
        ASSERT_TRUE(mlp_by_path(gpu(), o.backward(), path));
        const Values h = o.h.values(), du = o.du.values();
        for (std::size_t i = 0; i < h.size(); ++i) {
            ASSERT_EQ(std::isnan(h[i]), i / 264 == 67) << i;
            ASSERT_EQ(std::isnan(du[i]), i / 264 == 67 || i == 5 * 264 + 7) << i;
        }
    }
}
TEST(Mlp, GpuIsRecordedInAGraph) {  // a launch of the recording computes what lies in memory by then
    FIEDLER_GPU_OR_SKIP();
    Problem q(2000, 128, 256);
    q.round<bf16>();
    Operands<bf16, Cuda> o(gpu(), q, 8);
    const auto both = [&] {
        mlp_forward(gpu(), o.forward());
        mlp_backward(gpu(), o.backward());
    };
    both();  // what is chosen at the first call
    const std::vector<bf16> h = o.h.buffer.host(), du = o.du.buffer.host();
    o.poison();
    CudaGraph* const graph = graph_record(gpu(), both);
    graph_launch(gpu(), graph);
    EXPECT_TRUE(identical(h.data(), o.h.buffer.host().data(), o.h.buffer.bytes()));
    EXPECT_TRUE(identical(du.data(), o.du.buffer.host().data(), o.du.buffer.bytes()));
    graph_free(graph);
}
TEST(Mlp, GpuMisalignedThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q(4, 64, 16);
    Operands<bf16, Cuda> o(gpu(), q, 8);
    MlpForward<bf16> f = o.forward();
    ++f.h.data;
    EXPECT_THROW(mlp_forward(gpu(), f), ContractError);
    MlpBackward<bf16> b = o.backward();
    b.h.ld -= 1;
    EXPECT_THROW(mlp_backward(gpu(), b), ContractError);
}

#endif

}  // namespace
}  // namespace fiedler::test
