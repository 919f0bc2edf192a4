// matmul: naive loops in double, finite differences, and on the GPU every shape that training meets and several that
// it should not.
#include "kernels/matmul.h"

#include <algorithm>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Shape = std::vector<std::int64_t>;  // rows, in, out

// How the sum over the inner dimension is evaluated. exact: double. tensor_core: as tensor cores do it, some 8 products
// at a time added to an f32 sum that is cut off, not rounded (Fasi et al. 2021); what the GPU's tolerance comes from.
enum class Sum { exact, tensor_core };

float cut_off(double exact) {
    const float f = static_cast<float>(exact);
    return std::abs(double(f)) > std::abs(exact) ? std::nextafter(f, 0.f) : f;
}

// out[i, j] = start[i, j] + sum_k a(i, k) b(j, k), naively.
template <class A, class B>
Values product(Sum how, std::int64_t rows, std::int64_t cols, std::int64_t depth, const Values& start, A&& a, B&& b) {
    Values r(static_cast<std::size_t>(rows * cols), 0.0);
    for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < cols; ++j) {
            const std::int64_t step = how == Sum::exact ? depth : 8;
            double sum = 0;
            for (std::int64_t first = 0; first < depth; first += step) {
                for (std::int64_t k = first; k < std::min(first + step, depth); ++k) sum += a(i, k) * b(j, k);
                if (how == Sum::tensor_core) sum = cut_off(sum);
            }
            if (!start.empty()) sum += start[std::size_t(i * cols + j)];
            r[std::size_t(i * cols + j)] = how == Sum::exact ? sum : double(static_cast<float>(sum));
        }
    return r;
}

struct Problem {
    std::int64_t rows, in, out;
    Values x, w, dy, y0, dx0, dw0;

    explicit Problem(const Shape& n, double weight_scale = 0.3) : rows(n[0]), in(n[1]), out(n[2]) {
        const auto size = [](std::int64_t a, std::int64_t b) { return static_cast<std::size_t>(a * b); };
        x = random_values(size(rows, in), 1);
        w = random_values(size(out, in), 2, weight_scale);
        dy = random_values(size(rows, out), 3);
        y0 = random_values(size(rows, out), 4);
        dx0 = random_values(size(rows, in), 5);
        dw0 = random_values(size(out, in), 6);
    }
    template <class T>
    void round() {
        for (Values* v : {&x, &w, &dy, &y0, &dx0}) *v = round_to<T>(*v);
        dw0 = round_to<acc_t<T>>(dw0);
    }
    Values forward(bool accumulate, bool relu, Sum how = Sum::exact) const {
        Values y = product(
            how, rows, out, in, accumulate ? y0 : Values{}, [&](auto i, auto k) { return x[std::size_t(i * in + k)]; },
            [&](auto j, auto k) { return w[std::size_t(j * in + k)]; });
        if (relu)
            for (double& v : y) v = std::max(v, 0.0);
        return y;
    }
    Values grad_x(bool accumulate, Sum how = Sum::exact) const {
        return product(
            how, rows, in, out, accumulate ? dx0 : Values{},
            [&](auto i, auto k) { return dy[std::size_t(i * out + k)]; },
            [&](auto j, auto k) { return w[std::size_t(k * in + j)]; });
    }
    Values grad_w(Sum how = Sum::exact) const {
        return product(
            how, out, in, rows, dw0, [&](auto i, auto k) { return dy[std::size_t(k * out + i)]; },
            [&](auto j, auto k) { return x[std::size_t(k * in + j)]; });
    }
};

const std::vector<Shape> kShapes = {{1, 1, 1},     {1, 7, 3},    {3, 1, 7},    {7, 3, 1},
                                    {1, 384, 513}, {2, 17, 33},  {63, 64, 65}, {64, 65, 63},
                                    {65, 63, 64},  {130, 48, 6}, {5, 6, 520},  {300, 20, 18}};

template <class T>
class MatmulCpu : public testing::Test {};
using CpuTypes = testing::Types<float, double>;
TYPED_TEST_SUITE(MatmulCpu, CpuTypes);

template <class T>
testing::AssertionResult agrees(const Values& got, const Values& ref) {
    // Sums of up to some hundred products of order one: a few rounding units of T at the scale of the result.
    return close_to(got, ref, std::is_same_v<T, double> ? 1e-13 : 2e-5);
}

