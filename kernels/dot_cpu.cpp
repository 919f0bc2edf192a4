// kernels/dot_cpu.cpp: dot-product attention on the CPU (see dot.h), by blocks of 32 queries and tiles of 64 keys.
//
// Scores are kept transposed, [key][query]: the block's queries are transposed once, every other operand is read as it
// lies in memory, and the softmax runs along the vectorised axis.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/dot.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

constexpr std::int64_t kQueries = 32, kKeys = 64;

// A matrix read by scalars: element (i, l) is data[i * row + l * col].
template <class T>
struct Factor {
    const T* data;
    std::int64_t row, col;
};

// kRows rows of C += A B over n columns; b and c have contiguous rows.
template <int kRows, class T>
void multiply_rows(std::int64_t n, std::int64_t depth, Factor<T> a, const T* b, std::int64_t ldb, T* c,
                   std::int64_t ldc) {
    typedef T Vector __attribute__((vector_size(32)));
    typedef T Memory __attribute__((vector_size(32), aligned(sizeof(T)), may_alias));  // unaligned access
    constexpr std::int64_t kWidth = 32 / sizeof(T);
    const std::int64_t vectors = n / (2 * kWidth) * (2 * kWidth);
    for (std::int64_t j = 0; j < vectors; j += 2 * kWidth) {
        Vector sum[kRows][2];
        for (int i = 0; i < kRows; ++i)
            for (int h = 0; h < 2; ++h) sum[i][h] = *reinterpret_cast<const Memory*>(c + i * ldc + j + h * kWidth);
        for (std::int64_t l = 0; l < depth; ++l) {
            const Vector left = *reinterpret_cast<const Memory*>(b + l * ldb + j);
            const Vector right = *reinterpret_cast<const Memory*>(b + l * ldb + j + kWidth);
            for (int i = 0; i < kRows; ++i) {
                const T x = a.data[i * a.row + l * a.col];
                sum[i][0] += x * left;
                sum[i][1] += x * right;
            }
        }
        for (int i = 0; i < kRows; ++i)
            for (int h = 0; h < 2; ++h) *reinterpret_cast<Memory*>(c + i * ldc + j + h * kWidth) = sum[i][h];
    }
    for (std::int64_t j = vectors; j < n; ++j)
        for (int i = 0; i < kRows; ++i) {
            T sum = c[i * ldc + j];
            for (std::int64_t l = 0; l < depth; ++l) sum += a.data[i * a.row + l * a.col] * b[l * ldb + j];
            c[i * ldc + j] = sum;
        }
}

// C (m x n) += A (m x depth) B (depth x n).
template <class T>
void multiply_add(std::int64_t m, std::int64_t n, std::int64_t depth, Factor<T> a, const T* b, std::int64_t ldb, T* c,
                  std::int64_t ldc) {
    std::int64_t i = 0;
    for (; i + 4 <= m; i += 4)
        multiply_rows<4>(n, depth, Factor<T>{a.data + i * a.row, a.row, a.col}, b, ldb, c + i * ldc, ldc);
    for (; i < m; ++i)
        multiply_rows<1>(n, depth, Factor<T>{a.data + i * a.row, a.row, a.col}, b, ldb, c + i * ldc, ldc);
}

// Aligned: Eigen computes what precedes an aligned address one by one, and its scalar exp differs from its vector exp
// in the last bit, so that results would depend on where the memory happens to lie.
template <class T>
using Scratch = Eigen::Array<T, Eigen::Dynamic, 1>;

// One block of queries of one head, and which keys they see.
struct Block {
    std::int64_t head, first, count;  // queries [first, first + count)
    std::int64_t lo, hi;              // keys that some query sees
    std::int64_t all_lo, all_hi;      // keys that all see
};
Block make_block(const Sight& sight, std::int64_t head, std::int64_t first, std::int64_t end) {
    const auto f = std::int32_t(first), l = std::int32_t(std::min(first + kQueries, end) - 1);
    return {head, first, l + 1 - first, sight.lo(f), sight.hi(l), sight.lo(l), sight.hi(f)};
}

// tile[j][i] = hidden for every pair of the keys [key, key + keys) that the mask hides.
template <class T>
void mask_tile(const Sight& sight, const Block& block, std::int64_t key, std::int64_t keys, T* tile, T hidden) {
    if (block.all_lo <= key && key + keys <= block.all_hi) return;
    for (std::int64_t i = 0; i < block.count; ++i) {
        const auto query = std::int32_t(block.first + i);
        const std::int64_t seen = std::clamp<std::int64_t>(sight.lo(query) - key, 0, keys);
        const std::int64_t unseen = std::clamp<std::int64_t>(sight.hi(query) - key, seen, keys);
        for (std::int64_t j = 0; j < seen; ++j) tile[j * kQueries + i] = hidden;
        for (std::int64_t j = unseen; j < keys; ++j) tile[j * kQueries + i] = hidden;
    }
}

