// kernels/half_panel_cpu.cpp: steps of a filter on panels in half precision on the CPU (contract in half_panel.h).
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels/half_panel.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

constexpr std::int64_t kMost = kHalfPanelMost, kChunk = 1024;  // columns; rows of a piece of work
using Row = std::array<float, kMost>;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// sum += factor * x; w is a multiple of 8.
void add(Row& sum, float factor, const f16* x, std::int64_t w) {
#ifdef __F16C__
    for (std::int64_t j = 0; j < w; j += 8) {
        const __m256 row = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j)));
        float* to = sum.data() + j;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_mul_ps(_mm256_set1_ps(factor), row)));
    }
#else
    for (std::int64_t j = 0; j < w; ++j) sum[std::size_t(j)] += factor * float(x[j]);
#endif
}
void store(f16* y, const Row& row, std::int64_t w) {
#ifdef __F16C__
    for (std::int64_t j = 0; j < w; j += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y + j),
                         _mm256_cvtps_ph(_mm256_loadu_ps(row.data() + j), _MM_FROUND_TO_NEAREST_INT));
#else
    for (std::int64_t j = 0; j < w; ++j) y[j] = f16(row[std::size_t(j)]);
#endif
}

float row_factor(const Vec<const float>& rows, std::int64_t i) { return rows ? rows.data[i] : 1.f; }

void find_scale(const Cpu& d, const HalfPack& p) {
    const std::int64_t n = p.x.rows, m = p.x.cols, w = p.y.cols, chunks = ceil_div(n, kChunk);
    std::vector<std::uint32_t> most(std::size_t(chunks * w), 0);
    parallel_for(d, chunks, [&](std::int64_t c) {
        std::uint32_t* mine = most.data() + c * w;
        for (std::int64_t i = c * kChunk; i < std::min((c + 1) * kChunk, n); ++i)
            for (std::int64_t j = 0; j < m; ++j)
                mine[j] = std::max(mine[j],
                                   std::bit_cast<std::uint32_t>(p.x.row(i)[j] / row_factor(p.rows, i)) & 0x7fffffffu);
    });
    for (std::int64_t j = 0; j < w; ++j) {
        std::uint32_t largest = 0;
        for (std::int64_t c = 0; c < chunks; ++c) largest = std::max(largest, most[std::size_t(c * w + j)]);
        p.scale.data[j] = std::bit_cast<float>(half_scale_bits(largest));
    }
}

// The projection of rows [first, last) on v.
std::array<double, kMost> projection(const HalfDeflate& p, std::int64_t first, std::int64_t last) {
    std::array<double, kMost> total{};
    for (std::int64_t r = first; r < last; r += kEigenDeflatePiece) {
        Row sum{};
        for (std::int64_t i = r; i < std::min(r + kEigenDeflatePiece, last); ++i)
            add(sum, p.walk ? p.v.data[i] * p.v.data[i] : p.v.data[i], p.x.row(i), p.x.cols);
        for (std::size_t j = 0; j < std::size_t(kMost); ++j) total[j] += double(sum[j]);
    }
    return total;
}
void subtract(const HalfDeflate& p, std::int64_t first, std::int64_t last, const std::array<double, kMost>& total) {
    for (std::int64_t i = first; i < last; ++i)
        for (std::int64_t j = 0; j < p.x.cols; ++j) {
            f16& x = p.x.row(i)[j];
            x = f16(float(x) - (p.walk ? 1.f : p.v.data[i]) * float(total[std::size_t(j)]));
        }
}

}  // namespace

void half_pack(const Cpu& d, const HalfPack& p) {
    check(p);
    if (!p.keep_scale) find_scale(d, p);
    const std::int64_t m = p.x.cols, w = p.y.cols;
    parallel_for(d, p.x.rows, [&](std::int64_t i) {
        const float v = row_factor(p.rows, i);
        for (std::int64_t j = 0; j < w; ++j) p.y.row(i)[j] = f16(j < m ? p.scale.data[j] * (p.x.row(i)[j] / v) : 0.f);
    });
}

void half_unpack(const Cpu& d, const HalfUnpack& p) {
    check(p);
    parallel_for(d, p.x.rows, [&](std::int64_t i) {
        const float v = row_factor(p.rows, i);
        for (std::int64_t j = 0; j < p.x.cols; ++j) p.x.row(i)[j] = v * (float(p.y.row(i)[j]) / p.scale.data[j]);
    });
}

void half_apply(const Cpu& d, const HalfApply& p) {
    check(p);
    constexpr std::int64_t kRows = 256;
    const std::int64_t n = p.matrix.rows, w = p.x.cols;
    const bool weighted = p.l == HalfOperator::weighted;
    parallel_for_uneven(d, ceil_div(n, kRows), [&](std::int64_t c) {
        for (std::int64_t i = c * kRows; i < std::min((c + 1) * kRows, n); ++i) {
            Row sum{}, y{};
            const std::int64_t begin = p.matrix.offsets.data[i], end = p.matrix.offsets.data[i + 1];
            for (std::int64_t e = begin; e < end; ++e)
                add(sum, weighted ? p.matrix.values.data[e] : 1.f, p.x.row(p.matrix.columns.data[e]), w);
            const HalfRow f = half_row(p.l, p.alpha, p.beta, end - begin);
            for (std::int64_t j = 0; j < w; ++j) y[std::size_t(j)] = f.sum * sum[std::size_t(j)];
            if (f.own != 0) add(y, f.own, p.x.row(i), w);
            if (p.gamma != 0) add(y, p.gamma, p.z.row(i), w);
            for (std::int64_t j = 0; p.r && j < w; ++j)
                y[std::size_t(j)] += p.delta[std::size_t(j)] * float(p.r.row(i)[j]);
            store(p.y.row(i), y, w);
        }
    });
}

void half_deflate(const Cpu& d, const HalfDeflate& p) {
    check(p);
    for (std::int64_t c = 0; c + 1 < p.offsets.size; ++c) {
        const std::int64_t first = p.offsets.data[c], last = p.offsets.data[c + 1],
                           chunks = ceil_div(last - first, kChunk);
        const auto end = [&](std::int64_t k) { return std::min(first + (k + 1) * kChunk, last); };
        std::vector<std::array<double, kMost>> parts(std::size_t(std::max<std::int64_t>(chunks, 1)));
        parallel_for(d, chunks,
                     [&](std::int64_t k) { parts[std::size_t(k)] = projection(p, first + k * kChunk, end(k)); });
        for (std::size_t k = 1; k < parts.size(); ++k)
            for (std::size_t j = 0; j < std::size_t(kMost); ++j) parts[0][j] += parts[k][j];
        parallel_for(d, chunks, [&](std::int64_t k) { subtract(p, first + k * kChunk, end(k), parts[0]); });
    }
}

}  // namespace fiedler
