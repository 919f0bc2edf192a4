// kernels/gate.cu: the forget gate (see gate.h). A block walks one head of a sequence in tiles of four tokens a thread:
// a scan within the tile in f32, the carry from tile to tile in double. The blocks of a sequence's heads are neighbours,
// so that each 32-byte sector comes from memory once. Long sequences are cut into chunks of one block each: their sums
// come first, what is carried into each follows from those in double, and then each is walked like a sequence.
#include "kernels/common.cuh"
#include "kernels/gate.h"

namespace fiedler {
namespace {

constexpr int kItems = 4, kMaxWarps = 32, kFinishThreads = 256;
constexpr std::int64_t kShortestChunk = 2048;  // tokens: long enough that the two extra launches pay

// logsigmoid(u); expf and log1pf are the accurate ones.
__device__ float log_sigmoid(float u) { return (u < 0.f ? u : 0.f) - log1pf(expf(-fabsf(u))); }

template <class A>
__device__ A warp_inclusive_scan(A x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
        const A below = __shfl_up_sync(0xffffffffu, x, o);
        if (lane >= o) x += below;
    }
    return x;
}

// Sum of x over the threads before this one; total: over the block. One barrier; shared[kMaxWarps] must not be reused
// by the next call but one barrier later, hence two of them in turn.
template <class A>
__device__ A block_exclusive_scan(A x, A* shared, A& total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const A inclusive = warp_inclusive_scan(x);
    if (lane == kWarp - 1) shared[warp] = inclusive;
    __syncthreads();
    const A warp_sums = warp_inclusive_scan(lane < warps ? shared[lane] : A(0));
    total = __shfl_sync(0xffffffffu, warp_sums, kWarp - 1);
    const A warps_before = __shfl_sync(0xffffffffu, warp_sums, warp > 0 ? warp - 1 : 0);
    const A lanes_before = __shfl_up_sync(0xffffffffu, inclusive, 1);
    return (warp > 0 ? warps_before : A(0)) + (lane > 0 ? lanes_before : A(0));
}

// Cumulative sums of value(step), step = first..stop-1, given to result(step, sum), starting from `carried`.
template <class Value, class Result>
__device__ void cumulative_sum(std::int64_t first, std::int64_t stop, double carried, Value&& value, Result&& result) {
    __shared__ float shared[2][kMaxWarps];
    int turn = 0;
    for (std::int64_t tile = first; tile < stop; tile += std::int64_t(blockDim.x) * kItems, turn ^= 1) {
        const std::int64_t mine = tile + threadIdx.x * kItems;
        float sums[kItems], sum = 0, total;
#pragma unroll
        for (int k = 0; k < kItems; ++k) sums[k] = mine + k < stop ? value(mine + k) : 0.f;
#pragma unroll
        for (int k = 0; k < kItems; ++k) sums[k] = sum += sums[k];
        const float before = block_exclusive_scan(sum, shared[turn], total);
#pragma unroll
        for (int k = 0; k < kItems; ++k)
            if (mine + k < stop) result(mine + k, float(carried + double(before + sums[k])));
        carried += double(total);
    }
}

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
    __device__ void set(std::int64_t s, std::int64_t c, std::int64_t h, double x) const {
        float* p = at(s, c, h);
        p[0] = float(x);
        p[ld_part] = isfinite(p[0]) ? float(x - double(p[0])) : 0.f;
    }
};

// How sequences are cut: `chunks` each, of `length` steps but for the last, which takes the rest. One chunk: not cut.
struct Cut {
    int chunks;
    std::int64_t length;
};
// What a block works on: steps first..stop-1 of head h of sequence s, whose tokens are begin..end-1.
struct Part {
    int s, c, h;
    std::int64_t begin, end, first, stop;
};
__device__ Part part_of_block(const Packed& seq, const Cut& cut, int heads) {
    Part p;
    p.h = blockIdx.x % heads, p.c = blockIdx.x / heads % cut.chunks, p.s = blockIdx.x / heads / cut.chunks;
    p.begin = seq.sequence_begin(p.s), p.end = seq.sequence_end(p.s);
    p.first = p.c * cut.length;
    p.stop = p.c == cut.chunks - 1 ? p.end - p.begin : p.first + cut.length;
    return p;
}

