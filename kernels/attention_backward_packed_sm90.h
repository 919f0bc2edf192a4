// kernels/attention_backward_packed_sm90.h: the backward pass of attention.h with several scalars on sm_90's own instructions
// (attention_backward_packed_sm90.cu, compiled for sm_90a alone).
#pragma once
#include "kernels/attention.h"

namespace fiedler {

// Can it be asked for this problem? An sm_90 device; D = 64; R = 2 .. 8; no window; equal sequences of a multiple of 64
// tokens; numbers of heads side by side; partial at a multiple of 16 bytes, and room in it for attention_numbers_elements and
// a slab.
bool attention_backward_packed_sm90_takes(const Cuda&, const AttentionBackward<bf16>&);
void attention_backward_packed_sm90(const Cuda&, const AttentionBackward<bf16>&);

}  // namespace fiedler
