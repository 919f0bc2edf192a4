// Filters of SubspaceSolver that keep their vectors in half precision, and what removes the noise (subspace_solver.h).
#include <algorithm>
#include <cmath>

#include "engine/subspace_solver.h"

namespace fiedler {
namespace {

using Size = std::size_t;

// Null vectors, whose direction gets some 1 / sqrt(nodes) of the noise, or up to 2^-12 of vectors with few different
// entries, must not outgrow the others.
constexpr double kHalfGrowth = 1e4;
constexpr std::int64_t kHalfDegree = 25;    // a shorter filter is done in f32 before its noise were polished away
constexpr std::int64_t kNoisyDegree = 100;  // a longer filter of deviations, whose noise adds up, is polished, too
// The polishing filter damps all but the lowest tenth of the spectrum, or what lies well above the wanted eigenvalues.
constexpr double kNoiseCut = 0.1, kNoiseFactor = 2, kBulk = 0.35;
constexpr double kNoiseDamping = 1e4;
constexpr double kPolishRange = 1e4;  // of its growth at the lowest pair, which would drown the others
constexpr std::int64_t kPolishLeast = 3, kPolishMost = 25;  // degrees

double noise_cut(double last, double upper) {
    return last > kBulk * upper ? (last + upper) / 2 : std::max(kNoiseCut * upper, kNoiseFactor * last);
}
double polish_degree(double lowest, double last, double upper) {
    const FilterInterval interval(noise_cut(last, upper), upper);
    const double rate = interval.rate(last), range = interval.rate(lowest) - rate;
    return std::min(std::acosh(kNoiseDamping) / rate, range > 0 ? std::log(kPolishRange) / range : 1e9);
}

}  // namespace

template <class Dev, class A>
bool SubspaceSolver<Dev, A>::can_polish(double lowest, double last) const {
    return polish_degree(lowest, last, device_[level_].upper) >= double(kPolishLeast);
}

template <class Dev, class A>
bool SubspaceSolver<Dev, A>::filter_half(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree,
                                         double lowest) {
    for (std::int64_t done = 0; done < columns; done += set_.half) {
        const std::int64_t width = std::min(set_.half, columns - done);
        filter_half_panel(panel(v_, first + done, width), panel(p_, first + done, width), cut, degree, lowest);
    }
    const std::vector<double> sizes = norms(panel(p_, first, columns), {}, {});
    return std::all_of(sizes.begin(), sizes.end(), [](double size) { return std::isfinite(size); });
}

// The steps of a filter on a panel of an f32 solver; q_ holds the panels. Projections of locked pairs, which are rare, go
// through `block`, [n, up to w], which is free.
template <class Dev, class A>
template <class>
struct SubspaceSolver<Dev, A>::HalfSteps {
    SubspaceSolver& s;
    Mat<A> block;
    const DeviceLevel& level = s.device_[s.level_];
    std::int64_t width = half_panel_width(block.cols);
    Vec<float> scale = s.half_scale_.slice(0, width);
    bool walk = level.half == HalfOperator::walk;

