// kernels/matmul.h: the three matrix products of a linear layer y = x W'. With knn.h, what knows cuBLASLt.
//
//   forward    y  = [residual +] x W'        optionally max(., 0) on the result (relu)
//   dx         dx = [dx +] dy W
//   dw         dW += dy' x
//   fp8        y  = [y +] a b' times *scale, of 8-bit floats (fp8.h); on sm_90 and what cuBLASLt knows them on
//
// Shapes     x, dx: [rows, in] T; W: [out, in] T; y, dy: [rows, out]; dW: [out, in] acc_t<T>. Row-major, any ld;
//            on Cuda data and row strides 16-byte aligned. y is of type O: T, or acc_t<T> (scalars, gates).
//            fp8: a: [m, k] e5m2; b: [n, k] e4m3; y: [m, n] bf16 or float; m, n and k multiples of 16, and all strides;
//            scale: one float on the device, at a multiple of 16 bytes, or absent: 1.
// Writes     y overwritten; residual (optional, same shape and type as y) may be y itself or another matrix.
//            dx overwritten, or accumulated when `accumulate`; must not alias dy. dW always accumulated (+=).
// Numerics   products of T, sums in acc_t<T>, one rounding to the output type after the epilogue
//            (Cuda: a product of one row may be rounded to it once more before the addend comes in).
//            Cuda: cuBLASLt, algorithm chosen once per shape and kept: by its heuristic or, of those that give the same
//            bits as the heuristic's choice, by time (at the first call, outside a recording). Bit-equal from run to run.
//            Cuda's workspace is used where a sum is split, or it is faster so; without one (0 bytes) it is not.
//            Cuda: a thin dW (fewer than 16 rows), and one whose rows or columns are no multiple of 8, is summed in up to 64 equal
//            pieces of the rows, in f32 in the workspace, which are then added in the order of the rows; how many depends on
//            shape, strides and device alone. Of dy and x, columns up to the next multiple of 8 may be read, within the
//            stride; what is there, NaN or not, does not matter.
//            fp8: products are exact; sm_90's tensor cores add with some 14 bits of mantissa, and their sums are added to
//            f32 every few steps, unless `fast_sums`.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/fp8.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T, class O = T>
struct MatmulForward {
    Mat<O> y;
    Mat<const T> x, w;
    Mat<const O> residual = {};  // optional
    bool relu = false;
};
template <class T>
struct MatmulDx {
    Mat<T> dx;
    Mat<const T> dy, w;
    bool accumulate = false;
};
template <class T>
struct MatmulDw {
    Mat<acc_t<T>> dw;
    Mat<const T> dy, x;
};
template <class O>
struct MatmulFp8 {
    Mat<O> y;
    Mat<const e5m2> a;
    Mat<const e4m3> b;
    Vec<const float> scale = {};  // optional
    bool accumulate = false;
    bool fast_sums = false;
};

template <class T, class O>
void check(const MatmulForward<T, O>& p) {
    FIEDLER_REQUIRE("matmul", is_shape(p.x, p.x.rows, p.w.cols) && is_shape(p.w, p.w.rows, p.w.cols));
    FIEDLER_REQUIRE("matmul", is_shape(p.y, p.x.rows, p.w.rows));
    FIEDLER_REQUIRE("matmul", !p.residual || is_shape(p.residual, p.x.rows, p.w.rows));
}
template <class T>
void check(const MatmulDx<T>& p) {
    FIEDLER_REQUIRE("matmul", is_shape(p.dy, p.dy.rows, p.w.rows) && is_shape(p.w, p.w.rows, p.w.cols));
    FIEDLER_REQUIRE("matmul", is_shape(p.dx, p.dy.rows, p.w.cols));
}
template <class T>
void check(const MatmulDw<T>& p) {
    FIEDLER_REQUIRE("matmul", is_shape(p.dy, p.dy.rows, p.dw.rows) && is_shape(p.x, p.dy.rows, p.dw.cols));
    FIEDLER_REQUIRE("matmul", is_shape(p.dw, p.dw.rows, p.dw.cols));
}
template <class O>
void check(const MatmulFp8<O>& p) {
    const std::int64_t m = p.a.rows, n = p.b.rows, k = p.a.cols;
    FIEDLER_REQUIRE("matmul", is_shape(p.a, m, k) && is_shape(p.b, n, k) && is_shape(p.y, m, n));
    FIEDLER_REQUIRE("matmul", m % 16 == 0 && n % 16 == 0 && k % 16 == 0 && k > 0 && p.y.ld % 16 == 0);
    FIEDLER_REQUIRE("matmul", is_aligned16(p.a) && is_aligned16(p.b) && is_aligned16(p.y));
    FIEDLER_REQUIRE("matmul", !p.scale || (p.scale.size == 1 && std::uintptr_t(p.scale.data) % 16 == 0));
}

template <class T, class O>
Traffic traffic(const MatmulForward<T, O>& p) {
    const double m = double(p.x.rows), k = double(p.x.cols), n = double(p.w.rows);
    return {(m * k + n * k) * sizeof(T) + (p.residual ? 2 : 1) * m * n * sizeof(O), 2 * m * n * k};
}
template <class T>
Traffic traffic(const MatmulDx<T>& p) {
    const double m = double(p.dy.rows), n = double(p.dy.cols), k = double(p.w.cols);
    return {(m * n + n * k + (p.accumulate ? 2 : 1) * m * k) * sizeof(T), 2 * m * n * k};
}
template <class T>
Traffic traffic(const MatmulDw<T>& p) {
    const double m = double(p.dy.rows), n = double(p.dy.cols), k = double(p.x.cols);
    return {(m * n + m * k) * sizeof(T) + 2 * n * k * sizeof(acc_t<T>), 2 * m * n * k};
}
template <class O>
Traffic traffic(const MatmulFp8<O>& p) {
    const double m = double(p.a.rows), n = double(p.b.rows), k = double(p.a.cols);
    return {(m + n) * k + (p.accumulate ? 2 : 1) * m * n * sizeof(O), 2 * m * n * k};
}

template <class T>  // float, double
void matmul_forward(const Cpu&, const MatmulForward<T, T>&);
template <class T>
void matmul_dx(const Cpu&, const MatmulDx<T>&);
template <class T>
void matmul_dw(const Cpu&, const MatmulDw<T>&);
void matmul_forward(const Cuda&, const MatmulForward<bf16, bf16>&);
void matmul_forward(const Cuda&, const MatmulForward<bf16, float>&);
void matmul_dx(const Cuda&, const MatmulDx<bf16>&);
void matmul_dw(const Cuda&, const MatmulDw<bf16>&);
void matmul_fp8(const Cuda&, const MatmulFp8<bf16>&);
void matmul_fp8(const Cuda&, const MatmulFp8<float>&);

// For benchmarks, which ask how good the choice above is: the same product by algorithm k of kMatmulAlgorithms. First
// come those among which it is made, in their order: cuBLASLt's proposals without a workspace, then those with one; where
// a sum is best split, only these. The last kMatmulPieceCounts are dW in 2, 4, 8, ... pieces. False:
// there is no algorithm k for it, or it cannot run; nothing was computed. P: any problem of the Cuda functions above.
inline constexpr int kMatmulAlgorithms = 70, kMatmulPieceCounts = 6;
template <class P>
bool matmul_by_algorithm(const Cuda&, const P&, int k);

}  // namespace fiedler
