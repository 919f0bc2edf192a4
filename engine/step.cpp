// engine/step.cpp: one training step on one screen (run_step): forward -> loss -> backward, per micro-batch; then the sum
// over processes, the gradient norm and AdamW. Around it: the step's only copy in and its only read-back, neither of
// which the host waits for before the next step is on its way, and the recording of the step on CUDA.
#include <algorithm>

#include "engine/run_parts.h"
#include "engine/runner.h"
#include "engine/runner_instances.h"

namespace fiedler {

template <class Dev, class T>
void Runner<Dev, T>::run_step(const std::vector<DeviceBatch>& micro_batches, A grad_scale) {
    const Vec<A> total{&layout_->control->loss, 1};
    for (const DeviceBatch& batch : micro_batches) {
        model_->forward(batch);
        model_->loss(batch, total, true, grad_scale);
        model_->backward(batch);
    }
    if constexpr (std::is_same_v<A, float>) {
        comm_->all_reduce_sum(layout_->params.grads.slice(0, table_.trainable));
        comm_->all_reduce_sum(total);
    }
    update_weights(*dev_, table_, *layout_);
}

template <class Dev, class T>
void Runner<Dev, T>::submit_step(const std::vector<Batch>& micro_batches, const StepSettings& settings) {
    if (submitted_ - finished_ == kStepsInFlight) throw std::logic_error("runner: too many steps are unfinished");
    if (static_cast<std::int64_t>(micro_batches.size()) > layout_->step.micro_batches())
        throw std::logic_error("runner: more micro-batches than planned");
    const int mark = static_cast<int>(submitted_ % kStepsInFlight);
    Slot& slot = slots_[mark];
    std::vector<DeviceBatch> batches;
    slot.tokens = 0;
    for (const Batch& b : micro_batches) {
        const auto i = static_cast<std::int64_t>(batches.size());
        batches.push_back(placed(b, i));
        place(b, i, slot.block);
        slot.tokens += double(b.inputs.size());
    }
    slot.tokens *= comm_->size();
    *layout_->step.control(slot.block) = control_of<A>(settings);
    send(*dev_, layout_->step_memory, slot.block, layout_->step.bytes());
    model_->use_head_bf16(settings.head_bf16);
    launch_step(batches, A(1 / slot.tokens));
    fetch(*dev_, slot.result, layout_->control, sizeof *slot.result);
    set_mark(*dev_, mark);
    ++submitted_;
}

template <class Dev, class T>
StepResult Runner<Dev, T>::finish_step() {
    if (submitted_ == finished_) throw std::logic_error("runner: no step is unfinished");
    const int mark = static_cast<int>(finished_++ % kStepsInFlight);
    wait_for_mark(*dev_, mark);
    const StepControl<A>& control = *slots_[mark].result;
    return {double(control.loss) / slots_[mark].tokens, double(control.norm), control.skip != 0};
}

// A step whose batches are cut into documents has a shape of its own; one with the head in another precision, too.
template <class Dev, class T>
void Runner<Dev, T>::launch_step(const std::vector<DeviceBatch>& micro_batches, A grad_scale) {
    if constexpr (std::is_same_v<Dev, Cuda>) {
        StepShape shape;
        for (const DeviceBatch& b : micro_batches) shape.emplace_back(b.inputs.size, b.seq.length);
        shape.emplace_back(model_->head_in_fp8(), 0);
        const bool uniform = std::ranges::all_of(micro_batches, [](const DeviceBatch& b) { return b.seq.length > 0; });
        recorded_.run(*dev_, shape, plan_.cuda_graph && uniform, [&] { run_step(micro_batches, grad_scale); });
    } else {
        run_step(micro_batches, grad_scale);
    }
}

FIEDLER_RUNNER_INSTANCES()

}  // namespace fiedler
