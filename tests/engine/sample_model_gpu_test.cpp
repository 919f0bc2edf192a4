// tests/engine/sample_model_gpu_test.cpp: whole models of samples on the GPU against the double CPU reference: loss and
// gradients of every parameter, of molecules, nodes and series. The tolerance is that of model_gpu_test.cpp. Its yardstick
// is tested without a GPU too, by the CPU's own model in f32.
#include "tests/support/rounding_cpu.h"
// The model's templates for RoundingCpu: their sources, without the instances that the engine library holds.
#include "engine/model_instances.h"
#undef FIEDLER_MODEL_INSTANCES
#define FIEDLER_MODEL_INSTANCES()
#include <gtest/gtest.h>

#include "engine/layers.cpp"
#include "engine/layers_backward.cpp"
#include "engine/model.cpp"
#include "engine/model_samples.cpp"
#include "engine/sample_runner.h"
#include "tests/engine/gpu_gradients.h"
#include "tests/engine/random_samples.h"

namespace fiedler {
namespace {

using test::per_sample;

struct Case {
    const char* name;
    std::function<void(Config&, SampleShape&)> change;
    std::vector<std::int32_t> sizes = {17, 1, 24, 9, 31};
    Recompute recompute = Recompute::none;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

void molecules(Config&, SampleShape& s) {
    per_sample(s, TargetKind::regression, 2);
    s.edge_types = 10, s.spectral_dims = 5;
}
void nodes(Config& c, SampleShape& s) {
    s.kind = TargetKind::classes, s.level = TargetLevel::node, s.outputs = 4, s.edge_types = 1;
    c.task = Task::nodes;
}
void series(Config& c, SampleShape& s) {
    per_sample(s, TargetKind::regression, 12);
    c.task = Task::series, c.pool = PoolChoice::flatten;
    s.nodes_per_sample = 6, s.edge_types = 0, s.dense = true, s.features = 16;
}

const std::vector<Case>& cases() {
    const std::vector<std::int32_t> windows = {6, 6, 6, 6, 6, 6, 6}, graph = {90};
    static const std::vector<Case> all = {
        {"molecules", molecules},
        {"molecules_without_spectrum", [](Config& c, SampleShape& s) { molecules(c, s), s.spectral_dims = 0; }},
        {"molecules_binary",
         [](Config& c, SampleShape& s) { molecules(c, s), per_sample(s, TargetKind::binary, 12), c.pattern = "b"; }},
        {"molecules_attention_pool",
         [](Config& c, SampleShape& s) { molecules(c, s), c.pool = PoolChoice::attention, c.spectral_start = true; }},
        {"molecules_sum_energy",
         [](Config& c, SampleShape& s) {
             molecules(c, s), c.pool = PoolChoice::sum, c.scalar_kind = ScalarKind::energy;
         }},
        {"molecules_dot", [](Config& c, SampleShape& s) { molecules(c, s), c.pattern = "d"; }},
        {"molecules_local_hops", [](Config& c, SampleShape& s) { molecules(c, s), c.hops = 2, c.local = true; }},
        {"molecules_without_layers",
         [](Config& c, SampleShape& s) { molecules(c, s), c.layers = 0, c.input_hops = 3; }},
        {"molecules_recompute", molecules, {17, 1, 24, 9, 31}, Recompute::layer},
        {"nodes", nodes, graph},
        {"nodes_spectral", [](Config& c, SampleShape& s) { nodes(c, s), s.spectral_dims = 8, c.input_hops = 2; },
         graph},
        {"nodes_without_layers",
         [](Config& c, SampleShape& s) { nodes(c, s), c.layers = 0, c.input_hops = 8, c.last_norm = false; }, graph},
        {"nodes_dense", [](Config& c, SampleShape& s) { nodes(c, s), s.dense = true; }, graph},
        {"series", series, windows},
        {"series_linear", [](Config& c, SampleShape& s) { series(c, s), c.layers = 0, c.last_norm = false; }, windows},
        {"series_channels",
         [](Config& c, SampleShape& s) {
             series(c, s), s.edge_types = 1, s.spectral_dims = 4, s.level = TargetLevel::node;
             c.pool = Config().pool;
         },
         windows},
    };
    return all;
}

constexpr SampleCapacity kMost{100, 20, 6000, 2000};  // more than any batch here: frames have nodes of their own

struct Problem {
    ModelSpec spec;
    RunPlan plan;
    SampleBatch batch;
};

Problem problem_of(const Case& c) {
    Config k;
    k.task = Task::molecules, k.pattern = "sb", k.layers = 2, k.channels = 64, k.heads = 2, k.scalars = 8;
    k.mlp_hidden = 96;
    SampleShape shape;
    shape.features = 40;
    c.change(k, shape);
    Problem p;
    p.spec = model_spec(k, shape, *std::max_element(c.sizes.begin(), c.sizes.end()));
    p.plan.recompute = c.recompute;
    p.plan.training = true;
    p.plan.cuda_graph = false;
    p.batch = test::random_batch(shape, c.sizes, 4);
    // What the GPU is given in bf16 is given to all.
    for (std::vector<float>* v : {&p.batch.dense, &p.batch.spectral})
        for (float& x : *v) x = float(bf16(x));
    return p;
}

constexpr SampleDraw kDraw{true, 17};

// The rounded model, laid out like a SampleRunner but without one.
test::LossAndGradients rounded(const Problem& p, const std::vector<float>& w, std::uint32_t dither) {
    const ParamTable table(p.spec);
    const BatchLayout<float> batches(p.spec, kMost, true, false);  // a frame that shows would show in the tolerance
    const ActivationPlan plan = sample_activation_plan(batches.frame(), p.plan, true);
    RoundingCpu cpu;
    cpu.dither = dither;
    cpu.threads = 1;  // for so little, more would wait for one another
    PreparedBatch room;
    room.block = HostBlock(static_cast<std::byte*>(host_alloc(cpu.plain(), batches.bytes())),
                           [&](std::byte* block) { host_free(cpu.plain(), block); });
    batches.prepare(p.batch, kDraw, room);
    Arena arena;
    RunLayout<float>(arena, p.spec, table, plan, false);
    arena.commit(memory_of(cpu));
    RunLayout<float> layout(arena, p.spec, table, plan, false);
    std::fill_n(static_cast<char*>(arena.base()), arena.peak(), 0);
    std::copy(w.begin(), w.end(), layout.params.master.data);
    ModelConstants constants;
    constants.laplacian = path_laplacian(p.spec.head_dim());
    layout.upload(cpu.plain(), constants);
    const ScratchActivations<float>& scratch = layout.acts->scratch();
    for (std::int64_t i = 0; i < scratch.ones.rows; ++i) *scratch.ones.row(i) = 1;
    cpu.f32_products = {scratch.outputs.data, scratch.z.data};
    for (int l = 0; l < p.spec.layers(); ++l)
        for (const float* f32 : {layout.acts->layer(l).aux.data, layout.acts->layer(l).scalars.data})
            cpu.f32_products.push_back(f32);
    std::erase(cpu.f32_products, nullptr);
    Model<RoundingCpu, float> model(cpu, p.spec, table, layout.params, layout.laplacian(p.spec.head_dim()), {}, plan,
                                    *layout.acts);
    DeviceSamples samples;
    const DeviceBatch batch = batches.at(room, room.block.get(), samples);
    model.forward(batch);
    model.sample_loss(batch, {&layout.control->loss, 1}, samples.count, true);
    model.backward(batch);
    return {double(layout.control->loss) / double(room.known),
            {layout.params.grads.data, layout.params.grads.data + table.elements}};
}

// Loss and gradients of Device in T, in frames, held against the reference.
template <class T, class Device>
void expect_model_as_near(const Case& c, std::unique_ptr<Device> on) {
    const Problem p = problem_of(c);
    SampleRunner<Cpu, double> reference(std::make_unique<Cpu>(Cpu{1}), p.spec, kMost, p.plan, 0);
    SampleRunner<Device, T> device(std::move(on), p.spec, kMost, p.plan, 0, true);
    const std::vector<float> w = test::start_in_bf16(reference.table(), p.spec);
    reference.write(Block::master, w.data());
    device.write(Block::master, w.data());
    std::vector<double> want;
    const double want_loss = reference.loss_and_gradients(p.batch, kDraw, want);
    std::vector<test::LossAndGradients> low;
    for (std::uint32_t k = 0; k < test::kEvaluations; ++k) low.push_back(rounded(p, w, k));
    EXPECT_NE(low[0].loss, low[1].loss) << "the yardstick rounds nothing";
    test::LossAndGradients got, again;
    got.loss = device.loss_and_gradients(p.batch, kDraw, got.gradients);
    test::expect_as_near(reference.table(), want_loss, want, low, got);
    again.loss = device.loss_and_gradients(p.batch, kDraw, again.gradients);
    EXPECT_EQ(again.loss, got.loss);
    EXPECT_TRUE(test::identical(again.gradients.data(), got.gradients.data(), got.gradients.size() * sizeof(float)))
        << "two runs differ";
}

class SampleModelYardstick : public testing::TestWithParam<Case> {};

TEST_P(SampleModelYardstick, HoldsForTheCpuInF32) {
    expect_model_as_near<float>(GetParam(), std::make_unique<Cpu>(Cpu{1}));
}

INSTANTIATE_TEST_SUITE_P(All, SampleModelYardstick, testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

#if FIEDLER_CUDA
class SampleModelGpu : public testing::TestWithParam<Case> {};

TEST_P(SampleModelGpu, LossAndGradientsMatchTheCpu) {
    FIEDLER_GPU_OR_SKIP();
    expect_model_as_near<bf16>(GetParam(), std::make_unique<Cuda>());
}

// A step that is recorded and replayed is the step that is not: weights after six of them, of batches of several sizes.
TEST_P(SampleModelGpu, RecordedStepsAreTheOthersBitForBit) {
    FIEDLER_GPU_OR_SKIP();
    Problem p = problem_of(GetParam());
    std::vector<float> weights[2];
    for (const bool recorded : {false, true}) {
        p.plan.cuda_graph = recorded;
        SampleRunner<Cuda, bf16> device(std::make_unique<Cuda>(), p.spec, kMost, p.plan, 0);
        const std::vector<float> w = test::start_in_bf16(device.table(), p.spec);
        device.write(Block::master, w.data());
        PreparedBatch rooms[] = {device.room(), device.room()};
        StepSettings settings;
        settings.lr = 1e-3;
        for (std::uint64_t step = 0; step < 6; ++step, ++settings.step) {
            device.prepare(p.batch, {true, step}, rooms[step % 2]);
            device.submit_step(rooms[step % 2], settings);
            EXPECT_FALSE(device.finish_step().skipped);
        }
        EXPECT_EQ(device.replayed_steps(), recorded ? 5 : 0);
        weights[recorded].resize(w.size());
        device.read(Block::master, weights[recorded].data());
        EXPECT_NE(weights[recorded], w);
    }
    EXPECT_TRUE(weights[0] == weights[1]);
}

INSTANTIATE_TEST_SUITE_P(All, SampleModelGpu, testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });
#endif

}  // namespace
}  // namespace fiedler
