// tests/engine/sample_command_test.cpp: `fiedler train --task nodes`, eval and predict as a person runs them; the files
// of features; metrics by hand.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "engine/error.h"
#include "engine/feature_files.h"
#include "engine/sample_metrics.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

constexpr int kNodes = 60, kClasses = 3, kFeatures = 12;

// Three communities: nodes of one class share neighbours and features, with exceptions.
struct Communities {
    std::string edges, features, labels, split;
    Communities() {
        std::uint64_t at = 0;
        const auto draw = [&] { return rng::uniform(7, 7, at++); };
        int entries = 0;
        std::string rows;
        for (int i = 0; i < kNodes; ++i) {
            const int c = i % kClasses;
            labels += fmt::format("{}\n", c == 0 ? "red" : c == 1 ? "green" : "blue");
            split += fmt::format("{}\n", i < 15 ? "train" : i < 35 ? "val" : i < 58 ? "test" : "none");
            for (int j = 0; j < i; ++j)
                if (draw() < (j % kClasses == c ? 0.25 : 0.02)) edges += fmt::format("{}\t{}\n", j, i);
            std::string row;
            for (int f = 0; f < kFeatures; ++f)
                if (draw() < (f % kClasses == c ? 0.6 : 0.2))
                    row += fmt::format("{}{}:1", row.empty() ? "" : " ", f), ++entries;
            rows += row + "\n";
        }
        features = fmt::format("{} {} {}\n", kNodes, kFeatures, entries) + rows;
    }
};

class SampleCommand : public CommandTest {
  protected:
    void SetUp() override {
        const Communities c;
        world_.put("c.edges", c.edges);
        world_.put("c.features", c.features);
        world_.put("c.labels", c.labels);
        world_.put("c.split", c.split);
    }
    static Knobs nodes(const Knobs& changes = {}) {
        Knobs k = {{"task", "nodes"},
                   {"graph", "c.edges"},
                   {"features", "c.features"},
                   {"node-labels", "c.labels"},
                   {"split", "c.split"},
                   {"channels", "32"},
                   {"heads", "2"},
                   {"layers", "1"},
                   {"pattern", "s"},
                   {"device", "cpu"},
                   {"threads", "1"},
                   {"steps", "12"},
                   {"lr", "1e-2"},
                   {"warmup", "1"},
                   {"schedule", "constant"},
                   {"val-every", "1"},
                   {"dropout", "0.2"},
                   {"input-hops", "2"},
                   {"spectral-dims", "4"},
                   {"input-dropout", "0.2"},
                   {"checkpoint-every", "0"}};
        for (const auto& [name, value] : changes)
            if (value == "-")
                k.erase(name);
            else
                k[name] = value;
        return k;
    }
    Outcome train_nodes(const std::string& out, Knobs changes = {}) const {
        changes["out"] = out;
        return run(words_of("train", nodes(changes)));
    }
    void trained_nodes(const std::string& out, const Knobs& changes = {}) const {
        const Outcome o = train_nodes(out, changes);
        ASSERT_EQ(o.code, 0) << o.err;
        EXPECT_EQ(o.err, "");
    }
    std::string predictions(const std::string& model, Words more = {}) const {
        Words w = {"predict", model, "--out", "p.csv", "--device", "cpu", "--threads", "1"};
        w.insert(w.end(), more.begin(), more.end());
        const Outcome o = run(w);
        EXPECT_EQ(o.code, 0) << o.err;
        return slurp(path("p.csv"));
    }
    // One line, exit code 2, and the world is as it was before.
    void refused(const Words& words, const Words& parts) const {
        SCOPED_TRACE(fmt::format("{}", fmt::join(words, " ")));
        const auto before = paths_below(world_.path());
        const Outcome o = run(words);
        EXPECT_EQ(o.code, 2) << o.out << o.err;
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
        for (const std::string& part : parts) EXPECT_HAS(o.err, part);
        EXPECT_EQ(paths_below(world_.path()), before);
    }
    void train_refused(Knobs changes, const Words& parts) const {
        changes["out"] = "refused";
        refused(words_of("train", nodes(changes)), parts);
    }
};

std::vector<std::string> lines_of(const std::string& text) {
    std::vector<std::string> all;
    std::istringstream in(text);
    for (std::string line; std::getline(in, line);) all.push_back(line);
    return all;
}

