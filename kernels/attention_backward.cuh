// kernels/attention_backward.cuh: one pass over the pairs for all four gradients of scalar-distance attention.
//
// A block owns a tile of keys (rows) and streams the tiles of 64 queries (columns) that see them: scores, weights and
// ds are made once, transposed, so that P' is the A operand of dv += P' dO straight from registers:
//     dP' = V dO'      P' by exp2      ds' = P' (dP' - delta)      dv += P' dO      db, dF: sums along rows, in registers
// da is a sum over rows. A thread adds its rows, a warp its threads (through shared memory), the block its warps, and
// the result goes to the slab of the block's group of keys (AttentionSlabs); a second kernel adds the slabs. Every sum
// has one order, so results are equal from run to run.
//
// Signs: step = sat(2^127 (a - b) + 1/2) is 0, 1/2 or 1, so sign ds = 2 step ds - ds, and sums of it are exactly zero
// where all a and b are equal: halving is exact, and both sums are taken in one order. The difference that the sign
// needs is also the score's: for R = 1, the minimum of two products of factors (the forward's way around exp) would
// take three instructions where |d|, scale and ex2 take three as well, one of them in a pipe that is idle.
#pragma once
#include <type_traits>

#include "kernels/attention_tile.cuh"

namespace fiedler::attention_tile {

// The thread's number, read again: what follows from it is not kept in registers from one tile to the next.
__device__ inline int thread_anew() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

template <int D, int R>
struct BackwardShape {
    static constexpr tuning::AttentionBackward kTuning = tuning::attention_backward(D, R);
    static constexpr int kKeys = kTuning.keys(), kRowTiles = kTuning.row_tiles, kBlocks = kTuning.blocks;
    static constexpr int kWarps = kThreads / kWarp, kWarpKeys = kKeys / kWarps;
    static constexpr bool kKeepValues = kTuning.values, kKeepScalars = kTuning.scalars;
    static constexpr int kPart = R < 8                 ? R
                                 : R == 16 && D == 128 ? 4
                                                       : 8;  // scalars whose sums over rows are taken together
    static constexpr int kKept = R <= 8 ? R : 1;  // R: a - b is kept from the score to the sign; else made anew
    static_assert(kKeys % kTile == 0 && (R <= 8 || kRowTiles == 1));
};

// Shared memory by its own addresses, so that a thread keeps few of them and the compiler makes no more.
__device__ inline void store_shared(std::uint32_t to, const float* x) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};\n" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}
__device__ inline void store_shared(std::uint32_t to, float x) {
    asm volatile("st.shared.f32 [%0], %1;\n" ::"r"(to), "f"(x) : "memory");
}
__device__ inline void store_shared(std::uint32_t to, float2 x) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};\n" ::"r"(to), "f"(x.x), "f"(x.y) : "memory");
}
__device__ inline void load_shared(float& x, std::uint32_t from) {
    asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(from) : "memory");
}
__device__ inline void load_shared(float2& x, std::uint32_t from) {
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];\n" : "=f"(x.x), "=f"(x.y) : "r"(from) : "memory");
}
__device__ inline float plus(float x, float y) { return x + y; }
__device__ inline float2 plus(float2 x, float2 y) { return {x.x + y.x, x.y + y.y}; }

// Sums over the eight lanes g of a warp that hold other rows of the same columns: each thread brings, for its columns
// 2t and 2t + 1, one value for each of P scalars. Results go to sums[column][R], from an offset on.
template <int P, int R>
struct ColumnSums {
    // Row g of the exchange holds eight columns of P, in units of 4 floats: unit k of thread t in place k ^ t of its P/2.
    // The distance of two rows lets a quarter-warp, which writes two of them, reach all 32 banks.
    static constexpr int kRow = P == 8 ? 80 : P == 4 ? 36 : 0, kFloats = 8 * kRow;
    std::uint32_t write, read, out;

