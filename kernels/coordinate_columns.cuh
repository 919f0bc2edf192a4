// kernels/coordinate_columns.cuh: what the kernels of coordinate scalars (coordinate.cu) have in common: a thread's
// columns, and the sums that a block leaves.
#pragma once
#include "kernels/common.cuh"
#include "kernels/coordinate.h"
#include "kernels/mma.cuh"

namespace fiedler {
namespace coordinate {

constexpr int kTaps = 4, kReach = kTaps - 1;
constexpr int kSums = kTaps + 1;  // of a column: dw_0 .. dw_3, dlog_temp
static_assert(kTaps == 4, "coordinate_pending_elements");

// W neighbouring values: one, two or four.
template <int W>
struct Values {
    float v[W];
};
template <>
struct alignas(8) Values<2> {
    float v[2];
};
template <>
struct alignas(16) Values<4> {
    float v[4];
};
template <int W>
__device__ inline Values<W> load(const float* p) {
    Values<W> r;
    if constexpr (W == 1)
        r.v[0] = *p;
    else if constexpr (W == 2)
        *reinterpret_cast<float2*>(&r) = *reinterpret_cast<const float2*>(p);
    else
        *reinterpret_cast<float4*>(&r) = *reinterpret_cast<const float4*>(p);
    return r;
}
template <int W>
__device__ inline void store(float* p, const Values<W>& x) {
    if constexpr (W == 1)
        *p = x.v[0];
    else if constexpr (W == 2)
        *reinterpret_cast<float2*>(p) = make_float2(x.v[0], x.v[1]);
    else
        *reinterpret_cast<float4*>(p) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
}
template <int W>
__device__ inline void store(nv_bf16* p, const Values<W>& x) {
    if constexpr (W == 1)
        *p = from_float<nv_bf16>(x.v[0]);
    else if constexpr (W == 2)
        *reinterpret_cast<std::uint32_t*>(p) = pack_bf16(x.v[0], x.v[1]);
    else
        *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]));
}
// Which head a scalar belongs to: a quotient, without the many instructions of a division.
struct Heads {
    unsigned multiplier;
    Heads(std::int64_t scalars, std::int64_t heads)
        : multiplier(unsigned(ceil_div(std::int64_t(1) << 31, scalars / heads))) {
        FIEDLER_REQUIRE("coordinate", scalars * (scalars / heads) < std::int64_t(1) << 31);  // or it is not exact
    }
    __device__ int of(int scalar) const { return int(__umulhi(2 * unsigned(scalar), multiplier)); }
};

// What belongs to a thread's columns; head_of(c): the head of the c-th.
template <bool kConvolution, int W>
struct Columns {
    float w[W][kTaps], scale[W];
    template <class HeadOf>
    __device__ Columns(const float* weights, const float* log_temp, int column, HeadOf&& head_of) {
#pragma unroll
        for (int c = 0; c < W; ++c) {
            const float4 taps = kConvolution ? *reinterpret_cast<const float4*>(weights + (column + c) * kTaps)
                                             : make_float4(0.f, 0.f, 0.f, 1.f);
            w[c][0] = taps.x, w[c][1] = taps.y, w[c][2] = taps.z, w[c][3] = taps.w;
            scale[c] = expf(-log_temp[head_of(c)]);
        }
    }
};

__device__ inline int own_thread() { return int(threadIdx.y * blockDim.x + threadIdx.x); }

// What a block leaves: its runs' sums of dw, for each of its columns, and of dlog_temp, for each head. Null: not
// wanted.
struct Partial {
    float* dw;         // [blocks of runs][all columns][kTaps]
    float* dlog_temp;  // [blocks of runs][blocks of columns][heads], or [blocks of runs][all columns] of one scalar
    int heads, per_head;
    int shift;  // 2^shift threads add up a column's runs: neighbours, at most a warp
};

// One column's sums over the runs; right in the first of its 2^shift threads.
template <bool kConvolution>
__device__ inline void add_runs(float (&total)[kSums], const float* of_column, int columns, int shift) {
    const int runs = int(blockDim.y), part = own_thread() & ((1 << shift) - 1), lane = own_thread() % kWarp;
    constexpr int kFirst = kConvolution ? 0 : kTaps;
#pragma unroll
    for (int k = 0; k < kSums; ++k) total[k] = 0.f;
#pragma unroll 2
    for (int run = part; run < runs; run += 1 << shift)
#pragma unroll
        for (int k = kFirst; k < kSums; ++k) total[k] += of_column[(k * runs + run) * columns];
    const unsigned mine = unsigned((std::uint64_t(1) << (1 << shift)) - 1) << (lane - part);
#pragma unroll 1
    for (int o = (1 << shift) / 2; o > 0; o /= 2)
#pragma unroll
        for (int k = kFirst; k < kSums; ++k) total[k] += __shfl_xor_sync(mine, total[k], o);
}

template <bool kConvolution, int W>
__device__ inline void store_partial(float* shared, const float (&sum)[W][kSums], const Partial& to, int all) {
    const int columns = int(blockDim.x) * W, runs = int(blockDim.y), own = int(threadIdx.x) * W;
    const int first = int(blockIdx.y) * columns, thread = own_thread(), threads = int(blockDim.x) * runs;
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
        Values<W> mine;
#pragma unroll
        for (int c = 0; c < W; ++c) mine.v[c] = sum[c][k];
        store(shared + (k * runs + int(threadIdx.y)) * columns + own, mine);
    }
    __syncthreads();
    float* const of_column = shared + kTaps * runs * columns;  // sums of dlog_temp: each replaces its first run's
    const int at_once = threads >> to.shift;
    int c = thread >> to.shift;
    if (c < at_once)
#pragma unroll 1
        for (; c < columns; c += at_once) {
            float total[kSums];
            add_runs<kConvolution>(total, shared + c, columns, to.shift);
            if ((thread & ((1 << to.shift) - 1)) != 0) continue;
            of_column[c] = total[kTaps];
            if (first + c >= all) continue;
            const std::int64_t column = std::int64_t(blockIdx.x) * all + first + c;
            if (kConvolution)
                reinterpret_cast<float4*>(to.dw)[column] = make_float4(total[0], total[1], total[2], total[3]);
            if (to.dlog_temp && to.per_head == 1) to.dlog_temp[column] = total[kTaps];
        }
    if (!to.dlog_temp || to.per_head == 1) return;
    __syncthreads();
#pragma unroll 1
    for (int h = thread; h < to.heads; h += threads) {
        float total = 0.f;
#pragma unroll 1
        for (int side = h * to.per_head - first; side < columns; side += all / 2)
#pragma unroll 4
            for (int c = max(side, 0); c < min(side + to.per_head, columns); ++c) total += of_column[c];
        to.dlog_temp[(std::int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * to.heads + h] = total;
    }
}

}  // namespace coordinate
}  // namespace fiedler
