// kernels/gate.cu: the forget gate (see gate.h). A block walks two neighbouring heads of a sequence in tiles of kItems
// tokens a thread: a scan within the tile in f32, the carry from tile to tile in double. Neighbouring lanes have
// neighbouring tokens, so that a warp's accesses touch few lines; blocks of the same tokens are neighbours, so that each
// 32-byte sector comes from memory once. A warp does short sequences alone. Long ones are cut into chunks of one block
// each: their sums come first (f32 within a warp, double across warps and chunks), what is carried into each follows from
// those, and then each is walked like a sequence.
#include "kernels/common.cuh"
#include "kernels/dependent_launch.cuh"
#include "kernels/gate.h"

namespace fiedler {
namespace {

constexpr int kHeads = 2;  // of a block
constexpr int kItems = 2;  // tokens of a thread in a tile: its warp's, kWarp apart
constexpr int kMaxWarps = 32 / kItems, kFinishThreads = 256;
constexpr int kAloneWarps = 8;                 // of a block whose warps have a sequence each
constexpr std::int64_t kShortestChunk = 2048;  // tokens: long enough that the two extra launches pay
constexpr unsigned kWholeWarp = 0xffffffffu;

// logsigmoid(u); expf and log1pf are the accurate ones.
__device__ float log_sigmoid(float u) { return (u < 0.f ? u : 0.f) - log1pf(expf(-fabsf(u))); }

template <int N, class A>
__device__ void warp_inclusive_scan(A (&x)[N]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
        A below[N];
#pragma unroll
        for (int n = 0; n < N; ++n) below[n] = __shfl_up_sync(kWholeWarp, x[n], o);
        if (lane >= o) {
#pragma unroll
            for (int n = 0; n < N; ++n) x[n] += below[n];
        }
    }
}

// Sums of x[n] over the warps before this one, x being the warp's own; total: over the block. One barrier; shared must not
// be reused by the next call but one barrier later, hence two of them in turn.
template <int N, class A, int kWarps>
__device__ void sums_before_warp(A (&x)[N], A (&shared)[N][kWarps], A (&total)[N]) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    if (lane == 0) {
#pragma unroll
        for (int n = 0; n < N; ++n) shared[n][warp] = x[n];
    }
    __syncthreads();
    A sums[N];
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] = lane < warps ? shared[n][lane] : A(0);
    warp_inclusive_scan(sums);
#pragma unroll
    for (int n = 0; n < N; ++n) {
        total[n] = __shfl_sync(kWholeWarp, sums[n], kWarp - 1);
        const A before = __shfl_sync(kWholeWarp, sums[n], warp > 0 ? warp - 1 : 0);
        x[n] = warp > 0 ? before : A(0);
    }
}

// One number of each of a block's heads at one token. The second head may not exist; pairs may be 8-byte aligned.
struct Place {
    bool both, aligned;
    __device__ void load(float (&v)[kHeads], const float* p) const {
        if (aligned) {
            const float2 pair = *reinterpret_cast<const float2*>(p);
            v[0] = pair.x, v[1] = pair.y;
        } else {
            v[0] = p[0], v[1] = both ? p[1] : 0.f;
        }
    }
    __device__ void store(float* p, const float (&v)[kHeads]) const {
        if (aligned) {
            *reinterpret_cast<float2*>(p) = {v[0], v[1]};
        } else {
            p[0] = v[0];
            if (both) p[1] = v[1];
        }
    }
};

using Tile = float[kItems][kHeads];

// Cumulative sums over a tile, in place; total: its sum. kAlone: the tile is the warp's own.
template <bool kAlone>
__device__ void cumulative_sums(Tile& x, float (&shared)[kHeads][kMaxWarps], float (&total)[kHeads]) {
    float all[kItems * kHeads], sum[kHeads] = {};
#pragma unroll
    for (int k = 0; k < kItems * kHeads; ++k) all[k] = x[k / kHeads][k % kHeads];
    warp_inclusive_scan(all);
#pragma unroll
    for (int k = 0; k < kItems; ++k)
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            const float own = all[k * kHeads + h], last = __shfl_sync(kWholeWarp, own, kWarp - 1);
            x[k][h] = sum[h] + own;
            sum[h] += last;
        }
    if (kAlone) {
        __syncwarp();  // as the barrier does: what was read before may be replaced
#pragma unroll
        for (int h = 0; h < kHeads; ++h) total[h] = sum[h];
        return;
    }
    sums_before_warp(sum, shared, total);
