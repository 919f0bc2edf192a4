// Scalar-distance attention on the GPU: scores by subtraction in f32 registers, tensor cores for P V, dO V' and P' dO.
// Rows and columns are tokens of the flat axis; what a row sees (sequence, causality, window) is an interval, so a tile
// is skipped, taken whole, or masked, 16 columns at a time.
#include <type_traits>

#include "kernels/attention_tile.cuh"

namespace fiedler {
namespace {

using namespace attention_tile;

// Natural logarithm of the ratio below which a weight is nothing: exp(-25) = 1.4e-11, so that even a thousand of them
// stay under the rounding of f32. A warp skips a tile whose gate alone puts every weight below that.
constexpr float kFaded = 25.f;

// Blocks that must fit on one multiprocessor: the bound on registers, 65,536 / (128 blocks), at which nothing spills.
constexpr int blocks_per_sm(int width, int scalars) { return width == 128 || scalars == 16 ? 2 : 3; }

// Largest of a number over the 64 columns of a tile: two a lane.
template <class Number>
__device__ float tile_max(Number&& number) {
    const int lane = threadIdx.x % kWarp;
    return warp_max(fmaxf(number(lane), number(lane + kWarp)));
}

template <class Args>
__device__ const float* gate_of_head(const Args& p, int head) {
    return p.F.data == nullptr ? nullptr : p.F.data + head;
}

// The scores of one tile for a warp of queries, chunks of 16 columns that the warp does not see left at -inf.
template <int R>
__device__ void score_tile(float (&s)[kTile / 8][4], const ScalarTile<R>& scalars, const ColumnTile& gate,
                           const float (&a)[2][R], const float (&gate_of_row)[2], const Rows& rows, const Band& warp,
                           int column) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
        const int chunk = n / 2 * 16;
        if (warp.misses(column + chunk, 16)) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] = -INFINITY;
            continue;
        }
        const int local = 8 * n + 2 * t;
        const float2 f = gate.pair(local);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = gate_of_row[e / 2] - (e % 2 ? f.y : f.x);
        scalars.differences(a, local, [&](int k, int, int j, float d) { s[n][2 * k + j] -= fabsf(d); });
        if (warp.covers(column + chunk, 16)) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (!rows.sees(e / 2, column + local + e % 2)) s[n][e] = -INFINITY;
    }
}

// Online softmax of a thread's two rows in the exponent base 2: weights are 2^(s log2 e - base).
struct RunningSoftmax {
    float top[2] = {-INFINITY, -INFINITY}, base[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};

    // Scores to weights, in place; the sums and, by `rescale`, what was accumulated before go to the new base.
    __device__ void fold(float (&s)[kTile / 8][4], float (&rescale)[2]) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float best = -INFINITY;
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n) best = fmaxf(best, fmaxf(s[n][2 * k], s[n][2 * k + 1]));
            top[k] = fmaxf(top[k], row_max(best));
            const float wanted = __fmul_rn(top[k], kLog2e);  // not fused: base - shift is exactly 0 if top stays
            const float shift = top[k] == -INFINITY ? 0.f : wanted;  // nothing seen so far: every weight is 2^-inf
            rescale[k] = exp2_fast(base[k] - shift);
            base[k] = wanted;
            sum[k] *= rescale[k];
#pragma unroll
            for (int n = 0; n < kTile / 8; ++n)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    s[n][2 * k + j] = exp2_fast(fmaf(s[n][2 * k + j], kLog2e, -shift));
                    sum[k] += s[n][2 * k + j];
                }
        }
    }
    // log sum exp of row k, given the row's total; what rounding base lost is given back.
    __device__ float lse(int k, float total) const {
        const float lost = fmaf(-top[k], kLog2e, base[k]);
        return top[k] + fmaf(lost, kLn2, logf(total));
    }
};

