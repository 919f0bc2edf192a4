#include "engine/small_graphs.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "kernels/parallel.h"
#include "kernels/small_spectra.h"

namespace fiedler {

namespace {

using Size = std::size_t;
constexpr std::int64_t kBatchNodes = std::int64_t{1} << 17;  // in memory at a time

double degree(const SmallGraphs& g, std::int64_t node) {
    return double(g.row_offsets[static_cast<Size>(node) + 1] - g.row_offsets[static_cast<Size>(node)]);
}

// Components of each graph: the number of its zero eigenvalues.
std::vector<std::int32_t> components_of(const SmallGraphs& g, int threads) {
    std::vector<std::int32_t> counts(static_cast<Size>(g.count()));
    parallel_for(Cpu{threads}, g.count(), [&](std::int64_t graph) {
        const std::int64_t first = g.node_offsets[static_cast<Size>(graph)],
                           n = g.node_offsets[static_cast<Size>(graph) + 1] - first;
        std::vector<std::int32_t> root(static_cast<Size>(n));
        std::iota(root.begin(), root.end(), 0);
        const auto find = [&](std::int32_t i) {
            while (root[static_cast<Size>(i)] != i)
                i = root[static_cast<Size>(i)] = root[static_cast<Size>(root[static_cast<Size>(i)])];
            return i;
        };
        auto left = static_cast<std::int32_t>(n);
        for (std::int64_t i = 0; i < n; ++i)
            for (auto e = static_cast<Size>(g.row_offsets[static_cast<Size>(first + i)]);
                 e < static_cast<Size>(g.row_offsets[static_cast<Size>(first + i) + 1]); ++e) {
                const std::int32_t a = find(static_cast<std::int32_t>(i)), b = find(g.columns[e]);
                if (a == b) continue;
                root[static_cast<Size>(std::max(a, b))] = std::min(a, b);
                --left;
            }
        counts[static_cast<Size>(graph)] = left;
    });
    return counts;
}

// The Laplacians of graphs [first, last) as the kernel takes them.
template <class A>
struct Matrices {
    std::vector<std::int32_t> nodes{0}, columns;
    std::vector<std::int64_t> rows{0};
    std::vector<A> values;
};
template <class A>
Matrices<A> matrices_of(const SmallGraphs& g, std::int64_t first, std::int64_t last) {
    Matrices<A> m;
    const std::int64_t base = g.node_offsets[static_cast<Size>(first)];
    for (std::int64_t graph = first; graph < last; ++graph) {
        const std::int64_t begin = g.node_offsets[static_cast<Size>(graph)];
        for (std::int64_t i = begin; i < g.node_offsets[static_cast<Size>(graph) + 1]; ++i) {
            if (degree(g, i) > 0) {
                m.columns.push_back(static_cast<std::int32_t>(i - begin));
                m.values.push_back(1);
            }
            for (auto e = static_cast<Size>(g.row_offsets[static_cast<Size>(i)]);
                 e < static_cast<Size>(g.row_offsets[static_cast<Size>(i) + 1]); ++e) {
                m.columns.push_back(g.columns[e]);
                m.values.push_back(static_cast<A>(-1 / std::sqrt(degree(g, i) * degree(g, begin + g.columns[e]))));
            }
            m.rows.push_back(static_cast<std::int64_t>(m.columns.size()));
        }
        m.nodes.push_back(static_cast<std::int32_t>(g.node_offsets[static_cast<Size>(graph) + 1] - base));
    }
    return m;
}

// Memory of the device that goes away by itself.
template <class Device, class T>
class Memory {
  public:
    Memory(const Device& dev, std::int64_t n)
        : dev_(dev),
          n_(n),
          data_(static_cast<T*>(device_alloc(dev, std::max<Size>(static_cast<Size>(n), 1) * sizeof(T)))) {}
    Memory(const Device& dev, const std::vector<T>& values) : Memory(dev, static_cast<std::int64_t>(values.size())) {
        if (!values.empty()) copy_to_device(dev, data_, values.data(), values.size() * sizeof(T));
    }
    ~Memory() { device_free(dev_, data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    Vec<T> vec() const { return {data_, n_}; }
    std::vector<T> values() const {
        std::vector<T> v(static_cast<Size>(n_));
        if (n_ > 0) copy_to_host(dev_, v.data(), data_, v.size() * sizeof(T));
        return v;
    }

  private:
    const Device& dev_;
    std::int64_t n_;
    T* data_;
};

template <class Device, class A>
void embed(const Device& dev, const SmallGraphs& g, std::int64_t first, std::int64_t last,
           const std::vector<std::int32_t>& zeros, std::int64_t k, SmallEmbedding& out) {
    const Matrices<A> m = matrices_of<A>(g, first, last);
    const std::int64_t graphs = last - first, nodes = m.nodes.back();
    const std::int64_t pairs = k + *std::max_element(zeros.begin() + static_cast<std::ptrdiff_t>(first),
                                                     zeros.begin() + static_cast<std::ptrdiff_t>(last));
    const SmallSpectraOrder order = small_spectra_order(m.nodes.data(), graphs);
    const Memory<Device, std::int32_t> node_offsets(dev, m.nodes), columns(dev, m.columns), sorted(dev, order.graphs),
        status(dev, graphs);
    const Memory<Device, std::int64_t> row_offsets(dev, m.rows);
    const Memory<Device, A> matrix(dev, m.values), values(dev, graphs * pairs), vectors(dev, nodes * pairs),
        residual(dev, graphs), scratch(dev, small_spectra_scratch_elements(order.first));
    SmallSpectra<A> p;
    p.values = {values.vec().data, graphs, pairs};
    p.vectors = {vectors.vec().data, nodes, pairs};
    p.residual = residual.vec(), p.status = status.vec();
    p.node_offsets = node_offsets.vec(), p.row_offsets = row_offsets.vec(), p.columns = columns.vec();
    p.matrix = matrix.vec(), p.filler = 2;
    p.order = sorted.vec(), p.first = order.first, p.scratch = scratch.vec();
    small_spectra(dev, p);
    synchronize(dev);
    const std::vector<std::int32_t> done = status.values();
    const std::vector<A> mu = values.values(), x = vectors.values();
    for (std::int64_t graph = first; graph < last; ++graph) {
        const auto at = static_cast<Size>(graph - first);
        if (done[at] != kSmallSpectraDone)
            run_error("small graphs: the eigenvectors of graph {} did not converge", graph);
        const std::int64_t skip = zeros[static_cast<Size>(graph)], begin = g.node_offsets[static_cast<Size>(graph)],
                           n = g.node_offsets[static_cast<Size>(graph) + 1] - begin;
        for (std::int64_t j = 0; j < k; ++j)
            out.values[static_cast<Size>(graph * k + j)] = static_cast<float>(
                skip + j < n ? mu[at * static_cast<Size>(pairs) + static_cast<Size>(skip + j)] : A(2));
        const double scale = std::sqrt(double(n));
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t j = 0; j < std::min(k, n - skip); ++j)
                out.vectors[static_cast<Size>((begin + i) * k + j)] =
                    static_cast<float>(scale * x[static_cast<Size>((m.nodes[at] + i) * pairs + skip + j)]);
    }
}

template <class Device, class A>
void embed_all(const Device& dev, const SmallGraphs& g, const std::vector<std::int32_t>& zeros, std::int64_t k,
               SmallEmbedding& out) {
    for (std::int64_t first = 0, last; first < g.count(); first = last) {
        for (last = first + 1;
             last < g.count() &&
             g.node_offsets[static_cast<Size>(last) + 1] - g.node_offsets[static_cast<Size>(first)] <= kBatchNodes;)
            ++last;
        embed<Device, A>(dev, g, first, last, zeros, k, out);
    }
}

}  // namespace

SmallEmbedding small_embedding(const SmallGraphs& g, std::int64_t k, bool cuda, int threads) {
    SmallEmbedding out;
    out.vectors.assign(static_cast<Size>(g.nodes() * k), 0.f);
    out.values.assign(static_cast<Size>(g.count() * k), 2.f);
    if (k == 0 || g.count() == 0) return out;
    const std::vector<std::int32_t> zeros = components_of(g, threads);
    if (!cuda) {
        embed_all<Cpu, double>(Cpu{threads}, g, zeros, k, out);
        return out;
    }
    if (std::string why; cuda_device_count(&why) == 0) input_error("no GPU: {}; use the CPU", why);
#if FIEDLER_CUDA
    embed_all<Cuda, float>(Cuda(0), g, zeros, k, out);
#endif
    return out;
}

std::vector<float> return_probabilities(const SmallGraphs& g, std::int64_t steps, int threads) {
    std::vector<float> out(static_cast<Size>(g.nodes() * steps));
    parallel_for_uneven(Cpu{threads}, g.count(), [&](std::int64_t graph) {
        const std::int64_t first = g.node_offsets[static_cast<Size>(graph)],
                           n = g.node_offsets[static_cast<Size>(graph) + 1] - first;
        std::vector<double> at(static_cast<Size>(n)), next(static_cast<Size>(n));
        for (std::int64_t start = 0; start < n; ++start) {
            std::fill(at.begin(), at.end(), 0.0);
            at[static_cast<Size>(start)] = 1;
            for (std::int64_t step = 0; step <= steps; ++step) {
                std::fill(next.begin(), next.end(), 0.0);
                for (std::int64_t i = 0; i < n; ++i) {
                    if (at[static_cast<Size>(i)] == 0) continue;
                    const double share =
                        at[static_cast<Size>(i)] / degree(g, first + i);  // an isolated node: no entries
                    for (auto e = static_cast<Size>(g.row_offsets[static_cast<Size>(first + i)]);
                         e < static_cast<Size>(g.row_offsets[static_cast<Size>(first + i) + 1]); ++e)
                        next[static_cast<Size>(g.columns[e])] += share;
                }
                std::swap(at, next);
                if (step > 0)
                    out[static_cast<Size>((first + start) * steps + step - 1)] =
                        static_cast<float>(at[static_cast<Size>(start)]);
            }
        }
    });
    return out;
}

}  // namespace fiedler
