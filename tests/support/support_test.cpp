// Tests of the tests: the comparators must fail where a broken kernel would hide.
#include <gtest/gtest-spi.h>

#include "tests/support/buffer.h"
#include "tests/support/compare.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

using CpuBuffer = Buffer<float, Cpu>;

const Values kRef = random_values(1000, 1);

TEST(Support, ExactCopyPasses) {
    EXPECT_TRUE(close(kRef, kRef, kRef));
    EXPECT_TRUE(close_to(kRef, kRef, 0));
}
TEST(Support, RoundedCopyPassesItsOwnTolerance) {
    const Values low = round_to<bf16>(kRef);
    EXPECT_TRUE(close(low, kRef, low));
}
TEST(Support, NanFails) {
    Values v = kRef;
    v[500] = std::nan("");
    EXPECT_FALSE(close(v, kRef, round_to<bf16>(kRef)));
    EXPECT_FALSE(close_to(v, kRef, 1e9));
    EXPECT_FALSE(close_to(kRef, v, 1e9)) << "a NaN in the reference is no reference";
    EXPECT_FALSE(close_to(Values(3, std::nan("")), Values(3, std::nan("")), 1e9));
}
TEST(Support, InfinityFails) {
    Values v = kRef;
    v[0] = INFINITY;
    EXPECT_FALSE(close(v, kRef, kRef));
}
TEST(Support, OnePercentFails) {
    Values v = kRef;
    for (double& x : v) x *= 1.01;
    EXPECT_FALSE(close(v, kRef, round_to<bf16>(kRef)));
    EXPECT_FALSE(close_to(v, kRef, 1e-3));
}
TEST(Support, ShiftedRowFails) {
    Values v(kRef.begin() + 10, kRef.end());
    v.insert(v.end(), kRef.begin(), kRef.begin() + 10);
    EXPECT_FALSE(close(v, kRef, round_to<bf16>(kRef)));
}
TEST(Support, OneWrongElementFails) {
    Values v = round_to<bf16>(kRef);
    v[999] += 0.5;
    EXPECT_FALSE(close(v, kRef, round_to<bf16>(kRef)));
}
TEST(Support, NothingComparedFails) {
    EXPECT_FALSE(close({}, {}, {}));
    EXPECT_FALSE(close_to({}, {}, 1));
    EXPECT_FALSE(close_to({}, kRef, 1));
    EXPECT_FALSE(identical(nullptr, nullptr, 0));
}
TEST(Support, LengthMismatchFails) { EXPECT_FALSE(close_to(Values(5, 1.0), Values(6, 1.0), 1)); }
TEST(Support, GradcheckAcceptsTheTruthAndRejectsOnePercent) {
    Values x = random_values(20, 2), g(20);
    const auto f = [&] {
        double s = 0;
        for (double v : x) s += std::sin(v);
        return s;
    };
    for (std::size_t i = 0; i < 20; ++i) g[i] = std::cos(x[i]);
    EXPECT_TRUE(gradient_matches(g, x, f));
    for (double& v : g) v *= 1.01;
    EXPECT_FALSE(gradient_matches(g, x, f));
}
TEST(Support, GradcheckOfAConstantFails) {
    Values x(5, 1.0);
    EXPECT_FALSE(gradient_matches(Values(5, 0.0), x, [] { return 3.0; }));
}
TEST(Support, Bf16RoundsToNearestEven) {
    EXPECT_EQ(float(bf16(1.00390625f)), 1.0f);       // half-way, even below
    EXPECT_EQ(float(bf16(1.01171875f)), 1.015625f);  // half-way, even above
    EXPECT_TRUE(std::isnan(float(bf16(std::nanf("")))));
    EXPECT_TRUE(std::isinf(float(bf16(INFINITY))));
}
TEST(Support, FencesSeeAWriteOutside) {
    static const Cpu cpu;
    EXPECT_NONFATAL_FAILURE(
        {
            CpuBuffer b(cpu, 4);
            b.data()[4] = 1.f;  // one past the end, inside the fence
            b.check_fences();
            b.data()[4] = std::bit_cast<float>(0xa5a5a5a5u);
        },
        "outside a buffer");
}

}  // namespace
}  // namespace fiedler::test
