// engine/molecule_samples.h: molecules as samples (samples.h): atoms are nodes, bonds are edges, targets are of the whole.
//
// Features, sparse, a row an atom:
//   one column for each value of each atom feature (molecules.h): 1 for those that the atom has, 9 in all
//   one column that only masked atoms have, instead of the above (masked_atoms.h)
//   walk_steps columns     return probabilities of a random walk (small_graphs.h)
//   eigenvalues            spectral_dims columns: the molecule's eigenvalues, the same for each of its atoms
// Edge types: bond type (5), bond type and conjugation (10), or all bond features (60). Weights are absent.
// Regression targets are normalised with mean and deviation over the known ones of the training part, each on its own.
#pragma once
#include <array>
#include <memory>

#include "engine/json.h"
#include "engine/molecules.h"
#include "engine/samples.h"
#include "engine/small_graphs.h"

namespace fiedler {

inline constexpr std::int64_t kAtomColumns = 119 + 5 + 12 + 12 + 10 + 6 + 6 + 2 + 2;

struct MoleculeOptions {
    std::int64_t spectral_dims = 0, walk_steps = 0;
    bool eigenvalues = false;
    BondTypes bonds = BondTypes::conjugated;
    MoleculeTargets targets = MoleculeTargets::automatic;
    bool without_targets = false;  // for masked atoms: targets are not looked at, shape().outputs is 0
    bool cuda = false;             // where the spectra are computed
    int threads = 0;

    std::int64_t columns() const { return kAtomColumns + 1 + walk_steps + (eigenvalues ? spectral_dims : 0); }
};
// How the parts came to be, for people and for a later reader of the same molecules.
struct SplitNote {
    std::string words;     // "random, seed 1, fold 2 of 5"
    bool by_seed = false;  // another config.seed gives other parts
};
Json to_json(const MoleculeOptions&);  // what shapes the features; kept with a model
MoleculeOptions molecule_options_from_json(const Json&, const std::string& where);  // InputError

std::string fingerprint_of(const MoleculeSet&);  // of the SMILES, in their order

class MoleculeSamples final : public SampleSource {
  public:
    // parts: one for each molecule. trained: the shape of the model that these are for, whose targets are looked for by
    // name and may be absent; nullptr: made from the data.
    // InputError: nothing to learn; a target of which the training part knows none, or one value only, a binary one that
    // is neither 0 nor 1; a trained shape that does not fit the options.
    MoleculeSamples(MoleculeSet, std::vector<Part> parts, const MoleculeOptions&, const SampleShape* trained,
                    SplitNote split = {});

    const SampleShape& shape() const override { return shape_; }
    std::span<const std::int64_t> samples(Part p) const override { return samples_[static_cast<std::size_t>(p)]; }
    std::int64_t known(Part p) const override { return known_[static_cast<std::size_t>(p)]; }
    std::int64_t nodes_of(std::int64_t sample) const override { return set_.atoms_of(sample); }
    std::int64_t edges_of(std::int64_t sample) const override { return 2 * set_.bonds_of(sample); }
    std::int64_t feature_entries_of(std::int64_t sample) const override { return set_.atoms_of(sample) * entries_; }
    void gather(std::span<const std::int64_t> samples, Part, SampleBatch& out) const override;
    std::string row_name(std::int64_t sample, std::int64_t) const override { return set_.name_of(sample); }

    Json state() const override;
    std::string fingerprint() const override;
    bool depends_on_seed() const override { return split_.by_seed; }
    std::string text() const override;

    const MoleculeSet& molecules() const { return set_; }
    const MoleculeOptions& options() const { return options_; }
    const SmallGraphs& graphs() const { return graphs_; }
    Part part_of(std::int64_t sample) const { return parts_[static_cast<std::size_t>(sample)]; }
    std::int64_t entries_per_atom() const { return entries_; }
    std::int32_t atom_type(std::int64_t sample, std::int64_t atom) const {
        const auto i = static_cast<std::size_t>(set_.atom_offsets[static_cast<std::size_t>(sample)] + atom);
        return set_.atoms[i * kAtomFeatures];
    }

  private:
    void build_graphs();
    void choose_targets(const SampleShape* trained);
    void normalise();
    void put_features(std::int64_t sample, std::int64_t i, std::int32_t* columns, float* values) const;
    void put_atoms(std::int64_t sample, std::int64_t base, std::int64_t edges, SampleBatch& out) const;

    MoleculeSet set_;
    std::vector<Part> parts_;
    MoleculeOptions options_;
    SplitNote split_;
    SampleShape shape_;
    std::int64_t entries_ = 0;
    SmallGraphs graphs_;
    std::vector<std::uint8_t> edge_types_;  // as graphs_.columns
    SmallEmbedding embedding_;
    std::vector<float> walks_;    // [atoms, walk_steps]
    std::vector<float> targets_;  // [molecules, outputs], normalised
    std::array<std::vector<std::int64_t>, 4> samples_;
    std::array<std::int64_t, 4> known_{};
};

}  // namespace fiedler
