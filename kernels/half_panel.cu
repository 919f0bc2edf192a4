// kernels/half_panel.cu: steps of a filter on panels in half precision on the GPU (contract in half_panel.h).
//
// A lane holds eight columns, 16 bytes: a row of a panel is one, two or four lanes. In apply a group of lanes takes
// several entries of a row at once, with kRun gathers of each lane in flight, and adds up its lanes' sums at the end of
// the row. Pieces of long rows, a warp each, are the first blocks of the same launch. What is used once (entries, Z, Y)
// is marked so, to leave the cache to X.
#include <cuda_fp16.h>

#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/eigen_pieces.cuh"
#include "kernels/half_panel.h"

namespace fiedler {
namespace {

constexpr int kLane = 8;  // columns
constexpr unsigned kAll = 0xffffffffu;

struct Lane {
    float v[kLane] = {};
    __device__ void add(float factor, const uint4& x) {
        const auto* h = reinterpret_cast<const __half2*>(&x);
#pragma unroll
        for (int k = 0; k < kLane / 2; ++k) {
            const float2 f = __half22float2(h[k]);
            v[2 * k] = fmaf(factor, f.x, v[2 * k]);
            v[2 * k + 1] = fmaf(factor, f.y, v[2 * k + 1]);
        }
    }
    __device__ void add(const float* x) {
#pragma unroll
        for (int k = 0; k < kLane; k += 4) {
            const float4 f = *reinterpret_cast<const float4*>(x + k);
            v[k] += f.x, v[k + 1] += f.y, v[k + 2] += f.z, v[k + 3] += f.w;
        }
    }
    // Of lanes `first`, 2 `first`, ... up to a group of `size` lanes, in every one of them.
    template <int first, int size>
    __device__ void add_lanes() {
#pragma unroll
        for (int step = first; step < size; step *= 2)
#pragma unroll
            for (int k = 0; k < kLane; ++k) v[k] += __shfl_xor_sync(kAll, v[k], step);
    }
    __device__ uint4 rounded() const {
        uint4 r;
        auto* h = reinterpret_cast<__half2*>(&r);
#pragma unroll
        for (int k = 0; k < kLane / 2; ++k) h[k] = __floats2half2_rn(v[2 * k], v[2 * k + 1]);
        return r;
    }
};

// ---- pack and unpack -------------------------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

// Four columns of x, zeros from `room` on.
__device__ inline float4 load_some(const float* x, int room) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (room <= 0) return v;
    v = *reinterpret_cast<const float4*>(x);  // rows go on to a multiple of four
    if (room < 4) v.w = 0.f;
    if (room < 3) v.z = 0.f;
    if (room < 2) v.y = 0.f;
    return v;
}
__device__ inline void store_some(float* x, const float4& v, int room) {
    if (room >= 4) {
        *reinterpret_cast<float4*>(x) = v;
        return;
    }
    if (room > 0) x[0] = v.x;
    if (room > 1) x[1] = v.y;
    if (room > 2) x[2] = v.z;
}
__device__ inline std::uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// most[block][j]: the largest magnitude among the block's rows of column j, as bits. A thread has four columns.
__global__ void __launch_bounds__(kPackThreads)
    half_largest_kernel(const Mat<const float> x, const float* rows, int w, std::uint32_t* most) {
    __shared__ uint4 shared[kPackThreads];
    const int lanes = w / 4, column = int(threadIdx.x) % lanes * 4, room = int(x.cols) - column;
    const std::int64_t step = std::int64_t(gridDim.x) * (kPackThreads / lanes);
    uint4 mine = make_uint4(0, 0, 0, 0);
    const auto take = [&](const uint4& o) {
        mine.x = max(mine.x, o.x), mine.y = max(mine.y, o.y), mine.z = max(mine.z, o.z), mine.w = max(mine.w, o.w);
    };
#pragma unroll 4
    for (std::int64_t row = (std::int64_t(blockIdx.x) * kPackThreads + threadIdx.x) / lanes; row < x.rows;
         row += step) {
        const float4 v = load_some(x.data + row * x.ld + column, room);
        const float f = rows ? rows[row] : 1.f;
        take(make_uint4(magnitude(v.x / f), magnitude(v.y / f), magnitude(v.z / f), magnitude(v.w / f)));
    }
    shared[threadIdx.x] = mine;
    __syncthreads();
    if (int(threadIdx.x) >= lanes) return;
    for (int t = int(threadIdx.x) + lanes; t < kPackThreads; t += lanes) take(shared[t]);
    *reinterpret_cast<uint4*>(most + std::int64_t(blockIdx.x) * w + column) = mine;
}

// One block: kPackThreads / w threads of a column take a share of the blocks each.
__global__ void __launch_bounds__(kPackThreads)
    half_scale_kernel(const std::uint32_t* most, int blocks, int w, float* scale) {
    __shared__ std::uint32_t shared[kPackThreads];
    const int column = int(threadIdx.x) % w, slices = kPackThreads / w;
    std::uint32_t largest = 0;
#pragma unroll 4
    for (int b = int(threadIdx.x) / w; b < blocks; b += slices) largest = max(largest, most[b * w + column]);
    shared[threadIdx.x] = largest;
    __syncthreads();
    if (int(threadIdx.x) >= w) return;
    for (int t = int(threadIdx.x) + w; t < kPackThreads; t += w) largest = max(largest, shared[t]);
    scale[column] = __uint_as_float(half_scale_bits(largest));
}

// A thread takes eight columns of a row.
__global__ void __launch_bounds__(kPackThreads)
    half_pack_kernel(uint4* y, const Mat<const float> x, int lanes, const float* scale, const float* rows) {
    const std::int64_t at = std::int64_t(blockIdx.x) * kPackThreads + threadIdx.x, row = at / lanes;
    if (row >= x.rows) return;
    const int column = int(at % lanes) * kLane, room = int(x.cols) - column;
    const float* from = x.data + row * x.ld + column;
    const float4 a = load_some(from, room), b = load_some(from + 4, room - 4);
    const float f = rows ? rows[row] : 1.f;
    Lane r;
    const float values[kLane] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int k = 0; k < kLane; ++k) r.v[k] = scale[column + k] * (values[k] / f);
    y[at] = r.rounded();
}
__global__ void __launch_bounds__(kPackThreads)
    half_unpack_kernel(Mat<float> x, const uint4* y, int lanes, const float* scale, const float* rows) {
    const std::int64_t at = std::int64_t(blockIdx.x) * kPackThreads + threadIdx.x, row = at / lanes;
    if (row >= x.rows) return;
    const int column = int(at % lanes) * kLane, room = int(x.cols) - column;
    const float f = rows ? rows[row] : 1.f;
    Lane r;
    r.add(1.f, __ldcs(y + at));
#pragma unroll
    for (int k = 0; k < kLane; ++k) r.v[k] = f * (r.v[k] * (1.f / scale[column + k]));  // a power of two
    float* to = x.data + row * x.ld + column;
    store_some(to, make_float4(r.v[0], r.v[1], r.v[2], r.v[3]), room);
    store_some(to + 4, make_float4(r.v[4], r.v[5], r.v[6], r.v[7]), room - 4);
}

