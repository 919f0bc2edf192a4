// kernels/sample.h: the next token of each of S sequences from its logits, and the step onwards: nothing comes to the host.
//
// Of a slot that is not idle (kernels/slots.h), with z its row of logits, rounded to f32:
//   greedy (inverse_temperature 0)  the token of the largest z; of equals the lowest
//   else   order     tokens by z, the largest first; of equals the lowest
//          weight    w_i = exp((z_i - max z) inverse_temperature) as a whole number of 2^-38, to nearest
//          kept      the first top_k of the order (0: all); of these the shortest beginning whose weights reach top_p of
//                    the sum (1: all)
//          draw      the first kept token i, by number, whose w_0 + ... + w_i, of the kept, exceeds floor(r W / 2^64):
//                    W the sum of the kept, r = rng::bits(seed, "sample", length + 1), 64 bits
// A NaN counts as -inf; without any weight (all -inf, or an infinity) the greedy token is taken.
// engine/sampling.h keeps the same tokens with the same probabilities and the same random numbers, but with top_k or top_p
// it walks through them in the order, not by number: another token for the same number, from the same distribution.
// Without them the tokens are the same but for sums that rounding puts on the other side of a number.
//
// Then, t the token:   sampled[s] = t;   t == stop or left[s] == 1:  the slot is idle, length[s] = -1
//                      else  token[s] = t, ++length[s], --begin[s], --left[s]
// Idle slots: sampled[s] = -1.
//
// Shapes     logits: [S, vocab] T, any ld, vocab <= 2^24; sampled: [S]
// Numerics   sums of whole numbers: the choice does not depend on threads or their order. It may differ between devices
//            where their exp does.
#pragma once
#include "kernels/random.h"
#include "kernels/slots.h"

namespace fiedler {

template <class T>
struct Sample {
    Slots slots;
    Vec<std::int32_t> sampled;
    Mat<const T> logits;
    float inverse_temperature = 0;
    std::int64_t top_k = 0;
    double top_p = 1;
    std::int32_t stop = -1;
};

inline constexpr int kSampleWeightBits = 38;  // a sum of 2^24 weights still has 62

template <class T>
void check(const Sample<T>& p) {
    const std::int64_t n = p.slots.count();
    FIEDLER_REQUIRE("sample", is_slots(p.slots) && is_shape(p.sampled, n) && is_shape(p.logits, n, p.logits.cols));
    FIEDLER_REQUIRE("sample", p.logits.cols > 0 && p.logits.cols <= (std::int64_t(1) << 24));
    FIEDLER_REQUIRE("sample", p.inverse_temperature >= 0 && p.top_k >= 0 && p.top_p > 0 && p.top_p <= 1);
}
template <class T>
Traffic traffic(const Sample<T>& p) {
    const double n = double(p.logits.rows) * double(p.logits.cols);
    return {n * sizeof(T), n};
}

template <class T>  // float, double
void sample(const Cpu&, const Sample<T>&);
void sample(const Cuda&, const Sample<bf16>&);

}  // namespace fiedler
