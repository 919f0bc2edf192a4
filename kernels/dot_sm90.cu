// kernels/dot_sm90.cu: dot-product attention for sm_90a: launches, and the products by themselves for tests. The kernels
// are in dot_forward_sm90.cuh and dot_backward_sm90.cuh, what they share in dot_sm90.cuh.
#include "kernels/dot_sm90.h"

#include "kernels/dot_backward_sm90.cuh"
#include "kernels/dot_forward_sm90.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
namespace {

using namespace dot_sm90_tile;

// Warpgroups of a block, and blocks of a multiprocessor: 65,536 registers in all. Neighbours share the columns' way from
// L2. The forward pass needs less than 128 registers a thread, the pass over queries 168, that over keys more.
constexpr int kForwardGroups = 2, kForwardBlocks = 2, kQueryGroups = 3, kKeyGroups = 2;

CUtensorMap map_of(const Mat<const bf16>& m) {
    return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, kTile});
}
template <class P>
bool takes(const Cuda& cuda, const P& p) {
    return cuda.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth && p.window == 0 && p.seq.tokens > 0 &&
           p.seq.length > 0 && p.seq.length % kTile == 0;
}

template <bool kKeyRows>
void launch_backward(const Cuda& cuda, const DotBackward<bf16>& p) {
    constexpr int kGroups = kKeyRows ? kKeyGroups : kQueryGroups;
    using Shape = BackwardShape<kGroups, kKeyRows>;
    constexpr int bytes = sizeof(typename Shape::Memory);
    const CUtensorMap q = map_of(p.q), k = map_of(p.k), v = map_of(p.v), grad = map_of(p.do_);
    const BackwardMaps maps = kKeyRows ? BackwardMaps{{k, v}, {q, grad}} : BackwardMaps{{q, grad}, {k, v}};
    const Cut cut = Cut::of(p.seq, p.heads, p.causal);
    const auto kernel = dot_backward_sm90_kernel<kGroups, kKeyRows>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<cut.grid<kGroups>(), Shape::kThreads, bytes, stream_of(cuda)>>>(p, cut, maps);
    LAUNCH_CHECK("dot_backward_sm90");
}

struct ProductMaps {
    CUtensorMap x[1], y[2];
};
__global__ void __launch_bounds__(kGroupThreads)
    products_kernel(const __grid_constant__ ProductMaps maps, float* of_rows, float* of_turned) {
    using Memory = Shared<1, 1, 2, false>;
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Memory*>(memory);
    const Stream stream{0, 1, 0, 0, kTile, 1, 0};
    shared.begin(1);
    Loader<Memory> loader{shared, maps.y, stream};
    if (threadIdx.x == 0) shared.load_own(maps.x, stream, 0);
    loader.load_until(1);
    __syncwarp();
    hopper::barrier_wait(&shared.own_full, 0);
    hopper::barrier_wait(&shared.full[0], 0);
    Operands x;
    shared.take_own(x, 0);
    Sums rows, turned = {};
    pin(x);
    multiply_rows(rows, x, operand_of(shared.stages[0][0]));
    multiply_add(turned, x, operand_of(shared.stages[0][1]));
    hopper::product_wait<0>();
    pin(rows), pin(turned);
    const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at = (first + e / 2 * 8) * kTile + n * 8 + lane % 4 * 2 + e % 2;
            of_rows[at] = rows[n][e], of_turned[at] = turned[n][e];
        }
}

}  // namespace

bool dot_sm90_takes(const Cuda& cuda, const DotForward<bf16>& p) { return takes(cuda, p); }
bool dot_sm90_takes(const Cuda& cuda, const DotBackward<bf16>& p) { return takes(cuda, p); }

void dot_forward_sm90(const Cuda& cuda, const DotForward<bf16>& p) {
    using Shape = ForwardShape<kForwardGroups, kForwardBlocks>;
    constexpr int bytes = sizeof(Shape::Memory);
    static_assert(kForwardBlocks * (bytes + 1024) <= 227 * 1024);
    const ForwardMaps maps{{map_of(p.q)}, {map_of(p.k), map_of(p.v)}};
    const Cut cut = Cut::of(p.seq, p.heads, p.causal);
    const auto kernel = dot_forward_sm90_kernel<kForwardGroups, kForwardBlocks>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<cut.grid<kForwardGroups>(), Shape::kThreads, bytes, stream_of(cuda)>>>(p, cut, maps);
    LAUNCH_CHECK("dot_forward_sm90");
}

void dot_backward_sm90(const Cuda& cuda, const DotBackward<bf16>& p) {
    launch_backward<false>(cuda, p);
    launch_backward<true>(cuda, p);
}

void dot_sm90_products(const Cuda& cuda, const Mat<const bf16>& x, const Mat<const bf16>& y, float* rows,
                       float* turned) {
    FIEDLER_REQUIRE("dot", is_shape(x, kTile, kWidth) && is_shape(y, kTile, kWidth));
    constexpr int bytes = sizeof(Shared<1, 1, 2, false>);
    const ProductMaps maps{{map_of(x)}, {map_of(y), map_of(y)}};
    products_kernel<<<1, kGroupThreads, bytes, stream_of(cuda)>>>(maps, rows, turned);
    LAUNCH_CHECK("dot_sm90_products");
}

}  // namespace fiedler
