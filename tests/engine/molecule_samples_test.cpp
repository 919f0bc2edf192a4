// Molecules as samples, and masked atoms.
#include "engine/molecule_samples.h"

#include <gtest/gtest.h>

#include <cmath>

#include "engine/masked_atoms.h"
#include "engine/molecules.h"
#include "engine/sample_split.h"
#include "kernels/device.h"
#include "tests/engine/molecule_rings.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Size = std::size_t;
using Numbers = std::vector<std::int64_t>;

std::vector<Part> every_fourth(std::int64_t n) {
    std::vector<Part> parts;
    for (std::int64_t i = 0; i < n; ++i)
        parts.push_back(i % 4 == 1 ? Part::val : i % 4 == 2 ? Part::test : Part::train);
    return parts;
}

TEST(MoleculeSamples, BatchesHoldWhatTheSetHolds) {
    MoleculeOptions o;
    o.spectral_dims = 6, o.walk_steps = 4, o.eigenvalues = true;
    const MoleculeSet set = rings(20, 2);
    const MoleculeSamples source(set, every_fourth(20), o, nullptr);
    const SampleShape& shape = source.shape();
    EXPECT_EQ(shape.features, 174 + 1 + 4 + 6);
    EXPECT_EQ(shape.kind, TargetKind::regression);
    EXPECT_EQ(shape.outputs, 2);
    EXPECT_EQ(shape.edge_types, 10);
    SampleBatch b;
    source.gather(Numbers{4, 2}, Part::train, b);
    ASSERT_EQ(b.offsets, (std::vector<std::int32_t>{0, 8, 14}));
    EXPECT_EQ(source.feature_entries_of(4), 8 * 19);
    ASSERT_EQ(b.feature_offsets.back(), 14 * 19);
    EXPECT_EQ(b.feature_columns[0], 6);        // nitrogen
    EXPECT_EQ(b.feature_columns[19], 5);       // carbon
    EXPECT_EQ(b.feature_columns[1], 119 + 0);  // chirality
    EXPECT_EQ(b.feature_columns[8], 174 - 1);  // in a ring
    EXPECT_EQ(b.feature_columns[9], 175);
    EXPECT_EQ(b.feature_columns[18], 175 + 9);
    EXPECT_EQ(source.edges_of(4), b.edge_offsets[8]);
    for (std::int32_t i = 0; i < 14; ++i)  // ascending, of the same sample, symmetric with the same type
        for (auto e = b.edge_offsets[static_cast<Size>(i)]; e < b.edge_offsets[static_cast<Size>(i) + 1]; ++e) {
            const std::int32_t j = b.edge_columns[static_cast<Size>(e)];
            EXPECT_EQ(i < 8, j < 8);
            EXPECT_TRUE(e == b.edge_offsets[static_cast<Size>(i)] || b.edge_columns[static_cast<Size>(e) - 1] < j);
            bool back = false;
            for (auto f = b.edge_offsets[static_cast<Size>(j)]; f < b.edge_offsets[static_cast<Size>(j) + 1]; ++f)
                back = back || (b.edge_columns[static_cast<Size>(f)] == i &&
                                b.edge_types[static_cast<Size>(f)] == b.edge_types[static_cast<Size>(e)]);
            EXPECT_TRUE(back);
        }
    // Targets: normalised by the training part; those of another part are missing.
    EXPECT_FALSE(std::isnan(b.targets[0]));
    EXPECT_NEAR(b.targets[0] * shape.deviation[0] + shape.mean[0], 3.5, 1e-6);
    EXPECT_TRUE(std::isnan(b.targets[2]));
    double sum = 0, squares = 0, known = 0;
    for (const std::int64_t m : source.samples(Part::train)) {
        source.gather(Numbers{m}, Part::train, b);
        if (std::isnan(b.targets[0])) continue;
        sum += b.targets[0], squares += double(b.targets[0]) * b.targets[0], ++known;
    }
    EXPECT_NEAR(sum / known, 0, 1e-6);
    EXPECT_NEAR(squares / known, 1, 1e-6);
    EXPECT_EQ(source.known(Part::train), 2 * known);
    EXPECT_EQ(source.row_name(3, 0), "R3");
}

