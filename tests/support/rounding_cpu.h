// tests/support/rounding_cpu.h: the CPU float kernels with every output that the GPU stores as bf16 rounded to bf16.
//
// Model<RoundingCpu, float> is the naive evaluation of the model in the GPU's precision: the yardstick of the computed
// tolerance. A sum over all tokens, such as the gradient of a temperature, is one number: its error in one evaluation
// may be small by luck. So the yardstick is taken from several evaluations, whose roundings differ by a dither of half
// a rounding step at most.
// Outputs that the GPU keeps in f32 (scalars, gates, softmax statistics, weight gradients) are left alone.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/adamw.h"
#include "kernels/attention.h"
#include "kernels/attention_tree.h"
#include "kernels/bag.h"
#include "kernels/conv.h"
#include "kernels/conv_rotary.h"
#include "kernels/coordinate.h"
#include "kernels/dot.h"
#include "kernels/dropout.h"
#include "kernels/embedding.h"
#include "kernels/energy.h"
#include "kernels/gate.h"
#include "kernels/graph_conv.h"
#include "kernels/head.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "kernels/mlp.h"
#include "kernels/norm.h"
#include "kernels/objective.h"
#include "kernels/pool.h"
#include "kernels/rotary.h"

namespace fiedler {

struct RoundingCpu : Cpu {
    // Outputs of matmul_forward and graph_conv_forward that stay f32: the layers' scalars and gate logits, a model's
    // outputs.
    std::vector<const float*> f32_products;
    std::uint32_t dither = 0;  // 0: round to nearest; else the seed of the dither
    mutable std::uint32_t calls = 0;
    const Cpu& plain() const { return *this; }
    bool stays_f32(const float* data) const {
        return std::find(f32_products.begin(), f32_products.end(), data) != f32_products.end();
    }

