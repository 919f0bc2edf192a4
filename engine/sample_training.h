// engine/sample_training.h: one training run on samples: steps, validation, the best weights, checkpoints.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/sample_engine.h"
#include "engine/sample_loader.h"
#include "engine/sample_metrics.h"

namespace fiedler {

// What a finished run says, and what is left of it for the table over seeds.
struct RunResult {
    std::int64_t seed = 0, steps = 0, best_step = 0;
    bool stopped = false;  // by a signal
    double seconds = 0;
    SampleMetrics val, test;
    std::vector<float> best;  // weights
    std::string weights;
};

// config.out is the run's folder. resumed: where to go on; none: from the start. first_seed: of all the runs that belong
// together, kept in checkpoints. quiet: no progress. Ends early, with a checkpoint, when a signal asks for it.
RunResult train_samples(const Config&, const SampleSource&, const SampleLoader&, SampleEngine&,
                        std::unique_ptr<Checkpoint> resumed, std::int64_t first_seed, bool quiet);

}  // namespace fiedler
