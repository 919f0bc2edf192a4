// graph_conv: the formula over a list of entries, finite differences, permutations and batches of graphs, and the GPU
// around its groups, blocks, slices of types and long rows.
#include "kernels/graph_conv.h"

#include <algorithm>
#include <numeric>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

struct Entry {
    std::int32_t row, column, type;
    double coefficient;
};
using Entries = std::vector<Entry>;

struct Csr {
    std::vector<std::int32_t> offsets, columns;
    std::vector<std::uint8_t> types;
    std::vector<float> coefficients;

    Csr(Entries entries, std::int64_t nodes) : offsets(std::size_t(nodes) + 1, 0) {
        std::stable_sort(entries.begin(), entries.end(), [](auto& a, auto& b) { return a.row < b.row; });
        for (const Entry& e : entries) {
            ++offsets[std::size_t(e.row) + 1];
            columns.push_back(e.column);
            types.push_back(std::uint8_t(e.type));
            coefficients.push_back(float(e.coefficient));
        }
        std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    }
};
Entries transposed(Entries entries) {
    for (Entry& e : entries) std::swap(e.row, e.column);
    std::stable_sort(entries.begin(), entries.end(), [](auto& a, auto& b) { return a.column < b.column; });
    return entries;
}

struct Shape {
    std::int64_t nodes, channels;
    std::int32_t types;
    double degree;         // entries per node, on average
    std::int32_t hub = 0;  // entries of node nodes / 2 beside those
    bool plain = false;    // neither types nor coefficients
};

struct Problem {
    std::int64_t nodes, channels, types;
    Entries entries;
    bool plain = false;
    Values x, dy, w, dw0;

    Problem(std::int64_t n, std::int64_t c, std::int64_t t, Entries e)
        : nodes(n), channels(c), types(t), entries(std::move(e)) {
        x = random_values(std::size_t(n * c), 1);
        dy = random_values(std::size_t(n * c), 2);
        w = random_values(std::size_t((t + 1) * c), 3);
        dw0 = random_values(std::size_t((t + 1) * c), 4, 10.0);
    }
    explicit Problem(const Shape& s) : Problem(s.nodes, s.channels, s.types, random_entries(s)) { plain = s.plain; }
    static Entries random_entries(const Shape& s) {
        const auto count = std::size_t(s.degree * double(s.nodes)), all = count + std::size_t(s.hub);
        const auto rows = random_ints(all, 5, 0, std::int32_t(s.nodes)),
                   columns = random_ints(all, 6, 0, std::int32_t(s.nodes)), kinds = random_ints(all, 7, 0, s.types);
        const Values values = round_to<float>(random_values(all, 8));
        Entries e;
        for (std::size_t k = 0; k < all; ++k)
            e.push_back({k < count ? rows[k] : std::int32_t(s.nodes / 2), columns[k], s.plain ? 0 : kinds[k],
                         s.plain ? 1 : values[k]});
        return e;
    }
    template <class T, class X = T>
    Problem& round() {
        x = round_to<X>(x);
        dy = round_to<T>(dy);
        for (Values* v : {&w, &dw0}) *v = round_to<acc_t<T>>(*v);
        return *this;
    }
    // body(row of w, i, j, s) for what node i takes of node j, its own row included.
    template <class Body>
    void for_terms(Body&& body) const {
        for (std::int64_t i = 0; i < nodes; ++i) body(std::int64_t(0), i, i, 1.0);
        for (const Entry& e : entries)
            body(std::int64_t(e.type + 1), std::int64_t(e.row), std::int64_t(e.column), e.coefficient);
    }
    double& at(Values& v, std::int64_t row, std::int64_t c) const { return v[std::size_t(row * channels + c)]; }
    double at(const Values& v, std::int64_t row, std::int64_t c) const { return v[std::size_t(row * channels + c)]; }
    Values naive_forward() const {
        Values y(x.size(), 0.0);
        for_terms([&](auto t, auto i, auto j, double s) {
            for (std::int64_t c = 0; c < channels; ++c) at(y, i, c) += s * at(w, t, c) * at(x, j, c);
        });
        return y;
    }
    Values naive_dx() const {
        Values dx(x.size(), 0.0);
        for_terms([&](auto t, auto i, auto j, double s) {
            for (std::int64_t c = 0; c < channels; ++c) at(dx, j, c) += s * at(w, t, c) * at(dy, i, c);
        });
        return dx;
    }
    Values naive_dw() const {
        Values dw = dw0;
        for_terms([&](auto t, auto i, auto j, double s) {
            for (std::int64_t c = 0; c < channels; ++c) at(dw, t, c) += s * at(x, j, c) * at(dy, i, c);
        });
        return dw;
    }
};

