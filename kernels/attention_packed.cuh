// kernels/attention_packed.cuh: distances of R > 1 scalars in pairs of f16, for scalar-distance attention.
//
// A scalar x of a and b alike becomes y = log2(e) x, rounded to a multiple of 2^-13 and then to f16, eleven bits: the same
// forward and backward, and y whatever the other tokens are. One instruction takes the differences of two neighbouring
// columns; the sums of two |d| are added up in f32, as products with -1 on the tensor cores, or in f16 where these are
// slow. Forward on sm_90, five to eight scalars go by twos: see the end.
//
// Rounding is monotone and a difference of two f16 is zero only where they are equal: the sign of a - b is kept or,
// where both round to one number, 0. With |x| <= kPackedRange, beyond which a kernel goes another way, y and d are
// off by at most 2^-11 of themselves, or 2^-14, so a score is off by at most
//   2^-11 sum_r (|a^r| + |b^r| + k |a^r - b^r|) + 2^-13 R
// with k = 2, 3 for R = 16, whose sums of f16 are of four; 1 + log2 R where all of a sum is in f16.
// Where dot products are the scores, their bf16 operands cost 2^-9 of each term.
#pragma once
#include "kernels/attention_tile.cuh"

namespace fiedler::attention_tile {

constexpr float kPackedRange = 32.f;  // natural units

__device__ inline bool packs(float x) { return fabsf(x) <= kPackedRange; }
// y as f32. Numbers out of range, NaN included, become something finite.
__device__ inline float packed_number(float x) {
    constexpr float kOnGrid = 1536.f;  // a unit of rounding there is 2^-13
    const float y = __fmul_rn(fminf(fmaxf(x, -kPackedRange), kPackedRange), kLog2e);
    return __fadd_rn(__fadd_rn(y, kOnGrid), -kOnGrid);
}
// `count` numbers from `from` on, of which there are `left` or more; zeros beyond. whole: all are there and lie at a
// multiple of their size, 16 bytes at the most.
template <int count>
__device__ void load_numbers(float (&x)[count], const float* from, int left, bool whole) {
    if (whole) {
        if constexpr (count == 2) {
            const float2 y = *reinterpret_cast<const float2*>(from);
            x[0] = y.x, x[1] = y.y;
        } else {
#pragma unroll
            for (int i = 0; i < count; i += 4) {
                const float4 y = *reinterpret_cast<const float4*>(from + i);
                x[i] = y.x, x[i + 1] = y.y, x[i + 2] = y.z, x[i + 3] = y.w;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < count; ++i) x[i] = i < left ? from[i] : 0.f;
    }
}
// Whether R scalars of every token and head are there, at a multiple of their size.
template <int R>
__device__ bool whole_scalars(const float* x, int scalars) {
    return scalars == R && reinterpret_cast<unsigned long long>(x) % (R == 2 ? 8 : 16) == 0;
}
// run(std::integral_constant<int, R>) with the R that two to eight scalars are padded to.
template <class Run>
void with_padded_scalars(int scalars, Run&& run) {
    switch (attention_padded_scalars(scalars)) {
        case 2:
            return run(std::integral_constant<int, 2>{});
        case 4:
            return run(std::integral_constant<int, 4>{});
        default:
            return run(std::integral_constant<int, 8>{});
    }
}
// One half in both: the compiler reads it so where it is used.
__device__ inline std::uint32_t twice_low(std::uint32_t x) {
    std::uint32_t y;
    asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %1;\nmov.b32 %0, {lo, lo};\n}" : "=r"(y) : "r"(x));
    return y;
}
__device__ inline std::uint32_t twice_high(std::uint32_t x) {
    std::uint32_t y;
    asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %1;\nmov.b32 %0, {hi, hi};\n}" : "=r"(y) : "r"(x));
    return y;
}
__device__ inline std::uint32_t difference2(std::uint32_t x, std::uint32_t y) {
    std::uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(x), "r"(y));
    return d;
}
// d = y - x of two keys' scalars y, of each two of a query's scalars x.
template <int R>
__device__ void packed_differences(std::uint32_t (&d)[R], const std::uint32_t (&y)[R],
                                   const std::uint32_t (&x)[R / 2]) {
#pragma unroll
    for (int r = 0; r < R; r += 2) {
        d[r] = difference2(y[r], twice_low(x[r / 2]));
        d[r + 1] = difference2(y[r + 1], twice_high(x[r / 2]));
    }
}
// |x| + |y| of both halves.
__device__ inline std::uint32_t add_sizes2(std::uint32_t x, std::uint32_t y) {
    std::uint32_t sum;
    asm("{\n.reg .b32 a, b;\nabs.f16x2 a, %1;\nabs.f16x2 b, %2;\nadd.rn.f16x2 %0, a, b;\n}"
        : "=r"(sum)
        : "r"(x), "r"(y));
    return sum;
}
// The larger of |x| and |y| of both halves. Not on the pipe of the sums.
__device__ inline std::uint32_t larger_size2(std::uint32_t x, std::uint32_t y) {
    std::uint32_t larger;
    asm("{\n.reg .b32 a, b;\nabs.f16x2 a, %1;\nabs.f16x2 b, %2;\nmax.f16x2 %0, a, b;\n}"
        : "=r"(larger)
        : "r"(x), "r"(y));
    return larger;
}
__device__ inline std::uint32_t add2(std::uint32_t x, std::uint32_t y) {
    std::uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(x), "r"(y));
    return sum;
}
// sat(2^15 d + 15/16), for signs in the backward pass: read as bf16, 0, 2^-8 (d = 0) or 2^-7.
__device__ inline std::uint32_t step2(std::uint32_t d) {
    std::uint32_t y;
    asm("fma.rn.sat.f16x2 %0, %1, %2, %3;\n" : "=r"(y) : "r"(d), "r"(0x78007800u), "r"(0x3b803b80u));
    return y;
}
__device__ inline std::uint32_t fma_bf16(std::uint32_t x, std::uint32_t y, std::uint32_t z) {
    std::uint32_t w;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(w) : "r"(x), "r"(y), "r"(z));
    return w;
}

