// engine/cpu_quota.h: how many CPUs the process may use at a time where a container limits its time (cgroups), not its set
// of CPUs. OpenMP looks at the set alone: more threads than the quota pays for wait for each other, all of them stopped.
#pragma once
#include <optional>
#include <string_view>

namespace fiedler {

// From the text of cpu.max (cgroup v2: "150000 100000", "max 100000"), rounded up; none: no limit, or not such a text.
std::optional<int> cpus_of_quota(std::string_view text);
// Bounds OpenMP's default number of threads by this process' quota, unless OMP_NUM_THREADS says it.
void limit_threads_to_quota();

}  // namespace fiedler
