// kernels/head.h: the vocabulary head with its loss: logits, softmax cross-entropy and both gradients, a chunk of rows at
// a time, so that the logits of all rows never exist at once.
//
//   l_ij = x_i . w_j        losses_i = logsumexp_j(l_ij) - l_{i, target_i}          (0 where target_i < 0: ignored)
//   dl_ij = (softmax_j(l_i) - [j == target_i]) scale                               (0 where ignored)
//   dx_i = sum_j dl_ij w_j                  dw_j += sum_i dl_ij x_i
//
// Shapes     x, dx: [n, C] T; w: [V, C] T; dw: [V, C] acc_t<T>; losses: [n] acc_t<T>; targets: [n] int32, < V.
//            Row-major, any ld; on Cuda data and row strides 16-byte aligned.
// Gradient   asked for by dx and dw, both present or both absent.
// Scratch    logits: [rows, V] T, ld >= V a multiple of 8 on Cuda: a chunk has so many rows, and what it leaves in them
//            is of no use. scratch: head_scratch_elements, Cuda only. fp8_scratch: head_fp8_scratch_bytes, at a multiple
//            of 16, where the way in fp8 is taken.
// Writes     losses, dx overwritten; dw accumulated (+=). dx, dw, losses and the scratches alias nothing.
// Numerics   sums in acc_t<T>; bit-equal from run to run for the same chunks. A NaN in x or in a used row of w shows in
//            the losses; a target beyond the vocabulary gives NaN (on the CPU: ContractError).
//   by products   logits and their gradients are rounded to T, as products of matmul.h and loss_forward (loss.h) make
//                 them. The CPU's way, and the general one on Cuda.
//   sm_90         C a multiple of 64 up to 768, V a multiple of 8 (head_sm90.cu): logits are not rounded. What is stored of
//                 them is e_ij = exp(l_ij - l_{i, target_i}), rounded to bf16, whose sum over j != target_i, s_i, comes
//                 from the same epilogue: losses_i = log(1 + s_i), and dl_ij = e_ij scale / (1 + s_i), with -s_i in
//                 the target's place, needs no other pass over the logits: the factor of the row goes to x (rounded once
//                 more) for dw, and to dx after its product. A loss above 88 nats comes out as infinity.
//   fp8           asked for by `precision`; taken on sm_90 where there is a gradient and head_fp8_takes the shape, with
//                 logits without a gap between rows and strides of dx and dw that 16 divides. Else one of the others is,
//                 without a word, and so without a gradient: evaluation stays exact. The products are of 8 bits. For the
//                 logits:
//                   x and w to int8 with a scale for each row, its largest element / 127, or more where the row would be
//                   longer than 2,030 (one of 384 is, if its root mean square is above 0.82 of the largest): sums of
//                   products are within 2^22, and exact
//                 For the gradients 8-bit floats, with factors that are powers of two:
//                   w, for dx, to e4m3 with one factor; at most 448, above 224 the largest
//                   e_ij = exp(l_ij - base_i) to e5m2, at most 57,344; base_i is log 16 below the larger of l_{i, target}
//                     and the largest l_ij of 192 words j, the targets at equal distances in the chunk
//                   x_i scale / (s_i + t_i), for dw, to e4m3 with one factor for the chunk
//                 where l_ij are of the rounded x and w, l_{i, target} of x and w as they are, t_i = exp(l_{i, target} -
//                 base_i), s_i the sum of e_ij over j != target_i before rounding. The loss is log(1 + s_i / t_i); the
//                 target's own term of dx, -s_i w_target scale / (s_i + t_i), is added in f32, but of w in e4m3: as the
//                 other terms have it, so that what the rounding does to w cancels where the softmax is right. That of
//                 dw has s_i rounded to e5m2. Sums are in f32, or with what a tensor core keeps of it. So an l_ij of
//                 normally distributed rows is off by some 0.01 |x_i| |w_j| / sqrt(C), a quarter of what e4m3 makes of
//                 it, and a term of a gradient carries some 7 % of noise. In dx and dw, but not in the losses, an e_ij of
//                 a logit more than 8.2 nats above the larger one that base_i is made of saturates (rows with a loss
//                 above 8.2 nats alone can have one), in dw s_i above 57,344 too; and words of less than 2^-21 of that
//                 larger one count as 0.
//                 A NaN or what is above 2^100 shows in the row's loss if it is in x, in every loss if in w.
#pragma once
#include <algorithm>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/loss.h"
#include "kernels/matmul.h"
#include "kernels/traffic.h"
#include "kernels/tuning.h"

