// kernels/small_spectra_cpu.cpp: eigenpairs of many small matrices on the CPU (contract in small_spectra.h).
#include "kernels/small_spectra.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/parallel.h"

namespace fiedler {

namespace {
using Dense = Eigen::MatrixXd;  // for float, too: QL in float loses ten times as much as the Jacobi method of the GPU

std::size_t class_of(std::int32_t nodes) {
    const auto at = std::lower_bound(kSmallSpectraClassNodes.begin(), kSmallSpectraClassNodes.end(), nodes);
    return static_cast<std::size_t>(at - kSmallSpectraClassNodes.begin());
}
void check_sizes(const std::int32_t* node_offsets, std::int64_t graphs) {
    for (std::int64_t g = 0; g < graphs; ++g) {
        const std::int64_t nodes = std::int64_t(node_offsets[g + 1]) - node_offsets[g];
        FIEDLER_REQUIRE("small_spectra", nodes >= 0 && nodes <= kSmallSpectraMaxNodes);
    }
}

// False: an entry that is not finite, or out of range.
template <class A>
bool read_matrix(const SmallSpectra<A>& p, std::int64_t node, std::int64_t n, Dense& dense) {
    dense.setZero(n, n);
    for (std::int64_t i = 0; i < n; ++i)
        for (auto e = p.row_offsets.data[node + i]; e < p.row_offsets.data[node + i + 1]; ++e) {
            const std::int32_t column = p.columns.data[e];
            if (column < 0 || column >= n || !std::isfinite(p.matrix.data[e])) return false;
            dense(i, column) += double(p.matrix.data[e]);
        }
    return dense.allFinite();
}

template <class V>
void fix_sign(V& x) {
    Eigen::Index largest = 0;
    for (Eigen::Index i = 1; i < x.size(); ++i)
        if (std::abs(x[i]) > std::abs(x[largest])) largest = i;
    if (x[largest] < 0) x = -x;
}

// Columns [first, k) of the graph's rows.
template <class A>
void fill(const SmallSpectra<A>& p, std::int64_t g, std::int64_t first, std::int64_t last, A value, A component) {
    std::fill(p.values.row(g) + first, p.values.row(g) + last, value);
    if (!p.vectors) return;
    for (std::int64_t i = p.node_offsets.data[g]; i < p.node_offsets.data[g + 1]; ++i)
        std::fill(p.vectors.row(i) + first, p.vectors.row(i) + last, component);
}

template <class A>
void solve_graph(const SmallSpectra<A>& p, std::int64_t g) {
    const std::int64_t node = p.node_offsets.data[g], n = p.node_offsets.data[g + 1] - node, k = p.values.cols;
    const std::int64_t pairs = std::min(n, k);
    fill(p, g, pairs, k, p.filler, A(0));
    p.status.data[g] = kSmallSpectraDone;
    p.residual.data[g] = 0;
    if (n == 0) return;
    Dense dense;
    if (!read_matrix(p, node, n, dense)) {
        constexpr A nan = std::numeric_limits<A>::quiet_NaN();
        fill(p, g, 0, pairs, nan, nan);
        p.status.data[g] = kSmallSpectraInvalid;
        p.residual.data[g] = nan;
        return;
    }
    const Eigen::SelfAdjointEigenSolver<Dense> solver(dense);
    if (solver.info() != Eigen::Success) p.status.data[g] = kSmallSpectraStopped;
    for (std::int64_t j = 0; j < pairs; ++j) {
        Eigen::Matrix<A, Eigen::Dynamic, 1> x = solver.eigenvectors().col(j).cast<A>();
        const A mu = static_cast<A>(solver.eigenvalues()[j]);
        fix_sign(x);
        const A off =
            static_cast<A>((dense * x.template cast<double>() - double(mu) * x.template cast<double>()).norm());
        p.residual.data[g] = std::max(p.residual.data[g], off);
        p.values.row(g)[j] = mu;
        if (!p.vectors) continue;
        for (std::int64_t i = 0; i < n; ++i) p.vectors.row(node + i)[j] = x[i];
    }
}
}  // namespace

SmallSpectraOrder small_spectra_order(const std::int32_t* node_offsets, std::int64_t graphs) {
    check_sizes(node_offsets, graphs);
    SmallSpectraOrder order;
    for (std::int64_t g = 0; g < graphs; ++g) ++order.first[class_of(node_offsets[g + 1] - node_offsets[g]) + 1];
    for (std::size_t c = 0; c < kSmallSpectraClasses; ++c) order.first[c + 1] += order.first[c];
    SmallSpectraClasses next = order.first;
    order.graphs.resize(static_cast<std::size_t>(graphs));
    for (std::int64_t g = 0; g < graphs; ++g) {
        const std::size_t c = class_of(node_offsets[g + 1] - node_offsets[g]);
        order.graphs[static_cast<std::size_t>(next[c]++)] = static_cast<std::int32_t>(g);
    }
    return order;
}

template <class A>
void small_spectra(const Cpu& d, const SmallSpectra<A>& p) {
    check(p);
    const std::int64_t graphs = p.values.rows;
    check_sizes(p.node_offsets.data, graphs);
    parallel_for_uneven(d, graphs, [&](std::int64_t g) { solve_graph(p, g); });
}

template void small_spectra(const Cpu&, const SmallSpectra<float>&);
template void small_spectra(const Cpu&, const SmallSpectra<double>&);

}  // namespace fiedler
