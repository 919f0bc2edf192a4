// kernels/pool.cu: pooling of packed sequences (see pool.h).
//
// Forward: the groups of a block share out the rows of a sequence, each with a running maximum of its logits, and are
// then added. Sequences longer than kPoolChunk are cut into chunks counted from their own first row, a block each. To
// find the chunks without a list, the tokens are cut into tiles of kPoolChunk places: at most one chunk that is not its
// sequence's first begins in a tile, and at most one that is (both belong to sequences longer than a tile), so chunks
// have two places in the scratch memory for each tile.
#include "kernels/pool.h"

#include "kernels/rows.cuh"

namespace fiedler {
namespace {

using namespace rows;
constexpr int kPackSize = Pack<nv_bf16>::size, kChunk = int(kPoolChunk), kBackwardNodes = 32;

struct Forward {
    nv_bf16* y;
    float* lse;
    const nv_bf16* x;
    const float* z;
    float* partial;  // [tiles][2][channels + 2 heads]: sums, then for each head the weight and the maximum
    std::int64_t ld_y, ld_x, ld_z;
    int channels, heads, head_width;  // head_width: channels of a head; heads 0 without attention
    PoolKind kind;
    Packed seq;

    __device__ int width() const { return channels + 2 * heads; }
};

// Some rows of a sequence: the sum of their weights, and their weighted sum, relative to the largest logit.
template <bool kAttention>
struct Sums {
    float values[kPackSize], weight, top;
    __device__ void reset() {
        clear(values);
        weight = 0.f, top = -INFINITY;
    }
    // Relative to a larger logit. Nothing yet: top is -inf and exp(-inf) is 0.
    __device__ void raise(float to) {
        const float factor = expf(top - to);
#pragma unroll
        for (int c = 0; c < kPackSize; ++c) values[c] *= factor;
        weight *= factor, top = to;
    }
};

// Adds rows first, first + step, ... < last.
template <bool kAttention>
__device__ void add_rows(Sums<kAttention>& sums, const Forward& a, int channel, int first, int last, int step) {
    const int head = kAttention ? channel / a.head_width : 0;
    for (int i0 = first; i0 < last; i0 += kBatch * step) {
        Piece<nv_bf16, kPackSize> rows[kBatch];
        float z[kBatch];
        float top = sums.top;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int i = i0 + k * step;
            if (i >= last) continue;
            rows[k].load(a.x + i * a.ld_x + channel);
            if constexpr (kAttention) {
                z[k] = a.z[i * a.ld_z + head];
                top = fmaxf(top, z[k]);
            }
        }
        if (kAttention && top > sums.top) sums.raise(top);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (i0 + k * step >= last) break;
            const float weight = kAttention ? expf(z[k] - sums.top) : 1.f;
            float row[kPackSize];
            rows[k].unpack(row);
            sums.weight += weight;
#pragma unroll
            for (int c = 0; c < kPackSize; ++c) sums.values[c] += weight * row[c];
        }
    }
}

// The groups of the block put together, complete in group 0. All threads take part.
template <bool kAttention, int kLanes>
__device__ void join_groups(Sums<kAttention>& sums) {
    __shared__ float shared[kThreads * kPackSize], tops[kThreads], weights[kThreads];
    if constexpr (kAttention) {
        const int thread = int(threadIdx.y) * kLanes + int(threadIdx.x);
        tops[thread] = sums.top;
        __syncthreads();
        float top = sums.top;
        for (int g = 0; g < kThreads / kLanes; ++g) top = fmaxf(top, tops[g * kLanes + threadIdx.x]);
        if (top > sums.top) sums.raise(top);
        weights[thread] = sums.weight;
        __syncthreads();
        if (threadIdx.y == 0)
            for (int g = 1; g < kThreads / kLanes; ++g) sums.weight += weights[g * kLanes + threadIdx.x];
    }
    add_groups<kLanes>(sums.values, shared);
}

__device__ float scale_of(PoolKind kind, int length, float weight) {
    return kind == PoolKind::sum ? 1.f : 1.f / (kind == PoolKind::mean ? float(length) : weight);
}

