// engine/model_spec.h: what a model is (DESIGN 1), independent of how it is run. model_spec() makes it from the knobs
// and checks it, once.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

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

// Floating-point operations of one training token (forward and backward, no recomputation): 6 per weight of every
// matrix product, plus the attention's products of D-vectors per visible pair, or, for long sequences and one
// scalar a head, what attention_tree needs of them at least. "Share of peak" counts by this.
double training_flops_per_token(const ModelSpec&, std::int32_t sequence_length);

}  // namespace fiedler
