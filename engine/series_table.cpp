#include "engine/series_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <map>

#include "engine/error.h"
#include "engine/graph_table.h"

namespace fiedler {

namespace {

using Size = std::size_t;
namespace chrono = std::chrono;
constexpr std::int64_t kDay = 86400;

chrono::year_month_day calendar(std::int64_t date) {
    return chrono::sys_days(chrono::days(date >= 0 ? date / kDay : -((-date + kDay - 1) / kDay)));
}
std::int64_t time_of_day(std::int64_t date) { return ((date % kDay) + kDay) % kDay; }
std::int64_t seconds_of(chrono::year_month_day day) {
    return std::int64_t{chrono::sys_days(day).time_since_epoch().count()} * kDay;
}
std::int64_t month_number(std::int64_t date) {
    const auto day = calendar(date);
    return std::int64_t{int(day.year())} * 12 + unsigned(day.month()) - 1;
}

// A fixed number of digits.
bool take_digits(std::string_view& text, Size count, int& value) {
    if (text.size() < count) return false;
    value = 0;
    for (Size i = 0; i < count; ++i) {
        if (text[i] < '0' || text[i] > '9') return false;
        value = value * 10 + (text[i] - '0');
    }
    text.remove_prefix(count);
    return true;
}
bool take_char(std::string_view& text, char c) {
    if (!text.starts_with(c)) return false;
    text.remove_prefix(1);
    return true;
}

bool parse_time(std::string_view text, std::int64_t& seconds) {
    int hour = 0, minute = 0, second = 0;
    if (text.ends_with('Z')) text.remove_suffix(1);
    if (!take_digits(text, 2, hour) || !take_char(text, ':') || !take_digits(text, 2, minute)) return false;
    if (take_char(text, ':')) {
        if (!take_digits(text, 2, second)) return false;
        if (take_char(text, '.') && (text.empty() || text.find_first_not_of("0123456789") != text.npos))
            return false;
        else
            text = {};
    }
    seconds = hour * 3600 + minute * 60 + second;
    return text.empty() && hour < 24 && minute < 60 && second < 60;
}

// Rows from the first on that are one step apart.
std::size_t steady_rows(const std::vector<std::int64_t>& dates, const SeriesClock& clock) {
    std::size_t n = 1;
    while (n < dates.size() && dates[n] == clock.later(dates[n - 1], 1)) ++n;
    return n;
}

// A step is a number of seconds, or of months where that holds for as many rows (four weeks are a month in February).
void find_step(Series& s) {
    const std::int64_t first = s.dates[0], second = s.dates[1];
    s.clock.step = second - first;
    if (s.clock.integers) return;
    const std::int64_t months = month_number(second) - month_number(first);
    if (months < 1) return;
    std::size_t most = 1;
    SeriesClock best = s.clock;
    for (const int kind : {0, 1, 2}) {  // the last day of each month, the same one, seconds: of equals the first
        SeriesClock clock = s.clock;
        if (kind < 2) clock.months = months, clock.step = 0, clock.month_ends = kind == 0;
        if (const std::size_t rows = steady_rows(s.dates, clock); rows > most) most = rows, best = clock;
    }
    s.clock = best;
}

void check_dates(const std::string& path, const std::vector<std::int64_t>& lines, Series& s, bool allow_gaps) {
    for (Size i = 1; i < s.dates.size(); ++i)
        if (s.dates[i] <= s.dates[i - 1])
            input_error("{}:{}: {} {} {}, the row before; sort the rows by date{}", path, lines[i],
                        s.clock.text(s.dates[i]), s.dates[i] == s.dates[i - 1] ? "is the date of" : "comes after",
                        s.clock.text(s.dates[i - 1]), s.dates[i] == s.dates[i - 1] ? " and keep one of each" : "");
    find_step(s);
    if (allow_gaps) return;
    for (Size i = 1; i < s.dates.size(); ++i) {
        const std::int64_t due = s.clock.later(s.dates[i - 1], 1);
        if (s.dates[i] != due)
            input_error(
                "{}:{}: {} follows {}, where {} is due: {}; fill the gap, or take rows as neighbours with "
                "--allow-gaps",
                path, lines[i], s.clock.text(s.dates[i]), s.clock.text(s.dates[i - 1]), s.clock.text(due),
                s.dates[i] > due ? "rows are missing" : "a row too many");
    }
}

}  // namespace

bool parse_date(std::string_view text, std::int64_t& date, SeriesClock& clock) {
    if (is_integer(text)) {
        const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), date);
        clock.integers = true;
        return error == std::errc{} && stop == text.data() + text.size();
    }
    int year = 0, month = 0, day = 1;
    clock = SeriesClock{};
    if (!take_digits(text, 4, year) || text.empty()) return false;
    clock.date_separator = text.front();
    if ((clock.date_separator != '-' && clock.date_separator != '/') || !take_char(text, clock.date_separator))
        return false;
    if (!take_digits(text, 2, month) || !take_char(text, clock.date_separator) || !take_digits(text, 2, day))
        return false;
    const chrono::year_month_day when{chrono::year(year), chrono::month(static_cast<unsigned>(month)),
                                      chrono::day(static_cast<unsigned>(day))};
    if (!when.ok()) return false;
    date = seconds_of(when);
    clock.date_only = text.empty();
    if (text.empty()) return true;
    clock.time_separator = text.front();
    if (clock.time_separator != ' ' && clock.time_separator != 'T') return false;
    std::int64_t seconds = 0;
    if (!parse_time(text.substr(1), seconds)) return false;
    date += seconds;
    return true;
}

