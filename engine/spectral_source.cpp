#include "engine/spectral_source.h"

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/engine.h"
#include "engine/error.h"
#include "engine/files.h"
#include "engine/knn_graph.h"
#include "engine/matrix_files.h"
#include "engine/progress.h"
#include "engine/signals.h"
#include "engine/spectrum_file.h"
#include "engine/token_graph.h"
#include "engine/weights.h"

namespace fiedler {

namespace {

bool is_word(const std::string& value, std::initializer_list<const char*> words) {
    return std::any_of(words.begin(), words.end(), [&](const char* w) { return value == w; });
}

SpectralRows rows_of(const Config& c) {
    if (c.spectral_rows == "unit") return SpectralRows::unit;
    if (c.spectral_rows == "raw") return SpectralRows::raw;
    throw InputError(fmt::format("spectral-rows: '{}' is neither unit nor raw", c.spectral_rows));
}

bool reads_spectrum_file(const Config& c) {
    return c.spectral_dims > 0 && !is_word(c.spectral_source, {"corpus", "random"});
}

// Eigenvectors beyond the null space begin at this column: a file may hold the zeros too, or may not.
std::int64_t first_beyond_null(const Spectrum& s) {
    std::int64_t first = 0;
    while (first < std::min(s.zeros, s.count()) && s.eigenvalues[static_cast<std::size_t>(first)] <= 0) ++first;
    return first;
}

// ---- the dataset's own files ----------------------------------------------------------------------------------------

// Where what is made of the data is kept.
std::string derived_folder(const Dataset& data, const Config& c) {
    const DatasetInfo& info = data.info();
    if (info.split != "foreign") return info.folder;
    std::string what;
    for (const auto& shard : data.train().shards())
        what += fmt::format("{} {} {}\n", shard->info().path, shard->info().tokens,
                            hex64(hash_bytes(MappedFile(shard->info().path).text())));
    return join_path(c.data_cache.empty() ? "data/cache" : c.data_cache, "shards-" + hex64(hash_bytes(what)));
}

// Is there a file at path whose `about` says the same? A damaged one is made again.
bool is_current(const std::string& path, const Json& about, std::FILE* log) {
    if (!file_exists(path)) return false;
    try {
        return WeightsFile(path).config().value("about", Json()) == about;
    } catch (const InputError& damage) {
        if (log) fmt::print(log, "made again: {}\n", damage.what());
        return false;
    }
}

// What is made is kept where that is possible: a dataset may lie where nothing can be written.
template <class Write>
void keep(const std::string& folder, std::FILE* log, Write&& write) {
    try {
        make_folders(folder);
        write();
    } catch (const InputError& e) {
        if (log) fmt::print(log, "not kept for the next run: {}\n", e.what());
    }
}

Json about_graph(const Dataset& data, std::int32_t vocab, const TokenGraphOptions& o) {
    return {{"source", "token graph"},
            {"fingerprint", data.info().fingerprint},
            {"tokens", data.train().size()},
            {"vocabulary", vocab},
            {"window", o.window},
            {"inverse_distance", o.inverse_distance},
            {"weight", name_of(o.weight)},
            {"smoothing", o.smoothing},
            {"min_count", o.min_count},
            {"neighbours", o.neighbours}};
}

Graph graph_of_tokens(const Dataset& data, std::int32_t vocab, TokenGraphOptions options, std::FILE* log) {
    Progress progress(log, "token graph", 0);
    options.stop = [] { return stop_requested(); };
    options.progress = [&](const TokenGraphProgress& p) {
        progress.update(
            0, fmt::format("pass {} of {}, {} of {} tokens", p.pass, p.passes > 0 ? std::to_string(p.passes) : "?",
                           format_count(p.tokens), format_count(p.total)));
    };
    TokenGraphReport report;
    Graph graph = token_graph(data, options, report);
    progress.finish(fmt::format("{} edges between {} tokens ({} without), {}", format_count(report.edges), vocab,
                                report.isolated, format_seconds(report.seconds)));
    if (graph.nodes > vocab)
        input_error("vocab: the model has {} tokens and {} has {}; give --vocab {}", vocab, data.info().folder,
                    graph.nodes, graph.nodes);
    while (graph.nodes < vocab) {  // a model may have more tokens than the text: they are isolated nodes
        graph.offsets.push_back(graph.offsets.back());
        ++graph.nodes;
    }
    return graph;
}

[[noreturn]] void too_few(const Dataset& data, const Spectrum& s, std::int64_t k) {
    input_error(
        "spectral-dims: {} are asked for, and the token graph of {} has {} eigenvectors beyond its {} components (a "
        "token without neighbours is one); choose {} or fewer",
        k, data.info().folder, s.count(), s.zeros, s.count());
}

Spectrum solve(const Graph& graph, std::int64_t k, const Config& c, std::FILE* log) {
    SpectrumOptions o;
    o.k = k;
    o.beyond_null = true;
    o.threads = static_cast<int>(c.threads);
    o.memory_budget = static_cast<std::size_t>(c.memory_budget);
    o.stop = [] { return stop_requested(); };
    Progress progress(log, "spectrum", 0);
    o.progress = [&](const SpectrumProgress& p) {
        progress.update(0, fmt::format("{}: {} of {} pairs, worst residual {:.1e}", p.stage, p.converged, p.wanted,
                                       p.worst_residual));
    };
    Spectrum s = solve_spectrum(graph, o, choose_device(c.device) == DeviceKind::cuda);
    if (stop_requested()) run_error("interrupted while solving for the token graph's spectrum");
    if (s.status == SpectrumStatus::partial)
        run_error("the spectrum of the token graph did not converge: {}; choose fewer --spectral-dims", s.why);
    progress.finish(fmt::format("{} eigenvectors beyond {} components on {}, {}", s.count(), s.zeros, s.device,
                                format_seconds(s.seconds)));
    return s;
}

// ---- U and Lf -------------------------------------------------------------------------------------------------------

Spectrum spectrum_of_file(const Config& c, std::int64_t vocab) {
    const std::string& path = c.spectral_source;
    const std::int64_t k = c.spectral_dims;
    Spectrum s = read_spectrum(path, c.allow_partial);
    if (s.nodes != vocab)
        input_error(
            "spectral-source: {} is the spectrum of a graph of {} nodes, and the vocabulary has {} tokens; give a "
            "spectrum of the tokens' graph",
            path, s.nodes, vocab);
    if (const std::int64_t has = s.count() - first_beyond_null(s); has < k)
        input_error("spectral-dims: {} are asked for and {} has {} eigenvectors beyond the null space; choose {}", k,
                    path, has, has > 0 ? fmt::format("{} or fewer", has) : "another file");
    return s;
}

// The first `dim` columns, side by side.
std::vector<float> first_columns(std::span<const float> matrix, std::int64_t columns, std::int64_t first,
                                 std::int64_t dim) {
    std::vector<float> out;
    for (std::size_t row = 0; row < matrix.size(); row += static_cast<std::size_t>(columns))
        out.insert(out.end(), matrix.begin() + static_cast<std::ptrdiff_t>(row) + first,
                   matrix.begin() + static_cast<std::ptrdiff_t>(row) + first + dim);
    return out;
}

// vectors: [n, dim]. Eigenvectors are orthogonal: two are alike where they live in the same place (absolute).
HostLaplacian laplacian_of_vectors(const std::vector<float>& vectors, std::int32_t dim, FeatureSimilarity similarity,
                                   int threads) {
    FeatureOptions o;
    o.similarity = similarity;
    o.threads = threads;
    const auto n = static_cast<std::int64_t>(vectors.size()) / dim;
    return feature_laplacian(feature_graph(vectors.data(), n, dim, o));
}

HostLaplacian laplacian_of_file(const Config& c, std::int32_t dim) {
    const std::string& path = c.feature_laplacian;
    const auto threads = static_cast<int>(c.threads);
    if (is_fdl_kind(path, kSpectrumKind)) {
        const Spectrum s = read_spectrum(path, c.allow_partial);
        const std::int64_t first = first_beyond_null(s);
        if (s.count() - first < dim)
            input_error("feature-laplacian: {} has {} eigenvectors beyond the null space, and a head is {} wide", path,
                        s.count() - first, dim);
        return laplacian_of_vectors(first_columns(s.vectors, s.count(), first, dim), dim, FeatureSimilarity::absolute,
                                    threads);
    }
    const Matrix m = read_matrix(path);
    if (m.columns != dim)
        input_error(
            "feature-laplacian: {} has {} columns, and a head is {} wide (channels / heads); give as many columns",
            path, m.columns, dim);
    return laplacian_of_vectors(m.values, dim, FeatureSimilarity::correlation, threads);
}

}  // namespace

const char* name_of(FeatureSource s) {
    switch (s) {
        case FeatureSource::path:
            return "path";
        case FeatureSource::corpus:
            return "corpus";
        case FeatureSource::file:
            return "file";
    }
    return "?";
}

FeatureSource feature_source(const Config& c, const ModelSpec& spec) {
    const std::string& choice = c.feature_laplacian;
    const bool eigenvectors = spec.spectral_dims > 0 && c.spectral_source != "random";
    const bool enough = eigenvectors && spec.spectral_dims >= spec.head_dim();
    if (choice == "path" || (choice == "auto" && !enough)) return FeatureSource::path;
    if (!is_word(choice, {"auto", "corpus"})) return FeatureSource::file;
    if (spec.has_energies() && !eigenvectors)
        input_error(
            "feature-laplacian: corpus is made of the spectral embedding, and this model has {}; give --spectral-dims "
            "{}"
            " or more{}, or --feature-laplacian path",
            spec.spectral_dims > 0 ? "a random one" : "none", spec.head_dim(),
            spec.spectral_dims > 0 ? " with --spectral-source corpus" : "");
    if (spec.has_energies() && !enough)
        input_error(
            "feature-laplacian: corpus needs an eigenvector for each of the {} channels of a head, and spectral-dims "
            "is "
            "{}; give --spectral-dims {} or more, or --feature-laplacian path",
            spec.head_dim(), spec.spectral_dims, spec.head_dim());
    return FeatureSource::corpus;
}

void check_constants(const Config& c, const ModelSpec& spec) {
    const FeatureSource source = feature_source(c, spec);
    (void)rows_of(c);
    if (reads_spectrum_file(c)) {
        if (!file_exists(c.spectral_source))
            input_error(
                "spectral-source: there is no file '{}'; give corpus, random or a spectrum that `fiedler spectrum` "
                "wrote",
                c.spectral_source);
        (void)spectrum_of_file(c, spec.vocab);
    }
    if (!spec.has_energies() || source != FeatureSource::file) return;
    if (!file_exists(c.feature_laplacian))
        input_error(
            "feature-laplacian: there is no file '{}'; give path, corpus, auto, a .npy or CSV matrix, or a spectrum",
            c.feature_laplacian);
    (void)laplacian_of_file(c, spec.head_dim());
}

Spectrum token_spectrum(const Dataset& data, std::int32_t vocab, std::int64_t k, const Config& c, std::FILE* log) {
    const std::string folder = derived_folder(data, c);
    TokenGraphOptions options;
    options.threads = static_cast<int>(c.threads);
    const Json graph_about = about_graph(data, vocab, options);
    Json about = graph_about;
    about["source"] = "spectrum of the token graph";
    about["k"] = k;
    const std::string graph_path = join_path(folder, "token_graph.fdl"),
                      path = join_path(folder, fmt::format("spectrum-{}.fdl", k));
    Spectrum s;
    if (is_current(path, about, log)) {
        s = read_spectrum(path, false);
        if (log) fmt::print(log, "using the spectrum made before: {}\n", path);
    } else {
        Graph graph;
        if (is_current(graph_path, graph_about, log)) {
            graph = read_graph_fdl(graph_path);
        } else {
            graph = graph_of_tokens(data, vocab, options, log);
            keep(folder, log, [&] { write_graph(graph_path, graph, graph_about); });
        }
        s = solve(graph, k, c, log);
        if (s.count() < k) too_few(data, s, k);
        s.seconds = 0;  // the same corpus gives the same bytes
        keep(folder, log, [&] { write_spectrum(path, s, about); });
    }
    return s;
}

ModelConstants make_constants(const Config& c, const ModelSpec& spec, const Dataset& data, std::FILE* log,
                              Json& report) {
    ModelConstants constants;
    report = Json::object();
    if (spec.spectral_dims > 0 && c.spectral_source == "random") {
        constants.spectral = random_spectral_table(spec, static_cast<std::uint64_t>(c.seed));
        report["spectral"] = {{"dims", spec.spectral_dims}, {"source", "random"}};
    } else if (spec.spectral_dims > 0) {
        const Spectrum s = c.spectral_source == "corpus" ? token_spectrum(data, spec.vocab, spec.spectral_dims, c, log)
                                                         : spectrum_of_file(c, spec.vocab);
        const std::int64_t first = first_beyond_null(s);
        constants.spectral = spectral_table(spec, s.vectors, s.count(), first, rows_of(c));
        report["spectral"] = {
            {"dims", spec.spectral_dims},
            {"source", c.spectral_source},
            {"rows", c.spectral_rows},
            {"edges", s.edges},
            {"components", s.zeros},
            {"smallest_eigenvalue", s.eigenvalues[static_cast<std::size_t>(first)]},
            {"largest_eigenvalue", s.eigenvalues[static_cast<std::size_t>(first + spec.spectral_dims - 1)]}};
    }
    if (!spec.has_energies()) return constants;
    const std::int32_t dim = spec.head_dim();
    const FeatureSource source = feature_source(c, spec);
    if (source == FeatureSource::path) constants.laplacian = path_laplacian(dim);
    if (source == FeatureSource::corpus)
        constants.laplacian = laplacian_of_vectors(first_columns(constants.spectral, spec.spectral_columns(), 0, dim),
                                                   dim, FeatureSimilarity::absolute, static_cast<int>(c.threads));
    if (source == FeatureSource::file) constants.laplacian = laplacian_of_file(c, dim);
    if (constants.laplacian.dim != dim) throw std::logic_error("the feature Laplacian has the wrong size");
    report["feature_laplacian"] = {{"source", source == FeatureSource::file ? c.feature_laplacian : name_of(source)},
                                   {"entries", constants.laplacian.values.size()},
                                   {"largest_eigenvalue", constants.laplacian.eigenvalues.back()}};
    return constants;
}

}  // namespace fiedler
