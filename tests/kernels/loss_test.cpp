// loss: closed forms, finite differences, and the GPU kernel in each of its ways through a row.
#include "kernels/loss.h"

#include <functional>

#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

struct Problem {
    std::int64_t rows, vocab, ld;
    Values logits;  // rows x vocab
    std::vector<std::int32_t> targets;
    double scale = 0.125;

    Problem(std::int64_t r, std::int64_t v, std::int64_t stride, double spread = 3)
        : rows(r),
          vocab(v),
          ld(stride),
          logits(random_values(static_cast<std::size_t>(r * v), 7, spread)),
          targets(random_ints(static_cast<std::size_t>(r), 8, 0, static_cast<std::int32_t>(v))) {
        if (r > 2) targets[1] = -1;                     // ignored
        targets[0] = static_cast<std::int32_t>(v - 1);  // the last column
        if (r > 3) targets[2] = 0;                      // and the first
    }
    std::vector<double> padded(double filler) const {
        Values p(static_cast<std::size_t>(rows * ld), filler);
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t v = 0; v < vocab; ++v) p[std::size_t(i * ld + v)] = logits[std::size_t(i * vocab + v)];
        return p;
    }
};

struct Answer {
    Values losses, dlogits;  // dlogits: rows x ld
};

Answer naive(const Problem& q) {
    Answer a{Values(std::size_t(q.rows), 0.0), Values(std::size_t(q.rows * q.ld), 0.0)};
    for (std::int64_t i = 0; i < q.rows; ++i) {
        const auto t = q.targets[std::size_t(i)];
        if (t < 0) continue;
        const double* x = q.logits.data() + i * q.vocab;
        const double top = *std::max_element(x, x + q.vocab);
        double sum = 0;
        for (std::int64_t v = 0; v < q.vocab; ++v) sum += std::exp(x[v] - top);
        a.losses[std::size_t(i)] = std::log(sum) + top - x[t];
        for (std::int64_t v = 0; v < q.vocab; ++v)
            a.dlogits[std::size_t(i * q.ld + v)] = (std::exp(x[v] - top) / sum - (v == t ? 1.0 : 0.0)) * q.scale;
    }
    return a;
}

template <class T>
Answer on_cpu(const Problem& q, int threads = 0) {
    const Cpu cpu{threads};
    const Buffer<T, Cpu> logits(cpu, to<T>(q.padded(std::nan("")))), losses(cpu, std::size_t(q.rows));
    LossForward<T> p;
    p.logits = {logits.data(), q.rows, q.vocab, q.ld};
    p.losses = losses.vec();
    p.targets = {q.targets.data(), q.rows};
    p.scale = static_cast<T>(q.scale);
    loss_forward(cpu, p);
    return {losses.values(), logits.values()};
}

TEST(Loss, MatchesNaiveFormula) {
    for (const std::int64_t vocab : {1, 2, 3, 7, 63, 64, 65, 514, 3001}) {
        SCOPED_TRACE(vocab);
        const Problem q(5, vocab, vocab + 3);
        const Answer ref = naive(q), got = on_cpu<double>(q);
        EXPECT_TRUE(close_to(got.losses, ref.losses, 1e-13));
        EXPECT_TRUE(close_to(got.dlogits, ref.dlogits, 1e-13));
        Problem f = q;
        f.logits = round_to<float>(q.logits);
        const Answer low = on_cpu<float>(f), exact = naive(f);
        EXPECT_TRUE(close_to(low.losses, exact.losses, 2e-6));
        EXPECT_TRUE(close_to(low.dlogits, exact.dlogits, 2e-6));
    }
}

TEST(Loss, GradientMatchesFiniteDifferences) {
    Problem q(4, 11, 11);
    const Cpu cpu;
    const auto objective = [&] {
        Values x = q.logits, losses(4);
        LossForward<double> p;
        p.logits = {x.data(), 4, 11};
        p.losses = {losses.data(), 4};
        p.targets = {q.targets.data(), 4};
        p.gradient = false;
        loss_forward(cpu, p);
        EXPECT_TRUE(identical(x.data(), q.logits.data(), x.size() * sizeof(double))) << "logits changed";
        return q.scale * inner(Values(4, 1.0), losses);
    };
    EXPECT_TRUE(gradient_matches(on_cpu<double>(q).dlogits, q.logits, objective));
}

