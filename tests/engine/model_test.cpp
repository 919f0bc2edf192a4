// tests/engine/model_test.cpp: gradients of whole two-layer models in double against central differences, for every
// kind of layer and every option; equality of recomputation levels; decoding against the full forward pass.
#include <gtest/gtest.h>

#include <cmath>

#include "engine/config.h"
#include "engine/decode.h"
#include "engine/runner.h"
#include "tests/engine/random_laplacian.h"
#include "tests/engine/smallest_distance.h"
#include "tests/support/compare.h"

namespace fiedler {
namespace {

using test::close_to;
using test::Values;
using DoubleRunner = Runner<Cpu, double>;

struct Case {
    const char* name;
    std::function<void(Config&)> change;
    bool ragged = false;
    AttentionChoice attention = AttentionChoice::automatic;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

const std::vector<Case>& cases() {
    static const std::vector<Case> all = {
        {"coordinate_s", [](Config& c) { c.pattern = "ss"; }},
        {"coordinate_b", [](Config& c) { c.pattern = "bb"; }},
        {"coordinate_sb_window", [](Config& c) { c.pattern = "s:3b:5"; }},
        {"coordinate_untied", [](Config& c) { c.pattern = "sb", c.tied = false; }},
        {"coordinate_no_gate", [](Config& c) { c.pattern = "sb", c.gate = false; }},
        {"coordinate_no_conv", [](Config& c) { c.pattern = "sb", c.conv = false; }},
        {"coordinate_fixed_temperature", [](Config& c) { c.pattern = "sb", c.temperature = Temperature::fixed; }},
        {"energy_s", [](Config& c) { c.pattern = "ss", c.scalar_kind = ScalarKind::energy; }},
        {"energy_b", [](Config& c) { c.pattern = "bb", c.scalar_kind = ScalarKind::energy; }},
        {"energy_rope", [](Config& c) { c.pattern = "sb", c.scalar_kind = ScalarKind::energy, c.rope = Rotary::all; }},
        {"energy_published",
         [](Config& c) {
             c.pattern = "ss", c.scalar_kind = ScalarKind::energy, c.rope = Rotary::all,
             c.gate = c.conv = c.tied = false;
             c.temperature = Temperature::fixed, c.inverse_temperature = 1, c.tau = "1";
         }},
        {"energy_fixed_tau", [](Config& c) { c.pattern = "sb", c.scalar_kind = ScalarKind::energy, c.tau = "0.7"; }},
        {"dot", [](Config& c) { c.pattern = "dd"; }},
        {"dot_window", [](Config& c) { c.pattern = "d:4d"; }},
        {"dot_plain", [](Config& c) { c.pattern = "dd", c.rope = Rotary::none, c.qk_norm = c.conv = false; }},
        {"mixed", [](Config& c) { c.pattern = "sd"; }},
        {"mixed_energy", [](Config& c) { c.pattern = "bd", c.scalar_kind = ScalarKind::energy; }},
        {"bidirectional_coordinate", [](Config& c) { c.pattern = "sb", c.causal = false; }},
        {"bidirectional_energy",
         [](Config& c) { c.pattern = "sb", c.causal = false, c.scalar_kind = ScalarKind::energy; }},
        {"bidirectional_dot_window", [](Config& c) { c.pattern = "d:3d", c.causal = false; }},
        {"ragged_coordinate", [](Config& c) { c.pattern = "sb"; }, true},
        {"ragged_energy", [](Config& c) { c.pattern = "sb", c.scalar_kind = ScalarKind::energy; }, true},
        {"ragged_dot", [](Config& c) { c.pattern = "dd:3"; }, true},
        {"spectral_coordinate", [](Config& c) { c.pattern = "sb", c.spectral_dims = 8; }},
        {"spectral_padded", [](Config& c) { c.pattern = "sb", c.spectral_dims = 5; }},
        {"spectral_untied_dot", [](Config& c) { c.pattern = "dd", c.spectral_dims = 17, c.tied = false; }},
        {"spectral_energy",
         [](Config& c) { c.pattern = "sb", c.spectral_dims = 3, c.scalar_kind = ScalarKind::energy; }},
        {"ragged_spectral", [](Config& c) { c.pattern = "sb", c.spectral_dims = 9; }, true},
        {"tree_coordinate", [](Config& c) { c.pattern = "sb"; }, false, AttentionChoice::tree},
        {"tree_energy", [](Config& c) { c.pattern = "ss", c.scalar_kind = ScalarKind::energy; }, false,
         AttentionChoice::tree},
        {"tree_bidirectional", [](Config& c) { c.pattern = "sb", c.causal = false; }, false, AttentionChoice::tree},
        {"tree_ragged", [](Config& c) { c.pattern = "ss:4"; }, true, AttentionChoice::tree},
    };
    return all;
}

constexpr int kTokens = 11, kSequences = 2;

ModelSpec small_spec(const Case& c) {
    Config config;
    config.layers = 2;
    config.channels = 32;
    config.heads = 2;
    config.scalars = 4;
    config.vocab = 19;
    config.context = kTokens;
    config.mlp_hidden = 24;
    config.init_std = 0.3;
    config.inverse_temperature = 1.5;
    c.change(config);
    return model_spec(config);
}

Batch small_batch(const ModelSpec& spec, std::uint64_t seed, bool ragged) {
    Batch b;
    b.inputs = test::random_ints(kTokens * kSequences, seed, 0, spec.vocab);
    b.targets = test::random_ints(kTokens * kSequences, seed + 1, 0, spec.vocab);
    b.rows = kSequences;
    b.length = kTokens;
    if (ragged) {
        b.offsets = {0, 1, 6, 13, kTokens * kSequences};
        for (std::size_t s = 0; s + 1 < b.offsets.size(); ++s)
            for (auto i = b.offsets[s]; i < b.offsets[s + 1]; ++i)
                b.begin.push_back(b.offsets[s]), b.end.push_back(b.offsets[s + 1]);
    }
    return b;
}

RunPlan small_plan(Recompute recompute, bool ragged, AttentionChoice attention = AttentionChoice::automatic) {
    RunPlan p;
    p.micro_batch = kSequences;
    p.tokens = kTokens * kSequences;
    p.recompute = recompute;
    p.document_mask = ragged;
    p.attention = attention;
    return p;
}

// Initial values with everything that starts at zero or one moved off it, so that every gradient is alive.
std::vector<float> lively_values(const DoubleRunner& runner, std::uint64_t seed) {
    std::vector<float> w(static_cast<std::size_t>(runner.table().elements));
    initialise(runner.table(), runner.spec(), seed, w.data());
    const Values noise = test::random_values(w.size(), seed + 7, 0.15);
    for (const ParamTensor& t : runner.table().tensor)
        if (t.group != Group::frozen)
            for (std::int64_t i = t.offset; i < t.offset + t.size(); ++i)
                w[static_cast<std::size_t>(i)] += static_cast<float>(noise[static_cast<std::size_t>(i)]);
    return w;
}

// With a spectral embedding, U is random and Lf the Laplacian of a weighted graph without structure.
ModelConstants constants_of(const ModelSpec& spec) {
    ModelConstants c;
    if (spec.spectral_dims == 0) return c;
    c.spectral = random_spectral_table(spec, 3);
    if (spec.has_energies()) c.laplacian = test::random_laplacian(spec.head_dim(), 4);
    return c;
}

std::unique_ptr<DoubleRunner> make_runner(const ModelSpec& spec, const RunPlan& plan) {
    return std::make_unique<DoubleRunner>(std::make_unique<Cpu>(), spec, plan, 0, constants_of(spec));
}
std::unique_ptr<DoubleRunner> make_runner(const ModelSpec& spec, Recompute recompute, bool ragged) {
    return make_runner(spec, small_plan(recompute, ragged));
}

constexpr double kStep = 1e-6;

class ModelGradients : public testing::TestWithParam<Case> {};

TEST_P(ModelGradients, EveryTensorMatchesCentralDifferences) {
    const ModelSpec spec = small_spec(GetParam());
    const auto runner = make_runner(spec, small_plan(Recompute::none, GetParam().ragged, GetParam().attention));
    std::vector<double> grads;
    Batch batch;
    for (std::uint64_t seed = 1;; ++seed) {  // points with |a - b| > 10 h, by construction
        ASSERT_LT(seed, 200u);
        const std::vector<float> w = lively_values(*runner, seed);
        runner->write(Block::master, w.data());
        batch = small_batch(spec, 100 * seed, GetParam().ragged);
        runner->loss_and_gradients(batch, grads);
        if (smallest_distance(*runner) > 10 * kStep) break;
    }
    double* weights = runner->layout().params.master.data;
    const double tokens = double(batch.inputs.size());
    for (const ParamTensor& t : runner->table().tensor) {
        if (t.group == Group::frozen) continue;
        SCOPED_TRACE(t.name);
        Values analytic, numeric;
        double largest = 0;
        const std::int64_t count = std::min<std::int64_t>(t.size(), 24), stride = t.size() / count;
        for (std::int64_t k = 0; k < count; ++k) {
            const std::int64_t i = t.offset + k * stride + (k * 7) % stride;
            if (t.init == Init::spectral && (i - t.offset) % t.cols >= spec.spectral_dims) {  // padding
                EXPECT_EQ(grads[static_cast<std::size_t>(i)], 0);
                continue;
            }
            const double keep = weights[i];
            weights[i] = keep + kStep;
            const double up = runner->loss_sum(batch);
            weights[i] = keep - kStep;
            const double down = runner->loss_sum(batch);
            weights[i] = keep;
            numeric.push_back((up - down) / (2 * kStep) / tokens);
            analytic.push_back(grads[static_cast<std::size_t>(i)]);
            largest = std::max(largest, std::abs(numeric.back()));
        }
        EXPECT_GT(largest, 1e-7) << "the gradient is zero: nothing was checked";
        // 1e-6 relative, plus what rounding of the loss itself (1e-16 of it over 2h) leaves of a difference.
        const double rounding = 4 * 2.2e-16 * 3 / (2 * kStep);
        EXPECT_TRUE(close_to(analytic, numeric, 1e-6 + rounding / largest));
    }
}

INSTANTIATE_TEST_SUITE_P(Cases, ModelGradients, testing::ValuesIn(cases()),
                         [](const auto& info) { return std::string(info.param.name); });

class ModelForward : public testing::TestWithParam<Case> {};

TEST_P(ModelForward, RecomputationChangesNothing) {
    const ModelSpec spec = small_spec(GetParam());
    std::vector<double> reference;
    double loss = 0;
    for (const Recompute r : {Recompute::none, Recompute::mlp, Recompute::layer}) {
        const auto runner = make_runner(spec, small_plan(r, GetParam().ragged, GetParam().attention));
        const std::vector<float> w = lively_values(*runner, 3);
        runner->write(Block::master, w.data());
        std::vector<double> grads;
        const double this_loss = runner->loss_and_gradients(small_batch(spec, 5, GetParam().ragged), grads);
        if (r == Recompute::none) {
            reference = grads;
            loss = this_loss;
            continue;
        }
        EXPECT_EQ(this_loss, loss) << name_of(r);
        EXPECT_TRUE(test::identical(grads.data(), reference.data(), grads.size() * sizeof(double))) << name_of(r);
    }
}

// Loss and gradients under a plan, at one point.
double loss_under(const ModelSpec& spec, const RunPlan& plan, const Batch& batch, std::vector<double>& grads) {
    const auto runner = make_runner(spec, plan);
    const std::vector<float> w = lively_values(*runner, 3);
    runner->write(Block::master, w.data());
    return runner->loss_and_gradients(batch, grads);
}

// Two layers for sequences that are longer than the leaves of a tree and the tails of runs.
ModelSpec long_spec(std::int64_t length, bool causal) {
    Config c;
    c.pattern = "ss", c.layers = 2, c.channels = 32, c.heads = 2, c.vocab = 19;
    c.context = length, c.mlp_hidden = 24, c.init_std = 0.3, c.causal = causal;
    return model_spec(c);
}

TEST(Model, LongSequencesByTheTreeAreTheSame) {
    constexpr std::int64_t kLength = 700;  // several leaves of the tree
    for (const bool causal : {true, false}) {
        const ModelSpec spec = long_spec(kLength, causal);
        Batch batch;
        batch.inputs = test::random_ints(kLength, 1, 0, spec.vocab);
        batch.targets = test::random_ints(kLength, 2, 0, spec.vocab);
        batch.rows = 1, batch.length = kLength;
        RunPlan plan;
        plan.tokens = kLength;
        std::vector<double> dense, tree;
        plan.attention = AttentionChoice::dense;
        const double loss = loss_under(spec, plan, batch, dense);
        plan.attention = AttentionChoice::tree;
        EXPECT_NEAR(loss_under(spec, plan, batch, tree), loss, 1e-12 * loss);
        EXPECT_TRUE(close_to(tree, dense, 1e-10));
        EXPECT_NE(tree, dense) << "the same way was taken twice";
        std::vector<double> whole;
        plan.attention_skip = false;
        EXPECT_NEAR(loss_under(spec, plan, batch, whole), loss, 1e-12 * loss);
        EXPECT_TRUE(close_to(whole, dense, 1e-10));
        EXPECT_EQ(whole != tree, causal) << "only a gate leaves something to skip";
    }
}

TEST(Model, MlpInPartsIsTheSame) {
    const ModelSpec spec = small_spec(cases()[0]);
    RunPlan plan = small_plan(Recompute::layer, false);
    std::vector<double> whole, parts;
    const double loss = loss_under(spec, plan, small_batch(spec, 5, false), whole);
    for (const std::int64_t rows : {1, 5, 21}) {
        plan.hidden_rows = rows;
        EXPECT_EQ(loss_under(spec, plan, small_batch(spec, 5, false), parts), loss) << rows;
        EXPECT_TRUE(close_to(parts, whole, 1e-13)) << rows;
        EXPECT_NE(parts, whole) << "the rows were taken all at once";
    }
}

class ModelDecoding : public testing::TestWithParam<Case> {};

TEST_P(ModelDecoding, MatchesTheFullForwardPass) {
    const ModelSpec spec = small_spec(GetParam());
    const auto runner = make_runner(spec, small_plan(Recompute::none, false, GetParam().attention));
    const std::vector<float> w = lively_values(*runner, 4);
    runner->write(Block::master, w.data());
    const std::vector<std::int32_t> tokens = test::random_ints(kTokens, 6, 0, spec.vocab);
    const auto decoder = runner->decoder(kTokens);
    for (const int prompt : {1, 2, 5, kTokens}) {
        decoder->prefill({tokens.begin(), tokens.begin() + prompt});
        for (int n = prompt; n <= kTokens; ++n) {
            const std::vector<float> got = decoder->logits();
            if (n < kTokens) decoder->append(tokens[static_cast<std::size_t>(n)]);
            const auto whole = runner->decoder(n);
            whole->prefill({tokens.begin(), tokens.begin() + n});
            const std::vector<float>& want = whole->logits();
            EXPECT_TRUE(close_to(Values(got.begin(), got.end()), Values(want.begin(), want.end()), 1e-6))
                << "prompt " << prompt << ", token " << n;
        }
    }
}

TEST(Model, DecodingByRunsIsTheSame) {
    constexpr std::int64_t kLength = 400, kPrompt = 150;
    const ModelSpec spec = long_spec(kLength, true);
    RunPlan plan;
    plan.tokens = kLength;
    const std::vector<std::int32_t> tokens = test::random_ints(kLength, 6, 0, spec.vocab);
    std::vector<Values> logits[2];
    for (const AttentionChoice choice : {AttentionChoice::dense, AttentionChoice::tree}) {
        plan.attention = choice;
        const auto runner = make_runner(spec, plan);
        const std::vector<float> w = lively_values(*runner, 4);
        runner->write(Block::master, w.data());
        const auto decoder = runner->decoder(kLength);
        for (int again = 0; again < 2; ++again) {  // prefill clears what was there
            decoder->prefill({tokens.begin(), tokens.begin() + kPrompt});
            for (std::int64_t n = kPrompt; n < kLength; ++n) {
                if (again == 1)
                    logits[choice == AttentionChoice::tree].emplace_back(decoder->logits().begin(),
                                                                         decoder->logits().end());
                decoder->append(tokens[static_cast<std::size_t>(n)]);
            }
        }
    }
    ASSERT_EQ(logits[0].size(), logits[1].size());
    for (std::size_t n = 0; n < logits[0].size(); ++n) ASSERT_TRUE(close_to(logits[1][n], logits[0][n], 1e-6)) << n;
}

INSTANTIATE_TEST_SUITE_P(Cases, ModelForward, testing::ValuesIn(cases()),
                         [](const auto& info) { return std::string(info.param.name); });

std::vector<Case> causal_cases() {  // bidirectional models do not generate
    std::vector<Case> causal;
    for (const Case& c : cases())
        if (small_spec(c).causal) causal.push_back(c);
    return causal;
}
INSTANTIATE_TEST_SUITE_P(Cases, ModelDecoding, testing::ValuesIn(causal_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Model, DocumentsDoNotSeeEachOther) {
    const Case ragged{"", [](Config& c) { c.pattern = "sbd", c.layers = 3; }, true};
    const ModelSpec spec = small_spec(ragged);
    const auto runner = make_runner(spec, Recompute::none, true);
    const std::vector<float> w = lively_values(*runner, 8);
    runner->write(Block::master, w.data());
    const Batch all = small_batch(spec, 9, true);
    double sum = 0;
    for (std::size_t s = 0; s + 1 < all.offsets.size(); ++s) {
        Batch one;
        one.inputs.assign(all.inputs.begin() + all.offsets[s], all.inputs.begin() + all.offsets[s + 1]);
        one.targets.assign(all.targets.begin() + all.offsets[s], all.targets.begin() + all.offsets[s + 1]);
        one.rows = 1;
        one.length = static_cast<std::int64_t>(one.inputs.size());
        sum += runner->loss_sum(one);
    }
    EXPECT_NEAR(runner->loss_sum(all), sum, 1e-12 * sum);
}

TEST(Model, TauIsTheMedianEnergyOfTheBatch) {
    const Case energy{"", [](Config& c) { c.pattern = "sb", c.scalar_kind = ScalarKind::energy; }};
    const ModelSpec spec = small_spec(energy);
    const auto runner = make_runner(spec, Recompute::none, false);
    const std::vector<float> w = lively_values(*runner, 8);
    runner->write(Block::master, w.data());
    const Batch batch = small_batch(spec, 9, false);
    const auto tau = runner->calibrate_tau(batch);
    ASSERT_EQ(tau.size(), 2u);
    EXPECT_EQ(tau[0].size(), 1u);
    EXPECT_EQ(tau[1].size(), 4u);
    // With tau at the median, half of the energies E / (E + tau) of queries and keys together lie below one half.
    runner->loss_sum(batch);
    const LayerActivations<double>& act = runner->model().layer_activations(0);
    const double temperature = std::exp(runner->model().layer_weights(0).log_temp.data[0]);
    int below = 0, all = 0;
    for (const Mat<double>& m : {act.a, act.b})
        for (std::int64_t i = 0; i < m.rows; ++i) below += m.row(i)[0] * temperature < 0.5, ++all;
    EXPECT_GT(below, all / 5);
    EXPECT_LT(below, all * 4 / 5);
}

TEST(Model, OneBatchIsOverfitted) {
    for (const char* pattern : {"sb", "dd"}) {
        const Case plain{"", [&](Config& c) { c.pattern = pattern, c.init_std = 0.02; }};
        const ModelSpec spec = small_spec(plain);
        const auto runner = make_runner(spec, Recompute::none, false);
        std::vector<float> w(static_cast<std::size_t>(runner->table().elements));
        initialise(runner->table(), spec, 1, w.data());
        runner->write(Block::master, w.data());
        const Batch batch = small_batch(spec, 5, false);
        StepSettings settings{.lr = 1e-2, .decay = 0};
        double first = 0, last = 0;
        for (settings.step = 1; settings.step <= 150; ++settings.step) {
            last = runner->train_step({batch}, settings).loss;
            if (settings.step == 1) first = last;
        }
        EXPECT_GT(first, 2.5) << pattern;
        EXPECT_LT(last, 0.1) << pattern;
    }
}

}  // namespace
}  // namespace fiedler
