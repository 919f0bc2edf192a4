// engine/model.cpp: the model's ends (embedding, last norm, loss) and its views of the parameter block. The layers are
// in layers.cpp.
#include "engine/model.h"

#include <algorithm>

#include "engine/model_instances.h"
#include "kernels/embedding.h"
#include "kernels/head.h"
#include "kernels/norm.h"

namespace fiedler {

template <class Dev, class T>
Model<Dev, T>::Model(const Dev& dev, const ModelSpec& spec, const ParamTable& table, const ParamBlock<T>& params,
                     const FeatureLaplacian<A>& laplacian, const Mat<const T>& spectral, const ActivationPlan& plan,
                     Activations<T>& acts)
    : dev_(dev),
      spec_(spec),
      table_(table),
      params_(params),
      laplacian_(laplacian),
      spectral_(spectral),
      plan_(plan),
      acts_(acts) {}

namespace {

// The scalars' and the gate's matrices are neighbours in the block: one matrix, one product.
template <class P>
Mat<P> aux_matrix(const ParamTable& table, const LayerTensors& t, P* base, std::int64_t rows) {
    if (rows == 0) return {};
    Mat<P> m = table.matrix(base, t.scalars >= 0 ? t.scalars : t.gate);
    m.rows = rows;
    return m;
}
template <class P>
Mat<P> matrix_or_none(const ParamTable& table, P* base, int i) {
    return i >= 0 ? table.matrix(base, i) : Mat<P>{};
}
template <class P>
Vec<P> vector_or_none(const ParamTable& table, P* base, int i) {
    return i >= 0 ? table.vector(base, i) : Vec<P>{};
}

}  // namespace

template <class Dev, class T>
LayerWeights<T> Model<Dev, T>::layer_weights(int l) const {
    const LayerTensors& t = table_.layer[static_cast<std::size_t>(l)];
    const T* w = params_.weights.data;
    const A* m = params_.master.data;
    LayerWeights<T> r;
    r.projected = table_.matrix(w, t.projected);
    r.aux = aux_matrix(table_, t, w, spec_.aux_columns(spec_.layer[static_cast<std::size_t>(l)]));
    r.out = table_.matrix(w, t.out);
    r.mlp_in = table_.matrix(w, t.mlp_in);
    r.mlp_out = table_.matrix(w, t.mlp_out);
    r.local = matrix_or_none(table_, w, t.local);
    r.spectral = matrix_or_none(table_, w, t.spectral);
    r.conv = matrix_or_none(table_, m, t.conv);
    r.conv_scalars = matrix_or_none(table_, m, t.conv_scalars);
    r.gate_bias = vector_or_none(table_, m, t.gate_bias);
    r.log_temp = vector_or_none(table_, m, t.log_temp);
    r.log_tau = vector_or_none(table_, m, t.log_tau);
    return r;
}

template <class Dev, class T>
LayerGrads<T> Model<Dev, T>::layer_grads(int l) const {
    const LayerTensors& t = table_.layer[static_cast<std::size_t>(l)];
    A* g = params_.grads.data;
    const auto trainable = [&](int i) {
        return i >= 0 && table_.tensor[static_cast<std::size_t>(i)].group != Group::frozen ? i : -1;
    };
    LayerGrads<T> r;
    r.projected = table_.matrix(g, t.projected);
    r.aux = aux_matrix(table_, t, g, spec_.aux_columns(spec_.layer[static_cast<std::size_t>(l)]));
    r.out = table_.matrix(g, t.out);
    r.mlp_in = table_.matrix(g, t.mlp_in);
    r.mlp_out = table_.matrix(g, t.mlp_out);
    r.local = matrix_or_none(table_, g, t.local);
    r.spectral = matrix_or_none(table_, g, t.spectral);
    r.conv = matrix_or_none(table_, g, t.conv);
    r.conv_scalars = matrix_or_none(table_, g, t.conv_scalars);
    r.gate_bias = vector_or_none(table_, g, t.gate_bias);
    r.log_temp = vector_or_none(table_, g, trainable(t.log_temp));
    r.log_tau = vector_or_none(table_, g, trainable(t.log_tau));
    return r;
}

template <class Dev, class T>
void Model<Dev, T>::embed(const Vec<const std::int32_t>& tokens, const Mat<T>& x, const Mat<T>& u) const {
    Range range("embedding");
    const T* weights = params_.weights.data;
    embedding_forward(dev_,
                      EmbeddingForward<T>{.x = x, .tokens = tokens, .table = table_.matrix(weights, table_.embedding)});
    if (!spectral_) return;
    embedding_forward(dev_, EmbeddingForward<T>{.x = u, .tokens = tokens, .table = spectral_});
    matmul_forward(dev_,
                   MatmulForward<T, T>{.y = x, .x = u, .w = table_.matrix(weights, table_.spectral), .residual = x});
}

template <class Dev, class T>
void Model<Dev, T>::forward(const DeviceBatch& batch, const std::function<void(int)>& after_layer) {
    acts_.bind(batch.samples ? batch.seq.tokens : batch.inputs.size);
    ScratchActivations<T>& s = acts_.scratch();
    const Mat<T> x = spec_.layers() > 0 ? acts_.layer(0).x : s.x_last;
    if (batch.samples)
        embed_samples(batch, x);
    else
        embed(batch.inputs, x, s.spectral);
    for (int l = 0; l < spec_.layers(); ++l) {
        forward_layer(l, batch);
        if (after_layer) after_layer(l);
    }
    if (last_norm()) {
        Range range("norm");
        norm_forward(dev_, NormForward<T>{.y = s.n_last, .rstd = s.rstd_last, .x = s.x_last, .eps = A(spec_.norm_eps)});
    }
    if (batch.samples) forward_outputs(batch);
}

// Logits of the rows from `first` on, as many as `logits` has.
template <class Dev, class T>
void Model<Dev, T>::head(const Mat<T>& logits, std::int64_t first) {
    matmul_forward(dev_, MatmulForward<T, T>{.y = logits,
                                             .x = acts_.scratch().n_last.slice_rows(first, logits.rows),
                                             .w = table_.matrix<const T>(params_.weights.data, table_.head),
                                             .residual = {}});
}

template <class Dev, class T>
Mat<const T> Model<Dev, T>::logits(std::int64_t first, std::int64_t n) {
    const Mat<T> out = acts_.scratch().logits.slice_rows(0, n);
    head(out, first);
    return out;
}

template <class Dev, class T>
void Model<Dev, T>::loss(const DeviceBatch& batch, Vec<A> total, bool gradient, A grad_scale) {
    Range range("head");
    ScratchActivations<T>& s = acts_.scratch();
    Head<T> p;
    p.losses = s.losses;
    p.x = s.n_last;
    p.w = table_.matrix<const T>(params_.weights.data, table_.head);
    p.targets = batch.targets;
    p.scale = grad_scale;
    p.logits = s.logits;
    p.scratch = s.head;
    p.loss_rows = plan_.loss_rows;
    if (head_in_fp8()) p.precision = HeadPrecision::fp8, p.fp8_scratch = s.head_fp8;
    if (gradient) p.dx = s.dn, p.dw = table_.matrix(params_.grads.data, table_.head);
    fiedler::head(dev_, p);
    loss_sum(dev_, LossSum<A>{.total = total, .losses = s.losses});
}

template <class Dev, class T>
void Model<Dev, T>::backward(const DeviceBatch& batch) {
    ScratchActivations<T>& s = acts_.scratch();
    // The order of the tokens, beside the layers: it hangs on no gradient.
    if (!batch.samples) {
        const EmbeddingOrder order{batch.inputs, spec_.vocab, spec_.channels, s.sort};
        branch(dev_, [&] { embedding_order(dev_, order); });
    }
    if (last_norm()) {
        Range range("norm");
        norm_backward(
            dev_,
            NormBackward<T>{.dx = s.dx, .dy = s.dn, .x = s.x_last, .rstd = s.rstd_last, .dresidual = Mat<const T>{}});
    }
    pending_ = PendingSums<A>(s.pending);
    for (int l = spec_.layers(); l-- > 0;) backward_layer(l, batch);
    if (!pending_.sums().empty()) {
        Range range("pending_sums");
        finish_sums(dev_, pending_);
    }
    if (batch.samples) return embed_samples_backward(batch);
    join(dev_);
    Range range("embedding");
    embedding_backward(dev_, EmbeddingBackward<T>{.dtable = table_.matrix(params_.grads.data, table_.embedding),
                                                  .tokens = batch.inputs,
                                                  .dx = s.dx,
                                                  .scratch = s.sort});
    if (spectral_)
        matmul_dw(dev_,
                  MatmulDw<T>{.dw = table_.matrix(params_.grads.data, table_.spectral), .dy = s.dx, .x = s.spectral});
}

template <class Dev, class T>
std::vector<std::vector<double>> Model<Dev, T>::calibrate_tau(const DeviceBatch& batch) {
    std::vector<std::vector<double>> tau(static_cast<std::size_t>(spec_.layers()));
    calibrating_ = &tau;
    forward(batch);
    calibrating_ = nullptr;
    return tau;
}

FIEDLER_MODEL_INSTANCES()

}  // namespace fiedler
