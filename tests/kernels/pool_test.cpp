// pool: mean, sum and attention in naive loops, finite differences, a sequence wherever it lies, and the GPU around its
// groups, chunks and long sequences.
#include "kernels/pool.h"

#include <algorithm>
#include <limits>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Lengths = std::vector<std::int32_t>;
constexpr PoolKind kKinds[] = {PoolKind::mean, PoolKind::sum, PoolKind::attention};

struct Problem {
    Lengths lengths;
    Ragged ragged;
    std::int64_t tokens, count, channels, heads;
    Values x, z, dy;

    Problem(const Lengths& n, std::int64_t c, std::int64_t h)
        : lengths(n), ragged(n), tokens(ragged.tokens()), count(std::int64_t(n.size())), channels(c), heads(h) {
        x = random_values(std::size_t(tokens * c), 1);
        z = random_values(std::size_t(tokens * h), 2, 2.0);
        dy = random_values(std::size_t(count * c), 3);
    }
    template <class T>
    Problem& round() {
        for (Values* v : {&x, &dy}) *v = round_to<T>(*v);
        z = round_to<acc_t<T>>(z);
        return *this;
    }
    std::int64_t head_of(std::int64_t c) const { return c / (channels / heads); }
    Values naive_forward(PoolKind kind) const {
        Values y(std::size_t(count * channels), 0.0);
        for (std::int64_t s = 0; s < count; ++s)
            for (std::int64_t c = 0; c < channels; ++c) {
                double sum = 0, total = 0;
                for (auto i = ragged.offsets[std::size_t(s)]; i < ragged.offsets[std::size_t(s) + 1]; ++i) {
                    const double weight =
                        kind == PoolKind::attention ? std::exp(z[std::size_t(i * heads + head_of(c))]) : 1.0;
                    sum += weight * x[std::size_t(i * channels + c)];
                    total += weight;
                }
                if (total > 0) y[std::size_t(s * channels + c)] = kind == PoolKind::sum ? sum : sum / total;
            }
        return y;
    }
};

struct Pooled {
    Values y, lse;
};
struct Call {
    PoolKind kind;
    bool uniform = false, hint = false;  // hint: the longest sequence is told
    std::int64_t gap = 0;
};

template <class T, class Dev>
Pooled forward(const Dev& dev, const Problem& q, const Call& call) {
    const bool attention = call.kind == PoolKind::attention;
    const std::int64_t heads = attention ? q.heads : 0;
    const Packing<Dev> packing(dev, q.lengths, call.uniform);
    const Padded<T, Dev> x(dev, q.tokens, q.channels, q.channels + call.gap, q.x),
        y(dev, q.count, q.channels, q.channels + 2 * call.gap);
    const Padded<acc_t<T>, Dev> z(dev, q.tokens, q.heads, q.heads + 3, q.z);
    const Buffer<acc_t<T>, Dev> lse(dev, std::size_t(q.count * q.heads)),
        scratch(dev, std::size_t(pool_scratch_elements(q.tokens, q.channels, heads)));
    PoolForward<T> p;
    p.y = y.mat(), p.x = x.mat(), p.seq = packing.seq, p.kind = call.kind, p.scratch = scratch.vec();
    if (attention) p.z = z.mat(), p.lse = lse.mat(q.count, q.heads);
    if (call.hint) p.longest = *std::max_element(q.lengths.begin(), q.lengths.end());
    pool_forward(dev, p);
    return {y.values(), attention ? lse.values() : Values{}};
}

