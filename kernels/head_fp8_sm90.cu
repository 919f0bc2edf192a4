// kernels/head_fp8_sm90.cu: two products of int8 with their epilogues (panel_sm90.cuh): the base of each row's exponentials
// and the exponentials themselves, which leave twice, as they are and turned, so that both gradients are products whose
// inner dimension is the contiguous one: products of 8-bit floats take no other.
//
// Per tile of 64 x 192 and C = 384 the product takes 1,152 cycles, 2^x of special function units 768, and the other
// instructions (a warp of each scheduler) some 970. All run side by side, of three tiles. Whole sums cost two and a half
// instructions a logit: the beginning of the sum (Layout::kZero), its scale, half a product for what the scale makes of
// kZero. To convert them instead, one for one, would take as many, but registers that there are not.
//
// The way of the turned tile: a thread's sums are those of two neighbouring rows (Layout::kNeighbours) in 16 neighbouring
// columns of each 64. The bytes of two rows of a column are one 16-bit element of an 8 x 8 matrix, which stmatrix turns:
// 16 rows of a column lie side by side, of the four warps 64. Columns stay in the panel's order (place_of) in shared
// memory, and TMA brings them to their places. Their 16-byte pieces are swizzled as TMA's 64-byte pattern wants it,
// piece c of column n at c ^ (n / 2 % 4), so that the eight pieces of a matrix lie in different banks.
#include "kernels/head_fp8_sm90.h"

#include "kernels/fp8.cuh"
#include "kernels/panel_sm90.cuh"

namespace fiedler {
namespace {

using namespace panel;
using L = Layout<std::int8_t>;

// The scales of the panel's columns, in shared memory.
template <int N>
struct Scales {
    static constexpr int kBytes = N * static_cast<int>(sizeof(float));
    float up[4], zero[4];  // of four columns; what takes kZero away, exactly: a scale has 22 bits of mantissa

    __device__ static void begin(const float* scales, const Panels& p, const Share& share, unsigned char* common) {
        for (int i = threadIdx.x; i < N; i += L::kConsumers)
            reinterpret_cast<float*>(common)[i] = share.column + i < p.m ? scales[share.column + i] : 0;
    }
    // Of a thread's columns 4 q to 4 q + 3 of the run j.
    __device__ Scales(const unsigned char* common, int j, int q) {
        const float4 four = reinterpret_cast<const float4*>(common)[(threadIdx.x % 4 * L::kOwn + L::kRun * j) / 4 + q];
        up[0] = four.x, up[1] = four.y, up[2] = four.z, up[3] = four.w;
#pragma unroll
        for (int i = 0; i < 4; ++i) zero[i] = up[i] * -__int_as_float(L::kZero);
    }
    // The four logits of row k over the scale of the row: one rounding.
    __device__ void apply(float (&y)[4], const int (&sum)[N / 2], int k, int j, int q) const {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            y[i] = fmaf(__int_as_float(sum[L::sum_at(k, j, 2 * q + i / 2) + i % 2]), up[i], zero[i]);
    }
};

// By how much the base is put below the largest logit that is known: e5m2 spans 32 octaves, 2^-16 to 57,344. What is
// known is at 2^4 then. Above it, 11.8 octaves (8.2 nats) are left for what the sample has missed: the target is known,
// so that this much is missed only where the loss is above 8.2 nats as well. Below, a probability of 2^-18 of that of the
// largest still has its two bits, and 2^-21 is the least that counts: with less, 50,000 words of 2^-18 would be lost.
constexpr float kBelow = 4;

struct BaseProblem : Panels {
    float* base;
    const float *scales, *octaves, *target_logits;
};
__device__ float larger(float a, float b) {  // NaN if one is
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

template <int N>
struct BaseEpilogue {
    using Element = std::int8_t;
    using Problem = BaseProblem;
    static constexpr bool kMakesPanel = false;
    static constexpr int kTileBytes = 0, kCommonBytes = Scales<N>::kBytes;
    float octaves[2], target[2];

    __device__ static void begin(const BaseProblem& p, const Share& share, unsigned char* common) {
        Scales<N>::begin(p.scales, p, share, common);
    }
    __device__ void fetch(const BaseProblem& p, const Place<Element>& place) {
#pragma unroll
        for (int k = 0; k < 2; ++k) octaves[k] = p.octaves[place.row(k)], target[k] = p.target_logits[place.row(k)];
    }
    __device__ void store(const BaseProblem& p, const Place<Element>& place, const int (&sum)[N / 2]) const {
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            const Scales<N> scales(place.common, i / 4, i % 4);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float y[4];
                scales.apply(y, sum, k, i / 4, i % 4);
                top[k] = fmaxf(top[k], fmaxf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3])));
            }
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            top[k] = fmaxf(top[k], __shfl_xor_sync(0xffffffffu, top[k], 1));
            top[k] = fmaxf(top[k], __shfl_xor_sync(0xffffffffu, top[k], 2));
            if (threadIdx.x % 4 == 0) p.base[place.row(k)] = larger(top[k] * octaves[k], target[k] * kLog2e) - kBelow;
        }
    }
};

