// bag: sparse rows times a table in naive loops, its gradient, the transposed matrix, and the GPU around its groups and
// pieces.
#include "kernels/bag.h"

#include <numeric>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

struct Shape {
    std::int64_t rows, features, channels;
    double entries;          // a row, on average
    double skew = 1;         // above 1: few features take most entries
    std::int32_t heavy = 0;  // entries of row rows / 2 beside those
    bool plain = false;      // no values
};

struct Problem {
    std::int64_t rows, features, channels;
    std::vector<std::int32_t> offsets, columns;
    std::vector<float> values;  // empty: all 1
    Values table, x0, dx, dtable0;

    explicit Problem(const Shape& s) : rows(s.rows), features(s.features), channels(s.channels) {
        const auto count = std::size_t(s.entries * double(s.rows)), all = count + std::size_t(s.heavy);
        offsets.assign(std::size_t(rows) + 1, 0);
        for (const std::int32_t r : random_ints(count, 5, 0, std::int32_t(rows))) ++offsets[std::size_t(r) + 1];
        offsets[std::size_t(rows / 2) + 1] += s.heavy;
        std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
        for (const double u : random_uniform(all, 6, 0, 1))
            columns.push_back(std::int32_t(std::pow(u, s.skew) * double(features)));
        if (!s.plain) values = to<float>(random_values(all, 7));
        table = random_values(std::size_t(features * channels), 1);
        x0 = random_values(std::size_t(rows * channels), 2);
        dx = random_values(std::size_t(rows * channels), 3);
        dtable0 = random_values(std::size_t(features * channels), 4);
    }
    template <class T>
    Problem& round() {
        for (Values* v : {&table, &x0, &dx}) *v = round_to<T>(*v);
        dtable0 = round_to<acc_t<T>>(dtable0);
        return *this;
    }
    // body(place in x, place in the table, value) for each entry and channel.
    template <class Body>
    void for_terms(Body&& body) const {
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int32_t e = offsets[std::size_t(i)]; e < offsets[std::size_t(i) + 1]; ++e)
                for (std::int64_t c = 0; c < channels; ++c)
                    body(std::size_t(i * channels + c), std::size_t(columns[std::size_t(e)] * channels + c),
                         values.empty() ? 1.0 : double(values[std::size_t(e)]));
    }
    Values naive_forward(bool accumulate) const {
        Values x = accumulate ? x0 : Values(x0.size(), 0.0);
        for_terms([&](auto i, auto f, double v) { x[i] += v * table[f]; });
        return x;
    }
    Values naive_backward() const {
        Values d = dtable0;
        for_terms([&](auto i, auto f, double v) { d[f] += v * dx[i]; });
        return d;
    }
};

template <class V>
Vec<const V> view(const std::vector<V>& v) {
    return {v.data(), std::int64_t(v.size())};
}
BagTransposed transposed(const Problem& q) {
    BagTransposed t;
    t.rows.assign(3, 9), t.values.assign(100, 9.f);  // used before
    bag_transpose(t, view(q.offsets), view(q.columns), q.values.empty() ? Vec<const float>() : view(q.values),
                  q.features);
    return t;
}

template <class T, class Dev>
Values forward(const Dev& dev, const Problem& q, bool accumulate = false, std::int64_t gap = 0) {
    const Buffer<std::int32_t, Dev> offsets(dev, q.offsets), columns(dev, q.columns);
    const Buffer<float, Dev> values(dev, q.values);
    const Padded<T, Dev> table(dev, q.features, q.channels, q.channels + gap, q.table);
    const std::int64_t ld = q.channels + 2 * gap;
    const Padded<T, Dev> x =
        accumulate ? Padded<T, Dev>(dev, q.rows, q.channels, ld, q.x0) : Padded<T, Dev>(dev, q.rows, q.channels, ld);
    bag_forward(dev, BagForward<T>{x.mat(), offsets.vec(), columns.vec(),
                                   q.values.empty() ? Vec<const float>() : values.vec(), table.mat(), accumulate});
    return x.values();
}

