// kernels/embedding.cu: token embedding (see embedding.h); embedding_order.cu puts the tokens in order.
//
// Backward adds rows: a run of equal tokens in that order is one row of the table. A block looks after so many places
// of the order, and a short run is that block's in which it begins. The block's places are split evenly over its warps,
// however the runs lie, and each warp always has kRows rows on their way. Of a short sequence all blocks run at once on
// an H200. What a warp has of a run that began before its places it leaves in shared memory, for the warp in which the
// run begins. A long run goes on from block to block: each leaves its part in memory, and the block in which the run
// ends takes them all; of kFan neighbours the last one has added theirs up before. A block waits for blocks before it
// alone, which have begun before it does: CUDA does not promise that, but all devices keep to it.
//
// So a row of the table is added to once, by one warp, and who adds up what, and in which order, follows from the order
// of the tokens alone.
#include <cstddef>

#include "kernels/common.cuh"
#include "kernels/embedding_order.cuh"

namespace fiedler {
namespace embedding {
namespace {

constexpr int kPackSize = Pack<nv_bf16>::size;
constexpr int kGatherLanes = 16, kGatherRows = 16, kGatherPacks = 4;

constexpr int kWarps = 12, kThreads = kWarps * kWarp;  // of a block
constexpr int kAtOnce = 2;                             // blocks of a multiprocessor of sm_90: kEmbeddingBlocks
constexpr int kRows = 6;                               // of a warp, that are on their way
constexpr int kShort = 24;                             // tokens of a run that one block sums wherever it lies
constexpr int kWindow = kMostPlaces + kShort - 1;      // places that a block takes at most
constexpr int kLaneChannels = 4, kPiece = kWarp * kLaneChannels;  // a lane has four channels of each piece of a row
constexpr int kPieces = 3, kWidth = kPieces * kPiece;             // of a block at most
constexpr int kFan = 32;                                          // blocks whose parts of a run are added up first
constexpr int kPartsAtOnce = 2;                                   // that a warp asks for
static_assert(kShort <= kLeastPlaces && kWindow <= kWarps * kWarp);

struct Gather {
    nv_bf16* x;
    const nv_bf16* table;
    const std::int32_t* tokens;
    std::int64_t count, ld_x, ld_table;
    int packs;
};

__global__ __launch_bounds__(kGatherLanes* kGatherRows) void gather_kernel(Gather a) {
    const std::int64_t i = std::int64_t(blockIdx.x) * kGatherRows + threadIdx.y;
    if (i >= a.count) return;
    const nv_bf16* from = a.table + std::int64_t(a.tokens[i]) * a.ld_table;
    nv_bf16* to = a.x + i * a.ld_x;
    for (int first = threadIdx.x; first < a.packs; first += kGatherLanes * kGatherPacks) {
        Pack<nv_bf16> value[kGatherPacks];
#pragma unroll
        for (int k = 0; k < kGatherPacks; ++k)
            if (first + k * kGatherLanes < a.packs) value[k] = load16(from + (first + k * kGatherLanes) * kPackSize);
#pragma unroll
        for (int k = 0; k < kGatherPacks; ++k)
            if (first + k * kGatherLanes < a.packs) store16(to + (first + k * kGatherLanes) * kPackSize, value[k]);
    }
}

struct Scatter {
    float* dtable;
    const nv_bf16* dx;
    const std::int32_t *tokens, *positions;  // in order
    const Run* across;
    float* parts;  // [blocks of places][channels]: what a block has of a long run that goes on into the next one
    std::int64_t ld_dtable, ld_dx;
    int count, places;    // count: below 2^30: places and a step beyond them fit an int; places: of a block
    int channels, width;  // width: of a block
    __device__ int first_channel() const { return blockIdx.y * width; }
    __device__ int block_channels() const { return min(width, channels - first_channel()); }
    __device__ float* part_of(int block) const { return parts + std::int64_t(block) * channels + first_channel(); }
};

// A lane's channels of a row, or of a sum of rows.
struct Sum {
    float4 v[kPieces];
    __device__ void clear() {
#pragma unroll
        for (float4& x : v) x = {0, 0, 0, 0};
    }
    __device__ void add(int piece, const float4& x) {
        float4& y = v[piece];
        y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
    }
    __device__ void add(int piece, const uint2& x) {  // four bf16
        add(piece, float4{__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16),
                          __uint_as_float(x.y & 0xffff0000u)});
    }
};

// act(piece, channel) for the lane's pieces that the block has; channel: the first of four, of the block's.
template <class Act>
__device__ void for_pieces(int channels, Act&& act) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
        const int channel = piece * kPiece + int(threadIdx.x) * kLaneChannels;
        if (channel < channels) act(piece, channel);
    }
}