TEST_F(SampleCommand, LearnsEvaluatesAndPredicts) {
    trained_nodes("run", {{"steps", "40"}});
    const Json end = end_of("run");
    EXPECT_GT(end.at("test").at("accuracy").get<double>(), 0.8);
    EXPECT_EQ(end.at("test").at("known"), 23);
    EXPECT_EQ(end.at("test").at("classes"), (Json{"blue", "green", "red"}));
    const Outcome e = run({"eval", "run", "--device", "cpu", "--threads", "1"});
    EXPECT_EQ(e.code, 0) << e.err;
    const Json same = Json::parse(run({"eval", "run", "--device", "cpu", "--threads", "1", "--json"}).out);
    EXPECT_HAS(e.out, fmt::format("{:.4f}", same.at("macro_f1").get<double>()));
    EXPECT_GT(same.at("targets"), 0);
    expect_refused(run({"eval", "run", "--device", "cpu", "--contexts", "16"}), {"contexts: run is no model of text"});
    EXPECT_HAS(e.out, fmt::format("accuracy           {:.4f}", end.at("test").at("accuracy").get<double>()));
    const auto lines = lines_of(predictions("run"));
    ASSERT_EQ(lines.size(), static_cast<std::size_t>(kNodes + 1));
    EXPECT_EQ(lines[0], "id,prediction,p_blue,p_green,p_red");
    int right = 0;
    for (int i = 35; i < 58; ++i) {
        const std::string expected = i % 3 == 0 ? "red" : i % 3 == 1 ? "green" : "blue";
        right += lines[static_cast<std::size_t>(i + 1)].starts_with(fmt::format("{},{},", i, expected));
    }
    EXPECT_NEAR(right / 23.0, end.at("test").at("accuracy").get<double>(), 1e-9);
    double sum = 0;
    for (std::size_t k = 0, from = lines[1].find(',', lines[1].find(',') + 1); k < 3;
         ++k, from = lines[1].find(',', from + 1))
        sum += std::stod(lines[1].substr(from + 1));
    EXPECT_NEAR(sum, 1, 1e-4);
}

TEST_F(SampleCommand, PredictsOtherNodesFromOtherFiles) {
    trained_nodes("run", {{"spectral-dims", "0"}});
    world_.put("new.edges", "a b\nb c\n");
    world_.put("new.features", "3 12 2\n0:1\n1:1\n\n");
    const Words files = {"--graph", "new.edges", "--features", "new.features"};
    const auto lines =
        lines_of(predictions("run", {"--graph", "new.edges", "--features", "new.features", "--ids", "names"}));
    ASSERT_EQ(lines.size(), 4u);
    EXPECT_TRUE(lines[1].starts_with("a,")) << lines[1];
    EXPECT_TRUE(lines[3].starts_with("c,")) << lines[3];
    world_.put("new.labels", "red\ngreen\nviolet\n");
    refused({"eval", "run", "--graph", "new.edges", "--features", "new.features", "--ids", "names", "--node-labels",
             "new.labels"},
            {"new.labels", "'violet'", "blue, green, red"});
    refused({"eval", "run", "--graph", "new.edges", "--features", "new.features", "--ids", "names"},
            {"no target is known"});
    world_.put("wide.features", "3 13 1\n12:1\n\n\n");
    refused(
        {"predict", "run", "--graph", "new.edges", "--features", "wide.features", "--ids", "names", "--out", "q.csv"},
        {"wide.features", "13 columns", "12"});
}

TEST_F(SampleCommand, ResumedRunsEndAsIfTheyHadNeverStopped) {
    trained_nodes("straight");
    trained_nodes("halves", {{"steps", "5"}});
    const Outcome o = run({"train", "--resume", "--out", "halves", "--steps", "12", "--device", "cpu"});
    ASSERT_EQ(o.code, 0) << o.err;
    for (const char* block : {"master.bin", "moment1.bin", "moment2.bin", "best.bin"})
        EXPECT_TRUE(
            equal_files(std::string("straight/step_00000012/") + block, std::string("halves/step_00000012/") + block))
            << block;
    EXPECT_EQ(predictions("straight"), predictions("halves"));
    EXPECT_EQ(end_of("straight").at("test"), end_of("halves").at("test"));
    world_.put("c.labels", Communities().labels.replace(0, 3, "blue"));
    refused({"train", "--resume", "--out", "halves", "--steps", "14", "--device", "cpu"}, {"not what the checkpoint"});
}

TEST_F(SampleCommand, ThreadsDoNotChangeTheResult) {
    trained_nodes("one");
    trained_nodes("two", {{"threads", "2"}});
    for (const char* block : {"master.bin", "best.bin"})
        EXPECT_TRUE(equal_files(std::string("one/step_00000012/") + block, std::string("two/step_00000012/") + block));
}

