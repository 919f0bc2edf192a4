// kernels/embedding_order.cuh: what embedding_order leaves in memory for embedding_backward (see embedding.h).
#pragma once
#include "kernels/common.cuh"
#include "kernels/embedding.h"

namespace fiedler::embedding {

// The bits of a sum that is not there yet: a NaN that no addition gives.
constexpr unsigned kNothing = 0xffffffffu;
constexpr int kLeastPlaces = kEmbeddingLeastPlaces, kMostPlaces = kEmbeddingMostPlaces;  // of a block

// A run of equal tokens in order: places first .. end - 1.
struct Run {
    int first, end;
    __device__ int length() const { return end - first; }
};

// The scratch memory, each part 256-byte aligned.
struct Parts {
    std::int64_t places, blocks;       // places of a block
    std::int32_t *sorted, *positions;  // [tokens], both in order
    Run* across;  // [blocks]: the run that reaches into a block of places from the one before; else unset
    float* sums;  // [blocks][channels]: kNothing between two calls

    Parts(std::byte* memory, std::int64_t tokens, std::int64_t channels)
        : places(embedding_places(tokens)), blocks(ceil_div(tokens, places)) {
        std::size_t bytes = 0;
        const auto take = [&]<class T>(T*& p, std::int64_t n) {
            p = reinterpret_cast<T*>(memory + bytes);
            bytes += embedding_aligned(n * std::int64_t(sizeof(T)));
        };
        take(sorted, tokens), take(positions, tokens), take(across, blocks), take(sums, blocks * channels);
    }
};

}  // namespace fiedler::embedding
