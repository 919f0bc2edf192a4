// kernels/small_spectra_warp.cuh: what the kernels of small_spectra.cu share, and the one for graphs of up to 64 nodes: a
// warp takes one graph or several, columns in registers. The method is in small_spectra.cu.
#pragma once
#include "kernels/common.cuh"
#include "kernels/small_spectra.h"

namespace fiedler {

namespace {
using Problem = SmallSpectra<float>;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kShift = 0.25f;  // c, in lengths of Gershgorin's interval

// Two columns are rotated when |cos| of their angle is above 2^-23, about what rounding leaves; when a sweep saw none
// above 2^-21, its rotations were the last. Squares, as they are compared.
constexpr float kRotate = 0x1p-46f, kStop = 0x1p-42f;

// ---- what both kernels share ----

struct Graph {
    std::int32_t id, node, n;
};
__device__ __forceinline__ float* values_of(const Problem& p, const Graph& g) {
    return p.values.data + g.id * p.values.ld;
}
__device__ __forceinline__ float* vectors_of(const Problem& p, const Graph& g, int i) {
    return p.vectors.data + (std::int64_t(g.node) + i) * p.vectors.ld;
}
__device__ __forceinline__ Graph graph_at(const Problem& p, std::int64_t index) {
    const std::int32_t id = p.order.data[index], node = p.node_offsets.data[id];
    return {id, node, p.node_offsets.data[id + 1] - node};
}

// Gershgorin's interval of the rows seen so far, and whether an entry was unusable.
struct Bounds {
    float lo = INFINITY, hi = -INFINITY;
    bool bad = false;
};
// add(column, value) for the entries of row i, as far as they are usable.
template <class Add>
__device__ __forceinline__ void read_row(const Problem& p, const Graph& g, int i, Bounds& b, Add&& add) {
    float diagonal = 0.f, radius = 0.f;
    const std::int64_t* row = p.row_offsets.data + g.node + i;
    for (std::int64_t e = row[0], last = row[1]; e < last; ++e) {
        const int column = p.columns.data[e];
        const float value = p.matrix.data[e];
        if (column < 0 || column >= g.n || !isfinite(value)) {
            b.bad = true;
            continue;
        }
        if (column == i)
            diagonal += value;
        else
            radius += fabsf(value);
        add(column, value);
    }
    b.lo = fminf(b.lo, diagonal - radius);
    b.hi = fmaxf(b.hi, diagonal + radius);
}

// A = scale (A' + lo' I): A' has its spectrum in [0, 1] and inverse = 1 / scale; B = A' + shift I.
struct Scaling {
    float lo, scale, inverse, shift;
};
__device__ __forceinline__ Scaling scaling_of(float lo, float hi) {
    const float span = hi - lo;
    if (!(span > 0x1p-100f)) return {lo, 1.f, 1.f, 1.f};
    int exponent;
    (void)frexpf(span, &exponent);
    exponent = min(exponent, 127);
    const float inverse = ldexpf(1.f, -exponent);
    return {lo, ldexpf(1.f, exponent), inverse, kShift * (span * inverse)};
}

// The rotation that makes columns x and y orthogonal, by its half angle (tau: tangent of half the angle, s: sine):
//     x' = x - s (y + tau x),  y' = y + s (x - tau y)
// A small rotation then changes the columns by no more than it must. s follows from tau with full precision, so that
// lengths are kept; tau itself need not be exact. gain: what y'y gains and x'x loses.
struct Rotation {
    float s = 0.f, tau = 0.f, gain = 0.f;
};
__device__ __forceinline__ Rotation rotation_of(float xx, float yy, float xy) {
    const float d = yy - xx, square = fmaf(d, d, 4.f * xy * xy);
    const float t = __fdividef(2.f * xy, d + copysignf(square * rsqrtf(square), d));  // tangent, at most 1
    const float secant = fmaf(t, t, 1.f);
    Rotation r;
    r.tau = __fdividef(t, 1.f + secant * rsqrtf(secant));
    const float m = fmaf(r.tau, r.tau, 1.f), guess = __fdividef(1.f, m);
    r.s = 2.f * r.tau * fmaf(fmaf(-m, guess, 1.f), guess, guess);
    r.gain = t * xy;
    return r;
}
__device__ __forceinline__ void rotate(const Rotation& r, float& x, float& y) {
    const float new_x = fmaf(-r.s, fmaf(r.tau, x, y), x);
    y = fmaf(r.s, fmaf(-r.tau, y, x), y);
    x = new_x;
}

// Exact for 1: a graph without edges has eigenvalues of exactly 0.
__device__ __forceinline__ float inverse_length(float square) { return square > 0.f ? 1.f / sqrtf(square) : 0.f; }

// Columns [first, last) of a graph's rows, by `count` threads of which this is number `mine`.
__device__ __forceinline__ void fill(const Problem& p, const Graph& g, std::int64_t first, std::int64_t last,
                                     float value, float component, int mine, int count) {
    for (std::int64_t j = first + mine; j < last; j += count) {
        values_of(p, g)[j] = value;
        if (!p.vectors.data) continue;
        for (int i = 0; i < g.n; ++i) vectors_of(p, g, i)[j] = component;
    }
}
__device__ __forceinline__ std::int64_t pairs_of(const Problem& p, const Graph& g) {
    return g.n < p.values.cols ? g.n : p.values.cols;
}
__device__ __forceinline__ void write_invalid(const Problem& p, const Graph& g, int mine, int count) {
    fill(p, g, 0, pairs_of(p, g), NAN, NAN, mine, count);
    if (mine == 0) p.status.data[g.id] = kSmallSpectraInvalid, p.residual.data[g.id] = NAN;
}

// ---- up to 64 nodes: columns in registers, two of them to a lane ----
//
// The columns stand in a row of N places; lane l of a graph's L = N / 2 lanes holds places 2l (x) and 2l + 1 (y). In
// odd-even order (Stewart 1985; Luk and Park 1989) neighbours meet and change places: first 2l with 2l + 1, then 2l + 1
// with 2l + 2, and so on: after N rounds each column has met each other once, and their order is reversed. A round moves
// one column of a lane to the next lane. Rows and columns from n_g to N are zero: nothing is ever rotated with them.

template <int N>
struct Lanes {
    static constexpr int kLanes = N / 2, kGraphs = kWarp / kLanes;                            // of a graph; of a warp
    static constexpr int kWarps = N <= 32 ? 4 : 2;                                            // of a block
    static constexpr int kBlocks = N <= 8 ? 8 : N <= 12 ? 6 : N <= 20 ? 5 : N == 40 ? 6 : 4;  // of an SM
    static constexpr int kMatrix = N * N + 4;  // floats of a graph; + 4: graphs of a warp in different banks
};

// A warp's place in the batch, as a lane sees it.
struct Seat {
    int lane, base, mine;  // lane of the warp; first lane of the graph; lane of the graph
    bool used;             // false: lanes left over
};

template <int L>
__device__ __forceinline__ float graph_max(float x, const Seat& s) {
    float most = x;
    for (int o = 0; o < L; ++o) most = fmaxf(most, __shfl_sync(kAll, x, (s.base + o) % kWarp));
    return most;
}

template <int N>
__device__ __forceinline__ float dot(const float (&x)[N], const float (&y)[N]) {
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i % 4] = fmaf(x[i], y[i], sum[i % 4]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The matrix, scaled, into shared memory. False for a graph with unusable entries.
template <int N>
__device__ __forceinline__ bool read_graph(const Problem& p, const Graph& g, const Seat& s, float* a,
                                           Scaling& scaling) {
    constexpr int L = Lanes<N>::kLanes;
    if (s.used)
        for (int i = s.mine; i < N * N / 4; i += L) reinterpret_cast<float4*>(a)[i] = float4{0.f, 0.f, 0.f, 0.f};
    __syncwarp();
    Bounds b;
    for (int i = s.mine; i < g.n; i += L)
        read_row(p, g, i, b, [&](int column, float value) { a[i * N + column] += value; });
    b.hi = graph_max<L>(b.hi, s);
    b.lo = -graph_max<L>(-b.lo, s);
    const bool bad = graph_max<L>(b.bad ? 1.f : 0.f, s) > 0.f || (g.n > 0 && !isfinite(b.hi - b.lo));
    scaling = g.n > 0 ? scaling_of(b.lo, b.hi) : Scaling{0.f, 1.f, 1.f, 1.f};
    __syncwarp();
    if (s.used)
        for (int t = s.mine; t < g.n * N; t += L)  // the diagonal: every (N + 1)-th
            a[t] = (t % (N + 1) == 0 ? a[t] - scaling.lo : a[t]) * scaling.inverse;
    __syncwarp();
    return !bad;
}

// Two columns meet and change places. True if they were far from orthogonal.
template <int N>
__device__ __forceinline__ bool meet(float (&x)[N], float (&y)[N], float& xx, float& yy, bool allowed) {
    const float xy = dot(x, y), square = xy * xy, size = xx * yy;
    Rotation r;
    if (allowed && square > kRotate * size) r = rotation_of(xx, yy, xy);
    const float length = xx - r.gain;
    xx = yy + r.gain;
    yy = length;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float new_x = x[i], new_y = y[i];
        rotate(r, new_x, new_y);
        x[i] = new_y;
        y[i] = new_x;
    }
    return allowed && square > kStop * size;
}

template <int N>
__device__ __forceinline__ void move(float (&x)[N], float& xx, int from) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __shfl_sync(kAll, x[i], from);
    xx = __shfl_sync(kAll, xx, from);
}
template <int N>
__device__ __forceinline__ void swap_if(bool condition, float (&x)[N], float (&y)[N], float& xx, float& yy) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float t = condition ? y[i] : x[i];
        y[i] = condition ? x[i] : y[i];
        x[i] = t;
    }
    const float t = condition ? yy : xx;
    yy = condition ? xx : yy;
    xx = t;
}

