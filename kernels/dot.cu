// kernels/dot.cu: dot-product attention on tensor cores (see dot.h), after FlashAttention-2: no T x T in memory.
//
// The token axis is flat: a block owns one head and 64 rows of the score matrix, whatever the sequence boundaries;
// which columns they see follows from the packing, and only tiles on the border of that region pay for a mask. Rows are
// queries in the forward pass and for dq, keys for dk and dv. Scores are kept in base 2: exp(x) = 2^(x log2 e).
#include "kernels/dot.h"
#include "kernels/dot_sm90.h"
#include "kernels/dot_tile.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/head_width.cuh"

namespace fiedler {
namespace dot {
namespace {

// ---- forward -------------------------------------------------------------------------------------------------------

// Softmax state of a thread's two rows.
struct Softmax {
    float largest[2] = {-INFINITY, -INFINITY};  // raw score
    float sum[2] = {0.f, 0.f};                  // this thread's share
};

// scores = Q K' for 16 rows and a tile of kRows keys. kMasked: parts that this warp cannot see are not computed.
template <int D, bool kMasked>
__device__ void score_tile(float (&s)[kRows / 8][4], const std::uint32_t (&q)[D / 16][4], const nv_bf16* k, int key,
                           const Rows& rows) {
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = 0.f;
    if constexpr (kMasked) {
#pragma unroll
        for (int n = 0; n < kRows / 16; ++n) {
            if (rows.any.meets(key + 16 * n, 16)) {
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    std::uint32_t b[4];
                    load_b_transposed<D>(b, k, 16 * n, d);
                    mma_bf16(s[2 * n], q[d], b[0], b[1]);
                    mma_bf16(s[2 * n + 1], q[d], b[2], b[3]);
                }
            }
            rows.mask(s[2 * n], key + 16 * n);
            rows.mask(s[2 * n + 1], key + 16 * n + 8);
        }
    } else {
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
#pragma unroll
            for (int n = 0; n < kRows / 16; ++n) {
                std::uint32_t b[4];
                load_b_transposed<D>(b, k, 16 * n, d);
                mma_bf16(s[2 * n], q[d], b[0], b[1]);
                mma_bf16(s[2 * n + 1], q[d], b[2], b[3]);
            }
    }
}

// Scores become weights relative to the rows' largest score so far; earlier sums decay accordingly.
template <int D>
__device__ void softmax_tile(float (&s)[kRows / 8][4], float (&o)[D / 8][4], Softmax& state, float scale2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float largest = state.largest[r];
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        largest = quad_max(largest);
        // A row that has seen no key yet must not form -inf - (-inf).
        const float shift = largest == -INFINITY ? 0.f : largest * scale2;
        const float decay = exp2_fast(fmaf(state.largest[r], scale2, -shift));
        state.largest[r] = largest;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
                s[n][e] = exp2_fast(fmaf(s[n][e], scale2, -shift));
                sum += s[n][e];
            }
        state.sum[r] = fmaf(state.sum[r], decay, sum);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            o[n][2 * r] *= decay;
            o[n][2 * r + 1] *= decay;
        }
    }
}

// o += P V. kMasked: 16 keys that this warp cannot see are left out (their weights are zero).
template <int D, bool kMasked>
__device__ void value_tile(float (&o)[D / 8][4], const float (&p)[kRows / 8][4], const nv_bf16* v, int key,
                           const Rows& rows) {
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
        if (kMasked && !rows.any.meets(key + 16 * n, 16)) continue;
        std::uint32_t a[4];
        to_a(a, p[2 * n], p[2 * n + 1]);
        multiply_add<D>(o, a, v, 16 * n);
    }
}

