// Time series: dates and tables, windows as samples, what a model keeps of them.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "engine/files.h"
#include "engine/json.h"
#include "engine/series_samples.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Size = std::size_t;
using Strings = std::vector<std::string>;
using Numbers = std::vector<std::int64_t>;

// ---- dates and tables ------------------------------------------------------------------------------------------------

TEST(SeriesDates, AreReadAndWritten) {
    SeriesClock clock;
    std::int64_t date = 0;
    const auto read = [&](const char* text) { return parse_date(text, date, clock) ? date : -1; };
    EXPECT_EQ(read("1970-01-01"), 0);
    EXPECT_EQ(read("2016-07-01 01:00:00"), 1467334800);
    EXPECT_EQ(clock.text(date), "2016-07-01 01:00:00");
    EXPECT_EQ(read("2016/07/01T01:00"), 1467334800);
    EXPECT_EQ(clock.text(date), "2016/07/01T01:00:00");
    EXPECT_EQ(read("2016-07-01 01:00:00.25"), 1467334800);
    EXPECT_EQ(read("2016-07-01T01:00:00Z"), 1467334800);
    EXPECT_EQ(read("2024-02-29"), 1709164800);
    EXPECT_EQ(clock.text(date), "2024-02-29");
    EXPECT_EQ(read("42"), 42);
    EXPECT_TRUE(clock.integers);
    for (const char* bad : {"", "2023-02-29", "2016-13-01", "2016-07-01 24:00", "2016-07-01 1:00", "2016-07", "x",
                            "2016-07-01 01:00:00.", "2016.07.01", "2016-07-01x", "2016-07/01", "99999999999999999999"})
        EXPECT_FALSE(parse_date(bad, date, clock)) << bad;
    EXPECT_TRUE(parse_date("1960-02-29 12:00:00", date, clock));
    EXPECT_LT(date, 0);
    EXPECT_EQ(clock.text(date), "1960-02-29 12:00:00");
}

std::string rows_text(const Strings& dates) {
    std::string text = "date,a\n";
    for (Size i = 0; i < dates.size(); ++i) text += fmt::format("{},{}\n", dates[i], i);
    return text;
}

TEST(SeriesTable, StepsOfSecondsAndOfMonths) {
    const TempFolder t;
    const auto next = [&](const Strings& dates, std::int64_t steps) {
        const Series s = read_series(t.put("s.csv", rows_text(dates)), {});
        return s.clock.text(s.clock.later(s.dates.back(), steps));
    };
    EXPECT_EQ(next({"2016-12-31 22:00:00", "2016-12-31 23:00:00"}, 2), "2017-01-01 01:00:00");
    EXPECT_EQ(next({"2016-01-31", "2016-02-29", "2016-03-31", "2016-04-30"}, 10), "2017-02-28");
    EXPECT_EQ(next({"2015-12-15", "2016-01-15", "2016-02-15"}, 1), "2016-03-15");
    EXPECT_EQ(next({"2014-03-31", "2014-06-30", "2014-09-30"}, 1), "2014-12-31");
    EXPECT_EQ(next({"2015-02-01", "2015-03-01", "2015-03-29"}, 1), "2015-04-26");  // four weeks
    EXPECT_EQ(next({"2015-02-01", "2015-03-01", "2015-04-01"}, 1), "2015-05-01");
    EXPECT_EQ(next({"7", "10", "13"}, 2), "19");
}

