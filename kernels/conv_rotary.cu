// kernels/conv_rotary.cu: convolution, per-head norm and rotation in one pass (see conv_rotary.h, conv_taps.cuh).
//
// A thread owns 4 neighbouring channels of the lower half of a head and the 4 of the upper half that turn with them: D / 8
// neighbouring threads share a head. It walks a run of tokens, forward in time for y; backward for dx and dw, with a
// window of dm, and one of x, from which m is computed again. The three tokens after a run are walked as well: its dx
// needs their dm.
//
// Turned channels take twice the instructions of others, and blocks that start late leave multiprocessors idle at the end:
// where it pays, each block does a long run of turned channels and a short one of others, and all blocks run at once.
//
// All threads of a warp take every step of their runs, though there be no token or no channel: the sums over heads need
// them. Rows are then 0, columns those of the block's first head, and nothing is written. Steps of four tokens near which
// no sequence begins, in both runs of the warp, are taken without asking at each token.
//
// Backward a thread holds 128 numbers from token to token, and all else has to do with 40 registers: addresses, and what
// only steps near the ends of sequences need, are not kept in them.
#include "kernels/conv_rotary.h"

#include <algorithm>
#include <cstddef>

#include "kernels/conv_rotary_rows.cuh"
#include "kernels/dynamic_shared.cuh"

namespace fiedler {
namespace {

using namespace turned_rows;
constexpr int kForwardRun = 16;  // tokens of a run
// Backward a run is one part or two, of which the last may have no tokens.
constexpr int kBackwardPart = kConvRotaryBlockTokens / kRuns, kMaxParts = 2;
constexpr int kAfter = kTaps - 1;  // tokens after a run, whose dm its dx needs
constexpr int kStep = 4;           // tokens after which the windows are as before
constexpr int kPair = 2;  // rows that are turned together, forward: their sums over heads do not wait for each other
// Rows on their way, and the one at hand. Backward fewer: what is on its way has lines of the L1 cache too, of which
// shared memory leaves little.
constexpr int kForwardDepth = 8, kBackwardDepth = 4;
// Blocks that fit on a multiprocessor: the bound on registers. Where it is two, with three of them some would spill; how
// close it is depends on the architecture.
constexpr int kForwardBlocks = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBackwardBlocks = 3;
#else
constexpr int kBackwardBlocks = 2;
#endif
static_assert(kForwardRun % kStep == 0 && kBackwardPart % kStep == 0 && kStep % kTaps == 0);
static_assert(kForwardDepth % kStep == 0 && kStep % kPair == 0);
constexpr unsigned kWholeWarp = 0xffffffffu;

// As rsqrtf, without its care for numbers below 2^-126.
__device__ float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Norm and rotation of N rows of m that follow one another, in place; turns: at the first, then at the one after the last.
template <int D, int N, class T>
__device__ void turn_rows(Row (&y)[N], const Args& a, const Columns<D>& columns, T& turns) {
    if (a.normalise) {
        float squares[N] = {};
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < kPackSize; ++e) squares[n] = fmaf(y[n][e], y[n][e], squares[n]);
#pragma unroll
        for (int step = D / 16; step > 0; step /= 2)  // all at once: none waits for another
#pragma unroll
            for (int n = 0; n < N; ++n) squares[n] += __shfl_xor_sync(kWholeWarp, squares[n], step);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const float r = columns.turns ? inverse_root(fmaf(squares[n], 1.f / D, a.eps)) : 1.f;
#pragma unroll
            for (int e = 0; e < kPackSize; ++e) y[n][e] *= r;
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float cosine[kAngles], sine[kAngles];
        turns.at(cosine, sine);
        turn(y[n], cosine, sine);
        turns.move(1);
    }
}

template <int D>
struct ForwardMemory {
    Ring<kForwardDepth> x;
    Weights weights;
    Table<D, kForwardRun> table;
    static constexpr std::size_t bytes() { return offsetof(ForwardMemory, table) + Table<D, kForwardRun>::bytes(1); }
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
    const int thread = threadIdx.y * kLanes + threadIdx.x;
    Row window[kTaps];  // once shifted, window[o] is the row o tokens before the next one
#pragma unroll
    for (int o = 1; o < kTaps; ++o) unpack(window[o], before[o - 1]);
    const int known = min(start, a.tokens - 1), first = a.seq.first(known);
    int boundary = a.seq.last(known);  // where the next sequence begins
    KeptTurn<D, kForwardRun> turns(table, columns);
    if (kTurned) turns.begin(start, threadIdx.y, start, first);

