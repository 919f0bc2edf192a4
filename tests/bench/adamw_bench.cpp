// Names: number of parameters.
#include "kernels/adamw.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {

FIEDLER_BENCH(adamw) {
    const std::vector<std::int64_t> sizes =
        suite.small ? std::vector<std::int64_t>{1 << 20} : std::vector<std::int64_t>{1 << 20, 30000000, 124000000};
    for (const std::int64_t n : sizes) {
        Adamw<Storage> p;
        p.master = {suite.random<Accum>(n), n};
        p.m = {suite.zeros<Accum>(n), n};
        p.v = {suite.zeros<Accum>(n), n};
        p.grads = {suite.random<Accum>(n), n};
#if FIEDLER_CUDA
        p.weights = {suite.zeros<Storage>(n), n};
        const Cast<Storage> cast{p.weights, p.master};
        suite.add("cast " + std::to_string(n), {double(n) * (sizeof(Accum) + sizeof(Storage)), 0},
                  [cast, &suite] { cast_weights(suite.device, cast); });
#endif
        p.control = reinterpret_cast<const StepControl<Accum>*>(suite.zeros<Accum>(4));
        p.decay_count = n - 1024;
        p.lr = Accum(1e-3), p.decay = Accum(0.1);
        suite.add("step " + std::to_string(n), traffic(p), [p, &suite] { adamw(suite.device, p); });
    }
}

}  // namespace fiedler::bench
