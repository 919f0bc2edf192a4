// kernels/dependent_launch.cuh: a kernel of sm_90 or later that starts while the one before it in the stream ends
// (programmatic dependent launch).
//
// The first kernel calls dependents_may_start(): once all its blocks have, the second one's may take what room is left. They
// may do what does not depend on the first; before the rest a thread that reads or writes what the first has to do with
// calls wait_for_previous(), which returns when the first is over and its writes are seen. Some thread of the second does
// in any case: then whatever comes after the second comes after the first too. The first is launched as usual, so that
// what is older than it is over when either begins. Or it depends on a third itself: it is over after that one, since some
// thread of it waits, and the second must do nothing that memory shows before it waits.
#pragma once
#include <cuda_runtime.h>

#include "kernels/common.cuh"

namespace fiedler {

__device__ inline void dependents_may_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// kernel<<<grid, block, bytes, stream>>>(args...), dependent on the kernel that was launched last. One after the other before
// sm_90, and in a graph that is being recorded: kernels follow each other at once there.
template <class... Parameters, class... Args>
void launch_dependent(const Cuda& device, void (*kernel)(Parameters...), dim3 grid, dim3 block, int bytes,
                      const Args&... args) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block;
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes), config.stream = stream_of(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(config.stream, &status));
    config.attrs = &attribute;
    config.numAttrs = device.arch >= 90 && status == cudaStreamCaptureStatusNone ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(args)...));
}

}  // namespace fiedler
