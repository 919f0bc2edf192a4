// Memory and single operations of SubspaceSolver; the iteration is in subspace_solver.cpp.
#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "engine/subspace_solver.h"

namespace fiedler {
namespace {

using Size = std::size_t;
constexpr std::int64_t kRuns = 4, kSteps = 30;  // of Lanczos; runs are columns of a block, so a multiple of 4
// Columns at a time: narrow panels of X stay in a GPU's cache between the rows.
constexpr std::int64_t kPanel = 32, kNarrowPanel = 8;

// A symmetric tridiagonal matrix as dense_spectrum() takes it.
LaplacianMatrix<double> tridiagonal(const std::vector<double>& main, const std::vector<double>& beside) {
    LaplacianMatrix<double> m;
    m.nodes = static_cast<std::int64_t>(main.size());
    m.offsets.push_back(0);
    for (Size i = 0; i < main.size(); ++i) {
        for (Size j = i > 0 ? i - 1 : 0; j <= i + 1 && j < main.size(); ++j) {
            m.columns.push_back(static_cast<std::int32_t>(j));
            m.values.push_back(i == j ? main[i] : beside[std::min(i, j)]);
        }
        m.offsets.push_back(static_cast<std::int64_t>(m.columns.size()));
    }
    return m;
}

}  // namespace

template <class Dev, class A>
SubspaceSolver<Dev, A>::SubspaceSolver(Dev& dev, const std::vector<SolverLevel<A>>& levels,
                                       const SolverSettings& settings)
    : dev_(dev), levels_(levels), set_(settings) {
    lay_out(arena_);
    arena_.commit(memory_of(dev_), set_.memory_budget);
    lay_out(arena_);
    upload();
}

// level.*: the matrices. V, P, Q: the block and its partners. What the finest graph needs serves the coarser ones.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::lay_out(Arena& arena) {
    constexpr auto persistent = Lifetime::persistent, scratch = Lifetime::scratch;
    constexpr bool cuda = std::is_same_v<Dev, Cuda>;
    const std::int64_t m = set_.block;
    std::int64_t pieces = 0, deflation = 0, grams = 0;
    device_.assign(levels_.size(), {});
    for (Size l = 0; l < levels_.size(); ++l) {
        const LaplacianMatrix<A>& a = levels_[l].matrix;
        DeviceLevel& d = device_[l];
        const auto entries = static_cast<std::int64_t>(a.columns.size());
        const auto name = [&](const char* what) { return fmt::format("level {}.{}", l, what); };
        d.nodes = a.nodes;
        d.upper = a.upper_bound;
        d.matrix.rows = a.nodes;
        d.matrix.offsets = arena.vec<std::int64_t>(name("offsets"), a.nodes + 1, persistent);
        d.matrix.columns = arena.vec<std::int32_t>(name("columns"), entries, persistent);
        d.matrix.values = arena.vec<A>(name("values"), entries, persistent);
        if (cuda) {
            const LongRows rows = find_long_rows(a.offsets.data(), a.nodes);
            const auto count = static_cast<std::int64_t>(rows.rows.size());
            const auto parts = static_cast<std::int64_t>(rows.begin.size());
            d.matrix.long_rows.rows = arena.vec<std::int32_t>(name("long rows"), count, persistent);
            d.matrix.long_rows.first =
                arena.vec<std::int32_t>(name("long first"), count > 0 ? count + 1 : 0, persistent);
            d.matrix.long_rows.begin = arena.vec<std::int64_t>(name("pieces begin"), parts, persistent);
            d.matrix.long_rows.end = arena.vec<std::int64_t>(name("pieces end"), parts, persistent);
            pieces = std::max(pieces, parts);
        }
        const auto components = static_cast<std::int64_t>(levels_[l].components.size()) - 1;
        d.null_vector = arena.vec<A>(name("null vector"), a.nodes, persistent);
        d.components = arena.vec<std::int64_t>(name("components"), components + 1, persistent);
        const auto grouped = static_cast<std::int64_t>(levels_[l].group.size());
        d.group = arena.vec<std::int32_t>(name("group"), grouped, persistent);
        d.group_scale = arena.vec<A>(name("group scale"), grouped, persistent);
        deflation = std::max(deflation, eigen_deflate_scratch(a.nodes, m, components));
        grams = std::max(grams, eigen_scratch_bound(a.nodes, std::max(m, set_.basis)));
    }
    const std::int64_t n = device_[0].nodes;
    v_ = arena.vec<A>("V", n * m, persistent);
    p_ = arena.vec<A>("P", n * m, persistent);
    q_ = arena.vec<A>("Q", n * m, persistent);
    basis_ = arena.vec<A>("basis", n * set_.basis, persistent);
    narrow_ = arena.vec<A>("panel", n * set_.panel, scratch);
    small_ = arena.vec<double>("small matrix", m * std::max(m, set_.basis), persistent);
    norms_ = arena.vec<double>("norms", m, persistent);
    theta_device_ = arena.vec<double>("theta", m, persistent);
    scratch_ = arena.vec<double>("sums", cuda ? std::max(deflation, grams) : 0, scratch);
    apply_scratch_ = arena.vec<A>("piece sums", laplacian_scratch_elements(pieces, m), scratch);
    half_scale_ = arena.vec<float>("scales", set_.half, scratch);
    half_scratch_ = arena.vec<float>("largest entries", cuda ? half_pack_scratch(set_.half) : 0, scratch);
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::upload() {
    const auto put = [&](const auto& view, const auto& values) {
        using T = typename std::decay_t<decltype(values)>::value_type;
        if (!values.empty()) copy_to_device(dev_, const_cast<T*>(view.data), values.data(), values.size() * sizeof(T));
    };
    for (Size l = 0; l < levels_.size(); ++l) {
        const SolverLevel<A>& level = levels_[l];
        DeviceLevel& d = device_[l];
        if (level.matrix.equal_weight > 0) {
            const bool normalised = level.matrix.kind == LaplacianKind::normalised;
            d.half = normalised ? HalfOperator::walk : HalfOperator::degree;
            d.half_weight = normalised ? 1 : double(level.matrix.equal_weight);
        }
        put(d.matrix.offsets, level.matrix.offsets);
        put(d.matrix.columns, level.matrix.columns);
        put(d.matrix.values, level.matrix.values);
        if (d.matrix.long_rows.rows) {
            const LongRows rows = find_long_rows(level.matrix.offsets.data(), level.matrix.nodes);
            put(d.matrix.long_rows.rows, rows.rows);
            put(d.matrix.long_rows.first, rows.first);
            put(d.matrix.long_rows.begin, rows.begin);
            put(d.matrix.long_rows.end, rows.end);
        }
        RawVector<A> null = level.matrix.null_weight;
        for (Size c = 0; c + 1 < level.components.size(); ++c) {
            const auto first = static_cast<Size>(level.components[c]),
                       last = static_cast<Size>(level.components[c + 1]);
            double square = 0;
            for (Size i = first; i < last; ++i) square += double(null[i]) * double(null[i]);
            for (Size i = first; i < last; ++i) null[i] = static_cast<A>(double(null[i]) / std::sqrt(square));
        }
        put(d.null_vector, null);
        put(d.components, level.components);
        put(d.group, level.group);
        put(d.group_scale, level.group_scale);
    }
}

template <class Dev, class A>
Mat<A> SubspaceSolver<Dev, A>::panel(Vec<A> block, std::int64_t first, std::int64_t columns) const {
    return {block.data + first, n_, columns, set_.block};
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::copy_columns(Vec<A> to, std::int64_t to_column, Vec<A> from, std::int64_t column,
                                          std::int64_t columns) {
    if (columns == 0) return;
    const Size pitch = Size(set_.block) * sizeof(A);
    copy_rows_on_device(dev_, to.data + to_column, pitch, from.data + column, pitch, Size(columns) * sizeof(A),
                        Size(n_));
}

// Where panels are asked for, columns of a wide block are copied out of it, a panel at a time: side by side they fit the
// cache, and with what lies between them they do not.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::product(Mat<A> y, Mat<const A> x, Mat<const A> z, double alpha, double beta,
                                     double gamma) {
    if (level_ > 0 || set_.panel == 0 || x.ld <= set_.panel) {
        product_as_it_is(y, x, z, alpha, beta, gamma);
        return;
    }
    const auto some = [&](auto m, std::int64_t first, std::int64_t columns) {
        return decltype(m)(m.data + first, m.rows, columns, m.ld);
    };
    for (std::int64_t first = 0; first < x.cols; first += set_.panel) {
        const std::int64_t columns = std::min(set_.panel, x.cols - first);
        copy_rows_on_device(dev_, narrow_.data, Size(set_.panel) * sizeof(A), x.data + first, Size(x.ld) * sizeof(A),
                            Size(columns) * sizeof(A), Size(n_));
        product_as_it_is(some(y, first, columns), {narrow_.data, n_, columns, set_.panel},
                         z ? some(z, first, columns) : z, alpha, beta, gamma);
    }
}
template <class Dev, class A>
void SubspaceSolver<Dev, A>::product_as_it_is(Mat<A> y, Mat<const A> x, Mat<const A> z, double alpha, double beta,
                                              double gamma) {
    Range range("laplacian");
    LaplacianApply<A> call;
    call.y = y, call.x = x, call.z = z;
    call.matrix = device_[level_].matrix;
    call.alpha = static_cast<A>(alpha), call.beta = static_cast<A>(beta), call.gamma = static_cast<A>(gamma);
    call.scratch = apply_scratch_;
    call.panel = x.ld <= kNarrowPanel ? kNarrowPanel : kPanel;
    laplacian_apply(dev_, call);
    if (level_ == 0) products_ += x.cols;
}

template <class Dev, class A>
std::vector<double> SubspaceSolver<Dev, A>::gram(Mat<const A> x, Mat<const A> y) {
    Range range("gram");
    EigenGram<A> call;
    call.g = {small_.data, x.cols, y.cols};
    call.x = x, call.y = y, call.scratch = scratch_;
    eigen_gram(dev_, call);
    std::vector<double> g(static_cast<Size>(x.cols * y.cols));
    copy_to_host(dev_, g.data(), small_.data, g.size() * sizeof(double));
    return g;
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::rotate(Mat<A> y, Mat<const A> x, const std::vector<double>& q, double alpha, double beta) {
    Range range("rotate");
    copy_to_device(dev_, small_.data, q.data(), q.size() * sizeof(double));
    EigenRotate<A> call;
    call.y = y, call.x = x;
    call.q = Mat<const double>{small_.data, x.cols, y.cols};
    call.alpha = alpha, call.beta = beta, call.scratch = scratch_;
    eigen_rotate(dev_, call);
}

// Of the columns of W - X theta, or of W when theta is empty.
template <class Dev, class A>
std::vector<double> SubspaceSolver<Dev, A>::norms(Mat<const A> w, Mat<const A> x, const std::vector<double>& theta) {
    Range range("norms");
    EigenNorms<A> call;
    call.out = norms_.slice(0, w.cols);
    call.w = w;
    if (!theta.empty()) {
        copy_to_device(dev_, theta_device_.data, theta.data(), theta.size() * sizeof(double));
        call.x = x;
        call.theta = Vec<const double>(theta_device_.data, w.cols);
    }
    call.scratch = scratch_;
    eigen_norms(dev_, call);
    std::vector<double> out(static_cast<Size>(w.cols));
    copy_to_host(dev_, out.data(), norms_.data, out.size() * sizeof(double));
    for (double& value : out) value = std::sqrt(std::max(value, 0.0));
    return out;
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::deflate(Mat<A> x) {
    Range range("deflate");
    EigenDeflate<A> call;
    call.x = x;
    call.v = device_[level_].null_vector;
    call.offsets = device_[level_].components;
    call.scratch = scratch_;
    eigen_deflate(dev_, call);
}

// Out of the null space and the locked pairs.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::project(Mat<A> x, int times) {
    for (int k = 0; k < times; ++k) {
        deflate(x);
        if (locked_ == 0) continue;
        const Mat<const A> kept = panel(v_, 0, locked_);
        rotate(x, kept, gram(kept, x), -1, 1);
    }
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::fill_random(Mat<A> x) {
    Range range("random");
    eigen_random(dev_, EigenRandom<A>{x, set_.seed, random_columns_});
    random_columns_ += x.cols;
}

// Independent runs side by side, without re-orthogonalisation: the outermost Ritz values and the density are what is
// asked for, and copies of converged ones do no harm to either. The three blocks lie side by side at the beginning of v_:
// vectors without gaps stay in a GPU's cache.
template <class Dev, class A>
typename SubspaceSolver<Dev, A>::Lanczos SubspaceSolver<Dev, A>::lanczos() {
    const auto block = [&](std::int64_t k) { return Mat<A>(v_.data + k * n_ * kRuns, n_, kRuns); };
    Mat<A> before = block(0), now = block(1), next = block(2);
    fill_random(next);
    deflate(next);
    const auto reciprocal = [](std::vector<double> values) {
        for (double& value : values) value = value > 0 ? 1 / value : 0;
        return values;
    };
    rotate(now, next, diagonal_matrix(reciprocal(norms(next, {}, {}))), 1, 0);
    std::vector<std::vector<double>> main(kRuns), beside(kRuns);
    for (std::int64_t step = 0; step < kSteps; ++step) {
        product(next, now, {}, 1, 0, 0);
        deflate(next);
        const std::vector<double> g = gram(now, next);
        std::vector<double> alpha(kRuns), beta(kRuns);
        for (Size r = 0; r < Size(kRuns); ++r) {
            alpha[r] = -g[r * (Size(kRuns) + 1)];
            beta[r] = step > 0 ? -beside[r].back() : 0;
            main[r].push_back(-alpha[r]);
        }
        rotate(next, now, diagonal_matrix(alpha), 1, 1);
        if (step > 0) rotate(next, before, diagonal_matrix(beta), 1, 1);
        beta = norms(next, {}, {});
        for (Size r = 0; r < Size(kRuns); ++r)
            beside[r].push_back(beta[r] > 1e-5 * device_[level_].upper ? beta[r] : 0);
        for (Size r = 0; r < Size(kRuns); ++r) beta[r] = beside[r].back();
        std::swap(before, now);
        rotate(now, next, diagonal_matrix(reciprocal(beta)), 1, 0);
    }
    Lanczos result;
    for (Size r = 0; r < Size(kRuns); ++r) {
        std::vector<double> values, vectors;
        const double left = beside[r].back();
        beside[r].pop_back();
        dense_spectrum(tridiagonal(main[r], beside[r]), values, vectors);
        for (Size j = 0; j < values.size(); ++j) {
            result.values.push_back(values[j]);
            result.weights.push_back(vectors[j] * vectors[j] / double(kRuns));
        }
        const double last = vectors[values.size() * values.size() - 1];
        result.upper = std::max(result.upper, values.back() + std::fabs(left * last));
    }
    return result;
}

template <class Dev, class A>
typename SubspaceSolver<Dev, A>::Estimate SubspaceSolver<Dev, A>::estimate(std::int64_t count) {
    level_ = 0;
    n_ = device_[0].nodes;
    const Lanczos runs = lanczos();
    std::vector<Size> order(runs.values.size());
    for (Size i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](Size a, Size b) { return runs.values[a] < runs.values[b]; });
    Estimate result;
    result.upper = device_[0].upper = std::min(device_[0].upper, 1.01 * runs.upper);
    double below = 0;
    for (const Size i : order) {
        below += runs.weights[i] * double(n_);
        result.value = runs.values[i];
        if (below >= double(count)) break;
    }
    estimated_ = result.value;
    return result;
}

template class SubspaceSolver<Cpu, double>;
template class SubspaceSolver<Cpu, float>;
#if FIEDLER_CUDA
template class SubspaceSolver<Cuda, float>;
#endif

}  // namespace fiedler
