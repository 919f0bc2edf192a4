// engine/bench_command.h: `fiedler bench`: the kernel families (tests/bench/harness.h) and the training step
// (bench_step.h) as a table and JSON, compared with an earlier result.
//
//   fiedler bench [FAMILY...|kernels|step|samples] [--json FILE] [--compare FILE] [--fail-on-slower] [--samples N] [--steps N]
//                 [--small] [--trace] [--list] [--device cuda|cpu] [--threads N], and for step: any knob of a model,
//                 for samples: any knob of a training
//
// Its own flags are no knobs: nothing that a run keeps depends on them. Exit codes: 0 done, 1 a case failed or, with
// --fail-on-slower, is slower, 2 bad usage.
#pragma once
#include <string>
#include <vector>

namespace fiedler {

int run_bench(const std::vector<std::string>& arguments);

}  // namespace fiedler
