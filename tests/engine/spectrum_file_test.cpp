// Graphs and spectra as .fdl files: they come back as they were, NumPy reads and writes them, and whatever is not what
// it says it is, is refused.
#include "engine/spectrum_file.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "engine/bundle.h"
#include "engine/weights.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

Graph small_graph(bool names) {
    std::vector<Edge> edges = {{0, 1, 0.5f}, {1, 2, 2}, {2, 0, 1.25f}, {4, 5, 1e-3f}};
    Graph g = build_graph(7, edges);
    if (names) g.names = {"a", "", "with space", "\xc3\xa9t\xc3\xa9", "x\ny", std::string("nul\0l", 5), "z"};
    return g;
}

Spectrum small_spectrum() {
    Spectrum s;
    s.kind = LaplacianKind::combinatorial;
    s.method = SpectrumMethod::filter;
    s.status = SpectrumStatus::complete;
    s.why = "a test";
    s.nodes = 5;
    s.edges = 4;
    s.zeros = 2;
    s.iterations = 3;
    s.products = 77;
    s.tolerance = 1e-6;
    s.seconds = 0.25;
    s.peak_bytes = 1 << 20;
    s.device = "CPU";
    s.eigenvalues = {0, 0, 0.1234567890123456789};
    s.residuals = {1e-18, 0, 3e-7};
    for (int i = 0; i < 15; ++i) s.vectors.push_back(0.1f * static_cast<float>(i) - 0.7f);
    return s;
}

class SpectrumFile : public testing::Test {
  protected:
    void SetUp() override {
        write_graph(graph_, small_graph(true), {{"source", "test"}});
        write_spectrum(spectrum_, small_spectrum(), {{"source", "test"}});
    }
    // The file again with another config or other tensors, everything about it consistent.
    template <class Change>
    void rewrite(const std::string& path, Change&& change) const {
        Json config;
        std::vector<std::string> bytes;
        std::vector<WeightTensor> tensors;
        {
            const WeightsFile file(path);
            config = file.config();
            tensors = file.tensors();
            for (WeightTensor& t : tensors) bytes.emplace_back(static_cast<const char*>(t.data), t.bytes());
        }
        for (std::size_t i = 0; i < tensors.size(); ++i) tensors[i].data = bytes[i].data();
        change(config, tensors, bytes);
        write_weights(path, config, tensors);
    }
    template <class T>
    void poke(const std::string& path, const std::string& tensor, std::size_t at, T value) const {
        rewrite(path, [&](Json&, const std::vector<WeightTensor>& tensors, std::vector<std::string>& bytes) {
            for (std::size_t i = 0; i < tensors.size(); ++i)
                if (tensors[i].name == tensor) std::memcpy(bytes[i].data() + at * sizeof(T), &value, sizeof(T));
        });
    }
    void change_config(const std::string& path, const std::string& name, const Json& value) const {
        rewrite(path, [&](Json& config, const auto&, const auto&) {
            if (value.is_discarded())
                config.erase(name);
            else
                config[name] = value;
        });
    }
    void drop_tensor(const std::string& path, const std::string& name) const {
        rewrite(path, [&](Json&, std::vector<WeightTensor>& tensors, const auto&) {
            std::erase_if(tensors, [&](const WeightTensor& t) { return t.name == name; });
        });
    }
    void refused_graph(const std::string& part) const {
        const std::string message = input_error_of([&] { read_graph_fdl(graph_); });
        EXPECT_HAS(message, graph_);
        EXPECT_HAS(message, part);
    }
    void refused_spectrum(const std::string& part) const {
        const std::string message = input_error_of([&] { read_spectrum(spectrum_, true); });
        EXPECT_HAS(message, spectrum_);
        EXPECT_HAS(message, part);
    }

    TempFolder folder_;
    const std::string graph_ = folder_ / "graph.fdl", spectrum_ = folder_ / "spectrum.fdl";
};

TEST_F(SpectrumFile, GraphsComeBack) {
    for (const bool names : {true, false}) {
        const Graph g = small_graph(names);
        write_graph(graph_, g, Json::object());
        const Graph back = read_graph_fdl(graph_);
        EXPECT_EQ(back.nodes, g.nodes);
        EXPECT_EQ(back.offsets, g.offsets);
        EXPECT_EQ(back.columns, g.columns);
        EXPECT_EQ(back.weights, g.weights);
        EXPECT_EQ(back.names, g.names);
    }
    EXPECT_TRUE(is_fdl_kind(graph_, kGraphKind));
    EXPECT_FALSE(is_fdl_kind(graph_, kSpectrumKind));
    EXPECT_FALSE(is_fdl_kind(folder_ / "absent", kGraphKind));
    EXPECT_EQ(WeightsFile(spectrum_).config().at("about").at("source"), "test");
}

