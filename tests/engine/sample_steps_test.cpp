// tests/engine/sample_steps_test.cpp: the steps that the thread makes ready are those made one by one, from any cursor; what
// fails in the thread is told in its turn; batches in flight are left alone.
#include "engine/sample_steps.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "engine/config.h"
#include "engine/error.h"
#include "engine/rng.h"
#include "engine/sample_runner.h"
#include "tests/engine/temp_folder.h"

namespace fiedler {
namespace {

constexpr std::int64_t kSamples = 23, kFails = 17;

// Paths of 2 to 5 nodes, whose features say which they are. Sample kFails cannot be read in the epoch `fails_in`.
class Paths final : public SampleSource {
  public:
    explicit Paths(std::int64_t fails_in = -1) : fails_in_(fails_in) {
        shape_.features = kSamples, shape_.edge_types = 2;
        for (std::int64_t s = 0; s < kSamples; ++s) all_.push_back(s);
    }
    const SampleShape& shape() const override { return shape_; }
    std::span<const std::int64_t> samples(Part p) const override {
        return p == Part::train ? std::span<const std::int64_t>(all_) : std::span<const std::int64_t>();
    }
    std::int64_t known(Part p) const override { return std::ssize(samples(p)); }
    std::int64_t nodes_of(std::int64_t s) const override { return 2 + s % 4; }
    std::int64_t edges_of(std::int64_t s) const override { return 2 * (nodes_of(s) - 1); }
    std::int64_t feature_entries_of(std::int64_t s) const override { return nodes_of(s); }
    void gather(std::span<const std::int64_t> samples, Part, SampleBatch& out) const override {
        out = SampleBatch{};
        out.feature_offsets = out.edge_offsets = {0};
        for (const std::int64_t s : samples) {
            const std::int32_t first = out.offsets.back(), n = static_cast<std::int32_t>(nodes_of(s));
            out.samples.push_back(s), out.targets.push_back(static_cast<float>(s)), out.offsets.push_back(first + n);
            for (std::int32_t i = 0; i < n; ++i) {
                out.feature_columns.push_back(static_cast<std::int32_t>(s));
                out.feature_offsets.push_back(static_cast<std::int32_t>(out.feature_columns.size()));
                if (i > 0) out.edge_columns.push_back(first + i - 1), out.edge_types.push_back(1);
                if (i + 1 < n) out.edge_columns.push_back(first + i + 1), out.edge_types.push_back(1);
                out.edge_offsets.push_back(static_cast<std::int32_t>(out.edge_columns.size()));
            }
        }
    }
    void gather_epoch(std::span<const std::int64_t> samples, std::int64_t epoch, SampleBatch& out) const override {
        if (epoch == fails_in_ && std::find(samples.begin(), samples.end(), kFails) != samples.end())
            input_error("data: sample {} is gone", kFails);
        gather(samples, Part::train, out);
        for (float& t : out.targets) t += 100.f * static_cast<float>(epoch);
    }
    std::string row_name(std::int64_t s, std::int64_t) const override { return std::to_string(s); }
    std::string fingerprint() const override { return "paths"; }

  private:
    SampleShape shape_;
    std::vector<std::int64_t> all_;
    std::int64_t fails_in_;
};

// A model with dropout of the features, so that a step's draw shows in its batch.
struct World {
    Paths source;
    SampleLoader loader{source, 16};
    std::unique_ptr<SampleEngine> engine;

