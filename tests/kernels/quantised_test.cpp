// quantised: the layout and the codes, the error of both ways to choose scales, and every instruction set of this
// machine against plain loops.
#include "kernels/quantised.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "kernels/half.h"
#include "tests/support/compare.h"

namespace fiedler::test {
namespace {

struct Aligned {
    explicit Aligned(std::int64_t bytes) : data(device_alloc(Cpu{}, static_cast<std::size_t>(bytes))) {}
    ~Aligned() { device_free(Cpu{}, data); }
    Aligned(const Aligned&) = delete;
    void* data;
};

struct Problem {
    QuantShape shape;
    std::vector<float> w;
    Aligned memory;
    QuantError error;
    Problem(Quant kind, std::int64_t rows, std::int64_t cols, QuantSearch search = QuantSearch::nearest)
        : shape{kind, rows, cols},
          w(to<float>(random_values(std::size_t(rows * cols), 7, 0.02))),
          memory(shape.bytes()) {
        error = quantise(Cpu{1}, {w.data(), rows, cols}, shape, search, static_cast<std::byte*>(memory.data));
    }
    QuantMatrix matrix() const { return {shape, static_cast<const std::byte*>(memory.data)}; }
    std::vector<float> back() const {
        std::vector<float> out(w.size());
        dequantise(Cpu{1}, matrix(), {out.data(), shape.rows, shape.cols});
        return out;
    }
};

TEST(Half, EveryValueComesBackAndHalvesRoundToEven) {
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        const float f = half_to_float(static_cast<std::uint16_t>(bits));
        if (std::isnan(f))
            EXPECT_TRUE(std::isnan(half_to_float(float_to_half(f))));
        else
            EXPECT_EQ(float_to_half(f), bits) << f;
    }
    EXPECT_EQ(half_to_float(float_to_half(1 + 0x1p-11f)), 1);  // a tie goes to the even one
    EXPECT_EQ(half_to_float(float_to_half(1 + 3 * 0x1p-11f)), 1 + 0x1p-9f);
    EXPECT_EQ(half_to_float(float_to_half(65519)), 65504);
    EXPECT_TRUE(std::isinf(half_to_float(float_to_half(65520))));
    EXPECT_EQ(half_to_float(float_to_half(-0x1p-24f)), -0x1p-24f);
    EXPECT_EQ(half_to_float(float_to_half(0x1p-26f)), 0);
}

// The layout of quantised.h, spelt out.
TEST(Quantised, LayoutIsAsDocumented) {
    for (const Quant kind : {Quant::int8, Quant::int4}) {
        const Problem p(kind, 21, 70);
        const std::vector<float> back = p.back();
        const auto* bytes = static_cast<const unsigned char*>(p.memory.data);
        const std::int64_t scales = (3 * 16 * 2 + 63) / 64 * 64, block = scales + 3 * (kind == Quant::int8 ? 512 : 256);
        EXPECT_EQ(p.shape.bytes(), 2 * block);
        for (std::int64_t r = 0; r < 21; ++r)
            for (std::int64_t c = 0; c < 70; ++c) {
                const std::int64_t g = c / 32, q = c % 32 / 4;
                const unsigned char* at = bytes + r / 16 * block;
                std::uint16_t scale;
                std::memcpy(&scale, at + 2 * (16 * g + r % 16), 2);
                at += scales;
                const int code = kind == Quant::int8
                                     ? at[g * 512 + q * 64 + r % 16 * 4 + c % 4] - 128
                                     : (at[g * 256 + q / 2 * 64 + r % 16 * 4 + c % 4] >> (q % 2 * 4) & 15) - 8;
                EXPECT_EQ(back[std::size_t(r * 70 + c)], half_to_float(scale) * float(code));
            }
    }
}

TEST(Quantised, NearestErrsByHalfAStepAtMost) {
    for (const Quant kind : {Quant::int8, Quant::int4}) {
        const Problem p(kind, 33, 100);
        const std::vector<float> back = p.back();
        const float levels = kind == Quant::int8 ? 127 : 7;
        double squares = 0;
        for (std::int64_t r = 0; r < 33; ++r)
            for (std::int64_t g = 0; g < 4; ++g) {
                const std::int64_t first = r * 100 + 32 * g, count = std::min<std::int64_t>(32, 100 - 32 * g);
                float most = 0;
                for (std::int64_t i = first; i < first + count; ++i)
                    most = std::max(most, std::abs(p.w[std::size_t(i)]));
                for (std::int64_t i = first; i < first + count; ++i) {
                    const float e = std::abs(back[std::size_t(i)] - p.w[std::size_t(i)]);
                    EXPECT_LE(e, 0.5f * most / levels * 1.001f + most * 0x1p-11f);  // and the rounding of the scale
                    squares += double(e) * double(e);
                }
            }
        EXPECT_NEAR(p.error.error_squares, squares, 1e-6 * squares);
    }
}

TEST(Quantised, SearchIsBetterThanNearest) {
    for (const Quant kind : {Quant::int8, Quant::int4}) {
        const Problem nearest(kind, 64, 256), least(kind, 64, 256, QuantSearch::least_error);
        EXPECT_LT(least.error.relative(), (kind == Quant::int8 ? 0.96 : 0.88) * nearest.error.relative());
        EXPECT_GT(least.error.relative(), 0.5 * nearest.error.relative());
    }
}

TEST(Quantised, ZerosAndTinyValuesAreExactlyZeroOrClose) {
    std::vector<float> w(64, 0.f);
    w[40] = 1e-9f;  // its scale is below every f16
    const QuantShape shape{Quant::int4, 2, 32};
    const Aligned memory(shape.bytes());
    quantise(Cpu{1}, {w.data(), 2, 32}, shape, QuantSearch::least_error, static_cast<std::byte*>(memory.data));
    std::vector<float> row(32, 1.f);
    for (const std::int64_t r : {0, 1}) {
        dequantise_row({shape, static_cast<const std::byte*>(memory.data)}, r, row.data());
        for (const float v : row) EXPECT_EQ(v, 0.f);
    }
}

TEST(Quantised, TokensAreRoundedByGroups) {
    const std::vector<float> x = to<float>(random_values(2 * 45, 3));
    QuantTokens q;
    quantise_tokens(Cpu{1}, {x.data(), 2, 45}, q);
    for (std::size_t m = 0; m < 2; ++m)
        for (std::size_t g = 0; g < 2; ++g) {
            float most = 0;
            std::int32_t sum = 0;
            for (std::size_t k = 32 * g; k < std::min<std::size_t>(45, 32 * g + 32); ++k)
                most = std::max(most, std::abs(x[m * 45 + k]));
            EXPECT_FLOAT_EQ(q.scale[m * 2 + g], most / 127);
            for (std::size_t k = 32 * g; k < 32 * g + 32; ++k) {
                const int z = q.value[m * 64 + k];
                sum += z;
                EXPECT_NEAR(float(z) * q.scale[m * 2 + g], k < 45 ? x[m * 45 + k] : 0.f, 0.501f * most / 127);
            }
            EXPECT_EQ(q.sum[m * 2 + g], sum);
        }
}

// Found by fuzzing: whole numbers made of a NaN overflowed what they were multiplied by.
TEST(Quantised, WhatIsNotFiniteStaysSo) {
    const Problem p(Quant::int8, 16, 96);
    for (const char* target : quantised_targets()) {
        ASSERT_TRUE(choose_quantised_target(target));
        for (const float bad : {std::nanf(""), HUGE_VALF, -HUGE_VALF})
            for (const std::size_t at : {0u, 31u, 40u, 95u}) {
                std::vector<float> x(96, 0.5f), y(16);
                x[at] = bad;
                QuantTokens q;
                quantise_tokens(Cpu{1}, {x.data(), 1, 96}, q);
                EXPECT_TRUE(std::isnan(q.scale[at / 32]));
                EXPECT_EQ(q.sum[at / 32], 0);
                quantised_matmul(Cpu{1}, QuantMatmul{{y.data(), 1, 16}, &q, p.matrix(), {}});
                for (const float v : y) EXPECT_TRUE(std::isnan(v));
            }
        choose_quantised_target("");
    }
}

struct Result {
    Values simd, reference, low;
};
Result products(const Problem& p, std::int64_t tokens, bool epilogue, int threads) {
    const std::int64_t rows = p.shape.rows;
    const std::vector<float> x = to<float>(random_values(std::size_t(tokens * p.shape.cols), 11)),
                             residual = to<float>(random_values(std::size_t(tokens * rows), 12, 0.1));
    QuantTokens q;
    quantise_tokens(Cpu{1}, {x.data(), tokens, p.shape.cols}, q);
    const std::int64_t ld = rows + 3;
    std::vector<float> y(std::size_t(tokens * ld), std::nanf("")), low(std::size_t(tokens * rows));
    std::vector<double> reference(low.size());
    QuantMatmul call{
        .y = {y.data(), tokens, rows, ld}, .x = &q, .w = p.matrix(), .residual = {}, .relu_squared = epilogue};
    if (epilogue) call.residual = Mat<const float>(residual.data(), tokens, rows);
    quantised_matmul(Cpu{threads}, call);
    quantised_matmul_reference<double>(call, {reference.data(), tokens, rows});
    quantised_matmul_reference<float>(call, {low.data(), tokens, rows});
    Result r{{}, reference, Values(low.begin(), low.end())};
    for (std::int64_t m = 0; m < tokens; ++m) {
        for (std::int64_t n = 0; n < rows; ++n) r.simd.push_back(y[std::size_t(m * ld + n)]);
        for (std::int64_t n = rows; n < ld; ++n)
            EXPECT_TRUE(std::isnan(y[std::size_t(m * ld + n)])) << "written beyond";
    }
    return r;
}

TEST(Quantised, EveryInstructionSetMatchesPlainLoops) {
    const auto targets = quantised_targets();
    ASSERT_FALSE(targets.empty());
    for (const char* target : targets) {
        SCOPED_TRACE(target);
        ASSERT_TRUE(choose_quantised_target(target));
        for (const Quant kind : {Quant::int8, Quant::int4})
            for (const auto& [rows, cols] : {std::pair{1, 1}, {15, 31}, {16, 32}, {17, 33}, {40, 96}, {131, 200}}) {
                const Problem p(kind, rows, cols);
                for (const std::int64_t tokens : {1, 2, 3, 7, 8, 9, 21}) {
                    const Result r = products(p, tokens, tokens % 2 == 1, 1);
                    EXPECT_TRUE(close(r.simd, r.reference, r.low))
                        << rows << " x " << cols << ", " << tokens << " tokens";
                }
            }
    }
    EXPECT_TRUE(choose_quantised_target(""));
    EXPECT_FALSE(choose_quantised_target("none such"));
}

TEST(Quantised, ExtremeCodesDoNotOverflow) {
    for (const Quant kind : {Quant::int8, Quant::int4}) {
        const QuantShape shape{kind, 16, 64};
        const std::vector<float> w(16 * 64, 1.f), x(64, -1.f);
        const Aligned memory(shape.bytes());
        quantise(Cpu{1}, {w.data(), 16, 64}, shape, QuantSearch::nearest, static_cast<std::byte*>(memory.data));
        QuantTokens q;
        quantise_tokens(Cpu{1}, {x.data(), 1, 64}, q);
        for (const char* target : quantised_targets()) {
            ASSERT_TRUE(choose_quantised_target(target));
            std::vector<float> y(16);
            quantised_matmul(
                Cpu{1}, QuantMatmul{{y.data(), 1, 16}, &q, {shape, static_cast<const std::byte*>(memory.data)}, {}});
            for (const float v : y) EXPECT_NEAR(v, -64, 0.05);
            choose_quantised_target("");
        }
    }
}

TEST(Quantised, ThreadsAndOtherTokensChangeNothing) {
    const Problem p(Quant::int4, 700, 384);
    const Result one = products(p, 13, true, 1), three = products(p, 13, true, 3), alone = products(p, 1, true, 1);
    EXPECT_EQ(one.simd, three.simd);
    for (std::size_t n = 0; n < 700; ++n) EXPECT_EQ(one.simd[n], alone.simd[n]);
}

TEST(Quantised, BrokenContractsAreRefused) {
    const Problem p(Quant::int8, 16, 32);
    std::vector<float> y(16), x(64);
    QuantTokens q;
    quantise_tokens(Cpu{1}, {x.data(), 1, 64}, q);
    EXPECT_THROW(quantised_matmul(Cpu{1}, QuantMatmul{{y.data(), 1, 16}, &q, p.matrix(), {}}), ContractError);
    QuantMatrix moved = p.matrix();
    moved.data += 2;
    quantise_tokens(Cpu{1}, {x.data(), 1, 32}, q);
    EXPECT_THROW(quantised_matmul(Cpu{1}, QuantMatmul{{y.data(), 1, 16}, &q, moved, {}}), ContractError);
}

}  // namespace
}  // namespace fiedler::test
