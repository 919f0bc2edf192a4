// kernels/coordinate_cpu.cpp: coordinate scalars on the CPU (contract in coordinate.h).
#include <algorithm>
#include <cmath>

#include "kernels/coordinate.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {
constexpr int kTaps = 4;

// Everything that belongs to a column, laid out so that loops over columns vectorise: tap t looks t tokens away.
template <class A>
struct Columns {
    std::vector<A> scale;        // exp(-log_temp) of the column's head
    std::vector<A> taps[kTaps];  // w_{c, 3 - t}; empty without a convolution
    bool convolution = false;

    Columns(Vec<const A> log_temp, Mat<const A> w, std::int64_t columns) : convolution(bool(w)) {
        const std::int64_t half = columns / 2, per_head = half / log_temp.size;
        for (std::int64_t c = 0; c < columns; ++c) scale.push_back(std::exp(-log_temp.data[c % half / per_head]));
        for (int t = 0; w && t < kTaps; ++t)
            for (std::int64_t c = 0; c < columns; ++c) taps[t].push_back(w.row(c)[kTaps - 1 - t]);
    }
};

template <class A>
void forward_row(const CoordinateForward<A>& p, const Columns<A>& columns, std::int64_t i, A* lam) {
    const std::int64_t width = p.s.cols, half = width / 2;
    const A* s = p.s.row(i);
    std::copy(s, s + width, lam);
    if (columns.convolution) {
        for (std::int64_t c = 0; c < width; ++c) lam[c] *= columns.taps[0][c];
        const int back = std::min<int>(kTaps - 1, static_cast<int>(i) - p.seq.first(static_cast<std::int32_t>(i)));
        for (int t = 1; t <= back; ++t) {
            const A *earlier = p.s.row(i - t), *tap = columns.taps[t].data();
            for (std::int64_t c = 0; c < width; ++c) lam[c] += tap[c] * earlier[c];
        }
    }
    A *a = p.a.row(i), *b = p.b.row(i);
    for (std::int64_t c = 0; c < half; ++c) a[c] = lam[c] * columns.scale[c];
    for (std::int64_t c = 0; c < half; ++c) b[c] = lam[half + c] * columns.scale[half + c];
}

// One token of one side (queries or keys): its ds, and what it adds to dw (partial + t * width) and dlog_temp.
template <class T>
void backward_row(const CoordinateBackward<T>& p, const Columns<T>& columns, std::int64_t j, int side, T* partial) {
    const std::int64_t width = p.s.cols, half = width / 2, offset = side * half;
    const Mat<const T>& gradient = side == 0 ? p.da : p.db;
    const T* output = (side == 0 ? p.a : p.b).row(j);
    const T* scale = columns.scale.data() + offset;
    const T *g = gradient.row(j), *s = p.s.row(j) + offset;
    T* ds = p.ds.row(j) + offset;
    T* log_temp = partial + kTaps * width + offset;
    for (std::int64_t c = 0; c < half; ++c) log_temp[c] -= g[c] * output[c];
    if (!columns.convolution) {
        for (std::int64_t c = 0; c < half; ++c) ds[c] = g[c] * scale[c];
        return;
    }
    std::fill(ds, ds + half, T(0));
    const int ahead = std::min<int>(kTaps - 1, p.seq.last(static_cast<std::int32_t>(j)) - 1 - static_cast<int>(j));
    for (int t = 0; t <= ahead; ++t) {
        const T *later = gradient.row(j + t), *tap = columns.taps[t].data() + offset;
        T* dtap = partial + t * width + offset;
        for (std::int64_t c = 0; c < half; ++c) {
            const T dlam = later[c] * scale[c];
            ds[c] += tap[c] * dlam;
            dtap[c] += s[c] * dlam;
        }
    }
}
}  // namespace

template <class A>
void coordinate_forward(const Cpu& d, const CoordinateForward<A>& p) {
    check(p);
    const Columns<A> columns(p.log_temp, p.w, p.s.cols);
    constexpr std::int64_t kChunk = 64;
    parallel_for(d, (p.s.rows + kChunk - 1) / kChunk, [&](std::int64_t chunk) {
        std::vector<A> lam(static_cast<std::size_t>(p.s.cols));
        const std::int64_t first = chunk * kChunk, last = std::min(first + kChunk, p.s.rows);
        for (std::int64_t i = first; i < last; ++i) forward_row(p, columns, i, lam.data());
    });
}

template <class T>
void coordinate_backward(const Cpu& d, const CoordinateBackward<T>& p) {
    check(p);
    const Columns<T> columns(p.log_temp, p.w, p.s.cols);
    const std::int64_t width = p.s.cols, half = width / 2, heads = p.log_temp.size, per_head = half / heads;
    std::vector<T> total(static_cast<std::size_t>((kTaps + 1) * width), T(0));
    sum_over_rows(d, p.s.rows, (kTaps + 1) * width, total.data(),
                  [&](std::int64_t first, std::int64_t last, T* partial) {
                      for (std::int64_t j = first; j < last; ++j)
                          for (int side = 0; side < 2; ++side) backward_row(p, columns, j, side, partial);
                  });
    if (p.dw)
        for (std::int64_t c = 0; c < width; ++c)
            for (int t = 0; t < kTaps; ++t)
                p.dw.row(c)[kTaps - 1 - t] += total[static_cast<std::size_t>(t * width + c)];
    if (p.dlog_temp)
        for (std::int64_t c = 0; c < width; ++c)
            p.dlog_temp.data[c % half / per_head] += total[static_cast<std::size_t>(kTaps * width + c)];
}

template void coordinate_forward(const Cpu&, const CoordinateForward<float>&);
template void coordinate_forward(const Cpu&, const CoordinateForward<double>&);
template void coordinate_backward(const Cpu&, const CoordinateBackward<float>&);
template void coordinate_backward(const Cpu&, const CoordinateBackward<double>&);

}  // namespace fiedler
