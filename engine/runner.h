// engine/runner.h: Engine on one device in one precision: memory laid out once, then steps (step.cpp), evaluation,
// reading.
//
// Device memory is the arena's, so what `fiedler plan` prints is what is allocated. Outside it, and not counted: what
// CUDA and cuBLASLt take for themselves, the recorded step included. On the host: kStepsInFlight pinned copies of the
// StepBlock.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "engine/comm.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/spectral_embedding.h"

namespace fiedler {

// What the host gives a step in one copy: the control, and the tokens of all its micro-batches. The same layout on the
// device (a block of the arena) and in pinned memory.
template <class A>
class StepBlock {
  public:
    struct Tokens {  // of one micro-batch
        std::int32_t *inputs, *targets;
        std::int32_t *offsets, *begin, *end;  // nullptr without a document mask
    };
    StepBlock() = default;
    // tokens: of a micro-batch, at most
    StepBlock(std::int64_t tokens, std::int64_t micro_batches, bool document_mask);
    std::size_t bytes() const { return bytes_; }
    std::int64_t micro_batches() const { return micro_batches_; }
    // base: bytes() bytes, 256-byte aligned; nullptr while a plan is measured
    StepControl<A>* control(void* base) const { return static_cast<StepControl<A>*>(base); }
    Tokens tokens(void* base, std::int64_t micro_batch) const;

  private:
    std::int64_t micro_batches_ = 0;
    bool document_mask_ = false;
    std::size_t array_ = 0, bytes_ = 0;  // bytes of one array of one micro-batch
};

// Everything that lives in the arena, in order. Built twice: on the planning arena, which only measures, and on the
// real one.
template <class T>
struct RunLayout {
    using A = acc_t<T>;
    RunLayout(Arena&, const ModelSpec&, const ParamTable&, const ActivationPlan&, bool document_mask,
              std::int64_t micro_batches = 1);
    // Fills the constants' memory; once, after the real layout.
    template <class Dev>
    void upload(const Dev&, const ModelConstants&);

    ParamBlock<T> params;
    Vec<A> moment1, moment2;
    StepBlock<A> step;
    void* step_memory = nullptr;
    StepControl<A>* control = nullptr;  // in step_memory
    Vec<A> norm_partials;
    // Room for any Lf: a plan is made before the data are seen.
    Vec<std::int32_t> lap_offsets, lap_columns;
    Vec<A> lap_values, lap_vectors, lap_eigenvalues;
    std::int64_t lap_entries = 0;               // of lap_columns and lap_values, in use
    Vec<std::byte> lap_of_one, lap_of_several;  // energy_prepare()'s, for layers with one scalar and with more
    EnergyMatrix of_one, of_several;
    Mat<T> spectral;  // U, absent without a spectral embedding
    void* workspace = nullptr;
    std::unique_ptr<Activations<T>> acts;
    FeatureLaplacian<A> laplacian(std::int32_t dim) const;
};

template <class T>
template <class Dev>
void RunLayout<T>::upload(const Dev& dev, const ModelConstants& constants) {
    const HostLaplacian& lap = constants.laplacian;
    lap_entries = static_cast<std::int64_t>(lap.values.size());
    const auto send = [&]<class U, class V>(U* to, const std::vector<V>& from) {
        std::vector<U> converted;
        converted.reserve(from.size());
        for (const V x : from) converted.push_back(U(x));
        copy_to_device(dev, to, converted.data(), converted.size() * sizeof(U));
        synchronize(dev);
    };
    send(lap_offsets.data, lap.offsets);
    send(lap_columns.data, lap.columns);
    send(lap_values.data, lap.values);
    send(lap_vectors.data, lap.eigenvectors);
    send(lap_eigenvalues.data, lap.eigenvalues);
    if (spectral) send(spectral.data, constants.spectral);
    FeatureLaplacian<A> prepared = laplacian(lap.dim);
    if (lap_of_one) energy_prepare(dev, prepared, 1, lap_of_one);
    if (lap_of_several) energy_prepare(dev, prepared, 2, lap_of_several);  // any R > 1: the same matrix
    of_one = prepared.of_one, of_several = prepared.of_several;
}

inline constexpr std::size_t kWorkspaceBytes = std::size_t(32) << 20;  // cuBLASLt's recommendation for Hopper

ActivationPlan activation_plan(const ModelSpec&, const RunPlan&, bool cuda);
// ActivationPlan::loss_rows for a cache of l2_bytes: as many rows as leave half of it to everything else, a power of two;
// 0 where the cache is too small for an efficient product. Not part of the plan, which is made without a device.
std::int64_t loss_rows(const ModelSpec&, const ActivationPlan&, std::size_t l2_bytes);
// The arena's peak and table of a run, measured without a device.
template <class T>
void measure(const ModelSpec&, RunPlan&);

// Memory of host_alloc.
template <class Dev>
class HostMemory {
  public:
    HostMemory(const Dev& dev, std::size_t bytes) : dev_(dev), p_(host_alloc(dev, bytes)) {}
    ~HostMemory() { host_free(dev_, p_); }
    HostMemory(const HostMemory&) = delete;
    HostMemory& operator=(const HostMemory&) = delete;
    std::byte* data() const { return static_cast<std::byte*>(p_); }

