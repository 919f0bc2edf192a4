// The table of knobs: flags, TOML, JSON and help from one source; presets; refusals in one line that name knob, value
// and remedy.
#include "engine/config.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "engine/error.h"
#include "engine/params.h"

namespace fiedler {
namespace {

Invocation parse(const std::vector<std::string>& arguments, Command command = Command::train) {
    return parse_arguments(command, arguments);
}

template <class Body>
std::string refusal(Body&& body) {
    try {
        body();
    } catch (const InputError& e) {
        EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
        return e.what();
    }
    ADD_FAILURE() << "no InputError";
    return "";
}
testing::AssertionResult says(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& p : parts)
        if (text.find(p) == std::string::npos) return testing::AssertionFailure() << "no '" << p << "' in: " << text;
    return testing::AssertionSuccess();
}

class TomlFile {
  public:
    explicit TomlFile(const std::string& text)
        : path((std::filesystem::temp_directory_path() / ("fiedler_config_" + std::to_string(getpid()) + ".toml"))
                   .string()) {
        std::ofstream(path) << text;
    }
    ~TomlFile() { std::filesystem::remove(path); }
    const std::string path;
};

// A value of the knob that differs from its default.
std::vector<std::string> other_value(const Knob& k) {
    if (std::string_view(k.name) == "preset") return {"small"};
    if (std::string_view(k.name) == "tau") return {"0.25"};
    if (std::string_view(k.name) == "contexts") return {"16", "64"};
    if (std::holds_alternative<bool Config::*>(k.field)) return {value_text(Config{}, k) == "true" ? "false" : "true"};
    if (!k.rules.choices.empty())
        return {k.rules.choices[1] == value_text(Config{}, k) ? k.rules.choices[0] : k.rules.choices[1]};
    if (std::holds_alternative<std::vector<std::string> Config::*>(k.field)) return {"a b", "c#d"};
    if (std::holds_alternative<std::string Config::*>(k.field)) return {"some \"text\" [of] it"};
    const bool whole = std::holds_alternative<std::int64_t Config::*>(k.field);
    for (const double x : {k.rules.low, (k.rules.low + std::min(k.rules.high, 1e6)) / 3, k.rules.low + 1}) {
        Config c;
        const std::string text = whole ? std::to_string(static_cast<std::int64_t>(x)) : fmt::format("{}", x);
        if (x > k.rules.high) continue;
        set_value(c, k, {text}, "test");
        if (value_text(c, k) != value_text(Config{}, k)) return {text};
    }
    ADD_FAILURE() << k.name;
    return {};
}

TEST(Knobs, EveryRowIsCompleteAndNamesAreUnique) {
    std::set<std::string> names;
    for (const Knob& k : knobs()) {
        EXPECT_TRUE(names.insert(k.name).second) << k.name;
        EXPECT_NE(k.commands, 0u) << k.name;
        EXPECT_GT(std::string(k.help).size(), 10u) << k.name;
        EXPECT_EQ(find_knob(k.name), &k);
        EXPECT_NE(k.rules.on_resume, OnResume::by_group) << k.name;
        const bool number = std::holds_alternative<std::int64_t Config::*>(k.field) ||
                            std::holds_alternative<double Config::*>(k.field);
        EXPECT_EQ(number, k.rules.high > k.rules.low) << k.name;
        EXPECT_EQ(std::holds_alternative<ChoiceField>(k.field), k.rules.choices.size() > 1) << k.name;
    }
}

TEST(Knobs, DefaultsAreAllowedValuesAndArriveUnchangedAsText) {
    for (const Knob& k : knobs()) {
        Config c;
        const bool list = std::holds_alternative<std::vector<std::string> Config::*>(k.field);
        set_value(c, k, list ? std::vector<std::string>{} : std::vector{value_text(c, k)}, "test");
        EXPECT_EQ(to_json(c), to_json(Config{})) << k.name;
    }
}

TEST(Knobs, EachIsAFlagALineOfTomlAndAJsonKey) {
    for (const Knob& k : knobs()) {
        const Config before;
        Config c;
        const std::vector<std::string> value = other_value(k);
        set_value(c, k, value, "test");
        ASSERT_NE(to_json(c), to_json(before)) << k.name;
        EXPECT_EQ(to_json(config_from_json(to_json(c), "test")), to_json(c)) << k.name;
        EXPECT_EQ(to_json(config_from_json(Json::parse(to_json(c).dump()), "test")), to_json(c)) << k.name;
        for (const Command command : {Command::prepare, Command::train, Command::eval, Command::generate, Command::plan,
                                      Command::inspect, Command::spectrum, Command::bench}) {
            std::vector<std::string> arguments = {std::string("--") + k.name};
            if (std::holds_alternative<bool Config::*>(k.field))
                arguments = {(value[0] == "true" ? "--" : "--no-") + std::string(k.name)};
            else if (*k.rules.alone)
                arguments = {std::string("--") + k.name + "=" + value[0]};
            else
                arguments.insert(arguments.end(), value.begin(), value.end());
            if (!(k.commands & bit_of(command))) {
                EXPECT_TRUE(says(refusal([&] { parse(arguments, command); }), {k.name, "other commands"}));
                continue;
            }
            const Invocation run = parse(arguments, command);
            EXPECT_EQ(value_text(run.config, k), value_text(c, k));
            EXPECT_TRUE(run.given(k.name));
            EXPECT_TRUE(says(help_text(command), {k.name}));
        }
    }
}

TEST(Knobs, ATomlFileOfARunGivesTheRunAgain) {
    const Invocation run =
        parse({"--preset", "fiedler30m", "--lr", "0.00123", "--data", "/a b", "c,d", "--sample-prompt", "int main() {",
               "--memory-budget", "24GiB", "--no-tied", "--resume"});
    const TomlFile file(to_toml(run.config, Command::train));
    EXPECT_EQ(to_json(parse({"--config", file.path}).config), to_json(run.config));
}

TEST(Knobs, FlagsWinOverFileOverPresetOverDefaults) {
    const TomlFile file(
        "# a comment\n[model]\npreset = \"fiedler30m\"\nlayers = 8 # eight\n[train]\nlr = 0.5\n"
        "[data]\ndata = [\"a\", \"b c\"]\n");
    const Invocation run = parse({"--lr", "0.25", "--config", file.path});
    EXPECT_EQ(run.config.channels, 384);
    EXPECT_EQ(run.config.layers, 8);
    EXPECT_EQ(run.config.lr, 0.25);
    EXPECT_EQ(run.config.beta2, 0.95);
    EXPECT_EQ(run.config.data, (std::vector<std::string>{"a", "b c"}));
    EXPECT_EQ(run.source.at("channels"), Source::preset);
    EXPECT_EQ(run.source.at("layers"), Source::file);
    EXPECT_EQ(run.source.at("lr"), Source::flag);
    EXPECT_EQ(run.source.count("beta2"), 0u);
    EXPECT_FALSE(run.given("channels"));
    EXPECT_EQ(parse({"--config", file.path, "--preset", "small"}).config.channels, 320);
}

TEST(Knobs, PositionalsListsAndFlagsWithoutAValue) {
    EXPECT_EQ(parse({"a", "b", "--vocab", "300"}, Command::prepare).config.data, (std::vector<std::string>{"a", "b"}));
    EXPECT_EQ(parse({"--extensions", "c,h", "--extensions", "txt"}).config.extensions,
              (std::vector<std::string>{"c", "h", "txt"}));
    EXPECT_EQ(parse({"--resume"}).config.resume, "latest");
    EXPECT_EQ(parse({"--resume", "runs/x"}).config.resume, "runs/x");
    EXPECT_EQ(parse({"--resume", "--steps", "7"}).config.steps, 7);
    EXPECT_EQ(parse({"runs/x", "--prompt", "[a, b]"}, Command::generate).config.prompt, "[a, b]");
    EXPECT_EQ(parse({"runs/x", "--prompt=-x"}, Command::generate).config.prompt, "-x");
    EXPECT_EQ(parse({"--gate=false"}).config.gate, false);
    EXPECT_EQ(parse({"--gate-bias-min", "-1.5"}).config.gate_bias_min, -1.5);
    EXPECT_TRUE(parse({"--help"}).help);
    EXPECT_TRUE(parse({"--help", "--no-such"}).help);
}

TEST(Knobs, BadFlagsAreRefusedInOneLine) {
    EXPECT_TRUE(says(refusal([] { parse({"--layer", "3"}); }), {"layer", "did you mean layers?"}));
    EXPECT_TRUE(says(refusal([] { parse({"--qqqqqqqqqqq", "3"}); }), {"qqqqqqqqqqq", "--help"}));
    EXPECT_TRUE(says(refusal([] { parse({"stray"}); }), {"stray"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps", "many"}); }), {"--steps", "'many'", "whole number", "1 or more"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps", "1.5"}); }), {"--steps", "'1.5'"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps", ""}); }), {"--steps", "''"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps", "0"}); }), {"--steps", "'0'", "1 or more"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps", "99999999999999999999"}); }), {"--steps"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps"}); }), {"--steps needs a value"}));
    EXPECT_TRUE(says(refusal([] { parse({"--steps", "1", "--steps", "2"}); }), {"steps", "one value"}));
    EXPECT_TRUE(says(refusal([] { parse({"--scalars", "17"}); }), {"'17'", "1 to 16"}));
    EXPECT_TRUE(says(refusal([] { parse({"--lr", "nan"}); }), {"lr", "nan"}));
    EXPECT_TRUE(says(refusal([] { parse({"--lr", "1e999"}); }), {"lr"}));
    EXPECT_TRUE(says(refusal([] { parse({"--val-fraction", "0.7"}); }), {"'0.7'", "0 to 0.5"}));
    EXPECT_TRUE(says(refusal([] { parse({"--schedule", "linear"}); }), {"'linear'", "wsd, cosine, constant"}));
    EXPECT_TRUE(says(refusal([] { parse({"--preset", "huge"}); }), {"'huge'", "tiny", "gpt30m"}));
    EXPECT_TRUE(says(refusal([] { parse({"--tau", "median"}); }), {"tau", "'median'", "median-learned"}));
    EXPECT_TRUE(says(refusal([] { parse({"--tau", "0"}); }), {"tau", "'0'"}));
    EXPECT_TRUE(says(refusal([] { parse({"--gate", "false"}); }), {"false"}));
    EXPECT_TRUE(says(refusal([] { parse({"--no-steps"}); }), {"steps"}));
    EXPECT_TRUE(says(refusal([] { parse({"--memory-budget", "24GX"}); }), {"memory-budget", "24GX", "24GiB"}));
    EXPECT_TRUE(says(refusal([] { parse({"--memory-budget", "-1"}); }), {"memory-budget"}));
    EXPECT_TRUE(says(refusal([] { parse({"--config", "/no/such/file.toml"}); }), {"/no/such/file.toml"}));
}

