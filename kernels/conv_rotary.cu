// kernels/conv_rotary.cu: convolution, per-head norm and rotation in one pass (see conv_rotary.h, conv_taps.cuh).
//
// A thread owns 4 neighbouring channels of the lower half of a head and the 4 of the upper half that turn with them: D / 8
// neighbouring threads share a head. It walks a run of tokens, forward in time for y; backward for dx and dw, with a
// window of dm, and the rows of x that lie before, from which m is computed again.
//
// All threads of a warp take every step of their runs, though there be no token or no channel: the sums over heads need
// them. Rows and columns are then those of others, and nothing is written.
#include "kernels/conv_rotary.h"
#include "kernels/conv_taps.cuh"
#include "kernels/rotary_turn.cuh"

namespace fiedler {
namespace {

using namespace taps;
using namespace turning;
constexpr int kAngles = kPackSize / 2;             // of a thread
constexpr int kForwardRun = 16, kForwardStep = 4;  // tokens of a run, and how many are loaded at a time
constexpr int kAfter = kTaps - 1;                  // tokens after a run, whose dm its dx needs
constexpr int kBackwardRun = kConvRotaryBlockTokens / kRuns, kBackwardStep = 3;
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;  // that fit on a multiprocessor: the bound on registers
static_assert(kForwardRun % kForwardStep == 0 && (kBackwardRun + kAfter) % kBackwardStep == 0);
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Args {
    nv_bf16* out;           // y or dx
    const nv_bf16 *in, *x;  // x or dy; x again (backward)
    const float* w;
    float* partial;  // [blocks of tokens][channels][4] (backward)
    int ld_out, ld_in, ld_x;
    int tokens, channels, turned;  // tokens below 2^30, so that a block may count beyond them; turned: channels
    bool normalise, rotate;
    float eps;
    Packed seq;
    Frequencies frequencies;
};

// A thread's columns, and whether they exist and are turned.
template <int D>
struct Place {
    Channels own;
    int angle, column;  // the first of its angles, and of its columns of the lower half
    bool inside, turns;
    __device__ Place(const Args& a, int first_channel) {
        const int head = threadIdx.x / (D / 8) * D;
        angle = threadIdx.x % (D / 8) * kAngles;
        own = {head + angle, head + angle + D / 2};
        inside = first_channel + head < a.channels;
        turns = first_channel + head < a.turned;
        column = first_channel + (inside ? own.lower : angle);
    }
};

template <int D>
__device__ uint4 load_row(const nv_bf16* in, int row, int ld, int tokens) {
    const nv_bf16* p = in + std::int64_t(min(max(row, 0), tokens - 1)) * ld;
    const uint2 lower = *reinterpret_cast<const uint2*>(p), upper = *reinterpret_cast<const uint2*>(p + D / 2);
    return {lower.x, lower.y, upper.x, upper.y};
}
template <int D>
__device__ void store_row(nv_bf16* out, int row, int ld, const Row& y) {
    nv_bf16* p = out + std::int64_t(row) * ld;
    const uint4 words = packed(y);
    *reinterpret_cast<uint2*>(p) = {words.x, words.y};
    *reinterpret_cast<uint2*>(p + D / 2) = {words.z, words.w};
}

// cos and sin of the angles of kSteps tokens from the first of a sequence on, then of the first token of each run.
template <int D, int kSteps>
struct Table {
    float cosine[kSteps + kRuns][D / 2], sine[kSteps + kRuns][D / 2];

    // All threads of the block take part, without a barrier.
    __device__ void fill(const Args& a, int run) {
        static_assert(kThreads % (D / 2) == 0);
        const int thread = threadIdx.y * kLanes + threadIdx.x, d = thread % (D / 2);
        const float frequency = a.frequencies.value[d];
        for (int row = thread / (D / 2); row < kSteps + kRuns; row += kThreads / (D / 2)) {
            int position = row;
            if (row >= kSteps) {
                const int start = min((int(blockIdx.x) * kRuns + row - kSteps) * run, a.tokens - 1);
                position = start - a.seq.first(start);
            }
            sincosf(float(position) * frequency, &sine[row][d], &cosine[row][d]);
        }
    }
};

// The angles of a thread at `origin`, a token of the sequence at hand: its first one, or the run's first one.
struct Turn {
    float cosine[kAngles], sine[kAngles];
    int origin;

