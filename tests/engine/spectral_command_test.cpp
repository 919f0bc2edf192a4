// The real binary with a spectral embedding: random, of the corpus, and from a file; what it keeps, what it reads
// again, and what it refuses.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "engine/dataset.h"
#include "engine/spectral_embedding.h"
#include "engine/spectrum_file.h"
#include "engine/weights.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

class CommandSpectral : public CommandTest {
  protected:
    // A spectrum of `nodes` nodes with `zeros` components and k pairs beyond them; the vectors mean nothing.
    void put_spectrum(const std::string& name, std::int32_t nodes, int zeros, int k,
                      SpectrumStatus status = SpectrumStatus::complete) const {
        ModelSpec spec;
        spec.vocab = nodes;
        spec.spectral_dims = zeros + k;
        const int padded = spec.spectral_columns();
        const std::vector<float> table = random_spectral_table(spec, 3);
        Spectrum s;
        s.status = status;
        s.why = "for the test";
        s.nodes = nodes;
        s.zeros = zeros;
        for (int j = 0; j < zeros + k; ++j) {
            s.eigenvalues.push_back(j < zeros ? 0 : 0.01 * j);
            s.residuals.push_back(0);
        }
        for (int i = 0; i < nodes; ++i)
            for (int j = 0; j < zeros + k; ++j)
                s.vectors.push_back(table[static_cast<std::size_t>(i * padded + j)] /
                                    std::sqrt(static_cast<float>(nodes)));
        write_spectrum(path(name), s, Json::object());
    }
    // U as the file of weights holds it.
    std::vector<float> table_of(const std::string& run, std::int64_t k) const {
        const WeightsFile file(path(run + "/weights.fdl"));
        std::vector<float> table(static_cast<std::size_t>(512 * k));
        file.read_f32(kSpectralTable, {512, k}, table.data());
        return table;
    }
    void refused(const Knobs& changes, const Words& parts) {
        Knobs knobs = changes;
        knobs["data"] = dataset();
        const auto before = paths_below(world_.path());
        const Outcome o = train("refused", knobs);
        EXPECT_EQ(o.code, 2) << o.err;
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
        for (const std::string& part : parts) EXPECT_HAS(o.err, part);
        EXPECT_EQ(paths_below(world_.path()), before);
    }
};

TEST_F(CommandSpectral, EveryCommandReadsAModelWithIt) {
    for (const auto& [source, kind] : {std::pair{"random", "coordinate"}, {"corpus", "energy"}}) {
        SCOPED_TRACE(source);
        const std::string out = source;
        ASSERT_NO_FATAL_FAILURE(trained(out, {{"data", dataset()},
                                              {"steps", "6"},
                                              {"spectral-dims", "20"},
                                              {"spectral-source", source},
                                              {"scalar-kind", kind}}));
        const Json end = end_of(out);
        for (const std::string& model : {out, end.at("checkpoint").get<std::string>(), out + "/weights.fdl"}) {
            const Outcome e = run({"eval", model, "--data", dataset(), "--device", "cpu"});
            ASSERT_EQ(e.code, 0) << e.err;
            EXPECT_HAS(e.out, fmt::format("{:.4f} nats", end.at("val_loss").get<double>()));
            const Outcome i = run({"inspect", model});
            EXPECT_EQ(i.code, 0) << i.err;
            EXPECT_HAS(i.out, "spectral.U");
            EXPECT_HAS(i.out, "[512, 20]");
            EXPECT_EQ(i.out.find("feature_laplacian.matrix") != i.out.npos, kind == std::string("energy"));
        }
        const Outcome text = run({"generate", out, "--max-tokens", "5", "--device", "cpu"});
        EXPECT_EQ(text.code, 0) << text.err;
        const auto made = records_of(path(out + "/log.jsonl"), "constants");
        ASSERT_EQ(made.size(), 1u);
        EXPECT_EQ(made[0].at("spectral").at("source"), source);
        EXPECT_EQ(made[0].contains("feature_laplacian"), kind == std::string("energy"));
    }
    const Outcome plan = run({"plan", "--spectral-dims", "64", "--device", "cpu"});
    EXPECT_EQ(plan.code, 0) << plan.err;
    EXPECT_HAS(plan.out, "spectral.U");
}

