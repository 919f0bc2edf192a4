#include "engine/molecule_prepare.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/molecule_parser.h"
#include "engine/table_text.h"
#include "engine/weights.h"

namespace fiedler {

namespace {

constexpr int kFormat = 1;  // raise it when the same table gives another file

std::string fingerprint(const std::string& path, const MoleculeTableOptions& o) {
    const MappedFile file(path);
    std::string key = fmt::format("molecules {} {} {} ", kFormat, static_cast<int>(o.header), o.skip_bad);
    for (const std::string* s : {&o.smiles_column, &o.id_column}) key += *s + '\n';
    for (const std::string& t : o.targets) key += t + '\n';
    key += std::filesystem::path(path).filename().string() + '\n';
    return hex64(hash_bytes(key + hex64(hash_bytes(file.text()))));
}

// Of targets that are prepared, those that are asked for, in that order.
void choose_targets(MoleculeSet& s, const std::string& path, const std::vector<std::string>& targets) {
    if (targets.empty() || targets == s.target_names) return;
    std::vector<std::size_t> chosen;
    if (targets != std::vector<std::string>{"none"})
        for (const std::string& t : targets)
            chosen.push_back(find_column(path, t, s.target_names, s.target_names.size(), "target column"));
    std::vector<float> values;
    std::vector<std::string> names;
    const auto width = static_cast<std::size_t>(s.width());
    for (std::size_t m = 0; m < s.smiles.size(); ++m)
        for (const std::size_t i : chosen) values.push_back(s.targets[m * width + i]);
    for (const std::size_t i : chosen) names.push_back(s.target_names[i]);
    s.targets = std::move(values), s.target_names = std::move(names);
}

}  // namespace

MoleculeSet prepare_molecules(const std::string& table, const MoleculeTableOptions& o, const std::string& output,
                              bool replace, std::FILE* words) {
    MoleculeTableReport report;
    MoleculeSet set = read_molecule_table(table, o, report);
    StagedFolder folder(output);
    write_molecules(join_path(folder.path(), kMoleculesName), set);
    folder.commit(replace);
    if (words) fmt::print(words, "{}: {}\n", table, report.text(set));
    return set;
}

FoundMolecules find_molecules(const std::string& path, const MoleculeTableOptions& o, const std::string& cache,
                              std::FILE* words) {
    namespace fs = std::filesystem;
    FoundMolecules found;
    const bool folder = folder_exists(path);
    if (folder || is_weights_file(path)) {
        const std::string file = folder ? join_path(path, kMoleculesName) : path;
        if (!file_exists(file))
            input_error("{}: a folder without {}; give a table of molecules, or a folder made by `fiedler prepare`",
                        path, kMoleculesName);
        found.set = read_molecules_fdl(file);
        found.folder = fs::path(file).parent_path().string();
        choose_targets(found.set, file, o.targets);
        return found;
    }
    found.folder = join_path(cache, "molecules-" + fingerprint(path, o));
    const std::string file = join_path(found.folder, kMoleculesName);
    if (file_exists(file))
        found.set = read_molecules_fdl(file);
    else
        found.set = prepare_molecules(path, o, found.folder, true, words);
    return found;
}

}  // namespace fiedler
