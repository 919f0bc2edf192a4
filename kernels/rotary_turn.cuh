// kernels/rotary_turn.cuh: what rotary and conv_rotary share on the GPU. A thread's share of one head is N neighbouring
// values of its lower half, then the N of the upper half that turn with them: 2 N numbers in f32. Threads that share a
// head are neighbours in a warp.
#pragma once
#include "kernels/common.cuh"
#include "kernels/rotary_turn.h"

namespace fiedler::turning {

constexpr int kMaxHalf = 64;

// theta^(-2d/D), rounded once: an error here grows with the position.
struct Frequencies {
    float value[kMaxHalf];
};
inline Frequencies frequencies(std::int64_t width, double theta) {
    Frequencies f{};
    for (std::int64_t d = 0; d < width / 2; ++d) f.value[d] = float(inverse_frequency(d, width, theta));
    return f;
}

// The sum of x y over a head, which kLanes threads share. mask: the threads of the warp that take part.
template <int kLanes, int N>
__device__ float product_of_head(const float (&x)[N], const float (&y)[N], unsigned mask) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sum = fmaf(x[i], y[i], fmaf(x[i + N / 2], y[i + N / 2], sum));
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
    return sum;
}

template <int N>
__device__ void turn(float (&x)[2 * N], const float (&cosine)[N], const float (&sine)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float lower = x[i], upper = x[i + N];
        x[i] = fmaf(lower, cosine[i], upper * sine[i]);
        x[i + N] = fmaf(upper, cosine[i], -lower * sine[i]);
    }
}
template <int N>
__device__ void turn_back(float (&x)[2 * N], const float (&cosine)[N], const float (&sine)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float lower = x[i], upper = x[i + N];
        x[i] = fmaf(lower, cosine[i], -upper * sine[i]);
        x[i + N] = fmaf(upper, cosine[i], lower * sine[i]);
    }
}

// squares: the sum of x^2 over a head of D.
template <int D>
__device__ float inverse_rms_of_head(float squares, float eps) {
    return rsqrtf(squares * (1.f / D) + eps);
}
// Through the norm: g = r (g - x r^2 mean(g x)); along: the sum of g x over the head.
template <int D, int N>
__device__ void normalise_back(float (&g)[N], const float (&x)[N], float r, float along) {
    const float share = r * r * along * (1.f / D);
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = r * fmaf(-share, x[i], g[i]);
}

template <int D>
struct Width {
    static constexpr int value = D;
};
// body(Width<D>{}) for the width of a head.
template <class Body>
void for_width(const char* family, std::int64_t width, Body&& body) {
    switch (width) {
        case 16:
            return body(Width<16>{});
        case 32:
            return body(Width<32>{});
        case 64:
            return body(Width<64>{});
        case 128:
            return body(Width<128>{});
        default:
            contract_failed(family, "the width of a head is 16, 32, 64 or 128");
    }
}

}  // namespace fiedler::turning