// The sum of a chunk, by all threads of its block.
template <class Value>
__device__ void store_chunk_sum(const Carries& carries, const Part& p, Value&& value) {
    __shared__ double shared[kMaxWarps];
    float sum = 0;
#pragma unroll 4
    for (std::int64_t step = p.first + threadIdx.x; step < p.stop; step += blockDim.x) sum += value(step);
    double total;
    block_exclusive_scan(double(sum), shared, total);
    if (threadIdx.x == 0) carries.set(p.s, p.c, p.h, total);
}

// One block per sequence and head: sums of chunks become what is carried into them. initial: [heads] or null.
__global__ __launch_bounds__(kFinishThreads) void carry_kernel(Carries carries, const float* initial, int chunks,
                                                               int heads) {
    __shared__ double shared[2][kMaxWarps];
    const int s = blockIdx.x / heads, h = blockIdx.x % heads;
    double carried = initial ? initial[h] : 0.f;
    int turn = 0;
    for (int tile = 0; tile < chunks; tile += kFinishThreads, turn ^= 1) {
        const int c = tile + threadIdx.x;
        double total;
        const double before = block_exclusive_scan(c < chunks ? carries.get(s, c, h) : 0.0, shared[turn], total);
        if (c < chunks) carries.set(s, c, h, carried + before);
        carried += total;
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
};

__global__ void forward_sums_kernel(ForwardArgs a) {
    const Part p = part_of_block(a.seq, a.cut, a.heads);
    const float bias = a.bias[p.h];
    store_chunk_sum(a.carries, p,
                    [&](std::int64_t step) { return log_sigmoid(a.z[(p.begin + step) * a.ld_z + p.h] + bias); });
}

__global__ void forward_kernel(ForwardArgs a) {
    const Part p = part_of_block(a.seq, a.cut, a.heads);
    const float bias = a.bias[p.h];
    // Read by every thread before the first barrier, replaced by one thread after it.
    const double carried = a.cut.chunks > 1 ? a.carries.get(p.s, p.c, p.h) : a.carry ? double(a.carry[p.h]) : 0.0;
    cumulative_sum(
        p.first, p.stop, carried,
        [&](std::int64_t step) { return log_sigmoid(a.z[(p.begin + step) * a.ld_z + p.h] + bias); },
        [&](std::int64_t step, float sum) {
            a.F[(p.begin + step) * a.ld_F + p.h] = sum;
            if (a.carry && p.begin + step == p.end - 1) a.carry[p.h] = sum;
        });
}

struct BackwardArgs {
    nv_bf16* dz;
    float* partial;  // [sequences][chunks][heads]: each chunk's share of dbias
    const float *dF, *z, *bias;
    std::int64_t ld_dz, ld_dF, ld_z;
    int heads;
    Packed seq;
    Cut cut;
    Carries carries;
};

// Steps count from the last token to the front.
__global__ void backward_sums_kernel(BackwardArgs a) {
    const Part p = part_of_block(a.seq, a.cut, a.heads);
    store_chunk_sum(a.carries, p, [&](std::int64_t step) { return a.dF[(p.end - 1 - step) * a.ld_dF + p.h]; });
}

__global__ void backward_kernel(BackwardArgs a) {
    __shared__ float shared[kMaxWarps];
    const Part p = part_of_block(a.seq, a.cut, a.heads);
    const std::int64_t last = p.end - 1;
    const float bias = a.bias[p.h];
    const double carried = a.cut.chunks > 1 ? a.carries.get(p.s, p.c, p.h) : 0.0;
    float dbias = 0;
    cumulative_sum(
        p.first, p.stop, carried, [&](std::int64_t step) { return a.dF[(last - step) * a.ld_dF + p.h]; },
        [&](std::int64_t step, float sum) {
            const float dz = sum / (1.f + expf(a.z[(last - step) * a.ld_z + p.h] + bias));  // exp may be infinite: 0
            a.dz[(last - step) * a.ld_dz + p.h] = from_float<nv_bf16>(dz);
            dbias += dz;
        });
    dbias = block_sum(dbias, shared);
    if (threadIdx.x == 0) a.partial[(std::int64_t(p.s) * a.cut.chunks + p.c) * a.heads + p.h] = dbias;
}

// One block per head: dbias_h += sum over sequences and their chunks.
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(float* dbias, const float* partial, int rows,
                                                                int heads) {
    __shared__ float shared[kFinishThreads / kWarp];
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows; i += kFinishThreads) sum += partial[std::int64_t(i) * heads + blockIdx.x];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dbias[blockIdx.x] += sum;
}

