#include "engine/slot_decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/decode.h"
#include "engine/error.h"
#include "kernels/embedding.h"
#include "kernels/matmul.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"

namespace fiedler {

namespace {

constexpr std::int64_t kPackAlign = 256;  // rows: no tile of attention has those of two prompts, wherever they lie

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

template <class T>
SlotLayout<T>::SlotLayout(Arena& arena, const ModelSpec& spec, std::int64_t n, std::int64_t capacity,
                          std::int64_t prefill_tokens) {
    const auto mat = [&]<class U>(Mat<U>& m, const std::string& name, std::int64_t rows, std::int64_t cols,
                                  Lifetime lifetime) { m = arena.mat<U>(name, rows, cols, lifetime); };
    const auto vec = [&]<class U>(Vec<U>& v, const std::string& name, std::int64_t size, Lifetime lifetime) {
        v = arena.vec<U>(name, size, lifetime);
    };
    constexpr Lifetime kept = Lifetime::persistent, temporary = Lifetime::scratch;
    const std::int64_t c = spec.channels, h = spec.heads;
    std::int64_t columns = c, aux = 8, scalars = 1;
    for (int l = 0; l < spec.layers(); ++l) {
        const LayerSpec& s = spec.layer[static_cast<std::size_t>(l)];
        const std::string name = "layers." + std::to_string(l) + ".slots.";
        SlotCache<T> cache;
        mat(cache.v, name + "v", n * capacity, c, kept);
        if (s.kind == LayerKind::dot)
            mat(cache.k, name + "k", n * capacity, c, kept);
        else
            mat(cache.b, name + "b", n * capacity, h * s.scalars, kept);
        if (spec.has_gate(s)) {
            mat(cache.F, name + "F", n * capacity, h, kept);
            mat(cache.carry, name + "carry", n, h, kept);
        }
        if (spec.conv) {
            mat(cache.past, name + "past", kSlotPast * n, spec.projected_columns(s), kept);
            if (s.kind == LayerKind::coordinate)
                mat(cache.scalars, name + "scalars", kSlotPast * n, spec.scalar_columns(s), kept);
        }
        layer.push_back(cache);
        columns = std::max<std::int64_t>(columns, spec.projected_columns(s));
        aux = std::max<std::int64_t>(aux, round_up(spec.aux_columns(s), 8));
        scalars = std::max<std::int64_t>(scalars, s.scalars);
    }
    mat(scratch.x, "x", n, c, temporary);
    mat(scratch.spectral, "spectral", n, spec.spectral_columns(), temporary);
    mat(scratch.n, "n", n, c, temporary);
    mat(scratch.projected, "projected", n, columns, temporary);
    mat(scratch.mixed, "mixed", n, 2 * c, temporary);
    mat(scratch.rotated, "rotated", n, 2 * c, temporary);
    mat(scratch.o, "o", n, c, temporary);
    mat(scratch.mid, "mid", n, c, temporary);
    mat(scratch.h, "h", n, spec.hidden, temporary);
    mat(scratch.logits, "logits", n, round_up(spec.vocab, 8), temporary);
    scratch.logits.cols = spec.vocab;
    vec(scratch.rstd, "rstd", n, temporary);
    mat(scratch.aux, "aux", n, aux, temporary);
    vec(scratch.a, "a", n * h * scalars, temporary);
    vec(scratch.b, "b", n * h * scalars, temporary);
    if constexpr (std::is_same_v<T, bf16>)
        vec(scratch.partial, "partial", slot_partial_elements(n, capacity, h, spec.head_dim()), temporary);
    vec(slots.token, "token", n, kept);
    vec(slots.length, "length", n, kept);
    vec(slots.begin, "begin", n, kept);
    vec(slots.left, "left", n, kept);
    slots.seed = {reinterpret_cast<std::uint64_t*>(arena.take<std::int64_t>("seed", {n}, kept)), n};
    vec(sampled, "sampled", n, kept);
    prefill.stride = round_up(prefill_tokens + 1, 64);
    prefill.data = arena.take<std::int32_t>("prefill", {PrefillArrays::kCount, prefill.stride}, kept);
}

namespace {

template <class T>
std::size_t bytes_of(const ModelSpec& spec, std::int64_t slots, std::int64_t capacity, std::int64_t prefill_tokens) {
    Arena arena;
    SlotLayout<T>(arena, spec, slots, capacity, prefill_tokens);
    return arena.peak();
}

// As many as fit, at most `most`; InputError for none, or for fewer than were asked for.
template <class T>
std::int64_t choose_slots(const ModelSpec& spec, const BatchDecoderOptions& o, std::int64_t most,
                          std::int64_t prefill_tokens, std::size_t budget) {
    // Rows of a cache are counted in 32 bits.
    const std::int64_t addressable = std::max<std::int64_t>(1, std::numeric_limits<std::int32_t>::max() / o.capacity);
    const auto fits = [&](std::int64_t n) {
        return n <= addressable && (budget == 0 || bytes_of<T>(spec, n, o.capacity, prefill_tokens) <= budget);
    };
    const std::int64_t wanted = o.slots > 0 ? o.slots : most;
    std::int64_t lo = 0, hi = wanted + 1;  // lo fit, hi do not
    if (fits(wanted)) return wanted;
    for (hi = wanted; hi - lo > 1;) {
        const std::int64_t middle = (lo + hi) / 2;
        (fits(middle) ? lo : hi) = middle;
    }
    if (lo > 0 && o.slots == 0) return lo;
    const auto text = [](std::size_t bytes) { return bytes_text(static_cast<std::int64_t>(bytes)); };
    input_error(
        "batch: {} texts of up to {} tokens at once need {} beside the model, and {} are left; {}", lo > 0 ? wanted : 1,
        o.capacity, text(bytes_of<T>(spec, lo > 0 ? wanted : 1, o.capacity, prefill_tokens)), text(budget),
        lo > 0 ? fmt::format("--batch {} would fit", lo) : "give a larger --memory-budget or a smaller --max-tokens");
}

}  // namespace

template <class Dev, class T>
SlotDecoder<Dev, T>::SlotDecoder(const Dev& dev, Model<Dev, T>& model, const ParamBlock<T>& params,
                                 const BatchDecoderOptions& options, std::size_t budget)
    : dev_(dev), model_(model), params_(params), options_(options), prefill_tokens_(model.plan().tokens) {
    constexpr bool cuda = std::is_same_v<Dev, Cuda>;
    const ModelSpec& spec = model.spec();
    if (options.capacity < 1) throw std::logic_error("batch decoder: no capacity");
    packs_ = options.packing == BatchDecoderOptions::Packing::on ||
             (cuda && options.packing == BatchDecoderOptions::Packing::automatic);
    for (const LayerSpec& l : spec.layer)  // the tree's memory is for sequences as they were planned
        if (model.plan().attends_by_tree(spec, l)) packs_ = false;
    std::int64_t most = cuda ? 256 : 16;
    if (options.sequences > 0) most = std::min(most, options.sequences);
    slots_ = choose_slots<T>(spec, options, most, prefill_tokens_, budget);
    const auto lay_out = [&] {
        return std::make_unique<SlotLayout<T>>(arena_, spec, slots_, options_.capacity, prefill_tokens_);
    };
    lay_out();
    arena_.commit(memory_of(dev), budget);
    layout_ = lay_out();
    fill_bytes(dev, arena_.base(), 0, arena_.peak());
    const auto row = static_cast<std::size_t>(round_up(slots_ * std::int64_t(sizeof(std::int32_t)), 256));
    host_ = std::make_unique<HostMemory<Dev>>(dev, kStepsInFlight * row);
    for (std::int64_t s = 0; s < slots_; ++s)
        slot_begin(dev, SlotBegin{.slots = layout_->slots, .slot = static_cast<std::int32_t>(s)});
}

template <class Dev, class T>
SlotDecoder<Dev, T>::~SlotDecoder() {
    try {
        synchronize(dev_);  // unfinished steps write host_
    } catch (const DeviceError&) {
    }  // the device has failed: nothing runs on it any more
}

template <class Dev, class T>
std::size_t SlotDecoder<Dev, T>::cache_bytes_per_token() const {
    return cache_bytes_of_token(layout_->layer);
}

// The weights once, but for an embedding of which only the tokens' rows are read; then the caches.
template <class Dev, class T>
std::int64_t SlotDecoder<Dev, T>::step_bytes(std::int64_t length) const {
    const ParamTable& table = model_.table();
    std::int64_t weights = table.elements;
    if (table.head != table.embedding) weights -= table.tensor[static_cast<std::size_t>(table.embedding)].size();
    return weights * std::int64_t(sizeof(T)) + slots_ * length * static_cast<std::int64_t>(cache_bytes_per_token());
}

// ---- prompts -----------------------------------------------------------------------------------------------------------

template <class Dev, class T>
void SlotDecoder<Dev, T>::check_start(const SlotStart& s) const {
    const auto n = static_cast<std::int64_t>(s.prompt.size());
    if (s.slot < 0 || s.slot >= slots_ || n < 1 || s.most < 1) throw std::logic_error("batch decoder: no such start");
    if (n > prefill_tokens_) throw std::logic_error("batch decoder: the prompt is longer than the context");
    if (n + s.most > options_.capacity) throw std::logic_error("batch decoder: a sequence is longer than its slot");
}

template <class Dev, class T>
void SlotDecoder<Dev, T>::start(const std::vector<SlotStart>& all) {
    Pass pass;
    const auto finish = [&] {
        if (pass.rows > 0) prefill(pass);
        pass = {};
    };
    for (const SlotStart& s : all) check_start(s);
    for (const SlotStart& s : all) {
        clear_slot(s);
        const auto n = static_cast<std::int64_t>(s.prompt.size()) - 1;  // the last one is the first step's
        if (n == 0) continue;
        const std::int64_t rows = packs_ ? round_up(n, kPackAlign) : n;
        if (!packs_ || pass.rows + rows > prefill_tokens_) finish();
        pass.prompt.push_back(&s);
        pass.first.push_back(pass.rows);
        pass.rows += rows;
    }
    finish();
    for (const SlotStart& s : all)
        slot_begin(dev_, SlotBegin{.slots = layout_->slots,
                                   .slot = static_cast<std::int32_t>(s.slot),
                                   .token = s.prompt.back(),
                                   .length = static_cast<std::int32_t>(s.prompt.size()) - 1,
                                   .left = static_cast<std::int32_t>(s.most),
                                   .seed = s.seed});
}

// What the prompt itself does not write: rows before its first token, the gate's sum of no tokens.
template <class Dev, class T>
void SlotDecoder<Dev, T>::clear_slot(const SlotStart& s) {
    const std::size_t before = s.prompt.size() - 1;
    const auto clear = [&]<class U>(const Mat<U>& m, std::int64_t rows) {
        if (m) fill_bytes(dev_, m.row(s.slot * rows), 0, static_cast<std::size_t>(rows * m.ld) * sizeof(U));
    };
    for (SlotCache<T>& c : layout_->layer) {
        if (before < std::size_t(kSlotPast)) clear(c.past, kSlotPast), clear(c.scalars, kSlotPast);
        if (before == 0) clear(c.carry, 1);
    }
}

// Packed prompts always make a pass of as many rows as fit: products of one shape have the same bits for each row. What
// is between prompts is a sequence of its own, which nothing reads.
template <class Dev, class T>
void SlotDecoder<Dev, T>::prefill(const Pass& pass) {
    const PrefillArrays on_device = layout_->prefill;
    staged_.assign(static_cast<std::size_t>(PrefillArrays::kCount * on_device.stride), 0);
    const PrefillArrays host{on_device.stride, staged_.data()};
    pass_rows_ = packs_ ? prefill_tokens_ : pass.rows;
    std::fill_n(host.row(), 3 * host.stride, -1);
    std::int32_t sequences = 0;
    const auto add_sequence = [&](std::int64_t first, std::int64_t last) {
        if (first == last) return;
        host.offsets()[sequences++] = static_cast<std::int32_t>(first);
        for (std::int64_t i = first; i < last; ++i) {
            host.begin()[i] = static_cast<std::int32_t>(first);
            host.end()[i] = static_cast<std::int32_t>(last);
        }
    };
    for (std::size_t p = 0; p < pass.prompt.size(); ++p) {
        const SlotStart& s = *pass.prompt[p];
        const std::int64_t first = pass.first[p], n = static_cast<std::int64_t>(s.prompt.size()) - 1;
        const std::int64_t next = p + 1 < pass.prompt.size() ? pass.first[p + 1] : pass_rows_;
        std::copy_n(s.prompt.begin(), n, host.inputs() + first);
        for (std::int64_t i = 0; i < n; ++i)
            host.row()[first + i] = static_cast<std::int32_t>(s.slot * options_.capacity + i);
        for (std::int64_t back = 1; back <= std::min(n, kSlotPast); ++back)
            host.past()[first + n - back] = static_cast<std::int32_t>(s.slot * kSlotPast + kSlotPast - back);
        host.carry()[first + n - 1] = static_cast<std::int32_t>(s.slot);
        add_sequence(first, first + n);
        const std::int64_t own_end = std::min(first + round_up(n, kPackAlign), next);
        add_sequence(first + n, own_end);  // to the end of the prompt's tiles, alike whoever comes next
        for (std::int64_t at = own_end; at < next; at += kPackAlign) add_sequence(at, std::min(at + kPackAlign, next));
    }
    // Empty ones bring them to the most that there may be: kernels cut their work by the mean length.
    const auto most = static_cast<std::int32_t>(2 * (round_up(prefill_tokens_, kPackAlign) / kPackAlign));
    std::fill(host.offsets() + sequences, host.offsets() + most + 1, static_cast<std::int32_t>(pass_rows_));
    copy_to_device(dev_, on_device.data, staged_.data(), staged_.size() * sizeof(std::int32_t));
    DeviceBatch batch;
    batch.inputs = {on_device.inputs(), pass_rows_};
    batch.seq = Packed::uniform(1, static_cast<std::int32_t>(pass_rows_));
    if (packs_) {
        batch.seq.length = 0, batch.seq.count = most;
        batch.seq.offsets = on_device.offsets(), batch.seq.begin = on_device.begin(), batch.seq.end = on_device.end();
    }
    model_.forward(batch, [&](int l) { copy_layer(l); });
}

template <class Dev, class T>
void SlotDecoder<Dev, T>::copy_layer(int l) {
    const std::int64_t c = model_.spec().channels;
    LayerActivations<T>& act = model_.layer_activations(l);
    SlotCache<T>& to = cache(l);
    const PrefillArrays& p = layout_->prefill;
    const auto copy = [&]<class U>(const Mat<U>& target, const Mat<U>& rows, const std::int32_t* place) {
        if (target) slot_scatter(dev_, SlotScatter<U>{.to = target, .rows = rows, .place = {place, rows.rows}});
    };
    copy(to.v, act.v(c), p.row());
    if (to.k) copy(to.k, act.k(c), p.row());
    copy(to.b, act.b, p.row());
    copy(to.F, act.F, p.row());
    copy(to.carry, act.F, p.carry());
    copy(to.past, act.projected, p.past());
    if (to.scalars) copy(to.scalars, act.aux.columns(0, to.scalars.cols), p.past());
}

// ---- steps -------------------------------------------------------------------------------------------------------------

template <class Dev, class T>
void SlotDecoder<Dev, T>::submit_step() {
    if (submitted_ - finished_ == kStepsInFlight)
        throw std::logic_error("batch decoder: too many steps are unfinished");
    const int mark = static_cast<int>(submitted_ % kStepsInFlight);
    bool replay = false;
    if constexpr (std::is_same_v<Dev, Cuda>) {
        // The first step has loaded the kernels and chosen the algorithms.
        if (options_.cuda_graph && submitted_ > 0 && !graph_) {
            try {
                graph_.reset(graph_record(dev_, [&] { run_step(); }));
            } catch (const DeviceError& e) {
                throw DeviceError(std::string(e.what()) + ", while a step was recorded; --cuda-graph off goes without");
            }
        }
        if (graph_) {
            graph_launch(dev_, graph_.get());
            ++replayed_;
            replay = true;
        }
    }
    if (!replay) run_step();
    const std::size_t bytes = static_cast<std::size_t>(slots_) * sizeof(std::int32_t);
    fetch(dev_,
          host_->data() + static_cast<std::size_t>(mark) * static_cast<std::size_t>(round_up(std::int64_t(bytes), 256)),
          layout_->sampled.data, bytes);
    set_mark(dev_, mark);
    ++submitted_;
}

template <class Dev, class T>
const std::vector<std::int32_t>& SlotDecoder<Dev, T>::finish_step() {
    if (submitted_ == finished_) throw std::logic_error("batch decoder: no step is unfinished");
    const int mark = static_cast<int>(finished_++ % kStepsInFlight);
    wait_for_mark(dev_, mark);
    const std::int64_t row = round_up(slots_ * std::int64_t(sizeof(std::int32_t)), 256);
    const auto* from = reinterpret_cast<const std::int32_t*>(host_->data() + mark * row);
    tokens_.assign(from, from + slots_);
    return tokens_;
}

template <class Dev, class T>
std::vector<float> SlotDecoder<Dev, T>::logits(std::int64_t slot) {
    const Mat<T>& z = layout_->scratch.logits;
    std::vector<T> host(static_cast<std::size_t>(z.cols));
    copy_to_host(dev_, host.data(), z.row(slot), host.size() * sizeof(T));
    std::vector<float> all;
    for (const T x : host) all.push_back(static_cast<float>(x));
    return all;
}

// On the CPU products whose rows do not depend on each other; on CUDA those of training have this for one shape.
template <class Dev, class T>
void SlotDecoder<Dev, T>::product(const Mat<T>& y, const Mat<const T>& x, const Mat<const T>& w,
                                  const Mat<const T>& residual, bool relu_squared) {
    if constexpr (std::is_same_v<Dev, Cpu>)
        slot_product(dev_, SlotProduct<T>{.y = y, .x = x, .w = w, .residual = residual, .relu_squared = relu_squared});
    else if (relu_squared)
        mlp_forward(dev_, MlpForward<T>{.h = y, .x = x, .w = w});
    else
        matmul_forward(dev_, MatmulForward<T, T>{.y = y, .x = x, .w = w, .residual = residual});
}

// One token of every slot: embedding, layers, head, and the tokens after these.
template <class Dev, class T>
void SlotDecoder<Dev, T>::run_step() {
    SlotScratch<T>& s = layout_->scratch;
    const ModelSpec& spec = model_.spec();
    embed();
    for (int l = 0; l < spec.layers(); ++l) run_layer(l);
    norm_forward(dev_, NormForward<T>{.y = s.n, .rstd = s.rstd, .x = s.x, .eps = A(spec.norm_eps)});
    product(s.logits, s.n, model_.table().template matrix<const T>(params_.weights.data, model_.table().head));
    const SamplingSettings& how = options_.sampling;
    sample(dev_, Sample<T>{.slots = layout_->slots,
                           .sampled = layout_->sampled,
                           .logits = s.logits,
                           .inverse_temperature = how.temperature > 0 ? static_cast<float>(1 / how.temperature) : 0.f,
                           .top_k = how.top_k,
                           .top_p = how.top_p,
                           .stop = options_.stop});
}

template <class Dev, class T>
void SlotDecoder<Dev, T>::embed() {
    SlotScratch<T>& s = layout_->scratch;
    const Vec<const std::int32_t> tokens = layout_->slots.token;
    if constexpr (std::is_same_v<Dev, Cuda>) return model_.embed(tokens, s.x, s.spectral);
    const ParamTable& table = model_.table();
    const T* weights = params_.weights.data;
    embedding_forward(dev_,
                      EmbeddingForward<T>{.x = s.x, .tokens = tokens, .table = table.matrix(weights, table.embedding)});
    if (!s.spectral) return;
    embedding_forward(dev_, EmbeddingForward<T>{.x = s.spectral, .tokens = tokens, .table = model_.spectral_table()});
    product(s.x, s.spectral, table.matrix(weights, table.spectral), s.x);
}

template <class Dev, class T>
void SlotDecoder<Dev, T>::run_layer(int l) {
    SlotScratch<T>& s = layout_->scratch;
    const LayerWeights<T> w = model_.layer_weights(l);
    const A eps = A(model_.spec().norm_eps);
    norm_forward(dev_, NormForward<T>{.y = s.n, .rstd = s.rstd, .x = s.x, .eps = eps});
    attend(l, w);
    product(s.mid, s.o, w.out, s.x);
    norm_forward(dev_, NormForward<T>{.y = s.n, .rstd = s.rstd, .x = s.mid, .eps = eps});
    product(s.h, s.n, w.mlp_in, {}, true);
    product(s.x, s.h, w.mlp_out, s.mid);
}

template <class Dev, class T>
void SlotDecoder<Dev, T>::attend(int l, const LayerWeights<T>& w) {
    const ModelSpec& spec = model_.spec();
    const LayerSpec& layer = layer_spec(l);
    SlotScratch<T>& s = layout_->scratch;
    SlotCache<T>& to = cache(l);
    const std::int64_t c = spec.channels, columns = spec.projected_columns(layer);
    const std::int64_t scalars = spec.scalar_columns(layer), hr = std::int64_t(spec.heads) * layer.scalars;
    const Vec<const std::int32_t> length = layout_->slots.length;
    const Mat<T> projected{s.projected.data, slots_, columns};
    const Mat<A> a{s.a.data, slots_, hr};
    product(projected, s.n, w.projected);
    if (w.aux) {
        const Mat<A> aux = s.aux.columns(0, w.aux.rows);
        if constexpr (std::is_same_v<Dev, Cpu>)
            product(aux, s.n, w.aux);
        else
            matmul_forward(dev_, MatmulForward<T, A>{.y = aux, .x = s.n, .w = w.aux, .residual = {}});
    }
    SlotAppend<T> append;
    append.length = length, append.capacity = options_.capacity;
    append.v = to.v, append.x = projected, append.w = w.conv, append.past = to.past;
    if (columns > c) append.mixed = s.mixed;
    if (layer.kind == LayerKind::coordinate) {
        append.a = a, append.b = to.b, append.s = s.aux.columns(0, scalars), append.log_temp = w.log_temp;
        append.w_scalars = w.conv_scalars, append.past_scalars = to.scalars;
    }
    if (to.F) {
        append.F = to.F, append.z = s.aux.columns(scalars, spec.heads), append.bias = w.gate_bias;
        append.carry = to.carry;
    }
    slot_append(dev_, append);

    Mat<T> qk = s.mixed;
    if (spec.rotates(layer) || spec.normalises(layer)) {
        rotary_forward(dev_, RotaryForward<T>{.y = s.rotated,
                                              .x = s.mixed,
                                              .seq = layout_->slots.packed(),
                                              .heads = 2 * spec.heads,
                                              .normalise = spec.normalises(layer),
                                              .rotate = spec.rotates(layer),
                                              .theta = A(spec.rope_theta),
                                              .eps = A(spec.norm_eps)});
        qk = s.rotated;
    }
    const Mat<T> q = qk.columns(0, c), k = qk.columns(c, c);
    if (layer.kind == LayerKind::dot) {
        slot_store(dev_, SlotStore<T>{.cache = to.k, .rows = k, .length = length});
        slot_dot(dev_, SlotDot<T>{.o = s.o,
                                  .q = q,
                                  .k = to.k,
                                  .v = to.v,
                                  .length = length,
                                  .partial = s.partial,
                                  .heads = spec.heads,
                                  .window = layer.window,
                                  .scale = A(1 / std::sqrt(double(spec.head_dim())))});
        return;
    }
    if (layer.kind == LayerKind::energy) energies(l, w, q, k);
    slot_attention(dev_, SlotAttention<T>{.o = s.o,
                                          .a = a,
                                          .b = to.b,
                                          .F = to.F,
                                          .v = to.v,
                                          .length = length,
                                          .partial = s.partial,
                                          .heads = spec.heads,
                                          .scalars = layer.scalars,
                                          .window = layer.window});
}

template <class Dev, class T>
void SlotDecoder<Dev, T>::energies(int l, const LayerWeights<T>& w, const Mat<T>& q, const Mat<T>& k) {
    const ModelSpec& spec = model_.spec();
    const LayerSpec& layer = layer_spec(l);
    SlotScratch<T>& s = layout_->scratch;
    const std::int64_t hr = std::int64_t(spec.heads) * layer.scalars;
    const auto energy = [&](const Mat<A>& out, const Mat<T>& x) {
        energy_forward(dev_, EnergyForward<T>{.a = out,
                                              .x = x,
                                              .lap = model_.laplacian(),
                                              .log_tau = w.log_tau,
                                              .log_temp = w.log_temp,
                                              .heads = spec.heads,
                                              .scalars = layer.scalars});
    };
    const Mat<A> b{s.b.data, slots_, hr};
    energy({s.a.data, slots_, hr}, q);
    energy(b, k);
    slot_store(dev_, SlotStore<A>{.cache = cache(l).b, .rows = b, .length = layout_->slots.length});
}

#define FIEDLER_SLOT_DECODER(Dev, T) \
    template struct SlotLayout<T>;   \
    template class SlotDecoder<Dev, T>;
FIEDLER_SLOT_DECODER(Cpu, float)
FIEDLER_SLOT_DECODER(Cpu, double)
#if FIEDLER_CUDA
FIEDLER_SLOT_DECODER(Cuda, bf16)
#endif

}  // namespace fiedler
