// kernels/slots.cu: one new token of each of many sequences on the GPU (see slots.h). Attention: a block takes one piece of
// kSlotKeys keys of one head of one slot; where a cache is longer than a piece, the pieces' softmaxes are merged, in
// order, by a second kernel. Blocks beyond a sequence's end leave at once.
#include "kernels/common.cuh"
#include "kernels/head_width.cuh"
#include "kernels/slots.h"

namespace fiedler {
namespace slots {
namespace {

constexpr int kTaps = 4, kPack = Pack<nv_bf16>::size, kAppendThreads = 128;
constexpr int kWarps = 4, kThreads = kWarps * kWarp, kKeys = int(kSlotKeys);

// ---- append --------------------------------------------------------------------------------------------------------

// Eight columns of y = conv4(x); past moves up.
__device__ void append_columns(const SlotAppend<bf16>& p, int slot, std::int64_t row, int column) {
    const int split = static_cast<int>(p.mixed.cols);
    const auto x = load16(nv(p.x.data) + slot * p.x.ld + column);
    Pack<nv_bf16> y = x;
    if (p.w.data != nullptr) {
        nv_bf16* past = nv(p.past.data) + std::int64_t(slot) * kSlotPast * p.past.ld + column;
        Pack<nv_bf16> old[kSlotPast];
#pragma unroll
        for (int o = 0; o < kSlotPast; ++o) old[o] = load16(past + o * p.past.ld);
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
            const float4 w = *reinterpret_cast<const float4*>(p.w.data + std::int64_t(column + e) * kTaps);
            float sum = w.w * to_float(x.v[e]);
            sum += w.z * to_float(old[2].v[e]);
            sum += w.y * to_float(old[1].v[e]);
            sum += w.x * to_float(old[0].v[e]);
            y.v[e] = from_float<nv_bf16>(sum);
        }
        store16(past, old[1]);
        store16(past + p.past.ld, old[2]);
        store16(past + 2 * p.past.ld, x);
    }
    if (column < split)
        store16(nv(p.mixed.data) + slot * p.mixed.ld + column, y);
    else
        store16(nv(p.v.data) + row * p.v.ld + (column - split), y);
}

__device__ void append_scalar(const SlotAppend<bf16>& p, int slot, std::int64_t row, int column) {
    const int half = static_cast<int>(p.s.cols) / 2, per_head = half / static_cast<int>(p.log_temp.size);
    const float s = p.s.data[slot * p.s.ld + column];
    float lam = s;
    if (p.w_scalars.data != nullptr) {
        float* past = p.past_scalars.data + std::int64_t(slot) * kSlotPast * p.past_scalars.ld + column;
        const std::int64_t ld = p.past_scalars.ld;
        const float old0 = past[0], old1 = past[ld], old2 = past[2 * ld];
        const float4 w = *reinterpret_cast<const float4*>(p.w_scalars.data + std::int64_t(column) * kTaps);
        lam = w.w * s;
        lam += w.x * old0;
        lam += w.y * old1;
        lam += w.z * old2;
        past[0] = old1, past[ld] = old2, past[2 * ld] = s;
    }
    lam *= expf(-p.log_temp.data[column % half / per_head]);
    if (column < half)
        p.a.data[slot * p.a.ld + column] = lam;
    else
        p.b.data[row * p.b.ld + (column - half)] = lam;
}

__device__ void append_gate(const SlotAppend<bf16>& p, int slot, std::int64_t row, int head) {
    const float u = p.z.data[slot * p.z.ld + head] + p.bias.data[head];
    const float f = (u < 0.f ? u : 0.f) - log1pf(expf(-fabsf(u)));  // as in gate.cu
    float* carry = p.carry.data + slot * p.carry.ld + head;
    p.F.data[row * p.F.ld + head] = *carry = float(double(*carry) + double(f));
}

// A block a slot; its threads share the packs of columns, the scalars and the gates.
__global__ void __launch_bounds__(kAppendThreads) append_kernel(const SlotAppend<bf16> p) {
    const int slot = blockIdx.x, length = p.length.data[slot];
    if (length < 0) return;
    const std::int64_t row = slot * p.capacity + length;
    const int packs = static_cast<int>(p.x.cols) / kPack, scalars = static_cast<int>(p.s.cols);
    const int gates = static_cast<int>(p.z.cols);
    for (int i = threadIdx.x; i < packs + scalars + gates; i += kAppendThreads) {
        if (i < packs)
            append_columns(p, slot, row, i * kPack);
        else if (i < packs + scalars)
            append_scalar(p, slot, row, i - packs);
        else
            append_gate(p, slot, row, i - packs - scalars);
    }
}

// Row i of `rows` goes to row place[i] of `to`; with a capacity place holds lengths: to row i * capacity + place[i].
struct RowsOut {
    std::int64_t ld_to, ld_rows, capacity;
    int columns;
};
template <class U>
__global__ void scatter_kernel(U* to, const U* rows, const std::int32_t* place, const RowsOut p) {
    const std::int64_t i = blockIdx.x;
    if (place[i] < 0) return;
    U* out = to + (i * p.capacity + place[i]) * p.ld_to;
    const U* in = rows + i * p.ld_rows;
    for (int c = threadIdx.x; c < p.columns; c += blockDim.x) out[c] = in[c];
}
template <class U>
void scatter(const Cuda& cuda, const Mat<U>& to, const Mat<const U>& rows, const Vec<const std::int32_t>& place,
             std::int64_t capacity) {
    const RowsOut p{to.ld, rows.ld, capacity, int(rows.cols)};
    if constexpr (std::is_same_v<U, bf16>)
        scatter_kernel<<<unsigned(rows.rows), 128, 0, stream_of(cuda)>>>(nv(to.data), nv(rows.data), place.data, p);
    else
        scatter_kernel<<<unsigned(rows.rows), 128, 0, stream_of(cuda)>>>(to.data, rows.data, place.data, p);
    LAUNCH_CHECK("slot_scatter");
}

__global__ void begin_kernel(const SlotBegin p) {
    p.slots.token.data[p.slot] = p.token;
    p.slots.length.data[p.slot] = p.length;
    p.slots.begin.data[p.slot] = p.slot - (p.length < 0 ? 0 : p.length);
    p.slots.left.data[p.slot] = p.left;
    p.slots.seed.data[p.slot] = p.seed;
}

// ---- attention -----------------------------------------------------------------------------------------------------

// The tokens that a slot's new one looks at, [first, end), and the piece of them at hand, [lo, hi).
struct Reach {
    int first, end;
    __device__ Reach(int length, int window) : end(length + 1) {
        first = window > 0 && window < end ? end - window : 0;
    }
    __device__ int lo(int piece) const { return max(first, piece * kKeys); }
    __device__ int hi(int piece) const { return min(end, (piece + 1) * kKeys); }
};

// How the lanes of a warp share rows of D values: D / 8 lanes take 8 each, so that a warp reads kTogether rows at once.
template <int D>
struct Rows {
    static constexpr int kLanes = D / 8, kTogether = kWarp / kLanes, kTurns = kLanes;
};

// Scores of 32 keys from `base` on, of which those in [lo, hi) exist: lane l has that of key base + l, -inf outside.
struct ScalarScores {
    const float *a, *b, *F;  // of the slot: the query; key 0
    int stride, scalars, heads, head;
    float gate;

