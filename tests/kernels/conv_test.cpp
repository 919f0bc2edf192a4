// conv: the formula in naive loops, finite differences, ragged packing, and the GPU around its runs and blocks.
#include "kernels/conv.h"

#include <algorithm>
#include <memory>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Lengths = std::vector<std::int32_t>;

struct Problem {
    Lengths lengths;
    Ragged ragged;
    std::int64_t tokens, channels;
    Values x, dy, w, dw0;

    Problem(const Lengths& n, std::int64_t c) : lengths(n), ragged(n), tokens(ragged.tokens()), channels(c) {
        x = random_values(std::size_t(tokens * c), 1);
        dy = random_values(std::size_t(tokens * c), 2);
        w = random_values(std::size_t(4 * c), 3);
        dw0 = random_values(std::size_t(4 * c), 4, 10.0);
    }
    template <class T>
    Problem& round() {
        for (Values* v : {&x, &dy}) *v = round_to<T>(*v);
        for (Values* v : {&w, &dw0}) *v = round_to<acc_t<T>>(*v);
        return *this;
    }
    // body(i, j, k, c): token i takes w_ck x_jc
    template <class Body>
    void for_terms(Body&& body) const {
        for (std::int64_t i = 0; i < tokens; ++i)
            for (std::int64_t k = 0; k < 4; ++k)
                if (const std::int64_t j = i - 3 + k; j >= ragged.begin[std::size_t(i)])
                    for (std::int64_t c = 0; c < channels; ++c)
                        body(std::size_t(i * channels + c), std::size_t(j * channels + c), std::size_t(c * 4 + k));
    }
    Values naive_forward() const {
        Values y(x.size(), 0.0);
        for_terms([&](auto i, auto j, auto ck) { y[i] += w[ck] * x[j]; });
        return y;
    }
    Values naive_dx() const {
        Values dx(x.size(), 0.0);
        for_terms([&](auto i, auto j, auto ck) { dx[j] += w[ck] * dy[i]; });
        return dx;
    }
    Values naive_dw() const {
        Values dw = dw0;
        for_terms([&](auto i, auto j, auto ck) { dw[ck] += dy[i] * x[j]; });
        return dw;
    }
};

template <class T, class Dev>
Values forward(const Dev& dev, const Problem& q, bool uniform, std::int64_t gap = 0) {
    const Packing<Dev> packing(dev, q.lengths, uniform);
    const Padded<T, Dev> x(dev, q.tokens, q.channels, q.channels + gap, q.x),
        y(dev, q.tokens, q.channels, q.channels + 2 * gap);
    const Buffer<acc_t<T>, Dev> w(dev, to<acc_t<T>>(q.w));
    conv_forward(dev, ConvForward<T>{y.mat(), x.mat(), w.mat(q.channels, 4), packing.seq});
    return y.values();
}

struct Gradients {
    Values dx, dw;
};
// pending: instead of scratch.
template <class T, class Dev>
Gradients backward(const Dev& dev, const Problem& q, bool uniform, std::int64_t gap = 0,
                   PendingSums<acc_t<T>>* pending = nullptr) {
    const Packing<Dev> packing(dev, q.lengths, uniform);
    const Padded<T, Dev> x(dev, q.tokens, q.channels, q.channels + gap, q.x),
        dy(dev, q.tokens, q.channels, q.channels + 2 * gap, q.dy), dx(dev, q.tokens, q.channels, q.channels + 3 * gap);
    const Buffer<acc_t<T>, Dev> w(dev, to<acc_t<T>>(q.w)), dw(dev, to<acc_t<T>>(q.dw0)),
        scratch(dev, std::size_t(conv_pending_elements(q.tokens, q.channels)));
    conv_backward(dev, ConvBackward<T>{dx.mat(), dw.mat(q.channels, 4), dy.mat(), x.mat(), w.mat(q.channels, 4),
                                       packing.seq, pending ? Vec<acc_t<T>>{} : scratch.vec(), pending});
    if (pending) finish_sums(dev, *pending);
    return {dx.values(), dw.values()};
}

