// `fiedler quantize`, and the commands that use what it makes.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

using CommandQuantize = CommandTest;

double number_after(const std::string& text, const std::string& label) {
    const std::size_t at = text.find(label);
    return at == text.npos ? std::nan("") : std::stod(text.substr(at + label.size()));
}

TEST_F(CommandQuantize, MakesAFileThatGeneratesAndIsEvaluated) {
    trained("run", {{"data", "corpus"}, {"steps", "60"}, {"channels", "64"}, {"val-every", "0"}});
    const Words data = {"--data", dataset(), "--device", "cpu"};
    const auto loss_of = [&](Words words) {
        words.insert(words.begin(), "eval");
        words.insert(words.end(), data.begin(), data.end());
        const Outcome o = run(words);
        EXPECT_EQ(o.code, 0) << o.err;
        return number_after(o.out, "validation loss");
    };
    const double before = loss_of({"run"});
    for (const auto& [bits, most, share] : {std::tuple{"int8", 0.01, 0.4}, {"int4", 0.2, 0.3}}) {
        SCOPED_TRACE(bits);
        const std::string file = std::string(bits) + ".fdl";
        const Outcome o =
            run({"quantize", "run", "--bits", bits, "--out", file, "--eval", dataset(), "--device", "cpu"});
        ASSERT_EQ(o.code, 0) << o.err;
        EXPECT_HAS(o.out, bits == std::string("int8") ? "q8" : "q4");
        EXPECT_HAS(o.out, "embedding.weight");
        EXPECT_NEAR(number_after(o.out, "before "), before, 6e-5);
        const double after = number_after(o.out, "after ");
        EXPECT_LT(std::abs(after - before), most);
        EXPECT_NEAR(loss_of({file}), after, 6e-5);  // by the runtime
        EXPECT_NEAR(loss_of({file, "--cache", "int8"}), after, 0.02);
        EXPECT_LT(double(std::filesystem::file_size(path(file))),
                  share * double(std::filesystem::file_size(path("run/weights.fdl"))));
        const Words generate = {
            "generate", file, "--prompt", "static int", "--max-tokens", "20", "--sampling-temperature", "0"};
        const Outcome text = run(generate), again = run(generate);
        ASSERT_EQ(text.code, 0) << text.err;
        EXPECT_HAS(text.err, "cpu runtime");
        EXPECT_TRUE(text.out.starts_with("static int")) << text.out;
        EXPECT_EQ(text.out, again.out);
        const Outcome i = run({"inspect", file});
        EXPECT_EQ(i.code, 0) << i.err;
        EXPECT_HAS(i.out, "% of a key-value cache's");
        EXPECT_EQ(i.out.find("NOT FINITE"), std::string::npos);
    }
    // Unquantised weights by the runtime: the engine's loss.
    EXPECT_NEAR(loss_of({"run", "--runtime", "--cache", "exact"}), before, 1.01e-4);
}

TEST_F(CommandQuantize, SaysWhatIsWrong) {
    trained("run", {{"data", "corpus"}, {"steps", "1"}});
    const auto refused = [&](const Words& words, const std::string& what) {
        const Outcome o = run(words);
        EXPECT_EQ(o.code, 2) << o.err;
        EXPECT_HAS(o.err, what);
    };
    refused({"quantize", "run"}, "out: name the file");
    refused({"quantize", "run", "--bits", "int3", "--out", "x.fdl"}, "int3");
    refused({"quantize", "nothing", "--out", "x.fdl"}, "there is no such model");
    refused({"generate", "run/step_00000001", "--runtime"}, "takes a .fdl file");
    refused({"bench", "infer"}, "name a model");
    refused({"bench", "infer", "run", "--forms", "int9"}, "int9");
    refused({"bench", "infer", "run", "--threads", "many"}, "many");
    EXPECT_FALSE(std::filesystem::exists(path("x.fdl")));
}

TEST_F(CommandQuantize, BenchInferMeasuresEveryForm) {
    trained("run", {{"data", "corpus"}, {"steps", "1"}});
    const Outcome o =
        run({"bench", "infer", "run", "--tokens", "8", "--prompt-tokens", "5", "--runs", "1", "--json", "b.json"});
    ASSERT_EQ(o.code, 0) << o.err;
    const Json all = Json::parse(slurp(path("b.json")));
    ASSERT_EQ(all.at("rows").size(), 4u);
    for (const Json& row : all.at("rows")) {
        EXPECT_GT(row.at("tokens_per_second").get<double>(), 0);
        EXPECT_GT(row.at("first_token_seconds").get<double>(), 0);
        EXPECT_GT(row.at("memory_bytes").get<double>(), row.at("file_bytes").get<double>());
    }
    EXPECT_EQ(run({"bench", "infer", "--help"}).code, 0);
}

}  // namespace
}  // namespace fiedler::test
