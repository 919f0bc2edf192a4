// kernels/matmul.cu: the products of matmul.h through cuBLASLt.
//
// cuBLASLt counts column by column. A row-major matrix read that way is its transpose, so that every product is asked
// for transposed, with the operands swapped: y' = W x', dx' = W' dy', dw' = x' dy. Nothing is ever copied.
//
// A thin dw (few tiles of output, a long sum over the rows) would keep only a few multiprocessors busy: it is cut into
// pieces of rows, one batched product gives a partial sum for each, and add_pieces adds them in the order of the rows. A dw
// whose columns are no multiples of 16 bytes (of scalars and gates) would not get the tensor cores' bulk loads: its partial
// sums are of more columns.
#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernels/common.cuh"
#include "kernels/matmul.h"
#include "kernels/profile.h"

namespace fiedler {
namespace {

template <class Handle, cublasStatus_t (*kDestroy)(Handle)>
struct Destroy {
    using pointer = Handle;
    void operator()(Handle h) const noexcept { (void)kDestroy(h); }
};
using Operation = std::unique_ptr<void, Destroy<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>>;
using Layout = std::unique_ptr<void, Destroy<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>>;
using Preference = std::unique_ptr<void, Destroy<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>>;

// One matrix as cuBLASLt sees it: rows and columns of the stored, column-major matrix.
struct Operand {
    const void* data;
    std::int64_t rows, cols, ld;
    cublasOperation_t op;
    cudaDataType_t type = CUDA_R_16BF;
};
struct Result {
    void* data;
    std::int64_t rows, cols, ld;
    cudaDataType_t type;
};
// d = [relu] (op(a) op(b) [+ c]); c has the shape and type of d and may be d itself.
struct Addend {
    const void* data = nullptr;
    std::int64_t ld = 0;
};
// The same product `count` times, on operands this many elements apart.
struct Batch {
    int count = 1;
    std::int64_t a = 0, b = 0, d = 0;
};
struct Product {
    Result d;
    Operand a, b;
    Addend c;  // absent: null
    bool relu = false;
    Batch batch = {};
    std::size_t reserved = 0;      // bytes at the beginning of the workspace that are not cuBLASLt's
    const float* scale = nullptr;  // of a, on the device; null: 1
    bool fast_sums = false;        // of 8-bit floats
    // What cuBLASLt is told of c, which it wants described even where it does not read it.
    Addend described_c() const { return c.data ? c : Addend{d.data, d.ld}; }
};

template <class T>
Operand stored(const Mat<const T>& row_major, cublasOperation_t op) {
    return {row_major.data, row_major.cols, row_major.rows, row_major.ld, op};
}
Result result(const Mat<bf16>& m) { return {m.data, m.cols, m.rows, m.ld, CUDA_R_16BF}; }
Result result(const Mat<float>& m) { return {m.data, m.cols, m.rows, m.ld, CUDA_R_32F}; }

// An algorithm that cuBLASLt proposes. With a workspace some keep a counter there, of the tiles that are taken, and a launch
// is two nodes of the stream: the first sets it to 0 (Matmul.GpuProductIsOneNode).
struct Algorithm {
    cublasLtMatmulAlgo_t algo{};
    bool with_workspace = true;
};
struct Plan {
    Operation operation;
    Layout a, b, c, d;
    Algorithm algorithm;
};
using Key = std::array<std::int64_t, 25>;
using Plans = std::map<Key, Plan>;

// The largest power of two, up to 256, that divides the address and the distance to the next matrix of a batch: what
// an algorithm may rely on.
std::uint32_t alignment(const void* p, std::int64_t stride_bytes = 0) {
    const auto address = reinterpret_cast<std::uintptr_t>(p) | static_cast<std::uintptr_t>(stride_bytes);
    return static_cast<std::uint32_t>(std::min<std::uintptr_t>(address & (~address + 1), 256));
}
std::int64_t bytes_of(const Operand& o) { return o.type == CUDA_R_16BF ? 2 : 1; }
std::uint32_t alignment_a(const Product& p) { return alignment(p.a.data, p.batch.a * bytes_of(p.a)); }
std::uint32_t alignment_b(const Product& p) { return alignment(p.b.data, p.batch.b * bytes_of(p.b)); }
std::uint32_t alignment_d(const Product& p) {
    return alignment(p.d.data, p.batch.d * (p.d.type == CUDA_R_32F ? 4 : 2));
}

struct Workspace {
    void* data = nullptr;
    std::size_t bytes = 0;
};
Workspace workspace_of(const Cuda& dev, const Product& p) {
    if (!dev.workspace || dev.workspace_bytes <= p.reserved) return {};
    return {static_cast<std::byte*>(dev.workspace) + p.reserved, dev.workspace_bytes - p.reserved};
}

constexpr int kByHeuristic = -1;  // in place of an algorithm's number: the first that runs

Key key_of(const Cuda& dev, const Product& p, int choice) {
    const Workspace workspace = workspace_of(dev, p);
    return {p.a.op,
            p.b.op,
            p.a.rows,
            p.a.cols,
            p.a.ld,
            p.b.rows,
            p.b.cols,
            p.b.ld,
            p.d.ld,
            p.d.type,
            p.described_c().ld,
            p.c.data == nullptr    ? 0
            : p.c.data == p.d.data ? 1
                                   : 2,
            p.relu,
            p.batch.count,
            alignment_a(p),
            alignment_b(p),
            alignment(p.described_c().data),
            alignment_d(p),
            alignment(workspace.data),
            static_cast<std::int64_t>(workspace.bytes),
            p.batch.a,
            p.a.type,
            p.scale != nullptr,
            p.fast_sums,
            choice};
}

Plans& plans_of(const Cuda& dev) {
    if (!dev.state->plans) {
        dev.state->plans = new Plans;
        dev.state->destroy_plans = [](void* p) noexcept { delete static_cast<Plans*>(p); };
    }
    return *static_cast<Plans*>(dev.state->plans);
}

Layout make_layout(cudaDataType_t type, std::int64_t rows, std::int64_t cols, std::int64_t ld, std::int32_t count,
                   std::int64_t stride) {
    cublasLtMatrixLayout_t layout = nullptr;
    // A matrix of one column may be given with any stride; cuBLASLt wants at least the number of rows.
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, static_cast<std::uint64_t>(rows),
                                            static_cast<std::uint64_t>(cols), std::max(ld, rows)));
    Layout owned(layout);
    if (count > 1) {
        CUBLAS_CHECK(
            cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)));
        CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride,
                                                      sizeof(stride)));
    }
    return owned;
}

