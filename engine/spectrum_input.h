// engine/spectrum_input.h: the graph that `fiedler spectrum` works on, from whatever its knobs name: a file of a graph,
// vectors (nearest neighbours, or their features), or the tokens of a dataset.
#pragma once
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/graph.h"
#include "engine/json.h"

namespace fiedler {

// How the knobs say that a text file of a graph is to be read.
GraphFileOptions graph_file_options(const Config&);

struct SpectrumInput {
    Graph graph;
    std::string name;                 // for titles and folders: "cora"
    Json about;                       // where it comes from
    std::vector<std::string> labels;  // [nodes]; empty: none are given
    std::vector<std::int32_t> kept;   // with --largest-component: a node's number before; else empty
    std::int64_t all_nodes = 0;       // before that
};

// Says on `words` what was read. InputError for knobs that do not go together and for whatever the source refuses.
SpectrumInput read_spectrum_input(const Invocation&, bool cuda, std::FILE* words);

}  // namespace fiedler
