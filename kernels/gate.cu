// kernels/gate.cu: the forget gate (see gate.h). A block walks two neighbouring heads of a sequence in tiles of kLongRun
// tokens a thread: a scan within the tile in f32, the carry from tile to tile in double. It costs latencies and instructions,
// not bytes. So a tile's tokens are asked for before anything is waited for, and a thread adds up tokens that follow each
// other, so that few numbers go from lane to lane. In memory neighbouring lanes have neighbouring tokens, so that a warp's
// accesses touch few lines: the tokens change places in shared memory. Blocks of the same tokens are neighbours, so that
// each 32-byte sector comes from memory once. A warp does short sequences alone. Long ones are cut into chunks of one block
// each: their sums come first (f32 within a warp, double across warps and chunks), what is carried into each follows from
// those, and then each is walked like a sequence.
#include "kernels/common.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/gate.h"
#include "kernels/gate_scan.cuh"

namespace fiedler {
namespace {

using namespace gate_scan;

constexpr int kLongRun = 4;  // tokens of a thread in a tile; 1 or 2 where a warp has a short sequence alone
constexpr int kFinishThreads = 256;
constexpr int kLong = 8192;  // tokens of a sequence for which the two extra launches pay
constexpr int kShortestChunk = 2048;

// One double for each chunk, as two floats: its sum, later what is carried into it.
struct Carries {
    float* data;  // of the first sequence, chunk and head
    std::int64_t ld_sequence, ld_chunk, ld_head, ld_part;
    __device__ float* at(std::int64_t s, std::int64_t c, std::int64_t h) const {
        return data + s * ld_sequence + c * ld_chunk + h * ld_head;
    }
    __device__ double get(std::int64_t s, std::int64_t c, std::int64_t h) const {
        const float* p = at(s, c, h);
        return double(p[0]) + double(p[ld_part]);
    }
    __device__ Carried carried(std::int64_t s, std::int64_t c, std::int64_t h) const {
        const float* p = at(s, c, h);
        return {p[0], p[ld_part]};
    }
    __device__ void set(std::int64_t s, std::int64_t c, std::int64_t h, double x) const {
        float* p = at(s, c, h);
        p[0] = float(x);
        p[ld_part] = isfinite(p[0]) ? float(x - double(p[0])) : 0.f;
    }
};

// How sequences are cut: `chunks` each, of `length` steps but for the last, which takes the rest. One chunk: not cut.
struct Cut {
    int chunks, length;
};
// What a block, or a warp alone, works on: steps first..stop-1 of heads h and h + 1 of sequence s, whose tokens are
// begin..end-1. No steps where there are no more sequences.
struct Part {
    int row, s, c, h, begin, end, first, stop;
    bool exists, both;
};
// blockIdx.x: the pair of heads; y and z: sequence and chunk, or kAloneWarps sequences.
template <bool kAlone>
__device__ Part part_of(const Packed& seq, const Cut& cut, int heads) {
    Part p{};
    p.row = blockIdx.z * gridDim.y + blockIdx.y;
    p.h = blockIdx.x * kHeads, p.both = p.h + 1 < heads;
    p.s = kAlone ? p.row * kAloneWarps + int(threadIdx.x) / kWarp : p.row;
    if (!kAlone && cut.chunks > 1) p.s = p.row / cut.chunks, p.c = p.row - p.s * cut.chunks;
    p.exists = p.s < seq.count;
    if (!p.exists) return p;
    p.begin = seq.sequence_begin(p.s), p.end = seq.sequence_end(p.s);
    p.first = p.c * cut.length;
    p.stop = p.c == cut.chunks - 1 ? p.end - p.begin : p.first + cut.length;
    return p;
}
// The first step of the thread in the tile that begins at `tile`, and from a tile to the next.
template <bool kAlone, int kRun>
__device__ int first_step(int tile) {
    const int lane = threadIdx.x % kWarp;
    return tile + lane + (kAlone ? 0 : (int(threadIdx.x) - lane) * kRun);
}
template <bool kAlone, int kRun>
__device__ int steps_of_tile() {
    return (kAlone ? kWarp : int(blockDim.x)) * kRun;
}

// Sums of a chunk, by all threads of its block; value(v, step): of both heads.
template <class Value>
__device__ void store_chunk_sums(const Carries& carries, const Part& p, Value&& value) {
    __shared__ double shared[kHeads][kMaxWarps];
    float sum[kHeads] = {};
#pragma unroll 4
    for (int step = p.first + int(threadIdx.x); step < p.stop; step += blockDim.x) {
        float v[kHeads];
        value(v, step);
        sum[0] += v[0], sum[1] += v[1];
    }
    double warp[kHeads] = {warp_sum(sum[0]), warp_sum(sum[1])}, total[kHeads];
    sums_before_warp(warp, shared, total);
    if (threadIdx.x == 0) carries.set(p.s, p.c, p.h, total[0]);
    if (threadIdx.x == 0 && p.both) carries.set(p.s, p.c, p.h + 1, total[1]);
}

// One block per sequence and head: sums of chunks become what is carried into them. initial: [heads] or null.
__global__ __launch_bounds__(kFinishThreads) void carry_kernel(Carries carries, const float* initial, int chunks,
                                                               int heads) {
    __shared__ double shared[2][1][kFinishThreads / kWarp];
    const int s = blockIdx.x / heads, h = blockIdx.x % heads;
    double carried = initial ? initial[h] : 0.f;
    int turn = 0;
    for (int tile = 0; tile < chunks; tile += kFinishThreads, turn ^= 1) {
        const int c = tile + threadIdx.x;
        double sum[1] = {c < chunks ? carries.get(s, c, h) : 0.0}, warp[1], total[1];
        warp_inclusive_scan(sum);
        warp[0] = __shfl_sync(kWholeWarp, sum[0], kWarp - 1);
        sums_before_warp(warp, shared[turn], total);
        const double before = __shfl_up_sync(kWholeWarp, sum[0], 1);
        if (c < chunks) carries.set(s, c, h, carried + (warp[0] + (threadIdx.x % kWarp > 0 ? before : 0.0)));
        carried += total[0];
    }
}

struct ForwardArgs {
    float* F;
    const float *z, *bias;
    float* carry;  // or null
    std::int64_t ld_F, ld_z;
    int heads;
    Packed seq;
    Cut cut;
    Carries carries;  // in F itself, in the first two rows of each chunk, which are written last
    // The biases of a part's heads.
    __device__ void load_bias(float (&v)[kHeads], const Part& p) const {
        v[0] = bias[p.h], v[1] = p.both ? bias[p.h + 1] : 0.f;
    }
};

template <bool kPairs>
__global__ void forward_sums_kernel(ForwardArgs a) {
    const Part p = part_of<false>(a.seq, a.cut, a.heads);
    if (!p.exists) return;
    const Place<kPairs> place{p.both};
    float bias[kHeads];
    a.load_bias(bias, p);
    const float* const z = a.z + std::int64_t(p.begin) * a.ld_z + p.h;
    store_chunk_sums(a.carries, p, [&](float(&v)[kHeads], int step) {
        place.load(v, z + step * a.ld_z);
        v[0] = log_sigmoid(v[0] + bias[0]), v[1] = log_sigmoid(v[1] + bias[1]);
    });
}

template <bool kAlone, int kRun, bool kPairs>
__global__ void forward_kernel(ForwardArgs a) {
    __shared__ Shared<kAlone, kRun> shared;
    const Part p = part_of<kAlone>(a.seq, a.cut, a.heads);
    if (!p.exists) return;
    const Place<kPairs> place{p.both};
    const auto load = [&](Tile<kRun>& x, int mine) {
        const float* const z = a.z + std::int64_t(p.begin + mine) * a.ld_z + p.h;
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (mine + k * kWarp < p.stop) place.load(x[k], z + k * kWarp * a.ld_z);
    };
    int mine = first_step<kAlone, kRun>(p.first);
    Tile<kRun> x{};
    load(x, mine);  // before anything is waited for
    float bias[kHeads];
    a.load_bias(bias, p);
    Carried carried[kHeads];  // read by every thread before the first barrier, replaced by one thread after it
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (h > 0 && !p.both) continue;
        if (a.cut.chunks > 1)
            carried[h] = a.carries.carried(p.s, p.c, p.h + h);
        else if (a.carry)
            carried[h].high = a.carry[p.h + h];
    }
    for (int tile = p.first, turn = 0;; turn ^= 1) {
        tile += steps_of_tile<kAlone, kRun>();
        const bool more = tile < p.stop;
        Tile<kRun> next{};
        if (more) load(next, mine + steps_of_tile<kAlone, kRun>());
#pragma unroll
        for (int k = 0; k < kRun; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float f = log_sigmoid(x[k][h] + bias[h]);
                x[k][h] = mine + k * kWarp < p.stop ? f : 0.f;
            }
        cumulative_sums<kAlone, kRun>(x, shared, turn);
        float* const F = a.F + std::int64_t(p.begin + mine) * a.ld_F + p.h;
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
#pragma unroll
            for (int h = 0; h < kHeads; ++h) x[k][h] = carried[h].plus(x[k][h]);
            if (mine + k * kWarp < p.stop) place.store(F + k * kWarp * a.ld_F, x[k]);
        }
        if (a.carry && !more) {
#pragma unroll
            for (int k = 0; k < kRun; ++k)
                if (p.begin + mine + k * kWarp == p.end - 1) Place<false>{p.both}.store(a.carry + p.h, x[k]);
        }
        if (!more) return;
        add_tile(carried, shared, turn);
        mine += steps_of_tile<kAlone, kRun>();
#pragma unroll
        for (int k = 0; k < kRun; ++k) x[k][0] = next[k][0], x[k][1] = next[k][1];
    }
}

