#include "engine/feature_files.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "engine/error.h"
#include "engine/matrix_files.h"
#include "engine/table_text.h"

namespace fiedler {

namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();

std::int64_t whole_number(std::string_view text, const char* what) {
    std::int64_t n = 0;
    const auto [last, status] = std::from_chars(text.data(), text.data() + text.size(), n);
    if (status != std::errc{} || last != text.data() + text.size() || n < 0 || n > kMost)
        line_fault("{} {} is no number from 0 to {}", what, shown(text), kMost);
    return n;
}

struct Entry {
    std::int32_t column;
    float value;
};

// "column:value ..." of one row, ascending.
void read_row(std::string_view line, std::int64_t columns, std::vector<Entry>& row) {
    row.clear();
    for (std::string_view rest = line;;) {
        const std::size_t first = rest.find_first_not_of(" \t");
        if (first == rest.npos) break;
        rest.remove_prefix(first);
        const std::size_t end = std::min(rest.find_first_of(" \t"), rest.size()), colon = rest.find(':');
        const std::string_view pair = rest.substr(0, end);
        if (colon >= end) line_fault("{} is no pair column:value; correct it", shown(pair));
        const std::int64_t column = whole_number(pair.substr(0, colon), "column");
        if (column >= columns)
            line_fault("column {} is not below {}, the number of columns that the first line gives", column, columns);
        const float value = parse_float(pair.substr(colon + 1), "value", true);
        if (value != 0) row.push_back({static_cast<std::int32_t>(column), value});
        rest.remove_prefix(end);
    }
    std::sort(row.begin(), row.end(), [](const Entry& a, const Entry& b) { return a.column < b.column; });
    for (std::size_t i = 1; i < row.size(); ++i)
        if (row[i].column == row[i - 1].column)
            line_fault("column {} is there twice; give each column of a row once", row[i].column);
}

// The first row that is not empty has a pair; or all are empty, below three numbers.
bool is_sparse(std::string_view text) {
    LineFields head(kBlanks);
    head.split(take_line(text));
    bool more = false;
    while (!text.empty()) {
        const std::string_view line = trimmed(take_line(text));
        more = true;
        if (!line.empty()) return line.find(':') != line.npos;
    }
    return more && head.count() == 3;
}

FeatureRows read_sparse(const TextFile& file) {
    FeatureRows f;
    std::string_view rest = file.text();
    LineFields head(kBlanks);
    head.split(take_line(rest));
    std::int64_t rows = 0, entries = 0, number = 1, seen = 0;
    try {
        if (head.count() != 3) line_fault("begins with {} fields; give \"rows columns entries\"", head.count());
        rows = whole_number(head[0], "rows"), f.columns = whole_number(head[1], "columns");
        entries = whole_number(head[2], "entries");
        std::vector<Entry> row;
        for (; number <= rows; ++number) {
            if (rest.empty()) line_fault("the file ends after {} of {} rows; is it cut off?", number - 1, rows);
            const std::string_view line = trimmed(take_line(rest));
            seen += std::count(line.begin(), line.end(), ':');
            read_row(line, f.columns, row);
            for (const Entry& e : row) f.column_of.push_back(e.column), f.values.push_back(e.value);
            if (static_cast<std::int64_t>(f.values.size()) > kMost) line_fault("more than {} entries", kMost);
            f.offsets.push_back(static_cast<std::int32_t>(f.values.size()));
        }
        if (!trimmed(rest).empty()) line_fault("more than the {} rows that the first line gives", rows);
        if (seen != entries)
            line_fault("{} entries where the first line gives {}; is the file cut off?", seen, entries);
    } catch (const LineFault& fault) {
        input_error("{}:{}: {}", file.path(), std::min(number + 1, rows + 1), fault.what);
    }
    return f;
}

FeatureRows from_matrix(const Matrix& m) {
    FeatureRows f;
    f.columns = m.columns;
    for (std::int64_t i = 0; i < m.rows; ++i) {
        for (std::int64_t j = 0; j < m.columns; ++j)
            if (const float v = m.values[static_cast<std::size_t>(i * m.columns + j)]; v != 0) {
                f.column_of.push_back(static_cast<std::int32_t>(j));
                f.values.push_back(v);
            }
        f.offsets.push_back(static_cast<std::int32_t>(f.values.size()));
    }
    return f;
}

bool is_npy(const std::string& path) { return path.ends_with(".npy"); }

}  // namespace

FeatureRows read_features(const std::string& path) {
    if (!is_npy(path)) {
        const TextFile file(path);
        if (is_sparse(file.text())) return read_sparse(file);
    }
    const Matrix m = read_matrix(path);
    if (m.rows * m.columns > kMost) input_error("{}: {} x {} numbers are too many", path, m.rows, m.columns);
    return from_matrix(m);
}

void normalise_rows(FeatureRows& f) {
    for (std::int64_t i = 0; i < f.rows(); ++i) {
        const auto first = f.values.begin() + f.offsets[static_cast<std::size_t>(i)],
                   last = f.values.begin() + f.offsets[static_cast<std::size_t>(i) + 1];
        double sum = 0;
        for (auto v = first; v != last; ++v) sum += std::abs(double(*v));
        if (sum > 0)
            for (auto v = first; v != last; ++v) *v = static_cast<float>(*v / sum);
    }
}

}  // namespace fiedler
