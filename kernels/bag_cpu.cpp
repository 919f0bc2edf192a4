// kernels/bag_cpu.cpp: sparse rows times a table on the CPU (see bag.h). The gradient is split by features and columns,
// so that each element of the table is summed in the order of the entries by one task.
#include <algorithm>

#include "kernels/bag.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

void check_matrix(const Vec<const std::int32_t>& offsets, const Vec<const std::int32_t>& columns, std::int64_t width) {
    const std::int64_t rows = offsets.size - 1;
    FIEDLER_REQUIRE("bag", offsets.data[0] == 0 && offsets.data[rows] <= columns.size);
    for (std::int64_t i = 0; i < rows; ++i) FIEDLER_REQUIRE("bag", offsets.data[i] <= offsets.data[i + 1]);
    std::uint32_t largest = 0;  // a negative one is larger than all others
    for (std::int64_t e = 0; e < offsets.data[rows]; ++e)
        largest = std::max(largest, static_cast<std::uint32_t>(columns.data[e]));
    FIEDLER_REQUIRE("bag", offsets.data[rows] == 0 || std::int64_t(largest) < width);
}

// out[0..count) += sum_{e in row i} v_e table[column_e][first..first + count)
template <class T>
void add_row(T* __restrict__ out, const Vec<const std::int32_t>& offsets, const Vec<const std::int32_t>& columns,
             const Vec<const float>& values, const Mat<const T>& table, std::int64_t i, std::int64_t first,
             std::int64_t count) {
    for (std::int32_t e = offsets.data[i]; e < offsets.data[i + 1]; ++e) {
        const T v = values ? T(values.data[e]) : T(1);
        const T* row = table.row(columns.data[e]) + first;
        for (std::int64_t c = 0; c < count; ++c) out[c] += v * row[c];
    }
}

}  // namespace

void bag_transpose(BagTransposed& out, Vec<const std::int32_t> offsets, Vec<const std::int32_t> columns,
                   Vec<const float> values, std::int64_t features) {
    const std::int64_t entries = offsets.data[offsets.size - 1];
    out.offsets.resize(static_cast<std::size_t>(features) + 1);
    out.rows.resize(static_cast<std::size_t>(entries));
    out.values.resize(values ? static_cast<std::size_t>(entries) : 0);
    bag_transpose({{out.offsets.data(), features + 1}, {out.rows.data(), entries}, {out.values.data(), entries}},
                  offsets, columns, values);
}

void bag_transpose(const BagTransposedTo& out, Vec<const std::int32_t> offsets, Vec<const std::int32_t> columns,
                   Vec<const float> values) {
    const std::int64_t rows = offsets.size - 1, features = out.offsets.size - 1, entries = offsets.data[rows];
    check_matrix(offsets, columns, features);
    FIEDLER_REQUIRE("bag", out.rows.size >= entries);
    FIEDLER_REQUIRE("bag", !values || (values.size >= entries && out.values.size >= entries));
    // offsets[f] runs from the first place of feature f to the first of f + 1; then all move up by one.
    std::int32_t* place = out.offsets.data;
    std::fill_n(place, features + 1, 0);
    for (std::int64_t e = 0; e < entries; ++e) ++place[columns.data[e] + 1];
    for (std::int64_t f = 0; f < features; ++f) place[f + 1] += place[f];
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int32_t e = offsets.data[i]; e < offsets.data[i + 1]; ++e) {
            const std::int32_t at = place[columns.data[e]]++;
            out.rows.data[at] = static_cast<std::int32_t>(i);
            if (values) out.values.data[at] = values.data[e];
        }
    std::copy_backward(place, place + features, place + features + 1);
    place[0] = 0;
}

template <class T>
void bag_forward(const Cpu& dev, const BagForward<T>& p) {
    check(p);
    check_matrix(p.offsets, p.columns, p.table.rows);
    parallel_for(dev, p.x.rows, [&](std::int64_t i) {
        if (!p.accumulate) std::fill(p.x.row(i), p.x.row(i) + p.x.cols, T(0));
        add_row<T>(p.x.row(i), p.offsets, p.columns, p.values, p.table, i, 0, p.x.cols);
    });
}

template <class T>
void bag_backward(const Cpu& dev, const BagBackward<T>& p) {
    check(p);
    check_matrix(p.offsets, p.rows, p.dx.rows);
    constexpr std::int64_t kColumns = 64;
    const std::int64_t channels = p.dx.cols, blocks = (channels + kColumns - 1) / kColumns;
    parallel_for_uneven(dev, p.dtable.rows * blocks, [&](std::int64_t task) {
        const std::int64_t f = task / blocks, first = task % blocks * kColumns;
        if (p.offsets.data[f] == p.offsets.data[f + 1]) return;
        const std::int64_t count = std::min(kColumns, channels - first);
        acc_t<T> sum[kColumns] = {};
        add_row<T>(sum, p.offsets, p.rows, p.values, p.dx, f, first, count);
        for (std::int64_t c = 0; c < count; ++c) p.dtable.row(f)[first + c] += sum[c];
    });
}

template void bag_forward(const Cpu&, const BagForward<float>&);
template void bag_forward(const Cpu&, const BagForward<double>&);
template void bag_backward(const Cpu&, const BagBackward<float>&);
template void bag_backward(const Cpu&, const BagBackward<double>&);

}  // namespace fiedler