#pragma unroll
    for (int k = 0; k < kItems; ++k)
#pragma unroll
        for (int h = 0; h < kHeads; ++h) x[k][h] += sum[h];
}

// One double for each chunk, as two floats: its sum, later what is carried into it.
struct Carries {
    float* data;  // of the first sequence, chunk and head
    std::int64_t ld_sequence, ld_chunk, ld_head, ld_part;
    __device__ float* at(std::int64_t s, std::int64_t c, std::int64_t h) const {
        return data + s * ld_sequence + c * ld_chunk + h * ld_head;
    }
    __device__ double get(std::int64_t s, std::int64_t c, std::int64_t h) const {
        const float* p = at(s, c, h);
        return double(p[0]) + double(p[ld_part]);
    }
    __device__ void set(std::int64_t s, std::int64_t c, std::int64_t h, double x) const {
        float* p = at(s, c, h);
        p[0] = float(x);
        p[ld_part] = isfinite(p[0]) ? float(x - double(p[0])) : 0.f;
    }
};

// How sequences are cut: `chunks` each, of `length` steps but for the last, which takes the rest. One chunk: not cut.
struct Cut {
    int chunks;
    std::int64_t length;
};
// What a block, or a warp alone, works on: steps first..stop-1 of heads h and h + 1 of sequence s, whose tokens are
// begin..end-1. Nothing where there are no more sequences.
struct Part {
    int s, c, h;
    std::int64_t begin, end, first, stop;
    bool exists, both;
};
template <bool kAlone>
__device__ Part part_of(const Packed& seq, const Cut& cut, int heads) {
    const int pairs = ceil_div(heads, kHeads);
    const int index = kAlone ? blockIdx.x * kAloneWarps + threadIdx.x / kWarp : blockIdx.x;
    Part p;
    p.h = index % pairs * kHeads, p.c = index / pairs % cut.chunks, p.s = index / pairs / cut.chunks;
    p.exists = !kAlone || p.s < seq.count, p.both = p.h + 1 < heads;
    if (!p.exists) return p;
    p.begin = seq.sequence_begin(p.s), p.end = seq.sequence_end(p.s);
    p.first = p.c * cut.length;
    p.stop = p.c == cut.chunks - 1 ? p.end - p.begin : p.first + cut.length;
    return p;
}
// The first step of the thread in the tile that begins at `tile`, and from a tile to the next.
template <bool kAlone>
__device__ std::int64_t first_step(std::int64_t tile) {
    const int lane = threadIdx.x % kWarp;
    return tile + lane + (kAlone ? 0 : std::int64_t(threadIdx.x - lane) * kItems);
}
template <bool kAlone>
__device__ std::int64_t steps_of_tile() {
    return std::int64_t(kAlone ? kWarp : blockDim.x) * kItems;
}

// Sums of a chunk, by all threads of its block; value(v, step): of both heads.
template <class Value>
__device__ void store_chunk_sums(const Carries& carries, const Part& p, Value&& value) {
    __shared__ double shared[kHeads][kMaxWarps];
    float sum[kHeads] = {};
#pragma unroll 4
    for (std::int64_t step = p.first + threadIdx.x; step < p.stop; step += blockDim.x) {
        float v[kHeads];
        value(v, step);
        sum[0] += v[0], sum[1] += v[1];
    }
    double warp[kHeads] = {warp_sum(sum[0]), warp_sum(sum[1])}, total[kHeads];
    sums_before_warp(warp, shared, total);
    if (threadIdx.x == 0) carries.set(p.s, p.c, p.h, total[0]);
    if (threadIdx.x == 0 && p.both) carries.set(p.s, p.c, p.h + 1, total[1]);
}