struct Gradients {
    Values dx, dz;
};
// y and lse: what the forward pass left.
template <class T, class Dev>
Gradients backward(const Dev& dev, const Problem& q, const Call& call, const Pooled& pooled) {
    const bool attention = call.kind == PoolKind::attention;
    const Packing<Dev> packing(dev, q.lengths, call.uniform);
    const std::int64_t ld = q.channels + call.gap;
    const Padded<T, Dev> x(dev, q.tokens, q.channels, ld, q.x), y(dev, q.count, q.channels, ld, pooled.y),
        dy(dev, q.count, q.channels, ld + call.gap, q.dy), dx(dev, q.tokens, q.channels, ld),
        dz(dev, q.tokens, q.heads, q.heads + 1);
    const Padded<acc_t<T>, Dev> z(dev, q.tokens, q.heads, q.heads + 3, q.z);
    PoolBackward<T> p;
    p.dx = dx.mat(), p.dy = dy.mat(), p.seq = packing.seq, p.kind = call.kind;
    if (!attention) {
        pool_backward(dev, p);
        return {dx.values(), {}};
    }
    const Buffer<acc_t<T>, Dev> lse(dev, to<acc_t<T>>(pooled.lse));
    p.dz = dz.mat(), p.x = x.mat(), p.y = y.mat(), p.z = z.mat(), p.lse = lse.mat(q.count, q.heads);
    pool_backward(dev, p);
    return {dx.values(), dz.values()};
}

bool is_uniform(const Lengths& n) {
    return std::all_of(n.begin(), n.end(), [&](auto v) { return v == n[0]; });
}

TEST(Pool, DoubleMatchesNaiveLoopsAndFloatFollows) {
    for (const Lengths& lengths : {Lengths{1}, Lengths{7, 7}, Lengths{0, 3, 1, 0, 40}, Lengths{1024, 1025, 3000}})
        for (const PoolKind kind : kKinds)
            for (const bool uniform : {false, true}) {
                if (uniform && !is_uniform(lengths)) continue;
                SCOPED_TRACE(testing::PrintToString(lengths));
                const Problem q = Problem(lengths, 12, 3).round<float>();
                const Values ref = q.naive_forward(kind);
                const Call call{kind, uniform, false, 3};
                const Pooled d = forward<double>(Cpu{}, q, call), f = forward<float>(Cpu{}, q, call);
                EXPECT_TRUE(close_to(d.y, ref, 1e-12));
                EXPECT_TRUE(close_to(f.y, ref, 1e-5));
            }
}

TEST(Pool, GradientsMatchFiniteDifferences) {
    for (const PoolKind kind : kKinds) {
        Problem q({3, 0, 5, 1}, 6, 2);
        const Call call{kind};
        const Gradients g = backward<double>(Cpu{1}, q, call, forward<double>(Cpu{1}, q, call));
        const auto objective = [&] { return inner(q.dy, forward<double>(Cpu{1}, q, call).y); };
        EXPECT_TRUE(gradient_matches(g.dx, q.x, objective));
        if (kind == PoolKind::attention) {
            EXPECT_TRUE(gradient_matches(g.dz, q.z, objective));
        }
    }
}
TEST(Pool, GradientsOfLongSequencesMatchFiniteDifferences) {
    Problem q({2, 1030}, 1, 1);
    const Call call{PoolKind::attention};
    const Gradients g = backward<double>(Cpu{1}, q, call, forward<double>(Cpu{1}, q, call));
    const auto objective = [&] { return inner(q.dy, forward<double>(Cpu{1}, q, call).y); };
    EXPECT_TRUE(gradient_matches(g.dx, q.x, objective));
    EXPECT_TRUE(gradient_matches(g.dz, q.z, objective));
}

TEST(Pool, LargeLogitsAndEmptySequences) {
    Problem q({2, 0, 3}, 4, 2);
    for (double& v : q.z) v = v * 100 + 1e4;
    const Pooled p = forward<float>(Cpu{}, q, {PoolKind::attention});
    for (const double v : p.y) EXPECT_TRUE(std::isfinite(v));
    for (int h = 0; h < 2; ++h) EXPECT_EQ(p.lse[std::size_t(2 + h)], -std::numeric_limits<double>::infinity());
    for (int c = 0; c < 4; ++c) EXPECT_EQ(p.y[std::size_t(4 + c)], 0.0);
}