// A block for each sequence of at most kChunk rows.
template <bool kAttention, int kLanes>
__global__ __launch_bounds__(kThreads) void short_kernel(Forward a) {
    const int s = int(blockIdx.x), first = a.seq.sequence_begin(s), last = a.seq.sequence_end(s);
    if (last - first > kChunk) return;
    const int channel = int(blockIdx.y * kLanes + threadIdx.x) * kPackSize;
    const bool inside = channel < a.channels;
    Sums<kAttention> sums;
    sums.reset();
    if (inside) add_rows(sums, a, channel, first + int(threadIdx.y), last, kThreads / kLanes);
    join_groups<kAttention, kLanes>(sums);
    if (!inside || threadIdx.y != 0) return;
    const float scale = first == last ? 0.f : scale_of(a.kind, last - first, sums.weight);
#pragma unroll
    for (int c = 0; c < kPackSize; ++c) sums.values[c] *= scale;
    store_values(a.y + s * a.ld_y + channel, sums.values);
    if (kAttention && channel % a.head_width == 0)
        a.lse[std::int64_t(s) * a.heads + channel / a.head_width] =
            first == last ? -INFINITY : sums.top + logf(sums.weight);
}

// Where the chunks of long sequences begin in this block's tile: [0] one that is not its sequence's first, [1] one that
// is; -1: none. All threads take part.
__device__ void find_chunks(int (&starts)[2], const Packed& seq, int thread, int threads) {
    if (thread < 2) starts[thread] = -1;
    __syncthreads();
    const int tile = int(blockIdx.x) * kChunk, end = min(tile + kChunk, seq.tokens);
    for (int i = tile + thread; i < end; i += threads) {
        const int first = seq.first(i);
        if ((i - first) % kChunk == 0 && seq.last(i) - first > kChunk) starts[i == first] = i;
    }
    __syncthreads();
}

template <bool kAttention, int kLanes>
__global__ __launch_bounds__(kThreads) void chunk_kernel(Forward a) {
    __shared__ int starts[2];
    find_chunks(starts, a.seq, int(threadIdx.y) * kLanes + int(threadIdx.x), kThreads);
    const int channel = int(blockIdx.y * kLanes + threadIdx.x) * kPackSize;
    for (int slot = 0; slot < 2; ++slot) {
        const int first = starts[slot];
        if (first < 0) continue;
        Sums<kAttention> sums;
        sums.reset();
        if (channel < a.channels)
            add_rows(sums, a, channel, first + int(threadIdx.y), min(first + kChunk, a.seq.last(first)),
                     kThreads / kLanes);
        join_groups<kAttention, kLanes>(sums);
        if (channel >= a.channels || threadIdx.y != 0) continue;
        float* out = a.partial + (std::int64_t(blockIdx.x) * 2 + slot) * a.width();
#pragma unroll
        for (int c = 0; c < kPackSize; ++c) out[channel + c] = sums.values[c];
        if (kAttention && channel % a.head_width == 0) {
            const int head = channel / a.head_width;
            out[a.channels + head] = sums.weight;
            out[a.channels + a.heads + head] = sums.top;
        }
    }
}

// The sequence that holds a token.
__device__ int sequence_of(const Packed& seq, int token) {
    return seq.length > 0 ? token / seq.length : row_of(seq.offsets, seq.count, token);
}

// y and lse of the long sequence that begins in this block's tile, if one does, from the sums of its chunks.
template <bool kAttention>
__global__ __launch_bounds__(kColumns* kRows, 1) void long_kernel(Forward a) {
    __shared__ int starts[2];
    __shared__ float shared[kRows][kColumns];
    find_chunks(starts, a.seq, int(threadIdx.y) * kColumns + int(threadIdx.x), kColumns * kRows);
    const int first = starts[1];
    if (first < 0) return;
    const int s = sequence_of(a.seq, first), length = a.seq.last(first) - first;
    const int channel = int(blockIdx.y) * kColumns + int(threadIdx.x);
    const bool inside = channel < a.channels;
    const int chunks = ceil_div(length, kChunk), head = kAttention && inside ? channel / a.head_width : 0;
    const auto sums_of = [&](std::int64_t k) {
        return a.partial + ((first + k * kChunk) / kChunk * 2 + (k == 0)) * a.width();
    };
    float top = 0, weight = 0;
    if constexpr (kAttention) {
        const auto top_of = [&](std::int64_t k) { return sums_of(k)[a.channels + a.heads + head]; };
        top = -INFINITY;
        for (int k = int(threadIdx.y); k < chunks; k += kRows) top = fmaxf(top, top_of(k));
        shared[threadIdx.y][threadIdx.x] = top;
        __syncthreads();
        for (int row = 0; row < kRows; ++row) top = fmaxf(top, shared[row][threadIdx.x]);
        __syncthreads();
        weight = sum_partials<4>(inside ? chunks : 0, shared,
                                 [&](std::int64_t k) { return expf(top_of(k) - top) * sums_of(k)[a.channels + head]; });
    }
    const float sum = sum_partials<4>(inside ? chunks : 0, shared, [&](std::int64_t k) {
        const float factor = kAttention ? expf(sums_of(k)[a.channels + a.heads + head] - top) : 1.f;
        return factor * sums_of(k)[channel];
    });
    if (!inside || threadIdx.y != 0) return;
    a.y[s * a.ld_y + channel] = from_float<nv_bf16>(sum * scale_of(a.kind, length, weight));
    if (kAttention && channel % a.head_width == 0) a.lse[std::int64_t(s) * a.heads + head] = top + logf(weight);
}

