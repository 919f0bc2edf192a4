// kernels/mlp_cpu.cpp: ReLU^2 on the CPU (see mlp.h). Elementwise: each block of elements is one task.
#include <algorithm>

#include "kernels/mlp.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

// body(first, last) over fixed blocks of [0, n).
template <class Body>
void for_blocks(const Cpu& dev, std::int64_t n, Body&& body) {
    constexpr std::int64_t kBlock = 16384;
    parallel_for(dev, (n + kBlock - 1) / kBlock,
                 [&](std::int64_t b) { body(b * kBlock, std::min(n, (b + 1) * kBlock)); });
}

// max(u, 0), but a NaN stays a NaN.
template <class T>
T relu(T u) {
    return u < 0 ? T(0) : u;
}

}  // namespace

template <class T>
void mlp_forward(const Cpu& dev, const MlpForward<T>& p) {
    check(p);
    for_blocks(dev, p.u.size, [&](std::int64_t first, std::int64_t last) {
        const T* u = p.u.data;
        T* h = p.h.data;
        for (std::int64_t i = first; i < last; ++i) {
            const T r = relu(u[i]);
            h[i] = r * r;
        }
    });
}

template <class T>
void mlp_backward(const Cpu& dev, const MlpBackward<T>& p) {
    check(p);
    for_blocks(dev, p.u.size, [&](std::int64_t first, std::int64_t last) {
        const T *u = p.u.data, *dh = p.dh.data;
        T* du = p.du.data;
        for (std::int64_t i = first; i < last; ++i) du[i] = dh[i] * (2 * relu(u[i]));
    });
}

template void mlp_forward(const Cpu&, const MlpForward<float>&);
template void mlp_forward(const Cpu&, const MlpForward<double>&);
template void mlp_backward(const Cpu&, const MlpBackward<float>&);
template void mlp_backward(const Cpu&, const MlpBackward<double>&);

}  // namespace fiedler