  private:
    const Dev& dev_;
    void* p_;
};

struct FreeGraph {
    void operator()(CudaGraph* g) const noexcept { graph_free(g); }
};

// On CUDA the second step in a row of one shape is recorded, and from then on replayed while the shape stays: the first
// has loaded the kernels and chosen the algorithms.
template <class Shape>
class RecordedStep {
  public:
    // Does `work`, or launches what was recorded of it. may_record: false for a step of its own kind.
    void run(const Cuda& dev, const Shape& shape, bool may_record, const std::function<void()>& work) {
        const bool known = may_record && last_ == shape;
        last_ = shape;
        if (known && !(graph_ && shape == shape_)) {
            try {
                graph_.reset(graph_record(dev, work));
            } catch (const DeviceError& e) {
                throw DeviceError(std::string(e.what()) + ", while a step was recorded; --cuda-graph off goes without");
            }
            shape_ = shape;
        }
        if (!graph_ || !may_record || shape != shape_) return work();
        graph_launch(dev, graph_.get());
        ++replayed_;
    }
    void forget() { graph_.reset(); }
    std::int64_t replayed() const { return replayed_; }

  private:
    std::unique_ptr<CudaGraph, FreeGraph> graph_;
    Shape shape_{};              // of the recorded step
    std::optional<Shape> last_;  // of the last one
    std::int64_t replayed_ = 0;
};

template <class Dev, class T>
class Runner final : public Engine {
  public:
    using A = acc_t<T>;
    Runner(std::unique_ptr<Dev>, const ModelSpec&, const RunPlan&, std::size_t budget, ModelConstants = {});
    ~Runner() override;

    const ModelSpec& spec() const override { return spec_; }
    const ParamTable& table() const override { return table_; }
    const RunPlan& plan() const override { return plan_; }
    const ModelConstants& constants() const override { return constants_; }
    std::string device_name() const override;
    std::string device_kind() const override;
    double measured_peak_flops() override;
    std::size_t device_bytes_in_use() override;

    void submit_step(const std::vector<Batch>&, const StepSettings&) override;
    StepResult finish_step() override;
    double loss_sum(const Batch&) override;
    std::vector<float> token_losses(const Batch&) override;
    std::vector<std::vector<double>> calibrate_tau(const Batch&) override;
    void read(Block, float* out) override;
    void write(Block, const float* in) override;
    std::unique_ptr<Decoder> decoder(std::int64_t capacity) override;
    std::unique_ptr<BatchDecoder> batch_decoder(const BatchDecoderOptions&) override;

    // For tests: gradients of one batch (mean loss of its tokens), the model and its parts.
    double loss_and_gradients(const Batch&, std::vector<A>& grads);
    Model<Dev, T>& model() { return *model_; }
    Dev& device() { return *dev_; }
    RunLayout<T>& layout() { return *layout_; }
    void use_comm(std::unique_ptr<Comm> comm) {
        comm_ = std::move(comm);
        recorded_.forget();  // a recorded step goes with the communicator of its recording
    }
    std::int64_t replayed_steps() const { return recorded_.replayed(); }

  private:
    // Tokens and length of the sequences of each micro-batch: what a recorded step depends on. Empty: of its own kind.
    using StepShape = std::vector<std::pair<std::int64_t, std::int32_t>>;
    struct Slot {  // of a step that is not finished
        void* block;
        StepControl<A>* result;  // pinned
        double tokens;
    };

    DeviceBatch upload(const Batch&);
    void place(const Batch&, std::int64_t micro_batch, void* block) const;
    DeviceBatch placed(const Batch&, std::int64_t micro_batch) const;
    void launch_step(const std::vector<DeviceBatch>&, A grad_scale);
    void run_step(const std::vector<DeviceBatch>&, A grad_scale);
    StepControl<A> read_control();
    void clear_control();

    std::unique_ptr<Dev> dev_;
    ModelSpec spec_;
    ParamTable table_;
    RunPlan plan_;
    ModelConstants constants_;
    ActivationPlan activation_plan_;
    std::size_t budget_;
    Arena arena_;
    std::unique_ptr<RunLayout<T>> layout_;
    std::unique_ptr<Model<Dev, T>> model_;
    std::unique_ptr<Comm> comm_;
    std::unique_ptr<HostMemory<Dev>> host_;
    Slot slots_[kStepsInFlight] = {};
    std::int64_t submitted_ = 0, finished_ = 0;
    RecordedStep<StepShape> recorded_;
    double peak_flops_ = 0;
};

}  // namespace fiedler
