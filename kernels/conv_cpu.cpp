// kernels/conv_cpu.cpp: causal depthwise convolution on the CPU (see conv.h).
#include <algorithm>
#include <vector>

#include "kernels/conv.h"
#include "kernels/conv_taps.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

using namespace taps;
constexpr std::int64_t kTokensPerTask = 64;

template <class Body>
void for_tokens(const Cpu& dev, std::int64_t tokens, Body&& body) {
    parallel_for(dev, (tokens + kTokensPerTask - 1) / kTokensPerTask, [&](std::int64_t task) {
        const std::int64_t last = std::min(tokens, (task + 1) * kTokensPerTask);
        for (std::int64_t i = task * kTokensPerTask; i < last; ++i) body(i);
    });
}

}  // namespace

template <class T>
void conv_forward(const Cpu& dev, const ConvForward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols;
    const std::vector<T> w = by_tap(p.w), zeros(static_cast<std::size_t>(channels), T(0));
    for_tokens(dev, p.x.rows, [&](std::int64_t i) {
        Rows<T> rows;
        rows_before(rows, p.x, p.seq, i, zeros.data());
        weighted_sum(p.y.row(i), rows, w.data(), channels, channels);
    });
}

template <class T>
void conv_backward(const Cpu& dev, const ConvBackward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols;
    const std::vector<T> w = by_tap(p.w), zeros(static_cast<std::size_t>(channels), T(0));
    for_tokens(dev, p.x.rows, [&](std::int64_t j) {
        const std::int64_t last = p.seq.last(static_cast<std::int32_t>(j));
        Rows<T> rows;
        for (std::int64_t o = 0; o < kTaps; ++o) rows[o] = j + o < last ? p.dy.row(j + o) : zeros.data();
        weighted_sum(p.dx.row(j), rows, w.data(), channels, channels);
    });

    std::vector<T> dw(w.size(), T(0));
    sum_over_rows(dev, p.x.rows, kTaps * channels, dw.data(), [&](std::int64_t first, std::int64_t last, T* partial) {
        for (std::int64_t i = first; i < last; ++i) {
            Rows<T> rows;
            rows_before(rows, p.x, p.seq, i, zeros.data());
            add_terms(partial, p.dy.row(i), rows, channels);
        }
    });
    add_by_tap(p.dw, dw);
}

template void conv_forward(const Cpu&, const ConvForward<float>&);
template void conv_forward(const Cpu&, const ConvForward<double>&);
template void conv_backward(const Cpu&, const ConvBackward<float>&);
template void conv_backward(const Cpu&, const ConvBackward<double>&);

}  // namespace fiedler
