// kernels/laplacian.h: products of a sparse symmetric matrix (CSR) with a block of vectors, fused with the three-term
// recurrence of a polynomial filter.
//
//   Y = alpha L X + beta X + gamma Z
//
// With alpha = 1, beta = gamma = 0: the plain product. Chebyshev filter on [lo, hi], c = (lo + hi) / 2, e = (hi - lo) / 2
// (Zhou, Saad, Tiago, Chelikowsky 2006): Y_1 = (s_1 / e) (L - c) X, Y_{j+1} = (2 s_{j+1} / e) (L - c) Y_j
// - s_j s_{j+1} Y_{j-1}: one call each, with Z = Y_{j-1} overwritten by Y_{j+1}.
//
// Shapes     L: [n, n] CSR, int64 offsets, int32 columns in [0, n), values A; X, Y, Z: [n, m] A, row-major, any m >= 1;
//            ld a multiple of 4 and base 16-byte aligned (Cuda; column panels of a wider block that begin at a multiple
//            of 4)
// Aliasing   Y may be Z (same base and ld); Y must not overlap X; Z must not overlap X
// Writes     Y overwritten. Z is not read when gamma == 0, and may be absent.
// Numerics   f32: sums in CSR order over runs of kLaplacianRun entries, then over the runs (else many small entries, each
//            rounded away beside a large one, would leave an error of a few 1e-6, and nearly equal eigenvalues apart);
//            Cuda: so within a piece of at most kLaplacianPiece entries, pieces added in a fixed order. Cpu in double: in
//            CSR order. Bit-equal from run to run, on any number of threads and at any panel but that of 8 columns, which
//            sums every fourth entry (of a piece: every 16th) in runs of 4, then these sums.
// Panels     Cuda works through the columns a panel at a time, reading the matrix once a panel: 128 columns, or fewer if
//            asked. Narrow panels pay for graphs without locality when a panel of X fits in the L2 cache and X does not;
//            8 columns best of all where X has no others (ld = 8).
// Long rows  Hubs of power-law graphs are cut into pieces, so that one row does not hold up the card: LongRows, made once
//            per matrix on the host, uploaded by the caller. Cuda needs scratch for their partial sums.
#pragma once
#include <vector>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"

namespace fiedler {

inline constexpr std::int64_t kLaplacianPiece = 512;
inline constexpr std::int64_t kLaplacianRun = 8;

// Rows of more than kLaplacianPiece entries: row rows[r] owns pieces [first[r], first[r + 1]); piece p covers the CSR
// entries [begin[p], begin[p] + kLaplacianPiece) as far as the row goes.
struct LongRows {
    std::vector<std::int32_t> rows;   // [R]
    std::vector<std::int32_t> first;  // [R + 1]
    std::vector<std::int64_t> begin;  // [P]
    std::vector<std::int64_t> end;    // [P]
};
LongRows find_long_rows(const std::int64_t* offsets, std::int64_t rows);  // laplacian_cpu.cpp

struct LongRowsView {
    Vec<const std::int32_t> rows, first;
    Vec<const std::int64_t> begin, end;
};

template <class A>
struct SparseMatrix {
    std::int64_t rows = 0;
    Vec<const std::int64_t> offsets;  // [rows + 1]
    Vec<const std::int32_t> columns;
    Vec<const A> values;
    LongRowsView long_rows;  // Cuda: of this matrix; empty views when it has none. Cpu: not read
};

template <class A>
struct LaplacianApply {
    Mat<A> y;
    Mat<const A> x, z;  // z optional
    SparseMatrix<A> matrix;
    A alpha = 1, beta = 0, gamma = 0;
    Vec<A> scratch;          // Cuda, with long rows: laplacian_scratch_elements(); 16-byte aligned
    std::int64_t panel = 0;  // Cuda: columns of a panel: 8, 16, 32, 64 or 128; 0: 128
};
inline std::int64_t laplacian_scratch_elements(std::int64_t pieces, std::int64_t columns) {
    return pieces * ((columns + 3) / 4 * 4);
}

template <class A>
void check(const LaplacianApply<A>& p) {
    const auto n = p.matrix.rows, m = p.x.cols;
    FIEDLER_REQUIRE("laplacian", n >= 1 && m >= 1 && is_shape(p.matrix.offsets, n + 1));
    FIEDLER_REQUIRE("laplacian", p.matrix.columns.size == p.matrix.values.size);
    FIEDLER_REQUIRE("laplacian", is_shape(p.x, n, m) && is_shape(p.y, n, m));
    FIEDLER_REQUIRE("laplacian", p.gamma == A(0) || is_shape(p.z, n, m));
    FIEDLER_REQUIRE("laplacian", p.x.data != p.y.data && (!p.z || p.z.data != p.x.data));
}
template <class A>
Traffic traffic(const LaplacianApply<A>& p) {
    const double n = double(p.matrix.rows), m = double(p.x.cols), e = double(p.matrix.columns.size);
    const double blocks = p.gamma == A(0) ? 2 : 3;
    return {8 * n + e * (4 + sizeof(A)) + blocks * n * m * sizeof(A), 2 * e * m + (p.gamma == A(0) ? 2 : 4) * n * m};
}

template <class A>  // float, double
void laplacian_apply(const Cpu&, const LaplacianApply<A>&);
void laplacian_apply(const Cuda&, const LaplacianApply<float>&);

}  // namespace fiedler