    template <class T>
    __device__ void begin(const T& table, int steps, int angle, int start, int first) {
        origin = max(start, first);
        const int row = first <= start ? steps + threadIdx.y : 0;
#pragma unroll
        for (int i = 0; i < kAngles; ++i) {
            cosine[i] = table.cosine[row][angle + i];
            sine[i] = table.sine[row][angle + i];
        }
    }
    // The angles at `token`, origin <= token < origin + kSteps.
    template <class T>
    __device__ void at(float (&c)[kAngles], float (&s)[kAngles], const T& table, int angle, int token) const {
#pragma unroll
        for (int i = 0; i < kAngles; ++i) {
            const float by_cosine = table.cosine[token - origin][angle + i];
            const float by_sine = table.sine[token - origin][angle + i];
            c[i] = fmaf(cosine[i], by_cosine, -sine[i] * by_sine);
            s[i] = fmaf(sine[i], by_cosine, cosine[i] * by_sine);
        }
    }
};

template <int D>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void forward_kernel(const Args a) {
    __shared__ Table<D, kForwardRun> table;
    const int first_channel = blockIdx.y * kBlockChannels;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kForwardRun;
    const bool turns = first_channel < a.turned;  // some of the block's channels
    const Place<D> place(a, first_channel);
    if (turns && a.rotate) table.fill(a, kForwardRun);
    Row w[kTaps];
    load_weights(w, a.w, a.channels, first_channel, place.own);

    const nv_bf16* in = a.in + place.column;
    nv_bf16* out = a.out + place.column;
    Row window[kTaps];  // once shifted, window[o] is the row o tokens before the next one
    clear(window);
    const int known = min(start, a.tokens - 1), first = a.seq.first(known);
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
        if (known - o >= first) unpack(window[o], load_row<D>(in, known - o, a.ld_in, a.tokens));
    int boundary = a.seq.last(known);  // where the next sequence begins
    Turn turn_of;
    if (turns && a.rotate) turn_of.begin(table, kForwardRun, place.angle, start, first);

    for (int i0 = start; i0 < start + kForwardRun; i0 += kForwardStep) {
        uint4 rows[kForwardStep];
#pragma unroll
        for (int s = 0; s < kForwardStep; ++s) rows[s] = load_row<D>(in, i0 + s, a.ld_in, a.tokens);
#pragma unroll
        for (int s = 0; s < kForwardStep; ++s) {
            const int i = i0 + s;
            if (i == boundary && i < a.tokens) {
                clear(window);
                boundary = a.seq.last(i);
                if (turns && a.rotate) turn_of.begin(table, kForwardRun, place.angle, start, i);
            }
            unpack(window[0], rows[s]);
            Row y;
            weighted_sum(y, window, w);
            if (turns) {
                const float squares = a.normalise ? product_of_head<D / 8>(y, y, kWholeWarp) : 0.f;
                if (a.normalise && place.turns) normalise<D>(y, squares, a.eps);
                if (a.rotate && place.turns) {
                    float cosine[kAngles], sine[kAngles];
                    turn_of.at(cosine, sine, table, place.angle, i);
                    turn(y, cosine, sine);
                }
            }
            if (i < a.tokens && place.inside) store_row<D>(out, i, a.ld_out, y);
            shift(window);
        }
    }
}

// m, without the rows that lie before the token's sequence, in the order of weighted_sum. distance: from its first.
__device__ void convolve(Row& m, const uint4* x, int distance, const Row (&w)[kTaps]) {
    clear_row(m);
#pragma unroll
    for (int o = 0; o < kTaps; ++o) {
        if (o > distance) continue;
        Row row;
        unpack(row, x[o]);
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) m[e] += w[kTaps - 1 - o][e] * row[e];
    }
}

// One thread's share of backward: dx of its run, and its run's terms of dw.
template <int D, class T>
__device__ void backward_run(Row (&dw)[kTaps], const Row (&w)[kTaps], const Args& a, const Place<D>& place,
                             const T& table, bool turns, int start) {
    constexpr int kSteps = kBackwardRun + kAfter;
    const nv_bf16 *dy = a.in + place.column, *x = a.x + place.column;
    nv_bf16* dx = a.out + place.column;
    const int stop = min(start + kBackwardRun, a.tokens), known = min(stop, a.tokens) - 1;
    int first = a.seq.first(known);
    const int end = a.seq.last(known);  // tokens from here on have no part in this run
    Turn turn_of;
    if (turns && a.rotate) turn_of.begin(table, kSteps, place.angle, start, first);
    Row window[kTaps];  // once shifted, window[o] is dm o tokens after the next one
    clear(window);

    int i0 = start + kSteps - 1;
    uint4 x_rows[kBackwardStep + kAfter];  // s tokens before i0
#pragma unroll
    for (int s = 0; s < kAfter; ++s) x_rows[s] = load_row<D>(x, i0 - s, a.ld_x, a.tokens);
    for (; i0 >= start; i0 -= kBackwardStep) {
        uint4 dy_rows[kBackwardStep];
#pragma unroll
        for (int s = 0; s < kBackwardStep; ++s) {
            dy_rows[s] = load_row<D>(dy, i0 - s, a.ld_in, a.tokens);
            x_rows[kAfter + s] = load_row<D>(x, i0 - s - kAfter, a.ld_x, a.tokens);
        }
#pragma unroll
        for (int s = 0; s < kBackwardStep; ++s) {
            const int i = i0 - s;
            if (i < first) {  // i is the last token of the sequence before
                clear(window);
                first = a.seq.first(i);
                if (turns && a.rotate) turn_of.begin(table, kSteps, place.angle, start, first);
            }
            unpack(window[0], dy_rows[s]);
            if (turns) {
                if (a.rotate && place.turns) {
                    float cosine[kAngles], sine[kAngles];
                    turn_of.at(cosine, sine, table, place.angle, i);
                    turn_back(window[0], cosine, sine);
                }
                if (a.normalise) {
                    Row m;
                    convolve(m, x_rows + s, i - first, w);
                    const float squares = product_of_head<D / 8>(m, m, kWholeWarp);
                    const float along = product_of_head<D / 8>(window[0], m, kWholeWarp);
                    if (place.turns) normalise_back<D>(window[0], m, squares, along, a.eps);
                }
            }
            if (i >= end) clear_row(window[0]);
            if (i < stop) {
                Row row;
                weighted_sum(row, window, w);
                if (place.inside) store_row<D>(dx, i, a.ld_out, row);
                unpack(row, x_rows[s]);
                add_terms(dw, row, window);
            }
            shift(window);
        }
#pragma unroll
        for (int s = 0; s < kAfter; ++s) x_rows[s] = x_rows[kBackwardStep + s];
    }
}

template <int D>
__global__ __launch_bounds__(kThreads, kBackwardBlocks) void backward_kernel(const Args a) {
    __shared__ union {
        Table<D, kBackwardRun + kAfter> table;
        Sums sums;
    } shared;
    const int first_channel = blockIdx.y * kBlockChannels;
    const bool turns = first_channel < a.turned;
    const Place<D> place(a, first_channel);
    if (turns && a.rotate) shared.table.fill(a, kBackwardRun);
    Row w[kTaps], dw[kTaps] = {};
    load_weights(w, a.w, a.channels, first_channel, place.own);
    backward_run(dw, w, a, place, shared.table, turns, (blockIdx.x * kRuns + threadIdx.y) * kBackwardRun);
    __syncthreads();  // the table has been read
    store_partial(shared.sums, dw, a.partial, a.channels, first_channel, place.own);
}

template <class P>
Args common_args(const P& p) {
    const std::int64_t width = p.x.cols / p.heads;
    Args a{};
    a.x = nv(p.x.data), a.ld_x = int(p.x.ld), a.w = p.w.data;
    a.tokens = p.seq.tokens, a.channels = int(p.x.cols), a.turned = int(p.turned * width);
    a.normalise = p.normalise, a.rotate = p.rotate, a.eps = p.eps;
    a.seq = p.seq;
    if (width <= 2 * kMaxHalf) a.frequencies = frequencies(width, p.theta);
    return a;
}

}  // namespace

