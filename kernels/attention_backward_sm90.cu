// kernels/attention_backward_sm90.cu: the backward pass of scalar-distance attention with four scalars for sm_90a; what a
// block does with its tiles is in attention_backward_sm90.cuh.
//
// A round of the loop has one tile of queries and one barrier. At the barrier every warp has
//   * written its weights of the tile, for dv,
//   * begun the product dP of the next tile, which needs no other warp,
//   * waited for the product dv of the tile before, whose stage and weights are free from there on,
//   * waited for its part of the next tile's numbers.
// After it the loads of the tile after next begin (dO and a by TMA; numbers by cp.async). dv of this tile begins once dP is
// there, and goes on behind the arithmetic of the next tile.
#include "kernels/attention_backward_sm90.cuh"
#include "kernels/attention_backward_sm90.h"
#include "kernels/dependent_launch.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
namespace {

using namespace attention_backward_sm90_tile;

// Tiles of queries that see the keys from `first` on; up to careful_end, queries that see some of them only.
struct Range {
    static constexpr int kAll = 0x7fffffff;
    int begin, end, careful_end;
    __device__ Range(const AttentionBackward<bf16>& p, int first) {
        end = p.seq.last(first) / kTile;
        begin = (p.causal ? first : p.seq.first(first)) / kTile;
        careful_end = p.causal ? begin + 1 : begin;
    }
};

struct Problem {
    CUtensorMap gradients, values, scalars;  // dO, V, [tokens, heads D]; a, [tokens, heads R]
    AttentionBackward<bf16> p;
    BackwardGroups groups;
};

// A tile of queries: dO, a, and V with it, asked for by one thread; numbers. query: in tiles.
__device__ void load_queries(const Problem& problem, Shared& shared, int stage, int query, int key = -1) {
    const int head = static_cast<int>(blockIdx.x);
    if (threadIdx.x == 0) {
        constexpr int kBytes = kTileElements * 2 + kTile * R * 4, kValueBytes = kKeys * kRowBytes;
        hopper::Barrier* full = &shared.full[stage];
        hopper::barrier_arrive_expecting(full, key < 0 ? kBytes : kBytes + kValueBytes);
        hopper::load_box(shared.gradients[stage], &problem.gradients, head * kWidth, query * kTile, full);
        hopper::load_box(shared.a[stage], &problem.scalars, head * R, query * kTile, full);
        if (key >= 0) hopper::load_box(shared.values, &problem.values, head * kWidth, key, full);
    }
    QueryLoads::start(problem.p, shared, stage, head, query * kTile);
    cp_async_commit();
}

// The queries of one tile of keys. ring: where the first tile is; then, where the next one would be. sums: the slab of
// the head, R for each query; written: tiles of it that have some.
__device__ void add_queries(const Problem& problem, Shared& shared, Keys& keys, Ring& ring, const Range& range,
                            int first, float* sums, int written) {
    constexpr int N = kKeys, kStageBytes = kTileElements * 2, kWeightBytes = N * kRowBytes;
    const Operand gradients = operand_of(shared.gradients), weights = operand_of(shared.weights),
                  values = operand_of(shared.values);
    // One register for two numbers that a thread needs now and then, taken apart anew for each tile: its place in the
    // turned weights, and the first of its rows.
    std::uint32_t where =
        (shared_address(shared.weights) + place_of_turned(thread_anew())) << 8 | first_row(thread_anew());
    hopper::barrier_wait(&shared.full[ring.stage], ring.parity);
    multiply_rows<N>(keys.dp, advance(gradients, ring.stage * kStageBytes), values);
    int before = 0;  // the stage of the tile before
#pragma unroll 1
    for (int q = range.begin; q < range.end; ++q) {
        asm volatile("" : "+r"(where));
        const std::uint32_t place = where >> 8;
        const int row = static_cast<int>(where & 255);
        const auto sums_of = [&](int tile) { return sums + (tile * (kTile * R) + RowSums::offset(row)); };
        float of_rows[2][R];
        const int turned = (q & 1) * kWeightBytes;
        const Keys::Base base(shared, ring.stage, row);
        hopper::product_wait<0>();
        hopper::pin(keys.dp);
        if (q > range.begin)
            multiply_turned<N>(keys.dv, advance(gradients, before * kStageBytes),
                               advance(weights, kWeightBytes - turned));
        if (q >= shared.careful_end)
            keys.add<false>(of_rows, shared, ring.stage, place + turned, row, 0, base);
        else
            keys.add<true>(of_rows, shared, ring.stage, place + turned, row,
                           problem.p.causal ? q * kTile - first : kTile, base);
        const float2 left = load_sums(sums_of(q), q < written);  // not earlier: all registers are taken until here
        const Ring next = ring.next();
        if (q + 1 < range.end) {  // dP of the next tile needs no other warp: it goes on behind what is left of this one
            hopper::barrier_wait(&shared.full[next.stage], next.parity);
            multiply_rows<N>(keys.dp, advance(gradients, next.stage * kStageBytes), values);
            hopper::product_wait<1>();
        } else {
            hopper::product_wait<0>();
        }
        hopper::pin(keys.dv);
        cp_async_wait<0>();
        hopper::publish_shared();
        store_sums(sums_of(q), left, RowSums(of_rows));
        __syncthreads();
        if (q + 2 < range.end) load_queries(problem, shared, next.next().stage, q + 2);
        before = ring.stage, ring = next;
    }
    multiply_turned<N>(keys.dv, advance(gradients, before * kStageBytes),
                       advance(weights, ((range.end - 1) & 1) * kWeightBytes));
    hopper::product_wait<0>();
    hopper::pin(keys.dv);
    __syncthreads();
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    attention_backward_sm90_kernel(const __grid_constant__ Problem problem) {
    constexpr int N = kKeys;
    extern __shared__ __align__(1024) unsigned char memory[];
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const AttentionBackward<bf16>& p = problem.p;
    const BackwardGroups& groups = problem.groups;
    const int head = static_cast<int>(blockIdx.x), group = static_cast<int>(blockIdx.y * gridDim.z + blockIdx.z);
    const int slab = __shfl_sync(0xffffffffu, group % groups.slabs, 0);  // known to be the same in all lanes
    float* const sums = groups.partial + slab * groups.slab_floats + std::int64_t(head) * p.seq.tokens * R;
    if (p.F.data == nullptr)
        for (int i = threadIdx.x; i < kStages * kTile; i += kThreads) shared.numbers[i / kTile][i % kTile].gate = 0.f;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) hopper::barrier_init(&shared.full[s], 1);
        hopper::barrier_init_done();
    }
    __syncthreads();
    wait_for_previous();
    Ring ring;
    int written = 0, first = group * groups.tiles * N;
#pragma unroll 1
    for (int k = 0; k < groups.tiles && first < p.seq.tokens; ++k, first += N) {
        Keys keys;
        Range range(p, first);
        QueryLoads::begin(p, shared, head, range.begin * kTile);
        load_queries(problem, shared, ring.stage, range.begin, first);
        if (range.begin + 1 < range.end) load_queries(problem, shared, ring.next().stage, range.begin + 1);
        keys.begin(p, shared, head, first);
        if (threadIdx.x == 0) shared.careful_end = keys.careful ? Range::kAll : range.careful_end;
        cp_async_wait<0>();
        __syncthreads();
        add_queries(problem, shared, keys, ring, range, first, sums, written);
        keys.store(p, shared, head, first);
        written = max(written, range.end);
        __syncthreads();
    }
}

