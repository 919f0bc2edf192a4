// Names: pass tokens x (heads x width of a head), parts; queries and keys lie side by side with values, as in training.
#include "kernels/rotary.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_rotary(Suite& suite, std::int32_t count, std::int32_t length, std::int32_t heads, std::int32_t width,
                bool normalise) {
    const std::int64_t n = std::int64_t(count) * length, c = std::int64_t(heads) * width;
    RotaryForward<Storage> f;
    f.x = Mat<Storage>(suite.random<Storage>(n * 3 * c), n, c, 3 * c);
    f.y = Mat<Storage>(suite.zeros<Storage>(n * c), n, c);
    f.seq = Packed::uniform(count, length);
    f.heads = heads, f.normalise = normalise;
    RotaryBackward<Storage> b;
    b.x = f.x, b.seq = f.seq, b.heads = heads, b.normalise = normalise;
    b.dy = Mat<Storage>(suite.random<Storage>(n * c), n, c);
    b.dx = Mat<Storage>(suite.zeros<Storage>(n * 3 * c), n, c, 3 * c);
    const std::string name = std::to_string(n) + "x(" + std::to_string(heads) + "x" + std::to_string(width) + ")" +
                             (normalise ? " norm, rotation" : " rotation");
    suite.add("forward " + name, traffic(f), [f, &suite] { rotary_forward(suite.device, f); });
    suite.add("backward " + name, traffic(b), [b, &suite] { rotary_backward(suite.device, b); });
}

}  // namespace

FIEDLER_BENCH(rotary) {
    const std::int32_t count = suite.small ? 2 : 32, length = suite.small ? 256 : 1024;
    add_rotary(suite, count, length, 6, 64, true);
    add_rotary(suite, count, length, 6, 64, false);
    if (suite.small) return;
    add_rotary(suite, count, length, 24, 16, true);
    add_rotary(suite, count, length, 3, 128, true);
}

}  // namespace fiedler::bench
