// kernels/adamw_cpu.cpp: AdamW on the CPU (contract in adamw.h).
#include <algorithm>
#include <cmath>

#include "kernels/adamw.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {
constexpr std::int64_t kChunk = 1 << 14;

template <class A>
void update(const Adamw<A>& p, std::int64_t first, std::int64_t last, A decay) {
    A* __restrict w = p.master.data;
    A* __restrict m = p.m.data;
    A* __restrict v = p.v.data;
    A* __restrict grad = p.grads.data;
    const StepControl<A>& c = *p.control;
    const A scale = c.scale, lr = c.lr, beta1 = c.beta1, beta2 = c.beta2, eps = c.eps;
    const A inverse1 = c.inverse1, inverse2 = c.inverse2;
    for (std::int64_t i = first; i < last; ++i) {
        const A g = scale * grad[i];
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        w[i] -= lr * (m[i] * inverse1 / (std::sqrt(v[i] * inverse2) + eps) + decay * w[i]);
        grad[i] = 0;
    }
}
}  // namespace

template <class T>
void adamw(const Cpu& d, const Adamw<T>& p) {
    check(p);
    const std::int64_t n = p.master.size, chunks = (n + kChunk - 1) / kChunk;
    FIEDLER_REQUIRE("adamw", p.control->eps > 0 && p.control->inverse1 > 0 && p.control->inverse2 > 0);
    const bool skip = p.control->skip != 0;
    parallel_for(d, chunks, [&](std::int64_t c) {
        const std::int64_t first = c * kChunk, last = std::min(first + kChunk, n);
        if (skip) {
            std::fill(p.grads.data + first, p.grads.data + last, T(0));
            return;
        }
        const std::int64_t decayed = std::clamp(p.decay_count, first, last);
        update(p, first, decayed, p.control->decay);
        update(p, decayed, last, T(0));
    });
}

template void adamw(const Cpu&, const Adamw<float>&);
template void adamw(const Cpu&, const Adamw<double>&);

}  // namespace fiedler
