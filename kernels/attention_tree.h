// kernels/attention_tree.h: scalar-distance attention with one scalar a head in O(T log T), exact (DESIGN 2).
//
// The function is that of kernels/attention.h with scalars = 1 and window = 0, forward and backward:
//   s_ij = -|a_i - b_j| + F_i - F_j,  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j         causal, gate F optional
//   s_ij = -|a_i - b_j|                                                               bidirectional: F must be absent
//   delta_i = do_i . o_i,  ds_ij = p_ij (do_i . v_j - delta_i),  sign(0) = 0
//   dv_j = sum_i p_ij do_i    da_i = - sum_j sign(a_i - b_j) ds_ij    db_j = sum_i sign(a_i - b_j) ds_ij
//   dF_j = - sum_i ds_ij
//
// Algorithm  exp(-|a - b|) and exp(F_i - F_j) are products of a factor of the query and one of the key as soon as it is
//            known which of a, b is larger and that the key is the earlier. So time is cut into a binary tree: in a node
//            the queries of the right half see all keys of the left half. Both are put into one order, by scalar; then
//            the keys below a query are one decayed sum along that order, those above it another. Leaves are dense.
//            Every sum carries the logarithm of its scale, as in online softmax: nothing overflows, and what underflows
//            is below every rounding. Bidirectional attention is one node with all keys and queries.
// Ties       a = b: the pair counts for o, dv and dF and for neither side in da, db.
// Shapes     v, o, dv, do_: [tokens, heads D] T, any ld (16-byte aligned rows on Cuda), D in {16, 32, 64, 128} on Cuda
//            a, b, da, db, F, dF, lse, delta: [tokens, heads] acc_t<T>, contiguous
//            scratch: on Cuda attention_tree_*_bytes of memory, 256-byte aligned; on Cpu absent
// Writes     o, lse; da, db, dF, dv, delta, scratch: overwritten. dF absent iff F is. Outputs alias nothing.
// Numerics   sums in acc_t<T>. On Cuda p and ds are rounded to bf16 for the tensor-core products, within leaves and
//            within tiles of 64; leaves give o and dv as bf16, what the tree adds to them is f32. Fixed order, no atomics:
//            bit-equal from run to run.
// skip       keys and queries that no pair of a node can give 2^-24 of what the query has are left out, and parts that are
//            together below it: the same within f32.
// Capture    no allocation, no wait: a Cuda call can be recorded (graph_record).
#pragma once
#include <cmath>

#include "kernels/attention.h"
#include "kernels/attention_tree_plan.h"