struct BackwardArgs {
    nv_bf16* dz;
    float* partial;  // [rows][heads]: each block's share of dbias
    const float *dF, *z, *bias;
    std::int64_t ld_dz, ld_dF, ld_z;
    int heads, rows;
    Packed seq;
    Cut cut;
    Carries carries;
};

// Steps count from the last token to the front.
template <bool kPairs>
__global__ void backward_sums_kernel(BackwardArgs a) {
    const Part p = part_of<false>(a.seq, a.cut, a.heads);
    if (!p.exists) return;
    const Place<kPairs> place{p.both};
    const float* const dF = a.dF + std::int64_t(p.end - 1) * a.ld_dF + p.h;
    store_chunk_sums(a.carries, p, [&](float(&v)[kHeads], int step) { place.load(v, dF - step * a.ld_dF); });
}

template <bool kAlone, int kRun, bool kPairs>
__global__ void backward_kernel(BackwardArgs a) {
    dependents_may_start();
    __shared__ Shared<kAlone, kRun> shared;
    const Part p = part_of<kAlone>(a.seq, a.cut, a.heads);
    if (p.row >= a.rows) return;
    const Place<kPairs> place{p.both};
    const auto load = [&](Tile<kRun>& x, const float* of, std::int64_t ld, int mine) {
        of += std::int64_t(p.end - 1 - mine) * ld + p.h;
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (mine + k * kWarp < p.stop) place.load(x[k], of - k * kWarp * ld);
    };
    int mine = first_step<kAlone, kRun>(p.first);
    Tile<kRun> x{}, z{};
    load(x, a.dF, a.ld_dF, mine);  // before anything is waited for
    load(z, a.z, a.ld_z, mine);
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    Carried carried[kHeads];
    if (a.cut.chunks > 1) {
        carried[0] = a.carries.carried(p.s, p.c, p.h);
        if (p.both) carried[1] = a.carries.carried(p.s, p.c, p.h + 1);
    }
    float dbias[kHeads] = {};
    for (int tile = p.first, turn = 0; tile < p.stop; turn ^= 1) {
        tile += steps_of_tile<kAlone, kRun>();
        const bool more = tile < p.stop;
        const int later = mine + steps_of_tile<kAlone, kRun>();
        Tile<kRun> next_x{}, next_z{};
        if (more) load(next_x, a.dF, a.ld_dF, later), load(next_z, a.z, a.ld_z, later);
#pragma unroll
        for (int k = 0; k < kRun; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) z[k][h] = sigmoid_of_minus(z[k][h] + bias[h]);
        cumulative_sums<kAlone, kRun>(x, shared, turn);
        nv_bf16* const dz = a.dz + std::int64_t(p.end - 1 - mine) * a.ld_dz + p.h;
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
            if (mine + k * kWarp >= p.stop) continue;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                x[k][h] = __fmul_rn(carried[h].plus(x[k][h]), z[k][h]);
                dbias[h] += x[k][h];
            }
            place.store(dz - k * kWarp * a.ld_dz, x[k]);
        }
        mine = later;
        if (more) add_tile(carried, shared, turn);
