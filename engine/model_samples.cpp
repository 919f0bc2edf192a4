// engine/model_samples.cpp: the ends of a model of samples, where one of text has tokens and a vocabulary; what its layers
// have of their own: graph convolution and dropout.
#include "engine/model.h"
#include "engine/model_instances.h"
#include "kernels/bag.h"
#include "kernels/dropout.h"
#include "kernels/matmul.h"
#include "kernels/objective.h"
#include "kernels/pool.h"

namespace fiedler {

template <class Dev, class T>
void Model<Dev, T>::drop(const DeviceBatch& batch, const Mat<T>& y, const Mat<T>& x, int l, Site site,
                         std::int64_t first) const {
    if (!drops(batch)) return;
    Range range("dropout");
    const auto stream = (static_cast<std::uint64_t>(first) << 24) + 4 * static_cast<std::uint64_t>(l);
    dropout(dev_, Dropout<T>{.y = y,
                             .x = x,
                             .seed = batch.samples->seed,
                             .stream = stream + static_cast<std::uint64_t>(site),
                             .p = spec_.samples->dropout});
}

template <class Dev, class T>
void Model<Dev, T>::embed_samples(const DeviceBatch& batch, const Mat<T>& x0) const {
    const DeviceSamples& b = *batch.samples;
    const T* w = params_.weights.data;
    const bool biased = table_.input_bias >= 0;
    std::vector<Mat<T>> chain = acts_.scratch().input_hops;
    chain.push_back(x0);
    const Mat<T> x = chain.front();
    Range range("embedding");
    if (biased)
        matmul_forward(dev_, MatmulForward<T, T>{.y = x,
                                                 .x = acts_.scratch().ones.slice_rows(0, x.rows),
                                                 .w = table_.matrix(w, table_.input_bias)});
    if (spec_.samples->dense)
        matmul_forward(dev_, MatmulForward<T, T>{.y = x,
                                                 .x = dense_of(batch),
                                                 .w = table_.matrix(w, table_.embedding),
                                                 .residual = biased ? Mat<const T>(x) : Mat<const T>()});
    else
        bag_forward(dev_, BagForward<T>{.x = x,
                                        .offsets = b.feature_offsets,
                                        .columns = b.feature_columns,
                                        .values = b.feature_values,
                                        .table = table_.matrix(w, table_.embedding),
                                        .accumulate = biased});
    if (chain.size() > 1) convolve(batch, table_.matrix<const A>(params_.master.data, table_.input_conv), chain);
    if (b.spectral)
        matmul_forward(dev_,
                       MatmulForward<T, T>{
                           .y = x0, .x = spectral_of(batch), .w = table_.matrix(w, table_.spectral), .residual = x0});
}

template <class Dev, class T>
void Model<Dev, T>::embed_samples_backward(const DeviceBatch& batch) const {
    const DeviceSamples& b = *batch.samples;
    ScratchActivations<T>& s = acts_.scratch();
    A* g = params_.grads.data;
    Range range("embedding");
    if (b.spectral)
        matmul_dw(dev_, MatmulDw<T>{.dw = table_.matrix(g, table_.spectral), .dy = s.dx, .x = spectral_of(batch)});
    Mat<T> dx = s.dx;
    if (!s.input_hops.empty()) {
        std::vector<Mat<T>> chain = s.input_hops;
        chain.push_back({});  // the last one is not looked at
        dx = convolve_backward(batch, table_.matrix<const A>(params_.master.data, table_.input_conv),
                               table_.matrix(g, table_.input_conv), chain, s.dx, s.dn);
    }
    if (table_.input_bias >= 0)
        matmul_dw(dev_,
                  MatmulDw<T>{.dw = table_.matrix(g, table_.input_bias), .dy = dx, .x = s.ones.slice_rows(0, dx.rows)});
    if (spec_.samples->dense)
        matmul_dw(dev_, MatmulDw<T>{.dw = table_.matrix(g, table_.embedding), .dy = dx, .x = dense_of(batch)});
    else
        bag_backward(dev_, BagBackward<T>{.dtable = table_.matrix(g, table_.embedding),
                                          .offsets = b.by_feature_offsets,
                                          .rows = b.feature_nodes,
                                          .values = b.by_feature_values,
                                          .dx = dx,
                                          .scratch = s.partials});
}

template <class Dev, class T>
void Model<Dev, T>::convolve(const DeviceBatch& batch, const Mat<const A>& w, const std::vector<Mat<T>>& chain) const {
    Range range("graph_conv");
    const std::int64_t rows = spec_.samples->edge_types + 1;
    for (std::size_t hop = 0; hop + 1 < chain.size(); ++hop)
        graph_conv_forward(dev_, GraphConvForward<T>{.y = chain[hop + 1],
                                                     .x = chain[hop],
                                                     .w = w.slice_rows(static_cast<std::int64_t>(hop) * rows, rows),
                                                     .graph = batch.samples->graph});
}

template <class Dev, class T>
Mat<T> Model<Dev, T>::convolve_backward(const DeviceBatch& batch, const Mat<const A>& w, const Mat<A>& dw,
                                        const std::vector<Mat<T>>& chain, Mat<T> dy, Mat<T> other) const {
    Range range("graph_conv");
    const std::int64_t rows = spec_.samples->edge_types + 1;
    for (std::size_t hop = chain.size() - 1; hop-- > 0;) {
        const std::int64_t first = static_cast<std::int64_t>(hop) * rows;
        graph_conv_backward(dev_, GraphConvBackward<T>{.dx = other,
                                                       .dw = dw.slice_rows(first, rows),
                                                       .dy = dy,
                                                       .x = chain[hop],
                                                       .w = w.slice_rows(first, rows),
                                                       .graph = batch.samples->graph,
                                                       .scratch = acts_.scratch().partials});
        std::swap(dy, other);
    }
    return dy;
}

// From the layer's products to what attention reads.
template <class Dev, class T>
std::vector<Mat<T>> Model<Dev, T>::chain_of_layer(int l) const {
    const LayerActivations<T>& act = acts_.layer(l);
    std::vector<Mat<T>> chain = {act.projected};
    chain.insert(chain.end(), act.hops.begin(), act.hops.end());
    chain.push_back(act.mixed);
    return chain;
}

template <class Dev, class T>
Mat<T> Model<Dev, T>::pooled(const DeviceBatch& batch, bool gradient) {
    ScratchActivations<T>& s = acts_.scratch();
    const Mat<T> rows = gradient ? dlast() : last();
    switch (spec_.samples->pool) {
        case PoolOf::none:
            return rows;
        case PoolOf::flatten:
            return {rows.data, batch.seq.count, spec_.pooled_columns()};
        case PoolOf::mean:
        case PoolOf::sum:
        case PoolOf::attention:
            break;
    }
    return (gradient ? s.dpooled : s.pooled).slice_rows(0, batch.seq.count);
}

namespace {
PoolKind kernel_kind(PoolOf p) {
    return p == PoolOf::mean ? PoolKind::mean : p == PoolOf::sum ? PoolKind::sum : PoolKind::attention;
}
ObjectiveKind kernel_kind(const SampleModel& m) {
    if (m.kind == TargetKind::classes) return ObjectiveKind::classes;
    if (m.kind == TargetKind::binary) return ObjectiveKind::binary;
    return m.loss == LossOf::squared    ? ObjectiveKind::squared
           : m.loss == LossOf::absolute ? ObjectiveKind::absolute
                                        : ObjectiveKind::huber;
}
}  // namespace

// From the last layer's (normalised) output to `outputs`.
template <class Dev, class T>
void Model<Dev, T>::forward_outputs(const DeviceBatch& batch) {
    ScratchActivations<T>& s = acts_.scratch();
    const T* w = params_.weights.data;
    const SampleModel& m = *spec_.samples;
    const Mat<T> n = last(), in = pooled(batch, false);
    drop(batch, n, n, spec_.layers(), Site::last);
    if (m.pool != PoolOf::none && m.pool != PoolOf::flatten) {
        Range range("pool");
        const bool weighted = m.pool == PoolOf::attention;
        const Mat<A> z = weighted ? s.z.slice_rows(0, n.rows) : Mat<A>();
        if (weighted) matmul_forward(dev_, MatmulForward<T, A>{.y = z, .x = n, .w = table_.matrix(w, table_.pool)});
        pool_forward(dev_, PoolForward<T>{.y = in,
                                          .lse = weighted ? s.pool_lse.slice_rows(0, in.rows) : Mat<A>(),
                                          .x = n,
                                          .z = z,
                                          .seq = batch.seq,
                                          .longest = spec_.context,
                                          .kind = kernel_kind(m.pool),
                                          .scratch = s.partials});
    }
    Range range("head");
    const Mat<A> out = s.outputs.slice_rows(0, in.rows);
    matmul_forward(dev_, MatmulForward<T, A>{
                             .y = out, .x = s.ones.slice_rows(0, in.rows), .w = table_.matrix(w, table_.head_bias)});
    matmul_forward(dev_, MatmulForward<T, A>{.y = out, .x = in, .w = table_.matrix(w, table_.head), .residual = out});
}

template <class Dev, class T>
void Model<Dev, T>::backward_outputs(const DeviceBatch& batch) {
    ScratchActivations<T>& s = acts_.scratch();
    const T* w = params_.weights.data;
    A* g = params_.grads.data;
    const SampleModel& m = *spec_.samples;
    const Mat<T> n = last(), dn = dlast(), in = pooled(batch, false), din = pooled(batch, true);
    const Mat<T> dout = s.doutputs.slice_rows(0, in.rows);
    {
        Range range("head");
        matmul_dw(dev_, MatmulDw<T>{
                            .dw = table_.matrix(g, table_.head_bias), .dy = dout, .x = s.ones.slice_rows(0, in.rows)});
        matmul_dw(dev_, MatmulDw<T>{.dw = table_.matrix(g, table_.head), .dy = dout, .x = in});
        matmul_dx(dev_, MatmulDx<T>{.dx = din, .dy = dout, .w = table_.matrix(w, table_.head)});
    }
    if (m.pool != PoolOf::none && m.pool != PoolOf::flatten) {
        Range range("pool");
        const bool weighted = m.pool == PoolOf::attention;
        const Mat<T> dz = weighted ? s.dz.slice_rows(0, n.rows) : Mat<T>();
        pool_backward(dev_, PoolBackward<T>{.dx = dn,
                                            .dz = dz,
                                            .dy = din,
                                            .x = weighted ? Mat<const T>(n) : Mat<const T>(),
                                            .y = weighted ? Mat<const T>(in) : Mat<const T>(),
                                            .z = weighted ? s.z.slice_rows(0, n.rows) : Mat<A>(),
                                            .lse = weighted ? s.pool_lse.slice_rows(0, in.rows) : Mat<A>(),
                                            .seq = batch.seq,
                                            .kind = kernel_kind(m.pool)});
        if (weighted) {
            matmul_dw(dev_, MatmulDw<T>{.dw = table_.matrix(g, table_.pool), .dy = dz, .x = n});
            matmul_dx(dev_, MatmulDx<T>{.dx = dn, .dy = dz, .w = table_.matrix(w, table_.pool), .accumulate = true});
        }
    }
    drop(batch, dn, dn, spec_.layers(), Site::last);
}

template <class Dev, class T>
Mat<const acc_t<T>> Model<Dev, T>::predictions(const DeviceBatch& batch) const {
    const std::int64_t rows = spec_.samples->pool == PoolOf::none ? batch.seq.tokens : batch.seq.count;
    return acts_.scratch().predictions.slice_rows(0, rows);
}

template <class Dev, class T>
void Model<Dev, T>::sample_loss(const DeviceBatch& batch, Vec<A> total, Vec<std::int64_t> count, bool gradient) {
    ScratchActivations<T>& s = acts_.scratch();
    const DeviceSamples& b = *batch.samples;
    const Mat<const A> shown = predictions(batch);
    const std::int64_t rows = shown.rows;
    const bool known = b.classes || b.targets;
    Range range("objective");
    Objective<T> p;
    p.kind = kernel_kind(*spec_.samples);
    p.smoothing = gradient ? A(spec_.samples->smoothing) : A(0);
    p.outputs = s.outputs.slice_rows(0, rows);
    if (known) {
        p.losses = Vec<A>(s.losses.data, rows);
        p.counts = s.counts.slice(0, rows);
        p.classes = b.classes;
        p.targets = b.targets;
    }
    p.row_shift = b.row_shift;
    p.row_scale = b.row_scale;
    p.scale_by = {static_cast<const A*>(b.scale), 1};
    if (gradient)
        p.doutputs = s.doutputs.slice_rows(0, rows);
    else
        p.predictions = s.predictions.slice_rows(0, rows);
    objective(dev_, p);
    if (known)
        objective_sum(dev_, ObjectiveSum<A>{.total = total, .count = count, .losses = p.losses, .counts = p.counts});
    if (gradient) backward_outputs(batch);
}

FIEDLER_MODEL_INSTANCES()

}  // namespace fiedler
