#include "engine/molecule_parser.h"

#include <stdexcept>

#if FIEDLER_RDKIT
#include <GraphMol/ChemTransforms/ChemTransforms.h>
#include <GraphMol/MolOps.h>
#include <GraphMol/RWMol.h>
#include <GraphMol/SmilesParse/SmilesParse.h>
#include <GraphMol/SmilesParse/SmilesWrite.h>
#include <RDGeneral/RDLog.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <sstream>
#endif

namespace fiedler {

std::string no_molecule_parser() {
    return "this fiedler was built without RDKit, which reads SMILES: install librdkit-dev and build again, or prepare "
           "the molecules elsewhere (training needs it no more)";
}

#if FIEDLER_RDKIT

namespace {

using Byte = std::uint8_t;

// value - low, or `other` when it is not below it.
Byte category(int value, int low, int other) {
    const int place = value - low;
    return static_cast<Byte>(place >= 0 && place < other ? place : other);
}

Byte chirality(RDKit::Atom::ChiralType t) {
    switch (t) {
        case RDKit::Atom::CHI_UNSPECIFIED:
            return 0;
        case RDKit::Atom::CHI_TETRAHEDRAL_CW:
            return 1;
        case RDKit::Atom::CHI_TETRAHEDRAL_CCW:
            return 2;
        case RDKit::Atom::CHI_OTHER:
            return 3;
        default:
            return 4;
    }
}
Byte hybridisation(RDKit::Atom::HybridizationType t) {
    switch (t) {
        case RDKit::Atom::SP:
            return 0;
        case RDKit::Atom::SP2:
            return 1;
        case RDKit::Atom::SP3:
            return 2;
        case RDKit::Atom::SP3D:
            return 3;
        case RDKit::Atom::SP3D2:
            return 4;
        default:
            return 5;
    }
}
Byte bond_type(RDKit::Bond::BondType t) {
    switch (t) {
        case RDKit::Bond::SINGLE:
            return 0;
        case RDKit::Bond::DOUBLE:
            return 1;
        case RDKit::Bond::TRIPLE:
            return 2;
        case RDKit::Bond::AROMATIC:
            return 3;
        default:
            return 4;
    }
}
Byte stereo(RDKit::Bond::BondStereo s) {
    switch (s) {
        case RDKit::Bond::STEREOZ:
            return 1;
        case RDKit::Bond::STEREOE:
            return 2;
        case RDKit::Bond::STEREOCIS:
            return 3;
        case RDKit::Bond::STEREOTRANS:
            return 4;
        case RDKit::Bond::STEREOANY:
            return 5;
        default:
            return 0;
    }
}

std::string scaffold_of(const RDKit::ROMol& whole) {
    const std::unique_ptr<RDKit::ROMol> scaffold(RDKit::MurckoDecompose(whole));
    scaffold->clearComputedProps();
    scaffold->updatePropertyCache();
    RDKit::MolOps::symmetrizeSSSR(*scaffold);
    return RDKit::MolToSmiles(*scaffold, false);
}

Molecule molecule_of(const RDKit::ROMol& mol) {
    Molecule m;
    for (const RDKit::Atom* a : mol.atoms()) {
        const int number = a->getAtomicNum();
        m.atoms.insert(m.atoms.end(),
                       {category(number, 1, 118), chirality(a->getChiralTag()),
                        category(static_cast<int>(a->getTotalDegree()), 0, 11), category(a->getFormalCharge(), -5, 11),
                        category(static_cast<int>(a->getTotalNumHs()), 0, 9),
                        category(static_cast<int>(a->getNumRadicalElectrons()), 0, 5),
                        hybridisation(a->getHybridization()), static_cast<Byte>(a->getIsAromatic()),
                        static_cast<Byte>(mol.getRingInfo()->numAtomRings(a->getIdx()) > 0)});
    }
    struct Bond {
        std::int32_t first, second;
        std::array<Byte, kBondFeatures> features;
    };
    std::vector<Bond> bonds;
    for (const RDKit::Bond* b : mol.bonds()) {
        const unsigned first = std::min(b->getBeginAtomIdx(), b->getEndAtomIdx()),
                       second = std::max(b->getBeginAtomIdx(), b->getEndAtomIdx());
        bonds.push_back(
            {static_cast<std::int32_t>(first),
             static_cast<std::int32_t>(second),
             {bond_type(b->getBondType()), stereo(b->getStereo()), static_cast<Byte>(b->getIsConjugated())}});
    }
    std::sort(bonds.begin(), bonds.end(),
              [](const Bond& a, const Bond& b) { return std::pair(a.first, a.second) < std::pair(b.first, b.second); });
    for (const Bond& b : bonds) {
        m.bonds.insert(m.bonds.end(), {b.first, b.second});
        m.bond_features.insert(m.bond_features.end(), b.features.begin(), b.features.end());
    }
    m.scaffold = scaffold_of(mol);
    return m;
}

// RDKit writes its complaints to streams of its own.
void silence() {
    static const bool done = [] {
        boost::logging::disable_logs("rdApp.*");
        return true;
    }();
    (void)done;
}

std::string first_line(const std::string& text) {
    const std::size_t begin = text.find_first_not_of(" \n\r\t");
    return begin == text.npos ? "" : text.substr(begin, text.find('\n', begin) - begin);
}

}  // namespace

bool has_molecule_parser() { return true; }

std::optional<Molecule> parse_molecule(const std::string& smiles) {
    silence();
    try {
        const std::unique_ptr<RDKit::RWMol> mol(RDKit::SmilesToMol(smiles));
        if (!mol || mol->getNumAtoms() == 0 || mol->getNumAtoms() > kMostAtoms) return {};
        return molecule_of(*mol);
    } catch (const std::exception&) {
        return {};
    }
}

std::string why_not_parsed(const std::string& smiles) {
    silence();
    std::ostringstream words;
    const auto log = rdErrorLog;
    rdErrorLog = std::make_shared<boost::logging::rdLogger>(&words);
    std::string why;
    try {
        const std::unique_ptr<RDKit::RWMol> mol(RDKit::SmilesToMol(smiles));
        if (mol && mol->getNumAtoms() == 0)
            why = "it has no atoms";
        else if (mol && mol->getNumAtoms() > kMostAtoms)
            why = std::to_string(mol->getNumAtoms()) + " atoms, more than " + std::to_string(kMostAtoms);
        else if (mol)
            (void)molecule_of(*mol);
    } catch (const std::exception& e) {
        why = e.what();
    }
    rdErrorLog = log;
    if (why.empty()) {  // "[03:14:15] SMILES Parse Error: syntax error while parsing: C("
        why = first_line(words.str());
        if (why.starts_with('['))
            if (const std::size_t at = why.find("] "); at != why.npos) why.erase(0, at + 2);
    }
    return why.empty() ? "no SMILES" : first_line(why);
}

#else

bool has_molecule_parser() { return false; }
std::optional<Molecule> parse_molecule(const std::string&) { throw std::logic_error(no_molecule_parser()); }
std::string why_not_parsed(const std::string&) { throw std::logic_error(no_molecule_parser()); }

#endif

}  // namespace fiedler