TEST(Knobs, BadFilesAreRefusedWithFileLineAndField) {
    const auto refused = [](const std::string& text) {
        const TomlFile file(text);
        const std::string message = refusal([&] { parse({"--config", file.path}); });
        EXPECT_TRUE(says(message, {file.path}));
        return message;
    };
    EXPECT_TRUE(says(refused("\n[train]\nlearning-rate = 1\n"), {":3", "learning-rate"}));
    EXPECT_TRUE(says(refused("layres = 3\n"), {":1", "layres", "did you mean layers?"}));
    EXPECT_TRUE(says(refused("layers = three\n"), {":1", "layers", "'three'"}));
    EXPECT_TRUE(says(refused("[data]\nlayers = 3\n"), {"layers", "[data]", "[model]"}));
    EXPECT_TRUE(says(refused("prompt = \"x\"\n"), {"prompt", "fiedler train"}));
    EXPECT_TRUE(says(refused("sample-prompt = \"a#b\"\n"), {"sample-prompt", "quote"}));
    EXPECT_TRUE(says(refused("lr = [1, 2]\n"), {"lr", "one value"}));
    EXPECT_TRUE(says(refused("some words in a file\n"), {"some words"}));
}

TEST(Knobs, SizesHaveUnits) {
    EXPECT_EQ(parse_bytes("24GiB", "x"), std::int64_t{24} << 30);
    EXPECT_EQ(parse_bytes("1.5 MiB", "x"), 3 << 19);
    EXPECT_EQ(parse_bytes("400MB", "x"), 400000000);
    EXPECT_EQ(parse_bytes("1_000", "x"), 1000);
    EXPECT_EQ(parse_bytes("0", "x"), 0);
    for (const char* bad : {"", "GiB", "1 G", "1e3", "-5", "1GiB2", "99999999999TB", "1.2.3MB"})
        EXPECT_TRUE(says(refusal([&] { parse_bytes(bad, "--memory-budget"); }), {"--memory-budget"})) << bad;
    EXPECT_EQ(bytes_text(1536), "1.5 KiB");
    EXPECT_EQ(bytes_text(std::int64_t{24} << 30), "24.00 GiB");
}

