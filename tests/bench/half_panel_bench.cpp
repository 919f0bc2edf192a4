// Names: operation, kind of graph, rows x entries a row x columns; of pack, unpack and deflate rows x columns. Graphs as in
// laplacian_bench.cpp: "mesh": neighbours are near in the order of rows; "scattered": anywhere.
#include "kernels/half_panel.h"

#include <algorithm>
#include <random>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

Mat<f16> zeros(Suite& s, std::int64_t n, std::int64_t w) {
    return {reinterpret_cast<f16*>(s.zeros<std::byte>(n * w * std::int64_t(sizeof(f16)))), n, w};
}

// `degree` entries a row, within `reach` rows.
SparseMatrix<float> matrix(Suite& s, std::int64_t n, int degree, std::int64_t reach) {
    std::mt19937_64 random(1);
    std::vector<std::int64_t> offsets{0};
    std::vector<std::int32_t> columns;
    for (std::int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < degree; ++k) {
            const auto step = std::int64_t(random() % std::uint64_t(2 * reach + 1)) - reach;
            columns.push_back(std::int32_t(std::clamp<std::int64_t>(i + step, 0, n - 1)));
        }
        std::sort(columns.end() - degree, columns.end());
        offsets.push_back(std::int64_t(columns.size()));
    }
    SparseMatrix<float> l;
    l.rows = n;
    l.offsets = s.copy_of(offsets), l.columns = s.copy_of(columns);
    l.values = {s.random<float>(l.columns.size), l.columns.size};
    return l;
}

void add_panel(Suite& s, const SparseMatrix<float>& near, const SparseMatrix<float>& scattered, std::int64_t w) {
    const std::int64_t n = near.rows;
    const std::string shape = std::to_string(n) + "x" + std::to_string(w);
    const Mat<f16> x = zeros(s, n, w), y = zeros(s, n, w);
    const Mat<float> block(s.random<float>(n * w), n, w);
    const Vec<float> scale{s.zeros<float>(w), w}, largest{s.zeros<float>(half_pack_scratch(w)), half_pack_scratch(w)};
    const HalfPack pack{x, block, scale, false, largest};
    half_pack(s.device, pack);
    s.add("pack " + shape, traffic(pack), [pack, &s] { half_pack(s.device, pack); });
    const HalfUnpack unpack{block, x, scale};
    s.add("unpack " + shape, traffic(unpack), [unpack, &s] { half_unpack(s.device, unpack); });
    for (const auto& [name, l] : {std::pair("mesh ", near), std::pair("scattered ", scattered)}) {
        HalfApply apply{y, x, y, l, 0.5f, -1, -0.5f, {}};
        s.add("apply " + std::string(name) + std::to_string(n) + "x" + std::to_string(l.columns.size / n) + "x" +
                  std::to_string(w),
              traffic(apply), [apply, &s] { half_apply(s.device, apply); });
    }
    HalfDeflate deflate;
    deflate.x = x, deflate.v = {s.zeros<float>(n), n};
    deflate.offsets = s.copy_of(std::vector<std::int64_t>{0, n});
    const std::int64_t doubles = eigen_deflate_scratch(n, w);
    deflate.scratch = {reinterpret_cast<double*>(s.zeros<std::byte>(doubles * std::int64_t(sizeof(double)))), doubles};
    s.add("deflate " + shape, traffic(deflate), [deflate, &s] { half_deflate(s.device, deflate); });
}

}  // namespace

FIEDLER_BENCH(half_panel) {
    const std::int64_t n = suite.small ? 10000 : 1000000;
    const SparseMatrix<float> near = matrix(suite, n, 20, 1000), scattered = matrix(suite, n, 20, n);
    for (const std::int64_t w : {8, 16, 32}) add_panel(suite, near, scattered, w);
}

}  // namespace fiedler::bench
