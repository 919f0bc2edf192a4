// engine/subspace_solver.h: Chebyshev-filtered block subspace iteration on one device, on one graph or on a hierarchy of
// aggregated ones (spectrum.h says when; coarsen.h makes them). Internal to solve_spectrum().
//
// One block of `block` columns holds, side by side, the locked pairs and the active ones (up to three columns fewer than
// there is room for, see lock()). An iteration filters the
// active columns by a Chebyshev polynomial that is small on [cut, upper] (cut: the largest active Ritz value) and grows
// towards 0, projects out the null space and the locked pairs, and does Rayleigh-Ritz. Converged leading columns are
// locked. Sources: Zhou, Saad, Tiago, Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered
// subspace iteration", J. Comput. Phys. 219 (2006), scaled filter; Stathopoulos & Wu (2002), whitening by the Gram
// matrix's eigenvectors.
//
// Krylov start. On one graph without start vectors, the first block comes from a Krylov space of the filter: a narrow
// random block is filtered again and again, and what each filter adds to what is there already is kept, up to `basis`
// columns, of which the Ritz vectors are taken. Subspace iteration forgets all but the last filter; at the dense edge of
// a bulk, where filters of one block tell eigenvalues apart slowly, this halves the products.
//
// Rounding. The filter multiplies whatever lies below the wanted eigenvalues, first of all the null space, by more than
// the wanted ones, so rounding errors there would drown the block: both vectors of the recurrence, which is linear, are
// projected whenever that growth reaches kGrowth. The columns' own range of growth is held below kRange.
//
// Panels. The products of a filter gather rows of the block, and on graphs without locality the bound is where from. A
// few columns that are filtered on their own, from beginning to end, fit a GPU's L2 cache (SolverSettings::panel); single
// products of a wide block are done in such panels, too.
//
// Half precision. Where a panel of X does not fit the cache even so, rows of half the length are worth more than digits:
// long filters on the graph itself keep their vectors in f16 (SolverSettings::half), sums in f32. Each product leaves noise
// of some 3e-4 in all directions alike. A short filter takes most of it away again, since most directions belong to high
// eigenvalues; Rayleigh-Ritz, projections and residuals are in f32 as ever. A filter that leaves the range of f16 (an
// eigenvalue far below what the block has seen) is repeated in f32, and so is the next one if residuals do not fall. On
// graphs with equal weights these products do not read the values (half_panel.h).
//
// Deviations. Of X with L X = X Theta + R, a filter p gives p(L) X = X p(Theta) + E, and E follows from R by the filter's own
// recurrence: E_0 = 0, E_1 = alpha_1 R, E_k+1 = (alpha L + beta) E_k + gamma E_k-1 + alpha R p_k(Theta), where p_k+1 =
// (alpha Theta + beta) p_k + gamma p_k-1. This is so for any diagonal Theta; where X are nearly Ritz vectors R and E are
// small, so what half precision loses of E is little of X. Filters of Ritz vectors, that which removes noise among them,
// need no product in f32 but L X.
//
// The result is checked for overlooked pairs: random columns, filtered in the complement of what was found, must not
// come out with a Ritz value below the largest wanted one.
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "engine/arena.h"
#include "engine/dense_eigen.h"
#include "engine/spectrum.h"
#include "kernels/eigen.h"
#include "kernels/half_panel.h"
#include "kernels/laplacian.h"

