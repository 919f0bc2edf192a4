// kernels/attention_forward_packed_sm90.cuh: what a block of the forward pass of scalar-distance attention for sm_90a and
// several scalars keeps, and the weights of its queries (the kernel is in attention_forward_packed_sm90.cu).
//
// Blocks, tiles and the product with V are those of attention_forward_tile_sm90.cuh. Weights are those of attention_forward_stage.cuh, R > 1, with its bounds:
//     p'_ij = exp((E - F_j) - sum_r |a_i^r - b_j^r|)
// from scalars as kernels/attention_packed.cuh packs them. Keys are packed once for all blocks, and lie as a thread reads
// them; their gates are relative to the largest of the tile, G, and a block adds E - G.
//
// Of the second product's rows, warps have the 16s in the opposite order: so each has as much to do where queries meet
// their own tokens (causal).
#pragma once
#include "kernels/attention_forward_tile_sm90.cuh"

namespace fiedler::attention_forward_packed_sm90_tile {

using namespace attention_forward_of_128;

template <int R>
constexpr float kOwnDistance = attention_forward_tile::kOwnDistance<R>;
template <int R>
constexpr float kGateRange = attention_forward_tile::kGateRange<R>;

// Whether scalars are packed two by two (attention_packed.cuh). Of eight, that is a sixth less on the pipe of
// differences and half of the products that make sums of them: on an H200 5 to 7 % of the time at 1,024 tokens, 12 % at
// 4,096. With fewer, exponentials are the limit, and nothing is gained.
template <int R>
constexpr bool kTurned = R == 8;

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
    int bounded;
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
    Tiles<KeyTile<R>> tiles;
    hopper::Barrier full[kStages], empty[kStages];
    __device__ float* tops() { return top; }
};

// A thread's part of the block's queries.
template <int R>
struct Queries : OutputSums<Shared<R>, true> {
    using Base = OutputSums<Shared<R>, true>;
    using Base::M, Base::shared, Base::o, Base::lane, Base::warp, Base::place, Base::row, Base::products, Base::wait;
    using typename Base::Weights, typename Base::Packed, typename Base::Sums;

    const uint2 diagonal = minus_diagonals();
    std::uint32_t x[M][2][R / 2];  // scalars, packed

