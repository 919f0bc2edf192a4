// kernels/head.cu: the vocabulary head (see head.h): which way to take, and what the sm_90 way needs around its product:
// logits of the targets, the rows' sums and factors, rows times factors. All of it is bound by memory. Then the order of
// the steps in fp8.
#include <utility>

#include "kernels/common.cuh"
#include "kernels/head_fp8_sm90.h"
#include "kernels/head_sm90.h"

#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif

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

template <class Chunk>
void for_chunks(const Head<bf16>& p, Chunk&& body) {
    FIEDLER_REQUIRE("head", p.scratch.size >= head_scratch_elements(p.logits.rows, p.w.rows, p.x.cols));
    for (std::int64_t first = 0; first < p.x.rows; first += p.logits.rows) {
        const std::int64_t rows = std::min(p.logits.rows, p.x.rows - first);
        Head<bf16> chunk = p;
        chunk.losses = p.losses.slice(first, rows), chunk.targets = p.targets.slice(first, rows);
        chunk.x = p.x.slice_rows(first, rows);
        if (p.dx) chunk.dx = p.dx.slice_rows(first, rows);
        body(chunk);
    }
}

bool try_sm90(const Cuda& dev, const Head<bf16>& p) {
    if (!head_sm90_takes(dev, p)) return false;
    for_chunks(p, [&](const Head<bf16>& chunk) { chunk_sm90(dev, chunk); });
    return true;
}

// ---- fp8 ---------------------------------------------------------------------------------------------------------

// What lies in fp8_scratch, for chunks of so many rows at most.
struct Fp8Memory {
    Mat<std::int8_t> w, x, sample;
    Mat<e4m3> w_turned, x_turned;   // x_turned: in the place of x, which is done with by then
    float *scales, *sample_scales;  // of w
    float *largest, *octaves, *base, *factors, *pulls;
    std::uint32_t *w_largest, *x_largest;
    float* inverse;  // cuBLASLt wants it at a multiple of 16 bytes

    Fp8Memory(unsigned char* at, std::int64_t rows, std::int64_t vocab, std::int64_t channels) {
        const auto bytes = [&](std::int64_t count) { return std::exchange(at, at + count); };
        const auto whole = [&](std::int64_t n) {
            return Mat<std::int8_t>(reinterpret_cast<std::int8_t*>(bytes(n * channels)), n, channels);
        };
        const auto floats = [&](std::int64_t n) {
            return reinterpret_cast<float*>(bytes(n * std::int64_t(sizeof(float))));
        };
        w = whole(vocab), x = whole(rows), sample = whole(kHeadFp8Sample);
        w_turned = Mat<e4m3>(reinterpret_cast<e4m3*>(bytes(channels * vocab)), channels, vocab);
        x_turned = Mat<e4m3>(reinterpret_cast<e4m3*>(x.data), channels, rows);
        scales = floats(vocab), sample_scales = floats(kHeadFp8Sample);
        for (float** v : {&largest, &octaves, &base, &factors, &pulls}) *v = floats(rows);
        w_largest = reinterpret_cast<std::uint32_t*>(bytes(16)),
        x_largest = reinterpret_cast<std::uint32_t*>(bytes(16));
        inverse = reinterpret_cast<float*>(bytes(16));
    }
};

