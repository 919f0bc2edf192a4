// engine/sample_engine.h: a model of samples with its memory on one device: what Engine (engine.h) is to one of text.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/sample_batch.h"

namespace fiedler {

struct SampleLoss {
    double sum = 0;          // of the losses of all known targets
    std::int64_t known = 0;  // targets
    std::int64_t rows = 0;   // of `predictions`
    std::vector<float>
        predictions;  // [rows, outputs]: probabilities, or numbers in the batch's own units (objective.h)
};

class SampleEngine {
  public:
    virtual ~SampleEngine() = default;
    virtual const ModelSpec& spec() const = 0;
    virtual const ParamTable& table() const = 0;
    virtual const RunPlan& plan() const = 0;
    virtual const SampleCapacity& capacity() const = 0;
    virtual std::string device_name() const = 0;
    virtual std::string device_kind() const = 0;

    // Room for the largest batch, and a batch made ready in it: by any thread, whatever the engine does meanwhile. Rooms go
    // before the engine does.
    virtual PreparedBatch room() = 0;
    virtual void prepare(const SampleBatch&, const SampleDraw&, PreparedBatch& room) const = 0;

    // As Engine's: a step's work without waiting for it, at most kStepsInFlight unfinished; the batch stays as it is until
    // then. The loss is the mean over the batch's known targets; a batch without one is std::logic_error.
    static constexpr int kStepsInFlight = kMarks;
    virtual void submit_step(const PreparedBatch&, const StepSettings&) = 0;
    virtual StepResult finish_step() = 0;
    // Without dropout. Targets may be absent.
    virtual SampleLoss evaluate(const SampleBatch&) = 0;
    virtual std::size_t device_bytes_in_use() = 0;  // as Engine's
    virtual void read(Block, float* out) = 0;
    virtual void write(Block, const float* in) = 0;
};

// options.batch_tokens, micro_batch and document_mask do not count. InputError when the memory is too small.
std::unique_ptr<SampleEngine> make_sample_engine(const ModelSpec&, const SampleCapacity&, const EngineOptions&);

}  // namespace fiedler