#pragma unroll
        for (int k = 0; k < kRun; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) x[k][h] = next_x[k][h], z[k][h] = next_z[k][h];
    }
    __shared__ float2 of_warps[kMaxWarps];
    float sum[kHeads] = {warp_sum(dbias[0]), warp_sum(dbias[1])};
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = {sum[0], sum[1]};
    __syncthreads();
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int w = 1; w < kMaxWarps; ++w)
        if (w < blockDim.x / kWarp) sum[0] += of_warps[w].x, sum[1] += of_warps[w].y;
    Place<false>{p.both}.store(a.partial + std::int64_t(p.row) * a.heads + p.h, sum);
}

// One block per head: dbias_h += the sum of the rows of `partial`.
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(float* dbias, const float* partial, int rows,
                                                                int heads) {
    __shared__ float shared[kFinishThreads / kWarp];
    const float before = dbias[blockIdx.x];  // not the previous kernel's
    wait_for_previous();
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows; i += blockDim.x) sum += partial[std::int64_t(i) * heads + blockIdx.x];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dbias[blockIdx.x] = before + sum;
}

// Sequences of one length are cut if that length is enough; packings of several lengths are not. The same on every
// device, as the order of the sums depends on it.
Cut cut_of(const Packed& seq) {
    const int length = seq.length > 0 ? seq.length : seq.count == 1 ? seq.tokens : 0;
    const int most = int(kGateChunks / seq.count), enough = length < kLong ? 1 : length / kShortestChunk;
    const int chunks = enough < most ? enough : most;
    return chunks > 1 ? Cut{chunks, length / chunks} : Cut{1, length};
}
// Threads of a part: enough for an average one in one tile, as a power of two. A single warp is alone.
unsigned threads_for(std::int64_t tokens) {
    unsigned threads = kWarp;
    while (threads < kMaxWarps * kWarp && std::int64_t(threads) * kLongRun < tokens) threads *= 2;
    return threads;
}
template <class T>
bool are_pairs_aligned(const Mat<T>& m) {
    constexpr std::uintptr_t bytes = kHeads * sizeof(T);
    return m.cols % kHeads == 0 && m.ld % kHeads == 0 && reinterpret_cast<std::uintptr_t>(m.data) % bytes == 0;
}
// Kernels of one pass: for warps that are alone, with 1, 2 and kLongRun tokens a lane, and for blocks.
template <class Args>
struct Kernels {
    void (*alone[3])(Args);
    void (*block)(Args);
};
struct Launch {
    dim3 blocks;  // of parts: pairs of heads, then `rows` along y and z
    unsigned threads;
    std::int64_t tokens, rows;
    Launch(const Packed& seq, const Cut& cut, std::int64_t heads) {
        constexpr std::int64_t kMostAlongY = 32768;
        rows = std::int64_t(seq.count) * cut.chunks;
        tokens = seq.tokens / rows, threads = threads_for(tokens);
        if (threads == kWarp) rows = ceil_div(rows, std::int64_t(kAloneWarps));
        const std::int64_t y = rows < kMostAlongY ? rows : kMostAlongY;
        blocks = dim3(unsigned(ceil_div(heads, std::int64_t(kHeads))), unsigned(y), unsigned(ceil_div(rows, y)));
    }
    template <class Args>
    void operator()(const Cuda& dev, const Kernels<Args>& kernels, const Args& args) const {
        if (threads == kWarp)
            kernels.alone[tokens <= kWarp       ? 0
                          : tokens <= 2 * kWarp ? 1
                                                : 2]<<<blocks, kAloneWarps * kWarp, 0, stream_of(dev)>>>(args);
        else
            kernels.block<<<blocks, threads, 0, stream_of(dev)>>>(args);
    }
};
template <bool kPairs>
constexpr Kernels<ForwardArgs> kForward{
    {forward_kernel<true, 1, kPairs>, forward_kernel<true, 2, kPairs>, forward_kernel<true, kLongRun, kPairs>},
    forward_kernel<false, kLongRun, kPairs>};