TEST(SeriesTable, ColumnsAndFaults) {
    const TempFolder t;
    const std::string text = "when,date,load,\"oil, C\"\n1,2016-07-01,1.5,7\n2,2016-07-02,2.5,8\n3,2016-07-03,-1e1,9\n";
    const Series s = read_series(t.put("s.csv", text), {});
    EXPECT_EQ(s.channels, (Strings{"when", "load", "oil, C"}));
    EXPECT_EQ(s.rows(), 3);
    EXPECT_EQ(s.values[7], -10);
    SeriesTableOptions o;
    o.channels = {"oil, C"}, o.date_column = "when";
    const Series chosen = read_series(t / "s.csv", o);
    EXPECT_EQ(chosen.values, (std::vector<double>{7, 8, 9}));
    EXPECT_TRUE(chosen.clock.integers);
    const auto fault = [&](const std::string& bad, const SeriesTableOptions& with = {}) {
        return input_error_of([&] { read_series(t.put("s.csv", bad), with); });
    };
    o.channels = {"gas"};
    EXPECT_HAS(fault(text, o), "s.csv: no channel \"gas\"; there are when, date, load");
    o.channels = {"when"};
    EXPECT_HAS(fault(text, o), "is the column of dates");
    EXPECT_HAS(fault(rows_text({"2016-07-01", "2016-07-03", "2016-07-02"})),
               "s.csv:4: 2016-07-02 comes after 2016-07-03, the row before; sort the rows");
    EXPECT_HAS(fault(rows_text({"2016-07-01", "2016-07-02", "2016-07-02"})), "s.csv:4: 2016-07-02 is the date of");
    EXPECT_HAS(fault(rows_text({"2016-07-01", "2016-07-02", "2016-07-04"})),
               "s.csv:4: 2016-07-04 follows 2016-07-02, where 2016-07-03 is due: rows are missing");
    EXPECT_HAS(fault(rows_text({"2016-07-01", "2016-07-03", "2016-07-04"})), "a row too many");
    SeriesTableOptions gaps;
    gaps.allow_gaps = true;
    EXPECT_EQ(read_series(t.put("s.csv", rows_text({"2016-07-01", "2016-07-02", "2016-07-04"})), gaps).rows(), 3);
    EXPECT_HAS(fault(rows_text({"2016-07-02", "2016-07-01"}), gaps), "sort the rows");
    EXPECT_HAS(fault("date,a\n2016-07-01,1\n2016-07-02,nan\n"), "s.csv:3: a is \"nan\"");
    EXPECT_HAS(fault("date,a\n2016-07-01,1\n2016-07-02,\n"), "s.csv:3: a has no value");
    EXPECT_HAS(fault("date,a\n2016-07-01,1\n2016-07-02,x\n"), "not a number");
    EXPECT_HAS(fault("date,a\n2016-07-01,1\nsoon,2\n"), "s.csv:3: date \"soon\"");
    EXPECT_HAS(fault("date,a\n2016-07-01,1\n2016-07-02\n"), "1 fields where other rows have 2");
    EXPECT_HAS(fault("date\n2016-07-01\n"), "columns of numbers");
    EXPECT_HAS(fault("date,a\n2016-07-01,1\n"), "1 rows");
}

TEST(SeriesCuts, RowsOrShares) {
    const SeriesCuts c = series_cuts("8640,2880,2880", 17420);
    EXPECT_EQ(c.train, 8640);
    EXPECT_EQ(c.val, 11520);
    EXPECT_EQ(c.test, 14400);
    EXPECT_EQ(series_cuts("", 1000).train, 700);
    EXPECT_EQ(series_cuts("", 1000).val, 800);
    EXPECT_EQ(series_cuts("", 1000).test, 1000);
    EXPECT_EQ(series_cuts("0.6, 0.2, 0.2", 10).val, 8);
    for (const char* bad : {"1,2", "a,b,c", "0.7,0.7,0.2", "-1,5,5", "900,100,100"})
        EXPECT_HAS(input_error_of([&] { series_cuts(bad, 1000); }), "split: ");
}

// ---- samples ---------------------------------------------------------------------------------------------------------------

// Channels are sines of different periods and some noise; channel c counts in units of 10^c around 100 c.
Series waves(std::int64_t rows, std::int64_t channels, std::int64_t skip = 0) {
    Series s;
    s.source = "waves.csv";
    s.clock.integers = true, s.clock.step = 1;
    for (std::int64_t c = 0; c < channels; ++c) s.channels.push_back("c" + std::to_string(c));
    for (std::int64_t r = skip; r < skip + rows; ++r) {
        s.dates.push_back(r);
        for (std::int64_t c = 0; c < channels; ++c)
            s.values.push_back(
                100.0 * double(c) +
                std::pow(10.0, double(c)) *
                    (std::sin(2 * std::numbers::pi * double(r) / double(12 + 4 * (c / 2))) +
                     0.2 * rng::normal(1, static_cast<std::uint64_t>(c), static_cast<std::uint64_t>(r))));
    }
    return s;
}

SeriesOptions options(SeriesMode mode) {
    SeriesOptions o;
    o.mode = mode;
    o.look_back = 24, o.horizon = 6, o.patch = 8, o.stride = 4;
    return o;
}

