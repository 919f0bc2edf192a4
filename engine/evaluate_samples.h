// engine/evaluate_samples.h: a model's predictions of the samples of a part, and their metrics.
#pragma once
#include <functional>

#include "engine/sample_engine.h"
#include "engine/sample_loader.h"
#include "engine/sample_metrics.h"

namespace fiedler {

// The rows of the part (all: of every part, each with its own targets), without dropout.
SampleMetrics evaluate_samples(SampleEngine&, const SampleSource&, const SampleLoader&, PartChoice);

}  // namespace fiedler
