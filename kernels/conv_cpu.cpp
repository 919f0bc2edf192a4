// kernels/conv_cpu.cpp: causal depthwise convolution on the CPU (see conv.h). The weights are turned to [4][channels],
// so that the inner loops run over channels and vectorise; terms outside a sequence read a row of zeros.
#include <algorithm>
#include <vector>

#include "kernels/conv.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

constexpr std::int64_t kTaps = 4, kTokensPerTask = 64;

template <class T>
std::vector<T> by_tap(const Mat<const T>& w) {
    std::vector<T> r(static_cast<std::size_t>(kTaps * w.rows));
    for (std::int64_t c = 0; c < w.rows; ++c)
        for (std::int64_t k = 0; k < kTaps; ++k) r[static_cast<std::size_t>(k * w.rows + c)] = w.row(c)[k];
    return r;
}

// out_c = sum_o w_{3-o, c} rows[o]_c, w by tap
template <class T>
void weighted_sum(T* __restrict__ out, const T* const (&rows)[kTaps], const T* __restrict__ w, std::int64_t channels) {
    const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const T *w0 = w, *w1 = w + channels, *w2 = w1 + channels, *w3 = w2 + channels;
    for (std::int64_t c = 0; c < channels; ++c) out[c] = w3[c] * r0[c] + w2[c] * r1[c] + w1[c] * r2[c] + w0[c] * r3[c];
}

template <class Body>
void for_tokens(const Cpu& dev, std::int64_t tokens, Body&& body) {
    parallel_for(dev, (tokens + kTokensPerTask - 1) / kTokensPerTask, [&](std::int64_t task) {
        const std::int64_t last = std::min(tokens, (task + 1) * kTokensPerTask);
        for (std::int64_t i = task * kTokensPerTask; i < last; ++i) body(i);
    });
}

// rows[o] = the row o tokens before token i, or zeros where that lies before its sequence.
template <class T>
void rows_before(const T* (&rows)[kTaps], const Mat<const T>& x, const Packed& seq, std::int64_t i, const T* zeros) {
    const std::int64_t first = seq.first(static_cast<std::int32_t>(i));
    for (std::int64_t o = 0; o < kTaps; ++o) rows[o] = i - o >= first ? x.row(i - o) : zeros;
}

}  // namespace

template <class T>
void conv_forward(const Cpu& dev, const ConvForward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols;
    const std::vector<T> w = by_tap(p.w), zeros(static_cast<std::size_t>(channels), T(0));
    for_tokens(dev, p.x.rows, [&](std::int64_t i) {
        const T* rows[kTaps];
        rows_before(rows, p.x, p.seq, i, zeros.data());
        weighted_sum(p.y.row(i), rows, w.data(), channels);
    });
}

template <class T>
void conv_backward(const Cpu& dev, const ConvBackward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols;
    const std::vector<T> w = by_tap(p.w), zeros(static_cast<std::size_t>(channels), T(0));
    for_tokens(dev, p.x.rows, [&](std::int64_t j) {
        const std::int64_t last = p.seq.last(static_cast<std::int32_t>(j));
        const T* rows[kTaps];
        for (std::int64_t o = 0; o < kTaps; ++o) rows[o] = j + o < last ? p.dy.row(j + o) : zeros.data();
        weighted_sum(p.dx.row(j), rows, w.data(), channels);
    });

    std::vector<T> dw(w.size(), T(0));
    sum_over_rows(dev, p.x.rows, kTaps * channels, dw.data(), [&](std::int64_t first, std::int64_t last, T* partial) {
        for (std::int64_t i = first; i < last; ++i) {
            const T *rows[kTaps], *dy = p.dy.row(i);
            rows_before(rows, p.x, p.seq, i, zeros.data());
            for (std::int64_t o = 0; o < kTaps; ++o) {
                T* __restrict__ sum = partial + (kTaps - 1 - o) * channels;
                for (std::int64_t c = 0; c < channels; ++c) sum[c] += dy[c] * rows[o][c];
            }
        }
    });
    for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t k = 0; k < kTaps; ++k) p.dw.row(c)[k] += dw[static_cast<std::size_t>(k * channels + c)];
}

template void conv_forward(const Cpu&, const ConvForward<float>&);
template void conv_forward(const Cpu&, const ConvForward<double>&);
template void conv_backward(const Cpu&, const ConvBackward<float>&);
template void conv_backward(const Cpu&, const ConvBackward<double>&);

}  // namespace fiedler