Plan describe(const Product& p) {
    cublasLtMatmulDesc_t operation = nullptr;
    CUBLAS_CHECK(cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    Plan plan;
    plan.operation.reset(operation);
    const cublasLtEpilogue_t epilogue = p.relu ? CUBLASLT_EPILOGUE_RELU : CUBLASLT_EPILOGUE_DEFAULT;
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &p.a.op, sizeof(p.a.op)));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSB, &p.b.op, sizeof(p.b.op)));
    CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(epilogue)));
    if (p.a.type != CUDA_R_16BF) {
        const std::int8_t fast = p.fast_sums;
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof(fast)));
    }
    const int count = p.batch.count;
    plan.a = make_layout(p.a.type, p.a.rows, p.a.cols, p.a.ld, count, p.batch.a);
    plan.b = make_layout(p.b.type, p.b.rows, p.b.cols, p.b.ld, count, p.batch.b);
    plan.c = make_layout(p.d.type, p.d.rows, p.d.cols, p.described_c().ld, count, p.batch.d);
    plan.d = make_layout(p.d.type, p.d.rows, p.d.cols, p.d.ld, count, p.batch.d);
    return plan;
}

template <class V>
void prefer(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t which, V value) {
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, which, &value, sizeof(value)));
}

Preference make_preference(const Product& p, std::size_t workspace_bytes) {
    cublasLtMatmulPreference_t preference = nullptr;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    Preference owned(preference);
    prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace_bytes));
    // Partial sums of a split inner dimension: in f32, in the workspace, added in a second, ordered step. The other
    // schemes add into the output, rounded to its type.
    prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_a(p));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_b(p));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.c.data ? alignment(p.c.data) : alignment_d(p));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_d(p));
    return owned;
}

