// kernels/mlp_sm90.cu: the products of mlp.h with their epilogues, in one kernel for sm_90a.
//
// The inner dimension is so short (C = 384: six steps of 64) that the epilogue and the way to it cost as much as the
// product. So:
//   * A block keeps its panel, all C rows of N columns of the weights, in shared memory for as long as it lives and only
//     streams rows of the other operand: N / 64 times less is read from L2 than a tile of 64 rows by itself would.
//   * Two warpgroups take tiles of 64 rows in turn: while one multiplies, the other is at its epilogue. Turns are kept by
//     two named barriers. One thread of a third warpgroup loads the rows by TMA into a ring of stages of 64 x 64.
//   * Columns of the panel lie in shared memory in an order (place_of) by which the sums of a thread are 16 consecutive
//     bytes of the output: it is written, and h read, without a detour through shared memory.
// Forward, the panel comes by TMA as well. Backward it has to be turned (W2 runs along the panel's columns), once a
// block, by the warpgroups themselves.
#include <algorithm>

#include "kernels/common.cuh"
#include "kernels/hopper.cuh"
#include "kernels/mlp_sm90.h"
#include "kernels/tensor_map.h"

namespace fiedler {
namespace {

using namespace hopper;

constexpr int kRows = 64, kDepth = kSwizzleColumns;  // of a stage
constexpr int kStages = 10, kStageElements = kRows * kDepth, kStageBytes = kStageElements * 2;
constexpr int kConsumers = 2 * kWarpgroup, kThreads = kConsumers + kWarpgroup;
// Registers of a thread that multiplies and of one that loads: 65,536 in all. Every thread begins with a third of them.
constexpr int kManyRegisters = 232, kFewRegisters = 40;
constexpr int kMostDepth = 768, kMostChunks = kMostDepth / kDepth;
constexpr int kRun = 32, kRuns = 4;  // columns that place_of permutes among themselves, in runs of 8

// Columns of a panel: the more, the fewer times the rows are read; 147 KiB of the 227 are the panel's.
constexpr int panel_columns(std::int64_t depth) { return depth <= 384 ? 192 : depth <= 576 ? 128 : 96; }

struct Problem {
    CUtensorMap rows;     // x or dy, [n, C]
    CUtensorMap weights;  // forward: W1
    const nv_bf16* w;     // backward: W2
    const nv_bf16* h;     // backward
    nv_bf16* out;         // h or du
    std::int64_t ld_w, ld_h, ld_out;
    int n, m, chunks;  // rows, columns of the output, C / kDepth
    int panels, groups;
};
struct Barriers {
    Barrier full[kStages], empty[kStages], panel[kMostChunks];
};

// A place in the ring of stages.
struct Ring {
    int stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
    __device__ void skip(int steps) {
        for (stage += steps; stage >= kStages; stage -= kStages) parity ^= 1;
    }
};

// What a block does: tile group + i groups of 64 rows, i = 0 .. count - 1, times the columns from `column`.
struct Share {
    int column, group, count;
    __device__ Share(const Problem& p, int columns) {
        column = static_cast<int>(blockIdx.x) % p.panels * columns;
        group = static_cast<int>(blockIdx.x) / p.panels;
        count = ((p.n + kRows - 1) / kRows - group + p.groups - 1) / p.groups;
    }
    __device__ int first_row(const Problem& p, int i) const { return (group + i * p.groups) * kRows; }
};

// Row of the panel in shared memory that holds this column of it. A thread's sums are those of rows 8 q + 2 t, 8 q + 2 t
// + 1 of each 32 (q = 0..3, t = lane % 4): columns 8 t .. 8 t + 7.
__device__ constexpr int place_of(int column) {
    const int in = column % kRun;
    return column - in + in % 8 / 2 * 8 + in / 8 * 2 + in % 2;
}

// ---- loads -------------------------------------------------------------------------------------------------------

template <int N, bool kBackward>
__device__ void produce(const Problem& p, const Share& share, nv_bf16* panel, nv_bf16* stages, Barriers& b) {
    Ring ring;
    for (int i = 0; i < share.count; ++i)
        for (int k = 0; k < p.chunks; ++k, ring.next()) {
            barrier_wait(&b.empty[ring.stage], ring.parity ^ 1);
            barrier_arrive_expecting(&b.full[ring.stage], kStageBytes);
            load_box(stages + ring.stage * kStageElements, &p.rows, k * kDepth, share.first_row(p, i),
                     &b.full[ring.stage]);
            if (kBackward || i > 0) continue;
            barrier_arrive_expecting(&b.panel[k], N * kSwizzleBytes);
#pragma unroll
            for (int r = 0; r < N; r += kRun)
                load_box(panel + (k * N + r) * kDepth, &p.weights, k * kDepth, 0, (share.column + r) / 8, 0,
                         &b.panel[k]);
        }
}

// Backward: the panel of W2, turned. A thread takes four columns of eight rows at a time: 16 bytes of each column.
template <int N>
__device__ void turn_panel(const Problem& p, const Share& share, nv_bf16* panel) {
    constexpr int kBatch = 3, kQuads = N / 4;
    const int items = p.chunks * (kDepth / 8) * kQuads;
    for (int first = threadIdx.x; first < items; first += kBatch * kConsumers) {
        uint2 in[kBatch][8];
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
            const int item = first + s * kConsumers, row = item / kQuads * 8, column = item % kQuads * 4;
            const bool valid = item < items && share.column + column < p.m;
#pragma unroll
            for (int k = 0; k < 8; ++k)
                in[s][k] = valid ? *reinterpret_cast<const uint2*>(p.w + (row + k) * p.ld_w + share.column + column)
                                 : uint2{0, 0};
        }
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
            const int item = first + s * kConsumers, octet = item / kQuads, column = item % kQuads * 4;
            if (item >= items) break;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                std::uint32_t word[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint2 &lo = in[s][2 * k], &hi = in[s][2 * k + 1];
                    word[k] = __byte_perm(c < 2 ? lo.x : lo.y, c < 2 ? hi.x : hi.y, c % 2 ? 0x7632 : 0x5410);
                }
                const int row = place_of(column + c), piece = octet % 8 ^ row % 8;
                *reinterpret_cast<uint4*>(panel + (octet / 8 * N + row) * kDepth + piece * 8) =
                    uint4{word[0], word[1], word[2], word[3]};
            }
        }
    }
}

