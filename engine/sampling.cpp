#include "engine/sampling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/rng.h"

namespace fiedler {

std::int32_t sample(const std::vector<float>& logits, const SamplingSettings& settings, std::uint64_t position) {
    if (settings.temperature <= 0)
        return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    std::vector<std::int32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    const auto likelier = [&](std::int32_t a, std::int32_t b) {
        const float x = logits[static_cast<std::size_t>(a)], y = logits[static_cast<std::size_t>(b)];
        return x > y || (x == y && a < b);
    };
    std::size_t kept = order.size();
    if (settings.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(settings.top_k));
    if (kept < order.size() || settings.top_p < 1)
        std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(), likelier);
    const double highest = *std::max_element(logits.begin(), logits.end());
    std::vector<double> weight(kept);
    double sum = 0;
    for (std::size_t i = 0; i < kept; ++i)
        sum += weight[i] = std::exp((logits[static_cast<std::size_t>(order[i])] - highest) / settings.temperature);
    if (settings.top_p < 1) {
        double reached = 0;
        std::size_t n = 0;
        while (n < kept && reached < settings.top_p * sum) reached += weight[n++];
        kept = std::max<std::size_t>(n, 1);
        sum = std::accumulate(weight.begin(), weight.begin() + static_cast<std::ptrdiff_t>(kept), 0.0);
    }
    double left = rng::uniform(settings.seed, rng::kSampleStream, position) * sum;
    for (std::size_t i = 0; i < kept; ++i)
        if ((left -= weight[i]) < 0) return order[i];
    return order[kept - 1];  // rounding: left is not below zero after the last weight
}

}  // namespace fiedler
