// conv_rotary: against conv and rotary one after the other, finite differences, and the GPU around its runs and blocks.
#include "kernels/conv_rotary.h"

#include <algorithm>

#include "kernels/conv.h"
#include "kernels/rotary.h"
#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Lengths = std::vector<std::int32_t>;
struct Parts {
    bool normalise, rotate;
};
const std::vector<Parts> kParts = {{true, true}, {true, false}, {false, true}, {false, false}};

struct Problem {
    Lengths lengths;
    Ragged ragged;
    std::int64_t width, heads, turned, tokens, channels;
    Parts parts{true, true};
    double eps = 1e-6;
    Values x, dy, w, dw0;

    Problem(const Lengths& n, std::int64_t d, std::int64_t h, std::int64_t t)
        : lengths(n), ragged(n), width(d), heads(h), turned(t), tokens(ragged.tokens()), channels(d * h) {
        x = round_to<bf16>(random_values(std::size_t(tokens * channels), 1));
        dy = round_to<bf16>(random_values(std::size_t(tokens * channels), 2));
        w = round_to<float>(random_values(std::size_t(4 * channels), 3));
        dw0 = round_to<float>(random_values(std::size_t(4 * channels), 4, 10.0));
    }
    template <class P>
    void fill(P& p) const {
        p.heads = std::int32_t(heads), p.normalise = parts.normalise, p.rotate = parts.rotate;
        p.eps = decltype(p.eps)(eps);
    }
    template <class P>
    void fill_turned(P& p) const {
        fill(p);
        p.turned = std::int32_t(turned);
    }
};

template <class T, class Dev>
Values forward(const Dev& dev, const Problem& q, bool uniform, std::int64_t gap = 0) {
    const Packing<Dev> packing(dev, q.lengths, uniform);
    const Padded<T, Dev> x(dev, q.tokens, q.channels, q.channels + gap, q.x),
        y(dev, q.tokens, q.channels, q.channels + 2 * gap);
    const Buffer<acc_t<T>, Dev> w(dev, to<acc_t<T>>(q.w));
    ConvRotaryForward<T> p;
    q.fill_turned(p);
    p.y = y.mat(), p.x = x.mat(), p.w = w.mat(q.channels, 4), p.seq = packing.seq;
    conv_rotary_forward(dev, p);
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
        scratch(dev, std::size_t(conv_rotary_pending_elements(q.tokens, q.channels)));
    ConvRotaryBackward<T> p;
    q.fill_turned(p);
    p.dx = dx.mat(), p.dw = dw.mat(q.channels, 4), p.dy = dy.mat(), p.x = x.mat(), p.w = w.mat(q.channels, 4);
    p.seq = packing.seq, p.pending = pending;
    if (!pending) p.scratch = scratch.vec();
    conv_rotary_backward(dev, p);
    if (pending) finish_sums(dev, *pending);
    return {dx.values(), dw.values()};
}

// The same by conv and rotary, one after the other.
struct TwoPasses {
    Values y, dx, dw;

    template <class T>
    static TwoPasses of(T, const Problem& q) {
        const Cpu cpu;
        const Packing<Cpu> packing(cpu, q.lengths, false);
        const Buffer<T, Cpu> x(cpu, to<T>(q.x)), dy(cpu, to<T>(q.dy)), w(cpu, to<T>(q.w)), dw(cpu, to<T>(q.dw0)),
            m(cpu, x.size()), y(cpu, x.size()), dm(cpu, to<T>(q.dy)), dx(cpu, x.size());
        const auto rows = [&](const Buffer<T, Cpu>& b) { return b.mat(q.tokens, q.channels); };
        const auto turned = [&](const Buffer<T, Cpu>& b) { return rows(b).columns(0, q.turned * q.width); };
        const Mat<T> weights = w.mat(q.channels, 4);
        conv_forward(cpu, ConvForward<T>{rows(m), rows(x), weights, packing.seq});
        copy_to_device(cpu, y.data(), m.data(), m.bytes());
        if (q.turned > 0) {
            RotaryForward<T> f;
            q.fill(f);
            f.heads = std::int32_t(q.turned), f.seq = packing.seq;
            f.y = turned(y), f.x = turned(m);
            rotary_forward(cpu, f);
            RotaryBackward<T> b;
            q.fill(b);
            b.heads = std::int32_t(q.turned), b.seq = packing.seq;
            b.dx = turned(dm), b.dy = turned(dy), b.x = turned(m);
            rotary_backward(cpu, b);
        }
        conv_backward(cpu, ConvBackward<T>{
                               rows(dx), dw.mat(q.channels, 4), rows(dm), rows(x), weights, packing.seq, {nullptr, 0}});
        return {y.values(), dx.values(), dw.values()};
    }
};

