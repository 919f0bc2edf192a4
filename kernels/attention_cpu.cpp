// Scalar-distance attention on the CPU: the reference in double and real training in float. A block of 16 queries is
// scored against the keys that it sees, so that at most 16 x T weights exist at a time; every inner loop runs over keys
// or over the head's width.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/attention.h"
#include "kernels/parallel.h"
#include "kernels/vector_math.h"

namespace fiedler {
namespace {

constexpr std::int32_t kRows = 16;  // queries of one block

// One 32-byte vector register, and the same in memory at any address.
template <class T>
struct Lanes {
    typedef T type __attribute__((vector_size(32)));
    typedef T unaligned __attribute__((vector_size(32), aligned(alignof(T)), may_alias));
    static constexpr int size = 32 / sizeof(T);
};
template <class T>
using lanes_t = typename Lanes<T>::type;
template <class T>
typename Lanes<T>::unaligned& lanes_at(T* p) {
    return *reinterpret_cast<typename Lanes<T>::unaligned*>(p);
}
template <class T>
const typename Lanes<T>::unaligned& lanes_at(const T* p) {
    return *reinterpret_cast<const typename Lanes<T>::unaligned*>(p);
}

// Element (i, k) at data[i * row + k * step]: a matrix or its transpose.
template <class T>
struct Factor {
    const T* data;
    std::int64_t row, step;
};

// c[Q x V registers] += a b, the sums over k held in registers.
template <class T, int Q, int V>
void multiply_tile(T* c, std::int64_t ldc, Factor<T> a, const T* b, std::int64_t ldb, std::int64_t depth) {
    constexpr int kWidth = Lanes<T>::size;
    lanes_t<T> sum[Q][V] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        lanes_t<T> y[V];
        for (int v = 0; v < V; ++v) y[v] = lanes_at(b + k * ldb + v * kWidth);
        for (int q = 0; q < Q; ++q) {
            const T x = a.data[q * a.row + k * a.step];
            for (int v = 0; v < V; ++v) sum[q][v] += x * y[v];
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) lanes_at(c + q * ldc + v * kWidth) += sum[q][v];
}
template <class T, int Q>
void multiply_strip(T* c, std::int64_t ldc, Factor<T> a, const T* b, std::int64_t ldb, std::int64_t depth,
                    std::int64_t cols) {
    constexpr int kWidth = Lanes<T>::size;
    std::int64_t n = 0;
    for (; n + 2 * kWidth <= cols; n += 2 * kWidth) multiply_tile<T, Q, 2>(c + n, ldc, a, b + n, ldb, depth);
    for (; n + kWidth <= cols; n += kWidth) multiply_tile<T, Q, 1>(c + n, ldc, a, b + n, ldb, depth);
    for (; n < cols; ++n)
        for (int q = 0; q < Q; ++q) {
            T sum = 0;
            for (std::int64_t k = 0; k < depth; ++k) sum += a.data[q * a.row + k * a.step] * b[k * ldb + n];
            c[q * ldc + n] += sum;
        }
}
// c[rows x cols] += a[rows x depth] b[depth x cols]
template <class T>
void multiply(T* c, std::int64_t ldc, Factor<T> a, const T* b, std::int64_t ldb, std::int64_t rows, std::int64_t depth,
              std::int64_t cols) {
    std::int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
        multiply_strip<T, 4>(c + i * ldc, ldc, {a.data + i * a.row, a.row, a.step}, b, ldb, depth, cols);
    for (; i < rows; ++i)
        multiply_strip<T, 1>(c + i * ldc, ldc, {a.data + i * a.row, a.row, a.step}, b, ldb, depth, cols);
}

// What one head needs of the keys [first, first + n): scalars by rows of one scalar each, and the gate.
template <class T>
struct Keys {
    std::int64_t n;
    std::int32_t scalars;
    std::vector<T> b, gate;