namespace fiedler {

enum class HeadPrecision { bf16, fp8 };  // of the products where T is bf16; other T keep theirs

template <class T>
struct Head {
    Vec<acc_t<T>> losses;
    Mat<T> dx;  // optional, with dw
    Mat<acc_t<T>> dw;
    Mat<const T> x, w;
    Vec<const std::int32_t> targets;
    acc_t<T> scale = 1;
    Mat<T> logits;               // scratch
    Vec<acc_t<T>> scratch;       // Cuda
    std::int64_t loss_rows = 0;  // by products: rows that go from product to loss at a time; 0: the chunk
    HeadPrecision precision = HeadPrecision::bf16;
    Vec<unsigned char> fp8_scratch;  // Cuda, precision fp8
};

template <class T>
void check(const Head<T>& p) {
    const std::int64_t n = p.x.rows, c = p.x.cols, v = p.w.rows;
    FIEDLER_REQUIRE("head", is_shape(p.x, n, c) && is_shape(p.w, v, c) && is_shape(p.losses, n));
    FIEDLER_REQUIRE("head", is_shape(p.targets, n) && p.logits.rows >= 1 && is_shape(p.logits, p.logits.rows, v));
    FIEDLER_REQUIRE("head", bool(p.dx) == bool(p.dw) && (!p.dx || (is_shape(p.dx, n, c) && is_shape(p.dw, v, c))));
    FIEDLER_REQUIRE("head", p.loss_rows >= 0 && (!p.dx || p.dx.data != p.x.data));
}

// For each row of a chunk: its factor, and its sum over each panel of columns.
inline std::int64_t head_scratch_elements(std::int64_t chunk_rows, std::int64_t vocab, std::int64_t channels) {
    const std::int64_t columns = tuning::panel_columns(channels);
    return chunk_rows * (1 + (vocab + columns - 1) / columns);
}

// Shapes that the way in fp8 takes: rows in all and of a chunk (logits).
constexpr bool head_fp8_takes(std::int64_t rows, std::int64_t chunk_rows, std::int64_t vocab, std::int64_t channels) {
    return rows > 0 && rows % 64 == 0 && std::min(rows, chunk_rows) % 64 == 0 && vocab % 16 == 0 &&
           channels % 128 == 0 && channels <= 768;
}
inline constexpr std::int64_t kHeadFp8Panel = 192;  // columns: tuning::panel_columns of fp8, for every C
// w and its transpose; of a chunk, x and its transpose in turn, and a sample of w; the scales of w and of the sample, five
// numbers a row of the chunk; three numbers.
inline std::int64_t head_fp8_scratch_bytes(std::int64_t chunk_rows, std::int64_t vocab, std::int64_t channels) {
    const std::int64_t numbers = vocab + kHeadFp8Panel + 5 * chunk_rows;
    return (2 * vocab + chunk_rows + kHeadFp8Panel) * channels + numbers * std::int64_t(sizeof(float)) + 48;
}

// The least: logits are written and read, once for each gradient, only because they do not fit into a cache.
template <class T>
Traffic traffic(const Head<T>& p) {
    const double n = double(p.x.rows), c = double(p.x.cols), v = double(p.w.rows);
    const double bytes = (n + v) * c * sizeof(T) + n * (sizeof(acc_t<T>) + 4);
    const double flops = 2 * n * v * c + 4 * n * v;
    if (!p.dx) return {bytes, flops};
    return {bytes + n * c * sizeof(T) + 2 * v * c * sizeof(acc_t<T>), flops + 4 * n * v * c};
}

// What Dev has of matmul.h and loss.h, in turn. Within a chunk, loss_rows at a time: their logits are turned into their
// own gradient while in cache. The products with the gradient take the whole chunk, so that few of them add to dw, which
// is read and written each time.
template <class Dev, class T>
void head_by_products(const Dev& dev, const Head<T>& p) {
    check(p);
    const bool gradient = bool(p.dx);
    for (std::int64_t first = 0; first < p.x.rows; first += p.logits.rows) {
        const std::int64_t rows = std::min(p.logits.rows, p.x.rows - first);
        const std::int64_t part = p.loss_rows > 0 ? p.loss_rows : rows;
        for (std::int64_t done = 0; done < rows; done += part) {
            const std::int64_t count = std::min(part, rows - done);
            const Mat<T> logits = p.logits.slice_rows(done, count);
            matmul_forward(dev, MatmulForward<T, T>{
                                    .y = logits, .x = p.x.slice_rows(first + done, count), .w = p.w, .residual = {}});
            loss_forward(dev, LossForward<T>{.logits = logits,
                                             .losses = p.losses.slice(first + done, count),
                                             .targets = p.targets.slice(first + done, count),
                                             .scale = p.scale,
                                             .gradient = gradient});
        }
        if (!gradient) continue;
        const Mat<T> chunk = p.logits.slice_rows(0, rows);
        matmul_dw(dev, MatmulDw<T>{.dw = p.dw, .dy = chunk, .x = p.x.slice_rows(first, rows)});
        matmul_dx(dev, MatmulDx<T>{.dx = p.dx.slice_rows(first, rows), .dy = chunk, .w = p.w});
    }
}

template <class T>  // float, double
void head(const Cpu&, const Head<T>&);
void head(const Cuda&, const Head<bf16>&);

// Whether devices of this architecture (Cuda::arch) have the way in fp8, in this build.
bool head_has_fp8(int arch);

// For tests and benchmarks: the same by one way alone, whatever `precision` says. False: it does not take this problem
// here; nothing was computed.
enum class HeadPath { products, sm90, fp8 };
bool head_by_path(const Cuda&, const Head<bf16>&, HeadPath);

}  // namespace fiedler
