// engine/spectrum_plot.h: what of a graph and its spectrum goes into the plot (svg_plot.h).
//
// The layout puts each node of the largest component at its entries of two eigenvectors, the first two beyond the null
// space that are not zero there; of the normalised Laplacian divided by sqrt(degree), which makes them the coordinates
// of the random walk. Colour: the node's label, else its value, else the third such
// vector.
#pragma once
#include <string>
#include <vector>

#include "engine/graph.h"
#include "engine/spectrum.h"
#include "engine/svg_plot.h"

namespace fiedler {

struct PlotOptions {
    std::string title;                                     // of the graph
    std::vector<std::string> labels;                       // [nodes]; empty: none. "" and "-1": a node without a label
    std::vector<float> values = {};                        // [nodes], finite; where there are no labels; empty: none
    std::string value_name = {};                           // what they are
    std::size_t most_nodes = 20'000, most_edges = 40'000;  // more are sampled, and the caption says so
};

// The spectrum is that of the graph. Throws std::logic_error for sizes that do not fit.
SpectrumPlot plot_of(const Graph&, const Spectrum&, const PlotOptions&);

}  // namespace fiedler
