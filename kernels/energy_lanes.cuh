// kernels/energy_lanes.cuh: which scalars are a lane's in energy's kernels (see energy_kernels.cuh), and how it loads and
// stores them.
#pragma once
#include "kernels/energy_product.cuh"

namespace fiedler::energy_kernels {

using namespace energy_product;

// Whether accesses to so many neighbouring numbers in rows of m are aligned.
template <class T>
__host__ __device__ bool are_aligned(const Mat<T>& m, int n) {
    return m.ld % n == 0 && reinterpret_cast<std::uintptr_t>(m.data) % (n * sizeof(T)) == 0;
}

// R > 1: a lane has D / 4 rows of the product, which are neighbouring eigenvectors (see load_eigenvectors()): kBands whole
// bands, or its part of one that kLanes lanes share. R = 1: one "band", the whole of Lf, is everybody's.
constexpr int bands_of_lane(int scalars) { return scalars < 4 ? 1 : scalars / 4; }
template <int D, int R>
struct Bands {
    static constexpr int kBands = bands_of_lane(R), kLanes = R < 4 ? 4 / R : 1;
    static constexpr int kRows = D / 4 / kBands;  // of a lane, in a band
    __device__ static int first() { return R < 4 ? threadIdx.x % 4 / kLanes : threadIdx.x % 4 * kBands; }
    // Whether the lane speaks for its bands: each is counted once over the four lanes.
    __device__ static bool counts() { return threadIdx.x % kLanes == 0; }
    // Of tile j's rows 2t + e: which of the lane's bands they belong to.
    __device__ static constexpr int of(int j, int e) { return (2 * j + e) / kRows; }
};
// One number for each of a lane's bands, of vector g (0) and of vector g + 8 (1).
template <int D, int R>
using Scalars = float[2][Bands<D, R>::kBands];

__device__ __forceinline__ float sum_of_lanes(float x, int lanes) {  // over 1, 2 or 4 neighbouring lanes
    if (lanes >= 2) x += __shfl_xor_sync(0xffffffffu, x, 1);
    if (lanes >= 4) x += __shfl_xor_sync(0xffffffffu, x, 2);
    return x;
}
// tau of the lane's bands, and the head's inverse temperature: loaded, and only later waited for.
template <int D, int R>
struct Parameters {
    using B = Bands<D, R>;
    float tau[B::kBands] = {}, inverse_temp = 0.f;
    __device__ __forceinline__ void load(const float* log_tau, const float* log_temp) {
#pragma unroll
        for (int b = 0; b < B::kBands; ++b) tau[b] = load_now(log_tau + B::first() + b);
        inverse_temp = load_now(log_temp);
    }
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (float& x : tau) x = expf(x);
        inverse_temp = expf(-inverse_temp);
    }
};
// lambda over the temperature, or E itself (raw), of the bands from e = E size: factor e / (of_e e + of_size size), for
// tau > 1 the fraction reduced by it. So the divisor is in float's range where e and size are.
template <int D, int R>
struct Lambda {
    using B = Bands<D, R>;
    float factor[B::kBands], of_e[B::kBands], of_size[B::kBands];
    __device__ __forceinline__ Lambda(const Parameters<D, R>& p, float eps, bool raw) {
        const float least = eps > 0.f ? 4 * FLT_MIN / eps : 0.f;  // times a size a normal number, as quotient() wants
#pragma unroll
        for (int b = 0; b < B::kBands; ++b) {
            const bool reduced = p.tau[b] > 1.f;
            const float by = reduced ? 1.f / p.tau[b] : 1.f;
            factor[b] = raw ? 1.f : p.inverse_temp * by;
            of_e[b] = raw ? 0.f : by;
            of_size[b] = raw || reduced ? 1.f : p.tau[b] < least ? least : p.tau[b];  // a NaN stays one
        }
    }
    template <class P>
    __device__ __forceinline__ float of(int band, float e, float size) const {
        return P::quotient(e, fmaf(of_size[band], size, e * of_e[band])) * factor[band];
    }
};
// A row's numbers from memory or to it, as one access where rows are aligned to as many (are_aligned()).
template <int n>
__device__ __forceinline__ void load_row(float (&v)[n], const float* row, bool aligned) {
    if (n == 2 && aligned) {
        const float2 r = *reinterpret_cast<const float2*>(row);
        v[0] = r.x, v[n - 1] = r.y;
    } else if (n == 4 && aligned) {
        const float4 r = *reinterpret_cast<const float4*>(row);
        v[0] = r.x, v[n > 1 ? 1 : 0] = r.y, v[n > 2 ? 2 : 0] = r.z, v[n - 1] = r.w;
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) v[i] = row[i];
    }
}
template <int n>
__device__ __forceinline__ void store_row(float* row, const float (&v)[n], bool aligned) {
    if (n == 2 && aligned) {
        *reinterpret_cast<float2*>(row) = {v[0], v[n - 1]};
    } else if (n == 4 && aligned) {
        *reinterpret_cast<float4*>(row) = {v[0], v[n > 1 ? 1 : 0], v[n > 2 ? 2 : 0], v[n - 1]};
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) row[i] = v[i];
    }
}
__device__ __forceinline__ float root_of(float x) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// x, which is not computed anew each time.
__device__ __forceinline__ std::int64_t kept(std::int64_t x) {
    asm volatile("" : "+l"(x));
    return x;
}
__device__ __forceinline__ std::uint32_t kept(std::uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ int kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ bool kept(bool x) {
    int word = x;
    asm volatile("" : "+r"(word));
    return word != 0;
}

}  // namespace fiedler::energy_kernels
