// kernels/mlp.cu: ReLU^2 (see mlp.h). Bound by memory: each thread moves kPacks times 16 bytes of each array, all loads
// issued before the first store.
#include "kernels/common.cuh"
#include "kernels/mlp.h"

namespace fiedler {
namespace {

constexpr int kThreads = 256, kPacks = 4, kPackSize = Pack<nv_bf16>::size;
constexpr int kBlockElements = kThreads * kPacks * kPackSize;

// max(u, 0), but a NaN stays a NaN (fmaxf would drop it).
__device__ float relu(float u) { return u < 0.f ? 0.f : u; }
__device__ nv_bf16 activation(nv_bf16 u) {
    const float r = relu(to_float(u));
    return from_float<nv_bf16>(r * r);
}
__device__ nv_bf16 gradient(nv_bf16 dh, nv_bf16 u) {
    return from_float<nv_bf16>(to_float(dh) * (2.f * relu(to_float(u))));
}

// h may be u: no __restrict__, and a thread reads what it writes before it writes.
__global__ __launch_bounds__(kThreads) void forward_kernel(nv_bf16* h, const nv_bf16* u, std::int64_t n) {
    const std::int64_t packs = n / kPackSize, first = std::int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
    Pack<nv_bf16> value[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const std::int64_t pack = first + k * kThreads;
        if (pack < packs) value[k] = load16(u + pack * kPackSize);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const std::int64_t pack = first + k * kThreads;
        if (pack >= packs) continue;
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) value[k].v[e] = activation(value[k].v[e]);
        store16(h + pack * kPackSize, value[k]);
    }
    const std::int64_t tail = packs * kPackSize + threadIdx.x;  // fewer than kPackSize elements are left
    if (blockIdx.x == 0 && tail < n) h[tail] = activation(u[tail]);
}

__global__ __launch_bounds__(kThreads) void backward_kernel(nv_bf16* du, const nv_bf16* dh, const nv_bf16* u,
                                                            std::int64_t n) {
    const std::int64_t packs = n / kPackSize, first = std::int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
    Pack<nv_bf16> value[kPacks], gate[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const std::int64_t pack = first + k * kThreads;
        if (pack >= packs) continue;
        value[k] = load16(dh + pack * kPackSize);
        gate[k] = load16(u + pack * kPackSize);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const std::int64_t pack = first + k * kThreads;
        if (pack >= packs) continue;
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) value[k].v[e] = gradient(value[k].v[e], gate[k].v[e]);
        store16(du + pack * kPackSize, value[k]);
    }
    const std::int64_t tail = packs * kPackSize + threadIdx.x;
    if (blockIdx.x == 0 && tail < n) du[tail] = gradient(dh[tail], u[tail]);
}

bool is_aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }
unsigned blocks_for(std::int64_t n) { return unsigned(ceil_div(n, std::int64_t(kBlockElements))); }

}  // namespace

void mlp_forward(const Cuda& dev, const MlpForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("mlp", is_aligned16(p.h.data) && is_aligned16(p.u.data));
    if (p.u.size == 0) return;
    forward_kernel<<<blocks_for(p.u.size), kThreads, 0, stream_of(dev)>>>(nv(p.h.data), nv(p.u.data), p.u.size);
    LAUNCH_CHECK("mlp_forward");
}

void mlp_backward(const Cuda& dev, const MlpBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("mlp", is_aligned16(p.du.data) && is_aligned16(p.dh.data) && is_aligned16(p.u.data));
    if (p.u.size == 0) return;
    backward_kernel<<<blocks_for(p.u.size), kThreads, 0, stream_of(dev)>>>(nv(p.du.data), nv(p.dh.data), nv(p.u.data),
                                                                           p.u.size);
    LAUNCH_CHECK("mlp_backward");
}

}  // namespace fiedler
