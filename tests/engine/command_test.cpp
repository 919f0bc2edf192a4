// The real binary on a small corpus: what a run leaves behind, and what must not change its weights.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "engine/files.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

using CommandTrain = CommandTest;
using CommandSame = CommandTest;
using CommandResume = CommandTest;

// What stands behind a label of `eval`'s output.
std::string value_after(const std::string& text, const std::string& label) {
    const std::size_t at = text.find(label);
    if (at == text.npos) return "";
    const std::size_t first = text.find_first_not_of(' ', at + label.size());
    return text.substr(first, text.find_first_of(" \n", first) - first);
}

TEST_F(CommandTrain, MakesAModelAndEveryCommandReadsIt) {
    const Outcome o = train("run", {{"data", "corpus"},
                                    {"steps", "80"},
                                    {"val-every", "40"},
                                    {"checkpoint-every", "40"},
                                    {"sample-every", "40"},
                                    {"sample-tokens", "8"},
                                    {"price-per-hour", "2"}});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(o.err, "");
    EXPECT_HAS(o.out, "step 80/80");
    EXPECT_HAS(o.out, "validation loss");

    const Json end = end_of("run");
    for (const char* field :
         {"val_loss", "val_bits_per_byte", "unigram_entropy", "tokens_per_second", "device_hours", "cost"})
        EXPECT_GT(end.at(field).get<double>(), 0) << field;
    EXPECT_LT(end.at("val_loss").get<double>(), end.at("unigram_entropy").get<double>());
    EXPECT_EQ(end.at("steps"), 80);
    EXPECT_EQ(end.at("tokens"), 80 * 512);
    EXPECT_FALSE(end.at("stopped").get<bool>());
    EXPECT_HAS(end.at("device").get<std::string>(), "cpu");
    EXPECT_EQ(losses_of("run").size(), 80u);
    for (const char* made : {"checkpoint", "weights", "log"}) {
        EXPECT_TRUE(std::filesystem::exists(path(end.at(made)))) << made;
        EXPECT_HAS(o.out, end.at(made).get<std::string>());  // and its path is said
    }
    EXPECT_EQ(records_of(path("run/log.jsonl"), "sample").size(), 2u);

    // The held-out split once more, from each form of the model.
    for (const std::string& model :
         {std::string("run"), end.at("checkpoint").get<std::string>(), std::string("run/weights.fdl")}) {
        const Outcome e = run({"eval", model, "--data", dataset(), "--device", "cpu"});
        ASSERT_EQ(e.code, 0) << e.err;
        EXPECT_EQ(value_after(e.out, "validation loss"), fmt::format("{:.4f}", end.at("val_loss").get<double>()));
        EXPECT_EQ(value_after(e.out, "bits per byte"),
                  fmt::format("{:.4f}", end.at("val_bits_per_byte").get<double>()));
        EXPECT_EQ(value_after(e.out, "unigram entropy"),
                  fmt::format("{:.4f}", end.at("unigram_entropy").get<double>()));
    }
    const Outcome text = run({"eval", "run", "--data", "corpus/f100.c", "--device", "cpu", "--data-cache", "cache"});
    EXPECT_EQ(text.code, 0) << text.err;
    EXPECT_LT(std::stod(value_after(text.out, "validation loss")), std::stod(value_after(text.out, "unigram entropy")));

    // By position: the buckets' means are the whole's mean again; a plot is written.
    const Outcome buckets =
        run({"eval", "run", "--data", dataset(), "--device", "cpu", "--by-position", "--plot", "loss.svg"});
    ASSERT_EQ(buckets.code, 0) << buckets.err;
    EXPECT_EQ(value_after(buckets.out, "validation loss"), fmt::format("{:.4f}", end.at("val_loss").get<double>()));
    double sum = 0, tokens = 0;
    for (std::size_t at = 0; (at = buckets.out.find("after ", at)) != std::string::npos; ++at) {
        long long begin = 0, last = 0, count = 0;
        double loss = 0;
        ASSERT_EQ(std::sscanf(buckets.out.c_str() + at, "after %lld to %lld tokens: %lf nats (%lld", &begin, &last,
                              &loss, &count),
                  4);
        sum += loss * double(count), tokens += double(count);
    }
    EXPECT_GT(tokens, 0);
    EXPECT_NEAR(sum / tokens, end.at("val_loss").get<double>(), 2e-4);
    EXPECT_HAS(fiedler::read_file(path("loss.svg")), "</svg>");

    const Words generate = {"generate", "run",       "--sampling-temperature", "0", "--max-tokens", "40",
                            "--prompt", "static int"};
    const Outcome first = run(generate), second = run(generate);
    ASSERT_EQ(first.code, 0) << first.err;
    EXPECT_TRUE(first.out.starts_with("static int")) << first.out;
    EXPECT_GT(first.out.size(), 20u);
    EXPECT_EQ(first.out, second.out);

    for (const std::string& what : {std::string("run"), end.at("checkpoint").get<std::string>(),
                                    std::string("run/weights.fdl"), dataset(), dataset() + "/train_000000.bin"}) {
        const Outcome i = run({"inspect", what});
        EXPECT_EQ(i.code, 0) << what << ": " << i.err;
        EXPECT_HAS(i.out, "good");
    }
}