// The file that U and Lf were made of is gone: what a run needs is in its checkpoints.
TEST_F(CommandSpectral, ResumeIsBitEqualWithoutTheSource) {
    put_spectrum("s.fdl", 512, 2, 20);
    ASSERT_NO_FATAL_FAILURE(trained("whole", {{"data", dataset()},
                                              {"steps", "12"},
                                              {"spectral-dims", "17"},
                                              {"spectral-source", "s.fdl"},
                                              {"spectral-rows", "raw"},
                                              {"scalar-kind", "energy"},
                                              {"feature-laplacian", "s.fdl"},
                                              {"checkpoint-every", "6"},
                                              {"keep", "5"}}));
    std::filesystem::remove(path("s.fdl"));
    std::filesystem::create_directory(path("part"));
    std::filesystem::copy(path("whole/step_00000006"), path("part/step_00000006"));
    const Outcome o = run({"train", "--resume", "part/step_00000006", "--out", "part", "--keep", "5"});
    ASSERT_EQ(o.code, 0) << o.err;
    expect_same_end("whole", "part", 12);
    for (const char* file : {"spectral.U.bin", "feature_laplacian.matrix.bin", "feature_laplacian.eigenvectors.bin",
                             "feature_laplacian.eigenvalues.bin"})
        EXPECT_TRUE(equal_files(std::string("whole/step_00000012/") + file, std::string("part/step_00000012/") + file))
            << file;
    // Column 0 of U is the first behind the two zeros, times sqrt(512).
    ModelSpec spec;
    spec.vocab = 512;
    spec.spectral_dims = 22;
    const std::vector<float> made = random_spectral_table(spec, 3), table = table_of("part", 17);
    for (std::size_t i = 0; i < 512; ++i)
        for (std::size_t j = 0; j < 17; ++j) EXPECT_NEAR(table[17 * i + j], made[24 * i + 2 + j], 1e-5);
}

TEST_F(CommandSpectral, TheCorpusSpectrumIsMadeOnceAndKept) {
    const std::string& data = dataset();
    const std::string manifest = slurp(path(data + "/dataset.json"));
    const Knobs knobs = {{"data", "corpus"}, {"steps", "2"}, {"spectral-dims", "12"}};
    const auto say = [&](const std::string& out) {
        const Outcome o = train(out, knobs);
        EXPECT_EQ(o.code, 0) << o.err;
        EXPECT_HAS(o.out, "using the dataset prepared before");
        return o.out;
    };
    const std::string graph = data + "/token_graph.fdl", spectrum = data + "/spectrum-12.fdl", made = "spectrum: 12 ";
    EXPECT_HAS(say("a"), made);  // the cache is older: only what is missing is made
    const std::string first = slurp(path(spectrum));
    EXPECT_TRUE(std::filesystem::exists(path(graph)));
    EXPECT_HAS(say("b"), "using the spectrum made before");
    std::filesystem::remove(path(spectrum));
    EXPECT_HAS(say("c"), made);
    EXPECT_TRUE(slurp(path(spectrum)) == first);
    world_.put(graph, "damaged");
    world_.put(spectrum, first.substr(0, first.size() - 100));
    EXPECT_HAS(say("d"), made);
    EXPECT_TRUE(slurp(path(spectrum)) == first);
    for (const char* other : {"b", "c", "d"}) expect_same_weights("a", other);
    EXPECT_EQ(slurp(path(data + "/dataset.json")), manifest);
    EXPECT_TRUE(Dataset::open(path(data)).train().size() > 0);

    // `prepare` makes it too, into a folder of its own.
    const Outcome p = run({"prepare", "corpus", "--vocab", "512", "--out", "own", "--spectral-dims", "12", "--device",
                           "cpu", "--val-fraction", "0.02"});
    ASSERT_EQ(p.code, 0) << p.err;
    EXPECT_TRUE(std::filesystem::exists(path("own/token_graph.fdl")));
    EXPECT_TRUE(std::filesystem::exists(path("own/spectrum-12.fdl")));
    // More than the graph has is refused, with how many there are.
    const Outcome many = train("many", {{"data", data}, {"steps", "2"}, {"spectral-dims", "511"}});
    EXPECT_EQ(many.code, 2);
    EXPECT_HAS(many.err, "eigenvectors beyond its");
    EXPECT_FALSE(std::filesystem::exists(path("many")));
}

