// kernels/attention_backward_sm90.cuh: the backward pass of scalar-distance attention with four scalars for sm_90a: operands
// and the arithmetic of a tile (the kernel is in attention_backward_sm90.cu; one scalar: attention_backward_one_sm90.cuh).
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
#include "kernels/attention_backward_tile_sm90.cuh"

namespace fiedler::attention_backward_sm90_tile {

constexpr int R = 4;  // scalars of a head
constexpr int kKeys = tuning::attention_backward_sm90(R).keys, kBlocks = tuning::attention_backward_sm90(R).blocks;
constexpr int kColumns = kKeys / 4, kStages = 3;  // columns: of a thread

// ---- shared memory -----------------------------------------------------------------------------------------------
struct alignas(16) QueryNumbers {
    float lse, delta, gate, unused;
};
struct Shared {
    nv_bf16 gradients[kStages][kTileElements];  // dO; tiles at multiples of 1024 bytes
    nv_bf16 weights[2][kKeys * kTile];          // turned; at the end dv
    nv_bf16 values[kKeys * kWidth];             // V
    alignas(128) float a[kStages][kTile * R];   // [query][R]
    QueryNumbers numbers[kStages][kTile];
    float b[kKeys * R];            // see Keys::differences
    float gate[kKeys];             // what the weights of a key are relative to
    float scale[kKeys];            // D_j
    float most[kThreads / kWarp];  // G - F_j of the warps' keys
    // What would stay in registers from tile to tile without need. centre: G; faded: below this, the gate alone makes a
    // query's weights nothing for the keys; numbers_of: see QueryLoads; careful_end: see Range.
    volatile float centre, faded;
    volatile int careful_end;
    volatile unsigned long long numbers_of[kThreads];
    float sums[kThreads / kWarp][4][kColumns * (R + 1)];  // of the warps' lanes t, at the end
    hopper::Barrier full[kStages];                        // dO and a are there, and V with a tile of keys' first dO
};

// A place in the ring of stages, and the parity that its barrier is waited for with.
struct Ring {
    int stage = 0, parity = 0;
    __device__ Ring next() const {
        const bool wraps = stage == kStages - 1;
        return {wraps ? 0 : stage + 1, parity ^ int(wraps)};
    }
};

// The numbers of 64 queries at a time. A warp has one of lse, delta, F for all of them. Where a thread's next ones are is
// kept in shared memory.
struct QueryLoads {
    __device__ static void begin(const AttentionBackward<bf16>& p, Shared& shared, int head, int first) {
        const int thread = thread_anew(), warp = thread / kWarp;
        const float* number = warp == 0 ? p.lse.data : warp == 1 ? p.delta.data : warp == 2 ? p.F.data : nullptr;
        if (number != nullptr) number += std::int64_t(first + thread % kWarp) * p.heads + head;
        shared.numbers_of[thread] = reinterpret_cast<unsigned long long>(number);
    }
    __device__ static void start(const AttentionBackward<bf16>& p, Shared& shared, int stage, int head, int first) {
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

// ---- a thread's part of the tile ---------------------------------------------------------------------------------
struct Keys {
    static constexpr int N = kKeys, C = kColumns;
    float dv[N / 2] = {}, dp[N / 2];
    float scale[C], db[C][R] = {}, total[C] = {};  // D_j; sums of step ds, and of ds
    bool careful = false;

    __device__ static int column(int c) { return c / 2 * 8 + lane_of_row() * 2 + c % 2; }

    // b and F of the keys, a thread for each of them; then each thread has the scale of its columns. Ends without a barrier.
    __device__ void begin(const AttentionBackward<bf16>& p, Shared& shared, int head, int first) {
        const bool gated = p.F.data != nullptr;
        const int thread = thread_anew(), key = thread % N;
        const float* F = p.F.data + head + first * p.F.ld;
        const float* from = p.b.data + first * p.b.ld + head * R;
        float centre = 0.f, gate = 0.f;
        if (gated) centre = F[N / 2 * p.F.ld], gate = F[key * p.F.ld];
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
        for (int i = thread; i < N * R; i += kThreads) {
            const int of = i / R, r = i % R;
            shared.b[r / 2 * 2 * N + of * 2 + r % 2] = from[of * p.b.ld + r];
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < C; c += 2) {
            const float2 x = *reinterpret_cast<const float2*>(shared.scale + column(c));
            scale[c] = x.x, scale[c + 1] = x.y;
        }
    }

    // What a thread's two rows need, which is there before dP is.
    struct Base {
        float base[2], delta[2];  // relative to G in base 2
        __device__ Base(const Shared& shared, int stage, int row) {
            const float centre = shared.centre;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const QueryNumbers x = shared.numbers[stage][row + 8 * k];
                base[k] = ((x.gate - centre) - x.lse) * kLog2e, delta[k] = x.delta;
            }
        }
    };

    // d = a - b for the columns c, c + 1 of a row.
    __device__ void differences(float (&d)[2][R], const float (&a)[R], const Shared& shared, int c) const {
        const float* of = shared.b + 2 * column(c);
#pragma unroll
        for (int r = 0; r < R; r += 2) {
            const float4 y = *reinterpret_cast<const float4*>(of + r / 2 * 2 * N);
            d[0][r] = a[r] - y.x, d[0][r + 1] = a[r + 1] - y.y;
            d[1][r] = a[r] - y.z, d[1][r + 1] = a[r + 1] - y.w;
        }
    }
    // c_i - sum |d|, in base 2.
    __device__ static float score(const float (&d)[R], float base) {
        float sum = fabsf(d[0]) + fabsf(d[1]);
#pragma unroll
        for (int r = 2; r < R; ++r) sum += fabsf(d[r]);
        return fmaf(sum, -kLog2e, base);
    }

    // dP of the thread's rows, of which `row` is the first, to weights and into all sums. to: the lane's place in the turned
    // weights; rows: sums of - sign ds along rows, over the thread's columns. kCareful: row i sees keys up to i + shift, and
    // keys may have gates of their own.
    template <bool kCareful>
    __device__ void add(float (&rows)[2][R], const Shared& shared, int stage, std::uint32_t to, int row, int shift,
                        const Base& of_rows) {
        const QueryNumbers* const of = shared.numbers[stage];
        const float faded = shared.faded;
        float a[2][R], base[2], delta[2], all[2] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            base[k] = of_rows.base[k], delta[k] = of_rows.delta[k];
#pragma unroll
            for (int r = 0; r < R; ++r) a[k][r] = shared.a[stage][(row + 8 * k) * R + r], rows[k][r] = 0.f;
        }
        if (!__any_sync(0xffffffffu, !(base[0] < faded) || !(base[1] < faded))) {
            __syncwarp();  // a branch, not predicates
#pragma unroll
            for (int n = 0; n < N / 16; ++n) store_turned(to + n * 16 * kRowBytes, 0u, 0u, 0u, 0u);
            return;
        }
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            std::uint32_t packed[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int c = 2 * (n + m);
                    float d[2][R], q[2];
                    differences(d, a[k], shared, c);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        float of_row = base[k];
                        if constexpr (kCareful) {
                            const int i = row + 8 * k, key = column(c + j);
                            of_row = ((of[i].gate - shared.gate[key]) - of[i].lse) * kLog2e;
                            if (key > i + shift) of_row = -INFINITY;
                        }
                        q[j] = exp2_fast(score(d[j], of_row));
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
    }

    // dv, db, dF. All products are over, for all warps.
    __device__ void store(const AttentionBackward<bf16>& p, Shared& shared, int head, int first) {
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
    __device__ static void write(const AttentionBackward<bf16>& p, const Shared& shared, int head, int first) {
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

// Sums over the four lanes t of a row; a lane has some of them. Of row g + 8 (t % 2), scalars from R / 2 (t / 2) on, by
// exchanges between lanes.
struct RowSums {
    static constexpr int kCount = R / 2;
    float x[kCount];
    __device__ explicit RowSums(const float (&rows)[2][R]) {
        const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
        float y[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float keep = odd ? rows[1][r] : rows[0][r], send = odd ? rows[0][r] : rows[1][r];
            y[r] = keep + __shfl_xor_sync(0xffffffffu, send, 1);
        }
#pragma unroll
        for (int r = 0; r < R / 2; ++r) {
            const float keep = upper ? y[r + R / 2] : y[r], send = upper ? y[r] : y[r + R / 2];
            x[r] = keep + __shfl_xor_sync(0xffffffffu, send, 2);
        }
    }
    // Where the lane's begin among those of the tile's rows; row: the first of the thread's.
    __device__ static int offset(int row) {
        const int t = lane_of_row();
        return (row + t % 2 * 8) * R + t / 2 * kCount;
    }
};
static_assert(RowSums::kCount == 2);
// What an earlier tile of keys left in the slab; to it the lane's sums are added.
__device__ inline float2 load_sums(const float* from, bool any) {
    return any ? *reinterpret_cast<const float2*>(from) : make_float2(0.f, 0.f);
}
__device__ inline void store_sums(float* to, const float2& before, const RowSums& sums) {
    *reinterpret_cast<float2*>(to) = make_float2(before.x + sums.x[0], before.y + sums.x[1]);
}

}  // namespace fiedler::attention_backward_sm90_tile
