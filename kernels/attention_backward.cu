// Scalar-distance attention on the GPU, backward: delta, one pass over the pairs, and the sum of da over groups of keys.
#include "kernels/attention_backward_packed.cuh"
#include "kernels/attention_backward_packed_sm90.h"
#include "kernels/attention_backward_sm90.h"
#include "kernels/dynamic_shared.cuh"

namespace fiedler {
namespace {

using namespace attention_tile;

// delta = dO . o per token and head; `parts` = D / 8 neighbouring lanes share one.
__global__ void __launch_bounds__(256) attention_delta_kernel(AttentionBackward<bf16> p, int parts) {
    const std::int64_t item = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / parts;
    const int part = static_cast<int>(threadIdx.x) % parts;
    const std::int64_t token = item / p.heads;
    const int head = static_cast<int>(item % p.heads);
    const bool valid = token < p.seq.tokens;
    float sum = 0.f;
    if (valid) {
        const int column = (head * parts + part) * 8;
        const auto g = load16(nv(p.do_.data) + token * p.do_.ld + column);
        const auto o = load16(nv(p.o.data) + token * p.o.ld + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(to_float(g.v[i]), to_float(o.v[i]), sum);
    }
    for (int i = parts / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (valid && part == 0) p.delta.data[token * p.delta.ld + head] = sum;
}

// The pass over the pairs.
template <int D, int R>
struct BackwardWay {
    static constexpr int kKeys = PackedShape<D, R>::kKeys, kBlockThreads = PackedShape<D, R>::kBlockThreads,
                         kBytes = sizeof(PackedShared<D, R>);
    static constexpr auto kernel = attention_backward_packed_kernel<D, R>;
};
template <int D>
struct BackwardWay<D, 1> {
    static constexpr int kKeys = BackwardShape<D>::kKeys, kBlockThreads = kThreads, kBytes = sizeof(BackwardShared<D>);
    static constexpr auto kernel = attention_backward_kernel<D>;
};
template <int D, int R>
void launch_backward(const Cuda& device, const AttentionBackward<bf16>& p) {
    using Way = BackwardWay<D, R>;
    constexpr int kKeys = Way::kKeys, bytes = Way::kBytes;
    BackwardGroups groups;
    groups.partial = p.partial.data;
    groups.slab_floats = attention_slab_elements(p.seq.tokens, p.heads, p.scalars);
    const auto most = std::min<std::int64_t>(p.partial.size / groups.slab_floats, attention_most_slabs(R));
    const AttentionSlabs slabs = attention_slabs(p.seq, p.longest, p.window, p.causal, kKeys, most);
    const int span = slabs.tiles * kKeys;
    groups.slabs = slabs.slabs, groups.tiles = slabs.tiles;
    groups.count = ceil_div(p.seq.tokens, span);
    groups.per_sequence = p.seq.length > 0 && p.seq.length % span == 0 ? p.seq.length / span : 0;

    const auto kernel = Way::kernel;
    allow_shared<bytes>(kernel);
    kernel<<<static_cast<unsigned>(groups.count * p.heads), Way::kBlockThreads, bytes, stream_of(device)>>>(p, groups);
    LAUNCH_CHECK("attention_backward");
    attention_da_kernel<R><<<blocks_of_da<R>(p), 256, 0, stream_of(device)>>>(p, groups, kKeys);
    LAUNCH_CHECK("attention_backward, da");
}

void check_all(const AttentionBackward<bf16>& p) {
    check(p);
    check_width(p.v.cols / p.heads);
    FIEDLER_REQUIRE("attention", is_aligned16(p.v) && is_aligned16(p.o) && is_aligned16(p.do_) && is_aligned16(p.dv));
    FIEDLER_REQUIRE("attention", p.partial.size >= attention_slab_elements(p.seq.tokens, p.heads, p.scalars));
}
void run_delta(const Cuda& device, const AttentionBackward<bf16>& p) {
    const int parts = static_cast<int>(p.v.cols / p.heads / 8);
    const std::int64_t lanes = p.v.rows * p.heads * parts;
    attention_delta_kernel<<<static_cast<unsigned>(ceil_div(lanes, std::int64_t(256))), 256, 0, stream_of(device)>>>(
        p, parts);
    LAUNCH_CHECK("attention_delta");
}
#if FIEDLER_SM90A  // the kernels of attention_backward_sm90.h and attention_backward_packed_sm90.h are in this build
bool try_sm90(const Cuda& device, const AttentionBackward<bf16>& p) {
    if (attention_backward_packed_sm90_takes(device, p)) return attention_backward_packed_sm90(device, p), true;
    if (!attention_backward_one_sm90_takes(device, p)) return false;
    attention_backward_one_sm90(device, p);
    return true;
}
#else
bool try_sm90(const Cuda&, const AttentionBackward<bf16>&) { return false; }
#endif

void general(const Cuda& device, const AttentionBackward<bf16>& p) {
    run_delta(device, p);
    with_sizes(static_cast<int>(p.v.cols / p.heads), p.scalars,
               [&]<int D, int R>() { launch_backward<D, R>(device, p); });
}

}  // namespace

void attention_backward(const Cuda& device, const AttentionBackward<bf16>& p) {
    check_all(p);
    if (!try_sm90(device, p)) general(device, p);
}
bool attention_backward_by_path(const Cuda& device, const AttentionBackward<bf16>& p, AttentionPath path) {
    check_all(p);
    if (path == AttentionPath::sm90) return try_sm90(device, p);
    general(device, p);
    return true;
}

}  // namespace fiedler
