// energy: closed forms on the path graph, naive loops, finite differences, and the GPU against the double reference.
#include "kernels/energy.h"

#include <algorithm>
#include <memory>

#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"
#include "tests/support/path_graph.h"

namespace fiedler::test {
namespace {

// Lf on the host, in double: the path graph, or a graph with every edge and uneven weights (dense, R = 1 only).
struct Graph {
    int dim;
    std::vector<std::int32_t> offsets, columns;
    Values values, eigenvectors, eigenvalues;

    explicit Graph(int n, bool dense = false) : dim(n) {
        const PathGraph path(n);
        offsets = path.offsets, columns = path.columns, values = path.values;
        eigenvectors = path.eigenvectors, eigenvalues = path.eigenvalues;
        if (dense) connect_all();
    }
    void round() {  // to what float holds, so that every precision works with the same numbers
        for (Values* v : {&values, &eigenvectors, &eigenvalues}) *v = round_to<float>(*v);
    }
    Values matrix() const {
        Values m(static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim), 0.0);
        for (int i = 0; i < dim; ++i)
            for (int e = offsets[std::size_t(i)]; e < offsets[std::size_t(i) + 1]; ++e)
                m[std::size_t(i * dim + columns[std::size_t(e)])] += values[std::size_t(e)];
        return m;
    }

  private:
    void connect_all() {
        offsets = {0}, columns.clear(), values.clear();
        const auto weight = [](int i, int j) { return 0.1 + ((i * j + i + j) % 7) / 10.0; };
        for (int i = 0; i < dim; ++i) {
            double degree = 0;
            for (int j = 0; j < dim; ++j) degree += i == j ? 0 : weight(i, j);
            for (int j = 0; j < dim; ++j) columns.push_back(j), values.push_back(i == j ? degree : -weight(i, j));
            offsets.push_back(static_cast<std::int32_t>(columns.size()));
        }
    }
};

struct Problem {
    Graph graph;
    std::int64_t tokens;
    int heads, scalars, sides;
    double eps = float(1e-6);
    Values x, da, log_tau, log_temp, dtau0, dtemp0;  // da: of a token, the first side's heads, then the second one's

    Problem(Graph g, std::int64_t n, int h, int r, int both = 1)
        : graph(std::move(g)), tokens(n), heads(h), scalars(r), sides(both) {
        const auto vectors = static_cast<std::size_t>(n * h * sides);
        x = round_to<bf16>(random_values(vectors * std::size_t(graph.dim), 1, 2.0));
        da = round_to<float>(random_values(vectors * std::size_t(r), 2));
        log_tau = round_to<float>(random_uniform(std::size_t(r), 3, -2, 1));
        log_temp = round_to<float>(random_uniform(std::size_t(h), 4, -3, 0));
        dtau0 = round_to<float>(random_values(std::size_t(r), 5));
        dtemp0 = round_to<float>(random_values(std::size_t(h), 6));
    }
};

struct Result {
    Values energy, a, dx, dtau, dtemp;
    void append(const Result& r) {
        const auto join = [](Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); };
        join(energy, r.energy), join(a, r.a), join(dx, r.dx), join(dtau, r.dtau), join(dtemp, r.dtemp);
    }
};

// The sum of so many bf16 numbers that comes closest to x, as float holds it.
double sum_of_parts(double x, int parts) {
    double sum = 0;
    for (int part = 0; part < parts; ++part) sum += widen(narrow<bf16>(float(x) - sum));
    return sum;
}
// The contract's formulas for one head vector, in precision A. matrix: Lf (R = 1) or the eigenvectors. parts > 0: where
// the kernels multiply by a matrix of so many bf16 parts: of Lf, or of the eigenvectors times the roots of mu.
template <class A>
struct Naive {
    const Problem& p;
    std::vector<A> matrix, mu;
    explicit Naive(const Problem& q, int parts = 0) : p(q), mu(to<A>(q.graph.eigenvalues)) {
        Values m = q.scalars == 1 ? q.graph.matrix() : q.graph.eigenvectors;
        const std::size_t dim = std::size_t(q.graph.dim);
        for (std::size_t i = 0; parts > 0 && i < m.size(); ++i) {
            const double root = q.scalars == 1 ? 1.0 : std::sqrt(std::max(q.graph.eigenvalues[i / dim], 0.0));
            m[i] = sum_of_parts(m[i] * root, parts);
        }
        matrix = to<A>(m);
        if (parts > 0) std::fill(mu.begin(), mu.end(), A(1));
    }

