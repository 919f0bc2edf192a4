// recall: every form of cache against plain loops in double, windows, queries at any place, and what storing loses.
#include "kernels/recall.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/attention.h"
#include "kernels/half.h"
#include "kernels/quantised.h"
#include "tests/support/compare.h"

namespace fiedler::test {
namespace {

struct Form {
    CacheType keys, gate, values;
    bool has_gate, product;
};
const Form kForms[] = {{CacheType::f32, CacheType::f32, CacheType::f32, true, false},
                       {CacheType::f16, CacheType::f16, CacheType::f32, true, false},
                       {CacheType::f16, CacheType::f16, CacheType::int8, true, false},
                       {CacheType::f32, CacheType::f32, CacheType::f32, false, false},
                       {CacheType::f32, CacheType::f32, CacheType::f32, false, true},
                       {CacheType::f16, CacheType::f32, CacheType::f32, false, true},
                       {CacheType::int8, CacheType::f32, CacheType::int8, false, true}};

struct Problem {
    Form form;
    std::int32_t heads, scalars, width;
    std::int64_t tokens, capacity;
    std::vector<float> keys, gate, values, queries;
    std::vector<std::byte> key_memory, gate_memory, value_memory;
    std::vector<std::uint16_t> key_scales, value_scales;

    Problem(const Form& f, std::int64_t n, std::int32_t h, std::int32_t r, std::int32_t d, std::int64_t room = 0)
        : form(f), heads(h), scalars(f.product ? d : r), width(d), tokens(n), capacity(n + room) {
        const auto size = [&](std::int64_t x) { return static_cast<std::size_t>(x); };
        keys = to<float>(random_values(size(n * h * scalars), 1));
        values = to<float>(random_values(size(n * h * d), 2));
        queries = to<float>(random_values(size(n * h * scalars), 3));
        for (const double u : random_uniform(size(n * h), 4, 0.0, 0.2)) gate.push_back(static_cast<float>(-u));
        // Poison: what was not stored must not be read into a result.
        key_memory.assign(size(capacity * h * scalars) * bytes_of(f.keys), std::byte{0xff});
        gate_memory.assign(size(capacity * h) * bytes_of(f.gate), std::byte{0xff});
        value_memory.assign(size(capacity * h * d) * bytes_of(f.values), std::byte{0xff});
        key_scales.assign(size(capacity * h), 0xffff);
        value_scales.assign(size(capacity * h), 0xffff);
        for (std::int64_t i = 0; i < n; ++i)
            remember(cache(), i, keys.data() + i * h * scalars, gate.data() + i * h, values.data() + i * h * d);
    }
    RecallCache cache() {
        return {.capacity = capacity,
                .heads = heads,
                .scalars = scalars,
                .width = width,
                .key_type = form.keys,
                .gate_type = form.gate,
                .value_type = form.values,
                .keys = key_memory.data(),
                .gate = form.has_gate ? gate_memory.data() : nullptr,
                .values = value_memory.data(),
                .key_scales = form.keys == CacheType::int8 ? key_scales.data() : nullptr,
                .value_scales = form.values == CacheType::int8 ? value_scales.data() : nullptr};
    }
    Recall call(std::vector<float>& o, std::int64_t first, std::int64_t count, std::int32_t window) {
        o.assign(static_cast<std::size_t>(count * heads * width), std::nanf(""));
        return {.o = {o.data(), count, heads * width},
                .a = {queries.data() + first * heads * scalars, count, heads * scalars},
                .cache = cache(),
                .first = first,
                .window = window,
                .product = form.product,
                .scale = 1 / std::sqrt(float(width))};
    }
};

void expect_close(Problem& p, std::int64_t first, std::int64_t count, std::int32_t window, int threads) {
    std::vector<float> o;
    const Recall call = p.call(o, first, count, window);
    recall(Cpu{threads}, call);
    std::vector<float> low(o.size());
    std::vector<double> reference(o.size());
    recall_reference<float>(call, {low.data(), count, call.o.cols});
    recall_reference<double>(call, {reference.data(), count, call.o.cols});
    EXPECT_TRUE(close(Values(o.begin(), o.end()), reference, Values(low.begin(), low.end())))
        << "first " << first << ", " << count << " queries, window " << window;
}

TEST(Recall, EveryFormMatchesPlainLoops) {
    for (const char* target : quantised_targets()) {
        ASSERT_TRUE(choose_quantised_target(target));
        for (const Form& form : kForms)
            for (const auto& [h, r, d] : {std::tuple{1, 1, 16}, {3, 8, 32}, {2, 3, 64}, {1, 2, 128}}) {
                SCOPED_TRACE(testing::Message() << target << " form " << (&form - kForms) << " width " << d);
                Problem p(form, 77, h, r, d, h == 1 ? 0 : 5);
                for (const auto& [first, count] : {std::pair{0, 1}, {0, 4}, {0, 77}, {70, 7}, {76, 1}, {31, 6}})
                    for (const std::int32_t window : {0, 1, 9, 200}) expect_close(p, first, count, window, 1);
            }
        choose_quantised_target("");
    }
}

TEST(Recall, ThreadsAndGroupsOfQueriesChangeNothing) {
    Problem p(kForms[1], 300, 4, 8, 64);
    std::vector<float> one, three, alone;
    recall(Cpu{1}, p.call(one, 0, 300, 0));
    recall(Cpu{3}, p.call(three, 0, 300, 0));
    EXPECT_EQ(one, three);
    for (const std::int64_t i : {0, 150, 297}) {
        recall(Cpu{1}, p.call(alone, i, 1, 0));
        for (std::size_t k = 0; k < alone.size(); ++k)
            EXPECT_NEAR(alone[k], one[static_cast<std::size_t>(i) * alone.size() + k], 2e-6);
    }
}

// The gate as increments, against the formula with sums over time.
TEST(Recall, AgreesWithAttentionDecode) {
    Problem p(kForms[0], 50, 2, 3, 32);
    std::vector<float> o, F(100), expected(64);
    double sum[2] = {0, 0};
    for (std::size_t i = 0; i < 100; ++i) F[i] = static_cast<float>(sum[i % 2] += double(p.gate[i]));
    recall(Cpu{1}, p.call(o, 49, 1, 0));
    attention_decode(Cpu{1}, AttentionDecode<float>{.o = {expected.data(), 64},
                                                    .a = {p.queries.data() + 49 * 6, 6},
                                                    .b = {p.keys.data(), 50, 6},
                                                    .F = {F.data(), 50, 2},
                                                    .v = {p.values.data(), 50, 64},
                                                    .heads = 2,
                                                    .scalars = 3,
                                                    .window = 0});
    for (std::size_t k = 0; k < 64; ++k) EXPECT_NEAR(o[k], expected[k], 1e-5);
}

TEST(Recall, FewerBitsLoseLittle) {
    Problem exact(kForms[0], 120, 2, 1, 64), half(kForms[1], 120, 2, 1, 64), bytes(kForms[2], 120, 2, 1, 64);
    std::vector<float> o[3];
    int k = 0;
    for (Problem* p : {&exact, &half, &bytes}) recall(Cpu{1}, p->call(o[k++], 0, 120, 0));
    double worst[3] = {};
    for (std::size_t i = 0; i < o[0].size(); ++i)
        for (const int form : {1, 2}) worst[form] = std::max(worst[form], double(std::abs(o[form][i] - o[0][i])));
    EXPECT_GT(worst[1], 0);
    EXPECT_LT(worst[1], 5e-3);  // |v| up to 4, scalars rounded to 11 bits
    EXPECT_LT(worst[2], 2e-2);  // values rounded to half a 127th of their largest
    EXPECT_GT(worst[2], worst[1]);
}

TEST(Recall, BrokenContractsAreRefused) {
    Problem p(kForms[0], 5, 1, 1, 16);
    std::vector<float> o;
    EXPECT_THROW(recall(Cpu{1}, p.call(o, 4, 2, 0)), ContractError);
    Recall call = p.call(o, 0, 1, 0);
    call.product = true;
    EXPECT_THROW(recall(Cpu{1}, call), ContractError);
    EXPECT_THROW(remember(p.cache(), 5, p.keys.data(), p.gate.data(), p.values.data()), ContractError);
}

}  // namespace
}  // namespace fiedler::test
