// knn: lists against sorted distances in double: random data, data that f32 products cannot tell apart, duplicates, zero
// vectors, every cut into blocks; and the GPU against the CPU, bit for bit.
#include "kernels/knn.h"

#include <algorithm>
#include <numeric>

#include "tests/support/buffer.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

struct Problem {
    std::int64_t n, dim;
    KnnMetric metric;
    std::vector<float> x;
    bool centred = true;

    Problem(KnnMetric which, std::int64_t rows, std::int64_t cols, const Values& values)
        : n(rows), dim(cols), metric(which), x(to<float>(values)) {}
    const float* row(std::int64_t i) const { return x.data() + i * dim; }

    std::vector<double> squares() const {
        std::vector<double> s;
        for (std::int64_t i = 0; i < n; ++i) s.push_back(knn_square(row(i), dim));
        return s;
    }
    double factor() const {
        float most = 0;
        for (const float v : x) most = std::max(most, std::abs(v));
        int exponent = 0;
        std::frexp(most, &exponent);
        return std::ldexp(1.0, -exponent);
    }
    std::vector<double> centre() const {
        std::vector<double> c(static_cast<std::size_t>(dim), 0);
        const auto square = squares();
        const double power = factor();
        for (std::int64_t i = 0; centred && i < n; ++i) {
            const double length = std::sqrt(square[std::size_t(i)]);
            const double scale = metric == KnnMetric::euclidean ? power : length > 0 ? 1 / length : 0;
            for (std::int64_t k = 0; k < dim; ++k) c[std::size_t(k)] += double(row(i)[k]) * scale / double(n);
        }
        return c;
    }
    double naive_value(std::int64_t a, std::int64_t b) const {
        double distance = 0, dot = 0, aa = 0, bb = 0;
        for (std::int64_t k = 0; k < dim; ++k) {
            const double u = row(a)[k], v = row(b)[k];
            distance += (u - v) * (u - v), dot += u * v, aa += u * u, bb += v * v;
        }
        if (metric == KnnMetric::euclidean) return distance;
        return aa * bb == 0 ? 1 : 1 - std::min(1.0, dot / std::sqrt(aa * bb));
    }
};

struct Lists {
    std::int64_t m = 0;
    std::vector<double> value;
    std::vector<std::int32_t> id;
};
void expect_identical(const Lists& a, const Lists& b) {
    EXPECT_EQ(a.id, b.id);
    ASSERT_EQ(a.value.size(), b.value.size());
    EXPECT_TRUE(identical(a.value.data(), b.value.data(), a.value.size() * sizeof(double)));
}

Lists naive(const Problem& p, std::int64_t m) {
    Lists lists{m, {}, {}};
    for (std::int64_t q = 0; q < p.n; ++q) {
        std::vector<std::pair<double, std::int32_t>> all;
        for (std::int64_t k = 0; k < p.n; ++k)
            if (k != q) all.emplace_back(p.naive_value(q, k), static_cast<std::int32_t>(k));
        std::sort(all.begin(), all.end());
        all.resize(std::size_t(m), {std::numeric_limits<double>::infinity(), kKnnNoId});
        for (const auto& [value, id] : all) lists.value.push_back(value), lists.id.push_back(id);
    }
    return lists;
}

struct Cut {
    std::int64_t queries, keys;
    std::int64_t step = 1;  // key j of the sweep is vector j * step modulo n
};

template <class Dev>
struct Block {  // prepared vectors
    Padded<float, Dev> y;
    Buffer<float, Dev> base;
    Buffer<std::int32_t, Dev> ids;
    Block(const Dev& d, const KnnVectors& v, const std::vector<std::int32_t>& rows)
        : y(d, std::int64_t(rows.size()), v.x.cols, (v.x.cols + 7) / 4 * 4), base(d, rows.size()), ids(d, rows) {
        knn_prepare(d, KnnPrepare{y.mat(), base.vec(), ids.vec(), v});
    }
    KnnBlock block() const { return {y.mat(), base.vec(), ids.vec()}; }
};

