// kernels/energy_sm90.cu: energy on sm_90a: four warps multiply the vectors of their 64 tokens together. The matrix
// lies in shared memory as such products want it: what energy_product.cuh calls exchanged chunks is the swizzle of the
// tensor cores, of as many bytes as a row has. Sums over columns and parts stay in the tensor cores, small parts first.
// TMA brings the matrix, as energy_prepare() has left it, and the vectors, from the start of the kernel on; and it takes
// dx from where the vectors were.
#include "kernels/energy_sm90.h"

#include "kernels/energy_kernels.cuh"
#include "kernels/hopper.cuh"
#include "kernels/tensor_map.h"

namespace fiedler {
namespace {
using namespace energy_kernels;

// Operand in shared memory (see hopper::operand), with the swizzle of a row's bytes. As it lies ("turned") and 128 columns
// wide, columns 64 and on are 64 rows of 128 bytes further. By its lower half, which is kept.
template <int D>
__device__ __forceinline__ std::uint32_t operand_low(const void* matrix) {
    constexpr std::uint32_t halves = D == 128 ? kRowBytes<D> * D / 16 : 1;
    return (shared_address(matrix) & 0x3ffff) >> 4 | halves << 16;
}
template <int D>
__device__ __forceinline__ std::uint64_t operand(std::uint32_t low) {
    constexpr std::uint32_t swizzle = kRowBytes<D> == 128 ? 1 : kRowBytes<D> == 64 ? 2 : 3;
    constexpr std::uint64_t high = 8 * kRowBytes<D> / 16 | swizzle << 30;
    return high << 32 | low;
}

#define FIEDLER_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define FIEDLER_D8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FIEDLER_D32(i) FIEDLER_D8(i), FIEDLER_D8(i + 8), FIEDLER_D8(i + 16), FIEDLER_D8(i + 24)
#define FIEDLER_MULTIPLY(n, type, sums, a, b, add, turned)                                                            \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add                                                                           \
    ", 0;\n"                                                                                                          \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " {" sums "}, {" a "}, " b ", p, 1, 1, " turned \
    ";\n}\n"
#define FIEDLER_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTurned))
#define FIEDLER_MULTIPLY_AS(n, sums, a, b, add, turned, ...)                                            \
    if constexpr (kHalf)                                                                                \
        asm volatile(FIEDLER_MULTIPLY(n, f16, sums, a, b, add, turned) : __VA_ARGS__ : FIEDLER_INPUTS); \
    else                                                                                                \
        asm volatile(FIEDLER_MULTIPLY(n, bf16, sums, a, b, add, turned) : __VA_ARGS__ : FIEDLER_INPUTS)

// d = [d +] A B' (kTurned: A B), A 64 x 16 in registers, B of D columns; as hopper::multiply_registers, of bf16 or f16.
template <bool kTurned, bool kHalf>
__device__ __forceinline__ void multiply_matrix(float (&d)[8], const std::uint32_t (&a)[4], std::uint64_t b, bool add) {
    FIEDLER_MULTIPLY_AS(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", "%13", "%14", FIEDLER_D8(0));
}
template <bool kTurned, bool kHalf>
__device__ __forceinline__ void multiply_matrix(float (&d)[16], const std::uint32_t (&a)[4], std::uint64_t b,
                                                bool add) {
    FIEDLER_MULTIPLY_AS(32, FIEDLER_TEN() "%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", "%21", "%22",
                        FIEDLER_D8(0), FIEDLER_D8(8));
}
template <bool kTurned, bool kHalf>
__device__ __forceinline__ void multiply_matrix(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b,
                                                bool add) {
    FIEDLER_MULTIPLY_AS(64, FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) "%30,%31", "%32,%33,%34,%35", "%36", "%37",
                        "%38", FIEDLER_D32(0));
}
template <bool kTurned, bool kHalf>
__device__ __forceinline__ void multiply_matrix(float (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                                bool add) {
    FIEDLER_MULTIPLY_AS(
        128, FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) FIEDLER_TEN(3) FIEDLER_TEN(4) FIEDLER_TEN(5) "%60,%61,%62,%63",
        "%64,%65,%66,%67", "%68", "%69", "%70", FIEDLER_D32(0), FIEDLER_D32(32));
}
#undef FIEDLER_MULTIPLY_AS
#undef FIEDLER_INPUTS
#undef FIEDLER_MULTIPLY
#undef FIEDLER_D32
#undef FIEDLER_D8
#undef FIEDLER_TEN

// Vectors of a warpgroup, a box of 64 at a time in steps, by TMA: as many of them ahead as there are stages, less the one
// taken before, for each of the block's kGroups warpgroups. Before them the matrix, for all.
template <int D, int kStages, int kGroups>
struct BoxSupply {
    using S = Shape<D>;
    static constexpr int kBarrier = int(sizeof(hopper::Barrier));
    static constexpr int kStage = int(kStageBytes<D>) * hopper::kWarpgroup / kWarp;
    static constexpr int kBytes = kStages * (kStage + kBarrier) * kGroups + kBarrier;
    static_assert(kStages >= 2);  // the one taken last, and one to ask for
    const CUtensorMap* map;
    std::uint32_t all, base;               // the stages, those of the warpgroup: shared addresses
    std::uint32_t stage, barrier;          // the one taken last
    std::uint32_t free, free_barrier;      // the one taken before
    std::uint32_t piece;                   // in a stage, what the lane names to ldmatrix of the first two chunks
    int column, token, left, step_tokens;  // first ones of what is asked for next; tokens from that one on
    std::uint32_t parity = 1;              // of how often all stages have been taken

