#include "engine/subspace_solver.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "engine/error.h"

namespace fiedler {
namespace {

using Size = std::size_t;

// How far rounding errors may grow before they are projected out, and the range of growth within the block.
template <class A>
constexpr double kGrowth = sizeof(A) == 4 ? 1e5 : 1e8;
template <class A>
constexpr double kRange = sizeof(A) == 4 ? 3e4 : 1e7;
// How far the filter may raise an eigenvalue that the block has not seen: Gram matrices square it, and must not overflow.
template <class A>
constexpr double kUnseen = sizeof(A) == 4 ? 1e15 : 1e120;
template <class A>
constexpr double kUnseenAtFirst = sizeof(A) == 4 ? 1e8 : 1e30;  // while not even the smallest pair has converged
// Share of the largest eigenvalue of a Gram matrix below which directions are noise.
template <class A>
constexpr double kNoise = sizeof(A) == 4 ? 1e-11 : 1e-20;
constexpr std::int64_t kLeastDegree = 9;  // worth a Rayleigh-Ritz
constexpr double kRelative = 0.02;  // of the largest wanted eigenvalue: residuals above tell nothing about small ones
constexpr double kHighest = 0.995;  // of the upper bound: where the damped interval begins at most
constexpr double kLevelTolerance = 0.15;  // the same on coarser levels, which only give a start
constexpr std::int64_t kLevelIterations = 4;
constexpr double kSmoothing = 10;  // interpolation errs in high eigenvectors most of all: a short first filter suffices
constexpr double kPolishCut = 0.1;  // of the upper bound: a short filter that removes noise from high eigenvectors
constexpr std::int64_t kPolishDegree = 15, kProbes = 8;
constexpr std::int64_t kDownloadBytes = std::int64_t(4) << 20;  // of vectors at a time
constexpr int kRounds = 8;                                      // of checks for overlooked pairs

double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// v_ holds the columns, the result is in p_ (the degree is odd). q_ is spent where narrow panels are asked for.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::filter(std::int64_t first, double cut, std::int64_t degree, double lowest) {
    filter_columns(first, first_active() + active_ - first, cut, degree, lowest);
}
template <class Dev, class A>
void SubspaceSolver<Dev, A>::filter_columns(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree,
                                            double lowest) {
    if (set_.panel == 0 || 2 * set_.panel > set_.block) {
        filter_panel(panel(v_, first, columns), panel(p_, first, columns), cut, degree, lowest);
        return;
    }
    const Size pitch = Size(set_.block) * sizeof(A), narrow = Size(set_.panel) * sizeof(A);
    for (std::int64_t done = 0; done < columns; done += set_.panel) {
        const std::int64_t width = std::min(set_.panel, columns - done);
        Mat<A> from{q_.data, n_, width, set_.panel}, to{q_.data + n_ * set_.panel, n_, width, set_.panel};
        const Size bytes = Size(width) * sizeof(A);
        copy_rows_on_device(dev_, from.data, narrow, v_.data + first + done, pitch, bytes, Size(n_));
        filter_panel(from, to, cut, degree, lowest);
        copy_rows_on_device(dev_, p_.data + first + done, pitch, to.data, narrow, bytes, Size(n_));
    }
}
template <class Dev, class A>
void SubspaceSolver<Dev, A>::filter_panel(Mat<A> old, Mat<A> now, double cut, std::int64_t degree, double lowest) {
    recurrence(
        old, now, cut, degree, lowest, kGrowth<A>,
        [&](Mat<A> y, Mat<A> x, Mat<A> z, double alpha, double beta, double gamma) {
            product(y, x, z, alpha, beta, gamma);
        },
        [&](Mat<A> x, bool locked) { locked ? project(x, 1) : deflate(x); });
}

// Of columns of p_, which are made independent on the way; leaves their images in q_ and spends those columns of v_.
template <class Dev, class A>
RitzResult SubspaceSolver<Dev, A>::ritz_of(std::int64_t first, std::int64_t columns) {
    const double enough = sizeof(A) == 4 ? 1e-4 : 1e-8;
    Mat<A> given = panel(p_, first, columns), image = panel(q_, first, columns);
    project(given, 2);
    for (int pass = 0;; ++pass) {
        std::vector<double> g = gram(given, given);
        const RitzResult white = orthonormalise(g, columns, kNoise<A>);
        if (white.condition >= enough || pass == 2) {
            product(image, given, {}, 1, 0, 0);
            return fiedler::rayleigh_ritz(g, gram(given, image), columns, kNoise<A>);
        }
        rotate(panel(v_, first, columns), given, white.q, 1, 0);
        copy_columns(p_, first, v_, first, columns);
        project(given, 1);
    }
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::rayleigh_ritz() {
    const std::int64_t columns = active_, first = first_active();
    Mat<A> given = panel(p_, first, columns), image = panel(q_, first, columns), ritz = panel(v_, first, columns);
    const RitzResult result = ritz_of(first, columns);
    theta_ = result.theta;
    for (const double t : theta_)
        if (!std::isfinite(t))
            run_error("spectrum: the iteration left the range of numbers; scale the weights, or use --device cpu");
    rotate(ritz, given, result.q, 1, 0);
    rotate(given, image, result.q, 1, 0);
    residual_ = norms(given, ritz, theta_);
}

// Active pairs among the `wanted` smallest of all.
template <class Dev, class A>
std::int64_t SubspaceSolver<Dev, A>::needed() const {
    std::vector<double> all = locked_theta_;
    all.insert(all.end(), theta_.begin(), theta_.end());
    std::nth_element(all.begin(), all.begin() + (set_.wanted - 1), all.end());
    const double largest = all[Size(set_.wanted - 1)];
    std::int64_t count = 0;
    while (count < std::int64_t(theta_.size()) && theta_[Size(count)] <= largest) ++count;
    const auto locked_below =
        std::count_if(locked_theta_.begin(), locked_theta_.end(), [&](double t) { return t <= largest; });
    return std::min<std::int64_t>(count, std::max<std::int64_t>(0, set_.wanted - locked_below));
}

template <class Dev, class A>
double SubspaceSolver<Dev, A>::tolerance_now(double tolerance) const {
    const std::int64_t count = needed();
    double largest = locked_theta_.empty() ? 0 : *std::max_element(locked_theta_.begin(), locked_theta_.end());
    if (count > 0) largest = std::max(largest, theta_[Size(count - 1)]);
    const double least = rounding_floor(levels_[level_].matrix, device_[level_].upper);
    return std::max(least, level_ > 0 ? kLevelTolerance * largest : std::min(tolerance, kRelative * largest));
}

template <class Dev, class A>
std::int64_t SubspaceSolver<Dev, A>::converged(double tolerance) const {
    std::int64_t count = 0;
    while (count < std::int64_t(residual_.size()) && residual_[Size(count)] <= tolerance) ++count;
    return count;
}

// Enough for the tolerance, at most what the range of growth within the block allows.
template <class Dev, class A>
std::int64_t SubspaceSolver<Dev, A>::choose_degree(double cut, double tolerance, double most_ratio) const {
    const FilterInterval interval(cut, device_[level_].upper);
    const std::int64_t last = std::max<std::int64_t>(needed(), 1);
    const double worst = *std::max_element(residual_.begin(), residual_.begin() + last);
    const double wanted_rate = interval.rate(theta_[Size(last - 1)]), lowest_rate = interval.rate(theta_[0]);
    const double most = double(kMostDegree<A>);
    const double range = lowest_rate > 0 ? std::acosh(kRange<A>) / lowest_rate : most;
    const double ratio = std::clamp(4 * worst / tolerance, 4.0, std::max(4.0, most_ratio));
    const double enough = wanted_rate > 0 ? std::acosh(ratio) / wanted_rate : most;
    const double unseen = interval.rate(0) - lowest_rate;
    const double growth =
        unseen > 0 ? std::log(residual_[0] > tolerance ? kUnseenAtFirst<A> : kUnseen<A>) / unseen : most;
    return std::int64_t(std::min({most, range, growth, std::max(enough, double(kLeastDegree))})) | 1;
}

// The first active pairs join the locked ones, and the others move up. Both begin at multiples of four columns, as the
// kernels need: up to three columns between them are unused, and then so many guards may have to go.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::lock(std::int64_t count) {
    const std::int64_t from = first_active(), end = locked_;
    locked_ += count;
    const std::int64_t to = first_active(), rest = std::min(active_ - count, set_.block - to);
    if (end != from || to != from + count) {
        copy_columns(p_, from, v_, from, active_);
        copy_columns(v_, end, p_, from, count);
        copy_columns(v_, to, p_, from + count, rest);
    }
    locked_theta_.insert(locked_theta_.end(), theta_.begin(), theta_.begin() + count);
    for (std::vector<double>* of_active : {&theta_, &residual_}) {
        of_active->erase(of_active->begin(), of_active->begin() + count);
        of_active->resize(Size(rest));
    }
    active_ = rest;
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::report(const std::string& stage, double tolerance) {
    if (!set_.progress) return;
    SpectrumProgress p;
    p.iteration = iterations_;
    p.wanted = set_.wanted;
    const std::int64_t count = needed();
    p.converged = std::min(set_.wanted, level_ == 0 ? set_.wanted - count + std::min(count, converged(tolerance)) : 0);
    for (std::int64_t i = 0; i < count; ++i) p.worst_residual = std::max(p.worst_residual, residual_[Size(i)]);
    p.seconds = now_seconds() - started_;
    if (level_ == 0 && last_worst_ > p.worst_residual && p.worst_residual > 0)
        p.seconds_left = std::max(0.0, std::log(p.worst_residual / tolerance)) /
                         std::log(last_worst_ / p.worst_residual) * (p.seconds - last_seconds_);
    last_worst_ = level_ == 0 ? p.worst_residual : 0;
    last_seconds_ = p.seconds;
    p.stage = stage;
    set_.progress(p);
}

// Until the wanted pairs have residuals within the tolerance. False: the limit, or asked to stop.
template <class Dev, class A>
bool SubspaceSolver<Dev, A>::iterate(double tolerance, std::int64_t limit, const std::string& stage, bool final) {
    double before = 0;
    bool polished = false, halved = false;
    for (std::int64_t iteration = 0;; ++iteration) {
        const double within = tolerance_now(tolerance);
        const std::int64_t good = converged(within), count = needed();
        report(stage, within);
        if (good >= count) return true;
        if (iteration >= limit || stopped_ || (set_.stop && set_.stop())) return false;
        const double worst = *std::max_element(residual_.begin(), residual_.begin() + count);
        if (final && good > 0) lock(std::min(good, active_ - 8));  // eight active columns stay
        const double cut = std::min(theta_.back(), kHighest * device_[level_].upper);
        const bool interpolated = iteration == 0 && level_ + 1 < levels_.size();
        const double ratio = interpolated ? kSmoothing : std::numeric_limits<double>::max();
        const double upper = device_[level_].upper;
        const double high = std::max(std::min(std::max(kPolishCut * upper, 2 * cut), 0.7 * upper), (cut + upper) / 2);
        const bool stalled = iteration > 0 && worst > 0.5 * before && !polished;
        if (stalled && halved) set_.half = 0;
        before = worst, polished = stalled;
        const double from = stalled ? high : cut;
        const std::int64_t degree = choose_degree(from, tolerance_now(tolerance), ratio);
        const double lowest = std::min(theta_.front(), from);
        halved = !stalled && filter_long(first_active(), active_, from, degree, lowest, theta_.back(), theta_);
        if (stalled) filter(first_active(), from, std::min(degree, kPolishDegree), lowest);
        rayleigh_ritz();
        if (level_ == 0) ++iterations_;
    }
}

// Locks the wanted pairs; then random columns in the place of the last ones, in the complement of what is locked, filtered
// until the smallest overlooked eigenvalue would stand out. False: there is one; the random columns then join the block.
template <class Dev, class A>
bool SubspaceSolver<Dev, A>::probe(double tolerance) {
    const double margin = tolerance_now(tolerance);
    lock(needed());
    const double largest = *std::max_element(locked_theta_.begin(), locked_theta_.end());
    const std::int64_t kept = (std::max<std::int64_t>(0, active_ - kProbes) + 3) / 4 * 4, probes = active_ - kept;
    const std::int64_t first = first_active() + kept;
    const double above = kept > 0 ? theta_[Size(kept - 1)] : largest;
    const double cut = std::min(std::max(above, largest), kHighest * device_[level_].upper);
    const FilterInterval interval(cut, device_[level_].upper);
    Mat<A> random = panel(v_, first, probes);
    copy_columns(p_, 0, v_, first, probes);  // the guards, whose place the random columns take; nobody else uses these
    fill_random(random);
    project(random, 2);
    const double enough = std::acosh(30 * std::sqrt(double(n_))) / std::max(interval.rate(largest), 1e-9);
    const double growth = std::log(kUnseen<A>) / interval.rate(0);
    const double degree = std::min({double(kMostDegree<A>), std::max(enough, double(kLeastDegree)), growth});
    filter_long(first, probes, cut, std::int64_t(degree) | 1, std::min(largest, cut), cut, {});
    const bool whole = ritz_of(first, probes).theta[0] >= largest - margin;
    copy_columns(v_, first, p_, whole ? 0 : first, probes);
    return whole;
}

// The block for this level in v_, as Ritz vectors: interpolated from the next coarser level's, or random.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::start_level(std::size_t level) {
    const bool coarsest = level + 1 == levels_.size();
    level_ = level;
    n_ = device_[level].nodes;
    locked_ = 0, active_ = set_.block;
    locked_theta_.clear();
    Mat<A> block = panel(p_, 0, set_.block);
    if (coarsest) {
        fill_random(block);
    } else {
        EigenGather<A> call;
        call.y = block;
        call.x = Mat<const A>(v_.data, device_[level + 1].nodes, set_.block, set_.block);
        call.index = device_[level].group;
        call.scale = device_[level].group_scale;
        eigen_gather(dev_, call);
    }
    if (levels_.size() > 1) {  // else estimate() has done it
        const Lanczos runs = lanczos();
        device_[level].upper = std::min(device_[level].upper, 1.01 * runs.upper);
    }
    rayleigh_ritz();
}

template <class Dev, class A>
SolverResult SubspaceSolver<Dev, A>::solve(const std::vector<float>& start, std::int64_t start_columns,
                                           const VectorSink& sink) {
    started_ = now_seconds();
    for (Size level = levels_.size(); level-- > 0;) {
        if (level == 0 && start_columns > 0) {
            level_ = 0, n_ = device_[0].nodes, active_ = set_.block;
            fill_random(panel(p_, 0, set_.block));
            const std::int64_t columns = std::min(start_columns, set_.block);
            std::vector<A> values(Size(n_ * columns));
            for (std::int64_t i = 0; i < n_; ++i)
                for (std::int64_t j = 0; j < columns; ++j)
                    values[Size(i * columns + j)] = static_cast<A>(start[Size(i * start_columns + j)]);
            copy_to_device(dev_, q_.data, values.data(), values.size() * sizeof(A));
            copy_rows_on_device(dev_, p_.data, Size(set_.block) * sizeof(A), q_.data, Size(columns) * sizeof(A),
                                Size(columns) * sizeof(A), Size(n_));
            rayleigh_ritz();
        } else if (level == 0 && levels_.size() == 1 && set_.basis > set_.block && estimated_ > 0) {
            krylov();
        } else {
            start_level(level);
        }
        if (level > 0) iterate(0, kLevelIterations, fmt::format("level {} ({} nodes)", level, n_), false);
    }
    SolverResult result;
    result.complete = iterate(set_.tolerance, set_.max_iterations - iterations_, "filter", true);
    for (int round = 0; result.complete; ++round) {
        const bool whole = probe(set_.tolerance);
        join();
        if (whole && converged(tolerance_now(set_.tolerance)) >= set_.wanted) break;
        result.complete =
            round < kRounds && iterate(set_.tolerance, set_.max_iterations - iterations_, "completeness", true);
    }
    if (!result.complete) {
        result.why = stopped_ || (set_.stop && set_.stop())
                         ? "stopped before all pairs had converged"
                         : fmt::format("not converged after {} iterations", iterations_);
        join();
    }
    download(result, sink);
    return result;
}

// A Rayleigh-Ritz over locked and active columns together, which evens out what separate locking left.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::join() {
    copy_columns(p_, 0, v_, 0, locked_);
    copy_columns(p_, locked_, v_, first_active(), active_);
    active_ += locked_;
    locked_ = 0;
    locked_theta_.clear();
    rayleigh_ritz();
}

