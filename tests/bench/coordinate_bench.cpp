// Names: direction tokens x heads x scalars, with or without the convolution.
#include "kernels/coordinate.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_coordinate(Suite& s, std::int32_t sequences, std::int32_t length, std::int64_t heads, std::int64_t scalars,
                    bool convolution) {
    const std::int64_t n = std::int64_t(sequences) * length, half = heads * scalars;
    CoordinateForward<Accum> f;
    f.a = {s.zeros<Accum>(n * half), n, half};
    f.b = {s.zeros<Accum>(n * half), n, half};
    f.s = Mat<const Accum>(s.random<Accum>(n * 2 * half), n, 2 * half);
    if (convolution) f.w = Mat<const Accum>(s.random<Accum>(8 * half), 2 * half, 4);
    f.log_temp = Vec<const Accum>(s.zeros<Accum>(heads), heads);
    f.seq = Packed::uniform(sequences, length);
    const std::string name =
        std::to_string(n) + "x" + std::to_string(heads) + "x" + std::to_string(scalars) + (convolution ? " conv" : "");
    s.add("forward " + name, traffic(f), [f, &s] { coordinate_forward(s.device, f); });

    CoordinateBackward<Storage> b;
    b.ds = {s.zeros<Storage>(n * 2 * half), n, 2 * half};
    if (convolution) b.dw = {s.zeros<Accum>(8 * half), 2 * half, 4};
    b.dlog_temp = {s.zeros<Accum>(heads), heads};
    b.da = Mat<const Accum>(s.random<Accum>(n * half), n, half);
    b.db = Mat<const Accum>(s.random<Accum>(n * half), n, half);
    b.a = f.a, b.b = f.b, b.s = f.s, b.w = f.w, b.log_temp = f.log_temp, b.seq = f.seq;
    add_with_pending(s, "backward " + name, b, coordinate_pending_elements(n, 2 * half, heads),
                     [](const Device& d, const CoordinateBackward<Storage>& p) { coordinate_backward(d, p); });
}

}  // namespace

FIEDLER_BENCH(coordinate) {
    const std::int32_t sequences = suite.small ? 2 : 32;
    for (const std::int64_t scalars : {1, 8, 16}) add_coordinate(suite, sequences, 1024, 6, scalars, true);
    add_coordinate(suite, sequences, 1024, 6, 8, false);
}

}  // namespace fiedler::bench