    __device__ ScalarScores(const SlotAttention<bf16>& p, int slot, int h, int length) : head(h) {
        const std::int64_t first = slot * (p.v.rows / p.length.size);
        stride = static_cast<int>(p.b.ld), scalars = p.scalars, heads = p.heads;
        a = p.a.data + slot * p.a.ld + head * scalars;
        b = p.b.data + first * p.b.ld + head * scalars;
        F = p.F.data == nullptr ? nullptr : p.F.data + first * heads + head;
        gate = F == nullptr ? 0.f : F[std::int64_t(length) * heads];
    }
    __device__ float operator()(int base, int lo, int hi) const {
        const int j = base + static_cast<int>(threadIdx.x) % kWarp;
        if (j < lo || j >= hi) return -INFINITY;
        const float* key = b + std::int64_t(j) * stride;
        float s = F == nullptr ? 0.f : gate - F[std::int64_t(j) * heads];
        if (scalars % 4 == 0) {
            for (int r = 0; r < scalars; r += 4) {
                const auto x = *reinterpret_cast<const float4*>(a + r), y = *reinterpret_cast<const float4*>(key + r);
                s -= fabsf(x.x - y.x);
                s -= fabsf(x.y - y.y);
                s -= fabsf(x.z - y.z);
                s -= fabsf(x.w - y.w);
            }
        } else {
            for (int r = 0; r < scalars; ++r) s -= fabsf(a[r] - key[r]);
        }
        return s;
    }
};

template <int D>
struct DotScores {
    const nv_bf16* k;  // of the slot and head: key 0, this lane's eight values
    std::int64_t ld;
    float q[8];

