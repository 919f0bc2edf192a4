// kernels/pending_sums.cu: see pending_sums.h. A block has kColumns columns of one sum. Where a column's rows follow one
// another in memory, a warp reads one column at a time; else neighbouring threads read neighbouring columns, and rows are
// dealt out to as many threads of each. Which one it is changes the order of a sum, and depends on its steps alone.
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

__global__ __launch_bounds__(kThreads) void pending_sums_kernel(const __grid_constant__ Batch batch) {
    __shared__ float shared[kWarp][kColumns + 1];
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    dependents_may_start();
    int of = 0;
    while (batch.first_block[of + 1] <= int(blockIdx.x)) ++of;
    const PendingSum<float>& s = batch.sums[of];
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
            batch.first_block[i + 1] = batch.first_block[i] + ceil_div(batch.sums[i].columns, kColumns);
        }
        launch_dependent(dev, pending_sums_kernel, unsigned(batch.first_block[count]), kThreads, 0, batch);
        LAUNCH_CHECK("pending_sums");
    }
    p.clear();
}

}  // namespace fiedler
