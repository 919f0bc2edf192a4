#include "engine/cpu_quota.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>

namespace fiedler {

std::optional<int> cpus_of_quota(std::string_view text) {
    std::istringstream words{std::string(text)};
    long long quota = 0, period = 0;  // "max" is no number
    if (!(words >> quota >> period) || quota <= 0 || period <= 0) return {};
    return static_cast<int>(std::min((quota + period - 1) / period, 1LL << 20));
}

void limit_threads_to_quota() {
    if (std::getenv("OMP_NUM_THREADS")) return;
    const auto line = [](const char* path) {
        std::ifstream file(path);
        std::string text;
        std::getline(file, text);
        return text;
    };
    std::optional<int> cpus = cpus_of_quota(line("/sys/fs/cgroup/cpu.max"));
    if (!cpus)  // cgroup v1
        cpus = cpus_of_quota(line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") + ' ' +
                             line("/sys/fs/cgroup/cpu/cpu.cfs_period_us"));
    if (cpus && *cpus < omp_get_max_threads()) omp_set_num_threads(*cpus);
}

}  // namespace fiedler
