// engine/decode.h: incremental decoding of one sequence, O(length) per token and layer, or O(log length).
//
// Cache per layer and token: values [C] T; scalars of keys [H R] and the gate's sum [H] as acc_t<T>. Keys are kept by
// dot layers only. With it, the last three rows before the convolution, so that it goes on across tokens.
//
// On the CPU, layers with one scalar and no window keep sorted runs in its place (kernels/attention_runs.h) where the
// cache is long enough for them to be faster, or as `--attention` asks. They grow with the sequence, outside the arena.
#pragma once
#include <type_traits>

#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/attention_runs.h"

namespace fiedler {

template <class T>
struct LayerCache {
    using A = acc_t<T>;
    Mat<T> v, k;       // [capacity, C]; k: dot layers
    Mat<A> b, F;       // [capacity, H R], [capacity, H]
    Mat<T> projected;  // [4, columns]: three old rows and the new one
    Mat<A> scalars;    // [4, 2 H R]
    Vec<A> carry;      // [H]: the gate's sum so far
};

// Of one token, in caches of LayerCache's or SlotCache's kind.
template <class Cache>
std::size_t cache_bytes_of_token(const std::vector<Cache>& layers) {
    std::size_t bytes = 0;
    for (const Cache& c : layers)
        bytes += static_cast<std::size_t>(c.v.cols + c.k.cols) * sizeof(*c.v.data) +
                 static_cast<std::size_t>(c.b.cols + c.F.cols) * sizeof(*c.b.data);
    return bytes;
}

template <class T>
struct DecodeScratch {  // one token's activations; rows of four where the convolution needs its past
    using A = acc_t<T>;
    Vec<std::int32_t> token;
    Mat<T> x, spectral, n, mixed, rotated, o, mid, h, logits;
    Vec<A> rstd;
    Mat<A> aux, a, b;
};

// Memory of a decoder: caches and scratch, in an arena of its own.
template <class T>
struct DecodeLayout {
    std::vector<LayerCache<T>> layer;
    DecodeScratch<T> scratch;
    // by_runs: of each layer, whether runs are its cache, which then has room for one token.
    DecodeLayout(Arena&, const ModelSpec&, const std::vector<bool>& by_runs, std::int64_t capacity);
};

template <class Dev, class T>
class ModelDecoder final : public Decoder {
  public:
    using A = acc_t<T>;
    // Prefill runs the model over chunks of its own activations: model, its batch memory and dev outlive the decoder.
    ModelDecoder(const Dev&, Model<Dev, T>& model, const ParamBlock<T>&, std::int64_t capacity,
                 std::function<DeviceBatch(const std::vector<std::int32_t>&)> upload, std::int64_t longest_prefill);
    void prefill(const std::vector<std::int32_t>& tokens) override;
    void append(std::int32_t token) override;
    const std::vector<float>& logits() const override { return logits_; }
    std::int64_t length() const override { return length_; }
    std::size_t cache_bytes_per_token() const override;

  private:
    void clear();
    void copy_layer(int l, std::int64_t tokens);
    void append_layer(int l);
    void attend(int l, const LayerWeights<T>&);
    Vec<const A> scalars_of_token(int l, const LayerWeights<T>&, const Mat<T>& q, const Mat<T>& k);
    void attend_by_runs(int l, const Vec<const A>& query);
    void append_to_runs(int l, const Mat<const T>& v, const Mat<const A>& b, const Mat<const A>& F);
    bool by_runs(int l) const { return by_runs_[static_cast<std::size_t>(l)]; }
    std::int64_t place(int l) const { return by_runs(l) ? 0 : length_; }  // of the new token in the layer's cache
    void read_logits(const Mat<const T>&);

    const Dev& dev_;
    Model<Dev, T>& model_;
    ParamBlock<T> params_;
    std::int64_t capacity_, length_ = 0, longest_prefill_;
    std::function<DeviceBatch(const std::vector<std::int32_t>&)> upload_;
    Arena arena_;
    std::vector<bool> by_runs_;
    std::unique_ptr<DecodeLayout<T>> layout_;
    std::vector<std::vector<AttentionRuns<A>>> runs_;  // of each layer, each head's; empty where not by runs
    std::vector<float> logits_;
};

}  // namespace fiedler
