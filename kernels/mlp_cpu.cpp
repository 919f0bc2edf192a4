// kernels/mlp_cpu.cpp: the MLP's hidden values on the CPU (see mlp.h): a product of matmul.h, then elementwise in place.
#include <cmath>

#include "kernels/matmul.h"
#include "kernels/mlp.h"
#include "kernels/parallel.h"

namespace fiedler {

template <class T>
void mlp_forward(const Cpu& dev, const MlpForward<T>& p) {
    check(p);
    matmul_forward(dev, MatmulForward<T, T>{.y = p.h, .x = p.x, .w = p.w, .residual = {}, .relu = true});
    parallel_for(dev, p.h.rows, [&](std::int64_t i) {
        T* h = p.h.row(i);
        for (std::int64_t j = 0; j < p.h.cols; ++j) h[j] *= h[j];
    });
}

template <class T>
void mlp_backward(const Cpu& dev, const MlpBackward<T>& p) {
    check(p);
    matmul_dx(dev, MatmulDx<T>{.dx = p.du, .dy = p.dy, .w = p.w});
    parallel_for(dev, p.du.rows, [&](std::int64_t i) {
        T* du = p.du.row(i);
        const T* h = p.h.row(i);
        for (std::int64_t j = 0; j < p.du.cols; ++j) du[j] *= 2 * std::sqrt(h[j]);
    });
}

template void mlp_forward(const Cpu&, const MlpForward<float>&);
template void mlp_forward(const Cpu&, const MlpForward<double>&);
template void mlp_backward(const Cpu&, const MlpBackward<float>&);
template void mlp_backward(const Cpu&, const MlpBackward<double>&);

}  // namespace fiedler
