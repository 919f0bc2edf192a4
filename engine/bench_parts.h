// engine/bench_parts.h: what the benchmarks of a training step have in common, whatever it trains on: steps timed two in
// flight, as in training, the time of each stage, the longest kernels.
#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "engine/engine.h"
#include "kernels/profile.h"
#include "tests/bench/bench.h"

namespace fiedler {

struct BenchedSteps {
    std::function<void()> submit;
    std::function<StepResult()> finish;
    StepResult step() const {
        submit();
        return finish();
    }
};

// Times from one step's end to the next one's: their median and noise go to row, all of them are returned. warm_up: steps
// before that choose algorithms and record the graph.
std::vector<double> time_steps(const BenchedSteps&, int warm_up, int steps, bench::StepRow& row);
// A step at a time, without a recorded one.
void profile_stages(const BenchedSteps&, std::unique_ptr<MarkClock>, int steps, bench::StepRow& row);
void trace_step(const BenchedSteps&, bench::StepRow& row);

}  // namespace fiedler
