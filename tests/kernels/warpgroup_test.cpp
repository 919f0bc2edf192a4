// warpgroup: what kernels of sm_90 take for granted that PTX does not say: a product of a warpgroup is not issued before all
// its warps have come to it. So one that goes on knows what the others have read (BoxSupply in kernels/energy_sm90.cu).
#include <gtest/gtest.h>

#include "tests/kernels/warpgroup_sm90.h"
#include "tests/support/buffer.h"

namespace fiedler::test {
namespace {

TEST(Warpgroup, GpuProductWaitsForAllWarps) {
    FIEDLER_GPU_OR_SKIP();
    if (gpu().arch != 90) GTEST_SKIP() << "NOT TESTED: sm_" << gpu().arch << " has no such products";
    for (int late = 0; late < 4; ++late)
        for (const long long clocks : clocks_until_issued(gpu(), late))
            EXPECT_GT(clocks, kWarpgroupDelay / 2) << "warp " << late << " is late";
}

}  // namespace
}  // namespace fiedler::test