// A graph in the memory of Dev.
template <class Dev>
struct Placed {
    Buffer<std::int32_t, Dev> offsets, columns;
    Buffer<std::uint8_t, Dev> types;
    Buffer<float, Dev> coefficients;
    bool plain;
    Placed(const Dev& dev, const Csr& g, bool without)
        : offsets(dev, g.offsets),
          columns(dev, g.columns),
          types(dev, g.types),
          coefficients(dev, g.coefficients),
          plain(without) {}
    Adjacency graph() const {
        Adjacency a{offsets.vec(), columns.vec(), {}, {}};
        if (!plain) a.types = types.vec(), a.coefficients = coefficients.vec();
        return a;
    }
};

template <class T, class Dev>
Values forward(const Dev& dev, const Problem& q, std::int64_t gap = 0) {
    const Placed<Dev> placed(dev, Csr(q.entries, q.nodes), q.plain);
    const Padded<T, Dev> x(dev, q.nodes, q.channels, q.channels + gap, q.x),
        y(dev, q.nodes, q.channels, q.channels + 2 * gap);
    const Padded<acc_t<T>, Dev> w(dev, q.types + 1, q.channels, q.channels + gap, q.w);
    graph_conv_forward(dev, GraphConvForward<T>{y.mat(), x.mat(), w.mat(), placed.graph()});
    return y.values();
}

struct Gradients {
    Values dx, dw;
};
template <class T, class X = T, class Dev>
Gradients backward(const Dev& dev, const Problem& q, std::int64_t gap = 0) {
    const Placed<Dev> placed(dev, Csr(transposed(q.entries), q.nodes), q.plain);
    const Padded<X, Dev> x(dev, q.nodes, q.channels, q.channels + gap, q.x);
    const Padded<T, Dev> dy(dev, q.nodes, q.channels, q.channels + 2 * gap, q.dy),
        dx(dev, q.nodes, q.channels, q.channels + 3 * gap);
    const Padded<acc_t<T>, Dev> w(dev, q.types + 1, q.channels, q.channels + gap, q.w),
        dw(dev, q.types + 1, q.channels, q.channels + 2 * gap, q.dw0);
    const Buffer<acc_t<T>, Dev> scratch(dev, std::size_t(graph_conv_scratch_elements(q.nodes, q.types, q.channels)));
    graph_conv_backward(
        dev, GraphConvBackward<T, X>{dx.mat(), dw.mat(), dy.mat(), x.mat(), w.mat(), placed.graph(), scratch.vec()});
    return {dx.values(), dw.values()};
}

const std::vector<Shape> kShapes = {{1, 1, 1, 0},         {3, 7, 2, 2},           {7, 8, 1, 3, 0, true},
                                    {64, 5, 4, 2.2, 300}, {300, 33, 5, 4, 0},     {65, 3, 256, 9},
                                    {40, 2, 3, 0.3},      {20, 4, 2, 0, 70, true}};

TEST(GraphConv, DoubleMatchesNaiveLoopsAndFloatFollows) {
    const Cpu cpu;
    for (const Shape& s : kShapes) {
        SCOPED_TRACE(testing::Message() << s.nodes << " x " << s.channels);
        const Problem q = Problem(s).round<float>();
        EXPECT_TRUE(close_to(forward<double>(cpu, q, 3), q.naive_forward(), 1e-13));
        EXPECT_TRUE(close_to(forward<float>(cpu, q, 3), q.naive_forward(), 2e-6));
        const Gradients d = backward<double>(cpu, q, 3), f = backward<float>(cpu, q, 3);
        EXPECT_TRUE(close_to(d.dx, q.naive_dx(), 1e-13));
        EXPECT_TRUE(close_to(d.dw, q.naive_dw(), 1e-13));
        EXPECT_TRUE(close_to(f.dx, q.naive_dx(), 2e-6));
        EXPECT_TRUE(close_to(f.dw, q.naive_dw(), 5e-6));
    }
}

