// kernels/conv_rotary.cu: convolution, per-head norm and rotation in one pass (see conv_rotary.h, conv_taps.cuh).
//
// A thread owns 4 neighbouring channels of the lower half of a head and the 4 of the upper half that turn with them: D / 8
// neighbouring threads share a head. It walks a run of tokens, forward in time for y; backward for dx and dw, with a
// window of dm, and one of x, from which m is computed again. The three tokens after a run are walked as well: its dx
// needs their dm.
//
// All threads of a warp take every step of their runs, though there be no token or no channel: the sums over heads need
// them. Rows are then 0, columns those of the block's first head, and nothing is written.
#include "kernels/conv_rotary.h"

#include <type_traits>

#include "kernels/conv_taps.cuh"
#include "kernels/mma.cuh"
#include "kernels/rotary_turn.cuh"

namespace fiedler {
namespace {

using namespace taps;
using namespace turning;
constexpr int kAngles = kPackSize / 2;             // of a thread
constexpr int kForwardRun = 16, kForwardStep = 4;  // tokens of a run, and how many are loaded at a time
constexpr int kAfter = kTaps - 1;                  // tokens after a run, whose dm its dx needs
constexpr int kBackwardRun = kConvRotaryBlockTokens / kRuns;
constexpr int kDepth = 4;                               // rows on their way, and the one at hand, backward
constexpr int kForwardBlocks = 4, kBackwardBlocks = 3;  // that fit on a multiprocessor: the bound on registers
static_assert(kForwardRun % kForwardStep == 0 && kBackwardRun % kDepth == 0);
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

// Rows on their way from memory, each thread's piece to a place of its own: no thread reads another's, so there are no
// barriers. Backward has no registers left for them to wait in.
using Ring = uint4[kDepth][kThreads];

// A thread's columns of the rows of a matrix; those of rows that it does not have are 0.
template <int D>
struct Rows {
    const nv_bf16* data;
    int ld, rows;
    __device__ bool has(int row) const { return unsigned(row) < unsigned(rows); }
    __device__ const nv_bf16* at(int row) const { return data + std::int64_t(row) * ld; }
    __device__ uint4 load(int row) const {
        if (!has(row)) return {0, 0, 0, 0};
        const uint2 lower = *reinterpret_cast<const uint2*>(at(row));
        const uint2 upper = *reinterpret_cast<const uint2*>(at(row) + D / 2);
        return {lower.x, lower.y, upper.x, upper.y};
    }
    __device__ void send(uint4& to, int row, bool wanted) const {
        const int bytes = wanted && has(row) ? 8 : 0;  // of 8, which are read; the rest becomes 0
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 8, %3;\n"
            "cp.async.ca.shared.global [%0 + 8], [%2], 8, %3;\n" ::"r"(shared_address(&to)),
            "l"(at(row)), "l"(at(row) + D / 2), "r"(bytes)
            : "memory");
    }
};
// Waits until no more than kPending of the thread's last groups of rows are on their way.
template <int kPending>
__device__ void wait_for_rows() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

template <int D>
__device__ void store_row(nv_bf16* out, int row, int ld, const Row& y) {
    nv_bf16* p = out + std::int64_t(row) * ld;
    const uint4 words = packed(y);
    *reinterpret_cast<uint2*>(p) = {words.x, words.y};
    *reinterpret_cast<uint2*>(p + D / 2) = {words.z, words.w};
}

// cos and sin of the angles of kSteps tokens from the first of a sequence on, then of the first token of each run, in
// fours. Without rotation all angles are 0, as those of row 0 always are.
template <int D, int kSteps>
struct Table {
    static constexpr int kRows = kSteps + kRuns, kFours = D / 8;
    float4 cosine[kRows][kFours], sine[kRows][kFours];

    // All threads of the block take part, without a barrier. run: tokens of each.
    __device__ void fill(const Args& a, int run) {
        static_assert(kThreads % (D / 2) == 0);
        const int thread = threadIdx.y * kLanes + threadIdx.x, d = thread % (D / 2);
        const float frequency = a.rotate ? a.frequencies.value[d] : 0.f;
        for (int row = thread / (D / 2); row < kRows; row += kThreads / (D / 2)) {
            int position = row;
            if (row >= kSteps) {
                const int start = min((int(blockIdx.x) * kRuns + row - kSteps) * run, a.tokens - 1);
                position = start - a.seq.first(start);
            }
            sincosf(float(position) * frequency, &sine[row][d / 4].x + d % 4, &cosine[row][d / 4].x + d % 4);
        }
    }
};

// The angles of a thread: those at `origin`, a token of the sequence at hand (its first, or the run's first), and what
// they grow by from there. In a thread that turns nothing they stay 0.
template <int D, int kSteps>
struct Turn {
    const Table<D, kSteps>& table;
    int start, stride, four, origin;
    float cosine[kAngles], sine[kAngles];

