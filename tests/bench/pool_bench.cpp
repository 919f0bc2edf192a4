// Names: direction kind sequences x length x channels.
#include "kernels/pool.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add(Suite& suite, PoolKind kind, std::int32_t count, std::int32_t length, std::int64_t channels) {
    const std::int64_t tokens = std::int64_t(count) * length, heads = kind == PoolKind::attention ? 2 : 0;
    const std::int64_t scratch = pool_scratch_elements(tokens, channels, heads);
    const auto input = [&](std::int64_t rows) {
        return Mat<const Storage>(suite.random<Storage>(rows * channels), rows, channels);
    };
    const auto output = [&](std::int64_t rows, std::int64_t cols) {
        return Mat<Storage>(suite.zeros<Storage>(rows * cols), rows, cols);
    };
    PoolForward<Storage> f;
    f.y = output(count, channels), f.x = input(tokens), f.seq = Packed::uniform(count, length), f.kind = kind;
    f.scratch = {suite.zeros<Accum>(scratch), scratch};
    PoolBackward<Storage> b;
    b.dx = output(tokens, channels), b.dy = input(count), b.seq = f.seq, b.kind = kind;
    if (heads) {
        f.z = Mat<const Accum>(suite.random<Accum>(tokens * heads), tokens, heads);
        f.lse = Mat<Accum>(suite.zeros<Accum>(count * heads), count, heads);
        b.x = f.x, b.y = input(count), b.z = f.z, b.lse = f.lse, b.dz = output(tokens, heads);
    }
    const char* name = kind == PoolKind::mean ? "mean " : kind == PoolKind::sum ? "sum " : "attention ";
    const std::string shape =
        name + std::to_string(count) + "x" + std::to_string(length) + "x" + std::to_string(channels);
    suite.add("forward " + shape, traffic(f), [f, &suite] { pool_forward(suite.device, f); });
    suite.add("backward " + shape, traffic(b), [b, &suite] { pool_backward(suite.device, b); });
}

}  // namespace

FIEDLER_BENCH(pool) {
    for (const PoolKind kind : {PoolKind::mean, PoolKind::attention}) {
        add(suite, kind, suite.small ? 100 : 4096, 25, 128);
        add(suite, kind, 1, suite.small ? 20000 : 1000000, 64);
    }
}

}  // namespace fiedler::bench
