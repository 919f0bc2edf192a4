// dot: naive sums, finite differences, and the GPU kernels at every width of a head, mask and packing.
//
// The backward pass is given an o of its own, not the forward pass's: ds = p (do . v - delta) then has no cancellation
// that would leave nothing to compare (one key: p = 1, and a true o gives ds = 0). The chain is tested apart.
#include "kernels/dot.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "kernels/dot_sm90.h"
#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

using Path = std::optional<DotPath>;  // instead of the one that is chosen
using Lengths = std::vector<std::int32_t>;

struct Problem {
    std::int64_t width, heads, tokens;
    Lengths lengths;
    bool uniform, causal = true;
    std::int32_t window = 0;
    double scale;
    Values q, k, v, o, grad, lse;  // [tokens, heads width], exact in bf16; lse [tokens, heads], exact in f32

    // spread: standard deviation of the scores.
    Problem(std::int64_t d, std::int64_t h, const Lengths& l, bool is_causal, std::int32_t w, double spread = 1)
        : width(d),
          heads(h),
          tokens(std::accumulate(l.begin(), l.end(), std::int64_t(0))),
          lengths(l),
          uniform(std::all_of(l.begin(), l.end(), [&](auto n) { return n == l[0]; })),
          causal(is_causal),
          window(w),
          scale(1 / std::sqrt(double(d))) {
        q = values(1, spread), k = values(2, 1), v = values(3, 1), o = values(4, 1), grad = values(5, 1);
    }
    std::int64_t columns() const { return heads * width; }
    Values values(std::uint64_t seed, double spread) const {
        return round_to<bf16>(random_values(std::size_t(tokens * columns()), seed, spread));
    }
};

struct Answer {
    Values o, lse, dq, dk, dv, delta;
};

// The formulas of dot.h, pair by pair, in A; with kRounded, p, ds and the outputs are rounded to bf16 as on Cuda.
template <class A, bool kRounded>
class Naive {
  public:
    explicit Naive(const Problem& p) : p_(p), q_(to<A>(p.q)), k_(to<A>(p.k)), v_(to<A>(p.v)), grad_(to<A>(p.grad)) {
        for (std::size_t s = 0; s < p.lengths.size(); ++s) sequence_.insert(sequence_.end(), p.lengths[s], int(s));
    }
    void forward(Answer& answer) {
        std::vector<A> o(std::size_t(p_.tokens * p_.columns()), A(0)), lse(std::size_t(p_.tokens * p_.heads));
        for (std::int64_t h = 0; h < p_.heads; ++h)
            for (std::int64_t i = 0; i < p_.tokens; ++i) {
                const auto keys = visible(i);
                std::vector<A> s(keys.size());
                for (std::size_t n = 0; n < keys.size(); ++n) s[n] = A(p_.scale) * dot(q_, i, k_, keys[n], h);
                const A top = *std::max_element(s.begin(), s.end());
                A sum = 0;
                for (std::size_t n = 0; n < keys.size(); ++n) {
                    const A weight = std::exp(s[n] - top);
                    sum += weight;
                    add(o, i, rounded(weight), v_, keys[n], h);
                }
                for (std::int64_t d = 0; d < p_.width; ++d) o[at(i, h) + std::size_t(d)] /= sum;
                lse[std::size_t(i * p_.heads + h)] = top + std::log(sum);
            }
        answer.o = stored(o);
        answer.lse = from(lse);
    }
    void backward(Answer& answer) {
        const std::vector<A> o = to<A>(p_.o), lse = to<A>(p_.lse);
        std::vector<A> dq(o.size(), A(0)), dk = dq, dv = dq, delta(lse.size());
        for (std::int64_t h = 0; h < p_.heads; ++h)
            for (std::int64_t i = 0; i < p_.tokens; ++i) {
                const auto row = std::size_t(i * p_.heads + h);
                delta[row] = dot(grad_, i, o, i, h);
                for (const std::int64_t j : visible(i)) {
                    const A weight = std::exp(A(p_.scale) * dot(q_, i, k_, j, h) - lse[row]);
                    const A ds = weight * (dot(grad_, i, v_, j, h) - delta[row]);
                    add(dv, j, rounded(weight), grad_, i, h);
                    add(dq, i, A(p_.scale) * rounded(ds), k_, j, h);
                    add(dk, j, A(p_.scale) * rounded(ds), q_, i, h);
                }
            }
        answer.dq = stored(dq), answer.dk = stored(dk), answer.dv = stored(dv), answer.delta = from(delta);
    }

