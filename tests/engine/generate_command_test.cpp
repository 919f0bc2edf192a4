// `fiedler generate` of many texts: the texts of one at a time, in the order of the prompts, as lines of JSON; formats of
// prompt files and what is wrong with them.
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

class CommandGenerate : public CommandTest {
  protected:
    // A model that has learned enough for its texts to differ from prompt to prompt.
    void make_model() { ASSERT_NO_FATAL_FAILURE(trained("run", {{"data", dataset()}, {"steps", "60"}})); }
    Outcome generate(const Words& more) const {
        Words words = {"generate", "run", "--device", "cpu", "--threads", "2", "--max-tokens", "24"};
        words.insert(words.end(), more.begin(), more.end());
        return run(words);
    }
    static std::vector<Json> lines_of(const std::string& text) {
        std::vector<Json> all;
        std::istringstream in(text);
        for (std::string line; std::getline(in, line);) all.push_back(Json::parse(line));
        return all;
    }
    static std::vector<std::string> texts_of(const std::vector<Json>& lines) {
        std::vector<std::string> texts;
        for (const Json& l : lines) texts.push_back(l.at("text"));
        return texts;
    }
    void refused(const Words& more, const std::vector<std::string>& parts) const {
        const Outcome o = generate(more);
        EXPECT_EQ(o.code, 2) << o.out;
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
        for (const std::string& part : parts) EXPECT_NE(o.err.find(part), std::string::npos) << o.err;
    }
};

const std::vector<std::string> kPrompts = {"static int", "", "for (int i = 0", "return", "int", "}\n", "x", "    "};

std::string as_json_lines() {
    std::string text;
    for (std::size_t i = 0; i < kPrompts.size(); ++i)
        text += Json{{"id", i * 10}, {"prompt", kPrompts[i]}}.dump() + (i == 3 ? "\n\n" : "\n");
    return text;
}

TEST_F(CommandGenerate, ManyPromptsGiveTheTextsOfEachAlone) {
    ASSERT_NO_FATAL_FAILURE(make_model());
    world_.put("many.jsonl", as_json_lines());
    const Words greedy = {"--prompt-file", "many.jsonl", "--sampling-temperature", "0", "--batch"};
    const auto with = [](Words words, const Words& more) {
        words.insert(words.end(), more.begin(), more.end());
        return words;
    };
    const Outcome o = generate(with(greedy, {"3"}));
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_NE(o.err.find("[8 texts, "), std::string::npos) << o.err;
    EXPECT_NE(o.err.find("first token after "), std::string::npos) << o.err;
    EXPECT_NE(o.err.find("; 3 at once"), std::string::npos) << o.err;
    const std::vector<Json> lines = lines_of(o.out);
    ASSERT_EQ(lines.size(), kPrompts.size());
    for (std::size_t i = 0; i < lines.size(); ++i) {
        EXPECT_EQ(lines[i].at("index"), i);
        EXPECT_EQ(lines[i].at("id"), i * 10);
        EXPECT_EQ(lines[i].at("prompt"), kPrompts[i]);
        const std::size_t tokens = lines[i].at("tokens").size();
        EXPECT_EQ(lines[i].at("end"), tokens == 24 ? "length" : "stop");
        const Outcome alone = generate({"--prompt", kPrompts[i], "--sampling-temperature", "0"});
        ASSERT_EQ(alone.code, 0) << alone.err;
        EXPECT_EQ(kPrompts[i] + lines[i].at("text").get<std::string>() + "\n", alone.out) << i;
    }
    // The same text, whatever is beside it, in a file as at the terminal.
    for (const char* batch : {"1", "5", "0"}) {
        const Outcome other = generate(with(greedy, {batch, "--out", "texts.jsonl"}));
        ASSERT_EQ(other.code, 0) << other.err;
        EXPECT_EQ(other.out, "");
        EXPECT_EQ(texts_of(lines_of(slurp(path("texts.jsonl")))), texts_of(lines)) << batch;
    }
}

