// kernels/panel_sm90.cuh: y = epilogue(x W'), x: [n, C], W: [m, C], in one kernel for sm_90a, for a short C.
//
// The inner dimension is so short (C = 384: six steps of 64) that the epilogue and the way to it cost as much as the
// product. So:
//   * A block keeps its panel, all C rows of N columns of the weights, in shared memory for as long as it lives and only
//     streams rows of the other operand: N / 64 times less is read from L2 than a tile of 64 rows by itself would.
//   * Two warpgroups take tiles of 64 rows in turn: while one multiplies, the other is at its epilogue. Of bytes, whose
//     product takes half the time, there are three. Turns are kept by a named barrier each. One thread of another
//     warpgroup loads the rows by TMA into a ring of stages of 64 x 64 (64 x 128 bytes).
//   * Columns of the panel lie in shared memory in an order (place_of) by which the sums of a thread are 16 consecutive
//     bytes of the output: it is written, and what an epilogue needs beside them read, without a detour through shared
//     memory.
// The panel comes by TMA, or is made by the warpgroups themselves, once a block (mlp.h, backward: it has to be turned).
//
// Operands and output are of one size of element: bf16, or bytes (x and W int8, with int32 sums). What that changes is in
// Layout.
//
// An epilogue is a class of the number N of columns, with
//   Element            of x and W
//   Problem            what it needs, derived from Panels
//   kMakesPanel        whether panel() fills the panel; else TMA does, from Panels::weights
//   kTileBytes         of shared memory for each of those warpgroups, at Place::tile; a multiple of kTileAlignment
//   fetch(p, place)    loads, before the product that their way is hidden behind, and no more: to compute with what is
//                      loaded would wait for it
//   store(p, place, sum)
//   finish()           with kTileBytes: after the warpgroup's last tile
//   kCommonBytes       of shared memory for all of them, at Place::common; a multiple of 16
//   begin(p, share, common)   with kCommonBytes: they fill it, once a block
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels/common.cuh"
#include "kernels/hopper.cuh"
#include "kernels/tensor_map.h"
#include "kernels/tuning.h"

namespace fiedler::panel {

using namespace hopper;

constexpr int kRows = 64, kStageBytes = kRows * kSwizzleBytes;  // of a stage
constexpr int kMostDepth = 768, kMostChunks = kMostDepth * 2 / kSwizzleBytes, kMostStages = 10;

// What depends on the element. A thread's sums are those of columns 8 j + 2 t and the next one (t = lane % 4) of two
// rows of the product, g and g + 8 (g = lane / 4) of its warp's 16.
//   columns   are permuted among kRun, so that a thread has kOwn of them, 16 bytes, in kPairs pairs
//   rows      kNeighbours: are permuted among 16, so that the thread's two are 2 g and 2 g + 1 of the matrix
template <class E>
struct Layout {
    static constexpr int kDepth = kSwizzleBytes / static_cast<int>(sizeof(E));  // of a chunk: one row of a stage
    static constexpr int kOwn = 16 / static_cast<int>(sizeof(E)), kRun = 4 * kOwn, kPairs = kOwn / 2;
    static constexpr bool kNeighbours = sizeof(E) == 1;
    // Whole numbers begin with the bits of the float 1.5 * 2^23, whose last bit counts 1: with sums of at most 2^22 they
    // are the bits of that float plus the sum.
    using Sum = std::conditional_t<sizeof(E) == 1, int, float>;
    static constexpr bool kWhole = sizeof(E) == 1;
    static constexpr int kZero = 0x4b400000;
    static constexpr int kTeams = sizeof(E) == 1 ? 3 : 2, kConsumers = kTeams * kWarpgroup;
    static constexpr int kThreads = kConsumers + kWarpgroup;
    // Registers of a thread that multiplies and of one that loads: 65,536 in all. Every thread begins with its share.
    static constexpr int kManyRegisters = kTeams == 3 ? 160 : 232, kFewRegisters = kTeams == 3 ? 32 : 40;
    static_assert(kManyRegisters * kConsumers + kFewRegisters * kWarpgroup <= 65536);

