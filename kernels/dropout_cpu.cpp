// kernels/dropout_cpu.cpp: dropout on the CPU (see dropout.h). Every element computes its own mask.
#include "kernels/dropout.h"
#include "kernels/parallel.h"

namespace fiedler {

template <class T>
void dropout(const Cpu& dev, const Dropout<T>& p) {
    check(p);
    const std::uint32_t threshold = dropout_threshold(p.p);
    const T scale = dropout_scale<T>(threshold);
    const std::uint64_t start = rng::stream_start(p.seed.data[0], p.stream);
    const auto cols = static_cast<std::uint64_t>(p.x.cols);
    parallel_for(dev, p.x.rows, [&](std::int64_t i) {
        const T* x = p.x.row(i);
        T* y = p.y.row(i);
        std::uint64_t k = static_cast<std::uint64_t>(i) * cols, four = rng::member(start, k / 4);
        for (std::uint64_t c = 0; c < cols; ++c, ++k) {
            if (k % 4 == 0) four = rng::member(start, k / 4);
            y[c] = dropout_draw(four, static_cast<std::uint32_t>(k % 4)) >= threshold ? x[c] * scale : T(0);
        }
    });
}

template void dropout(const Cpu&, const Dropout<float>&);
template void dropout(const Cpu&, const Dropout<double>&);

}  // namespace fiedler
