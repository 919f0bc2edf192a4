// kernels/dot.h: dot-product attention, the baseline that every claim is checked against. T x T is never stored.
//
//   s_ij = scale q_i . k_j        p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)        o_i = sum_j p_ij v_j
//
// Visible keys as in attention.h (same sequence; causal or not; window).
//
//   backward, with delta_i = do_i . o_i and ds_ij = p_ij (do_i . v_j - delta_i):
//     dv_j = sum_i p_ij do_i        dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i
//
// Shapes     q, k, v, o and gradients: [tokens, heads D] T, any ld (16-byte aligned rows on Cuda), D in {16, 32, 64,
//            128} on Cuda; lse, delta: [tokens, heads] acc_t<T>; scale > 0
// Writes     o, lse; dq, dk, dv, delta (scratch): overwritten. Outputs alias nothing.
// Numerics   as attention.h: products of T, accumulation and softmax in acc_t<T>; on Cuda p and ds are rounded to bf16
//            for the tensor cores. Fixed order, no atomics: bit-equal from run to run.
//            Cuda, sm_90, D = 64, no window, equal sequences of a multiple of 64 tokens: other kernels (dot_sm90.h).
// Source     FlashAttention-2 (Dao 2023), formulas only.
// decode     one query, `length` cached keys and values of one sequence.
#pragma once
#include "kernels/attention.h"

namespace fiedler {

template <class T>
struct DotForward {
    Mat<T> o;
    Mat<acc_t<T>> lse;
    Mat<const T> q, k, v;
    Packed seq;
    std::int32_t heads = 1, window = 0;
    bool causal = true;
    acc_t<T> scale = 1;
};
template <class T>
struct DotBackward {
    Mat<T> dq, dk, dv;
    Mat<acc_t<T>> delta;  // scratch [tokens, heads]
    Mat<const T> q, k, v, o, do_;
    Mat<const acc_t<T>> lse;
    Packed seq;
    std::int32_t heads = 1, window = 0;
    bool causal = true;
    acc_t<T> scale = 1;
};
template <class T>
struct DotDecode {
    Vec<T> o;           // [heads D]
    Vec<const T> q;     // [heads D]
    Mat<const T> k, v;  // [length, heads D]
    std::int32_t heads = 1, window = 0;
    acc_t<T> scale = 1;
};

template <class T>
void check(const DotForward<T>& p) {
    const auto n = p.v.rows, c = p.v.cols;
    FIEDLER_REQUIRE("dot", p.heads > 0 && c % p.heads == 0 && p.window >= 0 && is_packing(p.seq, n));
    FIEDLER_REQUIRE("dot", is_shape(p.q, n, c) && is_shape(p.k, n, c) && is_shape(p.v, n, c) && is_shape(p.o, n, c));
    FIEDLER_REQUIRE("dot", is_shape(p.lse, n, p.heads) && p.scale > 0);
}
template <class T>
void check(const DotBackward<T>& p) {
    const auto n = p.v.rows, c = p.v.cols;
    FIEDLER_REQUIRE("dot", p.heads > 0 && c % p.heads == 0 && p.window >= 0 && is_packing(p.seq, n));
    FIEDLER_REQUIRE("dot", is_shape(p.q, n, c) && is_shape(p.k, n, c) && is_shape(p.v, n, c) && is_shape(p.o, n, c));
    FIEDLER_REQUIRE("dot",
                    is_shape(p.dq, n, c) && is_shape(p.dk, n, c) && is_shape(p.dv, n, c) && is_shape(p.do_, n, c));
    FIEDLER_REQUIRE("dot", is_shape(p.lse, n, p.heads) && is_shape(p.delta, n, p.heads) && p.scale > 0);
}
template <class T>
void check(const DotDecode<T>& p) {
    const auto c = p.v.cols;
    FIEDLER_REQUIRE("dot", p.v.rows > 0 && p.heads > 0 && c % p.heads == 0 && p.window >= 0);
    FIEDLER_REQUIRE("dot", is_shape(p.k, p.v.rows, c) && is_shape(p.v, p.v.rows, c));
    FIEDLER_REQUIRE("dot", is_shape(p.q, c) && is_shape(p.o, c) && p.scale > 0);
}

template <class T>
Traffic traffic(const DotForward<T>& p) {
    const double n = double(p.v.rows), c = double(p.v.cols), d = c / p.heads;
    return {n * (4 * c * sizeof(T) + p.heads * sizeof(acc_t<T>)), attention_total_pairs(p) * (4 * d + 1)};
}
template <class T>
Traffic traffic(const DotBackward<T>& p) {
    const double n = double(p.v.rows), c = double(p.v.cols), d = c / p.heads;
    return {n * (8 * c * sizeof(T) + p.heads * sizeof(acc_t<T>)), attention_total_pairs(p) * (10 * d + 4)};
}

template <class T>  // float, double
void dot_forward(const Cpu&, const DotForward<T>&);
template <class T>
void dot_backward(const Cpu&, const DotBackward<T>&);
template <class T>
void dot_decode(const Cpu&, const DotDecode<T>&);
void dot_forward(const Cuda&, const DotForward<bf16>&);
void dot_backward(const Cuda&, const DotBackward<bf16>&);
void dot_decode(const Cuda&, const DotDecode<bf16>&);

// For tests and benchmarks: the same by one way alone. False: it does not take this problem here; no result was written.
enum class DotPath { general, sm90 };
bool dot_forward_by_path(const Cuda&, const DotForward<bf16>&, DotPath);
bool dot_backward_by_path(const Cuda&, const DotBackward<bf16>&, DotPath);

}  // namespace fiedler
