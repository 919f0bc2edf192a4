// kernels/attention_forward_sm90.cuh: what a block of the forward pass of scalar-distance attention for sm_90a keeps, and
// the weights of its queries (the kernel is in attention_forward_sm90.cu).
//
// A block is one warpgroup and owns 128 queries of a head, two products of 64 rows; tiles of 128 keys stream through it:
//     o, r += P [V 1]  [64, 72]    A: P, from registers; B: V, 16 keys of 64 columns as they lie in memory, and beside it
//                                  ones, for the sums of the rounded weights
// Of the 64 queries of a product, warp w has 16 w .. 16 w + 15; a thread holds rows g and g + 8 of these and, of each 8
// columns, 2t and 2t + 1.
//
// Weights are p'_ij = min(rho_i u_j, w_j), and what was said in attention_forward_stage.cuh holds, with c the block's. The
// factors are made once for all blocks, relative to the middles of their tile, c' of its scalars and G of its gates, and
// made relative to the block's own c and E by two factors a tile:
//     u_j = exp((b_j - c') + (G - F_j)) exp((c' - c) + (E - G))       w_j likewise with b and c of the other sign
// A tile's factors lie between exp(-kTileSpread) and exp(kTileSpread), or the tile is out of bounds. Neither product of
// 0 and infinity can occur, and one that is 0 because the tile's second factor is (below e^-87.3) has s_ij - s_ii
// < -87.3 + kTileSpread + kRange + kOwnDistance < -kFaded: nothing.
#pragma once
#include "kernels/attention_forward_stage.cuh"
#include "kernels/hopper.cuh"

namespace fiedler::attention_forward_sm90_tile {

using namespace attention_tile;
using attention_forward_tile::exp_of_sum;
using attention_forward_tile::from_ordered;
using attention_forward_tile::largest_of_warp;

constexpr int kWidth = 64, kQueries = 128, kKeys = 128, kProducts = kQueries / 64, kStages = 3,
              kWarps = kThreads / kWarp;
constexpr float kRange = 16.f, kOwnDistance = 24.f, kTileSpread = 22.f;
constexpr float kGateRange = attention_forward_tile::kGateRange<1>;
static_assert(-87.3f + kTileSpread + kRange + kOwnDistance < -kFaded);

// 128 keys of a head, as they lie in AttentionForward::scratch, [tiles of the token axis][heads].
struct alignas(16) KeyTile {
    float2 factors[kKeys];  // of u_j and w_j
    float centre, gate;     // c', G
    float least;            // F
    float spread;           // largest |b_j - c'| + |F_j - G| that there may be; NaN where a number is
};
static_assert(sizeof(KeyTile) == kAttentionForwardTile * sizeof(float) && kKeys == kAttentionForwardKeys);

// What the weights of a block are relative to, the same for all queries.
struct alignas(16) References {
    float centre, gate;  // c, E
    float reach;         // largest F_i + d_i: keys with F_j beyond that + kFaded are nothing
    bool bounded;

    // The tile's second factors.
    __device__ float2 factors(const float4& of_tile) const {
        const float apart = of_tile.x - centre, above = gate - of_tile.y, low = gate - (above + of_tile.y);
        return {exp_of_sum(above, apart, low), exp_of_sum(above, -apart, low)};
    }
};

struct Shared {
    alignas(hopper::kTileAlignment) nv_bf16 values[kStages][kKeys * kWidth];
    nv_bf16 results[kQueries * kWidth];
    nv_bf16 ones[16 * kWidth];
    KeyTile keys[kStages];
    float a[kQueries], gate[kQueries];  // of the queries
    float top[kQueries];                // the running maximum of a query that has one
    float extremes[kWarps][6];          // see refer()
    References references[kWarps];      // each warp's copy; here, since registers are short
    hopper::Barrier full[kStages], empty[kStages];
};

// The numbers of a thread's token, the block's first being `first`.
struct Numbers {
    float a, b, F;
    __device__ Numbers(const AttentionForward<bf16>& p, int head, int first) {
        const std::int64_t token = first + static_cast<int>(threadIdx.x);
        a = p.a.data[token * p.a.ld + head], b = p.b.data[token * p.b.ld + head];
        F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
    }
};
// Fixes the references, and fills a and gate. All threads.
__device__ inline void refer(Shared& shared, const Numbers& of_thread) {
    const int thread = threadIdx.x;
    const float a = of_thread.a, F = of_thread.F, own = fabsf(a - of_thread.b);
    shared.a[thread] = a, shared.gate[thread] = F;
    const float of_lane[6] = {a, -a, F, -F, own, F + own};
#pragma unroll
    for (int i = 0; i < 6; ++i) shared.extremes[thread / kWarp][i] = from_ordered(largest_of_warp(of_lane[i]));
    __syncthreads();
    float most[6];
#pragma unroll
    for (int i = 0; i < 6; ++i) {
        most[i] = shared.extremes[0][i];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) {
            const float x = shared.extremes[w][i];
            most[i] = x > most[i] || x != x ? x : most[i];  // NaN stays
        }
    }
    const float centre = 0.5f * (most[0] - most[1]);
    if (thread % kWarp == 0)
        shared.references[thread / kWarp] = {
            centre, most[2], most[5],
            most[0] - centre <= kRange && most[4] <= kOwnDistance && most[2] + most[3] <= kGateRange};
    __syncwarp();
}

