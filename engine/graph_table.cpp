#include "engine/graph_table.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <functional>

#include "engine/error.h"
#include "engine/utf8.h"

namespace fiedler {
namespace {

constexpr std::size_t kSampleRows = 100;

struct Pair {
    std::string_view from, to;
};
constexpr Pair kHeaders[] = {
    {"source", "target"},       {"from", "to"},  {"src", "dst"},    {"u", "v"},       {"node1", "node2"},
    {"node_1", "node_2"},       {"id1", "id2"},  {"id_1", "id_2"},  {"start", "end"}, {"fromnode", "tonode"},
    {"fromnodeid", "tonodeid"}, {"id", "label"}, {"node", "label"}, {"id", "class"},  {"node", "class"}};

bool has_cell(const std::vector<std::string>& row, std::string_view text) {
    return std::any_of(row.begin(), row.end(), [&](const std::string& cell) { return equal_no_case(cell, text); });
}

bool looks_like_header(const Table& t, const TableOptions& options) {
    const std::vector<std::string>& first = t.sample.front();
    for (const std::string& column : options.chosen)
        if (!column.empty() && !is_integer(column)) return true;
    for (const Pair& pair : kHeaders)
        if (has_cell(first, pair.from) && has_cell(first, pair.to)) return true;
    if (options.single)
        for (const char* name : {"id", "node", "label", "class"})
            if (equal_no_case(first[0], name)) return true;
    for (std::size_t c = 0; c < first.size() && t.sample.size() > 1; ++c) {  // text above numbers
        const auto number = [c](const std::vector<std::string>& row) { return c < row.size() && is_number(row[c]); };
        if (!first[c].empty() && !number(first) && std::all_of(t.sample.begin() + 1, t.sample.end(), number))
            return true;
    }
    return false;
}

}  // namespace

std::string Table::column_name(std::size_t i) const {
    return i < names.size() && !names[i].empty() ? names[i] : "column " + std::to_string(i + 1);
}

Table open_table(const TextFile& file, const TableOptions& options) {
    Table t;
    t.file = &file;
    t.separator = options.separator;
    t.comments = options.comments;
    std::string_view rest = file.text();
    const char* const begin = rest.data();
    std::int64_t line_number = 0;
    std::string_view header_rest;  // what follows the first row, should that be a header
    LineFields fields(t.separator);
    while (!rest.empty() && t.sample.size() <= kSampleRows) {
        const std::string_view before = rest;
        const std::string_view line = take_line(rest);
        ++line_number;
        const bool above = t.sample.empty();
        if (trimmed(line).empty() || t.is_comment(line) || (above && line.front() == '#')) continue;
        if (above) {
            t.top = {begin, static_cast<std::size_t>(before.data() - begin)};
            t.body = before;
            t.first_line = t.body_line = line_number;
            header_rest = rest;
        }
        try {
            fields.split(line);
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", file.path(), line_number, fault.what);
        }
        std::vector<std::string>& row = t.sample.emplace_back();
        for (std::size_t i = 0; i < fields.count(); ++i) row.emplace_back(fields[i]);
    }
    if (t.sample.empty()) return t;
    t.columns = t.sample.front().size();
    if (options.header == TableHeader::present ||
        (options.header == TableHeader::automatic && looks_like_header(t, options))) {
        t.names = t.sample.front();
        t.sample.erase(t.sample.begin());
        t.body = header_rest;
        t.body_line = t.first_line + 1;
    }
    // Rows of another width are faults that parse_lines reports; the sample is of good ones.
    std::erase_if(t.sample, [&](const auto& row) { return row.size() != t.columns; });
    return t;
}

std::pair<std::size_t, std::size_t> usual_columns(const std::vector<std::string>& names) {
    const auto place = [&](std::string_view name) {
        const auto found = std::find_if(names.begin(), names.end(),
                                        [&](const std::string& cell) { return equal_no_case(cell, name); });
        return static_cast<std::size_t>(found - names.begin());
    };
    for (const Pair& pair : kHeaders)
        if (place(pair.from) < names.size() && place(pair.to) < names.size()) return {place(pair.from), place(pair.to)};
    return {0, 1};
}

char csv_separator(std::string_view text) {
    const std::string_view first = first_row_of(text);
    for (const char c : {',', ';', '\t'})
        if (first.find(c) != first.npos) return c;
    return ',';
}

std::string extension_of(const std::string& path) {
    std::string text = std::filesystem::path(path).extension().string();
    for (char& c : text)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return text;
}

std::string_view first_row_of(std::string_view text) {
    while (!text.empty()) {
        const std::string_view line = take_line(text);
        if (!trimmed(line).empty() && line[0] != '#' && line[0] != '%') return line;
    }
    return {};
}

bool is_integer(std::string_view text) {
    if (text.starts_with('-')) text.remove_prefix(1);
    return !text.empty() && text.find_first_not_of("0123456789") == text.npos;
}

std::int32_t parse_id(std::string_view text, const IdRange& range) {
    std::int64_t id = -1;
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, id);
    if (error == std::errc{} && stop == end && id >= range.first && id <= range.last)
        return static_cast<std::int32_t>(id);
    if (!is_integer(text))
        line_fault("id {} is not an integer, as ids before it are; correct it, or let ids be names", shown(text));
    if (text.starts_with('-')) line_fault("id {} is negative; ids are integers from 0, or let them be names", text);
    line_fault("id {} is out of range: ids go from {} to {}{}{}", shown(text), range.first, range.last,
               range.reason.empty() ? "; let ids be names" : ", ", range.reason);
}

float parse_weight(std::string_view text) {
    const float weight = parse_float(text, "weight", false);
    if (weight < 0) line_fault("weight {} is negative; weights of a graph are not (a Laplacian is made here)", text);
    return weight;
}

void check_name(std::string_view text) {
    if (text.empty()) line_fault("an empty id; fill it in or remove the line");
    if (find_invalid_utf8(text) != text.npos) line_fault("id {} is not UTF-8; save the file as UTF-8", shown(text));
}

std::int32_t NameTable::number_of(Entry entry) {
    if (2 * (entries_.size() + 1) > slots_.size()) grow();
    std::size_t at = entry.hash & (slots_.size() - 1);
    for (; slots_[at] >= 0; at = (at + 1) & (slots_.size() - 1)) {
        const Entry& other = entries_[static_cast<std::size_t>(slots_[at])];
        if (other.hash == entry.hash && other.name == entry.name) return slots_[at];
    }
    check_name(entry.name);
    if (entries_.size() >= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
        line_fault("more than 2147483647 nodes; split the graph");
    const std::less<const char*> before;
    const char* const end = home_.data() + home_.size();
    if (home_.empty() || before(entry.name.data(), home_.data()) || !before(entry.name.data(), end))
        entry.name = own_.emplace_back(entry.name);
    entries_.push_back(entry);
    return slots_[at] = static_cast<std::int32_t>(entries_.size()) - 1;
}

void NameTable::grow() {
    slots_.assign(std::max<std::size_t>(64, 2 * slots_.size()), -1);
    for (std::size_t i = 0; i < entries_.size(); ++i) {
        std::size_t at = entries_[i].hash & (slots_.size() - 1);
        while (slots_[at] >= 0) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = static_cast<std::int32_t>(i);
    }
}

std::vector<std::int32_t> NameTable::numbers_of(const NameTable& other) {
    std::vector<std::int32_t> numbers(other.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = number_of(other.entries_[i]);
    return numbers;
}

}  // namespace fiedler
