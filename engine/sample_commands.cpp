// engine/sample_commands.cpp: eval and predict of models of samples.
#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/commands.h"
#include "engine/error.h"
#include "engine/evaluate_samples.h"
#include "engine/files.h"
#include "engine/prediction_plot.h"
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

// beyond: of a series, the steps after its last row.
ModelOnSamples open_model(const Invocation& call, bool beyond = false) {
    const SampleBundle bundle = load_sample_bundle(call.config.model);
    const DeviceKind device = choose_device(call.config.device);
    ModelOnSamples m;
    m.config = data_config(bundle.config, call);
    m.config.beyond = beyond && m.config.task == Task::series;
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

// A row of predictions in original units.
std::vector<double> original_row(const SampleShape& shape, const SampleBatch& b, const std::vector<float>& predictions,
                                 std::int64_t row) {
    const auto k = static_cast<std::size_t>(shape.outputs), r = static_cast<std::size_t>(row);
    std::vector<double> p;
    for (std::size_t j = 0; j < k; ++j) {
        double x = predictions[r * k + j];
        if (shape.kind == TargetKind::regression && !shape.mean.empty()) x = x * shape.deviation[j] + shape.mean[j];
        if (!b.unit_deviation.empty()) x = x * b.unit_deviation[r] + b.unit_mean[r];
        p.push_back(x);
    }
    return p;
}

// What a series' model forecasts at one time: [channels, horizon], in original units.
std::vector<double> forecast_at(SampleEngine& engine, const SeriesSamples& source, std::int64_t time) {
    const bool per_channel = source.shape().level == TargetLevel::sample;
    const auto channels = static_cast<std::int64_t>(source.trained().channels.size());
    std::vector<double> all;
    SampleBatch b;
    for (std::int64_t c = 0; c < (per_channel ? channels : 1); ++c) {
        source.gather(std::vector<std::int64_t>{source.sample_of(time, c)}, Part::none, b);
        const SampleLoss l = engine.evaluate(b);
        for (std::int64_t row = 0; row < l.rows; ++row) {
            const std::vector<double> p = original_row(source.shape(), b, l.predictions, row);
            all.insert(all.end(), p.begin(), p.end());
        }
    }
    return all;
}

class PredictionWriter {
  public:
    PredictionWriter(const SampleSource& source, std::string& out)
        : source_(source), shape_(source.shape()), out_(out) {
        out_ += header_of(shape_);
    }
    void add(const SampleBatch& b, const std::vector<float>& predictions) {
        for (std::size_t s = 0; s < b.samples.size(); ++s) {
            const bool per_node = shape_.level == TargetLevel::node;
            const std::int64_t first = per_node ? b.offsets[s] : static_cast<std::int64_t>(s);
            const std::int64_t last = per_node ? b.offsets[s + 1] : first + 1;
            for (std::int64_t row = first; row < last; ++row)
                line(quoted(source_.row_name(b.samples[s], row - first)), original_row(shape_, b, predictions, row));
        }
    }

  private:
    void line(const std::string& id, const std::vector<double>& p) {
        out_ += id;
        if (shape_.kind == TargetKind::classes) {
            const auto best = static_cast<std::size_t>(std::max_element(p.begin(), p.end()) - p.begin());
            out_ += "," + quoted(best < shape_.names.size() ? shape_.names[best] : std::to_string(best));
        }
        for (const double x : p) out_ += fmt::format(",{:.6g}", x);
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
    std::FILE* words = call.config.json ? stderr : stdout;
    Json j = Json::object();
    for (const auto& [name, value] : metrics.numbers()) {
        fmt::print(words, "{:<18} {:.4f}\n", name, value);
        j[name] = value;
    }
    fmt::print(words, "{:<18} {}\n", "targets", metrics.known);
    if (shape.kind == TargetKind::classes && shape.outputs <= 20)
        fmt::print(words, "{}\n", confusion_text(metrics, shape));
    j["targets"] = metrics.known;
    if (call.config.json) fmt::print("{}\n", j.dump(-1, ' ', false, Json::error_handler_t::replace));
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
    ModelOnSamples m = open_model(call, !call.given("part"));
    const PartChoice part = call.given("part") ? c.part : PartChoice::all;
    const std::vector<std::int64_t> asked = samples_of(*m.source, part);
    if (asked.empty()) throw InputError("part: it holds no sample; choose another --part");
    std::string plot;
    const auto* series = dynamic_cast<const SeriesSamples*>(m.source.get());
    if (series && (series->beyond() || !c.plot.empty())) {
        const std::int64_t time = series->time_of(asked.back());
        const std::vector<double> forecast = forecast_at(*m.engine, *series, time);
        if (!c.plot.empty()) plot = svg_of_forecast(*series, time, forecast, "Forecast: " + c.model);
        if (series->beyond()) {
            write_file_atomic(c.out, forecast_table(*series, time, forecast));
            if (!plot.empty()) write_file_atomic(c.plot, plot);
            fmt::print("{} steps after {} on {}\npredictions {}\n{}", series->shape().outputs,
                       series->series().clock.text(series->series().dates.back()), m.engine->device_name(), c.out,
                       plot.empty() ? "" : fmt::format("plot        {}\n", c.plot));
            return 0;
        }
    } else if (!c.plot.empty()) {
        plot = svg_of(plot_prediction(*m.engine, *m.source, asked.front(),
                                      asked.size() > 1 ? m.source->row_name(asked.front(), 0) : c.model));
    }
    std::string csv;
    PredictionWriter writer(*m.source, csv);
    SampleBatch batch;
    std::int64_t rows = 0;
    for (const auto& samples : m.loader->in_order(asked)) {
        if (stop_requested()) run_error("stopped; nothing was written");
        m.source->gather(samples, Part::none, batch);
        const SampleLoss l = m.engine->evaluate(batch);
        writer.add(batch, l.predictions);
        rows += l.rows;
    }
    write_file_atomic(c.out, csv);
    if (!plot.empty()) write_file_atomic(c.plot, plot);
    fmt::print("{} rows on {}\npredictions {}\n{}", rows, m.engine->device_name(), c.out,
               plot.empty() ? "" : fmt::format("plot        {}\n", c.plot));
    return 0;
}

}  // namespace fiedler
