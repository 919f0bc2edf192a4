// Names: direction tokens x sides x heads x D, R; "dense": a Laplacian with every entry and values that bf16 does not
// hold.
#include "kernels/energy.h"

#include "tests/bench/harness.h"
#include "tests/support/path_graph.h"

namespace fiedler::bench {
namespace {

template <class T, class U>
Vec<const T> upload(Suite& s, const std::vector<U>& v) {
    const std::vector<T> host(v.begin(), v.end());
    const auto n = static_cast<std::int64_t>(host.size());
    T* p = s.zeros<T>(n);
    copy_to_device(s.device, p, host.data(), host.size() * sizeof(T));
    return {p, n};
}

FeatureLaplacian<Accum> laplacian(Suite& s, int dim, int scalars, bool dense) {
    test::PathGraph path(dim);
    if (dense) {
        path.offsets = {0}, path.columns.clear(), path.values.clear();
        for (int i = 0; i < dim; ++i) {
            for (int j = 0; j < dim; ++j)
                path.columns.push_back(j), path.values.push_back(i == j ? 0.1 * (dim - 1) : -0.1);
            path.offsets.push_back(static_cast<std::int32_t>(path.columns.size()));
        }
    }
    FeatureLaplacian<Accum> l;
    l.dim = dim;
    l.offsets = upload<std::int32_t>(s, path.offsets);
    l.columns = upload<std::int32_t>(s, path.columns);
    l.values = upload<Accum>(s, path.values);
    l.eigenvectors = Mat<const Accum>(upload<Accum>(s, path.eigenvectors).data, dim, dim);
    l.eigenvalues = upload<Accum>(s, path.eigenvalues);
    const std::int64_t bytes = energy_matrix_bytes(dim, scalars);
    energy_prepare(s.device, l, scalars, {s.zeros<std::byte>(bytes), bytes});
    return l;
}

void add_energy(Suite& s, std::int64_t n, int heads, int dim, int scalars, bool dense = false) {
    EnergyForward<Storage> f;
    f.lap = laplacian(s, dim, scalars, dense);
    f.x = Mat<const Storage>(s.random<Storage>(2 * n * heads * dim), n, 2 * heads * dim);
    f.a = {s.zeros<Accum>(n * heads * scalars), n, heads * scalars};
    f.b = {s.zeros<Accum>(n * heads * scalars), n, heads * scalars};
    f.log_tau = Vec<const Accum>(s.zeros<Accum>(scalars), scalars);
    f.log_temp = Vec<const Accum>(s.zeros<Accum>(heads), heads);
    f.heads = heads, f.scalars = scalars;
    const std::string name = std::to_string(n) + "x2x" + std::to_string(heads) + "x" + std::to_string(dim) + " R" +
                             std::to_string(scalars) + (dense ? " dense" : "");
    s.add("forward " + name, traffic(f), [f, &s] { energy_forward(s.device, f); });
    s.cases.back().only_reads = scalars == 1;

    EnergyBackward<Storage> b;
    b.dx = {s.zeros<Storage>(2 * n * heads * dim), n, 2 * heads * dim};
    b.dlog_tau = {s.zeros<Accum>(scalars), scalars};
    b.dlog_temp = {s.zeros<Accum>(heads), heads};
    b.da = Mat<const Accum>(s.random<Accum>(n * heads * scalars), n, heads * scalars);
    b.db = Mat<const Accum>(s.random<Accum>(n * heads * scalars), n, heads * scalars);
    b.x = f.x, b.lap = f.lap, b.log_tau = f.log_tau, b.log_temp = f.log_temp, b.heads = heads, b.scalars = scalars;
    add_with_pending(s, "backward " + name, b, energy_pending_elements(n, heads, scalars),
                     [](const Device& d, const EnergyBackward<Storage>& p) { energy_backward(d, p); });
}

}  // namespace

FIEDLER_BENCH(energy) {
    const std::int64_t n = suite.small ? 1024 : 32768;
    for (const int scalars : {1, 2, 8, 16}) add_energy(suite, n, 6, 64, scalars);
    add_energy(suite, n, 6, 64, 1, true);
    add_energy(suite, n, 12, 32, 8);
    add_energy(suite, n, 3, 128, 8);
}

}  // namespace fiedler::bench
