// kernels/gate.h: the forget gate (Forgetting Transformer, Lin et al. 2025): log-sigmoid, summed up over time.
//
//   forward    f_ih = logsigmoid(z_ih + bias_h)         F_ih = carry_h + sum_{j = begin(i)..i} f_jh
//   backward   g_ih = sum_{j = i..end(i)-1} dF_jh       dz_ih = g_ih sigmoid(-(z_ih + bias_h))
//              dbias_h += sum_i dz_ih
//
// A is float or double. logsigmoid(u) = min(u, 0) - log1p(exp(-|u|)): no overflow for any finite u.
//
// Shapes     z, F, dF: [tokens, heads] A (z with its own ld, F and dF contiguous or not); bias, dbias, carry: [heads] A
//            dz: [tokens, heads] T, any ld: T is the storage type of the gradient of n Wf (bf16 on Cuda)
// Writes     F, dz overwritten; dbias accumulated (+=). carry (optional, one sequence only) is read, then replaced by
//            the last token's F, so that decoding token by token continues a sequence.
// Scratch    on Cuda, backward: gate_pending_elements(tokens, seq.count, heads) floats at most, 8-byte aligned, of
//            `pending` if given, else of scratch; forward of long sequences: dev.workspace, if it has room (gate.cu)
// Numerics   sums restart in each sequence; fixed order, bit-equal from run to run. On Cuda the relative error of logsigmoid(u)
//            is at most 2^-21 + max(u, 0) 2^-23, up to u = 126 ln 2; from there on logsigmoid(u) is 0.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/pending_sums.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class A>
struct GateForward {
    Mat<A> F;
    Mat<const A> z;
    Vec<const A> bias;
    Packed seq;
    Vec<A> carry;  // optional
};

template <class T>
struct GateBackward {
    Mat<T> dz;
    Vec<acc_t<T>> dbias;
    Mat<const acc_t<T>> dF, z;
    Vec<const acc_t<T>> bias;
    Packed seq;
    Vec<acc_t<T>> scratch;  // Cuda only
    // Cuda only: if given, sums over blocks lie there until finish_sums(), and scratch is not used.
    PendingSums<acc_t<T>>* pending = nullptr;
};

template <class A>
void check(const GateForward<A>& p) {
    FIEDLER_REQUIRE("gate", is_shape(p.z, p.z.rows, p.bias.size) && is_shape(p.F, p.z.rows, p.bias.size));
    FIEDLER_REQUIRE("gate", is_packing(p.seq, p.z.rows));
    FIEDLER_REQUIRE("gate", !p.carry || (p.carry.size == p.bias.size && p.seq.count == 1));
}
template <class T>
void check(const GateBackward<T>& p) {
    FIEDLER_REQUIRE("gate", is_shape(p.z, p.z.rows, p.bias.size) && is_shape(p.dF, p.z.rows, p.bias.size));
    FIEDLER_REQUIRE("gate", is_shape(p.dz, p.z.rows, p.bias.size) && is_shape(p.dbias, p.bias.size));
    FIEDLER_REQUIRE("gate", is_packing(p.seq, p.z.rows));
}

template <class A>
Traffic traffic(const GateForward<A>& p) {
    const double n = double(p.z.rows) * double(p.z.cols);
    return {2 * n * sizeof(A), 6 * n};
}
template <class T>
Traffic traffic(const GateBackward<T>& p) {
    const double n = double(p.z.rows) * double(p.z.cols);
    return {n * (2 * sizeof(acc_t<T>) + sizeof(T)), 6 * n};
}

// Tokens of the chunks that long sequences are cut into on Cuda, if they have kGateLong: a chunk has its share of dbias,
// and says in two numbers what it adds up to.
inline constexpr std::int64_t kGateChunk = 2048, kGateLong = 4 * kGateChunk;
inline std::int64_t gate_pending_elements(std::int64_t tokens, std::int64_t sequences, std::int64_t heads) {
    const std::int64_t cut = 4 * tokens / kGateChunk;  // three for each chunk, of which a last one may be short
    return PendingSums<float>::elements((sequences > cut ? sequences : cut) * heads);
}

template <class A>  // float, double
void gate_forward(const Cpu&, const GateForward<A>&);
template <class T>
void gate_backward(const Cpu&, const GateBackward<T>&);
void gate_forward(const Cuda&, const GateForward<float>&);
void gate_backward(const Cuda&, const GateBackward<bf16>&);

}  // namespace fiedler
