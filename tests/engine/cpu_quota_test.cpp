// The number of CPUs of a container's quota.
#include "engine/cpu_quota.h"

#include <gtest/gtest.h>

namespace fiedler {
namespace {

TEST(CpuQuota, IsRoundedUp) {
    EXPECT_EQ(cpus_of_quota("200000 100000"), 2);
    EXPECT_EQ(cpus_of_quota("150000 100000\n"), 2);
    EXPECT_EQ(cpus_of_quota("1000 100000"), 1);
    EXPECT_EQ(cpus_of_quota("9223372036854000000 1"), 1 << 20);
}
TEST(CpuQuota, NoLimitIsNone) {
    for (const char* text : {"max 100000", "-1 100000", "0 100000", "100000", "100000 0", "", " ", "some 1"})
        EXPECT_FALSE(cpus_of_quota(text)) << text;
}

}  // namespace
}  // namespace fiedler
