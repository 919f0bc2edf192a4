// embedding: gather and its gradient in naive loops, and the GPU from all tokens distinct to one token everywhere.
#include "kernels/embedding.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

struct Problem {
    std::vector<std::int32_t> tokens;
    std::int64_t count, vocab, channels;
    Values table, dx, dtable0;

    Problem(const std::vector<std::int32_t>& t, std::int64_t v, std::int64_t c)
        : tokens(t), count(std::int64_t(t.size())), vocab(v), channels(c) {
        table = random_values(std::size_t(v * c), 1);
        dx = random_values(std::size_t(count * c), 2);
        dtable0 = random_values(std::size_t(v * c), 3);
    }
    template <class T>
    Problem& round() {
        for (Values* v : {&table, &dx}) *v = round_to<T>(*v);
        dtable0 = round_to<acc_t<T>>(dtable0);
        return *this;
    }
    Values naive_forward() const {
        Values x;
        for (const std::int64_t t : tokens)
            x.insert(x.end(), table.begin() + t * channels, table.begin() + (t + 1) * channels);
        return x;
    }
    Values naive_backward() const {
        Values d = dtable0;
        for (std::int64_t i = 0; i < count; ++i)
            for (std::int64_t c = 0; c < channels; ++c)
                d[std::size_t(tokens[std::size_t(i)] * channels + c)] += dx[std::size_t(i * channels + c)];
        return d;
    }
};

template <class T, class Dev>
Values forward(const Dev& dev, const Problem& q, std::int64_t gap = 0) {
    const Buffer<std::int32_t, Dev> tokens(dev, q.tokens);
    const Padded<T, Dev> table(dev, q.vocab, q.channels, q.channels + gap, q.table),
        x(dev, q.count, q.channels, q.channels + 2 * gap);
    embedding_forward(dev, EmbeddingForward<T>{x.mat(), tokens.vec(), table.mat()});
    return x.values();
}

template <class T, class Dev>
Values backward(const Dev& dev, const Problem& q, std::int64_t gap = 0) {
    const Buffer<std::int32_t, Dev> tokens(dev, q.tokens);
    const Padded<T, Dev> dx(dev, q.count, q.channels, q.channels + gap, q.dx);
    const Padded<acc_t<T>, Dev> dtable(dev, q.vocab, q.channels, q.channels + 2 * gap, q.dtable0);
    Buffer<std::uint8_t, Dev> scratch(dev, embedding_scratch_bytes(q.count, q.channels));
    scratch.zero();  // which are sums, too, as those of other memory
    const Vec<std::byte> lent(reinterpret_cast<std::byte*>(scratch.data()), std::int64_t(scratch.size()));
    embedding_order(dev, EmbeddingOrder{tokens.vec(), q.vocab, q.channels, lent});
    embedding_backward(dev, EmbeddingBackward<T>{dtable.mat(), tokens.vec(), dx.mat(), lent});
    return dtable.values();
}

std::vector<std::int32_t> distinct(std::int32_t n) {
    std::vector<std::int32_t> t(static_cast<std::size_t>(n));
    std::iota(t.rbegin(), t.rend(), 0);
    return t;
}
// A few tokens take most places, as words do.
std::vector<std::int32_t> frequent(std::size_t n, std::int32_t vocab) {
    const Values u = random_uniform(n, 9, 0, 1);
    std::vector<std::int32_t> t(n);
    for (std::size_t i = 0; i < n; ++i) t[i] = std::int32_t(std::pow(u[i], 6) * vocab);
    return t;
}