// ---- apply -----------------------------------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kSummers = 8;  // groups that share the pieces of a long row

struct Args {
    const std::int64_t* offsets;
    const std::int32_t* columns;
    const float* values;
    const uint4 *x, *z, *r;
    uint4* y;
    std::int64_t rows;
    HalfOperator l;
    float alpha, beta, gamma;
    bool skip_long;
    unsigned piece_blocks;
    float delta[kHalfPanelMost];
};
struct Pieces {
    const std::int32_t *rows, *first;
    const std::int64_t *begin, *end;
    int count;
    float* sums;  // [count, w]
};

// *p if i < n, else zeros; without a branch, so that the gathers of a run go out together.
__device__ inline uint4 load_if_less(int i, int n, const uint4* p) {
    uint4 r = make_uint4(0, 0, 0, 0);
    asm("{ .reg .pred wanted; setp.lt.s32 wanted, %4, %5; @wanted ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%6]; }"
        : "+r"(r.x), "+r"(r.y), "+r"(r.z), "+r"(r.w)
        : "r"(i), "r"(n), "l"(p));
    return r;
}

// The sum over entries [begin, begin + count), of this lane's columns, in every slot of the group. x: at these columns.
template <bool kWeighted, int kLanes, int kSlots, int kRun>
__device__ inline Lane sum_entries(const Args& a, const uint4* x, std::int64_t begin, int count) {
    const std::int32_t* columns = a.columns + begin;
    const float* values = a.values + begin;
    Lane sum;
#pragma unroll 1
    for (int first = int(threadIdx.x) / kLanes % kSlots; first < count; first += kSlots * kRun) {
        int column[kRun];
        float value[kRun];
#pragma unroll
        for (int u = 0; u < kRun; ++u) {
            const int e = first + u * kSlots;
            column[u] = e < count ? __ldcs(columns + e) : 0;
            if (kWeighted) value[u] = e < count ? __ldcs(values + e) : 0.f;
        }
        uint4 row[kRun];
#pragma unroll
        for (int u = 0; u < kRun; ++u)
            row[u] = load_if_less(first + u * kSlots, count, x + std::int64_t(column[u]) * kLanes);
#pragma unroll
        for (int u = 0; u < kRun; ++u) sum.add(kWeighted ? value[u] : 1.f, row[u]);
    }
    sum.add_lanes<kLanes, kLanes * kSlots>();
    return sum;
}
template <int kLanes>
__device__ inline void finish_row(const Args& a, std::int64_t row, int lane, const Lane& sum) {
    const std::int64_t at = row * kLanes + lane;
    const HalfRow f = half_row(a.l, a.alpha, a.beta, a.offsets[row + 1] - a.offsets[row]);
    Lane y;
#pragma unroll
    for (int k = 0; k < kLane; ++k) y.v[k] = f.sum * sum.v[k];
    if (f.own != 0.f) y.add(f.own, __ldg(a.x + at));
    if (a.gamma != 0.f) y.add(a.gamma, __ldcs(a.z + at));
    if (a.r) {
        Lane r;
        r.add(1.f, __ldcs(a.r + at));
#pragma unroll
        for (int l = 0; l < kLanes; ++l)  // places in the arguments are constants
            if (l == lane)
#pragma unroll
                for (int k = 0; k < kLane; ++k) y.v[k] = fmaf(a.delta[l * kLane + k], r.v[k], y.v[k]);
    }
    __stcs(a.y + at, y.rounded());
}

