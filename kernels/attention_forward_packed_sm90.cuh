// kernels/attention_forward_packed_sm90.cuh: what a block of the forward pass of scalar-distance attention for sm_90a and
// several scalars keeps, and the weights of its queries (the kernel is in attention_forward_packed_sm90.cu).
//
// Blocks, tiles and the product with V are those of attention_forward_sm90.cuh, one scalar: a warpgroup, 128 queries,
// tiles of 128 keys, P from registers. Weights are those of attention_forward_stage.cuh, R > 1, with its bounds:
//     p'_ij = exp((E - F_j) - sum_r |a_i^r - b_j^r|)
// from scalars as kernels/attention_packed.cuh packs them. Keys are packed once for all blocks, and lie as a thread reads
// them; their gates are relative to the largest of the tile, G, and a block adds E - G.
//
// Of the second product's rows, warps have the 16s in the opposite order: so each has as much to do where queries meet
// their own tokens (causal).
#pragma once
#include "kernels/attention_forward_stage.cuh"
#include "kernels/hopper.cuh"

namespace fiedler::attention_forward_packed_sm90_tile {

using namespace attention_tile;
using attention_forward_tile::from_ordered;
using attention_forward_tile::largest_of_warp;

constexpr int kWidth = 64, kQueries = 128, kKeys = 128, kProducts = kQueries / 64, kStages = 3,
              kWarps = kThreads / kWarp;
template <int R>
constexpr float kOwnDistance = attention_forward_tile::kOwnDistance<R>;
template <int R>
constexpr float kGateRange = attention_forward_tile::kGateRange<R>;

// 128 keys of a head, packed.
template <int R>
struct alignas(16) KeyTile {
    static constexpr int kFours = (R + 3) / 4, kOfFour = R < 4 ? R : 4;
    std::uint32_t packed[kKeys / 8][kFours][4][kOfFour];  // of each eight and each t: scalars of keys 2t and 2t + 1
    float gate[kKeys];                                    // G - F_j, in base 2
    float most, least;                                    // F: G, and the least; -infinity: a scalar is out of range
    float none[2];
};
// As they lie in AttentionForward::scratch, [tiles of the token axis][heads].
static_assert(sizeof(KeyTile<8>) == attention_packed_tile(8) * sizeof(float) &&
              sizeof(KeyTile<4>) == attention_packed_tile(4) * sizeof(float) &&
              sizeof(KeyTile<2>) == attention_packed_tile(2) * sizeof(float) && kKeys == kAttentionForwardKeys);

// What the weights of a block are relative to, the same for all queries.
struct alignas(16) References {
    float gate;   // E
    float reach;  // largest F_i + d_i: keys with F_j beyond that + kFaded are nothing
    bool bounded;
};

// The tiles of keys that a block sees, in its order: number k is `last` - k of the token axis.
template <int R>
struct Tiles {
    const KeyTile<R>* data;  // of the head and the token axis' first tile
    const CUtensorMap* values;
    int heads, head, last, count;
    int first;  // token of the block's queries

    __device__ const KeyTile<R>& operator()(int k) const { return data[std::int64_t(last - k) * heads]; }
    __device__ float least(int k) const { return (*this)(k).least; }
    __device__ int first_token(int k) const { return (last - k) * kKeys; }
};

// What is the same for all threads, or needed now and then, is here since registers are short.
template <int R>
struct Shared {
    alignas(hopper::kTileAlignment) nv_bf16 values[kStages][kKeys * kWidth];  // at the end the first is of results
    nv_bf16 ones[16 * kWidth];
    KeyTile<R> keys[kStages];
    alignas(16) std::uint32_t packed[kQueries][R / 2];  // a, two scalars each
    float gate[kQueries];                               // F
    float4 gates[kWarps][kKeys / 2];                    // E - F of two keys in base 2, twice; of each warp for itself
    float top[kQueries];                                // the running maximum of a query that has one
    // For lse: what the sum of a query's rounded weights lacks of that of its weights; with a running maximum, all of it.
    float sum[kQueries];
    int extremes[kWarps][5];
    References of;
    Tiles<R> tiles;
    hopper::Barrier full[kStages], empty[kStages];
};

// A thread's part of the block's queries.
template <int R>
struct Queries {
    static constexpr int M = kProducts;
    using Weights = float[2][4];  // of 16 queries and 16 keys: two C tiles
    using Packed = std::uint32_t[4];
    using Sums = float[2];  // of the thread's two rows of a product