// Sequences of one length are cut if that length is enough; packings of several lengths are not. The same on every
// device, as the order of the sums depends on it.
Cut cut_of(const Packed& seq) {
    const std::int64_t length = seq.length > 0 ? seq.length : seq.count == 1 ? seq.tokens : 0;
    const std::int64_t most = kGateChunks / seq.count, enough = length / kShortestChunk;
    const std::int64_t chunks = enough < most ? enough : most;
    return chunks > 1 ? Cut{int(chunks), length / chunks} : Cut{1, length};
}
// Threads of a block: enough for an average chunk in one tile, as a power of two.
unsigned threads_for(const Packed& seq, const Cut& cut) {
    unsigned threads = kWarp;
    const std::int64_t tokens = seq.tokens / (std::int64_t(seq.count) * cut.chunks);
    while (threads < kMaxWarps * kWarp && std::int64_t(threads) * kItems < tokens) threads *= 2;
    return threads;
}
unsigned blocks_for(const Packed& seq, const Cut& cut, std::int64_t heads) {
    FIEDLER_REQUIRE("gate", seq.count * heads * cut.chunks < (std::int64_t(1) << 31));
    return unsigned(seq.count * heads * cut.chunks);
}

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
    const unsigned blocks = blocks_for(p.seq, cut, p.z.cols), threads = threads_for(p.seq, cut);
    if (cut.chunks > 1) {
        forward_sums_kernel<<<blocks, threads, 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("gate_forward_sums");
        carry_kernel<<<blocks / unsigned(cut.chunks), kFinishThreads, 0, stream_of(dev)>>>(carries, p.carry.data,
                                                                                           cut.chunks, args.heads);
        LAUNCH_CHECK("gate_carry");
    }
    forward_kernel<<<blocks, threads, 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("gate_forward");
}

void gate_backward(const Cuda& dev, const GateBackward<bf16>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    FIEDLER_REQUIRE("gate", p.scratch && p.scratch.size >= gate_scratch_elements(p.seq.count, p.z.cols));
    const Cut cut = cut_of(p.seq);
    const std::int64_t heads = p.z.cols, rows = std::int64_t(p.seq.count) * cut.chunks;
    const Carries carries{p.scratch.data, 2 * heads * cut.chunks, 2 * heads, 2, 1};
    const BackwardArgs args{.dz = nv(p.dz.data),
                            .partial = p.scratch.data + (cut.chunks > 1 ? 2 * heads * rows : 0),
                            .dF = p.dF.data,
                            .z = p.z.data,
                            .bias = p.bias.data,
                            .ld_dz = p.dz.ld,
                            .ld_dF = p.dF.ld,
                            .ld_z = p.z.ld,
                            .heads = int(heads),
                            .seq = p.seq,
                            .cut = cut,
                            .carries = carries};
    const unsigned blocks = blocks_for(p.seq, cut, heads), threads = threads_for(p.seq, cut);
    if (cut.chunks > 1) {
        backward_sums_kernel<<<blocks, threads, 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("gate_backward_sums");
        carry_kernel<<<blocks / unsigned(cut.chunks), kFinishThreads, 0, stream_of(dev)>>>(carries, nullptr, cut.chunks,
                                                                                           args.heads);
        LAUNCH_CHECK("gate_carry");
    }
    backward_kernel<<<blocks, threads, 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("gate_backward");
    finish_kernel<<<unsigned(heads), kFinishThreads, 0, stream_of(dev)>>>(p.dbias.data, args.partial, int(rows),
                                                                          int(heads));
    LAUNCH_CHECK("gate_finish");
}

}  // namespace fiedler