TYPED_TEST(MatmulCpu, AllThreeMatchNaiveLoops) {
    using T = TypeParam;
    const Cpu cpu;
    for (const Shape& n : kShapes) {
        SCOPED_TRACE(testing::PrintToString(n));
        Problem q(n);
        q.template round<T>();
        const Padded<T, Cpu> x(cpu, q.rows, q.in, q.in + 3, q.x), w(cpu, q.out, q.in, q.in + 5, q.w),
            dy(cpu, q.rows, q.out, q.out + 2, q.dy);
        for (const bool accumulate : {false, true})
            for (const bool relu : {false, true}) {
                const Padded<T, Cpu> y = accumulate ? Padded<T, Cpu>(cpu, q.rows, q.out, q.out + 1, q.y0)
                                                    : Padded<T, Cpu>(cpu, q.rows, q.out, q.out + 1);
                const Mat<const T> residual = accumulate ? y.mat() : Mat<T>();
                matmul_forward(cpu, MatmulForward<T, T>{y.mat(), x.mat(), w.mat(), residual, relu});
                const Values ref = q.forward(accumulate, relu);
                EXPECT_TRUE(agrees<T>(y.values(), ref));
                if (!accumulate) continue;
                const Padded<T, Cpu> apart(cpu, q.rows, q.out, q.out + 6), addend(cpu, q.rows, q.out, q.out, q.y0);
                matmul_forward(cpu, MatmulForward<T, T>{apart.mat(), x.mat(), w.mat(), addend.mat(), relu});
                EXPECT_TRUE(identical(apart.values().data(), y.values().data(), ref.size() * sizeof(double)));
            }
        for (const bool accumulate : {false, true}) {
            const Padded<T, Cpu> dx = accumulate ? Padded<T, Cpu>(cpu, q.rows, q.in, q.in + 4, q.dx0)
                                                 : Padded<T, Cpu>(cpu, q.rows, q.in, q.in + 4);
            matmul_dx(cpu, MatmulDx<T>{dx.mat(), dy.mat(), w.mat(), accumulate});
            EXPECT_TRUE(agrees<T>(dx.values(), q.grad_x(accumulate)));
        }
        const Padded<T, Cpu> dw(cpu, q.out, q.in, q.in + 7, q.dw0);
        matmul_dw(cpu, MatmulDw<T>{dw.mat(), dy.mat(), x.mat()});
        EXPECT_TRUE(agrees<T>(dw.values(), q.grad_w()));
    }
}

TYPED_TEST(MatmulCpu, DoesNotDependOnThreads) {
    using T = TypeParam;
    for (const Shape& n : {Shape{700, 130, 600}, Shape{1, 384, 3000}}) {
        const Problem q(n);
        std::vector<std::vector<T>> results;
        for (const int threads : {1, 2, 3, 8}) {
            const Cpu cpu{threads};
            const Padded<T, Cpu> x(cpu, q.rows, q.in, q.in, q.x), w(cpu, q.out, q.in, q.in, q.w),
                dy(cpu, q.rows, q.out, q.out, q.dy), y(cpu, q.rows, q.out, q.out), dx(cpu, q.rows, q.in, q.in),
                dw(cpu, q.out, q.in, q.in, q.dw0);
            matmul_forward(cpu, MatmulForward<T, T>{y.mat(), x.mat(), w.mat()});
            matmul_dx(cpu, MatmulDx<T>{dx.mat(), dy.mat(), w.mat()});
            matmul_dw(cpu, MatmulDw<T>{dw.mat(), dy.mat(), x.mat()});
            std::vector<T> all = y.buffer.host();
            for (const std::vector<T>& v : {dx.buffer.host(), dw.buffer.host()})
                all.insert(all.end(), v.begin(), v.end());
            results.push_back(all);
        }
        for (std::size_t i = 1; i < results.size(); ++i)
            EXPECT_TRUE(identical(results[0].data(), results[i].data(), results[0].size() * sizeof(T)));
    }
}

