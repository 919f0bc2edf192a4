#include "engine/sample_batch.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "engine/arena.h"
#include "engine/rng.h"
#include "kernels/bag.h"

namespace fiedler {

namespace {

// "feat", "sign", "node"
constexpr std::uint64_t kFeatureStream = 0x66656174, kSignStream = 0x7369676e, kNodeStream = 0x6e6f6465;

std::size_t aligned(std::size_t bytes) { return (bytes + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign; }

[[noreturn]] void misfit(const char* what) {
    throw std::logic_error(std::string("sample_batch: ") + what + " of a batch are not as the model's");
}

// What input dropout leaves in a training step.
struct Kept {
    double of_entry, of_node;  // probabilities of being dropped
    std::uint64_t seed;

    Kept(const SampleModel& m, const SampleDraw& draw)
        : of_entry(draw.training ? m.input_dropout : 0), of_node(draw.training ? m.node_dropout : 0), seed(draw.seed) {}
    bool all() const { return of_entry == 0 && of_node == 0; }
    float scale() const { return static_cast<float>(1 / ((1 - of_entry) * (1 - of_node))); }
    bool entry(std::int64_t i) const {
        return of_entry == 0 || rng::uniform(seed, kFeatureStream, static_cast<std::uint64_t>(i)) >= of_entry;
    }
    bool node(std::int64_t i) const {
        return of_node == 0 || rng::uniform(seed, kNodeStream, static_cast<std::uint64_t>(i)) >= of_node;
    }
};

// The frame of batches that hold at most `most`, with samples enough for nodes of the frame alone: none of them is
// longer than the model's longest.
SampleCapacity frame_of(const ModelSpec& spec, SampleCapacity most) {
    const std::int64_t each = spec.samples->nodes_per_sample;
    if (each > 0) {
        most.nodes = most.nodes / each * each;
        most.samples = most.nodes / each;
    } else {
        most.samples += (most.nodes + spec.context - 1) / spec.context;
    }
    return most;
}

}  // namespace

template <class T>
BatchLayout<T>::BatchLayout(const ModelSpec& spec, const SampleCapacity& most, bool training, bool framed)
    : spec_(spec), most_(most), frame_(framed ? frame_of(spec, most) : most), training_(training), framed_(framed) {
    const SampleModel& m = *spec_.samples;
    const std::int64_t nodes = frame_.nodes, entries = m.dense ? 0 : frame_.feature_entries;
    const std::int64_t rows = m.pool == PoolOf::none ? nodes : frame_.samples;
    place(offsets, frame_.samples + 1, 4), place(begin, nodes, 4), place(end, nodes, 4);
    place(feature_offsets, m.dense ? 0 : nodes + 1, 4), place(feature_columns, entries, 4);
    place(feature_values, entries, 4);
    const bool transposed = training && !m.dense;
    place(by_feature_offsets, transposed ? m.features + 1 : 0, 4);
    place(by_feature_rows, transposed ? entries : 0, 4), place(by_feature_values, transposed ? entries : 0, 4);
    place(dense, m.dense ? nodes * m.feature_columns() : 0, sizeof(T));
    place(spectral, nodes * spec_.spectral_columns(), sizeof(T));
    const std::int64_t edges = spec_.graph_conv() ? frame_.edges + loops() : 0;
    place(edge_offsets, spec_.graph_conv() ? nodes + 1 : 0, 4), place(edge_columns, edges, 4);
    place(edge_types, edges, 1), place(edge_coefficients, edges, 4);
    place(classes, rows, 4), place(targets, rows * m.outputs, 4);
    place(row_shift, rows, 4), place(row_scale, rows, 4);
    place(seed, 1, 8), place(scale, 1, sizeof(A)), place(count, 1, 8);
}

template <class T>
void BatchLayout<T>::place(Array a, std::int64_t elements, std::size_t size) {
    at_[a] = bytes_;
    bytes_ += aligned(static_cast<std::size_t>(elements) * size);
}

template <class T>
std::int64_t BatchLayout<T>::loops() const {
    return spec_.samples->edge_types == 1 ? frame_.nodes : 0;
}

// The smallest frame that holds so many nodes.
template <class T>
std::int64_t BatchLayout<T>::frame_nodes(std::int64_t nodes) const {
    constexpr int kHalvings = 4;
    const std::int64_t each = std::max<std::int64_t>(spec_.samples->nodes_per_sample, 1);
    std::int64_t least = frame_.nodes;
    for (int i = 1; i <= kHalvings; ++i) {
        const std::int64_t part = frame_.nodes >> i, whole = (part + each - 1) / each * each;
        if (whole >= nodes) least = whole;
    }
    return least;
}

// Of the batch as the kernels see it.
template <class T>
SampleCapacity BatchLayout<T>::sizes_of(const PreparedBatch& p) const {
    if (!framed_) return {p.nodes, p.samples, p.edges, p.feature_entries};
    const std::int64_t each = spec_.samples->nodes_per_sample;
    return {p.frame_nodes, each > 0 ? p.frame_nodes / each : frame_.samples, frame_.edges + loops(),
            frame_.feature_entries};
}

template <class T>
void BatchLayout<T>::prepare_packing(const SampleBatch& b, PreparedBatch& p) const {
    const SampleCapacity all = sizes_of(p);
    auto *offset = room<std::int32_t>(p, offsets), *first = room<std::int32_t>(p, begin),
         *last = room<std::int32_t>(p, end);
    std::copy(b.offsets.begin(), b.offsets.end(), offset);
    const std::int64_t each = spec_.samples->nodes_per_sample, longest = each > 0 ? each : spec_.context;
    for (std::int64_t s = p.samples; s < all.samples; ++s)
        offset[s + 1] = static_cast<std::int32_t>(std::min(offset[s] + longest, all.nodes));
    for (std::int64_t s = 0; s < all.samples; ++s) {
        std::fill(first + offset[s], first + offset[s + 1], offset[s]);
        std::fill(last + offset[s], last + offset[s + 1], offset[s + 1]);
    }
}

template <class T>
void BatchLayout<T>::prepare_dense(const SampleBatch& b, const SampleDraw& draw, PreparedBatch& p) const {
    const SampleModel& m = *spec_.samples;
    if (static_cast<std::int64_t>(b.dense.size()) != p.nodes * m.features) misfit("features");
    const Kept kept(m, draw);
    const float factor = kept.scale();
    T* out = room<T>(p, dense);
    const std::int64_t columns = m.feature_columns();
    std::fill_n(out, sizes_of(p).nodes * columns, T(0.f));
    for (std::int64_t i = 0; i < p.nodes; ++i)
        for (std::int64_t j = 0; j < m.features && kept.node(i); ++j)
            if (const std::int64_t at = i * m.features + j; kept.entry(at))
                out[i * columns + j] = T(b.dense[static_cast<std::size_t>(at)] * factor);
}

template <class T>
void BatchLayout<T>::prepare_features(const SampleBatch& b, const SampleDraw& draw, PreparedBatch& p) const {
    if (static_cast<std::int64_t>(b.feature_offsets.size()) != p.nodes + 1) misfit("features");
    const Kept kept(*spec_.samples, draw);
    auto *offset = room<std::int32_t>(p, feature_offsets), *column = room<std::int32_t>(p, feature_columns);
    if (kept.all()) {
        std::copy(b.feature_offsets.begin(), b.feature_offsets.end(), offset);
        std::copy(b.feature_columns.begin(), b.feature_columns.end(), column);
        if (!b.feature_values.empty())
            std::copy(b.feature_values.begin(), b.feature_values.end(), room<float>(p, feature_values));
    } else {
        auto* value = room<float>(p, feature_values);
        const float factor = kept.scale();
        std::int32_t n = 0;
        offset[0] = 0;
        for (std::int64_t i = 0; i < p.nodes; ++i) {
            const bool any = kept.node(i);
            for (std::int64_t e = b.feature_offsets[static_cast<std::size_t>(i)];
                 e < b.feature_offsets[static_cast<std::size_t>(i) + 1] && any; ++e)
                if (kept.entry(e)) {
                    const auto at = static_cast<std::size_t>(e);
                    column[n] = b.feature_columns[at];
                    value[n++] = factor * (b.feature_values.empty() ? 1.f : b.feature_values[at]);
                }
            offset[i + 1] = n;
        }
    }
    p.feature_entries = offset[p.nodes];
    std::fill(offset + p.nodes, offset + sizes_of(p).nodes + 1, offset[p.nodes]);
    if (draw.training) transpose_features(p);
}

template <class T>
void BatchLayout<T>::transpose_features(PreparedBatch& p) const {
    const std::int64_t features = spec_.samples->features, entries = p.feature_entries;
    const bool valued = (p.arrays >> feature_values & 1u) != 0;
    BagTransposedTo to;
    to.offsets = {room<std::int32_t>(p, by_feature_offsets), features + 1};
    to.rows = {room<std::int32_t>(p, by_feature_rows), entries};
    if (valued) to.values = {room<float>(p, by_feature_values), entries};
    bag_transpose(to, {room<std::int32_t>(p, feature_offsets), p.nodes + 1},
                  {room<std::int32_t>(p, feature_columns), entries},
                  valued ? Vec<const float>(room<float>(p, feature_values), entries) : Vec<const float>());
}

template <class T>
void BatchLayout<T>::prepare_edges(const SampleBatch& b, PreparedBatch& p) const {
    const auto n = static_cast<std::size_t>(p.nodes);
    if (b.edge_offsets.size() != n + 1) misfit("edges");
    const bool looped = spec_.samples->edge_types == 1;
    const auto weight = [&](std::size_t e) { return b.edge_weights.empty() ? 1.0 : double(b.edge_weights[e]); };
    const auto first = [&](std::size_t i) { return static_cast<std::size_t>(b.edge_offsets[i]); };
    p.roots.resize(n);  // 1 / sqrt(d_i)
    for (std::size_t i = 0; i < n; ++i) {
        double degree = looped ? 1 : 0;
        for (std::size_t e = first(i); e < first(i + 1); ++e) degree += weight(e);
        p.roots[i] = degree > 0 ? 1 / std::sqrt(degree) : 0;
    }
    auto *offset = room<std::int32_t>(p, edge_offsets), *column = room<std::int32_t>(p, edge_columns);
    auto* coefficient = room<float>(p, edge_coefficients);
    std::int32_t entries = 0;
    const auto add = [&](std::size_t i, std::int32_t to, double w) {
        column[entries] = to;
        coefficient[entries++] = static_cast<float>(w * p.roots[i] * p.roots[static_cast<std::size_t>(to)]);
    };
    offset[0] = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto self = static_cast<std::int32_t>(i);
        std::size_t e = first(i);
        for (; e < first(i + 1) && (!looped || b.edge_columns[e] <= self); ++e) add(i, b.edge_columns[e], weight(e));
        if (looped) add(i, self, 1);
        for (; e < first(i + 1); ++e) add(i, b.edge_columns[e], weight(e));
        offset[i + 1] = entries;
    }
    if (!looped && !b.edge_types.empty())
        std::copy(b.edge_types.begin(), b.edge_types.end(), room<std::uint8_t>(p, edge_types));
    p.edges = entries;
    std::fill(offset + p.nodes, offset + sizes_of(p).nodes + 1, entries);
}

template <class T>
void BatchLayout<T>::prepare_spectral(const SampleBatch& b, const SampleDraw& draw, PreparedBatch& p) const {
    const auto k = static_cast<std::size_t>(spec_.spectral_dims);
    const auto columns = static_cast<std::size_t>(spec_.spectral_columns());
    if (b.spectral.size() != static_cast<std::size_t>(p.nodes) * k) misfit("spectral embeddings");
    const bool flips = draw.training && !b.fixed_signs;
    std::vector<float> sign(k, 1.f);
    const float* u = b.spectral.data();
    T* out = room<T>(p, spectral);
    for (std::size_t s = 0; s < b.samples.size(); ++s) {
        for (std::size_t j = 0; j < k && flips; ++j)
            sign[j] = rng::bits(draw.seed, kSignStream, s * k + j) & 1 ? -1.f : 1.f;
        for (std::int32_t i = b.offsets[s]; i < b.offsets[s + 1]; ++i, u += k, out += columns) {
            for (std::size_t j = 0; j < k; ++j) out[j] = T(sign[j] * u[j]);
            std::fill(out + k, out + columns, T(0.f));
        }
    }
    std::fill_n(out, static_cast<std::size_t>(sizes_of(p).nodes - p.nodes) * columns, T(0.f));
}

template <class T>
void BatchLayout<T>::prepare_targets(const SampleBatch& b, PreparedBatch& p) const {
    const SampleModel& m = *spec_.samples;
    const SampleCapacity sizes = sizes_of(p);
    const std::int64_t all = m.pool == PoolOf::none ? sizes.nodes : sizes.samples;
    p.rows = m.pool == PoolOf::none ? p.nodes : p.samples;
    const bool of_classes = m.kind == TargetKind::classes;
    if (of_classes ? !b.targets.empty() : !b.classes.empty()) misfit("targets");
    // fill: what the rows hold that only fill the frame
    const auto put = [&]<class U>(const std::vector<U>& from, Array a, std::int64_t width, U fill, const char* what) {
        if (from.empty()) return;
        if (static_cast<std::int64_t>(from.size()) != p.rows * width) misfit(what);
        U* to = room<U>(p, a);
        std::fill(std::copy(from.begin(), from.end(), to), to + all * width, fill);
    };
    put(b.classes, classes, 1, -1, "classes");
    put(b.targets, targets, m.outputs, kMissing, "targets");
    put(b.row_shift, row_shift, 1, 0.f, "row normalisations");
    put(b.row_scale, row_scale, 1, 1.f, "row normalisations");
    p.known = of_classes ? std::count_if(b.classes.begin(), b.classes.end(), [](std::int32_t c) { return c >= 0; })
                         : std::count_if(b.targets.begin(), b.targets.end(), [](float t) { return !std::isnan(t); });
}

template <class T>
void BatchLayout<T>::prepare(const SampleBatch& b, const SampleDraw& draw, PreparedBatch& p) const {
    if (draw.training && !training_) throw std::logic_error("sample_batch: planned without training");
    p.nodes = b.nodes(), p.samples = b.size(), p.edges = static_cast<std::int64_t>(b.edge_columns.size());
    p.feature_entries = static_cast<std::int64_t>(b.feature_columns.size());
    p.arrays = 0;
    if (p.nodes > most_.nodes || p.samples > most_.samples || p.edges > most_.edges ||
        p.feature_entries > most_.feature_entries)
        throw std::logic_error("sample_batch: a larger batch than planned");
    p.frame_nodes = framed_ ? frame_nodes(p.nodes) : 0;
    prepare_packing(b, p);
    if (spec_.samples->dense)
        prepare_dense(b, draw, p);
    else
        prepare_features(b, draw, p);
    if (spec_.graph_conv()) prepare_edges(b, p);
    if (spec_.spectral_dims > 0) prepare_spectral(b, draw, p);
    prepare_targets(b, p);
    if (draw.training) *room<std::uint64_t>(p, seed) = draw.seed;
    *room<A>(p, scale) = p.known > 0 ? A(1 / double(p.known)) : A(0);
    *room<std::int64_t>(p, count) = 0;
}

template <class T>
DeviceBatch BatchLayout<T>::at(const PreparedBatch& p, std::byte* base, DeviceSamples& d) const {
    const SampleModel& m = *spec_.samples;
    const SampleCapacity all = sizes_of(p);
    const std::int64_t rows = m.pool == PoolOf::none ? all.nodes : all.samples;
    const auto vec = [&]<class U>(U, Array a, std::int64_t size) {
        if ((p.arrays >> a & 1u) == 0) return Vec<const U>();
        return Vec<const U>(reinterpret_cast<const U*>(base + at_[a]), size);
    };
    constexpr std::int32_t kInt = 0;
    constexpr float kFloat = 0;
    DeviceBatch b;
    b.seq.tokens = static_cast<std::int32_t>(all.nodes);
    b.seq.count = static_cast<std::int32_t>(all.samples);
    b.seq.offsets = vec(kInt, offsets, all.samples + 1).data;
    b.seq.begin = vec(kInt, begin, all.nodes).data, b.seq.end = vec(kInt, end, all.nodes).data;
    d = DeviceSamples{};
    d.feature_offsets = vec(kInt, feature_offsets, all.nodes + 1);
    d.feature_columns = vec(kInt, feature_columns, all.feature_entries);
    d.feature_values = vec(kFloat, feature_values, all.feature_entries);
    d.by_feature_offsets = vec(kInt, by_feature_offsets, m.features + 1);
    d.feature_nodes = vec(kInt, by_feature_rows, all.feature_entries);
    d.by_feature_values = vec(kFloat, by_feature_values, all.feature_entries);
    d.dense = vec(T(), dense, 0).data, d.spectral = vec(T(), spectral, 0).data;
    d.graph.offsets = vec(kInt, edge_offsets, all.nodes + 1);
    d.graph.columns = vec(kInt, edge_columns, all.edges);
    d.graph.types = vec(std::uint8_t(), edge_types, all.edges);
    d.graph.coefficients = vec(kFloat, edge_coefficients, all.edges);
    d.classes = vec(kInt, classes, rows);
    if (const auto t = vec(kFloat, targets, rows)) d.targets = {t.data, rows, m.outputs};
    d.row_shift = vec(kFloat, row_shift, rows), d.row_scale = vec(kFloat, row_scale, rows);
    d.seed = vec(std::uint64_t(), seed, 1);
    d.scale = vec(A(), scale, 1).data;
    d.count = {reinterpret_cast<std::int64_t*>(base + at_[count]), 1};
    b.samples = &d;
    return b;
}

template class BatchLayout<float>;
template class BatchLayout<double>;
template class BatchLayout<bf16>;

}  // namespace fiedler
