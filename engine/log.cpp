#include "engine/log.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "engine/error.h"
#include "engine/files.h"
#include "engine/progress.h"

namespace fiedler {

namespace {

// Cuts off what follows the last newline: a record that was being written when its process was killed.
void drop_torn_record(const std::string& path) {
    if (!file_exists(path)) return;
    const std::string text = read_file(path);
    const std::size_t whole = text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n') + 1;
    if (whole == text.size()) return;
    std::error_code error;
    std::filesystem::resize_file(path, whole, error);
    if (error) input_error("{}: cannot write ({}); choose another output folder", path, error.message());
}

int columns_of(std::FILE* stream) {
    winsize size{};
    return ioctl(fileno(stream), TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 120;
}

}  // namespace

RunLog::RunLog(const std::string& path, bool append) : path_(path) {
    if (append) drop_torn_record(path);
    file_ = std::fopen(path.c_str(), append ? "ab" : "wb");
    if (!file_) input_error("{}: cannot write ({}); choose another output folder", path, std::strerror(errno));
}

RunLog::~RunLog() {
    if (file_) std::fclose(file_);
}

void RunLog::write(const std::string& event, const Json& fields) {
    const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    Json record = {{"event", event}, {"time", std::round(now * 1000) / 1000}};
    record.update(fields);
    const std::string line = record.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    if (std::fwrite(line.data(), 1, line.size(), file_) != line.size() || std::fflush(file_) != 0)
        input_error("{}: cannot write ({}); free some space or choose another output folder", path_,
                    std::strerror(errno));
}

std::string count_text(double n) { return std::abs(n) < 1e18 ? format_count(std::llround(n)) : "?"; }
std::string duration_text(double seconds) { return seconds >= 0 && seconds < 1e12 ? format_seconds(seconds) : "?"; }

std::string progress_text(const StepProgress& p) {
    const int width = static_cast<int>(std::to_string(p.steps).size());
    std::string text = fmt::format("step {:>{}}/{}  loss {:.4f}  lr {:.2e}  norm {:.3f}  {} {}/s", p.step, width,
                                   p.steps, p.loss, p.lr, p.norm, count_text(p.tokens_per_second), p.unit);
    if (p.share_of_peak >= 0) text += fmt::format("  {:.1f}% of peak", 100 * p.share_of_peak);
    if (p.eta_seconds >= 0) text += "  eta " + duration_text(p.eta_seconds);
    return text;
}

Terminal::Terminal(std::FILE* stream) : Terminal(stream, isatty(fileno(stream)) == 1, columns_of(stream)) {}
Terminal::Terminal(std::FILE* stream, bool is_terminal, int columns)
    : stream_(stream), is_terminal_(is_terminal), columns_(columns) {}

Terminal::~Terminal() {
    if (shown_) {
        std::fputc('\n', stream_);
        std::fflush(stream_);
    }
}

void Terminal::clear() {
    if (shown_) std::fputs("\r\033[K", stream_);
    shown_ = false;
}

void Terminal::progress(const std::string& text) {
    if (!is_terminal_) return line(text);
    clear();
    // A longer line would wrap, and \r returns to the beginning of the last piece only.
    const std::string fitting = text.substr(0, static_cast<std::size_t>(columns_ - 1));
    std::fwrite(fitting.data(), 1, fitting.size(), stream_);
    std::fflush(stream_);
    shown_ = true;
}

void Terminal::line(const std::string& text) {
    clear();
    std::fwrite(text.data(), 1, text.size(), stream_);
    std::fputc('\n', stream_);
    std::fflush(stream_);
}

}  // namespace fiedler
