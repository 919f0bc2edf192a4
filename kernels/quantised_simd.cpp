// kernels/quantised_simd.cpp: products with quantised matrices (contract in quantised.h), one source for every
// instruction set: Highway compiles it once for each and chooses at run time. Only the dot product of four bytes differs:
// VNNI and NEON have an instruction for it, the others multiply pairs of 16-bit numbers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/parallel.h"
#include "kernels/quantised.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/quantised_simd.cpp"
#define HWY_WANT_AVX3_DL
#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace fiedler::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

using DI = hn::CappedTag<std::int32_t, 16>;
using DF = hn::CappedTag<float, 16>;
using DB = hn::Repartition<std::uint8_t, DI>;
using VI = hn::Vec<DI>;
using VF = hn::Vec<DF>;
using VB = hn::Vec<DB>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(DI()));
constexpr int kParts = 16 / kLanes;  // vectors of one line: 16 rows, 4 columns each

#if HWY_TARGET == HWY_NEON && defined(__ARM_FEATURE_DOTPROD)
constexpr bool kSignedBytes = true;  // the instruction takes signed bytes: 8-bit codes turn into values first
HWY_INLINE VI dot4(VI sum, VB w, VI x) {
    return VI(vdotq_s32(sum.raw, vreinterpretq_s8_u8(w.raw), vreinterpretq_s8_s32(x.raw)));
}
#elif HWY_TARGET == HWY_AVX3_DL
constexpr bool kSignedBytes = false;
// By hand: Highway 1.0.3 asks the machine for VNNI before it takes this target, but does not tell the compiler.
HWY_INLINE VI dot4(VI sum, VB w, VI x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(w.raw), "v"(x.raw));
    return sum;
}
#else
constexpr bool kSignedBytes = false;
using DS = hn::Repartition<std::int16_t, DI>;
using VS = hn::Vec<DS>;
// a0 b0 + a1 b1 of each pair of 16-bit numbers.
HWY_INLINE VI dot2(VS a, VS b) {
#if HWY_TARGET == HWY_AVX3
    return VI{_mm512_madd_epi16(a.raw, b.raw)};
#elif HWY_TARGET == HWY_AVX2
    return VI{_mm256_madd_epi16(a.raw, b.raw)};
#elif HWY_ARCH_X86 && HWY_TARGET != HWY_EMU128
    return VI{_mm_madd_epi16(a.raw, b.raw)};
#elif HWY_TARGET == HWY_NEON
    return VI(vpaddq_s32(vmull_s16(vget_low_s16(a.raw), vget_low_s16(b.raw)), vmull_high_s16(a.raw, b.raw)));
#else
    const DI d;
    const VI x = hn::BitCast(d, a), y = hn::BitCast(d, b);
    const VI low = hn::Mul(hn::ShiftRight<16>(hn::ShiftLeft<16>(x)), hn::ShiftRight<16>(hn::ShiftLeft<16>(y)));
    return hn::Add(low, hn::Mul(hn::ShiftRight<16>(x), hn::ShiftRight<16>(y)));
#endif
}
HWY_INLINE VI dot4(VI sum, VB w, VI x) {
    const DS d;
    const hn::Repartition<std::uint16_t, DI> du;
    const auto codes = hn::BitCast(du, w);
    const VS even = hn::BitCast(d, hn::And(codes, hn::Set(du, 0xff))), odd = hn::BitCast(d, hn::ShiftRight<8>(codes));
    const VS x16 = hn::BitCast(d, x);
    return hn::Add(sum,
                   hn::Add(dot2(even, hn::ShiftRight<8>(hn::ShiftLeft<8>(x16))), dot2(odd, hn::ShiftRight<8>(x16))));
}
#endif

// Line q of a group: codes of columns 4 q to 4 q + 3 of the rows that part p holds.
template <Quant kind>
HWY_INLINE VB line_of(const std::uint8_t* group, int q, int p) {
    const DB d;
    if constexpr (kind == Quant::int8) {
        const VB codes = hn::Load(d, group + q * 64 + p * 4 * kLanes);
        return kSignedBytes ? hn::Xor(codes, hn::Set(d, 0x80)) : codes;
    }
    const VB both = hn::Load(d, group + q / 2 * 64 + p * 4 * kLanes);
    if (q % 2 == 0) return hn::And(both, hn::Set(d, 0x0f));
    // No shift of bytes: one of 16-bit numbers, and what came from the neighbour taken away.
    const hn::Repartition<std::uint16_t, DI> wide;
    return hn::And(hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(wide, both))), hn::Set(d, 0x0f));
}

