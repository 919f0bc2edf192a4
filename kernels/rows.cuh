// kernels/rows.cuh: rows of matrices a few values at a time, and sums of the rows that a sparse matrix names: what
// graph_conv, bag and pool share.
//
// A block is kThreads threads: kLanes across the channels, kWidth neighbouring ones each, x kThreads / kLanes groups.
// kWidth is 16 bytes of the narrower type where the layout allows it, else 1.
#pragma once
#include "kernels/common.cuh"

namespace fiedler::rows {

constexpr int kThreads = 128;
constexpr int kBatch = 4;      // rows that a thread has on their way at a time
constexpr int kLongRow = 128;  // entries of a sparse row beyond which the whole block sums it

// kWidth neighbouring values of a row as they lie in memory: raw words, so that two bf16 take one register.
template <class T, int kWidth>
struct Piece {
    static constexpr int kWords = kWidth * int(sizeof(T)) / 16;
    static_assert(kWords * 16 == kWidth * int(sizeof(T)));
    uint4 words[kWords];

    __device__ void load(const T* p) {
#pragma unroll
        for (int k = 0; k < kWords; ++k) words[k] = reinterpret_cast<const uint4*>(p)[k];
    }
    __device__ void unpack(float (&v)[kWidth]) const {
        constexpr int kEach = 4 / int(sizeof(T));  // values of a 32-bit word
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
            const uint4& four = words[e / (4 * kEach)];
            const unsigned all[4] = {four.x, four.y, four.z, four.w};
            const unsigned word = all[e / kEach % 4];
            v[e] = __uint_as_float(kEach == 1 ? word : e % 2 == 0 ? word << 16 : word & 0xffff0000u);
        }
    }
};
template <class T>
struct Piece<T, 1> {
    T value;
    __device__ void load(const T* p) { value = *p; }
    __device__ void unpack(float (&v)[1]) const { v[0] = to_float(value); }
};

template <int kWidth, class T>
__device__ inline void load_values(float (&v)[kWidth], const T* p) {
    Piece<T, kWidth> piece;
    piece.load(p);
    piece.unpack(v);
}
template <int kWidth, class T>
__device__ inline void store_values(T* p, const float (&v)[kWidth]) {
    if constexpr (kWidth == 1) {
        *p = from_float<T>(v[0]);
    } else {
        constexpr int kPack = Pack<T>::size;
#pragma unroll
        for (int k = 0; k < kWidth; k += kPack) {
            Pack<T> pack;
#pragma unroll
            for (int e = 0; e < kPack; ++e) pack.v[e] = from_float<T>(v[k + e]);
            store16(p + k, pack);
        }
    }
}
template <int kWidth>
__device__ inline void clear(float (&v)[kWidth]) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = 0.f;
}

// A sparse matrix; types and values absent: all 0 and all 1.
struct Sparse {
    const std::int32_t *offsets, *columns;
    const std::uint8_t* types;
    const float* values;
};

// Entries first, first + step, ... < last of a sparse row, in that order: take(type, sum) for each run of one type, sum
// being the run's sum of value times row of `in` (this thread's channels of it).
template <int kWidth, class T, class Take>
__device__ inline void sum_entries(const Sparse& m, const T* in, std::int64_t ld, int first, int last, int step,
                                   Take&& take) {
    float sum[kWidth];
    clear(sum);
    int type = -1;  // of the run at hand
    for (int e0 = first; e0 < last; e0 += kBatch * step) {
        Piece<T, kWidth> rows[kBatch];
        float values[kBatch];
        int types[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int e = e0 + k * step;
            if (e >= last) continue;
            rows[k].load(in + m.columns[e] * ld);
            values[k] = m.values ? m.values[e] : 1.f;
            types[k] = m.types ? m.types[e] : 0;
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (e0 + k * step >= last) break;
            if (types[k] != type) {
                if (type >= 0) take(type, sum);
                clear(sum);
                type = types[k];
            }
            float row[kWidth];
            rows[k].unpack(row);
#pragma unroll
            for (int c = 0; c < kWidth; ++c) sum[c] += values[k] * row[c];
        }
    }
    if (type >= 0) take(type, sum);
}

