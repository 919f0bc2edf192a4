// kernels/mlp.h: the hidden values of the MLP, ReLU^2 (So et al. 2021), with the products that they come from.
//
//   forward    h = max(x W1', 0)^2
//   backward   du = (dy W2) 2 sqrt(h)        the gradient of x W1', where y = h W2'
//
// Only h is kept for the backward pass: max(u, 0) = sqrt(h).
//
// Shapes     x: [n, C], dy: [n, C] T; W1: [M, C], W2: [C, M] T; h, du: [n, M] T. Row-major, any ld; on Cuda data and row
//            strides 16-byte aligned.
// Writes     h, du overwritten; du must not alias dy, W2 or h.
// Numerics   products of T, sums in acc_t<T>, one rounding to T. A NaN stays a NaN. h so small that it is subnormal may
//            count as 0 in du.
//            Cuda, sm_90, C a multiple of 64 up to 768, M a multiple of 8 and some rows: one kernel (mlp_sm90.cu).
//            Otherwise a product of matmul.h, rounded to bf16, and an elementwise kernel on it: x W1' and dy W2 are
//            rounded once more. Which of them depends on shape and device alone; both are bit-equal from run to run.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct MlpForward {
    Mat<T> h;
    Mat<const T> x, w;
};
template <class T>
struct MlpBackward {
    Mat<T> du;
    Mat<const T> dy, w, h;
};

template <class T>
void check(const MlpForward<T>& p) {
    FIEDLER_REQUIRE("mlp", is_shape(p.x, p.x.rows, p.w.cols) && is_shape(p.w, p.w.rows, p.w.cols));
    FIEDLER_REQUIRE("mlp", is_shape(p.h, p.x.rows, p.w.rows));
}
template <class T>
void check(const MlpBackward<T>& p) {
    FIEDLER_REQUIRE("mlp", is_shape(p.dy, p.dy.rows, p.w.rows) && is_shape(p.w, p.w.rows, p.w.cols));
    FIEDLER_REQUIRE("mlp", is_shape(p.h, p.dy.rows, p.w.cols) && is_shape(p.du, p.dy.rows, p.w.cols));
    FIEDLER_REQUIRE("mlp", p.du.data != p.h.data);
}
template <class T>
Traffic traffic(const MlpForward<T>& p) {
    const double n = double(p.x.rows), c = double(p.x.cols), m = double(p.w.rows);
    return {(n * c + m * c + n * m) * sizeof(T), 2 * n * m * c + n * m};
}
template <class T>
Traffic traffic(const MlpBackward<T>& p) {
    const double n = double(p.dy.rows), c = double(p.dy.cols), m = double(p.w.cols);
    return {(n * c + m * c + 2 * n * m) * sizeof(T), 2 * n * m * c + 3 * n * m};
}

template <class T>  // float, double
void mlp_forward(const Cpu&, const MlpForward<T>&);
template <class T>
void mlp_backward(const Cpu&, const MlpBackward<T>&);
void mlp_forward(const Cuda&, const MlpForward<bf16>&);
void mlp_backward(const Cuda&, const MlpBackward<bf16>&);

// For tests and benchmarks: the same by one way alone. False: it does not take this problem here; nothing was computed.
enum class MlpPath { general, sm90 };
bool mlp_by_path(const Cuda&, const MlpForward<bf16>&, MlpPath);
bool mlp_by_path(const Cuda&, const MlpBackward<bf16>&, MlpPath);

}  // namespace fiedler
