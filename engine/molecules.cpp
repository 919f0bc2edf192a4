#include "engine/molecules.h"

#include <cmath>

#include "engine/tensor_fields.h"

namespace fiedler {

namespace {

constexpr int kVersion = 1;
constexpr const char* kElements[kAtomTypes] = {
    "H",  "He", "Li", "Be", "B",  "C",  "N",  "O",  "F",  "Ne", "Na", "Mg", "Al", "Si", "P",  "S",  "Cl",
    "Ar", "K",  "Ca", "Sc", "Ti", "V",  "Cr", "Mn", "Fe", "Co", "Ni", "Cu", "Zn", "Ga", "Ge", "As", "Se",
    "Br", "Kr", "Rb", "Sr", "Y",  "Zr", "Nb", "Mo", "Tc", "Ru", "Rh", "Pd", "Ag", "Cd", "In", "Sn", "Sb",
    "Te", "I",  "Xe", "Cs", "Ba", "La", "Ce", "Pr", "Nd", "Pm", "Sm", "Eu", "Gd", "Tb", "Dy", "Ho", "Er",
    "Tm", "Yb", "Lu", "Hf", "Ta", "W",  "Re", "Os", "Ir", "Pt", "Au", "Hg", "Tl", "Pb", "Bi", "Po", "At",
    "Rn", "Fr", "Ra", "Ac", "Th", "Pa", "U",  "Np", "Pu", "Am", "Cm", "Bk", "Cf", "Es", "Fm", "Md", "No",
    "Lr", "Rf", "Db", "Sg", "Bh", "Hs", "Mt", "Ds", "Rg", "Cn", "Nh", "Fl", "Mc", "Lv", "Ts", "Og", "other"};

template <std::size_t n>
void check_features(const std::string& path, const std::vector<std::uint8_t>& values,
                    const std::array<std::int32_t, n>& sizes, const char* of) {
    for (std::size_t i = 0; i < values.size(); ++i)
        if (values[i] >= sizes[i % n])
            corrupt(path, fmt::format("feature {} of {} {} is {}", i % n, of, i / n, values[i]));
}

void check_offsets(const std::string& path, const std::vector<std::int64_t>& offsets, std::int64_t end,
                   const char* of) {
    if (offsets.front() != 0 || offsets.back() != end)
        corrupt(path, fmt::format("its {} do not fit its molecules", of));
    for (std::size_t m = 0; m + 1 < offsets.size(); ++m)
        if (offsets[m] > offsets[m + 1]) corrupt(path, fmt::format("the {} of molecule {} lie outside", of, m));
}

void check_set(const std::string& path, const MoleculeSet& s, std::int64_t atoms, std::int64_t bonds) {
    check_offsets(path, s.atom_offsets, atoms, "atoms");
    check_offsets(path, s.bond_offsets, bonds, "bonds");
    check_features(path, s.atoms, kAtomFeatureSizes, "atom");
    check_features(path, s.bond_features, kBondFeatureSizes, "bond");
    for (std::int64_t m = 0; m < s.size(); ++m) {
        const std::int64_t n = s.atoms_of(m);
        if (n < 1 || n > kMostAtoms) corrupt(path, fmt::format("molecule {} has {} atoms", m, n));
        std::int64_t before = -1;
        for (auto b = static_cast<std::size_t>(s.bond_offsets[static_cast<std::size_t>(m)]);
             b < static_cast<std::size_t>(s.bond_offsets[static_cast<std::size_t>(m) + 1]); ++b) {
            const std::int64_t i = s.bonds[2 * b], j = s.bonds[2 * b + 1], at = i * n + j;
            if (i < 0 || i >= j || j >= n || at <= before)
                corrupt(path, fmt::format("bond {} of molecule {} joins {} and {}", b, m, i, j));
            before = at;
        }
    }
    for (const std::int32_t x : s.scaffold)
        if (x < 0 || static_cast<std::size_t>(x) >= s.scaffolds.size())
            corrupt(path, fmt::format("there is no scaffold {}", x));
    for (const float t : s.targets)
        if (std::isinf(t)) corrupt(path, "a target is infinite");
}

}  // namespace

const char* element_name(std::int32_t atom_type) { return kElements[atom_type]; }

void MoleculeSet::add(const Molecule& m) {
    atoms.insert(atoms.end(), m.atoms.begin(), m.atoms.end());
    bonds.insert(bonds.end(), m.bonds.begin(), m.bonds.end());
    bond_features.insert(bond_features.end(), m.bond_features.begin(), m.bond_features.end());
    atom_offsets.push_back(static_cast<std::int64_t>(atoms.size() / kAtomFeatures));
    bond_offsets.push_back(static_cast<std::int64_t>(bonds.size() / 2));
}

void write_molecules(const std::string& path, const MoleculeSet& s) {
    const std::int64_t count = s.size(), atoms = s.atom_offsets.back(), bonds = s.bond_offsets.back();
    std::vector<WeightTensor> tensors;
    add_tensor(tensors, "atom_offsets", {count + 1}, s.atom_offsets);
    add_tensor(tensors, "atoms", {atoms, std::int64_t{kAtomFeatures}}, s.atoms);
    add_tensor(tensors, "bond_offsets", {count + 1}, s.bond_offsets);
    add_tensor(tensors, "bonds", {bonds, 2}, s.bonds);
    add_tensor(tensors, "bond_features", {bonds, std::int64_t{kBondFeatures}}, s.bond_features);
    add_tensor(tensors, "scaffold", {count}, s.scaffold);
    add_tensor(tensors, "targets", {count, s.width()}, s.targets);
    add_tensor(tensors, "lines", {count}, s.lines);
    const JoinedTexts smiles(s.smiles), ids(s.ids), scaffolds(s.scaffolds);
    smiles.add(tensors, "smiles");
    if (!s.ids.empty()) ids.add(tensors, "id");
    scaffolds.add(tensors, "scaffold_smiles");
    const Json config = {{"kind", kMoleculesKind},
                         {"version", kVersion},
                         {"molecules", count},
                         {"atoms", atoms},
                         {"bonds", bonds},
                         {"scaffolds", s.scaffolds.size()},
                         {"targets", s.target_names},
                         {"source", s.source},
                         {"skipped", s.skipped}};
    write_weights(path, config, tensors);
}

MoleculeSet read_molecules_fdl(const std::string& path) {
    const WeightsFile file = open_kind(path, kMoleculesKind, kVersion, "give molecules that `fiedler prepare` wrote");
    constexpr std::int64_t kMost = std::int64_t{1} << 40;
    MoleculeSet s;
    const std::int64_t count = count_field(file, "molecules", kMost), atoms = count_field(file, "atoms", kMost),
                       bonds = count_field(file, "bonds", kMost);
    s.target_names = field<std::vector<std::string>>(file, "targets");
    s.source = field<std::string>(file, "source");
    s.skipped = count_field(file, "skipped", kMost);
    s.atom_offsets = read_tensor<std::int64_t>(file, "atom_offsets", {count + 1});
    s.atoms = read_tensor<std::uint8_t>(file, "atoms", {atoms, std::int64_t{kAtomFeatures}});
    s.bond_offsets = read_tensor<std::int64_t>(file, "bond_offsets", {count + 1});
    s.bonds = read_tensor<std::int32_t>(file, "bonds", {bonds, 2});
    s.bond_features = read_tensor<std::uint8_t>(file, "bond_features", {bonds, std::int64_t{kBondFeatures}});
    s.scaffold = read_tensor<std::int32_t>(file, "scaffold", {count});
    s.targets = read_tensor<float>(file, "targets", {count, s.width()});
    s.lines = read_tensor<std::int64_t>(file, "lines", {count});
    s.smiles = read_texts(file, "smiles", count);
    if (file.find("id_offsets")) s.ids = read_texts(file, "id", count);
    s.scaffolds = read_texts(file, "scaffold_smiles", count_field(file, "scaffolds", count));
    check_set(path, s, atoms, bonds);
    return s;
}

}  // namespace fiedler
