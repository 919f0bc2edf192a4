#include "engine/bench_parts.h"

#include <algorithm>
#include <chrono>

#include "engine/kernel_trace.h"

namespace fiedler {

namespace {

void set_times(bench::StepRow& row, std::vector<double> seconds) {
    std::sort(seconds.begin(), seconds.end());
    const auto at = [&](double q) { return seconds[std::size_t(q * double(seconds.size() - 1) + 0.5)]; };
    const std::size_t middle = seconds.size() / 2;
    row.seconds = seconds.size() % 2 ? seconds[middle] : (seconds[middle - 1] + seconds[middle]) / 2;
    row.noise = (at(0.9) - at(0.1)) / row.seconds;
}

}  // namespace

std::vector<double> time_steps(const BenchedSteps& model, int warm_up, int steps, bench::StepRow& row) {
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < warm_up; ++i) model.step();
    std::vector<double> seconds;
    model.submit();
    model.submit();
    (void)model.finish();
    auto last = Clock::now();
    for (int i = 0; i < steps; ++i) {
        if (i + 1 < steps) model.submit();
        row.loss = model.finish().loss;
        const auto now = Clock::now();
        seconds.push_back(std::chrono::duration<double>(now - last).count());
        last = now;
    }
    set_times(row, seconds);
    return seconds;
}

void profile_stages(const BenchedSteps& model, std::unique_ptr<MarkClock> clock, int steps, bench::StepRow& row) {
    model.step();
    StageProfile profile(std::move(clock));
    for (int i = 0; i < steps; ++i) {
        profile.begin_step();
        model.step();
        profile.end_step();
    }
    row.profiled_seconds = 0;
    for (const StageProfile::Stage& s : profile.stages()) {
        row.stages.push_back({s.name, s.seconds, s.entered / profile.steps()});
        row.profiled_seconds += s.seconds;
    }
}

void trace_step(const BenchedSteps& model, bench::StepRow& row) {
    constexpr int kSteps = 3;
    constexpr std::size_t kMost = 10;
    const KernelTrace trace = trace_kernels([&] {
        for (int i = 0; i < kSteps; ++i) model.step();
    });
    row.kernels_note = trace.note;
    row.kernels_seconds = trace.seconds / kSteps;
    for (const KernelTime& k : trace.kernels) row.kernels_launched += k.launches / kSteps;
    for (std::size_t i = 0; i < std::min(kMost, trace.kernels.size()); ++i) {
        const KernelTime& k = trace.kernels[i];
        row.kernels.push_back({k.name, k.seconds / kSteps, k.launches / kSteps});
    }
}

}  // namespace fiedler