// Keys and values have one tile each: values arrive while scores are computed, the next keys while values are used.
template <int D>
__global__ void __launch_bounds__(kThreads) forward_kernel(const DotForward<bf16> p, const Sight sight) {
    extern __shared__ __align__(128) unsigned char shared[];
    nv_bf16* k_tile = reinterpret_cast<nv_bf16*>(shared);
    nv_bf16* v_tile = k_tile + kRows * D;
    const int head = blockIdx.y, block_first = blockIdx.x * kRows;
    const Columns k = head_columns<D>(p.k, head), v = head_columns<D>(p.v, head);
    const Band keys = any_of(sight, block_first, block_first + kRows);
    const Rows rows(sight, block_first);

    int key = keys.lo / kRows * kRows;
    load_tile<D, kRows>(v_tile, head_columns<D>(p.q, head), block_first);  // queries pass through the values' place
    load_tile<D, kRows>(k_tile, k, key);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    std::uint32_t q[D / 16][4];
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_a<D>(q[d], v_tile, threadIdx.x / kWarp * kWarpRows, d);
    __syncthreads();

    const float scale2 = p.scale * kLog2e;
    Softmax state;
    float o[D / 8][4] = {};
    for (; key < keys.hi; key += kRows) {
        load_tile<D, kRows>(v_tile, v, key);
        cp_async_commit();
        const bool some = rows.any.meets(key, kRows), full = rows.all.holds(key, kRows);
        float s[kRows / 8][4];
        if (full)
            score_tile<D, false>(s, q, k_tile, key, rows);
        else if (some)
            score_tile<D, true>(s, q, k_tile, key, rows);
        cp_async_wait<0>();
        __syncthreads();  // the values are here, and no warp needs these keys any more
        if (key + kRows < keys.hi) load_tile<D, kRows>(k_tile, k, key + kRows);
        cp_async_commit();
        if (some) {
            softmax_tile<D>(s, o, state, scale2);
            if (full)
                value_tile<D, false>(o, s, v_tile, key, rows);
            else
                value_tile<D, true>(o, s, v_tile, key, rows);
        }
        cp_async_wait<0>();
        __syncthreads();  // the next keys are here, and no warp needs these values any more
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(state.sum[r]);
        inverse[r] = sum > 0.f ? 1.f / sum : 0.f;  // rows beyond the last token sum to nothing
        const int row = rows.first + threadIdx.x % kWarp / 4 + 8 * r;
        if (threadIdx.x % 4 == 0 && row < p.lse.rows)
            p.lse.data[row * p.lse.ld + head] = state.largest[r] * p.scale + logf(sum);
    }
    store_rows<D>(p.o, head, rows.first, o, inverse, k_tile);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// delta = do . o, by D / 8 threads for each token and head.
template <int D>
__global__ void __launch_bounds__(256)
    delta_kernel(const Mat<float> delta, const Mat<const bf16> o, const Mat<const bf16> grad, int heads) {
    constexpr int lanes = D / 8;
    const std::int64_t at = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const std::int64_t pair = at / lanes, token = pair / heads;
    const int head = int(pair % heads), part = int(at % lanes);
    const bool inside = token < o.rows;
    float sum = 0.f;
    if (inside) {
        const std::int64_t column = std::int64_t(head) * D + part * 8;
        const auto x = load16(reinterpret_cast<const nv_bf16*>(o.data) + token * o.ld + column);
        const auto y = load16(reinterpret_cast<const nv_bf16*>(grad.data) + token * grad.ld + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(to_float(x.v[i]), to_float(y.v[i]), sum);
    }
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (inside && part == 0) delta.data[token * delta.ld + head] = sum;
}

// How the two passes are cut. Columns are streamed through shared memory, two stages deep, and worked on by kStep at a
// time. For wide heads the key pass has no registers left for its own rows' operands and reads them from shared memory.
template <int D, bool kKeyRows>
struct Cut {
    static constexpr bool own_in_shared = kKeyRows && D == 128;
    static constexpr int columns = own_in_shared ? 16 : kKeyRows || D == 128 ? 32 : 64;
    static constexpr int step = own_in_shared ? 16 : 32;
    static constexpr int stage = 2 * columns * D;  // bf16 values: two tiles
    static constexpr int own = own_in_shared ? 2 * kRows * D : 0;
    static constexpr int statistics =
        kKeyRows ? 2 * 2 * columns : 0;  // floats: lse and delta of the columns, two stages
    static constexpr std::size_t bytes = (own + 2 * stage) * sizeof(nv_bf16) + statistics * sizeof(float);
    static_assert(2 * stage + own >= 2 * kRows * D, "a block's own rows pass through here");
};

// The operands of a block's own 16 rows a warp: queries and do, or keys and v.
template <int D, bool kInShared>
struct Own {
    std::uint32_t x[D / 16][4], y[D / 16][4];
    __device__ void take(const nv_bf16* tiles) {
        const int row = threadIdx.x / kWarp * kWarpRows;
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            load_a<D>(x[d], tiles, row, d);
            load_a<D>(y[d], tiles + kRows * D, row, d);
        }
    }
    __device__ void get(std::uint32_t (&a)[4], std::uint32_t (&b)[4], int d) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = x[d][i], b[i] = y[d][i];
    }
};
template <int D>
struct Own<D, true> {
    const nv_bf16* tiles;
    __device__ void take(const nv_bf16* t) { tiles = t; }
    __device__ void get(std::uint32_t (&a)[4], std::uint32_t (&b)[4], int d) const {
        const int row = threadIdx.x / kWarp * kWarpRows;
        load_a<D>(a, tiles, row, d);
        load_a<D>(b, tiles + kRows * D, row, d);
    }
};

