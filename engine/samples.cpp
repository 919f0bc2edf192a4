#include "engine/samples.h"
#include "engine/json_fields.h"

#include <nlohmann/json.hpp>

#include "engine/error.h"

namespace fiedler {

namespace {
constexpr const char* kKinds[] = {"classes", "binary", "regression"};
constexpr const char* kLevels[] = {"node", "sample"};

template <std::size_t n>
int index_of(const char* const (&names)[n], const std::string& name, const std::string& where) {
    for (std::size_t i = 0; i < n; ++i)
        if (name == names[i]) return static_cast<int>(i);
    input_error("{}: '{}' is no kind of target; the file is of another version or damaged", where, name);
}
}  // namespace

Json SampleSource::state() const { return Json::object(); }

Json to_json(const SampleShape& s) {
    return Json{{"features", s.features},
                {"dense", s.dense},
                {"edge_types", s.edge_types},
                {"spectral_dims", s.spectral_dims},
                {"kind", kKinds[static_cast<int>(s.kind)]},
                {"level", kLevels[static_cast<int>(s.level)]},
                {"outputs", s.outputs},
                {"nodes_per_sample", s.nodes_per_sample},
                {"names", s.names},
                {"mean", s.mean},
                {"deviation", s.deviation}};
}

SampleShape shape_from_json(const Json& j, const std::string& where) {
    SampleShape s;
    try {
        s.features = whole_number<std::int64_t>(j.at("features"));
        s.dense = j.at("dense").get<bool>();
        s.edge_types = whole_number<std::int32_t>(j.at("edge_types"));
        s.spectral_dims = whole_number<std::int64_t>(j.at("spectral_dims"));
        s.kind = static_cast<TargetKind>(index_of(kKinds, j.at("kind").get<std::string>(), where));
        s.level = static_cast<TargetLevel>(index_of(kLevels, j.at("level").get<std::string>(), where));
        s.outputs = whole_number<std::int32_t>(j.at("outputs"));
        s.nodes_per_sample = whole_number<std::int64_t>(j.at("nodes_per_sample"));
        s.names = j.at("names").get<std::vector<std::string>>();
        s.mean = j.at("mean").get<std::vector<double>>();
        s.deviation = j.at("deviation").get<std::vector<double>>();
    } catch (const nlohmann::json::exception& e) {
        input_error("{}: its description of the samples is damaged ({}); train the model again", where, e.what());
    }
    const auto per_output = [&](std::size_t n) { return n == 0 || n == static_cast<std::size_t>(s.outputs); };
    if (s.features < 0 || s.edge_types < 0 || s.edge_types > 255 || s.spectral_dims < 0 || s.outputs < 1 ||
        s.nodes_per_sample < 0 || !per_output(s.names.size()) || !per_output(s.mean.size()) ||
        s.mean.size() != s.deviation.size())
        input_error("{}: its description of the samples contradicts itself; train the model again", where);
    return s;
}

}  // namespace fiedler