    Shared<R>& shared;
    const uint2 diagonal = minus_diagonals();
    std::uint32_t x[M][2][R / 2];  // scalars, packed
    float o[M][9][4] = {};         // [8]: sums of the rounded weights

    __device__ explicit Queries(Shared<R>& s) : shared(s) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            hopper::pin(products(m));  // or zeros are made anew on every way from here
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int r = 0; r < R / 2; ++r) x[m][k][r] = shared.packed[row(m, k)][r];
        }
    }
    static __device__ int warp() { return attention_forward_tile::thread_number() / kWarp; }
    static __device__ int lane() { return attention_forward_tile::thread_number() % kWarp; }
    // Which 16 of the product's rows the warp has.
    static __device__ int place(int m) { return m == 0 ? warp() : kWarps - 1 - warp(); }
    static __device__ int row(int m, int k) { return 64 * m + 16 * place(m) + 8 * k + lane() / 4; }

    __device__ float (&products(int m))[36] { return reinterpret_cast<float(&)[36]>(o[m]); }
    // Sums may be read and written.
    __device__ void wait() {
        hopper::product_wait<0>();
#pragma unroll
        for (int m = 0; m < M; ++m) hopper::pin(products(m));
    }

    // A tile within the bounds that every query sees. above: E - G in base 2.
    __device__ void add(int stage, float above) {
        raise_gates(stage, above);
        multiply_seen<0, kKeys>(stage);
        wait();
    }
    // The queries' own tokens, of which each sees those up to itself: a triangle of 64 for either product, by products of
    // a warp alone, which need no more keys than the warp's queries do; and the first 64 keys, which the others see all.
    __device__ void add_diagonal(int stage, float above) {
        raise_gates(stage, above);
        add_triangle<1>(stage);
        multiply_seen<1, 64>(stage);
        add_triangle<0>(stage);
        wait();
    }

    // Any tile, with the running maximum. first: its first token.
    __device__ void add_carefully(const AttentionForward<bf16>& p, int head, int stage, int first, bool diagonal) {
#pragma unroll 1
        for (int chunk = 0; chunk < kKeys / 16; ++chunk) {
            add_chunk_carefully<0>(p, head, stage, chunk, first, diagonal);
            add_chunk_carefully<1>(p, head, stage, chunk, first, diagonal);
        }
    }
    // From here on the maximum runs. What has been summed is relative to F_i - E.
    __device__ void begin_carefully(bool summed) {
        __syncwarp();
        if (lane() % 4 == 0)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int i = row(m, k);
                    shared.top[i] = summed ? shared.gate[i] - shared.of.gate : -INFINITY;
                    shared.sum[i] += o[m][8][2 * k];
                }
        __syncwarp();
    }

    // lse, and the outputs into shared memory as TMA stores them. careful: the maximum ran.
    __device__ void finish(const AttentionForward<bf16>& p, int head, int first, bool careful) {
        // Of the four rows that four lanes share, each has one.
        const int of_warp = lane(), which = of_warp % 4, i = row(which / 2, which % 2);
        float rounded = o[0][8][0];
        if (which == 1) rounded = o[0][8][2];
        if (which == 2) rounded = o[1][8][0];
        if (which == 3) rounded = o[1][8][2];
        const float total = careful ? shared.sum[i] : shared.sum[i] + rounded;
        const double shift = careful ? double(shared.top[i]) : double(shared.gate[i]) - double(shared.of.gate);
        p.lse.data[std::int64_t(first + i) * p.lse.ld + head] = attention_forward_tile::lse_of(total, shift);
        __syncthreads();  // the products of all warps are over: values become results
        const int matrix = of_warp / 8, at = matrix % 2 * 8 + of_warp % 8;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float scale[2] = {__fdividef(1.f, o[m][8][0]), __fdividef(1.f, o[m][8][2])};
            const int to = 64 * m + 16 * place(m) + at;
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const auto pack = [&](int column, int k) {
                    return pack_bf16(o[m][column][2 * k] * scale[k], o[m][column][2 * k + 1] * scale[k]);
                };
                const int piece = (n + matrix / 2) ^ to % 8;
                hopper::store_matrices(shared.values[0] + to * kWidth + piece * 8, pack(n, 0), pack(n, 1),
                                       pack(n + 1, 0), pack(n + 1, 1));
            }
        }
    }

  private:
    // Sums of whole rows.
    __device__ void keep_sums(int m, const Sums& x) {
        if (lane() % 4 == 0)
#pragma unroll
            for (int k = 0; k < 2; ++k) shared.sum[row(m, k)] = x[k];
        __syncwarp();
    }
    // Gates of a tile, as the sums of distances begin.
    __device__ void raise_gates(int stage, float above) {
        __syncwarp();  // those of the tile before have been read
        const int of = lane();
        const float4 x = reinterpret_cast<const float4*>(shared.keys[stage].gate)[of];
        float4* to = shared.gates[warp()] + 2 * of;
        to[0] = {x.x + above, x.y + above, x.x + above, x.y + above};
        to[1] = {x.z + above, x.w + above, x.z + above, x.w + above};
        __syncwarp();
    }
    // Scores in base 2 of 8 keys, for the products from `from` to `to`: half n of 16.
    template <int from, int to>
    __device__ void score(Weights (&s)[M], int n, const KeyTile<R>& tile, int eight) const {
        const int t = lane() % 4;
        std::uint32_t y[R];
        if constexpr (R == 2) {
            const uint2 two = *reinterpret_cast<const uint2*>(tile.packed[eight][0][t]);
            y[0] = two.x, y[1] = two.y;
        } else {
#pragma unroll
            for (int r = 0; r < R; r += 4) {
                const uint4 four = *reinterpret_cast<const uint4*>(tile.packed[eight][r / 4][t]);
                y[r] = four.x, y[r + 1] = four.y, y[r + 2] = four.z, y[r + 3] = four.w;
            }
        }
        const float4 gates = shared.gates[warp()][4 * eight + t];
        const float c[4] = {gates.x, gates.y, gates.z, gates.w};
#pragma unroll
        for (int m = from; m < to; ++m) {
            std::uint32_t d[2][R];
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int r = 0; r < R; r += 2) {
                    d[k][r] = difference2(y[r], twice_low(x[m][k][r / 2]));
                    d[k][r + 1] = difference2(y[r + 1], twice_high(x[m][k][r / 2]));
                }
            packed_scores<R, true>(s[m][n], d, c, diagonal);
        }
    }
    __device__ static void exponentiate(Weights& w) {
#pragma unroll
        for (int e = 0; e < 8; ++e) w[e / 4][e % 4] = exp2_fast(w[e / 4][e % 4]);
    }
    // Begins the products from `from` on of a tile's first `keys` keys, which all their queries see.
    template <int from, int keys>
    __device__ void multiply_seen(int stage) {
        wait();
#pragma unroll
        for (int chunk = 0; chunk < keys / 16; ++chunk) {
            Weights w[M];
            score<from, M>(w, 0, shared.keys[stage], 2 * chunk);
            score<from, M>(w, 1, shared.keys[stage], 2 * chunk + 1);
#pragma unroll
            for (int m = from; m < M; ++m) exponentiate(w[m]);
            if (chunk > 0) hopper::product_wait<1>();  // the operands before the last ones are free
            Packed packed[M];
#pragma unroll
            for (int m = from; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    packed[m][i] = pack_bf16(w[m][i / 2][i % 2 * 2], w[m][i / 2][i % 2 * 2 + 1]);
            // The upper half of an operand is the same for all: fewer instructions than adding to 64 bits.
            const std::uint64_t first = hopper::beside(shared.values[stage], shared.ones);
            const std::uint64_t b =
                first >> 32 << 32 | (static_cast<std::uint32_t>(first) + chunk * hopper::kBesideStep);
            hopper::product_begin();
#pragma unroll
            for (int m = from; m < M; ++m) hopper::multiply_registers(products(m), packed[m], b, true);
            hopper::product_commit();
        }
    }
    // The 64 own keys of a product's 64 queries. Nothing has been summed for these yet.
    template <int m>
    __device__ void add_triangle(int stage) {
        const int last = place(m);  // 16 keys of which the warp's queries see some
        Sums sum = {};
#pragma unroll 1
        for (int chunk = 0; chunk <= last; ++chunk) {
            Weights w[M];
#pragma unroll
            for (int n = 0; n < 2; ++n) score<m, m + 1>(w, n, shared.keys[stage], 2 * (4 * m + chunk) + n);
            if (chunk == last) hide(w[m], 0);
            exponentiate(w[m]);
            multiply_in_warp<m>(w[m], sum, stage, 4 * m + chunk);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[k] = row_sum(sum[k]) - o[m][8][2 * k];
        keep_sums(m, sum);
    }
    // The keys of 16 that a query does not see. beyond: by how many 16 tokens they are past the warp's 16 queries.
    __device__ static void hide(Weights& w, int beyond) {
        const int of = lane(),
                  last = of / 4 - of % 4 * 2 - 16 * beyond;  // of the thread's columns, that its first row sees
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (e / 4 * 8 + e % 2 > last + e % 4 / 2 * 8) w[e / 4][e % 4] = -INFINITY;
    }
    template <int m>
    __device__ void add_chunk_carefully(const AttentionForward<bf16>& p, int head, int stage, int chunk, int first,
                                        bool diagonal) {
        Weights s = {};
        const int of = lane();
#pragma unroll 1
        for (int r = 0; r < p.scalars; ++r) {
            float a[2];
#pragma unroll
            for (int k = 0; k < 2; ++k)
                a[k] = p.a.data[std::int64_t(shared.tiles.first + row(m, k)) * p.a.ld + head * p.scalars + r];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const std::int64_t token = first + 16 * chunk + i / 2 * 8 + of % 4 * 2 + i % 2;
                const float b = p.b.data[token * p.b.ld + head * p.scalars + r];
#pragma unroll
                for (int k = 0; k < 2; ++k) s[i / 2][2 * k + i % 2] += fabsf(a[k] - b);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::int64_t token = first + 16 * chunk + i / 2 * 8 + of % 4 * 2 + i % 2;
            const float F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float& x = s[i / 2][2 * k + i % 2];
                x = (shared.gate[row(m, k)] - F) - x;
            }
        }
        if (diagonal) hide(s, chunk - 4 * m - place(m));
        Sums sum = {}, before;
        soften<m>(before, s);
        multiply_in_warp<m>(s, sum, stage, chunk);
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[k] = before[k] + row_sum(sum[k]);
        keep_sums(m, sum);
    }
    // Scores to weights relative to the running maximum; all sums follow it, those of weights to `before`.
    template <int m>
    __device__ void soften(Sums& before, Weights& s) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float& kept = shared.top[row(m, k)];
            float best = -INFINITY;
#pragma unroll
            for (int e = 0; e < 4; ++e) best = fmaxf(best, s[e / 2][2 * k + e % 2]);
            const auto [shift, rescale] = raise_top(kept, best);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float& w = s[e / 2][2 * k + e % 2];
                w = exp2_fast((w - shift) * kLog2e);
            }
            before[k] = shared.sum[row(m, k)] * rescale;