template <int D, int R>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(D, R)) attention_forward_kernel(AttentionForward<bf16> p) {
    __shared__ ValueTile<D> values[2];
    __shared__ ScalarTile<R> scalars[2];
    __shared__ ColumnTile gate[2];
    const int head = blockIdx.y, tokens = p.seq.tokens;
    const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kTile;  // causal: the longest rows start first
    const int warp_first = first + warp_number() * kWarpRows;
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    const Band block(sight, first, min(first + kTile, tokens) - 1);
    const Band warp(sight, warp_first, min(warp_first + kWarpRows, tokens) - 1);
    const Rows rows(sight, warp_first);
    const float* F = gate_of_head(p, head);

    float a[2][R], gate_of_row[2], o[D / 8][4] = {};
    load_row_scalars<R>(a, p.a.data + head * p.scalars, p.a.ld, p.scalars, rows);
    load_row_numbers(gate_of_row, F, p.F.ld, rows);
    RunningSoftmax softmax;

    // Latest tile first: with a gate the nearest keys weigh most, so later tiles rarely move the maximum.
    const int end = ceil_div(block.hi, kTile), tiles = end - block.lo / kTile;
    const auto load = [&](int k) {
        const int column = (end - 1 - k) * kTile;
        values[k % 2].load(nv(p.v.data) + head * D, p.v.ld, column, tokens);
        scalars[k % 2].load(p.b.data + head * p.scalars, p.b.ld, p.scalars, column, tokens);
        gate[k % 2].load(F, p.F.ld, column, tokens, p.b.data);
        cp_async_commit();
    };
    const auto faded = [&](const ColumnTile& f) {
        if (F == nullptr) return false;
        const float most = tile_max([&](int j) { return -f.data[j]; });
        bool below = true;
#pragma unroll
        for (int k = 0; k < 2; ++k) below &= !rows.valid(k) || gate_of_row[k] + most < softmax.top[k] - kFaded;
        return __all_sync(0xffffffffu, below) != 0;
    };

    load(0);
    for (int k = 0; k < tiles; ++k) {
        const int column = (end - 1 - k) * kTile;
        if (k + 1 < tiles) {
            load(k + 1);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        if (!warp.misses(column, kTile) && !faded(gate[k % 2])) {
            float s[kTile / 8][4], rescale[2];
            score_tile<R>(s, scalars[k % 2], gate[k % 2], a, gate_of_row, rows, warp, column);
            softmax.fold(s, rescale);
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[n][e] *= rescale[e / 2];
#pragma unroll
            for (int c = 0; c < kTile / 16; ++c) {
                if (warp.misses(column + 16 * c, 16)) continue;
                const float(&left)[4] = s[2 * c], (&right)[4] = s[2 * c + 1];
                const std::uint32_t weights[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                                                  pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
#pragma unroll
                for (int n = 0; n < D / 16; ++n) {
                    std::uint32_t b[4];
                    values[k % 2].rows_inside(b, 16 * c, 16 * n);
                    mma_bf16(o[2 * n], weights, b[0], b[1]);
                    mma_bf16(o[2 * n + 1], weights, b[2], b[3]);
                }
            }
        }
        __syncthreads();  // the next round loads the tile after next into this stage
    }

    float scale[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const float total = row_sum(softmax.sum[k]);
        scale[k] = 1.f / total;
        if (rows.valid(k) && threadIdx.x % 4 == 0) p.lse.data[rows.token(k) * p.lse.ld + head] = softmax.lse(k, total);
    }
    store_rows<D>(nv(p.o.data) + head * D, p.o.ld, o, scale, rows);
}

// delta = dO . o per token and head; `parts` = D / 8 neighbouring lanes share one.
__global__ void __launch_bounds__(256) attention_delta_kernel(AttentionBackward<bf16> p, int parts) {
    const std::int64_t item = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / parts;
    const int part = static_cast<int>(threadIdx.x) % parts;
    const std::int64_t token = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    const bool valid = token < p.seq.tokens;
    float sum = 0.f;
    if (valid) {
        const int column = (head * parts + part) * 8;
        const auto g = load16(nv(p.do_.data) + token * p.do_.ld + column);
        const auto o = load16(nv(p.o.data) + token * p.o.ld + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(to_float(g.v[i]), to_float(o.v[i]), sum);
    }
    for (int i = parts / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (valid && part == 0) p.delta.data[token * p.delta.ld + head] = sum;
}

// The backward has two passes: rows are queries (da), or keys (db, dF and dv); the other side is streamed.
struct OfQueries {
    ColumnTile lse, delta;
};
struct Nothing {};
template <int D, int R, bool kKeys>
struct Streamed : std::conditional_t<kKeys, OfQueries, Nothing> {
    ValueTile<D> values;    // V, or dO where rows are keys
    ScalarTile<R> scalars;  // b, or a
    ColumnTile gate;        // F

    __device__ void load(const AttentionBackward<bf16>& p, int head, int column) {
        const int tokens = p.seq.tokens;
        if constexpr (kKeys) {
            values.load(nv(p.do_.data) + head * D, p.do_.ld, column, tokens);
            scalars.load(p.a.data + head * p.scalars, p.a.ld, p.scalars, column, tokens);
            this->lse.load(p.lse.data + head, p.lse.ld, column, tokens, p.a.data);
            this->delta.load(p.delta.data + head, p.delta.ld, column, tokens, p.a.data);
        } else {
            values.load(nv(p.v.data) + head * D, p.v.ld, column, tokens);
            scalars.load(p.b.data + head * p.scalars, p.b.ld, p.scalars, column, tokens);
        }
        gate.load(gate_of_head(p, head), p.F.ld, column, tokens, p.a.data);
        cp_async_commit();
    }
};

// A thread's two rows in a pass of the backward. Per pair and scalar, sign(d) ds is summed as 2 step(d) ds - ds with
// step(0) = 1/2, which is exact at ties; d = a - b for queries, b - a for keys.
template <int D, int R, bool kKeys>
struct BackwardRows {
    const Rows rows;
    float x[2][R], gate[2], lse[2] = {}, delta[2] = {};
    std::uint32_t fixed[D / 16][4];  // dO, or V where rows are keys
    float stepped[2][R] = {}, sum[2] = {}, dv[D / 8][4] = {};

    __device__ BackwardRows(const AttentionBackward<bf16>& p, const Sight& sight, int head, int warp_first)
        : rows(sight, warp_first) {
        load_row_numbers(gate, gate_of_head(p, head), p.F.ld, rows);
        if constexpr (kKeys) {
            load_row_scalars<R>(x, p.b.data + head * p.scalars, p.b.ld, p.scalars, rows);
            load_operand<D>(fixed, nv(p.v.data) + head * D, p.v.ld, rows);
        } else {
            load_row_scalars<R>(x, p.a.data + head * p.scalars, p.a.ld, p.scalars, rows);
            load_operand<D>(fixed, nv(p.do_.data) + head * D, p.do_.ld, rows);
            load_row_numbers(lse, p.lse.data + head, p.lse.ld, rows);
            load_row_numbers(delta, p.delta.data + head, p.delta.ld, rows);
        }
    }

    // Whether the gate alone puts every weight of the tile out of sight, for all rows of the warp.
    __device__ bool faded(const Streamed<D, R, kKeys>& tile) const {
        const float most = tile_max([&](int j) {
            if constexpr (kKeys)
                return tile.gate.data[j] - tile.lse.data[j];
            else
                return -tile.gate.data[j];
        });
        bool below = true;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float of_row = kKeys ? -gate[k] : gate[k] - lse[k];
            below &= !rows.valid(k) || of_row + most < -kFaded;
        }
        return __all_sync(0xffffffffu, below) != 0;
    }

    // 16 columns of a tile; column: token of the tile's first one; whole: every row sees all 16.
    __device__ void add(const Streamed<D, R, kKeys>& tile, int column, int chunk, bool whole) {
        float weight[2][4], ds[2][4] = {};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {  // dP = dO V', or its transpose V dO'
            std::uint32_t b[4];
            tile.values.columns_inside(b, chunk, 16 * n);
            mma_bf16(ds[0], fixed[n], b[0], b[1]);
            mma_bf16(ds[1], fixed[n], b[2], b[3]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int local = chunk + 8 * n + 2 * (static_cast<int>(threadIdx.x) % 4);
            weigh(weight[n], tile, column, local, whole);
            step(ds[n], weight[n], tile, local);
        }
        if constexpr (kKeys) {  // dv += P' dO
            const std::uint32_t weights[4] = {
                pack_bf16(weight[0][0], weight[0][1]), pack_bf16(weight[0][2], weight[0][3]),
                pack_bf16(weight[1][0], weight[1][1]), pack_bf16(weight[1][2], weight[1][3])};
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                std::uint32_t b[4];
                tile.values.rows_inside(b, chunk, 16 * n);
                mma_bf16(dv[2 * n], weights, b[0], b[1]);
                mma_bf16(dv[2 * n + 1], weights, b[2], b[3]);
            }
        }
    }

    __device__ void store(const AttentionBackward<bf16>& p, int head) const {
        const int t = threadIdx.x % 4;
        float* out = (kKeys ? p.db.data : p.da.data) + head * p.scalars;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float total = row_sum(sum[k]);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const float half = row_sum(stepped[k][r]);
                if (rows.valid(k) && r < p.scalars && t == r % 4) out[rows.token(k) * p.a.ld + r] = total - 2.f * half;
            }
            if (kKeys && p.dF.data != nullptr && rows.valid(k) && t == 0)
                p.dF.data[rows.token(k) * p.dF.ld + head] = -total;
        }
        if constexpr (kKeys) store_rows<D>(nv(p.dv.data) + head * D, p.dv.ld, dv, {1.f, 1.f}, rows);
    }

  private:
    // The weights of two rows and of the columns local and local + 1.
    __device__ void weigh(float (&weight)[4], const Streamed<D, R, kKeys>& tile, int column, int local,
                          bool whole) const {
        const float2 f = tile.gate.pair(local);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int k = e / 2;
            const float other = e % 2 ? f.y : f.x;
            if constexpr (kKeys) {
                const float2 l = tile.lse.pair(local);
                weight[e] = (other - gate[k]) - (e % 2 ? l.y : l.x);
            } else {
                weight[e] = (gate[k] - other) - lse[k];
            }
        }
        tile.scalars.differences(x, local, [&](int k, int, int j, float d) { weight[2 * k + j] -= fabsf(d); });
#pragma unroll
        for (int e = 0; e < 4; ++e)
            weight[e] = whole || rows.sees(e / 2, column + local + e % 2) ? exp2_fast(weight[e] * kLog2e) : 0.f;
    }
    // dP to ds, in place, and into the sums.
    __device__ void step(float (&ds)[4], const float (&weight)[4], const Streamed<D, R, kKeys>& tile, int local) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float shift = delta[e / 2];
            if constexpr (kKeys) {
                const float2 of_columns = tile.delta.pair(local);
                shift = e % 2 ? of_columns.y : of_columns.x;
            }
            ds[e] = __fmul_rn(weight[e], ds[e] - shift);  // rounded once: both sums must see the same number
            sum[e / 2] += ds[e];
        }
        // The differences that made the scores serve the steps too, in 4 R registers; where those are not to be had,
        // they are made again.
        constexpr bool kForget = R > 8 || (R == 8 && D * (kKeys ? 2 : 1) >= 128);
        tile.scalars.template differences<kForget>(x, local, [&](int k, int r, int j, float d) {
            stepped[k][r] = fmaf(half_step(d), ds[2 * k + j], stepped[k][r]);
        });
    }
};