TEST(Knobs, JsonOfAnotherVersionOrProgramIsRefused) {
    EXPECT_TRUE(says(refusal([] { config_from_json({{"laters", 3}}, "run/manifest.json"); }), {"manifest", "laters"}));
    EXPECT_TRUE(says(refusal([] { config_from_json({{"layers", {{"a", 1}}}}, "f"); }), {"layers"}));
    EXPECT_TRUE(says(refusal([] { config_from_json({{"layers", 1.5}}, "f"); }), {"layers", "1.5"}));
    EXPECT_TRUE(says(refusal([] { config_from_json({{"gate", 1}}, "f"); }), {"gate"}));
    EXPECT_TRUE(says(refusal([] { config_from_json({{"gate", nullptr}}, "f"); }), {"gate"}));
    EXPECT_TRUE(says(refusal([] { config_from_json(Json::array(), "f"); }), {"f: "}));
    EXPECT_EQ(config_from_json({{"layers", 8}}, "f").channels, Config{}.channels);
    EXPECT_FALSE(to_json(Config{}, KnobGroup::model).contains("lr"));
    EXPECT_TRUE(to_json(Config{}, KnobGroup::model).contains("layers"));
}

TEST(Presets, AreModelsOfTheSizeTheyClaim) {
    const std::int64_t gpt = parameter_count(preset_config("gpt30m"));
    // 12 (4 C^2 + 8 C^2 + 12 C) + V C, by hand.
    EXPECT_EQ(gpt, 12 * (12 * 384 * 384 + 12 * 384) + 16384 * 384);
    for (const char* name : {"fiedler30m", "fiedler30m-energy", "tau30m-same-shape"}) {
        const Config c = preset_config(name);
        EXPECT_EQ(c.mlp_hidden % 16, 0) << name;
        // Nearest multiple of 16: within half of what 16 more hidden channels cost.
        EXPECT_LE(std::abs(parameter_count(c) - gpt), 12 * 2 * 384 * 8) << name;
    }
    EXPECT_NEAR(static_cast<double>(parameter_count(preset_config("tiny"))), 1e6, 2e5);
    EXPECT_NEAR(static_cast<double>(parameter_count(preset_config("small"))), 1e7, 1.5e6);
    for (const Preset& p : presets()) {
        const Config c = preset_config(p.name);
        EXPECT_NO_THROW(check_training(c)) << p.name;
        EXPECT_EQ(c.preset, p.name);
        EXPECT_TRUE(says(help_text(), {p.name}));
    }
    EXPECT_EQ(to_json(preset_config("tiny")), to_json(Config{}));
}

