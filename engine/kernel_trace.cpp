#include "engine/kernel_trace.h"

#if FIEDLER_CUDA && __has_include(<cupti.h>)
#define FIEDLER_CUPTI 1
#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#else
#define FIEDLER_CUPTI 0
#endif

namespace fiedler {

#if FIEDLER_CUPTI

namespace {

// Without the C++ around it: "attention_forward<64, 1, true>".
std::string readable(const char* mangled) {
    int status = 0;
    char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
    std::string name = status == 0 ? demangled : mangled;
    std::free(demangled);
    for (const char* noise : {"void ", "fiedler::", "(anonymous namespace)::"})
        for (std::size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, std::strlen(noise));
    if (const std::size_t arguments = name.rfind('('); arguments != std::string::npos && arguments > 0)
        name.resize(arguments);
    return name.substr(0, 120);
}

struct Collected {
    std::map<std::string, KernelTime> kernels;  // by mangled name
};
Collected* collected = nullptr;

struct Cupti {
    void* library = nullptr;
    decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
    decltype(&cuptiActivityEnable) enable = nullptr;
    decltype(&cuptiActivityDisable) disable = nullptr;
    decltype(&cuptiActivityFlushAll) flush = nullptr;
    decltype(&cuptiActivityGetNextRecord) next = nullptr;
    std::string failure;

    Cupti() {
        // Records have the layout of the headers' major version.
        const std::string name = fmt::format("libcupti.so.{}", CUPTI_API_VERSION / 10000);
        library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            failure = fmt::format("{} cannot be loaded", name);
            return;
        }
        const auto load = [&](auto& function, const char* symbol_name) {
            void* symbol = dlsym(library, symbol_name);
            if (!symbol) failure = fmt::format("{} lacks {}", name, symbol_name);
            std::memcpy(&function, &symbol, sizeof symbol);
        };
        load(register_callbacks, "cuptiActivityRegisterCallbacks");
        load(enable, "cuptiActivityEnable");
        load(disable, "cuptiActivityDisable");
        load(flush, "cuptiActivityFlushAll");
        load(next, "cuptiActivityGetNextRecord");
    }
};
Cupti& cupti() {
    static Cupti library;
    return library;
}

void CUPTIAPI give_buffer(std::uint8_t** buffer, std::size_t* size, std::size_t* most_records) {
    constexpr std::size_t kBytes = std::size_t(8) << 20;
    *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(64, kBytes));
    *size = *buffer ? kBytes : 0;
    *most_records = 0;
}
void CUPTIAPI take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
    CUpti_Activity* record = nullptr;
    while (collected && cupti().next(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
        const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
        KernelTime& k = collected->kernels[kernel->name ? kernel->name : "?"];
        k.seconds += double(kernel->end - kernel->start) * 1e-9;
        ++k.launches;
    }
    std::free(buffer);
}

}  // namespace

KernelTrace trace_kernels(const std::function<void()>& work) {
    KernelTrace trace;
    Cupti& c = cupti();
    if (!c.failure.empty()) return trace.note = c.failure, trace;
    Collected found;
    CUptiResult status = c.register_callbacks(give_buffer, take_buffer);
    if (status == CUPTI_SUCCESS) status = c.enable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    if (status != CUPTI_SUCCESS) {
        trace.note = fmt::format("CUPTI refuses to trace (error {})", static_cast<int>(status));
        return trace;
    }
    collected = &found;
    try {
        work();
    } catch (...) {
        (void)c.flush(1);
        collected = nullptr;
        throw;
    }
    (void)c.flush(1);
    (void)c.disable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    collected = nullptr;
    for (auto& [mangled, k] : found.kernels) {
        k.name = readable(mangled.c_str());
        trace.seconds += k.seconds;
        trace.kernels.push_back(std::move(k));
    }
    std::stable_sort(trace.kernels.begin(), trace.kernels.end(),
                     [](const KernelTime& a, const KernelTime& b) { return a.seconds > b.seconds; });
    if (trace.kernels.empty()) trace.note = "CUPTI reported no kernel";
    return trace;
}

#else

KernelTrace trace_kernels(const std::function<void()>&) {
    KernelTrace trace;
    trace.note = FIEDLER_CUDA ? "this binary was built without CUPTI's headers" : "this binary was built without CUDA";
    return trace;
}

#endif

}  // namespace fiedler