    __device__ __forceinline__ BoxSupply(const Mat<const bf16>& x, const CUtensorMap& of_x, unsigned char* stages,
                                         int first_column, int first_token, int step)
        : map(&of_x), column(first_column), token(first_token), left(int(x.rows) - first_token), step_tokens(step) {
        const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = threadIdx.x / hopper::kWarpgroup;
        all = kept(shared_address(stages)), base = all + group * (kStages * kStage);
        stage = base + (kStages - 1) * kStage, barrier = barrier_of(stage);
        // As matrix_offset(): that is how TMA exchanges the chunks of a row.
        piece = matrix_offset<D>(lane % kTokens, lane / kTokens) + warp % 4 * kTokens * kRowBytes<D>;
    }
    // Asks for the matrix, and for the first vectors.
    __device__ __forceinline__ void start(const void* matrix, const void* from, int bytes) {
        if (threadIdx.x % hopper::kWarpgroup == 0) {
#pragma unroll
            for (int i = 0; i < kStages; ++i) hopper::barrier_init(barrier_of(base + i * kStage), 1);
            if (threadIdx.x == 0) hopper::barrier_init(barrier_of_matrix(), 1);
            hopper::barrier_init_done();
            if (threadIdx.x == 0) {
                hopper::barrier_arrive_expecting(barrier_of_matrix(), bytes);
                hopper::load_bytes(shared_address(matrix), from, bytes, barrier_of_matrix());
            }
        }
        __syncwarp();
        ask_first(0, 1);
    }
    // Asks for more vectors.
    __device__ __forceinline__ void begin() { ask_first(1, kStages - 1); }
    __device__ __forceinline__ void wait_for_matrix() const { hopper::barrier_wait(barrier_of_matrix(), 0); }
    // The next tile's vectors.
    __device__ __forceinline__ void next(Vectors<D>& v) {
        free = stage, free_barrier = barrier;
        const bool last = stage == base + (kStages - 1) * kStage;
        stage += last ? -(kStages - 1) * kStage : kStage;
        barrier += last ? -(kStages - 1) * kBarrier : kBarrier;
        parity ^= last;
        hopper::barrier_wait(barrier, parity);
        __syncwarp();
#pragma unroll
        for (int group = 0; group < S::kGroups; ++group) again(v, group);
    }
    // Asks for more, in place of what was taken before. A product of the warpgroup is not issued before all its warps have
    // come to it, which PTX does not promise, but Warpgroup.GpuProductWaitsForAllWarps shows: they have read all that
    // next() had given them before, and forward nothing else: that place is free while the product is on its way.
    // Backward they use the place until send(), which they wait for together.
    __device__ __forceinline__ void refill() { ask(free, free_barrier); }
    // A group's once more, where v need not have been kept in registers.
    __device__ __forceinline__ void again(Vectors<D>& v, int group) const {
#pragma unroll
        for (int q = group * S::kGroupChunks; q < (group + 1) * S::kGroupChunks; q += 2)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                         : "=r"(v.x[0][q]), "=r"(v.x[1][q]), "=r"(v.x[0][q + 1]), "=r"(v.x[1][q + 1])
                         : "r"(place_of(q))
                         : "memory");
    }
    // A group of dx, in place of the vectors.
    __device__ __forceinline__ void put(const Vectors<D>& v, int group) const {
#pragma unroll
        for (int q = group * S::kGroupChunks; q < (group + 1) * S::kGroupChunks; q += 2)
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(place_of(q)),
                         "r"(v.x[0][q]), "r"(v.x[1][q]), "r"(v.x[0][q + 1]), "r"(v.x[1][q + 1])
                         : "memory");
    }
    // All groups are there: to the rows from first_token on.
    __device__ __forceinline__ void send(const CUtensorMap& of_dx, int first_column, int first_token) const {
        hopper::publish_shared();
        hopper::named_wait(1 + threadIdx.x / hopper::kWarpgroup, hopper::kWarpgroup);
        if (threadIdx.x / kWarp % 4 == 0 && hopper::elected()) {
            hopper::store_box(&of_dx, 0, first_column, first_token, stage);
            if constexpr (D == 128) hopper::store_box(&of_dx, D / 2, first_column, first_token, stage + kStage / 2);
        }
    }
    // Shared memory may be given up: nothing is on its way from there any more.
    __device__ __forceinline__ void finish() const {
        if (threadIdx.x / kWarp % 4 == 0 && hopper::elected()) hopper::store_wait();
    }