// A thread's part of the block's queries.
struct Queries {
    static constexpr int M = kProducts;
    using Weights = float[M][2][4];  // of 16 queries and 16 keys each: two C tiles
    using Packed = std::uint32_t[M][4];

    Shared& shared;
    float o[M][9][4] = {};  // [8]: sums of the rounded weights
    float sum[M][2] = {};   // of the weights, for lse
    float rho[M][2];

    __device__ Queries(Shared& s, float centre) : shared(s) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) rho[m][k] = expf(-2.f * (shared.a[row(m, k)] - centre));
    }
    struct Factors {  // of two neighbouring keys in each of 16 keys' halves
        float4 of[2];
        __device__ Factors(const Shared& shared, int stage, int chunk) {
            const auto* from = reinterpret_cast<const float4*>(shared.keys[stage].factors) + lane() % 4 + 8 * chunk;
            of[0] = from[0], of[1] = from[4];
        }
    };
    static __device__ int warp() { return static_cast<int>(threadIdx.x) / kWarp; }
    static __device__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
    static __device__ int row(int m, int k) { return 64 * m + 16 * warp() + 8 * k + lane() / 4; }

    __device__ float (&sums(int m))[36] { return reinterpret_cast<float(&)[36]>(o[m]); }
    // Sums may be read and written.
    __device__ void wait() {
        hopper::product_wait<0>();
#pragma unroll
        for (int m = 0; m < M; ++m) hopper::pin(sums(m));
    }

    // A tile within the bounds that every query sees. by: its second factors.
    __device__ void add(int stage, float2 by) {
        Factors next(shared, stage, 0);
#pragma unroll 2
        for (int chunk = 0; chunk < kKeys / 16; ++chunk) {
            const Factors factors = next;
            if (chunk + 1 < kKeys / 16) next = Factors(shared, stage, chunk + 1);
            Weights w;
            weigh<0, M>(w, factors, by);
            hopper::product_wait<1>();  // the operands before the last ones are free
            Packed packed;
            fold<0, M>(packed, w);
            multiply<0, M>(packed, stage, chunk);
        }
    }
    // The queries' own tokens, of which each sees those up to itself: 64 keys of which the first 64 queries see some and the
    // others all, then 64 of which the others see some.
    __device__ void add_diagonal(int stage, float2 by) {
        add_half<0>(stage, by);
        add_half<1>(stage, by);
    }

    // Any tile, with the running maximum. first: its first token; own: that of the block's queries.
    __device__ void add_carefully(const AttentionForward<bf16>& p, int head, int stage, int first, bool diagonal) {
#pragma unroll 1
        for (int chunk = 0; chunk < kKeys / 16; ++chunk) {
            Weights s;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::int64_t token = first + 16 * chunk + i / 2 * 8 + lane() % 4 * 2 + i % 2;
                const float b = p.b.data[token * p.b.ld + head];
                const float F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
#pragma unroll
                for (int m = 0; m < M; ++m)
#pragma unroll
                    for (int k = 0; k < 2; ++k)
                        s[m][i / 2][2 * k + i % 2] = (shared.gate[row(m, k)] - F) - fabsf(shared.a[row(m, k)] - b);
            }
            if (diagonal) {
                hide(s[0], chunk - warp(), -INFINITY);
                hide(s[1], chunk - 4 - warp(), -INFINITY);
            }
            wait();
            soften(s);
            Packed packed;
            fold<0, M>(packed, s);
            multiply<0, M>(packed, stage, chunk);
        }
    }
    // From here on the maximum runs. What has been summed is relative to lambda.
    __device__ void begin_carefully(const References& of, bool summed) {
        __syncwarp();
        if (lane() % 4 == 0)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int i = row(m, k);
                    shared.top[i] = summed ? (shared.a[i] - of.centre) + (shared.gate[i] - of.gate) : -INFINITY;
                }
        __syncwarp();
    }

    // lse, and the outputs to `results` as TMA stores them. careful: the maximum ran.
    __device__ void finish(const AttentionForward<bf16>& p, const References& of, int head, int first, bool careful) {
        float total[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) total[m][k] = row_sum(sum[m][k]);
        // Of the four rows that four lanes share, each has one.
        const int which = lane() % 4, i = row(which / 2, which % 2);
        const double shift =
            careful ? double(shared.top[i]) : (double(shared.gate[i]) - double(of.gate)) + (shared.a[i] - of.centre);
        float mine = total[0][0];
        if (which == 1) mine = total[0][1];
        if (which == 2) mine = total[1][0];
        if (which == 3) mine = total[1][1];
        p.lse.data[std::int64_t(first + i) * p.lse.ld + head] = attention_forward_tile::lse_of(mine, shift);
        const int matrix = lane() / 8, at = row(0, 0) - lane() / 4 + matrix % 2 * 8 + lane() % 8;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float scale[2] = {1.f / o[m][8][0], 1.f / o[m][8][2]};
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const auto pack = [&](int column, int k) {
                    return pack_bf16(o[m][column][2 * k] * scale[k], o[m][column][2 * k + 1] * scale[k]);
                };
                const int to = at + 64 * m, piece = (n + matrix / 2) ^ to % 8;
                hopper::store_matrices(shared.results + to * kWidth + piece * 8, pack(n, 0), pack(n, 1), pack(n + 1, 0),
                                       pack(n + 1, 1));
            }
        }
    }

  private:
    template <int half>
    __device__ void add_half(int stage, float2 by) {
#pragma unroll 1
        for (int c = 0; c < 4; ++c) {
            Weights w;
            weigh<half, M>(w, Factors(shared, stage, 4 * half + c), by);
            if (c >= warp()) hide(w[half], c - warp(), 0.f);
            hopper::product_wait<0>();
            Packed packed;
            fold<half, M>(packed, w);
            multiply<half, M>(packed, stage, 4 * half + c);
        }
    }
    // Weights of the products from `from` to before `to`, likewise below.
    template <int from, int to>
    __device__ void weigh(Weights& w, const Factors& factors, float2 by) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float4 f = factors.of[n];
            f.x *= by.x, f.y *= by.y, f.z *= by.x, f.w *= by.y;
