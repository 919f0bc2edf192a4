// energy: closed forms on the path graph, naive loops, finite differences, and the GPU against the double reference.
#include "tests/kernels/energy_problem.h"

namespace fiedler::test {
namespace {
using namespace energy_problem;

template <class T>
void check_cpu(double ulp) {
    for (const int dim : kDims)
        for (const int scalars : kScalars)
            check_sizes<T>(Cpu{}, Graph(dim), 6, scalars, {1, 3, 7, dim == 64 ? 129 : 20}, ulp);
    check_sizes<T>(Cpu{}, Graph(30), 5, 3, {1, 11, 64}, ulp);  // neither a power of two nor a multiple of four
    check_sizes<T>(Cpu{}, Graph(7), 1, 1, {1, 40}, ulp);
    check_sizes<T>(Cpu{}, Graph(64, true), 2, 1, {3, 30}, ulp);
}

TEST(Energy, DoubleMatchesNaiveLoops) { check_cpu<double>(1e-14); }
TEST(Energy, FloatMatchesDouble) { check_cpu<float>(1.2e-7); }

TEST(Energy, EigenvectorsOfThePathHaveTheirEigenvalues) {
    for (const int dim : {7, 16, 64}) {
        Problem p(Graph(dim), dim, 1, 1);
        p.x = p.graph.eigenvectors;
        p.eps = 0;
        EXPECT_TRUE(close_to(run<double>(Cpu{}, p).energy, p.graph.eigenvalues, 1e-14));
    }
}
TEST(Energy, BandsSumToTheFullEnergy) {
    for (const int scalars : {2, 4, 8, 16}) {
        const Problem one(Graph(64), 20, 3, 1), bands(Graph(64), 20, 3, scalars);
        const Values all = run<double>(Cpu{}, bands).energy;
        Values sum(all.size() / std::size_t(scalars), 0.0);
        for (std::size_t i = 0; i < all.size(); ++i) sum[i / std::size_t(scalars)] += all[i];
        EXPECT_TRUE(close_to(sum, run<double>(Cpu{}, one).energy, 1e-13));
    }
}
TEST(Energy, DoesNotDependOnScale) {
    for (const int scalars : {1, 4}) {
        Problem p(Graph(32), 9, 2, scalars);
        p.eps = 0;
        const Result before = run<double>(Cpu{}, p);
        for (double& x : p.x) x *= 1e3;
        Result after = run<double>(Cpu{}, p);
        for (double& v : after.dx) v *= 1e3;
        EXPECT_TRUE(close_to(after.a, before.a, 1e-13));
        EXPECT_TRUE(close_to(after.dx, before.dx, 1e-12));
    }
}
TEST(Energy, GradientsMatchFiniteDifferences) {
    for (const int scalars : {1, 2, 4, 8, 16}) {
        Problem p(Graph(16), 5, 3, scalars);
        std::fill(p.dtau0.begin(), p.dtau0.end(), 0);
        std::fill(p.dtemp0.begin(), p.dtemp0.end(), 0);
        const Result analytic = run<double>(Cpu{}, p);
        const auto objective = [&] { return inner(p.da, run<double>(Cpu{}, p).a); };
        EXPECT_TRUE(gradient_matches(analytic.dx, p.x, objective)) << "R " << scalars;
        EXPECT_TRUE(gradient_matches(analytic.dtau, p.log_tau, objective)) << "R " << scalars;
        EXPECT_TRUE(gradient_matches(analytic.dtemp, p.log_temp, objective)) << "R " << scalars;
    }
}
TEST(Energy, ConstantAndZeroVectorsHaveNoEnergy) {
    for (const int scalars : {1, 8}) {
        Problem p(Graph(64), 4, 1, scalars);
        std::fill(p.x.begin(), p.x.end(), 0);
        std::fill(p.x.begin(), p.x.begin() + 64, 0.3);
        const Result r = run<float>(Cpu{}, p);
        for (const double v : r.a) EXPECT_NEAR(v, 0, 1e-5);
        for (const double v : r.energy) EXPECT_GE(v, 0);
        for (const double v : r.dx) EXPECT_NEAR(v, 0, 1e-3);
    }
}
TEST(Energy, ANaNIsNotHidden) {
    for (const int scalars : {1, 8}) {
        Problem p(Graph(64), 2, 1, scalars);
        p.x[5] = std::nan("");
        const Result r = run<float>(Cpu{}, p);
        EXPECT_TRUE(std::isnan(r.energy[0]) && std::isnan(r.a[0]) && std::isnan(r.dx[5]));
        EXPECT_TRUE(std::isfinite(r.a[std::size_t(scalars)]));
    }
}
TEST(Energy, ThreadsDoNotMatter) {
    const Problem p(Graph(32), 300, 3, 4);
    expect_identical(run<float>(Cpu{1}, p), run<float>(Cpu{3}, p));
}
// What energy.h says of sm_90's matrix; its kernels are held to a reference that multiplies by the same parts.
TEST(Energy, TwoPartsOfTheMatrixAreOffByWhatTheHeaderSays) {
    const auto expect_off_by = [](int dim, int scalars, double rms, double most, double by_one) {
        SCOPED_TRACE(testing::Message() << "D " << dim << ", R " << scalars);
        Problem p(Graph(dim), 4000, 1, scalars);
        p.log_temp = {0.0};  // a is lambda
        const Result exact = Naive<double>(p).run();
        const Error e = measure(Naive<double>(p, 2).run().a, exact.a),
                    one = measure(Naive<double>(p, 1).run().a, exact.a);
        EXPECT_LE(e.rms, rms);
        EXPECT_LE(e.max, most);
        EXPECT_GT(one.rms, by_one);  // the second part counts
    };
    for (const int scalars : {2, 8, 16}) {
        expect_off_by(64, scalars, 5e-7, 5e-6, 1e-4);
        for (const int dim : {16, 32, 128}) expect_off_by(dim, scalars, 1e-6, 1e-5, 5e-5);
    }
}

TEST(Energy, BrokenContractsAreRefused) {
    EXPECT_THROW(run<float>(Cpu{}, Problem(Graph(64), 1, 1, 3)), ContractError);
    std::vector<float> x(2 * 2 * 8, 1), a(2), b(4), numbers(8);
    const std::vector<std::int32_t> offsets(9, 0);
    EnergyForward<float> f;  // of an empty graph, both sides
    f.lap.dim = 8, f.lap.offsets = {offsets.data(), 9}, f.x = Mat<const float>(x.data(), 2, 16);
    f.log_tau = {numbers.data(), 1}, f.log_temp = {numbers.data(), 1};
    f.a = {a.data(), 2, 1, 1}, f.b = {b.data(), 2, 1, 1};
    energy_forward(Cpu{}, f);
    f.b = {b.data(), 2, 1, 2};  // another leading dimension
    EXPECT_THROW(energy_forward(Cpu{}, f), ContractError);
    f.b = {};  // one side, but x has two
    EXPECT_THROW(energy_forward(Cpu{}, f), ContractError);
}

#if FIEDLER_CUDA
// On sm_90 the kernels are its own, except for a device that has forgotten what it is.
const Cuda& general() {
    static const auto device = [] {
        auto d = std::make_unique<Cuda>();
        d->forget_architecture();
        return d;
    }();
    return *device;
}
void check_all_widths(const Cuda& d) {
    for (const int dim : kDims)
        for (const int scalars : kScalars)
            for (const int heads : {1, 6}) {
                const std::int64_t largest = dim == 64 && heads == 6 ? 1000 : 200;
                check_sizes<bf16>(d, Graph(dim), heads, scalars, {1, 3, 7, 15, 16, 17, 64, 129, largest}, 1.2e-7);
            }
}
TEST(Energy, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all_widths(gpu());
}
TEST(Energy, GpuGeneralKernelsMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all_widths(general());
}
TEST(Energy, GpuDenseLaplacian) {  // values that are not bf16 numbers, and every entry of the matrix
    FIEDLER_GPU_OR_SKIP();
    for (const Cuda* d : {&gpu(), &general()})
        for (const int dim : kDims) check_sizes<bf16>(*d, Graph(dim, true), 3, 1, {1, 7, 129}, 1.2e-7);
}
TEST(Energy, GpuManyTokensAndBitEqual) {  // several rounds of the token loop
    FIEDLER_GPU_OR_SKIP();
    for (const int scalars : {1, 8}) {
        check_sizes<bf16>(gpu(), Graph(16), 2, scalars, {70003}, 1.2e-7);
        const Problem p(Graph(64), 5000, 6, scalars, 2);
        const Result once = run<bf16>(gpu(), p);
        expect_identical(once, run<bf16>(gpu(), p));
        expect_identical(once, run<bf16>(gpu(), p, 0, Gradients::pending));
        const Result alone = run<bf16>(gpu(), p, 0, Gradients::none);
        EXPECT_EQ(alone.dx, once.dx);
        EXPECT_EQ(alone.dtau, from(to<float>(p.dtau0)));
    }
}
// One problem under the computed tolerance, with its numbers changed.
template <class Change>
void check_changed(const Cuda& d, int dim, int heads, int scalars, Change&& change) {
    Graph graph(dim);
    graph.round();
    Problem p(graph, 70, heads, scalars);
    change(p);
    expect_close(run<bf16>(d, p), expected<bf16>(d, p), 1.2e-7);
}
TEST(Energy, GpuNumbersOfAnySize) {  // f16 holds neither vectors nor gradients of these sizes as they are
    FIEDLER_GPU_OR_SKIP();
    const auto times = [](Values& v, double factor) {
        for (double& x : v) x *= factor;
    };
    for (const Cuda* d : {&gpu(), &general()})
        for (const int dim : kDims)
            for (const int scalars : {1, 2, 8, 16}) {
                SCOPED_TRACE(testing::Message() << "D " << dim << ", R " << scalars);
                for (const int exponent : {-40, -12, 20, 50})
                    check_changed(*d, dim, 2, scalars, [&](Problem& p) { times(p.x, std::ldexp(1.0, exponent)); });
                for (const int exponent : {-60, -20, 20, 60})
                    check_changed(*d, dim, 2, scalars, [&](Problem& p) { times(p.da, std::ldexp(1.0, exponent)); });
                for (const int exponent : {-20, 20})
                    check_changed(*d, dim, 2, scalars, [&](Problem& p) {
                        times(p.graph.eigenvalues, std::ldexp(1.0, exponent));
                        times(p.graph.values, std::ldexp(1.0, exponent));
                        times(p.log_tau, 0);
                        for (double& x : p.log_tau) x += exponent * 0.6875;  // about the logarithm of that factor
                    });
                Problem tiny(Graph(dim), 20, 1, scalars);  // too small for all of this: but numbers
                times(tiny.x, std::ldexp(1.0, -70)), times(tiny.graph.eigenvalues, std::ldexp(1.0, -20));
                for (const double v : run<bf16>(*d, tiny).dx) EXPECT_TRUE(std::isfinite(v));
                check_changed(*d, dim, 2, scalars,
                              [&](Problem& p) {  // large beside small in one vector, and none at all
                                  for (std::size_t i = 0; i < p.x.size(); ++i)
                                      p.x[i] *= std::ldexp(1.0, int(i * 7 % 41) - 20);
                                  std::fill_n(p.x.begin() + 2 * dim, dim, 0.0);
                              });
            }
}
TEST(Energy, GpuManyRoundsAreAlike) {  // more than there are stages: tokens of one period have the results of another
    FIEDLER_GPU_OR_SKIP();
    constexpr std::size_t kPeriod = 512;
    for (const int dim : kDims)
        for (const int scalars : {1, 8}) {
            Graph graph(dim, scalars == 1 && dim == 64);
            graph.round();
            Problem p(graph, 24000, 384 / dim, scalars, 2);
            const auto repeat = [](Values& v, std::size_t period) {
                for (std::size_t i = period; i < v.size(); ++i) v[i] = v[i - period];
            };
            const std::size_t row = kPeriod * std::size_t(p.sides * p.heads);
            repeat(p.x, row * std::size_t(dim)), repeat(p.da, row * std::size_t(scalars));
            const Result r = run<bf16>(gpu(), p);
            Values energy = r.energy, a = r.a, dx = r.dx;
            repeat(energy, row * std::size_t(scalars)), repeat(a, row * std::size_t(scalars));
            repeat(dx, row * std::size_t(dim));
            EXPECT_EQ(energy, r.energy) << "D " << dim << ", R " << scalars;
            EXPECT_EQ(a, r.a) << "D " << dim << ", R " << scalars;
            EXPECT_EQ(dx, r.dx) << "D " << dim << ", R " << scalars;
        }
}
TEST(Energy, GpuEigenvectorsAnywhere) {  // at an address that is a multiple of four bytes only
    FIEDLER_GPU_OR_SKIP();
    for (const Cuda* d : {&gpu(), &general()})
        for (const int dim : {16, 64, 128}) {
            Graph graph(dim);
            graph.round();
            const Problem p(graph, 100, 2, 4);
            const std::int64_t cols = 2 * dim;
            const Buffer<float, Cuda> there(*d, to<float>(p.graph.eigenvectors)),
                mu(*d, to<float>(p.graph.eigenvalues));
            Values shifted = p.graph.eigenvectors;
            shifted.insert(shifted.begin(), 0.0);
            const Buffer<float, Cuda> further(*d, to<float>(shifted));
            const Buffer<bf16, Cuda> x(*d, p.x);
            const Buffer<float, Cuda> first(*d, std::size_t(800)), second(*d, std::size_t(800));
            EnergyForward<bf16> f;
            f.lap.dim = dim, f.lap.eigenvalues = mu.vec(), f.x = x.mat(100, cols), f.heads = 2, f.scalars = 4,
            f.raw = true;
            const Prepared<Cuda> prepare(*d, dim, 4), prepare_further(*d, dim, 4);
            f.a = first.mat(100, 8), f.lap.eigenvectors = there.mat(dim, dim);
            prepare(f.lap);
            energy_forward(*d, f);
            f.a = second.mat(100, 8), f.lap.eigenvectors = Mat<const float>(further.data() + 1, dim, dim);
            prepare_further(f.lap);
            energy_forward(*d, f);
            EXPECT_EQ(first.values(), second.values());
        }
}
TEST(Energy, GpuUnpreparedLaplacian) {  // by the general kernels, whatever the device: to the bit
    FIEDLER_GPU_OR_SKIP();
    for (const int dim : kDims)
        for (const int scalars : {1, 8}) {
            const Problem p(Graph(dim), 200, 2, scalars, 2);
            expect_identical(run<bf16>(gpu(), p, 0, Gradients::with_scratch, false), run<bf16>(general(), p));
        }
}
TEST(Energy, GpuTauOfAnySize) {  // 1e-30 to 1e30 can be asked for: the reference in f32 takes no less than 1e-18
    FIEDLER_GPU_OR_SKIP();
    for (const Cuda* d : {&gpu(), &general()})
        for (const int scalars : {1, 8}) {
            Problem least(Graph(64), 20, 2, scalars);  // times eps no normal number
            std::fill(least.log_tau.begin(), least.log_tau.end(), std::log(1e-36));
            std::fill_n(least.x.begin(), 64, 0.0);
            const Values a = run<bf16>(*d, least).a;
            for (std::size_t i = 0; i < a.size(); ++i) EXPECT_EQ(a[i] == 0, i < std::size_t(scalars));
            for (const double tau : {1e-18, 1e-12, 1.5, 1e12, 1e30}) {
                SCOPED_TRACE(testing::Message() << "R " << scalars << ", tau " << tau);
                check_changed(*d, 64, 2, scalars, [&](Problem& p) {
                    std::fill(p.log_tau.begin(), p.log_tau.end(), std::log(tau));
                    std::fill_n(p.x.begin(), 64, 0.0);  // no energy at all, and a vector of size 2^40
                    for (int i = 64; i < 128; ++i) p.x[std::size_t(i)] *= std::ldexp(1.0, 40);
                });
            }
        }
}
TEST(Energy, GpuIsolatedNodesAndNaN) {
    FIEDLER_GPU_OR_SKIP();
    Graph graph(32);  // the path of the first 8 nodes; the others have no entry at all
    graph.columns.resize(std::size_t(graph.offsets[8]) - 1), graph.values.resize(graph.columns.size());
    graph.values.back() = 1;
    for (std::size_t i = 8; i < graph.offsets.size(); ++i) graph.offsets[i] = std::int32_t(graph.columns.size());
    check_sizes<bf16>(gpu(), graph, 2, 1, {5, 33}, 1.2e-7);
    for (const int dim : kDims)
        for (const int scalars : {1, 2, 8})
            for (const double bad : {std::nan(""), double(INFINITY), -double(INFINITY)})
                for (const int at :
                     {5, dim - 3}) {  // in either half of the columns: of a triangle not all are looked at
                    Problem p(Graph(dim), 20, 1, scalars);
                    p.x[std::size_t(at)] = bad;
                    const Result r = run<bf16>(gpu(), p);
                    EXPECT_TRUE(std::isnan(r.energy[0]) && std::isnan(r.a[0]) && std::isnan(r.dx[std::size_t(at)]));
                    for (std::size_t i = std::size_t(scalars); i < r.a.size(); ++i) EXPECT_TRUE(std::isfinite(r.a[i]));
                    for (std::size_t i = std::size_t(dim); i < r.dx.size(); ++i) EXPECT_TRUE(std::isfinite(r.dx[i]));
                }
}
// What energy.h says of an E near zero: on a complete graph, whose largest eigenvalue is D, where Lf is exact.
TEST(Energy, GpuConstantVectorsHaveAboutNoEnergy) {
    FIEDLER_GPU_OR_SKIP();
    for (const Cuda* d : {&gpu(), &general()})
        for (const int dim : kDims) {
            Graph graph(dim, true);
            for (int i = 0; i < dim * dim; ++i) graph.values[std::size_t(i)] = i % (dim + 1) == 0 ? dim - 1 : -1;
            Problem p(graph, 300, 2, 1);
            for (std::size_t i = 0; i < p.x.size(); ++i) p.x[i] = p.x[i - i % std::size_t(dim)];
            for (const double e : run<bf16>(*d, p).energy) EXPECT_LE(e, 0x1p-23 * dim) << "D " << dim;
        }
}
#endif

}  // namespace
}  // namespace fiedler::test
