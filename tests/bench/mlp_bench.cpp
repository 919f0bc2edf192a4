// Names: direction tokens x channels x hidden [general: by cuBLASLt and an elementwise kernel].
#include "kernels/mlp.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

template <class P>
void add_case(Suite& s, const std::string& name, const P& p, void (*run)(const Device&, const P&)) {
    s.add(
        name, traffic(p), [p, run, &s] { run(s.device, p); }, true);
#if FIEDLER_BENCH_CUDA
    s.add(
        name + " general", traffic(p), [p, &s] { mlp_by_path(s.device, p, MlpPath::general); }, true);
#endif
}

}  // namespace

FIEDLER_BENCH(mlp) {
    const std::int64_t n = suite.small ? 1024 : 32768, c = suite.small ? 128 : 384;
    for (const std::int64_t m : {std::int64_t(1536), std::int64_t(2048)}) {
        const std::string shape = std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(m);
        const Mat<const Storage> x(suite.random<Storage>(n * c), n, c), dy(suite.random<Storage>(n * c), n, c);
        const Mat<const Storage> w1(suite.random<Storage>(m * c, 0.05), m, c),
            w2(suite.random<Storage>(c * m, 0.05), c, m);
        const Mat<Storage> h(suite.random<Storage>(n * m), n, m), du(suite.zeros<Storage>(n * m), n, m);
        const MlpForward<Storage> f{h, x, w1};
        mlp_forward(suite.device, f);  // h as it is met in training: not negative, half of it 0
        add_case(suite, "forward " + shape, f, mlp_forward);
        add_case(suite, "backward " + shape, MlpBackward<Storage>{du, dy, w2, h}, mlp_backward);
    }
}

}  // namespace fiedler::bench