    using Sums = std::vector<A>;
    void vector(std::size_t n, Result& r, Sums& dtau, Sums& dtemp) const {
        const int dim = p.graph.dim, scalars = p.scalars, width = dim / scalars;
        const std::size_t head = n % std::size_t(p.heads);
        const auto x = [&](int d) { return A(p.x[n * std::size_t(dim) + std::size_t(d)]); };
        const auto entry = [&](int m, int d) { return matrix[std::size_t(m * dim + d)]; };
        A square = 0, pull = 0;
        std::vector<A> y(static_cast<std::size_t>(dim), A(0)), z(static_cast<std::size_t>(dim), A(0));
        for (int d = 0; d < dim; ++d) square += x(d) * x(d);
        for (int m = 0; m < dim; ++m)
            for (int d = 0; d < dim; ++d) y[std::size_t(m)] += entry(m, d) * x(d);
        const A denominator = square + A(p.eps), inverse_temp = std::exp(-A(p.log_temp[head]));
        for (int b = 0; b < scalars; ++b) {
            const std::size_t out = n * std::size_t(scalars) + std::size_t(b);
            A energy = 0;
            for (int m = b * width; m < (b + 1) * width; ++m)
                energy += scalars == 1 ? x(m) * y[std::size_t(m)]
                                       : mu[std::size_t(m)] * y[std::size_t(m)] * y[std::size_t(m)];
            energy /= denominator;
            const A tau = std::exp(A(p.log_tau[std::size_t(b)])), da = A(p.da[out]);
            const A a = energy / (energy + tau) * inverse_temp, sum = energy + tau;
            const A g = da * inverse_temp * tau / (sum * sum);
            r.energy[out] = double(energy), r.a[out] = double(a);
            dtau[std::size_t(b)] -= g * energy;
            dtemp[head] -= da * a;
            pull += g * energy;
            for (int m = b * width; m < (b + 1) * width; ++m) {
                const A c = scalars == 1 ? g * y[std::size_t(m)] : g * mu[std::size_t(m)] * y[std::size_t(m)];
                if (scalars == 1) z[std::size_t(m)] = c;
                for (int d = 0; scalars > 1 && d < dim; ++d) z[std::size_t(d)] += c * entry(m, d);
            }
        }
        for (int d = 0; d < dim; ++d)
            r.dx[n * std::size_t(dim) + std::size_t(d)] = double(2 * (z[std::size_t(d)] - pull * x(d)) / denominator);
    }
    Result run() const {
        Result r{Values(p.da.size()), Values(p.da.size()), Values(p.x.size()), p.dtau0, p.dtemp0};
        Sums dtau(p.dtau0.size(), A(0)), dtemp(p.dtemp0.size(), A(0));
        const std::size_t vectors = std::size_t(p.tokens) * std::size_t(p.sides * p.heads);
        for (std::size_t n = 0; n < vectors; ++n) vector(n, r, dtau, dtemp);
        for (std::size_t i = 0; i < dtau.size(); ++i) r.dtau[i] = double(A(A(r.dtau[i]) + dtau[i]));
        for (std::size_t i = 0; i < dtemp.size(); ++i) r.dtemp[i] = double(A(A(r.dtemp[i]) + dtemp[i]));
        return r;
    }
};

// Rows of `cols` values in a wider matrix of leading dimension ld.
template <class T>
std::vector<T> spread(const Values& v, std::int64_t cols, std::int64_t ld) {
    std::vector<T> r(v.size() / std::size_t(cols) * std::size_t(ld), narrow<T>(std::nan("")));
    for (std::size_t i = 0; i < v.size(); ++i)
        r[i / std::size_t(cols) * std::size_t(ld) + i % std::size_t(cols)] = narrow<T>(v[i]);
    return r;
}
Values gather(const Values& v, std::int64_t cols, std::int64_t ld) {
    Values r;
    std::size_t touched = 0;
    for (std::size_t i = 0; i < v.size(); ++i) {
        if (std::int64_t(i) % ld < cols)
            r.push_back(v[i]);
        else if (!std::isnan(v[i]))
            ++touched;
    }
    EXPECT_EQ(touched, 0u) << "columns of others were written";
    return r;
}

// Memory for the matrix as energy_prepare() makes it, and the call.
template <class Dev>
class Prepared {
  public:
    Prepared(const Dev& d, int dim, int scalars)
        : d_(d), scalars_(scalars), memory_(d, std::size_t(energy_matrix_bytes(dim, scalars) / 4)) {
        memory_.poison();
    }
    void operator()(FeatureLaplacian<float>& lap) const {
        const auto bytes = std::int64_t(memory_.size() * sizeof(float));
        energy_prepare(d_, lap, scalars_, {reinterpret_cast<std::byte*>(memory_.data()), bytes});
    }
    void operator()(const FeatureLaplacian<double>&) const {}

