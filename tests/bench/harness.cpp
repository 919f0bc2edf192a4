// tests/bench/harness.cpp: times the cases of the families and reports them (see harness.h).
//
//   kernel_bench [family ...] [--list] [--small] [--json FILE] [--samples N]
//
// Exit codes: 0 done, 1 a case failed, 2 bad usage, 3 built for CUDA but no GPU here.
#include "tests/bench/harness.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <random>
#include <thread>
#include <type_traits>

#if FIEDLER_CUDA
#include <cuda_runtime_api.h>
#endif

namespace fiedler::bench {
namespace {

std::map<std::string, FamilyBench>& registry() {
    static std::map<std::string, FamilyBench> families;
    return families;
}

// ---- device memory with values -----------------------------------------------------------------------------------

template <class T>
std::vector<T> random_tile(std::int64_t n, double scale) {
    std::mt19937_64 generator(20240607);
    std::vector<T> tile(static_cast<std::size_t>(n));
    if constexpr (std::is_same_v<T, std::int32_t>) {
        std::uniform_int_distribution<std::int32_t> d(0, std::max<std::int32_t>(0, std::int32_t(scale) - 1));
        for (T& v : tile) v = d(generator);
    } else {
        std::normal_distribution<float> d(0.f, float(scale));
        for (T& v : tile) v = T(d(generator));
    }
    return tile;
}

// A tile of values from the host, repeated over the buffer by copies on the device.
template <class T>
void fill_random(const Device& device, T* p, std::int64_t n, double scale) {
    const std::int64_t tile_size = std::min<std::int64_t>(n, 1048573);  // prime: repeats line up with no row length
    const std::vector<T> tile = random_tile<T>(tile_size, scale);
    copy_to_device(device, p, tile.data(), tile.size() * sizeof(T));
    for (std::int64_t done = tile_size; done < n;) {
        const std::int64_t more = std::min(done, n - done);
        copy_on_device(device, p + done, p, static_cast<std::size_t>(more) * sizeof(T));
        done += more;
    }
    synchronize(device);
}

}  // namespace

void* Suite::allocate(std::size_t bytes) {
    void* p = device_alloc(device, std::max<std::size_t>(bytes, 1));
    blocks_.push_back(p);
    return p;
}
template <class T>
T* Suite::random(std::int64_t n, double scale) {
    T* p = static_cast<T*>(allocate(static_cast<std::size_t>(n) * sizeof(T)));
    fill_random(device, p, n, scale);
    return p;
}
template <class T>
T* Suite::zeros(std::int64_t n) {
    T* p = static_cast<T*>(allocate(static_cast<std::size_t>(n) * sizeof(T)));
    fill_bytes(device, p, 0, static_cast<std::size_t>(n) * sizeof(T));
    return p;
}
void Suite::release() {
    cases.clear();
    for (void* p : blocks_) device_free(device, p);
    blocks_.clear();
}
Suite::~Suite() { release(); }

template float* Suite::random<float>(std::int64_t, double);
template float* Suite::zeros<float>(std::int64_t);
template bf16* Suite::random<bf16>(std::int64_t, double);
template bf16* Suite::zeros<bf16>(std::int64_t);
template std::int32_t* Suite::random<std::int32_t>(std::int64_t, double);
template std::int32_t* Suite::zeros<std::int32_t>(std::int64_t);
template std::byte* Suite::zeros<std::byte>(std::int64_t);

bool register_bench(const char* family, FamilyBench bench) { return registry().emplace(family, bench).second; }

namespace {

// ---- timing ------------------------------------------------------------------------------------------------------

struct Options {
    std::vector<std::string> families;
    std::string json;
    int samples = 20;
    bool list = false, small = false;
};
struct Peak {
    double copy_gb_s = 0, gemm_tflop_s = 0;  // 0: not measured
};
struct Timing {
    double seconds = 0, noise = 0;
    int batch = 1;  // runs per sample
};
struct Row {
    std::string family, name, failure;
    Timing time;
    double gb_s = 0, tflop_s = 0, share = 0;  // share 0: no peak to hold it against
};

Timing summary(std::vector<double> samples, int batch) {
    std::sort(samples.begin(), samples.end());
    const auto at = [&](double q) { return samples[std::size_t(q * double(samples.size() - 1) + 0.5)]; };
    const double median =
        samples.size() % 2 ? at(0.5) : (samples[samples.size() / 2 - 1] + samples[samples.size() / 2]) / 2;
    return {median, median > 0 ? (at(0.9) - at(0.1)) / median : 0, batch};
}

#if FIEDLER_CUDA

class Timer {
  public:
    Timer(const Device& device, int samples) : device_(device), samples_(samples) {
        int l2 = 0;
        if (cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0) != cudaSuccess || l2 <= 0) l2 = 0;
        // Never less than 256 MiB: overwriting takes long enough for the host to queue the run behind it.
        bytes_ = std::max(2 * static_cast<std::size_t>(l2), std::size_t(256) << 20);
        flush_ = device_alloc(device, bytes_);
    }
    ~Timer() { device_free(device_, flush_); }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

