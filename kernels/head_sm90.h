// kernels/head_sm90.h: logits of head.h as exponentials with their sums, on sm_90's own instructions (head_sm90.cu,
// compiled for sm_90a alone).
#pragma once
#include "kernels/head.h"

namespace fiedler {

// e_ij = exp(x_i . w_j - base_i), 0 for j == target_i, and sums[panel][i] of the e_ij before rounding, over the columns
// of each panel of tuning::panel_columns. e absent: only the sums. base_i infinite: all zero.
struct HeadExponentials {
    Mat<bf16> e;      // [n, V]
    Mat<float> sums;  // [panels, n]
    Mat<const bf16> x, w;
    Vec<const float> base;
    Vec<const std::int32_t> targets;
};

// An sm_90 device; C a multiple of 64, at most 768; V a multiple of 8.
bool head_sm90_takes(const Cuda&, const Head<bf16>&);
void head_exponentials(const Cuda&, const HeadExponentials&);

}  // namespace fiedler