  private:
    std::size_t at(std::int64_t token, std::int64_t head) const {
        return std::size_t(token * p_.columns() + head * p_.width);
    }
    A dot(const std::vector<A>& x, std::int64_t i, const std::vector<A>& y, std::int64_t j, std::int64_t h) const {
        A sum = 0;
        for (std::size_t d = 0; d < std::size_t(p_.width); ++d) sum += x[at(i, h) + d] * y[at(j, h) + d];
        return sum;
    }
    void add(std::vector<A>& x, std::int64_t i, A factor, const std::vector<A>& y, std::int64_t j,
             std::int64_t h) const {
        for (std::size_t d = 0; d < std::size_t(p_.width); ++d) x[at(i, h) + d] += factor * y[at(j, h) + d];
    }
    std::vector<std::int64_t> visible(std::int64_t i) const {
        std::vector<std::int64_t> keys;
        for (std::int64_t j = 0; j < p_.tokens; ++j)
            if (sequence_[std::size_t(i)] == sequence_[std::size_t(j)] && (!p_.causal || j <= i) &&
                (p_.window == 0 || std::abs(i - j) < p_.window))
                keys.push_back(j);
        return keys;
    }
    static A rounded(A x) { return kRounded ? A(float(bf16(float(x)))) : x; }
    static Values stored(const std::vector<A>& x) { return kRounded ? round_to<bf16>(from(x)) : from(x); }
    const Problem& p_;
    std::vector<A> q_, k_, v_, grad_;
    std::vector<int> sequence_;
};
template <class A, bool kRounded>
Answer naive(const Problem& p) {
    Naive<A, kRounded> n(p);
    Answer answer;
    n.forward(answer);
    n.backward(answer);
    return answer;
}

// Matrices [rows, cols] side by side in one buffer, followed by eight columns that belong to nobody and hold NaN.
template <class T, class Dev>
class Panel {
  public:
    Panel(const Dev& dev, std::int64_t rows, std::int64_t cols, const std::vector<const Values*>& contents)
        : rows_(rows), cols_(cols), ld_(cols * std::int64_t(contents.size()) + kPad), buffer_(dev, fill(contents)) {}
    Mat<T> mat(std::int64_t i) const { return {buffer_.data() + i * cols_, rows_, cols_, ld_}; }
    Values values(std::int64_t i) const {
        const Values all = buffer_.values();
        Values v;
        for (std::int64_t r = 0; r < rows_; ++r) {
            const double* row = all.data() + r * ld_;
            v.insert(v.end(), row + i * cols_, row + (i + 1) * cols_);
            for (std::int64_t c = ld_ - kPad; c < ld_; ++c) EXPECT_TRUE(std::isnan(row[c])) << "written beyond a row";
        }
        return v;
    }

  private:
    static constexpr std::int64_t kPad = 8;
    std::vector<T> fill(const std::vector<const Values*>& contents) const {
        std::vector<T> all(std::size_t(rows_ * ld_), narrow<T>(std::nan("")));
        for (std::size_t m = 0; m < contents.size(); ++m)
            for (std::int64_t i = 0; contents[m] && i < rows_ * cols_; ++i)
                all[std::size_t(i / cols_ * ld_ + std::int64_t(m) * cols_ + i % cols_)] =
                    narrow<T>((*contents[m])[std::size_t(i)]);
        return all;
    }
    std::int64_t rows_, cols_, ld_;
    Buffer<T, Dev> buffer_;
};