    // A single run between two events, after the L2 cache has been overwritten. Where a run takes less than 10 us, the
    // events themselves would be a good part of it: then a batch of runs after one flush, and the row says so.
    Timing operator()(const std::function<void()>& run) {
        for (int i = 0; i < 3; ++i) run();
        const Timing single = measure(run, 1);
        if (single.seconds >= 10e-6) return single;
        return measure(run, 20);
    }

  private:
    Timing measure(const std::function<void()>& run, int batch) {
        std::vector<double> samples;
        for (int i = 0; i < samples_; ++i) {
            fill_bytes(device_, flush_, i, bytes_);
            timer_start(device_);
            for (int k = 0; k < batch; ++k) run();
            samples.push_back(timer_stop_seconds(device_) / batch);
        }
        return summary(std::move(samples), batch);
    }
    const Device& device_;
    const int samples_;
    std::size_t bytes_ = 0;
    void* flush_ = nullptr;
};

#else

class Timer {
  public:
    Timer(const Device&, int samples) : samples_(samples) {}
    // One run a sample on the steady clock; short runs in batches of about a millisecond; at most two seconds a case.
    Timing operator()(const std::function<void()>& run) {
        run();
        const double once = std::max(seconds(run, 1), 1e-9);
        const int batch = once < 1e-4 ? int(1e-3 / once) : 1;
        std::vector<double> samples;
        double spent = 0;
        for (int i = 0; i < samples_ && (i < 3 || spent < 2); ++i) {
            samples.push_back(seconds(run, batch));
            spent += samples.back() * batch;
        }
        return summary(std::move(samples), batch);
    }

  private:
    static double seconds(const std::function<void()>& run, int batch) {
        const auto start = std::chrono::steady_clock::now();
        for (int k = 0; k < batch; ++k) run();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / batch;
    }
    const int samples_;
};

#endif

// ---- peaks -------------------------------------------------------------------------------------------------------

// What the machine can do, measured here and now: a plain copy (bytes read + written), and the case of the matmul
// family whose name begins with "peak".
Peak measure_peak(Suite& suite, Timer& timer) {
    Peak peak;
    const std::int64_t bytes = std::is_same_v<Device, Cpu> ? 64 << 20 : 1 << 30;
    {
        char* from = reinterpret_cast<char*>(suite.zeros<std::byte>(bytes));
        char* to = reinterpret_cast<char*>(suite.zeros<std::byte>(bytes));
        const Timing t = timer([&] { copy_on_device(suite.device, to, from, static_cast<std::size_t>(bytes)); });
        peak.copy_gb_s = 2 * double(bytes) / t.seconds * 1e-9;
        suite.release();
    }
    if (const auto it = registry().find("matmul"); it != registry().end()) {
        suite.family = it->first;
        it->second(suite);
        for (const Case& c : suite.cases)
            if (c.name.rfind("peak ", 0) == 0) peak.gemm_tflop_s = c.traffic.flops / timer(c.run).seconds * 1e-12;
        suite.release();
    }
    return peak;
}

Row time_case(const Case& c, Timer& timer, const Peak& peak) {
    Row r{c.family, c.name, "", {}, 0, 0, 0};
    try {
        r.time = timer(c.run);
        r.gb_s = c.traffic.bytes / r.time.seconds * 1e-9;
        r.tflop_s = c.traffic.flops / r.time.seconds * 1e-12;
        const double top = c.tensor_cores ? peak.gemm_tflop_s : peak.copy_gb_s;
        if (top > 0) r.share = (c.tensor_cores ? r.tflop_s : r.gb_s) / top;
    } catch (const std::exception& e) {
        r.failure = e.what();
    }
    return r;
}

// ---- report ------------------------------------------------------------------------------------------------------

struct Machine {
    std::string name, driver, cuda;
};

#if FIEDLER_CUDA
std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }
#endif

