// engine/step.cpp: one training step on one screen: data -> forward -> loss -> backward, per micro-batch; then the sum
// over processes, the gradient norm, AdamW, and the step's only read-back.
#include <cmath>

#include "engine/runner.h"
#include "engine/runner_instances.h"
#include "kernels/adamw.h"

namespace fiedler {

template <class Dev, class T>
StepResult Runner<Dev, T>::train_step(const std::vector<Batch>& micro_batches, const StepSettings& settings) {
    double tokens = 0;
    for (const Batch& b : micro_batches) tokens += double(b.inputs.size());
    tokens *= comm_->size();
    clear_control();
    const Vec<A> total{&layout_->control->loss, 1};
    for (const Batch& host : micro_batches) {
        const DeviceBatch batch = upload(host);
        model_->forward(batch);
        model_->loss(batch, total, true, A(1 / tokens));
        model_->backward(batch);
    }
    if constexpr (std::is_same_v<A, float>) {
        comm_->all_reduce_sum(layout_->params.grads.slice(0, table_.trainable));
        comm_->all_reduce_sum(total);
    }
    update_weights(settings);
    const StepControl<A> control = read_control();
    return {double(control.loss) / tokens, double(control.norm), control.skip != 0};
}

template <class Dev, class T>
void Runner<Dev, T>::update_weights(const StepSettings& settings) {
    const std::int64_t n = table_.trainable;
    const double step = double(settings.step);
    {
        Range range("gradnorm");
        Gradnorm<A> norm{.control = layout_->control,
                         .grads = layout_->params.grads.slice(0, n),
                         .partials = layout_->norm_partials,
                         .max_norm = A(settings.clip)};
        if (settings.skip_above > 0) norm.skip_above = A(settings.skip_above);
        gradnorm(*dev_, norm);
    }
    Range range("adamw");
    adamw(*dev_, Adamw<T>{.master = layout_->params.master.slice(0, n),
                          .m = layout_->moment1.slice(0, n),
                          .v = layout_->moment2.slice(0, n),
                          .grads = layout_->params.grads.slice(0, n),
                          .weights = sizeof(T) == sizeof(A) ? Vec<T>{} : layout_->params.weights.slice(0, n),
                          .control = layout_->control,
                          .decay_count = table_.decayed,
                          .lr = A(settings.lr),
                          .beta1 = A(settings.beta1),
                          .beta2 = A(settings.beta2),
                          .eps = A(settings.eps),
                          .decay = A(settings.decay),
                          .bias1 = A(1 - std::pow(settings.beta1, step)),
                          .bias2 = A(1 - std::pow(settings.beta2, step))});
}

FIEDLER_RUNNER_INSTANCES()

}  // namespace fiedler
