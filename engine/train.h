// engine/train.h: a training run: data -> engine -> steps -> checkpoints, log, samples, weights.
#pragma once
#include "engine/config.h"

namespace fiedler {

// The command `fiedler train`. Returns the exit code; throws InputError and RunError.
int run_train(const Invocation&);

}  // namespace fiedler
