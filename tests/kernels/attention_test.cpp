// Scalar-distance attention: CPU against naive loops, finite differences and closed forms; GPU against the CPU.
#include "kernels/attention.h"

#include <array>
#include <optional>

#include "kernels/attention_backward_sm90.h"
#include "tests/support/attention_trial.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

using namespace attention_trial;

template <class T>
Outputs cpu(const Inputs& in, const Cpu& dev = kCpu) {
    Trial<T, Cpu> run(dev, in);
    run.forward();
    run.backward();
    return run.outputs();
}

const std::vector<Case> kCpuCases = {
    {.lengths = {1}},
    {.lengths = {7, 7}, .heads = 2, .scalars = 3, .width = 5, .gate = true},
    {.lengths = {33, 33}, .heads = 2, .scalars = 8, .width = 32, .gate = true},
    {.lengths = {40}, .heads = 3, .scalars = 2, .width = 64, .causal = false},
    {.lengths = {40}, .scalars = 2, .window = 5, .causal = false},
    {.lengths = {40}, .scalars = 16, .window = 5, .gate = true},
    {.lengths = {40}, .window = 1},
    {.lengths = {1, 3, 70, 64, 17}, .heads = 2, .scalars = 4, .width = 24, .gate = true},
    {.lengths = {1, 3, 70, 64, 17}, .scalars = 1, .causal = false},
    {.lengths = {50}, .heads = 2, .scalars = 2, .gate = true, .points = Points::kTied},
    {.lengths = {50}, .scalars = 4, .points = Points::kFar},
};

