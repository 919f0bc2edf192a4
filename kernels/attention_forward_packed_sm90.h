// kernels/attention_forward_packed_sm90.h: the forward pass of attention.h for several scalars on sm_90's own instructions
// (attention_forward_packed_sm90.cu, compiled for sm_90a alone).
#pragma once
#include "kernels/attention.h"

namespace fiedler {

// Can it be asked for this problem? An sm_90 device; D = 64; R = 2 .. 8; no window; equal sequences of a multiple of 128
// tokens; scratch.
bool attention_forward_packed_sm90_takes(const Cuda&, const AttentionForward<bf16>&);
void attention_forward_packed_sm90(const Cuda&, const AttentionForward<bf16>&);

}  // namespace fiedler
