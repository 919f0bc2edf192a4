// kernels/embedding.cu: token embedding (see embedding.h).
//
// Backward: token numbers are sorted (stably) together with their positions; a run of equal numbers in the sorted order
// is one row of the table. A block looks after the runs that begin in its kRows sorted places: a short run (up to kRows
// tokens) is summed by 16 threads, a long one by the whole block, split over its kRows groups in a fixed way. So no row
// is written twice, no atomics are needed, and the most frequent token does not wait on one warp.
#include <algorithm>
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/common.cuh"
#include "kernels/embedding.h"

namespace fiedler {
namespace {

constexpr int kPackSize = Pack<nv_bf16>::size;
constexpr int kLanes = 16, kBlockChannels = kLanes * kPackSize;  // one group of lanes: 128 channels of a row
constexpr int kRows = 32, kThreads = kLanes * kRows;             // groups of a block, and sorted places it looks after
constexpr int kBatch = 4;                                        // rows of dx loaded at a time by a thread
constexpr int kGatherRows = 16, kGatherPacks = 4;

struct Gather {
    nv_bf16* x;
    const nv_bf16* table;
    const std::int32_t* tokens;
    std::int64_t count, ld_x, ld_table;
    int packs;
};

__global__ __launch_bounds__(kLanes* kGatherRows) void gather_kernel(Gather a) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kGatherRows + threadIdx.y;
    if (i >= a.count) return;
    const nv_bf16* from = a.table + std::int64_t(a.tokens[i]) * a.ld_table;
    nv_bf16* to = a.x + i * a.ld_x;
    for (int first = threadIdx.x; first < a.packs; first += kLanes * kGatherPacks) {
        Pack<nv_bf16> value[kGatherPacks];
#pragma unroll
        for (int k = 0; k < kGatherPacks; ++k)
            if (first + k * kLanes < a.packs) value[k] = load16(from + (first + k * kLanes) * kPackSize);
#pragma unroll
        for (int k = 0; k < kGatherPacks; ++k)
            if (first + k * kLanes < a.packs) store16(to + (first + k * kLanes) * kPackSize, value[k]);
    }
}

__global__ void positions_kernel(std::int32_t* positions, std::int32_t n) {
    const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) positions[i] = std::int32_t(i);
}

struct Scatter {
    float* dtable;
    const nv_bf16* dx;
    const std::int32_t *tokens, *positions;  // sorted
    std::int64_t ld_dtable, ld_dx;
    int count, channels;  // tokens, below 2^30: places and a step beyond them fit an int
};

// Sums two bf16 of each word. Rows wait as raw words, two values to a register (a Pack may be spread over twice as
// many registers).
__device__ void add_raw(float (&sum)[kPackSize], const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < kPackSize; ++e)
        sum[e] += __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
}

// sum += rows dx[positions[p]] for p = first, first + step, ... < last, in that order.
__device__ void add_rows(float (&sum)[kPackSize], const Scatter& a, int channel, int first, int last, int step) {
    for (int p0 = first; p0 < last; p0 += step * kBatch) {
        uint4 rows[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int p = p0 + k * step;
            if (p < last) rows[k] = *reinterpret_cast<const uint4*>(a.dx + a.positions[p] * a.ld_dx + channel);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (p0 + k * step < last) add_raw(sum, rows[k]);
        }
    }
}

// One past the last place that holds the same token as `start`: all threads of the block search together.
__device__ int end_of_run(const Scatter& a, int start, int thread) {
    const std::int32_t token = a.tokens[start];
    int inside = start, outside = a.count;  // tokens[inside] == token; the end lies in (inside, outside]
    while (outside - inside > 1) {
        const int stride = ceil_div(outside - inside, kThreads + 1), probe = inside + (thread + 1) * stride;
        const int equal = __syncthreads_count(probe < outside && a.tokens[probe] == token);
        inside += equal * stride;
        outside = min(outside, inside + stride);
    }
    return outside;
}

// dtable[row][channel..channel + 8) += sum
__device__ void add_to_table(const Scatter& a, std::int64_t row, int channel, const float (&sum)[kPackSize]) {
    float* out = a.dtable + row * a.ld_dtable + channel;
#pragma unroll
    for (int half = 0; half < kPackSize; half += Pack<float>::size) {
        Pack<float> value = load16(out + half);
#pragma unroll
        for (int e = 0; e < Pack<float>::size; ++e) value.v[e] += sum[half + e];
        store16(out + half, value);
    }
}

// The block's places and their neighbourhood: window[1 + r] is the token at place base + r, for r = -1..2 kRows - 1;
// -1, which is no token, outside the array. So a run is measured without touching memory or asking for bounds.
constexpr int kWindow = 2 * kRows + 1;

// Length of the run that begins at the block's place r, as far as kRows + 1; 0 if none begins there.
__device__ int run_length(const std::int32_t (&window)[kWindow], int r) {
    const std::int32_t token = window[1 + r];
    if (token < 0 || window[r] == token) return 0;
    int length = 1;
    while (length <= kRows && window[1 + r + length] == token) ++length;
    return length;
}