TEST(Embedding, DoubleMatchesNaiveLoopsAndFloatFollows) {
    for (const Problem& base :
         {Problem({0}, 1, 1), Problem({4, 0, 4}, 5, 7), Problem(distinct(65), 65, 8),
          Problem(random_ints(300, 5, 0, 40), 41, 70), Problem(std::vector<std::int32_t>(200, 3), 6, 33)}) {
        const Problem q = Problem(base).round<float>();
        SCOPED_TRACE(q.count);
        EXPECT_EQ(forward<double>(Cpu{}, q, 3), q.naive_forward());
        EXPECT_EQ(forward<float>(Cpu{}, q, 3), q.naive_forward());
        EXPECT_TRUE(close_to(backward<double>(Cpu{}, q, 3), q.naive_backward(), 1e-14));
        EXPECT_TRUE(close_to(backward<float>(Cpu{}, q, 3), q.naive_backward(), 2e-6));
    }
}

TEST(Embedding, GradientMatchesFiniteDifferences) {
    Problem q({2, 0, 2, 3}, 5, 3);
    q.dtable0.assign(q.dtable0.size(), 0.0);
    const Values d = backward<double>(Cpu{}, q);
    EXPECT_TRUE(gradient_matches(d, q.table, [&] { return inner(q.dx, forward<double>(Cpu{}, q)); }));
}

TEST(Embedding, DoesNotDependOnThreads) {
    const Problem q(frequent(500, 60), 60, 100);
    EXPECT_EQ(backward<float>(Cpu{1}, q), backward<float>(Cpu{5}, q));
}

// Who has scratch for so many tokens may have fewer.
TEST(Embedding, ScratchOfFewerTokensIsNoLarger) {
    for (std::int64_t n = 0; n < 200000; n += 1 + n / 500)
        EXPECT_LE(embedding_scratch_bytes(n, 384), embedding_scratch_bytes(n + 1, 384)) << n;
}

TEST(Embedding, BrokenContractThrows) {
    for (const std::int32_t token : {-1, 5}) {
        Problem q({0, 4}, 5, 8);
        EXPECT_NO_THROW(forward<float>(Cpu{}, q));
        q.tokens[1] = token;
        EXPECT_THROW(forward<float>(Cpu{}, q), ContractError);
        EXPECT_THROW(backward<float>(Cpu{}, q), ContractError);
    }
}

#if FIEDLER_CUDA
std::vector<Problem> gpu_problems() {
    const auto same = [](std::size_t n, std::int32_t token) { return std::vector<std::int32_t>(n, token); };
    std::vector<Problem> all;
    for (const std::int32_t n : {1, 3, 7, 31, 32, 33, 63, 64, 65, 514, 1024}) {
        all.emplace_back(random_ints(std::size_t(n), 5, 0, 50), 50, 64);
        all.emplace_back(same(std::size_t(n), 2), 3, 136);
        all.emplace_back(distinct(n), n, 8);
    }
    all.emplace_back(same(20000, 0), 1, 16);                      // one run longer than one step of the search
    all.emplace_back(random_ints(3000, 6, 0, 30522), 30522, 16);  // many blocks, 15 bits
    all.emplace_back(frequent(8192, 2000), 2000, 384);            // short and long runs side by side
    all.emplace_back(random_ints(700, 7, 0, 9), 9, 2056);         // long runs only, many channels
    std::vector<std::int32_t> edges;                              // runs of 31, 32, 33, 34, 1, 32, 33, 64, 1, 1
    for (const int length : {31, 32, 33, 34, 1, 32, 33, 64, 1, 1}) {
        const auto token = std::int32_t(edges.size());
        edges.insert(edges.end(), std::size_t(length), token);
    }
    all.emplace_back(edges, std::int64_t(edges.size()), 24);
    // Runs that one block sums and such that several share, up to more of them than are added up in one step.
    std::vector<std::int32_t> shared;
    std::int32_t token = 0;
    for (const int length : {255, 256, 257, 16, 17, 15, 1, 2047, 2048, 2049, 63, 23, 24, 25, 24, 25, 24, 33, 4200, 1}) {
        shared.insert(shared.end(), std::size_t(length), token);
        ++token;
    }
    all.emplace_back(shared, token, 24);
    std::shuffle(shared.begin(), shared.end(), std::mt19937_64(10));
    all.emplace_back(shared, token, 264);
    all.emplace_back(random_ints(40000, 11, 0, 3), 3, 16);
    all.emplace_back(frequent(20000, 5000), 5000, 392);  // two shares of the channels
    return all;
}

