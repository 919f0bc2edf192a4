#include "infer/model.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/feature_laplacian.h"

namespace fiedler {

namespace {

constexpr std::int64_t kTaps = 4;
constexpr const char* kTokenizer = "tokenizer.model";

std::string layer_name(int l, const char* what) { return "layers." + std::to_string(l) + "." + what; }
template <class T>
std::vector<float> to_floats(const std::vector<T>& x) {
    return {x.begin(), x.end()};
}

}  // namespace

void InferMatrix::row(std::int64_t i, float* out) const {
    if (quantised())
        dequantise_row(quant, i, out);
    else
        std::copy(plain.row(i), plain.row(i) + cols, out);
}
std::size_t InferMatrix::bytes() const {
    return static_cast<std::size_t>(quantised() ? quant.shape.bytes() : rows * cols * std::int64_t{sizeof(float)});
}

InferModel::InferModel(const std::string& path) : file_(path) {
    if (!file_.config().contains("model"))
        input_error("{}: holds tensors but no model's config; it cannot be run", path);
    config_ = config_from_json(file_.config()["model"], path);
    spec_ = model_spec(config_);
    if (!spec_.causal)
        input_error("{}: a bidirectional model (causal = false) does not generate text; evaluate it unquantised", path);
    embedding_ = matrix("embedding.weight", spec_.vocab, spec_.channels);
    if (!spec_.tied) head_ = matrix("head.weight", spec_.vocab, spec_.channels);
    if (spec_.spectral_dims > 0) {
        spectral_table_ = matrix(kSpectralTable, spec_.vocab, spec_.spectral_dims);
        spectral_ = matrix("spectral.weight", spec_.channels, spec_.spectral_columns());
    }
    for (int l = 0; l < spec_.layers(); ++l) layers_.push_back(layer(l));
    if (spec_.has_energies()) read_laplacian();
    read_tokenizer();
}

const WeightTensor& InferModel::tensor(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const WeightTensor* t = file_.find(name);
    if (!t) input_error("{}: has no tensor '{}': it was written for another model", path(), name);
    check_shape(path(), *t, shape);
    return *t;
}

InferMatrix InferModel::matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    const WeightTensor& t = tensor(name, {rows, cols});
    InferMatrix m;
    m.rows = rows;
    m.cols = cols;
    if (const auto kind = quant_of(t.dtype)) {
        m.quant = {{*kind, rows, cols}, static_cast<const std::byte*>(t.data)};
        quantised_ = true;
    } else if (t.dtype == "f32") {
        m.plain = {static_cast<const float*>(t.data), rows, cols};
    } else {
        m.owned = values(name, {rows, cols});
        m.plain = {m.owned.data(), rows, cols};
    }
    return m;
}

std::vector<float> InferModel::values(const std::string& name, const std::vector<std::int64_t>& shape) const {
    const WeightTensor& t = tensor(name, shape);
    std::vector<float> out(static_cast<std::size_t>(t.elements()));
    tensor_to_f32(path(), t, shape, out.data());
    return out;
}

std::vector<float> InferModel::by_tap(const std::string& name, std::int64_t columns) const {
    const std::vector<float> w = values(name, {columns, kTaps});
    std::vector<float> out(w.size());
    for (std::int64_t c = 0; c < columns; ++c)
        for (std::int64_t t = 0; t < kTaps; ++t)
            out[static_cast<std::size_t>(t * columns + c)] = w[static_cast<std::size_t>(c * kTaps + kTaps - 1 - t)];
    return out;
}

