// kernels/pool.h: one row for each sequence of a packing: the mean, the sum, or a softmax-weighted sum of its rows.
//
//   mean       y_s = sum_{i in s} x_i / n_s        dx_i = dy_s / n_s
//   sum        y_s = sum_{i in s} x_i              dx_i = dy_s
//   attention  p_ih = exp(z_ih - lse_sh), lse_sh = log sum_{i in s} exp(z_ih);  y_sc = sum_{i in s} p_{i, h(c)} x_ic
//              dx_ic = p_{i, h(c)} dy_sc;  dz_ih = p_ih sum_{c of h} dy_sc (x_ic - y_sc)
//
// n_s: rows of the sequence. Channel c belongs to head h(c) = c / (channels / heads). A learned query is a product before
// it: z = n U', U [heads, channels], whose own gradients come from dz. An empty sequence has y_s = 0, lse_s = -inf.
//
// Shapes     x, dx: [tokens, channels] T; y, dy: [sequences, channels] T, any ld; on Cuda 16-byte aligned rows and
//            channels / heads % 8 == 0 (mean and sum: channels % 8 == 0)
//            z: [tokens, heads] acc_t<T>, dz: [tokens, heads] T (ready for matmul), any ld; lse: [sequences, heads]
//            acc_t<T>, ld == heads. All four for attention alone; heads = z.cols.
// Backward   takes y as the forward pass stored it.
// longest    of ragged sequences: tokens of the longest one or more, 0: not known. Spares launches; the results are the
//            same.
// Scratch    forward on Cuda: pool_scratch_elements(tokens, channels, heads) acc_t<T>, heads 0 for mean and sum; none if
//            1 <= longest <= kPoolChunk, or the sequences are of one such length
// Writes     y, lse, dx, dz overwritten. No output may alias an input.
// Numerics   acc_t<T>, fixed order, no atomics: bit-equal from run to run. A sequence's results depend on its own rows
//            alone, wherever it lies: chunks of kPoolChunk rows are counted from its own first row.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

enum class PoolKind { mean, sum, attention };

template <class T>
struct PoolForward {
    Mat<T> y;
    Mat<acc_t<T>> lse;  // attention
    Mat<const T> x;
    Mat<const acc_t<T>> z;  // attention
    Packed seq;
    std::int32_t longest = 0;
    PoolKind kind = PoolKind::mean;
    Vec<acc_t<T>> scratch;  // Cuda only
};

template <class T>
struct PoolBackward {
    Mat<T> dx;
    Mat<T> dz;  // attention
    Mat<const T> dy;
    Mat<const T> x, y;           // attention
    Mat<const acc_t<T>> z, lse;  // attention
    Packed seq;
    PoolKind kind = PoolKind::mean;
};

template <class A>
bool are_logits(const Mat<const A>& z, const Mat<const A>& lse, const Packed& seq, std::int64_t channels) {
    return is_shape(z, seq.tokens, z.cols) && z.cols > 0 && channels % z.cols == 0 &&
           is_shape(lse, seq.count, z.cols) && lse.ld == z.cols;
}
template <class T>
void check(const PoolForward<T>& p) {
    FIEDLER_REQUIRE("pool", is_shape(p.x, p.x.rows, p.x.cols) && is_packing(p.seq, p.x.rows));
    FIEDLER_REQUIRE("pool", is_shape(p.y, p.seq.count, p.x.cols));
    FIEDLER_REQUIRE("pool", (p.kind == PoolKind::attention) == bool(p.z) && bool(p.z) == bool(p.lse));
    FIEDLER_REQUIRE("pool", !p.z || are_logits<acc_t<T>>(p.z, p.lse, p.seq, p.x.cols));
}
template <class T>
void check(const PoolBackward<T>& p) {
    FIEDLER_REQUIRE("pool", is_shape(p.dx, p.dx.rows, p.dx.cols) && is_packing(p.seq, p.dx.rows));
    FIEDLER_REQUIRE("pool", is_shape(p.dy, p.seq.count, p.dx.cols));
    if (p.kind != PoolKind::attention) return;
    FIEDLER_REQUIRE("pool", is_shape(p.x, p.dx.rows, p.dx.cols) && is_shape(p.y, p.seq.count, p.dx.cols));
    FIEDLER_REQUIRE("pool", are_logits<acc_t<T>>(p.z, p.lse, p.seq, p.dx.cols));
    FIEDLER_REQUIRE("pool", is_shape(p.dz, p.dx.rows, p.z.cols));
}

template <class T>
Traffic traffic(const PoolForward<T>& p) {
    const double c = double(p.x.cols), n = double(p.x.rows) * c, m = double(p.y.rows) * c;
    const double z = double(p.z.rows + p.lse.rows) * double(p.z.cols);
    return {(n + m) * sizeof(T) + z * sizeof(acc_t<T>), (p.z ? 2 : 1) * n + z};
}
template <class T>
Traffic traffic(const PoolBackward<T>& p) {
    const double c = double(p.dx.cols), n = double(p.dx.rows) * c, m = double(p.dy.rows) * c;
    const double z = double(p.z.rows) * double(p.z.cols), lse = double(p.lse.rows) * double(p.z.cols);
    return {((p.z ? 2 : 1) * (n + m) + z) * sizeof(T) + (z + lse) * sizeof(acc_t<T>), (p.z ? 4 : 1) * n + z};
}

inline constexpr std::int64_t kPoolChunk = 1024;  // rows of a sequence that one block sums, on Cuda
inline std::int64_t pool_scratch_elements(std::int64_t tokens, std::int64_t channels, std::int64_t heads) {
    return 2 * ((tokens + kPoolChunk - 1) / kPoolChunk) * (channels + 2 * heads);
}

template <class T>  // float, double
void pool_forward(const Cpu&, const PoolForward<T>&);
template <class T>
void pool_backward(const Cpu&, const PoolBackward<T>&);
void pool_forward(const Cuda&, const PoolForward<bf16>&);
void pool_backward(const Cuda&, const PoolBackward<bf16>&);

}  // namespace fiedler
