// kernels/coordinate.cu: coordinate scalars on the GPU (contract in coordinate.h).
//
// A thread owns one column, or two or four neighbouring ones where the layout allows it, and a run of neighbouring tokens:
// every value is read from memory about once. A block is as many columns wide as there are, and as many runs high as fit.
// Forward, all of a run is held in registers, with the three tokens before it. What is read does not wait for where the
// sequence begins or ends, which in ragged batches is itself in memory; runs that lie within one ask no more.
//
// Backward a thread walks its run from the last token to the first, as in conv.cu: the three tokens after the one at hand
// are in registers, those before it on their way to shared memory, each thread's to places of its own.
//
// With few scalars, launching takes longer than the rest: all kernels here start while the one before them ends.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/coordinate.h"
#include "kernels/dependent_launch.cuh"
#include "kernels/mma.cuh"

namespace fiedler {

namespace {
constexpr int kTaps = 4, kReach = kTaps - 1;
// Tokens of a run, forward: long runs where there are threads enough; they read fewer values twice. Where rows are shorter
// than a line of the cache, of 128 bytes, one: what neighbouring threads have to do with then lies side by side.
constexpr int kLongRun = 8, kShortRun = 4, kNarrow = 128 / int(sizeof(float));
constexpr int kThreadsEnough = 128 * 1024;
constexpr int kForwardThreads = 256, kBackwardThreads = kCoordinateColumns;
constexpr int kSums = kTaps + 1;    // of a column: dw_0 .. dw_3, dlog_temp
constexpr int kBackwardBlocks = 2;  // that fit on a multiprocessor: the bound on registers
// Backward: rows on their way, and the one at hand; and rows of a step, after which the window is as before.
// One column's are few bytes: more of them.
constexpr int kStep = kTaps;
template <int W>
constexpr int kDepth = W == 1 ? 2 * kStep : kStep;
static_assert(kTaps == 4, "coordinate_pending_elements");

struct Layout {
    dim3 block;
    unsigned column_blocks, run_blocks;
};
// For threads of `width` columns and `run` tokens.
Layout layout_of(std::int64_t tokens, std::int64_t columns, int width, int run, unsigned threads) {
    Layout l;
    l.block.x = static_cast<unsigned>(std::min(columns / width, std::int64_t(threads)));
    l.block.y = threads / l.block.x;
    l.column_blocks = static_cast<unsigned>(ceil_div(columns / width, std::int64_t(l.block.x)));
    l.run_blocks = static_cast<unsigned>(ceil_div(tokens, std::int64_t(l.block.y) * run));
    return l;
}

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
// For what is not read again in this step.
__device__ inline std::uint64_t leaves_cache_first() {
    std::uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
    return policy;
}
// Into shared memory, later; zeros if not wanted.
template <int W>
__device__ inline void send(Values<W>& to, const float* from, bool wanted, std::uint64_t policy) {
    const int bytes = wanted ? 4 * W : 0;
    if constexpr (W == 4)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared_address(&to)),
                     "l"(from), "r"(bytes), "l"(policy)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3, %4;\n" ::"r"(shared_address(&to)),
                     "l"(from), "n"(4 * W), "r"(bytes), "l"(policy)
                     : "memory");
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

// s[n]: token begin - kReach + n. kWithin: all of them are of the first token's sequence.
template <bool kConvolution, int W, int kRun, bool kWithin>
__device__ inline void forward_run(const Packed& seq, const Values<W> (&s)[kRun + kReach],
                                   const Columns<kConvolution, W>& columns, int begin, int first, int last, float* out,
                                   std::int64_t ld) {
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        const int token = begin + n;
        if (!kWithin && token >= seq.tokens) return;
        if (!kWithin && kConvolution && token == last) {  // the run enters the next sequence
            first = token;
            last = seq.last(token);
        }
        Values<W> lam;
#pragma unroll
        for (int c = 0; c < W; ++c) {
            lam.v[c] = s[n + kReach].v[c];
            if (kConvolution) {
                lam.v[c] *= columns.w[c][kReach];
#pragma unroll
                for (int k = 0; k < kReach; ++k)
                    if (kWithin || token - kReach + k >= first)
                        lam.v[c] = fmaf(columns.w[c][k], s[n + k].v[c], lam.v[c]);
            }
            lam.v[c] *= columns.scale[c];
        }
        store(out + n * ld, lam);
    }
}

