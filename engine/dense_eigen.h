// engine/dense_eigen.h: symmetric eigenproblems of dense matrices on the host, in double (Eigen).
#pragma once
#include <cstdint>
#include <vector>

#include "engine/graph.h"

namespace fiedler {

// All eigenpairs of L, ascending: vectors[i * n + j] is entry i of vector j. O(n^3) time, 16 n^2 bytes.
void dense_spectrum(const LaplacianMatrix<double>& matrix, std::vector<double>& values, std::vector<double>& vectors);

// Rayleigh-Ritz of a block with Gram matrix G = X'X and H = X'LX (both [m, m], row-major; H's two triangles are
// averaged): Q such that X Q is orthonormal and (XQ)'L(XQ) = diag(theta), ascending.
//   condition   smallest over largest eigenvalue of G scaled to a unit diagonal: how independent the columns are.
// Directions below `floor` of the largest are kept as they are, scaled no further: their columns of X Q are noise.
struct RitzResult {
    std::vector<double> q, theta;
    double condition = 0;
};
RitzResult rayleigh_ritz(const std::vector<double>& g, const std::vector<double>& h, std::int64_t m, double floor);

// The same of a block that is orthonormal.
RitzResult rayleigh_ritz(const std::vector<double>& h, std::int64_t m);

// Q such that X Q has orthonormal columns (up to the floor, as above).
RitzResult orthonormalise(const std::vector<double>& g, std::int64_t m, double floor);

}  // namespace fiedler