// *to += x, of which there is one for each address in a launch: then an addition in memory, which nobody waits for,
// gives what loading and storing would, but that it takes numbers below 2^-126 for 0.
__device__ void add_in_memory(float* to, const float4& x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
#else  // one float at a time, which is slower than this
    float4 y = *reinterpret_cast<const float4*>(to);
    y.x += x.x, y.y += x.y, y.z += x.z, y.w += x.w;
    *reinterpret_cast<float4*>(to) = y;
#endif
}
__device__ void add_to_row(const Scatter& a, int row, const Sum& sum) {
    float* to = a.dtable + row * a.ld_dtable + a.first_channel();
    for_pieces(a.block_channels(), [&](int piece, int channel) { add_in_memory(to + channel, sum.v[piece]); });
}

// ---- parts of long runs ---------------------------------------------------------------------------------------------
// A part says itself whether it is there: as long as it is not, its bits are kNothing, which who takes it puts back.

__device__ void leave(float* part, const float4& x) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(part), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
}
__device__ float4 ask(const float* part) {
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(part)
                 : "memory");
    return x;
}
__device__ void leave_part(const Scatter& a, int block, const Sum& sum) {
    float* part = a.part_of(block);
    for_pieces(a.block_channels(), [&](int piece, int channel) { leave(part + channel, sum.v[piece]); });
}
__device__ bool is_there(const float4& x) {
    const auto is = [](float one) { return __float_as_uint(one) != kNothing; };
    return is(x.x) && is(x.y) && is(x.z) && is(x.w);
}

// sum += the parts of blocks of(k), k = first, first + step, ... below count, in that order.
template <class Of>
__device__ void take_parts(Sum& sum, const Scatter& a, int first, int step, int count, const Of& of) {
    const int channels = a.block_channels();
    const float nothing = __uint_as_float(kNothing);
#pragma unroll 1
    for (int k0 = first; k0 < count; k0 += step * kPartsAtOnce) {
        const auto for_parts = [&](auto&& act) {
#pragma unroll
            for (int k = 0; k < kPartsAtOnce; ++k)
                if (k0 + k * step < count) act(k, a.part_of(of(k0 + k * step)));
        };
        float4 x[kPartsAtOnce][kPieces];
        for (bool all = false; !all;) {
            all = true;
            for_parts([&](int k, float* part) {
                for_pieces(channels, [&](int piece, int channel) { x[k][piece] = ask(part + channel); });
            });
            for_parts([&](int k, float*) {
                for_pieces(channels, [&](int piece, int) { all = all && is_there(x[k][piece]); });
            });
        }
        for_parts([&](int k, float* part) {
            for_pieces(channels, [&](int piece, int channel) {
                sum.add(piece, x[k][piece]);
                leave(part + channel, float4{nothing, nothing, nothing, nothing});
            });
        });
    }
}

// The blocks whose parts a block takes of the long run that comes into it, (0) .. (count - 1): where the run ends, the
// last of each whole fan and then the neighbours; at the end of a fan the neighbours; else none.
struct Taken {
    int fans = 0, lowest = 0, first = 0, count = 0;
    bool is_end;
    __device__ Taken(int block, int places, const Run& run) {
        const int begins = run.first / places, fan = block / kFan;
        is_end = block == (run.end - 1) / places;
        if (!is_end && block % kFan != kFan - 1) return;
        lowest = begins / kFan, fans = is_end ? fan - lowest : 0;
        first = max(begins, fan * kFan), count = fans + block - first;
    }
    __device__ int operator()(int k) const { return k < fans ? (lowest + k) * kFan + kFan - 1 : first + k - fans; }
};

// ---- a block --------------------------------------------------------------------------------------------------------

// What it knows of its places, and of a short run's beyond them.
struct Known {
    std::int32_t tokens[kWindow + 2];  // tokens[1 + p]: of place p; -1 outside
    std::int32_t positions[kWindow];
    Run ends[2];          // the runs that reach into the block and out of it, if there are
    bool closes[kWarps];  // the run that comes into a warp's places ends there
    alignas(16) float heads[kWarps][kWidth], parts[kWarps][kWidth];

