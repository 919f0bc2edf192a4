// kernels/recall.h: attention of a few new tokens over the cache of a sequence: values and scalars, or values and keys.
// CPU only.
//
//   distance  s_ij = - sum_r |a_i^r - b_j^r| + sum_{t = j + 1..i} f_t      f: the gate's logsigmoid of each token
//   product   s_ij = scale sum_d q_i^d k_j^d
//   o_i = sum_j p_ij v_j,  p = softmax over the visible j: j <= i, and j > i - window with a window
//
// The gate is cached as f_t and not as its sum over time: 16 bits keep its precision whatever the length, and sums are
// taken anew from the newest token back.
//
// Layout     One plane for each scalar (or key dimension) and one for each head's gate, contiguous over time, so that the
//            scores of neighbouring tokens are computed side by side; values head by head, so that each is one stream.
//              keys   [heads R][capacity] f32 or f16, or int8 with a scale of f16 for each head and token [heads][capacity]
//              gate   [heads][capacity]   f32 or f16; absent: no gate
//              values [heads][capacity][D] f32, or int8 with scales [heads][capacity] of f16
// Shapes     o: [queries, heads D] f32; a: [queries, heads R] f32; D a multiple of 16. The queries are the tokens at
//            positions first to first + queries - 1, whose own keys, gate and values are in the cache
// Writes     o overwritten
// Numerics   f32; the largest score is subtracted. An output does not depend on the threads, and on the number of queries
//            in its rounding only: the gate is summed from the newest query of a group.
// Traffic    the visible part of the cache once for each group of kQueries queries
// Files      recall_cpu.cpp: plain loops in float and double, and storing into a cache; recall_simd.cpp: Highway
#pragma once
#include <cstddef>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"

namespace fiedler {

enum class CacheType { f32, f16, int8 };
constexpr std::size_t bytes_of(CacheType t) { return t == CacheType::f32 ? 4 : t == CacheType::f16 ? 2 : 1; }

struct RecallCache {
    std::int64_t capacity = 0;
    std::int32_t heads = 1, scalars = 1, width = 16;  // R (product: D) and D
    CacheType key_type = CacheType::f32, gate_type = CacheType::f32, value_type = CacheType::f32;
    void *keys = nullptr, *gate = nullptr, *values = nullptr;
    std::uint16_t *key_scales = nullptr, *value_scales = nullptr;  // int8 only
};
struct Recall {
    static constexpr int kQueries = 4;  // worked on together
    Mat<float> o;
    Mat<const float> a;
    RecallCache cache;
    std::int64_t first = 0;
    std::int32_t window = 0;  // 0: none
    bool product = false;
    float scale = 1;  // product
};
inline void check(const RecallCache& c) {
    FIEDLER_REQUIRE("recall", c.keys && c.values && c.heads > 0 && c.scalars > 0 && c.width > 0 && c.width % 16 == 0);
    FIEDLER_REQUIRE("recall", c.key_type != CacheType::int8 || c.key_scales);
    FIEDLER_REQUIRE("recall", c.value_type != CacheType::f16 && (c.value_type == CacheType::f32 || c.value_scales));
    FIEDLER_REQUIRE("recall", c.gate_type != CacheType::int8);
}
inline void check(const Recall& p) {
    check(p.cache);
    FIEDLER_REQUIRE("recall", is_shape(p.o, p.o.rows, std::int64_t(p.cache.heads) * p.cache.width));
    FIEDLER_REQUIRE("recall", is_shape(p.a, p.o.rows, std::int64_t(p.cache.heads) * p.cache.scalars));
    FIEDLER_REQUIRE("recall", p.first >= 0 && p.first + p.o.rows <= p.cache.capacity && p.window >= 0);
    FIEDLER_REQUIRE("recall", !p.product || (p.cache.scalars == p.cache.width && !p.cache.gate));
}
inline Traffic traffic(const Recall& p) {
    const RecallCache& c = p.cache;
    double pairs = 0;
    for (std::int64_t i = p.first; i < p.first + p.o.rows; ++i)
        pairs += double(p.window > 0 && i + 1 > p.window ? p.window : i + 1);
    const double tokens = double(p.first + p.o.rows), key = double(c.scalars) * double(bytes_of(c.key_type)),
                 value = double(c.width) * double(bytes_of(c.value_type));
    return {tokens * c.heads * (key + value + (c.gate ? double(bytes_of(c.gate_type)) : 0)) +
                8.0 * double(p.o.rows) * c.heads * (c.width + c.scalars),
            pairs * c.heads * (2.0 * c.width + 3.0 * c.scalars)};
}
void recall(const Cpu&, const Recall&);
// The same as plain loops. A: float or double.
template <class A>
void recall_reference(const Recall&, const Mat<A>& o);

// What a token leaves behind, at `position`: keys [heads R], gate [heads] (f; ignored without one), values [heads D].
void remember(const RecallCache&, std::int64_t position, const float* keys, const float* gate, const float* values);

}  // namespace fiedler
