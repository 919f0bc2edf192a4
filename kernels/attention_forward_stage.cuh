// kernels/attention_forward_stage.cuh: what a block of the forward pass of scalar-distance attention shares: references,
// keys, values. A block is one or two groups of four
// warps; a warp owns M x 16 consecutive queries of one head and streams over tiles of 64 keys, latest first.
//
// Weights without a running maximum. A query sees itself, so s_ii = -d_i, d_i = sum_r |a_i^r - b_i^r|, is a lower bound
// of its lse; a weight below exp(-kFaded) of that is nothing. A group fixes one reference for all its weights, E = the
// largest F of its queries and, for R = 1, c = the middle of their scalars, and works with
//   R = 1   p'_ij = min(rho_i u_j, w_j)                      lambda_i = (a_i - c) + (F_i - E)
//           rho_i = exp(-2 (a_i - c)),  u_j = exp((b_j - c) + (E - F_j)),  w_j = exp(-(b_j - c) + (E - F_j))
//   R > 1   p'_ij = exp((E - F_j) - sum_r |a_i^r - b_j^r|)   lambda_i = F_i - E
// so that p_ij = p'_ij exp(lambda_i - lse_i) and lse_i = lambda_i + log sum_j p'_ij. For R = 1 no exponential is left
// per pair, a multiplication and a minimum; u_j and w_j are made once per stage and group, rho_i once.
//
// That is exact in f32 within these bounds, which a group checks before it starts, and those of F_j for each stage
// before it is used; a group out of bounds takes the running maximum from there on:
//   |a_i - c| <= kRange, d_i <= kOwnDistance, F_i and F_j >= E - kGateRange; for R > 1, where scalars are packed
//   (kernels/attention_packed.cuh) within the bounds and taken as they are out of them, |a_i^r|, |b_j^r| <= kPackedRange.
// Too large: p'_ij = exp(-|a_i - b_j| + F_i - F_j - lambda_i) <= exp(kRange + kGateRange) = e^56; a million of them and
//   values of 10^7 still fit into f32, e^88. An infinite u_j or w_j alone is harmless: u_j overflows only if
//   b_j - c > 88 - 32; rho_i >= e^-48 keeps the product large or infinite, w_j < e^-24 is the minimum, as in exact
//   arithmetic; exp_of_sum may give NaN for infinity, which the minimum ignores. rho_i is never 0 or infinite, so that
//   0 inf does not occur.
// Too small: u_j (or w_j) below 2^-126 = e^-87.3 becomes 0, and p'_ij with it. Then (b_j - c) + (E - F_j) < -87.3, so
//   s_ij <= b_j - a_i + F_i - F_j < -87.3 + |a_i - c| + (F_i - E) <= -87.3 + kRange, and s_ij - s_ii < -87.3 + 24 + 37
//   < -kFaded: nothing. The same for w_j by symmetry; for R > 1, s_ij - s_ii < -87.3 + 61 as well.
// Accuracy: u_j and w_j are made to 2 ulp, and lse is put together in double, since E - F_j may be far larger than the
//   difference of two neighbours' F; for R > 1, where p' is an exponential of f32, kGateRange keeps that in bounds.
//   A single key may have nearly all the weight, at any p': so o is divided by the sum of the rounded weights, which
//   makes its output exact; lse is from the sum of the weights as they are.
// NaN in a_i or b_i makes d_i NaN, which is out of bounds, and the running maximum shows it in o and lse. NaN in b_j or
//   F_j makes both factors NaN.
// Columns that a query must not see may have any factor, NaN included: their weights are replaced by 0.
#pragma once
#include <algorithm>

#include "kernels/attention_packed.cuh"
#include "kernels/tuning.h"

namespace fiedler::attention_forward_tile {

using namespace attention_tile;

constexpr int kGroupWarps = 4, kGroupThreads = kGroupWarps * kWarp;
constexpr float kRange = 24.f;  // natural units, see above
template <int R>
constexpr float kOwnDistance = R == 1 ? 37.f : 61.f;
template <int R>
constexpr float kGateRange = R == 1 ? 32.f : 16.f;

// Bytes of V that surely stay in L2: a fifth of that of sm_80, an eighth of sm_89's.
constexpr std::int64_t kResident = 8 << 20;

// Which head and which queries a block takes. Blocks start in the order of their numbers: within a batch of
// (sequence, head) pairs whose V stays in L2 together the longest rows of all come first, so that the last to run are
// short.
struct Order {
    int rows, sequences, length, heads, together;

