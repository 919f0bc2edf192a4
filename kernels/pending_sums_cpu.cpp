#include "kernels/pending_sums.h"

namespace fiedler {

template <class A>
void finish_sums(const Cpu&, PendingSums<A>& p) {
    for (const PendingSum<A>& s : p.sums())
        for (std::int64_t c = 0; c < s.columns; ++c) {
            A sum = 0;
            for (std::int64_t r = 0; r < s.rows; ++r) sum += s.partial[r * s.row_step + c * s.column_step];
            s.to[c] += sum;
        }
    p.clear();
}
template void finish_sums(const Cpu&, PendingSums<float>&);
template void finish_sums(const Cpu&, PendingSums<double>&);

}  // namespace fiedler
