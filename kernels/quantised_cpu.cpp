// kernels/quantised_cpu.cpp: making quantised matrices, reading them back, and the products as plain loops.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/half.h"
#include "kernels/parallel.h"
#include "kernels/quantised.h"

namespace fiedler {

namespace {

constexpr std::int64_t kRows = QuantShape::kRows, kGroup = QuantShape::kGroup;

float scale_of(const QuantMatrix& w, std::int64_t row, std::int64_t group) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, w.block(row / kRows) + (group * kRows + row % kRows) * 2, 2);
    return half_to_float(bits);
}

// Where the byte of a value lies in its block, behind the scales.
std::int64_t byte_of(const QuantShape& s, std::int64_t row, std::int64_t column) {
    const std::int64_t quad = column % kGroup / 4, line = s.kind == Quant::int8 ? quad : quad / 2;
    return column / kGroup * s.group_bytes() + line * 64 + row % kRows * 4 + column % 4;
}
bool is_high(std::int64_t column) { return column / 4 % 2 == 1; }  // int4: the upper half of the byte

int code_of(const QuantMatrix& w, std::int64_t row, std::int64_t column) {
    const auto byte = std::to_integer<int>(w.block(row / kRows)[w.shape.scale_bytes() + byte_of(w.shape, row, column)]);
    if (w.shape.kind == Quant::int8) return byte;
    return is_high(column) ? byte >> 4 : byte & 15;
}

// One group of one row: its scale and codes.
struct Group {
    std::uint16_t scale = 0;
    int code[kGroup];
    double error = 0, largest = 0;  // sum of squared errors, largest error
};

// Codes for a given scale, rounded to f16 first.
Group with_scale(const float* w, int count, float scale, int low, int high, int bias) {
    Group g;
    g.scale = float_to_half(scale);
    const float s = half_to_float(g.scale), inverse = s != 0 ? 1 / s : 0;
    std::fill(g.code, g.code + kGroup, bias);
    for (int i = 0; i < count; ++i) {
        const float z = std::isfinite(inverse) ? std::nearbyint(w[i] * inverse) : 0;
        const float clamped = std::clamp(z, float(low), float(high));
        g.code[i] = static_cast<int>(clamped) + bias;
        const double e = std::abs(double(w[i]) - double(clamped) * double(s));
        g.error += e * e;
        g.largest = std::max(g.largest, e);
    }
    return g;
}

// The scale that is best for given codes: the projection of the values on them.
float projection(const float* w, int count, const Group& g, int bias) {
    double along = 0, square = 0;
    for (int i = 0; i < count; ++i) {
        const double z = g.code[i] - bias;
        along += z * double(w[i]);
        square += z * z;
    }
    return square > 0 ? static_cast<float>(along / square) : 0;
}

Group quantise_group(const float* w, int count, Quant kind, QuantSearch search) {
    const bool eight = kind == Quant::int8;
    const int bias = eight ? 128 : 8, high = eight ? 127 : 7,
              low = eight || search == QuantSearch::nearest ? -high : -8;
    float extreme = 0;  // the value of the largest magnitude, with its sign
    for (int i = 0; i < count; ++i)
        if (std::abs(w[i]) > std::abs(extreme)) extreme = w[i];
    Group best = with_scale(w, count, std::abs(extreme) / float(high), low, high, bias);
    if (search == QuantSearch::nearest || extreme == 0) return best;
    // int4: the extreme may be met by -8, whose scale has its opposite sign, or be clipped for the sake of the others.
    const int steps = eight ? 4 : 16;
    const float first = eight ? 126.f : 5.f, last = eight ? 128.f : 9.f;
    for (int i = 0; i <= steps; ++i) {
        const float levels = first + (last - first) * float(i) / float(steps);
        for (const float sign : {1.f, -1.f}) {
            if (eight && sign < 0) continue;
            Group tried = with_scale(w, count, sign * extreme / levels, low, high, bias);
            for (int pass = 0; pass < 2; ++pass) {
                const Group again = with_scale(w, count, projection(w, count, tried, bias), low, high, bias);
                if (again.error >= tried.error) break;
                tried = again;
            }
            if (tried.error < best.error) best = tried;
        }
    }
    return best;
}

}  // namespace

double QuantError::relative() const { return squares > 0 ? std::sqrt(error_squares / squares) : 0; }