struct Backward {
    nv_bf16 *dx, *dz;
    const nv_bf16 *dy, *x, *y;
    const float *z, *lse;
    std::int64_t ld_dx, ld_dz, ld_dy, ld_x, ld_y, ld_z;
    int heads, packs;  // packs: accesses of a head's channels; without attention one head has them all
    PoolKind kind;
    Packed seq;
};

// A group for each node and head; a block for kBackwardNodes nodes, whose first one's sequence is searched for.
template <bool kAttention, int kLanes>
__global__ __launch_bounds__(kThreads) void backward_kernel(Backward a) {
    const int first_node = int(blockIdx.x) * kBackwardNodes, nodes = min(kBackwardNodes, a.seq.tokens - first_node);
    __shared__ int first_sequence;
    if (threadIdx.x == 0 && threadIdx.y == 0) first_sequence = sequence_of(a.seq, first_node);
    __syncthreads();
    int s = first_sequence;
    for (int item = int(threadIdx.y); item < nodes * a.heads; item += kThreads / kLanes) {
        const int i = first_node + item / a.heads, head = item % a.heads, begin = a.seq.first(i), end = a.seq.last(i);
        while (a.seq.sequence_end(s) <= i) ++s;
        const float weight = kAttention ? expf(a.z[i * a.ld_z + head] - a.lse[std::int64_t(s) * a.heads + head])
                             : a.kind == PoolKind::mean ? 1.f / float(end - begin)
                                                        : 1.f;
        const std::int64_t column = std::int64_t(head) * a.packs * kPackSize;
        float sum = 0;
        for (int pack = int(threadIdx.x); pack < a.packs; pack += kLanes) {
            const std::int64_t channel = column + pack * kPackSize;
            float dy[kPackSize];
            load_values(dy, a.dy + s * a.ld_dy + channel);
            if constexpr (kAttention) {
                float x[kPackSize], y[kPackSize];
                load_values(x, a.x + i * a.ld_x + channel);
                load_values(y, a.y + s * a.ld_y + channel);
#pragma unroll
                for (int c = 0; c < kPackSize; ++c) sum += dy[c] * (x[c] - y[c]);
            }
#pragma unroll
            for (int c = 0; c < kPackSize; ++c) dy[c] *= weight;
            store_values(a.dx + i * a.ld_dx + channel, dy);
        }
        if constexpr (kAttention) {
            const int lane = (int(threadIdx.y) * kLanes + int(threadIdx.x)) % kWarp;
            const unsigned group = (0xffffffffu >> (kWarp - kLanes)) << (lane / kLanes * kLanes);
#pragma unroll
            for (int o = kLanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(group, sum, o);
            if (threadIdx.x == 0) a.dz[i * a.ld_dz + head] = from_float<nv_bf16>(weight * sum);
        }
    }
}

unsigned blocks_of(std::int64_t n, int each) { return unsigned(ceil_div(n, std::int64_t(each))); }
template <int kLanes>
dim3 threads() {
    return dim3(kLanes, kThreads / kLanes);
}

template <bool kAttention, int kLanes>
void launch_forward(const Forward& a, bool long_ones, cudaStream_t stream) {
    const unsigned slices = blocks_of(a.channels, kLanes * kPackSize), tiles = blocks_of(a.seq.tokens, kChunk);
    short_kernel<kAttention, kLanes><<<dim3(unsigned(a.seq.count), slices), threads<kLanes>(), 0, stream>>>(a);
    LAUNCH_CHECK("pool_forward");
    if (!long_ones || a.seq.tokens == 0) return;
    chunk_kernel<kAttention, kLanes><<<dim3(tiles, slices), threads<kLanes>(), 0, stream>>>(a);
    LAUNCH_CHECK("pool_chunks");
    long_kernel<kAttention><<<dim3(tiles, blocks_of(a.channels, kColumns)), dim3(kColumns, kRows), 0, stream>>>(a);
    LAUNCH_CHECK("pool_long");
}
template <bool kAttention>
void launch_forward(const Forward& a, bool long_ones, cudaStream_t stream) {
    if (a.channels <= 8 * kPackSize) return launch_forward<kAttention, 8>(a, long_ones, stream);
    launch_forward<kAttention, 16>(a, long_ones, stream);
}

template <bool kAttention, int kLanes>
void launch_backward(const Backward& a, cudaStream_t stream) {
    backward_kernel<kAttention, kLanes><<<blocks_of(a.seq.tokens, kBackwardNodes), threads<kLanes>(), 0, stream>>>(a);
    LAUNCH_CHECK("pool_backward");
}
template <bool kAttention>
void launch_backward(const Backward& a, cudaStream_t stream) {
    if (a.packs <= 2) return launch_backward<kAttention, 2>(a, stream);
    if (a.packs <= 4) return launch_backward<kAttention, 4>(a, stream);
    if (a.packs <= 8) return launch_backward<kAttention, 8>(a, stream);
    if (a.packs <= 16) return launch_backward<kAttention, 16>(a, stream);
    launch_backward<kAttention, 32>(a, stream);
}

bool divides(std::int64_t channels, std::int64_t heads) {
    return channels % heads == 0 && channels / heads % kPackSize == 0 && channels < (std::int64_t(1) << 21);
}
constexpr std::int32_t kMost = (std::int32_t(1) << 30);

}  // namespace

