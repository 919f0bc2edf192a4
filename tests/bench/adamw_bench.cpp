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
#if FIEDLER_BENCH_CUDA
        p.weights = {suite.zeros<Storage>(n), n};
        const Cast<Storage> cast{p.weights, p.master};
        suite.add("cast " + std::to_string(n), {double(n) * (sizeof(Accum) + sizeof(Storage)), 0},
                  [cast, &suite] { cast_weights(suite.device, cast); });
#endif
        const StepControl<Accum> control{.lr = Accum(1e-3), .decay = Accum(0.1)};
        std::byte* place = suite.zeros<std::byte>(sizeof control);
        copy_to_device(suite.device, place, &control, sizeof control);
        p.control = reinterpret_cast<const StepControl<Accum>*>(place);
        p.decay_count = n - 1024;
        suite.add("step " + std::to_string(n), traffic(p), [p, &suite] { adamw(suite.device, p); });
    }
}

}  // namespace fiedler::bench
