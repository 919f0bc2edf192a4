// Names: direction tokens x channels; backward as in training, fused with the residual path.
#include "kernels/norm.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {

FIEDLER_BENCH(norm) {
    const std::int64_t tokens = suite.small ? 1024 : 32768;
    for (const std::int64_t channels : {std::int64_t(384), std::int64_t(768), std::int64_t(2048), std::int64_t(4096)}) {
        const std::int64_t rows = tokens * 384 / channels, n = rows * channels;
        const std::string shape = std::to_string(rows) + "x" + std::to_string(channels);
        const auto input = [&] { return Mat<const Storage>(suite.random<Storage>(n), rows, channels); };
        const Vec<Accum> rstd(suite.random<Accum>(rows), rows);
        const Mat<Storage> out(suite.zeros<Storage>(n), rows, channels);
        const NormForward<Storage> f{out, rstd, input()};
        const NormBackward<Storage> b{out, input(), f.x, rstd, input()};
        suite.add("forward " + shape, traffic(f), [f, &suite] { norm_forward(suite.device, f); });
        suite.add("backward " + shape, traffic(b), [b, &suite] { norm_backward(suite.device, b); });
    }
}

}  // namespace fiedler::bench
