// Names: direction rows x in x out [type of the output] [epilogue], as in y[rows, out] = x[rows, in] W'.
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

template <class O>
void add_forward(Suite& s, const std::string& name, const Shape& n, bool residual, bool relu) {
    MatmulForward<Storage, O> p;
    p.x = Mat<const Storage>(s.random<Storage>(n.rows * n.in), n.rows, n.in);
    p.w = Mat<const Storage>(s.random<Storage>(n.out * n.in, 0.02), n.out, n.in);
    p.y = Mat<O>(s.zeros<O>(n.rows * n.ld_out()), n.rows, n.out, n.ld_out());
    if (residual) p.residual = Mat<const O>(s.random<O>(n.rows * n.ld_out()), n.rows, n.out, n.ld_out());
    p.relu = relu;
    s.add(
        name, traffic(p), [p, &s] { matmul_forward(s.device, p); }, true);
}

void add_backward(Suite& s, const Shape& n) {
    MatmulDx<Storage> dx;
    dx.dy = Mat<const Storage>(s.random<Storage>(n.rows * n.ld_out()), n.rows, n.out, n.ld_out());
    dx.w = Mat<const Storage>(s.random<Storage>(n.out * n.in, 0.02), n.out, n.in);
    dx.dx = Mat<Storage>(s.zeros<Storage>(n.rows * n.in), n.rows, n.in);
    s.add(
        "dx " + n.name(), traffic(dx), [dx, &s] { matmul_dx(s.device, dx); }, true);
    MatmulDw<Storage> dw;
    dw.dy = dx.dy;
    dw.x = Mat<const Storage>(s.random<Storage>(n.rows * n.in), n.rows, n.in);
    dw.dw = Mat<Accum>(s.zeros<Accum>(n.out * n.in), n.out, n.in);
    s.add(
        "dw " + n.name(), traffic(dw), [dw, &s] { matmul_dw(s.device, dw); }, true);
}

}  // namespace

FIEDLER_BENCH(matmul) {
    // "peak": the GEMM rate that the other rows are held against (harness.cpp looks for this name).
    const std::int64_t peak = std::is_same_v<Device, Cpu> ? 1024 : 8192;
    add_forward<Storage>(suite, "peak " + Shape{peak, peak, peak}.name(), {peak, peak, peak}, false, false);

    const std::int64_t rows = suite.small ? 1024 : 32768, c = suite.small ? 128 : 384, chunk = suite.small ? 256 : 4096;
    const Shape qkv{rows, c, 3 * c}, square{rows, c, c}, up{rows, c, 4 * c}, down{rows, 4 * c, c};
    const Shape scalars{rows, c, 96}, gate{rows, c, 6}, head{chunk, c, suite.small ? 4096 : 16384};
    add_forward<Storage>(suite, "forward " + qkv.name(), qkv, false, false);
    add_forward<Storage>(suite, "forward " + square.name() + " residual", square, true, false);
    add_forward<Storage>(suite, "forward " + up.name() + " relu", up, false, true);
    add_forward<Storage>(suite, "forward " + down.name() + " residual", down, true, false);
    add_forward<Accum>(suite, "forward " + scalars.name() + " f32", scalars, false, false);
    add_forward<Accum>(suite, "forward " + gate.name() + " f32", gate, false, false);
    add_forward<Storage>(suite, "forward " + head.name(), head, false, false);
    for (const Shape& n : {qkv, square, up, down, scalars, gate, head}) add_backward(suite, n);
    const Shape decode{1, c, suite.small ? 4096 : 16384};
    add_forward<Storage>(suite, "forward " + decode.name(), decode, false, false);
}

}  // namespace fiedler::bench
