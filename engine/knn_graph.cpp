// Blocks of vectors against blocks of vectors, in memory planned by an arena; weights; features.
#include "engine/knn_graph.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

#include "engine/arena.h"
#include "engine/error.h"
#include "engine/rng.h"
#include "kernels/parallel.h"

namespace fiedler {

const char* name_of(KnnMetric m) { return m == KnnMetric::cosine ? "cosine" : "euclidean"; }
const char* name_of(KnnWeight w) {
    return w == KnnWeight::binary ? "binary" : w == KnnWeight::similarity ? "similarity" : "gaussian";
}
const char* name_of(FeatureSimilarity s) {
    return s == FeatureSimilarity::absolute ? "absolute" : s == FeatureSimilarity::cosine ? "cosine" : "correlation";
}

namespace {

using Size = std::size_t;

void check_input(std::int64_t n, std::int64_t d, const KnnOptions& o) {
    if (n < 1 || n > kKnnNoId) input_error("{} vectors: must be from 1 to {}", n, kKnnNoId);
    if (d < 1 || d > kKnnMaxDim)
        input_error("vectors of {} dimensions: must be from 1 to {}; reduce or sample them", d, kKnnMaxDim);
    if (o.neighbours < 1 || o.neighbours > kKnnMost)
        input_error("neighbours: {} must be from 1 to {}", o.neighbours, kKnnMost);
}

// ---- what the kernels want to know of the vectors before ---------------------------------------------------------

struct Preparation {
    std::vector<double> square;  // cosine
    std::vector<double> centre;
    double factor = 1;
};

// The first vector with a value that is not finite ends the run; `most`: the largest magnitude.
void check_finite(const Cpu& cpu, const float* x, std::int64_t n, std::int64_t d, float& most) {
    std::vector<float> largest(static_cast<Size>(n));  // of each vector; NaN and infinity stay
    parallel_for(cpu, n, [&](std::int64_t i) {
        float m = 0;
        for (std::int64_t k = 0; k < d; ++k) {
            const float a = std::abs(x[i * d + k]);
            m = a <= m ? m : a;  // a NaN comes in, and leaves only for a number that follows
            if (!std::isfinite(a)) {
                m = a;
                break;
            }
        }
        largest[static_cast<Size>(i)] = m;
    });
    most = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const float m = largest[static_cast<Size>(i)];
        if (std::isfinite(m)) {
            most = std::max(most, m);
            continue;
        }
        std::int64_t k = 0;
        while (std::isfinite(x[i * d + k])) ++k;
        input_error("vector {}, component {}: {} is not finite; remove or replace it", i, k, x[i * d + k]);
    }
}

Preparation prepare(const Cpu& cpu, const float* x, std::int64_t n, std::int64_t d, KnnMetric metric) {
    Preparation p;
    float most = 0;
    check_finite(cpu, x, n, d, most);
    const bool cosine = metric == KnnMetric::cosine;
    int exponent = 0;
    std::frexp(most, &exponent);
    if (!cosine) p.factor = std::ldexp(1.0, -exponent);
    if (cosine) {
        p.square.resize(static_cast<Size>(n));
        parallel_for(cpu, n, [&](std::int64_t i) { p.square[static_cast<Size>(i)] = knn_square(x + i * d, d); });
    }
    p.centre.assign(static_cast<Size>(d), 0);
    sum_over_rows(cpu, n, d, p.centre.data(), [&](std::int64_t first, std::int64_t last, double* sum) {
        for (std::int64_t i = first; i < last; ++i) {
            const double square = cosine ? p.square[static_cast<Size>(i)] : 1;
            const double scale = square > 0 ? p.factor / std::sqrt(square) : 0;
            for (std::int64_t k = 0; k < d; ++k) sum[k] += scale * double(x[i * d + k]);
        }
    });
    for (double& c : p.centre) c /= static_cast<double>(n);
    return p;
}

// ---- the sweep over blocks ---------------------------------------------------------------------------------------

struct Blocks {
    std::int64_t queries, keys;
};

// Device memory of a sweep, by name. Arrays that are there on the host already are used in place on the CPU.
struct SweepMemory {
    Vec<float> x;
    Vec<double> square, centre;
    Vec<std::int32_t> order;
    Mat<float> query_y, key_y, products;
    Vec<float> query_base, key_base;
    Mat<double> value;
    Mat<std::int32_t> id;
    Vec<std::byte> workspace;

