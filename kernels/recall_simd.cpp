// kernels/recall_simd.cpp: attention over a cache (contract in recall.h), one source for every instruction set.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/half.h"
#include "kernels/parallel.h"
#include "kernels/recall.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/recall_simd.cpp"
#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
// clang-format off
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace fiedler::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::CappedTag<float, 16>;
using VF = hn::Vec<DF>;
constexpr std::int64_t kLanes = static_cast<std::int64_t>(hn::MaxLanes(DF()));
constexpr int kQueries = Recall::kQueries;

// Elements of a plane or of values as f32; whole vectors, of any alignment.
HWY_INLINE VF load(const float* p) { return hn::LoadU(DF(), p); }
HWY_INLINE VF load(const hwy::float16_t* p) {
    const hn::Rebind<hwy::float16_t, DF> d;
    return hn::PromoteTo(DF(), hn::LoadU(d, p));
}
HWY_INLINE VF load(const std::int8_t* p) {
    const hn::Rebind<std::int8_t, DF> d;
    const hn::Rebind<std::int32_t, DF> di;
    return hn::ConvertTo(DF(), hn::PromoteTo(di, hn::LoadU(d, p)));
}

// Scratch of a thread: scores of the queries, and the gate's sums. Rows have room for a whole vector at the end.
struct Scratch {
    std::vector<float> score[kQueries], gate;
    std::int64_t length = 0;
    void resize(std::int64_t n) {
        length = (n + kLanes - 1) / kLanes * kLanes + 16;
        for (auto& s : score) s.resize(static_cast<std::size_t>(length));
        gate.resize(static_cast<std::size_t>(length));
    }
};

// The scores of n queries (rows of a) on the keys [begin, end) of head h, at score[q][j - begin]; beyond end: garbage.
template <bool product, class K>
HWY_INLINE void scores(const Recall& p, std::int32_t h, const float* const* a, int n, std::int64_t begin,
                       std::int64_t end, Scratch& s) {
    const DF df;
    const RecallCache& c = p.cache;
    const K* planes = static_cast<const K*>(c.keys) + std::int64_t(h) * c.scalars * c.capacity;
    const auto* key_scales = reinterpret_cast<const hwy::float16_t*>(c.key_scales) + h * c.capacity;
    // Whole vectors as long as they stay inside the capacity: the rest one by one, through a copy.
    for (std::int64_t j = begin; j < end; j += kLanes) {
        const std::int64_t count = std::min(kLanes, c.capacity - j);
        VF sum[kQueries];
        for (int q = 0; q < n; ++q) sum[q] = hn::Zero(df);
        for (std::int32_t r = 0; r < c.scalars; ++r) {
            const K* from = planes + r * c.capacity + j;
            K rest[16];
            if (count < kLanes) {
                std::fill(rest, rest + 16, K{});
                std::copy(from, from + count, rest);
                from = rest;
            }
            const VF key = load(from);
            for (int q = 0; q < n; ++q) {
                const VF x = hn::Set(df, a[q][r]);
                sum[q] = product ? hn::MulAdd(x, key, sum[q]) : hn::Add(sum[q], hn::Abs(hn::Sub(x, key)));
            }
        }
        VF factor = hn::Set(df, product ? p.scale : -1.f);
        if (sizeof(K) == 1) {
            hwy::float16_t rest[16] = {};
            std::copy(key_scales + j, key_scales + j + count, rest);
            factor = hn::Mul(factor, load(rest));
        }
        const VF gate = c.gate ? hn::LoadU(df, s.gate.data() + (j - begin)) : hn::Zero(df);
        for (int q = 0; q < n; ++q) hn::StoreU(hn::MulAdd(sum[q], factor, gate), df, s.score[q].data() + (j - begin));
    }
}

// Distances between int8 scalars need their scale first: they are never stored so, and only products are.
template <bool product>
HWY_INLINE void scores_of_type(const Recall& p, std::int32_t h, const float* const* a, int n, std::int64_t begin,
                               std::int64_t end, Scratch& s) {
    if (p.cache.key_type == CacheType::f32) return scores<product, float>(p, h, a, n, begin, end, s);
    if (p.cache.key_type == CacheType::f16) return scores<product, hwy::float16_t>(p, h, a, n, begin, end, s);
    scores<product, std::int8_t>(p, h, a, n, begin, end, s);
}

// exp(s - largest) in place over [0, count), zeros up to the next whole vector; returns 1 / sum.
HWY_INLINE float soften(float* s, std::int64_t count) {
    const DF df;
    const std::int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(s + count, s + whole, -std::numeric_limits<float>::infinity());
    VF most = hn::LoadU(df, s);
    for (std::int64_t j = kLanes; j < whole; j += kLanes) most = hn::Max(most, hn::LoadU(df, s + j));
    const VF top = hn::MaxOfLanes(df, most);
    VF total = hn::Zero(df);
    for (std::int64_t j = 0; j < whole; j += kLanes) {
        const VF e = hn::Exp(df, hn::Sub(hn::LoadU(df, s + j), top));
        hn::StoreU(e, df, s + j);
        total = hn::Add(total, e);
    }
    std::fill(s + count, s + whole, 0.f);
    return 1 / hn::GetLane(hn::SumOfLanes(df, total));
}