// Sweeps until every graph of the warp is done; one that is done rests, so that what it gives does not depend on its
// neighbours. Returns whether this lane's is; sweeps: how many there were.
template <int N>
__device__ __forceinline__ bool make_orthogonal(float (&x)[N], float (&y)[N], const Seat& s, int& sweeps) {
    constexpr int L = Lanes<N>::kLanes;
    const int next = s.used ? s.base + (s.mine + 1) % L : s.lane,
              previous = s.used ? s.base + (s.mine + L - 1) % L : s.lane;
    const unsigned graph = s.used ? (L == kWarp ? kAll : ((1u << L) - 1) << s.base) : 0u;
    const bool end = s.mine == L - 1;
    bool done = false;
    for (sweeps = 0; sweeps < kSmallSpectraSweeps && !__all_sync(kAll, done); ++sweeps) {
        float xx = dot(x, x), yy = dot(y, y);
        bool far = false;
#pragma unroll 1
        for (int round = 0; round < N; round += 2) {
            far |= meet(x, y, xx, yy, !done);
            move(x, xx, next);           // x: place 2l + 2; at the end of the row there is none, and place 0 is a guest
            swap_if(end, x, y, xx, yy);  // there meet() swaps them back
            far |= meet(y, x, yy, xx, !done && !end);
            move(x, xx, previous);
        }
        done |= (__ballot_sync(kAll, far) & graph) == 0;
    }
    return done;
}

