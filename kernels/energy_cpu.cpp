// kernels/energy_cpu.cpp: Rayleigh-quotient scalars on the CPU (contract in energy.h).
//
// kLanes head vectors are worked on at once, transposed so that value d of all of them lies together: every product
// with a matrix entry is then one vector operation, for a sparse matrix as for a dense one, and no sum is reordered.
#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "kernels/energy.h"
#include "kernels/parallel.h"

namespace fiedler {

namespace {
constexpr int kLanes = 16;
constexpr std::int64_t kChunk = 256;  // head vectors of one unit of work: a multiple of kLanes, as in sum_over_rows

template <class A>
using Lanes = Eigen::Array<A, kLanes, 1>;
template <class A>
using Block = std::vector<Lanes<A>, Eigen::aligned_allocator<Lanes<A>>>;

// rows kRows of (matrix times in): matrix rows start at `matrix`, dim entries each.
template <int kRows, class A>
void dense_rows(const A* matrix, int dim, const Block<A>& in, Lanes<A>* out) {
    Lanes<A> sum[kRows];
    for (int q = 0; q < kRows; ++q) sum[q].setZero();
    for (int d = 0; d < dim; ++d)
        for (int q = 0; q < kRows; ++q) sum[q] += matrix[q * dim + d] * in[static_cast<std::size_t>(d)];
    for (int q = 0; q < kRows; ++q) out[q] = sum[q];
}
template <class A>
void dense_product(const A* matrix, int dim, const Block<A>& in, Block<A>& out) {
    int m = 0;
    for (; m + 4 <= dim; m += 4) dense_rows<4>(matrix + m * dim, dim, in, out.data() + m);
    for (; m < dim; ++m) dense_rows<1>(matrix + m * dim, dim, in, out.data() + m);
}
template <class A>
void sparse_product(const FeatureLaplacian<A>& l, const Block<A>& in, Block<A>& out) {
    for (int i = 0; i < l.dim; ++i) {
        Lanes<A> sum = Lanes<A>::Zero();
        for (int e = l.offsets.data[i]; e < l.offsets.data[i + 1]; ++e)
            sum += l.values.data[e] * in[static_cast<std::size_t>(l.columns.data[e])];
        out[static_cast<std::size_t>(i)] = sum;
    }
}

// kLanes head vectors, their product with Lf (R = 1) or with the eigenvectors (R > 1), and their energies.
template <class A>
struct Group {
    Block<A> x, y, energy;
    Lanes<A> inverse;  // 1 / (x'x + eps)

    Group(int dim, int scalars)
        : x(static_cast<std::size_t>(dim)),
          y(static_cast<std::size_t>(dim)),
          energy(static_cast<std::size_t>(scalars)) {}

    // Vectors [first, first + count) of x: vector n is head n % heads of token n / heads, heads those of all sides.
    // Absent lanes are zero.
    void load(const Mat<const A>& from, std::int64_t heads, std::int64_t first, int count) {
        const auto dim = static_cast<std::int64_t>(x.size());
        for (auto& row : x) row.setZero();
        for (int v = 0; v < count; ++v) {
            const A* p = from.row((first + v) / heads) + (first + v) % heads * dim;
            for (std::int64_t d = 0; d < dim; ++d) x[static_cast<std::size_t>(d)][v] = p[d];
        }
    }
    void measure(const FeatureLaplacian<A>& l, A eps) {
        const std::size_t dim = x.size(), scalars = energy.size(), band = dim / scalars;
        Lanes<A> square = Lanes<A>::Zero();
        for (const auto& row : x) square += row * row;
        inverse = (square + eps).inverse();
        if (scalars == 1) {
            sparse_product(l, x, y);
            Lanes<A> sum = Lanes<A>::Zero();
            for (std::size_t d = 0; d < dim; ++d) sum += x[d] * y[d];
            energy[0] = sum * inverse;
        } else {
            dense_product(l.eigenvectors.data, l.dim, x, y);
            for (std::size_t r = 0; r < scalars; ++r) {
                Lanes<A> sum = Lanes<A>::Zero();
                for (std::size_t m = r * band; m < (r + 1) * band; ++m) sum += l.eigenvalues.data[m] * (y[m] * y[m]);
                energy[r] = sum * inverse;
            }
        }
        // Rounding can leave a vanishing energy a little below zero. A NaN stays a NaN.
        for (auto& e : energy) e = (e < A(0)).select(A(0), e);
    }
};

template <class A>
std::vector<A> exponentials(const Vec<const A>& v, A sign) {
    std::vector<A> r;
    for (std::int64_t i = 0; i < v.size; ++i) r.push_back(std::exp(sign * v.data[i]));
    return r;
}

template <class T>
struct Backward {
    const EnergyBackward<T>& p;
    const std::int64_t columns;                    // heads of all sides
    std::vector<T> tau, inverse_temp, transposed;  // transposed: column d of the eigenvectors is row d (R > 1)

    explicit Backward(const EnergyBackward<T>& q)
        : p(q),
          columns(energy_columns(q)),
          tau(exponentials(q.log_tau, T(1))),
          inverse_temp(exponentials(q.log_temp, T(-1))) {
        if (p.scalars == 1) return;
        const int dim = p.lap.dim;
        transposed.resize(static_cast<std::size_t>(dim) * static_cast<std::size_t>(dim));
        for (int m = 0; m < dim; ++m)
            for (int d = 0; d < dim; ++d)
                transposed[static_cast<std::size_t>(d * dim + m)] = p.lap.eigenvectors.data[m * dim + d];
    }

