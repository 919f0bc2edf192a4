// kernels/dropout.cu: dropout (see dropout.h). A thread takes kPacks accesses of 16 bytes, a block apart; matrices that
// do not allow them go element by element.
#include "kernels/common.cuh"
#include "kernels/dropout.h"

namespace fiedler {
namespace {

constexpr int kThreads = 256, kPacks = 4;

template <class T>
struct Args {
    T* y;
    const T* x;
    const std::uint64_t* seed;
    std::uint64_t stream;
    std::int64_t ld_y, ld_x, count;  // count: accesses
    unsigned per_row;                // accesses
    unsigned threshold;
    float scale;
};

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads) void dropout_kernel(Args<T> a) {
    const std::uint64_t start = rng::stream_start(*a.seed, a.stream);
    const std::int64_t first = std::int64_t(blockIdx.x) * (kThreads * kPacks) + threadIdx.x;
    T values[kPacks][kWidth];
    std::int64_t out[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const std::int64_t i = first + k * kThreads;
        if (i >= a.count) continue;
        const std::int64_t row = a.count <= UINT32_MAX ? unsigned(i) / a.per_row : i / a.per_row;
        const std::int64_t column = (i - row * a.per_row) * kWidth;
        out[k] = row * a.ld_y + column;
        const T* x = a.x + row * a.ld_x + column;
        if constexpr (kWidth == 1)
            values[k][0] = *x;
        else
            *reinterpret_cast<Pack<T>*>(values[k]) = load16(x);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
        const std::int64_t i = first + k * kThreads;
        if (i >= a.count) break;
        const auto element = static_cast<std::uint64_t>(i) * kWidth;
        std::uint64_t four = rng::member(start, element / 4);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
            if (e == 4) four = rng::member(start, element / 4 + 1);
            const unsigned which = kWidth == 1 ? unsigned(element % 4) : unsigned(e % 4);
            const bool kept = dropout_draw(four, which) >= a.threshold;
            values[k][e] = from_float<T>(kept ? to_float(values[k][e]) * a.scale : 0.f);
        }
        if constexpr (kWidth == 1)
            a.y[out[k]] = values[k][0];
        else
            store16(a.y + out[k], *reinterpret_cast<const Pack<T>*>(values[k]));
    }
}

template <class S, class T>
void run(const Cuda& dev, const Dropout<S>& p, T* y, const T* x) {
    check(p);
    if (p.x.rows == 0 || p.x.cols == 0) return;
    constexpr int kWidth = Pack<T>::size;
    const bool fast = p.x.cols % kWidth == 0 && is_aligned16(p.x) && is_aligned16(p.y);
    const std::int64_t per_row = fast ? p.x.cols / kWidth : p.x.cols;
    const std::int64_t blocks = ceil_div(p.x.rows * per_row, std::int64_t(kThreads * kPacks));
    FIEDLER_REQUIRE("dropout", per_row <= UINT32_MAX && blocks <= INT32_MAX);
    const std::uint32_t threshold = dropout_threshold(p.p);
    const Args<T> a{y,
                    x,
                    p.seed.data,
                    p.stream,
                    p.y.ld,
                    p.x.ld,
                    p.x.rows * per_row,
                    unsigned(per_row),
                    threshold,
                    dropout_scale<float>(threshold)};
    if (fast)
        dropout_kernel<T, kWidth><<<unsigned(blocks), kThreads, 0, stream_of(dev)>>>(a);
    else
        dropout_kernel<T, 1><<<unsigned(blocks), kThreads, 0, stream_of(dev)>>>(a);
    LAUNCH_CHECK("dropout");
}

}  // namespace

void dropout(const Cuda& dev, const Dropout<bf16>& p) { run(dev, p, nv(p.y.data), nv(p.x.data)); }
void dropout(const Cuda& dev, const Dropout<float>& p) { run(dev, p, p.y.data, p.x.data); }

}  // namespace fiedler