// One block per sequence and head: sums of chunks become what is carried into them. initial: [heads] or null.
__global__ __launch_bounds__(kFinishThreads) void carry_kernel(Carries carries, const float* initial, int chunks,
                                                               int heads) {
    __shared__ double shared[2][1][kFinishThreads / kWarp];
    const int s = blockIdx.x / heads, h = blockIdx.x % heads;
    double carried = initial ? initial[h] : 0.f;
    int turn = 0;
    for (int tile = 0; tile < chunks; tile += kFinishThreads, turn ^= 1) {
        const int c = tile + threadIdx.x;
        double sum[1] = {c < chunks ? carries.get(s, c, h) : 0.0}, warp[1], total[1];
        warp_inclusive_scan(sum);
        warp[0] = __shfl_sync(kWholeWarp, sum[0], kWarp - 1);
        sums_before_warp(warp, shared[turn], total);
        const double before = __shfl_up_sync(kWholeWarp, sum[0], 1);
        if (c < chunks) carries.set(s, c, h, carried + (warp[0] + (threadIdx.x % kWarp > 0 ? before : 0.0)));
        carried += total[0];
    }
}

struct ForwardArgs {
    float* F;
    const float *z, *bias;
    float* carry;  // or null
    std::int64_t ld_F, ld_z;
    int heads;
    bool aligned_z, aligned_F;
    Packed seq;
    Cut cut;
    Carries carries;  // in F itself, in the first two rows of each chunk, which are written last
    // The biases of a part's heads.
    __device__ void load_bias(float (&v)[kHeads], const Part& p) const {
        v[0] = bias[p.h], v[1] = p.both ? bias[p.h + 1] : 0.f;
    }
};

__global__ void forward_sums_kernel(ForwardArgs a) {
    const Part p = part_of<false>(a.seq, a.cut, a.heads);
    const Place place{p.both, a.aligned_z};
    float bias[kHeads];
    a.load_bias(bias, p);
    store_chunk_sums(a.carries, p, [&](float(&v)[kHeads], std::int64_t step) {
        place.load(v, a.z + (p.begin + step) * a.ld_z + p.h);
        v[0] = log_sigmoid(v[0] + bias[0]), v[1] = log_sigmoid(v[1] + bias[1]);
    });
}

template <bool kAlone>
__global__ void forward_kernel(ForwardArgs a) {
    __shared__ float shared[2][kHeads][kMaxWarps];
    const Part p = part_of<kAlone>(a.seq, a.cut, a.heads);
    if (!p.exists) return;
    const Place from{p.both, a.aligned_z}, to{p.both, a.aligned_F};
    float bias[kHeads];
    a.load_bias(bias, p);
    double carried[kHeads] = {};  // read by every thread before the first barrier, replaced by one thread after it
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
        if (h > 0 && !p.both) continue;
        if (a.cut.chunks > 1)
            carried[h] = a.carries.get(p.s, p.c, p.h + h);
        else if (a.carry)
            carried[h] = a.carry[p.h + h];
    }
    int turn = 0;
    for (std::int64_t tile = p.first; tile < p.stop; tile += steps_of_tile<kAlone>(), turn ^= 1) {
        const std::int64_t mine = first_step<kAlone>(tile);
        Tile x{};
        float total[kHeads];
#pragma unroll
        for (int k = 0; k < kItems; ++k)
            if (mine + k * kWarp < p.stop) from.load(x[k], a.z + (p.begin + mine + k * kWarp) * a.ld_z + p.h);
#pragma unroll
        for (int k = 0; k < kItems; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) x[k][h] = mine + k * kWarp < p.stop ? log_sigmoid(x[k][h] + bias[h]) : 0.f;
        cumulative_sums<kAlone>(x, shared[turn], total);
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
            const std::int64_t token = p.begin + mine + k * kWarp;
            if (token >= p.begin + p.stop) continue;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) x[k][h] = float(carried[h] + double(x[k][h]));
            to.store(a.F + token * a.ld_F + p.h, x[k]);
            if (a.carry && token == p.end - 1) Place{p.both, false}.store(a.carry + p.h, x[k]);
        }
        carried[0] += double(total[0]), carried[1] += double(total[1]);
    }
}

struct BackwardArgs {
    nv_bf16* dz;
    float* partial;  // [sequences][chunks][heads]: each chunk's share of dbias
    const float *dF, *z, *bias;
    std::int64_t ld_dz, ld_dF, ld_z;
    int heads;
    bool aligned_dF, aligned_z;
    Packed seq;
    Cut cut;
    Carries carries;
};

// Steps count from the last token to the front.
__global__ void backward_sums_kernel(BackwardArgs a) {
    const Part p = part_of<false>(a.seq, a.cut, a.heads);
    const Place place{p.both, a.aligned_dF};
    store_chunk_sums(a.carries, p, [&](float(&v)[kHeads], std::int64_t step) {
        place.load(v, a.dF + (p.end - 1 - step) * a.ld_dF + p.h);
    });
}

