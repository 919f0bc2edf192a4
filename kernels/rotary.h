// kernels/rotary.h: RMS norm per head (QK-norm, no gain) and rotary position embedding (Su et al. 2021), both optional.
//
//   n = normalise ? x / sqrt(mean_d x_d^2 + eps) : x             per head, over its D values
//   y = rotate ? rotate(n, pos) : n                              pos_i = i - begin(i) + position_offset
//   rotation, half-split: for d < D/2, angle = pos theta^(-2d/D):
//     y_d = n_d cos + n_{d+D/2} sin            y_{d+D/2} = - n_d sin + n_{d+D/2} cos
//   backward   dn = rotation transposed of dy;   dx = normalise ? r (dn - x r^2 mean_d(dn_d x_d)) : dn
//              with r = 1 / sqrt(mean_d x_d^2 + eps)
//
// Shapes     x, y, dx, dy: [tokens, heads D] T, any ld (16-byte aligned rows on Cuda); D even, on Cuda in {16, 32, 64,
//            128}
// Writes     y, dx overwritten. y may alias x, dx may alias dy.
// Numerics   acc_t<T>; on Cuda angles are f32 and reduced by sincosf itself (not the fast approximation).
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct RotaryForward {
    Mat<T> y;
    Mat<const T> x;
    Packed seq;
    std::int32_t heads = 1, position_offset = 0;
    bool normalise = true, rotate = true;
    acc_t<T> theta = acc_t<T>(10000), eps = acc_t<T>(1e-6);
};
template <class T>
struct RotaryBackward {
    Mat<T> dx;
    Mat<const T> dy, x;
    Packed seq;
    std::int32_t heads = 1, position_offset = 0;
    bool normalise = true, rotate = true;
    acc_t<T> theta = acc_t<T>(10000), eps = acc_t<T>(1e-6);
};

template <class P>
void check_rotary(const P& p) {
    FIEDLER_REQUIRE("rotary", p.heads > 0 && p.x.cols % (2 * p.heads) == 0 && is_packing(p.seq, p.x.rows));
    FIEDLER_REQUIRE("rotary", p.theta > 0 && is_shape(p.x, p.x.rows, p.x.cols));
}
template <class T>
void check(const RotaryForward<T>& p) {
    check_rotary(p);
    FIEDLER_REQUIRE("rotary", is_shape(p.y, p.x.rows, p.x.cols));
}
template <class T>
void check(const RotaryBackward<T>& p) {
    check_rotary(p);
    FIEDLER_REQUIRE("rotary", is_shape(p.dx, p.x.rows, p.x.cols) && is_shape(p.dy, p.x.rows, p.x.cols));
}
template <class T>
Traffic traffic(const RotaryForward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {2 * n * sizeof(T), 6 * n};
}
template <class T>
Traffic traffic(const RotaryBackward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {3 * n * sizeof(T), 9 * n};
}

template <class T>  // float, double
void rotary_forward(const Cpu&, const RotaryForward<T>&);
template <class T>
void rotary_backward(const Cpu&, const RotaryBackward<T>&);
void rotary_forward(const Cuda&, const RotaryForward<bf16>&);
void rotary_backward(const Cuda&, const RotaryBackward<bf16>&);

}  // namespace fiedler
