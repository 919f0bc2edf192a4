// engine/graph_table.h: what the readers of graph_files.h share: how a file's rows are laid out, ids, and a table of
// names.
#pragma once
#include <deque>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "engine/graph_files.h"
#include "engine/table_text.h"

namespace fiedler {

// A text file cut into what stands above the rows and the rows, with a look at the first ones.
struct Table {
    const TextFile* file = nullptr;
    char separator = kBlanks;
    bool comments = false;                         // lines with # or % are comments everywhere, not just above the rows
    std::vector<std::string> names;                // of columns; empty: no header
    std::size_t columns = 0;                       // in every row; 0: no rows
    std::string_view body;                         // the rows
    std::int64_t first_line = 1;                   // number of the first row's line, or of the header's
    std::int64_t body_line = 1;                    // number of body's first line
    std::string_view top;                          // comments above
    std::vector<std::vector<std::string>> sample;  // the first 100 rows

    std::string column_name(std::size_t i) const;  // "source", "column 2"
    bool is_comment(std::string_view line) const { return comments && (line[0] == '#' || line[0] == '%'); }
    template <class Test>
    bool all_of_sample(std::size_t column, Test&& test) const {
        for (const auto& row : sample)
            if (!test(std::string_view(row[column]))) return false;
        return true;
    }
};
struct TableOptions {
    char separator = kBlanks;
    bool comments = false;
    TableHeader header = TableHeader::automatic;
    std::vector<std::string> chosen;  // columns by name or number: a name means that there is a header
    bool single = false;              // one column counts: a usual name in it is a header
};
Table open_table(const TextFile& file, const TableOptions& options);
// The columns of ids under their usual names (source and target, ...), else the first two.
std::pair<std::size_t, std::size_t> usual_columns(const std::vector<std::string>& names);
char csv_separator(std::string_view text);  // comma, else semicolon or tab if the first row has these only

std::string extension_of(const std::string& path);     // ".csv", in lower case
std::string_view first_row_of(std::string_view text);  // the first line that is neither blank nor a # or % comment
bool is_integer(std::string_view text);                // digits, perhaps after a minus sign

struct IdRange {
    std::int64_t first = 0, last = std::numeric_limits<std::int32_t>::max();
    std::string reason;  // "the file says 5 nodes": for messages
};
std::int32_t parse_id(std::string_view text, const IdRange& range);  // LineFault
float parse_weight(std::string_view text);                           // LineFault
void check_name(std::string_view text);                              // LineFault: empty or not UTF-8

// Strings numbered in the order of their first appearance.
class NameTable {
  public:
    // Names inside `home`, which outlives the table, are not copied.
    explicit NameTable(std::string_view home = {}) : home_(home) {}
    NameTable(NameTable&&) = default;  // not copied: names may lie in own_
    NameTable& operator=(NameTable&&) = default;
    std::int32_t number_of(std::string_view name) { return number_of({name, hash_bytes(name)}); }
    // The numbers, in this table, of all names of another. Both add names; LineFault: a bad name, more than 2^31 - 1.
    std::vector<std::int32_t> numbers_of(const NameTable& other);
    std::size_t size() const { return entries_.size(); }
    std::string_view operator[](std::size_t i) const { return entries_[i].name; }

  private:
    struct Entry {
        std::string_view name;
        std::uint64_t hash;
    };
    std::int32_t number_of(Entry entry);
    void grow();
    std::string_view home_;
    std::vector<Entry> entries_;
    std::vector<std::int32_t> slots_;  // a power of two, at most half full; -1: free
    std::deque<std::string> own_;
};

// graph_market.cpp
bool is_market(std::string_view text);
Graph read_market(const TextFile& file, const GraphFileOptions& options, GraphFileReport& report);

}  // namespace fiedler
