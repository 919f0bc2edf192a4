// kernels/gate_long.cuh: the forget gate of long sequences, cut into chunks of one block each (see gate.cu). A block
// keeps its chunk in shared memory, says what it adds up to, and adds up what the blocks before it said: then it knows
// what is carried into it. So everything is read once. Blocks start in their order, which CUDA does not promise but all
// devices keep to: those that one waits for are at work or over.
//
// A block has all heads, or a part of them, so that each 32-byte sector comes to one multiprocessor. In memory's
// order a thread has one pair of heads at every 64th token. In shared memory each head has a plane: there one warp
// adds up along it, kRunTokens to a lane. So little goes from lane to lane, and nothing from warp to warp.
#pragma once
#include "kernels/dependent_launch.cuh"
#include "kernels/dynamic_shared.cuh"
#include "kernels/gate_args.cuh"

namespace fiedler {
namespace gate_long {

using namespace gate_scan;

constexpr int kChunkTokens = int(kGateChunk), kRunTokens = 8, kTileTokens = kWarp * kRunTokens;
constexpr int kStepTokens = 2 * kWarp, kSteps = kTileTokens / kStepTokens;  // a pair has two warps
constexpr int kMostPairs = 4, kMostThreads = kMostPairs * kStepTokens;      // of heads: their rows are whole sectors
constexpr int kBlocks = 3;                                                  // that fit on a multiprocessor
// Of a head; with a gap, so that most threads of different pairs find different banks.
constexpr int kPlane = kChunkTokens + 12;
constexpr int kAtOnce = 8;  // chunks that a lane asks
constexpr int kForgetThreads = 256;
static_assert(kChunkTokens % kTileTokens == 0 && kRunTokens == 8);

// What a block works on, and a thread of it: steps first .. stop - 1 of a sequence whose tokens are begin .. end - 1.
struct Chunk {
    int s, c, begin, end, first, stop;
    int base;   // the block's first head; a warp's is as many further on as it has warps before it
    int h;      // the thread's pair: h and, if `both`, h + 1
    int token;  // its first step of a tile
    bool both;
    __device__ Chunk(const Packed& seq, int chunks, int heads) {
        const int pairs = int(blockDim.x) / kStepTokens;
        s = int(blockIdx.x) / chunks, c = int(blockIdx.x) - s * chunks;
        begin = seq.sequence_begin(s), end = seq.sequence_end(s);
        first = c * kChunkTokens, stop = min(first + kChunkTokens, end - begin);
        base = int(blockIdx.y) * pairs * kHeads;
        token = int(threadIdx.x) / pairs;
        h = base + (int(threadIdx.x) - token * pairs) * kHeads;
        both = h + 1 < heads;
    }
    __device__ int head_of_warp() const { return base + int(threadIdx.x) / kWarp; }
    __device__ int tiles() const { return (stop - first + kTileTokens - 1) / kTileTokens; }
};
using Steps = float[kSteps][kHeads];

// from: at the thread's step `step` of the tile; ld: to the next step. Zeros where there is none.
template <bool kPairs>
__device__ void load_steps(Steps& v, const Place<kPairs>& place, const float* from, std::int64_t ld, int step,
                           int stop) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k, from += kStepTokens * ld) {
        v[k][0] = v[k][1] = 0.f;
        if (step + k * kStepTokens < stop) place.load(v[k], from);
    }
}
__device__ inline void move(Steps& to, const Steps& from) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) to[k][0] = from[k][0], to[k][1] = from[k][1];
}

// The sum over the block of the threads' numbers of the warp's head. shared: two for each thread.
__device__ inline double sum_of_head(float2* shared, const float (&mine)[kHeads]) {
    const int heads = int(blockDim.x) / kWarp, head = int(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    shared[threadIdx.x] = {mine[0], mine[1]};
    __syncthreads();
    const float* const of_head = &shared->x + head;
    double total = double(of_head[lane * heads]) + double(of_head[(lane + kWarp) * heads]);
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) total += __shfl_xor_sync(kWholeWarp, total, o);
    return total;
}

// Where four neighbouring tokens of a tile are in its plane: lanes that read their runs find different banks.
__device__ inline int place_of(int quad) { return quad ^ (quad / 8 & 1); }

