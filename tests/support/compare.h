// tests/support/compare.h: comparisons that cannot pass by accident.
//
// NaN, infinity, different lengths and zero compared elements always fail. That of close() is computed, never chosen: the
// error of `got` against the double reference may be at most twice the error of `low`, the same function evaluated
// naively in the precision at hand (inputs equal, intermediates and outputs rounded where the contract says), plus a
// few units of rounding of the accumulation type at the scale of the reference. Both the largest and the
// root-mean-square error are held to it.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace fiedler::test {

using Values = std::vector<double>;

struct Error {
    double max = 0, rms = 0, scale = 0;  // largest |got - ref|, its root mean square, largest |ref|
    std::size_t worst = 0, nonfinite = 0, count = 0;
};
Error measure(const Values& got, const Values& ref);

// got against ref within the computed tolerance; low: see above. ulp: rounding unit of the accumulation type.
testing::AssertionResult close(const Values& got, const Values& ref, const Values& low, double ulp = 1.2e-7);
// For double against double: the largest error, relative to the largest |ref| (or 1e-300), is at most tolerance.
testing::AssertionResult close_to(const Values& got, const Values& ref, double tolerance);
// Bit for bit, NaN included (for runs of the same kernel).
testing::AssertionResult identical(const void* a, const void* b, std::size_t bytes);

Values random_values(std::size_t n, std::uint64_t seed, double scale = 1.0);  // normal
Values random_uniform(std::size_t n, std::uint64_t seed, double lo, double hi);
std::vector<std::int32_t> random_ints(std::size_t n, std::uint64_t seed, std::int32_t lo, std::int32_t hi);  // [lo, hi)

// Conversions; round_to<bf16>(v) gives doubles that are exactly representable.
template <class T>
double widen(T x) {
    if constexpr (std::is_same_v<T, bf16>)
        return float(x);
    else
        return double(x);
}
template <class T>
T narrow(double x) {
    if constexpr (std::is_same_v<T, bf16>)
        return bf16(static_cast<float>(x));
    else
        return static_cast<T>(x);
}
template <class T>
std::vector<T> to(const Values& v) {
    std::vector<T> r(v.size());
    for (std::size_t i = 0; i < v.size(); ++i) r[i] = narrow<T>(v[i]);
    return r;
}
template <class T>
Values from(const std::vector<T>& v) {
    Values r(v.size());
    for (std::size_t i = 0; i < v.size(); ++i) r[i] = widen(v[i]);
    return r;
}
template <class T>
Values round_to(const Values& v) {
    return from(to<T>(v));
}

}  // namespace fiedler::test
