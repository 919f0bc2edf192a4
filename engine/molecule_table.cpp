#include "engine/molecule_table.h"

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <limits>
#include <map>

#include "engine/error.h"
#include "engine/graph_table.h"
#include "engine/molecule_parser.h"
#include "engine/signals.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {

using Size = std::size_t;
constexpr Size kNone = std::numeric_limits<Size>::max();
constexpr Size kShownRows = 3;
constexpr const char *kSmilesNames[] = {"smiles", "canonical_smiles", "isomeric_smiles", "mol", "molecule"},
                     *kIdNames[] = {"id", "mol_id", "molecule_id", "compound_id", "compound id", "name"};

struct Columns {
    Size smiles = 0, id = kNone;
    std::vector<Size> targets;
};

template <std::size_t n>
Size usual_column(const std::vector<std::string>& names, const char* const (&usual)[n]) {
    for (const char* name : usual)
        for (Size i = 0; i < names.size(); ++i)
            if (equal_no_case(names[i], name)) return i;
    return kNone;
}

// Each row of the text is handed to body(line number, fields), in order; InputError for rows of another width.
template <class Body>
void each_row(const std::string& path, const Table& t, Body&& body) {
    std::int64_t line_number = t.body_line;
    LineFields fields(t.separator);
    for (std::string_view rest = t.body; !rest.empty(); ++line_number) {
        const std::string_view line = take_line(rest);
        if (trimmed(line).empty()) continue;
        try {
            fields.split(line);
            if (t.separator == kBlanks ? fields.count() == 0 : fields.count() != t.columns)
                line_fault("{} fields where other rows have {}; fill in or remove the row", fields.count(), t.columns);
            body(line_number, fields);
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", path, line_number, fault.what);
        }
    }
}

// Columns of which every field is empty or a number, and one is a number.
std::vector<Size> number_columns(const std::string& path, const Table& t, const Columns& c) {
    std::vector<bool> fits(t.columns, true), filled(t.columns, false);
    each_row(path, t, [&](std::int64_t, const LineFields& fields) {
        for (Size i = 0; i < t.columns; ++i) {
            if (fields[i].empty()) continue;
            filled[i] = true;
            fits[i] = fits[i] && is_number(fields[i]);
        }
    });
    std::vector<Size> found;
    for (Size i = 0; i < t.columns; ++i)
        if (i != c.smiles && i != c.id && fits[i] && filled[i]) found.push_back(i);
    return found;
}

Columns columns_of(const std::string& path, const Table& t, const MoleculeTableOptions& o) {
    Columns c;
    if (!o.smiles_column.empty()) {
        c.smiles = find_column(path, o.smiles_column, t.names, t.columns, "column of SMILES");
    } else {
        c.smiles = usual_column(t.names, kSmilesNames);
        if (c.smiles == kNone && (t.separator == kBlanks || t.columns == 1)) c.smiles = 0;
        if (c.smiles == kNone)
            input_error("{}: which column has the SMILES? none is called smiles; name one with --smiles-column", path);
    }
    if (o.id_column.empty())
        c.id = t.separator == kBlanks && t.columns > 1 ? 1 : usual_column(t.names, kIdNames);
    else if (o.id_column != "none")
        c.id = find_column(path, o.id_column, t.names, t.columns, "column of ids");
    if (c.id == c.smiles) c.id = kNone;
    if (o.targets.size() == 1 && o.targets[0] == "none") return c;
    if (t.separator == kBlanks && o.targets.empty()) return c;
    if (o.targets.empty()) {
        c.targets = number_columns(path, t, c);
        return c;
    }
    for (const std::string& name : o.targets) {
        const Size i = find_column(path, name, t.names, t.columns, "target column");
        if (i == c.smiles || std::find(c.targets.begin(), c.targets.end(), i) != c.targets.end())
            input_error("{}: target column {} is {}; name each once", path, shown(name),
                        i == c.smiles ? "the column of SMILES" : "named twice");
        c.targets.push_back(i);
    }
    return c;
}

// .smi lists are blank-separated; so is a table whose first row holds no separator at all.
Table open_molecule_table(const TextFile& file, const MoleculeTableOptions& o) {
    TableOptions t;
    const std::string extension = extension_of(file.path());
    const std::string_view first = first_row_of(file.text());
    const bool list = extension == ".smi" || extension == ".smiles" ||
                      (extension != ".csv" && first.find_first_of(",;\t") == first.npos);
    t.separator = list ? kBlanks : extension == ".tsv" || extension == ".tab" ? '\t' : csv_separator(file.text());
    t.header = o.header;
    t.chosen = o.targets;
    t.chosen.push_back(o.smiles_column);
    std::erase(t.chosen, "none");
    if (o.header == TableHeader::automatic) {  // a header that names SMILES; the list has none else
        std::vector<std::string> names;
        LineFields fields(t.separator);
        try {
            fields.split(first);
        } catch (const LineFault&) {  // open_table says where
        }
        for (Size i = 0; i < fields.count(); ++i) names.emplace_back(fields[i]);
        if (usual_column(names, kSmilesNames) != kNone)
            t.header = TableHeader::present;
        else if (list || names.size() == 1)
            t.header = TableHeader::absent;
    }
    return open_table(file, t);
}

