// engine/prefetch.h: the micro-batches of the coming steps, read by a thread of its own while the device computes.
#pragma once
#include <array>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

#include "engine/batch.h"

namespace fiedler {

// Steps come in the order of the cursor, exactly as if read(cursor, batch) were called when they are taken. At most
// kAhead of them are ready or being read, so the thread runs ahead of the cursor that a checkpoint needs: that of the
// steps taken, which is cursor(). `read` is called by the thread alone; what it uses must outlive the prefetcher, and
// others may read but not change it. The destructor waits for the step being read, and for no other.
class Prefetcher {
  public:
    static constexpr std::size_t kAhead = 2;

    using Read = std::function<void(std::int64_t cursor, Batch&)>;  // Dataset::train_batch

    // batch_windows: by how much the cursor advances with each micro-batch
    Prefetcher(Read read, std::size_t micro_batches, std::int64_t batch_windows, std::int64_t cursor)
        : read_(std::move(read)), batch_windows_(batch_windows), taken_(cursor) {
        for (auto& step : ring_) step.resize(micro_batches);
        thread_ = std::jthread([this, cursor](const std::stop_token& stop) { run(stop, cursor); });
    }

    // The micro-batches of the next step; they stay as they are until the next call. Waits until they are read. What the
    // thread threw is thrown here, in its turn: when the steps before it have been taken, and each time from then on.
    const std::vector<Batch>& next() {
        std::unique_lock lock(mutex_);
        if (held_) {
            held_ = false;
            ++first_;
        }
        changed_.wait(lock, [&] { return ready_ > first_ || error_; });
        if (ready_ == first_) std::rethrow_exception(error_);
        held_ = true;
        changed_.notify_all();
        const std::vector<Batch>& step = ring_[first_ % ring_.size()];
        taken_ += static_cast<std::int64_t>(step.size()) * batch_windows_;
        return step;
    }
    std::int64_t cursor() const { return taken_; }

  private:
    void run(const std::stop_token& stop, std::int64_t cursor) {
        try {
            for (std::size_t step = 0; !stop.stop_requested(); ++step) {
                {
                    std::unique_lock lock(mutex_);
                    if (!changed_.wait(lock, stop, [&] { return step < first_ + kAhead + (held_ ? 1 : 0); })) return;
                }
                for (Batch& batch : ring_[step % ring_.size()]) {
                    read_(cursor, batch);
                    cursor += batch_windows_;
                }
                const std::lock_guard lock(mutex_);
                ready_ = step + 1;
                changed_.notify_all();
            }
        } catch (...) {
            const std::lock_guard lock(mutex_);
            error_ = std::current_exception();
            changed_.notify_all();
        }
    }

    const Read read_;
    const std::int64_t batch_windows_;
    std::int64_t taken_;
    std::mutex mutex_;
    std::condition_variable_any changed_;
    std::array<std::vector<Batch>, kAhead + 1> ring_;  // one more: the step that was taken last
    std::size_t first_ = 0, ready_ = 0;                // steps given back, steps read
    bool held_ = false;                                // step first_ is with the caller
    std::exception_ptr error_;
    std::jthread thread_;  // the last member: stopped before the others go
};

}  // namespace fiedler
