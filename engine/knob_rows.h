// engine/knob_rows.h: what the files of the table of knobs share (knobs.cpp, knobs_graph.cpp, knobs_shaped.cpp).
#pragma once
#include <type_traits>
#include <vector>

#include "engine/config.h"

namespace fiedler {

inline constexpr unsigned kPrepare = bit_of(Command::prepare), kTrain = bit_of(Command::train),
                          kEval = bit_of(Command::eval), kGenerate = bit_of(Command::generate),
                          kPlan = bit_of(Command::plan), kInspect = bit_of(Command::inspect),
                          kSpectrum = bit_of(Command::spectrum), kBench = bit_of(Command::bench),
                          kExport = bit_of(Command::export_model), kImport = bit_of(Command::import_model),
                          kQuantize = bit_of(Command::quantize), kPredict = bit_of(Command::predict);
// kMade: what the model is made with, from data that a benchmark does not have.
inline constexpr unsigned kMade = kTrain | kPlan, kShape = kMade | kBench, kMeasure = kEval | kQuantize,
                          kCorpus = kPrepare | kTrain,
                          kDevice = kTrain | kEval | kGenerate | kSpectrum | kBench | kQuantize | kPredict,
                          kSamples = kTrain | kEval | kPredict;  // what names the files of samples
inline constexpr double kMany = 1e15, kBig = 1e300;

template <auto member>
ChoiceField choice() {
    return {[](const Config& c) { return static_cast<int>(c.*member); },
            [](Config& c, int v) { c.*member = static_cast<std::remove_reference_t<decltype(c.*member)>>(v); }};
}

std::vector<Knob> graph_knobs(), spectrum_knobs();
std::vector<Knob> shaped_data_knobs();  // data of molecules and time series

}  // namespace fiedler
