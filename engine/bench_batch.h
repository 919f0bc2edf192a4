// engine/bench_batch.h: greedy generation of many texts at once, timed: part of `fiedler bench infer`.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine/bundle.h"
#include "engine/engine.h"

namespace fiedler {

struct BatchBench {
    std::vector<std::int64_t> sizes;  // texts at once
    std::int64_t tokens = 128, prompt_tokens = 64, runs = 5;
    int threads = 0;  // CPU
};
struct BatchRow {
    std::string device;
    std::int64_t size = 0, steps = 0, slot_bytes = 0;  // slot_bytes: of the arena of all slots
    double tokens_per_second = 0;
    double first_token = 0;  // seconds, from the prompts to the first token of each
    double share = 0;        // of the rate at which the device copies memory: the least that steps read
    double copy_rate = 0;    // bytes a second, read and written
    bool recorded = false;   // steps replayed from a CUDA graph
};

// A row a size, printed as it comes. The model is in bf16 on CUDA and f32 on the CPU.
std::vector<BatchRow> bench_batches(const Bundle&, DeviceKind, const BatchBench&);
void print_batch_header();

}  // namespace fiedler
