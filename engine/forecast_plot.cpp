#include "engine/forecast_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/svg_plot.h"

namespace fiedler {

namespace {

constexpr double kWidth = 1180, kLeft = 84, kRight = 1150, kHead = 92, kPanel = 190, kGap = 40, kFoot = 46;
constexpr const char *kInk = "#1f2933", *kSoft = "#6b7785", *kLine = "#d5dbe1", *kHistory = "#6b7785",
                     *kForecast = "#c2410c", *kTruth = "#1d4ed8";

std::string text(double x, double y, const std::string& words, const char* anchor, const char* colour, double size) {
    return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"{}\" fill=\"{}\" text-anchor=\"{}\">{}</text>\n", x,
                       y, size, colour, anchor, xml_text(words));
}
std::string line(double x0, double y0, double x1, double y1, const char* colour, const char* more = "") {
    return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"{}\"{}/>\n", x0, y0, x1,
                       y1, colour, more);
}

struct Axes {
    double steps, low, high, top;
    double x(double step) const { return kLeft + (kRight - kLeft) * step / std::max(steps - 1, 1.0); }
    double y(double value) const { return top + kPanel - kPanel * (value - low) / (high - low); }
};

Axes axes_of(const ForecastPanel& p, double top) {
    Axes a{static_cast<double>(p.history.size() + p.forecast.size()), std::numeric_limits<double>::infinity(), 0, top};
    a.high = -a.low;
    for (const auto* values : {&p.history, &p.forecast, &p.truth})
        for (const double v : *values)
            if (std::isfinite(v)) a.low = std::min(a.low, v), a.high = std::max(a.high, v);
    if (!(a.low <= a.high)) a.low = 0, a.high = 1;
    const double room = std::max(0.06 * (a.high - a.low), 1e-9 * std::max(1.0, std::abs(a.high)));
    a.low -= room, a.high += room;
    return a;
}

// A line from the step `first` on; values that are not known break it.
std::string curve(const Axes& a, std::size_t first, const std::vector<double>& values, const char* colour,
                  double width) {
    std::string d;
    bool pen = false;
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (std::isfinite(values[i]))
            d += fmt::format("{}{:.1f} {:.1f}", pen ? "L" : "M", a.x(static_cast<double>(first + i)), a.y(values[i]));
        pen = std::isfinite(values[i]);
    }
    return fmt::format("<path fill=\"none\" stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\" d=\"{}\"/>\n",
                       colour, width, d);
}

std::string panel(const ForecastPanel& p, double top) {
    const Axes a = axes_of(p, top);
    const std::size_t split = p.history.size();
    std::string svg = text(kLeft, top - 9, p.name, "start", kInk, 15);
    for (const double tick : axis_ticks(a.low, a.high, 4)) {
        svg += line(kLeft, a.y(tick), kRight, a.y(tick), kLine);
        svg += text(kLeft - 8, a.y(tick) + 4, fmt::format("{:.4g}", std::abs(tick) < 1e-12 ? 0.0 : tick), "end", kSoft,
                    12);
    }
    const double at = a.x(static_cast<double>(split) - 0.5);
    svg += line(at, top, at, top + kPanel, kSoft, " stroke-dasharray=\"3 4\"");
    svg += curve(a, 0, p.history, kHistory, 1.6);
    // The curves go on from the last value that was seen.
    const auto joined = [&](std::vector<double> v) {
        if (!p.history.empty()) v.insert(v.begin(), p.history.back());
        return v;
    };
    const std::size_t from = p.history.empty() ? 0 : split - 1;
    if (!p.truth.empty()) svg += curve(a, from, joined(p.truth), kTruth, 1.6);
    return svg + curve(a, from, joined(p.forecast), kForecast, 2);
}

std::string legend(bool truth) {
    std::string svg;
    double x = kRight;
    const auto entry = [&](const std::string& words, const char* colour) {
        svg += text(x, 38, words, "end", kInk, 13);
        x -= 8.0 * static_cast<double>(words.size()) + 6;
        svg += line(x - 26, 33.5, x, 33.5, colour, " stroke-width=\"2.4\"");
        x -= 44;
    };
    entry("forecast", kForecast);
    if (truth) entry("truth", kTruth);
    entry("seen before", kHistory);
    return svg;
}

}  // namespace

std::string svg_of(const ForecastPlot& p) {
    const auto count = static_cast<double>(p.panels.size());
    const double height = kHead + count * (kPanel + kGap) + kFoot;
    std::string svg = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" "
        "font-family=\"Helvetica Neue, Arial, Liberation Sans, DejaVu Sans, sans-serif\">\n"
        "<title>{2}</title>\n<rect width=\"{0}\" height=\"{1}\" fill=\"#ffffff\"/>\n",
        kWidth, height, xml_text(p.title));
    svg += text(24, 36, p.title, "start", kInk, 20);
    svg += text(24, 60, p.subtitle, "start", kSoft, 13);
    bool truth = false;
    for (const ForecastPanel& one : p.panels)
        for (const double v : one.truth) truth = truth || std::isfinite(v);
    svg += legend(truth);
    double top = kHead + 14;
    for (const ForecastPanel& one : p.panels) {
        svg += panel(one, top);
        top += kPanel + kGap;
    }
    if (!p.panels.empty()) {
        const Axes a = axes_of(p.panels.front(), 0);
        const double y = top - kGap + 18;
        svg += text(kLeft, y, p.first_date, "start", kSoft, 12);
        svg +=
            text(a.x(static_cast<double>(p.panels.front().history.size()) - 0.5), y, p.split_date, "middle", kSoft, 12);
        svg += text(kRight, y, p.last_date, "end", kSoft, 12);
    }
    return svg + "</svg>\n";
}

}  // namespace fiedler
