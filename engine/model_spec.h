// engine/model_spec.h: what a model is (DESIGN 1), independent of how it is run. model_spec() makes it from the knobs
// and checks it, once.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/samples.h"

namespace fiedler {

struct Config;

enum class LayerKind { coordinate, energy, dot };
enum class Rotary { none, dot, all };  // which layers rotate their queries and keys

struct LayerSpec {
    char letter = 's';  // as written in the pattern: s (one scalar), b (bands of scalars), d (dot product)
    LayerKind kind = LayerKind::coordinate;
    std::int32_t scalars = 1;  // R; 0 for dot
    std::int32_t window = 0;   // 0: none
    float inverse_temperature = 1;
};

// What a model of samples has in place of tokens and a vocabulary (samples.h):
//
//   x0   = conv(features Win + bin) + U Ws     conv: graph_conv, `input_hops` times; U: the nodes' spectral embedding,
//                                              given with each batch
//   block as DESIGN 1's, bidirectional within each sample, without a gate; where the causal convolution is, graph_conv on
//          the values (`hops` times) and on the scalars. spectral_start: scalars += U S, S starting at one column of U each.
//          local: x += conv(v) Wl beside attention's v Wo.
//   y    = [pool over the sample] RMSNorm(x) Wout + bout, one row for each node or sample
//
// Dropout (training): on every input of a layer's products and on the last norm's output; on the features, and on all of
// a node's features at once, by the reader of batches (sample_batch.h).
enum class PoolOf { none, mean, sum, attention, flatten };  // none: a row for each node
enum class LossOf { squared, absolute, huber };
struct SampleModel {
    std::int64_t features = 0;
    bool dense = false, input_bias = true;
    std::int32_t edge_types = 0, hops = 1, input_hops = 0;  // edge_types 0: no graph_conv
    bool local = false, spectral_start = false, last_norm = true;
    TargetKind kind = TargetKind::regression;
    std::int32_t outputs = 1;
    PoolOf pool = PoolOf::none;
    std::int64_t nodes_per_sample = 0;  // with flatten
    float dropout = 0, input_dropout = 0, node_dropout = 0;
    LossOf loss = LossOf::squared;  // of numbers
    float smoothing = 0;            // of classes and binary targets

    std::int64_t feature_columns() const { return (features + 7) / 8 * 8; }  // of a dense row
};

struct ModelSpec {
    std::int32_t channels = 0, heads = 0, vocab = 0, context = 0, hidden = 0;
    std::int32_t spectral_dims = 0;  // k, columns of the spectral embedding U; 0: none
    std::vector<LayerSpec> layer;
    bool gate = true, conv = true, qk_norm = true, tied = true, causal = true;
    bool learned_temperature = true;
    bool learned_tau = true, measured_tau = true;  // measured: the median energy of the first batch
    float tau = 1;                                 // where it is not measured
    Rotary rotary = Rotary::dot;
    float rope_theta = 10000, norm_eps = 1e-6f, init_std = 0.02f, gate_bias_min = 2, gate_bias_max = 8;
    std::optional<SampleModel> samples;  // absent: a model of tokens

    // The convolution before attention: over time, or over the edges of samples.
    bool causal_conv() const { return conv && !samples; }
    bool graph_conv() const { return conv && samples && samples->edge_types > 0; }
    bool starts_spectral(const LayerSpec& l) const {
        return samples && samples->spectral_start && spectral_dims > 0 && l.kind == LayerKind::coordinate;
    }
    // Columns of what the outputs' product reads.
    std::int64_t pooled_columns() const {
        return samples && samples->pool == PoolOf::flatten ? samples->nodes_per_sample * channels : channels;
    }

    std::int32_t layers() const { return static_cast<std::int32_t>(layer.size()); }
    std::int32_t head_dim() const { return channels / heads; }
    // Columns of U as the kernels see it, which move 8 values at a time; those beyond k are zero.
    std::int32_t spectral_columns() const { return (spectral_dims + 7) / 8 * 8; }
    bool has_energies() const;
    bool has_gate(const LayerSpec& l) const { return gate && causal && l.kind != LayerKind::dot; }
    bool rotates(const LayerSpec& l) const {
        if (l.kind == LayerKind::coordinate) return false;
        return rotary == Rotary::all || (rotary == Rotary::dot && l.kind == LayerKind::dot);
    }
    bool normalises(const LayerSpec& l) const { return qk_norm && l.kind == LayerKind::dot; }
    bool turns(const LayerSpec& l) const { return rotates(l) || normalises(l); }
    // Columns of the layer's f32 product n P: the scalars of queries and keys, then the gate's logits.
    std::int32_t scalar_columns(const LayerSpec& l) const {
        return l.kind == LayerKind::coordinate ? 2 * heads * l.scalars : 0;
    }
    std::int32_t aux_columns(const LayerSpec& l) const { return scalar_columns(l) + (has_gate(l) ? heads : 0); }
    // Columns of the layer's product in storage type: values only, or queries, keys and values.
    std::int32_t projected_columns(const LayerSpec& l) const {
        return l.kind == LayerKind::coordinate ? channels : 3 * channels;
    }
};

// Letters of a pattern such as "sssb:1024" with the window after a colon, tiled over `layers` layers.
// InputError on an unknown letter, an empty pattern or a bad window.
struct PatternItem {
    char letter;
    std::int32_t window;
};
std::vector<PatternItem> parse_pattern(const std::string& pattern, std::int32_t layers);

// InputError naming the knob when the knobs do not make a model (heads that do not divide the channels, and so on).
ModelSpec model_spec(const Config&);
// Of samples of this shape; config.task is not text. context: nodes of the largest sample.
ModelSpec model_spec(const Config&, const SampleShape&, std::int64_t longest);

// Floating-point operations of one training token (forward and backward, no recomputation): 6 per weight of every
// matrix product, plus the attention's products of D-vectors per visible pair, or, for long sequences and one
// scalar a head, what attention_tree needs of them at least. "Share of peak" counts by this.
double training_flops_per_token(const ModelSpec&, std::int32_t sequence_length);

}  // namespace fiedler