    __device__ Queries(Shared<R>& s, std::uint32_t base) : Base(s, base) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            hopper::pin(products(m));  // or zeros are made anew on every way from here
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int r = 0; r < R / 2; ++r) x[m][k][r] = shared.packed[row(m, k)][r];
        }
    }

    // Whether add() finds its tile's gates raised: then raise_gates() is for who looks at it.
    static constexpr bool kRaisesAhead = R == 8;

    // Gates of a tile, as the sums of distances begin. above: E - G in base 2.
    __device__ void raise_gates(int stage, float above) {
        __syncwarp();  // those of the tile before have been read
        const int of = lane();
        const float4 x = reinterpret_cast<const float4*>(shared.keys[stage].gate)[of];
        float4* to = shared.gates[warp()] + 2 * of;
        to[0] = {x.x + above, x.y + above, x.x + above, x.y + above};
        to[1] = {x.z + above, x.w + above, x.z + above, x.w + above};
        __syncwarp();
    }
    // A tile within the bounds that every query sees. meanwhile(): while the last products run.
    template <class Meanwhile>
    __device__ void add(int stage, float above, const Meanwhile& meanwhile) {
        if constexpr (!kRaisesAhead) raise_gates(stage, above);
        multiply_seen<0, kKeys>(stage, [&] { wait(); });
        meanwhile();
        wait();
    }
    // The queries' own tokens, of which each sees those up to itself: a triangle of 64 for either product; and the first 64
    // keys, which the second's queries see all.
    __device__ void add_diagonal(int stage, float above) {
        raise_gates(stage, above);
        Sums sum[M] = {};
        multiply_own(sum, stage);
        multiply_seen<1, 64>(stage, [&] {
            wait();
#pragma unroll
            for (int m = 0; m < M; ++m) Base::keep_own_sums(m, sum[m]);
        });
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

    __device__ void finish(const AttentionForward<bf16>& p, int head, int first, bool careful) {
        Base::finish(p, head, first, careful, [&](int i) {
            return careful ? double(shared.top[i]) : double(shared.gate[i]) - double(shared.of.gate);
        });
    }

  private:
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
            for (int k = 0; k < 2; ++k) packed_differences<R>(d[k], y, x[m][k]);
            if constexpr (kTurned<R>)
                turned_scores(s[m][n], d, c, diagonal);
            else
                packed_scores<R, true>(s[m][n], d, c, diagonal);
        }
    }
    // Begins the products from `from` on of a tile's first `keys` keys, which all their queries see. before(): ends the
    // products that are open. Scores are made 8 keys ahead of exponentials, so that a warp has instructions for one pipe
    // while another is busy; products come 32 keys at a time, since the tensor cores lose time with every change between
    // these and those of scores.
    template <int from, int keys, class Before>
    __device__ void multiply_seen(int stage, const Before& before) {
        Weights w[M];
        Packed packed[2][M];
        score<from, M>(w, 0, shared.keys[stage], 0);
#pragma unroll
        for (int eight = 0; eight < keys / 8; ++eight) {
            const int n = eight % 2, chunk = eight / 2;
            if (eight + 1 < keys / 8) score<from, M>(w, 1 - n, shared.keys[stage], eight + 1);
            if (eight == 0)
                before();
            else if (eight % 4 == 0)
                hopper::product_wait<0>();  // operands are free
#pragma unroll
            for (int m = from; m < M; ++m) exponentiate(w[m], n), pack(packed[chunk % 2][m], w[m], n);
            if (eight % 4 == 3)
#pragma unroll
                for (int i = 0; i < 2; ++i) Base::template multiply_chunk<from>(packed[i], stage, chunk - 1 + i);
        }
    }
    // Begins the products of the 64 own keys of either product's 64 queries, of which nothing has been summed yet. Warps whose
    // queries see none of 16 keys have zeros. sum: of weights.
    __device__ void multiply_own(Sums (&sum)[M], int stage) {
        const int of = hopper::uniform(warp());
        wait();
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
            if (chunk > 0) hopper::product_wait<1>();  // the operands before the last ones are free
            Packed packed[M] = {};
            weigh_own<0>(packed[0], sum[0], stage, chunk, of);
            weigh_own<1>(packed[1], sum[1], stage, chunk, kWarps - 1 - of);
            Base::template multiply_chunk<0, 4>(packed, stage, chunk);
        }
    }
    // last: of the 16s of keys, which the warp's queries are.
    template <int m>
    __device__ void weigh_own(Packed& packed, Sums& sum, int stage, int chunk, int last) const {
        if (chunk > 0 && chunk > last) return;
        Weights w[M];
#pragma unroll
        for (int n = 0; n < 2; ++n) score<m, m + 1>(w, n, shared.keys[stage], 2 * (4 * m + chunk) + n);
        if (chunk == last) Base::hide(w[m], 0, -INFINITY);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            exponentiate(w[m], n);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e / 2] += w[m][n][e];
            pack(packed, w[m], n);
        }
    }
    // Half n of 16 keys.
    __device__ static void exponentiate(Weights& w, int n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) w[n][e] = exp2_fast(w[n][e]);
    }
    __device__ static void pack(Packed& packed, const Weights& w, int n) {
        packed[2 * n] = pack_bf16(w[n][0], w[n][1]), packed[2 * n + 1] = pack_bf16(w[n][2], w[n][3]);
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
        Base::template add_scores<m>(s, stage, chunk, diagonal);
    }
};

}  // namespace fiedler::attention_forward_packed_sm90_tile
