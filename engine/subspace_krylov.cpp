// The first block of SubspaceSolver on one graph: Ritz vectors of a filtered block Krylov space (subspace_solver.h).
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "engine/subspace_solver.h"

namespace fiedler {
namespace {

using Size = std::size_t;

// Of the block that is filtered: a panel, and about the fewest products.
constexpr std::int64_t kWidth = 8, kHalfWidth = 16;
constexpr double kBlockGrowth = 1e3;  // of the lowest pair in a filter: more would hide the others in rounding
constexpr double kFirstGrowth = 1e8;  // of an eigenvalue that nobody has seen yet, at most (no overflow)
constexpr int kFirstRounds = 8;       // of short filters, until something shows below the cut
constexpr double kLaterGrowth = 1e15, kSeen = 100;
constexpr std::int64_t kLeast = 9, kMost = 255;  // degrees
// At the edge of a bulk, eigenvalue number k lies about k^(2/3) above the edge; the cut is best where there are about as
// many eigenvalues as the basis gets columns, and from the first to there it is this many times as far as to the one at a
// quarter of the wanted ones.
constexpr double kCutFactor = 5.5;
constexpr double kCutMost = 2.5;      // times as far as to what was estimated for a block
constexpr std::int64_t kChecked = 8;  // of the wanted pairs the last ones, which converge last

double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double chebyshev_rate(double value, double cut, double upper) {
    const double x = (cut + upper - 2 * value) / (upper - cut);
    return x > 1 ? std::acosh(x) : 0;
}

// Columns [first, first + columns) of a square matrix of m columns.
std::vector<double> some_columns(const std::vector<double>& q, std::int64_t m, std::int64_t first,
                                 std::int64_t columns) {
    std::vector<double> some(Size(m * columns));
    for (std::int64_t i = 0; i < m; ++i) std::copy_n(q.begin() + i * m + first, columns, some.begin() + i * columns);
    return some;
}

}  // namespace

std::int64_t krylov_columns(std::int64_t nodes, std::int64_t wanted, std::int64_t half) {
    const std::int64_t width = half > 0 ? kHalfWidth : kWidth;
    const std::int64_t columns = (5 * wanted / 2 + 2 * kWidth + width - 1) / width * width;
    return columns <= kEigenMaxColumns && nodes >= 16 * columns ? columns : 0;
}

// `columns` of p_ to the next columns of the basis, orthogonal to those before and to one another. Spends v_.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::extend_basis(std::int64_t before, std::int64_t columns) {
    const Mat<const A> basis(basis_.data, n_, before, set_.basis);
    Mat<A> given = panel(p_, 0, columns);
    for (int pass = 0; pass < 2; ++pass) {
        deflate(given);
        if (before > 0) rotate(given, basis, gram(basis, given), -1, 1);
        const RitzResult white = orthonormalise(gram(given, given), columns, 1e-11);
        Mat<A> to = pass == 0 ? panel(v_, 0, columns) : Mat<A>(basis_.data + before, n_, columns, set_.basis);
        rotate(to, given, white.q, 1, 0);
        given = to;
    }
}

