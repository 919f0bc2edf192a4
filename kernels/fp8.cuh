// kernels/fp8.cuh: four floats to the 8-bit floats of fp8.h and back, to the nearest and half-way cases to even; as bytes
// of a word, the first the lowest. Beyond what there is, the largest that there is; NaN stays NaN. sm_89 and later.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fiedler {

#define FIEDLER_PACK(name)   \
    "{\n.reg .b16 lo, hi;\n" \
    "cvt.rn.satfinite." name \
    "x2.f32 lo, %2, %1;\n"   \
    "cvt.rn.satfinite." name \
    "x2.f32 hi, %4, %3;\n"   \
    "mov.b32 %0, {lo, hi};\n}"
__device__ inline std::uint32_t pack_e4m3(float a, float b, float c, float d) {
    std::uint32_t y;
    asm(FIEDLER_PACK("e4m3") : "=r"(y) : "f"(a), "f"(b), "f"(c), "f"(d));
    return y;
}
__device__ inline std::uint32_t pack_e5m2(float a, float b, float c, float d) {
    std::uint32_t y;
    asm(FIEDLER_PACK("e5m2") : "=r"(y) : "f"(a), "f"(b), "f"(c), "f"(d));
    return y;
}
#undef FIEDLER_PACK

// Four numbers of e4m3, exactly.
__device__ inline float4 unpack_e4m3(std::uint32_t x) {
    float4 y;
    asm("{\n.reg .b16 lo, hi, a, b, c, d;\n.reg .b32 ab, cd;\n"
        "mov.b32 {lo, hi}, %4;\n"
        "cvt.rn.f16x2.e4m3x2 ab, lo;\n"
        "cvt.rn.f16x2.e4m3x2 cd, hi;\n"
        "mov.b32 {a, b}, ab;\n"
        "mov.b32 {c, d}, cd;\n"
        "cvt.f32.f16 %0, a;\n"
        "cvt.f32.f16 %1, b;\n"
        "cvt.f32.f16 %2, c;\n"
        "cvt.f32.f16 %3, d;\n}"
        : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w)
        : "r"(x));
    return y;
}

}  // namespace fiedler
