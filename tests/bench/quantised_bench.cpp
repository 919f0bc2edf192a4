// Names: tokens x rows x columns: the layers' matrices and the vocabulary, one token (decoding) and many (a prompt).
#include "kernels/quantised.h"

#include <memory>

#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(quantised) {
    for (const Quant kind : {Quant::int8, Quant::int4})
        for (const auto& [rows, cols] : {std::pair{384, 384}, {1536, 384}, {384, 1536}, {16384, 384}}) {
            const QuantShape shape{kind, rows, cols};
            auto* memory = reinterpret_cast<std::byte*>(suite.zeros<float>(shape.bytes() / 4));
            quantise(suite.device, {suite.random<float>(std::int64_t(rows) * cols), rows, cols}, shape,
                     QuantSearch::nearest, memory);
            for (const std::int64_t tokens : {1, 64}) {
                const auto x = std::make_shared<QuantTokens>();
                quantise_tokens(suite.device, {suite.random<float>(tokens * cols), tokens, cols}, *x);
                const QuantMatmul p{{suite.zeros<float>(tokens * rows), tokens, rows}, x.get(), {shape, memory}, {}};
                suite.add((kind == Quant::int8 ? "int8 " : "int4 ") + std::to_string(tokens) + "x" +
                              std::to_string(rows) + "x" + std::to_string(cols),
                          traffic(p), [p, x, &suite] { quantised_matmul(suite.device, p); });
            }
        }
}

}  // namespace fiedler::bench