    Keys(Mat<const T> b_all, Mat<const T> F, std::int32_t head, std::int32_t scalars_, std::int64_t first,
         std::int64_t n_)
        : n(n_), scalars(scalars_), b(static_cast<std::size_t>(n_ * scalars_)), gate(static_cast<std::size_t>(n_)) {
        for (std::int64_t j = 0; j < n; ++j) {
            const T* row = b_all.row(first + j) + std::int64_t(head) * scalars;
            for (std::int32_t r = 0; r < scalars; ++r) b[static_cast<std::size_t>(r * n + j)] = row[r];
            if (F) gate[static_cast<std::size_t>(j)] = F.row(first + j)[head];
        }
    }
    // s_j = F_i - F_j - sum_r |a^r - b_j^r| for count keys from `from`.
    void score(T* __restrict s, const T* a, T gate_of_query, std::int64_t from, std::int64_t count) const {
        const T* __restrict f = gate.data() + from;
        for (std::int64_t j = 0; j < count; ++j) s[j] = gate_of_query - f[j];
        for (std::int32_t r = 0; r < scalars; ++r) {
            const T* __restrict y = b.data() + r * n + from;
            const T x = a[r];
            for (std::int64_t j = 0; j < count; ++j) s[j] -= std::abs(x - y[j]);
        }
    }
};

// s = exp(s - shift), in place, in chunks that suit short rows too (see vector_math.h).
template <class T>
void exponentials(T* s, std::int64_t count, T shift) {
    constexpr int kSize = 2 * Lanes<T>::size;
    const auto run = [&](T* part, std::int64_t n) {
        store_chunk(part, n, Chunk<T, kSize>((load_chunk<kSize>(part, n, shift) - shift).exp()));
    };
    std::int64_t j = 0;
    for (; j + kSize <= count; j += kSize) run(s + j, kSize);
    if (j < count) run(s + j, count - j);
}
// Folds s lane by lane, then over the lanes: a fixed order that needs no fast-math to vectorise.
template <class T, class Fold>
T fold(const T* s, std::int64_t count, T start, Fold&& into) {
    constexpr int kWidth = Lanes<T>::size;
    lanes_t<T> lanes = lanes_t<T>{} + start;
    std::int64_t j = 0;
    for (; j + kWidth <= count; j += kWidth) {
        const lanes_t<T> x = lanes_at(s + j);
        lanes = into(lanes, x);
    }
    for (int k = 0; j < count; ++j, ++k) lanes[k] = into(T(lanes[k]), s[j]);
    T result = start;
    for (int k = 0; k < kWidth; ++k) result = into(result, T(lanes[k]));
    return result;
}
// Scores to unnormalised weights exp(s - max), in place; returns their sum, sets top to the largest score.
template <class T>
T soften(T* s, std::int64_t count, T& top) {
    top = fold(s, count, s[0], [](const auto& x, const auto& y) { return y > x ? y : x; });
    exponentials(s, count, top);
    return fold(s, count, T(0), [](const auto& x, const auto& y) { return x + y; });
}

template <class T>
void forward_block(const AttentionForward<T>& p, const Sight& sight, std::int32_t head, std::int32_t first) {
    const std::int32_t rows = std::min(kRows, p.seq.tokens - first);
    const std::int32_t lo = sight.lo(first), span = sight.hi(first + rows - 1) - lo;
    const std::int64_t width = p.v.cols / p.heads, scalars = p.scalars;
    const Keys<T> keys(p.b, p.F, head, p.scalars, lo, span);
    std::vector<T> weights(static_cast<std::size_t>(std::int64_t(rows) * span));
    T scale[kRows];
    for (std::int32_t q = 0; q < rows; ++q) {
        const std::int32_t i = first + q, from = sight.lo(i) - lo, count = sight.hi(i) - sight.lo(i);
        T* s = weights.data() + std::int64_t(q) * span + from;
        T top;
        keys.score(s, p.a.row(i) + head * scalars, p.F ? p.F.row(i)[head] : T(0), from, count);
        const T sum = soften(s, count, top);
        scale[q] = 1 / sum;
        p.lse.row(i)[head] = top + std::log(sum);
        std::fill_n(p.o.row(i) + head * width, width, T(0));
    }
    T* o = p.o.row(first) + head * width;
    multiply<T>(o, p.o.ld, {weights.data(), span, 1}, p.v.row(lo) + head * width, p.v.ld, rows, span, width);
    for (std::int32_t q = 0; q < rows; ++q)
        for (std::int64_t d = 0; d < width; ++d) o[q * p.o.ld + d] *= scale[q];
}

// One sequence and head of the backward pass: everything that no other unit writes.
template <class T>
class BackwardUnit {
  public:
    BackwardUnit(const AttentionBackward<T>& p, std::int32_t head, std::int32_t begin, std::int32_t end)
        : p_(p),
          head_(head),
          begin_(begin),
          n_(end - begin),
          width_(p.v.cols / p.heads),
          keys_(p.b, p.F, head, p.scalars, begin, n_),
          values_(static_cast<std::size_t>(n_ * width_)),
          db_(static_cast<std::size_t>(n_ * p.scalars)),
          column_sum_(static_cast<std::size_t>(n_)),
          weights_(static_cast<std::size_t>(kRows * n_)),
          ds_(static_cast<std::size_t>(kRows * n_)) {}

