// kernels/graph_conv_cpu.cpp: convolution over a graph on the CPU (see graph_conv.h). Nodes are independent; the sums of
// dw go through sum_over_rows, in the same pass.
#include <vector>

#include "kernels/graph_conv.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

void check_entries(const Adjacency& a, std::int64_t nodes, std::int64_t types) {
    const std::int32_t* offsets = a.offsets.data;
    FIEDLER_REQUIRE("graph_conv", offsets[0] == 0 && offsets[nodes] <= a.columns.size);
    for (std::int64_t i = 0; i < nodes; ++i) FIEDLER_REQUIRE("graph_conv", offsets[i] <= offsets[i + 1]);
    for (std::int64_t e = 0; e < offsets[nodes]; ++e) {
        FIEDLER_REQUIRE("graph_conv", a.columns.data[e] >= 0 && a.columns.data[e] < nodes);
        FIEDLER_REQUIRE("graph_conv", !a.types || a.types.data[e] < types);
    }
}

// body(neighbour, row of w, coefficient) for each entry of row i, in order.
template <class T, class Body>
void for_entries(const Adjacency& a, std::int64_t i, Body&& body) {
    for (std::int32_t e = a.offsets.data[i]; e < a.offsets.data[i + 1]; ++e)
        body(a.columns.data[e], a.types ? 1 + a.types.data[e] : 1, a.coefficients ? T(a.coefficients.data[e]) : T(1));
}

// out = w_0 x_i + sum_e s_e w_t x_column
template <class T>
void node_sum(T* __restrict__ out, const Adjacency& a, const Mat<const T>& x, const Mat<const T>& w, std::int64_t i) {
    const std::int64_t channels = x.cols;
    const T *own = x.row(i), *w_own = w.row(0);
    for (std::int64_t c = 0; c < channels; ++c) out[c] = w_own[c] * own[c];
    for_entries<T>(a, i, [&](std::int32_t j, int type, T s) {
        const T *other = x.row(j), *w_type = w.row(type);
        for (std::int64_t c = 0; c < channels; ++c) out[c] += s * w_type[c] * other[c];
    });
}

}  // namespace

template <class T>
void graph_conv_forward(const Cpu& dev, const GraphConvForward<T>& p) {
    check(p);
    check_entries(p.graph, p.x.rows, p.w.rows - 1);
    parallel_for(dev, p.x.rows, [&](std::int64_t i) { node_sum(p.y.row(i), p.graph, p.x, p.w, i); });
}

template <class T>
void graph_conv_backward(const Cpu& dev, const GraphConvBackward<T>& p) {
    check(p);
    check_entries(p.graph, p.x.rows, p.w.rows - 1);
    const std::int64_t channels = p.x.cols, sums = p.w.rows * channels;
    std::vector<T> dw(static_cast<std::size_t>(sums), T(0));
    sum_over_rows(dev, p.x.rows, sums, dw.data(), [&](std::int64_t first, std::int64_t last, T* partial) {
        const auto add = [&](int row, const T* x, const T* dy, T s) {
            T* __restrict__ sum = partial + row * channels;
            for (std::int64_t c = 0; c < channels; ++c) sum[c] += x[c] * (s * dy[c]);
        };
        for (std::int64_t j = first; j < last; ++j) {
            node_sum(p.dx.row(j), p.graph, p.dy, p.w, j);
            add(0, p.x.row(j), p.dy.row(j), T(1));
            for_entries<T>(p.graph, j, [&](std::int32_t i, int type, T s) { add(type, p.x.row(j), p.dy.row(i), s); });
        }
    });
    for (std::int64_t t = 0; t < p.w.rows; ++t)
        for (std::int64_t c = 0; c < channels; ++c) p.dw.row(t)[c] += dw[static_cast<std::size_t>(t * channels + c)];
}

template void graph_conv_forward(const Cpu&, const GraphConvForward<float>&);
template void graph_conv_forward(const Cpu&, const GraphConvForward<double>&);
template void graph_conv_backward(const Cpu&, const GraphConvBackward<float>&);
template void graph_conv_backward(const Cpu&, const GraphConvBackward<double>&);

}  // namespace fiedler
