// kernels/energy_sm90.h: energy's kernels with sm_90's own products (energy_sm90.cu, compiled for sm_90a alone).
#pragma once
#include "kernels/energy.h"

namespace fiedler {

// An sm_90 device; heads of 16, 32, 64 or 128.
bool energy_sm90_prepares(const Cuda&, int dim);
// See energy_prepare().
void energy_sm90_prepare(const Cuda&, FeatureLaplacian<float>& lap, int scalars, const Vec<std::byte>& memory);
// Likewise; the matrix is prepared, and the rows of scalars are aligned to what one access takes: R / 4 numbers, or one.
bool energy_sm90_takes(const Cuda&, const EnergyForward<bf16>&);
bool energy_sm90_takes(const Cuda&, const EnergyBackward<bf16>&);
void energy_sm90(const Cuda&, const EnergyForward<bf16>&);
// Returns how many groups of threads share a column (a head of a side), each of which leaves its sums in scratch.
int energy_sm90(const Cuda&, const EnergyBackward<bf16>&);

}  // namespace fiedler
