// kernels/coordinate.h: coordinate scalars. s = n P comes from matmul; here the convolution over time and the
// temperature.
//
//   forward    lam = conv4(s) (the causal depthwise convolution of conv.h; w absent: the identity)
//              a_i^{hr} = lam_i^{q,hr} exp(-log_temp_h)          b_i^{hr} = lam_i^{k,hr} exp(-log_temp_h)
//   backward   dlam = (da, db) exp(-log_temp_h)                  dlog_temp_h += - sum_i sum_r (da a + db b)
//              ds, dw: the convolution's own gradients of dlam
//
// Shapes     s: [tokens, 2 heads R] acc_t<T>, any ld: columns [0, HR) are the queries' scalars, [HR, 2HR) the keys',
//            a head's R scalars side by side; ds: the same shape in T, any ld, ready for matmul
//            a, b, da, db: [tokens, heads R] acc_t<T>; w, dw: [2 heads R, 4] acc_t<T>, ld 4; w 16-byte
//            aligned on Cuda
//            log_temp, dlog_temp: [heads] acc_t<T>
// Scratch    backward on Cuda: coordinate_pending_elements(tokens, 2 heads R, heads) floats at most, 16-byte aligned, of
//            `pending` if given, else of scratch
// Writes     a, b, ds overwritten; dw, dlog_temp accumulated (+=); dlog_temp absent: temperature fixed, not computed.
// Numerics   acc_t<T> throughout, fixed order, no atomics: bit-equal from run to run.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/pending_sums.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class A>
struct CoordinateForward {
    Mat<A> a, b;
    Mat<const A> s;
    Mat<const A> w;  // optional
    Vec<const A> log_temp;
    Packed seq;
};

template <class T>
struct CoordinateBackward {
    Mat<T> ds;
    Mat<acc_t<T>> dw;         // present iff w is
    Vec<acc_t<T>> dlog_temp;  // optional
    Mat<const acc_t<T>> da, db, a, b, s;
    Mat<const acc_t<T>> w;  // optional
    Vec<const acc_t<T>> log_temp;
    Packed seq;
    Vec<acc_t<T>> scratch;  // Cuda only
    // Cuda only: if given, sums over blocks lie there until finish_sums(), and scratch is not used.
    PendingSums<acc_t<T>>* pending = nullptr;
};

template <class A>
void check(const CoordinateForward<A>& p) {
    FIEDLER_REQUIRE("coordinate", is_shape(p.s, p.s.rows, p.s.cols) && p.s.cols % 2 == 0);
    FIEDLER_REQUIRE("coordinate", is_shape(p.a, p.s.rows, p.s.cols / 2) && is_shape(p.b, p.s.rows, p.s.cols / 2));
    FIEDLER_REQUIRE("coordinate", p.log_temp.size > 0 && p.a.cols % p.log_temp.size == 0);
    FIEDLER_REQUIRE("coordinate", (!p.w || (is_shape(p.w, p.s.cols, 4) && p.w.ld == 4)) && is_packing(p.seq, p.s.rows));
}
template <class T>
void check(const CoordinateBackward<T>& p) {
    const auto n = p.s.rows, hr = p.s.cols / 2;
    FIEDLER_REQUIRE("coordinate", is_shape(p.s, n, 2 * hr) && is_shape(p.ds, n, 2 * hr) && is_packing(p.seq, n));
    FIEDLER_REQUIRE("coordinate", is_shape(p.a, n, hr) && is_shape(p.b, n, hr));
    FIEDLER_REQUIRE("coordinate", is_shape(p.da, n, hr) && is_shape(p.db, n, hr));
    FIEDLER_REQUIRE("coordinate", p.log_temp.size > 0 && hr % p.log_temp.size == 0);
    FIEDLER_REQUIRE("coordinate", !p.dlog_temp || p.dlog_temp.size == p.log_temp.size);
    FIEDLER_REQUIRE("coordinate", bool(p.w) == bool(p.dw) && (!p.w || (is_shape(p.w, 2 * hr, 4) && p.w.ld == 4)));
    FIEDLER_REQUIRE("coordinate", !p.dw || (is_shape(p.dw, 2 * hr, 4) && p.dw.ld == 4));
}

template <class A>
Traffic traffic(const CoordinateForward<A>& p) {
    const double n = double(p.s.rows) * double(p.s.cols);
    return {2 * n * sizeof(A), (p.w ? 9 : 1) * n};
}
template <class T>
Traffic traffic(const CoordinateBackward<T>& p) {
    const double n = double(p.s.rows) * double(p.s.cols);
    return {n * (3 * sizeof(acc_t<T>) + sizeof(T)), (p.w ? 19 : 3) * n};
}

// Blocks along the tokens at most, on Cuda, whatever the device: the order of the sums is fixed. Each leaves four sums
// of dw for a column, and of dlog_temp one for a head, or one for a column of a single scalar. There may be several
// blocks beside each other, of so many columns at least.
inline constexpr std::int64_t kCoordinateBlocks = 256, kCoordinateColumns = 192;
inline std::int64_t coordinate_pending_elements(std::int64_t tokens, std::int64_t columns, std::int64_t heads) {
    const std::int64_t blocks = tokens < kCoordinateBlocks ? tokens : kCoordinateBlocks;
    const std::int64_t beside = columns > 2 * heads ? (columns + kCoordinateColumns - 1) / kCoordinateColumns : 2;
    return PendingSums<float>::elements(4 * columns * blocks) + PendingSums<float>::elements(heads * blocks * beside);
}

template <class A>  // float, double
void coordinate_forward(const Cpu&, const CoordinateForward<A>&);
template <class T>
void coordinate_backward(const Cpu&, const CoordinateBackward<T>&);
void coordinate_forward(const Cuda&, const CoordinateForward<float>&);
void coordinate_backward(const Cuda&, const CoordinateBackward<bf16>&);

}  // namespace fiedler
