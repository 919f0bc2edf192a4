// kernels/dot_sm90.cuh: what the kernels of dot_sm90.cu share: which rows a block owns, the tiles that stream past them,
// and products of a warpgroup.
//
// A warpgroup owns a tile of 64 rows of the score matrix of one head, 16 a warp, as operands in registers; a block is up to
// kGroups of them, neighbours of one sequence. Tiles of 64 columns stream through a ring of stages in shared memory. The
// first warpgroup asks TMA for them; each warp tells when it is done with a stage, and the warpgroups meet nowhere else.
// A thread holds rows g and g + 8 of its warp's 16 and, of each 8 columns, 2t and 2t + 1 (hopper.cuh).
#pragma once
#include "kernels/dot.h"
#include "kernels/dot_tile.cuh"
#include "kernels/warpgroup_tile.cuh"

namespace fiedler::dot_sm90_tile {

using namespace warpgroup_tile;

constexpr int kTile = 64, kWidth = 64, kTileElements = kTile * kWidth, kTileBytes = kTileElements * 2;
constexpr int kGroupThreads = hopper::kWarpgroup, kGroupWarps = kGroupThreads / kWarp;

using Sums = float[8][4];              // 64 x 64 of a warpgroup: this thread's
using Operands = std::uint32_t[4][4];  // the same, rounded: A of four steps of 16
__device__ inline float (&flat(Sums& s))[32] { return reinterpret_cast<float(&)[32]>(s); }

// ---- which rows and columns ----------------------------------------------------------------------------------------

// The score matrix cut into blocks. Within a batch of (sequence, head) pairs, whose columns stay in L2 together, those
// blocks start first that see the most.
struct Cut {
    int pairs, heads, tiles, together;  // tiles of a sequence; pairs of a batch
    bool causal;

    static Cut of(const Packed& seq, int heads, bool causal) {
        constexpr std::int64_t kResident = 12 << 20;  // bytes, a quarter of L2
        const std::int64_t fitting = kResident / (std::int64_t(seq.length) * kWidth * 4);
        const std::int64_t pairs = std::int64_t(seq.tokens / seq.length) * heads;
        return {int(pairs), heads, seq.length / kTile, int(std::clamp<std::int64_t>(fitting, 1, pairs)), causal};
    }
    template <int kGroups>
    unsigned grid() const {
        return unsigned(pairs) * unsigned(ceil_div(tiles, kGroups));
    }
};

// A warpgroup's rows and the columns that stream past its block. Causal: the warpgroup's own tokens are the first tile
// that it does not skip, the only one with hidden pairs.
struct Stream {
    int head, groups;        // groups: warpgroups of the block that have rows
    int rows;                // token of the warpgroup's first row
    int first, step, count;  // tile k of columns begins at token first + k step
    int skipped;             // tiles at the beginning that the warpgroup does not see

    template <int kGroups, bool kKeyRows>
    __device__ static Stream of(const Cut& cut, int group) {
        const int blocks = ceil_div(cut.tiles, kGroups), batch = static_cast<int>(blockIdx.x) / (cut.together * blocks);
        const int before = batch * cut.together, size = min(cut.together, cut.pairs - before);
        const int rest = static_cast<int>(blockIdx.x) - before * blocks, pair = before + rest % size;
        // A block that is not full is that which sees the least, and the last to start. groups is not end - begin: ptxas 13.0
        // computes that from the end that causality has not changed yet or from the changed one, as it happens.
        const int before_it = rest / size * kGroups, groups = min(kGroups, cut.tiles - before_it);
        const int begin = kKeyRows ? before_it : cut.tiles - before_it - groups, end = begin + groups;
        const int sequence = pair / cut.heads * cut.tiles * kTile;
        Stream s{pair % cut.heads, groups, sequence + (begin + group) * kTile, sequence, kTile, cut.tiles, 0};
        if (!cut.causal) return s;
        if (kKeyRows) {
            s.first += begin * kTile, s.count -= begin, s.skipped = group;
        } else {
            s.first += (end - 1) * kTile, s.step = -kTile, s.count = end, s.skipped = groups - 1 - group;
        }
        return s;
    }
    __device__ int token(int k) const { return first + k * step; }
};

// Hides what causality hides of the tile with a warpgroup's own tokens: columns are keys beyond the row, or queries
// before it.
template <bool kKeyRows>
__device__ void hide(Sums& s) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % kGroupWarps;
    const int beyond = lane % 4 * 2 - (warp * 16 + lane / 4);  // column - row
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int distance = beyond + 8 * n + e % 2 - e / 2 * 8;
            if (kKeyRows ? distance < 0 : distance > 0) s[n][e] = -INFINITY;
        }
}

// ---- the ring of stages --------------------------------------------------------------------------------------------

template <int kStages>
struct Ring {
    int stage, parity = 0;
    __device__ explicit Ring(int tile) : stage(tile) {}  // of the first tiles
    __device__ void step() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// kNumbers: each stage also has the lse and delta of its columns.
template <int kGroups, int kOwn, int kStageCount, bool kNumbers>
struct alignas(hopper::kTileAlignment) Shared {
    static constexpr int kStages = kStageCount;
    static constexpr bool has_numbers = kNumbers;
    nv_bf16 own[kOwn][kGroups * kTileElements];  // the rows' operands; at the end results
    nv_bf16 stages[kStages][2][kTileElements];
    float numbers[kNumbers ? kStages : 1][2][kTile];
    hopper::Barrier own_full, full[kStages], empty[kStages];

