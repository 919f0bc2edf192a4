// kernels/rotary.cu: per-head RMS norm and rotary position embedding (see rotary.h).
//
// D / 16 threads share a token: each holds 8 neighbouring angles, and the 8 + 8 values of a head that they turn. Angles
// are computed once and serve all heads.
#include <cmath>

#include "kernels/common.cuh"
#include "kernels/rotary.h"

namespace fiedler {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxHalf = 64;

// theta^(-2d/D), rounded once: an error here grows with the position.
struct Frequencies {
    float value[kMaxHalf];
};
Frequencies inverse_frequencies(std::int64_t width, double theta) {
    Frequencies f{};
    for (std::int64_t d = 0; d < width / 2; ++d) f.value[d] = float(std::pow(theta, -2.0 * double(d) / double(width)));
    return f;
}

// A thread's share of one head, in f32: values [8 part, 8 part + 8) of the lower and of the upper half.
struct Share {
    float lower[8], upper[8];
};
__device__ inline Share load_share(const bf16* head, int part, int half) {
    const auto* x = reinterpret_cast<const nv_bf16*>(head) + part * 8;
    const auto lower = load16(x), upper = load16(x + half);
    Share s;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        s.lower[i] = to_float(lower.v[i]);
        s.upper[i] = to_float(upper.v[i]);
    }
    return s;
}
__device__ inline void store_share(bf16* head, int part, int half, const Share& s) {
    auto* y = reinterpret_cast<nv_bf16*>(head) + part * 8;
    Pack<nv_bf16> lower, upper;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        lower.v[i] = from_float<nv_bf16>(s.lower[i]);
        upper.v[i] = from_float<nv_bf16>(s.upper[i]);
    }
    store16(y, lower);
    store16(y + half, upper);
}

// Sum over the kLanes neighbouring threads of one token; those of other tokens may have left.
template <int kLanes>
__device__ float sum_of_token(float x) {
    const unsigned token_lanes = ((1u << kLanes) - 1u) << (threadIdx.x % kWarp / kLanes * kLanes);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(token_lanes, x, step);
    return x;
}
template <int kLanes>
__device__ float product_of_token(const Share& x, const Share& y) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x.lower[i], y.lower[i], fmaf(x.upper[i], y.upper[i], sum));
    return sum_of_token<kLanes>(sum);
}

// The eight angles of one thread.
struct Turn {
    float cosine[8], sine[8];
    __device__ Turn(const Frequencies& f, int part, int position, bool rotate) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            cosine[i] = 1.f;
            sine[i] = 0.f;
            if (rotate) sincosf(float(position) * f.value[part * 8 + i], &sine[i], &cosine[i]);
        }
    }
    __device__ void forward(Share& s) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float lower = s.lower[i], upper = s.upper[i];
            s.lower[i] = fmaf(lower, cosine[i], upper * sine[i]);
            s.upper[i] = fmaf(upper, cosine[i], -lower * sine[i]);
        }
    }
    __device__ void backward(Share& s) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float lower = s.lower[i], upper = s.upper[i];
            s.lower[i] = fmaf(lower, cosine[i], -upper * sine[i]);
            s.upper[i] = fmaf(upper, cosine[i], lower * sine[i]);
        }
    }
};

// Which token a thread works on, and which part of its heads.
template <int D>
struct Place {
    std::int64_t token;
    int part;
    __device__ Place() {
        constexpr int lanes = D / 16;
        const std::int64_t at = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
        token = at / lanes;
        part = int(at % lanes);
    }
};

template <int D>
__global__ void __launch_bounds__(kThreads) forward_kernel(const RotaryForward<bf16> p, const Frequencies f) {
    const Place<D> at;
    if (at.token >= p.x.rows) return;
    const int token = int(at.token);
    const Turn turn(f, at.part, token - p.seq.first(token) + p.position_offset, p.rotate);
    const bf16* x = p.x.data + at.token * p.x.ld;
    bf16* y = p.y.data + at.token * p.y.ld;
    for (int head = 0; head < p.heads; ++head, x += D, y += D) {
        Share s = load_share(x, at.part, D / 2);
        if (p.normalise) {
            const float r = rsqrtf(product_of_token<D / 16>(s, s) * (1.f / D) + p.eps);
#pragma unroll
            for (int i = 0; i < 8; ++i) s.lower[i] *= r, s.upper[i] *= r;
        }
        turn.forward(s);
        store_share(y, at.part, D / 2, s);
    }
}

template <int D>
__global__ void __launch_bounds__(kThreads) backward_kernel(const RotaryBackward<bf16> p, const Frequencies f) {
    const Place<D> at;
    if (at.token >= p.x.rows) return;
    const int token = int(at.token);
    const Turn turn(f, at.part, token - p.seq.first(token) + p.position_offset, p.rotate);
    const bf16 *x = p.x.data + at.token * p.x.ld, *dy = p.dy.data + at.token * p.dy.ld;
    bf16* dx = p.dx.data + at.token * p.dx.ld;
    for (int head = 0; head < p.heads; ++head, x += D, dy += D, dx += D) {
        Share g = load_share(dy, at.part, D / 2);
        turn.backward(g);
        if (p.normalise) {
            const Share s = load_share(x, at.part, D / 2);
            const float r = rsqrtf(product_of_token<D / 16>(s, s) * (1.f / D) + p.eps);
            const float share = r * r * product_of_token<D / 16>(g, s) * (1.f / D);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                g.lower[i] = r * fmaf(-share, s.lower[i], g.lower[i]);
                g.upper[i] = r * fmaf(-share, s.upper[i], g.upper[i]);
            }
        }
        store_share(dx, at.part, D / 2, g);
    }
}

template <int D>
struct Width {
    static constexpr int value = D;
};
// body(Width<D>{}, blocks) for the width of a head.
template <class P, class Body>
void for_width(const P& p, Body&& body) {
    const auto launch = [&](auto width) {
        const std::int64_t threads = p.x.rows * (decltype(width)::value / 16);
        body(width, unsigned(ceil_div(threads, std::int64_t(kThreads))));
    };
    switch (p.x.cols / p.heads) {
        case 16:
            return launch(Width<16>{});
        case 32:
            return launch(Width<32>{});
        case 64:
            return launch(Width<64>{});
        case 128:
            return launch(Width<128>{});
        default:
            contract_failed("rotary", "the width of a head is 16, 32, 64 or 128");
    }
}

}  // namespace

void rotary_forward(const Cuda& cuda, const RotaryForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("rotary", is_aligned16(p.x) && is_aligned16(p.y));
    const Frequencies f = inverse_frequencies(p.x.cols / p.heads, p.theta);
    for_width(p, [&](auto width, unsigned blocks) {
        forward_kernel<decltype(width)::value><<<blocks, kThreads, 0, stream_of(cuda)>>>(p, f);
        LAUNCH_CHECK("rotary_forward");
    });
}

void rotary_backward(const Cuda& cuda, const RotaryBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("rotary", is_aligned16(p.x) && is_aligned16(p.dy) && is_aligned16(p.dx));
    const Frequencies f = inverse_frequencies(p.x.cols / p.heads, p.theta);
    for_width(p, [&](auto width, unsigned blocks) {
        backward_kernel<decltype(width)::value><<<blocks, kThreads, 0, stream_of(cuda)>>>(p, f);
        LAUNCH_CHECK("rotary_backward");
    });
}

}  // namespace fiedler