    __device__ Turn(const Table<D, kSteps>& t, const Place<D>& place, int run_start)
        : table(t), start(run_start), stride(place.turns ? Table<D, kSteps>::kFours : 0), four(place.angle / 4) {}
    __device__ void begin(int first) {
        origin = max(start, first);
        const int row = first <= start && stride > 0 ? kSteps + threadIdx.y : 0;
        unpack_four(cosine, table.cosine[row][four]);
        unpack_four(sine, table.sine[row][four]);
    }
    // The angles at `token`, origin <= token < origin + kSteps, by the addition theorem.
    __device__ void at(float (&c)[kAngles], float (&s)[kAngles], int token) const {
        const int place = (token - origin) * stride + four;
        float by_cosine[kAngles], by_sine[kAngles];
        unpack_four(by_cosine, (&table.cosine[0][0])[place]);
        unpack_four(by_sine, (&table.sine[0][0])[place]);
#pragma unroll
        for (int i = 0; i < kAngles; ++i) {
            c[i] = fmaf(cosine[i], by_cosine[i], -sine[i] * by_sine[i]);
            s[i] = fmaf(sine[i], by_cosine[i], cosine[i] * by_sine[i]);
        }
    }
    __device__ static void unpack_four(float (&v)[kAngles], const float4& four) {
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    }
};

// Norm and rotation of a row of m, in place.
template <int D, class T>
__device__ void turn_row(Row& y, const Args& a, const Place<D>& place, const T& turns, int token) {
    if (a.normalise) {
        const float squares = product_of_head<D / 8>(y, y, kWholeWarp);
        const float r = place.turns ? inverse_rms_of_head<D>(squares, a.eps) : 1.f;
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) y[e] *= r;
    }
    float cosine[kAngles], sine[kAngles];
    turns.at(cosine, sine, token);
    turn(y, cosine, sine);
}

// kTurned: some of the block's channels are.
template <int D, bool kTurned>
__device__ void forward_run(const Row (&w)[kTaps], const Args& a, const Place<D>& place,
                            const Table<D, kForwardRun>& table, int start) {
    const Rows<D> in{a.in + place.column, a.ld_in, a.tokens};
    nv_bf16* out = a.out + place.column;
    Row window[kTaps];  // once shifted, window[o] is the row o tokens before the next one
    clear(window);
    const int known = min(start, a.tokens - 1), first = a.seq.first(known);
#pragma unroll
    for (int o = 1; o < kTaps; ++o)
        if (known - o >= first) unpack(window[o], in.load(known - o));
    int boundary = a.seq.last(known);  // where the next sequence begins
    Turn<D, kForwardRun> turns(table, place, start);
    if (kTurned) turns.begin(first);

    for (int step = 0; step < kForwardRun / kForwardStep; ++step) {  // known to be the same for all threads of a warp
        const int i0 = start + step * kForwardStep;
        uint4 rows[kForwardStep];
#pragma unroll
        for (int s = 0; s < kForwardStep; ++s) rows[s] = in.load(i0 + s);
#pragma unroll
        for (int s = 0; s < kForwardStep; ++s) {
            const int i = i0 + s;
            if (i == boundary && i < a.tokens) {
                clear(window);
                boundary = a.seq.last(i);
                if (kTurned) turns.begin(i);
            }
            unpack(window[0], rows[s]);
            Row y;
            weighted_sum(y, window, w);
            if (kTurned) turn_row(y, a, place, turns, i);
            if (i < a.tokens && place.inside) store_row<D>(out, i, a.ld_out, y);
            shift(window);
        }
    }
}

template <int D>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void forward_kernel(const Args a) {
    __shared__ Table<D, kForwardRun> table;
    const int first_channel = blockIdx.y * kBlockChannels;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kForwardRun;
    const Place<D> place(a, first_channel);
    if (first_channel < a.turned) table.fill(a, kForwardRun);
    Row w[kTaps];
    load_weights(w, a.w, a.channels, first_channel, place.own);
    if (first_channel < a.turned)
        forward_run<D, true>(w, a, place, table, start);
    else
        forward_run<D, false>(w, a, place, table, start);
}

// m of a token; x[o]: the row o tokens before it, of which those up to `distance` count.
__device__ void convolve(Row& m, const Row (&x)[kTaps], int distance, const Row (&w)[kTaps]) {
    clear_row(m);
#pragma unroll
    for (int o = 0; o < kTaps; ++o) {
        if (o > distance) return;
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) m[e] += w[kTaps - 1 - o][e] * x[o][e];
    }
}

