// engine/molecule_table.h: molecules from text: a CSV (or TSV) with a column of SMILES and columns of targets, or a list
// of SMILES, one a line, perhaps with a name behind a blank (.smi, .txt, or a table of one column).
#pragma once
#include <string>
#include <vector>

#include "engine/graph_files.h"
#include "engine/molecules.h"

namespace fiedler {

struct MoleculeTableOptions {
    std::string smiles_column;  // by name or number from 1; empty: smiles, canonical_smiles, mol, or the only one
    std::string id_column;      // empty: id, name, mol_id, ..., where there is one; "none"
    std::vector<std::string> targets;  // empty: every other column of which each field is a number or empty; "none"
    TableHeader header = TableHeader::automatic;
    bool skip_bad = false;  // rows whose SMILES cannot be parsed are left out and counted, else an InputError
    int threads = 0;
};
struct MoleculeTableReport {
    std::int64_t rows = 0;
    std::vector<std::string> skipped;            // the first few: "esol.csv:17: ..."
    std::vector<std::string> unread;             // columns that are neither SMILES, id nor target
    std::string text(const MoleculeSet&) const;  // a line or two for people
};

// InputError, in one line: no parser in this program; a column that does not exist; a target that is neither a number nor
// empty ("nan" is not a number: leave the field empty); SMILES that do not parse (line and reason); no molecules.
MoleculeSet read_molecule_table(const std::string& path, const MoleculeTableOptions&, MoleculeTableReport&);

}  // namespace fiedler