TEST_F(CommandGenerate, SamplesAndFormats) {
    ASSERT_NO_FATAL_FAILURE(make_model());
    // Sample i has the seed of --seed and i, with others or without.
    const Outcome three = generate({"--prompt", "static", "--count", "3", "--seed", "5", "--top-k", "40"});
    ASSERT_EQ(three.code, 0) << three.err;
    std::string each;
    for (const char* seed : {"5", "6", "7"}) {
        const Outcome one = generate({"--prompt", "static", "--batch", "1", "--seed", seed, "--top-k", "40"});
        ASSERT_EQ(one.code, 0) << one.err;
        each += one.out;
    }
    EXPECT_EQ(three.out, each);

    world_.put("lines.txt", "static int\r\n\nreturn");
    const Outcome lines = generate({"--prompt-file", "lines.txt", "--prompt-format", "lines", "--count", "2"});
    ASSERT_EQ(lines.code, 0) << lines.err;
    std::vector<std::pair<int, int>> numbers;
    std::vector<std::string> prompts;
    for (const Json& l : lines_of(lines.out)) {
        numbers.emplace_back(l.at("index"), l.at("sample"));
        prompts.push_back(l.at("prompt"));
    }
    EXPECT_EQ(numbers, (std::vector<std::pair<int, int>>{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {2, 0}, {2, 1}}));
    EXPECT_EQ(prompts, (std::vector<std::string>{"static int", "static int", "", "", "return", "return"}));
    // A file is one prompt, as ever, unless it says otherwise.
    const Outcome whole = generate({"--prompt-file", "lines.txt"});
    ASSERT_EQ(whole.code, 0) << whole.err;
    EXPECT_TRUE(whole.out.starts_with("static int\r\n\nreturn")) << whole.out;

    // The CPU runtime goes through the prompts one after another.
    ASSERT_EQ(run({"export", "run", "--dtype", "f32", "--out", "f32.fdl"}).code, 0);
    world_.put("many.jsonl", as_json_lines());
    const Words greedy = {"--prompt-file", "many.jsonl", "--sampling-temperature", "0", "--max-tokens", "12"};
    Words by_runtime = {"generate", "f32.fdl", "--runtime", "--cache", "exact"},
          by_engine = {"generate", "run", "--device", "cpu"};
    by_runtime.insert(by_runtime.end(), greedy.begin(), greedy.end());
    by_engine.insert(by_engine.end(), greedy.begin(), greedy.end());
    const Outcome runtime = run(by_runtime), engine = run(by_engine);
    ASSERT_EQ(runtime.code, 0) << runtime.err;
    EXPECT_EQ(texts_of(lines_of(runtime.out)), texts_of(lines_of(engine.out)));
    EXPECT_NE(runtime.err.find("; 1 at once"), std::string::npos) << runtime.err;

    // What is wrong is said in a line, and nothing is written.
    std::string words;
    for (int i = 0; i < 200; ++i) words += "static ";
    world_.put("long.jsonl", "{\"prompt\": \"static\"}\n{\"prompt\": \"" + words + "\"}\n");
    refused({"--prompt-file", "long.jsonl", "--out", "never.jsonl"}, {"long.jsonl, line 2", "context of 64"});
    world_.put("bad.jsonl", "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n");
    refused({"--prompt-file", "bad.jsonl", "--out", "never.jsonl"}, {"bad.jsonl, line 2", "\"prompt\""});
    world_.put("bad.jsonl", "{\"prompt\": 3}\n");
    refused({"--prompt-file", "bad.jsonl"}, {"bad.jsonl, line 1"});
    world_.put("bad.jsonl", "\n \n");
    refused({"--prompt-file", "bad.jsonl"}, {"bad.jsonl: has no prompts"});
    refused({"--prompt-file", "lines.txt", "--prompt", "a"}, {"prompt: give --prompt or --prompt-file"});
    refused({"--prompt", "a", "--prompt-format", "lines"}, {"prompt-format"});
    refused({"--prompt-file", "many.jsonl", "--batch", "1000", "--memory-budget", "2MiB", "--out", "never.jsonl"},
            {"batch: 1000 texts", "--batch ", "would fit"});
    EXPECT_FALSE(std::filesystem::exists(path("never.jsonl")));
}

TEST_F(CommandGenerate, StopsWithWhatItHas) {
    ASSERT_NO_FATAL_FAILURE(make_model());
    Child child(FIEDLER_BINARY,
                {"generate", "run", "--device", "cpu", "--prompt", "static", "--count", "3", "--max-tokens", "30000",
                 "--out", "texts.jsonl"},
                world_.path());
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    child.send(SIGINT);
    const Outcome o = child.wait();
    EXPECT_EQ(o.code, 0) << o.err;
    const std::vector<Json> lines = lines_of(slurp(path("texts.jsonl")));
    ASSERT_EQ(lines.size(), 3u);
    for (const Json& l : lines) EXPECT_TRUE(l.at("end") == "interrupted" || l.at("end") == "stop") << l;
}

}  // namespace
}  // namespace fiedler::test
