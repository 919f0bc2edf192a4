// kernels/attention_backward.cuh: one pass over the pairs for all four gradients of scalar-distance attention with one
// scalar (more: kernels/attention_backward_packed.cuh), and how its blocks share the work.
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
// needs is also the score's: the minimum of two products of factors (the forward's way around exp) would
// take three instructions where |d|, scale and ex2 take three as well, one of them in a pipe that is idle.
#pragma once
#include "kernels/attention_tile.cuh"
#include "kernels/dependent_launch.cuh"

namespace fiedler::attention_tile {

// The thread's number, read again: what follows from it is not kept in registers from one tile to the next.
__device__ inline int thread_anew() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

template <int D>
struct BackwardShape {
    static constexpr tuning::AttentionBackward kTuning = tuning::attention_backward(D, 1);
    static constexpr int kKeys = kTuning.keys(), kRowTiles = kTuning.row_tiles, kBlocks = kTuning.blocks;
    static constexpr int kWarps = kThreads / kWarp, kWarpKeys = kKeys / kWarps;
    static constexpr bool kKeepValues = kTuning.values;
    static_assert(kKeys % kTile == 0);
};

// Sums over the eight lanes g of a warp that hold other rows of the same columns: each thread brings one value for each
// of its columns 2t and 2t + 1. A butterfly: half of the values, then of the lanes. Results go to sums[column].
__device__ inline void sum_columns(float* sums, const float (&v)[2]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4;
    const bool right = g % 2 != 0;
    float x = (right ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, right ? v[0] : v[1], 4);
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    x += __shfl_xor_sync(0xffffffffu, x, 16);
    if (g < 2) sums[lane % 4 * 2 + g] = x;
}

template <int D>
struct QueryTile {
    ValueTile<D> gradients;  // dO
    ColumnTile a, gate, lse, delta;

    __device__ void load(const AttentionBackward<bf16>& p, int head, int column) {
        constexpr int kParts = D / 8, kRows = kThreads / kParts;
        const int thread = thread_anew(), tokens = p.seq.tokens, part = thread % kParts * 8;
        const nv_bf16* source = nv(p.do_.data) + head * D + part;
        nv_bf16* to = gradients.data + thread / kParts * gradients.kStride + part;
        int token = column + thread / kParts;
#pragma unroll 1
        for (int i = 0; i < kTile / kRows; ++i, token += kRows, to += kRows * gradients.kStride)
            cp_async16(to, source + (token < tokens ? token : 0) * p.do_.ld, token < tokens);
        token = column + thread % kTile;
        const bool valid = token < tokens;  // zeros beyond
        if (!valid) token = 0;
        const auto number = [&](ColumnTile& tile, const auto& x) {
            cp_async4(tile.data + thread % kTile, x.data + (token * x.ld + head), valid);
        };
        if (thread < kTile) {
            number(a, p.a);
            number(lse, p.lse);
            if (p.F.data != nullptr) number(gate, p.F);
        } else {
            number(delta, p.delta);
        }
    }
};

template <int D>
struct alignas(128) BackwardShared {
    using Shape = BackwardShape<D>;
    QueryTile<D> queries[2];
    ValueTile<D> values[Shape::kKeepValues ? 1 : Shape::kRowTiles];  // V of the keys; unused if kept in registers
    float sums[Shape::kWarps][kTile];  // of each warp, over its keys: da of the tile's queries
    int2 sight[Shape::kKeys];          // the queries [x, y) that see each key
    Band band[Shape::kWarps];          // those of a warp's keys
    // What the block needs only between two tiles; volatile keeps it out of registers. Queries are counted in tiles.
    volatile int head, slab, first;  // of the block's group; its first key now
    volatile int end, written;       // of the queries that see these keys, and of those with a sum in the slab so far
};

// The keys of a warp: rows 16 m + 8 k + g of its tile in a thread.
template <int D>
struct BackwardKeys {
    using Shape = BackwardShape<D>;
    using Shared = BackwardShared<D>;
    static constexpr int M = Shape::kRowTiles;
    static constexpr int kStride = ValueTile<D>::kStride;
    const int block_row;  // what the lane adds to the address of a 16 x 16 block, to name its row of ldmatrix
    float b[M][2], gate[M][2];
    std::uint32_t values[Shape::kKeepValues ? M : 1][Shape::kKeepValues ? D / 16 : 1][4];
    float stepped[M][2] = {}, sum[M][2] = {}, dv[M][D / 8][4] = {};

