// engine/table_text.h: text files that hold a table, a row a line: fields between commas, tabs or blanks. Read in
// parallel, in pieces that end at line ends; faults carry file and line.
//
// A quoted field ("a, b", with "" for a quote) begins and ends on one line. Lines end with \n or \r\n; blank lines do
// not count as rows.
#pragma once
#include <cstdint>
#include <deque>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"
#include "engine/files.h"
#include "kernels/parallel.h"

namespace fiedler {

// A mapped file of text. InputError: not readable, compressed, or binary.
class TextFile {
  public:
    explicit TextFile(const std::string& path);
    const std::string& path() const { return path_; }
    std::string_view text() const { return text_; }  // without a byte order mark

  private:
    std::string path_;
    MappedFile file_;
    std::string_view text_;
};

// What is wrong with a line, and what to do about it; parse_lines adds file and line.
struct LineFault {
    std::string what;
};
template <class... Args>
[[noreturn]] void line_fault(fmt::format_string<Args...> format, Args&&... args) {
    throw LineFault{fmt::format(format, std::forward<Args>(args)...)};
}

constexpr char kBlanks = ' ';  // as a separator: any run of blanks and tabs; no quotes

// Splits lines at a separator; the views live as long as the line's text and until the next split.
class LineFields {
  public:
    explicit LineFields(char separator) : separator_(separator) {}
    void split(std::string_view line);  // LineFault: a quote that is not closed, or text after it
    std::size_t count() const { return fields_.size(); }
    std::string_view operator[](std::size_t i) const { return fields_[i]; }

  private:
    void split_quoted(std::string_view line);
    char separator_;
    std::vector<std::string_view> fields_;
    std::deque<std::string> unescaped_;
};

std::string_view trimmed(std::string_view text);  // without blanks, tabs and \r at its ends
bool equal_no_case(std::string_view a, std::string_view b);
std::string shown(std::string_view text);            // in quotes, for a message: short and printable
std::string separator_text(char separator);          // "comma", "tab", "blank", ...
std::string_view take_line(std::string_view& text);  // cuts off the first line
bool is_number(std::string_view text);               // "-1.5e3", "nan", ...

// A finite number that float can hold. LineFault names `what` ("weight", "column 3"). tiny_is_zero: what is too small for
// float becomes 0, else it is a fault.
float parse_float(std::string_view text, std::string_view what, bool tiny_is_zero);

// A column given by name (of `names`, empty: no header) or by number from 1. InputError; `what`: "column of weights".
std::size_t find_column(const std::string& path, const std::string& column, const std::vector<std::string>& names,
                        std::size_t count, std::string_view what);

std::vector<std::string_view> cut_at_lines(std::string_view text, std::size_t piece_bytes);

// Throws for the first piece that failed. lines[i]: seen by piece i, the faulty one included.
void throw_first_failure(const std::string& path, std::int64_t first_line, const std::vector<std::int64_t>& lines,
                         const std::vector<std::exception_ptr>& failures);

// One parser (made by make()) for each piece of text, in order; parser.line(view) gets each line that is not blank. The
// text begins with line `first_line` of the file. InputError: path:line and the first LineFault.
template <class Make>
auto parse_lines(const std::string& path, std::string_view text, std::int64_t first_line, Make&& make) {
    constexpr std::size_t kPieceBytes = std::size_t{1} << 21;
    const std::vector<std::string_view> pieces = cut_at_lines(text, kPieceBytes);
    std::vector<decltype(make())> parsers;
    parsers.reserve(pieces.size());
    for (std::size_t i = 0; i < pieces.size(); ++i) parsers.push_back(make());
    std::vector<std::int64_t> lines(pieces.size(), 0);
    std::vector<std::exception_ptr> failures(pieces.size());
    parallel_for_uneven(Cpu{}, static_cast<std::int64_t>(pieces.size()), [&](std::int64_t piece) {
        const auto i = static_cast<std::size_t>(piece);
        std::int64_t seen = 0;
        try {
            for (std::string_view rest = pieces[i]; !rest.empty();) {
                const std::string_view line = take_line(rest);
                ++seen;
                if (!trimmed(line).empty()) parsers[i].line(line);
            }
        } catch (...) {
            failures[i] = std::current_exception();
        }
        lines[i] = seen;
    });
    throw_first_failure(path, first_line, lines, failures);
    return parsers;
}

}  // namespace fiedler
