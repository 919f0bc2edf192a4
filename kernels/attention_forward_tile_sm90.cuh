// kernels/attention_forward_tile_sm90.cuh: what both kernels of the forward pass of scalar-distance attention for sm_90a
// share, that of one scalar (attention_forward_sm90.cu) and that of several (attention_forward_packed_sm90.cu).
//
// A block is one warpgroup and owns 128 queries of a head, two products of 64 rows; tiles of 128 keys stream through it:
//     o, r += P [V 1]  [64, 72]    A: P, from registers; B: V, 16 keys of 64 columns as they lie in memory, and beside it
//                                  ones, for the sums of the rounded weights
// Of the 64 queries of a product, each warp has 16 (Rows::place); a thread holds rows g and g + 8 of these and, of each 8
// columns, 2t and 2t + 1.
//
// Tiles come latest first, so that the queries' own tokens come before those that the gate may have closed: a thread asks
// TMA for values and what goes with them two tiles ahead, into a ring of three stages; warps tell each other that a stage
// is free, and meet nowhere else but in their products and at the end.
#pragma once
#include <algorithm>

#include "kernels/attention_forward_stage.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/hopper.cuh"
#include "kernels/tensor_map.h"

namespace fiedler::attention_forward_of_128 {

using namespace attention_tile;
using attention_forward_tile::from_ordered;
using attention_forward_tile::largest_of_warp;

constexpr int kWidth = 64, kQueries = 128, kKeys = 128, kProducts = kQueries / 64, kStages = 3,
              kWarps = kThreads / kWarp;
constexpr std::uint32_t kTwoOnes = 0x3f803f80u;  // bf16

// The tiles of keys that a block sees, in its order: number k is `last` - k of the token axis. Stored: what a first kernel
// made of 128 tokens of a head; it has `keys`, or is what lies in the stages itself.
template <class Stored>
struct Tiles {
    const Stored* data;  // of the head and the token axis' first tile
    const CUtensorMap* values;
    int heads, head, last, count;
    int first;  // token of the block's queries

    __device__ const Stored& operator()(int k) const { return data[std::int64_t(last - k) * heads]; }
    __device__ int first_token(int k) const { return (last - k) * kKeys; }
};

template <class Stored>
struct ForwardProblem {
    CUtensorMap values, results;  // V and o, [tokens, heads D]
    AttentionForward<bf16> p;
    const Stored* tiles;
    int sequences, together;  // (sequence, head) pairs whose V stays in L2 together
};

// ---- a thread's part of the block's queries ----------------------------------------------------------------------
// kOpposite: of the second product's rows, warps have the 16s in the opposite order.
template <bool kOpposite>
struct Rows {
    static __device__ int warp() { return attention_forward_tile::thread_number() / kWarp; }
    static __device__ int lane() { return attention_forward_tile::thread_number() % kWarp; }
    // Which 16 of the product's rows the warp has.
    static __device__ int place(int m) { return kOpposite && m != 0 ? kWarps - 1 - warp() : warp(); }
    static __device__ int row(int m, int k) { return 64 * m + 16 * place(m) + 8 * k + lane() / 4; }
};

// Sums of its queries. Shared has values, ones, and of each query
//   sum     for lse: what the sum of the rounded weights lacks of that of the weights; with a running maximum, all of it
//   tops()  the running maximum, of a query that has one
template <class Shared, bool kOpposite>
struct OutputSums : Rows<kOpposite> {
    using Rows<kOpposite>::lane;
    using Rows<kOpposite>::place;
    using Rows<kOpposite>::row;
    static constexpr int M = kProducts;
    using Weights = float[2][4];  // of 16 queries and 16 keys: two C tiles
    using Packed = std::uint32_t[4];
    using Sums = float[2];  // of the thread's two rows of a product

    Shared& shared;
    std::uint32_t base;     // the address of Shared
    float o[M][9][4] = {};  // [8]: sums of the rounded weights

