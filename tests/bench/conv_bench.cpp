// Names: direction tokens x channels: the model's width, and queries, keys and values together.
#include "kernels/conv.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(conv) {
    const std::int32_t count = suite.small ? 4 : 32, length = suite.small ? 256 : 1024;
    for (const std::int64_t channels : {std::int64_t(384), std::int64_t(1152)}) {
        const std::int64_t tokens = std::int64_t(count) * length, n = tokens * channels;
        const std::string shape = std::to_string(tokens) + "x" + std::to_string(channels);
        const auto input = [&] { return Mat<const Storage>(suite.random<Storage>(n), tokens, channels); };
        const Mat<const Accum> w(suite.random<Accum>(4 * channels), channels, 4);
        const Mat<Accum> dw(suite.zeros<Accum>(4 * channels), channels, 4);
        const Mat<Storage> out(suite.zeros<Storage>(n), tokens, channels);
        const ConvForward<Storage> f{out, input(), w, Packed::uniform(count, length)};
        const ConvBackward<Storage> b{out, dw, input(), f.x, w, f.seq, {}};
        suite.add("forward " + shape, traffic(f), [f, &suite] { conv_forward(suite.device, f); });
        add_with_pending(suite, "backward " + shape, b, conv_pending_elements(tokens, channels),
                         [](const Device& d, const ConvBackward<Storage>& p) { conv_backward(d, p); });
    }
}

}  // namespace fiedler::bench
