// kernels/dynamic_shared.cuh: dynamic shared memory of kernels that every architecture runs.
#pragma once
#include "kernels/common.cuh"

namespace fiedler {

// Of a block: what sm_86, sm_89 and sm_120 have at most (sm_80: 163 KiB, sm_90: 227).
constexpr std::size_t kMostDynamicShared = 99 * 1024;

// Kernels may have 48 KiB without asking.
template <std::size_t bytes, class Kernel>
void allow_shared(Kernel kernel) {
    static_assert(bytes <= kMostDynamicShared);
    if constexpr (bytes > 48 * 1024)
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

}  // namespace fiedler
