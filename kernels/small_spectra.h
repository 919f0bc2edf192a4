// kernels/small_spectra.h: eigenpairs of many small symmetric matrices in one call: all of them, or the k smallest.
//
//   A_g x_j = mu_j x_j,   mu_0 <= mu_1 <= ...,   for every graph g of a packed batch (molecules, boards, ego networks)
//
// A graph has 0 to 512 nodes; graphs of any sizes may be mixed. The matrix is any symmetric one: a Laplacian
// (combinatorial or normalised), with or without weights; connected or not.
//
// Shapes     graphs: G. Graph g owns nodes [node_offsets[g], node_offsets[g + 1]) of the packed axis of `nodes` nodes
//            (Packed::offsets, as the transformer takes them), n_g of them.
//            row_offsets: [nodes + 1] into columns and matrix; columns count from the graph's own first node, in
//            [0, n_g), in any order; equal ones in a row are added up; the diagonal is an entry like any other.
//            values: [G, k]; vectors: [nodes, k], absent: eigenvalues only. k >= 1 as the caller wants; all pairs: k is
//            the largest n_g. Column j of the rows of g is x_j, unit length.
// Padding    A graph with n_g < k has no pairs n_g .. k - 1: its values there are `filler`, its vectors 0.
// Status     per graph: kSmallSpectraDone; kSmallSpectraStopped: kSmallSpectraSweeps sweeps were not enough (the pairs are
//            written, residual says how good they are); kSmallSpectraInvalid: an entry not finite or a column out of
//            range (values, vectors and residual of the graph are NaN, padding as ever; other graphs are not touched).
//            residual: [G], max_j ||A x_j - mu_j x_j|| over the pairs written, as computed there.
// Signs      The component of largest magnitude is positive (the first of equals). The basis of a repeated eigenvalue is
//            an orthonormal one, the same in every run and whatever else is in the batch; the Cpu's is another one.
// Numerics   Cuda: one-sided Jacobi (Hestenes 1958) in f32 on B = A + c I, c from Gershgorin's bounds so that B is
//            positive definite (condition at most 5): B V = U S then has U = V, and no product of rotations is kept.
//            Eigenvalues are Rayleigh quotients of the vectors. Errors relative to the norm (or half the largest row sum of
//            magnitudes, where that is more: never for a Laplacian), as measured: eigenvalues
//            about 1e-7 (2e-6 at worst: complete graph), residuals 1e-6 (n <= 64) to 4e-6 (n = 512), orthogonality 5e-7.
//            A matrix whose Gershgorin interval is shorter than 2^-100 counts as a multiple of the identity.
//            Cpu: Eigen's SelfAdjointEigenSolver (tridiagonal QL) in double, rounded to A; the lower triangle only.
//            Bit-equal from run to run, on any number of threads.
// Asymmetry  is not looked for: of a matrix that is not symmetric the result means nothing; residual tells.
// Cuda       `order` and `first` are those of small_spectra_order(), made on the host from the sizes, once per batch;
//            order is uploaded by the caller. scratch: small_spectra_scratch_elements(first), needed (and looked at) only
//            when a graph has more than 64 nodes. At most 73 KiB of shared memory a block.
#pragma once
#include <array>
#include <vector>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"

