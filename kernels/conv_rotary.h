// kernels/conv_rotary.h: conv followed by rotary on some of its heads, in one pass over memory: what lies between the
// projections and attention where a layer has both.
//
//   forward    m = conv(x)          causal, depthwise, width 4, as in conv.h
//              y = rotary(m)        the first `turned` heads: per-head RMS norm and/or rotation, as in rotary.h, with
//                                   pos_i = i - begin(i)
//              y = m                the others
//   backward   dm = rotary's gradient at m, m computed again from x;   dx, dw = conv's gradients from dm
//
// Shapes     x, y, dx, dy: [tokens, heads D] T, row-major; on Cuda rows 16-byte aligned and D in {16, 32, 64, 128}
//            w, dw: [heads D, 4] acc_t<T>, ld == 4; 0 <= turned <= heads
// Scratch    backward on Cuda: conv_rotary_pending_elements(tokens, heads D) acc_t<T> at most, of `pending` if given,
//            else of scratch, for partial sums of dw
// Writes     y, dx overwritten; dw accumulated (+=). No output may alias an input.
// Numerics   acc_t<T>, m and dm too: they are never rounded to T. Fixed order, no atomics: bit-equal from run to run.
//            On Cuda cos and sin of f32 angles, to 1e-6, are found at some tokens, and those of the tokens after them
//            follow by the addition theorem from cos and sin of the distance, less than 64.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/pending_sums.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct ConvRotaryForward {
    Mat<T> y;
    Mat<const T> x;
    Mat<const acc_t<T>> w;
    Packed seq;
    std::int32_t heads = 1, turned = 1;
    bool normalise = true, rotate = true;
    acc_t<T> theta = acc_t<T>(10000), eps = acc_t<T>(1e-6);
};
template <class T>
struct ConvRotaryBackward {
    Mat<T> dx;
    Mat<acc_t<T>> dw;
    Mat<const T> dy, x;
    Mat<const acc_t<T>> w;
    Packed seq;
    Vec<acc_t<T>> scratch;  // Cuda only
    // Cuda only: if given, sums over blocks lie there until finish_sums(), and scratch is not used
    PendingSums<acc_t<T>>* pending = nullptr;
    std::int32_t heads = 1, turned = 1;
    bool normalise = true, rotate = true;
    acc_t<T> theta = acc_t<T>(10000), eps = acc_t<T>(1e-6);
};

template <class P>
void check_conv_rotary(const P& p) {
    FIEDLER_REQUIRE("conv_rotary", is_shape(p.x, p.x.rows, p.x.cols) && is_packing(p.seq, p.x.rows));
    FIEDLER_REQUIRE("conv_rotary", is_shape(p.w, p.x.cols, 4) && p.w.ld == 4);
    FIEDLER_REQUIRE("conv_rotary", p.heads > 0 && p.x.cols % (2 * p.heads) == 0 && p.theta > 0);
    FIEDLER_REQUIRE("conv_rotary", p.turned >= 0 && p.turned <= p.heads);
}
template <class T>
void check(const ConvRotaryForward<T>& p) {
    check_conv_rotary(p);
    FIEDLER_REQUIRE("conv_rotary", is_shape(p.y, p.x.rows, p.x.cols));
}
template <class T>
void check(const ConvRotaryBackward<T>& p) {
    check_conv_rotary(p);
    FIEDLER_REQUIRE("conv_rotary", is_shape(p.dy, p.x.rows, p.x.cols) && is_shape(p.dx, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("conv_rotary", is_shape(p.dw, p.x.cols, 4) && p.dw.ld == 4);
}

template <class T>
Traffic traffic(const ConvRotaryForward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols), turned = n * p.turned / p.heads;
    return {2 * n * sizeof(T) + 4.0 * double(p.x.cols) * sizeof(acc_t<T>), 8 * n + 6 * turned};
}
template <class T>
Traffic traffic(const ConvRotaryBackward<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols), turned = n * p.turned / p.heads;
    return {3 * n * sizeof(T) + 12.0 * double(p.x.cols) * sizeof(acc_t<T>), 16 * n + (8 + 9) * turned};
}

// Tokens of a partial sum of dw at least, on Cuda. Turned channels and others have sums of their own.
inline constexpr std::int64_t kConvRotaryBlockTokens = 256;
inline std::int64_t conv_rotary_pending_elements(std::int64_t tokens, std::int64_t channels) {
    const std::int64_t blocks = (tokens + kConvRotaryBlockTokens - 1) / kConvRotaryBlockTokens;
    return PendingSums<float>::elements(blocks * channels * 4) + PendingSums<float>::elements(1);
}

template <class T>  // float, double
void conv_rotary_forward(const Cpu&, const ConvRotaryForward<T>&);
template <class T>
void conv_rotary_backward(const Cpu&, const ConvRotaryBackward<T>&);
void conv_rotary_forward(const Cuda&, const ConvRotaryForward<bf16>&);
void conv_rotary_backward(const Cuda&, const ConvRotaryBackward<bf16>&);

}  // namespace fiedler
