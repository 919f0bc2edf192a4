// engine/model.h: the model on one device in one precision: forward, backward, and the views they work on.
//
// Model<Dev, T>: <Cpu, float> trains without a GPU, <Cpu, double> is the reference of the gradient tests, <Cuda, bf16>
// is the product. T is the storage type of activations and of the weights that matrix products read; acc_t<T> holds
// gradients, master weights, scalars, gates and softmax statistics. The order of kernel calls is written once for the
// three of them.
#pragma once
#include <functional>
#include <vector>

#include "engine/activations.h"
#include "engine/model_spec.h"
#include "engine/params.h"
#include "kernels/energy.h"
#include "kernels/gradnorm.h"
#include "kernels/graph_conv.h"
#include "kernels/pending_sums.h"

namespace fiedler {

// What a batch of samples has in place of tokens, in device memory. Absent: what the model or the batch has not.
struct DeviceSamples {
    Vec<const std::int32_t> feature_offsets, feature_columns;   // sparse features, CSR over nodes
    Vec<const float> feature_values;                            // of them
    Vec<const std::int32_t> by_feature_offsets, feature_nodes;  // the same transposed; with gradients only
    Vec<const float> by_feature_values;
    const void *dense = nullptr, *spectral = nullptr;  // [N, F padded], [N, k padded], T
    Adjacency graph;
    Vec<const std::int32_t> classes;
    Mat<const float> targets;
    Vec<const float> row_shift, row_scale;
    Vec<const std::uint64_t> seed;  // of this step's dropout; absent: none
    const void* scale = nullptr;    // [1] acc_t<T>: the weight of a target's loss in the gradient
    Vec<std::int64_t> count;        // [1], 0: known targets are counted here
};

// One micro-batch in device memory. Targets may be absent when no loss is asked for.
struct DeviceBatch {
    Vec<const std::int32_t> inputs, targets;
    Packed seq;
    const DeviceSamples* samples = nullptr;  // present iff the model is one of samples
};

// The parameter block as the kernels see it. weights: T (bf16 copy, or the master block itself where T is acc_t<T>).
template <class T>
struct ParamBlock {
    Vec<acc_t<T>> master;
    Vec<T> weights;
    Vec<acc_t<T>> grads;  // absent outside training
};

template <class T>
struct LayerWeights {  // views into the block: matrices as T, small sensitive tensors as acc_t<T>
    Mat<const T> projected, aux, out, mlp_in, mlp_out;
    Mat<const T> local, spectral;  // samples
    Mat<const acc_t<T>> conv, conv_scalars;
    Vec<const acc_t<T>> gate_bias, log_temp, log_tau;
};
template <class T>
struct LayerGrads {
    Mat<acc_t<T>> projected, aux, out, mlp_in, mlp_out, local, spectral, conv, conv_scalars;
    Vec<acc_t<T>> gate_bias, log_temp, log_tau;  // absent where frozen
};

template <class Dev, class T>
class Model {
  public:
    using A = acc_t<T>;

    // Views only: the caller owns all memory (parameters, activations, the feature Laplacian, the table U of the
    // spectral embedding: [vocab, spectral_columns()], absent without one) and keeps it alive.
    Model(const Dev& dev, const ModelSpec& spec, const ParamTable& table, const ParamBlock<T>& params,
          const FeatureLaplacian<A>& laplacian, const Mat<const T>& spectral, const ActivationPlan& plan,
          Activations<T>& acts);

    // x = E[token] + U[token] Ws, one row a token; u: room for U[token], [tokens, spectral_columns()].
    void embed(const Vec<const std::int32_t>& tokens, const Mat<T>& x, const Mat<T>& u) const;
    // Everything up to the last norm. The batch may hold fewer tokens than planned. after_layer(l), if given, is called
    // when layer l's activations are complete (decoding copies its caches there).
    void forward(const DeviceBatch&, const std::function<void(int)>& after_layer = {});
    // Sum of the losses of the batch added to *total; with gradient, dlogits flow back into the head's and the last
    // norm's input gradients: grad_scale is the weight of one token's loss (1 / tokens of the whole step).
    void loss(const DeviceBatch&, Vec<A> total, bool gradient, A grad_scale);
    // From the next loss on: the head in bf16 although the plan has it in fp8, or no longer so.
    void use_head_bf16(bool yes) { head_bf16_ = yes; }
    bool head_in_fp8() const { return plan_.head_fp8 && !head_bf16_; }
    // From the last norm down to the embedding; parameter gradients accumulate.
    void backward(const DeviceBatch&);

    // The same for samples: the targets' losses added to *total, their number to *count; with gradient, doutputs and what
    // is below them down to the last layer. predictions() are those of the last call, also without targets.
    void sample_loss(const DeviceBatch&, Vec<A> total, Vec<std::int64_t> count, bool gradient);
    Mat<const A> predictions(const DeviceBatch&) const;  // [rows, outputs]

