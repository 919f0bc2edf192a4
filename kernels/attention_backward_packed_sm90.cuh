// kernels/attention_backward_packed_sm90.cuh: the backward pass of scalar-distance attention with several scalars for sm_90a:
// what a block keeps, and the arithmetic of a tile (the kernel is in attention_backward_packed_sm90.cu).
//
// A block is one warpgroup. It owns a tile of 64 keys, the columns, and streams tiles of 64 queries, the rows:
//     dP = dO V'        [64, 64]  A: dO, rows of D; B: V, rows of D (both as they lie in memory)
//     dv' += dO' P      [64, 64]  A: dO turned, B: P turned, rows of 64 queries (P is turned on its way from registers)
// A thread holds rows g and g + 8 of its warp's 16 and, of each 8 columns, 2t and 2t + 1. Differences d = b - a are pairs of
// f16 (kernels/attention_packed.cuh), of two keys. 2^-71 ds, rounded to bf16 once for all of its sums, gets the signs,
//     X_r = sign(d_r) 2^-71 ds                                               exact, and 0 at a tie
// in one instruction: the smaller of both sizes with the product of the signs, d read as bf16, as which it is larger than any
// 2^-71 ds unless it is 0 (see kUnit).
// Of rows g (or g + 8), four scalars r and 8 columns {X_r, X_r+2, X_r+1, X_r+3} are an A operand of a warp, 16 x 16. Its
// product with ones in one column for the first eight of the inner dimension and in the next one for the others is the sum
// along rows, da. Z = X of rows g + X of rows g + 8, rounded to bf16, turned, 8 x 8 each, and times the same ones is that
// along columns, db. So sums take no exchange between lanes, and db four registers for 16 keys and all scalars.
//
// Shared memory is what an H200 is busiest with here (loads, movmatrix and the products' operands): operands that are
// constants stay in registers. Products' operands are named through hopper::uniform, which makes ptxas compute them once for
// the warp.
#pragma once
#include "kernels/attention_backward_tile_sm90.cuh"
#include "kernels/attention_packed.cuh"

