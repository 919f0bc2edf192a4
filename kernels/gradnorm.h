// kernels/gradnorm.h: the global gradient norm and what follows from it, left on the device for adamw to read.
//
//   norm  = sqrt(sum_i (unscale g_i)^2)
//   skip  = norm is not finite, or norm > skip_above
//   scale = unscale * min(1, max_norm / norm)          (max_norm <= 0: no clipping; norm not finite: 0)
//
// Shapes     grads: [n] A, 16-byte aligned on Cuda; control: one StepControl<A> in the device's memory
//            partials: kGradnormPartials A (Cuda only)
// Reads      control->max_norm, skip_above when it runs, not when it is called: work recorded once can be replayed.
// Writes     control->norm, scale, skip overwritten; the rest of it untouched.
// Numerics   squares are summed in A (a norm whose square leaves its range counts as not finite), by blocks of fixed
//            size in fixed order, f64 in the last stage: bit-equal from run to run.
#pragma once
#include <limits>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

// One small block of device memory per step: what differs from step to step is written by the host before it, what it
// finds out is the only thing the host reads back.
template <class A>
struct alignas(16) StepControl {
    A loss = 0;  // sum of the tokens' losses, accumulated by loss_sum over micro-batches (the caller divides)
    A norm = 0;
    A scale = 1;  // gradients are multiplied by this in adamw
    A skip = 0;   // not 0: adamw leaves weights and moments as they are
    // Of gradnorm:
    A max_norm = 0;  // 0 or less: no clipping
    A skip_above = std::numeric_limits<A>::infinity();
    // Of adamw (adamw.h):
    A inverse1 = 1, inverse2 = 1;  // 1 / (1 - beta^step) of the two moments
    A lr = 0, beta1 = A(0.9), beta2 = A(0.95), eps = A(1e-8), decay = 0;
};

template <class A>
struct Gradnorm {
    StepControl<A>* control = nullptr;
    Vec<const A> grads;
    Vec<A> partials;  // Cuda only
    A unscale = 1;
};

template <class A>
void check(const Gradnorm<A>& p) {
    FIEDLER_REQUIRE("gradnorm", p.control != nullptr && is_shape(p.grads, p.grads.size));
}
template <class A>
Traffic traffic(const Gradnorm<A>& p) {
    return {double(p.grads.size) * sizeof(A), 2.0 * double(p.grads.size)};
}

inline constexpr std::int64_t kGradnormPartials = 1024;  // fixed: the order of summation is the same on every device

template <class A>  // float, double
void gradnorm(const Cpu&, const Gradnorm<A>&);
void gradnorm(const Cuda&, const Gradnorm<float>&);

}  // namespace fiedler
