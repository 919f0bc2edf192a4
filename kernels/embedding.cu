// kernels/embedding.cu: token embedding (see embedding.h).
//
// Backward, in two kernels. The first writes tokens and positions so that equal tokens follow one another, in the order of
// positions: each block takes a class of tokens, reads all of them, counts those of the classes before, which is where its
// own begin, and puts its own in order by counting. So the blocks need nothing of each other.
//
// The second adds rows: a run of equal tokens in that order is one row of the table. A block looks after kPlaces places. A
// short run is summed by 16 threads of the block that it begins in; a longer one by whole blocks, each the part that lies in
// its own places, split over its groups of threads in a fixed way. Where such a run lies in several blocks they leave
// their parts in memory, and the one that is done last adds them up in order: the same sum whichever it is. So no row is
// written twice, no atomics of floats are needed, and the most frequent token waits on no single block.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/embedding.h"

namespace fiedler {
namespace {

constexpr int kPackSize = Pack<nv_bf16>::size;
constexpr int kLanes = 16, kBlockChannels = kLanes * kPackSize;  // one group of lanes: 128 channels of a row
constexpr int kGroups = 16, kThreads = kLanes * kGroups;         // groups of a block
constexpr int kPlaces = kEmbeddingPlaces;                        // sorted places that it looks after
constexpr int kShort = 16;                                       // tokens of a run that one group sums
constexpr int kBatch = 4;                                        // rows of dx loaded at a time by a thread
constexpr int kGatherRows = 16, kGatherPacks = 4;
constexpr int kOrderWarps = 32, kOrderThreads = kOrderWarps * kWarp;
constexpr int kOrderBatch = 16;              // tokens loaded at a time by a thread
constexpr int kClasses = 128, kRange = 192;  // at least so many classes, and no more tokens of each
constexpr int kFew = 8;                      // tokens that are counted one by one
constexpr int kFound = 88;                   // tokens of a part that are remembered
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Gather {
    nv_bf16* x;
    const nv_bf16* table;
    const std::int32_t* tokens;
    std::int64_t count, ld_x, ld_table;
    int packs;
};

__global__ __launch_bounds__(kLanes* kGatherRows) void gather_kernel(Gather a) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kGatherRows + threadIdx.y;
    if (i >= a.count) return;
    const nv_bf16* from = a.table + std::int64_t(a.tokens[i]) * a.ld_table;
    nv_bf16* to = a.x + i * a.ld_x;
    for (int first = threadIdx.x; first < a.packs; first += kLanes * kGatherPacks) {
        Pack<nv_bf16> value[kGatherPacks];
#pragma unroll
        for (int k = 0; k < kGatherPacks; ++k)
            if (first + k * kLanes < a.packs) value[k] = load16(from + (first + k * kLanes) * kPackSize);
#pragma unroll
        for (int k = 0; k < kGatherPacks; ++k)
            if (first + k * kLanes < a.packs) store16(to + (first + k * kLanes) * kPackSize, value[k]);
    }
}

// A run of equal tokens in order: places first .. end - 1.
struct Run {
    int first, end;
    __device__ int blocks() const { return (end - 1) / kPlaces - first / kPlaces + 1; }
};

struct Order {
    std::int32_t *sorted, *positions;
    Run* across;   // [blocks of places]: the run that reaches into a block from the one before; else unset
    int* arrived;  // [counters], to be 0
    const std::int32_t* tokens;
    int count, bits, counters;  // classes: 2^bits, by a token's lowest bits
};

// The tokens of a warp's part that are of class `own`, kWarp places at a time: body(position, token >> bits, inside),
// called by all threads of the warp when any is inside. Returns how many are of a class below, of the thread's own.
template <class Body>
__device__ int for_own_tokens(const Order& a, int own, Body&& body) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int part = ceil_div(ceil_div(a.count, kWarp), kOrderWarps) * kWarp;
    const int first = warp * part, last = min(first + part, a.count);  // first may be beyond the last token
    int below = 0;
    for (int p0 = first; p0 < last; p0 += kWarp * kOrderBatch) {
        int token[kOrderBatch];
#pragma unroll
        for (int k = 0; k < kOrderBatch; ++k) {
            const int p = p0 + k * kWarp + lane;
            token[k] = p < last ? a.tokens[p] : -1;
        }
#pragma unroll
        for (int k = 0; k < kOrderBatch; ++k) {
            const int of = token[k] & ((1 << a.bits) - 1);  // of -1, which is no token, comes the highest class
            const bool inside = of == own && token[k] >= 0;
            below += of < own;
            if (__any_sync(kWholeWarp, inside)) body(p0 + k * kWarp + lane, token[k] >> a.bits, inside);
        }
    }
    return below;
}

