// engine/prediction_plot.h: pictures of what a model of samples predicts.
#pragma once
#include <string>
#include <vector>

#include "engine/sample_engine.h"
#include "engine/series_samples.h"
#include "engine/spectrum_plot.h"

namespace fiedler {

// The spectral layout of one sample's graph. Where nodes have predictions their colour is that: the class, or the first
// number. Where the sample has one, it is what the node contributes to the first output: the prediction less that without
// the node's features; in original units, or as a probability. InputError: a sample without edges.
SpectrumPlot plot_prediction(SampleEngine&, const SampleSource&, std::int64_t sample, const std::string& title);

// The forecast of all channels at one time against what came, in original units. forecasts: [channels, horizon].
std::string svg_of_forecast(const SeriesSamples&, std::int64_t time, const std::vector<double>& forecasts,
                            const std::string& title);

// "date,HUFL,...": a row for each step from `time` on, in the layout of the series' own table.
std::string forecast_table(const SeriesSamples&, std::int64_t time, const std::vector<double>& forecasts);

}  // namespace fiedler