// Cumulative sums along a warp's tile, in place, with what is carried into the tile, and then out of it.
__device__ inline void sum_tile(float* tile, Carried& carried) {
    const int lane = threadIdx.x % kWarp;
    auto* const quads = reinterpret_cast<float4*>(tile);
    float4 &low = quads[place_of(2 * lane)], &high = quads[place_of(2 * lane + 1)];
    const float4 u = low, v = high;
    float x[kRunTokens] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 1; k < kRunTokens; ++k) x[k] += x[k - 1];
    float sum[1] = {x[kRunTokens - 1]};
    warp_inclusive_scan(sum);
    const float before = __shfl_up_sync(kWholeWarp, sum[0], 1);
    const Carried into{carried.high, carried.low + (lane > 0 ? before : 0.f)};
    low = {into.plus(x[0]), into.plus(x[1]), into.plus(x[2]), into.plus(x[3])};
    high = {into.plus(x[4]), into.plus(x[5]), into.plus(x[6]), into.plus(x[7])};
    carried.add(__shfl_sync(kWholeWarp, sum[0], kWarp - 1));
}
// Where the steps of a thread are in its two planes.
struct Places {
    float* first;
    __device__ Places(float* planes, const Chunk& p)
        : first(planes + (p.h - p.base) * kPlane + 4 * place_of(p.token / 4) + p.token % 4) {
        static_assert(kStepTokens % 64 == 0, "place_of");
    }
    __device__ float& at(int tile, int k, int h) const {
        return first[h * kPlane + tile * kTileTokens + k * kStepTokens];
    }
};

// ---- what chunks say to each other ---------------------------------------------------------------------------------

constexpr unsigned long long kNothing = ~0ull;  // has been said yet: a NaN that is never said

__device__ inline void say(unsigned long long* to, double x) {
    const auto bits = static_cast<unsigned long long>(isnan(x) ? 0x7ff8000000000000ll : __double_as_longlong(x));
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;\n" ::"l"(to), "l"(bits) : "memory");
}
__device__ inline unsigned long long heard(const unsigned long long* from) {
    unsigned long long bits;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];\n" : "=l"(bits) : "l"(from) : "memory");
    return bits;
}
// What the first c chunks of a head have said, added up in a fixed order.
__device__ inline double sum_before(const unsigned long long* of_head, int c) {
    double sum = 0;
    for (int i = threadIdx.x % kWarp; i < c; i += kAtOnce * kWarp) {
        unsigned long long bits[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) bits[k] = i + k * kWarp < c ? heard(of_head + i + k * kWarp) : 0;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
            while (bits[k] == kNothing) bits[k] = heard(of_head + i + k * kWarp);
            sum += __longlong_as_double(static_cast<long long>(bits[k]));
        }
    }
    __syncwarp();
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, o);
    return sum;
}
// Says what the warp's head adds up to, and finds what is carried into the chunk. initial: what the sequence begins
// with.
__device__ inline Carried exchange(const Said& said, const Chunk& p, double total, double initial) {
    unsigned long long* const of_head = said.of_head(p.s, p.head_of_warp());
    if (threadIdx.x % kWarp == 0) say(of_head + p.c, p.c == 0 ? initial + total : total);
    const double before = p.c == 0 ? initial : sum_before(of_head, p.c);
    const auto high = float(before);
    return {high, isfinite(high) ? float(before - double(high)) : 0.f};
}
static __global__ void forget_kernel(unsigned long long* said, std::int64_t n) {
    dependents_may_start();
    const std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) said[i] = kNothing;
}

// ---- the passes ----------------------------------------------------------------------------------------------------

// The planes of the warp's head become cumulative sums, once it is known what comes before them.
__device__ inline void sum_planes(float* planes, const Chunk& p, Carried carried) {
    float* const plane = planes + int(threadIdx.x) / kWarp * kPlane;
#pragma unroll 1
    for (int t = 0; t < p.tiles(); ++t) sum_tile(plane + t * kTileTokens, carried);
}

template <bool kPairs>
__global__ __launch_bounds__(kMostThreads, kBlocks) void forward_kernel(ForwardArgs a, Said said) {
    extern __shared__ __align__(16) float planes[];  // [heads of the block][kPlane]
    __shared__ float2 sums[kMostThreads];
    const Chunk p(a.seq, said.chunks, a.heads);
    const Place<kPairs> place{p.both};
    const Places places(planes, p);
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    const int step = p.first + p.token;
    const float* z = a.z + std::int64_t(p.begin + step) * a.ld_z + p.h;
    Steps v, next;
    load_steps(v, place, z, a.ld_z, step, p.stop);  // older than what has been said
    float sum[kHeads] = {};
    for (int t = 0; t < p.tiles(); ++t, move(v, next)) {
        z += kTileTokens * a.ld_z;
        load_steps(next, place, z, a.ld_z, step + (t + 1) * kTileTokens, p.stop);
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float f = log_sigmoid(v[k][h] + bias[h]);
                places.at(t, k, h) = step + t * kTileTokens + k * kStepTokens < p.stop ? f : 0.f;
                sum[h] += places.at(t, k, h);
            }
    }
    const double total = sum_of_head(sums, sum);
    const int head = p.head_of_warp();
    wait_for_previous();
    if (head < a.heads) {
        const double initial =
            a.carry && p.c == 0 ? a.carry[head] : 0.f;  // the last chunk, which writes it, waits for this one
        sum_planes(planes, p, exchange(said, p, total, initial));
    }
    __syncthreads();
    dependents_may_start();
    float* F = a.F + std::int64_t(p.begin + step) * a.ld_F + p.h;
    for (int t = 0; t < p.tiles(); ++t)
