// kernels/vector_math.h: exp, log and the like of many values on the CPU, to the same bits wherever the values lie.
//
// Eigen's vector exp differs from its scalar exp in the last bit, and in memory of unknown alignment or length it
// computes what precedes an aligned address, and the tail, one by one. So values pass through a Chunk: aligned, of fixed
// size, whole vectors only. An unfilled rest is computed too and dropped.
#pragma once
#include <Eigen/Core>
#include <cstdint>
#include <cstring>

namespace fiedler {

constexpr int kChunk = 64;
template <class T, int size = kChunk>
using Chunk = Eigen::Array<T, size, 1>;

// The first count elements from memory, the others `rest`.
template <int size = kChunk, class T>
Chunk<T, size> load_chunk(const T* from, std::int64_t count, T rest) {
    Chunk<T, size> chunk = Chunk<T, size>::Constant(rest);
    std::memcpy(chunk.data(), from, static_cast<std::size_t>(count) * sizeof(T));
    return chunk;
}
template <class T, int size>
void store_chunk(T* to, std::int64_t count, const Eigen::Array<T, size, 1>& chunk) {
    std::memcpy(to, chunk.data(), static_cast<std::size_t>(count) * sizeof(T));
}

}  // namespace fiedler
