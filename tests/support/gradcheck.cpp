#include "tests/support/gradcheck.h"

namespace fiedler::test {

Values numeric_gradient(Values& x, const std::function<double()>& objective, double h) {
    Values g(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double keep = x[i];
        x[i] = keep + h;
        const double up = objective();
        x[i] = keep - h;
        const double down = objective();
        x[i] = keep;
        g[i] = (up - down) / (2 * h);
    }
    return g;
}

testing::AssertionResult gradient_matches(const Values& analytic, Values& x, const std::function<double()>& objective,
                                          double tolerance, double h) {
    const Values numeric = numeric_gradient(x, objective, h);
    double largest = 0;
    for (double g : numeric) largest = std::max(largest, std::abs(g));
    if (largest == 0)
        return testing::AssertionFailure() << "the numeric gradient is zero everywhere: nothing was checked";
    return close_to(analytic, numeric, tolerance);
}

double inner(const Values& w, const Values& y) {
    double s = 0;
    for (std::size_t i = 0; i < y.size(); ++i) s += w[i] * y[i];
    return s;
}

}  // namespace fiedler::test
