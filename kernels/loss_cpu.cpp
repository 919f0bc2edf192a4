// kernels/loss_cpu.cpp: softmax cross-entropy on the CPU (see loss.h). Rows are independent; a row is walked in chunks
// (see vector_math.h).
#include <algorithm>
#include <cmath>

#include "kernels/loss.h"
#include "kernels/parallel.h"
#include "kernels/vector_math.h"

namespace fiedler {
namespace {

template <class T>
T row_max(const T* x, std::int64_t n) {
    constexpr int kLanes = 16;
    T lanes[kLanes];
    for (T& v : lanes) v = x[0];
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int k = 0; k < kLanes; ++k) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
    for (; i < n; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    return *std::max_element(lanes, lanes + kLanes);
}

// sum_v exp(x_v - m); with `keep`, the exponentials replace x.
template <class T>
T sum_of_exponentials(T* x, std::int64_t n, T m, bool keep) {
    Chunk<T> sums = Chunk<T>::Zero();
    for (std::int64_t i = 0; i < n; i += kChunk) {
        const std::int64_t count = std::min<std::int64_t>(kChunk, n - i);
        Chunk<T> e = (load_chunk(x + i, count, m) - m).exp();
        if (count < kChunk) e.tail(kChunk - count).setZero();
        sums += e;
        if (keep) store_chunk(x + i, count, e);
    }
    return sums.sum();
}

template <class T>
void loss_row(const LossForward<T>& p, std::int64_t i) {
    T* x = p.logits.row(i);
    const std::int64_t n = p.logits.cols, target = p.targets.data[i];
    if (target < 0) {
        p.losses.data[i] = 0;
        if (p.gradient) std::fill(x, x + p.logits.ld, T(0));
        return;
    }
    const T at_target = x[target], m = row_max(x, n), sum = sum_of_exponentials(x, n, m, p.gradient);
    p.losses.data[i] = std::log(sum) + (m - at_target);
    if (!p.gradient) return;
    const T factor = p.scale / sum;
    for (std::int64_t v = 0; v < n; ++v) x[v] *= factor;
    x[target] -= p.scale;
    std::fill(x + n, x + p.logits.ld, T(0));
}

}  // namespace

template <class T>
void loss_forward(const Cpu& dev, const LossForward<T>& p) {
    check(p);
    for (std::int64_t i = 0; i < p.targets.size; ++i) FIEDLER_REQUIRE("loss", p.targets.data[i] < p.logits.cols);
    parallel_for(dev, p.logits.rows, [&](std::int64_t i) { loss_row(p, i); });
}

template <class A>
void loss_sum(const Cpu&, const LossSum<A>& p) {
    check(p);
    double sum = 0;
    for (std::int64_t i = 0; i < p.losses.size; ++i) sum += double(p.losses.data[i]);
    p.total.data[0] = static_cast<A>(double(p.total.data[0]) + sum);
}

template void loss_forward(const Cpu&, const LossForward<float>&);
template void loss_forward(const Cpu&, const LossForward<double>&);
template void loss_sum(const Cpu&, const LossSum<float>&);
template void loss_sum(const Cpu&, const LossSum<double>&);

}  // namespace fiedler
