#include "engine/sample_batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "engine/arena.h"
#include "engine/rng.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {

// "feat", "sign", "node"
constexpr std::uint64_t kFeatureStream = 0x66656174, kSignStream = 0x7369676e, kNodeStream = 0x6e6f6465;

std::size_t aligned(std::size_t bytes) { return (bytes + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign; }

[[noreturn]] void misfit(const char* what) {
    throw std::logic_error(std::string("sample_batch: ") + what + " of a batch are not as the model's");
}

}  // namespace

template <class T>
void PreparedSamples<T>::prepare_packing(const SampleBatch& b) {
    const auto n = static_cast<std::size_t>(b.nodes());
    offsets_ = b.offsets;
    begin_.resize(n), end_.resize(n);
    for (std::size_t s = 0; s + 1 < offsets_.size(); ++s) {
        std::fill(begin_.begin() + offsets_[s], begin_.begin() + offsets_[s + 1], offsets_[s]);
        std::fill(end_.begin() + offsets_[s], end_.begin() + offsets_[s + 1], offsets_[s + 1]);
    }
}

template <class T>
void PreparedSamples<T>::prepare_features(const SampleBatch& b, const ModelSpec& spec, const SampleDraw& draw) {
    const SampleModel& m = *spec.samples;
    const std::int64_t n = b.nodes();
    const double p = draw.training ? m.input_dropout : 0, of_node = draw.training ? m.node_dropout : 0;
    const auto scale = static_cast<float>(1 / ((1 - p) * (1 - of_node)));
    const auto kept = [&](std::int64_t i) {
        return p == 0 || rng::uniform(draw.seed, kFeatureStream, static_cast<std::uint64_t>(i)) >= p;
    };
    const auto kept_node = [&](std::int64_t i) {
        return of_node == 0 || rng::uniform(draw.seed, kNodeStream, static_cast<std::uint64_t>(i)) >= of_node;
    };
    feature_offsets_.clear(), feature_columns_.clear(), feature_values_.clear(), dense_.clear();
    by_feature_.offsets.clear(), by_feature_.rows.clear(), by_feature_.values.clear();
    if (m.dense) {
        if (static_cast<std::int64_t>(b.dense.size()) != n * m.features) misfit("features");
        const std::int64_t columns = m.feature_columns();
        dense_.assign(static_cast<std::size_t>(n * columns), T(0.f));
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < m.features && kept_node(i); ++j)
                if (const std::int64_t at = i * m.features + j; kept(at))
                    dense_[static_cast<std::size_t>(i * columns + j)] =
                        T(b.dense[static_cast<std::size_t>(at)] * scale);
        return;
    }
    if (static_cast<std::int64_t>(b.feature_offsets.size()) != n + 1) misfit("features");
    if (p == 0 && of_node == 0) {
        feature_offsets_ = b.feature_offsets, feature_columns_ = b.feature_columns, feature_values_ = b.feature_values;
    } else {
        feature_offsets_.push_back(0);
        for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
            const bool any = kept_node(static_cast<std::int64_t>(i));
            for (std::int32_t e = b.feature_offsets[i]; e < b.feature_offsets[i + 1] && any; ++e)
                if (kept(e)) {
                    const auto at = static_cast<std::size_t>(e);
                    feature_columns_.push_back(b.feature_columns[at]);
                    feature_values_.push_back(scale * (b.feature_values.empty() ? 1.f : b.feature_values[at]));
                }
            feature_offsets_.push_back(static_cast<std::int32_t>(feature_columns_.size()));
        }
    }
    if (!draw.training) return;
    const auto view = [](const auto& v) {
        return Vec<const typename std::decay_t<decltype(v)>::value_type>(v.data(), static_cast<std::int64_t>(v.size()));
    };
    bag_transpose(by_feature_, view(feature_offsets_), view(feature_columns_),
                  feature_values_.empty() ? Vec<const float>() : view(feature_values_), m.features);
}

