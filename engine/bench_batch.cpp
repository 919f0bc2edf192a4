#include "engine/bench_batch.h"

#include <algorithm>
#include <chrono>

#include "engine/batch_decoder.h"
#include "engine/config.h"
#include "engine/error.h"
#include "engine/log.h"

namespace fiedler {

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// Bytes read and written a second by a copy that no cache holds: the fastest of five.
template <class Dev>
double copy_rate(const Dev& dev) {
    constexpr std::size_t kBytes = std::size_t{256} << 20;
    void *from = device_alloc(dev, kBytes), *to = device_alloc(dev, kBytes);
    fill_bytes(dev, from, 1, kBytes);
    fill_bytes(dev, to, 2, kBytes);
    double best = 1e30;
    for (int i = 0; i < 5; ++i) {
        synchronize(dev);
        const auto start = Clock::now();
        copy_on_device(dev, to, from, kBytes);
        synchronize(dev);
        best = std::min(best, since(start));
    }
    device_free(dev, from);
    device_free(dev, to);
    return 2 * double(kBytes) / best;
}
double copy_rate_of(DeviceKind device) {
#if FIEDLER_CUDA
    if (device == DeviceKind::cuda) return copy_rate(Cuda());
#endif
    return device == DeviceKind::cpu ? copy_rate(Cpu{}) : 0;
}

// Steps of one run, after the first: at most `most`, and no more than some seconds' worth.
void run_once(BatchDecoder& decoder, const Bundle& bundle, const BatchBench& b, BatchRow& row) {
    constexpr double kEnough = 2;
    std::vector<SlotStart> starts;
    for (std::int64_t s = 0; s < decoder.slots(); ++s) {
        SlotStart one{s, {}, static_cast<std::uint64_t>(s), b.tokens};
        for (std::int64_t i = 0; i < b.prompt_tokens; ++i)
            one.prompt.push_back(static_cast<std::int32_t>(((s + 1) * 104729 + i * 7919 + 13) % bundle.spec.vocab));
        starts.push_back(std::move(one));
    }
    const auto start = Clock::now();
    decoder.start(starts);
    decoder.submit_step();
    (void)decoder.finish_step();
    const double first = since(start);
    const auto begin = Clock::now();
    std::int64_t steps = 0;
    for (; steps + 1 < b.tokens && (steps == 0 || since(begin) < kEnough); ++steps) {
        decoder.submit_step();
        if (steps > 0) (void)decoder.finish_step();
    }
    if (steps > 0) (void)decoder.finish_step();
    const double rate = double(steps * decoder.slots()) / since(begin);
    row.first_token = row.first_token > 0 ? std::min(row.first_token, first) : first;
    if (rate > row.tokens_per_second) row.tokens_per_second = rate, row.steps = steps;
}

void print(const BatchRow& r) {
    fmt::print("{:<24} {:>6} {:>11.0f} {:>12.0f} {:>8.1f} ms {:>10} {:>7.0f} %{}\n", r.device, r.size,
               r.tokens_per_second, r.tokens_per_second / double(r.size), r.first_token * 1e3, bytes_text(r.slot_bytes),
               100 * r.share, r.recorded ? "  graph" : "");
    std::fflush(stdout);
}

}  // namespace

void print_batch_header() {
    fmt::print("{:<24} {:>6} {:>11} {:>12} {:>11} {:>10} {:>9}\n", "at once, greedy", "texts", "tokens/s",
               "of each text", "first tok.", "slots", "of copy");
}

std::vector<BatchRow> bench_batches(const Bundle& bundle, DeviceKind device, const BatchBench& b) {
    if (b.prompt_tokens > bundle.spec.context)
        input_error("fiedler bench infer: --prompt-tokens {} is more than the model's context of {}", b.prompt_tokens,
                    bundle.spec.context);
    const double rate = copy_rate_of(device);
    EngineOptions options;
    options.device = device;
    options.threads = b.threads;
    options.training = false;
    const auto engine = make_engine(bundle.spec, options, bundle.constants);
    engine->write(Block::master, bundle.master.data());
    std::vector<BatchRow> rows;
    for (const std::int64_t size : b.sizes) {
        BatchDecoderOptions o;
        o.slots = size, o.capacity = b.prompt_tokens + b.tokens;
        o.sampling.temperature = 0;
        const auto decoder = engine->batch_decoder(o);
        BatchRow row;
        row.device = engine->device_name(), row.size = size, row.copy_rate = rate;
        row.slot_bytes = static_cast<std::int64_t>(decoder->bytes());
        for (std::int64_t run = 0; run < (device == DeviceKind::cpu ? 1 : b.runs); ++run)
            run_once(*decoder, bundle, b, row);
        const double steps_per_second = row.tokens_per_second / double(size);
        row.share = double(decoder->step_bytes(b.prompt_tokens + row.steps / 2)) * steps_per_second / rate;
        row.recorded = decoder->replayed_steps() > 0;
        print(row);
        rows.push_back(row);
    }
    return rows;
}

}  // namespace fiedler
