#include "engine/commands.h"

#include <fmt/format.h>

#include "engine/error.h"
#include "engine/log.h"
#include "engine/molecule_source.h"
#include "engine/prepare_config.h"
#include "engine/runner.h"
#include "engine/signals.h"
#include "engine/spectral_source.h"

namespace fiedler {

int run_prepare(const Invocation& call) {
    const SignalGuard guard;
    const Config& c = call.config;
    if (c.task == Task::molecules) return run_prepare_molecules(c);
    if (c.task != Task::text)
        input_error("task: {} need no preparing; give their files to `train`", value_text(c, *find_knob("task")));
    if (c.data.empty()) throw InputError("data: nothing to prepare; name files or folders of text or source code");
    const PrepareOptions options = prepare_options(c);
    std::string folder = c.out;
    if (folder.empty())
        folder = prepare_if_needed(options, c.data_cache.empty() ? "data/cache" : c.data_cache, stdout).folder;
    else
        prepare(options, folder, stdout);
    if (c.spectral_dims > 0) {
        const Dataset data = Dataset::open(folder);
        (void)token_spectrum(data, data.info().vocab_size, c.spectral_dims, c, stdout);
    }
    const DatasetInfo info = read_manifest(folder);
    fmt::print("train       {} tokens, {} documents, {}\n", count_text(double(info.train.tokens)), info.train.documents,
               bytes_text(info.train.bytes));
    fmt::print("held out    {} tokens, {} documents, {} ({}), unigram entropy {:.3f} nats a token\n",
               count_text(double(info.val.tokens)), info.val.documents, bytes_text(info.val.bytes), info.split,
               info.unigram_entropy);
    fmt::print("dataset     {}\n", folder);
    return 0;
}

int run_plan(const Invocation& call) {
    const Config& c = call.config;
    const ModelSpec spec = model_spec(c);
    check_training(c);
    (void)feature_source(c, spec);
    const ParamTable table(spec);
    // Without a GPU the plan is still one for a GPU, unless the CPU is asked for: that is what plans are made for.
    const DeviceKind device = c.device == DeviceChoice::cpu ? DeviceKind::cpu : DeviceKind::cuda;
    const EngineOptions options = engine_options(c, device, true);
    const RunPlan plan = plan_run(spec, options);
    fmt::print("{}\n", plan.table);
    fmt::print("model       {} parameters ({})\n", table.parameters, c.preset);
    fmt::print("step        {} tokens: {} micro-batches of {} x {} tokens, recompute {}\n", c.batch_tokens,
               plan.micro_batches, plan.micro_batch, c.context, name_of(plan.recompute));
    if (c.head_precision == HeadChoice::fp8)
        fmt::print("head        products in {}\n",
                   plan.head_fp8 ? "fp8" : "bf16: fp8 does not go with this device or these shapes");
    fmt::print("arithmetic  {:.1f} MFLOP a token\n", training_flops_per_token(spec, spec.context) / 1e6);
    fmt::print("memory      {} on {}{}\n", bytes_text(static_cast<std::int64_t>(plan.bytes)),
               device == DeviceKind::cuda ? "the GPU" : "the CPU",
               options.memory_budget > 0 ? fmt::format(", of a budget of {}", bytes_text(c.memory_budget)) : "");
    return 0;
}

}  // namespace fiedler
