// kernels/small_spectra.cu: eigenpairs of many small matrices on the GPU (contract in small_spectra.h).
//
// One-sided Jacobi: plane rotations of the columns of G, at first B = A + c I, until all columns are orthogonal. Then
// G = B V = U S is a singular value decomposition of a positive definite B, so U = V: the columns, scaled to length one,
// are the eigenvectors, and what has to be kept and moved is one matrix, not two.
//
// B is scaled by a power of two to norm one; c makes its spectrum lie within [1/4, 5/4] of Gershgorin's interval.
#include "kernels/dynamic_shared.cuh"
#include "kernels/small_spectra_warp.cuh"

namespace fiedler {
namespace {

// ---- 65 to 512 nodes: a block to a graph, G in scratch memory (mostly in the L2 cache) ----
//
// G is stored by columns of R = 128 K rows, R of them; rows and columns from n on are zero. Groups of 32 columns: each of
// the 16 warps takes two columns of one group into registers and meets the columns of every later group, which pass
// through shared memory; before that the columns of the group meet each other there. A lane holds rows 128 k + 4 lane,
// and the three after, of each column.

constexpr int kBlockThreads = 512, kBlockWarps = kBlockThreads / kWarp, kGroup = 2 * kBlockWarps;

template <int K>
struct Column {
    float4 v[K];
};
template <int K>
__device__ __forceinline__ Column<K> load_column(const float* p) {
    Column<K> c;
#pragma unroll
    for (int k = 0; k < K; ++k) c.v[k] = reinterpret_cast<const float4*>(p)[k * kWarp + threadIdx.x % kWarp];
    return c;
}
template <int K>
__device__ __forceinline__ void store_column(float* p, const Column<K>& c) {
#pragma unroll
    for (int k = 0; k < K; ++k) reinterpret_cast<float4*>(p)[k * kWarp + threadIdx.x % kWarp] = c.v[k];
}
// The same in all lanes, bit for bit.
template <int K>
__device__ __forceinline__ float dot(const Column<K>& x, const Column<K>& y) {
    float a = 0.f, b = 0.f, c = 0.f, d = 0.f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        a = fmaf(x.v[k].x, y.v[k].x, a), b = fmaf(x.v[k].y, y.v[k].y, b);
        c = fmaf(x.v[k].z, y.v[k].z, c), d = fmaf(x.v[k].w, y.v[k].w, d);
    }
    return warp_sum((a + b) + (c + d));
}
// Two columns meet. Bit 0: rotated; bit 1: they were far from orthogonal. The branch is the warp's.
template <int K>
__device__ __forceinline__ int meet(Column<K>& x, Column<K>& y, float& xx, float& yy) {
    const float xy = dot(x, y), square = xy * xy, size = xx * yy;
    if (!(square > kRotate * size)) return 0;
    const Rotation r = rotation_of(xx, yy, xy);
    xx -= r.gain;
    yy += r.gain;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        rotate(r, x.v[k].x, y.v[k].x), rotate(r, x.v[k].y, y.v[k].y);
        rotate(r, x.v[k].z, y.v[k].z), rotate(r, x.v[k].w, y.v[k].w);
    }
    return square > kStop * size ? 3 : 1;
}

template <int K>
struct Shared {
    static constexpr int kRows = 128 * K;
    static constexpr int kPart = K <= 2 ? 4 : 16;  // columns whose residuals are computed at once
    float tile[kGroup * kRows];                    // the group at hand
    float partial[kBlockWarps][2 * kPart];
    float lengths[kGroup];  // squares of lengths; later first approximations of eigenvalues
    float nu[kRows], squares[kRows];
    int column[kRows];  // of a rank
    float reduce[kWarp];
};

// A warp moves the same two columns of each group, here and below: no barrier is needed between these and its own reads.
template <int K>
__device__ __forceinline__ void load_group(Shared<K>& s, const float* g, int group) {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int c = 2 * warp; c < 2 * warp + 2; ++c) {
        const Column<K> x = load_column<K>(g + std::int64_t(group * kGroup + c) * Shared<K>::kRows);
        store_column(s.tile + c * Shared<K>::kRows, x);
        const float length = dot(x, x);
        if (threadIdx.x % kWarp == 0) s.lengths[c] = length;
    }
}

