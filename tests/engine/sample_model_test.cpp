// tests/engine/sample_model_test.cpp: models of samples in double: gradients of every tensor against central differences
// for every kind of input, layer, pool and objective; a sample alone against the same in a batch; permuted nodes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "engine/rng.h"
#include "engine/sample_runner.h"
#include "tests/engine/random_samples.h"
#include "tests/engine/smallest_distance.h"
#include "tests/support/compare.h"

namespace fiedler {
namespace {

using test::per_sample;
using test::random_batch;
using DoubleRunner = SampleRunner<Cpu, double>;

struct Case {
    const char* name;
    std::function<void(Config&, SampleShape&)> change;
    Recompute recompute = Recompute::none;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

const std::vector<Case>& cases() {
    static const std::vector<Case> all = {
        {"nodes_classes", [](Config&, SampleShape&) {}},
        {"dense_features", [](Config&, SampleShape& s) { s.dense = true; }},
        {"no_input_bias", [](Config& c, SampleShape&) { c.input_bias = false; }},
        {"spectral", [](Config&, SampleShape& s) { s.spectral_dims = 3; }},
        {"spectral_start", [](Config& c, SampleShape& s) { s.spectral_dims = 3, c.spectral_start = true; }},
        {"hops", [](Config& c, SampleShape&) { c.hops = 3; }},
        {"even_hops", [](Config& c, SampleShape&) { c.hops = 2; }},
        {"input_hops", [](Config& c, SampleShape& s) { c.input_hops = 2, s.spectral_dims = 3; }},
        {"one_input_hop_dense", [](Config& c, SampleShape& s) { c.input_hops = 1, s.dense = true; }},
        {"not_local", [](Config& c, SampleShape&) { c.local = false; }},
        {"no_conv", [](Config& c, SampleShape&) { c.conv = false; }},
        {"no_edges", [](Config&, SampleShape& s) { s.edge_types = 0; }},
        {"one_edge_type", [](Config&, SampleShape& s) { s.edge_types = 1; }},
        {"energy", [](Config& c, SampleShape&) { c.scalar_kind = ScalarKind::energy; }},
        {"dot", [](Config& c, SampleShape&) { c.pattern = "d"; }},
        {"bands", [](Config& c, SampleShape&) { c.pattern = "b"; }},
        {"mean_regression", [](Config&, SampleShape& s) { per_sample(s, TargetKind::regression, 2); }},
        {"mean_binary", [](Config&, SampleShape& s) { per_sample(s, TargetKind::binary, 3); }},
        {"mean_classes", [](Config&, SampleShape& s) { per_sample(s, TargetKind::classes, 4); }},
        {"sum_huber",
         [](Config& c, SampleShape& s) {
             per_sample(s, TargetKind::regression, 2), c.pool = PoolChoice::sum, c.loss = LossChoice::huber;
         }},
        {"absolute",
         [](Config& c, SampleShape& s) { per_sample(s, TargetKind::regression, 2), c.loss = LossChoice::absolute; }},
        {"smoothing", [](Config& c, SampleShape&) { c.label_smoothing = 0.2; }},
        {"node_dropout", [](Config& c, SampleShape&) { c.node_dropout = 0.4; }},
        {"attention_pool",
         [](Config& c, SampleShape& s) {
             per_sample(s, TargetKind::regression, 2);
             c.pool = PoolChoice::attention;
         }},
        {"attention_pool_no_norm",
         [](Config& c, SampleShape& s) {
             per_sample(s, TargetKind::binary, 2);
             c.pool = PoolChoice::attention, c.last_norm = false;
         }},
        {"flatten",
         [](Config& c, SampleShape& s) {
             per_sample(s, TargetKind::regression, 5);
             s.nodes_per_sample = 4, s.edge_types = 0, c.pool = PoolChoice::flatten;
         }},
        {"linear", [](Config& c, SampleShape&) { c.layers = 0, c.last_norm = false; }},
        {"linear_flatten",
         [](Config& c, SampleShape& s) {
             per_sample(s, TargetKind::regression, 3);
             s.nodes_per_sample = 4, s.dense = true, s.edge_types = 0;
             c.pool = PoolChoice::flatten, c.layers = 0, c.last_norm = false;
         }},
        {"dropout", [](Config& c, SampleShape& s) { c.dropout = 0.4, c.input_dropout = 0.3, s.spectral_dims = 2; }},
        {"dropout_dense_pool",
         [](Config& c, SampleShape& s) {
             per_sample(s, TargetKind::regression, 2);
             s.dense = true, c.dropout = 0.4, c.input_dropout = 0.3, c.pool = PoolChoice::attention;
         }},
        {"recompute_mlp", [](Config& c, SampleShape&) { c.dropout = 0.2; }, Recompute::mlp},
        {"recompute_layer", [](Config& c, SampleShape&) { c.dropout = 0.2, c.hops = 2; }, Recompute::layer},
    };
    return all;
}

struct Problem {
    Config config;
    SampleShape shape;
    std::vector<std::int32_t> sizes;
};

Problem problem_of(const Case& c) {
    Problem p;
    p.config.task = Task::nodes;
    p.config.layers = 2, p.config.channels = 32, p.config.heads = 2, p.config.scalars = 4;
    p.config.pattern = "sb", p.config.mlp_hidden = 24, p.config.init_std = 0.3, p.config.inverse_temperature = 1.5;
    p.shape.features = 7, p.shape.edge_types = 2, p.shape.kind = TargetKind::classes;
    p.shape.level = TargetLevel::node, p.shape.outputs = 3;
    c.change(p.config, p.shape);
    p.sizes = p.shape.nodes_per_sample > 0 ? std::vector<std::int32_t>{4, 4, 4} : std::vector<std::int32_t>{5, 1, 6};
    return p;
}

std::unique_ptr<DoubleRunner> make_runner(const Problem& p, Recompute recompute = Recompute::none,
                                          AttentionChoice attention = AttentionChoice::automatic, bool framed = false) {
    const ModelSpec spec = model_spec(p.config, p.shape, 16);
    RunPlan plan;
    plan.recompute = recompute;
    plan.attention = attention;
    plan.training = true;
    return std::make_unique<DoubleRunner>(std::make_unique<Cpu>(), spec, SampleCapacity{40, 8, 400, 400}, plan, 0,
                                          framed);
}

// Initial values with everything moved, so that every gradient is alive; padding stays 0.
void set_lively_values(DoubleRunner& runner, std::uint64_t seed) {
    std::vector<float> w(static_cast<std::size_t>(runner.table().elements));
    initialise(runner.table(), runner.spec(), seed, w.data());
    for (const ParamTensor& t : runner.table().tensor)
        for (std::int64_t i = 0; i < t.size(); ++i)
            w[static_cast<std::size_t>(t.offset + i)] +=
                0.15f * static_cast<float>(rng::normal(seed, 5, static_cast<std::uint64_t>(t.offset + i)));
    runner.write(Block::master, w.data());
}

constexpr double kStep = 1e-6;

class SampleGradients : public testing::TestWithParam<Case> {};

TEST_P(SampleGradients, EveryTensorMatchesCentralDifferences) {
    const Problem p = problem_of(GetParam());
    const auto runner = make_runner(p, GetParam().recompute);
    const SampleDraw draw{true, 17};
    std::vector<double> grads, ignored;
    SampleBatch batch;
    for (std::uint64_t seed = 1;; ++seed) {  // points with |a - b| > 10 h, by construction
        ASSERT_LT(seed, 200u);
        set_lively_values(*runner, seed);
        batch = random_batch(p.shape, p.sizes, seed);
        runner->loss_and_gradients(batch, draw, grads);
        if (GetParam().recompute == Recompute::layer || smallest_distance(*runner) > 10 * kStep) break;
    }
    double* weights = runner->layout().params.master.data;
    for (const ParamTensor& t : runner->table().tensor) {
        double largest = 0;
        const std::int64_t stride = std::max<std::int64_t>(1, t.size() / 12);
        for (std::int64_t k = 0, i = 0; i < t.size(); ++k, i = k * stride + k * 7 % stride) {
            double& w = weights[t.offset + i];
            const double was = w;
            w = was + kStep;
            const double up = runner->loss_and_gradients(batch, draw, ignored);
            w = was - kStep;
            const double down = runner->loss_and_gradients(batch, draw, ignored);
            w = was;
            const double expected = (up - down) / (2 * kStep), got = grads[static_cast<std::size_t>(t.offset + i)];
            EXPECT_NEAR(got, expected, 2e-7 + 2e-5 * std::abs(expected)) << t.name << " " << i;
            largest = std::max(largest, std::abs(got));
        }
        EXPECT_GT(largest, 0) << t.name << ": no gradient was looked at";
    }
}
INSTANTIATE_TEST_SUITE_P(All, SampleGradients, testing::ValuesIn(cases()), [](const auto& i) { return i.param.name; });

// Sample k of a batch as a batch of its own.
SampleBatch alone(const SampleBatch& b, const SampleShape& s, std::size_t k) {
    SampleBatch out;
    const auto first = static_cast<std::size_t>(b.offsets[k]), last = static_cast<std::size_t>(b.offsets[k + 1]);
    out.samples = {b.samples[k]};
    out.offsets = {0, static_cast<std::int32_t>(last - first)};
    const auto cut = [](auto& to, const auto& from, std::size_t begin, std::size_t end) {
        if (!from.empty())
            to.assign(from.begin() + static_cast<std::ptrdiff_t>(begin),
                      from.begin() + static_cast<std::ptrdiff_t>(end));
    };
    const auto f = static_cast<std::size_t>(s.features), d = static_cast<std::size_t>(s.spectral_dims);
    cut(out.dense, b.dense, first * f, last * f);
    cut(out.spectral, b.spectral, first * d, last * d);
    const auto rows = [&](std::vector<std::int32_t>& offsets, const std::vector<std::int32_t>& from) {
        for (std::size_t i = first; i <= last && !from.empty(); ++i) offsets.push_back(from[i] - from[first]);
    };
    rows(out.feature_offsets, b.feature_offsets);
    rows(out.edge_offsets, b.edge_offsets);
    if (!b.feature_offsets.empty()) {
        const auto lo = static_cast<std::size_t>(b.feature_offsets[first]),
                   hi = static_cast<std::size_t>(b.feature_offsets[last]);
        cut(out.feature_columns, b.feature_columns, lo, hi);
        cut(out.feature_values, b.feature_values, lo, hi);
    }
    const auto lo = static_cast<std::size_t>(b.edge_offsets[first]),
               hi = static_cast<std::size_t>(b.edge_offsets[last]);
    cut(out.edge_columns, b.edge_columns, lo, hi);
    for (std::int32_t& c : out.edge_columns) c -= static_cast<std::int32_t>(first);
    cut(out.edge_types, b.edge_types, lo, hi);
    cut(out.edge_weights, b.edge_weights, lo, hi);
    const bool per_node = s.level == TargetLevel::node;
    const std::size_t row = per_node ? first : k, end = per_node ? last : k + 1;
    cut(out.classes, b.classes, row, end);
    cut(out.targets, b.targets, row * static_cast<std::size_t>(s.outputs), end * static_cast<std::size_t>(s.outputs));
    cut(out.row_shift, b.row_shift, row, end);
    cut(out.row_scale, b.row_scale, row, end);
    return out;
}

class SampleBatches : public testing::TestWithParam<Case> {};

TEST_P(SampleBatches, AloneAndInABatchAreEqualBitForBit) {
    const Problem p = problem_of(GetParam());
    for (const AttentionChoice attention : {AttentionChoice::dense, AttentionChoice::tree}) {
        const auto runner = make_runner(p, GetParam().recompute, attention);
        set_lively_values(*runner, 3);
        const SampleBatch all = random_batch(p.shape, p.sizes, 4);
        const SampleLoss together = runner->evaluate(all);
        std::vector<float> apart;
        double sum = 0;
        std::int64_t known = 0;
        for (std::size_t k = 0; k < p.sizes.size(); ++k) {
            const SampleLoss one = runner->evaluate(alone(all, p.shape, k));
            apart.insert(apart.end(), one.predictions.begin(), one.predictions.end());
            sum += one.sum, known += one.known;
        }
        EXPECT_EQ(together.predictions, apart);
        EXPECT_EQ(together.known, known);
        EXPECT_NEAR(together.sum, sum, 1e-9 * std::abs(sum));
    }
}

// What the GPU's frames add (sample_batch.h) changes neither predictions nor, but for the rounding of sums over more rows,
// gradients; and the shape of a batch is that of every other.
TEST_P(SampleBatches, AFrameIsNotSeen) {
    const Problem p = problem_of(GetParam());
    const auto plain = make_runner(p, GetParam().recompute),
               framed = make_runner(p, GetParam().recompute, AttentionChoice::automatic, true);
    set_lively_values(*plain, 3), set_lively_values(*framed, 3);
    const SampleDraw draw{true, 17};
    std::vector<double> want, got;
    std::vector<std::vector<std::int32_t>> batches = {p.sizes, {p.sizes[0]}};
    if (p.shape.nodes_per_sample == 0) batches.push_back({1, 1, 1, 1, 1, 1, 1, 1});
    for (const std::vector<std::int32_t>& sizes : batches) {
        const SampleBatch b = random_batch(p.shape, sizes, 4);
        const SampleLoss without = plain->evaluate(b), with = framed->evaluate(b);
        EXPECT_EQ(with.predictions, without.predictions);
        EXPECT_EQ(with.known, without.known);
        EXPECT_EQ(with.rows, without.rows);
        EXPECT_NEAR(with.sum, without.sum, 1e-12 * std::abs(without.sum));
        if (without.known == 0) continue;
        const double loss = plain->loss_and_gradients(b, draw, want);
        EXPECT_NEAR(framed->loss_and_gradients(b, draw, got), loss, 1e-12 * std::abs(loss));
        double largest = 0;
        for (const double g : want) largest = std::max(largest, std::abs(g));
        for (std::size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-12 * largest) << i;
    }
}

// Sizes of all that a kernel could choose its launch by.
std::vector<std::int64_t> sizes_of(const DeviceBatch& b) {
    const DeviceSamples& s = *b.samples;
    return {b.seq.tokens,
            b.seq.count,
            s.feature_offsets.size,
            s.feature_columns.size,
            s.by_feature_offsets.size,
            s.feature_nodes.size,
            s.graph.offsets.size,
            s.graph.columns.size,
            s.classes.size,
            s.targets.rows};
}

TEST_P(SampleBatches, FramedBatchesHaveFewShapesAndOnePlace) {
    const Problem p = problem_of(GetParam());
    const BatchLayout<float> layout(model_spec(p.config, p.shape, 16), {40, 8, 400, 400}, true, true);
    PreparedBatch room;
    std::vector<std::byte> memory(layout.bytes() + 256);
    room.block =
        HostBlock(memory.data() + 256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256, [](std::byte*) {});
    std::map<std::int64_t, std::vector<std::int64_t>> shapes;  // by the frame's nodes
    std::set<const void*> places;
    for (std::uint64_t seed = 1; seed < 9; ++seed) {
        std::vector<std::int32_t> sizes;  // one sample to eight of them
        for (std::uint64_t k = 0; k < seed; ++k) sizes.push_back(p.shape.nodes_per_sample > 0 ? 4 : p.sizes[k % 2]);
        layout.prepare(random_batch(p.shape, sizes, seed), {true, seed}, room);
        DeviceSamples samples;
        const DeviceBatch b = layout.at(room, room.block.get(), samples);
        const auto [found, is_new] = shapes.emplace(b.seq.tokens, sizes_of(b));
        EXPECT_EQ(found->second, sizes_of(b));
        EXPECT_LE(room.nodes, b.seq.tokens);
        EXPECT_LE(b.seq.tokens, std::max<std::int64_t>(2 * room.nodes + 4, 4)) << "a smaller frame would do";
        places.insert(samples.count.data);
    }
    EXPECT_LE(shapes.size(), 5u);
    EXPECT_TRUE(shapes.contains(40));
    EXPECT_EQ(places.size(), 1u);
}

// The nodes of the only sample in another order.
SampleBatch permuted(const SampleBatch& b, const SampleShape& s, const std::vector<std::size_t>& order) {
    SampleBatch out = b;
    std::vector<std::int32_t> place(order.size());
    for (std::size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<std::int32_t>(i);
    const auto f = static_cast<std::size_t>(s.features), d = static_cast<std::size_t>(s.spectral_dims);
    out.edge_columns.clear(), out.edge_types.clear(), out.edge_weights.clear();
    out.feature_columns.clear(), out.feature_values.clear();
    for (std::size_t i = 0; i < order.size(); ++i) {
        const std::size_t from = order[i];
        std::vector<std::pair<std::int32_t, std::size_t>> row;
        for (auto e = b.edge_offsets[from]; e < b.edge_offsets[from + 1]; ++e)
            row.emplace_back(place[static_cast<std::size_t>(b.edge_columns[static_cast<std::size_t>(e)])], e);
        std::sort(row.begin(), row.end());
        for (const auto& [column, e] : row) {
            out.edge_columns.push_back(column);
            out.edge_types.push_back(b.edge_types[e]);
            out.edge_weights.push_back(b.edge_weights[e]);
        }
        out.edge_offsets[i + 1] = static_cast<std::int32_t>(out.edge_columns.size());
        if (s.dense) {
            std::copy_n(b.dense.begin() + static_cast<std::ptrdiff_t>(from * f), f,
                        out.dense.begin() + static_cast<std::ptrdiff_t>(i * f));
        } else {
            for (auto e = b.feature_offsets[from]; e < b.feature_offsets[from + 1]; ++e) {
                out.feature_columns.push_back(b.feature_columns[static_cast<std::size_t>(e)]);
                out.feature_values.push_back(b.feature_values[static_cast<std::size_t>(e)]);
            }
            out.feature_offsets[i + 1] = static_cast<std::int32_t>(out.feature_columns.size());
        }
        std::copy_n(b.spectral.begin() + static_cast<std::ptrdiff_t>(from * d), d,
                    out.spectral.begin() + static_cast<std::ptrdiff_t>(i * d));
    }
    return out;
}

TEST_P(SampleBatches, PermutedNodesPermuteNodesAndLeaveSamplesAsTheyAre) {
    Problem p = problem_of(GetParam());
    if (p.config.pool == PoolChoice::flatten) GTEST_SKIP() << "flatten depends on the order, as it should";
    p.sizes = {7};
    const auto runner = make_runner(p);
    set_lively_values(*runner, 3);
    const SampleBatch b = random_batch(p.shape, p.sizes, 4);
    const std::vector<std::size_t> order = {3, 0, 6, 2, 5, 1, 4};
    SampleBatch other = permuted(b, p.shape, order);
    if (p.shape.level == TargetLevel::node)
        other.classes.assign(7, -1), other.row_shift.clear(), other.row_scale.clear();
    const std::vector<float> was = runner->evaluate(b).predictions, is = runner->evaluate(other).predictions;
    ASSERT_EQ(was.size(), is.size());
    const auto k = static_cast<std::size_t>(p.shape.outputs);
    for (std::size_t i = 0; i < is.size() / k; ++i)
        for (std::size_t j = 0; j < k; ++j) {
            const std::size_t row = p.shape.level == TargetLevel::node ? order[i] : i;
            EXPECT_NEAR(is[i * k + j], was[row * k + j], 1e-6 * (1 + std::abs(was[row * k + j])));
        }
}
INSTANTIATE_TEST_SUITE_P(All, SampleBatches, testing::ValuesIn(cases()), [](const auto& i) { return i.param.name; });

// The distances of the scalars do not know the signs of the spectral embedding's columns where the scalars are the columns.
TEST(SampleModel, CoordinatesThatStartAtTheSpectrumDoNotKnowItsSigns) {
    Problem p = problem_of(cases()[0]);
    p.shape.spectral_dims = 3;
    p.config.spectral_start = true;
    const auto runner = make_runner(p);
    std::vector<float> w(static_cast<std::size_t>(runner->table().elements));
    initialise(runner->table(), runner->spec(), 1, w.data());
    for (const ParamTensor& t : runner->table().tensor)  // the scalars are S U alone; Ws starts at zero
        if (t.name.ends_with("attn.scalars.weight")) std::fill_n(w.begin() + t.offset, t.size(), 0.f);
    runner->write(Block::master, w.data());
    SampleBatch b = random_batch(p.shape, {7}, 4);
    const std::vector<float> was = runner->evaluate(b).predictions;
    for (std::size_t i = 0; i < b.spectral.size(); i += 3) b.spectral[i] = -b.spectral[i];
    EXPECT_EQ(runner->evaluate(b).predictions, was);
    b.spectral[4] += 0.5f;
    EXPECT_NE(runner->evaluate(b).predictions, was);
}

TEST(SampleModel, SignsAndDropoutChangeWithTheSeedAloneAndOnlyInTraining) {
    Problem p = problem_of(cases()[0]);
    p.shape.spectral_dims = 3;
    p.config.dropout = p.config.input_dropout = 0.3;
    const ModelSpec spec = model_spec(p.config, p.shape, 16);
    const SampleBatch b = random_batch(p.shape, p.sizes, 4);
    const auto runner = make_runner(p);
    set_lively_values(*runner, 3);
    std::vector<double> g;
    const double one = runner->loss_and_gradients(b, {true, 5}, g), again = runner->loss_and_gradients(b, {true, 5}, g),
                 other = runner->loss_and_gradients(b, {true, 6}, g);
    EXPECT_EQ(one, again);
    EXPECT_NE(one, other);
    EXPECT_EQ(runner->evaluate(b).sum, runner->evaluate(b).sum);
}

}  // namespace
}  // namespace fiedler
