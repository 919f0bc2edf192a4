// gate: log-sigmoid and its cumulative sum in naive loops, finite differences, decoding by a carry, long sequences.
#include "kernels/gate.h"

#include <algorithm>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Lengths = std::vector<std::int32_t>;

struct Problem {
    Lengths lengths;
    Ragged ragged;
    std::int64_t tokens, heads;
    Values z, dF, bias, dbias0;

    Problem(const Lengths& n, std::int64_t h) : lengths(n), ragged(n), tokens(ragged.tokens()), heads(h) {
        z = random_values(std::size_t(tokens * h), 1, 2.0);
        dF = random_uniform(std::size_t(tokens * h), 2, -0.5, 1.0);
        bias = random_uniform(std::size_t(h), 3, -1.0, 8.0);
        dbias0 = random_values(std::size_t(h), 4);
        for (Values* v : {&z, &dF, &bias, &dbias0}) *v = round_to<float>(*v);
    }
    double u(std::int64_t i, std::int64_t h) const { return z[std::size_t(i * heads + h)] + bias[std::size_t(h)]; }
    Values naive_forward() const {
        Values F(z.size());
        for (std::int64_t i = 0; i < tokens; ++i)
            for (std::int64_t h = 0; h < heads; ++h) {
                const double f = std::min(u(i, h), 0.0) - std::log1p(std::exp(-std::abs(u(i, h))));
                const bool begins = i == ragged.begin[std::size_t(i)];
                F[std::size_t(i * heads + h)] = f + (begins ? 0.0 : F[std::size_t((i - 1) * heads + h)]);
            }
        return F;
    }
    Values naive_dz() const {
        Values g = dF;
        for (std::int64_t i = tokens - 2; i >= 0; --i)
            if (i + 1 < ragged.end[std::size_t(i)])
                for (std::int64_t h = 0; h < heads; ++h)
                    g[std::size_t(i * heads + h)] += g[std::size_t((i + 1) * heads + h)];
        for (std::int64_t i = 0; i < tokens * heads; ++i) g[std::size_t(i)] /= 1 + std::exp(u(i / heads, i % heads));
        return g;
    }
    Values naive_dbias() const {
        Values d = dbias0;
        const Values dz = naive_dz();
        for (std::size_t i = 0; i < dz.size(); ++i) d[i % std::size_t(heads)] += dz[i];
        return d;
    }
};
bool is_uniform(const Lengths& n) {
    return std::all_of(n.begin(), n.end(), [&](auto v) { return v == n[0]; });
}

template <class A, class Dev>
Values forward(const Dev& dev, const Problem& q, bool uniform, std::int64_t gap = 0) {
    const Packing<Dev> packing(dev, q.lengths, uniform);
    const Padded<A, Dev> z(dev, q.tokens, q.heads, q.heads + gap, q.z), F(dev, q.tokens, q.heads, q.heads + 2 * gap);
    const Buffer<A, Dev> bias(dev, to<A>(q.bias));
    gate_forward(dev, GateForward<A>{F.mat(), z.mat(), bias.vec(), packing.seq, {}});
    return F.values();
}

struct Gradients {
    Values dz, dbias;
};
// pending: instead of scratch.
template <class T, class Dev>
Gradients backward(const Dev& dev, const Problem& q, bool uniform, std::int64_t gap = 0,
                   PendingSums<acc_t<T>>* pending = nullptr) {
    using A = acc_t<T>;
    const Packing<Dev> packing(dev, q.lengths, uniform);
    const Padded<A, Dev> z(dev, q.tokens, q.heads, q.heads + gap, q.z),
        dF(dev, q.tokens, q.heads, q.heads + 2 * gap, q.dF);
    const Padded<T, Dev> dz(dev, q.tokens, q.heads, q.heads + 3 * gap);
    const Buffer<A, Dev> bias(dev, to<A>(q.bias)), dbias(dev, to<A>(q.dbias0)),
        scratch(dev, std::size_t(gate_pending_elements(q.tokens, packing.seq.count, q.heads)));
    gate_backward(dev, GateBackward<T>{dz.mat(), dbias.vec(), dF.mat(), z.mat(), bias.vec(), packing.seq,
                                       pending ? Vec<A>{} : scratch.vec(), pending});
    if (pending) finish_sums(dev, *pending);
    return {dz.values(), dbias.values()};
}

