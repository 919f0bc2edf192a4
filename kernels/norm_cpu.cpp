// kernels/norm_cpu.cpp: RMS normalisation on the CPU (see norm.h). One task per row.
#include <cmath>

#include "kernels/norm.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

// sum_i a_i b_i in a fixed number of interleaved partial sums, which the compiler keeps in vector registers.
template <class T>
T dot(const T* a, const T* b, std::int64_t n) {
    constexpr int kLanes = 16;
    T lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int k = 0; k < kLanes; ++k) lanes[k] += a[i + k] * b[i + k];
    for (int k = 0; i < n; ++i, ++k) lanes[k] += a[i] * b[i];
    T sum = 0;
    for (const T lane : lanes) sum += lane;
    return sum;
}

}  // namespace

template <class T>
void norm_forward(const Cpu& dev, const NormForward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols;
    parallel_for(dev, p.x.rows, [&](std::int64_t i) {
        const T* __restrict__ x = p.x.row(i);
        T* __restrict__ y = p.y.row(i);
        const T r = T(1) / std::sqrt(dot(x, x, channels) / T(channels) + p.eps);
        p.rstd.data[i] = r;
        for (std::int64_t c = 0; c < channels; ++c) y[c] = x[c] * r;
    });
}

template <class T>
void norm_backward(const Cpu& dev, const NormBackward<T>& p) {
    check(p);
    const std::int64_t channels = p.x.cols;
    parallel_for(dev, p.x.rows, [&](std::int64_t i) {
        const T *x = p.x.row(i), *dy = p.dy.row(i);
        T* dx = p.dx.row(i);  // may be dy or dresidual, element for element
        const T r = p.rstd.data[i], along_x = r * r * r * (dot(dy, x, channels) / T(channels));
        if (p.dresidual) {
            const T* dresidual = p.dresidual.row(i);
            for (std::int64_t c = 0; c < channels; ++c) dx[c] = dresidual[c] + (r * dy[c] - along_x * x[c]);
        } else {
            for (std::int64_t c = 0; c < channels; ++c) dx[c] = r * dy[c] - along_x * x[c];
        }
    });
}

template void norm_forward(const Cpu&, const NormForward<float>&);
template void norm_forward(const Cpu&, const NormForward<double>&);
template void norm_backward(const Cpu&, const NormBackward<float>&);
template void norm_backward(const Cpu&, const NormBackward<double>&);

}  // namespace fiedler