    const Rows<D> out{a.out, a.ld_out, columns.first};
    // Asks for kPair more rows, where those before were, which have been used; then those of `slot` are there.
    const auto advance = [&](unsigned slot) {
#pragma unroll
        for (int s = 0; s < kPair; ++s) stream.send((slot + kForwardDepth - kPair + s) % kForwardDepth);
        wait_for_rows<kForwardDepth - kPair>();
    };
    const auto convolve_next = [&](Row& y, unsigned slot) {
        unpack(window[0], stream.ring[slot][thread]);
        weighted_sum(y, window, w);
        shift(window);
    };
#pragma unroll 1
    for (int step = 0; step < kForwardRun; step += kStep) {
        const int i0 = start + step;
        const unsigned slot = unsigned(step) % kForwardDepth;
        // Known to be the same for all threads of a warp.
        if (__all_sync(kWholeWarp, i0 + kStep <= min(boundary, a.tokens))) {
#pragma unroll
            for (int s = 0; s < kStep; s += kPair) {
                Row y[kPair];
                advance(slot + s);
#pragma unroll
                for (int k = 0; k < kPair; ++k) convolve_next(y[k], slot + s + k);
                if (kTurned) turn_rows(y, a, columns, turns);
#pragma unroll
                for (int k = 0; k < kPair; ++k) out.store_if(columns.inside, i0 + s + k, y[k]);
            }
            continue;
        }
#pragma unroll 1
        for (int s = 0; s < kStep; ++s) {
            const int i = i0 + s;
            if (i == boundary && i < a.tokens) {
                clear(window);
                boundary = a.seq.last(i);
                if (kTurned) turns.begin(i, threadIdx.y, start, i);
            }
            if (s % kPair == 0) advance(slot + s);
            Row y[1];
            convolve_next(y[0], slot + s);
            if (kTurned) turn_rows(y, a, columns, turns);
            out.store_if(columns.inside && i < a.tokens, i, y[0]);
        }
    }
}

template <int D>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void forward_kernel(const Args a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<ForwardMemory<D>*>(memory);
    const Place at(a.channels);
    shared.weights.send(a.w, a.channels, at.first_channel);
    const int start = (at.token_block * kRuns + threadIdx.y) * kForwardRun;
    const Columns<D> columns(a, at.first_channel);
    ForwardStream<D> stream{{a.in, a.ld_in, columns.first}, shared.x, start, min(start + kForwardRun, a.tokens)};
#pragma unroll
    for (int s = 0; s < kForwardDepth - kPair; ++s) stream.send(s);
    uint4 before[kAfter];
    const int first = a.seq.first(min(start, a.tokens - 1));
#pragma unroll
    for (int o = 1; o < kTaps; ++o) {
        const bool wanted = start < a.tokens && start - o >= first;
        before[o - 1] = wanted ? stream.in.load(start - o) : uint4{0, 0, 0, 0};
    }
    if (at.first_channel < a.turned) shared.table.fill(a, at.token_block, kForwardRun);
    wait_for_rows<kForwardDepth - kPair - 1>();  // for the first one, and with it the weights
    __syncthreads();
    Row w[kTaps];
    shared.weights.read(w, columns.own);
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

// A thread's piece of a row, from its place in a ring.
__device__ inline void load_row(Row& row, unsigned from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    unpack(row, v);
}

// From the gradient of a row of y to that of m, in place; x and distance: as in convolve. The first row before the token
// is read here, from a ring: until then the angles need the registers.
template <int D, bool kNormalise, class T>
__device__ void turn_gradient(Row& g, Row (&x)[kTaps], unsigned from, int distance, const Row (&w)[kTaps],
                              const Args& a, const T& turns) {
    float cosine[kAngles], sine[kAngles];
    turns.at(cosine, sine);
    turn_back(g, cosine, sine);
    load_row(x[kAfter], from);
    if (!kNormalise) return;
    Row m;
    if (distance >= kAfter)
        convolve(m, x, kAfter, w);
    else
        convolve(m, x, distance, w);
    float squares = 0.f, along = 0.f;
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) squares = fmaf(m[e], m[e], squares), along = fmaf(g[e], m[e], along);
#pragma unroll
    for (int step = D / 16; step > 0; step /= 2) {  // both at once: neither waits for the other
        const float s = __shfl_xor_sync(kWholeWarp, squares, step), t = __shfl_xor_sync(kWholeWarp, along, step);
        squares += s, along += t;
    }
    const float r = turns.row > 0 ? inverse_root(fmaf(squares, 1.f / D, a.eps)) : 1.f;
    normalise_back<D>(g, m, r, turns.row > 0 ? along : 0.f);
}

template <int D>
struct BackwardMemory {
    Ring<kBackwardDepth> dy, x;
    // Of each thread: where its run begins and the part at hand does, where the sequence of the token at hand does, and where
    // that of the run's last token ends.
    volatile int start[kThreads], part[kThreads], first[kThreads], end[kThreads];
    Weights weights;
    Table<D, kBackwardPart + kAfter> table;
    static constexpr std::size_t bytes(int parts) {
        return offsetof(BackwardMemory, table) + Table<D, kBackwardPart + kAfter>::bytes(parts);
    }
};

// One thread's rows of dy, from the last token after its run on back to the run's first, and those of x as far before
// them as they are needed. The ring begins with the run: its last places are those of the tokens after it.
template <int D, int kBefore>
struct BackwardStream {
    static constexpr int kDepth = kBackwardDepth, kAhead = kDepth - 1;
    static constexpr unsigned kPlace = kThreads * sizeof(uint4),
                              kX = kDepth * kPlace;  // from a row to the next; to x's
    Rows<D> dy, x;
    BackwardMemory<D>& shared;
    int start, length, tokens;