    __device__ OutputSums(Shared& s, std::uint32_t base_) : shared(s), base(base_) {}
    __device__ float (&products(int m))[36] { return reinterpret_cast<float(&)[36]>(o[m]); }
    // Sums may be read and written.
    __device__ void wait() {
        hopper::product_wait<0>();
#pragma unroll
        for (int m = 0; m < M; ++m) hopper::pin(products(m));
    }
    // lse, and the outputs into shared memory as TMA stores them. careful: the maximum ran. shift: of query i, what its
    // weights are relative to.
    template <class Shift>
    __device__ void finish(const AttentionForward<bf16>& p, int head, int first, bool careful, const Shift& shift) {
        // Of the four rows that four lanes share, each has one.
        const int of_warp = lane(), which = of_warp % 4, i = row(which / 2, which % 2);
        float rounded = o[0][8][0];
        if (which == 1) rounded = o[0][8][2];
        if (which == 2) rounded = o[1][8][0];
        if (which == 3) rounded = o[1][8][2];
        const float total = careful ? shared.sum[i] : shared.sum[i] + rounded;
        p.lse.data[std::int64_t(first + i) * p.lse.ld + head] = attention_forward_tile::lse_of(total, shift(i));
        __syncthreads();  // the products of all warps are over: values become results
        const int matrix = of_warp / 8, of_16 = matrix % 2 * 8 + of_warp % 8,
                  at = kOpposite ? 0 : 16 * place(0) + of_16;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const float scale[2] = {__fdividef(1.f, o[m][8][0]), __fdividef(1.f, o[m][8][2])};
            const int to = kOpposite ? 64 * m + 16 * place(m) + of_16 : at + 64 * m;  // place() is read anew each time
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const auto pack = [&](int column, int k) {
                    return pack_bf16(o[m][column][2 * k] * scale[k], o[m][column][2 * k + 1] * scale[k]);
                };
                const int piece = (n + matrix / 2) ^ to % 8;
                hopper::store_matrices(shared.values[0] + to * kWidth + piece * 8, pack(n, 0), pack(n, 1),
                                       pack(n + 1, 0), pack(n + 1, 1));
            }
        }
    }

  protected:
    // Sums of whole rows.
    __device__ void keep_sums(int m, const Sums& x) {
        if (lane() % 4 == 0)
#pragma unroll
            for (int k = 0; k < 2; ++k) shared.sum[row(m, k)] = x[k];
        __syncwarp();
    }
    // What the sums of the rounded weights of a product have: before any but those of its own keys.
    __device__ void keep_own_sums(int m, Sums& sum) {
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[k] = row_sum(sum[k]) - o[m][8][2 * k];
        keep_sums(m, sum);
    }
    // Begins the products from `from` on with 16 keys' values; of number m they are `apart` m times 16 tokens further on.
    template <int from, int apart = 0>
    __device__ void multiply_chunk(const Packed (&packed)[M], int stage, int chunk) {
        static_assert(offsetof(Shared, values) == 0);
        constexpr int kBytes = sizeof(Shared::values[0]);
        const std::uint32_t b = hopper::beside_low(base + stage * kBytes, offsetof(Shared, ones) - stage * kBytes) +
                                chunk * hopper::kBesideStep;
        hopper::product_begin();
#pragma unroll
        for (int m = from; m < M; ++m)
            hopper::multiply_registers(products(m), packed[m],
                                       hopper::kBesideLayout | (b + m * apart * hopper::kBesideStep), true);
        hopper::product_commit();
    }
    // The keys of 16 that a query does not see. beyond: by how many 16 tokens they are past the warp's 16 queries.
    __device__ static void hide(Weights& w, int beyond, float nothing) {
        const int of = lane(),
                  last = of / 4 - of % 4 * 2 - 16 * beyond;  // of the thread's columns, that its first row sees
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (e / 4 * 8 + e % 2 > last + e % 4 / 2 * 8) w[e / 4][e % 4] = nothing;
    }
    // Scores of 16 keys, with the running maximum.
    template <int m>
    __device__ void add_scores(Weights& s, int stage, int chunk, bool diagonal) {
        if (diagonal) hide(s, chunk - 4 * m - place(m), -INFINITY);
        Sums sum = {}, before;
        soften<m>(before, s);
        multiply_in_warp<m>(s, sum, stage, chunk);
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[k] = before[k] + row_sum(sum[k]);
        keep_sums(m, sum);
    }
    // Scores to weights relative to the running maximum; all sums follow it, those of weights to `before`.
    template <int m>
    __device__ void soften(Sums& before, Weights& s) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float rescale = soften_row(s, k, shared.tops()[row(m, k)]);
            before[k] = shared.sum[row(m, k)] * rescale;
