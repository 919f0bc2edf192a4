// The spectral embedding and the feature Laplacian as parts of a model: their tables and tensors, where they come from,
// what they do to the forward pass and to tau. Runs of the real binary with them: spectral_command_test.cpp.
#include "engine/spectral_embedding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "engine/config.h"
#include "engine/runner.h"
#include "engine/spectral_source.h"
#include "tests/engine/random_laplacian.h"
#include "tests/engine/temp_folder.h"
#include "tests/support/compare.h"

namespace fiedler {
namespace {

using test::close_to;
using test::Values;

Config small_config(int spectral_dims, bool energies = false) {
    Config c;
    c.pattern = "sb";
    c.layers = 2;
    c.channels = 32;
    c.heads = 2;
    c.scalars = 4;
    c.vocab = 40;
    c.context = 12;
    c.spectral_dims = spectral_dims;
    if (energies) c.scalar_kind = ScalarKind::energy;
    return c;
}
ModelSpec small_spec(int spectral_dims, bool energies = false) {
    return model_spec(small_config(spectral_dims, energies));
}

RunPlan small_plan() {
    RunPlan p;
    p.micro_batch = 2;
    p.tokens = 24;
    return p;
}
Batch small_batch() {
    Batch b;
    b.inputs = test::random_ints(24, 1, 0, 40);
    b.targets = test::random_ints(24, 2, 0, 40);
    b.rows = 2;
    b.length = 12;
    return b;
}
template <class T>
std::unique_ptr<Runner<Cpu, T>> runner_of(const ModelSpec& spec, const ModelConstants& constants) {
    auto runner = std::make_unique<Runner<Cpu, T>>(std::make_unique<Cpu>(), spec, small_plan(), 0, constants);
    std::vector<float> w(static_cast<std::size_t>(runner->table().elements));
    initialise(runner->table(), spec, 5, w.data());
    runner->write(Block::master, w.data());
    return runner;
}

// A reader over tensors in memory, as files hold them.
TensorReader reader_of(const std::vector<ConstantTensor>& tensors) {
    return [&tensors](const std::string& name, const std::vector<std::int64_t>& shape, std::vector<float>& out) {
        for (const ConstantTensor& t : tensors)
            if (t.name == name) {
                EXPECT_EQ(t.shape, shape);
                out = t.values;
                return true;
            }
        return false;
    };
}

TEST(SpectralTable, RandomColumnsAreOrthogonalWithUnitMeanSquare) {
    for (const int k : {1, 5, 8, 40}) {
        const ModelSpec spec = small_spec(k);
        const std::vector<float> table = random_spectral_table(spec, 3);
        const int padded = spec.spectral_columns();
        ASSERT_EQ(table.size(), static_cast<std::size_t>(40 * padded));
        EXPECT_EQ(padded % 8, 0);
        EXPECT_LT(padded - k, 8);
        for (int i = 0; i < padded; ++i)
            for (int j = 0; j < padded; ++j) {
                double sum = 0;
                for (int v = 0; v < 40; ++v)
                    sum += double(table[static_cast<std::size_t>(v * padded + i)]) *
                           double(table[static_cast<std::size_t>(v * padded + j)]);
                EXPECT_NEAR(sum / 40, i == j && i < k ? 1 : 0, 1e-6) << i << " " << j;
            }
        EXPECT_EQ(table, random_spectral_table(spec, 3));
        EXPECT_NE(table, random_spectral_table(spec, 4));
    }
}

TEST(SpectralTable, TakesItsColumnsFromBehindTheNullSpace) {
    const ModelSpec spec = small_spec(3);
    std::vector<float> vectors;
    for (int v = 0; v < 40; ++v)
        for (int j = 0; j < 6; ++j) vectors.push_back(static_cast<float>(10 * v + j));
    const std::vector<float> table = spectral_table(spec, vectors, 6, 2);
    for (int v = 0; v < 40; ++v)
        for (int j = 0; j < 8; ++j)
            EXPECT_FLOAT_EQ(table[static_cast<std::size_t>(8 * v + j)],
                            j < 3 ? std::sqrt(40.f) * static_cast<float>(10 * v + 2 + j) : 0.f);
    EXPECT_THROW((void)spectral_table(spec, vectors, 6, 4), std::logic_error);
}

TEST(SpectralTable, UnitRowsHaveOneLengthAndTheirDirection) {
    const ModelSpec spec = small_spec(3);
    std::vector<float> vectors;
    for (int v = 0; v < 40; ++v)
        for (int j = 0; j < 4; ++j) vectors.push_back(v == 7 ? 0.f : static_cast<float>((v + 1) * (j + 1)));
    const std::vector<float> table = spectral_table(spec, vectors, 4, 1, SpectralRows::unit);
    for (int v = 0; v < 40; ++v)
        for (int j = 0; j < 3; ++j)
            EXPECT_FLOAT_EQ(table[static_cast<std::size_t>(8 * v + j)],
                            v == 7 ? 0.f : std::sqrt(3.f) * static_cast<float>(j + 2) / std::sqrt(29.f));
}

TEST(SpectralWeights, StartAtZero) {
    const ModelSpec spec = small_spec(13), none = small_spec(0);
    const ParamTable table(spec), without(none);
    EXPECT_EQ(without.spectral, -1);
    EXPECT_EQ(without.find("spectral.weight"), nullptr);
    const ParamTensor* t = table.find("spectral.weight");
    ASSERT_NE(t, nullptr);
    EXPECT_EQ(t->shape(), (std::vector<std::int64_t>{32, 16}));
    EXPECT_EQ(t->group, Group::decayed);
    EXPECT_EQ(table.parameters, without.parameters + 32 * 13);
    std::vector<float> w(static_cast<std::size_t>(table.elements), 1);
    initialise(table, spec, 1, w.data());
    for (std::int64_t i = 0; i < t->size(); ++i) EXPECT_EQ(w[static_cast<std::size_t>(t->offset + i)], 0);
}

TEST(SpectralModel, EmbedsAsTheFormulaSays) {
    const ModelSpec spec = small_spec(5);
    ModelConstants constants;
    constants.spectral = random_spectral_table(spec, 3);
    const auto runner = runner_of<double>(spec, constants);
    const ParamTensor& ws_of_start = *runner->table().find("spectral.weight");  // zeros: give it something
    for (std::int64_t i = 0; i < ws_of_start.size(); ++i)
        if (i % ws_of_start.cols < 5)
            runner->layout().params.master.data[ws_of_start.offset + i] = 0.01 * double(i % 7);
    const Batch batch = small_batch();
    runner->loss_sum(batch);
    const double* w = runner->layout().params.master.data;
    const ParamTable& table = runner->table();
    const Mat<const double> e = table.matrix(w, table.embedding), ws = table.matrix(w, table.spectral);
    const Mat<double> x = runner->model().layer_activations(0).x;
    Values got, want;
    for (std::size_t i = 0; i < batch.inputs.size(); ++i)
        for (std::int64_t c = 0; c < 32; ++c) {
            double sum = e.row(batch.inputs[i])[c];
            for (std::int64_t j = 0; j < 5; ++j)
                sum += double(constants.spectral[static_cast<std::size_t>(batch.inputs[i] * 8 + j)]) * ws.row(c)[j];
            want.push_back(sum);
            got.push_back(x.row(static_cast<std::int64_t>(i))[c]);
        }
    EXPECT_TRUE(close_to(got, want, 1e-14));
}

TEST(SpectralModel, RefusesTheConstantsOfAnotherModel) {
    const ModelSpec spec = small_spec(5, true);
    ModelConstants constants;
    EXPECT_THROW((void)runner_of<float>(spec, constants), std::logic_error);  // no table
    constants.spectral = random_spectral_table(small_spec(13, true), 1);
    EXPECT_THROW((void)runner_of<float>(spec, constants), std::logic_error);
    constants.spectral = random_spectral_table(spec, 1);
    constants.laplacian = path_laplacian(8);
    EXPECT_THROW((void)runner_of<float>(spec, constants), std::logic_error);
    constants.laplacian = path_laplacian(16);
    EXPECT_NO_THROW((void)runner_of<float>(spec, constants));
}

TEST(SpectralModel, MemoryIsPlannedWithIt) {
    RunPlan with = small_plan(), without = small_plan();
    measure<float>(small_spec(16), with);
    measure<float>(small_spec(0), without);
    EXPECT_GE(with.bytes, without.bytes + 40 * 16 * sizeof(float) + 24 * 16 * sizeof(float));
    EXPECT_HAS(with.table, "spectral.U");
    EXPECT_EQ(without.table.find("spectral"), std::string::npos);
}

// E is linear in Lf, so twice the Laplacian gives twice the median; in the first layer, whose queries are the same.
TEST(FeatureLaplacianOfModel, TauFollowsIt) {
    const ModelSpec spec = small_spec(0, true);
    ModelConstants path, once, twice;
    path.laplacian = path_laplacian(16);
    once.laplacian = twice.laplacian = test::random_laplacian(16, 7);
    for (double& v : twice.laplacian.values) v *= 2;
    for (double& v : twice.laplacian.eigenvalues) v *= 2;
    const auto tau = [&](const ModelConstants& c) {
        return runner_of<double>(spec, c)->calibrate_tau(small_batch())[0][0];
    };
    EXPECT_EQ(tau(path), tau({}));  // the default
    EXPECT_NE(tau(once), tau(path));
    EXPECT_DOUBLE_EQ(tau(twice), 2 * tau(once));
}

TEST(Constants, SurviveAFileBitForBit) {
    const ModelSpec spec = small_spec(5, true);
    ModelConstants constants;
    constants.spectral = random_spectral_table(spec, 3);
    constants.laplacian = test::random_laplacian(16, 7);
    const std::vector<ConstantTensor> tensors = tensors_of(spec, constants);
    ASSERT_EQ(tensors.size(), 4u);
    EXPECT_EQ(tensors[0].shape, (std::vector<std::int64_t>{40, 5}));  // without padding
    const ModelConstants back = constants_from(spec, false, reader_of(tensors), "test");
    EXPECT_EQ(back.spectral, constants.spectral);
    EXPECT_EQ(back.laplacian.offsets, constants.laplacian.offsets);
    EXPECT_EQ(back.laplacian.columns, constants.laplacian.columns);
    EXPECT_EQ(back.laplacian.values, constants.laplacian.values);
    EXPECT_EQ(back.laplacian.eigenvectors, constants.laplacian.eigenvectors);
    EXPECT_EQ(back.laplacian.eigenvalues, constants.laplacian.eigenvalues);
    // Models without them write and need nothing.
    EXPECT_TRUE(tensors_of(small_spec(0), {}).empty());
    EXPECT_TRUE(constants_from(small_spec(0), true, reader_of({}), "test").spectral.empty());
}

// The path's Lf is not exact in f32: what a device computes with must be the same before and after.
TEST(Constants, APathIsTheSameOnTheDeviceAfterAFile) {
    const ModelSpec spec = small_spec(0, true);
    const std::vector<ConstantTensor> tensors = tensors_of(spec, {});
    ASSERT_EQ(tensors.size(), 3u);
    const auto fresh = runner_of<float>(spec, {}),
               read = runner_of<float>(spec, constants_from(spec, true, reader_of(tensors), "test"));
    std::vector<float> a, b;
    EXPECT_EQ(fresh->loss_and_gradients(small_batch(), a), read->loss_and_gradients(small_batch(), b));
    EXPECT_EQ(a, b);
}

TEST(Constants, AbsentTensorsAreRefused) {
    const ModelSpec spec = small_spec(5, true);
    ModelConstants constants;
    constants.spectral = random_spectral_table(spec, 3);
    const std::vector<ConstantTensor> all = tensors_of(spec, constants);
    for (std::size_t left_out = 0; left_out < all.size(); ++left_out) {
        std::vector<ConstantTensor> some = all;
        some.erase(some.begin() + static_cast<std::ptrdiff_t>(left_out));
        const std::string message =
            test::input_error_of([&] { (void)constants_from(spec, false, reader_of(some), "a/model.fdl"); });
        EXPECT_HAS(message, "a/model.fdl");
        EXPECT_HAS(message, all[left_out].name);
    }
    // Files from before Lf was saved have the path's.
    const ModelSpec old = small_spec(0, true);
    EXPECT_EQ(constants_from(old, true, reader_of({}), "test").laplacian.dim, 0);
}

TEST(FeatureSourceKnob, MeansWhatTheModelCanHave) {
    const auto source = [](int dims, const char* choice, const char* from = "corpus") {
        Config c = small_config(dims, true);
        c.feature_laplacian = choice;
        c.spectral_source = from;
        return feature_source(c, model_spec(c));
    };
    EXPECT_EQ(source(0, "auto"), FeatureSource::path);
    EXPECT_EQ(source(15, "auto"), FeatureSource::path);  // a head is 16 wide
    EXPECT_EQ(source(16, "auto"), FeatureSource::corpus);
    EXPECT_EQ(source(16, "auto", "a.fdl"), FeatureSource::corpus);
    EXPECT_EQ(source(16, "auto", "random"), FeatureSource::path);
    EXPECT_EQ(source(16, "path"), FeatureSource::path);
    EXPECT_EQ(source(16, "corpus"), FeatureSource::corpus);
    EXPECT_EQ(source(0, "vectors.npy"), FeatureSource::file);
    const std::string few = test::input_error_of([&] { source(15, "corpus"); });
    EXPECT_HAS(few, "feature-laplacian");
    EXPECT_HAS(few, "--spectral-dims 16");
    EXPECT_HAS(test::input_error_of([&] { source(0, "corpus"); }), "--spectral-dims 16");
    EXPECT_HAS(test::input_error_of([&] { source(16, "corpus", "random"); }), "a random one");
    EXPECT_HAS(test::input_error_of([] { (void)small_spec(41); }), "more than the 40 tokens");
}

}  // namespace
}  // namespace fiedler