template <class T, class Dev>
Values backward(const Dev& dev, const Problem& q, std::int64_t gap = 0) {
    const BagTransposed t = transposed(q);
    const Buffer<std::int32_t, Dev> offsets(dev, t.offsets), rows(dev, t.rows);
    const Buffer<float, Dev> values(dev, t.values);
    const Padded<T, Dev> dx(dev, q.rows, q.channels, q.channels + gap, q.dx);
    const Padded<acc_t<T>, Dev> dtable(dev, q.features, q.channels, q.channels + 2 * gap, q.dtable0);
    const Buffer<acc_t<T>, Dev> scratch(dev,
                                        std::size_t(bag_scratch_elements(std::int64_t(t.rows.size()), q.channels)));
    bag_backward(dev, BagBackward<T>{dtable.mat(), offsets.vec(), rows.vec(),
                                     t.values.empty() ? Vec<const float>() : values.vec(), dx.mat(), scratch.vec()});
    return dtable.values();
}

const std::vector<Shape> kShapes = {{1, 1, 1, 0},      {1, 1, 3, 4, 1, 0, true}, {5, 7, 8, 2},
                                    {30, 400, 70, 20}, {100, 9, 130, 6, 3},      {40, 50, 5, 0.2, 1, 300}};

TEST(Bag, DoubleMatchesNaiveLoopsAndFloatFollows) {
    for (const Shape& s : kShapes) {
        SCOPED_TRACE(testing::Message() << s.rows << " of " << s.features << " x " << s.channels);
        const Problem q = Problem(s).round<float>();
        for (const bool accumulate : {false, true}) {
            EXPECT_TRUE(close_to(forward<double>(Cpu{}, q, accumulate, 3), q.naive_forward(accumulate), 1e-13));
            EXPECT_TRUE(close_to(forward<float>(Cpu{}, q, accumulate, 3), q.naive_forward(accumulate), 2e-6));
        }
        EXPECT_TRUE(close_to(backward<double>(Cpu{}, q, 3), q.naive_backward(), 1e-13));
        EXPECT_TRUE(close_to(backward<float>(Cpu{}, q, 3), q.naive_backward(), 5e-6));
    }
}

TEST(Bag, GradientMatchesFiniteDifferences) {
    Problem q({6, 5, 3, 2.5});
    q.dtable0.assign(q.dtable0.size(), 0.0);
    const Values d = backward<double>(Cpu{1}, q);
    EXPECT_TRUE(gradient_matches(d, q.table, [&] { return inner(q.dx, forward<double>(Cpu{1}, q)); }));
}

TEST(Bag, TransposedMatrixHoldsTheSameEntriesInOrder) {
    const Problem q({40, 30, 1, 5, 2});
    const BagTransposed t = transposed(q);
    ASSERT_EQ(t.offsets.size(), 31u);
    ASSERT_EQ(t.rows.size(), q.columns.size());
    std::vector<std::int32_t> taken(std::size_t(q.features), 0);
    for (std::int64_t i = 0; i < q.rows; ++i)
        for (std::int32_t e = q.offsets[std::size_t(i)]; e < q.offsets[std::size_t(i) + 1]; ++e) {
            const auto f = std::size_t(q.columns[std::size_t(e)]);
            const auto at = std::size_t(t.offsets[f] + taken[f]++);
            EXPECT_EQ(t.rows[at], i);
            EXPECT_EQ(t.values[at], q.values[std::size_t(e)]);
        }
    for (std::size_t f = 0; f < taken.size(); ++f) EXPECT_EQ(t.offsets[f] + taken[f], t.offsets[f + 1]);
}

TEST(Bag, DoesNotDependOnThreads) {
    const Problem q({300, 60, 100, 5, 3});
    EXPECT_EQ(backward<float>(Cpu{1}, q), backward<float>(Cpu{5}, q));
    EXPECT_EQ(forward<float>(Cpu{1}, q), forward<float>(Cpu{5}, q));
}

TEST(Bag, BrokenContractThrows) {
    const Problem good({4, 5, 8, 2});
    for (const std::int32_t column : {-1, 5}) {
        Problem q = good;
        EXPECT_NO_THROW(forward<float>(Cpu{}, q));
        q.columns[3] = column;
        EXPECT_THROW(forward<float>(Cpu{}, q), ContractError);
        EXPECT_THROW(backward<float>(Cpu{}, q), ContractError);
    }
    Problem q = good;
    q.offsets.back() += 1;  // more than there are
    EXPECT_THROW(forward<float>(Cpu{}, q), ContractError);
}