void pool_forward(const Cuda& dev, const PoolForward<bf16>& p) {
    check(p);
    const bool attention = p.kind == PoolKind::attention;
    const std::int64_t heads = attention ? p.z.cols : 0;
    FIEDLER_REQUIRE("pool", is_aligned16(p.x) && is_aligned16(p.y) && divides(p.x.cols, attention ? heads : 1));
    FIEDLER_REQUIRE("pool", p.seq.tokens < kMost && p.longest >= 0);
    const std::int32_t longest = p.seq.length > 0 ? p.seq.length : p.longest;
    const bool long_ones = longest == 0 || longest > kChunk;
    FIEDLER_REQUIRE("pool", !long_ones || p.seq.tokens == 0 ||
                                (p.scratch && p.scratch.size >= pool_scratch_elements(p.x.rows, p.x.cols, heads)));
    if (p.x.cols == 0) return;
    const Forward a{nv(p.y.data),
                    p.lse.data,
                    nv(p.x.data),
                    p.z.data,
                    p.scratch.data,
                    p.y.ld,
                    p.x.ld,
                    p.z.ld,
                    int(p.x.cols),
                    int(heads),
                    attention ? int(p.x.cols / heads) : int(p.x.cols),
                    p.kind,
                    p.seq};
    if (attention)
        launch_forward<true>(a, long_ones, stream_of(dev));
    else
        launch_forward<false>(a, long_ones, stream_of(dev));
}

void pool_backward(const Cuda& dev, const PoolBackward<bf16>& p) {
    check(p);
    const bool attention = p.kind == PoolKind::attention;
    const std::int64_t heads = attention ? p.z.cols : 1;
    FIEDLER_REQUIRE("pool", is_aligned16(p.dx) && is_aligned16(p.dy) && divides(p.dx.cols, heads));
    FIEDLER_REQUIRE("pool", !attention || (is_aligned16(p.x) && is_aligned16(p.y)));
    FIEDLER_REQUIRE("pool", p.seq.tokens < kMost && heads * kBackwardNodes < kMost);
    if (p.seq.tokens == 0 || p.dx.cols == 0) return;
    const Backward a{nv(p.dx.data), nv(p.dz.data), nv(p.dy.data), nv(p.x.data), nv(p.y.data),
                     p.z.data,      p.lse.data,    p.dx.ld,       p.dz.ld,      p.dy.ld,
                     p.x.ld,        p.y.ld,        p.z.ld,        int(heads),   int(p.dx.cols / heads / kPackSize),
                     p.kind,        p.seq};
    if (attention)
        launch_backward<true>(a, stream_of(dev));
    else
        launch_backward<false>(a, stream_of(dev));
}

}  // namespace fiedler
