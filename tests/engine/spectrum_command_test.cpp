// `fiedler spectrum` as a person runs it: what it prints, what it leaves behind, and what it refuses.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "engine/matrix_files.h"
#include "engine/spectrum_file.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

std::string cycle_text(int nodes, int first = 0) {
    std::string text = "# a cycle\n";
    for (int i = 0; i < nodes; ++i) text += fmt::format("{}\t{}\n", first + i, first + (i + 1) % nodes);
    return text;
}

// A path is the worst of graphs for a polynomial filter: lambda_2 is near 1 / nodes^2.
std::string path_text(int nodes) {
    std::string text;
    for (int i = 0; i + 1 < nodes; ++i) text += fmt::format("{} {}\n", i, i + 1);
    return text;
}

class SpectrumCommand : public CommandTest {
  protected:
    void SetUp() override { world_.put("cycle.edges", cycle_text(40)); }
    Outcome solve(Words words) const {
        words.insert(words.begin(), "spectrum");
        words.insert(words.end(), {"--device", "cpu"});
        return run(words);
    }
    // Solves, and fails the test when that does not end well.
    Outcome solved(const Words& words) const {
        SCOPED_TRACE(fmt::format("spectrum {}", fmt::join(words, " ")));
        Outcome o = solve(words);
        EXPECT_EQ(o.code, 0) << o.err;
        return o;
    }
    // One line, and the world is as it was before.
    void refused(const Words& words, const Words& parts) const {
        SCOPED_TRACE(fmt::format("spectrum {}", fmt::join(words, " ")));
        const auto before = paths_below(world_.path());
        const Outcome o = solve(words);
        EXPECT_EQ(o.code, 2) << o.out;
        EXPECT_TRUE(o.err.starts_with("fiedler")) << o.err;
        EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
        for (const std::string& part : parts) EXPECT_HAS(o.err, part);
        EXPECT_EQ(paths_below(world_.path()), before);
    }
    Spectrum result(const std::string& folder) const { return read_spectrum(path(folder + "/spectrum.fdl"), true); }
};

TEST_F(SpectrumCommand, WritesWhatItPrints) {
    const Outcome o = solved({"cycle.edges", "-k", "9", "--combinatorial", "--out", "out"});
    EXPECT_EQ(o.err, "");
    for (const char* part : {"nodes 40, edges 40", "components 1", "laplacian    combinatorial",
                             "method       dense: ", "9 pairs: 1 zero", "residual", "spectrum     out"})
        EXPECT_HAS(o.out, part);
    EXPECT_EQ(paths_below(path("out")), (std::set<std::string>{"eigenvalues.npy", "eigenvectors.npy", "residuals.npy",
                                                               "spectrum.fdl", "summary.json"}));
    const Spectrum s = result("out");
    EXPECT_EQ(s.status, SpectrumStatus::complete);
    EXPECT_EQ(s.kind, LaplacianKind::combinatorial);
    ASSERT_EQ(s.count(), 9);
    for (int j = 0; j < 9; ++j)
        EXPECT_NEAR(s.eigenvalues[static_cast<std::size_t>(j)],
                    2 - 2 * std::cos(2 * std::numbers::pi * ((j + 1) / 2) / 40), 1e-6);
    const Matrix values = read_matrix(path("out/eigenvalues.npy")), vectors = read_matrix(path("out/eigenvectors.npy"));
    EXPECT_EQ(values.rows, 9);
    EXPECT_EQ(values.values[8], static_cast<float>(s.eigenvalues[8]));
    EXPECT_EQ(vectors.rows, 40);
    EXPECT_EQ(vectors.columns, 9);
    EXPECT_EQ(vectors.values, s.vectors);
    EXPECT_EQ(read_matrix(path("out/residuals.npy")).rows, 9);
    const Json summary = Json::parse(slurp(path("out/summary.json")));
    EXPECT_EQ(summary.at("zeros"), 1);
    EXPECT_EQ(summary.at("status"), "complete");
    EXPECT_EQ(summary.at("graph").at("edges"), 40);
    EXPECT_EQ(summary.at("last").get<double>(), s.eigenvalues[8]);
    EXPECT_LE(summary.at("worst_residual").get<double>(), 1e-6);
}

