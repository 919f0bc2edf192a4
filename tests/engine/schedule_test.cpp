// Learning-rate schedules against their closed forms; the outlier detector.
#include "engine/schedule.h"

#include <gtest/gtest.h>

namespace fiedler {
namespace {

LearningRate recipe(ScheduleKind kind) { return {kind, 2e-3, 0.02, 1000, 100, 0.5}; }

TEST(Schedule, WarmsUpLinearlyFromTheFirstStep) {
    for (const ScheduleKind kind : {ScheduleKind::wsd, ScheduleKind::cosine, ScheduleKind::constant}) {
        const LearningRate lr = recipe(kind);
        EXPECT_DOUBLE_EQ(lr(0), 2e-5);
        EXPECT_DOUBLE_EQ(lr(49), 1e-3);
        EXPECT_DOUBLE_EQ(lr(99), 2e-3);
        EXPECT_DOUBLE_EQ(lr(100), 2e-3);
    }
}

TEST(Schedule, WsdIsConstantToHalfThenLinearToTheLastFraction) {
    const LearningRate lr = recipe(ScheduleKind::wsd);
    EXPECT_DOUBLE_EQ(lr(300), 2e-3);
    EXPECT_DOUBLE_EQ(lr(500), 2e-3);
    EXPECT_NEAR(lr(999), 2e-3 * 0.02, 1e-15);
    EXPECT_NEAR(lr(500) - lr(501), lr(900) - lr(901), 1e-15);
    EXPECT_GT(lr(500), lr(501));
}

TEST(Schedule, CosineFallsFromPeakToTheLastFraction) {
    const LearningRate lr{ScheduleKind::cosine, 1, 0.1, 201, 0, 0.5};
    EXPECT_DOUBLE_EQ(lr(0), 1);
    EXPECT_NEAR(lr(100), 0.55, 1e-12);
    EXPECT_NEAR(lr(200), 0.1, 1e-12);
    for (int s = 1; s <= 200; ++s) EXPECT_LT(lr(s), lr(s - 1));
}

TEST(Schedule, ConstantStaysAndStepsAfterTheLastKeepItsRate) {
    EXPECT_DOUBLE_EQ(recipe(ScheduleKind::constant)(999), 2e-3);
    EXPECT_DOUBLE_EQ(recipe(ScheduleKind::wsd)(5000), recipe(ScheduleKind::wsd)(999));
    EXPECT_DOUBLE_EQ(recipe(ScheduleKind::cosine)(5000), recipe(ScheduleKind::cosine)(999));
}

TEST(Schedule, ShortRunsHaveFiniteRates) {
    for (const ScheduleKind kind : {ScheduleKind::wsd, ScheduleKind::cosine, ScheduleKind::constant})
        for (std::int64_t steps = 1; steps < 5; ++steps)
            for (std::int64_t warmup = 0; warmup <= steps; ++warmup)
                for (const double fraction : {0.0, 0.5, 1.0}) {
                    const LearningRate lr{kind, 1, 0.02, steps, warmup, fraction};
                    for (std::int64_t s = 0; s < steps; ++s) {
                        EXPECT_GE(lr(s), 0.02 - 1e-12);
                        EXPECT_LE(lr(s), 1 + 1e-12);
                    }
                }
    EXPECT_DOUBLE_EQ((LearningRate{ScheduleKind::wsd, 1, 0.02, 1, 0, 0.5})(0), 1);
    EXPECT_DOUBLE_EQ((LearningRate{ScheduleKind::wsd, 1, 0.02, 10, 0, 0})(9), 1);
}

TEST(OutlierDetector, KnowsNothingUntilItsWindowIsFull) {
    OutlierDetector d(4);
    for (const double v : {1., 2., 3.}) {
        EXPECT_EQ(d.score(100), 0);
        EXPECT_TRUE(std::isinf(d.limit(3)));
        d.add(v);
    }
    d.add(4);
    // mean 2.5, deviation sqrt(1.25)
    EXPECT_NEAR(d.score(5), 2.5 / std::sqrt(1.25), 1e-12);
    EXPECT_NEAR(d.limit(3), 2.5 + 3 * std::sqrt(1.25), 1e-12);
    EXPECT_TRUE(std::isinf(d.limit(0)));
}

TEST(OutlierDetector, ForgetsTheOldestAndLeavesOutWhatIsNotFinite) {
    OutlierDetector d(2);
    for (const double v : {100., 1., 3.}) d.add(v);
    d.add(std::numeric_limits<double>::quiet_NaN());
    EXPECT_EQ(d.values(), (std::vector<double>{1, 3}));
    EXPECT_NEAR(d.score(4), 2, 1e-12);
    EXPECT_TRUE(std::isinf(d.score(std::numeric_limits<double>::quiet_NaN())));
    EXPECT_TRUE(std::isinf(d.score(std::numeric_limits<double>::infinity())));
}

TEST(OutlierDetector, AFlatStretchDoesNotDivideByZero) {
    OutlierDetector d(3);
    for (int i = 0; i < 3; ++i) d.add(2);
    EXPECT_EQ(d.score(2), 0);
    EXPECT_NEAR(d.score(2 + 2e-6), 1, 1e-6);
}

TEST(OutlierDetector, RestoredStateGoesOnBitEqual) {
    OutlierDetector a(8), b(8);
    for (int i = 0; i < 11; ++i) a.add(std::sin(i) + 3);
    b.restore(a.values());
    for (int i = 0; i < 20; ++i) {
        EXPECT_EQ(a.score(4.1), b.score(4.1));
        a.add(std::cos(i));
        b.add(std::cos(i));
    }
    b.restore(std::vector<double>(100, 1.0));
    EXPECT_EQ(b.values().size(), 8u);
}

}  // namespace
}  // namespace fiedler