bool is_uniform(const Lengths& n) {
    return std::all_of(n.begin(), n.end(), [&](auto v) { return v == n[0]; });
}
const std::vector<Lengths> kLengths = {
    {1}, {3}, {7, 7}, {64, 64}, {63}, {65}, {300, 57}, {1, 1, 1, 1}, {1, 2, 3, 4, 5, 60, 1, 0, 257, 0}};

// body(problem, uniform) for every packing, width, share of turned heads, and part.
template <class Body>
void for_each_problem(Body&& body) {
    for (const Lengths& lengths : kLengths)
        for (const std::int64_t width : {2, 6, 16})
            for (const std::int64_t turned : {0, 2, 3}) {
                Problem q(lengths, width, 3, turned);
                for (const Parts& parts : kParts)
                    for (const bool uniform : {false, true}) {
                        if (uniform && !is_uniform(lengths)) continue;
                        SCOPED_TRACE(testing::Message() << testing::PrintToString(lengths) << ", width " << width
                                                        << ", turned " << turned << ", normalise " << parts.normalise
                                                        << ", rotate " << parts.rotate << ", uniform " << uniform);
                        q.parts = parts;
                        body(q, uniform);
                    }
            }
}

TEST(ConvRotary, MatchesConvThenRotary) {
    for_each_problem([](const Problem& q, bool uniform) {
        const Cpu cpu;
        const TwoPasses exact = TwoPasses::of(0.0, q), single = TwoPasses::of(0.f, q);
        const Gradients d = backward<double>(cpu, q, uniform, 3), f = backward<float>(cpu, q, uniform, 3);
        EXPECT_TRUE(close_to(forward<double>(cpu, q, uniform, 3), exact.y, 1e-14));
        EXPECT_TRUE(close_to(d.dx, exact.dx, 1e-14));
        EXPECT_TRUE(close_to(d.dw, exact.dw, 1e-14));
        EXPECT_TRUE(close(forward<float>(cpu, q, uniform, 3), exact.y, single.y));
        EXPECT_TRUE(close(f.dx, exact.dx, single.dx));
        EXPECT_TRUE(close(f.dw, exact.dw, single.dw));
    });
}

TEST(ConvRotary, GradientsMatchFiniteDifferences) {
    for (const Parts& parts : kParts) {
        SCOPED_TRACE(testing::Message() << "normalise " << parts.normalise << ", rotate " << parts.rotate);
        Problem q({1, 4, 70}, 4, 3, 2);
        q.parts = parts, q.eps = 0.1;
        q.dw0.assign(q.dw0.size(), 0.0);
        const Gradients g = backward<double>(Cpu{}, q, false);
        const auto objective = [&] { return inner(q.dy, forward<double>(Cpu{}, q, false)); };
        EXPECT_TRUE(gradient_matches(g.dx, q.x, objective));
        EXPECT_TRUE(gradient_matches(g.dw, q.w, objective));
    }
}

TEST(ConvRotary, DoesNotDependOnThreads) {
    const Problem q({700, 100}, 8, 3, 2);
    const Gradients one = backward<float>(Cpu{1}, q, false), many = backward<float>(Cpu{5}, q, false);
    EXPECT_EQ(one.dx, many.dx);
    EXPECT_EQ(one.dw, many.dw);
    EXPECT_EQ(forward<float>(Cpu{1}, q, false), forward<float>(Cpu{5}, q, false));
}

