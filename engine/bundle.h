// engine/bundle.h: a trained model as the commands find it: a run's folder, a checkpoint, or a .fdl file, with its
// tokenizer beside it.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/checkpoint.h"
#include "engine/config.h"
#include "engine/engine.h"
#include "engine/tokenizer.h"
#include "engine/weights.h"
#include "kernels/dtype.h"

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

// InputError when there is no model, or its tensors do not fit its own config. Quantised weights come as f32.
Bundle load_bundle(const std::string& path);
// The model with these knobs and tensors, whatever file they are from; path: for messages. A tensor kTokenizerName is
// the tokenizer's model; InputError for one that the model does not have.
Bundle bundle_from_tensors(const std::string& path, const Json& model, std::span<const WeightTensor>);
// A file with the tokenizer of the bundle, whose own may be inside a weights file: written into `folder` then.
std::string tokenizer_file(const Bundle&, const std::string& folder);
// Where the weights file of `path` lies, if that is what load_bundle would read: a .fdl file, or a run's.
std::optional<std::string> weights_file_of(const std::string& path);

// The tensors of a model as a file holds them, in the table's order, then the constants. half: matrices and U in bf16.
struct StoredModel {
    std::vector<WeightTensor> tensors;
    StoredModel(const ModelSpec&, const ParamTable&, const std::vector<float>& master, const ModelConstants&,
                bool half);
    StoredModel(const StoredModel&) = delete;
    // The tokenizer inside the file, as a tensor of bytes; it must outlive this.
    void add_tokenizer(const Tokenizer&);

  private:
    std::vector<bf16> rounded_, table_rounded_;
    std::vector<ConstantTensor> constants_;
};
// The "config" of a weights file.
Json weights_config(const Config&, std::int64_t parameters);

// The constants as blocks of a checkpoint, named like their tensors (spectral_embedding.h).
void add_constants(CheckpointWriter&, const ModelSpec&, const ModelConstants&);
ModelConstants read_constants(const Checkpoint&, const Config&, const ModelSpec&);

// The weights of a run: matrices in bf16 where the run computed in bf16, else everything in f32. Returns the path.
std::string write_bundle(const std::string& folder, const Config&, Engine&);

inline constexpr const char* kWeightsName = "weights.fdl";
inline constexpr const char* kTokenizerName = "tokenizer.model";

}  // namespace fiedler
