// kernels/conv.h: causal depthwise convolution over time, width 4 (the short convolution of linear attention models).
//
//   forward    y_ic = sum_{k=0..3} w_ck x_{i-3+k, c}         terms before the token's own sequence are 0
//   backward   dx_jc = sum_k w_ck dy_{j+3-k, c}              terms after the token's own sequence are 0
//              dw_ck += sum_i dy_ic x_{i-3+k, c}
//
// w = (0, 0, 0, 1) is the identity: that is how it starts.
//
// Shapes     x, y, dx, dy: [tokens, channels] T, row-major; on Cuda rows 16-byte aligned and channels % 8 == 0
//            w, dw: [channels, 4] acc_t<T>, ld == 4 (the f32 master weights: small and sensitive)
// Scratch    backward on Cuda: conv_pending_elements(tokens, channels) acc_t<T>, of `pending` if given, else of
//            scratch, for partial sums of dw
// Writes     y, dx overwritten; dw accumulated (+=). No output may alias an input.
// Numerics   acc_t<T>, fixed order, no atomics: bit-equal from run to run.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/pending_sums.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct ConvForward {
    Mat<T> y;
    Mat<const T> x;
    Mat<const acc_t<T>> w;
    Packed seq;
};

template <class T>
struct ConvBackward {
    Mat<T> dx;
    Mat<acc_t<T>> dw;
    Mat<const T> dy, x;
    Mat<const acc_t<T>> w;
    Packed seq;
    Vec<acc_t<T>> scratch;  // Cuda only
    // Cuda only: if given, sums over blocks lie there until finish_sums(), and scratch is not used
    PendingSums<acc_t<T>>* pending = nullptr;
};

template <class T>
void check(const ConvForward<T>& p) {
    FIEDLER_REQUIRE("conv", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.y, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("conv", is_shape(p.w, p.x.cols, 4) && p.w.ld == 4 && is_packing(p.seq, p.x.rows));
}
template <class T>
void check(const ConvBackward<T>& p) {
    FIEDLER_REQUIRE("conv", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.dy, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("conv", is_shape(p.dx, p.x.rows, p.x.cols) && is_packing(p.seq, p.x.rows));
    FIEDLER_REQUIRE("conv", is_shape(p.w, p.x.cols, 4) && is_shape(p.dw, p.x.cols, 4) && p.w.ld == 4 && p.dw.ld == 4);
}

template <class T>
Traffic traffic(const ConvForward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {2 * n * sizeof(T) + 4.0 * double(p.x.cols) * sizeof(acc_t<T>), 8 * n};
}
template <class T>
Traffic traffic(const ConvBackward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {3 * n * sizeof(T) + 12.0 * double(p.x.cols) * sizeof(acc_t<T>), 16 * n};
}

inline constexpr std::int64_t kConvBlockTokens = 256;  // tokens whose part of dw one block sums, on Cuda
inline std::int64_t conv_pending_elements(std::int64_t tokens, std::int64_t channels) {
    return PendingSums<float>::elements((tokens + kConvBlockTokens - 1) / kConvBlockTokens * channels * 4);
}

template <class T>  // float, double
void conv_forward(const Cpu&, const ConvForward<T>&);
template <class T>
void conv_backward(const Cpu&, const ConvBackward<T>&);
void conv_forward(const Cuda&, const ConvForward<bf16>&);
void conv_backward(const Cuda&, const ConvBackward<bf16>&);

}  // namespace fiedler