// Sixteen rows times kTokens tokens from `first` on.
template <Quant kind, int kTokens>
HWY_INLINE void tile(const QuantMatmul& p, std::int64_t block, std::int64_t first) {
    const DI di;
    const DF df;
    const hn::Rebind<hwy::float16_t, DF> dh;
    const QuantTokens& x = *p.x;
    const std::int64_t groups = x.groups;
    const std::byte* at = p.w.block(block);
    const auto* scales = reinterpret_cast<const hwy::float16_t*>(at);
    const auto* codes = reinterpret_cast<const std::uint8_t*>(at + p.w.shape.scale_bytes());
    const std::int64_t group_bytes = p.w.shape.group_bytes();
    const bool starts_at_zero = kSignedBytes && kind == Quant::int8;
    const std::int32_t bias = starts_at_zero ? 0 : p.w.shape.bias();
    VF sum[kTokens][kParts];
    for (int m = 0; m < kTokens; ++m)
        for (int part = 0; part < kParts; ++part) sum[m][part] = hn::Zero(df);
    for (std::int64_t g = 0; g < groups; ++g, codes += group_bytes, scales += 16) {
        for (int m = 0; m < kTokens; ++m) {
            const std::int64_t i = (first + m) * groups + g;
            const std::int8_t* z = x.value.data() + i * 32;
            VI dot[kParts];
            for (int part = 0; part < kParts; ++part)
                dot[part] = hn::Set(di, -bias * x.sum[static_cast<std::size_t>(i)]);
            for (int q = 0; q < 8; ++q) {
                std::int32_t four;
                std::memcpy(&four, z + 4 * q, 4);
                const VI broadcast = hn::Set(di, four);
                for (int part = 0; part < kParts; ++part)
                    dot[part] = dot4(dot[part], line_of<kind>(codes, q, part), broadcast);
            }
            const VF t = hn::Set(df, x.scale[static_cast<std::size_t>(i)]);
            for (int part = 0; part < kParts; ++part) {
                const VF s = hn::PromoteTo(df, hn::Load(dh, scales + part * kLanes));
                sum[m][part] = hn::MulAdd(hn::ConvertTo(df, dot[part]), hn::Mul(s, t), sum[m][part]);
            }
        }
    }
    const std::int64_t row = block * 16, count = std::min<std::int64_t>(16, p.w.shape.rows - row);
    for (int m = 0; m < kTokens; ++m) {
        HWY_ALIGN float out[16];
        for (int part = 0; part < kParts; ++part) hn::Store(sum[m][part], df, out + part * kLanes);
        if (p.residual) {
            const float* residual = p.residual.row(first + m) + row;
            for (std::int64_t r = 0; r < count; ++r) out[r] += residual[r];
        }
        if (p.relu_squared)
            for (float& v : out) v = v < 0 ? 0.f : v * v;
        std::memcpy(p.y.row(first + m) + row, out, static_cast<std::size_t>(count) * sizeof(float));
    }
}

template <Quant kind>
void blocks_of(const QuantMatmul& p, std::int64_t begin, std::int64_t end) {
    constexpr int kMost = kParts == 1 ? 8 : 4;  // tokens at once: as many sums as there are registers for
    const std::int64_t tokens = p.x->tokens;
    for (std::int64_t block = begin; block < end; ++block) {
        std::int64_t m = 0;
        for (; m + kMost <= tokens; m += kMost) tile<kind, kMost>(p, block, m);
        for (; m + 2 <= tokens; m += 2) tile<kind, 2>(p, block, m);
        for (; m < tokens; ++m) tile<kind, 1>(p, block, m);
    }
}
void matmul_blocks(const QuantMatmul& p, std::int64_t begin, std::int64_t end) {
    p.w.shape.kind == Quant::int8 ? blocks_of<Quant::int8>(p, begin, end) : blocks_of<Quant::int4>(p, begin, end);
}