namespace fiedler::attention_backward_packed_sm90_tile {

using namespace attention_tile;
using attention_backward_sm90_tile::first_row;
using attention_backward_sm90_tile::groups_of;
using attention_backward_sm90_tile::kTileElements;
using attention_backward_sm90_tile::kWidth;
using attention_backward_sm90_tile::multiply_turned;
using attention_backward_sm90_tile::place_of_turned;
using attention_backward_sm90_tile::Range;
using attention_backward_sm90_tile::store_turned;
using namespace warpgroup_tile;

constexpr int kKeys = tuning::attention_backward_sm90().keys, kBlocks = tuning::attention_backward_sm90().blocks;
constexpr int kEights = kKeys / 8, kWarps = kThreads / kWarp;
constexpr int kPlaces = 3;  // of tiles of queries in shared memory

// ---- shared memory -----------------------------------------------------------------------------------------------
// What is needed of 64 queries beside dO, and of the keys beside V; as they lie at the begin of AttentionBackward::partial,
// [heads][tiles] each.
struct alignas(16) QueryNumbers {
    float lse, minus_delta, gate;  // minus_delta: in units of ds, see kDsUnit
    float
        top;  // the largest gate - lse of the tile; infinite: a scalar, dO or delta is out of range, or a number is none
};
template <int R>
struct alignas(128) OfQueries {
    QueryNumbers numbers[kTile];
    std::uint32_t a[kTile][R / 2];  // packed, two scalars each
};
template <int R>
struct alignas(16) KeyPair {
    std::uint32_t b[R];  // packed, of two keys
    float2 gate;         // F_j - G in base 2, G the gate of the tile's middle key
};
template <int R>
struct alignas(256) OfKeys {
    KeyPair<R> pairs[kEights][4];  // of each eight and each t: keys 2t and 2t + 1
    float centre;                  // G
    float faded;                   // below this, the gate alone makes a query's weights nothing; -infinite: as top
    float none[2];
};
template <int R>
constexpr int kNumbersOfToken = (sizeof(OfQueries<R>) / kTile + sizeof(OfKeys<R>) / kKeys) / sizeof(float);
static_assert(kNumbersOfToken<8> == attention_numbers_of_token(8) &&
              kNumbersOfToken<4> == attention_numbers_of_token(4) &&
              kNumbersOfToken<2> == attention_numbers_of_token(2));

// Scalars are in units of 2^-8: so the bits of |d| > 0, read as bf16, are those of 2^-47 or a larger number, and finite,
// and the sum of two |d| is still finite in f16. ds is in units of 2^71, of which it is to have at most 2^-47: |ds| <= 2^24,
// which bounds of |dO|, of |V| and, since V of other tiles is in it, of |delta| make certain. Tiles with larger ones go the
// way of those with scalars out of range. What is below 2^-55 loses digits.
constexpr float kUnit = 256.f, kDsUnit = 0x1p-71f;
constexpr float kGradientRange = 32.f, kValueRange = 512.f, kDeltaRange = 0x1p20f;
constexpr float kLargestWeight = 8.f;    // scores of either pass are off by 0.75 at most (attention.h)
constexpr unsigned kOne = 0x6300;        // in units of ds, as bf16: 2^71
constexpr unsigned kMinusUnit = 0x9c00;  // -2^-8 as f16
static_assert((kGradientRange * kValueRange * kWidth + kDeltaRange) * kLargestWeight <= 0x1p24f);
static_assert(2 * 2 * (kPackedRange * kLog2e + 0x1p-4f) * kUnit < 65504.f);

// A lane's part of operands that are constants.
struct OfLane {
    std::uint32_t high[2];  // upper bytes of kOne: byte i of high[k] is column 4k + i's
    uint2 diagonal;         // B operand of packed_scores
    OfLane() = default;
    // As OfThread keeps it.
    __device__ explicit OfLane(const uint4& x) : high{x.x, x.y}, diagonal{x.z, x.w} {}
    __device__ void make(unsigned lane) {
        const unsigned column = lane / 4, shift = column % 4 * 8;
#pragma unroll
        for (unsigned k = 0; k < 2; ++k) {
            const bool own = column / 4 == k;
            high[k] = own ? kOne >> 8 << shift : 0u;
        }
        diagonal = minus_diagonals();
        const auto in_units = [](std::uint32_t x) {
            return (x & 0xffffu ? kMinusUnit : 0u) | (x >> 16 ? kMinusUnit << 16 : 0u);
        };
        diagonal = {in_units(diagonal.x), in_units(diagonal.y)};
    }
    // B operand of 8 of the inner dimension: ones in a column. Of 16: in columns p and q for the first and second eight.
    __device__ std::uint32_t ones(int column) const {
        static_assert(kOne % 256 == 0);
        return __byte_perm(high[column / 4], 0u, column % 4 * 0x1010 | 0x0404);
    }
    __device__ uint2 ones(int p, int q) const { return {ones(p), ones(q)}; }
};
__device__ inline float number_in_units(float x) { return packed_number(x) * kUnit; }
// The largest size of eight bf16.
__device__ inline float largest_of(const Pack<nv_bf16>& x) {
    const auto sizes = [&](int i) { return __habs2(__nv_bfloat162(x.v[i], x.v[i + 1])); };
    const __nv_bfloat162 most = __hmax2(__hmax2(sizes(0), sizes(2)), __hmax2(sizes(4), sizes(6)));
    return fmaxf(__low2float(most), __high2float(most));
}
// Where the lane's sums da go, among those of the tile's rows: its row, and four scalars (two of R = 2) from one on. Lanes t
// with more than R have none.
template <int R>
__device__ int sums_place(unsigned thread) {
    const unsigned t = thread % 4;
    return static_cast<int>((first_row(thread) + t / 2 * 8) * R + t % 2 * 4);
}
// What follows from a thread's number alone and would take many instructions each round.
struct OfThread {
    uint4 of_lane[kThreads];  // OfLane
    uint4 places[kThreads];   // its first row, sums_place(), address of its place in the first turned weights
    template <int R>
    __device__ void make(unsigned thread, std::uint32_t weights) {
        OfLane x;
        x.make(thread % kWarp);
        of_lane[thread] = {x.high[0], x.high[1], x.diagonal.x, x.diagonal.y};
        places[thread] = {first_row(thread), static_cast<unsigned>(sums_place<R>(thread)),
                          weights + place_of_turned(thread), 0u};
    }
};
// What follows from the number of a round modulo 6: places are taken in turn, three of tiles of queries, two of weights.
constexpr int kRoundNumbers = 2 * kPlaces;
struct alignas(16) OfRound {
    std::uint32_t before, weights;  // operands of the product dv of the round before
    std::uint32_t place, buffer;    // bytes to its queries, and to its weights
    std::uint32_t gradients;        // operand: its dO
    std::uint32_t full, parity;     // address of its barrier, and what to wait for
    std::uint32_t after;            // address of the next round's OfRound
};
template <int R>
struct Shared {
    using Parts = float4[kThreads / 2];         // of a quad of sums, those of two lanes of each four
    nv_bf16 gradients[kPlaces][kTileElements];  // dO; tiles at multiples of 1024 bytes
    nv_bf16 values[2][kKeys * kWidth];          // V, also of the next keys
    nv_bf16 weights[2][kKeys * kTile];          // turned; at the end db's Parts, and dv
    float dF[kWarps][kKeys];
    OfQueries<R> queries[kPlaces];
    OfKeys<R> keys[2];
    alignas(16) float* slab;  // of the head; one load brings all three
    int written;              // tiles of queries that have sums there
    std::uint32_t of_values;  // operand: V of the keys
    // What is to be loaded next: a tile of queries, which begins at token `row` of those up to `end` that see the keys from
    // `first` on, which lie at `keys`; of such tiles of keys `left` are left; begins: with this one's own.
    struct alignas(16) Next {
        const OfQueries<R>* queries;  // of the tile
        int row, column;              // column: of the head in dO and V
        int first, left, end;
        short keys;
        bool begins;
    } next;
    OfThread threads;
    OfRound rounds[kRoundNumbers];
    hopper::Barrier full[kPlaces];  // dO and OfQueries are there, and V and OfKeys with the first of these for them

