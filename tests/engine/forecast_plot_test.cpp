// The picture of a forecast, and layouts coloured by values.
#include "engine/forecast_plot.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "engine/spectrum_plot.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

std::size_t count(const std::string& text, const std::string& part) {
    std::size_t n = 0;
    for (std::size_t at = 0; (at = text.find(part, at)) != text.npos; at += part.size()) ++n;
    return n;
}

TEST(ForecastPlot, DrawsWhatIsKnown) {
    ForecastPlot p;
    p.title = "loads <&>", p.subtitle = "of a model";
    p.first_date = "2016-07-01", p.split_date = "2016-07-05", p.last_date = "2016-07-07";
    const double nan = std::numeric_limits<double>::quiet_NaN();
    p.panels.push_back({"a", {1, 2, 3, 4}, {5, 6, 7}, {5, nan, 7.5}});
    p.panels.push_back({"b & c", {2, 2, 2, 2}, {2, 2, 2}, {}});
    const std::string svg = svg_of(p);
    EXPECT_TRUE(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    EXPECT_HAS(svg, "loads &lt;&amp;&gt;");
    EXPECT_HAS(svg, "b &amp; c");
    EXPECT_HAS(svg, "2016-07-05");
    EXPECT_HAS(svg, ">truth<");
    EXPECT_EQ(count(svg, "<path"), 5u);  // two histories, two forecasts, one truth
    EXPECT_EQ(count(svg, "nan"), 0u);
    EXPECT_EQ(svg, svg_of(p));
    // The forecast of the first panel: from the last value seen, four points; the truth is broken in the middle.
    const std::size_t truth = svg.find("stroke=\"#1d4ed8\" stroke-width=\"1.6\"");
    ASSERT_NE(truth, svg.npos);
    const std::string path = svg.substr(truth, svg.find("/>", truth) - truth);
    EXPECT_EQ(count(path, "M"), 2u);
    EXPECT_EQ(count(path, "L"), 1u);
    p.panels.resize(1);
    p.panels[0].truth.clear();
    EXPECT_EQ(svg_of(p).find(">truth<"), std::string::npos);
}

TEST(SpectrumPlot, ColoursByValue) {
    std::vector<Edge> edges;
    for (std::int32_t i = 0; i < 9; ++i) edges.push_back({i, i + 1, 1});
    const Graph g = build_graph(10, edges);
    SpectrumOptions so;
    so.k = 4;
    const Spectrum s = solve_spectrum(g, so, false);
    PlotOptions o;
    for (int i = 0; i < 10; ++i) o.values.push_back(static_cast<float>(i % 2 ? 3 : -1));
    o.value_name = "contribution";
    const SpectrumPlot p = plot_of(g, s, o);
    ASSERT_EQ(p.layout.value.size(), 10u);
    for (std::size_t i = 0; i < 10; ++i) EXPECT_EQ(p.layout.value[i], i % 2 ? 1.f : 0.f);
    EXPECT_HAS(p.layout.value_name, "contribution, -1 to 3");
    o.values.pop_back();
    EXPECT_THROW(plot_of(g, s, o), std::logic_error);
}

}  // namespace
}  // namespace fiedler::test
