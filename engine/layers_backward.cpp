// engine/layers_backward.cpp: the attention half of a layer, backward.
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
#include "kernels/norm.h"
#include "kernels/rotary.h"

namespace fiedler {

// dx holds the gradient of mid on entry and of x on return. Gradients of queries, keys and values pass through dmixed
// (and drotated where rotary had a pass of its own) to dprojected; those of scalars and gate logits gather in daux.
template <class Dev, class T>
void Model<Dev, T>::backward_attention(int l, const DeviceBatch& batch) {
    const LayerSpec& spec = spec_.layer[static_cast<std::size_t>(l)];
    LayerActivations<T>& act = acts_.layer(l);
    ScratchActivations<T>& s = acts_.scratch();
    const LayerWeights<T> w = layer_weights(l);
    const LayerGrads<T> g = layer_grads(l);
    const std::int64_t c = spec_.channels, columns = spec_.projected_columns(spec);
    {
        Range range("matmul");
        matmul_dw(dev_, MatmulDw<T>{.dw = g.out, .dy = s.dx, .x = act.o});
        matmul_dx(dev_, MatmulDx<T>{.dx = s.do_, .dy = s.dx, .w = w.out});
    }

    const auto width = [&](const Mat<T>& m) { return Mat<T>{m.data, m.rows, columns, columns}; };
    const Mat<T> dmixed = width(s.dmixed);
    Mat<T> dprojected = w.conv ? width(s.dprojected) : dmixed;
    const Mat<T> dqk = act.rotated ? Mat<T>{s.drotated.data, s.drotated.rows, 2 * c, 2 * c}
                                   : (columns > c ? dmixed.columns(0, 2 * c) : Mat<T>{});
    if (spec.kind == LayerKind::dot) {
        Range range("dot");
        dot_backward(dev_, DotBackward<T>{.dq = dqk.columns(0, c),
                                          .dk = dqk.columns(c, c),
                                          .dv = dmixed.columns(2 * c, c),
                                          .delta = s.delta,
                                          .q = act.q(c),
                                          .k = act.k(c),
                                          .v = act.v(c),
                                          .o = act.o,
                                          .do_ = s.do_,
                                          .lse = act.lse,
                                          .seq = batch.seq,
                                          .heads = spec_.heads,
                                          .window = spec.window,
                                          .causal = spec_.causal,
                                          .scale = A(1 / std::sqrt(double(spec_.head_dim())))});
    } else {
        backward_scalars(l, batch, dmixed.columns(columns - c, c), dqk);
    }
    if (act.rotated) {
        Range range("rotary");
        rotary_backward(dev_, RotaryBackward<T>{.dx = dmixed.columns(0, 2 * c),
                                                .dy = dqk,
                                                .x = act.mixed.columns(0, 2 * c),
                                                .seq = batch.seq,
                                                .heads = 2 * spec_.heads,
                                                .normalise = spec_.normalises(spec),
                                                .rotate = spec_.rotates(spec),
                                                .theta = A(spec_.rope_theta),
                                                .eps = A(spec_.norm_eps)});
    }
    if (w.local) {
        Range range("matmul");
        const Mat<T> dv = dmixed.columns(columns - c, c);
        matmul_dw(dev_, MatmulDw<T>{.dw = g.local, .dy = s.dx, .x = act.v(c)});
        matmul_dx(dev_, MatmulDx<T>{.dx = dv, .dy = s.dx, .w = w.local, .accumulate = true});
    }
    if (spec_.graph_conv()) {
        dprojected = convolve_backward(batch, w.conv, g.conv, chain_of_layer(l), dmixed, dprojected);
    } else if (w.conv && spec_.turns(spec)) {
        Range range("conv_rotary");
        conv_rotary_backward(dev_, ConvRotaryBackward<T>{.dx = dprojected,
                                                         .dw = g.conv,
                                                         .dy = dmixed,
                                                         .x = act.projected,
                                                         .w = w.conv,
                                                         .seq = batch.seq,
                                                         .scratch = {},
                                                         .pending = &pending_,
                                                         .heads = 3 * spec_.heads,
                                                         .turned = 2 * spec_.heads,
                                                         .normalise = spec_.normalises(spec),
                                                         .rotate = spec_.rotates(spec),
                                                         .theta = A(spec_.rope_theta),
                                                         .eps = A(spec_.norm_eps)});
    } else if (w.conv) {
        Range range("conv");
        conv_backward(dev_, ConvBackward<T>{.dx = dprojected,
                                            .dw = g.conv,
                                            .dy = dmixed,
                                            .x = act.projected,
                                            .w = w.conv,
                                            .seq = batch.seq,
                                            .scratch = {},
                                            .pending = &pending_});
    }
    Range range("matmul");
    matmul_dw(dev_, MatmulDw<T>{.dw = g.projected, .dy = dprojected, .x = act.n1});
    matmul_dx(dev_, MatmulDx<T>{.dx = s.dn, .dy = dprojected, .w = w.projected});
    if (w.aux) {
        const Mat<T> daux = s.daux.columns(0, w.aux.rows);
        matmul_dw(dev_, MatmulDw<T>{.dw = g.aux, .dy = daux, .x = act.n1});
        matmul_dx(dev_, MatmulDx<T>{.dx = s.dn, .dy = daux, .w = w.aux, .accumulate = true});
        if (w.spectral)
            matmul_dw(dev_,
                      MatmulDw<T>{.dw = g.spectral, .dy = daux.columns(0, w.spectral.rows), .x = spectral_of(batch)});
    }
    drop(batch, s.dn, s.dn, l, Site::attention);
    Range norm("norm");
    norm_backward(dev_, NormBackward<T>{.dx = s.dx, .dy = s.dn, .x = act.x, .rstd = act.rstd1, .dresidual = s.dx});
}

// Through scalar-distance attention to the values (dv), the scalars and gate logits (daux), or queries and keys (dqk).
template <class Dev, class T>
void Model<Dev, T>::backward_scalars(int l, const DeviceBatch& batch, const Mat<T>& dv, const Mat<T>& dqk) {
    const LayerSpec& spec = spec_.layer[static_cast<std::size_t>(l)];
    LayerActivations<T>& act = acts_.layer(l);
    ScratchActivations<T>& s = acts_.scratch();
    const LayerWeights<T> w = layer_weights(l);
    const LayerGrads<T> g = layer_grads(l);
    const std::int64_t c = spec_.channels, hr = std::int64_t(spec_.heads) * spec.scalars;
    const std::int64_t scalar_columns = spec_.scalar_columns(spec);
    const Mat<A> da{s.da.data, s.da.rows, hr}, db{s.db.data, s.db.rows, hr};
    const Mat<A> dF = act.F ? s.dF : Mat<A>{};
    if (plan_.attends_by_tree(spec_, spec)) {
        Range range("attention_tree");
        attention_tree_backward(dev_, AttentionTreeBackward<T>{.da = da,
                                                               .db = db,
                                                               .dF = dF,
                                                               .dv = dv,
                                                               .delta = s.delta,
                                                               .scratch = s.tree,
                                                               .a = act.a,
                                                               .b = act.b,
                                                               .F = act.F,
                                                               .v = act.v(c),
                                                               .o = act.o,
                                                               .do_ = s.do_,
                                                               .lse = act.lse,
                                                               .seq = batch.seq,
                                                               .longest = spec_.context,
                                                               .heads = spec_.heads,
                                                               .causal = spec_.causal,
                                                               .skip = plan_.attention_skip});
    } else {
        Range range("attention");
        attention_backward(dev_, AttentionBackward<T>{.da = da,
                                                      .db = db,
                                                      .dF = dF,
                                                      .dv = dv,
                                                      .delta = s.delta,
                                                      .partial = s.partials,
                                                      .a = act.a,
                                                      .b = act.b,
                                                      .F = act.F,
                                                      .v = act.v(c),
                                                      .o = act.o,
                                                      .do_ = s.do_,
                                                      .lse = act.lse,
                                                      .seq = batch.seq,
                                                      .longest = spec_.context,
                                                      .heads = spec_.heads,
                                                      .scalars = spec.scalars,
                                                      .window = spec.window,
                                                      .causal = spec_.causal,
                                                      .skip = plan_.attention_skip});
    }
    if (spec.kind == LayerKind::coordinate) {
        const Mat<T> down = s.daux.columns(0, scalar_columns);
        const Mat<T> ds = act.scalars ? Mat<T>{s.dscalars.data, s.dscalars.rows, scalar_columns} : down;
        const Mat<A> own = act.aux.columns(0, scalar_columns);
        Range range("coordinate");
        coordinate_backward(dev_, CoordinateBackward<T>{.ds = ds,
                                                        .dw = act.scalars ? Mat<A>() : g.conv_scalars,
                                                        .dlog_temp = g.log_temp,
                                                        .da = da,
                                                        .db = db,
                                                        .a = act.a,
                                                        .b = act.b,
                                                        .s = act.scalars ? act.scalars : own,
                                                        .w = act.scalars ? Mat<const A>() : w.conv_scalars,
                                                        .log_temp = w.log_temp,
                                                        .seq = batch.seq,
                                                        .scratch = {},
                                                        .pending = &pending_});
        if (act.scalars)
            graph_conv_backward(dev_, GraphConvBackward<T, A>{.dx = down,
                                                              .dw = g.conv_scalars,
                                                              .dy = ds,
                                                              .x = own,
                                                              .w = w.conv_scalars,
                                                              .graph = batch.samples->graph,
                                                              .scratch = s.partials});
    } else {
        Range range("energy");
        energy_backward(dev_, EnergyBackward<T>{.dx = dqk,
                                                .dlog_tau = g.log_tau,
                                                .dlog_temp = g.log_temp,
                                                .da = da,
                                                .db = db,
                                                .x = (act.rotated ? act.rotated : act.mixed).columns(0, 2 * c),
                                                .lap = laplacian_,
                                                .log_tau = w.log_tau,
                                                .log_temp = w.log_temp,
                                                .heads = spec_.heads,
                                                .scalars = spec.scalars,
                                                .scratch = {},
                                                .pending = &pending_});
    }
    if (dF) {
        Range range("gate");
        gate_backward(dev_, GateBackward<T>{.dz = s.daux.columns(scalar_columns, spec_.heads),
                                            .dbias = g.gate_bias,
                                            .dF = dF,
                                            .z = act.aux.columns(scalar_columns, spec_.heads),
                                            .bias = w.gate_bias,
                                            .seq = batch.seq,
                                            .scratch = {},
                                            .pending = &pending_});
    }
}

FIEDLER_MODEL_INSTANCES()

}  // namespace fiedler