TEST_F(CommandTrain, NumPyReadsTheWeights) {
    if (std::system("python3 -c 'import numpy' 2>/dev/null") != 0) GTEST_SKIP() << "SKIPPED: python3 has no numpy here";
    ASSERT_NO_FATAL_FAILURE(trained("run", {{"data", dataset()}, {"steps", "3"}}));
    const Outcome o =
        Child("python3", {FIEDLER_SOURCE_DIR "/tools/read_fdl.py", "run/weights.fdl"}, world_.path()).wait();
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "embedding.weight");
    EXPECT_HAS(o.out, "(512, 32)");
}

TEST_F(CommandTrain, PlanPrintsTheTableWithoutTraining) {
    const auto before = paths_below(world_.path());
    for (const char* preset : {"tiny", "fiedler30m", "gpt30m", "tau30m"}) {
        const Outcome o = run({"plan", "--preset", preset, "--memory-budget", "24GiB"});
        EXPECT_EQ(o.code, 0) << o.err;
        EXPECT_HAS(o.out, "master");
        EXPECT_HAS(o.out, "parameters");
        EXPECT_HAS(o.out, "24.00 GiB");
    }
    EXPECT_EQ(paths_below(world_.path()), before);
}

TEST_F(CommandTrain, SchedulesEndWhereTheyShould) {
    for (const auto& [schedule, last] : {std::pair{"wsd", 0.1}, {"cosine", 0.1}, {"constant", 1.0}}) {
        ASSERT_NO_FATAL_FAILURE(trained(schedule, {{"data", dataset()},
                                                   {"steps", "12"},
                                                   {"warmup", "4"},
                                                   {"lr", "1e-3"},
                                                   {"min-lr-fraction", "0.1"},
                                                   {"schedule", schedule}}));
        const auto steps = records_of(path(schedule) + std::string("/log.jsonl"), "step");
        ASSERT_EQ(steps.size(), 12u);
        EXPECT_NEAR(steps[0].at("lr").get<double>(), 0.25e-3, 1e-9);
        EXPECT_NEAR(steps[3].at("lr").get<double>(), 1e-3, 1e-9);
        EXPECT_NEAR(steps[11].at("lr").get<double>(), last * 1e-3, 1e-9) << schedule;
    }
}

TEST_F(CommandTrain, NothingHeldOutTrainsWithoutValidation) {
    ASSERT_NO_FATAL_FAILURE(
        trained("run", {{"data", "corpus"}, {"steps", "3"}, {"val-every", "1"}, {"val-fraction", "0"}}));
    EXPECT_TRUE(end_of("run").at("val_loss").is_null());
    EXPECT_TRUE(records_of(path("run/log.jsonl"), "val").empty());
}

