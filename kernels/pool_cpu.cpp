// kernels/pool_cpu.cpp: pooling of packed sequences on the CPU (see pool.h). A task is a chunk of a sequence; the chunks'
// sums are added in order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/parallel.h"
#include "kernels/pool.h"

namespace fiedler {
namespace {

struct Task {
    std::int32_t sequence, first, last;
};
std::vector<Task> chunks_of(const Packed& seq) {
    std::vector<Task> tasks;
    for (std::int32_t s = 0; s < seq.count; ++s) {
        const std::int32_t end = seq.sequence_end(s);
        for (std::int32_t i = seq.sequence_begin(s); i < end; i += std::int32_t(kPoolChunk))
            tasks.push_back({s, i, std::min(end, i + std::int32_t(kPoolChunk))});
    }
    return tasks;
}

// Sums of a chunk: [channels] weighted rows, [heads] sums of weights, [heads] the logits that they are relative to.
template <class T>
struct Sums {
    T *rows, *weights, *tops;
};

template <class T>
void sum_chunk(const PoolForward<T>& p, const Task& task, const Sums<T>& out) {
    const std::int64_t channels = p.x.cols, heads = p.z ? p.z.cols : 0, width = heads ? channels / heads : channels;
    std::fill(out.rows, out.rows + channels, T(0));
    for (std::int64_t h = 0; h < heads; ++h) {
        T top = p.z.row(task.first)[h];
        for (std::int32_t i = task.first; i < task.last; ++i) top = std::max(top, p.z.row(i)[h]);
        out.tops[h] = top;
        out.weights[h] = 0;
    }
    for (std::int32_t i = task.first; i < task.last; ++i)
        for (std::int64_t h = 0; h < std::max<std::int64_t>(heads, 1); ++h) {
            const T weight = heads ? std::exp(p.z.row(i)[h] - out.tops[h]) : T(1);
            if (heads) out.weights[h] += weight;
            const T* x = p.x.row(i) + h * width;
            T* __restrict__ sum = out.rows + h * width;
            for (std::int64_t c = 0; c < width; ++c) sum[c] += weight * x[c];
        }
}

// y and lse of a sequence from the sums of its chunks [0, count).
template <class T>
void finish(const PoolForward<T>& p, std::int32_t s, const Sums<T>* sums, std::size_t count) {
    const std::int64_t channels = p.x.cols, heads = p.z ? p.z.cols : 0;
    const std::int32_t length = p.seq.sequence_end(s) - p.seq.sequence_begin(s);
    T* y = p.y.row(s);
    std::fill(y, y + channels, T(0));
    for (std::int64_t h = 0; h < std::max<std::int64_t>(heads, 1); ++h) {
        const std::int64_t width = heads ? channels / heads : channels;
        T top = -std::numeric_limits<T>::infinity(), total = 0;
        for (std::size_t k = 0; heads && k < count; ++k) top = std::max(top, sums[k].tops[h]);
        for (std::size_t k = 0; k < count; ++k) {
            const T factor = heads ? std::exp(sums[k].tops[h] - top) : T(1);
            if (heads) total += factor * sums[k].weights[h];
            for (std::int64_t c = h * width; c < (h + 1) * width; ++c) y[c] += factor * sums[k].rows[c];
        }
        if (heads) p.lse.row(s)[h] = count ? top + std::log(total) : top;
        const T scale = count == 0 || p.kind == PoolKind::sum ? T(1) : T(1) / (heads ? total : T(length));
        for (std::int64_t c = h * width; c < (h + 1) * width; ++c) y[c] *= scale;
    }
}

// dz of row i and head h, and its weight p.
template <class T>
T head_backward(const PoolBackward<T>& p, std::int64_t s, std::int64_t i, std::int64_t h) {
    const std::int64_t width = p.dx.cols / p.z.cols, first = h * width;
    const T *dy = p.dy.row(s) + first, *x = p.x.row(i) + first, *y = p.y.row(s) + first;
    const T weight = std::exp(p.z.row(i)[h] - p.lse.row(s)[h]);
    T sum = 0;
    for (std::int64_t c = 0; c < width; ++c) sum += dy[c] * (x[c] - y[c]);
    p.dz.row(i)[h] = weight * sum;
    return weight;
}

}  // namespace

template <class T>
void pool_forward(const Cpu& dev, const PoolForward<T>& p) {
    check(p);
    const std::vector<Task> tasks = chunks_of(p.seq);
    const std::int64_t channels = p.x.cols, heads = p.z ? p.z.cols : 0, width = channels + 2 * heads;
    std::vector<T> memory(tasks.size() * static_cast<std::size_t>(width));
    std::vector<Sums<T>> sums(tasks.size());
    std::vector<std::size_t> first(static_cast<std::size_t>(p.seq.count) + 1, 0);
    for (std::size_t k = 0; k < tasks.size(); ++k) {
        T* at = memory.data() + k * static_cast<std::size_t>(width);
        sums[k] = {at, at + channels, at + channels + heads};
        ++first[static_cast<std::size_t>(tasks[k].sequence) + 1];
    }
    for (std::size_t s = 1; s < first.size(); ++s) first[s] += first[s - 1];
    parallel_for(dev, std::int64_t(tasks.size()), [&](std::int64_t k) {
        sum_chunk(p, tasks[static_cast<std::size_t>(k)], sums[static_cast<std::size_t>(k)]);
    });
    parallel_for(dev, p.seq.count, [&](std::int64_t s) {
        const std::size_t from = first[static_cast<std::size_t>(s)], to = first[static_cast<std::size_t>(s) + 1];
        finish(p, static_cast<std::int32_t>(s), sums.data() + from, to - from);
    });
}

template <class T>
void pool_backward(const Cpu& dev, const PoolBackward<T>& p) {
    check(p);
    const std::vector<Task> tasks = chunks_of(p.seq);
    const bool attention = p.kind == PoolKind::attention;
    const std::int64_t heads = attention ? p.z.cols : 1, width = p.dx.cols / heads;
    parallel_for(dev, std::int64_t(tasks.size()), [&](std::int64_t k) {
        const auto [s, begin, end] = tasks[static_cast<std::size_t>(k)];
        const std::int32_t length = p.seq.sequence_end(s) - p.seq.sequence_begin(s);
        const T even = p.kind == PoolKind::mean ? T(1) / T(length) : T(1);
        for (std::int32_t i = begin; i < end; ++i)
            for (std::int64_t h = 0; h < heads; ++h) {
                const T weight = attention ? head_backward(p, s, i, h) : even;
                const T* dy = p.dy.row(s) + h * width;
                T* dx = p.dx.row(i) + h * width;
                for (std::int64_t c = 0; c < width; ++c) dx[c] = weight * dy[c];
            }
    });
}

template void pool_forward(const Cpu&, const PoolForward<float>&);
template void pool_forward(const Cpu&, const PoolForward<double>&);
template void pool_backward(const Cpu&, const PoolBackward<float>&);
template void pool_backward(const Cpu&, const PoolBackward<double>&);

}  // namespace fiedler
