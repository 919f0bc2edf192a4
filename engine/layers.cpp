// engine/layers.cpp: one layer, forward and backward: kernel calls in the order of DESIGN 1.
#include <algorithm>
#include <cmath>

#include "engine/model.h"
#include "engine/model_instances.h"
#include "kernels/attention.h"
#include "kernels/attention_tree.h"
#include "kernels/conv.h"
#include "kernels/conv_rotary.h"
#include "kernels/coordinate.h"
#include "kernels/dot.h"
#include "kernels/gate.h"
#include "kernels/matmul.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"

namespace fiedler {

template <class Dev, class T>
void Model<Dev, T>::forward_layer(int l, const DeviceBatch& batch) {
    LayerActivations<T>& act = acts_.layer(l);
    const LayerWeights<T> w = layer_weights(l);
    forward_norm1(l, batch);
    forward_attention(l, batch);
    forward_mid(l);
    for_hidden_rows([&](std::int64_t first, std::int64_t rows) {
        forward_norm2(l, batch, first, rows);
        forward_mlp_in(l, rows);
        Range range("mlp");
        const Mat<T> h = drops(batch) ? acts_.scratch().du.slice_rows(0, rows) : act.h.slice_rows(0, rows);
        drop(batch, h, act.h.slice_rows(0, rows), l, Site::hidden, first);
        matmul_forward(dev_, MatmulForward<T, T>{.y = next_input(l).slice_rows(first, rows),
                                                 .x = h,
                                                 .w = w.mlp_out,
                                                 .residual = act.mid.slice_rows(first, rows)});
    });
}

template <class Dev, class T>
void Model<Dev, T>::forward_norm1(int l, const DeviceBatch& batch) {
    Range range("norm");
    LayerActivations<T>& act = acts_.layer(l);
    norm_forward(dev_, NormForward<T>{.y = act.n1, .rstd = act.rstd1, .x = act.x, .eps = A(spec_.norm_eps)});
    drop(batch, act.n1, act.n1, l, Site::attention);
}

// What attention adds to x, and in models of samples the values themselves.
template <class Dev, class T>
void Model<Dev, T>::forward_mid(int l) {
    Range range("matmul");
    LayerActivations<T>& act = acts_.layer(l);
    const LayerWeights<T> w = layer_weights(l);
    matmul_forward(dev_, MatmulForward<T, T>{.y = act.mid, .x = act.o, .w = w.out, .residual = act.x});
    if (w.local)
        matmul_forward(
            dev_, MatmulForward<T, T>{.y = act.mid, .x = act.v(spec_.channels), .w = w.local, .residual = act.mid});
}

// The second norm of rows from `first` on, to the first rows of n2.
template <class Dev, class T>
void Model<Dev, T>::forward_norm2(int l, const DeviceBatch& batch, std::int64_t first, std::int64_t rows) {
    Range range("norm");
    LayerActivations<T>& act = acts_.layer(l);
    norm_forward(dev_, NormForward<T>{.y = act.n2.slice_rows(0, rows),
                                      .rstd = act.rstd2.slice(0, rows),
                                      .x = act.mid.slice_rows(first, rows),
                                      .eps = A(spec_.norm_eps)});
    drop(batch, act.n2.slice_rows(0, rows), act.n2.slice_rows(0, rows), l, Site::mlp, first);
}

// h of the first rows of n2.
template <class Dev, class T>
void Model<Dev, T>::forward_mlp_in(int l, std::int64_t rows) {
    Range range("mlp");
    LayerActivations<T>& act = acts_.layer(l);
    mlp_forward(
        dev_,
        MlpForward<T>{.h = act.h.slice_rows(0, rows), .x = act.n2.slice_rows(0, rows), .w = layer_weights(l).mlp_in});
}

template <class Dev, class T>
void Model<Dev, T>::forward_attention(int l, const DeviceBatch& batch) {
    const LayerSpec& spec = spec_.layer[static_cast<std::size_t>(l)];
    LayerActivations<T>& act = acts_.layer(l);
    const LayerWeights<T> w = layer_weights(l);
    const std::int64_t c = spec_.channels;
    {
        Range range("matmul");
        matmul_forward(dev_, MatmulForward<T, T>{.y = act.projected, .x = act.n1, .w = w.projected, .residual = {}});
        if (w.aux)
            matmul_forward(dev_, MatmulForward<T, A>{
                                     .y = act.aux.columns(0, w.aux.rows), .x = act.n1, .w = w.aux, .residual = {}});
        if (w.spectral) {
            const Mat<A> scalars = act.aux.columns(0, w.spectral.rows);
            matmul_forward(
                dev_, MatmulForward<T, A>{.y = scalars, .x = spectral_of(batch), .w = w.spectral, .residual = scalars});
        }
    }
    if (spec_.graph_conv()) {
        convolve(batch, w.conv, chain_of_layer(l));
    } else if (w.conv && spec_.turns(spec)) {
        Range range("conv_rotary");
        conv_rotary_forward(dev_, ConvRotaryForward<T>{.y = act.mixed,
                                                       .x = act.projected,
                                                       .w = w.conv,
                                                       .seq = batch.seq,
                                                       .heads = 3 * spec_.heads,
                                                       .turned = 2 * spec_.heads,
                                                       .normalise = spec_.normalises(spec),
                                                       .rotate = spec_.rotates(spec),
                                                       .theta = A(spec_.rope_theta),
                                                       .eps = A(spec_.norm_eps)});
    } else if (w.conv) {
        Range range("conv");
        conv_forward(dev_, ConvForward<T>{.y = act.mixed, .x = act.projected, .w = w.conv, .seq = batch.seq});
    }
    if (act.rotated) {
        Range range("rotary");
        rotary_forward(dev_, RotaryForward<T>{.y = act.rotated,
                                              .x = act.mixed.columns(0, 2 * c),
                                              .seq = batch.seq,
                                              .heads = 2 * spec_.heads,
                                              .normalise = spec_.normalises(spec),
                                              .rotate = spec_.rotates(spec),
                                              .theta = A(spec_.rope_theta),
                                              .eps = A(spec_.norm_eps)});
    }
    if (spec.kind == LayerKind::dot) {
        Range range("dot");
        dot_forward(dev_, DotForward<T>{.o = act.o,
                                        .lse = act.lse,
                                        .q = act.q(c),
                                        .k = act.k(c),
                                        .v = act.v(c),
                                        .seq = batch.seq,
                                        .heads = spec_.heads,
                                        .window = spec.window,
                                        .causal = spec_.causal,
                                        .scale = A(1 / std::sqrt(double(spec_.head_dim())))});
        return;
    }
    forward_scalars(l, batch);
    if (plan_.attends_by_tree(spec_, spec)) {
        Range range("attention_tree");
        attention_tree_forward(dev_, AttentionTreeForward<T>{.o = act.o,
                                                             .lse = act.lse,
                                                             .a = act.a,
                                                             .b = act.b,
                                                             .F = act.F,
                                                             .v = act.v(c),
                                                             .scratch = acts_.scratch().tree,
                                                             .seq = batch.seq,
                                                             .longest = spec_.context,
                                                             .heads = spec_.heads,
                                                             .causal = spec_.causal,
                                                             .skip = plan_.attention_skip});
        return;
    }
    Range range("attention");
    attention_forward(dev_, AttentionForward<T>{.o = act.o,
                                                .lse = act.lse,
                                                .a = act.a,
                                                .b = act.b,
                                                .F = act.F,
                                                .v = act.v(c),
                                                .scratch = acts_.scratch().partials,
                                                .seq = batch.seq,
                                                .heads = spec_.heads,
                                                .scalars = spec.scalars,
                                                .window = spec.window,
                                                .causal = spec_.causal,
                                                .skip = plan_.attention_skip});
}

// a, b and F of a scalar layer.
template <class Dev, class T>
void Model<Dev, T>::forward_scalars(int l, const DeviceBatch& batch) {
    const LayerSpec& spec = spec_.layer[static_cast<std::size_t>(l)];
    LayerActivations<T>& act = acts_.layer(l);
    const LayerWeights<T> w = layer_weights(l);
    const std::int64_t scalar_columns = spec_.scalar_columns(spec);
    if (spec.kind == LayerKind::coordinate) {
        const Mat<A> own = act.aux.columns(0, scalar_columns);
        if (act.scalars) {
            Range range("graph_conv");
            graph_conv_forward(
                dev_,
                GraphConvForward<A>{.y = act.scalars, .x = own, .w = w.conv_scalars, .graph = batch.samples->graph});
        }
        Range range("coordinate");
        coordinate_forward(dev_, CoordinateForward<A>{.a = act.a,
                                                      .b = act.b,
                                                      .s = act.scalars ? act.scalars : own,
                                                      .w = act.scalars ? Mat<const A>() : w.conv_scalars,
                                                      .log_temp = w.log_temp,
                                                      .seq = batch.seq});
    } else {
        Range range("energy");
        if (calibrating_) calibrate_layer(l);
        energy_forward(dev_,
                       EnergyForward<T>{.a = act.a,
                                        .b = act.b,
                                        .x = (act.rotated ? act.rotated : act.mixed).columns(0, 2 * spec_.channels),
                                        .lap = laplacian_,
                                        .log_tau = w.log_tau,
                                        .log_temp = w.log_temp,
                                        .heads = spec_.heads,
                                        .scalars = spec.scalars});
    }
    if (act.F) {
        Range range("gate");
        gate_forward(dev_, GateForward<A>{.F = act.F,
                                          .z = act.aux.columns(scalar_columns, spec_.heads),
                                          .bias = w.gate_bias,
                                          .seq = batch.seq,
                                          .carry = {}});
    }
}

template <class Dev, class T>
void Model<Dev, T>::calibrate_layer(int l) {
    const LayerSpec& spec = spec_.layer[static_cast<std::size_t>(l)];
    LayerActivations<T>& act = acts_.layer(l);
    const auto n = static_cast<std::size_t>(act.a.rows * act.a.cols), scalars = static_cast<std::size_t>(spec.scalars);
    std::vector<A> energy(2 * n);
    const auto raw = [&](const Mat<A>& out, const Mat<T>& x, A* host) {
        energy_forward(dev_, EnergyForward<T>{.a = out,
                                              .x = x,
                                              .lap = laplacian_,
                                              .log_tau = {},
                                              .log_temp = {},
                                              .heads = spec_.heads,
                                              .scalars = spec.scalars,
                                              .raw = true});
        copy_to_host(dev_, host, out.data, n * sizeof(A));
    };
    raw(act.a, act.q(spec_.channels), energy.data());
    raw(act.b, act.k(spec_.channels), energy.data() + n);
    std::vector<A> log_tau(scalars);
    for (std::size_t r = 0; r < scalars; ++r) {
        std::vector<A> band;
        for (std::size_t i = r; i < 2 * n; i += scalars) band.push_back(energy[i]);
        const auto middle = band.begin() + static_cast<std::ptrdiff_t>(band.size() / 2);
        std::nth_element(band.begin(), middle, band.end());
        const A tau = std::max(*middle, A(1e-6));  // a band of zero energy would give log 0
        log_tau[r] = std::log(tau);
        (*calibrating_)[static_cast<std::size_t>(l)].push_back(double(tau));
    }
    const Vec<A> target = table_.vector(params_.master.data, table_.layer[static_cast<std::size_t>(l)].log_tau);
    copy_to_device(dev_, target.data, log_tau.data(), scalars * sizeof(A));
    synchronize(dev_);
}

template <class Dev, class T>
void Model<Dev, T>::backward_layer(int l, const DeviceBatch& batch) {
    if (plan_.recompute ==
        Recompute::layer) {  // the shared buffers hold another layer: make this one's again from its input
        forward_norm1(l, batch);
        forward_attention(l, batch);
        forward_mid(l);
    }
    for_hidden_rows([&](std::int64_t first, std::int64_t rows) {
        if (plan_.recompute == Recompute::layer) forward_norm2(l, batch, first, rows);
        if (plan_.recompute != Recompute::none) forward_mlp_in(l, rows);
        backward_mlp(l, batch, first, rows);
    });
    backward_attention(l, batch);
}

// Rows from `first` on; n2 and h of them are in the first rows of theirs.
template <class Dev, class T>
void Model<Dev, T>::backward_mlp(int l, const DeviceBatch& batch, std::int64_t first, std::int64_t rows) {
    Range range("mlp");
    LayerActivations<T>& act = acts_.layer(l);
    ScratchActivations<T>& s = acts_.scratch();
    const LayerWeights<T> w = layer_weights(l);
    const LayerGrads<T> g = layer_grads(l);
    const Mat<T> n2 = act.n2.slice_rows(0, rows), h = act.h.slice_rows(0, rows), du = s.du.slice_rows(0, rows);
    const Mat<T> dx = s.dx.slice_rows(first, rows), dn = s.dn.slice_rows(0, rows);
    drop(batch, du, h, l, Site::hidden, first);
    matmul_dw(dev_, MatmulDw<T>{.dw = g.mlp_out, .dy = dx, .x = drops(batch) ? du : h});
    mlp_backward(dev_, MlpBackward<T>{.du = du, .dy = dx, .w = w.mlp_out, .h = h});
    drop(batch, du, du, l, Site::hidden, first);
    matmul_dw(dev_, MatmulDw<T>{.dw = g.mlp_in, .dy = du, .x = n2});
    matmul_dx(dev_, MatmulDx<T>{.dx = dn, .dy = du, .w = w.mlp_in});
    drop(batch, dn, dn, l, Site::mlp, first);
    Range norm("norm");
    norm_backward(dev_, NormBackward<T>{.dx = dx,
                                        .dy = dn,
                                        .x = act.mid.slice_rows(first, rows),
                                        .rstd = act.rstd2.slice(0, rows),
                                        .dresidual = dx});
}

FIEDLER_MODEL_INSTANCES()

}  // namespace fiedler