// A packing in the memory of Dev.
template <class Dev>
struct Packing {
    Packing(const Dev& dev, const Problem& p)
        : ragged(p.lengths), offsets(dev, ragged.offsets), begin(dev, ragged.begin), end(dev, ragged.end) {
        packed = Packed::uniform(std::int32_t(p.lengths.size()), p.lengths[0]);
        if (p.uniform) return;
        packed = ragged.packed();
        packed.offsets = offsets.data(), packed.begin = begin.data(), packed.end = end.data();
    }
    Ragged ragged;
    Buffer<std::int32_t, Dev> offsets, begin, end;
    Packed packed;
};

template <class P, class Dev>
void set_common(P& p, const Problem& problem, const Packing<Dev>& packing) {
    p.seq = packing.packed;
    p.heads = std::int32_t(problem.heads);
    p.window = problem.window;
    p.causal = problem.causal;
    p.scale = static_cast<decltype(p.scale)>(problem.scale);
}

// False: it does not take the problem.
template <class Dev, class T>
bool call(const Dev& dev, const DotForward<T>& p, [[maybe_unused]] Path path) {
#if FIEDLER_CUDA
    if constexpr (std::is_same_v<Dev, Cuda>)
        if (path) return dot_forward_by_path(dev, p, *path);
#endif
    dot_forward(dev, p);
    return true;
}
template <class Dev, class T>
bool call(const Dev& dev, const DotBackward<T>& p, [[maybe_unused]] Path path) {
#if FIEDLER_CUDA
    if constexpr (std::is_same_v<Dev, Cuda>)
        if (path) return dot_backward_by_path(dev, p, *path);
#endif
    dot_backward(dev, p);
    return true;
}

template <class T, class Dev>
bool forward(const Dev& dev, const Problem& problem, Answer& answer, Path path = {}) {
    const Packing<Dev> packing(dev, problem);
    const Panel<T, Dev> in(dev, problem.tokens, problem.columns(), {&problem.q, &problem.k, &problem.v});
    const Panel<T, Dev> out(dev, problem.tokens, problem.columns(), {nullptr});
    const Panel<acc_t<T>, Dev> lse(dev, problem.tokens, problem.heads, {nullptr});
    DotForward<T> p;
    set_common(p, problem, packing);
    p.q = in.mat(0), p.k = in.mat(1), p.v = in.mat(2), p.o = out.mat(0), p.lse = lse.mat(0);
    const bool taken = call(dev, p, path);
    answer.o = out.values(0), answer.lse = lse.values(0);
    return taken;
}
template <class T, class Dev>
bool backward(const Dev& dev, const Problem& problem, Answer& answer, Path path = {}) {
    const Packing<Dev> packing(dev, problem);
    const Panel<T, Dev> in(dev, problem.tokens, problem.columns(), {&problem.q, &problem.k, &problem.v});
    const Panel<T, Dev> from_forward(dev, problem.tokens, problem.columns(), {&problem.o, &problem.grad});
    const Panel<T, Dev> out(dev, problem.tokens, problem.columns(), {nullptr, nullptr, nullptr});
    const Panel<acc_t<T>, Dev> lse(dev, problem.tokens, problem.heads, {&problem.lse});
    const Panel<acc_t<T>, Dev> delta(dev, problem.tokens, problem.heads, {nullptr});
    DotBackward<T> p;
    set_common(p, problem, packing);
    p.q = in.mat(0), p.k = in.mat(1), p.v = in.mat(2), p.o = from_forward.mat(0), p.do_ = from_forward.mat(1);
    p.dq = out.mat(0), p.dk = out.mat(1), p.dv = out.mat(2), p.lse = lse.mat(0), p.delta = delta.mat(0);
    const bool taken = call(dev, p, path);
    answer.dq = out.values(0), answer.dk = out.values(1), answer.dv = out.values(2), answer.delta = delta.values(0);
    return taken;
}
// Both passes; the backward pass reads problem.o and problem.lse.
template <class T, class Dev>
Answer run(const Dev& dev, const Problem& problem, Path path = {}) {
    Answer answer;
    EXPECT_TRUE(forward<T>(dev, problem, answer, path));
    EXPECT_TRUE(backward<T>(dev, problem, answer, path));
    return answer;
}
// The problem with the true lse in f32.
Problem with_lse(Problem p) {
    Answer answer;
    forward<double>(Cpu{}, p, answer);
    p.lse = round_to<float>(answer.lse);
    return p;
}