    // Each thread asks for one word of all that.
    __device__ void load(const Scatter& a) {
        static_assert(offsetof(Known, ends) == sizeof(std::int32_t) * (2 * kWindow + 2));
        constexpr int kTokens = kWindow + 2, kRuns = kTokens + kWindow, kWords = kRuns + 4;
        const auto* across = reinterpret_cast<const std::int32_t*>(a.across);
        const int block = blockIdx.x, base = block * a.places;
#pragma unroll 1
        for (int i = threadIdx.y * kWarp + threadIdx.x; i < kWords; i += kThreads) {
            const bool is_token = i < kTokens, is_run = i >= kRuns;
            const std::int32_t* from = is_token ? a.tokens : is_run ? across : a.positions;
            const int at = is_token ? base + i - 1 : is_run ? 2 * block + i - kRuns : base + i - kTokens;
            reinterpret_cast<std::int32_t*>(this)[i] =
                at >= 0 && at < (is_run ? 2 * int(gridDim.x) : a.count) ? from[at] : -1;
        }
    }
};

struct Block {
    const Scatter& a;
    Known& known;
    int warp, lane, channels, block;
    int first, last;  // the block's places, those of short runs as a whole: first .. last - 1
    int each;         // of a warp, but for the last ones
    int from, count;  // the warp's places: from, ..
    bool long_in;     // a long run comes into the block

    __device__ Block(const Scatter& args, Known& k) : a(args), known(k), warp(threadIdx.y), lane(threadIdx.x) {
        channels = a.block_channels(), block = blockIdx.x;
        const int base = block * a.places, own = min(a.places, a.count - base);
        const bool comes_in = known.tokens[0] == known.tokens[1], goes_out = known.tokens[own] == known.tokens[own + 1];
        long_in = comes_in && known.ends[0].length() > kShort;
        first = comes_in && !long_in ? known.ends[0].end - base : 0;
        last = goes_out && known.ends[1].length() <= kShort ? known.ends[1].end - base : own;
        each = ceil_div(last - first, kWarps);
        from = min(first + warp * each, last), count = min(each, last - from);
    }
    // What warp w has of a run from before its places; and its sum of parts.
    __device__ float4* left(int w, int channel) const { return reinterpret_cast<float4*>(&known.heads[w][channel]); }
    __device__ float4* left_of_parts(int w, int channel) const {
        return reinterpret_cast<float4*>(&known.parts[w][channel]);
    }

    __device__ void ask_for_row(uint2 (&x)[kPieces], int k) const {
        const nv_bf16* row = a.dx + known.positions[from + k] * a.ld_dx + a.first_channel();
        for_pieces(channels,
                   [&](int piece, int channel) { x[piece] = *reinterpret_cast<const uint2*>(row + channel); });
    }

    // Where rows of the table are waited for (add_in_memory), they come while rows of dx do.
    __device__ void ask_for_table() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
        constexpr int kLine = 32;
        const int place = 1 + from + lane, token = lane < count ? known.tokens[place] : 0;
        if (lane >= count || token == known.tokens[place + 1]) return;
        const float* row = a.dtable + token * a.ld_dtable + a.first_channel();
        for (int c = 0; c < channels; c += kLine) asm volatile("prefetch.global.L2 [%0];\n" ::"l"(row + c));
#endif
    }

    // Adds up the warp's rows, run by run. Returns whether a run that begins here goes on: sum is then what there is of
    // it.
    __device__ bool sum_rows(Sum& sum) const {
        uint2 rows[kRows][kPieces];
#pragma unroll
        for (int k = 0; k < kRows; ++k)
            if (k < count) ask_for_row(rows[k], k);
        ask_for_table();
        bool open = count > 0 && (warp == 0 ? long_in : known.tokens[from] == known.tokens[from + 1]);  // began before
        bool ended = true, closes = false;
        sum.clear();
#pragma unroll 1
        for (int k0 = 0; k0 < count; k0 += kRows) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
                const int k = k0 + i;
                if (k >= count) break;
                for_pieces(channels, [&](int piece, int) { sum.add(piece, rows[i][piece]); });
                if (k + kRows < count) ask_for_row(rows[i], k + kRows);
                const int token = known.tokens[1 + from + k];
                ended = token != known.tokens[2 + from + k];  // of a long run out of the block there is no end
                if (!ended) continue;
                if (open)
                    for_pieces(channels, [&](int piece, int channel) { *left(warp, channel) = sum.v[piece]; });
                else
                    add_to_row(a, token, sum);
                open = false, closes = true;
                sum.clear();
            }
        }
        if (lane == 0) known.closes[warp] = closes;
        if (!ended && open) for_pieces(channels, [&](int piece, int channel) { *left(warp, channel) = sum.v[piece]; });
        return !ended && !open;
    }

    // sum += what the warps from w on have of a run that comes into w's places. Whether it ends among them.
    __device__ bool collect(Sum& sum, int w) const {
#pragma unroll 1
        for (int place = first + w * each; w < kWarps && place < last; ++w, place += each) {
            for_pieces(channels, [&](int piece, int channel) { sum.add(piece, *left(w, channel)); });
            if (known.closes[w]) return true;
        }
        return false;
    }

    // The long run that comes into the block, by all threads.
    __device__ void finish_run() const {
        const Taken taken(block, a.places, known.ends[0]);
        const int takers = taken.count > kPartsAtOnce ? kWarps : min(taken.count, 1);  // warps
        Sum sum;
        if (warp < takers) {
            sum.clear();
            take_parts(sum, a, warp, takers, taken.count, taken);
            for_pieces(channels, [&](int piece, int channel) { *left_of_parts(warp, channel) = sum.v[piece]; });
        }
        if (takers > 1) __syncthreads();
        if (warp > 0) return;
        sum.clear();
        (void)collect(sum, 0);
#pragma unroll 1
        for (int w = 0; w < takers; ++w)
            for_pieces(channels, [&](int piece, int channel) { sum.add(piece, *left_of_parts(w, channel)); });
        if (taken.is_end)
            add_to_row(a, known.tokens[1], sum);
        else
            leave_part(a, block, sum);
    }
};

