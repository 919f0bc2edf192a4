// tests/bench/harness.cpp: times the cases of the families on one device (see harness.h).
#include "tests/bench/harness.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <map>
#include <numeric>
#include <random>
#include <tuple>
#include <type_traits>

#include "kernels/profile.h"
#include "tests/bench/bench.h"

#if FIEDLER_BENCH_CUDA
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

bool FIEDLER_BENCH_SPACE::register_bench(const char* family, FamilyBench bench) {
    return registry().emplace(family, bench).second;
}

namespace {

// ---- timing ------------------------------------------------------------------------------------------------------

struct Timing {
    double seconds = 0, noise = 0;
    int batch = 1;  // runs per sample
};

Timing summary(std::vector<double> samples, int batch) {
    std::sort(samples.begin(), samples.end());
    const auto at = [&](double q) { return samples[std::size_t(q * double(samples.size() - 1) + 0.5)]; };
    const double median =
        samples.size() % 2 ? at(0.5) : (samples[samples.size() / 2 - 1] + samples[samples.size() / 2]) / 2;
    return {median, median > 0 ? (at(0.9) - at(0.1)) / median : 0, batch};
}

#if FIEDLER_BENCH_CUDA

class Timer {
  public:
    Timer(const Device& device, int samples) : device_(device), samples_(samples) {
        int l2 = 0;
        if (cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0) != cudaSuccess || l2 <= 0) l2 = 0;
        // Never less than 256 MiB: reading it takes long enough for the host to queue the run behind it.
        bytes_ = std::max(2 * static_cast<std::size_t>(l2), std::size_t(256) << 20);
        flush_ = device_alloc(device, bytes_);
        fill_bytes(device, flush_, 0, bytes_);
    }
    ~Timer() { device_free(device_, flush_); }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;

    // A single run between two events, after the L2 cache has been filled with other, clean lines. Where a run takes less than 10 us, the
    // events themselves would be a good part of it: then a batch of runs after one flush, and the row says so.
    Timing operator()(const std::function<void()>& run) {
        for (int i = 0; i < 3; ++i) run();
        const Timing single = measure(run, 1);
        if (single.seconds >= 10e-6) return single;
        return measure(run, 20);
    }
    // As many runs a sample as another row has.
    Timing in_batches(const std::function<void()>& run, int batch) {
        for (int i = 0; i < 3; ++i) run();
        return measure(run, batch);
    }
    double sample(const std::function<void()>& run, int batch) {
        read_through(device_, flush_, bytes_);
        timer_start(device_);
        for (int k = 0; k < batch; ++k) run();
        return timer_stop_seconds(device_) / batch;
    }
    int samples() const { return samples_; }

  private:
    Timing measure(const std::function<void()>& run, int batch) {
        std::vector<double> samples;
        for (int i = 0; i < samples_; ++i) samples.push_back(sample(run, batch));
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
        return measure(run, once < 1e-4 ? int(1e-3 / once) : 1);
    }
    Timing in_batches(const std::function<void()>& run, int batch) {
        run();
        return measure(run, batch);
    }
    double sample(const std::function<void()>& run, int batch) { return seconds(run, batch); }
    int samples() const { return samples_; }

  private:
    Timing measure(const std::function<void()>& run, int batch) const {
        std::vector<double> found;
        double spent = 0;
        for (int i = 0; i < samples_ && (i < 3 || spent < 2); ++i) {
            found.push_back(seconds(run, batch));
            spent += found.back() * batch;
        }
        return summary(std::move(found), batch);
    }
    static double seconds(const std::function<void()>& run, int batch) {
        const auto start = std::chrono::steady_clock::now();
        for (int k = 0; k < batch; ++k) run();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / batch;
    }
    const int samples_;
};

#endif

// Medians of runs of one problem whose samples are taken in turn: what the device's clock does meets all of them.
std::vector<double> in_turn(const std::vector<std::function<void()>>& runs, int batch, int samples, Timer& timer) {
    std::vector<std::vector<double>> taken(runs.size());
    for (const auto& run : runs)
        for (int i = 0; i < 3; ++i) run();
    for (int i = 0; i < samples; ++i)
        for (std::size_t r = 0; r < runs.size(); ++r) taken[r].push_back(timer.sample(runs[r], batch));
    std::vector<double> medians;
    for (auto& t : taken) medians.push_back(summary(std::move(t), batch).seconds);
    return medians;
}

// All algorithms with three samples each; then the three best and the row itself in turn, as many samples as the row has.
Search search_best(const Case& c, int batch, Timer& timer) {
    constexpr int kMost = 128, kFirst = 3;
    constexpr std::size_t kFinalists = 3;
    Search found;
    std::vector<int> known;
    std::vector<std::function<void()>> runs;
    for (int k = 0; k < kMost; ++k) {
        if (!c.algorithm(k)) continue;
        known.push_back(k);
        runs.push_back([&c, k] { c.algorithm(k); });
    }
    found.tried = static_cast<int>(known.size());
    if (known.empty()) return found;
    const std::vector<double> tried = in_turn(runs, batch, kFirst, timer);
    std::vector<std::size_t> order(known.size());
    std::iota(order.begin(), order.end(), std::size_t(0));
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return tried[a] < tried[b]; });
    order.resize(std::min(order.size(), kFinalists));
    std::vector<std::function<void()>> finalists{c.run};
    for (const std::size_t i : order) finalists.push_back(runs[i]);
    const std::vector<double> seconds = in_turn(finalists, batch, timer.samples(), timer);
    const auto best = std::min_element(seconds.begin() + 1, seconds.end());
    found.own_seconds = seconds[0], found.best_seconds = *best;
    found.best = known[order[static_cast<std::size_t>(best - seconds.begin()) - 1]];
    return found;
}

