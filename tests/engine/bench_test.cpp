// Benchmarks: verdicts and figures, the clock of the stages, the step, and `fiedler bench` as a person runs it.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "engine/bench_step.h"
#include "kernels/profile.h"
#include "tests/bench/bench.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

bench::Result result_of(double us, double noise) {
    bench::Result r;
    r.machine = {"card", "1", "2"};
    bench::Row row;
    row.family = "norm", row.name = "forward", row.seconds = us * 1e-6, row.noise = noise;
    r.rows = {row};
    bench::StepRow step;
    step.name = "model", step.seconds = 2 * us * 1e-6, step.noise = noise;
    r.steps = {step};
    return r;
}

TEST(Bench, VerdictsFollowTheLargerNoiseButAtLeastOnePercent) {
    using bench::Verdict;
    const auto verdicts = [](double old_us, double old_noise, double us, double noise) {
        std::vector<Verdict> all;
        for (const bench::Comparison& c : bench::compare(to_json(result_of(old_us, old_noise)), result_of(us, noise)))
            all.push_back(c.verdict);
        return all;
    };
    const std::vector<Verdict> faster(2, Verdict::faster), same(2, Verdict::same), slower(2, Verdict::slower);
    EXPECT_EQ(verdicts(100, 0, 100, 0), same);
    EXPECT_EQ(verdicts(100, 0, 100.9, 0), same);
    EXPECT_EQ(verdicts(100, 0, 102, 0), slower);
    EXPECT_EQ(verdicts(102, 0, 100, 0), faster);
    EXPECT_EQ(verdicts(100, 0, 104, 0.05), same);
    EXPECT_EQ(verdicts(100, 0.05, 104, 0), same);
    EXPECT_EQ(verdicts(100, 0.05, 106, 0.01), slower);
}

TEST(Bench, RowsThatOnlyOneSideHasAreNotCompared) {
    bench::Result now = result_of(100, 0);
    now.rows[0].name = "backward";
    now.steps.clear();
    EXPECT_TRUE(bench::compare(to_json(result_of(100, 0)), now).empty());
    now = result_of(100, 0);
    now.rows[0].failure = "broke";
    EXPECT_EQ(bench::compare(to_json(result_of(100, 0)), now).size(), 1u);  // the step
    EXPECT_TRUE(now.failed());
    EXPECT_EQ(to_json(now).at("failed").at("norm/forward"), "broke");
    EXPECT_THROW(bench::compare(Json{{"bench", {{{"family", "norm"}}}}}, now), std::runtime_error);
    EXPECT_THROW(bench::compare(Json::array(), now), std::runtime_error);
}

// Mark i is at i * i seconds.
class SquareClock final : public MarkClock {
  public:
    bool mark(std::size_t i) override { return i == marks_++; }
    void wait() override { marks_ = 0; }
    double seconds_after(std::size_t i) override { return double(2 * i + 1); }

  private:
    std::size_t marks_ = 0;
};

TEST(Bench, StagesAreThoseOfTheInnermostRangeAndAddUp) {
    StageProfile profile(std::make_unique<SquareClock>());
    { const Range ignored("before"); }
    for (int step = 0; step < 2; ++step) {
        profile.begin_step();  // mark 0: outside
        {
            const Range a("a");      // mark 1
            { const Range b("b"); }  // marks 2 and 3
        }                            // mark 4
        { const Range b("b"); }      // marks 5 and 6
        profile.end_step();          // mark 7
    }
    { const Range ignored("after"); }
    std::map<std::string, std::pair<double, std::int64_t>> stages;
    double total = 0;
    for (const StageProfile::Stage& s : profile.stages()) stages[s.name] = {s.seconds, s.entered}, total += s.seconds;
    EXPECT_EQ(total, 49.0);
    const decltype(stages) expected{{"a", {3 + 7, 2}}, {"b", {5 + 11, 4}}, {StageProfile::kOutside, {1 + 9 + 13, 0}}};
    EXPECT_EQ(stages, expected);
    EXPECT_EQ(profile.stages()[0].name, StageProfile::kOutside);  // the longest first
}

TEST(Bench, StepMeasuresAModelOfEveryKind) {
    for (const char* pattern : {"sb", "d"}) {
        Config c;
        c.pattern = pattern, c.layers = 2, c.channels = 32, c.heads = 2, c.scalars = 4;
        c.vocab = 300, c.context = 32, c.batch_tokens = 128, c.spectral_dims = 8, c.device = DeviceChoice::cpu;
        bool timed = false;
        const bench::StepRow row = bench_step(
            c, DeviceKind::cpu, {3, true}, [&](const bench::StepRow& r) { timed = r.seconds > 0 && r.stages.empty(); });
        EXPECT_TRUE(timed);
        EXPECT_EQ(row.tokens, 128);
        EXPECT_EQ(row.steps, 3);
        EXPECT_EQ(row.cuda_graph, "off");
        EXPECT_GT(row.planned_bytes, 0);
        EXPECT_NEAR(row.tokens_per_second * row.seconds, 128, 1e-9);
        EXPECT_NEAR(row.share * row.peak_flops, row.tokens_per_second * row.flops_per_token, 1e-3 * row.peak_flops);
        EXPECT_LT(row.loss, std::log(300.0) + 1);
        double total = 0;
        std::set<std::string> names;
        for (const bench::Stage& s : row.stages) total += s.seconds, names.insert(s.name);
        EXPECT_NEAR(total, row.profiled_seconds, 1e-12);
        EXPECT_TRUE(names.count("adamw") && names.count("head") && names.count(*pattern == 'd' ? "dot" : "attention"));
        EXPECT_FALSE(row.kernels_note.empty());  // no CUDA kernels on a CPU, and it says so
    }
}

