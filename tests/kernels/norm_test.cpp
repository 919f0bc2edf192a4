// norm: the formula in naive loops, finite differences, and the GPU at every width of its dispatch.
#include "kernels/norm.h"

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

enum class Alias { none, dresidual, dy };

struct Problem {
    std::int64_t rows, cols;
    Values x, dy, dresidual;
    double eps = 1e-6;

    Problem(std::int64_t r, std::int64_t c) : rows(r), cols(c) {
        const auto n = std::size_t(r * c);
        x = random_values(n, 1, 3.0);
        dy = random_values(n, 2);
        dresidual = random_values(n, 3);
    }
    template <class T>
    Problem& round() {
        for (Values* v : {&x, &dy, &dresidual}) *v = round_to<T>(*v);
        eps = widen(acc_t<T>(eps));
        return *this;
    }
    double mean_of_products(const Values& a, const Values& b, std::int64_t i) const {
        double s = 0;
        for (std::int64_t c = 0; c < cols; ++c) s += a[std::size_t(i * cols + c)] * b[std::size_t(i * cols + c)];
        return s / double(cols);
    }
    Values naive_rstd() const {
        Values r;
        for (std::int64_t i = 0; i < rows; ++i) r.push_back(1 / std::sqrt(mean_of_products(x, x, i) + eps));
        return r;
    }
    Values naive_forward() const {
        const Values r = naive_rstd();
        Values y(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] * r[i / std::size_t(cols)];
        return y;
    }
    Values naive_backward(const Values& r, bool residual) const {
        Values dx(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) {
            const auto row = i / std::size_t(cols);
            const double m = mean_of_products(dy, x, std::int64_t(row));
            dx[i] = (residual ? dresidual[i] : 0.0) + r[row] * (dy[i] - x[i] * r[row] * r[row] * m);
        }
        return dx;
    }
};

struct Forward {
    Values y, rstd;
};
template <class T, class Dev>
Forward forward(const Dev& dev, const Problem& q, std::int64_t gap = 0) {
    const Padded<T, Dev> x(dev, q.rows, q.cols, q.cols + gap, q.x), y(dev, q.rows, q.cols, q.cols + 2 * gap);
    const Buffer<acc_t<T>, Dev> rstd(dev, std::size_t(q.rows));
    norm_forward(dev, NormForward<T>{y.mat(), rstd.vec(), x.mat(), acc_t<T>(q.eps)});
    return {y.values(), rstd.values()};
}
template <class T, class Dev>
Values backward(const Dev& dev, const Problem& q, const Values& rstd, bool residual, Alias alias,
                std::int64_t gap = 0) {
    const Padded<T, Dev> x(dev, q.rows, q.cols, q.cols + gap, q.x), dy(dev, q.rows, q.cols, q.cols + 2 * gap, q.dy),
        dresidual(dev, q.rows, q.cols, q.cols + 3 * gap, q.dresidual), out(dev, q.rows, q.cols, q.cols + gap);
    const Buffer<acc_t<T>, Dev> r(dev, to<acc_t<T>>(rstd));
    const Padded<T, Dev>& dx = alias == Alias::dy ? dy : alias == Alias::dresidual ? dresidual : out;
    NormBackward<T> p{dx.mat(), dy.mat(), x.mat(), r.vec(), {}};
    if (residual) p.dresidual = dresidual.mat();
    norm_backward(dev, p);
    return dx.values();
}

TEST(Norm, DoubleMatchesNaiveLoopsAndFloatFollows) {
    const Cpu cpu;
    for (const auto& [rows, cols] :
         {std::pair{1, 1}, {3, 7}, {7, 8}, {5, 15}, {5, 17}, {65, 64}, {514, 384}, {3, 2056}}) {
        SCOPED_TRACE(cols);
        const Problem q = Problem(rows, cols).round<float>();
        const Forward d = forward<double>(cpu, q, 3), f = forward<float>(cpu, q, 3);
        EXPECT_TRUE(close_to(d.rstd, q.naive_rstd(), 1e-14));
        EXPECT_TRUE(close_to(d.y, q.naive_forward(), 1e-14));
        EXPECT_TRUE(close_to(f.rstd, d.rstd, 1e-6));
        EXPECT_TRUE(close_to(f.y, d.y, 1e-6));
        for (const bool residual : {false, true}) {
            const Values ref = q.naive_backward(d.rstd, residual);
            // One column: dy - x r^2 dy x is a difference of equals, up to eps.
            EXPECT_TRUE(
                close_to(backward<double>(cpu, q, d.rstd, residual, Alias::none, 3), ref, cols > 1 ? 1e-13 : 1e-6));
            if (cols > 1) {
                EXPECT_TRUE(close_to(backward<float>(cpu, q, f.rstd, residual, Alias::none, 3), ref, 3e-6));
            }
        }
    }
}

TEST(Norm, OutputMayTakeThePlaceOfAnInput) {
    const Problem q(7, 40);
    const Values rstd = q.naive_rstd();
    const Values apart = backward<double>(Cpu{}, q, rstd, true, Alias::none);
    EXPECT_EQ(backward<double>(Cpu{}, q, rstd, true, Alias::dresidual), apart);
    EXPECT_EQ(backward<double>(Cpu{}, q, rstd, true, Alias::dy), apart);
}

