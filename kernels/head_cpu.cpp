// kernels/head_cpu.cpp: the vocabulary head on the CPU (see head.h): products and losses in turn.
#include "kernels/head.h"

namespace fiedler {

template <class T>
void head(const Cpu& dev, const Head<T>& p) {
    head_by_products(dev, p);
}

#if !FIEDLER_CUDA
bool head_has_fp8(int) { return false; }
#endif

template void head(const Cpu&, const Head<float>&);
template void head(const Cpu&, const Head<double>&);

}  // namespace fiedler
