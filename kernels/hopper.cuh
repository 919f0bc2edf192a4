// kernels/hopper.cuh: the instructions that only sm_90a has: barriers that count bytes, tile loads by the tensor memory
// accelerator (TMA), products of a warpgroup (128 threads). Names and meanings as in the PTX ISA.
//
// Tiles of operands lie in shared memory as TMA's 128-byte swizzle writes them: rows of 64 bf16 (128 bytes; or 128 int8), at an
// address that is a multiple of 1024; the 16-byte piece c of row r lies at place c ^ (r % 8) of its row.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/mma.cuh"

namespace fiedler::hopper {

constexpr int kWarpgroup = 128;
constexpr int kSwizzleColumns = 64, kSwizzleBytes = 128;  // of a row of a tile
constexpr int kTileAlignment = 1024;

// ---- barriers in shared memory -----------------------------------------------------------------------------------
// A barrier goes from phase to phase; a phase is over when `count` threads have arrived and all announced bytes are there.
// wait(parity) returns once a phase of that parity (0 the first, 1 the second, 0, ...) is the last one that is over;
// parity 1 returns at once on a fresh barrier.
using Barrier = std::uint64_t;

__device__ inline void barrier_init(std::uint32_t address, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(address), "r"(count) : "memory");
}
__device__ inline void barrier_init(Barrier* b, int count) { barrier_init(shared_address(b), count); }
// Makes the initialised barriers known to TMA; before the __syncthreads that tells the other threads.
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
// By the address that it has in shared memory, or by pointer; the others likewise.
__device__ inline void barrier_arrive(std::uint32_t address) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(address) : "memory");
}
__device__ inline void barrier_arrive(Barrier* b) { barrier_arrive(shared_address(b)); }
// Arrives and announces bytes that TMA is going to bring.
__device__ inline void barrier_arrive_expecting(std::uint32_t address, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(address), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive_expecting(Barrier* b, int bytes) {
    barrier_arrive_expecting(shared_address(b), bytes);
}
#define FIEDLER_BARRIER_WAIT                                     \
    "{\n.reg .pred done;\n"                                      \
    "again:\n"                                                   \
    "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n" \
    "@done bra over;\n"                                          \
    "bra again;\n"                                               \
    "over:\n}\n"
__device__ inline void barrier_wait(Barrier* b, int parity) {
    asm volatile(FIEDLER_BARRIER_WAIT ::"r"(shared_address(b)), "r"(parity) : "memory");
}
__device__ inline void barrier_wait(std::uint32_t address, int parity) {
    asm volatile(FIEDLER_BARRIER_WAIT ::"r"(address), "r"(parity) : "memory");
}
#undef FIEDLER_BARRIER_WAIT
// Whether a wait would return at once.
__device__ inline bool barrier_over(std::uint32_t address, int parity) {
    std::uint32_t x;
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.b32 %0, 1, 0, done;\n}\n"
        : "=r"(x)
        : "r"(address), "r"(parity)
        : "memory");
    return x != 0;
}
// Numbered barriers of the block: `threads` threads in all, of which some wait and the others only announce themselves.
__device__ inline void named_wait(int number, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}
__device__ inline void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// One lane of a warp whose lanes are together; what it alone does needs no loop over lanes, as behind a comparison of
// thread numbers.
__device__ inline bool elected() {
    std::uint32_t x;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n" : "=r"(x));
    return x != 0;
}
// x, which is the same for all lanes, so that the compiler knows it.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ inline std::uint32_t uniform(std::uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// ---- shared memory by its address ----------------------------------------------------------------------------------
// Where an address is kept: that of a name would be made anew each time. `offset` is part of the instruction.
template <int offset = 0>
__device__ inline uint4 load_four_words(std::uint32_t from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4+%5];\n"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from), "n"(offset));
    return x;
}
// Not by load_four_words: then ptxas makes other code of attention_forward_packed_sm90.
template <int offset = 0>
__device__ inline float4 load_four(std::uint32_t from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4+%5];\n"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(from), "n"(offset));
    return x;
}
template <int offset = 0>
__device__ inline std::uint32_t load_word(std::uint32_t from) {
    std::uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1+%2];\n" : "=r"(x) : "r"(from), "n"(offset));
    return x;
}

// The whole warpgroup gives registers away, or waits until it can have so many of its own (for each thread).
template <int n>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(n));
}
template <int n>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(n));
}

