// engine/masked_atoms.h: pre-training on molecules without targets: which atom was here?
//
// Of each molecule max(1, round(share * n)) of its n atoms are masked: all columns of their atom features give way to the
// one column for masked atoms (bonds, walks and spectra stay), and their target is the atom's type, kAtomTypes classes.
// Which ones is a function of seed, epoch and sample in training; elsewhere of the sample alone, so that seeds compare. Features have the same columns
// as those of the molecules' own targets, so that all but the outputs of a model goes on to them.
#pragma once
#include <memory>

#include "engine/molecule_samples.h"

namespace fiedler {

class MaskedAtoms final : public SampleSource {
  public:
    // InputError: a share outside (0, 1).
    MaskedAtoms(std::unique_ptr<const MoleculeSamples>, double share, std::int64_t seed);

    const SampleShape& shape() const override { return shape_; }
    std::span<const std::int64_t> samples(Part p) const override { return base_->samples(p); }
    std::int64_t known(Part p) const override { return known_[static_cast<std::size_t>(p)]; }
    std::int64_t nodes_of(std::int64_t sample) const override { return base_->nodes_of(sample); }
    std::int64_t edges_of(std::int64_t sample) const override { return base_->edges_of(sample); }
    std::int64_t feature_entries_of(std::int64_t sample) const override { return base_->feature_entries_of(sample); }
    // Masks of no epoch; those of an epoch: gather_epoch.
    void gather(std::span<const std::int64_t> samples, Part part, SampleBatch& out) const override {
        gather_masked(samples, part, -1, out);
    }
    void gather_epoch(std::span<const std::int64_t> samples, std::int64_t epoch, SampleBatch& out) const override {
        gather_masked(samples, Part::train, epoch, out);
    }
    std::string row_name(std::int64_t sample, std::int64_t node) const override;

    Json state() const override;
    std::string fingerprint() const override;
    bool depends_on_seed() const override { return true; }
    std::string text() const override;

    const MoleculeSamples& base() const { return *base_; }

  private:
    void gather_masked(std::span<const std::int64_t> samples, Part, std::int64_t epoch, SampleBatch& out) const;
    std::vector<std::int64_t> masked(std::int64_t sample, std::int64_t epoch) const;  // atoms, ascending

    std::unique_ptr<const MoleculeSamples> base_;
    double share_;
    std::int64_t seed_;
    SampleShape shape_;
    std::array<std::int64_t, 4> known_{};
};

}  // namespace fiedler
