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
// all lanes is asked so that the compiler knows it (a vote): else addresses are made anew in each lane.
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

// Tile n of queries: dO, and V with it, asked for by one thread, of each warp in turn. query: in tiles.
__device__ void load_queries(const Problem& problem, Shared& shared, unsigned n, int query, int key = -1) {
    if (threadIdx.x != n % (kThreads / kWarp) * kWarp) return;
    const unsigned stage = n % kStages;
    const int head = static_cast<int>(blockIdx.x);
    constexpr int kBytes = kTileElements * 2 + sizeof(OfQueries), kValueBytes = kKeys * kRowBytes;
    hopper::Barrier* full = &shared.full[stage];
    hopper::barrier_arrive_expecting(full, key < 0 ? kBytes : kBytes + kValueBytes);
    hopper::load_box(shared.gradients[stage], &problem.gradients, head * kWidth, query * kTile, full);
    hopper::load_bytes(&shared.queries[stage],
                       problem.queries + (head * std::int64_t(problem.p.seq.tokens / kTile) + query), sizeof(OfQueries),
                       full);
    if (key >= 0) hopper::load_box(shared.values, &problem.values, head * kWidth, key, full);
}

// The first tiles of queries, and V, of a tile of keys; all stages are free.
__device__ void load_first(const Problem& problem, Shared& shared, unsigned n, const Range& range, int first) {
    for (int i = 0; i < int(kStages) - 1; ++i)
        if (range.begin + i < range.end) load_queries(problem, shared, n + i, range.begin + i, i == 0 ? first : -1);
}

// The queries of one tile of keys. n: number of its first tile of queries, of those that the block has loaded; then, of the
// next one's.
__device__ void add_queries(const Problem& problem, Shared& shared, Keys& keys, unsigned& n, const Range& range,
                            int first) {
    constexpr int kStageBytes = kTileElements * 2, kWeightBytes = kKeys * kRowBytes;
    const Operand gradients = operand_of(shared.gradients), weights = operand_of(shared.weights),
                  values = operand_of(shared.values);
    const Operand deltas = delta_of(shared.queries[0].delta), ones = ones_of(shared.ones);
    // One register for four numbers, taken apart anew for each tile: the thread's place in the turned weights, whether t is
    // odd, Shared::again, and the first of its rows.
    std::uint32_t where = (shared_address(shared.weights) + place_of_turned(thread_anew())) << 8 |
                          (thread_anew() & 1) << 7 | unsigned(shared.again) << 6 | first_row(thread_anew());
    const std::uint32_t base = __shfl_sync(0xffffffffu, shared_address(&shared), 0);  // or it is made anew each time
    const auto multiply_x = [&](unsigned stage) {
        multiply_differences(keys.x, advance(gradients, stage * kStageBytes), values,
                             advance(deltas, stage * sizeof(OfQueries)), ones);
    };
    hopper::barrier_wait(&shared.full[n % kStages], parity_of(n));
    multiply_x(n % kStages);
    Keys::Rows rows = keys.rows(base, n % kStages, where & 63);
    int q = range.begin;
    unsigned before = n % kStages;  // the stage of the tile before
#pragma unroll 1
    do {
        asm volatile("" : "+r"(where));
        const int turned = (q & 1) * kWeightBytes, row = static_cast<int>(where & 63);
        const unsigned stage = n % kStages, next = (n + 1) % kStages;
        const std::uint32_t place = (where >> 8) + turned;
        float of_rows[2] = {0.f, 0.f};
        hopper::product_wait<0>();
        hopper::pin(keys.x);
        multiply_turned<kKeys>(keys.dv, advance(gradients, before * kStageBytes),
                               advance(weights, kWeightBytes - turned));
        const int shift = problem.p.causal ? q * kTile - first : kTile;
        keys.add(shift == 0, of_rows, shared, stage, place, row, shift, rows);
        const std::uint64_t to = load_address(base + std::uint32_t(offsetof(Shared, slab))) +
                                 (unsigned(q) * (kTile * 4) + unsigned(row) * 4 + (where & 128) / 4);
        float left = 0.f;  // what an earlier tile of keys left in the slab
        if (__any_sync(0xffffffffu, where & 64)) left = load_global(to);  // known to be the same for all lanes
        if (q + 1 < range.end)
            hopper::barrier_wait(base + std::uint32_t(offsetof(Shared, full)) + next * sizeof(hopper::Barrier),
                                 parity_of(n + 1));
        hopper::product_wait<0>();  // dv began a tile ago
        hopper::pin(keys.dv);
        multiply_x(next);
        // While that goes on, what need not wait for it.
        const float of_pair = sum_of_pair(of_rows);
        rows = keys.rows(base, next, where & 63);
        const float sum = sum_of_pairs(of_pair);
        hopper::publish_shared();
        __syncthreads();
        if (!(threadIdx.x & 2)) store_global(to, left - sum);  // here, since publishing waits for what was stored
        if (q + int(kStages) - 1 < range.end) load_queries(problem, shared, n + kStages - 1, q + int(kStages) - 1);
        before = stage, ++n;
    } while (++q < range.end);
    multiply_turned<kKeys>(keys.dv, advance(gradients, before * kStageBytes),
                           advance(weights, ((q - 1) & 1) * kWeightBytes));
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
    unsigned n = 0;
    wait_for_previous();
    Range range(p, first);
    load_first(problem, shared, n, range, first);
#pragma unroll 1
    for (int left = groups.tiles;;) {
        Keys keys;
        keys.begin(p, shared, Keys::Numbers(p, head, first), range.begin);
        add_queries(problem, shared, keys, n, range, first);
        const int of_keys = first, end = range.end;
        first += kKeys;
        const bool last = --left == 0 || first >= p.seq.tokens;
        if (!last) {  // on their way while the results are stored
            range = Range(p, first);
            load_first(problem, shared, n, range, first);
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
    const Problem problem{map(p.do_), map(p.v), map(p.dv), p, groups, queries, static_cast<int>(blocks.z)};
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
