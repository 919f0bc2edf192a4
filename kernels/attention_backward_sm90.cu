// kernels/attention_backward_sm90.cu: the products of the backward pass of scalar-distance attention for sm_90a by
// themselves, for tests.
#include "kernels/attention_backward_sm90.h"

#include "kernels/attention_backward_tile_sm90.cuh"

namespace fiedler {
namespace {

using namespace attention_backward_sm90_tile;

struct Products {
    const nv_bf16 *x, *y, *p;
    float *xy, *xp;
    nv_bf16* pt;
};

// Where element i of rows of 64 lies.
__device__ int swizzled(int i) { return i ^ (i / kWidth % 8) * 8; }

template <int N>
__global__ void __launch_bounds__(kThreads) products_kernel(Products io) {
    __shared__ __align__(1024) nv_bf16 x[kTileElements], y[N * kWidth], turned[N * kTile];
    const int thread = thread_anew(), lane = thread % kWarp, row = first_row(thread);
    for (int i = thread; i < kTileElements; i += kThreads) x[swizzled(i)] = io.x[i];
    for (int i = thread; i < N * kWidth; i += kThreads) y[swizzled(i)] = io.y[i];
    for (int n = 0; n < N / 8; n += 2) {  // p turned, in the layout of sums
        std::uint32_t packed[4];
        for (int i = 0; i < 4; ++i) {
            const int key = 8 * (n + i / 2) + lane % 4 * 2, query = row + i % 2 * 8;
            packed[i] = pack_bf16(to_float(io.p[key * kTile + query]), to_float(io.p[(key + 1) * kTile + query]));
        }
        store_turned(shared_address(turned) + place_of_turned(thread) + n * 8 * kRowBytes, packed[0], packed[1],
                     packed[2], packed[3]);
    }
    hopper::publish_shared();
    __syncthreads();
    float xy[N / 2], xp[N / 2] = {};
    multiply_rows<N>(xy, hopper::operand(x), hopper::operand(y));
    multiply_turned<N>(xp, hopper::operand(x), hopper::operand(turned));
    hopper::product_wait<0>();
    hopper::pin(xy);
    hopper::pin(xp);
#pragma unroll
    for (int e = 0; e < N / 2; ++e) {
        const int at = (row + e / 2 % 2 * 8) * N + e / 4 * 8 + lane % 4 * 2 + e % 2;
        io.xy[at] = xy[e], io.xp[at] = xp[e];
    }
    for (int i = thread; i < N * kTile; i += kThreads) io.pt[i] = turned[swizzled(i)];
}

}  // namespace

void attention_backward_sm90_products(const Cuda& device, const bf16* x, const bf16* y, const bf16* p, float* xy,
                                      float* xp, bf16* pt, int keys) {
    FIEDLER_REQUIRE("attention", keys == 32 || keys == 64);
    const Products io{nv(x), nv(y), nv(p), xy, xp, nv(pt)};
    if (keys == 64)
        products_kernel<64><<<1, kThreads, 0, stream_of(device)>>>(io);
    else
        products_kernel<32><<<1, kThreads, 0, stream_of(device)>>>(io);
    LAUNCH_CHECK("attention_backward_sm90_products");
}

}  // namespace fiedler
