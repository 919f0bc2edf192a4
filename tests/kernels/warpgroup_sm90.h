// tests/kernels/warpgroup_sm90.h: when the warps of a warpgroup go on behind a product that one of them comes to late.
#pragma once
#include <array>

#include "kernels/device.h"

namespace fiedler::test {

constexpr long long kWarpgroupDelay = 200000;  // clocks
// Clocks from a common start until each of the four warps has issued the product; `late` comes to it kWarpgroupDelay
// after the others. sm_90 only.
std::array<long long, 4> clocks_until_issued(const Cuda&, int late);

}  // namespace fiedler::test