// The rows of p, which are one chunk; w is in `all`.
void chunk_fp8(const Cuda& dev, const Head<bf16>& p, const Fp8Memory& all) {
    const std::int64_t n = p.x.rows, c = p.x.cols, v = p.w.rows;
    const Mat<std::int8_t> x = all.x.slice_rows(0, n);
    const Mat<e4m3> x_turned(all.x_turned.data, c, n);
    auto* const bytes = reinterpret_cast<e5m2*>(p.logits.data);
    const Mat<e5m2> e(bytes, n, v), turned(bytes + n * v, v, n);
    const Mat<float> sums(p.scratch.data, ceil_div(v, kHeadFp8Panel), n);
    head_fp8_rows(dev, {.y = x,
                        .largest = all.largest,
                        .octaves = all.octaves,
                        .target_logits = p.losses.data,
                        .x = p.x,
                        .w = p.w,
                        .targets = p.targets.data});
    head_fp8_sample(dev, {.sample = all.sample,
                          .sample_scales = all.sample_scales,
                          .w = all.w,
                          .scales = all.scales,
                          .targets = p.targets});
    head_fp8_base(dev, {.base = {all.base, n},
                        .x = x,
                        .sample = all.sample,
                        .scales = all.sample_scales,
                        .octaves = all.octaves,
                        .target_logits = p.losses.data});
    head_fp8_exponentials(dev, {.e = e,
                                .turned = turned,
                                .sums = sums,
                                .x = x,
                                .w = all.w,
                                .scales = all.scales,
                                .octaves = all.octaves,
                                .base = all.base,
                                .targets = p.targets.data});
    head_fp8_finish(dev, {.losses = p.losses,
                          .factors = all.factors,
                          .pulls = all.pulls,
                          .turned = turned,
                          .x_largest = all.x_largest,
                          .sums = sums,
                          .largest = all.largest,
                          .base = all.base,
                          .targets = p.targets.data,
                          .scale = p.scale});
    head_fp8_turn(
        dev,
        {.turned = x_turned, .x = p.x, .largest = all.x_largest, .row_factors = all.factors, .inverse = all.inverse});
    matmul_fp8(
        dev,
        MatmulFp8<float>{
            .y = p.dw, .a = turned, .b = x_turned, .scale = {all.inverse, 1}, .accumulate = true, .fast_sums = true});
    matmul_fp8(dev, MatmulFp8<bf16>{.y = p.dx, .a = e, .b = all.w_turned});
    head_fp8_dx(dev, {.dx = p.dx,
                      .w = p.w,
                      .factors = all.factors,
                      .pulls = all.pulls,
                      .targets = p.targets.data,
                      .w_largest = all.w_largest});
}

bool try_fp8(const Cuda& dev, const Head<bf16>& p) {
    const std::int64_t rows = std::min(p.logits.rows, p.x.rows), c = p.x.cols, v = p.w.rows;
    if (!head_has_fp8(dev.arch) || !head_sm90_takes(dev, p) || !p.dx ||
        !head_fp8_takes(p.x.rows, p.logits.rows, v, c) || p.logits.ld != v || p.dx.ld % 16 != 0 || p.dw.ld % 16 != 0)
        return false;
    FIEDLER_REQUIRE("head", p.fp8_scratch && p.fp8_scratch.size >= head_fp8_scratch_bytes(rows, v, c));
    FIEDLER_REQUIRE("head", reinterpret_cast<std::uintptr_t>(p.fp8_scratch.data) % 16 == 0);
    const Fp8Memory all(p.fp8_scratch.data, rows, v, c);
    head_fp8_words(dev, {.y = all.w, .scales = all.scales, .largest = all.w_largest, .x = p.w});
    head_fp8_turn(dev, {.turned = all.w_turned, .x = p.w, .largest = all.w_largest});
    for_chunks(p, [&](const Head<bf16>& chunk) { chunk_fp8(dev, chunk, all); });
    return true;
}
#else
bool try_sm90(const Cuda&, const Head<bf16>&) { return false; }
bool try_fp8(const Cuda&, const Head<bf16>&) { return false; }
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
    if (p.precision == HeadPrecision::fp8 && try_fp8(dev, p)) return;
    if (!try_sm90(dev, p)) head_by_products(dev, p);
}

bool head_has_fp8(int arch) { return FIEDLER_SM90A && arch == 90; }

bool head_by_path(const Cuda& dev, const Head<bf16>& p, HeadPath path) {
    check_all(p);
    if (path == HeadPath::sm90) return try_sm90(dev, p);
    if (path == HeadPath::fp8) return try_fp8(dev, p);
    head_by_products(dev, p);
    return true;
}

}  // namespace fiedler
