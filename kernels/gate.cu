// kernels/gate.cu: the forget gate (see gate.h). A block walks two neighbouring heads of a sequence in tiles of
// kLongRun tokens a thread: a scan within the tile in f32, the carry from tile to tile in two floats. It costs
// latencies and instructions, not bytes. So a tile's tokens are asked for before anything is waited for, and a thread
// adds up tokens that follow each other, so that few numbers go from lane to lane. In memory neighbouring lanes have
// neighbouring tokens, so that a warp's accesses touch few lines: the tokens change places in shared memory. Blocks
// of the same tokens are neighbours, so that each 32-byte sector comes from memory once. A warp does short sequences
// alone. Long ones are cut (gate_long.cuh).
//
// With few tokens, launching takes longer than the rest: kernels start while the one before them ends. They let the
// next one in when they have little left to do: on an H200, sooner is slower. What they read before they wait is
// where sequences begin and end, which comes from the host and is no kernel's work.
#include "kernels/dependent_launch.cuh"
#include "kernels/gate_args.cuh"
#include "kernels/gate_long.cuh"

namespace fiedler {
namespace {

using namespace gate_scan;

constexpr int kLongRun = 4;  // tokens of a thread in a tile; 1 or 2 where a warp has a short sequence alone

// What a block, or a warp alone, works on: all `stop` steps of heads h and h + 1 of sequence s, whose tokens are
// begin..end-1. No steps where there are no more sequences.
struct Part {
    int row, s, h, begin, end, stop;
    bool exists, both;
};
// blockIdx.x: the pair of heads; y and z: the sequence, or kAloneWarps of them.
template <bool kAlone>
__device__ Part part_of(const Packed& seq, int heads) {
    Part p{};
    p.row = blockIdx.z * gridDim.y + blockIdx.y;
    p.h = blockIdx.x * kHeads, p.both = p.h + 1 < heads;
    p.s = kAlone ? p.row * kAloneWarps + int(threadIdx.x) / kWarp : p.row;
    p.exists = p.s < seq.count;
    if (!p.exists) return p;
    p.begin = seq.sequence_begin(p.s), p.end = seq.sequence_end(p.s);
    p.stop = p.end - p.begin;
    return p;
}
// The first step of the thread, and from a tile to the next.
template <bool kAlone, int kRun>
__device__ int first_step() {
    const int lane = threadIdx.x % kWarp;
    return lane + (kAlone ? 0 : (int(threadIdx.x) - lane) * kRun);
}
template <bool kAlone, int kRun>
__device__ int steps_of_tile() {
    return (kAlone ? kWarp : int(blockDim.x)) * kRun;
}

// Where a thread's numbers of a tile are, kWarp steps apart; those less than `left` exist. Kernels make them before they
// load the first number. F's, made where they are stored to, are waited for: `fiedler bench gate`, 32 x 1,024 on an H200,
// 2.32 us instead of 2.25.
template <class T, int kRun>
struct Addresses {
    T* at[kRun];
    __device__ Addresses(T* first, std::int64_t ld) {
#pragma unroll
        for (int k = 0; k < kRun; ++k) at[k] = first + k * kWarp * ld;
    }
    template <bool kPairs>
    __device__ void load(Tile<kRun>& x, const Place<kPairs>& place, int left) const {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (k * kWarp < left) place.load(x[k], at[k]);
    }
    template <bool kPairs>
    __device__ void store(const Tile<kRun>& x, const Place<kPairs>& place, int left) const {
#pragma unroll
        for (int k = 0; k < kRun; ++k)
            if (k * kWarp < left) place.store(at[k], x[k]);
    }
    __device__ void move(std::int64_t by) {
#pragma unroll
        for (int k = 0; k < kRun; ++k) at[k] += by;
    }
};

// Arguments stay in constant memory: without being told so ptxas, of structs of this size, makes other code, which takes
// 4 % longer.
template <bool kAlone, int kRun, bool kPairs>
__global__ void forward_kernel(const __grid_constant__ ForwardArgs a) {
    __shared__ Shared<kAlone, kRun> shared;
    const Part p = part_of<kAlone>(a.seq, a.heads);
    if (!p.exists) return;
    const Place<kPairs> place{p.both};
    const int steps = steps_of_tile<kAlone, kRun>(), first = first_step<kAlone, kRun>();
    int left = p.stop - first;  // token k of the thread exists if k * kWarp < left
    Addresses<const float, kRun> z(a.z + std::int64_t(p.begin + first) * a.ld_z + p.h, a.ld_z);
    Addresses<float, kRun> F(a.F + std::int64_t(p.begin + first) * a.ld_F + p.h, a.ld_F);
    wait_for_previous();
    Tile<kRun> x{};
    z.load(x, place, left);  // before the bias is waited for
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    Carried carried[kHeads];
    if (a.carry) carried[0].high = a.carry[p.h], carried[1].high = p.both ? a.carry[p.h + 1] : 0.f;
    bool any_carried = a.carry != nullptr;
    for (int tile = steps, turn = 0;; tile += steps, turn ^= 1) {
        const bool more = tile < p.stop;
        Tile<kRun> next{};
        if (more) {
            z.move(steps * a.ld_z);
            z.load(next, place, left - steps);
        }
        // Tokens that do not exist come after all others: what they have does not matter.
#pragma unroll
        for (int k = 0; k < kRun; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) x[k][h] = log_sigmoid(x[k][h] + bias[h]);
        if (!more) dependents_may_start();
        cumulative_sums<kAlone, kRun>(x, shared, turn);
        if (any_carried) add_carried<kRun>(x, carried);
        F.store(x, place, left);
        if (a.carry && !more) {
#pragma unroll
            for (int k = 0; k < kRun; ++k)
                if (k * kWarp == left - 1) Place<false>{p.both}.store(a.carry + p.h, x[k]);
        }
        if (!more) return;
        any_carried = true;
        add_tile(carried, shared, turn);
        left -= steps;
        F.move(steps * a.ld_F);
#pragma unroll
        for (int k = 0; k < kRun; ++k) x[k][0] = next[k][0], x[k][1] = next[k][1];
    }
}

// Steps count from the last token to the front.
template <bool kAlone, int kRun, bool kPairs>
__global__ void backward_kernel(const __grid_constant__ BackwardArgs a) {
    __shared__ Shared<kAlone, kRun> shared;
    const Part p = part_of<kAlone>(a.seq, a.heads);
    if (p.row >= a.rows) return;
    const Place<kPairs> place{p.both};
    const int steps = steps_of_tile<kAlone, kRun>(), first = first_step<kAlone, kRun>();
    int left = p.stop - first;
    const std::int64_t last = p.end - 1 - first;
    Addresses<const float, kRun> from_dF(a.dF + last * a.ld_dF + p.h, -a.ld_dF),
        from_z(a.z + last * a.ld_z + p.h, -a.ld_z);
    Addresses<nv_bf16, kRun> dz(a.dz + last * a.ld_dz + p.h, -a.ld_dz);
    wait_for_previous();
    Tile<kRun> x{}, z{};
    from_dF.load(x, place, left);  // before the bias is waited for
    from_z.load(z, place, left);
    const float bias[kHeads] = {a.bias[p.h], p.both ? a.bias[p.h + 1] : 0.f};
    Carried carried[kHeads];
    float dbias[kHeads] = {};
    bool any_carried = false;
    for (int tile = 0, turn = 0; tile < p.stop; turn ^= 1) {
        tile += steps;
        const bool more = tile < p.stop;
        Tile<kRun> next_x{}, next_z{};
        if (more) {
            from_dF.move(-steps * a.ld_dF), from_z.move(-steps * a.ld_z);
            from_dF.load(next_x, place, left - steps), from_z.load(next_z, place, left - steps);
        }
#pragma unroll
        for (int k = 0; k < kRun; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) z[k][h] = sigmoid_of_minus(z[k][h] + bias[h]);
        cumulative_sums<kAlone, kRun>(x, shared, turn);
        if (any_carried) add_carried<kRun>(x, carried);
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
            if (k * kWarp >= left) continue;
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                x[k][h] = __fmul_rn(x[k][h], z[k][h]);
                dbias[h] += x[k][h];
            }
        }
        dz.store(x, place, left);
        left -= steps;
        if (more) {
            any_carried = true;
            add_tile(carried, shared, turn);
            dz.move(-steps * a.ld_dz);
        }
#pragma unroll
        for (int k = 0; k < kRun; ++k)
#pragma unroll
            for (int h = 0; h < kHeads; ++h) x[k][h] = next_x[k][h], z[k][h] = next_z[k][h];
    }
    dependents_may_start();
    __shared__ float2 of_warps[kMaxWarps];
    float sum[kHeads] = {warp_sum(dbias[0]), warp_sum(dbias[1])};
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = {sum[0], sum[1]};
    __syncthreads();
    if (threadIdx.x > 0) return;
#pragma unroll
    for (int w = 1; w < kMaxWarps; ++w)
        if (w < blockDim.x / kWarp) sum[0] += of_warps[w].x, sum[1] += of_warps[w].y;
    Place<false>{p.both}.store(a.partial + std::int64_t(p.row) * a.heads + p.h, sum);
}

