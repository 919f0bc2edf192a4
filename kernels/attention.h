// kernels/attention.h: scalar-distance attention (DESIGN 2), dense form. No Q K' product exists, T x T is never stored.
//
//   s_ij = - sum_r |a_i^r - b_j^r| + F_i - F_j          over keys j that query i may see
//   p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)            o_i = sum_j p_ij v_j
//
// Visible keys: same sequence (seq); causal: j <= i, bidirectional: all; window w > 0: |i - j| < w.
// Bidirectional attention has no gate: F must be absent. Every query sees at least itself, so lse is finite.
//
//   backward, with delta_i = do_i . o_i and ds_ij = p_ij (do_i . v_j - delta_i), sign(0) = 0:
//     dv_j = sum_i p_ij do_i                          da_i^r = - sum_j sign(a_i^r - b_j^r) ds_ij
//     db_j^r = + sum_i sign(a_i^r - b_j^r) ds_ij      dF_j = - sum_i ds_ij        (row sums of ds vanish: no dF_i term)
//
// Shapes     v, o, dv, do_: [tokens, heads D] T, any ld (16-byte aligned rows on Cuda), D in {16, 32, 64, 128} on Cuda
//            a, b, da, db: [tokens, heads R] acc_t<T>, contiguous, R = 1..16
//            F, dF, lse, delta: [tokens, heads] acc_t<T>
// Writes     o, lse; da, db, dF, dv, delta (scratch): overwritten. dF absent iff F is. Outputs alias nothing.
// Numerics   scores, weights and sums in acc_t<T>; on Cuda p and ds are rounded to bf16 for the tensor-core products
//            only (P V, dO V', P' dO), f32 accumulation. Fixed order, no atomics: bit-equal from run to run.
// decode     one query, `length` cached keys of one sequence (query i = length - 1), causal: o as above.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct AttentionForward {
    Mat<T> o;
    Mat<acc_t<T>> lse;
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v;
    Packed seq;
    std::int32_t heads = 1, scalars = 1, window = 0;
    bool causal = true;
};

template <class T>
struct AttentionBackward {
    Mat<acc_t<T>> da, db;
    Mat<acc_t<T>> dF;  // present iff F is
    Mat<T> dv;
    Mat<acc_t<T>> delta;  // scratch [tokens, heads]
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v, o, do_;
    Mat<const acc_t<T>> lse;
    Packed seq;
    std::int32_t heads = 1, scalars = 1, window = 0;
    bool causal = true;
};

template <class T>
struct AttentionDecode {
    Vec<T> o;               // [heads D]
    Vec<const acc_t<T>> a;  // [heads R], the query
    Mat<const acc_t<T>> b;  // [length, heads R]
    Mat<const acc_t<T>> F;  // [length, heads], optional
    Mat<const T> v;         // [length, heads D]
    std::int32_t heads = 1, scalars = 1, window = 0;
};

template <class T>
void check(const AttentionForward<T>& p) {
    const auto n = p.v.rows;
    FIEDLER_REQUIRE("attention", p.heads > 0 && p.v.cols % p.heads == 0 && p.scalars >= 1 && p.scalars <= 16);
    FIEDLER_REQUIRE("attention", is_shape(p.v, n, p.v.cols) && is_shape(p.o, n, p.v.cols) && is_packing(p.seq, n));
    FIEDLER_REQUIRE("attention", is_shape(p.a, n, p.heads * p.scalars) && is_shape(p.b, n, p.heads * p.scalars));
    FIEDLER_REQUIRE("attention", p.a.ld == p.a.cols && p.b.ld == p.b.cols && is_shape(p.lse, n, p.heads));
    FIEDLER_REQUIRE("attention", p.window >= 0 && (!p.F || (p.causal && is_shape(p.F, n, p.heads))));
}
template <class T>
void check(const AttentionBackward<T>& p) {
    const auto n = p.v.rows;
    const std::int64_t hr = std::int64_t(p.heads) * p.scalars;
    FIEDLER_REQUIRE("attention", p.heads > 0 && p.v.cols % p.heads == 0 && p.scalars >= 1 && p.scalars <= 16);
    FIEDLER_REQUIRE("attention", is_shape(p.v, n, p.v.cols) && is_shape(p.o, n, p.v.cols) && is_packing(p.seq, n));
    FIEDLER_REQUIRE("attention", is_shape(p.do_, n, p.v.cols) && is_shape(p.dv, n, p.v.cols));
    FIEDLER_REQUIRE("attention", is_shape(p.a, n, hr) && is_shape(p.b, n, hr) && p.a.ld == hr && p.b.ld == hr);
    FIEDLER_REQUIRE("attention", is_shape(p.da, n, hr) && is_shape(p.db, n, hr) && p.da.ld == hr && p.db.ld == hr);
    FIEDLER_REQUIRE("attention", is_shape(p.lse, n, p.heads) && is_shape(p.delta, n, p.heads));
    FIEDLER_REQUIRE("attention", p.window >= 0 && (!p.F || (p.causal && is_shape(p.F, n, p.heads))));
    FIEDLER_REQUIRE("attention", bool(p.F) == bool(p.dF) && (!p.dF || is_shape(p.dF, n, p.heads)));
}
template <class T>
void check(const AttentionDecode<T>& p) {
    FIEDLER_REQUIRE("attention", p.v.rows > 0 && p.heads > 0 && p.v.cols % p.heads == 0 && is_shape(p.o, p.v.cols));
    FIEDLER_REQUIRE("attention", is_shape(p.a, p.heads * p.scalars) && is_shape(p.b, p.v.rows, p.heads * p.scalars));
    FIEDLER_REQUIRE("attention", is_shape(p.v, p.v.rows, p.v.cols) && (!p.F || is_shape(p.F, p.v.rows, p.heads)));
    FIEDLER_REQUIRE("attention", p.scalars >= 1 && p.scalars <= 16 && p.window >= 0);
}