    __device__ static int thread() { return threadIdx.y * kLanes + threadIdx.x; }
    __device__ void send(int slot, int token, int first) const {
        dy.send(shared.dy[slot][thread()], token, token >= first && token < tokens);
        x.send(shared.x[slot][thread()], token - kBefore, token >= max(first, kBefore) && token - kBefore < tokens);
        cp_async_commit();
    }
    // What is on its way when the walk begins.
    __device__ void begin() const {
        const int after = start + length + kAfter - 1;
#pragma unroll
        for (int s = 0; s < kAhead; ++s) send((kDepth - kAfter + s) % kDepth, after - s, start);
    }
    // At `token` in place `slot`: sends to where the token before was, which has been used, and waits for this one's rows.
    __device__ void advance(int slot, int token) const {
        send((slot + kAhead) % kDepth, token - kAhead, shared.start[thread()]);
        wait_for_rows<kAhead>();
    }
    // The same where the token exists and `left` are before it in the run; `to`: where the token before was, for dy. What
    // is not wanted is not read either.
    __device__ void advance_inside(unsigned to, int left, int token) const {
        dy.send_if(left >= kAhead, to, token - kAhead);
        x.send_if(left >= kAhead && token >= kAhead + kBefore, to + kX, token - kAhead - kBefore);
        cp_async_commit();
        wait_for_rows<kAhead>();
    }
};

// One thread's share of backward: dx of its run, and its run's terms of dw.
template <int D, bool kTurned, bool kNormalise>
struct BackwardWalk {
    static constexpr int kSteps = kBackwardPart + kAfter;
    static constexpr int kBefore = kTurned ? kAfter : 0;  // rows of x before a token that are needed with it
    using Stream = BackwardStream<D, kBefore>;
    static constexpr int kDepth = Stream::kDepth, kAhead = Stream::kAhead;
    static constexpr unsigned kPlace = Stream::kPlace;

