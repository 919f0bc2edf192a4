// engine/spectrum.h: the smallest eigenpairs of a graph Laplacian.
//
//   components     the null space is written down (one vector per component: graph.h), deflated, never iterated for
//   dense          few nodes, or k near the number of nodes: all pairs by a dense solver, in double
//   filter         Chebyshev-filtered block subspace iteration with guard columns (Zhou, Saad et al. 2006), locking what
//                  has converged, from the Ritz vectors of a filtered block Krylov space: expander-like graphs
//   multilevel     the same, started from the eigenvectors of ever smaller aggregated graphs: mesh-like graphs, whose
//                  lambda_2 is near 1 / n
//
// A vector x of unit norm with residual r = ||L x - mu x|| has an eigenvalue within r of mu. Completeness (no smaller
// eigenvalue overlooked) is checked by random probe vectors filtered in the complement of what was found.
//
// Order and signs: ascending; zeros first, one vector per component, in the order of the components. The
// largest-magnitude component of every vector is positive. Repeated eigenvalues get a basis that depends on the graph,
// the options and the device only.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/graph.h"

namespace fiedler {

enum class SpectrumMethod { automatic, dense, filter, multilevel };
const char* name_of(SpectrumMethod);

struct SpectrumProgress {
    std::int64_t iteration = 0;
    std::int64_t converged = 0, wanted = 0;  // pairs beyond the null space
    double worst_residual = 0;               // of the wanted pairs
    double seconds = 0, seconds_left = -1;   // -1: not known yet
    std::string stage;                       // "level 3 (1,843 nodes)", "filter", "completeness"
};

struct SpectrumOptions {
    std::int64_t k = 64;       // pairs, the zeros of the components among them
    bool beyond_null = false;  // k pairs beyond the zeros, which are not returned (Spectrum::zeros still counts them)
    LaplacianKind kind = LaplacianKind::normalised;
    SpectrumMethod method = SpectrumMethod::automatic;
    double tolerance = 0;  // of the residual norm, absolute; 0: 1e-6 of the spectrum's upper bound
    std::int64_t max_iterations = 500;
    std::uint64_t seed = 1;
    int threads = 0;                // CPU
    std::size_t memory_budget = 0;  // bytes of device memory; 0: no limit but the device's
    RawVector<float> start;         // warm start: [nodes, start_columns], row-major; empty: none
    std::int64_t start_columns = 0;
    const Components* components = nullptr;                 // of the graph, if the caller knows them
    std::function<void(const SpectrumProgress&)> progress;  // called now and then; may be empty
    std::function<bool()> stop;                             // asked now and then: true ends with a partial result
};

enum class SpectrumStatus { complete, partial };

struct SpectrumStage {  // of the time, by the kernel families' words where the device was at work
    std::string name;
    double seconds = 0;
};

struct Spectrum {
    LaplacianKind kind = LaplacianKind::normalised;
    SpectrumMethod method = SpectrumMethod::automatic;  // the one used
    SpectrumStatus status = SpectrumStatus::partial;
    std::string why;  // the method's choice, and why a result is partial: a sentence each
    std::int64_t nodes = 0, edges = 0, zeros = 0;
    std::int64_t iterations = 0;        // outer iterations on the full graph
    std::int64_t products = 0;          // columns multiplied by L on the full graph
    double tolerance = 0;               // as used
    double device_seconds = 0;          // making the device's context, once a process: not among these:
    double seconds = 0;                 // in all, among them:
    double prepare_seconds = 0;         // components, node order, Laplacians, coarser graphs, upload, first estimate
    double solve_seconds = 0;           // the iterations
    std::vector<SpectrumStage> stages;  // of `seconds`, in the order of the work; of solve_seconds, longest first
    std::size_t peak_bytes = 0;         // of device memory (host memory of the solver on the CPU)
    std::string device;
    std::vector<double> eigenvalues;  // [k] ascending
    std::vector<double> residuals;    // [k] of the returned (rounded) vectors
    RawVector<float> vectors;         // [nodes, k] row-major, column j belongs to eigenvalues[j]
    std::int64_t count() const { return static_cast<std::int64_t>(eigenvalues.size()); }
};

// InputError: k < 1, an empty graph, k not above the number of components (all pairs would
// be zeros), more than 512 pairs beyond the zeros, memory budget too small. k beyond the number of nodes: all pairs. A
// solve that does not converge returns
// SpectrumStatus::partial.
// cuda: on the first GPU, in f32 with f64 sums; else on the CPU in double.
Spectrum solve_spectrum(const Graph&, const SpectrumOptions&, bool cuda);

}  // namespace fiedler
