// eval --contexts: which targets are scored and after how many tokens, the figures against sums by hand, and the command.
#include "engine/evaluate_contexts.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "engine/files.h"
#include "engine/use_model.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

using Tokens = std::vector<std::int32_t>;

// A dataset with this held-out split.
Dataset held_out(const TempFolder& t, const Tokens& val, std::int32_t vocab) {
    std::filesystem::create_directories(t / "d");
    for (const auto& [name, tokens] : {std::pair{"train_0.bin", Tokens{1, 2}}, {"val_0.bin", val}}) {
        ShardWriter writer(t / "d/" + name, vocab);
        writer.append(tokens);
        writer.finish();
    }
    return Dataset::open(t / "d");
}
// Tokens that are their own places.
Tokens counting(std::int32_t n) {
    Tokens tokens(static_cast<std::size_t>(n));
    std::iota(tokens.begin(), tokens.end(), 0);
    return tokens;
}

// A source that has `loss_of(target)` for each target, whatever came before.
template <class LossOf>
LossSource source_of(std::int64_t context, std::int64_t rows, LossOf loss_of) {
    LossSource s{context, rows, {}};
    s.token_losses = [loss_of](const Batch& b) {
        std::vector<float> losses;
        for (const std::int32_t t : b.targets) losses.push_back(t < 0 ? 0.0f : loss_of(t));
        return losses;
    };
    return s;
}

// How many tokens of its window each scored target is predicted from.
std::map<std::int32_t, std::int64_t> seen_at(std::int64_t context, const Dataset& data, const ScoredBlocks& blocks) {
    std::map<std::int32_t, std::int64_t> seen;
    LossSource s{context, 3, {}};
    s.token_losses = [&](const Batch& b) {
        for (std::size_t i = 0; i < b.targets.size(); ++i) {
            if (b.targets[i] < 0) continue;
            EXPECT_EQ(b.inputs[i] + 1, b.targets[i]);
            const bool fresh = seen.emplace(b.targets[i], static_cast<std::int64_t>(i) % context + 1).second;
            EXPECT_TRUE(fresh) << b.targets[i] << " is scored twice with a context of " << context;
        }
        return std::vector<float>(b.targets.size());
    };
    (void)loss_at_context(s, data, blocks, false);
    return seen;
}

TEST(EvaluateContexts, EveryContextScoresTheSameTargets) {
    const TempFolder t;
    const Dataset data = held_out(t, counting(100), 60000);
    for (const std::int64_t most : {0, 20}) {
        const ScoredBlocks blocks = scored_blocks(data, 16, most);
        Tokens expected;
        for (const std::int64_t first : blocks.first)
            for (std::int64_t i = 0; i < 8; ++i) expected.push_back(static_cast<std::int32_t>(first + i + 1));
        for (const std::int64_t context : {2, 4, 6, 10, 16}) {  // half of 6 and of 10 do not divide a block
            Tokens scored;
            for (const auto& [target, seen] : seen_at(context, data, blocks)) {
                scored.push_back(target);
                EXPECT_GT(seen, context / 2) << target;
                EXPECT_LE(seen, context) << target;
            }
            EXPECT_EQ(scored, expected) << context;
        }
    }
}

TEST(EvaluateContexts, BlocksFillTheSplitOrAreSpreadOverIt) {
    const TempFolder t;
    const Dataset data = held_out(t, counting(100), 60000);
    EXPECT_EQ(scored_blocks(data, 16, 0).first, (std::vector<std::int64_t>{8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88}));
    // 39 tokens: 4 of the 11 blocks.
    EXPECT_EQ(scored_blocks(data, 16, 39).first, (std::vector<std::int64_t>{8, 24, 48, 72}));
    EXPECT_EQ(scored_blocks(data, 16, 1).first, (std::vector<std::int64_t>{8}));
    EXPECT_EQ(scored_blocks(data, 16, 1 << 30).scored(), 88);
    EXPECT_EQ(scored_blocks(data, 98, 0).first, (std::vector<std::int64_t>{49}));
    EXPECT_HAS(input_error_of([&] { scored_blocks(data, 100, 0); }), "contexts: 100 is too long");
    EXPECT_HAS(input_error_of([&] { scored_blocks(data, 1 << 20, 0); }), "has 100 tokens");
}

