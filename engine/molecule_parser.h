// engine/molecule_parser.h: SMILES to graphs by RDKit's C++ library, where the program was built with it.
#pragma once
#include <optional>
#include <string>

#include "engine/molecules.h"

namespace fiedler {

bool has_molecule_parser();
// One line for people: what is missing and how to get it.
std::string no_molecule_parser();

// The sanitised molecule as RDKit sees it, hydrogens implicit; nothing where it cannot be read. Several threads may call
// it. Throws std::logic_error without a parser.
std::optional<Molecule> parse_molecule(const std::string& smiles);
// Why parse_molecule gives nothing, in RDKit's words; one thread at a time, and none in parse_molecule.
std::string why_not_parsed(const std::string& smiles);

}  // namespace fiedler