// Of a unit column x: Rayleigh quotient nu of A' (in: an approximation) and square of the residual.
struct Pair {
    float nu, square;
};
template <int N>
__device__ __forceinline__ void turn(float (&x)[N]) {
    const float head[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
    for (int i = 0; i + 4 < N; ++i) x[i] = x[i + 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[N - 4 + i] = head[i];
}
// Registers cannot be indexed: the columns turn by four places for every four rows, and the rows of A' with them. After
// N / 4 turns they are as before.
template <int N>
__device__ __forceinline__ void rayleigh(float (&x)[N], float (&y)[N], const float* a, Pair& px, Pair& py) {
    float gain_x = 0.f, gain_y = 0.f, square_x = 0.f, square_y = 0.f;
#pragma unroll 1
    for (int b = 0; b < N / 4; ++b) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float4* entries = reinterpret_cast<const float4*>(a + (4 * b + r) * N);
            float sum_x[4] = {}, sum_y[4] = {};
#pragma unroll
            for (int q = 0; q < N / 4; ++q) {
                const float4 v = entries[q + b < N / 4 ? q + b : q + b - N / 4];
                const float row[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    sum_x[j] = fmaf(row[j], x[4 * q + j], sum_x[j]);
                    sum_y[j] = fmaf(row[j], y[4 * q + j], sum_y[j]);
                }
            }
            const float off_x = fmaf(-px.nu, x[r], (sum_x[0] + sum_x[1]) + (sum_x[2] + sum_x[3]));
            const float off_y = fmaf(-py.nu, y[r], (sum_y[0] + sum_y[1]) + (sum_y[2] + sum_y[3]));
            gain_x = fmaf(x[r], off_x, gain_x), gain_y = fmaf(y[r], off_y, gain_y);
            square_x = fmaf(off_x, off_x, square_x), square_y = fmaf(off_y, off_y, square_y);
        }
        turn(x), turn(y);
    }
    px = {px.nu + gain_x, fmaxf(0.f, fmaf(-gain_x, gain_x, square_x))};
    py = {py.nu + gain_y, fmaxf(0.f, fmaf(-gain_y, gain_y, square_y))};
}