// lse (in base 2) and delta belong to queries: to a thread's rows, or to the columns of a tile.
template <bool kKeyRows>
struct Statistics {
    float lse2[2] = {0.f, 0.f}, delta[2] = {0.f, 0.f};
    __device__ Statistics(const DotBackward<bf16>& p, int head, const Rows& rows) {
        if constexpr (!kKeyRows) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = rows.first + threadIdx.x % kWarp / 4 + 8 * r;
                if (row >= p.lse.rows) continue;
                lse2[r] = p.lse.data[row * p.lse.ld + head] * kLog2e;
                delta[r] = p.delta.data[row * p.delta.ld + head];
            }
        }
    }
};

// One pass over a tile of columns. x, y: K and V (rows are queries) or Q and do (rows are keys);
// first += ds x, second += p y (rows are keys only).
template <int D, bool kKeyRows>
struct BackwardTile {
    using C = Cut<D, kKeyRows>;
    static constexpr int step = C::step;
    const Rows& rows;
    const Own<D, C::own_in_shared>& own;
    const Statistics<kKeyRows>& mine;
    float scale2;

    // s = own x', dp = own y' for columns [column, column + step) of the tile.
    __device__ void products(float (&s)[step / 8][4], float (&dp)[step / 8][4], const nv_bf16* x, const nv_bf16* y,
                             int column) const {
#pragma unroll
        for (int n = 0; n < step / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = dp[n][e] = 0.f;
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            std::uint32_t a[4], g[4];
            own.get(a, g, d);
#pragma unroll
            for (int n = 0; n < step / 16; ++n) {
                std::uint32_t b[4];
                load_b_transposed<D>(b, x, column + 16 * n, d);
                mma_bf16(s[2 * n], a, b[0], b[1]);
                mma_bf16(s[2 * n + 1], a, b[2], b[3]);
                load_b_transposed<D>(b, y, column + 16 * n, d);
                mma_bf16(dp[2 * n], g, b[0], b[1]);
                mma_bf16(dp[2 * n + 1], g, b[2], b[3]);
            }
        }
    }
    // s becomes p, dp becomes ds. statistics: lse and delta of the tile's columns (rows are keys only).
    __device__ void gradients(float (&s)[step / 8][4], float (&dp)[step / 8][4], const float* statistics,
                              int column) const {
#pragma unroll
        for (int n = 0; n < step / 8; ++n) {
            float lse2[2] = {mine.lse2[0], mine.lse2[1]}, delta[2] = {mine.delta[0], mine.delta[1]};
            if constexpr (kKeyRows) {
                const int c = column + 8 * n + int(threadIdx.x) % 4 * 2;
                const float2 l = *reinterpret_cast<const float2*>(statistics + c);
                const float2 t = *reinterpret_cast<const float2*>(statistics + C::columns + c);
                lse2[0] = l.x * kLog2e, lse2[1] = l.y * kLog2e, delta[0] = t.x, delta[1] = t.y;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = kKeyRows ? e % 2 : e / 2;
                s[n][e] = exp2_fast(fmaf(s[n][e], scale2, -lse2[query]));
                dp[n][e] = s[n][e] * (dp[n][e] - delta[query]);
            }
        }
    }
    __device__ void run(float (&first)[D / 8][4], float (&second)[kKeyRows ? D / 8 : 1][4], const nv_bf16* x,
                        const float* statistics, int tile_first) const {
        const nv_bf16* y = x + C::columns * D;
#pragma unroll 1
        for (int column = 0; column < C::columns; column += step) {
            if (!rows.any.meets(tile_first + column, step)) continue;
            float s[step / 8][4], dp[step / 8][4];
            products(s, dp, x, y, column);
            if (!rows.all.holds(tile_first + column, step)) {
#pragma unroll
                for (int n = 0; n < step / 8; ++n) rows.mask(s[n], tile_first + column + 8 * n);
            }
            gradients(s, dp, statistics, column);
#pragma unroll
            for (int n = 0; n < step / 16; ++n) {
                std::uint32_t a[4];
                if constexpr (kKeyRows) {
                    to_a(a, s[2 * n], s[2 * n + 1]);
                    multiply_add<D>(second, a, y, column + 16 * n);
                }
                to_a(a, dp[2 * n], dp[2 * n + 1]);
                multiply_add<D>(first, a, x, column + 16 * n);
            }
        }
    }
};

