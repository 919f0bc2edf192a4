// kernels/attention_backward_one_sm90.cuh: the backward pass of scalar-distance attention with one scalar for sm_90a:
// operands, products and the arithmetic of a tile (the kernel is in attention_backward_one_sm90.cu).
//
// A block is one warpgroup. It owns a tile of 64 keys, the columns, and streams tiles of 64 queries, the rows:
//     X = dO V' - delta [64, 64]  A: dO, rows of D; B: V, rows of D (both as they lie in memory); and a step of 16 more,
//                                 A: - delta in three parts of 8 bits, B: ones
//     dv' += dO' P      [64, 64]  A: dO turned, B: P turned, rows of 64 queries (P is turned on its way from registers)
// dv' and the sums along columns (db, dF) stay in registers while the block lives on its keys; the sums along rows (da)
// are complete in a warp after two exchanges between the four lanes of a row. Nothing is added across warps before the
// end. A thread holds rows g and g + 8 of its warp's 16 and, of each 8 columns, 2t and 2t + 1.
//
// Signs: the weight takes the sign bit of a - b, and sums of sign ds are sums of signed weights times X. That is wrong for
// equal numbers alone, whose sign is zero, and for those that scaling makes equal. So the keys' scaled numbers are marked in a
// table of bits, by some bits of theirs; where a query finds its own marked, they are compared, and a tile with equal ones
// takes signs from the numbers as they are. 64 marks in 32,768 bits and 16 queries of a warp: one tile in 32 compares for
// nothing.
#pragma once
#include "kernels/attention_backward_tile_sm90.cuh"

namespace fiedler::attention_backward_one_tile {

using namespace attention_tile;
using attention_backward_sm90_tile::blocks_of;
using attention_backward_sm90_tile::first_row;
using attention_backward_sm90_tile::groups_of;
using attention_backward_sm90_tile::kTileElements;
using attention_backward_sm90_tile::kWidth;
using attention_backward_sm90_tile::lane_of_row;
using attention_backward_sm90_tile::multiply_turned;
using attention_backward_sm90_tile::place_of_turned;
using attention_backward_sm90_tile::Range;
using attention_backward_sm90_tile::scatter_sums;
using attention_backward_sm90_tile::store_turned;
using namespace warpgroup_tile;

constexpr unsigned kStages = 4;
constexpr int kKeys = tuning::attention_backward_sm90().keys, kBlocks = tuning::attention_backward_sm90().blocks;
constexpr int kMarks = 1024;
constexpr int kColumns = kKeys / 4;  // of a thread

// ---- operands of X -----------------------------------------------------------------------------------------------
struct alignas(16) QueryNumbers {
    float lse, gate, a, scaled;  // scaled: log2(e) a
};
// What is needed of 64 queries beside dO, as it lies at the begin of AttentionBackward::partial, [heads][tiles]. Rows of
// - delta: three numbers that add up to it, and zeros.
struct alignas(128) OfQueries {
    QueryNumbers numbers[kTile];
    nv_bf16 delta[kTile * 8];
};
static_assert(sizeof(OfQueries) == kTile * 8 * sizeof(float));

// A step of 16 without swizzle: units of 8 rows and 8 of the inner dimension, 128 bytes. Bits 16-29 of a descriptor: the
// distance / 16 of units along the inner dimension; 32-45: along rows. - delta has one unit of 8 along the inner dimension,
// which is read twice; the second time the ones are zeros. All rows of ones are the same eight.
constexpr std::uint64_t kDeltaLayout = std::uint64_t(8) << 32, kOnesLayout = 0;
constexpr Operand kOnesStep = 8 << 16;

// d += A B' with whole descriptors.
__device__ inline void multiply_described(float (&d)[32], std::uint64_t a, std::uint64_t b) {
#define FIEDLER_D8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;\n"
        : FIEDLER_D8(0), FIEDLER_D8(8), FIEDLER_D8(16), FIEDLER_D8(24)
        : "l"(a), "l"(b));
#undef FIEDLER_D8
}