float target_of(std::string_view text, const std::string& name) {
    if (text.empty()) return std::numeric_limits<float>::quiet_NaN();
    if (equal_no_case(text, "nan"))
        line_fault("{} is {}; leave the field empty where the target is not known", name, shown(text));
    return parse_float(text, name, true);
}

struct Row {
    std::int64_t line = 0;
    std::string smiles, id;
};

void index_scaffolds(MoleculeSet& set, std::vector<std::string> scaffolds) {
    std::map<std::string, std::int32_t> number;
    for (std::string& s : scaffolds) {
        const auto [at, fresh] = number.emplace(s, static_cast<std::int32_t>(set.scaffolds.size()));
        if (fresh) set.scaffolds.push_back(std::move(s));
        set.scaffold.push_back(at->second);
    }
}

}  // namespace

std::string MoleculeTableReport::text(const MoleculeSet& s) const {
    std::string words = fmt::format("{} molecules of {} rows, {} atoms, {} scaffolds, targets: {}", s.size(), rows,
                                    s.atom_offsets.back(), s.scaffolds.size(),
                                    s.target_names.empty() ? "none" : list_of(s.target_names));
    if (!unread.empty()) words += "; columns not read: " + list_of(unread);
    if (s.skipped > 0) {
        words += fmt::format("\nskipped {} row{} that could not be parsed:", s.skipped, s.skipped == 1 ? "" : "s");
        for (const std::string& row : skipped) words += "\n  " + row;
        if (s.skipped > static_cast<std::int64_t>(skipped.size())) words += "\n  ...";
    }
    return words;
}

MoleculeSet read_molecule_table(const std::string& path, const MoleculeTableOptions& o, MoleculeTableReport& report) {
    if (!has_molecule_parser()) input_error("{}: {}", path, no_molecule_parser());
    const TextFile file(path);
    const Table t = open_molecule_table(file, o);
    if (t.columns == 0) input_error("{}: no rows; give a table with a column of SMILES", path);
    const Columns c = columns_of(path, t, o);
    MoleculeSet set;
    set.source = std::filesystem::path(path).filename().string();
    for (const Size i : c.targets) set.target_names.push_back(t.column_name(i));
    for (Size i = 0; i < t.columns; ++i)
        if (i != c.smiles && i != c.id && std::find(c.targets.begin(), c.targets.end(), i) == c.targets.end())
            report.unread.push_back(t.column_name(i));

    std::vector<Row> rows;
    std::vector<float> targets;
    each_row(path, t, [&](std::int64_t line, const LineFields& fields) {
        Row& row = rows.emplace_back();
        row.line = line;
        row.smiles = fields[c.smiles];
        if (c.id != kNone && c.id < fields.count()) row.id = fields[c.id];
        for (const Size i : c.targets) targets.push_back(target_of(fields[i], t.column_name(i)));
    });
    report.rows = std::ssize(rows);

    std::vector<std::optional<Molecule>> parsed(rows.size());
    std::atomic<bool> stop = false;
    parallel_for_uneven(Cpu{o.threads}, report.rows, [&](std::int64_t i) {
        if (stop || (i % 256 == 0 && stop_requested())) {
            stop = true;
            return;
        }
        parsed[static_cast<Size>(i)] = parse_molecule(rows[static_cast<Size>(i)].smiles);
    });
    if (stop) run_error("interrupted while reading molecules; nothing was written");

    std::vector<std::string> scaffolds;
    for (Size i = 0; i < rows.size(); ++i) {
        if (!parsed[i]) {
            if (o.skip_bad && ++set.skipped > static_cast<std::int64_t>(kShownRows)) continue;
            const std::string what = fmt::format("{}:{}: SMILES {} cannot be parsed: {}", path, rows[i].line,
                                                 shown(rows[i].smiles), why_not_parsed(rows[i].smiles));
            if (!o.skip_bad) input_error("{}; correct it, or leave such rows out with --skip-bad", what);
            report.skipped.push_back(what);
            continue;
        }
        set.add(*parsed[i]);
        scaffolds.push_back(std::move(parsed[i]->scaffold));
        set.smiles.push_back(std::move(rows[i].smiles));
        set.lines.push_back(rows[i].line);
        if (c.id != kNone) set.ids.push_back(std::move(rows[i].id));
        const auto first = targets.begin() + static_cast<std::ptrdiff_t>(i * c.targets.size());
        set.targets.insert(set.targets.end(), first, first + static_cast<std::ptrdiff_t>(c.targets.size()));
        parsed[i].reset();
    }
    if (set.size() == 0)
        input_error("{}: no row of its {} holds a molecule; is {} the column of SMILES?", path, report.rows,
                    t.column_name(c.smiles));
    index_scaffolds(set, std::move(scaffolds));
    return set;
}

}  // namespace fiedler
