// kernels/eigen.cu: tall, thin blocks of vectors on the GPU (contract in eigen.h). Gram matrices and rotations are tiled
// products in f32 on the ordinary cores; the rest moves memory.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/eigen_pieces.cuh"
#include "kernels/eigen_tile.cuh"

namespace fiedler {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// to[0 .. 3], as far as the row goes.
__device__ inline void store4(float* to, const float4& v, int room) {
    if (room >= 4) {
        *reinterpret_cast<float4*>(to) = v;
        return;
    }
    if (room > 0) to[0] = v.x;
    if (room > 1) to[1] = v.y;
    if (room > 2) to[2] = v.z;
}

// ---- sums of partial sums ------------------------------------------------------------------------------------------

// g_ij = sum over c of partial[c][i][j], in a fixed order: kSlices threads of an entry take a range of c each. mirror:
// only entries with j <= i are there.
constexpr int kSlices = 8;
__device__ inline double value_of(double x) { return x; }
__device__ inline double value_of(float2 x) { return double(x.x) + double(x.y); }
template <class Partial>
__global__ void __launch_bounds__(kThreads)
    eigen_totals_kernel(const Partial* partial, int count, Mat<double> g, bool mirror) {
    __shared__ double shared[kSlices][kThreads / kSlices];
    const int mine = threadIdx.x % (kThreads / kSlices), slice = threadIdx.x / (kThreads / kSlices);
    const std::int64_t size = g.rows * g.cols, entry = std::int64_t(blockIdx.x) * (kThreads / kSlices) + mine;
    const std::int64_t i = entry / g.cols, j = entry % g.cols;
    const bool wanted = entry < size && (!mirror || j <= i);
    const int run = ceil_div(count, kSlices), last = min((slice + 1) * run, count);
    double sum = 0;
    if (wanted) {
#pragma unroll 4
        for (int c = slice * run; c < last; ++c) sum += value_of(partial[c * size + entry]);
    }
    shared[slice][mine] = sum;
    __syncthreads();
    if (slice > 0 || !wanted) return;
    for (int s = 1; s < kSlices; ++s) sum += shared[s][mine];
    g.data[i * g.ld + j] = sum;
    if (mirror) g.data[j * g.ld + i] = sum;
}
template <class Partial>
void launch_totals(cudaStream_t stream, const Partial* partial, int count, const Mat<double>& g, bool mirror) {
    const auto blocks = unsigned(ceil_div(g.rows * g.cols, std::int64_t(kThreads / kSlices)));
    eigen_totals_kernel<<<blocks, kThreads, 0, stream>>>(partial, count, g, mirror);
    LAUNCH_CHECK("eigen_totals");
}

// ---- sums over rows ------------------------------------------------------------------------------------------------
//
// A warp reads four rows at a time, eight lanes for 32 columns of each. kRun rows of a lane are added in f32.

constexpr int kRowLanes = 8, kWarpRows = kWarp / kRowLanes, kWarpColumns = 4 * kRowLanes;
constexpr int kRun = kEigenRun / kWarpRows;

struct Sum4 {
    double v[4] = {};
    __device__ void add(const float4& x) {
        v[0] += double(x.x), v[1] += double(x.y), v[2] += double(x.z), v[3] += double(x.w);
    }
    __device__ void add_rows_of_warp() {
#pragma unroll
        for (int step = kRowLanes; step < kWarp; step *= 2)
#pragma unroll
            for (int e = 0; e < 4; ++e) v[e] += __shfl_xor_sync(kAll, v[e], step);
    }
    __device__ void store(double* to, int room) const {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (e < room) to[e] = v[e];
    }
};
__device__ inline int warp_column(int panel) { return panel * kWarpColumns + int(threadIdx.x % kRowLanes) * 4; }
__device__ inline int warp_row() { return int(threadIdx.x % kWarp) / kRowLanes; }

// Every step-th row from `row` on, before `end`: add(sum, row) adds its four columns to an f32 sum.
template <class Add>
__device__ inline Sum4 sum_rows(std::int64_t row, std::int64_t end, int step, Add&& add) {
    Sum4 total;
    while (row < end) {
        float4 run = zero4();
#pragma unroll 4
        for (int k = 0; k < kRun; ++k, row += step)
            if (row < end) add(run, row);
        total.add(run);
    }
    return total;
}

struct NormArgs {
    const float *w, *x;
    const double* theta;
    std::int64_t ld_w, ld_x, n, chunk;
    int m;
    double* partial;
};
template <bool kShifted>
__global__ void __launch_bounds__(kThreads) eigen_norms_kernel(const NormArgs a) {
    __shared__ double shared[kThreads / kWarp][kWarpColumns];
    const int column = warp_column(blockIdx.y), warp = threadIdx.x / kWarp;
    const std::int64_t begin = blockIdx.x * a.chunk, end = min(begin + a.chunk, a.n);
    Sum4 sum;
    if (column < a.m) {
        float high[4] = {}, low[4] = {};  // theta in two parts: the residual is a small difference
        if (kShifted) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const double theta = a.theta[min(column + e, a.m - 1)];
                high[e] = float(theta), low[e] = float(theta - double(high[e]));
            }
        }
        sum = sum_rows(
            begin + warp * kWarpRows + warp_row(), end, kThreads / kRowLanes, [&](float4& run, std::int64_t row) {
                float4 w = load4(a.w + row * a.ld_w + column), x = zero4();
                if (kShifted) x = load4(a.x + row * a.ld_x + column);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float r = kShifted ? fmaf(-low[e], at(x, e), fmaf(-high[e], at(x, e), at(w, e))) : at(w, e);
                    at(run, e) = fmaf(r, r, at(run, e));
                }
            });
    }
    sum.add_rows_of_warp();
    if (warp_row() == 0) sum.store(&shared[warp][threadIdx.x % kRowLanes * 4], 4);
    __syncthreads();
    const int mine = blockIdx.y * kWarpColumns + threadIdx.x;
    if (threadIdx.x >= kWarpColumns || mine >= a.m) return;
    double total = 0;
    for (int k = 0; k < kThreads / kWarp; ++k) total += shared[k][threadIdx.x];
    a.partial[std::int64_t(blockIdx.x) * a.m + mine] = total;
}

