// kernels/attention_backward_sm90.cuh: the backward pass of scalar-distance attention for sm_90a: operands, products and
// the arithmetic of a tile (the kernel is in attention_backward_sm90.cu).
//
// A block is one warpgroup. It owns a tile of N keys, the columns, and streams tiles of 64 queries, the rows:
//     dP = dO V'   [64, N]    A: dO, rows of D; B: V, rows of D                (both as they lie in memory)
//     dv' += dO' P [64, N]    A: dO turned, B: P turned, rows of 64 queries    (P is turned on its way from registers)
// dv' and the sums along columns (db, dF) stay in registers while the block lives on its keys; the sums along rows (da)
// are complete in a warp after two exchanges between the four lanes of a row. Nothing is added across warps before the
// end. A thread holds rows g and g + 8 of its warp's 16 and, of each 8 columns, 2t and 2t + 1.
//
// Weights are relative to the keys: q_ij = p_ij / D_j with D_j = exp(G - F_j), G the gate of the tile's middle key. So a
// pair needs no number of its column for the gate; dv, db, dF are multiplied by D_j at the end, and da on the way, in an
// instruction that is there anyway. Where D_j would leave [exp(-12), exp(12)], D_j = 1 and the pairs take F_j.
#pragma once
#include "kernels/attention_backward.cuh"
#include "kernels/hopper.cuh"
#include "kernels/warpgroup_tile.cuh"

namespace fiedler::attention_backward_sm90_tile {

using namespace attention_tile;

constexpr int kWidth = 64, kStages = 3;
constexpr int kTileElements = kTile * kWidth;

template <int R>
struct Shape {
    static constexpr int kKeys = tuning::attention_backward_sm90(R).keys,
                         kBlocks = tuning::attention_backward_sm90(R).blocks;
    static constexpr int kColumns = kKeys / 4;  // of a thread
};

// ---- operands and products ---------------------------------------------------------------------------------------
// Tiles are rows of 64 bf16 with TMA's 128-byte swizzle (hopper.cuh), written by TMA and stmatrix.
//
// An operand whose rows run along M (or N) instead of the inner dimension, PTX ISA "M/N-major": with this swizzle its
// unit is 64 of M (128 bytes, one row of the tile) by 8 of K (eight rows, 1024 bytes). The stride of the descriptor is
// the distance of units along K, 1024 bytes as hopper::operand has it; its leading distance, that of units along M,
// is not used, because M = 64 is one unit. So the descriptor is the same; a step of 16 along K is two units, 2048 bytes.

using namespace warpgroup_tile;

// d += X' Y' with the inner dimension X's 64 rows and the 64 columns of Y.
template <int N>
__device__ void multiply_turned(float (&d)[N / 2], Operand x, Operand y) {
    hopper::product_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s) multiply<N, true>(d, advance(x, s * kRowStep), advance(y, s * kColumnStep), true);
    hopper::product_commit();
}

// Four 8 x 8 tiles of 16-bit values, turned: lane l gives where column l % 8 of tile l / 8 goes, 16 bytes.
__device__ inline void store_turned(std::uint32_t to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                    std::uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}
// Where a thread's tiles of 16 columns go, of its warp's 16 rows: columns become rows of 64, swizzled. Tile m of the four
// is columns 8 (m / 2) .., rows 8 (m % 2) ..; the next 16 columns are 16 kRowBytes further on.
__device__ inline std::uint32_t place_of_turned(unsigned thread) {
    const unsigned lane = thread % kWarp, column = lane / 16 * 8 + lane % 8;
    const unsigned piece = (thread / kWarp * 2 + lane / 8 % 2) ^ lane % 8;
    return column * kRowBytes + piece * 16;
}
// The first of a thread's two rows of 64; the second is 8 further on.
__device__ inline unsigned first_row(unsigned thread) { return thread / kWarp * 16 + thread % kWarp / 4; }
__device__ inline int lane_of_row() { return static_cast<int>(static_cast<unsigned>(thread_anew()) % 4); }  // t