// All columns of the group in the tile meet each other.
template <int K>
__device__ __forceinline__ int meet_within(Shared<K>& s) {
    constexpr int R = Shared<K>::kRows;
    const int warp = threadIdx.x / kWarp;
    int seen = 0;
    for (int round = 0; round < kGroup - 1; ++round) {
        const SmallSpectraMeeting m = small_spectra_meeting(kBlockWarps, round, warp);
        Column<K> x = load_column<K>(s.tile + m.first * R), y = load_column<K>(s.tile + m.second * R);
        float xx = s.lengths[m.first], yy = s.lengths[m.second];
        __syncwarp();
        const int met = meet(x, y, xx, yy);
        if (met) {
            store_column(s.tile + m.first * R, x), store_column(s.tile + m.second * R, y);
            if (threadIdx.x % kWarp == 0) s.lengths[m.first] = xx, s.lengths[m.second] = yy;
        }
        seen |= met;
        __syncthreads();
    }
    return seen;
}
// The warp's own columns x and z meet all columns of the tile.
template <int K>
__device__ __forceinline__ int meet_tile(Shared<K>& s, Column<K>& x, Column<K>& z) {
    constexpr int R = Shared<K>::kRows;
    const int warp = threadIdx.x / kWarp;
    float xx = dot(x, x), zz = dot(z, z);
    int seen = 0;
    for (int round = 0; round < kGroup; ++round) {
        const int c = (2 * warp + round) % kGroup;
        Column<K> y = load_column<K>(s.tile + c * R);
        float yy = s.lengths[c];
        __syncwarp();
        const int met = meet(x, y, xx, yy) | meet(z, y, zz, yy);
        if (met) {
            store_column(s.tile + c * R, y);
            if (threadIdx.x % kWarp == 0) s.lengths[c] = yy;
        }
        seen |= met;
        __syncthreads();
    }
    return seen;
}

template <int K>
__device__ __forceinline__ bool make_orthogonal(Shared<K>& s, float* g, int groups) {
    constexpr int R = Shared<K>::kRows;
    const int own = 2 * (threadIdx.x / kWarp);
    for (int sweep = 0; sweep < kSmallSpectraSweeps; ++sweep) {
        int seen = 0;
        for (int i = 0; i < groups; ++i) {
            load_group(s, g, i);
            __syncthreads();
            seen |= meet_within(s);
            Column<K> x = load_column<K>(s.tile + own * R), z = load_column<K>(s.tile + (own + 1) * R);
            for (int j = i + 1; j < groups; ++j) {
                load_group(s, g, j);
                __syncthreads();
                seen |= meet_tile(s, x, z);
                for (int c = own; c < own + 2; ++c)
                    store_column(g + std::int64_t(j * kGroup + c) * R, load_column<K>(s.tile + c * R));
            }
            store_column(g + std::int64_t(i * kGroup + own) * R, x);
            store_column(g + std::int64_t(i * kGroup + own + 1) * R, z);
        }
        if (!__syncthreads_or(seen & 2)) return true;
    }
    return false;
}

// B, by columns. False: unusable entries.
template <int K>
__device__ __forceinline__ bool read_graph(const Problem& p, const Graph& graph, Shared<K>& s, float* g, int groups,
                                           Scaling& scaling) {
    constexpr int R = Shared<K>::kRows;
    const int row = threadIdx.x, entries = groups * kGroup * R;
    for (int t = threadIdx.x; t < entries; t += kBlockThreads) g[t] = 0.f;
    __syncthreads();
    Bounds b;
    if (row < graph.n) read_row(p, graph, row, b, [&](int column, float value) { g[column * R + row] += value; });
    b.hi = block_max(b.hi, s.reduce);
    b.lo = -block_max(-b.lo, s.reduce);
    const bool bad = __syncthreads_or(b.bad) || !isfinite(b.hi - b.lo);
    if (bad) return false;
    scaling = scaling_of(b.lo, b.hi);
#pragma unroll 1  // the kernel's registers are scarce
    for (int t = threadIdx.x; t < entries; t += kBlockThreads) {
        const bool diagonal = t % (R + 1) == 0 && t / R < graph.n;
        const float value = (diagonal ? g[t] - scaling.lo : g[t]) * scaling.inverse;
        g[t] = diagonal ? value + scaling.shift : value;
    }
    __syncthreads();
    return true;
}

__device__ __forceinline__ void scale(float4& v, float by) { v.x *= by, v.y *= by, v.z *= by, v.w *= by; }

