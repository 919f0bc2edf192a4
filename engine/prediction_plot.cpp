#include "engine/prediction_plot.h"

#include <fmt/format.h>

#include <algorithm>

#include "engine/error.h"
#include "engine/forecast_plot.h"
#include "engine/molecule_samples.h"

namespace fiedler {

namespace {

using Size = std::size_t;
constexpr Size kMostPanels = 12;

Graph graph_of(const SampleBatch& b) {
    std::vector<Edge> edges;
    for (std::int32_t i = 0; i < b.nodes(); ++i)
        for (auto e = static_cast<Size>(b.edge_offsets[static_cast<Size>(i)]);
             e < static_cast<Size>(b.edge_offsets[static_cast<Size>(i) + 1]); ++e)
            if (b.edge_columns[e] > i)
                edges.push_back({i, b.edge_columns[e], b.edge_weights.empty() ? 1.f : b.edge_weights[e]});
    return build_graph(b.nodes(), std::move(edges));
}

// The batch without the features of one node.
SampleBatch without(const SampleBatch& b, std::int64_t node, std::int64_t features) {
    SampleBatch out = b;
    if (!b.dense.empty()) {
        std::fill_n(out.dense.begin() + node * features, features, 0.f);
        return out;
    }
    const std::int32_t first = b.feature_offsets[static_cast<Size>(node)],
                       last = b.feature_offsets[static_cast<Size>(node) + 1];
    out.feature_columns.erase(out.feature_columns.begin() + first, out.feature_columns.begin() + last);
    if (!b.feature_values.empty())
        out.feature_values.erase(out.feature_values.begin() + first, out.feature_values.begin() + last);
    for (Size i = static_cast<Size>(node) + 1; i < out.feature_offsets.size(); ++i)
        out.feature_offsets[i] -= last - first;
    return out;
}

std::vector<float> contributions(SampleEngine& engine, const SampleBatch& b, const SampleShape& shape) {
    const double unit = shape.kind == TargetKind::regression && !shape.deviation.empty() ? shape.deviation[0] : 1;
    const double whole = engine.evaluate(b).predictions[0];
    std::vector<float> values;
    for (std::int64_t i = 0; i < b.nodes(); ++i)
        values.push_back(
            static_cast<float>(unit * (whole - double(engine.evaluate(without(b, i, shape.features)).predictions[0]))));
    return values;
}

}  // namespace

SpectrumPlot plot_prediction(SampleEngine& engine, const SampleSource& source, std::int64_t sample,
                             const std::string& title) {
    const SampleShape& shape = source.shape();
    SampleBatch b;
    source.gather(std::vector<std::int64_t>{sample}, Part::none, b);
    Graph g = graph_of(b);
    if (g.edges() == 0)
        input_error("plot: {} has no edges to lay it out by; choose another", source.row_name(sample, 0));
    SpectrumOptions so;
    so.k = std::min<std::int64_t>(6, g.nodes);
    so.beyond_null = true;
    so.kind = LaplacianKind::normalised;
    const Spectrum spectrum = solve_spectrum(g, so, false);
    PlotOptions o;
    o.title = title;
    const std::string first = shape.names.empty() ? "output 1" : shape.names[0];
    const auto k = static_cast<Size>(shape.outputs);
    if (shape.level == TargetLevel::sample) {
        o.values = contributions(engine, b, shape);
        o.value_name = "contribution to " + first;
    } else {
        const std::vector<float> p = engine.evaluate(b).predictions;
        for (Size i = 0; i < static_cast<Size>(b.nodes()); ++i) {
            const auto row = p.begin() + static_cast<std::ptrdiff_t>(i * k);
            const auto best = static_cast<Size>(std::max_element(row, row + static_cast<std::ptrdiff_t>(k)) - row);
            if (shape.kind == TargetKind::classes)
                o.labels.push_back(best < shape.names.size() ? shape.names[best] : std::to_string(best));
            else
                o.values.push_back(p[i * k]);
        }
        o.value_name = first;
    }
    const auto* molecules = dynamic_cast<const MoleculeSamples*>(&source);
    for (std::int64_t i = 0; i < g.nodes; ++i)
        g.names.push_back(molecules ? fmt::format("{}{}", element_name(molecules->atom_type(sample, i)), i + 1)
                                    : source.row_name(sample, i));
    return plot_of(g, spectrum, o);
}

std::string svg_of_forecast(const SeriesSamples& s, std::int64_t time, const std::vector<double>& forecasts,
                            const std::string& title) {
    const SeriesOptions& o = s.trained().options;
    const Series& series = s.series();
    const auto date = [&](std::int64_t row) {
        return series.clock.text(row < series.rows()
                                     ? series.dates[static_cast<Size>(row)]
                                     : series.clock.later(series.dates.back(), row - series.rows() + 1));
    };
    ForecastPlot p;
    p.title = title;
    p.first_date = date(time - o.look_back), p.split_date = date(time), p.last_date = date(time + o.horizon - 1);
    const Size channels = s.trained().channels.size(), shown = std::min(channels, kMostPanels);
    p.subtitle = fmt::format("{} steps seen, {} forecast; {}{}", o.look_back, o.horizon, series.source,
                             shown < channels ? fmt::format("; the first {} of {} channels", shown, channels) : "");
    for (Size c = 0; c < shown; ++c) {
        ForecastPanel panel;
        panel.name = s.trained().channels[c];
        for (std::int64_t r = time - o.look_back; r < time; ++r)
            panel.history.push_back(s.original(r, static_cast<std::int64_t>(c)));
        const auto first = forecasts.begin() + static_cast<std::ptrdiff_t>(c) * o.horizon;
        panel.forecast.assign(first, first + o.horizon);
        for (std::int64_t r = time; r < std::min(time + o.horizon, series.rows()); ++r)
            panel.truth.push_back(s.original(r, static_cast<std::int64_t>(c)));
        p.panels.push_back(std::move(panel));
    }
    return svg_of(p);
}

std::string forecast_table(const SeriesSamples& s, std::int64_t time, const std::vector<double>& forecasts) {
    const Series& series = s.series();
    const std::int64_t horizon = s.trained().options.horizon;
    std::string csv = "date";
    for (const std::string& c : s.trained().channels)
        csv += c.find_first_of(",\"") == c.npos ? "," + c : ",\"" + c + "\"";
    for (std::int64_t h = 0; h < horizon; ++h) {
        const std::int64_t row = time + h;
        csv += '\n' + series.clock.text(row < series.rows()
                                            ? series.dates[static_cast<Size>(row)]
                                            : series.clock.later(series.dates.back(), row - series.rows() + 1));
        for (Size c = 0; c < s.trained().channels.size(); ++c)
            csv += fmt::format(",{:.6g}", forecasts[c * static_cast<Size>(horizon) + static_cast<Size>(h)]);
    }
    return csv + '\n';
}

}  // namespace fiedler