    // Where blocks do not end with sequences, the flat axis is taken as one sequence.
    static Order of(const Packed& seq, int heads, int rows, int width) {
        Order o{rows, 1, seq.tokens, heads, 1};
        if (seq.length > 0 && seq.length % rows == 0) o.sequences = seq.count, o.length = seq.length;
        const std::int64_t fitting = kResident / (std::int64_t(o.length) * width * 2);
        o.together = static_cast<int>(std::clamp<std::int64_t>(fitting, 1, std::int64_t(o.sequences) * heads));
        return o;
    }
    __host__ __device__ int blocks() const { return ceil_div(length, rows); }  // of one head and sequence
    unsigned grid() const { return static_cast<unsigned>(std::int64_t(sequences) * heads * blocks()); }
    __device__ void place(int block, int& head, int& first) const {
        const int pairs = sequences * heads, batch = block / (together * blocks());
        const int before = batch * together, size = min(together, pairs - before);
        const int rest = block - before * blocks(), pair = before + rest % size;
        head = pair % heads;
        first = pair / heads * length + (blocks() - 1 - rest / size) * rows;
    }
};

// Numbers of the thread. volatile: what follows from them is made again where it is used, since registers are short.
__device__ inline int thread_number() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    __builtin_assume(x >= 0 && x < 1024);
    return x;
}
__device__ inline int lane_number() { return thread_number() & (kWarp - 1); }
__device__ inline int warp_in_block() { return thread_number() >> 5; }
__device__ inline int group_number() { return thread_number() >> 7; }
__device__ inline int thread_in_group() { return thread_number() & (kGroupThreads - 1); }

// As cp_async16 (mma.cuh), at a shared address; src is any address when !valid.
__device__ inline void copy16(std::uint32_t dst, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0));
}
// As ldmatrix_x4_trans (mma.cuh), at a shared address.
__device__ inline void load_transposed(std::uint32_t (&r)[4], std::uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row));
}

// exp(x + y + low) to 2 ulp, low being small: what rounding takes from the sum and from the argument in base 2 is made
// good. 0 for less than -87.3; infinity or NaN for more than 88.7.
__device__ inline float exp_of_sum(float x, float y, float low) {
    constexpr float kLog2eLow = 1.92596299e-8f;  // log2 e - kLog2e
    const float sum = x + y, of_y = sum - x, lost = (x - (sum - of_y)) + (y - of_y) + low;
    const float in_base_2 = sum * kLog2e, power = exp2_fast(in_base_2);
    const float rest = fmaf(lost, kLog2e, fmaf(sum, kLog2eLow, fmaf(sum, kLog2e, -in_base_2)));
    return fmaf(power * kLn2, rest, power);
}

// shift + log total; a large F_i - E and log total may be of opposite signs.
__device__ inline float lse_of(float total, double shift) {
    if (!(total < INFINITY)) return total;  // NaN, and what should not be
    const int bits = __float_as_int(total), exponent = (bits >> 23) - 127;
    const float fraction = __int_as_float((bits & 0x7fffff) | 0x3f800000);
    return static_cast<float>(shift + exponent * 0.6931471805599453 + logf(fraction));
}

template <int D, int R>
struct Shape {
    static constexpr tuning::AttentionForward kTuned = tuning::attention_forward(D, R);
    static constexpr int M = kTuned.row_tiles, kGroups = kTuned.groups;
    static constexpr int kKeys = R == 1 ? kTuned.keys : tuning::attention_forward_keys(kArch, D, R),
                         kHalves = kKeys / kTile;
    static constexpr int kBlockThreads = kGroups * kGroupThreads;
    static constexpr int kWarpQueries = 16 * M, kGroupQueries = kGroupWarps * kWarpQueries;
    static constexpr int kQueries = kGroups * kGroupQueries;
    static constexpr int kParts = R == 1 ? kKeys / kWarp : kGroupWarps;  // of a stage's least gate
    static_assert(R == 1 || kGroups == 1);
};