// out[d][i] = factor x[first + i][column + d], zero beyond the block.
template <class T>
void transpose_rows(Mat<const T> x, const Block& b, std::int64_t column, std::int64_t width, T factor, T* out) {
    std::fill_n(out, width * kQueries, T(0));
    for (std::int64_t i = 0; i < b.count; ++i) {
        const T* row = x.row(b.first + i) + column;
        for (std::int64_t d = 0; d < width; ++d) out[d * kQueries + i] = factor * row[d];
    }
}

// tile[j][i] = sum_d x[key + j][column + d] rows[d][i]
template <class T>
void score_tile(Mat<const T> x, std::int64_t key, std::int64_t keys, std::int64_t column, std::int64_t width,
                const T* rows, T* tile) {
    std::fill_n(tile, keys * kQueries, T(0));
    multiply_add(keys, kQueries, width, Factor<T>{x.row(key) + column, x.ld, 1}, rows, kQueries, tile, kQueries);
}

// tile = exp(tile - shift[i]); what the mask hides becomes exactly zero.
template <class T>
void exponentials(const Sight& sight, const Block& b, std::int64_t key, std::int64_t keys, const T* shift, T* tile) {
    for (std::int64_t j = 0; j < keys; ++j)
        for (std::int64_t i = 0; i < kQueries; ++i) tile[j * kQueries + i] -= shift[i];
    Eigen::Map<Scratch<T>, Eigen::AlignedMax> all(tile, keys * kQueries);
    all = all.exp();
    mask_tile(sight, b, key, keys, tile, T(0));
}

template <class T>
void forward_block(const DotForward<T>& p, const Sight& sight, const Block& b) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    const std::int64_t width = p.v.cols / p.heads, column = b.head * width;
    Scratch<T> scratch = Scratch<T>::Zero((2 * width + kKeys) * kQueries);
    T *q = scratch.data(), *tile = q + width * kQueries, *out = tile + kKeys * kQueries;
    T largest[kQueries], sum[kQueries], shift[kQueries], decay[kQueries];
    std::fill_n(largest, kQueries, kNone);
    std::fill_n(sum, kQueries, T(0));
    transpose_rows(p.q, b, column, width, p.scale, q);
    for (std::int64_t key = b.lo; key < b.hi; key += kKeys) {
        const std::int64_t keys = std::min<std::int64_t>(kKeys, b.hi - key);
        score_tile(p.k, key, keys, column, width, q, tile);
        mask_tile(sight, b, key, keys, tile, kNone);
        std::copy_n(largest, kQueries, decay);
        for (std::int64_t j = 0; j < keys; ++j)
            for (std::int64_t i = 0; i < kQueries; ++i) {
                const T s = tile[j * kQueries + i];
                largest[i] = s > largest[i] ? s : largest[i];
            }
        for (std::int64_t i = 0; i < kQueries; ++i) {
            shift[i] = largest[i] == kNone ? T(0) : largest[i];  // a query that has seen no key yet
            decay[i] = std::exp(decay[i] - shift[i]);
            sum[i] *= decay[i];
        }
        exponentials(sight, b, key, keys, shift, tile);
        for (std::int64_t j = 0; j < keys; ++j)
            for (std::int64_t i = 0; i < kQueries; ++i) sum[i] += tile[j * kQueries + i];
        for (std::int64_t i = 0; i < b.count; ++i)
            for (std::int64_t d = 0; d < width; ++d) out[i * width + d] *= decay[i];
        multiply_add(b.count, width, keys, Factor<T>{tile, 1, kQueries}, p.v.row(key) + column, p.v.ld, out, width);
    }
    for (std::int64_t i = 0; i < b.count; ++i) {
        T* o = p.o.row(b.first + i) + column;
        for (std::int64_t d = 0; d < width; ++d) o[d] = out[i * width + d] / sum[i];
        p.lse.row(b.first + i)[b.head] = largest[i] + std::log(sum[i]);
    }
}

