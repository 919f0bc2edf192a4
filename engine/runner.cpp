#include "engine/runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <limits>

#include "engine/decode.h"
#include "engine/error.h"
#include "engine/run_parts.h"
#include "engine/runner_instances.h"
#include "engine/slot_decoder.h"
#include "kernels/head.h"
#include "kernels/matmul.h"
#include "kernels/tuning.h"

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

template <class A>
StepBlock<A>::StepBlock(std::int64_t tokens, std::int64_t micro_batches, bool document_mask)
    : micro_batches_(micro_batches), document_mask_(document_mask) {
    constexpr std::size_t kAlign = Arena::kAlign;
    static_assert(sizeof(StepControl<A>) <= kAlign);
    array_ = (static_cast<std::size_t>(tokens + 1) * sizeof(std::int32_t) + kAlign - 1) / kAlign * kAlign;
    bytes_ = kAlign + static_cast<std::size_t>(micro_batches) * (document_mask ? 5 : 2) * array_;
}

template <class A>
typename StepBlock<A>::Tokens StepBlock<A>::tokens(void* base, std::int64_t micro_batch) const {
    const std::size_t arrays = document_mask_ ? 5 : 2;
    std::byte* first =
        static_cast<std::byte*>(base) + Arena::kAlign + static_cast<std::size_t>(micro_batch) * arrays * array_;
    const auto array = [&](std::size_t i) {
        return i < arrays ? reinterpret_cast<std::int32_t*>(first + i * array_) : nullptr;
    };
    return {array(0), array(1), array(2), array(3), array(4)};
}

template <class T>
RunLayout<T>::RunLayout(Arena& arena, const ModelSpec& spec, const ParamTable& table, const ActivationPlan& plan,
                        bool document_mask, std::int64_t micro_batches)
    : step(spec.samples ? 0 : plan.tokens, micro_batches, document_mask) {
    const std::int64_t n = table.elements;
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
    step_memory = arena.take<std::byte>("step", {static_cast<std::int64_t>(step.bytes())}, Lifetime::persistent);
    control = step.control(step_memory);
    const std::int64_t d = spec.head_dim();
    take(lap_offsets, "laplacian.offsets", d + 1);
    take(lap_columns, "laplacian.columns", d * d);
    take(lap_values, "laplacian.values", d * d);
    take(lap_vectors, "laplacian.eigenvectors", d * d);
    take(lap_eigenvalues, "laplacian.eigenvalues", d);
    if constexpr (std::is_same_v<T, bf16>)
        for (const LayerSpec& l : spec.layer) {
            Vec<std::byte>& matrix = l.scalars == 1 ? lap_of_one : lap_of_several;
            if (l.kind == LayerKind::energy && matrix.size == 0)
                take(matrix, l.scalars == 1 ? "laplacian.of_one" : "laplacian.of_several",
                     energy_matrix_bytes(d, l.scalars));
        }
    if (const std::int64_t k = spec.spectral_columns(); k > 0 && !spec.samples)
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
    l.of_one = of_one, l.of_several = of_several;
    return l;
}

namespace {
constexpr std::uint64_t kChunkElements = std::uint64_t(1) << 29;  // 1 GiB of logits at most...
constexpr std::uint64_t kLeastRows = 128;                         // ...unless products would get too narrow
constexpr std::int64_t kHiddenRows =
    32768;  // of the MLP at a time in long micro-batches: products are as fast as for all
}  // namespace

std::int64_t loss_rows(const ModelSpec& spec, const ActivationPlan& plan, std::size_t l2_bytes) {
    const std::uint64_t row = std::uint64_t(spec.vocab) * sizeof(bf16), rows = std::bit_floor(l2_bytes / 2 / row);
    return rows >= kLeastRows && static_cast<std::int64_t>(rows) < plan.logits_rows ? static_cast<std::int64_t>(rows)
                                                                                    : 0;
}