const std::vector<std::pair<Lengths, int>> kShapes = {
    {{1}, 1},      {{3}, 7}, {{7, 7}, 8}, {{64, 64, 64}, 5}, {{1, 2, 3, 4, 5, 60, 1}, 9}, {{0, 5, 0, 0, 257, 0}, 3},
    {{1, 1, 1}, 2}};
bool is_uniform(const Lengths& n) {
    return std::all_of(n.begin(), n.end(), [&](auto v) { return v == n[0]; });
}

TEST(Conv, DoubleMatchesNaiveLoopsAndFloatFollows) {
    const Cpu cpu;
    for (const auto& [lengths, channels] : kShapes)
        for (const bool uniform : {false, true}) {
            if (uniform && !is_uniform(lengths)) continue;
            SCOPED_TRACE(testing::PrintToString(lengths));
            const Problem q = Problem(lengths, channels).round<float>();
            EXPECT_TRUE(close_to(forward<double>(cpu, q, uniform, 3), q.naive_forward(), 1e-14));
            EXPECT_TRUE(close_to(forward<float>(cpu, q, uniform, 3), q.naive_forward(), 1e-6));
            const Gradients d = backward<double>(cpu, q, uniform, 3), f = backward<float>(cpu, q, uniform, 3);
            EXPECT_TRUE(close_to(d.dx, q.naive_dx(), 1e-14));
            EXPECT_TRUE(close_to(d.dw, q.naive_dw(), 1e-14));
            EXPECT_TRUE(close_to(f.dx, q.naive_dx(), 1e-6));
            EXPECT_TRUE(close_to(f.dw, q.naive_dw(), 5e-6));
        }
}

TEST(Conv, IdentityWeightsCopy) {
    Problem q({5, 9}, 6);
    for (std::size_t i = 0; i < q.w.size(); ++i) q.w[i] = i % 4 == 3;
    EXPECT_EQ(forward<double>(Cpu{}, q, false), q.x);
    EXPECT_EQ(backward<double>(Cpu{}, q, false).dx, q.dy);
}

TEST(Conv, GradientsMatchFiniteDifferences) {
    Problem q({1, 4, 7}, 3);
    q.dw0.assign(q.dw0.size(), 0.0);
    const Gradients g = backward<double>(Cpu{}, q, false);
    const auto objective = [&] { return inner(q.dy, forward<double>(Cpu{}, q, false)); };
    EXPECT_TRUE(gradient_matches(g.dx, q.x, objective));
    EXPECT_TRUE(gradient_matches(g.dw, q.w, objective));
}

TEST(Conv, DoesNotDependOnThreads) {
    const Problem q({700, 100}, 24);
    const Gradients one = backward<float>(Cpu{1}, q, false), many = backward<float>(Cpu{5}, q, false);
    EXPECT_EQ(one.dx, many.dx);
    EXPECT_EQ(one.dw, many.dw);
}

// Poisons one sequence and says whether the others saw it.
template <class T, class Dev>
void expect_sequences_apart(const Dev& dev, std::int64_t channels) {
    Problem q({9, 30, 5, 40}, channels);
    for (std::int64_t i = 39 * channels; i < 44 * channels; ++i)
        q.x[std::size_t(i)] = q.dy[std::size_t(i)] = std::nan("");
    const Values y = forward<T>(dev, q, false), dx = backward<T>(dev, q, false).dx;
    for (std::int64_t i = 0; i < q.tokens * channels; ++i) {
        const bool poisoned = i >= 39 * channels && i < 44 * channels;
        ASSERT_EQ(std::isnan(y[std::size_t(i)]), poisoned) << "y of token " << i / channels;
        ASSERT_EQ(std::isnan(dx[std::size_t(i)]), poisoned) << "dx of token " << i / channels;
    }
}
TEST(Conv, SequencesDoNotSeeEachOther) { expect_sequences_apart<double>(Cpu{}, 3); }