  private:
    const Dev& d_;
    int scalars_;
    Buffer<float, Dev> memory_;
};

std::int64_t scratch_elements(const Cpu&, const Problem&) { return 1; }
int matrix_parts(const Cpu&) { return 0; }
#if FIEDLER_CUDA
#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif
int matrix_parts(const Cuda& d) { return FIEDLER_SM90A && d.arch == 90 ? 2 : 3; }
std::int64_t scratch_elements(const Cuda&, const Problem& p) {
    return energy_pending_elements(p.tokens, p.heads, p.scalars);
}
#endif

enum class Gradients { none, with_scratch, pending };  // how the parameters' are added up

// Everything the family computes, in memory of `Dev`. gap: x and dx are columns of a matrix wider by that much, and a and da
// of one wider by one column, so that rows of several scalars lie anywhere (kGapAnywhere), or by four (kGapAligned).
constexpr std::int64_t kGapAnywhere = 8, kGapAligned = 16;
template <class T, class Dev>
Result run(const Dev& d, const Problem& p, std::int64_t gap = 0, Gradients parameters = Gradients::with_scratch,
           bool prepared = true) {
    using A = acc_t<T>;
    const std::int64_t dim = p.graph.dim, cols = p.sides * p.heads * dim, ld = cols + gap, side = p.heads * p.scalars,
                       out = p.sides * side,
                       out_ld = out + (gap == kGapAnywhere  ? 1
                                       : gap == kGapAligned ? 4
                                                            : 0);
    const Buffer<std::int32_t, Dev> offsets(d, p.graph.offsets), columns(d, p.graph.columns);
    const Buffer<A, Dev> values(d, to<A>(p.graph.values)), vectors(d, to<A>(p.graph.eigenvectors));
    const Buffer<A, Dev> eigenvalues(d, to<A>(p.graph.eigenvalues));
    const Buffer<T, Dev> x(d, spread<T>(p.x, cols, ld)), dx(d, std::size_t(p.tokens * ld));
    const Values none(p.da.size(), 0.0);
    const Buffer<A, Dev> a(d, spread<A>(none, out, out_ld)), energy(d, spread<A>(none, out, out_ld));
    const Buffer<A, Dev> da(d, spread<A>(p.da, out, out_ld));
    const Buffer<A, Dev> log_tau(d, to<A>(p.log_tau)), log_temp(d, to<A>(p.log_temp));
    const Buffer<A, Dev> dtau(d, to<A>(p.dtau0)), dtemp(d, to<A>(p.dtemp0));
    const Buffer<A, Dev> scratch(d, std::size_t(scratch_elements(d, p)));
    const auto first = [&](const Buffer<A, Dev>& m) { return Mat<A>{m.data(), p.tokens, side, out_ld}; };
    const auto second = [&](const Buffer<A, Dev>& m) {
        return p.sides == 2 ? Mat<A>{m.data() + side, p.tokens, side, out_ld} : Mat<A>{};
    };
    EnergyForward<T> f;
    f.lap.dim = p.graph.dim;
    if (p.scalars == 1)
        f.lap.offsets = offsets.vec(), f.lap.columns = columns.vec(), f.lap.values = values.vec();
    else
        f.lap.eigenvectors = vectors.mat(dim, dim), f.lap.eigenvalues = eigenvalues.vec();
    const Prepared<Dev> prepare(d, p.graph.dim, p.scalars);
    if (prepared) prepare(f.lap);
    f.a = first(energy), f.b = second(energy), f.x = Mat<T>(x.data(), p.tokens, cols, ld);
    f.heads = p.heads, f.scalars = p.scalars, f.eps = A(p.eps), f.raw = true;
    energy_forward(d, f);  // raw: needs neither tau nor temperature
    f.a = first(a), f.b = second(a), f.log_tau = log_tau.vec(), f.log_temp = log_temp.vec(), f.raw = false;
    energy_forward(d, f);
    EnergyBackward<T> b;
    b.dx = {dx.data(), p.tokens, cols, ld}, b.da = first(da), b.db = second(da), b.x = f.x, b.lap = f.lap;
    b.log_tau = f.log_tau, b.log_temp = f.log_temp, b.heads = f.heads, b.scalars = f.scalars, b.eps = f.eps;
    if (parameters != Gradients::none) b.dlog_tau = dtau.vec(), b.dlog_temp = dtemp.vec();
    if (parameters == Gradients::with_scratch) b.scratch = scratch.vec();
    PendingSums<A> pending(scratch.vec());
    if (parameters == Gradients::pending) b.pending = &pending;
    energy_backward(d, b);
    finish_sums(d, pending);
    return {gather(energy.values(), out, out_ld), gather(a.values(), out, out_ld), gather(dx.values(), cols, ld),
            dtau.values(), dtemp.values()};
}