#pragma unroll
            for (int m = from; m < to; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    w[m][n][2 * k] = fminf(rho[m][k] * f.x, f.y);
                    w[m][n][2 * k + 1] = fminf(rho[m][k] * f.z, f.w);
                }
        }
    }
    // The keys of 16 that a query does not see. beyond: by how many 16 tokens they are past the warp's 16 queries.
    __device__ static void hide(float (&w)[2][4], int beyond, float nothing) {
        const int last = lane() / 4 - lane() % 4 * 2 - 16 * beyond;  // of the thread's columns, that its first row sees
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (e / 4 * 8 + e % 2 > last + e % 4 / 2 * 8) w[e / 4][e % 4] = nothing;
    }
    // Scores to weights relative to the running maximum; all sums follow it.
    __device__ void soften(Weights& s) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float& kept = shared.top[row(m, k)];
                float best = -INFINITY;
#pragma unroll
                for (int e = 0; e < 4; ++e) best = fmaxf(best, s[m][e / 2][2 * k + e % 2]);
                const auto [shift, rescale] = raise_top(kept, best);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float& w = s[m][e / 2][2 * k + e % 2];
                    w = exp2_fast((w - shift) * kLog2e);
                }
                sum[m][k] *= rescale;
#pragma unroll
                for (int n = 0; n < 9; ++n) o[m][n][2 * k] *= rescale, o[m][n][2 * k + 1] *= rescale;
            }
    }
    // Weights into their sums, and rounded: A operands.
    template <int from, int to>
    __device__ void fold(Packed& packed, const Weights& w) {
#pragma unroll
        for (int m = from; m < to; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float first = w[m][i / 2][i % 2 * 2], second = w[m][i / 2][i % 2 * 2 + 1];
                sum[m][i % 2] += first;
                sum[m][i % 2] += second;
                packed[m][i] = pack_bf16(first, second);
            }
    }
    template <int from, int to>
    __device__ void multiply(const Packed& packed, int stage, int chunk) {
        // The upper half of an operand is the same for all: fewer instructions than adding to 64 bits.
        const std::uint64_t values = hopper::beside(shared.values[stage], shared.ones);
        const std::uint64_t b = values >> 32 << 32 | (static_cast<std::uint32_t>(values) + chunk * hopper::kBesideStep);
        hopper::product_begin();
#pragma unroll
        for (int m = from; m < to; ++m) {
            hopper::multiply_registers(sums(m), packed[m], b, true);
        }
        hopper::product_commit();
    }
};

}  // namespace fiedler::attention_forward_sm90_tile
