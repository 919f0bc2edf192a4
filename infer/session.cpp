#include "infer/session.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "kernels/energy.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/parallel.h"
#include "kernels/rotary.h"

namespace fiedler {

namespace {

constexpr std::int64_t kTaps = 4, kOld = kTaps - 1;

struct Types {
    CacheType keys, gate, values;
};
Types types_of(CacheKind kind, bool product) {
    if (kind == CacheKind::exact) return {CacheType::f32, CacheType::f32, CacheType::f32};
    const CacheType values = kind == CacheKind::int8 ? CacheType::int8 : CacheType::f32;
    return {product ? values : CacheType::f16, CacheType::f16, values};
}
std::int64_t key_planes(const ModelSpec& spec, const LayerSpec& l) {
    return l.kind == LayerKind::dot ? spec.channels : std::int64_t(spec.heads) * l.scalars;
}

void add_row(float* y, const float* x, const float* w, std::int64_t n) {
    for (std::int64_t c = 0; c < n; ++c) y[c] += w[c] * x[c];
}

// y = x W' (+ residual) as anyone would write it first.
void plain_product(const Mat<const float>& w, const Mat<const float>& x, const Mat<float>& y,
                   const Mat<const float>& residual) {
    for (std::int64_t m = 0; m < x.rows; ++m)
        for (std::int64_t n = 0; n < w.rows; ++n) {
            float sum = residual ? residual.row(m)[n] : 0.f;
            for (std::int64_t k = 0; k < w.cols; ++k) sum += w.row(n)[k] * x.row(m)[k];
            y.row(m)[n] = sum;
        }
}

// -log softmax(logits)[target]
double loss_of(const float* logits, std::int64_t vocab, std::int32_t target) {
    const Eigen::Map<const Eigen::ArrayXf> z(logits, vocab);
    const float top = z.maxCoeff();
    double sum = 0;
    constexpr std::int64_t kPiece = 1024;  // f32 within a piece, f64 over pieces
    for (std::int64_t i = 0; i < vocab; i += kPiece)
        sum += double((z.segment(i, std::min(kPiece, vocab - i)) - top).exp().sum());
    return std::log(sum) + double(top) - double(logits[target]);
}

}  // namespace

const char* name_of(CacheKind k) {
    constexpr const char* names[] = {"compact", "exact", "int8"};
    return names[static_cast<int>(k)];
}

CacheBytes cache_bytes(const ModelSpec& spec, CacheKind kind) {
    CacheBytes all;
    for (const LayerSpec& l : spec.layer) {
        const bool product = l.kind == LayerKind::dot;
        const Types t = types_of(kind, product);
        const auto h = static_cast<std::size_t>(spec.heads), c = static_cast<std::size_t>(spec.channels);
        const std::size_t of_values = c * bytes_of(t.values) + (t.values == CacheType::int8 ? 2 * h : 0);
        all.ours += of_values + static_cast<std::size_t>(key_planes(spec, l)) * bytes_of(t.keys);
        if (t.keys == CacheType::int8) all.ours += 2 * h;
        if (spec.has_gate(l)) all.ours += h * bytes_of(t.gate);
        all.key_value += 2 * of_values;
    }
    return all;
}

Session::Session(const InferModel& model, const SessionOptions& options)
    : model_(model), options_(options), dev_{options.threads} {
    const ModelSpec& spec = model.spec();
    if (options_.capacity == 0) options_.capacity = spec.context;
    if (options_.capacity < 1 || options_.capacity > 1 << 24)
        input_error("capacity: {} tokens; give 1 to 16777216", options_.capacity);
    options_.batch = std::clamp<std::int64_t>(options_.batch, 1, options_.capacity);
    const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
    const std::int64_t c = spec.channels, h = spec.heads, n = options_.batch;
    std::int64_t columns = c, aux = 1, scalars = 1;
    for (const InferLayer& layer : model.layers()) {
        const bool product = layer.spec.kind == LayerKind::dot;
        const std::int64_t planes = key_planes(spec, layer.spec);
        LayerState s;
        s.rows.resize(size((kOld + n) * layer.projected.rows));
        s.scalar_rows.resize(size((kOld + n) * spec.scalar_columns(layer.spec)));
        state_.push_back(std::move(s));
        columns = std::max(columns, layer.projected.rows);
        aux = std::max(aux, layer.aux.rows);
        scalars = std::max(scalars, product ? c : planes);
    }
    for (auto* buffer : {&x_, &n_, &mid_, &o_}) buffer->resize(size(n * c));
    for (auto* buffer : {&aux_, &aux_mixed_}) buffer->resize(size(n * aux));
    for (auto* buffer : {&a_, &b_}) buffer->resize(size(n * scalars));
    hidden_.resize(size(n * spec.hidden));
    mixed_.resize(size(n * columns));
    rotated_.resize(size(n * 2 * c));
    gate_.resize(size(n * h));
    spectral_.resize(size(n * spec.spectral_columns()));
    rstd_.resize(size(n));
    logits_.resize(size(spec.vocab));
}

// Room for `tokens` in the cache, at least twice what there was: a model's context may be far more than is ever used.
void Session::make_room(std::int64_t tokens) {
    if (tokens <= room_) return;
    const std::int64_t room = std::min(options_.capacity, std::max({tokens, 2 * room_, std::int64_t{64}}));
    const ModelSpec& spec = model_.spec();
    const auto widen = [&]<class T>(std::vector<T>& plane, std::int64_t planes, std::size_t unit) {
        const std::size_t old = static_cast<std::size_t>(room_) * unit, wide = static_cast<std::size_t>(room) * unit;
        std::vector<T> fresh(static_cast<std::size_t>(planes) * wide);
        for (std::size_t p = 0; p < static_cast<std::size_t>(planes) && old > 0; ++p)
            std::copy_n(plane.begin() + static_cast<std::ptrdiff_t>(p * old), old,
                        fresh.begin() + static_cast<std::ptrdiff_t>(p * wide));
        plane.swap(fresh);
    };
    for (std::size_t l = 0; l < state_.size(); ++l) {
        const LayerSpec& layer = spec.layer[l];
        const Types t = types_of(options_.cache, layer.kind == LayerKind::dot);
        LayerState& s = state_[l];
        widen(s.keys, key_planes(spec, layer), bytes_of(t.keys));
        widen(s.values, spec.heads, static_cast<std::size_t>(spec.head_dim()) * bytes_of(t.values));
        if (spec.has_gate(layer)) widen(s.gate, spec.heads, bytes_of(t.gate));
        if (t.keys == CacheType::int8) widen(s.key_scales, spec.heads, 1);
        if (t.values == CacheType::int8) widen(s.value_scales, spec.heads, 1);
    }
    room_ = room;
}

std::size_t Session::memory_bytes() const {
    std::size_t all = 0;
    for (const LayerState& s : state_)
        all += s.keys.size() + s.gate.size() + s.values.size() + 2 * (s.key_scales.size() + s.value_scales.size()) +
               4 * (s.rows.size() + s.scalar_rows.size());
    for (const auto* b : {&x_, &n_, &mid_, &hidden_, &mixed_, &rotated_, &aux_, &aux_mixed_, &a_, &b_, &gate_, &o_,
                          &spectral_, &rstd_, &logits_, &all_logits_})
        all += 4 * b->size();
    return all + quant_.value.size() + 4 * (quant_.scale.size() + quant_.sum.size());
}

void Session::check(std::span<const std::int32_t> tokens) const {
    if (tokens.empty()) throw InputError("prompt: is empty; give at least one token");
    if (static_cast<std::int64_t>(tokens.size()) > options_.capacity - length_)
        input_error("max-tokens: {} tokens do not fit the cache, which has room for {} more of {}", tokens.size(),
                    options_.capacity - length_, options_.capacity);
    for (const std::int32_t t : tokens)
        if (t < 0 || t >= model_.spec().vocab)
            input_error("token {} lies outside the vocabulary of {}; use the model's own tokenizer", t,
                        model_.spec().vocab);
}

void Session::feed(std::span<const std::int32_t> tokens) {
    check(tokens);
    const std::int64_t c = model_.spec().channels;
    std::int64_t n = 0;
    for (std::size_t first = 0; first < tokens.size(); first += static_cast<std::size_t>(n)) {
        n = std::min<std::int64_t>(options_.batch, static_cast<std::int64_t>(tokens.size() - first));
        forward(tokens.subspan(first, static_cast<std::size_t>(n)));
    }
    product(model_.head(), rows(n_, n, c).slice_rows(n - 1, 1), rows(logits_, 1, model_.spec().vocab));
}

double Session::loss_sum(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets) {
    reset();
    check(tokens);
    const std::int64_t vocab = model_.spec().vocab;
    all_logits_.resize(static_cast<std::size_t>(options_.batch * vocab));
    double sum = 0;
    for (std::size_t first = 0; first < tokens.size();) {
        const std::size_t n = std::min(static_cast<std::size_t>(options_.batch), tokens.size() - first);
        const auto count = static_cast<std::int64_t>(n);
        forward(tokens.subspan(first, n));
        product(model_.head(), rows(n_, count, model_.spec().channels), rows(all_logits_, count, vocab));
        std::vector<double> losses(n, 0.0);
        parallel_for(dev_, count, [&](std::int64_t i) {
            const std::int32_t target = targets[first + static_cast<std::size_t>(i)];
            if (target >= 0)
                losses[static_cast<std::size_t>(i)] = loss_of(all_logits_.data() + i * vocab, vocab, target);
        });
        for (const double loss : losses) sum += loss;
        first += n;
    }
    return sum;
}

// x = E[token] + U[token] Ws
void Session::embed(std::span<const std::int32_t> tokens) {
    const ModelSpec& spec = model_.spec();
    const auto n = static_cast<std::int64_t>(tokens.size());
    const Mat<float> x = rows(x_, n, spec.channels), u = rows(spectral_, n, spec.spectral_columns());
    for (std::int64_t i = 0; i < n; ++i) {
        model_.embedding().row(tokens[static_cast<std::size_t>(i)], x.row(i));
        if (!model_.spectral()) continue;
        std::fill(u.row(i), u.row(i) + u.cols, 0.f);
        model_.spectral_table().row(tokens[static_cast<std::size_t>(i)], u.row(i));
    }
    if (model_.spectral()) product(model_.spectral(), u, x, x);
}

void Session::norm(const Mat<float>& x, const Mat<float>& y) {
    norm_forward(dev_,
                 NormForward<float>{.y = y, .rstd = {rstd_.data(), x.rows}, .x = x, .eps = model_.spec().norm_eps});
}

void Session::product(const InferMatrix& w, const Mat<const float>& x, const Mat<float>& y,
                      const Mat<const float>& residual, bool relu_squared) {
    if (w.quantised()) {
        quantise_tokens(dev_, x, quant_);
        quantised_matmul(dev_,
                         {.y = y, .x = &quant_, .w = w.quant, .residual = residual, .relu_squared = relu_squared});
        return;
    }
    if (options_.plain_loops)
        plain_product(w.plain, x, y, residual);
    else
        matmul_forward(dev_, MatmulForward<float, float>{.y = y, .x = x, .w = w.plain, .residual = residual});
    if (!relu_squared) return;
    for (std::int64_t i = 0; i < y.rows; ++i)
        for (float* v = y.row(i); v < y.row(i) + y.cols; ++v) *v = *v < 0 ? 0.f : *v * *v;
}

void Session::forward(std::span<const std::int32_t> tokens) {
    const ModelSpec& spec = model_.spec();
    const auto n = static_cast<std::int64_t>(tokens.size());
    make_room(length_ + n);
    const Mat<float> x = rows(x_, n, spec.channels), y = rows(n_, n, spec.channels), mid = rows(mid_, n, spec.channels),
                     hidden = rows(hidden_, n, spec.hidden);
    embed(tokens);
    for (std::size_t l = 0; l < model_.layers().size(); ++l) {
        const InferLayer& layer = model_.layers()[l];
        norm(x, y);
        attention(l, n);
        product(layer.out, rows(o_, n, spec.channels), mid, x);
        norm(mid, y);
        product(layer.mlp_in, y, hidden, {}, true);
        product(layer.mlp_out, hidden, x, mid);
    }
    norm(x, y);
    length_ += n;
}

// The convolution over rows [kOld, kOld + n) of `rows`, whose first three are the ones before; keeps the last three.
Mat<float> Session::convolve(const std::vector<float>& taps, std::vector<float>& buffer, std::int64_t columns,
                             std::int64_t n, std::vector<float>& out) {
    const Mat<float> y(out.data(), n, columns), all(buffer.data(), kOld + n, columns);
    if (length_ == 0) std::fill(buffer.begin(), buffer.begin() + kOld * columns, 0.f);
    parallel_for(n > 8 ? dev_ : Cpu{1}, n, [&](std::int64_t i) {
        const float* now = all.row(kOld + i);
        for (std::int64_t c = 0; c < columns; ++c) y.row(i)[c] = taps[static_cast<std::size_t>(c)] * now[c];
        for (std::int64_t t = 1; t < kTaps; ++t)
            add_row(y.row(i), all.row(kOld + i - t), taps.data() + t * columns, columns);
    });
    std::copy(buffer.begin() + n * columns, buffer.begin() + (n + kOld) * columns, buffer.begin());
    return y;
}

RecallCache Session::cache(std::size_t l) {
    const ModelSpec& spec = model_.spec();
    const LayerSpec& layer = spec.layer[l];
    const Types t = types_of(options_.cache, layer.kind == LayerKind::dot);
    LayerState& s = state_[l];
    const auto scales = [](std::vector<std::uint16_t>& v) { return v.empty() ? nullptr : v.data(); };
    return {.capacity = room_,
            .heads = spec.heads,
            .scalars = static_cast<std::int32_t>(key_planes(spec, layer) / spec.heads),
            .width = spec.head_dim(),
            .key_type = t.keys,
            .gate_type = t.gate,
            .value_type = t.values,
            .keys = s.keys.data(),
            .gate = s.gate.empty() ? nullptr : s.gate.data(),
            .values = s.values.data(),
            .key_scales = scales(s.key_scales),
            .value_scales = scales(s.value_scales)};
}

// From the normed rows n_ to o_.
void Session::attention(std::size_t l, std::int64_t n) {
    const ModelSpec& spec = model_.spec();
    const InferLayer& layer = model_.layers()[l];
    const std::int64_t c = spec.channels, columns = layer.projected.rows;
    const Mat<float> y = rows(n_, n, c);
    Mat<float> mixed = rows(mixed_, n, columns);
    if (layer.conv.empty()) {
        product(layer.projected, y, mixed);
    } else {
        std::vector<float>& buffer = state_[l].rows;
        product(layer.projected, y, {buffer.data() + kOld * columns, n, columns});
        mixed = convolve(layer.conv, buffer, columns, n, mixed_);
    }
    if (layer.aux) product(layer.aux, y, rows(aux_, n, layer.aux.rows));
    scalars(l, n, mixed);
    gate(layer, n);
    const RecallCache cached = cache(l);
    const std::int64_t keys = std::int64_t(cached.heads) * cached.scalars;
    for (std::int64_t i = 0; i < n; ++i)
        remember(cached, length_ + i, b_.data() + i * keys, gate_.data() + i * spec.heads, mixed.row(i) + columns - c);
    recall(dev_, {.o = rows(o_, n, c),
                  .a = rows(a_, n, keys),
                  .cache = cached,
                  .first = length_,
                  .window = layer.spec.window,
                  .product = layer.spec.kind == LayerKind::dot,
                  .scale = 1 / std::sqrt(static_cast<float>(spec.head_dim()))});
}

// a_ and b_: what queries and keys are compared by.
void Session::scalars(std::size_t l, std::int64_t n, const Mat<float>& mixed) {
    const ModelSpec& spec = model_.spec();
    const InferLayer& layer = model_.layers()[l];
    const std::int64_t c = spec.channels, keys = key_planes(spec, layer.spec);
    if (layer.spec.kind == LayerKind::coordinate) {
        Mat<float> both = rows(aux_, n, layer.aux.rows).columns(0, 2 * keys);
        if (!layer.conv_scalars.empty()) {
            std::vector<float>& buffer = state_[l].scalar_rows;
            for (std::int64_t i = 0; i < n; ++i)
                std::copy_n(both.row(i), 2 * keys, buffer.data() + (kOld + i) * 2 * keys);
            both = convolve(layer.conv_scalars, buffer, 2 * keys, n, aux_mixed_);
        }
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t k = 0; k < keys; ++k) {
                const float inverse = layer.inverse_temp[static_cast<std::size_t>(k)];
                a_[static_cast<std::size_t>(i * keys + k)] = both.row(i)[k] * inverse;
                b_[static_cast<std::size_t>(i * keys + k)] = both.row(i)[keys + k] * inverse;
            }
        return;
    }
    Mat<float> q = mixed.columns(0, c), k = mixed.columns(c, c);
    if (spec.rotates(layer.spec) || spec.normalises(layer.spec)) {
        const Mat<float> turned = rows(rotated_, n, 2 * c);
        rotary_forward(dev_, RotaryForward<float>{.y = turned,
                                                  .x = mixed.columns(0, 2 * c),
                                                  .seq = Packed::uniform(1, static_cast<std::int32_t>(n)),
                                                  .heads = 2 * spec.heads,
                                                  .position_offset = static_cast<std::int32_t>(length_),
                                                  .normalise = spec.normalises(layer.spec),
                                                  .rotate = spec.rotates(layer.spec),
                                                  .theta = spec.rope_theta,
                                                  .eps = spec.norm_eps});
        q = turned.columns(0, c);
        k = turned.columns(c, c);
    }
    for (const auto& [out, x] : {std::pair{&a_, q}, {&b_, k}}) {
        if (layer.spec.kind == LayerKind::dot) {
            for (std::int64_t i = 0; i < n; ++i) std::copy_n(x.row(i), c, out->data() + i * c);
            continue;
        }
        const auto vec = [](const std::vector<float>& v) { return Vec<const float>(v.data(), std::int64_t(v.size())); };
        energy_forward(dev_, EnergyForward<float>{.a = rows(*out, n, keys),
                                                  .x = x,
                                                  .lap = model_.laplacian(),
                                                  .log_tau = vec(layer.log_tau),
                                                  .log_temp = vec(layer.log_temp),
                                                  .heads = spec.heads,
                                                  .scalars = layer.spec.scalars});
    }
}

// f = logsigmoid(z + bias), of the last columns of aux_.
void Session::gate(const InferLayer& layer, std::int64_t n) {
    if (layer.gate_bias.empty()) return;
    const std::int64_t heads = model_.spec().heads, first = layer.aux.rows - heads;
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t h = 0; h < heads; ++h) {
            const float u = aux_[static_cast<std::size_t>(i * layer.aux.rows + first + h)] +
                            layer.gate_bias[static_cast<std::size_t>(h)];
            gate_[static_cast<std::size_t>(i * heads + h)] = std::min(u, 0.f) - std::log1p(std::exp(-std::abs(u)));
        }
}

}  // namespace fiedler