TEST(Presets, ThePublishedFormIsExact) {
    const Config c = preset_config("tau30m");
    EXPECT_EQ(c.layers, 6);
    EXPECT_EQ(c.heads, 6);
    EXPECT_EQ(c.channels, 384);
    EXPECT_EQ(c.vocab, 30522);
    EXPECT_EQ(c.scalar_kind, ScalarKind::energy);
    EXPECT_EQ(c.pattern, "s");
    EXPECT_EQ(c.temperature, Temperature::fixed);
    EXPECT_EQ(c.inverse_temperature, 1);
    const TauChoice tau = parse_tau(c.tau);
    EXPECT_FALSE(tau.measured || tau.learned);
    EXPECT_EQ(tau.value, 1);
    EXPECT_EQ(c.rope, Rotary::all);
    EXPECT_FALSE(c.gate || c.conv || c.tied);
    EXPECT_EQ(c.lr, 5e-4);
    EXPECT_EQ(c.warmup, 100);
    EXPECT_EQ(c.schedule, ScheduleKind::constant);
    // Two vocabulary matrices and 12 C^2 a layer: nothing else is trained.
    EXPECT_EQ(parameter_count(c), 2 * 30522 * 384 + 6 * 12 * 384 * 384);
}

TEST(Resume, GivenKnobsWinWhereTheyMay) {
    const Config saved = parse({"--preset", "small", "--layers", "4", "--lr", "0.1"}).config;
    const Config c = resume_config(saved, parse({"--resume", "--steps", "5000", "--out", "runs/x"}));
    EXPECT_EQ(c.layers, 4);
    EXPECT_EQ(c.lr, 0.1);
    EXPECT_EQ(c.steps, 5000);
    EXPECT_EQ(c.resume, "latest");
    EXPECT_EQ(run_folder(c), "runs/x");
    // The same model knobs may be given again; another may not.
    EXPECT_EQ(resume_config(saved, parse({"--resume", "--preset", "small", "--layers", "4"})).layers, 4);
    EXPECT_TRUE(says(refusal([&] {
                         resume_config(saved, parse({"--resume", "--layers", "8"}));
                     }),
                     {"layers", "8", "4"}));
    EXPECT_TRUE(says(refusal([&] { resume_config(saved, parse({"--resume", "--seed", "9"})); }), {"seed"}));
    EXPECT_EQ(run_folder(resume_config(saved, parse({"--resume", "runs/y/step_00000001"}))), "runs/small");
}

TEST(CheckTraining, NamesTheKnobAndTheMend) {
    Config c;
    c.batch_tokens = 1000;
    EXPECT_TRUE(says(refusal([&] { check_training(c); }), {"batch-tokens = 1000", "context = 256", "768", "1024"}));
    c = Config{};
    c.micro_batch = 3;
    EXPECT_TRUE(says(refusal([&] { check_training(c); }), {"micro-batch = 3", "16"}));
}

TEST(NearestName, IsNearOrNone) {
    EXPECT_EQ(nearest_name("learning-rate", {"lr", "layers"}), "");
    EXPECT_EQ(nearest_name("chanels", {"heads", "channels"}), "channels");
    EXPECT_EQ(nearest_name("batch_tokens", {"batch-tokens", "val-tokens"}), "batch-tokens");
}

}  // namespace
}  // namespace fiedler
