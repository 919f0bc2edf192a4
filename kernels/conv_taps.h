// kernels/conv_taps.h: what conv and conv_rotary share on the CPU. The weights are turned to [4][channels], so that the
// inner loops run over channels and vectorise; terms outside a sequence read a row of zeros.
#pragma once
#include <vector>

#include "kernels/packed.h"
#include "kernels/view.h"

namespace fiedler::taps {

constexpr std::int64_t kTaps = 4;

template <class T>
std::vector<T> by_tap(const Mat<const T>& w) {
    std::vector<T> r(static_cast<std::size_t>(kTaps * w.rows));
    for (std::int64_t c = 0; c < w.rows; ++c)
        for (std::int64_t k = 0; k < kTaps; ++k) r[static_cast<std::size_t>(k * w.rows + c)] = w.row(c)[k];
    return r;
}
template <class T>
void add_by_tap(const Mat<T>& dw, const std::vector<T>& sums) {
    for (std::int64_t c = 0; c < dw.rows; ++c)
        for (std::int64_t k = 0; k < kTaps; ++k) dw.row(c)[k] += sums[static_cast<std::size_t>(k * dw.rows + c)];
}

template <class T>
using Rows = const T* [kTaps];

// rows[o] = the row o tokens before token i, or zeros where that lies before its sequence.
template <class T>
void rows_before(Rows<T>& rows, const Mat<const T>& x, const Packed& seq, std::int64_t i, const T* zeros) {
    const std::int64_t first = seq.first(static_cast<std::int32_t>(i));
    for (std::int64_t o = 0; o < kTaps; ++o) rows[o] = i - o >= first ? x.row(i - o) : zeros;
}

// out_c = sum_o w_{3-o, c} rows[o]_c for c < count, w by tap
template <class T>
void weighted_sum(T* __restrict__ out, const Rows<T>& rows, const T* __restrict__ w, std::int64_t channels,
                  std::int64_t count) {
    const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const T *w0 = w, *w1 = w + channels, *w2 = w1 + channels, *w3 = w2 + channels;
    for (std::int64_t c = 0; c < count; ++c) out[c] = w3[c] * r0[c] + w2[c] * r1[c] + w1[c] * r2[c] + w0[c] * r3[c];
}

// One token's terms of dw, by tap: sums_{3-o, c} += dy_c rows[o]_c, rows as rows_before gives them.
template <class T>
void add_terms(T* sums, const T* dy, const Rows<T>& rows, std::int64_t channels) {
    for (std::int64_t o = 0; o < kTaps; ++o) {
        T* __restrict__ sum = sums + (kTaps - 1 - o) * channels;
        for (std::int64_t c = 0; c < channels; ++c) sum[c] += dy[c] * rows[o][c];
    }
}

}  // namespace fiedler::taps
