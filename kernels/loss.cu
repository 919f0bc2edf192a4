// kernels/loss.cu: softmax cross-entropy and its gradient (see loss.h). One block per row.
//
//   cached     a row that fits in the block's registers is read once; maximum, sum and gradient come from there
//   streamed   longer rows (and rows that are not 16-byte aligned) are read twice, the second time mostly from L2:
//              each thread keeps a running maximum and the sum relative to it
#include <cstdint>

#include "kernels/common.cuh"
#include "kernels/loss.h"

namespace fiedler {
namespace {

constexpr int kPack = Pack<nv_bf16>::size;

struct Args {
    nv_bf16* logits;
    std::int64_t ld;
    int vocab;
    const std::int32_t* targets;
    float* losses;
    float scale;
};

// exp(x) for x <= 0; exp(-inf) is 0, a NaN stays.
__device__ inline float exp_of(float x) { return exp2f(x * kLog2e); }

// kWidth neighbouring values as one access: 16 bytes where the row allows it, else one element.
template <int kWidth>
__device__ inline void load_values(const nv_bf16* p, nv_bf16 (&v)[kWidth]) {
    if constexpr (kWidth == kPack) {
        const Pack<nv_bf16> pack = load16(p);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) v[k] = pack.v[k];
    } else {
        v[0] = *p;
    }
}
template <int kWidth>
__device__ inline void store_values(nv_bf16* p, const nv_bf16 (&v)[kWidth]) {
    if constexpr (kWidth == kPack) {
        Pack<nv_bf16> pack;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) pack.v[k] = v[k];
        store16(p, pack);
    } else {
        *p = v[0];
    }
}

// Zeros over [first, ld) of a row; first and ld are multiples of kWidth.
template <int kWidth>
__device__ inline void zero_columns(nv_bf16* row, std::int64_t first, std::int64_t ld) {
    nv_bf16 zeros[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) zeros[k] = from_float<nv_bf16>(0.f);
    for (std::int64_t c = first + std::int64_t(threadIdx.x) * kWidth; c < ld; c += std::int64_t(blockDim.x) * kWidth)
        store_values<kWidth>(row + c, zeros);
}

// softmax gradient of the values at columns c .. c + kWidth - 1; 0 beyond the vocabulary.
template <int kWidth>
__device__ inline void to_gradient(nv_bf16 (&v)[kWidth], int c, int vocab, int target, float top, float factor,
                                   float scale) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
        float g = exp_of(to_float(v[k]) - top) * factor;
        if (c + k == target) g -= scale;
        v[k] = from_float<nv_bf16>(c + k < vocab ? g : 0.f);
    }
}

// True where the row has no loss: then everything is written here. The whole block takes the same way.
template <int kWidth, bool kGradient>
__device__ inline bool without_loss(const Args& p, nv_bf16* row, int target) {
    if (target >= 0 && target < p.vocab) return false;
    // A target beyond the vocabulary breaks the contract: a NaN shows it, instead of memory read out of bounds.
    if (threadIdx.x == 0) p.losses[blockIdx.x] = target < 0 ? 0.f : __int_as_float(0x7fffffff);
    if constexpr (kGradient) zero_columns<kWidth>(row, 0, p.ld);
    return true;
}

// Two bf16 in a word, as they lie in memory (little-endian): a bf16 is the upper half of an f32.
__device__ inline float low(std::uint32_t word) { return __uint_as_float(word << 16); }
__device__ inline float high(std::uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// The values at columns c .. c + 7 as four words; -inf beyond the vocabulary.
__device__ inline void load_words(const nv_bf16* row, int c, int vocab, std::uint32_t (&words)[kPack / 2]) {
    constexpr std::uint32_t kMinusInf = 0xff80u;
    uint4 pack = make_uint4(0, 0, 0, 0);
    if (c < vocab) pack = *reinterpret_cast<const uint4*>(row + c);
    words[0] = pack.x, words[1] = pack.y, words[2] = pack.z, words[3] = pack.w;
#pragma unroll
    for (int k = 0; k < kPack / 2; ++k) {
        if (c + 2 * k >= vocab) words[k] = kMinusInf;  // replaces the lower half; the upper is replaced below
        if (c + 2 * k + 1 >= vocab) words[k] = (words[k] & 0xffffu) | (kMinusInf << 16);
    }
}

// Hides from the compiler where the words came from. Without this it keeps each value in f32 (and even each
// exponential) from one loop to the next instead of unpacking again, which takes twice the registers and spills.
template <int kPacks>
__device__ inline void forget_origin(std::uint32_t (&words)[kPacks][kPack / 2]) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
#pragma unroll
        for (int k = 0; k < kPack / 2; ++k) asm volatile("" : "+r"(words[j][k]));
}