// Columns [first, first + columns) -> one stage.
template <int D, bool kKeyRows>
__device__ void load_stage(const DotBackward<bf16>& p, int head, nv_bf16* tiles, float* statistics, int first) {
    constexpr int columns = Cut<D, kKeyRows>::columns;
    load_tile<D, columns>(tiles, head_columns<D>(kKeyRows ? p.q : p.k, head), first);
    load_tile<D, columns>(tiles + columns * D, head_columns<D>(kKeyRows ? p.do_ : p.v, head), first);
    if constexpr (kKeyRows) {
        const int c = threadIdx.x % columns, row = first + c;
        const bool inside = row < p.lse.rows;
        if (threadIdx.x < columns)
            cp_async4(statistics + c, p.lse.data + (inside ? row * p.lse.ld + head : 0), inside);
        else if (threadIdx.x < 2 * columns)
            cp_async4(statistics + columns + c, p.delta.data + (inside ? row * p.delta.ld + head : 0), inside);
    }
}

// Rows are queries: dq. Rows are keys: dk and dv.
template <int D, bool kKeyRows>
__global__ void __launch_bounds__(kThreads) backward_kernel(const DotBackward<bf16> p, const Sight sight) {
    using C = Cut<D, kKeyRows>;
    extern __shared__ __align__(128) unsigned char shared[];
    nv_bf16* own_tiles = reinterpret_cast<nv_bf16*>(shared);
    nv_bf16* stages = own_tiles + C::own;
    float* statistics = reinterpret_cast<float*>(stages + 2 * C::stage);
    const int head = blockIdx.y, block_first = blockIdx.x * kRows;
    const Band band = any_of(sight, block_first, block_first + kRows);
    const Rows rows(sight, block_first);

    load_tile<D, kRows>(own_tiles, head_columns<D>(kKeyRows ? p.k : p.q, head), block_first);
    load_tile<D, kRows>(own_tiles + kRows * D, head_columns<D>(kKeyRows ? p.v : p.do_, head), block_first);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    Own<D, C::own_in_shared> own;
    own.take(own_tiles);
    if constexpr (!C::own_in_shared) __syncthreads();  // the stages lie where the block's own rows were

    const Statistics<kKeyRows> mine(p, head, rows);
    const BackwardTile<D, kKeyRows> tile{rows, own, mine, p.scale * kLog2e};
    float first[D / 8][4] = {}, second[kKeyRows ? D / 8 : 1][4] = {};
    int column = band.lo / C::columns * C::columns, stage = 0;
    load_stage<D, kKeyRows>(p, head, stages, statistics, column);
    cp_async_commit();
    for (; column < band.hi; column += C::columns, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and no warp needs the other one any more
        if (column + C::columns < band.hi)
            load_stage<D, kKeyRows>(p, head, stages + (stage ^ 1) * C::stage, statistics + (stage ^ 1) * 2 * C::columns,
                                    column + C::columns);
        cp_async_commit();
        tile.run(first, second, stages + stage * C::stage, statistics + stage * 2 * C::columns, column);
    }
    __syncthreads();
    const float scale[2] = {p.scale, p.scale};
    store_rows<D>(kKeyRows ? p.dk : p.dq, head, rows.first, first, scale, own_tiles);
    if constexpr (kKeyRows) {
        const float one[2] = {1.f, 1.f};
        store_rows<D>(p.dv, head, rows.first, second, one, own_tiles);
    }
}

