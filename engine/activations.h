// engine/activations.h: ONE table of activations: name, shape, type, lifetime. The arena places what it lists, the
// model reads the views, `fiedler plan` prints it.
//
// N tokens of a micro-batch, C channels, H heads, R scalars, M hidden, S = columns of the f32 product (scalars and
// gate logits). Lifetimes under a recomputation level:
//   none    everything the backward pass reads is saved, per layer
//   mlp     h (the MLP's hidden values) is recomputed from n2: one buffer for all layers
//   layer   only x, the layer's input, is saved; the rest is recomputed in one set of buffers. Of long micro-batches, what
//           is the MLP's (n2, h and their gradients) exists for mlp_rows tokens at a time.
#pragma once
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "engine/arena.h"
#include "engine/model_spec.h"
#include "kernels/dtype.h"
#include "kernels/view.h"

namespace fiedler {

enum class Recompute { none, mlp, layer };
const char* name_of(Recompute);

struct ActivationPlan {
    std::int64_t tokens = 0;       // N, the most a micro-batch may hold
    std::int64_t sequences = 0;    // the most sequences it may hold (documents count when masked)
    std::int64_t logits_rows = 0;  // rows of one chunk of logits: those of one product with their gradient
    std::int64_t loss_rows = 0;    // rows of it that go from product to loss at a time; 0: all. Takes no memory.
    bool training = true;          // false: no gradients, no backward scratch
    bool keep_layers = true;       // false (evaluation): one set of buffers for all layers
    Recompute recompute = Recompute::none;
    std::int64_t mlp_rows = 0;         // rows that go through the MLP at a time, not with `none` and `mlp`; 0: all
    std::int64_t tree_from = 0;        // contexts from this length on: attention_tree, in layers that it takes
    bool attention_skip = true;        // AttentionForward::skip
    bool head_fp8 = false;             // Head::precision
    std::int64_t runs_from = 0;        // decoders from this length on: attention_runs, in the same layers, on the CPU
    std::int64_t feature_entries = 0;  // of sparse features, the most a batch of samples may hold

    static bool has_one_scalar(const LayerSpec& l) {
        return l.kind != LayerKind::dot && l.scalars == 1 && l.window == 0;
    }
    bool attends_by_tree(const ModelSpec& spec, const LayerSpec& l) const {
        return has_one_scalar(l) && spec.context >= tree_from;
    }
    bool decodes_by_runs(const ModelSpec& spec, const LayerSpec& l, std::int64_t capacity) const {
        return spec.causal && has_one_scalar(l) && capacity >= runs_from;
    }
    // Rows of outputs: tokens, nodes or samples.
    std::int64_t output_rows(const ModelSpec& spec) const {
        return spec.samples && spec.samples->pool != PoolOf::none ? sequences : tokens;
    }
    std::int64_t hidden_rows() const { return mlp_rows > 0 ? std::min(mlp_rows, tokens) : tokens; }
};

template <class T>
struct LayerActivations {
    using A = acc_t<T>;
    Mat<T> x, n1, projected, mixed, rotated, o, mid, n2, h;
    std::vector<Mat<T>> hops;  // samples: between two hops of graph_conv; the last goes to mixed
    Vec<A> rstd1, rstd2;
    Mat<A> aux, a, b, F, lse;
    Mat<A> scalars;  // samples: the scalars of aux after graph_conv
    // mixed is `projected` after the convolution (the same view without one), of causal models after conv_rotary. Without
    // that, norm and rotation make `rotated` of mixed. Queries, keys and values of this layer:
    Mat<T> q(std::int64_t c) const { return rotated ? rotated.columns(0, c) : mixed.columns(0, c); }
    Mat<T> k(std::int64_t c) const { return rotated ? rotated.columns(c, c) : mixed.columns(c, c); }
    Mat<T> v(std::int64_t c) const { return mixed.columns(mixed.cols - c, c); }
};

template <class T>
struct ScratchActivations {  // shared by all layers
    using A = acc_t<T>;
    Mat<T> spectral;  // U[token], kept for the gradient of Ws
    Mat<T> x_last, n_last, dx, dn, du, do_, dmixed, drotated, dprojected, daux, logits;
    Vec<A> rstd_last, losses;
    Mat<A> da, db, dF, delta;
    Vec<A> head;                  // scratch of the head
    Vec<unsigned char> head_fp8;  // and of its way in fp8
    Vec<A> partials;              // scratch of attention, graph_conv, bag, pool
    Vec<A> pending;               // what the layers' gates and scalars leave to PendingSums
    Vec<std::byte> sort;          // scratch of the embedding's gradient
    Vec<unsigned char> tree;      // scratch of attention_tree
    // Samples; rows are those of the plan, not of the batch.
    Mat<T> pooled, dpooled, doutputs, dz;  // dpooled, doutputs, dz: training
    Mat<A> outputs, predictions, z, pool_lse;
    Vec<std::int32_t> counts;        // targets of each row that are known
    Mat<T> ones;                     // [the larger of tokens and rows, 8]: 1 in the first column, which the owner fills
    Mat<T> dscalars;                 // training
    std::vector<Mat<T>> input_hops;  // what each hop of the input reads
};

template <class T>
class Activations {
  public:
    using A = acc_t<T>;
    // Asks the arena for every block, in a fixed order: the same calls in the dry run and in the real one.
    Activations(Arena&, const ModelSpec&, const ActivationPlan&);
    Activations(const Activations&) = delete;
    Activations& operator=(const Activations&) = delete;
    // Sets the number of rows of every view to tokens <= plan.tokens.
    void bind(std::int64_t tokens);
    std::int64_t tokens() const { return tokens_; }
    LayerActivations<T>& layer(int l) { return layers_[static_cast<std::size_t>(l)]; }
    ScratchActivations<T>& scratch() { return scratch_; }

  private:
    void place_layers(Arena&, const ActivationPlan&);
    void place_scratch(Arena&, const ActivationPlan&);
    void place_gradients(Arena&, const ActivationPlan&);
    void place_partials(Arena&, const ActivationPlan&);
    void place_tree(Arena&, const ActivationPlan&);
    void place_logits(Arena&, const ActivationPlan&);
    void place_outputs(Arena&, const ActivationPlan&);
    std::int64_t forward_elements(const ActivationPlan& plan) const;
    std::int64_t partial_elements(const ActivationPlan&) const;
    std::int64_t pending_elements(const ActivationPlan&) const;

    const ModelSpec& spec_;
    std::vector<LayerActivations<T>> layers_;
    ScratchActivations<T> scratch_;
    std::vector<std::function<void(std::int64_t rows)>> fills_;
    std::int64_t tokens_ = 0;
};

}  // namespace fiedler
