// engine/sample_train.h: `fiedler train --task ...` for samples (train.h: text).
#pragma once
#include "engine/config.h"

namespace fiedler {

// Returns the exit code.
int run_sample_train(const Invocation&);
// Is what --resume goes on with a run of samples?
bool resumes_samples(const Config&);

}  // namespace fiedler