// ---- decode --------------------------------------------------------------------------------------------------------

// One block a head. D / 8 threads take a key together and keep a softmax of their own; all are merged at the end.
constexpr int kDecodeThreads = 256;

// acc and sum of the keys first + group, first + group + groups, ...; the largest score is returned.
template <int D>
__device__ float decode_keys(const DotDecode<bf16>& p, int head, std::int64_t first, float (&acc)[8], float& sum) {
    constexpr int lanes = D / 8, groups = kDecodeThreads / lanes;
    const int group = threadIdx.x / lanes, part = threadIdx.x % lanes;
    const std::int64_t at = std::int64_t(head) * D + part * 8;
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        q[i] = to_float(reinterpret_cast<const nv_bf16*>(p.q.data)[at + i]) * (p.scale * kLog2e);
    float largest = -INFINITY;
    for (std::int64_t base = first; base < p.v.rows; base += groups) {  // every thread takes every turn: shuffles below
        const bool inside = base + group < p.v.rows;
        const std::int64_t key = inside ? base + group : first;
        const auto k = load16(reinterpret_cast<const nv_bf16*>(p.k.data) + key * p.k.ld + at);
        const auto v = load16(reinterpret_cast<const nv_bf16*>(p.v.data) + key * p.v.ld + at);
        float s = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) s = fmaf(q[i], to_float(k.v[i]), s);
#pragma unroll
        for (int step = lanes / 2; step > 0; step /= 2) s += __shfl_xor_sync(0xffffffffu, s, step);
        if (!inside) continue;
        const float next = fmaxf(largest, s), decay = exp2_fast(largest - next), weight = exp2_fast(s - next);
        largest = next;
        sum = fmaf(sum, decay, weight);
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[i] = fmaf(acc[i], decay, weight * to_float(v.v[i]));
    }
    return largest;
}

template <int D>
__global__ void __launch_bounds__(kDecodeThreads) decode_kernel(const DotDecode<bf16> p) {
    constexpr int lanes = D / 8, groups = kDecodeThreads / lanes;
    __shared__ float sums[groups], accs[groups][D], reduce[kDecodeThreads / kWarp];
    const int head = blockIdx.x, group = threadIdx.x / lanes, part = threadIdx.x % lanes;
    const std::int64_t first = p.window > 0 && p.v.rows > p.window ? p.v.rows - p.window : 0;
    float acc[8] = {}, sum = 0.f;
    const float mine = decode_keys<D>(p, head, first, acc, sum);
    const float shift = block_max(mine, reduce);   // finite: group 0 has a key
    const float factor = exp2_fast(mine - shift);  // 0 for a group without keys
    if (part == 0) sums[group] = sum * factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) accs[group][part * 8 + i] = acc[i] * factor;
    __syncthreads();
    if (threadIdx.x >= D) return;
    float total = 0.f, value = 0.f;
    for (int g = 0; g < groups; ++g) {
        total += sums[g];
        value += accs[g][threadIdx.x];
    }
    reinterpret_cast<nv_bf16*>(p.o.data)[std::int64_t(head) * D + threadIdx.x] = __float2bfloat16_rn(value / total);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

dim3 row_blocks(std::int64_t tokens, int heads) {
    return dim3(unsigned(ceil_div(tokens, std::int64_t(kRows))), unsigned(heads));
}

template <int D, bool kKeyRows>
void launch_backward(const Cuda& cuda, const DotBackward<bf16>& p) {
    constexpr std::size_t bytes = Cut<D, kKeyRows>::bytes;
    const Sight sight =
        kKeyRows ? Sight::of_keys(p.seq, p.window, p.causal) : Sight::of_queries(p.seq, p.window, p.causal);
    allow_shared<bytes>(backward_kernel<D, kKeyRows>);
    backward_kernel<D, kKeyRows><<<row_blocks(p.v.rows, p.heads), kThreads, bytes, stream_of(cuda)>>>(p, sight);
    LAUNCH_CHECK("dot_backward");
}

