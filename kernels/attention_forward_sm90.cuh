// kernels/attention_forward_sm90.cuh: what a block of the forward pass of scalar-distance attention for sm_90a keeps, and
// the weights of its queries (the kernel is in attention_forward_sm90.cu).
//
// Blocks, tiles and the product with V are those of attention_forward_tile_sm90.cuh.
//
// Weights are p'_ij = min(rho_i u_j, w_j), and what was said in attention_forward_stage.cuh holds, with c the block's. The
// factors are made once for all blocks, relative to the middles of their tile, c' of its scalars and G of its gates, and
// made relative to the block's own c and E by two factors a tile:
//     u_j = exp((b_j - c') + (G - F_j)) exp((c' - c) + (E - G))       w_j likewise with b and c of the other sign
// c, c', E, G are multiples of ln 2, so that the second factors are powers of 2 and round nothing.
// A tile's factors lie between exp(-kTileSpread) and exp(kTileSpread), or the tile is out of bounds. Neither product of
// 0 and infinity can occur, and one that is 0 because the tile's second factor is (below e^-87.3), or that factor times
// rho_i, has s_ij - s_ii < -87.3 + kTileSpread + kRange + kOwnDistance < -kFaded: nothing.
//
// Two weights at once, in bf16 (it has the range of f32): u_j, w_j and rho_i are rounded to it, and a weight is one
// multiplication and one minimum for two neighbouring keys, which are an operand of the product as they come. The cost:
//   rho_i  is the factor of a scalar at most 2^-10 from a_i: the query is computed as if it stood there, with lambda_i of
//          there, on all keys.
//   u_j, w_j and rho_i u_j are rounded by 2^-9 at most, each; what is summed for lse are the rounded weights.
// So lse is within 2^-10 + 2^-8 of the true one; typically the roundings of keys average out and 2^-11 is left. o is
// divided by the sum of the same weights.
// The 64 own keys of a product's queries (causal), where a query may see few, have factors and weights in f32, and are
// summed so for lse. The running maximum likewise, with a_i as it is.
#pragma once
#include "kernels/attention_forward_tile_sm90.cuh"

