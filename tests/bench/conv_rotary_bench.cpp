// Names: direction tokens x (heads x width of a head), parts; queries, keys and values, of which two thirds are turned.
#include "kernels/conv_rotary.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_conv_rotary(Suite& suite, std::int32_t count, std::int32_t length, std::int32_t heads, std::int32_t width,
                     bool normalise) {
    const std::int64_t tokens = std::int64_t(count) * length, c = std::int64_t(heads) * width;
    const auto input = [&] { return Mat<const Storage>(suite.random<Storage>(tokens * c), tokens, c); };
    ConvRotaryForward<Storage> f;
    f.y = Mat<Storage>(suite.zeros<Storage>(tokens * c), tokens, c);
    f.x = input(), f.w = Mat<const Accum>(suite.random<Accum>(4 * c), c, 4), f.seq = Packed::uniform(count, length);
    f.heads = heads, f.turned = heads / 3 * 2, f.normalise = normalise;
    ConvRotaryBackward<Storage> b;
    b.dx = f.y, b.dw = Mat<Accum>(suite.zeros<Accum>(4 * c), c, 4);
    b.dy = input(), b.x = f.x, b.w = f.w, b.seq = f.seq;
    b.heads = heads, b.turned = f.turned, b.normalise = normalise;
    const std::string name = std::to_string(tokens) + "x(" + std::to_string(heads) + "x" + std::to_string(width) + ")" +
                             (normalise ? " norm, rotation" : " rotation");
    suite.add("forward " + name, traffic(f), [f, &suite] { conv_rotary_forward(suite.device, f); });
    add_with_pending(suite, "backward " + name, b, conv_rotary_pending_elements(tokens, c),
                     [](const Device& d, const ConvRotaryBackward<Storage>& p) { conv_rotary_backward(d, p); });
}

}  // namespace

FIEDLER_BENCH(conv_rotary) {
    const std::int32_t count = suite.small ? 2 : 32, length = suite.small ? 256 : 1024;
    add_conv_rotary(suite, count, length, 18, 64, true);
    add_conv_rotary(suite, count, length, 18, 64, false);
    if (suite.small) return;
    add_conv_rotary(suite, count, length, 72, 16, true);
    add_conv_rotary(suite, count, length, 9, 128, true);
}

}  // namespace fiedler::bench