void check_all(const DotForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("dot", is_aligned16(p.q) && is_aligned16(p.k) && is_aligned16(p.v) && is_aligned16(p.o));
}
void check_all(const DotBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("dot", is_aligned16(p.q) && is_aligned16(p.k) && is_aligned16(p.v) && is_aligned16(p.o));
    FIEDLER_REQUIRE("dot", is_aligned16(p.do_) && is_aligned16(p.dq) && is_aligned16(p.dk) && is_aligned16(p.dv));
}
void general(const Cuda& cuda, const DotForward<bf16>& p) {
    for_head_width("dot", p.v.cols / p.heads, [&](auto width) {
        constexpr int D = decltype(width)::value;
        constexpr std::size_t bytes = 2 * kRows * D * sizeof(bf16);
        const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
        forward_kernel<D><<<row_blocks(p.v.rows, p.heads), kThreads, bytes, stream_of(cuda)>>>(p, sight);
        LAUNCH_CHECK("dot_forward");
    });
}
void run_delta(const Cuda& cuda, const DotBackward<bf16>& p) {
    for_head_width("dot", p.v.cols / p.heads, [&](auto width) {
        constexpr int D = decltype(width)::value;
        const std::int64_t threads = p.v.rows * p.heads * (D / 8);
        delta_kernel<D>
            <<<unsigned(ceil_div(threads, std::int64_t(256))), 256, 0, stream_of(cuda)>>>(p.delta, p.o, p.do_, p.heads);
        LAUNCH_CHECK("dot_delta");
    });
}
void general(const Cuda& cuda, const DotBackward<bf16>& p) {
    for_head_width("dot", p.v.cols / p.heads, [&](auto width) {
        constexpr int D = decltype(width)::value;
        launch_backward<D, false>(cuda, p);
        launch_backward<D, true>(cuda, p);
    });
}

#if FIEDLER_SM90A  // kernels/dot_sm90.cu is in this build
bool try_sm90(const Cuda& cuda, const DotForward<bf16>& p) {
    if (!dot_sm90_takes(cuda, p)) return false;
    dot_forward_sm90(cuda, p);
    return true;
}
bool try_sm90(const Cuda& cuda, const DotBackward<bf16>& p) {
    if (!dot_sm90_takes(cuda, p)) return false;
    dot_backward_sm90(cuda, p);
    return true;
}
#else
bool try_sm90(const Cuda&, const DotForward<bf16>&) { return false; }
bool try_sm90(const Cuda&, const DotBackward<bf16>&) { return false; }
#endif

template <class P>
bool run_by_path(const Cuda& cuda, const P& p, DotPath path) {
    if (path == DotPath::sm90) return try_sm90(cuda, p);
    general(cuda, p);
    return true;
}

}  // namespace
}  // namespace dot

void dot_forward(const Cuda& cuda, const DotForward<bf16>& p) {
    dot::check_all(p);
    if (!dot::try_sm90(cuda, p)) dot::general(cuda, p);
}
bool dot_forward_by_path(const Cuda& cuda, const DotForward<bf16>& p, DotPath path) {
    dot::check_all(p);
    return dot::run_by_path(cuda, p, path);
}

void dot_backward(const Cuda& cuda, const DotBackward<bf16>& p) {
    dot::check_all(p);
    dot::run_delta(cuda, p);
    if (!dot::try_sm90(cuda, p)) dot::general(cuda, p);
}
bool dot_backward_by_path(const Cuda& cuda, const DotBackward<bf16>& p, DotPath path) {
    dot::check_all(p);
    dot::run_delta(cuda, p);
    return dot::run_by_path(cuda, p, path);
}

void dot_decode(const Cuda& cuda, const DotDecode<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("dot", is_aligned16(p.k) && is_aligned16(p.v));
    for_head_width("dot", p.v.cols / p.heads, [&](auto width) {
        dot::decode_kernel<decltype(width)::value><<<unsigned(p.heads), dot::kDecodeThreads, 0, stream_of(cuda)>>>(p);
        LAUNCH_CHECK("dot_decode");
    });
}

}  // namespace fiedler
