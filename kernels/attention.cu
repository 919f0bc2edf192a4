// Scalar-distance attention on the GPU, forward and decoding: weights in f32 registers, tensor cores for P V. The
// backward is in attention_backward.cu.
// Rows and columns are tokens of the flat axis; what a row sees (sequence, causality, window) is an interval, so a tile
// is skipped, taken whole, or masked, 16 columns at a time.
#include "kernels/attention_forward.cuh"
#include "kernels/attention_forward_packed_sm90.h"
#include "kernels/attention_forward_sm90.h"

namespace fiedler {
namespace {

using namespace attention_forward_tile;

template <int D, int R>
__global__ void __launch_bounds__(Shape<D, R>::kBlockThreads, Shape<D, R>::kTuned.blocks)
    attention_forward_kernel(AttentionForward<bf16> p, Order order) {
    using S = Shape<D, R>;
    __shared__ Shared<D, R> shared;
    int head, first;
    order.place(static_cast<int>(blockIdx.x), head, first);
    const int tokens = p.seq.tokens, warp_first = first + warp_in_block() * S::kWarpQueries;
    const Sight sight = Sight::of_queries(p.seq, p.window, p.causal);
    const Band block(sight, first, min(first + S::kQueries, tokens) - 1);
    const Band band(sight, warp_first, min(warp_first + S::kWarpQueries, tokens) - 1);
    const int last = ceil_div(block.hi, S::kKeys) - 1;  // stages of keys are numbered by their place on the token axis
    const Loader<D, R> loader{p, shared};
    typename Loader<D, R>::Raw raw;
    loader.read(raw, last * S::kKeys, head, block.lo, block.hi);
    cp_async_commit();
    const bool bounded = prepare(shared, p, sight, block, band, head, first);
    Queries<D, R> queries(shared, p);
    queries.load(true);

    // Latest keys first, so that the queries' own tokens come before those that the gate may have closed. A round
    // brings the stage after the one that it computes with, and reads the keys of the one after that. From stage
    // `unbounded` on, the maximum runs. Bits of `live`: whether the next stage (0) and this one (1) hold weights for the
    // warp.
    int unbounded = bounded ? -1 : last;
    unsigned live = 0;
    for (int stage = last + 1;; --stage) {
        const int next = stage - 1;
        const View& view = shared.views[warp_in_block()];
        const bool ends = next < view.block.x / S::kKeys;
        float* parts = shared.least_gate[next & 3];
        cp_async_wait<0>();
        const float F = loader.gate(raw, next * S::kKeys, view.block.x, view.block.y);
        loader.note_least(parts, raw, F);
        __syncthreads();
        live *= 2;
        if (!ends) {
            float least = parts[0];
#pragma unroll
            for (int i = 1; i < S::kParts; ++i) least = fminf(least, parts[i]);
            const float faded = p.skip ? kFaded : INFINITY;
            if (!(view.reach - least < -faded)) live |= 1;
            if (!(view.gate - least <= kGateRange<R>)) unbounded = max(unbounded, next);
            if (!(view.far_reach - least < -faded)) loader.values(next & 1, next * S::kKeys, view.block.z);
            loader.keys(next & 1, raw, F, view.centre, view.gate, next > unbounded);
            loader.read(raw, (next - 1) * S::kKeys, view.block.z, view.block.x, view.block.y);
        }
        cp_async_commit();
        if (stage == unbounded) queries.load(false);
        if (live & 2) queries.add_stage(stage, stage > unbounded);
        if (ends) break;
    }
    __syncthreads();  // the values become buffers of results
    queries.store(unbounded < 0, shared.values[0][0].data + warp_in_block() * 16 * ValueTile<D>::kStride);
}

// One block per head: a warp takes 32 keys at a time, a lane scores one of them, then all lanes share the values.
constexpr int kDecodeWarps = 16, kDecodeWidth = 128;
__global__ void __launch_bounds__(kDecodeWarps* kWarp) attention_decode_kernel(AttentionDecode<bf16> p) {
    __shared__ float query[16], tops[kDecodeWarps], sums[kDecodeWarps], parts[kDecodeWarps][kDecodeWidth];
    const int head = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int length = static_cast<int>(p.v.rows), width = static_cast<int>(p.v.cols) / p.heads;
    const int first = p.window > 0 && p.window < length ? length - p.window : 0;
    if (static_cast<int>(threadIdx.x) < p.scalars) query[threadIdx.x] = p.a.data[head * p.scalars + threadIdx.x];
    const float gate = p.F.data == nullptr ? 0.f : p.F.data[(length - 1) * p.F.ld + head];
    __syncthreads();

    float top = -INFINITY, sum = 0.f, o[2][2] = {};  // columns 2 lane + 64 h, + 1
    for (int base = first + warp * kWarp; base < length; base += kDecodeWarps * kWarp) {
        const int j = base + lane, count = min(kWarp, length - base);
        float s = -INFINITY;
        if (j < length) {
            const float* b = p.b.data + j * p.b.ld + head * p.scalars;
            s = p.F.data == nullptr ? 0.f : gate - p.F.data[j * p.F.ld + head];
            for (int r = 0; r < p.scalars; ++r) s -= fabsf(query[r] - b[r]);
        }
        const float best = fmaxf(top, warp_max(s));  // finite: lane 0 has a key
        const float rescale = exp_fast(top - best), weight = exp_fast(s - best);
        top = best;
        sum = sum * rescale + weight;
#pragma unroll
        for (int h = 0; h < 2; ++h) o[h][0] *= rescale, o[h][1] *= rescale;
        const nv_bf16* v = nv(p.v.data) + base * p.v.ld + head * width;
#pragma unroll 8
        for (int k = 0; k < count; ++k) {
            const float w = __shfl_sync(0xffffffffu, weight, k);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int column = 2 * lane + 64 * h;
                if (column >= width) continue;
                const auto pair = *reinterpret_cast<const __nv_bfloat162*>(v + k * p.v.ld + column);
                o[h][0] = fmaf(w, __low2float(pair), o[h][0]);
                o[h][1] = fmaf(w, __high2float(pair), o[h][1]);
            }
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) tops[warp] = top, sums[warp] = sum;
#pragma unroll
    for (int h = 0; h < 2; ++h) parts[warp][2 * lane + 64 * h] = o[h][0], parts[warp][2 * lane + 64 * h + 1] = o[h][1];
    __syncthreads();

    const int column = threadIdx.x;
    if (column >= width) return;
    float best = -INFINITY, total = 0.f, result = 0.f;
    for (int w = 0; w < kDecodeWarps; ++w) best = fmaxf(best, tops[w]);  // finite: warp 0 has a key
    for (int w = 0; w < kDecodeWarps; ++w) {
        const float scale = exp_fast(tops[w] - best);  // 0 for a warp without keys
        total = fmaf(scale, sums[w], total);
        result = fmaf(scale, parts[w][column], result);
    }
    nv(p.o.data)[head * width + column] = from_float<nv_bf16>(result / total);
}

#if FIEDLER_SM90A  // kernels/attention_forward_sm90.cu and attention_forward_packed_sm90.cu are in this build
bool try_sm90(const Cuda& device, const AttentionForward<bf16>& p) {
    if (attention_forward_packed_sm90_takes(device, p)) return attention_forward_packed_sm90(device, p), true;
    if (!attention_forward_sm90_takes(device, p)) return false;
    attention_forward_sm90(device, p);
    return true;
}
#else
bool try_sm90(const Cuda&, const AttentionForward<bf16>&) { return false; }
#endif

void check_all(const AttentionForward<bf16>& p) {
    check(p);
    check_width(p.v.cols / p.heads);
    FIEDLER_REQUIRE("attention", is_aligned16(p.v) && is_aligned16(p.o));
}
void general(const Cuda& device, const AttentionForward<bf16>& p) {
    with_sizes(static_cast<int>(p.v.cols / p.heads), p.scalars, [&]<int D, int R>() {
        using S = Shape<D, R>;
        const Order order = Order::of(p.seq, p.heads, S::kQueries, D);
        attention_forward_kernel<D, R><<<order.grid(), S::kBlockThreads, 0, stream_of(device)>>>(p, order);
    });
    LAUNCH_CHECK("attention_forward");
}

}  // namespace

void attention_forward(const Cuda& device, const AttentionForward<bf16>& p) {
    check_all(p);
    if (!try_sm90(device, p)) general(device, p);
}
bool attention_forward_by_path(const Cuda& device, const AttentionForward<bf16>& p, AttentionPath path) {
    check_all(p);
    if (path == AttentionPath::sm90) return try_sm90(device, p);
    general(device, p);
    return true;
}
void attention_decode(const Cuda& device, const AttentionDecode<bf16>& p) {
    check(p);
    check_width(p.v.cols / p.heads);
    FIEDLER_REQUIRE("attention", is_aligned16(p.v));
    attention_decode_kernel<<<static_cast<unsigned>(p.heads), kDecodeWarps * kWarp, 0, stream_of(device)>>>(p);
    LAUNCH_CHECK("attention_decode");
}

}  // namespace fiedler
