#include "engine/series_samples.h"
#include "engine/json_fields.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/knn_graph.h"
#include "engine/spectrum.h"
#include "engine/table_text.h"

namespace fiedler {

namespace {

using Size = std::size_t;
constexpr const char* kModes[] = {"independent", "channels", "linear"};
constexpr double kVarianceFloor = 1e-5;

template <class Read>
auto from_json(const std::string& where, Read&& read) {
    try {
        return read();
    } catch (const nlohmann::json::exception& e) {
        input_error("{}: its description of the series is damaged ({}); train the model again", where, e.what());
    }
}

}  // namespace

Json to_json(const SeriesOptions& o) {
    return Json{{"mode", kModes[static_cast<int>(o.mode)]},
                {"look_back", o.look_back},
                {"horizon", o.horizon},
                {"patch", o.patch},
                {"stride", o.stride},
                {"instance_norm", o.instance_norm},
                {"path_edges", o.path_edges},
                {"neighbours", o.neighbours},
                {"spectral_dims", o.spectral_dims}};
}

SeriesOptions series_options_from_json(const Json& j, const std::string& where) {
    return from_json(where, [&] {
        SeriesOptions o;
        const auto mode = std::find(std::begin(kModes), std::end(kModes), j.at("mode").get<std::string>());
        if (mode == std::end(kModes)) input_error("{}: its series have a mode of another version", where);
        o.mode = static_cast<SeriesMode>(mode - std::begin(kModes));
        o.look_back = whole_number<std::int64_t>(j.at("look_back"));
        o.horizon = whole_number<std::int64_t>(j.at("horizon"));
        o.patch = whole_number<std::int64_t>(j.at("patch"));
        o.stride = whole_number<std::int64_t>(j.at("stride"));
        o.instance_norm = j.at("instance_norm").get<bool>();
        o.path_edges = j.at("path_edges").get<bool>();
        o.neighbours = whole_number<std::int64_t>(j.at("neighbours"));
        o.spectral_dims = whole_number<std::int64_t>(j.at("spectral_dims"));
        return o;
    });
}

Json to_json(const TrainedSeries& t) {
    Json edges = Json::array();
    for (const Edge& e : t.edges) edges.push_back({e.from, e.to, e.weight});
    return Json{{"options", to_json(t.options)}, {"channels", t.channels},   {"mean", t.mean},
                {"deviation", t.deviation},      {"step", t.step},           {"months", t.months},
                {"train_until", t.train_until},  {"val_until", t.val_until}, {"edges", edges}};
}

TrainedSeries trained_series_from_json(const Json& j, const std::string& where) {
    return from_json(where, [&] {
        TrainedSeries t;
        t.options = series_options_from_json(j.at("options"), where);
        t.channels = j.at("channels").get<std::vector<std::string>>();
        t.mean = j.at("mean").get<std::vector<double>>();
        t.deviation = j.at("deviation").get<std::vector<double>>();
        t.step = whole_number<std::int64_t>(j.at("step"));
        t.months = whole_number<std::int64_t>(j.at("months"));
        t.train_until = whole_number<std::int64_t>(j.at("train_until"));
        t.val_until = whole_number<std::int64_t>(j.at("val_until"));
        const auto channels = static_cast<std::int32_t>(t.channels.size());
        bool good = t.mean.size() == t.channels.size() && t.deviation.size() == t.channels.size() && channels > 0;
        for (const double d : t.deviation) good = good && d > 0;
        for (const Json& e : j.at("edges")) {
            t.edges.push_back(
                {whole_number<std::int32_t>(e.at(0)), whole_number<std::int32_t>(e.at(1)), e.at(2).get<float>()});
            const Edge& edge = t.edges.back();
            good = good && edge.from >= 0 && edge.from < edge.to && edge.to < channels && edge.weight > 0;
        }
        if (!good) input_error("{}: its description of the series contradicts itself; train the model again", where);
        return t;
    });
}

SeriesCuts series_cuts(const std::string& split, std::int64_t rows) {
    double share[3] = {0.7, 0.1, 0.2};
    if (!split.empty()) {
        LineFields fields(',');
        fields.split(split);
        bool good = fields.count() == 3;
        for (Size i = 0; good && i < 3; ++i) {
            const std::string_view text = fields[i];
            const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), share[i]);
            good =
                error == std::errc{} && stop == text.data() + text.size() && std::isfinite(share[i]) && share[i] >= 0;
        }
        if (!good)
            input_error("split: {} of a series; give rows, as 8640,2880,2880, or shares, as 0.7,0.1,0.2", shown(split));
    }
    const double all = share[0] + share[1] + share[2];
    SeriesCuts c;
    if (all <= 1 + 1e-9) {
        constexpr double kSlack = 1e-9;
        const auto n = static_cast<double>(rows);
        c.train = static_cast<std::int64_t>(n * share[0] + kSlack);
        c.val = static_cast<std::int64_t>(n * (share[0] + share[1]) + kSlack);
        c.test = static_cast<std::int64_t>(n * all + kSlack);
        return c;
    }
    for (const double s : share)
        if (s != std::floor(s)) input_error("split: {} are neither numbers of rows nor shares up to 1", shown(split));
    if (all > static_cast<double>(rows))
        input_error("split: {} are {} rows, but the series has {}", shown(split), all, rows);
    c.train = static_cast<std::int64_t>(share[0]);
    c.val = c.train + static_cast<std::int64_t>(share[1]);
    c.test = c.val + static_cast<std::int64_t>(share[2]);
    return c;
}