TEST_F(CommandTrain, RunsWithoutANameGetOneAndResumeFindsTheNewest) {
    Knobs k = tiny({{"data", dataset()}, {"steps", "3"}});
    ASSERT_EQ(run(words_of("train", k)).code, 0);
    ASSERT_EQ(run(words_of("train", k)).code, 0);
    const std::string first = slurp(path("runs/tiny/log.jsonl"));
    ASSERT_EQ(run({"train", "--resume", "--steps", "5", "--data", dataset()}).code, 0);
    EXPECT_EQ(end_of("runs/tiny-2").at("steps"), 5);
    EXPECT_EQ(slurp(path("runs/tiny/log.jsonl")), first);
    EXPECT_FALSE(std::filesystem::exists(path("runs/tiny-3")));
}

// ---- what must not change the weights

TEST_F(CommandSame, MicroBatchesGiveTheSameLosses) {
    ASSERT_NO_FATAL_FAILURE(trained("one", {{"data", dataset()}, {"steps", "30"}, {"micro-batch", "1"}}));
    ASSERT_NO_FATAL_FAILURE(trained("four", {{"data", dataset()}, {"steps", "30"}, {"micro-batch", "4"}}));
    const auto one = losses_of("one"), four = losses_of("four");
    ASSERT_EQ(one.size(), 30u);
    ASSERT_EQ(four.size(), 30u);
    for (std::size_t i = 0; i < one.size(); ++i) {
        ASSERT_TRUE(std::isfinite(one[i]));
        EXPECT_NEAR(one[i], four[i], 1e-4 * one[i]) << "step " << i + 1;
    }
    EXPECT_LT(one.back(), one.front() - 0.5);
}

TEST_F(CommandSame, ThreadsGiveTheSameBits) {
    for (const char* threads : {"1", "2"})
        ASSERT_NO_FATAL_FAILURE(trained(threads, {{"data", dataset()},
                                                  {"steps", "20"},
                                                  {"threads", threads},
                                                  {"pattern", "sbd"},
                                                  {"layers", "3"},
                                                  {"micro-batch", "4"}}));
    expect_same_weights("1", "2");
}

TEST_F(CommandSame, RecomputationGivesTheSameBits) {
    for (const char* kind : {"coordinate", "energy"}) {
        for (const char* level : {"none", "mlp", "layer"})
            ASSERT_NO_FATAL_FAILURE(trained(kind + std::string(level), {{"data", dataset()},
                                                                        {"steps", "20"},
                                                                        {"recompute", level},
                                                                        {"pattern", "sbd"},
                                                                        {"layers", "3"},
                                                                        {"scalar-kind", kind},
                                                                        {"micro-batch", "8"}}));
        expect_same_weights(kind + std::string("none"), kind + std::string("mlp"));
        expect_same_weights(kind + std::string("none"), kind + std::string("layer"));
    }
    EXPECT_FALSE(equal_files("coordinatenone/weights.fdl", "energynone/weights.fdl"));  // the comparison can fail
}

TEST_F(CommandSame, DocumentMaskTrainsAnotherModel) {
    for (const char* mask : {"true", "false"})
        ASSERT_NO_FATAL_FAILURE(
            trained(mask, {{"data", dataset()}, {"steps", "30"}, {std::string("document-mask=") + mask, ""}}));
    const auto with = losses_of("true"), without = losses_of("false");
    ASSERT_EQ(with.size(), 30u);
    EXPECT_LT(with.back(), with.front() - 0.5);
    EXPECT_NE(with, without);
}

