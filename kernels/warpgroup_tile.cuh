// kernels/warpgroup_tile.cuh: operands of a warpgroup's products as the sm_90a kernels of attention and dot name them:
// tiles of rows of 64 bf16 with the 128-byte swizzle of hopper.cuh.
#pragma once
#include "kernels/hopper.cuh"

namespace fiedler::warpgroup_tile {

constexpr int kRowBytes = hopper::kSwizzleBytes;
// Operand: the lower half of a descriptor. The upper half, the distance of eight rows and the swizzle, is one constant,
// and addresses stay in the lower half: fewer instructions where a tile's operands are named.
using Operand = std::uint32_t;
__device__ inline Operand operand_of(const void* tile) { return static_cast<Operand>(hopper::operand(tile)); }
constexpr std::uint64_t kOperandLayout = std::uint64_t(8 * hopper::kSwizzleBytes / 16) << 32 | std::uint64_t(1) << 62;
__device__ inline Operand advance(Operand o, int bytes) { return o + static_cast<Operand>(bytes) / 16; }
constexpr int kColumnStep = 32,
              kRowStep = 16 * kRowBytes;  // bytes of 16 along the inner dimension, in and down the rows

// d = [d +] A B', A 64 x 16 (kTurned: as it lies, 16 x 64), B N x 16; see hopper::multiply.
template <int N, bool kTurned>
__device__ void multiply(float (&d)[N / 2], Operand of_a, Operand of_b, bool add) {
    const std::uint64_t a = kOperandLayout | of_a, b = kOperandLayout | of_b;
#define FIEDLER_D8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
    if constexpr (N == 32) {
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,"
            "%15}, %16, %17, p, 1, 1, %19, 0;\n}\n"
            : FIEDLER_D8(0), FIEDLER_D8(8)
            : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTurned)));
    } else {
        static_assert(N == 64);
        asm volatile(
            "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,"
            "%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, %35, 0;\n}\n"
            : FIEDLER_D8(0), FIEDLER_D8(8), FIEDLER_D8(16), FIEDLER_D8(24)
            : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTurned)));
    }
#undef FIEDLER_D8
}
// d = X Y', both of rows of 64.
template <int N>
__device__ void multiply_rows(float (&d)[N / 2], Operand x, Operand y) {
    hopper::product_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s) multiply<N, false>(d, advance(x, s * kColumnStep), advance(y, s * kColumnStep), s > 0);
    hopper::product_commit();
}

}  // namespace fiedler::warpgroup_tile
