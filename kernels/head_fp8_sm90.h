// kernels/head_fp8_sm90.h: the steps of head.h's way in 8 bits, for sm_90a alone. head.cu puts them together.
//
// rows: of a chunk, a multiple of 64; C a multiple of 128 up to 768; V a multiple of 16. Matrices of bytes have strides
// that are multiples of 16 and begin at one. Vectors of the chunk have `rows` elements. Logits and bases are in octaves,
// that is, divided by ln 2, unless said.
#pragma once
#include "kernels/fp8.h"
#include "kernels/head.h"

namespace fiedler {

// ---- head_fp8_rows_sm90.cu: bound by memory ----------------------------------------------------------------------

// To int8, a row at a time: x_i / s_i, with one rounding of 1 / s_i to float and then to the nearest whole number. With m_i
// the largest |x_i|, but at least 2^-100, the scale s_i is m_i / 127, or more where the row would be longer than
// kHeadInt8Length otherwise: times what it is longer, rounded upwards to 8 bits of mantissa. It is rounded upwards itself,
// to 22 bits. So a row is at most 2,048 long, and a sum of products at most 2^22. NaN where m_i is above 2^100 or NaN.
inline constexpr float kHeadInt8Length = 2030;  // and at most sqrt(768) / 2 more by rounding

// W of a call: y_i and scales_i; *largest = the largest |x|, as the bits of a float: NaN's are above all others.
struct HeadFp8Words {
    Mat<std::int8_t> y;
    float* scales;
    std::uint32_t* largest;
    Mat<const bf16> x;
};
void head_fp8_words(const Cuda&, const HeadFp8Words&);

// What takes *largest to at most 448, a power of two, is the factor f; NaN where that is not finite.
//   turned = (x f)': W of a call, for dx
//   turned = (x_i row_factors_i f)', and *inverse = 1 / f: x of a chunk, for dw
struct HeadFp8Turn {
    Mat<e4m3> turned;  // [C, n]; n a multiple of 16
    Mat<const bf16> x;
    const std::uint32_t* largest;
    const float* row_factors = nullptr;  // optional
    float* inverse = nullptr;            // optional
};
void head_fp8_turn(const Cuda&, const HeadFp8Turn&);

// y_i = x_i in int8; largest_i = the largest |x_i|; octaves_i = what makes a logit in octaves of y_i . w: the scale over
// ln 2; target_logits_i = x_i . w_target of bf16 in nats, infinity where ignored, NaN where there is no such word.
struct HeadFp8Rows {
    Mat<std::int8_t> y;
    float *largest, *octaves, *target_logits;
    Mat<const bf16> x, w;
    const std::int32_t* targets;
};
void head_fp8_rows(const Cuda&, const HeadFp8Rows&);

// sample_k = the row of w and its scale (n rows of targets at equal distances; any row for an ignored one).
inline constexpr std::int64_t kHeadFp8Sample = kHeadFp8Panel;
struct HeadFp8Sample {
    Mat<std::int8_t> sample;
    float* sample_scales;
    Mat<const std::int8_t> w;
    const float* scales;
    Vec<const std::int32_t> targets;
};
void head_fp8_sample(const Cuda&, const HeadFp8Sample&);

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

// dx_i = (dx_i factors_i - pulls_i (w_target f in e4m3)) / f, f w's factor: both terms with the same rounded rows of w.
struct HeadFp8Dx {
    Mat<bf16> dx;
    Mat<const bf16> w;
    const float *factors, *pulls;
    const std::int32_t* targets;
    const std::uint32_t* w_largest;
};
void head_fp8_dx(const Cuda&, const HeadFp8Dx&);

// ---- head_fp8_sm90.cu: products (panel_sm90.cuh) -----------------------------------------------------------------

// base_i = max(target_logits_i, max_k x_i . sample_k scales_k octaves_i), less kBelow octaves; NaN and infinity as of
// target_logits.
struct HeadFp8Base {
    Vec<float> base;
    Mat<const std::int8_t> x, sample;
    const float *scales, *octaves, *target_logits;
};
void head_fp8_base(const Cuda&, const HeadFp8Base&);

// e_ij = 2^(x_i . w_j scales_j octaves_i - base_i), 0 for j == target_i, also as turned = e'; sums[panel][i] as in head_sm90.h.
struct HeadFp8Exponentials {
    Mat<e5m2> e;       // [rows, V]
    Mat<e5m2> turned;  // [V, rows]
    Mat<float> sums;   // [V / kHeadFp8Panel rounded up, rows]
    Mat<const std::int8_t> x, w;
    const float *scales, *octaves, *base;
    const std::int32_t* targets;
};
void head_fp8_exponentials(const Cuda&, const HeadFp8Exponentials&);

}  // namespace fiedler
