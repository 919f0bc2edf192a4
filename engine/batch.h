// engine/batch.h: a micro-batch of tokens on the host: rows of `length` tokens and, for each token, the next one.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/packed.h"

namespace fiedler {

struct Batch {
    std::int64_t rows = 0, length = 0;
    std::int64_t real_rows = 0;         // rows past the last window are padding: targets -1 (ignored by the loss)
    std::vector<std::int32_t> inputs;   // [rows * length]
    std::vector<std::int32_t> targets;  // [rows * length], the next token; empty when no loss is asked for
    // With document masking (kernels/packed.h): a sequence starts at every row and after every separator.
    std::vector<std::int32_t> offsets, begin, end;
    Packed packed() const;  // host pointers into the vectors above; uniform when there are no offsets
};

}  // namespace fiedler
