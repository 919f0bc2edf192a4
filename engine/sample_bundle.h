// engine/sample_bundle.h: a trained model of samples as the commands find it (bundle.h: of text).
//
// A weights file's or checkpoint's "samples": {"shape": to_json(SampleShape), "state": SampleSource::state(),
// "config": every knob of training}.
#pragma once
#include <string>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/sample_engine.h"
#include "engine/sample_sources.h"

namespace fiedler {

struct SampleBundle {
    std::string path;
    Config config;  // of training
    TrainedSamples trained;
    std::vector<float> master;  // as ParamTable of the model lays it out
};

// Does `path` (a run, a checkpoint, a .fdl file) hold a model of samples? False also where there is no model.
bool is_sample_model(const std::string& path);
// InputError when there is no model, or its tensors do not fit its own config.
SampleBundle load_sample_bundle(const std::string& path);

// What is kept with the model.
Json about_samples(const Config&, const SampleSource&);
TrainedSamples trained_samples(const Json& about, const std::string& where);

// The weights file of a run; master: the weights to keep. Returns its path.
std::string write_sample_bundle(const std::string& folder, const Config&, const SampleSource&, const SampleEngine&,
                                const std::vector<float>& master);

// The knobs with which data are read for eval and predict: those given now over those of training; if any file of data is
// named now, no file of the training's is used.
Config data_config(const Config& trained, const Invocation& now);

}  // namespace fiedler