// A token is found by its class, so that frequent ones, which often have neighbouring numbers, are spread over the blocks.
__global__ __launch_bounds__(kOrderThreads) void order_kernel(const Order a) {
    dependents_may_start();
    __shared__ int counts[kOrderWarps][kRange];  // of each token in each warp's part; then its places before that part
    __shared__ int sums[2][kOrderWarps];
    __shared__ int2 found[kOrderWarps][kFound];  // the first of a part: position and token, in order
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, own = blockIdx.x;
    for (int i = blockIdx.x * kOrderThreads + thread; i < a.counters; i += gridDim.x * kOrderThreads) a.arrived[i] = 0;
    for (int i = thread; i < kOrderWarps * kRange; i += kOrderThreads) (&counts[0][0])[i] = 0;
    __syncthreads();
    int listed = 0;
    int below = for_own_tokens(a, own, [&](int position, int token, bool inside) {
        const unsigned all = __ballot_sync(kWholeWarp, inside);
        const int at = listed + __popc(all & ((1u << lane) - 1));
        if (inside && at < kFound) found[warp][at] = {position, token};
        listed += __popc(all);
        if (__popc(all) > kFew) {
            const unsigned equal = __match_any_sync(kWholeWarp, inside ? token : -1);
            if (inside && lane == __ffs(int(equal)) - 1) counts[warp][token] += __popc(equal);
        } else if (inside) {
            atomicAdd(&counts[warp][token], 1);
        }
        __syncwarp();
    });
    below = __reduce_add_sync(kWholeWarp, below);
    __syncthreads();

    // Thread t: of the class's token number t, how many there are, and before each part.
    int total = 0;
    if (thread < kRange) {
#pragma unroll 8
        for (int w = 0; w < kOrderWarps; ++w) {
            const int n = counts[w][thread];
            counts[w][thread] = total;
            total += n;
        }
    }
    int before = total;  // then the sum of totals up to and with the thread's own, in its warp
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
        const int other = __shfl_up_sync(kWholeWarp, before, o);
        if (lane >= o) before += other;
    }
    if (lane == kWarp - 1) sums[0][warp] = before;
    if (lane == 0) sums[1][warp] = below;
    __syncthreads();
    int first = before - total;
#pragma unroll 8
    for (int w = 0; w < kOrderWarps; ++w) first += sums[1][w] + (w < warp ? sums[0][w] : 0);
    if (thread < kRange) {
#pragma unroll 8
        for (int w = 0; w < kOrderWarps; ++w) counts[w][thread] += first;
        const Run run{first, first + total};
        for (int b = ceil_div(first + 1, kPlaces); b * kPlaces < run.end; ++b) a.across[b] = run;
    }
    __syncthreads();
    const auto place = [&](int position, int token, bool inside) {
        // Those of the same token are before one another as they were; one of them counts for all.
        const unsigned equal = __match_any_sync(kWholeWarp, inside ? token : -1);
        int at = 0;
        if (inside) {
            at = counts[warp][token] + __popc(equal & ((1u << lane) - 1));
            a.sorted[at] = token << a.bits | own;
            a.positions[at] = position;
        }
        __syncwarp();
        if (inside && lane == __ffs(int(equal)) - 1) counts[warp][token] += __popc(equal);
        __syncwarp();
    };
    if (listed > kFound) {
        for_own_tokens(a, own, place);
        return;
    }
    __syncwarp();
    for (int i = 0; i < listed; i += kWarp) {
        const bool inside = i + lane < listed;
        const int2 one = inside ? found[warp][i + lane] : int2{0, 0};
        place(one.x, one.y, inside);
    }
}