    void run() {
        for (std::int64_t j = 0; j < n_; ++j) {
            const T* v = p_.v.row(begin_ + j) + head_ * width_;
            for (std::int64_t d = 0; d < width_; ++d) values_[static_cast<std::size_t>(d * n_ + j)] = v[d];
            std::fill_n(p_.dv.row(begin_ + j) + head_ * width_, width_, T(0));
        }
        for (std::int64_t q = 0; q < n_; q += kRows)
            block(begin_ + std::int32_t(q), std::int32_t(std::min<std::int64_t>(kRows, n_ - q)));
        for (std::int64_t j = 0; j < n_; ++j) {
            T* db = p_.db.row(begin_ + j) + std::int64_t(head_) * p_.scalars;
            for (std::int32_t r = 0; r < p_.scalars; ++r) db[r] = db_[static_cast<std::size_t>(r * n_ + j)];
            if (p_.dF) p_.dF.row(begin_ + j)[head_] = -column_sum_[static_cast<std::size_t>(j)];
        }
    }

  private:
    void block(std::int32_t first, std::int32_t rows) {
        const Sight sight = Sight::of_queries(p_.seq, p_.window, p_.causal);
        const std::int32_t lo = sight.lo(first);
        const std::int64_t span = sight.hi(first + rows - 1) - lo, offset = lo - begin_, column = head_ * width_;
        std::fill_n(weights_.data(), rows * span, T(0));
        std::fill_n(ds_.data(), rows * span, T(0));
        for (std::int32_t q = 0; q < rows; ++q) {
            const std::int32_t i = first + q, from = sight.lo(i) - lo, count = sight.hi(i) - sight.lo(i);
            T* s = weights_.data() + q * span + from;
            keys_.score(s, query(i), p_.F ? p_.F.row(i)[head_] : T(0), offset + from, count);
            exponentials(s, count, p_.lse.row(i)[head_]);
        }
        const T* dout = p_.do_.row(first) + column;
        multiply<T>(ds_.data(), span, {dout, p_.do_.ld, 1}, values_.data() + offset, n_, rows, width_, span);
        multiply<T>(p_.dv.row(lo) + column, p_.dv.ld, {weights_.data(), 1, span}, dout, p_.do_.ld, span, rows, width_);
        for (std::int32_t q = 0; q < rows; ++q) {
            const T delta = delta_of(first + q);
            T* __restrict ds = ds_.data() + q * span;
            const T* __restrict w = weights_.data() + q * span;
            T* __restrict sum = column_sum_.data() + offset;
            for (std::int64_t j = 0; j < span; ++j) {
                ds[j] = w[j] * (ds[j] - delta);
                sum[j] += ds[j];
            }
            T* da = p_.da.row(first + q) + std::int64_t(head_) * p_.scalars;
            for (std::int32_t r = 0; r < p_.scalars; ++r)
                da[r] = -signed_sum(query(first + q)[r], keys_.b.data() + r * n_ + offset, ds,
                                    db_.data() + r * n_ + offset, span);
        }
    }
    const T* query(std::int32_t i) const { return p_.a.row(i) + std::int64_t(head_) * p_.scalars; }
    T delta_of(std::int32_t i) const {
        const T *g = p_.do_.row(i) + head_ * width_, *o = p_.o.row(i) + head_ * width_;
        T sum = 0;
        for (std::int64_t d = 0; d < width_; ++d) sum += g[d] * o[d];
        return p_.delta.row(i)[head_] = sum;
    }
    // sum_j sign(a - b_j) ds_j; each term is added to db_j too.
    static T signed_sum(T a, const T* b, const T* ds, T* db, std::int64_t n) {
        constexpr int kWidth = Lanes<T>::size;
        lanes_t<T> sum = {}, zero = {};
        std::int64_t j = 0;
        for (; j + kWidth <= n; j += kWidth) {
            const lanes_t<T> y = lanes_at(b + j), d = lanes_at(ds + j);
            const lanes_t<T> term = (y < a ? d : zero) - (y > a ? d : zero);
            sum += term;
            lanes_at(db + j) += term;
        }
        T result = 0;
        for (int k = 0; k < kWidth; ++k) result += sum[k];
        for (; j < n; ++j) {
            const T term = b[j] < a ? ds[j] : b[j] > a ? -ds[j] : T(0);
            result += term;
            db[j] += term;
        }
        return result;
    }

