// kernels/gradnorm.cu: global gradient norm on the GPU (contract in gradnorm.h). Bound by one read of the gradients.
#include <cmath>

#include "kernels/common.cuh"
#include "kernels/gradnorm.h"

namespace fiedler {

namespace {
constexpr int kBlocks = kGradnormPartials, kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    gradnorm_partial_kernel(const float* grads, std::int64_t n, float unscale, float* partials) {
    __shared__ float shared[kThreads / kWarp];
    const std::int64_t thread = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    constexpr std::int64_t kStride = std::int64_t(kBlocks) * kThreads;
    const std::int64_t packs = n / Pack<float>::size;
    float sum[Pack<float>::size] = {};
#pragma unroll 4
    for (std::int64_t i = thread; i < packs; i += kStride) {
        const float4 four = __ldcs(reinterpret_cast<const float4*>(grads) + i);  // read once: first to leave the caches
        const float g[Pack<float>::size] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < Pack<float>::size; ++k) {
            const float x = unscale * g[k];
            sum[k] += x * x;
        }
    }
    const std::int64_t rest = packs * Pack<float>::size + thread;  // the last n % 4 values
    if (rest < n) {
        const float x = unscale * grads[rest];
        sum[0] += x * x;
    }
    const float total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    gradnorm_final_kernel(const float* partials, StepControl<float>* control, float unscale) {
    __shared__ double shared[kThreads];
    double sum = 0;
    for (int i = threadIdx.x; i < kBlocks; i += kThreads) sum += double(partials[i]);
    shared[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x != 0) return;
    const float norm = static_cast<float>(sqrt(shared[0]));
    const bool finite = isfinite(norm);
    control->norm = norm;
    control->skip = !finite || norm > control->skip_above ? 1.f : 0.f;
    const float max_norm = control->max_norm;
    float scale = unscale;
    if (max_norm > 0 && norm > max_norm) scale = unscale * (max_norm / norm);
    control->scale = finite ? scale : 0.f;
}
}  // namespace

void gradnorm(const Cuda& d, const Gradnorm<float>& p) {
    check(p);
    FIEDLER_REQUIRE("gradnorm", p.partials && p.partials.size >= kGradnormPartials);
    FIEDLER_REQUIRE("gradnorm", reinterpret_cast<std::uintptr_t>(p.grads.data) % 16 == 0);
    gradnorm_partial_kernel<<<kBlocks, kThreads, 0, stream_of(d)>>>(p.grads.data, p.grads.size, p.unscale,
                                                                    p.partials.data);
    LAUNCH_CHECK("gradnorm_partial");
    gradnorm_final_kernel<<<1, kThreads, 0, stream_of(d)>>>(p.partials.data, p.control, p.unscale);
    LAUNCH_CHECK("gradnorm_final");
}

}  // namespace fiedler
