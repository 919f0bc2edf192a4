// kernels/gate_cpu.cpp: the forget gate on the CPU (see gate.h). The elementwise part runs over all tokens, vectorised;
// the cumulative sums run per sequence in double, so that long sequences keep their precision.
#include <algorithm>
#include <vector>

#include "kernels/gate.h"
#include "kernels/parallel.h"
#include "kernels/vector_math.h"

namespace fiedler {
namespace {

// body(chunk of u = z + bias, first, count) over all elements, numbered row by row.
template <class A, class Body>
void for_chunks(const Cpu& dev, const Mat<const A>& z, const Vec<const A>& bias, Body&& body) {
    const std::int64_t heads = z.cols, n = z.rows * heads;
    parallel_for(dev, (n + kChunk - 1) / kChunk, [&](std::int64_t c) {
        const std::int64_t first = c * kChunk, count = std::min<std::int64_t>(kChunk, n - first);
        Chunk<A> u = Chunk<A>::Zero();
        std::int64_t i = first / heads, h = first % heads;
        for (std::int64_t k = 0; k < count; ++k) {
            u[k] = z.row(i)[h] + bias.data[h];
            if (++h == heads) h = 0, ++i;
        }
        body(u, first, count);
    });
}

// F_i = F_i + F_{i-1} within each sequence, or from its end when `backward`. carry (or null): see gate.h.
template <class A, class B>
void cumulative_sums(const Cpu& dev, const Packed& seq, Mat<A> out, const Mat<const B>& in, bool backward, A* carry) {
    const std::int64_t heads = out.cols;
    parallel_for(dev, seq.count, [&](std::int64_t s) {
        const std::int64_t begin = seq.sequence_begin(std::int32_t(s)), end = seq.sequence_end(std::int32_t(s));
        std::vector<double> sums(static_cast<std::size_t>(heads), 0.0);
        if (carry) std::copy(carry, carry + heads, sums.begin());
        for (std::int64_t step = 0; step < end - begin; ++step) {
            const std::int64_t i = backward ? end - 1 - step : begin + step;
            for (std::int64_t h = 0; h < heads; ++h) {
                double& sum = sums[static_cast<std::size_t>(h)];
                sum += double(in.row(i)[h]);
                out.row(i)[h] = A(sum);
            }
        }
        if (carry) std::copy(sums.begin(), sums.end(), carry);
    });
}

}  // namespace

template <class A>
void gate_forward(const Cpu& dev, const GateForward<A>& p) {
    check(p);
    const std::int64_t heads = p.z.cols;
    for_chunks<A>(dev, p.z, p.bias, [&](const Chunk<A>& u, std::int64_t first, std::int64_t count) {
        const Chunk<A> f = (u < A(0)).select(u, Chunk<A>::Zero()) - (-u.abs()).exp().log1p();
        for (std::int64_t k = 0; k < count; ++k) p.F.row((first + k) / heads)[(first + k) % heads] = f[k];
    });
    cumulative_sums<A, A>(dev, p.seq, p.F, p.F, false, p.carry.data);
}

template <class T>
void gate_backward(const Cpu& dev, const GateBackward<T>& p) {
    check(p);
    using A = acc_t<T>;
    const std::int64_t heads = p.z.cols;
    cumulative_sums<T, A>(dev, p.seq, p.dz, p.dF, true, nullptr);
    for_chunks<A>(dev, p.z, p.bias, [&](const Chunk<A>& u, std::int64_t first, std::int64_t count) {
        const Chunk<A> sigmoid = A(1) / (A(1) + u.exp());  // of -u
        for (std::int64_t k = 0; k < count; ++k) p.dz.row((first + k) / heads)[(first + k) % heads] *= sigmoid[k];
    });
    sum_over_rows(dev, p.z.rows, heads, p.dbias.data, [&](std::int64_t first, std::int64_t last, A* partial) {
        for (std::int64_t i = first; i < last; ++i)
            for (std::int64_t h = 0; h < heads; ++h) partial[h] += p.dz.row(i)[h];
    });
}

template void gate_forward(const Cpu&, const GateForward<float>&);
template void gate_forward(const Cpu&, const GateForward<double>&);
template void gate_backward(const Cpu&, const GateBackward<float>&);
template void gate_backward(const Cpu&, const GateBackward<double>&);

}  // namespace fiedler