std::vector<float> moving_average(std::span<const float> window, std::int64_t steps) {
    const std::int64_t n = std::ssize(window), before = (steps - 1) / 2;
    std::vector<float> trend(window.size());
    double sum = 0;
    const auto at = [&](std::int64_t i) {
        return double(window[static_cast<Size>(std::clamp<std::int64_t>(i, 0, n - 1))]);
    };
    for (std::int64_t i = -before; i < steps - before; ++i) sum += at(i);
    for (std::int64_t i = 0; i < n; ++i) {
        trend[static_cast<Size>(i)] = static_cast<float>(sum / double(steps));
        sum += at(i + steps - before) - at(i - before);
    }
    return trend;
}

SeriesSamples::SeriesSamples(Series series, const SeriesOptions& options, const SeriesCuts& cuts)
    : series_(std::move(series)), options_(options) {
    check_options();
    trained_.options = options_;
    trained_.channels = series_.channels;
    trained_.step = series_.clock.step, trained_.months = series_.clock.months;
    const std::int64_t shortest = options_.look_back + options_.horizon;
    if (cuts.train < shortest)
        input_error(
            "{}: the training part has {} rows, and a window needs {}; give more rows, or a shorter --look-back or "
            "--horizon",
            series_.source, cuts.train, shortest);
    for (const auto& [rows, part] : {std::pair(cuts.val - cuts.train, "val"), std::pair(cuts.test - cuts.val, "test")})
        if (rows > 0 && rows < options_.horizon)
            input_error("{}: the part {} has {} rows, fewer than the horizon of {}; give it none or more",
                        series_.source, part, rows, options_.horizon);
    trained_.train_until = series_.dates[static_cast<Size>(cuts.train) - 1];
    trained_.val_until = series_.dates[static_cast<Size>(cuts.val) - 1];
    const std::int64_t c = series_.width();
    for (std::int64_t k = 0; k < c; ++k) {
        double sum = 0, squares = 0, most = 0;
        for (std::int64_t r = 0; r < cuts.train; ++r) sum += series_.values[static_cast<Size>(r * c + k)];
        const double mean = sum / double(cuts.train);
        for (std::int64_t r = 0; r < cuts.train; ++r) {
            const double x = series_.values[static_cast<Size>(r * c + k)];
            squares += (x - mean) * (x - mean), most = std::max(most, std::abs(x));
        }
        const double deviation = std::sqrt(squares / double(cuts.train));
        if (!(deviation > 1e-9 * most))
            input_error("{}: channel {} is constant ({}) over the training part; leave it out with --columns",
                        series_.source, shown(series_.channels[static_cast<Size>(k)]), mean);
        trained_.mean.push_back(mean), trained_.deviation.push_back(deviation);
    }
    normalise(false);
    if (options_.mode == SeriesMode::channels && c > 1) {
        FeatureOptions f;
        f.neighbours = std::min(options_.neighbours, c - 1);
        f.similarity = FeatureSimilarity::correlation;
        f.threads = options_.threads;
        const Graph g = feature_graph(values_.data(), cuts.train, c, f);
        for (std::int64_t i = 0; i < g.nodes; ++i)
            for (std::int64_t e = g.offsets[static_cast<Size>(i)]; e < g.offsets[static_cast<Size>(i) + 1]; ++e)
                if (const std::int32_t j = g.columns[static_cast<Size>(e)]; j > i)
                    trained_.edges.push_back({static_cast<std::int32_t>(i), j, g.weights[static_cast<Size>(e)]});
    }
    shape_samples();
    list_samples(cuts);
}