TEST(Matmul, GradientsMatchFiniteDifferences) {
    const Cpu cpu;
    Problem q({5, 7, 3});
    const Mat<const double> x(q.x.data(), 5, 7), w(q.w.data(), 3, 7), dy(q.dy.data(), 5, 3);
    const auto objective = [&] {
        Values y(15);
        matmul_forward(cpu, MatmulForward<double>{{y.data(), 5, 3}, x, w});
        return inner(q.dy, y);
    };
    Values dx(35, std::nan("")), dw(21, 0.0);
    matmul_dx(cpu, MatmulDx<double>{{dx.data(), 5, 7}, dy, w});
    matmul_dw(cpu, MatmulDw<double>{{dw.data(), 3, 7}, dy, x});
    EXPECT_TRUE(gradient_matches(dx, q.x, objective));
    EXPECT_TRUE(gradient_matches(dw, q.w, objective));
}

TEST(Matmul, NanIsNotHiddenByRelu) {
    const Cpu cpu;
    Values x(3 * 4, 1.0), w(2 * 4, 1.0), y(3 * 2);
    x[5] = std::nan("");
    matmul_forward(cpu, MatmulForward<double>{{y.data(), 3, 2}, {x.data(), 3, 4}, {w.data(), 2, 4}, {}, true});
    EXPECT_EQ(y[0], 4.0);
    EXPECT_TRUE(std::isnan(y[2]));
}

TEST(Matmul, BrokenContractThrows) {
    const Cpu cpu;
    Values x(6), w(6), y(9);
    EXPECT_THROW(matmul_forward(cpu, MatmulForward<double>{{y.data(), 3, 3}, {x.data(), 3, 2}, {w.data(), 2, 3}}),
                 ContractError);
    EXPECT_THROW(matmul_forward(cpu, MatmulForward<double>{{y.data(), 3, 2}, {x.data(), 3, 2}, {w.data(), 3, 2}}),
                 ContractError);
    EXPECT_THROW(
        matmul_forward(cpu,
                       MatmulForward<double>{{y.data(), 3, 3}, {x.data(), 3, 2}, {w.data(), 3, 2}, {y.data(), 3, 2}}),
        ContractError);
}

#if FIEDLER_CUDA

std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

template <class O>
void check_forward(const Problem& q, const Padded<bf16, Cuda>& x, const Padded<bf16, Cuda>& w, std::int64_t ld,
                   bool accumulate, bool relu) {
    const Padded<O, Cuda> y =
        accumulate ? Padded<O, Cuda>(gpu(), q.rows, q.out, ld, q.y0) : Padded<O, Cuda>(gpu(), q.rows, q.out, ld);
    SCOPED_TRACE(testing::Message() << "accumulate " << accumulate << ", relu " << relu << ", output of " << sizeof(O)
                                    << " bytes");
    const Values ref = q.forward(accumulate, relu), low = round_to<O>(q.forward(accumulate, relu, Sum::tensor_core));
    matmul_forward(gpu(), MatmulForward<bf16, O>{y.mat(), x.mat(), w.mat(), accumulate ? y.mat() : Mat<O>(), relu});
    EXPECT_TRUE(close(y.values(), ref, low));
    // Again, with the residual in a matrix of its own.
    const Padded<O, Cuda> addend(gpu(), q.rows, q.out, ld, q.y0), apart(gpu(), q.rows, q.out, ld);
    const MatmulForward<bf16, O> p{apart.mat(), x.mat(), w.mat(), accumulate ? addend.mat() : Mat<O>(), relu};
    matmul_forward(gpu(), p);
    EXPECT_TRUE(close(apart.values(), ref, low));
    const std::vector<O> first = apart.buffer.host();
    matmul_forward(gpu(), p);
    EXPECT_TRUE(identical(first.data(), apart.buffer.host().data(), apart.buffer.bytes()));
}