    SweepMemory(Arena& arena, bool on_host, std::int64_t n, std::int64_t d, std::int64_t m, bool cosine, Blocks b) {
        const auto round4 = [](std::int64_t count) { return (count + 3) / 4 * 4; };
        constexpr auto kKept = Lifetime::persistent, kScratch = Lifetime::scratch;
        const std::int64_t ld = round4(d);
        if (!on_host) {
            x = arena.vec<float>("vectors", n * d, kKept);
            square = arena.vec<double>("squared norms", cosine ? n : 0, kKept);
            centre = arena.vec<double>("centre", d, kKept);
            order = arena.vec<std::int32_t>("order", n, kKept);
            workspace = arena.vec<std::byte>("cuBLASLt workspace", std::int64_t{32} << 20, kScratch);
        }
        const auto y = [&](const char* name, std::int64_t rows) {
            Mat<float> all = arena.mat<float>(name, rows, ld, kScratch);
            return all.columns(0, d);
        };
        query_y = y("queries", b.queries);
        key_y = y("keys", b.keys);
        query_base = arena.vec<float>("query bounds", b.queries, kScratch);
        key_base = arena.vec<float>("key bounds", b.keys, kScratch);
        products = arena.mat<float>("products", b.queries, round4(b.keys), kScratch);
        value = arena.mat<double>("values", b.queries, m, kScratch);
        id = arena.mat<std::int32_t>("neighbours", b.queries, m, kScratch);
    }
};

// The largest blocks that fit the budget. None does: the smallest, which the arena will refuse.
Blocks choose_blocks(bool on_host, std::int64_t n, std::int64_t d, std::int64_t m, bool cosine, Size budget) {
    constexpr std::int64_t kLeast = 256;
    Blocks b = on_host ? Blocks{4096, 1024} : Blocks{8192, 8192};
    b = {std::min(b.queries, n), std::min(b.keys, n)};
    for (;;) {
        Arena arena;
        SweepMemory(arena, on_host, n, d, m, cosine, b);
        if (budget == 0 || arena.peak() <= budget || std::max(b.queries, b.keys) <= kLeast) return b;
        std::int64_t& larger = b.queries >= b.keys ? b.queries : b.keys;
        larger = std::max(kLeast, (larger + 1) / 2);
    }
}

// Vectors in an order that has nothing to do with theirs (knn.h says why).
std::vector<std::int32_t> shuffled(std::int64_t n) {
    std::vector<std::int32_t> order(static_cast<Size>(n));
    const rng::Permutation permutation(static_cast<std::uint64_t>(n), 0, 0);
    for (Size i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(permutation(i));
    return order;
}

template <class Dev>
struct Sweep {
    const Dev& dev;
    const SweepMemory& memory;
    KnnVectors vectors;
    Vec<const std::int32_t> order;  // on the device

    KnnBlock block(const Mat<float>& y, const Vec<float>& base, std::int64_t first, std::int64_t rows) const {
        const KnnPrepare p{y.slice_rows(0, rows), base.slice(0, rows), order.slice(first, rows), vectors};
        knn_prepare(dev, p);
        return {p.y, p.base, p.ids};
    }
    // The lists of queries [first, first + rows) of the order, in memory.value and memory.id.
    void search(std::int64_t first, std::int64_t rows, std::int64_t block_keys) const {
        KnnUpdate u;
        u.vectors = vectors;
        u.value = memory.value.slice_rows(0, rows);
        u.id = memory.id.slice_rows(0, rows);
        u.products = memory.products;
        u.queries = block(memory.query_y, memory.query_base, first, rows);
        const std::int64_t n = vectors.x.rows;
        for (std::int64_t k = 0; k < n; k += block_keys) {
            u.keys = block(memory.key_y, memory.key_base, k, std::min(block_keys, n - k));
            u.start = k == 0;
            knn_update(dev, u);
        }
    }
};

template <class T, class Dev>
const T* on_device(const Dev& dev, const Vec<T>& to, const T* from, std::int64_t n) {
    if (!to) return from;  // used in place, or absent
    copy_to_device(dev, to.data, from, static_cast<Size>(n) * sizeof(T));
    return to.data;
}

template <class Dev>
void sweep(Dev& dev, const float* x, std::int64_t n, std::int64_t d, const Preparation& p, const KnnOptions& o,
           Size budget, KnnLists& lists) {
    constexpr bool on_host = std::is_same_v<std::remove_const_t<Dev>, Cpu>;
    const bool cosine = o.metric == KnnMetric::cosine;
    const std::int64_t m = lists.per_node;
    const Blocks blocks = choose_blocks(on_host, n, d, m, cosine, budget);
    Arena arena;
    SweepMemory(arena, on_host, n, d, m, cosine, blocks);
    arena.commit(memory_of(dev), budget);
    const SweepMemory memory(arena, on_host, n, d, m, cosine, blocks);
    if constexpr (!on_host) {
        dev.workspace = memory.workspace.data;
        dev.workspace_bytes = static_cast<Size>(memory.workspace.size);
    }
    const std::vector<std::int32_t> order = shuffled(n);
    Sweep<Dev> s{dev, memory, {}, {on_device(dev, memory.order, order.data(), n), n}};
    s.vectors.metric = o.metric;
    s.vectors.x = {on_device(dev, memory.x, x, n * d), n, d};
    if (cosine) s.vectors.square = {on_device(dev, memory.square, p.square.data(), n), n};
    s.vectors.centre = {on_device(dev, memory.centre, p.centre.data(), d), d};
    s.vectors.factor = p.factor;

    std::vector<double> value(static_cast<Size>(blocks.queries * m));
    std::vector<std::int32_t> id(value.size());
    for (std::int64_t q = 0; q < n; q += blocks.queries) {
        const std::int64_t rows = std::min(blocks.queries, n - q);
        s.search(q, rows, blocks.keys);
        copy_to_host(dev, value.data(), memory.value.data, static_cast<Size>(rows * m) * sizeof(double));
        copy_to_host(dev, id.data(), memory.id.data, static_cast<Size>(rows * m) * sizeof(std::int32_t));
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t to = order[static_cast<Size>(q + r)] * m;
            std::copy_n(value.begin() + r * m, m, lists.values.begin() + to);
            std::copy_n(id.begin() + r * m, m, lists.ids.begin() + to);
        }
        if (o.progress) o.progress(q + rows, n);
    }
}

#if FIEDLER_CUDA
void sweep_on_gpu(const float* x, std::int64_t n, std::int64_t d, const Preparation& p, const KnnOptions& o,
                  KnnLists& lists) {
    Cuda dev(0);
    Size free_bytes = 0, total_bytes = 0;
    memory_info(dev, free_bytes, total_bytes);
    free_bytes -= free_bytes / 20;  // the driver takes its share of what it calls free
    sweep(dev, x, n, d, p, o, o.budget > 0 ? std::min(o.budget, free_bytes) : free_bytes, lists);
}
#else
void sweep_on_gpu(const float*, std::int64_t, std::int64_t, const Preparation&, const KnnOptions&, KnnLists&) {}
#endif

// ---- weights -----------------------------------------------------------------------------------------------------

struct Weigher {
    const KnnLists& lists;
    KnnMetric metric;
    KnnWeight weight;

