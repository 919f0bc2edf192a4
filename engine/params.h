// engine/params.h: ONE table of parameter tensors. Every offset in weights, master weights, moments and gradients is
// taken from it.
//
// The block is ordered: tensors with weight decay, then those without, then frozen ones; so AdamW and the gradient norm
// see contiguous ranges. Offsets are in elements, multiples of 8 (16 bytes in bf16); tensors are [out, in] row-major as
// in PyTorch. A layer's scalars.weight and gate.weight are neighbours: together they are one matrix for one product.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/model_spec.h"
#include "kernels/view.h"

namespace fiedler {

enum class Init {
    normal,
    projection,
    spectral,
    zeros,
    identity_conv,
    gate_bias,
    log_temperature,
    log_tau,
    features,     // normal, by the width of a row: 1 / sqrt(cols)
    graph_conv,   // each hop: own and neighbours' weight 1/2
    graph_ident,  // own weight 1, neighbours' 0
    axes          // queries and keys: row i of each half has 1 in column i modulo `value`, 0 elsewhere
};
enum class Group { decayed, plain, frozen };

struct ParamTensor {
    std::string name;
    std::int64_t rows = 0, cols = 0;  // cols == 0: a vector of rows elements
    Init init = Init::normal;
    Group group = Group::decayed;
    float value = 0;  // log_temperature, log_tau: the value
    std::int64_t offset = 0;
    std::int64_t size() const { return rows * (cols ? cols : 1); }
    std::vector<std::int64_t> shape() const { return cols ? std::vector{rows, cols} : std::vector{rows}; }
};

// Indices into the table; -1 where the layer has no such tensor.
struct LayerTensors {
    int projected = -1;  // attn.v.weight [C, C] or attn.qkv.weight [3C, C]
    int scalars = -1, gate = -1;
    int out = -1, mlp_in = -1, mlp_out = -1;
    int conv = -1, conv_scalars = -1, gate_bias = -1, log_temp = -1, log_tau = -1;
    int local = -1, spectral = -1;  // samples: Wl [C, C], S [2 H R, k padded]
};

struct ParamTable {
    std::vector<ParamTensor> tensor;
    int embedding = -1, head = -1;  // head == embedding when tied
    int spectral = -1;              // Ws [C, k padded]; -1 without a spectral embedding
    // Samples: embedding is [F, C] or, of dense features, [C, F padded]; head [outputs, pooled_columns]. Biases are
    // matrices of 8 columns, of which only the first is ever not 0: one more product with a matrix of ones.
    int input_bias = -1, head_bias = -1, pool = -1;  // [C, 8], [outputs, 8], [H, C]
    int input_conv = -1;                             // [input_hops (edge_types + 1), C]
    std::vector<LayerTensors> layer;
    std::int64_t elements = 0;    // of the block, padding included
    std::int64_t decayed = 0;     // elements of the first group
    std::int64_t trainable = 0;   // elements of the first two groups
    std::int64_t parameters = 0;  // trainable numbers, padding excluded: what "30M" means

    explicit ParamTable(const ModelSpec&);
    const ParamTensor* find(const std::string& name) const;

    template <class P>
    Mat<P> matrix(P* base, int i) const {
        const ParamTensor& t = tensor[static_cast<std::size_t>(i)];
        return {base + t.offset, t.rows, t.cols ? t.cols : 1};
    }
    template <class P>
    Vec<P> vector(P* base, int i) const {
        const ParamTensor& t = tensor[static_cast<std::size_t>(i)];
        return {base + t.offset, t.size()};
    }
};

// Initial values of the whole block (DESIGN 1, "Recipe"), from a counter-based generator: a tensor's values depend on
// seed, its name and the index only. out: table.elements values.
void initialise(const ParamTable&, const ModelSpec&, std::uint64_t seed, float* out);

}  // namespace fiedler
