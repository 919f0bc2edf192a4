// kernels/eigen_cpu.cpp: tall, thin blocks on the CPU (contract in eigen.h). Work is cut by the shape alone and partial
// sums are added in order, so nothing depends on the threads.
#include <Eigen/Core>
#include <algorithm>
#include <vector>

#include "kernels/eigen.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using View = Eigen::Map<Matrix<T>, 0, Eigen::OuterStride<>>;
template <class T>
using ConstView = Eigen::Map<const Matrix<T>, 0, Eigen::OuterStride<>>;

template <class T>
View<T> view(const Mat<T>& m) {
    return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.ld)};
}
template <class T>
ConstView<T> view(const Mat<const T>& m) {
    return {m.data, m.rows, m.cols, Eigen::OuterStride<>(m.ld)};
}
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ---- Gram matrices -------------------------------------------------------------------------------------------------

// sum = x' y over runs of kEigenRun rows in A, then in double. In double the runs make no difference but to the order.
template <class A>
void gram_rows(ConstView<A> x, ConstView<A> y, View<double> sum) {
    sum.setZero();
    Matrix<A> run(x.cols(), y.cols());
    for (std::int64_t r = 0; r < x.rows(); r += kEigenRun) {
        const std::int64_t rows = std::min<std::int64_t>(kEigenRun, x.rows() - r);
        run.noalias() = x.middleRows(r, rows).transpose() * y.middleRows(r, rows);
        sum += run.template cast<double>();
    }
}
template <>
void gram_rows<double>(ConstView<double> x, ConstView<double> y, View<double> sum) {
    constexpr std::int64_t kRows = 4 * kEigenRun;  // X and Y stay in the cache while Eigen packs them
    sum.setZero();
    for (std::int64_t r = 0; r < x.rows(); r += kRows) {
        const std::int64_t rows = std::min(kRows, x.rows() - r);
        sum.noalias() += x.middleRows(r, rows).transpose() * y.middleRows(r, rows);
    }
}

// How G and the rows are cut: tiles of about equal size, at most kGramTile on a side, and so many chunks of rows that
// there are some kGramWork pieces of work.
constexpr std::int64_t kGramTile = 128, kGramWork = 128;
struct GramTile {
    std::int64_t i, j, rows, cols, offset;  // offset: of its sums among those of a chunk
};
std::vector<GramTile> gram_tiles(std::int64_t mx, std::int64_t my, bool symmetric) {
    const auto side = [](std::int64_t m) { return ceil_div(ceil_div(m, ceil_div(m, kGramTile)), 16) * 16; };
    const std::int64_t rows = side(mx), cols = side(my);
    std::vector<GramTile> tiles;
    std::int64_t offset = 0;
    for (std::int64_t i = 0; i < mx; i += rows)
        for (std::int64_t j = 0; j < (symmetric ? i + 1 : my); j += cols) {
            tiles.push_back({i, j, std::min(rows, mx - i), std::min(cols, my - j), offset});
            offset += tiles.back().rows * tiles.back().cols;
        }
    return tiles;
}

// ---- sums over the rows of a component -----------------------------------------------------------------------------

// total_j += sum of values(i, j) over rows [first, last): runs in A, then double. add_row(i, sums) adds row i.
template <class A, class AddRow>
void sum_rows(std::int64_t first, std::int64_t last, std::int64_t width, double* total, std::vector<A>& run,
              AddRow&& add_row) {
    run.resize(static_cast<std::size_t>(width));
    for (std::int64_t r = first; r < last; r += kEigenRun) {
        std::fill(run.begin(), run.end(), A(0));
        for (std::int64_t i = r; i < std::min(r + kEigenRun, last); ++i) add_row(i, run.data());
        for (std::int64_t j = 0; j < width; ++j) total[j] += run[static_cast<std::size_t>(j)];
    }
}

constexpr std::int64_t kChunk = 1024;  // rows of a piece of work

template <class A>
void deflate_row(const EigenDeflate<A>& p, std::int64_t i, const A* total) {
    A* x = p.x.row(i);
    const A v = p.v.data[i];
    for (std::int64_t j = 0; j < p.x.cols; ++j) x[j] -= v * total[j];
}
template <class A>
void add_projections(const EigenDeflate<A>& p, std::int64_t first, std::int64_t last, double* total) {
    std::vector<A> run;
    sum_rows<A>(first, last, p.x.cols, total, run, [&](std::int64_t i, A* sum) {
        const A *x = p.x.row(i), v = p.v.data[i];
        for (std::int64_t j = 0; j < p.x.cols; ++j) sum[j] += v * x[j];
    });
}
template <class A>
std::vector<A> rounded(const std::vector<double>& v) {
    return std::vector<A>(v.begin(), v.end());
}

