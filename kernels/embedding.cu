// kernels/embedding.cu: token embedding (see embedding.h).
//
// Backward, in two kernels. The first writes tokens and positions so that equal tokens follow one another, always in the
// same order: each block takes a class of tokens, reads all of them, counts those of the classes before, which is where its
// own begin, and puts its own in order by counting. So the blocks need nothing of each other. Where there are few classes
// several blocks count the same one, and each puts its share of it in order.
//
// The second adds rows: a run of equal tokens in that order is one row of the table. A block looks after kPlaces places. A
// short run is summed by 16 threads of the block that it begins in; a longer one by that whole block, split over groups of
// its threads in a fixed way. A run longer than kMost is shared by the blocks that it lies in: they leave their parts in
// memory, and of kFan neighbours the one that is done last adds them up in order, and of all those the last one: the same
// sum whichever it is. So no row is written twice, no atomics of floats are needed, and the most frequent token waits on
// no single block.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/embedding.h"

namespace fiedler {
namespace {

constexpr int kPackSize = Pack<nv_bf16>::size;
constexpr int kLanes = 16, kBlockChannels = kLanes * kPackSize;  // one group of lanes: 128 channels of a row
constexpr int kGroups = 16, kThreads = kLanes * kGroups;         // groups of a block
constexpr int kPlaces = kEmbeddingPlaces;                        // sorted places that it looks after
constexpr int kShort = 16;                                       // tokens of a run that one group sums
constexpr int kMost = 4 * kPlaces;                               // tokens of a run that one block sums
constexpr int kFan = 32;                                         // blocks whose parts of a run are added up first
constexpr int kScatterBlocks = 4 * 132;                          // that run at once on an H200
constexpr int kBatch = 4, kLongBatch = 4;                        // rows of dx loaded at a time by a thread
constexpr int kGatherRows = 16, kGatherPacks = 4;
constexpr int kOrderWarps = 32, kOrderThreads = kOrderWarps * kWarp;
constexpr int kOrderBlocks = 128;  // at least, but no more than kOrderWarps of one class
// Tokens loaded at a time by a thread. In which order equal tokens are added up follows from it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000
constexpr int kOrderBatch = 16;  // with more, registers are spilled there
#else
constexpr int kOrderBatch = 32;
#endif
constexpr int kRange = 512;  // tokens of a class at most
constexpr int kFound = 88;   // tokens of a part that are remembered
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
    __device__ int length() const { return end - first; }
    __device__ int first_block() const { return first / kPlaces; }
    __device__ int last_block() const { return (end - 1) / kPlaces; }
};

struct Order {
    std::int32_t *sorted, *positions;
    Run* across;   // [blocks of places]: the run that reaches into a block from the one before; else unset
    int* arrived;  // [counters], to be 0
    const std::int32_t* tokens;
    int count, counters;
    int bits, range;  // classes: 2^bits, by a token's lowest bits; tokens of a class
};

// Tokens of a warp's part: first .. last - 1; first may be beyond the last one.
struct Part {
    int first, last;
    __device__ Part(const Order& a, int warp) {
        const int tokens = ceil_div(ceil_div(a.count, kWarp), kOrderWarps) * kWarp;
        first = warp * tokens, last = min(first + tokens, a.count);
    }
};

// Of kOrderBatch x kWarp tokens, those of class `own`: bit k of `hits` is that of token first + k kWarp + lane, and `below`
// counts those of the classes below.
struct Hits {
    unsigned hits = 0;
    int below = 0;
    __device__ void look(int token, int k, int own, int mask) {
        const int of = token & mask;
        if (of == own) hits |= 1u << k;
        if (of < own) ++below;
    }
    __device__ Hits(const Order& a, int own, int first, int last) {
        const int mask = (1 << a.bits) - 1;
        const std::int32_t* tokens = a.tokens + first + threadIdx.x % kWarp;
        if (first + kOrderBatch * kWarp <= last) {
            int token[kOrderBatch];
#pragma unroll
            for (int k = 0; k < kOrderBatch; ++k) token[k] = tokens[k * kWarp];
#pragma unroll
            for (int k = 0; k < kOrderBatch; ++k) look(token[k], k, own, mask);
            return;
        }
        for (int k = 0; first + k * kWarp < last; ++k)
            if (first + k * kWarp + int(threadIdx.x % kWarp) < last) look(tokens[k * kWarp], k, own, mask);
    }
};

// The threads of the warp that are inside and have the same token: 0 for the others.
__device__ unsigned equal_tokens(int token, bool inside) {
    unsigned equal = 0;
    for (unsigned left = __ballot_sync(kWholeWarp, inside); left != 0;) {
        const int first = __shfl_sync(kWholeWarp, token, __ffs(int(left)) - 1);
        const bool same = inside && token == first;
        const unsigned all = __ballot_sync(kWholeWarp, same);
        if (same) equal = all;
        left &= ~all;
    }
    return equal;
}

struct OrderMemory {
    int2 found[kOrderWarps][kFound];  // the first of a part: position and token, in order
    int sums[2][kOrderWarps];
    int begin[kRange];  // where each token's places begin
    // [kOrderWarps][range], behind it: how many of each token are in each warp's part; then how many in the parts before.
    __device__ int* counts() { return reinterpret_cast<int*>(this + 1); }
    static constexpr int bytes(int range) {
        return int(sizeof(OrderMemory) + sizeof(int) * kOrderWarps * std::size_t(range));
    }
};

// A token is found by its class, so that frequent ones, which often have neighbouring numbers, are spread over the blocks.
__global__ __launch_bounds__(kOrderThreads) void order_kernel(const Order a) {
    dependents_may_start();
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<OrderMemory*>(memory);
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    const int own = blockIdx.x & ((1 << a.bits) - 1), share = blockIdx.x >> a.bits, shares = gridDim.x >> a.bits;
    const Part part(a, warp);
    int* counts = shared.counts() + warp * a.range;
    for (int i = lane; i < a.range; i += kWarp) counts[i] = 0;
    for (int i = blockIdx.x * kOrderThreads + thread; i < a.counters; i += gridDim.x * kOrderThreads) a.arrived[i] = 0;
    __syncwarp();
    // The class's tokens are counted and listed, those of one thread after those of the threads before it.
    int listed = 0, below = 0;
    for (int p0 = part.first; p0 < part.last; p0 += kOrderBatch * kWarp) {
        const Hits own_tokens(a, own, p0, part.last);
        below += own_tokens.below;
        int end = __popc(own_tokens.hits);  // then the sum up to and with the thread's own
#pragma unroll
        for (int o = 1; o < kWarp; o *= 2) {
            const int other = __shfl_up_sync(kWholeWarp, end, o);
            if (lane >= o) end += other;
        }
        int at = listed + end - __popc(own_tokens.hits);
        for (unsigned left = own_tokens.hits; left != 0; left &= left - 1, ++at) {
            const int position = p0 + (__ffs(int(left)) - 1) * kWarp + lane, token = a.tokens[position] >> a.bits;
            if (at < kFound) shared.found[warp][at] = {position, token};
            atomicAdd(&counts[token], 1);
        }
        listed += __shfl_sync(kWholeWarp, end, kWarp - 1);
    }
    below = __reduce_add_sync(kWholeWarp, below);
    __syncthreads();

    // Thread t: of the class's token number t, how many there are, and before each part.
    int total = 0;
    if (thread < a.range) {
#pragma unroll 8
        for (int w = 0; w < kOrderWarps; ++w) {
            int& count = shared.counts()[w * a.range + thread];
            const int n = count;
            count = total;
            total += n;
        }
    }
    int before = total;  // then the sum of totals up to and with the thread's own, in its warp
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
        const int other = __shfl_up_sync(kWholeWarp, before, o);
        if (lane >= o) before += other;
    }
    if (lane == kWarp - 1) shared.sums[0][warp] = before;
    if (lane == 0) shared.sums[1][warp] = below;
    __syncthreads();
    const int first =
        before - total + __reduce_add_sync(kWholeWarp, shared.sums[1][lane] + (lane < warp ? shared.sums[0][lane] : 0));
    if (thread < a.range) shared.begin[thread] = first;
    if (share == 0 && warp * kWarp < a.range) {
        // The run of each thread's token, for the blocks that it reaches into: the first by the thread, the others by all.
        const int end = first + total, reached = ceil_div(first + 1, kPlaces);
        if (reached * kPlaces < end) a.across[reached] = {first, end};
        for (unsigned left = __ballot_sync(kWholeWarp, (reached + 1) * kPlaces < end); left != 0; left &= left - 1) {
            const int from = __ffs(int(left)) - 1;
            const Run run{__shfl_sync(kWholeWarp, first, from), __shfl_sync(kWholeWarp, end, from)};
            for (int b = ceil_div(run.first + 1, kPlaces) + 1 + lane; b * kPlaces < run.end; b += kWarp)
                a.across[b] = run;
        }
    }
    __syncthreads();
    if (warp % shares != share) return;
    const auto place = [&](int position, int token, bool inside) {
        // Those of the same token are before one another as they were; one of them counts for all.
        const unsigned equal = equal_tokens(token, inside);
        if (inside) {
            const int at = shared.begin[token] + counts[token] + __popc(equal & ((1u << lane) - 1));
            a.sorted[at] = token << a.bits | own;
            a.positions[at] = position;
        }
        __syncwarp();
        if (inside && lane == __ffs(int(equal)) - 1) counts[token] += __popc(equal);
        __syncwarp();
    };
    if (listed > kFound) {  // not all are in the list
        for (int p0 = part.first; p0 < part.last; p0 += kWarp) {
            const int token = p0 + lane < part.last ? a.tokens[p0 + lane] : -1;
            const bool inside = token >= 0 && (token & ((1 << a.bits) - 1)) == own;
            if (__any_sync(kWholeWarp, inside)) place(p0 + lane, token >> a.bits, inside);
        }
        return;
    }
    for (int i = 0; i < listed; i += kWarp) {
        const bool inside = i + lane < listed;
        const int2 one = inside ? shared.found[warp][i + lane] : int2{0, 0};
        place(one.x, one.y, inside);
    }
}