template <bool kWeighted, int kLanes, int kSlots, int kRun>
__global__ void __launch_bounds__(kThreads, kRun > 4 ? 8 : 10) half_apply_kernel(const Args a, const Pieces p) {
    constexpr int kGroup = kLanes * kSlots;
    const int lane = int(threadIdx.x) % kLanes;
    if (blockIdx.x < a.piece_blocks) {
        const int piece = int((blockIdx.x * kThreads + threadIdx.x) / kWarp);
        if (piece >= p.count) return;  // whole warps
        const Lane sum = sum_entries<kWeighted, kLanes, kWarp / kLanes, kRun>(a, a.x + lane, p.begin[piece],
                                                                              int(p.end[piece] - p.begin[piece]));
        if (int(threadIdx.x) % kWarp >= kLanes) return;
        float* to = p.sums + (std::int64_t(piece) * kLanes + lane) * kLane;
        *reinterpret_cast<float4*>(to) = make_float4(sum.v[0], sum.v[1], sum.v[2], sum.v[3]);
        *reinterpret_cast<float4*>(to + 4) = make_float4(sum.v[4], sum.v[5], sum.v[6], sum.v[7]);
        return;
    }
    const std::int64_t row = (std::int64_t(blockIdx.x - a.piece_blocks) * kThreads + threadIdx.x) / kGroup;
    const bool inside = row < a.rows;
    const std::int64_t begin = inside ? a.offsets[row] : 0, length = inside ? a.offsets[row + 1] - begin : 0;
    const bool left_out = a.skip_long && length > kLaplacianPiece;
    const Lane sum = sum_entries<kWeighted, kLanes, kSlots, kRun>(a, a.x + lane, begin, left_out ? 0 : int(length));
    if (inside && !left_out && int(threadIdx.x) % kGroup < kLanes) finish_row<kLanes>(a, row, lane, sum);
}

// A block for each long row: kSummers groups add a run of its pieces each, the first group adds the runs.
template <int kLanes>
__global__ void __launch_bounds__(kSummers* kLanes) half_totals_kernel(const Args a, const Pieces p) {
    __shared__ float shared[kSummers][kLanes][kLane];
    const int lane = int(threadIdx.x) % kLanes, group = int(threadIdx.x) / kLanes;
    const int first = p.first[blockIdx.x], end = p.first[blockIdx.x + 1];
    const int run = ceil_div(end - first, kSummers), begin = first + group * run;
    Lane sum;
#pragma unroll 4
    for (int i = begin; i < min(begin + run, end); ++i) sum.add(p.sums + (std::int64_t(i) * kLanes + lane) * kLane);
#pragma unroll
    for (int k = 0; k < kLane; ++k) shared[group][lane][k] = sum.v[k];
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int g = 1; g < kSummers; ++g)
#pragma unroll
        for (int k = 0; k < kLane; ++k) sum.v[k] += shared[g][lane][k];
    finish_row<kLanes>(a, p.rows[blockIdx.x], lane, sum);
}

