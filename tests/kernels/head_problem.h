// tests/kernels/head_problem.h: problems of the vocabulary head, their naive solution, and their operands in the memory of
// a device.
#pragma once
#include "kernels/head.h"
#include "tests/support/buffer.h"

namespace fiedler::test {

inline std::size_t count(std::int64_t rows, std::int64_t cols) { return static_cast<std::size_t>(rows * cols); }

struct Problem {
    std::int64_t n, c, v;
    Values x, w, dw;  // dw: what is added to
    std::vector<std::int32_t> targets;
    double scale = 0.125;

    Problem(std::int64_t rows, std::int64_t channels, std::int64_t vocab, double spread = 2)
        : n(rows),
          c(channels),
          v(vocab),
          x(random_values(count(rows, channels), 1, 1)),
          w(random_values(count(vocab, channels), 2, spread / std::sqrt(double(channels)))),
          dw(random_values(count(vocab, channels), 3, 0.1)),
          targets(random_ints(std::size_t(rows), 4, 0, std::int32_t(vocab))) {
        targets[0] = std::int32_t(vocab - 1);
        if (n > 2) targets[1] = -1, targets[2] = 0;
    }
    void round() { x = round_to<bf16>(x), w = round_to<bf16>(w), dw = round_to<float>(dw); }
};

struct Answer {
    Values losses, dx, dw;
};

inline Answer naive(const Problem& q) {
    Answer a{Values(std::size_t(q.n), 0.0), Values(count(q.n, q.c), 0.0), q.dw};
    std::vector<double> l(std::size_t(q.v));
    for (std::int64_t i = 0; i < q.n; ++i) {
        const std::int32_t t = q.targets[std::size_t(i)];
        if (t < 0) continue;
        for (std::int64_t j = 0; j < q.v; ++j) {
            l[std::size_t(j)] = 0;
            for (std::int64_t k = 0; k < q.c; ++k)
                l[std::size_t(j)] += q.x[std::size_t(i * q.c + k)] * q.w[std::size_t(j * q.c + k)];
        }
        const double top = *std::max_element(l.begin(), l.end());
        double sum = 0;
        for (const double y : l) sum += std::exp(y - top);
        a.losses[std::size_t(i)] = std::log(sum) + top - l[std::size_t(t)];
        for (std::int64_t j = 0; j < q.v; ++j) {
            const double d = (std::exp(l[std::size_t(j)] - top) / sum - (j == t ? 1.0 : 0.0)) * q.scale;
            for (std::int64_t k = 0; k < q.c; ++k) {
                a.dx[std::size_t(i * q.c + k)] += d * q.w[std::size_t(j * q.c + k)];
                a.dw[std::size_t(j * q.c + k)] += d * q.x[std::size_t(i * q.c + k)];
            }
        }
    }
    return a;
}

// Dev's memory for a problem; `chunk` rows of logits at a time.
template <class T, class Dev>
struct Operands {
    using A = acc_t<T>;
    Buffer<T, Dev> x, w, dx, logits;
    Buffer<A, Dev> dw, losses, scratch;
    Buffer<std::int32_t, Dev> targets;
    Buffer<unsigned char, Dev> fp8_scratch;
    Head<T> call;

    Operands(const Dev& dev, const Problem& q, std::int64_t chunk, bool gradient = true)
        : x(dev, q.x),
          w(dev, q.w),
          dx(dev, count(q.n, q.c)),
          logits(dev, count(chunk, padded(q.v))),
          dw(dev, q.dw),
          losses(dev, std::size_t(q.n)),
          scratch(dev, std::size_t(head_scratch_elements(chunk, q.v, q.c))),
          targets(dev, q.targets),
          fp8_scratch(dev, std::size_t(head_fp8_scratch_bytes(std::min(chunk, q.n), q.v, q.c))) {
        call.losses = losses.vec();
        call.x = x.mat(q.n, q.c), call.w = w.mat(q.v, q.c);
        if (gradient) call.dx = dx.mat(q.n, q.c), call.dw = dw.mat(q.v, q.c);
        call.targets = targets.vec();
        call.scale = static_cast<A>(q.scale);
        call.logits = Mat<T>(logits.data(), chunk, q.v, padded(q.v));
        call.scratch = scratch.vec();
        call.fp8_scratch = fp8_scratch.vec();
    }
    static std::int64_t padded(std::int64_t v) { return (v + 7) / 8 * 8; }
    Answer answer() const { return {losses.values(), dx.values(), dw.values()}; }
};

#if FIEDLER_CUDA
// The same dx from a CUDA graph.
inline void expect_recorded(const Operands<bf16, Cuda>& o) {
    head(gpu(), o.call);  // what is chosen at the first call
    const std::vector<bf16> dx = o.dx.host();
    CudaGraph* const graph = graph_record(gpu(), [&] { head(gpu(), o.call); });
    fill_bytes(gpu(), o.dx.data(), 0xff, o.dx.bytes());
    graph_launch(gpu(), graph);
    EXPECT_TRUE(identical(dx.data(), o.dx.host().data(), o.dx.bytes()));
    graph_free(graph);
}
#endif

}  // namespace fiedler::test