struct Scatter {
    float* dtable;
    const nv_bf16* dx;
    const std::int32_t *tokens, *positions;  // sorted
    const Run* across;
    // Pieces of runs that several blocks share, two to a block of places: of the run from the block before, and of that
    // into the next one. arrived: [pieces + blocks of places][blocks of channels].
    int* arrived;
    float* parts;  // [pieces][channels]
    std::int64_t ld_dtable, ld_dx;
    int count, channels;  // tokens, below 2^30: places and a step beyond them fit an int
    int width;            // channels of a block
    __device__ float* row(int token) const { return dtable + token * ld_dtable; }
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
template <int kRows>
__device__ void add_rows(float (&sum)[kPackSize], const Scatter& a, const std::int32_t* positions, int channel,
                         int first, int last, int step) {
    for (int p0 = first; p0 < last; p0 += step * kRows) {
        uint4 rows[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            const int p = p0 + k * step;
            if (p < last) rows[k] = *reinterpret_cast<const uint4*>(a.dx + positions[p] * a.ld_dx + channel);
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
            if (p0 + k * step < last) add_raw(sum, rows[k]);
        }
    }
}

// dtable[row][channel..channel + 8): asked for, and written with the sum added.
struct TableRow {
    float* out;
    Pack<float> value[2];
    __device__ TableRow(const Scatter& a, int row, int channel)
        : out(a.row(row) + channel), value{load16(out), load16(out + 4)} {}
    __device__ void add(const float (&sum)[kPackSize]) {
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) value[e / 4].v[e % 4] += sum[e];
        store16(out, value[0]), store16(out + 4, value[1]);
    }
};