void expect_close(const Answer& got, const Answer& ref, const Answer& low) {
    EXPECT_TRUE(close(got.o, ref.o, low.o)) << "o";
    EXPECT_TRUE(close(got.lse, ref.lse, low.lse)) << "lse";
    EXPECT_TRUE(close(got.delta, ref.delta, low.delta)) << "delta";
    EXPECT_TRUE(close(got.dq, ref.dq, low.dq)) << "dq";
    EXPECT_TRUE(close(got.dk, ref.dk, low.dk)) << "dk";
    EXPECT_TRUE(close(got.dv, ref.dv, low.dv)) << "dv";
}
void expect_close_to(const Answer& got, const Answer& ref, double tolerance) {
    EXPECT_TRUE(close_to(got.o, ref.o, tolerance)) << "o";
    EXPECT_TRUE(close_to(got.lse, ref.lse, tolerance)) << "lse";
    EXPECT_TRUE(close_to(got.delta, ref.delta, tolerance)) << "delta";
    EXPECT_TRUE(close_to(got.dq, ref.dq, tolerance)) << "dq";
    EXPECT_TRUE(close_to(got.dk, ref.dk, tolerance)) << "dk";
    EXPECT_TRUE(close_to(got.dv, ref.dv, tolerance)) << "dv";
}
void expect_identical(const Answer& a, const Answer& b) {
    const auto same = [](const Values& x, const Values& y) {
        return identical(x.data(), y.data(), std::min(x.size(), y.size()) * sizeof(double));
    };
    EXPECT_TRUE(same(a.o, b.o) && same(a.lse, b.lse) && same(a.delta, b.delta));
    EXPECT_TRUE(same(a.dq, b.dq) && same(a.dk, b.dk) && same(a.dv, b.dv));
}

// body(problem) for each mask.
template <class Body>
void for_each_mask(std::int64_t width, std::int64_t heads, const Lengths& lengths, Body&& body) {
    for (const bool causal : {true, false})
        for (const std::int32_t window : {0, 1, 5, 64, 100}) {
            SCOPED_TRACE(testing::Message() << "width " << width << ", first of " << lengths.size() << " lengths "
                                            << lengths[0] << ", causal " << causal << ", window " << window);
            body(with_lse(Problem(width, heads, lengths, causal, window)));
        }
}
const Lengths kRagged{1, 63, 3, 64, 65, 7, 2, 130, 17, 20, 1, 31};

// ---- CPU -----------------------------------------------------------------------------------------------------------

TEST(Dot, MatchesNaiveFormula) {
    const auto compare = [](const Problem& p) {
        expect_close_to(run<double>(Cpu{}, p), naive<double, false>(p), 1e-12);
    };
    for_each_mask(16, 2, {1, 1, 1}, compare);
    for_each_mask(20, 1, {7, 7}, compare);
    for_each_mask(32, 2, {64}, compare);
    for_each_mask(64, 1, {129}, compare);
    for_each_mask(16, 2, kRagged, compare);
}

TEST(Dot, FloatMatchesDouble) {
    const auto compare = [](const Problem& p) {
        expect_close(run<float>(Cpu{}, p), run<double>(Cpu{}, p), naive<float, false>(p));
    };
    for_each_mask(64, 1, {129}, compare);
    for_each_mask(16, 2, kRagged, compare);
}

TEST(Dot, LargeScores) {
    const Problem p = with_lse(Problem(64, 2, {129, 40}, true, 0, 12));
    const Answer ref = run<double>(Cpu{}, p);
    EXPECT_GT(*std::max_element(ref.lse.begin(), ref.lse.end()), 40) << "the scores are not large";
    expect_close_to(ref, naive<double, false>(p), 1e-11);
    expect_close(run<float>(Cpu{}, p), ref, naive<float, false>(p));
}