TEST_F(SpectrumCommand, JsonIsOneLineAndWordsGoElsewhere) {
    const Outcome o = solved({"cycle.edges", "-k", "5", "--json", "--out", "out"});
    EXPECT_EQ(std::count(o.out.begin(), o.out.end(), '\n'), 1) << o.out;
    EXPECT_EQ(o.out, slurp(path("out/summary.json")));
    EXPECT_EQ(Json::parse(o.out).at("k"), 5);
    EXPECT_HAS(o.err, "nodes 40");
}

TEST_F(SpectrumCommand, WithoutANameTheFolderGetsOne) {
    solved({"cycle.edges", "-k", "3"});
    solved({"cycle.edges", "-k", "4"});
    EXPECT_EQ(result("runs/spectrum-cycle").count(), 3);
    EXPECT_EQ(result("runs/spectrum-cycle-2").count(), 4);
}

TEST_F(SpectrumCommand, NamesComponentsAndLabels) {
    world_.put("family.csv", "who,whom,weight\nann,bob,1\nbob,cy,2\ncy,dan,1\ndan,ann,1\nx,y,1\n");
    world_.put("kin.csv", "who,kin\nann,<b> & \"co\"\nbob,b\ncy,c\ndan,c\nx,c\ny,c\n");
    solved(
        {"family.csv", "-k", "4", "--out", "all", "--plot", "all.svg", "--labels", "kin.csv", "--label-column", "kin"});
    EXPECT_EQ(slurp(path("all/nodes.txt")), "ann\nbob\ncy\ndan\nx\ny\n");
    EXPECT_EQ(result("all").zeros, 2);
    const std::string svg = slurp(path("all.svg"));
    EXPECT_TRUE(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    EXPECT_HAS(svg, "&lt;b&gt; &amp; &quot;co&quot;");
    EXPECT_EQ(svg.find("<b>"), svg.npos);
    solved({"family.csv", "-k", "4", "--largest-component", "--out", "largest", "--plot", "largest.svg", "--labels",
            "kin.csv", "--label-column", "kin", "--start",
            "all/spectrum.fdl"});  // vectors of all nodes start those of some
    EXPECT_EQ(slurp(path("largest/nodes.txt")), "ann\nbob\ncy\ndan\n");
    EXPECT_EQ(result("largest").zeros, 1);
    solved({"family.csv", "-k", "2", "--beyond-null", "--out", "beyond"});
    EXPECT_EQ(result("beyond").zeros, 2);
    EXPECT_GT(result("beyond").eigenvalues[0], 0.1);
}

TEST_F(SpectrumCommand, ASavedGraphIsTheSameGraph) {
    solved({"cycle.edges", "-k", "6", "--out", "one", "--save-graph", "cycle.fdl"});
    solved({"cycle.fdl", "-k", "6", "--out", "two"});
    EXPECT_TRUE(equal_files("one/eigenvectors.npy", "two/eigenvectors.npy"));
    const Outcome graph = run({"inspect", "cycle.fdl"});
    EXPECT_EQ(graph.code, 0) << graph.err;
    EXPECT_HAS(graph.out, "Fiedler graph");
    EXPECT_HAS(graph.out, "nodes 40, edges 40");
    const Outcome spectrum = run({"inspect", "one/spectrum.fdl"});
    EXPECT_EQ(spectrum.code, 0) << spectrum.err;
    EXPECT_HAS(spectrum.out, "6 pairs, 1 zeros");
    refused({"cycle.fdl", "--first-id", "1"}, {"--first-id", "text files"});
    refused({"one/spectrum.fdl"}, {"one/spectrum.fdl", "a spectrum and no graph"});
    refused({"cycle.edges", "-k", "3", "--start", "cycle.fdl"}, {"cycle.fdl", "a graph and no spectrum"});
}

TEST_F(SpectrumCommand, ThreadsDoNotMatter) {
    world_.put("path.edges", path_text(900));
    for (const char* threads : {"1", "2"})
        solved({"path.edges", "-k", "6", "--method", "multilevel", "--threads", threads, "--out", threads});
    EXPECT_TRUE(equal_files("1/eigenvectors.npy", "2/eigenvectors.npy"));
    EXPECT_TRUE(equal_files("1/eigenvalues.npy", "2/eigenvalues.npy"));
}

TEST_F(SpectrumCommand, VectorsAndTokens) {
    std::string csv = "x,y,z\n";
    for (int i = 0; i < 60; ++i) csv += fmt::format("{:.6f},{:.6f},{}\n", std::cos(0.1 * i), std::sin(0.1 * i), i % 3);
    world_.put("points.csv", csv);
    const Outcome knn = solved({"--knn", "5", "--metric", "euclidean", "points.csv", "-k", "8", "--out", "knn"});
    EXPECT_HAS(knn.out, "nodes 60");
    const Outcome features = solved({"--feature-graph", "points.csv", "-k", "3", "--out", "features"});
    EXPECT_HAS(features.out, "nodes 3");
    EXPECT_EQ(slurp(path("features/nodes.txt")), "x\ny\nz\n");
    CommandTest::SetUp();
    const std::string data = dataset();
    const Outcome tokens =
        solved({"--tokens", data, "--beyond-null", "-k", "8", "--out", "tokens", "--plot", "tokens.svg"});
    EXPECT_HAS(tokens.out, "nodes 512");
    EXPECT_EQ(result("tokens").count(), 8);
}

TEST_F(SpectrumCommand, APartialResultIsSavedAndMarked) {
    world_.put("path.edges", path_text(5000));
    const Words words = {"path.edges", "-k", "8", "--method", "filter", "--max-iterations", "1", "--tolerance", "1e-9"};
    Words first = words, allowed = words;
    first.insert(first.end(), {"--out", "part"});
    const Outcome o = solve(first);
    EXPECT_EQ(o.code, 1);
    EXPECT_EQ(std::count(o.err.begin(), o.err.end(), '\n'), 1) << o.err;
    for (const char* part : {"partial", "part/spectrum.fdl", "--allow-partial"}) EXPECT_HAS(o.err, part);
    EXPECT_EQ(result("part").status, SpectrumStatus::partial);
    EXPECT_EQ(Json::parse(slurp(path("part/summary.json"))).at("status"), "partial");
    EXPECT_HAS(run({"inspect", "part/spectrum.fdl"}).out, "PARTIAL");
    refused({"path.edges", "-k", "8", "--start", "part/spectrum.fdl"},
            {"part/spectrum.fdl", "partial", "--allow-partial"});
    allowed.insert(allowed.end(), {"--out", "more", "--start", "part/spectrum.fdl", "--allow-partial"});
    EXPECT_EQ(solve(allowed).code, 0);
    EXPECT_EQ(result("more").status, SpectrumStatus::partial);
}

TEST_F(SpectrumCommand, AnInterruptSavesWhatIsThere) {
    world_.put("path.edges", path_text(60000));
    Child child(FIEDLER_BINARY,
                {"spectrum", "path.edges", "-k", "40", "--method", "filter", "--tolerance", "1e-12", "--max-iterations",
                 "1000000", "--device", "cpu", "--out", "stopped"},
                world_.path());
    const auto solving = [&] {  // the folder under its temporary name is there
        for (const auto& entry : std::filesystem::directory_iterator(world_.path()))
            if (entry.path().filename().string().find("stopped") != std::string::npos) return true;
        return false;
    };
    while (child.running() && !solving()) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    child.send(SIGINT);
    const Outcome o = child.wait();
    EXPECT_EQ(o.code, 1) << o.err;
    EXPECT_HAS(o.err, "partial");
    EXPECT_EQ(result("stopped").status, SpectrumStatus::partial);
    for (const auto& entry : paths_below(world_.path())) EXPECT_EQ(entry.find("partial-"), entry.npos) << entry;
}

TEST_F(SpectrumCommand, BadGraphs) {
    refused({}, {"graph: nothing to solve"});
    refused({"absent.edges"}, {"absent.edges"});
    world_.put("empty.edges", "# nothing\n");
    refused({"empty.edges"}, {"empty.edges"});
    world_.put("words.edges", "0 1\n1 2\n2\n");
    refused({"words.edges"}, {"words.edges:3"});
    world_.put("negative.edges", "0 1 1.5\n1 2 -2\n");
    refused({"negative.edges"}, {"negative.edges:2"});
    world_.put("nan.edges", "0 1 1.5\n1 2 nan\n");
    refused({"nan.edges"}, {"nan.edges"});
    refused({"cycle.edges", "--nodes", "20"}, {"cycle.edges"});
    world_.put("wide.mtx", "%%MatrixMarket matrix coordinate real general\n3 4 1\n1 2 1\n");
    refused({"wide.mtx"}, {"wide.mtx"});
    world_.put("skew.mtx", "%%MatrixMarket matrix coordinate real general\n3 3 2\n1 2 1\n2 3 1\n");
    refused({"skew.mtx"}, {"skew.mtx", "symmetri"});
    world_.put("three.edges", "0 1\n2 3\n4 5\n");
    refused({"three.edges", "-k", "3"}, {"3 components", "--beyond-null", "--largest-component"});
    refused({"three.edges", "-k", "2"}, {"3 components"});
    refused({"cycle.edges", "three.edges"}, {"give one file"});
    refused({"--knn", "5", "absent.npy"}, {"absent.npy"});
    refused({"--tokens", "cycle.edges"}, {"cycle.edges"});
}

TEST_F(SpectrumCommand, BadFlags) {
    refused({"cycle.edges", "-k", "0"}, {"k = '0'", "1"});
    refused({"cycle.edges", "-k", "many"}, {"k = 'many'"});
    refused({"cycle.edges", "--combinatorial", "--normalised"}, {"--normalised", "contradict"});
    refused({"cycle.edges", "--laplacian", "signless"}, {"signless", "combinatorial"});
    refused({"cycle.edges", "--method", "magic"}, {"dense, filter, multilevel"});
    refused({"cycle.edges", "--knn", "3", "--feature-graph"}, {"give one"});
    refused({"cycle.edges", "--metric", "cosine"}, {"--metric", "--knn"});
    refused({"cycle.edges", "--labels", "cycle.edges"}, {"labels", "--plot"});
    refused({"cycle.edges", "--tolerence", "1e-3"}, {"did you mean tolerance"});
    refused({"cycle.edges", "--layers", "3"}, {"knob of other commands"});
    world_.put("file", "x");
    std::filesystem::create_directory(path("full"));
    world_.put("full/x", "x");
    refused({"cycle.edges", "--out", "full"}, {"full: exists already", "--out"});
    refused({"cycle.edges", "--out", "file/below"}, {"file"});
    refused({"cycle.edges", "-k", "3", "--plot", "full"}, {"full: is a folder"});
    refused({"cycle.edges", "-k", "3", "--plot", "absent/plot.svg"}, {"absent/"});
    refused({"cycle.edges", "-k", "3", "--plot", "p.svg", "--labels", "file"}, {"file"});
    world_.put("short.csv", "1,2\n3,4\n");
    refused({"cycle.edges", "-k", "3", "--start", "short.csv"}, {"short.csv", "2 rows", "40 nodes"});
    refused({"cycle.edges", "-k", "3", "--start", "absent.npy"}, {"absent.npy"});
    EXPECT_HAS(run({"spectrum", "--help"}).out, "largest-component");
    EXPECT_HAS(run({"--help"}).out, "spectrum");
}

}  // namespace
}  // namespace fiedler::test