// ---- shared memory -----------------------------------------------------------------------------------------------
struct alignas(16) QueryNumbers {  // R = 1: also at the begin of AttentionBackward::partial, [heads][tokens]
    float lse, delta, gate, a;     // a: of R = 1
};
template <int R>
struct Shared {
    using S = Shape<R>;
    static constexpr int kScalars = R == 1 ? 4 : kTile * R;
    nv_bf16 gradients[kStages][kTileElements];  // dO; tiles at multiples of 1024 bytes
    nv_bf16 weights[2][S::kKeys * kTile];       // turned; at the end dv
    nv_bf16 values[S::kKeys * kWidth];          // V
    alignas(128) float a[kStages][kScalars];    // [query][R]
    QueryNumbers numbers[kStages][kTile];
    float b[S::kKeys * R];                // see Keys::differences
    float gate[S::kKeys];                 // what the weights of a key are relative to
    float scale[S::kKeys];                // D_j
    float scaled[R == 1 ? S::kKeys : 2];  // see Keys::b
    float most[kThreads / kWarp];         // G - F_j of the warps' keys
    // What would stay in registers from tile to tile without need. origin: see Keys; centre: G; faded: below this, the gate
    // alone makes a query's weights nothing for the keys; numbers_of: see QueryLoads; careful_end: see Range.
    volatile float origin, centre, faded;
    volatile int careful_end;
    volatile unsigned long long numbers_of[R == 1 ? 1 : kThreads];
    float sums[kThreads / kWarp][4][S::kColumns * (R + 1)];  // of the warps' lanes t, at the end
    hopper::Barrier
        full[kStages];  // dO is there, and numbers (R = 1) or a (R = 4), and V with a tile of keys' first dO
};

// A place in the ring of stages, and the parity that its barrier is waited for with.
struct Ring {
    int stage = 0, parity = 0;
    __device__ Ring next() const {
        const bool wraps = stage == kStages - 1;
        return {wraps ? 0 : stage + 1, parity ^ int(wraps)};
    }
};

// R = 4: the numbers of 64 queries at a time. A warp has one of lse, delta, F for all of them. Where a thread's next ones
// are is kept in shared memory. R = 1: numbers lie together, and come by TMA as a does for R = 4.
template <int R>
struct QueryLoads {
    __device__ static void begin(const AttentionBackward<bf16>& p, Shared<R>& shared, int head, int first) {
        const int thread = thread_anew(), warp = thread / kWarp;
        const float* number = warp == 0 ? p.lse.data : warp == 1 ? p.delta.data : warp == 2 ? p.F.data : nullptr;
        if (number != nullptr) number += std::int64_t(first + thread % kWarp) * p.heads + head;
        shared.numbers_of[thread] = reinterpret_cast<unsigned long long>(number);
    }
    __device__ static void start(const AttentionBackward<bf16>& p, Shared<R>& shared, int stage, int head, int first) {
        const int thread = thread_anew();
        const auto* number = reinterpret_cast<const float*>(shared.numbers_of[thread]);
        if (number != nullptr) {
            float* to = &shared.numbers[stage][thread % kWarp].lse + thread / kWarp;
            const std::uint32_t half = kWarp * p.heads;
            put<4>(to, number);
            put<4>(to + kWarp * sizeof(QueryNumbers) / 4, number + half);
            shared.numbers_of[thread] = reinterpret_cast<unsigned long long>(number + 2 * half);
        }
    }

  private:
    template <int bytes>
    __device__ static void put(float* to, const float* from) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(shared_address(to)), "l"(from), "n"(bytes)
                     : "memory");
    }
};

// Sums over the eight lanes g; a lane keeps an eighth of the values, those from `offset` on.
template <int V, int mask = 16>
__device__ void scatter_sums(float* x, int& offset) {
    if constexpr (mask >= 4) {
        const bool upper = (threadIdx.x & mask) != 0;
#pragma unroll
        for (int i = 0; i < V / 2; ++i) {
            const float keep = upper ? x[i + V / 2] : x[i], send = upper ? x[i] : x[i + V / 2];
            x[i] = keep + __shfl_xor_sync(0xffffffffu, send, mask);
        }
        if (upper) offset += V / 2;
        scatter_sums<V / 2, mask / 2>(x, offset);
    }
}

// ---- a thread's part of the tile ---------------------------------------------------------------------------------
template <int R>
struct Keys {
    using S = Shape<R>;
    static constexpr int N = S::kKeys, C = S::kColumns;
    float dv[N / 2] = {}, dp[N / 2];
    float scale[C], db[C][R] = {}, total[C] = {};  // D_j; sums of step ds, and of ds
    // R = 1: log2(e) (b - origin), the origin that of the tile's middle key, as long as rounding this costs no more than
    // rounding a - b would; a is taken likewise, equal numbers give equal ones. Otherwise pairs are done with care.
    float b[R == 1 ? C : 1];
    bool careful = false;
    static constexpr float kFar = 24.f;

