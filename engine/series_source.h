// engine/series_source.h: --task series: what the knobs make of a table of channels over time.
#pragma once
#include "engine/sample_sources.h"

namespace fiedler {

std::unique_ptr<SampleSource> open_series(const Config&, const TrainedSamples*, std::FILE* words);

}  // namespace fiedler
