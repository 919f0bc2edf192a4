// kernels/attention_backward_packed_sm90.cuh: the backward pass of scalar-distance attention with several scalars for sm_90a:
// what a block keeps, and the arithmetic of a tile (the kernel is in attention_backward_packed_sm90.cu).
//
// A block is one warpgroup. It owns a tile of 64 keys, the columns, and streams tiles of 64 queries, the rows:
//     dP = dO V'        [64, 64]  A: dO, rows of D; B: V, rows of D (both as they lie in memory)
//     dv' += dO' P      [64, 64]  A: dO turned, B: P turned, rows of 64 queries (P is turned on its way from registers)
// A thread holds rows g and g + 8 of its warp's 16 and, of each 8 columns, 2t and 2t + 1. Differences d = b - a are pairs of
// f16 (kernels/attention_packed.cuh), of two keys. -ds, rounded to bf16 once for all of its sums, is multiplied by the signs,
//     step = sat(2^15 d + 15/16), read as bf16: 0, 2^-8 (d = 0) or 2^-7, since the least |d| is 2^-13
//     X_r = (-256 (-ds)) step + (-ds) = sign(d_r) ds                         exact, and 0 at a tie
// Of pair p of scalars, r = 2p and r + 1, and 8 columns
//     {X_r of rows g, X_r+1 of rows g, X_r of rows g + 8, X_r+1 of rows g + 8}
// are an A operand of a warp, 16 x 16. Its product with ones in column p (of the first eight of the inner dimension) and
// p + 4 (of the others) is the sum along rows, da; turned, 8 x 8 each, and times the same ones it is that along columns, db.
// So sums take no exchange between lanes, and db four registers for eight keys and all scalars.
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
    float lse, delta, gate;
    float far;  // not 0: a scalar is out of range
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
    float centre, faded;           // G; below this, the gate alone makes a query's weights nothing for the keys
    float far;                     // as that of queries
    float none;
};
template <int R>
constexpr int kNumbersOfToken = (sizeof(OfQueries<R>) / kTile + sizeof(OfKeys<R>) / kKeys) / sizeof(float);
static_assert(kNumbersOfToken<8> == attention_numbers_of_token(8) &&
              kNumbersOfToken<4> == attention_numbers_of_token(4) &&
              kNumbersOfToken<2> == attention_numbers_of_token(2));

// B operands: ones in columns p and p + 4, and that of packed_scores.
struct OfLane {
    uint2 ones[4], diagonal;
    __device__ void make(int lane) {
#pragma unroll
        for (int p = 0; p < 4; ++p) ones[p] = {lane / 4 == p ? 0x3f803f80u : 0u, lane / 4 == p + 4 ? 0x3f803f80u : 0u};
        diagonal = minus_diagonals();
    }
};
template <int R>
struct Shared {
    using Parts = float4[kThreads / 2];         // of a quad of sums, those of two lanes of each four
    nv_bf16 gradients[kPlaces][kTileElements];  // dO; tiles at multiples of 1024 bytes
    nv_bf16 values[2][kKeys * kWidth];          // V, also of the next keys
    nv_bf16 weights[2][kKeys * kTile];          // turned; at the end db's Parts, and dv
    Parts dF;
    OfQueries<R> queries[kPlaces];
    OfKeys<R> keys[2];
    float* slab;  // of the head
    int written;  // tiles of queries that have sums there
    // What is to be loaded next: the queries of tile `query`, up to `end`, for the keys from `first` on, which lie at `keys`;
    // of these `left` tiles are left; begins: with this one's own.
    struct {
        int first, left, query, end, keys, head;
        bool begins;
    } next;
    OfLane lanes[kWarp];
    float4 left[kThreads];          // see Rounds::ask_for_sums
    hopper::Barrier full[kPlaces];  // dO and OfQueries are there, and V and OfKeys with the first of these for them

    __device__ Parts* db() { return reinterpret_cast<Parts*>(weights[0]); }
    static_assert(sizeof(Parts) * kEights <= kKeys * kTile * 2);
};

