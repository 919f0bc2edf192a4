// kernels/matmul.cu: the products of matmul.h through cuBLASLt.
//
// cuBLASLt counts column by column. A row-major matrix read that way is its transpose, so that every product is asked
// for transposed, with the operands swapped: y' = W x', dx' = W' dy', dw' = x' dy. Nothing is ever copied.
#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <type_traits>

#include "kernels/common.cuh"
#include "kernels/matmul.h"

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
struct Product {
    Result d;
    Operand a, b;
    Addend c;  // absent: null
    bool relu = false;
    // What cuBLASLt is told of c, which it wants described even where it does not read it.
    Addend described_c() const { return c.data ? c : Addend{d.data, d.ld}; }
};

template <class T>
Operand stored(const Mat<const T>& row_major, cublasOperation_t op) {
    return {row_major.data, row_major.cols, row_major.rows, row_major.ld, op};
}
Result result(const Mat<bf16>& m) { return {m.data, m.cols, m.rows, m.ld, CUDA_R_16BF}; }
Result result(const Mat<float>& m) { return {m.data, m.cols, m.rows, m.ld, CUDA_R_32F}; }

struct Plan {
    Operation operation;
    Layout a, b, c, d;
    cublasLtMatmulAlgo_t algorithm{};
};
using Key = std::array<std::int64_t, 19>;
using Plans = std::map<Key, Plan>;

// The largest power of two, up to 256, that divides the address: what an algorithm may rely on.
std::uint32_t alignment(const void* p) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    return static_cast<std::uint32_t>(std::min<std::uintptr_t>(address & (~address + 1), 256));
}

Key key_of(const Cuda& dev, const Product& p) {
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
            alignment(p.a.data),
            alignment(p.b.data),
            alignment(p.described_c().data),
            alignment(p.d.data),
            alignment(dev.workspace),
            static_cast<std::int64_t>(dev.workspace_bytes)};
}

Plans& plans_of(const Cuda& dev) {
    if (!dev.state->plans) {
        dev.state->plans = new Plans;
        dev.state->destroy_plans = [](void* p) noexcept { delete static_cast<Plans*>(p); };
    }
    return *static_cast<Plans*>(dev.state->plans);
}

Layout make_layout(cudaDataType_t type, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    cublasLtMatrixLayout_t layout = nullptr;
    // A matrix of one column may be given with any stride; cuBLASLt wants at least the number of rows.
    CUBLAS_CHECK(cublasLtMatrixLayoutCreate(&layout, type, static_cast<std::uint64_t>(rows),
                                            static_cast<std::uint64_t>(cols), std::max(ld, rows)));
    return Layout(layout);
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
    plan.a = make_layout(CUDA_R_16BF, p.a.rows, p.a.cols, p.a.ld);
    plan.b = make_layout(CUDA_R_16BF, p.b.rows, p.b.cols, p.b.ld);
    plan.c = make_layout(p.d.type, p.d.rows, p.d.cols, p.described_c().ld);
    plan.d = make_layout(p.d.type, p.d.rows, p.d.cols, p.d.ld);
    return plan;
}

template <class V>
void prefer(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t which, V value) {
    CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, which, &value, sizeof(value)));
}

Preference make_preference(const Cuda& dev, const Product& p) {
    cublasLtMatmulPreference_t preference = nullptr;
    CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
    Preference owned(preference);
    const std::size_t workspace = dev.workspace ? dev.workspace_bytes : 0;
    prefer(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace));
    // Partial sums of a split inner dimension: in f32, in the workspace, added in a second, ordered step. The other
    // schemes add into the output, rounded to its type.
    prefer(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(p.a.data));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(p.b.data));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(p.described_c().data));
    prefer(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(p.d.data));
    return owned;
}

cublasStatus_t launch(const Cuda& dev, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Product& p) {
    const float alpha = 1.f, beta = p.c.data ? 1.f : 0.f;
    const std::size_t workspace = dev.workspace ? dev.workspace_bytes : 0;
    return cublasLtMatmul(dev.state->blas, plan.operation.get(), &alpha, p.a.data, plan.a.get(), p.b.data, plan.b.get(),
                          &beta, p.described_c().data, plan.c.get(), p.d.data, plan.d.get(), &algorithm, dev.workspace,
                          workspace, stream_of(dev));
}

// The first use of a shape: the heuristic's proposals in its order; the first that can be launched is kept.
void plan_and_run(const Cuda& dev, const Product& p, const Key& key) {
    constexpr int kProposals = 16;
    Plan plan = describe(p);
    const Preference preference = make_preference(dev, p);
    std::array<cublasLtMatmulHeuristicResult_t, kProposals> proposals{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(dev.state->blas, plan.operation.get(), plan.a.get(), plan.b.get(), plan.c.get(),
                                       plan.d.get(), preference.get(), kProposals, proposals.data(), &found);
    if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) CUBLAS_CHECK(status);
    for (int i = 0; i < found; ++i) {
        if (proposals[i].state != CUBLAS_STATUS_SUCCESS) continue;
        if (launch(dev, plan, proposals[i].algo, p) != CUBLAS_STATUS_SUCCESS) {
            (void)cudaGetLastError();  // the refusal is answered by the next proposal and must not surface elsewhere
            continue;
        }
        plan.algorithm = proposals[i].algo;
        plans_of(dev).emplace(key, std::move(plan));
        return;
    }
    throw DeviceError("cuBLASLt has no algorithm for a product of " + std::to_string(p.d.rows) + " x " +
                      std::to_string(p.d.cols) + " (strides " + std::to_string(p.a.ld) + ", " + std::to_string(p.b.ld) +
                      ", " + std::to_string(p.d.ld) + "; " + std::to_string(found) + " proposals)");
}

void run(const Cuda& dev, const Product& p) {
    const Key key = key_of(dev, p);
    const Plans& plans = plans_of(dev);
    const auto it = plans.find(key);
    if (it == plans.end()) return plan_and_run(dev, p, key);
    CUBLAS_CHECK(launch(dev, it->second, it->second.algorithm, p));
}

template <class O>
void forward(const Cuda& dev, const MatmulForward<bf16, O>& p) {
    check(p);
    if (p.x.rows == 0) return;
    run(dev,
        {result(p.y), stored(p.w, CUBLAS_OP_T), stored(p.x, CUBLAS_OP_N), {p.residual.data, p.residual.ld}, p.relu});
}

}  // namespace

void matmul_forward(const Cuda& dev, const MatmulForward<bf16, bf16>& p) { forward(dev, p); }
void matmul_forward(const Cuda& dev, const MatmulForward<bf16, float>& p) { forward(dev, p); }

void matmul_dx(const Cuda& dev, const MatmulDx<bf16>& p) {
    check(p);
    if (p.dy.rows == 0) return;
    const Addend start = p.accumulate ? Addend{p.dx.data, p.dx.ld} : Addend{};
    run(dev, {result(p.dx), stored(p.w, CUBLAS_OP_N), stored(p.dy, CUBLAS_OP_N), start});
}

void matmul_dw(const Cuda& dev, const MatmulDw<bf16>& p) {
    check(p);
    if (p.dy.rows == 0) return;
    run(dev, {result(p.dw), stored(p.x, CUBLAS_OP_N), stored(p.dy, CUBLAS_OP_T), {p.dw.data, p.dw.ld}});
}

}  // namespace fiedler
