// engine/run_parts.h: what the runners of text (runner.h) and of samples (sample_runner.h) have in common once memory is
// laid out: AdamW's step, reading and writing the blocks, naming the device.
#pragma once
#include <fmt/format.h>

#include <cmath>
#include <string>
#include <vector>

#include "engine/runner.h"
#include "kernels/adamw.h"
#include "kernels/parallel.h"

namespace fiedler {

template <class A>
StepControl<A> control_of(const StepSettings& s) {
    StepControl<A> c;
    c.max_norm = A(s.clip);
    if (s.skip_above > 0) c.skip_above = A(s.skip_above);
    c.inverse1 = 1 / A(1 - std::pow(s.beta1, double(s.step)));
    c.inverse2 = 1 / A(1 - std::pow(s.beta2, double(s.step)));
    c.lr = A(s.lr);
    c.beta1 = A(s.beta1);
    c.beta2 = A(s.beta2);
    c.eps = A(s.eps);
    c.decay = A(s.decay);
    return c;
}

// From the gradients of the whole step to new weights; gradients end as zeros.
template <class Dev, class T>
void update_weights(const Dev& dev, const ParamTable& table, const RunLayout<T>& layout) {
    using A = acc_t<T>;
    const std::int64_t n = table.trainable;
    {
        Range range("gradnorm");
        gradnorm(dev, Gradnorm<A>{.control = layout.control,
                                  .grads = layout.params.grads.slice(0, n),
                                  .partials = layout.norm_partials});
    }
    Range range("adamw");
    adamw(dev, Adamw<T>{.master = layout.params.master.slice(0, n),
                        .m = layout.moment1.slice(0, n),
                        .v = layout.moment2.slice(0, n),
                        .grads = layout.params.grads.slice(0, n),
                        .weights = sizeof(T) == sizeof(A) ? Vec<T>{} : layout.params.weights.slice(0, n),
                        .control = layout.control,
                        .decay_count = table.decayed});
}

template <class T>
Vec<acc_t<T>> block_of(const RunLayout<T>& layout, Block b) {
    if (b == Block::moment1) return layout.moment1;
    if (b == Block::moment2) return layout.moment2;
    return layout.params.master;
}
template <class Dev, class T>
void read_block(const Dev& dev, const RunLayout<T>& layout, Block which, float* out) {
    const Vec<acc_t<T>> b = block_of(layout, which);
    std::vector<acc_t<T>> host(static_cast<std::size_t>(b.size));
    copy_to_host(dev, host.data(), b.data, host.size() * sizeof(acc_t<T>));
    std::copy(host.begin(), host.end(), out);
}
// Writing the master block refreshes the weights.
template <class Dev, class T>
void write_block(const Dev& dev, const RunLayout<T>& layout, Block which, const float* in) {
    const Vec<acc_t<T>> b = block_of(layout, which);
    const std::vector<acc_t<T>> host(in, in + b.size);
    copy_to_device(dev, b.data, host.data(), host.size() * sizeof(acc_t<T>));
    if constexpr (!std::is_same_v<T, acc_t<T>>)
        if (which == Block::master)
            cast_weights(dev, Cast<T>{.weights = layout.params.weights, .master = layout.params.master});
    synchronize(dev);
}

template <class Dev>
std::size_t bytes_in_use([[maybe_unused]] const Dev& dev) {
    std::size_t free_bytes = 0, total = 0;
    if constexpr (std::is_same_v<Dev, Cuda>) memory_info(dev, free_bytes, total);
    return total - free_bytes;
}

template <class Dev>
std::string name_of_device(const Dev& dev) {
    if constexpr (std::is_same_v<Dev, Cuda>)
        return cuda_device_info(dev.ordinal).name;
    else
        return fmt::format("cpu ({} threads)", thread_count(dev));
}

}  // namespace fiedler
