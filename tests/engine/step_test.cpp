// tests/engine/step_test.cpp: what does not change a step: how the head is cut into chunks, and how many steps are on
// their way. The plan's memory is the run's.
#include <gtest/gtest.h>

#include "engine/runner.h"
#include "tests/engine/step_model.h"
#include "tests/engine/temp_folder.h"

namespace fiedler {
namespace {

using test::HeadResult;

TEST(Head, ChunksChangeNothing) {
    const ModelSpec spec = test::step_spec("sb", false);
    const HeadResult whole = test::head_gradients<Cpu, double>(Cpu{1}, spec, 1000, 0);
    EXPECT_GT(whole.loss, 1);
    const std::pair<int, int> cuts[] = {{1000, 1}, {1000, 7}, {1000, 64}, {64, 0}, {64, 16}, {50, 50}, {50, 7}, {1, 1}};
    for (const auto& [chunk, part] : cuts) {
        SCOPED_TRACE(std::to_string(chunk) + " rows, " + std::to_string(part) + " at a time");
        const HeadResult cut = test::head_gradients<Cpu, double>(Cpu{1}, spec, chunk, part);
        EXPECT_NEAR(cut.loss, whole.loss, 1e-13 * whole.loss);
        EXPECT_TRUE(test::close_to(cut.dhead, whole.dhead, 1e-12));
        EXPECT_TRUE(test::close_to(cut.dn, whole.dn, 1e-12));
    }
}

TEST(Head, RowsAtATimeFollowTheCache) {
    const auto rows = [](std::int64_t vocab, std::size_t mebibytes) {
        Config c;
        c.vocab = vocab;
        c.channels = 384;
        c.heads = 6;
        c.context = 1024;
        const ModelSpec spec = model_spec(c);
        RunPlan run;
        run.tokens = 32 * 1024;
        const ActivationPlan plan = activation_plan(spec, run, true);
        EXPECT_LE(plan.logits_rows * vocab * 2, 1 << 30);
        EXPECT_GE(plan.logits_rows, 128);
        return std::pair(plan.logits_rows, loss_rows(spec, plan, mebibytes << 20));
    };
    using Rows = std::pair<std::int64_t, std::int64_t>;
    EXPECT_EQ(rows(16384, 50), Rows(8192, 512));   // H100: 16 MiB of logits
    EXPECT_EQ(rows(50304, 50), Rows(8192, 256));   // 24.6 MiB
    EXPECT_EQ(rows(16384, 72), Rows(8192, 1024));  // RTX 4090: 32 MiB
    EXPECT_EQ(rows(16384, 6), Rows(8192, 0));      // too small a cache
    EXPECT_EQ(rows(262144, 50), Rows(2048, 0));    // too large a vocabulary
    EXPECT_EQ(rows(256, 50), Rows(8192, 0));       // the whole chunk fits
}

TEST(Step, OneOnItsWayOrTwo) {
    const test::StepTrace one = test::train<Cpu, float>({.micro_batches = 2}),
                          two = test::train<Cpu, float>({.micro_batches = 2, .in_flight = 2});
    EXPECT_EQ(one.lines, two.lines);
    EXPECT_TRUE(test::identical(one.state.data(), two.state.data(), one.state.size() * sizeof(float)));
    EXPECT_NE(one.lines.front(), one.lines.back());
}

TEST(Step, SkippedStepsLeaveTheWeights) {
    const test::StepTrace some = test::train<Cpu, float>({.skipped_step = 3});
    EXPECT_NE(some.lines[2].find("skipped"), std::string::npos) << some.lines[2];
    EXPECT_EQ(some.lines[3].find("skipped"), std::string::npos) << some.lines[3];
    const test::StepTrace none = test::train<Cpu, float>({});
    EXPECT_NE(none.state, some.state);
}

TEST(Step, MoreThanPlannedIsRefused) {
    const ModelSpec spec = test::step_spec("s", false);
    RunPlan plan;
    plan.tokens = 2 * spec.context;
    Runner<Cpu, float> runner(std::make_unique<Cpu>(), spec, plan, 0);
    const Batch b = test::step_batch(spec, 2, 1, false), long_one = test::step_batch(spec, 3, 1, false),
                ragged = test::step_batch(spec, 2, 1, true);
    EXPECT_THROW((void)runner.train_step({b, b}, {}), std::logic_error) << "micro-batches";
    EXPECT_THROW((void)runner.train_step({long_one}, {}), std::logic_error) << "tokens";
    EXPECT_THROW((void)runner.train_step({ragged}, {}), std::logic_error) << "documents";
    EXPECT_THROW((void)runner.finish_step(), std::logic_error);
    for (int i = 0; i < Engine::kStepsInFlight; ++i) runner.submit_step({b}, {});
    EXPECT_THROW(runner.submit_step({b}, {}), std::logic_error);
}

TEST(Plan, IsWhatTheRunTakes) {
    for (const bool mask : {false, true})
        for (const Recompute recompute : {Recompute::none, Recompute::mlp, Recompute::layer})
            for (const int micro_batches : {1, 3}) {
                const ModelSpec spec = test::step_spec("sbd", true);
                EngineOptions o;
                o.batch_tokens = 3 * spec.context;
                o.micro_batch = 3 / micro_batches;
                o.document_mask = mask;
                o.recompute = static_cast<RecomputeChoice>(static_cast<int>(recompute) + 1);
                const RunPlan plan = plan_run(spec, o);
                EXPECT_EQ(plan.recompute, recompute);
                EXPECT_EQ(plan.micro_batches, micro_batches);
                const auto engine = make_engine(spec, o, test::step_constants(spec));
                EXPECT_EQ(engine->plan().bytes, plan.bytes);
                EXPECT_EQ(engine->plan().table, plan.table);
                EngineOptions tight = o;
                tight.memory_budget = plan.bytes;
                EXPECT_EQ(make_engine(spec, tight, test::step_constants(spec))->plan().bytes, plan.bytes);
                tight.memory_budget = plan.bytes - 1;
                EXPECT_THROW((void)plan_run(spec, tight), InputError);
            }
}

TEST(Plan, SkippingIsAsAsked) {
    const ModelSpec spec = test::step_spec("s", false);
    Config c;
    for (const bool skip : {true, false}) {
        c.attention_skip = skip;
        c.batch_tokens = spec.context;
        const RunPlan plan = plan_run(spec, engine_options(c, DeviceKind::cpu, true));
        EXPECT_EQ(activation_plan(spec, plan, false).attention_skip, skip);
    }
}

// The scratch of the way in fp8 is planned where it is taken: a training step on a GPU, in shapes that it has.
TEST(Plan, HeadInFp8WhereItCanBe) {
    const auto plan_of = [](bool fp8, std::int64_t vocab, std::int64_t channels, std::int64_t context, bool training,
                            DeviceKind device) {
        Config c;
        c.pattern = "s", c.layers = 1, c.channels = channels, c.heads = channels / 64, c.vocab = vocab,
        c.context = context;
        EngineOptions o;
        o.device = device;
        o.memory_budget = std::size_t(8) << 30;  // so that no device is asked
        o.batch_tokens = training ? 4 * context : 0;
        o.training = training;
        o.head_fp8 = fp8;
        return plan_run(model_spec(c), o);
    };
    const auto taken = [&](std::int64_t vocab, std::int64_t channels, std::int64_t context, bool training,
                           DeviceKind device) {
        const RunPlan plan = plan_of(true, vocab, channels, context, training, device);
        EXPECT_EQ(plan.table.find("head.fp8") != std::string::npos, plan.head_fp8);
        const RunPlan without = plan_of(false, vocab, channels, context, training, device);
        EXPECT_FALSE(without.head_fp8);
        EXPECT_EQ(without.table == plan.table, !plan.head_fp8);
        EXPECT_GE(plan.bytes, without.bytes);
        return plan.head_fp8;
    };
    EXPECT_TRUE(taken(4096, 128, 64, true, DeviceKind::cuda));
    EXPECT_TRUE(taken(50304, 384, 1024, true, DeviceKind::cuda));
    EXPECT_FALSE(taken(4096, 128, 64, true, DeviceKind::cpu));
    EXPECT_FALSE(taken(4096, 128, 64, false, DeviceKind::cuda));
    EXPECT_FALSE(taken(4096, 192, 64, true, DeviceKind::cuda));
    EXPECT_FALSE(taken(4096, 1024, 64, true, DeviceKind::cuda));
    EXPECT_FALSE(taken(4104, 128, 64, true, DeviceKind::cuda));
    EXPECT_FALSE(taken(4096, 128, 40, true, DeviceKind::cuda));
    Config c;
    c.head_precision = HeadChoice::fp8;
    EXPECT_FALSE(engine_options(c, DeviceKind::cpu, true).head_fp8);
    EXPECT_FALSE(engine_options(c, DeviceKind::cuda, false).head_fp8);
    if (cuda_device_count() == 0) {  // planned for a GPU that is elsewhere
        EXPECT_TRUE(engine_options(c, DeviceKind::cuda, true).head_fp8);
    }
    c.kernels = KernelChoice::general;  // fp8's are sm_90's own
    EXPECT_EQ(engine_options(c, DeviceKind::cuda, true).kernels, KernelChoice::general);
    EXPECT_FALSE(engine_options(c, DeviceKind::cuda, true).head_fp8);
    c.kernels = KernelChoice::automatic;
    // The last steps have it in bf16.
    c.steps = 10, c.head_bf16_fraction = 0.25;
    EXPECT_EQ(steps_in_fp8(c), 8);
    EXPECT_FALSE(step_settings(c, 8, 1e-3, 0).head_bf16);
    EXPECT_TRUE(step_settings(c, 9, 1e-3, 0).head_bf16);
    c.head_bf16_fraction = 0;
    EXPECT_FALSE(step_settings(c, 10, 1e-3, 0).head_bf16);
    c.head_bf16_fraction = 1;
    EXPECT_TRUE(step_settings(c, 1, 1e-3, 0).head_bf16);
    c.head_precision = HeadChoice::bf16;
    EXPECT_FALSE(engine_options(c, DeviceKind::cuda, true).head_fp8);
}

TEST(Plan, CudaGraphWhereItCanBe) {
    const ModelSpec spec = test::step_spec("s", false);
    EngineOptions o;
    o.device = DeviceKind::cuda;
    o.memory_budget = std::size_t(1) << 30;  // so that no device is asked
    o.batch_tokens = spec.context;
    EXPECT_TRUE(plan_run(spec, o).cuda_graph);
    o.document_mask = true;
    EXPECT_FALSE(plan_run(spec, o).cuda_graph);
    o.cuda_graph = GraphChoice::on;
    EXPECT_NE(test::input_error_of([&] { (void)plan_run(spec, o); }).find("cuda-graph"), std::string::npos);
    o.document_mask = false;
    EXPECT_TRUE(plan_run(spec, o).cuda_graph);
    o.device = DeviceKind::cpu;
    EXPECT_NE(test::input_error_of([&] { (void)plan_run(spec, o); }).find("cuda-graph"), std::string::npos);
    o.cuda_graph = GraphChoice::automatic;
    EXPECT_FALSE(plan_run(spec, o).cuda_graph);
}

}  // namespace
}  // namespace fiedler
