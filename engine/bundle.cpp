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

void require_text(const Config& c, const std::string& path) {
    if (c.task != Task::text)
        input_error("{}: is a model of {}, not of text; it goes with fiedler eval and fiedler predict", path,
                    value_text(c, *find_knob("task")));
}

Bundle from_weights(const std::string& path) {
    const WeightsFile file(path);
    if (!file.config().contains("model"))
        input_error("{}: holds tensors but no model's config; it cannot be run", path);
    Bundle b = bundle_from_tensors(path, file.config()["model"], file.tensors());
    if (!b.tokenizer) load_tokenizer(b, join_path(std::filesystem::path(path).parent_path().string(), kTokenizerName));
    return b;
}

Bundle from_checkpoint(const std::string& folder) {
    const Checkpoint checkpoint(folder);
    Bundle b;
    b.path = folder;
    b.config = config_from_json(checkpoint.meta().config, folder);
    require_text(b.config, folder);
    b.spec = model_spec(b.config);
    const auto elements = static_cast<std::size_t>(ParamTable(b.spec).elements);
    const auto* master = static_cast<const float*>(checkpoint.block(name_of(Block::master), elements * sizeof(float)));
    b.master.assign(master, master + elements);
    b.constants = read_constants(checkpoint, b.config, b.spec);
    load_tokenizer(b, join_path(folder, kTokenizerName));
    return b;
}

const WeightTensor* find_tensor(std::span<const WeightTensor> tensors, const std::string& name) {
    for (const WeightTensor& t : tensors)
        if (t.name == name) return &t;
    return nullptr;
}

}  // namespace

Bundle bundle_from_tensors(const std::string& path, const Json& model, std::span<const WeightTensor> tensors) {
    Bundle b;
    b.path = path;
    b.config = config_from_json(model, path);
    require_text(b.config, path);
    b.spec = model_spec(b.config);
    const ParamTable table(b.spec);
    for (const ParamTensor& t : table.tensor) {  // before any memory is taken: the config may promise what is not there
        const WeightTensor* found = find_tensor(tensors, t.name);
        if (!found) input_error("{}: has no tensor '{}': it was written for another model", path, t.name);
        check_shape(path, *found, t.shape());
    }
    b.master.assign(static_cast<std::size_t>(table.elements), 0.f);
    for (const ParamTensor& t : table.tensor)
        tensor_to_f32(path, *find_tensor(tensors, t.name), t.shape(), b.master.data() + t.offset);
    std::size_t used = table.tensor.size();
    const auto read = [&](const std::string& name, const std::vector<std::int64_t>& shape, float* out) {
        const WeightTensor* t = find_tensor(tensors, name);
        if (t) tensor_to_f32(path, *t, shape, out);
        used += t != nullptr;
        return t != nullptr;
    };
    const auto constant = [&](const std::string& name, const std::vector<std::int64_t>& shape,
                              std::vector<float>& out) { return read(name, shape, out.data()); };
    b.constants = constants_from(b.spec, feature_source(b.config, b.spec) == FeatureSource::path, constant, path);
    if (const WeightTensor* t = find_tensor(tensors, kTokenizerName)) {
        b.tokenizer = Tokenizer::from_model({static_cast<const char*>(t->data), t->bytes()}, path);
        ++used;
    }
    if (used == tensors.size()) return b;
    for (const WeightTensor& t : tensors)
        if (!table.find(t.name) && t.name != kTokenizerName && !t.name.starts_with("feature_laplacian.") &&
            t.name != kSpectralTable)
            input_error("{}: tensor '{}' is not one of the model that its config describes; leave it out", path,
                        t.name);
    return b;
}

std::string tokenizer_file(const Bundle& b, const std::string& folder) {
    if (!b.tokenizer || !b.tokenizer_path.empty()) return b.tokenizer_path;
    make_folders(folder);
    const std::string path = join_path(folder, "tokenizer-" + hex64(hash_bytes(b.tokenizer->model())) + ".model");
    if (!file_exists(path) || read_file(path) != b.tokenizer->model()) write_file_atomic(path, b.tokenizer->model());
    return path;
}

std::optional<std::string> weights_file_of(const std::string& path) {
    if (path.empty() || is_checkpoint(path)) return std::nullopt;
    const std::string file = folder_exists(path) ? join_path(path, kWeightsName) : path;
    return is_weights_file(file) ? std::optional(file) : std::nullopt;
}

StoredModel::StoredModel(const ModelSpec& spec, const ParamTable& table, const std::vector<float>& master,
                         const ModelConstants& constants, bool half)
    : constants_(tensors_of(spec, constants)) {
    if (half)
        for (const float x : master) rounded_.emplace_back(x);
    for (const ParamTensor& t : table.tensor) {
        const bool matrix = half && t.group == Group::decayed;
        tensors.push_back({t.name, matrix ? "bf16" : "f32", t.shape(),
                           matrix ? static_cast<const void*>(rounded_.data() + t.offset) : master.data() + t.offset});
    }
    for (const ConstantTensor& t : constants_) {
        const bool round = half && t.name == kSpectralTable;  // the GPU computes with just these values
        if (round)
            for (const float x : t.values) table_rounded_.emplace_back(x);
        tensors.push_back({t.name, round ? "bf16" : "f32", t.shape,
                           round ? static_cast<const void*>(table_rounded_.data()) : t.values.data()});
    }
}

void StoredModel::add_tokenizer(const Tokenizer& tokenizer) {
    const std::string& model = tokenizer.model();
    tensors.push_back({kTokenizerName, "u8", {static_cast<std::int64_t>(model.size())}, model.data()});
}

Json weights_config(const Config& config, std::int64_t parameters) {
    Json about = Json::object();
    about["model"] = to_json(config, KnobGroup::model);
    about["tokenizer"] = kTokenizerName;
    about["parameters"] = parameters;
    return about;
}

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
    const StoredModel model(engine.spec(), table, master, engine.constants(), engine.device_kind() == "cuda");
    const std::string path = join_path(folder, kWeightsName);
    write_weights(path, weights_config(config, table.parameters), model.tensors);
    return path;
}

}  // namespace fiedler
