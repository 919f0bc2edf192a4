// kernels/graph_conv.h: depthwise convolution over a graph: what the causal convolution is to a sequence.
//
//   forward    y_ic = w_0c x_ic + sum_{e in row i} s_e w_{1 + type_e, c} x_{column_e, c}
//   backward   dx_jc = w_0c dy_jc + sum_{e in row j} s_e w_{1 + type_e, c} dy_{column_e, c}    adjacency transposed
//              dw_0c += sum_j x_jc dy_jc;  dw_{1+t, c} += sum_j x_jc sum_{e in row j, type_e = t} s_e dy_{column_e, c}
//
// w = (1, 0, ..., 0) in every channel is the identity: that is how it starts.
//
// Shapes     x: [nodes, channels] X; y: [nodes, channels] X; dy, dx: [nodes, channels] T, any ld. X is T, or acc_t<T>
//            (scalars: f32 going in, their gradient coming back in T). On Cuda channels % 8 == 0 (f32 alone: % 4) with
//            16-byte aligned rows is the fast way; anything else works too.
//            w, dw: [types + 1, channels] acc_t<T>, any ld (the f32 master weights); row 0 is the node's own
// Adjacency  CSR: offsets [nodes + 1] int32; columns int32 in [0, nodes), types uint8 in [0, types) (absent: all 0) and
//            coefficients s f32 (absent: all 1), at least offsets[nodes] entries each. Rows may be empty. A self loop is
//            an entry as any other. Ranges are the caller's duty; checked on the CPU only.
//            backward takes the transposed adjacency. Of an undirected graph, where each edge is in both rows with one
//            type, offsets, columns and types are the same arrays; so are the coefficients where they are symmetric
//            (1 / sqrt(deg_i deg_j)). A mean over neighbours has s_e = 1 / deg(row) forward, 1 / deg(column) backward.
// Scratch    backward on Cuda: graph_conv_scratch_elements(nodes, types, channels) acc_t<T> for partial sums of dw
// Writes     y, dx overwritten; dw accumulated (+=). No output may alias an input.
// Numerics   acc_t<T>, fixed order, no atomics: bit-equal from run to run. y_i and dx_i depend on the entries of row i
//            and their order alone, not on where the node lies. Launches depend on the shapes of x and w alone.
#pragma once
#include <algorithm>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

struct Adjacency {
    Vec<const std::int32_t> offsets, columns;
    Vec<const std::uint8_t> types;  // optional
    Vec<const float> coefficients;  // optional
};

template <class T>
struct GraphConvForward {
    Mat<T> y;
    Mat<const T> x;
    Mat<const acc_t<T>> w;
    Adjacency graph;
};

template <class T, class X = T>
struct GraphConvBackward {
    Mat<T> dx;
    Mat<acc_t<T>> dw;
    Mat<const T> dy;
    Mat<const X> x;
    Mat<const acc_t<T>> w;
    Adjacency graph;        // transposed
    Vec<acc_t<T>> scratch;  // Cuda only
};

inline bool is_adjacency(const Adjacency& a, std::int64_t nodes) {
    return is_shape(a.offsets, nodes + 1) && (a.columns || a.columns.size == 0) &&
           (!a.types || a.types.size == a.columns.size) && (!a.coefficients || a.coefficients.size == a.columns.size);
}
inline constexpr std::int64_t kMaxEdgeTypes = 256;

template <class T>
void check(const GraphConvForward<T>& p) {
    FIEDLER_REQUIRE("graph_conv", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.y, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("graph_conv", is_shape(p.w, p.w.rows, p.x.cols) && is_adjacency(p.graph, p.x.rows));
    FIEDLER_REQUIRE("graph_conv", p.w.rows >= 2 && p.w.rows <= kMaxEdgeTypes + 1);
}
template <class T, class X>
void check(const GraphConvBackward<T, X>& p) {
    FIEDLER_REQUIRE("graph_conv", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.dy, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("graph_conv", is_shape(p.dx, p.x.rows, p.x.cols) && is_adjacency(p.graph, p.x.rows));
    FIEDLER_REQUIRE("graph_conv", is_shape(p.w, p.w.rows, p.x.cols) && is_shape(p.dw, p.w.rows, p.x.cols));
    FIEDLER_REQUIRE("graph_conv", p.w.rows >= 2 && p.w.rows <= kMaxEdgeTypes + 1);
}

// As if each row of x (dy) were read once: neighbours come from a cache.
inline double adjacency_bytes(const Adjacency& a) {
    return 4.0 * double(a.offsets.size) + double(a.columns.size) * (4 + (a.types ? 1 : 0) + (a.coefficients ? 4 : 0));
}
template <class T>
Traffic traffic(const GraphConvForward<T>& p) {
    const double c = double(p.x.cols), n = double(p.x.rows) * c, e = double(p.graph.columns.size) * c;
    return {2 * n * sizeof(T) + adjacency_bytes(p.graph) + double(p.w.rows) * c * sizeof(acc_t<T>), n + 3 * e};
}
template <class T, class X>
Traffic traffic(const GraphConvBackward<T, X>& p) {
    const double c = double(p.x.cols), n = double(p.x.rows) * c, e = double(p.graph.columns.size) * c;
    return {n * (2 * sizeof(T) + sizeof(X)) + adjacency_bytes(p.graph) + 3 * double(p.w.rows) * c * sizeof(acc_t<T>),
            3 * n + 5 * e};
}

// Nodes whose part of dw one block sums, on Cuda: some, or more where that made too many partial sums.
inline constexpr std::int64_t kGraphConvBlockNodes = 64, kGraphConvMaxBlocks = 2048;
inline std::int64_t graph_conv_block_nodes(std::int64_t nodes) {
    const std::int64_t share = (nodes + kGraphConvMaxBlocks - 1) / kGraphConvMaxBlocks;
    return std::max(kGraphConvBlockNodes, (share + 15) / 16 * 16);
}
inline std::int64_t graph_conv_blocks(std::int64_t nodes) {
    return (nodes + graph_conv_block_nodes(nodes) - 1) / graph_conv_block_nodes(nodes);
}
inline std::int64_t graph_conv_scratch_elements(std::int64_t nodes, std::int64_t types, std::int64_t channels) {
    return graph_conv_blocks(nodes) * (types + 1) * channels;
}

template <class T>  // float, double
void graph_conv_forward(const Cpu&, const GraphConvForward<T>&);
template <class T>
void graph_conv_backward(const Cpu&, const GraphConvBackward<T>&);
void graph_conv_forward(const Cuda&, const GraphConvForward<bf16>&);
void graph_conv_forward(const Cuda&, const GraphConvForward<float>&);
void graph_conv_backward(const Cuda&, const GraphConvBackward<bf16>&);
void graph_conv_backward(const Cuda&, const GraphConvBackward<bf16, float>&);
void graph_conv_backward(const Cuda&, const GraphConvBackward<float>&);

}  // namespace fiedler