// From the gradient of a row of y to that of m, in place; x and distance: as in convolve.
template <int D, class T>
__device__ void turn_gradient(Row& g, const Row (&x)[kTaps], int distance, const Row (&w)[kTaps], const Args& a,
                              const Place<D>& place, const T& turns, int token) {
    float cosine[kAngles], sine[kAngles];
    turns.at(cosine, sine, token);
    turn_back(g, cosine, sine);
    if (!a.normalise) return;
    Row m;
    if (distance >= kAfter)
        convolve(m, x, kAfter, w);
    else
        convolve(m, x, distance, w);
    const float squares = product_of_head<D / 8>(m, m, kWholeWarp);
    const float along = product_of_head<D / 8>(g, m, kWholeWarp);
    const float r = place.turns ? inverse_rms_of_head<D>(squares, a.eps) : 1.f;
    normalise_back<D>(g, m, r, place.turns ? along : 0.f);
}

template <int D>
struct BackwardMemory {
    Table<D, kBackwardRun + kAfter> table;
    Ring dy, x;
};

// One thread's share of backward: dx of its run, and its run's terms of dw.
template <int D, bool kTurned>
__device__ void backward_run(Row (&dw)[kTaps], const Row (&w)[kTaps], const Args& a, const Place<D>& place,
                             BackwardMemory<D>& shared, int start) {
    constexpr int kSteps = kBackwardRun + kAfter;
    constexpr int kBefore = kTurned ? kAfter : 0;  // rows of x before a token that are needed with it
    nv_bf16* dx = a.out + place.column;
    const int thread = threadIdx.y * kLanes + threadIdx.x;
    const int stop = min(start + kBackwardRun, a.tokens);
    const Rows<D> dy{a.in + place.column, a.ld_in, a.tokens}, x{a.x + place.column, a.ld_x, a.tokens};
    int i = start + kSteps - 1;
    const auto send = [&](int slot, int row) {
        dy.send(shared.dy[slot][thread], row, row >= start);
        x.send(shared.x[slot][thread], row - kBefore, row >= start);
        cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kDepth - 1; ++s) send(s, i - s);
    Row window[kTaps], before[kTaps];  // window[o]: dm o tokens after the one at hand; before[o]: x o tokens before it
    clear(window);
#pragma unroll
    for (int o = 0; o < kBefore; ++o) unpack(before[o], x.load(i - o));
    int first = a.seq.first(stop - 1);
    const int end = a.seq.last(stop - 1);  // tokens from here on have no part in this run
    Turn<D, kSteps> turns(shared.table, place, start);
    if (kTurned) turns.begin(first);

    const auto take_token = [&](auto after_run, int slot) {
        send((slot + kDepth - 1) % kDepth, i - (kDepth - 1));  // where the token before was: it has been used
        wait_for_rows<kDepth - 1>();
        unpack(window[0], shared.dy[slot][thread]);
        unpack(before[kBefore], shared.x[slot][thread]);
        if (i < first) {  // i is the last token of the sequence before
            clear(window);
            first = a.seq.first(i);
            if (kTurned) turns.begin(first);
        }
        if (kTurned) turn_gradient(window[0], before, i - first, w, a, place, turns, i);
        if (i >= (after_run.value ? end : stop)) {
            clear_row(window[0]);
        } else if (!after_run.value) {
            Row row;
            weighted_sum(row, window, w);
            if (place.inside) store_row<D>(dx, i, a.ld_out, row);
            add_terms(dw, before[0], window);
        }
        shift(window);
#pragma unroll
        for (int o = 0; o < kBefore; ++o)
#pragma unroll
            for (int e = 0; e < kPackSize; ++e) before[o][e] = before[o + 1][e];
        --i;
    };
#pragma unroll
    for (int s = 0; s < kAfter; ++s) take_token(std::true_type{}, s);
    for (int step = 0; step < kBackwardRun / kDepth; ++step) {  // known to be the same for all threads of a warp
#pragma unroll
        for (int s = 0; s < kDepth; ++s) take_token(std::false_type{}, (kAfter + s) % kDepth);
    }
    wait_for_rows<0>();
}

template <int D>
__global__ __launch_bounds__(kThreads, kBackwardBlocks) void backward_kernel(const Args a) {
    __shared__ union Memory {
        BackwardMemory<D> rows;
        Sums sums;
        __device__ Memory() {}
    } shared;
    const int first_channel = blockIdx.y * kBlockChannels;
    const int start = (blockIdx.x * kRuns + threadIdx.y) * kBackwardRun;
    const Place<D> place(a, first_channel);
    if (first_channel < a.turned) shared.rows.table.fill(a, kBackwardRun);
    Row w[kTaps], dw[kTaps] = {};
    load_weights(w, a.w, a.channels, first_channel, place.own);
    if (first_channel < a.turned)
        backward_run<D, true>(dw, w, a, place, shared.rows, start);
    else
        backward_run<D, false>(dw, w, a, place, shared.rows, start);
    __syncthreads();  // table and rows have been read
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