template <bool kAlone>
__global__ void backward_kernel(BackwardArgs a) {
    dependents_may_start();
    __shared__ float shared[2][kHeads][kMaxWarps];
    const Part p = part_of<kAlone>(a.seq, a.cut, a.heads);
    if (!p.exists) return;
    const Place of_dF{p.both, a.aligned_dF}, of_z{p.both, a.aligned_z};
    const std::int64_t last = p.end - 1;
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    double carried[kHeads] = {};
    if (a.cut.chunks > 1) {
        carried[0] = a.carries.get(p.s, p.c, p.h);
        if (p.both) carried[1] = a.carries.get(p.s, p.c, p.h + 1);
    }
    float dbias[kHeads] = {}, total[kHeads];
    int turn = 0;
    for (std::int64_t tile = p.first; tile < p.stop; tile += steps_of_tile<kAlone>(), turn ^= 1) {
        const std::int64_t mine = first_step<kAlone>(tile);
        Tile x{}, z{};
#pragma unroll
        for (int k = 0; k < kItems; ++k)
            if (mine + k * kWarp < p.stop) of_dF.load(x[k], a.dF + (last - mine - k * kWarp) * a.ld_dF + p.h);
#pragma unroll
        for (int k = 0; k < kItems; ++k)
            if (mine + k * kWarp < p.stop) of_z.load(z[k], a.z + (last - mine - k * kWarp) * a.ld_z + p.h);
        cumulative_sums<kAlone>(x, shared[turn], total);
#pragma unroll
        for (int k = 0; k < kItems; ++k) {
            if (mine + k * kWarp >= p.stop) continue;
            nv_bf16* out = a.dz + (last - mine - k * kWarp) * a.ld_dz + p.h;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                const float sum = float(carried[h] + double(x[k][h]));
                const float dz = sum / (1.f + expf(z[k][h] + bias[h]));  // exp may be infinite: 0
                if (h == 0 || p.both) out[h] = from_float<nv_bf16>(dz);
                dbias[h] += dz;
            }
        }
        carried[0] += double(total[0]), carried[1] += double(total[1]);
    }
    float* partial = a.partial + (std::int64_t(p.s) * a.cut.chunks + p.c) * a.heads + p.h;
    float sum[kHeads] = {warp_sum(dbias[0]), warp_sum(dbias[1])};
    if (!kAlone) {
        sums_before_warp(sum, shared[turn], total);
        sum[0] = total[0], sum[1] = total[1];
    }
    if (threadIdx.x % (kAlone ? kWarp : kMaxWarps * kWarp) == 0) Place{p.both, false}.store(partial, sum);
}

// One block per head: dbias_h += sum over sequences and their chunks.
__global__ __launch_bounds__(kFinishThreads) void finish_kernel(float* dbias, const float* partial, int rows,
                                                                int heads) {
    __shared__ float shared[kFinishThreads / kWarp];
    wait_for_previous();
    float sum = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows; i += kFinishThreads) sum += partial[std::int64_t(i) * heads + blockIdx.x];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) dbias[blockIdx.x] += sum;
}

// Sequences of one length are cut if that length is enough; packings of several lengths are not. The same on every
// device, as the order of the sums depends on it.
Cut cut_of(const Packed& seq) {
    const std::int64_t length = seq.length > 0 ? seq.length : seq.count == 1 ? seq.tokens : 0;
    const std::int64_t most = kGateChunks / seq.count, enough = length / kShortestChunk;
    const std::int64_t chunks = enough < most ? enough : most;
    return chunks > 1 ? Cut{int(chunks), length / chunks} : Cut{1, length};
}
// Threads of a part: enough for an average one in one tile, as a power of two. A single warp is alone.
unsigned threads_for(const Packed& seq, const Cut& cut) {
    unsigned threads = kWarp;
    const std::int64_t tokens = seq.tokens / (std::int64_t(seq.count) * cut.chunks);
    while (threads < kMaxWarps * kWarp && std::int64_t(threads) * kItems < tokens) threads *= 2;
    return threads;
}
template <class T>
bool are_pairs_aligned(const Mat<T>& m) {
    constexpr std::uintptr_t bytes = kHeads * sizeof(T);
    return m.cols % kHeads == 0 && m.ld % kHeads == 0 && reinterpret_cast<std::uintptr_t>(m.data) % bytes == 0;
}
struct Launch {
    unsigned parts, threads;
    bool alone;
    Launch(const Packed& seq, const Cut& cut, std::int64_t heads) : threads(threads_for(seq, cut)) {
        const std::int64_t all = seq.count * ceil_div(heads, std::int64_t(kHeads)) * cut.chunks;
        FIEDLER_REQUIRE("gate", all < (std::int64_t(1) << 31));
        parts = unsigned(all), alone = threads == kWarp;
    }
    template <class Args>
    void operator()(const Cuda& dev, void (*alone_kernel)(Args), void (*kernel)(Args), const Args& args) const {
        if (alone)
            alone_kernel<<<ceil_div(std::int64_t(parts), std::int64_t(kAloneWarps)), kAloneWarps * kWarp, 0,
                           stream_of(dev)>>>(args);
        else
            kernel<<<parts, threads, 0, stream_of(dev)>>>(args);
    }
};

}  // namespace