    __device__ BackwardKeys(const AttentionBackward<bf16>& p, const Shared& shared)
        : block_row(thread_anew() % 16 * kStride + thread_anew() % kWarp / 16 * 8) {
        const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
        const int head = shared.head, warp_first = shared.first + warp_number() * Shape::kWarpKeys;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const Rows rows(sight, warp_first + 16 * m);
            load_row_numbers(gate[m], gate_of_head(p, head), p.F.ld, rows);
            load_row_numbers(b[m], p.b.data + head, p.b.ld, rows);
            if constexpr (Shape::kKeepValues) load_operand<D>(values[m], nv(p.v.data) + head * D, p.v.ld, rows);
        }
    }

    // A tile of queries, `column` the token of its first; the warp's sums of it are always written.
    __device__ void add_tile(const Shared& shared, float* sums, const QueryTile<D>& tile, int column, bool gated) {
        const bool skip = gated && faded(shared, tile);
#pragma unroll 1
        for (int chunk = 0; chunk < kTile; chunk += 16) {
            const Band& band = shared.band[warp_number()];
            if (skip || band.misses(column + chunk, 16)) {
                if (threadIdx.x % kWarp < 16) sums[chunk + threadIdx.x % kWarp] = 0.f;
            } else {
                add(shared, sums, tile, column, chunk, band.covers(column + chunk, 16));
            }
        }
    }

    __device__ void store(const AttentionBackward<bf16>& p, const Shared& shared) const {
        const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
        const int head = shared.head, warp_first = shared.first + warp_number() * Shape::kWarpKeys;
        const int t = thread_anew() % 4;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const Rows rows(sight, warp_first + 16 * m);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float total = row_sum(sum[m][k]);
                const float half = row_sum(stepped[m][k]);
                if (rows.valid(k) && t == 1) p.db.data[rows.token(k) * p.db.ld + head] = fma_flushed(2.f, half, -total);
                if (p.dF.data != nullptr && rows.valid(k) && t == 0) p.dF.data[rows.token(k) * p.dF.ld + head] = -total;
            }
            store_rows<D>(nv(p.dv.data) + head * D, p.dv.ld, dv[m], {1.f, 1.f}, rows);
        }
    }

  private:
    // 16 queries of a tile, from `chunk`. whole: they see all keys of the warp; else the keys' sight tells, and column is
    // the token of the tile's first query.
    __device__ void add(const Shared& shared, float* sums, const QueryTile<D>& tile, int column, int chunk,
                        bool whole) {
        float ds[M][2][4] = {};
        std::uint32_t weights[M][4];
        products(ds, shared, tile, chunk);
#pragma unroll
        for (int n = 0; n < 2; ++n) eight(weights, ds, shared, sums, tile, column, chunk + 8 * n, n, whole);
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
    __device__ bool faded(const Shared& shared, const QueryTile<D>& tile) const {
        const float most = tile_max([&](int j) { return tile.gate.data[j] - tile.lse.data[j]; });
        bool below = true;
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) below &= most - gate[i / 2][i % 2] < -kFaded;
        return __all_sync(0xffffffffu, below) != 0;
    }
    __device__ static int row_of(int m, int k) {
        return warp_number() * Shape::kWarpKeys + 16 * m + 8 * k + static_cast<int>(threadIdx.x) % kWarp / 4;
    }
    // dP' = V dO', 16 columns.
    __device__ void products(float (&c)[M][2][4], const Shared& shared, const QueryTile<D>& tile, int chunk) const {
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
    __device__ void eight(std::uint32_t (&weights)[M][4], float (&ds)[M][2][4], const Shared& shared, float* sums,
                          const QueryTile<D>& tile, int column, int first, int n, bool whole) {
        const int local = first + static_cast<int>(threadIdx.x) % 4 * 2;
        const float2 a = tile.a.pair(local), F = tile.gate.pair(local), lse = tile.lse.pair(local),
                     delta = tile.delta.pair(local);
        float total[2] = {0.f, 0.f}, half[2] = {0.f, 0.f};  // the sums of the thread's rows
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float s[4], d[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int k = e / 2;
                s[e] = e % 2 ? (F.y - gate[m][k]) - lse.y : (F.x - gate[m][k]) - lse.x;
                d[e] = (e % 2 ? a.y : a.x) - b[m][k];
                s[e] -= fabsf(d[e]);
            }
            if (!whole) [[unlikely]] {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (!sees(shared, m, e / 2, column + local + e % 2)) s[e] = -INFINITY;
            }
            float(&x)[4] = ds[m][n];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[e] = exp_fast(s[e]);
                x[e] = s[e] * (x[e] - (e % 2 ? delta.y : delta.x));
                sum[m][e / 2] += x[e];
                total[e % 2] += x[e];
            }
            weights[m][2 * n] = pack_bf16(s[0], s[1]);
            weights[m][2 * n + 1] = pack_bf16(s[2], s[3]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float step = half_step(d[e]);
                half[e % 2] = fmaf(step, x[e], half[e % 2]);
                stepped[m][e / 2] = fmaf(step, x[e], stepped[m][e / 2]);
            }
        }
        // The thread's sums of step ds become those of - sign ds.
