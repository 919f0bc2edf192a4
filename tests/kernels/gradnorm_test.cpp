// gradnorm: closed forms, the cases in which a step must be skipped, and the GPU against the same.
#include "kernels/gradnorm.h"

#include <cstddef>
#include <limits>

#include "tests/support/buffer.h"

namespace fiedler::test {
namespace {

constexpr std::int64_t kSizes[] = {1, 3, 255, 256, 257, 1023, 4097, 100003, 1100003};
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Limits {
    double unscale = 1, max_norm = 0, skip_above = kInfinity;
};

template <class A, class Dev>
StepControl<A> run(const Dev& dev, const Values& grads, const Limits& limits, std::int64_t partials) {
    Buffer<A, Dev> g(dev, to<A>(grads)), scratch(dev, static_cast<std::size_t>(partials));
    const StepControl<A> before{A(7), A(8), A(9), A(10), A(limits.max_norm), A(limits.skip_above), A(11)};
    Buffer<StepControl<A>, Dev> control(dev, std::vector<StepControl<A>>{before});
    Gradnorm<A> p;
    p.control = control.data();
    p.grads = g.vec();
    p.partials = scratch.vec();
    p.unscale = A(limits.unscale);
    gradnorm(dev, p);
    const StepControl<A> first = control.host()[0];
    scratch.poison();
    gradnorm(dev, p);
    const StepControl<A> second = control.host()[0];
    constexpr std::size_t kFields = offsetof(StepControl<A>, decay) + sizeof(A);  // what follows is padding
    EXPECT_TRUE(identical(&first, &second, kFields));
    EXPECT_EQ(first.loss, A(7)) << "loss is not gradnorm's";
    EXPECT_TRUE(identical(&first.max_norm, &before.max_norm, kFields - offsetof(StepControl<A>, max_norm)))
        << "what the host wrote";
    return first;
}

double norm_of(const Values& g, double unscale) {
    double sum = 0;
    for (const double x : g) sum += unscale * x * unscale * x;
    return std::sqrt(sum);
}
float naive_norm(const Values& g, float unscale) {
    float sum = 0;
    for (const double x : g) sum += (unscale * float(x)) * (unscale * float(x));
    return std::sqrt(sum);
}

// Norms and scales of all sizes, relative to the reference, so that one computed tolerance holds for all of them.
template <class A, class Dev>
void check_sizes(const Dev& dev, std::int64_t partials, double ulp) {
    Values got, low;
    for (const std::int64_t n : kSizes) {
        const Values g = round_to<float>(random_values(static_cast<std::size_t>(n), 11, 3.0));
        const double unscale = 0.125, norm = norm_of(g, unscale);
        const auto plain = run<A>(dev, g, {unscale, 0, kInfinity}, partials);
        const auto loose = run<A>(dev, g, {unscale, 2 * norm, 2 * norm}, partials);
        const auto tight = run<A>(dev, g, {unscale, norm / 4, norm / 2}, partials);
        EXPECT_EQ(plain.skip, A(0));
        EXPECT_EQ(loose.skip, A(0));
        EXPECT_NE(tight.skip, A(0));
        EXPECT_EQ(plain.scale, A(unscale));
        EXPECT_EQ(loose.scale, A(unscale));
        for (const double x : {double(plain.norm) / norm, double(tight.scale) / (unscale / 4)}) got.push_back(x);
        const double naive = naive_norm(g, float(unscale));
        for (const double x : {naive / norm, norm / naive}) low.push_back(x);
    }
    EXPECT_TRUE(close(got, Values(got.size(), 1.0), low, ulp));
}

template <class A, class Dev>
void check_hostile(const Dev& dev, std::int64_t partials) {
    for (const std::int64_t n : {std::int64_t(1), std::int64_t(257), std::int64_t(100003)}) {
        Values g(static_cast<std::size_t>(n), 0.0);
        const auto zero = run<A>(dev, g, {0.5, 1, kInfinity}, partials);
        EXPECT_EQ(zero.norm, A(0));
        EXPECT_EQ(zero.scale, A(0.5));
        EXPECT_EQ(zero.skip, A(0));
        const double huge = double(std::numeric_limits<A>::max());  // finite, but its square is not
        for (const double bad : {kNaN, kInfinity, -kInfinity, huge})
            for (const std::int64_t at : {std::int64_t(0), n / 2, n - 1}) {
                g[static_cast<std::size_t>(at)] = bad;
                const auto c = run<A>(dev, g, {1, 1, kInfinity}, partials);
                EXPECT_NE(c.skip, A(0)) << bad << " at " << at << " of " << n;
                EXPECT_EQ(c.scale, A(0)) << bad << " at " << at << " of " << n;
                EXPECT_FALSE(std::isfinite(c.norm));
                g[static_cast<std::size_t>(at)] = 0;
            }
    }
}

TEST(Gradnorm, ClosedForms) {
    const auto c = run<double>(Cpu{}, {3, -4}, {2, 5, kInfinity}, 1);
    EXPECT_DOUBLE_EQ(c.norm, 10);
    EXPECT_DOUBLE_EQ(c.scale, 1);
    EXPECT_EQ(c.skip, 0);
}
TEST(Gradnorm, DoubleAtAllSizes) { check_sizes<double>(Cpu{}, 1, 1e-14); }
TEST(Gradnorm, FloatAtAllSizes) { check_sizes<float>(Cpu{}, 1, 1.2e-7); }
TEST(Gradnorm, HostileGradients) {
    check_hostile<double>(Cpu{}, 1);
    check_hostile<float>(Cpu{}, 1);
}
TEST(Gradnorm, ThreadsDoNotMatter) {
    const Values g = random_values(100003, 5);
    const auto one = run<float>(Cpu{1}, g, {}, 1), three = run<float>(Cpu{3}, g, {}, 1);
    EXPECT_TRUE(identical(&one, &three, offsetof(StepControl<float>, max_norm)));
}

#if FIEDLER_CUDA
TEST(Gradnorm, GpuAtAllSizes) {
    FIEDLER_GPU_OR_SKIP();
    check_sizes<float>(gpu(), kGradnormPartials, 1.2e-7);
}
TEST(Gradnorm, GpuHostileGradients) {
    FIEDLER_GPU_OR_SKIP();
    check_hostile<float>(gpu(), kGradnormPartials);
}
#endif

}  // namespace
}  // namespace fiedler::test