    // Of the thread's columns of 16, as they number the warp's rows, less 2t: that its first row sees.
    __device__ static int last_seen() {
        const int lane = thread_anew() % kWarp;
        return lane / 4 - lane % 4 * 2;
    }
    __device__ static int column(int c) { return c / 2 * 8 + lane_of_row() * 2 + c % 2; }

    // b and F of the keys, a thread for each of them; then each thread has those of its columns. Ends without a barrier.
    __device__ void begin(const AttentionBackward<bf16>& p, Shared<R>& shared, int head, int first) {
        const bool gated = p.F.data != nullptr;
        const int thread = thread_anew(), key = thread % N;
        const float* F = p.F.data + head + first * p.F.ld;
        const float* from = p.b.data + first * p.b.ld + head * R;
        float centre = 0.f, gate = 0.f, origin = 0.f, scalar = 0.f;
        if (gated) centre = F[N / 2 * p.F.ld], gate = F[key * p.F.ld];
        if constexpr (R == 1) origin = from[N / 2 * p.b.ld], scalar = from[key * p.b.ld];
        constexpr float kMost = 12.f;
        const float apart = centre - gate, most = warp_max(apart);
        if (thread % kWarp == 0) shared.most[thread / kWarp] = most;
        const bool direct = __syncthreads_or(!(fabsf(apart) <= kMost)) != 0;
        careful = direct;
        if (thread < N) {
            shared.gate[key] = direct ? gate : centre;
            shared.scale[key] = direct ? 1.f : exp2_fast(apart * kLog2e);
        }
        if (thread == 0) {
            float of_all = shared.most[0];
            if (N > kWarp) of_all = fmaxf(of_all, shared.most[1]);
            shared.centre = centre;
            shared.faded = gated && p.skip ? -(kFaded + of_all) * kLog2e : -INFINITY;
        }
        if constexpr (R == 1) {
            const float scaled = scaled_scalar(scalar, origin);
            if (thread == 0) shared.origin = origin;
            if (thread < N) shared.b[key] = scalar, shared.scaled[key] = scaled;
            careful |= __syncthreads_or(!(fabsf(scaled) <= kFar)) != 0;
        } else {
            for (int i = thread; i < N * R; i += kThreads) {
                const int of = i / R, r = i % R;
                shared.b[r / 2 * 2 * N + of * 2 + r % 2] = from[of * p.b.ld + r];
            }
            __syncthreads();
        }
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            const float2 x = *reinterpret_cast<const float2*>(shared.scale + column(c));
            scale[c] = x.x, scale[c + 1] = x.y;
            if constexpr (R == 1) {
                const float2 y = *reinterpret_cast<const float2*>(shared.scaled + column(c));
                b[c] = y.x, b[c + 1] = y.y;
            }
        }
    }
    __device__ static float scaled_scalar(float x, float origin) { return __fmul_rn(x - origin, kLog2e); }

    // What a thread's two rows need, which is there before dP is.
    struct Base {
        float base[2], delta[2], a[2];  // relative to G in base 2; a scaled as b is, R = 1
        __device__ Base(const Shared<R>& shared, int stage, int row) {
            const float centre = shared.centre, origin = shared.origin;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const QueryNumbers x = shared.numbers[stage][row + 8 * k];
                base[k] = ((x.gate - centre) - x.lse) * kLog2e, delta[k] = x.delta;
                a[k] = R == 1 ? scaled_scalar(x.a, origin) : 0.f;
            }
        }
    };

    // d = a - b for the columns c, c + 1 of a row. R = 1: of the scaled ones, unless kCareful.
    template <bool kCareful>
    __device__ void differences(float (&d)[2][R], const float (&a)[R], const Shared<R>& shared, int c) const {
        if constexpr (R == 1 && !kCareful) {
            d[0][0] = a[0] - b[c], d[1][0] = a[0] - b[c + 1];
        } else if constexpr (R == 1) {
            const float2 y = *reinterpret_cast<const float2*>(shared.b + column(c));
            d[0][0] = a[0] - y.x, d[1][0] = a[0] - y.y;
        } else {
            const float* of = shared.b + 2 * column(c);
#pragma unroll
            for (int r = 0; r < R; r += 2) {
                const float4 y = *reinterpret_cast<const float4*>(of + r / 2 * 2 * N);
                d[0][r] = a[r] - y.x, d[0][r + 1] = a[r + 1] - y.y;
                d[1][r] = a[r] - y.z, d[1][r + 1] = a[r + 1] - y.w;
            }
        }
    }
    // c_i - sum |d|, in base 2.
    template <bool kCareful>
    __device__ static float score(const float (&d)[R], float base) {
        if constexpr (R == 1) {
            return base - (kCareful ? fabsf(d[0]) * kLog2e : fabsf(d[0]));
        } else {
            float sum = fabsf(d[0]) + fabsf(d[1]);
#pragma unroll
            for (int r = 2; r < R; ++r) sum += fabsf(d[r]);
            return fmaf(sum, -kLog2e, base);
        }
    }

    // dP of the thread's rows, of which `row` is the first, to weights and into all sums. to: the lane's place in the turned
    // weights; rows: sums of - sign ds along rows, over the thread's columns. kOwn: queries and keys are the same tokens, and
    // row i sees keys up to i. kCareful: row i sees keys up to i + shift, keys may have gates of their own, and scalars may
    // be anything. False: nothing is done, it has to be done with care.
    template <bool kCareful, bool kOwn = false>
    __device__ bool add(float (&rows)[2][R], const Shared<R>& shared, int stage, std::uint32_t to, int row, int shift,
                        const Base& of_rows) {
        const QueryNumbers* const of = shared.numbers[stage];
        const float faded = shared.faded;
        float a[2][R], base[2], delta[2], all[2] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            base[k] = of_rows.base[k], delta[k] = of_rows.delta[k];
#pragma unroll
            for (int r = 0; r < R; ++r) {
                a[k][r] = R > 1 ? shared.a[stage][(row + 8 * k) * R + r] : kCareful ? of[row + 8 * k].a : of_rows.a[k];
                rows[k][r] = 0.f;
            }
        }
        if constexpr (R == 1 && !kCareful)
            if (__any_sync(0xffffffffu, !(fabsf(a[0][0]) <= kFar) || !(fabsf(a[1][0]) <= kFar))) return false;
        if (!__any_sync(0xffffffffu, !(base[0] < faded) || !(base[1] < faded))) {
            __syncwarp();  // a branch, not predicates
#pragma unroll
            for (int n = 0; n < N / 16; ++n) store_turned(to + n * 16 * kRowBytes, 0u, 0u, 0u, 0u);
            return true;
        }
        static_assert(!kOwn || N == kTile);
        const int own = kOwn ? warp_number() : 0;  // 16 keys, the last of which the warp's rows see some
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            if (kOwn && n / 2 > own) {
                store_turned(to + n * 8 * kRowBytes, 0u, 0u, 0u, 0u);
                continue;
            }
            const int last = kOwn && n / 2 == own ? last_seen() : N;  // of the 16 columns, that the first row sees
            std::uint32_t packed[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int c = 2 * (n + m);
                    float d[2][R], q[2];
                    differences<kCareful>(d, a[k], shared, c);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float of_row = base[k];
                        if (kOwn && last + 8 * k < 8 * m + j) of_row = -INFINITY;
                        if constexpr (kCareful) {
                            const int i = row + 8 * k, key = column(c + j);
                            of_row = ((of[i].gate - shared.gate[key]) - of[i].lse) * kLog2e;
                            if (key > i + shift) of_row = -INFINITY;
                        }
                        q[j] = exp2_fast(score<kCareful>(d[j], of_row));
                        // Products that two sums take are rounded, so that ties cancel: no contraction.
                        const float ds = __fmul_rn(q[j], dp[4 * (n + m) + 2 * k + j] - delta[k]),
                                    scaled = __fmul_rn(ds, scale[c + j]);
                        total[c + j] += ds;
                        all[k] += scaled;
#pragma unroll
                        for (int r = 0; r < R; ++r) {
                            const float step = half_step(d[j][r]);
                            db[c + j][r] = fmaf(step, ds, db[c + j][r]);
                            rows[k][r] = fmaf(step, scaled, rows[k][r]);
                        }
                    }
                    packed[m][k] = pack_bf16(q[0], q[1]);
                }
            store_turned(to + n * 8 * kRowBytes, packed[0][0], packed[0][1], packed[1][0], packed[1][1]);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
            for (int r = 0; r < R; ++r) rows[k][r] = fma_flushed(-2.f, rows[k][r], all[k]);
        return true;
    }

    // dv, db, dF. All products are over, for all warps.
    __device__ void store(const AttentionBackward<bf16>& p, Shared<R>& shared, int head, int first) {
        const int thread = thread_anew(), warp = warp_number(), lane = thread % kWarp;
        const std::uint32_t to = shared_address(shared.weights) + place_of_turned(thread);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            std::uint32_t packed[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int c = 2 * (n + m), e = 2 * c + 2 * k;
                    packed[m][k] = pack_bf16(dv[e] * scale[c], dv[e + 1] * scale[c + 1]);
                }
            store_turned(to + n * 8 * kRowBytes, packed[0][0], packed[0][1], packed[1][0], packed[1][1]);
        }
        float x[C * R];
