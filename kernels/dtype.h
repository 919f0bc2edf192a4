// kernels/dtype.h: storage types without CUDA headers, so that contract headers compile with a C++ compiler alone.
//
//   bf16       16-bit brain float: the upper half of an IEEE f32. Storage only: arithmetic is done in acc_t<bf16>, f32.
//   acc_t<T>   the type in which values stored as T are accumulated: float for bf16 and float, double for double.
#pragma once
#include <bit>
#include <cstdint>

namespace fiedler {

struct bf16 {
    std::uint16_t bits = 0;
    bf16() = default;
    explicit bf16(float f) : bits(round(f)) {}
    explicit operator float() const { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

  private:
    // Round to nearest even, as the hardware does; a NaN stays a (quiet) NaN instead of rounding to infinity.
    static std::uint16_t round(float f) {
        const auto u = std::bit_cast<std::uint32_t>(f);
        if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
        return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
};
static_assert(sizeof(bf16) == 2);

template <class T>
struct Accumulator {
    using type = T;
};
template <>
struct Accumulator<bf16> {
    using type = float;
};
template <class T>
using acc_t = typename Accumulator<T>::type;

}  // namespace fiedler
