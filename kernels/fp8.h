// kernels/fp8.h: 8-bit floats as storage, without CUDA headers. Only kernels for sm_90a and cuBLASLt compute with them.
//
//   e4m3   4 bits of exponent, 3 of mantissa: normal from 2^-6 to 448, spaced 2^-9 below; NaN, no infinity
//   e5m2   5 bits of exponent, 2 of mantissa: normal from 2^-14 to 57,344, spaced 2^-16 below; NaN, infinity
#pragma once
#include <cstdint>

namespace fiedler {

struct e4m3 {
    std::uint8_t bits = 0;
};
struct e5m2 {
    std::uint8_t bits = 0;
};
static_assert(sizeof(e4m3) == 1 && sizeof(e5m2) == 1);

}  // namespace fiedler
