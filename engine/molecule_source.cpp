#include "engine/molecule_source.h"

#include <fmt/format.h>

#include <charconv>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/masked_atoms.h"
#include "engine/molecule_prepare.h"
#include "engine/molecule_samples.h"
#include "engine/sample_split.h"
#include "engine/table_text.h"

namespace fiedler {

namespace {

std::string cache_of(const Config& c) { return c.data_cache.empty() ? "data/cache" : c.data_cache; }

const std::string& only_path(const Config& c) {
    if (c.data.empty()) throw InputError("data: no molecules; give --data with a CSV that has a column of SMILES");
    if (c.data.size() > 1) input_error("data: {} and {}: give one file of molecules", c.data[0], c.data[1]);
    return c.data[0];
}

MoleculeTableOptions table_options(const Config& c) {
    MoleculeTableOptions o;
    o.smiles_column = c.smiles_column, o.id_column = c.id_column;
    o.targets = c.targets;
    o.header = c.header;
    o.skip_bad = c.skip_bad;
    o.threads = static_cast<int>(c.threads);
    return o;
}

SplitOptions split_options(const Config& c) {
    SplitOptions o;
    o.how = c.split.empty() ? "random" : c.split;
    LineFields fields(',');
    fields.split(c.split_shares);
    double* const shares[] = {&o.train, &o.val, &o.test};
    bool good = fields.count() == 3;
    for (std::size_t i = 0; good && i < 3; ++i) {
        const std::string_view text = fields[i];
        const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), *shares[i]);
        good = error == std::errc{} && stop == text.data() + text.size();
    }
    if (!good) input_error("split-shares: {} are no three shares; write them as 0.8,0.1,0.1", shown(c.split_shares));
    const bool scaffold = o.how == "scaffold";
    o.seed = c.split_seed >= 0 ? c.split_seed : scaffold ? 0 : c.folds > 0 ? 0 : c.seed;
    if (c.fold > 0 && c.folds == 0) input_error("fold: {} of how many? give --folds, too", c.fold);
    if (c.folds > 0) {
        o.folds = c.folds;
        o.fold = c.fold > 0 ? c.fold : 1 + ((c.seed - 1) % c.folds + c.folds) % c.folds;
    }
    return o;
}

struct Parts {
    std::vector<Part> of;
    SplitNote note;
};
Parts split_of(const Config& c, const MoleculeSet& set) {
    std::vector<std::string> names;
    for (std::int64_t m = 0; m < set.size(); ++m) names.push_back(set.name_of(m));
    Parts p;
    const SplitOptions o = split_options(c);
    if (o.how != "random" && o.how != "scaffold") {
        if (!file_exists(o.how)) input_error("split: {} is neither random, scaffold nor a file", shown(o.how));
        if (c.folds > 0) input_error("folds: are of a random split; leave --split {} out", o.how);
        p.of = read_split(o.how, names);
        p.note.words = "of " + o.how;
    } else {
        p.of = split_samples(set.size(), set.scaffold, o);
        p.note.words = fmt::format("{}, seed {}", o.how, o.seed);
        if (o.fold > 0) p.note.words += fmt::format(", fold {} of {}", o.fold, o.folds);
        p.note.by_seed = (c.folds > 0 && c.fold == 0) || (c.folds == 0 && c.split_seed < 0 && o.how == "random");
    }
    if (!c.save_split.empty()) write_split(c.save_split, p.of, names);
    return p;
}

// Of the trained model's own molecules, as they were parted; not where another split is asked for.
bool same_parts(const Config& c, const Json& state, const MoleculeSet& set, Parts& p) {
    if (!state.contains("molecules") || state["molecules"] != fingerprint_of(set)) return false;
    const std::string words = state.value("split", std::string());
    if (!c.split.empty() && !words.starts_with(c.split) && words != "of " + c.split) return false;
    const std::string parts = state.value("parts", std::string());
    if (std::ssize(parts) != set.size()) return false;
    for (const char letter : parts) {
        const std::size_t at = std::string_view("tvxn").find(letter);
        if (at == std::string_view::npos) return false;
        p.of.push_back(static_cast<Part>(at));
    }
    p.note.words = words;
    return true;
}

}  // namespace

std::unique_ptr<SampleSource> open_molecules(const Config& c, const TrainedSamples* trained, std::FILE* words) {
    MoleculeTableOptions table = table_options(c);
    if (trained) table.targets.clear();  // those that are there are found by name; none need be
    FoundMolecules found = find_molecules(only_path(c), table, cache_of(c), words);
    MoleculeOptions o;
    double mask = c.mask;
    if (trained) {
        const Json& state = trained->state;
        if (!state.contains("options"))
            input_error("model: it was not trained on molecules; give data of its own kind");
        o = molecule_options_from_json(state["options"], "model");
        mask = state.value("mask", 0.0);
    } else {
        o.spectral_dims = c.spectral_dims;
        o.walk_steps = c.walk_steps;
        o.eigenvalues = c.eigenvalues;
        o.bonds = c.bonds;
        o.targets = c.target_kind;
    }
    o.without_targets = mask > 0;
    o.threads = static_cast<int>(c.threads);
    o.cuda = false;  // the same embedding whatever trains on it
    Parts parts;
    if (!trained) {
        parts = split_of(c, found.set);
    } else if (!same_parts(c, trained->state, found.set, parts)) {
        if (!c.split.empty()) {
            Config now = c;
            now.folds = now.fold = 0;  // those of training were of other molecules
            parts = split_of(now, found.set);
        } else {
            parts.of.assign(static_cast<std::size_t>(found.set.size()), Part::test);
        }
    }
    auto molecules = std::make_unique<MoleculeSamples>(std::move(found.set), std::move(parts.of), o,
                                                       trained && mask == 0 ? &trained->shape : nullptr, parts.note);
    if (mask == 0) return molecules;
    return std::make_unique<MaskedAtoms>(std::move(molecules), mask, c.seed);
}

int run_prepare_molecules(const Config& c) {
    const std::string& path = only_path(c);
    std::string folder = c.out;
    if (folder.empty())
        folder = find_molecules(path, table_options(c), cache_of(c), stdout).folder;
    else
        (void)prepare_molecules(path, table_options(c), folder, false, stdout);
    fmt::print("dataset     {}\n", folder);
    return 0;
}

}  // namespace fiedler