    // Row of the panel in shared memory that holds this column of it: the sums of rows 8 q + 2 t + e (q < kPairs, e < 2)
    // of each kRun are those of columns kOwn t + 2 q + e.
    __device__ static constexpr int place_of(int column) {
        const int in = column % kRun;
        return column - in + in % kOwn / 2 * 8 + in / kOwn * 2 + in % 2;
    }
    // Where the sums of a thread's columns of row k in the run j are: pairs, q = 0 .. kPairs - 1.
    __device__ static constexpr int sum_at(int k, int j, int q) { return (kPairs * j + q) * 4 + 2 * k; }
};

struct Panels {
    CUtensorMap rows;     // x, [n, C]
    CUtensorMap weights;  // W; unused where the epilogue makes the panel
    int n, m, chunks;     // rows, columns of the output, C / Layout::kDepth
    int panels, groups;
    int stages;  // as many as there is room for
};
struct Barriers {
    Barrier full[kMostStages], empty[kMostStages], panel[kMostChunks];
};

// A place in the ring of stages.
struct Ring {
    int stages, stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
    __device__ void skip(int steps) {
        for (stage += steps; stage >= stages; stage -= stages) parity ^= 1;
    }
};

// What a block does: tile group + i groups of 64 rows, i = 0 .. count - 1, times the columns from `column`.
struct Share {
    int column, group, count;
    __device__ Share(const Panels& p, int columns) {
        column = static_cast<int>(blockIdx.x) % p.panels * columns;
        group = static_cast<int>(blockIdx.x) / p.panels;
        count = ((p.n + kRows - 1) / kRows - group + p.groups - 1) / p.groups;
    }
    __device__ int first_row(const Panels& p, int i) const { return (group + i * p.groups) * kRows; }
};

// A thread's part of a tile: rows row(0) and row(1), and in each run of columns the kOwn from `column`.
template <class E>
struct Place {
    using L = Layout<E>;
    int first_row, column;  // first_row: row(0)
    const Panels& p;
    unsigned char* tile;  // the warpgroup's own shared memory
    const unsigned char* common;

    __device__ Place(const Panels& problem, const Share& share, int i, unsigned char* own, const unsigned char* all)
        : p(problem), tile(own), common(all) {
        const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
        first_row = share.first_row(p, i) + thread / kWarp * 16 + lane / 4 * (L::kNeighbours ? 2 : 1);
        column = share.column + lane % 4 * L::kOwn;
    }
    __device__ int row(int k) const { return first_row + k * (L::kNeighbours ? 1 : 8); }
    __device__ bool row_inside(int k) const { return row(k) < p.n; }
    __device__ bool inside(int k, int j) const { return row_inside(k) && column + L::kRun * j < p.m; }
    // Of a matrix with the output's rows and columns: where its first columns of row k are.
    template <class U>
    __device__ U* start(U* matrix, std::int64_t ld, int k) const {
        return matrix + row(k) * ld + column;
    }
};

// ---- loads -------------------------------------------------------------------------------------------------------

template <int N, class Epilogue>
__device__ void produce(const Panels& p, const Share& share, unsigned char* panel, unsigned char* stages, Barriers& b) {
    using L = Layout<typename Epilogue::Element>;
    Ring ring{p.stages};
    for (int i = 0; i < share.count; ++i)
        for (int k = 0; k < p.chunks; ++k, ring.next()) {
            unsigned char* const stage = stages + ring.stage * kStageBytes;
            barrier_wait(&b.empty[ring.stage], ring.parity ^ 1);
            barrier_arrive_expecting(&b.full[ring.stage], kStageBytes);
            if constexpr (L::kNeighbours)
                load_box(stage, &p.rows, k * L::kDepth, 0, 0, share.first_row(p, i) / 16, &b.full[ring.stage]);
            else
                load_box(stage, &p.rows, k * L::kDepth, share.first_row(p, i), &b.full[ring.stage]);
            if (Epilogue::kMakesPanel || i > 0) continue;
            barrier_arrive_expecting(&b.panel[k], N * kSwizzleBytes);
#pragma unroll
            for (int r = 0; r < N; r += L::kRun)
                load_box(panel + (k * N + r) * kSwizzleBytes, &p.weights, k * L::kDepth, 0,
                         (share.column + r) / L::kOwn, 0, &b.panel[k]);
        }
}

// ---- products ----------------------------------------------------------------------------------------------------

// sum = [sum +] the stage's rows x the panel's chunk; a tile's product is `chunks` of these.
template <int N, class E>
__device__ void multiply_chunk(typename Layout<E>::Sum (&sum)[N / 2], const unsigned char* stage,
                               const unsigned char* chunk, bool add) {
    const std::uint64_t a = operand(stage), b = operand(chunk);
    product_begin();
#pragma unroll
    for (int s = 0; s < kSwizzleBytes / 32; ++s)
        if constexpr (sizeof(E) == 1)
            multiply_int8<N>(sum, advance(a, s), advance(b, s), true);
        else
            multiply<N>(sum, advance(a, s), advance(b, s), add || s > 0);
    product_commit();
}

template <int n>
__device__ void clear(int (&sum)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] = Layout<std::int8_t>::kZero;
    pin(sum);  // before the wait for the turn
}

