// kernels/conv.cu: causal depthwise convolution (see conv.h, conv_taps.cuh). A thread owns 8 neighbouring channels (16
// bytes) and walks forward in time for y, backward for dx and dw, whose terms both look forward. The window is cleared
// where a sequence ends.
#include "kernels/conv.h"
#include "kernels/conv_taps.cuh"

namespace fiedler {
namespace {

using namespace taps;
constexpr int kForwardRun = 16, kForwardStep = 8;  // tokens of a run, and how many are loaded at a time
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

__device__ uint4 load_raw(const nv_bf16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ void store_sum(nv_bf16* p, const Row (&window)[kTaps], const Row (&w)[kTaps]) {
    Row sum;
    weighted_sum(sum, window, w);
    *reinterpret_cast<uint4*>(p) = packed(sum);
}
__device__ Channels own_channels() {
    const int first = threadIdx.x * kPackSize;
    return {first, first + kPackSize / 2};
}

__global__ __launch_bounds__(kThreads) void forward_kernel(Args a) {
    const int first_channel = blockIdx.y * kBlockChannels, channel = first_channel + threadIdx.x * kPackSize;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kForwardRun;
    const int stop = min(start + kForwardRun, a.tokens);
    Row w[kTaps];
    load_weights(w, a.w, a.channels, first_channel, own_channels());
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
            store_sum(out + i * a.ld_out, window, w);
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
            store_sum(dx + j * a.ld_out, window, w);
            Row x_row;
            unpack(x_row, x_rows[s]);
            add_terms(dw, x_row, window);
            shift(window);
        }
    }
}

__global__ __launch_bounds__(kThreads) void backward_kernel(Args a) {
    __shared__ Sums sums;
    const int first_channel = blockIdx.y * kBlockChannels, channel = first_channel + threadIdx.x * kPackSize;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kBackwardRun;
    const int stop = min(start + kBackwardRun, a.tokens);
    Row w[kTaps], dw[kTaps] = {};
    load_weights(w, a.w, a.channels, first_channel, own_channels());
    if (channel < a.channels && start < stop) backward_run(dw, w, a, channel, start, stop);
    store_partial(sums, dw, a.partial, a.channels, first_channel, own_channels());
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
    add_partials(stream_of(dev), p.dw.data, p.scratch.data, token_blocks(p.x.rows, kBackwardRun), p.x.cols);
}

}  // namespace fiedler