cublasStatus_t launch(const Cuda& dev, const Plan& plan, const Algorithm& algorithm, const Product& p) {
    const float alpha = 1.f, beta = p.c.data ? 1.f : 0.f;
    const Workspace workspace = algorithm.with_workspace ? workspace_of(dev, p) : Workspace{};
    if (p.scale)  // where it lies is no part of the plan
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation.get(), CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
                                                    &p.scale, sizeof(p.scale)));
    return cublasLtMatmul(dev.state->blas, plan.operation.get(), &alpha, p.a.data, plan.a.get(), p.b.data, plan.b.get(),
                          &beta, p.described_c().data, plan.c.get(), p.d.data, plan.d.get(), &algorithm.algo,
                          workspace.data, workspace.bytes, stream_of(dev));
}

using Proposals = std::vector<Algorithm>;

void propose(const Cuda& dev, const Product& p, const Plan& plan, bool with_workspace, Proposals& proposals) {
    constexpr int kMost = 32;
    std::array<cublasLtMatmulHeuristicResult_t, kMost> results{};
    const Preference preference = make_preference(p, with_workspace ? workspace_of(dev, p).bytes : 0);
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(dev.state->blas, plan.operation.get(), plan.a.get(), plan.b.get(), plan.c.get(),
                                       plan.d.get(), preference.get(), kMost, results.data(), &found);
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
    for (int i = 0; i < found; ++i)
        if (results[std::size_t(i)].state == CUBLAS_STATUS_SUCCESS)
            proposals.push_back({results[std::size_t(i)].algo, with_workspace});
}

std::int32_t setting_of(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t which) {
    std::int32_t value = 0;
    std::size_t written = 0;
    CUBLAS_CHECK(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, which, &value, sizeof value, &written));
    return value;
}
bool splits(const cublasLtMatmulAlgo_t& algorithm) {
    return setting_of(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) > 1;
}

// ---- search among the proposals ----------------------------------------------------------------------------------
//
// The heuristic's first proposal may take half as long again as the best. Algorithms that do not split the inner
// dimension add up every element in one order, in the same steps of the tensor cores: which of them runs is not seen in
// the result. So they are timed at the first use of a shape; one is taken only if its result has the bits of the first's.
//
// A product that adds to its own output cannot be run twice there: what is timed are as many of its columns as half of the
// workspace holds, made there from what the output is now.

constexpr double kSearchFlops = 1e9;  // smaller products are not worth it
constexpr std::size_t kRounds = 12, kOutliers = 2;

bool in_place(const Product& p) { return p.c.data != nullptr && p.c.data == p.d.data; }
constexpr std::size_t kFingerprintBytes = 256;  // at the begin of the workspace; alignment of what follows
// See above: p itself, or columns of it; none where not even those of a tile fit.
Product searched(const Cuda& dev, const Product& p) {
    if (!in_place(p)) return p;
    const std::int64_t of_column = p.d.ld * (p.d.type == CUDA_R_32F ? 4 : 2);
    const auto half = static_cast<std::int64_t>(dev.workspace_bytes / 2);
    constexpr std::int64_t kWhole = 256;  // columns of the widest tile
    const std::int64_t fitting = half / of_column / kWhole * kWhole;
    Product columns = p;
    columns.d.cols = std::min(p.d.cols, fitting);
    (p.b.op == CUBLAS_OP_N ? columns.b.cols : columns.b.rows) = columns.d.cols;
    columns.d.data = static_cast<std::byte*>(dev.workspace) + kFingerprintBytes;
    columns.reserved = kFingerprintBytes + static_cast<std::size_t>(columns.d.cols * of_column);
    columns.reserved = (columns.reserved + kFingerprintBytes - 1) / kFingerprintBytes * kFingerprintBytes;
    return columns;
}

bool can_search(const Cuda& dev, const Product& p) {
    const double inner = double(p.a.op == CUBLAS_OP_N ? p.a.cols : p.a.rows);
    if (!dev.workspace || 2 * double(p.d.rows) * double(p.d.cols) * inner < kSearchFlops) return false;
    if (p.batch.count > 1 || p.reserved > 0) return false;  // sums in pieces: the workspace is theirs
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    CUDA_CHECK(cudaStreamIsCapturing(stream_of(dev), &status));
    return status == cudaStreamCaptureStatusNone;
}