TEST(Attention, MatchesNaiveLoops) {
    for (const Case& c : kCpuCases) {
        SCOPED_TRACE(c.name());
        const Inputs in(c);
        const Outputs got = cpu<double>(in), want = naive<double, double, double>(in);
        // lse of up to 1e4 has an absolute error of 1e-12, which the weights of the far points inherit
        const double tolerance = c.points == Points::kFar ? 1e-10 : 1e-12;
        EXPECT_TRUE(close_to(got.o, want.o, tolerance));
        EXPECT_TRUE(close_to(got.lse, want.lse, tolerance));
        EXPECT_TRUE(close_to(got.dv, want.dv, tolerance));
        if (in.alone()) continue;  // ds is rounding
        EXPECT_TRUE(close_to(got.da, want.da, tolerance));
        EXPECT_TRUE(close_to(got.db, want.db, tolerance));
        if (c.gate) {
            EXPECT_TRUE(close_to(got.dF, want.dF, tolerance));
        }
    }
}
TEST(Attention, FloatMatchesDouble) {
    for (const Case& c : kCpuCases) {
        SCOPED_TRACE(c.name());
        const Inputs in(c);
        const Outputs got = cpu<float>(in), want = cpu<double>(in), low = naive<float, float, float>(in);
        EXPECT_TRUE(close(got.o, want.o, low.o));
        EXPECT_TRUE(close(got.lse, want.lse, low.lse));
        EXPECT_TRUE(close(got.dv, want.dv, low.dv));
        if (in.alone()) continue;
        EXPECT_TRUE(close(got.da, want.da, low.da));
        EXPECT_TRUE(close(got.db, want.db, low.db));
        if (c.gate) {
            EXPECT_TRUE(close(got.dF, want.dF, low.dF));
        }
    }
}
TEST(Attention, GradientsMatchFiniteDifferences) {
    for (const Case& c :
         std::vector<Case>{{.lengths = {6, 6}, .heads = 2, .scalars = 3, .width = 4, .gate = true},
                           {.lengths = {2, 9, 1}, .heads = 2, .scalars = 1, .width = 3, .window = 4, .gate = true},
                           {.lengths = {9}, .scalars = 2, .width = 4, .window = 3, .causal = false},
                           {.lengths = {4, 7}, .scalars = 5, .width = 4, .causal = false}}) {
        SCOPED_TRACE(c.name());
        Inputs in(c);
        // a on multiples of 0.1 and b half-way between: no difference within 10 h of the kink at zero
        for (double& x : in.a) x = std::round(10 * x) / 10;
        for (double& x : in.b) x = std::round(10 * x) / 10 + 0.05;
        const Outputs grad = cpu<double>(in);
        const auto loss = [&] {
            Trial<double, Cpu> run(kCpu, in);
            run.forward();
            return inner(in.dout, run.compact(run.o));
        };
        EXPECT_TRUE(gradient_matches(grad.da, in.a, loss));
        EXPECT_TRUE(gradient_matches(grad.db, in.b, loss));
        EXPECT_TRUE(gradient_matches(grad.dv, in.v, loss));
        if (c.gate) {
            EXPECT_TRUE(gradient_matches(grad.dF, in.F, loss));
        }
    }
}
// Equal scalars, no gate: the output is the running mean, lse the logarithm of the count, and every sign is zero.
TEST(Attention, EqualScalarsAverageAndHaveNoScalarGradient) {
    Inputs in({.lengths = {100}, .scalars = 3});
    std::fill(in.a.begin(), in.a.end(), 0.7);
    std::fill(in.b.begin(), in.b.end(), 0.7);
    const Outputs got = cpu<double>(in);
    Values mean(in.v.size()), lse(100), sum(16);
    for (std::size_t i = 0; i < 100; ++i) {
        lse[i] = std::log(double(i + 1));
        for (std::size_t d = 0; d < 16; ++d) mean[i * 16 + d] = (sum[d] += in.v[i * 16 + d]) / double(i + 1);
    }
    EXPECT_TRUE(close_to(got.o, mean, 1e-13));
    EXPECT_TRUE(close_to(got.lse, lse, 1e-13));
    for (const double x : got.da) ASSERT_EQ(x, 0);
    for (const double x : got.db) ASSERT_EQ(x, 0);
}
TEST(Attention, DistantScalarsDoNotUnderflow) {
    Inputs in({.lengths = {2}});
    in.a = {0, 0}, in.b = {1e4, 1e4 + std::log(2.0)};  // exp(-1e4) is zero in double
    const Outputs got = cpu<double>(in);
    for (std::size_t d = 0; d < 16; ++d) EXPECT_NEAR(got.o[16 + d], (2 * in.v[d] + in.v[16 + d]) / 3, 1e-11);
    EXPECT_NEAR(got.lse[1], -1e4 + std::log(1.5), 1e-11);
}
TEST(Attention, ResultsDoNotDependOnThreads) {
    const Inputs in({.lengths = {1, 3, 70, 64, 17}, .heads = 3, .scalars = 3, .width = 24, .gate = true});
    const Outputs one = cpu<float>(in, Cpu{1}), four = cpu<float>(in, Cpu{4});
    const auto same = [](const Values& x, const Values& y) { return identical(x.data(), y.data(), x.size() * 8); };
    EXPECT_TRUE(same(one.o, four.o));
    EXPECT_TRUE(same(one.lse, four.lse));
    EXPECT_TRUE(same(one.da, four.da));
    EXPECT_TRUE(same(one.db, four.db));
    EXPECT_TRUE(same(one.dF, four.dF));
    EXPECT_TRUE(same(one.dv, four.dv));
}
TEST(Attention, RefusesBrokenContracts) {
    const Inputs in({.lengths = {8}, .gate = true});
    Trial<float, Cpu> run(kCpu, in);
    AttentionForward<float> p;
    p.o = run.rows(run.o), p.lse = run.numbers(run.lse), p.a = run.scalars(run.a), p.b = run.scalars(run.b);
    p.v = run.rows(run.v), p.F = run.numbers(run.F), p.seq = run.packed();
    EXPECT_NO_THROW(attention_forward(kCpu, p));
    p.causal = false;  // a gate needs causality
    EXPECT_THROW(attention_forward(kCpu, p), ContractError);
    p.causal = true, p.scalars = 2;
    EXPECT_THROW(attention_forward(kCpu, p), ContractError);
}