TEST(Conv, BrokenContractThrows) {
    Values x(8), y(8), w(8);
    const auto run = [&](std::int32_t length, std::int64_t ld_w) {
        conv_forward(Cpu{},
                     ConvForward<double>{
                         {y.data(), 4, 2}, {x.data(), 4, 2}, {w.data(), 2, 4, ld_w}, Packed::uniform(1, length)});
    };
    EXPECT_NO_THROW(run(4, 4));
    EXPECT_THROW(run(5, 4), ContractError);
    EXPECT_THROW(run(4, 5), ContractError);
}

#if FIEDLER_CUDA
// Tokens around the runs (16, 32) and blocks (128, 256), channels around a block's 128; then packings.
const std::vector<std::pair<Lengths, int>> kGpuShapes = {{{1}, 8},
                                                         {{3}, 16},
                                                         {{7}, 64},
                                                         {{15}, 8},
                                                         {{16}, 128},
                                                         {{17}, 136},
                                                         {{63}, 120},
                                                         {{64}, 384},
                                                         {{65}, 264},
                                                         {{127}, 8},
                                                         {{128}, 16},
                                                         {{129}, 24},
                                                         {{257, 257}, 384},
                                                         {{514}, 384},
                                                         {{1024}, 64},
                                                         {{100, 100, 100}, 2056},
                                                         {{1, 1, 1, 1, 1}, 16},
                                                         {{3, 3, 3, 3}, 8},
                                                         {{1, 2, 3, 4, 5, 60, 1, 31, 32, 33}, 40},
                                                         {{0, 5, 0, 0, 257, 0}, 136},
                                                         {{2000, 1, 47}, 64},
                                                         {{16, 16, 32, 32, 1, 128, 256}, 72}};

TEST(Conv, GpuForwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [lengths, channels] : kGpuShapes)
        for (const bool uniform : {false, true}) {
            if (uniform && !is_uniform(lengths)) continue;
            SCOPED_TRACE(testing::Message() << testing::PrintToString(lengths) << " x " << channels << uniform);
            const Problem q = Problem(lengths, channels).round<bf16>();
            const Values ref = forward<double>(Cpu{}, q, uniform),
                         low = round_to<bf16>(forward<float>(Cpu{}, q, uniform));
            const Values got = forward<bf16>(gpu(), q, uniform, 8);
            EXPECT_TRUE(close(got, ref, low));
            EXPECT_EQ(got, forward<bf16>(gpu(), q, uniform, 8));
        }
}

TEST(Conv, GpuBackwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [lengths, channels] : kGpuShapes)
        for (const bool uniform : {false, true}) {
            if (uniform && !is_uniform(lengths)) continue;
            SCOPED_TRACE(testing::Message() << testing::PrintToString(lengths) << " x " << channels << uniform);
            const Problem q = Problem(lengths, channels).round<bf16>();
            const Gradients ref = backward<double>(Cpu{}, q, uniform), low = backward<float>(Cpu{}, q, uniform),
                            got = backward<bf16>(gpu(), q, uniform, 8), again = backward<bf16>(gpu(), q, uniform, 8);
            EXPECT_TRUE(close(got.dx, ref.dx, round_to<bf16>(low.dx)));
            EXPECT_TRUE(close(got.dw, ref.dw, low.dw));
            EXPECT_EQ(got.dx, again.dx);
            EXPECT_EQ(got.dw, again.dw);
        }
}