// What the scores need of a stage's keys. R = 1, for each group: the factors (u, w) or, with the running maximum,
// (b, F); R > 1: packed scalars of keys 2i and 2i + 1, and E - F in base 2 or F.
template <int R, int kGroups, int kKeys>
struct KeyTile {
    alignas(16) std::uint32_t packed[kKeys / 2][R];
    alignas(16) float gate[kKeys];
};
template <int kGroups, int kKeys>
struct KeyTile<1, kGroups, kKeys> {
    alignas(16) float2 pairs[kGroups][kKeys];
    __device__ float4 two(int at) const { return *reinterpret_cast<const float4*>(&pairs[0][0] + at); }
};

// What a warp must know of its queries, in shared memory, since registers are short.
struct alignas(16) View {
    int4 band;           // Band::ends
    int4 block;          // tokens [x, y) that the block sees; its head, its first query
    float centre, gate;  // of its group: c (R = 1), E
    // Largest F_i + d_i of the warp and of the block: keys with F_j beyond that + kFaded are nothing.
    float reach, far_reach;
};

template <int D, int R>
struct Shared {
    using S = Shape<D, R>;
    ValueTile<D> values[2][S::kHalves];  // rows go on from half to half
    KeyTile<R, S::kGroups, S::kKeys> keys[2];
    // Least F of keys that the block sees, in parts; R > 1: -infinity where a scalar is out of range.
    alignas(16) float least_gate[4][S::kParts];
    int extremes[S::kGroups * kGroupWarps][6];  // ordered()
    int2 sight[S::kQueries];                    // columns [x, y) that a query sees
    float rho[S::kQueries];                     // R = 1; at the end, sums of weights
    float gate[S::kQueries];                    // F
    float top[S::kQueries];  // a_i - c (R = 1) or 0: lse without the gate; out of bounds, the running maximum
    float2 raw[R == 1 ? S::kBlockThreads : 1];  // b and F that a thread has asked for, for itself
    View views[S::kGroups * kGroupWarps];
    alignas(16) std::uint32_t packed[R == 1 ? 1 : S::kQueries][R == 1 ? 1 : R / 2];  // a, two scalars each
};