// ---- operands ----------------------------------------------------------------------------------------------------
// Two tiles of an eight, by the addresses of the lower 16 lanes; see attention_backward_tile_sm90.cuh.
__device__ inline void store_turned(std::uint32_t to, std::uint32_t a, std::uint32_t b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};\n" ::"r"(to), "r"(a), "r"(b)
                 : "memory");
}
// An A operand: rows and columns change places in each of its four 8 x 8.
__device__ inline void turn(std::uint32_t (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;\n" : "+r"(x[i]));
}
// B operand of 8 of the inner dimension: ones in a column.
__device__ inline std::uint32_t ones_in(unsigned column) {
    return threadIdx.x % kWarp / 4 == column ? 0x3f803f80u : 0u;
}

// ---- a thread's part of the tile ---------------------------------------------------------------------------------
template <int R>
struct Keys {
    static constexpr int P = R / 2;  // pairs of scalars
    float dv[kKeys / 2] = {};
    // Rows are keys: of an eight, first a pair's first scalar, then the second. Columns: of pair p, p (queries of rows g) and
    // p + 4 (g + 8). dF: rows are keys of two eights, columns that of pair p are those of eights 2p and 2p + 1.
    float db[kEights][4] = {}, dF[4] = {};

    // What a thread's two rows need of a tile of queries.
    struct Rows {
        float base[2], delta[2];  // relative to G in base 2
        bool far, seen;           // the same for the warp
        __device__ Rows(const OfKeys<R>& keys, const OfQueries<R>& of, int row) {
            const float centre = keys.centre, faded = keys.faded;
            bool out = keys.far != 0.f;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const QueryNumbers x = of.numbers[row + 8 * k];
                base[k] = ((x.gate - centre) - x.lse) * kLog2e, delta[k] = x.delta, out |= x.far != 0.f;
            }
            far = __any_sync(0xffffffffu, out) != 0;
            seen = __any_sync(0xffffffffu, !(base[0] < faded) | !(base[1] < faded)) != 0;
        }
    };
    using Products = float[kKeys / 2];  // dP of a tile

    // dP of the thread's rows, of which `row` is the first, to weights and into all sums. to: the lane's place in the turned
    // weights; da: see sums_place. kMasked: row i sees keys up to i + shift.
    template <bool kMasked>
    __device__ void add(float (&da)[4], const Products& dp, const OfLane& of_lane, const OfKeys<R>& keys,
                        const OfQueries<R>& queries, std::uint32_t to, int row, int shift, const Rows& rows) {
        const int t = static_cast<int>(thread_anew() % 4);
        const int last = row + shift - 2 * t;
        int seen = shift + 16 + (kMasked ? row & 48 : 0);
        asm volatile("" : "+r"(seen));
#pragma unroll
        for (int m = 0; m < kEights / 2; ++m) {
            if (16 * m >= seen) {  // also: what the compiler may not mix, for want of registers
                store_turned(to + m * 16 * kRowBytes, 0u, 0u, 0u, 0u);
                continue;
            }
            std::uint32_t minus_ds[4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int eight = 2 * m + n;
                std::uint32_t d[2][R], y[R], a[2][P];
#pragma unroll
                for (int k = 0; k < 2; ++k)
#pragma unroll
                    for (int p = 0; p < P; ++p) a[k][p] = queries.a[row + 8 * k][p];
#pragma unroll
                for (int r = 0; r < R; ++r) y[r] = keys.pairs[eight][t].b[r];
#pragma unroll
                for (int k = 0; k < 2; ++k) packed_differences<R>(d[k], y, a[k]);
                float s[4], c[4];
                bases<kMasked>(c, keys.pairs[eight][t].gate, rows, eight, last);
                packed_scores<R, true>(s, d, c, of_lane.diagonal);
                std::uint32_t own[2], packed[2];
                const float(&x)[4] = reinterpret_cast<const float(&)[4]>(dp[4 * eight]);
                weigh(packed, own, s, x, rows);
                store_turned(to + eight * 8 * kRowBytes, packed[0], packed[1]);
                add_signed(da, of_lane, eight, own, d);
#pragma unroll
                for (int k = 0; k < 2; ++k) minus_ds[2 * k + n] = own[k];
            }
            turn(minus_ds);
            const uint2 of_dF = of_lane.ones[m];
            mma_bf16(dF, minus_ds, of_dF.x, of_dF.y);
        }
    }
    // The same where a scalar is out of range: scores and signs from differences in f32 of what lies in global memory.
    // query, key: the first of the tiles.
    __device__ void add_far(float (&da)[4], const Products& dp, const AttentionBackward<bf16>& p, const OfKeys<R>& keys,
                            std::uint32_t to, int head, int query, int key, int row, int shift, const Rows& rows) {
        const int t = static_cast<int>(threadIdx.x % 4);
#pragma unroll 1
        for (int m = 0; m < kEights / 2; ++m) {
            std::uint32_t packed[2][2], minus_ds[4];
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int eight = 2 * m + n;
                const FarDifferences d{p, head, query + row, key + 8 * eight + 2 * t};
                float s[4] = {}, c[4], x[4] = {};
                bases<true>(c, keys.pairs[eight][t].gate, rows, eight, row + shift - 2 * t);
#pragma unroll 1
                for (int r = 0; r < p.scalars; ++r)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[e] += fabsf(d(e, r));
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    s[e] = fmaf(s[e], -kLog2e, c[e]);
#pragma unroll
                    for (int i = 0; i < kEights; ++i)
                        if (i == eight) x[e] = dp[4 * i + e];
                }
                std::uint32_t own[2];
                weigh(packed[n], own, s, x, rows);
                add_far_signed(da, eight, own, d);
#pragma unroll
                for (int k = 0; k < 2; ++k) minus_ds[2 * k + n] = own[k];
            }
            turn(minus_ds);
            mma_bf16(dF, minus_ds, ones_in(m), ones_in(m + 4));
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
        const int place = thread / 4 * 2 + thread % 2;
        const bool keeps = thread % 4 < 2;  // columns p and p + 4 are two lanes' from each other
#pragma unroll
        for (int i = 0; i < kEights; ++i)
            if (const float4 x = with_other_column(db[i]); keeps) parts[i][place] = x;
        if (const float4 x = with_other_column(dF); keeps) shared.dF[place] = x;
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
                    -sum(parts[key / 8], key, r % 2, r / 2);
        }
        if (p.dF.data != nullptr && thread < kKeys)
            p.dF.data[std::int64_t(first + thread) * p.heads + head] =
                sum(shared.dF, thread, thread / 8 % 2, thread / 16);
        if (thread == 0) hopper::store_wait();
        __syncthreads();
    }

    // Where the lane's sums da go, among those of the tile's rows: its row, and four scalars (two of R = 2) from one on.
    // Lanes t with more than R have none.
    __device__ static int sums_place(unsigned thread) {
        const unsigned t = thread % 4;
        return static_cast<int>((first_row(thread) + t / 2 * 8) * R + t % 2 * 4);
    }
    __device__ static bool has_sums(unsigned thread) { return R == 8 || thread % 2 == 0; }

  private:
    __device__ static float4 with_other_column(const float (&x)[4]) {
        float y[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) y[e] = x[e] + __shfl_xor_sync(0xffffffffu, x[e], 2);
        return make_float4(y[0], y[1], y[2], y[3]);
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
    // Scores to weights, and dP to -ds.
    __device__ static void weigh(std::uint32_t (&packed)[2], std::uint32_t (&minus_ds)[2], float (&s)[4],
                                 const float (&x)[4], const Rows& rows) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = exp2_fast(s[e]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float delta = rows.delta[k];
            packed[k] = pack_bf16(s[2 * k], s[2 * k + 1]);
            minus_ds[k] = pack_bf16(s[2 * k] * (delta - x[2 * k]), s[2 * k + 1] * (delta - x[2 * k + 1]));
        }
    }
    __device__ void add_signed(float (&da)[4], const OfLane& of_lane, int eight, const std::uint32_t (&minus_ds)[2],
                               const std::uint32_t (&d)[2][R]) {
        std::uint32_t scaled[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) scaled[k] = fma_bf16(minus_ds[k], 0xc380c380u, 0x80008000u);  // times -256
#pragma unroll
        for (int p = 0; p < P; ++p) {
            std::uint32_t x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) x[e] = fma_bf16(scaled[e / 2], step2(d[e / 2][2 * p + e % 2]), minus_ds[e / 2]);
            const uint2 ones = of_lane.ones[p];
            mma_bf16(da, x, ones.x, ones.y);
            turn(x);
            mma_bf16(db[eight], x, ones.x, ones.y);
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
    __device__ void add_far_signed(float (&da)[4], int eight, const std::uint32_t (&minus_ds)[2],
                                   const FarDifferences& d) {
#pragma unroll 1
        for (int p = 0; p < P; ++p) {
            std::uint32_t x[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int r = 2 * p + e % 2, of = e / 2 * 2;
                x[e] = fma_bf16(minus_ds[e / 2], pack_bf16(-d.sign(of, r), -d.sign(of + 1, r)), 0x80008000u);
            }
            mma_bf16(da, x, ones_in(p), ones_in(p + 4));
            turn(x);
            float sum[4] = {};
            mma_bf16(sum, x, ones_in(p), ones_in(p + 4));
#pragma unroll
            for (int i = 0; i < kEights; ++i)
                if (i == eight) add_to(db[i], sum);
        }
    }
};

}  // namespace fiedler::attention_backward_packed_sm90_tile