TEST_F(CommandSpectral, ShardsOfOthersAreLeftAlone) {
    const std::string data = dataset();
    std::filesystem::create_directory(path("shards"));
    std::filesystem::copy(path(data + "/train_000000.bin"), path("shards/train_000000.bin"));
    const auto before = paths_below(path("shards"));
    ASSERT_NO_FATAL_FAILURE(trained("run", {{"data", "shards"}, {"steps", "2"}, {"spectral-dims", "8"}}));
    EXPECT_EQ(paths_below(path("shards")), before);
    const Outcome again = train("again", {{"data", "shards"}, {"steps", "2"}, {"spectral-dims", "8"}});
    EXPECT_HAS(again.out, "using the spectrum made before: cache/shards-");
}

TEST_F(CommandSpectral, WhatCannotBeIsRefused) {
    refused({{"spectral-dims", "512"}, {"vocab", "500"}}, {"spectral-dims", "the 500 tokens"});
    refused({{"spectral-dims", "600"}}, {"spectral-dims", "600"});
    refused({{"spectral-dims", "8"}, {"spectral-rows", "long"}}, {"spectral-rows", "'long'", "unit", "raw"});
    refused({{"spectral-dims", "8"}, {"spectral-source", "nothere.fdl"}}, {"spectral-source", "nothere.fdl"});
    put_spectrum("other.fdl", 400, 1, 20);
    refused({{"spectral-dims", "8"}, {"spectral-source", "other.fdl"}}, {"other.fdl", "400 nodes", "512 tokens"});
    put_spectrum("few.fdl", 512, 3, 5);
    refused({{"spectral-dims", "8"}, {"spectral-source", "few.fdl"}}, {"few.fdl", "has 5", "5 or fewer"});
    world_.put("text.fdl", "no spectrum");
    refused({{"spectral-dims", "8"}, {"spectral-source", "text.fdl"}}, {"text.fdl"});
    put_spectrum("partial.fdl", 512, 1, 20, SpectrumStatus::partial);
    const Knobs partial = {{"spectral-dims", "8"}, {"spectral-source", "partial.fdl"}};
    refused(partial, {"partial.fdl", "--allow-partial"});
    Knobs energy = {{"spectral-dims", "12"}, {"scalar-kind", "energy"}, {"feature-laplacian", "corpus"}};
    refused(energy, {"feature-laplacian", "16 channels", "--spectral-dims 16"});
    energy["feature-laplacian"] = "nothere.npy";
    refused(energy, {"feature-laplacian", "nothere.npy"});
    world_.put("wide.csv", "1,2,3\n4,5,7\n9,8,7\n");
    energy["feature-laplacian"] = "wide.csv";
    refused(energy, {"wide.csv", "3 columns", "16 wide"});
    energy["feature-laplacian"] = "few.fdl";
    refused(energy, {"few.fdl", "5 eigenvectors", "16 wide"});
    Knobs allowed = partial;
    allowed["allow-partial"] = "";
    allowed["data"] = dataset();
    allowed["steps"] = "2";
    EXPECT_NO_FATAL_FAILURE(trained("allowed", allowed));
    // Another embedding cannot be had on --resume.
    const Outcome o = run({"train", "--resume", "--out", "allowed", "--spectral-dims", "16"});
    EXPECT_EQ(o.code, 2);
    EXPECT_HAS(o.err, "spectral-dims = 16 cannot be changed");
}

TEST_F(CommandSpectral, VectorsOfOnesOwnMakeTheLaplacian) {
    std::string csv;
    for (int i = 0; i < 50; ++i)
        for (int j = 0; j < 16; ++j)
            csv += fmt::format("{}{}",
                               rng::uniform(1, static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(j / 2)) +
                                   0.1 * rng::uniform(2, static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(j)),
                               j < 15 ? "," : "\n");
    world_.put("vectors.csv", csv);
    ASSERT_NO_FATAL_FAILURE(trained(
        "run", {{"data", dataset()}, {"steps", "3"}, {"scalar-kind", "energy"}, {"feature-laplacian", "vectors.csv"}}));
    const WeightsFile file(path("run/weights.fdl"));
    std::vector<float> lap(16 * 16);
    file.read_f32("feature_laplacian.matrix", {16, 16}, lap.data());
    for (std::size_t i = 0; i < 16; ++i) {
        double row = 0;
        for (std::size_t j = 0; j < 16; ++j) row += lap[16 * i + j];
        EXPECT_NEAR(row, 0, 1e-5);
        EXPECT_LT(lap[16 * i + (i ^ 1)], -0.5) << "columns made alike are not joined";
    }
}

}  // namespace
}  // namespace fiedler::test