template <int D, int R, bool kKeys>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(D, R)) attention_backward_kernel(AttentionBackward<bf16> p) {
    __shared__ Streamed<D, R, kKeys> stages[2];
    const int head = blockIdx.y, tile = kKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x;  // causal: long rows first
    const int first = tile * kTile, warp_first = first + warp_number() * kWarpRows;
    const Sight sight =
        kKeys ? Sight::of_keys(p.seq, p.window, p.causal) : Sight::of_queries(p.seq, p.window, p.causal);
    const Band block(sight, first, min(first + kTile, p.seq.tokens) - 1);
    const Band warp(sight, warp_first, min(warp_first + kWarpRows, p.seq.tokens) - 1);
    BackwardRows<D, R, kKeys> rows(p, sight, head, warp_first);

    const int begin = block.lo / kTile, tiles = ceil_div(block.hi, kTile) - begin;
    stages[0].load(p, head, begin * kTile);
    for (int k = 0; k < tiles; ++k) {
        const int column = (begin + k) * kTile;
        if (k + 1 < tiles) {
            stages[(k + 1) % 2].load(p, head, column + kTile);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        __syncthreads();
        const auto& stage = stages[k % 2];
        if (!warp.misses(column, kTile) && !(p.F.data != nullptr && rows.faded(stage))) {
#pragma unroll 1
            for (int chunk = 0; chunk < kTile; chunk += 16)
                if (!warp.misses(column + chunk, 16)) rows.add(stage, column, chunk, warp.covers(column + chunk, 16));
        }
        __syncthreads();  // the next round loads the tile after next into this stage
    }
    rows.store(p, head);
}

// One block per head: a warp takes 32 keys at a time, a lane scores one of them, then all lanes share the values.
constexpr int kDecodeWarps = 16, kDecodeWidth = 128;
__global__ void __launch_bounds__(kDecodeWarps* kWarp) attention_decode_kernel(AttentionDecode<bf16> p) {
    __shared__ float query[16], tops[kDecodeWarps], sums[kDecodeWarps], parts[kDecodeWarps][kDecodeWidth];
    const int head = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int length = static_cast<int>(p.v.rows), width = static_cast<int>(p.v.cols) / p.heads;
    const int first = p.window > 0 && p.window < length ? length - p.window : 0;
    if (static_cast<int>(threadIdx.x) < p.scalars) query[threadIdx.x] = p.a.data[head * p.scalars + threadIdx.x];
    const float gate = p.F.data == nullptr ? 0.f : p.F.data[(length - 1) * p.F.ld + head];
    __syncthreads();

    float top = -INFINITY, sum = 0.f, o[2][2] = {};  // columns 2 lane + 64 h, + 1
    for (int base = first + warp * kWarp; base < length; base += kDecodeWarps * kWarp) {
        const int j = base + lane, count = min(kWarp, length - base);
        float s = -INFINITY;
        if (j < length) {
            const float* b = p.b.data + j * p.b.ld + head * p.scalars;
            s = p.F.data == nullptr ? 0.f : gate - p.F.data[j * p.F.ld + head];
            for (int r = 0; r < p.scalars; ++r) s -= fabsf(query[r] - b[r]);
        }
        const float best = fmaxf(top, warp_max(s));  // finite: lane 0 has a key
        const float rescale = exp2_fast((top - best) * kLog2e), weight = exp2_fast((s - best) * kLog2e);
        top = best;
        sum = sum * rescale + weight;
#pragma unroll
        for (int h = 0; h < 2; ++h) o[h][0] *= rescale, o[h][1] *= rescale;
        const nv_bf16* v = nv(p.v.data) + base * p.v.ld + head * width;
#pragma unroll 8
        for (int k = 0; k < count; ++k) {
            const float w = __shfl_sync(0xffffffffu, weight, k);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int column = 2 * lane + 64 * h;
                if (column >= width) continue;
                const auto pair = *reinterpret_cast<const __nv_bfloat162*>(v + k * p.v.ld + column);
                o[h][0] = fmaf(w, __low2float(pair), o[h][0]);
                o[h][1] = fmaf(w, __high2float(pair), o[h][1]);
            }
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
#pragma unroll
    for (int h = 0; h < 2; ++h) parts[warp][2 * lane + 64 * h] = o[h][0], parts[warp][2 * lane + 64 * h + 1] = o[h][1];
    __syncthreads();

    const int column = threadIdx.x;
    if (column >= width) return;
    float best = -INFINITY, total = 0.f, result = 0.f;
    for (int w = 0; w < kDecodeWarps; ++w) best = fmaxf(best, tops[w]);  // finite: warp 0 has a key
    for (int w = 0; w < kDecodeWarps; ++w) {
        const float scale = exp2_fast((tops[w] - best) * kLog2e);  // 0 for a warp without keys
        total = fmaf(scale, sums[w], total);
        result = fmaf(scale, parts[w][column], result);
    }
    nv(p.o.data)[head * width + column] = from_float<nv_bf16>(result / total);
}

// launch.template operator()<D, R>() for this head width and the least R that holds the scalars.
template <int D, class Launch>
void with_scalars(int scalars, Launch&& launch) {
    if (scalars == 1) return launch.template operator()<D, 1>();
    if (scalars == 2) return launch.template operator()<D, 2>();
    if (scalars <= 4) return launch.template operator()<D, 4>();
    if (scalars <= 8) return launch.template operator()<D, 8>();
    return launch.template operator()<D, 16>();
}
template <class Launch>
void with_sizes(int width, int scalars, Launch&& launch) {
    if (width == 16) return with_scalars<16>(scalars, launch);
    if (width == 32) return with_scalars<32>(scalars, launch);
    if (width == 64) return with_scalars<64>(scalars, launch);
    return with_scalars<128>(scalars, launch);
}
void check_width(std::int64_t width) {
    FIEDLER_REQUIRE("attention", width == 16 || width == 32 || width == 64 || width == 128);
}
template <class Args>
dim3 tiles_of(const Args& p) {
    return dim3(static_cast<unsigned>(ceil_div(p.seq.tokens, kTile)), static_cast<unsigned>(p.heads));
}

}  // namespace

void attention_forward(const Cuda& device, const AttentionForward<bf16>& p) {
    check(p);
    check_width(p.v.cols / p.heads);
    FIEDLER_REQUIRE("attention", is_aligned16(p.v) && is_aligned16(p.o));
    with_sizes(static_cast<int>(p.v.cols / p.heads), p.scalars, [&]<int D, int R>() {
        attention_forward_kernel<D, R><<<tiles_of(p), kThreads, 0, stream_of(device)>>>(p);
    });
    LAUNCH_CHECK("attention_forward");
}
void attention_backward(const Cuda& device, const AttentionBackward<bf16>& p) {
    check(p);
    check_width(p.v.cols / p.heads);
    FIEDLER_REQUIRE("attention", is_aligned16(p.v) && is_aligned16(p.o) && is_aligned16(p.do_) && is_aligned16(p.dv));
    const int parts = static_cast<int>(p.v.cols / p.heads / 8);
    const std::int64_t lanes = p.v.rows * p.heads * parts;
    attention_delta_kernel<<<static_cast<unsigned>(ceil_div(lanes, std::int64_t(256))), 256, 0, stream_of(device)>>>(
        p, parts);
    LAUNCH_CHECK("attention_delta");
    with_sizes(static_cast<int>(p.v.cols / p.heads), p.scalars, [&]<int D, int R>() {
        attention_backward_kernel<D, R, false><<<tiles_of(p), kThreads, 0, stream_of(device)>>>(p);
        LAUNCH_CHECK("attention_backward, queries");
        attention_backward_kernel<D, R, true><<<tiles_of(p), kThreads, 0, stream_of(device)>>>(p);
        LAUNCH_CHECK("attention_backward, keys");
    });
}
void attention_decode(const Cuda& device, const AttentionDecode<bf16>& p) {
    check(p);
    check_width(p.v.cols / p.heads);
    FIEDLER_REQUIRE("attention", is_aligned16(p.v));
    attention_decode_kernel<<<static_cast<unsigned>(p.heads), kDecodeWarps * kWarp, 0, stream_of(device)>>>(p);
    LAUNCH_CHECK("attention_decode");
}

}  // namespace fiedler
