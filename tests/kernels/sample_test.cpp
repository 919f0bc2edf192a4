// sample: greedy, kept sets and draws against a naive account of the contract; frequencies; the step onwards.
#include "kernels/sample.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Ints = std::vector<std::int32_t>;

struct How {
    double temperature = 1;
    std::int64_t top_k = 0;
    double top_p = 1;
    std::int32_t stop = -1;
};
struct State {
    Ints sampled, token, length, begin, left;
};

template <class T, class Dev>
State run(const Dev& dev, const Values& logits, std::int64_t vocab, const Ints& lengths, const How& how,
          const Ints& lefts = {}, std::uint64_t seed0 = 7) {
    const auto n = std::int64_t(lengths.size());
    const Padded<T, Dev> z(dev, n, vocab, vocab + 8, logits);
    Ints begins;
    std::vector<std::uint64_t> seeds;
    for (std::int64_t s = 0; s < n; ++s) {
        begins.push_back(std::int32_t(s) - std::max(lengths[std::size_t(s)], 0));
        seeds.push_back(seed0 + std::uint64_t(s));
    }
    const Buffer<std::int32_t, Dev> token(dev, Ints(std::size_t(n), 5)), length(dev, lengths), begin(dev, begins),
        left(dev, lefts.empty() ? Ints(std::size_t(n), 100) : lefts), sampled(dev, std::size_t(n));
    const Buffer<std::uint64_t, Dev> seed(dev, seeds);
    sample(dev, Sample<T>{.slots = {token.vec(), length.vec(), begin.vec(), left.vec(), seed.vec()},
                          .sampled = sampled.vec(),
                          .logits = z.mat(),
                          .inverse_temperature = how.temperature > 0 ? float(1 / how.temperature) : 0.f,
                          .top_k = how.top_k,
                          .top_p = how.top_p,
                          .stop = how.stop});
    return {sampled.host(), token.host(), length.host(), begin.host(), left.host()};
}

// The contract in floating point: probabilities by token, 0 where not kept.
Values probabilities(const double* z, std::int64_t vocab, const How& how) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(vocab));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return z[a] > z[b]; });
    Values p(std::size_t(vocab), 0.0);
    std::int64_t kept = how.top_k > 0 ? std::min(how.top_k, vocab) : vocab;
    double sum = 0, reached = 0;
    const auto weight = [&](std::int64_t i) {
        return std::exp((z[order[std::size_t(i)]] - z[order[0]]) / how.temperature);
    };
    for (std::int64_t i = 0; i < kept; ++i) sum += weight(i);
    if (how.top_p < 1) {
        std::int64_t n = 0;
        while (n < kept && reached < how.top_p * sum) reached += weight(n++);
        kept = n, sum = reached;
    }
    for (std::int64_t i = 0; i < kept; ++i) p[std::size_t(order[std::size_t(i)])] = weight(i) / sum;
    return p;
}

// The tokens that the contract allows for this random number: one, or two where rounding decides.
Ints allowed(const Values& p, std::uint64_t seed, std::int32_t position) {
    const double u = std::ldexp(double(rng::bits(seed, rng::kSampleStream, std::uint64_t(position))), -64);
    Ints tokens;
    double before = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
        constexpr double kSlack = 1e-6;
        if (p[i] > 0 && u >= before - kSlack && u < before + p[i] + kSlack) tokens.push_back(std::int32_t(i));
        before += p[i];
    }
    return tokens;
}

Values some_logits(std::int64_t slots, std::int64_t vocab, double scale) {
    return round_to<bf16>(random_values(std::size_t(slots * vocab), 11, scale));  // bf16: many ties
}

const std::vector<How> kHows = {{1.0, 0, 1.0},  {0.3, 0, 1.0},  {2.0, 5, 1.0},   {1.0, 1, 1.0},      {1.0, 0, 0.5},
                                {1.0, 0, 0.95}, {0.8, 40, 0.9}, {1.0, 3, 0.999}, {1.0, 100000, 0.01}};

template <class T, class Dev>
void expect_draws(const Dev& dev, const std::vector<std::int64_t>& vocabs = {1, 7, 1003, 1024, 5000}) {
    for (const std::int64_t vocab : vocabs)
        for (const How& how : kHows)
            for (const double scale : {1.0, 6.0}) {
                SCOPED_TRACE(testing::Message()
                             << "vocab " << vocab << ", temperature " << how.temperature << ", top-k " << how.top_k
                             << ", top-p " << how.top_p << ", scale " << scale);
                const Ints lengths = {0, 3, 9, 100, 2, 77};
                const Values z = some_logits(std::int64_t(lengths.size()), vocab, scale);
                const State got = run<T>(dev, z, vocab, lengths, how);
                for (std::size_t s = 0; s < lengths.size(); ++s) {
                    const Values p = probabilities(z.data() + std::int64_t(s) * vocab, vocab, how);
                    const Ints ok = allowed(p, 7 + s, lengths[s] + 1);
                    ASSERT_FALSE(ok.empty());
                    EXPECT_NE(std::find(ok.begin(), ok.end(), got.sampled[s]), ok.end())
                        << "slot " << s << " drew " << got.sampled[s] << ", not " << ok[0];
                }
            }
}

TEST(Sample, DrawsWhatTheContractSays) {
    expect_draws<float>(Cpu{});
    expect_draws<double>(Cpu{});
}

