// kernels/matmul_cpu.cpp: the products of matmul.h on the CPU. The output is cut into blocks whose size follows from
// the shape alone; each block is one single-threaded Eigen product, so the result does not depend on the threads.
#include <Eigen/Core>
#include <algorithm>

#include "kernels/matmul.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

template <class T>
using RowMajor = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using View = Eigen::Map<RowMajor<T>, 0, Eigen::OuterStride<>>;
template <class T>
using ConstView = Eigen::Map<const RowMajor<T>, 0, Eigen::OuterStride<>>;
template <class T>
using VectorView = Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, 1>>;
template <class T>
using ConstVectorView = Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, 1>>;

template <class T>
View<T> view(const Mat<T>& m) {
    return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.ld)};
}
template <class T>
ConstView<T> view(const Mat<const T>& m) {
    return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.ld)};
}

struct Blocks {
    std::int64_t rows, cols;  // of one block
};
// Large enough that packing the operands is cheap beside the product, small enough that many cores have work.
Blocks choose_blocks(std::int64_t rows, std::int64_t cols, std::int64_t depth) {
    constexpr std::int64_t kEnough = 32, kLeastWork = 1 << 18, kGrain = 16;
    const auto halve = [](std::int64_t n) { return ((n + 1) / 2 + kGrain - 1) / kGrain * kGrain; };
    Blocks b{std::min<std::int64_t>(rows, 256), std::min<std::int64_t>(cols, 512)};
    const auto count = [&] { return ((rows + b.rows - 1) / b.rows) * ((cols + b.cols - 1) / b.cols); };
    while (count() < kEnough && b.rows * b.cols * depth >= 2 * kLeastWork && std::max(b.rows, b.cols) > kGrain) {
        std::int64_t& longer = b.rows >= b.cols ? b.rows : b.cols;
        longer = halve(longer);
    }
    return b;
}

// body(first row, rows, first column, columns) once for every block of a rows x cols output.
template <class Body>
void for_blocks(const Cpu& dev, std::int64_t rows, std::int64_t cols, std::int64_t depth, Body&& body) {
    if (rows == 0 || cols == 0) return;
    const Blocks b = choose_blocks(rows, cols, depth);
    const std::int64_t across = (cols + b.cols - 1) / b.cols, down = (rows + b.rows - 1) / b.rows;
    parallel_for_uneven(dev, down * across, [&](std::int64_t i) {
        const std::int64_t r = i / across * b.rows, c = i % across * b.cols;
        body(r, std::min(b.rows, rows - r), c, std::min(b.cols, cols - c));
    });
}

template <class T>
void apply_relu(T* y, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = 0; c < cols; ++c)
            y[r * ld + c] = y[r * ld + c] < 0 ? T(0) : y[r * ld + c];  // a NaN stays
}

// One row (decoding): a matrix-vector product, its outputs cut into pieces of some 64 thousand multiplications.
template <class T>
void forward_vector(const Cpu& dev, const MatmulForward<T, T>& p) {
    const std::int64_t out = p.w.rows, in = p.w.cols, piece = std::max<std::int64_t>(16, 65536 / in);
    const ConstVectorView<T> x(p.x.data, in);
    const auto w = view(p.w);
    parallel_for(dev, (out + piece - 1) / piece, [&](std::int64_t i) {
        const std::int64_t first = i * piece, n = std::min(piece, out - first);
        VectorView<T> y(p.y.data + first, n);
        if (!p.residual)
            y.setZero();
        else if (p.residual.data != p.y.data)
            y = ConstVectorView<T>(p.residual.data + first, n);
        y.noalias() += w.middleRows(first, n) * x;
        if (p.relu) apply_relu(y.data(), 1, n, n);
    });
}

}  // namespace

template <class T>
void matmul_forward(const Cpu& dev, const MatmulForward<T, T>& p) {
    check(p);
    if (p.x.rows == 1) return forward_vector(dev, p);
    const auto x = view(p.x), w = view(p.w);
    auto y = view(p.y);
    for_blocks(dev, p.y.rows, p.y.cols, p.x.cols,
               [&](std::int64_t r, std::int64_t rows, std::int64_t c, std::int64_t cols) {
                   auto block = y.block(r, c, rows, cols);
                   const auto a = x.middleRows(r, rows);
                   const auto b = w.middleRows(c, cols).transpose();
                   if (p.residual && p.residual.data != p.y.data) block = view(p.residual).block(r, c, rows, cols);
                   if (p.residual)
                       block.noalias() += a * b;
                   else
                       block.noalias() = a * b;
                   if (p.relu) apply_relu(p.y.row(r) + c, rows, cols, p.y.ld);
               });
}

template <class T>
void matmul_dx(const Cpu& dev, const MatmulDx<T>& p) {
    check(p);
    const auto dy = view(p.dy), w = view(p.w);
    auto dx = view(p.dx);
    for_blocks(dev, p.dx.rows, p.dx.cols, p.dy.cols,
               [&](std::int64_t r, std::int64_t rows, std::int64_t c, std::int64_t cols) {
                   auto block = dx.block(r, c, rows, cols);
                   if (p.accumulate)
                       block.noalias() += dy.middleRows(r, rows) * w.middleCols(c, cols);
                   else
                       block.noalias() = dy.middleRows(r, rows) * w.middleCols(c, cols);
               });
}

template <class T>
void matmul_dw(const Cpu& dev, const MatmulDw<T>& p) {
    check(p);
    const auto dy = view(p.dy), x = view(p.x);
    auto dw = view(p.dw);
    for_blocks(dev, p.dw.rows, p.dw.cols, p.dy.rows,
               [&](std::int64_t r, std::int64_t rows, std::int64_t c, std::int64_t cols) {
                   dw.block(r, c, rows, cols).noalias() += dy.middleCols(r, rows).transpose() * x.middleCols(c, cols);
               });
}

template void matmul_forward(const Cpu&, const MatmulForward<float, float>&);
template void matmul_forward(const Cpu&, const MatmulForward<double, double>&);
template void matmul_dx(const Cpu&, const MatmulDx<float>&);
template void matmul_dx(const Cpu&, const MatmulDx<double>&);
template void matmul_dw(const Cpu&, const MatmulDw<float>&);
template void matmul_dw(const Cpu&, const MatmulDw<double>&);

}  // namespace fiedler
