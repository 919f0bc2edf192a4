// kernels/conv.cu: causal depthwise convolution (see conv.h). A thread owns 8 channels (16 bytes) and walks a run of
// tokens with a window of the neighbouring rows in registers: forward in time for y, backward for dx and dw, whose
// terms both look forward. The window is cleared where a sequence ends. A block is 16 threads of channels x 8 runs; the
// weights pass through shared memory, because a thread's own 8 channels are 128 bytes of them.
#include "kernels/common.cuh"
#include "kernels/conv.h"

namespace fiedler {
namespace {

constexpr int kTaps = 4, kPackSize = Pack<nv_bf16>::size;
constexpr int kLanes = 16, kRuns = 8, kThreads = kLanes * kRuns, kBlockChannels = kLanes * kPackSize;
constexpr int kPaddedChannels = kBlockChannels + 8;  // rows of shared memory by tap: shifted by 8 banks each
constexpr int kForwardRun = 16, kForwardStep = 8;    // tokens of a run, and how many are loaded at a time
constexpr int kBackwardRun = kConvBlockTokens / kRuns, kBackwardStep = 4;

struct Args {
    nv_bf16* out;           // y or dx
    const nv_bf16 *in, *x;  // x or dy; x again (backward)
    const float* w;
    float* partial;  // [blocks of tokens][channels][4] (backward)
    std::int64_t ld_out, ld_in, ld_x;
    int tokens, channels;  // tokens below 2^30, so that a block may count beyond them
    Packed seq;
};

using Row = float[kPackSize];

// Rows wait as raw words: two bf16 to a register (a Pack may be spread over twice as many).
__device__ uint4 load_raw(const nv_bf16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ void unpack(Row& row, const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < kPackSize; ++e)
        row[e] = __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
}
__device__ void clear(Row (&window)[kTaps]) {
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) window[o][e] = 0.f;
}
__device__ void shift(Row (&window)[kTaps]) {
#pragma unroll
    for (int o = kTaps - 1; o > 0; --o)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) window[o][e] = window[o - 1][e];
}
// sum_o w_{3-o} window_o: window[o] is the row o tokens away from the one being written.
__device__ Pack<nv_bf16> weighted_sum(const Row (&window)[kTaps], const Row (&w)[kTaps]) {
    Pack<nv_bf16> r;
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) {
        float sum = 0;
#pragma unroll
        for (int o = 0; o < kTaps; ++o) sum += w[kTaps - 1 - o][e] * window[o][e];
        r.v[e] = from_float<nv_bf16>(sum);
    }
    return r;
}

// The weights of this thread's channels; all threads of the block take part.
__device__ void load_weights(Row (&w)[kTaps], const Args& a, int first_channel) {
    __shared__ float shared[kTaps][kPaddedChannels];
    const int thread = threadIdx.y * kLanes + threadIdx.x;
    const int count = min(kBlockChannels, a.channels - first_channel) * kTaps;
    for (int t = thread; t < kBlockChannels * kTaps; t += kThreads)
        shared[t % kTaps][t / kTaps] = t < count ? a.w[std::int64_t(first_channel) * kTaps + t] : 0.f;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) w[k][e] = shared[k][threadIdx.x * kPackSize + e];
}

__global__ __launch_bounds__(kThreads) void forward_kernel(Args a) {
    const int first_channel = blockIdx.y * kBlockChannels, channel = first_channel + threadIdx.x * kPackSize;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kForwardRun;
    const int stop = min(start + kForwardRun, a.tokens);
    Row w[kTaps];
    load_weights(w, a, first_channel);
    if (channel >= a.channels || start >= a.tokens) return;

    const nv_bf16* in = a.in + channel;
    nv_bf16* out = a.out + channel;
    Row window[kTaps];  // once shifted, window[o] is the row o tokens before the next one
    clear(window);
    const int first = a.seq.first(start);
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
        if (start - o >= first) unpack(window[o], load_raw(in + (start - o) * a.ld_in));
    int boundary = a.seq.last(start);  // where the next sequence begins

    for (int i0 = start; i0 < stop; i0 += kForwardStep) {
        uint4 rows[kForwardStep];
#pragma unroll
        for (int s = 0; s < kForwardStep; ++s)
            if (i0 + s < stop) rows[s] = load_raw(in + (i0 + s) * a.ld_in);
#pragma unroll
        for (int s = 0; s < kForwardStep; ++s) {
            const int i = i0 + s;
            if (i >= stop) break;
            if (i == boundary) {
                clear(window);
                boundary = a.seq.last(i);
            }
            unpack(window[0], rows[s]);
            store16(out + i * a.ld_out, weighted_sum(window, w));
            shift(window);
        }
    }
}

