// kernels/attention_backward_packed.cuh: the backward pass of scalar-distance attention for R > 1 scalars: distances in
// pairs of f16 (kernels/attention_packed.cuh), all sums of the gradients of scalars on the tensor cores. Blocks, groups
// of keys and slabs are those of kernels/attention_backward.cuh.
//
// A warp owns 16 keys (rows) and takes 8 queries (columns) at a time. -ds, rounded to bf16 once for both of its sums,
// is multiplied by the signs,
//     step = sat(2^15 d + 15/16), read as bf16: 0, 2^-8 (d = 0) or 2^-7, since the least |d| is 2^-13
//     X_r = (256 ds) step - ds = sign(d_r) ds                                exact, and 0 at a tie
// and X_r, two of them side by side, is an A operand whose product with ones in column r is the sum over the queries,
// db_r; turned (movmatrix), it is one whose product is the sum over the keys, - da_r. So sums take four registers for
// eight scalars and no exchange between lanes. -ds itself times ones is dF.
//
// Where scalars are out of range, differences are taken in f32 from what lies in global memory; f16 has their signs
// only.
#pragma once
#include "kernels/attention_backward.cuh"
#include "kernels/attention_packed.cuh"

namespace fiedler::attention_tile {

template <int D, int R>
struct PackedShape {
    static constexpr tuning::AttentionBackward kTuned = tuning::attention_backward(D, R);
    static constexpr int kKeys = kTuned.keys(), kWarps = kTuned.warps, kBlockThreads = kWarps * kWarp,
                         kBlocks = kTuned.blocks;
    static constexpr bool kKeepValues = kTuned.values;
    static_assert(kTuned.row_tiles == 1);
    static constexpr bool kScoresOnTensorCores = tuning::scores_on_tensor_cores(kArch);
    static constexpr int kTiles = (R + 7) / 8;  // C tiles of eight scalars
};

// 64 queries.
template <int D, int R>
struct PackedQueries {
    ValueTile<D> gradients;                             // dO
    alignas(16) std::uint32_t a[kTile / 2][R];          // of queries 2i and 2i + 1
    alignas(16) float base[kTile], minus_delta[kTile];  // F_i - G - lse_i in base 2, G of a key of the block
};

template <int D, int R>
struct alignas(128) PackedShared {
    using Shape = PackedShape<D, R>;
    PackedQueries<D, R> queries[2];
    alignas(16) nv_bf16 values[Shape::kKeepValues ? 8 : Shape::kKeys * ValueTile<D>::kStride];  // V of the keys
    float sums[Shape::kWarps][kTile * R];  // of each warp, over its keys: da of the tile's queries
    // What a thread has asked for, for itself: a of two queries; F, lse, delta of one.
    alignas(16) float raw_a[kTile * R];
    float raw[3][kTile];
    int2 sight[Shape::kKeys];  // the queries [x, y) that see each key
    int4 band[Shape::kWarps];  // Band::ends of a warp's keys
    float gate;                // G
    volatile int head, slab, first;
    volatile int end, written;
    volatile bool far;  // whether a scalar of the keys is out of range
};

__device__ inline int lane_in_warp() { return static_cast<int>(threadIdx.x % kWarp); }
// x, in a form that the compiler keeps in a register instead of making it again.
template <class T>
__device__ T kept(T x) {
    return __shfl_sync(0xffffffffu, x, lane_in_warp());
}
__device__ inline std::uint32_t turned(std::uint32_t x) {
    std::uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
    return y;
}

// Bringing 64 queries into shared memory: start asks for them, finish makes what the pairs need of what the thread
// itself has asked for.
template <int D, int R>
struct PackedLoader {
    using Shape = PackedShape<D, R>;
    static constexpr int kThreads = Shape::kBlockThreads;
    // Items of up to four scalars of a query.
    static constexpr int kOfItem = R < 4 ? R : 4, kFours = R / kOfItem, kItems = kTile * kFours;
    const AttentionBackward<bf16>& p;
    PackedShared<D, R>& shared;