#pragma unroll
            for (int n = 0; n < 9; ++n) o[m][n][2 * k] *= rescale, o[m][n][2 * k + 1] *= rescale;
        }
    }
    // Adds weights to their sums and, rounded, times 16 keys' values, at once: no product of the warpgroup may be open.
    template <int m>
    __device__ void multiply_in_warp(const Weights& w, Sums& sum, int stage, int chunk) {
        Packed packed;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float first = w[i / 2][i % 2 * 2], second = w[i / 2][i % 2 * 2 + 1];
            sum[i % 2] += first;
            sum[i % 2] += second;
            packed[i] = pack_bf16(first, second);
        }
        const int of = lane();
        const nv_bf16* from = shared.values[stage] + (16 * chunk + of % 16) * kWidth;
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            std::uint32_t b[4];
            ldmatrix_x4_trans(b, from + ((n + of / 16) ^ of % 8) * 8);
            mma_bf16(o[m][n], packed, b[0], b[1]);
            mma_bf16(o[m][n + 1], packed, b[2], b[3]);
        }
        mma_bf16(o[m][8], packed, kTwoOnes, kTwoOnes);
    }
};

// ---- a block's tiles ---------------------------------------------------------------------------------------------
// Way, what a kernel has of its own:
// base: the address of Shared.
//   Shared      values, keys, ones, sum, tiles, full, empty; of(base): what all weights of the block are relative to,
//               with `reach`: keys with F_j beyond that + kFaded are nothing
//   Queries     OutputSums with add(stage, by), add_diagonal(stage, by), add_carefully(p, head, stage, first, diagonal)
//   kLooksAhead whether the next tile is looked at, and the one after it asked for, while the last products of a tile run:
//               add(stage, by, meanwhile) then calls meanwhile(). For long tiles. Queries has kRaisesAhead then:
//               whether raise_gates(stage, by) goes with the look, so that add() begins without it
//   Stored      of 128 tokens of a head, as a first kernel made it; keys(stored): what goes to a stage's Shared::keys
//   Numbers     of a tile; numbers(base, stage); least(numbers), least(keys): its least F
//   bounded(of, numbers)                           whether weights may be relative to `of`
//   by(of, numbers)                                what Queries::add and add_diagonal take beside the stage
//   begin_carefully(queries, p, tiles, summed)     from here on the maximum runs
//   load_own(shared, full), kOwnBytes              what comes with the first tile

// Thread 0: tile k of the first is on its way.
template <class Way>
__device__ void load(typename Way::Shared& shared, int k) {
    const auto& tiles = shared.tiles;
    hopper::Barrier* full = &shared.full[k];
    constexpr int kBytes = sizeof(shared.keys[0]) + sizeof(shared.values[0]), kOwnBytes = Way::kOwnBytes;
    hopper::barrier_arrive_expecting(full, kOwnBytes > 0 && k == 0 ? kBytes + kOwnBytes : kBytes);
    hopper::load_box(shared.values[k], tiles.values, tiles.head * kWidth, tiles.first_token(k), full);
    hopper::load_bytes(&shared.keys[k], &Way::keys(tiles(k)), sizeof(shared.keys[0]), full);
    if constexpr (kOwnBytes > 0)
        if (k == 0) Way::load_own(shared, full);
}
// A later one, into `stage`, by a warp; without values where nothing of it counts. All warps of the block wait for this one
// at their next product: few instructions, and one lane that the compiler knows to be one.
template <class Way, class Stored>
__device__ void load(std::uint32_t base, const ForwardProblem<Stored>& problem, const Stored* from, int head, int token,
                     int stage, bool with_values) {
    using Shared = typename Way::Shared;
    constexpr int kBytes = sizeof(Shared::keys[0]), kValueBytes = sizeof(Shared::values[0]);
    if (!hopper::elected()) return;
    const std::uint32_t full = base + std::uint32_t(offsetof(Shared, full)) + stage * unsigned(sizeof(hopper::Barrier));
    hopper::barrier_arrive_expecting(full, with_values ? kBytes + kValueBytes : kBytes);
    if (with_values)
        hopper::load_box(base + stage * unsigned(kValueBytes), &problem.values, head * kWidth, token, full);
    hopper::load_bytes(base + std::uint32_t(offsetof(Shared, keys)) + stage * unsigned(kBytes), &Way::keys(*from),
                       kBytes, full);
}

