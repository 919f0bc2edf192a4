#include "engine/node_samples.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/feature_files.h"
#include "engine/graph_files.h"
#include "engine/log.h"
#include "engine/progress.h"
#include "engine/signals.h"
#include "engine/spectrum.h"
#include "engine/spectrum_input.h"

namespace fiedler {

namespace {

constexpr const char* kPartNames[] = {"train", "val", "test", "none"};

bool is_unknown(const std::string& label) { return label.empty() || label == "-1"; }

class NodeSamples final : public SampleSource {
  public:
    NodeSamples(const Config&, const TrainedSamples*, std::FILE* words);

    const SampleShape& shape() const override { return shape_; }
    std::span<const std::int64_t> samples(Part) const override { return {&kOnly, 1}; }
    std::int64_t known(Part p) const override { return known_[static_cast<std::size_t>(p)]; }
    std::int64_t nodes_of(std::int64_t) const override { return graph_.nodes; }
    std::int64_t edges_of(std::int64_t) const override { return static_cast<std::int64_t>(graph_.columns.size()); }
    std::int64_t feature_entries_of(std::int64_t) const override {
        return shape_.dense ? 0 : static_cast<std::int64_t>(features_.values.size());
    }
    void gather(std::span<const std::int64_t>, Part, SampleBatch&) const override;
    std::string row_name(std::int64_t, std::int64_t node) const override {
        return graph_.names.empty() ? std::to_string(node + first_id_) : graph_.names[static_cast<std::size_t>(node)];
    }
    std::string fingerprint() const override;
    std::string text() const override;

  private:
    void read_features_and_graph(const Config&, const TrainedSamples*);
    void read_targets(const Config&, const TrainedSamples*);
    void read_split(const Config&, const TrainedSamples*);
    void find_spectrum(const Config&, bool trained, std::FILE* words);

