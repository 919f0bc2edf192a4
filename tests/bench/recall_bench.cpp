// Names: form of the cache, queries over tokens: one token of a decoding, and a piece of a prompt.
#include "kernels/recall.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(recall) {
    constexpr std::int32_t heads = 6, width = 64;
    constexpr std::int64_t capacity = 1024;
    struct Form {
        const char* name;
        std::int32_t scalars;
        CacheType keys, values;
        bool product;
    };
    for (const Form& f : {Form{"s f32", 1, CacheType::f32, CacheType::f32, false},
                          Form{"s f16", 1, CacheType::f16, CacheType::f32, false},
                          Form{"s int8", 1, CacheType::f16, CacheType::int8, false},
                          Form{"b f16", 8, CacheType::f16, CacheType::f32, false},
                          Form{"d f32", 64, CacheType::f32, CacheType::f32, true}}) {
        const auto memory = [&](std::int64_t bytes) { return static_cast<void*>(suite.zeros<float>((bytes + 3) / 4)); };
        const RecallCache cache{.capacity = capacity,
                                .heads = heads,
                                .scalars = f.scalars,
                                .width = width,
                                .key_type = f.keys,
                                .gate_type = CacheType::f16,
                                .value_type = f.values,
                                .keys = memory(capacity * heads * f.scalars * std::int64_t(bytes_of(f.keys))),
                                .gate = f.product ? nullptr : memory(capacity * heads * 2),
                                .values = memory(capacity * heads * width * std::int64_t(bytes_of(f.values))),
                                .key_scales = static_cast<std::uint16_t*>(memory(capacity * heads * 2)),
                                .value_scales = static_cast<std::uint16_t*>(memory(capacity * heads * 2))};
        for (const std::int64_t queries : {1, 64}) {
            const Recall p{
                .o = {suite.zeros<float>(queries * heads * width), queries, heads * width},
                .a = {suite.random<float>(queries * heads * f.scalars), queries, std::int64_t(heads) * f.scalars},
                .cache = cache,
                .first = capacity - queries,
                .window = 0,
                .product = f.product,
                .scale = 0.125f};
            suite.add(std::string(f.name) + " " + std::to_string(queries) + " over " + std::to_string(capacity),
                      traffic(p), [p, &suite] { recall(suite.device, p); });
        }
    }
}

}  // namespace fiedler::bench
