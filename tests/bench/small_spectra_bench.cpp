// Names: graphs x nodes, k of the pairs returned. TFLOP/s counts 9 n^3 a graph (tridiagonal QR), whatever is done in fact.
// Before the table: graphs a second, inputs and outputs in device memory, best of five runs.
#include "kernels/small_spectra.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Batch {
    std::vector<std::int32_t> nodes{0}, columns;
    std::vector<std::int64_t> rows{0};
    std::vector<float> entries;
    double cubes = 0;
};

// A molecule without its hydrogens, roughly: a tree of low degree, and a ring for every eight nodes. Combinatorial
// Laplacian.
void add_molecule(Batch& b, int n, std::mt19937_64& random) {
    std::vector<std::vector<std::int32_t>> near(static_cast<std::size_t>(n));
    const auto link = [&](int i, int j) {
        auto &a = near[std::size_t(i)], &c = near[std::size_t(j)];
        if (i == j || std::find(a.begin(), a.end(), j) != a.end()) return;
        a.push_back(j), c.push_back(i);
    };
    for (int i = 1; i < n; ++i) link(i, std::max(0, i - 1 - int(random() % 3)));
    for (int ring = 0; ring < n / 8; ++ring) {
        const int i = int(random() % std::uint64_t(n - 5));
        link(i, i + 5);
    }
    for (int i = 0; i < n; ++i) {
        auto& row = near[std::size_t(i)];
        b.columns.push_back(i), b.entries.push_back(float(row.size()));
        for (const std::int32_t j : row) b.columns.push_back(j), b.entries.push_back(-1);
        b.rows.push_back(std::int64_t(b.columns.size()));
    }
    b.nodes.push_back(b.nodes.back() + n);
    b.cubes += double(n) * n * n;
}

template <class T>
Vec<T> upload(Suite& s, const std::vector<T>& v) {
    T* p = reinterpret_cast<T*>(s.zeros<std::byte>(std::int64_t(v.size() * sizeof(T))));
    copy_to_device(s.device, p, v.data(), v.size() * sizeof(T));
    return {p, std::int64_t(v.size())};
}

double seconds(const Suite& s, const SmallSpectra<Accum>& p) {
    const auto start = std::chrono::steady_clock::now();
    small_spectra(s.device, p);
    synchronize(s.device);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void add_batch(Suite& s, std::int64_t graphs, int smallest, int largest, std::int64_t k) {
    const bool slow = std::is_same_v<Device, Cpu> && largest > 32;
    if (s.small || slow) graphs = std::max<std::int64_t>(1, graphs / 50);
    std::mt19937_64 random(7);
    Batch b;
    for (std::int64_t g = 0; g < graphs; ++g)
        add_molecule(b, smallest + int(random() % std::uint64_t(largest - smallest + 1)), random);
    const std::int64_t nodes = b.nodes.back();
    SmallSpectra<Accum> p;
    p.values = {s.zeros<Accum>(graphs * k), graphs, k};
    p.vectors = {s.zeros<Accum>(nodes * k), nodes, k};
    p.residual = {s.zeros<Accum>(graphs), graphs};
    p.status = {s.zeros<std::int32_t>(graphs), graphs};
    p.node_offsets = upload(s, b.nodes), p.row_offsets = upload(s, b.rows);
    p.columns = upload(s, b.columns), p.matrix = upload(s, b.entries);
#if FIEDLER_BENCH_CUDA
    const SmallSpectraOrder order = small_spectra_order(b.nodes.data(), graphs);
    const std::int64_t scratch = small_spectra_scratch_elements(order.first);
    p.order = upload(s, order.graphs), p.first = order.first;
    if (scratch > 0) p.scratch = {s.zeros<Accum>(scratch), scratch};
#endif
    const std::string size = std::to_string(smallest) + (largest > smallest ? ".." + std::to_string(largest) : "");
    const std::string name = std::to_string(graphs) + "x" + size + " k " + std::to_string(k);
    double best = seconds(s, p);
    for (int i = 0; i < 5 && (i == 0 || best < 2); ++i) best = std::min(best, seconds(s, p));
    std::printf("small_spectra %s: %.0f graphs/s\n", name.c_str(), double(graphs) / best);
    s.add(name, traffic(p, b.cubes), [p, &s] { small_spectra(s.device, p); });
}

}  // namespace

FIEDLER_BENCH(small_spectra) {
    add_batch(suite, 100000, 9, 29, 29);
    add_batch(suite, 100000, 9, 29, 8);
    add_batch(suite, 10000, 64, 64, 64);
    add_batch(suite, 1000, 256, 256, 256);
    add_batch(suite, 200, 512, 512, 512);
}

}  // namespace fiedler::bench
