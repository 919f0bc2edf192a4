// kernels/mlp_sm90.h: the products of mlp.h on sm_90's own instructions (mlp_sm90.cu, compiled for sm_90a alone).
#pragma once
#include "kernels/mlp.h"

namespace fiedler {

// Can it be asked for this problem? An sm_90 device; C a multiple of 64, at most 768; M a multiple of 8; fewer than 2^31
// - 64 rows.
bool mlp_sm90_takes(const Cuda&, const MlpForward<bf16>&);
bool mlp_sm90_takes(const Cuda&, const MlpBackward<bf16>&);
void mlp_sm90(const Cuda&, const MlpForward<bf16>&);
void mlp_sm90(const Cuda&, const MlpBackward<bf16>&);

}  // namespace fiedler
