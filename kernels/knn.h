// kernels/knn.h: exact nearest neighbours by brute force: a block of queries against a block of keys at a time, the m
// best of each query in a list that is carried from block to block.
//
//   value(a, b)   Euclidean: |a - b|^2        cosine: 1 - a'b / (|a| |b|), 1 when either vector is zero
//
// A list is ordered by (value, id): ties go to the smaller id. A vector is no neighbour of itself; its duplicates are.
//
// Values are computed directly, in double: products of f32 lose small distances far from the origin. But most pairs
// are ruled out by an f32 product of matrices. With y = s a - c (s: 1 / |a| or a power of two; c: the mean of all s a)
//   s^2 |a - b|^2 = |y_a - y_b|^2  >=  base_a + base_b - 2 y_a'y_b,   base = (1 - slack(d)) |y|^2
// where slack covers what any order of f32 sums, the rounding of y, and that of the bound itself can lose (Higham,
// Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Only a pair whose bound is not above the value of
// the last list entry is computed directly, so that the lists are exact whatever the data; data tighter than f32 can
// resolve only costs more direct computations. Keys should come in random order: then about m ln(n / m) are computed
// for a query of well separated data, where sorted keys can cost all n.
//
// Shapes     x: [n, d] f32, any ld, finite, d <= kKnnMaxDim; ids: rows of x, each once among all blocks of keys
//            y: [rows, d] f32, any ld; base: [rows]; products: [>= queries, >= keys] scratch
//            lists: [queries, m], m in [1, kKnnMost], value f64, id i32; value +inf and id INT32_MAX where empty
//            Cuda: base and rows of products 16-byte aligned
// Writes     prepare: y, base. update: the lists (read first unless `start`), products destroyed.
// Numerics   Values: differences and sums in double, in 32 interleaved sums added as a tree (knn_value()): the same bits
//            on Cpu and Cuda. Lists do not depend on the cut into blocks, their order, threads or scheduling.
//            Cuda: products by cuBLASLt in f32 (no TF32); dev.workspace is used.
#pragma once
#include <limits>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"

namespace fiedler {

enum class KnnMetric { euclidean, cosine };

inline constexpr std::int64_t kKnnMost = 64;
inline constexpr std::int64_t kKnnMaxDim = 1 << 22;
inline constexpr std::int32_t kKnnNoId = std::numeric_limits<std::int32_t>::max();

// All vectors.
struct KnnVectors {
    KnnMetric metric = KnnMetric::euclidean;
    Mat<const float> x;
    Vec<const double> square;  // cosine: [n], knn_square() of each; Euclidean: absent
    Vec<const double> centre;  // [d] c; anything finite is right, the mean is fast
    double factor = 1;         // Euclidean: s, a power of two with all |s x| < 1
};
struct KnnBlock {
    Mat<const float> y;
    Vec<const float> base;
    Vec<const std::int32_t> ids;
};
struct KnnPrepare {
    Mat<float> y;
    Vec<float> base;
    Vec<const std::int32_t> ids;
    KnnVectors vectors;
};
struct KnnUpdate {
    Mat<double> value;
    Mat<std::int32_t> id;
    KnnVectors vectors;
    KnnBlock queries, keys;
    Mat<float> products;
    bool start = false;  // the lists are empty, whatever they hold
};

inline bool is_vectors(const KnnVectors& v) {
    return is_shape(v.x, v.x.rows, v.x.cols) && v.x.cols >= 1 && v.x.cols <= kKnnMaxDim && v.x.rows <= kKnnNoId &&
           is_shape(v.centre, v.x.cols) && (v.metric == KnnMetric::euclidean || is_shape(v.square, v.x.rows));
}
inline bool is_block(const KnnBlock& b, std::int64_t dim) {
    return b.y.rows >= 1 && is_shape(b.y, b.y.rows, dim) && is_shape(b.base, b.y.rows) && is_shape(b.ids, b.y.rows);
}
inline void check(const KnnPrepare& p) {
    FIEDLER_REQUIRE("knn", is_vectors(p.vectors) && is_shape(p.y, p.y.rows, p.vectors.x.cols));
    FIEDLER_REQUIRE("knn", p.y.rows >= 1 && is_shape(p.base, p.y.rows) && is_shape(p.ids, p.y.rows));
}
inline void check(const KnnUpdate& p) {
    const auto rows = p.queries.y.rows, m = p.value.cols;
    FIEDLER_REQUIRE("knn", is_vectors(p.vectors));
    FIEDLER_REQUIRE("knn", is_block(p.queries, p.vectors.x.cols) && is_block(p.keys, p.vectors.x.cols));
    FIEDLER_REQUIRE("knn", m >= 1 && m <= kKnnMost && is_shape(p.value, rows, m) && is_shape(p.id, rows, m));
    FIEDLER_REQUIRE("knn", p.products && p.products.rows >= rows && p.products.cols >= p.keys.y.rows &&
                               p.products.ld >= p.products.cols);
}

inline Traffic traffic(const KnnPrepare& p) {
    const double n = double(p.y.rows) * double(p.y.cols);
    return {2 * n * sizeof(float), 4 * n};
}
inline Traffic traffic(const KnnUpdate& p) {
    const double q = double(p.queries.y.rows), k = double(p.keys.y.rows), d = double(p.vectors.x.cols);
    const double lists = (p.start ? 1 : 2) * q * double(p.value.cols) * (sizeof(double) + sizeof(std::int32_t));
    return {(q + k) * d * sizeof(float) + lists, 2 * q * k * d};
}

// Relative to |y_a|^2 + |y_b|^2: (d + 16) roundings, of which 16 are not the product's.
inline double knn_slack(std::int64_t dim) {
    const double g = double(dim + 16) * 0x1p-24;
    return g / (1 - g);
}
// A pair is computed when its bound base_a + base_b - 2 y_a'y_b is at most knn_limit(value of the last list entry):
// the value in the bound's units, and what double arithmetic may have lost in it. An empty entry: +inf.
struct KnnLimit {
    double scale = 1, offset = 0;
};
inline KnnLimit knn_limit(const KnnVectors& v) {
    const double e = double(v.x.cols / 32 + 64) * 0x1p-51;
    constexpr double kUnderflow = 0x1p-100;
    if (v.metric == KnnMetric::cosine) return {2 * (1 + e), 2 * e + kUnderflow};
    return {v.factor * v.factor * (1 + e), kUnderflow};
}

// |x|^2 and value(a, b) on the host, in the order of sums of the contract (knn_cpu.cpp).
double knn_square(const float* x, std::int64_t dim);
double knn_value(const KnnVectors&, std::int64_t a, std::int64_t b);

void knn_prepare(const Cpu&, const KnnPrepare&);
void knn_update(const Cpu&, const KnnUpdate&);
void knn_prepare(const Cuda&, const KnnPrepare&);
void knn_update(const Cuda&, const KnnUpdate&);

}  // namespace fiedler
