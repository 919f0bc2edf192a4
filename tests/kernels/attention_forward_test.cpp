// The forward pass of scalar-distance attention on the GPU, against the CPU in double: references of exponents in and out of
// their bounds, borders of blocks, NaN; every way that there is for a case.
#include "kernels/attention.h"

#include <cmath>

#include "tests/support/attention_trial.h"

#if FIEDLER_CUDA

namespace fiedler::test {
namespace {

using namespace attention_trial;

bool sm90_takes_forward(const Case& c) { return FIEDLER_SM90A && gpu().arch == 90 && is_sm90_forward(c); }
// o and lse of the forward pass, twice, by every way that there is for the case.
void check_gpu_forward(const Inputs& in, const char* what) {
    SCOPED_TRACE(in.c.name() + ", " + what);
    Trial<double, Cpu> reference(kCpu, in);
    reference.forward();
    const Outputs low = naive<float, bf16, bf16>(in, {}, {}, true);
    for (const AttentionPath path : {AttentionPath::general, AttentionPath::sm90}) {
        SCOPED_TRACE(path == AttentionPath::sm90 ? "sm90" : "general");
        Trial<bf16, Cuda> run(gpu(), in), again(gpu(), in);
        const bool taken = attention_forward_by_path(gpu(), run.forward_arguments(), path);
        EXPECT_EQ(taken, path == AttentionPath::general || sm90_takes_forward(in.c));
        if (!taken) continue;
        attention_forward_by_path(gpu(), again.forward_arguments(), path);
        const Values o = run.compact(run.o), lse = run.lse.values();
        EXPECT_TRUE(close(o, reference.compact(reference.o), low.o)) << "o";
        if (path == AttentionPath::sm90)
            EXPECT_TRUE(close_to_rounded_lse(in.c, lse, reference.lse.values(), low.lse)) << "lse";
        else
            EXPECT_TRUE(close(lse, reference.lse.values(), low.lse)) << "lse";
        EXPECT_TRUE(identical(o.data(), again.compact(again.o).data(), o.size() * 8));
        EXPECT_TRUE(identical(lse.data(), again.lse.values().data(), lse.size() * 8));
    }
}
// The kernel weighs relative to a fixed reference as long as bounds hold (kernels/attention_forward.cuh) and otherwise
// with a running maximum: inside, at the border, outside, and changing over on the way.
TEST(Attention, GpuForwardMatchesReferenceInAndOutOfBounds) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [length, scalars] :
         {std::pair{768, 1}, {700, 1}, {700, 2}, {700, 8}, {768, 2}, {768, 3}, {768, 8}}) {
        const Case c{.lengths = {length}, .heads = 2, .scalars = scalars, .width = 64, .gate = true};
        const auto count = std::size_t(c.heads * scalars);
        const auto check = [&](const char* what, auto&& change) {
            Inputs in(c);
            set_gate(in, 0.01, 0);
            change(in);
            in.a = round_to<float>(in.a), in.b = round_to<float>(in.b), in.F = round_to<float>(in.F);
            check_gpu_forward(in, what);
        };
        check("mild gate", [](Inputs&) {});
        check("gate at the bound", [](Inputs& in) { set_gate(in, 0.12, 0); });
        check("gate out of bounds", [](Inputs& in) { set_gate(in, 0.5, 0); });
        check("gate closes in one token", [](Inputs& in) { set_gate(in, 0.001, 30); });
        check("gate closes for good", [](Inputs& in) { set_gate(in, 0.001, 1e4); });
        check("gate opens: bounds hold at first, not for earlier keys", [&](Inputs& in) {
            for (std::size_t i = 0; i < in.F.size(); ++i) in.F[i] += i < 300 * 2 ? -50 : 0;
        });
        check("a key far off, of one query", [&](Inputs& in) { in.b[400 * count] += 45; });
        check("keys far off, on either side", [&](Inputs& in) {
            for (std::size_t i = 0; i < in.b.size(); i += count) in.b[i] += (i / count % 3 - 1.0) * 100;
            for (std::size_t i = 0; i < in.b.size(); i += 7 * count) in.b[i] = in.a[i];
        });
        check("own keys far off, others close", [&](Inputs& in) {
            for (std::size_t i = 0; i < in.b.size(); i += count) in.b[i] += i / count % 2 ? 30 : 0;
        });
        check("queries spread over the bound", [&](Inputs& in) {
            for (std::size_t i = 0; i < in.a.size(); i += count) in.a[i] += i / count % 2 ? 22 : -22;
            for (std::size_t i = 0; i < in.b.size(); i += count) in.b[i] += i / count % 2 ? 22 : -22;
        });
        check("queries spread out of bounds", [&](Inputs& in) {
            for (std::size_t i = 0; i < in.a.size(); i += count) in.a[i] += i / count % 2 ? 90 : -90;
            for (std::size_t i = 0; i < in.b.size(); i += count) in.b[i] += i / count % 2 ? 90 : -90;
        });
        check("all far from zero", [](Inputs& in) {
            for (double& x : in.a) x += 1000;
            for (double& x : in.b) x += 1000;
        });
        check("ties", [](Inputs& in) {
            in.c.points = Points::kTied;
            for (double& x : in.a) x = std::round(x);
            for (double& x : in.b) x = std::round(x);
        });
    }
}
TEST(Attention, GpuForwardMatchesReferenceAtEveryBorderOfBlocks) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t n : {1, 31, 33, 127, 128, 129, 255, 256, 257, 384, 512, 1000, 1024})
        for (const std::int32_t scalars : {1, 8})
            for (const bool causal : {true, false}) {
                Inputs in({.lengths = {n, n},
                           .heads = n < 64 ? 8 : 2,
                           .scalars = scalars,
                           .width = 64,
                           .causal = causal,
                           .gate = causal});
                if (causal) set_gate(in, 0.02, 0);
                check_gpu_forward(in, "mild gate");
            }
    for (const std::int32_t width : {16, 32, 64, 128})
        for (const std::int32_t scalars : {1, 2, 4, 8, 16})
            for (const std::int32_t window : {0, 100}) {
                Inputs in({.lengths = {5, 300, 64, 1, 190},
                           .heads = 2,
                           .scalars = scalars,
                           .width = width,
                           .window = window,
                           .gate = true});
                set_gate(in, 0.02, 0);
                check_gpu_forward(in, "mild gate");
            }
}
// A first token sees itself alone: its lse is its score, which is to be as close as kernels/attention.h says.
TEST(Attention, GpuForwardScoresAreWithinTheirBound) {
    FIEDLER_GPU_OR_SKIP();
    constexpr std::int32_t kLength = 128;
    for (std::int32_t scalars = 2; scalars <= 8; ++scalars)
        for (const double spread : {0.02, 1.0, 6.0, 31.0}) {
            Inputs in({.lengths = std::vector<std::int32_t>(64, kLength), .heads = 3, .scalars = scalars, .width = 64});
            SCOPED_TRACE(in.c.name() + ", spread " + std::to_string(spread));
            const auto count = std::size_t(in.c.heads * scalars);
            const double k = tuning::scores_on_tensor_cores(gpu().arch)
                                 ? 2
                                 : 1 + std::log2(double(attention_padded_scalars(scalars)));
            in.a = random_uniform(in.a.size(), 7, -spread, spread);
            const Values apart = random_values(in.a.size(), 8, std::min(spread, 2.0));
            for (std::size_t i = 0; i < in.a.size(); ++i) in.b[i] = std::clamp(in.a[i] + apart[i], -31.5, 31.5);
            for (std::size_t i = 0; i < in.a.size(); i += 2 * kLength * count)  // every other sequence: at no distance
                std::copy_n(&in.a[i], count, &in.b[i]);
            in.a = round_to<float>(in.a), in.b = round_to<float>(in.b);
            for (const AttentionPath path : {AttentionPath::general, AttentionPath::sm90}) {
                Trial<bf16, Cuda> run(gpu(), in);
                const bool taken = path == AttentionPath::general || sm90_takes_forward(in.c);
                ASSERT_EQ(attention_forward_by_path(gpu(), run.forward_arguments(), path), taken);
                if (!taken) continue;
                const Values lse = run.lse.values();
                for (std::size_t i = 0; i < in.c.lengths.size(); ++i)
                    for (std::size_t h = 0; h < std::size_t(in.c.heads); ++h) {
                        double score = 0, bound = 0;
                        for (std::size_t r = 0; r < std::size_t(scalars); ++r) {
                            const std::size_t at = i * kLength * count + h * std::size_t(scalars) + r;
                            const double distance = std::abs(in.a[at] - in.b[at]);
                            score -= distance;
                            bound += 0x1p-11 * (std::abs(in.a[at]) + std::abs(in.b[at]) + k * distance) + 0x1p-13;
                        }
                        const double got = lse[i * kLength * std::size_t(in.c.heads) + h];
                        ASSERT_NEAR(got, score, score == 0 ? 1e-6 : bound + 1e-6) << i << ' ' << h << ' ' << int(path);
                    }
            }
        }
}
// To the bit: what comes later than a block of queries does not even change how its numbers are rounded.
TEST(Attention, GpuForwardDoesNotSeeLaterTokens) {
    FIEDLER_GPU_OR_SKIP();
    constexpr std::size_t kSeen = 512;
    for (const std::int32_t scalars : {1, 2, 4, 8, 16}) {
        const Case c{.lengths = {1024}, .heads = 2, .scalars = scalars, .width = 64};
        const auto count = std::size_t(c.heads * scalars), width = std::size_t(c.heads * c.width);
        Inputs in(c), other(c);
        for (std::size_t i = kSeen * count; i < in.a.size(); ++i) other.a[i] += 3, other.b[i] -= 5;
        for (std::size_t i = kSeen * width; i < in.v.size(); ++i) other.v[i] = 1;
        other.a = round_to<float>(other.a), other.b = round_to<float>(other.b);
        Trial<bf16, Cuda> run(gpu(), in), changed(gpu(), other);
        run.forward(), changed.forward();
        EXPECT_TRUE(identical(run.compact(run.o).data(), changed.compact(changed.o).data(), kSeen * width * 8));
        EXPECT_TRUE(identical(run.lse.values().data(), changed.lse.values().data(), kSeen * std::size_t(c.heads) * 8));
        EXPECT_FALSE(identical(run.lse.values().data(), changed.lse.values().data(), run.lse.values().size() * 8));
    }
}
// A query of NaN gives NaN, and to no other query.
TEST(Attention, GpuForwardShowsNaN) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& [length, scalars] : {std::pair{384, 1}, {300, 1}, {384, 8}, {300, 8}}) {
        Inputs in({.lengths = {length}, .scalars = scalars, .width = 64});
        in.a[std::size_t(200 * scalars)] = NAN;
        Trial<bf16, Cuda> run(gpu(), in);
        run.forward();
        const Values o = run.compact(run.o), lse = run.lse.values();
        for (std::size_t i = 0; i < std::size_t(length); ++i) {
            ASSERT_EQ(std::isnan(lse[i]), i == 200) << i;
            for (std::size_t d = 0; d < 64; ++d) ASSERT_EQ(std::isnan(o[i * 64 + d]), i == 200) << i;
        }
    }
}

}  // namespace
}  // namespace fiedler::test
#endif