template <class Dev>
Lists run(const Dev& d, const Problem& p, std::int64_t m, const Cut& cut) {
    const Padded<float, Dev> x(d, p.n, p.dim, p.dim + 3, from(p.x));
    const Buffer<double, Dev> square(d, p.squares()), centre(d, p.centre());
    KnnVectors v;
    v.metric = p.metric, v.x = x.mat(), v.centre = centre.vec();
    if (p.metric == KnnMetric::cosine) v.square = square.vec();
    if (p.metric == KnnMetric::euclidean) v.factor = p.factor();
    std::vector<std::int32_t> order;
    for (std::int64_t j = 0; j < p.n; ++j) order.push_back(static_cast<std::int32_t>(j * cut.step % p.n));
    const auto rows = [](std::int64_t first, std::int64_t n, auto&& id) {
        std::vector<std::int32_t> ids;
        for (std::int64_t i = first; i < first + n; ++i) ids.push_back(id(i));
        return ids;
    };
    Lists lists{m, {}, {}};
    for (std::int64_t q = 0; q < p.n; q += cut.queries) {
        const std::int64_t count = std::min(cut.queries, p.n - q);
        const Block<Dev> queries(d, v, rows(q, count, [](std::int64_t i) { return std::int32_t(i); }));
        const Padded<double, Dev> value(d, count, m, m + 1);
        const Buffer<std::int32_t, Dev> id(d, static_cast<std::size_t>(count * m));
        const std::int64_t ld = (cut.keys + 3) / 4 * 4;
        const Buffer<float, Dev> products(d, static_cast<std::size_t>(cut.queries * ld));
        for (std::int64_t k = 0; k < p.n; k += cut.keys) {
            const Block<Dev> keys(
                d, v, rows(k, std::min(cut.keys, p.n - k), [&](std::int64_t i) { return order[std::size_t(i)]; }));
            KnnUpdate u;
            u.value = value.mat(), u.id = id.mat(count, m), u.vectors = v, u.queries = queries.block();
            u.keys = keys.block(), u.products = products.mat(cut.queries, ld), u.start = k == 0;
            knn_update(d, u);
            EXPECT_EQ(keys.y.values().size() % std::size_t(p.dim), 0u);  // looks at the padding
        }
        EXPECT_EQ(queries.y.values().size(), std::size_t(count * p.dim));
        const Values some = value.values();
        const auto ids = id.host();
        lists.value.insert(lists.value.end(), some.begin(), some.end());
        lists.id.insert(lists.id.end(), ids.begin(), ids.end());
    }
    return lists;
}

// Values to the rounding of double; another id only where the two values differ by no more.
void expect_exact(const Problem& p, const Lists& got, const Lists& ref) {
    ASSERT_EQ(got.id.size(), ref.id.size());
    const double unit = 2.3e-16 * double(p.dim + 8);
    std::size_t bad = 0, infinite = 0;
    for (std::size_t e = 0; e < got.id.size(); ++e) {
        if (ref.id[e] == kKnnNoId) {
            bad += got.id[e] != kKnnNoId || got.value[e] != ref.value[e];
            ++infinite;
            continue;
        }
        const double tolerance = unit * (p.metric == KnnMetric::cosine ? 1 : ref.value[e]);
        bool good = std::abs(got.value[e] - ref.value[e]) <= tolerance;
        if (good && got.id[e] != ref.id[e])
            good = got.id[e] >= 0 && got.id[e] < p.n && got.id[e] != std::int64_t(e) / got.m && tolerance > 0 &&
                   std::abs(p.naive_value(std::int64_t(e) / got.m, got.id[e]) - ref.value[e]) <= tolerance;
        if (!good && ++bad == 1)
            ADD_FAILURE() << "query " << std::int64_t(e) / got.m << ", entry " << std::int64_t(e) % got.m << ": "
                          << got.id[e] << " at " << got.value[e] << " instead of " << ref.id[e] << " at "
                          << ref.value[e];
    }
    EXPECT_EQ(bad, 0u) << "of " << got.id.size() << " entries";
    EXPECT_LT(infinite, got.id.size() + (p.n == 1));
    for (std::size_t e = 1; e < got.id.size(); ++e) {
        if (std::int64_t(e) % got.m == 0) continue;
        EXPECT_TRUE(got.value[e - 1] < got.value[e] ||
                    (got.value[e - 1] == got.value[e] && got.id[e - 1] < got.id[e]) || got.id[e] == kKnnNoId);
    }
}

Problem random_problem(KnnMetric metric, std::int64_t n, std::int64_t dim) {
    return Problem(metric, n, dim, random_values(std::size_t(n * dim), 11));
}
// Clusters so tight and so far apart that f32 products see each as one point, wherever the origin.
Problem tight_clusters(KnnMetric metric, std::int64_t n, std::int64_t dim) {
    Values v = random_values(std::size_t(n * dim), 12, 1e-3);
    const Values centres = random_values(std::size_t(3 * dim), 13, 100);
    for (std::int64_t i = 0; i < n * dim; ++i)
        v[std::size_t(i)] += 500 + centres[std::size_t(i / dim % 3 * dim + i % dim)];
    return Problem(metric, n, dim, v);
}
// A third of the vectors are zero, a third are copies (as they are, or doubled) of the rest.
Problem copies_and_zeros(KnnMetric metric, std::int64_t n, std::int64_t dim) {
    Values v = random_values(std::size_t(n * dim), 14);
    for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t k = 0; k < dim; ++k) {
            double& value = v[std::size_t(i * dim + k)];
            if (i % 3 == 1) value = 0;
            if (i % 3 == 2) value = v[std::size_t(i / 9 % 4 * 3 * dim + k)] * (i % 2 + 1);
        }
    return Problem(metric, n, dim, v);
}
// Small integers: distances are exact, and most are shared by many.
Problem lattice(KnnMetric metric, std::int64_t n, std::int64_t dim) {
    const auto ints = random_ints(std::size_t(n * dim), 15, 0, 4);
    return Problem(metric, n, dim, Values(ints.begin(), ints.end()));
}