    // Logits of the rows [first, first + n) of the last forward, n <= logits_rows of the plan: [n, vocab] T.
    Mat<const T> logits(std::int64_t first, std::int64_t n);

    // The energy layers' tau from the data, before the first step: one forward pass in which each energy layer sets
    // tau_r to the median energy E_r of its queries and keys (in master, at log_tau) before it goes on. Returns
    // tau[layer][r], empty for others.
    std::vector<std::vector<double>> calibrate_tau(const DeviceBatch&);

    const ModelSpec& spec() const { return spec_; }
    const ActivationPlan& plan() const { return plan_; }
    const ParamTable& table() const { return table_; }
    LayerActivations<T>& layer_activations(int l) { return acts_.layer(l); }
    LayerWeights<T> layer_weights(int l) const;
    const FeatureLaplacian<A>& laplacian() const { return laplacian_; }
    const Mat<const T>& spectral_table() const { return spectral_; }  // U; absent without a spectral embedding

  private:
    void head(const Mat<T>& logits, std::int64_t first);
    // What dropout works on: one stream of random bits for each of them and each layer.
    enum class Site { attention, mlp, hidden, last };
    // y = x with dropout, where this batch has any: y may be x. first: the row of the batch that x begins with.
    bool drops(const DeviceBatch& batch) const {
        return batch.samples && batch.samples->seed && spec_.samples->dropout > 0;
    }
    void drop(const DeviceBatch&, const Mat<T>& y, const Mat<T>& x, int l, Site, std::int64_t first = 0) const;
    void embed_samples(const DeviceBatch&, const Mat<T>& x) const;
    void embed_samples_backward(const DeviceBatch&) const;
    Mat<const T> dense_of(const DeviceBatch& b) const {
        return {static_cast<const T*>(b.samples->dense), b.seq.tokens, spec_.samples->feature_columns()};
    }
    Mat<const T> spectral_of(const DeviceBatch& b) const {
        return {static_cast<const T*>(b.samples->spectral), b.seq.tokens, spec_.spectral_columns()};
    }
    Mat<T> last() { return last_norm() ? acts_.scratch().n_last : acts_.scratch().x_last; }
    Mat<T> dlast() { return last_norm() ? acts_.scratch().dn : acts_.scratch().dx; }
    bool last_norm() const { return !spec_.samples || spec_.samples->last_norm; }
    Mat<T> pooled(const DeviceBatch&, bool gradient);  // what the outputs' product reads: last() itself, or made of it
    void forward_outputs(const DeviceBatch&);
    void backward_outputs(const DeviceBatch&);
    // Hops of graph_conv: chain[0] -> chain[1] -> ... ; the hops' weights lie below each other.
    void convolve(const DeviceBatch&, const Mat<const A>& w, const std::vector<Mat<T>>& chain) const;
    // The gradient of chain[0] from dy, that of chain.back(), in dy's memory or in that of `other`.
    Mat<T> convolve_backward(const DeviceBatch&, const Mat<const A>& w, const Mat<A>& dw,
                             const std::vector<Mat<T>>& chain, Mat<T> dy, Mat<T> other) const;
    std::vector<Mat<T>> chain_of_layer(int l) const;
    void forward_norm1(int l, const DeviceBatch&);
    void forward_mid(int l);
    LayerGrads<T> layer_grads(int l) const;
    void forward_layer(int l, const DeviceBatch&);
    void forward_attention(int l, const DeviceBatch&);
    void forward_norm2(int l, const DeviceBatch&, std::int64_t first, std::int64_t rows);
    void forward_mlp_in(int l, std::int64_t rows);
    // work(first, rows): the batch's rows, as many at a time as the MLP's memory has.
    template <class Work>
    void for_hidden_rows(const Work& work) const {
        const std::int64_t n = acts_.tokens(), most = plan_.hidden_rows();
        for (std::int64_t first = 0; first < n; first += most) work(first, std::min(most, n - first));
    }
    void backward_layer(int l, const DeviceBatch&);
    void backward_attention(int l, const DeviceBatch&);
    void backward_scalars(int l, const DeviceBatch&, const Mat<T>& dv, const Mat<T>& dqk);
    void backward_mlp(int l, const DeviceBatch&, std::int64_t first, std::int64_t rows);
    void forward_scalars(int l, const DeviceBatch&);
    void calibrate_layer(int l);
    Mat<T> next_input(int l) { return l + 1 < spec_.layers() ? acts_.layer(l + 1).x : acts_.scratch().x_last; }

    const Dev& dev_;
    const ModelSpec& spec_;
    const ParamTable& table_;
    ParamBlock<T> params_;
    FeatureLaplacian<A> laplacian_;
    Mat<const T> spectral_;
    const ActivationPlan& plan_;
    bool head_bf16_ = false;
    Activations<T>& acts_;
    std::vector<std::vector<double>>* calibrating_ = nullptr;
    PendingSums<A> pending_;  // of the backward pass at hand; stays empty on Cpu
};

}  // namespace fiedler