// A ring with a tail against the definition: eigenpairs of the normalised Laplacian, and powers of the walk.
TEST(MoleculeSamples, SpectraAndWalksAreThoseOfTheGraph) {
    MoleculeOptions o;
    o.spectral_dims = 5, o.walk_steps = 3, o.eigenvalues = true;
    const MoleculeSamples source(rings(5), every_fourth(5), o, nullptr);
    SampleBatch b;
    source.gather(Numbers{0, 4}, Part::train, b);  // a path of 4 atoms; a ring of 7 and one more
    const auto degree = [&](std::int32_t i) {
        return double(b.edge_offsets[static_cast<Size>(i) + 1] - b.edge_offsets[static_cast<Size>(i)]);
    };
    for (int sample = 0; sample < 2; ++sample) {
        const std::int32_t first = b.offsets[static_cast<Size>(sample)],
                           last = b.offsets[static_cast<Size>(sample) + 1];
        const int n = last - first;
        for (int j = 0; j < 5; ++j) {
            const float mu =
                b.feature_values[static_cast<Size>(b.feature_offsets[static_cast<Size>(first)] + 9 + 3 + j)];
            double norm = 0, residual = 0;
            for (std::int32_t i = first; i < last; ++i) {
                const double x = b.spectral[static_cast<Size>(i * 5 + j)];
                double lx = x;
                for (auto e = b.edge_offsets[static_cast<Size>(i)]; e < b.edge_offsets[static_cast<Size>(i) + 1]; ++e) {
                    const std::int32_t c = b.edge_columns[static_cast<Size>(e)];
                    lx -= b.spectral[static_cast<Size>(c * 5 + j)] / std::sqrt(degree(i) * degree(c));
                }
                norm += x * x;
                residual += std::abs(lx - mu * x);
            }
            if (j < n - 1) {
                EXPECT_NEAR(norm, n, 1e-4);
                EXPECT_LT(residual, 1e-4);
                EXPECT_GT(mu, 1e-3);
            } else {
                EXPECT_EQ(norm, 0);
                EXPECT_EQ(mu, 2);
            }
        }
        // After two steps: the mean over neighbours of 1 / degree.
        for (std::int32_t i = first; i < last; ++i) {
            double back = 0;
            for (auto e = b.edge_offsets[static_cast<Size>(i)]; e < b.edge_offsets[static_cast<Size>(i) + 1]; ++e)
                back += 1 / degree(b.edge_columns[static_cast<Size>(e)]) / degree(i);
            EXPECT_NEAR(b.feature_values[static_cast<Size>(b.feature_offsets[static_cast<Size>(i)] + 9)], back, 1e-6);
        }
    }
    // A path of four is bipartite: nobody is back after three steps.
    EXPECT_EQ(b.feature_values[10], 0);
    EXPECT_NEAR(b.feature_values[9], 0.5, 1e-6);
}