// One sequence, a few tokens a call, continued by the carry; it must end as the last token's F.
template <class A, class Dev>
Values decode(const Dev& dev, const Problem& q, std::int64_t step) {
    const Buffer<A, Dev> z(dev, to<A>(q.z)), bias(dev, to<A>(q.bias)), F(dev, q.z.size()),
        carry(dev, std::size_t(q.heads));
    fill_bytes(dev, carry.data(), 0, carry.bytes());
    for (std::int64_t i = 0; i < q.tokens; i += step) {
        const std::int64_t n = std::min(step, q.tokens - i);
        gate_forward(
            dev, GateForward<A>{F.mat(q.tokens, q.heads).slice_rows(i, n), z.mat(q.tokens, q.heads).slice_rows(i, n),
                                bias.vec(), Packed::uniform(1, std::int32_t(n)), carry.vec()});
    }
    const Values all = F.values();
    EXPECT_EQ(carry.values(), Values(all.end() - q.heads, all.end()));
    return all;
}

const std::vector<std::pair<Lengths, int>> kShapes = {
    {{1}, 1}, {{3}, 6}, {{64, 64}, 6}, {{1, 2, 0, 5, 60, 1}, 3}, {{300}, 5}};

TEST(Gate, DoubleMatchesNaiveLoopsAndFloatFollows) {
    for (const auto& [lengths, heads] : kShapes)
        for (const bool uniform : {false, true}) {
            if (uniform && !is_uniform(lengths)) continue;
            SCOPED_TRACE(testing::PrintToString(lengths));
            const Problem q(lengths, heads);
            EXPECT_TRUE(close_to(forward<double>(Cpu{}, q, uniform, 2), q.naive_forward(), 1e-14));
            EXPECT_TRUE(close_to(forward<float>(Cpu{}, q, uniform, 2), q.naive_forward(), 1e-6));
            const Gradients d = backward<double>(Cpu{}, q, uniform, 2), f = backward<float>(Cpu{}, q, uniform, 2);
            EXPECT_TRUE(close_to(d.dz, q.naive_dz(), 1e-14));
            EXPECT_TRUE(close_to(d.dbias, q.naive_dbias(), 1e-13));
            EXPECT_TRUE(close_to(f.dz, q.naive_dz(), 1e-6));
            EXPECT_TRUE(close_to(f.dbias, q.naive_dbias(), 3e-6));
        }
}

TEST(Gate, GradientsMatchFiniteDifferences) {
    Problem q({1, 4, 7}, 2);
    q.dbias0.assign(2, 0.0);
    const Gradients g = backward<double>(Cpu{}, q, false);
    const auto objective = [&] { return inner(q.dF, forward<double>(Cpu{}, q, false)); };
    EXPECT_TRUE(gradient_matches(g.dz, q.z, objective));
    EXPECT_TRUE(gradient_matches(g.dbias, q.bias, objective));
}

// z of both signs and all magnitudes, one token a sequence: F is logsigmoid itself, relative to each value. growth: of the
// tolerance, with u.
template <class A, class Dev>
void expect_exact_log_sigmoid(const Dev& dev, double tolerance, double growth = 0) {
    Values u{0.0, 1e-6, -1e-6, -1000.0, -1e30};
    for (int i = -3480; i <= 3480; ++i) u.push_back(i / 40.0);
    Problem q(Lengths(u.size(), 1), 1);
    q.z = round_to<A>(u);
    q.bias = {0.0};
    const Values got = forward<A>(dev, q, true), want = q.naive_forward();
    for (std::size_t i = 0; i < u.size(); ++i)
        EXPECT_LE(std::abs(got[i] - want[i]), (tolerance + growth * std::max(u[i], 0.0)) * std::abs(want[i]))
            << "u = " << u[i] << ", got " << got[i];
    q.z = Values(u.size(), 1e30);
    EXPECT_EQ(forward<A>(dev, q, true), Values(u.size(), 0.0));
}
TEST(Gate, LogSigmoidIsAccurateEverywhere) {
    expect_exact_log_sigmoid<double>(Cpu{}, 1e-15 * 8);
    expect_exact_log_sigmoid<float>(Cpu{}, 1.2e-7 * 4);
}

