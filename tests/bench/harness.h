// tests/bench/harness.h: benchmarks of kernel families. One file per family adds cases; the harness times them.
//
// A family's file, tests/bench/<family>_bench.cpp, is one function:
//     FIEDLER_BENCH(norm) {
//         auto x = suite.random<Storage>(rows * cols);  // device memory, normal values, freed by the suite
//         NormForward<Storage> p{...};
//         suite.add("forward 32768x384", traffic(p), [=, &suite] { norm_forward(suite.device, p); });
//     }
//
// These files are compiled once for each device: FIEDLER_BENCH_CUDA 1: Device is Cuda, Storage bf16; 0: Cpu and float.
// suite.small asks for small shapes.
//
// Timing (Cuda): each sample is one run after the L2 cache has been filled with other lines, by reading: lines that were
// written would be written back in the time of the run. The median is reported, and noise = (p90 - p10) / median.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/pending_sums.h"
#include "kernels/traffic.h"
#include "kernels/view.h"

#ifndef FIEDLER_BENCH_CUDA
#define FIEDLER_BENCH_CUDA FIEDLER_CUDA
#endif

namespace fiedler::bench {

// In a CUDA build both sets of names are in one program: each device has a namespace.
#if FIEDLER_BENCH_CUDA
#define FIEDLER_BENCH_SPACE on_cuda
#else
#define FIEDLER_BENCH_SPACE on_cpu
#endif
inline namespace FIEDLER_BENCH_SPACE {

#if FIEDLER_BENCH_CUDA
using Device = Cuda;
using Storage = bf16;
#else
using Device = Cpu;
using Storage = float;
#endif
using Accum = acc_t<Storage>;

struct Case {
    std::string family, name;
    Traffic traffic;
    std::function<void()> run;
    bool tensor_cores = false;  // the measured GEMM rate is a limit of it, beside the measured copy rate
    bool only_reads = false;    // what it writes is nothing beside what it reads
    // Optional: runs the same problem by algorithm k = 0, 1, ... of a library; false: there is none, or it cannot run.
    std::function<bool(int)> algorithm = {};
};

class Suite {
  public:
    explicit Suite(const Device& d, bool small_shapes) : device(d), small(small_shapes) {}
    ~Suite();
    Suite(const Suite&) = delete;
    Suite& operator=(const Suite&) = delete;

    const Device& device;
    const bool small;
    std::string family;
    std::vector<Case> cases;

    template <class T>
    T* random(std::int64_t n, double scale = 1.0);  // Storage, float, or int32 in [0, scale)
    template <class T>
    T* zeros(std::int64_t n);
    template <class T>
    Vec<const T> copy_of(const std::vector<T>& v) {
        T* memory = reinterpret_cast<T*>(zeros<std::byte>(static_cast<std::int64_t>(v.size() * sizeof(T))));
        copy_to_device(device, memory, v.data(), v.size() * sizeof(T));
        return {memory, static_cast<std::int64_t>(v.size())};
    }
    void add(std::string name, Traffic t, std::function<void()> run, bool tensor_cores = false) {
        cases.push_back({family, std::move(name), t, std::move(run), tensor_cores});
    }
    void release();  // frees all buffers and cases of the family at hand

  private:
    void* allocate(std::size_t bytes);
    std::vector<void*> blocks_;
};

// A backward pass that leaves sums over blocks in so many elements. As in a model, which adds up all layers' sums at once
// (family pending_sums), it ends before that.
template <class Problem, class Backward>
void add_with_pending(Suite& suite, std::string name, const Problem& problem, std::int64_t elements,
                      Backward backward) {
    const Vec<Accum> memory(suite.zeros<Accum>(elements), elements);
    suite.add(std::move(name), traffic(problem), [problem, memory, backward, &suite] {
        PendingSums<Accum> pending(memory);
        Problem p = problem;
        p.pending = &pending;
        backward(suite.device, p);
    });
}

using FamilyBench = void (*)(Suite&);
bool register_bench(const char* family, FamilyBench);

}  // namespace FIEDLER_BENCH_SPACE

#define FIEDLER_BENCH(word)                                                                                       \
    static void word##_bench(::fiedler::bench::Suite& suite);                                                     \
    [[maybe_unused]] static const bool word##_registered = ::fiedler::bench::register_bench(#word, word##_bench); \
    static void word##_bench([[maybe_unused]] ::fiedler::bench::Suite& suite)

}  // namespace fiedler::bench