void check_gradients(const Problem& q, const Padded<bf16, Cuda>& x, const Padded<bf16, Cuda>& w) {
    const Padded<bf16, Cuda> dy(gpu(), q.rows, q.out, round_up(q.out, 8), q.dy);
    for (const bool accumulate : {false, true}) {
        const std::int64_t ld = round_up(q.in, 8) + 8;
        const Padded<bf16, Cuda> dx = accumulate ? Padded<bf16, Cuda>(gpu(), q.rows, q.in, ld, q.dx0)
                                                 : Padded<bf16, Cuda>(gpu(), q.rows, q.in, ld);
        matmul_dx(gpu(), MatmulDx<bf16>{dx.mat(), dy.mat(), w.mat(), accumulate});
        // A single row is a matrix-vector product to cuBLASLt, which rounds it before it adds (contract, Numerics).
        Values low = q.grad_x(accumulate, Sum::tensor_core);
        if (accumulate && q.rows == 1) {
            low = round_to<bf16>(q.grad_x(false, Sum::tensor_core));
            for (std::size_t i = 0; i < low.size(); ++i) low[i] += q.dx0[i];
        }
        EXPECT_TRUE(close(dx.values(), q.grad_x(accumulate), round_to<bf16>(low))) << "accumulate " << accumulate;
    }
    const Values ref = q.grad_w(), low = q.grad_w(Sum::tensor_core);
    const std::int64_t ld = round_up(q.in, 4);
    const Padded<float, Cuda> dw(gpu(), q.out, q.in, ld, q.dw0), again(gpu(), q.out, q.in, ld, q.dw0);
    matmul_dw(gpu(), MatmulDw<bf16>{dw.mat(), dy.mat(), x.mat()});
    matmul_dw(gpu(), MatmulDw<bf16>{again.mat(), dy.mat(), x.mat()});
    EXPECT_TRUE(close(dw.values(), ref, low));
    EXPECT_TRUE(identical(dw.buffer.host().data(), again.buffer.host().data(), dw.buffer.bytes()));
}

void check_on_gpu(const Shape& n) {
    SCOPED_TRACE(testing::PrintToString(n));
    Problem q(n);
    q.round<bf16>();
    const Padded<bf16, Cuda> x(gpu(), q.rows, q.in, round_up(q.in, 8), q.x),
        w(gpu(), q.out, q.in, round_up(q.in, 8) + 16, q.w);
    for (const bool accumulate : {false, true})
        for (const bool relu : {false, true}) {
            check_forward<bf16>(q, x, w, round_up(q.out, 8), accumulate, relu);
            check_forward<float>(q, x, w, round_up(q.out, 4) + 4, accumulate, relu);
        }
    check_gradients(q, x, w);
}

TEST(Matmul, GpuSmallMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& n : {Shape{1, 8, 8}, Shape{7, 16, 6}, Shape{33, 64, 18}}) check_on_gpu(n);
}
TEST(Matmul, GpuHostileShapesMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& n : kShapes) check_on_gpu(n);
}
TEST(Matmul, GpuTrainingShapesMatchReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& n : {Shape{514, 384, 96}, Shape{255, 384, 384}, Shape{129, 384, 6}}) check_on_gpu(n);
}
TEST(Matmul, GpuOddVocabularyMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& n : {Shape{1, 64, 30522}, Shape{9, 64, 30522}}) check_on_gpu(n);
}
TEST(Matmul, GpuLongSumIsStable) {  // a split inner dimension, as dw of a whole batch has
    FIEDLER_GPU_OR_SKIP();
    check_on_gpu({8194, 40, 24});
}
TEST(Matmul, GpuThinGradientsAreSummedInPieces) {  // rows that divide, and an output of few tiles
    FIEDLER_GPU_OR_SKIP();
    // 32 pieces of 256 rows; 16 of 272, whose distance is no multiple of 256 bytes; 4 of 320; in > out and out > in. An output
    // of 8 rows; rows of 16 bytes and more, with NaN behind them: of dy, of x and of both.
    for (const Shape& n : {Shape{8192, 40, 6}, Shape{4352, 72, 18}, Shape{1280, 24, 132}, Shape{2048, 8, 300},
                           Shape{2048, 24, 8}, Shape{1024, 20, 136}, Shape{1024, 20, 36}})
        check_on_gpu(n);
}
TEST(Matmul, GpuGradientOfOddWidthsIsSummedInOnePiece) {  // rows that do not divide
    FIEDLER_GPU_OR_SKIP();
    for (const Shape& n : {Shape{4098, 40, 18}, Shape{4099, 20, 24}}) check_on_gpu(n);
}

// ---- 8-bit floats ------------------------------------------------------------------------------------------------

