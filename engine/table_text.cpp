#include "engine/table_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>

#include "engine/error.h"
#include "engine/utf8.h"

namespace fiedler {
namespace {

bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f'; }
char lower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

struct Packed {
    std::string_view magic, name;
};
constexpr Packed kPacked[] = {
    {"\x1f\x8b", "gzip"}, {"BZh", "bzip2"}, {"\xfd\x37zXZ", "xz"}, {"\x28\xb5\x2f\xfd", "zstd"}, {"PK\x03\x04", "zip"}};

}  // namespace

TextFile::TextFile(const std::string& path) : path_(path), file_(path), text_(file_.text()) {
    for (const Packed& p : kPacked)
        if (text_.starts_with(p.magic)) input_error("{}: compressed with {}; unpack it first", path, p.name);
    if (text_.starts_with("\xff\xfe") || text_.starts_with("\xfe\xff"))
        input_error("{}: text in UTF-16; save it as UTF-8", path);
    if (const std::size_t at = text_.find('\0'); at != text_.npos)
        input_error("{}:{}: a zero byte: a binary file; give a text file", path,
                    std::count(text_.begin(), text_.begin() + static_cast<std::ptrdiff_t>(at), '\n') + 1);
    if (text_.starts_with("\xef\xbb\xbf")) text_.remove_prefix(3);
}

std::string_view take_line(std::string_view& text) {
    const std::size_t end = text.find('\n');
    std::string_view line = text.substr(0, end);
    text.remove_prefix(end == text.npos ? text.size() : end + 1);
    if (line.ends_with('\r')) line.remove_suffix(1);
    return line;
}

std::string_view trimmed(std::string_view text) {
    while (!text.empty() && is_blank(text.front())) text.remove_prefix(1);
    while (!text.empty() && is_blank(text.back())) text.remove_suffix(1);
    return text;
}

bool equal_no_case(std::string_view a, std::string_view b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](char x, char y) { return lower(x) == lower(y); });
}

std::string shown(std::string_view text) {
    constexpr std::size_t kMost = 40;
    const bool valid = find_invalid_utf8(text) == text.npos;
    const std::size_t cut = text.size() <= kMost ? text.size() : valid ? utf8_floor(text, kMost) : kMost;
    std::string out(text.substr(0, cut));
    for (char& c : out) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte == 0x7f || (byte >= 0x80 && !valid)) c = '?';
    }
    return '"' + out + (cut < text.size() ? "..." : "") + '"';
}

std::string separator_text(char separator) {
    return separator == ','    ? "comma"
           : separator == ';'  ? "semicolon"
           : separator == '\t' ? "tab"
           : separator == ' '  ? "blank"
                               : std::string(1, separator);
}

void LineFields::split(std::string_view line) {
    fields_.clear();
    const char *at = line.data(), *const end = at + line.size();
    if (separator_ == kBlanks) {
        while (true) {
            while (at != end && is_blank(*at)) ++at;
            if (at == end) return;
            const char* const begin = at;
            while (at != end && !is_blank(*at)) ++at;
            fields_.emplace_back(begin, static_cast<std::size_t>(at - begin));
        }
    }
    if (line.find('"') != line.npos) return split_quoted(line);
    for (const char* begin = at;; ++at)
        if (at == end || *at == separator_) {
            fields_.push_back(trimmed({begin, static_cast<std::size_t>(at - begin)}));
            if (at == end) return;
            begin = at + 1;
        }
}

void LineFields::split_quoted(std::string_view line) {
    unescaped_.clear();
    const std::string_view whole = line;
    const auto skip_blanks = [&] {
        while (!line.empty() && line.front() != separator_ && is_blank(line.front())) line.remove_prefix(1);
    };
    while (true) {
        skip_blanks();
        if (!line.starts_with('"')) {  // a quote inside an unquoted field is an ordinary character
            const std::size_t end = std::min(line.find(separator_), line.size());
            fields_.push_back(trimmed(line.substr(0, end)));
            line.remove_prefix(end);
        } else {
            std::size_t end = 1;
            bool escaped = false;
            for (; end < line.size(); ++end) {
                if (line[end] != '"') continue;
                if (end + 1 == line.size() || line[end + 1] != '"') break;
                escaped = true;
                ++end;
            }
            if (end >= line.size())
                line_fault("a quote is not closed on this line: {}; close it, or double a quote inside a field",
                           shown(whole));
            fields_.push_back(line.substr(1, end - 1));
            if (escaped) {
                std::string& text = unescaped_.emplace_back();
                for (std::size_t i = 1; i < end; ++i) {
                    text += line[i];
                    if (line[i] == '"') ++i;
                }
                fields_.back() = text;
            }
            line.remove_prefix(end + 1);
            skip_blanks();
            if (!line.empty() && line.front() != separator_)
                line_fault("text after a closing quote: {}; put the whole field into quotes", shown(whole));
        }
        if (line.empty()) return;
        line.remove_prefix(1);
    }
}