    // Ends with a barrier of the block. groups: those that have rows.
    __device__ void begin(int groups) {
        if (threadIdx.x == 0) {
            hopper::barrier_init(&own_full, 1);
            for (int i = 0; i < kStages; ++i) {
                hopper::barrier_init(&full[i], kNumbers ? 1 + kGroupThreads : 1);
                hopper::barrier_init(&empty[i], groups * kGroupWarps);
            }
            hopper::barrier_init_done();
        }
        __syncthreads();
    }
    // This warp needs the stage no more.
    __device__ void release(int stage) {
        __syncwarp();
        if (threadIdx.x % kWarp == 0) hopper::barrier_arrive(&empty[stage]);
    }
    // Thread 0: the block's own rows of each of kOwn matrices.
    template <class Map>
    __device__ void load_own(const Map& of, const Stream& stream, int first) {
        hopper::barrier_arrive_expecting(&own_full, kOwn * stream.groups * kTileBytes);
        for (int i = 0; i < kOwn; ++i)
            for (int g = 0; g < stream.groups; ++g)
                hopper::load_box(own[i] + g * kTileElements, &of[i], stream.head * kWidth, first + g * kTile,
                                 &own_full);
    }
    // A operands of the warpgroup's rows of matrix i, in place; and this warp's, in registers.
    __device__ Operand own_operand(int i, int group) const { return operand_of(own[i] + group * kTileElements); }
    __device__ void take_own(Operands& a, int i) const {
        const int row = static_cast<int>(threadIdx.x) / kWarp * 16;
#pragma unroll
        for (int d = 0; d < 4; ++d) dot::load_a<kWidth>(a[d], own[i], row, d);
    }
};

// Streams tiles of two matrices into the ring. With numbers all threads of the first warpgroup take part, otherwise
// thread 0 alone.
template <class S>
struct Loader {
    S& shared;
    const CUtensorMap* maps;  // of the two matrices
    const Stream& stream;
    const float* number = nullptr;  // lse or delta of this thread's column, of token 0
    std::int64_t ld = 0;
    int loaded = 0;
    Ring<S::kStages> ring = Ring<S::kStages>(0);

    __device__ bool takes_part() const { return threadIdx.x < (S::has_numbers ? kGroupThreads : 1); }
    // Tiles before `end` are on their way. Waits for those that were in their places to be released by all.
    __device__ void load_until(int end) {
        if (!takes_part()) return;
#pragma unroll 1
        for (; loaded < min(end, stream.count); ++loaded) {
            hopper::barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);  // returns at once in the first round
            hopper::Barrier* full = &shared.full[ring.stage];
            const int token = stream.token(loaded);
            if (threadIdx.x == 0) {
                hopper::barrier_arrive_expecting(full, 2 * kTileBytes);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    hopper::load_box(shared.stages[ring.stage][i], &maps[i], stream.head * kWidth, token, full);
            }
            if constexpr (S::has_numbers) {
                dot::cp_async4(&shared.numbers[ring.stage][0][0] + threadIdx.x, number + token * ld, true);
                arrive_when_copied(full);
            }
            ring.step();
        }
    }

  private:
    // Counts as an arrival once this thread's copies are there.
    __device__ static void arrive_when_copied(hopper::Barrier* b) {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(b)) : "memory");
    }
};

// ---- products ------------------------------------------------------------------------------------------------------

// d = A B', both of rows of 64. Committed. From shared memory:
__device__ inline void multiply_rows(Sums& d, Operand a, Operand b) {
    warpgroup_tile::multiply_rows<kTile>(flat(d), a, b);
}
// From registers. They must be something new in every round of a loop: ptxas 13.0 takes operands that stay the same for
// dead after a round's products, and gives their registers to others.
__device__ inline void multiply_rows(Sums& d, const Operands& a, Operand b) {
    hopper::product_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s)
        hopper::multiply_registers<false>(flat(d), a[s], kOperandLayout | advance(b, s * kColumnStep), s > 0);
    hopper::product_commit();
}
// d += A B, B as it lies. Committed.
__device__ inline void multiply_add(Sums& d, const Operands& a, Operand b) {
    hopper::product_begin();
#pragma unroll
    for (int s = 0; s < 4; ++s)
        hopper::multiply_registers<true>(flat(d), a[s], kOperandLayout | advance(b, s * kRowStep), true);
    hopper::product_commit();
}
__device__ inline void pin(Sums& s) { hopper::pin(flat(s)); }
__device__ inline void pin(Operands& a) {
#pragma unroll
    for (int s = 0; s < 4; ++s) hopper::pin(a[s]);
}
// Rounded sums are operands.
__device__ inline void round_to_operands(Operands& a, const Sums& s) {
#pragma unroll
    for (int n = 0; n < 4; ++n) dot::to_a(a[n], s[2 * n], s[2 * n + 1]);
}

}  // namespace fiedler::dot_sm90_tile