// A block's channels, and the work of all its threads on one row of them: groups of so many threads as the channels need.
struct Team {
    float (&sums)[kThreads * kPackSize];
    int first_channel, channels;

    // add(sum, channel, group, groups) gives a group's share of the sums of eight channels; then take(channel, sum) gets
    // the sum over groups, in order, of one channel. All threads take part.
    template <class Add, class Take>
    __device__ void sum(Add&& add, Take&& take) const {
        for (int c0 = 0; c0 < channels; c0 += kThreads * kPackSize) {
            const int width = min(channels - c0, kThreads * kPackSize), lanes = width / kPackSize;
            const int groups = kThreads / lanes, group = int(threadIdx.x) / lanes;
            const int channel = (int(threadIdx.x) - group * lanes) * kPackSize;
            Pack<float> pair[2];
            if (group < groups) {
                float sum[kPackSize] = {};
                add(sum, first_channel + c0 + channel, group, groups);
#pragma unroll
                for (int e = 0; e < kPackSize; ++e) pair[e / 4].v[e % 4] = sum[e];
            }
            __syncthreads();  // what was there has been read
            if (group < groups) {
                store16(sums + group * width + channel, pair[0]);
                store16(sums + group * width + channel + 4, pair[1]);
            }
            __syncthreads();
            for (int c = threadIdx.x; c < width; c += kThreads) {
                float total = 0;
                for (int g = 0; g < groups; ++g) total += sums[g * width + c];
                take(first_channel + c0 + c, total);
            }
        }
    }
    // dtable[row]: where sums are added to, and a word that it is asked for early.
    __device__ void ask_for(const Scatter& a, int row) const {
        constexpr int kLine = 32;
        for (int c = threadIdx.x * kLine; c < channels; c += kThreads * kLine)
            asm volatile("prefetch.global.L2 [%0];\n" ::"l"(a.row(row) + first_channel + c));
    }
    // Places first .. last - 1; take as in sum().
    template <class Take>
    __device__ void sum_places(const Scatter& a, int first, int last, Take&& take) const {
        sum([&](float(&sum)[kPackSize], int channel, int group,
                int groups) { add_rows<kLongBatch>(sum, a, a.positions, channel, first + group, last, groups); },
            take);
    }
    // The pieces piece(0) .. piece(count - 1); take as in sum().
    template <class Piece, class Take>
    __device__ void sum_pieces(const Scatter& a, int count, Piece&& piece, Take&& take) const {
        sum(
            [&](float(&sum)[kPackSize], int channel, int group, int groups) {
#pragma unroll 4
                for (int k = group; k < count; k += groups) {
                    const float* p = a.parts + std::int64_t(piece(k)) * a.channels + channel;
                    const float4 v = __ldcg(reinterpret_cast<const float4*>(p)),
                                 u = __ldcg(reinterpret_cast<const float4*>(p) + 1);
                    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
                    sum[4] += u.x, sum[5] += u.y, sum[6] += u.z, sum[7] += u.w;
                }
            },
            take);
    }
};