TEST(GraphConv, IdentityWeightsCopy) {
    Problem q(Shape{50, 6, 3, 4});
    for (std::size_t i = 0; i < q.w.size(); ++i) q.w[i] = i < 6;
    EXPECT_EQ(forward<double>(Cpu{}, q), q.x);
    EXPECT_EQ(backward<double>(Cpu{}, q).dx, q.dy);
}

TEST(GraphConv, GradientsMatchFiniteDifferences) {
    Problem q(Shape{9, 3, 2, 2.5});
    q.dw0.assign(q.dw0.size(), 0.0);
    const Gradients g = backward<double>(Cpu{1}, q);
    const auto objective = [&] { return inner(q.dy, forward<double>(Cpu{1}, q)); };
    EXPECT_TRUE(gradient_matches(g.dx, q.x, objective));
    EXPECT_TRUE(gradient_matches(g.dw, q.w, objective));
}

// Edges of a path in both directions; coefficients by `value(degree of row, degree of column)`.
template <class Value>
Entries path(std::int32_t nodes, Value&& value) {
    const auto degree = [&](std::int32_t i) { return double((i > 0) + (i + 1 < nodes)); };
    Entries e;
    for (std::int32_t i = 0; i + 1 < nodes; ++i)
        for (const auto& [a, b] : {std::pair{i, i + 1}, std::pair{i + 1, i}})
            e.push_back({a, b, i % 2, value(degree(a), degree(b))});
    return e;
}

// The arrays of an undirected graph serve both passes; a mean's coefficients swap the degrees.
TEST(GraphConv, UndirectedGraphNeedsNoTransposition) {
    const auto same_arrays = [](const Csr& a, const Csr& b) {
        EXPECT_EQ(a.offsets, b.offsets);
        EXPECT_EQ(a.columns, b.columns);
        EXPECT_EQ(a.types, b.types);
        EXPECT_EQ(a.coefficients, b.coefficients);
    };
    const Entries symmetric = path(9, [](double a, double b) { return 1 / std::sqrt(a * b); });
    const Entries mean = path(9, [](double a, double) { return 1 / a; });
    const Entries swapped = path(9, [](double, double b) { return 1 / b; });
    same_arrays(Csr(transposed(symmetric), 9), Csr(symmetric, 9));
    same_arrays(Csr(transposed(mean), 9), Csr(swapped, 9));
}

// Nodes renamed, the order of each row's entries kept or not: outputs move with their nodes.
template <class T, class Dev>
void expect_permutation_moves_outputs(const Dev& dev, double tolerance) {
    const Problem q = Problem(Shape{60, 8, 3, 3}).round<T>();
    std::vector<std::int32_t> to(60);
    std::iota(to.begin(), to.end(), 0);
    std::rotate(to.begin(), to.begin() + 17, to.end());
    std::swap(to[3], to[50]);
    Problem moved = q;
    for (Entry& e : moved.entries) e.row = to[std::size_t(e.row)], e.column = to[std::size_t(e.column)];
    std::reverse(moved.entries.begin(), moved.entries.end());
    for (std::int64_t i = 0; i < 60; ++i)
        for (std::int64_t c = 0; c < 8; ++c) {
            moved.at(moved.x, to[std::size_t(i)], c) = q.at(q.x, i, c);
            moved.at(moved.dy, to[std::size_t(i)], c) = q.at(q.dy, i, c);
        }
    const auto back = [&](const Values& v) {
        Values r(v.size());
        for (std::int64_t i = 0; i < 60; ++i)
            for (std::int64_t c = 0; c < 8; ++c) q.at(r, i, c) = q.at(v, to[std::size_t(i)], c);
        return r;
    };
    EXPECT_TRUE(close_to(back(forward<T>(dev, moved)), forward<T>(dev, q), tolerance));
    EXPECT_TRUE(close_to(back(backward<T>(dev, moved).dx), backward<T>(dev, q).dx, tolerance));
}
TEST(GraphConv, PermutationMovesOutputs) { expect_permutation_moves_outputs<double>(Cpu{}, 1e-13); }

