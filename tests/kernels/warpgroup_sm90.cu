#include "tests/kernels/warpgroup_sm90.h"

#include "kernels/common.cuh"
#include "kernels/hopper.cuh"

namespace fiedler::test {
namespace {
using namespace hopper;

__global__ void __launch_bounds__(kWarpgroup) product_kernel(long long* clocks, int late) {
    __shared__ __align__(kTileAlignment) unsigned char matrix[kSwizzleColumns * kSwizzleBytes];
    for (int i = threadIdx.x; i < int(sizeof(matrix)); i += kWarpgroup) matrix[i] = 0;
    publish_shared();
    const std::uint32_t a[4] = {};
    float d[32];
    __syncthreads();
    const int warp = threadIdx.x / kWarp;
    const long long start = clock64();
    while (warp == late && clock64() - start < kWarpgroupDelay) __nanosleep(1000);
    product_begin();
    multiply_registers<false>(d, a, operand(matrix), false);
    product_commit();
    const long long issued = clock64() - start;
    product_wait<0>();
    pin(d);
    if (threadIdx.x % kWarp == 0) clocks[warp] = d[0] == 0.f ? issued : -1;
}

}  // namespace

std::array<long long, 4> clocks_until_issued(const Cuda& device, int late) {
    std::array<long long, 4> clocks{};
    auto* const there = static_cast<long long*>(device_alloc(device, sizeof(clocks)));
    product_kernel<<<1, kWarpgroup, 0, stream_of(device)>>>(there, late);
    LAUNCH_CHECK("warpgroup product");
    copy_to_host(device, clocks.data(), there, sizeof(clocks));
    device_free(device, there);
    return clocks;
}

}  // namespace fiedler::test