// ---- epilogue ----------------------------------------------------------------------------------------------------

// max(x, 0), but a NaN stays a NaN.
__device__ float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float square_root(float x) {  // 1 ulp; subnormals count as 0
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float low(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Eight consecutive elements of h. Volatile: where it stands, before the product that its way is hidden behind.
__device__ uint4 read_once(const nv_bf16* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// A thread's part of a tile: rows `row` and row + 8, and in each 32 columns eight from 8 t.
struct Place {
    int row, column;
    const Problem& p;

    __device__ Place(const Problem& problem, const Share& share, int i) : p(problem) {
        const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, lane = thread % kWarp;
        row = share.first_row(p, i) + thread / kWarp * 16 + lane / 4;
        column = share.column + lane % 4 * 8;
    }
    __device__ bool inside(int k, int j) const { return row + 8 * k < p.n && column + kRun * j < p.m; }
    // Of a matrix with the output's rows and columns: where its first eight columns of row k are.
    template <class U>
    __device__ U* start(U* matrix, std::int64_t ld, int k) const {
        return matrix + (row + 8 * k) * ld + column;
    }
};

// k: which of the two rows; j: which 32 columns.
template <int N, bool kBackward>
struct Epilogue {
    uint4 h[kBackward ? 2 : 1][kBackward ? N / kRun : 1];

    __device__ void fetch(const Place& place) {
        if constexpr (kBackward)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const nv_bf16* const from = place.start(place.p.h, place.p.ld_h, k);
#pragma unroll
                for (int j = 0; j < N / kRun; ++j)
                    h[k][j] = place.inside(k, j) ? read_once(from + kRun * j) : uint4{0, 0, 0, 0};
            }
    }
    __device__ static std::uint32_t activation(float a, float b) {
        a = relu(a), b = relu(b);
        return pack_bf16(a * a, b * b);
    }
    __device__ static std::uint32_t gradient(float a, float b, std::uint32_t pair) {
        return pack_bf16(a * (2.f * square_root(low(pair))), b * (2.f * square_root(high(pair))));
    }
    // A thread's eight columns: pairs of sums of four neighbouring runs.
    __device__ uint4 eight(const float (&sum)[N / 2], int k, int j) const {
        const auto pair = [&](int q, std::uint32_t gate) {
            const float a = sum[(kRuns * j + q) * 4 + 2 * k], b = sum[(kRuns * j + q) * 4 + 2 * k + 1];
            return kBackward ? gradient(a, b, gate) : activation(a, b);
        };
        if constexpr (kBackward)
            return {pair(0, h[k][j].x), pair(1, h[k][j].y), pair(2, h[k][j].z), pair(3, h[k][j].w)};
        else
            return {pair(0, 0), pair(1, 0), pair(2, 0), pair(3, 0)};
    }
    __device__ void store(const Place& place, const float (&sum)[N / 2]) const {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            nv_bf16* const to = place.start(place.p.out, place.p.ld_out, k);
#pragma unroll
            for (int j = 0; j < N / kRun; ++j) {
                const uint4 value = eight(sum, k, j);
                if (place.inside(k, j)) *reinterpret_cast<uint4*>(to + kRun * j) = value;
            }
        }
    }
};

// ---- products ----------------------------------------------------------------------------------------------------

// sum = the stage's rows x the panel's chunk; a tile's product is `chunks` of these.
template <int N>
__device__ void multiply_chunk(float (&sum)[N / 2], const nv_bf16* stage, const nv_bf16* chunk, bool add) {
    const std::uint64_t a = operand(stage), b = operand(chunk);
    product_begin();
#pragma unroll
    for (int s = 0; s < kDepth / 16; ++s) multiply<N>(sum, advance(a, s), advance(b, s), add || s > 0);
    product_commit();
}

template <int N, bool kBackward>
__device__ void consume(const Problem& p, const Share& share, const nv_bf16* panel, const nv_bf16* stages,
                        Barriers& b) {
    const int team = static_cast<int>(threadIdx.x) / kWarpgroup;
    const bool speaks = threadIdx.x % kWarp == 0;  // for its warp
    constexpr int kTurn = 1;                       // and 2: numbers of the named barriers
    float sum[N / 2];
    Epilogue<N, kBackward> epilogue;
    Ring ring;
    ring.skip(team * p.chunks);
    if (team == 1) named_arrive(kTurn, kConsumers);  // the first turn is the other's
    for (int i = team; i < share.count; i += 2, ring.skip(p.chunks)) {
        const Place place(p, share, i);
        epilogue.fetch(place);
        named_wait(kTurn + team, kConsumers);
        int before = 0;  // the stage of the chunk before
        for (int k = 0; k < p.chunks; ++k, ring.next()) {
            if (!kBackward && i < 2) barrier_wait(&b.panel[k], 0);
            barrier_wait(&b.full[ring.stage], ring.parity);
            multiply_chunk<N>(sum, stages + ring.stage * kStageElements, panel + k * N * kDepth, k > 0);
            if (k > 0) {
                product_wait<1>();
                if (speaks) barrier_arrive(&b.empty[before]);
            }
            before = ring.stage;
        }
        if (i + 1 < share.count) named_arrive(kTurn + 1 - team, kConsumers);
        product_wait<0>();
        pin(sum);
        if (speaks) barrier_arrive(&b.empty[before]);
        epilogue.store(place, sum);
    }
}

template <int N, bool kBackward>
__global__ __launch_bounds__(kThreads, 1) void mlp_sm90_kernel(const __grid_constant__ Problem p) {
    extern __shared__ unsigned char shared[];
    __shared__ Barriers barriers;
    const std::uint32_t past = shared_address(shared) % kTileAlignment;
    auto* const panel = reinterpret_cast<nv_bf16*>(shared + (past == 0 ? 0 : kTileAlignment - past));
    nv_bf16* const stages = panel + p.chunks * N * kDepth;
    const Share share(p, N);
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(&barriers.full[s], 1);
            barrier_init(&barriers.empty[s], kWarpgroup / kWarp);
        }
        for (int k = 0; k < kMostChunks; ++k) barrier_init(&barriers.panel[k], 1);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x >= kConsumers) {
        give_registers<kFewRegisters>();
        if (threadIdx.x == kConsumers) produce<N, kBackward>(p, share, panel, stages, barriers);
        return;
    }
    take_registers<kManyRegisters>();
    if constexpr (kBackward) {
        constexpr int kTurned = 3;  // a named barrier
        turn_panel<N>(p, share, panel);
        publish_shared();
        named_wait(kTurned, kConsumers);
    }
    consume<N, kBackward>(p, share, panel, stages, barriers);
}