// A graph alone and the same graph as one of many: the same bits.
template <class T, class Dev>
void expect_batch_does_not_matter(const Dev& dev, const Shape& shape, std::int64_t before, std::int64_t after) {
    const Problem one = Problem(shape).round<T>();
    const std::int64_t nodes = before + shape.nodes + after, c = shape.channels;
    Problem many = Problem(Shape{nodes, c, shape.types, 0}).round<T>();
    many.w = one.w, many.plain = one.plain;
    const auto first = std::ptrdiff_t(before * c);
    std::copy(one.x.begin(), one.x.end(), many.x.begin() + first);
    std::copy(one.dy.begin(), one.dy.end(), many.dy.begin() + first);
    for (std::int32_t i = 0; i + 1 < before; ++i) many.entries.push_back({i, i + 1, 0, 1.0});
    for (Entry e : one.entries) {
        e.row += std::int32_t(before), e.column += std::int32_t(before);
        many.entries.push_back(e);
    }
    for (auto i = std::int32_t(nodes - after); i + 1 < nodes; ++i) many.entries.push_back({i + 1, i, 0, 1.0});
    const auto part = [&](const Values& v) {
        return Values(v.begin() + first, v.begin() + first + std::ptrdiff_t(shape.nodes * c));
    };
    EXPECT_EQ(part(forward<T>(dev, many)), forward<T>(dev, one));
    EXPECT_EQ(part(backward<T>(dev, many).dx), backward<T>(dev, one).dx);
}
TEST(GraphConv, BatchDoesNotMatter) {
    expect_batch_does_not_matter<float>(Cpu{}, {25, 9, 4, 2.2}, 31, 50);
    expect_batch_does_not_matter<double>(Cpu{}, {25, 9, 4, 2.2, 300}, 300, 0);
}

TEST(GraphConv, DoesNotDependOnThreads) {
    const Problem q(Shape{700, 24, 3, 3, 400});
    const Gradients one = backward<float>(Cpu{1}, q), many = backward<float>(Cpu{5}, q);
    EXPECT_EQ(one.dx, many.dx);
    EXPECT_EQ(one.dw, many.dw);
}

TEST(GraphConv, BrokenContractThrows) {
    const Problem good(Shape{6, 2, 2, 2});
    EXPECT_NO_THROW(forward<float>(Cpu{}, good));
    for (const Entry bad : {Entry{0, 6, 0, 1}, Entry{0, -1, 0, 1}, Entry{0, 1, 2, 1}}) {
        Problem q = good;
        q.entries.push_back(bad);
        EXPECT_THROW(forward<float>(Cpu{}, q), ContractError);
    }
    Values x(8), y(8), w(6);
    std::vector<std::int32_t> offsets(4, 0);
    const auto run = [&](std::int64_t size, std::int64_t types) {
        graph_conv_forward(
            Cpu{},
            GraphConvForward<double>{
                {y.data(), 4, 2}, {x.data(), 4, 2}, {w.data(), types + 1, 2}, {{offsets.data(), size}, {}, {}, {}}});
    };
    offsets.push_back(0);
    EXPECT_NO_THROW(run(5, 2));
    EXPECT_THROW(run(4, 2), ContractError);
    EXPECT_THROW(run(5, 0), ContractError);
}

#if FIEDLER_CUDA
// Nodes around groups (4, 8, 16) and blocks (64), channels around a block's 32, 64 and 128 and of every width, more rows
// of w than one slice holds, rows around and far beyond what one group sums alone.
const std::vector<Shape> kGpuShapes = {{1, 8, 1, 0},
                                       {1, 8, 1, 3},
                                       {3, 16, 2, 2},
                                       {7, 64, 4, 2.2},
                                       {8, 72, 4, 2.2},
                                       {9, 128, 4, 2.2},
                                       {15, 136, 5, 2},
                                       {16, 120, 3, 3},
                                       {17, 8, 1, 3, 0, true},
                                       {63, 64, 4, 2.2},
                                       {64, 128, 4, 2.2},
                                       {65, 384, 4, 2.2},
                                       {129, 1152, 4, 2.2},
                                       {514, 64, 9, 4},
                                       {300, 32, 10, 3},
                                       {300, 40, 11, 3},
                                       {200, 24, 256, 20},
                                       {100, 64, 1, 3, 127, true},
                                       {100, 64, 1, 0, 128, true},
                                       {100, 128, 3, 0, 129},
                                       {100, 136, 3, 2, 5000},
                                       {20, 8, 2, 400},
                                       {50, 12, 3, 3},
                                       {50, 7, 3, 3, 300},
                                       {33, 1, 2, 2},
                                       {70, 100, 4, 2},
                                       {4000, 64, 4, 2.2}};