// x = dO V' - delta.
__device__ inline void multiply_differences(float (&x)[kKeys / 2], Operand gradients, Operand values,
                                            std::uint64_t delta, std::uint64_t ones) {
    hopper::product_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s)
        multiply<kKeys, false>(x, advance(gradients, s * kColumnStep), advance(values, s * kColumnStep), s > 0);
    multiply_described(x, kDeltaLayout | delta, kOnesLayout | ones);
    hopper::product_commit();
}

// ---- shared memory -----------------------------------------------------------------------------------------------
// How pairs are done. plain: all gates of the keys are G, the middle key's. gated: the keys have gates of their own, not far
// from G. tied: as gated, and scalars may be equal. careful: keys may have any gate, scalars may be anything. nothing: the
// gate alone makes the queries' weights nothing.
enum class Way { plain, gated, tied, careful, nothing };
// What is the same for all keys of the tile.
struct alignas(16) OfKeys {
    float centre;  // G
    float faded;   // a query whose base is below this is nothing for the keys
    Way way;
};
// kind 0: stores x; 1: adds it to what this thread has stored; 2, 3: neither. The addition is done where the number lies, so
// that nobody waits for it to come.
__device__ inline void put_global(std::uint64_t to, float x, std::uint32_t kind) {
    asm volatile(
        "{\n.reg .pred first, later;\n"
        "setp.eq.u32 first, %2, 0;\nsetp.eq.u32 later, %2, 1;\n"
        "@first st.global.f32 [%0], %1;\n"
        "@later red.relaxed.gpu.global.add.f32 [%0], %1;\n}\n" ::"l"(to),
        "f"(x), "r"(kind)
        : "memory");
}
// Whether a lane has x < 0, or not |y| <= most.
__device__ inline bool any_negative_or_far(int x, float y, float most) {
    std::uint32_t any;
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.gtu.f32 p, %2, %3;\nsetp.lt.or.s32 p, %1, 0, p;\n"
        "vote.sync.any.pred p, p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n"
        : "=r"(any)
        : "r"(x), "f"(fabsf(y)), "f"(most));
    return any != 0;
}
struct Shared {
    nv_bf16 gradients[kStages][kTileElements];  // dO; tiles at multiples of 1024 bytes
    nv_bf16 weights[2][kKeys * kTile];          // turned; at the end dv
    nv_bf16 values[kKeys * kWidth];             // V
    OfQueries queries[kStages];
    alignas(16) nv_bf16 ones[2][8 * 8];         // units of 8 keys: 1, 1, 1, 0, ... and zeros
    std::uint32_t marks[kMarks];                // of the keys' scaled b: bits 2-11 the word, 12-16 the bit from the top
    float scaled[kKeys], below[kKeys];          // log2(e) b, log2(e) (F_j - G)
    float b[kKeys], gate[kKeys];                // as they are
    alignas(16) float2 ways[kThreads / kWarp];  // of the warps' keys: largest G - F_j; Way
    OfKeys of_keys;
    std::uint64_t slab;             // of the head
    bool again;                     // an earlier tile of keys has left sums of the queries there
    hopper::Barrier full[kStages];  // dO and its OfQueries are there, and V with a tile of keys' first dO
    float sums[kThreads / kWarp][4][kColumns * 2];  // of the warps' lanes t, at the end
};

// Tile n that the block loads is in stage n % kStages; its barrier is waited for with this parity.
__device__ inline int parity_of(unsigned n) { return static_cast<int>(n / kStages & 1); }

// As warp_number(), which would be kept in a register.
__device__ inline int warp_anew() { return __shfl_sync(0xffffffffu, thread_anew() / kWarp, 0); }

// ---- a thread's part of the tile ---------------------------------------------------------------------------------
struct Keys {
    static constexpr int C = kColumns;
    float dv[kKeys / 2] = {}, x[kKeys / 2];
    float db[C] = {}, total[C] = {};  // sums of sign ds, and of ds
    float b[C];                       // log2(e) b
    static constexpr float kFar = 32.f, kMost = 12.f;

