// kernels/coordinate.cu: coordinate scalars on the GPU (contract in coordinate.h).
//
// A thread owns one column and a run of kRun neighbouring tokens, held in registers with the three tokens before
// (forward) or after (backward) them: every value is read from memory about once. A block is as many columns wide as
// there are (at most kThreads) and as many runs high as fit.
#include "kernels/common.cuh"
#include "kernels/coordinate.h"

namespace fiedler {

namespace {
constexpr int kThreads = 256, kTaps = 4, kReach = kTaps - 1, kRun = 8;
constexpr int kSums = kTaps + 1;  // partial sums of a column: dw_0 .. dw_3, dlog_temp
constexpr int kMaxBlocks = kCoordinatePartials;
// Of a multiprocessor, going backward: 80 registers a thread, so that with 96 columns (blocks of 192 threads) all
// kMaxBlocks run at once on 132 multiprocessors, with 27 loads under way to each thread.
constexpr int kBackwardBlocks = 3;
static_assert(kSums == 5, "coordinate_scratch_elements");

struct Layout {
    dim3 block;
    unsigned column_blocks, run_blocks;
};
Layout layout_of(std::int64_t tokens, std::int64_t columns) {
    Layout l;
    l.block.x = static_cast<unsigned>(columns < kThreads ? columns : kThreads);
    l.block.y = kThreads / l.block.x;
    l.column_blocks = static_cast<unsigned>(ceil_div(columns, std::int64_t(l.block.x)));
    l.run_blocks = static_cast<unsigned>(ceil_div(tokens, std::int64_t(l.block.y) * kRun));
    return l;
}
unsigned partial_rows(const Layout& l) { return l.run_blocks < kMaxBlocks ? l.run_blocks : kMaxBlocks; }

__device__ inline float inverse_temperature(const float* log_temp, int column, int half, int heads) {
    return expf(-log_temp[column % half / (half / heads)]);
}

template <bool kConvolution>
__global__ void __launch_bounds__(kThreads) coordinate_forward_kernel(CoordinateForward<float> p) {
    const int columns = static_cast<int>(p.s.cols), half = columns / 2, tokens = p.seq.tokens;
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    const std::int64_t start = (std::int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kRun;
    if (column >= columns || start >= tokens) return;
    const int begin = static_cast<int>(start);
    int first = p.seq.first(begin), last = p.seq.last(begin);

    float s[kRun + kReach];  // s[n] is token begin - kReach + n; 0 where this run cannot need it
#pragma unroll
    for (int n = 0; n < kRun + kReach; ++n) {
        const std::int64_t token = start - kReach + n;
        const bool wanted = kConvolution ? token >= first : n >= kReach;
        s[n] = wanted && token < tokens ? p.s.data[token * p.s.ld + column] : 0.f;
    }
    float w[kTaps] = {0.f, 0.f, 0.f, 1.f};
    if (kConvolution) {
#pragma unroll
        for (int k = 0; k < kTaps; ++k) w[k] = p.w.data[std::int64_t(column) * kTaps + k];
    }
    const float scale = inverse_temperature(p.log_temp.data, column, half, static_cast<int>(p.log_temp.size));
    const bool is_query = column < half;
    float* out = is_query ? p.a.data + column : p.b.data + (column - half);
    const std::int64_t ld = is_query ? p.a.ld : p.b.ld;
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        const std::int64_t token = start + n;
        if (token >= tokens) return;
        float lam = s[n + kReach];
        if (kConvolution) {
            if (token == last) {  // the run enters the next sequence
                first = static_cast<int>(token);
                last = p.seq.last(first);
            }
            lam *= w[kReach];
#pragma unroll
            for (int k = 0; k < kReach; ++k)
                if (token - kReach + k >= first) lam += w[k] * s[n + k];
        }
        out[token * ld] = lam * scale;
    }
}

// What token j gives: ds_j from the gradients of tokens j .. j + 3, and with the same window its share of dw:
// dw_k = sum_j s_j dlam_{j + 3 - k}.
template <bool kConvolution>
__device__ inline void backward_run(const CoordinateBackward<bf16>& p, std::int64_t start, int column, int half,
                                    float scale, const float (&w)[kTaps], float (&sum)[kSums]) {
    const int tokens = p.seq.tokens;
    const bool is_query = column < half;
    const int own = is_query ? column : column - half;
    const float* gradient = (is_query ? p.da.data : p.db.data) + own;
    const float* output = (is_query ? p.a.data : p.b.data) + own;
    nv_bf16* ds_out = reinterpret_cast<nv_bf16*>(p.ds.data) + column;
    const std::int64_t gradient_ld = is_query ? p.da.ld : p.db.ld, output_ld = is_query ? p.a.ld : p.b.ld;
    gradient += start * gradient_ld;
    output += start * output_ld;
    ds_out += start * p.ds.ld;
    const float* scalar = kConvolution ? p.s.data + start * p.s.ld + column : nullptr;
    // What is not read again this step is marked to leave the caches first; s shares its rows with the gate's logits.
    const int left = static_cast<int>(min(std::int64_t(tokens) - start, std::int64_t(kRun + kReach)));
    float g[kRun + kReach], s[kRun], o[kRun];
#pragma unroll
    for (int n = 0; n < (kConvolution ? kRun + kReach : kRun); ++n) {
        g[n] = n < left ? __ldcs(gradient) : 0.f;
        gradient += gradient_ld;
    }
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        o[n] = n < left ? __ldcs(output) : 0.f;
        output += output_ld;
        if (kConvolution) {
            s[n] = n < left ? *scalar : 0.f;
            scalar += p.s.ld;
        }
    }
    // Tokens from the start on that belong to the sequence of the token at hand.
    int same = kConvolution ? p.seq.last(static_cast<int>(start)) - static_cast<int>(start) : 0;
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        if (n < left) {
            sum[kTaps] -= g[n] * o[n];
            float ds = g[n] * scale;
            if (kConvolution) {
                if (n == same) same = p.seq.last(static_cast<int>(start) + n) - static_cast<int>(start);
                ds = 0.f;
#pragma unroll
                for (int k = 0; k < kTaps; ++k) {
                    const int ahead = kReach - k;
                    const float dlam = n + ahead < same ? g[n + ahead] * scale : 0.f;
                    ds += w[k] * dlam;
                    sum[k] += s[n] * dlam;
                }
            }
            *ds_out = from_float<nv_bf16>(ds);
        }
        ds_out += p.ds.ld;
    }
}

