// engine/plan.cpp: which device, and how a run fits its memory.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "engine/error.h"
#include "engine/runner.h"
#include "kernels/head.h"

namespace fiedler {

DeviceKind choose_device(DeviceChoice choice) {
    if (choice == DeviceChoice::cpu) return DeviceKind::cpu;
    std::string why;
    if (cuda_device_count(&why) > 0) return DeviceKind::cuda;
    if (choice == DeviceChoice::cuda)
        throw InputError(
            fmt::format("device: cuda was asked for, but there is none: {}; use --device cpu or auto", why));
    return DeviceKind::cpu;
}

StepSettings step_settings(const Config& c, std::int64_t step, double lr, double norm_limit) {
    StepSettings s;
    s.step = step;
    s.lr = lr;
    s.beta1 = c.beta1;
    s.beta2 = c.beta2;
    s.eps = c.adam_eps;
    s.decay = c.weight_decay;
    s.clip = c.clip;
    s.skip_above = std::isfinite(norm_limit) ? norm_limit : 0;
    s.head_bf16 = step > steps_in_fp8(c);
    return s;
}
std::int64_t steps_in_fp8(const Config& c) {
    if (c.head_precision != HeadChoice::fp8) return 0;
    return std::llround((1 - c.head_bf16_fraction) * double(c.steps));
}

EngineOptions engine_options(const Config& c, DeviceKind device, bool training) {
    EngineOptions o;
    o.device = device;
    o.threads = static_cast<int>(c.threads);
    o.memory_budget = static_cast<std::size_t>(c.memory_budget);
    o.micro_batch = static_cast<std::int32_t>(c.micro_batch);
    o.batch_tokens = training ? c.batch_tokens : 0;
    o.recompute = c.recompute;
    o.training = training;
    o.document_mask = c.document_mask;
    o.cuda_graph = c.cuda_graph;
    o.attention = c.attention;
    o.attention_skip = c.attention_skip;
    o.kernels = c.kernels;
    // Planned where there is no device: for one that has it.
    o.head_fp8 = c.head_precision == HeadChoice::fp8 && c.kernels == KernelChoice::automatic && training &&
                 device == DeviceKind::cuda && (cuda_device_count() == 0 || head_has_fp8(cuda_device_info(0).arch));
    return o;
}

namespace {

// Bytes a run may use when no budget is given: what is free, less what the libraries take beside the arena.
std::size_t free_memory(DeviceKind device) {
    if (device == DeviceKind::cuda) {
        if (cuda_device_count() == 0) return 0;
        return cuda_device_info(0).memory_bytes / 20 * 19;
    }
    std::ifstream meminfo("/proc/meminfo");
    for (std::string word; meminfo >> word;)
        if (word == "MemAvailable:") {
            std::size_t kilobytes = 0;
            meminfo >> kilobytes;
            return kilobytes * 1024 / 10 * 9;
        }
    return 0;  // unknown: no limit
}

RunPlan measured(const ModelSpec& spec, const EngineOptions& o, std::int32_t micro, std::int32_t count,
                 Recompute recompute) {
    RunPlan p;
    p.micro_batch = micro;
    p.micro_batches = count;
    p.recompute = recompute;
    p.training = o.training;
    p.document_mask = o.document_mask;
    p.attention = o.attention;
    p.attention_skip = o.attention_skip;
    p.cuda_graph = o.device == DeviceKind::cuda && !o.document_mask && o.cuda_graph != GraphChoice::off;
    p.tokens = std::int64_t(micro) * spec.context;
    p.head_fp8 = o.head_fp8;
    p.head_fp8 = activation_plan(spec, p, o.device == DeviceKind::cuda).head_fp8;
    if (o.device == DeviceKind::cuda)
        measure<bf16>(spec, p);
    else
        measure<float>(spec, p);
    return p;
}

std::vector<Recompute> levels(RecomputeChoice c) {
    switch (c) {
        case RecomputeChoice::none:
            return {Recompute::none};
        case RecomputeChoice::mlp:
            return {Recompute::mlp};
        case RecomputeChoice::layer:
            return {Recompute::layer};
        case RecomputeChoice::automatic:
            break;
    }
    return {Recompute::none, Recompute::mlp, Recompute::layer};
}

std::vector<std::int32_t> divisors_descending(std::int32_t n) {
    std::vector<std::int32_t> d;
    for (std::int32_t i = n; i >= 1; --i)
        if (n % i == 0) d.push_back(i);
    return d;
}

// Says by how much the budget is too small even for `smallest`, the leanest plan that the user's choices allow, and
// which setting would fit.
[[noreturn]] void throw_too_small(const ModelSpec& spec, const EngineOptions& o, std::size_t budget,
                                  const RunPlan& smallest) {
    const RunPlan least = measured(spec, o, 1, smallest.micro_batch * smallest.micro_batches, Recompute::layer);
    std::string mend;
    const char* context = o.training ? "--context" : "context";  // that of a trained model is no flag
    if (o.training && least.bytes <= budget)
        mend = "--micro-batch 1 --recompute layer would fit";
    else if (o.memory_budget == 0)
        mend = fmt::format("choose a smaller model or a smaller {}", context);
    else
        mend = fmt::format("--memory-budget {}MiB would fit, or a smaller model or {}", (smallest.bytes >> 20) + 1,
                           context);
    const auto text = [](std::size_t bytes) { return bytes_text(static_cast<std::int64_t>(bytes)); };
    throw InputError(fmt::format("{} {} too small for this {}, which needs {} with micro-batch {} and recompute {}; {}",
                                 o.memory_budget > 0 ? fmt::format("memory-budget: {} is", text(budget))
                                                     : fmt::format("memory: {} is free,", text(budget)),
                                 text(smallest.bytes - budget), o.training ? "run" : "model", text(smallest.bytes),
                                 smallest.micro_batch, name_of(smallest.recompute), mend));
}

}  // namespace

// Recomputation costs arithmetic (a tenth of a step for the MLP, a third for whole layers); a small micro-batch costs
// efficiency only once it no longer fills the device. So: the largest micro-batch first, then smaller ones down to
// kFull tokens, then recomputation, then smaller ones still.
RunPlan plan_run(const ModelSpec& spec, const EngineOptions& o) {
    const std::size_t budget = o.memory_budget > 0 ? o.memory_budget : free_memory(o.device);
    const std::int32_t sequences =
        o.training ? static_cast<std::int32_t>(std::max<std::int64_t>(1, o.batch_tokens / spec.context)) : 1;
    if (o.training && o.batch_tokens % spec.context != 0)
        throw InputError(
            fmt::format("batch-tokens: {} is not a multiple of context = {}", o.batch_tokens, spec.context));
    if (o.micro_batch > 0 && o.training && sequences % o.micro_batch != 0)
        throw InputError(
            fmt::format("micro-batch: {} does not divide the {} sequences of a step (batch-tokens / context)",
                        o.micro_batch, sequences));
    if (o.cuda_graph == GraphChoice::on && o.device == DeviceKind::cpu)
        throw InputError("cuda-graph: on needs a CUDA device; use auto");
    if (o.cuda_graph == GraphChoice::on && o.document_mask)
        throw InputError("cuda-graph: on does not go with document-mask, whose steps differ in shape; use auto");
    const std::int64_t kFull = o.device == DeviceKind::cuda ? 8192 : 1024;
    std::vector<std::int32_t> sizes = o.micro_batch > 0 ? std::vector{o.micro_batch} : divisors_descending(sequences);
    // On the CPU large micro-batches only use memory: stay near the size at which every core has work.
    const std::int64_t most = o.device == DeviceKind::cuda || o.micro_batch > 0 ? std::int64_t(1) << 40 : 4 * kFull;
    std::vector<std::pair<std::int32_t, Recompute>> order;
    for (const bool full : {true, false})
        for (const Recompute r : levels(o.recompute))
            for (const std::int32_t m : sizes) {
                const std::int64_t tokens = std::int64_t(m) * spec.context;
                if ((tokens > most && m > 1) || (full != (tokens >= kFull))) continue;
                order.emplace_back(m, r);
            }
    RunPlan smallest;
    for (const auto& [m, r] : order) {
        RunPlan p = measured(spec, o, m, std::max(1, sequences / m), r);
        if (budget == 0 || p.bytes <= budget) return p;
        if (smallest.bytes == 0 || p.bytes < smallest.bytes) smallest = std::move(p);
    }
    throw_too_small(spec, o, budget, smallest);
}

std::unique_ptr<Engine> make_engine(const ModelSpec& spec, const EngineOptions& o, const ModelConstants& constants) {
    RunPlan plan = plan_run(spec, o);
    if (o.device == DeviceKind::cpu) {
        auto cpu = std::make_unique<Cpu>();
        cpu->threads = o.threads;
        return std::make_unique<Runner<Cpu, float>>(std::move(cpu), spec, plan, o.memory_budget, constants);
    }
#if FIEDLER_CUDA
    const World world = world_from_environment();  // one process a device, in turn over those that this machine shows
    if (world.size > 1 && o.cuda_graph != GraphChoice::on) plan.cuda_graph = false;
    auto device = std::make_unique<Cuda>(world.rank % cuda_device_count());
    if (o.kernels == KernelChoice::general) device->forget_architecture();
    auto engine = std::make_unique<Runner<Cuda, bf16>>(std::move(device), spec, plan, o.memory_budget, constants);
    engine->use_comm(make_comm(engine->device(), world));
    return engine;
#else
    throw InputError("device: this binary was built without CUDA; use --device cpu");
#endif
}

}  // namespace fiedler