    __device__ ColumnSums(const float* exchange, const float* sums) {
        const int lane = thread_anew() % kWarp, g = lane / 4, t = lane % 4;
        const int place = P == 8 ? t : 0, pair = P == 8 ? 2 : 1;  // pair: floats that a lane adds up
        write = shared_address(exchange) + 4u * (g * kRow + 2 * P * t + 4 * place);
        read = shared_address(exchange) + 4u * (pair * lane);
        int column = lane / 4, scalar = lane % 4;
        if (P == 8) {
            const int unit = lane / 2 % 4 ^ lane / 8;
            column = 2 * (lane / 8) + unit / 2, scalar = unit % 2 * 4 + lane % 2 * 2;
        }
        if (P <= 2) column = 2 * t + g % 2, scalar = g / 2;
        out = shared_address(sums) + 4u * (column * R + scalar);
    }
    // v[j]: the thread's values for column 2t + j.
    __device__ void add(const float (&v)[2][P], int offset) const {
        if constexpr (P <= 2) {  // butterfly: halves of the values, then of the lanes
            const int g = static_cast<int>(threadIdx.x) % kWarp / 4;
            const bool right = g % 2 != 0, second = g / 2 % 2 != 0;
            float x[P];
#pragma unroll
            for (int r = 0; r < P; ++r)
                x[r] = (right ? v[1][r] : v[0][r]) + __shfl_xor_sync(0xffffffffu, right ? v[0][r] : v[1][r], 4);
            if constexpr (P == 2)
                x[0] = (second ? x[1] : x[0]) + __shfl_xor_sync(0xffffffffu, second ? x[0] : x[1], 8);
            else
                x[0] += __shfl_xor_sync(0xffffffffu, x[0], 8);
            x[0] += __shfl_xor_sync(0xffffffffu, x[0], 16);
            if (g < 2 * P) store_shared(out + 4u * offset, x[0]);
        } else {  // v was written by put
            using Sum = std::conditional_t<P == 8, float2, float>;
            __syncwarp();
            Sum x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) load_shared(x[i], read + 4u * kRow * i);
#pragma unroll
            for (int n = 4; n > 0; n /= 2)
#pragma unroll
                for (int i = 0; i < n; ++i) x[i] = plus(x[i], x[i + n]);
            store_shared(out + 4u * offset, x[0]);
            __syncwarp();
        }
    }
    // v[j], as soon as it is there: fewer registers hold values.
    __device__ void put(const float (&v)[P], int j) const {
        if constexpr (P >= 4)
#pragma unroll
            for (int i = 0; i < P; i += 4) {
                const std::uint32_t unit = 16u * (j * P + i) / 4;
                store_shared(P == 8 ? write ^ unit : write + unit, &v[i]);
            }
    }
};

template <int D, int R>
struct QueryTile {
    ValueTile<D> gradients;  // dO
    ScalarTile<R> a;
    ColumnTile gate, lse, delta;

    __device__ void load(const AttentionBackward<bf16>& p, int head, int column) {
        constexpr int kParts = D / 8, kRows = kThreads / kParts;
        const int thread = thread_anew(), tokens = p.seq.tokens, part = thread % kParts * 8;
        const nv_bf16* source = nv(p.do_.data) + head * D + part;
        nv_bf16* to = gradients.data + thread / kParts * gradients.kStride + part;
        int token = column + thread / kParts;
#pragma unroll 1
        for (int i = 0; i < kTile / kRows; ++i, token += kRows, to += kRows * gradients.kStride)
            cp_async16(to, source + (token < tokens ? token : 0) * p.do_.ld, token < tokens);
#pragma unroll 1
        for (int e = thread; e < kTile * R; e += kThreads) {
            const int local = e / R, r = e % R;
            const bool valid = column + local < tokens && r < p.scalars;
            cp_async4(a.data + r / a.kPair * a.kPlane + local * a.kPair + r % a.kPair,
                      p.a.data + (valid ? (column + local) * p.a.ld + head * p.scalars + r : 0), valid);
        }
        token = column + thread % kTile;
        const bool valid = token < tokens;  // zeros beyond
        if (!valid) token = 0;
        const auto number = [&](ColumnTile& tile, const auto& x) {
            cp_async4(tile.data + thread % kTile, x.data + (token * x.ld + head), valid);
        };
        if (thread < kTile) {
            number(lse, p.lse);
            if (p.F.data != nullptr) number(gate, p.F);
        } else {
            number(delta, p.delta);
        }
    }
    // Scalars r and r + 1 (R = 1: only the first) of columns local and local + 1: x[column][scalar].
    __device__ void pairs(float (&x)[2][2], int r, int local) const {
        if constexpr (R == 1) {
            const float2 y = *reinterpret_cast<const float2*>(a.data + local);
            x[0][0] = y.x, x[1][0] = y.y;
        } else {
            const float4 y = *reinterpret_cast<const float4*>(a.data + r / 2 * a.kPlane + 2 * local);
            x[0][0] = y.x, x[0][1] = y.y, x[1][0] = y.z, x[1][1] = y.w;
        }
    }
    // As many of a column's scalars as x holds, from an even one on.
    template <int N>
    __device__ void scalars(float (&x)[N], int from, int column) const {
        if constexpr (R == 1) {
            x[0] = a.data[column];
        } else {
#pragma unroll
            for (int r = 0; r < N; r += 2) {
                const float2 y = *reinterpret_cast<const float2*>(a.data + (from + r) / 2 * a.kPlane + 2 * column);
                x[r] = y.x, x[r + 1] = y.y;
            }
        }
    }
};