double value_of(std::uint8_t bits, int mantissa, int bias) {  // finite ones
    const int exponent = (bits & 0x7f) >> mantissa, part = bits & ((1 << mantissa) - 1);
    const double of = exponent > 0 ? std::ldexp((1 << mantissa) + part, exponent - bias - mantissa)
                                   : std::ldexp(part, 1 - bias - mantissa);
    return bits & 0x80 ? -of : of;
}
double value_of(e4m3 x) { return value_of(x.bits, 3, 7); }
double value_of(e5m2 x) { return value_of(x.bits, 2, 15); }
template <class E>
Values values_of(const std::vector<E>& bytes) {
    Values v(bytes.size());
    std::transform(bytes.begin(), bytes.end(), v.begin(), [](E x) { return value_of(x); });
    return v;
}
// Exponents within a few of 1, so that sums have many terms that count.
template <class E>
std::vector<E> random_bytes(std::size_t n, std::uint64_t seed, int mantissa, int bias) {
    const std::vector<std::int32_t> r = random_ints(n, seed, 0, 1 << 16);
    std::vector<E> v(n);
    for (std::size_t i = 0; i < n; ++i)
        v[i].bits = static_cast<std::uint8_t>((r[i] & 1) << 7 | (bias - 2 + (r[i] >> 1) % 4) << mantissa |
                                              (r[i] >> 4 & ((1 << mantissa) - 1)));
    return v;
}
bool multiplies_fp8() { return gpu().arch >= 89; }

template <class O>
void check_fp8(std::int64_t m, std::int64_t n, std::int64_t k, bool scaled, bool accumulate, bool fast) {
    SCOPED_TRACE(testing::Message() << m << " x " << k << " x " << n << (scaled ? ", scaled" : "")
                                    << (accumulate ? ", accumulated" : "") << (fast ? ", fast" : "")
                                    << (std::is_same_v<O, bf16> ? ", bf16" : ", f32"));
    const std::vector<e5m2> a = random_bytes<e5m2>(std::size_t(m * k), 1, 2, 15);
    const std::vector<e4m3> b = random_bytes<e4m3>(std::size_t(n * k), 2, 3, 7);
    const Values a_values = values_of(a), b_values = values_of(b);
    const Values y0 = round_to<O>(random_values(std::size_t(m * n), 3));
    const double scale = scaled ? 0.375 : 1;
    Values ref(y0.size()), sizes(y0.size());
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            double sum = 0, size = 0;
            for (std::int64_t l = 0; l < k; ++l) {
                const double term = a_values[std::size_t(i * k + l)] * b_values[std::size_t(j * k + l)];
                sum += term, size += std::abs(term);
            }
            const auto at = std::size_t(i * n + j);
            ref[at] = sum * scale + (accumulate ? y0[at] : 0), sizes[at] = size * scale;
        }
    const Buffer<e5m2, Cuda> da(gpu(), a);
    const Buffer<e4m3, Cuda> db(gpu(), b);
    const Buffer<O, Cuda> dy(gpu(), to<O>(y0));
    const Buffer<float, Cuda> ds(gpu(), std::vector<float>{float(scale)});
    matmul_fp8(gpu(), MatmulFp8<O>{.y = dy.mat(m, n),
                                   .a = da.mat(m, k),
                                   .b = db.mat(n, k),
                                   .scale = scaled ? Vec<const float>(ds.vec()) : Vec<const float>{},
                                   .accumulate = accumulate,
                                   .fast_sums = fast});
    const Values got = dy.values();
    // Of the terms: 14 bits in each of the steps of 32 that are added up so, which is up to k / 32 roundings with fast sums
    // (33 at most here; they hardly ever fall on the whole sum, all to one side); then the rounding of the result, and of
    // the product before it is added.
    const double of_sum = std::ldexp(1.0, -13) * (fast ? 4 : 1), of_result = std::is_same_v<O, bf16> ? 0x1p-8 : 0x1p-22;
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < ref.size(); ++i)
        wrong += !(std::abs(got[i] - ref[i]) <=
                   of_sum * sizes[i] + of_result * (std::abs(ref[i]) + (accumulate ? std::abs(ref[i] - y0[i]) : 0)));
    EXPECT_EQ(wrong, 0u) << "of " << ref.size();
}
TEST(Matmul, GpuFp8MatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    if (!multiplies_fp8()) GTEST_SKIP() << "no products of 8-bit floats on this device: NOT TESTED";
    for (const auto& [m, n, k] :
         {std::array<std::int64_t, 3>{16, 16, 16}, {64, 128, 208}, {208, 128, 64}, {400, 384, 1040}})
        for (const bool scaled : {false, true})
            for (const bool accumulate : {false, true}) {
                check_fp8<bf16>(m, n, k, scaled, accumulate, false);
                check_fp8<float>(m, n, k, scaled, accumulate, false);
            }
    check_fp8<float>(400, 384, 1040, true, true, true);
    check_fp8<bf16>(400, 384, 1040, false, false, true);
}
TEST(Matmul, GpuFp8LooksUpItsScale) {  // a plan is kept, the place of the scale is not
    FIEDLER_GPU_OR_SKIP();
    if (!multiplies_fp8()) GTEST_SKIP() << "no products of 8-bit floats on this device: NOT TESTED";
    const Buffer<e5m2, Cuda> a(gpu(), random_bytes<e5m2>(64 * 64, 1, 2, 15));
    const Buffer<e4m3, Cuda> b(gpu(), random_bytes<e4m3>(64 * 64, 2, 3, 7));
    const Buffer<float, Cuda> one(gpu(), std::vector<float>{1}), two(gpu(), std::vector<float>{2}), y(gpu(), 64 * 64);
    const auto with = [&](const Buffer<float, Cuda>& scale) {
        matmul_fp8(gpu(),
                   MatmulFp8<float>{.y = y.mat(64, 64), .a = a.mat(64, 64), .b = b.mat(64, 64), .scale = scale.vec()});
        return y.values();
    };
    const Values once = with(one), twice = with(two);
    for (std::size_t i = 0; i < once.size(); ++i) EXPECT_EQ(twice[i], 2 * once[i]);
}
TEST(Matmul, GpuFp8BrokenContractThrows) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<e5m2, Cuda> a(gpu(), 64 * 64);
    const Buffer<e4m3, Cuda> b(gpu(), 64 * 64);
    const Buffer<float, Cuda> y(gpu(), 64 * 64);
    const MatmulFp8<float> good{.y = y.mat(64, 64), .a = a.mat(64, 64), .b = b.mat(64, 64)};
    MatmulFp8<float> p = good;
    p.a = p.a.columns(0, 40), p.b = p.b.columns(0, 40);
    EXPECT_THROW(matmul_fp8(gpu(), p), ContractError);
    p = good, p.b = p.b.columns(0, 48);
    EXPECT_THROW(matmul_fp8(gpu(), p), ContractError);
    p = good, p.y = p.y.slice_rows(0, 48);
    EXPECT_THROW(matmul_fp8(gpu(), p), ContractError);
    p = good, p.a.data += 1;
    EXPECT_THROW(matmul_fp8(gpu(), p), ContractError);
}

