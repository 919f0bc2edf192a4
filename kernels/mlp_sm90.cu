// kernels/mlp_sm90.cu: the products of mlp.h with their epilogues, on sm_90a: two epilogues of panel_sm90.cuh. Backward,
// the panel has to be turned, since W2 runs along its columns.
#include "kernels/mlp_sm90.h"

#include "kernels/panel_sm90.cuh"

namespace fiedler {
namespace {

using namespace panel;
using L = Layout<bf16>;

struct MlpProblem : Panels {
    const nv_bf16* w;  // backward: W2
    const nv_bf16* h;  // backward
    nv_bf16* out;      // h or du
    std::int64_t ld_w, ld_h, ld_out;
};

// Backward: the panel of W2, turned. A thread takes four columns of eight rows at a time: 16 bytes of each column.
template <int N>
__device__ void turn_panel(const MlpProblem& p, const Share& share, unsigned char* panel) {
    constexpr int kBatch = 3, kQuads = N / 4;
    const int items = p.chunks * (L::kDepth / 8) * kQuads;
    for (int first = threadIdx.x; first < items; first += kBatch * Layout<bf16>::kConsumers) {
        uint2 in[kBatch][8];
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
            const int item = first + s * Layout<bf16>::kConsumers, row = item / kQuads * 8, column = item % kQuads * 4;
            const bool valid = item < items && share.column + column < p.m;
#pragma unroll
            for (int k = 0; k < 8; ++k)
                in[s][k] = valid ? *reinterpret_cast<const uint2*>(p.w + (row + k) * p.ld_w + share.column + column)
                                 : uint2{0, 0};
        }
#pragma unroll
        for (int s = 0; s < kBatch; ++s) {
            const int item = first + s * Layout<bf16>::kConsumers, octet = item / kQuads, column = item % kQuads * 4;
            if (item >= items) break;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                std::uint32_t word[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const uint2 &lo = in[s][2 * k], &hi = in[s][2 * k + 1];
                    word[k] = __byte_perm(c < 2 ? lo.x : lo.y, c < 2 ? hi.x : hi.y, c % 2 ? 0x7632 : 0x5410);
                }
                const int row = L::place_of(column + c), piece = octet % 8 ^ row % 8;
                *reinterpret_cast<uint4*>(panel + (octet / 8 * N + row) * kSwizzleBytes + piece * 16) =
                    uint4{word[0], word[1], word[2], word[3]};
            }
        }
    }
}

// max(x, 0), but a NaN stays a NaN.
__device__ float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float square_root(float x) {  // 1 ulp; subnormals count as 0
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float low(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ float high(std::uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Eight consecutive elements of h. Volatile: where it stands, before the product that its way is hidden behind.
__device__ uint4 read_once(const nv_bf16* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

// k: which of the two rows; j: which 32 columns.
template <int N, bool kBackward>
struct MlpEpilogue {
    using Element = bf16;
    using Problem = MlpProblem;
    static constexpr bool kMakesPanel = kBackward;
    static constexpr int kTileBytes = 0, kCommonBytes = 0;
    uint4 h[kBackward ? 2 : 1][kBackward ? N / L::kRun : 1];

    __device__ static void panel(const MlpProblem& p, const Share& share, unsigned char* panel) {
        turn_panel<N>(p, share, panel);
    }
    __device__ void fetch(const MlpProblem& p, const Place<bf16>& place) {
        if constexpr (kBackward)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const nv_bf16* const from = place.start(p.h, p.ld_h, k);
#pragma unroll
                for (int j = 0; j < N / L::kRun; ++j)
                    h[k][j] = place.inside(k, j) ? read_once(from + L::kRun * j) : uint4{0, 0, 0, 0};
            }
    }
    __device__ static std::uint32_t activation(float a, float b) {
        a = relu(a), b = relu(b);
        return pack_bf16(a * a, b * b);
    }
    __device__ static std::uint32_t gradient(float a, float b, std::uint32_t pair) {
        return pack_bf16(a * (2.f * square_root(low(pair))), b * (2.f * square_root(high(pair))));
    }
    // A thread's eight columns.
    __device__ uint4 eight(const float (&sum)[N / 2], int k, int j) const {
        const auto pair = [&](int q, std::uint32_t gate) {
            const float a = sum[L::sum_at(k, j, q)], b = sum[L::sum_at(k, j, q) + 1];
            return kBackward ? gradient(a, b, gate) : activation(a, b);
        };
        if constexpr (kBackward)
            return {pair(0, h[k][j].x), pair(1, h[k][j].y), pair(2, h[k][j].z), pair(3, h[k][j].w)};
        else
            return {pair(0, 0), pair(1, 0), pair(2, 0), pair(3, 0)};
    }
    __device__ void store(const MlpProblem& p, const Place<bf16>& place, const float (&sum)[N / 2]) const {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            nv_bf16* const to = place.start(p.out, p.ld_out, k);
#pragma unroll
            for (int j = 0; j < N / L::kRun; ++j) {
                const uint4 value = eight(sum, k, j);
                if (place.inside(k, j)) *reinterpret_cast<uint4*>(to + L::kRun * j) = value;
            }
        }
    }
};
template <int N>
using Activation = MlpEpilogue<N, false>;
template <int N>
using Gradient = MlpEpilogue<N, true>;

MlpProblem problem_of(const Mat<bf16>& out) {
    MlpProblem p{};
    p.out = nv(out.data), p.ld_out = out.ld;
    return p;
}

}  // namespace

bool mlp_sm90_takes(const Cuda& dev, const MlpForward<bf16>& p) { return takes(dev, p.x, p.h.cols); }
bool mlp_sm90_takes(const Cuda& dev, const MlpBackward<bf16>& p) { return takes(dev, p.dy, p.du.cols); }

void mlp_sm90(const Cuda& dev, const MlpForward<bf16>& p) {
    MlpProblem problem = problem_of(p.h);
    launch<Activation>(dev, problem, p.x, p.h.cols, &p.w);
}
void mlp_sm90(const Cuda& dev, const MlpBackward<bf16>& p) {
    MlpProblem problem = problem_of(p.du);
    problem.w = nv(p.w.data), problem.ld_w = p.w.ld;
    problem.h = nv(p.h.data), problem.ld_h = p.h.ld;
    launch<Gradient>(dev, problem, p.dy, p.du.cols, nullptr);
}

}  // namespace fiedler
