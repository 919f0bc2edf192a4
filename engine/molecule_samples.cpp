#include "engine/molecule_samples.h"
#include "engine/json_fields.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/table_text.h"

namespace fiedler {

namespace {

using Size = std::size_t;
static_assert(kAtomColumns == std::accumulate(kAtomFeatureSizes.begin(), kAtomFeatureSizes.end(), 0));
constexpr const char* kBondTypeNames[] = {"type", "conjugated", "full"};

constexpr std::array<std::int32_t, kAtomFeatures> first_columns() {
    std::array<std::int32_t, kAtomFeatures> first{};
    for (Size f = 1; f < kAtomFeatures; ++f) first[f] = first[f - 1] + kAtomFeatureSizes[f - 1];
    return first;
}
constexpr std::array<std::int32_t, kAtomFeatures> kFirstColumn = first_columns();

std::int32_t edge_types(BondTypes b) { return b == BondTypes::type ? 5 : b == BondTypes::conjugated ? 10 : 60; }
std::uint8_t edge_type(BondTypes b, const std::uint8_t* f) {
    const int type = f[0], stereo = f[1], conjugated = f[2];
    return static_cast<std::uint8_t>(b == BondTypes::type         ? type
                                     : b == BondTypes::conjugated ? type * 2 + conjugated
                                                                  : (type * 6 + stereo) * 2 + conjugated);
}

}  // namespace

Json to_json(const MoleculeOptions& o) {
    return Json{{"spectral_dims", o.spectral_dims},
                {"walk_steps", o.walk_steps},
                {"eigenvalues", o.eigenvalues},
                {"bonds", kBondTypeNames[static_cast<int>(o.bonds)]}};
}

MoleculeOptions molecule_options_from_json(const Json& j, const std::string& where) {
    MoleculeOptions o;
    try {
        o.spectral_dims = whole_number<std::int64_t>(j.at("spectral_dims"));
        o.walk_steps = whole_number<std::int64_t>(j.at("walk_steps"));
        o.eigenvalues = j.at("eigenvalues").get<bool>();
        const auto bonds = j.at("bonds").get<std::string>();
        const auto found = std::find(std::begin(kBondTypeNames), std::end(kBondTypeNames), bonds);
        if (found == std::end(kBondTypeNames)) input_error("{}: bonds '{}' are of another version", where, bonds);
        o.bonds = static_cast<BondTypes>(found - std::begin(kBondTypeNames));
    } catch (const nlohmann::json::exception& e) {
        input_error("{}: its description of the molecules is damaged ({}); train the model again", where, e.what());
    }
    return o;
}

MoleculeSamples::MoleculeSamples(MoleculeSet set, std::vector<Part> parts, const MoleculeOptions& options,
                                 const SampleShape* trained, SplitNote split)
    : set_(std::move(set)), parts_(std::move(parts)), options_(options), split_(std::move(split)) {
    if (std::ssize(parts_) != set_.size()) throw std::logic_error("molecule_samples: a part for each molecule");
    for (Size i = 0; i < parts_.size(); ++i)
        samples_[static_cast<Size>(parts_[i])].push_back(static_cast<std::int64_t>(i));
    shape_.features = options_.columns();
    shape_.edge_types = edge_types(options_.bonds);
    shape_.spectral_dims = options_.spectral_dims;
    entries_ = static_cast<std::int64_t>(kAtomFeatures) + options_.walk_steps +
               (options_.eigenvalues ? options_.spectral_dims : 0);
    choose_targets(trained);
    build_graphs();
    embedding_ = small_embedding(graphs_, options_.spectral_dims, options_.cuda, options_.threads);
    walks_ = return_probabilities(graphs_, options_.walk_steps, options_.threads);
}

void MoleculeSamples::build_graphs() {
    graphs_.node_offsets = set_.atom_offsets;
    for (std::int64_t m = 0; m < set_.size(); ++m) {
        struct Neighbour {
            std::int32_t from, to;
            std::uint8_t type;
        };
        std::vector<Neighbour> all;
        for (auto b = static_cast<Size>(set_.bond_offsets[static_cast<Size>(m)]);
             b < static_cast<Size>(set_.bond_offsets[static_cast<Size>(m) + 1]); ++b) {
            const std::uint8_t type = edge_type(options_.bonds, set_.bond_features.data() + kBondFeatures * b);
            all.push_back({set_.bonds[2 * b], set_.bonds[2 * b + 1], type});
            all.push_back({set_.bonds[2 * b + 1], set_.bonds[2 * b], type});
        }
        std::sort(all.begin(), all.end(), [](const Neighbour& a, const Neighbour& b) {
            return std::pair(a.from, a.to) < std::pair(b.from, b.to);
        });
        auto next = all.begin();
        for (std::int64_t i = 0; i < set_.atoms_of(m); ++i) {
            for (; next != all.end() && next->from == i; ++next) {
                graphs_.columns.push_back(next->to);
                edge_types_.push_back(next->type);
            }
            graphs_.row_offsets.push_back(static_cast<std::int64_t>(graphs_.columns.size()));
        }
    }
}

void MoleculeSamples::choose_targets(const SampleShape* trained) {
    shape_.level = TargetLevel::sample;
    if (options_.without_targets) {
        shape_.outputs = 0;
        return;
    }
    if (trained) {
        if (trained->features != shape_.features || trained->edge_types != shape_.edge_types ||
            trained->spectral_dims != shape_.spectral_dims || trained->kind == TargetKind::classes)
            input_error("{}: the model was trained on other features than these molecules have", set_.source);
        shape_ = *trained;
    } else {
        if (set_.width() == 0)
            input_error("{}: no targets to learn; name their columns with --targets, or learn masked atoms",
                        set_.source);
        const auto one = [](float t) { return std::isnan(t) || t == 0 || t == 1; };
        const bool all = std::all_of(set_.targets.begin(), set_.targets.end(), one);
        shape_.kind =
            options_.targets == MoleculeTargets::binary || (options_.targets == MoleculeTargets::automatic && all)
                ? TargetKind::binary
                : TargetKind::regression;
        shape_.outputs = static_cast<std::int32_t>(set_.width());
        shape_.names = set_.target_names;
    }
    const auto outputs = static_cast<Size>(shape_.outputs), width = static_cast<Size>(set_.width());
    targets_.assign(static_cast<Size>(set_.size()) * outputs, kMissing);
    for (Size t = 0; t < outputs; ++t) {
        const auto found = std::find(set_.target_names.begin(), set_.target_names.end(), shape_.names[t]);
        if (found == set_.target_names.end()) continue;
        const auto column = static_cast<Size>(found - set_.target_names.begin());
        for (Size m = 0; m < static_cast<Size>(set_.size()); ++m) {
            const float x = set_.targets[m * width + column];
            if (shape_.kind == TargetKind::binary && !std::isnan(x) && x != 0 && x != 1)
                input_error("{}:{}: {} is {}, but targets are binary here; write 0 or 1, or leave it empty",
                            set_.source, set_.lines[m], shape_.names[t], x);
            targets_[m * outputs + t] = x;
        }
    }
    if (!trained) normalise();
    for (Size m = 0; m < static_cast<Size>(set_.size()); ++m)
        for (Size t = 0; t < outputs; ++t) {
            float& x = targets_[m * outputs + t];
            if (!std::isnan(x)) ++known_[static_cast<Size>(parts_[m])];
            if (shape_.kind == TargetKind::regression)
                x = static_cast<float>((double(x) - shape_.mean[t]) / shape_.deviation[t]);
        }
}

// Mean and deviation from the training part; a target that it does not show cannot be learned.
void MoleculeSamples::normalise() {
    const auto outputs = static_cast<Size>(shape_.outputs);
    for (Size t = 0; t < outputs; ++t) {
        double sum = 0, squares = 0;
        std::int64_t count = 0;
        for (const std::int64_t m : samples(Part::train)) {
            const double x = targets_[static_cast<Size>(m) * outputs + t];
            if (std::isnan(x)) continue;
            sum += x, ++count;
        }
        const double mean = count > 0 ? sum / double(count) : 0;
        for (const std::int64_t m : samples(Part::train)) {
            const double x = targets_[static_cast<Size>(m) * outputs + t];
            if (!std::isnan(x)) squares += (x - mean) * (x - mean);
        }
        if (!(squares > 0))
            input_error("{}: target {} {} in the training part; leave it out with --targets, or split otherwise",
                        set_.source, shown(shape_.names[t]),
                        count == 0 ? std::string("is never known") : fmt::format("is always {}", mean));
        if (shape_.kind != TargetKind::regression) continue;
        shape_.mean.push_back(mean);
        shape_.deviation.push_back(std::sqrt(squares / double(count)));
    }
}

// The features of atom i of `sample`: entries_ of them.
void MoleculeSamples::put_features(std::int64_t sample, std::int64_t i, std::int32_t* columns, float* values) const {
    const std::uint8_t* atom = set_.atoms.data() + static_cast<Size>(i) * kAtomFeatures;
    for (Size f = 0; f < kAtomFeatures; ++f) columns[f] = kFirstColumn[f] + atom[f];
    values = std::fill_n(values, kAtomFeatures, 1.f);
    columns += kAtomFeatures;
    std::iota(columns, columns + (entries_ - static_cast<std::int64_t>(kAtomFeatures)),
              static_cast<std::int32_t>(kAtomColumns + 1));
    values = std::copy_n(walks_.data() + i * options_.walk_steps, options_.walk_steps, values);
    if (options_.eigenvalues)
        std::copy_n(embedding_.values.data() + sample * options_.spectral_dims, options_.spectral_dims, values);
}

// The atoms of `sample` as the nodes of `out` from `base` on, and their edges, of which there are `edges` before.
void MoleculeSamples::put_atoms(std::int64_t sample, std::int64_t base, std::int64_t edges, SampleBatch& out) const {
    const std::int64_t first = set_.atom_offsets[static_cast<Size>(sample)], n = set_.atoms_of(sample);
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t entry = (base + i) * entries_;
        put_features(sample, first + i, out.feature_columns.data() + entry, out.feature_values.data() + entry);
        out.feature_offsets[static_cast<Size>(base + i) + 1] = static_cast<std::int32_t>(entry + entries_);
        for (auto e = static_cast<Size>(graphs_.row_offsets[static_cast<Size>(first + i)]);
             e < static_cast<Size>(graphs_.row_offsets[static_cast<Size>(first + i) + 1]); ++e, ++edges) {
            out.edge_columns[static_cast<Size>(edges)] = static_cast<std::int32_t>(base) + graphs_.columns[e];
            out.edge_types[static_cast<Size>(edges)] = edge_types_[e];
        }
        out.edge_offsets[static_cast<Size>(base + i) + 1] = static_cast<std::int32_t>(edges);
    }
    const std::int64_t k = options_.spectral_dims;
    std::copy_n(embedding_.vectors.data() + first * k, n * k, out.spectral.data() + base * k);
}