template <class T>
void PreparedSamples<T>::prepare_edges(const SampleBatch& b, const ModelSpec& spec) {
    edge_offsets_.clear(), edge_columns_.clear(), edge_types_.clear(), coefficients_.clear();
    edges_ = static_cast<std::int64_t>(b.edge_columns.size());
    if (!spec.graph_conv()) return;
    const auto n = static_cast<std::size_t>(b.nodes());
    if (b.edge_offsets.size() != n + 1) misfit("edges");
    const bool loops = spec.samples->edge_types == 1;
    const auto weight = [&](std::size_t e) { return b.edge_weights.empty() ? 1.0 : double(b.edge_weights[e]); };
    std::vector<double> root(n);  // 1 / sqrt(d_i)
    for (std::size_t i = 0; i < n; ++i) {
        double degree = loops ? 1 : 0;
        for (auto e = static_cast<std::size_t>(b.edge_offsets[i]); e < static_cast<std::size_t>(b.edge_offsets[i + 1]);
             ++e)
            degree += weight(e);
        root[i] = degree > 0 ? 1 / std::sqrt(degree) : 0;
    }
    const auto add = [&](std::size_t i, std::int32_t column, double w) {
        edge_columns_.push_back(column);
        coefficients_.push_back(static_cast<float>(w * root[i] * root[static_cast<std::size_t>(column)]));
    };
    if (!loops) edge_types_ = b.edge_types;
    edge_offsets_.push_back(0);
    for (std::size_t i = 0; i < n; ++i) {
        bool looped = !loops;
        for (auto e = static_cast<std::size_t>(b.edge_offsets[i]); e < static_cast<std::size_t>(b.edge_offsets[i + 1]);
             ++e) {
            if (!looped && b.edge_columns[e] > static_cast<std::int32_t>(i)) {
                add(i, static_cast<std::int32_t>(i), 1);
                looped = true;
            }
            add(i, b.edge_columns[e], weight(e));
        }
        if (!looped) add(i, static_cast<std::int32_t>(i), 1);
        edge_offsets_.push_back(static_cast<std::int32_t>(edge_columns_.size()));
    }
}

template <class T>
void PreparedSamples<T>::prepare_targets(const SampleBatch& b, const ModelSpec& spec) {
    const SampleModel& m = *spec.samples;
    rows_ = m.pool == PoolOf::none ? b.nodes() : b.size();
    classes_ = b.classes, targets_ = b.targets, row_shift_ = b.row_shift, row_scale_ = b.row_scale;
    const bool of_classes = m.kind == TargetKind::classes;
    if (of_classes ? !targets_.empty() : !classes_.empty()) misfit("targets");
    if (!classes_.empty() && static_cast<std::int64_t>(classes_.size()) != rows_) misfit("classes");
    if (!targets_.empty() && static_cast<std::int64_t>(targets_.size()) != rows_ * m.outputs) misfit("targets");
    for (const auto* v : {&row_shift_, &row_scale_})
        if (!v->empty() && static_cast<std::int64_t>(v->size()) != rows_) misfit("row normalisations");
    known_ = of_classes ? std::count_if(classes_.begin(), classes_.end(), [](std::int32_t c) { return c >= 0; })
                        : std::count_if(targets_.begin(), targets_.end(), [](float t) { return !std::isnan(t); });
}

template <class T>
void PreparedSamples<T>::prepare(const SampleBatch& b, const ModelSpec& spec, const SampleDraw& draw) {
    prepare_packing(b);
    prepare_features(b, spec, draw);
    prepare_edges(b, spec);
    prepare_targets(b, spec);
    count_.assign(1, 0);
    seed_.clear();
    if (draw.training) seed_.push_back(draw.seed);
    spectral_.clear();
    const std::int64_t k = spec.spectral_dims, padded = spec.spectral_columns();
    if (k == 0) return;
    if (static_cast<std::int64_t>(b.spectral.size()) != b.nodes() * k) misfit("spectral embeddings");
    spectral_.assign(static_cast<std::size_t>(b.nodes() * padded), T(0.f));
    for (std::int64_t s = 0; s < b.size(); ++s)
        for (std::int64_t j = 0; j < k; ++j) {
            const bool flip = draw.training && !b.fixed_signs &&
                              rng::bits(draw.seed, kSignStream, static_cast<std::uint64_t>(s * k + j)) & 1;
            for (std::int64_t i = offsets_[static_cast<std::size_t>(s)]; i < offsets_[static_cast<std::size_t>(s) + 1];
                 ++i) {
                const float u = b.spectral[static_cast<std::size_t>(i * k + j)];
                spectral_[static_cast<std::size_t>(i * padded + j)] = T(flip ? -u : u);
            }
        }
}

