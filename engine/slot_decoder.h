// engine/slot_decoder.h: BatchDecoder on one device in one precision, and its memory.
//
// A prompt's last token is the first that a step takes; those before go through the model's own forward pass, several
// prompts at once where they are packed, and from there into the caches of their slots. Every step is the same work,
// launch for launch: what differs (tokens, lengths, who is idle) is in device memory, so that on CUDA one recording of it
// serves all. The next tokens are chosen on the device; the host reads them while the step after is on its way.
//
// Layers with one scalar attend to every key: the sorted runs of engine/decode.h are for one long sequence.
#pragma once
#include <memory>

#include "engine/batch_decoder.h"
#include "engine/runner.h"
#include "kernels/sample.h"

namespace fiedler {

template <class T>
struct SlotCache {
    using A = acc_t<T>;
    Mat<T> v, k;     // [slots capacity, C]; k: dot layers
    Mat<A> b, F;     // [slots capacity, H R], [slots capacity, H]
    Mat<T> past;     // [3 slots, columns]: rows before the convolution
    Mat<A> scalars;  // [3 slots, 2 H R]
    Mat<A> carry;    // [slots, H]: the gate's sum so far
};

template <class T>
struct SlotScratch {  // a row a slot
    using A = acc_t<T>;
    Mat<T> x, spectral, n, projected, mixed, rotated, o, mid, h, logits;
    Vec<A> rstd, partial;
    Mat<A> aux;
    Vec<A> a, b;  // [slots, H R] of the layer at hand
};

// Prompts on their way through the forward pass: arrays of one block, which the host fills in one copy.
struct PrefillArrays {
    static constexpr int kCount = 7;
    std::int64_t stride = 0;
    std::int32_t* data = nullptr;
    std::int32_t* inputs() const { return data; }
    std::int32_t* begin() const { return data + stride; }
    std::int32_t* end() const { return data + 2 * stride; }
    std::int32_t* offsets() const { return data + 3 * stride; }
    std::int32_t* row() const { return data + 4 * stride; }    // of the caches; -1: of no prompt
    std::int32_t* past() const { return data + 5 * stride; }   // of SlotCache::past; -1: none of a prompt's last three
    std::int32_t* carry() const { return data + 6 * stride; }  // of SlotCache::carry; -1: not a prompt's last
};

template <class T>
struct SlotLayout {
    std::vector<SlotCache<T>> layer;
    SlotScratch<T> scratch;
    Slots slots;
    Vec<std::int32_t> sampled;
    PrefillArrays prefill;
    SlotLayout(Arena&, const ModelSpec&, std::int64_t slots, std::int64_t capacity, std::int64_t prefill_tokens);
};

template <class Dev, class T>
class SlotDecoder final : public BatchDecoder {
  public:
    using A = acc_t<T>;
    // dev, model and its activations outlive the decoder. budget: of its arena; 0: none.
    SlotDecoder(const Dev& dev, Model<Dev, T>& model, const ParamBlock<T>& params, const BatchDecoderOptions&,
                std::size_t budget);
    ~SlotDecoder() override;

    std::int64_t slots() const override { return slots_; }
    std::int64_t capacity() const override { return options_.capacity; }
    std::size_t bytes() const override { return arena_.peak(); }
    std::size_t cache_bytes_per_token() const override;
    std::int64_t replayed_steps() const override { return replayed_; }
    std::int64_t step_bytes(std::int64_t length) const override;
    void start(const std::vector<SlotStart>&) override;
    void submit_step() override;
    const std::vector<std::int32_t>& finish_step() override;
    std::vector<float> logits(std::int64_t slot) override;

  private:
    // Prompts of one forward pass, and the row at which each begins.
    struct Pass {
        std::vector<const SlotStart*> prompt;
        std::vector<std::int64_t> first;
        std::int64_t rows = 0;
    };
    void check_start(const SlotStart&) const;
    void prefill(const Pass&);
    void copy_layer(int l);
    void clear_slot(const SlotStart&);
    void run_step();
    void run_layer(int l);
    void embed();
    void attend(int l, const LayerWeights<T>&);
    void energies(int l, const LayerWeights<T>&, const Mat<T>& q, const Mat<T>& k);
    // [residual +] x w', relu_squared: the MLP's hidden values
    void product(const Mat<T>& y, const Mat<const T>& x, const Mat<const T>& w, const Mat<const T>& residual = {},
                 bool relu_squared = false);
    const LayerSpec& layer_spec(int l) const { return model_.spec().layer[static_cast<std::size_t>(l)]; }
    SlotCache<T>& cache(int l) { return layout_->layer[static_cast<std::size_t>(l)]; }

    const Dev& dev_;
    Model<Dev, T>& model_;
    ParamBlock<T> params_;
    BatchDecoderOptions options_;
    std::int64_t slots_ = 0, prefill_tokens_ = 0;
    bool packs_ = false;
    Arena arena_;
    std::unique_ptr<SlotLayout<T>> layout_;
    std::unique_ptr<HostMemory<Dev>> host_;  // kStepsInFlight rows of sampled tokens
    std::vector<std::int32_t> tokens_;
    std::vector<std::int32_t> staged_;  // PrefillArrays of the pass at hand
    std::int64_t submitted_ = 0, finished_ = 0, replayed_ = 0;
    std::int64_t pass_rows_ = 0;
    std::unique_ptr<CudaGraph, FreeGraph> graph_;
};

}  // namespace fiedler