// Sequences of one length are cut if that length is enough; packings of several lengths are not. The order of the sums
// depends on it (forward on whether there is a workspace, too), and on no device.
int chunks_of(const Packed& seq) {
    const int length = seq.length > 0 ? seq.length : seq.count == 1 ? seq.tokens : 0;
    return length < kGateLong ? 1 : ceil_div(length, int(kGateChunk));
}
// Threads of a part: enough for an average one in one tile, as a power of two. A single warp is alone.
unsigned threads_for(std::int64_t tokens) {
    unsigned threads = kWarp;
    while (threads < kMaxWarps * kWarp && std::int64_t(threads) * kLongRun < tokens) threads *= 2;
    return threads;
}
template <class T>
bool are_pairs_aligned(const Mat<T>& m) {
    constexpr std::uintptr_t bytes = kHeads * sizeof(T);
    return m.cols % kHeads == 0 && m.ld % kHeads == 0 && reinterpret_cast<std::uintptr_t>(m.data) % bytes == 0;
}
// Kernels of one pass: for warps that are alone, with 1, 2 and kLongRun tokens a lane, and for blocks.
template <class Args>
struct Kernels {
    void (*alone[3])(Args);
    void (*block)(Args);
};
struct Launch {
    dim3 blocks;  // of parts: pairs of heads, then `rows` along y and z
    unsigned threads;
    std::int64_t tokens, rows;
    Launch(const Packed& seq, std::int64_t heads) {
        constexpr std::int64_t kMostAlongY = 32768;
        rows = seq.count;
        tokens = seq.tokens / rows, threads = threads_for(tokens);
        if (threads == kWarp) rows = ceil_div(rows, std::int64_t(kAloneWarps));
        const std::int64_t y = rows < kMostAlongY ? rows : kMostAlongY;
        blocks = dim3(unsigned(ceil_div(heads, std::int64_t(kHeads))), unsigned(y), unsigned(ceil_div(rows, y)));
    }
    template <class Args>
    void operator()(const Cuda& dev, const Kernels<Args>& kernels, const Args& args) const {
        if (threads == kWarp)
            launch_dependent(dev,
                             kernels.alone[tokens <= kWarp       ? 0
                                           : tokens <= 2 * kWarp ? 1
                                                                 : 2],
                             blocks, kAloneWarps * kWarp, 0, args);
        else
            launch_dependent(dev, kernels.block, blocks, threads, 0, args);
    }
};
template <bool kPairs>
constexpr Kernels<ForwardArgs> kForward{
    {forward_kernel<true, 1, kPairs>, forward_kernel<true, 2, kPairs>, forward_kernel<true, kLongRun, kPairs>},
    forward_kernel<false, kLongRun, kPairs>};