#pragma unroll
        for (int j = 0; j < 2; ++j) half[j] = fma_flushed(-2.f, half[j], total[j]);
        sum_columns(sums + first, half);
    }
    __device__ bool sees(const Shared& shared, int m, int k, int token) const {
        const int2 sight = shared.sight[row_of(m, k)];
        return token >= sight.x && token < sight.y;
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
template <int D>
__device__ void store_sums(const BackwardShared<D>& shared, float* out, bool add) {
    if (const int i = thread_anew(); i < kTile / 4) {
        float4* to = reinterpret_cast<float4*>(out) + i;
        float4 x = add ? *to : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < BackwardShape<D>::kWarps; ++w) {
            const float4 y = reinterpret_cast<const float4*>(shared.sums[w])[i];
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
        }
        *to = x;
    }
}

// The block's next keys: what they see, V, and the first tile of queries, whose number is returned, on its way.
template <int D>
__device__ int begin_keys(const AttentionBackward<bf16>& p, BackwardShared<D>& shared) {
    using Shape = BackwardShape<D>;
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

template <int D>
__global__ void __launch_bounds__(kThreads, BackwardShape<D>::kBlocks)
    attention_backward_kernel(AttentionBackward<bf16> p, BackwardGroups groups) {
    using Shape = BackwardShape<D>;
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<BackwardShared<D>*>(memory);
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
        BackwardKeys<D> keys(p, shared);
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
            store_sums(shared, groups.partial + shared.slab * groups.slab_floats + (shared.head * padded + q * kTile),
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

// da from its slabs: those of the groups of keys that the query sees. A thread has up to four numbers of a query.
template <int R>
constexpr int kSumsOfThread = R < 4 ? R : 4;
template <int R>
__global__ void __launch_bounds__(256) attention_da_kernel(AttentionBackward<bf16> p, BackwardGroups groups, int keys) {
    constexpr int kCount = kSumsOfThread<R>, kOfQuery = R / kCount;
    using Numbers = std::conditional_t<kCount == 1, float, std::conditional_t<kCount == 2, float2, float4>>;
    const std::int64_t item = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int r = static_cast<int>(item % kOfQuery) * kCount;
    const int token = static_cast<int>(item / kOfQuery), head = static_cast<int>(blockIdx.y);
    wait_for_previous();  // where it is launched dependent on the pass over the pairs
    if (token >= p.seq.tokens) return;
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    const int span = groups.tiles * keys, end = (sight.hi(token) - 1) / span;
    const std::int64_t padded = ceil_div(p.seq.tokens, kTile) * std::int64_t(kTile);
    const float* in = groups.partial + (head * padded + token) * R + r;
    float sum[kCount] = {};
    constexpr int kAtOnce = 8;  // slabs are asked for together
    for (int g = sight.lo(token) / span; g <= end; g += kAtOnce) {
        Numbers parts[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (g + k <= end)
                parts[k] = *reinterpret_cast<const Numbers*>(in + (g + k) % groups.slabs * groups.slab_floats);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (g + k <= end)
#pragma unroll
                for (int i = 0; i < kCount; ++i) sum[i] += reinterpret_cast<const float*>(&parts[k])[i];
    }
    float* to = p.da.data + token * p.da.ld + head * p.scalars + r;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (r + i < p.scalars) to[i] = sum[i];
}
template <int R>
dim3 blocks_of_da(const AttentionBackward<bf16>& p) {
    const std::int64_t threads = std::int64_t(p.seq.tokens) * (R / kSumsOfThread<R>);
    return dim3(static_cast<unsigned>(ceil_div(threads, std::int64_t(256))), static_cast<unsigned>(p.heads));
}

}  // namespace fiedler::attention_tile
