// engine/small_graphs.h: what many small graphs (molecules) say about their nodes: eigenvectors of the normalised
// Laplacian, by the batched kernel small_spectra.h, and return probabilities of a random walk.
#pragma once
#include <cstdint>
#include <vector>

namespace fiedler {

// G graphs one after another; neighbours as CSR over all nodes, counted from the graph's own first node, ascending,
// symmetric, without self loops; every edge weighs 1. At most 512 nodes a graph.
struct SmallGraphs {
    std::vector<std::int64_t> node_offsets{0};  // [G + 1]
    std::vector<std::int64_t> row_offsets{0};   // [nodes + 1]
    std::vector<std::int32_t> columns;
    std::int64_t count() const { return static_cast<std::int64_t>(node_offsets.size()) - 1; }
    std::int64_t nodes() const { return node_offsets.back(); }
};

struct SmallEmbedding {
    std::vector<float> vectors;  // [nodes, k]
    std::vector<float> values;   // [G, k]
};

// The k smallest eigenpairs of I - D^-1/2 A D^-1/2 beyond its zeros, one for each component. Vectors are scaled to a mean
// square of 1 over their graph's nodes; signs as small_spectra.h fixes them, which for a symmetric vector rounding
// decides: training should flip them. A graph with fewer pairs has zeros for vectors, and 2, the end of the spectrum, for
// values.
// cuda: on the first GPU, in f32, else on the CPU in double; bases of repeated eigenvalues differ between the two.
// RunError: a matrix that did not converge. InputError: cuda without a GPU.
SmallEmbedding small_embedding(const SmallGraphs&, std::int64_t k, bool cuda, int threads);

// [nodes, steps]: the chance that a walk from the node is back after 2, 3, ... steps + 1 steps (after one it never is).
std::vector<float> return_probabilities(const SmallGraphs&, std::int64_t steps, int threads);

}  // namespace fiedler
