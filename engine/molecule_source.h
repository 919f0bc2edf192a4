// engine/molecule_source.h: --task molecules: what the knobs make of a file of molecules.
#pragma once
#include "engine/sample_sources.h"

namespace fiedler {

// config.mask: masked atoms instead of targets. A trained model's own molecules are parted as they were, unless a split is
// asked for; others are all of the part test.
std::unique_ptr<SampleSource> open_molecules(const Config&, const TrainedSamples*, std::FILE* words);

// `fiedler prepare --task molecules`: returns the exit code.
int run_prepare_molecules(const Config&);

}  // namespace fiedler