TEST(SeriesSamples, WindowsStayInTheirPartsAndLookBackBeforeThem) {
    const SeriesCuts cuts{100, 130, 170};
    const SeriesSamples source(waves(180, 2), options(SeriesMode::independent), cuts);
    EXPECT_EQ(source.samples(Part::train).size(), 2u * (100 - 24 - 6 + 1));
    EXPECT_EQ(source.samples(Part::val).size(), 2u * (30 - 6 + 1));
    EXPECT_EQ(source.samples(Part::test).size(), 2u * (40 - 6 + 1));
    EXPECT_EQ(source.time_of(source.samples(Part::val).front()), 100);
    EXPECT_EQ(source.time_of(source.samples(Part::test).back()), 164);
    EXPECT_EQ(source.known(Part::val), 2 * 25 * 6);
    EXPECT_EQ(source.row_name(source.sample_of(100, 1), 0), "99 c1");
    SampleBatch b;
    source.gather(source.samples(Part::val).subspan(0, 2), Part::test, b);
    EXPECT_TRUE(std::all_of(b.targets.begin(), b.targets.end(), [](float x) { return std::isnan(x); }));
}

// By hand: z-scores by the training part, instance norm, patches and places, targets that the shift and scale give back.
TEST(SeriesSamples, PatchesOfOneChannel) {
    const Series s = waves(180, 3);
    SeriesOptions o = options(SeriesMode::independent);
    o.spectral_dims = 2;
    const SeriesSamples source(s, o, {100, 130, 170});
    EXPECT_EQ(source.shape().features, 8 + 5);
    EXPECT_EQ(source.shape().nodes_per_sample, 5);
    EXPECT_EQ(source.shape().level, TargetLevel::sample);
    EXPECT_EQ(source.shape().outputs, 6);
    SampleBatch b;
    source.gather(Numbers{source.sample_of(140, 1), source.sample_of(50, 2)}, Part::test, b);
    ASSERT_EQ(b.offsets, (std::vector<std::int32_t>{0, 5, 10}));
    ASSERT_EQ(b.dense.size(), 10u * 13);
    double mean = 0, square = 0;
    for (Size r = 0; r < 100; ++r) mean += s.values[3 * r + 1] / 100;
    for (Size r = 0; r < 100; ++r) square += std::pow(s.values[3 * r + 1] - mean, 2) / 100;
    const auto z = [&](std::int64_t r) { return (s.values[static_cast<Size>(3 * r + 1)] - mean) / std::sqrt(square); };
    double m = 0, v = 0;
    for (std::int64_t r = 116; r < 140; ++r) m += z(r) / 24;
    for (std::int64_t r = 116; r < 140; ++r) v += std::pow(z(r) - m, 2) / 24;
    EXPECT_NEAR(b.row_shift[0], m, 1e-6);
    EXPECT_NEAR(b.row_scale[0], std::sqrt(v + 1e-5), 1e-6);
    for (std::int64_t p = 0; p < 5; ++p)
        for (std::int64_t i = 0; i < 13; ++i)
            EXPECT_NEAR(b.dense[static_cast<Size>(p * 13 + i)],
                        i < 8 ? (z(116 + 4 * p + i) - m) / std::sqrt(v + 1e-5) : i - 8 == p, 1e-5);
    for (std::int64_t h = 0; h < 6; ++h) EXPECT_NEAR(b.targets[static_cast<Size>(h)], z(140 + h), 1e-5);
    EXPECT_TRUE(std::isnan(b.targets[6]));  // of the training part, not asked
    EXPECT_EQ(b.edge_offsets, (std::vector<std::int32_t>{0, 1, 3, 5, 7, 8, 9, 11, 13, 15, 16}));
    EXPECT_EQ(b.edge_columns, (std::vector<std::int32_t>{1, 0, 2, 1, 3, 2, 4, 3, 6, 5, 7, 6, 8, 7, 9, 8}));
    EXPECT_EQ(source.edges_of(0), 8);
    for (int j = 0; j < 2; ++j) {  // eigenvectors of a path: L x = mu x, mean square 1
        const auto x = [&](int i) { return b.spectral[static_cast<Size>(2 * i + j)]; };
        const double mu = 2 - 2 * std::cos(std::numbers::pi * (j + 1) / 5);
        double norm = 0;
        for (int i = 0; i < 5; ++i) {
            double lx = 0;
            if (i > 0) lx += x(i) - x(i - 1);
            if (i < 4) lx += x(i) - x(i + 1);
            EXPECT_NEAR(lx, mu * x(i), 1e-5);
            norm += x(i) * x(i);
        }
        EXPECT_NEAR(norm, 5, 1e-4);
    }
}