TEST_F(CommandSame, ConfigTomlRepeatsTheRun) {
    ASSERT_NO_FATAL_FAILURE(trained("first", {{"data", dataset()},
                                              {"steps", "12"},
                                              {"lr", "1.7e-3"},
                                              {"seed", "5"},
                                              {"scalar-kind", "energy"},
                                              {"clip", "0.5"}}));
    const Outcome o = run({"train", "--config", "first/config.toml", "--out", "second"});
    ASSERT_EQ(o.code, 0) << o.err;
    expect_same_end("first", "second", 12);
    // A resumed run's config.toml starts the run anew, too.
    ASSERT_EQ(run({"train", "--resume", "second", "--steps", "12"}).code, 0);
    const Outcome again = run({"train", "--config", "second/config.toml", "--out", "third"});
    ASSERT_EQ(again.code, 0) << again.err;
    expect_same_end("first", "third", 12);
}

// ---- resume

int steps_in_log(const std::string& log) {
    const std::string text = slurp(log);
    int n = 0;
    for (std::size_t at = 0; (at = text.find("\"event\":\"step\"", at)) != text.npos; ++at) ++n;
    return n;
}

// Trains `steps` in one go and once more with a signal after a few steps: both end bit-equal.
class CommandStopped : public CommandTest {
  protected:
    void stop_and_resume(const Knobs& model, int signal) {
        constexpr int kSteps = 200;
        Knobs k = model;
        k["data"] = dataset();
        k["steps"] = std::to_string(kSteps);
        k["checkpoint-every"] = "60";
        ASSERT_NO_FATAL_FAILURE(trained("whole", k));
        Json stopped;
        for (int attempt = 0; attempt < 8 && stopped.is_null();
             ++attempt) {  // a busy machine may let the run end first
            std::filesystem::remove_all(path("parts"));
            ASSERT_NO_FATAL_FAILURE(stop(k, signal, stopped));
        }
        ASSERT_FALSE(stopped.is_null()) << "the signal never came before the end";
        const int at = stopped.at("steps");
        SCOPED_TRACE(fmt::format("stopped after step {}", at));
        EXPECT_GE(at, 3);
        EXPECT_TRUE(std::filesystem::exists(path(fmt::format("parts/step_{:08}/manifest.json", at))));
        EXPECT_FALSE(equal_files("whole/weights.fdl", "parts/weights.fdl"));
        const Outcome o = run({"train", "--resume", "--out", "parts"});
        ASSERT_EQ(o.code, 0) << o.err;
        EXPECT_EQ(end_of("parts").at("tokens"), end_of("whole").at("tokens"));
        EXPECT_EQ(end_of("parts").at("val_loss"), end_of("whole").at("val_loss"));
        expect_same_end("whole", "parts", kSteps);
    }

  private:
    void stop(Knobs k, int signal, Json& stopped) {
        k = tiny(k);
        k["out"] = "parts";
        const int wanted = 3 + static_cast<int>(std::random_device()() % 60);
        Child child(FIEDLER_BINARY, words_of("train", k), world_.path());
        while (child.running() && steps_in_log(path("parts/log.jsonl")) < wanted)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        child.send(signal);
        const Outcome o = child.wait();
        ASSERT_EQ(o.code, 0) << o.err;
        EXPECT_EQ(o.err, "");
        const Json end = end_of("parts");
        if (end.at("stopped").get<bool>()) stopped = end;
    }
};

TEST_F(CommandStopped, ByInterruptGoesOnBitEqual) { stop_and_resume({{"pattern", "sbd"}, {"layers", "3"}}, SIGINT); }
TEST_F(CommandStopped, EnergiesWithDocumentMaskGoOnBitEqual) {
    stop_and_resume({{"pattern", "sb"}, {"scalar-kind", "energy"}, {"document-mask", ""}, {"skip-outliers", "6"}},
                    SIGTERM);
}

std::vector<std::string> complete_checkpoints(const std::string& run) {
    std::vector<std::string> all;
    for (const auto& entry : std::filesystem::directory_iterator(run))
        if (std::filesystem::exists(entry.path() / "manifest.json") &&
            entry.path().filename().string().starts_with("step_"))
            all.push_back(entry.path().filename().string());
    std::sort(all.begin(), all.end());
    return all;
}