void gate_forward(const Cuda& dev, const GateForward<float>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    const Cut cut = cut_of(p.seq);
    const Carries carries{p.F.data, p.seq.length * p.F.ld, cut.length * p.F.ld, 1, p.F.ld};
    const ForwardArgs args{.F = p.F.data,
                           .z = p.z.data,
                           .bias = p.bias.data,
                           .carry = p.carry.data,
                           .ld_F = p.F.ld,
                           .ld_z = p.z.ld,
                           .heads = int(p.z.cols),
                           .aligned_z = are_pairs_aligned(p.z),
                           .aligned_F = are_pairs_aligned(p.F),
                           .seq = p.seq,
                           .cut = cut,
                           .carries = carries};
    const Launch launch(p.seq, cut, p.z.cols);
    if (cut.chunks > 1) {
        forward_sums_kernel<<<launch.parts, launch.threads, 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("gate_forward_sums");
        carry_kernel<<<unsigned(p.seq.count * args.heads), kFinishThreads, 0, stream_of(dev)>>>(carries, p.carry.data,
                                                                                                cut.chunks, args.heads);
        LAUNCH_CHECK("gate_carry");
    }
    launch(dev, forward_kernel<true>, forward_kernel<false>, args);
    LAUNCH_CHECK("gate_forward");
}

void gate_backward(const Cuda& dev, const GateBackward<bf16>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    FIEDLER_REQUIRE("gate", p.scratch && p.scratch.size >= gate_scratch_elements(p.seq.count, p.z.cols));
    const Cut cut = cut_of(p.seq);
    const std::int64_t heads = p.z.cols, rows = std::int64_t(p.seq.count) * cut.chunks;
    const Carries carries{p.scratch.data, 2 * heads * cut.chunks, 2 * heads, 2, 1};
    const BackwardArgs args{.dz = nv(p.dz.data),
                            .partial = p.scratch.data + (cut.chunks > 1 ? 2 * heads * rows : 0),
                            .dF = p.dF.data,
                            .z = p.z.data,
                            .bias = p.bias.data,
                            .ld_dz = p.dz.ld,
                            .ld_dF = p.dF.ld,
                            .ld_z = p.z.ld,
                            .heads = int(heads),
                            .aligned_dF = are_pairs_aligned(p.dF),
                            .aligned_z = are_pairs_aligned(p.z),
                            .seq = p.seq,
                            .cut = cut,
                            .carries = carries};
    const Launch launch(p.seq, cut, heads);
    if (cut.chunks > 1) {
        backward_sums_kernel<<<launch.parts, launch.threads, 0, stream_of(dev)>>>(args);
        LAUNCH_CHECK("gate_backward_sums");
        carry_kernel<<<unsigned(p.seq.count * args.heads), kFinishThreads, 0, stream_of(dev)>>>(carries, nullptr,
                                                                                                cut.chunks, args.heads);
        LAUNCH_CHECK("gate_carry");
    }
    launch(dev, backward_kernel<true>, backward_kernel<false>, args);
    LAUNCH_CHECK("gate_backward");
    launch_dependent(dev, finish_kernel, unsigned(heads), kFinishThreads, 0, p.dbias.data,
                     static_cast<const float*>(args.partial), int(rows), int(heads));
    LAUNCH_CHECK("gate_finish");
}

}  // namespace fiedler
