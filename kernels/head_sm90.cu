// kernels/head_sm90.cu: the product of the vocabulary head with exponentials and their sums as its epilogue
// (panel_sm90.cuh). A tile's product takes three times as long as its exponentials, which run beside the other tile's.
#include "kernels/head_sm90.h"

#include "kernels/panel_sm90.cuh"

namespace fiedler {
namespace {

using namespace panel;

using L = Layout<bf16>;

struct HeadProblem : Panels {
    nv_bf16* e;
    std::int64_t ld_e;
    float* sums;
    std::int64_t ld_sums;
    const float* base;
    const std::int32_t* targets;
};

// k: which of the two rows; j: which 32 columns.
template <int N, bool kStores>
struct HeadEpilogue {
    using Element = bf16;
    using Problem = HeadProblem;
    static constexpr bool kMakesPanel = false;
    static constexpr int kTileBytes = 0, kCommonBytes = 0;
    float base[2];
    int target[2];

    __device__ void fetch(const HeadProblem& p, const Place<bf16>& place) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const bool inside = place.row_inside(k);
            base[k] = inside ? p.base[place.row(k)] : INFINITY;
            target[k] = inside ? p.targets[place.row(k)] : -1;
        }
    }
    // -inf in the place of the target's logit, if it is one of the thread's: `at` is relative to its first column.
    __device__ static void hide_target(float (&sum)[N / 2], int k, int at) {
        if (at < 0 || at >= N) return;
#pragma unroll
        for (int j = 0; j < N / L::kRun; ++j)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (at == L::kRun * j + i) sum[L::sum_at(k, j, i / 2) + i % 2] = -INFINITY;
    }
    __device__ void store(const HeadProblem& p, const Place<bf16>& place, float (&sum)[N / 2]) const {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            hide_target(sum, k, target[k] - place.column);
            const float shift = base[k] * kLog2e;
            nv_bf16* const to = kStores ? place.start(p.e, p.ld_e, k) : nullptr;
            float total = 0;
#pragma unroll
            for (int j = 0; j < N / L::kRun; ++j) {
                std::uint32_t word[4];
                float of_eight = 0;
#pragma unroll
                for (int q = 0; q < 4; ++q) {
                    const float a = exp2_fast(fmaf(sum[L::sum_at(k, j, q)], kLog2e, -shift));
                    const float b = exp2_fast(fmaf(sum[L::sum_at(k, j, q) + 1], kLog2e, -shift));
                    of_eight += a + b;
                    word[q] = pack_bf16(a, b);
                }
                if (place.column + L::kRun * j < p.m) total += of_eight;
                if (kStores && place.inside(k, j))
                    *reinterpret_cast<uint4*>(to + L::kRun * j) = uint4{word[0], word[1], word[2], word[3]};
            }
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            if (threadIdx.x % 4 == 0 && place.row_inside(k))
                p.sums[(place.column / N) * p.ld_sums + place.row(k)] = total;
        }
    }
};
template <int N>
using Stored = HeadEpilogue<N, true>;
template <int N>
using Summed = HeadEpilogue<N, false>;

}  // namespace

bool head_sm90_takes(const Cuda& dev, const Head<bf16>& p) { return takes(dev, p.x, p.w.rows); }

void head_exponentials(const Cuda& dev, const HeadExponentials& p) {
    HeadProblem problem{};
    problem.e = nv(p.e.data), problem.ld_e = p.e.ld;
    problem.sums = p.sums.data, problem.ld_sums = p.sums.ld;
    problem.base = p.base.data, problem.targets = p.targets.data;
    if (p.e)
        launch<Stored>(dev, problem, p.x, p.w.rows, &p.w);
    else
        launch<Summed>(dev, problem, p.x, p.w.rows, &p.w);
}

}  // namespace fiedler
