// Names: kind of graph, rows x entries a row x columns of the block [panel] [filter: with the other two terms].
// "mesh": neighbours are near in the order of rows. "power": degrees and neighbours by a power law, without any order.
#include "kernels/laplacian.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <type_traits>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Graph {
    std::vector<std::int64_t> offsets{0};
    std::vector<std::int32_t> columns;
};
Graph mesh(std::int64_t n, int degree) {
    std::mt19937 random(1);
    const std::int64_t reach = std::max<std::int64_t>(degree, std::int64_t(std::sqrt(double(n))));
    Graph g;
    for (std::int64_t i = 0; i < n; ++i) {
        for (int k = 0; k < degree; ++k)
            g.columns.push_back(
                std::int32_t(std::clamp<std::int64_t>(i + std::int64_t(random() % (2 * reach)) - reach, 0, n - 1)));
        std::sort(g.columns.end() - degree, g.columns.end());
        g.offsets.push_back(std::int64_t(g.columns.size()));
    }
    return g;
}
// Degree of the node of rank r about r^(-1/2), a neighbour's rank likewise; ranks lie scattered over the rows.
Graph power_law(std::int64_t n, int degree) {
    std::mt19937 random(2);
    const auto uniform = [&] { return double(random() >> 5) * 0x1p-27; };
    std::vector<std::int32_t> rows(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) rows[std::size_t(i)] = std::int32_t(i);
    std::shuffle(rows.begin(), rows.end(), random);
    Graph g;
    for (std::int64_t i = 0; i < n; ++i) {
        const double rank = double(rows[std::size_t(i)] + 1);  // a permutation is as good as its inverse
        const auto count = std::int64_t(0.5 * degree * std::sqrt(double(n) / rank) + uniform());
        for (std::int64_t k = 0; k < count; ++k) {
            const double u = uniform();
            g.columns.push_back(rows[std::size_t(double(n) * u * u)]);
        }
        g.offsets.push_back(std::int64_t(g.columns.size()));
    }
    return g;
}

struct Matrix {
    SparseMatrix<float> l;
    std::int64_t pieces = 0;
    Matrix(Suite& s, const Graph& g) {
        l.rows = std::int64_t(g.offsets.size()) - 1;
        l.offsets = s.copy_of(g.offsets), l.columns = s.copy_of(g.columns);
        l.values = {s.random<float>(l.columns.size), l.columns.size};
        const LongRows r = find_long_rows(g.offsets.data(), l.rows);
        pieces = std::int64_t(r.begin.size());
        if (pieces > 0) l.long_rows = {s.copy_of(r.rows), s.copy_of(r.first), s.copy_of(r.begin), s.copy_of(r.end)};
    }
};

void add_apply(Suite& s, const std::string& kind, const Matrix& matrix, std::int64_t m, std::int64_t panel,
               bool filter) {
    const std::int64_t n = matrix.l.rows, scratch = laplacian_scratch_elements(matrix.pieces, m);
    LaplacianApply<float> p;
    p.y = {s.zeros<float>(n * m), n, m};
    p.x = Mat<const float>(s.random<float>(n * m), n, m);
    p.matrix = matrix.l, p.panel = panel;
    p.scratch = {s.zeros<float>(scratch), scratch};
    if (filter) p.z = p.y, p.alpha = 0.5f, p.beta = -1, p.gamma = -0.5f;
    const std::string name = kind + " " + std::to_string(n) + "x" + std::to_string(p.matrix.columns.size / n) + "x" +
                             std::to_string(m) + (panel ? " panel " + std::to_string(panel) : "") +
                             (filter ? " filter" : "");
    s.add(name, traffic(p), [p, &s] { laplacian_apply(s.device, p); });
}

}  // namespace

FIEDLER_BENCH(laplacian) {
    const std::int64_t n = suite.small ? 10000 : 1000000;
    const Matrix near(suite, mesh(n, 20)), scattered(suite, power_law(n, 20));
    for (const std::int64_t m : {32, 64, 96, 128}) add_apply(suite, "mesh", near, m, 0, false);
    add_apply(suite, "mesh", near, 96, 0, true);
    add_apply(suite, "power", scattered, 96, 0, false);
    if (std::is_same_v<Device, Cpu>) return;
    for (const std::int64_t panel : {16, 32}) {
        add_apply(suite, "mesh", near, 96, panel, false);
        add_apply(suite, "power", scattered, 96, panel, false);
    }
}

}  // namespace fiedler::bench