// B operand -1 on the diagonal of 8 x 8: k = 2t, 2t + 1, n = g.
__device__ inline std::uint32_t minus_diagonal() {
    const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    return g / 2 != t ? 0u : g % 2 == 0 ? 0x0000bc00u : 0xbc000000u;
}
// The same twice, as two numbers to the compiler: an operand of sixteen that keeps its pair of registers.
__device__ inline uint2 minus_diagonals() {
    const std::uint32_t one = minus_diagonal();
    return {one, __shfl_sync(0xffffffffu, one, threadIdx.x % kWarp)};
}
__device__ inline std::uint32_t first_of(std::uint32_t diagonal) { return diagonal; }
__device__ inline std::uint32_t first_of(const uint2& diagonals) { return diagonals.x; }
__device__ inline std::uint32_t second_of(std::uint32_t diagonal) { return diagonal; }
__device__ inline std::uint32_t second_of(const uint2& diagonals) { return diagonals.y; }
// d = c - x - y of 16 x 8 numbers: x and y as rows g and g + 8. diagonal: minus_diagonal() or minus_diagonals().
template <class Diagonal>
__device__ inline void subtract_both(float (&d)[4], const std::uint32_t (&x)[2], const std::uint32_t (&y)[2],
                                     const Diagonal& diagonal, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(y[0]), "r"(y[1]), "r"(first_of(diagonal)), "r"(second_of(diagonal)), "f"(c[0]),
          "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ inline void subtract_one(float (&d)[4], const std::uint32_t (&x)[2], std::uint32_t diagonal,
                                    const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(diagonal), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// s = c - sum_r |d_r| for a thread's two rows and two columns: d[row][r], of both columns; c and s as in mma's C
// layout.
// kOnTensorCores: see above.
template <int R, bool kOnTensorCores, class Diagonal>
__device__ void packed_scores(float (&s)[4], const std::uint32_t (&d)[2][R], const float (&c)[4],
                              const Diagonal& diagonal) {
    constexpr int kOfPart = !kOnTensorCores ? R
                            : R == 16       ? 4
                                            : 2,
                  kParts = R / kOfPart;  // scalars of a sum in f16; sums
    std::uint32_t part[kParts][2];
#pragma unroll
    for (int q = 0; q < kParts; ++q)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            std::uint32_t sums[kOfPart / 2];
#pragma unroll
            for (int i = 0; i < kOfPart / 2; ++i)
                sums[i] = add_sizes2(d[k][q * kOfPart + 2 * i], d[k][q * kOfPart + 2 * i + 1]);
#pragma unroll
            for (int n = kOfPart / 4; n > 0; n /= 2)
#pragma unroll
                for (int i = 0; i < n; ++i) sums[i] = add2(sums[i], sums[i + n]);
            part[q][k] = sums[0];
        }
    if constexpr (!kOnTensorCores) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float2 sum = __half22float2(*reinterpret_cast<const __half2*>(&part[0][k]));
            s[2 * k] = c[2 * k] - sum.x, s[2 * k + 1] = c[2 * k + 1] - sum.y;
        }
    } else if constexpr (kParts == 1) {
        subtract_one(s, part[0], first_of(diagonal), c);
    } else {
        subtract_both(s, part[0], part[1], diagonal, c);
#pragma unroll
        for (int q = 2; q < kParts; q += 2) subtract_both(s, part[q], part[q + 1], diagonal, s);
    }
}

// ---- scalars two by two --------------------------------------------------------------------------------------------
// |x| + |y| = max(|x + y|, |x - y|). Of two scalars of a token, y and y' before they are rounded to f16, the sum and
// the difference are, and take their places; then two scalars' distances are two differences and a maximum, which is
// exact and not on their pipe, and four scalars' the sum of two such. Equal scalars are still at distance 0. Sums and
// differences cost no more than y and y' do, since |y + y'| <= |y| + |y'|; the differences of these, and the sum of two
// maxima, are off by at most 2^-11 of themselves each: the bound on a score is that above, k = 2.
__device__ inline void turn_scalars(float& x, float& y) {  // x, y: packed_number()
    const float sum = x + y;
    y = x - y, x = sum;
}
// As packed_scores, of eight scalars that have been turned.
template <class Diagonal>
__device__ void turned_scores(float (&s)[4], const std::uint32_t (&d)[2][8], const float (&c)[4],
                              const Diagonal& diagonal) {
    std::uint32_t part[2][2];
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int k = 0; k < 2; ++k)
            part[q][k] =
                add2(larger_size2(d[k][2 * q], d[k][2 * q + 1]), larger_size2(d[k][2 * q + 4], d[k][2 * q + 5]));
    subtract_both(s, part[0], part[1], diagonal, c);
}

}  // namespace fiedler::attention_tile
