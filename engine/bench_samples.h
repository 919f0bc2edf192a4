// engine/bench_samples.h: the training step on samples as a benchmark: a model of any knobs on data of its own kind.
#pragma once
#include <functional>

#include "engine/bench_step.h"

namespace fiedler {

// Batches are those of a training with these knobs, epoch after epoch, shuffled and made ready by the thread that
// does so there; what the steps wait for it is part of their time. Weights as at the start of a training.
//
// samples_per_second and tokens_per_second (of nodes): all of the timed steps over their time. prepare_seconds: a sample,
// to gather it and make it ready, on one thread, with nothing else to do. Stages and kernels as in bench_step.
bench::StepRow bench_samples(const Config&, DeviceKind, const StepBenchOptions&,
                             const std::function<void(const bench::StepRow&)>& after_timing = {});

}  // namespace fiedler
