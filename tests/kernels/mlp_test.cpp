// mlp: ReLU^2 by its definition, finite differences, and the GPU at sizes around its packs and blocks.
#include "kernels/mlp.h"

#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

Values naive_forward(const Values& u) {
    Values h(u.size());
    for (std::size_t i = 0; i < u.size(); ++i) h[i] = std::max(u[i], 0.0) * std::max(u[i], 0.0);
    return h;
}
Values naive_backward(const Values& u, const Values& dh) {
    Values du(u.size());
    for (std::size_t i = 0; i < u.size(); ++i) du[i] = 2 * dh[i] * std::max(u[i], 0.0);
    return du;
}

template <class T, class Dev>
Values forward(const Dev& dev, const Values& u) {
    const Buffer<T, Dev> in(dev, to<T>(u)), out(dev, u.size());
    mlp_forward(dev, MlpForward<T>{out.vec(), in.vec()});
    return out.values();
}
template <class T, class Dev>
Values backward(const Dev& dev, const Values& u, const Values& dh) {
    const Buffer<T, Dev> in(dev, to<T>(u)), upstream(dev, to<T>(dh)), out(dev, u.size());
    mlp_backward(dev, MlpBackward<T>{out.vec(), upstream.vec(), in.vec()});
    return out.values();
}

template <class T>
class MlpCpu : public testing::Test {};
using CpuTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(MlpCpu, CpuTypes);

TYPED_TEST(MlpCpu, MatchesTheDefinition) {
    using T = TypeParam;
    const Cpu cpu;
    for (const std::size_t n : {1u, 3u, 7u, 16383u, 16384u, 16385u, 100000u}) {
        SCOPED_TRACE(n);
        const Values u = round_to<T>(random_values(n, 1)), dh = round_to<T>(random_values(n, 2));
        const double tolerance = std::is_same_v<T, double> ? 1e-15 : 3e-7;
        EXPECT_TRUE(close_to(forward<T>(cpu, u), naive_forward(u), tolerance));
        EXPECT_TRUE(close_to(backward<T>(cpu, u, dh), naive_backward(u, dh), tolerance));
    }
}

TEST(Mlp, GradientMatchesFiniteDifferences) {
    const Cpu cpu;
    Values u = random_values(50, 3);
    const Values dh = random_values(50, 4);
    const Values du = backward<double>(cpu, u, dh);
    EXPECT_TRUE(gradient_matches(du, u, [&] { return inner(dh, forward<double>(cpu, u)); }));
}

TEST(Mlp, InPlaceAndAfterTheReluGiveTheSameNumbers) {
    const Cpu cpu;
    const Values u = random_values(1001, 5), dh = random_values(1001, 6);
    Values positive = u, h = u, du = dh;
    for (double& v : positive) v = std::max(v, 0.0);
    EXPECT_EQ(forward<double>(cpu, positive), forward<double>(cpu, u));
    EXPECT_EQ(backward<double>(cpu, positive, dh), backward<double>(cpu, u, dh));
    const Vec<double> in_h(h.data(), 1001), in_du(du.data(), 1001);
    mlp_forward(cpu, MlpForward<double>{in_h, in_h});
    mlp_backward(cpu, MlpBackward<double>{in_du, in_du, {u.data(), 1001}});
    EXPECT_EQ(h, forward<double>(cpu, u));
    EXPECT_EQ(du, backward<double>(cpu, u, dh));
}

TEST(Mlp, NanIsNotHiddenByRelu) {
    const Cpu cpu;
    const Values u{1.0, std::nan(""), -1.0}, dh{1.0, 1.0, 1.0};
    EXPECT_TRUE(std::isnan(forward<float>(cpu, u)[1]));
    EXPECT_TRUE(std::isnan(backward<float>(cpu, u, dh)[1]));
    EXPECT_EQ(forward<float>(cpu, u)[2], 0.0);
}

TEST(Mlp, BrokenContractThrows) {
    Values u(4), h(3);
    EXPECT_THROW(mlp_forward(Cpu{}, MlpForward<double>{{h.data(), 3}, {u.data(), 4}}), ContractError);
}

#if FIEDLER_CUDA
TEST(Mlp, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::size_t n : {1u, 3u, 7u, 8u, 9u, 63u, 64u, 65u, 8191u, 8192u, 8193u, 65538u, 1572864u}) {
        SCOPED_TRACE(n);
        const Values u = round_to<bf16>(random_values(n, 1)), dh = round_to<bf16>(random_values(n, 2));
        EXPECT_TRUE(close(forward<bf16>(gpu(), u), naive_forward(u), round_to<bf16>(forward<float>(Cpu{}, u))));
        EXPECT_TRUE(
            close(backward<bf16>(gpu(), u, dh), naive_backward(u, dh), round_to<bf16>(backward<float>(Cpu{}, u, dh))));
    }
}

TEST(Mlp, GpuInPlaceGivesTheSameBits) {
    FIEDLER_GPU_OR_SKIP();
    const Values u = round_to<bf16>(random_values(20003, 7)), dh = round_to<bf16>(random_values(20003, 8));
    const Buffer<bf16, Cuda> in(gpu(), u), h(gpu(), u), du(gpu(), dh);
    mlp_forward(gpu(), MlpForward<bf16>{h.vec(), h.vec()});
    mlp_backward(gpu(), MlpBackward<bf16>{du.vec(), du.vec(), in.vec()});
    EXPECT_EQ(h.values(), forward<bf16>(gpu(), u));
    EXPECT_EQ(du.values(), backward<bf16>(gpu(), u, dh));
}

TEST(Mlp, GpuNanIsNotHiddenByRelu) {
    FIEDLER_GPU_OR_SKIP();
    Values u(11, 1.0);
    const Values dh(11, 1.0);
    u[2] = u[10] = std::nan("");  // in a pack and in the tail
    const Values h = forward<bf16>(gpu(), u), du = backward<bf16>(gpu(), u, dh);
    for (std::size_t i = 0; i < 11; ++i) {
        EXPECT_EQ(std::isnan(h[i]), std::isnan(u[i])) << i;
        EXPECT_EQ(std::isnan(du[i]), std::isnan(u[i])) << i;
    }
}
#endif

}  // namespace
}  // namespace fiedler::test