    double square_of(double value) const { return metric == KnnMetric::cosine ? 2 * value : value; }
    double scale_of(std::int64_t i) const {
        return std::sqrt(square_of(lists.values[static_cast<Size>((i + 1) * lists.per_node - 1)]));
    }
    // 0: no edge.
    float operator()(std::int64_t i, std::int64_t j, double value) const {
        if (metric == KnnMetric::cosine && 1 - value < kLeastSimilarity) return 0;
        if (weight == KnnWeight::binary) return 1;
        double w = 1;
        if (weight == KnnWeight::similarity)
            w = metric == KnnMetric::cosine ? 1 - value : 1 / (1 + std::sqrt(value));
        else if (const double square = square_of(value); square > 0)
            w = std::max(kLeastWeight, std::exp(-square / (scale_of(i) * scale_of(j))));  // a scale of 0: exp(-inf)
        return static_cast<float>(std::max(w, double(std::numeric_limits<float>::min())));
    }
};

Graph graph_of(const KnnLists& lists, const KnnOptions& o) {
    const Weigher weigh{lists, o.metric, o.weight};
    const std::int64_t m = lists.per_node;
    std::vector<Edge> edges(lists.ids.size());
    parallel_for(Cpu{o.threads}, lists.nodes, [&](std::int64_t i) {
        for (std::int64_t e = i * m; e < (i + 1) * m; ++e) {
            const std::int32_t j = lists.ids[static_cast<Size>(e)];
            edges[static_cast<Size>(e)] = {static_cast<std::int32_t>(i), j,
                                           weigh(i, j, lists.values[static_cast<Size>(e)])};
        }
    });
    // Listed both ways an edge has the same weight twice, of which build_graph takes the mean; weight 0 it drops.
    return build_graph(lists.nodes, std::move(edges));
}

}  // namespace