template <bool kPairs>
constexpr Kernels<BackwardArgs> kBackward{
    {backward_kernel<true, 1, kPairs>, backward_kernel<true, 2, kPairs>, backward_kernel<true, kLongRun, kPairs>},
    backward_kernel<false, kLongRun, kPairs>};

}  // namespace

void gate_forward(const Cuda& dev, const GateForward<float>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    const int heads = int(p.z.cols), chunks = chunks_of(p.seq);
    const ForwardArgs args{.F = p.F.data,
                           .z = p.z.data,
                           .bias = p.bias.data,
                           .carry = p.carry.data,
                           .ld_F = p.F.ld,
                           .ld_z = p.z.ld,
                           .heads = heads,
                           .seq = p.seq};
    const bool pairs = are_pairs_aligned(p.z) && are_pairs_aligned(p.F);
    const Said said{static_cast<unsigned long long*>(dev.workspace), heads, chunks};
    const std::size_t bytes = std::size_t(p.seq.count) * chunks * heads * sizeof(*said.data);
    if (chunks > 1 && dev.workspace && dev.workspace_bytes >= bytes) {
        gate_long::launch(dev, pairs ? gate_long::forward_kernel<true> : gate_long::forward_kernel<false>, args, said);
        return;
    }
    const Launch launch(p.seq, p.z.cols);
    launch(dev, pairs ? kForward<true> : kForward<false>, args);
    LAUNCH_CHECK("gate_forward");
}