template <int N, class Epilogue>
__device__ void consume(const typename Epilogue::Problem& p, const Share& share, const unsigned char* panel,
                        const unsigned char* stages, unsigned char* tiles, const unsigned char* common, Barriers& b) {
    using E = typename Epilogue::Element;
    const int team = static_cast<int>(threadIdx.x) / kWarpgroup;
    const bool speaks = threadIdx.x % kWarp == 0;  // for its warp
    constexpr int kTeams = Layout<E>::kTeams;
    // Numbers of the named barriers: kTurn + team, where the team waits and the one before it announces itself.
    constexpr int kTurn = 1, kBoth = 2 * kWarpgroup;
    const int next = team + 1 == kTeams ? 0 : team + 1;
    typename Layout<E>::Sum sum[N / 2];
    Epilogue epilogue;
    Ring ring{p.stages};
    ring.skip(team * p.chunks);
    if (next == 0) named_arrive(kTurn, kBoth);  // the first turn is team 0's
    for (int i = team; i < share.count; i += kTeams, ring.skip((kTeams - 1) * p.chunks)) {
        const Place<E> place(p, share, i, tiles + team * Epilogue::kTileBytes, common);
        epilogue.fetch(p, place);
        if constexpr (Layout<E>::kWhole) clear(sum);
        named_wait(kTurn + team, kBoth);
        int before = 0;  // the stage of the chunk before
        for (int k = 0; k < p.chunks; ++k, ring.next()) {
            if (!Epilogue::kMakesPanel && i < kTeams) barrier_wait(&b.panel[k], 0);
            barrier_wait(&b.full[ring.stage], ring.parity);
            multiply_chunk<N, E>(sum, stages + ring.stage * kStageBytes, panel + k * N * kSwizzleBytes, k > 0);
            if (k > 0) {
                product_wait<1>();
                if (speaks) barrier_arrive(&b.empty[before]);
            }
            before = ring.stage;
        }
        if (i + 1 < share.count) named_arrive(kTurn + next, kBoth);
        product_wait<0>();
        pin(sum);
        if (speaks) barrier_arrive(&b.empty[before]);
        epilogue.store(p, place, sum);
    }
    if constexpr (Epilogue::kTileBytes > 0) epilogue.finish();
}

template <int N, class Epilogue>
__global__ __launch_bounds__(Layout<typename Epilogue::Element>::kThreads,
                             1) void panel_kernel(const __grid_constant__ typename Epilogue::Problem p) {
    using L = Layout<typename Epilogue::Element>;
    extern __shared__ unsigned char shared[];
    __shared__ Barriers barriers;
    const std::uint32_t past = shared_address(shared) % kTileAlignment;
    unsigned char* const panel = shared + (past == 0 ? 0 : kTileAlignment - past);
    unsigned char* const stages = panel + p.chunks * N * kSwizzleBytes;
    const Share share(p, N);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kMostStages; ++s) {
            barrier_init(&barriers.full[s], 1);
            barrier_init(&barriers.empty[s], kWarpgroup / kWarp);
        }
        for (int k = 0; k < kMostChunks; ++k) barrier_init(&barriers.panel[k], 1);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x >= L::kConsumers) {
        give_registers<L::kFewRegisters>();
        if (threadIdx.x == L::kConsumers) produce<N, Epilogue>(p, share, panel, stages, barriers);
        return;
    }
    take_registers<L::kManyRegisters>();
    constexpr int kMade = 8;  // a named barrier
    unsigned char *const tiles = stages + p.stages * kStageBytes, *const common =
                                                                      tiles + L::kTeams * Epilogue::kTileBytes;
    if constexpr (Epilogue::kCommonBytes > 0) {
        Epilogue::begin(p, share, common);
        named_wait(kMade, L::kConsumers);
    }
    if constexpr (Epilogue::kMakesPanel) {
        Epilogue::panel(p, share, panel);
        publish_shared();
        named_wait(kMade, L::kConsumers);
    }
    consume<N, Epilogue>(p, share, panel, stages, tiles, common, barriers);
}