InferLayer InferModel::layer(int l) {
    InferLayer r;
    r.spec = spec_.layer[static_cast<std::size_t>(l)];
    const std::int64_t c = spec_.channels, h = spec_.heads, scalar_columns = spec_.scalar_columns(r.spec);
    const std::int64_t columns = spec_.projected_columns(r.spec);
    const bool coordinate = r.spec.kind == LayerKind::coordinate;
    r.projected = matrix(layer_name(l, coordinate ? "attn.v.weight" : "attn.qkv.weight"), columns, c);
    r.out = matrix(layer_name(l, "attn.out.weight"), c, c);
    r.mlp_in = matrix(layer_name(l, "mlp.in.weight"), spec_.hidden, c);
    r.mlp_out = matrix(layer_name(l, "mlp.out.weight"), c, spec_.hidden);
    if (const std::int64_t rows = spec_.aux_columns(r.spec); rows > 0) {
        if (scalar_columns > 0) r.aux.owned = values(layer_name(l, "attn.scalars.weight"), {scalar_columns, c});
        if (spec_.has_gate(r.spec)) {
            const std::vector<float> gate = values(layer_name(l, "attn.gate.weight"), {h, c});
            r.aux.owned.insert(r.aux.owned.end(), gate.begin(), gate.end());
            r.gate_bias = values(layer_name(l, "attn.gate.bias"), {h});
        }
        r.aux.rows = rows;
        r.aux.cols = c;
        r.aux.plain = {r.aux.owned.data(), rows, c};
    }
    if (spec_.conv) {
        r.conv = by_tap(layer_name(l, "attn.conv.weight"), columns);
        if (coordinate) r.conv_scalars = by_tap(layer_name(l, "attn.conv_scalars.weight"), scalar_columns);
    }
    if (r.spec.kind != LayerKind::dot) {
        r.log_temp = values(layer_name(l, "attn.log_temperature"), {h});
        for (std::int64_t k = 0; k < h * r.spec.scalars; ++k)
            r.inverse_temp.push_back(std::exp(-r.log_temp[static_cast<std::size_t>(k / r.spec.scalars)]));
    }
    if (r.spec.kind == LayerKind::energy) r.log_tau = values(layer_name(l, "attn.log_tau"), {r.spec.scalars});
    return r;
}

void InferModel::read_laplacian() {
    const auto read = [&](const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float>& out) {
        const WeightTensor* t = file_.find(name);
        if (t) tensor_to_f32(path(), *t, shape, out.data());
        return t != nullptr;
    };
    ModelSpec energies = spec_;
    energies.spectral_dims = 0;  // read above
    const bool path_graph = config_.feature_laplacian == "auto" || config_.feature_laplacian == "path";
    HostLaplacian lap = constants_from(energies, path_graph, read, path()).laplacian;
    if (lap.dim == 0) lap = path_laplacian(spec_.head_dim());
    lap_offsets_ = lap.offsets;
    lap_columns_ = lap.columns;
    lap_values_ = to_floats(lap.values);
    lap_vectors_ = to_floats(lap.eigenvectors);
    lap_eigenvalues_ = to_floats(lap.eigenvalues);
}

FeatureLaplacian<float> InferModel::laplacian() const {
    FeatureLaplacian<float> l;
    l.dim = spec_.head_dim();
    const auto vec = []<class T>(const std::vector<T>& v) {
        return Vec<const T>(v.data(), static_cast<std::int64_t>(v.size()));
    };
    l.offsets = vec(lap_offsets_);
    l.columns = vec(lap_columns_);
    l.values = vec(lap_values_);
    l.eigenvectors = {lap_vectors_.data(), l.dim, l.dim};
    l.eigenvalues = vec(lap_eigenvalues_);
    return l;
}

void InferModel::read_tokenizer() {
    if (const WeightTensor* t = file_.find(kTokenizer)) {
        tokenizer_model_.assign(static_cast<const char*>(t->data), t->bytes());
    } else {
        const std::string beside = join_path(std::filesystem::path(path()).parent_path().string(), kTokenizer);
        if (!file_exists(beside)) return;
        tokenizer_model_ = read_file(beside);
    }
    tokenizer_ = std::make_unique<PieceTokenizer>(tokenizer_model_, path());
    if (tokenizer_->vocab_size() > spec_.vocab)
        input_error("{}: its tokenizer has {} tokens and its model {}; use the tokenizer of the training", path(),
                    tokenizer_->vocab_size(), spec_.vocab);
}

std::size_t InferModel::weight_bytes() const {
    std::size_t all = head().bytes() + spectral_.bytes();
    for (const InferLayer& l : layers_)
        for (const InferMatrix* m : {&l.projected, &l.aux, &l.out, &l.mlp_in, &l.mlp_out}) all += m->bytes();
    return all;
}

std::size_t InferModel::memory_bytes() const {
    std::size_t all = file_.file_bytes();
    const auto add = [&](const InferMatrix& m) { all += m.owned.size() * sizeof(float); };
    for (const InferMatrix* m : {&embedding_, &head_, &spectral_table_, &spectral_}) add(*m);
    for (const InferLayer& l : layers_)
        for (const InferMatrix* m : {&l.projected, &l.aux, &l.out, &l.mlp_in, &l.mlp_out}) add(*m);
    return all;
}

bool is_quantised_file(const std::string& path) {
    const WeightsFile file(path, false);
    return std::any_of(file.tensors().begin(), file.tensors().end(),
                       [](const WeightTensor& t) { return quant_of(t.dtype).has_value(); });
}

}  // namespace fiedler