// ---- TMA ---------------------------------------------------------------------------------------------------------
// The box of `map` at the given coordinates (innermost first) -> shared memory; its bytes are counted by b. Elements
// beyond the tensor are zeros, and count.
__device__ inline void load_box(std::uint32_t to, const CUtensorMap* map, int x, int y, std::uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap* map, int x, int y, Barrier* b) {
    load_box(shared_address(to), map, x, y, shared_address(b));
}
__device__ inline void load_box(std::uint32_t to, const CUtensorMap* map, int x, int y, int z, std::uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}
__device__ inline void load_box(void* to, const CUtensorMap* map, int x, int y, int z, int w, Barrier* b) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];\n" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}
// `bytes` as they lie, both at multiples of 16, and `bytes` too.
__device__ inline void load_bytes(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ inline void load_bytes(void* to, const void* from, int bytes, Barrier* b) {
    load_bytes(shared_address(to), from, bytes, shared_address(b));
}
// The box at the given coordinates <- shared memory, after publish_shared(). The memory must stay as it is until
// store_wait(); only the thread that stored may wait.
__device__ inline void store_box(const CUtensorMap* map, int x, int y, std::uint32_t from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(map),
                 "r"(from), "r"(x), "r"(y)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ inline void store_box(const CUtensorMap* map, int x, int y, int z, std::uint32_t from) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];\n" ::"l"(map),
                 "r"(from), "r"(x), "r"(y), "r"(z)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ inline void store_box(const CUtensorMap* map, int x, int y, const void* from) {
    store_box(map, x, y, shared_address(from));
}
__device__ inline void store_box(const CUtensorMap* map, int x, int y, int z, int w, const void* from) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map),
        "r"(shared_address(from)), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory"); }
// What this thread has written into shared memory becomes visible to products and TMA (after a barrier, to those that
// others start).
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit values, in the layout of mma.cuh's C: lane l gives where row l % 8 of matrix l / 8 goes.
__device__ inline void store_matrices(void* to, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(to)), "r"(a),
                 "r"(b), "r"(c), "r"(d)
                 : "memory");
}
// The same, turned: where column l % 8 of matrix l / 8 goes, as a row.
__device__ inline void store_matrices_turned(void* to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                             std::uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(to)),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- products of a warpgroup -------------------------------------------------------------------------------------
// Operand in shared memory: rows of 64 of the inner dimension, swizzled as above, eight rows after each other every 1024
// bytes. Bits 0-13 address / 16, 16-29 unused with this swizzle, 32-45 distance of eight rows / 16, 62-63 the swizzle.
__device__ inline std::uint64_t operand(const void* tile) {
    constexpr std::uint64_t kEightRows = 8 * kSwizzleBytes / 16, k128ByteSwizzle = 1;
    return std::uint64_t((shared_address(tile) & 0x3ffff) >> 4) | std::uint64_t(1) << 16 | kEightRows << 32 |
           k128ByteSwizzle << 62;
}
// The operand `steps` of 16 columns further on; the swizzle is applied to the address that results.
__device__ inline std::uint64_t advance(std::uint64_t operand, int steps) { return operand + 2 * steps; }