// Eigenvalues agree; vectors of the GPU are eigenvectors, too (bases of repeated values may differ).
TEST(MoleculeSamples, GpuSpectraAreThoseOfTheCpu) {
    if (std::string why; cuda_device_count(&why) == 0) GTEST_SKIP() << "NO GPU, NOT TESTED: " << why;
    const MoleculeSamples source(rings(60), every_fourth(60), {}, nullptr);
    const SmallGraphs& g = source.graphs();
    const SmallEmbedding cpu = small_embedding(g, 6, false, 0), gpu = small_embedding(g, 6, true, 0);
    for (Size i = 0; i < cpu.values.size(); ++i) EXPECT_NEAR(cpu.values[i], gpu.values[i], 1e-5);
    for (std::int64_t m = 0; m < g.count(); ++m)
        for (std::int64_t j = 0; j < 6; ++j) {
            const std::int64_t first = g.node_offsets[static_cast<Size>(m)],
                               last = g.node_offsets[static_cast<Size>(m) + 1];
            const double mu = gpu.values[static_cast<Size>(m * 6 + j)];
            double residual = 0, norm = 0;
            const auto degree = [&](std::int64_t i) {
                return double(g.row_offsets[static_cast<Size>(i) + 1] - g.row_offsets[static_cast<Size>(i)]);
            };
            for (std::int64_t i = first; i < last; ++i) {
                const double x = gpu.vectors[static_cast<Size>(i * 6 + j)];
                double lx = x;
                for (auto e = g.row_offsets[static_cast<Size>(i)]; e < g.row_offsets[static_cast<Size>(i) + 1]; ++e) {
                    const std::int64_t c = first + g.columns[static_cast<Size>(e)];
                    lx -= gpu.vectors[static_cast<Size>(c * 6 + j)] / std::sqrt(degree(i) * degree(c));
                }
                norm += x * x, residual += std::abs(lx - mu * x);
            }
            EXPECT_LT(residual, 1e-3);
            EXPECT_NEAR(norm, j < last - first - 1 ? double(last - first) : 0, 1e-3);
        }
}

TEST(MoleculeSamples, ABatchOfManyIsThatOfEach) {
    MoleculeOptions o;
    o.spectral_dims = 4, o.walk_steps = 2;
    const MoleculeSamples source(rings(30), every_fourth(30), o, nullptr);
    const MoleculeSamples other(
        rings(30), every_fourth(30),
        [&] {
            MoleculeOptions x = o;
            x.threads = 1;
            return x;
        }(),
        nullptr);
    SampleBatch all, one;
    source.gather(source.samples(Part::val), Part::val, all);
    Size node = 0;
    for (const std::int64_t m : source.samples(Part::val)) {
        other.gather(Numbers{m}, Part::val, one);
        for (Size i = 0; i < one.spectral.size(); ++i) EXPECT_EQ(one.spectral[i], all.spectral[4 * node + i]);
        node += static_cast<Size>(one.nodes());
    }
}

TEST(MoleculeSamples, TrainedTargetsAreFoundByName) {
    const MoleculeSamples source(rings(20, 2), every_fourth(20), {}, nullptr);
    MoleculeSet fresh = rings(8, 1);
    fresh.target_names = {"y1"};
    const MoleculeSamples later(fresh, std::vector<Part>(8, Part::test), {}, &source.shape());
    SampleBatch b;
    later.gather(Numbers{0}, Part::test, b);
    EXPECT_TRUE(std::isnan(b.targets[0]));
    EXPECT_NEAR(b.targets[1] * source.shape().deviation[1] + source.shape().mean[1], 1.5, 1e-6);
    MoleculeOptions other;
    other.walk_steps = 3;
    EXPECT_HAS(
        input_error_of([&] { MoleculeSamples(fresh, std::vector<Part>(8, Part::test), other, &source.shape()); }),
        "other features");
}

TEST(MoleculeSamples, BinaryOrRegressionAndTargetsThatTeachNothing) {
    MoleculeSet s = rings(12);
    for (Size i = 0; i < 12; ++i) s.targets[i] = i % 3 == 0 ? 1.f : 0.f;
    EXPECT_EQ(MoleculeSamples(s, every_fourth(12), {}, nullptr).shape().kind, TargetKind::binary);
    MoleculeOptions o;
    o.targets = MoleculeTargets::regression;
    EXPECT_EQ(MoleculeSamples(s, every_fourth(12), o, nullptr).shape().kind, TargetKind::regression);
    s.targets[5] = 2;
    o.targets = MoleculeTargets::binary;
    EXPECT_HAS(input_error_of([&] { MoleculeSamples(s, every_fourth(12), o, nullptr); }), "rings.csv:7: y0 is 2");
    std::fill(s.targets.begin(), s.targets.end(), 1.f);
    EXPECT_HAS(input_error_of([&] { MoleculeSamples(s, every_fourth(12), {}, nullptr); }), "\"y0\" is always 1");
    std::fill(s.targets.begin(), s.targets.end(), kMissing);
    EXPECT_HAS(input_error_of([&] { MoleculeSamples(s, every_fourth(12), {}, nullptr); }), "is never known");
    EXPECT_HAS(input_error_of([&] { MoleculeSamples(rings(4, 0), every_fourth(4), {}, nullptr); }), "no targets");
}

