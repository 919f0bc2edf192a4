// Names: direction rows x channels of features, entries of a row: atoms of molecules, and words of papers.
#include "kernels/bag.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

// A few features take most entries, as atoms do.
std::int32_t feature_of(std::uint64_t& state, std::int64_t features) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const double u = double(state >> 11) * 0x1p-53;
    return std::int32_t(u * u * u * double(features));
}

void add(Suite& suite, std::int64_t rows, std::int64_t channels, std::int64_t features, std::int32_t each) {
    std::vector<std::int32_t> offsets{0}, columns;
    std::uint64_t state = 1;
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int32_t k = 0; k < each; ++k) columns.push_back(feature_of(state, features));
        offsets.push_back(std::int32_t(columns.size()));
    }
    const auto size = std::int64_t(columns.size());
    BagTransposed t;
    bag_transpose(t, {offsets.data(), rows + 1}, {columns.data(), size}, {}, features);
    const std::int64_t scratch = bag_scratch_elements(size, channels);
    BagForward<Storage> f;
    f.x = Mat<Storage>(suite.zeros<Storage>(rows * channels), rows, channels);
    f.offsets = suite.copy_of(offsets), f.columns = suite.copy_of(columns);
    f.table = Mat<const Storage>(suite.random<Storage>(features * channels), features, channels);
    BagBackward<Storage> b;
    b.dtable = Mat<Accum>(suite.zeros<Accum>(features * channels), features, channels);
    b.offsets = suite.copy_of(t.offsets), b.rows = suite.copy_of(t.rows);
    b.dx = Mat<const Storage>(suite.random<Storage>(rows * channels), rows, channels);
    b.scratch = {suite.zeros<Accum>(scratch), scratch};
    const std::string shape = std::to_string(rows) + "x" + std::to_string(channels) + " of " +
                              std::to_string(features) + ", " + std::to_string(each) + " entries";
    suite.add("forward " + shape, traffic(f), [f, &suite] { bag_forward(suite.device, f); });
    suite.add("backward " + shape, traffic(b), [b, &suite] { bag_backward(suite.device, b); });
}

}  // namespace

FIEDLER_BENCH(bag) {
    add(suite, suite.small ? 2500 : 102400, 128, 180, 9);
    add(suite, suite.small ? 500 : 19717, 64, 3703, 32);
}

}  // namespace fiedler::bench
