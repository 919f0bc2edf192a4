// kernels/objective_cpu.cpp: losses of outputs on the CPU (see objective.h), row by row.
#include <algorithm>
#include <cmath>

#include "kernels/objective.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

template <class A>
struct Term {
    A loss, gradient;  // of one output
};

template <class A>
A sigmoid(A o) {
    const A e = std::exp(-std::abs(o));
    return (o >= 0 ? A(1) : e) / (1 + e);
}
template <class A>
Term<A> binary_term(A o, A t, A smoothing) {
    const A q = (1 - smoothing) * t + smoothing / 2;
    return {std::max(o, A(0)) - o * q + std::log1p(std::exp(-std::abs(o))), sigmoid(o) - q};
}
// Of the error g - t; the gradient with respect to g.
template <class A>
Term<A> number_term(ObjectiveKind kind, A error, A delta) {
    const A size = std::abs(error);
    if (kind == ObjectiveKind::squared) return {error * error, 2 * error};
    if (kind == ObjectiveKind::absolute) return {size, std::isnan(error) ? error : A((error > 0) - (error < 0))};
    if (size <= delta) return {error * error / 2, error};
    return {delta * (size - delta / 2), std::isnan(error) ? error : std::copysign(delta, error)};
}

// A row: where its values lie, and its own numbers.
template <class T>
struct Row {
    using A = acc_t<T>;
    const Objective<T>& p;
    std::int64_t i;
    const A* o = p.outputs.row(i);
    A factor = p.scale * (p.scale_by ? p.scale_by.data[0] : A(1));
    A weight = p.weights ? A(p.weights.data[i]) : A(1);
    A shift = p.row_shift ? A(p.row_shift.data[i]) : A(0);
    A scale = p.row_scale ? A(p.row_scale.data[i]) : A(1);
    T* doutputs = p.doutputs ? p.doutputs.row(i) : nullptr;
    A* predictions = p.predictions ? p.predictions.row(i) : nullptr;
};

template <class T>
void classes_row(const Row<T>& r) {
    using A = acc_t<T>;
    const auto& p = r.p;
    const std::int64_t K = p.outputs.cols;
    const std::int32_t target = p.classes ? p.classes.data[r.i] : -1;
    const bool known = target >= 0;
    A top = r.o[0];
    for (std::int64_t k = 0; k < K; ++k) top = std::max(top, r.o[k]);
    A sum = 0, mean = 0;  // mean of o - top
    for (std::int64_t k = 0; k < K; ++k) sum += std::exp(r.o[k] - top), mean += (r.o[k] - top) / A(K);
    const A even = p.smoothing / A(K);
    for (std::int64_t k = 0; k < K; ++k) {
        const A probability = std::exp(r.o[k] - top) / sum, q = even + (k == target ? 1 - p.smoothing : A(0));
        if (r.predictions) r.predictions[k] = probability;
        if (r.doutputs) r.doutputs[k] = T(known ? r.factor * r.weight * (probability - q) : A(0));
    }
    if (!p.classes) return;
    p.counts.data[r.i] = known;
    p.losses.data[r.i] =
        known ? r.weight * (std::log(sum) - (1 - p.smoothing) * (r.o[target] - top) - p.smoothing * mean) : A(0);
}

template <class T>
void values_row(const Row<T>& r) {
    using A = acc_t<T>;
    const auto& p = r.p;
    const bool binary = p.kind == ObjectiveKind::binary;
    A sum = 0;
    std::int32_t count = 0;
    for (std::int64_t k = 0; k < p.outputs.cols; ++k) {
        const A o = r.o[k], g = binary ? A(0) : r.shift + r.scale * o;
        if (r.predictions) r.predictions[k] = binary ? sigmoid(o) : g;
        if (!p.targets) continue;
        const A t = A(p.targets.row(r.i)[k]);
        Term<A> term{0, 0};
        if (!std::isnan(t)) {
            term = binary ? binary_term(o, t, p.smoothing) : number_term(p.kind, g - t, p.delta);
            sum += term.loss;
            ++count;
        }
        if (r.doutputs) r.doutputs[k] = T(r.factor * r.weight * (binary ? A(1) : r.scale) * term.gradient);
    }
    if (!p.targets) return;
    p.counts.data[r.i] = count;
    p.losses.data[r.i] = r.weight * sum;
}

}  // namespace

template <class T>
void objective(const Cpu& dev, const Objective<T>& p) {
    check(p);
    for (std::int64_t i = 0; i < p.classes.size; ++i) FIEDLER_REQUIRE("objective", p.classes.data[i] < p.outputs.cols);
    parallel_for(dev, p.outputs.rows, [&](std::int64_t i) {
        const Row<T> row{p, i};
        if (p.kind == ObjectiveKind::classes)
            classes_row(row);
        else
            values_row(row);
        if (p.doutputs) std::fill(row.doutputs + p.outputs.cols, row.doutputs + p.doutputs.cols, T(0));
    });
}

template <class A>
void objective_sum(const Cpu&, const ObjectiveSum<A>& p) {
    check(p);
    double sum = 0;
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < p.losses.size; ++i) sum += double(p.losses.data[i]), count += p.counts.data[i];
    p.total.data[0] = static_cast<A>(double(p.total.data[0]) + sum);
    p.count.data[0] += count;
}

template void objective(const Cpu&, const Objective<float>&);
template void objective(const Cpu&, const Objective<double>&);
template void objective_sum(const Cpu&, const ObjectiveSum<float>&);
template void objective_sum(const Cpu&, const ObjectiveSum<double>&);

}  // namespace fiedler
