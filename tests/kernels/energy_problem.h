// tests/kernels/energy_problem.h: problems of energies, their naive solution, and all that the family computes of one on a
// device; held against each other under a computed tolerance.
#pragma once
#include <algorithm>
#include <memory>

#include "kernels/energy.h"
#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"
#include "tests/support/path_graph.h"

namespace fiedler::test::energy_problem {

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
inline double sum_of_parts(double x, int parts) {
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
inline Values gather(const Values& v, std::int64_t cols, std::int64_t ld) {
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

inline std::int64_t scratch_elements(const Cpu&, const Problem&) { return 1; }
inline int matrix_parts(const Cpu&) { return 0; }
#if FIEDLER_CUDA
#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif
inline int matrix_parts(const Cuda& d) { return FIEDLER_SM90A && d.arch == 90 ? 2 : 3; }
inline std::int64_t scratch_elements(const Cuda&, const Problem& p) {
    return energy_pending_elements(p.tokens, p.heads, p.scalars);
}
#endif

enum class Gradients { none, with_scratch, pending };  // how the parameters' are added up

// Everything the family computes, in memory of `Dev`. gap: x and dx are columns of a matrix wider by that much, and a and da
// of one wider by one column, so that rows of several scalars lie anywhere (kGapAnywhere), or by four (kGapAligned).
inline constexpr std::int64_t kGapAnywhere = 8, kGapAligned = 16;
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
inline void expect_close(const Result& got, const Expected& e, double ulp) {
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
inline void expect_identical(const Result& x, const Result& y) {
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

inline constexpr int kDims[] = {16, 32, 64, 128};
inline constexpr int kScalars[] = {1, 2, 4, 8, 16};

}  // namespace fiedler::test::energy_problem
