// Names: number of gradients.
#include "kernels/gradnorm.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {

FIEDLER_BENCH(gradnorm) {
    const std::vector<std::int64_t> sizes =
        suite.small ? std::vector<std::int64_t>{1 << 20} : std::vector<std::int64_t>{1 << 20, 30000000, 124000000};
    for (const std::int64_t n : sizes) {
        Gradnorm<Accum> p;
        p.control = reinterpret_cast<StepControl<Accum>*>(suite.zeros<std::byte>(sizeof(StepControl<Accum>)));
        p.grads = Vec<const Accum>(suite.random<Accum>(n), n);
#if FIEDLER_BENCH_CUDA
        p.partials = Vec<Accum>(suite.zeros<Accum>(kGradnormPartials), kGradnormPartials);
#endif
        suite.add(std::to_string(n), traffic(p), [p, &suite] { gradnorm(suite.device, p); });
        suite.cases.back().only_reads = true;
    }
}

}  // namespace fiedler::bench