KnnLists nearest_neighbours(const float* vectors, std::int64_t n, std::int64_t d, const KnnOptions& o) {
    check_input(n, d, o);
    if (std::string why; o.cuda && cuda_device_count(&why) == 0) input_error("no GPU: {}; use the CPU", why);
    const Cpu cpu{o.threads};
    const Preparation p = prepare(cpu, vectors, n, d, o.metric);
    KnnLists lists;
    lists.nodes = n;
    lists.per_node = std::min(o.neighbours, n - 1);
    lists.ids.resize(static_cast<Size>(n * lists.per_node));
    lists.values.resize(lists.ids.size());
    if (lists.per_node == 0) return lists;  // one vector
    if (o.cuda)
        sweep_on_gpu(vectors, n, d, p, o, lists);
    else
        sweep(cpu, vectors, n, d, p, o, 0, lists);
    return lists;
}

Graph knn_graph(const float* vectors, std::int64_t n, std::int64_t d, const KnnOptions& o) {
    return graph_of(nearest_neighbours(vectors, n, d, o), o);
}

// ---- features ----------------------------------------------------------------------------------------------------

namespace {

// Column k of the vectors as row k, as the similarity asks for it.
std::vector<float> columns_of(const Cpu& cpu, const float* x, std::int64_t n, std::int64_t d, FeatureSimilarity s) {
    std::vector<float> columns(static_cast<Size>(n * d));
    constexpr std::int64_t kTile = 32;
    parallel_for(cpu, (d + kTile - 1) / kTile, [&](std::int64_t tile) {
        const std::int64_t first = tile * kTile, last = std::min(first + kTile, d);
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t k = first; k < last; ++k) columns[static_cast<Size>(k * n + i)] = x[i * d + k];
        for (std::int64_t k = first; k < last; ++k) {
            float* column = columns.data() + k * n;
            if (s == FeatureSimilarity::absolute)
                for (std::int64_t i = 0; i < n; ++i) column[i] = std::abs(column[i]);
            if (s != FeatureSimilarity::correlation) continue;
            const auto [least, most] = std::minmax_element(column, column + n);
            const bool constant = *least == *most;  // its mean need not be exact
            const double mean = std::accumulate(column, column + n, 0.0) / static_cast<double>(n);
            for (std::int64_t i = 0; i < n; ++i)
                column[i] = constant ? 0.f : static_cast<float>(double(column[i]) - mean);
        }
    });
    return columns;
}

// Rows and columns `nodes` of the Laplacian; no edge leaves them.
Eigen::MatrixXd part_of(const LaplacianMatrix<double>& l, const std::vector<std::int32_t>& nodes,
                        const std::vector<std::int32_t>& place) {
    const auto n = static_cast<Eigen::Index>(nodes.size());
    Eigen::MatrixXd part = Eigen::MatrixXd::Zero(n, n);
    for (Eigen::Index r = 0; r < n; ++r) {
        const auto i = static_cast<Size>(nodes[static_cast<Size>(r)]);
        for (auto e = static_cast<Size>(l.offsets[i]); e < static_cast<Size>(l.offsets[i + 1]); ++e)
            part(r, place[static_cast<Size>(l.columns[e])]) = l.values[e];
    }
    return part;
}