// Adds up the words of a matrix, each times a number of its place.
template <class Word>
__global__ void __launch_bounds__(256)
    fingerprint_kernel(unsigned long long* sum, const Word* d, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    unsigned long long mine = 0;
    for (std::int64_t i = std::int64_t(blockIdx.x) * 256 + threadIdx.x; i < rows * cols;
         i += std::int64_t(gridDim.x) * 256)
        mine +=
            (d[i / rows * ld + i % rows] + 1ull) * (2ull * static_cast<unsigned long long>(i) + 0x9e3779b97f4a7c15ull);
    atomicAdd(sum, mine);  // whole numbers: in any order
}
unsigned long long fingerprint(const Cuda& dev, const Product& p) {
    auto* const sum = static_cast<unsigned long long*>(dev.workspace);  // cuBLASLt is done with it
    CUDA_CHECK(cudaMemsetAsync(sum, 0, sizeof *sum, stream_of(dev)));
    const Result& d = p.d;
    if (d.type == CUDA_R_32F)
        fingerprint_kernel<<<1024, 256, 0, stream_of(dev)>>>(sum, static_cast<const std::uint32_t*>(d.data), d.rows,
                                                             d.cols, d.ld);
    else
        fingerprint_kernel<<<1024, 256, 0, stream_of(dev)>>>(sum, static_cast<const std::uint16_t*>(d.data), d.rows,
                                                             d.cols, d.ld);
    LAUNCH_CHECK("matmul fingerprint");
    unsigned long long host = 0;
    copy_to_host(dev, &host, sum, sizeof host);
    return host;
}
// One run as in a training step: right behind another kernel, which has left the operands in the L2 cache, or the end of
// them.
double seconds_of(const Cuda& dev, const Plan& plan, const Algorithm& algorithm, const Product& p) {
    constexpr double kToQueue = 30e-6;  // meant to be more than the host needs for what follows
    occupy(dev, kToQueue);
    for (const Operand* o : {&p.b, &p.a})
        read_through(dev, o->data, static_cast<std::size_t>(((o->cols - 1) * o->ld + o->rows) * bytes_of(*o)));
    timer_start(dev);
    CUBLAS_CHECK(launch(dev, plan, algorithm, p));
    return timer_stop_seconds(dev);
}
// first: the proposal whose result is in d now. What is there in the end has the same bits.
//
// In rounds, of which the mean counts, without the slowest: some algorithms (dx of 4,096 rows to 16,384 columns on an H200)
// take 70 us in one run and 90 in the next, and only so: alone, again and again, they are steady. Also where there is only
// one: it was not the last to write d.
std::size_t fastest(const Cuda& dev, const Product& whole, const Proposals& proposals, std::size_t first) {
    if (splits(proposals[first].algo)) return first;
    const Product p = searched(dev, whole);
    if (p.d.cols == 0) return first;
    const Plan plan = describe(p);
    constexpr double kWorthIt = 0.98;
    if (in_place(whole) && launch(dev, plan, proposals[first], p) != CUBLAS_STATUS_SUCCESS) {
        (void)cudaGetLastError();
        return first;
    }
    const unsigned long long bits = fingerprint(dev, p);
    std::vector<std::size_t> alike{first};
    for (std::size_t i = first + 1; i < proposals.size(); ++i) {
        if (splits(proposals[i].algo)) continue;
        if (launch(dev, plan, proposals[i], p) != CUBLAS_STATUS_SUCCESS) {
            (void)cudaGetLastError();
            continue;
        }
        if (fingerprint(dev, p) == bits) alike.push_back(i);
    }
    std::vector<std::array<double, kRounds>> seconds(alike.size());
    for (std::size_t round = 0; round < kRounds; ++round)
        for (std::size_t i = 0; i < alike.size(); ++i)
            seconds[i][round] = seconds_of(dev, plan, proposals[alike[i]], p);
    std::size_t best = first;
    double least = INFINITY;
    for (std::size_t i = 0; i < alike.size(); ++i) {
        std::sort(seconds[i].begin(), seconds[i].end());
        const double sum = std::accumulate(seconds[i].begin(), seconds[i].end() - kOutliers, 0.0);
        if (sum < kWorthIt * least) best = alike[i], least = sum;
    }
    return best;
}

