// kernels/knn_cpu.cpp: nearest neighbours on the CPU (contract in knn.h). A thread takes a tile of queries: one Eigen
// product with all keys of the block, then a scan of each row.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "kernels/knn.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

constexpr int kLanes = 32;  // of a warp, which sums in the same order

// sum_i of terms added by add(sum, i): lane i % 32 has its own sum; the sums are added as a tree.
template <class Add>
double sum_in_lanes(std::int64_t n, Add&& add) {
    double lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] = add(lanes[l], i + l);
    for (int l = 0; i + l < n; ++l) lanes[l] = add(lanes[l], i + l);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
}
double dot(const float* a, const float* b, std::int64_t n) {
    return sum_in_lanes(n, [=](double sum, std::int64_t i) { return std::fma(double(a[i]), double(b[i]), sum); });
}
double distance_square(const float* a, const float* b, std::int64_t n) {
    return sum_in_lanes(n, [=](double sum, std::int64_t i) {
        const double difference = double(a[i]) - double(b[i]);
        return std::fma(difference, difference, sum);
    });
}

bool is_zero(const KnnVectors& v, std::int64_t i) { return v.metric == KnnMetric::cosine && v.square.data[i] == 0; }

// One query's list: m entries in order.
class List {
  public:
    List(const KnnUpdate& p, std::int64_t row)
        : vectors_(p.vectors),
          limit_(knn_limit(p.vectors)),
          m_(p.value.cols),
          self_(p.queries.ids.data[row]),
          zero_(is_zero(p.vectors, self_)),
          base_(double(p.queries.base.data[row])),
          value_(p.value.row(row)),
          id_(p.id.row(row)) {
        if (p.start) {
            std::fill(value_, value_ + m_, std::numeric_limits<double>::infinity());
            std::fill(id_, id_ + m_, kKnnNoId);
        }
        renew();
    }
    float bound() const { return bound_; }  // compute no pair whose base_b - 2 y_a'y_b is above
    void offer(std::int32_t id) {
        if (id == self_) return;
        const double least = zero_ || is_zero(vectors_, id) ? 1 : 0;
        if (!before_last(least, id)) return;  // many duplicates, many zeros
        const double value = knn_value(vectors_, self_, id);
        if (!before_last(value, id)) return;
        std::int64_t at = m_ - 1;
        for (; at > 0 && precedes(value, id, at - 1); --at) value_[at] = value_[at - 1], id_[at] = id_[at - 1];
        value_[at] = value, id_[at] = id;
        renew();
    }

  private:
    bool precedes(double value, std::int32_t id, std::int64_t entry) const {
        return value < value_[entry] || (value == value_[entry] && id < id_[entry]);
    }
    bool before_last(double value, std::int32_t id) const { return precedes(value, id, m_ - 1); }
    void renew() {
        const double bound = value_[m_ - 1] * limit_.scale + limit_.offset - base_;
        bound_ = static_cast<float>(bound);
        if (double(bound_) < bound) bound_ = std::nextafter(bound_, std::numeric_limits<float>::infinity());
    }
    const KnnVectors& vectors_;
    const KnnLimit limit_;
    const std::int64_t m_;
    const std::int32_t self_;
    const bool zero_;
    const double base_;
    double* value_;
    std::int32_t* id_;
    float bound_ = 0;
};

void scan_row(const KnnUpdate& p, std::int64_t row, const float* product) {
    constexpr std::int64_t kChunk = 64;
    const float* base = p.keys.base.data;
    const std::int64_t keys = p.keys.y.rows;
    List list(p, row);
    for (std::int64_t first = 0; first < keys; first += kChunk) {
        const std::int64_t last = std::min(first + kChunk, keys);
        const float bound = list.bound();
        int some = 0;  // no early exit: the loop vectorises
        for (std::int64_t j = first; j < last; ++j) some |= base[j] - 2 * product[j] <= bound ? 1 : 0;
        if (!some) continue;
        for (std::int64_t j = first; j < last; ++j)
            if (base[j] - 2 * product[j] <= list.bound()) list.offer(p.keys.ids.data[j]);
    }
}

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using ConstView = Eigen::Map<const RowMajor, 0, Eigen::OuterStride<>>;
using View = Eigen::Map<RowMajor, 0, Eigen::OuterStride<>>;

}  // namespace

double knn_square(const float* x, std::int64_t dim) { return dot(x, x, dim); }

double knn_value(const KnnVectors& v, std::int64_t a, std::int64_t b) {
    if (v.metric == KnnMetric::euclidean) return distance_square(v.x.row(a), v.x.row(b), v.x.cols);
    const double square = v.square.data[a] * v.square.data[b];
    if (square == 0) return 1;
    return 1 - std::min(1.0, dot(v.x.row(a), v.x.row(b), v.x.cols) / std::sqrt(square));
}

void knn_prepare(const Cpu& d, const KnnPrepare& p) {
    check(p);
    const KnnVectors& v = p.vectors;
    const double keep = 1 - knn_slack(v.x.cols);
    parallel_for(d, p.y.rows, [&](std::int64_t r) {
        const std::int64_t i = p.ids.data[r];
        const double scale = v.metric == KnnMetric::euclidean ? v.factor
                             : is_zero(v, i)                  ? 0
                                                              : 1 / std::sqrt(v.square.data[i]);
        const float* x = v.x.row(i);
        float* y = p.y.row(r);
        for (std::int64_t c = 0; c < v.x.cols; ++c) y[c] = static_cast<float>(double(x[c]) * scale - v.centre.data[c]);
        p.base.data[r] = static_cast<float>(keep * knn_square(y, v.x.cols));
    });
}

void knn_update(const Cpu& d, const KnnUpdate& p) {
    check(p);
    constexpr std::int64_t kTile = 64;
    const std::int64_t rows = p.queries.y.rows, keys = p.keys.y.rows, dim = p.vectors.x.cols;
    const ConstView k(p.keys.y.data, keys, dim, Eigen::OuterStride<>(p.keys.y.ld));
    parallel_for_uneven(d, (rows + kTile - 1) / kTile, [&](std::int64_t tile) {
        const std::int64_t first = tile * kTile, n = std::min(kTile, rows - first);
        const ConstView q(p.queries.y.row(first), n, dim, Eigen::OuterStride<>(p.queries.y.ld));
        View products(p.products.row(first), n, keys, Eigen::OuterStride<>(p.products.ld));
        products.noalias() = q * k.transpose();
        for (std::int64_t r = 0; r < n; ++r) scan_row(p, first + r, p.products.row(first + r));
    });
}

}  // namespace fiedler