template <int D, int R>
struct alignas(128) BackwardShared {
    using Shape = BackwardShape<D, R>;
    static constexpr int kExchange = R < 4 ? 4 : ColumnSums<Shape::kPart, R>::kFloats;  // a multiple of 64 bytes
    QueryTile<D, R> queries[2];
    ValueTile<D> values[Shape::kKeepValues ? 1 : Shape::kRowTiles];  // V of the keys; unused if kept in registers
    alignas(64) float exchange[Shape::kWarps][kExchange];
    float sums[Shape::kWarps][kTile * R];  // of each warp, over its keys: da of the tile's queries
    // b of the keys, unless in registers: units of 4 scalars, so that eight rows of one unit lie in all 32 banks.
    float gate[Shape::kKeepScalars ? 1 : Shape::kKeys];  // their F
    float4 scalars[Shape::kKeepScalars ? 1 : R / 4][Shape::kKeepScalars ? 1 : Shape::kKeys];
    int2 sight[Shape::kKeys];  // the queries [x, y) that see each key
    Band band[Shape::kWarps];  // those of a warp's keys
    // What the block needs only between two tiles; volatile keeps it out of registers. Queries are counted in tiles.
    volatile int head, slab, first;  // of the block's group; its first key now
    volatile int end, written;       // of the queries that see these keys, and of those with a sum in the slab so far
};

// The keys of a warp: rows 16 m + 8 k + g of its tile in a thread.
template <int D, int R>
struct BackwardKeys {
    using Shape = BackwardShape<D, R>;
    using Shared = BackwardShared<D, R>;
    static constexpr int M = Shape::kRowTiles;
    static constexpr int kStride = ValueTile<D>::kStride;
    const ColumnSums<Shape::kPart, R> columns;
    const int used;       // scalars, of R
    const int block_row;  // what the lane adds to the address of a 16 x 16 block, to name its row of ldmatrix
    float b[Shape::kKeepScalars ? M : 1][2][R], gate[Shape::kKeepScalars ? M : 1][2];
    std::uint32_t values[Shape::kKeepValues ? M : 1][Shape::kKeepValues ? D / 16 : 1][4];
    float stepped[M][2][R] = {}, sum[M][2] = {}, dv[M][D / 8][4] = {};