void launch(const Cuda& device, const AttentionBackward<bf16>& p) {
    constexpr int bytes = sizeof(Shared);
    static_assert(kBlocks * (bytes + 1024) <= 227 * 1024);
    const auto map = [](const auto& m, cuuint32_t rows) {
        return tensor_map<2>(m.data, {cuuint64_t(m.cols), cuuint64_t(m.rows)}, {cuuint64_t(m.ld) * 2}, {kWidth, rows});
    };
    const auto scalars =
        tensor_map<2>(p.a.data, {cuuint64_t(p.a.cols), cuuint64_t(p.a.rows)}, {cuuint64_t(p.a.ld) * 4}, {R, kTile});
    const Problem problem{map(p.do_, kTile), map(p.v, kKeys), scalars, p, groups_of(p, kKeys, 0)};
    const auto kernel = attention_backward_sm90_kernel;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    launch_dependent(device, kernel, blocks_of(p, problem.groups), kThreads, bytes, problem);
    LAUNCH_CHECK("attention_backward_sm90");
    const dim3 grid(static_cast<unsigned>(ceil_div(std::int64_t(p.seq.tokens) * R, std::int64_t(256))),
                    static_cast<unsigned>(p.heads));
    attention_da_kernel<R><<<grid, 256, 0, stream_of(device)>>>(p, problem.groups, kKeys);
    LAUNCH_CHECK("attention_backward_sm90, da");
}

