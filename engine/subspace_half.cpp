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
constexpr std::int64_t kHalfDegree = 25;  // a shorter filter is done in f32 before its noise were polished away
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

// q_ holds the panels. Projections of locked pairs, which are rare, go through `to`, which is free until the end.
template <class Dev, class A>
void SubspaceSolver<Dev, A>::filter_half_panel(Mat<A> from, Mat<A> to, double cut, std::int64_t degree, double lowest) {
    if constexpr (std::is_same_v<A, float>) {
        const std::int64_t width = half_panel_width(from.cols);
        auto* memory = reinterpret_cast<f16*>(q_.data);
        const Mat<f16> old(memory, n_, width), now(memory + n_ * width, n_, width);
        const Vec<float> scale = half_scale_.slice(0, width);
        const DeviceLevel& level = device_[level_];
        const auto pack = [&](Mat<f16> y, Mat<const float> x, bool keep_scale) {
            Range range("half");
            half_pack(dev_, HalfPack{y, x, scale, keep_scale, half_scratch_});
        };
        const auto unpack = [&](Mat<const f16> y) {
            Range range("half");
            half_unpack(dev_, HalfUnpack{to, y, scale});
        };
        const auto product = [&](Mat<f16> y, Mat<f16> x, Mat<f16> z, double alpha, double beta, double gamma) {
            Range range("laplacian in half");
            half_apply(dev_, HalfApply{y, x, z, level.matrix, float(alpha), float(beta), float(gamma), apply_scratch_});
            products_ += from.cols, half_products_ += from.cols;
        };
        const auto project_half = [&](Mat<f16> x, bool locked) {
            if (!locked) {
                Range range("deflate");
                half_deflate(dev_, HalfDeflate{x, level.null_vector, level.components, scratch_});
                return;
            }
            unpack(x);
            project(to, 1);
            pack(x, to, true);
        };
        pack(old, from, false);
        recurrence(old, now, cut, degree, lowest, kHalfGrowth, product, project_half);
        unpack(now);
    }
}

template <class Dev, class A>
void SubspaceSolver<Dev, A>::polish(std::int64_t first, std::int64_t columns, double lowest, double last) {
    const double upper = device_[level_].upper, degree = polish_degree(lowest, last, upper);
    const double cut = noise_cut(last, upper);
    filter_columns(first, columns, cut, std::int64_t(std::clamp(degree, double(kPolishLeast), double(kPolishMost))) | 1,
                   std::min(lowest, cut));
}

template <class Dev, class A>
bool SubspaceSolver<Dev, A>::filter_long(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree,
                                         double lowest, double last) {
    const bool worth = set_.half > 0 && level_ == 0 && degree >= kHalfDegree && can_polish(lowest, last);
    if (!worth || !filter_half(first, columns, cut, degree, lowest)) {
        filter_columns(first, columns, cut, degree, lowest);
        return false;
    }
    copy_columns(v_, first, p_, first, columns);
    polish(first, columns, lowest, last);
    return true;
}

template class SubspaceSolver<Cpu, double>;
template class SubspaceSolver<Cpu, float>;
#if FIEDLER_CUDA
template class SubspaceSolver<Cuda, float>;
#endif

}  // namespace fiedler