// ---- launch ------------------------------------------------------------------------------------------------------

CUtensorMap map_of_rows(const Mat<const bf16>& m) {
    return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kDepth, kRows});
}
// W1 in an order of rows that is place_of's: a row's number is 8 (its eight) + 2 q + e, and a box runs through e first,
// then through four eights, then through q.
CUtensorMap map_of_weights(const Mat<const bf16>& m) {
    const cuuint64_t row = cuuint64_t(m.ld) * 2;
    return tensor_map<4>(m.data, {cuuint64_t(m.cols), 2, cuuint64_t(m.rows) / 8, 4}, {row, 8 * row, 2 * row},
                         {kDepth, 2, kRun / 8, 4});
}

template <int N, bool kBackward>
void launch_panels(const Cuda& dev, Problem& p) {
    const int tiles = ceil_div(p.n, kRows);
    p.panels = ceil_div(p.m, N);
    p.groups = std::clamp(dev.sm_count / p.panels, 1, tiles);
    const int bytes = p.chunks * N * kSwizzleBytes + kStages * kStageBytes + kTileAlignment;
    const auto kernel = mlp_sm90_kernel<N, kBackward>;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<static_cast<unsigned>(p.panels * p.groups), kThreads, static_cast<std::size_t>(bytes), stream_of(dev)>>>(
        p);
    LAUNCH_CHECK("mlp_sm90");
}

