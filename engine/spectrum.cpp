#include "engine/spectrum.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>

#include "engine/coarsen.h"
#include "engine/dense_eigen.h"
#include "engine/error.h"
#include "engine/subspace_solver.h"
#include "kernels/parallel.h"
#include "kernels/profile.h"

namespace fiedler {
namespace {

using Size = std::size_t;
constexpr std::int64_t kMostPairs = 512;   // beyond the null space
constexpr std::int64_t kDenseNodes = 400;  // up to here the dense solver, whatever is asked
constexpr std::int64_t kDenseMost = 8192;  // beyond, it would take many minutes
constexpr double kMeshLike = 0.02;         // wanted eigenvalues below this share of the spectrum: mesh-like
constexpr std::int64_t kMultilevelNodes = 4000;

double now_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Names what the time since the last one was spent on.
class Laps {
  public:
    explicit Laps(std::vector<SpectrumStage>& stages, double begin) : stages_(stages), last_(begin) {}
    void done(const char* name) {
        const double now = now_seconds();
        stages_.push_back({name, now - last_});
        last_ = now;
    }
    void done(const StageProfile& profile) {  // of its one step
        double rest = now_seconds() - last_;
        for (const StageProfile::Stage& stage : profile.stages())
            if (stage.name != StageProfile::kOutside) {
                stages_.push_back({stage.name, stage.seconds});
                rest -= stage.seconds;
            }
        stages_.push_back({"host", rest});
        last_ = now_seconds();
    }

