#include "engine/runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "engine/decode.h"
#include "engine/error.h"
#include "engine/runner_instances.h"
#include "kernels/adamw.h"
#include "kernels/matmul.h"
#include "kernels/parallel.h"

namespace fiedler {

const char* name_of(Block b) {
    switch (b) {
        case Block::master:
            return "master";
        case Block::moment1:
            return "moment1";
        case Block::moment2:
            return "moment2";
    }
    return "?";
}

template <class T>
RunLayout<T>::RunLayout(Arena& arena, const ModelSpec& spec, const ParamTable& table, const ActivationPlan& plan,
                        bool document_mask) {
    const std::int64_t n = table.elements, tokens = plan.tokens;
    const auto take = [&]<class U>(Vec<U>& v, const char* name, std::int64_t elements) {
        v = {arena.take<U>(name, {elements}, Lifetime::persistent), elements};
    };
    take(params.master, "master", n);
    if constexpr (std::is_same_v<T, A>)
        params.weights = params.master;
    else
        take(params.weights, "weights", n);
    if (plan.training) {
        take(params.grads, "grads", n);
        take(moment1, "moment1", n);
        take(moment2, "moment2", n);
    }
    control = arena.take<StepControl<A>>("control", {1}, Lifetime::persistent);
    take(inputs, "inputs", tokens);
    take(targets, "targets", tokens);
    if (document_mask) {
        take(offsets, "offsets", tokens + 1);
        take(begin, "begin", tokens);
        take(end, "end", tokens);
    }
    const std::int64_t d = spec.head_dim();
    take(lap_offsets, "laplacian.offsets", d + 1);
    take(lap_columns, "laplacian.columns", d * d);
    take(lap_values, "laplacian.values", d * d);
    take(lap_vectors, "laplacian.eigenvectors", d * d);
    take(lap_eigenvalues, "laplacian.eigenvalues", d);
    if (const std::int64_t k = spec.spectral_columns(); k > 0)
        spectral = arena.mat<T>("spectral.U", spec.vocab, k, Lifetime::persistent);
    if constexpr (std::is_same_v<T, bf16>) {
        take(norm_partials, "gradnorm.partials", kGradnormPartials);
        workspace = arena.take<std::byte>("matmul.workspace", {std::int64_t(kWorkspaceBytes)}, Lifetime::persistent);
    }
    acts = std::make_unique<Activations<T>>(arena, spec, plan);
}

template <class T>
FeatureLaplacian<acc_t<T>> RunLayout<T>::laplacian(std::int32_t dim) const {
    FeatureLaplacian<A> l;
    l.dim = dim;
    l.offsets = lap_offsets;
    l.columns = lap_columns.slice(0, lap_entries);
    l.values = lap_values.slice(0, lap_entries);
    l.eigenvectors = Mat<const A>(lap_vectors.data, dim, dim);
    l.eigenvalues = lap_eigenvalues;
    return l;
}

ActivationPlan activation_plan(const ModelSpec& spec, const RunPlan& run, bool cuda) {
    ActivationPlan p;
    p.tokens = run.tokens;
    p.sequences = run.document_mask ? run.tokens : run.micro_batch;
    // A chunk of logits: large enough for an efficient product, small enough to stay in the last-level cache.
    const std::int64_t elements = cuda ? std::int64_t(32) << 20 : std::int64_t(1) << 20;
    p.logits_rows =
        std::clamp<std::int64_t>(elements / spec.vocab / 128 * 128, 128, std::max<std::int64_t>(run.tokens, 1));
    p.logits_rows = std::min(p.logits_rows, run.tokens);
    p.training = run.training;
    p.keep_layers = run.training;
    p.recompute = run.recompute;
    return p;
}

template <class T>
void measure(const ModelSpec& spec, RunPlan& run) {
    Arena arena;
    const ParamTable table(spec);
    RunLayout<T>(arena, spec, table, activation_plan(spec, run, std::is_same_v<T, bf16>), run.document_mask);
    run.bytes = arena.peak();
    run.table = arena.table();
}
template void measure<float>(const ModelSpec&, RunPlan&);
template void measure<double>(const ModelSpec&, RunPlan&);
template void measure<bf16>(const ModelSpec&, RunPlan&);

template <class Dev, class T>
Runner<Dev, T>::Runner(std::unique_ptr<Dev> dev, const ModelSpec& spec, const RunPlan& plan, std::size_t budget,
                       ModelConstants constants)
    : dev_(std::move(dev)),
      spec_(spec),
      table_(spec_),
      plan_(plan),
      constants_(std::move(constants)),
      activation_plan_(activation_plan(spec_, plan_, std::is_same_v<T, bf16>)),
      comm_(make_comm(World{})) {
    if (constants_.laplacian.dim == 0) constants_.laplacian = path_laplacian(spec_.head_dim());
    if (constants_.laplacian.dim != spec_.head_dim() ||
        constants_.spectral.size() != static_cast<std::size_t>(std::int64_t(spec_.vocab) * spec_.spectral_columns()))
        throw std::logic_error("runner: the constants are those of another model");
    const auto lay_out = [&] {
        return std::make_unique<RunLayout<T>>(arena_, spec_, table_, activation_plan_, plan_.document_mask);
    };
    lay_out();
    plan_.bytes = arena_.peak();
    plan_.table = arena_.table();
    arena_.commit(memory_of(*dev_), budget);
    layout_ = lay_out();
    fill_bytes(*dev_, arena_.base(), 0, arena_.peak());
    if constexpr (std::is_same_v<Dev, Cuda>) {
        dev_->workspace = layout_->workspace;
        dev_->workspace_bytes = kWorkspaceBytes;
    }
    layout_->upload(*dev_, constants_);
    model_ =
        std::make_unique<Model<Dev, T>>(*dev_, spec_, table_, layout_->params, layout_->laplacian(spec_.head_dim()),
                                        layout_->spectral, activation_plan_, *layout_->acts);
}

template <class Dev, class T>
Runner<Dev, T>::~Runner() {
    model_.reset();
    comm_.reset();
}

template <class Dev, class T>
std::string Runner<Dev, T>::device_name() const {
    if constexpr (std::is_same_v<Dev, Cuda>)
        return cuda_device_info(dev_->ordinal).name;
    else
        return fmt::format("cpu ({} threads)", thread_count(*dev_));
}
template <class Dev, class T>
std::string Runner<Dev, T>::device_kind() const {
    return std::is_same_v<Dev, Cuda> ? "cuda" : "cpu";
}
template <class Dev, class T>
std::size_t Runner<Dev, T>::device_bytes_in_use() {
    if constexpr (std::is_same_v<Dev, Cuda>) {
        std::size_t free_bytes = 0, total = 0;
        memory_info(*dev_, free_bytes, total);
        return total - free_bytes;
    }
    return 0;
}

// A square product, large enough to fill the device; its operands are allocated for the moment, outside the arena.
template <class Dev, class T>
double Runner<Dev, T>::measured_peak_flops() {
    if (peak_flops_ > 0) return peak_flops_;
    const std::int64_t n = std::is_same_v<Dev, Cuda> ? 8192 : 768;
    const auto elements = static_cast<std::size_t>(n * n);
    T* memory = nullptr;
    try {
        memory = static_cast<T*>(device_alloc(*dev_, 3 * elements * sizeof(T)));
    } catch (const DeviceError&) {
        return 0;  // the device is full: the peak stays unknown, the run goes on
    }
    std::vector<T> host(2 * elements);
    std::uint32_t state = 1;
    for (T& x : host) {  // random signs and magnitudes: zeros would run faster than real data
        state = state * 1664525u + 1013904223u;
        x = T(float(std::int32_t(state)) * 4.6e-10f);
    }
    copy_to_device(*dev_, memory, host.data(), host.size() * sizeof(T));
    const MatmulForward<T, T> product{
        .y = {memory + 2 * elements, n, n}, .x = {memory, n, n}, .w = {memory + elements, n, n}, .residual = {}};
    double best = 1e30;
    for (int i = 0; i < 6; ++i) {
        synchronize(*dev_);
        const auto start = std::chrono::steady_clock::now();
        matmul_forward(*dev_, product);
        synchronize(*dev_);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        if (i > 0) best = std::min(best, seconds);
    }
    device_free(*dev_, memory);
    return peak_flops_ = 2.0 * double(n) * double(n) * double(n) / best;
}

template <class Dev, class T>
DeviceBatch Runner<Dev, T>::upload(const Batch& host) {
    const auto n = static_cast<std::int64_t>(host.inputs.size());
    if (n > plan_.tokens) throw std::logic_error("upload: more tokens than planned");
    const auto send = [&](const Vec<std::int32_t>& to, const std::vector<std::int32_t>& from) {
        copy_to_device(*dev_, to.data, from.data(), from.size() * sizeof(std::int32_t));
    };
    DeviceBatch b;
    send(layout_->inputs, host.inputs);
    b.inputs = Vec<const std::int32_t>(layout_->inputs.data, n);
    if (!host.targets.empty()) {
        send(layout_->targets, host.targets);
        b.targets = Vec<const std::int32_t>(layout_->targets.data, n);
    }
    b.seq = host.packed();
    if (!host.offsets.empty()) {
        send(layout_->offsets, host.offsets);
        send(layout_->begin, host.begin);
        send(layout_->end, host.end);
        b.seq.offsets = layout_->offsets.data;
        b.seq.begin = layout_->begin.data;
        b.seq.end = layout_->end.data;
    }
    return b;
}

template <class Dev, class T>
void Runner<Dev, T>::clear_control() {
    fill_bytes(*dev_, layout_->control, 0, sizeof(StepControl<A>));
}
template <class Dev, class T>
StepControl<acc_t<T>> Runner<Dev, T>::read_control() {
    StepControl<A> control;
    copy_to_host(*dev_, &control, layout_->control, sizeof control);
    return control;
}

template <class Dev, class T>
double Runner<Dev, T>::loss_sum(const Batch& host) {
    clear_control();
    const DeviceBatch batch = upload(host);
    model_->forward(batch);
    model_->loss(batch, {&layout_->control->loss, 1}, false, A(0));
    return double(read_control().loss);
}

template <class Dev, class T>
double Runner<Dev, T>::loss_and_gradients(const Batch& host, std::vector<A>& grads) {
    const auto elements = static_cast<std::size_t>(table_.elements);
    clear_control();
    fill_bytes(*dev_, layout_->params.grads.data, 0, elements * sizeof(A));
    const DeviceBatch batch = upload(host);
    const double tokens = double(host.inputs.size());
    model_->forward(batch);
    model_->loss(batch, {&layout_->control->loss, 1}, true, A(1 / tokens));
    model_->backward(batch);
    grads.resize(elements);
    copy_to_host(*dev_, grads.data(), layout_->params.grads.data, elements * sizeof(A));
    return double(read_control().loss) / tokens;
}

template <class Dev, class T>
std::vector<std::vector<double>> Runner<Dev, T>::calibrate_tau(const Batch& host) {
    return model_->calibrate_tau(upload(host));
}

template <class Dev, class T>
Vec<acc_t<T>> Runner<Dev, T>::block(Block b) const {
    if (b == Block::moment1) return layout_->moment1;
    if (b == Block::moment2) return layout_->moment2;
    return layout_->params.master;
}

template <class Dev, class T>
void Runner<Dev, T>::read(Block which, float* out) {
    const Vec<A> b = block(which);
    std::vector<A> host(static_cast<std::size_t>(b.size));
    copy_to_host(*dev_, host.data(), b.data, host.size() * sizeof(A));
    std::copy(host.begin(), host.end(), out);
}

template <class Dev, class T>
void Runner<Dev, T>::write(Block which, const float* in) {
    const Vec<A> b = block(which);
    const std::vector<A> host(in, in + b.size);
    copy_to_device(*dev_, b.data, host.data(), host.size() * sizeof(A));
    if (which == Block::master) refresh_weights();
    synchronize(*dev_);
}

template <class Dev, class T>
void Runner<Dev, T>::refresh_weights() {
    if constexpr (!std::is_same_v<T, A>)
        cast_weights(*dev_, Cast<T>{.weights = layout_->params.weights, .master = layout_->params.master});
}

template <class Dev, class T>
std::unique_ptr<Decoder> Runner<Dev, T>::decoder(std::int64_t capacity) {
    return std::make_unique<ModelDecoder<Dev, T>>(
        *dev_, *model_, layout_->params, capacity,
        [this](const std::vector<std::int32_t>& tokens) {
            Batch b;
            b.inputs = tokens;
            b.rows = 1;
            b.length = static_cast<std::int64_t>(tokens.size());
            return upload(b);
        },
        plan_.tokens);
}

template struct RunLayout<float>;
template struct RunLayout<double>;
template struct RunLayout<bf16>;
FIEDLER_RUNNER_INSTANCES()

}  // namespace fiedler