// The last query of a sequence, decoded, against the last row of the forward pass.
template <class T, class Dev>
Values decode(const Dev& dev, const Inputs& in) {
    Trial<T, Dev> run(dev, in);
    Buffer<T, Dev> o(dev, std::size_t(in.values()));
    AttentionDecode<T> p;
    p.o = o.vec(), p.b = run.scalars(run.b), p.v = run.rows(run.v);
    const auto hr = std::int64_t(in.c.heads) * in.c.scalars;
    p.a = {run.a.data() + (run.n - 1) * hr, hr};
    if (in.c.gate) p.F = run.numbers(run.F);
    p.heads = in.c.heads, p.scalars = in.c.scalars, p.window = in.c.window;
    attention_decode(dev, p);
    return o.values();
}
Values last_row(const Values& x, std::int64_t width) { return Values(x.end() - width, x.end()); }

TEST(Attention, DecodeMatchesForward) {
    for (const Case& c : std::vector<Case>{{.lengths = {1}},
                                           {.lengths = {77}, .heads = 3, .scalars = 3, .width = 24, .gate = true},
                                           {.lengths = {77}, .heads = 2, .scalars = 8, .window = 20}}) {
        SCOPED_TRACE(c.name());
        const Inputs in(c);
        EXPECT_TRUE(close_to(decode<double>(kCpu, in), last_row(cpu<double>(in).o, in.values()), 1e-13));
    }
}

#if FIEDLER_CUDA
bool sm90_takes(const Case& c) {
    const auto R = c.scalars;
    return FIEDLER_SM90A && gpu().arch == 90 && c.width == 64 && c.window == 0 && c.uniform() &&
           c.lengths[0] % 64 == 0 && R <= 8;
}
void backward(const Trial<bf16, Cuda>& run, std::optional<AttentionPath> path) {
    if (path)
        ASSERT_TRUE(attention_backward_by_path(run.dev, run.backward_arguments(), *path));
    else
        attention_backward(run.dev, run.backward_arguments());
}
// path: of the backward pass, instead of the one that is chosen.
void check_gpu(const Inputs& in, std::optional<AttentionPath> path = {}) {
    const Case& c = in.c;
    SCOPED_TRACE(c.name() + (!path ? "" : *path == AttentionPath::sm90 ? ", sm90" : ", general"));
    Trial<double, Cpu> reference(kCpu, in);
    reference.forward();
    const Values want_o = reference.compact(reference.o), want_lse = reference.lse.values();
    const Values o = round_to<bf16>(want_o), lse = round_to<float>(want_lse);
    reference.give(o, lse);
    reference.backward();
    const bool packs = c.scalars > 1 || (path ? *path == AttentionPath::general : !sm90_takes(c));
    const Outputs want = reference.outputs(), low = naive<float, bf16, bf16>(in, o, lse, packs);
    const Outputs low_forward = naive<float, bf16, bf16>(in, {}, {}, true);

    Trial<bf16, Cuda> run(gpu(), in);
    run.forward();
    const Values got_o = run.compact(run.o), got_lse = run.lse.values();
    EXPECT_TRUE(close(got_o, want_o, low_forward.o)) << "o";
    if (FIEDLER_SM90A && gpu().arch == 90 && is_sm90_forward(c))
        EXPECT_TRUE(close_to_rounded_lse(c, got_lse, want_lse, low_forward.lse)) << "lse";
    else
        EXPECT_TRUE(close(got_lse, want_lse, low_forward.lse)) << "lse";
    run.give(o, lse);
    backward(run, path);
    const Outputs got = run.outputs();
    EXPECT_TRUE(close(got.dv, want.dv, low.dv)) << "dv";
    if (in.alone()) {
        for (const Values* gradient : {&got.da, &got.db, &got.dF})
            for (const double x : *gradient) EXPECT_LE(std::abs(x), in.rounding_of_ds());
    } else {
        // Far apart, a query may have one key with all the weight: then ds is the difference of two equal numbers, and
        // what is left is their rounding, whatever the size of the gradient.
        const auto coarse = [&](Values gradient) {
            if (c.points == Points::kFar)
                for (double& x : gradient) x += in.rounding_of_ds() / 8;
            return gradient;
        };
        EXPECT_TRUE(close(got.da, want.da, coarse(low.da))) << "da";
        EXPECT_TRUE(close(got.db, want.db, coarse(low.db))) << "db";
        if (c.gate) {
            EXPECT_TRUE(close(got.dF, want.dF, coarse(low.dF))) << "dF";
        }
    }

    Trial<bf16, Cuda> again(gpu(), in);  // bit-equal from run to run
    again.forward();
    EXPECT_TRUE(identical(again.compact(again.o).data(), got_o.data(), got_o.size() * 8));
    again.give(o, lse);
    backward(again, path);
    const Outputs second = again.outputs();
    EXPECT_TRUE(identical(second.da.data(), got.da.data(), got.da.size() * 8));
    EXPECT_TRUE(identical(second.db.data(), got.db.data(), got.db.size() * 8));
    EXPECT_TRUE(identical(second.dv.data(), got.dv.data(), got.dv.size() * 8));
    if (c.gate) {
        EXPECT_TRUE(identical(second.dF.data(), got.dF.data(), got.dF.size() * 8));
    }
}