// Scratch: partial[(column * kSums + k) * gridDim.x + blockIdx.x], so that the partial sums of one total lie together.
template <bool kConvolution>
__global__ void __launch_bounds__(kThreads, kConvolution ? kBackwardBlocks : 1)
    coordinate_backward_kernel(CoordinateBackward<bf16> p) {
    __shared__ float shared[kSums][kThreads];
    const int columns = static_cast<int>(p.s.cols), half = columns / 2;
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    const bool active = column < columns;
    float sum[kSums] = {};
    if (active) {
        float w[kTaps] = {0.f, 0.f, 0.f, 1.f};
        if (kConvolution) {
#pragma unroll
            for (int k = 0; k < kTaps; ++k) w[k] = p.w.data[std::int64_t(column) * kTaps + k];
        }
        const float scale = inverse_temperature(p.log_temp.data, column, half, static_cast<int>(p.log_temp.size));
        const std::int64_t stride = std::int64_t(gridDim.x) * blockDim.y * kRun;
        for (std::int64_t start = (std::int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kRun; start < p.seq.tokens;
             start += stride)
            backward_run<kConvolution>(p, start, column, half, scale, w, sum);
    }
    if (!p.scratch.data) return;  // the same for every thread

    const int mine = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kSums; ++k) shared[k][mine] = sum[k];
    __syncthreads();
    for (int rows = blockDim.y; rows > 1; rows = (rows + 1) / 2) {  // fold the upper half onto the lower one
        const int keep = (rows + 1) / 2;
        if (static_cast<int>(threadIdx.y) < rows - keep) {
#pragma unroll
            for (int k = 0; k < kSums; ++k) shared[k][mine] += shared[k][mine + keep * blockDim.x];
        }
        __syncthreads();
    }
    if (threadIdx.y == 0 && active) {
#pragma unroll
        for (int k = 0; k < kSums; ++k)
            p.scratch.data[(std::int64_t(column) * kSums + k) * gridDim.x + blockIdx.x] = shared[k][mine];
    }
}