// A long sum with too few tiles for the multiprocessors is better split, and the heuristic does not always say so first.
bool wants_split(const Cuda& dev, const Product& p) {
    constexpr std::int64_t kTile = 128, kLong = 4096;
    const std::int64_t inner = p.a.op == CUBLAS_OP_N ? p.a.cols : p.a.rows;
    return dev.workspace && inner >= kLong &&
           p.batch.count * ceil_div(p.d.rows, kTile) * ceil_div(p.d.cols, kTile) < dev.sm_count;
}
// What all blocks read for one step of the inner dimension; infinity where they are not about as many as multiprocessors,
// or the tile is none of these.
double reads_of(const Cuda& dev, const Product& p, const cublasLtMatmulAlgo_t& algorithm) {
    struct Tile {
        cublasLtMatmulTile_t id;
        std::int64_t rows, cols;
    };
#define FIEDLER_TILE(m, n) \
    { CUBLASLT_MATMUL_TILE_##m##x##n, m, n }
    static constexpr Tile kTiles[] = {
        FIEDLER_TILE(32, 32),   FIEDLER_TILE(32, 64),   FIEDLER_TILE(64, 32),   FIEDLER_TILE(32, 128),
        FIEDLER_TILE(64, 64),   FIEDLER_TILE(128, 32),  FIEDLER_TILE(64, 128),  FIEDLER_TILE(128, 64),
        FIEDLER_TILE(64, 256),  FIEDLER_TILE(128, 128), FIEDLER_TILE(256, 64),  FIEDLER_TILE(128, 256),
        FIEDLER_TILE(256, 128), FIEDLER_TILE(64, 96),   FIEDLER_TILE(96, 64),   FIEDLER_TILE(96, 128),
        FIEDLER_TILE(128, 160), FIEDLER_TILE(160, 128), FIEDLER_TILE(192, 128), FIEDLER_TILE(128, 192),
        FIEDLER_TILE(128, 96),  FIEDLER_TILE(64, 192),  FIEDLER_TILE(192, 64),  FIEDLER_TILE(192, 192),
        FIEDLER_TILE(64, 384),  FIEDLER_TILE(384, 64)};
#undef FIEDLER_TILE
    const auto id = setting_of(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID);
    const auto* const tile =
        std::find_if(std::begin(kTiles), std::end(kTiles), [&](const Tile& t) { return t.id == id; });
    if (tile == std::end(kTiles)) return INFINITY;
    const std::int64_t down = ceil_div(p.d.rows, tile->rows), across = ceil_div(p.d.cols, tile->cols);
    const std::int64_t blocks = p.batch.count * down * across * setting_of(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
    if (blocks > dev.sm_count || 10 * blocks < 9 * dev.sm_count) return INFINITY;
    return double(p.d.rows) * double(across) + double(p.d.cols) * double(down);
}
// What tensor cores' bulk loads take: where it begins, its stride and its columns are multiples of 16 bytes.
bool loads_in_bulk(const Operand& o, std::uint32_t aligned) {
    return aligned >= 16 && o.ld * bytes_of(o) % 16 == 0 && o.rows * bytes_of(o) % 16 == 0;
}
// Which one is taken must not depend on times: the first that splits; where that has a block for nearly every
// multiprocessor, of those that have, too, the one whose blocks read least (one of 64 x 96: less than three of 64 x 32).
// None where the first of all does not split and has a block for nearly every multiprocessor. Operands that cannot be loaded
// in bulk take kernels of another kind, of whose blocks a multiprocessor may have several: there it is the first.
void put_splitting_first(const Cuda& dev, const Product& p, Proposals& proposals) {
    if (!proposals.empty() && !splits(proposals.front().algo) && reads_of(dev, p, proposals.front().algo) < INFINITY)
        return;
    const auto end = proposals.end();
    auto best = std::find_if(proposals.begin(), end, [](const Algorithm& x) { return splits(x.algo); });
    const bool in_bulk = loads_in_bulk(p.a, alignment_a(p)) && loads_in_bulk(p.b, alignment_b(p));
    double least = best != end && in_bulk ? reads_of(dev, p, best->algo) : INFINITY;
    for (auto x = best; x != end && least < INFINITY; ++x) {
        if (!splits(x->algo)) continue;
        if (const double reads = reads_of(dev, p, x->algo); reads < least) best = x, least = reads;
    }
    if (best != end) std::rotate(proposals.begin(), best, best + 1);
}

// In the heuristic's order, one that splits first where wants_split; if the first does not, those that need no workspace
// come before all, and so no counter.
Proposals all_proposals(const Cuda& dev, const Product& p, const Plan& plan) {
    Proposals with, all;
    propose(dev, p, plan, true, with);
    if (wants_split(dev, p)) put_splitting_first(dev, p, with);
    if (with.empty() || !splits(with.front().algo)) propose(dev, p, plan, false, all);
    all.insert(all.end(), with.begin(), with.end());
    return all;
}

// The first use of a shape: of the proposals, in their order, the first that can be launched, or one that is faster and
// gives the same, is kept, or the chosen one.
struct Planned {
    bool done = false;
    std::size_t proposals = 0;
};
Planned plan_and_run(const Cuda& dev, const Product& p, int choice) {
    Plan plan = describe(p);
    const Proposals proposals = all_proposals(dev, p, plan);
    const auto chosen = static_cast<std::size_t>(choice);
    const std::size_t first = choice == kByHeuristic ? 0 : chosen,
                      end = choice == kByHeuristic ? proposals.size() : chosen + 1;
    for (std::size_t i = first; i < std::min(end, proposals.size()); ++i) {
        if (launch(dev, plan, proposals[i], p) != CUBLAS_STATUS_SUCCESS) {
            (void)cudaGetLastError();  // the refusal is answered by the next proposal and must not surface elsewhere
            continue;
        }
        plan.algorithm = proposals[choice == kByHeuristic && can_search(dev, p) ? fastest(dev, p, proposals, i) : i];
        plans_of(dev).emplace(key_of(dev, p, choice), std::move(plan));
        return {true, proposals.size()};
    }
    return {false, proposals.size()};
}

// False, for a chosen algorithm only: there is no such proposal, or it cannot run.
bool run(const Cuda& dev, const Product& p, int choice = kByHeuristic) {
    const Plans& plans = plans_of(dev);
    if (const auto it = plans.find(key_of(dev, p, choice)); it != plans.end()) {
        CUBLAS_CHECK(launch(dev, it->second, it->second.algorithm, p));
        return true;
    }
    const Planned planned = plan_and_run(dev, p, choice);
    if (planned.done || choice != kByHeuristic) return planned.done;
    throw DeviceError("cuBLASLt has no algorithm for a product of " + std::to_string(p.d.rows) + " x " +
                      std::to_string(p.d.cols) + " (strides " + std::to_string(p.a.ld) + ", " + std::to_string(p.b.ld) +
                      ", " + std::to_string(p.d.ld) + "; " + std::to_string(planned.proposals) + " proposals)");
}

// ---- the products of the contract --------------------------------------------------------------------------------

template <class O>
Product product_of(const MatmulForward<bf16, O>& p) {
    return {result(p.y), stored(p.w, CUBLAS_OP_T), stored(p.x, CUBLAS_OP_N), {p.residual.data, p.residual.ld}, p.relu};
}
Product product_of(const MatmulDx<bf16>& p) {
    const Addend start = p.accumulate ? Addend{p.dx.data, p.dx.ld} : Addend{};
    return {result(p.dx), stored(p.w, CUBLAS_OP_N), stored(p.dy, CUBLAS_OP_N), start};
}
Product product_of(const MatmulDw<bf16>& p) {
    return {result(p.dw), stored(p.x, CUBLAS_OP_N), stored(p.dy, CUBLAS_OP_T), {p.dw.data, p.dw.ld}};
}
template <class O>
Product product_of(const MatmulFp8<O>& p) {
    const Addend start = p.accumulate ? Addend{p.y.data, p.y.ld} : Addend{};
    Product product{result(p.y), stored(p.b, CUBLAS_OP_T), stored(p.a, CUBLAS_OP_N), start};
    product.a.type = CUDA_R_8F_E4M3, product.b.type = CUDA_R_8F_E5M2;
    product.scale = p.scale.data, product.fast_sums = p.fast_sums;
    return product;
}
std::int64_t rows_of(const MatmulForward<bf16, bf16>& p) { return p.x.rows; }
std::int64_t rows_of(const MatmulForward<bf16, float>& p) { return p.x.rows; }
std::int64_t rows_of(const MatmulDx<bf16>& p) { return p.dy.rows; }
std::int64_t rows_of(const MatmulDw<bf16>& p) { return p.dy.rows; }
template <class O>
std::int64_t rows_of(const MatmulFp8<O>& p) {
    return p.a.rows;
}

// ---- dw in pieces of rows ----------------------------------------------------------------------------------------

constexpr std::int64_t kMostPieces = 64, kLeastRows = 128;

// A view with columns up to the next multiple of 16 bytes, which the stride has room for: what is there is read and
// multiplied, and its products are not looked at.
Mat<const bf16> widened(const Mat<const bf16>& m) {
    const std::int64_t cols = (m.cols + 7) / 8 * 8;
    const bool fits = m.ld >= cols && m.ld % 8 == 0 && alignment(m.data) >= 16;
    return {m.data, m.rows, fits ? cols : m.cols, m.ld};
}
std::int64_t partial_ld(const MatmulDw<bf16>& p) { return (widened(p.x).cols + 3) / 4 * 4; }
std::int64_t partial_elements(const MatmulDw<bf16>& p) { return widened(p.dy).cols * partial_ld(p); }

// Can the sum over the rows be cut so? Pieces of equal length, their sums in one half of the workspace at most.
bool divides(const Cuda& dev, const MatmulDw<bf16>& p, std::int64_t pieces) {
    const std::int64_t bytes = pieces * partial_elements(p) * std::int64_t(sizeof(float));
    return dev.workspace && p.dy.rows % pieces == 0 && p.dy.rows / pieces >= kLeastRows &&
           bytes <= static_cast<std::int64_t>(dev.workspace_bytes / 2);
}

// How many pieces a dw is summed in, in the workspace; 0: it is not, as cuBLASLt splits such sums well enough itself. Where
// the output has few tiles of 128 x 128, as many as give no more than a tile to each multiprocessor; else one, and cuBLASLt
// may split that.
std::int64_t pieces_of(const Cuda& dev, const MatmulDw<bf16>& p) {
    constexpr std::int64_t kTile = 128, kThin = 4, kFewRows = 16, kEnoughRows = 256;
    const bool wider = widened(p.dy).cols > p.dy.cols || widened(p.x).cols > p.x.cols;
    if (!wider && p.dw.rows >= kFewRows) return 0;
    const std::int64_t tiles = ceil_div(p.dw.rows, kTile) * ceil_div(p.dw.cols, kTile);
    std::int64_t pieces = 1;
    while (tiles <= kThin && 2 * pieces <= kMostPieces && 2 * pieces * tiles <= dev.sm_count &&
           p.dy.rows >= 2 * pieces * kEnoughRows && divides(dev, p, 2 * pieces))
        pieces *= 2;
    if (pieces >= 4) return pieces;
    return wider && wants_split(dev, product_of(p)) && divides(dev, p, 1) ? 1 : 0;
}

constexpr int kColumns = 32, kGroups = 8;

// dw[row, column] += the sum over the pieces of partial[piece][row, column], in an order that depends on their number
// alone. One block: one row, kColumns columns; thread group g adds pieces g, g + kGroups, ...
__global__ void __launch_bounds__(kColumns* kGroups)
    add_pieces(float* dw, std::int64_t ld, const float* partial, std::int64_t columns, std::int64_t partial_ld,
               std::int64_t stride, int pieces) {
    __shared__ float sums[kGroups][kColumns];
    const std::int64_t column = std::int64_t(blockIdx.x) * kColumns + threadIdx.x, row = blockIdx.y;
    float sum = 0;
    if (column < columns) {
        const float* p = partial + row * partial_ld + column;
#pragma unroll 4
        for (int i = threadIdx.y; i < pieces; i += kGroups) sum += p[i * stride];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= columns) return;
#pragma unroll
    for (int g = 1; g < kGroups; ++g) sum += sums[g][threadIdx.x];
    dw[row * ld + column] += sum;
}

void dw_in_pieces(const Cuda& dev, const MatmulDw<bf16>& p, std::int64_t pieces) {
    const std::int64_t rows = p.dy.rows / pieces, ld = partial_ld(p), stride = partial_elements(p);
    auto* partial = static_cast<float*>(dev.workspace);
    const Mat<const bf16> dy = widened(p.dy.slice_rows(0, rows)), x = widened(p.x.slice_rows(0, rows));
    const MatmulDw<bf16> piece{{partial, dy.cols, x.cols, ld}, dy, x};
    Product product = product_of(piece);
    product.c = {};
    if (pieces > 1) product.batch = {static_cast<int>(pieces), rows * p.x.ld, rows * p.dy.ld, stride};
    product.reserved = (static_cast<std::size_t>(pieces * stride) * sizeof(float) + 255) / 256 * 256;
    run(dev, product);
    const dim3 blocks(static_cast<unsigned>(ceil_div(p.dw.cols, std::int64_t(kColumns))),
                      static_cast<unsigned>(p.dw.rows));
    add_pieces<<<blocks, dim3(kColumns, kGroups), 0, stream_of(dev)>>>(p.dw.data, p.dw.ld, partial, p.dw.cols, ld,
                                                                       stride, static_cast<int>(pieces));
    LAUNCH_CHECK("matmul add_pieces");
}

template <class P>
void run_checked(const Cuda& dev, const P& p) {
    check(p);
    if (rows_of(p) > 0) run(dev, product_of(p));
}

}  // namespace

void matmul_forward(const Cuda& dev, const MatmulForward<bf16, bf16>& p) { run_checked(dev, p); }
void matmul_forward(const Cuda& dev, const MatmulForward<bf16, float>& p) { run_checked(dev, p); }
void matmul_dx(const Cuda& dev, const MatmulDx<bf16>& p) { run_checked(dev, p); }
void matmul_fp8(const Cuda& dev, const MatmulFp8<bf16>& p) { run_checked(dev, p); }
void matmul_fp8(const Cuda& dev, const MatmulFp8<float>& p) { run_checked(dev, p); }
void matmul_dw(const Cuda& dev, const MatmulDw<bf16>& p) {
    check(p);
    if (p.dy.rows == 0) return;
    if (const std::int64_t pieces = pieces_of(dev, p); pieces > 0) return dw_in_pieces(dev, p, pieces);
    run(dev, product_of(p));
}

template <class P>
bool matmul_by_algorithm(const Cuda& dev, const P& p, int k) {
    check(p);
    if (rows_of(p) == 0 || k < 0) return false;
    constexpr int kLast = kMatmulAlgorithms - kMatmulPieceCounts;  // of cuBLASLt's own
    if (k < kLast) return run(dev, product_of(p), k);
    if constexpr (std::is_same_v<P, MatmulDw<bf16>>) {
        const std::int64_t pieces = std::int64_t(2) << (k - kLast);
        if (k >= kMatmulAlgorithms || !divides(dev, p, pieces)) return false;
        dw_in_pieces(dev, p, pieces);
        return true;
    }
    return false;
}
template bool matmul_by_algorithm(const Cuda&, const MatmulForward<bf16, bf16>&, int);
template bool matmul_by_algorithm(const Cuda&, const MatmulForward<bf16, float>&, int);
template bool matmul_by_algorithm(const Cuda&, const MatmulDx<bf16>&, int);
template bool matmul_by_algorithm(const Cuda&, const MatmulDw<bf16>&, int);
template bool matmul_by_algorithm(const Cuda&, const MatmulFp8<bf16>&, int);
template bool matmul_by_algorithm(const Cuda&, const MatmulFp8<float>&, int);

}  // namespace fiedler
