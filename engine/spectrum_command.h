// engine/spectrum_command.h: `fiedler spectrum`: a graph in, its smallest eigenpairs and a plot out.
//
// The output folder, whole or not at all: eigenvalues.npy f64 [k], residuals.npy f64 [k], eigenvectors.npy f32
// [nodes, k], spectrum.fdl (spectrum_file.h), summary.json, and nodes.txt, a row's node a line, where nodes have names.
#pragma once
#include "engine/config.h"

namespace fiedler {

// The exit code: 0, or RunError for a partial result (which is saved, and marked) unless it is allowed. InputError for
// bad input, before anything is solved or written.
int run_spectrum(const Invocation&);

}  // namespace fiedler