// Thread 0: tiles and barriers. sequence: its first tile. Returns the number of tiles.
template <class Way, class Stored>
__device__ int begin_tiles(typename Way::Shared& shared, const ForwardProblem<Stored>& problem, int head, int first,
                           int sequence, int in_sequence, int of_sequence) {
    const int count = problem.p.causal ? in_sequence + 1 : of_sequence;
    shared.tiles = {problem.tiles + head, &problem.values, problem.p.heads, head, sequence + count - 1, count, first};
    for (int i = 0; i < kStages; ++i)
        hopper::barrier_init(&shared.full[i], 1), hopper::barrier_init(&shared.empty[i], kWarps);
    hopper::barrier_init_done();
    return count;
}
// Thread 0: the first tiles are on their way; returns the least gate of the third.
template <class Way>
__device__ float load_first(typename Way::Shared& shared, const int& count) {
    wait_for_previous();  // what the kernel before made; what other threads read is older
    // Causal: no query is far from itself; otherwise there is no gate. The second tile's values come in any case, too:
    // whether they count would have to be waited for.
    load<Way>(shared, 0);
    if (count > 1) load<Way>(shared, 1);
    return count > 2 ? Way::least(Way::keys(shared.tiles(2))) : 0.f;
}

// What finish() has left in shared memory goes to memory.
template <class Way, class Stored>
__device__ void store_results(typename Way::Shared& shared, const ForwardProblem<Stored>& problem) {
    const auto& tiles = shared.tiles;
    hopper::publish_shared();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
        for (int m = 0; m < kProducts; ++m) {
            const int row = Way::Queries::row(m, 0);  // of lane 0: the warp's first of the product
            hopper::store_box(&problem.results, tiles.head * kWidth, tiles.first + row,
                              shared.values[0] + row * kWidth);
        }
        hopper::store_wait();
    }
}

// All tiles, and the results. loads: of the first warp. least: of the third tile, thread 0. faded: kFaded, or infinity where
// all count. What can be the same for all lanes is asked so that the compiler knows it: counters and addresses then need
// neither registers of a thread nor many instructions.
template <class Way, class Stored>
__device__ void attend(typename Way::Shared& shared, const ForwardProblem<Stored>& problem, bool loads, float least,
                       float faded) {
    using Shared = typename Way::Shared;
    const AttentionForward<bf16>& p = problem.p;
    const auto& tiles = shared.tiles;
    const std::uint32_t base = hopper::uniform(shared_address(&shared));
    const std::uint32_t full = base + std::uint32_t(offsetof(Shared, full)),
                        empty = base + std::uint32_t(offsetof(Shared, empty));
    constexpr unsigned kBarrier = sizeof(hopper::Barrier);
    const int count = hopper::uniform(tiles.count), last = hopper::uniform(tiles.last),
              head = hopper::uniform(tiles.head), loader = hopper::uniform(int(loads));
    least = __shfl_sync(0xffffffffu, least, 0);
    typename Way::Queries queries(shared, base);
    const auto counts = [=](float reach, float least_of) { return !(reach - least_of < -faded); };
    const auto any = [](bool x) { return __any_sync(0xffffffffu, x) != 0; };
    int k = 0, stage = 0, parity = 0;  // the tile, its place in the ring
    const auto tile = [&] {            // its numbers, when it is there
        hopper::barrier_wait(full + stage * kBarrier, parity);
        return Way::numbers(base, stage);
    };
    const auto ask = [&](float reach) {  // for the tile after the next, where the one before was
        static_assert(kStages == 3);
        if (loader == 0 || k + 2 >= count) return;
        const int ahead = last - k - 2, before = stage == 0 ? kStages - 1 : stage - 1;
        const bool with_values = any(counts(reach, least));
        const Stored* const from = problem.tiles + (std::int64_t(ahead) * p.heads + head);
        if (k + 3 < count) least = Way::least(Way::keys(from[-p.heads]));
        hopper::barrier_wait(empty + before * kBarrier, stage == 0 ? parity ^ 1 : parity);  // k = 0: at once
        load<Way>(base, problem, from, head, ahead * kKeys, before, with_values);
    };
    const auto done = [&] {
        __syncwarp();
        if (hopper::elected()) hopper::barrier_arrive(empty + stage * kBarrier);
        if (++stage == kStages) stage = 0, parity ^= 1;
        ++k;
    };
    if (p.causal) {
        const auto of_tile = tile();
        const auto of = Way::of(base);
        if (any(Way::bounded(of, of_tile))) {
            ask(of.reach);
            queries.add_diagonal(stage, Way::by(of, of_tile));
            done();
        }
    }
    if (!p.causal || k > 0) {  // a loop of its own: products in a row want that nothing else changes their sums in it
        if constexpr (Way::kLooksAhead) {
            bool seen = false, over = k >= count;  // of tile k; over: the careful way begins, or nothing is left
            float by = 0.f, reach = 0.f;
            const auto look = [&](int at, int parity_of_it) {
                hopper::barrier_wait(full + at * kBarrier, parity_of_it);
                const auto of_tile = Way::numbers(base, at);
                const auto of = Way::of(base);
                seen = any(counts(of.reach, Way::least(of_tile)));
                over = any(seen & !Way::bounded(of, of_tile));
                by = Way::by(of, of_tile), reach = of.reach;
                if constexpr (Way::Queries::kRaisesAhead)
                    if (seen) queries.raise_gates(at, by);
            };
            if (!over) look(stage, parity);
#pragma unroll 1
            for (; !over; done()) {
                const auto meanwhile = [&] {
                    ask(reach);
                    const bool turns = stage + 1 == kStages;
                    if (k + 1 < count)
                        look(turns ? 0 : stage + 1, turns ? parity ^ 1 : parity);
                    else
                        over = true;
                };
                if (seen)
                    queries.add(stage, by, meanwhile);
                else
                    meanwhile();
            }
        } else {
#pragma unroll 1
            for (; k < count; done()) {
                const auto of_tile = tile();
                const auto of = Way::of(base);
                const bool seen = any(counts(of.reach, Way::least(of_tile)));
                if (any(seen & !Way::bounded(of, of_tile))) break;
                ask(of.reach);
                if (seen) queries.add(stage, Way::by(of, of_tile));
            }
        }
    }
    const bool careful = k < count;
    if (careful) {
        Way::begin_carefully(queries, p, tiles, k > 0);
#pragma unroll 1
        for (; k < count; done()) {
            const float reach = Way::of(base).reach;
            ask(reach);
            if (any(counts(reach, Way::least(tile()))))
                queries.add_carefully(p, tiles.head, stage, tiles.first_token(k), p.causal && k == 0);
        }
    }
    queries.finish(p, tiles.head, tiles.first, careful);
    store_results<Way>(shared, problem);
}

