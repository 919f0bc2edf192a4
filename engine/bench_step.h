// engine/bench_step.h: the whole training step as a benchmark: a model of any knobs on synthetic tokens.
#pragma once
#include "engine/config.h"
#include "engine/engine.h"
#include "tests/bench/bench.h"

namespace fiedler {

struct StepBenchOptions {
    int steps = 20;      // timed, after the warm-up
    bool trace = false;  // kernels by name, too (kernel_trace.h)
};

// Token frequencies as in text: the probability of the token of rank r falls as 1/r. Weights as at the start of a
// training, a spectral embedding of random vectors (no corpus is needed, and the time is the same).
//
// seconds: median of the times from one step's end to the next, two steps in flight as in training; noise = (p90 - p10)
// / median. The stages are measured in a second engine without a CUDA graph, a step at a time.
// InputError as for a training; `after_timing` is called once the time is known, before stages and kernels are.
bench::StepRow bench_step(const Config&, DeviceKind, const StepBenchOptions&,
                          const std::function<void(const bench::StepRow&)>& after_timing = {});

}  // namespace fiedler