TEST(Matmul, GpuEveryAlgorithmComputesTheSameProduct) {
    FIEDLER_GPU_OR_SKIP();
    Problem q({1024, 64, 24});
    q.round<bf16>();
    const Padded<bf16, Cuda> x(gpu(), q.rows, q.in, q.in, q.x), dy(gpu(), q.rows, q.out, q.out, q.dy);
    const Values ref = q.grad_w(), low = q.grad_w(Sum::tensor_core);
    int ran = 0, in_pieces = 0;
    for (int k = 0; k < kMatmulAlgorithms + 2; ++k) {
        const Padded<float, Cuda> dw(gpu(), q.out, q.in, q.in, q.dw0);
        const bool done = matmul_by_algorithm(gpu(), MatmulDw<bf16>{dw.mat(), dy.mat(), x.mat()}, k);
        EXPECT_TRUE(close(dw.values(), done ? ref : q.dw0, done ? low : q.dw0)) << "algorithm " << k;
        ran += done;
        in_pieces += done && k >= kMatmulAlgorithms - kMatmulPieceCounts;
    }
    EXPECT_GT(ran, in_pieces);
    EXPECT_EQ(in_pieces, 3);  // 2, 4 and 8 pieces of at least 128 rows
}
TEST(Matmul, GpuViewsAtAnOffset) {  // columns of a wider matrix, 16-byte aligned but not more
    FIEDLER_GPU_OR_SKIP();
    Problem q({66, 32, 40});
    q.round<bf16>();
    const Padded<bf16, Cuda> x(gpu(), q.rows, q.in, q.in, q.x), w(gpu(), q.out, q.in, q.in, q.w);
    const Buffer<bf16, Cuda> wide(gpu(), static_cast<std::size_t>(q.rows * 120));
    const Mat<bf16> y = wide.mat(q.rows, 120).columns(8, q.out);
    matmul_forward(gpu(), MatmulForward<bf16>{y, x.mat(), w.mat()});
    const Values all = wide.values();
    Values got;
    for (std::int64_t i = 0; i < q.rows; ++i)
        for (std::int64_t c = 0; c < 120; ++c) {
            const double v = all[std::size_t(i * 120 + c)];
            if (c >= 8 && c < 8 + q.out)
                got.push_back(v);
            else
                EXPECT_TRUE(std::isnan(v)) << "row " << i << ", column " << c;
        }
    EXPECT_TRUE(close(got, q.forward(false, false), round_to<bf16>(q.forward(false, false, Sum::tensor_core))));
}
TEST(Matmul, GpuOddStrideOfF32Output) {  // gates: as many columns as heads
    FIEDLER_GPU_OR_SKIP();
    Problem q({70, 64, 6});
    q.round<bf16>();
    const Padded<bf16, Cuda> x(gpu(), q.rows, q.in, q.in, q.x), w(gpu(), q.out, q.in, q.in, q.w);
    check_forward<float>(q, x, w, 6, false, false);
}
TEST(Matmul, GpuWithoutWorkspace) {
    FIEDLER_GPU_OR_SKIP();
    Cuda bare;
    Problem q({2050, 48, 24});
    q.round<bf16>();
    const Padded<bf16, Cuda> x(bare, q.rows, q.in, q.in, q.x), dy(bare, q.rows, q.out, q.out, q.dy);
    const Padded<float, Cuda> dw(bare, q.out, q.in, q.in, q.dw0);
    matmul_dw(bare, MatmulDw<bf16>{dw.mat(), dy.mat(), x.mat()});
    EXPECT_TRUE(close(dw.values(), q.grad_w(), q.grad_w(Sum::tensor_core)));
}

