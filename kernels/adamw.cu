// kernels/adamw.cu: AdamW on the GPU (contract in adamw.h). Bound by memory: 34 bytes move per parameter.
#include "kernels/adamw.h"
#include "kernels/common.cuh"

namespace fiedler {

namespace {
constexpr int kThreads = 256;
constexpr int kVector = Pack<float>::size;

struct alignas(8) Weights4 {  // kVector weights, stored by one 8-byte access
    nv_bf16 v[kVector];
};

using Control = StepControl<float>;

__device__ inline void step(const Control& r, float decay, float grad, float& w, float& m, float& v) {
    const float g = r.scale * grad;
    m = r.beta1 * m + (1.f - r.beta1) * g;
    v = r.beta2 * v + (1.f - r.beta2) * g * g;
    w -= r.lr * (m * r.inverse1 / (sqrtf(v * r.inverse2) + r.eps) + decay * w);
}

// One thread: kVector neighbouring parameters, or what is left of them at the end. Five blocks to a multiprocessor: left
// to itself, the compiler goes for six and spills.
__global__ void __launch_bounds__(kThreads, 5)
    adamw_kernel(float* master, float* m, float* v, float* grads, nv_bf16* weights, std::int64_t n,
                 std::int64_t decay_count, const Control* control) {
    const std::int64_t first = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
    if (first >= n) return;
    const Control r = *control;  // 16 bytes at a time, the same for all threads
    const bool skip = r.skip != 0.f;
    if (first + kVector <= n) {
        if (!skip) {
            Pack<float> w4 = load16(master + first), m4 = load16(m + first), v4 = load16(v + first);
            const Pack<float> g4 = load16(grads + first);
            Weights4 rounded;
#pragma unroll
            for (int k = 0; k < kVector; ++k) {
                step(r, first + k < decay_count ? r.decay : 0.f, g4.v[k], w4.v[k], m4.v[k], v4.v[k]);
                rounded.v[k] = from_float<nv_bf16>(w4.v[k]);
            }
            store16(master + first, w4);
            store16(m + first, m4);
            store16(v + first, v4);
            *reinterpret_cast<uint2*>(weights + first) = *reinterpret_cast<const uint2*>(&rounded);
        }
        store16(grads + first, Pack<float>{});
        return;
    }
    for (std::int64_t i = first; i < n; ++i) {
        if (!skip) {
            step(r, i < decay_count ? r.decay : 0.f, grads[i], master[i], m[i], v[i]);
            weights[i] = from_float<nv_bf16>(master[i]);
        }
        grads[i] = 0.f;
    }
}

__global__ void __launch_bounds__(kThreads) cast_weights_kernel(nv_bf16* weights, const float* master, std::int64_t n) {
    constexpr int kPack = Pack<nv_bf16>::size;
    const std::int64_t first = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) * kPack;
    if (first + kPack <= n) {
        const Pack<float> lo = load16(master + first), hi = load16(master + first + kVector);
        Pack<nv_bf16> out;
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
            out.v[k] = from_float<nv_bf16>(lo.v[k]);
            out.v[kVector + k] = from_float<nv_bf16>(hi.v[k]);
        }
        store16(weights + first, out);
        return;
    }
    for (std::int64_t i = first; i < n; ++i) weights[i] = from_float<nv_bf16>(master[i]);
}

bool is_aligned(const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; }
}  // namespace

void adamw(const Cuda& d, const Adamw<bf16>& p) {
    check(p);
    const std::int64_t n = p.master.size;
    FIEDLER_REQUIRE("adamw", is_shape(p.weights, n) && is_aligned(p.weights.data, 8));
    FIEDLER_REQUIRE("adamw", is_aligned(p.master.data, 16) && is_aligned(p.m.data, 16));
    FIEDLER_REQUIRE("adamw", is_aligned(p.v.data, 16) && is_aligned(p.grads.data, 16));
    if (n == 0) return;
    const auto blocks = static_cast<unsigned>(ceil_div(n, std::int64_t(kThreads) * kVector));
    adamw_kernel<<<blocks, kThreads, 0, stream_of(d)>>>(p.master.data, p.m.data, p.v.data, p.grads.data,
                                                        nv(p.weights.data), n, p.decay_count, p.control);
    LAUNCH_CHECK("adamw");
}

void cast_weights(const Cuda& d, const Cast<bf16>& p) {
    const std::int64_t n = p.master.size;
    FIEDLER_REQUIRE("adamw", is_shape(p.master, n) && is_shape(p.weights, n));
    FIEDLER_REQUIRE("adamw", is_aligned(p.master.data, 16) && is_aligned(p.weights.data, 16));
    if (n == 0) return;
    const auto blocks = static_cast<unsigned>(ceil_div(n, std::int64_t(kThreads) * Pack<nv_bf16>::size));
    cast_weights_kernel<<<blocks, kThreads, 0, stream_of(d)>>>(nv(p.weights.data), p.master.data, n);
    LAUNCH_CHECK("cast_weights");
}

}  // namespace fiedler