__global__ __launch_bounds__(kThreads, 2) void scatter_kernel(Scatter a) {
    __shared__ int long_run;
    __shared__ std::int32_t window[kWindow];
    __shared__ float sums[kRows][kBlockChannels];
    const int lane = threadIdx.x, group = threadIdx.y, thread = group * kLanes + lane;
    const int channel = blockIdx.y * kBlockChannels + lane * kPackSize;
    const bool active = channel < a.channels;
    const int base = blockIdx.x * kRows, place = base + group;
    if (thread == 0) long_run = -1;
    if (thread < kWindow) {
        const int p = base - 1 + thread;
        window[thread] = p >= 0 && p < a.count ? a.tokens[p] : -1;
    }
    __syncthreads();

    const int length = run_length(window, group);
    float sum[kPackSize] = {};
    if (length > kRows) {
        if (lane == 0) long_run = place;  // at most one long run begins among kRows places
    } else if (length > 0 && active) {
        add_rows(sum, a, channel, place, place + length, 1);
        add_to_table(a, window[1 + group], channel, sum);
    }
    __syncthreads();
    const int start = long_run;
    if (start < 0) return;  // the same answer in every thread

    const int end = end_of_run(a, start, thread);
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) sum[e] = 0.f;
    if (active) add_rows(sum, a, channel, start + group, end, kRows);
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) sums[group][lane * kPackSize + e] = sum[e];
    __syncthreads();
    const int own = blockIdx.y * kBlockChannels + thread;
    if (thread >= kBlockChannels || own >= a.channels) return;
    float total = 0;
    for (int g = 0; g < kRows; ++g) total += sums[g][thread];
    a.dtable[a.tokens[start] * a.ld_dtable + own] += total;
}

// Parts of the scratch memory, each 256-byte aligned.
struct Parts {
    std::size_t positions, sorted_tokens, sorted_positions, sort, end;
    std::size_t sort_bytes() const { return end - sort; }
};
Parts parts_for(std::int64_t tokens) {
    const std::size_t array = embedding_array_bytes(tokens);
    return {0, array, 2 * array, 3 * array, embedding_scratch_bytes(tokens)};
}

}  // namespace

void embedding_forward(const Cuda& dev, const EmbeddingForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("embedding", p.x.cols % kPackSize == 0 && is_aligned16(p.x) && is_aligned16(p.table));
    if (p.x.rows == 0) return;
    const Gather args{nv(p.x.data), nv(p.table.data),         p.tokens.data, p.x.rows, p.x.ld,
                      p.table.ld,   int(p.x.cols / kPackSize)};
    gather_kernel<<<unsigned(ceil_div(p.x.rows, std::int64_t(kGatherRows))), dim3(kLanes, kGatherRows), 0,
                    stream_of(dev)>>>(args);
    LAUNCH_CHECK("embedding_forward");
}

void embedding_backward(const Cuda& dev, const EmbeddingBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("embedding", p.dx.cols % kPackSize == 0 && is_aligned16(p.dx) && is_aligned16(p.dtable));
    FIEDLER_REQUIRE("embedding", p.dx.rows < (std::int64_t(1) << 30) && p.dtable.rows < (std::int64_t(1) << 31));
    if (p.dx.rows == 0 || p.dx.cols == 0) return;
    const auto n = static_cast<std::int32_t>(p.dx.rows);
    const Parts parts = parts_for(n);
    FIEDLER_REQUIRE("embedding", p.scratch && p.scratch.size >= std::int64_t(parts.end) &&
                                     reinterpret_cast<std::uintptr_t>(p.scratch.data) % 256 == 0);
    const auto part = [&](std::size_t offset) { return reinterpret_cast<std::int32_t*>(p.scratch.data + offset); };
    std::int32_t *positions = part(parts.positions), *sorted_tokens = part(parts.sorted_tokens),
                 *sorted_positions = part(parts.sorted_positions);
    const cudaStream_t stream = stream_of(dev);

    constexpr int kPositionThreads = 256;
    positions_kernel<<<unsigned(ceil_div(std::int64_t(n), std::int64_t(kPositionThreads))), kPositionThreads, 0,
                       stream>>>(positions, n);
    LAUNCH_CHECK("embedding_positions");
    std::size_t sort_bytes = parts.sort_bytes();
    const int bits = std::max(1, int(std::bit_width(static_cast<std::uint32_t>(p.dtable.rows - 1))));
    CUDA_CHECK(cub::DeviceRadixSort::SortPairs(p.scratch.data + parts.sort, sort_bytes, p.tokens.data, sorted_tokens,
                                               positions, sorted_positions, n, 0, bits, stream));
    const Scatter args{p.dtable.data, nv(p.dx.data), sorted_tokens, sorted_positions, p.dtable.ld, p.dx.ld, n,
                       int(p.dx.cols)};
    const dim3 grid(unsigned(ceil_div(std::int64_t(n), std::int64_t(kRows))),
                    unsigned(ceil_div(p.dx.cols, std::int64_t(kBlockChannels))));
    scatter_kernel<<<grid, dim3(kLanes, kRows), 0, stream>>>(args);
    LAUNCH_CHECK("embedding_backward");
}

}  // namespace fiedler
