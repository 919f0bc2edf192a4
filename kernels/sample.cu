// kernels/sample.cu: the next token on the GPU (see sample.h). A block takes a slot. Nothing is sorted: what is kept
// follows from the logit at its end, found by halving the range of the 2^16 values of bf16, each time with one pass over
// the row, which the caches hold.
#include "kernels/common.cuh"
#include "kernels/sample.h"

namespace fiedler {
namespace sampling {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
using U64 = unsigned long long;

// Numbers of 16 bits in the order of the logits; a NaN is -inf, and -0 is 0.
__device__ inline int key_of(unsigned bits) {
    if ((bits & 0x7fffu) > 0x7f80u) bits = 0xff80u;
    if (bits == 0x8000u) bits = 0;
    return int(bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u);
}
__device__ inline float value_of(int key) {
    const unsigned u = unsigned(key);
    return __uint_as_float((u & 0x8000u ? u & 0x7fffu : ~u & 0xffffu) << 16);
}

// Sum over the block, in every thread; sums: kWarps numbers. Whole numbers: any order.
template <class N>
__device__ N total(N x, N* sums) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    __syncthreads();  // sums may still be read
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    N all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w];
    return all;
}
__device__ inline U64 largest(U64 x, U64* sums) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, o));
    __syncthreads();
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
    __syncthreads();
    U64 all = 0;
    for (int w = 0; w < kWarps; ++w) all = max(all, sums[w]);
    return all;
}
// Sum over the threads before this one; `all`: over the block.
template <class N>
__device__ N before(N x, N* sums, N& all) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    N inclusive = x;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
        const N below = __shfl_up_sync(0xffffffffu, inclusive, o);
        if (lane >= o) inclusive += below;
    }
    __syncthreads();
    if (lane == kWarp - 1) sums[warp] = inclusive;
    __syncthreads();
    N warps_before = 0;
    all = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) warps_before = all;
        all += sums[w];
    }
    return warps_before + inclusive - x;
}

// One slot's row of logits.
struct Row {
    const unsigned short* bits;
    int count;
    float top, inverse_temperature;  // the largest logit
    __device__ int key(int i) const { return key_of(bits[i]); }
    __device__ U64 weight(int k) const {
        const float e = expf((value_of(k) - top) * inverse_temperature);
        return e > 0.f ? __double2ull_rn(double(e) * double(U64(1) << kSampleWeightBits)) : 0;
    }
};
// The tokens kept: all above `key`, and the first `ties` of those at it.
struct Kept {
    int key = -1, ties = 0;
};

// The first k of the order, k < count.
__device__ Kept keep_count(const Row& row, int top_key, int k, int* sums) {
    int lo = 0, hi = top_key + 1, above = 0;  // at least k tokens at or above lo, fewer at or above hi: `above`
    while (hi - lo > 1) {
        const int middle = (lo + hi) / 2;
        int mine = 0;
        for (int i = threadIdx.x; i < row.count; i += kThreads) mine += row.key(i) >= middle;
        const int n = total(mine, sums);
        if (n >= k)
            lo = middle;
        else
            hi = middle, above = n;
    }
    return {lo, k - above};
}

__device__ U64 weight_between(const Row& row, int lo, int hi, U64* sums) {
    U64 mine = 0;
    for (int i = threadIdx.x; i < row.count; i += kThreads) {
        const int k = row.key(i);
        if (k >= lo && k < hi) mine += row.weight(k);
    }
    return total(mine, sums);
}

// Of the tokens kept the shortest beginning of the order whose weights reach the share top_p.
__device__ Kept keep_share(const Row& row, int top_key, const Kept& kept, double top_p, U64* sums) {
    const int lowest = max(kept.key, 0);
    U64 above = weight_between(row, kept.key + 1, top_key + 1, sums);
    const U64 sum = above + (kept.key < 0 ? 0 : U64(kept.ties) * row.weight(kept.key));
    if (sum == 0) return kept;
    const U64 wanted = min(U64(ceil(top_p * double(sum))), sum);
    int lo = lowest,
        hi = top_key + 1;  // weights at or above lo reach `wanted`, those at or above hi (`reached`) do not
    U64 reached = 0;
    if (kept.key >= 0 && above < wanted) hi = lo + 1, reached = above;  // it ends among the ties
    while (hi - lo > 1) {
        const int middle = (lo + hi) / 2;
        const U64 more = reached + weight_between(row, middle, hi, sums);
        if (more >= wanted)
            lo = middle;
        else
            hi = middle, reached = more;
    }
    const U64 each = row.weight(lo), ties = (wanted - reached + each - 1) / each;
    return {lo, int(min(ties, U64(row.count)))};
}