// ld % 8 == 0, rows 16-byte aligned, vocab <= kThreads * kPacks * 8.
template <int kThreads, int kPacks, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) loss_cached(Args p) {
    __shared__ float shared[kThreads / kWarp];
    nv_bf16* row = p.logits + blockIdx.x * p.ld;
    const int target = p.targets[blockIdx.x];
    if (without_loss<kPack, kGradient>(p, row, target)) return;
    // Read before the barriers inside the reductions, overwritten after them.
    const float at_target = to_float(row[target]);

    std::uint32_t row_words[kPacks][kPack / 2];  // two values a register
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
        const int c = (int(threadIdx.x) + j * kThreads) * kPack;
        load_words(row, c, p.vocab, row_words[j]);
#pragma unroll
        for (int k = 0; k < kPack / 2; ++k) top = fmaxf(top, fmaxf(low(row_words[j][k]), high(row_words[j][k])));
    }
    forget_origin(row_words);
    top = block_max(top, shared);
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kPacks; ++j)
#pragma unroll
        for (int k = 0; k < kPack / 2; ++k)
            sum += exp_of(low(row_words[j][k]) - top) + exp_of(high(row_words[j][k]) - top);
    forget_origin(row_words);
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) p.losses[blockIdx.x] = logf(sum) + (top - at_target);
    if constexpr (kGradient) {
        const float factor = p.scale / sum;
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
            const int c = (int(threadIdx.x) + j * kThreads) * kPack;
            if (c >= p.vocab) continue;
            nv_bf16 v[kPack];
#pragma unroll
            for (int k = 0; k < kPack / 2; ++k) {
                v[2 * k] = from_float<nv_bf16>(low(row_words[j][k]));
                v[2 * k + 1] = from_float<nv_bf16>(high(row_words[j][k]));
            }
            to_gradient<kPack>(v, c, p.vocab, target, top, factor, p.scale);
            store_values<kPack>(row + c, v);
        }
        zero_columns<kPack>(row, ceil_div(p.vocab, kPack) * kPack, p.ld);
    }
}

// kWidth 8: ld % 8 == 0 and rows 16-byte aligned; kWidth 1: any.
template <int kThreads, int kWidth, bool kGradient>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) loss_streamed(Args p) {
    __shared__ float shared[kThreads / kWarp];
    nv_bf16* row = p.logits + blockIdx.x * p.ld;
    const int target = p.targets[blockIdx.x];
    if (without_loss<kWidth, kGradient>(p, row, target)) return;
    const float at_target = to_float(row[target]);

    float top = -INFINITY, sum = 0.f;  // of this thread's values; sum is relative to top
    for (int c = threadIdx.x * kWidth; c < p.vocab; c += kThreads * kWidth) {
        nv_bf16 v[kWidth];
        load_values<kWidth>(row + c, v);
        float pack_top = top;
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
            if (c + k < p.vocab) pack_top = fmaxf(pack_top, to_float(v[k]));
        // The first values: top is -inf and sum is 0, which must not meet in -inf - -inf.
        if (pack_top > top) {
            sum *= exp_of(top - pack_top);
            top = pack_top;
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
            if (c + k < p.vocab) sum += exp_of(to_float(v[k]) - top);
    }
    const float row_top = block_max(top, shared);
    // A thread without values has top -inf and sum 0; exp(-inf - row_top) is 0 for any finite row_top.
    sum = block_sum(sum * exp_of(top - row_top), shared);
    if (threadIdx.x == 0) p.losses[blockIdx.x] = logf(sum) + (row_top - at_target);
    if constexpr (kGradient) {
        const float factor = p.scale / sum;
        for (int c = threadIdx.x * kWidth; c < p.vocab; c += kThreads * kWidth) {
            nv_bf16 v[kWidth];
            load_values<kWidth>(row + c, v);
            to_gradient<kWidth>(v, c, p.vocab, target, row_top, factor, p.scale);
            store_values<kWidth>(row + c, v);
        }
        zero_columns<kWidth>(row, ceil_div(p.vocab, kWidth) * kWidth, p.ld);
    }
}

template <bool kGradient>
void launch(const Args& p, bool aligned, int rows, cudaStream_t stream) {
    if (!aligned)
        loss_streamed<512, 1, kGradient><<<rows, 512, 0, stream>>>(p);
    else if (p.vocab <= 256 * 1 * kPack)
        loss_cached<256, 1, kGradient><<<rows, 256, 0, stream>>>(p);
    else if (p.vocab <= 256 * 4 * kPack)
        loss_cached<256, 4, kGradient><<<rows, 256, 0, stream>>>(p);
    else if (p.vocab <= 512 * 4 * kPack)
        loss_cached<512, 4, kGradient><<<rows, 512, 0, stream>>>(p);
    else if (p.vocab <= 512 * 8 * kPack)
        loss_cached<512, 8, kGradient><<<rows, 512, 0, stream>>>(p);
    else
        loss_streamed<1024, kPack, kGradient><<<rows, 1024, 0, stream>>>(p);
    LAUNCH_CHECK("loss_forward");
}

// One block; each thread adds every 1024th loss in order, then the threads' sums are added as a tree: always the same.
constexpr int kSumThreads = 1024;
__global__ void __launch_bounds__(kSumThreads) loss_sum_kernel(float* total, const float* losses, std::int64_t n) {
    __shared__ double sums[kSumThreads];
    double sum = 0;
    for (std::int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += double(losses[i]);
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
        if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *total = float(double(*total) + sums[0]);
}

}  // namespace

void loss_forward(const Cuda& dev, const LossForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("loss", p.logits.cols <= INT32_MAX / 2 && p.logits.rows <= INT32_MAX);
    if (p.logits.rows == 0 || p.logits.cols == 0) return;
    const Args args{nv(p.logits.data), p.logits.ld,   static_cast<int>(p.logits.cols),
                    p.targets.data,    p.losses.data, p.scale};
    const int rows = static_cast<int>(p.logits.rows);
    if (p.gradient)
        launch<true>(args, is_aligned16(p.logits), rows, stream_of(dev));
    else
        launch<false>(args, is_aligned16(p.logits), rows, stream_of(dev));
}

void loss_sum(const Cuda& dev, const LossSum<float>& p) {
    check(p);
    loss_sum_kernel<<<1, kSumThreads, 0, stream_of(dev)>>>(p.total.data, p.losses.data, p.losses.size);
    LAUNCH_CHECK("loss_sum");
}

}  // namespace fiedler