SeriesSamples::SeriesSamples(Series series, const TrainedSeries& trained, const SeriesCuts* cuts, bool beyond)
    : series_(std::move(series)), options_(trained.options), trained_(trained), beyond_(beyond) {
    check_options();
    if (series_.clock.step != trained_.step || series_.clock.months != trained_.months)
        input_error("{}: its rows are another step apart than those that the model was trained on; resample them",
                    series_.source);
    normalise(true);
    shape_samples();
    SeriesCuts own;
    const auto until = [&](std::int64_t date) {
        return std::upper_bound(series_.dates.begin(), series_.dates.end(), date) - series_.dates.begin();
    };
    own.train = until(trained_.train_until), own.val = until(trained_.val_until), own.test = series_.rows();
    list_samples(cuts ? *cuts : own);
}

void SeriesSamples::check_options() const {
    const SeriesOptions& o = options_;
    if (o.look_back < 1 || o.horizon < 1)
        input_error("look-back {} and horizon {}: both are at least 1", o.look_back, o.horizon);
    if (o.mode != SeriesMode::independent) return;
    if (o.patch < 1 || o.stride < 1 || o.patch > o.look_back)
        input_error("patch {} and patch-stride {}: both are at least 1, and a patch fits into the look-back of {}",
                    o.patch, o.stride, o.look_back);
    if (const std::int64_t left = (o.look_back - o.patch) % o.stride; left != 0)
        input_error(
            "patches of {} every {} steps leave {} of the look-back of {} over; choose a stride that divides {}",
            o.patch, o.stride, left, o.look_back, o.look_back - o.patch);
}

// z-scores; `find`: the channels are those of the model, found by name.
void SeriesSamples::normalise(bool find) {
    const std::int64_t c = width(), all = series_.width();
    std::vector<std::int64_t> place;
    for (std::int64_t k = 0; k < c; ++k) {
        if (!find) {
            place.push_back(k);
            continue;
        }
        const std::string& name = trained_.channels[static_cast<Size>(k)];
        const auto found = std::find(series_.channels.begin(), series_.channels.end(), name);
        if (found == series_.channels.end())
            input_error("{}: no channel {}, which the model was trained on; there are {}", series_.source, shown(name),
                        list_of(series_.channels));
        place.push_back(found - series_.channels.begin());
    }
    values_.resize(static_cast<Size>(series_.rows() * c));
    for (std::int64_t r = 0; r < series_.rows(); ++r)
        for (std::int64_t k = 0; k < c; ++k)
            values_[static_cast<Size>(r * c + k)] =
                static_cast<float>((series_.values[static_cast<Size>(r * all + place[static_cast<Size>(k)])] -
                                    trained_.mean[static_cast<Size>(k)]) /
                                   trained_.deviation[static_cast<Size>(k)]);
}

void SeriesSamples::shape_samples() {
    const SeriesOptions& o = options_;
    shape_.dense = true;
    shape_.kind = TargetKind::regression;
    shape_.level = per_channel() ? TargetLevel::sample : TargetLevel::node;
    shape_.outputs = static_cast<std::int32_t>(o.horizon);
    for (std::int64_t h = 1; h <= o.horizon; ++h) shape_.names.push_back(fmt::format("+{}", h));
    shape_.edge_types = 0;
    switch (o.mode) {
        case SeriesMode::independent:
            shape_.features = o.patch + o.patches();
            shape_.nodes_per_sample = o.patches();
            join_patches();
            break;
        case SeriesMode::channels:
            shape_.features = o.look_back;
            shape_.nodes_per_sample = width();
            join_channels();
            break;
        case SeriesMode::linear:
            shape_.features = 2 * o.look_back;
            shape_.nodes_per_sample = 1;
            edge_offsets_ = {0, 0};
    }
}