struct Scatter {
    float* dtable;
    const nv_bf16* dx;
    const std::int32_t *tokens, *positions;  // sorted
    const Run* across;
    // [blocks of places][blocks of channels]: parts that are done of the run that begins there and goes on.
    int* arrived;
    float* parts;  // [blocks of places][2][channels]: of the run from the block before, and of that into the next one
    std::int64_t ld_dtable, ld_dx;
    int count, channels;  // tokens, below 2^30: places and a step beyond them fit an int
};

// Sums two bf16 of each word. Rows wait as raw words, two values to a register (a Pack may be spread over twice as
// many registers).
__device__ void add_raw(float (&sum)[kPackSize], const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < kPackSize; ++e)
        sum[e] += __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
}

// sum += rows dx[positions[p]] for p = first, first + step, ... < last, in that order.
__device__ void add_rows(float (&sum)[kPackSize], const Scatter& a, const std::int32_t* positions, int channel,
                         int first, int last, int step) {
    for (int p0 = first; p0 < last; p0 += step * kBatch) {
        uint4 rows[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const int p = p0 + k * step;
            if (p < last) rows[k] = *reinterpret_cast<const uint4*>(a.dx + positions[p] * a.ld_dx + channel);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (p0 + k * step < last) add_raw(sum, rows[k]);
        }
    }
}

// dtable[row][channel..channel + 8): asked for, and written with the sum added.
struct TableRow {
    float* out;
    Pack<float> value[2];
    __device__ TableRow(const Scatter& a, std::int64_t row, int channel)
        : out(a.dtable + row * a.ld_dtable + channel), value{load16(out), load16(out + 4)} {}
    __device__ void add(const float (&sum)[kPackSize]) {
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) value[e / 4].v[e % 4] += sum[e];
        store16(out, value[0]), store16(out + 4, value[1]);
    }
};

using Sums = float[kGroups][kBlockChannels];

// The sum over the block's groups, in order, of channel number `thread`. All threads take part.
__device__ float sum_of_groups(Sums& sums, const float (&sum)[kPackSize]) {
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) sums[group][lane * kPackSize + e] = sum[e];
    __syncthreads();
    float total = 0;
    if (threadIdx.x < kBlockChannels)
        for (int g = 0; g < kGroups; ++g) total += sums[g][threadIdx.x];
    return total;
}

// A run that the whole block works on: its places within the block's, first .. last - 1. All threads take part.
__device__ void add_long_run(const Scatter& a, Sums& sums, const Run& run, int first, int last) {
    __shared__ int done;
    const int thread = threadIdx.x, lane = thread % kLanes, group = thread / kLanes;
    const int channel = blockIdx.y * kBlockChannels + lane * kPackSize, own = blockIdx.y * kBlockChannels + thread;
    const bool writes = thread < kBlockChannels && own < a.channels;
    float sum[kPackSize] = {};
    if (channel < a.channels) add_rows(sum, a, a.positions, channel, first + group, last, kGroups);
    float total = sum_of_groups(sums, sum);
    if (run.blocks() > 1) {
        const int begins = run.first / kPlaces;
        float* part = a.parts + own;
        if (writes) part[(2 * std::int64_t(blockIdx.x) + (int(blockIdx.x) == begins)) * a.channels] = total;
        __threadfence();
        __syncthreads();
        if (thread == 0) done = atomicAdd(a.arrived + begins * gridDim.y + blockIdx.y, 1);
        __syncthreads();
        if (done != run.blocks() - 1) return;  // the same answer in every thread
        __threadfence();
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) sum[e] = 0.f;
        if (channel < a.channels) {
#pragma unroll 4
            for (int b = group; b < run.blocks(); b += kGroups) {
                const float* p = a.parts + (2 * std::int64_t(begins + b) + (b == 0)) * a.channels + channel;
                const float4 v = __ldcg(reinterpret_cast<const float4*>(p)),
                             u = __ldcg(reinterpret_cast<const float4*>(p) + 1);
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
                sum[4] += u.x, sum[5] += u.y, sum[6] += u.z, sum[7] += u.w;
            }
        }
        total = sum_of_groups(sums, sum);
    }
    if (writes) a.dtable[a.tokens[first] * a.ld_dtable + own] += total;
}

