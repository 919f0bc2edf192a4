// kernels/head_width.cuh: from the width of a head, known when the program runs, to the kernel that was compiled for it.
#pragma once
#include <type_traits>

#include "kernels/contract.h"

namespace fiedler {

// body(std::integral_constant<int, D>) for the widths that there are kernels for; ContractError of the family for others.
template <class Body>
void for_head_width(const char* family, std::int64_t width, Body&& body) {
    switch (width) {
        case 16:
            return body(std::integral_constant<int, 16>{});
        case 32:
            return body(std::integral_constant<int, 32>{});
        case 64:
            return body(std::integral_constant<int, 64>{});
        case 128:
            return body(std::integral_constant<int, 128>{});
        default:
            contract_failed(family, "the width of a head is 16, 32, 64 or 128");
    }
}

}  // namespace fiedler
