// kernels/head_fp8_rows_sm90.cu: what the vocabulary head in 8 bits needs around its products: factors, rounding,
// turning, the rows' losses. All of it is bound by memory.
#include <cuda_fp8.h>

#include "kernels/common.cuh"
#include "kernels/fp8.cuh"
#include "kernels/head_fp8_sm90.h"

namespace fiedler {
namespace {

constexpr int kThreads = 256, kPackSize = Pack<nv_bf16>::size;
constexpr std::uint32_t kInfinityBits = 0x7f800000u;

// The power of two that takes a number of these bits to at most 448, and above 224; NaN where it is not finite.
__device__ float factor_of(std::uint32_t bits) {
    constexpr int kMostOctaves = 100;  // for 0 and what is next to it
    if (bits >= kInfinityBits) return __int_as_float(0x7fffffff);
    const int exponent = static_cast<int>((bits + 0x1fffffu) >> 23);  // one more from a mantissa of 1.75 on
    return __uint_as_float(static_cast<std::uint32_t>(min(262 - exponent, 127 + kMostOctaves)) << 23);
}
__device__ std::uint32_t magnitude(nv_bf16 x) { return (std::uint32_t(__bfloat16_as_ushort(x)) & 0x7fffu) << 16; }

// Of a row in int8.
struct Scale {
    float down, up;  // to whole numbers, and back

    // Without the last `bits` of its mantissa.
    __device__ static float upwards(float x, int bits) {
        const std::uint32_t last = (1u << bits) - 1;
        return __uint_as_float((__float_as_uint(x) + last) & ~last);
    }
    // largest: of the row. square(f): the sum of the squares of the row times f.
    template <class Square>
    __device__ Scale(std::uint32_t largest, Square&& square) {
        constexpr float kLeast = 0x1p-100f, kMost = 0x1p100f;  // all of what comes of it are normal numbers
        const float most = fminf(fmaxf(__uint_as_float(largest), kLeast), kMost);
        const float length = upwards(sqrtf(square(127.f / most)) / kHeadInt8Length, 16);
        up = upwards(most / 127.f * fmaxf(1.f, length), 2);
        down = 1.f / up;
        if (!(__uint_as_float(largest) <= kMost)) up = __int_as_float(0x7fffffff);
    }
    // x times `down`, rounded once, to the nearest: the low byte of the sum with 1.5 * 2^23, whose last bit counts 1.
    __device__ std::uint32_t whole(nv_bf16 x) const { return __float_as_uint(fmaf(to_float(x), down, 0x1.8p23f)); }
    __device__ std::uint32_t four(const nv_bf16* x) const {
        const std::uint32_t lo = __byte_perm(whole(x[0]), whole(x[1]), 0x0040);
        return __byte_perm(lo, __byte_perm(whole(x[2]), whole(x[3]), 0x0040), 0x5410);
    }
    __device__ uint4 pack(const Pack<nv_bf16>& a, const Pack<nv_bf16>& b) const {
        return {four(a.v), four(a.v + 4), four(b.v), four(b.v + 4)};
    }
};
__device__ uint2 round_pack(const Pack<nv_bf16>& x, float factor) {
    float v[kPackSize];
#pragma unroll
    for (int i = 0; i < kPackSize; ++i) v[i] = to_float(x.v[i]) * factor;
    return {pack_e4m3(v[0], v[1], v[2], v[3]), pack_e4m3(v[4], v[5], v[6], v[7])};
}
__device__ uint4 round_pack(const Pack<nv_bf16>& a, const Pack<nv_bf16>& b, float factor) {
    const uint2 lo = round_pack(a, factor), hi = round_pack(b, factor);
    return {lo.x, lo.y, hi.x, hi.y};
}

// ---- W in int8 ---------------------------------------------------------------------------------------------------

constexpr int kMostPieces = 2;  // of 16 elements, that a thread has of a row: 768 / 16 / 32, rounded up

// Of a warp's row times f, the sum of squares.
__device__ float square(const Pack<nv_bf16> (&x)[kMostPieces][2], int lane, int pieces, float f) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMostPieces; ++i)
        if (lane + i * kWarp < pieces)
#pragma unroll
            for (int k = 0; k < 2 * kPackSize; ++k) {
                const float v = to_float(x[i][k / kPackSize].v[k % kPackSize]) * f;
                sum = fmaf(v, v, sum);
            }
    return warp_sum(sum);
}

