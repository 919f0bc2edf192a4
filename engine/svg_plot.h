// engine/svg_plot.h: one self-contained SVG of a spectrum: left the curve of its eigenvalues, right a layout of nodes.
//
// No scripts, no fonts, nothing fetched: any browser shows it. All text is escaped here. The same input gives the same
// bytes.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fiedler {

struct CurvePanel {
    std::string title;                // of the panel
    std::vector<double> eigenvalues;  // ascending and finite
    std::int64_t zeros = 0;           // of those, the first
    std::int64_t first_index = 1;     // number of the first value, as people count
    std::string gap;                  // words at the step from the zeros to the next value; empty: none
};

// A colour is that of a class, where there are class names, else that of a value.
struct LayoutPanel {
    std::string title;
    std::vector<float> x, y;             // [nodes], any range; y points up
    bool same_scale = true;              // one unit is as long on both axes
    std::vector<std::int32_t> class_of;  // [nodes], below class_names.size()
    std::vector<std::string> class_names;
    std::vector<float> value;                                  // [nodes], 0 to 1
    std::string value_name;                                    // of the colour bar
    std::vector<std::string> names;                            // [nodes], shown by a browser over a node; empty: none
    std::vector<std::pair<std::int32_t, std::int32_t>> edges;  // nodes of this panel
    std::string absent;                                        // why there is no layout; the rest is then ignored
};

struct SpectrumPlot {
    std::string title, subtitle, caption;
    CurvePanel curve;
    LayoutPanel layout;
};

std::string svg_of(const SpectrumPlot&);

// Text as XML holds it: & < > " ' escaped; what is no UTF-8, or no character of XML 1.0, becomes U+FFFD.
std::string xml_text(std::string_view);

// Round numbers that span [low, high] in about `count` steps.
std::vector<double> axis_ticks(double low, double high, int count);

// How many classes have a colour of their own; the last colour is the grey of all others.
inline constexpr std::int32_t kClassColours = 11;

}  // namespace fiedler
