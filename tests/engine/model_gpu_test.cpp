// tests/engine/model_gpu_test.cpp: the whole model on the GPU against the double CPU reference: loss and gradients of
// every parameter. The tolerance is twice the error of the CPU model whose outputs are rounded to bf16 where the GPU's
// are (tests/support/rounding_cpu.h).
#include "tests/support/rounding_cpu.h"
// The model's templates for RoundingCpu: their sources, without the instances that the engine library holds.
#include "engine/model_instances.h"
#undef FIEDLER_MODEL_INSTANCES
#define FIEDLER_MODEL_INSTANCES()
#include "engine/layers.cpp"
#include "engine/layers_backward.cpp"
#include "engine/model.cpp"
#include "engine/model_samples.cpp"

#if FIEDLER_CUDA
#include <gtest/gtest.h>

#include "engine/config.h"
#include "engine/run_parts.h"
#include "engine/runner.h"
#include "tests/engine/gpu_gradients.h"
#include "tests/engine/random_laplacian.h"
#include "tests/support/buffer.h"
#include "tests/support/compare.h"

namespace fiedler {
namespace {

struct Shape {
    const char* name;
    const char* pattern;
    ScalarKind kind;
    int head_dim, tokens, sequences;
    bool causal = true;
    int spectral_dims = 0;
};

void PrintTo(const Shape& s, std::ostream* out) { *out << s.name; }

ModelSpec spec_of(const Shape& s) {
    Config c;
    c.pattern = s.pattern;
    c.layers = 2;
    c.heads = 2;
    c.channels = 2 * s.head_dim;
    c.scalars = 8;
    c.scalar_kind = s.kind;
    c.vocab = 123;  // no multiple of 8: padded logits
    c.context = s.tokens;
    c.mlp_hidden = 3 * c.channels;
    c.causal = s.causal;
    c.spectral_dims = s.spectral_dims;
    return model_spec(c);
}

Batch batch_of(const Shape& s, const ModelSpec& spec) {
    Batch b;
    b.rows = s.sequences;
    b.length = s.tokens;
    const auto n = static_cast<std::size_t>(s.sequences * s.tokens);
    b.inputs = test::random_ints(n, 21, 0, spec.vocab);
    b.targets = test::random_ints(n, 22, 0, spec.vocab);
    return b;
}

RunPlan plan_of(const Shape& s) {
    RunPlan p;
    p.micro_batch = s.sequences;
    p.tokens = std::int64_t(s.sequences) * s.tokens;
    return p;
}

// U exactly representable in bf16, as the weights are, and an Lf that is not the path's.
ModelConstants constants_of(const ModelSpec& spec) {
    ModelConstants c;
    c.laplacian = path_laplacian(spec.head_dim());
    if (spec.spectral_dims == 0) return c;
    c.spectral = random_spectral_table(spec, 3);
    for (float& x : c.spectral) x = float(bf16(x));
    c.laplacian = test::random_laplacian(spec.head_dim(), 4);
    return c;
}

// The rounded model, laid out like a Runner but without one.
double rounded_gradients(const ModelSpec& spec, const RunPlan& run, const std::vector<float>& w, const Batch& host,
                         std::uint32_t dither, std::vector<float>& grads) {
    const ParamTable table(spec);
    const ActivationPlan plan = activation_plan(spec, run, true);
    RoundingCpu cpu;
    cpu.dither = dither;
    Arena arena;
    RunLayout<float>(arena, spec, table, plan, false);
    arena.commit(memory_of(cpu));
    RunLayout<float> layout(arena, spec, table, plan, false);
    std::fill_n(static_cast<char*>(arena.base()), arena.peak(), 0);
    std::copy(w.begin(), w.end(), layout.params.master.data);
    layout.upload(cpu.plain(), constants_of(spec));
    for (int l = 0; l < spec.layers(); ++l)
        if (layout.acts->layer(l).aux) cpu.f32_products.push_back(layout.acts->layer(l).aux.data);
    Model<RoundingCpu, float> model(cpu, spec, table, layout.params, layout.laplacian(spec.head_dim()), layout.spectral,
                                    plan, *layout.acts);
    DeviceBatch batch;
    const auto n = static_cast<std::int64_t>(host.inputs.size());
    batch.inputs = Vec<const std::int32_t>(host.inputs.data(), n);
    batch.targets = Vec<const std::int32_t>(host.targets.data(), n);
    batch.seq = host.packed();
    model.forward(batch);
    model.loss(batch, {&layout.control->loss, 1}, true, 1.f / static_cast<float>(n));
    model.backward(batch);
    grads.assign(layout.params.grads.data, layout.params.grads.data + table.elements);
    return double(layout.control->loss) / double(n);
}

class ModelGpu : public testing::TestWithParam<Shape> {};

TEST_P(ModelGpu, LossAndGradientsMatchTheCpu) {
    FIEDLER_GPU_OR_SKIP();
    const ModelSpec spec = spec_of(GetParam());
    const RunPlan plan = plan_of(GetParam());
    const Batch batch = batch_of(GetParam(), spec);
    Runner<Cpu, double> reference(std::make_unique<Cpu>(), spec, plan, 0, constants_of(spec));
    Runner<Cuda, bf16> device(std::make_unique<Cuda>(), spec, plan, 0, constants_of(spec));
    const std::vector<float> w = test::start_in_bf16(reference.table(), spec);
    reference.write(Block::master, w.data());
    device.write(Block::master, w.data());
    std::vector<double> want;
    std::vector<float> got, again;
    const double want_loss = reference.loss_and_gradients(batch, want);
    const double got_loss = device.loss_and_gradients(batch, got);
    std::vector<test::LossAndGradients> low(test::kEvaluations);
    for (std::uint32_t k = 0; k < test::kEvaluations; ++k)
        low[k].loss = rounded_gradients(spec, plan, w, batch, k, low[k].gradients);
    test::expect_as_near(reference.table(), want_loss, want, low, {got_loss, got});
    EXPECT_EQ(device.loss_and_gradients(batch, again), got_loss);
    EXPECT_TRUE(test::identical(again.data(), got.data(), got.size() * sizeof(float))) << "two runs differ";
}

// Sums that wait for the end of a backward pass: none gets lost, or into the next pass. The same pass again doubles
// them, to the bit.
void expect_each_pass_adds_its_own(const Shape& shape, const std::vector<int LayerTensors::*>& tensors) {
    const ModelSpec spec = spec_of(shape);
    const ParamTable table(spec);
    const ActivationPlan plan = activation_plan(spec, plan_of(shape), true);
    const Cuda& dev = test::gpu();
    Arena arena;
    RunLayout<bf16>(arena, spec, table, plan, false);
    arena.commit(memory_of(dev));
    RunLayout<bf16> layout(arena, spec, table, plan, false);
    fill_bytes(dev, arena.base(), 0, arena.peak());
    write_block(dev, layout, Block::master, test::start_in_bf16(table, spec).data());
    layout.upload(dev, constants_of(spec));
    Model<Cuda, bf16> model(dev, spec, table, layout.params, layout.laplacian(spec.head_dim()), layout.spectral, plan,
                            *layout.acts);
    const Batch host = batch_of(shape, spec);
    const test::Buffer<std::int32_t, Cuda> inputs(dev, host.inputs), targets(dev, host.targets);
    DeviceBatch batch;
    batch.inputs = inputs.vec(), batch.targets = targets.vec(), batch.seq = host.packed();
    const auto pass = [&] {
        model.forward(batch);
        model.loss(batch, {&layout.control->loss, 1}, true, 1.f);
        model.backward(batch);
        std::vector<float> grads(static_cast<std::size_t>(table.elements));
        copy_to_host(dev, grads.data(), layout.params.grads.data, grads.size() * sizeof(float));
        return grads;
    };
    const std::vector<float> once = pass(), twice = pass();
    const auto expect_doubled = [&](int tensor) {
        ASSERT_GE(tensor, 0);
        const ParamTensor& t = table.tensor[static_cast<std::size_t>(tensor)];
        for (auto i = static_cast<std::size_t>(t.offset); i < static_cast<std::size_t>(t.offset + t.size()); ++i) {
            EXPECT_NE(once[i], 0.f) << t.name;
            EXPECT_EQ(twice[i], 2 * once[i]) << t.name;
        }
    };
    for (const LayerTensors& l : table.layer)
        for (const int LayerTensors::*tensor : tensors) expect_doubled(l.*tensor);
}
TEST(ModelGpuPendingSums, EachPassAddsItsOwn) {
    FIEDLER_GPU_OR_SKIP();
    using L = LayerTensors;
    expect_each_pass_adds_its_own({"", "sb", ScalarKind::coordinate, 64, 129, 2},
                                  {&L::gate_bias, &L::log_temp, &L::conv_scalars, &L::conv});
    expect_each_pass_adds_its_own({"", "sb", ScalarKind::energy, 64, 129, 2},
                                  {&L::gate_bias, &L::log_temp, &L::log_tau, &L::conv});
    expect_each_pass_adds_its_own({"", "d", ScalarKind::coordinate, 64, 129, 2}, {&L::conv});
}

// Where there are kernels that take a prepared Laplacian, a model of energies has one: without it they are right, and slow.
TEST(ModelGpuEnergy, LaplacianIsPrepared) {
    FIEDLER_GPU_OR_SKIP();
    const Shape shape{"", "sb", ScalarKind::energy, 64, 129, 2};
    const ModelSpec spec = spec_of(shape);
    const Cuda& dev = test::gpu();
    Runner<Cuda, bf16> runner(std::make_unique<Cuda>(), spec, plan_of(shape), 0, constants_of(spec));
    const auto dim = std::int32_t(spec.head_dim());
    const FeatureLaplacian<float> of_runner = runner.layout().laplacian(dim);
    FeatureLaplacian<float> own = of_runner;
    own.of_one = own.of_several = {};
    for (const int scalars : {1, 2}) {
        const std::int64_t bytes = energy_matrix_bytes(dim, scalars);
        const test::Buffer<float, Cuda> memory(dev, std::size_t(bytes / 4));
        energy_prepare(dev, own, scalars, {reinterpret_cast<std::byte*>(memory.data()), bytes});
        const EnergyMatrix &got = scalars == 1 ? of_runner.of_one : of_runner.of_several,
                           &want = scalars == 1 ? own.of_one : own.of_several;
        EXPECT_EQ(got.data != nullptr, want.data != nullptr) << "R " << scalars;
        EXPECT_EQ(got.parts, want.parts);
        EXPECT_EQ(got.log2, want.log2);
    }
}

std::vector<Shape> shapes() {
    std::vector<Shape> all;
    static std::vector<std::string> names;
    names.reserve(1000);
    const auto add = [&](const char* kind_name, const char* pattern, ScalarKind kind, int d, int t, bool causal = true,
                         int spectral_dims = 0) {
        names.push_back(std::string(kind_name) + "_D" + std::to_string(d) + "_T" + std::to_string(t) +
                        (causal ? "" : "_bidirectional"));
        if (spectral_dims > 0) names.back() += "_spectral" + std::to_string(spectral_dims);
        all.push_back({names.back().c_str(), pattern, kind, d, t, t >= 1024 ? 1 : 2, causal, spectral_dims});
    };
    const auto every = [&](int d, int t) {
        add("coordinate", "sb", ScalarKind::coordinate, d, t);
        add("energy", "sb", ScalarKind::energy, d, t);
        add("dot", "dd:50", ScalarKind::coordinate, d, t);
    };
    for (const int t : {1, 7, 64, 129}) every(64, t);
    for (const int d : {16, 32, 128}) every(d, 129);
    for (const int d : {16, 32, 64, 128}) every(d, 1024);
    add("coordinate", "s:33b", ScalarKind::coordinate, 64, 129, false);
    add("dot", "dd", ScalarKind::coordinate, 64, 129, false);
    for (const int t : {1, 129, 1024}) add("coordinate", "sb", ScalarKind::coordinate, 64, t, true, 64);
    add("coordinate", "sb", ScalarKind::coordinate, 32, 129, true, 13);
    for (const int d : {16, 32, 64, 128}) add("energy", "sb", ScalarKind::energy, d, 129, true, 8);
    return all;
}

INSTANTIATE_TEST_SUITE_P(Shapes, ModelGpu, testing::ValuesIn(shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fiedler
#endif
