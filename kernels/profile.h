// kernels/profile.h: how long each stage of a step takes, by the words of its Ranges (device.h). CUDA-free.
//
// While a StageProfile lives, every begin and end of a Range is a mark: an event in the device's stream (Cuda), or the
// steady clock (Cpu, whose operations are synchronous). The time from one mark to the next belongs to the innermost Range
// that is open, or to kOutside where none is, so that the stages of a step add up to the step. One at a time, from one
// thread. Work that is being recorded (graph_record) or replayed has no marks: measure without graphs.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/device.h"

namespace fiedler {

// Points in time of one device.
class MarkClock {
  public:
    virtual ~MarkClock() = default;
    virtual bool mark(std::size_t i) = 0;             // false: no marks can be set now
    virtual void wait() = 0;                          // until all marks have passed
    virtual double seconds_after(std::size_t i) = 0;  // from mark i to mark i + 1
};
std::unique_ptr<MarkClock> mark_clock(const Cpu&);
std::unique_ptr<MarkClock> mark_clock(const Cuda&);

// Keeps the stream busy for so long, and nothing else: what is to be timed without the host's own time is queued meanwhile.
void occupy(const Cuda&, double seconds);
// Reads memory [bytes] of the device, its whole 16-byte pieces, and does nothing with it. Of enough memory: whatever L2
// held is gone, and no line of it waits to be written back, which the next kernel would pay for.
void read_through(const Cuda&, const void* memory, std::size_t bytes);
// Copies memory of the device as plainly as a kernel can, 16 bytes at a time, or with no place to copy to only reads it:
// what kernels that are bound by memory are held against. bytes: a multiple of 16; no overlap.
void plain_copy(const Cuda&, void* to, const void* from, std::size_t bytes);

class StageProfile {
  public:
    static constexpr const char* kOutside = "outside";
    struct Stage {
        std::string name;
        double seconds = 0;        // of a step, the mean of all
        std::int64_t entered = 0;  // of all steps
    };

    explicit StageProfile(std::unique_ptr<MarkClock>);
    ~StageProfile();
    StageProfile(const StageProfile&) = delete;
    StageProfile& operator=(const StageProfile&) = delete;

    void begin_step();
    void end_step();  // waits for the device
    int steps() const { return steps_; }
    std::vector<Stage> stages() const;  // longest first

  private:
    static void on_range(const char* word);
    void mark();
    std::size_t stage_named(const char* word);

    std::unique_ptr<MarkClock> clock_;
    std::vector<Stage> stages_;
    std::vector<std::size_t> open_;    // stages of the Ranges that are open
    std::vector<std::size_t> marked_;  // the stage that begins at each mark of this step
    bool running_ = false;
    int steps_ = 0;
};

}  // namespace fiedler
