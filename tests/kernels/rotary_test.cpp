// rotary: closed forms, finite differences, and the GPU kernel at every width of a head, with and without each part.
#include "kernels/rotary.h"

#include <complex>

#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

struct Problem {
    std::int64_t width, heads;
    bool normalise, rotate;
    std::int32_t offset = 0;
    Ragged ragged;
    bool uniform;
    Values x, dy;  // [tokens, heads width], exact in bf16

    Problem(std::int64_t d, std::int64_t h, const std::vector<std::int32_t>& lengths, bool norm, bool turn)
        : width(d), heads(h), normalise(norm), rotate(turn), ragged(lengths), uniform(lengths.size() == 1) {
        const auto n = std::size_t(tokens() * columns());
        x = round_to<bf16>(random_values(n, 1)), dy = round_to<bf16>(random_values(n, 2));
    }
    std::int64_t tokens() const { return ragged.tokens(); }
    std::int64_t columns() const { return heads * width; }
    std::int64_t position(std::int64_t i) const { return i - ragged.begin[std::size_t(i)] + offset; }
};

struct Answer {
    Values y, dx;
};

// A [tokens, columns] matrix with eight columns more, which belong to nobody.
constexpr std::int64_t kPad = 8;
template <class T>
std::vector<T> padded(const Problem& p, const Values& v) {
    const std::int64_t ld = p.columns() + kPad;
    std::vector<T> r(std::size_t(p.tokens() * ld), narrow<T>(std::nan("")));
    for (std::int64_t i = 0; i < p.tokens() * p.columns(); ++i)
        r[std::size_t(i / p.columns() * ld + i % p.columns())] = narrow<T>(v[std::size_t(i)]);
    return r;
}
Values unpadded(const Problem& p, const Values& v) {
    Values r;
    for (std::int64_t i = 0; i < p.tokens(); ++i) {
        const double* row = v.data() + i * (p.columns() + kPad);
        r.insert(r.end(), row, row + p.columns());
        for (std::int64_t c = 0; c < kPad; ++c) EXPECT_TRUE(std::isnan(row[p.columns() + c])) << "written beyond a row";
    }
    return r;
}

template <class T, class Dev>
Answer run(const Dev& dev, const Problem& problem, bool in_place = false) {
    const Buffer<std::int32_t, Dev> offsets(dev, problem.ragged.offsets), begin(dev, problem.ragged.begin),
        end(dev, problem.ragged.end);
    const Buffer<T, Dev> x(dev, padded<T>(problem, problem.x)), dy(dev, padded<T>(problem, problem.dy));
    const Buffer<T, Dev> y(dev, x.size()), dx(dev, x.size()), keep(dev, padded<T>(problem, problem.x));
    const auto mat = [&](const Buffer<T, Dev>& b) {
        return Mat<T>(b.data(), problem.tokens(), problem.columns(), problem.columns() + kPad);
    };
    const auto common = [&](auto& p) {
        p.seq = problem.ragged.packed();
        p.seq.offsets = offsets.data(), p.seq.begin = begin.data(), p.seq.end = end.data();
        if (problem.uniform) p.seq = Packed::uniform(1, problem.ragged.tokens());
        p.heads = std::int32_t(problem.heads), p.position_offset = problem.offset;
        p.normalise = problem.normalise, p.rotate = problem.rotate;
    };
    RotaryBackward<T> b;
    common(b);
    b.x = mat(keep), b.dy = mat(dy), b.dx = in_place ? mat(dy) : mat(dx);
    rotary_backward(dev, b);
    RotaryForward<T> f;
    common(f);
    f.x = mat(x), f.y = in_place ? mat(x) : mat(y);
    rotary_forward(dev, f);
    return {unpadded(problem, (in_place ? x : y).values()), unpadded(problem, (in_place ? dy : dx).values())};
}