void gate_backward(const Cuda& dev, const GateBackward<bf16>& p) {
    check(p);
    if (p.z.rows == 0 || p.z.cols == 0) return;
    FIEDLER_REQUIRE("gate", p.pending || p.scratch.size >= gate_pending_elements(p.z.rows, p.seq.count, p.z.cols));
    PendingSums<float> own(p.scratch);
    PendingSums<float>& sums = p.pending ? *p.pending : own;
    const std::int64_t heads = p.z.cols;
    const int chunks = chunks_of(p.seq);
    const Launch launch(p.seq, heads);
    const bool is_cut = chunks > 1;
    const int rows = is_cut ? p.seq.count * chunks : int(launch.rows);
    float* const memory = sums.take((is_cut ? 3 : 1) * heads * rows).data;
    FIEDLER_REQUIRE("gate", reinterpret_cast<std::uintptr_t>(memory) % sizeof(double) == 0);
    const BackwardArgs args{.dz = nv(p.dz.data),
                            .partial = memory + (is_cut ? 2 * heads * rows : 0),
                            .dF = p.dF.data,
                            .z = p.z.data,
                            .bias = p.bias.data,
                            .ld_dz = p.dz.ld,
                            .ld_dF = p.dF.ld,
                            .ld_z = p.z.ld,
                            .heads = int(heads),
                            .rows = rows,
                            .seq = p.seq};
    sums.add({p.dbias.data, args.partial, heads, 1, rows, args.heads});
    const bool pairs = are_pairs_aligned(p.dF) && are_pairs_aligned(p.z) && are_pairs_aligned(p.dz);
    if (is_cut) {
        gate_long::launch(dev, pairs ? gate_long::backward_kernel<true> : gate_long::backward_kernel<false>, args,
                          Said{reinterpret_cast<unsigned long long*>(memory), int(heads), chunks});
    } else {
        launch(dev, pairs ? kBackward<true> : kBackward<false>, args);
        LAUNCH_CHECK("gate_backward");
    }
    if (!p.pending) finish_sums(dev, own);
}

}  // namespace fiedler
