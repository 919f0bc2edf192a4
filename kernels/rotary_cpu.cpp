// kernels/rotary_cpu.cpp: per-head RMS norm and rotary position embedding on the CPU (see rotary.h).
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/parallel.h"
#include "kernels/rotary.h"

namespace fiedler {
namespace {

// theta^(-2d/D) for d < D/2, computed in double whatever T is.
template <class T>
std::vector<T> inverse_frequencies(std::int64_t width, double theta) {
    std::vector<T> f(static_cast<std::size_t>(width / 2));
    for (std::size_t d = 0; d < f.size(); ++d) f[d] = T(std::pow(theta, -2.0 * double(d) / double(width)));
    return f;
}

// cos and sin of one token's angles; the identity when there is no rotation.
template <class T>
void token_angles(const std::vector<T>& frequency, std::int64_t position, bool rotate, T* cosine, T* sine) {
    for (std::size_t d = 0; d < frequency.size(); ++d) {
        const T angle = T(position) * frequency[d];
        cosine[d] = rotate ? std::cos(angle) : T(1);
        sine[d] = rotate ? std::sin(angle) : T(0);
    }
}

template <class T>
T inverse_rms(const T* x, std::int64_t width, T eps) {
    T sum = 0;
    for (std::int64_t d = 0; d < width; ++d) sum += x[d] * x[d];
    return T(1) / std::sqrt(sum / T(width) + eps);
}

template <class T>
void forward_head(const RotaryForward<T>& p, const T* x, T* y, std::int64_t half, const T* cosine, const T* sine) {
    const T r = p.normalise ? inverse_rms(x, 2 * half, p.eps) : T(1);
    for (std::int64_t d = 0; d < half; ++d) {
        const T lower = r * x[d], upper = r * x[d + half];
        y[d] = lower * cosine[d] + upper * sine[d];
        y[d + half] = upper * cosine[d] - lower * sine[d];
    }
}

template <class T>
void backward_head(const RotaryBackward<T>& p, const T* dy, const T* x, T* dx, std::int64_t half, const T* cosine,
                   const T* sine) {
    const T r = p.normalise ? inverse_rms(x, 2 * half, p.eps) : T(1);
    T along = 0;
    for (std::int64_t d = 0; d < half; ++d) {
        const T lower = dy[d] * cosine[d] - dy[d + half] * sine[d];
        const T upper = dy[d] * sine[d] + dy[d + half] * cosine[d];
        along += lower * x[d] + upper * x[d + half];
        dx[d] = lower;
        dx[d + half] = upper;
    }
    if (!p.normalise) return;
    const T share = r * r * along / T(2 * half);
    for (std::int64_t d = 0; d < 2 * half; ++d) dx[d] = r * (dx[d] - x[d] * share);
}

// body(token, head, cosine, sine) for every token and head.
template <class T, class P, class Body>
void for_each_head(const Cpu& cpu, const P& p, Body&& body) {
    const std::int64_t half = p.x.cols / p.heads / 2;
    const std::vector<T> frequency = inverse_frequencies<T>(2 * half, double(p.theta));
    constexpr std::int64_t kTokens = 32;
    parallel_for(cpu, (p.x.rows + kTokens - 1) / kTokens, [&](std::int64_t chunk) {
        std::vector<T> angles(static_cast<std::size_t>(2 * half));
        T *cosine = angles.data(), *sine = cosine + half;
        for (std::int64_t i = chunk * kTokens; i < std::min(p.x.rows, (chunk + 1) * kTokens); ++i) {
            const std::int64_t position = i - p.seq.first(std::int32_t(i)) + std::int64_t(p.position_offset);
            token_angles(frequency, position, p.rotate, cosine, sine);
            for (std::int64_t h = 0; h < p.heads; ++h) body(i, h, cosine, sine);
        }
    });
}

}  // namespace

template <class T>
void rotary_forward(const Cpu& cpu, const RotaryForward<T>& p) {
    check(p);
    const std::int64_t width = p.x.cols / p.heads;
    for_each_head<T>(cpu, p, [&](std::int64_t i, std::int64_t h, const T* cosine, const T* sine) {
        forward_head(p, p.x.row(i) + h * width, p.y.row(i) + h * width, width / 2, cosine, sine);
    });
}

template <class T>
void rotary_backward(const Cpu& cpu, const RotaryBackward<T>& p) {
    check(p);
    const std::int64_t width = p.x.cols / p.heads;
    for_each_head<T>(cpu, p, [&](std::int64_t i, std::int64_t h, const T* cosine, const T* sine) {
        const std::int64_t at = h * width;
        backward_head(p, p.dy.row(i) + at, p.x.row(i) + at, p.dx.row(i) + at, width / 2, cosine, sine);
    });
}

template void rotary_forward(const Cpu&, const RotaryForward<float>&);
template void rotary_forward(const Cpu&, const RotaryForward<double>&);
template void rotary_backward(const Cpu&, const RotaryBackward<float>&);
template void rotary_backward(const Cpu&, const RotaryBackward<double>&);

}  // namespace fiedler
