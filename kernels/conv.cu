// kernels/conv.cu: causal depthwise convolution (see conv.h, conv_taps.cuh). A thread owns 8 neighbouring channels (16
// bytes). It walks forward in time for y, backward for dx and dw, whose terms both look forward. The window is cleared
// where a sequence ends.
//
// All that these kernels do is wait for memory, so they ask for it early. Forward, all rows of a run are asked for at
// once; backward, where sums fill the registers, rows wait in shared memory.
#include "kernels/conv.h"
#include "kernels/conv_taps.cuh"
#include "kernels/mma.cuh"

namespace fiedler {
namespace {

using namespace taps;
constexpr int kReach = kTaps - 1;
constexpr int kForwardRun = 8;  // tokens
constexpr int kBackwardRun = kConvBlockTokens / kRuns;
constexpr int kDepth = 8;                               // rows on their way, and the one at hand, backward
constexpr int kStep = 4;                                // rows of a step backward, after which the window is as before
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;  // that fit on a multiprocessor: the bound on registers
static_assert(kBackwardRun % kDepth == 0 && kDepth % kStep == 0 && kStep % kTaps == 0);

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

// kCrosses: a sequence may begin within the run, or the run end before its last token.
template <bool kCrosses>
__device__ void forward_run(const uint4 (&rows)[kForwardRun + kReach], const Row (&w)[kTaps], const Args& a, int start,
                            int boundary, nv_bf16* out) {
    Row window[kTaps];  // once shifted, window[o] is the row o tokens before the next one
#pragma unroll
    for (int o = 1; o < kTaps; ++o) unpack(window[o], rows[kReach - o]);
#pragma unroll
    for (int s = 0; s < kForwardRun; ++s, out += a.ld_out) {
        if (kCrosses) {
            if (start + s >= a.tokens) return;
            if (start + s == boundary) {
                clear(window);
                boundary = a.seq.last(start + s);
            }
        }
        unpack(window[0], rows[s + kReach]);
        store_sum(out, window, w);
        shift(window);
    }
}

__global__ __launch_bounds__(kThreads, kForwardBlocks) void forward_kernel(const Args a) {
    __shared__ Weights weights;
    const Place at(a.channels);
    weights.send(a.w, a.channels, at.first_channel);
    const int channel = at.first_channel + threadIdx.x * kPackSize;
    const int start = (at.token_block * kRuns + threadIdx.y) * kForwardRun;
    const bool any = channel < a.channels && start < a.tokens;
    uint4 rows[kForwardRun + kReach];  // from the token kReach before the run's first; 0 where it cannot be needed
    const nv_bf16* in = a.in + channel + start * a.ld_in;
#pragma unroll
    for (int s = 0; s < kForwardRun; ++s)
        rows[s + kReach] = any && start + s < a.tokens ? load_raw(in + s * a.ld_in) : uint4{0, 0, 0, 0};
    const int first = any ? a.seq.first(start) : start;
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
        rows[kReach - o] = start - o >= first ? load_raw(in - o * a.ld_in) : uint4{0, 0, 0, 0};
    asm volatile("cp.async.wait_all;\n" ::: "memory");
    __syncthreads();
    if (!any) return;
    Row w[kTaps];
    weights.read(w, own_channels());
    const int boundary = a.seq.last(start);  // where the next sequence begins
    nv_bf16* out = a.out + channel + start * a.ld_out;
    if (start + kForwardRun <= min(boundary, a.tokens))
        forward_run<false>(rows, w, a, start, boundary, out);
    else
        forward_run<true>(rows, w, a, start, boundary, out);
}

// The rows of dy and x of a thread's run, from its last token on, on their way from memory: 16 bytes each, to a place of
// the thread's own. No thread reads another's, so there are no barriers.
struct Rows {
    uint4 dy[kDepth][kThreads], x[kDepth][kThreads];
};
// kLeave: what is read leaves the L2 cache first.
template <bool kLeave>
struct Stream {
    Rows& rows;
    const nv_bf16 *dy, *x;  // of the next row to be sent for
    std::int64_t ld_dy, ld_x;
    int left;  // rows that have not been sent for

    // A row into a slot, or zeros after the last one; and what else `more` asks for, which arrives with it.
    template <class More>
    __device__ void send(int slot, More&& more) {
        const int thread = threadIdx.y * kLanes + threadIdx.x, bytes = left > 0 ? 16 : 0;
        fetch(rows.dy[slot][thread], dy, bytes);
        fetch(rows.x[slot][thread], x, bytes);
        more();
        cp_async_commit();
        dy -= ld_dy, x -= ld_x, --left;
    }
    __device__ void send(int slot) {
        send(slot, [] {});
    }
    __device__ static void fetch(uint4& to, const nv_bf16* from, int bytes) {
        if constexpr (kLeave) {
            std::uint64_t policy;
            asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
            asm volatile(
                "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared_address(&to)),
                "l"(from), "r"(bytes), "l"(policy)
                : "memory");
        } else {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(&to)), "l"(from),
                         "r"(bytes)
                         : "memory");
        }
    }
    // Until no more than kPending of the last rows are on their way.
    template <int kPending>
    __device__ static void wait() {
        asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
    }
};

