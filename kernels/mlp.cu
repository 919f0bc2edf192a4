// kernels/mlp.cu: the MLP's hidden values (see mlp.h): which way to take, and the general way, which is a product of
// matmul.h followed by an elementwise kernel in place. That kernel is bound by memory: each thread moves kPacks times 16
// bytes of each array, all loads issued before the first store.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/matmul.h"
#include "kernels/mlp_sm90.h"

namespace fiedler {
namespace {

constexpr int kThreads = 256, kPacks = 4, kPackSize = Pack<nv_bf16>::size;
constexpr int kBlockElements = kThreads * kPacks * kPackSize;

// x = x^2, or x = x 2 sqrt(h) where h is given.
struct Elementwise {
    nv_bf16* x;
    const nv_bf16* h;
    std::int64_t rows, cols, ld_x, ld_h;
};

template <bool kBackward>
__device__ nv_bf16 apply(nv_bf16 x, nv_bf16 h) {
    const float v = to_float(x);
    return from_float<nv_bf16>(kBackward ? v * (2.f * sqrtf(to_float(h))) : v * v);
}

template <bool kBackward>
__global__ __launch_bounds__(kThreads) void elementwise_kernel(const Elementwise p) {
    const std::int64_t packs = p.cols / kPackSize, first = std::int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
    const std::int64_t tail = packs * kPackSize + threadIdx.x;  // fewer than kPackSize elements are left
    for (std::int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        nv_bf16* const x = p.x + row * p.ld_x;
        const nv_bf16* const h = kBackward ? p.h + row * p.ld_h : x;
        Pack<nv_bf16> value[kPacks], gate[kPacks];
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
            const std::int64_t pack = first + k * kThreads;
            if (pack >= packs) continue;
            value[k] = load16(x + pack * kPackSize);
            if (kBackward) gate[k] = load16(h + pack * kPackSize);
        }
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
            const std::int64_t pack = first + k * kThreads;
            if (pack >= packs) continue;
#pragma unroll
            for (int e = 0; e < kPackSize; ++e)
                value[k].v[e] = apply<kBackward>(value[k].v[e], kBackward ? gate[k].v[e] : value[k].v[e]);
            store16(x + pack * kPackSize, value[k]);
        }
        if (blockIdx.x == 0 && tail < p.cols) x[tail] = apply<kBackward>(x[tail], h[tail]);
    }
}

template <bool kBackward>
void apply_elementwise(const Cuda& dev, Elementwise p) {
    if (p.ld_x == p.cols && (!kBackward || p.ld_h == p.cols)) p.cols *= p.rows, p.rows = 1;  // one long row
    const dim3 grid(static_cast<unsigned>(ceil_div(p.cols, std::int64_t(kBlockElements))),
                    static_cast<unsigned>(std::min<std::int64_t>(p.rows, 65535)));
    elementwise_kernel<kBackward><<<grid, kThreads, 0, stream_of(dev)>>>(p);
    LAUNCH_CHECK("mlp, elementwise");
}

void general(const Cuda& dev, const MlpForward<bf16>& p) {
    matmul_forward(dev, MatmulForward<bf16>{.y = p.h, .x = p.x, .w = p.w, .residual = {}, .relu = true});
    apply_elementwise<false>(dev, {nv(p.h.data), nullptr, p.h.rows, p.h.cols, p.h.ld, 0});
}
void general(const Cuda& dev, const MlpBackward<bf16>& p) {
    matmul_dx(dev, MatmulDx<bf16>{.dx = p.du, .dy = p.dy, .w = p.w});
    apply_elementwise<true>(dev, {nv(p.du.data), nv(p.h.data), p.du.rows, p.du.cols, p.du.ld, p.h.ld});
}

#if FIEDLER_SM90A  // kernels/mlp_sm90.cu is in this build
template <class P>
bool try_sm90(const Cuda& dev, const P& p) {
    if (!mlp_sm90_takes(dev, p)) return false;
    mlp_sm90(dev, p);
    return true;
}
#else
template <class P>
bool try_sm90(const Cuda&, const P&) {
    return false;
}
#endif

template <class P>
void check_aligned(const P& p, const Mat<bf16>& out, const Mat<const bf16>& rows) {
    check(p);
    FIEDLER_REQUIRE("mlp", is_aligned16(out) && is_aligned16(rows) && is_aligned16(p.w));
}
void check_all(const MlpForward<bf16>& p) { check_aligned(p, p.h, p.x); }
void check_all(const MlpBackward<bf16>& p) {
    check_aligned(p, p.du, p.dy);
    FIEDLER_REQUIRE("mlp", is_aligned16(p.h));
}
std::int64_t rows_of(const MlpForward<bf16>& p) { return p.x.rows; }
std::int64_t rows_of(const MlpBackward<bf16>& p) { return p.dy.rows; }

// Fewer rows than this are not worth the sm_90 kernel's start, in which every block loads its panel of the weights.
constexpr std::int64_t kLeastRows = 256;

template <class P>
void run(const Cuda& dev, const P& p) {
    check_all(p);
    if (rows_of(p) == 0 || (rows_of(p) >= kLeastRows && try_sm90(dev, p))) return;
    general(dev, p);
}
template <class P>
bool run_by_path(const Cuda& dev, const P& p, MlpPath path) {
    check_all(p);
    if (rows_of(p) == 0) return false;
    if (path == MlpPath::sm90) return try_sm90(dev, p);
    general(dev, p);
    return true;
}

}  // namespace

void mlp_forward(const Cuda& dev, const MlpForward<bf16>& p) { run(dev, p); }
void mlp_backward(const Cuda& dev, const MlpBackward<bf16>& p) { run(dev, p); }
bool mlp_by_path(const Cuda& dev, const MlpForward<bf16>& p, MlpPath path) { return run_by_path(dev, p, path); }
bool mlp_by_path(const Cuda& dev, const MlpBackward<bf16>& p, MlpPath path) { return run_by_path(dev, p, path); }

}  // namespace fiedler
