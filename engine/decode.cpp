#include "engine/decode.h"

#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "kernels/attention.h"
#include "kernels/conv.h"
#include "kernels/coordinate.h"
#include "kernels/dot.h"
#include "kernels/gate.h"
#include "kernels/matmul.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "kernels/parallel.h"
#include "kernels/rotary.h"

namespace fiedler {

namespace {

constexpr std::int64_t kTaps = 4;  // width of the convolution

template <class Dev, class U>
void copy_matrix(const Dev& dev, const Mat<U>& to, const Mat<const U>& from) {
    copy_rows_on_device(dev, to.data, static_cast<std::size_t>(to.ld) * sizeof(U), from.data,
                        static_cast<std::size_t>(from.ld) * sizeof(U), static_cast<std::size_t>(from.cols) * sizeof(U),
                        static_cast<std::size_t>(from.rows));
}
template <class Dev, class U>
void shift_up(const Dev& dev, const Mat<U>& m) {
    for (std::int64_t i = 1; i < m.rows; ++i)
        copy_on_device(dev, m.row(i - 1), m.row(i), static_cast<std::size_t>(m.cols) * sizeof(U));
}
template <class Dev, class U>
void clear_matrix(const Dev& dev, const Mat<U>& m) {
    if (m) fill_bytes(dev, m.data, 0, static_cast<std::size_t>(m.rows * m.ld) * sizeof(U));
}

template <class U>
void take(Arena& arena, Mat<U>& m, const std::string& name, std::int64_t rows, std::int64_t cols, Lifetime lifetime) {
    m = Mat<U>(arena.take<U>(name, {rows, cols}, lifetime), rows, cols);
}

}  // namespace

template <class T>
DecodeLayout<T>::DecodeLayout(Arena& arena, const ModelSpec& spec, const std::vector<bool>& by_runs,
                              std::int64_t longest) {
    using A = acc_t<T>;
    const std::int64_t c = spec.channels, h = spec.heads;
    std::int64_t columns = c, aux = 8, scalars = 1;
    for (int l = 0; l < spec.layers(); ++l) {
        const LayerSpec& s = spec.layer[static_cast<std::size_t>(l)];
        const std::string name = "layers." + std::to_string(l) + ".cache.";
        const std::int64_t capacity = by_runs[static_cast<std::size_t>(l)] ? 1 : longest;
        LayerCache<T> cache;
        take(arena, cache.v, name + "v", capacity, c, Lifetime::persistent);
        if (s.kind == LayerKind::dot) {
            take(arena, cache.k, name + "k", capacity, c, Lifetime::persistent);
        } else {
            take(arena, cache.b, name + "b", capacity, h * s.scalars, Lifetime::persistent);
            if (spec.has_gate(s)) {
                take(arena, cache.F, name + "F", capacity, h, Lifetime::persistent);
                cache.carry = {arena.take<A>(name + "carry", {h}, Lifetime::persistent), h};
            }
        }
        if (spec.conv) {
            take(arena, cache.projected, name + "projected", kTaps, spec.projected_columns(s), Lifetime::persistent);
            if (s.kind == LayerKind::coordinate)
                take(arena, cache.scalars, name + "scalars", kTaps, spec.scalar_columns(s), Lifetime::persistent);
        }
        layer.push_back(cache);
        columns = std::max<std::int64_t>(columns, spec.projected_columns(s));
        aux = std::max<std::int64_t>(aux, (spec.aux_columns(s) + 7) / 8 * 8);
        scalars = std::max<std::int64_t>(scalars, s.scalars);
    }
    const auto row = [&]<class U>(Mat<U>& m, const char* name, std::int64_t rows, std::int64_t cols) {
        take(arena, m, name, rows, cols, Lifetime::scratch);
    };
    scratch.token = {arena.take<std::int32_t>("token", {1}, Lifetime::scratch), 1};
    scratch.rstd = {arena.take<A>("rstd", {1}, Lifetime::scratch), 1};
    row(scratch.x, "x", 1, c);
    row(scratch.spectral, "spectral", 1, spec.spectral_columns());
    row(scratch.n, "n", 1, c);
    row(scratch.mixed, "mixed", kTaps, columns);
    row(scratch.rotated, "rotated", 1, 2 * c);
    row(scratch.o, "o", 1, c);
    row(scratch.mid, "mid", 1, c);
    row(scratch.h, "h", 1, spec.hidden);
    row(scratch.logits, "logits", 1, (spec.vocab + 7) / 8 * 8);
    scratch.logits.cols = spec.vocab;
    row(scratch.aux, "aux", 1, aux);
    row(scratch.a, "a", kTaps, h * scalars);
    row(scratch.b, "b", kTaps, h * scalars);
}

template <class Dev, class T>
ModelDecoder<Dev, T>::ModelDecoder(const Dev& dev, Model<Dev, T>& model, const ParamBlock<T>& params,
                                   std::int64_t capacity,
                                   std::function<DeviceBatch(const std::vector<std::int32_t>&)> upload,
                                   std::int64_t longest_prefill)
    : dev_(dev),
      model_(model),
      params_(params),
      capacity_(capacity),
      longest_prefill_(longest_prefill),
      upload_(std::move(upload)) {
    for (const LayerSpec& layer : model.spec().layer)
        by_runs_.push_back(std::is_same_v<Dev, Cpu> && model.plan().decodes_by_runs(model.spec(), layer, capacity));
    DecodeLayout<T>(arena_, model.spec(), by_runs_, capacity);
    arena_.commit(memory_of(dev));
    layout_ = std::make_unique<DecodeLayout<T>>(arena_, model.spec(), by_runs_, capacity);
    clear();
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::clear() {
    length_ = 0;
    runs_.assign(by_runs_.size(), {});
    for (std::size_t l = 0; l < by_runs_.size(); ++l)
        if (by_runs_[l])
            runs_[l].assign(static_cast<std::size_t>(model_.spec().heads), AttentionRuns<A>(model_.spec().head_dim()));
    for (LayerCache<T>& cache : layout_->layer) {
        clear_matrix(dev_, cache.projected);
        clear_matrix(dev_, cache.scalars);
        if (cache.carry) fill_bytes(dev_, cache.carry.data, 0, static_cast<std::size_t>(cache.carry.size) * sizeof(A));
    }
}

template <class Dev, class T>
std::size_t ModelDecoder<Dev, T>::cache_bytes_per_token() const {
    return cache_bytes_of_token(layout_->layer);
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::prefill(const std::vector<std::int32_t>& tokens) {
    if (tokens.empty()) throw InputError("prompt: is empty; give at least one token");
    clear();
    const auto n = std::min<std::int64_t>(static_cast<std::int64_t>(tokens.size()), longest_prefill_);
    model_.forward(upload_({tokens.begin(), tokens.begin() + n}), [&](int l) { copy_layer(l, n); });
    length_ = n;
    read_logits(model_.logits(n - 1, 1));
    for (std::size_t i = static_cast<std::size_t>(n); i < tokens.size(); ++i) append(tokens[i]);
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::copy_layer(int l, std::int64_t tokens) {
    const std::int64_t c = model_.spec().channels;
    LayerActivations<T>& act = model_.layer_activations(l);
    LayerCache<T>& cache = layout_->layer[static_cast<std::size_t>(l)];
    if (by_runs(l)) {
        append_to_runs(l, act.v(c), act.b, act.F);
    } else {
        copy_matrix<Dev, T>(dev_, cache.v, act.v(c));
        if (cache.k) copy_matrix<Dev, T>(dev_, cache.k, act.k(c));
        if (cache.b) copy_matrix<Dev, A>(dev_, cache.b, act.b);
        if (cache.F) copy_matrix<Dev, A>(dev_, cache.F, act.F);
    }
    if (cache.F) {
        copy_on_device(dev_, cache.carry.data, act.F.row(tokens - 1),
                       static_cast<std::size_t>(cache.carry.size) * sizeof(A));
    }
    const std::int64_t old = std::min(tokens, kTaps - 1);  // the last rows, newest in row 3: append shifts them up
    const auto tail = [&]<class U>(const Mat<U>& to, const Mat<U>& from) {
        copy_matrix<Dev, U>(dev_, to.slice_rows(kTaps - old, old), from.slice_rows(tokens - old, old));
    };
    if (cache.projected) tail(cache.projected, act.projected);
    if (cache.scalars) tail(cache.scalars, act.aux.columns(0, cache.scalars.cols));
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::append(std::int32_t token) {
    if (length_ >= capacity_)
        throw InputError("max-tokens: the prompt and the tokens asked for do not fit the decoder's cache");
    DecodeScratch<T>& s = layout_->scratch;
    const ModelSpec& spec = model_.spec();
    copy_to_device(dev_, s.token.data, &token, sizeof token);
    model_.embed(s.token, s.x, s.spectral);
    for (int l = 0; l < spec.layers(); ++l) append_layer(l);
    ++length_;
    norm_forward(dev_, NormForward<T>{.y = s.n, .rstd = s.rstd, .x = s.x, .eps = A(spec.norm_eps)});
    matmul_forward(dev_, MatmulForward<T, T>{
                             .y = s.logits,
                             .x = s.n,
                             .w = model_.table().template matrix<const T>(params_.weights.data, model_.table().head),
                             .residual = {}});
    read_logits(s.logits);
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::append_layer(int l) {
    DecodeScratch<T>& s = layout_->scratch;
    const LayerWeights<T> w = model_.layer_weights(l);
    const A eps = A(model_.spec().norm_eps);
    norm_forward(dev_, NormForward<T>{.y = s.n, .rstd = s.rstd, .x = s.x, .eps = eps});
    attend(l, w);
    matmul_forward(dev_, MatmulForward<T, T>{.y = s.mid, .x = s.o, .w = w.out, .residual = s.x});
    norm_forward(dev_, NormForward<T>{.y = s.n, .rstd = s.rstd, .x = s.mid, .eps = eps});
    mlp_forward(dev_, MlpForward<T>{.h = s.h, .x = s.n, .w = w.mlp_in});
    matmul_forward(dev_, MatmulForward<T, T>{.y = s.x, .x = s.h, .w = w.mlp_out, .residual = s.mid});
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::attend(int l, const LayerWeights<T>& w) {
    const ModelSpec& spec = model_.spec();
    const LayerSpec& layer = spec.layer[static_cast<std::size_t>(l)];
    DecodeScratch<T>& s = layout_->scratch;
    LayerCache<T>& cache = layout_->layer[static_cast<std::size_t>(l)];
    const std::int64_t c = spec.channels, columns = spec.projected_columns(layer), now = length_ + 1;
    const Mat<T> mixed{s.mixed.data, kTaps, columns, columns};
    Mat<T> row = mixed.slice_rows(kTaps - 1, 1);
    if (w.conv) {
        shift_up(dev_, cache.projected);
        const Mat<T> fresh = cache.projected.slice_rows(kTaps - 1, 1);
        matmul_forward(dev_, MatmulForward<T, T>{.y = fresh, .x = s.n, .w = w.projected, .residual = {}});
        const Packed taps = Packed::uniform(1, static_cast<std::int32_t>(kTaps));
        conv_forward(dev_, ConvForward<T>{.y = mixed, .x = cache.projected, .w = w.conv, .seq = taps});
    } else {
        matmul_forward(dev_, MatmulForward<T, T>{.y = row, .x = s.n, .w = w.projected, .residual = {}});
    }
    Mat<T> q = row.columns(0, c), k = columns > c ? row.columns(c, c) : Mat<T>{};
    if (spec.rotates(layer) || spec.normalises(layer)) {
        rotary_forward(dev_, RotaryForward<T>{.y = s.rotated,
                                              .x = row.columns(0, 2 * c),
                                              .seq = Packed::uniform(1, 1),
                                              .heads = 2 * spec.heads,
                                              .position_offset = static_cast<std::int32_t>(length_),
                                              .normalise = spec.normalises(layer),
                                              .rotate = spec.rotates(layer),
                                              .theta = A(spec.rope_theta),
                                              .eps = A(spec.norm_eps)});
        q = s.rotated.columns(0, c);
        k = s.rotated.columns(c, c);
    }
    copy_matrix<Dev, T>(dev_, cache.v.slice_rows(place(l), 1), row.columns(columns - c, c));
    if (layer.kind == LayerKind::dot) {
        copy_matrix<Dev, T>(dev_, cache.k.slice_rows(length_, 1), k);
        dot_decode(dev_, DotDecode<T>{.o = {s.o.data, c},
                                      .q = {q.data, c},
                                      .k = cache.k.slice_rows(0, now),
                                      .v = cache.v.slice_rows(0, now),
                                      .heads = spec.heads,
                                      .window = layer.window,
                                      .scale = A(1 / std::sqrt(double(spec.head_dim())))});
        return;
    }
    if (w.aux)
        matmul_forward(dev_,
                       MatmulForward<T, A>{.y = s.aux.columns(0, w.aux.rows), .x = s.n, .w = w.aux, .residual = {}});
    const Vec<const A> query = scalars_of_token(l, w, q, k);
    if (by_runs(l)) return attend_by_runs(l, query);
    attention_decode(dev_, AttentionDecode<T>{.o = {s.o.data, c},
                                              .a = query,
                                              .b = cache.b.slice_rows(0, now),
                                              .F = cache.F ? cache.F.slice_rows(0, now) : Mat<A>{},
                                              .v = cache.v.slice_rows(0, now),
                                              .heads = spec.heads,
                                              .scalars = layer.scalars,
                                              .window = layer.window});
}

// Keys of tokens in turn; host memory.
template <class Dev, class T>
void ModelDecoder<Dev, T>::append_to_runs(int l, const Mat<const T>& v, const Mat<const A>& b, const Mat<const A>& F) {
    if constexpr (std::is_same_v<T, A>) {
        const std::int64_t width = model_.spec().head_dim();
        std::vector<AttentionRuns<A>>& runs = runs_[static_cast<std::size_t>(l)];
        parallel_for(dev_, static_cast<std::int64_t>(runs.size()), [&](std::int64_t h) {
            for (std::int64_t i = 0; i < v.rows; ++i)
                runs[static_cast<std::size_t>(h)].append(b.row(i)[h], F ? F.row(i)[h] : A(0), v.row(i) + h * width);
        });
    }
}

// o of the new token, whose key is in the layer's cache of one.
template <class Dev, class T>
void ModelDecoder<Dev, T>::attend_by_runs(int l, const Vec<const A>& query) {
    if constexpr (std::is_same_v<T, A>) {
        const LayerCache<T>& cache = layout_->layer[static_cast<std::size_t>(l)];
        append_to_runs(l, cache.v, cache.b, cache.F);
        const std::int64_t width = model_.spec().head_dim();
        const std::vector<AttentionRuns<A>>& runs = runs_[static_cast<std::size_t>(l)];
        for (std::size_t h = 0; h < runs.size(); ++h)
            runs[h].query(query.data[h], cache.F ? cache.F.data[h] : A(0),
                          layout_->scratch.o.data + static_cast<std::int64_t>(h) * width);
    }
}

// Writes b and F of the token into the cache and returns its a.
template <class Dev, class T>
Vec<const acc_t<T>> ModelDecoder<Dev, T>::scalars_of_token(int l, const LayerWeights<T>& w, const Mat<T>& q,
                                                           const Mat<T>& k) {
    const ModelSpec& spec = model_.spec();
    const LayerSpec& layer = spec.layer[static_cast<std::size_t>(l)];
    DecodeScratch<T>& s = layout_->scratch;
    LayerCache<T>& cache = layout_->layer[static_cast<std::size_t>(l)];
    const std::int64_t hr = std::int64_t(spec.heads) * layer.scalars, columns = spec.scalar_columns(layer);
    const Mat<A> b = cache.b.slice_rows(place(l), 1);
    const A* query = s.a.data;
    if (layer.kind == LayerKind::coordinate) {
        const std::int64_t rows = w.conv_scalars ? kTaps : 1;
        Mat<A> pre = s.aux.columns(0, columns);
        if (w.conv_scalars) {
            shift_up(dev_, cache.scalars);
            copy_matrix<Dev, A>(dev_, cache.scalars.slice_rows(kTaps - 1, 1), pre);
            pre = cache.scalars;
        }
        const Mat<A> a4{s.a.data, rows, hr}, b4{s.b.data, rows, hr};
        coordinate_forward(dev_, CoordinateForward<A>{.a = a4,
                                                      .b = b4,
                                                      .s = pre,
                                                      .w = w.conv_scalars,
                                                      .log_temp = w.log_temp,
                                                      .seq = Packed::uniform(1, static_cast<std::int32_t>(rows))});
        copy_matrix<Dev, A>(dev_, b, b4.slice_rows(rows - 1, 1));
        query = a4.row(rows - 1);
    } else {
        const auto energies = [&](const Mat<A>& out, const Mat<T>& x) {
            energy_forward(dev_, EnergyForward<T>{.a = out,
                                                  .x = x,
                                                  .lap = model_.laplacian(),
                                                  .log_tau = w.log_tau,
                                                  .log_temp = w.log_temp,
                                                  .heads = spec.heads,
                                                  .scalars = layer.scalars});
        };
        energies({s.a.data, 1, hr}, q);
        energies(b, k);
    }
    if (cache.F)
        gate_forward(dev_, GateForward<A>{.F = cache.F.slice_rows(place(l), 1),
                                          .z = s.aux.columns(columns, spec.heads),
                                          .bias = w.gate_bias,
                                          .seq = Packed::uniform(1, 1),
                                          .carry = cache.carry});
    return {query, hr};
}

template <class Dev, class T>
void ModelDecoder<Dev, T>::read_logits(const Mat<const T>& row) {
    std::vector<T> host(static_cast<std::size_t>(row.cols));
    copy_to_host(dev_, host.data(), row.data, host.size() * sizeof(T));
    logits_.resize(host.size());
    for (std::size_t i = 0; i < host.size(); ++i) logits_[i] = static_cast<float>(host[i]);
}

template class ModelDecoder<Cpu, float>;
template class ModelDecoder<Cpu, double>;
#if FIEDLER_CUDA
template class ModelDecoder<Cuda, bf16>;
#endif

}  // namespace fiedler