    __device__ BackwardKeys(const AttentionBackward<bf16>& p, const Shared& shared)
        : columns(shared.exchange[warp_number()], shared.sums[warp_number()]),
          used(p.scalars),
          block_row(thread_anew() % 16 * kStride + thread_anew() % kWarp / 16 * 8) {
        const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
        const int head = shared.head, warp_first = shared.first + warp_number() * Shape::kWarpKeys;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const Rows rows(sight, warp_first + 16 * m);
            if constexpr (Shape::kKeepScalars) load_row_numbers(gate[m], gate_of_head(p, head), p.F.ld, rows);
            if constexpr (Shape::kKeepScalars)
                load_row_scalars<R>(b[m], p.b.data + head * p.scalars, p.b.ld, p.scalars, rows);
            if constexpr (Shape::kKeepValues) load_operand<D>(values[m], nv(p.v.data) + head * D, p.v.ld, rows);
        }
    }

    // A tile of queries, `column` the token of its first; the warp's sums of it are always written.
    __device__ void add_tile(const Shared& shared, float* sums, const QueryTile<D, R>& tile, int column, bool gated) {
        const bool skip = gated && faded(shared, tile);
#pragma unroll 1
        for (int chunk = 0; chunk < kTile; chunk += 16) {
            const Band& band = shared.band[warp_number()];
            if (skip || band.misses(column + chunk, 16)) {
                for (int i = threadIdx.x % kWarp; i < 16 * R; i += kWarp) sums[chunk * R + i] = 0.f;
            } else {
                add(shared, tile, column, chunk, band.covers(column + chunk, 16));
            }
        }
    }

    __device__ void store(const AttentionBackward<bf16>& p, const Shared& shared) const {
        const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
        const int head = shared.head, warp_first = shared.first + warp_number() * Shape::kWarpKeys;
        const int t = thread_anew() % 4;
        float* db = p.db.data + head * p.scalars;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const Rows rows(sight, warp_first + 16 * m);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float total = row_sum(sum[m][k]);
#pragma unroll
                for (int r = 0; r < R; ++r) {
                    const float half = row_sum(stepped[m][k][r]);
                    if (rows.valid(k) && r < p.scalars && t == r % 4)
                        db[rows.token(k) * p.db.ld + r] = fma_flushed(2.f, half, -total);
                }
                if (p.dF.data != nullptr && rows.valid(k) && t == 0) p.dF.data[rows.token(k) * p.dF.ld + head] = -total;
            }
            store_rows<D>(nv(p.dv.data) + head * D, p.dv.ld, dv[m], {1.f, 1.f}, rows);
        }
    }

  private:
    // 16 queries of a tile, from `chunk`. whole: they see all keys of the warp; else the keys' sight tells, and column is
    // the token of the tile's first query.
    __device__ void add(const Shared& shared, const QueryTile<D, R>& tile, int column, int chunk, bool whole) {
        float ds[M][2][4] = {};
        std::uint32_t weights[M][4];
        products(ds, shared, tile, chunk);
#pragma unroll
        for (int n = 0; n < 2; ++n) eight(weights, ds, shared, tile, column, chunk + 8 * n, n, whole);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {  // dv += P' dO
            std::uint32_t g[4];
            ldmatrix_x4_trans(g, tile.gradients.data + block_row + chunk * kStride + 16 * n);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_bf16(dv[m][2 * n], weights[m], g[0], g[1]);
                mma_bf16(dv[m][2 * n + 1], weights[m], g[2], g[3]);
            }
        }
    }
    // Whether the gate alone puts every weight of the tile out of sight, for all rows of the warp.
    __device__ bool faded(const Shared& shared, const QueryTile<D, R>& tile) const {
        const float most = tile_max([&](int j) { return tile.gate.data[j] - tile.lse.data[j]; });
        bool below = true;
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) below &= most - gate_of(shared, i / 2, i % 2) < -kFaded;
        return __all_sync(0xffffffffu, below) != 0;
    }
    __device__ static int row_of(int m, int k) {
        return warp_number() * Shape::kWarpKeys + 16 * m + 8 * k + static_cast<int>(threadIdx.x) % kWarp / 4;
    }
    __device__ float gate_of(const Shared& shared, int m, int k) const {
        if constexpr (Shape::kKeepScalars) return gate[m][k];
        return shared.gate[row_of(m, k)];
    }
    // dP' = V dO', 16 columns.
    __device__ void products(float (&c)[M][2][4], const Shared& shared, const QueryTile<D, R>& tile, int chunk) const {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            std::uint32_t g[4];
            tile.gradients.columns_inside(g, chunk, 16 * n);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                std::uint32_t v[4];
                if constexpr (!Shape::kKeepValues)
                    ldmatrix_x4(v, shared.values[0].data + block_row +
                                       (warp_number() * Shape::kWarpKeys + 16 * m) * kStride + 16 * n);
                const auto& a = [&]() -> const std::uint32_t(&)[4] {
                    if constexpr (Shape::kKeepValues)
                        return values[m][n];
                    else
                        return v;
                }();
                mma_bf16(c[m][0], a, g[0], g[1]);
                mma_bf16(c[m][1], a, g[2], g[3]);
            }
        }
    }

    // Eight columns, from `first`, which are half n of the chunk: dP to ds, and into all sums; weights of the chunk.
    __device__ void eight(std::uint32_t (&weights)[M][4], float (&ds)[M][2][4], const Shared& shared,
                          const QueryTile<D, R>& tile, int column, int first, int n, bool whole) {
        constexpr int P = Shape::kPart;
        const int local = first + static_cast<int>(threadIdx.x) % 4 * 2;
        const float2 F = tile.gate.pair(local), lse = tile.lse.pair(local), delta = tile.delta.pair(local);
        float total[2] = {0.f, 0.f}, half[2][P] = {};  // the sums of the thread's rows
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float s[4], d[4][Shape::kKept];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float of_row = gate_of(shared, m, k);
                s[2 * k] = (F.x - of_row) - lse.x;
                s[2 * k + 1] = (F.y - of_row) - lse.y;
                score(s + 2 * k, d + 2 * k, shared, tile, m, k, local);
            }
            if (!whole) [[unlikely]] {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (!sees(shared, m, e / 2, column + local + e % 2)) s[e] = -INFINITY;
            }
            float(&x)[4] = ds[m][n];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[e] = exp2_fast(s[e] * kLog2e);
                x[e] = s[e] * (x[e] - (e % 2 ? delta.y : delta.x));
                sum[m][e / 2] += x[e];
                total[e % 2] += x[e];
            }
            weights[m][2 * n] = pack_bf16(s[0], s[1]);
            weights[m][2 * n + 1] = pack_bf16(s[2], s[3]);
            if constexpr (Shape::kKept == R)