// The group's columns: length one, largest component positive, in the tile and in G; first approximations of the
// eigenvalues of A / scale into lengths.
template <int K>
__device__ __forceinline__ void normalise(Shared<K>& s, float* g, int group, float offset) {
    constexpr int R = Shared<K>::kRows;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int c = 2 * warp; c < 2 * warp + 2; ++c) {
        float* column = g + std::int64_t(group * kGroup + c) * R;
        Column<K> x = load_column<K>(column);
        const float square = dot(x, x);
        const float inverse = inverse_length(square);
        const float length = __fmul_rn(square, inverse);  // never fused: a column must give the same bits as x and as y
        float largest = 0.f;
        int at = R;
        const auto look = [&](float v, int row) {
            if (fabsf(v) > fabsf(largest)) largest = v, at = row;
        };
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int row = 4 * (k * kWarp + lane);
            scale(x.v[k], inverse);
            look(x.v[k].x, row), look(x.v[k].y, row + 1), look(x.v[k].z, row + 2), look(x.v[k].w, row + 3);
        }
        for (int o = kWarp / 2; o > 0; o /= 2) {
            const float other = __shfl_xor_sync(kAll, largest, o);
            const int row = __shfl_xor_sync(kAll, at, o);
            if (fabsf(other) > fabsf(largest) || (fabsf(other) == fabsf(largest) && row < at))
                largest = other, at = row;
        }
#pragma unroll
        for (int k = 0; k < K; ++k) scale(x.v[k], largest < 0.f ? -1.f : 1.f);
        store_column(s.tile + c * R, x);
        store_column(column, x);
        if (lane == 0) s.lengths[c] = length + offset;
    }
}

// Rayleigh quotients and squares of residuals of kPart columns of the tile, from `begin`. A thread takes a row; sums
// along the row are compensated (Kahan): the row of a hub has hundreds of entries.
template <int K>
__device__ __forceinline__ void rayleigh(const Problem& p, const Graph& graph, const Scaling& scaling, Shared<K>& s,
                                         int group, int begin) {
    constexpr int R = Shared<K>::kRows, kPart = Shared<K>::kPart;
    const int row = threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const float* tile = s.tile + begin * R;
    float off[kPart] = {}, lost[kPart] = {};
    if (row < graph.n) {
#pragma unroll
        for (int c = 0; c < kPart; ++c) off[c] = -s.lengths[begin + c] * tile[c * R + row];
        const std::int64_t* offsets = p.row_offsets.data + graph.node + row;
        for (std::int64_t e = offsets[0], last = offsets[1]; e < last; ++e) {
            const int column = p.columns.data[e];
            const float value = p.matrix.data[e] * scaling.inverse;
#pragma unroll
            for (int c = 0; c < kPart; ++c) {
                const float term = fmaf(value, tile[c * R + column], -lost[c]), sum = off[c] + term;
                lost[c] = (sum - off[c]) - term;
                off[c] = sum;
            }
        }
    }
#pragma unroll
    for (int c = 0; c < kPart; ++c) {
        const float gain = warp_sum(row < graph.n ? tile[c * R + row] * off[c] : 0.f),
                    square = warp_sum(off[c] * off[c]);
        if (lane == 0) s.partial[warp][2 * c] = gain, s.partial[warp][2 * c + 1] = square;
    }
    __syncthreads();
    if (threadIdx.x < kPart) {
        const int c = threadIdx.x, column = group * kGroup + begin + c;
        float gain = 0.f, square = 0.f;
        for (int w = 0; w < kBlockWarps; ++w) gain += s.partial[w][2 * c], square += s.partial[w][2 * c + 1];
        s.nu[column] = s.lengths[begin + c] + gain;
        s.squares[column] = fmaxf(0.f, fmaf(-gain, gain, square));
    }
    __syncthreads();
}

// Ascending; equal ones in the order of the columns.
template <int K>
__device__ __forceinline__ int sort(Shared<K>& s, int n) {
    const int mine = threadIdx.x;
    int rank = n;
    if (mine < n) {
        rank = 0;
        for (int j = 0; j < n; ++j) rank += s.nu[j] < s.nu[mine] || (s.nu[j] == s.nu[mine] && j < mine);
        s.column[rank] = mine;
    }
    __syncthreads();
    return rank;
}

