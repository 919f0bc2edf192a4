// Names: direction rows x in x out [type of the output] [epilogue], as in y[rows, out] = x[rows, in] W'. Beside each,
// on the GPU, the best of all algorithms that there are for it. fp8: dx and dw of the vocabulary head; held against the
// measured rate of bf16, as all others.
#include "kernels/matmul.h"

#include <type_traits>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Shape {
    std::int64_t rows, in, out;
    std::string name() const { return std::to_string(rows) + "x" + std::to_string(in) + "x" + std::to_string(out); }
    // Row strides on the device are multiples of 16 bytes.
    std::int64_t ld_out() const { return (out + 7) / 8 * 8; }
};

template <class P>
void add_case(Suite& s, const std::string& name, const P& p, void (*run)(const Device&, const P&)) {
    s.add(
        name, traffic(p), [p, run, &s] { run(s.device, p); }, true);
#if FIEDLER_BENCH_CUDA
    s.cases.back().algorithm = [p, &s](int k) { return matmul_by_algorithm(s.device, p, k); };
#endif
}

template <class O>
void add_forward(Suite& s, const std::string& name, const Shape& n, bool residual, bool relu) {
    MatmulForward<Storage, O> p;
    p.x = Mat<const Storage>(s.random<Storage>(n.rows * n.in), n.rows, n.in);
    p.w = Mat<const Storage>(s.random<Storage>(n.out * n.in, 0.02), n.out, n.in);
    p.y = Mat<O>(s.zeros<O>(n.rows * n.ld_out()), n.rows, n.out, n.ld_out());
    if (residual) p.residual = Mat<const O>(s.random<O>(n.rows * n.ld_out()), n.rows, n.out, n.ld_out());
    p.relu = relu;
    add_case(s, name, p, matmul_forward);
}

void add_backward(Suite& s, const Shape& n) {
    MatmulDx<Storage> dx;
    dx.dy = Mat<const Storage>(s.random<Storage>(n.rows * n.ld_out()), n.rows, n.out, n.ld_out());
    dx.w = Mat<const Storage>(s.random<Storage>(n.out * n.in, 0.02), n.out, n.in);
    dx.dx = Mat<Storage>(s.zeros<Storage>(n.rows * n.in), n.rows, n.in);
    add_case(s, "dx " + n.name(), dx, matmul_dx);
    MatmulDw<Storage> dw;
    dw.dy = dx.dy;
    dw.x = Mat<const Storage>(s.random<Storage>(n.rows * n.in), n.rows, n.in);
    dw.dw = Mat<Accum>(s.zeros<Accum>(n.out * n.in), n.out, n.in);
    add_case(s, "dw " + n.name(), dw, matmul_dw);
}

#if FIEDLER_BENCH_CUDA
template <class E>
Mat<const E> random_bytes(Suite& s, std::int64_t rows, std::int64_t cols) {  // NaN among them
    return {reinterpret_cast<const E*>(s.random<std::int32_t>(rows * cols / 4, 2147483647.0)), rows, cols};
}
template <class O>
void add_fp8(Suite& s, const std::string& name, std::int64_t m, std::int64_t n, std::int64_t k, bool accumulate) {
    MatmulFp8<O> p;
    p.y = Mat<O>(s.zeros<O>(m * n), m, n);
    p.a = random_bytes<e5m2>(s, m, k), p.b = random_bytes<e4m3>(s, n, k);
    p.accumulate = accumulate;
    for (const bool fast : {false, true}) {
        p.fast_sums = fast;
        add_case<MatmulFp8<O>>(s, name + (fast ? " fast sums" : ""), p, matmul_fp8);
    }
}
#endif

}  // namespace

FIEDLER_BENCH(matmul) {
    // "peak": the GEMM rate that the other rows are held against (harness.cpp looks for this name).
    const std::int64_t peak = std::is_same_v<Device, Cpu> ? 1024 : 8192;
    add_forward<Storage>(suite, "peak " + Shape{peak, peak, peak}.name(), {peak, peak, peak}, false, false);

    const std::int64_t rows = suite.small ? 1024 : 32768, c = suite.small ? 128 : 384, chunk = suite.small ? 256 : 4096;
    const Shape qkv{rows, c, 3 * c}, square{rows, c, c}, up{rows, c, 4 * c}, down{rows, 4 * c, c};
    // Scalars of queries and keys with the gate's logits, 2 H R + H columns (R = 8 and 1, H = 6), without it, and alone;
    // the projection of the spectral embedding.
    const Shape aux8{rows, c, 102}, scalars{rows, c, 96}, aux1{rows, c, 18}, gate{rows, c, 6}, spectral{rows, 64, c};
    const Shape head{chunk, c, suite.small ? 4096 : 16384}, head_gpt2{chunk / 8, c, suite.small ? 4096 : 50304};
    add_forward<Storage>(suite, "forward " + qkv.name(), qkv, false, false);
    add_forward<Storage>(suite, "forward " + square.name() + " residual", square, true, false);
    add_forward<Storage>(suite, "forward " + up.name() + " relu", up, false, true);
    add_forward<Storage>(suite, "forward " + down.name() + " residual", down, true, false);
    for (const Shape& n : {aux8, scalars, aux1, gate})
        add_forward<Accum>(suite, "forward " + n.name() + " f32", n, false, false);
    add_forward<Storage>(suite, "forward " + spectral.name() + " residual", spectral, true, false);
    for (const Shape& n : {head, head_gpt2}) add_forward<Storage>(suite, "forward " + n.name(), n, false, false);
    for (const Shape& n : {qkv, square, up, down, aux8, scalars, aux1, gate, spectral, head, head_gpt2})
        add_backward(suite, n);
#if FIEDLER_BENCH_CUDA
    if (suite.device.arch >= 89) {
        const std::int64_t n = suite.small ? 256 : 8192, v = suite.small ? 4096 : 50304;
        const std::string name = Shape{n, c, v}.name();
        add_fp8<Storage>(suite, "fp8 dx " + name, n, c, v, false);
        add_fp8<Accum>(suite, "fp8 dw " + name, v, c, n, true);
    }
#endif
    const Shape decode{1, c, suite.small ? 4096 : 16384};
    add_forward<Storage>(suite, "forward " + decode.name(), decode, false, false);
}

}  // namespace fiedler::bench