  private:
    // Of chunks q and q + 1, as `piece`.
    __device__ __forceinline__ std::uint32_t place_of(int q) const {
        return ((stage + piece) ^ q % 8 * 16) + q / 8 * (kStage / 2);
    }
    __device__ __forceinline__ std::uint32_t barrier_of(std::uint32_t of) const {
        return all + kGroups * kStages * kStage + (of - all) / kStage * kBarrier;
    }
    __device__ __forceinline__ std::uint32_t barrier_of_matrix() const {
        return all + kGroups * kStages * (kStage + kBarrier);
    }
    __device__ __forceinline__ void ask_first(int from, int to) {
#pragma unroll 1
        for (int i = from; i < to; ++i) ask(base + i * kStage, barrier_of(base + i * kStage));
    }
    // What no round of the warpgroup takes is not asked for. dx may be on its way from there.
    __device__ __forceinline__ void ask(std::uint32_t to, std::uint32_t its_barrier) {
        if (left > 0 && threadIdx.x / kWarp % 4 == 0 && hopper::elected()) {
            hopper::store_wait();
            hopper::barrier_arrive_expecting(its_barrier, kStage);
            hopper::load_box(to, map, 0, column, token, its_barrier);
            if constexpr (D == 128) hopper::load_box(to + kStage / 2, map, D / 2, column, token, its_barrier);
        }
        token += step_tokens, left -= step_tokens;
    }
};