// o_q = scale_q sum_j p_qj v_j over kWide vectors of columns from `column` on.
template <int kWide, int kCount, class V>
HWY_INLINE void weigh(const Recall& p, std::int32_t h, std::int64_t column, std::int64_t begin, std::int64_t end,
                      const Scratch& s, const float* scale, float* const* o) {
    const DF df;
    const RecallCache& c = p.cache;
    const V* v = static_cast<const V*>(c.values) + (h * c.capacity + begin) * c.width + column;
    const std::uint16_t* value_scale = c.value_scales + h * c.capacity + begin;
    VF sum[kCount][kWide];
    for (int q = 0; q < kCount; ++q)
        for (int w = 0; w < kWide; ++w) sum[q][w] = hn::Zero(df);
    for (std::int64_t j = 0; j < end - begin; ++j, v += c.width) {
        const float of_row = sizeof(V) == 1 ? half_to_float(value_scale[j]) : 1.f;
        VF row[kWide];
        for (int w = 0; w < kWide; ++w) row[w] = load(v + w * kLanes);
        for (int q = 0; q < kCount; ++q) {
            const VF weight = hn::Set(df, s.score[q][static_cast<std::size_t>(j)] * of_row);
            for (int w = 0; w < kWide; ++w) sum[q][w] = hn::MulAdd(weight, row[w], sum[q][w]);
        }
    }
    for (int q = 0; q < kCount; ++q)
        for (int w = 0; w < kWide; ++w)
            hn::StoreU(hn::Mul(sum[q][w], hn::Set(df, scale[q])), df, o[q] + column + w * kLanes);
}
template <int kCount, class V>
HWY_INLINE void weigh_columns(const Recall& p, std::int32_t h, std::int64_t begin, std::int64_t end, const Scratch& s,
                              const float* scale, float* const* o) {
    std::int64_t column = 0;
    for (; column + 4 * kLanes <= p.cache.width; column += 4 * kLanes)
        weigh<4, kCount, V>(p, h, column, begin, end, s, scale, o);
    for (; column < p.cache.width; column += kLanes) weigh<1, kCount, V>(p, h, column, begin, end, s, scale, o);
}

// Sums of f from after j up to the newest, at [j - begin]; what lies after an older query is the same for all its keys.
HWY_INLINE void gate_sums(const RecallCache& c, std::int32_t h, std::int64_t begin, std::int64_t newest, float* sums) {
    const DF df;
    const std::int64_t count = newest + 1 - begin;
    if (c.gate_type == CacheType::f32) {
        std::copy_n(static_cast<const float*>(c.gate) + h * c.capacity + begin, count, sums);
    } else {
        const auto* from = static_cast<const hwy::float16_t*>(c.gate) + h * c.capacity + begin;
        std::int64_t j = 0;
        for (; j + kLanes <= count; j += kLanes) hn::StoreU(load(from + j), df, sums + j);
        hwy::float16_t rest[16] = {};
        std::copy_n(from + j, count - j, rest);
        hn::StoreU(load(rest), df, sums + j);
    }
    float sum = 0;
    for (std::int64_t j = count; j-- > 0;) sum += std::exchange(sums[j], sum);
}

// kCount queries from m on, head h.
template <int kCount>
HWY_INLINE void tile(const Recall& p, std::int32_t h, std::int64_t m) {
    static thread_local Scratch s;
    const RecallCache& c = p.cache;
    const std::int64_t oldest = p.first + m, newest = oldest + kCount - 1;
    const std::int64_t begin = p.window > 0 ? std::max<std::int64_t>(0, oldest + 1 - p.window) : 0, end = newest + 1;
    s.resize(end - begin);
    const float* a[kQueries];
    float* o[kQueries];
    for (int q = 0; q < kCount; ++q) {
        a[q] = p.a.row(m + q) + std::int64_t(h) * c.scalars;
        o[q] = p.o.row(m + q) + std::int64_t(h) * c.width;
    }
    if (c.gate) gate_sums(c, h, begin, newest, s.gate.data());
    if (p.product)
        scores_of_type<true>(p, h, a, kCount, begin, end, s);
    else
        scores_of_type<false>(p, h, a, kCount, begin, end, s);
    float scale[kQueries];
    for (int q = 0; q < kCount; ++q) {
        float* score = s.score[q].data();
        const std::int64_t seen = oldest + q + 1 - begin,
                           hidden = p.window > 0 ? std::max<std::int64_t>(0, seen - p.window) : 0;
        std::fill(score, score + hidden, -std::numeric_limits<float>::infinity());
        scale[q] = soften(score, seen);
        std::fill(score + seen, score + (end - begin), 0.f);
    }
    if (c.value_type == CacheType::f32)
        weigh_columns<kCount, float>(p, h, begin, end, s, scale, o);
    else
        weigh_columns<kCount, std::int8_t>(p, h, begin, end, s, scale, o);
}
void recall_tile(const Recall& p, std::int32_t h, std::int64_t m, bool full) {
    full ? tile<kQueries>(p, h, m) : tile<1>(p, h, m);
}

}  // namespace
}  // namespace fiedler::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fiedler {

HWY_EXPORT(recall_tile);

void recall(const Cpu& dev, const Recall& p) {
    check(p);
    FIEDLER_REQUIRE("recall", p.product || p.cache.key_type != CacheType::int8);
    const std::int64_t queries = p.o.rows, full = queries / Recall::kQueries, tiles = full + queries % Recall::kQueries;
    const Cpu used = p.first + queries < 64 ? Cpu{1} : dev;  // too little for several threads
    parallel_for_uneven(used, tiles * p.cache.heads, [&](std::int64_t i) {
        const std::int64_t t = i / p.cache.heads;
        const std::int64_t m = t < full ? t * Recall::kQueries : full * Recall::kQueries + (t - full);
        HWY_DYNAMIC_DISPATCH(recall_tile)(p, static_cast<std::int32_t>(i % p.cache.heads), m, t < full);
    });
}

}  // namespace fiedler
#endif  // HWY_ONCE