// ---- deflate -------------------------------------------------------------------------------------------------------
//
// A component is cut into pieces (eigen_pieces.cuh); a warp works on a piece.

struct DeflateArgs {
    float* x;
    const float* v;
    const std::int64_t* offsets;
    std::int64_t ld, components, pieces;
    int m;
    double* sums;  // [slots, m]
};
__device__ inline void deflate_piece(const DeflateArgs& a, const PieceRows& p, int column, const Sum4& total) {
    if (column >= a.m) return;
#pragma unroll 4
    for (std::int64_t row = p.begin + warp_row(); row < p.end; row += kWarpRows) {
        float* to = a.x + row * a.ld + column;
        float4 x = load4(to);
        const float v = a.v[row];
#pragma unroll
        for (int e = 0; e < 4; ++e) at(x, e) = fmaf(-v, float(total.v[e]), at(x, e));
        store4(to, x, a.m - column);
    }
}

__global__ void __launch_bounds__(kThreads) eigen_project_kernel(const DeflateArgs a) {
    const std::int64_t piece = std::int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int column = warp_column(blockIdx.y);
    if (piece >= a.pieces) return;
    const PieceRows p = piece_rows(a.offsets, a.components, piece);
    Sum4 sum;
    if (column < a.m)
        sum = sum_rows(p.begin + warp_row(), p.end, kWarpRows, [&](float4& run, std::int64_t row) {
            float4 x = load4(a.x + row * a.ld + column);
            const float v = a.v[row];
#pragma unroll
            for (int e = 0; e < 4; ++e) at(run, e) = fmaf(v, at(x, e), at(run, e));
        });
    sum.add_rows_of_warp();
    if (p.whole)
        deflate_piece(a, p, column, sum);
    else if (p.begin < p.end && warp_row() == 0)
        sum.store(a.sums + p.slot * a.m + column, a.m - column);
}

__global__ void __launch_bounds__(kThreads) eigen_subtract_kernel(const DeflateArgs a) {
    const std::int64_t piece = std::int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int column = warp_column(blockIdx.y);
    if (piece >= a.pieces || column >= a.m) return;
    const PieceRows p = piece_rows(a.offsets, a.components, piece);
    if (p.whole || p.begin >= p.end) return;
    Sum4 total;
#pragma unroll
    for (int e = 0; e < 4; ++e) total.v[e] = a.sums[p.total * a.m + min(column + e, a.m - 1)];
    deflate_piece(a, p, column, total);
}

// ---- gather and random ---------------------------------------------------------------------------------------------

// lanes neighbouring threads take a row.
__global__ void __launch_bounds__(kThreads) eigen_gather_kernel(const EigenGather<float> p, int lanes) {
    const std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / lanes;
    if (row >= p.y.rows) return;
    const float scale = p.scale.data ? p.scale.data[row] : 1.f;
    const float* x = p.x.data + p.index.data[row] * p.x.ld;
    float* y = p.y.data + row * p.y.ld;
    const int m = int(p.y.cols);
    for (int column = threadIdx.x % lanes * 4; column < m; column += lanes * 4) {
        float4 v = load4(x + column);
        v.x *= scale, v.y *= scale, v.z *= scale, v.w *= scale;
        store4(y + column, v, m - column);
    }
}