#pragma unroll
        for (int k = 0; k < kSteps; ++k, F += kStepTokens * a.ld_F) {
            const int own = step + t * kTileTokens + k * kStepTokens;
            const float out[kHeads] = {places.at(t, k, 0), places.at(t, k, 1)};
            if (own < p.stop) place.store(F, out);
            if (a.carry && p.begin + own == p.end - 1) Place<false>{p.both}.store(a.carry + p.h, out);
        }
}

// Steps count from the last token to the front.
template <bool kPairs>
__global__ __launch_bounds__(kMostThreads, kBlocks) void backward_kernel(BackwardArgs a, Said said) {
    extern __shared__ __align__(16) float planes[];
    __shared__ float2 sums[kMostThreads];
    const Chunk p(a.seq, said.chunks, a.heads);
    const Place<kPairs> place{p.both};
    const Places places(planes, p);
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    const int step = p.first + p.token, head = p.head_of_warp();
    const std::int64_t row = p.end - 1 - step;
    const float *dF = a.dF + row * a.ld_dF + p.h, *z = a.z + row * a.ld_z + p.h;
    Steps v, next;
    load_steps(v, place, dF, -a.ld_dF, step, p.stop);
    float sum[kHeads] = {}, dbias[kHeads] = {};
    for (int t = 0; t < p.tiles(); ++t, move(v, next)) {
        dF -= kTileTokens * a.ld_dF;
        load_steps(next, place, dF, -a.ld_dF, step + (t + 1) * kTileTokens, p.stop);
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) places.at(t, k, h) = v[k][h], sum[h] += v[k][h];
    }
    const double total = sum_of_head(sums, sum);
    load_steps(v, place, z, -a.ld_z, step, p.stop);  // of z from here on
    wait_for_previous();
    if (head < a.heads) sum_planes(planes, p, exchange(said, p, total, 0.0));
    __syncthreads();
    dependents_may_start();
    nv_bf16* dz = a.dz + row * a.ld_dz + p.h;
    for (int t = 0; t < p.tiles(); ++t, move(v, next)) {
        z -= kTileTokens * a.ld_z;
        load_steps(next, place, z, -a.ld_z, step + (t + 1) * kTileTokens, p.stop);
#pragma unroll
        for (int k = 0; k < kSteps; ++k, dz -= kStepTokens * a.ld_dz) {
            float out[kHeads];
#pragma unroll
            for (int h = 0; h < kHeads; ++h)
                out[h] = __fmul_rn(places.at(t, k, h), sigmoid_of_minus(v[k][h] + bias[h]));
            if (step + t * kTileTokens + k * kStepTokens >= p.stop) continue;
            dbias[0] += out[0], dbias[1] += out[1];
            place.store(dz, out);
        }
    }
    const auto of_chunk = float(sum_of_head(sums, dbias));
    if (threadIdx.x % kWarp == 0 && head < a.heads) a.partial[std::int64_t(blockIdx.x) * a.heads + head] = of_chunk;
}

// Blocks of chunks, and of heads: so many pairs to each.
struct Grid {
    int pairs;
    dim3 blocks;
    Grid(const Packed& seq, int chunks, int heads) {
        const int all = ceil_div(heads, kHeads);
        pairs = all < kMostPairs ? all : kMostPairs;
        while (all % pairs != 0) --pairs;
        blocks = dim3(unsigned(seq.count * chunks), unsigned(all / pairs));
    }
    int threads() const { return pairs * kStepTokens; }
    int bytes() const { return pairs * kHeads * kPlane * int(sizeof(float)); }
};
template <class Args>
void launch(const Cuda& dev, void (*kernel)(Args, Said), const Args& args, const Said& said) {
    const Grid grid(args.seq, said.chunks, args.heads);
    const std::int64_t n = std::int64_t(args.seq.count) * said.chunks * args.heads;
    forget_kernel<<<unsigned(ceil_div(n, std::int64_t(kForgetThreads))), kForgetThreads, 0, stream_of(dev)>>>(said.data,
                                                                                                              n);
    LAUNCH_CHECK("gate_forget");
    allow_shared<std::size_t(kMostPairs) * kHeads * kPlane * sizeof(float)>(kernel);
    launch_dependent(dev, kernel, grid.blocks, unsigned(grid.threads()), grid.bytes(), args, said);
    LAUNCH_CHECK("gate_long");
}

}  // namespace gate_long
}  // namespace fiedler