TEST_F(SpectrumFile, GraphsWithoutEdgesOrNodesComeBack) {
    for (const std::int64_t nodes : {0, 1, 3}) {
        write_graph(graph_, build_graph(nodes, {}), Json::object());
        const Graph back = read_graph_fdl(graph_);
        EXPECT_EQ(back.nodes, nodes);
        EXPECT_EQ(back.edges(), 0);
        EXPECT_EQ(back.offsets.size(), static_cast<std::size_t>(nodes) + 1);
    }
}

TEST_F(SpectrumFile, SpectraComeBack) {
    const Spectrum s = small_spectrum(), back = read_spectrum(spectrum_, false);
    EXPECT_EQ(summary_of(back), summary_of(s));
    EXPECT_EQ(back.kind, LaplacianKind::combinatorial);
    EXPECT_EQ(back.method, SpectrumMethod::filter);
    EXPECT_EQ(back.eigenvalues, s.eigenvalues);
    EXPECT_EQ(back.residuals, s.residuals);
    EXPECT_EQ(back.vectors, s.vectors);
    Spectrum none = s;
    none.status = SpectrumStatus::partial;
    none.eigenvalues.clear(), none.residuals.clear(), none.vectors.clear();
    write_spectrum(spectrum_, none, Json::object());
    EXPECT_EQ(read_spectrum(spectrum_, true).count(), 0);
}

TEST_F(SpectrumFile, APartialResultIsRefusedUnlessAllowed) {
    Spectrum s = small_spectrum();
    s.status = SpectrumStatus::partial;
    s.why = "stopped after 3 iterations";
    s.residuals[2] = NAN;
    write_spectrum(spectrum_, s, Json::object());
    const std::string message = input_error_of([&] { read_spectrum(spectrum_, false); });
    EXPECT_HAS(message, spectrum_);
    EXPECT_HAS(message, "partial result: stopped after 3 iterations");
    EXPECT_HAS(message, "--allow-partial");
    EXPECT_EQ(read_spectrum(spectrum_, true).status, SpectrumStatus::partial);
}

TEST_F(SpectrumFile, OtherFilesAreRefused) {
    EXPECT_HAS(input_error_of([&] { read_graph_fdl(spectrum_); }), "a spectrum and no graph");
    EXPECT_HAS(input_error_of([&] { read_spectrum(graph_, true); }), "a graph and no spectrum");
    const float value = 1;
    write_weights(graph_, {{"model", Json::object()}}, std::vector<WeightTensor>{{"w", "f32", {1}, &value}});
    refused_graph("one of weights and no graph");
    folder_.put("graph.fdl", "0 1\n1 2\n");
    refused_graph("is not a Fiedler weights file");
    EXPECT_HAS(input_error_of([&] { load_bundle(spectrum_); }), "no model");
    const std::string whole = slurp(spectrum_);
    for (std::size_t n = 4; n < whole.size(); n += 97) {
        folder_.put("spectrum.fdl", whole.substr(0, n));
        refused_spectrum("truncated");
    }
    std::string flipped = whole;
    flipped[whole.size() - 200] = static_cast<char>(flipped[whole.size() - 200] ^ 1);
    folder_.put("spectrum.fdl", flipped);
    refused_spectrum("corrupt");
    folder_.put("spectrum.fdl", whole);
    for (const Json& version : {Json(2), Json(99)}) {
        change_config(spectrum_, "version", version);
        refused_spectrum("use a newer fiedler");
    }
    for (const Json& version : {Json(0), Json("1"), Json(1.5), Json::parse("!", nullptr, false)}) {
        folder_.put("spectrum.fdl", whole);
        change_config(spectrum_, "version", version);
        refused_spectrum("lacks a version");
    }
}