  private:
    std::vector<SpectrumStage>& stages_;
    double last_;
};

std::int64_t block_for(std::int64_t wanted) {
    const std::int64_t guard = std::max<std::int64_t>(16, wanted / 4);
    return (wanted + guard + 15) / 16 * 16;
}

// Columns filtered at a time. A row of 8 is a sector of memory; more of them would not fit the cache of any GPU.
template <class Dev>
std::int64_t panel_for(const Dev& dev, std::int64_t nodes, std::int64_t block) {
    if constexpr (std::is_same_v<Dev, Cuda>)
        return Size(nodes * block) * sizeof(float) <= dev.l2_bytes ? 0 : 8;
    else
        return 0;
}

// The same in half precision: as wide as pays off where gathers miss the cache, and where neighbours are near.
template <class Dev>
std::int64_t half_for(const Dev& dev, std::int64_t nodes, std::int64_t block, bool near) {
    return panel_for(dev, nodes, block) == 0 ? 0 : near ? 32 : 16;
}

// The graph without its isolated nodes, ordered so that components are contiguous ranges.
struct Ordered {
    const Graph* given = nullptr;  // as it is; else:
    Graph own;
    std::vector<std::int32_t> order;       // old number of each node
    std::vector<std::int64_t> components;  // [count + 1]
    const Graph& graph() const { return given ? *given : own; }
};

Ordered order_nodes(const Graph& g, const Components& c, bool breadth_first) {
    Ordered out;
    if (!breadth_first && c.count == 1) {
        out.given = &g;
        out.order.resize(Size(g.nodes));
        std::iota(out.order.begin(), out.order.end(), 0);
        out.components = {0, g.nodes};
        return out;
    }
    out.order = breadth_first_order(g, c);
    std::erase_if(out.order, [&](std::int32_t i) { return g.offsets[Size(i)] == g.offsets[Size(i) + 1]; });
    out.components.push_back(0);
    for (Size i = 0; i < out.order.size(); ++i)
        if (i + 1 == out.order.size() || c.of_node[Size(out.order[i])] != c.of_node[Size(out.order[i + 1])])
            out.components.push_back(std::int64_t(i) + 1);
    out.own = keep_nodes(g, out.order);
    return out;
}

struct Problem {
    const Graph& graph;
    const SpectrumOptions& options;
    Components components;
    std::int64_t wanted = 0;  // beyond the null space
    std::int64_t zeros = 0;   // returned
    double started = 0;
};

Problem check(const Graph& graph, const SpectrumOptions& o) {
    const double started = now_seconds();
    if (graph.nodes == 0) input_error("spectrum: the graph is empty; give one with at least one node");
    if (o.k < 1) input_error("spectrum: k is {}; ask for at least one eigenpair", o.k);
    if (o.tolerance < 0 || !std::isfinite(o.tolerance))
        input_error("spectrum: tolerance {} must be positive, or 0 for the default", o.tolerance);
    if (o.start_columns > 0 && std::int64_t(o.start.size()) != graph.nodes * o.start_columns)
        input_error("spectrum: the start vectors have {} values, not {} nodes times {} columns", o.start.size(),
                    graph.nodes, o.start_columns);
    Problem p{graph, o, o.components ? *o.components : find_components(graph)};
    p.started = started;
    const std::int64_t null = p.components.count, beyond = graph.nodes - null;
    if (o.beyond_null) {
        if (beyond == 0) input_error("spectrum: the graph has no edges: all its eigenvalues are 0");
        p.wanted = std::min(o.k, beyond);
    } else {
        if (o.k <= null && o.k < graph.nodes)
            input_error(
                "spectrum: the graph has {} components and k is {}: all {} smallest eigenvalues are 0, and their "
                "vectors "
                "only say which component a node is in; ask for k above {}, for pairs beyond the zeros "
                "(--beyond-null), "
                "or for the largest component alone (--largest-component)",
                null, o.k, o.k, null);
        p.zeros = null;
        p.wanted = std::min(o.k, graph.nodes) - null;
    }
    return p;
}

// Vectors of some of the ordered nodes, from node `first` on, to the caller's numbers, behind the zeros.
void place_vectors(const Problem& p, const std::vector<std::int32_t>& order, const float* rows, std::int64_t first,
                   std::int64_t count, Spectrum& s) {
    const auto k = static_cast<Size>(p.zeros + p.wanted), w = static_cast<Size>(p.wanted);
    parallel_for(Cpu{p.options.threads}, count, [&](std::int64_t i) {
        std::copy_n(rows + Size(i) * w, w, s.vectors.data() + Size(order[Size(first + i)]) * k + Size(p.zeros));
    });
}

// The null vectors, and zeros where the solver will write nothing: nodes without neighbours, and the others' zeros.
void place_zeros(const Problem& p, Spectrum& s) {
    const Graph& g = p.graph;
    const auto k = Size(p.zeros + p.wanted);
    const bool normalised = p.options.kind == LaplacianKind::normalised;
    std::vector<double> masses(Size(g.nodes)), totals(Size(p.components.count), 0.0);
    const Cpu cpu{p.options.threads};
    parallel_for(cpu, g.nodes, [&](std::int64_t node) {
        const auto i = Size(node);
        double degree = 0;
        for (auto e = Size(g.offsets[i]); e < Size(g.offsets[i + 1]); ++e) degree += g.weights[e];
        masses[i] = normalised && degree > 0 ? degree : 1;
        std::fill_n(s.vectors.data() + i * k, degree > 0 ? Size(p.zeros) : k, 0.f);
    });
    if (p.zeros == 0) return;
    for (Size i = 0; i < masses.size(); ++i) totals[Size(p.components.of_node[i])] += masses[i];
    parallel_for(cpu, g.nodes, [&](std::int64_t i) {
        const auto c = Size(p.components.of_node[Size(i)]);
        s.vectors[Size(i) * k + c] = static_cast<float>(std::sqrt(masses[Size(i)] / totals[c]));
    });
}

// Largest-magnitude component positive, of equals the first.
void fix_signs(const Problem& p, Spectrum& s) {
    constexpr std::int64_t kRows = 8192;
    const Cpu cpu{p.options.threads};
    const auto k = Size(p.zeros + p.wanted);
    const std::int64_t chunks = (p.graph.nodes + kRows - 1) / kRows;
    std::vector<float> largest(Size(chunks) * k, 0.f);  // with its sign
    parallel_for(cpu, chunks, [&](std::int64_t c) {
        float* mine = largest.data() + Size(c) * k;
        for (auto i = Size(c * kRows); i < Size(std::min((c + 1) * kRows, p.graph.nodes)); ++i)
            for (Size j = 0; j < k; ++j)
                if (const float x = s.vectors[i * k + j]; std::fabs(x) > std::fabs(mine[j])) mine[j] = x;
    });
    std::vector<float> sign(k, 1.f);
    for (Size j = 0; j < k; ++j) {
        float most = 0;
        for (Size c = 0; c < Size(chunks); ++c)
            if (std::fabs(largest[c * k + j]) > std::fabs(most)) most = largest[c * k + j];
        if (most < 0) sign[j] = -1.f;
    }
    parallel_for(cpu, p.graph.nodes, [&](std::int64_t i) {
        for (Size j = 0; j < k; ++j) s.vectors[Size(i) * k + j] *= sign[j];
    });
}

// The first `wanted` pairs beyond the zeros, by the dense solver.
void solve_dense(const Problem& p, const Ordered& ordered, Spectrum& s) {
    s.method = SpectrumMethod::dense;
    const LaplacianMatrix<double> matrix = laplacian_of<double>(ordered.graph(), p.options.kind);
    const double solving = now_seconds();
    s.prepare_seconds = solving - p.started;
    std::vector<double> values, vectors;
    dense_spectrum(matrix, values, vectors);
    const auto n = Size(matrix.nodes), zeros = ordered.components.size() - 1, w = Size(p.wanted);
    std::vector<float> kept(n * w);
    for (Size i = 0; i < n; ++i)
        for (Size j = 0; j < w; ++j) kept[i * w + j] = static_cast<float>(vectors[i * n + zeros + j]);
    for (Size j = 0; j < w; ++j) {
        double square = 0;
        for (Size i = 0; i < n; ++i) {
            double sum = -values[zeros + j] * kept[i * w + j];
            for (auto e = Size(matrix.offsets[i]); e < Size(matrix.offsets[i + 1]); ++e)
                sum += matrix.values[e] * kept[Size(matrix.columns[e]) * w + j];
            square += sum * sum;
        }
        s.eigenvalues.push_back(std::max(values[zeros + j], 0.0));
        s.residuals.push_back(std::sqrt(square));
    }
    s.solve_seconds = now_seconds() - solving;
    s.peak_bytes = 3 * sizeof(double) * n * n;
    s.status = SpectrumStatus::complete;
    place_vectors(p, ordered.order, kept.data(), 0, matrix.nodes, s);
}

}  // namespace

template <class A>
std::vector<SolverLevel<A>> solver_levels(const Graph& graph, const std::vector<std::int64_t>& components,
                                          LaplacianKind kind, std::int64_t block) {
    std::vector<SolverLevel<A>> levels(1);
    levels[0].matrix = laplacian_of<A>(graph, kind);
    levels[0].components = components;
    if (block == 0) return levels;
    std::vector<double> masses(Size(graph.nodes));
    for (Size i = 0; i < masses.size(); ++i)
        masses[i] = double(levels[0].matrix.null_weight[i]) * double(levels[0].matrix.null_weight[i]);
    const std::vector<CoarseGraph> coarse =
        coarsen_all(graph, masses, 6 * block, 2 * block + std::int64_t(components.size()));
    const std::vector<double>* finer = &masses;
    for (const CoarseGraph& c : coarse) {
        SolverLevel<A>& above = levels.back();
        above.group = c.group;
        above.group_scale.resize(c.group.size());
        parallel_for(Cpu{}, std::int64_t(c.group.size()), [&](std::int64_t i) {
            above.group_scale[Size(i)] =
                static_cast<A>(std::sqrt((*finer)[Size(i)] / c.masses[Size(c.group[Size(i)])]));
        });
        SolverLevel<A> level;
        level.matrix = laplacian_of<A>(c.graph, c.masses);
        // A component's first node is the seed of its first group, and its groups follow one another.
        for (Size k = 0; k + 1 < above.components.size(); ++k)
            level.components.push_back(c.group[Size(above.components[k])]);
        level.components.push_back(c.graph.nodes);
        finer = &c.masses;
        levels.push_back(std::move(level));
    }
    return levels;
}
template std::vector<SolverLevel<float>> solver_levels(const Graph&, const std::vector<std::int64_t>&, LaplacianKind,
                                                       std::int64_t);
template std::vector<SolverLevel<double>> solver_levels(const Graph&, const std::vector<std::int64_t>&, LaplacianKind,
                                                        std::int64_t);

namespace {

// The caller's start vectors in the order of the solver's nodes.
std::vector<float> ordered_start(const Problem& p, const Ordered& ordered) {
    const auto columns = Size(p.options.start_columns);
    std::vector<float> start(ordered.order.size() * columns);
    for (Size i = 0; i < ordered.order.size(); ++i)
        std::copy_n(p.options.start.data() + Size(ordered.order[i]) * columns, columns, start.data() + i * columns);
    return start;
}

// As asked or by default, but no less than rounding allows.
template <class A>
double tolerance_for(const SpectrumOptions& o, const LaplacianMatrix<A>& matrix, double upper) {
    return std::max(o.tolerance > 0 ? o.tolerance : 1e-6 * std::min(upper, 2.0), rounding_floor(matrix, upper));
}

template <class Dev, class A>
void solve_subspace(Dev& dev, const Problem& p, Spectrum& s, Laps& laps) {
    const SpectrumOptions& o = p.options;
    SolverSettings settings;
    settings.wanted = p.wanted, settings.block = block_for(p.wanted);
    settings.max_iterations = o.max_iterations, settings.seed = o.seed, settings.memory_budget = o.memory_budget;
    settings.progress = o.progress, settings.stop = o.stop;
    Ordered ordered = order_nodes(p.graph, p.components, o.method == SpectrumMethod::multilevel);
    laps.done("order");
    settings.panel = panel_for(dev, ordered.graph().nodes, settings.block);
    settings.half = half_for(dev, ordered.graph().nodes, settings.block, false);
    if (o.start_columns == 0) settings.basis = krylov_columns(ordered.graph().nodes, p.wanted, settings.half);
    auto levels = solver_levels<A>(ordered.graph(), ordered.components, o.kind, 0);
    laps.done("matrix");
    auto solver = std::make_unique<SubspaceSolver<Dev, A>>(dev, levels, settings);
    laps.done("upload");
    const auto estimate = solver->estimate(settings.block);
    laps.done("estimate");
    const bool mesh = estimate.value < kMeshLike * estimate.upper;
    const bool large = ordered.graph().nodes > kMultilevelNodes;
    const bool multilevel = o.method == SpectrumMethod::multilevel ||
                            (o.method == SpectrumMethod::automatic && mesh && large && o.start_columns == 0);
    s.method = multilevel ? SpectrumMethod::multilevel : SpectrumMethod::filter;
    s.why = fmt::format("{}: eigenvalue {} is estimated at {:.2g} of the largest, {}", name_of(s.method),
                        settings.block, estimate.value / estimate.upper, mesh ? "as in meshes" : "as in expanders");
    settings.tolerance = s.tolerance = tolerance_for(o, levels[0].matrix, estimate.upper);
    solver->set_tolerance(settings.tolerance);
    if (multilevel) {
        solver.reset();
        settings.basis = 0;
        settings.half = half_for(dev, ordered.graph().nodes, settings.block, true);
        settings.panel = 0;  // in breadth-first order neighbours are near: wide panels read the matrix less often
        ordered = order_nodes(p.graph, p.components, true);
        levels = solver_levels<A>(ordered.graph(), ordered.components, o.kind, settings.block);
        laps.done("coarser graphs");
        solver = std::make_unique<SubspaceSolver<Dev, A>>(dev, levels, settings);
        laps.done("upload");
    }
    const std::vector<float> start = ordered_start(p, ordered);
    const double solving = now_seconds();
    StageProfile profile(mark_clock(dev));
    profile.begin_step();
    const SolverResult result =
        solver->solve(start, o.start_columns, [&](const float* rows, std::int64_t first, std::int64_t count) {
            place_vectors(p, ordered.order, rows, first, count, s);
        });
    profile.end_step();
    s.solve_seconds = now_seconds() - solving;
    laps.done(profile);
    s.prepare_seconds = solving - p.started;
    s.status = result.complete ? SpectrumStatus::complete : SpectrumStatus::partial;
    if (!result.complete) s.why += "; partial: " + result.why;
    s.iterations = result.iterations, s.products = result.products, s.peak_bytes = result.peak_bytes;
    s.eigenvalues.insert(s.eigenvalues.end(), result.eigenvalues.begin(), result.eigenvalues.end());
    s.residuals.insert(s.residuals.end(), result.residuals.begin(), result.residuals.end());
    for (double& value : s.eigenvalues) value = std::max(value, 0.0);
}

}  // namespace

const char* name_of(SpectrumMethod method) {
    switch (method) {
        case SpectrumMethod::automatic:
            return "auto";
        case SpectrumMethod::dense:
            return "dense";
        case SpectrumMethod::filter:
            return "filter";
        case SpectrumMethod::multilevel:
            return "multilevel";
    }
    return "";
}

Spectrum solve_spectrum(const Graph& graph, const SpectrumOptions& options, bool cuda) {
    Spectrum s;
#if FIEDLER_CUDA
    // Before the clock starts: the context is made once a process, whoever asks first.
    std::unique_ptr<Cuda> gpu;
    if (cuda && graph.nodes > kDenseNodes && options.method != SpectrumMethod::dense) {
        const double making = now_seconds();
        gpu = std::make_unique<Cuda>(0);
        s.device_seconds = now_seconds() - making;
    }
#endif
    const Problem p = check(graph, options);
    s.kind = options.kind, s.nodes = graph.nodes, s.edges = graph.edges(), s.zeros = p.components.count;
    s.tolerance = options.tolerance;
    s.eigenvalues.assign(Size(p.zeros), 0.0);
    s.residuals.assign(Size(p.zeros), 0.0);
    Laps laps(s.stages, p.started);
    laps.done("components");
    s.vectors.resize(Size(graph.nodes) * Size(p.zeros + p.wanted));
    place_zeros(p, s);
    laps.done("zeros");
    std::int64_t connected = 0;  // nodes with a neighbour
    for (Size i = 0; i < Size(graph.nodes); ++i) connected += graph.offsets[i + 1] > graph.offsets[i];
    const bool small = connected <= kDenseNodes || connected < 2 * block_for(p.wanted);
    if (p.wanted == 0) {
        s.method = SpectrumMethod::dense, s.status = SpectrumStatus::complete;
        s.why = "no edges: every eigenvalue is 0";
    } else if (options.method == SpectrumMethod::dense || small) {
        if (connected > kDenseMost)
            input_error("spectrum: the dense method on {} nodes is beyond its {}; use --method auto", connected,
                        kDenseMost);
        s.why = small ? fmt::format("dense: {} nodes with neighbours for {} pairs", connected, p.wanted)
                      : "dense, as asked";
        s.device = "cpu";
        solve_dense(p, order_nodes(graph, p.components, false), s);
    } else if (p.wanted > kMostPairs) {
        input_error("spectrum: {} pairs beyond the zeros; ask for at most {}", p.wanted, kMostPairs);
    } else if (cuda) {
#if FIEDLER_CUDA
        s.device = cuda_device_info(0).name;
        solve_subspace<Cuda, float>(*gpu, p, s, laps);
#endif
    } else {
        Cpu dev{options.threads};
        s.device = fmt::format("cpu ({} threads)", thread_count(dev));
        solve_subspace<Cpu, double>(dev, p, s, laps);
    }
    fix_signs(p, s);
    laps.done("vectors");
    s.seconds = now_seconds() - p.started;
    return s;
}

}  // namespace fiedler
