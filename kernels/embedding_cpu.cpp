// kernels/embedding_cpu.cpp: token embedding on the CPU (see embedding.h). The gradient is split by columns, so that
// each element of the table is summed in token order by one task, however often a token occurs.
#include <algorithm>

#include "kernels/embedding.h"
#include "kernels/parallel.h"

namespace fiedler {
namespace {

void check_tokens(const Vec<const std::int32_t>& tokens, std::int64_t vocab) {
    for (std::int64_t i = 0; i < tokens.size; ++i)
        FIEDLER_REQUIRE("embedding", tokens.data[i] >= 0 && tokens.data[i] < vocab);
}

}  // namespace

template <class T>
void embedding_forward(const Cpu& dev, const EmbeddingForward<T>& p) {
    check(p);
    check_tokens(p.tokens, p.table.rows);
    parallel_for(dev, p.x.rows, [&](std::int64_t i) {
        const T* row = p.table.row(p.tokens.data[i]);
        std::copy(row, row + p.x.cols, p.x.row(i));
    });
}

template <class T>
void embedding_backward(const Cpu& dev, const EmbeddingBackward<T>& p) {
    check(p);
    check_tokens(p.tokens, p.dtable.rows);
    constexpr std::int64_t kColumns = 32;
    const std::int64_t channels = p.dx.cols;
    parallel_for(dev, (channels + kColumns - 1) / kColumns, [&](std::int64_t task) {
        const std::int64_t first = task * kColumns, count = std::min(kColumns, channels - first);
        for (std::int64_t i = 0; i < p.dx.rows; ++i) {
            acc_t<T>* __restrict__ sum = p.dtable.row(p.tokens.data[i]) + first;
            const T* __restrict__ dx = p.dx.row(i) + first;
            for (std::int64_t c = 0; c < count; ++c) sum[c] += dx[c];
        }
    });
}

template void embedding_forward(const Cpu&, const EmbeddingForward<float>&);
template void embedding_forward(const Cpu&, const EmbeddingForward<double>&);
template void embedding_backward(const Cpu&, const EmbeddingBackward<float>&);
template void embedding_backward(const Cpu&, const EmbeddingBackward<double>&);

}  // namespace fiedler
