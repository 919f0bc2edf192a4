// engine/feature_laplacian.h: the feature-space Laplacian Lf of the energy layers (D x D), on the host, and its
// eigenpairs.
//
// Where no domain graph is given, Lf is the combinatorial Laplacian of the path 0 - 1 - ... - (D - 1): its spectrum is
// known in closed form, mu_m = 2 - 2 cos(pi m / D), u_m(i) ~ cos(pi m (i + 1/2) / D), ascending in m.
#pragma once
#include <cstdint>
#include <vector>

namespace fiedler {

struct HostLaplacian {
    std::int32_t dim = 0;
    std::vector<std::int32_t> offsets, columns;
    std::vector<double> values;
    std::vector<double> eigenvectors;  // [dim, dim], row m is u_m, orthonormal
    std::vector<double> eigenvalues;   // ascending
};

HostLaplacian path_laplacian(std::int32_t dim);
// From the matrix itself, [dim, dim] row-major: its entries that are not 0 become the CSR.
HostLaplacian dense_laplacian(std::int32_t dim, const std::vector<float>& matrix,
                              const std::vector<float>& eigenvectors, const std::vector<float>& eigenvalues);
std::vector<float> dense_matrix(const HostLaplacian&);  // and back

}  // namespace fiedler
