// engine/molecule_prepare.h: molecules as the commands find them: prepared ones, or a table that is prepared first.
#pragma once
#include <cstdio>
#include <string>

#include "engine/molecule_table.h"
#include "engine/molecules.h"

namespace fiedler {

inline constexpr const char* kMoleculesName = "molecules.fdl";  // in a dataset's folder

// Parses a table into the folder `output`, which holds molecules.fdl. words: progress and a summary; nullptr: silent.
// Nothing is at `output` before everything is; replace: what is there gives way.
MoleculeSet prepare_molecules(const std::string& table, const MoleculeTableOptions&, const std::string& output,
                              bool replace, std::FILE* words);

struct FoundMolecules {
    MoleculeSet set;
    std::string folder;  // of the prepared file
};
// `path`: a prepared file, a folder with one, or a table, which is prepared into a folder below `cache` named by its bytes
// and the options, or found there. Prepared molecules need no parser; options are those of preparing, and targets chosen
// among those prepared.
FoundMolecules find_molecules(const std::string& path, const MoleculeTableOptions&, const std::string& cache,
                              std::FILE* words);

}  // namespace fiedler