    __device__ void start(int stage, int column) const {
        constexpr int kParts = D / 8, kRows = kThreads / kParts;
        const int thread = thread_anew(), tokens = p.seq.tokens, head = shared.head, part = thread % kParts * 8;
        const nv_bf16* source = nv(p.do_.data) + head * D + part;
        nv_bf16* to = shared.queries[stage].gradients.data + thread / kParts * ValueTile<D>::kStride + part;
        int token = column + thread / kParts;
#pragma unroll
        for (int i = kRows <= kTile || thread / kParts < kTile ? 0 : 1; i < (kTile + kRows - 1) / kRows;
             ++i, token += kRows, to += kRows * ValueTile<D>::kStride)
            cp_async16(to, source + (token < tokens ? token : 0) * p.do_.ld, token < tokens);
        const bool whole = whole_scalars<R>(p.a.data, p.scalars);
#pragma unroll
        for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
            const int e = thread + i * kThreads, r = e % kFours * 4;
            if (e >= kItems) break;
            const float* from =
                p.a.data + std::int64_t(min(column + e / kFours, tokens - 1)) * p.a.ld + head * p.scalars + r;
            float* raw = shared.raw_a + e * kOfItem;
            if (whole && R >= 4) {
                cp_async16(raw, from, true);
            } else {
#pragma unroll
                for (int u = 0; u < kOfItem; ++u)
                    cp_async4(raw + u, r + u < p.scalars ? from + u : p.a.data, r + u < p.scalars);
            }
        }
        if (thread < kTile) {
            const std::int64_t token = min(column + thread, tokens - 1);
            cp_async4(&shared.raw[0][thread], p.lse.data + token * p.lse.ld + head, true);
            cp_async4(&shared.raw[1][thread], p.delta.data + token * p.delta.ld + head, true);
            if (p.F.data != nullptr) cp_async4(&shared.raw[2][thread], p.F.data + token * p.F.ld + head, true);
        }
        cp_async_commit();
    }
    // Whether a scalar is out of range.
    __device__ bool finish(int stage) const {
        const int thread = thread_anew();
        bool far = false;
        PackedQueries<D, R>& to = shared.queries[stage];
#pragma unroll
        for (int i = 0; i < (kItems + kThreads - 1) / kThreads; ++i) {
            const int e = thread + i * kThreads, query = e / kFours, r = e % kFours * 4;
            if (e >= kItems) break;
            float x[kOfItem];
            load_numbers(x, shared.raw_a + e * kOfItem, kOfItem, true);
            __half* half = reinterpret_cast<__half*>(to.a[query / 2] + r) + query % 2;
#pragma unroll
            for (int u = 0; u < kOfItem; ++u) {
                far |= !packs(x[u]);
                half[2 * u] = __float2half_rn(packed_number(x[u]));
            }
        }
        if (thread < kTile) {
            const float F = p.F.data != nullptr ? shared.raw[2][thread] : 0.f;
            to.base[thread] = ((F - shared.gate) - shared.raw[0][thread]) * kLog2e;
            to.minus_delta[thread] = -shared.raw[1][thread];
        }
        asm volatile("" ::: "memory");
        return far;
    }
};

// The keys of a warp: rows 8 k + g of its 16 in a thread.
template <int D, int R>
struct PackedKeys {
    using Shape = PackedShape<D, R>;
    using Shared = PackedShared<D, R>;
    static constexpr int kStride = ValueTile<D>::kStride, kTiles = Shape::kTiles;
    const AttentionBackward<bf16>& p;
    const int warp = warp_number();
    // What the lane adds to the address of a 16 x 16 block, to name its row of ldmatrix: for A operands or turned, and
    // for B operands whose inner dimension is the columns.
    const int block_row, columns_row;
    const int pair;             // the first of the lane's columns of eight
    std::uint32_t b[2][R / 2];  // packed, two scalars of a row
    float gate[2];              // F_j - G in base 2
    std::uint32_t values[Shape::kKeepValues ? D / 16 : 1][4];
    std::uint32_t chosen[R < 8 ? R : 8];  // B operands: ones in column r
    const std::uint32_t diagonal;
    float db[kTiles][4] = {}, dF[4] = {}, dv[D / 8][4] = {};

