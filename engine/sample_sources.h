// engine/sample_sources.h: which reader serves which --task.
#pragma once
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "engine/config.h"
#include "engine/samples.h"

namespace fiedler {

// What a trained model brings to the reading of other data: the shape that its data had, and its source's state().
struct TrainedSamples {
    SampleShape shape;
    Json state = Json::object();
};

// The samples that the knobs name (config.task, not text), read as a whole.
//   trained absent   for training: shape, names and normalisation are made from the data (normalisation, and what may
//                    only be seen in training, from the training part); targets are needed.
//   trained given    for eval and predict: shape() equals trained->shape; labels that it does not know are an
//                    InputError. Targets may be absent (all unknown). Without a split every row is of Part::test.
// words: where progress may be shown; nullptr: silent. InputError in one line for anything wrong with the input.
std::unique_ptr<SampleSource> open_samples(const Config&, const TrainedSamples* trained, std::FILE* words);

}  // namespace fiedler