TEST(Dot, GradientsMatchFiniteDifferences) {
    for (const bool causal : {true, false})
        for (const std::int32_t window : {0, 3}) {
            SCOPED_TRACE(testing::Message() << "causal " << causal << ", window " << window);
            Problem p(4, 2, {5, 1, 6}, causal, window);
            Answer answer;
            forward<double>(Cpu{}, p, answer);
            p.o = answer.o, p.lse = answer.lse;
            backward<double>(Cpu{}, p, answer);
            const auto objective = [&] {
                Answer a;
                forward<double>(Cpu{}, p, a);
                return inner(p.grad, a.o);
            };
            EXPECT_TRUE(gradient_matches(answer.dq, p.q, objective)) << "dq";
            EXPECT_TRUE(gradient_matches(answer.dk, p.k, objective)) << "dk";
            EXPECT_TRUE(gradient_matches(answer.dv, p.v, objective)) << "dv";
        }
}

TEST(Dot, EqualScoresGiveTheMean) {
    Problem p(8, 1, {3}, true, 0);
    p.k = Values(p.k.size(), 1.0);
    Answer answer;
    forward<double>(Cpu{}, p, answer);
    for (std::size_t d = 0; d < 8; ++d) EXPECT_NEAR(answer.o[16 + d], (p.v[d] + p.v[8 + d] + p.v[16 + d]) / 3, 1e-14);
}

TEST(Dot, ThreadsDoNotMatter) {
    const Problem p = with_lse(Problem(16, 2, kRagged, true, 0));
    expect_identical(run<float>(Cpu{1}, p), run<float>(Cpu{3}, p));
}

// The last query of one sequence, as decode sees it.
template <class T, class Dev>
Values decode(const Dev& dev, const Problem& problem) {
    const Panel<T, Dev> in(dev, problem.tokens, problem.columns(), {&problem.k, &problem.v});
    const auto columns = std::ptrdiff_t(problem.columns());
    const Buffer<T, Dev> q(dev, to<T>(Values(problem.q.end() - columns, problem.q.end()))),
        o(dev, std::size_t(columns));
    DotDecode<T> p;
    p.o = o.vec(), p.q = q.vec(), p.k = in.mat(0), p.v = in.mat(1);
    p.heads = std::int32_t(problem.heads), p.window = problem.window;
    p.scale = static_cast<acc_t<T>>(problem.scale);
    dot_decode(dev, p);
    return o.values();
}
Values last_row(const Problem& p, const Values& o) { return Values(o.end() - std::ptrdiff_t(p.columns()), o.end()); }

template <class Body>
void for_each_cache(Body&& body) {
    for (const std::int64_t width : {16, 32, 64, 128})
        for (const std::int32_t length : {1, 2, 7, 64, 129, 1000})
            for (const std::int32_t window : {0, 1, 5, 100}) {
                SCOPED_TRACE(testing::Message() << "width " << width << ", length " << length << ", window " << window);
                body(Problem(width, 3, {length}, true, window, 3));
            }
}
TEST(Dot, DecodeMatchesForward) {
    for_each_cache([](const Problem& p) {
        Answer answer, low;
        forward<double>(Cpu{}, p, answer);
        forward<float>(Cpu{}, p, low);
        const Values ref = last_row(p, answer.o);
        EXPECT_TRUE(close_to(decode<double>(Cpu{}, p), ref, 1e-12));
        EXPECT_TRUE(close(decode<float>(Cpu{}, p), ref, last_row(p, low.o)));
    });
}

TEST(Dot, RejectsBrokenContracts) {
    Problem p(16, 2, {4}, true, 0);
    Answer answer;
    p.scale = 0;
    EXPECT_THROW(forward<float>(Cpu{}, p, answer), ContractError);
    p.scale = 1, p.window = -1;
    EXPECT_THROW(forward<float>(Cpu{}, p, answer), ContractError);
}

// ---- GPU -----------------------------------------------------------------------------------------------------------

