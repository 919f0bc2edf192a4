// engine/graph.h: undirected weighted graphs on the host, their components, statistics and Laplacians.
//
// A Graph is symmetric and simple: no self loops, no edge twice, every weight finite and > 0; each edge is stored in
// both directions. Isolated nodes are allowed. CSR with int64 row offsets and int32 columns, ascending in each row.
//
//   adjacency A = A', degree d_i = sum_j a_ij
//   combinatorial          L = D - A                        spectrum in [0, 2 max d]
//   symmetric normalised   L = I - D^-1/2 A D^-1/2          spectrum in [0, 2]; row and column of an isolated node: zero
//
// Both are L = M^-1/2 (D - A) M^-1/2 with m_i = 1 or m_i = d_i (1 for an isolated node), so the null space of either is
// spanned by one vector per component, sqrt(m_i) on its nodes.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/raw_vector.h"

namespace fiedler {

struct Graph {
    std::int64_t nodes = 0;
    std::vector<std::int64_t> offsets{0};  // [nodes + 1]
    RawVector<std::int32_t> columns;       // [2 edges]
    RawVector<float> weights;              // [2 edges]
    std::vector<std::string> names;        // as the input spells its nodes; empty: node i is called "i"
    std::int64_t edges() const { return static_cast<std::int64_t>(columns.size()) / 2; }
};

struct Edge {
    std::int32_t from = 0, to = 0;
    float weight = 1;
};

// What building a simple, symmetric graph from a list of edges had to change.
struct GraphNotes {
    std::int64_t lines = 0;       // edges as listed
    std::int64_t self_loops = 0;  // dropped
    std::int64_t duplicates = 0;  // same ordered pair again: weights summed
    std::int64_t zeros = 0;       // edges of weight 0: dropped
    std::int64_t both_ways = 0;   // node pairs listed as (u, v) and as (v, u): one edge of the mean weight
    std::int64_t unequal = 0;     // of those, with two different weights
};

// Sums what is listed twice, drops self loops and zero weights, joins the two directions (GraphNotes). Throws
// InputError for a node outside [0, nodes) and for a weight that is negative or not finite (names the edge's index; a
// reader that knows file and line checks before). nodes <= INT32_MAX. Does not depend on the order of the edges.
// About 40 bytes of memory per listed edge (`edges` are freed on the way); multi-threaded.
Graph build_graph(std::int64_t nodes, std::vector<Edge> edges, GraphNotes* notes = nullptr);

struct Components {
    std::int32_t count = 0;
    std::vector<std::int32_t> of_node;  // [nodes], numbered by their smallest node
    std::vector<std::int64_t> sizes;    // [count]
};
Components find_components(const Graph&);  // multi-threaded; the result does not depend on it

struct GraphStatistics {
    std::int64_t nodes = 0, edges = 0, isolated = 0;
    std::int64_t components = 0, largest_component = 0;
    std::int64_t degree_min = 0, degree_median = 0, degree_max = 0;  // numbers of neighbours
    double degree_mean = 0;
    std::int64_t bandwidth = 0;  // max |i - j| over edges
    double weight_min = 0, weight_max = 0, weight_sum = 0;
    // a line each: "nodes 2,708, edges 5,278, isolated 0", "components 78 (largest 2,485)", degrees, weights
    std::string text() const;
};
GraphStatistics statistics_of(const Graph&, const Components&);

enum class LaplacianKind { combinatorial, normalised };
const char* name_of(LaplacianKind);  // "combinatorial", "normalised"

// CSR of L with its diagonal (present in every row, also where it is 0), columns ascending.
template <class A>  // float, double
struct LaplacianMatrix {
    std::int64_t nodes = 0;
    RawVector<std::int64_t> offsets;
    RawVector<std::int32_t> columns;
    RawVector<A> values;       // computed in double, rounded once
    RawVector<A> null_weight;  // [nodes] sqrt(m_i)
    double upper_bound = 0;    // of the spectrum: 2 for normalised, else Gershgorin's (2 max d for combinatorial)
    LaplacianKind kind = LaplacianKind::combinatorial;
    float equal_weight = 0;  // of every edge, where L is of one of the kinds and there is such a weight; else 0
};
template <class A>
LaplacianMatrix<A> laplacian_of(const Graph&, LaplacianKind);
// M^-1/2 (D - A) M^-1/2 with masses m_i > 0 of the caller's choice, one per node (aggregated graphs: coarsen.h).
template <class A>
LaplacianMatrix<A> laplacian_of(const Graph&, const std::vector<double>& masses);

// Node order[i] becomes node i. order: a permutation. Names follow.
Graph permute(const Graph&, const std::vector<std::int32_t>& order);
// Node kept[i] becomes node i; no node that is left out may have an edge to one that is kept. Names follow.
Graph keep_nodes(const Graph&, const std::vector<std::int32_t>& kept);
// Only the largest component (the first of equals); kept[i] is the old number of new node i.
Graph largest_component(const Graph&, const Components&, std::vector<std::int32_t>& kept);

}  // namespace fiedler
