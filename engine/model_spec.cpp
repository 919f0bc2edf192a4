#include "engine/model_spec.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "engine/config.h"
#include "engine/error.h"
#include "engine/params.h"
#include "kernels/attention.h"

namespace fiedler {

std::vector<PatternItem> parse_pattern(const std::string& pattern, std::int32_t layers) {
    std::vector<PatternItem> items;
    for (std::size_t i = 0; i < pattern.size();) {
        const char letter = pattern[i++];
        if (letter != 's' && letter != 'b' && letter != 'd')
            throw InputError(
                fmt::format("pattern: '{}' at position {} of \"{}\" is no layer; write s (one scalar), b (bands) or d "
                            "(dot product), "
                            "each with an optional window, as in sssb:1024",
                            letter, i, pattern));
        std::int32_t window = 0;
        if (i < pattern.size() && pattern[i] == ':') {
            const char *first = pattern.data() + i + 1, *end = pattern.data() + pattern.size();
            const auto [last, status] = std::from_chars(first, end, window);
            if (status != std::errc{} || window < 1)
                throw InputError(
                    fmt::format("pattern: the window after '{}:' in \"{}\" must be a whole number of tokens, 1 or "
                                "more, as in sssb:1024",
                                letter, pattern));
            i = static_cast<std::size_t>(last - pattern.data());
        }
        items.push_back({letter, window});
    }
    if (items.empty()) throw InputError("pattern: is empty; write one letter per layer, as in sssb");
    if (layers % static_cast<std::int32_t>(items.size()) != 0)
        throw InputError(
            fmt::format("pattern: \"{}\" has {} layers, which does not divide layers = {}; write a pattern whose "
                        "length divides it",
                        pattern, items.size(), layers));
    std::vector<PatternItem> all;
    while (all.size() < static_cast<std::size_t>(layers)) all.insert(all.end(), items.begin(), items.end());
    return all;
}

namespace {

float start_of_inverse_temperature(const Config& c, LayerKind kind, std::int32_t scalars) {
    if (c.inverse_temperature > 0) return static_cast<float>(c.inverse_temperature);
    if (kind == LayerKind::energy) return scalars == 1 ? 20.f : 8.f;  // measured: DESIGN 1, "Recipe"
    return scalars == 1 ? 2.f : 0.7f;
}

LayerSpec layer_spec(const Config& c, const PatternItem& item, std::int32_t head_dim) {
    LayerSpec l;
    l.letter = item.letter;
    l.window = item.window;
    if (item.letter == 'd') {
        l.kind = LayerKind::dot;
        l.scalars = 0;
        return l;
    }
    l.kind = c.scalar_kind == ScalarKind::energy ? LayerKind::energy : LayerKind::coordinate;
    l.scalars = item.letter == 's' ? 1 : static_cast<std::int32_t>(c.scalars);
    if (l.kind == LayerKind::energy && head_dim % l.scalars != 0)
        throw InputError(
            fmt::format("scalars: {} bands do not divide the head width {} (channels / heads); choose a divisor",
                        l.scalars, head_dim));
    l.inverse_temperature = start_of_inverse_temperature(c, l.kind, l.scalars);
    return l;
}

}  // namespace

bool ModelSpec::has_energies() const {
    return std::any_of(layer.begin(), layer.end(), [](const LayerSpec& l) { return l.kind == LayerKind::energy; });
}

namespace {

ModelSpec common_spec(const Config& c) {
    ModelSpec s;
    if (c.channels % c.heads != 0)
        throw InputError(
            fmt::format("channels: {} is not divisible by heads = {}; change one of them", c.channels, c.heads));
    if (c.channels % 8 != 0)
        throw InputError(
            fmt::format("channels: {} is not a multiple of 8; the kernels move 8 values at a time", c.channels));
    const auto head_dim = static_cast<std::int32_t>(c.channels / c.heads);
    if (head_dim != 16 && head_dim != 32 && head_dim != 64 && head_dim != 128)
        throw InputError(
            fmt::format("heads: channels / heads = {} / {} = {}, but a head must be 16, 32, 64 or 128 wide", c.channels,
                        c.heads, head_dim));
    s.channels = static_cast<std::int32_t>(c.channels);
    s.heads = static_cast<std::int32_t>(c.heads);
    s.hidden = static_cast<std::int32_t>(c.mlp_hidden > 0 ? c.mlp_hidden : 4 * c.channels);
    if (s.hidden % 8 != 0) throw InputError(fmt::format("mlp-hidden: {} is not a multiple of 8", s.hidden));
    s.spectral_dims = static_cast<std::int32_t>(c.spectral_dims);
    if (c.layers > 0)
        for (const PatternItem& item : parse_pattern(c.pattern, static_cast<std::int32_t>(c.layers)))
            s.layer.push_back(layer_spec(c, item, head_dim));
    s.gate = c.gate;
    s.conv = c.conv;
    s.qk_norm = c.qk_norm;
    s.tied = c.tied;
    s.causal = c.causal;
    s.learned_temperature = c.temperature == Temperature::learned;
    const TauChoice tau = parse_tau(c.tau);
    s.measured_tau = tau.measured;
    s.learned_tau = tau.learned;
    if (!tau.measured) s.tau = static_cast<float>(tau.value);
    s.rotary = c.rope;
    s.rope_theta = static_cast<float>(c.rope_theta);
    s.norm_eps = static_cast<float>(c.norm_eps);
    s.init_std = static_cast<float>(c.init_std);
    s.gate_bias_min = static_cast<float>(c.gate_bias_min);
    s.gate_bias_max = static_cast<float>(c.gate_bias_max);
    return s;
}

PoolOf pool_of(const Config& c, const SampleShape& shape) {
    if (shape.level == TargetLevel::node) return PoolOf::none;
    if (c.pool == PoolChoice::flatten && shape.nodes_per_sample == 0)
        throw InputError(
            "pool: flatten is for samples with equal numbers of nodes; these differ: choose mean or "
            "attention");
    return static_cast<PoolOf>(static_cast<int>(c.pool) + 1);
}

}  // namespace

ModelSpec model_spec(const Config& c) {
    if (c.task != Task::text)
        throw InputError("task: a model of samples is made from its data; `fiedler train` says what it needs");
    if (c.layers < 1) throw InputError("layers: a model of text needs at least 1");
    ModelSpec s = common_spec(c);
    s.vocab = static_cast<std::int32_t>(c.vocab);
    s.context = static_cast<std::int32_t>(c.context);
    if (c.spectral_dims > c.vocab)
        throw InputError(fmt::format("spectral-dims: {} is more than the {} tokens of the vocabulary; choose fewer",
                                     c.spectral_dims, c.vocab));
    return s;
}

ModelSpec model_spec(const Config& c, const SampleShape& shape, std::int64_t longest) {
    ModelSpec s = common_spec(c);
    if (longest > std::numeric_limits<std::int32_t>::max() || shape.features > std::numeric_limits<std::int32_t>::max())
        input_error("samples: {} nodes in one, {} features: more than 2^31 - 1", longest, shape.features);
    for (const LayerSpec& l : s.layer)
        if (l.window > 0) input_error("pattern: a window (\":{}\") is for text; nodes have no order", l.window);
    s.causal = s.gate = false;
    s.rotary = Rotary::none;
    s.tied = false;
    s.spectral_dims = static_cast<std::int32_t>(shape.spectral_dims);
    s.context = static_cast<std::int32_t>(std::max<std::int64_t>(longest, 1));
    SampleModel m;
    m.features = shape.features;
    m.dense = shape.dense;
    m.input_bias = c.input_bias;
    m.edge_types = shape.edge_types;
    m.hops = static_cast<std::int32_t>(c.hops);
    m.input_hops = c.conv && shape.edge_types > 0 ? static_cast<std::int32_t>(c.input_hops) : 0;
    m.local = c.local && c.conv && shape.edge_types > 0;
    m.spectral_start = c.spectral_start;
    m.last_norm = c.last_norm;
    m.kind = shape.kind;
    m.outputs = shape.outputs;
    m.pool = pool_of(c, shape);
    m.nodes_per_sample = shape.nodes_per_sample;
    m.dropout = static_cast<float>(c.dropout);
    m.input_dropout = static_cast<float>(c.input_dropout);
    m.node_dropout = static_cast<float>(c.node_dropout);
    m.loss = static_cast<LossOf>(c.loss);
    m.smoothing = static_cast<float>(c.label_smoothing);
    s.samples = m;
    return s;
}

double training_flops_per_token(const ModelSpec& s, std::int32_t length) {
    const ParamTable table(s);
    double weights = double(s.vocab) * s.channels;  // the head, tied or not
    for (const ParamTensor& t : table.tensor)
        if (t.group == Group::decayed && t.name.starts_with("layers.")) weights += double(t.size());
    weights += 2.0 / 3 * s.spectral_columns() * s.channels;  // U Ws and its dWs; U has no gradient
    double attention = 0;
    for (const LayerSpec& l : s.layer) {
        double pairs = attention_pairs(length, s.causal, l.window) / length;  // visible keys of a token, on average
        if (l.kind != LayerKind::dot && l.scalars == 1 && l.window == 0) {  // not so many are necessary: attention_tree
            constexpr double kLeaf = 1024, kOfLevel = 32;
            pairs = std::min(pairs, kLeaf / 2 + kOfLevel * std::log2(std::max(length / kLeaf, 2.0)));
        }
        // Products of D-vectors per pair: P V; dO V', P' dO. With dot products also Q K'; dQ, dK.
        const double products = l.kind == LayerKind::dot ? 2 + 4 : 1 + 2;
        attention += 2 * products * pairs * s.channels;
    }
    return 6 * weights + attention;
}

}  // namespace fiedler