// An algorithm that is given the workspace may want a counter in it set to 0 first: on an H200 all that are proposed for the
// larger shape do. There it is the first of them, which is not searched for.
TEST(Matmul, GpuProductIsOneNode) {
    FIEDLER_GPU_OR_SKIP();
    constexpr std::int64_t most = 32768, width = 384;
    const Buffer<bf16, Cuda> x(gpu(), random_values(std::size_t(most * width), 1)),
        w(gpu(), random_values(std::size_t(width * width), 2)), y(gpu(), std::size_t(most * width)),
        dx(gpu(), std::size_t(most * width));
    for (const std::int64_t n : {std::int64_t(1024), most}) {
        const MatmulForward<bf16, bf16> forward{y.mat(n, width), x.mat(n, width), w.mat(width, width)};
        const MatmulDx<bf16> back{dx.mat(n, width), y.mat(n, width), w.mat(width, width)};
        const auto products = [&] {
            if (n < most)
                matmul_forward(gpu(), forward), matmul_dx(gpu(), back);
            else
                EXPECT_TRUE(matmul_by_algorithm(gpu(), forward, 0) && matmul_by_algorithm(gpu(), back, 0));
        };
        products();
        CudaGraph* const graph = graph_record(gpu(), products);
        EXPECT_EQ(graph_nodes(graph), 2u) << n << " rows";
        graph_free(graph);
    }
}

