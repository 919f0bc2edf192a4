// Molecules as a person uses them: prepare, train, eval, predict, and what is refused.
#include <gtest/gtest.h>

#include "engine/molecule_parser.h"
#include "tests/engine/command_run.h"

namespace fiedler::test {
namespace {

// Chains with a head; the target is what can be counted: carbons less twice the oxygens.
std::string table(int rows, const std::string& more = "") {
    std::string text = "smiles,y\n";
    const char* heads[] = {"O", "N", "", "OC(=O)", "c1ccccc1"};
    const int of_head[] = {-2, 0, 0, -3, 6};
    for (int i = 0; i < rows; ++i) {
        const int n = 1 + i / 5;
        text += heads[i % 5] + std::string(static_cast<std::size_t>(n), 'C') + "," +
                std::to_string(n + of_head[i % 5]) + "\n";
    }
    return text + more;
}

class MoleculeCommand : public CommandTest {
  protected:
    void SetUp() override {
        if (!has_molecule_parser()) GTEST_SKIP() << "NOT TESTED: built without RDKit (librdkit-dev)";
        world_.put("m.csv", table(60));
    }
    Outcome train_on(const std::string& data, const std::string& out, const Knobs& changes = {}) const {
        Knobs k = {{"preset", "molecules-small"},
                   {"data", data},
                   {"out", out},
                   {"device", "cpu"},
                   {"threads", "1"},
                   {"channels", "32"},
                   {"heads", "2"},
                   {"layers", "1"},
                   {"epochs", "30"},
                   {"batch-nodes", "128"},
                   {"lr", "5e-3"},
                   {"data-cache", "cache"}};
        for (const auto& [name, value] : changes) k[name] = value;
        return run(words_of("train", k));
    }
};

TEST_F(MoleculeCommand, TrainsEvaluatesAndPredicts) {
    const Outcome o = train_on("m.csv", "run", {{"save-split", "split.csv"}});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "60 molecules");
    EXPECT_LT(number_after(o.out, "test   rmse "), 2.5) << o.out;  // targets have a deviation of 4.7
    const Outcome again = run({"eval", "run", "--device", "cpu"});
    ASSERT_EQ(again.code, 0) << again.err;
    EXPECT_NEAR(number_after(again.out, "rmse "), number_after(o.out, "test   rmse "), 1e-3);
    world_.put("new.csv", "name,smiles\nfirst,CCCCO\nsecond,CCCCCCCCCC\n");
    const Outcome p = run({"predict", "run", "--data", "new.csv", "--out", "p.csv", "--device", "cpu", "--plot",
                           "p.svg", "--data-cache", "cache"});
    ASSERT_EQ(p.code, 0) << p.err;
    const std::string csv = slurp(path("p.csv"));
    EXPECT_TRUE(csv.starts_with("id,y\nfirst,")) << csv;
    EXPECT_GT(number_after(csv, "second,"), number_after(csv, "first,") + 2);
    EXPECT_HAS(slurp(path("p.svg")), "contribution to y");
    EXPECT_HAS(slurp(path("p.svg")), "O5");
    // The split comes back from its file.
    const Outcome same = train_on("m.csv", "same", {{"split", "split.csv"}});
    ASSERT_EQ(same.code, 0) << same.err;
    EXPECT_EQ(number_after(same.out, "test   rmse "), number_after(o.out, "test   rmse "));
}

TEST_F(MoleculeCommand, PreparedMoleculesServeAsTheTable) {
    const Outcome o = run({"prepare", "--task", "molecules", "m.csv", "--out", "prepared"});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "60 molecules of 60 rows");
    EXPECT_HAS(run({"inspect", "prepared/molecules.fdl"}).out, "Fiedler molecules");
    const Outcome a = train_on("prepared", "a", {{"epochs", "2"}}), b = train_on("m.csv", "b", {{"epochs", "2"}});
    ASSERT_EQ(a.code, 0) << a.err;
    EXPECT_TRUE(equal_files("a/weights.fdl", "a/weights.fdl"));
    EXPECT_EQ(number_after(a.out, "test   rmse "), number_after(b.out, "test   rmse "));
    expect_refused(run({"prepare", "--task", "molecules", "m.csv", "--out", "prepared"}), {"prepared"});
}

