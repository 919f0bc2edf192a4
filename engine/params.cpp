#include "engine/params.h"

#include <algorithm>
#include <cmath>

#include "engine/files.h"
#include "engine/rng.h"

namespace fiedler {

namespace {

constexpr std::int64_t kAlign = 8;

// Numbers that training may change: not the columns that only pad.
std::int64_t parameters_of(const ParamTensor& t, const ModelSpec& s) {
    if (t.init == Init::spectral || t.init == Init::axes) return t.rows * s.spectral_dims;
    if (s.samples && t.name == "input.weight") return s.samples->features * s.channels;
    return t.name == "input.bias" || t.name == "output.bias" ? t.rows : t.size();
}

std::string layer_name(int l, const char* what) { return "layers." + std::to_string(l) + "." + what; }

}  // namespace

ParamTable::ParamTable(const ModelSpec& s) {
    const auto add = [&](std::string name, std::int64_t rows, std::int64_t cols, Init init, Group group,
                         float value = 0) {
        tensor.push_back({std::move(name), rows, cols, init, group, value, 0});
        return static_cast<int>(tensor.size()) - 1;
    };
    const std::int64_t c = s.channels, h = s.heads;
    if (s.samples) {
        const SampleModel& m = *s.samples;
        embedding = m.dense ? add("input.weight", c, m.feature_columns(), Init::features, Group::decayed)
                            : add("input.weight", m.features, c, Init::normal, Group::decayed);
        head = add("output.weight", m.outputs, s.pooled_columns(), Init::features, Group::decayed);
        if (m.pool == PoolOf::attention) pool = add("pool.weight", h, c, Init::zeros, Group::decayed);
        if (m.input_bias) input_bias = add("input.bias", c, 8, Init::zeros, Group::plain);
        if (m.input_hops > 0)
            input_conv = add("input.conv.weight", std::int64_t(m.input_hops) * (m.edge_types + 1), c, Init::graph_conv,
                             Group::plain);
        head_bias = add("output.bias", m.outputs, 8, Init::zeros, Group::plain);
    } else {
        embedding = add("embedding.weight", s.vocab, c, Init::normal, Group::decayed);
        head = s.tied ? embedding : add("head.weight", s.vocab, c, Init::normal, Group::decayed);
    }
    if (s.spectral_dims > 0) spectral = add("spectral.weight", c, s.spectral_columns(), Init::spectral, Group::decayed);
    for (int l = 0; l < s.layers(); ++l) {
        const LayerSpec& spec = s.layer[static_cast<std::size_t>(l)];
        const bool coordinate = spec.kind == LayerKind::coordinate, dot = spec.kind == LayerKind::dot;
        LayerTensors t;
        t.projected = add(layer_name(l, coordinate ? "attn.v.weight" : "attn.qkv.weight"), s.projected_columns(spec), c,
                          Init::normal, Group::decayed);
        if (coordinate)
            t.scalars =
                add(layer_name(l, "attn.scalars.weight"), s.scalar_columns(spec), c, Init::normal, Group::decayed);
        if (s.has_gate(spec)) t.gate = add(layer_name(l, "attn.gate.weight"), h, c, Init::zeros, Group::decayed);
        t.out = add(layer_name(l, "attn.out.weight"), c, c, Init::projection, Group::decayed);
        if (s.samples && s.samples->local)
            t.local = add(layer_name(l, "attn.local.weight"), c, c, Init::projection, Group::decayed);
        t.mlp_in = add(layer_name(l, "mlp.in.weight"), s.hidden, c, Init::normal, Group::decayed);
        t.mlp_out = add(layer_name(l, "mlp.out.weight"), c, s.hidden, Init::projection, Group::decayed);
        if (s.starts_spectral(spec))
            t.spectral = add(layer_name(l, "attn.spectral.weight"), s.scalar_columns(spec), s.spectral_columns(),
                             Init::axes, Group::plain, static_cast<float>(s.spectral_dims));
        if (s.graph_conv()) {
            const std::int64_t rows = s.samples->edge_types + 1;
            t.conv = add(layer_name(l, "attn.conv.weight"), s.samples->hops * rows, s.projected_columns(spec),
                         Init::graph_conv, Group::plain);
            if (coordinate)
                t.conv_scalars = add(layer_name(l, "attn.conv_scalars.weight"), rows, s.scalar_columns(spec),
                                     Init::graph_ident, Group::plain);
        }
        if (s.causal_conv()) {
            t.conv =
                add(layer_name(l, "attn.conv.weight"), s.projected_columns(spec), 4, Init::identity_conv, Group::plain);
            if (coordinate)
                t.conv_scalars = add(layer_name(l, "attn.conv_scalars.weight"), s.scalar_columns(spec), 4,
                                     Init::identity_conv, Group::plain);
        }
        if (s.has_gate(spec)) t.gate_bias = add(layer_name(l, "attn.gate.bias"), h, 0, Init::gate_bias, Group::plain);
        if (!dot)
            t.log_temp = add(layer_name(l, "attn.log_temperature"), h, 0, Init::log_temperature,
                             s.learned_temperature ? Group::plain : Group::frozen, -std::log(spec.inverse_temperature));
        if (spec.kind == LayerKind::energy)
            t.log_tau = add(layer_name(l, "attn.log_tau"), spec.scalars, 0, Init::log_tau,
                            s.learned_tau ? Group::plain : Group::frozen, std::log(s.tau));
        layer.push_back(t);
    }
    for (const Group g : {Group::decayed, Group::plain, Group::frozen}) {
        for (ParamTensor& t : tensor)
            if (t.group == g) {
                t.offset = elements;
                elements += (t.size() + kAlign - 1) / kAlign * kAlign;
                if (g != Group::frozen) parameters += parameters_of(t, s);
            }
        if (g == Group::decayed) decayed = elements;
        if (g == Group::plain) trainable = elements;
    }
}

const ParamTensor* ParamTable::find(const std::string& name) const {
    for (const ParamTensor& t : tensor)
        if (t.name == name) return &t;
    return nullptr;
}

void initialise(const ParamTable& table, const ModelSpec& s, std::uint64_t seed, float* out) {
    std::fill(out, out + table.elements, 0.f);
    const float projection_std = s.init_std / std::sqrt(2.f * static_cast<float>(s.layers()));
    for (const ParamTensor& t : table.tensor) {
        float* w = out + t.offset;
        const std::int64_t n = t.size();
        const std::uint64_t stream = hash_bytes(t.name);
        switch (t.init) {
            case Init::normal:
            case Init::features:
            case Init::projection: {
                const float deviation = t.init == Init::normal     ? s.init_std
                                        : t.init == Init::features ? 1 / std::sqrt(static_cast<float>(t.cols))
                                                                   : projection_std;
                for (std::int64_t i = 0; i < n; ++i)
                    w[i] = deviation * static_cast<float>(rng::normal(seed, stream, static_cast<std::uint64_t>(i)));
                break;
            }
            case Init::spectral:  // U Ws adds nothing at first: better on both corpora than starting at E's size
            case Init::zeros:
                break;
            case Init::identity_conv:
                for (std::int64_t i = 0; i < t.rows; ++i) w[4 * i + 3] = 1;
                break;
            case Init::graph_conv:
                std::fill(w, w + n, 0.5f);
                break;
            case Init::graph_ident:
                std::fill(w, w + t.cols, 1.f);
                break;
            case Init::axes:
                for (std::int64_t i = 0; i < t.rows; ++i)
                    w[i * t.cols + i % (t.rows / 2) % static_cast<std::int64_t>(t.value)] = 1;
                break;
            case Init::gate_bias:  // spread over the heads: memories from e^min to e^max tokens
                for (std::int64_t i = 0; i < n; ++i)
                    w[i] = n == 1 ? (s.gate_bias_min + s.gate_bias_max) / 2
                                  : s.gate_bias_min + (s.gate_bias_max - s.gate_bias_min) * static_cast<float>(i) /
                                                          static_cast<float>(n - 1);
                break;
            case Init::log_temperature:
            case Init::log_tau:
                std::fill(w, w + n, t.value);
                break;
        }
    }
}

}  // namespace fiedler
