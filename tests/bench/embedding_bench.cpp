// Names: direction tokens x channels of vocabulary. Tokens are uniformly random (a small vocabulary makes long runs),
// or as words are in text (Zipf: the token number k comes with a probability of 1 / (k + 1), as those of BPE about do).
//
// "order" is bound by latency and by nothing that its bytes say. In training it runs beside the rest of the backward
// pass (engine/model.cpp), so "backward" is timed without it, on an order that is there.
#include "kernels/embedding.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

std::vector<std::int32_t> text(std::int64_t tokens, std::int64_t vocab) {
    std::vector<double> upto(static_cast<std::size_t>(vocab));  // the probability of the tokens up to and with one
    double sum = 0;
    for (std::size_t k = 0; k < upto.size(); ++k) upto[k] = sum += 1.0 / double(k + 1);
    std::mt19937_64 generator(20240608);
    std::uniform_real_distribution<double> u(0, sum);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
    for (std::int32_t& id : ids)
        id = std::int32_t(std::min(upto.end() - 1, std::lower_bound(upto.begin(), upto.end(), u(generator))) -
                          upto.begin());
    return ids;
}
std::vector<std::int32_t> uniform(std::int64_t tokens, std::int64_t vocab) {
    std::mt19937_64 generator(20240607);
    std::uniform_int_distribution<std::int32_t> d(0, std::int32_t(vocab) - 1);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
    for (std::int32_t& id : ids) id = d(generator);
    return ids;
}

void add(Suite& suite, const std::vector<std::int32_t>& host_ids, std::int64_t vocab, const std::string& of) {
    const auto tokens = std::int64_t(host_ids.size());
    const std::int64_t channels = 384, n = tokens * channels;
    const auto distinct = std::int64_t(std::set<std::int32_t>(host_ids.begin(), host_ids.end()).size());
    const std::string shape = std::to_string(tokens) + "x" + std::to_string(channels) + " of " + of;
    const Vec<const std::int32_t> ids = suite.copy_of(host_ids);
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
    const EmbeddingOrder order{ids, vocab, channels, b.scratch};
    embedding_order(suite.device, order);
    if (std::is_same_v<Device, Cuda>)  // on the CPU there is nothing to do
        suite.add("order " + shape, traffic(order), [order, &suite] { embedding_order(suite.device, order); });
    suite.add("backward " + shape, traffic(b, distinct), [b, &suite] { embedding_backward(suite.device, b); });
    suite.cases.back().only_reads = distinct * 100 < tokens;
}

}  // namespace

FIEDLER_BENCH(embedding) {
    const std::int64_t tokens = suite.small ? 1024 : 32768;
    for (const std::int64_t vocab : {std::int64_t(1), std::int64_t(256), std::int64_t(16384)})
        add(suite, uniform(tokens, vocab), vocab, std::to_string(vocab));
    add(suite, text(tokens, 50304), 50304, "50304 as in text");
}

}  // namespace fiedler::bench