TEST(Loss, LargeLogitsStayFinite) {
    Problem q(3, 70, 70);
    for (double& v : q.logits) v = v * 1e4 + 1e6;
    q.logits = round_to<float>(q.logits);
    const Answer got = on_cpu<float>(q), ref = naive(q);
    EXPECT_TRUE(close_to(got.losses, ref.losses, 1e-6));
    EXPECT_TRUE(close_to(got.dlogits, ref.dlogits, 1e-5));
}

TEST(Loss, NanShows) {
    Problem q(3, 70, 70);
    for (const std::size_t at : {std::size_t(5), std::size_t(69)}) {
        Problem bad = q;
        bad.logits[at] = std::nan("");
        EXPECT_TRUE(std::isnan(on_cpu<float>(bad).losses[0])) << at;
        EXPECT_TRUE(std::isnan(on_cpu<double>(bad).losses[0])) << at;
    }
}

TEST(Loss, DoesNotDependOnThreads) {
    const Problem q(37, 515, 520);
    const Answer one = on_cpu<float>(q, 1), four = on_cpu<float>(q, 4);
    EXPECT_TRUE(identical(one.losses.data(), four.losses.data(), one.losses.size() * sizeof(double)));
    EXPECT_TRUE(identical(one.dlogits.data(), four.dlogits.data(), one.dlogits.size() * sizeof(double)));
}

TEST(Loss, TargetBeyondVocabularyThrows) {
    Problem q(3, 10, 10);
    q.targets[2] = 10;
    EXPECT_THROW(on_cpu<float>(q), ContractError);
}

TEST(Loss, SumAddsToTotal) {
    const Cpu cpu;
    Values losses = random_values(1001, 9);
    double total = 5, ref = 5;
    for (const double v : losses) ref += v;
    loss_sum(cpu, LossSum<double>{{&total, 1}, {losses.data(), 1001}});
    EXPECT_NEAR(total, ref, 1e-11);
    std::vector<float> ones(20000001, 1.f);  // more than f32 can count to one by one
    float large = 0;
    loss_sum(cpu, LossSum<float>{{&large, 1}, {ones.data(), std::int64_t(ones.size())}});
    EXPECT_EQ(large, 20000000.f);  // 20000001 rounded to f32
}

#if FIEDLER_CUDA

struct OnGpu {
    Values losses;
    std::vector<bf16> logits;
    bool operator==(const OnGpu& o) const {
        return losses == o.losses && logits.size() == o.logits.size() &&
               std::memcmp(logits.data(), o.logits.data(), logits.size() * sizeof(bf16)) == 0;
    }
};

OnGpu on_gpu(const Problem& q, bool gradient, std::size_t offset = 0) {
    Values in = q.padded(std::nan(""));
    in.insert(in.begin(), offset, std::nan(""));
    const Buffer<bf16, Cuda> logits(gpu(), in);
    const Buffer<float, Cuda> losses(gpu(), std::size_t(q.rows));
    const Buffer<std::int32_t, Cuda> targets(gpu(), q.targets);
    LossForward<bf16> p;
    p.logits = {logits.data() + offset, q.rows, q.vocab, q.ld};
    p.losses = losses.vec();
    p.targets = targets.vec();
    p.scale = static_cast<float>(q.scale);
    p.gradient = gradient;
    loss_forward(gpu(), p);
    std::vector<bf16> out = logits.host();
    out.erase(out.begin(), out.begin() + std::ptrdiff_t(offset));
    return {losses.values(), out};
}

