// kernels/attention_forward.cuh: a warp of the forward pass of scalar-distance attention: weights of its queries, sums,
// outputs. The layout of registers is that of kernels/attention_tile.cuh.
#pragma once
#include "kernels/attention_forward_stage.cuh"

namespace fiedler::attention_forward_tile {

// A warp's M x 16 queries: weights, and what is summed with them.
template <int D, int R>
struct Queries {
    using S = Shape<D, R>;
    static constexpr int M = S::M;
    static constexpr bool kSumsOnTensorCores = tuning::sums_on_tensor_cores(kArch, R),
                          kScoresOnTensorCores = tuning::scores_on_tensor_cores(kArch);
    using Keys = KeyTile<R, S::kGroups, S::kKeys>;
    using Weights = float[2][4];  // of 16 queries and 16 keys: two C tiles

    Shared<D, R>& shared;
    const AttentionForward<bf16>& p;
    const std::uint32_t values_of_lane;  // what the lane gives to ldmatrix, in stage 0
    const int keys_of_lane;              // first of its two keys in a run of 8; R = 1: in the pairs of all groups
    const std::uint32_t diagonal = R > 1 ? minus_diagonal() : 0;
    std::uint32_t x[M][2][R == 1 ? 1 : R / 2];  // rho or the scalar as it is, as bits; R > 1: packed, two scalars each
    float o[M][D / 8][4] = {};
    float sum[M][2] = {};                               // of the weights, for lse
    float rounded[M][kSumsOnTensorCores ? 4 : 2] = {};  // of the rounded ones, for o; as o, or as sum

    __device__ Queries(Shared<D, R>& s, const AttentionForward<bf16>& arguments)
        : shared(s),
          p(arguments),
          values_of_lane(shared_address(s.values[0][0].data) +
                         (lane_number() % 16 * ValueTile<D>::kStride + lane_number() / 16 * 8) * 2),
          keys_of_lane((R == 1 ? group_number() * S::kKeys : 0) + lane_number() % 4 * 2) {}
    static __device__ int row(int m, int k) {  // of the thread's queries in the block
        return warp_in_block() * S::kWarpQueries + lane_number() / 4 + 16 * m + 8 * k;
    }

