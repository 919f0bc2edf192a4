#include "engine/spectrum_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>

#include "engine/files.h"
#include "engine/rng.h"

namespace fiedler {

namespace {

constexpr std::uint64_t kSampleSeed = 3;
constexpr std::size_t kMostNamed = 4000;  // nodes that carry their name: a browser shows it, but it costs bytes

std::string grouped(std::int64_t n) {  // 5278 -> "5,278"
    std::string text = std::to_string(n);
    for (std::ptrdiff_t at = std::ssize(text) - 3; at > 0; at -= 3) text.insert(static_cast<std::size_t>(at), ",");
    return text;
}

// ---- vectors of the largest component -----------------------------------------------------------------------------------

struct Embedding {
    std::vector<std::int32_t> nodes;           // of the component, ascending
    std::vector<std::vector<double>> vectors;  // up to three, [nodes], unit norm on the component
};

Embedding largest_nodes(const Components& components) {
    const auto largest = std::max_element(components.sizes.begin(), components.sizes.end()) - components.sizes.begin();
    Embedding e;
    for (std::size_t i = 0; i < components.of_node.size(); ++i)
        if (components.of_node[i] == largest) e.nodes.push_back(static_cast<std::int32_t>(i));
    return e;
}

// What an eigenvector of the whole graph is on one component is zero or an eigenvector there. Where components share an
// eigenvalue, several may be the same one.
void add_vectors(Embedding& e, const Spectrum& s) {
    constexpr double kLeastMass = 1e-3, kLeastNew = 0.1;
    const std::int64_t k = s.count(), first = std::min(k, s.eigenvalues.empty() || s.eigenvalues[0] > 0 ? 0 : s.zeros);
    for (std::int64_t j = first; j < k && e.vectors.size() < 3; ++j) {
        std::vector<double> v;
        for (const std::int32_t i : e.nodes) v.push_back(s.vectors[static_cast<std::size_t>(i * k + j)]);
        const double mass = std::inner_product(v.begin(), v.end(), v.begin(), 0.0);
        if (!(mass > kLeastMass)) continue;  // also of NaN
        for (double& x : v) x /= std::sqrt(mass);
        double left = 1;
        for (const auto& u : e.vectors) left -= std::pow(std::inner_product(v.begin(), v.end(), u.begin(), 0.0), 2);
        if (left > kLeastNew) e.vectors.push_back(std::move(v));
    }
}

std::vector<double> node_degrees(const Graph& g, const std::vector<std::int32_t>& nodes) {
    std::vector<double> degrees;
    for (const std::int32_t i : nodes) {
        const auto row = static_cast<std::size_t>(i);
        degrees.push_back(
            std::accumulate(g.weights.begin() + g.offsets[row], g.weights.begin() + g.offsets[row + 1], 0.0));
    }
    return degrees;
}

double quantile(std::vector<double> values, double share) {
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(values.size() - 1));
    std::nth_element(values.begin(), at, values.end());
    return *at;
}

// A few nodes at the ends of long tails would press all others into one point: then distances from the median are drawn
// as asinh, linear near it and logarithmic far away. True when that was done.
bool spread(std::vector<double>& v) {
    constexpr double kTail = 6;
    const double middle = quantile(v, 0.5);
    std::vector<double> distance;
    for (const double x : v) distance.push_back(std::abs(x - middle));
    const double most = quantile(distance, 1), usual = quantile(distance, 0.9);
    if (most <= kTail * usual) return false;
    const double unit = std::max(quantile(distance, 0.5), most * 1e-6);
    for (double& x : v) x = std::asinh((x - middle) / unit);
    return true;
}

// ---- the panels -----------------------------------------------------------------------------------------------------------

CurvePanel curve_of(const Spectrum& s) {
    CurvePanel c;
    const bool with_zeros = !s.eigenvalues.empty() && s.eigenvalues[0] <= 0 && s.zeros > 0;
    c.title = fmt::format("The {} smallest eigenvalues", s.count());
    if (!with_zeros) c.title += fmt::format(" beyond {} zero{}", grouped(s.zeros), s.zeros == 1 ? "" : "s");
    c.eigenvalues = s.eigenvalues;
    c.zeros = with_zeros ? std::min(s.zeros, s.count()) : 0;
    c.first_index = with_zeros ? 1 : s.zeros + 1;
    if (c.zeros < s.count())
        c.gap = fmt::format("spectral gap {:.3g}", s.eigenvalues[static_cast<std::size_t>(c.zeros)]);
    return c;
}

// Classes by frequency; those beyond the colours are one, and nodes without a label are of it, too.
void colour_by_label(LayoutPanel& p, const std::vector<std::string>& labels, const std::vector<std::int32_t>& nodes) {
    const auto unlabelled = [](const std::string& l) { return l.empty() || l == "-1"; };
    std::map<std::string, std::int64_t> counts;
    for (const std::int32_t i : nodes)
        if (const std::string& l = labels[static_cast<std::size_t>(i)]; !unlabelled(l)) ++counts[l];
    std::vector<std::pair<std::string, std::int64_t>> order(counts.begin(), counts.end());
    std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
    const auto most = static_cast<std::size_t>(kClassColours - 1);
    std::map<std::string, std::int32_t> number;
    for (std::size_t c = 0; c < std::min(order.size(), most); ++c) {
        number[order[c].first] = static_cast<std::int32_t>(c);
        p.class_names.push_back(order[c].first);
    }
    bool others = false;
    for (const std::int32_t i : nodes) {
        const auto found = number.find(labels[static_cast<std::size_t>(i)]);
        p.class_of.push_back(found != number.end() ? found->second : kClassColours - 1);
        others = others || found == number.end();
    }
    if (!others) return;
    p.class_names.resize(static_cast<std::size_t>(kClassColours));  // names between stay empty: no node has them
    p.class_names.back() = order.size() > most ? fmt::format("{} others", order.size() - most) : "no label";
}

void colour_by_value(LayoutPanel& p, std::vector<double> v, const std::string& name, bool with_range) {
    const auto [low, high] = std::minmax_element(v.begin(), v.end());
    p.value_name = with_range ? fmt::format("{}, {:.3g} to {:.3g}", name, *low, *high) : name;
    if (!with_range) spread(v);
    const auto [first, last] = std::minmax_element(v.begin(), v.end());
    const double from = *first, range = std::max(*last - from, 1e-300);
    for (const double x : v) p.value.push_back(static_cast<float>((x - from) / range));
}

void colour_by_vector(LayoutPanel& p, const Embedding& e) {
    const bool third = e.vectors.size() > 2;
    colour_by_value(p, third ? e.vectors[2] : e.vectors[0], third ? "third eigenvector" : "first eigenvector", false);
}

// Keeps every item with the same chance, in order; the same ones each time.
template <class T>
void sample(std::vector<T>& items, std::size_t most) {
    if (items.size() <= most) return;
    const double share = static_cast<double>(most) / static_cast<double>(items.size());
    std::size_t kept = 0;
    for (std::size_t i = 0; i < items.size(); ++i)
        if (rng::uniform(kSampleSeed, 0, i) < share) items[kept++] = items[i];
    items.resize(kept);
}

// Edges between the nodes that are drawn, each once.
std::vector<std::pair<std::int32_t, std::int32_t>> edges_between(const Graph& g,
                                                                 const std::vector<std::int32_t>& nodes) {
    std::vector<std::int32_t> place(static_cast<std::size_t>(g.nodes), -1);
    for (std::size_t p = 0; p < nodes.size(); ++p)
        place[static_cast<std::size_t>(nodes[p])] = static_cast<std::int32_t>(p);
    std::vector<std::pair<std::int32_t, std::int32_t>> edges;
    for (std::size_t p = 0; p < nodes.size(); ++p) {
        const auto row = static_cast<std::size_t>(nodes[p]);
        for (std::int64_t e = g.offsets[row]; e < g.offsets[row + 1]; ++e) {
            const std::int32_t q = place[static_cast<std::size_t>(g.columns[static_cast<std::size_t>(e)])];
            if (q > static_cast<std::int32_t>(p)) edges.emplace_back(static_cast<std::int32_t>(p), q);
        }
    }
    return edges;
}

struct Drawn {
    bool spread = false;
    std::size_t nodes = 0, all_nodes = 0, edges = 0, all_edges = 0;
};

LayoutPanel layout_of(const Graph& g, const Components& components, const Spectrum& s, const PlotOptions& o,
                      Drawn& drawn) {
    LayoutPanel p;
    p.title = "Spectral layout";
    if (g.nodes == 0) return p;
    Embedding e = largest_nodes(components);
    if (components.count > 1)
        p.title +=
            fmt::format(" of the largest component ({} of {} nodes)", grouped(std::ssize(e.nodes)), grouped(g.nodes));
    if (e.nodes.size() < 3) {
        p.absent = "a layout needs a component of three nodes";
        return p;
    }
    add_vectors(e, s);
    if (e.vectors.size() < 2) {
        p.absent = "needs two vectors of this component beyond its zero: raise -k";
        return p;
    }
    drawn.all_nodes = e.nodes.size();
    if (s.kind == LaplacianKind::normalised) {
        const std::vector<double> degrees = node_degrees(g, e.nodes);
        for (auto& v : e.vectors)
            for (std::size_t i = 0; i < v.size(); ++i) v[i] /= std::sqrt(degrees[i]);
    }
    for (int axis : {0, 1}) drawn.spread = spread(e.vectors[static_cast<std::size_t>(axis)]) || drawn.spread;
    std::vector<std::size_t> kept(e.nodes.size());
    std::iota(kept.begin(), kept.end(), std::size_t{0});
    sample(kept, o.most_nodes);
    if (o.labels.empty() && o.values.empty()) colour_by_vector(p, e);
    if (o.labels.empty() && !o.values.empty()) {
        std::vector<double> v;
        for (const std::int32_t i : e.nodes) v.push_back(o.values[static_cast<std::size_t>(i)]);
        colour_by_value(p, v, o.value_name, true);
    }
    Embedding shown;
    std::vector<float> value;
    for (const std::size_t i : kept) {
        shown.nodes.push_back(e.nodes[i]);
        p.x.push_back(static_cast<float>(e.vectors[0][i]));
        p.y.push_back(static_cast<float>(e.vectors[1][i]));
        if (!p.value.empty()) value.push_back(p.value[i]);
    }
    p.value = std::move(value);
    if (!o.labels.empty()) colour_by_label(p, o.labels, shown.nodes);
    if (shown.nodes.size() <= kMostNamed)
        for (const std::int32_t i : shown.nodes)
            p.names.push_back((g.names.empty() ? std::to_string(i) : g.names[static_cast<std::size_t>(i)]) +
                              (o.labels.empty() ? "" : ": " + o.labels[static_cast<std::size_t>(i)]));
    p.same_scale = !drawn.spread;
    p.edges = edges_between(g, shown.nodes);
    drawn.all_edges = p.edges.size();
    sample(p.edges, o.most_edges);
    drawn.nodes = shown.nodes.size();
    drawn.edges = p.edges.size();
    return p;
}

std::string caption_of(const Spectrum& s, const Drawn& drawn) {
    std::string text = "Position: the first two eigenvectors beyond the zeros";
    if (s.kind == LaplacianKind::normalised) text += ", divided by the root of the degree";
    if (drawn.spread) text += "; far nodes drawn nearer (asinh)";
    text += ".";
    if (drawn.nodes < drawn.all_nodes)
        text += fmt::format(" Drawn: {} of {} nodes, sampled.", grouped(static_cast<std::int64_t>(drawn.nodes)),
                            grouped(static_cast<std::int64_t>(drawn.all_nodes)));
    if (drawn.edges < drawn.all_edges)
        text += fmt::format(" Drawn: {} of the {} edges between them, sampled.",
                            grouped(static_cast<std::int64_t>(drawn.edges)),
                            grouped(static_cast<std::int64_t>(drawn.all_edges)));
    return text;
}

}  // namespace

SpectrumPlot plot_of(const Graph& g, const Spectrum& s, const PlotOptions& o) {
    const auto nodes = static_cast<std::size_t>(g.nodes);
    if (s.nodes != g.nodes || s.vectors.size() != nodes * s.eigenvalues.size() ||
        !(o.labels.empty() || o.labels.size() == nodes) || !(o.values.empty() || o.values.size() == nodes))
        throw std::logic_error("plot: the spectrum or the labels are of another graph");
    const Components components = find_components(g);
    SpectrumPlot p;
    Drawn drawn;
    p.title = o.title;
    p.subtitle = fmt::format("{} nodes, {} edges, {} component{}; {} Laplacian, {} pairs{}", grouped(g.nodes),
                             grouped(g.edges()), grouped(components.count), components.count == 1 ? "" : "s",
                             name_of(s.kind), grouped(s.count()),
                             s.status == SpectrumStatus::partial ? " (a PARTIAL result: not all converged)" : "");
    p.curve = curve_of(s);
    p.layout = layout_of(g, components, s, o, drawn);
    if (p.layout.absent.empty()) p.caption = caption_of(s, drawn);
    return p;
}

}  // namespace fiedler