#pragma unroll
        for (int c = 0; c < C; ++c) {
#pragma unroll
            for (int r = 0; r < R; ++r) x[c * R + r] = db[c][r];
        }
        float* sums = shared.sums[warp][lane % 4];
        int offset = 0;
        scatter_sums<C * R>(x, offset);
#pragma unroll
        for (int i = 0; i < C * R / 8; ++i) sums[offset + i] = x[i];
        offset = C * R;
        scatter_sums<C>(total, offset);
#pragma unroll
        for (int i = 0; i < C / 8; ++i) sums[offset + i] = total[i];
        __syncthreads();
        write(p, shared, head, first);
    }

  private:
    __device__ static void write(const AttentionBackward<bf16>& p, const Shared<R>& shared, int head, int first) {
        const int thread = thread_anew();
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            const int row = thread / 8 + 16 * i, piece = thread % 8;
            store16(nv(p.dv.data) + (first + row) * p.dv.ld + head * kWidth + piece * 8,
                    load16(shared.weights[0] + row * kWidth + (piece ^ row % 8) * 8));
        }
        for (int i = thread; i < N * (R + 1); i += kThreads) {
            const bool gate = i >= N * R;
            const int key = gate ? i - N * R : i / R, r = i % R, c = key / 8 * 2 + key % 2, t = key % 8 / 2;
            const int at = gate ? C * R + c : c * R + r;
            float sum = 0.f, all = 0.f;  // all: of ds, added up in the same order as its steps, so that ties cancel
#pragma unroll
            for (int w = 0; w < kThreads / kWarp; ++w)
                sum += shared.sums[w][t][at], all += shared.sums[w][t][C * R + c];
            const float of_key = shared.scale[key];
            if (!gate)
                p.db.data[(first + key) * p.db.ld + head * R + r] = fma_flushed(2.f, sum, -all) * of_key;
            else if (p.dF.data != nullptr)
                p.dF.data[(first + key) * p.dF.ld + head] = -sum * of_key;
        }
    }
};

