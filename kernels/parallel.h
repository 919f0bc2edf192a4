// kernels/parallel.h: how CPU kernels split work: by fixed index ranges, so that results do not depend on scheduling.
#pragma once
#include <omp.h>

#include <cstdint>
#include <vector>

#include "kernels/device.h"

namespace fiedler {

inline int thread_count(const Cpu& d) { return d.threads > 0 ? d.threads : omp_get_max_threads(); }

// body(i) for i in [0, n), statically divided; each i runs once, on one thread. An exception must not leave body.
template <class Body>
void parallel_for(const Cpu& d, std::int64_t n, Body&& body) {
    const int threads = n < 2 ? 1 : thread_count(d);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t i = 0; i < n; ++i) body(i);
}

// The same with dynamic scheduling, for uneven work. Results must not depend on which thread runs which i.
template <class Body>
void parallel_for_uneven(const Cpu& d, std::int64_t n, Body&& body) {
    const int threads = n < 2 ? 1 : thread_count(d);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (std::int64_t i = 0; i < n; ++i) body(i);
}

// Sums over rows into `width` totals: chunks of a fixed number of rows are summed on their own, then added in order.
// The result depends on neither threads nor schedule. body(first, last, partial) adds rows [first, last) to
// partial[width].
template <class A, class Body>
void sum_over_rows(const Cpu& d, std::int64_t rows, std::int64_t width, A* total, Body&& body) {
    constexpr std::int64_t kChunk = 256;
    const std::int64_t chunks = (rows + kChunk - 1) / kChunk;
    std::vector<A> partial(static_cast<std::size_t>(chunks * width), A(0));
    parallel_for(d, chunks, [&](std::int64_t c) {
        const std::int64_t first = c * kChunk, last = first + kChunk < rows ? first + kChunk : rows;
        body(first, last, partial.data() + c * width);
    });
    for (std::int64_t c = 0; c < chunks; ++c)
        for (std::int64_t k = 0; k < width; ++k) total[k] += partial[static_cast<std::size_t>(c * width + k)];
}

}  // namespace fiedler