    __device__ void load(bool bounded) {
        const View& view = shared.views[warp_in_block()];
        if (!bounded && lane_number() % 4 == 0)  // what has been summed so far is relative to lambda
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) shared.top[row(m, k)] += shared.gate[row(m, k)] - view.gate;
        __syncwarp();
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                if constexpr (R == 1)
                    x[m][k][0] = __float_as_uint(bounded ? shared.rho[row(m, k)] : scalar(m, k, 0));
                else if (bounded)
#pragma unroll
                    for (int r = 0; r < R / 2; ++r) x[m][k][r] = shared.packed[row(m, k)][r];
            }
    }

    // Results of the warp; buffer: 16 rows of its own in shared memory, ValueTile<D>::kStride apart.
    __device__ void store(bool bounded, nv_bf16* buffer) {
        const int head = shared.views[warp_in_block()].block.z, first = shared.views[warp_in_block()].block.w;
        constexpr int kStride = ValueTile<D>::kStride, kParts = D / 8;
        const int lane = lane_number();
#pragma unroll
        for (int m = 0; m < M; ++m) {
            __syncwarp();  // the tile before has been read
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float scale = 1.f / (kSumsOnTensorCores ? rounded[m][2 * k] : row_sum(rounded[m][k]));
                shared.rho[row(m, k)] = row_sum(sum[m][k]);  // the same from all lanes of a row
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
                    *reinterpret_cast<std::uint32_t*>(buffer + (lane / 4 + 8 * k) * kStride + 8 * n + lane % 4 * 2) =
                        pack_bf16(o[m][n][2 * k] * scale, o[m][n][2 * k + 1] * scale);
            }
            __syncwarp();
            const int tile_first = first + warp_in_block() * S::kWarpQueries + 16 * m;
#pragma unroll
            for (int i = lane; i < 16 * kParts; i += kWarp) {
                const int token = tile_first + i / kParts, part = i % kParts * 8;
                if (token < p.seq.tokens)
                    store16(nv(p.o.data) + token * p.o.ld + head * D + part,
                            load16(buffer + i / kParts * kStride + part));
            }
        }
        const int query = warp_in_block() * S::kWarpQueries + lane, token = first + query;
        if (lane < S::kWarpQueries && token < p.seq.tokens)
            p.lse.data[token * p.lse.ld + head] = log_of(shared.rho[query], shared.top[query], token, head, bounded);
    }

    __device__ void add_stage(int stage, bool bounded) {
#pragma unroll 1
        for (int half = 0; half < S::kHalves; ++half) {
            const int column = stage * S::kKeys + half * kTile;
            const Band band(shared.views[warp_in_block()].band);
            if (band.misses(column, kTile)) continue;
            if (bounded && band.covers(column, kTile))
                add_whole(stage & 1, half * kTile);
            else
                add_some(stage & 1, half * kTile, column, bounded);
        }
    }

  private:
    // lse of a query with this sum of weights.
    __device__ float log_of(float total, float top, int token, int head, bool bounded) const {
        double of_gate = 0;
        if (bounded && p.F.data != nullptr && token < p.seq.tokens)
            of_gate = double(p.F.data[token * p.F.ld + head]) - double(shared.views[warp_in_block()].gate);
        return lse_of(total, of_gate + top);
    }
    // 64 keys within the bounds, all of which all queries of the warp see. first: of the stage.
    __device__ void add_whole(int stage, int first) {
#pragma unroll 1
        for (int chunk = 0; chunk < kTile; chunk += 16) {
            Weights w[M];
            if constexpr (R == 1) {
                multiply_factors(w, 0, stage, first + chunk);
            } else {
                score_packed(w, stage, first + chunk);
                exponentiate(w);
            }
            accumulate(w, stage, first + chunk);
        }
    }
    // Any 64 keys. column: token of the first one.
    __device__ void add_some(int stage, int first, int column, bool bounded) {
        const Band band(shared.views[warp_in_block()].band);
#pragma unroll 1
        for (int chunk = 0; chunk < kTile; chunk += 16) {
            if (band.misses(column + chunk, 16)) continue;
            std::uint32_t packed[M][4];
            constexpr int N =
                R == 1 ? 1 : M;  // at a time: with one scalar, reading keys anew costs less than registers
#pragma unroll
            for (int from = 0; from < M; from += N) {
                if (from > 0) __syncwarp();  // keeps the compiler from holding all of them at once after all
                Weights w[N];
                if (!bounded)
                    score(w, from, stage, first + chunk, column + chunk);
                else if constexpr (R == 1)
                    multiply_factors(w, from, stage, first + chunk);
                else
                    score_packed(w, stage, first + chunk);
#pragma unroll
                for (int m = 0; m < N; ++m) {
                    if (!band.covers(column + chunk, 16))
                        hide(w[m], from + m, column + chunk, R == 1 && bounded ? 0.f : -INFINITY);
                    if (!bounded) soften(w[m], from + m);
                }
                if (R > 1 && bounded) exponentiate(w);
#pragma unroll
                for (int m = 0; m < N; ++m) fold(packed[from + m], w[m], from + m);
            }
            multiply(packed, stage, first + chunk);
        }
    }

    // R = 1: p' of 16 keys and N of the warp's A tiles, from `from`. key: the first one, of the stage.
    template <int N>
    __device__ void multiply_factors(Weights (&w)[N], int from, int stage, int key) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float4 f = shared.keys[stage].two(keys_of_lane + key + 8 * n);
#pragma unroll
            for (int m = 0; m < N; ++m)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    w[m][n][2 * k] = fminf(__uint_as_float(x[from + m][k][0]) * f.x, f.y);
                    w[m][n][2 * k + 1] = fminf(__uint_as_float(x[from + m][k][0]) * f.z, f.w);
                }
        }
    }
    // a of a query, from global memory.
    __device__ float scalar(int m, int k, int r) const {
        const View& view = shared.views[warp_in_block()];
        const int token = view.block.w + row(m, k);
        return token < p.seq.tokens && r < p.scalars ? p.a.data[token * p.a.ld + view.block.z * p.scalars + r] : 0.f;
    }
    // E - F_j - sum_r |a_i^r - b_j^r| in base 2, of 16 keys; bounded, R > 1.
    __device__ void score_packed(Weights (&s)[M], int stage, int key) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const auto& keys = shared.keys[stage];
            const int local = keys_of_lane + key + 8 * n;
            const float2 gate = *reinterpret_cast<const float2*>(keys.gate + local);
            const float c[4] = {gate.x, gate.y, gate.x, gate.y};
            std::uint32_t y[R];
            if constexpr (R == 2) {
                const uint2 two = *reinterpret_cast<const uint2*>(keys.packed[local / 2]);
                y[0] = two.x, y[1] = two.y;
            } else {
#pragma unroll
                for (int r = 0; r < R; r += 4) {
                    const uint4 four = *reinterpret_cast<const uint4*>(keys.packed[local / 2] + r);
                    y[r] = four.x, y[r + 1] = four.y, y[r + 2] = four.z, y[r + 3] = four.w;
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                std::uint32_t d[2][R];
#pragma unroll
                for (int k = 0; k < 2; ++k) packed_differences<R>(d[k], y, x[m][k]);
                packed_scores<R, kScoresOnTensorCores>(s[m][n], d, c, diagonal);
            }
        }
    }
    // F_i - F_j - sum_r |a_i^r - b_j^r|, of 16 keys, `column` the token of the first; unbounded. R > 1: scalars are
    // read anew.
    template <int N>
    __device__ void score(Weights (&s)[N], int from, int stage, int key, int column) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float2 gate;
            if constexpr (R == 1) {
                const float4 f = shared.keys[stage].two(keys_of_lane + key + 8 * n);
                gate = {f.y, f.w};
#pragma unroll
                for (int m = 0; m < N; ++m)
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        s[m][n][2 * k] = fabsf(__uint_as_float(x[from + m][k][0]) - f.x);
                        s[m][n][2 * k + 1] = fabsf(__uint_as_float(x[from + m][k][0]) - f.z);
                    }
            } else {
                const int local = keys_of_lane + 8 * n, last = p.seq.tokens - 1;
                gate = *reinterpret_cast<const float2*>(shared.keys[stage].gate + key + local);
#pragma unroll
                for (int m = 0; m < N; ++m)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[m][n][e] = 0.f;
                const float* b = p.b.data + shared.views[warp_in_block()].block.z * p.scalars;
#pragma unroll 1
                for (int r = 0; r < p.scalars; ++r) {
                    const float left = b[min(column + local, last) * p.b.ld + r],
                                right = b[min(column + local + 1, last) * p.b.ld + r];
#pragma unroll
                    for (int m = 0; m < N; ++m)
#pragma unroll
                        for (int k = 0; k < 2; ++k) {
                            s[m][n][2 * k] += fabsf(scalar(from + m, k, r) - left);
                            s[m][n][2 * k + 1] += fabsf(scalar(from + m, k, r) - right);
                        }
                }
            }
