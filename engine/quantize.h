// engine/quantize.h: a model's weights file with its large matrices as integers (kernels/quantised.h).
#pragma once
#include <string>
#include <vector>

#include "engine/bundle.h"
#include "kernels/quantised.h"

namespace fiedler {

struct QuantisedTensor {
    std::string name;
    std::vector<std::int64_t> shape;
    bool quantised = false;
    std::int64_t bytes = 0;
    QuantError error;
};
struct Quantised {
    std::vector<QuantisedTensor> tensors;
    std::int64_t bytes = 0, f32_bytes = 0;  // of the file; of the same tensors in f32
};
// Writes `out`, a .fdl file with the tokenizer inside. InputError for values that are not finite.
Quantised quantize_model(const Bundle&, Quant, QuantSearch, const std::string& out, int threads);

}  // namespace fiedler
