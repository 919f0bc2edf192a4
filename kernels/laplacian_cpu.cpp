// kernels/laplacian_cpu.cpp: sparse products on the CPU (contract in laplacian.h). Rows are split by the work in them;
// within a row, a panel of columns is summed in registers while the row's entries pass by.
#include <algorithm>

#include "kernels/laplacian.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

constexpr std::int64_t kRowCost = 4;  // of a row's epilogue, in entries

// The first row before which at least `cost` has to be done.
std::int64_t row_at(const std::int64_t* offsets, std::int64_t rows, std::int64_t cost) {
    std::int64_t low = 0, high = rows;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (offsets[middle] - offsets[0] + kRowCost * middle < cost)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// A vector register or several of them, element-wise. (GCC keeps arrays of these in registers, plain arrays not.)
template <class A>
struct Lanes {
    typedef A type __attribute__((vector_size(32), aligned(alignof(A)), may_alias));
    static constexpr int size = 32 / sizeof(A);
};

// Where the run of entries that begins at e ends.
template <class A>
std::int64_t run_end(std::int64_t e, std::int64_t end) {
    return sizeof(A) == 4 ? std::min(e + kLaplacianRun, end) : end;
}

// Columns [c, c + kVectors * Lanes<A>::size) of row i.
template <class A, int kVectors>
void row_panel(const LaplacianApply<A>& p, std::int64_t i, std::int64_t c) {
    using Vector = typename Lanes<A>::type;
    constexpr int kLanes = Lanes<A>::size;
    const auto at = [](const A* from, int k) { return *reinterpret_cast<const Vector*>(from + k * kLanes); };
    const std::int64_t end = p.matrix.offsets.data[i + 1];
    Vector sum[kVectors] = {};
    for (std::int64_t e = p.matrix.offsets.data[i]; e < end;) {
        Vector run[kVectors] = {};
        for (const std::int64_t last = run_end<A>(e, end); e < last; ++e) {
            const A* x = p.x.row(p.matrix.columns.data[e]) + c;
            const A value = p.matrix.values.data[e];
#pragma GCC unroll 8
            for (int k = 0; k < kVectors; ++k) run[k] += value * at(x, k);
        }
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) sum[k] += run[k];
    }
    const A* x = p.x.row(i) + c;
    const A* z = p.gamma == A(0) ? nullptr : p.z.row(i) + c;
    A* y = p.y.row(i) + c;
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
        Vector value = p.alpha * sum[k] + p.beta * at(x, k);
        if (z) value += p.gamma * at(z, k);
        *reinterpret_cast<Vector*>(y + k * kLanes) = value;
    }
}
template <class A>
void row_element(const LaplacianApply<A>& p, std::int64_t i, std::int64_t c) {
    const std::int64_t end = p.matrix.offsets.data[i + 1];
    A sum = 0;
    for (std::int64_t e = p.matrix.offsets.data[i]; e < end;) {
        A run = 0;
        for (const std::int64_t last = run_end<A>(e, end); e < last; ++e)
            run += p.matrix.values.data[e] * p.x.row(p.matrix.columns.data[e])[c];
        sum += run;
    }
    A value = p.alpha * sum + p.beta * p.x.row(i)[c];
    if (p.gamma != A(0)) value += p.gamma * p.z.row(i)[c];
    p.y.row(i)[c] = value;
}
template <class A>
void apply_row(const LaplacianApply<A>& p, std::int64_t i) {
    constexpr int kLanes = Lanes<A>::size;
    std::int64_t c = 0;
    for (; c + 8 * kLanes <= p.x.cols; c += 8 * kLanes) row_panel<A, 8>(p, i, c);
    if (c + 4 * kLanes <= p.x.cols) row_panel<A, 4>(p, i, c), c += 4 * kLanes;
    if (c + 2 * kLanes <= p.x.cols) row_panel<A, 2>(p, i, c), c += 2 * kLanes;
    if (c + kLanes <= p.x.cols) row_panel<A, 1>(p, i, c), c += kLanes;
    for (; c < p.x.cols; ++c) row_element(p, i, c);
}

}  // namespace

LongRows find_long_rows(const std::int64_t* offsets, std::int64_t rows) {
    LongRows r;
    r.first.push_back(0);
    for (std::int64_t i = 0; i < rows; ++i) {
        if (offsets[i + 1] - offsets[i] <= kLaplacianPiece) continue;
        r.rows.push_back(static_cast<std::int32_t>(i));
        for (std::int64_t e = offsets[i]; e < offsets[i + 1]; e += kLaplacianPiece) {
            r.begin.push_back(e);
            r.end.push_back(std::min(e + kLaplacianPiece, offsets[i + 1]));
        }
        r.first.push_back(static_cast<std::int32_t>(r.begin.size()));
    }
    return r;
}

template <class A>
void laplacian_apply(const Cpu& d, const LaplacianApply<A>& p) {
    check(p);
    const std::int64_t rows = p.matrix.rows, *offsets = p.matrix.offsets.data;
    const std::int64_t cost = offsets[rows] - offsets[0] + kRowCost * rows;
    const std::int64_t chunk = std::max<std::int64_t>(64, (std::int64_t(1) << 19) / p.x.cols);  // entries x columns
    parallel_for_uneven(d, (cost + chunk - 1) / chunk, [&](std::int64_t c) {
        const std::int64_t last = row_at(offsets, rows, (c + 1) * chunk);
        for (std::int64_t i = row_at(offsets, rows, c * chunk); i < last; ++i) apply_row(p, i);
    });
}

template void laplacian_apply(const Cpu&, const LaplacianApply<float>&);
template void laplacian_apply(const Cpu&, const LaplacianApply<double>&);

}  // namespace fiedler
