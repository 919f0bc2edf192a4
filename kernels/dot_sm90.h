// kernels/dot_sm90.h: both passes of dot.h on sm_90's own instructions (dot_sm90.cu, compiled for sm_90a alone).
#pragma once
#include "kernels/dot.h"

namespace fiedler {

// Can they be asked for this problem? An sm_90 device; D = 64; no window; equal sequences of a multiple of 64 tokens.
bool dot_sm90_takes(const Cuda&, const DotForward<bf16>&);
bool dot_sm90_takes(const Cuda&, const DotBackward<bf16>&);
void dot_forward_sm90(const Cuda&, const DotForward<bf16>&);
// delta is there already.
void dot_backward_sm90(const Cuda&, const DotBackward<bf16>&);

// For tests: the two kinds of products, of tiles brought by TMA: x 64 x 64 through registers, y 64 x 64, any ld.
// rows = x y', turned = x y: 64 x 64, f32.
void dot_sm90_products(const Cuda&, const Mat<const bf16>& x, const Mat<const bf16>& y, float* rows, float* turned);

}  // namespace fiedler
