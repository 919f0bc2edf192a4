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

HostLaplacian dense_laplacian(std::int32_t dim, const std::vector<float>& matrix,
                              const std::vector<float>& eigenvectors, const std::vector<float>& eigenvalues) {
    HostLaplacian l;
    l.dim = dim;
    l.offsets.push_back(0);
    for (std::int32_t i = 0; i < dim; ++i) {
        for (std::int32_t j = 0; j < dim; ++j)
            if (const float value = matrix[static_cast<std::size_t>(i * dim + j)]; value != 0) {
                l.columns.push_back(j);
                l.values.push_back(value);
            }
        l.offsets.push_back(static_cast<std::int32_t>(l.columns.size()));
    }
    l.eigenvectors.assign(eigenvectors.begin(), eigenvectors.end());
    l.eigenvalues.assign(eigenvalues.begin(), eigenvalues.end());
    return l;
}

std::vector<float> dense_matrix(const HostLaplacian& l) {
    std::vector<float> matrix(static_cast<std::size_t>(l.dim * l.dim));
    for (std::int32_t i = 0; i < l.dim; ++i)
        for (std::int32_t e = l.offsets[static_cast<std::size_t>(i)]; e < l.offsets[static_cast<std::size_t>(i) + 1];
             ++e)
            matrix[static_cast<std::size_t>(i * l.dim + l.columns[static_cast<std::size_t>(e)])] =
                static_cast<float>(l.values[static_cast<std::size_t>(e)]);
    return matrix;
}

}  // namespace fiedler