// ---- launch ------------------------------------------------------------------------------------------------------

template <class E>
CUtensorMap map_of_rows(const Mat<const E>& m) {
    using L = Layout<E>;
    const cuuint64_t row = cuuint64_t(m.ld) * sizeof(E);
    if constexpr (L::kNeighbours)  // a row's number is 16 (its sixteen) + 2 g + k; a box runs through g first, then k
        return tensor_map<4>(m.data, {cuuint64_t(m.cols), 8, 2, cuuint64_t(m.rows) / 16}, {2 * row, row, 16 * row},
                             {L::kDepth, 8, 2, kRows / 16});
    else
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {row}, {L::kDepth, kRows});
}
// W1 in an order of rows that is place_of's: a row's number is kOwn (its kOwn) + 2 q + e, and a box runs through e first,
// then through four times kOwn, then through q.
template <class E>
CUtensorMap map_of_weights(const Mat<const E>& m) {
    using L = Layout<E>;
    const cuuint64_t row = cuuint64_t(m.ld) * sizeof(E);
    return tensor_map<4>(m.data, {cuuint64_t(m.cols), 2, cuuint64_t(m.rows) / L::kOwn, L::kPairs},
                         {row, L::kOwn * row, 2 * row}, {L::kDepth, 2, 4, L::kPairs});
}

// Blocks to each panel. A block's time is its tiles and, once, its panel, which takes as long as a few tiles; blocks run
// in waves of as many as there are multiprocessors.
inline int groups_of(int panels, int tiles, int multiprocessors) {
    constexpr std::int64_t kPanelAsTiles = 4;
    int best = 1;
    std::int64_t least = 0;
    for (int groups = 1; groups <= std::min(tiles, multiprocessors); ++groups) {
        const std::int64_t waves = ceil_div(panels * groups, multiprocessors);
        const std::int64_t time = waves * (ceil_div(tiles, groups) + kPanelAsTiles);
        if (groups == 1 || time < least) best = groups, least = time;
    }
    return best;
}

template <int N, class Epilogue>
void launch_columns(const Cuda& dev, typename Epilogue::Problem& p) {
    p.panels = ceil_div(p.m, N);
    p.groups = groups_of(p.panels, ceil_div(p.n, kRows), dev.sm_count);
    using L = Layout<typename Epilogue::Element>;
    constexpr int kMostShared = 227 * 1024 - static_cast<int>(sizeof(Barriers));
    const int others =
        p.chunks * N * kSwizzleBytes + L::kTeams * Epilogue::kTileBytes + Epilogue::kCommonBytes + kTileAlignment;
    p.stages = std::min(kMostStages, (kMostShared - others) / kStageBytes);
    const int bytes = others + p.stages * kStageBytes;
    const auto kernel = panel_kernel<N, Epilogue>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<static_cast<unsigned>(p.panels * p.groups), L::kThreads, static_cast<std::size_t>(bytes),
             stream_of(dev)>>>(p);
    LAUNCH_CHECK("panel_sm90");
}

// y has so many columns. weights: null where the epilogue makes the panel.
template <class E>
void describe(Panels& p, const Mat<const E>& rows, std::int64_t columns, const Mat<const E>* weights) {
    p.rows = map_of_rows(rows);
    if (weights) p.weights = map_of_weights(*weights);
    p.n = static_cast<int>(rows.rows), p.m = static_cast<int>(columns);
    p.chunks = static_cast<int>(rows.cols / Layout<E>::kDepth);
}
template <template <int> class Epilogue>
void launch(const Cuda& dev, typename Epilogue<96>::Problem& p, const Mat<const bf16>& rows, std::int64_t columns,
            const Mat<const bf16>* weights) {
    describe(p, rows, columns, weights);
    switch (tuning::panel_columns(rows.cols)) {
        case 192:
            return launch_columns<192, Epilogue<192>>(dev, p);
        case 128:
            return launch_columns<128, Epilogue<128>>(dev, p);
        default:
            return launch_columns<96, Epilogue<96>>(dev, p);
    }
}

inline bool takes(const Cuda& dev, const Mat<const bf16>& rows, std::int64_t columns) {
    constexpr std::int64_t kMost = std::int64_t(1) << 31;
    return dev.arch == 90 && rows.cols % Layout<bf16>::kDepth == 0 && rows.cols <= kMostDepth && columns % 8 == 0 &&
           columns < kMost - kMostDepth && rows.rows < kMost - kRows;
}

}  // namespace fiedler::panel