Machine machine() {
#if FIEDLER_CUDA
    const CudaDeviceInfo info = cuda_device_info(0);
    return {info.name, version(info.driver_version), version(info.runtime_version)};
#else
    return {"cpu, " + std::to_string(std::thread::hardware_concurrency()) + " threads", "", ""};
#endif
}

void print_header(const Machine& m, const Peak& peak) {
    std::printf("%s", m.name.c_str());
    if (!m.cuda.empty()) std::printf("; driver for CUDA %s, runtime %s", m.driver.c_str(), m.cuda.c_str());
    std::printf("\nmeasured peak: copy %.1f GB/s (read + written)", peak.copy_gb_s);
    if (peak.gemm_tflop_s > 0) std::printf(", matrix product %.2f TFLOP/s", peak.gemm_tflop_s);
    std::printf("\n\n%-11s %-44s %12s %7s %10s %10s %7s  %s\n", "family", "case", "time us", "noise", "GB/s", "TFLOP/s",
                "% peak", "");
}

void print_row(const Row& r) {
    if (!r.failure.empty()) {
        std::printf("%-11s %-44s failed: %s\n", r.family.c_str(), r.name.c_str(), r.failure.c_str());
        return;
    }
    const std::string batched = r.time.batch > 1 ? std::to_string(r.time.batch) + " runs a sample" : std::string();
    const std::string share = r.share > 0 ? std::to_string(int(std::lround(r.share * 1000))) : std::string();
    const std::string percent =
        share.empty() ? "-" : std::to_string(std::lround(r.share * 1000) / 10) + "." + share.back();
    std::printf("%-11s %-44s %12.2f %6.1f%% %10.1f %10.3f %7s  %s\n", r.family.c_str(), r.name.c_str(),
                r.time.seconds * 1e6, r.time.noise * 100, r.gb_s, r.tflop_s, percent.c_str(), batched.c_str());
    std::fflush(stdout);
}