// The worst residual of the last wanted pairs, Ritz pairs of the first m columns of the basis; less the noise of half
// precision where there is any. Spends the last columns of v_.
template <class Dev, class A>
double SubspaceSolver<Dev, A>::basis_residual(const RitzResult& ritz, std::int64_t m) {
    const std::int64_t columns = std::min(kChecked, set_.wanted), first = set_.wanted - columns;
    const std::int64_t at = set_.block - kChecked;
    Mat<A> x = panel(v_, at, columns), image = panel(p_, at, columns);
    rotate(x, Mat<const A>(basis_.data, n_, m, set_.basis), some_columns(ritz.q, m, first, columns), 1, 0);
    std::vector<double> theta(ritz.theta.begin() + first, ritz.theta.begin() + first + columns);
    if (set_.half > 0) {
        polish(at, columns, ritz.theta[0], theta.back(), theta);
        const RitzResult polished = ritz_of(at, columns);
        theta = polished.theta;
        rotate(x, image, polished.q, 1, 0);
        rotate(image, panel(q_, at, columns), polished.q, 1, 0);
    } else {
        product(image, x, {}, 1, 0, 0);
    }
    const std::vector<double> residuals = norms(image, x, theta);
    return *std::max_element(residuals.begin(), residuals.end());
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::report_basis(std::int64_t m) {
    if (!set_.progress) return;
    SpectrumProgress p;
    p.iteration = iterations_, p.wanted = set_.wanted;
    p.seconds = now_seconds() - started_;
    p.stage = fmt::format("Krylov space of {} columns", m);
    set_.progress(p);
}

// Leaves a block of Ritz vectors in v_. Counts each filter as an iteration.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::krylov() {
    std::int64_t width = set_.half > 0 ? kHalfWidth : kWidth;
    const double upper = device_[0].upper;
    level_ = 0, n_ = device_[0].nodes, locked_ = 0, active_ = width;
    locked_theta_.clear();
    const auto filter_block = [&](double cut, std::int64_t degree, double lowest) {
        if (set_.half == 0 || !filter_half(0, width, cut, degree, lowest)) filter(0, cut, degree, lowest);
    };
    const auto rate = [&](double value, double cut) { return chebyshev_rate(value, cut, upper); };
    // An eigenvalue far below what the block shows would overflow. None can hide that a filter has raised a hundredfold.
    double cut = std::min(estimated_, 0.7 * upper), lowest = cut;
    const auto first = std::int64_t(std::log(kFirstGrowth) / std::max(rate(0, cut) - rate(lowest, cut), 1e-3));
    std::int64_t degree = std::clamp(first, kLeast, kMost) | 1;
    fill_random(panel(v_, 0, width));
    deflate(panel(v_, 0, width));
    theta_.assign(1, upper);
    for (int round = 0; round < kFirstRounds && theta_[0] >= cut; ++round) {
        filter_block(cut, degree, cut);
        rayleigh_ritz();
    }
    lowest = std::min(theta_[0], cut);
    const double first_cut = cut, first_lowest = lowest;
    std::vector<double> h(Size(set_.basis * set_.basis), 0.0);  // V'LV
    RitzResult ritz;
    std::int64_t m = 0;
    while (m < set_.basis && iterations_ < set_.max_iterations && !stopped_ && !(set_.stop && set_.stop())) {
        cut = std::max(cut, lowest + 1e-6 * upper);
        const double safe = degree * std::log(kLaterGrowth) / std::log(kSeen);
        const double wished = std::acosh(kBlockGrowth) / std::max(rate(lowest, cut), 1e-3);
        degree = std::int64_t(std::clamp(std::min(wished, safe), double(kLeast), double(kMost))) | 1;
        filter_block(cut, degree, lowest);
        extend_basis(m, width);
        Mat<A> newest(basis_.data + m, n_, width, set_.basis), image = panel(q_, 0, width);
        product(image, newest, {}, 1, 0, 0);
        m += width;
        const std::vector<double> g = gram(Mat<const A>(basis_.data, n_, m, set_.basis), image);
        for (std::int64_t i = 0; i < m; ++i)
            for (std::int64_t j = 0; j < width; ++j) {
                const std::int64_t column = m - width + j;
                const double value = g[Size(i * width + j)];
                h[Size(column * set_.basis + i)] = h[Size(i * set_.basis + column)] = value;
            }
        ++iterations_;
        report_basis(m);
        const Size row = Size(set_.basis) * sizeof(A);
        copy_rows_on_device(dev_, v_.data, Size(set_.block) * sizeof(A), newest.data, row, Size(width) * sizeof(A),
                            Size(n_));
        const bool last = m == set_.basis || iterations_ == set_.max_iterations;
        const bool check = m >= set_.wanted + width && (set_.half > 0 || m / width % 2 == 0);
        if (m > set_.wanted && !check && !last) continue;  // nothing to learn
        std::vector<double> part(Size(m * m));
        for (std::int64_t i = 0; i < m; ++i) std::copy_n(h.begin() + i * set_.basis, m, part.begin() + i * m);
        ritz = fiedler::rayleigh_ritz(part, m);
        lowest = ritz.theta[0];
        if (!std::isfinite(lowest)) break;  // as with weights at the end of the range: a random start it is
        const double quarter = ritz.theta[Size(std::min(m - 1, set_.wanted / 4))];
        if (m >= set_.wanted / 4 + width)
            cut = std::min(
                {lowest + kCutFactor * (quarter - lowest), lowest + kCutMost * (estimated_ - lowest), 0.7 * upper});
        if (check && set_.half > 0 && !can_polish(lowest, ritz.theta[Size(set_.wanted - 1)])) {
            set_.half = 0, m = 0, ritz = {}, active_ = width = kWidth;  // the noise would stay: once more, in f32
            cut = first_cut, lowest = first_lowest;
            fill_random(panel(v_, 0, width));
            deflate(panel(v_, 0, width));
            continue;
        }
        if (check && basis_residual(ritz, m) <= std::max(set_.tolerance, rounding_floor(levels_[0].matrix, upper)))
            break;
    }
    const bool finite = std::isfinite(lowest);
    const std::int64_t columns = finite ? std::min(std::int64_t(ritz.theta.size()), set_.block) : 0;
    if (columns < set_.block) fill_random(panel(p_, 0, set_.block));
    const auto rows = std::int64_t(ritz.theta.size());
    const bool noisy = set_.half > 0 && columns == set_.block && can_polish(lowest, ritz.theta[Size(set_.block - 1)]);
    if (columns > 0)
        rotate(panel(noisy ? v_ : p_, 0, columns), Mat<const A>(basis_.data, n_, rows, set_.basis),
               some_columns(ritz.q, rows, 0, columns), 1, 0);
    if (noisy)
        polish(0, columns, lowest, ritz.theta[Size(columns - 1)], {ritz.theta.begin(), ritz.theta.begin() + columns});
    active_ = set_.block;
    rayleigh_ritz();
}

template class SubspaceSolver<Cpu, double>;
template class SubspaceSolver<Cpu, float>;
#if FIEDLER_CUDA
template class SubspaceSolver<Cuda, float>;
#endif

}  // namespace fiedler
