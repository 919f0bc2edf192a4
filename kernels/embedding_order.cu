// kernels/embedding_order.cu: tokens in order, for the gradient of the embedding (see embedding.h).
//
// One launch writes tokens and positions so that equal tokens follow one another, always in the same order: each block
// takes a class of tokens, reads all of them, counts those of the classes before, which is where its own begin, and
// puts its own in order by counting. So the blocks need nothing of each other. Where there are few classes several
// blocks count the same one, and each puts its share of it in order.
#include <algorithm>

#include "kernels/dynamic_shared.cuh"
#include "kernels/embedding_order.cuh"

namespace fiedler {
namespace embedding {
namespace {

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

struct Order {
    std::int32_t *sorted, *positions;
    Run* across;  // [blocks of places]: the run that reaches into a block from the one before; else unset
    uint4* sums;  // [sum_words], to be kNothing
    const std::int32_t* tokens;
    int count, places;  // places: of a block
    std::int64_t sum_words;
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

// Of kOrderBatch x kWarp tokens, those of class `own`: bit k of `hits` is that of token first + k kWarp + lane, and
// `below` counts those of the classes below.
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
    // [kOrderWarps][range], behind it: how many of each token are in each warp's part; then how many in the parts
    // before.
    __device__ int* counts() { return reinterpret_cast<int*>(this + 1); }
    static constexpr int bytes(int range) {
        return int(sizeof(OrderMemory) + sizeof(int) * kOrderWarps * std::size_t(range));
    }
};

// A token is found by its class, so that frequent ones, which often have neighbouring numbers, are spread over the
// blocks.
__global__ __launch_bounds__(kOrderThreads) void order_kernel(const Order a) {
    extern __shared__ __align__(16) unsigned char memory[];
    auto& shared = *reinterpret_cast<OrderMemory*>(memory);
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    const int own = blockIdx.x & ((1 << a.bits) - 1), share = blockIdx.x >> a.bits, shares = gridDim.x >> a.bits;
    const Part part(a, warp);
    int* counts = shared.counts() + warp * a.range;
    for (int i = lane; i < a.range; i += kWarp) counts[i] = 0;
    for (std::int64_t i = blockIdx.x * kOrderThreads + thread; i < a.sum_words; i += gridDim.x * kOrderThreads)
        a.sums[i] = {kNothing, kNothing, kNothing, kNothing};
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
        // The run of each thread's token, for the blocks that it reaches into: the first by the thread, the others by
        // all.
        const int end = first + total, reached = ceil_div(first + 1, a.places);
        if (reached * a.places < end) a.across[reached] = {first, end};
        for (unsigned left = __ballot_sync(kWholeWarp, (reached + 1) * a.places < end); left != 0; left &= left - 1) {
            const int from = __ffs(int(left)) - 1;
            const Run run{__shfl_sync(kWholeWarp, first, from), __shfl_sync(kWholeWarp, end, from)};
            for (int b = ceil_div(run.first + 1, a.places) + 1 + lane; b * a.places < run.end; b += kWarp)
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
// Bits of a token's class.
int class_bits(int vocab) {
    int bits = 0;
    while (1 << bits < kOrderBlocks && 1 << bits < vocab) ++bits;
    while (ceil_div(vocab, 1 << bits) > kRange) ++bits;
    return bits;
}

}  // namespace
}  // namespace embedding

void embedding_order(const Cuda& dev, const EmbeddingOrder& p) {
    using namespace embedding;
    check(p);
    constexpr std::int64_t kMost = std::int64_t(1) << 30;
    FIEDLER_REQUIRE("embedding", p.tokens.size < kMost && p.vocab < kMost);
    if (p.tokens.size == 0) return;
    const int n = int(p.tokens.size), vocab = int(p.vocab);
    const Parts parts(p.scratch.data, n, p.channels);
    Order order{};
    order.sorted = parts.sorted, order.positions = parts.positions, order.across = parts.across;
    order.sums = reinterpret_cast<uint4*>(parts.sums),
    order.sum_words = ceil_div(parts.blocks * p.channels, std::int64_t(4));
    order.tokens = p.tokens.data, order.count = n, order.places = int(parts.places);
    order.bits = class_bits(vocab), order.range = ceil_div(vocab, 1 << order.bits);
    const int shares = std::clamp(kOrderBlocks >> order.bits, 1, kOrderWarps);
    allow_shared<OrderMemory::bytes(kRange)>(order_kernel);
    order_kernel<<<unsigned(shares << order.bits), kOrderThreads, OrderMemory::bytes(order.range), stream_of(dev)>>>(
        order);
    LAUNCH_CHECK("embedding_order");
}

}  // namespace fiedler
