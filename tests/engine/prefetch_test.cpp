// tests/engine/prefetch_test.cpp: the same steps as without a thread; errors in their turn; a bounded lead; a clean end.
#include "engine/prefetch.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>

#include "engine/batch.h"
#include "engine/dataset.h"
#include "engine/error.h"
#include "tests/engine/temp_folder.h"

namespace fiedler {
namespace {

using std::chrono::milliseconds;

using MicroBatches = std::vector<Batch>;

// A prefetcher of steps of so many micro-batches, the cursor moving by `windows` with each; `kept` steps stay as they are.
class Steps : public Prefetcher<MicroBatches> {
  public:
    Steps(std::function<void(std::int64_t, Batch&)> read, std::size_t micro_batches, std::int64_t windows,
          std::int64_t cursor, std::size_t kept = 1)
        : Prefetcher<MicroBatches>(
              [read, windows](std::int64_t& at, MicroBatches& step) {
                  for (Batch& b : step) {
                      read(at, b);
                      at += windows;
                  }
              },
              std::vector(kAhead + kept, MicroBatches(micro_batches)), cursor) {}
};

void numbered(std::int64_t cursor, Batch& b) { b.inputs.assign(3, static_cast<std::int32_t>(cursor)); }

bool same(const Batch& a, const Batch& b) {
    return a.rows == b.rows && a.length == b.length && a.inputs == b.inputs && a.targets == b.targets &&
           a.offsets == b.offsets && a.begin == b.begin && a.end == b.end;
}

TEST(Prefetch, StepsAreThoseOfTheDataset) {
    const test::TempFolder folder;
    std::vector<std::int32_t> tokens(2000);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(i * 7919 % 100);
    ShardWriter writer(folder / "train.bin", 100);
    writer.append(tokens);
    writer.finish();
    const Dataset data = Dataset::open(folder / "train.bin");
    const TrainWindows w{4, 16, 3, false, 1, 2};  // the second of two processes
    constexpr std::size_t kMicroBatches = 3;
    for (const std::int64_t start : {0, 24, 240}) {
        Steps batches([&](std::int64_t c, Batch& b) { data.train_batch(c, w, b); }, kMicroBatches, w.rows * w.world,
                      start);
        std::int64_t cursor = start;
        for (int step = 0; step < 40; ++step) {  // over several epochs
            EXPECT_EQ(batches.cursor(), cursor) << "that of the steps taken";
            const std::vector<Batch>& got = batches.next();
            ASSERT_EQ(got.size(), kMicroBatches);
            for (const Batch& b : got) {
                Batch want;
                data.train_batch(cursor, w, want);
                EXPECT_TRUE(same(b, want)) << "step " << step;
                cursor += w.rows * w.world;
            }
        }
        EXPECT_EQ(batches.cursor(), cursor);
    }
}

TEST(Prefetch, ALeadOfTwoStepsAndNoMore) {
    std::atomic<std::int64_t> read = 0;
    Steps batches([&](std::int64_t c, Batch& b) { numbered(c, b), ++read; }, 1, 5, 100);
    const auto settled = [&](std::int64_t expected) {
        for (int wait = 0; wait < 2000 && read < expected; ++wait) std::this_thread::sleep_for(milliseconds(1));
        std::this_thread::sleep_for(milliseconds(20));
        return read == expected;
    };
    EXPECT_TRUE(settled(2)) << read;
    for (std::int64_t step = 0; step < 4; ++step) {
        const std::vector<Batch>& got = batches.next();
        EXPECT_TRUE(settled(step + 3)) << read;
        EXPECT_EQ(got[0].inputs[0], 100 + 5 * step) << "changed while it was held";
        EXPECT_EQ(batches.cursor(), 105 + 5 * step);
    }
}

TEST(Prefetch, StepsInFlightStayAsTheyAre) {
    constexpr std::size_t kKept = 2;
    Steps batches(numbered, 1, 1, 0, kKept);
    std::vector<const Batch*> held;
    for (std::int32_t step = 0; step < 50; ++step) {
        held.push_back(batches.next().data());
        std::this_thread::sleep_for(milliseconds(1));  // the thread reads ahead as far as it may
        for (std::size_t k = 0; k < std::min(kKept, held.size()); ++k)
            EXPECT_EQ(held[held.size() - 1 - k]->inputs[0], step - static_cast<std::int32_t>(k));
    }
}

TEST(Prefetch, AnErrorComesInItsTurnAndStays) {
    Steps batches(
        [](std::int64_t c, Batch& b) {
            if (c == 4) input_error("data: no more");
            numbered(c, b);
        },
        2, 1, 0);
    EXPECT_EQ(batches.next()[1].inputs[0], 1);
    std::this_thread::sleep_for(milliseconds(20));  // the thread has failed by now
    EXPECT_EQ(batches.next()[0].inputs[0], 2);
    for (int again = 0; again < 3; ++again) {
        EXPECT_EQ(test::input_error_of([&] { batches.next(); }), "data: no more");
        EXPECT_EQ(batches.cursor(), 4) << "an error takes nothing";
    }
}

TEST(Prefetch, EndsWhereverTheThreadIs) {
    for (int taken = 0; taken < 6; ++taken) {
        Steps batches(numbered, 2, 1, 0);
        for (int i = 0; i < taken; ++i) batches.next();
        if (taken % 2 == 0) std::this_thread::sleep_for(milliseconds(5));  // the thread waits for room
    }
    std::atomic<bool> reading = false, done = false;
    {
        Steps batches(
            [&](std::int64_t, Batch&) {
                reading = true;
                std::this_thread::sleep_for(milliseconds(30));
                done = true;
            },
            1, 1, 0);
        while (!reading) std::this_thread::sleep_for(milliseconds(1));
    }
    EXPECT_TRUE(done) << "the thread outlived the prefetcher";
}

}  // namespace
}  // namespace fiedler
