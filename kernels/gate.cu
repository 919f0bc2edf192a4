// kernels/gate.cu: the forget gate (see gate.h). One block per sequence and head walks the sequence in tiles of four
// tokens a thread: a scan within the tile in f32, the carry from tile to tile in double. The blocks of a sequence's
// heads are neighbours, so that each 32-byte sector comes from memory once.
#include "kernels/common.cuh"
#include "kernels/gate.h"

namespace fiedler {
namespace {

constexpr int kItems = 4, kMaxWarps = 32, kFinishThreads = 256;

// logsigmoid(u); expf and log1pf are the accurate ones.
__device__ float log_sigmoid(float u) { return (u < 0.f ? u : 0.f) - log1pf(expf(-fabsf(u))); }

__device__ float warp_inclusive_scan(float x) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
        const float below = __shfl_up_sync(0xffffffffu, x, o);
        if (lane >= o) x += below;
    }
    return x;
}

// Sum of x over the threads before this one; total: over the block. One barrier; shared[kMaxWarps] must not be reused
// by the next call but one barrier later, hence two of them in turn.
__device__ float block_exclusive_scan(float x, float* shared, float& total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const float inclusive = warp_inclusive_scan(x);
    if (lane == kWarp - 1) shared[warp] = inclusive;
    __syncthreads();
    const float warp_sums = warp_inclusive_scan(lane < warps ? shared[lane] : 0.f);
    total = __shfl_sync(0xffffffffu, warp_sums, kWarp - 1);
    const float warps_before = __shfl_sync(0xffffffffu, warp_sums, warp > 0 ? warp - 1 : 0);
    const float lanes_before = __shfl_up_sync(0xffffffffu, inclusive, 1);
    return (warp > 0 ? warps_before : 0.f) + (lane > 0 ? lanes_before : 0.f);
}

// Cumulative sums of value(step), step = 0..length-1, given to result(step, sum), starting from `carried`.
template <class Value, class Result>
__device__ void cumulative_sum(std::int64_t length, double carried, Value&& value, Result&& result) {
    __shared__ float shared[2][kMaxWarps];
    int turn = 0;
    for (std::int64_t tile = 0; tile < length; tile += std::int64_t(blockDim.x) * kItems, turn ^= 1) {
        const std::int64_t first = tile + threadIdx.x * kItems;
        float sums[kItems], sum = 0, total;
#pragma unroll
        for (int k = 0; k < kItems; ++k) sums[k] = first + k < length ? value(first + k) : 0.f;
#pragma unroll
        for (int k = 0; k < kItems; ++k) sums[k] = sum += sums[k];
        const float before = block_exclusive_scan(sum, shared[turn], total);
#pragma unroll
        for (int k = 0; k < kItems; ++k)
            if (first + k < length) result(first + k, float(carried + double(before + sums[k])));
        carried += double(total);
    }
}

struct ForwardArgs {
    float* F;
    const float *z, *bias;
    float* carry;  // or null
    std::int64_t ld_F, ld_z;
    int heads;
    Packed seq;
};

__global__ void forward_kernel(ForwardArgs a) {
    const int s = blockIdx.x / a.heads, h = blockIdx.x % a.heads;
    const std::int64_t begin = a.seq.sequence_begin(s), length = a.seq.sequence_end(s) - begin;
    const float bias = a.bias[h];
    // Read by every thread before the first barrier, replaced by one thread after it.
    const double carried = a.carry ? a.carry[h] : 0.f;
    cumulative_sum(
        length, carried, [&](std::int64_t step) { return log_sigmoid(a.z[(begin + step) * a.ld_z + h] + bias); },
        [&](std::int64_t step, float sum) {
            a.F[(begin + step) * a.ld_F + h] = sum;
            if (a.carry && step == length - 1) a.carry[h] = sum;
        });
}

struct BackwardArgs {
    nv_bf16* dz;
    float* partial;  // [sequences][heads]: each sequence's share of dbias
    const float *dF, *z, *bias;
    std::int64_t ld_dz, ld_dF, ld_z;
    int heads;
    Packed seq;
};

__global__ void backward_kernel(BackwardArgs a) {
    __shared__ float shared[kMaxWarps];
    const int s = blockIdx.x / a.heads, h = blockIdx.x % a.heads;
    const std::int64_t begin = a.seq.sequence_begin(s), length = a.seq.sequence_end(s) - begin;
    const std::int64_t last = begin + length - 1;  // walked from here to the front
    const float bias = a.bias[h];
    float dbias = 0;
    cumulative_sum(
        length, 0.0, [&](std::int64_t step) { return a.dF[(last - step) * a.ld_dF + h]; },
        [&](std::int64_t step, float sum) {
            const float dz = sum / (1.f + expf(a.z[(last - step) * a.ld_z + h] + bias));  // exp may be infinite: 0
            a.dz[(last - step) * a.ld_dz + h] = from_float<nv_bf16>(dz);
            dbias += dz;
        });
    dbias = block_sum(dbias, shared);
    if (threadIdx.x == 0) a.partial[std::int64_t(s) * a.heads + h] = dbias;
}

// One block per head: dbias_h += sum over sequences.
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(float* dbias, const float* partial, int sequences,
                                                                int heads) {
    __shared__ float shared[kFinishThreads / kWarp];
    float sum = 0;
    for (int s = threadIdx.x; s < sequences; s += kFinishThreads) sum += partial[std::int64_t(s) * heads + blockIdx.x];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dbias[blockIdx.x] += sum;
}

// Threads of a block: enough for an average sequence in one tile, as a power of two.
unsigned threads_for(const Packed& seq) {
    unsigned threads = kWarp;
    while (threads < kMaxWarps * kWarp && std::int64_t(threads) * kItems < seq.tokens / seq.count) threads *= 2;
    return threads;
}
unsigned blocks_for(const Packed& seq, std::int64_t heads) {
    FIEDLER_REQUIRE("gate", seq.count * heads < (std::int64_t(1) << 31));
    return unsigned(seq.count * heads);
}

}  // namespace

void gate_forward(const Cuda& dev, const GateForward<float>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    const ForwardArgs args{p.F.data, p.z.data, p.bias.data, p.carry.data, p.F.ld, p.z.ld, int(p.z.cols), p.seq};
    forward_kernel<<<blocks_for(p.seq, p.z.cols), threads_for(p.seq), 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("gate_forward");
}

void gate_backward(const Cuda& dev, const GateBackward<bf16>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    FIEDLER_REQUIRE("gate", p.scratch && p.scratch.size >= gate_scratch_elements(p.seq.count, p.z.cols));
    const BackwardArgs args{nv(p.dz.data), p.scratch.data, p.dF.data, p.z.data,      p.bias.data,
                            p.dz.ld,       p.dF.ld,        p.z.ld,    int(p.z.cols), p.seq};
    backward_kernel<<<blocks_for(p.seq, p.z.cols), threads_for(p.seq), 0, stream_of(dev)>>>(args);
    LAUNCH_CHECK("gate_backward");
    finish_kernel<<<unsigned(p.z.cols), kFinishThreads, 0, stream_of(dev)>>>(p.dbias.data, p.scratch.data, p.seq.count,
                                                                             int(p.z.cols));
    LAUNCH_CHECK("gate_finish");
}

}  // namespace fiedler
