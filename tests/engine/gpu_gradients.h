// tests/engine/gpu_gradients.h: loss and gradients of a whole model held against the double reference: they may be twice as
// far from it as the model whose outputs are rounded to bf16 where the GPU's are (tests/support/rounding_cpu.h).
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/params.h"
#include "kernels/dtype.h"
#include "tests/support/buffer.h"
#include "tests/support/compare.h"

namespace fiedler::test {

struct LossAndGradients {
    double loss = 0;
    std::vector<float> gradients;
};
constexpr std::uint32_t kEvaluations = 16;  // of the rounded model, each with a dither of its own

// Initial values moved off 0 and 1, exactly representable in bf16: CPU and GPU start from the same weights.
inline std::vector<float> start_in_bf16(const ParamTable& table, const ModelSpec& spec) {
    std::vector<float> w(static_cast<std::size_t>(table.elements));
    initialise(table, spec, 5, w.data());
    const Values noise = random_values(w.size(), 11, 0.05);
    for (const ParamTensor& t : table.tensor)
        for (std::int64_t i = t.offset; i < t.offset + t.size(); ++i) {
            auto& x = w[static_cast<std::size_t>(i)];
            x = float(bf16(x + static_cast<float>(noise[static_cast<std::size_t>(i)])));
        }
    return w;
}

inline void expect_as_near(const ParamTable& table, double want_loss, const std::vector<double>& want,
                           const std::vector<LossAndGradients>& low, const LossAndGradients& got) {
    double low_error = 0, largest = 0;
    for (const LossAndGradients& e : low) low_error = std::max(low_error, std::abs(e.loss - want_loss));
    for (const double g : want) largest = std::max(largest, std::abs(g));
    EXPECT_LE(std::abs(got.loss - want_loss), 2 * low_error + 1e-6 * want_loss);
    for (const ParamTensor& t : table.tensor) {
        if (t.group == Group::frozen) continue;
        SCOPED_TRACE(t.name);
        const auto part = [&](const auto& block) {
            return Values(block.begin() + t.offset, block.begin() + t.offset + t.size());
        };
        Error allowed;
        for (const LossAndGradients& evaluation : low) {
            const Error e = measure(part(evaluation.gradients), part(want));
            ASSERT_EQ(e.nonfinite, 0u);
            allowed.max = std::max(allowed.max, e.max);
            allowed.rms = std::max(allowed.rms, e.rms);
        }
        // Gradients that vanish identically (one token alone) leave the rounding of f32 sums at the others' scale.
        const double floor = 1e-6 * largest;
        const Error e = measure(part(got.gradients), part(want));
        ASSERT_GT(e.count, 0u);
        EXPECT_EQ(e.nonfinite, 0u);
        EXPECT_LE(e.max, 2 * allowed.max + floor) << "worst at " << e.worst << ", scale " << e.scale;
        EXPECT_LE(e.rms, 2 * allowed.rms + floor) << "scale " << e.scale;
    }
}

}  // namespace fiedler::test