TEST(Embedding, GpuForwardCopies) {
    FIEDLER_GPU_OR_SKIP();
    for (Problem& q : gpu_problems()) {
        SCOPED_TRACE(testing::Message() << q.count << " tokens, vocab " << q.vocab << ", channels " << q.channels);
        q.round<bf16>();
        EXPECT_EQ(forward<bf16>(gpu(), q, 8), q.naive_forward());
    }
}

TEST(Embedding, GpuBackwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (Problem& q : gpu_problems()) {
        SCOPED_TRACE(testing::Message() << q.count << " tokens, vocab " << q.vocab << ", channels " << q.channels);
        q.round<bf16>();
        const Values got = backward<bf16>(gpu(), q, 8);
        EXPECT_TRUE(close(got, backward<double>(Cpu{}, q), backward<float>(Cpu{}, q)));
        EXPECT_EQ(got, backward<bf16>(gpu(), q, 8));
    }
}

// Nor do sums that are no numbers hold up those who wait for them.
TEST(Embedding, GpuPassesOnWhatIsNoNumber) {
    FIEDLER_GPU_OR_SKIP();
    Problem q = Problem(std::vector<std::int32_t>(3000, 1), 3, 16).round<bf16>();
    const Buffer<std::int32_t, Cuda> tokens(gpu(), q.tokens);
    const Buffer<bf16, Cuda> dx(gpu(), q.dx.size());  // all bits set
    const Padded<float, Cuda> dtable(gpu(), q.vocab, q.channels, q.channels, q.dtable0);
    Buffer<std::uint8_t, Cuda> scratch(gpu(), embedding_scratch_bytes(q.count, q.channels));
    scratch.zero();
    const Vec<std::byte> lent(reinterpret_cast<std::byte*>(scratch.data()), std::int64_t(scratch.size()));
    embedding_order(gpu(), EmbeddingOrder{tokens.vec(), q.vocab, q.channels, lent});
    embedding_backward(gpu(), EmbeddingBackward<bf16>{dtable.mat(), tokens.vec(), dx.mat(q.count, q.channels), lent});
    const Values got = dtable.values();
    for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(std::isnan(got[i]), i / 16 == 1) << i;
    for (double& x : q.dx) x = 1e38;
    const Values infinite = backward<bf16>(gpu(), q.round<bf16>());
    for (std::size_t i = 16; i < 32; ++i) EXPECT_EQ(infinite[i], INFINITY);
}

// One order, which comes from a branch, and several gradients after it; then all of it recorded and launched twice. Each
// time the tokens come just before, and what the last order left is gone.
TEST(Embedding, GpuOrderBesideOtherWork) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q = Problem(frequent(8192, 2000), 2000, 136).round<bf16>();
    const Buffer<std::int32_t, Cuda> source(gpu(), q.tokens);
    Buffer<std::int32_t, Cuda> tokens(gpu(), q.tokens.size());
    const Padded<bf16, Cuda> dx(gpu(), q.count, q.channels, q.channels, Values(q.dx.size()));
    const Padded<bf16, Cuda> later(gpu(), q.count, q.channels, q.channels, q.dx);
    const Padded<float, Cuda> dtable(gpu(), q.vocab, q.channels, q.channels, Values(q.dtable0.size()));
    Buffer<std::uint8_t, Cuda> scratch(gpu(), embedding_scratch_bytes(q.count, q.channels));
    const Vec<std::byte> lent(reinterpret_cast<std::byte*>(scratch.data()), std::int64_t(scratch.size()));
    const EmbeddingBackward<bf16> p{dtable.mat(), tokens.vec(), dx.mat(), lent};
    const auto gradients = [&](int times) {
        scratch.zero(), tokens.zero();
        copy_on_device(gpu(), tokens.data(), source.data(), source.bytes());
        branch(gpu(), [&] { embedding_order(gpu(), EmbeddingOrder{tokens.vec(), q.vocab, q.channels, lent}); });
        fill_bytes(gpu(), dtable.mat().data, 0, q.dtable0.size() * sizeof(float));
        copy_on_device(gpu(), dx.mat().data, later.mat().data, q.dx.size() * sizeof(bf16));
        join(gpu());
        for (int i = 0; i < times; ++i) embedding_backward(gpu(), p);
    };
    Problem zero = q;
    zero.dtable0.assign(zero.dtable0.size(), 0.0);
    const Values one = backward<bf16>(gpu(), zero);
    gradients(1);
    EXPECT_EQ(dtable.values(), one);
    gradients(2);
    Values twice = one;
    for (double& x : twice) x *= 2;
    EXPECT_EQ(dtable.values(), twice);
    CudaGraph* const graph = graph_record(gpu(), [&] { gradients(1); });
    for (int i = 0; i < 2; ++i) {
        fill_bytes(gpu(), dtable.mat().data, 0xff, q.dtable0.size() * sizeof(float));
        graph_launch(gpu(), graph);
        EXPECT_EQ(dtable.values(), one);
    }
    graph_free(graph);
}