QuantError quantise(const Cpu& dev, const Mat<const float>& w, const QuantShape& shape, QuantSearch search,
                    std::byte* out) {
    FIEDLER_REQUIRE("quantised", is_shape(w, shape.rows, shape.cols) && out);
    std::vector<QuantError> of_block(static_cast<std::size_t>(shape.blocks()));
    parallel_for(dev, shape.blocks(), [&](std::int64_t b) {
        std::byte *scales = out + b * shape.block_bytes(), *values = scales + shape.scale_bytes();
        std::memset(scales, 0, static_cast<std::size_t>(shape.scale_bytes()));
        const int zero = shape.kind == Quant::int8 ? 128 : 0x88;
        std::memset(values, zero, static_cast<std::size_t>(shape.groups() * shape.group_bytes()));
        QuantError& total = of_block[static_cast<std::size_t>(b)];
        for (std::int64_t row = b * kRows; row < std::min(shape.rows, (b + 1) * kRows); ++row)
            for (std::int64_t g = 0; g < shape.groups(); ++g) {
                const auto count = static_cast<int>(std::min(kGroup, shape.cols - g * kGroup));
                const float* from = w.row(row) + g * kGroup;
                const Group made = quantise_group(from, count, shape.kind, search);
                std::memcpy(scales + (g * kRows + row % kRows) * 2, &made.scale, 2);
                for (int i = 0; i < count; ++i) {
                    const std::int64_t column = g * kGroup + i;
                    std::byte& byte = values[byte_of(shape, row, column)];
                    const auto code = static_cast<std::byte>(made.code[i]);
                    if (shape.kind == Quant::int8)
                        byte = code;
                    else
                        byte = is_high(column) ? (byte & std::byte{0x0f}) | code << 4 : (byte & std::byte{0xf0}) | code;
                    total.squares += double(from[i]) * double(from[i]);
                }
                total.error_squares += made.error;
                total.largest = std::max(total.largest, made.largest);
            }
    });
    QuantError all;
    for (const QuantError& e : of_block) {
        all.squares += e.squares;
        all.error_squares += e.error_squares;
        all.largest = std::max(all.largest, e.largest);
    }
    return all;
}

void dequantise_row(const QuantMatrix& w, std::int64_t row, float* out) {
    const QuantShape& s = w.shape;
    const std::byte* values = w.block(row / kRows) + s.scale_bytes() + row % kRows * 4;
    const auto bias = float(s.bias());
    for (std::int64_t g = 0; g < s.groups(); ++g) {
        const float scale = scale_of(w, row, g);
        const std::byte* line = values + g * s.group_bytes();
        const std::int64_t count = std::min(kGroup, s.cols - g * kGroup);
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t quad = i / 4;
            const auto byte = std::to_integer<int>(line[(s.kind == Quant::int8 ? quad : quad / 2) * 64 + i % 4]);
            const int code = s.kind == Quant::int8 ? byte : quad % 2 ? byte >> 4 : byte & 15;
            out[g * kGroup + i] = scale * (float(code) - bias);
        }
    }
}

void dequantise(const Cpu& dev, const QuantMatrix& w, const Mat<float>& out) {
    FIEDLER_REQUIRE("quantised", w.data && is_shape(out, w.shape.rows, w.shape.cols));
    parallel_for(dev, w.shape.rows, [&](std::int64_t row) { dequantise_row(w, row, out.row(row)); });
}

void QuantTokens::resize(std::int64_t n, std::int64_t c) {
    tokens = n;
    cols = c;
    groups = (c + kGroup - 1) / kGroup;
    const auto count = static_cast<std::size_t>(n * groups);
    if (scale.size() >= count) return;
    value.resize(count * kGroup);
    scale.resize(count);
    sum.resize(count);
}

template <class A>
void quantised_matmul_reference(const QuantMatmul& p, const Mat<A>& y) {
    FIEDLER_REQUIRE("quantised", p.x && is_shape(y, p.x->tokens, p.w.shape.rows));
    const QuantTokens& x = *p.x;
    for (std::int64_t m = 0; m < x.tokens; ++m)
        for (std::int64_t n = 0; n < p.w.shape.rows; ++n) {
            A total = p.residual ? A(p.residual.row(m)[n]) : A(0);
            for (std::int64_t g = 0; g < x.groups; ++g) {
                std::int32_t dot = 0;
                for (std::int64_t k = g * kGroup; k < std::min(x.cols, (g + 1) * kGroup); ++k)
                    dot += (code_of(p.w, n, k) - p.w.shape.bias()) *
                           int(x.value[static_cast<std::size_t>(m * x.groups * kGroup + k)]);
                total += A(scale_of(p.w, n, g)) * A(x.scale[static_cast<std::size_t>(m * x.groups + g)]) * A(dot);
            }
            if (p.relu_squared) total = total > A(0) ? total * total : A(0);
            y.row(m)[n] = total;
        }
}
template void quantised_matmul_reference(const QuantMatmul&, const Mat<float>&);
template void quantised_matmul_reference(const QuantMatmul&, const Mat<double>&);

}  // namespace fiedler