// Whether the block is the last of `count` that come here: the same answer in every thread. What those before have written
// is then seen.
__device__ bool is_last(int* arrived, int count) {
    __shared__ int done;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) done = atomicAdd(arrived, 1);
    __syncthreads();
    __threadfence();
    return done == count - 1;
}

// The block has left its piece of a run in memory; row: of the table. All threads take part.
__device__ void finish_piece(const Scatter& a, const Team& team, const Run& run, int row) {
    const int begins = run.first_block(), ends = run.last_block();
    const auto piece = [&](int block) { return 2 * block + (block == begins); };
    const auto add_to_table = [&](int channel, float sum) { a.row(row)[channel] += sum; };
    const auto counter = [&](int k) { return a.arrived + std::int64_t(k) * gridDim.y + blockIdx.y; };
    const int fan = int(blockIdx.x) / kFan, lowest = begins / kFan, fans = ends / kFan - lowest + 1;
    const auto first_of = [&](int f) { return max(begins, f * kFan); };
    const int first = first_of(fan), count = min(ends, fan * kFan + kFan - 1) - first + 1;
    if (!is_last(counter(piece(first)), count)) return;
    const auto neighbour = [&](int k) { return piece(first + k); };
    if (fans == 1) {
        team.sum_pieces(a, count, neighbour, add_to_table);
        return;
    }
    float* part = a.parts + std::int64_t(piece(first)) * a.channels;
    team.sum_pieces(a, count, neighbour, [&](int channel, float sum) { part[channel] = sum; });
    if (!is_last(counter(2 * int(gridDim.x) + begins), fans)) return;
    team.sum_pieces(
        a, fans, [&](int k) { return piece(first_of(lowest + k)); }, add_to_table);
}