// A sequence alone and among others: the same bits, with and without the hint of the longest.
template <class T, class Dev>
void expect_place_does_not_matter(const Dev& dev, std::int32_t length, const Lengths& before, const Lengths& after) {
    const Problem one = Problem(Lengths{length}, 64, 2).round<T>();
    Lengths all = before;
    all.push_back(length);
    all.insert(all.end(), after.begin(), after.end());
    Problem many = Problem(all, 64, 2).round<T>();
    const std::size_t s = before.size(), first = std::size_t(many.ragged.offsets[s]), n = std::size_t(length);
    std::copy(one.x.begin(), one.x.end(), many.x.begin() + std::ptrdiff_t(first * 64));
    std::copy(one.z.begin(), one.z.end(), many.z.begin() + std::ptrdiff_t(first * 2));
    std::copy(one.dy.begin(), one.dy.end(), many.dy.begin() + std::ptrdiff_t(s * 64));
    const auto part = [](const Values& v, std::size_t from, std::size_t count, std::size_t width) {
        if (v.empty()) return v;
        return Values(v.begin() + std::ptrdiff_t(from * width), v.begin() + std::ptrdiff_t((from + count) * width));
    };
    for (const PoolKind kind : kKinds) {
        const Pooled a = forward<T>(dev, one, {kind, true, true}), b = forward<T>(dev, many, {kind});
        EXPECT_EQ(a.y, part(b.y, s, 1, 64));
        EXPECT_EQ(a.lse, part(b.lse, s, 1, 2));
        const Gradients ga = backward<T>(dev, one, {kind, true}, a), gb = backward<T>(dev, many, {kind}, b);
        EXPECT_EQ(ga.dx, part(gb.dx, first, n, 64));
        EXPECT_EQ(ga.dz, part(gb.dz, first, n, 2));
    }
}
TEST(Pool, PlaceDoesNotMatter) {
    expect_place_does_not_matter<float>(Cpu{}, 25, {3, 0, 20}, {7});
    expect_place_does_not_matter<float>(Cpu{}, 2500, {3, 1000, 20}, {7, 1500});
}

TEST(Pool, DoesNotDependOnThreads) {
    const Problem q({2000, 3, 1500}, 12, 2);
    const Call call{PoolKind::attention};
    EXPECT_EQ(forward<float>(Cpu{1}, q, call).y, forward<float>(Cpu{5}, q, call).y);
}

TEST(Pool, BrokenContractThrows) {
    Values x(24), y(6), z(12), lse(4);
    const auto run = [&](std::int32_t length, std::int64_t heads, PoolKind kind) {
        PoolForward<double> p;
        p.y = {y.data(), 2, 3}, p.x = {x.data(), 4, 3}, p.seq = Packed::uniform(2, length), p.kind = kind;
        if (heads) p.z = {z.data(), 4, heads}, p.lse = {lse.data(), 2, heads};
        pool_forward(Cpu{}, p);
    };
    EXPECT_NO_THROW(run(2, 0, PoolKind::mean));
    EXPECT_NO_THROW(run(2, 1, PoolKind::attention));
    EXPECT_THROW(run(3, 0, PoolKind::mean), ContractError);
    EXPECT_THROW(run(2, 0, PoolKind::attention), ContractError);
    EXPECT_THROW(run(2, 1, PoolKind::sum), ContractError);
    EXPECT_THROW(run(2, 2, PoolKind::attention), ContractError);  // 3 channels
}

#if FIEDLER_CUDA
struct Case {
    Lengths lengths;
    std::int64_t channels, heads;
};
// Lengths around groups (8, 16), batches of rows and chunks (1024); channels around a block's 64 and 128; several long
// sequences with short ones between them, two beginning in one tile of 1024.
const std::vector<Case> kGpuCases = {{{1}, 8, 1},
                                     {{3}, 16, 2},
                                     {{7, 7, 7}, 64, 1},
                                     {{8, 9, 15, 16, 17}, 64, 4},
                                     {{31, 32, 33, 0, 63, 64, 65}, 128, 2},
                                     {{0, 5, 0, 0, 257, 0}, 136, 17},
                                     {{25, 25, 25, 25}, 384, 6},
                                     {{1023}, 72, 3},
                                     {{1024}, 64, 2},
                                     {{1025}, 64, 2},
                                     {{2049, 1, 3}, 120, 5},
                                     {{100, 1100, 10, 5000, 1, 1025, 1024, 0, 3000}, 64, 1},
                                     {{2048, 2048, 2048}, 136, 1},
                                     {{20000}, 256, 8},
                                     {Lengths(700, 25), 64, 2}};