    __device__ int warp_first(const Shared& shared) const { return shared.first + warp * 16; }

    __device__ PackedKeys(const AttentionBackward<bf16>& p_, const Shared& shared)
        : p(p_),
          block_row(kept(lane_in_warp() % 16 * kStride + lane_in_warp() / 16 * 8)),
          columns_row(kept((lane_in_warp() % 8 + lane_in_warp() / 16 * 8) * kStride + lane_in_warp() / 8 % 2 * 8)),
          pair(kept(lane_in_warp() % 4 * 2)),
          diagonal(kept(minus_diagonal())) {
        const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
        const int head = shared.head;
        const Rows rows(sight, warp_first(shared));
        load_row_numbers(gate, gate_of_head(p, head), p.F.ld, rows);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            gate[k] = (gate[k] - shared.gate) * kLog2e;
#pragma unroll
            for (int r = 0; r < R; r += 2) {
                const float* from =
                    p.b.data + std::int64_t(min(rows.token(k), p.seq.tokens - 1)) * p.b.ld + head * p.scalars + r;
                const auto number = [&](int i) { return r + i < p.scalars ? packed_number(from[i]) : 0.f; };
                b[k][r / 2] = pack_half(number(0), number(1));
            }
        }
#pragma unroll
        for (int r = 0; r < R && r < 8; ++r) chosen[r] = kept(ones_in(r));
        if constexpr (Shape::kKeepValues) load_operand<D>(values, nv(p.v.data) + head * D, p.v.ld, rows);
    }

    // A tile of queries, `column` the token of its first; the warp's sums of it are always written. kCareful: scalars
    // are out of range.
    template <bool kCareful>
    __device__ void add_tile(const Shared& shared, float* sums, const PackedQueries<D, R>& tile, int column,
                             bool skips) {
        const bool skip = skips && faded(tile);
#pragma unroll 1
        for (int chunk = 0; chunk < kTile; chunk += 16) {
            const Band band(shared.band[warp]);
            if (skip || band.misses(column + chunk, 16)) {
                for (int i = threadIdx.x % kWarp; i < 16 * R; i += kWarp) sums[chunk * R + i] = 0.f;
            } else {
                add<kCareful>(shared, sums, tile, column, chunk, band.covers(column + chunk, 16));
            }
        }
    }

    __device__ void store(const Shared& shared) const {
        const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
        const int head = shared.head, t = thread_anew() % 4;
        const Rows rows(sight, warp_first(shared));
        float* to = p.db.data + head * p.scalars;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            if (!rows.valid(k)) continue;
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int r = 8 * i + 2 * t + j;
                    if (r < p.scalars) to[rows.token(k) * p.db.ld + r] = db[i][2 * k + j];
                }
            if (p.dF.data != nullptr && t == 0) p.dF.data[rows.token(k) * p.dF.ld + head] = dF[2 * k];
        }
        store_rows<D>(nv(p.dv.data) + head * D, p.dv.ld, dv, {1.f, 1.f}, rows);
    }

  private:
    // Whether the gate alone puts every weight of the tile out of sight, for all rows of the warp.
    __device__ bool faded(const PackedQueries<D, R>& tile) const {
        const float most = tile_max([&](int j) { return tile.base[j]; });
        return __all_sync(0xffffffffu, most - gate[0] < -kFaded * kLog2e && most - gate[1] < -kFaded * kLog2e) != 0;
    }
    // 16 queries of a tile, from `chunk`. whole: they see all keys of the warp; else the keys' sight tells.
    template <bool kCareful>
    __device__ void add(const Shared& shared, float* sums, const PackedQueries<D, R>& tile, int column, int chunk,
                        bool whole) {
        float ds[2][4];
        std::uint32_t weights[4], minus_ds[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 x = *reinterpret_cast<const float2*>(tile.minus_delta + chunk + 8 * n + pair);
            ds[n][0] = ds[n][2] = x.x, ds[n][1] = ds[n][3] = x.y;
        }
        products(ds, shared, tile, chunk);
#pragma unroll
        for (int n = 0; n < 2; ++n)
            eight<kCareful>(weights + 2 * n, minus_ds + 2 * n, ds[n], shared, sums, tile, column, chunk + 8 * n, whole);
        mma_bf16(dF, minus_ds, 0x3f803f80u, 0x3f803f80u);
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {  // dv += P' dO
            std::uint32_t g[4];
            ldmatrix_x4_trans(g, tile.gradients.data + block_row + chunk * kStride + 16 * n);
            mma_bf16(dv[2 * n], weights, g[0], g[1]);
            mma_bf16(dv[2 * n + 1], weights, g[2], g[3]);
        }
    }
    // c += V dO', 16 columns.
    __device__ void products(float (&c)[2][4], const Shared& shared, const PackedQueries<D, R>& tile, int chunk) const {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            std::uint32_t g[4];
            ldmatrix_x4(g, tile.gradients.data + columns_row + chunk * kStride + 16 * n);
            if constexpr (Shape::kKeepValues) {
                mma_bf16(c[0], values[n], g[0], g[1]);
                mma_bf16(c[1], values[n], g[2], g[3]);
            } else {
                std::uint32_t v[4];
                ldmatrix_x4(v, shared.values + block_row + warp * 16 * kStride + 16 * n);
                mma_bf16(c[0], v, g[0], g[1]);
                mma_bf16(c[1], v, g[2], g[3]);
            }
        }
    }
    // Eight queries, from `first` of the tile: dP - delta to ds, and into the sums; weights and -ds of the two rows.
    template <bool kCareful>
    __device__ void eight(std::uint32_t* weights, std::uint32_t* minus_ds, const float (&dp)[4], const Shared& shared,
                          float* sums, const PackedQueries<D, R>& tile, int column, int first, bool whole) {
        const int local = first + pair;
        const float2 base = *reinterpret_cast<const float2*>(tile.base + local);
        float s[4];
        std::uint32_t d[2][kCareful ? 1 : R];  // a - b, of two columns
        const float c[4] = {base.x - gate[0], base.y - gate[0], base.x - gate[1], base.y - gate[1]};
        if constexpr (!kCareful) {
            const std::uint32_t* a = tile.a[0] + local * (R / 2);
#pragma unroll
            for (int r = 0; r < R; r += 2) {
                const uint2 y = *reinterpret_cast<const uint2*>(a + r);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    d[k][r] = difference2(y.x, twice_low(b[k][r / 2]));
                    d[k][r + 1] = difference2(y.y, twice_high(b[k][r / 2]));
                }
            }
            packed_scores<R, Shape::kScoresOnTensorCores>(s, d, c, diagonal);
        } else {
            far_scores(s, c, shared, column + local);
        }
        if (!whole) [[unlikely]] {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int2 sight = shared.sight[warp * 16 + e / 2 * 8 + lane_in_warp() / 4];
                const int token = column + local + e % 2;
                if (token < sight.x || token >= sight.y) s[e] = -INFINITY;
            }
        }
        float da[kTiles][4] = {};
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = exp2_fast(s[e]);
        std::uint32_t doubled[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            weights[k] = pack_bf16(s[2 * k], s[2 * k + 1]);
            minus_ds[k] = pack_bf16(-s[2 * k] * dp[2 * k], -s[2 * k + 1] * dp[2 * k + 1]);
            doubled[k] = fma_bf16(minus_ds[k], 0xc380c380u, 0x80008000u);  // times -256
        }