    const Args& a;
    const Columns<D>& columns;
    const Stream& stream;
    const Row (&w)[kTaps];
    Row (&dw)[kTaps];
    Row window[kTaps], before[kTaps];  // window[o]: dm o tokens after the one at hand; before[o]: x o tokens before it
    Turn<D, kSteps> turns;
    unsigned ring;  // the thread's first place, of dy
    int i;          // the token

    // newest: the last rows of x, that of the last token after the run first.
    __device__ BackwardWalk(Row (&sums)[kTaps], const Row (&weights)[kTaps], const uint4 (&newest)[kAfter],
                            const Args& args, const Columns<D>& own, const Stream& rows)
        : a(args), columns(own), stream(rows), w(weights), dw(sums), turns(rows.shared.table, own) {
        const int last = min(rows.start + rows.length, a.tokens) - 1, me = Stream::thread();
        rows.shared.start[me] = rows.start;
        rows.shared.part[me] = rows.start + rows.length - kBackwardPart;
        ring = shared_address(&stream.shared.dy[0][Stream::thread()]);
        i = rows.start + rows.length + kAfter - 1;
        const int first = a.seq.first(last);
        rows.shared.first[me] = first, rows.shared.end[me] = a.seq.last(last);
        clear(window);
#pragma unroll
        for (int o = 0; o < kBefore; ++o) unpack(before[o], newest[o]);
        begin_turns(parts_of(a, kTurned) - 1, first);
    }
    // first: of the sequence of the token at hand.
    __device__ void begin_turns(int part, int first) {
        if (kTurned) turns.begin(i, threadIdx.y * a.parts + part, stream.shared.part[Stream::thread()], first);
    }
    __device__ void write() {
        Row row;
        weighted_sum(row, window, w);
        Rows<D>{a.out, a.ld_out, columns.first}.store_if(columns.inside, i, row);
        add_terms(dw, before[0], window);
    }
    __device__ void next() {
        turns.move(-1);
        shift(window);
#pragma unroll
        for (int o = 0; o < kBefore; ++o)
#pragma unroll
            for (int e = 0; e < kPackSize; ++e) before[o][e] = before[o + 1][e];
        --i;
    }
    // kCount tokens from that of place `slot` on, with `left` before it in the run.
    template <bool kAfterRun, int kCount>
    __device__ void take(int slot, int left) {
        // All of one sequence, as are the three before them. Known to be the same for all threads of a warp, whose sums
        // over heads need one another.
        if (__all_sync(kWholeWarp, i - (kCount - 1) - kAfter >= stream.shared.first[Stream::thread()] &&
                                       i < (kAfterRun ? int(stream.shared.end[Stream::thread()]) : a.tokens))) {
            const unsigned here = ring + unsigned(slot) * kPlace;
            const unsigned last = ring + unsigned(slot + kAhead) % kDepth * kPlace;
#pragma unroll
            for (int s = 0; s < kCount; ++s) {
                stream.advance_inside(s == 0 ? last : here + (s - 1) * kPlace, left - s, i);
                load_row(window[0], here + s * kPlace);
                if constexpr (kTurned)
                    turn_gradient<D, kNormalise>(window[0], before, here + s * kPlace + Stream::kX, kAfter, w, a,
                                                 turns);
                else
                    load_row(before[kBefore], here + s * kPlace + Stream::kX);
                if (!kAfterRun) write();
                next();
            }
            return;
        }
#pragma unroll 1
        for (int s = 0; s < kCount; ++s) {
            const int me = Stream::thread();
            stream.advance(slot + s, i);
            unpack(window[0], stream.shared.dy[slot + s][me]);
            unpack(before[kBefore], stream.shared.x[slot + s][me]);
            int first = stream.shared.first[me];
            if (i < first) {  // i is the last token of the sequence before
                clear(window);
                first = a.seq.first(i);
                stream.shared.first[me] = first;
                begin_turns((stream.shared.part[me] - stream.shared.start[me]) / kBackwardPart, first);
            }
            if constexpr (kTurned)
                turn_gradient<D, kNormalise>(window[0], before, ring + (slot + s) * kPlace + Stream::kX, i - first, w,
                                             a, turns);
            // Tokens of another sequence than the run's last, or beyond the last of all, have no part in the run.
            if (i >= (kAfterRun ? int(stream.shared.end[me]) : a.tokens))
                clear_row(window[0]);
            else if (!kAfterRun)
                write();
            next();
        }
    }
    __device__ void all() {
        const int all = parts_of(a, kTurned) * kBackwardPart;
        take<true, kAfter>(kDepth - kAfter, all + kAfter - 1);
#pragma unroll 1
        for (int left = all - 1; left >= 0; left -= kStep) {  // tokens before the step's first in the run
            if (kTurned && left == kBackwardPart - 1) begin_first_part();
            take<false, kStep>(unsigned(kBackwardPart - 1 - left) % kDepth, left);
        }
    }

