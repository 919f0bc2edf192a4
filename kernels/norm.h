// kernels/norm.h: RMS normalisation without gain (Zhang & Sennrich 2019), fused with the residual path going backward.
//
//   forward    r_i = 1 / sqrt(mean_c x_ic^2 + eps)                     y = x r
//   backward   dx = dresidual + r (dy - x r^2 mean_c(dy_c x_c))        (dresidual absent: that term is 0)
//
// Shapes     x, y, dx, dy, dresidual: [tokens, channels] T, row-major; on Cuda rows 16-byte aligned, channels % 8 == 0
//            rstd: [tokens] acc_t<T>
// Writes     y, rstd, dx overwritten. dx may alias dresidual or dy; y may not alias x.
// Numerics   sums in acc_t<T>, fixed order: bit-equal from run to run.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct NormForward {
    Mat<T> y;
    Vec<acc_t<T>> rstd;
    Mat<const T> x;
    acc_t<T> eps = acc_t<T>(1e-6);
};

template <class T>
struct NormBackward {
    Mat<T> dx;
    Mat<const T> dy, x;
    Vec<const acc_t<T>> rstd;
    Mat<const T> dresidual;  // optional
};

template <class T>
void check(const NormForward<T>& p) {
    FIEDLER_REQUIRE("norm", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.y, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("norm", is_shape(p.rstd, p.x.rows));
}
template <class T>
void check(const NormBackward<T>& p) {
    FIEDLER_REQUIRE("norm", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.dy, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("norm", is_shape(p.dx, p.x.rows, p.x.cols) && is_shape(p.rstd, p.x.rows));
    FIEDLER_REQUIRE("norm", !p.dresidual || is_shape(p.dresidual, p.x.rows, p.x.cols));
}

template <class T>
Traffic traffic(const NormForward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {2 * n * sizeof(T) + double(p.x.rows) * sizeof(acc_t<T>), 3 * n};
}
template <class T>
Traffic traffic(const NormBackward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {(p.dresidual ? 4 : 3) * n * sizeof(T) + double(p.x.rows) * sizeof(acc_t<T>), 6 * n};
}

template <class T>  // float, double
void norm_forward(const Cpu&, const NormForward<T>&);
template <class T>
void norm_backward(const Cpu&, const NormBackward<T>&);
void norm_forward(const Cuda&, const NormForward<bf16>&);
void norm_backward(const Cuda&, const NormBackward<bf16>&);

}  // namespace fiedler