void SeriesSamples::join_patches() {
    const std::int64_t n = options_.patches(), k = options_.spectral_dims;
    edge_offsets_ = {0};
    for (std::int64_t i = 0; i < n; ++i) {
        if (options_.path_edges && i > 0) edge_columns_.push_back(static_cast<std::int32_t>(i - 1));
        if (options_.path_edges && i + 1 < n) edge_columns_.push_back(static_cast<std::int32_t>(i + 1));
        edge_offsets_.push_back(static_cast<std::int32_t>(edge_columns_.size()));
    }
    shape_.edge_types = options_.path_edges ? 1 : 0;
    shape_.spectral_dims = k;
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 1; j <= k; ++j)
            spectral_.push_back(j < n
                                    ? static_cast<float>(std::numbers::sqrt2 * std::cos(std::numbers::pi * double(j) *
                                                                                        (double(i) + 0.5) / double(n)))
                                    : 0.f);
}

void SeriesSamples::join_channels() {
    const Graph g = build_graph(width(), trained_.edges);
    edge_offsets_.assign(g.offsets.begin(), g.offsets.end());
    edge_columns_.assign(g.columns.begin(), g.columns.end());
    edge_weights_.assign(g.weights.begin(), g.weights.end());
    shape_.edge_types = 1;
    const std::int64_t k = shape_.spectral_dims = options_.spectral_dims;
    if (k == 0) return;
    spectral_.assign(static_cast<Size>(width() * k), 0.f);
    SpectrumOptions o;
    o.k = k;
    o.beyond_null = true;
    o.kind = LaplacianKind::normalised;
    o.threads = options_.threads;
    const Spectrum s = solve_spectrum(g, o, false);
    if (s.status != SpectrumStatus::complete)
        run_error("the graph of the channels: its eigenvectors did not converge ({})", s.why);
    const auto scale = std::sqrt(static_cast<float>(width()));
    for (std::int64_t i = 0; i < width(); ++i)
        for (std::int64_t j = 0; j < std::min(k, s.count()); ++j)
            spectral_[static_cast<Size>(i * k + j)] = scale * s.vectors[static_cast<Size>(i * s.count() + j)];
}

void SeriesSamples::list_samples(const SeriesCuts& cuts) {
    const std::int64_t rows = series_.rows(), per_time = per_channel() ? width() : 1;
    const auto add = [&](Part p, std::int64_t time) {
        for (std::int64_t k = 0; k < per_time; ++k) samples_[static_cast<Size>(p)].push_back(time * per_time + k);
    };
    if (beyond_) {
        if (rows < options_.look_back)
            input_error("{}: {} rows, but the model looks back at {}", series_.source, rows, options_.look_back);
        return add(Part::test, rows);
    }
    const std::int64_t bounds[] = {0, cuts.train, cuts.val, cuts.test};
    for (Size p = 0; p < 3; ++p)
        for (std::int64_t t = std::max(bounds[p], options_.look_back); t + options_.horizon <= bounds[p + 1]; ++t)
            add(static_cast<Part>(p), t);
}

std::int64_t SeriesSamples::known(Part p) const {
    if (beyond_) return 0;
    return std::ssize(samples_[static_cast<Size>(p)]) * options_.horizon * (per_channel() ? 1 : width());
}

void SeriesSamples::gather_features(std::span<const float> window, SampleBatch& out) const {
    const SeriesOptions& o = options_;
    switch (o.mode) {
        case SeriesMode::independent:
            for (std::int64_t i = 0; i < o.patches(); ++i) {
                const auto patch = window.subspan(static_cast<Size>(i * o.stride), static_cast<Size>(o.patch));
                out.dense.insert(out.dense.end(), patch.begin(), patch.end());
                out.dense.resize(out.dense.size() + static_cast<Size>(o.patches()), 0.f);
                *(out.dense.end() - o.patches() + i) = 1;
            }
            break;
        case SeriesMode::channels:
            out.dense.insert(out.dense.end(), window.begin(), window.end());
            break;
        case SeriesMode::linear: {
            const std::vector<float> trend = moving_average(window, kTrendSteps);
            out.dense.insert(out.dense.end(), trend.begin(), trend.end());
            for (Size i = 0; i < trend.size(); ++i) out.dense.push_back(window[i] - trend[i]);
        }
    }
}

