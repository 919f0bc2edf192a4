// kernels/gradnorm_cpu.cpp: global gradient norm on the CPU (contract in gradnorm.h).
#include <cmath>

#include "kernels/gradnorm.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {
constexpr std::int64_t kChunk = 1 << 14;
constexpr int kLanes = 32;  // independent partial sums, so that the loop vectorises without reordering any of them

template <class A>
double sum_of_squares(const A* g, std::int64_t n, A unscale) {
    A lane[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int k = 0; k < kLanes; ++k) {
            const A x = unscale * g[i + k];
            lane[k] += x * x;
        }
    for (; i < n; ++i) {
        const A x = unscale * g[i];
        lane[i % kLanes] += x * x;
    }
    double sum = 0;
    for (int k = 0; k < kLanes; ++k) sum += double(lane[k]);
    return sum;
}
}  // namespace

template <class A>
void gradnorm(const Cpu& d, const Gradnorm<A>& p) {
    check(p);
    const std::int64_t n = p.grads.size, chunks = (n + kChunk - 1) / kChunk;
    std::vector<double> partial(static_cast<std::size_t>(chunks));
    parallel_for(d, chunks, [&](std::int64_t c) {
        const std::int64_t first = c * kChunk;
        partial[static_cast<std::size_t>(c)] =
            sum_of_squares(p.grads.data + first, std::min(kChunk, n - first), p.unscale);
    });
    double sum = 0;
    for (const double s : partial) sum += s;

    const A norm = static_cast<A>(std::sqrt(sum));
    const bool finite = std::isfinite(norm);
    StepControl<A>& c = *p.control;
    c.norm = norm;
    c.skip = !finite || norm > c.skip_above ? A(1) : A(0);
    c.scale = !finite ? A(0) : c.max_norm > 0 && norm > c.max_norm ? p.unscale * (c.max_norm / norm) : p.unscale;
}

template void gradnorm(const Cpu&, const Gradnorm<float>&);
template void gradnorm(const Cpu&, const Gradnorm<double>&);

}  // namespace fiedler
