#include "engine/spectrum_file.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/tensor_fields.h"
#include "engine/weights.h"

namespace fiedler {

namespace {

constexpr int kVersion = 1;

// The one of an enum's `count` first values that has this name.
template <class E>
E enum_field(const WeightsFile& file, const char* name, int count) {
    const auto text = field<std::string>(file, name);
    for (int i = 0; i < count; ++i)
        if (text == name_of(static_cast<E>(i))) return static_cast<E>(i);
    corrupt(file.path(), fmt::format("its config says {} = '{}'", name, text));
}

// ---- graphs -----------------------------------------------------------------------------------------------------------

void check_rows(const std::string& path, const Graph& g) {
    const auto entries = static_cast<std::int64_t>(g.columns.size());
    if (g.offsets.front() != 0 || g.offsets.back() != entries) corrupt(path, "its row offsets do not fit its edges");
    for (std::int64_t i = 0; i < g.nodes; ++i) {
        const std::int64_t begin = g.offsets[i], end = g.offsets[i + 1];
        if (begin > end || end > entries) corrupt(path, fmt::format("the row offsets of node {} do not ascend", i));
        for (std::int64_t e = begin; e < end; ++e) {
            const std::int32_t j = g.columns[e];
            if (j < 0 || j >= g.nodes || j == i || (e > begin && g.columns[e - 1] >= j))
                corrupt(path, fmt::format("the neighbours of node {} are not other nodes in ascending order", i));
            if (!std::isfinite(g.weights[e]) || g.weights[e] <= 0)
                corrupt(path, fmt::format("the edge of {} and {} has the weight {}", i, j, g.weights[e]));
        }
    }
}

// Rows ascend, so the entries (i, j) of all rows i in turn meet the entries of row j from first to last.
void check_symmetry(const std::string& path, const Graph& g) {
    std::vector<std::int64_t> next(g.offsets.begin(), g.offsets.end() - 1);
    for (std::int64_t i = 0; i < g.nodes; ++i)
        for (std::int64_t e = g.offsets[i]; e < g.offsets[i + 1]; ++e) {
            const std::int32_t j = g.columns[e];
            const std::int64_t back = next[j]++;
            if (back >= g.offsets[j + 1] || g.columns[back] != i || g.weights[back] != g.weights[e])
                corrupt(path, fmt::format("the edge of {} and {} is not there in both directions", i, j));
        }
}

// ---- spectra ----------------------------------------------------------------------------------------------------------

void check_spectrum(const std::string& path, const Spectrum& s) {
    for (std::size_t j = 0; j < s.eigenvalues.size(); ++j) {
        const bool ascends = j == 0 || s.eigenvalues[j - 1] <= s.eigenvalues[j];
        if (!std::isfinite(s.eigenvalues[j]) || !ascends)
            corrupt(path,
                    fmt::format("eigenvalue {} is {}, after {}", j, s.eigenvalues[j], j ? s.eigenvalues[j - 1] : 0.0));
    }
    if (s.status == SpectrumStatus::partial) return;
    for (const double r : s.residuals)
        if (!std::isfinite(r)) corrupt(path, "a residual of a complete spectrum is not finite");
    for (const float x : s.vectors)
        if (!std::isfinite(x)) corrupt(path, "a vector of a complete spectrum is not finite");
}

}  // namespace

void write_graph(const std::string& path, const Graph& g, const Json& about) {
    std::vector<WeightTensor> tensors;
    const auto entries = static_cast<std::int64_t>(g.columns.size());
    add_tensor(tensors, "offsets", {g.nodes + 1}, g.offsets);
    add_tensor(tensors, "columns", {entries}, g.columns);
    add_tensor(tensors, "weights", {entries}, g.weights);
    const JoinedTexts names(g.names);
    if (!g.names.empty()) names.add(tensors, "name");
    const Json config = {
        {"kind", kGraphKind}, {"version", kVersion}, {"nodes", g.nodes}, {"edges", g.edges()}, {"about", about}};
    write_weights(path, config, tensors);
}

Graph read_graph_fdl(const std::string& path) {
    const WeightsFile file = open_kind(path, kGraphKind, kVersion, "give a graph");
    Graph g;
    g.nodes = count_field(file, "nodes", INT32_MAX);
    const std::int64_t edges = count_field(file, "edges", std::int64_t{1} << 48);
    g.offsets = read_tensor<std::int64_t>(file, "offsets", {g.nodes + 1});
    g.columns = read_tensor<std::int32_t, RawVector<std::int32_t>>(file, "columns", {2 * edges});
    g.weights = read_tensor<float, RawVector<float>>(file, "weights", {2 * edges});
    if (file.find("name_offsets")) g.names = read_texts(file, "name", g.nodes);
    check_rows(path, g);
    check_symmetry(path, g);
    return g;
}

Json summary_of(const Spectrum& s) {
    return {{"laplacian", name_of(s.kind)},
            {"method", name_of(s.method)},
            {"status", s.status == SpectrumStatus::complete ? "complete" : "partial"},
            {"why", s.why},
            {"nodes", s.nodes},
            {"edges", s.edges},
            {"zeros", s.zeros},
            {"k", s.count()},
            {"iterations", s.iterations},
            {"products", s.products},
            {"tolerance", s.tolerance},
            {"seconds", s.seconds},
            {"peak_bytes", s.peak_bytes},
            {"device", s.device}};
}

void write_spectrum(const std::string& path, const Spectrum& s, const Json& about) {
    std::vector<WeightTensor> tensors;
    add_tensor(tensors, "eigenvalues", {s.count()}, s.eigenvalues);
    add_tensor(tensors, "residuals", {s.count()}, s.residuals);
    add_tensor(tensors, "vectors", {s.nodes, s.count()}, s.vectors);
    Json config = {{"kind", kSpectrumKind}, {"version", kVersion}};
    config.update(summary_of(s));
    config["about"] = about;
    write_weights(path, config, tensors);
}

Spectrum read_spectrum(const std::string& path, bool allow_partial) {
    const WeightsFile file = open_kind(path, kSpectrumKind, kVersion, "give a spectrum that `fiedler spectrum` wrote");
    Spectrum s;
    s.kind = enum_field<LaplacianKind>(file, "laplacian", 2);
    s.method = enum_field<SpectrumMethod>(file, "method", 4);
    const auto status = field<std::string>(file, "status");
    if (status != "complete" && status != "partial") corrupt(path, "its config says status = '" + status + "'");
    s.status = status == "complete" ? SpectrumStatus::complete : SpectrumStatus::partial;
    s.why = field<std::string>(file, "why");
    if (s.status == SpectrumStatus::partial && !allow_partial)
        input_error("{}: is a partial result: {}; solve it to the end, or take it as it is with --allow-partial", path,
                    s.why.empty() ? "not all pairs converged" : s.why);
    s.nodes = count_field(file, "nodes", INT32_MAX);
    s.edges = count_field(file, "edges", std::int64_t{1} << 48);
    s.zeros = count_field(file, "zeros", s.nodes);
    s.iterations = field<std::int64_t>(file, "iterations");
    s.products = field<std::int64_t>(file, "products");
    s.tolerance = field<double>(file, "tolerance");
    s.seconds = field<double>(file, "seconds");
    s.peak_bytes = field<std::size_t>(file, "peak_bytes");
    s.device = field<std::string>(file, "device");
    const std::int64_t k = count_field(file, "k", s.nodes);
    s.eigenvalues = read_tensor<double>(file, "eigenvalues", {k});
    s.residuals = read_tensor<double>(file, "residuals", {k});
    s.vectors = read_tensor<float, RawVector<float>>(file, "vectors", {s.nodes, k});
    check_spectrum(path, s);
    return s;
}

bool is_fdl_kind(const std::string& path, const std::string& kind) {
    if (!is_weights_file(path)) return false;
    try {
        return WeightsFile(path, false).kind() == kind;
    } catch (const InputError&) {
        return false;
    }
}

}  // namespace fiedler