#pragma unroll
            for (int m = 0; m < N; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    s[m][n][e] = (shared.gate[row(from + m, e / 2)] - (e % 2 ? gate.y : gate.x)) - s[m][n][e];
        }
    }
    template <int N>
    static __device__ void exponentiate(Weights (&w)[N]) {
#pragma unroll
        for (int m = 0; m < N; ++m)
#pragma unroll
            for (int e = 0; e < 8; ++e) w[m][e / 4][e % 4] = exp2_fast(w[m][e / 4][e % 4]);
    }
    // The weights of columns that a query does not see. column: token of the first key.
    __device__ void hide(Weights& w, int m, int column, float nothing) const {
        column += lane_number() % 4 * 2;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int2 seen = shared.sight[row(m, k)];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int at = column + e / 2 * 8 + e % 2;
                if (at < seen.x || at >= seen.y) w[e / 2][2 * k + e % 2] = nothing;
            }
        }
    }
    // Scores to weights relative to the running maximum; sums and outputs follow it.
    __device__ void soften(Weights& s, int m) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float rescale = soften_row(s, k, shared.top[row(m, k)]);
            sum[m][k] *= rescale;
            rounded[m][kSumsOnTensorCores ? 2 * k : k] *= rescale;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) o[m][n][2 * k] *= rescale, o[m][n][2 * k + 1] *= rescale;
        }
    }
    // Weights into the sums, and rounded: an A operand.
    __device__ void fold(std::uint32_t (&packed)[4], const Weights& w, int m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float first = w[i / 2][i % 2 * 2], second = w[i / 2][i % 2 * 2 + 1];
            sum[m][i % 2] += first;
            sum[m][i % 2] += second;
            packed[i] = pack_bf16(first, second);
            if constexpr (!kSumsOnTensorCores) {
                rounded[m][i % 2] += __uint_as_float(packed[i] << 16);
                rounded[m][i % 2] += __uint_as_float(packed[i] & 0xffff0000u);
            }
        }
    }
    __device__ void multiply(const std::uint32_t (&packed)[M][4], int stage, int key) {
        if constexpr (kSumsOnTensorCores) {
            constexpr std::uint32_t kOnes =
                0x3f803f80u;  // times a matrix of ones: every column is the sum over the keys
#pragma unroll
            for (int m = 0; m < M; ++m) mma_bf16(rounded[m], packed[m], kOnes, kOnes);
        }
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            std::uint32_t b[4];
            load_transposed(b, values_of_lane + stage * (S::kHalves * sizeof(ValueTile<D>)) +
                                   (key * ValueTile<D>::kStride + 16 * n) * 2);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_bf16(o[m][2 * n], packed[m], b[0], b[1]);
                mma_bf16(o[m][2 * n + 1], packed[m], b[2], b[3]);
            }
        }
    }
    __device__ void accumulate(const Weights (&w)[M], int stage, int key) {
        std::uint32_t packed[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) fold(packed[m], w[m], m);
        multiply(packed, stage, key);
    }
};

}  // namespace fiedler::attention_forward_tile