    __device__ DotScores(const SlotDot<bf16>& p, int slot, int head, int) : ld(p.k.ld) {
        const int at = head * D + static_cast<int>(threadIdx.x) % Rows<D>::kLanes * 8;
        k = nv(p.k.data) + slot * (p.v.rows / p.length.size) * ld + at;
        const auto raw = load16(nv(p.q.data) + slot * p.q.ld + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] = to_float(raw.v[i]) * p.scale;
    }
    __device__ float operator()(int base, int lo, int hi) const {
        using R = Rows<D>;
        const int lane = threadIdx.x % kWarp;
        float mine = -INFINITY;
#pragma unroll
        for (int turn = 0; turn < R::kTurns; ++turn) {
            const int j = min(base + turn * R::kTogether + lane / R::kLanes, hi - 1);
            const auto key = load16(k + j * ld);
            float s = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i) s = fmaf(q[i], to_float(key.v[i]), s);
#pragma unroll
            for (int step = R::kLanes / 2; step > 0; step /= 2) s += __shfl_xor_sync(0xffffffffu, s, step);
            const float of_lane = __shfl_sync(0xffffffffu, s, lane % R::kTogether * R::kLanes);
            if (lane / R::kTogether == turn) mine = of_lane;
        }
        const int j = base + lane;
        return j < lo || j >= hi ? -INFINITY : mine;
    }
};

// What one warp has summed up: over its keys, weights relative to exp(top).
struct Sums {
    float top = -INFINITY, sum = 0.f, acc[8] = {};  // acc: this lane's eight columns, of every kTogether-th key
};

// v: of the slot and head, key 0, this lane's eight values.
template <int D, class Scores>
__device__ void add_keys(Sums& t, const Scores& scores, const nv_bf16* v, std::int64_t ld, int base, int lo, int hi) {
    using R = Rows<D>;
    const int lane = threadIdx.x % kWarp;
    const float s = scores(base, lo, hi);
    const float best = fmaxf(t.top, warp_max(s));  // finite: one of the keys exists
    const float rescale = exp_fast(t.top - best), weight = exp_fast(s - best);
    t.top = best;
    t.sum = t.sum * rescale + weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) t.acc[i] *= rescale;
#pragma unroll
    for (int turn = 0; turn < R::kTurns; ++turn) {
        const int key = turn * R::kTogether + lane / R::kLanes;
        const float w = __shfl_sync(0xffffffffu, weight, key);
        const auto row = load16(v + min(base + key, hi - 1) * ld);  // beyond the last the weight is 0
#pragma unroll
        for (int i = 0; i < 8; ++i) t.acc[i] = fmaf(w, to_float(row.v[i]), t.acc[i]);
    }
}

// What the blocks of a launch share. partial: [slot][head][piece][D + 2]: sums of values, largest score, sum of weights.
struct Out {
    nv_bf16* o;
    std::int64_t ld;
    float* partial;
    int pieces, window;
};

template <int D, class Scores, class P>
__global__ void __launch_bounds__(kThreads) attend_kernel(const P p, const Out out) {
    using R = Rows<D>;
    __shared__ float tops[kWarps], sums[kWarps], parts[kWarps][D];
    const int slot = blockIdx.x / out.pieces, piece = blockIdx.x % out.pieces, head = blockIdx.y;
    const int length = p.length.data[slot];
    if (length < 0) return;
    const Reach range(length, out.window);
    const int lo = range.lo(piece), hi = range.hi(piece);
    if (lo >= hi) return;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

    const Scores scores(p, slot, head, length);
    const nv_bf16* v = nv(p.v.data) + slot * (p.v.rows / p.length.size) * p.v.ld + head * D + lane % R::kLanes * 8;
    Sums t;
    for (int base = piece * kKeys + warp * kWarp; base < hi; base += kThreads)
        if (base + kWarp > lo) add_keys<D>(t, scores, v, p.v.ld, base, lo, hi);
    t.sum = warp_sum(t.sum);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int step = kWarp / 2; step >= R::kLanes; step /= 2)
            t.acc[i] += __shfl_xor_sync(0xffffffffu, t.acc[i], step);
    if (lane == 0) tops[warp] = t.top, sums[warp] = t.sum;
    if (lane < R::kLanes) {
#pragma unroll
        for (int i = 0; i < 8; ++i) parts[warp][lane * 8 + i] = t.acc[i];
    }
    __syncthreads();

    const int column = threadIdx.x;
    if (column >= D) return;
    float best = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) best = fmaxf(best, tops[w]);  // finite: one of the warps has a key
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const float scale = exp_fast(tops[w] - best);  // 0 for a warp without keys
        total = fmaf(scale, sums[w], total);
        value = fmaf(scale, parts[w][column], value);
    }
    if (out.pieces == 1) {
        out.o[slot * out.ld + head * D + column] = from_float<nv_bf16>(value / total);
        return;
    }
    float* partial = out.partial + ((std::int64_t(slot) * gridDim.y + head) * out.pieces + piece) * (D + 2);
    partial[column] = value;
    if (column == 0) partial[D] = best, partial[D + 1] = total;
}