    float rounded(float x, std::uint32_t index) const {
        if (dither == 0) return float(bf16(x));
        std::uint32_t h = (dither * 0x9e3779b9u) ^ (calls * 0x85ebca6bu) ^ (index * 0xc2b2ae35u);
        h = (h ^ (h >> 16)) * 0x7feb352du;
        h = (h ^ (h >> 15)) * 0x846ca68bu;
        const float step = std::abs(x) * 0x1p-8f;  // at least half a rounding step of x, at most a whole one
        return float(bf16(x + step * (float(h >> 8) * 0x1p-24f - 0.5f)));
    }
    void round(const Mat<float>& m) const {
        ++calls;
        for (std::int64_t i = 0; i < m.rows; ++i)
            for (std::int64_t j = 0; j < m.cols; ++j)
                m.row(i)[j] = rounded(m.row(i)[j], static_cast<std::uint32_t>(i * m.cols + j));
    }
    void round(const Vec<float>& v) const { round(Mat<float>(v.data, 1, v.size)); }
};

inline void norm_forward(const RoundingCpu& d, const NormForward<float>& p) {
    norm_forward(d.plain(), p), d.round(p.y);
}
inline void norm_backward(const RoundingCpu& d, const NormBackward<float>& p) {
    norm_backward(d.plain(), p), d.round(p.dx);
}
inline void conv_forward(const RoundingCpu& d, const ConvForward<float>& p) {
    conv_forward(d.plain(), p), d.round(p.y);
}
inline void conv_backward(const RoundingCpu& d, const ConvBackward<float>& p) {
    conv_backward(d.plain(), p), d.round(p.dx);
}
inline void rotary_forward(const RoundingCpu& d, const RotaryForward<float>& p) {
    rotary_forward(d.plain(), p), d.round(p.y);
}
inline void rotary_backward(const RoundingCpu& d, const RotaryBackward<float>& p) {
    rotary_backward(d.plain(), p), d.round(p.dx);
}
inline void conv_rotary_forward(const RoundingCpu& d, const ConvRotaryForward<float>& p) {
    conv_rotary_forward(d.plain(), p), d.round(p.y);
}
inline void conv_rotary_backward(const RoundingCpu& d, const ConvRotaryBackward<float>& p) {
    conv_rotary_backward(d.plain(), p), d.round(p.dx);
}
inline void mlp_forward(const RoundingCpu& d, const MlpForward<float>& p) { mlp_forward(d.plain(), p), d.round(p.h); }
inline void mlp_backward(const RoundingCpu& d, const MlpBackward<float>& p) {
    mlp_backward(d.plain(), p), d.round(p.du);
}
inline void matmul_forward(const RoundingCpu& d, const MatmulForward<float, float>& p) {
    matmul_forward(d.plain(), p);
    if (!d.stays_f32(p.y.data)) d.round(p.y);
}
inline void matmul_dx(const RoundingCpu& d, const MatmulDx<float>& p) { matmul_dx(d.plain(), p), d.round(p.dx); }
inline void attention_forward(const RoundingCpu& d, const AttentionForward<float>& p) {
    attention_forward(d.plain(), p), d.round(p.o);
}
inline void attention_backward(const RoundingCpu& d, const AttentionBackward<float>& p) {
    attention_backward(d.plain(), p), d.round(p.dv);
}
inline void attention_tree_forward(const RoundingCpu& d, const AttentionTreeForward<float>& p) {
    attention_tree_forward(d.plain(), p), d.round(p.o);
}
inline void attention_tree_backward(const RoundingCpu& d, const AttentionTreeBackward<float>& p) {
    attention_tree_backward(d.plain(), p), d.round(p.dv);
}
inline void dot_forward(const RoundingCpu& d, const DotForward<float>& p) { dot_forward(d.plain(), p), d.round(p.o); }
inline void dot_backward(const RoundingCpu& d, const DotBackward<float>& p) {
    dot_backward(d.plain(), p);
    d.round(p.dq), d.round(p.dk), d.round(p.dv);
}
inline void energy_backward(const RoundingCpu& d, const EnergyBackward<float>& p) {
    energy_backward(d.plain(), p), d.round(p.dx);
}
inline void coordinate_backward(const RoundingCpu& d, const CoordinateBackward<float>& p) {
    coordinate_backward(d.plain(), p), d.round(p.ds);
}
inline void gate_backward(const RoundingCpu& d, const GateBackward<float>& p) {
    gate_backward(d.plain(), p), d.round(p.dz);
}
inline void loss_forward(const RoundingCpu& d, const LossForward<float>& p) {
    loss_forward(d.plain(), p);
    if (p.gradient) d.round(p.logits);
}

inline void graph_conv_forward(const RoundingCpu& d, const GraphConvForward<float>& p) {
    graph_conv_forward(d.plain(), p);
    if (!d.stays_f32(p.y.data)) d.round(p.y);
}
inline void graph_conv_backward(const RoundingCpu& d, const GraphConvBackward<float>& p) {
    graph_conv_backward(d.plain(), p), d.round(p.dx);
}
inline void bag_forward(const RoundingCpu& d, const BagForward<float>& p) { bag_forward(d.plain(), p), d.round(p.x); }
inline void pool_forward(const RoundingCpu& d, const PoolForward<float>& p) {
    pool_forward(d.plain(), p), d.round(p.y);
}
inline void pool_backward(const RoundingCpu& d, const PoolBackward<float>& p) {
    pool_backward(d.plain(), p), d.round(p.dx);
    if (p.dz) d.round(p.dz);
}
inline void dropout(const RoundingCpu& d, const Dropout<float>& p) { dropout(d.plain(), p), d.round(p.y); }
inline void objective(const RoundingCpu& d, const Objective<float>& p) {
    objective(d.plain(), p);
    if (p.doutputs) d.round(p.doutputs);
}

inline void head(const RoundingCpu& d, const Head<float>& p) { head_by_products(d, p); }

}  // namespace fiedler
