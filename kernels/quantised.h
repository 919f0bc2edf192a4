// kernels/quantised.h: matrices of 8- and 4-bit integers, and their product with rows of activations. CPU only.
//
//   value    w_nk = s_ng (c_nk - bias),  g = k / 32       int8: c in 1..255, bias 128; int4: c in 0..15, bias 8
//            s_ng  f16, one for each row and group of 32 columns; a group of zeros has s = 0
//   tokens   x_mk ~ t_mg z_mk,  z int8 in -127..127, t = max_k |x_mk| / 127 (f32); NaN where an x is not finite
//   matmul   y_mn = sum_g s_ng t_mg (sum_k c_nk z_mk - bias sum_k z_mk)  [+ residual] [max(., 0)^2]
//            the inner sums are whole numbers, hence exact; bias sum_k z does not depend on n: it is where sums start
//
// Layout of a matrix [rows, cols]: blocks of 16 rows, one after the other; the last is filled up with zeros, as are the
// columns up to a multiple of 32. Of a block, G = ceil(cols / 32) groups:
//   scales   f16 [G][16], then zeros up to a multiple of 64 bytes
//   int8     u8 [G][8][16][4]: c of group g, quad q, row r, column 32 g + 4 q + j
//   int4     u8 [G][4][16][4]: quad 2 p in the low four bits and quad 2 p + 1 in the high four of byte [g][p][r][j]
// so that 64 bytes are four columns of sixteen rows: the shape of a dot-product instruction with one row a lane, and no
// sum over lanes is needed. It is also the layout in a .fdl file (data/README.md): a mapped file is used as it is.
//
// Shapes     w: 64-byte aligned; y, residual: [tokens, rows] f32, any ld; residual may be y
// Writes     y overwritten
// Numerics   f32 sums over groups, in order; a row of y depends on neither the other tokens, nor the threads. Targets
//            (AVX2, AVX-512, AVX-512 VNNI, NEON) differ in the fusing of multiply and add only.
// Traffic    rows cols (8 or 4 bits + 1/2) + 5 tokens cols + 4 tokens rows bytes; 2 tokens rows cols operations
// Files      quantised_cpu.cpp: quantising, and the products as plain loops, in float and double (the reference);
//            quantised_simd.cpp: the products with Highway, for each instruction set in one source, chosen at run time
#pragma once
#include <cstddef>
#include <vector>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"

namespace fiedler {

enum class Quant { int8, int4 };

struct QuantShape {
    static constexpr std::int64_t kRows = 16, kGroup = 32;
    Quant kind = Quant::int8;
    std::int64_t rows = 0, cols = 0;

    std::int64_t blocks() const { return (rows + kRows - 1) / kRows; }
    std::int64_t groups() const { return (cols + kGroup - 1) / kGroup; }
    std::int64_t padded() const { return groups() * kGroup; }  // columns
    std::int64_t scale_bytes() const { return (groups() * kRows * 2 + 63) / 64 * 64; }
    std::int64_t group_bytes() const { return kind == Quant::int8 ? kRows * kGroup : kRows * kGroup / 2; }
    std::int64_t block_bytes() const { return scale_bytes() + groups() * group_bytes(); }
    std::int64_t bytes() const { return blocks() * block_bytes(); }
    int bias() const { return kind == Quant::int8 ? 128 : 8; }
};
struct QuantMatrix {
    QuantShape shape;
    const std::byte* data = nullptr;
    const std::byte* block(std::int64_t b) const { return data + b * shape.block_bytes(); }
};

// ---- making and reading them ------------------------------------------------------------------------------------------
enum class QuantSearch { nearest, least_error };  // scale: max |w| / the largest value, or that of the least error
struct QuantError {
    double squares = 0, error_squares = 0, largest = 0;  // sums over the matrix, and the largest error of a value
    double relative() const;                             // root of error_squares / squares; 0 for zeros
};
// out: shape.bytes() bytes, 64-byte aligned. Values must be finite and below 65504 times the largest code in size.
QuantError quantise(const Cpu&, const Mat<const float>& w, const QuantShape&, QuantSearch, std::byte* out);
void dequantise(const Cpu&, const QuantMatrix&, const Mat<float>& out);
void dequantise_row(const QuantMatrix&, std::int64_t row, float* out);  // out: cols values

// ---- activations ------------------------------------------------------------------------------------------------------
// Rows of activations as the products take them. Reused from call to call; grows only.
struct QuantTokens {
    std::int64_t tokens = 0, cols = 0, groups = 0;
    std::vector<std::int8_t> value;  // [tokens, groups 32]
    std::vector<float> scale;        // [tokens, groups]
    std::vector<std::int32_t> sum;   // [tokens, groups]: sum of the values
    void resize(std::int64_t tokens, std::int64_t cols);
};
void quantise_tokens(const Cpu&, const Mat<const float>& x, QuantTokens& out);

// ---- products ---------------------------------------------------------------------------------------------------------
struct QuantMatmul {
    Mat<float> y;
    const QuantTokens* x = nullptr;
    QuantMatrix w;
    Mat<const float> residual;  // optional
    bool relu_squared = false;
};
inline void check(const QuantMatmul& p) {
    FIEDLER_REQUIRE("quantised", p.x && p.w.data && p.x->cols == p.w.shape.cols);
    FIEDLER_REQUIRE("quantised", reinterpret_cast<std::uintptr_t>(p.w.data) % 64 == 0);
    FIEDLER_REQUIRE("quantised", is_shape(p.y, p.x->tokens, p.w.shape.rows));
    FIEDLER_REQUIRE("quantised", !p.residual || is_shape(p.residual, p.x->tokens, p.w.shape.rows));
}
inline Traffic traffic(const QuantMatmul& p) {
    const double rows = double(p.w.shape.rows), cols = double(p.w.shape.cols), m = double(p.x->tokens);
    return {double(p.w.shape.bytes()) + m * (5 * cols + 4 * rows), 2 * m * rows * cols};
}
void quantised_matmul(const Cpu&, const QuantMatmul&);
// The same as plain loops. A: float or double, the type of the sums over groups.
template <class A>
void quantised_matmul_reference(const QuantMatmul&, const Mat<A>& y);

// Instruction sets that this machine and this build have, best first, and a choice among them for tests (empty: the
// best). False: there is no such one.
std::vector<const char*> quantised_targets();
bool choose_quantised_target(const char* name);

}  // namespace fiedler