  private:
    __device__ void begin_first_part() {
        const int me = Stream::thread();
        stream.shared.part[me] = stream.shared.start[me];
        begin_turns(0, stream.shared.first[me]);
    }
};

// kJob: see place_of.
template <int D, bool kNormalise, int kJob>
__device__ void backward_job(const Args& a, BackwardMemory<D>& shared) {
    const Place at = place_of(a, kJob);
    const bool turned = kJob == 0 && at.first_channel < a.turned;
    const int run = parts_of(a, turned) * kBackwardPart, start = (at.token_block * kRuns + threadIdx.y) * run;
    shared.weights.send(a.w, a.channels, at.first_channel);
    const Columns<D> columns(a, at.first_channel);
    const BackwardStream<D, kAfter> rows_of_turned{
        {a.in, a.ld_in, columns.first}, {a.x, a.ld_x, columns.first}, shared, start, run, a.tokens};
    const BackwardStream<D, 0> stream{rows_of_turned.dy, rows_of_turned.x, shared, start, run, a.tokens};
    if (turned)
        rows_of_turned.begin();
    else
        stream.begin();
    uint4 newest[kAfter];
#pragma unroll
    for (int o = 0; o < kAfter; ++o) {
        const int row = start + run + kAfter - 1 - o;
        newest[o] = turned && row < a.tokens ? rows_of_turned.x.load(row) : uint4{0, 0, 0, 0};
    }
    if (turned) shared.table.fill(a, at.token_block, kBackwardPart);
    wait_for_rows<kBackwardDepth - 2>();  // for the first ones, and with them the weights
    __syncthreads();
    Row w[kTaps], dw[kTaps] = {};
    shared.weights.read(w, columns.own);
    if (turned)
        BackwardWalk<D, true, kNormalise>(dw, w, newest, a, columns, rows_of_turned).all();
    else
        BackwardWalk<D, false, false>(dw, w, newest, a, columns, stream).all();
    wait_for_rows<0>();
    __syncthreads();  // table and rows have been read
    const Place place = place_of(a, kJob);
    // With two jobs, turned channels and others have sums of their own.
    const int first_of_job = kJob == 1 ? a.turned : 0, end_of_job = a.parts == 2 && kJob == 0 ? a.turned : a.channels;
    Sums& sums = *reinterpret_cast<Sums*>(&shared);
    put_sums(sums, dw, columns.own);
    store_sums(sums, a.partial[kJob], end_of_job - first_of_job,
               Place(place.token_block, place.first_channel - first_of_job));
}

// Whether a block of two jobs has this one: the last ones may not.
__device__ inline bool has_place(const Args& a, int job) {
    return place_of(a, job).token_block * kRuns * kBackwardPart * (job == 0 ? 2 : 1) < a.tokens;
}

template <int D, bool kNormalise>
__global__ __launch_bounds__(kThreads, kBackwardBlocks) void backward_kernel(const Args a) {
    dependents_may_start();
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<BackwardMemory<D>*>(memory);
    if (a.parts == 2) {
        if (has_place(a, 1)) backward_job<D, kNormalise, 1>(a, shared);
        __syncthreads();  // its sums have been read
        if (!has_place(a, 0)) return;
    }
    backward_job<D, kNormalise, 0>(a, shared);
}

// How a launch of the backward pass is cut.
struct Cut {
    int parts;  // of a run of turned channels, and jobs of a block (see place_of)
    unsigned blocks;
};
// Blocks come in waves of as many as run at a time, and a wave takes as long as its runs and what each begins with. On an
// H200 one wave of blocks with two jobs is the best for 32,768 tokens; elsewhere the shared memory of two parts may cost a
// block its room.
Cut cut_for(const Cuda& dev, std::int64_t tokens, std::int64_t channels, std::int64_t turned) {
    constexpr int kWave = 132 * 3, kBeginning = 10;  // kBackwardBlocks on an H200; in tokens
    const std::int64_t others = channels - turned;
    const Cut one{1, grid_for(tokens, channels, kBackwardPart)};
    if (dev.arch != 90 || turned != 2 * others || others == 0 || others % kBlockChannels != 0) return one;
    const Cut two{2, std::max(grid_for(tokens, turned, 2 * kBackwardPart), grid_for(tokens, others, kBackwardPart))};
    const auto cost = [&](const Cut& cut) {
        const int runs = cut.parts == 1 ? 1 : 3;  // parts that a block walks
        return ceil_div(int(cut.blocks), kWave) * (runs * kBackwardPart + cut.parts * kBeginning);
    };
    return cost(two) < cost(one) ? two : one;
}
template <class T>
int row_bytes(const Mat<T>& m) {
    return int(m.ld * std::int64_t(sizeof(T)));
}
template <class P>
Args common_args(const P& p) {
    const std::int64_t width = p.x.cols / p.heads;
    Args a{};
    a.x = nv(p.x.data), a.ld_x = row_bytes(p.x), a.w = p.w.data;
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
        args.out = nv(p.y.data), args.ld_out = row_bytes(p.y);
        args.in = args.x, args.ld_in = args.ld_x;
        args.parts = 1;
        forward_kernel<D><<<grid_for(p.x.rows, p.x.cols, kForwardRun), dim3(kLanes, kRuns), ForwardMemory<D>::bytes(),
                            stream_of(dev)>>>(args);
        LAUNCH_CHECK("conv_rotary_forward");
    });
}