// One group of 32: its scale and the sum of its values.
void quantise_row(const float* x, std::int64_t cols, std::int8_t* value, float* scale, std::int32_t* sum) {
    const DF df;
    const DI di;
    const hn::Rebind<std::int8_t, DI> d8;
    for (std::int64_t k = 0; k < cols; k += 32, value += 32, ++scale, ++sum) {
        HWY_ALIGN float rest[32];
        const float* from = x + k;
        if (cols - k < 32) {
            std::fill(rest, rest + 32, 0.f);
            std::copy(from, x + cols, rest);
            from = rest;
        }
        VF most = hn::Zero(df), zero = hn::Zero(df);  // zero: 0 x, summed; a NaN where an x is not finite
        for (int i = 0; i < 32; i += kLanes) {
            const VF v = hn::LoadU(df, from + i);
            most = hn::Max(most, hn::Abs(v));
            zero = hn::MulAdd(v, hn::Zero(df), zero);
        }
        if (!(hn::GetLane(hn::SumOfLanes(df, zero)) == 0)) {
            std::fill(value, value + 32, std::int8_t{0});
            *scale = std::numeric_limits<float>::quiet_NaN();
            *sum = 0;
            continue;
        }
        const float largest = hn::GetLane(hn::MaxOfLanes(df, most));
        const VF inverse = hn::Set(df, largest > 0 ? 127 / largest : 0.f);
        VI total = hn::Zero(di);
        for (int i = 0; i < 32; i += kLanes) {
            const VI z = hn::NearestInt(hn::Mul(hn::LoadU(df, from + i), inverse));
            total = hn::Add(total, z);
            hn::StoreU(hn::DemoteTo(d8, z), d8, value + i);
        }
        *scale = largest / 127;
        *sum = hn::GetLane(hn::SumOfLanes(di, total));
    }
}

}  // namespace
}  // namespace fiedler::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace fiedler {

HWY_EXPORT(matmul_blocks);
HWY_EXPORT(quantise_row);

void quantised_matmul(const Cpu& dev, const QuantMatmul& p) {
    check(p);
    // A piece is worth a thread from some 64 thousand multiplications on; 8 pieces a thread even out the rest.
    const std::int64_t blocks = p.w.shape.blocks(), work = std::max<std::int64_t>(1, p.x->tokens * p.x->cols * 16);
    const std::int64_t piece = std::max<std::int64_t>((65536 + work - 1) / work, blocks / (8 * thread_count(dev)));
    const std::int64_t pieces = (blocks + piece - 1) / std::max<std::int64_t>(piece, 1);
    parallel_for(dev, pieces, [&](std::int64_t i) {
        HWY_DYNAMIC_DISPATCH(matmul_blocks)(p, i * piece, std::min(blocks, (i + 1) * piece));
    });
}

void quantise_tokens(const Cpu& dev, const Mat<const float>& x, QuantTokens& out) {
    out.resize(x.rows, x.cols);
    parallel_for(x.rows > 4 ? dev : Cpu{1}, x.rows, [&](std::int64_t m) {
        const std::int64_t i = m * out.groups;
        HWY_DYNAMIC_DISPATCH(quantise_row)
        (x.row(m), x.cols, out.value.data() + i * 32, out.scale.data() + i, out.sum.data() + i);
    });
}

#if HWY_TARGETS == HWY_STATIC_TARGET  // nothing to choose among, and no library needed
std::vector<const char*> quantised_targets() { return {hwy::TargetName(HWY_STATIC_TARGET)}; }
bool choose_quantised_target(const char* name) {
    return !*name || std::strcmp(name, hwy::TargetName(HWY_STATIC_TARGET)) == 0;
}
#else
std::vector<const char*> quantised_targets() {
    std::vector<const char*> names;
    const std::int64_t all = hwy::SupportedTargets() & HWY_TARGETS;
    for (std::int64_t left = all; left != 0; left &= left - 1) names.push_back(hwy::TargetName(left & -left));
    return names;
}
bool choose_quantised_target(const char* name) {
    hwy::SetSupportedTargetsForTest(0);
    for (std::int64_t left = hwy::SupportedTargets() & HWY_TARGETS; *name && left != 0; left &= left - 1) {
        const std::int64_t target = left & -left;
        if (std::strcmp(hwy::TargetName(target), name) != 0) continue;
        hwy::SetSupportedTargetsForTest(target);
        hwy::GetChosenTarget().Update(target);
        return true;
    }
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    return !*name;
}
#endif

}  // namespace fiedler
#endif  // HWY_ONCE
