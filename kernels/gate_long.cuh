// kernels/gate_long.cuh: the forget gate of long sequences, cut into chunks of one block each (see gate.cu). First
// the sums of chunks (f32 within a thread, double across threads and chunks), then from those what is carried into
// each, then the chunks themselves, tile by tile. The second and the third kernel start while the one before them
// ends.
//
// A block has all heads, or a part of them, so that each 32-byte sector comes to one multiprocessor. In memory's
// order a thread has one pair of heads at every 64th token. In shared memory each head has a plane: there one warp
// adds up along it, kRunTokens to a lane. So little goes from lane to lane, and nothing from warp to warp.
#pragma once
#include "kernels/dependent_launch.cuh"
#include "kernels/gate_args.cuh"

namespace fiedler {
namespace gate_long {

using namespace gate_scan;

constexpr int kRunTokens = 8, kTileTokens = kWarp * kRunTokens;
constexpr int kStepTokens = 2 * kWarp, kSteps = kTileTokens / kStepTokens;  // a pair has two warps
constexpr int kMostPairs = 8, kMostThreads = kMostPairs * kStepTokens;
constexpr int kCarryThreads = 256;
// Gaps: lanes that read four neighbouring values of a run each find different banks, and most threads of different
// pairs.
constexpr int kRunPlace = kRunTokens + 4, kPlane = kWarp * kRunPlace + 12;
static_assert(kStepTokens % kRunTokens == 0 && kRunTokens % 4 == 0 && (kRunPlace / 4) % 2 == 1 && kPlane % 4 == 0);

// What a block works on, and a thread of it: steps first .. stop - 1 of a sequence whose tokens are begin .. end - 1.
struct Chunk {
    int s, c, begin, end, first, stop;
    int base;   // the block's first head; a warp's is as many further on as it has warps before it
    int h;      // the thread's pair: h and, if `both`, h + 1
    int token;  // its first step of a tile
    bool both;
    __device__ Chunk(const Packed& seq, const Cut& cut, int heads) {
        const int pairs = int(blockDim.x) / kStepTokens;
        s = int(blockIdx.x) / cut.chunks, c = int(blockIdx.x) - s * cut.chunks;
        begin = seq.sequence_begin(s), end = seq.sequence_end(s);
        first = c * cut.length, stop = c == cut.chunks - 1 ? end - begin : first + cut.length;
        base = int(blockIdx.y) * pairs * kHeads;
        token = int(threadIdx.x) / pairs;
        h = base + (int(threadIdx.x) - token * pairs) * kHeads;
        both = h + 1 < heads;
    }
    __device__ int head_of_warp() const { return base + int(threadIdx.x) / kWarp; }
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

// The sum over the block of the threads' numbers of the warp's head. shared: two for each thread.
__device__ double sum_of_head(float* shared, const float (&mine)[kHeads]) {
    const int heads = int(blockDim.x) / kWarp, head = int(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
    reinterpret_cast<float2*>(shared)[threadIdx.x] = {mine[0], mine[1]};
    __syncthreads();
    double total = double(shared[lane * heads + head]) + double(shared[(lane + kWarp) * heads + head]);
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) total += __shfl_xor_sync(kWholeWarp, total, o);
    return total;
}
// The sum of each head over the chunk, from the threads' own.
__device__ void store_chunk_sums(const Carries& carries, const Chunk& p, const float (&mine)[kHeads], int heads) {
    __shared__ float2 shared[kMostThreads];
    dependents_may_start();
    const double total = sum_of_head(&shared[0].x, mine);
    const int head = p.head_of_warp();
    if (threadIdx.x % kWarp == 0 && head < heads) carries.set(p.s, p.c, head, total);
}

// The sum of logsigmoid(u[k]): the logarithm of the product of all 1 + e, kept as what it is more than 1.
__device__ float sum_of_log_sigmoids(const float (&u)[kSteps]) {
    float below = 0.f, more = 0.f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        const float e = expf(-fabsf(u[k]));
        more = fmaf(more, e, more + e);
        below += u[k] < 0.f ? u[k] : 0.f;
    }
    return below - log1pf(more);
}

template <bool kPairs>
__global__ __launch_bounds__(kMostThreads) void forward_sums_kernel(ForwardArgs a) {
    const Chunk p(a.seq, a.cut, a.heads);
    const Place<kPairs> place{p.both};
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    int step = p.first + p.token;
    const float* z = a.z + std::int64_t(p.begin + step) * a.ld_z + p.h;
    float sum[kHeads] = {};
#pragma unroll 1
    for (; step < p.stop; step += kTileTokens, z += kTileTokens * a.ld_z) {
        Steps v;
        load_steps(v, place, z, a.ld_z, step, p.stop);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            float u[kSteps];
#pragma unroll
            for (int k = 0; k < kSteps; ++k) u[k] = step + k * kStepTokens < p.stop ? v[k][h] + bias[h] : INFINITY;
            sum[h] += sum_of_log_sigmoids(u);
        }
    }
    store_chunk_sums(a.carries, p, sum, a.heads);
}
// Steps count from the last token to the front.
template <bool kPairs>
__global__ __launch_bounds__(kMostThreads) void backward_sums_kernel(BackwardArgs a) {
    const Chunk p(a.seq, a.cut, a.heads);
    const Place<kPairs> place{p.both};
    int step = p.first + p.token;
    const float* dF = a.dF + std::int64_t(p.end - 1 - step) * a.ld_dF + p.h;
    float sum[kHeads] = {};
#pragma unroll 1
    for (; step < p.stop; step += kTileTokens, dF -= kTileTokens * a.ld_dF) {
        Steps v;
        load_steps(v, place, dF, -a.ld_dF, step, p.stop);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) sum[0] += v[k][0], sum[1] += v[k][1];
    }
    store_chunk_sums(a.carries, p, sum, a.heads);
}

