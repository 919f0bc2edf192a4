// tests/bench/bench.h: what a benchmark finds, and how it is printed, written and compared. Device-free: the harness
// (harness.h) is compiled once for each device and fills these.
//
// Every row has the time of one run (median of the samples; noise = (p90 - p10) / median) and its share of the limit
// that this machine was measured to have: the larger of bytes / copy rate and, for products on tensor cores, flops /
// GEMM rate, over the time. bytes and flops are the family's declared least work (kernels/traffic.h).
//
// A copy of few bytes does not reach the rate of a large one: its first and last microseconds count. So a row without
// tensor cores is also held against a plain copy of as many bytes as it moves, timed in the same way: half of them read
// and half written, or all of them read where the case does little else.
#pragma once
#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "kernels/traffic.h"

namespace fiedler::bench {

struct Options {
    std::vector<std::string> families;  // none: all
    int samples = 20;
    bool small = false;  // shapes for a CPU, or for a quick look
};
struct Machine {
    std::string name, driver, cuda;  // driver and cuda: empty on the CPU
};
struct Peak {
    double copy_gb_s = 0, gemm_tflop_s = 0;  // 0: not measured
};

// The best of the algorithms that a library offers for the row's problem. The best and the row's own were timed in turn.
struct Search {
    int tried = 0, best = 0;
    double best_seconds = 0, own_seconds = 0;
    double own_over_best() const { return own_seconds / best_seconds; }
};
struct Row {
    std::string family, name, failure;  // failure: why there are no figures
    Traffic traffic;
    double seconds = 0, noise = 0;
    int batch = 1;  // runs per sample
    double gb_s = 0, tflop_s = 0;
    double share = 0;          // of the nearest limit; 0: no peak to hold it against
    double copy_seconds = 0;   // of the plain copy of as many bytes; 0: not measured
    double model_seconds = 0;  // what the model below says of an RTX 4090; 0: no model (CPU)
    Search search;
    double share_of_copy() const { return seconds > 0 ? copy_seconds / seconds : 0; }
};
inline constexpr const char* kCopyText =
    "% copy: the time of a plain copy of the same bytes (half read, half written; all read for cases that only read), "
    "measured in the same way, over the row's; % peak holds it against a copy of 1 GiB";

// An RTX 4090 by its data sheet, as fast as this row is here: the larger of bytes / 1008 GB/s and flops / 165 TFLOP/s
// (bf16 products, f32 sums), over the share of the limit that the row reached on this machine. A model, not a
// measurement.
inline constexpr double kModelBytesPerSecond = 1008e9, kModelFlopsPerSecond = 165e12;
inline constexpr const char* kModelText =
    "4090 model: max(bytes / 1008 GB/s, flops / 165 TFLOP/s) / share of the measured limit reached here; a model, not "
    "a measurement";

// One training step of a model: on tokens, or on samples, whose nodes take the tokens' place.
struct Stage {
    std::string name;
    double seconds = 0;        // of a step
    std::int64_t entered = 0;  // times in a step
};
struct StepRow {
    std::string name, device, recompute, cuda_graph;
    std::int64_t parameters = 0, tokens = 0, context = 0;  // tokens of a step
    int micro_batches = 0, steps = 0;                      // steps: timed ones
    double seconds = 0, noise = 0, tokens_per_second = 0, loss = 0;
    double flops_per_token = 0, peak_flops = 0, share = 0;  // share of peak_flops, the measured GEMM rate
    std::int64_t planned_bytes = 0, device_bytes = 0;       // of the arena; of the process where the device can tell
    double profiled_seconds = 0;                            // a step with the stages' clock running
    std::vector<Stage> stages;                              // longest first
    std::vector<Stage> kernels;                             // longest first, at most ten
    double kernels_seconds = 0;                             // of all kernels of a step
    std::int64_t kernels_launched = 0;                      // of a step
    std::string kernels_note;                               // why there are none
    // On samples: what they are, how many a step has on average, and on the host the time to make one of them ready and,
    // of a step, to wait for that.
    std::string unit;
    double samples = 0, samples_per_second = 0, prepare_seconds = 0, wait_seconds = 0;
};

struct Result {
    Machine machine;
    Peak peak;
    std::vector<Row> rows;
    std::vector<StepRow> steps;
    bool failed() const;
};

// What is known when a run begins, then each row as soon as it is there.
struct Listener {
    std::function<void(const Machine&, const Peak&)> begin;
    std::function<void(const Row&)> row;
};

std::vector<std::string> family_names();
Machine this_cpu();
Machine this_gpu();  // CUDA builds only
Result run_on_cpu(const Options&, const Listener&);
Result run_on_cuda(const Options&, const Listener&);  // CUDA builds only

void print_header(const Machine&, const Peak&);
void print_row(const Row&);
void print_step(const StepRow&);

nlohmann::ordered_json to_json(const Result&);
bool write_json(const std::string& path, const Result&);  // false: it could not be written

// ---- comparison with an earlier result --------------------------------------------------------------------------------
enum class Verdict { faster, same, slower };
const char* name_of(Verdict);
struct Comparison {
    std::string name;  // family/case, or step/name
    double old_seconds = 0, new_seconds = 0, allowance = 0;
    Verdict verdict = Verdict::same;
    double ratio() const { return new_seconds / old_seconds; }
};
// The same within noise: the times differ by no more than the larger noise of both, or by 1 %.
Verdict verdict_of(double old_seconds, double new_seconds, double allowance);
// The rows that both have. `old`: what to_json wrote, or a file of tests/bench/results. std::runtime_error when it is
// something else.
std::vector<Comparison> compare(const nlohmann::ordered_json& old, const Result&);
// The old file's machine, to be told when it is another.
std::string machine_of(const nlohmann::ordered_json& old);
void print_comparison(const std::vector<Comparison>&);

}  // namespace fiedler::bench
