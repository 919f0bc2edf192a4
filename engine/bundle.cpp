#include "engine/bundle.h"

#include <algorithm>
#include <filesystem>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/spectral_source.h"
#include "engine/weights.h"

namespace fiedler {

namespace {

void load_tokenizer(Bundle& b, const std::string& path) {
    if (!file_exists(path)) return;
    b.tokenizer = Tokenizer::load(path);
    b.tokenizer_path = path;
}

Bundle from_weights(const std::string& path) {
    const WeightsFile file(path);
    Bundle b;
    b.path = path;
    if (!file.config().contains("model"))
        input_error("{}: holds tensors but no model's config; it cannot be run", path);
    b.config = config_from_json(file.config()["model"], path);
    b.spec = model_spec(b.config);
    const ParamTable table(b.spec);
    b.master.assign(static_cast<std::size_t>(table.elements), 0.f);
    for (const ParamTensor& t : table.tensor) file.read_f32(t.name, t.shape(), b.master.data() + t.offset);
    const auto read = [&](const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float>& out) {
        if (!file.find(name)) return false;
        file.read_f32(name, shape, out.data());
        return true;
    };
    b.constants = constants_from(b.spec, feature_source(b.config, b.spec) == FeatureSource::path, read, path);
    load_tokenizer(b, join_path(std::filesystem::path(path).parent_path().string(), kTokenizerName));
    return b;
}

Bundle from_checkpoint(const std::string& folder) {
    const Checkpoint checkpoint(folder);
    Bundle b;
    b.path = folder;
    b.config = config_from_json(checkpoint.meta().config, folder);
    b.spec = model_spec(b.config);
    const auto elements = static_cast<std::size_t>(ParamTable(b.spec).elements);
    const auto* master = static_cast<const float*>(checkpoint.block(name_of(Block::master), elements * sizeof(float)));
    b.master.assign(master, master + elements);
    b.constants = read_constants(checkpoint, b.config, b.spec);
    load_tokenizer(b, join_path(folder, kTokenizerName));
    return b;
}

}  // namespace

void add_constants(CheckpointWriter& writer, const ModelSpec& spec, const ModelConstants& constants) {
    for (const ConstantTensor& t : tensors_of(spec, constants))
        writer.add(t.name, t.values.data(), t.values.size() * sizeof(float));
}

ModelConstants read_constants(const Checkpoint& checkpoint, const Config& config, const ModelSpec& spec) {
    const std::vector<std::string> names = checkpoint.names();
    const auto read = [&](const std::string& name, const std::vector<std::int64_t>&, std::vector<float>& out) {
        if (std::find(names.begin(), names.end(), name) == names.end()) return false;
        const auto* values = static_cast<const float*>(checkpoint.block(name, out.size() * sizeof(float)));
        std::copy(values, values + out.size(), out.begin());
        return true;
    };
    return constants_from(spec, feature_source(config, spec) == FeatureSource::path, read, checkpoint.folder());
}

Bundle load_bundle(const std::string& path) {
    if (path.empty()) throw InputError("model: name the folder of a run, a checkpoint or a .fdl file");
    if (!folder_exists(path)) {
        if (!file_exists(path))
            input_error("{}: there is no such model; name the folder of a run, a checkpoint or a .fdl file", path);
        return from_weights(path);
    }
    if (is_checkpoint(path)) return from_checkpoint(path);
    if (const std::string weights = join_path(path, kWeightsName); file_exists(weights)) return from_weights(weights);
    return from_checkpoint(find_checkpoint(path));
}

std::string write_bundle(const std::string& folder, const Config& config, Engine& engine) {
    const ParamTable& table = engine.table();
    std::vector<float> master(static_cast<std::size_t>(table.elements));
    engine.read(Block::master, master.data());
    const bool half = engine.device_kind() == "cuda";
    std::vector<bf16> rounded;
    std::vector<WeightTensor> tensors;
    if (half)
        for (const float x : master) rounded.emplace_back(x);
    for (const ParamTensor& t : table.tensor) {
        const bool matrix = half && t.group == Group::decayed;
        tensors.push_back({t.name, matrix ? "bf16" : "f32", t.shape(),
                           matrix ? static_cast<const void*>(rounded.data() + t.offset) : master.data() + t.offset});
    }
    const std::vector<ConstantTensor> constants = tensors_of(engine.spec(), engine.constants());
    std::vector<bf16> table_rounded;  // U is rounded as the matrices are: the GPU computes with just these values
    for (const ConstantTensor& t : constants) {
        const bool round = half && t.name == kSpectralTable;
        if (round)
            for (const float x : t.values) table_rounded.emplace_back(x);
        tensors.push_back({t.name, round ? "bf16" : "f32", t.shape,
                           round ? static_cast<const void*>(table_rounded.data()) : t.values.data()});
    }
    Json about = Json::object();
    about["model"] = to_json(config, KnobGroup::model);
    about["tokenizer"] = kTokenizerName;
    about["parameters"] = table.parameters;
    const std::string path = join_path(folder, kWeightsName);
    write_weights(path, about, tensors);
    return path;
}

}  // namespace fiedler