TEST(Pool, GpuForwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Case& k : kGpuCases)
        for (const PoolKind kind : kKinds) {
            SCOPED_TRACE(testing::Message()
                         << testing::PrintToString(k.lengths) << " x " << k.channels << ", kind " << int(kind));
            const Problem q = Problem(k.lengths, k.channels, k.heads).round<bf16>();
            const Call call{kind, false, false, 8};
            const Pooled got = forward<bf16>(gpu(), q, call), low = forward<float>(Cpu{}, q, call);
            EXPECT_TRUE(close(got.y, forward<double>(Cpu{}, q, call).y, round_to<bf16>(low.y)));
            EXPECT_EQ(got.y, forward<bf16>(gpu(), q, call).y);
            EXPECT_EQ(got.y, forward<bf16>(gpu(), q, {kind, false, true, 8}).y) << "with the longest told";
            if (is_uniform(k.lengths)) {
                EXPECT_EQ(got.y, forward<bf16>(gpu(), q, {kind, true, false, 8}).y);
            }
            if (kind == PoolKind::attention) {
                const bool empty = std::count(k.lengths.begin(), k.lengths.end(), 0) > 0;
                if (!empty) {
                    EXPECT_TRUE(close(got.lse, forward<double>(Cpu{}, q, call).lse, low.lse));
                }
            }
        }
}

TEST(Pool, GpuBackwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Case& k : kGpuCases)
        for (const PoolKind kind : kKinds) {
            SCOPED_TRACE(testing::Message()
                         << testing::PrintToString(k.lengths) << " x " << k.channels << ", kind " << int(kind));
            const Problem q = Problem(k.lengths, k.channels, k.heads).round<bf16>();
            const Call call{kind, false, false, 8};
            const Pooled pooled = forward<bf16>(gpu(), q, call);  // the same y and lse for all
            const Gradients got = backward<bf16>(gpu(), q, call, pooled), low = backward<float>(Cpu{}, q, call, pooled),
                            ref = backward<double>(Cpu{}, q, call, pooled);
            EXPECT_TRUE(close(got.dx, ref.dx, round_to<bf16>(low.dx)));
            EXPECT_EQ(got.dx, backward<bf16>(gpu(), q, call, pooled).dx);
            if (kind == PoolKind::attention) {
                EXPECT_TRUE(close(got.dz, ref.dz, round_to<bf16>(low.dz)));
                EXPECT_EQ(got.dz, backward<bf16>(gpu(), q, call, pooled).dz);
            }
            if (is_uniform(k.lengths)) {
                EXPECT_EQ(got.dx, backward<bf16>(gpu(), q, {kind, true, false, 8}, pooled).dx);
            }
        }
}

TEST(Pool, GpuPlaceDoesNotMatter) {
    FIEDLER_GPU_OR_SKIP();
    expect_place_does_not_matter<bf16>(gpu(), 25, {3, 0, 20}, {7});
    expect_place_does_not_matter<bf16>(gpu(), 1, {3, 0, 20}, {7, 2000});
    expect_place_does_not_matter<bf16>(gpu(), 2500, {3, 1000, 20}, {7, 1500});
    expect_place_does_not_matter<bf16>(gpu(), 1025, {1100, 20, 1}, {1030});
}

TEST(Pool, GpuEmptySequencesAreZero) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q = Problem({0, 4, 0}, 16, 2).round<bf16>();
    for (const PoolKind kind : kKinds) {
        const Pooled p = forward<bf16>(gpu(), q, {kind});
        for (std::size_t c = 0; c < 16; ++c) EXPECT_EQ(p.y[c] + p.y[32 + c], 0.0);
        if (kind == PoolKind::attention) {
            EXPECT_EQ(p.lse[0], -std::numeric_limits<double>::infinity());
        }
    }
}

TEST(Pool, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    EXPECT_THROW(forward<bf16>(gpu(), Problem({4}, 12, 1), {PoolKind::mean}), ContractError);
    EXPECT_THROW(forward<bf16>(gpu(), Problem({4}, 16, 4), {PoolKind::attention}), ContractError);  // heads of 4
}
#endif

}  // namespace
}  // namespace fiedler::test
