// The CPU runtime against the engine: every kind of layer, prompts in pieces and token by token, every form of cache,
// and what quantising changes. Logits are compared by their error, not by the text they would give.
#include <gtest/gtest.h>

#include <cmath>

#include "engine/bundle.h"
#include "engine/error.h"
#include "engine/quantize.h"
#include "engine/rng.h"
#include "engine/spectral_embedding.h"
#include "infer/session.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Knobs = std::vector<std::pair<const char*, const char*>>;

// A small model with every parameter away from its start, in a file.
struct World {
    TempFolder folder;
    Config config;
    std::unique_ptr<Engine> engine;
    std::string path;
    std::vector<std::int32_t> tokens;

    explicit World(const Knobs& knobs, int length = 90) {
        const Knobs base = {{"vocab", "500"},  {"channels", "64"}, {"heads", "2"},      {"layers", "2"},
                            {"context", "96"}, {"scalars", "4"},   {"init-std", "0.15"}};
        for (const Knobs& all : {base, knobs})
            for (const auto& [name, value] : all) set_value(config, *find_knob(name), {value}, name);
        const ModelSpec spec = model_spec(config);
        ModelConstants constants;
        if (spec.spectral_dims > 0) constants.spectral = random_spectral_table(spec, 3);
        EngineOptions o;
        o.threads = 1;
        o.training = false;
        engine = make_engine(spec, o, constants);
        std::vector<float> master(static_cast<std::size_t>(engine->table().elements));
        initialise(engine->table(), engine->spec(), 5, master.data());
        for (const ParamTensor& t : engine->table().tensor)
            for (std::int64_t i = 0; i < t.size(); ++i)
                master[static_cast<std::size_t>(t.offset + i)] +=
                    0.1f * static_cast<float>(rng::normal(9, hash_bytes(t.name), static_cast<std::uint64_t>(i)));
        engine->write(Block::master, master.data());
        path = write_bundle(folder.path(), config, *engine);
        for (int i = 0; i < length; ++i)
            tokens.push_back(static_cast<std::int32_t>(rng::below(500, 1, 2, static_cast<std::uint64_t>(i))));
    }
    std::vector<float> expected() const { return expected(*engine); }
    std::vector<float> expected(Engine& by) const {
        const auto decoder = by.decoder(static_cast<std::int64_t>(tokens.size()));
        decoder->prefill(tokens);
        return decoder->logits();
    }
    std::string quantised(Quant kind, QuantSearch search = QuantSearch::least_error) const {
        const std::string out = folder / (kind == Quant::int8 ? "q8.fdl" : "q4.fdl");
        quantize_model(load_bundle(path), kind, search, out, 1);
        return out;
    }
};

SessionOptions exact(std::int64_t batch = 64) { return {.threads = 1, .cache = CacheKind::exact, .batch = batch}; }

// Root mean square of the difference over that of b about its mean.
double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
    double mean = 0, difference = 0, spread = 0;
    for (const float v : b) mean += double(v) / double(b.size());
    for (std::size_t i = 0; i < b.size(); ++i) {
        difference += std::pow(double(a[i]) - double(b[i]), 2);
        spread += std::pow(double(b[i]) - mean, 2);
    }
    return std::sqrt(difference / spread);
}

const Knobs kModels[] = {
    {{"pattern", "sb"}},
    {{"pattern", "sb:7"}, {"tied", "false"}},
    {{"pattern", "sb"}, {"scalar-kind", "energy"}, {"tau", "0.4"}},
    {{"pattern", "s"}, {"scalar-kind", "energy"}, {"rope", "all"}, {"conv", "false"}, {"tau", "0.4"}},
    {{"pattern", "dd:9"}},
    {{"pattern", "sd"}, {"gate", "false"}, {"qk-norm", "false"}},
    {{"pattern", "s"}, {"spectral-dims", "12"}, {"spectral-source", "random"}}};

TEST(Infer, EveryKindOfModelGivesTheLogitsOfTheEngine) {
    for (const Knobs& knobs : kModels) {
        SCOPED_TRACE(knobs[0].second);
        const World w(knobs);
        const std::vector<float> expected = w.expected();
        const InferModel model(w.path);
        EXPECT_FALSE(model.quantised());
        for (const std::int64_t batch : {64, 1, 7}) {
            Session s(model, exact(batch));
            s.feed(w.tokens);
            EXPECT_LT(relative_error(s.logits(), expected), 2e-5) << "in pieces of " << batch;
            EXPECT_EQ(s.length(), 90);
        }
        // Again after a reset, half as a prompt and half token by token.
        Session s(model, exact());
        s.feed(w.tokens);
        s.reset();
        s.feed(std::span(w.tokens).subspan(0, 45));
        for (std::size_t i = 45; i < 90; ++i) s.feed({&w.tokens[i], 1});
        EXPECT_LT(relative_error(s.logits(), expected), 2e-5);
    }
}

TEST(Infer, CachesOfFewerBitsLoseLittle) {
    for (const Knobs& knobs : {kModels[0], kModels[4]}) {
        const World w(knobs);
        const InferModel model(w.path);
        double error[3] = {};
        for (const CacheKind kind : {CacheKind::exact, CacheKind::compact, CacheKind::int8}) {
            Session s(model, {.threads = 1, .cache = kind});
            s.feed(w.tokens);
            error[static_cast<int>(kind)] = relative_error(s.logits(), w.expected());
        }
        EXPECT_LT(error[static_cast<int>(CacheKind::compact)], 2e-3);
        EXPECT_LT(error[static_cast<int>(CacheKind::int8)], 1.5e-2);
        EXPECT_GT(error[static_cast<int>(CacheKind::int8)], error[static_cast<int>(CacheKind::compact)]);
    }
}