#if FIEDLER_CUDA
// Entries around the groups' 16 and the pieces' 128, a feature in many pieces, features that begin and end with a piece.
const std::vector<Shape> kGpuShapes = {{1, 1, 8, 0},
                                       {1, 1, 8, 1},
                                       {1, 3, 64, 15},
                                       {1, 1, 64, 16, 1, 0, true},
                                       {2, 1, 128, 17},
                                       {3, 2, 136, 42},
                                       {1, 1, 8, 127},
                                       {1, 1, 8, 128},
                                       {1, 2, 8, 129},
                                       {7, 5, 64, 3},
                                       {64, 200, 128, 9, 1, 0, true},
                                       {65, 200, 128, 9, 4},
                                       {500, 4000, 64, 18},
                                       {500, 130, 72, 9, 6, 0, true},
                                       {3000, 1, 24, 3},
                                       {2000, 150, 384, 9, 8},
                                       {100, 1500, 64, 1, 1, 128},
                                       {100, 1500, 64, 1, 1, 129},
                                       {100, 40, 136, 1, 1, 5000, true},
                                       {9, 8, 2056, 4},
                                       {20000, 30, 16, 9, 2}};

TEST(Bag, GpuForwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& s : kGpuShapes)
        for (const bool accumulate : {false, true}) {
            SCOPED_TRACE(testing::Message() << s.rows << " of " << s.features << " x " << s.channels);
            const Problem q = Problem(s).round<bf16>();
            const Values got = forward<bf16>(gpu(), q, accumulate, 8);
            const Values ref = forward<double>(Cpu{}, q, accumulate),
                         low = round_to<bf16>(forward<float>(Cpu{}, q, accumulate));
            EXPECT_TRUE(close(got, ref, low));
            EXPECT_EQ(got, forward<bf16>(gpu(), q, accumulate, 8));
        }
}

TEST(Bag, GpuBackwardMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& s : kGpuShapes) {
        SCOPED_TRACE(testing::Message() << s.rows << " of " << s.features << " x " << s.channels);
        const Problem q = Problem(s).round<bf16>();
        const Values got = backward<bf16>(gpu(), q, 8);
        EXPECT_TRUE(close(got, backward<double>(Cpu{}, q), backward<float>(Cpu{}, q)));
        EXPECT_EQ(got, backward<bf16>(gpu(), q, 8));
    }
}

TEST(Bag, GpuPiecesThatEndWithAFeature) {
    FIEDLER_GPU_OR_SKIP();
    Problem q = Problem(Shape{50, 12, 16, 0}).round<bf16>();
    std::int32_t feature = 0;
    for (const int length : {128, 128, 1, 127, 256, 16, 16, 96, 130, 126, 0, 5})
        q.columns.insert(q.columns.end(), std::size_t(length), feature++);
    const auto at = std::int64_t(q.columns.size());
    for (std::int64_t i = 0; i <= 50; ++i) q.offsets[std::size_t(i)] = std::int32_t(at * i / 50);
    q.values = to<float>(random_values(std::size_t(at), 9));
    const Values got = backward<bf16>(gpu(), q);
    EXPECT_TRUE(close(got, backward<double>(Cpu{}, q), backward<float>(Cpu{}, q)));
    for (std::size_t c = 0; c < 16; ++c) EXPECT_EQ(got[10 * 16 + c], q.dtable0[10 * 16 + c]) << "an absent feature";
}

TEST(Bag, GpuRowDoesNotDependOnItsPlace) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q = Problem(Shape{90, 300, 64, 9}).round<bf16>();
    Problem last = q;  // the rows from 37 on alone
    last.rows -= 37;
    const std::int32_t first = q.offsets[37];
    last.offsets.assign(q.offsets.begin() + 37, q.offsets.end());
    for (std::int32_t& o : last.offsets) o -= first;
    last.columns.assign(q.columns.begin() + first, q.columns.end());
    last.values.assign(q.values.begin() + first, q.values.end());
    const Values all = forward<bf16>(gpu(), q), part = forward<bf16>(gpu(), last);
    EXPECT_EQ(Values(all.begin() + 37 * 64, all.end()), part);
}

TEST(Bag, GpuBrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Problem q({3, 4, 12, 2});
    EXPECT_THROW(forward<bf16>(gpu(), q), ContractError);
    EXPECT_THROW(backward<bf16>(gpu(), q), ContractError);
}
#endif

}  // namespace
}  // namespace fiedler::test
