// kernels/eigen_pieces.cuh: how sums over the components of a graph are cut into pieces, and a component's total from the
// sums of its pieces (contract of deflate in eigen.h).
//
// A component is cut into pieces of kPiece rows. Piece q of component c has number offsets[c] / kPiece + c + q: numbers
// of different components differ, and few are unused, so the grid needs no table of pieces. A
// component of one piece is finished at once. The sum of piece q of a larger one, which begins in bucket
// b = offsets[c] / kPiece, goes to slot 2 (b + q) + (q > 0): at most one such component begins in a bucket, and at most
// one later piece of another. The component's total takes the place of its first sum.
#pragma once
#include "kernels/common.cuh"
#include "kernels/eigen.h"

namespace fiedler {
namespace {

constexpr int kPiece = int(kEigenDeflatePiece);
constexpr int kComponentThreads = 512;

struct ComponentSums {
    const std::int64_t* offsets;
    std::int64_t components;
    int m;
    double* sums;  // [slots, m]
};
struct PieceRows {
    std::int64_t begin = 0, end = 0, slot = 0, total = 0;  // total: the slot of the component's total
    bool whole = true;                                     // the component is one piece
};

// The last component for which before(component); it holds for the first one.
template <class Before>
__device__ inline std::int64_t last_component(std::int64_t components, Before&& before) {
    std::int64_t low = 0, high = components;
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        (before(middle) ? low : high) = middle;
    }
    return low;
}
__device__ inline PieceRows piece_rows(const std::int64_t* offsets, std::int64_t components, std::int64_t piece) {
    const auto number = [&](std::int64_t c) { return offsets[c] / kPiece + c; };
    const std::int64_t c = last_component(components, [&](std::int64_t i) { return number(i) <= piece; });
    const std::int64_t first = offsets[c], end = offsets[c + 1], q = piece - number(c), bucket = first / kPiece;
    PieceRows p;
    p.begin = first + q * kPiece, p.end = min(p.begin + kPiece, end);
    p.slot = 2 * (bucket + q) + (q > 0), p.total = 2 * bucket;
    p.whole = end - first <= kPiece;
    return p;
}
// A block for each bucket and 32 columns: the total of the component of several pieces that begins there, if any.
__global__ void __launch_bounds__(kComponentThreads) eigen_component_kernel(const ComponentSums a) {
    constexpr int kGroups = kComponentThreads / kWarp;
    __shared__ double shared[kGroups][kWarp];
    const std::int64_t bucket = blockIdx.x, next = (bucket + 1) * kPiece;
    const std::int64_t c = last_component(a.components, [&](std::int64_t i) { return a.offsets[i] < next; });
    const std::int64_t first = a.offsets[c], rows = a.offsets[c + 1] - first;
    if (first < bucket * kPiece || first >= next || rows <= kPiece) return;
    const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp, column = blockIdx.y * kWarp + lane;
    const std::int64_t pieces = ceil_div(rows, std::int64_t(kPiece)), run = ceil_div(pieces, std::int64_t(kGroups));
    const std::int64_t last = min((group + 1) * run, pieces);
    double sum = 0;
    if (column < a.m) {
#pragma unroll 8
        for (std::int64_t q = group * run; q < last; ++q) sum += a.sums[(2 * (bucket + q) + (q > 0)) * a.m + column];
    }
    shared[group][lane] = sum;
    __syncthreads();
    if (group > 0 || column >= a.m) return;
    for (int g = 1; g < kGroups; ++g) sum += shared[g][lane];
    a.sums[2 * bucket * a.m + column] = sum;
}

inline void launch_component(cudaStream_t stream, std::int64_t n, const ComponentSums& a) {
    const dim3 grid(unsigned(n / kPiece + 1), unsigned(ceil_div(a.m, kWarp)));
    eigen_component_kernel<<<grid, kComponentThreads, 0, stream>>>(a);
    LAUNCH_CHECK("eigen_component");
}

}  // namespace
}  // namespace fiedler
