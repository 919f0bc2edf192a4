#include "tests/support/compare.h"

#include <cstring>

namespace fiedler::test {

Error measure(const Values& got, const Values& ref) {
    Error e;
    e.count = got.size();
    double sum = 0;
    for (std::size_t i = 0; i < got.size() && i < ref.size(); ++i) {
        if (!std::isfinite(got[i]) || !std::isfinite(ref[i])) {
            ++e.nonfinite;
            continue;
        }
        const double d = std::abs(got[i] - ref[i]);
        if (d > e.max) e.max = d, e.worst = i;
        sum += d * d;
        e.scale = std::max(e.scale, std::abs(ref[i]));
    }
    e.rms = e.count ? std::sqrt(sum / double(e.count)) : 0;
    return e;
}

namespace {
testing::AssertionResult comparable(const Values& got, const Values& ref, const Error& e) {
    if (got.empty() || ref.empty()) return testing::AssertionFailure() << "nothing was compared";
    if (got.size() != ref.size())
        return testing::AssertionFailure() << "lengths differ: " << got.size() << " and " << ref.size();
    if (e.nonfinite) return testing::AssertionFailure() << e.nonfinite << " of " << e.count << " values are not finite";
    return testing::AssertionSuccess();
}
}  // namespace

testing::AssertionResult close(const Values& got, const Values& ref, const Values& low, double ulp) {
    const Error e = measure(got, ref), l = measure(low, ref);
    if (auto r = comparable(got, ref, e); !r) return r;
    if (auto r = comparable(low, ref, l); !r) return r << " (in the low-precision reference)";
    const double max_bound = 2 * l.max + 8 * ulp * e.scale, rms_bound = 2 * l.rms + 2 * ulp * e.scale;
    if (e.max <= max_bound && e.rms <= rms_bound) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "largest error " << e.max << " (allowed " << max_bound << "), rms " << e.rms
                                       << " (allowed " << rms_bound << "), scale " << e.scale << "; worst at "
                                       << e.worst << " of " << e.count << ": got " << got[e.worst] << ", reference "
                                       << ref[e.worst];
}

testing::AssertionResult close_to(const Values& got, const Values& ref, double tolerance) {
    const Error e = measure(got, ref);
    if (auto r = comparable(got, ref, e); !r) return r;
    if (e.max <= tolerance * std::max(e.scale, 1e-300)) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "largest error " << e.max << " at scale " << e.scale << " (relative "
                                       << e.max / e.scale << ", allowed " << tolerance << "); worst at " << e.worst
                                       << " of " << e.count << ": got " << got[e.worst] << ", reference "
                                       << ref[e.worst];
}

testing::AssertionResult identical(const void* a, const void* b, std::size_t bytes) {
    if (bytes == 0) return testing::AssertionFailure() << "nothing was compared";
    if (std::memcmp(a, b, bytes) == 0) return testing::AssertionSuccess();
    const auto *x = static_cast<const unsigned char*>(a), *y = static_cast<const unsigned char*>(b);
    std::size_t i = 0;
    while (x[i] == y[i]) ++i;
    return testing::AssertionFailure() << "first difference at byte " << i << " of " << bytes;
}

Values random_values(std::size_t n, std::uint64_t seed, double scale) {
    std::mt19937_64 g(seed);
    std::normal_distribution<double> d(0, scale);
    Values v(n);
    for (double& x : v) x = d(g);
    return v;
}
Values random_uniform(std::size_t n, std::uint64_t seed, double lo, double hi) {
    std::mt19937_64 g(seed);
    std::uniform_real_distribution<double> d(lo, hi);
    Values v(n);
    for (double& x : v) x = d(g);
    return v;
}
std::vector<std::int32_t> random_ints(std::size_t n, std::uint64_t seed, std::int32_t lo, std::int32_t hi) {
    std::mt19937_64 g(seed);
    std::uniform_int_distribution<std::int32_t> d(lo, hi - 1);
    std::vector<std::int32_t> v(n);
    for (auto& x : v) x = d(g);
    return v;
}

}  // namespace fiedler::test