void check_gpu(const Case& c) { check_gpu(Inputs(c)); }

// Every instantiation, and the scalars that are padded to one of them.
TEST(Attention, GpuMatchesReferenceAtEveryWidthAndNumberOfScalars) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t width : {16, 32, 64, 128})
        for (const std::int32_t scalars : {1, 2, 3, 4, 5, 8, 16})
            check_gpu({.lengths = {129}, .heads = 2, .scalars = scalars, .width = width, .gate = true});
}
TEST(Attention, GpuMatchesReferenceAtEveryLength) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t n : {1, 3, 7, 15, 16, 17, 63, 64, 65, 129, 514})
        for (const std::int32_t count : {1, 3}) {
            const std::vector<std::int32_t> lengths(std::size_t(count), n);
            const std::int32_t heads = n < 63 ? 8 : 2;  // enough values for an error to be typical
            check_gpu({.lengths = lengths, .heads = heads, .scalars = 2, .width = 64, .gate = true});
            check_gpu({.lengths = lengths, .heads = heads, .scalars = 8, .width = 32});
            check_gpu({.lengths = lengths, .heads = heads + 1, .scalars = 1, .width = 32, .causal = false});
        }
    check_gpu({.lengths = {1024}, .heads = 3, .scalars = 8, .width = 64, .gate = true});
    check_gpu({.lengths = {1024}, .scalars = 1, .width = 64, .causal = false});
}
TEST(Attention, GpuMatchesReferenceInWindows) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t window : {1, 5, 64, 100, 1 << 30})
        for (const bool causal : {true, false}) {
            check_gpu({.lengths = {300, 300},
                       .heads = 2,
                       .scalars = 3,
                       .width = 32,
                       .window = window,
                       .causal = causal,
                       .gate = causal});
            check_gpu({.lengths = {1, 3, 70, 64, 129}, .scalars = 1, .width = 64, .window = window, .causal = causal});
        }
}
TEST(Attention, GpuMatchesReferenceOnRaggedSequences) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& lengths : std::vector<std::vector<std::int32_t>>{
             {1, 3, 70, 64, 129}, {200, 1}, {1, 200}, {5, 9, 1, 1, 2, 30, 7, 7, 11, 22, 4, 19, 3, 63, 65}}) {
        check_gpu({.lengths = lengths, .heads = 2, .scalars = 4, .width = 64, .gate = true});
        check_gpu({.lengths = lengths, .heads = 2, .scalars = 1, .width = 16});
        check_gpu({.lengths = lengths, .heads = 1, .scalars = 16, .width = 128, .causal = false});
    }
}
TEST(Attention, GpuMatchesReferenceAtTiesAndFarApart) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 3, 8})
        for (const Points points : {Points::kTied, Points::kFar}) {
            check_gpu({.lengths = {129}, .heads = 2, .scalars = scalars, .width = 64, .gate = true, .points = points});
            check_gpu({.lengths = {129}, .scalars = scalars, .width = 32, .causal = false, .points = points});
        }
}
// Tiles with a scalar too far from the others to be packed, beside tiles without.
TEST(Attention, GpuMatchesReferenceWithSomeScalarsOutOfRange) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {2, 3, 8, 16})
        for (const bool causal : {true, false}) {
            for (const std::int32_t length : {300, 320}) {
                Inputs in({.lengths = {length}, .heads = 2, .scalars = scalars, .width = 64, .causal = causal});
                const auto hr = std::size_t(2 * scalars);
                in.a[37 * hr] += 40;            // a query's first scalar of the first head
                in.b[250 * hr + hr - 1] -= 35;  // a key's last of the other
                in.a = round_to<float>(in.a), in.b = round_to<float>(in.b);
                check_gpu(in);
            }
        }
}
TEST(Attention, GpuScalarGradientsOfEqualScalarsAreExactlyZero) {
    FIEDLER_GPU_OR_SKIP();
    Inputs in({.lengths = {200}, .heads = 2, .scalars = 3, .width = 64});
    std::fill(in.a.begin(), in.a.end(), 0.75);
    std::fill(in.b.begin(), in.b.end(), 0.75);
    Trial<bf16, Cuda> run(gpu(), in);
    run.forward();
    run.backward();
    const Outputs got = run.outputs();
    for (const double x : got.da) ASSERT_EQ(x, 0);
    for (const double x : got.db) ASSERT_EQ(x, 0);
}
// Groups of keys: several blocks of keys a sequence, several walked by one block, one block for all, and tiles of
// queries that see the end of one sequence and the begin of the next.
TEST(Attention, GpuMatchesReferenceWithAnyNumberOfSlabs) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t slabs : {0, 1, 2, 3, 5})
        for (const std::int32_t scalars : {1, 2, 4, 8, 16}) {
            check_gpu({.lengths = {1000}, .scalars = scalars, .width = 16, .gate = true, .slabs = slabs});
            check_gpu({.lengths = {256, 256, 256}, .scalars = scalars, .width = 32, .slabs = slabs});
            check_gpu({.lengths = {700, 1, 130, 300},
                       .heads = 2,
                       .scalars = scalars,
                       .width = 16,
                       .causal = false,
                       .slabs = slabs});
            check_gpu({.lengths = {40, 700, 3, 290},
                       .scalars = scalars,
                       .width = 32,
                       .window = 150,
                       .gate = true,
                       .slabs = slabs});
        }
    check_gpu({.lengths = {2500}, .heads = 2, .scalars = 8, .width = 64, .gate = true, .slabs = 2});
    check_gpu({.lengths = {2500}, .scalars = 1, .width = 128});
}
// A gate that closes completely now and then: whole tiles are nothing, and their sums must be zero, not left out.
TEST(Attention, GpuGateClosesCompletely) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 8}) {
        Inputs in({.lengths = {600}, .scalars = scalars, .width = 64, .gate = true});
        float closed = 0;
        for (std::size_t i = 0; i < in.F.size(); ++i) {
            if (i % 190 == 189) closed += 200;
            in.F[i] = round_to<float>({in.F[i] - double(closed)})[0];
        }
        for (const bool skip : {true, false}) {
            in.c.skip = skip;
            check_gpu(in);
        }
    }
}
// The ways of the backward pass that this device and build have, for a case that all of them take.
void check_gpu_paths(const Inputs& in) {
    check_gpu(in, AttentionPath::general);
    if (sm90_takes(in.c)) check_gpu(in, AttentionPath::sm90);
}
TEST(Attention, GpuBackwardMatchesReferenceOnEveryPath) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 2, 3, 4, 5, 8}) {
        for (const std::int32_t length : {64, 128, 192, 448})
            for (const bool causal : {true, false})
                for (const std::int32_t count : {1, 3}) {
                    const Case c{.lengths = std::vector<std::int32_t>(std::size_t(count), length),
                                 .heads = length < 100 ? 5 : 2,
                                 .scalars = scalars,
                                 .width = 64,
                                 .causal = causal};
                    check_gpu_paths(Inputs(c));
                    if (!causal) continue;
                    Case gated = c;
                    gated.gate = true;  // falls fast for the first head, more and more slowly for others
                    gated.heads = 5;
                    check_gpu_paths(Inputs(gated));
                }
        for (const std::int32_t slabs : {1, 2, 3, 5})
            for (const bool causal : {true, false})
                check_gpu_paths(Inputs({.lengths = {320, 320},
                                        .heads = 2,
                                        .scalars = scalars,
                                        .width = 64,
                                        .causal = causal,
                                        .gate = causal,
                                        .slabs = slabs}));
        for (const Points points : {Points::kTied, Points::kFar})
            for (const bool causal : {true, false}) {
                const Inputs in({.lengths = {256},
                                 .heads = 2,
                                 .scalars = scalars,
                                 .width = 64,
                                 .causal = causal,
                                 .gate = causal,
                                 .points = points});
                if (sm90_takes(in.c)) check_gpu(in, AttentionPath::sm90);  // the general one: see the tests above
            }
    }
    check_gpu_paths(Inputs({.lengths = {1024}, .heads = 2, .scalars = 1, .width = 64, .gate = true}));
    check_gpu_paths(Inputs({.lengths = {1024}, .heads = 2, .scalars = 4, .width = 64, .gate = true}));
    check_gpu_paths(Inputs({.lengths = {1024}, .heads = 2, .scalars = 8, .width = 64, .gate = true}));
}
// Inside the bound within which weights are relative to their keys, at it, outside, and changing on the way.
TEST(Attention, GpuBackwardMatchesReferenceWithAnyGate) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 2, 4, 8}) {
        const Case c{.lengths = {448}, .heads = 2, .scalars = scalars, .width = 64, .gate = true};
        const auto check = [&](const char* what, double step, double jump) {
            SCOPED_TRACE(what);
            Inputs in(c);
            set_gate(in, step, jump);
            check_gpu_paths(in);
        };
        check("mild", 0.01, 0);
        check("near the bound", 0.37, 0);
        check("just out of it", 0.4, 0);
        check("out of bounds", 2, 0);
        check("closes in one token", 0.001, 30);
        check("closes for good", 0.001, 1e4);
        check("opens", -0.01, 0);
        check("opens out of bounds", -1, -50);
    }
}
// What is skipped is below a rounding, and there is something to skip.
TEST(Attention, GpuSkippingChangesNothingInFloat) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 4, 8})
        for (const AttentionPath path : {AttentionPath::general, AttentionPath::sm90}) {
            Case c{.lengths = {1024}, .heads = 2, .scalars = scalars, .width = 64, .gate = true};
            if (path == AttentionPath::sm90 && !sm90_takes(c)) continue;
            const auto run = [&](bool skip) {
                c.skip = skip;
                Inputs in(c);
                set_gate(in, 0.001, 30);
                Trial<bf16, Cuda> trial(gpu(), in);
                trial.forward();
                EXPECT_TRUE(attention_backward_by_path(gpu(), trial.backward_arguments(), path));
                return trial.outputs();
            };
            const Outputs with = run(true), without = run(false);
            EXPECT_TRUE(close_to(with.lse, without.lse, 1e-6));
            EXPECT_TRUE(close_to(with.o, without.o, 4e-3));  // a rounding of bf16
            EXPECT_TRUE(close_to(with.dv, without.dv, 4e-3));
            EXPECT_TRUE(close_to(with.da, without.da, 1e-5));
            EXPECT_TRUE(close_to(with.db, without.db, 1e-5));
            EXPECT_TRUE(close_to(with.dF, without.dF, 1e-5));
        }
}
TEST(Attention, GpuScalarGradientsOfEqualScalarsAreExactlyZeroOnEveryPath) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 2, 4, 7, 8}) {
        Inputs in({.lengths = {256}, .heads = 2, .scalars = scalars, .width = 64, .gate = true});
        std::fill(in.a.begin(), in.a.end(), 0.7f);
        std::fill(in.b.begin(), in.b.end(), 0.7f);
        for (const auto path : {AttentionPath::general, AttentionPath::sm90}) {
            if (path == AttentionPath::sm90 && !sm90_takes(in.c)) continue;
            Trial<bf16, Cuda> run(gpu(), in);
            run.forward();
            backward(run, path);
            const Outputs got = run.outputs();
            for (const double x : got.da) ASSERT_EQ(x, 0);
            for (const double x : got.db) ASSERT_EQ(x, 0);
        }
    }
}
// Neighbouring numbers, of which some become one where they are scaled: those keep their signs. And some that are far away.
TEST(Attention, GpuBackwardTellsNeighbouringScalarsApart) {
    FIEDLER_GPU_OR_SKIP();
    for (const bool gate : {false, true})
        for (const bool far : {false, true}) {
            // Weights of hardly any distance are all off by the same in the forward pass, as those of ties.
            Inputs in({.lengths = {256}, .heads = 2, .scalars = 1, .width = 64, .gate = gate, .points = Points::kTied});
            const auto neighbour = [](std::size_t steps) {
                float x = 0.7f;
                for (; steps > 0; --steps) x = std::nextafter(x, 1.f);
                return double(x);
            };
            for (std::size_t i = 0; i < in.a.size(); ++i)
                in.a[i] = neighbour(i * 7 / 3 % 5), in.b[i] = neighbour(i * 11 / 4 % 5);
            if (far) in.a[2 * 37] = 40, in.a[2 * 130 + 1] = -50, in.b[2 * 77] = 45;
            check_gpu_paths(in);
        }
}
// The sm_90 kernel of several scalars takes signs from differences as they lie in registers, which asks for ds of no more than
// some size: scalars a rounding apart, gradients and values on both sides of the bounds that see to it.
TEST(Attention, GpuBackwardMatchesReferenceWithGradientsOfAnySize) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {2, 3, 8})
        // Factors of dO, of V, and of V of the first tile of keys alone, from which other tiles have delta.
        for (const auto& [of_gradients, of_values, of_first] : std::vector<std::array<double, 3>>{{0x1p-34, 1, 1},
                                                                                                  {4, 1, 1},
                                                                                                  {0x1p7, 1, 1},
                                                                                                  {0x1p12, 1, 1},
                                                                                                  {1, 0x1p6, 1},
                                                                                                  {1, 0x1p12, 1},
                                                                                                  {0x1p20, 0x1p12, 1},
                                                                                                  {4, 1, 0x1p32}}) {
            SCOPED_TRACE(testing::Message() << of_gradients << ", " << of_values << ", " << of_first);
            Inputs in({.lengths = {256}, .heads = 2, .scalars = scalars, .width = 64, .gate = true});
            constexpr float kStep = 0x1.62e43p-14f;  // times log2 e, 2^-13
            for (std::size_t i = 0; i < in.a.size(); ++i)
                in.a[i] = float(i * 7 / 3 % 5) * kStep, in.b[i] = float(i * 11 / 4 % 5) * kStep;
            for (double& x : in.dout) x *= of_gradients;
            for (double& x : in.v) x *= of_values;
            for (std::size_t i = 0; i < 64 * std::size_t(in.values()); ++i) in.v[i] *= of_first;
            check_gpu_paths(in);
        }
}
TEST(Attention, GpuPathRefusesWhatItDoesNotTake) {
    FIEDLER_GPU_OR_SKIP();
    for (const Case& c : std::vector<Case>{{.lengths = {65}, .width = 64},
                                           {.lengths = {64, 128}, .width = 64},
                                           {.lengths = {64}, .scalars = 9, .width = 64},
                                           {.lengths = {64}, .width = 32},
                                           {.lengths = {128}, .width = 64, .window = 20}}) {
        const Inputs in(c);
        Trial<bf16, Cuda> run(gpu(), in);
        run.forward();
        EXPECT_FALSE(attention_backward_by_path(gpu(), run.backward_arguments(), AttentionPath::sm90)) << c.name();
    }
    // A slab, and no room for the numbers of queries. The general way needs no more.
    for (const std::int32_t scalars : {1, 8}) {
        const Inputs in({.lengths = {128}, .scalars = scalars, .width = 64});
        Trial<bf16, Cuda> run(gpu(), in);
        run.forward();
        auto p = run.backward_arguments();
        p.partial.size = attention_slab_elements(in.tokens(), in.c.heads, in.c.scalars);
        EXPECT_FALSE(attention_backward_by_path(gpu(), p, AttentionPath::sm90));
        EXPECT_TRUE(attention_backward_by_path(gpu(), p, AttentionPath::general));
    }
    // Numbers of heads that do not lie side by side.
    for (const std::int32_t scalars : {1, 8}) {
        const Inputs in({.lengths = {128}, .heads = 2, .scalars = scalars, .width = 64, .gate = true});
        Trial<bf16, Cuda> run(gpu(), in);
        run.forward();
        auto p = run.backward_arguments();
        EXPECT_TRUE(attention_backward_by_path(gpu(), p, AttentionPath::sm90));
        p.dF.ld = 2 * in.c.heads;  // refused, it is not written
        EXPECT_FALSE(attention_backward_by_path(gpu(), p, AttentionPath::sm90));
    }
}
#if FIEDLER_SM90A
// The sm_90 kernel's operands, as they lie in shared memory, on integers: x y', x' p' and p turned on its way.
TEST(Attention, GpuSm90ProductsOfIntegers) {
    FIEDLER_GPU_OR_SKIP();
    if (gpu().arch != 90) GTEST_SKIP() << "not an sm_90 device";
    for (const std::int32_t keys : {32, 64}) {
        SCOPED_TRACE(keys);
        const auto N = std::size_t(keys);
        const auto integers = [](std::size_t n, std::uint64_t seed) {
            Values v;
            for (const auto i : random_ints(n, seed, -4, 5)) v.push_back(i);
            return v;
        };
        const Values x = integers(64 * 64, 1), y = integers(N * 64, 2), p = integers(N * 64, 3);
        const Buffer<bf16, Cuda> dx(gpu(), to<bf16>(x)), dy(gpu(), to<bf16>(y)), dp(gpu(), to<bf16>(p));
        Buffer<float, Cuda> xy(gpu(), 64 * N), xp(gpu(), 64 * N);
        Buffer<bf16, Cuda> pt(gpu(), N * 64);
        attention_backward_sm90_products(gpu(), dx.data(), dy.data(), dp.data(), xy.data(), xp.data(), pt.data(), keys);
        Values want_xy(64 * N), want_xp(64 * N);
        for (std::size_t i = 0; i < 64; ++i)
            for (std::size_t j = 0; j < N; ++j)
                for (std::size_t k = 0; k < 64; ++k) {
                    want_xy[i * N + j] += x[i * 64 + k] * y[j * 64 + k];
                    want_xp[i * N + j] += x[k * 64 + i] * p[j * 64 + k];
                }
        EXPECT_EQ(pt.values(), p) << "turning on the way from registers";
        EXPECT_EQ(xy.values(), want_xy) << "rows times rows";
        EXPECT_EQ(xp.values(), want_xp) << "an operand as it lies";
    }
}
#endif
TEST(Attention, GpuDecodeMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t n : {1, 7, 32, 33, 511, 514, 1500})
        for (const std::int32_t width : {16, 32, 64, 128})
            for (const std::int32_t window : {0, 1, 40, 5000})
                for (const bool gate : {false, true}) {
                    const Inputs in({.lengths = {n},
                                     .heads = 2,
                                     .scalars = 1 + n % 16,
                                     .width = width,
                                     .window = window,
                                     .gate = gate});
                    SCOPED_TRACE(in.c.name());
                    const Values want = decode<double>(kCpu, in), low = round_to<bf16>(decode<float>(kCpu, in));
                    EXPECT_TRUE(close(decode<bf16>(gpu(), in), want, low));
                }
}
#endif

}  // namespace
}  // namespace fiedler::test
