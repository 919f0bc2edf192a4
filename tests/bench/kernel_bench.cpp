// tests/bench/kernel_bench.cpp: the benchmarks of families that are built without the engine (FIEDLER_FAMILIES). With
// the engine they are `fiedler bench`.
//
//   kernel_bench [FAMILY...] [--small] [--json FILE]
//
// Exit codes: 0 done, 1 a case failed, 2 bad usage, 3 built for CUDA but no GPU here.
#include <algorithm>
#include <cstdio>
#include <exception>

#include "kernels/device.h"
#include "tests/bench/bench.h"

namespace fiedler::bench {
namespace {

int usage(const std::string& what) {
    std::fprintf(stderr, "kernel_bench: %s\nusage: kernel_bench [FAMILY...] [--small] [--json FILE]\n", what.c_str());
    return 2;
}

int run(const std::vector<std::string>& arguments) {
    Options o;
    std::string json;
    const std::vector<std::string> known = family_names();
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        const std::string& a = arguments[i];
        if (a == "--small")
            o.small = true;
        else if (a == "--json" && i + 1 < arguments.size())
            json = arguments[++i];
        else if (std::find(known.begin(), known.end(), a) == known.end())
            return usage("no family '" + a + "'");
        else
            o.families.push_back(a);
    }
    const Listener listener{print_header, print_row};
#if FIEDLER_CUDA
    std::string why;
    if (cuda_device_count(&why) == 0) {
        std::fprintf(stderr, "kernel_bench: no GPU, nothing measured: %s\n", why.c_str());
        return 3;
    }
    const Result result = run_on_cuda(o, listener);
#else
    const Result result = run_on_cpu(o, listener);
#endif
    if (!json.empty() && !write_json(json, result)) return usage("cannot write " + json);
    return result.failed() ? 1 : 0;
}

}  // namespace
}  // namespace fiedler::bench

int main(int argc, char** argv) {
    try {
        return fiedler::bench::run({argv + 1, argv + argc});
    } catch (const std::exception& e) {
        std::fprintf(stderr, "kernel_bench: %s\n", e.what());
        return 1;
    }
}
