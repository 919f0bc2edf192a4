// engine/samples.h: data with a shape, on the host: samples that are graphs (a molecule, a whole citation network, a window
// of a time series), whose nodes carry features. What every domain's reader makes and the trainer of samples consumes.
//
// A sample has nodes, edges between them and targets: of each node, or of the whole. Rows of targets ("rows" below) are
// nodes or samples, as level says. A set may hold one large graph (node classification: one sample, full batch, its
// nodes parted into training, validation and test) or many small ones (parted by sample).
#pragma once
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/json.h"

namespace fiedler {

enum class TargetKind { classes, binary, regression };  // softmax over outputs; a sigmoid each; a number each
enum class TargetLevel { node, sample };
enum class Part : std::uint8_t { train, val, test, none };
inline constexpr float kMissing = std::numeric_limits<float>::quiet_NaN();  // a target that is not known

// What all samples of a source have in common; it shapes the model.
struct SampleShape {
    std::int64_t features = 0;       // width F of a node's feature vector
    bool dense = false;              // features come as dense rows, else as sparse ones
    std::int32_t edge_types = 1;     // 0: no edges at all (a time series' patches)
    std::int64_t spectral_dims = 0;  // columns of the nodes' spectral embedding; 0: none
    TargetKind kind = TargetKind::regression;
    TargetLevel level = TargetLevel::sample;
    std::int32_t outputs = 1;           // numbers that the model gives per row: classes, or targets
    std::int64_t nodes_per_sample = 0;  // where all samples have the same number, else 0
    std::vector<std::string> names;     // [outputs]: of the classes or targets
    // Regression: what the targets of a batch were normalised with, target = (original - mean) / deviation; [outputs].
    std::vector<double> mean, deviation;
};

// A batch of samples, packed on one axis of nodes (kernels/packed.h): N nodes in S samples.
struct SampleBatch {
    std::vector<std::int64_t> samples;     // [S] their numbers in the source
    std::vector<std::int32_t> offsets{0};  // [S + 1] into the nodes
    // features: dense [N, F], or rows in CSR; values absent: all 1
    std::vector<float> dense;
    std::vector<std::int32_t> feature_offsets, feature_columns;
    std::vector<float> feature_values;
    // edges as CSR over nodes: neighbours of node i are edge_columns[edge_offsets[i] .. edge_offsets[i + 1]), nodes of the
    // batch, of the same sample, ascending. Symmetric: each edge is in both rows, with the same type and weight. No self
    // loops. types absent: all 0; weights absent: all 1.
    std::vector<std::int32_t> edge_offsets, edge_columns;
    std::vector<std::uint8_t> edge_types;
    std::vector<float> edge_weights;
    std::vector<float>
        spectral;  // [N, spectral_dims], zero beyond a sample's own eigenvectors; signs as fixed in DESIGN 3
    // targets, [rows, outputs] (binary, regression; kMissing where not known) or [rows] (classes; -1 where not known).
    // Rows that are not of the asked part are missing.
    std::vector<float> targets;
    std::vector<std::int32_t> classes;
    bool fixed_signs = false;  // the signs of spectral mean something: not to be flipped in training
    // A row's own normalisation (instance norm of series): prediction = shift + scale * output; absent: 0 and 1. [rows]
    std::vector<float> row_shift, row_scale;
    // Regression: what a row's targets were normalised with, where it is not what the shape says for each output
    // (channels of a series): original = mean + deviation * target; absent: as the shape says. [rows]
    std::vector<double> unit_mean, unit_deviation;

    std::int64_t nodes() const { return offsets.back(); }
    std::int64_t size() const { return static_cast<std::int64_t>(samples.size()); }
};

class SampleSource {
  public:
    virtual ~SampleSource() = default;
    virtual const SampleShape& shape() const = 0;
    // The samples of a part, ascending. Of a set with one graph: that graph for every part.
    virtual std::span<const std::int64_t> samples(Part) const = 0;
    // Rows with a known target in the part: what a loss over the whole part is divided by, for `classes`; else targets.
    virtual std::int64_t known(Part) const = 0;
    virtual std::int64_t nodes_of(std::int64_t sample) const = 0;
    virtual std::int64_t edges_of(std::int64_t sample) const = 0;            // entries of the CSR
    virtual std::int64_t feature_entries_of(std::int64_t sample) const = 0;  // of sparse features; 0 where dense
    // Packs the samples in the order given; out is overwritten. Safe to call from several threads.
    virtual void gather(std::span<const std::int64_t> samples, Part, SampleBatch& out) const = 0;
    // The same of the training part for a step of an epoch: what is drawn anew in each of them (masks) depends on it.
    virtual void gather_epoch(std::span<const std::int64_t> samples, std::int64_t /*epoch*/, SampleBatch& out) const {
        gather(samples, Part::train, out);
    }
    // The user's name of a row: the node's id, the sample's id or line, the window's last date and channel.
    virtual std::string row_name(std::int64_t sample, std::int64_t node) const = 0;

    // What a later reader of other data needs to read them as the model knows them (names of classes, columns of
    // features, normalisation): kept with the model, and given to open_samples again. The shape is kept anyway.
    virtual Json state() const;
    // Changes with the data: a run goes on only with the data that it began with.
    virtual std::string fingerprint() const = 0;
    // Do the parts depend on config.seed? Then each of several --seeds opens the samples anew.
    virtual bool depends_on_seed() const { return false; }
    // A line or a few about what was read, for people.
    virtual std::string text() const { return {}; }
};

// A shape as it is kept with the model. from: InputError with `where`.
Json to_json(const SampleShape&);
SampleShape shape_from_json(const Json&, const std::string& where);

}  // namespace fiedler