void SeriesSamples::gather_row(std::int64_t time, std::int64_t channel, bool asked, SampleBatch& out) const {
    const SeriesOptions& o = options_;
    std::vector<float> window(static_cast<Size>(o.look_back));
    double sum = 0, squares = 0;
    for (std::int64_t i = 0; i < o.look_back; ++i)
        sum += window[static_cast<Size>(i)] = value(time - o.look_back + i, channel);
    if (o.instance_norm) {
        const double mean = sum / double(o.look_back);
        for (const float x : window) squares += (x - mean) * (x - mean);
        const double scale = std::sqrt(squares / double(o.look_back) + kVarianceFloor);
        for (float& x : window) x = static_cast<float>((x - mean) / scale);
        out.row_shift.push_back(static_cast<float>(mean));
        out.row_scale.push_back(static_cast<float>(scale));
    }
    gather_features(window, out);
    out.unit_mean.push_back(trained_.mean[static_cast<Size>(channel)]);
    out.unit_deviation.push_back(trained_.deviation[static_cast<Size>(channel)]);
    for (std::int64_t h = 0; h < o.horizon; ++h)
        out.targets.push_back(asked && time + h < series_.rows() ? value(time + h, channel) : kMissing);
}

void SeriesSamples::gather(std::span<const std::int64_t> samples, Part part, SampleBatch& out) const {
    out = SampleBatch{};
    out.samples.assign(samples.begin(), samples.end());
    out.edge_offsets = {0};
    out.fixed_signs = true;  // places on a path, channels of one graph: always the same
    const auto& asked = samples_[static_cast<Size>(part)];
    for (const std::int64_t s : samples) {
        const std::int64_t time = time_of(s);
        if (time < options_.look_back || time > series_.rows())
            throw std::logic_error("series_samples: no such sample");
        const bool known = std::binary_search(asked.begin(), asked.end(), s);
        const std::int64_t rows = per_channel() ? 1 : width();
        for (std::int64_t node = 0; node < rows; ++node) gather_row(time, channel_of(s, node), known, out);
        const std::int32_t base = out.offsets.back();
        for (Size i = 1; i < edge_offsets_.size(); ++i)
            out.edge_offsets.push_back(static_cast<std::int32_t>(out.edge_columns.size()) + edge_offsets_[i]);
        for (const std::int32_t j : edge_columns_) out.edge_columns.push_back(base + j);
        out.edge_weights.insert(out.edge_weights.end(), edge_weights_.begin(), edge_weights_.end());
        out.spectral.insert(out.spectral.end(), spectral_.begin(), spectral_.end());
        out.offsets.push_back(base + static_cast<std::int32_t>(shape_.nodes_per_sample));
    }
}

Json SeriesSamples::state() const { return to_json(trained_); }

std::string SeriesSamples::fingerprint() const { return hex64(hash_bytes(state().dump() + series_.fingerprint)); }

std::string SeriesSamples::text() const {
    std::string words =
        fmt::format("{} rows of {} channels, {} to {}", series_.rows(), width(),
                    series_.clock.text(series_.dates.front()), series_.clock.text(series_.dates.back()));
    if (beyond_) return words + fmt::format("; the next {} steps", options_.horizon);
    words += fmt::format("; windows of {} steps for the next {}: {} train, {} val, {} test", options_.look_back,
                         options_.horizon, samples_[0].size(), samples_[1].size(), samples_[2].size());
    if (options_.mode == SeriesMode::channels)
        words += fmt::format("; {} pairs of channels joined", trained_.edges.size());
    return words;
}

std::string SeriesSamples::row_name(std::int64_t sample, std::int64_t node) const {
    return series_.clock.text(series_.dates[static_cast<Size>(time_of(sample)) - 1]) + " " +
           trained_.channels[static_cast<Size>(channel_of(sample, node))];
}

}  // namespace fiedler