// One block a slot and head, D threads.
template <int D>
__global__ void __launch_bounds__(D) merge_kernel(const std::int32_t* lengths, const Out out) {
    const int slot = blockIdx.x, head = blockIdx.y, column = threadIdx.x, length = lengths[slot];
    if (length < 0) return;
    const Reach range(length, out.window);
    const int first = range.first / kKeys, last = length / kKeys;
    const float* partial = out.partial + (std::int64_t(slot) * gridDim.y + head) * out.pieces * (D + 2);
    float best = -INFINITY, total = 0.f, value = 0.f;
    for (int piece = first; piece <= last; ++piece) best = fmaxf(best, partial[piece * (D + 2) + D]);
    for (int piece = first; piece <= last; ++piece) {
        const float* x = partial + piece * (D + 2);
        const float scale = exp_fast(x[D] - best);
        total = fmaf(scale, x[D + 1], total);
        value = fmaf(scale, x[column], value);
    }
    out.o[slot * out.ld + head * D + column] = from_float<nv_bf16>(value / total);
}

template <int D, class Scores, class P>
void attend(const Cuda& cuda, const P& p) {
    const std::int64_t n = p.length.size, capacity = p.v.rows / n, pieces = slot_pieces(capacity);
    FIEDLER_REQUIRE("slots", pieces == 1 || p.partial.size >= slot_partial_elements(n, capacity, p.heads, D));
    const Out out{nv(p.o.data), p.o.ld, p.partial.data, int(pieces), p.window};
    attend_kernel<D, Scores><<<dim3(unsigned(n * pieces), unsigned(p.heads)), kThreads, 0, stream_of(cuda)>>>(p, out);
    LAUNCH_CHECK("slot_attend");
    if (pieces == 1) return;
    merge_kernel<D><<<dim3(unsigned(n), unsigned(p.heads)), D, 0, stream_of(cuda)>>>(p.length.data, out);
    LAUNCH_CHECK("slot_merge");
}

}  // namespace
}  // namespace slots

void slot_append(const Cuda& cuda, const SlotAppend<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("slots", is_aligned16(p.x) && is_aligned16(p.v) && is_aligned16(p.mixed) && is_aligned16(p.past));
    FIEDLER_REQUIRE("slots", p.v.cols % 8 == 0 && p.mixed.cols % 8 == 0);
    FIEDLER_REQUIRE("slots", is_aligned16(p.w) && is_aligned16(p.w_scalars));
    slots::append_kernel<<<unsigned(p.length.size), slots::kAppendThreads, 0, stream_of(cuda)>>>(p);
    LAUNCH_CHECK("slot_append");
}

void slot_store(const Cuda& cuda, const SlotStore<bf16>& p) {
    check(p);
    slots::scatter(cuda, p.cache, p.rows, p.length, p.cache.rows / p.length.size);
}
void slot_store(const Cuda& cuda, const SlotStore<float>& p) {
    check(p);
    slots::scatter(cuda, p.cache, p.rows, p.length, p.cache.rows / p.length.size);
}
void slot_scatter(const Cuda& cuda, const SlotScatter<bf16>& p) {
    check(p);
    slots::scatter(cuda, p.to, p.rows, p.place, 0);
}
void slot_scatter(const Cuda& cuda, const SlotScatter<float>& p) {
    check(p);
    slots::scatter(cuda, p.to, p.rows, p.place, 0);
}

void slot_attention(const Cuda& cuda, const SlotAttention<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("slots", is_aligned16(p.v));
    FIEDLER_REQUIRE("slots", p.scalars % 4 != 0 || (is_aligned16(p.a) && is_aligned16(p.b)));
    for_head_width("slots", p.v.cols / p.heads,
                   [&](auto width) { slots::attend<decltype(width)::value, slots::ScalarScores>(cuda, p); });
}

void slot_dot(const Cuda& cuda, const SlotDot<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("slots", is_aligned16(p.v) && is_aligned16(p.k) && is_aligned16(p.q));
    for_head_width("slots", p.v.cols / p.heads, [&](auto width) {
        constexpr int D = decltype(width)::value;
        slots::attend<D, slots::DotScores<D>>(cuda, p);
    });
}

void slot_begin(const Cuda& cuda, const SlotBegin& p) {
    check(p);
    slots::begin_kernel<<<1, 1, 0, stream_of(cuda)>>>(p);
    LAUNCH_CHECK("slot_begin");
}

}  // namespace fiedler
