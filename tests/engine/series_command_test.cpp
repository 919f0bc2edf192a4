// Time series as a person uses them: train, eval, predict beyond the end, and what is refused.
#include <gtest/gtest.h>

#include <cmath>

#include "engine/series_table.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

std::string table(int rows) {
    std::string text = "date,a,b\n";
    SeriesClock clock;
    std::int64_t start = 0;
    parse_date("2020-01-01 00:00:00", start, clock);
    for (int r = 0; r < rows; ++r)
        text += fmt::format("{},{:.5f},{:.5f}\n", clock.text(start + 3600 * r),
                            20 + 5 * std::sin(r * 0.26) + 0.3 * rng::normal(1, 1, static_cast<std::uint64_t>(r)),
                            1000 + 300 * std::cos(r * 0.26));
    return text;
}

class SeriesCommand : public CommandTest {
  protected:
    void SetUp() override { world_.put("s.csv", table(600)); }
    Outcome train_on(const std::string& out, const Knobs& changes = {}) const {
        Knobs k = {{"preset", "series"},   {"data", "s.csv"}, {"out", out},        {"device", "cpu"}, {"threads", "1"},
                   {"channels", "32"},     {"heads", "2"},    {"look-back", "48"}, {"horizon", "12"}, {"epochs", "3"},
                   {"batch-nodes", "160"}, {"lr", "3e-3"},    {"warmup", "10"}};
        for (const auto& [name, value] : changes) k[name] = value;
        return run(words_of("train", k));
    }
};

TEST_F(SeriesCommand, BenchTimesATrainingStep) {
    const Words words = {"bench",     "samples",   "--preset", "series",        "--data", "s.csv",   "--look-back",
                         "48",        "--horizon", "12",       "--batch-nodes", "160",    "--steps", "3",
                         "--threads", "1",         "--device", "cpu",           "--json", "b.json"};
    const Outcome o = run(words);
    ASSERT_EQ(o.code, 0) << o.err;
    for (const char* part :
         {"windows/s", "nodes/s", "parameters", "memory:", "to make one of the windows ready", "adamw"})
        EXPECT_HAS(o.out, part);
    const Json step = Json::parse(slurp(path("b.json"))).at("steps").at(0), samples = step.at("samples");
    EXPECT_EQ(step.at("steps"), 3);
    EXPECT_GT(step.at("parameters").get<std::int64_t>(), 1000);
    EXPECT_EQ(samples.at("unit"), "windows");
    const double each = samples.at("nodes_a_step").get<double>() / samples.at("a_step").get<double>();
    EXPECT_NEAR(samples.at("nodes_per_second").get<double>(), each * samples.at("per_second").get<double>(),
                1e-3 * samples.at("nodes_per_second").get<double>());
    EXPECT_GT(samples.at("prepare_us").get<double>(), 0);
    Words again = words;
    again.insert(again.end(), {"--compare", "b.json"});
    const Outcome c = run(again);
    EXPECT_EQ(c.code, 0) << c.err;
    EXPECT_HAS(c.out, "step/series b, 1 layers");
    const Outcome no = run({"bench", "samples"});
    EXPECT_EQ(no.code, 2);
    EXPECT_HAS(no.err, "--preset molecules");
    EXPECT_EQ(run({"bench", "samples", "step"}).code, 2);
}

TEST_F(SeriesCommand, ForecastsASineAndGoesBeyondTheEnd) {
    const Outcome o = train_on("run");
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "600 rows of 2 channels");
    EXPECT_LT(number_after(o.out.substr(o.out.find("test ")), " mse "), 0.1) << o.out;
    const Outcome e = run({"eval", "run", "--device", "cpu"});
    ASSERT_EQ(e.code, 0) << e.err;
    EXPECT_NEAR(number_after(e.out, "\nmse "), number_after(o.out.substr(o.out.find("test ")), " mse "), 1e-4);
    const Outcome p = run({"predict", "run", "--device", "cpu", "--out", "p.csv", "--plot", "p.svg"});
    ASSERT_EQ(p.code, 0) << p.err;
    const std::string csv = slurp(path("p.csv"));
    EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 13);
    EXPECT_TRUE(csv.starts_with("date,a,b\n2020-01-26 00:00:00,")) << csv;
    for (int h = 0; h < 12; ++h) {  // in original units
        const std::size_t at = csv.find(fmt::format("2020-01-26 {:02}:00:00,", h));
        ASSERT_NE(at, csv.npos);
        EXPECT_NEAR(std::stod(csv.substr(csv.find(',', csv.find(',', at) + 1) + 1)),
                    1000 + 300 * std::cos((600 + h) * 0.26), 120);
    }
    EXPECT_HAS(slurp(path("p.svg")), "2020-01-26 00:00:00");
    const Outcome windows =
        run({"predict", "run", "--device", "cpu", "--part", "test", "--out", "w.csv", "--plot", "w.svg"});
    ASSERT_EQ(windows.code, 0) << windows.err;
    EXPECT_TRUE(slurp(path("w.csv")).starts_with("id,+1,+2,"));
    EXPECT_HAS(slurp(path("w.svg")), ">truth<");
}

TEST_F(SeriesCommand, ChannelsAsNodesAndTheLinearBaseline) {
    const Outcome o =
        train_on("channels", {{"series-mode", "channels"}, {"pool", "mean"}, {"epochs", "2"}, {"spectral-dims", "1"}});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "pairs of channels joined");
    const Outcome p = run({"predict", "channels", "--device", "cpu", "--out", "p.csv"});
    EXPECT_EQ(p.code, 0) << p.err;
    EXPECT_TRUE(slurp(path("p.csv")).starts_with("date,a,b\n2020-01-26 00:00:00,"));
    const Outcome linear =
        run({"train", "--preset", "series-linear", "--data", "s.csv", "--out", "linear", "--device", "cpu", "--threads",
             "1", "--look-back", "48", "--horizon", "12", "--epochs", "3", "--batch-nodes", "32"});
    ASSERT_EQ(linear.code, 0) << linear.err;
    EXPECT_LT(number_after(linear.out.substr(linear.out.find("test ")), " mse "), 0.2) << linear.out;
}

TEST_F(SeriesCommand, BadInputIsOneLine) {
    std::string text = table(600);
    const std::size_t cut = text.find("2020-01-10 05");
    world_.put("gap.csv", text.substr(0, cut) + text.substr(text.find('\n', cut) + 1));
    std::string flat = "date,a,b\n";
    for (int r = 0; r < 300; ++r) flat += fmt::format("{},{},7\n", r, r % 11);
    world_.put("flat.csv", flat);
    expect_refused(train_on("run", {{"data", "gap.csv"}}), {"gap.csv:", "rows are missing"});
    expect_refused(train_on("run", {{"data", "flat.csv"}}), {"\"b\" is constant", "--columns"});
    expect_refused(train_on("run", {{"columns", "c"}}), {"no channel \"c\""});
    expect_refused(train_on("run", {{"patch", "7"}}), {"look-back"});
    EXPECT_FALSE(paths_below(world_.path()).contains("run"));
}

}  // namespace
}  // namespace fiedler::test
