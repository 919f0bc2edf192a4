// kernels/rotary_turn.h: what rotary and conv_rotary share on the CPU: angles, and the norm and rotation of one head.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace fiedler::turning {

// theta^(-2d/D)
inline double inverse_frequency(std::int64_t d, std::int64_t width, double theta) {
    return std::pow(theta, -2.0 * double(d) / double(width));
}

// Those of d < D/2, computed in double whatever T is.
template <class T>
std::vector<T> inverse_frequencies(std::int64_t width, double theta) {
    std::vector<T> f(static_cast<std::size_t>(width / 2));
    for (std::size_t d = 0; d < f.size(); ++d) f[d] = T(inverse_frequency(std::int64_t(d), width, theta));
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

// p: the arguments of a kernel, for `normalise` and `eps`. y may alias x, dx may alias dy.
template <class P, class T>
void forward_head(const P& p, const T* x, T* y, std::int64_t half, const T* cosine, const T* sine) {
    const T r = p.normalise ? inverse_rms(x, 2 * half, p.eps) : T(1);
    for (std::int64_t d = 0; d < half; ++d) {
        const T lower = r * x[d], upper = r * x[d + half];
        y[d] = lower * cosine[d] + upper * sine[d];
        y[d + half] = upper * cosine[d] - lower * sine[d];
    }
}
template <class P, class T>
void backward_head(const P& p, const T* dy, const T* x, T* dx, std::int64_t half, const T* cosine, const T* sine) {
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

}  // namespace fiedler::turning