template <int kLanes, int kSlots, int kRun>
void launch_apply(cudaStream_t stream, Args a, const Pieces& p, unsigned long_rows) {
    a.piece_blocks = unsigned(ceil_div(p.count, kThreads / kWarp));
    const auto row_blocks = unsigned(ceil_div(a.rows, std::int64_t(kThreads / (kLanes * kSlots))));
    const auto kernel = a.l == HalfOperator::weighted ? half_apply_kernel<true, kLanes, kSlots, kRun>
                                                      : half_apply_kernel<false, kLanes, kSlots, kRun>;
    kernel<<<a.piece_blocks + row_blocks, kThreads, 0, stream>>>(a, p);
    LAUNCH_CHECK("half_apply");
    if (long_rows == 0) return;
    half_totals_kernel<kLanes><<<long_rows, kSummers * kLanes, 0, stream>>>(a, p);
    LAUNCH_CHECK("half_totals");
}

// ---- deflate ---------------------------------------------------------------------------------------------------------
//
// As in eigen.cu: a warp works on a piece (eigen_pieces.cuh), here on all columns of it.

constexpr int kDeflateThreads = 256;

struct DeflateArgs {
    uint4* x;
    const float* v;
    const std::int64_t* offsets;
    std::int64_t components, pieces;
    double* sums;  // [slots, w]
    bool walk;
};

template <int kLanes>
__device__ inline void subtract(const DeflateArgs& a, const PieceRows& p, const Lane& total) {
    const int lane = int(threadIdx.x) % kLanes;
#pragma unroll 4
    for (std::int64_t row = p.begin + int(threadIdx.x) % kWarp / kLanes; row < p.end; row += kWarp / kLanes) {
        const float v = a.walk ? 1.f : a.v[row];
        Lane x;
        x.add(1.f, a.x[row * kLanes + lane]);
#pragma unroll
        for (int k = 0; k < kLane; ++k) x.v[k] = fmaf(-v, total.v[k], x.v[k]);
        a.x[row * kLanes + lane] = x.rounded();
    }
}
__device__ inline std::int64_t my_piece() {
    return std::int64_t(blockIdx.x) * (kDeflateThreads / kWarp) + threadIdx.x / kWarp;
}

template <int kLanes>
__global__ void __launch_bounds__(kDeflateThreads) half_project_kernel(const DeflateArgs a) {
    if (my_piece() >= a.pieces) return;  // whole warps
    const PieceRows p = piece_rows(a.offsets, a.components, my_piece());
    const int lane = int(threadIdx.x) % kLanes;
    Lane sum;
#pragma unroll 4
    for (std::int64_t row = p.begin + int(threadIdx.x) % kWarp / kLanes; row < p.end; row += kWarp / kLanes)
        sum.add(a.walk ? a.v[row] * a.v[row] : a.v[row], a.x[row * kLanes + lane]);
    sum.add_lanes<kLanes, kWarp>();
    if (p.whole) {
        subtract<kLanes>(a, p, sum);
    } else if (p.begin < p.end && int(threadIdx.x) % kWarp < kLanes) {
#pragma unroll
        for (int k = 0; k < kLane; ++k) a.sums[(p.slot * kLanes + lane) * kLane + k] = double(sum.v[k]);
    }
}
template <int kLanes>
__global__ void __launch_bounds__(kDeflateThreads) half_subtract_kernel(const DeflateArgs a) {
    if (my_piece() >= a.pieces) return;
    const PieceRows p = piece_rows(a.offsets, a.components, my_piece());
    if (p.whole || p.begin >= p.end) return;
    Lane total;
#pragma unroll
    for (int k = 0; k < kLane; ++k)
        total.v[k] = float(a.sums[(p.total * kLanes + int(threadIdx.x) % kLanes) * kLane + k]);
    subtract<kLanes>(a, p, total);
}
template <int kLanes>
void launch_deflate(cudaStream_t stream, const DeflateArgs& a, std::int64_t n) {
    const auto blocks = unsigned(ceil_div(a.pieces, std::int64_t(kDeflateThreads / kWarp)));
    half_project_kernel<kLanes><<<blocks, kDeflateThreads, 0, stream>>>(a);
    LAUNCH_CHECK("half_project");
    if (n <= kPiece) return;
    launch_component(stream, n, {a.offsets, a.components, kLanes * kLane, a.sums});
    half_subtract_kernel<kLanes><<<blocks, kDeflateThreads, 0, stream>>>(a);
    LAUNCH_CHECK("half_subtract");
}

