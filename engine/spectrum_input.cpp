#include "engine/spectrum_input.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "engine/dataset.h"
#include "engine/error.h"
#include "engine/knn_graph.h"
#include "engine/matrix_files.h"
#include "engine/progress.h"
#include "engine/signals.h"
#include "engine/spectrum_file.h"
#include "engine/token_graph.h"
#include "engine/weights.h"

namespace fiedler {

GraphFileOptions graph_file_options(const Config& c) {
    GraphFileOptions o;
    o.format = c.graph_format;
    o.header = c.header;
    o.from = c.from_column;
    o.to = c.to_column;
    o.weight = c.weight_column;
    o.ids = c.ids;
    o.first_id = c.first_id;
    o.gaps = c.gaps;
    o.nodes = c.nodes;
    o.nodes_file = c.nodes_file;
    o.symmetrise = c.symmetrise;
    return o;
}

namespace {

enum class Origin { text, fdl, knn, features, tokens };
constexpr const char* kOriginNames[] = {"edges", "graph file", "nearest neighbours", "features", "token graph"};

// Knobs that only one kind of source has.
struct SourceKnobs {
    Origin origin;
    const char* of;
    std::vector<const char*> names;
};
const std::vector<SourceKnobs>& source_knobs() {
    static const std::vector<SourceKnobs> all = {
        {Origin::text,
         "text files of graphs",
         {"graph-format", "from-column", "to-column", "weight-column", "ids", "first-id", "gaps", "nodes", "nodes-file",
          "symmetrise"}},
        {Origin::knn, "--knn", {"metric"}},
        {Origin::features, "--feature-graph", {"feature-neighbours", "feature-similarity"}},
        {Origin::tokens, "--tokens", {"window", "token-weight", "min-count", "token-neighbours"}}};
    return all;
}

Origin origin_of(const Invocation& call) {
    const Config& c = call.config;
    if (c.graph.empty())
        throw InputError("graph: nothing to solve; name the file of a graph, or of vectors with --knn N");
    const int kinds = (c.knn > 0) + c.feature_graph + c.tokens;
    if (kinds > 1) throw InputError("graph: --knn, --feature-graph and --tokens exclude each other: give one");
    const Origin origin = c.knn > 0                     ? Origin::knn
                          : c.feature_graph             ? Origin::features
                          : c.tokens                    ? Origin::tokens
                          : is_weights_file(c.graph[0]) ? Origin::fdl
                                                        : Origin::text;
    if (c.graph.size() > 1 && origin != Origin::tokens)
        input_error("graph: {} and {}: give one file", c.graph[0], c.graph[1]);
    for (const SourceKnobs& s : source_knobs())
        for (const char* name : s.names)
            if (s.origin != origin && call.given(name)) input_error("--{} is for {}: leave it out", name, s.of);
    if (origin != Origin::knn && origin != Origin::features && call.given("knn-weight"))
        throw InputError("--knn-weight is for --knn and --feature-graph: leave it out");
    return origin;
}

// "some/cora.edges" -> "cora", "wordnet/edges.tsv" -> "wordnet"
std::string name_of_path(const std::string& path) {
    const std::filesystem::path normal = std::filesystem::path(path).lexically_normal();
    const std::filesystem::path file = normal.has_filename() ? normal : normal.parent_path();
    const std::string name = file.stem().string(), folder = file.parent_path().filename().string();
    if ((name == "edges" || name == "graph") && !folder.empty() && folder != "..") return folder;
    return name.empty() || name == "." || name == ".." ? "graph" : name;
}

// ---- sources ------------------------------------------------------------------------------------------------------------

Graph read_text(const Config& c, std::FILE* words, Json& about) {
    const GraphFileOptions o = graph_file_options(c);
    GraphFileReport report;
    Graph g = read_graph(c.graph[0], o, report);
    std::string text = report.text();
    while (text.ends_with('\n')) text.pop_back();
    fmt::print(words, "{}\n", text);
    about["format"] = name_of(report.format);
    about["weighted"] = report.weighted();
    about["lines"] = report.notes.lines;
    return g;
}

// A token as one line of text.
std::string visible(const std::string& piece, std::int64_t token) {
    std::string text;
    for (const char c : piece)
        if (c == '\n')
            text += "\\n";
        else if (c == '\t')
            text += "\\t";
        else if (static_cast<unsigned char>(c) < ' ' || c == 127)
            text += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
        else
            text += c;
    return text.empty() ? fmt::format("<{}>", token) : text;
}

Graph read_tokens(const Config& c, std::FILE* words, Json& about) {
    TokenGraphOptions o;
    o.window = static_cast<std::int32_t>(c.window);
    o.weight = c.token_weight;
    o.min_count = c.min_count;
    o.neighbours = static_cast<std::int32_t>(c.token_neighbours);
    o.threads = static_cast<int>(c.threads);
    o.stop = [] { return stop_requested(); };
    Progress progress(words, "token graph", 0);
    o.progress = [&](const TokenGraphProgress& p) {
        progress.update(
            0, fmt::format("pass {} of {}, {} of {} tokens", p.pass, p.passes > 0 ? std::to_string(p.passes) : "?",
                           format_count(p.tokens), format_count(p.total)));
    };
    about["window"] = o.window;
    about["weight"] = name_of(o.weight);
    about["min_count"] = o.min_count;
    about["neighbours"] = o.neighbours;
    TokenGraphReport report;
    Graph g;
    if (c.graph.size() == 1) {
        const Dataset data = Dataset::open(c.graph[0]);
        g = token_graph(data, o, report);
        if (const Tokenizer* t = data.tokenizer())
            for (std::int64_t i = 0; i < g.nodes; ++i)
                g.names.push_back(visible(i < t->vocab_size() ? t->piece(static_cast<std::int32_t>(i)) : "", i));
    } else {
        std::int32_t vocab = 0;
        for (const std::string& path : c.graph) {
            const ShardInfo info = Shard(path).info();
            vocab = std::max({vocab, info.vocab_size, info.max_token + 1});
        }
        g = token_graph(c.graph, vocab, o, report);
    }
    progress.finish(fmt::format("{} tokens read", format_count(report.tokens)));
    fmt::print(words, "{}", report.text());
    return g;
}

// Nearest neighbours of the rows, or likeness of the columns.
Graph read_vectors(const Config& c, bool features, bool cuda, std::FILE* words, Json& about) {
    const Matrix m = read_matrix(c.graph[0]);
    fmt::print(words, "{}: {} vectors of {} numbers\n", c.graph[0], m.rows, m.columns);
    Progress progress(words, features ? "alike features" : "nearest neighbours", 0);
    KnnRun run;
    run.cuda = cuda;
    run.threads = static_cast<int>(c.threads);
    run.budget = static_cast<std::size_t>(c.memory_budget);
    run.progress = [&](std::int64_t done, std::int64_t total) {
        progress.update(0, fmt::format("{} of {}", format_count(done), format_count(total)));
    };
    about["vectors"] = m.rows;
    about["columns"] = m.columns;
    if (features) {
        FeatureOptions o{run, c.feature_neighbours, c.feature_similarity, FeatureOptions{}.weight};
        if (c.knn_weight) o.weight = *c.knn_weight;
        about["neighbours"] = o.neighbours;
        about["similarity"] = name_of(o.similarity);
        about["weight"] = name_of(o.weight);
        Graph g = feature_graph(m.values.data(), m.rows, m.columns, o);
        g.names = m.names;
        return g;
    }
    KnnOptions o{run, c.knn, c.metric, KnnOptions{}.weight};
    if (c.knn_weight) o.weight = *c.knn_weight;
    about["neighbours"] = o.neighbours;
    about["metric"] = name_of(o.metric);
    about["weight"] = name_of(o.weight);
    return knn_graph(m.values.data(), m.rows, m.columns, o);
}

// ---- what was asked for on top --------------------------------------------------------------------------------------------

template <class T>
std::vector<T> picked(const std::vector<T>& all, const std::vector<std::int32_t>& kept) {
    std::vector<T> some;
    some.reserve(kept.size());
    for (const std::int32_t i : kept) some.push_back(all[static_cast<std::size_t>(i)]);
    return some;
}

void keep_largest_component(SpectrumInput& in) {
    const Components components = find_components(in.graph);
    Graph g = largest_component(in.graph, components, in.kept);
    if (g.names.empty() && g.nodes < in.graph.nodes)  // rows no longer are the numbers of the input
        for (const std::int32_t i : in.kept) g.names.push_back(std::to_string(i));
    if (!in.labels.empty()) in.labels = picked(in.labels, in.kept);
    in.graph = std::move(g);
    in.about["component"] = "largest";
}

}  // namespace

SpectrumInput read_spectrum_input(const Invocation& call, bool cuda, std::FILE* words) {
    const Config& c = call.config;
    const Origin origin = origin_of(call);
    if (c.plot.empty() && !c.labels.empty())
        throw InputError("labels: they are the colours of a plot; add --plot FILE.svg, or leave them out");
    if (c.labels.empty() && !(c.label_column + c.label_id).empty())
        throw InputError("label-column: of which file? Add --labels FILE");
    SpectrumInput in;
    in.name = name_of_path(c.graph[0]);
    in.about["kind"] = kOriginNames[static_cast<int>(origin)];
    in.about["source"] = c.graph;
    switch (origin) {
        case Origin::text:
            in.graph = read_text(c, words, in.about);
            break;
        case Origin::fdl:
            in.graph = read_graph_fdl(c.graph[0]);
            break;
        case Origin::tokens:
            in.graph = read_tokens(c, words, in.about);
            break;
        case Origin::knn:
        case Origin::features:
            in.graph = read_vectors(c, origin == Origin::features, cuda, words, in.about);
            break;
    }
    if (in.graph.nodes == 0) input_error("{}: the graph is empty: it has no nodes", c.graph[0]);
    in.all_nodes = in.graph.nodes;
    if (!c.labels.empty()) in.labels = read_labels(c.labels, in.graph, {.id = c.label_id, .label = c.label_column});
    if (c.largest_component) keep_largest_component(in);
    return in;
}

}  // namespace fiedler