TEST_F(SpectrumFile, GraphsThatBreakTheirPromisesAreRefused) {
    const std::string whole = slurp(graph_);
    const auto broken = [&](const std::string& part, auto&& change) {
        SCOPED_TRACE(part);
        folder_.put("graph.fdl", whole);
        ASSERT_NO_THROW(read_graph_fdl(graph_));
        change();
        refused_graph(part);
    };
    // Rows: 0: 1 2   1: 0 2   2: 0 1   3:   4: 5   5: 4   6:
    broken("not fit", [&] { poke<std::int64_t>(graph_, "offsets", 7, 7); });
    broken("not fit", [&] { poke<std::int64_t>(graph_, "offsets", 0, 1); });
    broken("do not ascend", [&] { poke<std::int64_t>(graph_, "offsets", 2, 1); });
    broken("do not ascend", [&] { poke<std::int64_t>(graph_, "offsets", 1, std::int64_t{1} << 40); });
    broken("ascending order", [&] { poke<std::int32_t>(graph_, "columns", 1, 1); });
    broken("ascending order", [&] { poke<std::int32_t>(graph_, "columns", 0, 0); });
    broken("ascending order", [&] { poke<std::int32_t>(graph_, "columns", 7, 7); });
    broken("ascending order", [&] { poke<std::int32_t>(graph_, "columns", 0, -1); });
    broken("both directions", [&] { poke<std::int32_t>(graph_, "columns", 6, 6); });
    broken("both directions", [&] { poke<float>(graph_, "weights", 0, 0.75f); });
    for (const float w : {0.f, -1.f, NAN, INFINITY})
        broken("the weight", [&] { poke<float>(graph_, "weights", 3, w); });
    broken("no tensor 'weights'", [&] { drop_tensor(graph_, "weights"); });
    broken("lies outside", [&] { poke<std::int64_t>(graph_, "name_offsets", 2, 1000); });
    broken("lies outside", [&] { poke<std::int64_t>(graph_, "name_offsets", 3, 0); });
    broken("impossible", [&] { poke<std::int64_t>(graph_, "name_offsets", 7, -1); });
    broken("no tensor 'name_bytes'", [&] { drop_tensor(graph_, "name_bytes"); });
    broken("nodes = -1", [&] { change_config(graph_, "nodes", -1); });
    broken("tensor 'offsets' is i64 [8]", [&] { change_config(graph_, "nodes", 8); });
    broken("tensor 'columns' is i32 [8]", [&] { change_config(graph_, "edges", 3); });
    broken("lacks the field 'edges'", [&] { change_config(graph_, "edges", "many"); });
}

TEST_F(SpectrumFile, SpectraThatBreakTheirPromisesAreRefused) {
    const std::string whole = slurp(spectrum_);
    const auto broken = [&](const std::string& part, auto&& change) {
        SCOPED_TRACE(part);
        folder_.put("spectrum.fdl", whole);
        ASSERT_NO_THROW(read_spectrum(spectrum_, false));
        change();
        refused_spectrum(part);
    };
    broken("eigenvalue 2", [&] { poke<double>(spectrum_, "eigenvalues", 1, 0.2); });
    broken("eigenvalue 0", [&] { poke<double>(spectrum_, "eigenvalues", 0, NAN); });
    broken("residual", [&] { poke<double>(spectrum_, "residuals", 1, NAN); });
    broken("not finite", [&] { poke<float>(spectrum_, "vectors", 7, INFINITY); });
    broken("status = 'done'", [&] { change_config(spectrum_, "status", "done"); });
    broken("laplacian = 'signless'", [&] { change_config(spectrum_, "laplacian", "signless"); });
    broken("method = 'magic'", [&] { change_config(spectrum_, "method", "magic"); });
    broken("k = 6", [&] { change_config(spectrum_, "k", 6); });
    broken("tensor 'eigenvalues'", [&] { change_config(spectrum_, "k", 2); });
    broken("zeros = 9", [&] { change_config(spectrum_, "zeros", 9); });
    broken("lacks the field 'device'", [&] { change_config(spectrum_, "device", 5); });
    broken("no tensor 'residuals'", [&] { drop_tensor(spectrum_, "residuals"); });
}

TEST_F(SpectrumFile, NumPyReadsSpectraAndWritesGraphs) {
    if (std::system("python3 -c 'import numpy' 2>/dev/null") != 0) GTEST_SKIP() << "NO NUMPY, NOT TESTED";
    const std::string script = folder_.put("check.py", R"(
import sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import numpy as np
from read_fdl import read_fdl
from write_fdl import write_graph
config, t = read_fdl(sys.argv[2])
assert config["kind"] == "spectrum" and config["zeros"] == 2, config
assert t["eigenvalues"].dtype == np.float64 and t["eigenvalues"][2] == 0.1234567890123456789
assert t["vectors"].shape == (5, 3) and t["vectors"].dtype == np.float32
config, t = read_fdl(sys.argv[3])
assert t["offsets"].tolist() == [0, 2, 4, 6, 6, 7, 8, 8] and t["columns"].dtype == np.int32, t
assert bytes(t["name_bytes"][:1]) == b"a"
ring = 1000  # large enough for several blocks of the hash
columns = np.sort(np.stack([(np.arange(ring) - 1) % ring, (np.arange(ring) + 1) % ring], 1), 1)
write_graph(sys.argv[4], 2 * np.arange(ring + 1), columns.reshape(-1))
)");
    const std::string out = folder_ / "ring.fdl";
    const std::string command =
        "python3 '" + script + "' '" FIEDLER_SOURCE_DIR "/tools' '" + spectrum_ + "' '" + graph_ + "' '" + out + "'";
    ASSERT_EQ(std::system(command.c_str()), 0);
    const Graph ring = read_graph_fdl(out);
    EXPECT_EQ(ring.nodes, 1000);
    EXPECT_EQ(ring.edges(), 1000);
    EXPECT_EQ(find_components(ring).count, 1);
}

}  // namespace
}  // namespace fiedler::test
