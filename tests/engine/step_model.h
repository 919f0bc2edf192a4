// tests/engine/step_model.h: a small model, its batches, and short trainings of it, the same on every device.
#pragma once
#include <fmt/format.h>

#include <string>
#include <vector>

#include "engine/config.h"
#include "engine/runner.h"
#include "tests/engine/random_laplacian.h"
#include "tests/support/compare.h"

namespace fiedler::test {

inline ModelSpec step_spec(const std::string& pattern, bool spectral, ScalarKind kind = ScalarKind::coordinate) {
    Config c;
    c.pattern = pattern;
    c.layers = static_cast<std::int64_t>(pattern.size());
    c.channels = 64;
    c.heads = 2;
    c.scalars = 4;
    c.scalar_kind = kind;
    c.vocab = 1003;  // no multiple of 8: padded logits
    c.context = 40;
    c.spectral_dims = spectral ? 8 : 0;
    return model_spec(c);
}

inline ModelConstants step_constants(const ModelSpec& spec) {
    ModelConstants c;
    if (spec.spectral_dims > 0) c.spectral = random_spectral_table(spec, 3);
    if (spec.has_energies()) c.laplacian = random_laplacian(spec.head_dim(), 4);
    return c;
}

// documents: most rows are cut in two, at another place with another seed.
inline Batch step_batch(const ModelSpec& spec, std::int64_t rows, std::uint64_t seed, bool documents) {
    Batch b;
    b.rows = b.real_rows = rows;
    b.length = spec.context;
    const auto n = static_cast<std::size_t>(rows * b.length);
    b.inputs = random_ints(n, 2 * seed, 0, spec.vocab);
    b.targets = random_ints(n, 2 * seed + 1, 0, spec.vocab);
    if (!documents) return b;
    const auto cuts =
        random_ints(static_cast<std::size_t>(rows), seed + 77, 0, static_cast<std::int32_t>(spec.context));
    for (std::int64_t r = 0; r < rows; ++r) {
        const auto first = static_cast<std::int32_t>(r * b.length), cut = cuts[static_cast<std::size_t>(r)];
        b.offsets.push_back(first);
        if (cut % 3 != 0) b.offsets.push_back(first + cut);
    }
    b.offsets.push_back(static_cast<std::int32_t>(n));
    for (std::size_t s = 0; s + 1 < b.offsets.size(); ++s)
        for (auto i = b.offsets[s]; i < b.offsets[s + 1]; ++i)
            b.begin.push_back(b.offsets[s]), b.end.push_back(b.offsets[s + 1]);
    return b;
}

struct StepCase {
    const char* pattern = "sbd";
    ScalarKind kind = ScalarKind::coordinate;
    int micro_batches = 1;
    bool documents = false;
    int skipped_step = 0;   // counting from 1; 0: none
    int short_step = 0;     // its batches have fewer rows
    bool evaluate = false;  // another batch between the steps
    int in_flight = 1;
    bool cuda_graph = false;
};

struct StepTrace {
    std::vector<std::string> lines;  // of each step, all digits
    std::vector<float> state;        // master weights and moments
    std::int64_t replayed = 0;
};

// Eight steps, each with another learning rate, clip and batch.
template <class Dev, class T>
StepTrace train(const StepCase& c) {
    constexpr int kSteps = 8;
    const ModelSpec spec = step_spec(c.pattern, true, c.kind);
    RunPlan plan;
    plan.micro_batch = 4;
    plan.micro_batches = c.micro_batches;
    plan.tokens = 4 * spec.context;
    plan.document_mask = c.documents;
    plan.cuda_graph = c.cuda_graph;
    Runner<Dev, T> runner(std::make_unique<Dev>(), spec, plan, 0, step_constants(spec));
    std::vector<float> block(static_cast<std::size_t>(runner.table().elements));
    initialise(runner.table(), spec, 5, block.data());
    runner.write(Block::master, block.data());
    StepTrace trace;
    const auto finish = [&] {
        const StepResult r = runner.finish_step();
        trace.lines.push_back(fmt::format("{:a} {:a}{}", r.loss, r.norm, r.skipped ? " skipped" : ""));
    };
    for (int step = 1; step <= kSteps; ++step) {
        StepSettings s;
        s.step = step;
        s.lr = 1e-3 * step;
        s.clip = step % 2 == 0 ? 0.5 : 100.0;
        if (step == c.skipped_step) s.skip_above = 1e-6;
        std::vector<Batch> batches;
        for (int m = 0; m < c.micro_batches; ++m)
            batches.push_back(
                step_batch(spec, step == c.short_step ? 2 : 4, static_cast<std::uint64_t>(10 * step + m), c.documents));
        runner.submit_step(batches, s);
        while (static_cast<int>(trace.lines.size()) + c.in_flight <= step) finish();
        if (c.evaluate)
            trace.lines.back() += fmt::format(" {:a}", runner.loss_sum(step_batch(spec, 3, 9, c.documents)));
    }
    while (trace.lines.size() < kSteps) finish();
    for (const Block b : kBlocks) {
        runner.read(b, block.data());
        trace.state.insert(trace.state.end(), block.begin(), block.end());
    }
    trace.replayed = runner.replayed_steps();
    return trace;
}

struct HeadResult {
    double loss = 0;
    Values dhead, dn;
};

// Loss of one batch, gradient of the head and of its input, with chunks of logits_rows, loss_rows of them at a time.
template <class Dev, class T>
HeadResult head_gradients(const Dev& dev, const ModelSpec& spec, std::int64_t logits_rows, std::int64_t loss_rows) {
    using A = acc_t<T>;
    const Batch host = step_batch(spec, 4, 1, false);
    const auto n = static_cast<std::int64_t>(host.inputs.size());
    RunPlan run;
    run.tokens = n;
    ActivationPlan plan = activation_plan(spec, run, std::is_same_v<T, bf16>);
    plan.logits_rows = std::min(logits_rows, n);
    plan.loss_rows = loss_rows;
    const ParamTable table(spec);
    Arena arena;
    RunLayout<T>(arena, spec, table, plan, false);
    arena.commit(memory_of(dev));
    RunLayout<T> layout(arena, spec, table, plan, false);
    fill_bytes(dev, arena.base(), 0, arena.peak());
    ModelConstants constants;
    constants.laplacian = path_laplacian(spec.head_dim());
    layout.upload(dev, constants);
    std::vector<float> w(static_cast<std::size_t>(table.elements));
    initialise(table, spec, 5, w.data());
    std::vector<T> weights;
    std::vector<A> master;
    for (const float x : w) weights.push_back(T(x)), master.push_back(A(x));
    copy_to_device(dev, layout.params.weights.data, weights.data(), weights.size() * sizeof(T));
    copy_to_device(dev, layout.params.master.data, master.data(), master.size() * sizeof(A));
    Model<Dev, T> model(dev, spec, table, layout.params, layout.laplacian(spec.head_dim()), layout.spectral, plan,
                        *layout.acts);
    const auto at = layout.step.tokens(layout.step_memory, 0);
    copy_to_device(dev, at.inputs, host.inputs.data(), host.inputs.size() * sizeof(std::int32_t));
    copy_to_device(dev, at.targets, host.targets.data(), host.targets.size() * sizeof(std::int32_t));
    DeviceBatch batch;
    batch.inputs = Vec<const std::int32_t>(at.inputs, n);
    batch.targets = Vec<const std::int32_t>(at.targets, n);
    batch.seq = host.packed();
    model.forward(batch);
    model.loss(batch, {&layout.control->loss, 1}, true, A(1));
    const auto read = [&]<class U>(const Mat<U>& m) {
        std::vector<U> values(static_cast<std::size_t>(m.rows * m.cols));
        copy_to_host(dev, values.data(), m.data, values.size() * sizeof(U));
        return from(values);
    };
    A loss = 0;
    copy_to_host(dev, &loss, &layout.control->loss, sizeof loss);
    return {double(loss), read(table.matrix(layout.params.grads.data, table.head)), read(layout.acts->scratch().dn)};
}

}  // namespace fiedler::test