    static constexpr std::int64_t kOnly = 0;
    SampleShape shape_;
    Graph graph_;
    bool weighted_ = false;
    int first_id_ = 0;
    FeatureRows features_;
    std::vector<float> dense_, spectral_;
    std::vector<std::int32_t> class_of_;  // [nodes], -1: not known
    std::vector<Part> part_of_;           // [nodes]
    std::array<std::int64_t, 4> known_{}, rows_{};
};

void NodeSamples::read_features_and_graph(const Config& c, const TrainedSamples* trained) {
    if (c.graph.empty()) throw InputError("graph: --task nodes needs a graph; give --graph with a file of edges");
    if (c.graph.size() > 1) input_error("graph: {} and {}: give one file", c.graph[0], c.graph[1]);
    GraphFileOptions options = graph_file_options(c);
    if (!c.features.empty()) {
        features_ = read_features(c.features);
        if (features_.rows() == 0 || features_.columns == 0)
            input_error("{}: no features; give a row for each node", c.features);
        if (options.nodes == 0 && options.nodes_file.empty() && options.ids != GraphIds::names)
            options.nodes = features_.rows();
        if (c.normalise_features) normalise_rows(features_);
    }
    GraphFileReport report;
    graph_ = read_graph(c.graph[0], options, report);
    weighted_ = report.weighted();
    first_id_ = report.ids == GraphIds::numbers ? report.first_id : 0;
    if (c.features.empty()) {  // a node without features: one that all have
        features_.columns = 1;
        for (std::int64_t i = 0; i < graph_.nodes; ++i) {
            features_.column_of.push_back(0), features_.values.push_back(1);
            features_.offsets.push_back(static_cast<std::int32_t>(i + 1));
        }
    }
    if (features_.rows() != graph_.nodes)
        input_error(
            "{}: {} rows of features for the {} nodes of {}; give one a node (--nodes-file lists nodes without "
            "an edge)",
            c.features, features_.rows(), graph_.nodes, c.graph[0]);
    if (trained && features_.columns != trained->shape.features)
        input_error("{}: features of {} columns, but the model was trained on {}; give the same columns",
                    c.features.empty() ? std::string("features") : c.features, features_.columns,
                    trained->shape.features);
    if (static_cast<std::int64_t>(graph_.columns.size()) > std::numeric_limits<std::int32_t>::max())
        input_error("{}: {} edges are too many for one sample", c.graph[0], graph_.edges());
}

void NodeSamples::read_targets(const Config& c, const TrainedSamples* trained) {
    class_of_.assign(static_cast<std::size_t>(graph_.nodes), -1);
    if (trained) shape_.names = trained->shape.names, shape_.outputs = trained->shape.outputs;
    if (c.node_labels.empty()) {
        if (!trained) throw InputError("node-labels: nothing to learn; give --node-labels with a label for each node");
        return;
    }
    const std::vector<std::string> labels = read_labels(c.node_labels, graph_);
    std::map<std::string, std::int32_t> number;
    if (trained) {
        for (const std::string& name : shape_.names) number.emplace(name, static_cast<std::int32_t>(number.size()));
        for (std::size_t i = 0; i < shape_.names.size(); ++i) number[shape_.names[i]] = static_cast<std::int32_t>(i);
    } else {
        for (const std::string& l : labels)
            if (!is_unknown(l)) number.emplace(l, 0);
        std::vector<std::string> names;
        for (const auto& [name, n] : number) names.push_back(name);
        // Numbers in the order of numbers: class 10 after class 9.
        if (std::all_of(names.begin(), names.end(), [](const std::string& n) {
                return n.size() < 18 && n.find_first_not_of("0123456789") == n.npos;
            }))
            std::sort(names.begin(), names.end(),
                      [](const std::string& a, const std::string& b) { return std::stoll(a) < std::stoll(b); });
        for (std::size_t i = 0; i < names.size(); ++i) number[names[i]] = static_cast<std::int32_t>(i);
        shape_.names = std::move(names);
        shape_.outputs = static_cast<std::int32_t>(shape_.names.size());
        if (shape_.outputs < 2)
            input_error("{}: {} different labels; a model needs two or more to tell apart", c.node_labels,
                        shape_.outputs);
    }
    for (std::size_t i = 0; i < labels.size(); ++i) {
        if (is_unknown(labels[i])) continue;
        const auto found = number.find(labels[i]);
        if (found == number.end())
            input_error("{}: node {} has the label '{}', which the model has never seen; its labels are {}",
                        c.node_labels, row_name(0, static_cast<std::int64_t>(i)), labels[i],
                        fmt::join(shape_.names, ", "));
        class_of_[i] = found->second;
    }
}

void NodeSamples::read_split(const Config& c, const TrainedSamples* trained) {
    part_of_.assign(static_cast<std::size_t>(graph_.nodes), Part::test);
    if (!c.split.empty()) {
        const std::vector<std::string> parts = read_labels(c.split, graph_);
        for (std::size_t i = 0; i < parts.size(); ++i) {
            const auto found =
                std::find(std::begin(kPartNames), std::end(kPartNames), parts[i].empty() ? "none" : parts[i]);
            if (found == std::end(kPartNames))
                input_error("{}: node {} is in the part '{}'; write train, val, test or none", c.split,
                            row_name(0, static_cast<std::int64_t>(i)), parts[i]);
            part_of_[i] = static_cast<Part>(found - std::begin(kPartNames));
        }
    } else if (!trained) {
        throw InputError("split: which nodes to learn from? give --split with train, val, test or none for each node");
    }
    for (std::size_t i = 0; i < part_of_.size(); ++i) {
        const auto p = static_cast<std::size_t>(part_of_[i]);
        ++rows_[p];
        known_[p] += class_of_[i] >= 0;
    }
    if (trained) return;
    if (known(Part::train) == 0) input_error("{}: no node with a label is in the part train", c.split);
    std::vector<bool> seen(static_cast<std::size_t>(shape_.outputs), false);
    for (std::size_t i = 0; i < part_of_.size(); ++i)
        if (part_of_[i] == Part::train && class_of_[i] >= 0) seen[static_cast<std::size_t>(class_of_[i])] = true;
    for (std::size_t k = 0; k < seen.size(); ++k)
        if (!seen[k])
            input_error(
                "{}: no node of the part train has the label '{}', so it cannot be learned; put one there, or "
                "take its nodes out",
                c.split, shape_.names[k]);
}

void NodeSamples::find_spectrum(const Config& c, bool trained, std::FILE* words) {
    shape_.spectral_dims = c.spectral_dims;
    if (c.spectral_dims == 0) return;
    SpectrumOptions o;
    o.k = c.spectral_dims;
    o.beyond_null = true;
    o.kind = LaplacianKind::normalised;
    o.seed = 1;  // the embedding is part of the data: it does not change with the seed of training
    o.threads = static_cast<int>(c.threads);
    o.stop = [] { return stop_requested(); };
    spectral_.assign(static_cast<std::size_t>(graph_.nodes * c.spectral_dims), 0.f);
    if (graph_.edges() == 0 && trained) return;
    const Spectrum s = solve_spectrum(graph_, o, false);
    if (s.count() < c.spectral_dims && !trained)
        input_error(
            "spectral-dims: {} is more than the {} eigenvectors that the graph has beyond its {} components; give "
            "fewer",
            c.spectral_dims, s.count(), s.zeros);
    if (s.status != SpectrumStatus::complete && !c.allow_partial)
        input_error("{}: its eigenvectors did not converge ({}); give fewer --spectral-dims, or --allow-partial",
                    c.graph[0], s.why);
    if (words)
        fmt::print(words, "spectrum: {} eigenvectors beyond {} zeros in {:.1f} s\n", s.count(), s.zeros, s.seconds);
    const std::int64_t k = c.spectral_dims, have = std::min<std::int64_t>(k, s.count());
    const float scale = std::sqrt(static_cast<float>(graph_.nodes));
    for (std::int64_t i = 0; i < graph_.nodes; ++i)
        for (std::int64_t j = 0; j < have; ++j)
            spectral_[static_cast<std::size_t>(i * k + j)] =
                scale * s.vectors[static_cast<std::size_t>(i * s.count() + j)];
}

NodeSamples::NodeSamples(const Config& c, const TrainedSamples* trained, std::FILE* words) {
    shape_.kind = TargetKind::classes;
    shape_.level = TargetLevel::node;
    shape_.edge_types = 1;
    read_features_and_graph(c, trained);
    shape_.features = features_.columns;
    shape_.dense = trained ? trained->shape.dense : features_.dense();
    read_targets(c, trained);
    read_split(c, trained);
    find_spectrum(c, trained != nullptr, words);
    if (!shape_.dense) return;
    dense_.assign(static_cast<std::size_t>(graph_.nodes * features_.columns), 0.f);
    for (std::int64_t i = 0; i < graph_.nodes; ++i)
        for (auto e = static_cast<std::size_t>(features_.offsets[static_cast<std::size_t>(i)]);
             e < static_cast<std::size_t>(features_.offsets[static_cast<std::size_t>(i) + 1]); ++e)
            dense_[static_cast<std::size_t>(i * features_.columns + features_.column_of[e])] = features_.values[e];
}

void NodeSamples::gather(std::span<const std::int64_t> samples, Part part, SampleBatch& out) const {
    if (samples.size() != 1 || samples[0] != 0) throw std::logic_error("node_samples: there is one sample");
    out = SampleBatch{};
    out.samples = {0};
    out.offsets = {0, static_cast<std::int32_t>(graph_.nodes)};
    if (shape_.dense) {
        out.dense = dense_;
    } else {
        out.feature_offsets = features_.offsets;
        out.feature_columns = features_.column_of;
        out.feature_values = features_.values;
    }
    out.edge_offsets.assign(graph_.offsets.begin(), graph_.offsets.end());
    out.edge_columns.assign(graph_.columns.begin(), graph_.columns.end());
    if (weighted_) out.edge_weights.assign(graph_.weights.begin(), graph_.weights.end());
    out.spectral = spectral_;
    out.classes.resize(part_of_.size());
    for (std::size_t i = 0; i < part_of_.size(); ++i) out.classes[i] = part_of_[i] == part ? class_of_[i] : -1;
}

std::string NodeSamples::fingerprint() const {
    std::uint64_t h = 0;
    const auto add = [&](const auto& v) {
        h = h * 0x9e3779b97f4a7c15ull + hash_bytes(v.data(), v.size() * sizeof(v[0]));
    };
    add(graph_.offsets), add(graph_.columns), add(graph_.weights);
    add(features_.offsets), add(features_.column_of), add(features_.values);
    add(class_of_), add(part_of_);
    return hex64(h);
}

std::string NodeSamples::text() const {
    return fmt::format("{} nodes, {} edges, {} features, {} classes; known: {} train, {} val, {} test", graph_.nodes,
                       graph_.edges(), features_.columns, shape_.outputs, known_[0], known_[1], known_[2]);
}

}  // namespace

std::unique_ptr<SampleSource> open_nodes(const Config& c, const TrainedSamples* trained, std::FILE* words) {
    return std::make_unique<NodeSamples>(c, trained, words);
}

}  // namespace fiedler