TEST_F(MoleculeCommand, LearnsMaskedAtomsAndGoesOnFromThem) {
    const Outcome o = train_on("m.csv", "masked", {{"mask", "0.15"}, {"epochs", "10"}});
    ASSERT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "15 % of the atoms masked");
    EXPECT_GT(number_after(o.out, "test   accuracy "), 0.5);
    const Outcome fine = train_on("m.csv", "fine", {{"init-from", "masked"}, {"epochs", "2"}});
    ASSERT_EQ(fine.code, 0) << fine.err;
    EXPECT_HAS(fine.out, "starts from masked");
    expect_refused(train_on("m.csv", "other",
                            {{"init-from", "masked"}, {"channels", "64"}, {"heads", "4"}, {"spectral-dims", "2"}}),
                   {"init-from", "no tensor"});
}

TEST_F(MoleculeCommand, FoldsFollowTheSeeds) {
    const Outcome o = train_on("m.csv", "folds", {{"folds", "3"}, {"seeds", "3"}, {"epochs", "2"}});
    ASSERT_EQ(o.code, 0) << o.err;
    world_.put("new.csv", "smiles\nCCCCO\n");
    const Outcome p =
        run({"predict", "folds", "--data", "new.csv", "--out", "p.csv", "--device", "cpu", "--data-cache", "cache"});
    EXPECT_EQ(p.code, 0) << p.err;
    EXPECT_TRUE(slurp(path("p.csv")).starts_with("id,y\nCCCCO,"));
    ASSERT_EQ(train_on("m.csv", "other", {{"epochs", "1"}, {"save-split", "other.csv"}}).code, 0);
    const Outcome e = run({"eval", "folds/seed-2", "--device", "cpu"});
    const Outcome other = run({"eval", "folds/seed-2", "--data", "m.csv", "--data-cache", "cache", "--split",
                               "other.csv", "--device", "cpu"});
    EXPECT_EQ(e.code, 0) << e.err;
    EXPECT_EQ(other.code, 0) << other.err;
    EXPECT_NE(e.out, other.out);
    for (const char* part : {"fold 1 of 3", "fold 2 of 3", "fold 3 of 3", "+-"}) EXPECT_HAS(o.out, part);
}

TEST_F(MoleculeCommand, BadInputIsOneLine) {
    world_.put("bad.csv", table(20, "C(,1\n"));
    const auto before = paths_below(world_.path());
    expect_refused(train_on("bad.csv", "run"), {"bad.csv:22", "--skip-bad"});
    expect_refused(run({"prepare", "--task", "molecules", "bad.csv", "--out", "prepared"}), {"bad.csv:22"});
    expect_refused(train_on("m.csv", "run", {{"targets", "z"}}), {"no target column", "\"z\""});
    expect_refused(train_on("m.csv", "run", {{"split", "thirds"}}), {"split: \"thirds\" is neither"});
    expect_refused(train_on("m.csv", "run", {{"folds", "3"}, {"fold", "4"}}), {"fold: 4 of 3"});
    expect_refused(train_on("none.csv", "run"), {"none.csv"});
    EXPECT_FALSE(paths_below(world_.path()).contains("run"));
    EXPECT_FALSE(paths_below(world_.path()).contains("prepared"));
    const Outcome o = train_on("bad.csv", "run", {{"skip-bad", ""}, {"epochs", "1"}});
    EXPECT_EQ(o.code, 0) << o.err;
    EXPECT_HAS(o.out, "skipped 1 row");
}

}  // namespace
}  // namespace fiedler::test