// In short runs addresses are worked out while the kernel before ends, and heads are found by multiplication. Long ones are
// faster, on an H200, with all that after the wait, and with divisions.
template <bool kConvolution, int W, int kRun>
__global__ void __launch_bounds__(kForwardThreads) coordinate_forward_kernel(CoordinateForward<float> p, Heads heads) {
    constexpr bool kLong = kRun == kLongRun;
    dependents_may_start();
    if (kLong) wait_for_previous();
    const int all = static_cast<int>(p.s.cols), half = all / 2, tokens = p.seq.tokens;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    const std::int64_t start = (std::int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kRun;
    if (column >= all || start >= tokens) return;
    const int begin = static_cast<int>(start);
    const bool is_query = column < half;
    const int own = is_query ? column : column - half;
    const std::int64_t ld = is_query ? p.a.ld : p.b.ld;
    float* out = nullptr;
    if (!kLong) out = (is_query ? p.a.data : p.b.data) + own + start * ld;
    Values<W> s[kRun + kReach];
    const float* in = p.s.data + start * p.s.ld + column;
    if (!kLong) wait_for_previous();
#pragma unroll
    for (int n = 0; n < kRun + kReach; ++n) {
        const int token = begin - kReach + n;
        const bool there = (n >= kReach || (kConvolution && token >= 0)) && token < tokens;
        s[n] = there ? load<W>(in + (n - kReach) * p.s.ld) : Values<W>{};
    }
    const int per_head = half / static_cast<int>(p.log_temp.size);
    const Columns<kConvolution, W> columns(p.w.data, p.log_temp.data, column, [&](int c) {
        return kLong ? (column + c) % half / per_head : heads.of(own + c);
    });
    if (kLong) out = (is_query ? p.a.data + column : p.b.data + (column - half)) + start * ld;
    const int first = kConvolution ? p.seq.first(begin) : 0, last = kConvolution ? p.seq.last(begin) : tokens;
    if (begin + kRun <= min(last, tokens) && (!kConvolution || begin - kReach >= first))
        forward_run<kConvolution, W, kRun, true>(p.seq, s, columns, begin, first, last, out, ld);
    else
        forward_run<kConvolution, W, kRun, false>(p.seq, s, columns, begin, first, last, out, ld);
}

__device__ inline int own_thread() { return int(threadIdx.y * blockDim.x + threadIdx.x); }

// What the threads of a block have on its way, from the last token of their runs on; then their sums.
template <int W>
union BackwardMemory {
    struct {
        Values<W> g[kDepth<W>][kBackwardThreads], o[kDepth<W>][kBackwardThreads], s[kDepth<W>][kBackwardThreads];
    } rows;
    float sums[kSums * W * kBackwardThreads];  // [kSums][runs][columns]
    __device__ BackwardMemory() {}
};

// A thread's rows of gradients, outputs and scalars. No thread reads another's, so there are no barriers.
template <bool kConvolution, int W>
struct BackwardStream {
    BackwardMemory<W>& shared;
    const float *g, *o, *s;  // of the next row to be sent for
    std::int64_t ld_g, ld_o, ld_s;
    int left;  // rows that have not been sent for
    std::uint64_t policy = leaves_cache_first();

    __device__ BackwardStream(BackwardMemory<W>& memory, const CoordinateBackward<bf16>& p, int column, int own,
                              bool is_query, int last, int rows)
        : shared(memory), ld_s(p.s.ld), left(rows) {
        ld_g = is_query ? p.da.ld : p.db.ld, ld_o = is_query ? p.a.ld : p.b.ld;
        g = (is_query ? p.da.data : p.db.data) + own + last * ld_g;
        o = (is_query ? p.a.data : p.b.data) + own + last * ld_o;
        s = kConvolution ? p.s.data + column + last * ld_s : nullptr;
    }
    // A row into a slot, or zeros after the last one.
    __device__ void send_to(int slot) {
        const bool wanted = left > 0;
        send(shared.rows.g[slot][own_thread()], g, wanted, policy);
        send(shared.rows.o[slot][own_thread()], o, wanted, policy);
        if (kConvolution) send(shared.rows.s[slot][own_thread()], s, wanted, policy);
        cp_async_commit();
        g -= ld_g, o -= ld_o, s -= ld_s, --left;
    }
    template <int kPending>
    __device__ static void wait() {
        asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
    }
};

// One thread's share of backward: ds of its run, and its run's sums. window[o]: dlam o tokens after the one at hand. What
// token j gives: ds_j from the gradients of tokens j .. j + 3, and with the same window its share of dw:
// dw_k = sum_j s_j dlam_{j + 3 - k}.
template <bool kConvolution, int W>
struct BackwardWalk {
    using Stream = BackwardStream<kConvolution, W>;
    static constexpr int kAhead = kDepth<W> - 1;
    const Columns<kConvolution, W>& columns;
    Stream& stream;
    nv_bf16* ds;
    std::int64_t ld_ds;
    float window[kTaps][W] = {};
    float sum[W][kSums] = {};

    // Takes the row in a slot; `before`: the slot of the row before it, which has been used.
    __device__ void take(int slot, int before) {
        stream.send_to(before);
        Stream::template wait<kAhead>();
        const int me = own_thread();
        const Values<W> g = stream.shared.rows.g[slot][me], o = stream.shared.rows.o[slot][me];
        Values<W> s{}, out;
        if (kConvolution) s = stream.shared.rows.s[slot][me];
#pragma unroll
        for (int c = 0; c < W; ++c) {
            sum[c][kTaps] = fmaf(-g.v[c], o.v[c], sum[c][kTaps]);
            window[0][c] = g.v[c] * columns.scale[c];
            out.v[c] = kConvolution ? 0.f : window[0][c];
            if constexpr (kConvolution) {
#pragma unroll
                for (int k = 0; k < kTaps; ++k) {
                    const float dlam = window[kReach - k][c];
                    out.v[c] = fmaf(columns.w[c][k], dlam, out.v[c]);
                    sum[c][k] = fmaf(s.v[c], dlam, sum[c][k]);
                }
            }
        }
        store(ds, out);
        ds -= ld_ds;
#pragma unroll
        for (int o = kReach; o > 0; --o)
#pragma unroll
            for (int c = 0; c < W; ++c) window[o][c] = window[o - 1][c];
    }
    // The tokens from stop - 1 down to start; the first kAhead rows have been sent for.
    __device__ void all(const Packed& seq, int start, int stop) {
        int boundary = kConvolution ? seq.first(stop - 1) : 0, slot = 0;
#pragma unroll 1
        for (int j = stop - 1; j >= start; j -= kStep, slot = (slot + kStep) % kDepth<W>) {
            const int before = (slot + kAhead) % kDepth<W>;
            if (j - (kStep - 1) >= max(boundary, start)) {  // no sequence ends within the step
#pragma unroll
                for (int n = 0; n < kStep; ++n) take(slot + n, n == 0 ? before : slot + n - 1);
                continue;
            }
#pragma unroll 1
            for (int n = 0; n < kStep && j - n >= start; ++n) {
                if (j - n < boundary) {  // the last token of the sequence before
#pragma unroll
                    for (int o = 1; o < kTaps; ++o)
#pragma unroll
                        for (int c = 0; c < W; ++c) window[o][c] = 0.f;
                    boundary = seq.first(j - n);
                }
                take(slot + n, n == 0 ? before : slot + n - 1);
            }
        }
    }
};

// What a block leaves: its runs' sums of dw, for each of its columns, and of dlog_temp, for each head. Null: not wanted.
struct Partial {
    float* dw;         // [blocks of runs][all columns][kTaps]
    float* dlog_temp;  // [blocks of runs][blocks of columns][heads]
    int heads, per_head;
    int shift;  // 2^shift threads add up a column's runs: neighbours, at most a warp
};

// One column's sums over the runs; right in the first of its 2^shift threads.
template <bool kConvolution>
__device__ void add_runs(float (&total)[kSums], const float* of_column, int columns, int shift) {
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
__device__ void store_partial(float* shared, const float (&sum)[W][kSums], const Partial& to, int all) {
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
            if (kConvolution && first + c < all)
                reinterpret_cast<float4*>(to.dw)[std::int64_t(blockIdx.x) * all + first + c] =
                    make_float4(total[0], total[1], total[2], total[3]);
        }
    if (!to.dlog_temp) return;
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

// run: tokens.
template <bool kConvolution, int W>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks)
    coordinate_backward_kernel(CoordinateBackward<bf16> p, Partial partial, int run, Heads heads) {
    dependents_may_start();
    __shared__ BackwardMemory<W> shared;
    const int all = static_cast<int>(p.s.cols), half = all / 2;
    const int column = int(blockIdx.y * blockDim.x + threadIdx.x) * W;
    const unsigned first = (blockIdx.x * blockDim.y + threadIdx.y) * unsigned(run);
    const bool any = column < all && first < unsigned(p.seq.tokens);
    const int start = any ? int(first) : 0, stop = any ? min(start + run, p.seq.tokens) : 1;
    const bool is_query = column < half;
    const int own = any ? (is_query ? column : column - half) : 0;
    using Walk = BackwardWalk<kConvolution, W>;
    BackwardStream<kConvolution, W> stream(shared, p, any ? column : 0, own, is_query, stop - 1,
                                           any ? stop - start : 0);
    const float* g = stream.g;
    wait_for_previous();
#pragma unroll
    for (int n = 0; n < Walk::kAhead; ++n) stream.send_to(n);
    Values<W> after[kReach];
    if (kConvolution) {
#pragma unroll
        for (int o = 0; o < kReach; ++o) {
            g += stream.ld_g;
            after[o] = any && stop + o < p.seq.tokens ? load<W>(g) : Values<W>{};
        }
    }
    const Columns<kConvolution, W> columns(p.w.data, p.log_temp.data, any ? column : 0,
                                           [&](int c) { return heads.of(own + c); });
    nv_bf16* ds = reinterpret_cast<nv_bf16*>(p.ds.data) + (stop - 1) * p.ds.ld + column;
    Walk walk{columns, stream, ds, p.ds.ld};
    if (kConvolution) {
        const int last = p.seq.last(stop - 1);
#pragma unroll
        for (int o = 0; o < kReach; ++o)
#pragma unroll
            for (int c = 0; c < W; ++c)
                walk.window[o + 1][c] = stop + o < last ? after[o].v[c] * columns.scale[c] : 0.f;
    }
    if (any) walk.all(p.seq, start, stop);
    if (!partial.dw && !partial.dlog_temp) return;  // the same for every thread
    walk.stream.template wait<0>();
    __syncthreads();  // the rows have been read
    store_partial<kConvolution, W>(shared.sums, walk.sum, partial, all);
}

// Whether it lies at a multiple of `width` values; and whether rows and columns do: as many columns to a thread.
template <class T>
bool are_aligned(const T& m, std::int64_t width) {
    return reinterpret_cast<std::uintptr_t>(m.data) % (static_cast<std::uintptr_t>(width) * sizeof(*m.data)) == 0;
}
template <class T>
bool in_groups(const Mat<T>& m, std::int64_t width) {
    return m.ld % width == 0 && are_aligned(m, width);
}

template <int W, int kRun>
void launch_forward(const Cuda& d, const CoordinateForward<float>& p) {
    const Layout l = layout_of(p.s.rows, p.s.cols, W, kRun, kForwardThreads);
    const dim3 grid(l.run_blocks, l.column_blocks);
    launch_dependent(d, p.w ? coordinate_forward_kernel<true, W, kRun> : coordinate_forward_kernel<false, W, kRun>,
                     grid, l.block, 0, p, Heads(p.a.cols, p.log_temp.size));
    LAUNCH_CHECK("coordinate_forward");
}
template <int W>
void launch_forward(const Cuda& d, const CoordinateForward<float>& p) {
    if (p.s.cols < kNarrow)
        launch_forward<W, 1>(d, p);
    else if (p.s.rows * (p.s.cols / W) >= std::int64_t(kThreadsEnough) * kLongRun)
        launch_forward<W, kLongRun>(d, p);
    else
        launch_forward<W, kShortRun>(d, p);
}
template <int W>
void launch_backward(const Cuda& d, const CoordinateBackward<bf16>& p, PendingSums<float>& sums) {
    // Runs as long as the number of blocks demands, in whole steps.
    const Layout one = layout_of(p.s.rows, p.s.cols, W, kStep, kBackwardThreads);
    const int run = kStep * int(ceil_div(std::int64_t(one.run_blocks), kCoordinateBlocks));
    const Layout l = layout_of(p.s.rows, p.s.cols, W, run, kBackwardThreads);
    const dim3 grid(l.run_blocks, l.column_blocks);
    const int all = int(p.s.cols), rows = int(l.run_blocks), of_heads = rows * int(l.column_blocks);
    Partial partial{.dw = nullptr, .dlog_temp = nullptr, .heads = int(p.log_temp.size), .per_head = 0, .shift = 0};
    partial.per_head = int(p.a.cols) / partial.heads;
    while ((2 * int(l.block.x) * W) << partial.shift <= int(l.block.x * l.block.y) && 1 << partial.shift < kWarp)
        ++partial.shift;
    if (p.dw) {
        partial.dw = sums.take(std::int64_t(rows) * all * kTaps).data;
        FIEDLER_REQUIRE("coordinate", reinterpret_cast<std::uintptr_t>(partial.dw) % 16 == 0);
        sums.add({p.dw.data, partial.dw, std::int64_t(all) * kTaps, 1, rows, all * kTaps});
    }
    if (p.dlog_temp) {
        partial.dlog_temp = sums.take(std::int64_t(of_heads) * partial.heads).data;
        sums.add({p.dlog_temp.data, partial.dlog_temp, partial.heads, 1, of_heads, partial.heads});
    }
    const auto kernel = p.w ? coordinate_backward_kernel<true, W> : coordinate_backward_kernel<false, W>;
    launch_dependent(d, kernel, grid, l.block, 0, p, partial, run, Heads(p.a.cols, p.log_temp.size));
    LAUNCH_CHECK("coordinate_backward");
}
}  // namespace

