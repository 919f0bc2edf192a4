// kernels/eigen.h: what a block eigen-solver does with tall, thin blocks of vectors, besides the sparse product
// (laplacian.h): Gram matrices, rotations, norms, deflation of known null vectors, gathers, random starts.
//
// A block is [n, m] of A (float on Cuda; float or double on Cpu), row-major, n up to 2^31, m up to 1,024: a vector is a
// column. Cuda: ld a multiple of 4, base 16-byte aligned. Small matrices (Gram, rotation, norms) are double, in device
// memory, row-major.
//
//   gram       G = X'Y                                G: [mx, my] double, overwritten. X may be Y (then only one triangle
//                                                     is computed and mirrored: exactly symmetric)
//   rotate     Y = beta Y + alpha X Q                 Q: [mx, my] double; beta is 0 (Y not read) or 1; Y must not overlap X
//   norms      out_j = sum_i (W_ij - theta_j X_ij)^2  out, theta: [m] double; theta absent: the squared norms of W, X not
//                                                     read (and may be absent)
//   deflate    X_ij -= v_i sum_{l in c(i)} v_l X_lj   component c is rows [offsets[c], offsets[c + 1]): the caller orders
//                                                     nodes so; v: [n] A with unit norm on every component
//   gather     Y_i = scale_i X_index_i                index: [n of Y] int32 into X's rows; scale absent: 1; Y, X apart
//   random     X_ij uniform in [-1, 1)                a pure function of (seed, first_column + j, i), the same on every
//                                                     device and in every precision (24 random bits)
//
// Numerics   Sums over rows: A within runs of at most kEigenRun rows, double across runs, in a fixed order: relative
//            error of a dot product of n terms about 2^-24 sqrt(kEigenRun / n), as the eigenvalues of meshes (1e-6 of
//            the norm and less) need. rotate: Cuda f32 products with Q rounded to f32, f32 sums over mx; Cpu in double,
//            rounded once.
//            No atomics; bit-equal from run to run (on the CPU on any number of threads).
// Scratch    Cuda: eigen_scratch_elements(n, mx, my) doubles for gram and rotate (norms: mx = m, my = 1), for deflate
//            eigen_deflate_scratch(); 16-byte aligned
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/traffic.h"