template <class T, class Dev>
void expect_greedy(const Dev& dev) {
    const double inf = std::numeric_limits<double>::infinity(), nan = std::nan("");
    const Values z = {1,    3,    3,    -2,   0,     // the lower of equals
                      -inf, -inf, -inf, -inf, -5,    // one is left
                      nan,  -inf, nan,  nan,  -inf,  // nothing to choose from: the first
                      nan,  -8,   nan,  inf,  9,     // infinity
                      -0.0, 0.0,  -1,   -1,   -1};   // equal zeros
    for (const How& how : {How{.temperature = 0}, How{.temperature = 1e-3}, How{.top_k = 1}}) {
        const State got = run<T>(dev, z, 5, {4, 4, 4, 4, 4}, how);
        EXPECT_EQ(got.sampled[1], 4);
        EXPECT_EQ(got.sampled[2], 0);
        EXPECT_EQ(got.sampled[3], 3);
        if (how.top_k != 1 && how.temperature > 0) continue;  // equals share the probability
        EXPECT_EQ(got.sampled[0], 1);
        EXPECT_EQ(got.sampled[4], 0);
    }
}

TEST(Sample, GreedyAndNumbersThatAreNone) { expect_greedy<float>(Cpu{}); }

// Over many positions each token comes as often as it should, within five standard deviations.
template <class T, class Dev>
void expect_frequencies(const Dev& dev) {
    const std::int64_t vocab = 12;
    const How how{.temperature = 0.7, .top_k = 8, .top_p = 0.95};
    Values row = round_to<bf16>(random_values(std::size_t(vocab), 3));
    row[4] = row[7];
    const Values p = probabilities(row.data(), vocab, how);
    std::map<std::int32_t, int> count;
    const int slots = 500, rounds = 20;
    Values z;
    for (int s = 0; s < slots; ++s) z.insert(z.end(), row.begin(), row.end());
    for (int round = 0; round < rounds; ++round) {
        const State got = run<T>(dev, z, vocab, Ints(slots, round), how);
        for (const std::int32_t t : got.sampled) ++count[t];
    }
    const double n = slots * rounds;
    for (std::int64_t t = 0; t < vocab; ++t) {
        const double want = p[std::size_t(t)];
        EXPECT_LE(std::abs(count[std::int32_t(t)] / n - want), 5 * std::sqrt(want * (1 - want) / n)) << t;
    }
}

TEST(Sample, Frequencies) { expect_frequencies<float>(Cpu{}); }

// Idle slots, the stop token, the last token of a slot.
template <class T, class Dev>
void expect_step_onwards(const Dev& dev) {
    Values z(5 * 4, 0.0);
    for (const auto& [slot, token] : {std::pair{0, 2}, {1, 3}, {2, 1}, {3, 2}, {4, 2}})
        z[std::size_t(slot * 4 + token)] = 5;
    const State got = run<T>(dev, z, 4, {10, 0, 7, -1, 3}, {.temperature = 0, .stop = 1}, {5, 2, 9, 9, 1});
    EXPECT_EQ(got.sampled, (Ints{2, 3, 1, -1, 2}));
    EXPECT_EQ(got.length, (Ints{11, 1, -1, -1, -1}));
    EXPECT_EQ(got.begin, (Ints{-11, 0, 2, 3, 4}));
    EXPECT_EQ(got.left, (Ints{4, 1, 8, 9, 0}));
    EXPECT_EQ(got.token[0], 2);
    EXPECT_EQ(got.token[1], 3);
    EXPECT_EQ(got.token[3], 5);  // as it was
}

TEST(Sample, StepsOnwards) { expect_step_onwards<float>(Cpu{}); }

TEST(Sample, RejectsBrokenContracts) {
    EXPECT_THROW(run<float>(Cpu{}, {1, 2}, 2, {0}, {.top_p = 0}), ContractError);
    EXPECT_THROW(run<float>(Cpu{}, {1, 2}, 2, {0}, {.top_k = -1}), ContractError);
}

#if FIEDLER_CUDA

TEST(Sample, GpuDrawsWhatTheContractSays) {
    FIEDLER_GPU_OR_SKIP();
    expect_draws<bf16>(gpu());
    expect_frequencies<bf16>(gpu());
}
TEST(Sample, GpuSmallDraws) {  // for the sanitizer, under which those above take too long
    FIEDLER_GPU_OR_SKIP();
    expect_draws<bf16>(gpu(), {1, 1003});
}
TEST(Sample, GpuGreedyAndNumbersThatAreNone) {
    FIEDLER_GPU_OR_SKIP();
    expect_greedy<bf16>(gpu());
}
TEST(Sample, GpuStepsOnwards) {
    FIEDLER_GPU_OR_SKIP();
    expect_step_onwards<bf16>(gpu());
}
// The CPU's choice, but where the device's exp puts a number on the other side.
TEST(Sample, GpuChoosesAsTheCpu) {
    FIEDLER_GPU_OR_SKIP();
    const std::int64_t vocab = 16384;
    Ints lengths(200);
    std::iota(lengths.begin(), lengths.end(), 0);
    const Values z = some_logits(200, vocab, 3);
    for (const How& how : kHows) {
        const Ints got = run<bf16>(gpu(), z, vocab, lengths, how).sampled,
                   want = run<float>(Cpu{}, z, vocab, lengths, how).sampled;
        int other = 0;
        for (std::size_t s = 0; s < got.size(); ++s) other += got[s] != want[s];
        EXPECT_LE(other, 1) << "top-k " << how.top_k << ", top-p " << how.top_p;
        EXPECT_EQ(got, run<bf16>(gpu(), z, vocab, lengths, how).sampled);
    }
}

#endif

}  // namespace
}  // namespace fiedler::test