template <bool kPairs>
constexpr Kernels<BackwardArgs> kBackward{
    {backward_kernel<true, 1, kPairs>, backward_kernel<true, 2, kPairs>, backward_kernel<true, kLongRun, kPairs>},
    backward_kernel<false, kLongRun, kPairs>};

}  // namespace

void gate_forward(const Cuda& dev, const GateForward<float>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    const Cut cut = cut_of(p.seq);
    const Carries carries{p.F.data, p.seq.length * p.F.ld, cut.length * p.F.ld, 1, p.F.ld};
    const ForwardArgs args{.F = p.F.data,
                           .z = p.z.data,
                           .bias = p.bias.data,
                           .carry = p.carry.data,
                           .ld_F = p.F.ld,
                           .ld_z = p.z.ld,
                           .heads = int(p.z.cols),
                           .seq = p.seq,
                           .cut = cut,
                           .carries = carries};
    const Launch launch(p.seq, cut, p.z.cols);
    const bool pairs = are_pairs_aligned(p.z) && are_pairs_aligned(p.F);
    if (cut.chunks > 1) {
        (pairs ? forward_sums_kernel<true>
               : forward_sums_kernel<false>)<<<launch.blocks, launch.threads, 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("gate_forward_sums");
        carry_kernel<<<unsigned(p.seq.count * args.heads), kFinishThreads, 0, stream_of(dev)>>>(carries, p.carry.data,
                                                                                                cut.chunks, args.heads);
        LAUNCH_CHECK("gate_carry");
    }
    launch(dev, pairs ? kForward<true> : kForward<false>, args);
    LAUNCH_CHECK("gate_forward");
}

