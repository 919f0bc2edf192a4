// kernels/knn.cu: nearest neighbours on the GPU (contract in knn.h): cuBLASLt gives the products of a block of queries
// with a block of keys; then a warp scans the row of one query and keeps its list sorted in registers.
#include <math_constants.h>

#include <algorithm>
#include <array>
#include <memory>

#include "kernels/common.cuh"
#include "kernels/knn.h"

namespace fiedler {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kLoads = 4, kChunk = kLoads * 4 * kWarp;  // columns looked at between two votes of the warp
static_assert(kKnnMost == 2 * kWarp, "two entries of the list a lane");

// The same in every lane: at each step both lanes of a pair add the same two numbers.
__device__ inline double warp_sum(double x) {
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAll, x, o);
    return x;
}
__device__ inline bool is_zero(const KnnVectors& v, int i) {
    return v.metric == KnnMetric::cosine && v.square.data[i] == 0;
}

__device__ double value_of(const KnnVectors& v, int a, int b) {
    const float* x = v.x.data + a * v.x.ld;
    const float* y = v.x.data + b * v.x.ld;
    const int dim = static_cast<int>(v.x.cols);
    double sum = 0;
    if (v.metric == KnnMetric::euclidean) {
#pragma unroll 4
        for (int i = threadIdx.x % kWarp; i < dim; i += kWarp) {
            const double difference = double(x[i]) - double(y[i]);
            sum = __fma_rn(difference, difference, sum);
        }
        return warp_sum(sum);
    }
    const double square = v.square.data[a] * v.square.data[b];
    if (square == 0) return 1;
#pragma unroll 4
    for (int i = threadIdx.x % kWarp; i < dim; i += kWarp) sum = __fma_rn(double(x[i]), double(y[i]), sum);
    const double similarity = warp_sum(sum) / sqrt(square);
    return 1 - (similarity < 1 ? similarity : 1);
}

// The list of one query over the lanes of a warp: entry e is slot e / 32 of lane e % 32; m <= 32 kSlots. Entries from m
// on are kept in order too, and dropped at the end.
template <int kSlots>
struct List {
    double value[kSlots];
    int id[kSlots];
    double last_value;  // of entry m - 1, in every lane
    int last_id;

    __device__ void load(const KnnUpdate& p, std::int64_t row) {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int entry = s * kWarp + lane;
            const bool held = !p.start && entry < p.value.cols;
            value[s] = held ? p.value.data[row * p.value.ld + entry] : CUDART_INF;
            id[s] = held ? p.id.data[row * p.id.ld + entry] : kKnnNoId;
        }
        find_last(static_cast<int>(p.value.cols));
    }
    __device__ void store(const KnnUpdate& p, std::int64_t row) const {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int entry = s * kWarp + lane;
            if (entry >= p.value.cols) continue;
            p.value.data[row * p.value.ld + entry] = value[s];
            p.id.data[row * p.id.ld + entry] = id[s];
        }
    }
    __device__ void find_last(int m) {
        const int slot = (m - 1) / kWarp, lane = (m - 1) % kWarp;
        last_value = __shfl_sync(kAll, slot == 0 ? value[0] : value[kSlots - 1], lane);
        last_id = __shfl_sync(kAll, slot == 0 ? id[0] : id[kSlots - 1], lane);
    }
    __device__ bool before_last(double v, int i) const { return v < last_value || (v == last_value && i < last_id); }
    __device__ void insert(double v, int i, int m) {
        const int lane = threadIdx.x % kWarp;
        int place = 0;
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
            place += __popc(__ballot_sync(kAll, value[s] < v || (value[s] == v && id[s] < i)));
#pragma unroll
        for (int s = kSlots - 1; s >= 0; --s) {
            double above = __shfl_up_sync(kAll, value[s], 1);
            int above_id = __shfl_up_sync(kAll, id[s], 1);
            if (s > 0) {  // lane 0 continues the slot below
                const double end = __shfl_sync(kAll, value[s > 0 ? s - 1 : 0], kWarp - 1);
                const int end_id = __shfl_sync(kAll, id[s > 0 ? s - 1 : 0], kWarp - 1);
                if (lane == 0) above = end, above_id = end_id;
            }
            const int entry = s * kWarp + lane;
            if (entry > place) value[s] = above, id[s] = above_id;
            if (entry == place) value[s] = v, id[s] = i;
        }
        find_last(m);
    }
};

