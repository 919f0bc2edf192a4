// engine/bundle.h: a trained model as the commands find it: a run's folder, a checkpoint, or a .fdl file, with its
// tokenizer beside it.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/engine.h"
#include "engine/tokenizer.h"

namespace fiedler {

struct Bundle {
    std::string path;  // what the weights were read from
    Config config;     // the model's knobs; others at their defaults
    ModelSpec spec;
    std::vector<float> master;  // as ParamTable(spec) lays it out
    ModelConstants constants;
    std::optional<Tokenizer> tokenizer;  // absent where the model was trained on foreign shards
    std::string tokenizer_path;          // empty then
};

// InputError when there is no model, or its tensors do not fit its own config.
Bundle load_bundle(const std::string& path);

// The constants as blocks of a checkpoint, named like their tensors (spectral_embedding.h).
void add_constants(CheckpointWriter&, const ModelSpec&, const ModelConstants&);
ModelConstants read_constants(const Checkpoint&, const Config&, const ModelSpec&);

// The weights of a run: matrices in bf16 where the run computed in bf16, else everything in f32. Returns the path.
std::string write_bundle(const std::string& folder, const Config&, Engine&);

inline constexpr const char* kWeightsName = "weights.fdl";
inline constexpr const char* kTokenizerName = "tokenizer.model";

}  // namespace fiedler
