// kernels/packed.h: sequences packed on one token axis, without padding.
//
// tokens tokens in all, cut into count sequences; sequence s is [offsets[s], offsets[s + 1]). Every kernel that looks
// along time (conv, coordinate, gate, attention, dot, rotary) takes a Packed and never lets one sequence see another.
//
//   uniform   length > 0: count = tokens / length sequences of that length (tokens % length == 0); no pointers.
//   ragged    length == 0: offsets[count + 1], begin[tokens] and end[tokens] are given, in the kernel's memory (device
//             memory for Cuda, host memory for Cpu). begin[i] and end[i] are the first and one-past-last token of the
//             sequence that holds token i: offsets spread over the tokens, so that a tile of tokens needs no search.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FIEDLER_HD __host__ __device__
#else
#define FIEDLER_HD
#endif

namespace fiedler {

struct Packed {
    std::int32_t tokens = 0;
    std::int32_t count = 0;
    std::int32_t length = 0;
    const std::int32_t* offsets = nullptr;
    const std::int32_t* begin = nullptr;
    const std::int32_t* end = nullptr;

    static Packed uniform(std::int32_t count, std::int32_t length) {
        Packed p;
        p.tokens = count * length;
        p.count = count;
        p.length = length;
        return p;
    }
    FIEDLER_HD std::int32_t first(std::int32_t token) const {
        return length > 0 ? token / length * length : begin[token];
    }
    FIEDLER_HD std::int32_t last(std::int32_t token) const {
        return length > 0 ? (token / length + 1) * length : end[token];
    }
    FIEDLER_HD std::int32_t sequence_begin(std::int32_t s) const { return length > 0 ? s * length : offsets[s]; }
    FIEDLER_HD std::int32_t sequence_end(std::int32_t s) const {
        return length > 0 ? (s + 1) * length : offsets[s + 1];
    }
};

}  // namespace fiedler