// Length one, largest component positive; returns the first approximation of nu.
template <int N>
__device__ __forceinline__ float normalise(float (&x)[N], float shift) {
    const float square = dot(x, x);
    const float inverse = inverse_length(square);
    const float length = __fmul_rn(square, inverse);  // never fused: a column must give the same bits as x and as y
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] *= inverse;
        if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = largest < 0.f ? -x[i] : x[i];
    return length - shift;
}

// Place of a column among the eigenvalues: how many of the graph's columns come before it. Equal ones in the order in
// which the columns were to begin with. A column's number from its place: an odd number of sweeps has reversed them.
template <int N>
__device__ __forceinline__ int number_of(int place, int sweeps) {
    return sweeps % 2 ? N - 1 - place : place;
}
template <int N>
__device__ __forceinline__ void ranks(float nu_x, float nu_y, int n, int sweeps, const Seat& s, int& rank_x,
                                      int& rank_y) {
    const int id_x = number_of<N>(2 * s.mine, sweeps), id_y = number_of<N>(2 * s.mine + 1, sweeps);
    rank_x = rank_y = 0;
    for (int o = 0; o < N; ++o) {
        const int from = (s.base + o / 2) % kWarp, id = number_of<N>(o, sweeps);
        const float nu = __shfl_sync(kAll, o % 2 ? nu_y : nu_x, from);
        if (id >= n) continue;
        rank_x += nu < nu_x || (nu == nu_x && id < id_x);
        rank_y += nu < nu_y || (nu == nu_y && id < id_y);
    }
}

template <int N>
__device__ __forceinline__ void write_pair(const Problem& p, const Graph& g, const Scaling& s, const float (&x)[N],
                                           float nu, int rank) {
    if (rank >= p.values.cols) return;
    values_of(p, g)[rank] = fmaf(nu, s.scale, s.lo);
    if (!p.vectors.data) return;
    float* out = vectors_of(p, g, 0) + rank;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < g.n) out[i * p.vectors.ld] = x[i];
}

template <int N>
__global__ void __launch_bounds__(Lanes<N>::kWarps* kWarp, Lanes<N>::kBlocks)
    small_spectra_warp_kernel(Problem p, std::int64_t first, std::int64_t last) {
    using S = Lanes<N>;
    alignas(16) __shared__ float matrices[S::kWarps * S::kGraphs * S::kMatrix];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slot = lane / S::kLanes;
    const Seat seat = {lane, slot * S::kLanes, lane % S::kLanes, slot < S::kGraphs};
    const std::int64_t index = first + (std::int64_t(blockIdx.x) * S::kWarps + warp) * S::kGraphs + slot;
    const bool present = seat.used && index < last;
    const Graph g = present ? graph_at(p, index) : Graph{0, 0, 0};
    float* a = matrices + (warp * S::kGraphs + (seat.used ? slot : 0)) * S::kMatrix;

    Scaling scaling;
    const bool valid = read_graph<N>(p, g, seat, a, scaling);
    const int n = valid ? g.n : 0, place = 2 * seat.mine;
    float x[N], y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float2 entry = *reinterpret_cast<const float2*>(a + i * N + place);
        x[i] = i < n && place < n ? entry.x + (i == place ? scaling.shift : 0.f) : 0.f;
        y[i] = i < n && place + 1 < n ? entry.y + (i == place + 1 ? scaling.shift : 0.f) : 0.f;
    }
    int sweeps;
    const bool done = make_orthogonal(x, y, seat, sweeps);

    Pair px = {normalise(x, scaling.shift), 0.f}, py = {normalise(y, scaling.shift), 0.f};
    rayleigh(x, y, a, px, py);
    int rank_x, rank_y;
    ranks<N>(px.nu, py.nu, n, sweeps, seat, rank_x, rank_y);
    const bool has_x = number_of<N>(place, sweeps) < n, has_y = number_of<N>(place + 1, sweeps) < n;
    const float square =
        fmaxf(has_x && rank_x < p.values.cols ? px.square : 0.f, has_y && rank_y < p.values.cols ? py.square : 0.f);
    const float residual = sqrtf(graph_max<S::kLanes>(square, seat)) * scaling.scale;
    if (!present) return;
    if (has_x) write_pair(p, g, scaling, x, px.nu, rank_x);
    if (has_y) write_pair(p, g, scaling, y, py.nu, rank_y);
    fill(p, g, pairs_of(p, g), p.values.cols, p.filler, 0.f, seat.mine, S::kLanes);
    if (!valid) {
        write_invalid(p, g, seat.mine, S::kLanes);
    } else if (seat.mine == 0) {
        p.status.data[g.id] = done ? kSmallSpectraDone : kSmallSpectraStopped;
        p.residual.data[g.id] = residual;
    }
}

}  // namespace
}  // namespace fiedler
