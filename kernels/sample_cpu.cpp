// kernels/sample_cpu.cpp: the next token on the CPU (see sample.h), by sorting.
#include "kernels/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/parallel.h"

namespace fiedler {
namespace {

// weight in whole numbers; z and largest not NaN
std::uint64_t weight_of(float z, float largest, float inverse_temperature) {
    const float e = std::exp((z - largest) * inverse_temperature);
    return e > 0 ? static_cast<std::uint64_t>(std::nearbyint(std::ldexp(double(e), kSampleWeightBits))) : 0;
}

// The beginning of the order that is kept, as a mark on each token.
template <class P>
void keep(std::vector<std::uint64_t>& weight, const std::vector<float>& z, const P& p) {
    std::vector<std::int32_t> order(z.size());
    std::iota(order.begin(), order.end(), 0);
    const auto likelier = [&](std::int32_t a, std::int32_t b) {
        const float x = z[static_cast<std::size_t>(a)], y = z[static_cast<std::size_t>(b)];
        return x > y || (x == y && a < b);
    };
    std::size_t kept = order.size();
    if (p.top_k > 0) kept = std::min(kept, static_cast<std::size_t>(p.top_k));
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(kept), order.end(), likelier);
    const auto weight_at = [&](std::size_t i) { return weight[static_cast<std::size_t>(order[i])]; };
    if (p.top_p < 1) {
        std::uint64_t sum = 0, reached = 0;
        for (std::size_t i = 0; i < kept; ++i) sum += weight_at(i);
        const auto wanted = static_cast<std::uint64_t>(std::ceil(p.top_p * double(sum)));
        std::size_t n = 0;
        while (n < kept && reached < wanted) reached += weight_at(n++);
        kept = n;
    }
    for (std::size_t i = kept; i < order.size(); ++i) weight[static_cast<std::size_t>(order[i])] = 0;
}

template <class P>
std::int32_t draw(const std::vector<float>& z, const P& p, std::uint64_t seed, std::int32_t position) {
    const auto top = std::max_element(z.begin(), z.end());
    const auto greedy = static_cast<std::int32_t>(top - z.begin());
    if (p.inverse_temperature <= 0) return greedy;
    std::vector<std::uint64_t> weight(z.size());
    for (std::size_t i = 0; i < z.size(); ++i) weight[i] = weight_of(z[i], *top, p.inverse_temperature);
    if (p.top_k > 0 || p.top_p < 1) keep(weight, z, p);
    const std::uint64_t sum = std::accumulate(weight.begin(), weight.end(), std::uint64_t(0));
    __extension__ using Wide = unsigned __int128;
    const std::uint64_t r = rng::bits(seed, rng::kSampleStream, static_cast<std::uint64_t>(position));
    const auto target = static_cast<std::uint64_t>((Wide(r) * sum) >> 64);
    std::uint64_t passed = 0;
    for (std::size_t i = 0; i < z.size(); ++i)
        if ((passed += weight[i]) > target) return static_cast<std::int32_t>(i);
    return greedy;  // no weights
}

}  // namespace

template <class T>
void sample(const Cpu& dev, const Sample<T>& p) {
    check(p);
    parallel_for(dev, p.slots.count(), [&](std::int64_t s) {
        std::int32_t& length = p.slots.length.data[s];
        std::int32_t& sampled = p.sampled.data[s];
        sampled = -1;
        if (length < 0) return;
        std::vector<float> z(p.logits.row(s), p.logits.row(s) + p.logits.cols);
        for (float& x : z)
            if (std::isnan(x)) x = -std::numeric_limits<float>::infinity();
        sampled = draw(z, p, p.slots.seed.data[s], length + 1);
        const bool ends = sampled == p.stop || p.slots.left.data[s] <= 1;
        p.slots.token.data[s] = sampled;
        --p.slots.left.data[s];
        length = ends ? -1 : length + 1;
        p.slots.begin.data[s] = static_cast<std::int32_t>(s) - std::max(length, 0);
    });
}

template void sample(const Cpu&, const Sample<float>&);
template void sample(const Cpu&, const Sample<double>&);

}  // namespace fiedler