// y as complex numbers: (n_d - i n_{d + D/2}) turned by e^{i angle} has real part y_d and imaginary part -y_{d + D/2}.
Values closed_form(const Problem& p) {
    Values y(p.x.size());
    const std::int64_t half = p.width / 2;
    for (std::int64_t i = 0; i < p.tokens(); ++i)
        for (std::int64_t h = 0; h < p.heads; ++h) {
            const auto at = std::size_t(i * p.columns() + h * p.width);
            double squares = 0;
            for (std::size_t d = 0; d < std::size_t(p.width); ++d) squares += p.x[at + d] * p.x[at + d];
            const double r = p.normalise ? 1 / std::sqrt(squares / double(p.width) + 1e-6) : 1;
            for (std::int64_t d = 0; d < half; ++d) {
                const double angle = double(p.position(i)) * std::exp(-std::log(10000.0) * double(d) / double(half));
                const auto lower = at + std::size_t(d), upper = lower + std::size_t(half);
                const std::complex<double> n(r * p.x[lower], -r * p.x[upper]);
                const std::complex<double> turned = n * std::polar(1.0, p.rotate ? angle : 0.0);
                y[lower] = turned.real(), y[upper] = -turned.imag();
            }
        }
    return y;
}

template <class Body>
void for_each_part(Body&& body) {
    for (const bool normalise : {true, false})
        for (const bool rotate : {true, false}) {
            SCOPED_TRACE(testing::Message() << "normalise " << normalise << ", rotate " << rotate);
            body(normalise, rotate);
        }
}
const std::vector<std::int32_t> kRagged{1, 3, 7, 40, 2};

TEST(Rotary, MatchesClosedForm) {
    for_each_part([](bool normalise, bool rotate) {
        for (const std::int64_t width : {2, 6, 16, 64}) {
            Problem p(width, 3, kRagged, normalise, rotate);
            EXPECT_TRUE(close_to(run<double>(Cpu{}, p).y, closed_form(p), 1e-13));
            p.offset = 1000;
            EXPECT_TRUE(close_to(run<double>(Cpu{}, p, true).y, closed_form(p), 1e-12));
        }
    });
}

TEST(Rotary, GradientMatchesFiniteDifferences) {
    for_each_part([](bool normalise, bool rotate) {
        Problem p(6, 2, {4, 1, 3}, normalise, rotate);
        p.offset = 5;
        const Answer a = run<double>(Cpu{}, p), in_place = run<double>(Cpu{}, p, true);
        const auto objective = [&] { return inner(p.dy, run<double>(Cpu{}, p).y); };
        EXPECT_TRUE(gradient_matches(a.dx, p.x, objective));
        EXPECT_TRUE(close_to(in_place.dx, a.dx, 0));
    });
}

// What rotary positions are for: the product of two turned heads depends on their distance alone.
TEST(Rotary, ProductsDependOnDistance) {
    Problem p(16, 1, {50}, false, true);
    for (std::size_t i = 16; i < p.x.size(); ++i) p.x[i] = p.x[i % 16];
    const Values y = run<double>(Cpu{}, p).y;
    const auto product = [&](std::size_t i, std::size_t j) {
        double s = 0;
        for (std::size_t d = 0; d < 16; ++d) s += y[i * 16 + d] * y[j * 16 + d];
        return s;
    };
    EXPECT_NEAR(product(3, 10), product(40, 47), 1e-12);
    EXPECT_GT(std::abs(product(3, 10) - product(3, 30)), 1e-3);
}

