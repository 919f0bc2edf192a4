// Names: direction rows x vocabulary; chunks as the engine cuts them, and one whole step's logits.
#include "kernels/loss.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

void add_loss(Suite& s, std::int64_t rows, std::int64_t vocab, bool gradient) {
    const std::int64_t ld = (vocab + 7) / 8 * 8;
    LossForward<Storage> p;
    p.logits = Mat<Storage>(s.random<Storage>(rows * ld), rows, vocab, ld);
    p.losses = Vec<Accum>(s.zeros<Accum>(rows), rows);
    p.targets = Vec<const std::int32_t>(s.random<std::int32_t>(rows, double(vocab)), rows);
    p.scale = Accum(1) / Accum(rows);
    p.gradient = gradient;
    const std::string name = gradient ? "forward+gradient " : "forward ";
    s.add(name + std::to_string(rows) + "x" + std::to_string(vocab), traffic(p),
          [p, &s] { loss_forward(s.device, p); });
}

}  // namespace

FIEDLER_BENCH(loss) {
    const std::int64_t rows = suite.small ? 256 : 4096;
    for (const std::int64_t vocab : {std::int64_t(4096), std::int64_t(16384), std::int64_t(30522), std::int64_t(50304)})
        add_loss(suite, rows, vocab, true);
    add_loss(suite, rows, 16384, false);
    if (!suite.small) add_loss(suite, 32768, 16384, true);

    LossSum<Accum> sum;
    const std::int64_t n = suite.small ? 1024 : 32768;
    sum.total = Vec<Accum>(suite.zeros<Accum>(1), 1);
    sum.losses = Vec<const Accum>(suite.random<Accum>(n), n);
    suite.add("sum " + std::to_string(n), {double(n) * sizeof(Accum), double(n)},
              [sum, &suite] { loss_sum(suite.device, sum); });
}

}  // namespace fiedler::bench