// Whatever becomes of a branch's work, and wherever nobody joins, the context can be used as before.
TEST(Embedding, GpuBranchesEnd) {
    FIEDLER_GPU_OR_SKIP();
    struct Failure {};
    const Buffer<std::uint8_t, Cuda> bytes(gpu(), std::size_t(1) << 24);
    const auto fill = [&](int value) {  // takes its time, and is done with the last of many
        branch(gpu(), [&] {
            for (int i = 200; i >= 0; --i) fill_bytes(gpu(), bytes.data(), value + i, bytes.size());
        });
    };
    const auto last = [&] {
        std::uint8_t byte = 0;
        copy_to_host(gpu(), &byte, bytes.data() + bytes.size() - 1, 1);
        return int(byte);
    };
    const auto fail = [&] { branch(gpu(), [] { throw Failure(); }); };
    fill(1), fill(2);
    synchronize(gpu());
    EXPECT_EQ(last(), 2);
    EXPECT_THROW(fail(), Failure);
    EXPECT_THROW(graph_free(graph_record(gpu(), [&] { fill(3), fail(); })), Failure);
    EXPECT_THROW(graph_free(graph_record(gpu(), [&] { fill(3), throw Failure(); })), Failure);
    fill(4), join(gpu());
    EXPECT_EQ(last(), 4);
    fill(5);  // ended by a recording, which has one of its own that nobody joins
    CudaGraph* const graph = graph_record(gpu(), [&] { fill(6); });
    EXPECT_EQ(last(), 5);
    graph_launch(gpu(), graph);
    EXPECT_EQ(last(), 6);
    graph_free(graph);
}

TEST(Embedding, GpuRowsOfAbsentTokensAreUntouched) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q = Problem(random_ints(100, 8, 10, 20), 300, 16).round<bf16>();
    const Values got = backward<bf16>(gpu(), q);
    for (std::size_t i = 0; i < got.size(); ++i)
        if (i / 16 < 10 || i / 16 >= 20) {
            EXPECT_EQ(got[i], q.dtable0[i]);
        }
}

TEST(Embedding, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q({0, 1}, 2, 12);
    EXPECT_THROW(forward<bf16>(gpu(), q), ContractError);
    EXPECT_THROW(backward<bf16>(gpu(), q), ContractError);
    const Buffer<std::int32_t, Cuda> tokens(gpu(), q.tokens);
    const Buffer<std::uint8_t, Cuda> scratch(gpu(), embedding_scratch_bytes(q.count, 8) - 1);
    const Vec<std::byte> lent(reinterpret_cast<std::byte*>(scratch.data()), std::int64_t(scratch.size()));
    EXPECT_THROW(embedding_order(gpu(), EmbeddingOrder{tokens.vec(), q.vocab, 8, lent}), ContractError);
}
#endif

}  // namespace
}  // namespace fiedler::test
