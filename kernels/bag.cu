// kernels/bag.cu: sparse rows times a table (see bag.h). Forward: a group of lanes owns a row (rows.cuh).
//
// Backward: the entries of the transposed matrix, ordered by feature, are cut into pieces of kBagPiece, whatever the
// features: a block sums one, each of its groups a part. What begins and ends in a piece goes to the table at once; the
// sum of a feature that came in from the piece before goes to the piece's first scratch row, of one that begins here
// and goes on to its second. finish_kernel adds those up, in order. So no row of the table is written twice, and
// neither a feature that is in every row nor thousands that are rare wait on one block.
#include "kernels/bag.h"

#include <algorithm>

#include "kernels/rows.cuh"

namespace fiedler {
namespace {

using namespace rows;
constexpr int kPackSize = Pack<nv_bf16>::size, kPiece = int(kBagPiece), kFinishBlocks = 512;
static_assert(kPiece == kThreads);  // a thread for each entry

struct Forward {
    nv_bf16* x;
    const nv_bf16* table;
    Sparse matrix;
    std::int64_t ld_x, ld_table;
    int rows, channels;
    bool accumulate;
};

template <int kLanes>
__global__ __launch_bounds__(kThreads, 7) void forward_kernel(Forward a) {
    constexpr int kGroups = kThreads / kLanes;
    const int channel = int(blockIdx.y * kLanes + threadIdx.x) * kPackSize, first = int(blockIdx.x) * kGroups;
    for_sparse_rows<kLanes, kPackSize>(
        a.matrix, a.table + channel, a.ld_table, first, min(first + kGroups, a.rows), channel < a.channels,
        [&](int row, float(&sum)[kPackSize]) {
            if (a.accumulate) load_values(sum, a.x + row * a.ld_x + channel);
        },
        [](int, float(&sum)[kPackSize], int, const float(&part)[kPackSize]) {
#pragma unroll
            for (int c = 0; c < kPackSize; ++c) sum[c] += part[c];
        },
        [&](int row, const float(&sum)[kPackSize]) { store_values(a.x + row * a.ld_x + channel, sum); });
}

struct Backward {
    float* dtable;
    const nv_bf16* dx;
    Sparse matrix;   // transposed: a row of it is a feature
    float* partial;  // [pieces][2][channels]
    int* going_on;   // [pieces] the feature that begins in the piece and goes on beyond it, or -1
    std::int64_t ld_dtable, ld_dx;
    int features, channels, pieces;
};

__device__ void add_to_table(const Backward& a, int feature, int channel, const float (&sum)[kPackSize]) {
    float* out = a.dtable + feature * a.ld_dtable + channel;
    float value[kPackSize];
    load_values(value, out);
#pragma unroll
    for (int c = 0; c < kPackSize; ++c) value[c] += sum[c];
    store_values(out, value);
}

// A group's part of a piece, entries [first, last) of it: the sums of its first feature and of its last, if that is
// another, go to shared memory; those between them to the table.
__device__ void sum_part(const Backward& a, const int (&features)[kPiece], int base, int first, int last, int channel,
                         float* head, float* tail) {
    float sum[kPackSize];
    clear(sum);
    int current = features[first];
    bool is_head = true;
    for (int e0 = first; e0 < last; e0 += kBatch) {
        Piece<nv_bf16, kPackSize> rows[kBatch];
        float values[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (e0 + k >= last) continue;
            rows[k].load(a.dx + a.matrix.columns[base + e0 + k] * a.ld_dx + channel);
            values[k] = a.matrix.values ? a.matrix.values[base + e0 + k] : 1.f;
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (e0 + k >= last) break;
            if (features[e0 + k] != current) {
                if (is_head)
                    store_values(head, sum);
                else
                    add_to_table(a, current, channel, sum);
                is_head = false;
                clear(sum);
                current = features[e0 + k];
            }
            float row[kPackSize];
            rows[k].unpack(row);
#pragma unroll
            for (int c = 0; c < kPackSize; ++c) sum[c] += values[k] * row[c];
        }
    }
    store_values(is_head ? head : tail, sum);
}

template <int kLanes>
__global__ __launch_bounds__(kThreads) void piece_kernel(Backward a) {
    constexpr int kGroups = kThreads / kLanes, kOwn = kPiece / kGroups, kChannels = kLanes * kPackSize;
    __shared__ int features[kPiece];
    __shared__ __align__(16) float heads[kGroups][kChannels], tails[kGroups][kChannels];
    const int thread = int(threadIdx.y) * kLanes + int(threadIdx.x), base = int(blockIdx.x) * kPiece;
    const std::int32_t* offsets = a.matrix.offsets;
    const int count = min(kPiece, offsets[a.features] - base);
    if (count <= 0) {  // the arrays are longer than the matrix
        if (thread == 0 && blockIdx.y == 0) a.going_on[blockIdx.x] = -1;
        return;
    }
    if (thread < count) features[thread] = row_of(offsets, a.features, base + thread);
    __syncthreads();
    const int channel = int(blockIdx.y) * kChannels + int(threadIdx.x) * kPackSize;
    const int first = int(threadIdx.y) * kOwn, last = min(first + kOwn, count);
    if (first < last && channel < a.channels)
        sum_part(a, features, base, first, last, channel, &heads[threadIdx.y][threadIdx.x * kPackSize],
                 &tails[threadIdx.y][threadIdx.x * kPackSize]);
    __syncthreads();

    // One thread for each channel puts the groups' sums together.
    const auto begins_here = [&](int feature) { return offsets[feature] >= base; };
    const auto goes_on = [&](int feature) { return offsets[feature + 1] > base + count; };
    if (thread == 0 && blockIdx.y == 0) {
        const int feature = features[count - 1];
        a.going_on[blockIdx.x] = begins_here(feature) && goes_on(feature) ? feature : -1;
    }
    const int own = int(blockIdx.y) * kChannels + thread;
    if (thread >= kChannels || own >= a.channels) return;
    float* partial = a.partial + std::int64_t(blockIdx.x) * 2 * a.channels + own;
    int current = features[0];
    float sum = 0;
    const auto close = [&] {
        if (!begins_here(current))
            partial[0] = sum;
        else if (goes_on(current))
            partial[a.channels] = sum;
        else
            a.dtable[current * a.ld_dtable + own] += sum;
    };
    for (int g = 0; g < kGroups && g * kOwn < count; ++g) {
        const int from = features[g * kOwn], to = features[min((g + 1) * kOwn, count) - 1];
        if (from != current) {
            close();
            current = from, sum = 0;
        }
        sum += heads[g][thread];
        if (to != current) {
            close();
            current = to, sum = tails[g][thread];
        }
    }
    close();
}

// The features that lie in several pieces: the second scratch row of the piece where one begins, then the first ones of
// those that it goes on in.
__global__ __launch_bounds__(kColumns* kRows, 1) void finish_kernel(Backward a) {
    __shared__ float shared[kRows][kColumns];
    const int column = int(blockIdx.y) * kColumns + int(threadIdx.x);
    for (int piece = int(blockIdx.x); piece < a.pieces; piece += int(gridDim.x)) {
        const int feature = a.going_on[piece];
        if (feature < 0) continue;
        const int count = (a.matrix.offsets[feature + 1] - 1) / kPiece - piece + 1;
        const float* partial = a.partial + std::int64_t(piece) * 2 * a.channels + column;
        const float sum = sum_partials(column < a.channels ? count : 0, shared, [&](std::int64_t k) {
            return partial[k == 0 ? a.channels : k * 2 * a.channels];
        });
        if (threadIdx.y == 0 && column < a.channels) a.dtable[feature * a.ld_dtable + column] += sum;
    }
}

unsigned blocks_of(std::int64_t n, int each) { return unsigned(ceil_div(n, std::int64_t(each))); }
constexpr std::int64_t kMost = (std::int64_t(1) << 31) - kThreads;

template <int kLanes>
dim3 threads() {
    return dim3(kLanes, kThreads / kLanes);
}

}  // namespace

void bag_forward(const Cuda& dev, const BagForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("bag", p.x.cols % kPackSize == 0 && is_aligned16(p.x) && is_aligned16(p.table));
    FIEDLER_REQUIRE("bag", p.x.rows < kMost && p.table.rows < kMost && p.x.cols < (1 << 21));
    if (p.x.rows == 0 || p.x.cols == 0) return;
    const Forward a{nv(p.x.data),  nv(p.table.data), {p.offsets.data, p.columns.data, nullptr, p.values.data},
                    p.x.ld,        p.table.ld,       int(p.x.rows),
                    int(p.x.cols), p.accumulate};
    const cudaStream_t stream = stream_of(dev);
    if (a.channels <= 8 * kPackSize)
        forward_kernel<8><<<blocks_of(a.rows, kThreads / 8), threads<8>(), 0, stream>>>(a);
    else
        forward_kernel<16><<<dim3(blocks_of(a.rows, kThreads / 16), blocks_of(a.channels, 16 * kPackSize)),
                             threads<16>(), 0, stream>>>(a);
    LAUNCH_CHECK("bag_forward");
}

void bag_backward(const Cuda& dev, const BagBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("bag", p.dx.cols % kPackSize == 0 && is_aligned16(p.dx) && is_aligned16(p.dtable));
    FIEDLER_REQUIRE("bag", p.rows.size < kMost && p.dtable.rows < kMost && p.dx.cols < (1 << 21));
    if (p.rows.size == 0 || p.dx.cols == 0 || p.dtable.rows == 0) return;
    FIEDLER_REQUIRE("bag", p.scratch && p.scratch.size >= bag_scratch_elements(p.rows.size, p.dx.cols));
    const unsigned pieces = blocks_of(p.rows.size, kPiece);
    float* partial = p.scratch.data;
    auto* going_on = reinterpret_cast<int*>(partial + std::int64_t(pieces) * 2 * p.dx.cols);
    const Backward a{p.dtable.data, nv(p.dx.data),      {p.offsets.data, p.rows.data, nullptr, p.values.data},
                     partial,       going_on,           p.dtable.ld,
                     p.dx.ld,       int(p.dtable.rows), int(p.dx.cols),
                     int(pieces)};
    const cudaStream_t stream = stream_of(dev);
    if (a.channels <= 8 * kPackSize)
        piece_kernel<8><<<pieces, threads<8>(), 0, stream>>>(a);
    else
        piece_kernel<16><<<dim3(pieces, blocks_of(a.channels, 16 * kPackSize)), threads<16>(), 0, stream>>>(a);
    LAUNCH_CHECK("bag_backward");
    if (pieces == 1) return;
    const dim3 grid(std::min(pieces, unsigned(kFinishBlocks)), blocks_of(a.channels, kColumns));
    finish_kernel<<<grid, dim3(kColumns, kRows), 0, stream>>>(a);
    LAUNCH_CHECK("bag_finish");
}

}  // namespace fiedler