ActivationPlan activation_plan(const ModelSpec& spec, const RunPlan& run, bool cuda) {
    ActivationPlan p;
    p.tokens = run.tokens;
    p.sequences = run.document_mask ? run.tokens : run.micro_batch;
    // A chunk of logits. On the CPU it stays in the last-level cache. On the GPU only the loss_rows at hand do; the chunk
    // is as long as makes the head's gradient cheap, of which each chunk reads and writes 8 vocab channels bytes in f32,
    // against 6 vocab rows bytes of gradients of logits written once and read twice: a twelfth with 16 channels rows.
    if (cuda) {
        const auto channels = static_cast<std::uint64_t>(spec.channels), vocab = static_cast<std::uint64_t>(spec.vocab);
        p.logits_rows = static_cast<std::int64_t>(
            std::max(std::min(std::bit_ceil(16 * channels), std::bit_floor(kChunkElements / vocab)), kLeastRows));
    } else {
        p.logits_rows = std::max<std::int64_t>((std::int64_t(1) << 20) / spec.vocab / 128 * 128, 128);
    }
    p.logits_rows = std::min(p.logits_rows, run.tokens);
    p.training = run.training;
    p.keep_layers = run.training;
    p.recompute = run.recompute;
    if (run.recompute == Recompute::layer || !run.training)
        p.mlp_rows = run.hidden_rows > 0 || run.tokens <= 2 * kHiddenRows ? run.hidden_rows : kHiddenRows;
    const auto from = [&](std::int64_t automatic) {
        return run.attention == AttentionChoice::tree    ? 1
               : run.attention == AttentionChoice::dense ? std::numeric_limits<std::int64_t>::max()
                                                         : automatic;
    };
    p.tree_from = from(tuning::attention_tree_from(cuda));
    p.runs_from = from(tuning::kAttentionRunsFrom);
    p.attention_skip = run.attention_skip;
    p.head_fp8 = run.head_fp8 && cuda && run.training && !spec.samples &&
                 head_fp8_takes(p.tokens, p.logits_rows, spec.vocab, spec.channels);
    return p;
}

