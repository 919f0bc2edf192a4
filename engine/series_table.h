// engine/series_table.h: a table of channels over time: a CSV with a column of dates and columns of numbers, a row a step.
//
// Dates: 2016-07-01, 2016/07/01, with 13:00, 13:00:00 or 13:00:00.5 after a blank or T, perhaps Z at the end; or integers.
// The step between rows is one and the same: a number of seconds, or of calendar months (2016-01, 2016-02: the same day
// and time in each, or the last day of each).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fiedler {

// Seconds since 1970-01-01 as if every day had 86,400 of them; or the integer itself.
struct SeriesClock {
    bool integers = false;
    bool date_only = false;  // no time of day is written
    char date_separator = '-', time_separator = ' ';
    std::int64_t step = 0;  // seconds (or units); 0 where months is not
    std::int64_t months = 0;
    bool month_ends = false;
    // The date `steps` steps after `from`, and as the table writes it.
    std::int64_t later(std::int64_t from, std::int64_t steps) const;
    std::string text(std::int64_t date) const;
};

enum class SeriesMode { independent, channels, linear };  // series_samples.h

struct Series {
    std::vector<std::string> channels;
    std::vector<double> values;       // [rows, channels]
    std::vector<std::int64_t> dates;  // [rows], ascending
    SeriesClock clock;
    std::string source;  // name of the file, without its folder
    std::string fingerprint;
    std::int64_t rows() const { return static_cast<std::int64_t>(dates.size()); }
    std::int64_t width() const { return static_cast<std::int64_t>(channels.size()); }
};

struct SeriesTableOptions {
    std::string date_column;  // by name or number from 1; empty: date, datetime, time, timestamp, or the first
    std::vector<std::string> channels;  // empty: all other columns
    bool allow_gaps = false;            // rows are taken as neighbours whatever their dates; they must ascend anyway
};

// InputError, in one line with the row's line: a column that does not exist, a date that is none, dates that do not
// ascend, a gap, a value that is missing, NaN or no number, fewer than 2 rows.
Series read_series(const std::string& path, const SeriesTableOptions&);

// Of the text of a date; false where it is none. Fills in how it is written.
bool parse_date(std::string_view text, std::int64_t& date, SeriesClock& clock);

}  // namespace fiedler