__global__ __launch_bounds__(kThreads, 4) void scatter_kernel(const Scatter a) {
    static_assert(kPlaces % kWarp == 0 && kPlaces + 2 <= kThreads && kThreads == 2 * kBlockChannels);
    __shared__ std::int32_t window[kPlaces + 2];  // window[1 + p]: the token of the block's place p; -1 outside
    __shared__ std::int32_t positions[kPlaces + kShort - 1];  // of the block's places, and of a short run's beyond them
    __shared__ unsigned starts[kPlaces / kWarp];              // where runs begin
    __shared__ unsigned long_runs[kPlaces / kWarp];           // those of more than kShort tokens
    __shared__ short run_at[kPlaces + 1];                     // the places where they do, in order
    __shared__ Sums sums;
    const int thread = threadIdx.x, lane = thread % kLanes, group = thread / kLanes;
    const int channel = blockIdx.y * kBlockChannels + lane * kPackSize;
    wait_for_previous();  // for the order
    const int base = blockIdx.x * kPlaces, end = min(kPlaces, a.count - base);
    if (thread < kPlaces + 2) {
        const int p = base - 1 + thread;
        window[thread] = p >= 0 && p < a.count ? a.tokens[p] : -1;
    }
    if (thread < kPlaces + kShort - 1) positions[thread] = base + thread < a.count ? a.positions[base + thread] : 0;
    __syncthreads();
    const bool begins = thread < end && window[thread] != window[thread + 1];
    const unsigned mask = __ballot_sync(kWholeWarp, begins);
    if (thread < kPlaces && thread % kWarp == 0) starts[thread / kWarp] = mask;
    __syncthreads();
    int runs = 0, number = 0;
#pragma unroll
    for (int w = 0; w < kPlaces / kWarp; ++w) {
        if (w == thread / kWarp) number = runs + __popc(mask & ((1u << thread % kWarp) - 1));
        runs += __popc(starts[w]);
    }
    if (begins) run_at[number] = short(thread);
    if (thread == 0) run_at[runs] = short(end);
    __syncthreads();

    // Run number r, as far as it goes; only the last one can go on into the next block.
    const bool goes_on = window[end] == window[end + 1];
    const auto run_of = [&](int r) {
        return r == runs - 1 && goes_on ? a.across[blockIdx.x + 1] : Run{base + run_at[r], base + run_at[r + 1]};
    };
    if (thread < kPlaces) {
        const Run run = thread < runs ? run_of(thread) : Run{0, 0};
        const unsigned longs = __ballot_sync(kWholeWarp, run.end - run.first > kShort);
        if (thread % kWarp == 0) long_runs[thread / kWarp] = longs;
    }
    for (int r = group; r < runs; r += kGroups) {
        const Run run = run_of(r);
        if (run.end - run.first > kShort || channel >= a.channels) continue;
        const int first = run.first - base;
        TableRow row(a, window[1 + first], channel);
        float sum[kPackSize] = {};
        add_rows(sum, a, positions, channel, first, run.end - base, 1);
        row.add(sum);
    }
    if (window[0] == window[1]) {
        const Run run = a.across[blockIdx.x];
        if (run.end - run.first > kShort) add_long_run(a, sums, run, base, min(run.end, base + kPlaces));
    }
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < kPlaces / kWarp; ++w)
        for (unsigned left = long_runs[w]; left != 0; left &= left - 1) {
            const Run run = run_of(w * kWarp + __ffs(int(left)) - 1);
            add_long_run(a, sums, run, run.first, min(run.end, base + kPlaces));
        }
}

