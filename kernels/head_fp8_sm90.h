// kernels/head_fp8_sm90.h: the steps of head.h's way in 8-bit floats, for sm_90a alone. head.cu puts them together.
//
// rows: of a chunk, a multiple of 64; C a multiple of 128 up to 768; V a multiple of 16. Matrices of bytes have strides
// that are multiples of 16 and begin at one. Vectors of the chunk have `rows` elements. Logits and bases are in octaves,
// that is, divided by ln 2, unless said.
#pragma once
#include "kernels/fp8.h"
#include "kernels/head.h"

namespace fiedler {

inline constexpr float kHeadLog2e = 1.4426950408889634f;

// ---- head_fp8_rows_sm90.cu: bound by memory ----------------------------------------------------------------------

// *largest = the largest |m|, as the bits of a float: NaN's are above all others.
void head_fp8_largest(const Cuda&, std::uint32_t* largest, const Mat<const bf16>& m);

// What takes *largest to at most 448, a power of two, is the factor f; NaN where that is not finite.
//   y = x f, and turned = its transpose: W and W' of a call
//   turned = (x_i row_factors_i f)', and *inverse = 1 / f: x of a chunk, for dw
struct HeadFp8Turn {
    Mat<e4m3> y;       // [n, C]; optional
    Mat<e4m3> turned;  // [C, n]; n a multiple of 16
    Mat<const bf16> x;
    const std::uint32_t* largest;
    const float* row_factors = nullptr;  // optional
    float* inverse = nullptr;            // optional
};
void head_fp8_turn(const Cuda&, const HeadFp8Turn&);

// y_i = x_i f_i, f_i a power of two for each row as above; largest_i = the largest |x_i|; octaves_i = what makes a logit
// in octaves of a product of y_i and w times w's factor; target_logits_i = x_i . w_target of bf16 in nats, infinity where
// ignored, NaN where there is no such word.
struct HeadFp8Rows {
    Mat<e4m3> y;
    float *largest, *octaves, *target_logits;
    Mat<const bf16> x, w;
    const std::int32_t* targets;
    const std::uint32_t* w_largest;
};
void head_fp8_rows(const Cuda&, const HeadFp8Rows&);

// sample_k = the row of w (n rows of targets at equal distances; any row for an ignored one).
inline constexpr std::int64_t kHeadFp8Sample = kHeadFp8Panel;
void head_fp8_sample(const Cuda&, const Mat<e4m3>& sample, const Mat<const e4m3>& w, const Vec<const std::int32_t>&);

// From the sums of the panels, s_i: losses, which come as target_logits; factors_i = scale / (s_i + t_i), 0 where ignored;
// pulls_i = factors_i s_i; -s_i as the target's element of turned; *x_largest = the largest largest_i factors_i.
struct HeadFp8Finish {
    Vec<float> losses;
    float *factors, *pulls;
    Mat<e5m2> turned;
    std::uint32_t* x_largest;
    Mat<const float> sums;
    const float *largest, *base;
    const std::int32_t* targets;
    float scale;
};
void head_fp8_finish(const Cuda&, const HeadFp8Finish&);

// dx_i = dx_i factors_i / (w's factor) - pulls_i w_target.
struct HeadFp8Dx {
    Mat<bf16> dx;
    Mat<const bf16> w;
    const float *factors, *pulls;
    const std::int32_t* targets;
    const std::uint32_t* w_largest;
};
void head_fp8_dx(const Cuda&, const HeadFp8Dx&);

// ---- head_fp8_sm90.cu: products (panel_sm90.cuh) -----------------------------------------------------------------

// base_i = max(target_logits_i, max_k x_i . sample_k octaves_i), less kBelow octaves; NaN and infinity as of target_logits.
struct HeadFp8Base {
    Vec<float> base;
    Mat<const e4m3> x, sample;
    const float *octaves, *target_logits;
};
void head_fp8_base(const Cuda&, const HeadFp8Base&);

// e_ij = 2^(x_i . w_j octaves_i - base_i), 0 for j == target_i, also as turned = e'; sums[panel][i] as in head_sm90.h.
struct HeadFp8Exponentials {
    Mat<e5m2> e;       // [rows, V]
    Mat<e5m2> turned;  // [V, rows]
    Mat<float> sums;   // [head_fp8_panels, rows]
    Mat<const e4m3> x, w;
    const float *octaves, *base;
    const std::int32_t* targets;
};
void head_fp8_exponentials(const Cuda&, const HeadFp8Exponentials&);

}  // namespace fiedler