struct Words {
    std::int8_t* y;
    float* scales;
    std::uint32_t* largest;
    const nv_bf16* x;
    std::int64_t ld_y, ld_x;
    int rows, pieces;
};
// A warp takes rows one after another.
__global__ void __launch_bounds__(kThreads) words_kernel(const Words p) {
    constexpr int kWarps = kThreads / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    std::uint32_t largest = 0;
    for (int row = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp; row < p.rows;
         row += static_cast<int>(gridDim.x) * kWarps) {
        Pack<nv_bf16> x[kMostPieces][2];
        std::uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < kMostPieces; ++i)
            if (const int piece = lane + i * kWarp; piece < p.pieces)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    x[i][h] = load16(p.x + row * p.ld_x + piece * 16 + h * kPackSize);
#pragma unroll
                    for (int k = 0; k < kPackSize; ++k) most = max(most, magnitude(x[i][h].v[k]));
                }
        most = __reduce_max_sync(0xffffffffu, most);
        largest = max(largest, most);
        const Scale scale(most, [&](float f) { return square(x, lane, p.pieces, f); });
#pragma unroll
        for (int i = 0; i < kMostPieces; ++i)
            if (const int piece = lane + i * kWarp; piece < p.pieces)
                *reinterpret_cast<uint4*>(p.y + row * p.ld_y + piece * 16) = scale.pack(x[i][0], x[i][1]);
        if (lane == 0) p.scales[row] = scale.up;
    }
    if (lane == 0) atomicMax(p.largest, largest);  // whole numbers: in any order
}

// ---- rounded and turned ------------------------------------------------------------------------------------------