// Of the parts of `out` that molecules have, each element is written: their memory is used again as it is.
void MoleculeSamples::gather(std::span<const std::int64_t> samples, Part part, SampleBatch& out) const {
    std::int64_t atoms = 0, edges = 0;
    for (const std::int64_t m : samples) {
        if (m < 0 || m >= set_.size()) throw std::logic_error("molecule_samples: no such sample");
        atoms += nodes_of(m), edges += edges_of(m);
    }
    const auto nodes = static_cast<Size>(atoms), outputs = static_cast<Size>(shape_.outputs);
    out.samples.assign(samples.begin(), samples.end());
    out.offsets.assign(1, 0);
    out.feature_offsets.resize(nodes + 1), out.edge_offsets.resize(nodes + 1);
    out.feature_offsets[0] = out.edge_offsets[0] = 0;
    out.feature_columns.resize(nodes * static_cast<Size>(entries_));
    out.feature_values.resize(nodes * static_cast<Size>(entries_));
    out.edge_columns.resize(static_cast<Size>(edges)), out.edge_types.resize(static_cast<Size>(edges));
    out.spectral.resize(nodes * static_cast<Size>(options_.spectral_dims));
    out.targets.resize(samples.size() * outputs);
    out.dense.clear(), out.classes.clear(), out.edge_weights.clear(), out.row_shift.clear(), out.row_scale.clear();
    out.unit_mean.clear(), out.unit_deviation.clear();
    out.fixed_signs = false;
    std::int64_t node = 0, edge = 0;
    float* target = out.targets.data();
    for (const std::int64_t m : samples) {
        put_atoms(m, node, edge, out);
        node += nodes_of(m), edge += edges_of(m);
        out.offsets.push_back(static_cast<std::int32_t>(node));
        if (part_of(m) == part)
            target = std::copy_n(targets_.data() + static_cast<Size>(m) * outputs, outputs, target);
        else
            target = std::fill_n(target, outputs, kMissing);
    }
}

