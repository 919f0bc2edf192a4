// pending_sums: naive loops, both orders in memory, more sums than one launch takes, what the list refuses.
#include "kernels/pending_sums.h"

#include <cmath>
#include <memory>

#include "tests/support/buffer.h"

namespace fiedler::test {
namespace {

struct Shape {
    std::int32_t rows, columns;
    bool rows_follow;  // a column's rows are neighbours in memory
};

// One and many of each, and sums that end within a block of threads and beyond one.
std::vector<Shape> shapes() {
    std::vector<Shape> r;
    for (const std::int32_t rows : {1, 3, 32, 33, 176, 1056})
        for (const std::int32_t columns : {1, 6, 8, 9, 40})
            for (const bool follow : {false, true}) r.push_back({rows, columns, follow});
    for (int i = 0; i < 40; ++i) r.push_back({7, 5, i % 2 == 0});
    for (const std::int32_t rows : {1, 7, 64, 65, 200})  // blocks of many columns, and what cannot be read four at once
        for (const std::int32_t columns : {511, 512, 516, 518, 1536}) r.push_back({rows, columns, false});
    return r;
}

template <class A, class Dev>
struct Pending {
    std::vector<Shape> of = shapes();
    std::vector<std::int64_t> at, to_at;  // where each sum's parts and results are
    Values expected, magnitude;           // the sum of sizes: what rounding is measured by
    std::unique_ptr<Buffer<A, Dev>> memory, to;

    explicit Pending(const Dev& dev) {
        std::int64_t size = 0, results = 0;
        for (const Shape& s : of) {
            at.push_back(size), to_at.push_back(results);
            size += PendingSums<A>::elements(std::int64_t(s.rows) * s.columns), results += s.columns;
        }
        const Values partial = round_to<float>(random_values(std::size_t(size), 1));
        const Values before = round_to<float>(random_values(std::size_t(results), 2));
        memory = std::make_unique<Buffer<A, Dev>>(dev, to_type(partial));
        to = std::make_unique<Buffer<A, Dev>>(dev, to_type(before));
        expected = before;
        for (const double v : before) magnitude.push_back(std::abs(v));
        for (std::size_t i = 0; i < of.size(); ++i)
            for (std::int64_t c = 0; c < of[i].columns; ++c)
                for (std::int64_t r = 0; r < of[i].rows; ++r) {
                    const double v = partial[std::size_t(at[i] + r * row_step(of[i]) + c * column_step(of[i]))];
                    expected[std::size_t(to_at[i] + c)] += v, magnitude[std::size_t(to_at[i] + c)] += std::abs(v);
                }
    }
    static std::vector<A> to_type(const Values& v) { return {v.begin(), v.end()}; }
    static std::int64_t row_step(const Shape& s) { return s.rows_follow ? 1 : s.columns; }
    static std::int64_t column_step(const Shape& s) { return s.rows_follow ? s.rows : 1; }

    Values finish(const Dev& dev) {
        PendingSums<A> sums(memory->vec());
        for (std::size_t i = 0; i < of.size(); ++i) {
            const Vec<A> piece = sums.take(std::int64_t(of[i].rows) * of[i].columns);
            EXPECT_EQ(piece.data, memory->data() + at[i]);
            sums.add(
                {to->data() + to_at[i], piece.data, row_step(of[i]), column_step(of[i]), of[i].rows, of[i].columns});
        }
        finish_sums(dev, sums);
        EXPECT_TRUE(sums.sums().empty());
        EXPECT_EQ(sums.take(1).data, memory->data());  // the memory is free again
        return to->values();
    }
};

template <class A, class Dev>
void expect_sums(const Dev& dev, double unit) {
    Pending<A, Dev> p(dev);
    const Values got = p.finish(dev);
    for (std::size_t i = 0; i < got.size(); ++i)
        ASSERT_NEAR(got[i], p.expected[i], 16 * unit * p.magnitude[i]) << "sum " << i;
}

TEST(PendingSums, AreThoseOfNaiveLoops) {
    expect_sums<double>(Cpu{}, 0x1p-53);
    expect_sums<float>(Cpu{}, 64 * 0x1p-24);  // rows one after the other
}

TEST(PendingSums, RefuseWhatDoesNotFit) {
    std::vector<double> memory(2 * 32), to(8);
    PendingSums<double> p({memory.data(), std::int64_t(memory.size())});
    p.take(1);
    const Vec<double> second = p.take(32);
    EXPECT_EQ(second.data, memory.data() + 32);
    EXPECT_THROW(p.take(1), ContractError);
    p.add({to.data(), second.data, 1, 1, 1, 4});
    p.add({to.data() + 4, second.data, 1, 1, 1, 4});
    EXPECT_THROW(p.add({to.data() + 3, second.data, 1, 1, 1, 1}), ContractError);  // somebody else's
    EXPECT_THROW(p.add({nullptr, second.data, 1, 1, 1, 1}), ContractError);
    EXPECT_THROW(p.add({to.data(), second.data, 1, 1, 0, 1}), ContractError);
    p.clear();
    p.add({to.data() + 3, second.data, 1, 1, 1, 1});
    EXPECT_EQ(p.take(64).data, memory.data());
}

#if FIEDLER_CUDA
TEST(PendingSums, GpuMatchesNaiveLoops) {
    FIEDLER_GPU_OR_SKIP();
    expect_sums<float>(gpu(), 0x1p-24);
}

TEST(PendingSums, GpuIsBitEqualFromRunToRun) {
    FIEDLER_GPU_OR_SKIP();
    Pending<float, Cuda> one(gpu()), two(gpu());
    EXPECT_EQ(one.finish(gpu()), two.finish(gpu()));
}
#endif

}  // namespace
}  // namespace fiedler::test