namespace fiedler {

// What rounding in a product leaves in every residual, with some room: it grows with the entries of a row.
template <class A>
double rounding_floor(const LaplacianMatrix<A>& m, double upper) {
    const double entries = double(m.columns.size()) / double(m.nodes);
    return (sizeof(A) == 4 ? 6e-8 : 1e-14) * upper * (6 + std::sqrt(entries));
}

// A graph of the hierarchy, on the host. Nodes are ordered so that every component is a contiguous range.
template <class A>
struct SolverLevel {
    LaplacianMatrix<A> matrix;
    std::vector<std::int64_t> components;  // [count + 1] first rows
    std::vector<std::int32_t> group;       // of each node in the next coarser level; empty on the coarsest
    std::vector<A> group_scale;            // sqrt(m_i / m_group)
};

// The graph itself, and ever coarser ones for a block of so many columns (coarsen.h); block 0: without. components: first rows,
// as in SolverLevel. spectrum.cpp
template <class A>
std::vector<SolverLevel<A>> solver_levels(const Graph&, const std::vector<std::int64_t>& components, LaplacianKind,
                                          std::int64_t block);

struct SolverSettings {
    std::int64_t wanted = 0;  // pairs beyond the null space
    std::int64_t block = 0;   // columns, a multiple of 4, more than wanted
    std::int64_t basis = 0;   // krylov_columns(), more than block; 0: start from random vectors
    std::int64_t panel = 0;   // columns filtered at a time, apart from the block and side by side; 0: all, in the block
    std::int64_t half = 0;    // columns filtered at a time in f16, 16 or 32, at most `block`; 0: f32 throughout
    double tolerance = 0;     // of residual norms
    std::int64_t max_iterations = 500;
    std::uint64_t seed = 1;
    std::size_t memory_budget = 0;
    std::function<void(const SpectrumProgress&)> progress;
    std::function<bool()> stop;
};

// Columns of the basis of a Krylov start; 0: not worth it. half: of SolverSettings.
std::int64_t krylov_columns(std::int64_t nodes, std::int64_t wanted, std::int64_t half = 0);

// The interval on which a filter is small. Chebyshev polynomials outside [-1, 1] grow by exp(rate) a degree.
struct FilterInterval {
    double centre, half;
    FilterInterval(double cut, double upper) : centre((cut + upper) / 2), half((upper - cut) / 2) {}
    double rate(double value) const {
        const double x = (centre - value) / half;
        return x > 1 ? std::acosh(x) : 0;
    }
};

// factor diag(values), for rotate().
inline std::vector<double> diagonal_matrix(const std::vector<double>& values, double factor = 1) {
    std::vector<double> q(values.size() * values.size(), 0.0);
    for (std::size_t i = 0; i < values.size(); ++i) q[i * values.size() + i] = factor * values[i];
    return q;
}

struct SolverResult {
    bool complete = false;
    std::string why;                                               // not complete: why
    std::int64_t iterations = 0, products = 0, half_products = 0;  // half_products: those of them in half precision
    std::vector<double> eigenvalues, residuals;                    // [wanted]
    std::size_t peak_bytes = 0;
};

// Takes rows first to first + count of the vectors: rows[i * wanted + j] is of node first + i, pair j.
using VectorSink = std::function<void(const float* rows, std::int64_t first, std::int64_t count)>;

template <class Dev, class A>
class SubspaceSolver {
  public:
    // levels[0] is the graph itself. start: [nodes, start_columns] in the order of its nodes, or empty.
    SubspaceSolver(Dev&, const std::vector<SolverLevel<A>>& levels, const SolverSettings&);
    void set_tolerance(double tolerance) { set_.tolerance = tolerance; }
    // The vectors, complete or not, go to the sink piece by piece, in the order of the nodes.
    SolverResult solve(const std::vector<float>& start, std::int64_t start_columns, const VectorSink& sink);

    // From a few short Lanczos runs: about where eigenvalue number `count` of level 0 lies, and an upper bound of all.
    struct Estimate {
        double value = 0, upper = 0;
    };
    Estimate estimate(std::int64_t count);

  private:
    struct DeviceLevel {
        std::int64_t nodes = 0;
        SparseMatrix<A> matrix;
        Vec<A> null_vector;
        Vec<std::int64_t> components;
        Vec<std::int32_t> group;
        Vec<A> group_scale;
        double upper = 0;
        HalfOperator half = HalfOperator::weighted;  // of products in half precision
        double half_weight = 1;                      // what they leave out
    };
    struct Lanczos {
        std::vector<double> values, weights;  // Ritz values of all runs, squared first components (mean over runs)
        double upper = 0;
    };
    template <class>
    struct HalfSteps;  // a template, so that no solver in double has them
    void lay_out(Arena&);
    void upload();
    Mat<A> panel(Vec<A> block, std::int64_t first, std::int64_t columns) const;
    void copy_columns(Vec<A> to, std::int64_t to_column, Vec<A> from, std::int64_t column, std::int64_t columns);
    std::int64_t first_active() const { return (locked_ + 3) / 4 * 4; }  // column
    void product(Mat<A> y, Mat<const A> x, Mat<const A> z, double alpha, double beta, double gamma);
    void product_as_it_is(Mat<A> y, Mat<const A> x, Mat<const A> z, double alpha, double beta, double gamma);
    std::vector<double> gram(Mat<const A> x, Mat<const A> y);
    void rotate(Mat<A> y, Mat<const A> x, const std::vector<double>& q, double alpha, double beta);
    std::vector<double> norms(Mat<const A> w, Mat<const A> x, const std::vector<double>& theta);
    void deflate(Mat<A> x);
    void project(Mat<A> x, int times);
    void fill_random(Mat<A> x);
    Lanczos lanczos();

