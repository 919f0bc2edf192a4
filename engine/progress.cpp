#include "engine/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>

#include "engine/error.h"

namespace fiedler {

namespace {
constexpr double kRedrawSeconds = 0.1, kLineSeconds = 10;
constexpr int kBarCells = 20;

std::size_t terminal_columns(std::FILE* out) {
    winsize size{};
    return ::ioctl(::fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

std::string scaled(double value, const char* const* units, int count, const char* separator) {
    int unit = 0;
    while (value >= 999.5 && unit + 1 < count) value /= 1000, ++unit;
    const int decimals = unit == 0 ? 0 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
    return fmt::format("{:.{}f}{}{}", value, decimals, units[unit][0] ? separator : "", units[unit]);
}
}  // namespace

std::string format_bytes(std::int64_t bytes) {
    static constexpr const char* kUnits[] = {"B", "kB", "MB", "GB", "TB"};
    return scaled(static_cast<double>(bytes), kUnits, 5, " ");
}
std::string format_count(std::int64_t count) {
    static constexpr const char* kUnits[] = {"", "K", "M", "B", "T"};
    return scaled(static_cast<double>(count), kUnits, 5, "");
}
std::string format_seconds(double seconds) {
    const auto all = static_cast<std::int64_t>(std::max(0.0, seconds) + 0.5);
    const std::int64_t hours = all / 3600, minutes = all / 60 % 60;
    return hours > 0 ? fmt::format("{}:{:02}:{:02}", hours, minutes, all % 60)
                     : fmt::format("{:02}:{:02}", minutes, all % 60);
}

Progress::Progress(std::FILE* out, std::string title, std::int64_t total)
    : out_(out), title_(std::move(title)), total_(total), terminal_(out && ::isatty(::fileno(out)) == 1) {
    if (terminal_) draw(0, {}, 0);
}

Progress::~Progress() {
    if (line_open_) std::fputc('\n', out_);
}

void Progress::update(std::int64_t done, std::string_view note) {
    if (!out_) return;
    const auto now = Clock::now();
    if (std::chrono::duration<double>(now - last_).count() < (terminal_ ? kRedrawSeconds : kLineSeconds)) return;
    last_ = now;
    draw(done, note, std::chrono::duration<double>(now - start_).count());
}

void Progress::draw(std::int64_t done, std::string_view note, double seconds) {
    std::string line = title_;
    if (total_ > 0) {
        const double share = std::clamp(static_cast<double>(done) / static_cast<double>(total_), 0.0, 1.0);
        const int cells = static_cast<int>(share * kBarCells);
        if (terminal_) line += fmt::format(" [{}{}]", std::string(cells, '#'), std::string(kBarCells - cells, '.'));
        line += fmt::format(" {:3.0f} % {}/{}", share * 100, format_bytes(done), format_bytes(total_));
        if (!note.empty()) line += fmt::format(", {}", note);
        if (share > 0 && seconds > 1) line += fmt::format(", {} left", format_seconds(seconds / share - seconds));
    } else {
        line += fmt::format(" {}{}{}", format_bytes(done), note.empty() ? "" : ", ", note);
    }
    if (terminal_) {
        line.resize(std::min(line.size(), terminal_columns(out_) - 1));
        fmt::print(out_, "\r{}\033[K", line);
        line_open_ = true;
    } else {
        fmt::print(out_, "{}\n", line);
    }
    std::fflush(out_);
}

void Progress::finish(std::string_view summary) {
    if (!out_) return;
    if (terminal_) fmt::print(out_, "\r\033[K");
    line_open_ = false;
    fmt::print(out_, "{}: {}\n", title_, summary);
    std::fflush(out_);
}

}  // namespace fiedler
