// kernels/attention_backward_sm90.h: the backward pass of attention.h with one scalar on sm_90's own instructions
// (attention_backward_one_sm90.cu; its products by themselves: attention_backward_sm90.cu; compiled for sm_90a alone).
#pragma once
#include "kernels/attention.h"

namespace fiedler {

// Can it be asked for this problem? An sm_90 device; D = 64; R = 1; no window; equal sequences of a multiple of 64 tokens;
// numbers of heads side by side; partial at a multiple of 16 bytes, and room in it for attention_numbers_elements and a slab.
bool attention_backward_one_sm90_takes(const Cuda&, const AttentionBackward<bf16>&);
void attention_backward_one_sm90(const Cuda&, const AttentionBackward<bf16>&);

// For tests: the two products of its operands' layouts. x: 64 x 64; y: `keys` x 64, keys 32 or 64; p: keys x 64.
// xy = x y' (64 x keys), xp = x' p' (64 x keys), f32; pt: p as it comes back from registers, keys x 64.
void attention_backward_sm90_products(const Cuda&, const bf16* x, const bf16* y, const bf16* p, float* xy, float* xp,
                                      bf16* pt, int keys);

}  // namespace fiedler