struct ExponentialsProblem : Panels {
    CUtensorMap turned;  // e', [V, rows], in the panel's order
    e5m2* e;
    std::int64_t ld_e;
    float* sums;
    std::int64_t ld_sums;
    const float *scales, *octaves, *base;
    const std::int32_t* targets;
};

// k: which of the two rows; j: which 64 columns; q: which four of a thread's 16.
template <int N>
struct ExponentialsEpilogue {
    using Element = std::int8_t;
    using Problem = ExponentialsProblem;
    static constexpr bool kMakesPanel = false;
    static constexpr int kTileBytes = N * kRows, kCommonBytes = Scales<N>::kBytes;
    static constexpr int kRunBytes = L::kRun * kRows, kTile = 4;  // to 6: numbers of named barriers
    float octaves[2], base[2];
    int target[2];

    __device__ static void begin(const ExponentialsProblem& p, const Share& share, unsigned char* common) {
        Scales<N>::begin(p.scales, p, share, common);
    }
    __device__ void fetch(const ExponentialsProblem& p, const Place<Element>& place) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            octaves[k] = p.octaves[place.row(k)], base[k] = p.base[place.row(k)];
            target[k] = p.targets[place.row(k)];
        }
    }
    // -inf in the place of the target's logit, if it is one of the thread's: `at` is relative to its first column.
    __device__ static void hide_target(int (&sum)[N / 2], int k, int at) {
        if (at < 0 || at >= N) return;
#pragma unroll
        for (int j = 0; j < N / L::kRun; ++j)
#pragma unroll
            for (int i = 0; i < L::kOwn; ++i)
                if (at == L::kRun * j + i) sum[L::sum_at(k, j, i / 2) + i % 2] = __float_as_int(-INFINITY);
    }
    // Four exponentials; their sum is added to `total`.
    __device__ std::uint32_t four(const int (&sum)[N / 2], const Scales<N>& scales, int k, int j, int q,
                                  float& total) const {
        float e[4];
        scales.apply(e, sum, k, j, q);
#pragma unroll
        for (int i = 0; i < 4; ++i) e[i] = exp2_fast(fmaf(e[i], octaves[k], -base[k]));
        total += (e[0] + e[1]) + (e[2] + e[3]);
        return pack_e5m2(e[0], e[1], e[2], e[3]);
    }
    __device__ static bool leads() { return threadIdx.x % kWarpgroup == 0; }  // the thread that stores by TMA
    __device__ static void meet() { named_wait(kTile + static_cast<int>(threadIdx.x) / kWarpgroup, kWarpgroup); }

    __device__ void store(const ExponentialsProblem& p, const Place<Element>& place, int (&sum)[N / 2]) const {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kWarpgroup / kWarp;
        unsigned char* const turned = place.tile + lane * kRows + (warp ^ (lane % 8 / 2)) * 16;
#pragma unroll
        for (int k = 0; k < 2; ++k) hide_target(sum, k, target[k] - place.column);
        if (leads()) store_wait();  // the tile before has been read
        meet();
        float total[2] = {0, 0};
        std::uint32_t word[N / L::kRun][2][4];
#pragma unroll
        for (int j = 0; j < N / L::kRun; ++j) {
            std::uint32_t pair[8];
            float of_run[2] = {0, 0};
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const Scales<N> scales(place.common, j, q);
#pragma unroll
                for (int k = 0; k < 2; ++k) word[j][k][q] = four(sum, scales, k, j, q, of_run[k]);
                pair[2 * q] = __byte_perm(word[j][0][q], word[j][1][q], 0x5140);
                pair[2 * q + 1] = __byte_perm(word[j][0][q], word[j][1][q], 0x7362);
            }
#pragma unroll
            for (int q = 0; q < 8; q += 4)
                store_matrices_turned(turned + j * kRunBytes + q * 8 * kRows, pair[q], pair[q + 1], pair[q + 2],
                                      pair[q + 3]);
            if (place.column + L::kRun * j < p.m) total[0] += of_run[0], total[1] += of_run[1];
        }
        publish_shared();  // waits for what has been written: e comes after it
        meet();
        const int column = place.column - lane % 4 * L::kOwn, row = place.first_row - lane / 4 * 2 - warp * 16;
        if (leads())