void gate_backward(const Cuda& dev, const GateBackward<bf16>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    FIEDLER_REQUIRE("gate", p.scratch && p.scratch.size >= gate_scratch_elements(p.seq.count, p.z.cols));
    const Cut cut = cut_of(p.seq);
    const std::int64_t heads = p.z.cols;
    const Launch launch(p.seq, cut, heads);
    const Carries carries{p.scratch.data, 2 * heads * cut.chunks, 2 * heads, 2, 1};
    const BackwardArgs args{.dz = nv(p.dz.data),
                            .partial = p.scratch.data + (cut.chunks > 1 ? 2 * heads * launch.rows : 0),
                            .dF = p.dF.data,
                            .z = p.z.data,
                            .bias = p.bias.data,
                            .ld_dz = p.dz.ld,
                            .ld_dF = p.dF.ld,
                            .ld_z = p.z.ld,
                            .heads = int(heads),
                            .rows = int(launch.rows),
                            .seq = p.seq,
                            .cut = cut,
                            .carries = carries};
    const bool pairs = are_pairs_aligned(p.dF) && are_pairs_aligned(p.z) && are_pairs_aligned(p.dz);
    if (cut.chunks > 1) {
        (pairs ? backward_sums_kernel<true>
               : backward_sums_kernel<false>)<<<launch.blocks, launch.threads, 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("gate_backward_sums");
        carry_kernel<<<unsigned(p.seq.count * args.heads), kFinishThreads, 0, stream_of(dev)>>>(carries, nullptr,
                                                                                                cut.chunks, args.heads);
        LAUNCH_CHECK("gate_carry");
    }
    launch(dev, pairs ? kBackward<true> : kBackward<false>, args);
    LAUNCH_CHECK("gate_backward");
    launch_dependent(dev, finish_kernel, unsigned(heads), launch.rows <= kWarp ? kWarp : kFinishThreads, 0,
                     p.dbias.data, static_cast<const float*>(args.partial), args.rows, args.heads);
    LAUNCH_CHECK("gate_finish");
}

}  // namespace fiedler
