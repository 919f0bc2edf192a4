// Names: direction nodes x channels, types: molecules (a path of 25 nodes each, 4 types), or one graph whose nodes have
// 16 random neighbours of one type; scalars are f32.
#include "kernels/graph_conv.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Graph {
    std::vector<std::int32_t> offsets{0}, columns;
    std::vector<std::uint8_t> types;
    std::int64_t nodes() const { return std::int64_t(offsets.size()) - 1; }
};
Graph molecules(std::int32_t count) {
    constexpr std::int32_t kNodes = 25;
    Graph g;
    for (std::int32_t i = 0; i < count * kNodes; ++i) {
        const std::int32_t place = i % kNodes;
        if (place > 0) g.columns.push_back(i - 1), g.types.push_back(std::uint8_t((place - 1) % 4));
        if (place + 1 < kNodes) g.columns.push_back(i + 1), g.types.push_back(std::uint8_t(place % 4));
        g.offsets.push_back(std::int32_t(g.columns.size()));
    }
    return g;
}
Graph network(std::int32_t nodes) {
    Graph g;
    std::uint64_t state = 1;
    for (std::int32_t i = 0; i < nodes; ++i) {
        for (int k = 0; k < 16; ++k) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            g.columns.push_back(std::int32_t((state >> 33) % std::uint64_t(nodes)));
        }
        g.offsets.push_back(std::int32_t(g.columns.size()));
    }
    return g;
}

template <class T>
void add(Suite& suite, const std::string& name, const Graph& g, std::int64_t types, std::int64_t channels) {
    const std::int64_t nodes = g.nodes(), n = nodes * channels,
                       scratch = graph_conv_scratch_elements(nodes, types, channels);
    const Adjacency graph{suite.copy_of(g.offsets),
                          suite.copy_of(g.columns),
                          g.types.empty() ? Vec<const std::uint8_t>() : suite.copy_of(g.types),
                          {}};
    const auto input = [&] { return Mat<const T>(suite.random<T>(n), nodes, channels); };
    const Mat<const Accum> w(suite.random<Accum>((types + 1) * channels), types + 1, channels);
    const Mat<Accum> dw(suite.zeros<Accum>((types + 1) * channels), types + 1, channels);
    const Mat<T> out(suite.zeros<T>(n), nodes, channels);
    const GraphConvForward<T> f{out, input(), w, graph};
    const GraphConvBackward<T> b{out, dw, input(), f.x, w, graph, {suite.zeros<Accum>(scratch), scratch}};
    const std::string shape = std::to_string(nodes) + "x" + std::to_string(channels) + " " + name;
    suite.add("forward " + shape, traffic(f), [f, &suite] { graph_conv_forward(suite.device, f); });
    suite.add("backward " + shape, traffic(b), [b, &suite] { graph_conv_backward(suite.device, b); });
}

}  // namespace

FIEDLER_BENCH(graph_conv) {
    const Graph small = molecules(suite.small ? 100 : 4096), large = network(suite.small ? 2000 : 200000);
    for (const std::int64_t channels : {std::int64_t(64), std::int64_t(128)})
        add<Storage>(suite, "molecules, 4 types", small, 4, channels);
    add<Accum>(suite, "molecules, 4 types, scalars", small, 4, 64);
    add<Storage>(suite, "network, 1 type", large, 1, 64);
}

}  // namespace fiedler::bench
