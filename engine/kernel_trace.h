// engine/kernel_trace.h: which kernels a piece of work runs on the GPU, and for how long. By CUPTI, the CUDA toolkit's
// tracing library, which is loaded when it is asked for and missing on many machines: then `note` says so and the
// lists are empty. Never an error: a trace is an extra.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace fiedler {

struct KernelTime {
    std::string name;
    double seconds = 0;
    std::int64_t launches = 0;
};
struct KernelTrace {
    std::vector<KernelTime> kernels;  // longest first
    double seconds = 0;               // of all of them
    std::string note;                 // why there are none
};
// work must have ended on the device when it returns.
KernelTrace trace_kernels(const std::function<void()>& work);

}  // namespace fiedler