// The tokens [lo, hi) that a token looks at: a query at its keys, or a key at the queries that see it. Both ends never
// decrease from one token to the next, so the sight of a run of tokens follows from its first and last.
struct Sight {
    Packed seq;
    std::int32_t window = 0;
    bool back = true, ahead = true;  // whether earlier and later tokens are seen

    FIEDLER_HD static Sight of_queries(const Packed& seq, std::int32_t window, bool causal) {
        return {seq, window, true, !causal};
    }
    FIEDLER_HD static Sight of_keys(const Packed& seq, std::int32_t window, bool causal) {
        return {seq, window, !causal, true};
    }
    FIEDLER_HD std::int32_t lo(std::int32_t i) const {
        if (!back) return i;
        const std::int32_t first = seq.first(i);
        return window > 0 && i - first >= window ? i - window + 1 : first;
    }
    FIEDLER_HD std::int32_t hi(std::int32_t i) const {
        if (!ahead) return i + 1;
        const std::int32_t last = seq.last(i);
        return window > 0 && last - i > window ? i + window : last;
    }
};

// Visible (query, key) pairs of one head in uniform sequences of length n.
inline double attention_pairs(double n, bool causal, double window) {
    const double w = window > 0 && window < n ? window : n;
    const double half = w * (w + 1) / 2 + (n - w) * w;  // causal pairs, the diagonal included
    return causal ? half : 2 * half - n;
}
template <class P>
double attention_total_pairs(const P& p) {
    const double length = p.seq.length > 0 ? p.seq.length : double(p.seq.tokens) / p.seq.count;  // ragged: as if equal
    return attention_pairs(length, p.causal, p.window) * p.seq.count * p.heads;
}
template <class T>
Traffic traffic(const AttentionForward<T>& p) {
    const double n = double(p.v.rows), c = double(p.v.cols), hr = double(p.a.cols), d = c / p.heads;
    return {n * (2 * c * sizeof(T) + (2 * hr + 2 * p.heads) * sizeof(acc_t<T>)),
            attention_total_pairs(p) * (2 * d + 2 * p.scalars + 1)};
}
template <class T>
Traffic traffic(const AttentionBackward<T>& p) {
    const double n = double(p.v.rows), c = double(p.v.cols), hr = double(p.a.cols), d = c / p.heads;
    return {n * (4 * c * sizeof(T) + (4 * hr + 3 * p.heads) * sizeof(acc_t<T>)),
            attention_total_pairs(p) * (4 * d + 6 * p.scalars + 4)};
}

template <class T>  // float, double
void attention_forward(const Cpu&, const AttentionForward<T>&);
template <class T>
void attention_backward(const Cpu&, const AttentionBackward<T>&);
template <class T>
void attention_decode(const Cpu&, const AttentionDecode<T>&);
void attention_forward(const Cuda&, const AttentionForward<bf16>&);
void attention_backward(const Cuda&, const AttentionBackward<bf16>&);
void attention_decode(const Cuda&, const AttentionDecode<bf16>&);

}  // namespace fiedler
