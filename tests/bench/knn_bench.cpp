// Names: vectors x dimensions, neighbours; "all" sweeps every block of queries over every block of keys.
#include "kernels/knn.h"

#include <algorithm>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Sweep {
    KnnVectors vectors;
    std::int64_t block;
    Vec<std::int32_t> ids;
    KnnPrepare queries, keys;
    KnnUpdate update;

    KnnBlock part(const Device& d, KnnPrepare p, std::int64_t first, std::int64_t rows) const {
        p.ids = ids.slice(first, rows), p.y.rows = rows, p.base.size = rows;
        knn_prepare(d, p);
        return {p.y, p.base, p.ids};
    }
    void operator()(const Device& d) const {
        const std::int64_t n = vectors.x.rows;
        KnnUpdate u = update;
        for (std::int64_t q = 0; q < n; q += block) {
            u.queries = part(d, queries, q, std::min(block, n - q));
            u.value.rows = u.id.rows = u.queries.y.rows;
            for (std::int64_t k = 0; k < n; k += block) {
                u.keys = part(d, keys, k, std::min(block, n - k));
                u.start = k == 0;
                knn_update(d, u);
            }
        }
    }
};

void add_knn(Suite& s, std::int64_t n, std::int64_t dim, std::int64_t m, std::int64_t block) {
    Sweep w;
    w.block = std::min(n, block);
    std::vector<std::int32_t> order;
    for (std::int64_t i = 0; i < n; ++i) order.push_back(static_cast<std::int32_t>(i));
    w.ids = {s.zeros<std::int32_t>(n), n};
    copy_to_device(s.device, w.ids.data, order.data(), order.size() * sizeof(std::int32_t));
    w.vectors.x = Mat<const float>(s.random<float>(n * dim), n, dim);
    w.vectors.centre = Vec<const double>(reinterpret_cast<double*>(s.zeros<float>(2 * dim)), dim);
    w.vectors.factor = 0.125;
    const std::int64_t ld = (dim + 3) / 4 * 4;
    for (KnnPrepare* p : {&w.queries, &w.keys})
        *p = {{s.zeros<float>(w.block * ld), w.block, dim, ld},
              {s.zeros<float>(w.block), w.block},
              w.ids.slice(0, w.block),
              w.vectors};
    w.update.vectors = w.vectors;
    w.update.value = {reinterpret_cast<double*>(s.zeros<float>(2 * w.block * m)), w.block, m};
    w.update.id = {s.zeros<std::int32_t>(w.block * m), w.block, m};
    const std::int64_t products_ld = (w.block + 3) / 4 * 4;
    w.update.products = {s.zeros<float>(w.block * products_ld), w.block, products_ld};

    const std::string name = std::to_string(n) + "x" + std::to_string(dim) + " m " + std::to_string(m);
    s.add("prepare " + name, traffic(w.keys), [w, &s] { knn_prepare(s.device, w.keys); });
    KnnUpdate all = w.update;
    all.queries = all.keys = {Mat<const float>(w.vectors.x), {}, {}};
    s.add("all " + name, traffic(all), [w, &s] { w(s.device); });
}

}  // namespace

FIEDLER_BENCH(knn) {
    const std::int64_t block = FIEDLER_CUDA ? 8192 : 2048;
    const bool large = FIEDLER_CUDA && !suite.small;
    add_knn(suite, large ? 100'000 : 4'000, 128, 16, block);
    add_knn(suite, large ? 20'000 : 2'000, 1024, 16, block);
    add_knn(suite, large ? 100'000 : 4'000, 3, 16, block);
    if (large) add_knn(suite, 100'000, 128, 64, block);
}

}  // namespace fiedler::bench