template <class T>
void measure(const ModelSpec& spec, RunPlan& run) {
    Arena arena;
    const ParamTable table(spec);
    RunLayout<T>(arena, spec, table, activation_plan(spec, run, std::is_same_v<T, bf16>), run.document_mask,
                 run.micro_batches);
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
      budget_(budget),
      comm_(make_comm(World{})) {
    if (constants_.laplacian.dim == 0) constants_.laplacian = path_laplacian(spec_.head_dim());
    if (constants_.laplacian.dim != spec_.head_dim() ||
        constants_.spectral.size() != static_cast<std::size_t>(std::int64_t(spec_.vocab) * spec_.spectral_columns()))
        throw std::logic_error("runner: the constants are those of another model");
    const auto lay_out = [&] {
        return std::make_unique<RunLayout<T>>(arena_, spec_, table_, activation_plan_, plan_.document_mask,
                                              plan_.micro_batches);
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
        activation_plan_.loss_rows = loss_rows(spec_, activation_plan_, dev_->l2_bytes);
    }
    const std::size_t block_bytes = layout_->step.bytes();
    host_ = std::make_unique<HostMemory<Dev>>(*dev_, kStepsInFlight * (block_bytes + Arena::kAlign));
    for (int i = 0; i < kStepsInFlight; ++i) {
        std::byte* part = host_->data() + static_cast<std::size_t>(i) * (block_bytes + Arena::kAlign);
        slots_[i].block = part;
        slots_[i].result = reinterpret_cast<StepControl<A>*>(part + block_bytes);
    }
    layout_->upload(*dev_, constants_);
    model_ =
        std::make_unique<Model<Dev, T>>(*dev_, spec_, table_, layout_->params, layout_->laplacian(spec_.head_dim()),
                                        layout_->spectral, activation_plan_, *layout_->acts);
}

template <class Dev, class T>
Runner<Dev, T>::~Runner() {
    try {
        synchronize(*dev_);  // unfinished steps read and write host_
    } catch (const DeviceError&) {
    }  // the device has failed: nothing runs on it any more
    model_.reset();
    comm_.reset();
}

template <class Dev, class T>
std::string Runner<Dev, T>::device_name() const {
    return name_of_device(*dev_);
}
template <class Dev, class T>
std::string Runner<Dev, T>::device_kind() const {
    return std::is_same_v<Dev, Cuda> ? "cuda" : "cpu";
}
template <class Dev, class T>
std::size_t Runner<Dev, T>::device_bytes_in_use() {
    return bytes_in_use(*dev_);
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

// The batch as it lies on the device once its arrays are there.
template <class Dev, class T>
DeviceBatch Runner<Dev, T>::placed(const Batch& host, std::int64_t micro_batch) const {
    const auto n = static_cast<std::int64_t>(host.inputs.size());
    if (n > plan_.tokens) throw std::logic_error("runner: more tokens than planned");
    if (!host.offsets.empty() && !plan_.document_mask) throw std::logic_error("runner: no document mask was planned");
    const auto at = layout_->step.tokens(layout_->step_memory, micro_batch);
    DeviceBatch b;
    b.inputs = Vec<const std::int32_t>(at.inputs, n);
    if (!host.targets.empty()) b.targets = Vec<const std::int32_t>(at.targets, n);
    b.seq = host.packed();
    if (!host.offsets.empty()) b.seq.offsets = at.offsets, b.seq.begin = at.begin, b.seq.end = at.end;
    return b;
}

namespace {
// Calls copy(to, from) for each array of the batch.
template <class Tokens, class Copy>
void each_array(const Tokens& to, const Batch& from, const Copy& copy) {
    copy(to.inputs, from.inputs);
    copy(to.targets, from.targets);
    if (from.offsets.empty()) return;
    copy(to.offsets, from.offsets);
    copy(to.begin, from.begin);
    copy(to.end, from.end);
}
}  // namespace

template <class Dev, class T>
void Runner<Dev, T>::place(const Batch& host, std::int64_t micro_batch, void* block) const {
    each_array(layout_->step.tokens(block, micro_batch), host,
               [](std::int32_t* to, const std::vector<std::int32_t>& from) { std::ranges::copy(from, to); });
}

template <class Dev, class T>
DeviceBatch Runner<Dev, T>::upload(const Batch& host) {
    const DeviceBatch b = placed(host, 0);
    each_array(layout_->step.tokens(layout_->step_memory, 0), host,
               [&](std::int32_t* to, const std::vector<std::int32_t>& from) {
                   if (!from.empty()) copy_to_device(*dev_, to, from.data(), from.size() * sizeof(std::int32_t));
               });
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
std::vector<float> Runner<Dev, T>::token_losses(const Batch& host) {
    (void)loss_sum(host);
    std::vector<A> losses(host.inputs.size());
    copy_to_host(*dev_, losses.data(), layout_->acts->scratch().losses.data, losses.size() * sizeof(A));
    return {losses.begin(), losses.end()};
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
void Runner<Dev, T>::read(Block which, float* out) {
    read_block(*dev_, *layout_, which, out);
}
template <class Dev, class T>
void Runner<Dev, T>::write(Block which, const float* in) {
    write_block(*dev_, *layout_, which, in);
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

template <class Dev, class T>
std::unique_ptr<BatchDecoder> Runner<Dev, T>::batch_decoder(const BatchDecoderOptions& asked) {
    BatchDecoderOptions options = asked;
    options.cuda_graph = options.cuda_graph && plan_.cuda_graph;
    std::size_t left = 0;  // 0: not known
    if (budget_ > 0) left = budget_ > arena_.peak() ? budget_ - arena_.peak() : 1;
    if constexpr (std::is_same_v<Dev, Cuda>) {
        std::size_t free_bytes = 0, total = 0;
        memory_info(*dev_, free_bytes, total);
        free_bytes = free_bytes / 20 * 19;  // the recorded step and the libraries take some beside
        left = left > 0 ? std::min(left, free_bytes) : free_bytes;
    }
    return std::make_unique<SlotDecoder<Dev, T>>(*dev_, *model_, layout_->params, options, left);
}

template class StepBlock<float>;
template class StepBlock<double>;
template struct RunLayout<float>;
template struct RunLayout<double>;
template struct RunLayout<bf16>;
FIEDLER_RUNNER_INSTANCES()

}  // namespace fiedler