TEST(MaskedAtoms, MasksBelongToEpochAndSample) {
    MoleculeOptions o;
    o.walk_steps = 2, o.spectral_dims = 3, o.without_targets = true;
    const auto make = [&](std::int64_t seed) {
        return std::make_unique<MaskedAtoms>(
            std::make_unique<MoleculeSamples>(rings(40, 0), every_fourth(40), o, nullptr), 0.15, seed);
    };
    const auto source = make(1);
    EXPECT_EQ(source->shape().outputs, 119);
    EXPECT_EQ(source->shape().names[5], "C");
    EXPECT_EQ(source->shape().features, 174 + 1 + 2);
    SampleBatch b, base, again, alone, later, val;
    const auto train = source->samples(Part::train);
    source->gather(train, Part::train, b);
    source->base().gather(train, Part::train, base);
    std::int64_t masked = 0;
    for (Size i = 0; i < static_cast<Size>(b.nodes()); ++i) {
        const auto begin = static_cast<Size>(b.feature_offsets[i]), end = static_cast<Size>(b.feature_offsets[i + 1]);
        const auto from = static_cast<Size>(base.feature_offsets[i]);
        if (b.classes[i] < 0) {
            ASSERT_EQ(end - begin, 11u);
            for (Size e = 0; e < 11; ++e) EXPECT_EQ(b.feature_columns[begin + e], base.feature_columns[from + e]);
            continue;
        }
        ++masked;
        EXPECT_EQ(b.classes[i], base.feature_columns[from]);
        ASSERT_EQ(end - begin, 3u);
        EXPECT_EQ(b.feature_columns[begin], 174);
        EXPECT_EQ(b.feature_columns[begin + 1], 175);
        EXPECT_EQ(b.feature_values[begin + 1], base.feature_values[from + 9]);
    }
    EXPECT_EQ(masked, source->known(Part::train));
    EXPECT_EQ(b.edge_columns, base.edge_columns);
    EXPECT_EQ(b.spectral, base.spectral);
    // The same in another batch and another object; another epoch or seed masks other atoms.
    make(1)->gather(train, Part::train, again);
    EXPECT_EQ(again.classes, b.classes);
    source->gather(train.subspan(3, 1), Part::train, alone);
    const auto at = static_cast<std::ptrdiff_t>(b.offsets[3]);
    EXPECT_TRUE(std::equal(alone.classes.begin(), alone.classes.end(), b.classes.begin() + at));
    source->gather_epoch(train, 0, again);
    EXPECT_NE(again.classes, b.classes);
    make(1)->gather_epoch(train, 0, later);
    EXPECT_EQ(again.classes, later.classes);
    make(2)->gather_epoch(train, 0, later);
    EXPECT_NE(again.classes, later.classes);
    source->gather_epoch(train, 1, later);
    EXPECT_NE(again.classes, later.classes);
    // Validation does not change with the seed, and of other parts nothing is asked.
    source->gather(source->samples(Part::val), Part::val, val);
    make(2)->gather(source->samples(Part::val), Part::val, later);
    EXPECT_EQ(val.classes, later.classes);
    source->gather(source->samples(Part::val), Part::train, later);
    EXPECT_EQ(std::count_if(later.classes.begin(), later.classes.end(), [](auto c) { return c >= 0; }), 0);
}

}  // namespace
}  // namespace fiedler::test
