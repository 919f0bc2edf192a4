// infer/session.h: one sequence on the CPU: its cache, and the forward pass for the tokens that are new. A prompt goes
// through in pieces of `batch` tokens, decoding one at a time; both run the same code. Order of work: DESIGN 1.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "infer/model.h"
#include "kernels/quantised.h"
#include "kernels/recall.h"

namespace fiedler {

// What the cache keeps of a token. compact: values f32, scalars and gate f16. int8: values (and keys of dot products)
// int8 with an f16 scale for each head, scalars and gate f16. exact: everything f32.
enum class CacheKind { compact, exact, int8 };
const char* name_of(CacheKind);
// Bytes of a token in all layers, and what a key-value cache would keep with values of the same type.
struct CacheBytes {
    std::size_t ours = 0, key_value = 0;
};
CacheBytes cache_bytes(const ModelSpec&, CacheKind);

struct SessionOptions {
    int threads = 1;  // 0: all
    CacheKind cache = CacheKind::compact;
    std::int64_t capacity = 0;  // tokens at most; 0: the context of the training
    std::int64_t batch = 64;
    bool plain_loops = false;  // unquantised products as plain loops: what the others are measured against
};

class Session {
  public:
    Session(const InferModel&, const SessionOptions&);  // the model outlives it
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    void reset() { length_ = 0; }
    // Appends tokens; the logits are those after the last. InputError: no token, one outside the vocabulary, no room.
    void feed(std::span<const std::int32_t> tokens);
    const std::vector<float>& logits() const { return logits_; }
    std::int64_t length() const { return length_; }
    // Sum of the losses of targets >= 0 of one sequence from its beginning (the session is reset first).
    double loss_sum(std::span<const std::int32_t> tokens, std::span<const std::int32_t> targets);

    const InferModel& model() const { return model_; }
    const SessionOptions& options() const { return options_; }
    std::size_t memory_bytes() const;  // cache and scratch

  private:
    struct LayerState {
        std::vector<std::byte> keys, gate, values;
        std::vector<std::uint16_t> key_scales, value_scales;
        std::vector<float> rows, scalar_rows;  // what the convolutions look at: three old rows, then the new ones
    };
    void check(std::span<const std::int32_t> tokens) const;
    void make_room(std::int64_t tokens);
    void forward(std::span<const std::int32_t> tokens);
    void embed(std::span<const std::int32_t> tokens);
    void norm(const Mat<float>& x, const Mat<float>& y);
    void product(const InferMatrix&, const Mat<const float>& x, const Mat<float>& y,
                 const Mat<const float>& residual = {}, bool relu_squared = false);
    void attention(std::size_t l, std::int64_t n);
    void scalars(std::size_t l, std::int64_t n, const Mat<float>& mixed);
    void gate(const InferLayer&, std::int64_t n);
    Mat<float> convolve(const std::vector<float>& taps, std::vector<float>& rows, std::int64_t columns, std::int64_t n,
                        std::vector<float>& out);
    RecallCache cache(std::size_t l);
    Mat<float> rows(std::vector<float>& buffer, std::int64_t n, std::int64_t columns) {
        return {buffer.data(), n, columns};
    }

    const InferModel& model_;
    SessionOptions options_;
    Cpu dev_;
    std::int64_t length_ = 0, room_ = 0;  // tokens in the cache, and those it has memory for
    std::vector<LayerState> state_;
    QuantTokens quant_;
    std::vector<float> x_, n_, mid_, hidden_, mixed_, rotated_, aux_, aux_mixed_, a_, b_, gate_, o_, spectral_, rstd_;
    std::vector<float> logits_, all_logits_;
};

}  // namespace fiedler