TEST(Conv, GpuManyBlocks) {  // dw from more blocks than the finishing kernel has rows
    FIEDLER_GPU_OR_SKIP();
    const Problem q = Problem(Lengths(9, 1024), 136).round<bf16>();
    const Gradients ref = backward<double>(Cpu{}, q, true), low = backward<float>(Cpu{}, q, true),
                    got = backward<bf16>(gpu(), q, true);
    EXPECT_TRUE(close(got.dx, ref.dx, round_to<bf16>(low.dx)));
    EXPECT_TRUE(close(got.dw, ref.dw, low.dw));
    EXPECT_TRUE(
        close(forward<bf16>(gpu(), q, true), q.naive_forward(), round_to<bf16>(forward<float>(Cpu{}, q, true))));
}

TEST(Conv, GpuPendingSumsAreTheSame) {  // one list's memory serves one pass after the other
    FIEDLER_GPU_OR_SKIP();
    const Buffer<float, Cuda> memory(gpu(), std::size_t(conv_pending_elements(2048, 2056)));
    PendingSums<float> pending(memory.vec());
    for (const auto& [lengths, channels] : kGpuShapes) {
        SCOPED_TRACE(testing::Message() << testing::PrintToString(lengths) << " x " << channels);
        const Problem q = Problem(lengths, channels).round<bf16>();
        const Gradients own = backward<bf16>(gpu(), q, false), given = backward<bf16>(gpu(), q, false, 0, &pending);
        EXPECT_EQ(given.dx, own.dx);
        EXPECT_EQ(given.dw, own.dw);
    }
}

TEST(Conv, GpuPendingSumsWait) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<bf16, Cuda> x(gpu(), Values(300 * 8, 1.0));
    Buffer<bf16, Cuda> dx(gpu(), 300 * 8);
    const Buffer<float, Cuda> w(gpu(), Values(32, 1.0)), dw(gpu(), Values(32, 3.0)),
        memory(gpu(), std::size_t(2 * conv_pending_elements(300, 8)));
    PendingSums<float> pending(memory.vec());
    const ConvBackward<bf16> p{.dx = dx.mat(300, 8),
                               .dw = dw.mat(8, 4),
                               .dy = x.mat(300, 8),
                               .x = x.mat(300, 8),
                               .w = w.mat(8, 4),
                               .seq = Packed::uniform(1, 300),
                               .scratch = {},
                               .pending = &pending};
    conv_backward(gpu(), p);
    EXPECT_EQ(dw.values(), Values(32, 3.0));
    dx.poison();
    EXPECT_THROW(conv_backward(gpu(), p), ContractError);               // dw is someone's
    EXPECT_THROW(conv_backward(gpu(), p), ContractError);               // the memory is full
    for (const double one : dx.values()) EXPECT_TRUE(std::isnan(one));  // nothing was written
    finish_sums(gpu(), pending);
    Values expected(32);
    for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = 3.0 + 297.0 + double(i % 4);  // terms of a tap
    EXPECT_EQ(dw.values(), expected);
}

TEST(Conv, GpuResultsDoNotDependOnTheCache) {  // whose size decides which rows it keeps
    FIEDLER_GPU_OR_SKIP();
    const auto without = std::make_unique<Cuda>();
    without->l2_bytes = 0;
    for (const auto& [lengths, channels] : kGpuShapes) {
        SCOPED_TRACE(testing::Message() << testing::PrintToString(lengths) << " x " << channels);
        const Problem q = Problem(lengths, channels).round<bf16>();
        const Gradients with = backward<bf16>(gpu(), q, false, 8), got = backward<bf16>(*without, q, false, 8);
        EXPECT_EQ(got.dx, with.dx);
        EXPECT_EQ(got.dw, with.dw);
    }
}

TEST(Conv, GpuSequencesDoNotSeeEachOther) {
    FIEDLER_GPU_OR_SKIP();
    expect_sequences_apart<bf16>(gpu(), 16);
}

TEST(Conv, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    EXPECT_THROW(forward<bf16>(gpu(), Problem({4}, 12), true), ContractError);
    EXPECT_THROW(forward<bf16>(gpu(), Problem({4}, 16), true, 4), ContractError);
}
#endif

}  // namespace
}  // namespace fiedler::test