#pragma unroll
                for (int from = 0; from < R; from += 4)
                    if (R < 4 || from < used) {  // a branch keeps ptxas from taking up more than registers hold
#pragma unroll
                        for (int r = from; r < R && r < from + 4; ++r)
#pragma unroll
                            for (int e = 0; e < 4; ++e) add_step(half[e % 2][r], stepped[m][e / 2][r], d[e][r], x[e]);
                    }
        }
        if constexpr (Shape::kKept == R) {
            put_columns(half, total);
            columns.add(half, first * R);
        } else {
#pragma unroll
            for (int from = 0; from < R; from += P)
                if (from < used) add_part(total, ds, shared, tile, first, local, n, from);
        }
    }
    // s -= sum |a - b| for a row and two columns; the differences may be kept.
    __device__ void score(float* s, float (*d)[Shape::kKept], const Shared& shared, const QueryTile<D, R>& tile, int m,
                          int k, int local) const {
        if constexpr (Shape::kKept != R) asm volatile("" ::: "memory");  // read a again rather than keep 2 R of them
        float of_row[R];
        row_scalars(of_row, shared, m, k);
#pragma unroll
        for (int r = 0; r < R; r += 2) {
            float a[2][2];
            tile.pairs(a, r, local);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int u = 0; u < (R == 1 ? 1 : 2); ++u) {
                    const float difference = a[j][u] - of_row[r + u];
                    s[j] -= fabsf(difference);
                    if constexpr (Shape::kKept == R) d[j][r + u] = difference;
                }
        }
    }
    __device__ bool sees(const Shared& shared, int m, int k, int token) const {
        const int2 sight = shared.sight[row_of(m, k)];
        return token >= sight.x && token < sight.y;
    }
    // b of a row.
    __device__ void row_scalars(float (&x)[R], const Shared& shared, int m, int k) const {
        if constexpr (Shape::kKeepScalars) {
#pragma unroll
            for (int r = 0; r < R; ++r) x[r] = b[m][k][r];
        } else {
#pragma unroll
            for (int r = 0; r < R; r += 4) {
                const float4 y = shared.scalars[r / 4][row_of(m, k)];
                x[r] = y.x, x[r + 1] = y.y, x[r + 2] = y.z, x[r + 3] = y.w;
            }
        }
    }
    __device__ static void add_step(float& of_column, float& of_row, float difference, float ds) {
        const float step = half_step(difference);
        of_column = fmaf(step, ds, of_column);
        of_row = fmaf(step, ds, of_row);
    }
    // The thread's sums of step ds become those of - sign ds.
    __device__ void put_columns(float (&half)[2][Shape::kPart], const float (&total)[2]) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int r = 0; r < Shape::kPart; ++r) half[j][r] = fma_flushed(-2.f, half[j][r], total[j]);
            columns.put(half[j], j);
        }
    }
    // The signs of P scalars, their differences made anew.
    __device__ void add_part(const float (&total)[2], const float (&ds)[M][2][4], const Shared& shared,
                             const QueryTile<D, R>& tile, int first, int local, int n, int from) {
        constexpr int P = Shape::kPart;
        float half[2][P] = {}, a[2][P];
        tile.scalars(a[0], from, local);
        tile.scalars(a[1], from, local + 1);
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) {
            const int m = i / 2, k = i % 2;
            float of_row[R];  // of which only P are read
            row_scalars(of_row, shared, m, k);
#pragma unroll
            for (int r = 0; r < P; ++r)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    add_step(half[j][r], stepped[m][k][from + r], a[j][r] - of_row[from + r], ds[m][n][2 * k + j]);
        }
        put_columns(half, total);
        columns.add(half, first * R + from);
    }
};

