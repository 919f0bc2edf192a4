// kernels/norm.cu: RMS normalisation (see norm.h). Up to 2048 channels a row lives in the registers of 16 or 32 lanes,
// so that memory is read once and all of a row's loads are in flight together; beyond, a block walks the row twice.
#include "kernels/common.cuh"
#include "kernels/norm.h"

namespace fiedler {
namespace {

constexpr int kPackSize = Pack<nv_bf16>::size;
constexpr int kThreads = 128;  // small blocks: their loads, sums and stores overlap, and the last ones end together
constexpr int kWideThreads = 256;

struct ForwardArgs {
    nv_bf16* y;
    float* rstd;
    const nv_bf16* x;
    std::int64_t rows, ld_y, ld_x;
    int channels;
    float eps;
};
struct BackwardArgs {  // dx may be dy or dresidual: a thread reads what it writes before it writes
    nv_bf16* dx;
    const nv_bf16 *dy, *x, *dresidual;  // dresidual null: absent
    const float* rstd;
    std::int64_t rows, ld_dx, ld_dy, ld_x, ld_dresidual;
    int channels;
};

// A row is held by `lanes` neighbouring lanes of a warp, `packs` 16-byte packs in each.
template <int Lanes, int Packs>
struct Width {
    static constexpr int lanes = Lanes, packs = Packs, rows_per_block = kThreads / Lanes;
};

template <int Lanes>
__device__ float lanes_sum(float x) {
#pragma unroll
    for (int o = Lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// Rows wait as raw words, two bf16 to a register: a Pack may be spread over twice as many, and registers are what limits
// how many rows are under way. Inputs are read once and marked to leave the caches first, which are the next kernel's.
__device__ uint4 load_raw(const nv_bf16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ uint4 load_once(const nv_bf16* p) { return __ldcs(reinterpret_cast<const uint4*>(p)); }
__device__ void store_raw(nv_bf16* p, const uint4& raw) { *reinterpret_cast<uint4*>(p) = raw; }
__device__ float low(unsigned word) { return __uint_as_float(word << 16); }
__device__ float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
__device__ unsigned word_of(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ void add_product(float& sum, unsigned a, unsigned b) {
    sum += low(a) * low(b);
    sum += high(a) * high(b);
}
__device__ float dot(const uint4& a, const uint4& b) {
    float sum = 0;
    add_product(sum, a.x, b.x);
    add_product(sum, a.y, b.y);
    add_product(sum, a.z, b.z);
    add_product(sum, a.w, b.w);
    return sum;
}
__device__ uint4 scaled(const uint4& x, float r) {
    const auto word = [r](unsigned w) { return word_of(low(w) * r, high(w) * r); };
    return make_uint4(word(x.x), word(x.y), word(x.z), word(x.w));
}
// dresidual + (r dy - along_x x)
__device__ uint4 row_gradient(const uint4& dresidual, const uint4& dy, const uint4& x, float r, float along_x) {
    const auto word = [=](unsigned d, unsigned g, unsigned v) {
        return word_of(low(d) + (r * low(g) - along_x * low(v)), high(d) + (r * high(g) - along_x * high(v)));
    };
    return make_uint4(word(dresidual.x, dy.x, x.x), word(dresidual.y, dy.y, x.y), word(dresidual.z, dy.z, x.z),
                      word(dresidual.w, dy.w, x.w));
}
__device__ uint4 zeros() { return make_uint4(0, 0, 0, 0); }

template <class W>
__device__ void load_row(uint4 (&row)[W::packs], const nv_bf16* p, int lane, int packs, bool active) {
#pragma unroll
    for (int k = 0; k < W::packs; ++k) {
        const int pack = lane + k * W::lanes;
        row[k] = active && pack < packs ? load_once(p + pack * kPackSize) : zeros();
    }
}

template <class W>
__global__ __launch_bounds__(kThreads, 1) void forward_rows(ForwardArgs a) {
    const std::int64_t row = std::int64_t(blockIdx.x) * W::rows_per_block + threadIdx.x / W::lanes;
    const int lane = threadIdx.x % W::lanes, packs = a.channels / kPackSize;
    const bool active = row < a.rows;  // idle lanes stay for the shuffles
    uint4 x[W::packs];
    load_row<W>(x, a.x + row * a.ld_x, lane, packs, active);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < W::packs; ++k) sum += dot(x[k], x[k]);
    const float r = 1.f / sqrtf(lanes_sum<W::lanes>(sum) / float(a.channels) + a.eps);
    if (!active) return;
    if (lane == 0) a.rstd[row] = r;
#pragma unroll
    for (int k = 0; k < W::packs; ++k) {
        const int pack = lane + k * W::lanes;
        if (pack < packs) store_raw(a.y + row * a.ld_y + pack * kPackSize, scaled(x[k], r));
    }
}

template <class W>
__global__ __launch_bounds__(kThreads) void backward_rows(BackwardArgs a) {
    const std::int64_t row = std::int64_t(blockIdx.x) * W::rows_per_block + threadIdx.x / W::lanes;
    const int lane = threadIdx.x % W::lanes, packs = a.channels / kPackSize;
    const bool active = row < a.rows;
    uint4 x[W::packs], dy[W::packs], dresidual[W::packs];
    load_row<W>(x, a.x + row * a.ld_x, lane, packs, active);
    load_row<W>(dy, a.dy + row * a.ld_dy, lane, packs, active);
    load_row<W>(dresidual, a.dresidual + row * a.ld_dresidual, lane, packs, active && a.dresidual != nullptr);
    const float r = active ? a.rstd[row] : 0.f;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < W::packs; ++k) sum += dot(dy[k], x[k]);
    const float along_x = r * r * r * (lanes_sum<W::lanes>(sum) / float(a.channels));
    if (!active) return;
#pragma unroll
    for (int k = 0; k < W::packs; ++k) {
        const int pack = lane + k * W::lanes;
        if (pack < packs)
            store_raw(a.dx + row * a.ld_dx + pack * kPackSize, row_gradient(dresidual[k], dy[k], x[k], r, along_x));
    }
}

__global__ __launch_bounds__(kWideThreads) void forward_wide(ForwardArgs a) {
    __shared__ float shared[kWideThreads / kWarp];
    const std::int64_t row = blockIdx.x;
    const nv_bf16* x = a.x + row * a.ld_x;
    const int packs = a.channels / kPackSize;
    float sum = 0;
    for (int pack = threadIdx.x; pack < packs; pack += kWideThreads) {
        const uint4 v = load_raw(x + pack * kPackSize);
        sum += dot(v, v);
    }
    const float r = 1.f / sqrtf(block_sum(sum, shared) / float(a.channels) + a.eps);
    if (threadIdx.x == 0) a.rstd[row] = r;
    for (int pack = threadIdx.x; pack < packs; pack += kWideThreads)
        store_raw(a.y + row * a.ld_y + pack * kPackSize, scaled(load_once(x + pack * kPackSize), r));
}

__global__ __launch_bounds__(kWideThreads) void backward_wide(BackwardArgs a) {
    __shared__ float shared[kWideThreads / kWarp];
    const std::int64_t row = blockIdx.x;
    const nv_bf16 *x = a.x + row * a.ld_x, *dy = a.dy + row * a.ld_dy;
    const int packs = a.channels / kPackSize;
    float sum = 0;
    for (int pack = threadIdx.x; pack < packs; pack += kWideThreads)
        sum += dot(load_raw(dy + pack * kPackSize), load_raw(x + pack * kPackSize));
    // The barriers of block_sum part all reads for the sum from the first write (dx may be dy).
    const float r = a.rstd[row], along_x = r * r * r * (block_sum(sum, shared) / float(a.channels));
    for (int pack = threadIdx.x; pack < packs; pack += kWideThreads) {
        const uint4 dresidual =
            a.dresidual ? load_once(a.dresidual + row * a.ld_dresidual + pack * kPackSize) : zeros();
        store_raw(a.dx + row * a.ld_dx + pack * kPackSize, row_gradient(dresidual, load_once(dy + pack * kPackSize),
                                                                        load_once(x + pack * kPackSize), r, along_x));
    }
}

// rows(Width) for rows that fit in registers, wide() for longer ones.
template <class Rows, class Wide>
void for_width(std::int64_t channels, Rows&& rows, Wide&& wide) {
    const std::int64_t packs = channels / kPackSize;
    if (packs <= 16) return rows(Width<16, 1>{});
    if (packs <= 32) return rows(Width<16, 2>{});
    if (packs <= 48) return rows(Width<16, 3>{});
    if (packs <= 64) return rows(Width<16, 4>{});
    if (packs <= 96) return rows(Width<32, 3>{});
    if (packs <= 128) return rows(Width<32, 4>{});
    if (packs <= 192) return rows(Width<32, 6>{});
    if (packs <= 256) return rows(Width<32, 8>{});
    wide();
}
template <class W>
unsigned blocks_for(std::int64_t rows) {
    return unsigned(ceil_div(rows, std::int64_t(W::rows_per_block)));
}

}  // namespace

void norm_forward(const Cuda& dev, const NormForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("norm", p.x.cols % kPackSize == 0 && p.x.cols > 0 && is_aligned16(p.x) && is_aligned16(p.y));
    if (p.x.rows == 0) return;
    const ForwardArgs args{nv(p.y.data), p.rstd.data, nv(p.x.data), p.x.rows, p.y.ld, p.x.ld, int(p.x.cols), p.eps};
    const cudaStream_t stream = stream_of(dev);
    for_width(
        p.x.cols,
        [&](auto width) {
            using W = decltype(width);
            forward_rows<W><<<blocks_for<W>(args.rows), kThreads, 0, stream>>>(args);
        },
        [&] { forward_wide<<<unsigned(args.rows), kWideThreads, 0, stream>>>(args); });
    LAUNCH_CHECK("norm_forward");
}

void norm_backward(const Cuda& dev, const NormBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("norm", p.x.cols % kPackSize == 0 && p.x.cols > 0 && is_aligned16(p.x) && is_aligned16(p.dy));
    FIEDLER_REQUIRE("norm", is_aligned16(p.dx) && is_aligned16(p.dresidual));
    if (p.x.rows == 0) return;
    const BackwardArgs args{nv(p.dx.data), nv(p.dy.data), nv(p.x.data), nv(p.dresidual.data), p.rstd.data,  p.x.rows,
                            p.dx.ld,       p.dy.ld,       p.x.ld,       p.dresidual.ld,       int(p.x.cols)};
    const cudaStream_t stream = stream_of(dev);
    for_width(
        p.x.cols,
        [&](auto width) {
            using W = decltype(width);
            backward_rows<W><<<blocks_for<W>(args.rows), kThreads, 0, stream>>>(args);
        },
        [&] { backward_wide<<<unsigned(args.rows), kWideThreads, 0, stream>>>(args); });
    LAUNCH_CHECK("norm_backward");
}

}  // namespace fiedler
