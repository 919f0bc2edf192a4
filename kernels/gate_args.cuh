// kernels/gate_args.cuh: what the forget gate's kernels are told (gate.cu, gate_long.cuh).
#pragma once
#include "kernels/common.cuh"
#include "kernels/gate.h"
#include "kernels/gate_scan.cuh"

namespace fiedler {
namespace gate_scan {

// What the chunks of long sequences say they add up to: the bits of a double for each sequence, head and chunk.
struct Said {
    unsigned long long* data;
    int heads, chunks;  // of a sequence
    __device__ unsigned long long* of_head(int s, int h) const { return data + (std::int64_t(s) * heads + h) * chunks; }
};

struct ForwardArgs {
    float* F;
    const float *z, *bias;
    float* carry;  // or null
    std::int64_t ld_F, ld_z;
    int heads;
    Packed seq;
};
struct BackwardArgs {
    nv_bf16* dz;
    float* partial;  // [rows][heads]: each block's share of dbias
    const float *dF, *z, *bias;
    std::int64_t ld_dz, ld_dF, ld_z;
    int heads, rows;
    Packed seq;
};

}  // namespace gate_scan
}  // namespace fiedler