// Fixes the references: fills what is shared of them and of the queries, between barriers. Returns whether the queries
// of the thread's group are within the bounds.
template <int D, int R>
__device__ bool prepare(Shared<D, R>& shared, const AttentionForward<bf16>& p, const Sight& sight, const Band& block,
                        const Band& band, int head, int first) {
    using S = Shape<D, R>;
    const int warp = warp_in_block(), group = group_number(), local = thread_in_group();
    const int group_first = first + group * S::kGroupQueries, token = group_first + local;
    const bool valid = local < S::kGroupQueries && token < p.seq.tokens;
    const float* a = p.a.data + head * p.scalars;
    const float* b = p.b.data + head * p.scalars;
    const float* F = gate_of_head(p, head);

    float own = 0.f, spread = 0.f, x = 0.f;
    const float gate = F != nullptr && valid ? F[token * p.F.ld] : 0.f;
    if constexpr (R == 1) {
        if (valid) {
            x = a[token * p.a.ld];
            own = fabsf(x - b[token * p.b.ld]);
        }
    } else {
        float of_a[R] = {}, of_b[R] = {};
        if (valid) {
            load_numbers(of_a, a + token * p.a.ld, p.scalars, whole_scalars<R>(p.a.data, p.scalars));
            load_numbers(of_b, b + token * p.b.ld, p.scalars, whole_scalars<R>(p.b.data, p.scalars));
        }
#pragma unroll
        for (int r = 0; r < R; r += 2) {
            own += fabsf(of_a[r] - of_b[r]);
            own += fabsf(of_a[r + 1] - of_b[r + 1]);
            spread = fmaxf(spread, fmaxf(fabsf(of_a[r]), fabsf(of_a[r + 1])));
            if (local < S::kGroupQueries)
                shared.packed[local][r / 2] = pack_half(packed_number(of_a[r]), packed_number(of_a[r + 1]));
        }
    }
    const float high = R == 1 ? x : spread;
    const float of_lane[6] = {high, -x, gate, -gate, own, gate + own};
#pragma unroll
    for (int i = 0; i < 6; ++i)  // the same number from every lane
        shared.extremes[warp][i] = largest_of_warp(valid ? of_lane[i] : -INFINITY);
    __syncthreads();
    const auto most_of = [&](int i, int from, int warps) {
        int most = shared.extremes[from][i];
        for (int w = 1; w < warps; ++w) most = max(most, shared.extremes[from + w][i]);
        return from_ordered(most);
    };
    float most[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) most[i] = most_of(i, group * kGroupWarps, kGroupWarps);
    const float centre = R == 1 ? 0.5f * (most[0] - most[1]) : 0.f, range = R == 1 ? most[0] - centre : most[0];
    const bool bounded =
        range <= (R == 1 ? kRange : kPackedRange) && most[4] <= kOwnDistance<R> && most[2] + most[3] <= kGateRange<R>;
    if (local < S::kGroupQueries) {
        const int at = group * S::kGroupQueries + local;
        const float apart = R == 1 ? x - centre : 0.f;
        shared.sight[at] = valid ? int2{sight.lo(token), sight.hi(token)} : int2{0, 0};
        shared.gate[at] = gate;
        shared.rho[at] = expf(-2.f * apart);
        shared.top[at] = bounded ? apart : -INFINITY;
    }
    if (R == 1 && F == nullptr && threadIdx.x < sizeof(shared.least_gate) / sizeof(float))
        (&shared.least_gate[0][0])[threadIdx.x] = 0.f;
    __syncthreads();
    // A warp of the block has read the queries that are its own where M = 2, all of the group's otherwise.
    const float reach = S::M == 2 ? most_of(5, warp, 1) : most_of(5, group * kGroupWarps, kGroupWarps);
    if (lane_number() == 0)
        shared.views[warp] = {band.ends(), {block.lo, block.hi, head, first},      centre, most[2],
                              reach,       most_of(5, 0, S::kGroups * kGroupWarps)};
    __syncwarp();
    return bounded;
}

// Keys on their way, what a thread has read of the stage after next. R > 1: up to four scalars of a key, and F, in
// registers; R = 1: b and F of one key, in shared memory (Shared::raw), since registers are short.
template <int R, int kKeys>
struct Raw {
    static constexpr int kOfKey = R < 4 ? R : 4, kItems = std::max(kKeys * R / kOfKey / kGroupThreads, 1);
    float b[kItems][kOfKey], F;
};
template <int kKeys>
struct Raw<1, kKeys> {};

// A thread's part in bringing stages of keys and values into shared memory. column: token of a stage's first key.
template <int D, int R>
struct Loader {
    using S = Shape<D, R>;
    static constexpr int kParts = D / 8,
                         kStep = S::kBlockThreads / kParts;  // of values: 16 bytes of every kStep-th row
    const AttentionForward<bf16>& p;
    Shared<D, R>& shared;

    __device__ bool gated() const { return p.F.data != nullptr; }
    using Raw = attention_forward_tile::Raw<R, S::kKeys>;
    static __device__ bool reads() { return R > 1 || thread_in_group() < S::kKeys; }
    // R > 1: the keys and first scalars of the thread's items, of which there may be fewer than threads.
    static constexpr int kFours = R < 4 ? 1 : R / 4;  // of a key, of scalars
    static __device__ int key_of(int i) { return (thread_in_group() + i * kGroupThreads) / kFours; }
    static __device__ int scalar() { return thread_in_group() % kFours * 4; }
    static __device__ bool has(int i) { return S::kKeys * kFours >= kGroupThreads || key_of(i) < S::kKeys; }

