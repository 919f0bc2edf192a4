#include "engine/dense_eigen.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>

namespace fiedler {
namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using View = Eigen::Map<const Matrix>;

std::vector<double> to_vector(const Matrix& m) { return {m.data(), m.data() + m.size()}; }

// S with S'GS = 1, from the eigenvectors of G scaled to a unit diagonal.
Matrix whitening(const std::vector<double>& g, std::int64_t m, double floor, double& condition) {
    const View given(g.data(), m, m);
    Eigen::VectorXd scale(m);
    for (std::int64_t i = 0; i < m; ++i) scale[i] = given(i, i) > 0 ? 1 / std::sqrt(given(i, i)) : 0;
    Matrix scaled = scale.asDiagonal() * given * scale.asDiagonal();
    for (std::int64_t i = 0; i < m; ++i)
        if (scale[i] == 0) scaled(i, i) = 1;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(scaled);
    const Eigen::VectorXd& w = solver.eigenvalues();
    condition = w[m - 1] > 0 ? std::max(w[0], 0.0) / w[m - 1] : 0;
    const Eigen::VectorXd inverse = w.cwiseMax(floor * w[m - 1]).cwiseSqrt().cwiseInverse();
    return scale.asDiagonal() * solver.eigenvectors() * inverse.asDiagonal();
}

}  // namespace

void dense_spectrum(const LaplacianMatrix<double>& matrix, std::vector<double>& values, std::vector<double>& vectors) {
    const auto n = matrix.nodes;
    Eigen::MatrixXd dense = Eigen::MatrixXd::Zero(n, n);
    for (std::int64_t i = 0; i < n; ++i)
        for (auto k = matrix.offsets[std::size_t(i)]; k < matrix.offsets[std::size_t(i) + 1]; ++k)
            dense(i, matrix.columns[std::size_t(k)]) = matrix.values[std::size_t(k)];
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(dense);
    values.assign(solver.eigenvalues().data(), solver.eigenvalues().data() + n);
    vectors = to_vector(solver.eigenvectors());
}

RitzResult rayleigh_ritz(const std::vector<double>& g, const std::vector<double>& h, std::int64_t m, double floor) {
    RitzResult result;
    const Matrix s = whitening(g, m, floor, result.condition);
    const View given(h.data(), m, m);
    const Eigen::MatrixXd projected = s.transpose() * (0.5 * (given + given.transpose())) * s;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(projected);
    result.theta.assign(solver.eigenvalues().data(), solver.eigenvalues().data() + m);
    result.q = to_vector(s * solver.eigenvectors());
    return result;
}

RitzResult rayleigh_ritz(const std::vector<double>& h, std::int64_t m) {
    const View given(h.data(), m, m);
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(0.5 * (given + given.transpose()));
    RitzResult result;
    result.theta.assign(solver.eigenvalues().data(), solver.eigenvalues().data() + m);
    result.q = to_vector(solver.eigenvectors());
    return result;
}

RitzResult orthonormalise(const std::vector<double>& g, std::int64_t m, double floor) {
    RitzResult result;
    result.q = to_vector(whitening(g, m, floor, result.condition));
    return result;
}

}  // namespace fiedler