TEST(EvaluateContexts, ALossThatIgnoresContextIsTheSameForAll) {
    const TempFolder t;
    const Dataset data = held_out(t, counting(1000), 60000);
    const ScoredBlocks blocks = scored_blocks(data, 64, 0);
    const auto loss_of = [](std::int32_t target) { return static_cast<float>((target * 37) % 64) / 8; };
    double sum = 0;
    for (const std::int64_t first : blocks.first)
        for (std::int64_t i = 1; i <= 32; ++i) sum += double(loss_of(static_cast<std::int32_t>(first + i)));
    const ContextLoss shortest = loss_at_context(source_of(4, 5, loss_of), data, blocks, false);
    EXPECT_NEAR(shortest.loss, sum / double(blocks.scored()), 1e-12);
    for (const std::int64_t context : {8, 22, 32, 64}) {
        const ContextLoss c = loss_at_context(source_of(context, 3, loss_of), data, blocks, false);
        const PairedDifference d = paired_difference(c, shortest);
        EXPECT_NEAR(c.loss, shortest.loss, 1e-12) << context;
        EXPECT_NEAR(d.mean, 0, 1e-12) << context;
        EXPECT_NEAR(d.standard_error.value(), 0, 1e-12) << context;
    }
}

TEST(EvaluateContexts, DifferencesAreOfPairs) {
    ContextLoss a, b;
    a.block_means = {1, 2, 5}, b.block_means = {2, 2, 3};
    const PairedDifference d = paired_difference(a, b);  // -1, 0, 2
    EXPECT_NEAR(d.mean, 1.0 / 3, 1e-12);
    EXPECT_NEAR(d.standard_error.value(), std::sqrt(((16 + 1 + 25) / 9.0) / 2 / 3), 1e-12);
    a.block_means = {1}, b.block_means = {3};
    EXPECT_EQ(paired_difference(a, b).mean, -2);
    EXPECT_FALSE(paired_difference(a, b).standard_error.has_value());
}

// ---- a model ----------------------------------------------------------------------------------------------------------

EngineOptions cpu_options() {
    EngineOptions o;
    o.threads = 1;
    o.training = false;
    return o;
}

// A small model of random weights, trained (as far as its knobs say) with 16 tokens.
Bundle random_model(const std::string& pattern, const std::string& folder = "") {
    Bundle b;
    const std::map<std::string, std::string> values = {{"pattern", pattern}, {"layers", "2"},    {"vocab", "100"},
                                                       {"channels", "32"},   {"heads", "2"},     {"scalars", "4"},
                                                       {"context", "16"},    {"init-std", "0.3"}};
    for (const auto& [name, value] : values) set_value(b.config, *find_knob(name), {value}, name);
    b.spec = model_spec(b.config);
    const auto engine = make_engine(b.spec, cpu_options());
    b.master.resize(static_cast<std::size_t>(engine->table().elements));
    initialise(engine->table(), b.spec, 5, b.master.data());
    b.constants = engine->constants();
    engine->write(Block::master, b.master.data());
    if (!folder.empty()) b.path = write_bundle(folder, b.config, *engine);
    return b;
}
Tokens random_tokens(std::size_t n) {
    Tokens tokens(n);
    for (std::size_t i = 0; i < n; ++i) tokens[i] = static_cast<std::int32_t>(rng::below(100, 3, 4, i));
    return tokens;
}

// The loss of the token at `place`, by a row of its own: from the tokens between `begin` and it, without a batch.
double loss_of_token(Engine& engine, const Tokens& tokens, std::size_t begin, std::size_t place) {
    Batch b;
    b.rows = b.real_rows = 1;
    b.inputs.assign(tokens.begin() + static_cast<std::ptrdiff_t>(begin),
                    tokens.begin() + static_cast<std::ptrdiff_t>(place));
    b.length = static_cast<std::int64_t>(b.inputs.size());
    b.targets.assign(b.inputs.size(), -1);
    b.targets.back() = tokens[place];
    return engine.loss_sum(b);
}

