// tests/engine/command_run.h: the real binary as a child process, and a small world of files for it to work in.
#pragma once
#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "engine/json.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {

using Words = std::vector<std::string>;

struct Outcome {
    int code = -1;   // exit code, -1 when a signal ended the process
    int signal = 0;  // that signal
    std::string out, err;
};

// A process: its stdout and stderr go into files of its own.
class Child {
  public:
    Child(std::string program, Words words, const std::string& folder, rlim_t file_bytes = RLIM_INFINITY) {
        words.insert(words.begin(), program);
        std::vector<char*> arguments;
        for (std::string& w : words) arguments.push_back(w.data());
        arguments.push_back(nullptr);
        const std::string out = streams_ / "out", err = streams_ / "err";
        pid_ = ::fork();
        if (pid_ != 0) return;
        const rlimit limit{file_bytes, file_bytes};
        const bool ready = ::chdir(folder.c_str()) == 0 && ::setrlimit(RLIMIT_FSIZE, &limit) == 0 &&
                           ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT, 0644), 1) == 1 &&
                           ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0644), 2) == 2;
        ::setenv("OMP_WAIT_POLICY", "passive", 1);  // threads that spin while they wait starve the other tests
        if (ready) ::execvp(arguments[0], arguments.data());
        ::_exit(127);
    }
    ~Child() {
        if (pid_ > 0 && !ended_) {
            ::kill(pid_, SIGKILL);
            ::waitpid(pid_, nullptr, 0);
        }
    }
    Child(const Child&) = delete;
    Child& operator=(const Child&) = delete;

    void send(int signal) {
        if (running()) ::kill(pid_, signal);
    }
    bool running() {
        if (!ended_) ended_ = ::waitpid(pid_, &status_, WNOHANG) == pid_;
        return !ended_;
    }
    Outcome wait() {
        for (int i = 0; running(); ++i) {
            if (i == 60'000) {
                ADD_FAILURE() << "the process did not end within 2 minutes";
                ::kill(pid_, SIGKILL);
            }
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
        }
        Outcome o;
        if (WIFEXITED(status_)) o.code = WEXITSTATUS(status_);
        if (WIFSIGNALED(status_)) o.signal = WTERMSIG(status_);
        o.out = slurp(streams_ / "out");
        o.err = slurp(streams_ / "err");
        return o;
    }

  private:
    TempFolder streams_;
    pid_t pid_ = -1;
    int status_ = 0;
    bool ended_ = false;
};

// Every path below a folder, relative to it.
inline std::set<std::string> paths_below(const std::string& folder) {
    std::set<std::string> all;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
        all.insert(std::filesystem::relative(entry.path(), folder).string());
    return all;
}

// Functions of C with a small vocabulary of names: a tiny model learns it within a few dozen steps.
inline std::string c_text(int functions, std::uint64_t seed) {
    std::string text;
    std::uint64_t at = 0;
    const auto pick = [&](std::uint64_t n) { return rng::below(n, seed, 1, at++); };
    const auto name = [&] {
        const std::uint64_t id = pick(60);
        std::string n;
        for (std::uint64_t k = 0; k < 3 + id % 5; ++k) n += static_cast<char>('a' + rng::below(26, id, 2, k));
        return n;
    };
    for (int i = 0; i < functions; ++i) {
        const std::string f = name(), a = name(), b = name();
        text += "static int " + f + "(int " + a + ", int " + b + ") {\n    for (int i = 0; i < " + a +
                "; ++i) {\n        " + b + " += " + a + " * " + std::to_string(pick(100)) + ";\n    }\n    return " +
                b + ";\n}\n\n";
    }
    return text;
}

inline std::vector<Json> records_of(const std::string& log, const std::string& event = "") {
    std::ifstream in(log);
    std::vector<Json> all;
    for (std::string line; std::getline(in, line);) {
        const Json record = Json::parse(line, nullptr, false);
        if (record.is_discarded()) {
            ADD_FAILURE() << log << ": no JSON: " << line;
            continue;
        }
        if (event.empty() || record.at("event") == event) all.push_back(record);
    }
    return all;
}

