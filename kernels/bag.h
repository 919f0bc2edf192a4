// kernels/bag.h: sparse rows of features times a table, and its gradient: an embedding for what is not one token.
//
//   forward    x_i = [x_i +] sum_{e in row i} v_e W[column_e]
//   backward   dW[f] += sum_{e in row f of the transposed matrix} v_e dx[row_e]
//
// Shapes     table W: [features, channels] T; dtable: [features, channels] acc_t<T>; x, dx: [rows, channels] T, any ld;
//            on Cuda 16-byte aligned rows and channels % 8 == 0
// Matrix     CSR: offsets [rows + 1] int32, columns int32 in [0, features) and values f32 (absent: all 1), at least
//            offsets[rows] entries each; rows may be empty. backward takes the transposed matrix, offsets [features + 1],
//            rows and values, which bag_transpose makes on the host. Ranges are the caller's duty; checked on the CPU only.
// Scratch    backward on Cuda: bag_scratch_elements(entries, channels) acc_t<T>, entries = rows.size
// Writes     x overwritten, or accumulated (+=) when `accumulate`; dtable accumulated (+=), rows of absent features
//            untouched. No output may alias an input.
// Numerics   acc_t<T>, in the order of the entries (backward on Cuda: of pieces of kBagPiece entries), no atomics:
//            bit-equal from run to run. x_i depends on the entries of row i alone. Launches depend on the sizes of the
//            views alone.
#pragma once
#include <vector>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct BagForward {
    Mat<T> x;
    Vec<const std::int32_t> offsets, columns;
    Vec<const float> values;  // optional
    Mat<const T> table;
    bool accumulate = false;
};

template <class T>
struct BagBackward {
    Mat<acc_t<T>> dtable;
    Vec<const std::int32_t> offsets, rows;  // of the transposed matrix
    Vec<const float> values;                // optional
    Mat<const T> dx;
    Vec<acc_t<T>> scratch;  // Cuda only
};

template <class T>
void check(const BagForward<T>& p) {
    FIEDLER_REQUIRE("bag", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.table, p.table.rows, p.x.cols));
    FIEDLER_REQUIRE("bag", is_shape(p.offsets, p.x.rows + 1) && (p.columns || p.columns.size == 0));
    FIEDLER_REQUIRE("bag", !p.values || p.values.size == p.columns.size);
}
template <class T>
void check(const BagBackward<T>& p) {
    FIEDLER_REQUIRE("bag", is_shape(p.dx, p.dx.rows, p.dx.cols) && is_shape(p.dtable, p.dtable.rows, p.dx.cols));
    FIEDLER_REQUIRE("bag", is_shape(p.offsets, p.dtable.rows + 1) && (p.rows || p.rows.size == 0));
    FIEDLER_REQUIRE("bag", !p.values || p.values.size == p.rows.size);
}

// The table's rows, and those of dx, come from a cache after the first time.
template <class T>
Traffic traffic(const BagForward<T>& p) {
    const double c = double(p.x.cols), entries = double(p.columns.size);
    return {(double(p.x.rows) * (p.accumulate ? 2 : 1) + double(p.table.rows)) * c * sizeof(T) +
                4.0 * double(p.offsets.size) + entries * (p.values ? 8 : 4),
            2 * entries * c};
}
template <class T>
Traffic traffic(const BagBackward<T>& p) {
    const double c = double(p.dx.cols), entries = double(p.rows.size);
    return {double(p.dx.rows) * c * sizeof(T) + 2 * double(p.dtable.rows) * c * sizeof(acc_t<T>) +
                4.0 * double(p.offsets.size) + entries * (p.values ? 8 : 4),
            2 * entries * c};
}

// The transposed matrix on the host: of each feature its rows, ascending, as they come. Vectors are overwritten; their
// memory is used again. values stay empty where there are none.
struct BagTransposed {
    std::vector<std::int32_t> offsets, rows;
    std::vector<float> values;
};
void bag_transpose(BagTransposed& out, Vec<const std::int32_t> offsets, Vec<const std::int32_t> columns,
                   Vec<const float> values, std::int64_t features);
// The same into memory of at least [features + 1], entries and, with values, entries elements.
struct BagTransposedTo {
    Vec<std::int32_t> offsets, rows;
    Vec<float> values;
};
void bag_transpose(const BagTransposedTo& out, Vec<const std::int32_t> offsets, Vec<const std::int32_t> columns,
                   Vec<const float> values);

inline constexpr std::int64_t kBagPiece = 128;  // entries of the transposed matrix that one block sums, on Cuda
inline std::int64_t bag_scratch_elements(std::int64_t entries, std::int64_t channels) {
    return ((entries + kBagPiece - 1) / kBagPiece) * (2 * channels + 1);
}

template <class T>  // float, double
void bag_forward(const Cpu&, const BagForward<T>&);
template <class T>
void bag_backward(const Cpu&, const BagBackward<T>&);
void bag_forward(const Cuda&, const BagForward<bf16>&);
void bag_backward(const Cuda&, const BagBackward<bf16>&);

}  // namespace fiedler
