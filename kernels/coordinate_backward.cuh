// kernels/coordinate_backward.cuh: gradients of coordinate scalars (see coordinate.cu).
//
// A thread walks its run from the last token to the first, as in conv.cu: the three tokens after the one at hand are in
// registers, those before it on their way to shared memory, each thread's to places of its own. Where rows are short a
// run is, too: all of it is asked for at once, into registers.
#pragma once
#include "kernels/coordinate_columns.cuh"
#include "kernels/dependent_launch.cuh"

namespace fiedler {
namespace coordinate {

constexpr int kBackwardThreads = kCoordinateColumns;
constexpr int kBackwardBlocks = 2;  // that fit on a multiprocessor: the bound on registers
// Rows on their way, and the one at hand; and rows of a step, after which the window is as before. One column's are few
// bytes: more of them.
constexpr int kStep = kTaps;
template <int W>
constexpr int kDepth = W == 1 ? 2 * kStep : kStep;
// Of short rows. With fewer registers more blocks would fit, but those that come early then crowd on few
// multiprocessors: on an H200 that is a fifth to two fifths slower.
constexpr int kNarrowThreads = 192, kNarrowRun = 4, kNarrowBlocks = 2;

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

// A short run of W columns, and the gradients after it.
template <bool kConvolution, int W>
struct ShortRun {
    static constexpr int kAfter = kConvolution ? kReach : 0;
    Values<W> g[kNarrowRun + kAfter], o[kNarrowRun], s[kNarrowRun];
    const float *from_g, *from_o, *from_s;  // at the run's first token
    std::int64_t ld_g, ld_o, ld_s;

    __device__ ShortRun(const CoordinateBackward<bf16>& p, int begin, int column, int own, bool is_query) {
        ld_g = is_query ? p.da.ld : p.db.ld, ld_o = is_query ? p.a.ld : p.b.ld, ld_s = p.s.ld;
        from_g = (is_query ? p.da.data : p.db.data) + begin * ld_g + own;
        from_o = (is_query ? p.a.data : p.b.data) + begin * ld_o + own;
        from_s = p.s.data + begin * ld_s + column;
    }
    // left: tokens from the run's first on.
    __device__ void load_all(int left) {
#pragma unroll
        for (int n = 0; n < kNarrowRun + kAfter; ++n) g[n] = n < left ? load<W>(from_g + n * ld_g) : Values<W>{};
#pragma unroll
        for (int n = 0; n < kNarrowRun; ++n) {
            o[n] = n < left ? load<W>(from_o + n * ld_o) : Values<W>{};
            if (kConvolution) s[n] = n < left ? load<W>(from_s + n * ld_s) : Values<W>{};
        }
    }
    __device__ void go_on(int tokens) { from_g += tokens * ld_g, from_o += tokens * ld_o, from_s += tokens * ld_s; }
    // kWithin: all tokens and those after them are of one sequence, which ends at `last`.
    template <bool kWithin>
    __device__ void add(const Packed& seq, const Columns<kConvolution, W>& columns, int begin, int last, nv_bf16* ds,
                        std::int64_t ld, float (&sum)[W][kSums]) const {
#pragma unroll
        for (int n = 0; n < kNarrowRun; ++n) {
            const int token = begin + n;
            if (!kWithin && token >= seq.tokens) return;
            if (!kWithin && kConvolution && token == last) last = seq.last(token);
            Values<W> out;
#pragma unroll
            for (int c = 0; c < W; ++c) {
                sum[c][kTaps] = fmaf(-g[n].v[c], o[n].v[c], sum[c][kTaps]);
                out.v[c] = kConvolution ? 0.f : g[n].v[c] * columns.scale[c];
                if constexpr (kConvolution) {
#pragma unroll
                    for (int k = 0; k < kTaps; ++k) {
                        const int after = kReach - k;
                        const float dlam = kWithin || token + after < last ? g[n + after].v[c] * columns.scale[c] : 0.f;
                        out.v[c] = fmaf(columns.w[c][k], dlam, out.v[c]);
                        sum[c][k] = fmaf(s[n].v[c], dlam, sum[c][k]);
                    }
                }
            }
            store(ds + n * ld, out);
        }
    }
};

// runs: of a thread, one after the other.
template <bool kConvolution, int W>
__global__ void __launch_bounds__(kNarrowThreads, kNarrowBlocks)
    coordinate_backward_narrow_kernel(const __grid_constant__ CoordinateBackward<bf16> p,
                                      const __grid_constant__ Partial partial, int runs, Heads heads) {
    dependents_may_start();
    __shared__ __align__(16) float sums[kSums * W * kNarrowThreads];
    const int all = int(p.s.cols), half = all / 2, column = int(threadIdx.x) * W;
    const bool is_query = column < half;
    const int own = is_query ? column : column - half, step = int(blockDim.y) * kNarrowRun;
    int begin = int(blockIdx.x) * runs * step + int(threadIdx.y) * kNarrowRun;
    ShortRun<kConvolution, W> run(p, begin, column, own, is_query);
    int last = kConvolution ? p.seq.last(min(begin, p.seq.tokens - 1)) : p.seq.tokens;
    wait_for_previous();
    run.load_all(p.seq.tokens - begin);
    const Columns<kConvolution, W> columns(p.w.data, p.log_temp.data, column, [&](int c) { return heads.of(own + c); });
    float sum[W][kSums] = {};
    for (;;) {
        if (begin < p.seq.tokens) {
            nv_bf16* const ds = reinterpret_cast<nv_bf16*>(p.ds.data) + begin * p.ds.ld + column;
            if (begin + kNarrowRun + ShortRun<kConvolution, W>::kAfter <= last)
                run.template add<true>(p.seq, columns, begin, last, ds, p.ds.ld, sum);
            else
                run.template add<false>(p.seq, columns, begin, last, ds, p.ds.ld, sum);
        }
        if (--runs == 0) break;
        begin += step;
        run.go_on(step);
        if (kConvolution) last = p.seq.last(min(begin, p.seq.tokens - 1));
        run.load_all(p.seq.tokens - begin);
    }
    if (partial.dw || partial.dlog_temp) store_partial<kConvolution, W>(sums, sum, partial, all);
}

}  // namespace coordinate
}  // namespace fiedler