// ---- the products by themselves ----------------------------------------------------------------------------------

struct Products {
    const nv_bf16 *x, *y, *p;
    float *xy, *xp;
    nv_bf16* pt;
};

// Where element i of rows of 64 lies.
__device__ int swizzled(int i) { return i ^ (i / kWidth % 8) * 8; }

template <int N>
__global__ void __launch_bounds__(kThreads) products_kernel(Products io) {
    __shared__ __align__(1024) nv_bf16 x[kTileElements], y[N * kWidth], turned[N * kTile];
    const int thread = thread_anew(), lane = thread % kWarp, row = first_row(thread);
    for (int i = thread; i < kTileElements; i += kThreads) x[swizzled(i)] = io.x[i];
    for (int i = thread; i < N * kWidth; i += kThreads) y[swizzled(i)] = io.y[i];
    for (int n = 0; n < N / 8; n += 2) {  // p turned, in the layout of sums
        std::uint32_t packed[4];
        for (int i = 0; i < 4; ++i) {
            const int key = 8 * (n + i / 2) + lane % 4 * 2, query = row + i % 2 * 8;
            packed[i] = pack_bf16(to_float(io.p[key * kTile + query]), to_float(io.p[(key + 1) * kTile + query]));
        }
        store_turned(shared_address(turned) + place_of_turned(thread) + n * 8 * kRowBytes, packed[0], packed[1],
                     packed[2], packed[3]);
    }
    hopper::publish_shared();
    __syncthreads();
    float xy[N / 2], xp[N / 2] = {};
    multiply_rows<N>(xy, hopper::operand(x), hopper::operand(y));
    multiply_turned<N>(xp, hopper::operand(x), hopper::operand(turned));
    hopper::product_wait<0>();
    hopper::pin(xy);
    hopper::pin(xp);
#pragma unroll
    for (int e = 0; e < N / 2; ++e) {
        const int at = (row + e / 2 % 2 * 8) * N + e / 4 * 8 + lane % 4 * 2 + e % 2;
        io.xy[at] = xy[e], io.xp[at] = xp[e];
    }
    for (int i = thread; i < N * kTile; i += kThreads) io.pt[i] = turned[swizzled(i)];
}

bool is_aligned16(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

}  // namespace

void attention_backward_sm90_products(const Cuda& device, const bf16* x, const bf16* y, const bf16* p, float* xy,
                                      float* xp, bf16* pt, int keys) {
    FIEDLER_REQUIRE("attention", keys == 32 || keys == 64);
    const Products io{nv(x), nv(y), nv(p), xy, xp, nv(pt)};
    if (keys == 64)
        products_kernel<64><<<1, kThreads, 0, stream_of(device)>>>(io);
    else
        products_kernel<32><<<1, kThreads, 0, stream_of(device)>>>(io);
    LAUNCH_CHECK("attention_backward_sm90_products");
}

bool attention_backward_sm90_takes(const Cuda& device, const AttentionBackward<bf16>& p) {
    const int R = p.scalars;
    return device.arch == 90 && p.v.cols == std::int64_t(p.heads) * kWidth && (R == 1 || R == 4) &&
           p.seq.tokens < 65536 * 32 &&  // groups are counted in 16 bits
           p.window == 0 && p.seq.length > 0 && p.seq.length % kTile == 0 && is_aligned16(p.a.data) &&
           p.lse.ld == p.heads && p.delta.ld == p.heads && (!p.F || p.F.ld == p.heads) &&
           (R > 1 || (is_aligned16(p.partial.data) &&
                      p.partial.size >= attention_numbers_elements(p.seq.tokens, p.heads, kWidth, R) +
                                            attention_slab_elements(p.seq.tokens, p.heads, R)));
}

void attention_backward_sm90(const Cuda& device, const AttentionBackward<bf16>& p) {
    p.scalars == 1 ? attention_backward_one_sm90(device, p) : launch(device, p);
}

}  // namespace fiedler
