// kernels/slots.h: one new token of each of S sequences that are decoded side by side, each in a slot of its own.
//
// A slot has room for `capacity` tokens in every cache: row slot * capacity + i of [S capacity, columns] is its token i.
// Which row a step writes and what it looks at follows from numbers in device memory, so that a recorded step (a CUDA
// graph) can be replayed while the sequences grow. Slots (below) holds them; the functions here take `length` of it:
//
//   length[s] >= 0   the tokens of slot s that are in the caches already; the new one has position length[s] < capacity
//   length[s] <  0   slot s is idle: its rows of outputs, caches and carried state keep what they have
//
// slot_append     Of each slot's new token, any of three parts, each as in the family named:
//                   columns  y = conv4(x) over the carried rows `past` and x (conv.h; w absent: y = x). Columns [0, M) of
//                            y go to `mixed`, [M, M + C) to row length[s] of the cache `v`.
//                   scalars  (a, b) of coordinate.h from s and `past_scalars`; a is written out, b into its cache.
//                   gate     F = carry + logsigmoid(z + bias) (gate.h) into its cache; carry = F.
//                 past, past_scalars: the three rows before, [3 S, columns], the oldest first; zeros before a sequence's
//                 first token. They move up by one. Only the new token's row of a cache is written.
// slot_store      row s of `rows` to row length[s] of slot s in `cache`.
// slot_scatter    row i of `rows` to row place[i] of `to`, where that is not negative: a forward pass over packed prompts
//                 goes to their slots. No two rows to the same place.
// slot_attention  attention_decode (attention.h) of each slot over its tokens 0..length[s], the new one included.
// slot_dot        dot_decode (dot.h) of each slot over the same.
// slot_begin      Puts a sequence into one slot: its numbers in Slots. One small launch, no copy.
// slot_product    Cpu only: y = [residual +] x W', max(., 0)^2 on it when `relu_squared`. Each row has the same bits
//                 whatever the other rows and its place among them, which the products of matmul.h and mlp.h promise on
//                 Cuda alone, for a given number of rows.
//
// Shapes     mixed: [S, M] T, M >= 0; v: [S capacity, C] T; x: [S, M + C] T; past: [3 S, M + C] T, ld M + C; w:
//            [M + C, 4] acc_t<T>. a: [S, heads R]; b: [S capacity, heads R]; s: [S, 2 heads R]; past_scalars:
//            [3 S, 2 heads R], ld 2 heads R; w_scalars: [2 heads R, 4], optional; log_temp: [heads]. F: [S capacity,
//            heads]; z, carry: [S, heads]; bias: [heads]. All but columns: acc_t<T>.
//            o, q: [S, heads D] T; k, v: [S capacity, heads D] T; a: [S, heads R], b: [S capacity, heads R], F:
//            [S capacity, heads] acc_t<T>. On Cuda: D in {16, 32, 64, 128}, rows of T 16-byte aligned; M, C multiples of 8.
//            Caches of acc_t<T> and a are contiguous (ld == cols).
// Scratch    attention, dot on Cuda: slot_partial_elements(...) floats
// Numerics   as the functions for one sequence; on the Cpu their bits. On Cuda keys are taken in pieces of kSlotKeys,
//            counted from the sequence's beginning, whose softmaxes are merged in order: the bits depend on the sequence
//            alone, and are the same from run to run.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

// Device memory, [S] each.
struct Slots {
    Vec<std::int32_t> token;   // the next one to be put in
    Vec<std::int32_t> length;  // see above
    Vec<std::int32_t> begin;  // s - max(length[s], 0): as Packed::begin it gives a row of slots its position (packed())
    Vec<std::int32_t> left;   // tokens still to be generated
    Vec<std::uint64_t> seed;  // of the sequence's random numbers

    std::int64_t count() const { return length.size; }
    // For functions that look at a token's position and not along time (rotary): row s is token length[s] of a sequence.
    Packed packed() const {
        Packed p;
        p.tokens = p.count = static_cast<std::int32_t>(length.size);
        p.offsets = p.begin = p.end = begin.data;
        return p;
    }
};

template <class T>
struct SlotAppend {
    Vec<const std::int32_t> length;
    std::int64_t capacity = 0;
    // columns
    Mat<T> mixed, v;
    Mat<const T> x;
    Mat<const acc_t<T>> w;  // optional
    Mat<T> past;            // present iff w is
    // scalars; s absent: none
    Mat<acc_t<T>> a, b;
    Mat<const acc_t<T>> s;
    Mat<const acc_t<T>> w_scalars;  // optional
    Mat<acc_t<T>> past_scalars;     // present iff w_scalars is
    Vec<const acc_t<T>> log_temp;
    // gate; z absent: none
    Mat<acc_t<T>> F;
    Mat<const acc_t<T>> z;
    Vec<const acc_t<T>> bias;
    Mat<acc_t<T>> carry;
};

