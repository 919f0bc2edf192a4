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

}  // namespace fiedler::warpgroup_tile
