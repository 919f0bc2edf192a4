#include "engine/feature_laplacian.h"

#include <cmath>
#include <numbers>

namespace fiedler {

HostLaplacian path_laplacian(std::int32_t dim) {
    HostLaplacian l;
    l.dim = dim;
    l.offsets.push_back(0);
    const auto entry = [&](std::int32_t column, double value) {
        l.columns.push_back(column);
        l.values.push_back(value);
    };
    for (std::int32_t i = 0; i < dim; ++i) {
        if (i > 0) entry(i - 1, -1);
        entry(i, (i > 0) + (i + 1 < dim));
        if (i + 1 < dim) entry(i + 1, -1);
        l.offsets.push_back(static_cast<std::int32_t>(l.columns.size()));
    }
    const double n = dim;
    for (std::int32_t m = 0; m < dim; ++m) {
        l.eigenvalues.push_back(2 - 2 * std::cos(std::numbers::pi * m / n));
        const double norm = m == 0 ? std::sqrt(1 / n) : std::sqrt(2 / n);
        for (std::int32_t i = 0; i < dim; ++i)
            l.eigenvectors.push_back(norm * std::cos(std::numbers::pi * m * (i + 0.5) / n));
    }
    return l;
}

}  // namespace fiedler