// One thread's share of backward: dx of its run, and its run's terms of dw. The first kDepth - 1 rows have been sent for.
template <bool kLeave>
__device__ void backward_run(Row (&dw)[kTaps], const Row (&w)[kTaps], const Args& a, Stream<kLeave>& stream,
                             const Row (&after)[kReach], int channel, int start, int stop) {
    const int thread = threadIdx.y * kLanes + threadIdx.x;
    nv_bf16* dx = a.out + channel + (stop - 1) * a.ld_out;
    Row window[kTaps];  // once shifted, window[o] is dy o tokens after the next one
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) window[o][e] = after[o - 1][e];
    int boundary = a.seq.first(stop - 1);
    const auto take = [&](int slot) {
        stream.send((slot + kDepth - 1) % kDepth);  // where the row before was: it has been used
        stream.template wait<kDepth - 1>();
        unpack(window[0], stream.rows.dy[slot][thread]);
        store_sum(dx, window, w);
        Row x;
        unpack(x, stream.rows.x[slot][thread]);
        add_terms(dw, x, window);
        shift(window);
        dx -= a.ld_out;
    };
    for (int j0 = stop - 1; j0 >= start; j0 -= kDepth) {
#pragma unroll
        for (int step = 0; step < kDepth; step += kStep) {
            if (j0 - step - (kStep - 1) >= max(boundary, start)) {  // no sequence ends within the step
#pragma unroll
                for (int s = 0; s < kStep; ++s) take(step + s);
                continue;
            }
#pragma unroll
            for (int s = 0; s < kStep; ++s) {
                const int j = j0 - step - s;
                if (j < start) continue;
                if (j < boundary) {  // j is the last token of the sequence before
                    clear(window);
                    boundary = a.seq.first(j);
                }
                take(step + s);
            }
        }
    }
}

template <bool kLeave>
__global__ __launch_bounds__(kThreads, kBackwardBlocks) void backward_kernel(const Args a) {
    dependents_may_start();
    __shared__ union Memory {
        Rows rows;
        Sums sums;
        __device__ Memory() {}
    } shared;
    __shared__ Weights weights;
    const Place at(a.channels);
    const int channel = at.first_channel + threadIdx.x * kPackSize;
    const int start = (at.token_block * kRuns + threadIdx.y) * kBackwardRun;
    const int stop = min(start + kBackwardRun, a.tokens);
    const bool any = channel < a.channels && start < stop;
    Stream<kLeave> stream{shared.rows,
                          a.in + channel + (stop - 1) * a.ld_in,
                          a.x + channel + (stop - 1) * a.ld_x,
                          a.ld_in,
                          a.ld_x,
                          any ? stop - start : 0};
    const nv_bf16* dy = stream.dy;
    stream.send(0, [&] { weights.send(a.w, a.channels, at.first_channel); });
#pragma unroll
    for (int s = 1; s < kDepth - 1; ++s) stream.send(s);
    Row after[kReach], w[kTaps], dw[kTaps] = {};
    const int last = any ? a.seq.last(stop - 1) : stop;
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
        unpack(after[o - 1], stop - 1 + o < last ? load_raw(dy + o * a.ld_in) : uint4{0, 0, 0, 0});
    stream.template wait<kDepth - 2>();  // for the first group of rows, and with it the weights
    __syncthreads();
    weights.read(w, own_channels());
    if (any) backward_run(dw, w, a, stream, after, channel, start, stop);
    stream.template wait<0>();
    __syncthreads();  // the rows have been read
    put_sums(shared.sums, dw, own_channels());
    store_sums(shared.sums, a.partial, a.channels, Place(a.channels));
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
    FIEDLER_REQUIRE("conv", p.pending || p.scratch.size >= conv_pending_elements(p.x.rows, p.x.cols));
    PendingSums<float> own(p.scratch);
    PendingSums<float>& sums = p.pending ? *p.pending : own;
    const std::int64_t blocks = token_blocks(p.x.rows, kBackwardRun), columns = p.x.cols * kTaps;
    float* const partial = sums.take(blocks * columns).data;
    sums.add({p.dw.data, partial, columns, 1, std::int32_t(blocks), std::int32_t(columns)});
    // dx is read next: where it fits, dy and x, which are not, should not drive it out of the L2 cache.
    const bool stays = 2 * p.x.rows * p.x.cols * std::int64_t(sizeof(bf16)) <= std::int64_t(dev.l2_bytes);
    const Args args{nv(p.dx.data), nv(p.dy.data), nv(p.x.data), p.w.data,      partial, p.dx.ld,
                    p.dy.ld,       p.x.ld,        p.seq.tokens, int(p.x.cols), p.seq};
    const auto kernel = stays ? backward_kernel<true> : backward_kernel<false>;
    kernel<<<grid_for(p.x.rows, p.x.cols, kBackwardRun), dim3(kLanes, kRuns), 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("conv_backward");
    if (!p.pending) finish_sums(dev, own);
}

}  // namespace fiedler