    __device__ Parts* db() { return reinterpret_cast<Parts*>(weights[0]); }
    static_assert(sizeof(Parts) * kEights <= kKeys * kTile * 2);
};

// ---- operands ----------------------------------------------------------------------------------------------------
// Rows and columns change places in 8 x 8; in each of the four of an A operand.
__device__ inline void turn(std::uint32_t& x) { asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;\n" : "+r"(x)); }
__device__ inline void turn(std::uint32_t (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) turn(x[i]);
}
// sign(d) ds, see kUnit; NaN where ds is.
__device__ inline std::uint32_t with_sign(std::uint32_t ds, std::uint32_t d) {
    std::uint32_t x;
    asm("min.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(x) : "r"(ds), "r"(d));
    return x;
}
__device__ inline std::uint32_t add_bf16(std::uint32_t x, std::uint32_t y) {
    std::uint32_t z;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
// OfLane::ones, where it need not be fast.
__device__ inline std::uint32_t ones_in(unsigned column) {
    return threadIdx.x % kWarp / 4 == column ? kOne << 16 | kOne : 0u;
}

// ---- a thread's part of the tile ---------------------------------------------------------------------------------
template <int R>
struct Keys {
    static constexpr int P = R / 2;  // pairs of scalars
    float dv[kKeys / 2] = {};
    // db: rows are keys of an eight, first of scalars 4q and 4q + 1, which are columns 2q and 2q + 1, then of the two after
    // these; of the second of two eights, columns are 4 further on. R = 2: of the first scalar, then the second, column 0 or
    // 4. dF: rows are keys of two eights, of which those of m are in columns 2m (queries of rows g) and 2m + 1 (g + 8).
    float db[kEights / 2][4] = {}, dF[4] = {};

    // What a thread's two rows need of a tile of queries.
    struct Rows {
        float base[2], minus_delta[2];  // relative to G in base 2; as QueryNumbers has it
        float top;                      // the largest base of the tile, above `faded`
        __device__ Rows(const OfKeys<R>& keys, const OfQueries<R>& of, int row) {
            const float centre = keys.centre;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const QueryNumbers x = of.numbers[row + 8 * k];
                base[k] = ((x.gate - centre) - x.lse) * kLog2e, minus_delta[k] = x.minus_delta;
                top = (x.top - centre) * kLog2e - keys.faded;
            }
        }
        // The same for the block. Not a tile as most: far, or its weights are nothing.
        __device__ bool rare() const { return !(top >= 0.f && top < INFINITY); }
        __device__ bool far() const { return !(top < 0.f); }
    };
    using Products = float[kKeys / 2];  // dP of a tile

    // dP of the thread's rows, of which `row` is the first, to weights and into all sums. to: the lane's place in the turned
    // weights; da: see sums_place. kMasked: row i sees keys up to i + shift;
    // otherwise all: kKeys, in a form that the compiler does not know. The scores of an eight are made before the sums
    // of the one before, which hides how long they take.
    template <bool kMasked>
    __device__ void add(float (&da)[4], const Products& dp, const OfLane& of_lane, const OfKeys<R>& keys,
                        const OfQueries<R>& queries, std::uint32_t to, int row, int shift, const Rows& rows, int all) {
        const int t = static_cast<int>(thread_anew() % 4), last = row + shift - 2 * t;
        int seen = kMasked ? shift + 16 + (row & 48) : all;
        if (kMasked) asm volatile("" : "+r"(seen));
        Scores x[2];
        std::uint32_t weights[2][2], ds[4];
        score<kMasked>(x[0], of_lane, keys, queries, row, rows, t, 0, last);
#pragma unroll
        for (int eight = 0; eight < kEights; ++eight) {
            // Also, where it never is so: what the compiler may not mix, for want of registers.
            if (eight % 2 == 0 && 8 * eight >= seen) {
#pragma unroll 1
                for (int i = eight; i < kEights; i += 2) store_turned(to + i * 8 * kRowBytes, 0u, 0u, 0u, 0u);
                return;
            }
            const int n = eight % 2;
            if (eight + 1 < kEights) score<kMasked>(x[1 - n], of_lane, keys, queries, row, rows, t, eight + 1, last);
            std::uint32_t own[2];
            weigh(weights[n], own, x[n].s, reinterpret_cast<const float(&)[4]>(dp[4 * eight]), rows);
            if (n == 1)
                store_turned(to + (eight - 1) * 8 * kRowBytes, weights[0][0], weights[0][1], weights[1][0],
                             weights[1][1]);
            add_signed(da, of_lane, eight, own, x[n].d);
            ds[n] = own[0], ds[2 + n] = own[1];
            if (n == 1) {
                turn(ds);
                const uint2 ones = of_lane.ones(eight - 1, eight);
                mma_bf16(dF, ds, ones.x, ones.y);
            }
        }
    }
    // The same where a scalar is out of range: scores and signs from differences in f32 of what lies in global memory.
    // query, key: the first of the tiles.
    __device__ void add_far(float (&da)[4], const Products& dp, const AttentionBackward<bf16>& p, const OfKeys<R>& keys,
                            std::uint32_t to, int head, int query, int key, int row, int shift, const Rows& rows) {
        const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll 1
        for (int m = 0; m < kEights / 2; ++m) {
            std::uint32_t packed[2][2], ds[4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int eight = 2 * m + n;
                const FarDifferences d{p, head, query + row, key + 8 * eight + 2 * t};
                float s[4] = {}, c[4];
                float of_eight[4] = {};
                bases<true>(c, keys.pairs[eight][t].gate, rows, eight, row + shift - 2 * t);
#pragma unroll 1
                for (int r = 0; r < p.scalars; ++r)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[e] += fabsf(d(e, r));
#pragma unroll
                for (int e = 0; e < 4; ++e) s[e] = fmaf(s[e], -kLog2e, c[e]);
#pragma unroll
                for (int i = 0; i < kEights; ++i)
                    if (i == eight)
#pragma unroll
                        for (int e = 0; e < 4; ++e) of_eight[e] = dp[4 * i + e];
                std::uint32_t own[2];
                weigh(packed[n], own, s, of_eight, rows);
                add_far_signed(da, eight, own, d);
#pragma unroll
                for (int k = 0; k < 2; ++k) ds[2 * k + n] = own[k];
            }
            turn(ds);
            mma_bf16(dF, ds, ones_in(2 * m), ones_in(2 * m + 1));
            store_turned(to + m * 16 * kRowBytes, packed[0][0], packed[0][1], packed[1][0], packed[1][1]);
        }
    }
    // The same where the gate alone makes all weights nothing.
    __device__ static void add_nothing(std::uint32_t to) {
#pragma unroll
        for (int m = 0; m < kEights / 2; ++m) store_turned(to + m * 16 * kRowBytes, 0u, 0u, 0u, 0u);
    }

    // dv, db, dF. All products of the warp are over.
    __device__ void store(const AttentionBackward<bf16>& p, const CUtensorMap* results, Shared<R>& shared, int head,
                          int first) {
        const int thread = thread_anew();
        __syncthreads();
        const std::uint32_t to = shared_address(shared.weights[1]) + place_of_turned(thread);
#pragma unroll
        for (int m = 0; m < kEights / 2; ++m) {
            const auto pack = [&](int i) { return pack_bf16(dv[8 * m + i], dv[8 * m + i + 1]); };
            store_turned(to + m * 16 * kRowBytes, pack(0), pack(2), pack(4), pack(6));
        }
        auto* const parts = shared.db();
        const int place = thread / 4 * 2 + thread % 2, odd = thread % 4 / 2;
#pragma unroll
        for (int m = 0; m < kEights / 2; ++m)
            parts[2 * m + odd][place] = make_float4(db[m][0], db[m][1], db[m][2], db[m][3]);
#pragma unroll
        for (int n = 0; n < 2; ++n)
            shared.dF[thread / kWarp][thread % 4 * 16 + n * 8 + thread % kWarp / 4] = dF[2 * n] + dF[2 * n + 1];
        hopper::publish_shared();
        __syncthreads();
        if (thread == 0) hopper::store_box(results, head * kWidth, first, shared.weights[1]);
        // The sum over the warps of a number in row `half` of a quad.
        const auto sum = [&](const float4* quad, int key, int half, int column) {
            const float* from = reinterpret_cast<const float*>(quad + key % 8 * 2 + column / 2) + half * 2 + column % 2;
            float x = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) x += from[w * (kWarp / 2) * 4];
            return x;
        };
        for (int i = thread; i < kKeys * R; i += kThreads) {
            const int key = i / R, r = i % R;
            if (r < p.scalars)
                p.db.data[(std::int64_t(first + key) * p.heads + head) * p.scalars + r] =
                    -sum(parts[key / 8], key, R == 2 ? r : r / 2 % 2, R == 2 ? 0 : r / 4 * 2 + r % 2);
        }
        if (p.dF.data != nullptr && thread < kKeys) {
            float x = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) x += shared.dF[w][thread];
            p.dF.data[std::int64_t(first + thread) * p.heads + head] = -x;
        }
        if (thread == 0) hopper::store_wait();
        __syncthreads();
    }

    __device__ static bool has_sums() { return R == 8 || static_cast<unsigned>(thread_anew()) % 2 == 0; }

  private:
    // Of an eight: differences, and scores of its keys.
    struct Scores {
        std::uint32_t d[2][R];
        float s[4];  // as in C's layout
    };
    template <bool kMasked>
    __device__ static void score(Scores& x, const OfLane& of_lane, const OfKeys<R>& keys, const OfQueries<R>& queries,
                                 int row, const Rows& rows, int t, int eight, int last) {
        std::uint32_t y[R], a[2][P];
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int p = 0; p < P; ++p) a[k][p] = queries.a[row + 8 * k][p];
#pragma unroll
        for (int r = 0; r < R; ++r) y[r] = keys.pairs[eight][t].b[r];
#pragma unroll
        for (int k = 0; k < 2; ++k) packed_differences<R>(x.d[k], y, a[k]);
        float c[4];
        bases<kMasked>(c, keys.pairs[eight][t].gate, rows, eight, last);
        packed_scores<R, true>(x.s, x.d, c, of_lane.diagonal);
    }
    // last: of the thread's columns, less 2t, that its first row sees.
    template <bool kMasked>
    __device__ static void bases(float (&c)[4], const float2& gate, const Rows& rows, int eight, int last) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            c[e] = rows.base[e / 2] - (e % 2 ? gate.y : gate.x);
            if (kMasked && last < 8 * eight + e % 2 - e / 2 * 8) c[e] = -INFINITY;
        }
    }
    // Scores to weights, and dP to ds in its units.
    __device__ static void weigh(std::uint32_t (&packed)[2], std::uint32_t (&ds)[2], float (&s)[4], const float (&x)[4],
                                 const Rows& rows) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = exp2_fast(s[e]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            packed[k] = pack_bf16(s[2 * k], s[2 * k + 1]);
            const auto apart = [&](int e) { return fmaf(x[e], kDsUnit, rows.minus_delta[k]); };
            ds[k] = pack_bf16(s[2 * k] * apart(2 * k), s[2 * k + 1] * apart(2 * k + 1));
        }
    }
    __device__ void add_signed(float (&da)[4], const OfLane& of_lane, int eight, const std::uint32_t (&ds)[2],
                               const std::uint32_t (&d)[2][R]) {
        const auto signed_ds = [&](int k, int r) { return with_sign(ds[k], d[k][r]); };
        const int n = eight % 2;
        if constexpr (R == 2) {  // both rows in one operand
            const std::uint32_t x[4] = {signed_ds(0, 0), signed_ds(0, 1), signed_ds(1, 0), signed_ds(1, 1)};
            const uint2 ones = of_lane.ones(0, 4);
            mma_bf16(da, x, ones.x, ones.y);
            std::uint32_t z[4] = {add_bf16(x[0], x[2]), add_bf16(x[1], x[3]), 0u, 0u};
            turn(z[0]), turn(z[1]);
            mma_bf16(db[eight / 2], z, n ? ones.y : ones.x, 0u);
        } else {
#pragma unroll
            for (int q = 0; q < R / 4; ++q) {
                std::uint32_t x[2][4], z[4];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) x[k][i] = signed_ds(k, 4 * q + i / 2 + i % 2 * 2);
                    const uint2 ones = of_lane.ones(4 * k + 2 * q, 4 * k + 2 * q + 1);
                    mma_bf16(da, x[k], ones.x, ones.y);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) z[i] = add_bf16(x[0][i], x[1][i]);
                turn(z);
                const uint2 ones = of_lane.ones(4 * n + 2 * q, 4 * n + 2 * q + 1);
                mma_bf16(db[eight / 2], z, ones.x, ones.y);
            }
        }
    }
    // b - a of a thread's rows and two columns, in f32. e: as in C's layout.
    struct FarDifferences {
        const AttentionBackward<bf16>& p;
        int head, query, key;
        __device__ float operator()(int e, int r) const {
            if (r >= p.scalars) return 0.f;
            const auto at = [&](const float* x, int token) {
                return x[(std::int64_t(token) * p.heads + head) * p.scalars + r];
            };
            return at(p.b.data, key + e % 2) - at(p.a.data, query + e / 2 * 8);
        }
        __device__ float sign(int e, int r) const {
            const float d = (*this)(e, r);
            return d > 0.f ? 1.f : d < 0.f ? -1.f : 0.f;
        }
    };
    __device__ static void add_to(float (&sums)[4], const float (&x)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[e] += x[e];
    }
    __device__ void add_far_signed(float (&da)[4], int eight, const std::uint32_t (&ds)[2], const FarDifferences& d) {
#pragma unroll 1
        for (int p = 0; p < P; ++p) {
            std::uint32_t x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int r = R == 2 ? e % 2 : p / 2 * 4 + p % 2 + e % 2 * 2, of = e / 2 * 2;
                x[e] = fma_bf16(ds[e / 2], pack_bf16(d.sign(of, r), d.sign(of + 1, r)), 0x80008000u);
            }
            mma_bf16(da, x, ones_in(p), ones_in(p + 4));
            turn(x);
            float sum[4] = {};
            const std::uint32_t ones = ones_in(p + eight % 2 * 4);
            mma_bf16(sum, x, ones, ones);
            int of = eight / 2;
            asm volatile("" : "+r"(of));  // or registers are told apart by a number, which takes memory
#pragma unroll
            for (int m = 0; m < kEights / 2; ++m)
                if (m == of) add_to(db[m], sum);
        }
    }
};

}  // namespace fiedler::attention_backward_packed_sm90_tile
