// kernels/pending_sums.cu: see pending_sums.h. A block has kColumns columns of one sum. Where a column's rows follow one
// another in memory, a warp reads one column at a time; else neighbouring threads read neighbouring columns, and rows
// are dealt out to as many threads of each: 8 columns a block, or 128 where there are many. Which one it is changes the
// order of a sum, and depends on its shape, steps and alignment alone.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/pending_sums.h"

namespace fiedler {
namespace {

constexpr int kColumns = 8, kThreads = kColumns * kWarp;
constexpr int kMost = 64;  // sums of one launch: what fits a kernel's parameters on every device (4 KiB)
constexpr int kAtOnce = 4;

struct Batch {
    PendingSum<float> sums[kMost];
    int first_block[kMost + 1];  // of each sum, in order
};
static_assert(sizeof(Batch) <= 4096);

// Rows first, first + step, ... of a column.
__device__ float sum_rows(const float* column, std::int64_t row_step, int first, int step, int rows) {
    float sum[kAtOnce] = {};
    for (int row = first; row < rows; row += kAtOnce * step)
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
            if (row + k * step < rows) sum[k] += column[(row + k * step) * row_step];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Many columns whose rows do not follow one another, as those of convolutions: a thread reads four at once, so that a
// block asks for long pieces of memory (`fiedler bench pending_sums`, convolutions).
constexpr int kWide = 4 * kWarp, kWideAtOnce = 8;
__host__ __device__ bool is_wide(const PendingSum<float>& s) {
    return s.columns >= 4 * kWide && s.columns % 4 == 0 && s.column_step == 1 && s.row_step % 4 == 0 &&
           reinterpret_cast<std::uintptr_t>(s.partial) % sizeof(float4) == 0;
}
__host__ __device__ int columns_of_block(const PendingSum<float>& s) { return is_wide(s) ? kWide : kColumns; }

__device__ void add(float4& sum, const float4& v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// The sums of block number `block` of a wide one.
__device__ void sum_wide(const PendingSum<float>& s, int block) {
    constexpr int kRows = kThreads / kWarp;
    __shared__ float4 shared[kRows][kWarp];
    const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp, column = block * kWide + 4 * lane;
    wait_for_previous();
    float4 sum{0.f, 0.f, 0.f, 0.f};
    if (column < s.columns) {
        const float* from = s.partial + own * s.row_step + column;
        const auto row_at = [&](int k) { return *reinterpret_cast<const float4*>(from + k * kRows * s.row_step); };
        int row = own;
        for (; row + (kWideAtOnce - 1) * kRows < s.rows; row += kWideAtOnce * kRows) {
            float4 v[kWideAtOnce];
#pragma unroll
            for (int k = 0; k < kWideAtOnce; ++k) v[k] = row_at(k);
#pragma unroll
            for (int k = 0; k < kWideAtOnce; ++k) add(sum, v[k]);
            from += kWideAtOnce * kRows * s.row_step;
        }
        for (; row < s.rows; row += kRows, from += kRows * s.row_step) add(sum, row_at(0));
    }
    shared[own][lane] = sum;
    __syncthreads();
    const int thread = int(threadIdx.x), to = block * kWide + thread;
    if (thread >= kWide || to >= s.columns) return;
    const float* const column_sums = reinterpret_cast<const float*>(shared);
    float total = 0.f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) total += column_sums[r * kWide + thread];
    s.to[to] += total;
}

__global__ __launch_bounds__(kThreads) void pending_sums_kernel(const __grid_constant__ Batch batch) {
    __shared__ float shared[kWarp][kColumns + 1];
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    dependents_may_start();
    int of = 0;
    while (batch.first_block[of + 1] <= int(blockIdx.x)) ++of;
    const PendingSum<float>& s = batch.sums[of];
    if (is_wide(s)) return sum_wide(s, int(blockIdx.x) - batch.first_block[of]);
    const int first = (int(blockIdx.x) - batch.first_block[of]) * kColumns, own = first + warp;  // of the warp
    const bool ends_here = lane == 0 && own < s.columns;
    wait_for_previous();
    const float before = ends_here ? s.to[own] : 0.f;
    float sum = 0.f;
    if (s.row_step == 1) {
        if (own < s.columns) sum = sum_rows(s.partial + own * s.column_step, 1, lane, kWarp, s.rows);
    } else {
        const int column = first + thread % kColumns, row = thread / kColumns;
        if (column < s.columns)
            shared[row][thread % kColumns] =
                sum_rows(s.partial + column * s.column_step, s.row_step, row, kWarp, s.rows);
        __syncthreads();
        if (own < s.columns) sum = shared[lane][warp];
    }
    sum = warp_sum(sum);
    if (ends_here) s.to[own] = before + sum;
}

}  // namespace

void finish_sums(const Cuda& dev, PendingSums<float>& p) {
    const auto& sums = p.sums();
    for (std::size_t from = 0; from < sums.size(); from += kMost) {
        Batch batch{};
        const std::size_t count = std::min(sums.size() - from, std::size_t(kMost));
        for (std::size_t i = 0; i < count; ++i) {
            batch.sums[i] = sums[from + i];
            batch.first_block[i + 1] =
                batch.first_block[i] + ceil_div(batch.sums[i].columns, columns_of_block(batch.sums[i]));
        }
        launch_dependent(dev, pending_sums_kernel, unsigned(batch.first_block[count]), kThreads, 0, batch);
        LAUNCH_CHECK("pending_sums");
    }
    p.clear();
}

}  // namespace fiedler
