// kernels/conv_rotary.cu: convolution, per-head norm and rotation in one pass (see conv_rotary.h, conv_taps.cuh).
//
// A thread owns 4 neighbouring channels of the lower half of a head and the 4 of the upper half that turn with them: D / 8
// neighbouring threads share a head. It walks a run of tokens, forward in time for y; backward for dx and dw, with a
// window of dm, and one of x, from which m is computed again. The three tokens after a run are walked as well: its dx
// needs their dm.
//
// All threads of a warp take every step of their runs, though there be no token or no channel: the sums over heads need
// them. Rows are then 0, columns those of the block's first head, and nothing is written. Forward, steps of
// four tokens between which no sequence begins, in both runs of the warp, are taken without asking at each token;
// backward, the registers for that are lacking.
#include "kernels/conv_rotary.h"

#include <type_traits>

#include "kernels/conv_taps.cuh"
#include "kernels/mma.cuh"
#include "kernels/rotary_turn.cuh"

namespace fiedler {
namespace {

using namespace taps;
using namespace turning;
constexpr int kAngles = kPackSize / 2;  // of a thread
constexpr int kForwardRun = 16;         // tokens of a run
constexpr int kAfter = kTaps - 1;       // tokens after a run, whose dm its dx needs
constexpr int kBackwardRun = kConvRotaryBlockTokens / kRuns;
constexpr int kStep = 4;  // tokens after which the windows are as before
// Rows on their way, and the one at hand. Backward as many as leave the block's shared memory below 48 KiB.
constexpr int kForwardDepth = 8;
template <int D>
constexpr int kBackwardDepth = D < 128 ? 8 : 4;
// Blocks that fit on a multiprocessor: the bound on registers. Where it is two, with three of them some would spill.
constexpr int kForwardBlocks = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int D>
constexpr int kBackwardBlocks = D < 128 ? 3 : 2;
#else
template <int D>
constexpr int kBackwardBlocks = 3;
#endif
static_assert(kForwardRun % kStep == 0 && kBackwardRun % kStep == 0 && kStep % kTaps == 0);
static_assert(kForwardDepth % kStep == 0);
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
struct Columns {
    Channels own;
    int angle, first;  // the first of its angles, and of its columns of the lower half
    bool inside, turns;
    __device__ Columns(const Args& a, int first_channel) {
        const int head = threadIdx.x / (D / 8) * D;
        angle = threadIdx.x % (D / 8) * kAngles;
        own = {head + angle, head + angle + D / 2};
        inside = first_channel + head < a.channels;
        turns = first_channel + head < a.turned;
        first = first_channel + (inside ? own.lower : angle);
    }
};

// Rows on their way from memory, each thread's piece to a place of its own: no thread reads another's, so there are no
// barriers, and no registers are needed to wait in.
template <int kDepth>
using Ring = uint4[kDepth][kThreads];

// A thread's columns of the rows of a matrix.
template <int D>
struct Rows {
    const nv_bf16* data;
    int ld;
    __device__ const nv_bf16* at(int row) const { return data + std::int64_t(row) * ld; }
    __device__ uint4 load(int row) const {
        const uint2 lower = *reinterpret_cast<const uint2*>(at(row));
        const uint2 upper = *reinterpret_cast<const uint2*>(at(row) + D / 2);
        return {lower.x, lower.y, upper.x, upper.y};
    }
    // Zeros where the row is not there or not wanted.
    __device__ void send(uint4& to, int row, bool wanted) const {
        asm volatile(
            "cp.async.ca.shared.global [%0], [%1], 8, %3;\n"
            "cp.async.ca.shared.global [%0 + 8], [%2], 8, %3;\n" ::"r"(shared_address(&to)),
            "l"(at(row)), "l"(at(row) + D / 2), "r"(wanted ? 8 : 0)
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
    __device__ void fill(const Args& a, int token_block, int run) {
        static_assert(kThreads % (D / 2) == 0);
        const int thread = threadIdx.y * kLanes + threadIdx.x, d = thread % (D / 2);
        const float frequency = a.rotate ? a.frequencies.value[d] : 0.f;
        for (int row = thread / (D / 2); row < kRows; row += kThreads / (D / 2)) {
            int position = row;
            if (row >= kSteps) {
                const int start = min((token_block * kRuns + row - kSteps) * run, a.tokens - 1);
                position = start - a.seq.first(start);
            }
            sincosf(float(position) * frequency, &sine[row][d / 4].x + d % 4, &cosine[row][d / 4].x + d % 4);
        }
    }
};

// The angles of a thread at the token at hand: those at the sequence's first token, or the run's first, and what they have
// grown by since. In a thread that turns nothing they stay 0. All of them stay in shared memory: registers are dearer.
template <int D, int kSteps>
struct Turn {
    const Table<D, kSteps>& table;
    bool turns;
    int origin, place;  // where the two lie in the table

    __device__ Turn(const Table<D, kSteps>& t, const Columns<D>& columns)
        : table(t), turns(columns.turns), origin(columns.angle / 4), place(columns.angle / 4) {}
    // At `token` of a run from `start` on, whose sequence begins at `first`.
    __device__ void begin(int token, int start, int first) {
        constexpr int kFours = Table<D, kSteps>::kFours;
        if (!turns) return;
        origin = origin % kFours + (first <= start ? kSteps + int(threadIdx.y) : 0) * kFours;
        place = origin % kFours + (token - max(start, first)) * kFours;
    }
    __device__ void move(int tokens) {
        if (turns) place += tokens * Table<D, kSteps>::kFours;
    }
    // By the addition theorem; no more than kSteps - 1 tokens after the first.
    __device__ void at(float (&c)[kAngles], float (&s)[kAngles]) const {
        float cosine[kAngles], sine[kAngles], by_cosine[kAngles], by_sine[kAngles];
        unpack_four(cosine, (&table.cosine[0][0])[origin]);
        unpack_four(sine, (&table.sine[0][0])[origin]);
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
__device__ void turn_row(Row& y, const Args& a, const Columns<D>& columns, const T& turns) {
    if (a.normalise) {
        const float squares = product_of_head<D / 8>(y, y, kWholeWarp);
        const float r = columns.turns ? inverse_rms_of_head<D>(squares, a.eps) : 1.f;
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) y[e] *= r;
    }
    float cosine[kAngles], sine[kAngles];
    turns.at(cosine, sine);
    turn(y, cosine, sine);
}

template <int D>
struct ForwardMemory {
    Table<D, kForwardRun> table;
    Ring<kForwardDepth> x;
};

// One thread's rows of x, from its run's first on.
template <int D>
struct ForwardStream {
    Rows<D> in;
    Ring<kForwardDepth>& ring;
    int next, stop;  // the next token to be sent for, and where the run ends
    __device__ void send(unsigned slot) {
        in.send(ring[slot][threadIdx.y * kLanes + threadIdx.x], next, next < stop);
        cp_async_commit();
        ++next;
    }
};

// before: the rows before the run, 0 where its sequence does not have them; kTurned: some of the block's channels are.
template <int D, bool kTurned>
__device__ void forward_run(const Row (&w)[kTaps], const uint4 (&before)[kAfter], const Args& a,
                            const Columns<D>& columns, const Table<D, kForwardRun>& table, ForwardStream<D>& stream,
                            int start) {
    nv_bf16* out = a.out + columns.first;
    const int thread = threadIdx.y * kLanes + threadIdx.x;
    Row window[kTaps];  // once shifted, window[o] is the row o tokens before the next one
#pragma unroll
    for (int o = 1; o < kTaps; ++o) unpack(window[o], before[o - 1]);
    const int known = min(start, a.tokens - 1), first = a.seq.first(known);
    int boundary = a.seq.last(known);  // where the next sequence begins
    Turn<D, kForwardRun> turns(table, columns);
    if (kTurned) turns.begin(start, start, first);

    const auto take_token = [&](int i, unsigned slot, bool written) {
        stream.send((slot + kForwardDepth - 1) % kForwardDepth);  // where the token before was: it has been used
        wait_for_rows<kForwardDepth - 1>();
        unpack(window[0], stream.ring[slot][thread]);
        Row y;
        weighted_sum(y, window, w);
        if (kTurned) turn_row(y, a, columns, turns);
        turns.move(1);
        if (written) store_row<D>(out, i, a.ld_out, y);
        shift(window);
    };
    for (int step = 0; step < kForwardRun; step += kStep) {  // known to be the same for all threads of a warp
        const int i0 = start + step;
        const unsigned slot = unsigned(step) % kForwardDepth;
        if (__all_sync(kWholeWarp, i0 + kStep <= min(boundary, a.tokens))) {
#pragma unroll
            for (int s = 0; s < kStep; ++s) take_token(i0 + s, slot + s, columns.inside);
            continue;
        }
#pragma unroll
        for (int s = 0; s < kStep; ++s) {
            const int i = i0 + s;
            if (i == boundary && i < a.tokens) {
                clear(window);
                boundary = a.seq.last(i);
                if (kTurned) turns.begin(i, start, i);
            }
            take_token(i, slot + s, columns.inside && i < a.tokens);
        }
    }
}

template <int D>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void forward_kernel(const Args a) {
    __shared__ ForwardMemory<D> shared;
    __shared__ Weights weights;
    const Place at(a.channels);
    weights.send(a.w, a.channels, at.first_channel);
    const int start = (at.token_block * kRuns + threadIdx.y) * kForwardRun;
    const Columns<D> columns(a, at.first_channel);
    ForwardStream<D> stream{{a.in + columns.first, a.ld_in}, shared.x, start, min(start + kForwardRun, a.tokens)};
#pragma unroll
    for (int s = 0; s < kForwardDepth - 1; ++s) stream.send(s);
    uint4 before[kAfter];
    const int first = a.seq.first(min(start, a.tokens - 1));
#pragma unroll
    for (int o = 1; o < kTaps; ++o) {
        const bool wanted = start < a.tokens && start - o >= first;
        before[o - 1] = wanted ? stream.in.load(start - o) : uint4{0, 0, 0, 0};
    }
    if (at.first_channel < a.turned) shared.table.fill(a, at.token_block, kForwardRun);
    wait_for_rows<kForwardDepth - 2>();  // for the first one, and with it the weights
    __syncthreads();
    Row w[kTaps];
    weights.read(w, columns.own);
    if (at.first_channel < a.turned)
        forward_run<D, true>(w, before, a, columns, shared.table, stream, start);
    else
        forward_run<D, false>(w, before, a, columns, shared.table, stream, start);
    wait_for_rows<0>();
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
                              const Columns<D>& columns, const T& turns) {
    float cosine[kAngles], sine[kAngles];
    turns.at(cosine, sine);
    turn_back(g, cosine, sine);
    if (!a.normalise) return;
    Row m;
    if (distance >= kAfter)
        convolve(m, x, kAfter, w);
    else
        convolve(m, x, distance, w);
    const float squares = product_of_head<D / 8>(m, m, kWholeWarp);
    const float along = product_of_head<D / 8>(g, m, kWholeWarp);
    const float r = columns.turns ? inverse_rms_of_head<D>(squares, a.eps) : 1.f;
    normalise_back<D>(g, m, r, columns.turns ? along : 0.f);
}

template <int D>
struct BackwardMemory {
    Table<D, kBackwardRun + kAfter> table;
    Ring<kBackwardDepth<D>> dy, x;
};

// One thread's rows of dy, from the last token after its run on back to the run's first, and those of x as far before
// them as they are needed.
template <int D>
struct BackwardStream {
    Rows<D> dy, x;
    BackwardMemory<D>& shared;
    int start, tokens;
    template <int kBefore>
    __device__ void send(unsigned slot, int token) const {
        const int thread = threadIdx.y * kLanes + threadIdx.x;
        dy.send(shared.dy[slot][thread], token, token >= start && token < tokens);
        x.send(shared.x[slot][thread], token - kBefore, token >= max(start, kBefore) && token - kBefore < tokens);
        cp_async_commit();
    }
};

// One thread's share of backward: dx of its run, and its run's terms of dw. All rows but one that the ring has room for
// have been sent for. newest: the last rows of x, that of the last token after the run first.
template <int D, bool kTurned>
__device__ void backward_run(Row (&dw)[kTaps], const Row (&w)[kTaps], const uint4 (&newest)[kAfter], const Args& a,
                             const Columns<D>& columns, const BackwardStream<D>& stream, int start) {
    constexpr int kSteps = kBackwardRun + kAfter;
    constexpr unsigned kDepth = kBackwardDepth<D>;
    constexpr int kBefore = kTurned ? kAfter : 0;  // rows of x before a token that are needed with it
    const int thread = threadIdx.y * kLanes + threadIdx.x;
    const int stop = min(start + kBackwardRun, a.tokens);
    int i = start + kSteps - 1;
    Row window[kTaps], before[kTaps];  // window[o]: dm o tokens after the one at hand; before[o]: x o tokens before it
    clear(window);
#pragma unroll
    for (int o = 0; o < kBefore; ++o) unpack(before[o], newest[o]);
    int first = a.seq.first(stop - 1);
    Turn<D, kSteps> turns(stream.shared.table, columns);
    if (kTurned) turns.begin(i, start, first);

    const auto take_token = [&](auto after_run, unsigned slot) {
        // To where the token before was: it has been used.
        stream.template send<kBefore>((slot + kDepth - 1) % kDepth, i - int(kDepth - 1));
        wait_for_rows<kDepth - 1>();
        unpack(window[0], stream.shared.dy[slot][thread]);
        unpack(before[kBefore], stream.shared.x[slot][thread]);
        if (i < first) {  // i is the last token of the sequence before
            clear(window);
            first = a.seq.first(i);
            if (kTurned) turns.begin(i, start, first);
        }
        if (kTurned) turn_gradient(window[0], before, i - first, w, a, columns, turns);
        turns.move(-1);
        // Tokens of another sequence than the run's last, or beyond the last of all, have no part in the run.
        if (i >= a.tokens || (after_run.value && i >= a.seq.last(start + kBackwardRun - 1))) {
            clear_row(window[0]);
        } else if (!after_run.value) {
            Row row;
            weighted_sum(row, window, w);
            if (columns.inside) store_row<D>(a.out + columns.first, i, a.ld_out, row);
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
    for (unsigned s = 0; s < kAfter; ++s) take_token(std::true_type{}, s);
    for (unsigned step = kAfter; step < kSteps; step += kStep) {  // known to be the same for all threads of a warp
#pragma unroll
        for (unsigned s = 0; s < kStep; ++s) take_token(std::false_type{}, (step + s) % kDepth);
    }
}

template <int D>
__global__ __launch_bounds__(kThreads, kBackwardBlocks<D>) void backward_kernel(const Args a) {
    __shared__ union Memory {
        BackwardMemory<D> rows;
        Sums sums;
        __device__ Memory() {}
    } shared;
    __shared__ Weights weights;
    const Place at(a.channels);
    weights.send(a.w, a.channels, at.first_channel);
    const int start = (at.token_block * kRuns + threadIdx.y) * kBackwardRun;
    const int last = start + kBackwardRun + kAfter - 1;
    const Columns<D> columns(a, at.first_channel);
    const bool turned = at.first_channel < a.turned;
    const BackwardStream<D> stream{
        {a.in + columns.first, a.ld_in}, {a.x + columns.first, a.ld_x}, shared.rows, start, a.tokens};
#pragma unroll
    for (int s = 0; s < kBackwardDepth<D> - 1; ++s) {
        if (turned)
            stream.template send<kAfter>(s, last - s);
        else
            stream.template send<0>(s, last - s);
    }
    uint4 newest[kAfter];
#pragma unroll
    for (int o = 0; o < kAfter; ++o)
        newest[o] = turned && last - o < a.tokens ? stream.x.load(last - o) : uint4{0, 0, 0, 0};
    if (turned) shared.rows.table.fill(a, at.token_block, kBackwardRun);
    wait_for_rows<kBackwardDepth<D> - 2>();  // for the first ones, and with them the weights
    __syncthreads();
    Row w[kTaps], dw[kTaps] = {};
    weights.read(w, columns.own);
    if (turned)
        backward_run<D, true>(dw, w, newest, a, columns, stream, start);
    else
        backward_run<D, false>(dw, w, newest, a, columns, stream, start);
    wait_for_rows<0>();
    __syncthreads();  // table and rows have been read
    store_partial(shared.sums, dw, a.partial, a.channels, Place(a.channels), columns.own);
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