// What a problem's results are held to. Sums over tokens may also be those of the kernels' own matrix: what its few parts make
// wrong is the same for all tokens, and may add up to more than the bound, which is of rounding. It is known exactly.
struct Expected {
    Result exact, of_parts, low;
    void append(const Expected& e) { exact.append(e.exact), of_parts.append(e.of_parts), low.append(e.low); }
};
template <class T, class Dev>
Expected expected(const Dev& d, const Problem& p, std::int64_t gap = 0) {
    int parts = matrix_parts(d);
    if (parts == 2 && gap == kGapAnywhere && p.scalars >= 8) parts = 3;  // general kernels take those rows
    const Result exact = Naive<double>(p).run();
    Expected e{exact, parts == 2 ? Naive<double>(p, parts).run() : exact, Naive<acc_t<T>>(p, parts).run()};
    e.low.dx = round_to<T>(e.low.dx);
    return e;
}
void expect_close(const Result& got, const Expected& e, double ulp) {
    const auto close_sums = [&](Values Result::*sums) {
        const auto result = close(got.*sums, e.exact.*sums, e.low.*sums, ulp);
        return result ? result : close(got.*sums, e.of_parts.*sums, e.low.*sums, ulp);
    };
    EXPECT_TRUE(close(got.energy, e.exact.energy, e.low.energy, ulp));
    EXPECT_TRUE(close(got.a, e.exact.a, e.low.a, ulp));
    EXPECT_TRUE(close(got.dx, e.exact.dx, e.low.dx, ulp));
    EXPECT_TRUE(close_sums(&Result::dtau));
    EXPECT_TRUE(close_sums(&Result::dtemp));
}
void expect_identical(const Result& x, const Result& y) {
    const auto same = [](const Values& u, const Values& v) {
        return u.size() == v.size() && identical(u.data(), v.data(), u.size() * sizeof(double));
    };
    EXPECT_TRUE(same(x.energy, y.energy));
    EXPECT_TRUE(same(x.a, y.a));
    EXPECT_TRUE(same(x.dx, y.dx));
    EXPECT_TRUE(same(x.dtau, y.dtau));
    EXPECT_TRUE(same(x.dtemp, y.dtemp));
}

// All sizes of one configuration under one computed tolerance.
template <class T, class Dev>
void check_sizes(const Dev& d, Graph graph, int heads, int scalars, const std::vector<std::int64_t>& sizes,
                 double ulp) {
    SCOPED_TRACE(testing::Message() << "D " << graph.dim << ", R " << scalars << ", heads " << heads << ", nnz "
                                    << graph.values.size());
    graph.round();
    Result got;
    Expected all;
    for (const std::int64_t tokens : sizes)
        for (const int sides : {1, 2}) {
            const Problem p(graph, tokens, heads, scalars, sides);
            const std::int64_t gap = tokens % 4 == 1 ? kGapAnywhere : tokens % 4 == 3 ? kGapAligned : 0;
            got.append(run<T>(d, p, gap));
            all.append(expected<T>(d, p, gap));
        }
    expect_close(got, all, ulp);
}

constexpr int kDims[] = {16, 32, 64, 128};
constexpr int kScalars[] = {1, 2, 4, 8, 16};

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
            for (const double bad : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
                Problem p(Graph(dim), 20, 1, scalars);
                p.x[5] = bad;
                const Result r = run<bf16>(gpu(), p);
                EXPECT_TRUE(std::isnan(r.energy[0]) && std::isnan(r.a[0]) && std::isnan(r.dx[5]));
                for (std::size_t i = std::size_t(scalars); i < r.a.size(); ++i) EXPECT_TRUE(std::isfinite(r.a[i]));
                for (std::size_t i = std::size_t(dim); i < r.dx.size(); ++i) EXPECT_TRUE(std::isfinite(r.dx[i]));
            }
}
#endif

}  // namespace
}  // namespace fiedler::test
