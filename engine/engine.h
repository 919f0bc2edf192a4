// engine/engine.h: a model with its memory on one device, ready to be trained, evaluated and read. What a trainer
// needs, without templates: make_engine() picks Engine's implementation by device.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/activations.h"
#include "engine/batch.h"
#include "engine/config.h"
#include "engine/model_spec.h"
#include "engine/params.h"
#include "engine/spectral_embedding.h"
#include "kernels/device.h"

namespace fiedler {

enum class Block { master, moment1, moment2 };
inline constexpr Block kBlocks[] = {Block::master, Block::moment1, Block::moment2};
const char* name_of(Block);

struct StepSettings {
    std::int64_t step = 1;  // 1-based: AdamW's bias correction
    double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, decay = 0.1, clip = 1;
    double skip_above = 0;   // skip the update when the gradient norm exceeds this; 0: only when it is not finite
    bool head_bf16 = false;  // the head in bf16 though the plan has it in fp8
};
// Of the knobs. step: as above; norm_limit: the norm from which on a gradient counts as an outlier, infinite for none.
StepSettings step_settings(const Config&, std::int64_t step, double lr, double norm_limit);
// Steps that head-precision fp8 computes in fp8: those before the last head-bf16-fraction of all.
std::int64_t steps_in_fp8(const Config&);
struct StepResult {
    double loss = 0, norm = 0;  // mean loss of the step's tokens, gradient norm before clipping
    bool skipped = false;
};

// How the run is laid out in memory: what the planner chooses and `fiedler plan` prints.
struct RunPlan {
    std::int32_t micro_batch = 1;    // sequences of context tokens per micro-batch
    std::int32_t micro_batches = 1;  // per step
    Recompute recompute = Recompute::none;
    bool training = true;
    bool document_mask = false;
    bool cuda_graph = true;  // CUDA only: a step that is like the one before is recorded, and replayed from then on
    AttentionChoice attention = AttentionChoice::automatic;
    bool attention_skip = true;    // AttentionForward::skip
    bool head_fp8 = false;         // Head::precision: asked for, and taken by device and shape
    std::int64_t hidden_rows = 0;  // ActivationPlan::mlp_rows; 0: chosen
    std::int64_t tokens = 0;       // of a micro-batch
    std::size_t bytes = 0;         // the arena's peak
    std::string table;             // the arena's table, for people
};

// Incremental decoding of one sequence. The cache holds values and scalars (and keys in dot layers only).
class Decoder {
  public:
    virtual ~Decoder() = default;
    virtual void prefill(const std::vector<std::int32_t>& tokens) = 0;  // clears the cache first
    virtual void append(std::int32_t token) = 0;
    virtual const std::vector<float>& logits() const = 0;  // [vocab], after the last token
    virtual std::int64_t length() const = 0;
    virtual std::size_t cache_bytes_per_token() const = 0;
};

// Many sequences decoded at once: engine/batch_decoder.h.
class BatchDecoder;
struct BatchDecoderOptions;

class Engine {
  public:
    virtual ~Engine() = default;
    virtual const ModelSpec& spec() const = 0;
    virtual const ParamTable& table() const = 0;
    virtual const RunPlan& plan() const = 0;
    virtual const ModelConstants& constants() const = 0;
    virtual std::string device_name() const = 0;    // "cpu (2 threads)", "NVIDIA H100 80GB HBM3"
    virtual std::string device_kind() const = 0;    // "cpu" or "cuda"
    virtual double measured_peak_flops() = 0;       // of a large matrix product, measured once; 0: unknown
    virtual std::size_t device_bytes_in_use() = 0;  // of the whole process, where the device can tell; else 0

    // Gives the device a step's work without waiting for it (the CPU does it at once). The batches may be used again at
    // once; at most kStepsInFlight steps may be unfinished (std::logic_error).
    static constexpr int kStepsInFlight = kMarks;
    virtual void submit_step(const std::vector<Batch>&, const StepSettings&) = 0;
    // Waits for the oldest unfinished step.
    virtual StepResult finish_step() = 0;
    StepResult train_step(const std::vector<Batch>& micro_batches, const StepSettings& settings) {
        submit_step(micro_batches, settings);
        return finish_step();
    }
    virtual double loss_sum(const Batch&) = 0;                  // of the batch's targets, no gradients
    virtual std::vector<float> token_losses(const Batch&) = 0;  // of each of them; 0 where ignored
    virtual std::vector<std::vector<double>> calibrate_tau(const Batch&) = 0;
    // All three blocks have table().elements f32 values. Writing the master block refreshes the weights.
    virtual void read(Block, float* out) = 0;
    virtual void write(Block, const float* in) = 0;
    virtual std::unique_ptr<Decoder> decoder(std::int64_t capacity) = 0;
    // InputError when not even one slot fits the memory.
    virtual std::unique_ptr<BatchDecoder> batch_decoder(const BatchDecoderOptions&) = 0;
};

enum class DeviceKind { cpu, cuda };
// automatic picks CUDA when a device is usable. InputError for cuda without one.
DeviceKind choose_device(DeviceChoice);

struct EngineOptions {
    DeviceKind device = DeviceKind::cpu;
    int threads = 0;
    std::size_t memory_budget = 0;  // 0: what the device has free
    std::int32_t micro_batch = 0;   // 0: chosen
    std::int64_t batch_tokens = 0;  // of a step, a multiple of context
    RecomputeChoice recompute = RecomputeChoice::automatic;
    bool training = true;
    bool document_mask = false;
    GraphChoice cuda_graph = GraphChoice::automatic;
    AttentionChoice attention = AttentionChoice::automatic;
    bool attention_skip = true;  // AttentionForward::skip
    KernelChoice kernels = KernelChoice::automatic;
    bool head_fp8 = false;  // Head::precision: asked for, on a device that has it
};

// Chooses micro-batch and recomputation so that the arena's peak fits the budget, without touching a device. InputError
// says by how much it does not fit and which setting would.
RunPlan plan_run(const ModelSpec&, const EngineOptions&);
EngineOptions engine_options(const Config&, DeviceKind, bool training);
// constants: those of this model (std::logic_error else); the default has the path's Lf and no spectral embedding.
std::unique_ptr<Engine> make_engine(const ModelSpec&, const EngineOptions&, const ModelConstants& constants = {});

}  // namespace fiedler