TEST_F(CommandResume, KilledWhileCheckpointsAreWrittenGoesOnBitEqual) {
    constexpr int kSteps = 120, kKills = 8;
    const Knobs k = {{"data", dataset()},
                     {"steps", std::to_string(kSteps)},
                     {"checkpoint-every", "1"},
                     {"keep", "2"},
                     {"val-every", "0"}};
    ASSERT_NO_FATAL_FAILURE(
        trained("whole", {{"data", dataset()}, {"steps", std::to_string(kSteps)}, {"val-every", "0"}}));
    std::mt19937 random(std::random_device{}());
    std::string trace;
    bool begun = false;
    for (int kill = 0; kill < kKills; ++kill) {
        Knobs all = tiny(k);
        all["out"] = "killed";
        const int before = steps_in_log(path("killed/log.jsonl"));
        Child child(FIEDLER_BINARY, begun ? Words{"train", "--resume", "--out", "killed"} : words_of("train", all),
                    world_.path());
        while (child.running() && steps_in_log(path("killed/log.jsonl")) < before + 3)
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 20'000));
        child.send(SIGKILL);
        const Outcome o = child.wait();
        ASSERT_TRUE(o.signal == SIGKILL || o.code == 0) << o.err;
        begun = true;
        const auto complete = complete_checkpoints(path("killed"));
        trace += fmt::format("{} ", complete.empty() ? "none" : complete.back());
        ASSERT_FALSE(complete.empty()) << trace;
    }
    SCOPED_TRACE(trace);
    const Outcome o = run({"train", "--resume", "--out", "killed"});
    ASSERT_EQ(o.code, 0) << o.err;
    expect_same_end("whole", "killed", kSteps);
    EXPECT_EQ(complete_checkpoints(path("killed")).size(), 2u);
    for (const auto& entry : paths_below(path("killed")))
        EXPECT_EQ(entry.find("partial"), entry.npos) << entry << " was left behind";
}

TEST_F(CommandResume, DamagedCheckpointGivesWayToTheOneBefore) {
    const Knobs k = {{"data", dataset()}, {"steps", "30"}, {"checkpoint-every", "10"}, {"keep", "3"}};
    ASSERT_NO_FATAL_FAILURE(trained("whole", k));
    for (const char* damage : {"truncated", "flipped", "no manifest"}) {
        std::filesystem::remove_all(path("run"));
        std::filesystem::copy(path("whole"), path("run"), std::filesystem::copy_options::recursive);
        const std::string newest = path("run/step_00000030/");
        std::string bytes = slurp(newest + "moment1.bin");
        if (damage == std::string("truncated")) bytes.resize(bytes.size() / 2);
        if (damage == std::string("flipped")) bytes[bytes.size() / 3] ^= 1;
        world_.put("run/step_00000030/moment1.bin", bytes);
        if (damage == std::string("no manifest")) std::filesystem::remove(newest + "manifest.json");
        const Outcome o = run({"train", "--resume", "run"});
        ASSERT_EQ(o.code, 0) << damage << ": " << o.err;
        EXPECT_HAS(o.err, "step_00000030");  // it is said
        EXPECT_HAS(o.out, "step_00000020 at step 20");
        expect_same_end("whole", "run", 30);
    }
}

TEST_F(CommandResume, AFinishedRunGoesOnToMoreSteps) {
    ASSERT_NO_FATAL_FAILURE(trained("whole", {{"data", dataset()}, {"steps", "30"}, {"schedule", "constant"}}));
    ASSERT_NO_FATAL_FAILURE(trained("run", {{"data", dataset()}, {"steps", "10"}, {"schedule", "constant"}}));
    ASSERT_EQ(run({"train", "--resume", "run/step_00000010/", "--steps", "30"}).code, 0);
    expect_same_end("whole", "run", 30);
}

}  // namespace
}  // namespace fiedler::test