#pragma unroll
            for (int j = 0; j < N / L::kRun; ++j)
                if (column + L::kRun * j < p.m)
                    store_box(&p.turned, row, 0, (column + L::kRun * j) / L::kOwn, 0, place.tile + j * kRunBytes);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            e5m2* const to = place.start(p.e, p.ld_e, k);
#pragma unroll
            for (int j = 0; j < N / L::kRun; ++j)
                if (place.column + L::kRun * j < p.m)
                    *reinterpret_cast<uint4*>(to + L::kRun * j) =
                        uint4{word[j][k][0], word[j][k][1], word[j][k][2], word[j][k][3]};
            total[k] += __shfl_xor_sync(0xffffffffu, total[k], 1);
            total[k] += __shfl_xor_sync(0xffffffffu, total[k], 2);
            if (lane % 4 == 0) p.sums[column / N * p.ld_sums + place.row(k)] = total[k];
        }
    }
    __device__ static void finish() {
        if (leads()) store_wait();
    }
};

// Columns [V] of `turned` in the order of map_of_weights, 64 rows at a time.
CUtensorMap map_of_turned(const Mat<e5m2>& m) {
    const cuuint64_t row = cuuint64_t(m.ld);
    return tensor_map<4>(m.data, {cuuint64_t(m.cols), 2, cuuint64_t(m.rows) / L::kOwn, L::kPairs},
                         {row, L::kOwn * row, 2 * row}, {kRows, 2, 4, L::kPairs}, CU_TENSOR_MAP_SWIZZLE_64B);
}

}  // namespace

void head_fp8_base(const Cuda& dev, const HeadFp8Base& p) {
    BaseProblem problem{};
    problem.base = p.base.data, problem.scales = p.scales;
    problem.octaves = p.octaves, problem.target_logits = p.target_logits;
    describe(problem, p.x, p.sample.rows, &p.sample);
    launch_columns<kHeadFp8Panel, BaseEpilogue<kHeadFp8Panel>>(dev, problem);
}

void head_fp8_exponentials(const Cuda& dev, const HeadFp8Exponentials& p) {
    ExponentialsProblem problem{};
    problem.turned = map_of_turned(p.turned);
    problem.e = p.e.data, problem.ld_e = p.e.ld;
    problem.sums = p.sums.data, problem.ld_sums = p.sums.ld;
    problem.scales = p.scales, problem.octaves = p.octaves, problem.base = p.base, problem.targets = p.targets;
    describe(problem, p.x, p.w.rows, &p.w);
    launch_columns<kHeadFp8Panel, ExponentialsEpilogue<kHeadFp8Panel>>(dev, problem);
}

}  // namespace fiedler