// What the pass needs beside its arguments: how groups of key tiles go to blocks and slabs.
struct BackwardGroups {
    std::int32_t slabs, tiles, count;  // slabs; key tiles of a group; groups
    std::int32_t per_sequence;         // groups of each sequence, if they end together; else 0
    float* partial;                    // [slabs, heads, tokens rounded up to 64, R]
    std::int64_t slab_floats;
};

// Causal: the first keys of a sequence are seen by most queries, and start first. Heads of a group are neighbours.
struct BackwardBlock {
    int head, group;
    __device__ BackwardBlock(const BackwardGroups& groups, int heads)
        : head(static_cast<int>(blockIdx.x) % heads), group(static_cast<int>(blockIdx.x) / heads) {
        if (groups.per_sequence == 0) return;
        const int sequences = groups.count / groups.per_sequence;
        group = group % sequences * groups.per_sequence + group / sequences;
    }
};

// The warps' sums for a tile of 64 queries to the block's slab; add: to what an earlier tile of keys left there.
template <int D, int R>
__device__ void store_sums(const BackwardShared<D, R>& shared, float* out, bool add) {
    for (int i = thread_anew(); i < kTile * R / 4; i += kThreads) {
        float4* to = reinterpret_cast<float4*>(out) + i;
        float4 x = add ? *to : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < BackwardShape<D, R>::kWarps; ++w) {
            const float4 y = reinterpret_cast<const float4*>(shared.sums[w])[i];
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
        }
        *to = x;
    }
}

