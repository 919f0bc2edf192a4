// kernels/coordinate.cu: coordinate scalars on the GPU (contract in coordinate.h).
//
// A thread owns one column, or two neighbouring ones where the layout allows it, and a run of neighbouring tokens, held in
// registers with the three tokens before (forward) or after (backward) them: every value is read from memory about once.
// A block is as many columns wide as there are, and as many runs high as fit. What is read does not wait for where the
// sequence begins or ends, which in ragged batches is itself in memory; runs that lie within one ask no more.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/coordinate.h"
#include "kernels/dependent_launch.cuh"

namespace fiedler {

namespace {
constexpr int kTaps = 4, kReach = kTaps - 1;
// Tokens of a run. Forward, long runs where there are threads enough: they read fewer values twice.
constexpr int kLongRun = 8, kShortRun = 4, kBackwardRun = 4;
constexpr int kThreadsEnough = 128 * 1024;
constexpr int kForwardThreads = 256, kBackwardThreads = 192;
constexpr int kSums = kTaps + 1;  // partial sums of a column: dw_0 .. dw_3, dlog_temp
constexpr int kMaxBlocks = kCoordinatePartials;
constexpr int kTotalsThreads = 256;
constexpr int kBackwardBlocks = 4;  // that fit on a multiprocessor: the bound on registers
static_assert(kSums == 5, "coordinate_scratch_elements");

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
unsigned partial_rows(const Layout& l) { return l.run_blocks < kMaxBlocks ? l.run_blocks : kMaxBlocks; }

// W neighbouring values: one or two.
template <int W>
struct Values {
    float v[W];
};
template <>
struct alignas(8) Values<2> {
    float v[2];
};
template <int W>
__device__ inline Values<W> load(const float* p) {
    if constexpr (W == 1) {
        return {*p};
    } else {
        const float2 r = *reinterpret_cast<const float2*>(p);
        return {r.x, r.y};
    }
}
// Marked to leave the caches first: what is not read again in this step.
template <int W>
__device__ inline Values<W> load_once(const float* p) {
    if constexpr (W == 1) {
        return {__ldcs(p)};
    } else {
        const float2 r = __ldcs(reinterpret_cast<const float2*>(p));
        return {r.x, r.y};
    }
}
template <int W>
__device__ inline void store(float* p, const Values<W>& x) {
    if constexpr (W == 1)
        *p = x.v[0];
    else
        *reinterpret_cast<float2*>(p) = make_float2(x.v[0], x.v[1]);
}
template <int W>
__device__ inline void store(nv_bf16* p, const Values<W>& x) {
    if constexpr (W == 1)
        *p = from_float<nv_bf16>(x.v[0]);
    else
        *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(x.v[0], x.v[1]);
}

// What belongs to a thread's columns.
template <bool kConvolution, int W>
struct Columns {
    float w[W][kTaps], scale[W];
    __device__ Columns(const float* weights, const float* log_temp, int column, int half, int heads) {
#pragma unroll
        for (int c = 0; c < W; ++c) {
            const float4 taps = kConvolution ? *reinterpret_cast<const float4*>(weights + (column + c) * kTaps)
                                             : make_float4(0.f, 0.f, 0.f, 1.f);
            w[c][0] = taps.x, w[c][1] = taps.y, w[c][2] = taps.z, w[c][3] = taps.w;
            scale[c] = expf(-log_temp[(column + c) % half / (half / heads)]);
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

template <bool kConvolution, int W, int kRun>
__global__ void __launch_bounds__(kForwardThreads) coordinate_forward_kernel(CoordinateForward<float> p) {
    const int all = static_cast<int>(p.s.cols), half = all / 2, tokens = p.seq.tokens;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    const std::int64_t start = (std::int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kRun;
    if (column >= all || start >= tokens) return;
    const int begin = static_cast<int>(start);
    Values<W> s[kRun + kReach];
    const float* in = p.s.data + start * p.s.ld + column;
#pragma unroll
    for (int n = 0; n < kRun + kReach; ++n) {
        const int token = begin - kReach + n;
        const bool there = (n >= kReach || (kConvolution && token >= 0)) && token < tokens;
        s[n] = there ? load<W>(in + (n - kReach) * p.s.ld) : Values<W>{};
    }
    const Columns<kConvolution, W> columns(p.w.data, p.log_temp.data, column, half, static_cast<int>(p.log_temp.size));
    const bool is_query = column < half;
    const std::int64_t ld = is_query ? p.a.ld : p.b.ld;
    float* out = (is_query ? p.a.data + column : p.b.data + (column - half)) + start * ld;
    const int first = kConvolution ? p.seq.first(begin) : 0, last = kConvolution ? p.seq.last(begin) : tokens;
    if (begin + kRun <= min(last, tokens) && (!kConvolution || begin - kReach >= first))
        forward_run<kConvolution, W, kRun, true>(p.seq, s, columns, begin, first, last, out, ld);
    else
        forward_run<kConvolution, W, kRun, false>(p.seq, s, columns, begin, first, last, out, ld);
}

// A run's gradients, and those of the three tokens after it; its outputs and scalars.
template <bool kConvolution, int W>
struct BackwardRows {
    Values<W> g[kBackwardRun + kReach], s[kBackwardRun], o[kBackwardRun];
};

// What token j gives: ds_j from the gradients of tokens j .. j + 3, and with the same window its share of dw:
// dw_k = sum_j s_j dlam_{j + 3 - k}. left: rows that there are; same: tokens from the start on that belong to the sequence
// of the first one; kWithin: all rows do.
template <bool kConvolution, int W, bool kWithin>
__device__ inline void backward_run(const CoordinateBackward<bf16>& p, const BackwardRows<kConvolution, W>& rows,
                                    const Columns<kConvolution, W>& columns, int start, int left, int same,
                                    nv_bf16* ds_out, float (&sum)[W][kSums]) {
#pragma unroll
    for (int n = 0; n < kBackwardRun; ++n) {
        if (!kWithin && n >= left) return;
        if (!kWithin && kConvolution && n == same) same = p.seq.last(start + n) - start;
        Values<W> ds;
#pragma unroll
        for (int c = 0; c < W; ++c) {
            sum[c][kTaps] = fmaf(-rows.g[n].v[c], rows.o[n].v[c], sum[c][kTaps]);
            ds.v[c] = rows.g[n].v[c] * columns.scale[c];
            if (kConvolution) {
                ds.v[c] = 0.f;
#pragma unroll
                for (int k = 0; k < kTaps; ++k) {
                    const int ahead = kReach - k;
                    const float dlam = kWithin || n + ahead < same ? rows.g[n + ahead].v[c] * columns.scale[c] : 0.f;
                    ds.v[c] = fmaf(columns.w[c][k], dlam, ds.v[c]);
                    sum[c][k] = fmaf(rows.s[n].v[c], dlam, sum[c][k]);
                }
            }
        }
        store(ds_out + n * p.ds.ld, ds);
    }
}

// A thread's sums over the run from `start` on.
template <bool kConvolution, int W>
__device__ inline void add_run(const CoordinateBackward<bf16>& p, std::int64_t start, int column, int half,
                               const Columns<kConvolution, W>& columns, float (&sum)[W][kSums]) {
    constexpr int kRun = kBackwardRun;
    const int tokens = p.seq.tokens;
    const bool is_query = column < half;
    const int own = is_query ? column : column - half;
    const std::int64_t gradient_ld = is_query ? p.da.ld : p.db.ld, output_ld = is_query ? p.a.ld : p.b.ld;
    const float* gradient = (is_query ? p.da.data : p.db.data) + own + start * gradient_ld;
    const float* output = (is_query ? p.a.data : p.b.data) + own + start * output_ld;
    const float* scalar = kConvolution ? p.s.data + start * p.s.ld + column : nullptr;
    const int left = static_cast<int>(min(std::int64_t(tokens) - start, std::int64_t(kRun + kReach)));
    BackwardRows<kConvolution, W> rows;
#pragma unroll
    for (int n = 0; n < (kConvolution ? kRun + kReach : kRun); ++n) {
        rows.g[n] = n < left ? load_once<W>(gradient) : Values<W>{};
        gradient += gradient_ld;
    }
#pragma unroll
    for (int n = 0; n < kRun; ++n) {
        rows.o[n] = n < left ? load_once<W>(output) : Values<W>{};
        output += output_ld;
        if (kConvolution) {  // s shares its rows with the gate's logits
            rows.s[n] = n < left ? load<W>(scalar) : Values<W>{};
            scalar += p.s.ld;
        }
    }
    const int begin = static_cast<int>(start);
    const int same = kConvolution ? p.seq.last(begin) - begin : 0;
    nv_bf16* ds_out = reinterpret_cast<nv_bf16*>(p.ds.data) + start * p.ds.ld + column;
    if (left >= kRun && (!kConvolution || same >= kRun + kReach))
        backward_run<kConvolution, W, true>(p, rows, columns, begin, left, same, ds_out, sum);
    else
        backward_run<kConvolution, W, false>(p, rows, columns, begin, left, same, ds_out, sum);
}

// Scratch: partial[(column * kSums + k) * gridDim.x + blockIdx.x], so that the partial sums of one total lie together.
template <bool kConvolution, int W>
__global__ void __launch_bounds__(kBackwardThreads, kConvolution ? kBackwardBlocks : 1)
    coordinate_backward_kernel(CoordinateBackward<bf16> p) {
    dependents_may_start();
    __shared__ float shared[W * kSums][kBackwardThreads];
    const int all = static_cast<int>(p.s.cols), half = all / 2;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    const bool active = column < all;
    float sum[W][kSums] = {};
    if (active) {
        const Columns<kConvolution, W> columns(p.w.data, p.log_temp.data, column, half,
                                               static_cast<int>(p.log_temp.size));
        constexpr int kRun = kBackwardRun;
        const std::int64_t stride = std::int64_t(gridDim.x) * blockDim.y * kRun;
        for (std::int64_t start = (std::int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * kRun; start < p.seq.tokens;
             start += stride)
            add_run<kConvolution, W>(p, start, column, half, columns, sum);
    }
    if (!p.scratch.data) return;  // the same for every thread

    const int mine = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int k = 0; k < W * kSums; ++k) shared[k][mine] = sum[k / kSums][k % kSums];
    __syncthreads();
    for (int rows = blockDim.y; rows > 1; rows = (rows + 1) / 2) {  // fold the upper half onto the lower one
        const int keep = (rows + 1) / 2;
        if (static_cast<int>(threadIdx.y) < rows - keep) {
#pragma unroll
            for (int k = 0; k < W * kSums; ++k) shared[k][mine] += shared[k][mine + keep * blockDim.x];
        }
        __syncthreads();
    }
    if (threadIdx.y == 0 && active) {
#pragma unroll
        for (int k = 0; k < W * kSums; ++k)
            p.scratch.data[(std::int64_t(column) * kSums + k) * gridDim.x + blockIdx.x] = shared[k][mine];
    }
}

// One block per total: the kTaps * columns entries of dw (if any), then dlog_temp of each head (if wanted).
__global__ void __launch_bounds__(kTotalsThreads)
    coordinate_totals_kernel(const float* partial, int rows, int taps, int half, int heads, float* dw,
                             float* dlog_temp) {
    __shared__ float shared[kTotalsThreads / kWarp];
    const int total = blockIdx.x;
    // Each thread adds its one or two partial sums of a column; columns are independent loads.
    static_assert(kMaxBlocks <= 2 * kTotalsThreads);
    const int low = threadIdx.x, high = threadIdx.x + kTotalsThreads;
    const auto column_sum = [&](int column, int k) {
        const float* mine = partial + (std::int64_t(column) * kSums + k) * rows;
        return (low < rows ? mine[low] : 0.f) + (high < rows ? mine[high] : 0.f);
    };
    wait_for_previous();  // for the partial sums
    float sum = 0.f;
    if (total < taps) {
        sum = column_sum(total / kTaps, total % kTaps);
    } else {
        const int per_head = half / heads, first = (total - taps) * per_head;
#pragma unroll 8
        for (int c = 0; c < per_head; ++c) sum += column_sum(first + c, kTaps) + column_sum(half + first + c, kTaps);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) (total < taps ? dw[total] : dlog_temp[total - taps]) += sum;
}

// Two columns to a thread where rows and columns lie at multiples of two values.
template <class T>
bool in_pairs(const Mat<T>& m) {
    return m.ld % 2 == 0 && reinterpret_cast<std::uintptr_t>(m.data) % (2 * sizeof(T)) == 0;
}

template <int W, int kRun>
void launch_forward(const Cuda& d, const CoordinateForward<float>& p) {
    const Layout l = layout_of(p.s.rows, p.s.cols, W, kRun, kForwardThreads);
    const dim3 grid(l.run_blocks, l.column_blocks);
    if (p.w)
        coordinate_forward_kernel<true, W, kRun><<<grid, l.block, 0, stream_of(d)>>>(p);
    else
        coordinate_forward_kernel<false, W, kRun><<<grid, l.block, 0, stream_of(d)>>>(p);
    LAUNCH_CHECK("coordinate_forward");
}
template <int W>
void launch_forward(const Cuda& d, const CoordinateForward<float>& p) {
    if (p.s.rows * (p.s.cols / W) >= std::int64_t(kThreadsEnough) * kLongRun)
        launch_forward<W, kLongRun>(d, p);
    else
        launch_forward<W, kShortRun>(d, p);
}
template <int W>
void launch_backward(const Cuda& d, const CoordinateBackward<bf16>& p) {
    const Layout l = layout_of(p.s.rows, p.s.cols, W, kBackwardRun, kBackwardThreads);
    const unsigned rows = partial_rows(l);
    const dim3 grid(rows, l.column_blocks);
    if (p.w)
        coordinate_backward_kernel<true, W><<<grid, l.block, 0, stream_of(d)>>>(p);
    else
        coordinate_backward_kernel<false, W><<<grid, l.block, 0, stream_of(d)>>>(p);
    LAUNCH_CHECK("coordinate_backward");
    if (!p.scratch) return;
    const int half = static_cast<int>(p.s.cols / 2), heads = static_cast<int>(p.log_temp.size);
    const int taps = p.dw ? 2 * half * kTaps : 0;
    const unsigned totals = static_cast<unsigned>(taps + (p.dlog_temp ? heads : 0));
    launch_dependent(d, coordinate_totals_kernel, totals, kTotalsThreads, 0, p.scratch.data, static_cast<int>(rows),
                     taps, half, heads, p.dw.data, p.dlog_temp.data);
    LAUNCH_CHECK("coordinate_totals");
}
}  // namespace

void coordinate_forward(const Cuda& d, const CoordinateForward<float>& p) {
    check(p);
    if (p.s.rows == 0 || p.s.cols == 0) return;
    FIEDLER_REQUIRE("coordinate", !p.w || reinterpret_cast<std::uintptr_t>(p.w.data) % 16 == 0);
    if (p.a.cols % 2 == 0 && in_pairs(p.s) && in_pairs(p.a) && in_pairs(p.b))
        launch_forward<2>(d, p);
    else
        launch_forward<1>(d, p);
}

void coordinate_backward(const Cuda& d, const CoordinateBackward<bf16>& given) {
    CoordinateBackward<bf16> p = given;
    check(p);
    if (p.s.rows == 0 || p.s.cols == 0) return;
    const bool sums = p.dw || p.dlog_temp;
    FIEDLER_REQUIRE("coordinate",
                    !sums || (p.scratch && p.scratch.size >= coordinate_scratch_elements(p.s.rows, p.s.cols)));
    FIEDLER_REQUIRE("coordinate", !p.w || reinterpret_cast<std::uintptr_t>(p.w.data) % 16 == 0);
    if (!sums) p.scratch = {};
    if (p.a.cols % 2 == 0 && in_pairs(p.s) && in_pairs(p.a) && in_pairs(p.b) && in_pairs(p.da) && in_pairs(p.db) &&
        in_pairs(p.ds))
        launch_backward<2>(d, p);
    else
        launch_backward<1>(d, p);
}

}  // namespace fiedler
