// Names: rows x columns.
#include "kernels/dropout.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
FIEDLER_BENCH(dropout) {
    const std::int64_t rows = suite.small ? 2500 : 102400;
    for (const std::int64_t cols : {std::int64_t(128), std::int64_t(512)}) {
        Dropout<Storage> p;
        p.x = Mat<const Storage>(suite.random<Storage>(rows * cols), rows, cols);
        p.y = Mat<Storage>(suite.zeros<Storage>(rows * cols), rows, cols);
        p.seed = suite.copy_of(std::vector<std::uint64_t>{7});
        p.p = 0.1f;
        suite.add(std::to_string(rows) + "x" + std::to_string(cols), traffic(p),
                  [p, &suite] { dropout(suite.device, p); });
    }
}

}  // namespace fiedler::bench
