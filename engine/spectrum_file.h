// engine/spectrum_file.h: graphs and spectra as .fdl files (the container of weights.h).
//
//   "kind": "graph"     config: version, nodes, edges, about. Tensors: offsets i64 [nodes + 1], columns i32 [2 edges],
//                       weights f32 [2 edges] (the CSR of graph.h); where the nodes have names, name_offsets i64
//                       [nodes + 1] and name_bytes u8: node i is called bytes name_offsets[i] to name_offsets[i + 1].
//   "kind": "spectrum"  config: version, the fields of Spectrum by their names, about. Tensors: eigenvalues f64 [k],
//                       residuals f64 [k], vectors f32 [nodes, k].
//
// A tensor without elements is left out. `about`: a JSON object for people (the source, the options), not read back.
// Written whole or not at all. Reading checks the checksums, the shapes and what graph.h and spectrum.h promise
// (ascending and symmetric rows, weights > 0; ascending eigenvalues); whatever fails is an InputError.
#pragma once
#include <string>

#include "engine/graph.h"
#include "engine/json.h"
#include "engine/spectrum.h"

namespace fiedler {

inline constexpr const char *kGraphKind = "graph", *kSpectrumKind = "spectrum";

void write_spectrum(const std::string& path, const Spectrum&, const Json& about);
// A partial result is an InputError unless it is allowed; the message names --allow-partial.
Spectrum read_spectrum(const std::string& path, bool allow_partial);

void write_graph(const std::string& path, const Graph&, const Json& about);
Graph read_graph_fdl(const std::string& path);

// Is it a .fdl file of this kind, as far as its beginning says? False for anything unreadable or corrupt.
bool is_fdl_kind(const std::string& path, const std::string& kind);

// Everything of a Spectrum but its arrays, by the names of its fields.
Json summary_of(const Spectrum&);

}  // namespace fiedler