std::string quoted(const std::string& s) {
    std::string q = "\"";
    for (const char c : s) {
        if (c == '"' || c == '\\') q += '\\';
        q += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
    return q + '"';
}
std::string number(double v) {
    if (!std::isfinite(v)) return "null";
    char text[40];
    std::snprintf(text, sizeof text, "%.6g", v);
    return text;
}

bool write_json(const std::string& path, const Machine& m, const Peak& peak, const std::vector<Row>& rows) {
    std::string s = "{\n  \"gpu\": " + quoted(m.name) + ",\n  \"driver\": " + quoted(m.driver) +
                    ",\n  \"cuda\": " + quoted(m.cuda) + ",\n  \"peak\": {\"copy_gb_s\": " + number(peak.copy_gb_s) +
                    ", \"gemm_tflop_s\": " + (peak.gemm_tflop_s > 0 ? number(peak.gemm_tflop_s) : "null") +
                    "},\n  \"bench\": [";
    std::string batched, failed;
    bool first = true;
    for (const Row& r : rows) {
        const std::string id = quoted(r.family + "/" + r.name);
        if (!r.failure.empty()) {
            failed += (failed.empty() ? "" : ", ") + id + ": " + quoted(r.failure);
            continue;
        }
        if (r.time.batch > 1) batched += (batched.empty() ? "" : ", ") + id + ": " + std::to_string(r.time.batch);
        s += std::string(first ? "\n" : ",\n") + "    {\"family\": " + quoted(r.family) +
             ", \"case\": " + quoted(r.name) + ", \"time_us\": " + number(r.time.seconds * 1e6) +
             ", \"noise\": " + number(r.time.noise) + ", \"gb_s\": " + number(r.gb_s) +
             ", \"tflop_s\": " + number(r.tflop_s) +
             ", \"share_of_peak\": " + (r.share > 0 ? number(r.share) : "null") + "}";
        first = false;
    }
    s += "\n  ],\n  \"runs_per_sample\": {" + batched + "},\n  \"failed\": {" + failed + "}\n}\n";
    std::FILE* f = std::fopen(path.c_str(), "w");
    const bool written = f && std::fwrite(s.data(), 1, s.size(), f) == s.size();
    const bool closed = f && std::fclose(f) == 0;
    if (!written || !closed) std::fprintf(stderr, "kernel_bench: cannot write %s\n", path.c_str());
    return written && closed;
}

// ---- command line ------------------------------------------------------------------------------------------------

constexpr const char* kUsage = "usage: kernel_bench [family ...] [--list] [--small] [--json FILE] [--samples N]\n";

int usage_error(const std::string& message) {
    std::fprintf(stderr, "kernel_bench: %s\n%s", message.c_str(), kUsage);
    return 2;
}

// 0, or the exit code of a bad command line.
int parse(int argc, char** argv, Options& o) {
    for (int i = 1; i < argc; ++i) {
        const std::string a = argv[i];
        const bool takes_value = a == "--json" || a == "--samples";
        if (takes_value && i + 1 == argc) return usage_error(a + " needs a value");
        if (a == "--list")
            o.list = true;
        else if (a == "--small")
            o.small = true;
        else if (a == "--json")
            o.json = argv[++i];
        else if (a == "--samples") {
            char* end = nullptr;
            const long n = std::strtol(argv[++i], &end, 10);
            if (*end || n < 1 || n > 100000) return usage_error("--samples wants a number from 1 to 100000");
            o.samples = int(n);
        } else if (a[0] == '-')
            return usage_error("unknown option " + a);
        else if (!registry().count(a))
            return usage_error("no family '" + a + "' (--list names them)");
        else
            o.families.push_back(a);
    }
    return 0;
}

int run_suite(const Options& o, const Device& device) {
    Timer timer(device, o.samples);
    Suite suite(device, o.small);
    const Machine m = machine();
    const Peak peak = measure_peak(suite, timer);
    print_header(m, peak);
    std::vector<Row> rows;
    bool failed = false;
    for (const auto& [family, bench] : registry()) {
        if (!o.families.empty() && std::find(o.families.begin(), o.families.end(), family) == o.families.end())
            continue;
        suite.family = family;
        try {
            bench(suite);
            for (const Case& c : suite.cases) rows.push_back(time_case(c, timer, peak)), print_row(rows.back());
        } catch (const std::exception& e) {
            rows.push_back({family, "setup", e.what(), {}, 0, 0, 0});
            print_row(rows.back());
        }
        suite.release();
    }
    for (const Row& r : rows) failed |= !r.failure.empty();
    const bool written = o.json.empty() || write_json(o.json, m, peak, rows);
    return failed || !written ? 1 : 0;
}

int run(const Options& o) {
    if (o.list) {
        for (const auto& [family, bench] : registry()) std::printf("%s\n", family.c_str());
        return 0;
    }
#if FIEDLER_CUDA
    std::string why;
    if (cuda_device_count(&why) == 0) {
        std::fprintf(stderr, "kernel_bench: no GPU, nothing measured: %s\n", why.c_str());
        return 3;
    }
    constexpr std::size_t kWorkspace = std::size_t(32) << 20;
    Cuda device;
    device.workspace = device_alloc(device, kWorkspace);
    device.workspace_bytes = kWorkspace;
    const int code = run_suite(o, device);
    device_free(device, device.workspace);
    return code;
#else
    Options small = o;
    small.small = true;  // the training shapes are a GPU's
    return run_suite(small, Cpu{});
#endif
}

}  // namespace
}  // namespace fiedler::bench

int main(int argc, char** argv) {
    fiedler::bench::Options options;
    if (const int code = fiedler::bench::parse(argc, argv, options)) return code;
    try {
        return fiedler::bench::run(options);
    } catch (const std::exception& e) {
        std::fprintf(stderr, "kernel_bench: %s\n", e.what());
        return 1;
    }
}
