// engine/bench_infer.h: `fiedler bench infer MODEL`: how fast the CPU runtime generates, in which form of the weights.
#pragma once
#include <string>
#include <vector>

namespace fiedler {

// Arguments after `infer`. The exit code.
int run_bench_infer(const std::vector<std::string>& arguments);

}  // namespace fiedler