TEST(EvaluateContexts, FiguresAreSumsByHand) {
    const TempFolder t;
    const Tokens tokens = random_tokens(140);
    const Dataset data = held_out(t, tokens, 100);
    Config c;
    c.device = DeviceChoice::cpu;
    c.threads = 1;
    for (const char* pattern : {"sb", "bd", "b:8d"}) {
        const Bundle model = random_model(pattern);
        const ScoredBlocks blocks = scored_blocks(data, 48, 0);
        ASSERT_EQ(blocks.first, (std::vector<std::int64_t>{24, 48, 72, 96}));
        ModelSpec spec = model.spec;
        spec.context = 48;
        const auto by_hand = make_engine(spec, cpu_options(), model.constants);
        by_hand->write(Block::master, model.master.data());
        for (const std::int64_t context : {8, 16, 48}) {
            const auto use = use_bundle(random_model(pattern), c, {context, 2});
            EXPECT_EQ(use->losses().rows, 2);
            const ContextLoss loss = loss_at_context(use->losses(), data, blocks, false);
            double sum = 0;
            for (std::size_t place = 25; place <= 120; ++place) {
                // Windows of c tokens start at multiples of c / 2; that of a target has it in its last half.
                const std::size_t half = static_cast<std::size_t>(context) / 2;
                const std::size_t begin = (place - 1) / half * half - half;
                sum += loss_of_token(*by_hand, tokens, begin, place);
            }
            EXPECT_NEAR(loss.loss, sum / 96, 2e-5) << pattern << " at " << context;
            EXPECT_EQ(loss.windows, 96 / (context / 2));
        }
    }
}

// The CPU runtime, which gives sums only and has one row at a time.
TEST(EvaluateContexts, TheRuntimeGivesTheSame) {
    const TempFolder t;
    const Dataset data = held_out(t, random_tokens(140), 100);
    const std::string path = random_model("sb", t.path()).path;
    Config c;
    c.device = DeviceChoice::cpu;
    c.threads = 1;
    c.cache = CacheChoice::exact;
    const ScoredBlocks blocks = scored_blocks(data, 48, 0);
    for (const std::int64_t context : {16, 48}) {
        const auto engine = use_bundle(load_bundle(path), c, {context, 2});
        const auto runtime = use_runtime(path, c, {context, 1});
        const double expected = loss_at_context(engine->losses(), data, blocks, false).loss;
        EXPECT_NEAR(loss_at_context(runtime->losses(), data, blocks, false).loss, expected, 1e-4) << context;
    }
}

// ---- the command ------------------------------------------------------------------------------------------------------

class CommandContexts : public CommandTest {
  protected:
    Words eval(const Words& more) {
        Words w = {"eval", "run", "--data", dataset(), "--device", "cpu"};
        w.insert(w.end(), more.begin(), more.end());
        return w;
    }
};

