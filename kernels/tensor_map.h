// kernels/tensor_map.h: what TMA knows about a matrix in global memory: sizes, strides, and the box that one load brings
// into shared memory: float as it is; bf16 and bytes with a swizzle, of 128 bytes (kernels/hopper.cuh) unless said.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "kernels/common.cuh"
#include "kernels/fp8.h"

namespace fiedler {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked of the runtime: nothing is linked against libcuda.
inline EncodeTiled encode_tiled() {
    static const EncodeTiled function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        CUDA_CHECK(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        if (result != cudaDriverEntryPointSuccess || !found) throw DeviceError("the driver has no tensor maps");
        return reinterpret_cast<EncodeTiled>(found);
    }();
    return function;
}

// size[0] elements lie side by side; stride[d] bytes are between neighbours along dimension d + 1. promotion: how much
// is brought into the L2 cache at least.
template <int rank, class T>
CUtensorMap tensor_map(const T* data, const cuuint64_t (&size)[rank], const cuuint64_t (&stride)[rank - 1],
                       const cuuint32_t (&box)[rank], CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                       CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    cuuint32_t every[rank];
    std::fill_n(every, rank, 1u);
    CUtensorMap map;
    using U = std::remove_const_t<T>;
    constexpr bool kFloat = std::is_same_v<U, float>,
                   kBytes = std::is_same_v<U, std::int8_t> || std::is_same_v<U, e5m2>;
    static_assert(kFloat || kBytes || std::is_same_v<U, bf16>);
    constexpr CUtensorMapDataType kType = kFloat   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                          : kBytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult status =
        encode_tiled()(&map, kType, rank, const_cast<U*>(data), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                       kFloat ? CU_TENSOR_MAP_SWIZZLE_NONE : swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw DeviceError("cuTensorMapEncodeTiled: error " + std::to_string(int(status)));
    return map;
}

}  // namespace fiedler
