// kernels/loss.h: softmax cross-entropy and its gradient on one chunk of logits, in one pass over them.
//
//   losses_i = logsumexp_v(logits_iv) - logits_{i, target_i}        (0 where target_i < 0: ignored)
//   dlogits_iv = (softmax_v(logits_i) - [v == target_i]) scale      (0 where ignored), written over the logits
//   total += sum_i losses_i                                         (one number per call, in fixed order)
//
// Shapes     logits: [rows, vocab] T, ld >= vocab; columns [vocab, ld) are set to 0 when the gradient is written (so
//            that ld may be padded and used as the width of a product); targets: [rows] int32, < vocab
//            losses: [rows] acc_t<T>; total: [1] acc_t<T>
// Writes     losses overwritten; logits overwritten by dlogits when `gradient`, untouched otherwise; total accumulated
//            (+=).
// Numerics   acc_t<T>, running maximum subtracted: finite for any finite logits. Bit-equal from run to run.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct LossForward {
    Mat<T> logits;
    Vec<acc_t<T>> losses;
    Vec<const std::int32_t> targets;
    acc_t<T> scale = 1;
    bool gradient = true;
};
template <class A>
struct LossSum {
    Vec<A> total;
    Vec<const A> losses;
};

template <class T>
void check(const LossForward<T>& p) {
    FIEDLER_REQUIRE("loss", is_shape(p.logits, p.logits.rows, p.logits.cols));
    FIEDLER_REQUIRE("loss", is_shape(p.losses, p.logits.rows) && is_shape(p.targets, p.logits.rows));
}
template <class A>
void check(const LossSum<A>& p) {
    FIEDLER_REQUIRE("loss", is_shape(p.total, 1) && is_shape(p.losses, p.losses.size));
}
template <class T>
Traffic traffic(const LossForward<T>& p) {
    const double n = double(p.logits.rows) * double(p.logits.cols);
    return {(p.gradient ? 2 : 1) * n * sizeof(T) + double(p.logits.rows) * (4 + sizeof(acc_t<T>)), 4 * n};
}

template <class T>  // float, double
void loss_forward(const Cpu&, const LossForward<T>&);
template <class A>
void loss_sum(const Cpu&, const LossSum<A>&);
void loss_forward(const Cuda&, const LossForward<bf16>&);
void loss_sum(const Cuda&, const LossSum<float>&);

}  // namespace fiedler