__global__ void __launch_bounds__(kThreads) eigen_random_kernel(const EigenRandom<float> p) {
    const int column = warp_column(blockIdx.y), m = int(p.x.cols);
    if (column >= m) return;
    std::uint64_t start[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) start[e] = eigen_random_column(p.seed, p.first_column + column + e);
    const std::int64_t step = std::int64_t(gridDim.x) * (kThreads / kRowLanes);
    for (std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kRowLanes; row < p.x.rows;
         row += step) {
        float4 v;
#pragma unroll
        for (int e = 0; e < 4; ++e) at(v, e) = eigen_random_value(start[e], row);
        store4(p.x.data + row * p.x.ld + column, v, m - column);
    }
}

unsigned column_panels(std::int64_t columns) { return unsigned(ceil_div(columns, std::int64_t(kWarpColumns))); }
bool is_scratch(const Vec<double>& v, std::int64_t elements) {
    return v && v.size >= elements && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
}
std::int64_t chunk_rows(std::int64_t n, std::int64_t chunks) {  // whole runs
    return ceil_div(ceil_div(n, kEigenRun), chunks) * kEigenRun;
}

}  // namespace

void eigen_gram(const Cuda& d, const EigenGram<float>& p) {
    check(p);
    FIEDLER_REQUIRE("eigen", is_aligned16(p.x) && is_aligned16(p.y));
    FIEDLER_REQUIRE("eigen", is_scratch(p.scratch, eigen_scratch_elements(p.x.rows, p.x.cols, p.y.cols)));
    const bool same = p.x.data == p.y.data && p.x.cols == p.y.cols && p.x.ld == p.y.ld;
    const int mx = int(p.x.cols), my = int(p.y.cols), side_x = panel_side(mx), side_y = panel_side(my);
    const int panels_x = ceil_div(mx, side_x), panels_y = ceil_div(my, side_y);
    const std::int64_t chunk = chunk_rows(p.x.rows, eigen_partials(p.x.rows, mx, my));
    const GramArgs a{p.x.data,
                     p.y.data,
                     p.x.ld,
                     p.y.ld,
                     p.x.rows,
                     chunk,
                     mx,
                     my,
                     side_x,
                     side_y,
                     panels_y,
                     same,
                     reinterpret_cast<float2*>(p.scratch.data)};
    const int tiles_x = side_x / kTile, tiles_y = side_y / kTile;
    const bool one = same && panels_x == 1;  // a panel on the diagonal is all there is
    const int tiles = one ? tiles_x * (tiles_x + 1) / 2 : tiles_x * tiles_y;
    const int splits = tiles <= 1 ? 8 : tiles <= 2 ? 4 : tiles <= 4 ? 2 : 1;
    const std::size_t stages = kStages * kStage * std::size_t(side_x + (one ? 0 : side_y)) * sizeof(float);
    const std::size_t totals = splits > 1 ? std::size_t(tiles) * kTile * kTile * sizeof(double) : 0;
    const std::size_t shared = std::max(stages, totals);
    const unsigned chunks = unsigned(ceil_div(p.x.rows, chunk));
    const dim3 grid(unsigned(same ? panels_x * (panels_x + 1) / 2 : panels_x * panels_y), chunks);
    const auto kernel = splits == 8   ? eigen_gram_kernel<8>
                        : splits == 4 ? eigen_gram_kernel<4>
                        : splits == 2 ? eigen_gram_kernel<2>
                                      : eigen_gram_kernel<1>;
    kernel<<<grid, unsigned(tiles * splits * kWarp), shared, stream_of(d)>>>(a);
    LAUNCH_CHECK("eigen_gram");
    launch_totals(stream_of(d), a.partial, int(chunks), p.g, same);
}