// The parts, a letter each: where the same molecules are read again, they are parted as they were.
Json MoleculeSamples::state() const {
    std::string parts;
    for (const Part p : parts_) parts += "tvxn"[static_cast<Size>(p)];
    return Json{
        {"options", to_json(options_)}, {"molecules", fingerprint_of(set_)}, {"split", split_.words}, {"parts", parts}};
}

std::string MoleculeSamples::fingerprint() const {
    return hex64(hash_bytes(state().dump() + hex64(hash_bytes(targets_.data(), targets_.size() * sizeof(float)))));
}

std::string MoleculeSamples::text() const {
    std::string words = fmt::format("{} molecules ({} atoms, {} scaffolds), {} features", set_.size(),
                                    set_.atom_offsets.back(), set_.scaffolds.size(), shape_.features);
    if (set_.skipped > 0) words += fmt::format(", {} rows skipped", set_.skipped);
    return words + fmt::format("; split {}: {} train, {} val, {} test", split_.words.empty() ? "none" : split_.words,
                               samples_[0].size(), samples_[1].size(), samples_[2].size());
}

std::string fingerprint_of(const MoleculeSet& s) {
    std::string all;
    for (const std::string& smiles : s.smiles) all += smiles + '\n';
    return hex64(hash_bytes(all));
}

}  // namespace fiedler