void fix_sign(Eigen::Ref<Eigen::VectorXd> v) {
    const double most = v.cwiseAbs().maxCoeff();
    Eigen::Index i = 0;
    while (std::abs(v(i)) < most * (1 - 1e-9)) ++i;  // nearly equal magnitudes: rounding must not choose
    if (v(i) < 0) v = -v;
}

struct Pairs {  // of one component
    Eigen::VectorXd values;
    Eigen::MatrixXd vectors;  // columns
};
Pairs eigenpairs(const Eigen::MatrixXd& part, std::int32_t number) {
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(part);
    if (solver.info() != Eigen::Success)
        run_error("the eigenvalues of component {} of the feature graph did not converge", number);
    Pairs p{solver.eigenvalues(), solver.eigenvectors()};
    p.values(0) = 0;  // known: connected
    p.vectors.col(0).setConstant(1 / std::sqrt(static_cast<double>(part.rows())));
    for (Eigen::Index k = 1; k < part.rows(); ++k) fix_sign(p.vectors.col(k));
    return p;
}

}  // namespace

Graph feature_graph(const float* vectors, std::int64_t n, std::int64_t d, const FeatureOptions& f) {
    KnnOptions o;
    static_cast<KnnRun&>(o) = f;
    o.neighbours = f.neighbours, o.metric = KnnMetric::cosine, o.weight = f.weight;
    check_input(n, d, o);
    if (n > kKnnMaxDim) input_error("a feature graph of {} vectors: at most {}; sample them", n, kKnnMaxDim);
    const Cpu cpu{o.threads};
    float most = 0;
    check_finite(cpu, vectors, n, d, most);  // in terms of the vectors, before they are turned
    return knn_graph(columns_of(cpu, vectors, n, d, f.similarity).data(), d, n, o);
}

HostLaplacian feature_laplacian(const Graph& g, std::int64_t* components) {
    if (g.nodes < 1 || g.nodes > kMostFeatures)
        input_error("a feature graph of {} nodes: must be from 1 to {}", g.nodes, kMostFeatures);
    const LaplacianMatrix<double> l = laplacian_of<double>(g, LaplacianKind::combinatorial);
    const Components parts = find_components(g);
    if (components) *components = parts.count;

    const auto dim = static_cast<Size>(g.nodes);
    std::vector<std::vector<std::int32_t>> nodes(static_cast<Size>(parts.count));
    std::vector<std::int32_t> place(dim);
    for (Size i = 0; i < dim; ++i) {
        auto& mine = nodes[static_cast<Size>(parts.of_node[i])];
        place[i] = static_cast<std::int32_t>(mine.size());
        mine.push_back(static_cast<std::int32_t>(i));
    }
    struct Place {
        double value;
        Size part;
        Eigen::Index column;
    };
    std::vector<Pairs> pairs;
    std::vector<Place> order;
    for (Size c = 0; c < nodes.size(); ++c) {
        pairs.push_back(eigenpairs(part_of(l, nodes[c], place), static_cast<std::int32_t>(c)));
        for (Eigen::Index k = 0; k < pairs[c].values.size(); ++k) order.push_back({pairs[c].values(k), c, k});
    }
    std::stable_sort(order.begin(), order.end(), [](const Place& a, const Place& b) { return a.value < b.value; });

    HostLaplacian h;
    h.dim = static_cast<std::int32_t>(g.nodes);
    h.offsets.assign(l.offsets.begin(), l.offsets.end());
    h.columns.assign(l.columns.begin(), l.columns.end());
    h.values.assign(l.values.begin(), l.values.end());
    h.eigenvectors.assign(dim * dim, 0);
    for (Size m = 0; m < dim; ++m) {
        const Place& from = order[m];
        h.eigenvalues.push_back(from.value);
        for (Size r = 0; r < nodes[from.part].size(); ++r)
            h.eigenvectors[m * dim + static_cast<Size>(nodes[from.part][r])] =
                pairs[from.part].vectors(static_cast<Eigen::Index>(r), from.column);
    }
    return h;
}

}  // namespace fiedler