class BenchCommand : public CommandTest {
  protected:
    Outcome bench_run(Words words) const {
        words.insert(words.begin(), "bench");
        words.insert(words.end(), {"--device", "cpu"});
        return run(words);
    }
    Json json_of(const std::string& name) const { return Json::parse(slurp(path(name))); }
};

TEST_F(BenchCommand, MeasuresAFamilyAndComparesIt) {
    const Outcome o = bench_run({"gradnorm", "--samples", "3", "--json", "a.json"});
    ASSERT_EQ(o.code, 0) << o.err;
    for (const char* part : {"gradnorm", "% peak", "% copy", "a plain copy of the same bytes", "4090 model"})
        EXPECT_HAS(o.out, part);
    Json a = json_of("a.json");
    ASSERT_GE(a.at("bench").size(), 1u);
    for (const Json& row : a.at("bench")) {
        EXPECT_EQ(row.at("family"), "gradnorm");
        EXPECT_GT(row.at("bytes").get<double>(), 0);
        EXPECT_NEAR(row.at("gb_s").get<double>() * row.at("time_us").get<double>() * 1e3, row.at("bytes").get<double>(),
                    1e-4 * row.at("bytes").get<double>());
        EXPECT_GT(row.at("copy_us").get<double>(), 0);
        EXPECT_NEAR(row.at("share_of_copy").get<double>() * row.at("time_us").get<double>(),
                    row.at("copy_us").get<double>(), 1e-4 * row.at("copy_us").get<double>());
        EXPECT_TRUE(row.at("model_4090_us").is_null());  // says nothing on a CPU
    }
    for (Json& row : a.at("bench")) row["time_us"] = 1e-6;  // a card that nobody has
    world_.put("fast.json", a.dump());
    for (Json& row : a.at("bench")) row["time_us"] = 1e12;
    world_.put("slow.json", a.dump());
    const Words words = {"gradnorm", "--samples", "1", "--compare"};
    const auto compare = [&](const std::string& file, bool fail) {
        Words w = words;
        w.push_back(file);
        if (fail) w.push_back("--fail-on-slower");
        return bench_run(w);
    };
    EXPECT_EQ(compare("fast.json", true).code, 1);
    EXPECT_EQ(compare("slow.json", true).code, 0);
    const Outcome told = compare("fast.json", false);
    EXPECT_EQ(told.code, 0);
    EXPECT_HAS(told.out, "slower");
    EXPECT_HAS(told.out, "0 faster");
}

TEST_F(BenchCommand, MeasuresAStepOfTheGivenModel) {
    const Outcome o =
        bench_run({"step", "--pattern", "sd", "--layers", "2", "--channels", "32", "--heads", "2", "--vocab", "300",
                   "--context", "32", "--batch-tokens", "64", "--steps", "2", "--json=step.json"});
    ASSERT_EQ(o.code, 0) << o.err;
    for (const char* part : {"tokens/s", "attention", "dot", "memory:"}) EXPECT_HAS(o.out, part);
    const Json j = json_of("step.json");
    EXPECT_TRUE(j.at("bench").empty());
    ASSERT_EQ(j.at("steps").size(), 1u);
    const Json& step = j.at("steps")[0];
    EXPECT_HAS(step.at("name").get<std::string>(), "sd, 2 layers, C32 H2 V300 T32, 64 tokens");
    EXPECT_EQ(step.at("steps"), 2);
    double shares = 0;
    for (const Json& stage : step.at("stages")) shares += stage.at("share").get<double>();
    EXPECT_NEAR(shares, 1, 1e-4);
}

TEST_F(BenchCommand, RefusesWhatItCannotDoInOneLine) {
    world_.put("other.json", "{\"a\": 1}");
    world_.put("broken.json", "{");
    const std::vector<std::pair<Words, Words>> cases = {
        {{"atention"}, {"atention", "did you mean attention?"}},
        {{"norm", "--preset", "tiny"}, {"preset", "step"}},
        {{"norm", "--samples", "0"}, {"--samples", "1 to 100000"}},
        {{"norm", "--compare", "other.json"}, {"other.json", "not a result"}},
        {{"norm", "--compare", "broken.json"}, {"broken.json", "not JSON"}},
        {{"norm", "--compare", "missing.json"}, {"missing.json"}},
        {{"norm", "--json", "nowhere/a.json"}, {"nowhere"}},
        {{"step", "--heads", "5"}, {"heads"}},
        {{"step", "--lr", "1"}, {"lr", "other commands"}},
    };
    for (const auto& [words, parts] : cases) {
        SCOPED_TRACE(fmt::format("bench {}", fmt::join(words, " ")));
        const Outcome o = bench_run(words);
        EXPECT_EQ(o.code, 2) << o.out;
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
        for (const std::string& part : parts) EXPECT_HAS(o.err, part);
    }
    EXPECT_HAS(bench_run({"--list"}).out, "attention\n");
    EXPECT_HAS(bench_run({"--help"}).out, "--fail-on-slower");
}

}  // namespace
}  // namespace fiedler::test
