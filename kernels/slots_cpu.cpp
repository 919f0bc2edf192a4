// kernels/slots_cpu.cpp: one new token of each of many sequences on the CPU (see slots.h): the functions for one sequence,
// slot by slot, and a product whose rows know nothing of each other.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "kernels/attention.h"
#include "kernels/dot.h"
#include "kernels/gate.h"
#include "kernels/parallel.h"
#include "kernels/slots.h"

namespace fiedler {
namespace {

constexpr std::int64_t kTaps = kSlotPast + 1;

// body(device, slot) for each slot that is not idle: several at once where there are enough of them for all threads.
template <class Body>
void for_slots(const Cpu& dev, const Vec<const std::int32_t>& length, Body&& body) {
    const auto one = [&](const Cpu& d, std::int64_t s) {
        if (length.data[s] >= 0) body(d, s);
    };
    if (length.size < thread_count(dev)) {
        for (std::int64_t s = 0; s < length.size; ++s) one(dev, s);
    } else {
        parallel_for(dev, length.size, [&](std::int64_t s) { one(Cpu{1}, s); });
    }
}

// rows[o] = the row o tokens before the new one, which is `now`.
template <class T>
void rows_before(const T* (&rows)[kTaps], const T* now, const Mat<T>& past, std::int64_t slot) {
    rows[0] = now;
    for (std::int64_t o = 1; o < kTaps; ++o) rows[o] = past.row(slot * kSlotPast + kSlotPast - o);
}
template <class T>
void move_up(const Mat<T>& past, std::int64_t slot, const T* now) {
    T* first = past.row(slot * kSlotPast);
    std::copy(first + past.cols, first + kSlotPast * past.cols, first);
    std::copy_n(now, past.cols, past.row(slot * kSlotPast + kSlotPast - 1));
}

// Columns [first, first + n) of y = conv4(x). The sums are written as in conv_cpu.cpp: the same bits.
template <class T>
void convolve(T* y, const SlotAppend<T>& p, std::int64_t slot, std::int64_t first, std::int64_t n) {
    const T* x = p.x.row(slot);
    if (!p.w) {
        std::copy_n(x + first, n, y);
        return;
    }
    const T* rows[kTaps];
    rows_before(rows, x, p.past, slot);
    const T *r0 = rows[0] + first, *r1 = rows[1] + first, *r2 = rows[2] + first, *r3 = rows[3] + first;
    const T* w = p.w.row(first);
    for (std::int64_t c = 0; c < n; ++c, w += kTaps) y[c] = w[3] * r0[c] + w[2] * r1[c] + w[1] * r2[c] + w[0] * r3[c];
}

template <class T>
void append_scalars(const SlotAppend<T>& p, std::int64_t slot, std::int64_t row) {
    const std::int64_t columns = p.s.cols, half = columns / 2, per_head = half / p.log_temp.size;
    const T* rows[kTaps] = {p.s.row(slot)};
    if (p.w_scalars) rows_before(rows, p.s.row(slot), p.past_scalars, slot);
    T *a = p.a.row(slot), *b = p.b.row(row);
    for (std::int64_t c = 0; c < columns; ++c) {
        T lam = rows[0][c];
        if (p.w_scalars) {
            const T* w = p.w_scalars.row(c);
            lam *= w[3];
            for (std::int64_t o = 1; o < kTaps; ++o) lam += w[3 - o] * rows[o][c];
        }
        (c < half ? a[c] : b[c - half]) = lam * std::exp(-p.log_temp.data[c % half / per_head]);
    }
    if (p.w_scalars) move_up(p.past_scalars, slot, p.s.row(slot));
}

}  // namespace

template <class T>
void slot_append(const Cpu& dev, const SlotAppend<T>& p) {
    check(p);
    for_slots(dev, p.length, [&](const Cpu& d, std::int64_t slot) {
        const std::int64_t row = slot * p.capacity + p.length.data[slot], split = p.mixed.cols;
        if (split > 0) convolve(p.mixed.row(slot), p, slot, 0, split);
        convolve(p.v.row(row), p, slot, split, p.v.cols);
        if (p.past) move_up(p.past, slot, p.x.row(slot));
        if (p.s) append_scalars(p, slot, row);
        if (p.z)
            gate_forward(d, GateForward<T>{.F = p.F.slice_rows(row, 1),
                                           .z = p.z.slice_rows(slot, 1),
                                           .bias = p.bias,
                                           .seq = Packed::uniform(1, 1),
                                           .carry = {p.carry.row(slot), p.carry.cols}});
    });
}

template <class U>
void slot_store(const Cpu&, const SlotStore<U>& p) {
    check(p);
    const std::int64_t capacity = p.cache.rows / p.length.size;
    for (std::int64_t s = 0; s < p.length.size; ++s)
        if (p.length.data[s] >= 0)
            std::copy_n(p.rows.row(s), p.rows.cols, p.cache.row(s * capacity + p.length.data[s]));
}

template <class U>
void slot_scatter(const Cpu&, const SlotScatter<U>& p) {
    check(p);
    for (std::int64_t i = 0; i < p.rows.rows; ++i)
        if (p.place.data[i] >= 0) std::copy_n(p.rows.row(i), p.rows.cols, p.to.row(p.place.data[i]));
}

template <class T>
void slot_attention(const Cpu& dev, const SlotAttention<T>& p) {
    check(p);
    const std::int64_t capacity = p.v.rows / p.length.size;
    for_slots(dev, p.length, [&](const Cpu& d, std::int64_t slot) {
        const std::int64_t first = slot * capacity, n = p.length.data[slot] + 1;
        attention_decode(d, AttentionDecode<T>{.o = {p.o.row(slot), p.o.cols},
                                               .a = {p.a.row(slot), p.a.cols},
                                               .b = p.b.slice_rows(first, n),
                                               .F = p.F ? p.F.slice_rows(first, n) : Mat<const T>{},
                                               .v = p.v.slice_rows(first, n),
                                               .heads = p.heads,
                                               .scalars = p.scalars,
                                               .window = p.window});
    });
}

template <class T>
void slot_dot(const Cpu& dev, const SlotDot<T>& p) {
    check(p);
    const std::int64_t capacity = p.v.rows / p.length.size;
    for_slots(dev, p.length, [&](const Cpu& d, std::int64_t slot) {
        const std::int64_t first = slot * capacity, n = p.length.data[slot] + 1;
        dot_decode(d, DotDecode<T>{.o = {p.o.row(slot), p.o.cols},
                                   .q = {p.q.row(slot), p.q.cols},
                                   .k = p.k.slice_rows(first, n),
                                   .v = p.v.slice_rows(first, n),
                                   .heads = p.heads,
                                   .window = p.window,
                                   .scale = p.scale});
    });
}

namespace {

// A tile of kRows rows and kOut outputs, each with a sum of its own in kLanes lanes: the code that makes an output is
// the same wherever it stands. Rows and outputs beyond the last are the last once more, and not written.
template <class T>
struct ProductTile {
    static constexpr int kRows = 4, kOut = 2, kLanes = 8;
    using Lanes = Eigen::Array<T, kLanes, 1>;
    using Load = Eigen::Map<const Lanes>;

