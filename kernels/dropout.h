// kernels/dropout.h: dropout with a mask that is computed anew where it is needed, never stored.
//
//   y_k = x_k m_k / (1 - q)      m_k = [draw_k >= 65536 q], k = row cols + column
//
// draw_k: 16 bits, the (k % 4)-th lowest of rng::bits(seed, stream, k / 4) (kernels/random.h): one draw of the generator
// for four elements. q: p rounded to a multiple of 2^-16. Forward and backward are the same call, on x and on dy, with
// the same seed and stream. A stream is one use of dropout (a layer's, a micro-batch's); the seed changes every step.
//
// Shapes     x, y: [rows, cols] T, any ld; on Cuda 16-byte aligned rows and cols % (16 / sizeof(T)) == 0 are the fast way
//            seed: [1] uint64 in the device's memory, so that a recorded step (graph_record) sees a new one
//            p: in [0, 1), and q < 1
// Writes     y overwritten; may be x itself.
// Numerics   one product with 1 / (1 - q), rounded to acc_t<T>, and one rounding to T: CPU and Cuda agree bit for bit.
//            The mask depends on an element's place in the matrix: unlike the rest of a model, a graph's results with
//            dropout do depend on the batch that it is in.
#pragma once
#include <cmath>

#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/random.h"
#include "kernels/traffic.h"

namespace fiedler {

template <class T>
struct Dropout {
    Mat<T> y;
    Mat<const T> x;
    Vec<const std::uint64_t> seed;
    std::uint64_t stream = 0;
    float p = 0;
};

// 65536 q, and 1 / (1 - q).
inline std::uint32_t dropout_threshold(float p) { return static_cast<std::uint32_t>(std::lround(p * 65536.f)); }
template <class A>
A dropout_scale(std::uint32_t threshold) {
    return static_cast<A>(65536.0 / (65536.0 - threshold));
}
FIEDLER_HD inline std::uint32_t dropout_draw(std::uint64_t four, std::uint32_t which) {
    return static_cast<std::uint32_t>(four >> (16 * which)) & 0xffffu;
}

template <class T>
void check(const Dropout<T>& p) {
    FIEDLER_REQUIRE("dropout", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.y, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("dropout", is_shape(p.seed, 1) && p.p >= 0 && p.p < 1 && dropout_threshold(p.p) < 65536);
    FIEDLER_REQUIRE("dropout", p.x.data != p.y.data || p.x.ld == p.y.ld);
}
template <class T>
Traffic traffic(const Dropout<T>& p) {
    const double n = double(p.x.rows) * double(p.x.cols);
    return {2 * n * sizeof(T), n};
}

template <class T>  // float, double
void dropout(const Cpu&, const Dropout<T>&);
void dropout(const Cuda&, const Dropout<bf16>&);
void dropout(const Cuda&, const Dropout<float>&);

}  // namespace fiedler
