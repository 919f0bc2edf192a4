// Molecules: from SMILES to graphs, the file, splits.
#include "engine/molecules.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>

#include "engine/files.h"
#include "engine/molecule_parser.h"
#include "engine/molecule_prepare.h"
#include "engine/molecule_table.h"
#include "engine/sample_split.h"
#include "tests/engine/molecule_rings.h"
#include "tests/engine/temp_folder.h"

namespace fiedler::test {
namespace {

using Size = std::size_t;
using Strings = std::vector<std::string>;
using Numbers = std::vector<std::int64_t>;

#define NEEDS_RDKIT \
    if (!has_molecule_parser()) GTEST_SKIP() << "NOT TESTED: built without RDKit (librdkit-dev)"

MoleculeSet table(const std::string& path, const MoleculeTableOptions& o = {}, MoleculeTableReport* report = nullptr) {
    MoleculeTableReport own;
    return read_molecule_table(path, o, report ? *report : own);
}

// ---- parsing -----------------------------------------------------------------------------------------------------------

TEST(Molecules, AtomsAndBondsAreThoseOfTheBenchmark) {
    NEEDS_RDKIT;
    // Expected by ogb.utils.mol.smiles2graph; atoms in the order of the SMILES.
    const auto m = parse_molecule("C[C@H]([NH3+])C(=O)[O-]");  // alanine
    ASSERT_TRUE(m);
    EXPECT_EQ(m->atoms, (std::vector<std::uint8_t>{5, 0,
                                                   4, 5,
                                                   3, 0,
                                                   2, 0,
                                                   0,  //
                                                   5, m->atoms[10],
                                                   4, 5,
                                                   1, 0,
                                                   2, 0,
                                                   0,  //
                                                   6, 0,
                                                   4, 6,
                                                   3, 0,
                                                   2, 0,
                                                   0,  //
                                                   5, 0,
                                                   3, 5,
                                                   0, 0,
                                                   1, 0,
                                                   0,  //
                                                   7, 0,
                                                   1, 5,
                                                   0, 0,
                                                   1, 0,
                                                   0,  //
                                                   7, 0,
                                                   1, 4,
                                                   0, 0,
                                                   1, 0,
                                                   0}));
    EXPECT_TRUE(m->atoms[10] == 1 || m->atoms[10] == 2);
    const auto mirrored = parse_molecule("C[C@@H]([NH3+])C(=O)[O-]");
    EXPECT_EQ(mirrored->atoms[10], 3 - m->atoms[10]);
    EXPECT_EQ(m->bonds, (std::vector<std::int32_t>{0, 1, 1, 2, 1, 3, 3, 4, 3, 5}));
    EXPECT_EQ(m->bond_features, (std::vector<std::uint8_t>{0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1}));
    EXPECT_EQ(m->scaffold, "");
}

TEST(Molecules, RingsStereoAndWhatIsRare) {
    NEEDS_RDKIT;
    const auto pyrrole = parse_molecule("c1cc[nH]c1CC");
    EXPECT_EQ(pyrrole->atoms[3 * kAtomFeatures + 4], 1);  // one hydrogen
    EXPECT_EQ(pyrrole->atoms[3 * kAtomFeatures + 7], 1);  // aromatic
    EXPECT_EQ(pyrrole->atoms[3 * kAtomFeatures + 8], 1);  // in a ring
    EXPECT_EQ(pyrrole->atoms[5 * kAtomFeatures + 8], 0);
    EXPECT_EQ(pyrrole->bond_features[0], 3);  // aromatic
    EXPECT_EQ(pyrrole->scaffold, "c1cc[nH]c1");
    EXPECT_EQ(parse_molecule("F/C=C/F")->bond_features[3 + 1], 2);   // E
    EXPECT_EQ(parse_molecule("F/C=C\\F")->bond_features[3 + 1], 1);  // Z
    const auto any = parse_molecule("*C#N");
    EXPECT_EQ(any->atoms[0], 118);
    EXPECT_EQ(any->bond_features[3], 2);
    EXPECT_EQ(parse_molecule("[Og]")->atoms[0], 117);
    EXPECT_EQ(parse_molecule("[CH3]")->atoms[5], 1);  // a radical
    EXPECT_STREQ(element_name(5), "C");
    EXPECT_STREQ(element_name(117), "Og");
    EXPECT_STREQ(element_name(118), "other");
}

TEST(Molecules, WhatCannotBeParsedSaysWhy) {
    NEEDS_RDKIT;
    const std::pair<const char*, const char*> bad[] = {
        {"C(", "Parse Error"}, {"C(C)(C)(C)(C)C", "valence"}, {"", "no atoms"}, {"c1ccc1(", "Parse Error"}};
    for (const auto& [smiles, why] : bad) {
        EXPECT_FALSE(parse_molecule(smiles)) << smiles;
        EXPECT_HAS(why_not_parsed(smiles), why);
    }
    const std::string chain(kMostAtoms, 'C');
    EXPECT_TRUE(parse_molecule(chain));
    EXPECT_FALSE(parse_molecule(chain + "C"));
    EXPECT_HAS(why_not_parsed(chain + "C"), "513 atoms, more than 512");
}

// ---- tables ------------------------------------------------------------------------------------------------------------

constexpr const char* kTable =
    "id,smiles,solubility,toxic,note\n"
    "m1,CCO,-0.5,1,fine\n"
    "m2,c1ccccc1,,0,\n"
    "m3,\"CC(=O)O\",1.25,,x\n";

TEST(MoleculeTable, ColumnsByKindOrByName) {
    NEEDS_RDKIT;
    const TempFolder t;
    const std::string path = t.put("m.csv", kTable);
    MoleculeTableReport report;
    const MoleculeSet s = table(path, {}, &report);
    EXPECT_EQ(s.smiles, (Strings{"CCO", "c1ccccc1", "CC(=O)O"}));
    EXPECT_EQ(s.ids, (Strings{"m1", "m2", "m3"}));
    EXPECT_EQ(s.lines, (Numbers{2, 3, 4}));
    EXPECT_EQ(s.target_names, (Strings{"solubility", "toxic"}));
    EXPECT_EQ(report.unread, Strings{"note"});
    EXPECT_EQ(s.targets[0], -0.5f);
    EXPECT_TRUE(std::isnan(s.targets[2]));
    EXPECT_TRUE(std::isnan(s.targets[5]));
    EXPECT_EQ(s.atom_offsets, (Numbers{0, 3, 9, 13}));
    EXPECT_EQ(s.scaffolds, (Strings{"", "c1ccccc1"}));
    EXPECT_EQ(s.scaffold, (std::vector<std::int32_t>{0, 1, 0}));
    EXPECT_EQ(s.source, "m.csv");
    MoleculeTableOptions o;
    o.targets = {"toxic"};
    o.id_column = "none";
    EXPECT_EQ(table(path, o).target_names, Strings{"toxic"});
    EXPECT_EQ(table(path, o).name_of(0), "CCO");
    o.targets = {"none"};
    EXPECT_EQ(table(path, o).width(), 0);
    const MoleculeSet list = table(t.put("m.smi", "CCO first\nCC\tsecond one\n\nC\n"));
    EXPECT_EQ(list.smiles, (Strings{"CCO", "CC", "C"}));
    EXPECT_EQ(list.ids, (Strings{"first", "second", ""}));
    EXPECT_EQ(table(t.put("one.csv", "CCO\nCC\n")).size(), 2);
    EXPECT_EQ(table(t.put("two.csv", "SMILES\nCCO\nCC\n")).size(), 2);
}

TEST(MoleculeTable, FaultsAreOneLine) {
    NEEDS_RDKIT;
    const TempFolder t;
    const auto fault = [&](const std::string& text, MoleculeTableOptions o = {}) {
        return input_error_of([&] { table(t.put("m.csv", text), o); });
    };
    EXPECT_HAS(fault("smiles,y\nCCO,1\nC(,2\n"), "m.csv:3: SMILES \"C(\" cannot be parsed: SMILES Parse Error");
    EXPECT_HAS(fault("smiles,y\nCCO,1\nC(,2\n"), "--skip-bad");
    EXPECT_HAS(fault("a,b\nCCO,1\n"), "--smiles-column");
    EXPECT_HAS(fault("smiles,y\nCCO,1\nCC\n"), "m.csv:3: 1 fields where other rows have 2");
    MoleculeTableOptions o;
    o.targets = {"z"};
    EXPECT_HAS(fault("smiles,y\nCCO,1\n", o), "no target column \"z\"; there are smiles, y");
    o.targets = {"y"};
    EXPECT_HAS(fault("smiles,y\nCCO,1\nCC,nan\n", o), "m.csv:3: y is \"nan\"; leave the field empty");
    EXPECT_HAS(fault("smiles,y\nCCO,1\nCC,inf\n", o), "infinite");
    EXPECT_HAS(fault("smiles,y\nCCO,1\nCC,high\n", o), "m.csv:3: y is \"high\", not a number");
    EXPECT_HAS(fault("smiles,y\n"), "no row");
    EXPECT_HAS(fault(""), "no rows");
    o = {};
    o.skip_bad = true;
    EXPECT_HAS(fault("smiles,y\nC(,1\n", o), "no row of its 1 holds a molecule");
}

TEST(MoleculeTable, BadRowsAreCountedWhenAsked) {
    NEEDS_RDKIT;
    const TempFolder t;
    MoleculeTableOptions o;
    o.skip_bad = true;
    MoleculeTableReport report;
    const MoleculeSet s = table(t.put("m.csv", "smiles,y\nCCO,1\nC(,2\nCC,3\nxx,4\nyy,5\nzz,6\n"), o, &report);
    EXPECT_EQ(s.skipped, 4);
    EXPECT_EQ(s.targets, (std::vector<float>{1, 3}));
    EXPECT_EQ(s.lines, (Numbers{2, 4}));
    ASSERT_EQ(report.skipped.size(), 3u);
    EXPECT_HAS(report.skipped[0], "m.csv:3");
    EXPECT_HAS(report.text(s), "skipped 4 rows");
}

TEST(MoleculePrepare, TablesArePreparedOnceAndNeedNoParserAfter) {
    NEEDS_RDKIT;
    const TempFolder t;
    const std::string path = t.put("m.csv", kTable);
    const FoundMolecules first = find_molecules(path, {}, t / "cache", nullptr);
    EXPECT_TRUE(file_exists(join_path(first.folder, kMoleculesName)));
    const std::string bytes = slurp(join_path(first.folder, kMoleculesName));
    EXPECT_EQ(find_molecules(path, {}, t / "cache", nullptr).folder, first.folder);
    MoleculeTableOptions o;
    o.targets = {"toxic"};
    EXPECT_NE(find_molecules(path, o, t / "cache", nullptr).folder, first.folder);
    EXPECT_EQ(find_molecules(first.folder, o, "", nullptr).set.target_names, Strings{"toxic"});
    EXPECT_EQ(find_molecules(join_path(first.folder, kMoleculesName), {}, "", nullptr).set.smiles, first.set.smiles);
    o.targets = {"mass"};
    EXPECT_HAS(input_error_of([&] { find_molecules(first.folder, o, "", nullptr); }), "no target column \"mass\"");
    EXPECT_HAS(input_error_of([&] { find_molecules(t.path(), {}, "", nullptr); }), "a folder without molecules.fdl");
    prepare_molecules(path, {}, t / "again", false, nullptr);
    EXPECT_EQ(slurp(t / "again/molecules.fdl"), bytes);
    t.put("m.csv", "smiles,y\nC(,1\n");
    EXPECT_HAS(input_error_of([&] { prepare_molecules(path, {}, t / "bad", false, nullptr); }), "m.csv:2");
    EXPECT_FALSE(folder_exists(t / "bad"));
}

// ---- the file ------------------------------------------------------------------------------------------------------------

void expect_equal(const MoleculeSet& a, const MoleculeSet& b) {
    EXPECT_EQ(a.atom_offsets, b.atom_offsets);
    EXPECT_EQ(a.bond_offsets, b.bond_offsets);
    EXPECT_EQ(a.atoms, b.atoms);
    EXPECT_EQ(a.bonds, b.bonds);
    EXPECT_EQ(a.bond_features, b.bond_features);
    EXPECT_EQ(a.smiles, b.smiles);
    EXPECT_EQ(a.ids, b.ids);
    EXPECT_EQ(a.lines, b.lines);
    EXPECT_EQ(a.scaffold, b.scaffold);
    EXPECT_EQ(a.scaffolds, b.scaffolds);
    EXPECT_EQ(a.target_names, b.target_names);
    ASSERT_EQ(a.targets.size(), b.targets.size());
    for (Size i = 0; i < a.targets.size(); ++i)
        EXPECT_TRUE(a.targets[i] == b.targets[i] || (std::isnan(a.targets[i]) && std::isnan(b.targets[i])));
    EXPECT_EQ(a.source, b.source);
    EXPECT_EQ(a.skipped, b.skipped);
}

TEST(MoleculeFile, RoundTripAndDamage) {
    const TempFolder t;
    MoleculeSet s = rings(40, 3);
    s.skipped = 7;
    write_molecules(t / "m.fdl", s);
    expect_equal(read_molecules_fdl(t / "m.fdl"), s);
    for (Size i = 0; i < 40; ++i) s.ids.push_back("id " + std::to_string(i));
    s.target_names.clear(), s.targets.clear();
    write_molecules(t / "n.fdl", s);
    expect_equal(read_molecules_fdl(t / "n.fdl"), s);
    const std::string bytes = slurp(t / "n.fdl");
    for (const Size at : {Size{5}, Size{600}, Size{1100}, bytes.size() / 2, bytes.size() - 3}) {
        std::string bad = bytes;
        bad[at] = static_cast<char>(bad[at] ^ 1);
        EXPECT_NE(input_error_of([&] { read_molecules_fdl(t.put("bad.fdl", bad)); }), "") << at;
        EXPECT_NE(input_error_of([&] { read_molecules_fdl(t.put("cut.fdl", bytes.substr(0, at))); }), "") << at;
    }
    const auto refused = [&](auto&& change, const char* part) {
        MoleculeSet bad = rings(10);
        change(bad);
        write_molecules(t / "bad.fdl", bad);
        EXPECT_HAS(input_error_of([&] { read_molecules_fdl(t / "bad.fdl"); }), part);
    };
    refused([](MoleculeSet& x) { x.atoms[1] = 5; }, "feature 1 of atom 0 is 5");
    refused([](MoleculeSet& x) { x.bonds[1] = 9; }, "bond 0 of molecule 0");
    refused([](MoleculeSet& x) { std::swap(x.bonds[0], x.bonds[1]); }, "bond 0 of molecule 0");
    refused([](MoleculeSet& x) { x.bond_features[0] = 5; }, "feature 0 of bond 0");
    refused([](MoleculeSet& x) { x.atom_offsets[1] = 99999; }, "molecule");
    refused([](MoleculeSet& x) { x.scaffold[3] = 5; }, "no scaffold 5");
}

// ---- splits --------------------------------------------------------------------------------------------------------------

Numbers counts_of(const std::vector<Part>& parts) {
    Numbers n(4, 0);
    for (const Part p : parts) ++n[static_cast<Size>(p)];
    return n;
}

TEST(Split, RandomFoldsCoverEverythingOnce) {
    SplitOptions o;
    o.seed = 5;
    const auto parts = split_samples(1128, {}, o);
    EXPECT_EQ(counts_of(parts), (Numbers{902, 113, 113, 0}));
    EXPECT_EQ(split_samples(1128, {}, o), parts);
    o.seed = 6;
    EXPECT_NE(split_samples(1128, {}, o), parts);
    std::vector<int> tested(642, 0);
    for (o.fold = 1; o.fold <= 5; ++o.fold) {
        const auto fold = split_samples(642, {}, o);
        const Numbers n = counts_of(fold);
        EXPECT_EQ(n[1], 64);
        EXPECT_TRUE(n[2] == 128 || n[2] == 129);
        for (Size i = 0; i < fold.size(); ++i) tested[i] += fold[i] == Part::test;
    }
    EXPECT_EQ(std::count(tested.begin(), tested.end(), 1), 642);
    o.fold = 6;
    EXPECT_HAS(input_error_of([&] { split_samples(642, {}, o); }), "fold: 6 of 5");
    o.fold = 0;
    EXPECT_HAS(input_error_of([&] { split_samples(4, {}, o); }), "none is in the part val");
    o.train = 0;
    EXPECT_HAS(input_error_of([&] { split_samples(40, {}, o); }), "split-shares");
}

TEST(Split, ScaffoldsStayTogetherByTheRule) {
    // Sizes 4 (a), 2 (b), 2 (c), 1 (d), 1 (e) of 10; shares 0.6, 0.2, 0.2. Of equals the last first: a, c, b, e, d.
    const std::vector<std::int32_t> scaffold = {0, 1, 2, 0, 0, 1, 2, 0, 3, 4};
    SplitOptions o;
    o.how = "scaffold";
    o.train = 0.6, o.val = o.test = 0.2;
    const auto parts = split_samples(10, scaffold, o);
    const auto P = [](const char* text) {
        std::vector<Part> p;
        for (const char* c = text; *c; ++c) p.push_back(*c == 't' ? Part::train : *c == 'v' ? Part::val : Part::test);
        return p;
    };
    EXPECT_EQ(parts, P("tvtttvttxx"));
    std::map<std::int32_t, std::set<Part>> seen;
    for (o.seed = 0; o.seed < 5; ++o.seed) {
        seen.clear();
        const auto other = split_samples(10, scaffold, o);
        for (Size i = 0; i < 10; ++i) seen[scaffold[i]].insert(other[i]);
        for (const auto& [s, of] : seen) EXPECT_EQ(of.size(), 1u) << s;
    }
}

TEST(Split, FilesComeBackAndFitTheirData) {
    const TempFolder t;
    const Strings names = {"CCO", "a,\"b\"", "C", "C", ""};
    const std::vector<Part> parts = {Part::train, Part::val, Part::test, Part::none, Part::train};
    write_split(t / "s.csv", parts, names);
    EXPECT_EQ(read_split(t / "s.csv", names), parts);
    EXPECT_TRUE(slurp(t / "s.csv").starts_with("row,part,name\n1,train,CCO\n"));
    const auto fault = [&](const std::string& text) {
        return input_error_of([&] { read_split(t.put("bad.csv", text), names); });
    };
    EXPECT_HAS(fault("1,train,CCO\n"), "1 rows, but the data have 5");
    EXPECT_HAS(fault("row,part,name\n1,training,CCO\n"), "bad.csv:2: part \"training\"");
    EXPECT_HAS(fault("1,train,CCN\n"), "belongs to the data");
    EXPECT_HAS(fault("2,train,CCO\n"), "list all rows in order");
}

// ---- real molecules --------------------------------------------------------------------------------------------------------

TEST(Molecules, RealSets) {
    NEEDS_RDKIT;
    const std::string archive = std::string(FIEDLER_SOURCE_DIR) + "/../shared/data/molecules.tar.xz";
    if (!file_exists(archive)) GTEST_SKIP() << "NOT TESTED: no " << archive;
    const TempFolder t;
    if (std::system(fmt::format("tar xJf '{}' -C '{}'", archive, t.path()).c_str()) != 0)
        GTEST_SKIP() << "NOT TESTED: cannot unpack " << archive;
    // RDKit's Python and DeepChem's rule on the same files (tests/molecule_oracle.py): molecules, atoms, bonds, scaffolds,
    // sizes of the parts, and the sum of the numbers of the molecules in the part test.
    const std::pair<const char*, Numbers> expected[] = {{"esol", {1128, 14991, 15428, 269, 902, 113, 113, 36746}},
                                                        {"freesolv", {642, 5600, 5385, 63, 513, 64, 65, 18932}},
                                                        {"bbbp", {2039, 49068, 52921, 1025, 1631, 204, 204, 69620}}};
    for (const auto& [name, numbers] : expected) {
        const MoleculeSet s = table(t / ("moleculenet/" + std::string(name) + ".csv"));
        SplitOptions o;
        o.how = "scaffold";
        const auto parts = split_samples(s.size(), s.scaffold, o);
        const Numbers n = counts_of(parts);
        std::int64_t sum = 0;
        for (Size i = 0; i < parts.size(); ++i) sum += parts[i] == Part::test ? static_cast<std::int64_t>(i) : 0;
        EXPECT_EQ((Numbers{s.size(), s.atom_offsets.back(), s.bond_offsets.back(), std::ssize(s.scaffolds), n[0], n[1],
                           n[2], sum}),
                  numbers)
            << name;
    }
}

}  // namespace
}  // namespace fiedler::test
