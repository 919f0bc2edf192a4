// kernels/energy_sm90.cu: energy on sm_90a: four warps multiply the vectors of their 64 tokens together. The matrix lies in
// shared memory as such products want it: what energy_product.cuh calls exchanged chunks is the swizzle of the tensor
// cores, of as many bytes as a row has. Sums over columns and parts stay in the tensor cores, small parts first.
#include "kernels/energy_sm90.h"

#include "kernels/energy_kernels.cuh"
#include "kernels/hopper.cuh"

namespace fiedler {
namespace {
using namespace energy_kernels;

// Operand in shared memory (see hopper::operand), with the swizzle of a row's bytes. As it lies ("turned") and 128 columns
// wide, columns 64 and on are 64 rows of 128 bytes further.
template <int D>
__device__ __forceinline__ std::uint64_t operand(const void* matrix) {
    constexpr std::uint64_t swizzle = kRowBytes<D> == 128 ? 1 : kRowBytes<D> == 64 ? 2 : 3;
    constexpr std::uint64_t eight_rows = 8 * kRowBytes<D> / 16, halves = D == 128 ? kRowBytes<D> * D / 16 : 1;
    return std::uint64_t((shared_address(matrix) & 0x3ffff) >> 4) | halves << 16 | eight_rows << 32 | swizzle << 62;
}

#define FIEDLER_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define FIEDLER_D8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FIEDLER_D32(i) FIEDLER_D8(i), FIEDLER_D8(i + 8), FIEDLER_D8(i + 16), FIEDLER_D8(i + 24)
#define FIEDLER_MULTIPLY(n, sums, a, b, add, turned) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add          \
    ", 0;\n"                                         \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, {" a "}, " b ", p, 1, 1, " turned ";\n}\n"
#define FIEDLER_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTurned))

// d = [d +] A B' (kTurned: A B), A 64 x 16 in registers, B of D columns; as hopper::multiply_registers.
template <bool kTurned>
__device__ __forceinline__ void multiply_matrix(float (&d)[8], const std::uint32_t (&a)[4], std::uint64_t b, bool add) {
    asm volatile(FIEDLER_MULTIPLY(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", "%13", "%14")
                 : FIEDLER_D8(0)
                 : FIEDLER_INPUTS);
}
template <bool kTurned>
__device__ __forceinline__ void multiply_matrix(float (&d)[16], const std::uint32_t (&a)[4], std::uint64_t b,
                                                bool add) {
    asm volatile(FIEDLER_MULTIPLY(32, FIEDLER_TEN() "%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", "%21", "%22")
                 : FIEDLER_D8(0), FIEDLER_D8(8)
                 : FIEDLER_INPUTS);
}
template <bool kTurned>
__device__ __forceinline__ void multiply_matrix(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b,
                                                bool add) {
    hopper::multiply_registers<kTurned>(d, a, b, add);
}
template <bool kTurned>
__device__ __forceinline__ void multiply_matrix(float (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                                bool add) {
    asm volatile(FIEDLER_MULTIPLY(128,
                                  FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) FIEDLER_TEN(3) FIEDLER_TEN(4)
                                      FIEDLER_TEN(5) "%60,%61,%62,%63",
                                  "%64,%65,%66,%67", "%68", "%69", "%70")
                 : FIEDLER_D32(0), FIEDLER_D32(32)
                 : FIEDLER_INPUTS);
}
#undef FIEDLER_INPUTS
#undef FIEDLER_MULTIPLY
#undef FIEDLER_D32
#undef FIEDLER_D8
#undef FIEDLER_TEN

struct WarpgroupProducts {
    // One block a multiprocessor, of as many warpgroups as there are registers for: the matrix is loaded once, and while
    // some warpgroups wait for their products others compute.
    static constexpr int forward_threads(int, int) { return 4 * hopper::kWarpgroup; }
    static constexpr int backward_threads(int d, int r) { return (d < 128 ? 4 : r > 4 ? 2 : 3) * hopper::kWarpgroup; }
    static constexpr int forward_at_least(int, int) { return 1; }
    static constexpr int backward_at_least(int, int) { return 1; }
    static constexpr int forward_blocks(int, int) { return 1; }
    static constexpr int backward_blocks(int, int) { return 1; }
    template <int D>
    static constexpr int kStages = 2;
    template <std::size_t bytes, class Kernel>
    static void allow(Kernel kernel) {
        static_assert(bytes <= 227 * 1024);
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    }

    // To about one unit of rounding, without the branches of a division.
    __device__ static __forceinline__ float quotient(float x, float y) {
        float r;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
        const float q = x * r;
        return fmaf(r, fmaf(-q, y, x), q);
    }
    __device__ static void publish_matrix() { hopper::publish_shared(); }
    // The products that issue(d) asks for, then take(j, pair) for j = 0, 2, .. of D / 8 with their sums.
    template <int D, class Issue, class Take>
    __device__ static __forceinline__ void run(Issue&& issue, Take&& take) {
        float d[D / 2];
        hopper::product_begin();
        issue(d);
        hopper::product_commit();
        hopper::product_wait<0>();
        hopper::pin(d);
#pragma unroll
        for (int j = 0; j < D / 8; j += 2) {
            float pair[2][4];
#pragma unroll
            for (int k = 0; k < 8; ++k) pair[k / 4][k % 4] = d[4 * j + k];
            take(j, pair);
        }
    }
    template <int D, int kUsed, class Take>
    __device__ static __forceinline__ void multiply_parts(Vectors<D>& v, const nv_bf16* parts, Take&& take) {
        const std::uint64_t matrix = operand<D>(parts);
        run<D>(
            [&](float(&d)[D / 2]) {
#pragma unroll
                for (int part = kUsed - 1; part >= 0; --part)  // small parts first
#pragma unroll
                    for (int s = 0; s < D / 16; ++s) {
                        const std::uint32_t a[4] = {v.x[0][2 * s], v.x[1][2 * s], v.x[0][2 * s + 1], v.x[1][2 * s + 1]};
                        multiply_matrix<false>(d, a, matrix + (chunk_bits<D>(2 * s) + part * 2 * D * D) / 16,
                                               part < kUsed - 1 || s > 0);
                    }
            },
            [&](int j, float(&pair)[2][4]) {
                if (j == 0) forget_unpacked(v);
                take(j, pair);
            });
    }
    // Two ways, each as a whole: products with branches between them would wait for one another.
    template <int D, class Take>
    __device__ static __forceinline__ void multiply(Vectors<D>& v, const nv_bf16* parts, int used, Take&& take) {
        if (used == 1)
            multiply_parts<D, 1>(v, parts, take);
        else
            multiply_parts<D, kParts>(v, parts, take);
    }
    template <int D, class Take>
    __device__ static __forceinline__ void turn(const std::uint32_t (&hi)[D / 16][4],
                                                const std::uint32_t (&mid)[D / 16][4], const nv_bf16* parts,
                                                Take&& take) {
        // 64 columns at a time: registers.
        constexpr int kColumns = D < 64 ? D : 64, kHalf = kRowBytes<D> * D / 16;
        constexpr int kSixteenRows = 16 * kRowBytes<D> / 16, kPart = 2 * D * D / 16;
        const std::uint64_t matrix = operand<D>(parts);
#pragma unroll
        for (int half = 0; half < D / kColumns; ++half) {
            run<kColumns>(
                [&](float(&d)[kColumns / 2]) {
#pragma unroll
                    for (int s = 0; s < D / 16; ++s) {
                        const std::uint64_t rows = matrix + half * kHalf + s * kSixteenRows;
                        multiply_matrix<true>(d, hi[s], rows + kPart, s > 0);
                        multiply_matrix<true>(d, mid[s], rows, true);
                        multiply_matrix<true>(d, hi[s], rows, true);
                    }
                },
                [&](int q, const float(&pair)[2][4]) { take(half * kColumns / 8 + q, pair); });
        }
    }
};

}  // namespace

bool energy_sm90_takes(const Cuda& d, int dim) {
    return d.arch == 90 && (dim == 16 || dim == 32 || dim == 64 || dim == 128);
}
void energy_sm90(const Cuda& d, const EnergyForward<bf16>& p) { launch_with<WarpgroupProducts>(d, p); }
int energy_sm90(const Cuda& d, const EnergyBackward<bf16>& p) { return launch_with<WarpgroupProducts>(d, p); }

}  // namespace fiedler
