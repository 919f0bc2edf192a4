// kernels/half_panel.h: the steps of a polynomial filter (laplacian.h) on a panel of vectors that is kept in IEEE half
// precision. Gathers of rows are the bound of sparse products on graphs without locality, and a row is half as long; what
// rounding leaves, a short filter in f32 removes.
//
// A panel is [n, w] of f16, row-major and compact (ld = w), w = 8, 16 or 32; base 16-byte aligned. A block is as in
// eigen.h: [n, m] of f32, any ld (Cuda: a multiple of 4, base 16-byte aligned), m <= w.
//
//   pack       Y_ij = f16(s_j X_ij / v_i), and 0 for    s_j: the power of two that brings the largest |X_ij / v_i| of a
//              j >= m                                   column into [2^8, 2^9), 128 times below what f16 can hold and 2^22
//                                                       times above its least normal number; 1 for columns of zeros or
//                                                       with a NaN or an infinity. keep_scale: s is given. v: of `rows`,
//                                                       1 where there are none
//   unpack     X_ij = v_i Y_ij / s_j                    exact without v, j < m; Y_ij beyond what f16 can hold is an infinity
//                                                       or a NaN
//   apply      Y = alpha L X + beta X + gamma Z         L: f32 (laplacian.h), or one of HalfOperator. Y may be Z; Y must not
//                + R diag(delta)                        overlap X. Z is not read when gamma == 0, and may be absent, and so
//                                                       may R; Y must not overlap R
//   deflate    X_ij -= v_i sum_{l in c(i)} v_l X_lj     as in eigen.h; v: f32. walk: X_ij -= sum_{l in c(i)} v_l^2 X_lj,
//                                                       the same for X in units of v
//
// Graphs with equal weights need no values, half of what a product reads of the matrix. With d_i entries beside the
// diagonal in row i (each row has one there), D^-1/2 (D - A) D^-1/2 X for X = D^1/2 U is D^1/2 (U - D^-1 A U): a panel in
// units of v_i ~ sqrt(d_i) needs the mean over neighbours only.
//
// Numerics   Products and sums in f32, each device in an order of its own (deflate: pieces of kEigenDeflatePiece rows in
//            f32, these in double); every result rounded once to f16, to nearest even, subnormals kept, too large becomes
//            infinity. No atomics; bit-equal from run to run (on the CPU on any number of threads).
// Scratch    Cuda: pack half_pack_scratch(w) f32 unless keep_scale; apply laplacian_scratch_elements(pieces, w) f32 if
//            there are long rows; deflate eigen_deflate_scratch(n, w) doubles; all 16-byte aligned
#pragma once
#include <array>

#include "kernels/eigen.h"
#include "kernels/half.h"
#include "kernels/laplacian.h"