// A component too large for one thread.
template <class A>
void deflate_large(const Cpu& d, const EigenDeflate<A>& p, std::int64_t first, std::int64_t last) {
    const std::int64_t m = p.x.cols, chunks = ceil_div(last - first, kChunk);
    std::vector<double> partial(static_cast<std::size_t>(chunks * m), 0.0), total(static_cast<std::size_t>(m), 0.0);
    const auto end = [&](std::int64_t c) { return std::min(first + (c + 1) * kChunk, last); };
    parallel_for(d, chunks,
                 [&](std::int64_t c) { add_projections(p, first + c * kChunk, end(c), partial.data() + c * m); });
    for (std::int64_t c = 0; c < chunks; ++c)
        for (std::int64_t j = 0; j < m; ++j)
            total[static_cast<std::size_t>(j)] += partial[static_cast<std::size_t>(c * m + j)];
    const std::vector<A> sum = rounded<A>(total);
    parallel_for(d, chunks, [&](std::int64_t c) {
        for (std::int64_t i = first + c * kChunk; i < end(c); ++i) deflate_row(p, i, sum.data());
    });
}
template <class A>
void deflate_small(const EigenDeflate<A>& p, std::int64_t first, std::int64_t last) {
    std::vector<double> total(static_cast<std::size_t>(p.x.cols), 0.0);
    add_projections(p, first, last, total.data());
    const std::vector<A> sum = rounded<A>(total);
    for (std::int64_t i = first; i < last; ++i) deflate_row(p, i, sum.data());
}

}  // namespace

template <class A>
void eigen_gram(const Cpu& d, const EigenGram<A>& p) {
    check(p);
    const bool symmetric = p.x.data == p.y.data && p.x.cols == p.y.cols;
    const std::int64_t n = p.x.rows;
    const std::vector<GramTile> tiles = gram_tiles(p.x.cols, p.y.cols, symmetric);
    const auto count = static_cast<std::int64_t>(tiles.size());
    const std::int64_t size = tiles.back().offset + tiles.back().rows * tiles.back().cols;
    const std::int64_t wanted = std::min(ceil_div(kGramWork, count), ceil_div(n, 4 * kEigenRun));
    const std::int64_t rows = ceil_div(ceil_div(n, wanted), kEigenRun) * kEigenRun, chunks = ceil_div(n, rows);
    std::vector<double> partial(static_cast<std::size_t>(chunks * size));
    parallel_for_uneven(d, chunks * count, [&](std::int64_t k) {
        const GramTile& t = tiles[static_cast<std::size_t>(k % count)];
        const std::int64_t first = k / count * rows, height = std::min(rows, n - first);
        gram_rows<A>(
            view(p.x.slice_rows(first, height).columns(t.i, t.rows)),
            view(p.y.slice_rows(first, height).columns(t.j, t.cols)),
            View<double>(partial.data() + k / count * size + t.offset, t.rows, t.cols, Eigen::OuterStride<>(t.cols)));
    });
    for (const GramTile& t : tiles)
        for (std::int64_t i = 0; i < t.rows; ++i)
            for (std::int64_t j = 0; j < (symmetric && t.i == t.j ? i + 1 : t.cols); ++j) {
                double sum = 0;
                for (std::int64_t c = 0; c < chunks; ++c)
                    sum += partial[static_cast<std::size_t>(c * size + t.offset + i * t.cols + j)];
                p.g.row(t.i + i)[t.j + j] = sum;
                if (symmetric) p.g.row(t.j + j)[t.i + i] = sum;
            }
}

template <class A>
void eigen_rotate(const Cpu& d, const EigenRotate<A>& p) {
    check(p);
    const std::int64_t n = p.x.rows;
    const std::int64_t rows = std::clamp<std::int64_t>(n / 512 / 16 * 16, 16, 256);
    const auto x = view(p.x);
    const auto q = view(p.q);
    auto y = view(p.y);
    parallel_for_uneven(d, ceil_div(n, rows), [&](std::int64_t c) {
        const std::int64_t first = c * rows, height = std::min(rows, n - first);
        const Matrix<double> in = x.middleRows(first, height).template cast<double>();
        Matrix<double> out(height, p.y.cols);
        out.noalias() = p.alpha * in * q;
        if (p.beta != 0) out += y.middleRows(first, height).template cast<double>();
        y.middleRows(first, height) = out.template cast<A>();
    });
}