// The order of the arrays in a block; empty ones take no room.
template <class T>
template <class Visit>
void PreparedSamples<T>::each_array(const Visit& visit) const {
    visit(offsets_), visit(begin_), visit(end_);
    visit(feature_offsets_), visit(feature_columns_), visit(feature_values_);
    visit(by_feature_.offsets), visit(by_feature_.rows), visit(by_feature_.values);
    visit(dense_), visit(spectral_);
    visit(edge_offsets_), visit(edge_columns_), visit(edge_types_), visit(coefficients_);
    visit(classes_), visit(targets_), visit(row_shift_), visit(row_scale_);
    visit(seed_), visit(count_);
}

template <class T>
std::size_t PreparedSamples<T>::bytes() const {
    std::size_t total = 0;
    each_array([&](const auto& v) { total += aligned(v.size() * sizeof(v[0])); });
    return total;
}

template <class T>
void PreparedSamples<T>::copy_to(std::byte* block) const {
    each_array([&](const auto& v) {
        if (!v.empty()) std::memcpy(block, v.data(), v.size() * sizeof(v[0]));
        block += aligned(v.size() * sizeof(v[0]));
    });
}

template <class T>
DeviceBatch PreparedSamples<T>::at(std::byte* base, const ModelSpec& spec, DeviceSamples& d) const {
    std::vector<std::byte*> place;
    each_array([&](const auto& v) {
        place.push_back(v.empty() ? nullptr : base);
        base += aligned(v.size() * sizeof(v[0]));
    });
    std::size_t i = 0;
    const auto vec = [&]<class U>(const std::vector<U>& v) {
        return Vec<const U>(reinterpret_cast<const U*>(place[i++]), static_cast<std::int64_t>(v.size()));
    };
    DeviceBatch b;
    b.seq.tokens = static_cast<std::int32_t>(nodes());
    b.seq.count = static_cast<std::int32_t>(samples());
    b.seq.offsets = vec(offsets_).data, b.seq.begin = vec(begin_).data, b.seq.end = vec(end_).data;
    d = DeviceSamples{};
    d.feature_offsets = vec(feature_offsets_), d.feature_columns = vec(feature_columns_);
    d.feature_values = vec(feature_values_);
    d.by_feature_offsets = vec(by_feature_.offsets), d.feature_nodes = vec(by_feature_.rows);
    d.by_feature_values = vec(by_feature_.values);
    d.dense = vec(dense_).data, d.spectral = vec(spectral_).data;
    d.graph.offsets = vec(edge_offsets_), d.graph.columns = vec(edge_columns_);
    d.graph.types = vec(edge_types_), d.graph.coefficients = vec(coefficients_);
    d.classes = vec(classes_);
    if (const auto targets = vec(targets_)) d.targets = {targets.data, rows_, spec.samples->outputs};
    d.row_shift = vec(row_shift_), d.row_scale = vec(row_scale_);
    d.seed = vec(seed_);
    d.count = Vec<std::int64_t>(reinterpret_cast<std::int64_t*>(place[i]), 1);
    b.samples = &d;
    return b;
}

template <class T>
std::size_t PreparedSamples<T>::most_bytes(const ModelSpec& spec, const SampleCapacity& most, bool training) {
    const SampleModel& m = *spec.samples;
    std::size_t total = 0;
    const auto array = [&](std::int64_t elements, std::size_t size) {
        total += aligned(static_cast<std::size_t>(elements) * size);
    };
    const std::int64_t rows = m.pool == PoolOf::none ? most.nodes : most.samples;
    array(most.samples + 1, 4), array(most.nodes, 4), array(most.nodes, 4);
    if (m.dense) {
        array(most.nodes * m.feature_columns(), sizeof(T));
    } else {
        array(most.nodes + 1, 4), array(most.feature_entries, 4), array(most.feature_entries, 4);
        if (training) array(m.features + 1, 4), array(most.feature_entries, 4), array(most.feature_entries, 4);
    }
    array(most.nodes * spec.spectral_columns(), sizeof(T));
    if (spec.graph_conv()) {
        const std::int64_t edges = most.edges + (m.edge_types == 1 ? most.nodes : 0);
        array(most.nodes + 1, 4), array(edges, 4), array(edges, 1), array(edges, 4);
    }
    array(rows, 4), array(rows * m.outputs, 4), array(rows, 4), array(rows, 4);
    array(1, 8), array(1, 8);
    return total;
}

template class PreparedSamples<float>;
template class PreparedSamples<double>;
template class PreparedSamples<bf16>;

}  // namespace fiedler