// One block per sequence and head: sums of chunks become what is carried into them. initial: [heads] or null.
__global__ __launch_bounds__(kCarryThreads) void carry_kernel(Carries carries, const float* initial, int chunks,
                                                              int heads) {
    __shared__ double shared[2][1][kCarryThreads / kWarp];
    const int s = blockIdx.x / heads, h = blockIdx.x % heads;
    wait_for_previous();
    double carried = initial ? initial[h] : 0.f;
    int turn = 0;
    for (int tile = 0; tile < chunks; tile += kCarryThreads, turn ^= 1) {
        const int c = tile + threadIdx.x;
        double sum[1] = {c < chunks ? carries.get(s, c, h) : 0.0}, warp[1], total[1];
        if (tile + kCarryThreads >= chunks) dependents_may_start();
        warp_inclusive_scan(sum);
        warp[0] = __shfl_sync(kWholeWarp, sum[0], kWarp - 1);
        sums_before_warp(warp, shared[turn], total);
        const double before = __shfl_up_sync(kWholeWarp, sum[0], 1);
        if (c < chunks) carries.set(s, c, h, carried + (warp[0] + (threadIdx.x % kWarp > 0 ? before : 0.0)));
        carried += total[0];
    }
}

// Cumulative sums along a warp's plane, in place, with what is carried into the tile, and then out of it.
__device__ void sum_plane(float* plane, Carried& carried) {
    const int lane = threadIdx.x % kWarp;
    auto* const own = reinterpret_cast<float4*>(plane + lane * kRunPlace);
    float x[kRunTokens];
#pragma unroll
    for (int k = 0; k < kRunTokens / 4; ++k) {
        const float4 v = own[k];
        x[4 * k] = v.x, x[4 * k + 1] = v.y, x[4 * k + 2] = v.z, x[4 * k + 3] = v.w;
    }
#pragma unroll
    for (int k = 1; k < kRunTokens; ++k) x[k] += x[k - 1];
    float sum[1] = {x[kRunTokens - 1]};
    warp_inclusive_scan(sum);
    const float before = __shfl_up_sync(kWholeWarp, sum[0], 1);
    const Carried into{carried.high, carried.low + (lane > 0 ? before : 0.f)};
#pragma unroll
    for (int k = 0; k < kRunTokens / 4; ++k)
        own[k] = {into.plus(x[4 * k]), into.plus(x[4 * k + 1]), into.plus(x[4 * k + 2]), into.plus(x[4 * k + 3])};
    carried.add(__shfl_sync(kWholeWarp, sum[0], kWarp - 1));
}
// Where the steps of a thread are in its two planes.
struct Places {
    float* first;
    __device__ Places(float* planes, const Chunk& p)
        : first(planes + (p.h - p.base) * kPlane + p.token / kRunTokens * kRunPlace + p.token % kRunTokens) {}
    __device__ float& at(int k, int h) const { return first[h * kPlane + k * (kStepTokens / kRunTokens * kRunPlace)]; }
};

