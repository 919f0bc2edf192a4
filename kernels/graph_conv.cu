// kernels/graph_conv.cu: convolution over a graph (see graph_conv.h). A group of lanes owns a node and gathers its
// neighbours' rows (rows.cuh). Neighbouring entries of one type are summed before they meet the type's weights.
//
// Backward: dw needs, for each type, the sum over nodes of x times what the node gathered of that type. Every thread
// keeps its own sums of dw in shared memory while it walks its nodes; then the groups are added, and the blocks. Where w
// has more rows than fit, blocks along z repeat the gathering, each for its slice of the rows.
#include <algorithm>

#include "kernels/graph_conv.h"
#include "kernels/rows.cuh"

namespace fiedler {
namespace {

using namespace rows;
constexpr int kForwardBlocks = 7, kBackwardBlocks = 5;  // on a multiprocessor: what nothing spills at
constexpr int kSliceBytes = 40 << 10;                   // of dw in shared memory: below 48 KiB with what rows.cuh takes

struct Common {
    const float* w;
    std::int64_t ld_w;
    int nodes, channels;
    Sparse graph;
};
template <class T>
struct Forward : Common {
    T* y;
    const T* x;
    std::int64_t ld_y, ld_x;
};
template <class T, class X>
struct Backward : Common {
    T* dx;
    const T* dy;
    const X* x;
    float* partial;  // [blocks][rows of w][channels]
    std::int64_t ld_dx, ld_dy, ld_x;
    int weight_rows, slice_rows, block_nodes;
};

// sum += w_row part
template <int kWidth>
__device__ void add_weighted(float (&sum)[kWidth], const Common& a, int row, int channel, const float (&part)[kWidth]) {
    float w[kWidth];
    load_values(w, a.w + row * a.ld_w + channel);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum[c] += w[c] * part[c];
}

template <class T, int kWidth, int kLanes>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void forward_kernel(Forward<T> a) {
    constexpr int kGroups = kThreads / kLanes;
    const int channel = int(blockIdx.y * kLanes + threadIdx.x) * kWidth, first = int(blockIdx.x) * kGroups;
    const T* x = a.x + channel;
    for_sparse_rows<kLanes, kWidth>(
        a.graph, x, a.ld_x, first, min(first + kGroups, a.nodes), channel < a.channels,
        [&](int node, float(&sum)[kWidth]) {
            float own[kWidth];
            load_values(own, x + node * a.ld_x);
            add_weighted(sum, a, 0, channel, own);
        },
        [&](int, float(&sum)[kWidth], int type, const float(&part)[kWidth]) {
            add_weighted(sum, a, type + 1, channel, part);
        },
        [&](int node, const float(&sum)[kWidth]) { store_values(a.y + node * a.ld_y + channel, sum); });
}

// A thread's sums of dw: rows [first, first + count) of w, in shared memory, [row][kWidth / kStep][thread][kStep].
template <int kWidth>
struct WeightSums {
    static constexpr int kStep = kWidth == 1 ? 1 : 4;
    float* memory;
    int first, count, thread;

