// engine/sample_runner.h: SampleEngine on one device in one precision.
#pragma once
#include "engine/run_parts.h"
#include "engine/sample_engine.h"

namespace fiedler {

// For batches of at most `most`, which is a BatchLayout's frame.
ActivationPlan sample_activation_plan(const SampleCapacity& most, const RunPlan&, bool cuda);

template <class Dev, class T>
class SampleRunner final : public SampleEngine {
  public:
    using A = acc_t<T>;
    SampleRunner(std::unique_ptr<Dev>, const ModelSpec&, const SampleCapacity&, const RunPlan&, std::size_t budget,
                 bool framed = std::is_same_v<Dev, Cuda>);
    ~SampleRunner() override;

    const ModelSpec& spec() const override { return spec_; }
    const ParamTable& table() const override { return table_; }
    const RunPlan& plan() const override { return plan_; }
    const SampleCapacity& capacity() const override { return capacity_; }
    std::string device_name() const override { return name_of_device(*dev_); }
    std::string device_kind() const override { return std::is_same_v<Dev, Cuda> ? "cuda" : "cpu"; }

    PreparedBatch room() override;
    void prepare(const SampleBatch& b, const SampleDraw& d, PreparedBatch& room) const override {
        batches_.prepare(b, d, room);
    }
    void submit_step(const PreparedBatch&, const StepSettings&) override;
    StepResult finish_step() override;
    SampleLoss evaluate(const SampleBatch&) override;
    std::size_t device_bytes_in_use() override { return bytes_in_use(*dev_); }
    void read(Block which, float* out) override { read_block(*dev_, *layout_, which, out); }
    void write(Block which, const float* in) override { write_block(*dev_, *layout_, which, in); }

    // For tests: the mean loss of the batch's known targets and its gradient, with the given draw.
    double loss_and_gradients(const SampleBatch&, const SampleDraw&, std::vector<A>& grads);
    Model<Dev, T>& model() { return *model_; }
    Dev& device() { return *dev_; }
    std::int64_t replayed_steps() const { return recorded_.replayed(); }
    RunLayout<T>& layout() { return *layout_; }

  private:
    struct Slot {                         // of a step that is not finished
        StepControl<A>*control, *result;  // pinned
        double known;
    };
    DeviceBatch place(const PreparedBatch&, DeviceSamples&);
    const PreparedBatch& ready(const SampleBatch&, const SampleDraw&);
    void run(const DeviceBatch&);
    // All that frames leave open: the nodes, and which arrays a batch has.
    using StepShape = std::pair<std::int64_t, std::uint32_t>;
    void launch_step(const DeviceBatch&, const StepShape&);
    void fill_ones();

    std::unique_ptr<Dev> dev_;
    ModelSpec spec_;
    ParamTable table_;
    SampleCapacity capacity_;
    RunPlan plan_;
    BatchLayout<T> batches_;
    ActivationPlan activation_plan_;
    Arena arena_;
    std::unique_ptr<RunLayout<T>> layout_;
    std::byte* block_ = nullptr;  // for a batch on CUDA; a CPU reads it where it is
    std::unique_ptr<Model<Dev, T>> model_;
    std::unique_ptr<HostMemory<Dev>> host_;
    PreparedBatch own_;  // evaluate's
    RecordedStep<StepShape> recorded_;
    Slot slots_[kStepsInFlight] = {};
    std::int64_t submitted_ = 0, finished_ = 0;
};

}  // namespace fiedler