void conv_rotary_backward(const Cuda& dev, const ConvRotaryBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("conv_rotary", is_aligned16(p.x) && is_aligned16(p.dy) && is_aligned16(p.dx));
    for_width("conv_rotary", p.x.cols / p.heads, [&](auto d) {
        constexpr int D = decltype(d)::value;
        if (p.x.rows == 0) return;
        FIEDLER_REQUIRE("conv_rotary", p.pending || p.scratch.size >= conv_rotary_pending_elements(p.x.rows, p.x.cols));
        PendingSums<float> own(p.scratch);
        PendingSums<float>& sums = p.pending ? *p.pending : own;
        Args args = common_args(p);
        args.out = nv(p.dx.data), args.ld_out = row_bytes(p.dx);
        args.in = nv(p.dy.data), args.ld_in = row_bytes(p.dy);
        const Cut cut = cut_for(dev, p.x.rows, p.x.cols, args.turned);
        args.parts = cut.parts;
        // Sums of channels [first, first + count), of runs of `run` tokens.
        const auto add_sums = [&](std::int64_t first, std::int64_t count, int run) {
            const std::int64_t rows = token_blocks(p.x.rows, run), columns = count * kTaps;
            float* const partial = sums.take(rows * columns).data;
            sums.add({p.dw.data + first * kTaps, partial, columns, 1, std::int32_t(rows), std::int32_t(columns)});
            return partial;
        };
        if (cut.parts == 1) {
            args.partial[0] = args.partial[1] = add_sums(0, p.x.cols, kBackwardPart);
        } else {
            args.partial[0] = add_sums(0, args.turned, 2 * kBackwardPart);
            args.partial[1] = add_sums(args.turned, p.x.cols - args.turned, kBackwardPart);
        }
        using Memory = BackwardMemory<D>;
        const auto kernel = p.normalise ? backward_kernel<D, true> : backward_kernel<D, false>;
        allow_shared<Memory::bytes(kMaxParts)>(kernel);
        kernel<<<cut.blocks, dim3(kLanes, kRuns), Memory::bytes(args.parts), stream_of(dev)>>>(args);
        LAUNCH_CHECK("conv_rotary_backward");
        if (!p.pending) finish_sums(dev, own);
    });
}

}  // namespace fiedler