    const AttentionBackward<T>& p_;
    std::int64_t head_;
    std::int32_t begin_;
    std::int64_t n_, width_;
    Keys<T> keys_;
    std::vector<T> values_, db_, column_sum_, weights_, ds_;  // values_: [width, n], db_: [scalars, n]
};

template <class T>
void decode_head(const AttentionDecode<T>& p, std::int32_t head) {
    const std::int64_t length = p.v.rows, width = p.v.cols / p.heads;
    const std::int64_t first = p.window > 0 && p.window < length ? length - p.window : 0, count = length - first;
    const Keys<T> keys(p.b, p.F, head, p.scalars, first, count);
    std::vector<T> weights(static_cast<std::size_t>(count));
    T top, *o = p.o.data + head * width;
    keys.score(weights.data(), p.a.data + std::int64_t(head) * p.scalars, p.F ? p.F.row(length - 1)[head] : T(0), 0,
               count);
    const T scale = 1 / soften(weights.data(), count, top);
    std::fill_n(o, width, T(0));
    multiply<T>(o, width, {weights.data(), count, 1}, p.v.row(first) + head * width, p.v.ld, 1, count, width);
    for (std::int64_t d = 0; d < width; ++d) o[d] *= scale;
}

}  // namespace

template <class T>
void attention_forward(const Cpu& device, const AttentionForward<T>& p) {
    check(p);
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    const std::int64_t blocks = (p.v.rows + kRows - 1) / kRows;
    parallel_for_uneven(device, blocks * p.heads, [&](std::int64_t unit) {
        forward_block(p, sight, std::int32_t(unit % p.heads), std::int32_t(unit / p.heads) * kRows);
    });
}
template <class T>
void attention_backward(const Cpu& device, const AttentionBackward<T>& p) {
    check(p);
    parallel_for_uneven(device, std::int64_t(p.seq.count) * p.heads, [&](std::int64_t unit) {
        const auto sequence = std::int32_t(unit / p.heads);
        BackwardUnit<T>(p, std::int32_t(unit % p.heads), p.seq.sequence_begin(sequence), p.seq.sequence_end(sequence))
            .run();
    });
}
template <class T>
void attention_decode(const Cpu& device, const AttentionDecode<T>& p) {
    check(p);
    parallel_for(device, p.heads, [&](std::int64_t head) { decode_head(p, std::int32_t(head)); });
}

template void attention_forward(const Cpu&, const AttentionForward<float>&);
template void attention_forward(const Cpu&, const AttentionForward<double>&);
template void attention_backward(const Cpu&, const AttentionBackward<float>&);
template void attention_backward(const Cpu&, const AttentionBackward<double>&);
template void attention_decode(const Cpu&, const AttentionDecode<float>&);
template void attention_decode(const Cpu&, const AttentionDecode<double>&);

}  // namespace fiedler