namespace fiedler {

inline constexpr std::int64_t kHalfPanelMost = 32;  // columns

// What L is in `apply`. weighted: matrix.values. Else these are not read, and the weight of every edge is 1: walk: X_i less
// the mean over i's neighbours; degree: d_i X_i less their sum. Rows without neighbours give 0.
enum class HalfOperator { weighted, walk, degree };

struct HalfPack {
    Mat<f16> y;
    Mat<const float> x;
    Vec<float> scale;  // [w], overwritten unless keep_scale
    bool keep_scale = false;
    Vec<float> scratch;          // Cuda
    Vec<const float> rows = {};  // [n] v, not 0; optional
};
struct HalfUnpack {
    Mat<float> x;
    Mat<const f16> y;
    Vec<const float> scale;      // [w]
    Vec<const float> rows = {};  // [n] v; optional
};
struct HalfApply {
    Mat<f16> y;
    Mat<const f16> x, z;  // z optional
    SparseMatrix<float> matrix = {};
    float alpha = 1, beta = 0, gamma = 0;
    Vec<float> scratch = {};  // Cuda, with long rows
    HalfOperator l = HalfOperator::weighted;
    Mat<const f16> r = {};  // optional
    std::array<float, kHalfPanelMost> delta{};
};
struct HalfDeflate {
    Mat<f16> x;
    Vec<const float> v;
    Vec<const std::int64_t> offsets;  // [components + 1]
    Vec<double> scratch;              // Cuda
    bool walk = false;
};

inline constexpr std::int64_t kHalfPackBlocks = 256;
inline std::int64_t half_pack_scratch(std::int64_t w) { return kHalfPackBlocks * w; }
// The narrowest panel for m columns, at most 32 of them.
inline std::int64_t half_panel_width(std::int64_t m) { return m <= 8 ? 8 : m <= 16 ? 16 : 32; }

// s_j as the bits of an f32, from the largest |X_ij|, also as bits: so NaN comes after infinity. An exponent of 2^126 at
// most: then 1 / s_j is a normal number, too.
FIEDLER_HD constexpr std::uint32_t half_scale_bits(std::uint32_t largest) {
    const std::uint32_t exponent = largest >> 23;
    if (largest == 0 || exponent == 255) return 127u << 23;
    return (exponent < 9 ? 253u : 262u - exponent) << 23;
}

// A row of `entries` in apply: own * X_i + sum * (the sum over its entries, by their values or all alike).
struct HalfRow {
    float own, sum;
};
FIEDLER_HD inline HalfRow half_row(HalfOperator l, float alpha, float beta, std::int64_t entries) {
    if (l == HalfOperator::weighted) return {beta, alpha};
    const float d = float(entries - 1);  // the sum has the diagonal's X_i, too
    if (l == HalfOperator::degree) return {beta + alpha * (d + 1), -alpha};
    return d > 0 ? HalfRow{beta + alpha * (1 + 1 / d), -alpha / d} : HalfRow{beta, 0};
}

template <class T>
bool is_half_panel(const Mat<T>& m, std::int64_t rows) {
    return (m.cols == 8 || m.cols == 16 || m.cols == 32) && is_shape(m, rows, m.cols) && m.ld == m.cols &&
           is_aligned16(m);
}
inline void check(const HalfPack& p) {
    FIEDLER_REQUIRE("half_panel", is_half_panel(p.y, p.x.rows) && is_shape(p.scale, p.y.cols));
    FIEDLER_REQUIRE("half_panel", is_shape(p.x, p.x.rows, p.x.cols) && p.x.cols >= 1 && p.x.cols <= p.y.cols);
    FIEDLER_REQUIRE("half_panel", !p.rows || is_shape(p.rows, p.x.rows));
}
inline void check(const HalfUnpack& p) {
    FIEDLER_REQUIRE("half_panel", is_half_panel(p.y, p.x.rows) && is_shape(p.scale, p.y.cols));
    FIEDLER_REQUIRE("half_panel", is_shape(p.x, p.x.rows, p.x.cols) && p.x.cols >= 1 && p.x.cols <= p.y.cols);
    FIEDLER_REQUIRE("half_panel", !p.rows || is_shape(p.rows, p.x.rows));
}
inline void check(const HalfApply& p) {
    const auto n = p.matrix.rows;
    FIEDLER_REQUIRE("half_panel", n >= 1 && is_shape(p.matrix.offsets, n + 1));
    FIEDLER_REQUIRE("half_panel", p.l != HalfOperator::weighted || p.matrix.columns.size == p.matrix.values.size);
    FIEDLER_REQUIRE("half_panel", is_half_panel(p.x, n) && is_half_panel(p.y, n) && p.x.cols == p.y.cols);
    FIEDLER_REQUIRE("half_panel", p.gamma == 0 || (is_half_panel(p.z, n) && p.z.cols == p.x.cols));
    FIEDLER_REQUIRE("half_panel", p.x.data != p.y.data && (!p.z || p.z.data != p.x.data));
    FIEDLER_REQUIRE("half_panel", !p.r || (is_half_panel(p.r, n) && p.r.cols == p.x.cols && p.r.data != p.y.data));
}
inline void check(const HalfDeflate& p) {
    FIEDLER_REQUIRE("half_panel", is_half_panel(p.x, p.x.rows) && is_shape(p.v, p.x.rows));
    FIEDLER_REQUIRE("half_panel", p.offsets.data && p.offsets.size >= 2);
}

inline Traffic traffic(const HalfPack& p) {
    const double n = double(p.x.rows), m = double(p.x.cols);
    return {(p.keep_scale ? 4 : 8) * n * m + 2 * n * double(p.y.cols), (p.keep_scale ? 1 : 2) * n * m};
}
inline Traffic traffic(const HalfUnpack& p) {
    const double n = double(p.x.rows), m = double(p.x.cols);
    return {4 * n * m + 2 * n * double(p.y.cols), n * m};
}
inline Traffic traffic(const HalfApply& p) {
    const double n = double(p.matrix.rows), w = double(p.x.cols), e = double(p.matrix.columns.size);
    const double panels = 2 + (p.gamma == 0 ? 0 : 1) + (p.r ? 1 : 0), entry = p.l == HalfOperator::weighted ? 8 : 4;
    return {8 * n + entry * e + 2 * panels * n * w, 2 * e * w + 2 * (panels - 1) * n * w};
}
inline Traffic traffic(const HalfDeflate& p) {
    const double e = double(p.x.rows) * double(p.x.cols);
    return {4 * e + 4 * double(p.x.rows), 4 * e};
}

void half_pack(const Cpu&, const HalfPack&);
void half_unpack(const Cpu&, const HalfUnpack&);
void half_apply(const Cpu&, const HalfApply&);
void half_deflate(const Cpu&, const HalfDeflate&);
void half_pack(const Cuda&, const HalfPack&);
void half_unpack(const Cuda&, const HalfUnpack&);
void half_apply(const Cuda&, const HalfApply&);
void half_deflate(const Cuda&, const HalfDeflate&);

}  // namespace fiedler