TEST(Gate, NanIsSeen) {
    Problem q({4, 4}, 1);
    q.z[5] = std::nan("");
    const Values F = forward<float>(Cpu{}, q, true), dz = backward<float>(Cpu{}, q, true).dz;
    for (std::size_t i = 0; i < 8; ++i) {
        EXPECT_EQ(std::isnan(F[i]), i >= 5) << i;
        EXPECT_EQ(std::isnan(dz[i]), i == 5) << i;
    }
}

TEST(Gate, CarryContinuesASequence) {
    const Problem q({101}, 6);
    for (const std::int64_t step : {1, 7, 101}) {
        EXPECT_TRUE(close_to(decode<double>(Cpu{}, q, step), q.naive_forward(), 1e-14));
        EXPECT_TRUE(close_to(decode<float>(Cpu{}, q, step), q.naive_forward(), 2e-6));
    }
}

TEST(Gate, DoesNotDependOnThreads) {
    const Problem q({700, 3, 100, 50}, 6);
    EXPECT_EQ(forward<float>(Cpu{1}, q, false), forward<float>(Cpu{5}, q, false));
    const Gradients one = backward<float>(Cpu{1}, q, false), many = backward<float>(Cpu{5}, q, false);
    EXPECT_EQ(one.dz, many.dz);
    EXPECT_EQ(one.dbias, many.dbias);
}

TEST(Gate, DoesNotDependOnAddresses) {
    const Problem q({70, 3, 10}, 5);
    const Values F = forward<float>(Cpu{}, q, false);
    const Gradients g = backward<float>(Cpu{}, q, false);
    for (const std::int64_t gap : {1, 2, 3}) {  // moves every row
        EXPECT_EQ(forward<float>(Cpu{}, q, false, gap), F);
        EXPECT_EQ(backward<float>(Cpu{}, q, false, gap).dz, g.dz);
    }
}

TEST(Gate, BrokenContractThrows) {
    Values z(8), F(8), bias(2), carry(2);
    const auto run = [&](std::int32_t count, bool with_carry) {
        GateForward<double> p{
            {F.data(), 4, 2}, {z.data(), 4, 2}, {bias.data(), 2}, Packed::uniform(count, 4 / count), {}};
        if (with_carry) p.carry = Vec<double>(carry.data(), 2);
        gate_forward(Cpu{}, p);
    };
    EXPECT_NO_THROW(run(1, true));
    EXPECT_NO_THROW(run(2, false));
    EXPECT_THROW(run(2, true), ContractError);
    EXPECT_THROW(run(3, false), ContractError);
}

#if FIEDLER_CUDA
// Lengths around a warp's, a block's and several tiles' tokens (a warp has 32, 64 or 128 of a sequence alone, a block of up
// to 8 warps 128 for each), and around where sequences are cut, from 8192 tokens on, into chunks of 2048.
const std::vector<std::pair<Lengths, int>> kGpuShapes = {{{1}, 1},
                                                         {{3}, 6},
                                                         {{7, 7}, 6},
                                                         {{32}, 6},
                                                         {{33}, 6},
                                                         {{64}, 6},
                                                         {{65}, 7},
                                                         {{127}, 3},
                                                         {{128}, 3},
                                                         {{129}, 3},
                                                         {{514}, 6},
                                                         {Lengths(32, 1024), 6},
                                                         {{1025, 1025}, 12},
                                                         {{4097}, 2},
                                                         {{8191}, 2},
                                                         {{8192}, 2},
                                                         {{8193}, 2},
                                                         {{9000}, 40},
                                                         {{12289}, 9},
                                                         {{10241, 10241}, 3},
                                                         {Lengths(130, 8193), 1},
                                                         {Lengths(257, 8193), 1},
                                                         {Lengths(700, 5), 6},
                                                         {{1, 2, 0, 5, 60, 1}, 3},
                                                         {{100, 20, 33}, 6},
                                                         {{300, 2, 7}, 5},
                                                         {{3000, 1, 47, 500}, 6},
                                                         {{0, 0, 1, 0}, 8}};