namespace fiedler::attention_forward_sm90_tile {

using namespace attention_forward_of_128;

constexpr float kRange = 16.f, kOwnDistance = 24.f, kTileSpread = 22.f;
constexpr float kGateRange = attention_forward_tile::kGateRange<1>;
static_assert(-87.3f + kTileSpread + kRange + kOwnDistance < -kFaded);

// Multiples of ln 2, in f32 without loss as long as they are below 2^24 in number: x - count ln 2.
__device__ inline float beyond(float x, float count) {
    constexpr float kLn2Low = -1.9046543e-9f;  // ln 2 - kLn2
    return fmaf(-count, kLn2Low, fmaf(-count, kLn2, x));
}
// exp(sign (x - count_x ln 2) + (count_y ln 2 - y)) to 2 ulp or so: what rounding takes from the arguments in base 2 is
// made good.
__device__ inline float factor_of(float sign, float x, float count_x, float count_y, float y) {
    constexpr float kLog2eLow = 1.92596299e-8f;  // log2 e - kLog2e
    const float x2 = x * kLog2e, y2 = y * kLog2e;
    const float low = sign * fmaf(x, kLog2eLow, fmaf(x, kLog2e, -x2)) - fmaf(y, kLog2eLow, fmaf(y, kLog2e, -y2));
    const float first = sign * (x2 - count_x), second = count_y - y2, sum = first + second;
    const float of_second = sum - first, lost = (first - (sum - of_second)) + (second - of_second) + low;
    const float power = exp2_fast(sum);
    return fmaf(power * kLn2, lost, power);
}

// 128 keys of a head, ready for products: of each 16, and of each t, the keys 2t, 2t + 1, 8 + 2t, 9 + 2t.
struct alignas(16) KeyTile {
    uint4 pairs[kKeys / 4];  // u_j of the first two, w_j of these, and of the other two likewise; bf16
    float centre, gate;      // c', G in ln 2
    float least;             // F
    float spread;            // largest |b_j - c'| + |F_j - G| that there may be; NaN where a number is
};
// What the weights of a block are relative to, the same for all queries.
struct alignas(16) References {
    float centre, gate;  // c, E in ln 2
    float reach;         // largest F_i + d_i: keys with F_j beyond that + kFaded are nothing
    int bounded;
};
// The same tokens as a block's own: keys, and queries.
struct alignas(16) OwnTile {
    References of;
    std::uint32_t rho[kQueries];  // bf16, twice
    float top[kQueries];          // lambda_i; the running maximum of a query that has one
    float2 factors[kKeys];        // u_j and w_j in f32
};
// As they lie in AttentionForward::scratch, [tiles of the token axis][heads].
struct alignas(16) StoredTile {
    KeyTile keys;
    OwnTile own;
};
static_assert(sizeof(StoredTile) == kAttentionForwardTile * sizeof(float) && kKeys == kAttentionForwardKeys &&
              kQueries == kKeys);

// Two bf16 at once. A number and NaN: the number, as fminf.
__device__ inline std::uint32_t multiply_two(std::uint32_t x, std::uint32_t y) {
    std::uint32_t z;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ inline std::uint32_t least_two(std::uint32_t x, std::uint32_t y) {
    std::uint32_t z;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}
__device__ inline std::uint32_t twice(float x) { return pack_bf16(x, x); }
__device__ inline float first_of_two(std::uint32_t x) { return __uint_as_float(x << 16); }

// A tile's second factors, powers of 2, each twice.
struct Powers {
    std::uint32_t u, w;
    __device__ Powers(const References& of, const float4& of_tile) {
        const float apart = of_tile.x - of.centre, above = of.gate - of_tile.y;
        u = twice(exp2_fast(above + apart)), w = twice(exp2_fast(above - apart));
    }
};

// What is the same for all threads, or needed now and then, is here since registers are short.
struct Shared {
    alignas(hopper::kTileAlignment) nv_bf16 values[kStages][kKeys * kWidth];  // at the end the first is of results
    nv_bf16 ones[16 * kWidth];
    KeyTile keys[kStages];
    OwnTile own;
    float a[kQueries], gate[kQueries];  // of queries that have a running maximum
    // For lse: what the sum of a query's rounded weights lacks of that of its weights; with a running maximum, all of it.
    float sum[kQueries];
    Tiles<StoredTile> tiles;
    hopper::Barrier full[kStages], empty[kStages];
    __device__ float* tops() { return own.top; }
};

// A thread's part of the block's queries.
struct Queries : OutputSums<Shared, false> {
    std::uint32_t of_pairs, of_rho;  // base, and where the thread's own begin

    __device__ Queries(Shared& s, std::uint32_t base_) : OutputSums(s, base_) {
        of_pairs = base + lane() % 4 * unsigned(sizeof(uint4)), of_rho = base + row(0, 0) * unsigned(sizeof(float));
#pragma unroll
        for (int m = 0; m < M; ++m) hopper::pin(products(m));  // or zeros are made anew on every way from here
    }

    // A tile within the bounds that every query sees.
    __device__ void add(int stage, const Powers& by) {
        multiply_seen<0, kKeys>(stage, by);
        wait();
    }
    // The queries' own tokens, of which each sees those up to itself: a triangle of 64 for either product, by products of
    // a warp alone, which need no more keys than the warp's queries do; and the first 64 keys, which the others see all.
    __device__ void add_diagonal(int stage, const Powers& by) {
        add_triangle<1>(stage, by);
        multiply_seen<1, 64>(stage, by);
        add_triangle<0>(stage, by);
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
    // From here on the maximum runs. What has been summed is relative to lambda.
    __device__ void begin_carefully(const AttentionForward<bf16>& p, int head, int first, bool summed) {
        __syncwarp();
        const int lane_ = lane(), query = lane_ / 16 * 64 + warp() * 16 + lane_ % 16;  // of the warp's 32
        const std::int64_t token = first + query;
        shared.a[query] = p.a.data[token * p.a.ld + head];
        shared.gate[query] = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
        if (!summed) shared.own.top[query] = -INFINITY;
        if (lane_ % 4 == 0)
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) shared.sum[row(m, k)] += o[m][8][2 * k];
        __syncwarp();
    }

    __device__ void finish(const AttentionForward<bf16>& p, int head, int first, bool careful) {
        OutputSums::finish(p, head, first, careful, [&](int i) { return double(shared.own.top[i]); });
    }

  private:
    // Begins the products from `from` on of a tile's first `keys` keys, which all their queries see.
    template <int from, int keys>
    __device__ void multiply_seen(int stage, const Powers& by) {
        constexpr int kRho = offsetof(Shared, own) + offsetof(OwnTile, rho),
                      kPairs = offsetof(Shared, keys) + offsetof(KeyTile, pairs);
        const std::uint32_t rho[M][2] = {
            {from == 0 ? hopper::load_word<kRho>(of_rho) : 0u,
             from == 0 ? hopper::load_word<kRho + 8 * 4>(of_rho) : 0u},
            {hopper::load_word<kRho + 64 * 4>(of_rho), hopper::load_word<kRho + 72 * 4>(of_rho)}};
        std::uint32_t of_rows[M][2];
#pragma unroll
        for (int m = from; m < M; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) of_rows[m][k] = multiply_two(rho[m][k], by.u);
        const std::uint32_t pairs = of_pairs + stage * unsigned(sizeof(KeyTile));
        uint4 next = hopper::load_four_words<kPairs>(pairs);
        wait();
#pragma unroll
        for (int chunk = 0; chunk < keys / 16; ++chunk) {
            const std::uint32_t u[2] = {next.x, next.z},
                                w[2] = {multiply_two(next.y, by.w), multiply_two(next.w, by.w)};
            if (chunk + 1 < keys / 16)
                next = hopper::load_four_words<kPairs>(pairs + 4 * (chunk + 1) * unsigned(sizeof(uint4)));
            if (chunk > 0) hopper::product_wait<1>();  // the operands before the last ones are free
            Packed packed[M];
#pragma unroll
            for (int m = from; m < M; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    packed[m][i] = least_two(multiply_two(of_rows[m][i % 2], u[i / 2]), w[i / 2]);
            multiply_chunk<from>(packed, stage, chunk);
        }
    }
    // The 64 own keys of a product's 64 queries, with weights in f32. Nothing has been summed for these yet.
    template <int m>
    __device__ void add_triangle(int stage, const Powers& by) {
        const int last = warp();  // 16 keys of which the warp's queries see some
        const float of_u = first_of_two(by.u), of_w = first_of_two(by.w);
        const auto* factors = reinterpret_cast<const float4*>(shared.own.factors + 64 * m) + lane() % 4;
        const std::uint32_t* rho = shared.own.rho + row(m, 0);
        const float of_rows[2] = {first_of_two(rho[0]), first_of_two(rho[8])};
        Sums sum = {};
#pragma unroll 1
        for (int chunk = 0; chunk <= last; ++chunk, factors += 8) {
            Weights w;
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float4 f = factors[4 * n];
                const float u[2] = {f.x * of_u, f.z * of_u}, v[2] = {f.y * of_w, f.w * of_w};
#pragma unroll
                for (int e = 0; e < 4; ++e) w[n][e] = fminf(of_rows[e / 2] * u[e % 2], v[e % 2]);
            }
            if (chunk == last) hide(w, 0, 0.f);
            multiply_in_warp<m>(w, sum, stage, 4 * m + chunk);
        }
        keep_own_sums(m, sum);
    }
    template <int m>
    __device__ void add_chunk_carefully(const AttentionForward<bf16>& p, int head, int stage, int chunk, int first,
                                        bool diagonal) {
        Weights s;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::int64_t token = first + 16 * chunk + i / 2 * 8 + lane() % 4 * 2 + i % 2;
            const float b = p.b.data[token * p.b.ld + head];
            const float F = p.F.data == nullptr ? 0.f : p.F.data[token * p.F.ld + head];
#pragma unroll
            for (int k = 0; k < 2; ++k)
                s[i / 2][2 * k + i % 2] = (shared.gate[row(m, k)] - F) - fabsf(shared.a[row(m, k)] - b);
        }
        add_scores<m>(s, stage, chunk, diagonal);
    }
};

}  // namespace fiedler::attention_forward_sm90_tile