TEST(Norm, GradientMatchesFiniteDifferences) {
    const Cpu cpu;
    Problem q(3, 9);
    q.eps = 0.3;  // large enough to be seen
    const Values dx = backward<double>(cpu, q, forward<double>(cpu, q).rstd, false, Alias::none);
    EXPECT_TRUE(gradient_matches(dx, q.x, [&] { return inner(q.dy, forward<double>(cpu, q).y); }));
}

TEST(Norm, DoesNotDependOnThreads) {
    const Problem q(301, 384);
    const Forward one = forward<float>(Cpu{1}, q), many = forward<float>(Cpu{5}, q);
    EXPECT_EQ(one.y, many.y);
    EXPECT_EQ(one.rstd, many.rstd);
}

TEST(Norm, RowOfZerosStaysFinite) {
    Problem q(2, 16);
    q.x.assign(q.x.size(), 0.0);
    const Forward f = forward<float>(Cpu{}, q);
    EXPECT_EQ(f.y, Values(32, 0.0));
    EXPECT_TRUE(close_to(f.rstd, Values(2, 1000.0), 1e-6));
}

TEST(Norm, BrokenContractThrows) {
    Values x(6), y(6), r(3);
    EXPECT_THROW(norm_forward(Cpu{}, NormForward<double>{{y.data(), 3, 2}, {r.data(), 2}, {x.data(), 3, 2}}),
                 ContractError);
}

#if FIEDLER_CUDA
// Every width of the dispatch, at its ends, and rows around the rows of a block.
const std::vector<std::pair<int, int>> kGpuShapes = {
    {1, 8},    {3, 16},    {7, 64},    {15, 128}, {16, 136}, {17, 256}, {63, 264}, {64, 384},
    {65, 384}, {514, 384}, {1024, 64}, {31, 392}, {33, 512}, {7, 520},  {9, 768},  {8, 776},
    {3, 1024}, {5, 1032},  {7, 1536},  {9, 1544}, {8, 2048}, {1, 2056}, {7, 2056}, {3, 4104}};

TEST(Norm, GpuForwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [rows, cols] : kGpuShapes)
        for (const int gap : {0, 8}) {
            SCOPED_TRACE(testing::Message() << rows << " x " << cols << ", gap " << gap);
            const Problem q = Problem(rows, cols).round<bf16>();
            const Forward ref = forward<double>(Cpu{}, q), low = forward<float>(Cpu{}, q),
                          got = forward<bf16>(gpu(), q, gap), again = forward<bf16>(gpu(), q, gap);
            EXPECT_TRUE(close(got.y, ref.y, round_to<bf16>(low.y)));
            EXPECT_TRUE(close(got.rstd, ref.rstd, low.rstd));
            EXPECT_EQ(got.y, again.y);
            EXPECT_EQ(got.rstd, again.rstd);
        }
}

TEST(Norm, GpuBackwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [rows, cols] : kGpuShapes) {
        const Problem q = Problem(rows, cols).round<bf16>();
        const Values rstd = round_to<float>(forward<double>(Cpu{}, q).rstd);
        for (const bool residual : {false, true})
            for (const Alias alias : {Alias::none, Alias::dresidual, Alias::dy}) {
                if (!residual && alias == Alias::dresidual) continue;
                const int gap = alias == Alias::none ? 8 : 0;
                SCOPED_TRACE(testing::Message() << rows << " x " << cols << ", alias " << int(alias));
                const Values ref = backward<double>(Cpu{}, q, rstd, residual, Alias::none),
                             low = round_to<bf16>(backward<float>(Cpu{}, q, rstd, residual, Alias::none)),
                             got = backward<bf16>(gpu(), q, rstd, residual, alias, gap);
                EXPECT_TRUE(close(got, ref, low));
                EXPECT_EQ(got, backward<bf16>(gpu(), q, rstd, residual, alias, gap));
            }
    }
}

TEST(Norm, GpuNanStaysInItsRow) {
    FIEDLER_GPU_OR_SKIP();
    for (const int cols : {64, 384, 1024, 2056}) {
        Problem q(5, cols);
        q.x[std::size_t(3 * cols - 1)] = std::nan("");  // row 2
        const Values y = forward<bf16>(gpu(), q).y;
        for (int i = 0; i < 5; ++i)
            for (int c = 0; c < cols; ++c)
                ASSERT_EQ(std::isnan(y[std::size_t(i * cols + c)]), i == 2) << i << ", " << c;
    }
}

TEST(Norm, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<bf16, Cuda> x(gpu(), 64), y(gpu(), 64);
    const Buffer<float, Cuda> r(gpu(), 2);
    const auto run = [&](std::int64_t cols, std::int64_t ld) {
        norm_forward(gpu(), NormForward<bf16>{{y.data(), 2, cols, ld}, r.vec(), {x.data(), 2, cols, ld}});
    };
    EXPECT_THROW(run(12, 16), ContractError);
    EXPECT_THROW(run(16, 20), ContractError);
    EXPECT_NO_THROW(run(16, 24));
}
#endif

}  // namespace
}  // namespace fiedler::test
