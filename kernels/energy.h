// kernels/energy.h: bounded Rayleigh quotients of head vectors on a feature-space Laplacian Lf (D x D), over the
// temperature.
//
//   R = 1   E = x'Lf x / (x'x + eps)                                 Lf as CSR
//   R > 1   E_r = sum_{m in band r} mu_m (u_m'x)^2 / (x'x + eps)     Lf's eigenpairs, ascending
//           band r holds eigenpairs [r D / R, (r + 1) D / R): D % R == 0; the R energies sum to E
//   lambda_r = E_r / (E_r + tau_r),  tau_r = exp(log_tau_r)        a_r = lambda_r exp(-log_temp_h)
//
//   backward, with g_r = da_r exp(-log_temp_h) tau_r / (E_r + tau_r)^2:
//     dx = sum_r g_r 2 (L_r x - E_r x) / (x'x + eps),  L_r = sum_{m in band r} mu_m u_m u_m' (R = 1: Lf itself)
//     dlog_tau_r += sum over tokens and heads of - da_r exp(-log_temp_h) E_r tau_r / (E_r + tau_r)^2
//     dlog_temp_h += sum over tokens and r of - da_r a_r
//
// One call treats one side (queries or keys), or, with b (backward: db), both, which lie side by side in x. Parameters
// are shared by both sides, so their gradients accumulate.
//
// Shapes     x, dx: [tokens, heads D] T, any ld (16-byte aligned rows on Cuda); a, da: [tokens, heads R] acc_t<T>;
//            both sides: x, dx: [tokens, 2 heads D], columns [0, heads D) the queries, the rest the keys; a, da are
//            the queries', b, db the keys', in the same shape with the same ld
//            log_tau, dlog_tau: [R]; log_temp, dlog_temp: [heads]; on Cuda D in {16, 32, 64, 128}, tokens < 2^30
//            FeatureLaplacian (device memory): CSR offsets [D + 1] int32, columns [nnz] int32, values [nnz];
//            eigenvectors [D, D], row m = u_m; eigenvalues [D]. R = 1 uses only the CSR (no entry twice), R > 1 only
//            the eigenpairs. Lf symmetric, positive semi-definite (not checked).
// Scratch    backward on Cuda: energy_pending_elements(tokens, heads, R) floats at most, of `pending` if given, else of
//            `scratch`
// Writes     a, dx overwritten; dlog_tau, dlog_temp accumulated (+=), absent: not computed. raw = true writes E_r
//            itself to a (no tau, no temperature): used once, to set tau to the median energy of the data.
// Numerics   everything in acc_t<T>, recomputed in backward; fixed order, no atomics: bit-equal from run to run.
//            Cuda: R > 1 multiplies by the eigenvectors times the roots of their eigenvalues, R = 1 by Lf; entries have
//            24 bits, in sm_90's own kernels (energy_prepare()) 16 (two bf16; Lf of an unweighted graph is exact). With
//            16 bits lambda_r is off by 1e-6 (rms; D = 64: 5e-7; 1e-5 at most) where x are normal numbers, and with
//            R > 1 an E_r near zero by about 2^-16 of the root of E_r mu, mu the band's largest eigenvalue. With R = 1
//            these kernels' forward pass takes the triangle (EnergyMatrix), whose rows do not cancel one by one: an E
//            near zero is off by about 2^-24 mu even where Lf is exact. The sum over r in dx is of products of numbers
//            of 11 bits (in these kernels) or 16. Forward a tau_r below 2^-124 / eps counts as that.
// Source     tauformer's published form; derivative checked by finite differences in tests/kernels/energy_test.cpp.
#pragma once
#include "kernels/contract.h"
#include "kernels/device.h"
#include "kernels/dtype.h"
#include "kernels/pending_sums.h"
#include "kernels/traffic.h"

