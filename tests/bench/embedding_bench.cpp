// Names: direction tokens x channels of vocabulary, tokens uniformly at random; a small vocabulary makes long runs.
#include "kernels/embedding.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(embedding) {
    const std::int64_t tokens = suite.small ? 1024 : 32768, channels = 384, n = tokens * channels;
    for (const std::int64_t vocab : {std::int64_t(1), std::int64_t(256), std::int64_t(16384)}) {
        const std::string shape =
            std::to_string(tokens) + "x" + std::to_string(channels) + " of " + std::to_string(vocab);
        const Vec<const std::int32_t> ids(suite.random<std::int32_t>(tokens, double(vocab)), tokens);
        const auto bytes = std::int64_t(embedding_scratch_bytes(tokens, channels));
        EmbeddingForward<Storage> f;
        f.x = Mat<Storage>(suite.zeros<Storage>(n), tokens, channels);
        f.tokens = ids;
        f.table = Mat<const Storage>(suite.random<Storage>(vocab * channels), vocab, channels);
        EmbeddingBackward<Storage> b;
        b.dtable = Mat<Accum>(suite.zeros<Accum>(vocab * channels), vocab, channels);
        b.tokens = ids;
        b.dx = Mat<const Storage>(suite.random<Storage>(n), tokens, channels);
        b.scratch = Vec<std::byte>(suite.zeros<std::byte>(bytes), bytes);
        suite.add("forward " + shape, traffic(f), [f, &suite] { embedding_forward(suite.device, f); });
        suite.add("backward " + shape, traffic(b), [b, &suite] { embedding_backward(suite.device, b); });
    }
}

}  // namespace fiedler::bench