TEST(SeriesSamples, ChannelsOfAWindowAndTheirGraph) {
    SeriesOptions o = options(SeriesMode::channels);
    o.neighbours = 1, o.spectral_dims = 3, o.instance_norm = false;
    const Series s = waves(180, 6);
    const SeriesSamples source(s, o, {100, 130, 170});
    EXPECT_EQ(source.shape().level, TargetLevel::node);
    EXPECT_EQ(source.shape().nodes_per_sample, 6);
    EXPECT_EQ(source.samples(Part::val).size(), 25u);
    EXPECT_EQ(source.known(Part::val), 25 * 6 * 6);
    SampleBatch b;
    source.gather(Numbers{110, 120}, Part::val, b);
    EXPECT_EQ(b.nodes(), 12);
    EXPECT_EQ(b.dense.size(), 12u * 24);
    EXPECT_EQ(b.targets.size(), 12u * 6);
    EXPECT_TRUE(b.row_shift.empty());
    // Pairs of channels share a period: each is the other's nearest.
    ASSERT_EQ(b.edge_columns.size(), 12u);
    for (std::int32_t i = 0; i < 12; ++i) EXPECT_EQ(b.edge_columns[static_cast<Size>(i)], i ^ 1);
    EXPECT_GT(b.edge_weights[0], 0.8);
    EXPECT_EQ(b.edge_weights[0], b.edge_weights[1]);
    EXPECT_EQ(source.row_name(110, 4), "109 c4");
    const TrainedSeries& t = source.trained();
    EXPECT_NEAR(b.targets[6], (s.values[110 * 6 + 1] - t.mean[1]) / t.deviation[1], 1e-5);
    EXPECT_NEAR(b.dense[24 * 7 + 23], (s.values[119 * 6 + 1] - t.mean[1]) / t.deviation[1], 1e-5);
    // Three components of two: eigenvalue 2 three times, nothing else beyond the zeros.
    double mass = 0;
    for (Size i = 0; i < 18; ++i) mass += double(b.spectral[i]) * b.spectral[i];
    EXPECT_NEAR(mass, 18, 1e-4);
}

TEST(SeriesSamples, TrendAndRemainder) {
    std::vector<float> x;
    for (int i = 0; i < 40; ++i) x.push_back(static_cast<float>(std::sin(i) + 0.1 * i));
    const std::vector<float> trend = moving_average(x, 25);
    for (int i = 0; i < 40; ++i) {
        double sum = 0;
        for (int k = i - 12; k <= i + 12; ++k) sum += x[static_cast<Size>(std::clamp(k, 0, 39))];
        EXPECT_NEAR(trend[static_cast<Size>(i)], sum / 25, 1e-6);
    }
    SeriesOptions o = options(SeriesMode::linear);
    o.instance_norm = false;
    const SeriesSamples source(waves(180, 2), o, {100, 130, 170});
    EXPECT_EQ(source.shape().features, 48);
    EXPECT_EQ(source.shape().nodes_per_sample, 1);
    EXPECT_EQ(source.shape().edge_types, 0);
    SampleBatch b;
    source.gather(Numbers{source.sample_of(60, 1)}, Part::train, b);
    EXPECT_EQ(b.nodes(), 1);
    EXPECT_EQ(b.edge_offsets, (std::vector<std::int32_t>{0, 0}));
    const auto z = [&](std::int64_t r) {
        return (source.series().values[static_cast<Size>(2 * r + 1)] - source.trained().mean[1]) /
               source.trained().deviation[1];
    };
    for (int i = 0; i < 24; ++i)
        EXPECT_NEAR(b.dense[static_cast<Size>(i)] + b.dense[static_cast<Size>(24 + i)], z(36 + i), 1e-5);
}

TEST(SeriesSamples, WhatDoesNotFitIsRefused) {
    const auto fault = [](SeriesOptions o, SeriesCuts cuts = {100, 130, 170}, Series s = waves(180, 2)) {
        return input_error_of([&] { SeriesSamples(std::move(s), o, cuts); });
    };
    SeriesOptions o = options(SeriesMode::independent);
    o.stride = 5;
    EXPECT_HAS(fault(o), "leave 1 of the look-back of 24 over");
    o.patch = 25;
    EXPECT_HAS(fault(o), "a patch fits into the look-back");
    o = options(SeriesMode::channels);
    o.look_back = 95;
    EXPECT_HAS(fault(o), "the training part has 100 rows, and a window needs 101");
    EXPECT_HAS(fault(options(SeriesMode::linear), {100, 103, 170}), "the part val has 3 rows, fewer than the horizon");
    Series flat = waves(180, 2);
    for (Size r = 0; r < 100; ++r) flat.values[2 * r + 1] = 7;
    EXPECT_HAS(fault(options(SeriesMode::linear), {100, 130, 170}, flat),
               "channel \"c1\" is constant (7) over the training part");
}