// Large enough to be searched for: whatever was taken, the bits are those of the heuristic's first proposal, from the
// first use of a shape on. ld: of y.
template <class O>
void expect_search_keeps_the_bits(std::int64_t n, std::int64_t in, std::int64_t out, std::int64_t ld) {
    SCOPED_TRACE(testing::Message() << n << " x " << in << " x " << out << ", stride " << ld);
    const auto size = [](std::int64_t a, std::int64_t b) { return static_cast<std::size_t>(a * b); };
    const Buffer<bf16, Cuda> x(gpu(), random_values(size(n, in), 1)), w(gpu(), random_values(size(out, in), 2)),
        dy(gpu(), random_values(size(n, ld), 3)), dx(gpu(), size(n, in)), first_dx(gpu(), size(n, in));
    const Buffer<O, Cuda> y(gpu(), size(n, ld)), first(gpu(), size(n, ld));
    const MatmulForward<bf16, O> forward{
        .y = y.mat(n, ld).columns(0, out), .x = x.mat(n, in), .w = w.mat(out, in), .residual = {}};
    MatmulForward<bf16, O> by_first = forward;
    by_first.y = first.mat(n, ld).columns(0, out);
    const MatmulDx<bf16> back{.dx = dx.mat(n, in), .dy = dy.mat(n, ld).columns(0, out), .w = w.mat(out, in)};
    MatmulDx<bf16> back_by_first = back;
    back_by_first.dx = first_dx.mat(n, in);
    fill_bytes(gpu(), first.data(), 0xff, first.bytes());
    ASSERT_TRUE(matmul_by_algorithm(gpu(), by_first, 0) && matmul_by_algorithm(gpu(), back_by_first, 0));
    for (int run = 0; run < 2; ++run) {
        fill_bytes(gpu(), y.data(), 0xff, y.bytes());
        fill_bytes(gpu(), dx.data(), 0xff, dx.bytes());
        matmul_forward(gpu(), forward);
        matmul_dx(gpu(), back);
        EXPECT_TRUE(identical(y.host().data(), first.host().data(), y.bytes())) << "run " << run;
        EXPECT_TRUE(identical(dx.host().data(), first_dx.host().data(), dx.bytes())) << "run " << run;
    }
}
TEST(Matmul, GpuSearchKeepsTheBits) {
    FIEDLER_GPU_OR_SKIP();
    expect_search_keeps_the_bits<bf16>(4096, 384, 1152, 1152);
    expect_search_keeps_the_bits<bf16>(1030, 1000, 2000, 2008);
    expect_search_keeps_the_bits<bf16>(515, 8192, 132, 132);
    expect_search_keeps_the_bits<bf16>(1031, 776, 999, 1000);
    expect_search_keeps_the_bits<float>(2048, 1024, 512, 512);
    expect_search_keeps_the_bits<float>(16384, 384, 102, 104);
    expect_search_keeps_the_bits<float>(3001, 640, 301, 301);
}

// The workspace is the sums' in pieces: nothing else may lie there while a way to make them is looked for.
TEST(Matmul, GpuFirstSumInPiecesIsLikeAnyOther) {
    FIEDLER_GPU_OR_SKIP();
    struct Case {
        std::int64_t n, in, out, ld;
    };
    for (const Case& c : {Case{8192, 1536, 1276, 1280}, Case{16384, 384, 102, 104}}) {
        const Buffer<bf16, Cuda> x(gpu(), random_values(std::size_t(c.n * c.in), 1)),
            dy(gpu(), random_values(std::size_t(c.n * c.ld), 2));
        const auto start = random_values(std::size_t(c.in * c.out), 3);
        const Buffer<float, Cuda> first(gpu(), start), second(gpu(), start);
        for (const auto* dw : {&first, &second})
            matmul_dw(gpu(), MatmulDw<bf16>{.dw = dw->mat(c.out, c.in),
                                            .dy = dy.mat(c.n, c.ld).columns(0, c.out),
                                            .x = x.mat(c.n, c.in)});
        EXPECT_TRUE(identical(first.host().data(), second.host().data(), first.bytes())) << c.out << " rows";
    }
}

// The same where the output is added to: 18 MB of it, of which the search sees the columns that fit in half the workspace.
TEST(Matmul, GpuSearchOfSumsInPlaceKeepsTheBits) {
    FIEDLER_GPU_OR_SKIP();
    constexpr std::int64_t n = 512, in = 384, out = 12288;
    ASSERT_GT(in * out * std::int64_t(sizeof(float)), static_cast<std::int64_t>(gpu().workspace_bytes / 2));
    const Buffer<bf16, Cuda> x(gpu(), random_values(std::size_t(n * in), 1)),
        dy(gpu(), random_values(std::size_t(n * out), 2));
    const auto start = random_values(std::size_t(in * out), 3);
    const Buffer<float, Cuda> dw(gpu(), start), first(gpu(), start);
    const MatmulDw<bf16> product{.dw = dw.mat(out, in), .dy = dy.mat(n, out), .x = x.mat(n, in)};
    MatmulDw<bf16> by_first = product;
    by_first.dw = first.mat(out, in);
    for (int run = 0; run < 2; ++run) {
        ASSERT_TRUE(matmul_by_algorithm(gpu(), by_first, 0));
        matmul_dw(gpu(), product);
        EXPECT_TRUE(identical(dw.host().data(), first.host().data(), dw.bytes())) << "run " << run;
    }
}

#endif

}  // namespace
}  // namespace fiedler::test
