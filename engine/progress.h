// engine/progress.h: how far a long piece of work has come.
//
// On a terminal one line that redraws itself; elsewhere (a log file, CI) a line every ten seconds and one at the end.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace fiedler {

class Progress {
  public:
    // total: bytes to do; 0 when unknown. out == nullptr: silent.
    Progress(std::FILE* out, std::string title, std::int64_t total);
    ~Progress();  // ends an unfinished line, so that an error message starts on its own
    Progress(const Progress&) = delete;
    Progress& operator=(const Progress&) = delete;
    void update(std::int64_t done, std::string_view note = {});
    void finish(std::string_view summary);  // replaces the bar by one last line: "title: summary"

  private:
    using Clock = std::chrono::steady_clock;
    void draw(std::int64_t done, std::string_view note, double seconds);
    std::FILE* out_;
    std::string title_;
    std::int64_t total_;
    bool terminal_ = false, line_open_ = false;
    Clock::time_point start_ = Clock::now(), last_ = start_;
};

std::string format_bytes(std::int64_t bytes);  // "12.3 MB" (powers of ten)
std::string format_count(std::int64_t count);  // "1.23M"
std::string format_seconds(double seconds);    // "01:23", "1:02:03"

}  // namespace fiedler
