#include "engine/bench_samples.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <filesystem>
#include <numeric>

#include "engine/bench_parts.h"
#include "engine/error.h"
#include "engine/sample_runner.h"
#include "engine/sample_sources.h"
#include "engine/sample_steps.h"

namespace fiedler {

namespace {

const char* unit_of(Task t) { return t == Task::molecules ? "molecules" : t == Task::series ? "windows" : "graphs"; }

std::string name_of_step(const Config& c) {
    std::string name = fmt::format("{} {}, {} layers, C{} H{}, {} nodes", c.preset, c.pattern, c.layers, c.channels,
                                   c.heads, c.batch_nodes);
    for (const std::string& path : c.data) name += ", " + std::filesystem::path(path).filename().string();
    return name;
}

// A model that is ready to be trained on its data.
struct TrainedOnSamples {
    std::unique_ptr<SampleEngine> engine;
    std::unique_ptr<SampleSteps> steps;
    StepSettings settings;
    std::deque<const PreparedBatch*> in_flight;
    std::vector<std::int64_t> samples, nodes;  // of the finished steps
    double waited = 0;                         // seconds, for batches

    TrainedOnSamples(const Config& c, const SampleSource& source, const SampleLoader& loader,
                     const EngineOptions& options) {
        const auto seed = static_cast<std::uint64_t>(c.seed);
        engine = make_sample_engine(model_spec(c, source.shape(), loader.longest()), loader.capacity(), options);
        std::vector<float> values(static_cast<std::size_t>(engine->table().elements));
        initialise(engine->table(), engine->spec(), seed, values.data());
        engine->write(Block::master, values.data());
        steps = std::make_unique<SampleSteps>(source, loader, *engine, seed, SampleCursor{});
        settings = step_settings(c, 1, 1e-4, 0);
    }
    BenchedSteps benched() {
        return {[this] { submit(); }, [this] { return finish(); }};
    }
    void submit() {
        const auto begin = std::chrono::steady_clock::now();
        const PreparedBatch& batch = steps->next();
        waited += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        engine->submit_step(batch, settings);
        ++settings.step;
        in_flight.push_back(&batch);
    }
    StepResult finish() {
        samples.push_back(in_flight.front()->samples), nodes.push_back(in_flight.front()->nodes);
        in_flight.pop_front();
        return engine->finish_step();
    }
};

std::unique_ptr<MarkClock> clock_of(SampleEngine& engine) {
#if FIEDLER_CUDA
    if (auto* runner = dynamic_cast<SampleRunner<Cuda, bf16>*>(&engine)) return mark_clock(runner->device());
#endif
    (void)engine;
    return mark_clock(Cpu{});
}

bool replays(SampleEngine& engine) {
#if FIEDLER_CUDA
    if (auto* runner = dynamic_cast<SampleRunner<Cuda, bf16>*>(&engine)) return runner->replayed_steps() > 0;
#endif
    (void)engine;
    return false;
}

// Seconds a sample to gather it and make it ready: the fastest of three times the first batches of an epoch.
double prepare_seconds(const SampleSource& source, const SampleLoader& loader, SampleEngine& engine) {
    constexpr std::size_t kMost = 20;
    std::vector<std::vector<std::int64_t>> batches = loader.of_epoch(1, 0);
    batches.resize(std::min(batches.size(), kMost));
    PreparedBatch room = engine.room();
    SampleBatch gathered;
    double best = 0;
    for (int again = 0; again < 3; ++again) {
        const auto begin = std::chrono::steady_clock::now();
        std::int64_t samples = 0;
        for (const auto& batch : batches) {
            source.gather_epoch(batch, 0, gathered);
            engine.prepare(gathered, {true, 1}, room);
            samples += room.samples;
        }
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        if (again == 0 || seconds / double(samples) < best) best = seconds / double(samples);
    }
    return best;
}

void time_training(TrainedOnSamples& model, int steps, bench::StepRow& row) {
    SampleEngine& engine = *model.engine;
    const std::vector<double> seconds = time_steps(model.benched(), engine.device_kind() == "cuda" ? 5 : 1, steps, row);
    const double all = std::accumulate(seconds.begin(), seconds.end(), 0.0);
    const auto of_timed = [&](const std::vector<std::int64_t>& v) {
        return double(std::accumulate(v.end() - steps, v.end(), std::int64_t{0}));
    };
    row.samples = of_timed(model.samples) / steps;
    row.tokens = static_cast<std::int64_t>(std::llround(of_timed(model.nodes) / steps));
    row.samples_per_second = of_timed(model.samples) / all;
    row.tokens_per_second = of_timed(model.nodes) / all;
    row.wait_seconds = model.waited / double(model.samples.size());
    row.cuda_graph = replays(engine) ? "on" : "off";
    row.device_bytes = static_cast<std::int64_t>(engine.device_bytes_in_use());
    if (!std::isfinite(row.loss)) run_error("bench samples: the loss is not finite ({})", row.loss);
}

}  // namespace

bench::StepRow bench_samples(const Config& c, DeviceKind device, const StepBenchOptions& o,
                             const std::function<void(const bench::StepRow&)>& after_timing) {
    if (c.task == Task::text)
        throw InputError("bench samples: text is not samples; give --preset molecules, nodes or series, or use step");
    const std::unique_ptr<SampleSource> source = open_samples(c, nullptr, stderr);
    const SampleLoader loader(*source, c.batch_nodes);
    EngineOptions options = engine_options(c, device, true);
    bench::StepRow row;
    row.name = name_of_step(c);
    row.unit = unit_of(c.task);
    row.steps = o.steps;
    row.micro_batches = 1;
    row.context = loader.longest();
    {
        TrainedOnSamples model(c, *source, loader, options);
        row.device = model.engine->device_name();
        row.parameters = model.engine->table().parameters;
        row.recompute = name_of(model.engine->plan().recompute);
        row.planned_bytes = static_cast<std::int64_t>(model.engine->plan().bytes);
        time_training(model, o.steps, row);
        model.steps.reset();  // its thread would take part in what comes now
        row.prepare_seconds = prepare_seconds(*source, loader, *model.engine);
    }
    if (after_timing) after_timing(row);
    options.cuda_graph = GraphChoice::off;
    TrainedOnSamples model(c, *source, loader, options);
    profile_stages(model.benched(), clock_of(*model.engine), std::min(o.steps, 5), row);
    if (o.trace) trace_step(model.benched(), row);
    return row;
}

}  // namespace fiedler
