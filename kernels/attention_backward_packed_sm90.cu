// kernels/attention_backward_packed_sm90.cu: the backward pass of scalar-distance attention for sm_90a, several scalars; what
// a block does with its tiles is in attention_backward_packed_sm90.cuh.
//
// A kernel before makes delta, and puts together what queries and keys are about (OfQueries, OfKeys). A round has one tile of
// queries and one barrier, at its end. It begins two products, one behind the other, so that warps meet for both at once: dP
// of the tile, for which it waits, and dv of the tile before, which goes on behind the arithmetic. At the barrier every warp
// has
//   * written its weights of the tile, for dv,
//   * waited for dv of the tile before, whose place and weights are free from there on.
// While the next dP is under way, the sums da go to memory and the loads of the tile after the next begin, by TMA.
#include "kernels/attention_backward_packed_sm90.h"

#include "kernels/attention_backward_packed_sm90.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
// Not without a name: that would have the path in it, and what ptxas makes of registers depends on names.
namespace attention_backward_packed_sm90_tile {

template <int R>
struct Problem {
    CUtensorMap gradients, values, results;  // dO, V, dv, [tokens, heads D]
    AttentionBackward<bf16> p;
    BackwardGroups groups;
    const OfQueries<R>* queries;  // [heads][tiles]
    const OfKeys<R>* keys;
    int pairs, together;  // of sequence and head; of these whose dO stays in L2 together
    int all = kKeys;      // see Keys::add
};

// Of every token and head: delta = dO . o, and what goes with it. Eight lanes share one; a block has a tile of keys.
constexpr int kNumbersThreads = kKeys * 8, kNumbersWarps = kNumbersThreads / kWarp;
// By the block's threads from number `first` on.
template <int first, class T>
__device__ void copy_whole(T& to, const T& from) {
    static_assert(sizeof(T) % 16 == 0);
    for (int i = static_cast<int>(threadIdx.x) - first; i < int(sizeof(T) / 16); i += kNumbersThreads)
        if (i >= 0) reinterpret_cast<uint4*>(&to)[i] = reinterpret_cast<const uint4*>(&from)[i];
}
// As fmaxf over the warp, but that NaN is the largest.
__device__ inline float largest(float x) { return from_ordered(largest_of_warp(x)); }
template <int R>
__global__ void __launch_bounds__(kNumbersThreads, 2048 / kNumbersThreads)
    attention_packed_numbers_kernel(AttentionBackward<bf16> p, OfQueries<R>* queries, OfKeys<R>* keys) {
    dependents_may_start();
    __shared__ float most[kNumbersWarps], tops[kNumbersWarps];
    __shared__ OfQueries<R> tile;  // both go to memory as a whole: what lanes write by themselves is slow in L2
    __shared__ OfKeys<R> of;
    const int head = static_cast<int>(blockIdx.x), part = static_cast<int>(threadIdx.x) % 8;
    const int key = static_cast<int>(threadIdx.x) / 8, token = static_cast<int>(blockIdx.y) * kKeys + key;
    const auto g = load16(nv(p.do_.data) + token * p.do_.ld + head * kWidth + part * 8);
    const auto o = load16(nv(p.o.data) + token * p.o.ld + head * kWidth + part * 8);
    const std::int64_t number = std::int64_t(token) * p.heads + head;
    // Two scalars each of a and b.
    float a[2] = {}, b[2] = {};
    if (part < R / 2) {
        const std::int64_t at = number * p.scalars + 2 * part;
        load_numbers(a, p.a.data + at, p.scalars - 2 * part, whole_scalars<R>(p.a.data, p.scalars));
        load_numbers(b, p.b.data + at, p.scalars - 2 * part, whole_scalars<R>(p.b.data, p.scalars));
    }
    QueryNumbers numbers{};
    float centre = 0.f;
    if (part == 0) numbers.lse = p.lse.data[number];
    if (p.F.data != nullptr) {
        numbers.gate = p.F.data[number];
        centre = p.F.data[number + (kKeys / 2 - key) * p.heads];
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(to_float(g.v[i]), to_float(o.v[i]), sum);
    for (int i = 4; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    const float base = numbers.gate - numbers.lse;  // of part 0
    const bool far =
        !(packs(a[0]) && packs(a[1]) && base < INFINITY && largest_of(g) < kGradientRange && fabsf(sum) < kDeltaRange);
    const float top_of_warp = largest(far ? INFINITY : part == 0 ? base : -INFINITY);
    if (part < R / 2) tile.a[key][part] = pack_half(number_in_units(a[0]), number_in_units(a[1]));
    if (part == 0) p.delta.data[number] = sum, numbers.minus_delta = -sum * kDsUnit;
    // Of two keys each packs one scalar of both.
    const bool odd = key % 2 != 0;
    const float own = number_in_units(odd ? b[1] : b[0]), send = number_in_units(odd ? b[0] : b[1]);
    const float other = __shfl_xor_sync(0xffffffffu, send, 8);
    KeyPair<R>& pair = of.pairs[key / 8][key % 8 / 2];
    if (part < R / 2) pair.b[2 * part + odd] = odd ? pack_half(other, own) : pack_half(own, other);
    const float apart = centre - numbers.gate, of_warp = largest(apart);
    if (part == 0) (&pair.gate.x)[odd] = -apart * kLog2e;
    if (threadIdx.x % kWarp == 0) most[threadIdx.x / kWarp] = of_warp, tops[threadIdx.x / kWarp] = top_of_warp;
    const bool out = __syncthreads_or(!packs(b[0]) | !packs(b[1])) != 0;
    static_assert(kKeys == kTile && kWarp % kNumbersWarps == 0);
    numbers.top = largest(tops[threadIdx.x % kNumbersWarps]);
    if (part == 0) *reinterpret_cast<float4*>(&tile.numbers[key]) = *reinterpret_cast<const float4*>(&numbers);
    if (threadIdx.x == 0) {
        float x = most[0];
#pragma unroll
        for (int w = 1; w < kNumbersWarps; ++w) x = fmaxf(x, most[w]);
        const float faded = p.F.data != nullptr && p.skip ? -(kFaded + x) * kLog2e : -1e30f;  // finite: see Rows::rare
        *reinterpret_cast<float4*>(&of.centre) = make_float4(centre, out ? -INFINITY : faded, 0.f, 0.f);
    }
    __syncthreads();
    const std::int64_t place = head * std::int64_t(p.seq.tokens / kTile) + blockIdx.y;
    copy_whole<0>(queries[place], tile);
    copy_whole<sizeof(tile) / 16 % kNumbersThreads>(keys[place], of);
}

// A warp: the next tile of queries is on its way to a place, and with the first of them V and OfKeys. After the last tile
// nothing comes, and the place counts as filled. base: the address of Shared. It is few instructions of one lane, since all
// warps wait for it at the next product.
template <int R>
__device__ void load_queries(const Problem<R>& problem, Shared<R>& shared, std::uint32_t base, int place) {
    using S = Shared<R>;
    static_assert(offsetof(S, gradients) == 0);
    if (!hopper::elected()) return;
    constexpr int kBytes = kTileElements * 2 + int(sizeof(OfQueries<R>)),
                  kKeyBytes = kKeys * kRowBytes + int(sizeof(OfKeys<R>));
    const std::uint32_t full = base + std::uint32_t(offsetof(S, full)) + place * std::uint32_t(sizeof(hopper::Barrier));
    typename S::Next next = shared.next;
    if (next.left == 0) return hopper::barrier_arrive(full);
    hopper::barrier_arrive_expecting(full, next.begins ? kBytes + kKeyBytes : kBytes);
    hopper::load_box(base + place * std::uint32_t(kTileElements * 2), &problem.gradients, next.column, next.row, full);
    hopper::load_bytes(base + std::uint32_t(offsetof(S, queries)) + place * std::uint32_t(sizeof(OfQueries<R>)),
                       next.queries, sizeof(OfQueries<R>), full);
    if (next.begins) {
        const std::int64_t tiles = problem.p.seq.tokens / kKeys;
        hopper::load_box(base + std::uint32_t(offsetof(S, values)) + next.keys * std::uint32_t(kKeys * kRowBytes),
                         &problem.values, next.column, next.first, full);
        hopper::load_bytes(base + std::uint32_t(offsetof(S, keys)) + next.keys * std::uint32_t(sizeof(OfKeys<R>)),
                           problem.keys + (next.column / kWidth * tiles + next.first / kKeys), sizeof(OfKeys<R>), full);
    }
    next.row += kTile, ++next.queries, next.begins = next.row == next.end;
    if (next.begins) {  // the next keys, and the queries from theirs on
        next.first += kKeys, next.keys ^= 1;
        next.left = next.first < problem.p.seq.tokens ? next.left - 1 : 0;
        const Range range(problem.p, next.first);
        next.queries += range.begin - next.row / kTile;
        next.row = range.begin * kTile, next.end = range.end * kTile;
    }
    shared.next = next;
}

// The block's tiles of queries, one a round.
template <int R>
struct Rounds {
    using S = Shared<R>;
    static constexpr int kStageBytes = kTileElements * 2, kWeightBytes = kKeys * kRowBytes;
    const Problem<R>& problem;
    S& shared;
    std::uint32_t round;  // address of the round's OfRound
    typename Keys<R>::Products dp;
    const Operand operands;  // they are named by the first of them
    const std::uint32_t base;
    const int head, warp;

    __device__ Rounds(const Problem<R>& p, S& s, std::uint32_t b, int h)
        : problem(p),
          shared(s),
          operands(operand_of(s.gradients)),
          round(b + std::uint32_t(offsetof(S, rounds))),
          base(b),
          head(h),
          warp(hopper::uniform(static_cast<int>(threadIdx.x / kWarp))) {}

    __device__ static int before(int place) { return place == 0 ? kPlaces - 1 : place - 1; }
    // What the thread's number tells is loaded each time: registers are short.
    template <int offset>
    __device__ uint4 of_thread() const {
        return hopper::load_four_words<offset>(base + static_cast<std::uint32_t>(thread_anew()) * 16);
    }
    // For the round's tile. The upper four words of its OfRound are given.
    __device__ static void wait_for(const uint4& own) { hopper::barrier_wait(own.y, static_cast<int>(own.z)); }
    __device__ void multiply(Operand gradients, Operand values) {  // dP
        multiply_rows<kKeys>(dp, hopper::uniform(gradients), hopper::uniform(values));
    }
    __device__ void multiply_results(Keys<R>& keys, const uint4& of) {  // dv of the round before
        multiply_turned<kKeys>(keys.dv, hopper::uniform(of.x), hopper::uniform(of.y));
    }
    // Whether they are, in the thread's part of V.
    __device__ static bool values_out_of_range(const nv_bf16 (&values)[kKeys * kWidth]) {
        float most = 0.f;
        const nv_bf16* const from = values + thread_anew() * 8;
#pragma unroll
        for (int i = 0; i < kKeys * kWidth / 8 / kThreads; ++i)
            most = fmaxf(most, largest_of(load16(from + i * kThreads * 8)));
        return !(most < kValueRange);
    }
    // OfRound number i.
    __device__ void tell(int i) const {
        const int place = i % kPlaces;
        shared.rounds[i] = {advance(operands, before(place) * kStageBytes),
                            advance(operands, int(offsetof(S, weights)) + (~i & 1) * kWeightBytes),
                            std::uint32_t(place * sizeof(OfQueries<R>)),
                            std::uint32_t((i & 1) * kWeightBytes),
                            advance(operands, place * kStageBytes),
                            base + std::uint32_t(offsetof(S, full) + place * sizeof(hopper::Barrier)),
                            std::uint32_t(i / kPlaces),
                            base + std::uint32_t(offsetof(S, rounds) + (i + 1) % kRoundNumbers * sizeof(OfRound))};
    }
    // da of the lane into the slab, from `place` on in the tile's. Where an earlier tile of keys left sums, the same thread
    // adds to them, in order.
    __device__ void keep_sums(int q, const float (&da)[4], const uint4& of_block, std::uint32_t place) const {
        if (!Keys<R>::has_sums()) return;
        float* const to = reinterpret_cast<float*>(std::uint64_t(of_block.y) << 32 | of_block.x) +
                          (unsigned(q) * (kTile * R) + place);
        if (q >= static_cast<int>(of_block.z)) {
            if constexpr (R == 2)
                *reinterpret_cast<float2*>(to) = make_float2(da[0], da[2]);
            else
                *reinterpret_cast<float4*>(to) = make_float4(da[0], da[1], da[2], da[3]);
        } else if constexpr (R == 2) {
            asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(da[0]), "f"(da[2])
                         : "memory");
        } else {
            asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(da[0]), "f"(da[1]),
                         "f"(da[2]), "f"(da[3])
                         : "memory");
        }
    }

    // The queries of one tile of keys, the first of which is `first`.
    __device__ void run(Keys<R>& keys, int of_keys, int first, const Range& range) {
        const AttentionBackward<bf16>& p = problem.p;
        // Products begin on one way alone, which ptxas asks for: the first round has a product dv with weights that are zeros.
        const bool second = hopper::load_word<offsetof(OfRound, buffer)>(round) == 0;  // not the round's own
        for (int i = threadIdx.x; i < kWeightBytes / 16; i += kThreads)
            reinterpret_cast<uint4*>(shared.weights[second])[i] = {0, 0, 0, 0};
        uint4 of_round = hopper::load_four_words(round), own = hopper::load_four_words<16>(round);
        wait_for(own);
        if (threadIdx.x == 0) shared.of_values = advance(operands, int(offsetof(S, values)) + of_keys * kWeightBytes);
        if (values_out_of_range(shared.values[of_keys])) shared.keys[of_keys].faded = -INFINITY;
        hopper::publish_shared();
        __syncthreads();
        const OfKeys<R>& of = shared.keys[of_keys];
        int from = p.causal ? first : range.begin * kTile - kTile;  // not causal: all shifts are 64 or more
        int begin = range.begin, end = range.end;
        asm volatile("" : "+r"(from), "+r"(begin), "+r"(end));  // or they are made anew each time
        float da[4] = {};
        uint4 of_block = hopper::load_four_words<offsetof(S, slab)>(base),
              places = of_thread<offsetof(S, threads.places)>(), words = of_thread<offsetof(S, threads.of_lane)>();
#pragma unroll 1
        for (int q = begin; q < end; ++q) {
            multiply(own.x, of_block.w);
            multiply_results(keys, of_round);
            if (q > begin) end_round(q - 1, da, of_block, places.y, of_round.z);
            const OfLane of_lane(words);
            const int row = static_cast<int>(places.x), shift = q * kTile - from;
            const std::uint32_t turned = places.z + of_round.w;
            const OfQueries<R>& queries =
                *reinterpret_cast<const OfQueries<R>*>(reinterpret_cast<const char*>(shared.queries) + of_round.z);
            const typename Keys<R>::Rows rows(of, queries, row);
#pragma unroll
            for (float& x : da) x = 0.f;
            hopper::product_wait<1>();
            hopper::pin(dp);
            if (rows.rare()) {
                if (rows.far())
                    keys.add_far(da, dp, p, of, turned, head, q * kTile, first, row, shift, rows);
                else
                    keys.add_nothing(turned);
            } else if (shift < kKeys) {
                keys.template add<true>(da, dp, of_lane, of, queries, turned, row, shift, rows, problem.all);
            } else {
                keys.template add<false>(da, dp, of_lane, of, queries, turned, row, shift, rows, problem.all);
            }
            // For the next round, before the barrier: so its products begin right after it.
            round = hopper::load_word<offsetof(OfRound, after)>(round);
            of_round = hopper::load_four_words(round), own = hopper::load_four_words<16>(round);
            of_block = hopper::load_four_words<offsetof(S, slab)>(base);
            places = of_thread<offsetof(S, threads.places)>(), words = of_thread<offsetof(S, threads.of_lane)>();
            hopper::product_wait<0>();
            hopper::pin(keys.dv);
            hopper::publish_shared();
            wait_for(own);
            __syncthreads();
        }
        multiply_results(keys, of_round);
        end_round(end - 1, da, of_block, places.y, of_round.z);
        hopper::product_wait<0>();
        hopper::pin(keys.dv);
    }
    // What is left of round q once the next one's products have begun. of_sums: OfThread's place; of_queries: OfRound::place of
    // the next round.
    __device__ void end_round(int q, const float (&da)[4], const uint4& of_block, std::uint32_t of_sums,
                              std::uint32_t of_queries) {
        keep_sums(q, da, of_block, of_sums);
        const int place = int(of_queries / sizeof(OfQueries<R>));
        // One warp after the other, or one were always behind.
        if (warp == place) load_queries(problem, shared, base, (place + 1) % kPlaces);
    }
};

template <int R>
__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_packed_sm90_kernel(const __grid_constant__ Problem<R> problem) {
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared<R>*>(memory);
    const AttentionBackward<bf16>& p = problem.p;
    const BackwardGroups& groups = problem.groups;
    const int pair = static_cast<int>(blockIdx.z) * problem.together + static_cast<int>(blockIdx.x);
    if (pair >= problem.pairs) return;
    const int head = pair % p.heads,
              group = pair / p.heads * static_cast<int>(gridDim.y) + static_cast<int>(blockIdx.y);
    int first = group * groups.tiles * kKeys;
    if (threadIdx.x == 0) {
        const unsigned slab = unsigned(group) % unsigned(groups.slabs);
        shared.slab = groups.partial + slab * groups.slab_floats + std::int64_t(head) * p.seq.tokens * R;
        shared.written = 0;
        const Range range(p, first);
        shared.next = {problem.queries + (head * std::int64_t(p.seq.tokens / kTile) + range.begin),
                       range.begin * kTile,
                       head * kWidth,
                       first,
                       groups.tiles,
                       range.end * kTile,
                       0,
                       true};
        for (int s = 0; s < kPlaces; ++s) hopper::barrier_init(&shared.full[s], 1);
        hopper::barrier_init_done();
    }
    const std::uint32_t base = hopper::uniform(shared_address(&shared));
    Rounds<R> rounds(problem, shared, base, head);
    if (rounds.warp == 0) {  // the others do nothing that memory shows before these loads have come
        __syncwarp();
        wait_for_previous();
        load_queries(problem, shared, base, 0), load_queries(problem, shared, base, 1);
    }
    for (int i = threadIdx.x; i < kTileElements / 8; i += kThreads)  // what has not come goes times zero
        reinterpret_cast<uint4*>(shared.gradients[kPlaces - 1])[i] = {0, 0, 0, 0};
    shared.threads.template make<R>(threadIdx.x, shared_address(shared.weights));
    if (threadIdx.x < kRoundNumbers) rounds.tell(static_cast<int>(threadIdx.x));
    hopper::publish_shared();
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < groups.tiles && first < p.seq.tokens; ++k, first += kKeys) {
        const Range range(p, first);
        Keys<R> keys;
        rounds.run(keys, k & 1, first, range);
        keys.store(p, &problem.results, shared, head, first);
        if (threadIdx.x == 0) shared.written = max(shared.written, range.end);
    }
}

