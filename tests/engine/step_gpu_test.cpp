// tests/engine/step_gpu_test.cpp: a recorded step is the step itself, bit for bit; so are two steps on their way. The head
// in chunks is as exact as the whole. The device memory of a run is what its plan says.
#include "kernels/device.h"

#if FIEDLER_CUDA
#include <gtest/gtest.h>

#include <cstdio>

#include "kernels/head.h"
#include "tests/engine/step_model.h"
#include "tests/support/buffer.h"

namespace fiedler {
namespace {

using test::StepCase;
using test::StepTrace;

void expect_same(const StepTrace& a, const StepTrace& b) {
    EXPECT_EQ(a.lines, b.lines);
    ASSERT_EQ(a.state.size(), b.state.size());
    EXPECT_TRUE(test::identical(a.state.data(), b.state.data(), a.state.size() * sizeof(float)));
}

struct NamedCase {
    const char* name;
    StepCase step;
    std::int64_t replayed;  // of eight steps
};
void PrintTo(const NamedCase& c, std::ostream* out) { *out << c.name; }

class StepGpu : public testing::TestWithParam<NamedCase> {};

TEST_P(StepGpu, GraphOnAndOffAreBitEqual) {
    FIEDLER_GPU_OR_SKIP();
    StepCase on = GetParam().step;
    on.cuda_graph = true;
    const StepTrace off = test::train<Cuda, bf16>(GetParam().step), with = test::train<Cuda, bf16>(on);
    expect_same(off, with);
    EXPECT_EQ(off.replayed, 0);
    EXPECT_EQ(with.replayed, GetParam().replayed);
    EXPECT_NE(off.lines.front(), off.lines.back());
    if (on.skipped_step > 0) {
        EXPECT_NE(off.lines[static_cast<std::size_t>(on.skipped_step - 1)].find("skipped"), std::string::npos);
    }
    on.in_flight = 2;
    if (!on.evaluate) expect_same(off, test::train<Cuda, bf16>(on));
}

INSTANTIATE_TEST_SUITE_P(Cases, StepGpu,
                         testing::Values(NamedCase{"one_micro_batch", {}, 7},
                                         NamedCase{"two_micro_batches", {.micro_batches = 2}, 7},
                                         NamedCase{"energies", {.pattern = "sb", .kind = ScalarKind::energy}, 7},
                                         NamedCase{"skip", {.skipped_step = 4}, 7},
                                         NamedCase{"skip_at_once", {.skipped_step = 2}, 7},
                                         NamedCase{"document_mask", {.micro_batches = 2, .documents = true}, 0},
                                         NamedCase{"document_mask_skip", {.documents = true, .skipped_step = 4}, 0},
                                         NamedCase{"another_shape_once", {.micro_batches = 2, .short_step = 5}, 6},
                                         NamedCase{"evaluation_in_between", {.evaluate = true}, 7}),
                         [](const auto& info) { return std::string(info.param.name); });

// Against the double reference, no worse than twice the whole head.
TEST(Head, GpuChunksAreAsExact) {
    FIEDLER_GPU_OR_SKIP();
    const ModelSpec spec = test::step_spec("sb", false);
    const test::HeadResult want = test::head_gradients<Cpu, double>(Cpu{}, spec, 1000, 0);
    const test::HeadResult whole = test::head_gradients<Cuda, bf16>(test::gpu(), spec, 1000, 0);
    const test::Error head = test::measure(whole.dhead, want.dhead), dn = test::measure(whole.dn, want.dn);
    const double loss_error = std::abs(whole.loss - want.loss);
    EXPECT_LE(loss_error, 0.01 * want.loss);
    const std::pair<int, int> cuts[] = {{1000, 32}, {1000, 128}, {128, 0}, {128, 64}, {96, 40}};
    for (const auto& [chunk, part] : cuts) {
        SCOPED_TRACE(std::to_string(chunk) + " rows, " + std::to_string(part) + " at a time");
        const test::HeadResult cut = test::head_gradients<Cuda, bf16>(test::gpu(), spec, chunk, part);
        EXPECT_LE(std::abs(cut.loss - want.loss), 2 * loss_error + 1e-6 * want.loss);
        EXPECT_LE(test::measure(cut.dhead, want.dhead).rms, 2 * head.rms);
        EXPECT_LE(test::measure(cut.dn, want.dn).rms, 2 * dn.rms);
        const test::HeadResult again = test::head_gradients<Cuda, bf16>(test::gpu(), spec, chunk, part);
        EXPECT_EQ(again.loss, cut.loss);
        EXPECT_EQ(again.dhead, cut.dhead);
    }
}

// Steps with the head in fp8: recorded and not to the bit the same, and near those in bf16, to which they can go back.
TEST(Step, GpuHeadInFp8) {
    FIEDLER_GPU_OR_SKIP();
    if (!head_has_fp8(test::gpu().arch)) GTEST_SKIP() << "not an sm_90 device, or not in this build: NOT TESTED";
    Config c;
    c.pattern = "sb", c.layers = 2, c.channels = 128, c.heads = 4, c.vocab = 4096, c.context = 256;
    const ModelSpec spec = model_spec(c);
    const auto losses = [&](bool fp8, GraphChoice graph, int steps_in_fp8 = 100) {
        EngineOptions o;
        o.device = DeviceKind::cuda;
        o.memory_budget = std::size_t(2) << 30;
        o.batch_tokens = 8 * 256;
        o.micro_batch = 4;
        o.head_fp8 = fp8;
        o.cuda_graph = graph;
        const auto engine = make_engine(spec, o);
        EXPECT_EQ(engine->plan().head_fp8, fp8);
        std::vector<float> master(static_cast<std::size_t>(engine->table().elements));
        initialise(engine->table(), spec, 1, master.data());
        engine->write(Block::master, master.data());
        std::vector<double> all;
        for (int step = 1; step <= 12; ++step) {
            StepSettings s;
            s.step = step, s.lr = 2e-3, s.head_bf16 = step > steps_in_fp8;
            all.push_back(
                engine->train_step({test::step_batch(spec, 4, 1, false), test::step_batch(spec, 4, 2, false)}, s).loss);
        }
        return all;
    };
    const std::vector<double> fp8 = losses(true, GraphChoice::off), bf16 = losses(false, GraphChoice::off);
    EXPECT_EQ(fp8, losses(true, GraphChoice::on));
    EXPECT_NE(fp8, bf16);
    EXPECT_LT(bf16.back(), bf16.front() - 0.3) << "nothing was learned";
    for (std::size_t i = 0; i < fp8.size(); ++i) EXPECT_NEAR(fp8[i], bf16[i], 0.03 * bf16[i]) << i;
    EXPECT_EQ(bf16, losses(true, GraphChoice::on, 0));
    const std::vector<double> mixed = losses(true, GraphChoice::on, 6);
    EXPECT_EQ(mixed, losses(true, GraphChoice::off, 6));
    EXPECT_TRUE(std::equal(fp8.begin(), fp8.begin() + 6, mixed.begin()));
    for (std::size_t i = 6; i < fp8.size(); ++i) EXPECT_NE(mixed[i], fp8[i]) << i;
}

TEST(Plan, GpuIsWhatTheRunTakes) {
    FIEDLER_GPU_OR_SKIP();
    for (const bool mask : {false, true})
        for (const int micro_batches : {1, 2}) {
            Config c;
            c.channels = 384, c.heads = 6, c.layers = 4, c.vocab = 16384, c.context = 1024;
            const ModelSpec spec = model_spec(c);
            EngineOptions o;
            o.device = DeviceKind::cuda;
            o.memory_budget = std::size_t(16) << 30;
            o.batch_tokens = 8 * 1024;
            o.micro_batch = 8 / micro_batches;
            o.document_mask = mask;
            o.head_fp8 = micro_batches == 2 && head_has_fp8(test::gpu().arch);
            const RunPlan plan = plan_run(spec, o);
            EXPECT_EQ(plan.head_fp8, o.head_fp8);
            std::size_t free_before = 0, free_after = 0, free_running = 0, total = 0;
            memory_info(test::gpu(), free_before, total);
            const auto engine = make_engine(spec, o);
            memory_info(test::gpu(), free_after, total);
            EXPECT_EQ(engine->plan().bytes, plan.bytes);
            EXPECT_EQ(engine->plan().table, plan.table);
            // Beside the arena: the handles of a context, and the driver's rounding. (The driver counts for all processes of
            // the device: nothing else may be at work there.)
            EXPECT_GE(free_before - free_after, plan.bytes);
            EXPECT_LE(free_before - free_after, plan.bytes + (std::size_t(64) << 20));
            for (int step = 1; step <= 4; ++step) {
                std::vector<Batch> batches;
                for (int m = 0; m < micro_batches; ++m)
                    batches.push_back(test::step_batch(spec, o.micro_batch, static_cast<std::uint64_t>(m), mask));
                StepSettings s;
                s.step = step;
                (void)engine->train_step(batches, s);
            }
            memory_info(test::gpu(), free_running, total);
            const auto mebibytes = [](std::size_t more, std::size_t less) {
                return (double(more) - double(less)) / (1 << 20);
            };
            std::printf("beside the arena: %.1f MiB, then %.1f MiB more in the first steps (modules, recorded step)\n",
                        mebibytes(free_before - free_after, plan.bytes), mebibytes(free_after, free_running));
        }
}

}  // namespace
}  // namespace fiedler
#endif
