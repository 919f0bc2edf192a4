// tests/engine/molecule_rings.h: molecules for tests.
#pragma once
#include <string>

#include "engine/molecules.h"

namespace fiedler::test {

// Made without a parser: rings of n atoms and a tail, with targets.
inline MoleculeSet rings(std::int64_t count, std::int64_t targets = 1) {
    MoleculeSet s;
    s.source = "rings.csv";
    for (std::int64_t t = 0; t < targets; ++t) s.target_names.push_back("y" + std::to_string(t));
    for (std::int64_t m = 0; m < count; ++m) {
        const auto n = static_cast<std::int32_t>(3 + m % 5);
        Molecule one;
        for (std::int32_t i = 0; i <= n; ++i)
            one.atoms.insert(one.atoms.end(), {static_cast<std::uint8_t>(i == 0 ? 6 : 5), 0, 2, 5, 1, 0, 1, 0, 1});
        for (std::int32_t i = 0; i < n; ++i) {
            one.bonds.insert(one.bonds.end(), {i, i + 1});
            one.bond_features.insert(one.bond_features.end(), {static_cast<std::uint8_t>(i % 2), 0, 1});
            if (i == 0 && n > 3) {
                one.bonds.insert(one.bonds.end(), {0, n - 1});
                one.bond_features.insert(one.bond_features.end(), {3, 0, 1});
            }
        }
        s.add(one);
        s.smiles.push_back("R" + std::to_string(m));
        s.lines.push_back(m + 2);
        s.scaffold.push_back(static_cast<std::int32_t>(m % 5));
        for (std::int64_t t = 0; t < targets; ++t)
            s.targets.push_back(m % 7 == 3 ? kMissing : static_cast<float>(0.5 * double(n) + double(t)));
    }
    for (int k = 0; k < 5; ++k) s.scaffolds.push_back("ring " + std::to_string(k));
    return s;
}

}  // namespace fiedler::test