template <class U>
struct SlotStore {
    Mat<U> cache;
    Mat<const U> rows;
    Vec<const std::int32_t> length;
};

template <class U>
struct SlotScatter {
    Mat<U> to;
    Mat<const U> rows;
    Vec<const std::int32_t> place;  // [rows]
};

template <class T>
struct SlotAttention {
    Mat<T> o;
    Mat<const acc_t<T>> a, b;
    Mat<const acc_t<T>> F;  // optional
    Mat<const T> v;
    Vec<const std::int32_t> length;
    Vec<acc_t<T>> partial;  // Cuda only
    std::int32_t heads = 1, scalars = 1, window = 0;
};

template <class T>
struct SlotDot {
    Mat<T> o;
    Mat<const T> q, k, v;
    Vec<const std::int32_t> length;
    Vec<acc_t<T>> partial;  // Cuda only
    std::int32_t heads = 1, window = 0;
    acc_t<T> scale = 1;
};

struct SlotBegin {
    Slots slots;
    std::int32_t slot = 0, token = 0, length = -1, left = 0;
    std::uint64_t seed = 0;
};

template <class T>
struct SlotProduct {
    Mat<T> y;
    Mat<const T> x, w;
    Mat<const T> residual;  // optional; may be y
    bool relu_squared = false;
};

inline constexpr std::int64_t kSlotKeys = 256, kSlotPast = 3;
inline std::int64_t slot_pieces(std::int64_t capacity) { return (capacity + kSlotKeys - 1) / kSlotKeys; }
inline std::int64_t slot_partial_elements(std::int64_t slots, std::int64_t capacity, std::int64_t heads,
                                          std::int64_t width) {
    return capacity <= kSlotKeys ? 0 : slots * heads * slot_pieces(capacity) * (width + 2);
}

inline bool is_slots(const Slots& p) {
    const std::int64_t n = p.length.size;
    return n > 0 && is_shape(p.token, n) && is_shape(p.length, n) && is_shape(p.begin, n) && is_shape(p.left, n) &&
           is_shape(p.seed, n);
}
template <class U>
bool is_slot_cache(const Mat<U>& m, std::int64_t slots, std::int64_t columns) {
    return slots > 0 && m.rows > 0 && m.rows % slots == 0 && is_shape(m, m.rows, columns);
}

template <class T>
void check(const SlotAppend<T>& p) {
    const std::int64_t n = p.length.size;
    FIEDLER_REQUIRE("slots", n > 0 && p.length.data && p.capacity > 0);
    FIEDLER_REQUIRE("slots", is_shape(p.v, n * p.capacity, p.v.cols) && is_shape(p.x, n, p.mixed.cols + p.v.cols));
    FIEDLER_REQUIRE("slots", p.mixed.cols == 0 || is_shape(p.mixed, n, p.mixed.cols));
    FIEDLER_REQUIRE("slots", bool(p.w) == bool(p.past));
    FIEDLER_REQUIRE("slots", !p.w || (is_shape(p.w, p.x.cols, 4) && p.w.ld == 4 &&
                                      is_shape(p.past, kSlotPast * n, p.x.cols) && p.past.ld == p.x.cols));
    FIEDLER_REQUIRE("slots", !p.s || (p.s.cols % 2 == 0 && is_shape(p.s, n, p.s.cols) && p.log_temp.size > 0 &&
                                      p.s.cols / 2 % p.log_temp.size == 0));
    FIEDLER_REQUIRE("slots", !p.s || (is_shape(p.a, n, p.s.cols / 2) && p.a.ld == p.a.cols &&
                                      is_shape(p.b, n * p.capacity, p.s.cols / 2) && p.b.ld == p.b.cols));
    FIEDLER_REQUIRE("slots", bool(p.w_scalars) == bool(p.past_scalars) && (!p.w_scalars || p.s));
    FIEDLER_REQUIRE(
        "slots", !p.w_scalars || (is_shape(p.w_scalars, p.s.cols, 4) && p.w_scalars.ld == 4 &&
                                  is_shape(p.past_scalars, kSlotPast * n, p.s.cols) && p.past_scalars.ld == p.s.cols));
    FIEDLER_REQUIRE("slots", !p.z || (is_shape(p.z, n, p.bias.size) && is_shape(p.carry, n, p.bias.size) &&
                                      is_shape(p.F, n * p.capacity, p.bias.size) && p.F.ld == p.F.cols));
}
template <class U>
void check(const SlotStore<U>& p) {
    FIEDLER_REQUIRE("slots", p.length.data && is_slot_cache(p.cache, p.length.size, p.cache.cols));
    FIEDLER_REQUIRE("slots", is_shape(p.rows, p.length.size, p.cache.cols));
}
template <class U>
void check(const SlotScatter<U>& p) {
    FIEDLER_REQUIRE("slots", is_shape(p.to, p.to.rows, p.to.cols) && is_shape(p.rows, p.rows.rows, p.to.cols));
    FIEDLER_REQUIRE("slots", is_shape(p.place, p.rows.rows));
}
template <class T>
void check(const SlotAttention<T>& p) {
    const std::int64_t n = p.length.size;
    FIEDLER_REQUIRE("slots", p.length.data && p.heads > 0 && p.v.cols % p.heads == 0 && p.window >= 0);
    FIEDLER_REQUIRE("slots", p.scalars >= 1 && p.scalars <= 16 && is_slot_cache(p.v, n, p.v.cols));
    FIEDLER_REQUIRE("slots", is_shape(p.o, n, p.v.cols) && is_shape(p.a, n, p.heads * p.scalars));
    FIEDLER_REQUIRE("slots", is_shape(p.b, p.v.rows, p.heads * p.scalars) && p.a.ld == p.a.cols && p.b.ld == p.b.cols);
    FIEDLER_REQUIRE("slots", !p.F || (is_shape(p.F, p.v.rows, p.heads) && p.F.ld == p.F.cols));
}
template <class T>
void check(const SlotDot<T>& p) {
    const std::int64_t n = p.length.size;
    FIEDLER_REQUIRE("slots", p.length.data && p.heads > 0 && p.v.cols % p.heads == 0 && p.window >= 0 && p.scale > 0);
    FIEDLER_REQUIRE("slots", is_slot_cache(p.v, n, p.v.cols) && is_shape(p.k, p.v.rows, p.v.cols));
    FIEDLER_REQUIRE("slots", is_shape(p.o, n, p.v.cols) && is_shape(p.q, n, p.v.cols));
}
inline void check(const SlotBegin& p) {
    FIEDLER_REQUIRE("slots", is_slots(p.slots) && p.slot >= 0 && p.slot < p.slots.count());
}
template <class T>
void check(const SlotProduct<T>& p) {
    FIEDLER_REQUIRE("slots", is_shape(p.x, p.x.rows, p.w.cols) && is_shape(p.w, p.w.rows, p.w.cols));
    FIEDLER_REQUIRE("slots", is_shape(p.y, p.x.rows, p.w.rows));
    FIEDLER_REQUIRE("slots", !p.residual || is_shape(p.residual, p.x.rows, p.w.rows));
}

