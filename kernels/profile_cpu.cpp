// kernels/profile_cpu.cpp: the stages of a step (see profile.h), and the CPU's clock.
#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "kernels/profile.h"

namespace fiedler {
namespace {

class SteadyClock final : public MarkClock {
  public:
    bool mark(std::size_t i) override {
        if (marks_.size() <= i) marks_.resize(i + 1);
        marks_[i] = Clock::now();
        return true;
    }
    void wait() override {}
    double seconds_after(std::size_t i) override {
        return std::chrono::duration<double>(marks_[i + 1] - marks_[i]).count();
    }

  private:
    using Clock = std::chrono::steady_clock;
    std::vector<Clock::time_point> marks_;
};

StageProfile* current = nullptr;

}  // namespace

std::unique_ptr<MarkClock> mark_clock(const Cpu&) { return std::make_unique<SteadyClock>(); }

StageProfile::StageProfile(std::unique_ptr<MarkClock> clock) : clock_(std::move(clock)) {
    if (current) throw std::logic_error("profile: there is one already");
    stages_.push_back({kOutside, 0, 0});
    current = this;
    range_hook = on_range;
}
StageProfile::~StageProfile() {
    range_hook = nullptr;
    current = nullptr;
}

std::size_t StageProfile::stage_named(const char* word) {
    for (std::size_t i = 0; i < stages_.size(); ++i)
        if (stages_[i].name == word) return i;
    stages_.push_back({word, 0, 0});
    return stages_.size() - 1;
}

void StageProfile::mark() {
    if (clock_->mark(marked_.size())) marked_.push_back(open_.empty() ? 0 : open_.back());
}

void StageProfile::on_range(const char* word) {
    StageProfile& p = *current;
    if (!p.running_) return;
    if (word) {
        p.open_.push_back(p.stage_named(word));
        ++p.stages_[p.open_.back()].entered;
    } else if (!p.open_.empty()) {
        p.open_.pop_back();
    }
    p.mark();
}

void StageProfile::begin_step() {
    open_.clear();
    marked_.clear();
    running_ = true;
    mark();
}

void StageProfile::end_step() {
    mark();
    running_ = false;
    ++steps_;
    clock_->wait();
    for (std::size_t i = 0; i + 1 < marked_.size(); ++i) stages_[marked_[i]].seconds += clock_->seconds_after(i);
}

std::vector<StageProfile::Stage> StageProfile::stages() const {
    std::vector<Stage> all = stages_;
    for (Stage& s : all) s.seconds /= std::max(steps_, 1);
    std::stable_sort(all.begin(), all.end(), [](const Stage& a, const Stage& b) { return a.seconds > b.seconds; });
    return all;
}

}  // namespace fiedler
