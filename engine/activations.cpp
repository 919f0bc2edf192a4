#include "engine/activations.h"

#include <algorithm>
#include <functional>
#include <map>

#include "kernels/attention.h"
#include "kernels/attention_tree.h"
#include "kernels/bag.h"
#include "kernels/conv.h"
#include "kernels/conv_rotary.h"
#include "kernels/coordinate.h"
#include "kernels/embedding.h"
#include "kernels/energy.h"
#include "kernels/gate.h"
#include "kernels/graph_conv.h"
#include "kernels/head.h"
#include "kernels/pool.h"

namespace fiedler {

namespace {

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// One row of the table: a view to be filled, its width, and who shares its memory.
struct Slot {
    std::string name;
    std::int64_t cols = 0;
    enum class Kept { input, mlp, other } kept = Kept::other;
    std::function<void*(Arena&, const std::string& name, const std::vector<std::int64_t>& shape, Lifetime)> take;
    std::function<void(void*, std::int64_t rows)> fill;
    bool hidden = false;  // has ActivationPlan::hidden_rows() rows
};

template <class U>
void* take_typed(Arena& arena, const std::string& name, const std::vector<std::int64_t>& shape, Lifetime lifetime) {
    return arena.take<U>(name, shape, lifetime);
}

template <class T>
std::vector<Slot> slots_of(LayerActivations<T>& a, const ModelSpec& m, const LayerSpec& l) {
    using A = acc_t<T>;
    std::vector<Slot> slots;
    const auto matrix = [&]<class U>(Mat<U>& view, const char* name, std::int64_t cols,
                                     Slot::Kept kept = Slot::Kept::other) {
        slots.push_back({name, cols, kept, take_typed<U>,
                         [&view, cols](void* p, std::int64_t rows) { view = Mat<U>(static_cast<U*>(p), rows, cols); }});
    };
    const auto column = [&](Vec<A>& view, const char* name) {
        slots.push_back({name, 1, Slot::Kept::other, take_typed<A>,
                         [&view](void* p, std::int64_t rows) { view = Vec<A>(static_cast<A*>(p), rows); }});
    };
    const std::int64_t c = m.channels, h = m.heads;
    matrix(a.x, "x", c, Slot::Kept::input);
    matrix(a.n1, "n1", c);
    column(a.rstd1, "rstd1");
    matrix(a.projected, "projected", m.projected_columns(l));
    if (m.graph_conv()) a.hops.resize(static_cast<std::size_t>(m.samples->hops - 1));
    for (std::size_t hop = 0; hop < a.hops.size(); ++hop)
        matrix(a.hops[hop], ("hops" + std::to_string(hop)).c_str(), m.projected_columns(l));
    if (m.causal_conv() || m.graph_conv()) matrix(a.mixed, "mixed", m.projected_columns(l));
    if (m.turns(l) && !m.causal_conv()) matrix(a.rotated, "rotated", 2 * c);
    if (m.aux_columns(l) > 0) matrix(a.aux, "aux", round_up(m.aux_columns(l), 8));
    if (m.graph_conv() && m.scalar_columns(l) > 0) matrix(a.scalars, "scalars", m.scalar_columns(l));
    if (l.kind != LayerKind::dot) {
        matrix(a.a, "a", h * l.scalars);
        matrix(a.b, "b", h * l.scalars);
    }
    if (m.has_gate(l)) matrix(a.F, "F", h);
    matrix(a.o, "o", c);
    matrix(a.lse, "lse", h);
    matrix(a.mid, "mid", c);
    matrix(a.n2, "n2", c);
    column(a.rstd2, "rstd2");
    matrix(a.h, "h", m.hidden, Slot::Kept::mlp);
    for (std::size_t i = slots.size() - 3; i < slots.size(); ++i) slots[i].hidden = true;
    return slots;
}

bool is_shared(const Slot& s, const ActivationPlan& plan) {
    if (!plan.keep_layers) return true;
    if (plan.recompute == Recompute::layer) return s.kept != Slot::Kept::input;
    return plan.recompute == Recompute::mlp && s.kept == Slot::Kept::mlp;
}

}  // namespace

namespace {

// Rows of `context` tokens, or documents of at most that; without pointers: for sizes only.
Packed packing_of(const ModelSpec& spec, const ActivationPlan& plan) {
    Packed seq;
    seq.tokens = static_cast<std::int32_t>(plan.tokens);
    seq.count = static_cast<std::int32_t>(plan.sequences);
    if (spec.samples) return seq;
    if (plan.sequences * spec.context <= plan.tokens) seq.length = spec.context;
    return seq;
}

}  // namespace

const char* name_of(Recompute r) {
    switch (r) {
        case Recompute::none:
            return "none";
        case Recompute::mlp:
            return "mlp";
        case Recompute::layer:
            return "layer";
    }
    return "?";
}

template <class T>
Activations<T>::Activations(Arena& arena, const ModelSpec& spec, const ActivationPlan& plan)
    : spec_(spec), layers_(static_cast<std::size_t>(spec.layers())), tokens_(plan.tokens) {
    place_layers(arena, plan);
    place_scratch(arena, plan);
}

template <class T>
void Activations<T>::place_layers(Arena& arena, const ActivationPlan& plan) {
    struct Shared {
        std::int64_t cols = 0;
        const Slot* widest = nullptr;
        void* memory = nullptr;
    };
    std::map<std::string, Shared> shared;
    std::vector<std::vector<Slot>> slots;
    for (std::size_t l = 0; l < layers_.size(); ++l) slots.push_back(slots_of(layers_[l], spec_, spec_.layer[l]));
    for (const auto& of_layer : slots)
        for (const Slot& s : of_layer)
            if (Shared& common = shared[s.name]; is_shared(s, plan) && s.cols > common.cols) {
                common.cols = s.cols;
                common.widest = &s;
            }
    const auto rows_of = [&](const Slot& s) { return s.hidden ? plan.hidden_rows() : plan.tokens; };
    const Lifetime lifetime = plan.keep_layers ? Lifetime::recomputed : Lifetime::scratch;
    for (auto& [name, s] : shared)
        if (s.widest) s.memory = s.widest->take(arena, name, {rows_of(*s.widest), s.cols}, lifetime);
    for (std::size_t l = 0; l < layers_.size(); ++l) {
        for (const Slot& s : slots[l]) {
            void* p = is_shared(s, plan) ? shared[s.name].memory
                                         : s.take(arena, "layers." + std::to_string(l) + "." + s.name,
                                                  {rows_of(s), s.cols}, Lifetime::saved);
            fills_.push_back(
                [fill = s.fill, p, most = rows_of(s)](std::int64_t rows) { fill(p, std::min(rows, most)); });
        }
        if (!spec_.causal_conv() && !spec_.graph_conv())
            fills_.push_back([a = &layers_[l]](std::int64_t) { a->mixed = a->projected; });
    }
    bind(plan.tokens);
}

template <class T>
void Activations<T>::place_scratch(Arena& arena, const ActivationPlan& plan) {
    const std::int64_t n = plan.tokens, c = spec_.channels;
    const auto matrix = [&]<class U>(Mat<U>& view, const char* name, std::int64_t cols,
                                     Lifetime lifetime = Lifetime::scratch) {
        if (cols == 0) return;
        void* p = arena.take<U>(name, {n, cols}, lifetime);
        fills_.push_back([&view, p, cols](std::int64_t rows) { view = Mat<U>(static_cast<U*>(p), rows, cols); });
    };
    const auto vector = [&](Vec<A>& view, const char* name) {
        void* p = arena.take<A>(name, {n}, Lifetime::scratch);
        fills_.push_back([&view, p](std::int64_t rows) { view = Vec<A>(static_cast<A*>(p), rows); });
    };
    if (!spec_.samples)
        matrix(scratch_.spectral, "spectral", spec_.spectral_columns(),
               plan.training ? Lifetime::saved : Lifetime::scratch);
    if (spec_.samples) scratch_.input_hops.resize(static_cast<std::size_t>(spec_.samples->input_hops));
    for (std::size_t hop = 0; hop < scratch_.input_hops.size(); ++hop)
        matrix(scratch_.input_hops[hop], ("input.hops" + std::to_string(hop)).c_str(), c,
               plan.training ? Lifetime::saved : Lifetime::scratch);
    matrix(scratch_.x_last, "x_last", c);
    matrix(scratch_.n_last, "n_last", c);
    vector(scratch_.rstd_last, "rstd_last");
    vector(scratch_.losses, "losses");
    if (plan.training) {
        matrix(scratch_.dx, "dx", c);
        matrix(scratch_.dn, "dn", c);
    }
    if (spec_.samples)
        place_outputs(arena, plan);
    else
        place_logits(arena, plan);
    if constexpr (std::is_same_v<T, bf16>) place_tree(arena, plan);
    if (plan.training)
        place_gradients(arena, plan);
    else if (const std::int64_t elements = forward_elements(plan);
             std::is_same_v<T, bf16> && !spec_.samples && scratch_.tree.size == 0 && elements > 0)
        scratch_.partials = {arena.take<A>("partials", {elements}, Lifetime::scratch), elements};
    bind(plan.tokens);
}

// Logits are dead before the first layer's gradients are made.
template <class T>
void Activations<T>::place_logits(Arena& arena, const ActivationPlan& plan) {
    auto scope = arena.scope();
    const std::int64_t padded = round_up(spec_.vocab, 8);
    scratch_.logits = Mat<T>(arena.take<T>("logits", {plan.logits_rows, padded}, Lifetime::scratch), plan.logits_rows,
                             spec_.vocab, padded);
    if constexpr (std::is_same_v<T, bf16>) {
        const std::int64_t elements = head_scratch_elements(plan.logits_rows, spec_.vocab, spec_.channels);
        scratch_.head = {arena.take<A>("head", {elements}, Lifetime::scratch), elements};
        if (plan.head_fp8) {
            const std::int64_t bytes = head_fp8_scratch_bytes(plan.logits_rows, spec_.vocab, spec_.channels);
            scratch_.head_fp8 = {arena.take<unsigned char>("head.fp8", {bytes}, Lifetime::scratch), bytes};
        }
    }
    scope.close();
}

// What lies between the last norm and the loss of samples.
template <class T>
void Activations<T>::place_outputs(Arena& arena, const ActivationPlan& plan) {
    const SampleModel& m = *spec_.samples;
    const std::int64_t rows = plan.output_rows(spec_), c = spec_.channels, h = spec_.heads;
    const auto matrix = [&]<class U>(Mat<U>& view, const char* name, std::int64_t n, std::int64_t cols) {
        const std::int64_t padded = round_up(cols, 8);
        view = Mat<U>(arena.take<U>(name, {n, padded}, Lifetime::scratch), n, cols, padded);
    };
    matrix(scratch_.outputs, "outputs", rows, m.outputs);
    scratch_.predictions = arena.mat<A>("predictions", rows, m.outputs, Lifetime::scratch);
    scratch_.counts = arena.vec<std::int32_t>("counts", rows, Lifetime::scratch);
    scratch_.ones = arena.mat<T>("ones", std::max(rows, plan.tokens), 8, Lifetime::persistent);
    if (plan.training) matrix(scratch_.doutputs, "doutputs", rows, m.outputs);
    if (m.pool != PoolOf::none && m.pool != PoolOf::flatten) {
        matrix(scratch_.pooled, "pooled", rows, c);
        if (plan.training) matrix(scratch_.dpooled, "dpooled", rows, c);
    }
    if (m.pool == PoolOf::attention) {
        matrix(scratch_.z, "pool.z", plan.tokens, h);
        scratch_.pool_lse = arena.mat<A>("pool.lse", rows, h, Lifetime::scratch);
        if (plan.training) matrix(scratch_.dz, "pool.dz", plan.tokens, h);
    }
    if (std::is_same_v<T, bf16> && !plan.training) {  // in training the layers' partial sums have room for it
        const std::int64_t elements = pool_scratch_elements(plan.tokens, c, h);
        scratch_.partials = {arena.take<A>("partials", {elements}, Lifetime::scratch), elements};
    }
}

template <class T>
void Activations<T>::place_gradients(Arena& arena, const ActivationPlan& plan) {
    const std::int64_t n = plan.tokens, c = spec_.channels, h = spec_.heads;
    const auto matrix = [&]<class U>(Mat<U>& view, const char* name, std::int64_t cols, std::int64_t most) {
        if (cols == 0) return;
        void* p = arena.take<U>(name, {most, cols}, Lifetime::scratch);
        fills_.push_back([&view, p, cols, most](std::int64_t rows) {
            view = Mat<U>(static_cast<U*>(p), std::min(rows, most), cols);
        });
    };
    std::int64_t columns = 0, rotated = 0, aux = 0, hr = 0, gated = 0, scalars = 0;
    for (const LayerSpec& l : spec_.layer) {
        columns = std::max<std::int64_t>(columns, spec_.projected_columns(l));
        if (spec_.turns(l) && !spec_.causal_conv()) rotated = 2 * c;
        aux = std::max(aux, round_up(spec_.aux_columns(l), 8));
        scalars = std::max(scalars, round_up(spec_.scalar_columns(l), 8));
        hr = std::max<std::int64_t>(hr, h * l.scalars);
        if (spec_.has_gate(l)) gated = h;
    }
    auto scope = arena.scope();
    matrix(scratch_.du, "du", spec_.hidden, plan.hidden_rows());
    matrix(scratch_.do_, "do", c, n);
    matrix(scratch_.dmixed, "dmixed", columns, n);
    if (spec_.causal_conv() || spec_.graph_conv()) matrix(scratch_.dprojected, "dprojected", columns, n);
    if (spec_.graph_conv()) matrix(scratch_.dscalars, "dscalars", scalars, n);
    matrix(scratch_.drotated, "drotated", rotated, n);
    matrix(scratch_.daux, "daux", aux, n);
    matrix(scratch_.da, "da", hr, n);
    matrix(scratch_.db, "db", hr, n);
    matrix(scratch_.dF, "dF", gated, n);
    matrix(scratch_.delta, "delta", h, n);
    if constexpr (std::is_same_v<T, bf16>) place_partials(arena, plan);
    scope.close();
}

// What a forward pass of dense attention may use.
template <class T>
std::int64_t Activations<T>::forward_elements(const ActivationPlan& plan) const {
    std::int64_t elements = 0;
    for (const LayerSpec& l : spec_.layer)
        if (l.kind != LayerKind::dot && !plan.attends_by_tree(spec_, l))
            elements = std::max(elements, attention_forward_scratch_elements(plan.tokens, spec_.heads, l.scalars));
    return elements;
}

// Partial sums of the kernels that reduce over tokens without atomics: elements of the largest.
template <class T>
std::int64_t Activations<T>::partial_elements(const ActivationPlan& plan) const {
    std::int64_t elements = std::max<std::int64_t>(1, forward_elements(plan));
    const Packed seq = packing_of(spec_, plan);
    const std::int64_t n = plan.tokens;
    if (spec_.samples) {
        elements = std::max(elements, bag_scratch_elements(plan.feature_entries, spec_.channels));
        elements = std::max(elements, pool_scratch_elements(n, spec_.channels, spec_.heads));
        if (spec_.samples->input_hops > 0)
            elements = std::max(elements, graph_conv_scratch_elements(n, spec_.samples->edge_types, spec_.channels));
    }
    for (const LayerSpec& l : spec_.layer) {
        if (spec_.graph_conv())
            elements = std::max(
                elements, graph_conv_scratch_elements(n, spec_.samples->edge_types,
                                                      std::max(spec_.projected_columns(l), spec_.scalar_columns(l))));
        if (l.kind != LayerKind::dot && !plan.attends_by_tree(spec_, l))
            elements = std::max(
                elements, attention_partial_elements(seq, spec_.context, spec_.heads, spec_.channels / spec_.heads,
                                                     l.scalars, l.window, spec_.causal));
    }
    return elements;
}

// Sums over blocks that all layers of a backward pass leave, and its end adds up.
template <class T>
std::int64_t Activations<T>::pending_elements(const ActivationPlan& plan) const {
    std::int64_t elements = 0;
    for (const LayerSpec& l : spec_.layer) {
        if (spec_.causal_conv())
            elements += spec_.turns(l) ? conv_rotary_pending_elements(plan.tokens, spec_.projected_columns(l))
                                       : conv_pending_elements(plan.tokens, spec_.projected_columns(l));
        if (l.kind == LayerKind::coordinate)
            elements += coordinate_pending_elements(plan.tokens, spec_.scalar_columns(l), spec_.heads);
        if (l.kind == LayerKind::energy) elements += energy_pending_elements(plan.tokens, spec_.heads, l.scalars);
        if (spec_.has_gate(l)) elements += gate_pending_elements(plan.tokens, plan.sequences, spec_.heads);
    }
    return elements;
}

// The tree's memory serves the partial sums as well: no kernel needs both.
template <class T>
void Activations<T>::place_tree(Arena& arena, const ActivationPlan& plan) {
    if (!std::any_of(spec_.layer.begin(), spec_.layer.end(),
                     [&](const LayerSpec& l) { return plan.attends_by_tree(spec_, l); }))
        return;
    const Packed seq = packing_of(spec_, plan);
    const std::int64_t width = spec_.head_dim();
    std::int64_t bytes = attention_tree_forward_bytes(seq, spec_.context, spec_.heads, width, spec_.causal);
    if (plan.training) {
        bytes = std::max(bytes, attention_tree_backward_bytes(seq, spec_.context, spec_.heads, width, spec_.causal));
        bytes = std::max(bytes, partial_elements(plan) * std::int64_t(sizeof(A)));
    }
    scratch_.tree = {arena.take<unsigned char>("tree, partials", {bytes}, Lifetime::scratch), bytes};
    if (plan.training) {
        void* memory = scratch_.tree.data;
        scratch_.partials = {static_cast<A*>(memory), partial_elements(plan)};
    }
}

// What only the GPU's kernels need: partial sums, of one kernel and of all layers, and room for the embedding to put
// tokens in order.
template <class T>
void Activations<T>::place_partials(Arena& arena, const ActivationPlan& plan) {
    if (scratch_.tree.size == 0) {
        const std::int64_t elements = partial_elements(plan);
        scratch_.partials = {arena.take<A>("partials", {elements}, Lifetime::scratch), elements};
    }
    if (const std::int64_t elements = pending_elements(plan); elements > 0)
        scratch_.pending = {arena.take<A>("pending sums", {elements}, Lifetime::scratch), elements};
    if (spec_.samples) return;
    const auto bytes = static_cast<std::int64_t>(embedding_scratch_bytes(plan.tokens, spec_.channels));
    scratch_.sort = {arena.take<std::byte>("sort", {bytes}, Lifetime::scratch), bytes};
}

template <class T>
void Activations<T>::bind(std::int64_t tokens) {
    tokens_ = tokens;
    for (const auto& fill : fills_) fill(tokens);
}

template class Activations<float>;
template class Activations<double>;
template class Activations<bf16>;

}  // namespace fiedler
