// engine/series_samples.h: windows of a time series as samples (samples.h): from look_back steps the next horizon ones.
//
// Values are z-scored by mean and deviation of each channel over the training part; targets are z-scored values. Windows
// are cut when they are asked for, never all at once. The window of time t looks at rows [t - look_back, t) and its targets
// are rows [t, t + horizon); it belongs to the part that holds all its targets: what it looks at may lie in the part before,
// as is usual.
//
//   independent  a sample is a window of one channel; nodes are patches of `patch` steps, one every `stride` steps; features
//                are the patch and its place, one column for each. Neighbouring patches are joined (path_edges).
//                Spectral embedding: eigenvectors of that path, sqrt(2) cos(pi j (i + 1/2) / patches), j = 1, 2, ...
//   channels     a sample is a window of all channels; nodes are channels, features the look-back, targets of each node.
//                Edges: each channel with the `neighbours` it correlates with most over the training part, weighted by the
//                correlation (knn_graph.h: only positive ones). Spectral embedding: eigenvectors of that graph's normalised
//                Laplacian beyond the zeros, mean square 1.
//   linear       a sample is a window of one channel and has one node, whose features are the trend (mean over 25 steps
//                around, the ends repeated) and what remains: DLinear (Zeng et al. 2023) is a model of it without layers.
//
// instance_norm: features are (x - m) / s, m and s = sqrt(variance + 1e-5) of the look-back, and row_shift, row_scale undo
// it for the predictions.
#pragma once
#include <array>
#include <span>

#include "engine/graph.h"
#include "engine/json.h"
#include "engine/samples.h"
#include "engine/series_table.h"

namespace fiedler {

inline constexpr std::int64_t kTrendSteps = 25;

struct SeriesOptions {
    SeriesMode mode = SeriesMode::independent;
    std::int64_t look_back = 96, horizon = 96, patch = 16, stride = 8;
    bool instance_norm = true, path_edges = true;
    std::int64_t neighbours = 4, spectral_dims = 0;
    int threads = 0;
    std::int64_t patches() const { return (look_back - patch) / stride + 1; }
};
Json to_json(const SeriesOptions&);
SeriesOptions series_options_from_json(const Json&, const std::string& where);  // InputError

// "8640,2880,2880" rows, or "0.7,0.1,0.2" of them; rows after the three parts are left out. Empty: 0.7,0.1,0.2.
struct SeriesCuts {
    std::int64_t train = 0, val = 0, test = 0;  // ends of the parts: train is [0, train), val [train, val), ...
};
SeriesCuts series_cuts(const std::string& split, std::int64_t rows);  // InputError

// What a model keeps of the series that it was trained on.
struct TrainedSeries {
    SeriesOptions options;
    std::vector<std::string> channels;
    std::vector<double> mean, deviation;          // [channels]
    std::int64_t step = 0, months = 0;            // SeriesClock's
    std::int64_t train_until = 0, val_until = 0;  // dates of the parts' last rows
    std::vector<Edge> edges;                      // of the channels' graph, each once
};
Json to_json(const TrainedSeries&);
TrainedSeries trained_series_from_json(const Json&, const std::string& where);  // InputError

class SeriesSamples final : public SampleSource {
  public:
    // For training. InputError: options that do not fit one another or the series, a channel that is constant over the
    // training part, a part too short for one window.
    SeriesSamples(Series, const SeriesOptions&, const SeriesCuts&);
    // For a trained model, which normalises and joins the channels as it did; they are found by name. cuts: nullptr: rows
    // up to train_until and val_until are train and val, later ones test. beyond: the one window whose targets begin after
    // the last row, as part test, and no other.
    SeriesSamples(Series, const TrainedSeries&, const SeriesCuts* cuts, bool beyond);

    const SampleShape& shape() const override { return shape_; }
    std::span<const std::int64_t> samples(Part p) const override { return samples_[static_cast<std::size_t>(p)]; }
    std::int64_t known(Part) const override;
    std::int64_t nodes_of(std::int64_t) const override { return shape_.nodes_per_sample; }
    std::int64_t edges_of(std::int64_t) const override { return static_cast<std::int64_t>(edge_columns_.size()); }
    std::int64_t feature_entries_of(std::int64_t) const override { return 0; }
    void gather(std::span<const std::int64_t> samples, Part, SampleBatch& out) const override;
    // "2018-02-20 23:00:00 OT": the last date that the window looks at, and the channel.
    std::string row_name(std::int64_t sample, std::int64_t node) const override;

    Json state() const override;
    std::string fingerprint() const override;
    std::string text() const override;

    const TrainedSeries& trained() const { return trained_; }
    const Series& series() const { return series_; }
    double original(std::int64_t row, std::int64_t channel) const {  // in the units of the table
        const auto c = static_cast<std::size_t>(channel);
        return trained_.mean[c] + trained_.deviation[c] * double(value(row, channel));
    }
    bool beyond() const { return beyond_; }
    std::int64_t time_of(std::int64_t sample) const { return per_channel() ? sample / width() : sample; }
    std::int64_t channel_of(std::int64_t sample, std::int64_t node) const {
        return per_channel() ? sample % width() : node;
    }
    std::int64_t sample_of(std::int64_t time, std::int64_t channel) const {
        return per_channel() ? time * width() + channel : time;
    }

  private:
    bool per_channel() const { return options_.mode != SeriesMode::channels; }
    std::int64_t width() const { return static_cast<std::int64_t>(trained_.channels.size()); }
    float value(std::int64_t row, std::int64_t channel) const {
        return values_[static_cast<std::size_t>(row * width() + channel)];
    }
    void check_options() const;
    void normalise(bool find);
    void shape_samples();
    void list_samples(const SeriesCuts&);
    void join_patches();
    void join_channels();
    void gather_row(std::int64_t time, std::int64_t channel, bool asked, SampleBatch& out) const;
    void gather_features(std::span<const float> window, SampleBatch& out) const;

    Series series_;
    SeriesOptions options_;
    TrainedSeries trained_;
    bool beyond_ = false;
    SampleShape shape_;
    std::vector<float> values_;  // [rows, channels], z-scored
    std::array<std::vector<std::int64_t>, 4> samples_;
    std::vector<std::int32_t> edge_offsets_, edge_columns_;  // of one sample
    std::vector<float> edge_weights_, spectral_;
};

// The trend of a window: the mean over `steps` steps around each, the first and last value repeated beyond the ends.
std::vector<float> moving_average(std::span<const float> window, std::int64_t steps);

}  // namespace fiedler