#pragma unroll
            for (int n = 0; n < 9; ++n) o[m][n][2 * k] *= rescale, o[m][n][2 * k + 1] *= rescale;
        }
    }
    // Adds weights to their sums and, rounded, times 16 keys' values, at once: no product of the warpgroup may be open.
    template <int m>
    __device__ void multiply_in_warp(const Weights& w, Sums& sum, int stage, int chunk) {
        Packed packed;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float first = w[i / 2][i % 2 * 2], second = w[i / 2][i % 2 * 2 + 1];
            sum[i % 2] += first;
            sum[i % 2] += second;
            packed[i] = pack_bf16(first, second);
        }
        const int of = lane();
        const nv_bf16* from = shared.values[stage] + (16 * chunk + of % 16) * kWidth;
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            std::uint32_t b[4];
            ldmatrix_x4_trans(b, from + ((n + of / 16) ^ of % 8) * 8);
            mma_bf16(o[m][n], packed, b[0], b[1]);
            mma_bf16(o[m][n + 1], packed, b[2], b[3]);
        }
        constexpr std::uint32_t kTwoOnes = 0x3f803f80u;  // bf16
        mma_bf16(o[m][8], packed, kTwoOnes, kTwoOnes);
    }
};

}  // namespace fiedler::attention_forward_packed_sm90_tile
