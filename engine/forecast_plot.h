// engine/forecast_plot.h: what a model of a time series forecasts, against what came, as one self-contained SVG: a panel
// for each channel, in original units, the look-back before the forecast. The same input gives the same bytes.
#pragma once
#include <string>
#include <vector>

namespace fiedler {

struct ForecastPanel {
    std::string name;              // of the channel
    std::vector<double> history;   // [look-back]
    std::vector<double> forecast;  // [horizon]
    std::vector<double> truth;     // [horizon], NaN where not known; empty: nothing is known
};
struct ForecastPlot {
    std::string title, subtitle;
    std::string first_date, split_date, last_date;  // of the history's first row, the forecast's first and last
    std::vector<ForecastPanel> panels;              // one or more, equal lengths
};

std::string svg_of(const ForecastPlot&);

}  // namespace fiedler
