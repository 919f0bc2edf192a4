// kernels/conv_taps.cuh: what conv and conv_rotary share on the GPU.
//
// A block is kLanes threads of channels x kRuns runs of tokens. A thread owns 8 channels and walks its run with a window
// of neighbouring rows in registers. The weights pass through shared memory, because a thread's own are 128 bytes of
// them; so do the sums of dw over the block's runs.
#pragma once
#include "kernels/common.cuh"
#include "kernels/dependent_launch.cuh"

namespace fiedler::taps {

constexpr int kTaps = 4, kPackSize = Pack<nv_bf16>::size;
constexpr int kLanes = 16, kRuns = 8, kThreads = kLanes * kRuns, kBlockChannels = kLanes * kPackSize;
constexpr int kPaddedChannels = kBlockChannels + 8;  // rows of shared memory by tap: shifted by 8 banks each

using Row = float[kPackSize];
using Sums = float[kRuns][kTaps][kPaddedChannels];

// Which tokens and channels a block works on. Blocks of the same tokens follow one another: what they read and write at
// about the same time are whole rows, and so neighbours in memory.
struct Place {
    int token_block, first_channel;
    __device__ explicit Place(int channels) {
        const int blocks = ceil_div(channels, kBlockChannels);
        int block;  // read anew each time: a place that is kept would take registers that the walk needs
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
        token_block = block / blocks;
        first_channel = (block - token_block * blocks) * kBlockChannels;
    }
    __device__ Place(int block_of_tokens, int channel) : token_block(block_of_tokens), first_channel(channel) {}
};

// A thread's channels, counted from the block's first: four from `lower` on, four from `upper` on.
struct Channels {
    int lower, upper;
    __device__ int at(int e) const { return e < kPackSize / 2 ? lower + e : upper + e - kPackSize / 2; }
};

// Rows wait as raw words: two bf16 to a register (a Pack may be spread over twice as many).
__device__ inline void unpack(Row& row, const uint4& raw) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < kPackSize; ++e)
        row[e] = __uint_as_float(e % 2 == 0 ? words[e / 2] << 16 : words[e / 2] & 0xffff0000u);
}
__device__ inline uint4 packed(const Row& row) {
    Pack<nv_bf16> r;
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) r.v[e] = from_float<nv_bf16>(row[e]);
    return *reinterpret_cast<const uint4*>(&r);
}
__device__ inline void clear_row(Row& row) {
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) row[e] = 0.f;
}
__device__ inline void clear(Row (&window)[kTaps]) {
#pragma unroll
    for (int o = 1; o < kTaps; ++o) clear_row(window[o]);
}
__device__ inline void shift(Row (&window)[kTaps]) {
#pragma unroll
    for (int o = kTaps - 1; o > 0; --o)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) window[o][e] = window[o - 1][e];
}
// sum_o w_{3-o} window_o: window[o] is the row o tokens away from the one being written.
__device__ inline void weighted_sum(Row& sum, const Row (&window)[kTaps], const Row (&w)[kTaps]) {
#pragma unroll
    for (int e = 0; e < kPackSize; ++e) {
        sum[e] = 0.f;
#pragma unroll
        for (int o = 0; o < kTaps; ++o) sum[e] += w[kTaps - 1 - o][e] * window[o][e];
    }
}
// A row's terms of dw: window[o] is the gradient o tokens after it.
__device__ inline void add_terms(Row (&dw)[kTaps], const Row& x, const Row (&window)[kTaps]) {
#pragma unroll
    for (int e = 0; e < kPackSize; ++e)
#pragma unroll
        for (int o = 0; o < kTaps; ++o) dw[kTaps - 1 - o][e] += x[e] * window[o][e];
}

// The weights of a block's channels, 0 beyond the last. They are asked for before anything else, by all threads of the
// block, each with its next group of cp.async; once those have arrived, and after a barrier, threads read their own.
struct Weights {
    float shared[kTaps][kPaddedChannels];
    __device__ void send(const float* weights, int channels, int first_channel) {
        const int count = min(kBlockChannels, channels - first_channel) * kTaps;
        weights += std::int64_t(first_channel) * kTaps;
#pragma unroll
        for (int k = 0; k < kBlockChannels * kTaps / kThreads; ++k) {
            const int t = threadIdx.y * kLanes + threadIdx.x + k * kThreads;
            const auto to = static_cast<unsigned>(__cvta_generic_to_shared(&shared[t % kTaps][t / kTaps]));
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(weights + (t < count ? t : 0)),
                         "r"(t < count ? 4 : 0)
                         : "memory");
        }
    }
    __device__ void read(Row (&w)[kTaps], Channels own) const {
#pragma unroll
        for (int k = 0; k < kTaps; ++k)
#pragma unroll
            for (int e = 0; e < kPackSize; ++e) w[k][e] = shared[k][own.at(e)];
    }
};

// partial[block of tokens][channels][4] = the sum of dw over the block's runs: all threads of the block put theirs,
// then store.
__device__ inline void put_sums(Sums& sums, const Row (&dw)[kTaps], Channels own) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k)
#pragma unroll
        for (int e = 0; e < kPackSize; ++e) sums[threadIdx.y][k][own.at(e)] = dw[k][e];
}
__device__ inline void store_sums(const Sums& sums, float* partial, int channels, Place at) {
    __syncthreads();
    const int count = min(kBlockChannels, channels - at.first_channel) * kTaps;
    partial += (std::int64_t(at.token_block) * channels + at.first_channel) * kTaps;
    for (int t = threadIdx.y * kLanes + threadIdx.x; t < count; t += kThreads) {
        float sum = 0;
#pragma unroll
        for (int run = 0; run < kRuns; ++run) sum += sums[run][t % kTaps][t / kTaps];
        partial[t] = sum;
    }
}

// Blocks of kRuns runs of `run` tokens.
inline std::int64_t token_blocks(std::int64_t tokens, int run) { return ceil_div(tokens, std::int64_t(kRuns) * run); }
inline unsigned grid_for(std::int64_t tokens, std::int64_t channels, int run) {
    return unsigned(token_blocks(tokens, run) * ceil_div(channels, std::int64_t(kBlockChannels)));
}

}  // namespace fiedler::taps
