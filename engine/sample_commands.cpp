// engine/sample_commands.cpp: eval and predict of models of samples.
#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/commands.h"
#include "engine/error.h"
#include "engine/evaluate_samples.h"
#include "engine/files.h"
#include "engine/sample_bundle.h"
#include "engine/signals.h"

namespace fiedler {

namespace {

// A trained model with the data that it is to see.
struct ModelOnSamples {
    Config config;
    std::unique_ptr<SampleSource> source;
    std::unique_ptr<SampleLoader> loader;
    std::unique_ptr<SampleEngine> engine;
};

ModelOnSamples open_model(const Invocation& call) {
    const SampleBundle bundle = load_sample_bundle(call.config.model);
    const DeviceKind device = choose_device(call.config.device);
    ModelOnSamples m;
    m.config = data_config(bundle.config, call);
    m.source = open_samples(m.config, &bundle.trained, nullptr);
    m.loader = std::make_unique<SampleLoader>(*m.source, m.config.batch_nodes);
    const SampleShape &is = m.source->shape(), &was = bundle.trained.shape;
    if (is.features != was.features || is.outputs != was.outputs || is.spectral_dims != was.spectral_dims)
        throw std::logic_error("sample_commands: a source of another shape than the model's");
    EngineOptions options = engine_options(m.config, device, false);
    m.engine = make_sample_engine(model_spec(bundle.config, was, m.loader->longest()), m.loader->capacity(), options);
    m.engine->write(Block::master, bundle.master.data());
    return m;
}

// A field of a CSV line.
std::string quoted(const std::string& text) {
    if (text.find_first_of(",\"\n\r") == text.npos) return text;
    std::string out = "\"";
    for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
    return out + '"';
}

std::string header_of(const SampleShape& s) {
    std::string line = "id";
    const auto name = [&](std::size_t k) { return k < s.names.size() ? s.names[k] : fmt::format("target_{}", k + 1); };
    if (s.kind == TargetKind::classes) line += ",prediction";
    for (std::size_t k = 0; k < static_cast<std::size_t>(s.outputs); ++k)
        line += "," + quoted(s.kind == TargetKind::regression ? name(k) : "p_" + name(k));
    return line + "\n";
}

class PredictionWriter {
  public:
    PredictionWriter(const SampleSource& source, std::string& out)
        : source_(source), shape_(source.shape()), out_(out) {
        out_ += header_of(shape_);
    }
    void add(const SampleBatch& b, const std::vector<float>& predictions) {
        const auto k = static_cast<std::size_t>(shape_.outputs);
        for (std::size_t s = 0; s < b.samples.size(); ++s) {
            const bool per_node = shape_.level == TargetLevel::node;
            const std::int64_t first = per_node ? b.offsets[s] : static_cast<std::int64_t>(s);
            const std::int64_t last = per_node ? b.offsets[s + 1] : first + 1;
            for (std::int64_t row = first; row < last; ++row)
                line(quoted(source_.row_name(b.samples[s], row - first)),
                     predictions.data() + static_cast<std::size_t>(row) * k);
        }
    }

  private:
    void line(const std::string& id, const float* p) {
        const auto k = static_cast<std::size_t>(shape_.outputs);
        out_ += id;
        if (shape_.kind == TargetKind::classes) {
            const auto best = static_cast<std::size_t>(std::max_element(p, p + k) - p);
            out_ += "," + quoted(best < shape_.names.size() ? shape_.names[best] : std::to_string(best));
        }
        for (std::size_t j = 0; j < k; ++j) {
            const bool original = shape_.kind == TargetKind::regression && !shape_.mean.empty();
            out_ += fmt::format(",{:.6g}", original ? p[j] * shape_.deviation[j] + shape_.mean[j] : double(p[j]));
        }
        out_ += '\n';
    }
    const SampleSource& source_;
    const SampleShape shape_;
    std::string& out_;
};

}  // namespace

int run_sample_eval(const Invocation& call) {
    const SignalGuard guard;
    ModelOnSamples m = open_model(call);
    const SampleMetrics metrics = evaluate_samples(*m.engine, *m.source, *m.loader, call.config.part);
    if (metrics.known == 0)
        input_error("part: no target is known in the part '{}'; give the targets, or another --part",
                    value_text(call.config, *find_knob("part")));
    const SampleShape& shape = m.source->shape();
    for (const auto& [name, value] : metrics.numbers()) fmt::print("{:<18} {:.4f}\n", name, value);
    fmt::print("{:<18} {}\n", "targets", metrics.known);
    if (shape.kind == TargetKind::classes && shape.outputs <= 20) fmt::print("{}\n", confusion_text(metrics, shape));
    return 0;
}

int run_predict(const Invocation& call) {
    const SignalGuard guard;
    const Config& c = call.config;
    if (c.model.empty()) throw InputError("model: name the folder of a run, a checkpoint or a .fdl file");
    if (c.out.empty()) throw InputError("out: where to? give --out with the name of a .csv file");
    check_output(c.out);
    if (!is_sample_model(c.model) && (file_exists(c.model) || folder_exists(c.model)))
        input_error("{}: is no model of nodes, molecules or series; `fiedler generate` is for text", c.model);
    ModelOnSamples m = open_model(call);
    const PartChoice part = call.given("part") ? c.part : PartChoice::all;
    std::string csv;
    PredictionWriter writer(*m.source, csv);
    SampleBatch batch;
    std::int64_t rows = 0;
    for (const auto& samples : m.loader->in_order(samples_of(*m.source, part))) {
        if (stop_requested()) run_error("stopped; nothing was written");
        m.source->gather(samples, Part::none, batch);
        const SampleLoss l = m.engine->evaluate(batch);
        writer.add(batch, l.predictions);
        rows += l.rows;
    }
    if (rows == 0) throw InputError("part: it holds no sample; choose another --part");
    write_file_atomic(c.out, csv);
    fmt::print("{} rows on {}\npredictions {}\n", rows, m.engine->device_name(), c.out);
    return 0;
}

}  // namespace fiedler