template <class T>
void check_gpu_forward() {
    for (const Shape& s : kGpuShapes)
        for (const std::int64_t gap : {8, 3}) {
            SCOPED_TRACE(testing::Message()
                         << s.nodes << " x " << s.channels << ", types " << s.types << ", gap " << gap);
            const Problem q = Problem(s).round<T>();
            const Values got = forward<T>(gpu(), q, gap);
            EXPECT_TRUE(close(got, forward<double>(Cpu{}, q), round_to<T>(forward<float>(Cpu{}, q))));
            EXPECT_EQ(got, forward<T>(gpu(), q, gap));
        }
}
TEST(GraphConv, GpuForwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_gpu_forward<bf16>();
}
TEST(GraphConv, GpuForwardOfScalarsMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_gpu_forward<float>();
}

template <class T, class X>
void check_gpu_backward() {
    for (const Shape& s : kGpuShapes)
        for (const std::int64_t gap : {8, 3}) {
            SCOPED_TRACE(testing::Message()
                         << s.nodes << " x " << s.channels << ", types " << s.types << ", gap " << gap);
            const Problem q = Problem(s).round<T, X>();
            const Gradients ref = backward<double>(Cpu{}, q), low = backward<float>(Cpu{}, q),
                            got = backward<T, X>(gpu(), q, gap), again = backward<T, X>(gpu(), q, gap);
            EXPECT_TRUE(close(got.dx, ref.dx, round_to<T>(low.dx)));
            EXPECT_TRUE(close(got.dw, ref.dw, low.dw));
            EXPECT_EQ(got.dx, again.dx);
            EXPECT_EQ(got.dw, again.dw);
        }
}
TEST(GraphConv, GpuBackwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_gpu_backward<bf16, bf16>();
}
TEST(GraphConv, GpuBackwardOfScalarsMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_gpu_backward<bf16, float>();
    check_gpu_backward<float, float>();
}

TEST(GraphConv, GpuManyBlocks) {  // more nodes to a block than kGraphConvBlockNodes
    FIEDLER_GPU_OR_SKIP();
    const Problem q = Problem(Shape{150000, 8, 2, 2, 3000}).round<bf16>();
    const Gradients ref = backward<double>(Cpu{}, q), low = backward<float>(Cpu{}, q), got = backward<bf16>(gpu(), q);
    EXPECT_TRUE(close(got.dx, ref.dx, round_to<bf16>(low.dx)));
    EXPECT_TRUE(close(got.dw, ref.dw, low.dw));
}

TEST(GraphConv, GpuPermutationMovesOutputs) {
    FIEDLER_GPU_OR_SKIP();
    expect_permutation_moves_outputs<float>(gpu(), 1e-6);
    expect_permutation_moves_outputs<bf16>(gpu(), 8e-3);
}
TEST(GraphConv, GpuBatchDoesNotMatter) {
    FIEDLER_GPU_OR_SKIP();
    expect_batch_does_not_matter<bf16>(gpu(), {25, 64, 4, 2.2}, 31, 500);
    expect_batch_does_not_matter<bf16>(gpu(), {25, 136, 4, 2.2, 700}, 1001, 3);
    expect_batch_does_not_matter<float>(gpu(), {25, 12, 4, 2.2, 700}, 77, 0);
}
TEST(GraphConv, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q(Shape{4, 8, 2, 2});
    const Buffer<bf16, Cuda> x(gpu(), q.x), y(gpu(), 32);
    const Buffer<float, Cuda> w(gpu(), q.w);
    const Placed<Cuda> placed(gpu(), Csr(q.entries, 4), false);
    GraphConvBackward<bf16> p{y.mat(4, 8), w.mat(3, 8), x.mat(4, 8), x.mat(4, 8), w.mat(3, 8), placed.graph(), {}};
    EXPECT_THROW(graph_conv_backward(gpu(), p), ContractError);  // no scratch
}
#endif

}  // namespace
}  // namespace fiedler::test