// kUsed: parts of the matrix, that are not all zero.
template <int kUsed>
struct WarpgroupProducts {
    // One block a multiprocessor: the matrix is loaded once, and while some warpgroups wait for their products others
    // compute. Of as many warpgroups as `fiedler bench energy` found best on an H200. With 64 columns a fifth makes
    // forward 2 to 9 % slower, and backward (two scalars) no faster. With 32, and eight scalars, a fifth and sixth make
    // backward 5 to 7 % faster, and forward 3 % slower. With 128, and eight scalars, a fourth makes forward no faster.
    static constexpr int forward_threads(int d, int) { return (d < 128 ? 4 : 3) * hopper::kWarpgroup; }
    static constexpr int backward_threads(int d, int r) {
        const bool six = d == 32 && r < 16;  // with 16 scalars six spill
        return (six ? 6 : d < 128 ? 4 : 3) * hopper::kWarpgroup;
    }
    static constexpr int forward_at_least(int, int) { return 1; }
    static constexpr int backward_at_least(int, int) { return 1; }
    static constexpr int forward_blocks(int, int) { return 1; }
    static constexpr int backward_blocks(int, int) { return 1; }
    static constexpr int kParts = kUsed, kGroupThreads = hopper::kWarpgroup, kManyHeads = 4;
    static constexpr bool kInOrder = true, kHalves = true, kPrepared = true, kAligned = true;
    __device__ static void group_sync() {
        hopper::named_wait(1 + threadIdx.x / hopper::kWarpgroup, hopper::kWarpgroup);
    }
    static constexpr int kMostShared = 227 * 1024, kMostStages = 3;
    // As many as fit beside the matrix.
    static constexpr int stages(int d, int parts, int warps) {
        const int room =
            kMostShared - 2 * parts * d * d - kManyHeads * int(kPartialBytes) - int(sizeof(hopper::Barrier));
        const int most = room / (warps * kTokens * 2 * d + warps / 4 * int(sizeof(hopper::Barrier)));
        return most < kMostStages ? most : kMostStages;
    }
    template <int D, int kParts, int kBlock>
    using Supply = BoxSupply<D, stages(D, kParts, kBlock / kWarp), kBlock / hopper::kWarpgroup>;
    template <int D, int R>
    using ForwardSupply = Supply<D, kMatrixParts<R, WarpgroupProducts, false>, forward_threads(D, R)>;
    template <int D, int R>
    using BackwardSupply = Supply<D, kMatrixParts<R, WarpgroupProducts, true>, backward_threads(D, R)>;
    using Map = CUtensorMap;
    template <int D>
    static Map map_of(const Mat<const bf16>& x, int heads_log2) {
        const cuuint64_t size[3] = {D, cuuint64_t(x.cols) / D, cuuint64_t(x.rows)},
                         stride[2] = {D * sizeof(bf16), cuuint64_t(x.ld) * sizeof(bf16)};
        constexpr cuuint32_t kVectors = hopper::kWarpgroup / kWarp * kTokens;
        // A driver takes rows that are no multiple of a head apart, which cuda.h's formula for strides does not have.
        const cuuint32_t box[3] = {kRowBytes<D> / sizeof(bf16), 1u << heads_log2, kVectors >> heads_log2};
        return tensor_map<3>(x.data, size, stride, box,
                             D >= 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                             : D == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                       : CU_TENSOR_MAP_SWIZZLE_32B,
                             CU_TENSOR_MAP_L2_PROMOTION_NONE);  // other columns are other groups'
    }
    template <std::size_t bytes, class Kernel>
    static void allow(Kernel kernel) {
        static_assert(bytes <= kMostShared);
        CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    }