__global__ __launch_bounds__(kThreads, kAtOnce) void scatter_kernel(const __grid_constant__ Scatter a) {
    __shared__ __align__(16) Known known;
    known.load(a);
    __syncthreads();
    const Block block(a, known);
    Sum sum;
    const bool goes_on = block.sum_rows(sum);
    __syncthreads();
    if (goes_on) {
        const int row = known.tokens[block.from + block.count];
        if (block.collect(sum, block.warp + 1))
            add_to_row(a, row, sum);
        else
            leave_part(a, block.block, sum);
    }
    if (block.long_in) block.finish_run();
}

}  // namespace
}  // namespace embedding

void embedding_forward(const Cuda& dev, const EmbeddingForward<bf16>& p) {
    using namespace embedding;
    check(p);
    FIEDLER_REQUIRE("embedding", p.x.cols % kPackSize == 0 && is_aligned16(p.x) && is_aligned16(p.table));
    if (p.x.rows == 0) return;
    const Gather args{nv(p.x.data), nv(p.table.data),         p.tokens.data, p.x.rows, p.x.ld,
                      p.table.ld,   int(p.x.cols / kPackSize)};
    gather_kernel<<<unsigned(ceil_div(p.x.rows, std::int64_t(kGatherRows))), dim3(kGatherLanes, kGatherRows), 0,
                    stream_of(dev)>>>(args);
    LAUNCH_CHECK("embedding_forward");
}

void embedding_backward(const Cuda& dev, const EmbeddingBackward<bf16>& p) {
    using namespace embedding;
    check(p);
    check(EmbeddingOrder{p.tokens, p.dtable.rows, p.dx.cols, p.scratch});
    FIEDLER_REQUIRE("embedding", p.dx.cols % kPackSize == 0 && is_aligned16(p.dx) && is_aligned16(p.dtable));
    FIEDLER_REQUIRE("embedding", p.dx.rows < (std::int64_t(1) << 30) && p.dtable.rows < (std::int64_t(1) << 30));
    if (p.dx.rows == 0 || p.dx.cols == 0) return;
    const Parts parts(p.scratch.data, p.dx.rows, p.dx.cols);
    Scatter a{};
    a.dtable = p.dtable.data, a.dx = nv(p.dx.data), a.ld_dtable = p.dtable.ld, a.ld_dx = p.dx.ld;
    a.tokens = parts.sorted, a.positions = parts.positions, a.across = parts.across, a.parts = parts.sums;
    a.count = int(p.dx.rows), a.places = int(parts.places), a.channels = int(p.dx.cols);
    // Blocks of all channels, or of shares of them that are about the same.
    const int columns = ceil_div(a.channels, kWidth);
    a.width = ceil_div(ceil_div(a.channels, columns), kPackSize) * kPackSize;
    scatter_kernel<<<dim3(unsigned(parts.blocks), unsigned(columns)), dim3(kWarp, kWarps), 0, stream_of(dev)>>>(a);
    LAUNCH_CHECK("embedding_backward");
}

}  // namespace fiedler
