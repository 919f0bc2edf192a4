// kernels/mlp.h: the activation between the two matrices of the MLP, ReLU^2 (So et al. 2021).
//
//   forward    h = max(u, 0)^2                 backward   du = dh 2 max(u, 0)
//
// u may be given before or after the ReLU (matmul's relu epilogue): both give the same numbers.
// Shapes     u, h, du, dh: n elements T, contiguous, 16-byte aligned on Cuda.
// Writes     h, du overwritten. h may alias u; du may alias dh.
// Numerics   acc_t<T>, elementwise.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct MlpForward {
    Vec<T> h;
    Vec<const T> u;
};
template <class T>
struct MlpBackward {
    Vec<T> du;
    Vec<const T> dh, u;
};

template <class T>
void check(const MlpForward<T>& p) {
    FIEDLER_REQUIRE("mlp", is_shape(p.u, p.u.size) && is_shape(p.h, p.u.size));
}
template <class T>
void check(const MlpBackward<T>& p) {
    FIEDLER_REQUIRE("mlp", is_shape(p.u, p.u.size) && is_shape(p.dh, p.u.size) && is_shape(p.du, p.u.size));
}
template <class T>
Traffic traffic(const MlpForward<T>& p) {
    return {2.0 * double(p.u.size) * sizeof(T), 2.0 * double(p.u.size)};
}
template <class T>
Traffic traffic(const MlpBackward<T>& p) {
    return {3.0 * double(p.u.size) * sizeof(T), 3.0 * double(p.u.size)};
}

template <class T>  // float, double
void mlp_forward(const Cpu&, const MlpForward<T>&);
template <class T>
void mlp_backward(const Cpu&, const MlpBackward<T>&);
void mlp_forward(const Cuda&, const MlpForward<bf16>&);
void mlp_backward(const Cuda&, const MlpBackward<bf16>&);

}  // namespace fiedler