// Can any of the kChunk columns from `first` on pass? The chunk lies inside the row.
__device__ inline bool some_pass(const float* products, const float* base, std::int64_t first, float bound) {
    const int lane = threadIdx.x % kWarp;
    bool some = false;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
        const std::int64_t j = first + (u * kWarp + lane) * 4;
        const Pack<float> x = load16(products + j), b = load16(base + j);
#pragma unroll
        for (int c = 0; c < 4; ++c) some |= fmaf(-2.f, x.v[c], b.v[c]) <= bound;
    }
    return __any_sync(kAll, some);
}

template <int kSlots>
__global__ void __launch_bounds__(kThreads, 2) knn_select_kernel(KnnUpdate p, KnnLimit limit) {
    const int lane = threadIdx.x % kWarp, m = static_cast<int>(p.value.cols);
    const std::int64_t row = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, keys = p.keys.y.rows;
    if (row >= p.queries.y.rows) return;  // the same for the whole warp
    const float* products = p.products.data + row * p.products.ld;
    const float* base = p.keys.base.data;
    const int* ids = p.keys.ids.data;
    const int self = p.queries.ids.data[row];
    const bool zero = is_zero(p.vectors, self);
    const double own_base = p.queries.base.data[row];

    List<kSlots> list;
    list.load(p, row);
    const auto bound_now = [&] {
        return __double2float_ru(__dadd_ru(__fma_rn(list.last_value, limit.scale, limit.offset), -own_base));
    };
    float bound = bound_now();
    for (std::int64_t chunk = 0; chunk < keys; chunk += kChunk) {
        if (chunk + kChunk <= keys && !some_pass(products, base, chunk, bound)) continue;
        for (std::int64_t first = chunk; first < chunk + kChunk && first < keys; first += kWarp) {
            const std::int64_t j = first + lane;
            const float lower = j < keys ? fmaf(-2.f, products[j], base[j]) : 0.f;
            bool pass = j < keys && lower <= bound;
            int id = kKnnNoId;
            if (pass) {
                id = ids[j];
                const double least = zero || is_zero(p.vectors, id) ? 1 : 0;
                pass = id != self && list.before_last(least, id);
            }
            unsigned todo = __ballot_sync(kAll, pass);
            while (todo) {
                const int source = __ffs(todo) - 1, candidate = __shfl_sync(kAll, id, source);
                todo &= todo - 1;
                const double value = value_of(p.vectors, self, candidate);
                if (!list.before_last(value, candidate)) continue;
                list.insert(value, candidate, m);
                bound = bound_now();
                todo &= __ballot_sync(kAll, lower <= bound);
            }
        }
    }
    list.store(p, row);
}

// A warp per vector.
__global__ void __launch_bounds__(kThreads) knn_prepare_kernel(KnnPrepare p, double keep) {
    const KnnVectors& v = p.vectors;
    const int lane = threadIdx.x % kWarp, dim = static_cast<int>(v.x.cols);
    const std::int64_t row = std::int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    if (row >= p.y.rows) return;
    const int i = p.ids.data[row];
    const double scale = v.metric == KnnMetric::euclidean ? v.factor : is_zero(v, i) ? 0 : 1 / sqrt(v.square.data[i]);
    const float* x = v.x.data + i * v.x.ld;
    float* y = p.y.data + row * p.y.ld;
    double sum = 0;
#pragma unroll 4
    for (int c = lane; c < dim; c += kWarp) {
        const float value = static_cast<float>(double(x[c]) * scale - v.centre.data[c]);
        y[c] = value;
        sum = __fma_rn(double(value), double(value), sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) p.base.data[row] = static_cast<float>(keep * sum);
}

// ---- products through cuBLASLt -----------------------------------------------------------------------------------

template <class Handle, cublasStatus_t (*kDestroy)(Handle)>
struct Destroy {
    using pointer = Handle;
    void operator()(Handle h) const noexcept { (void)kDestroy(h); }
};
using Operation = std::unique_ptr<void, Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<void, Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Preference = std::unique_ptr<void, Destroy<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

// cuBLASLt counts column by column: a row-major matrix is its transpose.
Layout layout_of(std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    cublasLtMatrixLayout_t layout = nullptr;
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, CUDA_R_32F, static_cast<std::uint64_t>(cols),
                                            static_cast<std::uint64_t>(rows), std::max(ld, cols)));
    return Layout(layout);
}
Operation transposed_first() {
    cublasLtMatmulDesc_t operation = nullptr;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    Operation owned(operation);
    const cublasOperation_t yes = CUBLAS_OP_T;
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &yes, sizeof(yes)));
    return owned;
}
template <class V>
void prefer(const Preference& preference, cublasLtMatmulPreferenceAttributes_t which, V value) {
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference.get(), which, &value, sizeof(value)));
}
std::uint32_t alignment(const void* p) {  // the largest power of two, up to 256, that divides the address
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    return static_cast<std::uint32_t>(std::min<std::uintptr_t>(address & (~address + 1), 256));
}