    Mat<f16> place(std::int64_t number) const {
        return {reinterpret_cast<f16*>(s.q_.data) + number * s.n_ * width, s.n_, width};
    }
    Vec<const float> rows() const { return walk ? Vec<const float>(level.null_vector) : Vec<const float>(); }
    void pack(Mat<f16> y, Mat<const float> x, bool keep_scale) const {
        Range range("half");
        half_pack(s.dev_, HalfPack{y, x, scale, keep_scale, s.half_scratch_, rows()});
    }
    void unpack(Mat<float> x, Mat<const f16> y) const {
        Range range("half");
        half_unpack(s.dev_, HalfUnpack{x, y, scale, rows()});
    }
    void apply(HalfApply call, double alpha, double beta, double gamma) const {
        Range range("laplacian in half");
        call.matrix = level.matrix, call.l = level.half, call.scratch = s.apply_scratch_;
        call.alpha = float(alpha * level.half_weight), call.beta = float(beta), call.gamma = float(gamma);
        half_apply(s.dev_, call);
        s.products_ += block.cols, s.half_products_ += block.cols;
    }
    void project(Mat<f16> x, bool locked) const {
        if (!locked) {
            Range range("deflate");
            half_deflate(s.dev_, HalfDeflate{x, level.null_vector, level.components, s.scratch_, walk});
            return;
        }
        unpack(block, x);
        s.project(block, 1);
        pack(x, block, true);
    }
};

template <class Dev, class A>
void SubspaceSolver<Dev, A>::filter_half_panel(Mat<A> from, Mat<A> to, double cut, std::int64_t degree, double lowest) {
    if constexpr (std::is_same_v<A, float>) {
        const HalfSteps<A> steps{*this, to};
        const Mat<f16> old = steps.place(0), now = steps.place(1);
        steps.pack(old, from, false);
        recurrence(
            old, now, cut, degree, lowest, kHalfGrowth,
            [&](Mat<f16> y, Mat<f16> x, Mat<f16> z, double alpha, double beta, double gamma) {
                steps.apply({y, x, z}, alpha, beta, gamma);
            },
            [&](Mat<f16> x, bool locked) { steps.project(x, locked); });
        steps.unpack(to, now);
    }
}

// R in, E out. Returns p(theta).
template <class Dev, class A>
std::vector<double> SubspaceSolver<Dev, A>::filter_deviations_panel(Mat<A> deviations, std::span<const double> theta,
                                                                    double cut, std::int64_t degree, double lowest) {
    std::vector<double> before(theta.size(), 0.0), now(theta.size(), 1.0);  // p_k-1, p_k
    if constexpr (std::is_same_v<A, float>) {
        const HalfSteps<A> steps{*this, deviations};
        const Mat<f16> first = steps.place(0), second = steps.place(1), r = steps.place(2);
        steps.pack(r, deviations, false);
        fill_bytes(dev_, first.data, 0, Size(n_ * steps.width) * sizeof(f16));
        recurrence(
            first, second, cut, degree, lowest, kHalfGrowth,
            [&](Mat<f16> y, Mat<f16> x, Mat<f16> z, double alpha, double beta, double gamma) {
                HalfApply call{y, x, z};
                call.r = r;
                for (Size j = 0; j < theta.size(); ++j) {
                    call.delta[j] = float(alpha * now[j]);
                    before[j] = (alpha * theta[j] + beta) * now[j] + gamma * before[j];
                }
                std::swap(before, now);
                steps.apply(call, alpha, beta, gamma);
            },
            [&](Mat<f16> x, bool locked) { steps.project(x, locked); });
        steps.unpack(deviations, second);
    }
    return now;
}

template <class Dev, class A>
bool SubspaceSolver<Dev, A>::filter_deviations(std::int64_t first, const std::vector<double>& theta, double cut,
                                               std::int64_t degree, double lowest) {
    const auto columns = std::int64_t(theta.size());
    if (3 * set_.half > 2 * set_.block) return false;  // three panels in q_
    const Mat<A> x = panel(v_, first, columns), e = panel(p_, first, columns);
    product(e, x, {}, 1, 0, 0);
    rotate(e, x, diagonal_matrix(theta, -1), 1, 1);
    std::vector<double> grown;
    for (std::int64_t done = 0; done < columns; done += set_.half) {
        const std::int64_t width = std::min(set_.half, columns - done);
        const std::vector<double> some = filter_deviations_panel(
            panel(p_, first + done, width), std::span(theta).subspan(Size(done), Size(width)), cut, degree, lowest);
        grown.insert(grown.end(), some.begin(), some.end());
    }
    const std::vector<double> sizes = norms(e, {}, {});
    if (!std::all_of(sizes.begin(), sizes.end(), [](double size) { return std::isfinite(size); })) return false;
    rotate(e, x, diagonal_matrix(grown, 1), 1, 1);
    return true;
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::polish(std::int64_t first, std::int64_t columns, double lowest, double last,
                                    const std::vector<double>& theta) {
    const double upper = device_[level_].upper, wished = polish_degree(lowest, last, upper);
    const double cut = noise_cut(last, upper);
    const auto degree = std::int64_t(std::clamp(wished, double(kPolishLeast), double(kPolishMost))) | 1;
    if (theta.empty() || !filter_deviations(first, theta, cut, degree, std::min(lowest, cut)))
        filter_columns(first, columns, cut, degree, std::min(lowest, cut));
}

template <class Dev, class A>
bool SubspaceSolver<Dev, A>::filter_long(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree,
                                         double lowest, double last, const std::vector<double>& theta) {
    const bool half = set_.half > 0 && level_ == 0;
    if (half && !theta.empty() && filter_deviations(first, theta, cut, degree, lowest)) {
        if (degree < kNoisyDegree || !can_polish(lowest, last)) return true;
        copy_columns(v_, first, p_, first, columns);
        polish(first, columns, lowest, last, theta);
        return true;
    }
    const bool worth = half && theta.empty() && degree >= kHalfDegree && can_polish(lowest, last);
    if (!worth || !filter_half(first, columns, cut, degree, lowest)) {
        filter_columns(first, columns, cut, degree, lowest);
        return false;
    }
    copy_columns(v_, first, p_, first, columns);
    polish(first, columns, lowest, last, {});
    return true;
}

template class SubspaceSolver<Cpu, double>;
template class SubspaceSolver<Cpu, float>;
#if FIEDLER_CUDA
template class SubspaceSolver<Cuda, float>;
#endif

}  // namespace fiedler
