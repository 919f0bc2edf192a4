// kernels/rotary.cu: per-head RMS norm and rotary position embedding (see rotary.h).
//
// D / 16 threads share a head: each holds 8 neighbouring angles, and the 8 + 8 values of a head that they turn. Four of
// them or more, of neighbouring heads where D is small, share a token. Angles are computed once and serve all heads that
// a thread turns.
#include "kernels/common.cuh"
#include "kernels/rotary.h"
#include "kernels/rotary_turn.cuh"

namespace fiedler {
namespace {

using namespace turning;
constexpr int kHalf = 8;  // values of each half of a head in a thread
// Heads that are on their way from memory while one is turned; forward the next one is.
constexpr int kBackwardAhead = 2;
// Blocks: that fit on a multiprocessor at least.
constexpr int kThreads = 128, kForwardBlocks = 7, kBackwardBlocks = 4;
using Share = float[2 * kHalf];

// A thread's share of a head as it lies in memory: raw words, two bf16 to a register (a Pack may be spread over twice as
// many).
struct RawShare {
    uint4 lower, upper;
    __device__ void load(const bf16* head, int part, int half) {
        const auto* x = reinterpret_cast<const nv_bf16*>(head) + part * kHalf;
        lower = *reinterpret_cast<const uint4*>(x), upper = *reinterpret_cast<const uint4*>(x + half);
    }
    __device__ void unpack(Share& s) const {
        const unsigned words[kHalf] = {lower.x, lower.y, lower.z, lower.w, upper.x, upper.y, upper.z, upper.w};
#pragma unroll
        for (int i = 0; i < 2 * kHalf; ++i)
            s[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
};
__device__ inline void store_share(bf16* head, int part, int half, const Share& s) {
    auto* y = reinterpret_cast<nv_bf16*>(head) + part * kHalf;
    Pack<nv_bf16> lower, upper;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
        lower.v[i] = from_float<nv_bf16>(s[i]);
        upper.v[i] = from_float<nv_bf16>(s[i + kHalf]);
    }
    store16(y, lower);
    store16(y + half, upper);
}

// Sum over the D / 16 neighbouring threads of one head; those of others may have left.
template <int D>
__device__ float sum_of_head(const Share& x, const Share& y) {
    constexpr int lanes = D / 16;
    return product_of_head<lanes>(x, y, ((1u << lanes) - 1u) << (threadIdx.x % kWarp / lanes * lanes));
}

// The eight angles of one thread.
struct Angles {
    float cosine[kHalf], sine[kHalf];
    __device__ Angles(const Frequencies& f, int part, int position, bool rotate) {
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            cosine[i] = 1.f;
            sine[i] = 0.f;
            if (rotate) sincosf(float(position) * f.value[part * kHalf + i], &sine[i], &cosine[i]);
        }
    }
};

// Heads of a token that are turned at a time.
template <int D>
constexpr int kTogether = D < 64 ? 64 / D : 1;

// Which token a thread works on, which of its heads, `first` and every kTogether-th from there, and which part of them.
template <int D>
struct Place {
    std::int64_t token;
    int first, part;
    __device__ Place() {
        constexpr int lanes = D / 16;
        const std::int64_t at = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
        token = at / (lanes * kTogether<D>);
        first = int(at / lanes % kTogether<D>);
        part = int(at % lanes);
    }
};

template <int D>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    forward_kernel(const RotaryForward<bf16> p, const Frequencies f) {
    const Place<D> at;
    if (at.token >= p.x.rows || at.first >= p.heads) return;
    const bf16* x = p.x.data + at.token * p.x.ld + at.first * D;
    bf16* y = p.y.data + at.token * p.y.ld + at.first * D;
    constexpr int kNext = kTogether<D> * D;
    RawShare next;
    next.load(x, at.part, D / 2);
    const int token = int(at.token);
    const Angles angles(f, at.part, token - p.seq.first(token) + p.position_offset, p.rotate);
    for (int head = at.first; head < p.heads; head += kTogether<D>, x += kNext, y += kNext) {
        Share s;
        next.unpack(s);
        if (head + kTogether<D> < p.heads) next.load(x + kNext, at.part, D / 2);
        if (p.normalise) {
            const float r = inverse_rms_of_head<D>(sum_of_head<D>(s, s), p.eps);
#pragma unroll
            for (int i = 0; i < 2 * kHalf; ++i) s[i] *= r;
        }
        turn(s, angles.cosine, angles.sine);
        store_share(y, at.part, D / 2, s);
    }
}

template <int D>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    backward_kernel(const RotaryBackward<bf16> p, const Frequencies f) {
    const Place<D> at;
    if (at.token >= p.x.rows || at.first >= p.heads) return;
    const bf16* x = p.x.data + at.token * p.x.ld + at.first * D;
    const bf16* dy = p.dy.data + at.token * p.dy.ld + at.first * D;
    bf16* dx = p.dx.data + at.token * p.dx.ld + at.first * D;
    constexpr int kNext = kTogether<D> * D;
    // Heads on their way, beside the one at hand.
    RawShare next_dy[kBackwardAhead], next_x[kBackwardAhead] = {};
#pragma unroll
    for (int n = 0; n < kBackwardAhead; ++n)
        if (at.first + n * kTogether<D> < p.heads) {
            next_dy[n].load(dy + n * kNext, at.part, D / 2);
            if (p.normalise) next_x[n].load(x + n * kNext, at.part, D / 2);
        }
    const int token = int(at.token);
    const Angles angles(f, at.part, token - p.seq.first(token) + p.position_offset, p.rotate);
    for (int head = at.first; head < p.heads;) {
#pragma unroll
        for (int n = 0; n < kBackwardAhead; ++n) {
            if (head >= p.heads) return;
            Share g, s;
            next_dy[n].unpack(g);
            next_x[n].unpack(s);
            if (head + kBackwardAhead * kTogether<D> < p.heads) {
                next_dy[n].load(dy + kBackwardAhead * kNext, at.part, D / 2);
                if (p.normalise) next_x[n].load(x + kBackwardAhead * kNext, at.part, D / 2);
            }
            turn_back(g, angles.cosine, angles.sine);
            if (p.normalise) {
                const float r = inverse_rms_of_head<D>(sum_of_head<D>(s, s), p.eps);
                normalise_back<D>(g, s, r, sum_of_head<D>(g, s));
            }
            store_share(dx, at.part, D / 2, g);
            head += kTogether<D>, x += kNext, dy += kNext, dx += kNext;
        }
    }
}

template <class P>
unsigned blocks_for(const P& p, int threads_of_token) {
    return unsigned(ceil_div(p.x.rows * threads_of_token, std::int64_t(kThreads)));
}

}  // namespace

void rotary_forward(const Cuda& cuda, const RotaryForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("rotary", is_aligned16(p.x) && is_aligned16(p.y));
    const std::int64_t width = p.x.cols / p.heads;
    const Frequencies f = frequencies(width, p.theta);
    for_width("rotary", width, [&](auto d) {
        constexpr int D = decltype(d)::value;
        forward_kernel<D><<<blocks_for(p, D / 16 * kTogether<D>), kThreads, 0, stream_of(cuda)>>>(p, f);
        LAUNCH_CHECK("rotary_forward");
    });
}

void rotary_backward(const Cuda& cuda, const RotaryBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("rotary", is_aligned16(p.x) && is_aligned16(p.dy) && is_aligned16(p.dx));
    const std::int64_t width = p.x.cols / p.heads;
    const Frequencies f = frequencies(width, p.theta);
    for_width("rotary", width, [&](auto d) {
        constexpr int D = decltype(d)::value;
        backward_kernel<D><<<blocks_for(p, D / 16 * kTogether<D>), kThreads, 0, stream_of(cuda)>>>(p, f);
        LAUNCH_CHECK("rotary_backward");
    });
}

}  // namespace fiedler