namespace fiedler {

inline constexpr std::int64_t kEigenRun = 64;        // rows summed in A
inline constexpr std::int64_t kEigenPartials = 256;  // partial sums at most, whatever the device

template <class A>
struct EigenGram {
    Mat<double> g;
    Mat<const A> x, y;
    Vec<double> scratch;  // Cuda
};
template <class A>
struct EigenRotate {
    Mat<A> y;
    Mat<const A> x;
    Mat<const double> q;
    double alpha = 1, beta = 0;
    Vec<double> scratch;  // Cuda: Q in f32
};
template <class A>
struct EigenNorms {
    Vec<double> out;
    Mat<const A> w, x;        // x: absent iff theta is
    Vec<const double> theta;  // optional
    Vec<double> scratch;      // Cuda
};
template <class A>
struct EigenDeflate {
    Mat<A> x;
    Vec<const A> v;
    Vec<const std::int64_t> offsets;  // [components + 1]; offsets[0] = 0, last = n
    Vec<double> scratch;              // Cuda: eigen_deflate_scratch(n, m, components)
};
template <class A>
struct EigenGather {
    Mat<A> y;
    Mat<const A> x;
    Vec<const std::int32_t> index;
    Vec<const A> scale;  // optional
};
template <class A>
struct EigenRandom {
    Mat<A> x;
    std::uint64_t seed = 0;
    std::int64_t first_column = 0;
};

// Partial sums of each entry of a Gram matrix. Wide matrices have enough tiles to keep a card busy with few of them.
inline std::int64_t eigen_partials(std::int64_t n, std::int64_t mx, std::int64_t my) {
    const std::int64_t runs = (n + kEigenRun - 1) / kEigenRun, tiles = ((mx + 127) / 128) * ((my + 127) / 128);
    const std::int64_t most = tiles < 4 ? kEigenPartials : 4 * kEigenPartials / tiles;
    return runs < most ? runs : most;
}
inline std::int64_t eigen_scratch_elements(std::int64_t n, std::int64_t mx, std::int64_t my) {
    return eigen_partials(n, mx, my) * mx * my + 2 * mx;
}
// Enough for any panels of a block of m columns.
inline std::int64_t eigen_scratch_bound(std::int64_t n, std::int64_t m) {
    const std::int64_t runs = (n + kEigenRun - 1) / kEigenRun,
                       all = (runs < kEigenPartials ? runs : kEigenPartials) * m * m;
    const std::int64_t tiled = 4 * kEigenPartials * 128 * 128;
    return (all < tiled ? all : tiled) + 2 * m;
}
// Components are cut into pieces of kEigenDeflatePiece rows. Components of one piece need no scratch.
inline constexpr std::int64_t kEigenDeflatePiece = 256;
inline std::int64_t eigen_deflate_scratch(std::int64_t n, std::int64_t m, std::int64_t /*components*/ = 0) {
    return 2 * (n / kEigenDeflatePiece + 1) * m;
}

// The numbers of random: SplitMix64 over the rows, started at a hash of seed and column (as in engine/rng.h).
FIEDLER_HD constexpr std::uint64_t eigen_random_mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
FIEDLER_HD constexpr std::uint64_t eigen_random_column(std::uint64_t seed, std::int64_t column) {
    const auto c = static_cast<std::uint64_t>(column) + 1;
    return eigen_random_mix(eigen_random_mix(seed + 0x9e3779b97f4a7c15ull) ^ c * 0xd1342543de82ef95ull);
}
FIEDLER_HD constexpr float eigen_random_value(std::uint64_t start, std::int64_t row) {
    const std::uint64_t bits = eigen_random_mix(start + (static_cast<std::uint64_t>(row) + 1) * 0x9e3779b97f4a7c15ull);
    return static_cast<float>(bits >> 40) * 0x1p-23f - 1.f;  // exact
}

inline constexpr std::int64_t kEigenMaxColumns = 1024;

template <class A>
void check(const EigenGram<A>& p) {
    FIEDLER_REQUIRE("eigen", p.x.rows >= 1 && is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.y, p.x.rows, p.y.cols));
    FIEDLER_REQUIRE("eigen", is_shape(p.g, p.x.cols, p.y.cols) && p.x.cols >= 1 && p.y.cols >= 1);
    FIEDLER_REQUIRE("eigen", p.x.cols <= kEigenMaxColumns && p.y.cols <= kEigenMaxColumns);
}
template <class A>
void check(const EigenRotate<A>& p) {
    FIEDLER_REQUIRE("eigen", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.y, p.x.rows, p.y.cols));
    FIEDLER_REQUIRE("eigen", is_shape(p.q, p.x.cols, p.y.cols) && (p.beta == 0 || p.beta == 1));
    FIEDLER_REQUIRE("eigen", p.x.data != p.y.data);
}
template <class A>
void check(const EigenNorms<A>& p) {
    FIEDLER_REQUIRE("eigen", is_shape(p.w, p.w.rows, p.w.cols) && is_shape(p.out, p.w.cols));
    FIEDLER_REQUIRE("eigen", !p.theta || (is_shape(p.theta, p.w.cols) && is_shape(p.x, p.w.rows, p.w.cols)));
}
template <class A>
void check(const EigenDeflate<A>& p) {
    FIEDLER_REQUIRE("eigen", is_shape(p.x, p.x.rows, p.x.cols) && is_shape(p.v, p.x.rows));
    FIEDLER_REQUIRE("eigen", p.offsets.data && p.offsets.size >= 2);
}
template <class A>
void check(const EigenGather<A>& p) {
    FIEDLER_REQUIRE("eigen", is_shape(p.y, p.index.size, p.x.cols) && is_shape(p.x, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("eigen", p.index.data && (!p.scale || p.scale.size == p.index.size) && p.x.data != p.y.data);
}
template <class A>
void check(const EigenRandom<A>& p) {
    FIEDLER_REQUIRE("eigen", is_shape(p.x, p.x.rows, p.x.cols));
}

template <class A>
Traffic traffic(const EigenGram<A>& p) {
    const double n = double(p.x.rows), a = double(p.x.cols), b = double(p.y.cols);
    const bool same = p.x.data == p.y.data;
    return {sizeof(A) * n * (same ? a : a + b) + 8 * a * b, (same ? 1 : 2) * n * a * b};
}
template <class A>
Traffic traffic(const EigenRotate<A>& p) {
    const double n = double(p.x.rows), a = double(p.x.cols), b = double(p.y.cols);
    return {sizeof(A) * n * (a + (p.beta == 0 ? 1 : 2) * b) + 8 * a * b, 2 * n * a * b};
}
template <class A>
Traffic traffic(const EigenNorms<A>& p) {
    const double e = double(p.w.rows) * double(p.w.cols);
    return {sizeof(A) * e * (p.theta ? 2 : 1), e * (p.theta ? 4 : 2)};
}
template <class A>
Traffic traffic(const EigenDeflate<A>& p) {
    const double e = double(p.x.rows) * double(p.x.cols);
    return {sizeof(A) * (2 * e + double(p.x.rows)), 4 * e};
}
template <class A>
Traffic traffic(const EigenGather<A>& p) {
    const double e = double(p.y.rows) * double(p.y.cols);
    return {sizeof(A) * 2 * e + 4 * double(p.y.rows), p.scale ? e : 0};
}
template <class A>
Traffic traffic(const EigenRandom<A>& p) {
    return {sizeof(A) * double(p.x.rows) * double(p.x.cols), 0};
}

template <class A>  // float, double
void eigen_gram(const Cpu&, const EigenGram<A>&);
template <class A>
void eigen_rotate(const Cpu&, const EigenRotate<A>&);
template <class A>
void eigen_norms(const Cpu&, const EigenNorms<A>&);
template <class A>
void eigen_deflate(const Cpu&, const EigenDeflate<A>&);
template <class A>
void eigen_gather(const Cpu&, const EigenGather<A>&);
template <class A>
void eigen_random(const Cpu&, const EigenRandom<A>&);
void eigen_gram(const Cuda&, const EigenGram<float>&);
void eigen_rotate(const Cuda&, const EigenRotate<float>&);
void eigen_norms(const Cuda&, const EigenNorms<float>&);
void eigen_deflate(const Cuda&, const EigenDeflate<float>&);
void eigen_gather(const Cuda&, const EigenGather<float>&);
void eigen_random(const Cuda&, const EigenRandom<float>&);

}  // namespace fiedler
