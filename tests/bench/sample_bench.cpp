// Names: how slots x vocabulary.
#include "kernels/sample.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_sample(Suite& s, const std::string& how, std::int64_t slots, std::int64_t vocab, float inverse_temperature,
                std::int64_t top_k, double top_p) {
    Sample<Storage> p;
    const auto ints = [&] { return Vec<std::int32_t>(s.zeros<std::int32_t>(slots), slots); };
    // Lengths of 0 and nothing left: every run ends all sequences, so the lengths are put back before each.
    const Vec<std::int32_t> length = ints(), zeros = ints();
    p.slots = {ints(), length, ints(), ints(), {reinterpret_cast<std::uint64_t*>(s.zeros<Accum>(4 * slots)), slots}};
    p.sampled = ints();
    p.logits = Mat<const Storage>(s.random<Storage>(slots * vocab, 3.0), slots, vocab);
    p.inverse_temperature = inverse_temperature, p.top_k = top_k, p.top_p = top_p;
    s.add(how + " " + std::to_string(slots) + "x" + std::to_string(vocab), traffic(p), [p, length, zeros, &s] {
        copy_on_device(s.device, length.data, zeros.data, std::size_t(length.size) * sizeof(std::int32_t));
        sample(s.device, p);
    });
}

}  // namespace

FIEDLER_BENCH(sample) {
    const std::int64_t vocab = suite.small ? 1024 : 16384;
    for (const std::int64_t slots : suite.small ? std::vector<std::int64_t>{4} : std::vector<std::int64_t>{1, 256}) {
        add_sample(suite, "greedy", slots, vocab, 0, 0, 1);
        add_sample(suite, "all", slots, vocab, 1.25f, 0, 1);
        add_sample(suite, "top-k 40", slots, vocab, 1.25f, 40, 1);
        add_sample(suite, "top-p 0.9", slots, vocab, 1.25f, 0, 0.9);
    }
}

}  // namespace fiedler::bench