// Poisons one sequence and says whether the others saw it.
template <class T, class Dev>
void expect_sequences_apart(const Dev& dev) {
    Problem q({9, 30, 5, 40}, 16, 3, 2);
    for (std::int64_t i = 39 * q.channels; i < 44 * q.channels; ++i)
        q.x[std::size_t(i)] = q.dy[std::size_t(i)] = std::nan("");
    const Values y = forward<T>(dev, q, false), dx = backward<T>(dev, q, false).dx;
    for (std::int64_t i = 0; i < q.tokens * q.channels; ++i) {
        const bool poisoned = i >= 39 * q.channels && i < 44 * q.channels;
        ASSERT_EQ(std::isnan(y[std::size_t(i)]), poisoned) << "y of token " << i / q.channels;
        ASSERT_EQ(std::isnan(dx[std::size_t(i)]), poisoned) << "dx of token " << i / q.channels;
    }
}
TEST(ConvRotary, SequencesDoNotSeeEachOther) { expect_sequences_apart<double>(Cpu{}); }

TEST(ConvRotary, BrokenContractThrows) {
    const auto run = [](std::int64_t heads, std::int64_t turned) {
        Problem q({4}, 4, 2, 1);
        q.heads = heads, q.turned = turned;
        forward<double>(Cpu{}, q, true);
    };
    EXPECT_NO_THROW(run(2, 2));
    EXPECT_THROW(run(2, 3), ContractError);
    EXPECT_THROW(run(3, 1), ContractError);
}

#if FIEDLER_CUDA
void expect_gpu_matches(const Problem& q, bool uniform) {
    SCOPED_TRACE(testing::Message() << testing::PrintToString(q.lengths) << ", width " << q.width << ", heads "
                                    << q.heads << ", turned " << q.turned << ", normalise " << q.parts.normalise
                                    << ", rotate " << q.parts.rotate << ", uniform " << uniform);
    const Values y = forward<bf16>(gpu(), q, uniform, 8);
    EXPECT_TRUE(close(y, forward<double>(Cpu{}, q, uniform), round_to<bf16>(forward<float>(Cpu{}, q, uniform)))) << "y";
    EXPECT_EQ(y, forward<bf16>(gpu(), q, uniform, 8));
    const Gradients ref = backward<double>(Cpu{}, q, uniform), low = backward<float>(Cpu{}, q, uniform),
                    got = backward<bf16>(gpu(), q, uniform, 8), again = backward<bf16>(gpu(), q, uniform, 8);
    EXPECT_TRUE(close(got.dx, ref.dx, round_to<bf16>(low.dx))) << "dx";
    EXPECT_TRUE(close(got.dw, ref.dw, low.dw)) << "dw";
    EXPECT_EQ(got.dx, again.dx);
    EXPECT_EQ(got.dw, again.dw);
}

// Tokens around the runs (16, 32) and blocks (128, 256); then packings, with borders at, before and after those of runs.
const std::vector<Lengths> kGpuLengths = {{1},
                                          {3},
                                          {7},
                                          {15},
                                          {16},
                                          {17},
                                          {31},
                                          {32},
                                          {33},
                                          {34},
                                          {35},
                                          {127},
                                          {128},
                                          {129},
                                          {255},
                                          {256},
                                          {257},
                                          {258},
                                          {259},
                                          {257, 257},
                                          {1, 1, 1, 1, 1},
                                          {3, 3, 3, 3},
                                          {1, 2, 3, 4, 5, 60, 1, 31, 32, 33},
                                          {0, 5, 0, 0, 257, 0},
                                          {32, 32, 16, 16, 1, 31, 33, 64, 256, 2, 35, 29, 3}};

TEST(ConvRotary, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Lengths& lengths : kGpuLengths)
        for (const std::int64_t width : {16, 32, 64, 128}) {
            const std::int64_t columns = std::max<std::int64_t>(3, 96 / width * 3);
            Problem q(lengths, width, columns, columns / 3 * 2);
            for (const Parts& parts : kParts) {
                q.parts = parts;
                for (const bool uniform : {false, true})
                    if (!uniform || is_uniform(lengths)) expect_gpu_matches(q, uniform);
            }
        }
}

// Whole blocks of channels, of which two thirds are turned.
TEST(ConvRotary, GpuQueriesKeysAndValues) {
    FIEDLER_GPU_OR_SKIP();
    for (const Lengths& lengths : kGpuLengths)
        for (const std::int64_t width : {16, 64, 128})
            expect_gpu_matches(Problem(lengths, width, 384 / width, 256 / width), false);
    for (const Lengths& lengths : {Lengths{511}, {512, 512}, {513, 700}, {300, 1, 800}})
        expect_gpu_matches(Problem(lengths, 64, 6, 4), false);
}

