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
// Writes     o, lse; da, db, dF, dv, delta: overwritten. scratch, partial (these at multiples of 16 bytes): undefined
//            afterwards. dF absent iff F is. Outputs alias nothing.
// Numerics   scores, weights and sums in acc_t<T>; on Cuda p and ds are rounded to bf16 for the tensor-core products
//            only (P V, dO V', P' dO), f32 accumulation; there, o is divided by the sum of the rounded weights, lse is
//            from the sum before rounding. With R = 1 a weight is a product of factors of its row and column, each
//            within a few units of rounding, as long as their range permits. Fixed order, and no two
//            threads add to one number: bit-equal from run to run. v and do_ have to be finite: on Cuda they also meet
//            weights of 0, those of the keys of a tile that a query does not see.
//            Cuda, R > 1: a and b, times log2 e, are rounded to multiples of 2^-13 and to eleven bits. So a score is
//            off by at most
//              2^-11 sum_r (|a^r| + |b^r| + k |a^r - b^r|) + 2^-13 R,  k = 2; 3 for R = 16; 1 + log2 R for
//            sm_86, sm_89 and sm_120. Scalars that round to one number count as equal, sign 0; others keep their sign.
//            ds is rounded to bf16 in da, db and dF too, once for both of its sums. In f32 are scores and signs of
//            backward tiles with a scalar beyond 32, and scores of a forward block from the first tile on that has one
//            or is out of the other bounds of attention_forward_stage.cuh.
//            Cuda, sm_90, D = 64, R = 1, no window, equal sequences of a multiple of 128 tokens, and scratch: the forward
//            pass is a kernel of its own (attention_forward_sm90.cu). There weights are made in bf16: a query counts as if
//            its scalar were up to 2^-10 off, weights but those of 64 own tokens (causal) are within 2^-8, and lse, from
//            their sum, within 2^-10 + 2^-8; typically 2^-11.
//            Cuda, sm_90, D = 64, R = 2 .. 8, no window, equal sequences of a multiple of 128 tokens, and scratch: the
//            forward pass is a kernel of its own (attention_forward_packed_sm90.cu). There lse is from the sum of the rounded
//            weights but for those of 64 own tokens (causal): within 2^-9 beside what packing costs; typically 2^-11.
//            With R = 5 .. 8 sums and differences of two scalars are rounded to eleven bits there, not these: the same
//            bound on a score; scalars are equal when they are, times log2 e and rounded to multiples of 2^-13.
//            Cuda, sm_90, D = 64, R = 1 .. 8, no window, equal sequences of a multiple of 64 tokens, and room for
//            attention_numbers_elements: the backward pass is a kernel of its own. R > 1
//            (attention_backward_packed_sm90.cu): numbers as above, and in db the sums of two queries' +-ds that are 8 apart
//            are rounded to bf16 too; ds below 2^-55 loses digits, below 2^-63 it is 0; tiles with |do_| >= 2^5,
//            |v| >= 2^9 or |delta| >= 2^20 go the slow way of those with a scalar beyond 32. R = 1
//            (attention_backward_one_sm90.cu): scores, and ds of da, db and dF, in f32; scalars up to 22 are rounded after
//            they were multiplied by log2 e, a score is off by up to 2^-24 of their sizes for that. do . v - delta is one
//            product, which takes delta in three parts of bf16: off by 2^-26 of delta and the rounding of f32 sums. da and
//            db are sums of sign ds as it stands; equal scalars alone have sign 0. The way depends on shapes, scratch and
//            the device alone.
// skip       Cuda: tiles in which the gate alone puts every weight under e^-25 (2^-36) of what its query has from itself are
//            left out: less than the rounding of f32, a thousand of them together. false: all are computed.
// decode     one query, `length` cached keys of one sequence (query i = length - 1), causal: o as above.
#pragma once
#include <algorithm>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"
#include "kernels/tuning.h"

