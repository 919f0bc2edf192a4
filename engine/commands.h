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
int run_export(const Invocation&);
int run_import(const Invocation&);
int run_quantize(const Invocation&);
int run_predict(const Invocation&);
int run_sample_eval(const Invocation&);  // eval, of a model of samples

// InputError unless `out` names a file that could be written (export_command.cpp).
void check_output(const std::string& out);

}  // namespace fiedler