    // Asks for keys, from global memory; the block sees [lo, hi). R > 1: others have the scalars of the nearest that it
    // sees.
    __device__ void read(Raw& raw, int column, int head, int lo, int hi) const {
        if (!reads()) return;
        const int local = thread_in_group(), b_ld = static_cast<int>(p.b.ld), F_ld = static_cast<int>(p.F.ld);
        const float* b = p.b.data + head * p.scalars;
        if constexpr (R == 1) {
            const int token = column + local;
            const bool seen = token >= lo && token < hi;
            float2& to = shared.raw[thread_number()];
            asm volatile("" ::: "memory");  // what was there has been read
            cp_async4(&to.x, b + (seen ? std::int64_t(token) * b_ld : 0), seen);
            if (gated()) cp_async4(&to.y, p.F.data + (seen ? std::int64_t(token) * F_ld + head : 0), seen);
        } else {
            const auto nearest = [&](int key) { return std::int64_t(min(max(column + key, lo), hi - 1)); };
            raw.F = gated() ? p.F.data[nearest(local % S::kKeys) * F_ld + head] : 0.f;
            const bool whole = whole_scalars<R>(p.b.data, p.scalars);
#pragma unroll
            for (int i = 0; i < Raw::kItems; ++i)
                if (has(i))
                    load_numbers(raw.b[i], b + nearest(key_of(i)) * b_ld + scalar(), p.scalars - scalar(), whole);
        }
    }
    // F of the thread's key, which has been asked for. Keys that no query of the block sees have F = infinity: their
    // weights are 0, and they do not count as least.
    __device__ float gate(const Raw& raw, int column, int lo, int hi) const {
        const int token = column + thread_in_group() % S::kKeys;
        if (token < lo || token >= hi) return INFINITY;
        if constexpr (R > 1)
            return raw.F;
        else
            return gated() ? shared.raw[thread_number()].y : 0.f;
    }
    __device__ void note_least(float* least, const Raw& raw, float F) const {
        if constexpr (R == 1) {
            if (gated() && thread_number() < S::kKeys) least[warp_in_block()] = from_ordered(least_of_warp(F));
        } else {
            bool in_range = true;
#pragma unroll
            for (int i = 0; i < Raw::kItems; ++i)
#pragma unroll
                for (int r = 0; r < Raw::kOfKey; ++r) in_range &= packs(raw.b[i][r]);
            least[warp_in_block()] = from_ordered(least_of_warp(in_range || !has(0) ? F : -INFINITY));
        }
    }
    // bounded: as factors, or in base 2 relative to the reference.
    __device__ void keys(int stage, const Raw& raw, float F, float centre, float gate, bool bounded) const {
        if (!reads()) return;
        const int local = thread_in_group();
        if constexpr (R == 1) {
            float2 pair = {shared.raw[thread_number()].x, F};
            if (bounded) {
                const float apart = pair.x - centre, above = gate - F, low = gate - (above + F);
                pair = {exp_of_sum(above, apart, low), exp_of_sum(above, -apart, low)};
                if (F == INFINITY) pair = {0.f, 0.f};
            }
            shared.keys[stage].pairs[group_number()][local] = pair;
        } else {
            auto& tile = shared.keys[stage];
#pragma unroll
            for (int i = 0; i < Raw::kItems; ++i) {
                if (!has(i)) continue;
                const int key = key_of(i);
                if (bounded) {
                    __half* to = reinterpret_cast<__half*>(tile.packed[key / 2] + scalar()) + key % 2;
#pragma unroll
                    for (int r = 0; r < Raw::kOfKey; ++r) to[2 * r] = __float2half_rn(packed_number(raw.b[i][r]));
                }
            }
            if (local < S::kKeys) tile.gate[local] = bounded ? (gate - F) * kLog2e : F;
        }
    }
    __device__ void values(int stage, int column, int head) const {
        constexpr int kRowBytes = ValueTile<D>::kStride * 2;
        const int row = thread_number() / kParts, part = thread_number() % kParts * 8, ld = static_cast<int>(p.v.ld);
        const nv_bf16* from = nv(p.v.data) + std::int64_t(column + row) * ld + (head * D + part);
        std::uint32_t to = shared_address(shared.values[stage][0].data) + row * kRowBytes + part * 2;
        int left = p.seq.tokens - column - row;  // rows from here to the end
#pragma unroll(R == 1 ? 1 : 4)
        for (int i = 0; i < S::kKeys / kStep; ++i, to += kStep * kRowBytes, from += kStep * ld, left -= kStep)
            copy16(to, from, left > 0);
    }
};

}  // namespace fiedler::attention_forward_tile
