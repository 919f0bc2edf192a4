// engine/position_plot.h: how the loss falls with what a token can look back at: one self-contained SVG. The horizontal
// axis is logarithmic.
#pragma once
#include <string>
#include <vector>

#include "engine/evaluate.h"
#include "engine/evaluate_contexts.h"

namespace fiedler {

// A bucket is drawn at its middle, its last position and its mean loss beside it.
std::string svg_of(const std::vector<LossAtPosition>&, const std::string& title);
std::string svg_of(const std::vector<ContextLoss>&, const std::string& title);

}  // namespace fiedler
