// kernels/gate_args.cuh: what the forget gate's kernels are told (gate.cu, gate_long.cuh).
#pragma once
#include "kernels/common.cuh"
#include "kernels/gate.h"
#include "kernels/gate_scan.cuh"

namespace fiedler {
namespace gate_scan {

// One double for each chunk and head, as two floats: its sum, later what is carried into it.
struct Carries {
    float* data;  // of the first sequence, chunk and head
    std::int64_t ld_sequence, ld_chunk, ld_head, ld_part;
    __device__ float* at(std::int64_t s, std::int64_t c, std::int64_t h) const {
        return data + s * ld_sequence + c * ld_chunk + h * ld_head;
    }
    __device__ double get(std::int64_t s, std::int64_t c, std::int64_t h) const {
        const float* p = at(s, c, h);
        return double(p[0]) + double(p[ld_part]);
    }
    __device__ Carried carried(std::int64_t s, std::int64_t c, std::int64_t h) const {
        const float* p = at(s, c, h);
        return {p[0], p[ld_part]};
    }
    __device__ void set(std::int64_t s, std::int64_t c, std::int64_t h, double x) const {
        float* p = at(s, c, h);
        p[0] = float(x);
        p[ld_part] = isfinite(p[0]) ? float(x - double(p[0])) : 0.f;
    }
};

// How sequences are cut: `chunks` each, of `length` steps but for the last, which takes the rest. One chunk: not cut.
struct Cut {
    int chunks, length;
};

struct ForwardArgs {
    float* F;
    const float *z, *bias;
    float* carry;  // or null
    std::int64_t ld_F, ld_z;
    int heads;
    Packed seq;
    Cut cut;
    Carries carries;  // where sequences are cut
};
struct BackwardArgs {
    nv_bf16* dz;
    float* partial;  // [rows][heads]: each block's share of dbias
    const float *dF, *z, *bias;
    std::int64_t ld_dz, ld_dF, ld_z;
    int heads, rows;
    Packed seq;
    Cut cut;
    Carries carries;
};

}  // namespace gate_scan
}  // namespace fiedler
