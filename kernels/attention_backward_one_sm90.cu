// kernels/attention_backward_one_sm90.cu: the backward pass of scalar-distance attention with one scalar for sm_90a; what a
// block does with its tiles is in attention_backward_one_sm90.cuh.
//
// A kernel before makes delta, and puts what a query is about together (OfQueries). A round of the loop has one tile of
// queries and one barrier. At the barrier every warp has
//   * written its weights of the tile, for dv,
//   * begun the product X of the next tile, which needs no other warp,
//   * waited for the product dv of the tile before, whose stage and weights are free from there on.
// After it the loads of a later tile begin, by TMA. dv of this tile begins once X is there, and goes on behind the
// arithmetic of the next tile. So that products begin on one way through the loop alone, which ptxas asks for, the first
// tile has a product dv with weights that are zeros, and the last one begins an X that nobody reads. What can be the same for
// all lanes is asked so that the compiler knows it (a vote): else addresses are made anew in each lane. The warps of a block
// meet where a product begins, too: what one of them does alone, asking for loads, has to be short.
#include "kernels/attention_backward_one_sm90.cuh"
#include "kernels/attention_backward_sm90.h"
#include "kernels/dependent_launch.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
// Not without a name: that would have the path in it, and what ptxas makes of registers depends on names.
namespace attention_backward_one_tile {

struct Problem {
    CUtensorMap gradients, values, results;  // dO, V, dv, [tokens, heads D]
    AttentionBackward<bf16> p;
    BackwardGroups groups;
    const OfQueries* queries;
    int of_sequence;  // groups of keys
    int tiles;        // of queries, of all sequences
};

// Of every token and head: delta = dO . o, and what goes with it. Eight lanes share one.
constexpr int kNumbersThreads = 256, kNumbersTokens = kNumbersThreads / 8;
__global__ void __launch_bounds__(kNumbersThreads)
    attention_numbers_kernel(AttentionBackward<bf16> p, OfQueries* queries) {
    dependents_may_start();
    const int head = static_cast<int>(blockIdx.y), part = static_cast<int>(threadIdx.x) % 8;
    const int token = static_cast<int>(blockIdx.x) * kNumbersTokens + static_cast<int>(threadIdx.x) / 8;
    const auto g = load16(nv(p.do_.data) + token * p.do_.ld + head * kWidth + part * 8);
    const auto o = load16(nv(p.o.data) + token * p.o.ld + head * kWidth + part * 8);
    const std::int64_t number = std::int64_t(token) * p.heads + head;
    float4 x{};
    if (part == 0) {
        x.x = p.lse.data[number], x.z = p.a.data[number], x.w = Keys::scaled_scalar(x.z);
        if (p.F.data != nullptr) x.y = p.F.data[number];
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(to_float(g.v[i]), to_float(o.v[i]), sum);
    for (int i = 4; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    OfQueries& tile = queries[head * std::int64_t(p.seq.tokens / kTile) + token / kTile];
    if (part == 0) {
        *reinterpret_cast<float4*>(&tile.numbers[token % kTile]) = x;
        p.delta.data[number] = sum;
    } else if (part == 1) {
        const auto rounded = [](float y) { return __bfloat162float(__float2bfloat16_rn(y)); };
        const float high = rounded(-sum), rest = -sum - high, middle = rounded(rest);
        *reinterpret_cast<uint4*>(tile.delta + token % kTile * 8) = {pack_bf16(high, middle),
                                                                     pack_bf16(rest - middle, 0.f), 0, 0};
    }
}

// A tile of queries into a stage, dO and what goes with it; and V, with the keys from `key` on. By a warp: all warps wait for
// it at their next product. base: the address of Shared.
__device__ void load_queries(const Problem& problem, std::uint32_t base, unsigned stage, int query, int key = -1) {
    if (!hopper::elected()) return;
    const int head = static_cast<int>(blockIdx.x);
    constexpr int kBytes = kTileElements * 2 + sizeof(OfQueries), kValueBytes = kKeys * kRowBytes;
    const std::uint32_t full = base + std::uint32_t(offsetof(Shared, full)) + stage * unsigned(sizeof(hopper::Barrier));
    hopper::barrier_arrive_expecting(full, key < 0 ? kBytes : kBytes + kValueBytes);
    hopper::load_box(base + stage * unsigned(kTileElements * 2), &problem.gradients, head * kWidth, query * kTile,
                     full);
    hopper::load_bytes(base + std::uint32_t(offsetof(Shared, queries)) + stage * unsigned(sizeof(OfQueries)),
                       problem.queries + (head * std::int64_t(problem.tiles) + query), sizeof(OfQueries), full);
    if (key >= 0)
        hopper::load_box(base + std::uint32_t(offsetof(Shared, values)), &problem.values, head * kWidth, key, full);
}

// The first tiles of queries, a warp each, and V, of a tile of keys; all stages are free.
__device__ void load_first(const Problem& problem, Shared& shared, unsigned n, const Range& range, int first,
                           int warp) {
    static_assert(kStages - 1 <= kThreads / kWarp && offsetof(Shared, gradients) == 0);
    if (warp < int(kStages) - 1 && range.begin + warp < range.end)
        load_queries(problem, shared_address(&shared), (n + warp) % kStages, range.begin + warp,
                     warp == 0 ? first : -1);
}

// The queries of one tile of keys. n: number of its first tile of queries, of those that the block has loaded; then, of the
// next one's. Issue slots are what the loop is short of: numbers that can be are the same for all lanes, as the compiler is
// told, and go from tile to tile instead of being made anew of q and n.
__device__ void add_queries(const Problem& problem, Shared& shared, Keys& keys, unsigned& n, const Range& range,
                            int first, int warp) {
    constexpr unsigned kStageBytes = kTileElements * 2, kWeightBytes = kKeys * kRowBytes;
    const std::uint32_t base = hopper::uniform(shared_address(&shared));  // or it is made anew each time
    // Operands, all from one; bit 16 of it is not for those without swizzle.
    const Operand gradients = (base >> 4) + (1u << 16), weights = gradients + offsetof(Shared, weights) / 16,
                  values = gradients + offsetof(Shared, values) / 16, unswizzled = base >> 4,
                  deltas = unswizzled + (offsetof(Shared, queries) + offsetof(OfQueries, delta)) / 16,
                  ones = unswizzled + offsetof(Shared, ones) / 16 + kOnesStep;
    // One register for four numbers, taken apart anew for each tile: the thread's place in the turned weights; of its two
    // rows, the one whose sum it may store, by 16; whether it does not (bit 1); Shared::again (bit 0).
    std::uint32_t where = (shared_address(shared.weights) + place_of_turned(thread_anew())) << 12 |
                          (first_row(thread_anew()) + (thread_anew() & 1) * 8) << 4 | (thread_anew() & 2) |
                          unsigned(shared.again);
    constexpr std::uint32_t kRow = 0x3f0, kFirstRow = 0x370;
    const auto multiply_x = [&](unsigned stage) {
        multiply_differences(keys.x, gradients + stage * (kStageBytes / 16), values,
                             deltas + stage * unsigned(sizeof(OfQueries) / 16), ones);
    };
    const auto read = [&](unsigned stage) {
        return Keys::read(base, stage * unsigned(sizeof(OfQueries)) + (where & kFirstRow));
    };
    const auto full = [&](unsigned stage) {
        return base + std::uint32_t(offsetof(Shared, full)) + stage * unsigned(sizeof(hopper::Barrier));
    };
    unsigned stage = n % kStages, before = stage;  // of the tile, and of the one before
    hopper::barrier_wait(full(stage), parity_of(n));
    multiply_x(stage);
    Keys::Rows rows = keys.rows(base, read(stage));
    if (problem.p.causal && rows.way < int(Way::careful)) rows.way |= Keys::kOwn;
    int q = range.begin;
    unsigned turned = (q & 1) * kWeightBytes;
    std::uint64_t to = shared.slab + (unsigned(q) * (kTile * 4) + (where & kRow) / 4);
#pragma unroll 1
    do {
        unsigned next = (stage + 1) % kStages;
        asm volatile("" : "+r"(where), "+r"(stage), "+r"(next), "+r"(turned));
        const std::uint32_t place = (where >> 12) + turned;
        float of_rows[2] = {0.f, 0.f};
        hopper::product_wait<0>();
        hopper::pin(keys.x);
        turned ^= kWeightBytes;
        multiply_turned<kKeys>(keys.dv, gradients + before * (kStageBytes / 16), weights + turned / 16);
        ++n;                                                                // the next tile's
        const bool there = hopper::barrier_over(full(next), parity_of(n));  // in most cases, and then nobody waits
        keys.add(of_rows, shared, stage, place, (where & kFirstRow) / 16, problem.p.causal ? q * kTile - first : kTile,
                 rows);
        hopper::publish_shared();  // the weights; it takes a while, in which the next rows are read
        if (!there && q + 1 < range.end) hopper::barrier_wait(full(next), parity_of(n));
        const auto of_next = read(next);
        hopper::product_wait<0>();  // dv began a tile ago
        hopper::pin(keys.dv);
        multiply_x(next);
        // While that goes on, what need not wait for it.
        const float of_pair = sum_of_pair(of_rows);
        rows = keys.rows(base, of_next);
        const float sum = minus_sum_of_pairs(of_pair);
        __syncthreads();
        put_global(to, sum, where & 3);  // here, since publishing waits for what was stored
        to += kTile * 4;
        const unsigned free = (stage + kStages - 1) % kStages;  // of the tile before
        if (q + int(kStages) - 1 < range.end && warp == int(free))
            load_queries(problem, base, free, q + int(kStages) - 1);
        before = stage, stage = next;
    } while (++q < range.end);
    multiply_turned<kKeys>(keys.dv, gradients + before * (kStageBytes / 16), weights + (turned ^ kWeightBytes) / 16);
    hopper::product_wait<0>();
    hopper::pin(keys.dv);
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_one_sm90_kernel(const __grid_constant__ Problem problem) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const AttentionBackward<bf16>& p = problem.p;
    const BackwardGroups& groups = problem.groups;
    dependents_may_start();
    const int head = static_cast<int>(blockIdx.x), z = static_cast<int>(blockIdx.z), of = problem.of_sequence;
    const int sequence = z / of * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y),
              group = sequence * of + z % of;
    if (group >= groups.count) return;
    if (threadIdx.x < sizeof(shared.ones) / sizeof(uint4))  // a row of 8 each
        reinterpret_cast<uint4*>(shared.ones)[threadIdx.x] =
            threadIdx.x / 8 != 0 ? uint4{} : uint4{0x3f803f80u, 0x3f80u, 0, 0};
    hopper::publish_shared();
    if (threadIdx.x == 0) {
        for (unsigned s = 0; s < kStages; ++s) hopper::barrier_init(&shared.full[s], 1);
        hopper::barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned slab = unsigned(group) % unsigned(groups.slabs);
        shared.slab = std::uint64_t(
            __cvta_generic_to_global(groups.partial + slab * groups.slab_floats + std::int64_t(head) * p.seq.tokens));
        shared.again = false;
    }
    int first = group * groups.tiles * kKeys;
    const int warp = hopper::uniform(int(threadIdx.x / kWarp));
    unsigned n = 0;
    wait_for_previous();
    Range range(p, first);
    load_first(problem, shared, n, range, first, warp);
#pragma unroll 1
    for (int left = groups.tiles;;) {
        Keys keys;
        keys.begin(p, shared, Keys::Numbers(p, head, first), range.begin);
        add_queries(problem, shared, keys, n, range, first, warp);
        const int of_keys = first, end = range.end;
        first += kKeys;
        const bool last = --left == 0 || first >= p.seq.tokens;
        if (!last) {  // on their way while the results are stored
            range = Range(p, first);
            load_first(problem, shared, n, range, first, warp);
            if (threadIdx.x == 0) shared.again = range.end == end;
        }
        keys.store(p, &problem.results, shared, head, of_keys);
        if (last) return;
        __syncthreads();
    }
}

}  // namespace attention_backward_one_tile

bool attention_backward_one_sm90_takes(const Cuda& device, const AttentionBackward<bf16>& p) {
    return p.scalars == 1 && attention_backward_sm90_tile::takes(device, p);
}

void attention_backward_one_sm90(const Cuda& device, const AttentionBackward<bf16>& p) {
    using namespace attention_backward_one_tile;
    constexpr int bytes = sizeof(Shared);
    static_assert(kBlocks * (bytes + 1024) <= 227 * 1024);
    auto* queries = reinterpret_cast<OfQueries*>(p.partial.data);
    const auto map = [](const auto& m) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, kTile});
    };
    static_assert(kKeys == kTile);
    const std::int64_t before = attention_numbers_elements(p.seq.tokens, p.heads, kWidth, 1);
    const BackwardGroups groups = groups_of(p, kKeys, before);
    dim3 blocks = blocks_of(p, groups);
    const Problem problem{map(p.do_),          map(p.v), map(p.dv), p, groups, queries, static_cast<int>(blocks.z),
                          p.seq.tokens / kTile};
    // Blocks start in the order x, y, z. Not all sequences at once, or each reads dO from memory anew for every tile of keys.
    constexpr std::int64_t kResident = 24 << 20;  // bytes, half of L2
    const std::int64_t fitting = kResident / (std::int64_t(std::max(p.seq.length, 1)) * p.heads * kWidth * 2);
    const auto together = static_cast<unsigned>(std::clamp<std::int64_t>(fitting, 1, blocks.y));
    blocks.z *= (blocks.y + together - 1) / together, blocks.y = together;
    const auto kernel = attention_backward_one_sm90_kernel;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const dim3 parts(static_cast<unsigned>(p.seq.tokens / kNumbersTokens), static_cast<unsigned>(p.heads));
    attention_numbers_kernel<<<parts, kNumbersThreads, 0, stream_of(device)>>>(p, queries);
    LAUNCH_CHECK("attention_backward_one_sm90, numbers");
    launch_dependent(device, kernel, blocks, kThreads, bytes, problem);
    LAUNCH_CHECK("attention_backward_one_sm90");
    launch_dependent(device, attention_da_kernel<1>, blocks_of_da<1>(p), 256, 0, p, groups, kKeys);
    LAUNCH_CHECK("attention_backward_one_sm90, da");
}

}  // namespace fiedler
