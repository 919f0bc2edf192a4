// tests/engine/random_samples.h: batches of random graphs with all that a shape asks for, some of their targets missing.
#pragma once
#include "engine/config.h"
#include "engine/rng.h"
#include "engine/samples.h"

namespace fiedler::test {

inline void per_sample(SampleShape& s, TargetKind kind, std::int32_t outputs) {
    s.level = TargetLevel::sample, s.kind = kind, s.outputs = outputs;
}

// Random numbers in order, as many as are asked for.
struct Draws {
    std::uint64_t seed, at = 0;
    double uniform() { return rng::uniform(seed, 99, at++); }
    double normal() { return rng::normal(seed, 98, at++); }
    std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(uniform() * double(n)); }
};

inline SampleBatch random_batch(const SampleShape& s, const std::vector<std::int32_t>& sizes, std::uint64_t seed) {
    Draws draw{seed};
    SampleBatch b;
    b.edge_offsets = {0};
    if (!s.dense) b.feature_offsets = {0};
    for (std::size_t k = 0; k < sizes.size(); ++k) {
        const std::int32_t n = sizes[k], first = b.offsets.back();
        b.samples.push_back(static_cast<std::int64_t>(k));
        b.offsets.push_back(first + n);
        std::vector<std::vector<int>> type(static_cast<std::size_t>(n),
                                           std::vector<int>(static_cast<std::size_t>(n), -1));
        std::vector<std::vector<float>> weight(static_cast<std::size_t>(n),
                                               std::vector<float>(static_cast<std::size_t>(n)));
        if (s.edge_types > 0)
            for (std::size_t i = 0; i < type.size(); ++i)
                for (std::size_t j = 0; j < i; ++j)
                    if (draw.uniform() < 0.5) {
                        type[i][j] = type[j][i] = static_cast<int>(draw.below(s.edge_types));
                        weight[i][j] = weight[j][i] = static_cast<float>(0.5 + draw.uniform());
                    }
        for (std::size_t i = 0; i < type.size(); ++i) {
            for (std::size_t j = 0; j < type.size(); ++j)
                if (type[i][j] >= 0) {
                    b.edge_columns.push_back(first + static_cast<std::int32_t>(j));
                    b.edge_types.push_back(static_cast<std::uint8_t>(type[i][j]));
                    b.edge_weights.push_back(weight[i][j]);
                }
            b.edge_offsets.push_back(static_cast<std::int32_t>(b.edge_columns.size()));
            for (std::int32_t f = 0; f < s.features; ++f) {
                if (s.dense) b.dense.push_back(static_cast<float>(draw.normal()));
                if (s.dense || draw.uniform() < 0.5) continue;
                b.feature_columns.push_back(f);
                b.feature_values.push_back(static_cast<float>(draw.normal()));
            }
            if (!s.dense) b.feature_offsets.push_back(static_cast<std::int32_t>(b.feature_columns.size()));
            for (std::int64_t j = 0; j < s.spectral_dims; ++j) b.spectral.push_back(static_cast<float>(draw.normal()));
        }
    }
    const std::int64_t rows = s.level == TargetLevel::node ? b.nodes() : b.size();
    for (std::int64_t i = 0; i < rows; ++i) {
        if (s.kind == TargetKind::classes) {
            b.classes.push_back(i % 4 == 1 ? -1 : static_cast<std::int32_t>(draw.below(s.outputs)));
            continue;
        }
        for (std::int32_t k = 0; k < s.outputs; ++k)
            b.targets.push_back((i + k) % 4 == 1               ? kMissing
                                : s.kind == TargetKind::binary ? static_cast<float>(draw.below(2))
                                                               : static_cast<float>(draw.normal()));
        if (s.kind == TargetKind::regression)
            b.row_shift.push_back(static_cast<float>(draw.normal())),
                b.row_scale.push_back(static_cast<float>(1 + draw.uniform()));
    }
    return b;
}

}  // namespace fiedler::test
