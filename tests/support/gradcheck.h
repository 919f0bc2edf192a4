// tests/support/gradcheck.h: central differences in double.
#pragma once
#include <gtest/gtest.h>

#include <functional>

#include "tests/support/compare.h"

namespace fiedler::test {

// d objective / d x at `x` by central differences with step h; x is restored.
Values numeric_gradient(Values& x, const std::function<double()>& objective, double h = 1e-5);

// analytic against central differences of objective with respect to x, largest error relative to the largest gradient.
// Fails when the numeric gradient is all zero: then nothing would be checked.
testing::AssertionResult gradient_matches(const Values& analytic, Values& x, const std::function<double()>& objective,
                                          double tolerance = 1e-6, double h = 1e-5);

// sum_i w_i y_i: a scalar objective whose gradient with respect to y is w.
double inner(const Values& w, const Values& y);

}  // namespace fiedler::test
