// kernels/energy.cu: Rayleigh-quotient scalars on the GPU (contract in energy.h), on tensor cores without losing f32.
//
// x is bf16, so it is exact as it is; each f32 entry of the matrix (Lf for R = 1, from the eigenvectors for R > 1) is
// the sum of three bf16 parts (3 x 8 bits of significand; of two in sm_90's own kernels), kept in shared memory. y = M x
// is then up to three bf16 products with f32 accumulation per 16 columns, added up in f32. A matrix whose entries are bf16 numbers
// (the Laplacian of an unweighted graph: small integers) needs one product only, which is why Lf is treated as dense:
// at D <= 128 that is faster than indexing a sparse matrix, and takes any sparsity, up to full.
//
// A warp takes 16 tokens of one head. With g = lane / 4 and t = lane % 4 a lane holds values of tokens g and g + 8.
// The columns of x are renumbered so that what a lane loads by 16-byte accesses is what the tensor core wants of it
// (position() in energy_product.cuh); the matrix is stored with the same renumbering. With R = 1 its rows are
// renumbered as well: y then lies on the lanes exactly as x does, and x'Lx and dx = .. (Lx - E x) need no exchange. With
// R > 1 the rows are the eigenvectors times the roots of their eigenvalues, so that an energy is a sum of squares of y; they
// are numbered such that a lane has whole bands of them, or a part of one if R < 4.
#include "kernels/common.cuh"
#include "kernels/energy.h"
#include "kernels/energy_kernels.cuh"
#include "kernels/energy_sm90.h"

namespace fiedler {
namespace {
using namespace energy_kernels;

// The kernels count in ints, some steps beyond the last one.
constexpr std::int64_t kMostTokens = std::int64_t(1) << 30;

// Products by the instructions that every architecture has: each warp for itself.
struct WarpProducts {
    static constexpr int forward_threads(int, int) { return kThreads; }
    // With up to 150 registers a thread three blocks of 128 fit on a multiprocessor, but one of 256.
    static constexpr int backward_threads(int d, int r) { return d == 64 && r > 1 ? 128 : kThreads; }
    static constexpr int forward_at_least(int, int) { return 0; }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200  // ptxas takes four blocks where that spills
    static constexpr int backward_at_least(int d, int r) { return d == 32 && r == 1 ? 3 : 0; }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1000  // likewise
    static constexpr int backward_at_least(int d, int r) { return d == 16 && r == 16 ? 3 : 0; }
#else
    static constexpr int backward_at_least(int, int) { return 0; }
#endif
    static constexpr int forward_blocks(int d, int) { return d == 128 ? 2 : d == 64 ? 3 : 4; }
    static constexpr int backward_blocks(int d, int r) {
        return d == 128 ? 1 : d == 64 ? (r == 1 ? 2 : 3) : d == 32 ? 3 : 4;
    }
    struct Map {};
    template <int D>
    static Map map_of(const Mat<const bf16>&, int) {
        return {};
    }
    template <int D, int R>
    using ForwardSupply = DirectSupply<D>;
    template <int D, int R>
    using BackwardSupply = DirectSupply<D>;
    static constexpr int kParts = 3, kGroupThreads = 0, kManyHeads = 1;
    static constexpr bool kInOrder = false, kHalves = false, kPrepared = false, kAligned = false;
    __device__ static void group_sync() { __syncthreads(); }
    template <std::size_t bytes, class Kernel>
    static void allow(Kernel kernel) {
        allow_shared<bytes>(kernel);
    }
    __device__ static float quotient(float x, float y) { return x / y; }
    __device__ static void publish_matrix() {}
    using Matrix = const nv_bf16*;  // its parts in shared memory
    template <int D>
    __device__ static Matrix matrix(const nv_bf16* parts) {
        return parts;
    }
    template <int D, int R, bool kBackward, class Meanwhile, class Take>
    __device__ static __forceinline__ void multiply(Vectors<D>& v, const nv_bf16* parts, int used,
                                                    Meanwhile&& meanwhile, Take&& take) {
        meanwhile();
        if (used == 1)
            product<D, 1>(v, parts, take);
        else
            product<D, kParts>(v, parts, take);
    }
    template <int D, class Take>
    __device__ static __forceinline__ void turn(const std::uint32_t (&hi)[D / 16][4],
                                                const std::uint32_t (&mid)[D / 16][4], const nv_bf16* parts,
                                                Take&& take) {
        turned_product<D>(hi, mid, parts, take);
    }
};

// Where store_sums() has left the sums of so many groups of each column.
void note_sums(PendingSums<float>& pending, const EnergyBackward<bf16>& p, int per_column) {
    const std::int32_t all = std::int32_t(energy_columns(p)) * per_column, of_head = all / p.heads;
    const auto note = [&](const Vec<float>& to, const float* partial, std::int32_t rows) {
        if (to)
            pending.add({.to = to.data,
                         .partial = partial,
                         .row_step = 1,
                         .column_step = rows,
                         .rows = rows,
                         .columns = std::int32_t(to.size)});
    };
    note(p.dlog_tau, p.scratch.data, all);
    note(p.dlog_temp, p.scratch.data + std::int64_t(p.scalars) * all, of_head);
}

// By sm_90's own instructions, where there are any for it.
#if FIEDLER_SM90A  // kernels/energy_sm90.cu is in this build
template <class P>
auto launch_best(const Cuda& d, const P& p) {
    return energy_sm90_takes(d, p) ? energy_sm90(d, p) : launch_with<WarpProducts>(d, p);
}
void prepare_best(const Cuda& d, FeatureLaplacian<float>& lap, int scalars, const Vec<std::byte>& memory) {
    if (energy_sm90_prepares(d, lap.dim)) energy_sm90_prepare(d, lap, scalars, memory);
}
#else
void prepare_best(const Cuda&, FeatureLaplacian<float>&, int, const Vec<std::byte>&) {}

template <class P>
auto launch_best(const Cuda& d, const P& p) {
    return launch_with<WarpProducts>(d, p);
}
#endif
}  // namespace

void energy_prepare(const Cuda& d, FeatureLaplacian<float>& lap, std::int32_t scalars, Vec<std::byte> memory) {
    check(lap, scalars);
    FIEDLER_REQUIRE("energy", memory.size >= energy_matrix_bytes(lap.dim, scalars) &&
                                  reinterpret_cast<std::uintptr_t>(memory.data) % 128 == 0);
    prepare_best(d, lap, scalars, memory);
}

void energy_forward(const Cuda& d, const EnergyForward<bf16>& p) {
    check(p);
    FIEDLER_REQUIRE("energy", is_aligned16(p.x) && p.x.rows < kMostTokens);
    if (p.x.rows > 0) launch_best(d, p);
}

void energy_backward(const Cuda& d, const EnergyBackward<bf16>& given) {
    EnergyBackward<bf16> p = given;
    check(p);
    FIEDLER_REQUIRE("energy", is_aligned16(p.x) && is_aligned16(p.dx) && p.x.rows < kMostTokens);
    if (p.x.rows == 0) return;
    if (!p.dlog_tau && !p.dlog_temp) {
        p.scratch = {};
        launch_best(d, p);
        return;
    }
    const std::int64_t elements = energy_pending_elements(p.x.rows, p.heads, p.scalars);
    FIEDLER_REQUIRE("energy", p.pending || p.scratch.size >= elements);
    PendingSums<float> own(p.scratch);
    PendingSums<float>& pending = p.pending ? *p.pending : own;
    p.scratch = pending.take(elements);
    note_sums(pending, p, launch_best(d, p));
    if (!p.pending) finish_sums(d, pending);
}

}  // namespace fiedler
