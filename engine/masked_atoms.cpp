#include "engine/masked_atoms.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/rng.h"

namespace fiedler {

namespace {

using Size = std::size_t;
constexpr std::uint64_t kMasks = 0x6d61736b;

std::int64_t mask_count(double share, std::int64_t atoms) {
    return std::clamp<std::int64_t>(std::llround(share * double(atoms)), 1, atoms);
}

}  // namespace

MaskedAtoms::MaskedAtoms(std::unique_ptr<const MoleculeSamples> base, double share, std::int64_t seed)
    : base_(std::move(base)), share_(share), seed_(seed), shape_(base_->shape()) {
    if (!(share > 0 && share < 1)) input_error("mask: a share of {} of the atoms; choose one between 0 and 1", share);
    shape_.kind = TargetKind::classes;
    shape_.level = TargetLevel::node;
    shape_.outputs = kAtomTypes;
    shape_.names.clear(), shape_.mean.clear(), shape_.deviation.clear();
    for (std::int32_t t = 0; t < kAtomTypes; ++t) shape_.names.emplace_back(element_name(t));
    for (const Part p : {Part::train, Part::val, Part::test, Part::none})
        for (const std::int64_t m : base_->samples(p))
            known_[static_cast<Size>(p)] += mask_count(share_, base_->nodes_of(m));
}

std::vector<std::int64_t> MaskedAtoms::masked(std::int64_t sample, std::int64_t epoch) const {
    const std::int64_t n = base_->nodes_of(sample);
    std::vector<std::pair<std::uint64_t, std::int64_t>> keys;
    const std::uint64_t seed = epoch < 0 ? 0 : static_cast<std::uint64_t>(seed_);
    const std::uint64_t stream =
        rng::bits(kMasks, static_cast<std::uint64_t>(epoch + 1), static_cast<std::uint64_t>(sample));
    for (std::int64_t i = 0; i < n; ++i) keys.emplace_back(rng::bits(seed, stream, static_cast<std::uint64_t>(i)), i);
    std::sort(keys.begin(), keys.end());
    std::vector<std::int64_t> atoms;
    for (std::int64_t i = 0; i < mask_count(share_, n); ++i) atoms.push_back(keys[static_cast<Size>(i)].second);
    std::sort(atoms.begin(), atoms.end());
    return atoms;
}

void MaskedAtoms::gather_masked(std::span<const std::int64_t> samples, Part part, std::int64_t epoch,
                                SampleBatch& out) const {
    base_->gather(samples, part, out);
    out.targets.clear();
    out.classes.assign(static_cast<Size>(out.nodes()), -1);
    // Columns and values are rewritten in place: a masked atom has fewer entries.
    std::int32_t kept = 0, node = 0, entry = 0;
    for (const std::int64_t m : samples) {
        const std::vector<std::int64_t> atoms = masked(m, epoch);
        auto next = atoms.begin();
        for (std::int64_t i = 0; i < base_->nodes_of(m); ++i, ++node) {
            const std::int32_t end = out.feature_offsets[static_cast<Size>(node) + 1];
            if (next != atoms.end() && *next == i) {
                ++next;
                out.feature_columns[static_cast<Size>(kept)] = static_cast<std::int32_t>(kAtomColumns);
                out.feature_values[static_cast<Size>(kept++)] = 1;
                entry += static_cast<std::int32_t>(kAtomFeatures);
                if (base_->part_of(m) == part) out.classes[static_cast<Size>(node)] = base_->atom_type(m, i);
            }
            for (; entry < end; ++entry, ++kept) {
                out.feature_columns[static_cast<Size>(kept)] = out.feature_columns[static_cast<Size>(entry)];
                out.feature_values[static_cast<Size>(kept)] = out.feature_values[static_cast<Size>(entry)];
            }
            out.feature_offsets[static_cast<Size>(node) + 1] = kept;
        }
    }
    out.feature_columns.resize(static_cast<Size>(kept));
    out.feature_values.resize(static_cast<Size>(kept));
}

Json MaskedAtoms::state() const {
    Json j = base_->state();
    j["mask"] = share_;
    return j;
}

std::string MaskedAtoms::fingerprint() const {
    return hex64(hash_bytes(fmt::format("{} {}", base_->fingerprint(), share_)));
}

std::string MaskedAtoms::text() const {
    return fmt::format("{}; {:.0f} % of the atoms masked", base_->text(), 100 * share_);
}

std::string MaskedAtoms::row_name(std::int64_t sample, std::int64_t node) const {
    return base_->row_name(sample, node) + " atom " + std::to_string(node + 1);
}

}  // namespace fiedler