uint4* packed(const Mat<f16>& m) { return reinterpret_cast<uint4*>(m.data); }
const uint4* packed(const Mat<const f16>& m) { return reinterpret_cast<const uint4*>(m.data); }
template <class T>
bool is_scratch(const Vec<T>& v, std::int64_t elements) {
    return v && v.size >= elements && reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0;
}

}  // namespace

void half_pack(const Cuda& d, const HalfPack& p) {
    check(p);
    const std::int64_t n = p.x.rows, w = p.y.cols;
    FIEDLER_REQUIRE("half_panel", is_aligned16(p.x) && n >= 1);
    const cudaStream_t stream = stream_of(d);
    if (!p.keep_scale) {
        FIEDLER_REQUIRE("half_panel", is_scratch(p.scratch, half_pack_scratch(w)));
        auto* most = reinterpret_cast<std::uint32_t*>(p.scratch.data);
        half_largest_kernel<<<unsigned(kHalfPackBlocks), kPackThreads, 0, stream>>>(p.x, p.rows.data, int(w), most);
        LAUNCH_CHECK("half_largest");
        half_scale_kernel<<<1, kPackThreads, 0, stream>>>(most, int(kHalfPackBlocks), int(w), p.scale.data);
        LAUNCH_CHECK("half_scale");
    }
    const auto blocks = unsigned(ceil_div(n * w / kLane, std::int64_t(kPackThreads)));
    half_pack_kernel<<<blocks, kPackThreads, 0, stream>>>(packed(p.y), p.x, int(w) / kLane, p.scale.data, p.rows.data);
    LAUNCH_CHECK("half_pack");
}

void half_unpack(const Cuda& d, const HalfUnpack& p) {
    check(p);
    const std::int64_t n = p.x.rows, w = p.y.cols;
    FIEDLER_REQUIRE("half_panel", is_aligned16(p.x) && n >= 1);
    const auto blocks = unsigned(ceil_div(n * w / kLane, std::int64_t(kPackThreads)));
    half_unpack_kernel<<<blocks, kPackThreads, 0, stream_of(d)>>>(p.x, packed(p.y), int(w) / kLane, p.scale.data,
                                                                  p.rows.data);
    LAUNCH_CHECK("half_unpack");
}

void half_apply(const Cuda& d, const HalfApply& p) {
    check(p);
    const SparseMatrix<float>& l = p.matrix;
    const std::int64_t long_rows = l.long_rows.rows.size, pieces = l.long_rows.begin.size, w = p.x.cols;
    FIEDLER_REQUIRE("half_panel", long_rows == 0 || is_shape(l.long_rows.first, long_rows + 1));
    FIEDLER_REQUIRE("half_panel", long_rows == 0 || is_shape(l.long_rows.end, pieces));
    FIEDLER_REQUIRE("half_panel", long_rows == 0 || is_scratch(p.scratch, laplacian_scratch_elements(pieces, w)));
    Args a{l.offsets.data, l.columns.data, l.values.data, packed(p.x), packed(p.z),
           packed(p.r),    packed(p.y),    l.rows,        p.l,         p.alpha,
           p.beta,         p.gamma,        long_rows > 0, 0,           {}};
    std::copy(p.delta.begin(), p.delta.end(), a.delta);
    const Pieces q{l.long_rows.rows.data, l.long_rows.first.data, l.long_rows.begin.data, l.long_rows.end.data,
                   int(pieces),           p.scratch.data};
    const cudaStream_t stream = stream_of(d);
    if (w == 8)
        launch_apply<1, 8, 4>(stream, a, q, unsigned(long_rows));
    else if (w == 16)
        launch_apply<2, 4, 4>(stream, a, q, unsigned(long_rows));
    else
        launch_apply<4, 2, 8>(stream, a, q, unsigned(long_rows));
}

void half_deflate(const Cuda& d, const HalfDeflate& p) {
    check(p);
    const std::int64_t n = p.x.rows, w = p.x.cols, components = p.offsets.size - 1;
    FIEDLER_REQUIRE("half_panel", n >= 1 && is_scratch(p.scratch, eigen_deflate_scratch(n, w, components)));
    const DeflateArgs a{packed(p.x),    p.v.data, p.offsets.data, components, n / kPiece + components,
                        p.scratch.data, p.walk};
    const cudaStream_t stream = stream_of(d);
    if (w == 8)
        launch_deflate<1>(stream, a, n);
    else if (w == 16)
        launch_deflate<2>(stream, a, n);
    else
        launch_deflate<4>(stream, a, n);
}

}  // namespace fiedler
