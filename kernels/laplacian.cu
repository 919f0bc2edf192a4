// kernels/laplacian.cu: sparse products on the GPU (contract in laplacian.h).
//
// A group of 4, 8, 16 or 32 lanes works on one row, a lane on four neighbouring columns of the panel. The group reads the
// row's entries together, a lane each, and hands them round by shuffles, so that kUnroll gathers of X are in flight; the
// entries of the next row are on their way meanwhile. Gathers through the L2 cache are the bound; what is used once
// (entries, Z, Y) is marked so, to leave the cache to X.
//
// A panel of 8 columns is a sector of memory: two lanes for a row of X leave no work for a group but more entries of the
// same row, so there a group takes several at once, and adds up its lanes' sums at the end of the row. Rows of different
// lengths then cost a warp less, too.
#include "kernels/common.cuh"
#include "kernels/laplacian.h"

namespace fiedler {
namespace {

constexpr int kThreads = 128, kRows = 4;  // kRows: of a group, one after another
constexpr int kUnroll = int(kLaplacianRun);
constexpr int kSummers = 8;  // groups that share the pieces of a long row
constexpr unsigned kAll = 0xffffffffu;

struct Args {
    const std::int64_t* offsets;
    const std::int32_t* columns;
    const float* values;
    const float *x, *z;
    float* y;
    std::int64_t ld_x, ld_y, ld_z, rows;
    int width;  // columns
    float alpha, beta, gamma;
    bool skip_long;
};
struct Pieces {
    const std::int32_t *rows, *first;
    const std::int64_t *begin, *end;
    int count;
    float* sums;  // [count, ld]
    std::int64_t ld;
};

// The entries of a row that a group holds at a time: entry k in slot k / kLanes of lane k % kLanes.
template <int kLanes>
struct Entries {
    static constexpr int slots = kLanes < kUnroll ? kUnroll / kLanes : 1, held = slots * kLanes;
    int column[slots];
    float value[slots];
};
template <int kLanes>
__device__ inline Entries<kLanes> load_entries(const Args& a, std::int64_t begin, int count) {
    Entries<kLanes> r;
#pragma unroll
    for (int s = 0; s < r.slots; ++s) {
        const int e = s * kLanes + int(threadIdx.x % kLanes);
        r.column[s] = e < count ? __ldcs(a.columns + begin + e) : 0;
        r.value[s] = e < count ? __ldcs(a.values + begin + e) : 0.f;
    }
    return r;
}

__device__ inline float4 zero4() { return make_float4(0.f, 0.f, 0.f, 0.f); }
__device__ inline void add4(float4& sum, float factor, const float4& x) {
    sum.x = fmaf(factor, x.x, sum.x);
    sum.y = fmaf(factor, x.y, sum.y);
    sum.z = fmaf(factor, x.z, sum.z);
    sum.w = fmaf(factor, x.w, sum.w);
}

// *p if i < n, else zeros; without a branch, so that the lanes stay together for their shuffles.
__device__ inline float4 load4_if_less(int i, int n, const float* p) {
    float4 r = zero4();
    asm("{ .reg .pred wanted; setp.lt.s32 wanted, %4, %5; @wanted ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%6]; }"
        : "+f"(r.x), "+f"(r.y), "+f"(r.z), "+f"(r.w)
        : "r"(i), "r"(n), "l"(p));
    return r;
}

// The sum over entries [begin, begin + count) of columns x .. x + 3. The whole warp calls it; the groups go on for as
// long as the longest of them. first: the first entries, already loaded.
template <int kLanes>
__device__ inline float4 sum_entries(const Args& a, const float* x, std::int64_t begin, int count,
                                     const Entries<kLanes>& first) {
    constexpr int kHeld = Entries<kLanes>::held;
    constexpr bool kAhead = kLanes < kWarp;
    const int most = kLanes == kWarp ? count : __reduce_max_sync(kAll, count);
    float4 sum = zero4();
    Entries<kLanes> now = first;
#pragma unroll 1
    for (int base = 0; base < most; base += kHeld) {
        Entries<kLanes> next;  // ahead of the gathers; 32 lanes have entries for four rounds of them, and no registers
        if (kAhead && base + kHeld < most) next = load_entries<kLanes>(a, begin + base + kHeld, count - base - kHeld);
#pragma unroll 1
        for (int k = 0; k < kHeld && base + k < most; k += kUnroll) {
            // Entry k + u is in this slot of this lane.
            const auto slot = [](int u) { return Entries<kLanes>::slots > 1 ? u / kLanes : 0; };
            const auto lane = [&](int u) { return Entries<kLanes>::slots > 1 ? u % kLanes : k + u; };
            float4 row[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int column = __shfl_sync(kAll, now.column[slot(u)], lane(u), kLanes);
                row[u] = load4_if_less(u, count - base - k, x + column * a.ld_x);
            }
            float4 run = zero4();
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) add4(run, __shfl_sync(kAll, now.value[slot(u)], lane(u), kLanes), row[u]);
            add4(sum, 1.f, run);
        }
        if (!kAhead && base + kHeld < most) next = load_entries<kLanes>(a, begin + base + kHeld, count - base - kHeld);
        now = next;
    }
    return sum;
}

// y_i = alpha sum + beta x_i + gamma z_i at columns [column, column + 4).
__device__ inline void finish_row(const Args& a, std::int64_t i, int column, const float4& sum) {
    float4 y = make_float4(a.alpha * sum.x, a.alpha * sum.y, a.alpha * sum.z, a.alpha * sum.w);
    if (a.beta != 0.f) add4(y, a.beta, __ldg(reinterpret_cast<const float4*>(a.x + i * a.ld_x + column)));
    if (a.gamma != 0.f) add4(y, a.gamma, __ldcs(reinterpret_cast<const float4*>(a.z + i * a.ld_z + column)));
    float* to = a.y + i * a.ld_y + column;
    if (column + 4 <= a.width) {
        __stcs(reinterpret_cast<float4*>(to), y);
    } else {
        to[0] = y.x;
        if (column + 1 < a.width) to[1] = y.y;
        if (column + 2 < a.width) to[2] = y.z;
    }
}

// blockIdx.y, the panel, is the slowest to change: one panel of X after another passes through the cache.
template <int kLanes>
__global__ void __launch_bounds__(kThreads, 5) laplacian_rows_kernel(const Args a) {
    const std::int64_t group = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes, row = group * kRows;
    const int column = (int(blockIdx.y) * kLanes + int(threadIdx.x % kLanes)) * 4;
    const float* x = a.x + min(column, (a.width - 1) / 4 * 4);  // lanes without columns read along, and write nothing
    const auto edge = [&](std::int64_t i) { return a.offsets[min(i, a.rows)]; };
    const auto taken = [&](std::int64_t n) { return a.skip_long && n > kLaplacianPiece ? 0 : int(n); };
    std::int64_t begin = edge(row), end = edge(row + 1), end_next = edge(row + 2);
    Entries<kLanes> next = load_entries<kLanes>(a, begin, taken(end - begin));
#pragma unroll 1
    for (std::int64_t i = row; i < row + kRows; ++i) {
        const Entries<kLanes> now = next;
        const int count = taken(end - begin);
        next = load_entries<kLanes>(a, end, taken(end_next - end));
        const float4 sum = sum_entries<kLanes>(a, x, begin, count, now);
        if (i < a.rows && column < a.width && count == end - begin) finish_row(a, i, column, sum);
        begin = end;
        end = end_next;
        end_next = edge(i + 3);
    }
}

template <int kLanes>
__global__ void __launch_bounds__(kThreads, 5) laplacian_pieces_kernel(const Args a, const Pieces p) {
    const std::int64_t piece = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
    const int column = (int(blockIdx.y) * kLanes + int(threadIdx.x % kLanes)) * 4;
    const float* x = a.x + min(column, (a.width - 1) / 4 * 4);  // lanes without columns read along, and write nothing
    const std::int64_t begin = piece < p.count ? p.begin[piece] : 0;
    const int count = piece < p.count ? int(p.end[piece] - begin) : 0;
    const float4 sum = sum_entries<kLanes>(a, x, begin, count, load_entries<kLanes>(a, begin, count));
    if (piece < p.count && column < a.width) *reinterpret_cast<float4*>(p.sums + piece * p.ld + column) = sum;
}

// A block for each long row: kSummers groups add a run of its pieces each, the first group adds the runs.
template <int kLanes>
__global__ void __launch_bounds__(kSummers* kLanes) laplacian_totals_kernel(const Args a, const Pieces p) {
    __shared__ float4 shared[kSummers][kLanes];
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    const int column = (int(blockIdx.y) * kLanes + lane) * 4;
    const int first = p.first[blockIdx.x], end = p.first[blockIdx.x + 1];
    const int run = ceil_div(end - first, kSummers), begin = first + group * run;
    float4 sum = zero4();
    if (column < a.width) {
#pragma unroll 8
        for (int i = begin; i < min(begin + run, end); ++i)
            add4(sum, 1.f, __ldg(reinterpret_cast<const float4*>(p.sums + i * p.ld + column)));
    }
    shared[group][lane] = sum;
    __syncthreads();
    if (group > 0 || column >= a.width) return;
#pragma unroll
    for (int g = 1; g < kSummers; ++g) add4(sum, 1.f, shared[g][lane]);
    finish_row(a, p.rows[blockIdx.x], column, sum);
}

// ---- panels of 8 columns ---------------------------------------------------------------------------------------------

constexpr int kNarrow = 2;                            // lanes for the columns
constexpr int kSlots = 4, kGroup = kNarrow * kSlots;  // entries of a row at once, and its lanes
constexpr int kPieceSlots = kWarp / kNarrow;          // the same for pieces of long rows, a warp each
constexpr int kNarrowRun = kUnroll / 2;  // of a lane: the gathers in flight, and what is summed before it is added

// The sum over entries [begin, begin + count) of columns x .. x + 3, in every slot of the group.
template <int kAtOnce>
__device__ inline float4 sum_narrow(const Args& a, const float* x, std::int64_t begin, int count) {
    const int slot = int(threadIdx.x) / kNarrow % kAtOnce;
    const std::int32_t* columns = a.columns + begin;
    const float* values = a.values + begin;
    float4 sum = zero4();
#pragma unroll 1
    for (int first = slot; first < count; first += kAtOnce * kNarrowRun) {
        int column[kNarrowRun];
        float value[kNarrowRun];
#pragma unroll
        for (int u = 0; u < kNarrowRun; ++u) {
            const int e = first + u * kAtOnce;
            column[u] = e < count ? __ldcs(columns + e) : 0;
            value[u] = e < count ? __ldcs(values + e) : 0.f;
        }
        float4 row[kNarrowRun], run = zero4();
#pragma unroll
        for (int u = 0; u < kNarrowRun; ++u) row[u] = load4_if_less(first + u * kAtOnce, count, x + column[u] * a.ld_x);
#pragma unroll
        for (int u = 0; u < kNarrowRun; ++u) add4(run, value[u], row[u]);
        add4(sum, 1.f, run);
    }
#pragma unroll
    for (int step = kNarrow; step < kNarrow * kAtOnce; step *= 2) {
        sum.x += __shfl_xor_sync(kAll, sum.x, step);
        sum.y += __shfl_xor_sync(kAll, sum.y, step);
        sum.z += __shfl_xor_sync(kAll, sum.z, step);
        sum.w += __shfl_xor_sync(kAll, sum.w, step);
    }
    return sum;
}
__device__ inline int narrow_column() { return (int(blockIdx.y) * kNarrow + int(threadIdx.x % kNarrow)) * 4; }

__global__ void __launch_bounds__(kThreads, 10) laplacian_narrow_kernel(const Args a) {
    const std::int64_t row = (std::int64_t(blockIdx.x) * kThreads + threadIdx.x) / kGroup;
    const int column = narrow_column();
    const bool inside = row < a.rows;
    const std::int64_t begin = inside ? a.offsets[row] : 0, length = inside ? a.offsets[row + 1] - begin : 0;
    const bool left_out = a.skip_long && length > kLaplacianPiece;
    const float* x = a.x + min(column, (a.width - 1) / 4 * 4);  // lanes without columns read along, and write nothing
    const float4 sum = sum_narrow<kSlots>(a, x, begin, left_out ? 0 : int(length));
    if (inside && !left_out && column < a.width && threadIdx.x % kGroup < kNarrow) finish_row(a, row, column, sum);
}

__global__ void __launch_bounds__(kThreads, 10) laplacian_narrow_pieces_kernel(const Args a, const Pieces p) {
    const int piece = int((blockIdx.x * kThreads + threadIdx.x) / kWarp), column = narrow_column();
    if (piece >= p.count) return;  // whole warps
    const float* x = a.x + min(column, (a.width - 1) / 4 * 4);
    const float4 sum = sum_narrow<kPieceSlots>(a, x, p.begin[piece], int(p.end[piece] - p.begin[piece]));
    if (column < a.width && threadIdx.x % kWarp < kNarrow)
        *reinterpret_cast<float4*>(p.sums + piece * p.ld + column) = sum;
}

void launch_narrow(cudaStream_t stream, const Args& a, const Pieces& p) {
    const unsigned panels = unsigned(ceil_div(a.width, 4 * kNarrow));
    const auto blocks = ceil_div(a.rows, std::int64_t(kThreads / kGroup));
    laplacian_narrow_kernel<<<dim3(unsigned(blocks), panels), kThreads, 0, stream>>>(a);
    LAUNCH_CHECK("laplacian_narrow");
    if (!a.skip_long) return;
    const dim3 grid(unsigned(ceil_div(p.count, kThreads / kWarp)), panels);
    laplacian_narrow_pieces_kernel<<<grid, kThreads, 0, stream>>>(a, p);
    LAUNCH_CHECK("laplacian_narrow_pieces");
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <int kLanes>
void launch(cudaStream_t stream, const Args& a, const Pieces& p) {
    const unsigned panels = unsigned(ceil_div(a.width, 4 * kLanes));
    const auto grid = [&](std::int64_t groups) {
        return dim3(unsigned(ceil_div(groups, std::int64_t(kThreads / kLanes))), panels);
    };
    laplacian_rows_kernel<kLanes><<<grid(ceil_div(a.rows, std::int64_t(kRows))), kThreads, 0, stream>>>(a);
    LAUNCH_CHECK("laplacian_rows");
    if (!a.skip_long) return;
    laplacian_pieces_kernel<kLanes><<<grid(p.count), kThreads, 0, stream>>>(a, p);
    LAUNCH_CHECK("laplacian_pieces");
}
template <int kLanes>
void launch_totals(cudaStream_t stream, const Args& a, const Pieces& p, unsigned long_rows) {
    const dim3 grid(long_rows, unsigned(ceil_div(a.width, 4 * kLanes)));
    laplacian_totals_kernel<kLanes><<<grid, kSummers * kLanes, 0, stream>>>(a, p);
    LAUNCH_CHECK("laplacian_totals");
}

// The smallest group that covers the columns.
int lanes_for(int columns) { return columns <= 16 ? 4 : columns <= 32 ? 8 : columns <= 64 ? 16 : 32; }

// All columns of a, in panels of 4 `lanes` columns.
void apply_panels(cudaStream_t stream, int lanes, const Args& a, const Pieces& p, unsigned long_rows) {
    const auto run = [&](auto width) {
        constexpr int kLanes = decltype(width)::value;
        launch<kLanes>(stream, a, p);
        if (a.skip_long) launch_totals<kLanes>(stream, a, p, long_rows);
    };
    if (lanes == kNarrow) {
        launch_narrow(stream, a, p);
        if (a.skip_long) launch_totals<4>(stream, a, p, long_rows);  // its totals do not depend on the panel
        return;
    }
    if (lanes == 4) return run(std::integral_constant<int, 4>{});
    if (lanes == 8) return run(std::integral_constant<int, 8>{});
    if (lanes == 16) return run(std::integral_constant<int, 16>{});
    run(std::integral_constant<int, 32>{});
}

}  // namespace

void laplacian_apply(const Cuda& d, const LaplacianApply<float>& p) {
    check(p);
    const SparseMatrix<float>& l = p.matrix;
    const std::int64_t long_rows = l.long_rows.rows.size, pieces = l.long_rows.begin.size, m = p.x.cols;
    FIEDLER_REQUIRE("laplacian", is_aligned16(p.x) && is_aligned16(p.y) && (p.gamma == 0 || is_aligned16(p.z)));
    FIEDLER_REQUIRE("laplacian", p.panel == 0 || (p.panel >= 8 && p.panel <= 128 && 128 % p.panel == 0));
    FIEDLER_REQUIRE("laplacian", long_rows == 0 || is_shape(l.long_rows.first, long_rows + 1));
    FIEDLER_REQUIRE("laplacian", long_rows == 0 || is_shape(l.long_rows.end, pieces));
    FIEDLER_REQUIRE("laplacian",
                    long_rows == 0 || (p.scratch && p.scratch.size >= laplacian_scratch_elements(pieces, m)));
    FIEDLER_REQUIRE("laplacian", reinterpret_cast<std::uintptr_t>(p.scratch.data) % 16 == 0);
    Args a{l.offsets.data, l.columns.data, l.values.data, p.x.data, p.z.data, p.y.data, p.x.ld,       p.y.ld,
           p.z.ld,         l.rows,         int(m),        p.alpha,  p.beta,   p.gamma,  long_rows > 0};
    const Pieces q{l.long_rows.rows.data, l.long_rows.first.data, l.long_rows.begin.data, l.long_rows.end.data,
                   int(pieces),           p.scratch.data,         (m + 3) / 4 * 4};
    if (p.panel == 4 * kNarrow) {
        a.width = int(m);
        apply_panels(stream_of(d), kNarrow, a, q, unsigned(long_rows));
        return;
    }
    // Whole panels, then what is left in a narrower one.
    const int panel = p.panel == 0 ? 128 : int(p.panel), rest = int(m) % panel;
    const bool same = rest == 0 || lanes_for(rest) == lanes_for(panel);
    a.width = same ? int(m) : int(m) - rest;
    if (a.width > 0) apply_panels(stream_of(d), lanes_for(panel), a, q, unsigned(long_rows));
    if (same) return;
    const int done = a.width;
    a.x += done, a.y += done, a.width = rest;
    if (a.z) a.z += done;
    apply_panels(stream_of(d), lanes_for(rest), a, q, unsigned(long_rows));
}

}  // namespace fiedler
