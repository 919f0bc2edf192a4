#include "engine/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

namespace fiedler {
namespace {

const std::vector<float> kLogits = {0.f, 2.f, 1.f, -1.f, 2.f};

TEST(Sampling, GreedyTakesTheLargestAndTheLowestOfTies) { EXPECT_EQ(sample(kLogits, {.temperature = 0}, 0), 1); }

TEST(Sampling, FrequenciesFollowTheSoftmax) {
    std::map<int, int> count;
    constexpr int kDraws = 200000;
    for (int i = 0; i < kDraws; ++i)
        ++count[sample(kLogits, {.temperature = 0.7, .seed = 3}, static_cast<std::uint64_t>(i))];
    double sum = 0;
    for (const float l : kLogits) sum += std::exp(l / 0.7);
    for (int v = 0; v < 5; ++v) {
        const double p = std::exp(kLogits[static_cast<std::size_t>(v)] / 0.7) / sum;
        EXPECT_NEAR(double(count[v]) / kDraws, p, 5 * std::sqrt(p / kDraws)) << v;
    }
}
TEST(Sampling, TopKKeepsK) {
    for (std::uint64_t i = 0; i < 2000; ++i) {
        const auto t = sample(kLogits, {.temperature = 1, .top_k = 2}, i);
        EXPECT_TRUE(t == 1 || t == 4) << t;
    }
}
TEST(Sampling, TopPKeepsTheSmallestSetThatReachesIt) {
    // Probabilities: 1 and 4 have 0.38 each, 2 has 0.14: 0.7 needs the two, 0.8 a third.
    bool third = false;
    for (std::uint64_t i = 0; i < 2000; ++i) {
        const auto two = sample(kLogits, {.temperature = 1, .top_p = 0.7}, i);
        EXPECT_TRUE(two == 1 || two == 4) << two;
        const auto three = sample(kLogits, {.temperature = 1, .top_p = 0.8}, i);
        EXPECT_TRUE(three == 1 || three == 4 || three == 2) << three;
        third = third || three == 2;
    }
    EXPECT_TRUE(third);
}
TEST(Sampling, SeedAndPositionDecide) {
    int differ = 0;
    for (std::uint64_t i = 0; i < 100; ++i) {
        EXPECT_EQ(sample(kLogits, {.seed = 5}, i), sample(kLogits, {.seed = 5}, i));
        differ += sample(kLogits, {.seed = 5}, i) != sample(kLogits, {.seed = 6}, i);
    }
    EXPECT_GT(differ, 10);
}

}  // namespace
}  // namespace fiedler