// Heads that fill a block's 128 channels, or less or more, and blocks whose heads are turned in part or not at all.
TEST(ConvRotary, GpuSharesOfHeads) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t width : {16, 32, 64, 128})
        for (const std::int64_t heads : {1, 2, 3, 5, 8, 9})
            for (const std::int64_t turned : {std::int64_t(0), std::int64_t(1), heads - 1, heads})
                expect_gpu_matches(Problem({50, 1, 20}, width, heads, turned), false);
}

TEST(ConvRotary, GpuPendingSumsAreTheSame) {  // one list's memory serves one pass after the other
    FIEDLER_GPU_OR_SKIP();
    const Buffer<float, Cuda> memory(gpu(), std::size_t(conv_rotary_pending_elements(1024, 384)));
    PendingSums<float> pending(memory.vec());
    for (const Lengths& lengths : {Lengths{1}, {33}, {257}, {512, 512}, {300, 1, 700}})
        for (const std::int64_t turned : {0, 3, 4, 6}) {
            SCOPED_TRACE(testing::Message() << testing::PrintToString(lengths) << ", turned " << turned);
            const Problem q(lengths, 64, 6, turned);
            const Gradients own = backward<bf16>(gpu(), q, false), given = backward<bf16>(gpu(), q, false, 0, &pending);
            EXPECT_EQ(given.dx, own.dx);
            EXPECT_EQ(given.dw, own.dw);
        }
}

TEST(ConvRotary, GpuManyBlocksAndFarPositions) {  // dw from more blocks than the finishing kernel has rows
    FIEDLER_GPU_OR_SKIP();
    expect_gpu_matches(Problem(Lengths(9, 1024), 64, 3, 2), true);
    expect_gpu_matches(Problem({9000}, 64, 3, 2), true);
    expect_gpu_matches(Problem({1, 70000, 30}, 16, 3, 2), false);
}

// So many tokens that on an H200 the blocks have two jobs each; against the same sequences a few at a time.
void expect_large_batch_is_its_sequences(std::int64_t width, int length) {
    constexpr int kCount = 100, kParts = 5;
    const std::int64_t heads = 384 / width, turned = heads / 3 * 2;
    const Problem whole(Lengths(kCount, length), width, heads, turned);
    const Gradients all = backward<bf16>(gpu(), whole, true), again = backward<bf16>(gpu(), whole, true);
    EXPECT_EQ(all.dx, again.dx);
    EXPECT_EQ(all.dw, again.dw);
    Values dx, dw = whole.dw0;
    for (int part = 0; part < kParts; ++part) {
        Problem few(Lengths(kCount / kParts, length), width, heads, turned);
        const auto size = std::ptrdiff_t(few.x.size()), first = part * size;
        few.x.assign(whole.x.begin() + first, whole.x.begin() + first + size);
        few.dy.assign(whole.dy.begin() + first, whole.dy.begin() + first + size);
        few.w = whole.w;
        few.dw0.assign(few.dw0.size(), 0.0);
        const Gradients g = backward<bf16>(gpu(), few, true);
        dx.insert(dx.end(), g.dx.begin(), g.dx.end());
        for (std::size_t i = 0; i < dw.size(); ++i) dw[i] += g.dw[i];
    }
    EXPECT_TRUE(close_to(all.dx, dx, 8e-3));  // one bf16 may be rounded the other way
    EXPECT_TRUE(close_to(all.dw, dw, 1e-5));
}
TEST(ConvRotary, GpuLargeBatchIsItsSequences) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [width, length] : {std::pair(64, 680), {128, 680}, {64, 678}}) {  // 678: the last has one alone
        SCOPED_TRACE(testing::Message() << "width " << width << ", length " << length);
        expect_large_batch_is_its_sequences(width, length);
    }
}

TEST(ConvRotary, GpuSequencesDoNotSeeEachOther) {
    FIEDLER_GPU_OR_SKIP();
    expect_sequences_apart<bf16>(gpu());
}

TEST(ConvRotary, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    EXPECT_THROW(forward<bf16>(gpu(), Problem({4}, 48, 3, 2), true), ContractError);
    EXPECT_THROW(forward<bf16>(gpu(), Problem({4}, 16, 3, 2), true, 4), ContractError);
}
#endif

}  // namespace
}  // namespace fiedler::test
