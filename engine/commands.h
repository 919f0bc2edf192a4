// engine/commands.h: the commands of `fiedler` except train (train.h) and spectrum (spectrum_command.h). Each returns
// the exit code, or throws InputError or RunError.
#pragma once
#include "engine/config.h"

namespace fiedler {

int run_prepare(const Invocation&);
int run_eval(const Invocation&);
int run_generate(const Invocation&);
int run_plan(const Invocation&);
int run_inspect(const Invocation&);

}  // namespace fiedler