template <class A>
void eigen_norms(const Cpu& d, const EigenNorms<A>& p) {
    check(p);
    const std::int64_t n = p.w.rows, m = p.w.cols, chunks = ceil_div(n, kChunk);
    std::vector<double> partial(static_cast<std::size_t>(chunks * m), 0.0);
    parallel_for(d, chunks, [&](std::int64_t c) {
        std::vector<A> run;
        double* total = partial.data() + c * m;
        sum_rows<A>(c * kChunk, std::min((c + 1) * kChunk, n), m, total, run, [&](std::int64_t i, A* sum) {
            const A* w = p.w.row(i);
            if (!p.theta) {
                for (std::int64_t j = 0; j < m; ++j) sum[j] += w[j] * w[j];
                return;
            }
            const A* x = p.x.row(i);
            const double* theta = p.theta.data;
            for (std::int64_t j = 0; j < m; ++j) {
                const A r = static_cast<A>(double(w[j]) - theta[j] * double(x[j]));
                sum[j] += r * r;
            }
        });
    });
    std::fill(p.out.data, p.out.data + m, 0.0);
    for (std::int64_t c = 0; c < chunks; ++c)
        for (std::int64_t j = 0; j < m; ++j) p.out.data[j] += partial[static_cast<std::size_t>(c * m + j)];
}

template <class A>
void eigen_deflate(const Cpu& d, const EigenDeflate<A>& p) {
    check(p);
    constexpr std::int64_t kLarge = 8 * kChunk;
    const std::int64_t *offsets = p.offsets.data, components = p.offsets.size - 1;
    for (std::int64_t c = 0; c < components; ++c)
        if (offsets[c + 1] - offsets[c] > kLarge) deflate_large(d, p, offsets[c], offsets[c + 1]);
    // The others begin somewhere in a chunk of rows, and belong to that chunk.
    parallel_for_uneven(d, ceil_div(p.x.rows, kChunk), [&](std::int64_t chunk) {
        const std::int64_t *end = offsets + components, *c = std::lower_bound(offsets, end, chunk * kChunk);
        for (; c < end && *c < (chunk + 1) * kChunk; ++c)
            if (c[1] - c[0] <= kLarge) deflate_small(p, c[0], c[1]);
    });
}

template <class A>
void eigen_gather(const Cpu& d, const EigenGather<A>& p) {
    check(p);
    parallel_for(d, ceil_div(p.y.rows, kChunk), [&](std::int64_t chunk) {
        for (std::int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, p.y.rows); ++i) {
            const A *x = p.x.row(p.index.data[i]), scale = p.scale ? p.scale.data[i] : A(1);
            A* y = p.y.row(i);
            for (std::int64_t j = 0; j < p.y.cols; ++j) y[j] = scale * x[j];
        }
    });
}

template <class A>
void eigen_random(const Cpu& d, const EigenRandom<A>& p) {
    check(p);
    std::vector<std::uint64_t> start;
    for (std::int64_t j = 0; j < p.x.cols; ++j) start.push_back(eigen_random_column(p.seed, p.first_column + j));
    parallel_for(d, ceil_div(p.x.rows, kChunk), [&](std::int64_t chunk) {
        for (std::int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, p.x.rows); ++i)
            for (std::int64_t j = 0; j < p.x.cols; ++j)
                p.x.row(i)[j] = A(eigen_random_value(start[static_cast<std::size_t>(j)], i));
    });
}

#define FIEDLER_EIGEN(A)                                             \
    template void eigen_gram(const Cpu&, const EigenGram<A>&);       \
    template void eigen_rotate(const Cpu&, const EigenRotate<A>&);   \
    template void eigen_norms(const Cpu&, const EigenNorms<A>&);     \
    template void eigen_deflate(const Cpu&, const EigenDeflate<A>&); \
    template void eigen_gather(const Cpu&, const EigenGather<A>&);   \
    template void eigen_random(const Cpu&, const EigenRandom<A>&)
FIEDLER_EIGEN(float);
FIEDLER_EIGEN(double);
#undef FIEDLER_EIGEN

}  // namespace fiedler