    explicit World(std::int64_t fails_in = -1) : source(fails_in) {
        Config c;
        c.task = Task::molecules, c.pattern = "b", c.layers = 1, c.channels = 16, c.heads = 1, c.scalars = 4;
        c.mlp_hidden = 16, c.input_dropout = 0.3;
        EngineOptions o;
        o.threads = 1;
        engine = make_sample_engine(model_spec(c, source.shape(), loader.longest()), loader.capacity(), o);
    }
};

// All that the device would see of a batch. Two blocks that began alike and were written alike are alike.
std::string words_of(const PreparedBatch& b, const SampleEngine& engine) {
    const BatchLayout<float> layout(engine.spec(), engine.capacity(), true, false);
    DeviceSamples s;
    const DeviceBatch d = layout.at(b, b.block.get(), s);
    std::string all;
    const auto add = [&](const auto& v) {
        all.append(reinterpret_cast<const char*>(v.data), static_cast<std::size_t>(v.size) * sizeof(v.data[0]));
    };
    add(Vec<const std::int32_t>(d.seq.offsets, d.seq.count + 1));
    add(s.feature_offsets), add(s.feature_columns), add(s.feature_values), add(s.by_feature_offsets);
    add(s.feature_nodes), add(s.by_feature_values), add(s.graph.offsets), add(s.graph.columns), add(s.graph.types);
    add(s.graph.coefficients), add(Vec<const float>(s.targets.data, s.targets.rows)), add(s.seed);
    return all;
}

constexpr std::uint64_t kSeed = 7;

// The steps from the first on, made one after the other; where each begins.
struct OneByOne {
    std::vector<std::string> steps;
    std::vector<SampleCursor> cursors;
};
OneByOne one_by_one(const World& w, std::int64_t epochs) {
    OneByOne all;
    SampleBatch batch;
    PreparedBatch room = w.engine->room();
    for (std::int64_t epoch = 0, step = 0; epoch < epochs; ++epoch) {
        const auto batches = w.loader.of_epoch(kSeed, epoch);
        for (std::size_t k = 0; k < batches.size(); ++k, ++step) {
            w.source.gather_epoch(batches[k], epoch, batch);
            w.engine->prepare(batch, {true, rng::bits(kSeed, 0x73746570, static_cast<std::uint64_t>(step))}, room);
            all.steps.push_back(words_of(room, *w.engine));
            all.cursors.push_back({epoch, static_cast<std::int64_t>(k), step});
        }
    }
    return all;
}

TEST(SampleSteps, AreThoseMadeOneByOneFromAnyCursor) {
    const World w;
    const OneByOne want = one_by_one(w, 3);
    ASSERT_GT(want.steps.size(), 12u);
    EXPECT_NE(want.steps[0], want.steps[1]);
    for (const std::size_t first : {std::size_t{0}, std::size_t{1}, std::size_t{5}, want.steps.size() - 2}) {
        SampleSteps steps(w.source, w.loader, *w.engine, kSeed, want.cursors[first]);
        for (std::size_t i = first; i < want.steps.size(); ++i) {
            const SampleCursor& at = steps.cursor();
            EXPECT_EQ(at.epoch, want.cursors[i].epoch);
            EXPECT_EQ(at.position, want.cursors[i].position);
            EXPECT_EQ(at.step, want.cursors[i].step);
            EXPECT_EQ(words_of(steps.next(), *w.engine), want.steps[i]) << "from " << first << ", step " << i;
        }
    }
    // At the end of an epoch is the beginning of the next.
    const std::int64_t end = std::ssize(w.loader.of_epoch(kSeed, 0));
    SampleSteps steps(w.source, w.loader, *w.engine, kSeed, {0, end, end});
    EXPECT_EQ(words_of(steps.next(), *w.engine), want.steps[static_cast<std::size_t>(end)]);
    EXPECT_EQ(test::input_error_of([&] {
                  SampleSteps(w.source, w.loader, *w.engine, kSeed, {0, end + 1, end});
              }),
              "checkpoint: its place in the data does not exist; start a new run");
}

TEST(SampleSteps, BatchesInFlightAreLeftAlone) {
    const World w;
    const OneByOne want = one_by_one(w, 3);
    SampleSteps steps(w.source, w.loader, *w.engine, kSeed, {});
    const PreparedBatch* before = nullptr;
    for (std::size_t i = 0; i < want.steps.size(); ++i) {
        const PreparedBatch& now = steps.next();
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // the thread reads ahead as far as it may
        EXPECT_EQ(words_of(now, *w.engine), want.steps[i]);
        if (before) {
            EXPECT_EQ(words_of(*before, *w.engine), want.steps[i - 1]);
        }
        before = &now;
    }
}

TEST(SampleSteps, WhatFailsInTheThreadIsToldInItsTurn) {
    const World whole, w(1);
    const OneByOne want = one_by_one(whole, 2);
    SampleSteps steps(w.source, w.loader, *w.engine, kSeed, {});
    std::size_t taken = 0;
    try {
        for (; taken < want.steps.size(); ++taken) EXPECT_EQ(words_of(steps.next(), *w.engine), want.steps[taken]);
        ADD_FAILURE() << "no error at all";
    } catch (const InputError&) {
    }
    EXPECT_GE(steps.cursor().epoch, 1);
    EXPECT_EQ(steps.cursor().step, static_cast<std::int64_t>(taken));
    EXPECT_EQ(test::input_error_of([&] { steps.next(); }), "data: sample 17 is gone");
}

}  // namespace
}  // namespace fiedler