template <int K>
__device__ __forceinline__ void solve(const Problem& p, const Graph& graph, Shared<K>& s, float* g) {
    constexpr int R = Shared<K>::kRows;
    const int pairs = static_cast<int>(pairs_of(p, graph)), groups = ceil_div(graph.n, kGroup);
    fill(p, graph, pairs, p.values.cols, p.filler, 0.f, threadIdx.x, kBlockThreads);
    Scaling scaling;
    if (!read_graph(p, graph, s, g, groups, scaling)) return write_invalid(p, graph, threadIdx.x, kBlockThreads);
    const bool done = make_orthogonal(s, g, groups);
    for (int i = 0; i < groups; ++i) {
        normalise(s, g, i, scaling.lo * scaling.inverse - scaling.shift);
        __syncthreads();
        for (int begin = 0; begin < kGroup; begin += Shared<K>::kPart) rayleigh(p, graph, scaling, s, i, begin);
    }
    const int rank = sort(s, graph.n);
    const float square = block_max(rank < pairs ? s.squares[threadIdx.x] : 0.f, s.reduce);
    if (rank < pairs) values_of(p, graph)[rank] = s.nu[threadIdx.x] * scaling.scale;
    if (threadIdx.x == 0) {
        p.status.data[graph.id] = done ? kSmallSpectraDone : kSmallSpectraStopped;
        p.residual.data[graph.id] = sqrtf(square) * scaling.scale;
    }
    if (!p.vectors.data) return;
    for (int t = threadIdx.x; t < graph.n * pairs; t += kBlockThreads) {
        const int i = t / pairs, j = t % pairs;
        vectors_of(p, graph, i)[j] = g[s.column[j] * R + i];
    }
}

template <int K>
__global__ void __launch_bounds__(kBlockThreads, K <= 2 ? 2 : 1)
    small_spectra_block_kernel(Problem p, std::int64_t first, std::int64_t last) {
    extern __shared__ float4 shared_memory[];
    Shared<K>& s = *reinterpret_cast<Shared<K>*>(shared_memory);
    float* g = p.scratch.data + std::int64_t(blockIdx.x) * Shared<K>::kRows * Shared<K>::kRows;
    for (std::int64_t index = first + blockIdx.x; index < last; index += gridDim.x) {
        solve(p, graph_at(p, index), s, g);
        __syncthreads();
    }
}

// ---- launch ----

template <int N>
void launch_warps(const Cuda& d, const Problem& p, std::int64_t first, std::int64_t last) {
    using S = Lanes<N>;
    const auto blocks = static_cast<unsigned>(ceil_div(last - first, std::int64_t(S::kWarps * S::kGraphs)));
    small_spectra_warp_kernel<N><<<blocks, S::kWarps * kWarp, 0, stream_of(d)>>>(p, first, last);
    LAUNCH_CHECK("small_spectra (warps)");
}
template <int K>
void launch_blocks(const Cuda& d, const Problem& p, std::int64_t first, std::int64_t last) {
    const auto kernel = small_spectra_block_kernel<K>;
    constexpr int bytes = sizeof(Shared<K>);
    allow_shared<bytes>(kernel);
    const std::int64_t slots = small_spectra_slots(128 * K), count = last - first;
    kernel<<<static_cast<unsigned>(count < slots ? count : slots), kBlockThreads, bytes, stream_of(d)>>>(p, first,
                                                                                                         last);
    LAUNCH_CHECK("small_spectra (blocks)");
}
using Launch = void (*)(const Cuda&, const Problem&, std::int64_t, std::int64_t);
constexpr Launch kLaunch[kSmallSpectraClasses] = {
    launch_warps<4>,  launch_warps<8>,  launch_warps<12>, launch_warps<16>, launch_warps<20>, launch_warps<24>,
    launch_warps<28>, launch_warps<32>, launch_warps<40>, launch_warps<48>, launch_warps<56>, launch_warps<64>,
    launch_blocks<1>, launch_blocks<2>, launch_blocks<3>, launch_blocks<4>};
}  // namespace

void small_spectra(const Cuda& d, const SmallSpectra<float>& p) {
    check(p);
    const std::int64_t graphs = p.values.rows, scratch = small_spectra_scratch_elements(p.first);
    FIEDLER_REQUIRE("small_spectra", is_shape(p.order, graphs) && p.first[kSmallSpectraClasses] == graphs);
    FIEDLER_REQUIRE("small_spectra", scratch == 0 || (p.scratch && p.scratch.size >= scratch));
    for (std::size_t c = kSmallSpectraClasses; c-- > 0;)  // the long ones first
        if (p.first[c] < p.first[c + 1]) kLaunch[c](d, p, p.first[c], p.first[c + 1]);
}

}  // namespace fiedler