    void krylov();
    void extend_basis(std::int64_t before, std::int64_t columns);
    void report_basis(std::int64_t m);
    double basis_residual(const RitzResult&, std::int64_t m);
    RitzResult ritz_of(std::int64_t first, std::int64_t columns);
    void rayleigh_ritz();  // of the active columns of p_; leaves Ritz vectors in v_, spends p_ and q_
    // From column `first` of v_ on; the result is in p_.
    void filter(std::int64_t first, double cut, std::int64_t degree, double lowest);
    void filter_columns(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree, double lowest);
    void filter_panel(Mat<A> from, Mat<A> to, double cut, std::int64_t degree, double lowest);  // spends `from`
    template <class Block, class Product, class Project>
    void recurrence(Block old, Block now, double cut, std::int64_t degree, double lowest, double growth,
                    Product&& product, Project&& project);
    // filter_columns in f16: false if it left that range. Columns of v_ stay as they are.
    bool filter_half(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree, double lowest);
    void filter_half_panel(Mat<A> from, Mat<A> to, double cut, std::int64_t degree, double lowest);
    // The same for columns that are nearly Ritz vectors, with their values, almost without noise. Spends p_ and q_.
    bool filter_deviations(std::int64_t first, const std::vector<double>& theta, double cut, std::int64_t degree,
                           double lowest);
    std::vector<double> filter_deviations_panel(Mat<A> deviations, std::span<const double> theta, double cut,
                                                std::int64_t degree, double lowest);
    // Columns of v_ with Ritz values up to `last`, less the noise of half precision, to p_. lowest: of all pairs; if it is
    // far below the others, can_polish() is false. theta: about their values, or empty; then it is done in f32.
    bool can_polish(double lowest, double last) const;
    void polish(std::int64_t first, std::int64_t columns, double lowest, double last, const std::vector<double>& theta);
    // As filter_columns: in f16 where that is worth it, by deviations from theta if given, else polished. Spends the
    // columns of v_. False: in f32.
    bool filter_long(std::int64_t first, std::int64_t columns, double cut, std::int64_t degree, double lowest,
                     double last, const std::vector<double>& theta);
    std::int64_t choose_degree(double cut, double tolerance, double most_ratio) const;
    std::int64_t needed() const;
    double tolerance_now(double tolerance) const;
    std::int64_t converged(double tolerance) const;
    void lock(std::int64_t count);
    bool iterate(double tolerance, std::int64_t limit, const std::string& stage, bool final);
    bool probe(double tolerance);
    void start_level(std::size_t level);
    void join();
    void download(SolverResult&, const VectorSink&);
    void report(const std::string& stage, double tolerance);

    Dev& dev_;
    const std::vector<SolverLevel<A>>& levels_;
    SolverSettings set_;
    Arena arena_;
    std::vector<DeviceLevel> device_;
    Vec<A> v_, p_, q_, basis_, narrow_, apply_scratch_;
    Vec<float> half_scale_, half_scratch_;
    Vec<double> small_, norms_, theta_device_, scratch_;
    std::size_t level_ = 0;
    std::int64_t n_ = 0, locked_ = 0, active_ = 0;  // columns: locked ones from 0 on, active ones from first_active()
    std::int64_t iterations_ = 0, products_ = 0, half_products_ = 0, random_columns_ = 0;
    std::vector<double> locked_theta_, theta_, residual_;  // theta_, residual_: of the active columns
    double estimated_ = 0;  // by estimate(): about where the eigenvalue lies that it was asked for
    double started_ = 0, last_worst_ = 0, last_seconds_ = 0;
    bool stopped_ = false;
};

// Near the ends of [cut, upper] rounding errors of the recurrence add up to about degree^2 units in the last place.
template <class A>
constexpr std::int64_t kMostDegree = sizeof(A) == 4 ? 255 : 1501;
constexpr std::int64_t kFilterCheckEvery = 64;  // products between two questions whether to stop

// Filter of Zhou et al. (degree odd), scaled to 1 at `lowest`, from `old` to `now`; spends `old`. project(x, locked) takes
// rounding errors out of the null space, and out of the locked pairs too if asked, before they have grown by `growth`.
// Errors in the null space grow faster than those along the locked pairs, which are dear to project out.
template <class Dev, class A>
template <class Block, class Product, class Project>
void SubspaceSolver<Dev, A>::recurrence(Block old, Block now, double cut, std::int64_t degree, double lowest,
                                        double growth, Product&& product, Project&& project) {
    const FilterInterval interval(cut, device_[level_].upper);
    const double c = interval.centre, e = interval.half;
    const double below = locked_theta_.empty() ? 0 : *std::min_element(locked_theta_.begin(), locked_theta_.end());
    const auto steps = [&](double value) {
        const double rate = interval.rate(value) - interval.rate(lowest);
        return rate > 0 ? std::max<std::int64_t>(2, std::int64_t(std::min(std::log(growth) / rate, 1e9)))
                        : kMostDegree<A>;
    };
    const std::int64_t every = steps(0), every_locked = locked_ > 0 ? steps(below) : kMostDegree<A>;
    const double sigma1 = e / (lowest - c);
    double sigma = sigma1;
    product(now, old, Block{}, sigma1 / e, -c * sigma1 / e, 0.0);
    for (std::int64_t j = 2; j <= degree; ++j) {
        if (j % every_locked == 0)
            project(now, true), project(old, true);
        else if (j % every == 0)
            project(now, false), project(old, false);
        const double next = 1 / (2 / sigma1 - sigma);
        product(old, now, old, 2 * next / e, -2 * c * next / e, -sigma * next);
        std::swap(old, now);
        sigma = next;
        if (j % kFilterCheckEvery == 1 && (stopped_ || (set_.stop && set_.stop()))) {
            stopped_ = true;
            break;  // j is odd: the result is where it was asked for
        }
    }
}

}  // namespace fiedler