#pragma unroll
        for (int tile_of_r = 0; tile_of_r < kTiles; ++tile_of_r)
#pragma unroll(kCareful ? 1 : 4)
            for (int i = 0; i < (R < 8 ? R : 8); i += 2) {  // two scalars
                const int r = 8 * tile_of_r + i;
                std::uint32_t of[4], x[4], y[4], ones[2];
                if constexpr (kCareful) {
                    far_signs(of, shared, column + local, r);
                    ones[0] = ones_in(i), ones[1] = ones_in(i + 1);
                } else {
#pragma unroll
                    for (int e = 0; e < 4; ++e) of[e] = d[e % 2][r + e / 2];
                    ones[0] = chosen[i], ones[1] = chosen[i + 1];
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) x[e] = fma_bf16(doubled[e % 2], step2(of[e]), minus_ds[e % 2]);
                mma_bf16(db[tile_of_r], x, ones[0], ones[1]);
#pragma unroll
                for (int e = 0; e < 4; ++e) y[e] = turned(x[e % 2 * 2 + e / 2]);
                mma_bf16(da[tile_of_r], y, ones[0], ones[1]);
            }
        float* to = sums + (first + lane_in_warp() / 4) * R + pair;
        if (R >= 8 || pair < R)
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
                *reinterpret_cast<float2*>(to + 8 * i) = {-da[i][0] - da[i][1], -da[i][2] - da[i][3]};
    }
    __device__ static std::uint32_t ones_in(int column) { return lane_in_warp() / 4 == column ? 0x3f803f80u : 0u; }
    // Differences of scalar r in f32, of the thread's rows and the columns of `token` and the next: visit(row, d, d of
    // the next).
    template <class Visit>
    __device__ void far_differences(const Shared& shared, int token, int r, Visit&& visit) const {
        if (r >= p.scalars) return visit(0, 0.f, 0.f), visit(1, 0.f, 0.f);
        const int row = warp_first(shared) + lane_in_warp() / 4;
        const auto at = [&](const Mat<const float>& x, int i) {
            return x.data[std::int64_t(min(i, p.seq.tokens - 1)) * x.ld + shared.head * p.scalars + r];
        };
        const float x[2] = {at(p.a, token), at(p.a, token + 1)};
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float y = at(p.b, row + 8 * k);
            visit(k, x[0] - y, x[1] - y);
        }
    }
    __device__ void far_scores(float (&s)[4], const float (&c)[4], const Shared& shared, int token) const {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = 0.f;
#pragma unroll 1
        for (int r = 0; r < R; ++r)
            far_differences(shared, token, r,
                            [&](int k, float d0, float d1) { s[2 * k] += fabsf(d0), s[2 * k + 1] += fabsf(d1); });
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = fmaf(s[e], -kLog2e, c[e]);
    }
    // of[row], of[2 + row]: signs of scalars r and r + 1, as f16 of two columns.
    __device__ void far_signs(std::uint32_t (&of)[4], const Shared& shared, int token, int r) const {
        const auto sign = [](float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f; };
#pragma unroll
        for (int u = 0; u < 2; ++u)
            far_differences(shared, token, r + u,
                            [&](int k, float d0, float d1) { of[2 * u + k] = pack_half(sign(d0), sign(d1)); });
    }
};