// ---- copies of the same bytes ----------------------------------------------------------------------------------------

// Times plain copies of as many bytes as a case moves, each size once. What is larger than kMost takes as long by the byte
// as kMost does.
class Copies {
  public:
    Copies(const Device& device, Timer& timer) : device_(device), timer_(timer) {}
    ~Copies() {
        for (char* p : {from_, to_})
            if (p) device_free(device_, p);
    }
    Copies(const Copies&) = delete;
    Copies& operator=(const Copies&) = delete;

    double seconds(double bytes, bool only_reads, int batch) {
        if (bytes < 16) return 0;
        const double moved = std::min(bytes, double(kMost));
        const auto once = static_cast<std::size_t>(only_reads ? moved : moved / 2) / 16 * 16;
        if (once == 0) return 0;
        const auto [found, is_new] = known_.try_emplace({once, only_reads, batch}, 0.0);
        if (is_new) found->second = time(once, only_reads, batch);
        return found->second * bytes / (double(once) * (only_reads ? 1 : 2));
    }

  private:
    static constexpr std::size_t kMost = std::size_t(std::is_same_v<Device, Cpu> ? 64 : 1024) << 20;

    double time(std::size_t bytes, bool only_reads, int batch) {
        if (!from_) {
            from_ = static_cast<char*>(device_alloc(device_, kMost));
            to_ = static_cast<char*>(device_alloc(device_, kMost / 2));
            fill_bytes(device_, from_, 0, kMost);
            fill_bytes(device_, to_, 0, kMost / 2);
        }
        return timer_.in_batches([&] { copy(only_reads ? nullptr : to_, bytes); }, batch).seconds;
    }
    void copy(char* to, std::size_t bytes) {
#if FIEDLER_BENCH_CUDA
        plain_copy(device_, to, from_, bytes);
#else
        if (to) return copy_on_device(device_, to, from_, bytes);
        const auto* words = reinterpret_cast<const std::uint64_t*>(from_);
        read_ = std::accumulate(words, words + bytes / sizeof(*words), std::uint64_t(0));
#endif
    }
    const Device& device_;
    Timer& timer_;
    char *from_ = nullptr, *to_ = nullptr;
    std::map<std::tuple<std::size_t, bool, int>, double> known_;  // by bytes read, kind and runs of a sample
    [[maybe_unused]] volatile std::uint64_t read_ = 0;
};

// ---- peaks and rows ------------------------------------------------------------------------------------------------

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

Row time_case(const Case& c, Timer& timer, Copies& copies, const Peak& peak) {
    Row r;
    r.family = c.family, r.name = c.name, r.traffic = c.traffic;
    try {
        const Timing t = timer(c.run);
        r.seconds = t.seconds, r.noise = t.noise, r.batch = t.batch;
        r.gb_s = c.traffic.bytes / r.seconds * 1e-9;
        r.tflop_s = c.traffic.flops / r.seconds * 1e-12;
        if (peak.copy_gb_s > 0) r.share = r.gb_s / peak.copy_gb_s;
        if (c.tensor_cores && peak.gemm_tflop_s > 0) r.share = std::max(r.share, r.tflop_s / peak.gemm_tflop_s);
        const double limit = std::max(c.traffic.bytes / kModelBytesPerSecond, c.traffic.flops / kModelFlopsPerSecond);
        if (std::is_same_v<Device, Cuda> && r.share > 0) r.model_seconds = limit / std::min(r.share, 1.0);
        if (!c.tensor_cores) r.copy_seconds = copies.seconds(c.traffic.bytes, c.only_reads, r.batch);
        if (c.algorithm) r.search = search_best(c, r.batch, timer);
    } catch (const std::exception& e) {
        r.failure = e.what();
    }
    return r;
}

Result run_suite(const Options& o, const Machine& machine, const Device& device, const Listener& listener) {
    Timer timer(device, o.samples);
    Copies copies(device, timer);
    Suite suite(device, o.small);
    Result result;
    result.machine = machine;
    result.peak = measure_peak(suite, timer);
    listener.begin(result.machine, result.peak);
    for (const auto& [family, bench] : registry()) {
        if (!o.families.empty() && std::find(o.families.begin(), o.families.end(), family) == o.families.end())
            continue;
        suite.family = family;
        try {
            bench(suite);
            for (const Case& c : suite.cases) {
                result.rows.push_back(time_case(c, timer, copies, result.peak));
                listener.row(result.rows.back());
            }
        } catch (const std::exception& e) {
            Row r;
            r.family = family, r.name = "setup", r.failure = e.what();
            result.rows.push_back(r);
            listener.row(r);
        }
        suite.release();
    }
    return result;
}

}  // namespace

#if FIEDLER_BENCH_CUDA

Result run_on_cuda(const Options& o, const Listener& listener) {
    constexpr std::size_t kWorkspace = std::size_t(32) << 20;
    Cuda device;
    device.workspace = device_alloc(device, kWorkspace);
    device.workspace_bytes = kWorkspace;
    Result result = run_suite(o, this_gpu(), device, listener);
    device_free(device, device.workspace);
    return result;
}

#else

Result run_on_cpu(const Options& o, const Listener& listener) {
    Options small = o;
    small.small = true;  // the training shapes are a GPU's
    return run_suite(small, this_cpu(), Cpu{}, listener);
}

std::vector<std::string> family_names() {
    std::vector<std::string> names;
    for (const auto& [family, bench] : registry()) names.push_back(family);
    return names;
}

#endif

}  // namespace fiedler::bench
