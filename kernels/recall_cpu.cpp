// kernels/recall_cpu.cpp: storing into the cache, and attention over it as plain loops (contract in recall.h).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/half.h"
#include "kernels/recall.h"

namespace fiedler {

namespace {

void store(void* plane, CacheType type, std::int64_t at, float value) {
    if (type == CacheType::f32)
        static_cast<float*>(plane)[at] = value;
    else
        static_cast<std::uint16_t*>(plane)[at] = float_to_half(value);
}
float load(const void* plane, CacheType type, std::int64_t at) {
    if (type == CacheType::f32) return static_cast<const float*>(plane)[at];
    if (type == CacheType::f16) return half_to_float(static_cast<const std::uint16_t*>(plane)[at]);
    return static_cast<const std::int8_t*>(plane)[at];
}
// count values as int8 at every `stride`, and their scale.
std::uint16_t store_bytes(std::int8_t* out, std::int64_t stride, const float* x, std::int64_t count) {
    float most = 0;
    for (std::int64_t i = 0; i < count; ++i) most = std::max(most, std::abs(x[i]));
    const std::uint16_t scale = float_to_half(most / 127);
    const float inverse = half_to_float(scale) > 0 ? 1 / half_to_float(scale) : 0;
    for (std::int64_t i = 0; i < count; ++i)
        out[i * stride] = static_cast<std::int8_t>(std::clamp(std::nearbyint(x[i] * inverse), -127.f, 127.f));
    return scale;
}

template <class A>
struct Reader {
    const RecallCache& c;
    A key(std::int64_t j, std::int32_t h, std::int32_t r) const {
        const A value = A(load(c.keys, c.key_type, (std::int64_t(h) * c.scalars + r) * c.capacity + j));
        return c.key_type == CacheType::int8 ? value * A(half_to_float(c.key_scales[h * c.capacity + j])) : value;
    }
    A gate(std::int64_t j, std::int32_t h) const { return A(load(c.gate, c.gate_type, h * c.capacity + j)); }
    A value(std::int64_t j, std::int32_t h, std::int32_t d) const {
        const A value = A(load(c.values, c.value_type, (h * c.capacity + j) * c.width + d));
        return c.value_type == CacheType::int8 ? value * A(half_to_float(c.value_scales[h * c.capacity + j])) : value;
    }
};

template <class A>
void query(const Recall& p, std::int64_t m, std::int32_t h, A* o) {
    const RecallCache& c = p.cache;
    const Reader<A> read{c};
    const std::int64_t i = p.first + m, begin = p.window > 0 ? std::max<std::int64_t>(0, i + 1 - p.window) : 0;
    const float* a = p.a.row(m) + std::int64_t(h) * c.scalars;
    std::vector<A> s(static_cast<std::size_t>(i + 1));
    A gate = 0, top = -std::numeric_limits<A>::infinity(), total = 0;
    for (std::int64_t j = i; j >= begin; --j) {
        A score = 0;
        for (std::int32_t r = 0; r < c.scalars; ++r)
            score += p.product ? A(a[r]) * read.key(j, h, r) : -std::abs(A(a[r]) - read.key(j, h, r));
        s[static_cast<std::size_t>(j)] = p.product ? score * A(p.scale) : score + gate;
        if (c.gate) gate += read.gate(j, h);
        top = std::max(top, s[static_cast<std::size_t>(j)]);
    }
    std::fill(o, o + c.width, A(0));
    for (std::int64_t j = begin; j <= i; ++j) {
        const A weight = std::exp(s[static_cast<std::size_t>(j)] - top);
        total += weight;
        for (std::int32_t d = 0; d < c.width; ++d) o[d] += weight * read.value(j, h, d);
    }
    for (std::int32_t d = 0; d < c.width; ++d) o[d] /= total;
}

}  // namespace

void remember(const RecallCache& c, std::int64_t position, const float* keys, const float* gate, const float* values) {
    FIEDLER_REQUIRE("recall", position >= 0 && position < c.capacity);
    for (std::int32_t h = 0; h < c.heads; ++h) {
        const float *key = keys + std::int64_t(h) * c.scalars, *value = values + std::int64_t(h) * c.width;
        const std::int64_t plane = std::int64_t(h) * c.scalars * c.capacity + position;
        if (c.key_type == CacheType::int8)
            c.key_scales[h * c.capacity + position] =
                store_bytes(static_cast<std::int8_t*>(c.keys) + plane, c.capacity, key, c.scalars);
        else
            for (std::int32_t r = 0; r < c.scalars; ++r) store(c.keys, c.key_type, plane + r * c.capacity, key[r]);
        if (c.gate) store(c.gate, c.gate_type, h * c.capacity + position, gate[h]);
        const std::int64_t row = h * c.capacity + position;
        if (c.value_type == CacheType::int8)
            c.value_scales[row] = store_bytes(static_cast<std::int8_t*>(c.values) + row * c.width, 1, value, c.width);
        else
            std::copy(value, value + c.width, static_cast<float*>(c.values) + row * c.width);
    }
}

template <class A>
void recall_reference(const Recall& p, const Mat<A>& o) {
    check(p);
    FIEDLER_REQUIRE("recall", is_shape(o, p.o.rows, p.o.cols));
    for (std::int64_t m = 0; m < o.rows; ++m)
        for (std::int32_t h = 0; h < p.cache.heads; ++h) query(p, m, h, o.row(m) + std::int64_t(h) * p.cache.width);
}
template void recall_reference(const Recall&, const Mat<float>&);
template void recall_reference(const Recall&, const Mat<double>&);

}  // namespace fiedler
