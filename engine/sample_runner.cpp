#include "engine/sample_runner.h"

#include <algorithm>
#include <limits>

#include "engine/error.h"
#include "engine/runner_instances.h"
#include "kernels/tuning.h"

namespace fiedler {

ActivationPlan sample_activation_plan(const SampleCapacity& most, const RunPlan& run, bool cuda) {
    ActivationPlan p;
    p.tokens = most.nodes;
    p.sequences = most.samples;
    p.feature_entries = most.feature_entries;
    p.training = p.keep_layers = run.training;
    p.recompute = run.recompute;
    p.tree_from = run.attention == AttentionChoice::tree    ? 1
                  : run.attention == AttentionChoice::dense ? std::numeric_limits<std::int64_t>::max()
                                                            : tuning::attention_tree_from_bidirectional(cuda);
    return p;
}

namespace {

// Frames (sample_batch.h) are for short samples: dense attention of a frame's own nodes costs little.
template <class T>
BatchLayout<T> batch_layout(const ModelSpec& spec, const SampleCapacity& most, const RunPlan& run, bool framed) {
    const bool is_short = spec.context < sample_activation_plan(most, run, std::is_same_v<T, bf16>).tree_from;
    return BatchLayout<T>(spec, most, run.training, framed && is_short);
}

// Everything that lives in the arena, in order; the block for the batch comes first: what comes after
// the activations would use their scratch again.
template <class T>
std::unique_ptr<RunLayout<T>> lay_out(Arena& arena, const ModelSpec& spec, const ParamTable& table,
                                      const ActivationPlan& plan, const BatchLayout<T>& batches, std::byte** block) {
    if (std::is_same_v<T, bf16>)
        *block = arena.take<std::byte>("batch", {static_cast<std::int64_t>(batches.bytes())}, Lifetime::persistent);
    return std::make_unique<RunLayout<T>>(arena, spec, table, plan, false);
}

}  // namespace

template <class Dev, class T>
SampleRunner<Dev, T>::SampleRunner(std::unique_ptr<Dev> dev, const ModelSpec& spec, const SampleCapacity& capacity,
                                   const RunPlan& plan, std::size_t budget, bool framed)
    : dev_(std::move(dev)),
      spec_(spec),
      table_(spec_),
      capacity_(capacity),
      plan_(plan),
      batches_(batch_layout<T>(spec_, capacity_, plan_, framed)),
      activation_plan_(sample_activation_plan(batches_.frame(), plan_, std::is_same_v<T, bf16>)) {
    lay_out<T>(arena_, spec_, table_, activation_plan_, batches_, &block_);
    plan_.bytes = arena_.peak();
    plan_.table = arena_.table();
    arena_.commit(memory_of(*dev_), budget);
    layout_ = lay_out<T>(arena_, spec_, table_, activation_plan_, batches_, &block_);
    fill_bytes(*dev_, arena_.base(), 0, arena_.peak());
    if constexpr (std::is_same_v<Dev, Cuda>) {
        dev_->workspace = layout_->workspace;
        dev_->workspace_bytes = kWorkspaceBytes;
    }
    static_assert(sizeof(StepControl<A>) <= Arena::kAlign);
    host_ = std::make_unique<HostMemory<Dev>>(*dev_, 2 * kStepsInFlight * Arena::kAlign);
    for (int i = 0; i < kStepsInFlight; ++i) {
        std::byte* part = host_->data() + 2 * static_cast<std::size_t>(i) * Arena::kAlign;
        slots_[i].control = reinterpret_cast<StepControl<A>*>(part);
        slots_[i].result = reinterpret_cast<StepControl<A>*>(part + Arena::kAlign);
    }
    ModelConstants constants;
    constants.laplacian = path_laplacian(spec_.head_dim());
    layout_->upload(*dev_, constants);
    fill_ones();
    model_ =
        std::make_unique<Model<Dev, T>>(*dev_, spec_, table_, layout_->params, layout_->laplacian(spec_.head_dim()),
                                        Mat<const T>(), activation_plan_, *layout_->acts);
}

template <class Dev, class T>
SampleRunner<Dev, T>::~SampleRunner() {
    try {
        synchronize(*dev_);  // unfinished steps read and write host_
    } catch (const DeviceError&) {
    }  // the device has failed: nothing runs on it any more
    model_.reset();
}

template <class Dev, class T>
void SampleRunner<Dev, T>::fill_ones() {
    const Mat<T> ones = layout_->acts->scratch().ones;
    std::vector<T> host(static_cast<std::size_t>(ones.rows * ones.cols), T(0.f));
    for (std::int64_t i = 0; i < ones.rows; ++i) host[static_cast<std::size_t>(i * ones.cols)] = T(1.f);
    copy_to_device(*dev_, ones.data, host.data(), host.size() * sizeof(T));
    synchronize(*dev_);
}

template <class Dev, class T>
PreparedBatch SampleRunner<Dev, T>::room() {
    PreparedBatch p;
    // The device may still read the block of a step that will never be finished.
    p.block = HostBlock(static_cast<std::byte*>(host_alloc(*dev_, batches_.bytes())), [this](std::byte* block) {
        try {
            synchronize(*dev_);
        } catch (const DeviceError&) {
        }  // the device has failed: nothing runs on it any more
        host_free(*dev_, block);
    });
    return p;
}

// A batch in the runner's own room.
template <class Dev, class T>
const PreparedBatch& SampleRunner<Dev, T>::ready(const SampleBatch& batch, const SampleDraw& draw) {
    if (!own_.block) own_ = room();
    prepare(batch, draw, own_);
    return own_;
}

// The batch as the device sees it, sent there where it cannot read the host's memory.
template <class Dev, class T>
DeviceBatch SampleRunner<Dev, T>::place(const PreparedBatch& batch, DeviceSamples& samples) {
    if constexpr (std::is_same_v<Dev, Cuda>) {
        send(*dev_, block_, batch.block.get(), batches_.bytes());
        return batches_.at(batch, block_, samples);
    }
    return batches_.at(batch, batch.block.get(), samples);
}

template <class Dev, class T>
void SampleRunner<Dev, T>::run(const DeviceBatch& batch) {
    model_->forward(batch);
    model_->sample_loss(batch, {&layout_->control->loss, 1}, batch.samples->count, true);
    model_->backward(batch);
}

template <class Dev, class T>
void SampleRunner<Dev, T>::launch_step(const DeviceBatch& batch, const StepShape& shape) {
    const auto step = [&] {
        run(batch);
        update_weights(*dev_, table_, *layout_);
    };
    if constexpr (std::is_same_v<Dev, Cuda>)
        return recorded_.run(*dev_, shape, plan_.cuda_graph && batches_.framed(), step);
    (void)shape;
    step();
}

template <class Dev, class T>
void SampleRunner<Dev, T>::submit_step(const PreparedBatch& batch, const StepSettings& settings) {
    if (submitted_ - finished_ == kStepsInFlight)
        throw std::logic_error("sample_runner: too many steps are unfinished");
    if (batch.known == 0) throw std::logic_error("sample_runner: a step without a known target");
    const int mark = static_cast<int>(submitted_ % kStepsInFlight);
    Slot& slot = slots_[mark];
    slot.known = double(batch.known);
    *slot.control = control_of<A>(settings);
    DeviceSamples samples;
    const DeviceBatch on_device = place(batch, samples);
    send(*dev_, layout_->control, slot.control, sizeof *slot.control);
    launch_step(on_device, {batch.frame_nodes, batch.arrays});
    fetch(*dev_, slot.result, layout_->control, sizeof *slot.result);
    set_mark(*dev_, mark);
    ++submitted_;
}

template <class Dev, class T>
StepResult SampleRunner<Dev, T>::finish_step() {
    if (submitted_ == finished_) throw std::logic_error("sample_runner: no step is unfinished");
    const int mark = static_cast<int>(finished_++ % kStepsInFlight);
    wait_for_mark(*dev_, mark);
    const StepControl<A>& control = *slots_[mark].result;
    return {double(control.loss) / slots_[mark].known, double(control.norm), control.skip != 0};
}

template <class Dev, class T>
SampleLoss SampleRunner<Dev, T>::evaluate(const SampleBatch& batch) {
    if (submitted_ != finished_) throw std::logic_error("sample_runner: a step is unfinished");
    DeviceSamples samples;
    fill_bytes(*dev_, layout_->control, 0, sizeof(StepControl<A>));
    const PreparedBatch& prepared = ready(batch, {});
    const DeviceBatch on_device = place(prepared, samples);
    model_->forward(on_device);
    model_->sample_loss(on_device, {&layout_->control->loss, 1}, samples.count, false);
    const Mat<const A> predictions = model_->predictions(on_device).slice_rows(0, prepared.rows);
    std::vector<A> host(static_cast<std::size_t>(predictions.rows * predictions.cols));
    copy_to_host(*dev_, host.data(), predictions.data, host.size() * sizeof(A));
    StepControl<A> control;
    copy_to_host(*dev_, &control, layout_->control, sizeof control);
    return {double(control.loss), prepared.known, predictions.rows, {host.begin(), host.end()}};
}

template <class Dev, class T>
double SampleRunner<Dev, T>::loss_and_gradients(const SampleBatch& batch, const SampleDraw& draw,
                                                std::vector<A>& grads) {
    const auto elements = static_cast<std::size_t>(table_.elements);
    fill_bytes(*dev_, layout_->control, 0, sizeof(StepControl<A>));
    fill_bytes(*dev_, layout_->params.grads.data, 0, elements * sizeof(A));
    DeviceSamples samples;
    const PreparedBatch& prepared = ready(batch, draw);
    run(place(prepared, samples));
    grads.resize(elements);
    copy_to_host(*dev_, grads.data(), layout_->params.grads.data, elements * sizeof(A));
    StepControl<A> control;
    copy_to_host(*dev_, &control, layout_->control, sizeof control);
    return double(control.loss) / double(prepared.known);
}

#if FIEDLER_CUDA
template class SampleRunner<Cuda, bf16>;
#endif
template class SampleRunner<Cpu, float>;
template class SampleRunner<Cpu, double>;

namespace {

template <class T>
RunPlan measured(const ModelSpec& spec, const SampleCapacity& most, RunPlan plan) {
    constexpr bool kCuda = std::is_same_v<T, bf16>;
    Arena arena;
    const ParamTable table(spec);
    const BatchLayout<T> batches = batch_layout<T>(spec, most, plan, kCuda);
    std::byte* block = nullptr;
    lay_out<T>(arena, spec, table, sample_activation_plan(batches.frame(), plan, kCuda), batches, &block);
    plan.bytes = arena.peak();
    plan.table = arena.table();
    return plan;
}

// As little recomputation as the budget allows.
RunPlan plan_of(const ModelSpec& spec, const SampleCapacity& most, const EngineOptions& o) {
    RunPlan plan;
    plan.micro_batch = static_cast<std::int32_t>(most.samples);
    plan.tokens = most.nodes;
    plan.training = o.training;
    plan.attention = o.attention;
    plan.cuda_graph = o.device == DeviceKind::cuda && o.cuda_graph != GraphChoice::off;
    for (const Recompute r : {Recompute::none, Recompute::mlp, Recompute::layer}) {
        if (o.recompute != RecomputeChoice::automatic && static_cast<int>(o.recompute) != static_cast<int>(r) + 1)
            continue;
        plan.recompute = r;
        plan = o.device == DeviceKind::cuda ? measured<bf16>(spec, most, plan) : measured<float>(spec, most, plan);
        if (o.memory_budget == 0 || plan.bytes <= o.memory_budget) return plan;
    }
    input_error(
        "memory-budget: {} is too small for batches of {} nodes, which need {}; give fewer --batch-nodes, or a "
        "smaller model",
        bytes_text(static_cast<std::int64_t>(o.memory_budget)), most.nodes,
        bytes_text(static_cast<std::int64_t>(plan.bytes)));
}

}  // namespace

std::unique_ptr<SampleEngine> make_sample_engine(const ModelSpec& spec, const SampleCapacity& most,
                                                 const EngineOptions& o) {
    const RunPlan plan = plan_of(spec, most, o);
    if (o.device == DeviceKind::cpu) {
        auto cpu = std::make_unique<Cpu>();
        cpu->threads = o.threads;
        return std::make_unique<SampleRunner<Cpu, float>>(std::move(cpu), spec, most, plan, o.memory_budget);
    }
#if FIEDLER_CUDA
    auto device = std::make_unique<Cuda>(0);
    if (o.kernels == KernelChoice::general) device->forget_architecture();
    return std::make_unique<SampleRunner<Cuda, bf16>>(std::move(device), spec, most, plan, o.memory_budget);
#else
    throw InputError("device: this binary was built without CUDA; use --device cpu");
#endif
}

}  // namespace fiedler