namespace fiedler {

template <class T>
struct AttentionTreeForward {
    Mat<T> o;
    Mat<acc_t<T>> lse;
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v;
    Vec<unsigned char> scratch;  // Cuda
    Packed seq;
    std::int32_t longest = 0;  // no sequence of ragged `seq` is longer; 0: not known
    std::int32_t heads = 1;
    bool causal = true, skip = true;
    AttentionTreeTuning tuning = kAttentionTreeForward;
};

template <class T>
struct AttentionTreeBackward {
    Mat<acc_t<T>> da, db;
    Mat<acc_t<T>> dF;  // present iff F is
    Mat<T> dv;
    Mat<acc_t<T>> delta;         // scratch [tokens, heads]
    Vec<unsigned char> scratch;  // Cuda
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v, o, do_;
    Mat<const acc_t<T>> lse;
    Packed seq;
    std::int32_t longest = 0;
    std::int32_t heads = 1;
    bool causal = true, skip = true;
    AttentionTreeTuning tuning = kAttentionTreeBackward;
};

template <class T>
bool is_by_heads(const Mat<T>& x, std::int64_t tokens, std::int32_t heads) {
    return is_shape(x, tokens, heads) && x.ld == heads;
}
template <class T>
void check(const AttentionTreeForward<T>& p) {
    const auto n = p.v.rows;
    FIEDLER_REQUIRE("attention_tree", p.heads > 0 && p.v.cols % p.heads == 0 && n < (std::int64_t(1) << 30));
    FIEDLER_REQUIRE("attention_tree", is_shape(p.v, n, p.v.cols) && is_shape(p.o, n, p.v.cols) && is_packing(p.seq, n));
    FIEDLER_REQUIRE("attention_tree", is_by_heads(p.a, n, p.heads) && is_by_heads(p.b, n, p.heads));
    FIEDLER_REQUIRE("attention_tree", is_by_heads(p.lse, n, p.heads) && is_valid(p.tuning));
    FIEDLER_REQUIRE("attention_tree", !p.F || (p.causal && is_by_heads(p.F, n, p.heads)));
}
template <class T>
void check(const AttentionTreeBackward<T>& p) {
    const auto n = p.v.rows;
    FIEDLER_REQUIRE("attention_tree", p.heads > 0 && p.v.cols % p.heads == 0 && n < (std::int64_t(1) << 30));
    FIEDLER_REQUIRE("attention_tree", is_shape(p.v, n, p.v.cols) && is_shape(p.o, n, p.v.cols) && is_packing(p.seq, n));
    FIEDLER_REQUIRE("attention_tree", is_shape(p.do_, n, p.v.cols) && is_shape(p.dv, n, p.v.cols));
    FIEDLER_REQUIRE("attention_tree", is_by_heads(p.a, n, p.heads) && is_by_heads(p.b, n, p.heads));
    FIEDLER_REQUIRE("attention_tree", is_by_heads(p.da, n, p.heads) && is_by_heads(p.db, n, p.heads));
    FIEDLER_REQUIRE("attention_tree", is_by_heads(p.lse, n, p.heads) && is_by_heads(p.delta, n, p.heads));
    FIEDLER_REQUIRE("attention_tree", !p.F || (p.causal && is_by_heads(p.F, n, p.heads)));
    FIEDLER_REQUIRE("attention_tree", bool(p.F) == bool(p.dF) && (!p.dF || is_by_heads(p.dF, n, p.heads)));
    FIEDLER_REQUIRE("attention_tree", is_valid(p.tuning));
}

// Bytes as attention's: what must be read and written once. flops: those of the algorithm for a level and a token, a
// rough count: two sums of D, two look-ups of D, and half a tile of pairs.
inline double attention_tree_flops(const Packed& seq, std::int32_t heads, double width, bool causal, bool backward) {
    const double n = double(seq.tokens), length = seq.length > 0 ? seq.length : n / seq.count;
    const double leaf = std::min(length, double((backward ? kAttentionTreeBackward : kAttentionTreeForward).leaf));
    const double levels = causal ? std::max(0.0, std::ceil(std::log2(length / leaf))) : 2;
    return n * heads * ((causal ? leaf / 2 : 0) + levels * 32) * width * (backward ? 4 : 2);
}
template <class T>
Traffic traffic(const AttentionTreeForward<T>& p) {
    const double n = double(p.v.rows), c = double(p.v.cols);
    return {n * (2 * c * sizeof(T) + (p.F ? 4 : 3) * p.heads * double(sizeof(acc_t<T>))),
            attention_tree_flops(p.seq, p.heads, c / p.heads, p.causal, false)};
}
template <class T>
Traffic traffic(const AttentionTreeBackward<T>& p) {
    const double n = double(p.v.rows), c = double(p.v.cols);
    return {n * (4 * c * sizeof(T) + (p.F ? 7 : 5) * p.heads * double(sizeof(acc_t<T>))),
            attention_tree_flops(p.seq, p.heads, c / p.heads, p.causal, true)};
}

// Scratch on Cuda, in bytes; in every build. width: D.
std::int64_t attention_tree_forward_bytes(const Packed&, std::int32_t longest, std::int32_t heads, std::int64_t width,
                                          bool causal, AttentionTreeTuning tuning = kAttentionTreeForward);
std::int64_t attention_tree_backward_bytes(const Packed&, std::int32_t longest, std::int32_t heads, std::int64_t width,
                                           bool causal, AttentionTreeTuning tuning = kAttentionTreeBackward);
// Of it, what the dense backward pass over the leaves takes, in floats.
std::int64_t attention_tree_partial_floats(const Packed&, std::int32_t heads, std::int64_t width, bool causal,
                                           AttentionTreeTuning tuning);

template <class T>  // float, double
void attention_tree_forward(const Cpu&, const AttentionTreeForward<T>&);
template <class T>
void attention_tree_backward(const Cpu&, const AttentionTreeBackward<T>&);
void attention_tree_forward(const Cuda&, const AttentionTreeForward<bf16>&);
void attention_tree_backward(const Cuda&, const AttentionTreeBackward<bf16>&);

}  // namespace fiedler