// The number that follows the first `word` in a text.
inline double number_after(const std::string& text, const std::string& word) {
    const std::size_t at = text.find(word);
    EXPECT_NE(at, text.npos) << text;
    return at == text.npos ? -1 : std::stod(text.substr(at + word.size()));
}
// Bad input: one line with all of these, exit code 2.
inline void expect_refused(const Outcome& o, const Words& parts) {
    EXPECT_EQ(o.code, 2) << o.out;
    EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
    for (const std::string& part : parts) EXPECT_NE(o.err.find(part), o.err.npos) << part << "\nin: " << o.err;
}

using Knobs = std::map<std::string, std::string>;  // "" as the value: a flag without one

// A folder with a corpus of 200 KB, in which commands run. Paths in arguments are relative to it.
class CommandTest : public testing::Test {
  protected:
    void SetUp() override {
        for (int i = 0; i < 40; ++i)
            world_.put("corpus/f" + std::to_string(100 + i) + ".c", c_text(36, static_cast<std::uint64_t>(i)));
    }
    // The model of these tests: 2 layers, 32 channels, 2 heads, 8 sequences of 64 tokens a step, no samples.
    static Knobs tiny(const Knobs& changes = {}) {
        Knobs k = {{"vocab", "512"},  {"channels", "32"},      {"heads", "2"},    {"layers", "2"},
                   {"pattern", "sb"}, {"scalars", "4"},        {"context", "64"}, {"batch-tokens", "512"},
                   {"device", "cpu"}, {"data-cache", "cache"}, {"threads", "1"},  {"sample-every", "0"},
                   {"warmup", "10"}};
        for (const auto& [name, value] : changes) k[name] = value;
        return k;
    }
    static Words words_of(const std::string& command, const Knobs& knobs) {
        Words w = {command};
        for (const auto& [name, value] : knobs) {
            w.push_back("--" + name);
            if (!value.empty()) w.push_back(value);
        }
        return w;
    }
    Outcome run(const Words& words) const { return Child(FIEDLER_BINARY, words, world_.path()).wait(); }
    Outcome train(const std::string& out, const Knobs& changes = {}) const {
        Knobs k = tiny(changes);
        k["out"] = out;
        return run(words_of("train", k));
    }
    // Trains, and fails the test when that does not end well.
    void trained(const std::string& out, const Knobs& changes = {}) const {
        const Outcome o = train(out, changes);
        ASSERT_EQ(o.code, 0) << o.err;
        EXPECT_EQ(o.err, "");
    }
    // The folder of the corpus once prepared; made by the first call.
    const std::string& dataset() {
        if (dataset_.empty()) {
            const Outcome o = run({"prepare", "corpus", "--vocab", "512", "--data-cache", "cache"});
            EXPECT_EQ(o.code, 0) << o.err;
            const std::size_t at = o.out.find("dataset     ");
            if (at != o.out.npos) dataset_ = o.out.substr(at + 12, o.out.find('\n', at) - at - 12);
        }
        return dataset_;
    }
    std::string path(const std::string& name) const { return world_ / name; }
    Json end_of(const std::string& out) const {
        const auto all = records_of(path(out + "/log.jsonl"));
        EXPECT_FALSE(all.empty());
        if (all.empty()) return Json::object();
        EXPECT_EQ(all.back().at("event"), "end");
        return all.back();
    }
    std::vector<double> losses_of(const std::string& out) const {
        std::vector<double> losses;
        for (const Json& r : records_of(path(out + "/log.jsonl"), "step")) losses.push_back(r.at("loss"));
        return losses;
    }
    bool equal_files(const std::string& a, const std::string& b) const {
        const std::string bytes = slurp(path(a));
        return !bytes.empty() && bytes == slurp(path(b));
    }
    void expect_same_weights(const std::string& a, const std::string& b) const {
        EXPECT_TRUE(equal_files(a + "/weights.fdl", b + "/weights.fdl")) << a << " and " << b;
    }
    // Weights, moments and the exported model after `step` steps.
    void expect_same_end(const std::string& a, const std::string& b, int step) const {
        const std::string folder = fmt::format("/step_{:08}/", step);
        for (const char* file : {"master.bin", "moment1.bin", "moment2.bin"})
            EXPECT_TRUE(equal_files(a + folder + file, b + folder + file)) << a << " and " << b << ": " << file;
        expect_same_weights(a, b);
    }

    TempFolder world_;

  private:
    std::string dataset_;
};

}  // namespace fiedler::test