// The warps' sums for a tile of 64 queries to the block's slab; add: to what an earlier tile of keys left there.
template <int D, int R>
__device__ void store_sums(const PackedShared<D, R>& shared, float* out, bool add) {
    for (int i = thread_anew(); i < kTile * R / 4; i += PackedShape<D, R>::kBlockThreads) {
        float4* to = reinterpret_cast<float4*>(out) + i;
        float4 x = add ? *to : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < PackedShape<D, R>::kWarps; ++w) {
            const float4 y = reinterpret_cast<const float4*>(shared.sums[w])[i];
            x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
        }
        *to = x;
    }
}

// The block's next keys: what they see, V, and the first tile of queries, whose number is returned, on its way.
template <int D, int R>
__device__ int begin_keys(const AttentionBackward<bf16>& p, PackedShared<D, R>& shared) {
    using Shape = PackedShape<D, R>;
    constexpr int kThreads = Shape::kBlockThreads;
    const Sight sight = Sight::of_keys(p.seq, p.window, p.causal);
    const int thread = thread_anew(), first = shared.first, head = shared.head, tokens = p.seq.tokens;
    const int last = min(first + Shape::kKeys, tokens) - 1, q = sight.lo(first) / kTile;
    for (int i = thread; i < Shape::kKeys; i += kThreads) {
        const bool valid = first + i < tokens;
        shared.sight[i] = valid ? make_int2(sight.lo(first + i), sight.hi(first + i)) : make_int2(0, 0);
    }
    if (thread < Shape::kWarps) {
        const int from = first + thread * 16;
        Band band(sight, from, min(from + 16, tokens) - 1);
        if (from + 16 > tokens) band.full_hi = band.full_lo;  // rows that do not exist see nothing
        shared.band[thread] = band.ends();
    }
    bool far = false;
    for (int i = thread; i < Shape::kKeys * R; i += kThreads) {
        const int token = first + i / R, r = i % R;
        if (token < tokens && r < p.scalars)
            far |= !packs(p.b.data[std::int64_t(token) * p.b.ld + head * p.scalars + r]);
    }
    if (thread == 0) {
        shared.end = ceil_div(sight.hi(last), kTile);
        shared.gate = p.F.data != nullptr ? p.F.data[std::int64_t(first) * p.F.ld + head] : 0.f;
    }
    if constexpr (!Shape::kKeepValues) {
        constexpr int kParts = D / 8;
        for (int e = thread; e < Shape::kKeys * kParts; e += kThreads) {
            const int row = e / kParts, part = e % kParts * 8;
            const bool valid = first + row < tokens;
            cp_async16(shared.values + row * ValueTile<D>::kStride + part,
                       nv(p.v.data) + head * D + (valid ? first + row : 0) * p.v.ld + part, valid);
        }
    }
    PackedLoader<D, R>{p, shared}.start(q % 2, q * kTile);
    far = __syncthreads_or(far) != 0;
    if (thread == 0) shared.far = far;
    __syncthreads();
    return q;
}

