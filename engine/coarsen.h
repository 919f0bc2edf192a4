// engine/coarsen.h: ever smaller aggregated graphs, from whose eigenvectors the multilevel eigen-solver starts.
//
// Groups of up to kAggregateSize neighbouring nodes become one node; the weights between groups add up, weights within
// a group vanish, masses add up. With P the matrix of the groups' normalised indicator vectors weighted by sqrt(m_i),
// the aggregated L is P'LP (Galerkin), and P maps its null vectors to the null vectors of the finer graph exactly:
//     x_i = sqrt(m_i / m_group(i)) y_group(i)
#pragma once
#include <cstdint>
#include <vector>

#include "engine/graph.h"

namespace fiedler {

inline constexpr int kAggregateSize = 4;

struct CoarseGraph {
    Graph graph;
    std::vector<double> masses;
    std::vector<std::int32_t> group;  // of every node of the next finer graph
};

// Groups every node with its strongest free neighbours, in the order of the nodes; nodes left over join the strongest
// neighbouring group. Groups never span components, and components that are contiguous stay so, in the same order.
CoarseGraph coarsen(const Graph&, const std::vector<double>& masses);

// Level after level while a level has more than `enough` nodes; no level has fewer than `least`, or more than 3/4 of
// the one before.
std::vector<CoarseGraph> coarsen_all(const Graph&, const std::vector<double>& masses, std::int64_t enough,
                                     std::int64_t least);

// Breadth-first order, component by component (each from its first node): neighbours get nearby numbers, so that the
// gathers of the sparse product stay in the cache, and every component is a contiguous range.
std::vector<std::int32_t> breadth_first_order(const Graph&, const Components&);

}  // namespace fiedler
