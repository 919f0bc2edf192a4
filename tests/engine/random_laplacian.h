// tests/engine/random_laplacian.h: the Laplacian of a weighted graph without structure, in f32 values, with its
// eigenpairs.
#pragma once
#include <Eigen/Dense>

#include "engine/feature_laplacian.h"
#include "engine/rng.h"

namespace fiedler::test {

inline HostLaplacian random_laplacian(std::int32_t dim, std::uint64_t seed) {
    Eigen::MatrixXd l = Eigen::MatrixXd::Zero(dim, dim);
    for (std::int32_t i = 0; i < dim; ++i)
        for (std::int32_t j = 0; j < i; ++j) {
            const auto at = static_cast<std::uint64_t>(i * dim + j);
            if (rng::uniform(seed, 1, at) < 0.5) continue;
            const double weight = double(rng::below(64, seed, 2, at) + 1) / 64;  // exact in f32, and so are the sums
            l(i, j) = l(j, i) = -weight;
            l(i, i) += weight;
            l(j, j) += weight;
        }
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(l);
    std::vector<float> matrix, vectors, values;
    for (std::int32_t i = 0; i < dim; ++i)
        for (std::int32_t j = 0; j < dim; ++j) {
            matrix.push_back(static_cast<float>(l(i, j)));
            vectors.push_back(static_cast<float>(solver.eigenvectors()(j, i)));
        }
    for (std::int32_t i = 0; i < dim; ++i) values.push_back(static_cast<float>(std::max(0.0, solver.eigenvalues()(i))));
    return dense_laplacian(dim, matrix, vectors, values);
}

}  // namespace fiedler::test
