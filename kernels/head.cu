// kernels/head.cu: the vocabulary head (see head.h): which way to take, and what the sm_90 way needs around its product:
// logits of the targets, the rows' sums and factors, rows times factors. All of it is bound by memory.
#include "kernels/common.cuh"
#include "kernels/head_sm90.h"

namespace fiedler {
namespace {

#if FIEDLER_SM90A  // kernels/head_sm90.cu is in this build

constexpr int kThreads = 256, kPackSize = Pack<nv_bf16>::size;

struct Targets {
    float* base;
    const nv_bf16 *x, *w;
    std::int64_t ld_x, ld_w;
    const std::int32_t* targets;
    int rows, packs, vocab;
};
// base_i = x_i . w_target; infinity where ignored, NaN where there is no such row. A warp takes a row.
__global__ void __launch_bounds__(kThreads) target_logits_kernel(const Targets p) {
    const int row = static_cast<int>(blockIdx.x) * (kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (row >= p.rows) return;
    const int target = p.targets[row];
    float sum = target < 0 ? INFINITY : __int_as_float(0x7fffffff);
    if (target >= 0 && target < p.vocab) {
        sum = 0.f;
        for (int k = lane; k < p.packs; k += kWarp) {
            const auto x = load16(p.x + row * p.ld_x + k * kPackSize),
                       w = load16(p.w + target * p.ld_w + k * kPackSize);
#pragma unroll
            for (int i = 0; i < kPackSize; ++i) sum = fmaf(to_float(x.v[i]), to_float(w.v[i]), sum);
        }
        sum = warp_sum(sum);
    }
    if (lane == 0) p.base[row] = sum;
}

struct Rows {
    float *losses, *factors;
    const float* sums;  // [panels, rows]
    nv_bf16* e;         // null without a gradient
    std::int64_t ld_e;
    const std::int32_t* targets;
    int rows, panels, vocab;
    float scale;
};
constexpr int kSlices = 8;  // threads that share the panels of a row
// Sums of the panels, in one order; the loss, the factor of the row's gradient, and the target's gradient over it.
__global__ void __launch_bounds__(kThreads) finish_rows_kernel(const Rows p) {
    __shared__ float shared[kSlices][kWarp];
    const int lane = threadIdx.x, row = static_cast<int>(blockIdx.x) * kWarp + lane;
    float sum = 0.f;
    if (row < p.rows)
#pragma unroll 4
        for (int i = threadIdx.y; i < p.panels; i += kSlices) sum += p.sums[std::int64_t(i) * p.rows + row];
    shared[threadIdx.y][lane] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || row >= p.rows) return;
#pragma unroll
    for (int i = 1; i < kSlices; ++i) sum += shared[i][lane];
    const int target = p.targets[row];
    const bool counts = target >= 0;
    if (target >= p.vocab) sum = __int_as_float(0x7fffffff);
    p.losses[row] = counts ? log1pf(sum) : 0.f;
    p.factors[row] = counts ? p.scale / (1.f + sum) : 0.f;
    if (p.e != nullptr && counts && target < p.vocab) p.e[row * p.ld_e + target] = from_float<nv_bf16>(-sum);
}

struct Scaling {
    nv_bf16* y;
    const nv_bf16* x;  // may be y
    const float* factors;
    std::int64_t ld_y, ld_x;
    int rows, packs;
};
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const Scaling p) {
    const std::int64_t item = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t row = item / p.packs, part = item % p.packs * kPackSize;
    if (row >= p.rows) return;
    auto value = load16(p.x + row * p.ld_x + part);
    const float factor = p.factors[row];
#pragma unroll
    for (int i = 0; i < kPackSize; ++i) value.v[i] = from_float<nv_bf16>(to_float(value.v[i]) * factor);
    store16(p.y + row * p.ld_y + part, value);
}

void scale_rows(const Cuda& dev, const Mat<bf16>& y, const Mat<const bf16>& x, const float* factors) {
    const int packs = static_cast<int>(x.cols / kPackSize);
    const Scaling p{nv(y.data), nv(x.data), factors, y.ld, x.ld, static_cast<int>(x.rows), packs};
    scale_rows_kernel<<<static_cast<unsigned>(ceil_div(x.rows * packs, std::int64_t(kThreads))), kThreads, 0,
                        stream_of(dev)>>>(p);
    LAUNCH_CHECK("head, scale_rows");
}

// The rows of p, which are one chunk.
void chunk_sm90(const Cuda& dev, const Head<bf16>& p) {
    const std::int64_t n = p.x.rows, columns = tuning::panel_columns(p.x.cols);
    const int rows = static_cast<int>(n), vocab = static_cast<int>(p.w.rows);
    const std::int64_t panels = ceil_div(p.w.rows, columns);
    float* const factors = p.scratch.data;
    const Mat<float> sums(factors + n, panels, n);
    const Mat<bf16> e = p.dx ? p.logits.slice_rows(0, n) : Mat<bf16>{};
    const Targets targets{p.losses.data, nv(p.x.data),   nv(p.w.data), p.x.ld,
                          p.w.ld,        p.targets.data, rows,         static_cast<int>(p.x.cols / kPackSize),
                          vocab};
    target_logits_kernel<<<static_cast<unsigned>(ceil_div(rows, kThreads / kWarp)), kThreads, 0, stream_of(dev)>>>(
        targets);
    LAUNCH_CHECK("head, target_logits");
    head_exponentials(dev, {.e = e, .sums = sums, .x = p.x, .w = p.w, .base = p.losses, .targets = p.targets});
    const Rows of_rows{p.losses.data, factors,        sums.data, nv(e.data),
                       e.ld,          p.targets.data, rows,      static_cast<int>(panels),
                       vocab,         p.scale};
    finish_rows_kernel<<<static_cast<unsigned>(ceil_div(rows, kWarp)), dim3(kWarp, kSlices), 0, stream_of(dev)>>>(
        of_rows);
    LAUNCH_CHECK("head, finish_rows");
    if (!p.dx) return;
    scale_rows(dev, p.dx, p.x, factors);  // dx is free until its product
    matmul_dw(dev, MatmulDw<bf16>{.dw = p.dw, .dy = e, .x = p.dx});
    matmul_dx(dev, MatmulDx<bf16>{.dx = p.dx, .dy = e, .w = p.w});
    scale_rows(dev, p.dx, p.dx, factors);
}

bool try_sm90(const Cuda& dev, const Head<bf16>& p) {
    if (!head_sm90_takes(dev, p)) return false;
    FIEDLER_REQUIRE("head", p.scratch.size >= head_scratch_elements(p.logits.rows, p.w.rows, p.x.cols));
    for (std::int64_t first = 0; first < p.x.rows; first += p.logits.rows) {
        const std::int64_t rows = std::min(p.logits.rows, p.x.rows - first);
        Head<bf16> chunk = p;
        chunk.losses = p.losses.slice(first, rows), chunk.targets = p.targets.slice(first, rows);
        chunk.x = p.x.slice_rows(first, rows);
        if (p.dx) chunk.dx = p.dx.slice_rows(first, rows);
        chunk_sm90(dev, chunk);
    }
    return true;
}
#else
bool try_sm90(const Cuda&, const Head<bf16>&) { return false; }
#endif

void check_all(const Head<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("head", is_aligned16(p.x) && is_aligned16(p.w) && is_aligned16(p.logits));
    FIEDLER_REQUIRE("head", !p.dx || (is_aligned16(p.dx) && is_aligned16(p.dw)));
    FIEDLER_REQUIRE("head", p.x.rows <= INT32_MAX && p.w.rows <= INT32_MAX);
}

}  // namespace

void head(const Cuda& dev, const Head<bf16>& p) {
    check_all(p);
    if (!try_sm90(dev, p)) head_by_products(dev, p);
}

bool head_by_path(const Cuda& dev, const Head<bf16>& p, HeadPath path) {
    check_all(p);
    if (path == HeadPath::sm90) return try_sm90(dev, p);
    head_by_products(dev, p);
    return true;
}

}  // namespace fiedler