void eigen_rotate(const Cuda& d, const EigenRotate<float>& p) {
    check(p);
    FIEDLER_REQUIRE("eigen", is_aligned16(p.x) && is_aligned16(p.y));
    FIEDLER_REQUIRE("eigen", is_scratch(p.scratch, eigen_scratch_elements(p.x.rows, p.x.cols, p.y.cols)));
    if (p.x.rows == 0) return;
    const int mx = int(p.x.cols), my = int(p.y.cols), ld_q = ceil_div(my, 4) * 4;
    float* q = reinterpret_cast<float*>(p.scratch.data);
    const cudaStream_t stream = stream_of(d);
    eigen_round_kernel<<<unsigned(ceil_div(mx * ld_q, kThreads)), kThreads, 0, stream>>>(q, ld_q, p.q);
    LAUNCH_CHECK("eigen_round");
    const RotateArgs a{p.y.data, p.x.data, q, p.y.ld, p.x.ld, p.x.rows, ld_q, mx, my, float(p.alpha), p.beta != 0};
    // The width that wastes least; of equals the widest.
    int wide = 8;
    for (const int w : {6, 4, 2})
        if (ceil_div(my, 16 * w) * w < ceil_div(my, 16 * wide) * wide) wide = w;
    if (wide == 8)
        launch_rotate<8>(stream, a);
    else if (wide == 6)
        launch_rotate<6>(stream, a);
    else if (wide == 4)
        launch_rotate<4>(stream, a);
    else
        launch_rotate<2>(stream, a);
}

void eigen_norms(const Cuda& d, const EigenNorms<float>& p) {
    check(p);
    const std::int64_t n = p.w.rows, m = p.w.cols;
    FIEDLER_REQUIRE("eigen", n >= 1 && is_aligned16(p.w) && (!p.theta || is_aligned16(p.x)));
    FIEDLER_REQUIRE("eigen", is_scratch(p.scratch, eigen_scratch_elements(n, m, 1)));
    const std::int64_t chunk = chunk_rows(n, eigen_partials(n, m, 1)), chunks = ceil_div(n, chunk);
    const NormArgs a{p.w.data, p.x.data, p.theta.data, p.w.ld, p.x.ld, n, chunk, int(m), p.scratch.data};
    const dim3 grid(unsigned(chunks), column_panels(m));
    if (p.theta)
        eigen_norms_kernel<true><<<grid, kThreads, 0, stream_of(d)>>>(a);
    else
        eigen_norms_kernel<false><<<grid, kThreads, 0, stream_of(d)>>>(a);
    LAUNCH_CHECK("eigen_norms");
    launch_totals(stream_of(d), p.scratch.data, int(chunks), Mat<double>(p.out.data, m, 1), false);
}

void eigen_deflate(const Cuda& d, const EigenDeflate<float>& p) {
    check(p);
    const std::int64_t n = p.x.rows, m = p.x.cols, components = p.offsets.size - 1;
    FIEDLER_REQUIRE("eigen", is_aligned16(p.x) && is_scratch(p.scratch, eigen_deflate_scratch(n, m, components)));
    if (n == 0) return;
    const std::int64_t pieces = n / kPiece + components;
    const DeflateArgs a{p.x.data, p.v.data, p.offsets.data, p.x.ld, components, pieces, int(m), p.scratch.data};
    const dim3 grid(unsigned(ceil_div(pieces, std::int64_t(kThreads / kWarp))), column_panels(m));
    const cudaStream_t stream = stream_of(d);
    eigen_project_kernel<<<grid, kThreads, 0, stream>>>(a);
    LAUNCH_CHECK("eigen_project");
    if (n <= kPiece) return;
    launch_component(stream, n, {p.offsets.data, components, int(m), p.scratch.data});
    eigen_subtract_kernel<<<grid, kThreads, 0, stream>>>(a);
    LAUNCH_CHECK("eigen_subtract");
}

void eigen_gather(const Cuda& d, const EigenGather<float>& p) {
    check(p);
    FIEDLER_REQUIRE("eigen", is_aligned16(p.x) && is_aligned16(p.y));
    if (p.y.rows == 0) return;
    const int lanes = p.y.cols <= 32 ? 8 : p.y.cols <= 64 ? 16 : 32;
    const std::int64_t blocks = ceil_div(p.y.rows, std::int64_t(kThreads / lanes));
    eigen_gather_kernel<<<unsigned(blocks), kThreads, 0, stream_of(d)>>>(p, lanes);
    LAUNCH_CHECK("eigen_gather");
}

void eigen_random(const Cuda& d, const EigenRandom<float>& p) {
    check(p);
    FIEDLER_REQUIRE("eigen", is_aligned16(p.x));
    if (p.x.rows == 0) return;
    const std::int64_t blocks = std::min<std::int64_t>(ceil_div(p.x.rows, std::int64_t(kThreads / kRowLanes)), 4096);
    eigen_random_kernel<<<dim3(unsigned(blocks), column_panels(p.x.cols)), kThreads, 0, stream_of(d)>>>(p);
    LAUNCH_CHECK("eigen_random");
}

}  // namespace fiedler
