// kernels/coordinate.cu: coordinate scalars on the GPU (contract in coordinate.h).
//
// A thread owns one column, or two or four neighbouring ones where the layout allows it, and a run of neighbouring tokens:
// every value is read from memory about once. A block is as many columns wide as there are, and as many runs high as fit.
// Forward, all of a run is held in registers, with the three tokens before it. What is read does not wait for where the
// sequence begins or ends, which in ragged batches is itself in memory; runs that lie within one ask no more.
//
// With few scalars, launching takes longer than the rest: all kernels here start while the one before them ends.
#include <algorithm>

#include "kernels/coordinate_backward.cuh"

namespace fiedler {
namespace {

using namespace coordinate;

// Tokens of a run, forward: long runs where there are threads enough; they read fewer values twice. Where rows are shorter
// than a line of the cache, of 128 bytes, one: what neighbouring threads have to do with then lies side by side.
constexpr int kLongRun = 8, kShortRun = 4, kNarrow = 128 / int(sizeof(float));
constexpr int kThreadsEnough = 128 * 1024;
constexpr int kForwardThreads = 256;

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
// Where a block's sums go, and how they are noted.
Partial partial_of(const CoordinateBackward<bf16>& p, const Layout& l, int width, PendingSums<float>& sums) {
    const int all = int(p.s.cols), heads = int(p.log_temp.size), rows = int(l.run_blocks);
    const int threads = int(l.block.x * l.block.y), columns = int(l.block.x) * width;
    Partial to{.dw = nullptr, .dlog_temp = nullptr, .heads = heads, .per_head = int(p.a.cols) / heads, .shift = 0};
    while ((2 * columns) << to.shift <= threads && 1 << to.shift < kWarp) ++to.shift;
    if (p.dw) {
        to.dw = sums.take(std::int64_t(rows) * all * kTaps).data;
        FIEDLER_REQUIRE("coordinate", reinterpret_cast<std::uintptr_t>(to.dw) % 16 == 0);
        sums.add({p.dw.data, to.dw, std::int64_t(all) * kTaps, 1, rows, all * kTaps});
    }
    if (p.dlog_temp) {  // of one scalar, a head's two columns are two rows
        const int of_head = rows * (to.per_head == 1 ? 2 : int(l.column_blocks));
        to.dlog_temp = sums.take(std::int64_t(of_head) * heads).data;
        sums.add({p.dlog_temp.data, to.dlog_temp, heads, 1, of_head, heads});
    }
    return to;
}
// Runs as long as the number of blocks demands, in whole steps. Short rows are W = 1 or 2 columns a thread.
template <int W>
void launch_backward(const Cuda& d, const CoordinateBackward<bf16>& p, PendingSums<float>& sums) {
    const auto launch = [&](auto kernel, int threads, int step, int unit) {  // unit: what the kernel counts a step as
        const Layout one = layout_of(p.s.rows, p.s.cols, W, step, threads);
        const int steps = int(ceil_div(std::int64_t(one.run_blocks), kCoordinateBlocks));
        const Layout l = layout_of(p.s.rows, p.s.cols, W, steps * step, threads);
        launch_dependent(d, kernel, dim3(l.run_blocks, l.column_blocks), l.block, 0, p, partial_of(p, l, W, sums),
                         steps * unit, Heads(p.a.cols, p.log_temp.size));
    };
    if (p.s.cols >= kNarrow)
        launch(p.w ? coordinate_backward_kernel<true, W> : coordinate_backward_kernel<false, W>, kBackwardThreads,
               kStep, kStep);
    else if constexpr (W <= 2)
        launch(p.w ? coordinate_backward_narrow_kernel<true, W> : coordinate_backward_narrow_kernel<false, W>,
               kNarrowThreads, kNarrowRun, 1);
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
    if (p.s.cols >= kNarrow && fits(4))
        launch_backward<4>(d, p, sums);
    else if (fits(2))
        launch_backward<2>(d, p, sums);
    else
        launch_backward<1>(d, p, sums);
    if (!p.pending) finish_sums(d, own);
}

}  // namespace fiedler
