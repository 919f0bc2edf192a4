// Names: layers of the model that `fiedler bench step` trains (sssbss): gates and coordinates leave sums over blocks; and
// layers whose queries, keys and values are convolved, of which two thirds are turned.
#include "kernels/pending_sums.h"

#include "kernels/coordinate.h"
#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

// rows and columns of each sum, which follow one another in memory by columns.
struct Shape {
    std::int32_t rows, columns;
};
void add_sums(Suite& suite, const std::string& name, const std::vector<Shape>& shapes) {
    std::vector<PendingSum<Accum>> sums;
    for (const Shape& s : shapes)
        sums.push_back({suite.zeros<Accum>(s.columns), suite.random<Accum>(std::int64_t(s.rows) * s.columns), s.columns,
                        1, s.rows, s.columns});
    PendingSums<Accum> all;
    for (const auto& s : sums) all.add(s);
    suite.add(name, traffic(all), [sums, &suite] {
        PendingSums<Accum> p;
        for (const auto& s : sums) p.add(s);
        finish_sums(suite.device, p);
    });
}

}  // namespace

FIEDLER_BENCH(pending_sums) {
    constexpr std::int32_t kHeads = 6, kSequences = 32, kBlocks = std::int32_t(kCoordinateBlocks);
    const std::vector<std::int32_t> layers = {1, 1, 1, 8, 1, 1};  // scalars of a head
    std::vector<Shape> shapes, of_convolutions;
    for (const std::int32_t scalars : layers) {
        shapes.push_back({kBlocks, 2 * kHeads * scalars * 4});             // weights of the scalars' convolution
        shapes.push_back({scalars == 1 ? 2 * kBlocks : kBlocks, kHeads});  // temperatures
        shapes.push_back({kSequences, kHeads});                            // biases of the gates
        of_convolutions.push_back({64, 2 * 384 * 4});                      // taps of queries and keys
        of_convolutions.push_back({128, 384 * 4});                         // and of values
    }
    const std::string name = std::to_string(layers.size()) + " layers";
    add_sums(suite, name, shapes);
    add_sums(suite, name + ", convolutions", of_convolutions);
}
}  // namespace fiedler::bench