TEST_F(CommandContexts, FieldsWordsAndPlot) {
    ASSERT_NO_FATAL_FAILURE(trained("run", {{"data", dataset()}, {"steps", "30"}, {"pattern", "sd"}}));
    const Outcome o = run(eval({"--contexts", "16,64,256", "--val-tokens", "800", "--json", "--plot", "c.svg"}));
    ASSERT_EQ(o.code, 0) << o.err;
    const Json j = Json::parse(o.out);
    EXPECT_EQ(j.at("tokens"), 768);
    EXPECT_EQ(j.at("blocks"), 6);
    EXPECT_EQ(j.at("block_tokens"), 128);
    EXPECT_EQ(j.at("trained_context"), 64);
    EXPECT_GT(j.at("unigram_entropy").get<double>(), 0);
    EXPECT_HAS(j.at("device").get<std::string>(), "cpu");
    EXPECT_EQ(j.at("plot"), "c.svg");
    ASSERT_EQ(j.at("contexts").size(), 3u);
    const double shortest = j.at("contexts")[0].at("loss");
    EXPECT_EQ(j.at("contexts")[0].at("difference"), 0);
    for (const Json& c : j.at("contexts")) {
        const double loss = c.at("loss"), bits = c.at("bits_per_byte");
        EXPECT_GT(loss, 0);
        EXPECT_GT(bits, 0);
        EXPECT_NEAR(c.at("difference").get<double>(), loss - shortest, 1e-9);
        EXPECT_GE(c.at("standard_error").get<double>(), 0);
        EXPECT_EQ(c.at("windows").get<std::int64_t>() * c.at("context").get<std::int64_t>() / 2, 768);
        EXPECT_HAS(o.err, fmt::format("{:.4f} nats a token", loss));
    }
    EXPECT_HAS(o.err, "tokens scored      768, the same for every context (6 blocks of 128");
    EXPECT_HAS(o.err, "(trained with 64)");
    const std::string svg = fiedler::read_file(path("c.svg"));
    EXPECT_HAS(svg, "</svg>");
    EXPECT_HAS(svg, ">context, tokens<");
    EXPECT_HAS(svg, fmt::format(">{:.3f}<", shortest));

    // Documents kept apart: the same tokens, other losses.
    Words corpus = {"eval", "run", "--data", "corpus", "--device", "cpu", "--data-cache", "cache"};
    corpus.insert(corpus.end(), {"--contexts", "16,256", "--val-tokens", "20000", "--json"});
    const Outcome open = run(corpus);
    corpus.push_back("--document-mask");
    const Outcome masked = run(corpus);
    ASSERT_EQ(masked.code, 0) << masked.err;
    EXPECT_EQ(Json::parse(masked.out).at("tokens"), Json::parse(open.out).at("tokens"));
    EXPECT_NE(Json::parse(masked.out).at("contexts")[1].at("loss"), Json::parse(open.out).at("contexts")[1].at("loss"));

    // One context; and the JSON without any.
    const Outcome one = run(eval({"--contexts", "64", "--val-tokens", "32"}));
    ASSERT_EQ(one.code, 0) << one.err;
    EXPECT_HAS(one.out, "tokens scored      32, the same for every context (1 block of 32");
    const Outcome plain = run(eval({"--json", "--by-position"}));
    ASSERT_EQ(plain.code, 0) << plain.err;
    const Json p = Json::parse(plain.out);
    for (const char* field : {"loss", "bits_per_byte", "unigram_entropy", "tokens", "seconds"})
        EXPECT_GT(p.at(field).get<double>(), 0) << field;
    EXPECT_EQ(p.at("by_position").size(), 3u);  // 0-15, 16-31, 32-63
    EXPECT_EQ(plain.out.find('\n'), plain.out.size() - 1);
}

TEST_F(CommandContexts, BadValuesAreRefused) {
    ASSERT_NO_FATAL_FAILURE(trained("run", {{"data", dataset()}, {"steps", "2"}}));
    const auto refused = [&](const Words& more, const Words& parts) { expect_refused(run(eval(more)), parts); };
    refused({"--contexts", "16,65"}, {"--contexts", "'65' is not allowed", "even"});
    refused({"--contexts", "0,64"}, {"'0' is not allowed"});
    refused({"--contexts", "-2"}, {"--contexts", "-2"});
    refused({"--contexts", "1K"}, {"'1K' is not allowed"});
    refused({"--contexts", "33554432"}, {"2 to 16777216"});
    refused({"--contexts", "64,16"}, {"16 stands after 64", "ascending"});
    refused({"--contexts", "64,64"}, {"64 stands after 64"});
    refused({"--contexts", ","}, {"names no length"});
    refused({"--contexts", "16,65536"}, {"contexts: 65536 is too long", "held-out split has"});
    refused({"--contexts", "16,65536", "--memory-budget", "1MiB"}, {"memory-budget", "smaller model or context"});
    refused({"--contexts", "16,64", "--by-position"}, {"--by-position", "one of them"});
    refused({"--contexts", "16,64", "--plot", "nothere/c.svg"}, {"nothere/"});
    ASSERT_NO_FATAL_FAILURE(trained("both", {{"data", dataset()}, {"steps", "2"}, {"no-causal", ""}}));
    expect_refused(run({"eval", "both", "--data", dataset(), "--device", "cpu", "--contexts", "16"}), {"causal"});
}

}  // namespace
}  // namespace fiedler::test
