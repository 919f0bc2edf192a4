// engine/presets.cpp: named bundles of knobs. A preset lists what differs from the defaults, which are those of `tiny`.
#include <fmt/format.h>

#include <cmath>

#include "engine/config.h"
#include "engine/error.h"
#include "engine/params.h"

namespace fiedler {

namespace {

using Values = std::vector<std::pair<const char*, const char*>>;

Values operator+(Values a, const Values& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

std::vector<Preset> all_presets() {
    const Values shape30m = {{"layers", "12"},   {"channels", "384"}, {"heads", "6"},
                             {"vocab", "16384"}, {"context", "1024"}, {"tokenizer-sample-bytes", "64MiB"}};
    const Values recipe30m = {{"steps", "1000"},       {"batch-tokens", "32768"},   {"lr", "2e-3"},
                              {"warmup", "100"},       {"val-every", "250"},        {"val-tokens", "1048576"},
                              {"sample-every", "250"}, {"checkpoint-every", "250"}, {"log-every", "10"}};
    // The published model: one energy, nothing learned about its scale, no gate, no convolution.
    const Values published = {{"pattern", "s"},
                              {"scalar-kind", "energy"},
                              {"temperature", "fixed"},
                              {"tau", "1"},
                              {"inverse-temperature", "1"},
                              {"gate", "false"},
                              {"conv", "false"},
                              {"rope", "all"}};
    const Values samples = {{"schedule", "cosine"},      {"scalars", "4"},     {"beta2", "0.999"},
                            {"min-lr-fraction", "0.02"}, {"log-every", "100"}, {"warmup", "100"},
                            {"checkpoint-every", "0"}};
    // Molecules have some twenty atoms: attention sees all of them, and the walk and the spectrum say where an atom is.
    const Values molecules =
        samples + Values{{"task", "molecules"},   {"pattern", "b"},       {"layers", "4"},         {"channels", "96"},
                         {"heads", "6"},          {"spectral-dims", "8"}, {"eigenvalues", "true"}, {"walk-steps", "8"},
                         {"dropout", "0.1"},      {"epochs", "100"},      {"batch-nodes", "1024"}, {"lr", "1e-3"},
                         {"weight-decay", "0.05"}};
    const Values series =
        samples + Values{{"task", "series"},      {"loss", "absolute"},    {"pattern", "b"},    {"layers", "1"},
                         {"channels", "32"},      {"heads", "2"},          {"pool", "flatten"}, {"dropout", "0.2"},
                         {"epochs", "4"},         {"batch-nodes", "2816"}, {"lr", "1e-3"},      {"patience", "3"},
                         {"weight-decay", "0.05"}};
    return {
        {"tiny",
         "about 1M parameters, for a CPU: sssb, 4 layers, 128 channels, 4 heads, vocabulary 2,048, context 256",
         {}},
        {"small",
         "about 10M parameters: sssb x 2, 320 channels, 5 heads, vocabulary 8,192, context 512",
         {{"layers", "8"},
          {"channels", "320"},
          {"heads", "5"},
          {"vocab", "8192"},
          {"context", "512"},
          {"steps", "1000"},
          {"batch-tokens", "16384"},
          {"lr", "2e-3"},
          {"warmup", "100"},
          {"val-tokens", "262144"}}},
        {"fiedler30m",
         "the best model without a dot product: sssb x 3, coordinates, R = 8, 384 channels, 6 heads, vocabulary "
         "16,384, "
         "context 1,024, spectral embedding of 64 dimensions; MLP widened until it has the parameters of gpt30m "
         "(27.6M)",
         shape30m + recipe30m + Values{{"spectral-dims", "64"}}, "gpt30m"},
        {"fiedler30m-energy", "fiedler30m with energies on a feature Laplacian instead of coordinates",
         shape30m + recipe30m + Values{{"scalar-kind", "energy"}}, "gpt30m"},
        {"gpt30m",
         "the baseline: 12 layers of dot products with RoPE, QK-norm and the convolution, same shape and recipe",
         shape30m + recipe30m + Values{{"pattern", "d"}}},
        {"tau30m",
         "the published form exactly: 6 layers, 6 heads, 384 channels, vocabulary 30,522, energy R = 1, tau and "
         "temperature "
         "fixed at 1, RoPE, untied, AdamW 5e-4, warm-up 100, then constant; 5,000 steps of 131,072 tokens. Betas and "
         "decay were "
         "not published: AdamW's defaults (0.9, 0.999, 0.01)",
         shape30m + published +
             Values{{"layers", "6"},
                    {"vocab", "30522"},
                    {"tied", "false"},
                    {"steps", "5000"},
                    {"batch-tokens", "131072"},
                    {"lr", "5e-4"},
                    {"warmup", "100"},
                    {"schedule", "constant"},
                    {"beta2", "0.999"},
                    {"weight-decay", "0.01"},
                    {"val-every", "250"},
                    {"val-tokens", "1048576"},
                    {"sample-every", "250"},
                    {"checkpoint-every", "250"},
                    {"log-every", "10"}}},
        {"molecules",
         "properties of some thousand molecules: about 500K parameters (30M would learn such a set by heart)",
         molecules},
        {"molecules-small", "properties of some hundred molecules: about 200K parameters, more dropout",
         molecules + Values{{"layers", "3"}, {"channels", "64"}, {"heads", "4"}, {"dropout", "0.2"}}},
        {"series",
         "a time series, channel by channel in patches of 16 steps: about 50K parameters, for series of some "
         "ten thousand rows",
         series},
        {"series-channels", "a time series, all channels of a window at once, joined by how they correlate",
         series + Values{{"series-mode", "channels"}, {"spectral-dims", "4"}, {"batch-nodes", "224"}}},
        {"series-linear", "DLinear, the baseline: a linear map of trend and remainder of each channel",
         series + Values{{"series-mode", "linear"},
                         {"loss", "squared"},
                         {"lr", "2e-3"},
                         {"epochs", "5"},
                         {"instance-norm", "false"},
                         {"layers", "0"},
                         {"last-norm", "false"},
                         {"dropout", "0"},
                         {"channels", "384"},
                         {"heads", "6"},
                         {"pool", "mean"},
                         {"batch-nodes", "224"}}},
        {"tau30m-same-shape",
         "the published form at the shape, vocabulary, parameter count and recipe of fiedler30m: 12 layers, tied",
         shape30m + recipe30m + published, "gpt30m"},
        {"nodes",
         "a graph of some thousand nodes with few labels (--task nodes): eight graph convolutions of the features, no "
         "layer, a linear output. With 20 labels a class, as on Cora and CiteSeer, a layer of attention after them "
         "(--layers 1) is measured to be worse; with many labels try it",
         {{"task", "nodes"},
          {"layers", "0"},
          {"pattern", "s"},
          {"channels", "256"},
          {"heads", "4"},
          {"mlp-hidden", "64"},
          {"last-norm", "false"},
          {"input-hops", "8"},
          {"init-std", "0.002"},
          {"node-dropout", "0.5"},
          {"label-smoothing", "0.3"},
          {"steps", "200"},
          {"patience", "60"},
          {"lr", "1e-2"},
          {"warmup", "5"},
          {"schedule", "constant"},
          {"weight-decay", "1"},
          {"adam-eps", "1e-4"},
          {"val-every", "1"},
          {"log-every", "20"},
          {"checkpoint-every", "0"}}},
    };
}

const Preset& preset_named(const std::string& name) {
    for (const Preset& p : presets())
        if (name == p.name) return p;
    std::vector<std::string> names;
    for (const Preset& p : presets()) names.emplace_back(p.name);
    throw InputError(fmt::format("preset: there is no preset '{}': choose {}", name, fmt::join(names, ", ")));
}

// The MLP width, a multiple of 16, that brings the parameter count nearest to `target`. The count is linear in it.
std::int64_t solve_mlp_hidden(Config c, std::int64_t target) {
    constexpr std::int64_t kMultiple = 16;
    c.mlp_hidden = kMultiple;
    const std::int64_t least = parameter_count(c);
    c.mlp_hidden = 2 * kMultiple;
    const std::int64_t slope = parameter_count(c) - least;
    return kMultiple * (1 + std::llround(static_cast<double>(target - least) / static_cast<double>(slope)));
}

}  // namespace

const std::vector<Preset>& presets() {
    static const std::vector<Preset> all = all_presets();
    return all;
}

void apply_preset(Config& c, const std::string& name) {
    const Preset& p = preset_named(name);
    c.preset = name;
    for (const auto& [knob, value] : p.values) set_value(c, *find_knob(knob), {value}, "preset " + name);
    if (*p.same_size_as) c.mlp_hidden = solve_mlp_hidden(c, parameter_count(preset_config(p.same_size_as)));
}

Config preset_config(const std::string& name) {
    Config c;
    apply_preset(c, name);
    return c;
}

std::int64_t parameter_count(const Config& c) { return ParamTable(model_spec(c)).parameters; }

}  // namespace fiedler