template <bool kBackward>
void launch(const Cuda& dev, Problem& p, const Mat<bf16>& out, const Mat<const bf16>& rows) {
    p.rows = map_of_rows(rows);
    p.out = nv(out.data), p.ld_out = out.ld;
    p.n = static_cast<int>(out.rows), p.m = static_cast<int>(out.cols);
    p.chunks = static_cast<int>(rows.cols / kDepth);
    switch (panel_columns(rows.cols)) {
        case 192:
            return launch_panels<192, kBackward>(dev, p);
        case 128:
            return launch_panels<128, kBackward>(dev, p);
        default:
            return launch_panels<96, kBackward>(dev, p);
    }
}

bool takes(const Cuda& dev, const Mat<bf16>& out, const Mat<const bf16>& rows) {
    constexpr std::int64_t kMost = std::int64_t(1) << 31;
    return dev.arch == 90 && rows.cols % kDepth == 0 && rows.cols <= kMostDepth && out.cols % 8 == 0 &&
           out.cols < kMost - kMostDepth && out.rows < kMost - kRows;
}

}  // namespace

bool mlp_sm90_takes(const Cuda& dev, const MlpForward<bf16>& p) { return takes(dev, p.h, p.x); }
bool mlp_sm90_takes(const Cuda& dev, const MlpBackward<bf16>& p) { return takes(dev, p.du, p.dy); }

void mlp_sm90(const Cuda& dev, const MlpForward<bf16>& p) {
    Problem problem{};
    problem.weights = map_of_weights(p.w);
    launch<false>(dev, problem, p.h, p.x);
}
void mlp_sm90(const Cuda& dev, const MlpBackward<bf16>& p) {
    Problem problem{};
    problem.w = nv(p.w.data), problem.ld_w = p.w.ld;
    problem.h = nv(p.h.data), problem.ld_h = p.h.ld;
    launch<true>(dev, problem, p.du, p.dy);
}

}  // namespace fiedler
