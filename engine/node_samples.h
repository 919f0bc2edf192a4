// engine/node_samples.h: --task nodes: one graph as one sample, its nodes parted into training, validation and test.
//
//   --graph        edges (graph_files.h). Numbers are rows of the features; names need ids nowhere else than in files
//                  that give ids themselves.
//   --features     "N F entries", then pairs column:value, a node a line; or a matrix (.npy, CSV), a node a row
//   --node-labels  a label a node (read_labels); "" or "-1": not known
//   --split        train, val, test or none for each node (read_labels)
//
// The spectral embedding are the eigenvectors of the graph's normalised Laplacian beyond the zeros of its components,
// times sqrt(N) (their mean square is 1).
#pragma once
#include "engine/sample_sources.h"

namespace fiedler {

std::unique_ptr<SampleSource> open_nodes(const Config&, const TrainedSamples*, std::FILE* words);

}  // namespace fiedler
