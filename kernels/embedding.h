// kernels/embedding.h: token embedding and its gradient.
//
//   forward    x_i = E[token_i]
//   backward   dE[v] += sum over i with token_i == v of dx_i
//
// Shapes     table E: [vocab, channels] T; dtable: [vocab, channels] acc_t<T>; x, dx: [tokens, channels] T, 16-byte
//            aligned rows on Cuda; tokens: [tokens] int32 in [0, vocab) (the caller's duty; checked on the CPU only)
// Scratch    backward on Cuda puts tokens in order: embedding_scratch_bytes(tokens, channels) bytes, 256-byte aligned
// Writes     x overwritten; dtable accumulated (+=), rows of absent tokens untouched.
// Numerics   each row's sum in acc_t<T>, in a fixed order: bit-equal from run to run (no atomics of floats).
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct EmbeddingForward {
    Mat<T> x;
    Vec<const std::int32_t> tokens;
    Mat<const T> table;
};

template <class T>
struct EmbeddingBackward {
    Mat<acc_t<T>> dtable;
    Vec<const std::int32_t> tokens;
    Mat<const T> dx;
    Vec<std::byte> scratch;  // Cuda only
};

template <class T>
void check(const EmbeddingForward<T>& p) {
    FIEDLER_REQUIRE("embedding", is_shape(p.tokens, p.x.rows) && is_shape(p.table, p.table.rows, p.x.cols));
    FIEDLER_REQUIRE("embedding", is_shape(p.x, p.x.rows, p.x.cols));
}
template <class T>
void check(const EmbeddingBackward<T>& p) {
    FIEDLER_REQUIRE("embedding", is_shape(p.tokens, p.dx.rows) && is_shape(p.dtable, p.dtable.rows, p.dx.cols));
    FIEDLER_REQUIRE("embedding", is_shape(p.dx, p.dx.rows, p.dx.cols));
}

template <class T>
Traffic traffic(const EmbeddingForward<T>& p) {
    return {double(p.x.rows) * (2.0 * double(p.x.cols) * sizeof(T) + 4), 0};
}
template <class T>
Traffic traffic(const EmbeddingBackward<T>& p) {  // as if every token were distinct, capped by the table
    const double n = double(p.dx.rows) * double(p.dx.cols);
    const double rows = double(p.dx.rows < p.dtable.rows ? p.dx.rows : p.dtable.rows);
    return {n * sizeof(T) + 2 * rows * double(p.dx.cols) * sizeof(acc_t<T>) + 4.0 * double(p.dx.rows), n};
}

// Tokens and positions in order; and for each block of so many of them, the run that reaches into it, three counters for
// each 128 channels, and two partial rows of sums.
inline constexpr std::int64_t kEmbeddingPlaces = 64;
inline std::size_t embedding_aligned(std::int64_t bytes) { return (std::size_t(bytes) + 255) / 256 * 256; }
inline std::int64_t embedding_blocks(std::int64_t tokens) { return (tokens + kEmbeddingPlaces - 1) / kEmbeddingPlaces; }
inline std::size_t embedding_scratch_bytes(std::int64_t tokens, std::int64_t channels) {
    const std::int64_t blocks = embedding_blocks(tokens);
    return 2 * embedding_aligned(tokens * 4) + embedding_aligned(blocks * 8) +
           embedding_aligned(3 * blocks * ((channels + 127) / 128) * 4) + embedding_aligned(blocks * 2 * channels * 4);
}

template <class T>  // float, double
void embedding_forward(const Cpu&, const EmbeddingForward<T>&);
template <class T>
void embedding_backward(const Cpu&, const EmbeddingBackward<T>&);
void embedding_forward(const Cuda&, const EmbeddingForward<bf16>&);
void embedding_backward(const Cuda&, const EmbeddingBackward<bf16>&);

}  // namespace fiedler
