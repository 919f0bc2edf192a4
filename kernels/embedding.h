// kernels/embedding.h: token embedding and its gradient.
//
//   forward    x_i = E[token_i]
//   backward   dE[v] += sum over i with token_i == v of dx_i
//
// Shapes     table E: [vocab, channels] T; dtable: [vocab, channels] acc_t<T>; x, dx: [tokens, channels] T, 16-byte
//            aligned rows on Cuda; tokens: [tokens] int32 in [0, vocab) (the caller's duty; checked on the CPU only)
// Order      backward on Cuda adds up tokens in the order that embedding_order has left in `scratch` for the same
//            tokens, vocabulary and channels: embedding_scratch_bytes(tokens, channels) bytes, 256-byte aligned, which
//            nothing else may write in between. That depends on the tokens alone, so it may run any time before, beside
//            other work (branch() of device.h); one order serves any number of backward calls, one after the other. On
//            the CPU there is nothing to do, and no scratch.
// Writes     x overwritten; dtable accumulated (+=), rows of absent tokens untouched.
// Numerics   each row's sum in acc_t<T>, in a fixed order, and one addition to the table: bit-equal from run to run.
//            From sm_90 on the addition is done by the memory, which takes inputs and results below 2^-126 for 0.
#pragma once
#include <algorithm>

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

struct EmbeddingOrder {
    Vec<const std::int32_t> tokens;
    std::int64_t vocab = 0, channels = 0;
    Vec<std::byte> scratch;
};

template <class T>
struct EmbeddingBackward {
    Mat<acc_t<T>> dtable;
    Vec<const std::int32_t> tokens;
    Mat<const T> dx;
    Vec<std::byte> scratch;  // Cuda only: as embedding_order left it
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
// rows: tokens that are different.
template <class T>
Traffic traffic(const EmbeddingBackward<T>& p, std::int64_t rows) {
    const double n = double(p.dx.rows) * double(p.dx.cols);
    return {n * sizeof(T) + 2 * double(rows) * double(p.dx.cols) * sizeof(acc_t<T>) + 4.0 * double(p.dx.rows), n};
}
inline Traffic traffic(const EmbeddingOrder& p) { return {3 * 4.0 * double(p.tokens.size), 0}; }

// Tokens and positions in order; and for each block of places in that order, the run that reaches into it and a row of
// sums. There are about as many blocks as run at once on an H200, or more: the same everywhere, as the order of the
// sums follows from it.
inline constexpr std::int64_t kEmbeddingLeastPlaces = 32, kEmbeddingMostPlaces = 128, kEmbeddingBlocks = 2 * 132;
inline std::int64_t embedding_places(std::int64_t tokens) {  // of a block
    return std::clamp((tokens + kEmbeddingBlocks - 1) / kEmbeddingBlocks, kEmbeddingLeastPlaces, kEmbeddingMostPlaces);
}
inline std::size_t embedding_aligned(std::int64_t bytes) { return (std::size_t(bytes) + 255) / 256 * 256; }
inline std::size_t embedding_scratch_bytes(std::int64_t tokens, std::int64_t channels) {
    const auto blocks_of = [&](std::int64_t places) { return (tokens + places - 1) / places; };
    const std::int64_t blocks =  // at most, also of fewer tokens
        std::min(blocks_of(kEmbeddingLeastPlaces), std::max(blocks_of(kEmbeddingMostPlaces), kEmbeddingBlocks));
    return 2 * embedding_aligned(tokens * 4) + embedding_aligned(blocks * 8) + embedding_aligned(blocks * channels * 4);
}

inline void check(const EmbeddingOrder& p) {
    FIEDLER_REQUIRE("embedding", is_shape(p.tokens, p.tokens.size) && p.vocab >= 0 && p.channels >= 0);
    const std::int64_t bytes = std::int64_t(embedding_scratch_bytes(p.tokens.size, p.channels));
    FIEDLER_REQUIRE("embedding", p.scratch.size >= bytes && (bytes == 0 || p.scratch) &&
                                     reinterpret_cast<std::uintptr_t>(p.scratch.data) % 256 == 0);
}

template <class T>  // float, double
void embedding_forward(const Cpu&, const EmbeddingForward<T>&);
template <class T>
void embedding_backward(const Cpu&, const EmbeddingBackward<T>&);
inline void embedding_order(const Cpu&, const EmbeddingOrder&) {}
void embedding_forward(const Cuda&, const EmbeddingForward<bf16>&);
void embedding_order(const Cuda&, const EmbeddingOrder&);
void embedding_backward(const Cuda&, const EmbeddingBackward<bf16>&);

}  // namespace fiedler
