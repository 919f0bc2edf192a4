#include "engine/sample_bundle.h"

#include <algorithm>
#include <filesystem>

#include "engine/bundle.h"
#include "engine/error.h"
#include "engine/files.h"
#include "engine/weights.h"

namespace fiedler {

namespace {

constexpr const char* kAbout = "samples";

// The weights file, or the checkpoint, that `path` means; both empty: there is no model.
struct ModelPlace {
    std::string weights, checkpoint;
};
ModelPlace place_of(const std::string& path) {
    if (path.empty()) return {};
    if (const auto weights = weights_file_of(path)) return {*weights, {}};
    if (!folder_exists(path)) return {};
    return {{}, is_checkpoint(path) ? path : latest_checkpoint(path)};
}

Json about_of(const Json& config, const std::string& where) {
    if (!config.contains(kAbout)) input_error("{}: is no model of samples", where);
    return config[kAbout];
}

}  // namespace

bool is_sample_model(const std::string& path) {
    const ModelPlace place = place_of(path);
    if (!place.weights.empty()) return WeightsFile(place.weights, false).config().contains(kAbout);
    return !place.checkpoint.empty() && Checkpoint(place.checkpoint).meta().data.contains(kAbout);
}

Json about_samples(const Config& c, const SampleSource& source) {
    return Json{{"shape", to_json(source.shape())}, {"state", source.state()}, {"config", to_json(c)}};
}

TrainedSamples trained_samples(const Json& about, const std::string& where) {
    if (!about.contains("shape") || !about.contains("state"))
        input_error("{}: its description of the samples is damaged; train the model again", where);
    return {shape_from_json(about["shape"], where), about["state"]};
}

SampleBundle load_sample_bundle(const std::string& path) {
    if (path.empty()) throw InputError("model: name the folder of a run, a checkpoint or a .fdl file");
    const ModelPlace place = place_of(path);
    if (place.weights.empty() && place.checkpoint.empty())
        input_error("{}: there is no such model; name the folder of a run, a checkpoint or a .fdl file", path);
    SampleBundle b;
    b.path = place.weights.empty() ? place.checkpoint : place.weights;
    const auto describe = [&](const Json& about) {
        b.trained = trained_samples(about, b.path);
        if (!about.contains("config")) input_error("{}: its config is missing; train the model again", b.path);
        b.config = config_from_json(about["config"], b.path);
        return ParamTable(model_spec(b.config, b.trained.shape, 1));
    };
    if (!place.weights.empty()) {
        const WeightsFile file(place.weights);
        const ParamTable table = describe(about_of(file.config(), b.path));
        for (const ParamTensor& t : table.tensor) {
            const WeightTensor* found = file.find(t.name);
            if (!found) input_error("{}: has no tensor '{}': it was written for another model", b.path, t.name);
            check_shape(b.path, *found, t.shape());
        }
        b.master.assign(static_cast<std::size_t>(table.elements), 0.f);
        for (const ParamTensor& t : table.tensor) file.read_f32(t.name, t.shape(), b.master.data() + t.offset);
        return b;
    }
    const Checkpoint checkpoint(place.checkpoint);
    const ParamTable table = describe(about_of(checkpoint.meta().data, b.path));
    const auto elements = static_cast<std::size_t>(table.elements);
    const auto* best = static_cast<const float*>(checkpoint.block("best", elements * sizeof(float)));
    b.master.assign(best, best + elements);
    return b;
}

std::string write_sample_bundle(const std::string& folder, const Config& c, const SampleSource& source,
                                const SampleEngine& engine, const std::vector<float>& master) {
    const StoredModel model(engine.spec(), engine.table(), master, {}, engine.device_kind() == "cuda");
    Json about = Json::object();
    about["model"] = to_json(c, KnobGroup::model);
    about[kAbout] = about_samples(c, source);
    about["parameters"] = engine.table().parameters;
    const std::string path = join_path(folder, kWeightsName);
    write_weights(path, about, model.tensors);
    return path;
}

Config data_config(const Config& trained, const Invocation& now) {
    constexpr const char* kFiles[] = {"graph", "features", "node-labels", "split", "nodes-file", "nodes", "data"};
    Config c = trained;
    const bool other_data =
        std::any_of(std::begin(kFiles), std::end(kFiles), [&](const char* n) { return now.given(n); });
    for (const char* name : kFiles)
        if (other_data) copy_knob(c, Config{}, *find_knob(name));
    for (const Knob& k : knobs())
        if (now.given(k.name)) copy_knob(c, now.config, k);
    return c;
}

}  // namespace fiedler
