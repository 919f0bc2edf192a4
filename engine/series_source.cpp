#include "engine/series_source.h"

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/series_samples.h"

namespace fiedler {

std::unique_ptr<SampleSource> open_series(const Config& c, const TrainedSamples* trained, std::FILE*) {
    if (c.data.empty()) throw InputError("data: no series; give --data with a CSV that has a column of dates");
    if (c.data.size() > 1) input_error("data: {} and {}: give one file of a series", c.data[0], c.data[1]);
    SeriesTableOptions t;
    t.date_column = c.date_column;
    t.channels = c.columns;
    t.allow_gaps = c.allow_gaps;
    TrainedSeries kept;
    if (trained) {
        kept = trained_series_from_json(trained->state, "model");
        t.channels = kept.channels;
        kept.options.threads = static_cast<int>(c.threads);
    }
    Series series = read_series(c.data[0], t);
    if (trained) {
        SeriesCuts cuts;
        if (!c.split.empty()) cuts = series_cuts(c.split, series.rows());
        return std::make_unique<SeriesSamples>(std::move(series), kept, c.split.empty() ? nullptr : &cuts, c.beyond);
    }
    SeriesOptions o;
    o.mode = c.series_mode;
    o.look_back = c.look_back, o.horizon = c.horizon;
    o.patch = c.patch, o.stride = c.patch_stride;
    o.instance_norm = c.instance_norm, o.path_edges = c.path_edges;
    o.neighbours = c.channel_neighbours;
    o.spectral_dims = c.series_mode == SeriesMode::linear ? 0 : c.spectral_dims;
    o.threads = static_cast<int>(c.threads);
    const SeriesCuts cuts = series_cuts(c.split, series.rows());
    return std::make_unique<SeriesSamples>(std::move(series), o, cuts);
}

}  // namespace fiedler