namespace fiedler {

inline constexpr std::int32_t kSmallSpectraMaxNodes = 512;
inline constexpr int kSmallSpectraSweeps = 40;
inline constexpr std::int32_t kSmallSpectraDone = 0, kSmallSpectraStopped = 1, kSmallSpectraInvalid = 2;

// Size classes: a graph belongs to the first that holds it. Up to kSmallSpectraWarpNodes a warp takes one graph or
// several at a time, in registers; above, a block takes one, in scratch memory.
inline constexpr int kSmallSpectraClasses = 16;
inline constexpr std::array<std::int32_t, kSmallSpectraClasses> kSmallSpectraClassNodes = {
    4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 128, 256, 384, 512};
inline constexpr std::int32_t kSmallSpectraWarpNodes = 64;

// Class c is graphs[first[c]] .. graphs[first[c + 1] - 1], in the order of the batch.
using SmallSpectraClasses = std::array<std::int64_t, kSmallSpectraClasses + 1>;
struct SmallSpectraOrder {
    std::vector<std::int32_t> graphs;
    SmallSpectraClasses first{};
};
// node_offsets: [graphs + 1] on the host. ContractError: offsets that fall, or a graph of more than 512 nodes.
SmallSpectraOrder small_spectra_order(const std::int32_t* node_offsets, std::int64_t graphs);  // small_spectra_cpu.cpp

// Blocks of a class that run at once, each with a matrix of its own, whatever the device.
inline constexpr std::int64_t small_spectra_slots(std::int64_t class_nodes) {
    return class_nodes <= 128 ? 528 : class_nodes <= 256 ? 320 : 160;
}
inline std::int64_t small_spectra_scratch_elements(const SmallSpectraClasses& first) {
    std::int64_t most = 0;
    for (std::size_t c = 0; c < kSmallSpectraClasses; ++c) {
        const std::int64_t side = kSmallSpectraClassNodes[c], count = first[c + 1] - first[c];
        if (side <= kSmallSpectraWarpNodes) continue;
        const std::int64_t slots = small_spectra_slots(side), here = (count < slots ? count : slots) * side * side;
        if (here > most) most = here;
    }
    return most;
}

template <class A>
struct SmallSpectra {
    Mat<A> values, vectors;  // vectors optional
    Vec<A> residual;
    Vec<std::int32_t> status;
    Vec<const std::int32_t> node_offsets;  // [G + 1]
    Vec<const std::int64_t> row_offsets;   // [nodes + 1]
    Vec<const std::int32_t> columns;
    Vec<const A> matrix;
    A filler = 0;
    Vec<const std::int32_t> order;  // Cuda
    SmallSpectraClasses first{};    // Cuda
    Vec<A> scratch;                 // Cuda
};

template <class A>
void check(const SmallSpectra<A>& p) {
    const auto graphs = p.node_offsets.size - 1, nodes = p.row_offsets.size - 1, k = p.values.cols;
    FIEDLER_REQUIRE("small_spectra", p.node_offsets.data && p.row_offsets.data && graphs >= 1 && nodes >= 0);
    FIEDLER_REQUIRE("small_spectra", k >= 1 && is_shape(p.values, graphs, k));
    FIEDLER_REQUIRE("small_spectra", !p.vectors || is_shape(p.vectors, nodes, k));
    FIEDLER_REQUIRE("small_spectra", is_shape(p.residual, graphs) && is_shape(p.status, graphs));
    FIEDLER_REQUIRE("small_spectra", p.columns.size == p.matrix.size);
}
// cubes: the sum of n_g^3. flops: 9 n^3 a graph, those of all eigenpairs by tridiagonal QR (Golub and Van Loan, 8.3).
template <class A>
Traffic traffic(const SmallSpectra<A>& p, double cubes) {
    const double g = double(p.values.rows), nodes = double(p.row_offsets.size - 1), k = double(p.values.cols);
    const double read = 4 * (g + 1) + 8 * (nodes + 1) + (4 + sizeof(A)) * double(p.columns.size);
    return {read + sizeof(A) * k * (g + (p.vectors ? nodes : 0)) + (4 + sizeof(A)) * g, 9 * cubes};
}

// The order in which 2 * pairs columns meet, each pair once in 2 * pairs - 1 rounds (the circle method): in `round` the
// columns first and second of `pair` meet.
struct SmallSpectraMeeting {
    int first, second;
};
FIEDLER_HD constexpr SmallSpectraMeeting small_spectra_meeting(int pairs, int round, int pair) {
    const int circle = 2 * pairs - 1;
    if (pair == 0) return {round, circle};
    return {(round + pair) % circle, (round - pair + circle) % circle};
}

template <class A>  // float, double
void small_spectra(const Cpu&, const SmallSpectra<A>&);
void small_spectra(const Cuda&, const SmallSpectra<float>&);

}  // namespace fiedler