// products = queries keys', [queries, keys] row-major. The heuristic's first proposal that can be launched: blocks are
// large, so that asking each time costs little.
void multiply(const Cuda& dev, const Mat<const float>& queries, const Mat<const float>& keys,
              const Mat<float>& products) {
    constexpr int kProposals = 16;
    const Operation operation = transposed_first();
    const Layout a = layout_of(keys.rows, keys.cols, keys.ld), b = layout_of(queries.rows, queries.cols, queries.ld);
    const Layout c = layout_of(queries.rows, keys.rows, products.ld);
    cublasLtMatmulPreference_t made = nullptr;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&made));
    const Preference preference(made);
    const std::size_t workspace = dev.workspace ? dev.workspace_bytes : 0;
    prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace));
    prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(keys.data));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(queries.data));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(products.data));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(products.data));
    std::array<cublasLtMatmulHeuristicResult_t, kProposals> proposals{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(dev.state->blas, operation.get(), a.get(), b.get(), c.get(), c.get(),
                                       preference.get(), kProposals, proposals.data(), &found);
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
    const float alpha = 1.f, beta = 0.f;
    for (int i = 0; i < found; ++i) {
        if (proposals[i].state != CUBLAS_STATUS_SUCCESS) continue;
        if (cublasLtMatmul(dev.state->blas, operation.get(), &alpha, keys.data, a.get(), queries.data, b.get(), &beta,
                           products.data, c.get(), products.data, c.get(), &proposals[i].algo, dev.workspace, workspace,
                           stream_of(dev)) == CUBLAS_STATUS_SUCCESS)
            return;
        (void)cudaGetLastError();  // answered by the next proposal
    }
    throw DeviceError("cuBLASLt has no algorithm for an f32 product of " + std::to_string(queries.rows) + " x " +
                      std::to_string(keys.rows) + " x " + std::to_string(keys.cols) + " (" + std::to_string(found) +
                      " proposals)");
}

unsigned warp_blocks(std::int64_t rows) { return static_cast<unsigned>(ceil_div(rows, std::int64_t(kWarps))); }

}  // namespace

void knn_prepare(const Cuda& d, const KnnPrepare& p) {
    check(p);
    knn_prepare_kernel<<<warp_blocks(p.y.rows), kThreads, 0, stream_of(d)>>>(p, 1 - knn_slack(p.vectors.x.cols));
    LAUNCH_CHECK("knn_prepare");
}

void knn_update(const Cuda& d, const KnnUpdate& p) {
    check(p);
    FIEDLER_REQUIRE("knn", is_aligned16(p.products));
    FIEDLER_REQUIRE("knn", reinterpret_cast<std::uintptr_t>(p.keys.base.data) % 16 == 0);
    multiply(d, p.queries.y, p.keys.y, p.products);
    const unsigned blocks = warp_blocks(p.queries.y.rows);
    const KnnLimit limit = knn_limit(p.vectors);
    if (p.value.cols <= kWarp)
        knn_select_kernel<1><<<blocks, kThreads, 0, stream_of(d)>>>(p, limit);
    else
        knn_select_kernel<2><<<blocks, kThreads, 0, stream_of(d)>>>(p, limit);
    LAUNCH_CHECK("knn_select");
}

}  // namespace fiedler