    // g_r of every lane, and the group's share of dlog_tau (partial[0, R)) and dlog_temp (partial[R, R + heads)).
    void weigh(const Group<T>& group, std::int64_t first, int count, Block<T>& g, T* partial) const {
        for (int r = 0; r < p.scalars; ++r) {
            Lanes<T>& out = g[static_cast<std::size_t>(r)];
            out.setZero();
            for (int v = 0; v < count; ++v) {
                const std::int64_t token = (first + v) / columns, column = (first + v) % columns;
                const std::int64_t head = column % p.heads;
                const T t = tau[static_cast<std::size_t>(r)], e = group.energy[static_cast<std::size_t>(r)][v];
                const T* da = (column < p.heads ? p.da : p.db).row(token) + head * p.scalars;
                const T d = da[r] * inverse_temp[static_cast<std::size_t>(head)];
                const T inverse = 1 / (e + t), lambda = e * inverse, rest = t * inverse;  // rest = 1 - lambda
                out[v] = d * rest * inverse;
                partial[r] -= d * lambda * rest;
                partial[p.scalars + head] -= d * lambda;
            }
        }
    }
    // dx = 2 (sum_r g_r L_r x - (sum_r g_r E_r) x) / (x'x + eps), into z.
    void gradient(Group<T>& group, const Block<T>& g, Block<T>& z) const {
        const std::size_t dim = group.x.size(), scalars = g.size(), band = dim / scalars;
        Lanes<T> weighted = Lanes<T>::Zero();
        for (std::size_t r = 0; r < scalars; ++r) weighted += g[r] * group.energy[r];
        if (scalars == 1) {
            for (std::size_t d = 0; d < dim; ++d) z[d] = g[0] * group.y[d];
        } else {
            for (std::size_t m = 0; m < dim; ++m) group.y[m] *= p.lap.eigenvalues.data[m] * g[m / band];
            dense_product(transposed.data(), p.lap.dim, group.y, z);
        }
        for (std::size_t d = 0; d < dim; ++d) z[d] = 2 * group.inverse * (z[d] - weighted * group.x[d]);
    }
    void run(std::int64_t first, std::int64_t last, T* partial) const {
        const std::int64_t dim = p.lap.dim;
        Group<T> group(p.lap.dim, p.scalars);
        Block<T> g(static_cast<std::size_t>(p.scalars)), z(static_cast<std::size_t>(dim));
        for (std::int64_t n = first; n < last; n += kLanes) {
            const int count = static_cast<int>(std::min<std::int64_t>(kLanes, last - n));
            group.load(p.x, columns, n, count);
            group.measure(p.lap, p.eps);
            weigh(group, n, count, g, partial);
            gradient(group, g, z);
            for (int v = 0; v < count; ++v) {
                T* out = p.dx.row((n + v) / columns) + (n + v) % columns * dim;
                for (std::int64_t d = 0; d < dim; ++d) out[d] = z[static_cast<std::size_t>(d)][v];
            }
        }
    }
};
}  // namespace

template <class T>
void energy_forward(const Cpu& device, const EnergyForward<T>& p) {
    check(p);
    const auto tau = exponentials(p.log_tau, T(1)), inverse_temp = exponentials(p.log_temp, T(-1));
    const std::int64_t columns = energy_columns(p), vectors = p.x.rows * columns;
    parallel_for(device, (vectors + kChunk - 1) / kChunk, [&](std::int64_t chunk) {
        Group<T> group(p.lap.dim, p.scalars);
        const std::int64_t last = std::min((chunk + 1) * kChunk, vectors);
        for (std::int64_t n = chunk * kChunk; n < last; n += kLanes) {
            const int count = static_cast<int>(std::min<std::int64_t>(kLanes, last - n));
            group.load(p.x, columns, n, count);
            group.measure(p.lap, p.eps);
            for (int v = 0; v < count; ++v) {
                const std::int64_t token = (n + v) / columns, column = (n + v) % columns, head = column % p.heads;
                T* a = (column < p.heads ? p.a : p.b).row(token) + head * p.scalars;
                for (int r = 0; r < p.scalars; ++r) {
                    const T e = group.energy[static_cast<std::size_t>(r)][v];
                    a[r] = p.raw ? e
                                 : e / (e + tau[static_cast<std::size_t>(r)]) *
                                       inverse_temp[static_cast<std::size_t>(head)];
                }
            }
        }
    });
}

template <class T>
void energy_backward(const Cpu& device, const EnergyBackward<T>& p) {
    check(p);
    const Backward<T> backward(p);
    std::vector<T> total(static_cast<std::size_t>(p.scalars + p.heads), T(0));
    sum_over_rows(device, p.x.rows * backward.columns, p.scalars + p.heads, total.data(),
                  [&](std::int64_t first, std::int64_t last, T* partial) { backward.run(first, last, partial); });
    if (p.dlog_tau)
        for (int r = 0; r < p.scalars; ++r) p.dlog_tau.data[r] += total[static_cast<std::size_t>(r)];
    if (p.dlog_temp)
        for (int h = 0; h < p.heads; ++h) p.dlog_temp.data[h] += total[static_cast<std::size_t>(p.scalars + h)];
}

template void energy_forward(const Cpu&, const EnergyForward<float>&);
template void energy_forward(const Cpu&, const EnergyForward<double>&);
template void energy_backward(const Cpu&, const EnergyBackward<float>&);
template void energy_backward(const Cpu&, const EnergyBackward<double>&);

}  // namespace fiedler