// Adds the sums of the block's groups, in order, into those of group 0. All threads take part; two barriers.
template <int kLanes, int kWidth>
__device__ inline void add_groups(float (&sum)[kWidth], float (&shared)[kThreads * kWidth]) {
    const int thread = threadIdx.y * kLanes + threadIdx.x;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) shared[c * kThreads + thread] = sum[c];
    __syncthreads();
    if (threadIdx.y == 0) {
        for (int g = 1; g < kThreads / kLanes; ++g)
#pragma unroll
            for (int c = 0; c < kWidth; ++c) sum[c] += shared[c * kThreads + g * kLanes + threadIdx.x];
    }
    __syncthreads();
}

// The sparse rows [first_row, end_row), shared out among the block's groups; all threads take part. For each row:
// begin(row, sum) by one group, take(sum, type, part) for each run of one type, end(row, sum) by one group. A long row
// is summed by all groups together; which rows are long depends on their length alone. inside: this thread has channels.
template <int kLanes, int kWidth, class T, class Begin, class Take, class End>
__device__ inline void for_sparse_rows(const Sparse& m, const T* in, std::int64_t ld, int first_row, int end_row,
                                       bool inside, Begin&& begin, Take&& take, End&& end) {
    constexpr int kGroups = kThreads / kLanes;
    __shared__ float shared[kThreads * kWidth];
    bool any_long = false;
    for (int row = first_row + int(threadIdx.y); row < end_row; row += kGroups) {
        const int first = m.offsets[row], last = m.offsets[row + 1];
        if (last - first > kLongRow) {
            any_long = true;
        } else if (inside) {
            float sum[kWidth];
            clear(sum);
            begin(row, sum);
            sum_entries<kWidth>(m, in, ld, first, last, 1,
                                [&](int type, const float(&part)[kWidth]) { take(row, sum, type, part); });
            end(row, sum);
        }
    }
    if (!__syncthreads_or(any_long)) return;
    for (int row = first_row; row < end_row; ++row) {
        const int first = m.offsets[row], last = m.offsets[row + 1];
        if (last - first <= kLongRow) continue;
        float sum[kWidth];
        clear(sum);
        if (inside) {
            if (threadIdx.y == 0) begin(row, sum);
            sum_entries<kWidth>(m, in, ld, first + int(threadIdx.y), last, kGroups,
                                [&](int type, const float(&part)[kWidth]) { take(row, sum, type, part); });
        }
        add_groups<kLanes>(sum, shared);
        if (inside && threadIdx.y == 0) end(row, sum);
    }
}

// Sums of many partial results, in a block of kColumns x kRows threads: of value(k) for k = 0 .. count - 1, complete in
// threads of row 0. All threads take part; the order is fixed. kUnroll: loads that a thread has on their way.
constexpr int kColumns = 32, kRows = 32;
template <int kUnroll = 8, class Value>
__device__ inline float sum_partials(std::int64_t count, float (&shared)[kRows][kColumns], Value&& value) {
    float sum = 0;
#pragma unroll kUnroll
    for (std::int64_t k = threadIdx.y; k < count; k += kRows) sum += value(k);
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int row = 1; row < kRows; ++row) sum += shared[row][threadIdx.x];
    __syncthreads();
    return sum;
}

// The row that holds entry e: offsets[row] <= e < offsets[row + 1]; there must be one.
__device__ inline int row_of(const std::int32_t* offsets, int rows, int e) {
    int low = 0, high = rows;  // offsets[low] <= e < offsets[high]
    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (offsets[middle] <= e)
            low = middle;
        else
            high = middle;
    }
    return low;
}

}  // namespace fiedler::rows
