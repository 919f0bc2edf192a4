// Names: layers of the model that `fiedler bench step` trains (sssbss): gates and coordinates leave sums over blocks.
#include "kernels/pending_sums.h"

#include "kernels/coordinate.h"
#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(pending_sums) {
    constexpr std::int32_t kHeads = 6, kSequences = 32, kBlocks = std::int32_t(kCoordinateBlocks);
    std::vector<PendingSum<Accum>> sums;
    const auto add = [&](std::int32_t rows, std::int32_t columns) {
        sums.push_back({suite.zeros<Accum>(columns), suite.random<Accum>(std::int64_t(rows) * columns), columns, 1,
                        rows, columns});
    };
    const std::vector<std::int32_t> layers = {1, 1, 1, 8, 1, 1};  // scalars of a head
    for (const std::int32_t scalars : layers) {
        add(kBlocks, 2 * kHeads * scalars * 4);             // weights of the scalars' convolution
        add(scalars == 1 ? 2 * kBlocks : kBlocks, kHeads);  // temperatures
        add(kSequences, kHeads);                            // biases of the gates
    }
    PendingSums<Accum> all;
    for (const auto& s : sums) all.add(s);
    suite.add(std::to_string(layers.size()) + " layers", traffic(all), [sums, &suite] {
        PendingSums<Accum> p;
        for (const auto& s : sums) p.add(s);
        finish_sums(suite.device, p);
    });
}
}  // namespace fiedler::bench