// The token whose share of the sum of weights holds the random number; -1 where there are no weights. Each thread looks
// after a run of neighbouring tokens.
__device__ int draw(const Row& row, const Kept& kept, U64 random, int* counts, U64* sums, int* result) {
    const int run = ceil_div(row.count, kThreads), first = min(int(threadIdx.x) * run, row.count);
    const int last = min(first + run, row.count);
    U64 mine = 0;
    int ties = 0, all_ties;
    for (int i = first; i < last; ++i) {
        const int k = row.key(i);
        if (k > kept.key)
            mine += row.weight(k);
        else if (k == kept.key)
            ++ties;
    }
    int ties_left = kept.ties - before(ties, counts, all_ties);
    const U64 tie = kept.key < 0 ? 0 : row.weight(kept.key);
    mine += U64(max(min(ties, ties_left), 0)) * tie;
    U64 sum, passed = before(mine, sums, sum);
    const U64 target = __umul64hi(random, sum);
    if (threadIdx.x == 0) *result = -1;
    __syncthreads();
    if (passed <= target && target < passed + mine) {
        for (int i = first; i < last; ++i) {
            const int k = row.key(i);
            if (k > kept.key)
                passed += row.weight(k);
            else if (k == kept.key && ties_left-- > 0)
                passed += tie;
            if (passed > target) {
                *result = i;
                break;
            }
        }
    }
    __syncthreads();
    return *result;
}

__device__ int choose(const Sample<bf16>& p, int slot, int position) {
    __shared__ U64 sums[kWarps];
    __shared__ int counts[kWarps], result;
    Row row{reinterpret_cast<const unsigned short*>(p.logits.data) + slot * p.logits.ld, int(p.logits.cols), 0.f,
            p.inverse_temperature};
    U64 mine = 0;  // the largest logit, of equals the lowest token
    for (int i = threadIdx.x; i < row.count; i += kThreads)
        mine = max(mine, U64(row.key(i)) << 32 | (0xffffffffu - unsigned(i)));
    const U64 top = largest(mine, sums);
    const int greedy = int(0xffffffffu - unsigned(top)), top_key = int(top >> 32);
    if (p.inverse_temperature <= 0.f) return greedy;
    row.top = value_of(top_key);
    Kept kept;
    if (p.top_k > 0 && p.top_k < row.count) kept = keep_count(row, top_key, int(p.top_k), counts);
    if (p.top_p < 1) kept = keep_share(row, top_key, kept, p.top_p, sums);
    const U64 random = rng::bits(p.slots.seed.data[slot], rng::kSampleStream, std::uint64_t(position));
    const int drawn = draw(row, kept, random, counts, sums, &result);
    return drawn < 0 ? greedy : drawn;
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const Sample<bf16> p) {
    const int slot = blockIdx.x, length = p.slots.length.data[slot];
    if (length < 0) {
        if (threadIdx.x == 0) p.sampled.data[slot] = -1;
        return;
    }
    const int token = choose(p, slot, length + 1);
    __syncthreads();  // every thread has read length and seed
    if (threadIdx.x != 0) return;
    const int left = p.slots.left.data[slot];
    const bool ends = token == p.stop || left <= 1;
    p.sampled.data[slot] = p.slots.token.data[slot] = token;
    p.slots.left.data[slot] = left - 1;
    p.slots.length.data[slot] = ends ? -1 : length + 1;
    p.slots.begin.data[slot] = slot - (ends ? 0 : length + 1);
}

}  // namespace
}  // namespace sampling

void sample(const Cuda& cuda, const Sample<bf16>& p) {
    check(p);
    sampling::sample_kernel<<<unsigned(p.slots.count()), sampling::kThreads, 0, stream_of(cuda)>>>(p);
    LAUNCH_CHECK("sample");
}

}  // namespace fiedler
