// engine/log.h: what a run says: a JSONL log for programs and a progress line for people.
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/json.h"

namespace fiedler {

// One record a line: {"event": ..., "time": seconds since 1970, ...}, flushed at once. Events: start, tau, step, skip,
// val, sample, checkpoint, end (fields: data/README.md). Numbers that are not finite become null, bytes that are not
// UTF-8 the replacement character.
class RunLog {
  public:
    // append: goes on with an existing file (--resume); a last line that a killed process left unfinished is cut off.
    // InputError when the file cannot be written.
    RunLog(const std::string& path, bool append);
    ~RunLog();
    RunLog(const RunLog&) = delete;
    RunLog& operator=(const RunLog&) = delete;
    void write(const std::string& event, const Json& fields);
    const std::string& path() const { return path_; }

  private:
    std::string path_;
    std::FILE* file_ = nullptr;
};

struct StepProgress {
    std::int64_t step = 0, steps = 0;
    double loss = 0, lr = 0, norm = 0;
    double tokens_per_second = 0;
    const char* unit = "tok";   // what is counted a second
    double share_of_peak = -1;  // 0..1; below 0: not known
    double eta_seconds = -1;    // below 0: not known
};
// "step  120/1000  loss 4.1234  lr 2.00e-03  norm 0.512  1.23M tok/s  43.2% of peak  eta 01:05"
std::string progress_text(const StepProgress&);
std::string count_text(double n);           // 1234567 -> "1.23M"; "?" when not finite
std::string duration_text(double seconds);  // 65 -> "01:05"; "?" when not finite or negative

// Shows lines on a stream. On a terminal the progress line is written over in place, elsewhere each is a line.
class Terminal {
  public:
    explicit Terminal(std::FILE* stream);
    Terminal(std::FILE* stream, bool is_terminal, int columns = 120);
    ~Terminal();
    Terminal(const Terminal&) = delete;
    Terminal& operator=(const Terminal&) = delete;
    void progress(const std::string& text);
    void line(const std::string& text);  // a line that stays
    bool is_terminal() const { return is_terminal_; }

  private:
    void clear();
    std::FILE* stream_;
    bool is_terminal_, shown_ = false;
    int columns_ = 120;
};

}  // namespace fiedler
