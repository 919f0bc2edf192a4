// Names: direction tokens x hidden.
#include "kernels/mlp.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {

FIEDLER_BENCH(mlp) {
    const std::int64_t tokens = suite.small ? 1024 : 32768;
    for (const std::int64_t hidden : {std::int64_t(1536), std::int64_t(2048)}) {
        const std::int64_t n = tokens * hidden;
        const std::string shape = std::to_string(tokens) + "x" + std::to_string(hidden);
        const Vec<const Storage> u(suite.random<Storage>(n), n), dh(suite.random<Storage>(n), n);
        const Vec<Storage> out(suite.zeros<Storage>(n), n);
        const MlpForward<Storage> f{out, u};
        const MlpBackward<Storage> b{out, dh, u};
        suite.add("forward " + shape, traffic(f), [f, &suite] { mlp_forward(suite.device, f); });
        suite.add("backward " + shape, traffic(b), [b, &suite] { mlp_backward(suite.device, b); });
    }
}

}  // namespace fiedler::bench