// One thread's share of backward: dx of its run, and its run's terms of dw.
__device__ void backward_run(Row (&dw)[kTaps], const Row (&w)[kTaps], const Args& a, int channel, int start, int stop) {
    const nv_bf16 *dy = a.in + channel, *x = a.x + channel;
    nv_bf16* dx = a.out + channel;
    Row window[kTaps];  // once shifted, window[o] is dy o tokens after the next one
    clear(window);
    const int last = a.seq.last(stop - 1);
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
        if (stop - 1 + o < last) unpack(window[o], load_raw(dy + (stop - 1 + o) * a.ld_in));
    int boundary = a.seq.first(stop - 1);

    for (int j0 = stop - 1; j0 >= start; j0 -= kBackwardStep) {
        uint4 dy_rows[kBackwardStep], x_rows[kBackwardStep];
#pragma unroll
        for (int s = 0; s < kBackwardStep; ++s) {
            if (j0 - s < start) continue;
            dy_rows[s] = load_raw(dy + (j0 - s) * a.ld_in);
            x_rows[s] = load_raw(x + (j0 - s) * a.ld_x);
        }
#pragma unroll
        for (int s = 0; s < kBackwardStep; ++s) {
            const int j = j0 - s;
            if (j < start) break;
            if (j < boundary) {  // j is the last token of the sequence before
                clear(window);
                boundary = a.seq.first(j);
            }
            unpack(window[0], dy_rows[s]);
            store16(dx + j * a.ld_out, weighted_sum(window, w));
            Row x_row;
            unpack(x_row, x_rows[s]);
#pragma unroll
            for (int e = 0; e < kPackSize; ++e) {
#pragma unroll
                for (int o = 0; o < kTaps; ++o) dw[kTaps - 1 - o][e] += x_row[e] * window[o][e];
            }
            shift(window);
        }
    }
}

__global__ __launch_bounds__(kThreads) void backward_kernel(Args a) {
    __shared__ float sums[kRuns][kTaps][kPaddedChannels];
    const int first_channel = blockIdx.y * kBlockChannels, channel = first_channel + threadIdx.x * kPackSize;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kBackwardRun;
    const int stop = min(start + kBackwardRun, a.tokens);
    Row w[kTaps], dw[kTaps] = {};
    load_weights(w, a, first_channel);
    if (channel < a.channels && start < stop) backward_run(dw, w, a, channel, start, stop);

#pragma unroll
    for (int k = 0; k < kTaps; ++k)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) sums[threadIdx.y][k][threadIdx.x * kPackSize + e] = dw[k][e];
    __syncthreads();
    const int count = min(kBlockChannels, a.channels - first_channel) * kTaps;
    float* partial = a.partial + (std::int64_t(blockIdx.x) * a.channels + first_channel) * kTaps;
    for (int t = threadIdx.y * kLanes + threadIdx.x; t < count; t += kThreads) {
        float sum = 0;
#pragma unroll
        for (int run = 0; run < kRuns; ++run) sum += sums[run][t % kTaps][t / kTaps];
        partial[t] = sum;
    }
}

// dw += sum over blocks of partial[block], each element by kFinishRows threads in fixed order.
constexpr int kFinishColumns = 32, kFinishRows = 16;
__global__ __launch_bounds__(kFinishColumns* kFinishRows) void finish_kernel(float* dw, const float* partial,
                                                                             std::int64_t blocks, std::int64_t n) {
    __shared__ float sums[kFinishRows][kFinishColumns];
    const std::int64_t column = std::int64_t(blockIdx.x) * kFinishColumns + threadIdx.x;
    float sum = 0;
    if (column < n) {
#pragma unroll 4
        for (std::int64_t b = threadIdx.y; b < blocks; b += kFinishRows) sum += partial[b * n + column];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= n) return;
    for (int row = 1; row < kFinishRows; ++row) sum += sums[row][threadIdx.x];
    dw[column] += sum;
}

std::int64_t token_blocks(std::int64_t tokens, int run) { return ceil_div(tokens, std::int64_t(kRuns) * run); }
dim3 grid_for(std::int64_t tokens, std::int64_t channels, int run) {
    return dim3(unsigned(token_blocks(tokens, run)), unsigned(ceil_div(channels, std::int64_t(kBlockChannels))));
}

}  // namespace

void conv_forward(const Cuda& dev, const ConvForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("conv", p.x.cols % kPackSize == 0 && is_aligned16(p.x) && is_aligned16(p.y));
    if (p.x.rows == 0 || p.x.cols == 0) return;
    const Args args{nv(p.y.data), nv(p.x.data),  nullptr, p.w.data, nullptr, p.y.ld, p.x.ld, 0,
                    p.seq.tokens, int(p.x.cols), p.seq};
    forward_kernel<<<grid_for(p.x.rows, p.x.cols, kForwardRun), dim3(kLanes, kRuns), 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("conv_forward");
}

void conv_backward(const Cuda& dev, const ConvBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("conv", p.x.cols % kPackSize == 0 && is_aligned16(p.x) && is_aligned16(p.dy) && is_aligned16(p.dx));
    if (p.x.rows == 0 || p.x.cols == 0) return;
    FIEDLER_REQUIRE("conv", p.scratch && p.scratch.size >= conv_scratch_elements(p.x.rows, p.x.cols));
    const Args args{nv(p.dx.data), nv(p.dy.data), nv(p.x.data), p.w.data,      p.scratch.data, p.dx.ld,
                    p.dy.ld,       p.x.ld,        p.seq.tokens, int(p.x.cols), p.seq};
    backward_kernel<<<grid_for(p.x.rows, p.x.cols, kBackwardRun), dim3(kLanes, kRuns), 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("conv_backward");
    const std::int64_t n = p.x.cols * kTaps;
    finish_kernel<<<unsigned(ceil_div(n, std::int64_t(kFinishColumns))), dim3(kFinishColumns, kFinishRows), 0,
                    stream_of(dev)>>>(p.dw.data, p.scratch.data, token_blocks(p.x.rows, kBackwardRun), n);
    LAUNCH_CHECK("conv_finish");
}

}  // namespace fiedler
