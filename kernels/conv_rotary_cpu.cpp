// kernels/conv_rotary_cpu.cpp: convolution, norm and rotation in one pass on the CPU (see conv_rotary.h). Forward turns
// each row right after its convolution. Backward holds dm of a window of tokens and the three after it.
#include <algorithm>
#include <vector>

#include "kernels/conv_rotary.h"
#include "kernels/conv_taps.h"
#include "kernels/parallel.h"
#include "kernels/rotary_turn.h"

namespace fiedler {
namespace {

using namespace taps;
using namespace turning;
constexpr std::int64_t kWindow = 64;  // tokens

// body(head's first column, cosine, sine) for each head of token i that is turned.
template <class T>
struct Turner {
    std::int64_t half, turned;
    std::vector<T> frequency;
    bool rotate;

    template <class P>
    explicit Turner(const P& p)
        : half(p.x.cols / p.heads / 2),
          turned(p.turned),
          frequency(inverse_frequencies<T>(2 * half, double(p.theta))),
          rotate(p.rotate) {}
    std::int64_t columns() const { return turned * 2 * half; }
    template <class Body>
    void for_heads(const Packed& seq, std::int64_t i, T* angles, Body&& body) const {
        token_angles(frequency, i - seq.first(static_cast<std::int32_t>(i)), rotate, angles, angles + half);
        for (std::int64_t h = 0; h < turned; ++h) body(h * 2 * half, angles, angles + half);
    }
};

template <class T>
std::vector<T> values(std::int64_t n) {
    return std::vector<T>(static_cast<std::size_t>(n), T(0));
}

// The first `count` columns of m of token i; w by tap.
template <class T, class P>
void convolve_row(T* m, const P& p, std::int64_t i, const T* w, const T* zeros, std::int64_t count) {
    Rows<T> rows;
    rows_before(rows, p.x, p.seq, i, zeros);
    weighted_sum(m, rows, w, p.x.cols, count);
}

// dm of token i; m: room for one row.
template <class T>
void gradient_row(T* dm, const ConvRotaryBackward<T>& p, const Turner<T>& turner, std::int64_t i, const T* w,
                  const T* zeros, T* m, T* angles) {
    const T* dy = p.dy.row(i);
    if (p.normalise) convolve_row(m, p, i, w, zeros, turner.columns());
    turner.for_heads(p.seq, i, angles, [&](std::int64_t at, const T* cosine, const T* sine) {
        backward_head(p, dy + at, m + at, dm + at, turner.half, cosine, sine);
    });
    std::copy(dy + turner.columns(), dy + p.x.cols, dm + turner.columns());
}

}  // namespace

template <class T>
void conv_rotary_forward(const Cpu& dev, const ConvRotaryForward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols, tokens = p.x.rows;
    const Turner<T> turner(p);
    const std::vector<T> w = by_tap(p.w), zeros = values<T>(channels);
    parallel_for(dev, (tokens + kWindow - 1) / kWindow, [&](std::int64_t task) {
        std::vector<T> angles = values<T>(2 * turner.half);
        for (std::int64_t i = task * kWindow; i < std::min(tokens, (task + 1) * kWindow); ++i) {
            T* y = p.y.row(i);
            convolve_row(y, p, i, w.data(), zeros.data(), channels);
            turner.for_heads(p.seq, i, angles.data(), [&](std::int64_t at, const T* cosine, const T* sine) {
                forward_head(p, y + at, y + at, turner.half, cosine, sine);
            });
        }
    });
}

template <class T>
void conv_rotary_backward(const Cpu& dev, const ConvRotaryBackward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols, tokens = p.x.rows;
    const Turner<T> turner(p);
    const std::vector<T> w = by_tap(p.w), zeros = values<T>(channels);
    std::vector<T> dw = values<T>(kTaps * channels);
    sum_over_rows(dev, tokens, kTaps * channels, dw.data(), [&](std::int64_t first, std::int64_t last, T* partial) {
        std::vector<T> memory = values<T>((kWindow + kTaps) * channels + 2 * turner.half);
        T *m = memory.data(), *dm = m + channels, *angles = dm + (kWindow + kTaps - 1) * channels;
        for (std::int64_t begin = first; begin < last; begin += kWindow) {
            const std::int64_t end = std::min(last, begin + kWindow);
            for (std::int64_t i = begin; i < std::min(tokens, end + kTaps - 1); ++i)
                gradient_row(dm + (i - begin) * channels, p, turner, i, w.data(), zeros.data(), m, angles);
            for (std::int64_t j = begin; j < end; ++j) {
                const T* row = dm + (j - begin) * channels;
                const std::int64_t after = p.seq.last(static_cast<std::int32_t>(j));
                Rows<T> rows;
                for (std::int64_t o = 0; o < kTaps; ++o) rows[o] = j + o < after ? row + o * channels : zeros.data();
                weighted_sum(p.dx.row(j), rows, w.data(), channels, channels);
                rows_before(rows, p.x, p.seq, j, zeros.data());
                add_terms(partial, row, rows, channels);
            }
        }
    });
    add_by_tap(p.dw, dw);
}

template void conv_rotary_forward(const Cpu&, const ConvRotaryForward<float>&);
template void conv_rotary_forward(const Cpu&, const ConvRotaryForward<double>&);
template void conv_rotary_backward(const Cpu&, const ConvRotaryBackward<float>&);
template void conv_rotary_backward(const Cpu&, const ConvRotaryBackward<double>&);

}  // namespace fiedler