TEST_F(SampleCommand, SeveralSeedsGiveMeanAndDeviation) {
    trained_nodes("family", {{"seeds", "3"}, {"seed", "4"}});
    const Json summary = Json::parse(slurp(path("family/summary.json")));
    EXPECT_EQ(summary.at("seeds"), (Json{4, 5, 6}));
    const auto values = summary.at("test").at("accuracy").at("values").get<std::vector<double>>();
    ASSERT_EQ(values.size(), 3u);
    const double mean = (values[0] + values[1] + values[2]) / 3;
    EXPECT_NEAR(summary.at("test").at("accuracy").at("mean").get<double>(), mean, 1e-12);
    double squares = 0;
    for (const double v : values) squares += (v - mean) * (v - mean);
    EXPECT_NEAR(summary.at("test").at("accuracy").at("deviation").get<double>(), std::sqrt(squares / 2), 1e-12);
    for (int s = 4; s < 7; ++s)
        EXPECT_EQ(end_of(fmt::format("family/seed-{}", s)).at("test").at("accuracy").get<double>(),
                  values[static_cast<std::size_t>(s - 4)]);
    trained_nodes("single", {{"seed", "5"}});
    EXPECT_EQ(end_of("single").at("test"), end_of("family/seed-5").at("test"));
    EXPECT_EQ(predictions("family"), predictions(fmt::format("family/seed-{}", summary.at("best_seed").get<int>())));
}

TEST_F(SampleCommand, SeedsOfAnySizeAreFoundToGoOn) {
    trained_nodes("family", {{"seeds", "2"}, {"seed", "123456"}, {"steps", "5"}});
    const Outcome o = run({"train", "--resume", "--out", "family", "--steps", "12", "--device", "cpu"});
    ASSERT_EQ(o.code, 0) << o.err;
    trained_nodes("single", {{"seed", "123457"}});
    EXPECT_EQ(end_of("family/seed-123457").at("test"), end_of("single").at("test"));
}

TEST_F(SampleCommand, PatienceEndsARunAndTheBestWeightsAreKept) {
    trained_nodes("run", {{"steps", "400"}, {"patience", "5"}, {"lr", "3e-2"}});
    const Json end = end_of("run");
    const auto best = end.at("best_step").get<std::int64_t>();
    EXPECT_EQ(end.at("steps").get<std::int64_t>(), best + 5);
    const auto vals = records_of(path("run/log.jsonl"), "val");
    for (const Json& v : vals)
        EXPECT_LE(v.at("accuracy").get<double>(), end.at("val").at("accuracy").get<double>()) << v.at("step");
    EXPECT_EQ(vals.at(static_cast<std::size_t>(best - 1)).at("loss"), end.at("val").at("loss"));
}

TEST_F(SampleCommand, TheLinearModelHasNoLayers) {
    trained_nodes("linear", {{"model", "linear"}, {"layers", "-"}, {"pattern", "-"}, {"steps", "30"}});
    EXPECT_GT(end_of("linear").at("test").at("accuracy").get<double>(), 0.6);
    EXPECT_EQ(records_of(path("linear/log.jsonl"), "start").at(0).at("config").at("layers"), 0);
    train_refused({{"model", "cubic"}}, {"'cubic'", "linear"});
}

TEST_F(SampleCommand, WrongInputIsSaidInOneLine) {
    world_.put("far.edges", "0 1\n2 77\n");
    train_refused({{"graph", "far.edges"}}, {"far.edges:2", "77", "60"});
    train_refused({{"graph", "absent.edges"}}, {"absent.edges"});
    train_refused({{"graph", "-"}}, {"--graph"});
    train_refused({{"node-labels", "-"}}, {"--node-labels"});
    train_refused({{"split", "-"}}, {"--split"});
    world_.put("short.features", "59 12 0\n" + std::string(59, '\n'));
    train_refused({{"features", "short.features"}, {"nodes", "60"}}, {"short.features", "59 rows", "60 nodes"});
    world_.put("cut.features", "60 12 4\n0:1 1:1\n");
    train_refused({{"features", "cut.features"}}, {"cut.features", "after 1 of 60 rows"});
    world_.put("high.features", "2 3 1\n3:1\n\n");
    train_refused({{"features", "high.features"}}, {"high.features:2", "column 3"});
    world_.put("twice.features", "2 3 2\n1:1 1:2\n\n");
    train_refused({{"features", "twice.features"}}, {"twice.features:2", "column 1 is there twice"});
    world_.put("nan.features", "2 3 1\n1:nan\n\n");
    train_refused({{"features", "nan.features"}}, {"nan.features:2", "nan"});
    world_.put("few.labels", "red\ngreen\n");
    train_refused({{"node-labels", "few.labels"}}, {"few.labels", "2 labels for 60 nodes"});
    std::string wrong = Communities().split;
    wrong.replace(0, 5, "lunch");
    world_.put("wrong.split", wrong);
    train_refused({{"split", "wrong.split"}}, {"wrong.split", "node 0", "'lunch'"});
    std::string late;
    for (int i = 0; i < kNodes; ++i) late += i % kClasses == 2 ? "test\n" : "train\n";
    world_.put("late.split", late);
    train_refused({{"split", "late.split"}}, {"late.split", "'blue'", "cannot be learned"});
    train_refused({{"spectral-dims", "100"}}, {"spectral-dims"});
    train_refused({{"pattern", "s:4"}}, {"window"});
    train_refused({{"channels", "31"}}, {"channels"});
    refused({"predict", "nowhere", "--out", "p.csv"}, {"nowhere"});
    refused({"predict", "--out", "p.csv"}, {"model"});
}