void conv_rotary_forward(const Cuda& dev, const ConvRotaryForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("conv_rotary", is_aligned16(p.x) && is_aligned16(p.y));
    for_width("conv_rotary", p.x.cols / p.heads, [&](auto d) {
        constexpr int D = decltype(d)::value;
        if (p.x.rows == 0) return;
        Args args = common_args(p);
        args.out = nv(p.y.data), args.ld_out = int(p.y.ld);
        args.in = args.x, args.ld_in = args.ld_x;
        forward_kernel<D><<<grid_for(p.x.rows, p.x.cols, kForwardRun), dim3(kLanes, kRuns), 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("conv_rotary_forward");
    });
}

void conv_rotary_backward(const Cuda& dev, const ConvRotaryBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("conv_rotary", is_aligned16(p.x) && is_aligned16(p.dy) && is_aligned16(p.dx));
    for_width("conv_rotary", p.x.cols / p.heads, [&](auto d) {
        constexpr int D = decltype(d)::value;
        if (p.x.rows == 0) return;
        FIEDLER_REQUIRE("conv_rotary", p.scratch && p.scratch.size >= conv_rotary_scratch_elements(p.x.rows, p.x.cols));
        Args args = common_args(p);
        args.out = nv(p.dx.data), args.ld_out = int(p.dx.ld);
        args.in = nv(p.dy.data), args.ld_in = int(p.dy.ld);
        args.partial = p.scratch.data;
        backward_kernel<D>
            <<<grid_for(p.x.rows, p.x.cols, kBackwardRun), dim3(kLanes, kRuns), 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("conv_rotary_backward");
        add_partials(stream_of(dev), p.dw.data, p.scratch.data, token_blocks(p.x.rows, kBackwardRun), p.x.cols);
    });
}

}  // namespace fiedler
