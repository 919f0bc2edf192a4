// engine/knn_graph.h: graphs of vectors that are near each other, and of the features (columns) that vectors share.
//
// Neighbours are exact (kernels/knn.h): ordered by distance, ties to the smaller index; a vector is no neighbour of
// itself, its duplicates are; the same on CPU and GPU, whatever the threads, the blocks and the memory.
//
//   metric       distance d                    similarity s
//   euclidean    |a - b|                       1 / (1 + d)
//   cosine       sqrt(2 - 2 s), the chord      a'b / (|a| |b|), 0 when either is zero
//
// Graph: i and j share an edge if either lists the other among its m nearest, with one weight for both directions:
//   binary       1
//   similarity   s
//   gaussian     exp(-d^2 / (r_i r_j)), r_i the distance to i's m-th neighbour (Zelnik-Manor and Perona 2004); 1 at d = 0
// Under cosine, in every weighting, neighbours of similarity below kLeastSimilarity are no edges: nothing holds the two
// together but rounding. Zero vectors are isolated nodes. Otherwise a listed neighbour is never lost: gaussian weights
// are at least kLeastWeight (they underflow between a dense region and a far point), others at least the smallest
// normal float.
//
// n <= m: every other vector is a neighbour (r_i is then the distance to the farthest).
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "engine/feature_laplacian.h"
#include "engine/graph.h"
#include "kernels/knn.h"

namespace fiedler {

inline constexpr double kLeastSimilarity = 1e-6;
inline constexpr double kLeastWeight = 1e-6;

enum class KnnWeight { binary, similarity, gaussian };
const char* name_of(KnnMetric);
const char* name_of(KnnWeight);

// The parts that vectors and features share.
struct KnnRun {
    bool cuda = false;       // on the first GPU
    int threads = 0;         // CPU; 0: all
    std::size_t budget = 0;  // bytes of device memory; 0: what is free. Not less than the vectors and small blocks
    std::function<void(std::int64_t done, std::int64_t total)> progress;  // vectors whose neighbours are known
};
struct KnnOptions : KnnRun {
    std::int64_t neighbours = 16;  // m, from 1 to 64
    KnnMetric metric = KnnMetric::cosine;
    KnnWeight weight = KnnWeight::gaussian;
};

struct KnnLists {
    std::int64_t nodes = 0, per_node = 0;  // per_node: min(m, nodes - 1)
    std::vector<std::int32_t> ids;         // [nodes, per_node]
    std::vector<double> values;            // |a - b|^2 or 1 - similarity
};

// vectors: [n, d] f32, row-major, on the host. InputError: n or d out of range, m out of range, a value that is not
// finite (says which), no GPU, a budget too small (says how much it needs).
KnnLists nearest_neighbours(const float* vectors, std::int64_t n, std::int64_t d, const KnnOptions&);
Graph knn_graph(const float* vectors, std::int64_t n, std::int64_t d, const KnnOptions&);

// Nodes are the d features. Similarity of two columns x, y of the vectors, over all n vectors:
//   absolute      cosine of |x| and |y|: where they live, whatever their signs (eigenvectors are orthogonal)
//   cosine        cosine of x and y
//   correlation   cosine of x - mean x and y - mean y; a constant column is like no other
// Edges and weights as above under cosine; all d nodes are present, also isolated ones. Needs a second copy of the
// vectors on the host.
enum class FeatureSimilarity { absolute, cosine, correlation };
const char* name_of(FeatureSimilarity);
struct FeatureOptions : KnnRun {
    std::int64_t neighbours = 8;
    FeatureSimilarity similarity = FeatureSimilarity::absolute;
    KnnWeight weight = KnnWeight::similarity;
};
Graph feature_graph(const float* vectors, std::int64_t n, std::int64_t d, const FeatureOptions&);

// The combinatorial Laplacian D - A of the graph, not scaled, with all eigenpairs (dense, in double). Each component is
// solved on its own and has the pair (0, constant) written down, so that eigenvectors live on one component each;
// ascending, of equals the first component first. Signs: the component of largest magnitude is positive (the first of
// those within 1e-9 of it). *components: their number, which is that of zero eigenvalues.
// InputError: more than kMostFeatures nodes, or none.
inline constexpr std::int64_t kMostFeatures = 8192;
HostLaplacian feature_laplacian(const Graph&, std::int64_t* components = nullptr);

}  // namespace fiedler