void expect_gpu_matches(const Problem& q, bool uniform) {
    const Values ref = forward<double>(Cpu{}, q, uniform), low = forward<float>(Cpu{}, q, uniform),
                 got = forward<float>(gpu(), q, uniform, 3);
    EXPECT_TRUE(close(got, ref, low));
    EXPECT_EQ(got, forward<float>(gpu(), q, uniform, 3));
    const Gradients dref = backward<double>(Cpu{}, q, uniform), dlow = backward<float>(Cpu{}, q, uniform),
                    dgot = backward<bf16>(gpu(), q, uniform, 3), again = backward<bf16>(gpu(), q, uniform, 3);
    EXPECT_TRUE(close(dgot.dz, dref.dz, round_to<bf16>(dlow.dz)));
    EXPECT_TRUE(close(dgot.dbias, dref.dbias, dlow.dbias));
    EXPECT_EQ(dgot.dz, again.dz);
    EXPECT_EQ(dgot.dbias, again.dbias);
}

TEST(Gate, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [lengths, heads] : kGpuShapes)
        for (const bool uniform : {false, true}) {
            if (uniform && !is_uniform(lengths)) continue;
            SCOPED_TRACE(testing::Message() << lengths.size() << " x " << lengths[0] << ", heads " << heads << uniform);
            expect_gpu_matches(Problem(lengths, heads), uniform);
        }
}

// A warp, a block and several blocks a sequence; one list's memory serves one pass after the other.
TEST(Gate, GpuPendingSumsAreTheSame) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<float, Cuda> memory(gpu(), std::size_t(gate_pending_elements(32768, 1638, 7)));
    PendingSums<float> pending(memory.vec());
    for (const auto& [lengths, heads] : std::vector<std::pair<Lengths, int>>{
             {Lengths(1638, 20), 7}, {Lengths(32, 1024), 6}, {{9000}, 3}, {{5, 0}, 1}}) {
        const Problem q(lengths, heads);
        const Gradients own = backward<bf16>(gpu(), q, is_uniform(lengths)),
                        given = backward<bf16>(gpu(), q, is_uniform(lengths), 0, &pending);
        EXPECT_EQ(given.dz, own.dz);
        EXPECT_EQ(given.dbias, own.dbias);
    }
}

TEST(Gate, GpuPendingSumsWait) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<float, Cuda> z(gpu(), Values(64, 1.0)), bias(gpu(), Values(2, 0.0)), dbias(gpu(), Values(2, 3.0)),
        memory(gpu(), std::size_t(3 * gate_pending_elements(32, 4, 2))), expected(gpu(), Values(2, 3.0));
    Buffer<bf16, Cuda> dz(gpu(), 64);
    PendingSums<float> pending(memory.vec());
    const GateBackward<bf16> p{.dz = dz.mat(32, 2),
                               .dbias = dbias.vec(),
                               .dF = z.mat(32, 2),
                               .z = z.mat(32, 2),
                               .bias = bias.vec(),
                               .seq = Packed::uniform(4, 8),
                               .scratch = {},
                               .pending = &pending};
    gate_backward(gpu(), p);
    EXPECT_EQ(dbias.values(), Values(2, 3.0));
    dz.poison();
    EXPECT_THROW(gate_backward(gpu(), p), ContractError);           // dbias is someone's
    for (const double x : dz.values()) EXPECT_TRUE(std::isnan(x));  // nothing was written
    pending.clear();
    gate_backward(gpu(), p);
    finish_sums(gpu(), pending);
    GateBackward<bf16> alone = p;
    alone.pending = nullptr, alone.scratch = memory.vec(), alone.dbias = expected.vec();
    gate_backward(gpu(), alone);
    EXPECT_EQ(dbias.values(), expected.values());
    EXPECT_GT(dbias.values()[0], 3.5);  // 32 dF sigmoid(-1) and more
}

