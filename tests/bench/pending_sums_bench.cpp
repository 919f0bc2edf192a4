// Names: layers of a model whose gates, temperatures and energies leave sums over blocks.
#include "kernels/pending_sums.h"

#include <memory>

#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(pending_sums) {
    constexpr std::int64_t kLayers = 6, kHeads = 6, kScalars = 8, kSequences = 32, kBlocks = 88;
    struct Sum {
        std::int64_t rows, columns, row_step, column_step;
    };
    const std::vector<Sum> of_layer = {{kSequences, kHeads, kHeads, 1},
                                       {2 * kBlocks, kHeads, 1, 2 * kBlocks},
                                       {2 * kBlocks * kHeads, kScalars, 1, 2 * kBlocks * kHeads}};
    std::vector<PendingSum<Accum>> sums;
    for (std::int64_t l = 0; l < kLayers; ++l)
        for (const Sum& s : of_layer)
            sums.push_back({suite.zeros<Accum>(s.columns), suite.random<Accum>(s.rows * s.columns), s.row_step,
                            s.column_step, std::int32_t(s.rows), std::int32_t(s.columns)});
    PendingSums<Accum> all;
    for (const auto& s : sums) all.add(s);
    suite.add(std::to_string(kLayers) + " layers", traffic(all), [sums, &suite] {
        PendingSums<Accum> p;
        for (const auto& s : sums) p.add(s);
        finish_sums(suite.device, p);
    });
}
}  // namespace fiedler::bench
