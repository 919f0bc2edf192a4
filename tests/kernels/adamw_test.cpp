// adamw: several steps against the formula written out in double, the decay boundary, skipped steps, rounded weights.
#include "kernels/adamw.h"

#include <limits>

#include "tests/support/buffer.h"

namespace fiedler::test {
namespace {

constexpr std::int64_t kSizes[] = {1, 3, 255, 256, 257, 1026, 100003};
constexpr int kSteps = 4;
constexpr int kSkipped = 2;  // this step is skipped

// Representable in float (but for the bias corrections, whose rounding is part of what `low` measures).
struct Settings {
    double lr = 0.03125, beta1 = float(0.9), beta2 = float(0.95), eps = float(1e-8), decay = 0.125, scale = 0.5;
    std::int64_t decay_count = 0;
    double bias1(int step) const { return 1 - std::pow(beta1, step + 1); }
    double bias2(int step) const { return 1 - std::pow(beta2, step + 1); }
};

struct State {
    Values master, m, v;
    explicit State(std::size_t n)
        : master(round_to<float>(random_values(n, 1))),
          m(round_to<float>(random_values(n, 2, 0.1))),
          v(round_to<float>(random_uniform(n, 3, 0, 0.1))) {}
};
Values gradients(std::size_t n, int step) { return round_to<float>(random_values(n, 100 + std::uint64_t(step))); }

// The formula of the contract, in precision A.
template <class A>
State naive(std::size_t n, const Settings& s) {
    State state(n);
    for (int step = 0; step < kSteps; ++step) {
        if (step == kSkipped) continue;
        const Values grad = gradients(n, step);
        for (std::size_t i = 0; i < n; ++i) {
            const A g = A(s.scale) * A(grad[i]), decay = std::int64_t(i) < s.decay_count ? A(s.decay) : A(0);
            const A m = A(s.beta1) * A(state.m[i]) + (1 - A(s.beta1)) * g;
            const A v = A(s.beta2) * A(state.v[i]) + (1 - A(s.beta2)) * g * g;
            const A w = A(state.master[i]), m_hat = m / A(s.bias1(step)), v_hat = v / A(s.bias2(step));
            state.m[i] = double(m);
            state.v[i] = double(v);
            state.master[i] = double(A(w - A(s.lr) * (m_hat / (std::sqrt(v_hat) + A(s.eps)) + decay * w)));
        }
    }
    return state;
}

template <class T>
constexpr bool kSeparateWeights = !std::is_same_v<T, acc_t<T>>;

template <class T, class Dev>
State run(const Dev& dev, std::size_t n, const Settings& s) {
    using A = acc_t<T>;
    State state(n);
    Buffer<A, Dev> master(dev, to<A>(state.master)), m(dev, to<A>(state.m)), v(dev, to<A>(state.v)), grads(dev, n);
    Buffer<T, Dev> weights(dev, n);
    Adamw<T> p;
    p.master = master.vec(), p.m = m.vec(), p.v = v.vec(), p.grads = grads.vec();
    if constexpr (kSeparateWeights<T>) p.weights = weights.vec();
    p.decay_count = s.decay_count;
    for (int step = 0; step < kSteps; ++step) {
        const bool skip = step == kSkipped;
        auto grad = to<A>(gradients(n, step));
        if (skip) grad[n / 2] = std::numeric_limits<A>::quiet_NaN();
        copy_to_device(dev, grads.data(), grad.data(), grads.bytes());
        StepControl<A> c{.norm = A(1), .scale = skip ? A(0) : A(s.scale), .skip = A(skip)};
        c.inverse1 = 1 / A(s.bias1(step)), c.inverse2 = 1 / A(s.bias2(step));
        c.lr = A(s.lr), c.beta1 = A(s.beta1), c.beta2 = A(s.beta2), c.eps = A(s.eps), c.decay = A(s.decay);
        const Buffer<StepControl<A>, Dev> control(dev, std::vector<StepControl<A>>{c});
        p.control = control.data();
        const auto before = master.host();
        weights.poison();
        adamw(dev, p);
        const auto after = master.host();
        const std::vector<A> cleared = grads.host();
        for (const A g : cleared) EXPECT_EQ(g, A(0));
        EXPECT_TRUE(!skip || identical(before.data(), after.data(), n * sizeof(A)));
        if constexpr (kSeparateWeights<T>) {
            const auto rounded = weights.host();
            std::vector<T> expected = to<T>(from(after));
            for (T& w : expected)
                if (skip) w.bits = 0xffff;  // left alone: still poisoned
            EXPECT_TRUE(identical(rounded.data(), expected.data(), n * sizeof(T)));
        }
    }
    state.master = master.values(), state.m = m.values(), state.v = v.values();
    return state;
}

template <class T, class Dev>
void check_sizes(const Dev& dev, double ulp) {
    for (const std::int64_t n : kSizes) {
        for (const std::int64_t decayed : {std::int64_t(0), n / 2 + 1, n - 1, n}) {
            Settings s;
            s.decay_count = std::min(decayed, n);
            const auto size = static_cast<std::size_t>(n);
            const State ref = naive<double>(size, s), low = naive<acc_t<T>>(size, s), got = run<T>(dev, size, s);
            EXPECT_TRUE(close(got.master, ref.master, low.master, ulp)) << n << " decayed " << s.decay_count;
            EXPECT_TRUE(close(got.m, ref.m, low.m, ulp)) << n;
            EXPECT_TRUE(close(got.v, ref.v, low.v, ulp)) << n;
        }
    }
}

TEST(Adamw, DoubleMatchesTheFormula) { check_sizes<double>(Cpu{}, 1e-15); }
TEST(Adamw, FloatMatchesTheFormula) { check_sizes<float>(Cpu{}, 1.2e-7); }
TEST(Adamw, FirstStepIsTheSignOfTheGradient) {  // m / bias1 = g and v / bias2 = g^2 after one step from zero
    double w[2] = {1, 1}, m[2] = {}, v[2] = {}, g[2] = {3, -1e-3};
    StepControl<double> control;
    Adamw<double> p;
    p.master = {w, 2}, p.m = {m, 2}, p.v = {v, 2}, p.grads = {g, 2};
    p.control = &control;
    control.lr = 0.25, control.eps = 1e-300;
    control.inverse1 = 1 / (1 - control.beta1), control.inverse2 = 1 / (1 - control.beta2);
    adamw(Cpu{}, p);
    EXPECT_NEAR(w[0], 0.75, 1e-15);
    EXPECT_NEAR(w[1], 1.25, 1e-15);
}
TEST(Adamw, ZeroGradientsAndMomentsStayFinite) {
    float w[2] = {1, 1}, m[2] = {}, v[2] = {}, g[2] = {};
    StepControl<float> control;
    Adamw<float> p;
    p.master = {w, 2}, p.m = {m, 2}, p.v = {v, 2}, p.grads = {g, 2};
    p.control = &control;
    control.lr = 0.5f, control.decay = 0.5f, p.decay_count = 1;
    adamw(Cpu{}, p);
    EXPECT_EQ(w[0], 0.75f);
    EXPECT_EQ(w[1], 1.f);
}

#if FIEDLER_CUDA
TEST(Adamw, GpuMatchesTheFormula) {
    FIEDLER_GPU_OR_SKIP();
    check_sizes<bf16>(gpu(), 1.2e-7);
}
TEST(Adamw, GpuRunsAreBitEqual) {
    FIEDLER_GPU_OR_SKIP();
    Settings s;
    s.decay_count = 501;
    const State a = run<bf16>(gpu(), 1026, s), b = run<bf16>(gpu(), 1026, s);
    EXPECT_TRUE(identical(a.master.data(), b.master.data(), 1026 * sizeof(double)));
    EXPECT_TRUE(identical(a.v.data(), b.v.data(), 1026 * sizeof(double)));
}
TEST(Adamw, GpuCastRoundsToNearestEven) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t n : kSizes) {
        Values v = random_values(static_cast<std::size_t>(n), 9, 10.0);
        const double special[] = {1 + 0x1p-8, 1 + 3 * 0x1p-8, -1 - 0x1p-8, 0x1p-140, double(INFINITY), 3.4e38};
        for (std::size_t i = 0; i < std::size(special) && i < v.size(); ++i) v[i] = special[i];
        const Buffer<float, Cuda> master(gpu(), to<float>(v));
        Buffer<bf16, Cuda> weights(gpu(), v.size());
        cast_weights(gpu(), {weights.vec(), master.vec()});
        const auto got = weights.host(), expected = to<bf16>(round_to<float>(v));
        EXPECT_TRUE(identical(got.data(), expected.data(), got.size() * sizeof(bf16))) << n;
    }
}
#endif

}  // namespace
}  // namespace fiedler::test
