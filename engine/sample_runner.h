// engine/sample_runner.h: SampleEngine on one device in one precision.
#pragma once
#include "engine/run_parts.h"
#include "engine/sample_engine.h"

namespace fiedler {

template <class Dev, class T>
class SampleRunner final : public SampleEngine {
  public:
    using A = acc_t<T>;
    SampleRunner(std::unique_ptr<Dev>, const ModelSpec&, const SampleCapacity&, const RunPlan&, std::size_t budget);
    ~SampleRunner() override;

    const ModelSpec& spec() const override { return spec_; }
    const ParamTable& table() const override { return table_; }
    const RunPlan& plan() const override { return plan_; }
    const SampleCapacity& capacity() const override { return capacity_; }
    std::string device_name() const override { return name_of_device(*dev_); }
    std::string device_kind() const override { return std::is_same_v<Dev, Cuda> ? "cuda" : "cpu"; }

    void submit_step(const SampleBatch&, const StepSettings&, std::uint64_t seed) override;
    StepResult finish_step() override;
    SampleLoss evaluate(const SampleBatch&) override;
    void read(Block which, float* out) override { read_block(*dev_, *layout_, which, out); }
    void write(Block which, const float* in) override { write_block(*dev_, *layout_, which, in); }

    // For tests: the mean loss of the batch's known targets and its gradient, with the given draw.
    double loss_and_gradients(const SampleBatch&, const SampleDraw&, std::vector<A>& grads);
    Model<Dev, T>& model() { return *model_; }
    RunLayout<T>& layout() { return *layout_; }

  private:
    struct Slot {                         // of a step that is not finished
        std::byte* block;                 // pinned
        StepControl<A>*control, *result;  // pinned
        double known;
    };
    DeviceBatch place(const SampleBatch&, const SampleDraw&, Slot&, DeviceSamples&);
    void run(const DeviceBatch&, A grad_scale);
    void fill_ones();

    std::unique_ptr<Dev> dev_;
    ModelSpec spec_;
    ParamTable table_;
    SampleCapacity capacity_;
    RunPlan plan_;
    ActivationPlan activation_plan_;
    Arena arena_;
    std::unique_ptr<RunLayout<T>> layout_;
    std::byte* block_ = nullptr;  // on the device
    std::unique_ptr<Model<Dev, T>> model_;
    std::unique_ptr<HostMemory<Dev>> host_;
    PreparedSamples<T> prepared_;
    Slot slots_[kStepsInFlight] = {};
    std::int64_t submitted_ = 0, finished_ = 0;
};

}  // namespace fiedler
