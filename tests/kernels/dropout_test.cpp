// dropout: the rate and the independence of its masks, the same mask forward and backward and on both devices.
#include "kernels/dropout.h"

#include "engine/rng.h"
#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

struct Call {
    std::int64_t rows, cols;
    float p = 0.25f;
    std::uint64_t seed = 7, stream = 3;
    std::int64_t gap = 0;
    bool in_place = false;
};

template <class T, class Dev>
Values run(const Dev& dev, const Call& k, const Values& v) {
    const Padded<T, Dev> x(dev, k.rows, k.cols, k.cols + k.gap, v);
    const Padded<T, Dev> y(dev, k.rows, k.cols, k.cols + 2 * k.gap);
    const Buffer<std::uint64_t, Dev> seed(dev, std::vector<std::uint64_t>{k.seed});
    const Mat<T> out = k.in_place ? x.mat() : y.mat();
    dropout(dev, Dropout<T>{out, x.mat(), seed.vec(), k.stream, k.p});
    return k.in_place ? x.values() : y.values();
}
template <class T, class Dev>
Values mask(const Dev& dev, const Call& k) {  // 0 or 1 / (1 - q)
    return run<T>(dev, k, Values(std::size_t(k.rows * k.cols), 1.0));
}

TEST(Dropout, MaskIsWhatTheContractSays) {
    const Call k{13, 11, 0.3f, 99, 5, 2};
    const Values got = mask<double>(Cpu{}, k);
    const double threshold = std::lround(0.3f * 65536);
    for (std::uint64_t i = 0; i < got.size(); ++i) {
        const std::uint64_t draw = rng::bits(99, 5, i / 4) >> (16 * (i % 4)) & 0xffff;
        EXPECT_EQ(got[i], double(draw) >= threshold ? 65536 / (65536 - threshold) : 0.0);
    }
}

TEST(Dropout, RateAndMeanAreRight) {
    for (const float p : {0.1f, 0.5f, 0.9f}) {
        const Values m = mask<double>(Cpu{}, {1000, 200, p});
        double kept = 0, sum = 0;
        for (const double v : m) kept += v != 0, sum += v;
        const double n = double(m.size()), deviation = std::sqrt(n * p * (1 - p));
        EXPECT_NEAR(kept, n * (1 - double(p)), 4 * deviation);
        EXPECT_NEAR(sum / n, 1.0, 4 * deviation / n / (1 - p));
    }
}

// Two masks agree as often as chance has it: other seeds, other streams, neighbouring rows and columns.
TEST(Dropout, MasksAreIndependent) {
    const Call k{500, 64, 0.5f};
    Call seed = k, stream = k;
    ++seed.seed, ++stream.stream;
    const Values a = mask<double>(Cpu{}, k);
    const auto expect_chance = [&](const Values& b, std::size_t shift) {
        double same = 0;
        const std::size_t n = a.size() - shift;
        for (std::size_t i = 0; i < n; ++i) same += (a[i] == 0) == (b[i + shift] == 0);
        EXPECT_NEAR(same, double(n) / 2, 4 * std::sqrt(double(n)) / 2) << "shift " << shift;
    };
    expect_chance(mask<double>(Cpu{}, seed), 0);
    expect_chance(mask<double>(Cpu{}, stream), 0);
    for (const std::size_t shift : {1, 2, 3, 4, 5, 64}) expect_chance(a, shift);
}

TEST(Dropout, GradientMatchesFiniteDifferences) {
    const Call k{3, 7, 0.4f};
    Values x = random_values(21, 1);
    const Values dy = random_values(21, 2), dx = run<double>(Cpu{1}, k, dy);
    EXPECT_TRUE(gradient_matches(dx, x, [&] { return inner(dy, run<double>(Cpu{1}, k, x)); }));
}

TEST(Dropout, NothingDroppedCopiesAndInPlaceIsTheSame) {
    const Values x = random_values(60, 1);
    EXPECT_EQ(run<double>(Cpu{}, {6, 10, 0.f}, x), x);
    Call k{6, 10, 0.5f};
    const Values apart = run<double>(Cpu{}, k, x);
    k.in_place = true;
    EXPECT_EQ(run<double>(Cpu{}, k, x), apart);
}

TEST(Dropout, DroppedNanIsZero) {  // a mask, not a product: what is dropped cannot spoil anything
    const Call k{4, 16, 0.5f};
    const Values m = mask<float>(Cpu{}, k), y = run<float>(Cpu{}, k, Values(64, std::nan("")));
    for (std::size_t i = 0; i < 64; ++i) EXPECT_EQ(std::isnan(y[i]), m[i] != 0);
}

TEST(Dropout, BrokenContractThrows) {
    const Values x(8, 1.0);
    for (const float p : {-0.1f, 1.f, 0.99999999f}) EXPECT_THROW(run<float>(Cpu{}, {2, 4, p}, x), ContractError);
    EXPECT_NO_THROW(run<float>(Cpu{}, {2, 4, 0.9999f}, x));
}

#if FIEDLER_CUDA
template <class T>
void check_on_gpu() {
    for (const std::int64_t gap : {8, 3})
        for (const auto& [rows, cols] : std::vector<std::pair<int, int>>{
                 {1, 1}, {1, 8}, {3, 7}, {7, 64}, {33, 12}, {65, 136}, {100, 384}, {1, 4096}, {5000, 72}, {9, 1001}}) {
            SCOPED_TRACE(testing::Message() << rows << " x " << cols << ", gap " << gap);
            Call k{rows, cols, 0.3f, 0x123456789abcdefull, 11, gap};
            const Values x = round_to<T>(random_values(std::size_t(rows * cols), 1));
            const Values ref = round_to<T>(run<float>(Cpu{}, k, x));
            EXPECT_EQ(run<T>(gpu(), k, x), ref);
            k.in_place = true;
            EXPECT_EQ(run<T>(gpu(), k, x), ref);
        }
}
TEST(Dropout, GpuMatchesCpuBitForBit) {
    FIEDLER_GPU_OR_SKIP();
    check_on_gpu<bf16>();
    check_on_gpu<float>();
}

TEST(Dropout, GpuRecordedStepSeesTheSeedOfItsLaunch) {
    FIEDLER_GPU_OR_SKIP();
    const Call k{40, 64, 0.5f};
    const Buffer<bf16, Cuda> x(gpu(), Values(40 * 64, 1.0)), y(gpu(), 40 * 64);
    const Buffer<std::uint64_t, Cuda> seed(gpu(), std::vector<std::uint64_t>{1});
    CudaGraph* graph = graph_record(gpu(), [&] {
        dropout(gpu(), Dropout<bf16>{y.mat(40, 64), x.mat(40, 64), seed.vec(), k.stream, k.p});
    });
    for (const std::uint64_t value : {5, 6, 5}) {
        copy_to_device(gpu(), seed.data(), &value, sizeof value);
        graph_launch(gpu(), graph);
        Call expected = k;
        expected.seed = value;
        EXPECT_EQ(y.values(), mask<float>(Cpu{}, expected)) << "seed " << value;
    }
    graph_free(graph);
}
#endif

}  // namespace
}  // namespace fiedler::test
