// Names: forward[+gradient] tokens x channels x vocabulary, chunk rows [products: by cuBLASLt and loss_forward; fp8].
#include "kernels/head.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_head(Suite& s, std::int64_t n, std::int64_t c, std::int64_t v, std::int64_t chunk, bool gradient) {
    Head<Storage> p;
    p.losses = Vec<Accum>(s.zeros<Accum>(n), n);
    p.x = Mat<const Storage>(s.random<Storage>(n * c), n, c);
    p.w = Mat<const Storage>(s.random<Storage>(v * c, 0.02), v, c);
    p.targets = Vec<const std::int32_t>(s.random<std::int32_t>(n, double(v)), n);
    p.scale = Accum(1) / Accum(n);
    p.logits = Mat<Storage>(s.zeros<Storage>(chunk * v), chunk, v);
    const std::int64_t scratch = head_scratch_elements(chunk, v, c);
    p.scratch = Vec<Accum>(s.zeros<Accum>(scratch), scratch);
    if (gradient) p.dx = Mat<Storage>(s.zeros<Storage>(n * c), n, c), p.dw = Mat<Accum>(s.zeros<Accum>(v * c), v, c);
    const std::string name = std::string(gradient ? "forward+gradient " : "forward ") + std::to_string(n) + "x" +
                             std::to_string(c) + "x" + std::to_string(v) + ", chunk " + std::to_string(chunk);
    s.add(
        name, traffic(p), [p, &s] { head(s.device, p); }, true);
#if FIEDLER_BENCH_CUDA
    if (gradient && head_has_fp8(s.device.arch) && head_fp8_takes(n, chunk, v, c)) {
        Head<Storage> fp8 = p;
        fp8.precision = HeadPrecision::fp8;
        const std::int64_t bytes = head_fp8_scratch_bytes(chunk, v, c);
        fp8.fp8_scratch = {reinterpret_cast<unsigned char*>(s.zeros<std::byte>(bytes)), bytes};
        s.add(
            name + " fp8", traffic(p), [fp8, &s] { head(s.device, fp8); }, true);
    }
    p.loss_rows = 256;
    s.add(
        name + " products", traffic(p), [p, &s] { head_by_path(s.device, p, HeadPath::products); }, true);
#endif
}

}  // namespace

FIEDLER_BENCH(head) {
    if (suite.small) {
        add_head(suite, 256, 128, 2048, 128, true);
        return add_head(suite, 256, 128, 2048, 128, false);
    }
    add_head(suite, 32768, 384, 16384, 8192, true);
    add_head(suite, 32768, 384, 16384, 8192, false);
    add_head(suite, 32768, 384, 50304, 8192, true);
}

}  // namespace fiedler::bench