namespace fiedler {

// The matrix in device memory as kernels of sm_90 multiply by it: see energy_prepare(). R = 1: Lf, and behind it what the
// forward pass takes, x'Lf x being x'T x by the triangle T = Lf's lower one, twice what is beside the diagonal.
struct EnergyMatrix {
    const void* data = nullptr;
    std::int32_t parts = 0;  // R = 1: of either, that are not all zero
    std::int32_t log2 = 0;   // R > 1: of the power of two that the last part is scaled by
};
template <class A>
struct FeatureLaplacian {
    std::int32_t dim = 0;
    Vec<const std::int32_t> offsets, columns;
    Vec<const A> values;
    Mat<const A> eigenvectors;
    Vec<const A> eigenvalues;
    EnergyMatrix of_one = {}, of_several = {};  // optional, Cuda only: for R = 1, R > 1
};

template <class T>
struct EnergyForward {
    Mat<acc_t<T>> a, b = {};  // b: optional
    Mat<const T> x;
    FeatureLaplacian<acc_t<T>> lap;
    Vec<const acc_t<T>> log_tau, log_temp;
    std::int32_t heads = 1, scalars = 1;
    acc_t<T> eps = acc_t<T>(1e-6);
    bool raw = false;
};

template <class T>
struct EnergyBackward {
    Mat<T> dx;
    Vec<acc_t<T>> dlog_tau, dlog_temp;  // each optional
    Mat<const acc_t<T>> da, db = {};    // db: optional
    Mat<const T> x;
    FeatureLaplacian<acc_t<T>> lap;
    Vec<const acc_t<T>> log_tau, log_temp;
    std::int32_t heads = 1, scalars = 1;
    acc_t<T> eps = acc_t<T>(1e-6);
    Vec<acc_t<T>> scratch;  // Cuda only
    // Cuda only: if given, sums over blocks lie there until finish_sums(), and scratch is not used.
    PendingSums<acc_t<T>>* pending = nullptr;
};

// Heads of all sides.
template <class T>
std::int64_t energy_columns(const EnergyForward<T>& p) {
    return std::int64_t(p.b ? 2 : 1) * p.heads;
}
template <class T>
std::int64_t energy_columns(const EnergyBackward<T>& p) {
    return std::int64_t(p.db ? 2 : 1) * p.heads;
}

template <class A>
void check(const FeatureLaplacian<A>& l, std::int32_t scalars) {
    FIEDLER_REQUIRE("energy", l.dim > 0 && scalars >= 1 && scalars <= 16 && l.dim % scalars == 0);
    FIEDLER_REQUIRE("energy", scalars > 1 || (is_shape(l.offsets, l.dim + 1) && l.columns.size == l.values.size));
    FIEDLER_REQUIRE("energy", scalars == 1 || (is_shape(l.eigenvectors, l.dim, l.dim) && l.eigenvectors.ld == l.dim));
    FIEDLER_REQUIRE("energy", scalars == 1 || is_shape(l.eigenvalues, l.dim));
}
template <class T>
void check(const EnergyForward<T>& p) {
    check(p.lap, p.scalars);
    FIEDLER_REQUIRE("energy", is_shape(p.x, p.x.rows, energy_columns(p) * p.lap.dim));
    FIEDLER_REQUIRE("energy", is_shape(p.a, p.x.rows, std::int64_t(p.heads) * p.scalars));
    FIEDLER_REQUIRE("energy", !p.b || (is_shape(p.b, p.a.rows, p.a.cols) && p.b.ld == p.a.ld));
    FIEDLER_REQUIRE("energy", p.raw || (is_shape(p.log_tau, p.scalars) && is_shape(p.log_temp, p.heads)));
}
template <class T>
void check(const EnergyBackward<T>& p) {
    check(p.lap, p.scalars);
    FIEDLER_REQUIRE("energy", is_shape(p.x, p.x.rows, energy_columns(p) * p.lap.dim));
    FIEDLER_REQUIRE("energy", is_shape(p.dx, p.x.rows, p.x.cols));
    FIEDLER_REQUIRE("energy", is_shape(p.da, p.x.rows, std::int64_t(p.heads) * p.scalars));
    FIEDLER_REQUIRE("energy", !p.db || (is_shape(p.db, p.da.rows, p.da.cols) && p.db.ld == p.da.ld));
    FIEDLER_REQUIRE("energy", is_shape(p.log_tau, p.scalars) && is_shape(p.log_temp, p.heads));
    FIEDLER_REQUIRE("energy", !p.dlog_tau || p.dlog_tau.size == p.scalars);
    FIEDLER_REQUIRE("energy", !p.dlog_temp || p.dlog_temp.size == p.heads);
}

template <class A>
double energy_flops_per_vector(const FeatureLaplacian<A>& l, std::int32_t scalars) {
    const double d = l.dim;
    return (scalars == 1 ? 2.0 * double(l.values.size) : 2 * d * d) + 4 * d;
}
template <class T>
Traffic traffic(const EnergyForward<T>& p) {
    const double n = double(p.x.rows) * double(energy_columns(p));
    return {n * (p.lap.dim * sizeof(T) + p.scalars * sizeof(acc_t<T>)), n * energy_flops_per_vector(p.lap, p.scalars)};
}
template <class T>
Traffic traffic(const EnergyBackward<T>& p) {
    const double n = double(p.x.rows) * double(energy_columns(p));
    return {n * (2.0 * p.lap.dim * sizeof(T) + p.scalars * sizeof(acc_t<T>)),
            2 * n * energy_flops_per_vector(p.lap, p.scalars)};
}

// At most so many partial sums of a number, where there are fewer heads: of six groups of threads on each multiprocessor of
// an H200, with four heads each. Fixed, so that the order of the sums is fixed too.
inline constexpr std::int64_t kEnergyMultiprocessors = 132, kEnergySums = 6 * 4 * kEnergyMultiprocessors;
inline std::int64_t energy_pending_elements(std::int64_t, std::int64_t heads, std::int64_t scalars) {
    return PendingSums<float>::elements((scalars + 1) * (2 * heads < kEnergySums ? kEnergySums : 2 * heads));
}

// Bytes of an EnergyMatrix: two parts of bf16, with R > 1 (all have the same) one of f16 for the second product of dx, with
// R = 1 two of the triangle, and what the device has to say of them.
inline constexpr std::int64_t kEnergyWord = 128;
constexpr std::int64_t energy_triangle_offset(std::int64_t dim) { return 2 * 2 * dim * dim; }
constexpr std::int64_t energy_matrix_bytes(std::int64_t dim, std::int64_t scalars) {
    return (scalars > 1 ? 3 : 4) * 2 * dim * dim + kEnergyWord;
}
// Makes the matrix for R scalars in `memory` (energy_matrix_bytes(), 128-byte aligned, and kept) and notes it in lap:
// kernels of sm_90 take a Laplacian that has it, where rows of a, b, da and db are aligned to R / 4 numbers; all else is
// done by the general ones. To be made anew when lap's numbers change. Waits for the device. Elsewhere than on sm_90, or
// where D is none of theirs, nothing is made.
void energy_prepare(const Cuda&, FeatureLaplacian<float>& lap, std::int32_t scalars, Vec<std::byte> memory);
template <class A>
void energy_prepare(const Cpu&, FeatureLaplacian<A>&, std::int32_t, Vec<std::byte>) {}

template <class T>  // float, double
void energy_forward(const Cpu&, const EnergyForward<T>&);
template <class T>
void energy_backward(const Cpu&, const EnergyBackward<T>&);
void energy_forward(const Cuda&, const EnergyForward<bf16>&);
void energy_backward(const Cuda&, const EnergyBackward<bf16>&);

}  // namespace fiedler
