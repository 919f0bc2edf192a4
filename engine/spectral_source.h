// engine/spectral_source.h: where a model's constants come from (spectral_embedding.h has what they are): the corpus'
// token graph and its spectrum, a random matrix, or files.
//
// The token graph and its spectrum are made once and kept beside the shards, in the folder of the prepared dataset
// (token_graph.fdl, spectrum-K.fdl; those of foreign shards below the data cache), and made again when the text or an
// option has changed.
#pragma once
#include <cstdint>
#include <cstdio>
#include <string>

#include "engine/config.h"
#include "engine/dataset.h"
#include "engine/json.h"
#include "engine/spectral_embedding.h"
#include "engine/spectrum.h"

namespace fiedler {

// What the knob feature-laplacian means for this model. InputError where the embedding it asks for is not there.
enum class FeatureSource { path, corpus, file };
const char* name_of(FeatureSource);
FeatureSource feature_source(const Config&, const ModelSpec&);

// What can be said before the data are there: InputError for knobs that do not go together, and for missing files.
void check_constants(const Config&, const ModelSpec&);

// The k smallest eigenpairs beyond the null space of the training text's token graph (normalised Laplacian), from the
// folder that keeps them or made now. log: progress, nullptr for silence. InputError when there are fewer than k.
Spectrum token_spectrum(const Dataset&, std::int32_t vocab, std::int64_t k, const Config&, std::FILE* log);

// Everything a new model needs. report: facts for the log, an empty object where the model has nothing of the kind.
ModelConstants make_constants(const Config&, const ModelSpec&, const Dataset&, std::FILE* log, Json& report);

}  // namespace fiedler