    __device__ float* at(int row, int value) const {
        return memory + ((row * kWidth + value) / kStep * kThreads + thread) * kStep;
    }
    __device__ void reset() const {
        for (int row = 0; row < count; ++row)
#pragma unroll
            for (int c = 0; c < kWidth; ++c) at(row, c)[c % kStep] = 0.f;
    }
    __device__ void add(int row, const float (&x)[kWidth], const float (&part)[kWidth]) const {
        row -= first;
        if (row < 0 || row >= count) return;
#pragma unroll
        for (int c = 0; c < kWidth; c += kStep) {
            float* sum = at(row, c);
            if constexpr (kStep == 1) {
                *sum += x[c] * part[c];
            } else {
                float4 four = *reinterpret_cast<float4*>(sum);
                four.x += x[c] * part[c], four.y += x[c + 1] * part[c + 1];
                four.z += x[c + 2] * part[c + 2], four.w += x[c + 3] * part[c + 3];
                *reinterpret_cast<float4*>(sum) = four;
            }
        }
    }
};

template <class T, class X, int kWidth, int kLanes>
__global__ __launch_bounds__(kThreads, kBackwardBlocks) void backward_kernel(Backward<T, X> a) {
    extern __shared__ float4 dynamic[];
    constexpr int kGroups = kThreads / kLanes, kBlockChannels = kLanes * kWidth;
    const int thread = int(threadIdx.y) * kLanes + int(threadIdx.x), first_channel = int(blockIdx.y) * kBlockChannels;
    const int channel = first_channel + int(threadIdx.x) * kWidth, first = int(blockIdx.x) * a.block_nodes;
    WeightSums<kWidth> dw{reinterpret_cast<float*>(dynamic), int(blockIdx.z) * a.slice_rows, 0, thread};
    dw.count = min(a.slice_rows, a.weight_rows - dw.first);
    dw.reset();
    const T* dy = a.dy + channel;
    const auto take = [&](int node, float(&sum)[kWidth], int row, const float(&part)[kWidth]) {
        add_weighted(sum, a, row, channel, part);
        float x[kWidth];
        load_values(x, a.x + node * a.ld_x + channel);
        dw.add(row, x, part);
    };
    for_sparse_rows<kLanes, kWidth>(
        a.graph, dy, a.ld_dy, first, min(first + a.block_nodes, a.nodes), channel < a.channels,
        [&](int node, float(&sum)[kWidth]) {
            float own[kWidth];
            load_values(own, dy + node * a.ld_dy);
            take(node, sum, 0, own);
        },
        [&](int node, float(&sum)[kWidth], int type, const float(&part)[kWidth]) { take(node, sum, type + 1, part); },
        [&](int node, const float(&sum)[kWidth]) {
            if (blockIdx.z == 0) store_values(a.dx + node * a.ld_dx + channel, sum);
        });
    __syncthreads();
    for (int i = thread; i < dw.count * kBlockChannels; i += kThreads) {
        const int row = i / kBlockChannels, c = i % kBlockChannels;
        if (first_channel + c >= a.channels) continue;
        float sum = 0;
        for (int g = 0; g < kGroups; ++g) {
            dw.thread = g * kLanes + c / kWidth;
            sum += dw.at(row, c % kWidth)[c % WeightSums<kWidth>::kStep];
        }
        const std::int64_t out = std::int64_t(blockIdx.x) * a.weight_rows + dw.first + row;
        a.partial[out * a.channels + first_channel + c] = sum;
    }
}

// dw += sum over blocks of partial[block]
__global__ __launch_bounds__(kColumns* kRows, 1) void finish_kernel(float* dw, std::int64_t ld, const float* partial,
                                                                    std::int64_t blocks, std::int64_t n, int channels) {
    __shared__ float shared[kRows][kColumns];
    const std::int64_t column = std::int64_t(blockIdx.x) * kColumns + threadIdx.x;
    const float sum =
        sum_partials(column < n ? blocks : 0, shared, [&](std::int64_t b) { return partial[b * n + column]; });
    if (threadIdx.y == 0 && column < n) dw[column / channels * ld + column % channels] += sum;
}

unsigned blocks_of(std::int64_t n, int each) { return unsigned(ceil_div(n, std::int64_t(each))); }

template <class T, int kWidth, int kLanes>
void launch_forward(const Forward<T>& a, cudaStream_t stream) {
    const dim3 grid(blocks_of(a.nodes, kThreads / kLanes), blocks_of(a.channels, kLanes * kWidth));
    forward_kernel<T, kWidth, kLanes><<<grid, dim3(kLanes, kThreads / kLanes), 0, stream>>>(a);
    LAUNCH_CHECK("graph_conv_forward");
}
template <class T, class X, int kWidth, int kLanes>
void launch_backward(Backward<T, X> a, cudaStream_t stream) {
    constexpr int kRowBytes = kThreads * kWidth * int(sizeof(float));
    a.slice_rows = std::min(a.weight_rows, kSliceBytes / kRowBytes);
    const dim3 grid(blocks_of(a.nodes, a.block_nodes), blocks_of(a.channels, kLanes * kWidth),
                    blocks_of(a.weight_rows, a.slice_rows));
    backward_kernel<T, X, kWidth, kLanes>
        <<<grid, dim3(kLanes, kThreads / kLanes), std::size_t(a.slice_rows) * kRowBytes, stream>>>(a);
    LAUNCH_CHECK("graph_conv_backward");
}

Common common(const Mat<const float>& w, std::int64_t nodes, const Adjacency& g) {
    FIEDLER_REQUIRE("graph_conv", nodes < (std::int64_t(1) << 31) - kThreads && w.cols < (std::int64_t(1) << 21));
    return {w.data, w.ld, int(nodes), int(w.cols), {g.offsets.data, g.columns.data, g.types.data, g.coefficients.data}};
}
// kWidth channels of every row of the matrices lie on 16 bytes.
template <int kWidth, class... M>
bool is_fast(const M&... matrices) {
    return ((is_aligned16(matrices) && matrices.cols % kWidth == 0) && ...);
}

template <class S, class T>
void forward(const Cuda& dev, const GraphConvForward<S>& p, T* y, const T* x) {
    check(p);
    if (p.x.rows == 0 || p.x.cols == 0) return;
    constexpr int kWidth = Pack<T>::size;
    const Forward<T> a{common(p.w, p.x.rows, p.graph), y, x, p.y.ld, p.x.ld};
    if (!is_fast<kWidth>(p.x, p.y, p.w)) return launch_forward<T, 1, 32>(a, stream_of(dev));
    if (a.channels <= 8 * kWidth) return launch_forward<T, kWidth, 8>(a, stream_of(dev));
    launch_forward<T, kWidth, 16>(a, stream_of(dev));
}

template <class S, class SX, class T, class X>
void backward(const Cuda& dev, const GraphConvBackward<S, SX>& p, T* dx, const T* dy, const X* x) {
    check(p);
    if (p.x.rows == 0 || p.x.cols == 0) return;
    constexpr int kWidth = Pack<T>::size;
    const std::int64_t nodes = p.x.rows, types = p.w.rows - 1;
    FIEDLER_REQUIRE("graph_conv", p.scratch && p.scratch.size >= graph_conv_scratch_elements(nodes, types, p.x.cols));
    const Backward<T, X> a{
        common(p.w, nodes, p.graph),       dx, dy, x, p.scratch.data, p.dx.ld, p.dy.ld, p.x.ld, int(p.w.rows), 0,
        int(graph_conv_block_nodes(nodes))};
    if (!is_fast<kWidth>(p.x, p.dx, p.dy, p.w))
        launch_backward<T, X, 1, 32>(a, stream_of(dev));
    else if (a.channels <= 8 * kWidth)
        launch_backward<T, X, kWidth, 8>(a, stream_of(dev));
    else
        launch_backward<T, X, kWidth, 16>(a, stream_of(dev));
    const std::int64_t n = p.w.rows * p.x.cols;
    finish_kernel<<<blocks_of(n, kColumns), dim3(kColumns, kRows), 0, stream_of(dev)>>>(
        p.dw.data, p.dw.ld, p.scratch.data, graph_conv_blocks(nodes), n, a.channels);
    LAUNCH_CHECK("graph_conv_finish");
}

}  // namespace

void graph_conv_forward(const Cuda& dev, const GraphConvForward<bf16>& p) {
    forward(dev, p, nv(p.y.data), nv(p.x.data));
}
void graph_conv_forward(const Cuda& dev, const GraphConvForward<float>& p) { forward(dev, p, p.y.data, p.x.data); }
void graph_conv_backward(const Cuda& dev, const GraphConvBackward<bf16>& p) {
    backward(dev, p, nv(p.dx.data), nv(p.dy.data), nv(p.x.data));
}
void graph_conv_backward(const Cuda& dev, const GraphConvBackward<bf16, float>& p) {
    backward(dev, p, nv(p.dx.data), nv(p.dy.data), p.x.data);
}
void graph_conv_backward(const Cuda& dev, const GraphConvBackward<float>& p) {
    backward(dev, p, p.dx.data, p.dy.data, p.x.data);
}

}  // namespace fiedler