#if FIEDLER_CUDA
#if !defined(FIEDLER_SM90A)
#define FIEDLER_SM90A 0
#endif
bool sm90_takes(const Problem& p) {
    return FIEDLER_SM90A && gpu().arch == 90 && p.width == 64 && p.window == 0 && p.uniform && p.lengths[0] % 64 == 0;
}
void expect_gpu_matches(const Problem& p) {
    const Answer low = naive<float, true>(p), want = run<double>(Cpu{}, p);
    std::vector<Path> paths{Path{}};
    if (sm90_takes(p)) paths = {DotPath::sm90, DotPath::general};
    for (const Path path : paths) {
        SCOPED_TRACE(!path ? "chosen path" : path == DotPath::sm90 ? "sm90" : "general");
        const Answer got = run<bf16>(gpu(), p, path);
        expect_close(got, want, low);
        expect_identical(got, run<bf16>(gpu(), p, path));
        if (path == DotPath::sm90) expect_identical(got, run<bf16>(gpu(), p));  // it is the one that is chosen
    }
}

class DotWidth : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Dot, DotWidth, testing::Values(16, 32, 64, 128));

TEST_P(DotWidth, GpuUniform) {
    FIEDLER_GPU_OR_SKIP();
    for_each_mask(GetParam(), 2, Lengths(8, 1), expect_gpu_matches);
    for_each_mask(GetParam(), 2, Lengths(3, 7), expect_gpu_matches);
    for_each_mask(GetParam(), 2, Lengths(2, 64), expect_gpu_matches);
    for_each_mask(GetParam(), 3, Lengths(2, 129), expect_gpu_matches);
}
TEST_P(DotWidth, GpuLong) {
    FIEDLER_GPU_OR_SKIP();
    for_each_mask(GetParam(), 1, {1024}, expect_gpu_matches);
}
TEST_P(DotWidth, GpuRagged) {
    FIEDLER_GPU_OR_SKIP();
    for_each_mask(GetParam(), 2, kRagged, expect_gpu_matches);
    for_each_mask(GetParam(), 1, {300, 1, 211}, expect_gpu_matches);
}
TEST_P(DotWidth, GpuLargeScores) {
    FIEDLER_GPU_OR_SKIP();
    for (const bool causal : {true, false}) {
        const Problem p = with_lse(Problem(GetParam(), 2, {129, 200}, causal, 0, 12));
        EXPECT_GT(*std::max_element(p.lse.begin(), p.lse.end()), 40) << "the scores are not large";
        expect_gpu_matches(p);
    }
}
// Keys that nobody who sees them can tell apart (their queries are zero), and that would swamp those who must not see
// them; most rows' tiles begin with columns hidden entirely.
TEST_P(DotWidth, GpuHiddenScoresDoNotLeak) {
    FIEDLER_GPU_OR_SKIP();
    Problem p(GetParam(), 1, {256}, true, 5);
    for (std::size_t i = 0; i < 120 * std::size_t(p.width); ++i) p.k[i] = i % 2 ? 9984 : -9984;
    std::fill_n(p.q.begin(), 124 * p.width, 0.0);
    expect_gpu_matches(with_lse(p));
}
// The backward pass on what the kernel's own forward pass left.
TEST_P(DotWidth, GpuChain) {
    FIEDLER_GPU_OR_SKIP();
    Problem p(GetParam(), 2, {129, 64, 30}, true, 0);
    Answer got;
    forward<bf16>(gpu(), p, got);
    p.o = got.o, p.lse = got.lse;
    expect_gpu_matches(p);
}