    // To about one unit of rounding, without the branches of a division.
    __device__ static __forceinline__ float quotient(float x, float y) {
        const float r = reciprocal(y), q = x * r;
        return fmaf(r, fmaf(-q, y, x), q);
    }
    __device__ static void publish_matrix() { hopper::publish_shared(); }
    // The products that issue(d) asks for, meanwhile(), then take(j, pair) for j = 0, 2, .. of D / 8 with their sums.
    // meanwhile() reads A's registers, on which PTX promises nothing while products run; ptxas leaves them alone.
    template <int D, class Issue, class Meanwhile, class Take>
    __device__ static __forceinline__ void run(Issue&& issue, Meanwhile&& meanwhile, Take&& take) {
        float d[D / 2];
        hopper::product_begin();
        issue(d);
        hopper::product_commit();
        meanwhile();
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
    using Matrix = std::uint32_t;  // operand_low()
    template <int D>
    __device__ static Matrix matrix(const nv_bf16* parts) {
        return kept(operand_low<D>(parts));
    }
    // y = M x, M as the sum of its parts. Of a triangle the quarter that is zero is left out: M's rows in two blocks.
    template <int D, int R, bool kBackward, class Meanwhile, class Take>
    __device__ static __forceinline__ void multiply(Vectors<D>& v, Matrix low, int, Meanwhile&& meanwhile,
                                                    Take&& take) {
        constexpr int kBlocks = R == 1 && !kBackward && D >= 64 ? 2 : 1, kRows = D / kBlocks;
        const std::uint64_t matrix = operand<D>(kept(low));  // once more: operands need no registers then
        run<D>(
            [&](float(&d)[D / 2]) {
#pragma unroll
                for (int part = kParts - 1; part >= 0; --part)  // small parts first
#pragma unroll
                    for (int s = 0; s < D / 16; ++s) {
                        const std::uint32_t a[4] = {v.x[0][2 * s], v.x[1][2 * s], v.x[0][2 * s + 1], v.x[1][2 * s + 1]};
                        const std::uint64_t columns = matrix + (chunk_bits<D>(2 * s) + part * 2 * D * D) / 16;
#pragma unroll
                        for (int block = 0; block < kBlocks; ++block) {
                            if (16 * s >= (block + 1) * kRows) continue;
                            auto& rows = reinterpret_cast<float(&)[kRows / 2]>(d[block * kRows / 2]);
                            multiply_matrix<false, false>(rows, a, columns + block * kRows * kRowBytes<D> / 16,
                                                          part < kParts - 1 || s > 0);
                        }
                    }
            },
            meanwhile,
            [&](int j, float(&pair)[2][4]) {
                if (j == 0) forget_unpacked(v);
                take(j, pair);
            });
    }
    template <int D, class Take>
    __device__ static __forceinline__ void turn_halves(const std::uint32_t (&y)[D / 16][4], Matrix low, Take&& take) {
        // 64 columns at a time: registers.
        constexpr int kColumns = D < 64 ? D : 64, kHalf = kRowBytes<D> * D / 16;
        constexpr int kSixteenRows = 16 * kRowBytes<D> / 16;
        const std::uint64_t matrix = operand<D>(kept(low)) + kParts * 2 * D * D / 16;  // behind the other parts
#pragma unroll
        for (int half = 0; half < D / kColumns; ++half) {
            run<kColumns>(
                [&](float(&d)[kColumns / 2]) {
#pragma unroll
                    for (int s = 0; s < D / 16; ++s)
                        multiply_matrix<true, true>(d, y[s], matrix + half * kHalf + s * kSixteenRows, s > 0);
                },
                [] {}, [&](int q, const float(&pair)[2][4]) { take(half * kColumns / 8 + q, pair); });
        }
    }
};

constexpr int kPrepareThreads = 512;
template <bool kSeveral>
constexpr int kPreparedParts = kMatrixParts<kSeveral ? 2 : 1, WarpgroupProducts<2>, true>;
// The triangle of a matrix of two parts, in two parts: of a symmetric one they are exact. True, in every thread, if one part
// is not enough.
template <int D>
__device__ bool store_triangle(nv_bf16* to, const nv_bf16* parts) {
    const auto at = [](int row, int column) {
        return static_cast<int>(matrix_offset<D>(row, column / 8)) / 2 + column % 8;
    };
    const auto entry = [&](int i) { return __bfloat162float(parts[i]) + __bfloat162float(parts[D * D + i]); };
    bool split = false;
    for (int i = threadIdx.x; i < D * D; i += kPrepareThreads) {
        const int row = i / D, column = i % D, here = at(row, column);
        const float x = column > row ? 0.f : column == row ? entry(here) : entry(here) + entry(at(column, row));
        split |= store_split<D, 2>(to, row, column, x);
    }
    return __syncthreads_or(split) != 0;
}
// The parts of the matrix as they shall lie in shared memory, and what EnergyMatrix has to say of them.
template <int D, bool kSeveral>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const FeatureLaplacian<float> lap, std::uint32_t* to, int* number) {
    using P = WarpgroupProducts<2>;
    constexpr int kParts = kPreparedParts<kSeveral>;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared shared = carve<D>(memory, kParts, 0);
    int found;
    if constexpr (kSeveral)
        found = load_eigenvectors<D, P, true>(lap, shared, [] {});
    else
        found = load_sparse<D, P>(lap, shared, [] {});
    for (int i = threadIdx.x; i < kParts * D * D / 2; i += kPrepareThreads)
        to[i] = reinterpret_cast<const std::uint32_t*>(shared.parts)[i];
    if constexpr (!kSeveral) {
        static_assert(2 * kParts * D * D == kTriangleOffset<D>);
        if (store_triangle<D>(reinterpret_cast<nv_bf16*>(to) + kParts * D * D, shared.parts)) found = kParts;
    }
    if (threadIdx.x == 0) *number = found;
}
template <int D, bool kSeveral>
void prepare(const Cuda& d, FeatureLaplacian<float>& lap, const Vec<std::byte>& memory) {
    constexpr std::size_t kBytes = sizeof(nv_bf16) * kPreparedParts<kSeveral> * D * D + kPartialBytes;
    constexpr std::int64_t kNumber = energy_matrix_bytes(D, kSeveral ? 2 : 1) - kEnergyWord;
    auto* const number = reinterpret_cast<int*>(memory.data + kNumber);  // for the host
    const auto kernel = prepare_kernel<D, kSeveral>;
    WarpgroupProducts<2>::allow<kBytes>(kernel);
    kernel<<<1, kPrepareThreads, kBytes, stream_of(d)>>>(lap, reinterpret_cast<std::uint32_t*>(memory.data), number);
    LAUNCH_CHECK("energy_prepare");
    int found = 0;
    copy_to_host(d, &found, number, sizeof found);
    EnergyMatrix& made = kSeveral ? lap.of_several : lap.of_one;
    made.data = memory.data;
    (kSeveral ? made.log2 : made.parts) = found;
}

}  // namespace