TEST(Infer, LossesAreTheEngines) {
    for (const Knobs& knobs : {kModels[1], kModels[6]}) {
        const World w(knobs, 97);
        Batch batch;
        batch.rows = batch.real_rows = 1;
        batch.length = 96;
        batch.inputs.assign(w.tokens.begin(), w.tokens.end() - 1);
        batch.targets.assign(w.tokens.begin() + 1, w.tokens.end());
        batch.targets[5] = -1;
        const double expected = w.engine->loss_sum(batch);
        const InferModel model(w.path);
        Session s(model, exact(13));
        EXPECT_NEAR(s.loss_sum(batch.inputs, batch.targets), expected, 1e-5 * expected);
        EXPECT_NEAR(s.loss_sum(batch.inputs, batch.targets), expected,
                    1e-5 * expected);  // from the beginning each time
    }
}

// The runtime on integers against the engine on the same, widened weights: what is left is the rounding of activations.
TEST(Infer, QuantisedModelsGiveTheLogitsOfTheirWidenedWeights) {
    for (const Knobs& knobs : kModels) {
        SCOPED_TRACE(knobs[0].second);
        const World w(knobs);
        const std::vector<float> unquantised = w.expected();
        double of_weights[2] = {};
        for (const Quant kind : {Quant::int8, Quant::int4}) {
            const std::string path = w.quantised(kind);
            const Bundle widened = load_bundle(path);
            EngineOptions o;
            o.threads = 1;
            o.training = false;
            const auto engine = make_engine(widened.spec, o, widened.constants);
            engine->write(Block::master, widened.master.data());
            const std::vector<float> expected = w.expected(*engine);
            const InferModel model(path);
            EXPECT_TRUE(model.quantised());
            EXPECT_TRUE(is_quantised_file(path));
            Session s(model, exact());
            s.feed(w.tokens);
            EXPECT_LT(relative_error(s.logits(), expected), 0.03);  // 0.020 at most when this was written
            of_weights[kind == Quant::int4] = relative_error(s.logits(), unquantised);
            Session threads(model, {.threads = 3, .cache = CacheKind::exact});
            threads.feed(w.tokens);
            EXPECT_EQ(threads.logits(), s.logits());
        }
        EXPECT_LT(of_weights[0], 0.05);
        EXPECT_LT(of_weights[0], of_weights[1]);
    }
}

TEST(Infer, SearchedScalesAreBetterForTheModel) {
    const World w(kModels[0]);
    double error[2] = {};
    for (const QuantSearch search : {QuantSearch::nearest, QuantSearch::least_error}) {
        const Quantised q = quantize_model(load_bundle(w.path), Quant::int4, search, w.folder / "x.fdl", 1);
        for (const QuantisedTensor& t : q.tensors)
            if (t.quantised) error[search == QuantSearch::least_error] += t.error.error_squares;
    }
    EXPECT_LT(error[1], 0.85 * error[0]);
}

TEST(Infer, CacheBytesAreCounted) {
    Config c = preset_config("fiedler30m");
    const CacheBytes compact = cache_bytes(model_spec(c), CacheKind::compact);
    // Nine layers with one scalar a head and three with eight, six heads of 64: values f32, scalars and gate f16.
    EXPECT_EQ(compact.ours, 12u * 6 * 64 * 4 + 9 * 6 * (1 + 1) * 2 + 3 * 6 * (8 + 1) * 2);
    EXPECT_EQ(compact.key_value, 2u * 12 * 6 * 64 * 4);
    const CacheBytes bytes = cache_bytes(model_spec(c), CacheKind::int8);
    EXPECT_EQ(bytes.ours, 12u * 6 * (64 + 2) + 9 * 6 * 4 + 3 * 6 * 18);
    const CacheBytes dots = cache_bytes(model_spec(preset_config("gpt30m")), CacheKind::compact);
    EXPECT_EQ(dots.ours, dots.key_value);
    c.pattern = "s";
    const CacheBytes one = cache_bytes(model_spec(c), CacheKind::compact);
    EXPECT_LE(double(one.ours), 0.51 * double(one.key_value));
}

TEST(Infer, RefusesWhatDoesNotFit) {
    const World w(kModels[0]);
    const InferModel model(w.path);
    Session s(model, {.threads = 1, .capacity = 10});
    const auto said = [&](const std::vector<std::int32_t>& tokens) -> std::string {
        try {
            s.feed(tokens);
        } catch (const InputError& e) {
            return e.what();
        }
        return "";
    };
    EXPECT_NE(said({}).find("is empty"), std::string::npos);
    EXPECT_NE(said({1, 500}).find("token 500 lies outside"), std::string::npos);
    EXPECT_NE(said({-1}).find("token -1 lies outside"), std::string::npos);
    EXPECT_NE(said(std::vector<std::int32_t>(11, 3)).find("room for 10 more"), std::string::npos);
    EXPECT_EQ(s.length(), 0);
    EXPECT_EQ(said(std::vector<std::int32_t>(10, 3)), "");
    EXPECT_NE(said({3}).find("room for 0 more"), std::string::npos);
    const World both({{"pattern", "sb"}, {"causal", "false"}, {"gate", "false"}});
    EXPECT_THROW(InferModel m(both.path), InputError);
    // Values that are not finite have no scale.
    Bundle broken = load_bundle(w.path);
    broken.master[3] = std::nanf("");
    EXPECT_THROW(quantize_model(broken, Quant::int8, QuantSearch::nearest, w.folder / "n.fdl", 1), InputError);
    EXPECT_FALSE(std::filesystem::exists(w.folder / "n.fdl"));
}

}  // namespace
}  // namespace fiedler::test