    // Of the thread's columns of 16, as they number the warp's rows, less 2t: that its first row sees.
    __device__ static int last_seen() {
        const int lane = thread_anew() % kWarp;
        return lane / 4 - lane % 4 * 2;
    }
    __device__ static int column(int c) { return c / 2 * 8 + lane_of_row() * 2 + c % 2; }
    __device__ static float scaled_scalar(float x) { return fmaf(x, kLog2e, 0.f); }  // never -0

    // Of the thread's key, and the tile's middle gate. On its way while loads are asked for.
    struct Numbers {
        float scalar, gate = 0.f, centre = 0.f;
        __device__ Numbers(const AttentionBackward<bf16>& p, int head, int first) {
            const int key = thread_anew() % kKeys;
            const std::int64_t at = std::int64_t(first) * p.heads + head;
            const float* const b = p.b.data + at;
            scalar = b[key * p.heads];
            if (p.F.data == nullptr) return;
            const float* const F = p.F.data + at;
            gate = F[key * p.heads], centre = F[kKeys / 2 * p.heads];
        }
    };
    // query: the first tile of queries. What was in shared memory is not needed any more, by no warp.
    __device__ void begin(const AttentionBackward<bf16>& p, Shared& shared, const Numbers& of, int query) {
        const int thread = thread_anew(), key = thread % kKeys;
#pragma unroll
        for (int i = 0; i < kMarks / 4 / kThreads; ++i)
            reinterpret_cast<uint4*>(shared.marks)[i * kThreads + thread] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kKeys * kTile / 8 / kThreads; ++i)
            reinterpret_cast<uint4*>(shared.weights[~query & 1])[i * kThreads + thread] = {0, 0, 0, 0};
        hopper::publish_shared();
        const float apart = of.centre - of.gate, scaled = scaled_scalar(of.scalar);
        const bool gated = __any_sync(0xffffffffu, apart != 0.f) != 0;
        const bool careful = __any_sync(0xffffffffu, !(fabsf(apart) <= kMost) | !(fabsf(scaled) <= kFar)) != 0;
        const float most = gated ? warp_max(apart) : 0.f;
        if (thread % kWarp == 0) shared.ways[thread / kWarp] = {most, careful ? 3.f : gated ? 1.f : 0.f};
        __syncthreads();
        const float4 ways = *reinterpret_cast<const float4*>(shared.ways);  // two warps have all keys
        if (thread < kKeys) {
            shared.gate[key] = of.gate, shared.below[key] = -apart * kLog2e;
            shared.b[key] = of.scalar, shared.scaled[key] = scaled;
            const std::uint32_t bits = __float_as_uint(scaled);
            atomicOr(&shared.marks[bits >> 2 & (kMarks - 1)], 0x80000000u >> (bits >> 12 & 31));
        }
        if (thread == 0) {
            static_assert(int(Way::plain) == 0 && int(Way::gated) == 1 && int(Way::careful) == 3);
            const bool skips = p.F.data != nullptr && p.skip;
            shared.of_keys.centre = of.centre;
            shared.of_keys.faded = skips ? -(kFaded + fmaxf(ways.x, ways.z)) * kLog2e : -INFINITY;
            shared.of_keys.way = static_cast<Way>(int(fmaxf(ways.y, ways.w)));
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            const float2 y = *reinterpret_cast<const float2*>(shared.scaled + column(c));
            b[c] = y.x, b[c + 1] = y.y;
        }
    }

    // A thread's two rows, relative to G in base 2, and scaled as b is; and how its warp does them.
    struct Rows {
        float base[2], a[2];
        int way;  // Way; and kOwn: queries and keys are the same tokens
    };
    static constexpr int kOwn = 8;
    // What lies in shared memory for them. base: the address of Shared; numbers: in a stage, the distance of the first row's.
    struct Read {
        float4 keys, row[2];  // OfKeys, QueryNumbers
    };
    static __device__ Read read(std::uint32_t base, std::uint32_t numbers) {
        constexpr int kQueries = offsetof(Shared, queries);
        const std::uint32_t from = base + numbers;
        return {hopper::load_four<offsetof(Shared, of_keys)>(base),
                {hopper::load_four<kQueries>(from), hopper::load_four<kQueries + 8 * sizeof(QueryNumbers)>(from)}};
    }
    // Votes come first, where all lanes are together.
    __device__ Rows rows(std::uint32_t base, const Read& read) const {
        const float4 of = read.keys;  // centre, faded, way
        Rows r;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float4 x = read.row[k];
            r.base[k] = ((x.y - of.x) - x.x) * kLog2e, r.a[k] = x.w;
        }
        const float mine = threadIdx.x % 2 ? r.a[1] : r.a[0];  // of the four lanes of a row two have one each
        const std::uint32_t bits = __float_as_uint(mine);
        const std::uint32_t word = hopper::load_word<offsetof(Shared, marks)>(base + (bits & (kMarks - 1) * 4));
        const int marked = static_cast<int>(__funnelshift_l(0u, word, bits >> 12));  // negative: it is
        const bool seen = __any_sync(0xffffffffu, !(r.base[0] < of.y) | !(r.base[1] < of.y)) != 0;
        r.way = __float_as_int(of.z);
        if (any_negative_or_far(marked, mine, kFar)) {
            bool differ = true;
#pragma unroll
            for (int c = 0; c < C; ++c) differ = differ & (r.a[0] != b[c]) & (r.a[1] != b[c]);
            if (__any_sync(0xffffffffu, !differ)) r.way = max(r.way, static_cast<int>(Way::tied));
            if (__any_sync(0xffffffffu, !(fabsf(mine) <= kFar))) r.way = static_cast<int>(Way::careful);
        }
        if (!seen) r.way = static_cast<int>(Way::nothing);
        return r;
    }
    // x with the sign of another number.
    __device__ static float signed_as(float x, float y) {
        return __uint_as_float(__float_as_uint(x) | (__float_as_uint(y) & 0x80000000u));  // x is not negative
    }

    // X of the thread's rows, of which `row` is the first, to weights and into all sums. to: the lane's place in the turned
    // weights; sums: of sign ds along rows, over the thread's columns. Own queries: row i sees keys up to i. With care, row i
    // sees keys up to i + shift.
    __device__ void add(float (&sums)[2], const Shared& shared, int stage, std::uint32_t to, int row, int shift,
                        const Rows& r) {
        if (__builtin_expect(r.way == static_cast<int>(Way::plain), 1)) {
            add<Way::plain, false>(sums, shared, stage, to, row, shift, kKeys, r);
            return;
        }
        const bool own = (r.way & kOwn) != 0;
        const auto way = static_cast<Way>(r.way & (kOwn - 1));
        if (way < Way::tied) {  // not a chain of equalities, which would become a table of jumps
            if (!own)
                add<Way::gated, false>(sums, shared, stage, to, row, shift, kKeys, r);
            else if (way == Way::plain)
                add<Way::plain, true>(sums, shared, stage, to, row, shift, warp_anew(), r);
            else
                add<Way::gated, true>(sums, shared, stage, to, row, shift, warp_anew(), r);
        } else if (way == Way::tied) {
            add<Way::tied, true>(sums, shared, stage, to, row, shift, own ? warp_anew() : kKeys, r);
        } else if (way == Way::careful) {
            add<Way::careful, false>(sums, shared, stage, to, row, shift, kKeys, r);
        } else {
            __syncwarp();  // a branch, not predicates
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) store_turned(to + n * 16 * kRowBytes, 0u, 0u, 0u, 0u);
        }
    }
    // own: 16 keys, the last of which the warp's rows see some.
    template <Way way, bool kOwn>
    __device__ void add(float (&sums)[2], const Shared& shared, int stage, std::uint32_t to, int row, int shift,
                        int own, const Rows& r) {
        constexpr bool kTied = way == Way::tied, kCareful = way == Way::careful, kRaw = kTied || kCareful;
        const QueryNumbers* const of = shared.queries[stage].numbers;
#pragma unroll
        for (int chunk = 0; chunk < kKeys / 16; ++chunk) {
            const std::uint32_t place = to + chunk * 16 * kRowBytes;
            if (kOwn && chunk > own) {
                store_turned(place, 0u, 0u, 0u, 0u);
                continue;
            }
            const int last = kOwn && chunk == own ? last_seen() : kKeys;  // of the 16 columns, that the first row sees
            std::uint32_t packed[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int c = 4 * chunk + 2 * m;
                float2 below = {0.f, 0.f}, raw = {0.f, 0.f};
                if (way != Way::plain)
                    below = *reinterpret_cast<const float2*>((kCareful ? shared.gate : shared.below) + column(c));
                if (kRaw) raw = *reinterpret_cast<const float2*>(shared.b + column(c));
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    float q[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int i = row + 8 * k;
                        float base = r.base[k], d = r.a[k] - b[c + j], distance = fabsf(d);
                        if (kRaw) d = of[i].a - (j ? raw.y : raw.x);
                        if (kOwn && last + 8 * k < 8 * m + j) base = -INFINITY;
                        if constexpr (kCareful) {
                            distance = fabsf(d) * kLog2e;
                            base = ((of[i].gate - (j ? below.y : below.x)) - of[i].lse) * kLog2e;
                            if (column(c + j) > i + shift) base = -INFINITY;
                        }
                        float score = base - distance;
                        if (way == Way::gated || kTied) score -= j ? below.y : below.x;
                        q[j] = exp2_fast(score);
                        const float of_x = x[8 * chunk + 4 * m + 2 * k + j];
                        float with_sign = signed_as(q[j], d);
                        if (kRaw && d == 0.f) with_sign = 0.f;
                        sums[k] = fmaf(with_sign, of_x, sums[k]);
                        db[c + j] = fmaf(with_sign, of_x, db[c + j]);
                        total[c + j] = fmaf(q[j], of_x, total[c + j]);
                    }
                    packed[m][k] = pack_bf16(q[0], q[1]);
                }
            }
            store_turned(place, packed[0][0], packed[0][1], packed[1][0], packed[1][1]);
        }
    }

    // dv, db, dF. All products are over, for all warps.
    __device__ void store(const AttentionBackward<bf16>& p, const CUtensorMap* results, Shared& shared, int head,
                          int first) {
        const int thread = thread_anew(), warp = warp_anew(), lane = thread % kWarp;
        const std::uint32_t to = shared_address(shared.weights) + place_of_turned(thread);
#pragma unroll
        for (int n = 0; n < kKeys / 8; n += 2) {
            std::uint32_t packed[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int e = 4 * (n + m) + 2 * k;
                    packed[m][k] = pack_bf16(dv[e], dv[e + 1]);
                }
            store_turned(to + n * 8 * kRowBytes, packed[0][0], packed[0][1], packed[1][0], packed[1][1]);
        }
        hopper::publish_shared();
        float* sums = shared.sums[warp][lane % 4];
        int offset = 0;
        scatter_sums<C>(db, offset);
#pragma unroll
        for (int i = 0; i < C / 8; ++i) sums[offset + i] = db[i];
        offset = C;
        scatter_sums<C>(total, offset);
#pragma unroll
        for (int i = 0; i < C / 8; ++i) sums[offset + i] = total[i];
        __syncthreads();
        if (thread == 0) hopper::store_box(results, head * kWidth, first, shared.weights[0]);
        static_assert(kThreads == 2 * kKeys);
        const int key = thread % kKeys, c = key / 8 * 2 + key % 2, t = key % 8 / 2;
        const bool gate = thread >= kKeys;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kThreads / kWarp; ++w) sum += shared.sums[w][t][gate ? C + c : c];
        const std::int64_t at = std::int64_t(first) * p.heads + head;
        float* const results_of = gate ? p.dF.data : p.db.data;
        if (results_of != nullptr) (results_of + at)[key * p.heads] = gate ? -sum : sum;
        if (thread == 0) hopper::store_wait();
    }
};

// The sum over the four lanes t of a row: of row g + 8 (t % 2).
__device__ inline float sum_of_pair(const float (&rows)[2]) {
    const bool odd = threadIdx.x & 1;
    const float keep = odd ? rows[1] : rows[0], send = odd ? rows[0] : rows[1];
    return keep + __shfl_xor_sync(0xffffffffu, send, 1);
}
__device__ inline float minus_sum_of_pairs(float x) { return -x - __shfl_xor_sync(0xffffffffu, x, 2); }

}  // namespace fiedler::attention_backward_one_tile
