// kernels/adamw.h: AdamW with decoupled weight decay (Loshchilov & Hutter 2019), fused over the whole parameter block.
//
//   g = control->scale * grad                       m = beta1 m + (1 - beta1) g         v = beta2 v + (1 - beta2) g^2
//   w = w - lr ( (m inverse1) / (sqrt(v inverse2) + eps) + decay_i w )     inverse_k = 1 / (1 - beta_k^step)
//   weights = w rounded to T (nearest even)         grad = 0
//
// lr, beta1, beta2, eps, decay, inverse1 and inverse2 are read from control when the kernel runs, not when it is called:
// work recorded once can be replayed. decay_i is `decay` for i < decay_count, 0 beyond: the parameter table puts decayed
// tensors first. control->skip != 0: w, m, v and weights stay as they are; grad is still cleared.
// Shapes     master, m, v, grads: [n] acc_t<T>; weights: [n] T, absent where T == acc_t<T> (the master block is the
//            weights); on Cuda master, m, v, grads 16-byte aligned, weights 8-byte (cast: 16-byte)
//            control: one StepControl<acc_t<T>> (gradnorm.h) in the device's memory
// Writes     all of them but control in place.
// Numerics   acc_t<T>, elementwise, bit-equal. No denormal or overflow trap: eps > 0 required (the caller's duty;
//            checked on the CPU only).
// cast       weights = master rounded to T (after loading a checkpoint).
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/gradnorm.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct Adamw {
    Vec<acc_t<T>> master, m, v, grads;
    Vec<T> weights;  // absent where T == acc_t<T>
    const StepControl<acc_t<T>>* control = nullptr;
    std::int64_t decay_count = 0;
};
template <class T>
struct Cast {
    Vec<T> weights;
    Vec<const acc_t<T>> master;
};

template <class T>
void check(const Adamw<T>& p) {
    const auto n = p.master.size;
    FIEDLER_REQUIRE("adamw", is_shape(p.master, n) && is_shape(p.m, n) && is_shape(p.v, n) && is_shape(p.grads, n));
    FIEDLER_REQUIRE("adamw", p.control != nullptr);
    FIEDLER_REQUIRE("adamw", p.decay_count >= 0 && p.decay_count <= n);
    FIEDLER_REQUIRE("adamw", (sizeof(T) == sizeof(acc_t<T>)) != bool(p.weights));
}
template <class T>
Traffic traffic(const Adamw<T>& p) {
    const double n = double(p.master.size);
    return {n * (8 * sizeof(acc_t<T>) + (p.weights ? sizeof(T) : 0)), 14 * n};
}

template <class T>  // float, double
void adamw(const Cpu&, const Adamw<T>&);
void adamw(const Cuda&, const Adamw<bf16>&);
void cast_weights(const Cuda&, const Cast<bf16>&);

}  // namespace fiedler