    static void run(const SlotProduct<T>& p, std::int64_t first_row, std::int64_t first_out) {
        const std::int64_t depth = p.x.cols, whole = depth / kLanes * kLanes;
        const T *x[kRows], *w[kOut];
        for (int r = 0; r < kRows; ++r) x[r] = p.x.row(std::min(first_row + r, p.x.rows - 1));
        for (int o = 0; o < kOut; ++o) w[o] = p.w.row(std::min(first_out + o, p.w.rows - 1));
        Lanes sum[kRows][kOut];
        for (auto& row : sum)
            for (Lanes& s : row) s.setZero();
        for (std::int64_t k = 0; k < whole; k += kLanes) {
            const Lanes w0 = Load(w[0] + k), w1 = Load(w[1] + k);
            for (int r = 0; r < kRows; ++r) {
                const Lanes v = Load(x[r] + k);
                sum[r][0] += v * w0;
                sum[r][1] += v * w1;
            }
        }
        for (int r = 0; r < kRows && first_row + r < p.x.rows; ++r)
            for (int o = 0; o < kOut && first_out + o < p.w.rows; ++o) {
                T y = finish(sum[r][o], x[r], w[o], whole, depth);
                if (p.residual) y += p.residual.row(first_row + r)[first_out + o];
                if (p.relu_squared) y = y < 0 ? T(0) : y * y;  // a NaN stays
                p.y.row(first_row + r)[first_out + o] = y;
            }
    }
    [[gnu::noinline]] static T finish(const Lanes& sum, const T* x, const T* w, std::int64_t first,
                                      std::int64_t depth) {
        T y = sum.sum();
        for (std::int64_t k = first; k < depth; ++k) y += x[k] * w[k];
        return y;
    }
};

}  // namespace

template <class T>
void slot_product(const Cpu& dev, const SlotProduct<T>& p) {
    check(p);
    using Tile = ProductTile<T>;
    constexpr std::int64_t kOutputs = 16;  // of a piece of work: their weights stay in the first cache for all rows
    const std::int64_t pieces = (p.w.rows + kOutputs - 1) / kOutputs;
    parallel_for(dev, pieces, [&](std::int64_t piece) {
        const std::int64_t last = std::min(p.w.rows, (piece + 1) * kOutputs);
        for (std::int64_t r = 0; r < p.x.rows; r += Tile::kRows)
            for (std::int64_t o = piece * kOutputs; o < last; o += Tile::kOut) Tile::run(p, r, o);
    });
}

void slot_begin(const Cpu&, const SlotBegin& p) {
    check(p);
    p.slots.token.data[p.slot] = p.token;
    p.slots.length.data[p.slot] = p.length;
    p.slots.begin.data[p.slot] = p.slot - std::max(p.length, 0);
    p.slots.left.data[p.slot] = p.left;
    p.slots.seed.data[p.slot] = p.seed;
}

template void slot_append(const Cpu&, const SlotAppend<float>&);
template void slot_append(const Cpu&, const SlotAppend<double>&);
template void slot_store(const Cpu&, const SlotStore<float>&);
template void slot_store(const Cpu&, const SlotStore<double>&);
template void slot_scatter(const Cpu&, const SlotScatter<float>&);
template void slot_scatter(const Cpu&, const SlotScatter<double>&);
template void slot_attention(const Cpu&, const SlotAttention<float>&);
template void slot_attention(const Cpu&, const SlotAttention<double>&);
template void slot_dot(const Cpu&, const SlotDot<float>&);
template void slot_dot(const Cpu&, const SlotDot<double>&);
template void slot_product(const Cpu&, const SlotProduct<float>&);
template void slot_product(const Cpu&, const SlotProduct<double>&);

}  // namespace fiedler
