// engine/molecules.h: molecules as graphs of atoms, parsed once and kept in a file, so that training needs no chemistry
// library.
//
// Features are those of the Open Graph Benchmark: each is a small category number, the last one of a feature standing for
// whatever is not listed, unless said otherwise.
//   atom  0  atomic number, less 1: 0 (hydrogen) .. 117; 118: other, "*" too
//         1  chirality: none, clockwise, counter-clockwise, other; 4: not known
//         2  number of neighbours, hydrogens included: 0 .. 10; 11: more
//         3  formal charge + 5: 0 .. 10; 11: beyond -5 .. 5
//         4  hydrogens: 0 .. 8; 9: more
//         5  unpaired electrons: 0 .. 4; 5: more
//         6  hybridisation: sp, sp2, sp3, sp3d, sp3d2; 5: other
//         7  aromatic?   8  in a ring?      no, yes
//   bond  0  single, double, triple, aromatic; 4: other
//         1  stereo: none, Z, E, cis, trans, any
//         2  conjugated?                    no, yes
// Hydrogens are not atoms here unless the SMILES needs them to be ([H][H], isotopes).
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fiedler {

inline constexpr std::size_t kAtomFeatures = 9, kBondFeatures = 3;
inline constexpr std::array<std::int32_t, kAtomFeatures> kAtomFeatureSizes = {119, 5, 12, 12, 10, 6, 6, 2, 2};
inline constexpr std::array<std::int32_t, kBondFeatures> kBondFeatureSizes = {5, 6, 2};
inline constexpr std::int32_t kAtomTypes = kAtomFeatureSizes[0];
inline constexpr std::int64_t kMostAtoms = 512;  // of a molecule: what small_spectra.h takes

// "H", "He", ..., "Og", and "other".
const char* element_name(std::int32_t atom_type);

// What readers of molecules may choose (molecule_samples.h).
enum class BondTypes { type, conjugated, full };
enum class MoleculeTargets { automatic, regression, binary };  // automatic: binary where all known ones are 0 or 1

struct Molecule {
    std::vector<std::uint8_t> atoms;          // [n, kAtomFeatures]
    std::vector<std::int32_t> bonds;          // [b, 2], two atoms each, the smaller first; ascending, each once
    std::vector<std::uint8_t> bond_features;  // [b, kBondFeatures]
    std::string scaffold;  // Bemis-Murcko: rings and what links them, as canonical SMILES; may be empty
    std::int64_t size() const { return static_cast<std::int64_t>(atoms.size() / kAtomFeatures); }
};

// M molecules one after another.
struct MoleculeSet {
    std::vector<std::int64_t> atom_offsets{0}, bond_offsets{0};  // [M + 1]
    std::vector<std::uint8_t> atoms, bond_features;
    std::vector<std::int32_t> bonds;     // atoms count from the molecule's own first
    std::vector<std::string> smiles;     // [M], as given
    std::vector<std::string> ids;        // [M], or empty: there is no column of them
    std::vector<std::int64_t> lines;     // [M], of the file
    std::vector<std::int32_t> scaffold;  // [M], into:
    std::vector<std::string> scaffolds;  // in the order of their first appearance
    std::vector<std::string> target_names;
    std::vector<float> targets;  // [M, targets]; NaN where not known
    std::string source;          // name of the file they come from, without its folder
    std::int64_t skipped = 0;    // its rows that could not be parsed

    std::int64_t size() const { return static_cast<std::int64_t>(smiles.size()); }
    std::int64_t width() const { return static_cast<std::int64_t>(target_names.size()); }
    std::int64_t atoms_of(std::int64_t m) const {
        return atom_offsets[static_cast<std::size_t>(m) + 1] - atom_offsets[static_cast<std::size_t>(m)];
    }
    std::int64_t bonds_of(std::int64_t m) const {
        return bond_offsets[static_cast<std::size_t>(m) + 1] - bond_offsets[static_cast<std::size_t>(m)];
    }
    // Its id, or else its SMILES.
    const std::string& name_of(std::int64_t m) const {
        return (ids.empty() ? smiles : ids)[static_cast<std::size_t>(m)];
    }
    void add(const Molecule&);  // graph and scaffold; the rest is the caller's. Scaffold numbers: index_scaffolds
};

inline constexpr const char* kMoleculesKind = "molecules";  // of the file (weights.h)
void write_molecules(const std::string& path, const MoleculeSet&);
// InputError for anything that is not what write_molecules wrote: numbers out of range, bonds out of order, ...
MoleculeSet read_molecules_fdl(const std::string& path);

}  // namespace fiedler
