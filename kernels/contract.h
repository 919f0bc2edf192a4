// kernels/contract.h: what every family checks before it touches memory.
//
// A broken contract is a programming error of the caller: ContractError (a std::logic_error) names family, condition
// and values. The checks are host-side, cost nanoseconds and are always on.
#pragma once
#include <stdexcept>
#include <string>

#include "kernels/packed.h"
#include "kernels/view.h"

namespace fiedler {

struct ContractError : std::logic_error {
    using std::logic_error::logic_error;
};

[[noreturn]] inline void contract_failed(const char* family, const char* condition) {
    throw ContractError(std::string(family) + ": contract broken: " + condition);
}

// FIEDLER_REQUIRE("norm", p.x.rows == p.y.rows)
#define FIEDLER_REQUIRE(family, condition)                                  \
    do {                                                                    \
        if (!(condition)) ::fiedler::contract_failed((family), #condition); \
    } while (false)

template <class T>
bool is_shape(const Mat<T>& m, std::int64_t rows, std::int64_t cols) {
    return m.data != nullptr && m.rows == rows && m.cols == cols && m.ld >= cols;
}
template <class T>
bool is_shape(const Vec<T>& v, std::int64_t size) {
    return v.data != nullptr && v.size == size;
}
// Rows of m can be read with 16-byte accesses.
template <class T>
bool is_aligned16(const Mat<T>& m) {
    return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.ld * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
}
inline bool is_packing(const Packed& p, std::int64_t tokens) {
    if (p.tokens != tokens || p.count < 1) return false;
    if (p.length > 0) return static_cast<std::int64_t>(p.count) * p.length == tokens;
    return p.offsets != nullptr && p.begin != nullptr && p.end != nullptr;
}

}  // namespace fiedler