TEST(SeriesSamples, ATrainedModelReadsLaterRowsAsItsOwn) {
    SeriesOptions o = options(SeriesMode::channels);
    o.spectral_dims = 2, o.neighbours = 2;
    const SeriesSamples source(waves(180, 5), o, {100, 130, 170});
    const TrainedSeries kept = trained_series_from_json(Json::parse(to_json(source.trained()).dump()), "model");
    // The same file: the parts are those of the training, by date; rows after it belong to test.
    const SeriesSamples again(waves(180, 5), kept, nullptr, false);
    EXPECT_EQ(again.samples(Part::val).size(), source.samples(Part::val).size());
    EXPECT_EQ(again.samples(Part::test).size(), source.samples(Part::test).size() + 10);
    SampleBatch a, b;
    source.gather(Numbers{150}, Part::test, a);
    again.gather(Numbers{150}, Part::test, b);
    EXPECT_EQ(a.dense, b.dense);
    EXPECT_EQ(a.targets, b.targets);
    EXPECT_EQ(a.edge_columns, b.edge_columns);
    EXPECT_EQ(a.edge_weights, b.edge_weights);
    EXPECT_EQ(a.spectral, b.spectral);
    // A later file, its channels in another order.
    Series later = waves(60, 5, 140);
    for (Size r = 0; r < 60; ++r) std::swap(later.values[5 * r], later.values[5 * r + 3]);
    std::swap(later.channels[0], later.channels[3]);
    const SeriesSamples fresh(later, kept, nullptr, false);
    EXPECT_TRUE(fresh.samples(Part::train).empty());
    EXPECT_TRUE(fresh.samples(Part::val).empty());
    fresh.gather(Numbers{30}, Part::test, b);  // time 170
    again.gather(Numbers{170}, Part::test, a);
    EXPECT_EQ(a.dense, b.dense);
    EXPECT_EQ(a.targets, b.targets);
    // Beyond the end.
    const SeriesSamples future(waves(180, 5), kept, nullptr, true);
    ASSERT_EQ(future.samples(Part::test).size(), 1u);
    EXPECT_EQ(future.known(Part::test), 0);
    future.gather(future.samples(Part::test), Part::test, b);
    EXPECT_EQ(b.nodes(), 5);
    EXPECT_TRUE(std::all_of(b.targets.begin(), b.targets.end(), [](float x) { return std::isnan(x); }));
    EXPECT_EQ(future.row_name(180, 0), "179 c0");
    later.channels[1] = "other";
    EXPECT_HAS(input_error_of([&] { SeriesSamples(later, kept, nullptr, false); }),
               "no channel \"c1\", which the model");
    later.clock.step = 2;
    EXPECT_HAS(input_error_of([&] { SeriesSamples(later, kept, nullptr, false); }), "another step apart");
    EXPECT_HAS(input_error_of([&] { SeriesSamples(waves(20, 5), kept, nullptr, true); }), "looks back at 24");
    Json broken = to_json(source.trained());
    broken["deviation"][0] = 0;
    EXPECT_HAS(input_error_of([&] { trained_series_from_json(broken, "model"); }), "contradicts itself");
    broken.erase("mean");
    EXPECT_HAS(input_error_of([&] { trained_series_from_json(broken, "model"); }), "damaged");
}

TEST(SeriesSamples, TheStandardSplitOfEtth1) {
    const std::string archive = std::string(FIEDLER_SOURCE_DIR) + "/../shared/data/ETTh1.csv.xz";
    if (!file_exists(archive)) GTEST_SKIP() << "NOT TESTED: no " << archive;
    const TempFolder t;
    if (std::system(fmt::format("xz -dc '{}' > '{}'", archive, t / "ETTh1.csv").c_str()) != 0)
        GTEST_SKIP() << "NOT TESTED: cannot unpack " << archive;
    const Series s = read_series(t / "ETTh1.csv", {});
    EXPECT_EQ(s.rows(), 17420);
    EXPECT_EQ(s.channels, (Strings{"HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"}));
    EXPECT_EQ(s.clock.step, 3600);
    SeriesOptions o;
    const SeriesSamples source(s, o, series_cuts("8640,2880,2880", s.rows()));
    EXPECT_EQ(source.samples(Part::train).size(), 7u * 8449);
    EXPECT_EQ(source.samples(Part::val).size(), 7u * 2785);
    EXPECT_EQ(source.samples(Part::test).size(), 7u * 2785);
    // Python's sums over the first 8640 rows; values are floats here.
    EXPECT_NEAR(source.trained().mean[6], 17.1282616982, 1e-6);
    EXPECT_NEAR(source.trained().deviation[6], 9.1764910249, 1e-6);
}

}  // namespace
}  // namespace fiedler::test