// ---- launch ------------------------------------------------------------------------------------------------------

// Bytes of V of the (sequence, head) pairs that go together. On an H200 what V costs when it does not stay in L2 is less than
// what blocks of the longest rows first, of all pairs, save (one scalar, 32 x 1,024 tokens: 6 % longer with 8 MiB).
constexpr std::int64_t kResident = 64 << 20;

// Can both kernels' shapes be had?
inline bool takes(const Cuda& device, const AttentionForward<bf16>& p, std::size_t alignment) {
    return device.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth && p.window == 0 && p.seq.length > 0 &&
           p.seq.length % kQueries == 0 && p.seq.tokens / kKeys < 65536 &&  // blocks of a grid along y
           p.scratch.size >= attention_forward_scratch_elements(p.v.rows, p.heads, p.scalars) &&
           reinterpret_cast<std::uintptr_t>(p.scratch.data) % alignment == 0;
}
// first: makes Stored of 128 tokens of a head a block. kernel: the pass itself, `blocks` of which fit on a multiprocessor.
template <class Way, int blocks, class Stored, class First, class Kernel>
void launch(const Cuda& device, const AttentionForward<bf16>& p, Stored* tiles, First first, Kernel kernel) {
    using Shared = typename Way::Shared;
    constexpr int kBytes = offsetof(Shared, empty) + sizeof(Shared::empty);  // sizeof() ends at a multiple of 1024
    static_assert(blocks * (kBytes + 1024) <= 227 * 1024);
    const auto map = [](const auto& m, cuuint32_t rows) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, rows});
    };
    const dim3 grid(static_cast<unsigned>(p.heads), static_cast<unsigned>(p.seq.tokens / kKeys));
    first<<<grid, kKeys, 0, stream_of(device)>>>(p, tiles);
    LAUNCH_CHECK("attention_forward_sm90, keys");
    // As Order::of of the other architectures.
    const std::int64_t pairs = std::int64_t(p.seq.count) * p.heads;
    const std::int64_t fitting = kResident / (std::int64_t(p.seq.length) * kWidth * 2);
    const ForwardProblem<Stored> problem{
        map(p.v, kKeys), map(p.o, 16), p,
        tiles,           p.seq.count,  static_cast<int>(std::clamp<std::int64_t>(fitting, 1, pairs))};
    const dim3 grid_of_pairs(static_cast<unsigned>(problem.together), static_cast<unsigned>(p.seq.length / kQueries),
                             static_cast<unsigned>(ceil_div(pairs, std::int64_t(problem.together))));
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    launch_dependent(device, kernel, grid_of_pairs, kThreads, kBytes, problem);
    LAUNCH_CHECK("attention_forward_sm90");
}

}  // namespace fiedler::attention_forward_of_128
