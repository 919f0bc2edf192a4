// engine/runner.h: Engine on one device in one precision: memory laid out once, then steps (step.cpp), evaluation,
// reading.
#pragma once
#include "engine/comm.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "engine/spectral_embedding.h"

namespace fiedler {

// Everything that lives in the arena, in order. Built twice: on the planning arena, which only measures, and on the
// real one.
template <class T>
struct RunLayout {
    using A = acc_t<T>;
    RunLayout(Arena&, const ModelSpec&, const ParamTable&, const ActivationPlan&, bool document_mask);
    // Fills the constants' memory; once, after the real layout.
    template <class Dev>
    void upload(const Dev&, const ModelConstants&);

    ParamBlock<T> params;
    Vec<A> moment1, moment2;
    StepControl<A>* control = nullptr;
    Vec<A> norm_partials;
    Vec<std::int32_t> inputs, targets, offsets, begin, end;
    // Room for any Lf: a plan is made before the data are seen.
    Vec<std::int32_t> lap_offsets, lap_columns;
    Vec<A> lap_values, lap_vectors, lap_eigenvalues;
    std::int64_t lap_entries = 0;  // of lap_columns and lap_values, in use
    Mat<T> spectral;               // U, absent without a spectral embedding
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
}

inline constexpr std::size_t kWorkspaceBytes = std::size_t(32) << 20;  // cuBLASLt's recommendation for Hopper

ActivationPlan activation_plan(const ModelSpec&, const RunPlan&, bool cuda);
// The arena's peak and table of a run, measured without a device.
template <class T>
void measure(const ModelSpec&, RunPlan&);

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

    StepResult train_step(const std::vector<Batch>&, const StepSettings&) override;
    double loss_sum(const Batch&) override;
    std::vector<std::vector<double>> calibrate_tau(const Batch&) override;
    void read(Block, float* out) override;
    void write(Block, const float* in) override;
    std::unique_ptr<Decoder> decoder(std::int64_t capacity) override;

    // For tests: gradients of one batch (mean loss of its tokens), the model and its parts.
    double loss_and_gradients(const Batch&, std::vector<A>& grads);
    Model<Dev, T>& model() { return *model_; }
    Dev& device() { return *dev_; }
    RunLayout<T>& layout() { return *layout_; }
    void use_comm(std::unique_ptr<Comm> comm) { comm_ = std::move(comm); }

  private:
    Vec<A> block(Block) const;
    DeviceBatch upload(const Batch&);
    void update_weights(const StepSettings&);
    void refresh_weights();
    StepControl<A> read_control();
    void clear_control();

    std::unique_ptr<Dev> dev_;
    ModelSpec spec_;
    ParamTable table_;
    RunPlan plan_;
    ModelConstants constants_;
    ActivationPlan activation_plan_;
    Arena arena_;
    std::unique_ptr<RunLayout<T>> layout_;
    std::unique_ptr<Model<Dev, T>> model_;
    std::unique_ptr<Comm> comm_;
    double peak_flops_ = 0;
};

}  // namespace fiedler
