// engine/use_model.h: a trained model ready to be evaluated and to generate, by whatever runs it: the engine (on the GPU or
// in f32 on the CPU), or, for quantised weights, the CPU runtime (infer/).
#pragma once
#include <memory>
#include <string>

#include "engine/batch_decoder.h"
#include "engine/bundle.h"
#include "engine/evaluate.h"
#include "engine/generate.h"

namespace fiedler {

class ModelInUse {
  public:
    explicit ModelInUse(Bundle b) : bundle_(std::move(b)) {}
    virtual ~ModelInUse() = default;
    const Bundle& bundle() const { return bundle_; }  // its weights are absent where the runtime has them mapped
    virtual std::string name() = 0;                   // of what runs it
    virtual LossSource losses() = 0;
    virtual std::unique_ptr<Decoder> decoder(std::int64_t capacity) = 0;
    // Absent where sequences are decoded one after another (the CPU runtime).
    virtual std::unique_ptr<BatchDecoder> batch_decoder(const BatchDecoderOptions&) { return nullptr; }

  protected:
    Bundle bundle_;
};

// The sequences that losses() takes. 0: of the training's context, and one at a time.
struct SequenceShape {
    std::int64_t context = 0, rows = 0;
};
// path: as load_bundle takes it. --device cuda and bidirectional models widen quantised weights for the engine;
// --runtime runs unquantised ones by the runtime.
std::unique_ptr<ModelInUse> use_model(const std::string& path, const Config&, const SequenceShape& = {});
std::unique_ptr<ModelInUse> use_bundle(Bundle, const Config&, const SequenceShape& = {});  // by the engine
std::unique_ptr<ModelInUse> use_runtime(const std::string& weights, const Config&,
                                        const SequenceShape& = {});  // a .fdl file; rows: always one

// Data is measured with the model's own tokenizer. A corpus is encoded whole and held out whole.
Dataset data_for(const Bundle&, const Config&);

}  // namespace fiedler