struct Turn {
    e4m3* turned;
    const nv_bf16* x;
    std::int64_t ld_x, ld_turned;
    const std::uint32_t* largest;
    const float* row_factors;
    float* inverse;
    int rows;
};
constexpr int kTile = 128, kPieces = kTile / 16;  // of 16 bytes, of a row
// A block takes a tile of 128 x 128. In shared memory the pieces of a row are rotated by one every 16 rows: a thread
// gathers 16 rows of four columns, and its warp's eight groups of rows are in different banks.
__global__ void __launch_bounds__(kThreads) turn_kernel(const Turn p) {
    __shared__ uint4 tile[kTile][kPieces];
    const int column = static_cast<int>(blockIdx.y) * kTile, first = static_cast<int>(blockIdx.x) * kTile;
    const float factor = factor_of(*p.largest);
    if (p.inverse && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *p.inverse = 1.f / factor;
#pragma unroll
    for (int i = threadIdx.x; i < kTile * kPieces; i += kThreads) {
        const int in = i / kPieces, piece = i % kPieces, row = first + in;
        uint4 value{0, 0, 0, 0};
        if (row < p.rows) {
            const nv_bf16* const from = p.x + row * p.ld_x + column + piece * 16;
            value = round_pack(load16(from), load16(from + kPackSize),
                               p.row_factors ? factor * p.row_factors[row] : factor);
        }
        tile[in][(piece + in / 16) % kPieces] = value;
    }
    __syncthreads();
    const int group = threadIdx.x % 8, quad = threadIdx.x / 8;  // 16 rows, four columns
    if (first + 16 * group >= p.rows) return;
    std::uint32_t out[4][4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
        std::uint32_t in[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
            in[r] = reinterpret_cast<const std::uint32_t*>(
                tile[16 * group + 4 * g + r])[(quad + 4 * group) % (4 * kPieces)];
        const std::uint32_t low01 = __byte_perm(in[0], in[1], 0x5140), low23 = __byte_perm(in[2], in[3], 0x5140);
        const std::uint32_t high01 = __byte_perm(in[0], in[1], 0x7362), high23 = __byte_perm(in[2], in[3], 0x7362);
        out[0][g] = __byte_perm(low01, low23, 0x5410), out[1][g] = __byte_perm(low01, low23, 0x7632);
        out[2][g] = __byte_perm(high01, high23, 0x5410), out[3][g] = __byte_perm(high01, high23, 0x7632);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
        *reinterpret_cast<uint4*>(p.turned + (column + 4 * quad + c) * p.ld_turned + first + 16 * group) =
            uint4{out[c][0], out[c][1], out[c][2], out[c][3]};
}

// ---- rows of a chunk ---------------------------------------------------------------------------------------------

struct RowsOf {
    std::int8_t* y;
    float *largest, *octaves, *target_logits;
    const nv_bf16 *x, *w;
    std::int64_t ld_y, ld_x, ld_w;
    const std::int32_t* targets;
    int rows, pieces, vocab;
};
// A warp takes a row, a thread up to two pieces of 16 elements of it.
__global__ void __launch_bounds__(kThreads) rows_kernel(const RowsOf p) {
    const int row = static_cast<int>(blockIdx.x) * (kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (row >= p.rows) return;
    const int target = p.targets[row];
    const bool known = target >= 0 && target < p.vocab;
    Pack<nv_bf16> x[kMostPieces][2];
    std::uint32_t most = 0;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMostPieces; ++i) {
        const int piece = lane + i * kWarp;
        if (piece >= p.pieces) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int at = piece * 16 + h * kPackSize;
            x[i][h] = load16(p.x + row * p.ld_x + at);
            const auto w = known ? load16(p.w + target * p.ld_w + at) : Pack<nv_bf16>{};
#pragma unroll
            for (int k = 0; k < kPackSize; ++k) {
                most = max(most, magnitude(x[i][h].v[k]));
                if (known) sum = fmaf(to_float(x[i][h].v[k]), to_float(w.v[k]), sum);
            }
        }
    }
    most = __reduce_max_sync(0xffffffffu, most);
    sum = warp_sum(sum);
    const Scale scale(most, [&](float f) { return square(x, lane, p.pieces, f); });
#pragma unroll
    for (int i = 0; i < kMostPieces; ++i)
        if (const int piece = lane + i * kWarp; piece < p.pieces)
            *reinterpret_cast<uint4*>(p.y + row * p.ld_y + piece * 16) = scale.pack(x[i][0], x[i][1]);
    if (lane > 0) return;
    p.largest[row] = __uint_as_float(most);
    p.octaves[row] = scale.up * kLog2e;
    p.target_logits[row] = known ? sum : target < 0 ? INFINITY : __int_as_float(0x7fffffff);
}

struct Sample {
    std::int8_t* sample;
    float* sample_scales;
    const std::int8_t* w;
    const float* scales;
    std::int64_t ld_w;
    const std::int32_t* targets;
    int rows, pieces, vocab;
};
__global__ void __launch_bounds__(kThreads) sample_kernel(const Sample p) {
    const int item = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    const int k = item / p.pieces, piece = item % p.pieces;
    if (k >= kHeadFp8Sample) return;
    int word = p.targets[static_cast<int>(std::int64_t(k) * p.rows / kHeadFp8Sample)];
    if (word < 0 || word >= p.vocab) word = k % p.vocab;
    *reinterpret_cast<uint4*>(p.sample + item * 16) = *reinterpret_cast<const uint4*>(p.w + word * p.ld_w + piece * 16);
    if (piece == 0) p.sample_scales[k] = p.scales[word];
}

struct Finish {
    float *losses, *factors, *pulls;
    e5m2* turned;
    std::int64_t ld_turned;
    std::uint32_t* x_largest;
    const float *sums, *largest, *base;  // sums: [panels, rows]
    const std::int32_t* targets;
    int rows, panels, vocab;
    float scale;
};
// log((s + t) / t), t = 2^target: small losses keep their digits, and large ones need no t that is representable.
__device__ float loss_of(float s, float t, float target) {
    return s < 1e6f * t ? log1pf(s / t) : logf(s + t) - target * kLn2;
}
constexpr int kSlices = 8;  // threads that share the panels of a row
// Sums of the panels, in one order, and what follows from them.
__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish p) {
    __shared__ float shared[kSlices][kWarp];
    const int lane = threadIdx.x, row = static_cast<int>(blockIdx.x) * kWarp + lane;  // rows: a multiple of 32
    float s = 0.f;
#pragma unroll 4
    for (int i = threadIdx.y; i < p.panels; i += kSlices) s += p.sums[std::int64_t(i) * p.rows + row];
    shared[threadIdx.y][lane] = s;
    __syncthreads();
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int i = 1; i < kSlices; ++i) s += shared[i][lane];
    const int word = p.targets[row];
    const bool counts = word >= 0;
    const float target = p.losses[row] * kLog2e - p.base[row], t = exp2f(target);  // NaN for a word that is none
    const float factor = counts ? p.scale / (s + t) : 0.f;
    p.losses[row] = counts ? loss_of(s, t, target) : 0.f;
    p.factors[row] = factor;
    p.pulls[row] = counts ? factor * s : 0.f;
    if (counts && word < p.vocab)
        p.turned[word * p.ld_turned + row].bits = __nv_cvt_float_to_fp8(-s, __NV_SATFINITE, __NV_E5M2);
    const std::uint32_t most = __reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(p.largest[row] * factor)));
    if (lane == 0) atomicMax(p.x_largest, most);
}

struct Dx {
    nv_bf16* dx;
    const nv_bf16* w;
    std::int64_t ld_dx, ld_w;
    const float *factors, *pulls;
    const std::int32_t* targets;
    const std::uint32_t* w_largest;
    int rows, packs, vocab;
};
__global__ void __launch_bounds__(kThreads) dx_kernel(const Dx p) {
    const std::int64_t item = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t row = item / p.packs, part = item % p.packs * kPackSize;
    if (row >= p.rows) return;
    const int word = p.targets[row];
    const float of_w = factor_of(*p.w_largest), factor = p.factors[row] / of_w, pull = p.pulls[row] / of_w;
    auto value = load16(p.dx + row * p.ld_dx + part);
    const uint2 w = word >= 0 && word < p.vocab ? round_pack(load16(p.w + word * p.ld_w + part), of_w) : uint2{0, 0};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float4 rounded = unpack_e4m3(h ? w.y : w.x);
        const float of_target[4] = {rounded.x, rounded.y, rounded.z, rounded.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            value.v[4 * h + i] = from_float<nv_bf16>(fmaf(to_float(value.v[4 * h + i]), factor, -pull * of_target[i]));
    }
    store16(p.dx + row * p.ld_dx + part, value);
}