void check_on_gpu(std::int64_t rows, std::int64_t vocab, std::int64_t ld, std::size_t offset = 0) {
    SCOPED_TRACE(testing::Message() << rows << " x " << vocab << ", stride " << ld << ", offset " << offset);
    Problem q(rows, vocab, ld);
    q.logits = round_to<bf16>(q.logits);
    const Answer ref = naive(q), low = on_cpu<float>(q);
    const OnGpu got = on_gpu(q, true, offset);
    EXPECT_TRUE(close(got.losses, ref.losses, low.losses));
    EXPECT_TRUE(close(from(got.logits), ref.dlogits, round_to<bf16>(low.dlogits)));
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t c = 0; c < ld; ++c)
            if (c >= vocab || q.targets[std::size_t(i)] < 0) {
                ASSERT_EQ(float(got.logits[std::size_t(i * ld + c)]), 0.f) << "row " << i << ", column " << c;
            }
    EXPECT_TRUE(got == on_gpu(q, true, offset)) << "not bit-equal from run to run";

    const OnGpu forward = on_gpu(q, false, offset);
    EXPECT_EQ(forward.losses, got.losses) << "the loss depends on whether the gradient is asked for";
    const std::vector<bf16> in = to<bf16>(q.padded(std::nan("")));
    EXPECT_TRUE(identical(forward.logits.data(), in.data(), in.size() * sizeof(bf16))) << "logits changed";
}

TEST(Loss, GpuSmallMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t vocab : {1, 3, 7, 8, 9, 66, 256}) check_on_gpu(5, vocab, (vocab + 7) / 8 * 8);
    check_on_gpu(3, 33, 37);
}
TEST(Loss, GpuEveryRegisterCachedWidthMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t edge : {2048, 8192, 16384, 32768})
        for (const std::int64_t vocab : {edge - 1, edge, edge + 1, edge + 8 * 5 + 2})
            check_on_gpu(4, vocab, (vocab + 7) / 8 * 8 + 8);
}
TEST(Loss, GpuStreamedRowsMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    check_on_gpu(4, 50257, 50304);
    check_on_gpu(3, 50304, 50304);
    check_on_gpu(3, 32769, 32776);
}
TEST(Loss, GpuOddVocabularyMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_on_gpu(5, 30522, 30528);
}
TEST(Loss, GpuUnalignedRowsMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    check_on_gpu(4, 515, 519);     // stride not a multiple of 8
    check_on_gpu(4, 512, 512, 3);  // address not 16-byte aligned
    check_on_gpu(3, 1, 1);
    check_on_gpu(3, 511, 1023, 1);
}
TEST(Loss, GpuManyRowsMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    check_on_gpu(1025, 130, 136);
    check_on_gpu(1, 130, 136);
}
TEST(Loss, GpuLargeLogitsStayFinite) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t vocab : {70, 40000}) {
        Problem q(3, vocab, (vocab + 7) / 8 * 8);
        for (double& v : q.logits) v = v * 100 - 1e4;
        q.logits = round_to<bf16>(q.logits);
        EXPECT_TRUE(close(on_gpu(q, true).losses, naive(q).losses, on_cpu<float>(q).losses)) << vocab;
    }
}
TEST(Loss, GpuNanShows) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int64_t vocab : {70, 40000}) {
        Problem q(3, vocab, (vocab + 7) / 8 * 8);
        q.logits[5] = std::nan("");
        EXPECT_TRUE(std::isnan(on_gpu(q, true).losses[0])) << vocab;
    }
}
TEST(Loss, GpuTargetBeyondVocabularyShows) {
    FIEDLER_GPU_OR_SKIP();
    Problem q(3, 10, 16);
    q.targets[2] = 10;
    EXPECT_TRUE(std::isnan(on_gpu(q, true).losses[2]));
}
TEST(Loss, GpuSumAddsToTotal) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::size_t n : {1, 3, 1023, 1024, 1025, 8194}) {
        SCOPED_TRACE(n);
        const Values values = round_to<float>(random_uniform(n, 10, 0, 12));
        double ref = 2.5;
        for (const double v : values) ref += v;
        const Buffer<float, Cuda> losses(gpu(), values), total(gpu(), Values{2.5}), again(gpu(), Values{2.5});
        loss_sum(gpu(), LossSum<float>{total.vec(), losses.vec()});
        loss_sum(gpu(), LossSum<float>{again.vec(), losses.vec()});
        EXPECT_EQ(float(total.values()[0]), float(ref)) << "f64 inside, one rounding";
        EXPECT_EQ(total.values(), again.values());
    }
}

#endif

}  // namespace
}  // namespace fiedler::test
