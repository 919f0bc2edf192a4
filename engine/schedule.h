// engine/schedule.h: the learning rate of a step, and whether a step looks like the ones before it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

namespace fiedler {

enum class ScheduleKind { wsd, cosine, constant };

struct LearningRate {
    ScheduleKind kind = ScheduleKind::wsd;
    double peak = 1e-3;
    double last_fraction = 0.02;  // of the peak, reached on the last step
    std::int64_t steps = 1, warmup = 0;
    double decay_fraction = 0.5;  // wsd: the share of the steps, at the end, over which the rate falls linearly

    // Steps count from 0. The rate rises linearly and is `peak` from step warmup - 1 on; then constant, a half cosine,
    // or constant and then linear. Steps after the last keep its rate.
    double operator()(std::int64_t step) const {
        if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
        switch (kind) {
            case ScheduleKind::constant:
                return peak;
            case ScheduleKind::cosine: {
                const double fall = 0.5 - 0.5 * std::cos(std::numbers::pi * progress(step, warmup));
                return peak * (1 - (1 - last_fraction) * fall);
            }
            case ScheduleKind::wsd: {
                const double stable = (1 - decay_fraction) * static_cast<double>(steps);
                const auto start = std::max(warmup, static_cast<std::int64_t>(std::llround(stable)));
                return peak * (1 - (1 - last_fraction) * progress(step, start));
            }
        }
        return peak;
    }

  private:
    // From 0 on step `start` to 1 on the last step.
    double progress(std::int64_t step, std::int64_t start) const {
        if (step < start) return 0;
        if (steps - 1 <= start) return step > start || start > 0 ? 1 : 0;
        return std::min(1.0, static_cast<double>(step - start) / static_cast<double>(steps - 1 - start));
    }
};

// How far a value lies above those of the last `window` steps, in their standard deviations. Knows nothing until the
// window is full. Deviations below a millionth of the mean count as that much, so that a flat stretch raises no alarm.
class OutlierDetector {
  public:
    static constexpr std::size_t kWindow = 128;

    explicit OutlierDetector(std::size_t window = kWindow) : window_(window) {}
    // Standard deviations above the mean; infinite for a value that is not finite, 0 while the window fills.
    double score(double value) const {
        if (!std::isfinite(value)) return std::numeric_limits<double>::infinity();
        if (values_.size() < window_) return 0;
        const auto [mean, deviation] = moments();
        return (value - mean) / deviation;
    }
    // The value whose score is z; infinite while the window fills or z is 0.
    double limit(double z) const {
        if (z <= 0 || values_.size() < window_) return std::numeric_limits<double>::infinity();
        const auto [mean, deviation] = moments();
        return mean + z * deviation;
    }
    // Values that are not finite are left out. Outliers are kept: a lasting change of level must become the new normal.
    void add(double value) {
        if (!std::isfinite(value)) return;
        if (values_.size() < window_) return values_.push_back(value);
        std::rotate(values_.begin(), values_.begin() + 1, values_.end());
        values_.back() = value;
    }
    // The whole state: the values in the window, oldest first (for the checkpoint).
    const std::vector<double>& values() const { return values_; }
    void restore(std::vector<double> values) {
        values_ = std::move(values);
        if (values_.size() > window_)
            values_.erase(values_.begin(), values_.end() - static_cast<std::ptrdiff_t>(window_));
    }

  private:
    struct Moments {
        double mean, deviation;
    };
    // From scratch each time: the same numbers whether or not the run was resumed.
    Moments moments() const {
        const auto n = static_cast<double>(values_.size());
        double mean = 0, squares = 0;
        for (const double v : values_) mean += v / n;
        for (const double v : values_) squares += (v - mean) * (v - mean) / n;
        return {mean, std::max({std::sqrt(squares), 1e-6 * std::abs(mean), std::numeric_limits<double>::min()})};
    }
    std::size_t window_;
    std::vector<double> values_;
};

}  // namespace fiedler