// The same formulas in f32, as naively as they are written in rotary.h.
Answer naive_float(const Problem& p) {
    Answer a{Values(p.x.size()), Values(p.x.size())};
    const std::int64_t half = p.width / 2;
    for (std::int64_t i = 0; i < p.tokens(); ++i)
        for (std::int64_t h = 0; h < p.heads; ++h) {
            const auto at = std::size_t(i * p.columns() + h * p.width);
            float squares = 0, along = 0;
            for (std::size_t d = 0; d < std::size_t(p.width); ++d) squares += float(p.x[at + d]) * float(p.x[at + d]);
            const float r = p.normalise ? 1 / std::sqrt(squares / float(p.width) + 1e-6f) : 1;
            std::vector<float> dn(std::size_t(p.width), 0.f);
            for (std::int64_t d = 0; d < half; ++d) {
                const auto lower = at + std::size_t(d), upper = lower + std::size_t(half);
                const float frequency = float(std::pow(10000.0, -2.0 * double(d) / double(p.width)));
                const float angle = p.rotate ? float(p.position(i)) * frequency : 0;
                const float c = std::cos(angle), s = std::sin(angle);
                const float n0 = r * float(p.x[lower]), n1 = r * float(p.x[upper]);
                a.y[lower] = n0 * c + n1 * s, a.y[upper] = n1 * c - n0 * s;
                dn[std::size_t(d)] = float(p.dy[lower]) * c - float(p.dy[upper]) * s;
                dn[std::size_t(d + half)] = float(p.dy[lower]) * s + float(p.dy[upper]) * c;
            }
            for (std::size_t d = 0; d < dn.size(); ++d) along += dn[d] * float(p.x[at + d]);
            for (std::size_t d = 0; d < dn.size(); ++d)
                a.dx[at + d] = p.normalise ? r * (dn[d] - float(p.x[at + d]) * r * r * along / float(p.width)) : dn[d];
        }
    return a;
}

TEST(Rotary, FloatMatchesDouble) {
    for_each_part([](bool normalise, bool rotate) {
        Problem p(64, 2, kRagged, normalise, rotate);
        p.offset = 300;
        const Answer got = run<float>(Cpu{}, p), ref = run<double>(Cpu{}, p), low = naive_float(p);
        EXPECT_TRUE(close(got.y, ref.y, low.y));
        EXPECT_TRUE(close(got.dx, ref.dx, low.dx));
    });
}

TEST(Rotary, RejectsBrokenContracts) {
    EXPECT_THROW(run<float>(Cpu{}, Problem(5, 1, {3}, true, true)), ContractError) << "an odd width";
}

#if FIEDLER_CUDA
void expect_gpu_matches(const Problem& p) {
    const Answer got = run<bf16>(gpu(), p), again = run<bf16>(gpu(), p, true);
    const Answer ref = run<double>(Cpu{}, p), low = naive_float(p);
    EXPECT_TRUE(close(got.y, ref.y, round_to<bf16>(low.y))) << "y";
    EXPECT_TRUE(close(got.dx, ref.dx, round_to<bf16>(low.dx))) << "dx";
    EXPECT_TRUE(identical(got.y.data(), again.y.data(), got.y.size() * sizeof(double))) << "in place";
    EXPECT_TRUE(identical(got.dx.data(), again.dx.data(), got.dx.size() * sizeof(double))) << "in place";
}

TEST(Rotary, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for_each_part([](bool normalise, bool rotate) {
        for (const std::int64_t width : {16, 32, 64, 128})
            for (const std::int64_t heads : {1, 3, 6}) {
                SCOPED_TRACE(testing::Message() << "width " << width << ", heads " << heads);
                for (const std::int32_t n : {1, 3, 7, 31, 32, 33, 258})
                    expect_gpu_matches(Problem(width, heads, {n}, normalise, rotate));
                expect_gpu_matches(Problem(width, heads, kRagged, normalise, rotate));
            }
    });
}
TEST(Rotary, GpuFarPositions) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t offset : {1, 1023, 65536, 200000}) {
        SCOPED_TRACE(offset);
        Problem p(64, 2, {40}, true, true);
        p.offset = offset;
        expect_gpu_matches(p);
    }
}
TEST(Rotary, GpuRejectsWhatItCannotDo) {
    FIEDLER_GPU_OR_SKIP();
    EXPECT_THROW(run<bf16>(gpu(), Problem(48, 1, {3}, true, true)), ContractError);
}
#endif

}  // namespace
}  // namespace fiedler::test