void coordinate_forward(const Cuda& d, const CoordinateForward<float>& p) {
    check(p);
    if (p.s.rows == 0 || p.s.cols == 0) return;
    FIEDLER_REQUIRE("coordinate", !p.w || reinterpret_cast<std::uintptr_t>(p.w.data) % 16 == 0);
    if (p.a.cols % 2 == 0 && in_groups(p.s, 2) && in_groups(p.a, 2) && in_groups(p.b, 2))
        launch_forward<2>(d, p);
    else
        launch_forward<1>(d, p);
}

void coordinate_backward(const Cuda& d, const CoordinateBackward<bf16>& p) {
    check(p);
    if (p.s.rows == 0 || p.s.cols == 0) return;
    const std::int64_t most = coordinate_pending_elements(p.s.rows, p.s.cols, p.log_temp.size);
    FIEDLER_REQUIRE("coordinate", (!p.dw && !p.dlog_temp) || p.pending || p.scratch.size >= most);
    FIEDLER_REQUIRE("coordinate", !p.w || reinterpret_cast<std::uintptr_t>(p.w.data) % 16 == 0);
    const auto fits = [&](std::int64_t w) {
        return p.a.cols % w == 0 && in_groups(p.s, w) && in_groups(p.a, w) && in_groups(p.b, w) && in_groups(p.da, w) &&
               in_groups(p.db, w) && in_groups(p.ds, w);
    };
    PendingSums<float> own(p.scratch);
    PendingSums<float>& sums = p.pending ? *p.pending : own;
    if (fits(4))
        launch_backward<4>(d, p, sums);
    else if (fits(2))
        launch_backward<2>(d, p, sums);
    else
        launch_backward<1>(d, p, sums);
    if (!p.pending) finish_sums(d, own);
}

}  // namespace fiedler
