// engine/prefetch.h: what the coming steps need, made ready by a thread of its own while the device computes.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <stop_token>
#include <thread>
#include <utility>
#include <vector>

namespace fiedler {

// Steps come in the order of the cursor, exactly as if read(cursor, step) were called when they are taken; read moves the
// cursor on to the next step. At most kAhead of them are ready or being read, so the thread runs ahead of the cursor that
// a checkpoint needs: that of the steps taken, which is cursor(). `read` is called by the thread alone; what it uses must
// outlive the prefetcher, and others may read but not change it. The destructor waits for the step being read, and for no
// other.
template <class Step, class Cursor = std::int64_t>
class Prefetcher {
  public:
    static constexpr std::size_t kAhead = 2;

    using Read = std::function<void(Cursor&, Step&)>;

    // rooms: kAhead, and one more for each step that stays as it is once taken. All end as steps, again and again: memory
    // in them is used again.
    Prefetcher(Read read, std::vector<Step> rooms, Cursor cursor) : read_(std::move(read)), cursor_(std::move(cursor)) {
        if (rooms.size() <= kAhead) throw std::logic_error("prefetch: no room for the step that is taken");
        for (Step& room : rooms) ring_.push_back({std::move(room), cursor_});
        thread_ = std::jthread([this, start = cursor_](const std::stop_token& stop) { run(stop, start); });
    }

    // The next step; it stays as it is until rooms - kAhead more have been asked for. Waits until it is read. What the
    // thread threw is thrown here, in its turn: when the steps before it have been taken, and each time from then on.
    const Step& next() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return ready_ > taken_ || error_; });
        if (ready_ == taken_) std::rethrow_exception(error_);
        const Room& room = ring_[taken_++ % ring_.size()];
        changed_.notify_all();
        cursor_ = room.after;
        return room.step;
    }
    const Cursor& cursor() const { return cursor_; }

  private:
    struct Room {
        Step step;
        Cursor after;
    };

    void run(const std::stop_token& stop, Cursor cursor) {
        try {
            for (std::size_t step = 0; !stop.stop_requested(); ++step) {
                {
                    std::unique_lock lock(mutex_);
                    if (!changed_.wait(lock, stop, [&] { return step < taken_ + kAhead; })) return;
                }
                Room& room = ring_[step % ring_.size()];
                read_(cursor, room.step);
                room.after = cursor;
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
    Cursor cursor_;
    std::mutex mutex_;
    std::condition_variable_any changed_;
    std::vector<Room> ring_;
    std::size_t taken_ = 0, ready_ = 0;  // steps taken, read: the ring's other rooms hold those taken before
    std::exception_ptr error_;
    std::jthread thread_;  // the last member: stopped before the others go
};

}  // namespace fiedler