// Pairs of heads are read and written at once where they are aligned.
TEST(Gate, GpuDoesNotDependOnAddresses) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [lengths, heads] : std::vector<std::pair<Lengths, int>>{
             {{70, 3, 10}, 6}, {{70, 3, 10}, 5}, {{900, 1100}, 6}, {{20, 9000}, 4}, {{9000}, 6}, {{9000}, 1}}) {
        const Problem q(lengths, heads);
        const bool uniform = is_uniform(lengths);
        const Values F = forward<float>(gpu(), q, uniform);
        const Gradients g = backward<bf16>(gpu(), q, uniform);
        for (const std::int64_t gap : {1, 2, 3, 4}) {
            EXPECT_EQ(forward<float>(gpu(), q, uniform, gap), F) << heads << " heads, gap " << gap;
            const Gradients moved = backward<bf16>(gpu(), q, uniform, gap);
            EXPECT_EQ(moved.dz, g.dz) << heads << " heads, gap " << gap;
            EXPECT_EQ(moved.dbias, g.dbias) << heads << " heads, gap " << gap;
        }
    }
}

TEST(Gate, GpuLongSequence) {
    FIEDLER_GPU_OR_SKIP();
    expect_gpu_matches(Problem({(1 << 20) + 3}, 1), true);
}

TEST(Gate, GpuLongSequenceWithoutWorkspace) {
    FIEDLER_GPU_OR_SKIP();
    const Cuda plain;
    const Problem q({9000}, 3);
    EXPECT_TRUE(close(forward<float>(plain, q, true), q.naive_forward(), forward<float>(Cpu{}, q, true)));
}

// A chunk that says NaN is heard, and so is every chunk after it.
TEST(Gate, GpuNanIsSeenInLaterChunks) {
    FIEDLER_GPU_OR_SKIP();
    Problem q({10000}, 2);
    q.z[2 * 3000] = q.dF[2 * 7000 + 1] = std::nan("");
    const Values F = forward<float>(gpu(), q, true), dz = backward<bf16>(gpu(), q, true).dz;
    for (std::size_t i = 0; i < 10000; ++i) {
        EXPECT_EQ(std::isnan(F[2 * i]), i >= 3000) << i;
        EXPECT_FALSE(std::isnan(F[2 * i + 1])) << i;
        EXPECT_EQ(std::isnan(dz[2 * i]), i == 3000) << i;
        EXPECT_EQ(std::isnan(dz[2 * i + 1]), i <= 7000) << i;
    }
}

TEST(Gate, GpuLogSigmoidIsAccurateEverywhere) {
    FIEDLER_GPU_OR_SKIP();
    expect_exact_log_sigmoid<float>(gpu(), 0x1p-21, 0x1p-23);
}

TEST(Gate, GpuCarryContinuesASequence) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q({301}, 6);
    for (const std::int64_t step : {1, 7, 129, 301})
        EXPECT_TRUE(close(decode<float>(gpu(), q, step), q.naive_forward(), decode<float>(Cpu{}, q, step)));
    const Problem chunks({10007}, 3);
    for (const std::int64_t step : {5000, 10007})
        EXPECT_TRUE(
            close(decode<float>(gpu(), chunks, step), chunks.naive_forward(), decode<float>(Cpu{}, chunks, step)));
    const Problem cut({20000}, 3);  // and so is what continues
    EXPECT_TRUE(close(decode<float>(gpu(), cut, 9000), cut.naive_forward(), decode<float>(Cpu{}, cut, 9000)));
}

TEST(Gate, GpuNanIsSeen) {
    FIEDLER_GPU_OR_SKIP();
    Problem q({4, 4}, 1);
    q.z[5] = std::nan("");
    const Values F = forward<float>(gpu(), q, true), dz = backward<bf16>(gpu(), q, true).dz;
    for (std::size_t i = 0; i < 8; ++i) {
        EXPECT_EQ(std::isnan(F[i]), i >= 5) << i;
        EXPECT_EQ(std::isnan(dz[i]), i == 5) << i;
    }
}
#endif

}  // namespace
}  // namespace fiedler::test