// length: of every slot, the new token included; the device alone knows what it is.
template <class T>
Traffic traffic(const SlotAttention<T>& p, std::int64_t length) {
    const double keys = double(p.length.size) * double(length), c = double(p.v.cols);
    return {keys * (c * sizeof(T) + double(p.b.cols + (p.F ? p.heads : 0)) * sizeof(acc_t<T>)),
            keys * (2 * c + 2.0 * double(p.b.cols) + p.heads)};
}
template <class T>
Traffic traffic(const SlotDot<T>& p, std::int64_t length) {
    const double keys = double(p.length.size) * double(length), c = double(p.v.cols);
    return {2 * keys * c * sizeof(T), keys * (4 * c + p.heads)};
}
template <class T>
Traffic traffic(const SlotAppend<T>& p) {
    const double n = double(p.length.size), x = double(p.x.cols), s = double(p.s.cols), z = double(p.z.cols);
    return {n * ((p.w ? 8 : 2) * x * sizeof(T) + ((p.w_scalars ? 8 : 2) * s + 3 * z) * sizeof(acc_t<T>)),
            n * (8 * x + 9 * s + 6 * z)};
}
template <class T>
Traffic traffic(const SlotProduct<T>& p) {
    const double m = double(p.x.rows), k = double(p.x.cols), n = double(p.w.rows);
    return {(m * k + n * k + (p.residual ? 2 : 1) * m * n) * sizeof(T), 2 * m * n * k};
}

template <class T>  // float, double
void slot_append(const Cpu&, const SlotAppend<T>&);
template <class U>
void slot_store(const Cpu&, const SlotStore<U>&);
template <class U>
void slot_scatter(const Cpu&, const SlotScatter<U>&);
template <class T>
void slot_attention(const Cpu&, const SlotAttention<T>&);
template <class T>
void slot_dot(const Cpu&, const SlotDot<T>&);
template <class T>
void slot_product(const Cpu&, const SlotProduct<T>&);
void slot_begin(const Cpu&, const SlotBegin&);
void slot_append(const Cuda&, const SlotAppend<bf16>&);
void slot_store(const Cuda&, const SlotStore<bf16>&);
void slot_store(const Cuda&, const SlotStore<float>&);
void slot_scatter(const Cuda&, const SlotScatter<bf16>&);
void slot_scatter(const Cuda&, const SlotScatter<float>&);
void slot_attention(const Cuda&, const SlotAttention<bf16>&);
void slot_dot(const Cuda&, const SlotDot<bf16>&);
void slot_begin(const Cuda&, const SlotBegin&);

}  // namespace fiedler