__global__ __launch_bounds__(kThreads, 4) void scatter_kernel(const Scatter a) {
    static_assert(kPlaces % kWarp == 0 && kPlaces + 2 <= kThreads && kMost >= kPlaces);
    __shared__ std::int32_t window[kPlaces + 2];  // window[1 + p]: the token of the block's place p; -1 outside
    __shared__ std::int32_t positions[kPlaces + kShort - 1];  // of the block's places, and of a short run's beyond them
    __shared__ Run ends[2];                          // the runs that reach into the block and out of it, if there are
    __shared__ unsigned starts[kPlaces / kWarp];     // where runs begin
    __shared__ unsigned long_runs[kPlaces / kWarp];  // those of more than kShort tokens
    __shared__ short run_at[kPlaces + 1];            // the places where they do, in order
    __shared__ __align__(16) float sums[kThreads * kPackSize];
    const int thread = threadIdx.x, lane = thread % kLanes, group = thread / kLanes;
    const int first_channel = blockIdx.y * a.width, channels = min(a.width, a.channels - first_channel);
    wait_for_previous();  // for the order
    const int base = blockIdx.x * kPlaces, end = min(kPlaces, a.count - base);
    if (thread < kPlaces + 2) {
        const int p = base - 1 + thread;
        window[thread] = p >= 0 && p < a.count ? a.tokens[p] : -1;
    }
    if (thread < kPlaces + kShort - 1) positions[thread] = base + thread < a.count ? a.positions[base + thread] : 0;
    if (thread >= kThreads - 2) {
        const int side = thread - (kThreads - 2), block = blockIdx.x + side;
        if (block < gridDim.x) ends[side] = a.across[block];
    }
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
    const bool comes_in = window[0] == window[1], goes_on = window[end] == window[end + 1];
    const auto run_of = [&](int r) {
        return r == runs - 1 && goes_on ? ends[1] : Run{base + run_at[r], base + run_at[r + 1]};
    };
    if (thread < kPlaces) {
        const bool is_long = thread < runs && run_of(thread).length() > kShort;
        const unsigned longs = __ballot_sync(kWholeWarp, is_long);
        if (thread % kWarp == 0) long_runs[thread / kWarp] = longs;
    }
    const int slices = ceil_div(channels, kBlockChannels);
    for (int i = group; i < runs * slices; i += kGroups) {
        const int r = i / slices, channel = (i - r * slices) * kBlockChannels + lane * kPackSize;
        const Run run = run_of(r);
        if (run.length() > kShort || channel >= channels) continue;
        const int first = run.first - base;
        TableRow row(a, window[1 + first], first_channel + channel);
        float sum[kPackSize] = {};
        add_rows<kBatch>(sum, a, positions, first_channel + channel, first, run.end - base, 1);
        row.add(sum);
    }
    __syncthreads();
    const Team team{sums, first_channel, channels};
    // Pieces of runs that other blocks share: 0, of the one that reaches into the block; 1, of one that begins in it.
    const auto has_piece = [&](int side) {
        if (!(side == 0 ? comes_in : goes_on) || ends[side].length() <= kMost) return false;
        return side == 0 || ends[1].first >= base;
    };
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        if (!has_piece(side)) continue;
        float* part = a.parts + (2 * std::int64_t(blockIdx.x) + side) * a.channels;
        team.sum_places(a, max(ends[side].first, base), min(ends[side].end, base + kPlaces),
                        [&](int channel, float sum) { part[channel] = sum; });
    }
#pragma unroll 1
    for (int side = 0; side < 2; ++side)
        if (has_piece(side)) finish_piece(a, team, ends[side], window[side == 0 ? 1 : end]);
#pragma unroll 1
    for (int w = 0; w < kPlaces / kWarp; ++w)
        for (unsigned left = long_runs[w]; left != 0; left &= left - 1) {
            const Run run = run_of(w * kWarp + __ffs(int(left)) - 1);
            if (run.length() > kMost) continue;
            const int row = window[1 + run.first - base];
            team.ask_for(a, row);
            team.sum_places(a, run.first, run.end, [&](int channel, float sum) { a.row(row)[channel] += sum; });
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
        parts = arrived + embedding_aligned(3 * blocks * slices * 4);
        end = parts + embedding_aligned(blocks * 2 * channels * 4);
    }
};

// Bits of a token's class.
int class_bits(int vocab) {
    int bits = 0;
    while (1 << bits < kOrderBlocks && 1 << bits < vocab) ++bits;
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
    Order order{};
    order.sorted = sorted, order.positions = positions, order.across = across, order.arrived = part(parts.arrived);
    order.tokens = p.tokens.data;
    order.count = n, order.counters = int(3 * parts.blocks * parts.slices);
    order.bits = class_bits(vocab), order.range = ceil_div(vocab, 1 << order.bits);
    const int shares = std::clamp(kOrderBlocks >> order.bits, 1, kOrderWarps);
    allow_shared<OrderMemory::bytes(kRange)>(order_kernel);
    order_kernel<<<unsigned(shares << order.bits), kOrderThreads, OrderMemory::bytes(order.range), stream_of(dev)>>>(
        order);
    LAUNCH_CHECK("embedding_order");
    // Blocks for about one wave of them on an H200. Fixed, so that the order of the sums is fixed too.
    const std::int64_t most = std::clamp(kScatterBlocks / parts.blocks, std::int64_t(1), parts.slices);
    const std::int64_t width = ceil_div(parts.slices, most) * kBlockChannels;
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
                       int(p.dx.cols),
                       int(width)};
    const dim3 grid(unsigned(parts.blocks), unsigned(ceil_div(p.dx.cols, width)));
    launch_dependent(dev, scatter_kernel, grid, kThreads, 0, args);
    LAUNCH_CHECK("embedding_backward");
}

}  // namespace fiedler
