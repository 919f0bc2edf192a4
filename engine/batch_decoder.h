// engine/batch_decoder.h: many independent sequences decoded at once, each in a slot of its own. A slot whose sequence
// has ended is idle until another begins there: what is in the other slots goes on.
//
// What a sequence becomes does not depend on its neighbours, nor on its slot and when it begins. On the CPU that holds bit
// for bit, whatever the number of slots. On CUDA it holds bit for bit for a given number of slots, as far as cuBLASLt gives
// each row of a product the same bits whatever its place; another number of slots may take another algorithm.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/sampling.h"
#include "kernels/device.h"

namespace fiedler {

struct BatchDecoderOptions {
    std::int64_t slots = 0;      // 0: as many as fit the memory, up to 256 on CUDA and 16 on the CPU
    std::int64_t sequences = 0;  // to be decoded: with slots = 0 no more slots than these; 0: not known
    std::int64_t capacity = 0;   // tokens of a sequence at most, prompt and generated
    std::int32_t stop = -1;      // the token that ends a sequence
    SamplingSettings sampling;   // its seed is not used: each sequence has its own
    bool cuda_graph = true;      // CUDA only: a step is recorded once, and replayed
    // Prompts that begin together share a forward pass. Off on the CPU, where a pass costs by the token and the bits of a
    // row depend on its place in it.
    enum class Packing { automatic, off, on } packing = Packing::automatic;
};

// A sequence that begins.
struct SlotStart {
    std::int64_t slot = 0;
    std::vector<std::int32_t> prompt;  // at least one token, at most the model's context
    std::uint64_t seed = 1;            // with the position it decides each random number, as in engine/sampling.h
    std::int64_t most = 1;             // tokens to generate at most; with the prompt no more than the capacity
};

class BatchDecoder {
  public:
    static constexpr int kStepsInFlight = kMarks;
    static constexpr std::int32_t kNothing = -1;

    virtual ~BatchDecoder() = default;
    virtual std::int64_t slots() const = 0;
    virtual std::int64_t capacity() const = 0;
    virtual std::size_t bytes() const = 0;  // of its arena
    virtual std::size_t cache_bytes_per_token() const = 0;
    virtual std::int64_t replayed_steps() const = 0;  // of the recorded step
    virtual std::int64_t step_bytes(
        std::int64_t length) const = 0;  // read by a step at least, with all slots at this length

    // Sequences in slots that are idle or whose sequence is not wanted any more. The steps that are on their way come
    // first.
    virtual void start(const std::vector<SlotStart>&) = 0;
    // Gives the device one token's work of every slot, without waiting for it (the CPU does it at once). At most
    // kStepsInFlight steps may be unfinished (std::logic_error).
    virtual void submit_step() = 0;
    // Waits for the oldest unfinished step: the token that it gave each slot, which may be the stop token; kNothing for an
    // idle one. A slot is idle after its stop token, and after as many tokens as it was to give.
    virtual const std::vector<std::int32_t>& finish_step() = 0;
    // For tests: logits of the last step of a slot, [vocab]. Waits.
    virtual std::vector<float> logits(std::int64_t slot) = 0;
};

}  // namespace fiedler