// The block's next keys: what they see, V, and the first tile of queries, whose number is returned, on its way.
template <int D, int R>
__device__ int begin_keys(const AttentionBackward<bf16>& p, BackwardShared<D, R>& shared) {
    using Shape = BackwardShape<D, R>;
    const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
    const int thread = thread_anew(), first = shared.first, head = shared.head, tokens = p.seq.tokens;
    const int last = min(first + Shape::kKeys, tokens) - 1, q = sight.lo(first) / kTile;
    for (int i = thread; i < Shape::kKeys; i += kThreads) {
        const bool valid = first + i < tokens;
        shared.sight[i] = valid ? make_int2(sight.lo(first + i), sight.hi(first + i)) : make_int2(0, 0);
    }
    if (thread < Shape::kWarps) {
        const int from = first + thread * Shape::kWarpKeys;
        Band band(sight, from, min(from + Shape::kWarpKeys, tokens) - 1);
        if (from + Shape::kWarpKeys > tokens) band.full_hi = band.full_lo;  // rows that do not exist see nothing
        shared.band[thread] = band;
    }
    if constexpr (!Shape::kKeepScalars) {
        for (int i = thread; i < Shape::kKeys; i += kThreads)
            shared.gate[i] = p.F.data != nullptr && first + i < tokens ? p.F.data[(first + i) * p.F.ld + head] : 0.f;
        for (int i = thread; i < Shape::kKeys * R; i += kThreads) {
            const int row = i / R, r = i % R;
            const bool valid = first + row < tokens && r < p.scalars;
            reinterpret_cast<float*>(&shared.scalars[r / 4][row])[r % 4] =
                valid ? p.b.data[(first + row) * p.b.ld + head * p.scalars + r] : 0.f;
        }
    }
    if (thread == 0) shared.end = ceil_div(sight.hi(last), kTile);
    if constexpr (!Shape::kKeepValues)
#pragma unroll
        for (int i = 0; i < Shape::kRowTiles; ++i)
            shared.values[i].load(nv(p.v.data) + head * D, p.v.ld, first + kTile * i, tokens);
    shared.queries[q % 2].load(p, head, q * kTile);
    cp_async_commit();
    __syncthreads();
    return q;
}

template <int D, int R>
__global__ void __launch_bounds__(kThreads, (BackwardShape<D, R>::kBlocks))
    attention_backward_kernel(AttentionBackward<bf16> p, BackwardGroups groups) {
    using Shape = BackwardShape<D, R>;
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<BackwardShared<D, R>*>(memory);
    const int tokens = p.seq.tokens;
    if (threadIdx.x == 0) {
        const BackwardBlock block(groups, p.heads);
        shared.head = block.head;
        shared.slab = block.group % groups.slabs;
        shared.first = block.group * groups.tiles * Shape::kKeys;
        shared.written = 0;
    }
    for (int i = threadIdx.x; i < 2 * kTile; i += kThreads)  // stays zero without a gate
        shared.queries[i / kTile].gate.data[i % kTile] = 0.f;
    __syncthreads();

#pragma unroll 1
    for (int k = 0; k < groups.tiles && shared.first < tokens; ++k) {
        BackwardKeys<D, R> keys(p, shared);
        int q = begin_keys(p, shared);
#pragma unroll 1
        for (; q < shared.end; ++q) {
            if (q + 1 < shared.end) {
                shared.queries[(q + 1) % 2].load(p, shared.head, (q + 1) * kTile);
                cp_async_commit();
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            __syncthreads();
            keys.add_tile(shared, shared.sums[warp_number()], shared.queries[q % 2], q * kTile,
                          p.F.data != nullptr && p.skip);
            __syncthreads();  // also: the next round loads the tile after next into this stage
            const std::int64_t padded = ceil_div(tokens, kTile) * std::int64_t(kTile);
            store_sums(shared,
                       groups.partial + shared.slab * groups.slab_floats + (shared.head * padded + q * kTile) * R,
                       q < shared.written);
        }
        keys.store(p, shared);
        __syncthreads();
        if (threadIdx.x == 0) {
            shared.written = max(shared.written, shared.end);
            shared.first = shared.first + Shape::kKeys;
        }
        __syncthreads();
    }
}

// da from its slabs: one thread a number; those of the groups of keys that the query sees.
template <int R>
__global__ void __launch_bounds__(256) attention_da_kernel(AttentionBackward<bf16> p, BackwardGroups groups, int keys) {
    const std::int64_t item = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int r = static_cast<int>(item % R);
    const int token = static_cast<int>(item / R), head = static_cast<int>(blockIdx.y);
    if (token >= p.seq.tokens || r >= p.scalars) return;
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    const int span = groups.tiles * keys, end = (sight.hi(token) - 1) / span;
    const std::int64_t padded = ceil_div(p.seq.tokens, kTile) * std::int64_t(kTile);
    const float* in = groups.partial + (head * padded + token) * R + r;
    float sum = 0.f;
#pragma unroll 4
    for (int g = sight.lo(token) / span; g <= end; ++g) sum += in[g % groups.slabs * groups.slab_floats];
    p.da.data[token * p.da.ld + head * p.scalars + r] = sum;
}

}  // namespace fiedler::attention_tile
