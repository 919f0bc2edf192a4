// kernels/decayed_sum.h: sums of exp(l_j - |x - x_j|) y_j carried along a line, on the CPU, without overflow: the scans of
// kernels/attention_tree and kernels/attention_runs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fiedler {

template <class T>
T dot(const T* x, const T* y, std::int64_t n) {
    constexpr int kLanes = 8;  // a fixed order that vectorises
    T part[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int k = 0; k < kLanes; ++k) part[k] += x[i + k] * y[i + k];
    for (; i < n; ++i) part[0] += x[i] * y[i];
    return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}
template <class T>
void axpy(T factor, const T* __restrict x, T* __restrict y, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// sum_j exp(l_j - |x - x_j|) payload_j for an x on the far side of all that was added, as exp(scale - |x - at|) sum. The
// scale is that of one of the terms, and moves on to another only when that is e^8 times heavier: a rescaling rounds, and
// many, one for each term, would add up.
template <class T>
struct DecayedSum {
    static constexpr T kLead = 8;
    T scale = -std::numeric_limits<T>::infinity(), at = 0;
    std::vector<T> sum;  // payload: a vector and a number

    explicit DecayedSum(std::int64_t width) : sum(static_cast<std::size_t>(width + 1)) {}
    void clear() {
        scale = -std::numeric_limits<T>::infinity();
        std::fill(sum.begin(), sum.end(), T(0));
    }
    bool empty() const { return scale == -std::numeric_limits<T>::infinity(); }
    T scale_at(T x) const { return scale - std::abs(x - at); }
    void add(T log_weight, T x, const T* vector, T number) {
        const auto n = static_cast<std::int64_t>(sum.size()) - 1;
        const T carried = empty() ? scale : scale_at(x);
        T weight = 1;
        if (log_weight > carried + kLead) {
            if (!empty()) {
                const T keep = std::exp(carried - log_weight);
                for (T& s : sum) s *= keep;
            }
            scale = log_weight, at = x;
        } else {
            weight = std::exp(log_weight - carried);
        }
        axpy(weight, vector, sum.data(), n);
        sum[static_cast<std::size_t>(n)] += weight * number;
    }
    void add(const DecayedSum& other) {
        if (!other.empty()) add(other.scale, other.at, other.sum.data(), other.sum[sum.size() - 1]);
    }
    const T* vector() const { return sum.data(); }
    T number() const { return sum.back(); }
};

}  // namespace fiedler
