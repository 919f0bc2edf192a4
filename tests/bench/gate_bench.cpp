// Names: direction sequences x length x heads.
#include "kernels/gate.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_gate(Suite& s, std::int32_t count, std::int32_t length, std::int64_t heads) {
    const std::int64_t tokens = std::int64_t(count) * length, n = tokens * heads;
    const std::string shape = std::to_string(count) + "x" + std::to_string(length) + "x" + std::to_string(heads);
    const auto input = [&] { return Mat<const Accum>(s.random<Accum>(n), tokens, heads); };
    const Vec<const Accum> bias(s.random<Accum>(heads), heads);
    GateForward<Accum> f;
    f.F = Mat<Accum>(s.zeros<Accum>(n), tokens, heads);
    f.z = input();
    f.bias = bias;
    f.seq = Packed::uniform(count, length);
    GateBackward<Storage> b;
    b.dz = Mat<Storage>(s.zeros<Storage>(n), tokens, heads);
    b.dbias = Vec<Accum>(s.zeros<Accum>(heads), heads);
    b.dF = input();
    b.z = f.z;
    b.bias = bias;
    b.seq = f.seq;
    s.add("forward " + shape, traffic(f), [f, &s] { gate_forward(s.device, f); });
    add_with_pending(s, "backward " + shape, b, gate_pending_elements(tokens, count, heads),
                     [](const Device& d, const GateBackward<Storage>& p) { gate_backward(d, p); });
}

}  // namespace

FIEDLER_BENCH(gate) {
    add_gate(suite, suite.small ? 4 : 32, suite.small ? 256 : 1024, 6);
    add_gate(suite, 1, suite.small ? 4096 : 1 << 20, 6);
    if (!suite.small) add_gate(suite, 1638, 20, 6);  // molecules
}

}  // namespace fiedler::bench