template <class T>
void backward_block(const DotBackward<T>& p, const Sight& sight, const Block& b, Scratch<T>& scratch) {
    const std::int64_t width = p.v.cols / p.heads, column = b.head * width;
    T *q = scratch.data(), *grad = q + width * kQueries, *weights = grad + width * kQueries;
    T *ds = weights + kKeys * kQueries, *dq = ds + kKeys * kQueries;
    T lse[kQueries] = {}, delta[kQueries] = {};
    for (std::int64_t i = 0; i < b.count; ++i) {
        const T *o = p.o.row(b.first + i) + column, *g = p.do_.row(b.first + i) + column;
        for (std::int64_t d = 0; d < width; ++d) delta[i] += o[d] * g[d];
        p.delta.row(b.first + i)[b.head] = delta[i];
        lse[i] = p.lse.row(b.first + i)[b.head];
    }
    transpose_rows(p.q, b, column, width, p.scale, q);
    transpose_rows(p.do_, b, column, width, T(1), grad);
    std::fill_n(dq, width * kQueries, T(0));
    for (std::int64_t key = b.lo; key < b.hi; key += kKeys) {
        const std::int64_t keys = std::min<std::int64_t>(kKeys, b.hi - key);
        score_tile(p.k, key, keys, column, width, q, weights);
        exponentials(sight, b, key, keys, lse, weights);
        score_tile(p.v, key, keys, column, width, grad, ds);
        for (std::int64_t j = 0; j < keys; ++j)
            for (std::int64_t i = 0; i < kQueries; ++i) {
                T& x = ds[j * kQueries + i];
                x = p.scale * weights[j * kQueries + i] * (x - delta[i]);
            }
        multiply_add(keys, width, b.count, Factor<T>{weights, kQueries, 1}, p.do_.row(b.first) + column, p.do_.ld,
                     p.dv.row(key) + column, p.dv.ld);
        multiply_add(keys, width, b.count, Factor<T>{ds, kQueries, 1}, p.q.row(b.first) + column, p.q.ld,
                     p.dk.row(key) + column, p.dk.ld);
        multiply_add(b.count, width, keys, Factor<T>{ds, 1, kQueries}, p.k.row(key) + column, p.k.ld, dq, width);
    }
    for (std::int64_t i = 0; i < b.count; ++i) std::copy_n(dq + i * width, width, p.dq.row(b.first + i) + column);
}

}  // namespace

template <class T>
void dot_forward(const Cpu& cpu, const DotForward<T>& p) {
    check(p);
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    std::vector<Block> blocks;
    for (std::int32_t s = 0; s < p.seq.count; ++s)
        for (std::int64_t head = 0; head < p.heads; ++head)
            for (std::int64_t i = p.seq.sequence_begin(s); i < p.seq.sequence_end(s); i += kQueries)
                blocks.push_back(make_block(sight, head, i, p.seq.sequence_end(s)));
    parallel_for_uneven(cpu, std::int64_t(blocks.size()),
                        [&](std::int64_t i) { forward_block(p, sight, blocks[static_cast<std::size_t>(i)]); });
}

// One task is one head of one sequence, so that the sums of dk and dv over the queries run in a fixed order.
template <class T>
void dot_backward(const Cpu& cpu, const DotBackward<T>& p) {
    check(p);
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    const std::int64_t width = p.v.cols / p.heads;
    parallel_for_uneven(cpu, std::int64_t(p.seq.count) * p.heads, [&](std::int64_t task) {
        const auto s = std::int32_t(task / p.heads);
        const std::int64_t head = task % p.heads, begin = p.seq.sequence_begin(s), end = p.seq.sequence_end(s);
        Scratch<T> scratch((3 * width + 2 * kKeys) * kQueries);
        for (std::int64_t j = begin; j < end; ++j) {
            std::fill_n(p.dk.row(j) + head * width, width, T(0));
            std::fill_n(p.dv.row(j) + head * width, width, T(0));
        }
        for (std::int64_t i = begin; i < end; i += kQueries)
            backward_block(p, sight, make_block(sight, head, i, end), scratch);
    });
}

template <class T>
void dot_decode(const Cpu& cpu, const DotDecode<T>& p) {
    check(p);
    const std::int64_t length = p.v.rows, width = p.v.cols / p.heads;
    const std::int64_t first = p.window > 0 && length > p.window ? length - p.window : 0;
    parallel_for(cpu, p.heads, [&](std::int64_t head) {
        const std::int64_t column = head * width;
        std::vector<T> s(static_cast<std::size_t>(length - first)), sum(static_cast<std::size_t>(width), T(0));
        T largest = -std::numeric_limits<T>::infinity(), total = 0;
        for (std::int64_t j = first; j < length; ++j) {
            T dot = 0;
            for (std::int64_t d = 0; d < width; ++d) dot += p.q.data[column + d] * p.k.row(j)[column + d];
            s[static_cast<std::size_t>(j - first)] = p.scale * dot;
            largest = std::max(largest, p.scale * dot);
        }
        for (std::int64_t j = first; j < length; ++j) {
            const T weight = std::exp(s[static_cast<std::size_t>(j - first)] - largest);
            total += weight;
            for (std::int64_t d = 0; d < width; ++d)
                sum[static_cast<std::size_t>(d)] += weight * p.v.row(j)[column + d];
        }
        for (std::int64_t d = 0; d < width; ++d) p.o.data[column + d] = sum[static_cast<std::size_t>(d)] / total;
    });
}

template void dot_forward(const Cpu&, const DotForward<float>&);
template void dot_forward(const Cpu&, const DotForward<double>&);
template void dot_backward(const Cpu&, const DotBackward<float>&);
template void dot_backward(const Cpu&, const DotBackward<double>&);
template void dot_decode(const Cpu&, const DotDecode<float>&);
template void dot_decode(const Cpu&, const DotDecode<double>&);

}  // namespace fiedler
