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
//            is of no use. scratch: head_scratch_elements, Cuda only.
// Writes     losses, dx overwritten; dw accumulated (+=). dx, dw, losses and both scratches alias nothing.
// Numerics   sums in acc_t<T>; bit-equal from run to run for the same chunks. A NaN in x or in a used row of w shows in
//            the losses; a target beyond the vocabulary gives NaN (on the CPU: ContractError).
//   by products   logits and their gradients are rounded to T, as products of matmul.h and loss_forward (loss.h) make
//                 them. The CPU's way, and the general one on Cuda.
//   sm_90         C a multiple of 64 up to 768, V a multiple of 8 (head_sm90.cu): logits are not rounded. What is stored of
//                 them is e_ij = exp(l_ij - l_{i, target_i}), rounded to bf16, whose sum over j != target_i, s_i, comes
//                 from the same epilogue: losses_i = log(1 + s_i), and dl_ij = e_ij scale / (1 + s_i), with -s_i in
//                 the target's place, needs no other pass over the logits: the factor of the row goes to x (rounded once
//                 more) for dw, and to dx after its product. A loss above 88 nats comes out as infinity.
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

// For tests and benchmarks: the same by one way alone. False: it does not take this problem here; nothing was computed.
enum class HeadPath { products, sm90 };
bool head_by_path(const Cuda&, const Head<bf16>&, HeadPath);

}  // namespace fiedler