unsigned blocks_of(std::int64_t items) { return static_cast<unsigned>(ceil_div(items, std::int64_t(kThreads))); }

}  // namespace

void head_fp8_words(const Cuda& dev, const HeadFp8Words& p) {
    const Words words{p.y.data,
                      p.scales,
                      p.largest,
                      nv(p.x.data),
                      p.y.ld,
                      p.x.ld,
                      static_cast<int>(p.x.rows),
                      static_cast<int>(p.x.cols / 16)};
    CUDA_CHECK(cudaMemsetAsync(p.largest, 0, sizeof *p.largest, stream_of(dev)));
    words_kernel<<<static_cast<unsigned>(8 * dev.sm_count), kThreads, 0, stream_of(dev)>>>(words);
    LAUNCH_CHECK("head, words");
}

void head_fp8_turn(const Cuda& dev, const HeadFp8Turn& p) {
    const Turn turn{p.turned.data, nv(p.x.data),  p.x.ld,    p.turned.ld,
                    p.largest,     p.row_factors, p.inverse, static_cast<int>(p.x.rows)};
    const dim3 blocks(static_cast<unsigned>(ceil_div(p.x.rows, std::int64_t(kTile))),
                      static_cast<unsigned>(p.x.cols / kTile));
    turn_kernel<<<blocks, kThreads, 0, stream_of(dev)>>>(turn);
    LAUNCH_CHECK("head, turn");
}

void head_fp8_rows(const Cuda& dev, const HeadFp8Rows& p) {
    const RowsOf rows{p.y.data,
                      p.largest,
                      p.octaves,
                      p.target_logits,
                      nv(p.x.data),
                      nv(p.w.data),
                      p.y.ld,
                      p.x.ld,
                      p.w.ld,
                      p.targets,
                      static_cast<int>(p.x.rows),
                      static_cast<int>(p.x.cols / 16),
                      static_cast<int>(p.w.rows)};
    rows_kernel<<<blocks_of(p.x.rows * kWarp), kThreads, 0, stream_of(dev)>>>(rows);
    LAUNCH_CHECK("head, rows");
}

void head_fp8_sample(const Cuda& dev, const HeadFp8Sample& p) {
    const int pieces = static_cast<int>(p.w.cols / 16);
    const Sample sample{p.sample.data,
                        p.sample_scales,
                        p.w.data,
                        p.scales,
                        p.w.ld,
                        p.targets.data,
                        static_cast<int>(p.targets.size),
                        pieces,
                        static_cast<int>(p.w.rows)};
    sample_kernel<<<blocks_of(kHeadFp8Sample * pieces), kThreads, 0, stream_of(dev)>>>(sample);
    LAUNCH_CHECK("head, sample");
}

void head_fp8_finish(const Cuda& dev, const HeadFp8Finish& p) {
    const int rows = static_cast<int>(p.losses.size);
    const Finish finish{p.losses.data,
                        p.factors,
                        p.pulls,
                        p.turned.data,
                        p.turned.ld,
                        p.x_largest,
                        p.sums.data,
                        p.largest,
                        p.base,
                        p.targets,
                        rows,
                        static_cast<int>(p.sums.rows),
                        static_cast<int>(p.turned.rows),
                        p.scale};
    CUDA_CHECK(cudaMemsetAsync(p.x_largest, 0, sizeof *p.x_largest, stream_of(dev)));
    finish_kernel<<<static_cast<unsigned>(rows / kWarp), dim3(kWarp, kSlices), 0, stream_of(dev)>>>(finish);
    LAUNCH_CHECK("head, finish");
}

void head_fp8_dx(const Cuda& dev, const HeadFp8Dx& p) {
    const int packs = static_cast<int>(p.dx.cols / kPackSize);
    const Dx dx{nv(p.dx.data),
                nv(p.w.data),
                p.dx.ld,
                p.w.ld,
                p.factors,
                p.pulls,
                p.targets,
                p.w_largest,
                static_cast<int>(p.dx.rows),
                packs,
                static_cast<int>(p.w.rows)};
    dx_kernel<<<blocks_of(p.dx.rows * packs), kThreads, 0, stream_of(dev)>>>(dx);
    LAUNCH_CHECK("head, dx");
}

}  // namespace fiedler