// Blocks of so many (sequence, head) pairs run together that their dO is so many bytes. More than stays in L2: on an H200
// what that costs is less than what blocks of the longest columns first, of all pairs, save (eight scalars, 32 x 1,024
// tokens: 4 % longer with a quarter).
constexpr std::int64_t kResident = 64 << 20;
template <int R>
void launch_for(const Cuda& device, const AttentionBackward<bf16>& p) {
    constexpr int bytes = sizeof(Shared<R>);
    static_assert(kBlocks * (bytes + 1024) <= 227 * 1024);
    auto* queries = reinterpret_cast<OfQueries<R>*>(p.partial.data);
    const auto map = [](const auto& m, cuuint32_t rows) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, rows});
    };
    const std::int64_t before = attention_numbers_elements(p.seq.tokens, p.heads, kWidth, p.scalars);
    auto* keys = reinterpret_cast<OfKeys<R>*>(queries + std::int64_t(p.heads) * (p.seq.tokens / kTile));
    const BackwardGroups groups = groups_of(p, kKeys, before);
    const int of_sequence = groups.per_sequence > 0 ? groups.per_sequence : groups.count,
              pairs = groups.count / of_sequence * p.heads;
    const std::int64_t fitting = kResident / (std::int64_t(p.seq.length) * kWidth * 2);
    const int together = static_cast<int>(std::clamp<std::int64_t>(fitting, 1, pairs));
    const Problem<R> problem{map(p.do_, kTile), map(p.v, kKeys), map(p.dv, kKeys), p, groups, queries, keys, pairs,
                             together};
    const auto kernel = attention_backward_packed_sm90_kernel<R>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const dim3 parts(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.seq.tokens / kKeys));
    attention_packed_numbers_kernel<R><<<parts, kNumbersThreads, 0, stream_of(device)>>>(p, queries, keys);
    LAUNCH_CHECK("attention_backward_packed_sm90, numbers");
    const dim3 grid_of_pairs(static_cast<unsigned>(together), static_cast<unsigned>(of_sequence),
                             static_cast<unsigned>(ceil_div(pairs, together)));
    launch_dependent(device, kernel, grid_of_pairs, kThreads, bytes, problem);
    LAUNCH_CHECK("attention_backward_packed_sm90");
    launch_dependent(device, attention_da_kernel<R>, blocks_of_da<R>(p), 256, 0, p, groups, kKeys);
    LAUNCH_CHECK("attention_backward_packed_sm90, da");
}

}  // namespace attention_backward_packed_sm90_tile

bool attention_backward_packed_sm90_takes(const Cuda& device, const AttentionBackward<bf16>& p) {
    return p.scalars >= 2 && p.scalars <= 8 && attention_backward_sm90_tile::takes(device, p);
}

void attention_backward_packed_sm90(const Cuda& device, const AttentionBackward<bf16>& p) {
    using namespace attention_backward_packed_sm90_tile;
    with_padded_scalars(p.scalars, [&](auto scalars) { launch_for<decltype(scalars)::value>(device, p); });
}

}  // namespace fiedler