std::int64_t SeriesClock::later(std::int64_t from, std::int64_t steps) const {
    if (months == 0) return from + steps * step;
    const std::int64_t number = month_number(from) + steps * months;
    const chrono::year_month ym{chrono::year(static_cast<int>(number / 12)),
                                chrono::month(static_cast<unsigned>(number % 12) + 1)};
    const chrono::year_month_day last(ym / chrono::last);
    chrono::year_month_day day(ym / calendar(from).day());
    if (month_ends || !day.ok()) day = last;
    return seconds_of(day) + time_of_day(from);
}

std::string SeriesClock::text(std::int64_t date) const {
    if (integers) return std::to_string(date);
    const auto day = calendar(date);
    std::string words = fmt::format("{:04}{}{:02}{}{:02}", int(day.year()), date_separator, unsigned(day.month()),
                                    date_separator, unsigned(day.day()));
    if (date_only) return words;
    const std::int64_t t = time_of_day(date);
    return words + fmt::format("{}{:02}:{:02}:{:02}", time_separator, t / 3600, t / 60 % 60, t % 60);
}

Series read_series(const std::string& path, const SeriesTableOptions& o) {
    const TextFile file(path);
    TableOptions t;
    t.separator = extension_of(path) == ".tsv" ? '\t' : csv_separator(file.text());
    t.header = TableHeader::present;
    const Table table = open_table(file, t);
    if (table.columns < 2) input_error("{}: a table with a column of dates and columns of numbers is needed", path);
    Size date = 0;
    if (!o.date_column.empty()) {
        date = find_column(path, o.date_column, table.names, table.columns, "column of dates");
    } else {
        for (const char* usual : {"timestamp", "time", "datetime", "date"})
            for (Size i = 0; i < table.names.size(); ++i)
                if (equal_no_case(table.names[i], usual)) date = i;
    }
    std::vector<Size> columns;
    for (Size i = 0; o.channels.empty() && i < table.columns; ++i)
        if (i != date) columns.push_back(i);
    for (const std::string& name : o.channels) {
        const Size i = find_column(path, name, table.names, table.columns, "channel");
        if (i == date || std::find(columns.begin(), columns.end(), i) != columns.end())
            input_error("{}: channel {} is {}; name each once", path, shown(name),
                        i == date ? "the column of dates" : "named twice");
        columns.push_back(i);
    }
    Series s;
    s.source = std::filesystem::path(path).filename().string();
    s.fingerprint = hex64(hash_bytes(file.text()));
    for (const Size i : columns) s.channels.push_back(table.column_name(i));
    std::vector<std::int64_t> lines;
    std::int64_t number = table.body_line;
    LineFields fields(table.separator);
    for (std::string_view rest = table.body; !rest.empty(); ++number) {
        const std::string_view line = take_line(rest);
        if (trimmed(line).empty()) continue;
        try {
            fields.split(line);
            if (fields.count() != table.columns)
                line_fault("{} fields where other rows have {}; fill in or remove the row", fields.count(),
                           table.columns);
            SeriesClock clock;
            std::int64_t when = 0;
            if (!parse_date(fields[date], when, clock) || (!lines.empty() && clock.integers != s.clock.integers))
                line_fault("date {} is none of 2016-07-01, 2016-07-01 13:00:00 or an integer; correct it",
                           shown(fields[date]));
            if (lines.empty()) s.clock = clock;
            s.clock.date_only = s.clock.date_only && clock.date_only;
            s.dates.push_back(when);
            for (const Size i : columns) {
                if (fields[i].empty())
                    line_fault("{} has no value; fill it in, or choose others with --columns", table.column_name(i));
                s.values.push_back(double(parse_float(fields[i], table.column_name(i), true)));
            }
            lines.push_back(number);
        } catch (const LineFault& fault) {
            input_error("{}:{}: {}", path, number, fault.what);
        }
    }
    if (s.rows() < 2) input_error("{}: {} rows; a series needs more", path, s.rows());
    check_dates(path, lines, s, o.allow_gaps);
    return s;
}

}  // namespace fiedler