// One block per total: the kTaps * columns entries of dw (if any), then dlog_temp of each head (if wanted).
__global__ void __launch_bounds__(kThreads) coordinate_totals_kernel(const float* partial, int rows, int taps, int half,
                                                                     int heads, float* dw, float* dlog_temp) {
    __shared__ float shared[kThreads / kWarp];
    const int total = blockIdx.x;
    // Each thread adds its one or two partial sums of a column; columns are independent loads.
    static_assert(kMaxBlocks <= 2 * kThreads);
    const int low = threadIdx.x, high = threadIdx.x + kThreads;
    const auto column_sum = [&](int column, int k) {
        const float* mine = partial + (std::int64_t(column) * kSums + k) * rows;
        return (low < rows ? mine[low] : 0.f) + (high < rows ? mine[high] : 0.f);
    };
    float sum = 0.f;
    if (total < taps) {
        sum = column_sum(total / kTaps, total % kTaps);
    } else {
        const int per_head = half / heads, first = (total - taps) * per_head;
#pragma unroll 8
        for (int c = 0; c < per_head; ++c) sum += column_sum(first + c, kTaps) + column_sum(half + first + c, kTaps);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) (total < taps ? dw[total] : dlog_temp[total - taps]) += sum;
}
}  // namespace

void coordinate_forward(const Cuda& d, const CoordinateForward<float>& p) {
    check(p);
    if (p.s.rows == 0 || p.s.cols == 0) return;
    const Layout l = layout_of(p.s.rows, p.s.cols);
    const dim3 grid(l.run_blocks, l.column_blocks);
    if (p.w)
        coordinate_forward_kernel<true><<<grid, l.block, 0, stream_of(d)>>>(p);
    else
        coordinate_forward_kernel<false><<<grid, l.block, 0, stream_of(d)>>>(p);
    LAUNCH_CHECK("coordinate_forward");
}

void coordinate_backward(const Cuda& d, const CoordinateBackward<bf16>& given) {
    CoordinateBackward<bf16> p = given;
    check(p);
    if (p.s.rows == 0 || p.s.cols == 0) return;
    const Layout l = layout_of(p.s.rows, p.s.cols);
    const unsigned rows = partial_rows(l);
    const bool sums = p.dw || p.dlog_temp;
    FIEDLER_REQUIRE("coordinate",
                    !sums || (p.scratch && p.scratch.size >= coordinate_scratch_elements(p.s.rows, p.s.cols)));
    if (!sums) p.scratch = {};
    const dim3 grid(rows, l.column_blocks);
    if (p.w)
        coordinate_backward_kernel<true><<<grid, l.block, 0, stream_of(d)>>>(p);
    else
        coordinate_backward_kernel<false><<<grid, l.block, 0, stream_of(d)>>>(p);
    LAUNCH_CHECK("coordinate_backward");
    if (!sums) return;
    const int half = static_cast<int>(p.s.cols / 2), heads = static_cast<int>(p.log_temp.size);
    const int taps = p.dw ? 2 * half * kTaps : 0;
    const unsigned totals = static_cast<unsigned>(taps + (p.dlog_temp ? heads : 0));
    coordinate_totals_kernel<<<totals, kThreads, 0, stream_of(d)>>>(p.scratch.data, static_cast<int>(rows), taps, half,
                                                                    heads, p.dw.data, p.dlog_temp.data);
    LAUNCH_CHECK("coordinate_totals");
}

}  // namespace fiedler
