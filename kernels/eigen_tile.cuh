// kernels/eigen_tile.cuh: the tiled products of eigen.cu: X'Y and X Q for tall, thin blocks, in f32 on the ordinary
// cores. Only eigen.cu includes it.
#pragma once
#include "kernels/common.cuh"
#include "kernels/eigen.h"
#include "kernels/mma.cuh"

namespace fiedler {
namespace {

constexpr int kThreads = 256;

__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline float4 zero4() { return make_float4(0.f, 0.f, 0.f, 0.f); }
__device__ inline float& at(float4& v, int i) { return (&v.x)[i]; }
// cp_async16 of the first `bytes` (0 to 16), zeros after them.
__device__ inline void cp_async16_part(void* dst, const void* src, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(bytes));
}

// ---- gram ----------------------------------------------------------------------------------------------------------
//
// A block takes a chunk of rows and a panel of at most 128 x 128 entries of G, cut into tiles of 32 x 32. A warp owns a
// tile (with kSplits > 1, kSplits warps do, each with its share of the rows); a lane owns 8 x 4 entries. Rows pass
// through shared memory, kStage at a time, kStages deep. When X is Y, tiles above the diagonal are left out.
//
// Sums of a run of kEigenRun rows are f32; across runs they are kept as f32 pairs, a sum and what its additions lost
// (Knuth's exact sum), which is as good as double and does not need the double-precision units that most cards lack.
// The lost part is where the next run begins to add.

constexpr int kTile = 32, kStage = 16, kStages = 3, kPanel = 128, kGramThreads = 512;
constexpr int kTileI = 8, kTileJ = 4;  // of a lane

struct GramArgs {
    const float *x, *y;
    std::int64_t ld_x, ld_y, n, chunk;  // chunk: rows of a block, whole runs
    int mx, my, side_x, side_y;         // side: width of a panel, whole tiles
    int panels_y;
    bool same;  // X is Y
    float2* partial;
};

__device__ inline void exact_add(float& sum, float& lost) {
    const float before = sum, added = lost;
    sum = __fadd_rn(before, added);
    const float taken = __fsub_rn(sum, before);
    lost = __fadd_rn(__fsub_rn(before, __fsub_rn(sum, taken)), __fsub_rn(added, taken));
}

// kStage rows of one operand from row `first`; rows from `end` on are zeros. A warp loads a row, a lane four columns.
__device__ inline void load_stage(float* to, int side, const float* from, std::int64_t ld, int columns,
                                  std::int64_t first, std::int64_t end) {
    const int lane = threadIdx.x % kWarp, column = lane * 4;
    if (column >= side || column >= columns) return;
    for (int k = threadIdx.x / kWarp; k < kStage; k += blockDim.x / kWarp) {
        const std::int64_t row = first + k;
        cp_async16(to + k * side + column, from + (row < end ? row : 0) * ld + column, row < end);
    }
}

struct GramPlace {  // of a warp
    int i, j;       // its tile's first row and column within the panel
    bool active;
};
// Tile number t of the panel; below and on the diagonal only, if `lower`.
__device__ inline GramPlace place_of(int t, int tiles_x, int tiles_y, bool lower) {
    int i = 0;
    if (lower) {
        while (t > i) t -= ++i;
        return {i * kTile, t * kTile, i < tiles_x};
    }
    return {t / tiles_y * kTile, t % tiles_y * kTile, t < tiles_x * tiles_y};
}

template <int kSplits>
__global__ void __launch_bounds__(kGramThreads, 1) eigen_gram_kernel(const GramArgs a) {
    extern __shared__ __align__(16) float shared[];
    int panel_i = 0, panel_j = blockIdx.x;
    if (a.same)
        while (panel_j > panel_i) panel_j -= ++panel_i;
    else
        panel_i = panel_j / a.panels_y, panel_j %= a.panels_y;
    const bool diagonal = a.same && panel_i == panel_j;
    const int first_i = panel_i * a.side_x, first_j = panel_j * a.side_y;
    const int wide_i = a.mx - first_i, wide_j = a.my - first_j;  // columns from here on
    const float *x = a.x + first_i, *y = a.y + first_j;
    const int stage_size = kStage * (a.side_x + (diagonal ? 0 : a.side_y));

    const int warp = threadIdx.x / kWarp, split = warp % kSplits, lane = threadIdx.x % kWarp;
    GramPlace place = place_of(warp / kSplits, a.side_x / kTile, a.side_y / kTile, diagonal);
    place.active = place.active && place.i < wide_i && place.j < wide_j;
    const int i0 = place.i + lane / 8 * 4, j0 = place.j + lane % 8 * 4;  // and i0 + 16

    const std::int64_t begin = blockIdx.y * a.chunk, end = min(begin + a.chunk, a.n);
    const int stages = int(ceil_div(end - begin, std::int64_t(kStage)));
    const auto load = [&](int s) {
        if (s < stages) {
            float* to = shared + s % kStages * stage_size;
            load_stage(to, a.side_x, x, a.ld_x, wide_i, begin + std::int64_t(s) * kStage, end);
            if (!diagonal)
                load_stage(to + kStage * a.side_x, a.side_y, y, a.ld_y, wide_j, begin + std::int64_t(s) * kStage, end);
        }
        cp_async_commit();
    };
    float sum[kTileI][kTileJ] = {}, run[kTileI][kTileJ] = {};
    for (int s = 0; s < kStages - 1; ++s) load(s);
    for (int s = 0; s < stages; ++s) {
        cp_async_wait<kStages - 2>();
        __syncthreads();  // stage s is here, and stage s - 1 is used up
        load(s + kStages - 1);
        if (!place.active) continue;
        const float* rows_x = shared + s % kStages * stage_size;
        const float* rows_y = diagonal ? rows_x : rows_x + kStage * a.side_x;
#pragma unroll 4
        for (int k = 0; k < kStage / kSplits; ++k) {
            const int row = k * kSplits + split;
            float4 u[2] = {load4(rows_x + row * a.side_x + i0), load4(rows_x + row * a.side_x + i0 + 16)};
            float4 v = load4(rows_y + row * a.side_y + j0);
#pragma unroll
            for (int i = 0; i < kTileI; ++i)
#pragma unroll
                for (int j = 0; j < kTileJ; ++j) run[i][j] = fmaf(at(u[i / 4], i % 4), at(v, j), run[i][j]);
        }
        if ((s + 1) % (kEigenRun / kStage * kSplits) == 0) {
#pragma unroll
            for (int i = 0; i < kTileI; ++i)
#pragma unroll
                for (int j = 0; j < kTileJ; ++j) exact_add(sum[i][j], run[i][j]);
        }
    }

    // The splits of a tile are added in order; the last one writes.
    float2* totals = reinterpret_cast<float2*>(shared) + warp / kSplits * (kTile * kTile);
    float2* out = a.partial + std::int64_t(blockIdx.y) * a.mx * a.my;
#pragma unroll
    for (int turn = 0; turn < kSplits; ++turn) {
        if (kSplits > 1) __syncthreads();
        if (turn != split || !place.active) continue;
#pragma unroll
        for (int i = 0; i < kTileI; ++i)
#pragma unroll
            for (int j = 0; j < kTileJ; ++j) {
                float2* total = totals + (i * kTileJ + j) * kWarp + lane;
                float2 value = make_float2(sum[i][j], run[i][j]);
                if (turn > 0) {
                    float added = total->x;
                    exact_add(value.x, added);
                    value.y += total->y + added;
                }
                if (turn + 1 < kSplits) {
                    *total = value;
                    continue;
                }
                const int row = first_i + i0 + i / 4 * 16 + i % 4, column = first_j + j0 + j;
                if (row < a.mx && column < a.my) out[row * a.my + column] = value;
            }
    }
}

// Panels of about equal width, whole tiles.
int panel_side(int columns) { return ceil_div(ceil_div(columns, ceil_div(columns, kPanel)), kTile) * kTile; }

// ---- rotate --------------------------------------------------------------------------------------------------------
//
// Tiles of 128 rows and 16 kWide columns of Y: a thread owns rows r + 16 q and kWide columns, the first kFirst of them
// neighbours, the others too. X and Q pass through shared memory, kDepth columns of X at a time, two deep.

constexpr int kRotateRows = 128, kDepth = 16, kPitch = kDepth + 4;  // kPitch: rows of X fall on different banks
constexpr int kLaneRows = kRotateRows / 16;

struct RotateArgs {
    float* y;
    const float *x, *q;
    std::int64_t ld_y, ld_x, n;
    int ld_q, mx, my;
    float alpha;
    bool add;
};

__global__ void __launch_bounds__(kThreads) eigen_round_kernel(float* out, int ld, Mat<const double> q) {
    const std::int64_t k = std::int64_t(blockIdx.x) * kThreads + threadIdx.x, i = k / ld, j = k % ld;
    if (i < q.rows) out[k] = j < q.cols ? float(q.data[i * q.ld + j]) : 0.f;
}

template <int kCount>
__device__ inline void load_some(float (&to)[kCount], const float* from) {
    if constexpr (kCount == 4)
        *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
    else if constexpr (kCount == 2)
        *reinterpret_cast<float2*>(to) = *reinterpret_cast<const float2*>(from);
}
// y[0 .. kCount) = alpha v (+ y), as far as the row goes.
template <int kCount>
__device__ inline void store_some(const RotateArgs& a, std::int64_t row, int column, const float* v) {
    float* y = a.y + row * a.ld_y + column;
    if (column + kCount <= a.my) {
        alignas(16) float out[kCount] = {};
        if (a.add) load_some(out, y);
#pragma unroll
        for (int e = 0; e < kCount; ++e) out[e] = fmaf(a.alpha, v[e], out[e]);
        if constexpr (kCount == 4)
            *reinterpret_cast<float4*>(y) = make_float4(out[0], out[1], out[2], out[3]);
        else
            *reinterpret_cast<float2*>(y) = make_float2(out[0], out[1]);
        return;
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e)
        if (column + e < a.my) y[e] = fmaf(a.alpha, v[e], a.add ? y[e] : 0.f);
}

template <int kWide>  // 2, 4, 6, 8
__global__ void __launch_bounds__(kThreads, 2) eigen_rotate_kernel(const RotateArgs a) {
    constexpr int kFirst = kWide < 4 ? kWide : 4, kSecond = kWide - kFirst, kColumns = 16 * kWide;
    constexpr int kStep = kWide < 8 ? 4 : 2;  // columns of X in registers: as many as there is room for
    constexpr int kUnroll = kWide < 8 ? kDepth / kStep : 1;
    __shared__ __align__(16) float xs[2][kRotateRows * kPitch], qs[2][kDepth * kColumns];
    const int tiles = ceil_div(a.my, kColumns);
    const std::int64_t first_row = std::int64_t(blockIdx.x / tiles) * kRotateRows;
    const int first_column = int(blockIdx.x % tiles) * kColumns;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int tx = warp % 2 * 8 + lane % 8, ty = warp / 2 * 4 + lane / 8;

    constexpr int kLoadRows = kThreads / (kDepth / 4);
    const int load_row = threadIdx.x / (kDepth / 4), load_k = threadIdx.x % (kDepth / 4) * 4;
    const int rows = int(min(a.n - first_row, std::int64_t(kRotateRows)));
    const float* x = a.x + (first_row + load_row) * a.ld_x + load_k;
    const auto load = [&](int k0, int stage) {
#pragma unroll
        for (int r = load_row; r < kRotateRows; r += kLoadRows) {
            const bool inside = r < rows && k0 + load_k < a.mx;
            cp_async16_part(&xs[stage][r * kPitch + load_k], inside ? x + (r - load_row) * a.ld_x + k0 : a.x,
                            inside ? min(4 * (a.mx - k0 - load_k), 16) : 0);
        }
#pragma unroll
        for (int t = threadIdx.x; t < kDepth * (kColumns / 4); t += kThreads) {
            const int k = t / (kColumns / 4), c = t % (kColumns / 4) * 4;
            const bool inside = k0 + k < a.mx && first_column + c < a.ld_q;
            cp_async16(&qs[stage][k * kColumns + c], inside ? a.q + (k0 + k) * a.ld_q + first_column + c : a.q, inside);
        }
        cp_async_commit();
    };
    float sum[kLaneRows][kWide] = {};
    load(0, 0);
    for (int k0 = 0, stage = 0; k0 < a.mx; k0 += kDepth, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, the other one is used up
        if (k0 + kDepth < a.mx) load(k0 + kDepth, stage ^ 1);
#pragma unroll kUnroll
        for (int k = 0; k < kDepth; k += kStep) {
            float u[kLaneRows][kStep];
#pragma unroll
            for (int r = 0; r < kLaneRows; ++r) load_some(u[r], &xs[stage][(ty + 16 * r) * kPitch + k]);
#pragma unroll
            for (int e = 0; e < kStep; ++e) {
                const float* row = &qs[stage][(k + e) * kColumns];
                float v[kFirst], w[kSecond > 0 ? kSecond : 1];
                load_some(v, row + tx * kFirst);
                if constexpr (kSecond > 0) load_some(w, row + 16 * kFirst + tx * kSecond);
#pragma unroll
                for (int r = 0; r < kLaneRows; ++r)
#pragma unroll
                    for (int c = 0; c < kWide; ++c)
                        sum[r][c] = fmaf(u[r][e], c < kFirst ? v[c] : w[c - kFirst], sum[r][c]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kLaneRows; ++r) {
        if (ty + 16 * r >= rows) return;
        store_some<kFirst>(a, first_row + ty + 16 * r, first_column + tx * kFirst, sum[r]);
        if constexpr (kSecond > 0)
            store_some<kSecond>(a, first_row + ty + 16 * r, first_column + 16 * kFirst + tx * kSecond, sum[r] + kFirst);
    }
}
template <int kWide>
void launch_rotate(cudaStream_t stream, const RotateArgs& a) {
    const std::int64_t tiles = ceil_div(a.my, 16 * kWide), blocks = ceil_div(a.n, std::int64_t(kRotateRows)) * tiles;
    eigen_rotate_kernel<kWide><<<unsigned(blocks), kThreads, 0, stream>>>(a);
    LAUNCH_CHECK("eigen_rotate");
}

}  // namespace
}  // namespace fiedler
