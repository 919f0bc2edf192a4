// kernels/common.cuh: what every .cu shares: checks, 16-byte accesses, warp and block reductions, conversions.
#pragma once
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"

namespace fiedler {

[[noreturn]] void device_failed(const char* what, const char* statement, const char* file, int line);
inline const char* describe(cudaError_t e) { return cudaGetErrorString(e); }
inline const char* describe(cublasStatus_t e) { return cublasLtGetStatusString(e); }

// CUDA_CHECK(cudaMemcpyAsync(...)): throws DeviceError. A pending error is read, so that it does not surface elsewhere.
#define FIEDLER_CHECK_AS(call, success)                                                        \
    do {                                                                                       \
        const auto status_ = (call);                                                           \
        if (status_ != (success)) {                                                            \
            (void)cudaGetLastError();                                                          \
            ::fiedler::device_failed(::fiedler::describe(status_), #call, __FILE__, __LINE__); \
        }                                                                                      \
    } while (false)
#define CUDA_CHECK(call) FIEDLER_CHECK_AS(call, cudaSuccess)
#define CUBLAS_CHECK(call) FIEDLER_CHECK_AS(call, CUBLAS_STATUS_SUCCESS)
// After a launch: LAUNCH_CHECK("norm_forward")
#define LAUNCH_CHECK(kernel)                                                                                 \
    do {                                                                                                     \
        const cudaError_t status_ = cudaGetLastError();                                                      \
        if (status_ != cudaSuccess)                                                                          \
            ::fiedler::device_failed(::fiedler::describe(status_), "launch of " kernel, __FILE__, __LINE__); \
    } while (false)

struct CudaState {
    cudaStream_t stream = nullptr;  // where calls go: in a branch's work, the other one
    cudaEvent_t start = nullptr, stop = nullptr;
    cudaEvent_t marks[kMarks] = {};
    cublasLtHandle_t blas = nullptr;
    void* plans = nullptr;                            // matmul's cache of chosen algorithms
    void (*destroy_plans)(void*) noexcept = nullptr;  // set by matmul with plans
    cudaStream_t side = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;
    bool branched = false;  // side has work that stream does not wait for yet
};

inline cudaStream_t stream_of(const Cuda& d) { return d.state->stream; }

// bf16 is storage (kernels/dtype.h); on the device the same bits are __nv_bfloat16.
using nv_bf16 = __nv_bfloat16;
inline __host__ __device__ const nv_bf16* nv(const bf16* p) { return reinterpret_cast<const nv_bf16*>(p); }
inline __host__ __device__ nv_bf16* nv(bf16* p) { return reinterpret_cast<nv_bf16*>(p); }

constexpr int kWarp = 32;
inline __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline __host__ __device__ std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(nv_bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline nv_bf16 from_float<nv_bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// N values moved by one 16-byte access: Pack<nv_bf16> holds 8, Pack<float> 4.
template <class T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T v[size];
};
template <class T>
__device__ inline Pack<T> load16(const T* p) {
    Pack<T> r;
    *reinterpret_cast<uint4*>(&r) = *reinterpret_cast<const uint4*>(p);
    return r;
}
template <class T>
__device__ inline void store16(T* p, const Pack<T>& r) {
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&r);
}

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
__device__ inline float exp2_fast(float x) {  // 2 ulp; exp2(-inf) = 0
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// exp(x) with a relative error of 2^-22 + |x| 2^-23 at most, or 0 if it is less than 2^-126. expf takes 6 instructions more.
__device__ inline float exp_fast(float x) { return exp2_fast(x * kLog2e); }
__device__ __forceinline__ float reciprocal(float x) {  // 1 ulp
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}
// Sum over the block, the same value in every thread; shared: at least blockDim.x / 32 floats. Two barriers.
__device__ inline float block_sum(float x, float* shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    x = warp_sum(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < warps ? shared[lane] : 0.f;
    x = warp_sum(x);
    __syncthreads();
    return x;
}
__device__ inline float block_max(float x, float* shared) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    x = warp_max(x);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < warps ? shared[lane] : -INFINITY;
    x = warp_max(x);
    __syncthreads();
    return x;
}

}  // namespace fiedler