template <int D, int R>
__global__ void __launch_bounds__((PackedShape<D, R>::kBlockThreads), (PackedShape<D, R>::kBlocks))
    attention_backward_packed_kernel(AttentionBackward<bf16> p, BackwardGroups groups) {
    using Shape = PackedShape<D, R>;
    extern __shared__ __align__(128) unsigned char memory[];
    auto& shared = *reinterpret_cast<PackedShared<D, R>*>(memory);
    const int tokens = p.seq.tokens;
    if (threadIdx.x == 0) {
        const BackwardBlock block(groups, p.heads);
        shared.head = block.head;
        shared.slab = block.group % groups.slabs;
        shared.first = block.group * groups.tiles * Shape::kKeys;
        shared.written = 0;
    }
    __syncthreads();
    const PackedLoader<D, R> loader{p, shared};

#pragma unroll 1
    for (int k = 0; k < groups.tiles && shared.first < tokens; ++k) {
        int q = begin_keys(p, shared);
        PackedKeys<D, R> keys(p, shared);
#pragma unroll 1
        for (; q < shared.end; ++q) {
            cp_async_wait<0>();
            const bool far = loader.finish(q % 2);
            if (q + 1 < shared.end) loader.start((q + 1) % 2, (q + 1) * kTile);
            const bool careful = __syncthreads_or(far || shared.far) != 0;
            const bool skips = p.F.data != nullptr && p.skip;
            if (!careful)
                keys.template add_tile<false>(shared, shared.sums[warp_number()], shared.queries[q % 2], q * kTile,
                                              skips);
            else
                keys.template add_tile<true>(shared, shared.sums[warp_number()], shared.queries[q % 2], q * kTile,
                                             skips);
            __syncthreads();
            const std::int64_t padded = ceil_div(tokens, kTile) * std::int64_t(kTile);
            store_sums(shared,
                       groups.partial + shared.slab * groups.slab_floats + (shared.head * padded + q * kTile) * R,
                       q < shared.written);
        }
        keys.store(shared);
        __syncthreads();
        if (threadIdx.x == 0) {
            shared.written = max(shared.written, shared.end);
            shared.first = shared.first + Shape::kKeys;
        }
        __syncthreads();
    }
}

}  // namespace fiedler::attention_tile
