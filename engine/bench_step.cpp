#include "engine/bench_step.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "engine/bench_parts.h"
#include "engine/error.h"
#include "engine/rng.h"
#include "engine/runner.h"

namespace fiedler {

namespace {

std::string name_of_step(const Config& c) {
    std::string name = fmt::format("{} {}, {} layers, C{} H{} V{} T{}, {} tokens", c.preset, c.pattern, c.layers,
                                   c.channels, c.heads, c.vocab, c.context, c.batch_tokens);
    if (c.scalar_kind == ScalarKind::energy) name += ", energies";
    if (c.spectral_dims > 0) name += fmt::format(", spectral {}", c.spectral_dims);
    return name;
}

std::vector<Batch> synthetic_batches(const RunPlan& plan, const ModelSpec& spec, std::uint64_t seed) {
    const auto token = [&](std::uint64_t i) {
        const double u = rng::uniform(seed, 0, i);
        return static_cast<std::int32_t>(std::min(std::pow(double(spec.vocab) + 1, u) - 1, double(spec.vocab - 1)));
    };
    std::vector<Batch> batches(static_cast<std::size_t>(plan.micro_batches));
    std::uint64_t i = 0;
    for (Batch& b : batches) {
        b.rows = b.real_rows = plan.micro_batch;
        b.length = spec.context;
        for (std::int64_t n = 0; n < b.rows * b.length; ++n) {
            b.inputs.push_back(token(i++));
            b.targets.push_back(token(i++));
        }
    }
    return batches;
}

// A model that is ready to be trained on tokens of nobody's.
struct Trained {
    std::unique_ptr<Engine> engine;
    std::vector<Batch> batches;
    StepSettings settings;

    Trained(const Config& c, const EngineOptions& options) {
        const ModelSpec spec = model_spec(c);
        ModelConstants constants;
        if (spec.spectral_dims > 0) constants.spectral = random_spectral_table(spec, 1);
        engine = make_engine(spec, options, constants);
        std::vector<float> master(static_cast<std::size_t>(engine->table().elements));
        initialise(engine->table(), spec, 1, master.data());
        engine->write(Block::master, master.data());
        batches = synthetic_batches(engine->plan(), spec, 1);
        if (spec.has_energies() && spec.measured_tau) (void)engine->calibrate_tau(batches[0]);
        settings.lr = 1e-4;
        settings.beta1 = c.beta1, settings.beta2 = c.beta2, settings.eps = c.adam_eps;
        settings.decay = c.weight_decay, settings.clip = c.clip;
    }
    BenchedSteps steps() {
        return {[this] {
                    engine->submit_step(batches, settings);
                    ++settings.step;
                },
                [this] { return engine->finish_step(); }};
    }
};

std::unique_ptr<MarkClock> clock_of(Engine& engine) {
#if FIEDLER_CUDA
    if (auto* runner = dynamic_cast<Runner<Cuda, bf16>*>(&engine)) return mark_clock(runner->device());
#endif
    (void)engine;
    return mark_clock(Cpu{});
}

bool replays(Engine& engine) {
#if FIEDLER_CUDA
    if (auto* runner = dynamic_cast<Runner<Cuda, bf16>*>(&engine)) return runner->replayed_steps() > 0;
#endif
    (void)engine;
    return false;
}

}  // namespace

bench::StepRow bench_step(const Config& c, DeviceKind device, const StepBenchOptions& o,
                          const std::function<void(const bench::StepRow&)>& after_timing) {
    check_training(c);
    EngineOptions options = engine_options(c, device, true);
    bench::StepRow row;
    row.name = name_of_step(c);
    row.steps = o.steps;
    row.context = c.context;
    row.tokens = c.batch_tokens;
    {
        Trained model(c, options);
        Engine& engine = *model.engine;
        row.device = engine.device_name();
        row.parameters = engine.table().parameters;
        row.micro_batches = engine.plan().micro_batches;
        row.recompute = name_of(engine.plan().recompute);
        if (engine.plan().head_fp8) row.name += ", head fp8";
        row.planned_bytes = static_cast<std::int64_t>(engine.plan().bytes);
        time_steps(model.steps(), engine.device_kind() == "cuda" ? 5 : 1, o.steps, row);
        row.cuda_graph = replays(engine) ? "on" : "off";
        row.device_bytes = static_cast<std::int64_t>(engine.device_bytes_in_use());
        row.tokens_per_second = double(row.tokens) / row.seconds;
        row.flops_per_token = training_flops_per_token(engine.spec(), engine.spec().context);
        row.peak_flops = engine.measured_peak_flops();
        if (row.peak_flops > 0) row.share = row.tokens_per_second * row.flops_per_token / row.peak_flops;
        if (!std::isfinite(row.loss)) run_error("bench step: the loss is not finite ({})", row.loss);
    }
    if (after_timing) after_timing(row);
    options.cuda_graph = GraphChoice::off;
    Trained model(c, options);
    profile_stages(model.steps(), clock_of(*model.engine), std::min(o.steps, 5), row);
    if (o.trace) trace_step(model.steps(), row);
    return row;
}

}  // namespace fiedler
