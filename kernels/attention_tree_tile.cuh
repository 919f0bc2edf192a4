// kernels/attention_tree_tile.cuh: what the forward and the backward pass over a tile share: its keys and queries, in
// shared memory and apart from each other, and rows of theirs gathered into tensor-core operands.
#pragma once
#include "kernels/attention_tree_scan.cuh"
#include "kernels/mma.cuh"

namespace fiedler::attention_tree {

// Up to 64 rows of bf16, gathered. Rows are padded by 16 bytes, an odd number of 16-byte units in all, so that the eight
// rows of an ldmatrix lie in different banks.
template <int D>
struct alignas(16) Rows {
    static constexpr int kStride = D + 8;
    nv_bf16 data[kTile * kStride];

    // Zeros from row n up to the next multiple of 16: a weight of zero must not meet a NaN. By all threads; not waited for.
    __device__ void gather(const nv_bf16* from, std::int64_t ld, const int* tokens, int n) {
        constexpr int kParts = D / 8;
        const int all = (n + 15) / 16 * 16 * kParts;
        for (int e = threadIdx.x; e < all; e += kTileThreads) {
            const int row = e / kParts, part = e % kParts * 8;
            const bool valid = row < n;
            cp_async16(data + row * kStride + part, from + (valid ? tokens[row] : 0) * ld + part, valid);
        }
    }
    // A operand, 16 rows from `row` x 16 columns from `column`.
    __device__ void rows_outside(std::uint32_t (&a)[4], int row, int column) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        ldmatrix_x4(a, data + (row + lane % 16) * kStride + column + lane / 16 * 8);
    }
    // B operands whose inner dimension is the 16 rows from `row`: two tiles of 8 columns, from `column`.
    __device__ void rows_inside(std::uint32_t (&b)[4], int row, int column) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        ldmatrix_x4_trans(b, data + (row + lane % 16) * kStride + column + lane / 16 * 8);
    }
    // B operands whose inner dimension is the 16 columns from `column`: two tiles of 8 rows, from `row`.
    __device__ void columns_inside(std::uint32_t (&b)[4], int row, int column) const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        ldmatrix_x4(b, data + (row + lane % 8 + lane / 16 * 8) * kStride + column + lane / 8 % 2 * 8);
    }
};

// One role of a tile: 64 places, the first `count` taken, by scalar. Beyond them: a log weight of kNone.
struct alignas(16) Side {
    float scalar[kTile], log_weight[kTile], number[kTile];
    int token[kTile], count;
};
struct alignas(16) Sides {
    Side keys, queries;
    float low, high;  // scalars of the tile's first and last position
    unsigned masks[2][2];
};

// The tile's entries that count to their sides; log weights as in kernels/attention_tree_scan.cuh, of queries without lse unless
// backward (number: delta). All threads; ends with a barrier.
template <bool backward>
__device__ void load_sides(Sides& sides, const Scene& s, const Node& node, const float2& bound, int head, int start,
                           int count) {
    const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    float x = 0.f, log_weight = kNone, number = 0.f;
    int token = 0;
    bool query = false, valid = false;
    if (thread < count) {
        const Entry e = s.order(head)[start + thread];
        x = scalar_of(e), token = token_of(e), query = is_query(e);
        const float F = s.gates_of(head)[token];
        const float2 ends = query ? s.ends_of(head)[token] : float2{0.f, 0.f};
        log_weight = s.gate_at_half(node, head) - F;
        if (query) log_weight = -log_weight;
        if (backward && query) log_weight -= ends.x, number = ends.y;
        if (thread == 0) sides.low = x;
        if (thread == count - 1) sides.high = x;
        valid = s.counts(bound, query, F, ends.x);
        if (!valid && query != backward) {  // its sums may have to get from one place to another all the same
            const Touch touch = backward ? s.level.of_key(token) : s.level.of_query(token);
            valid = touch.first != touch.last;
        }
    }
    const unsigned keys = __ballot_sync(0xffffffffu, valid && !query);
    const unsigned queries = __ballot_sync(0xffffffffu, valid && query);
    if (lane == 0 && warp < 2) sides.masks[0][warp] = keys, sides.masks[1][warp] = queries;
    __syncthreads();
    if (thread < kTile) {
        const int n_keys = __popc(sides.masks[0][0]) + __popc(sides.masks[0][1]);
        const int n_queries = __popc(sides.masks[1][0]) + __popc(sides.masks[1][1]);
        if (valid) {
            const unsigned before = (1u << lane) - 1;
            const int place =
                __popc((query ? queries : keys) & before) + (warp == 1 ? __popc(sides.masks[query][0]) : 0);
            Side& side = query ? sides.queries : sides.keys;
            side.scalar[place] = x, side.log_weight[place] = log_weight, side.number[place] = number;
            side.token[place] = token;
        }
        if (thread >= n_keys) sides.keys.scalar[thread] = 0.f, sides.keys.log_weight[thread] = kNone;
        if (thread >= n_queries) {
            sides.queries.scalar[thread] = 0.f, sides.queries.log_weight[thread] = kNone;
            sides.queries.number[thread] = 0.f;
        }
        if (thread == 0) sides.keys.count = n_keys, sides.queries.count = n_queries;
    }
    __syncthreads();
}

// A state of the tile in shared memory: what all tiles before it add up to, at scalar `at`.
template <int D>
struct alignas(16) State {
    float sum[D], number, scale;

    // By all threads.
    __device__ void load(const Scene& s, int part, int head, int slot) {
        const std::int64_t row = s.row(part, head, slot);
        const float* from = s.states + row * (D + 4);
        for (int i = threadIdx.x; i < D; i += kTileThreads) sum[i] = from[i];
        if (threadIdx.x == 0) number = from[D], scale = s.scales[row];
    }
};

// The sums of one token: bf16 in the result before the first level that touches it and after the last, else f32.
template <int D>
struct SumRow {
    float* sums;
    nv_bf16* result;
    Touch touch;
    bool empty;  // nothing comes from leaves

    __device__ float2 read(int column) const {
        if (!touch.first) return *reinterpret_cast<const float2*>(sums + column);
        if (empty) return {0.f, 0.f};
        const auto pair = *reinterpret_cast<const __nv_bfloat162*>(result + column);
        return {__low2float(pair), __high2float(pair)};
    }
    __device__ void write(int column, float2 x) const {
        if (touch.last)
            *reinterpret_cast<std::uint32_t*>(result + column) = pack_bf16(x.x, x.y);
        else
            *reinterpret_cast<float2*>(sums + column) = x;
    }
};

}  // namespace fiedler::attention_tree