// Parts of the scratch memory, each 256-byte aligned.
struct Parts {
    std::size_t sorted, positions, across, arrived, parts, end;
    std::int64_t blocks, slices;
    Parts(std::int64_t tokens, std::int64_t channels)
        : blocks(embedding_blocks(tokens)), slices(ceil_div(channels, std::int64_t(kBlockChannels))) {
        sorted = 0;
        positions = sorted + embedding_aligned(tokens * 4);
        across = positions + embedding_aligned(tokens * 4);
        arrived = across + embedding_aligned(blocks * 8);
        parts = arrived + embedding_aligned(blocks * slices * 4);
        end = parts + embedding_aligned(blocks * 2 * channels * 4);
    }
};

// Bits of a token's class.
int class_bits(int vocab) {
    int bits = 0;
    while (1 << bits < kClasses && 1 << bits < vocab) ++bits;
    while (ceil_div(vocab, 1 << bits) > kRange) ++bits;
    return bits;
}

}  // namespace

void embedding_forward(const Cuda& dev, const EmbeddingForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("embedding", p.x.cols % kPackSize == 0 && is_aligned16(p.x) && is_aligned16(p.table));
    if (p.x.rows == 0) return;
    const Gather args{nv(p.x.data), nv(p.table.data),         p.tokens.data, p.x.rows, p.x.ld,
                      p.table.ld,   int(p.x.cols / kPackSize)};
    gather_kernel<<<unsigned(ceil_div(p.x.rows, std::int64_t(kGatherRows))), dim3(kLanes, kGatherRows), 0,
                    stream_of(dev)>>>(args);
    LAUNCH_CHECK("embedding_forward");
}

void embedding_backward(const Cuda& dev, const EmbeddingBackward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("embedding", p.dx.cols % kPackSize == 0 && is_aligned16(p.dx) && is_aligned16(p.dtable));
    FIEDLER_REQUIRE("embedding", p.dx.rows < (std::int64_t(1) << 30) && p.dtable.rows < (std::int64_t(1) << 30));
    if (p.dx.rows == 0 || p.dx.cols == 0) return;
    const int n = int(p.dx.rows), vocab = int(p.dtable.rows);
    const Parts parts(n, p.dx.cols);
    FIEDLER_REQUIRE("embedding", p.scratch && p.scratch.size >= std::int64_t(parts.end) &&
                                     reinterpret_cast<std::uintptr_t>(p.scratch.data) % 256 == 0);
    const auto part = [&](std::size_t offset) { return reinterpret_cast<std::int32_t*>(p.scratch.data + offset); };
    std::int32_t *sorted = part(parts.sorted), *positions = part(parts.positions);
    Run* across = reinterpret_cast<Run*>(part(parts.across));
    const int bits = class_bits(vocab);
    const Order order{sorted,        positions, across, part(parts.arrived),
                      p.tokens.data, n,         bits,   int(parts.blocks * parts.slices)};
    order_kernel<<<1u << bits, kOrderThreads, 0, stream_of(dev)>>>(order);
    LAUNCH_CHECK("embedding_order");
    const Scatter args{p.dtable.data,
                       nv(p.dx.data),
                       sorted,
                       positions,
                       across,
                       part(parts.arrived),
                       reinterpret_cast<float*>(part(parts.parts)),
                       p.dtable.ld,
                       p.dx.ld,
                       n,
                       int(p.dx.cols)};
    const dim3 grid(unsigned(parts.blocks), unsigned(parts.slices));
    launch_dependent(dev, scatter_kernel, grid, kThreads, 0, args);
    LAUNCH_CHECK("embedding_backward");
}

}  // namespace fiedler