// Sums over the four lanes t of a row; a lane has some of them. Of row g + 8 (t % 2), scalars from R / 2 (t / 2)
// on (R = 1: in t = 0, 1 alone), by exchanges between lanes.
template <int R>
struct RowSums {
    static constexpr int kCount = R == 1 ? 1 : R / 2;
    float x[kCount];
    __device__ explicit RowSums(const float (&rows)[2][R]) {
        const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
        float y[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float keep = odd ? rows[1][r] : rows[0][r], send = odd ? rows[0][r] : rows[1][r];
            y[r] = keep + __shfl_xor_sync(0xffffffffu, send, 1);
        }
        if constexpr (R == 1) {
            x[0] = y[0] + __shfl_xor_sync(0xffffffffu, y[0], 2);
        } else {
#pragma unroll
            for (int r = 0; r < R / 2; ++r) {
                const float keep = upper ? y[r + R / 2] : y[r], send = upper ? y[r] : y[r + R / 2];
                x[r] = keep + __shfl_xor_sync(0xffffffffu, send, 2);
            }
        }
    }
    // Where the lane's begin among those of the tile's rows; row: the first of the thread's.
    __device__ static int offset(int row) {
        const int t = lane_of_row();
        return (row + t % 2 * 8) * R + (R == 1 ? 0 : t / 2 * kCount);
    }
};
// What an earlier tile of keys left in the slab; to it the lane's sums are added.
template <int n>
__device__ void load_sums(float (&x)[n], const float* from, bool any) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = 0.f;
    if (!any) return;
    if constexpr (n == 4) {
        const float4 y = *reinterpret_cast<const float4*>(from);
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = from[i];
    }
}
template <int R>
__device__ void store_sums(float* to, const float (&before)[RowSums<R>::kCount], const RowSums<R>& sums) {
    constexpr int n = RowSums<R>::kCount;
    if (R == 1 && (threadIdx.x & 2)) return;
    float y[n];
#pragma unroll
    for (int i = 0; i < n; ++i) y[i] = before[i] + sums.x[i];
    if constexpr (n == 4)
        *reinterpret_cast<float4*>(to) = make_float4(y[0], y[1], y[2], y[3]);
    else if constexpr (n == 2)
        *reinterpret_cast<float2*>(to) = make_float2(y[0], y[1]);
    else
        *to = y[0];
}

}  // namespace fiedler::attention_backward_sm90_tile
