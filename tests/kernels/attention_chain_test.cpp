// attention, forward and backward as training calls them: the backward pass is given what the forward pass of the same
// device made, not the reference's numbers.
#include "kernels/attention.h"
#include "tests/support/attention_trial.h"

#if FIEDLER_CUDA

namespace fiedler::test {
namespace {

using namespace attention_trial;

// The error of `got` may be twice that of the chain's emulation, as in close(), and what an lse that is `lse` off adds: it
// multiplies all weights of a query by exp of that. unit: of the output's rounding; the largest value is one number among
// few, and which way it is rounded is up to the last bit.
testing::AssertionResult close_in_chain(const Values& got, const Values& want, const Values& low, double lse,
                                        double unit = 0) {
    const Error e = measure(got, want), of_low = measure(low, want), of_want = measure(want, Values(want.size(), 0.0));
    if (got.size() == want.size() && e.count > 0 && e.nonfinite == 0 &&
        e.max <= 2 * of_low.max + (lse + unit) * of_want.max && e.rms <= 2 * of_low.rms + lse * of_want.rms)
        return testing::AssertionSuccess();
    return testing::AssertionFailure() << "largest error " << e.max << " (emulated " << of_low.max << ", of "
                                       << of_want.max << "), rms " << e.rms << " (emulated " << of_low.rms << ", of "
                                       << of_want.rms << "), " << e.nonfinite << " not finite; worst at " << e.worst
                                       << ": " << got[e.worst] << ", not " << want[e.worst] << " (emulated "
                                       << low[e.worst] << ")";
}

void check_chain(const Inputs& in) {
    const Case& c = in.c;
    SCOPED_TRACE(c.name());
    Trial<double, Cpu> reference(kCpu, in);
    reference.forward(), reference.backward();
    const Outputs want = reference.outputs();
    const bool own = FIEDLER_SM90A && gpu().arch == 90;
    const Outputs forward = naive<float, bf16, bf16>(in, {}, {}, true),
                  low = naive<float, bf16, bf16>(in, forward.o, forward.lse, true);
    const double lse = own && is_sm90_forward(c) ? 0x1p-10 + 0x1p-8 : 0;
    Trial<bf16, Cuda> run(gpu(), in);
    run.forward(), run.backward();
    const Outputs got = run.outputs();
    EXPECT_TRUE(close_in_chain(got.dv, want.dv, low.dv, lse, 0x1p-8)) << "dv";
    EXPECT_TRUE(close_in_chain(got.da, want.da, low.da, lse)) << "da";
    EXPECT_TRUE(close_in_chain(got.db, want.db, low.db, lse)) << "db";
    if (c.gate) {
        EXPECT_TRUE(close_in_chain(got.dF, want.dF, low.dF, lse)) << "dF";
    }
}

// spread: of the scalars, as training reaches it.
TEST(AttentionChain, GpuBackwardOfItsOwnForward) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t scalars : {1, 2, 4, 8, 16})
        for (const bool gate : {false, true})
            for (const double spread : {1.0, 8.0}) {
                Inputs in({.lengths = {768}, .heads = 2, .scalars = scalars, .width = 64, .gate = gate});
                for (Values* x : {&in.a, &in.b}) {
                    for (double& y : *x) y *= spread / scalars;
                    *x = round_to<float>(*x);
                }
                check_chain(in);
            }
}

}  // namespace
}  // namespace fiedler::test
#endif