void energy_sm90_prepare(const Cuda& d, FeatureLaplacian<float>& lap, int scalars, const Vec<std::byte>& memory) {
    with_one_of<16, 32, 64, 128>(lap.dim, [&](auto width) {
        constexpr int D = decltype(width)::value;
        scalars == 1 ? prepare<D, false>(d, lap, memory) : prepare<D, true>(d, lap, memory);
    });
}
bool energy_sm90_prepares(const Cuda& d, int dim) {
    return d.arch == 90 && (dim == 16 || dim == 32 || dim == 64 || dim == 128);
}
template <class T>
bool is_prepared(const FeatureLaplacian<float>& lap, int scalars, const Mat<T>& first, const Mat<T>& second) {
    const int together = bands_of_lane(scalars);  // numbers that one access takes
    return (scalars == 1 ? lap.of_one : lap.of_several).data && are_aligned(first, together) &&
           (!second || are_aligned(second, together));
}
bool energy_sm90_takes(const Cuda& d, const EnergyForward<bf16>& p) {
    return energy_sm90_prepares(d, p.lap.dim) && is_prepared(p.lap, p.scalars, p.a, p.b);
}
bool energy_sm90_takes(const Cuda& d, const EnergyBackward<bf16>& p) {
    return energy_sm90_prepares(d, p.lap.dim) && is_prepared(p.lap, p.scalars, p.da, p.db);
}
// R = 1: by as many parts as are not zero, one for a graph without weights.
template <class Problem>
auto launch_prepared(const Cuda& d, const Problem& p) {
    if (p.scalars > 1 || p.lap.of_one.parts > 1) return launch_with<WarpgroupProducts<2>>(d, p);
    return with_one_of<16, 32, 64, 128>(
        p.lap.dim, [&](auto width) { return launch<decltype(width)::value, 1, WarpgroupProducts<1>>(d, p); });
}
void energy_sm90(const Cuda& d, const EnergyForward<bf16>& p) { launch_prepared(d, p); }
int energy_sm90(const Cuda& d, const EnergyBackward<bf16>& p) { return launch_prepared(d, p); }

}  // namespace fiedler