TEST_F(SampleCommand, CommandsForTextRefuseModelsOfSamples) {
    trained_nodes("run", {{"steps", "2"}});
    refused({"generate", "run"}, {"model of nodes", "predict"});
    refused({"export", "run", "--out", "x.fdl"}, {"model of nodes"});
    refused({"quantize", "run", "--out", "x.fdl"}, {"model of nodes"});
    refused({"predict", "run"}, {"--out"});
    refused(words_of("train", nodes({{"out", "run"}})), {"already holds"});
}

// ---- parts --------------------------------------------------------------------------------------------------------------

TEST(FeatureFiles, MatrixAndSparseRowsSayTheSame) {
    TempFolder folder;
    folder.put("a.features", "3 4 4\n1:2 3:-1\n\n0:1 2:0.5\n");
    folder.put("a.csv", "0,2,0,-1\n0,0,0,0\n1,0,0.5,0\n");
    FeatureRows sparse = read_features(folder / "a.features"), dense = read_features(folder / "a.csv");
    EXPECT_EQ(sparse.offsets, dense.offsets);
    EXPECT_EQ(sparse.column_of, dense.column_of);
    EXPECT_EQ(sparse.values, dense.values);
    EXPECT_EQ(sparse.columns, 4);
    normalise_rows(sparse);
    EXPECT_EQ(sparse.values, (std::vector<float>{2.f / 3, -1.f / 3, 1 / 1.5f, 0.5f / 1.5f}));
    EXPECT_FALSE(dense.dense());
}

TEST(SampleMetrics, AreaUnderTheCurveCountsTiesHalf) {
    EXPECT_EQ(roc_auc({{0.1f, false}, {0.4f, false}, {0.35f, true}, {0.8f, true}}), 0.75);
    EXPECT_EQ(roc_auc({{1.f, false}, {1.f, true}}), 0.5);
    EXPECT_EQ(roc_auc({{0.f, true}, {1.f, false}}), 0);
    EXPECT_EQ(roc_auc({{0.f, true}, {1.f, true}}), -1);
}

TEST(SampleMetrics, ByHand) {
    SampleShape s;
    s.kind = TargetKind::classes, s.outputs = 3;
    SampleBatch b;
    b.classes = {0, 0, 1, -1, 1};
    MetricsBuilder classes(s);
    classes.add(b, {4, 4, 5, {.8f, .1f, .1f, .1f, .8f, .1f, .1f, .8f, .1f, 0, 0, 1, 0, 0, 1}});
    SampleMetrics m = classes.metrics();
    EXPECT_EQ(m.accuracy, 0.5);
    EXPECT_NEAR(m.macro_f1, (2.0 / 3 + 0.5) / 2, 1e-12);  // class 2 does not occur
    EXPECT_EQ(m.confusion, (std::vector<std::int64_t>{1, 1, 0, 0, 1, 1, 0, 0, 0}));
    EXPECT_EQ(m.loss, 1);

    s.kind = TargetKind::regression, s.outputs = 2, s.mean = {5, 0}, s.deviation = {2, 10};
    b = {};
    b.targets = {0, kMissing, 1, 3};
    MetricsBuilder numbers(s);
    numbers.add(b, {0, 3, 2, {1, 9, 4, 3}});
    m = numbers.metrics();
    EXPECT_NEAR(m.mse, (1 + 9 + 0) / 3.0, 1e-12);
    EXPECT_NEAR(m.mae, (1 + 3 + 0) / 3.0, 1e-12);
    EXPECT_NEAR(m.rmse, (2 * std::sqrt(5.0) + 0) / 2, 1e-12);
    EXPECT_NEAR(m.mae_original, (2 * 2.0 + 0) / 2, 1e-12);

    s.kind = TargetKind::binary, s.mean.clear(), s.deviation.clear();
    b.targets = {0, 1, 1, 1};
    MetricsBuilder binary(s);
    binary.add(b, {0, 4, 2, {.2f, .5f, .9f, .6f}});
    m = binary.metrics();
    EXPECT_EQ(m.auc_targets, 1);  // the second target is always 1
    EXPECT_EQ(m.roc_auc, 1);
}

}  // namespace
}  // namespace fiedler::test