__device__ inline void product_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int pending>
__device__ inline void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}
// The sums are read or written by this thread only here and later, or here and before.
template <int n>
__device__ inline void pin(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n>
__device__ inline void pin(int (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int n>
__device__ inline void pin(std::uint32_t (&a)[n]) {  // operands in registers likewise
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// d = [d +] A B': A 64 x 16, B N x 16 (d kept when `add`). Thread `lane` of warp w holds, in d[4 j .. 4 j + 3], columns
// 8 j + 2 t and the next one of rows 16 w + g and then 16 w + g + 8, where g = lane / 4, t = lane % 4.
template <int N>
__device__ void multiply(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool add);

// Ten operands' names in the text of an instruction (the tens digit given), and eight or 32 of its list.
#define FIEDLER_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define FIEDLER_D8(i)                                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FIEDLER_D32(i) FIEDLER_D8(i), FIEDLER_D8(i + 8), FIEDLER_D8(i + 16), FIEDLER_D8(i + 24)
#define FIEDLER_MULTIPLY(n, sums, a, b, add) \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " add  \
    ", 0;\n"                                 \
    "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, " a ", " b ", p, 1, 1, 0, 0;\n}\n"

template <>
__device__ inline void multiply<96>(float (&d)[48], std::uint64_t a, std::uint64_t b, bool add) {
    asm volatile(FIEDLER_MULTIPLY(
                     96, FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) FIEDLER_TEN(3) "%40,%41,%42,%43,%44,%45,%46,%47",
                     "%48", "%49", "%50")
                 : FIEDLER_D32(0), FIEDLER_D8(32), FIEDLER_D8(40)
                 : "l"(a), "l"(b), "r"(int(add)));
}
template <>
__device__ inline void multiply<128>(float (&d)[64], std::uint64_t a, std::uint64_t b, bool add) {
    asm volatile(FIEDLER_MULTIPLY(128,
                                  FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) FIEDLER_TEN(3) FIEDLER_TEN(4)
                                      FIEDLER_TEN(5) "%60,%61,%62,%63",
                                  "%64", "%65", "%66")
                 : FIEDLER_D32(0), FIEDLER_D32(32)
                 : "l"(a), "l"(b), "r"(int(add)));
}
template <>
__device__ inline void multiply<192>(float (&d)[96], std::uint64_t a, std::uint64_t b, bool add) {
    asm volatile(FIEDLER_MULTIPLY(192,
                                  FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) FIEDLER_TEN(3) FIEDLER_TEN(4) FIEDLER_TEN(
                                      5) FIEDLER_TEN(6) FIEDLER_TEN(7) FIEDLER_TEN(8) "%90,%91,%92,%93,%94,%95",
                                  "%96", "%97", "%98")
                 : FIEDLER_D32(0), FIEDLER_D32(32), FIEDLER_D32(64)
                 : "l"(a), "l"(b), "r"(int(add)));
}
// The same of int8, 32 of the inner dimension: as many bytes. Exact.
template <int N>
__device__ void multiply_int8(int (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool add);
#define FIEDLER_I8(i)                                                                                           \
    "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
        "+r"(d[i + 7])
#define FIEDLER_I32(i) FIEDLER_I8(i), FIEDLER_I8(i + 8), FIEDLER_I8(i + 16), FIEDLER_I8(i + 24)
template <>
__device__ inline void multiply_int8<192>(int (&d)[96], std::uint64_t a, std::uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.s32.s8.s8 {" FIEDLER_TEN() FIEDLER_TEN(1) FIEDLER_TEN(2) FIEDLER_TEN(3)
            FIEDLER_TEN(4) FIEDLER_TEN(5) FIEDLER_TEN(6) FIEDLER_TEN(7)
                FIEDLER_TEN(8) "%90,%91,%92,%93,%94,%95}, %96, %97, p;\n}\n"
        : FIEDLER_I32(0), FIEDLER_I32(32), FIEDLER_I32(64)
        : "l"(a), "l"(b), "r"(int(add)));
}
#undef FIEDLER_I32
#undef FIEDLER_I8
// d = [d +] A B with A 64 x 16 in registers: each warp has 16 of the rows, in the layout of A in kernels/mma.cuh; they may be
// written again once the product has been waited for. kTurned: B as it lies, 16 rows of 64 columns, the rows the inner
// dimension ("N-major"; 16 further rows are 2048 bytes on); otherwise 64 rows of the inner dimension, as above.
template <bool kTurned>
__device__ inline void multiply_registers(float (&d)[32], const std::uint32_t (&a)[4], std::uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" FIEDLER_TEN() FIEDLER_TEN(1)
            FIEDLER_TEN(2) "%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}\n"
        : FIEDLER_D32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTurned)));
}
// The same with 72 columns, B as it lies: the last 8 are the first 8 columns of another tile, which b names (beside_low()).
__device__ inline void multiply_registers(float (&d)[36], const std::uint32_t (&a)[4], std::uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %41, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {" FIEDLER_TEN() FIEDLER_TEN(1)
            FIEDLER_TEN(2) "%30,%31,%32,%33,%34,%35}, {%36,%37,%38,%39}, %40, p, 1, 1, 1;\n}\n"
        : FIEDLER_D32(0), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
}
// The operand of a tile at `address`, as it lies, with columns 64 and on in one that begins `distance` bytes further on: bits
// 16-29 are the distance / 16. By its parts: the upper half, which is the same for all, and the lower. The operand k steps of
// 16 rows on, with the same second tile, is k kBesideStep more.
constexpr std::uint64_t kBesideLayout = std::uint64_t(8 * kSwizzleBytes / 16) << 32 | std::uint64_t(1) << 62;
__device__ inline std::uint32_t beside_low(std::uint32_t address, std::uint32_t distance) {
    return (address >> 4) + (distance / 16 << 16);
}
constexpr std::uint32_t kBesideStep = 0u - kSwizzleBytes * 0xffffu;  // kSwizzleBytes - (kSwizzleBytes << 16)
#undef FIEDLER_TEN
#undef FIEDLER_D8
#undef FIEDLER_D32
#undef FIEDLER_MULTIPLY

}  // namespace fiedler::hopper