template <class Dev>
void check_all(const Dev& d) {
    using Make = Problem (*)(KnnMetric, std::int64_t, std::int64_t);
    const std::pair<const char*, Make> kinds[] = {
        {"random", random_problem}, {"clusters", tight_clusters}, {"copies", copies_and_zeros}, {"lattice", lattice}};
    struct Size {
        std::int64_t n, dim, m;
    };
    for (const auto& [name, make] : kinds)
        for (const KnnMetric metric : {KnnMetric::euclidean, KnnMetric::cosine})
            for (const Size s :
                 {Size{301, 1, 5}, {301, 3, 16}, {530, 64, 32}, {301, 100, 33}, {150, 64, 64}, {7, 3, 20}})
                for (const bool centred : {true, false}) {
                    SCOPED_TRACE(testing::Message() << name << (metric == KnnMetric::cosine ? " cosine " : " ") << s.n
                                                    << " x " << s.dim << ", m " << s.m);
                    Problem p = make(metric, s.n, s.dim);
                    p.centred = centred;
                    expect_exact(p, run(d, p, s.m, {s.n, s.n, 1}), naive(p, s.m));
                }
}

template <class Dev>
void check_cuts(const Dev& d) {
    for (const auto make : {random_problem, tight_clusters, copies_and_zeros, lattice})
        for (const KnnMetric metric : {KnnMetric::euclidean, KnnMetric::cosine}) {
            const Problem p = make(metric, 700, 20);
            const Lists whole = run(d, p, 40, {700, 700, 1});
            for (const Cut& cut : {Cut{700, 700, 9}, {100, 700, 1}, {700, 90, 1}, {257, 129, 503}, {700, 21, 3}})
                expect_identical(run(d, p, 40, cut), whole);
        }
}

TEST(Knn, ExactNeighbours) { check_all(Cpu{}); }
TEST(Knn, CutIntoBlocksAndOrderDoNotMatter) { check_cuts(Cpu{}); }
TEST(Knn, ThreadsDoNotMatter) {
    const Problem p = random_problem(KnnMetric::euclidean, 700, 9);
    expect_identical(run(Cpu{1}, p, 8, {300, 200, 3}), run(Cpu{3}, p, 8, {300, 200, 3}));
}
TEST(Knn, AnyScale) {  // squares beyond f32 either way
    for (const double scale : {1e-30, 1e-42, 1e30}) {
        Problem p(KnnMetric::euclidean, 200, 7, random_uniform(1400, 16, -scale, scale));
        expect_exact(p, run(Cpu{}, p, 6, {200, 64, 1}), naive(p, 6));
        p.metric = KnnMetric::cosine;
        expect_exact(p, run(Cpu{}, p, 6, {200, 64, 1}), naive(p, 6));
    }
}
TEST(Knn, DuplicatesAreNeighboursInOrderOfIds) {
    const Problem p(KnnMetric::euclidean, 50, 2, Values(100, 3.5));
    const Lists lists = run(Cpu{}, p, 4, {50, 7, 3});
    EXPECT_EQ(std::vector<std::int32_t>(lists.id.begin() + 8, lists.id.begin() + 12),
              (std::vector<std::int32_t>{0, 1, 3, 4}));
    EXPECT_EQ(lists.value, std::vector<double>(200, 0.0));
}
TEST(Knn, BrokenContractIsRefused) {
    const Problem p = random_problem(KnnMetric::euclidean, 10, 3);
    EXPECT_THROW(run(Cpu{}, p, 65, {10, 10, 1}), ContractError);
}

#if FIEDLER_CUDA
TEST(Knn, GpuExactNeighbours) {
    FIEDLER_GPU_OR_SKIP();
    check_all(gpu());
}
TEST(Knn, GpuCutIntoBlocksAndOrderDoNotMatter) {
    FIEDLER_GPU_OR_SKIP();
    check_cuts(gpu());
}
TEST(Knn, GpuMatchesCpuBitForBit) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto make : {random_problem, tight_clusters, copies_and_zeros, lattice})
        for (const KnnMetric metric : {KnnMetric::euclidean, KnnMetric::cosine})
            for (const std::int64_t dim : {1, 31, 300}) {
                const Problem p = make(metric, 1500, dim);
                const Lists first = run(gpu(), p, 24, {700, 1100, 7});
                expect_identical(first, run(Cpu{}, p, 24, {1500, 1500, 1}));
                expect_identical(first, run(gpu(), p, 24, {700, 1100, 7}));
            }
}
#endif

}  // namespace
}  // namespace fiedler::test