// Tiles of 64 in sequences: one, two, three (a block that is not full), and more than a ring has stages.
TEST(Dot, GpuTilesOfSequences) {
    FIEDLER_GPU_OR_SKIP();
    const auto check = [](std::int64_t heads, const Lengths& lengths, double spread = 1) {
        for (const bool causal : {true, false}) {
            SCOPED_TRACE(testing::Message() << heads << " heads, " << lengths.size() << " of " << lengths[0]
                                            << ", causal " << causal << ", spread " << spread);
            expect_gpu_matches(with_lse(Problem(64, heads, lengths, causal, 0, spread)));
        }
    };
    check(1, {64});
    check(6, {64, 64, 64});
    check(2, {128, 128});
    check(3, {192, 192});
    check(5, {320});
    check(4, {448, 448});
    check(1, Lengths(2, 1024));
    check(2, {192, 192}, 12);
    check(1, {512}, 12);
}
TEST(Dot, GpuSm90TakesWhatItSays) {
    FIEDLER_GPU_OR_SKIP();
    const auto check = [](const Problem& p) {
        Answer answer;
        EXPECT_EQ(forward<bf16>(gpu(), p, answer, DotPath::sm90), sm90_takes(p));
        EXPECT_EQ(backward<bf16>(gpu(), with_lse(p), answer, DotPath::sm90), sm90_takes(p));
    };
    check(Problem(64, 2, {64, 64}, true, 0));
    check(Problem(64, 2, {64, 128}, true, 0));
    check(Problem(64, 2, {96, 96}, true, 0));
    check(Problem(64, 2, {64}, true, 64));
    check(Problem(32, 2, {64}, true, 0));
    check(Problem(128, 1, {64}, false, 0));
}
#if FIEDLER_SM90A
// The sm_90 kernels' operands, as TMA lays them out, on integers: x y' and x y.
TEST(Dot, GpuSm90ProductsOfIntegers) {
    FIEDLER_GPU_OR_SKIP();
    if (gpu().arch != 90) GTEST_SKIP() << "not an sm_90 device";
    constexpr std::size_t n = 64;
    const auto integers = [](std::uint64_t seed) {
        Values v;
        for (const auto i : random_ints(n * n, seed, -4, 5)) v.push_back(i);
        return v;
    };
    const Values x = integers(1), y = integers(2);
    const Panel<bf16, Cuda> in(gpu(), n, n, {&x, &y});
    Buffer<float, Cuda> rows(gpu(), n * n), turned(gpu(), n * n);
    dot_sm90_products(gpu(), in.mat(0), in.mat(1), rows.data(), turned.data());
    Values want_rows(n * n), want_turned(n * n);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            for (std::size_t k = 0; k < n; ++k) {
                want_rows[i * n + j] += x[i * n + k] * y[j * n + k];
                want_turned[i * n + j] += x[i * n + k] * y[k * n + j];
            }
    EXPECT_EQ(rows.values(), want_rows) << "rows times rows";
    EXPECT_EQ(turned.values(), want_turned) << "an operand as it lies";
}
#endif

TEST(Dot, GpuDecode) {
    FIEDLER_GPU_OR_SKIP();
    for_each_cache([](const Problem& p) {
        const Values got = decode<bf16>(gpu(), p), again = decode<bf16>(gpu(), p);
        EXPECT_TRUE(close(got, decode<double>(Cpu{}, p), round_to<bf16>(decode<float>(Cpu{}, p))));
        EXPECT_TRUE(identical(got.data(), again.data(), got.size() * sizeof(double)));
    });
}

TEST(Dot, GpuRejectsWhatItCannotDo) {
    FIEDLER_GPU_OR_SKIP();
    Answer answer;
    EXPECT_THROW(forward<bf16>(gpu(), Problem(48, 1, {4}, true, 0), answer), ContractError);
    const Buffer<bf16, Cuda> x(gpu(), 1024), lse_memory(gpu(), 64);
    DotForward<bf16> p;
    p.q = Mat<bf16>(x.data() + 1, 4, 16), p.k = p.v = Mat<bf16>(x.data() + 128, 4, 16);
    p.o = Mat<bf16>(x.data() + 256, 4, 16);
    p.lse = Mat<float>(reinterpret_cast<float*>(lse_memory.data()), 4, 1);
    p.seq = Packed::uniform(1, 4);
    EXPECT_THROW(dot_forward(gpu(), p), ContractError) << "rows are not aligned";
}
#endif

}  // namespace
}  // namespace fiedler::test