namespace {

template <class Dev>
struct Staging {  // two pinned buffers, so that one is filled while the other is emptied
    const Dev& dev;
    char* memory;
    Size bytes;  // of each
    Staging(const Dev& d, Size n) : dev(d), memory(static_cast<char*>(host_alloc(d, 2 * n))), bytes(n) {}
    ~Staging() { host_free(dev, memory); }
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;
    void* half(std::int64_t k) const { return memory + Size(k % 2) * bytes; }
};

}  // namespace

// The wanted pairs, the first of the joined block, to the host. p_ and q_ are free by now.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::download(SolverResult& result, const VectorSink& sink) {
    Range range("download");
    const std::int64_t k = set_.wanted,
                       rows = std::clamp<std::int64_t>(kDownloadBytes / (k * std::int64_t(sizeof(A))), 1, n_);
    result.eigenvalues.assign(theta_.begin(), theta_.begin() + k);
    result.residuals.assign(residual_.begin(), residual_.begin() + k);
    result.iterations = iterations_, result.products = products_, result.half_products = half_products_;
    result.peak_bytes = arena_.peak();
    copy_rows_on_device(dev_, q_.data, Size(k) * sizeof(A), v_.data, Size(set_.block) * sizeof(A), Size(k) * sizeof(A),
                        Size(n_));
    const Staging<Dev> staging(dev_, Size(rows * k) * sizeof(A));
    const std::int64_t pieces = (n_ + rows - 1) / rows;
    const auto count = [&](std::int64_t piece) { return std::min(rows, n_ - piece * rows); };
    const auto ask = [&](std::int64_t piece) {
        fetch(dev_, staging.half(piece), q_.data + piece * rows * k, Size(count(piece) * k) * sizeof(A));
        set_mark(dev_, int(piece % 2));
    };
    ask(0);
    std::vector<float> rounded;
    for (std::int64_t piece = 0; piece < pieces; ++piece) {
        wait_for_mark(dev_, int(piece % 2));
        if (piece + 1 < pieces) ask(piece + 1);
        const A* values = static_cast<const A*>(staging.half(piece));
        if constexpr (std::is_same_v<A, float>) {
            sink(values, piece * rows, count(piece));
        } else {
            rounded.assign(values, values + count(piece) * k);
            sink(rounded.data(), piece * rows, count(piece));
        }
    }
}

template class SubspaceSolver<Cpu, double>;
template class SubspaceSolver<Cpu, float>;
#if FIEDLER_CUDA
template class SubspaceSolver<Cuda, float>;
#endif

}  // namespace fiedler