namespace {

// Whether all of text is a number; value: infinite when beyond float, 0 only when the digits are zeros or when it is
// too small, which `zero` tells apart.
bool read_number(std::string_view text, float& value, bool& too_small) {
    if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
    const char* const end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (stop != end || text.empty() || error == std::errc::invalid_argument) return false;
    too_small = false;
    if (error != std::errc{} || value == 0) {
        const std::string_view digits = text.substr(0, text.find_first_of("eE"));
        const bool zero = digits.find_first_of("123456789") == digits.npos;
        // Out of range, it is the exponent that says at which end, or the number of digits before the point.
        const std::size_t e = text.find_first_of("eE");
        const bool small = (e != text.npos && e + 1 < text.size() && text[e + 1] == '-') ||
                           (e == text.npos && text.find_first_of("123456789") > std::min(text.find('.'), text.size()));
        too_small = !zero && (error == std::errc{} || small);
        value = zero || too_small ? 0.0f : text.front() == '-' ? -HUGE_VALF : HUGE_VALF;
    }
    return true;
}

}  // namespace

bool is_number(std::string_view text) {
    float value = 0;
    bool too_small = false;
    return read_number(text, value, too_small);
}

float parse_float(std::string_view text, std::string_view what, bool tiny_is_zero) {
    float value = 0;
    bool too_small = false;
    if (!read_number(text, value, too_small)) line_fault("{} is {}, not a number; correct it", what, shown(text));
    if (std::isnan(value)) line_fault("{} is {}; replace what is missing by a number", what, shown(text));
    if (std::isinf(value)) line_fault("{} is {}, infinite or beyond float; scale the numbers down", what, shown(text));
    if (too_small && !tiny_is_zero)
        line_fault("{} is {}, too small for float; scale the numbers up", what, shown(text));
    return value;
}

std::size_t find_column(const std::string& path, const std::string& column, const std::vector<std::string>& names,
                        std::size_t count, std::string_view what) {
    for (const bool exact : {true, false})
        for (std::size_t i = 0; i < names.size(); ++i)
            if (exact ? names[i] == column : equal_no_case(names[i], column)) return i;
    std::size_t number = 0;
    const char* const end = column.data() + column.size();
    const auto [stop, error] = std::from_chars(column.data(), end, number);
    if (error == std::errc{} && stop == end && number >= 1 && number <= count) return number - 1;
    if (names.empty())
        input_error("{}: {} {}: there are columns 1 to {} and no header; choose one by number", path, what,
                    shown(column), count);
    constexpr std::size_t kShown = 12;
    const std::vector<std::string> first(names.begin(),
                                         names.begin() + static_cast<std::ptrdiff_t>(std::min(kShown, names.size())));
    input_error("{}: no {} {}; there are {}{}", path, what, shown(column), list_of(first),
                names.size() > kShown ? ", ..." : "");
}

std::vector<std::string_view> cut_at_lines(std::string_view text, std::size_t piece_bytes) {
    std::vector<std::string_view> pieces;
    while (!text.empty()) {
        std::size_t end = text.size();
        if (piece_bytes < text.size()) {
            end = text.find('\n', piece_bytes - 1);
            end = end == text.npos ? text.size() : end + 1;
        }
        pieces.push_back(text.substr(0, end));
        text.remove_prefix(end);
    }
    return pieces;
}

void throw_first_failure(const std::string& path, std::int64_t first_line, const std::vector<std::int64_t>& lines,
                         const std::vector<std::exception_ptr>& failures) {
    std::int64_t line = first_line - 1;
    for (std::size_t i = 0; i < failures.size(); ++i) {
        line += lines[i];
        if (!failures[i]) continue;
        try {
            std::rethrow_exception(failures[i]);
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", path, line, fault.what);
        }
    }
}

}  // namespace fiedler
