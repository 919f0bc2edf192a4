// kernels/objective.cu: losses of outputs (see objective.h). A row is one group of lanes: four where it is short, else a
// warp. Its outputs are read again for each pass, from the first-level cache.
#include <cstdint>

#include "kernels/common.cuh"
#include "kernels/objective.h"

namespace fiedler {
namespace {

constexpr int kThreads = 128, kShort = 16;  // kShort: outputs of a row that four lanes look after

struct Args {
    float* losses;
    std::int32_t* counts;
    nv_bf16* doutputs;
    float* predictions;
    const float* outputs;
    const std::int32_t* classes;
    const float *targets, *weights, *row_shift, *row_scale, *scale_by;
    std::int64_t ld_doutputs, ld_predictions, ld_outputs, ld_targets, rows;
    int count, width;  // outputs of a row, and columns of doutputs
    float scale, smoothing, delta;
};

// Over the lanes of a group, the same value in each. The groups of a warp may be at different places.
template <int kLanes>
__device__ unsigned group_mask() {
    return (0xffffffffu >> (kWarp - kLanes)) << (threadIdx.x % kWarp / kLanes * kLanes);
}
template <int kLanes, class V>
__device__ V group_sum(V v) {
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) v += __shfl_xor_sync(group_mask<kLanes>(), v, o);
    return v;
}
template <int kLanes>
__device__ float group_max(float v) {
#pragma unroll
    for (int o = kLanes / 2; o > 0; o /= 2) v = fmaxf(v, __shfl_xor_sync(group_mask<kLanes>(), v, o));
    return v;
}

struct Term {
    float loss, gradient;  // of one output
};
__device__ float sigmoid(float o) {
    const float e = expf(-fabsf(o));
    return (o >= 0.f ? 1.f : e) / (1.f + e);
}
__device__ Term binary_term(float o, float t, float smoothing) {
    const float q = (1.f - smoothing) * t + smoothing / 2;
    // A NaN must not be lost in the maximum.
    return {(o < 0.f ? 0.f : o) - o * q + log1pf(expf(-fabsf(o))), sigmoid(o) - q};
}
template <ObjectiveKind kKind>
__device__ Term number_term(float error, float delta) {
    const float size = fabsf(error);
    if constexpr (kKind == ObjectiveKind::squared) return {error * error, 2.f * error};
    if constexpr (kKind == ObjectiveKind::absolute) return {size, error > 0.f ? 1.f : error < 0.f ? -1.f : error};
    if (size <= delta) return {error * error / 2, error};
    return {delta * (size - delta / 2), isnan(error) ? error : copysignf(delta, error)};
}

template <int kLanes>
__device__ void classes_row(const Args& a, std::int64_t row, int lane, float factor) {
    const float* o = a.outputs + row * a.ld_outputs;
    float top = -INFINITY;
    for (int k = lane; k < a.count; k += kLanes) top = fmaxf(top, o[k]);
    top = group_max<kLanes>(top);
    float sum = 0, mean = 0;  // mean of o - top
    for (int k = lane; k < a.count; k += kLanes) sum += expf(o[k] - top), mean += (o[k] - top) / float(a.count);
    sum = group_sum<kLanes>(sum), mean = group_sum<kLanes>(mean);
    const int target = a.classes ? a.classes[row] : -1;
    const float even = a.smoothing / float(a.count), weight = a.weights ? a.weights[row] : 1.f;
    for (int k = lane; k < a.count; k += kLanes) {
        const float probability = expf(o[k] - top) / sum, q = even + (k == target ? 1.f - a.smoothing : 0.f);
        if (a.predictions) a.predictions[row * a.ld_predictions + k] = probability;
        if (a.doutputs)
            a.doutputs[row * a.ld_doutputs + k] =
                from_float<nv_bf16>(target >= 0 ? factor * weight * (probability - q) : 0.f);
    }
    if (!a.classes || lane != 0) return;
    float loss = 0;
    if (target >= a.count)  // a broken contract: a NaN shows it, instead of memory read out of bounds
        loss = __int_as_float(0x7fffffff);
    else if (target >= 0)
        loss = weight * (logf(sum) - (1.f - a.smoothing) * (o[target] - top) - a.smoothing * mean);
    a.losses[row] = loss;
    a.counts[row] = target >= 0;
}

template <ObjectiveKind kKind, int kLanes>
__device__ void values_row(const Args& a, std::int64_t row, int lane, float factor) {
    constexpr bool kBinary = kKind == ObjectiveKind::binary;
    const float shift = a.row_shift ? a.row_shift[row] : 0.f, stretch = a.row_scale ? a.row_scale[row] : 1.f;
    const float weight = a.weights ? a.weights[row] : 1.f, slope = factor * weight * stretch;
    float sum = 0;
    int known = 0;
    for (int k = lane; k < a.count; k += kLanes) {
        const float o = a.outputs[row * a.ld_outputs + k], g = shift + stretch * o;
        if (a.predictions) a.predictions[row * a.ld_predictions + k] = kBinary ? sigmoid(o) : g;
        if (!a.targets) continue;
        const float t = a.targets[row * a.ld_targets + k];
        Term term{0.f, 0.f};
        if (!isnan(t)) {
            if constexpr (kBinary)
                term = binary_term(o, t, a.smoothing);
            else
                term = number_term<kKind>(g - t, a.delta);
            sum += term.loss;
            ++known;
        }
        if (a.doutputs) a.doutputs[row * a.ld_doutputs + k] = from_float<nv_bf16>(slope * term.gradient);
    }
    if (!a.targets) return;
    sum = group_sum<kLanes>(sum), known = group_sum<kLanes>(known);
    if (lane != 0) return;
    a.losses[row] = weight * sum;
    a.counts[row] = known;
}

template <ObjectiveKind kKind, int kLanes>
__global__ __launch_bounds__(kThreads) void objective_kernel(Args a) {
    const std::int64_t row = std::int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    if (row >= a.rows) return;
    const int lane = int(threadIdx.x) % kLanes;
    const float factor = a.scale * (a.scale_by ? *a.scale_by : 1.f);
    if constexpr (kKind == ObjectiveKind::classes)
        classes_row<kLanes>(a, row, lane, factor);
    else
        values_row<kKind, kLanes>(a, row, lane, factor);
    if (a.doutputs)
        for (int k = a.count + lane; k < a.width; k += kLanes)
            a.doutputs[row * a.ld_doutputs + k] = from_float<nv_bf16>(0.f);
}

template <ObjectiveKind kKind>
void launch(const Args& a, cudaStream_t stream) {
    const auto blocks = [&](int lanes) { return unsigned(ceil_div(a.rows, std::int64_t(kThreads / lanes))); };
    if (a.count <= kShort)
        objective_kernel<kKind, 4><<<blocks(4), kThreads, 0, stream>>>(a);
    else
        objective_kernel<kKind, kWarp><<<blocks(kWarp), kThreads, 0, stream>>>(a);
    LAUNCH_CHECK("objective");
}

// One block; each thread adds every 1024th row in order, then the threads' sums are added as a tree: always the same.
constexpr int kSumThreads = 1024;
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(float* total, std::int64_t* count, const float* losses, const std::int32_t* counts, std::int64_t n) {
    __shared__ double sums[kSumThreads];
    __shared__ std::int64_t numbers[kSumThreads];
    double sum = 0;
    std::int64_t number = 0;
    for (std::int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += double(losses[i]), number += counts[i];
    sums[threadIdx.x] = sum, numbers[threadIdx.x] = number;
    __syncthreads();
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
        if (int(threadIdx.x) < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            numbers[threadIdx.x] += numbers[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        *total = float(double(*total) + sums[0]);
        *count += numbers[0];
    }
}

}  // namespace

void objective(const Cuda& dev, const Objective<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("objective",
                    p.outputs.cols <= INT32_MAX / 2 && p.doutputs.cols <= INT32_MAX / 2 && p.outputs.rows <= INT32_MAX);
    if (p.outputs.rows == 0) return;
    const Args a{p.losses.data,
                 p.counts.data,
                 nv(p.doutputs.data),
                 p.predictions.data,
                 p.outputs.data,
                 p.classes.data,
                 p.targets.data,
                 p.weights.data,
                 p.row_shift.data,
                 p.row_scale.data,
                 p.scale_by.data,
                 p.doutputs.ld,
                 p.predictions.ld,
                 p.outputs.ld,
                 p.targets.ld,
                 p.outputs.rows,
                 int(p.outputs.cols),
                 int(p.doutputs.cols),
                 p.scale,
                 p.smoothing,
                 p.delta};
    const cudaStream_t stream = stream_of(dev);
    switch (p.kind) {
        case ObjectiveKind::classes:
            return launch<ObjectiveKind::classes>(a, stream);
        case ObjectiveKind::binary:
            return launch<ObjectiveKind::binary>(a, stream);
        case ObjectiveKind::squared:
            return launch<ObjectiveKind::squared>(a, stream);
        case ObjectiveKind::absolute:
            return launch<ObjectiveKind::absolute>(a, stream);
        case ObjectiveKind::huber:
            return launch<ObjectiveKind::huber>(a, stream);
    }
}

void objective_sum(const Cuda& dev, const ObjectiveSum<float>& p) {
    check(p);
    sum_kernel<<<1, kSumThreads, 0, stream_of(dev)>>>(p.total.data, p.count.data, p.losses.data, p.counts.data,
                                                      p.losses.size);
    LAUNCH_CHECK("objective_sum");
}

}  // namespace fiedler