namespace fiedler {

template <class T>
struct AttentionForward {
    Mat<T> o;
    Mat<acc_t<T>> lse;
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v;
    Vec<acc_t<T>> scratch;  // optional, Cuda: attention_forward_scratch_elements
    Packed seq;
    std::int32_t heads = 1, scalars = 1, window = 0;
    bool causal = true, skip = true;
};

template <class T>
struct AttentionBackward {
    Mat<acc_t<T>> da, db;
    Mat<acc_t<T>> dF;  // present iff F is
    Mat<T> dv;
    Mat<acc_t<T>> delta;    // [tokens, heads]: dO . o (kernels/attention_tree.h goes on with it)
    Vec<acc_t<T>> partial;  // scratch of Cuda: attention_partial_elements, or fewer (see there); absent on Cpu
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v, o, do_;
    Mat<const acc_t<T>> lse;
    Packed seq;
    std::int32_t longest = 0;  // no sequence of ragged `seq` is longer; 0: not known
    std::int32_t heads = 1, scalars = 1, window = 0;
    bool causal = true, skip = true;
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

// R of the kernel that serves this many scalars.
constexpr std::int32_t attention_padded_scalars(std::int32_t scalars) {
    return scalars <= 2 ? scalars : scalars <= 4 ? 4 : scalars <= 8 ? 8 : 16;
}
// Scratch of the forward pass on sm_90: what it makes of every 128 keys of a head. Of use for D = 64 and up to eight scalars;
// without it the general way is taken.
constexpr std::int32_t kAttentionForwardKeys = 128, kAttentionForwardTile = 5 * kAttentionForwardKeys + 8;
constexpr std::int32_t attention_packed_tile(std::int32_t scalars) {
    return kAttentionForwardKeys * (attention_padded_scalars(scalars) / 2 + 1) + 4;
}
inline std::int64_t attention_forward_scratch_elements(std::int64_t tokens, std::int32_t heads, std::int32_t scalars) {
    const std::int32_t tile = scalars == 1 ? kAttentionForwardTile : scalars <= 8 ? attention_packed_tile(scalars) : 0;
    return tokens / kAttentionForwardKeys * heads * tile;
}

// On the GPU the backward pass makes da in parts: a block adds up the keys of one group, consecutive tiles of keys, and
// writes the sum for each query that sees any of them to a slab of `partial`, [slabs][heads][tokens up to 64][R]; then
// the slabs are added in order. Groups that one tile of 64 queries sees have different slabs: group modulo slabs.
struct AttentionSlabs {
    std::int32_t slabs = 1, tiles = 1;  // slabs; tiles of keys in a group
};
// The keys of a tile of the kernel for this many scalars.
constexpr std::int32_t attention_backward_keys(std::int64_t width, std::int32_t scalars) {
    return tuning::attention_backward(static_cast<int>(width), scalars).keys();
}
// The most slabs that are of use: with fewer groups of keys, a long sequence does not fill the GPU.
constexpr std::int32_t attention_most_slabs(std::int32_t scalars) { return std::max(16, 64 / scalars); }
// The smallest groups that do with `most` slabs, at least 1. keys: of a tile.
inline AttentionSlabs attention_slabs(const Packed& seq, std::int32_t longest, std::int32_t window, bool causal,
                                      std::int32_t keys, std::int64_t most) {
    const std::int64_t bound = seq.length > 0 ? seq.length : longest > 0 ? longest : seq.tokens;
    const std::int64_t seen = window > 0 ? std::min<std::int64_t>(window, bound) : bound;
    const std::int64_t keys_of_tile = causal ? seen + 63 : 2 * seen + 62;  // the most that 64 queries see
    for (std::int32_t tiles = 1;; ++tiles) {
        const std::int64_t span = std::int64_t(tiles) * keys;
        std::int64_t slabs = std::min((seq.tokens + span - 1) / span, (keys_of_tile + span - 2) / span + 1);
        if (seq.length > 0 && seq.length % span == 0) slabs = std::min(slabs, seq.length / span);
        if (slabs <= most || slabs <= 1) return {static_cast<std::int32_t>(std::max<std::int64_t>(slabs, 1)), tiles};
    }
}
inline std::int64_t attention_slab_elements(std::int64_t tokens, std::int32_t heads, std::int32_t scalars) {
    return (tokens + 63) / 64 * 64 * heads * attention_padded_scalars(scalars);
}
// What the kernels of sm_90 need of `partial` beside slabs, in floats (the first: for a token and head); without it the
// general way is taken.
constexpr std::int32_t attention_numbers_of_token(std::int32_t scalars) {
    const std::int32_t R = attention_padded_scalars(scalars);
    return R <= 2 ? 8 : R == 4 ? 11 : R == 8 ? 15 : 0;
}
inline std::int64_t attention_numbers_elements(std::int64_t tokens, std::int32_t heads, std::int64_t width,
                                               std::int32_t scalars) {
    return width == 64 ? attention_numbers_of_token(scalars) * tokens * heads : 0;
}
// `partial` for the best speed; any size from attention_slab_elements on works. Fewer slabs make larger groups of keys.
inline std::int64_t attention_partial_elements(const Packed& seq, std::int32_t longest, std::int32_t heads,
                                               std::int64_t width, std::int32_t scalars, std::int32_t window,
                                               bool causal) {
    const std::int32_t R = attention_padded_scalars(scalars);
    const AttentionSlabs slabs =
        attention_slabs(seq, longest, window, causal, attention_backward_keys(width, R), attention_most_slabs(R));
    return slabs.slabs * attention_slab_elements(seq.tokens, heads, scalars) +
           attention_numbers_elements(seq.tokens, heads, width, scalars);
}

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

// For tests and benchmarks: the same by one way alone. False: it does not take this problem here; nothing was written.
enum class AttentionPath { general, sm90 };
bool attention_forward_by_path(const Cuda&, const AttentionForward<bf16>&, AttentionPath);
bool attention_backward_by_path(const Cuda&, const AttentionBackward<bf16>&, AttentionPath);

}  // namespace fiedler
