// engine/sample_steps.h: the steps of a training on samples, epoch after epoch, each made ready while the device computes.
#pragma once
#include "engine/prefetch.h"
#include "engine/sample_engine.h"
#include "engine/sample_loader.h"

namespace fiedler {

// Where a step stands: batch `position` of its epoch, with the seed of step `step` for dropout and signs.
struct SampleCursor {
    std::int64_t epoch = 0, position = 0, step = 0;
};

// Source, loader and engine must outlive it. What the steps are depends on seed and cursor alone.
class SampleSteps {
  public:
    // InputError: the cursor's place is beyond its epoch, or there is nothing to train on.
    SampleSteps(const SampleSource&, const SampleLoader&, SampleEngine&, std::uint64_t seed, const SampleCursor& first);
    // Stays as it is until SampleEngine::kStepsInFlight more have been asked for. Throws what making it ready threw.
    const PreparedBatch& next() { return steps_->next(); }
    // Of the step after those taken.
    const SampleCursor& cursor() const { return steps_->cursor(); }

  private:
    void load_epoch(std::int64_t epoch);
    void read(SampleCursor&, PreparedBatch&);

    const SampleSource& source_;
    const SampleLoader& loader_;
    const SampleEngine& engine_;
    std::uint64_t seed_;
    // From here on the thread's alone.
    std::int64_t epoch_ = -1;
    std::vector<std::vector<std::int64_t>> batches_;  // of the epoch
    SampleBatch gathered_;
    std::unique_ptr<Prefetcher<PreparedBatch, SampleCursor>> steps_;
};

}  // namespace fiedler
