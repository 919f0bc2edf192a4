// kernels/objective.h: losses of a model's outputs against targets of which some may be missing, their gradient, and
// predictions. (The vocabulary's loss is loss.h's.)
//
// o: outputs of a row, K of them; g_k = shift_row + scale_row o_k (absent: o_k), the prediction of a number.
//   classes    l = logsumexp(o) - sum_k q_k o_k         q_k = (1 - smoothing) [k == class] + smoothing / K
//              dl/do_k = softmax(o)_k - q_k             prediction: softmax(o)         missing: class < 0
//   binary     l_k = max(o, 0) - o q + log1p(exp(-|o|)) q = (1 - smoothing) t_k + smoothing / 2
//              dl/do_k = sigmoid(o) - q                 prediction: sigmoid(o)         missing: t_k NaN
//   squared    l_k = (g - t)^2                          dl/dg = 2 (g - t)
//   absolute   l_k = |g - t|                            dl/dg = sign(g - t), sign(0) = 0
//   huber      l_k = (g - t)^2 / 2 where |g - t| <= delta, else delta (|g - t| - delta / 2)
//              dl/dg = g - t, clamped to [-delta, delta]; prediction of all three: g; missing: t_k NaN
//
//   losses_i = weight_i sum_k l_k over what is not missing       counts_i = how many those are (classes: 0 or 1)
//   doutputs_ik = factor weight_i dl/do_k, 0 where missing       factor = scale * scale_by[0]
//
// Shapes     outputs: [rows, K] acc_t<T>, any ld; doutputs: [rows, K or more] T (ready for matmul), any ld: its columns
//            from K on are set to 0, so that a product may be wider than K; predictions: [rows, K] acc_t<T>
//            classes: [rows] int32 < K (kind classes), targets: [rows, K] f32 (the others)
//            weights: [rows] f32, 1 where absent; shift, scale of a row: [rows] f32 (squared, absolute, huber)
//            scale_by: [1] acc_t<T> in the device's memory, 1 where absent: what a recorded step divides by
//            losses: [rows] acc_t<T>; counts: [rows] int32
// Optional   doutputs, predictions; and losses, counts and doutputs together with classes or targets (predict only).
// Writes     everything overwritten. No output may alias an input.
// Numerics   acc_t<T>, the maximum subtracted: finite for any finite outputs. A NaN among a row's outputs shows in its
//            loss, unless its targets are missing. A row depends on itself alone. Bit-equal from run to run.
//
// objective_sum: total += sum_i losses_i, count += sum_i counts_i, in fixed order (double inside; one rounding).
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

enum class ObjectiveKind { classes, binary, squared, absolute, huber };

template <class T>
struct Objective {
    Vec<acc_t<T>> losses;
    Vec<std::int32_t> counts;
    Mat<T> doutputs;            // optional
    Mat<acc_t<T>> predictions;  // optional
    Mat<const acc_t<T>> outputs;
    Vec<const std::int32_t> classes;
    Mat<const float> targets;
    Vec<const float> weights;               // optional
    Vec<const float> row_shift, row_scale;  // optional
    Vec<const acc_t<T>> scale_by;           // optional
    acc_t<T> scale = 1;
    acc_t<T> smoothing = 0;  // in [0, 1)
    acc_t<T> delta = 1;      // > 0
    ObjectiveKind kind = ObjectiveKind::classes;
};
template <class A>
struct ObjectiveSum {
    Vec<A> total;
    Vec<std::int64_t> count;
    Vec<const A> losses;
    Vec<const std::int32_t> counts;
};

inline bool is_number(ObjectiveKind k) { return k != ObjectiveKind::classes && k != ObjectiveKind::binary; }

template <class T>
void check(const Objective<T>& p) {
    const std::int64_t rows = p.outputs.rows, k = p.outputs.cols;
    const bool known = p.classes || p.targets;
    FIEDLER_REQUIRE("objective", is_shape(p.outputs, rows, k) && k > 0 && (known || p.predictions));
    FIEDLER_REQUIRE("objective", !p.classes || (p.kind == ObjectiveKind::classes && is_shape(p.classes, rows)));
    FIEDLER_REQUIRE("objective", !p.targets || (p.kind != ObjectiveKind::classes && is_shape(p.targets, rows, k)));
    FIEDLER_REQUIRE("objective", !known || (is_shape(p.losses, rows) && is_shape(p.counts, rows)));
    FIEDLER_REQUIRE("objective",
                    !p.doutputs || (known && p.doutputs.cols >= k && is_shape(p.doutputs, rows, p.doutputs.cols)));
    FIEDLER_REQUIRE("objective", !p.predictions || is_shape(p.predictions, rows, k));
    FIEDLER_REQUIRE("objective", (!p.weights || p.weights.size == rows) && (!p.scale_by || p.scale_by.size == 1));
    FIEDLER_REQUIRE("objective", (!p.row_shift && !p.row_scale) || is_number(p.kind));
    FIEDLER_REQUIRE("objective",
                    (!p.row_shift || p.row_shift.size == rows) && (!p.row_scale || p.row_scale.size == rows));
    FIEDLER_REQUIRE("objective", p.smoothing >= 0 && p.smoothing < 1 && p.delta > 0);
}
template <class A>
void check(const ObjectiveSum<A>& p) {
    FIEDLER_REQUIRE("objective", is_shape(p.total, 1) && is_shape(p.count, 1));
    FIEDLER_REQUIRE("objective", is_shape(p.losses, p.losses.size) && is_shape(p.counts, p.losses.size));
}
template <class T>
Traffic traffic(const Objective<T>& p) {
    const double rows = double(p.outputs.rows), n = rows * double(p.outputs.cols);
    return {n * (sizeof(acc_t<T>) * (p.predictions ? 2 : 1) + (p.targets ? 4 : 0)) +
                rows * (double(p.doutputs.cols) * sizeof(T) + (p.classes ? 4 : 0) + sizeof(acc_t<T>) + 4),
            4 * n};
}

template <class T>  // float, double
void objective(const Cpu&, const Objective<T>&);
template <class A>
void objective_sum(const Cpu&, const ObjectiveSum<A>&);
void objective(const Cuda&, const Objective<bf16>&);
void objective_sum(const Cuda&, const ObjectiveSum<float>&);

}  // namespace fiedler