template <bool kPairs>
__global__ __launch_bounds__(kMostThreads, 2) void forward_kernel(ForwardArgs a) {
    extern __shared__ __align__(16) float planes[];  // [heads of the block][kPlane]
    const Chunk p(a.seq, a.cut, a.heads);
    const Place<kPairs> place{p.both};
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    int step = p.first + p.token;
    const float* z = a.z + std::int64_t(p.begin + step) * a.ld_z + p.h;
    float* F = a.F + std::int64_t(p.begin + step) * a.ld_F + p.h;
    Steps v;
    load_steps(v, place, z, a.ld_z, step, p.stop);  // older than the sums
    const Places places(planes, p);
    wait_for_previous();
    // Read by all threads before the first barrier; the rows of F that it lies in are written after it.
    Carried carried;
    if (p.head_of_warp() < a.heads) carried = a.carries.carried(p.s, p.c, p.head_of_warp());
    for (;;) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float f = log_sigmoid(v[k][h] + bias[h]);
                places.at(k, h) = step + k * kStepTokens < p.stop ? f : 0.f;
            }
        const bool more = step - p.token + kTileTokens < p.stop;
        __syncthreads();
        if (!more) dependents_may_start();
        sum_plane(planes + int(threadIdx.x) / kWarp * kPlane, carried);
        __syncthreads();
        z += kTileTokens * a.ld_z;
        if (more) load_steps(v, place, z, a.ld_z, step + kTileTokens, p.stop);
        float* to = F;
#pragma unroll
        for (int k = 0; k < kSteps; ++k, to += kStepTokens * a.ld_F) {
            const int own = step + k * kStepTokens;
            const float out[kHeads] = {places.at(k, 0), places.at(k, 1)};
            if (own < p.stop) place.store(to, out);
            if (a.carry && p.begin + own == p.end - 1) Place<false>{p.both}.store(a.carry + p.h, out);
        }
        if (!more) return;
        step += kTileTokens, F += kTileTokens * a.ld_F;
        __syncthreads();  // the planes have been read
    }
}

template <bool kPairs>
__global__ __launch_bounds__(kMostThreads, 2) void backward_kernel(BackwardArgs a) {
    extern __shared__ __align__(16) float planes[];
    const Chunk p(a.seq, a.cut, a.heads);
    const Place<kPairs> place{p.both};
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    int step = p.first + p.token;
    const std::int64_t row = p.end - 1 - step;
    const float *dF = a.dF + row * a.ld_dF + p.h, *z = a.z + row * a.ld_z + p.h;
    nv_bf16* dz = a.dz + row * a.ld_dz + p.h;
    Steps v, u;
    load_steps(v, place, dF, -a.ld_dF, step, p.stop);
    load_steps(u, place, z, -a.ld_z, step, p.stop);
    const Places places(planes, p);
    wait_for_previous();
    Carried carried;
    if (p.head_of_warp() < a.heads) carried = a.carries.carried(p.s, p.c, p.head_of_warp());
    float dbias[kHeads] = {};
    for (bool more = true; more;) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) places.at(k, 0) = v[k][0], places.at(k, 1) = v[k][1];
        more = step - p.token + kTileTokens < p.stop;
        __syncthreads();
        if (!more) dependents_may_start();
        sum_plane(planes + int(threadIdx.x) / kWarp * kPlane, carried);
        __syncthreads();
        dF -= kTileTokens * a.ld_dF, z -= kTileTokens * a.ld_z;
        if (more) load_steps(v, place, dF, -a.ld_dF, step + kTileTokens, p.stop);
        nv_bf16* to = dz;
#pragma unroll
        for (int k = 0; k < kSteps; ++k, to -= kStepTokens * a.ld_dz) {
            float out[kHeads];
#pragma unroll
            for (int h = 0; h < kHeads; ++h) out[h] = __fmul_rn(places.at(k, h), sigmoid_of_minus(u[k][h] + bias[h]));
            if (step + k * kStepTokens >= p.stop) continue;
            dbias[0] += out[0], dbias[1] += out[1];
            place.store(to, out);
        }
        if (more) load_steps(u, place, z, -a.ld_z, step + kTileTokens, p.stop);
        step += kTileTokens, dz -= kTileTokens * a.ld_dz;
        __syncthreads();  // the planes have been read
    }
    const float total = float(sum_of_head(planes, dbias));
    const int head = p.head_of_warp();
    if (threadIdx.x % kWarp == 0 && head < a.heads) a.partial[std::int64_t(blockIdx.x) * a.heads + head] = total;
}

// Whole tiles a chunk. Never a chunk of one token: its sum takes two rows of F.
inline Cut cut_of(int length, int most) {
    int each = ceil_div(ceil_div(length, kTileTokens), most) * kTileTokens;
    while (length % each == 1) each += kTileTokens;
    return {ceil_div(length, each), each};
}
// Blocks of chunks, and of heads: so many pairs to each.
struct Grid {
    int pairs;
    dim3 blocks;
    Grid(const Packed& seq, const Cut& cut, int heads) {
        const int all = ceil_div(heads, kHeads);
        pairs = all < kMostPairs ? all : kMostPairs;
        while (all % pairs != 0) --pairs;
        blocks = dim3(unsigned(seq.count * cut.chunks), unsigned(all / pairs));
    }
    int threads() const { return pairs * kStepTokens; }
    int bytes() const { return pairs * kHeads * kPlane * int(sizeof(float)); }
};

}  // namespace gate_long
}  // namespace fiedler
