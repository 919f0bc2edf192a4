// coordinate: naive loops, finite differences, identity convolution, packing, and the GPU against the reference.
#include "kernels/coordinate.h"

#include <algorithm>

#include "tests/support/buffer.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

using Lengths = std::vector<std::int32_t>;

struct Problem {
    std::int64_t heads, scalars, tokens;
    bool convolution;
    Ragged ragged;
    Values s, w, log_temp, da, db, dw0, dtemp0;

    Problem(std::int64_t h, std::int64_t r, const Lengths& lengths, bool conv)
        : heads(h), scalars(r), tokens(0), convolution(conv), ragged(lengths) {
        tokens = ragged.tokens();
        const auto n = static_cast<std::size_t>(tokens * half());
        s = round_to<float>(random_values(2 * n, 1));
        w = round_to<float>(random_values(static_cast<std::size_t>(8 * half()), 2));
        log_temp = round_to<float>(random_uniform(static_cast<std::size_t>(heads), 3, -1, 1));
        da = round_to<float>(random_values(n, 4));
        db = round_to<float>(random_values(n, 5));
        dw0 = round_to<float>(random_values(w.size(), 6));
        dtemp0 = round_to<float>(random_values(log_temp.size(), 7));
    }
    std::int64_t half() const { return heads * scalars; }
};

struct Result {
    Values a, b, ds, dw, dtemp;
    void append(const Result& r) {
        const auto join = [](Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); };
        join(a, r.a), join(b, r.b), join(ds, r.ds), join(dw, r.dw), join(dtemp, r.dtemp);
    }
};

// The contract's formulas, one number at a time, in precision A; ds rounded to T by the caller.
template <class A>
Result naive(const Problem& p) {
    const std::int64_t half = p.half(), width = 2 * half;
    const auto at = [](const Values& v, std::int64_t i) { return A(v[static_cast<std::size_t>(i)]); };
    const auto tap = [&](std::int64_t c, int k) { return p.convolution ? at(p.w, c * 4 + k) : A(k == 3); };
    Result r{Values(p.da.size()), Values(p.da.size()), Values(p.s.size()), p.dw0, p.dtemp0};
    std::vector<A> dw(p.w.size(), A(0)), dtemp(p.log_temp.size(), A(0)), inverse_temp;
    for (const double t : p.log_temp) inverse_temp.push_back(std::exp(-A(t)));
    for (std::int64_t i = 0; i < p.tokens; ++i)
        for (std::int64_t c = 0; c < width; ++c) {
            const std::int64_t h = c % half / p.scalars, out = i * half + c % half;
            const A scale = inverse_temp[static_cast<std::size_t>(h)];
            A lam = 0, ds = 0;
            for (int k = 0; k < 4; ++k) {
                const std::int64_t before = i - 3 + k, after = i + 3 - k;
                if (before >= p.ragged.begin[static_cast<std::size_t>(i)])
                    lam += tap(c, k) * at(p.s, before * width + c);
                if (after >= p.ragged.end[static_cast<std::size_t>(i)]) continue;
                const A dlam = at(c < half ? p.da : p.db, after * half + c % half) * scale;
                ds += tap(c, k) * dlam;
                if (p.convolution) dw[static_cast<std::size_t>(c * 4 + k)] += at(p.s, i * width + c) * dlam;
            }
            const A value = lam * scale;
            (c < half ? r.a : r.b)[static_cast<std::size_t>(out)] = double(value);
            r.ds[static_cast<std::size_t>(i * width + c)] = double(ds);
            dtemp[static_cast<std::size_t>(h)] -= at(c < half ? p.da : p.db, out) * value;
        }
    for (std::size_t i = 0; i < dw.size(); ++i) r.dw[i] = double(A(A(r.dw[i]) + dw[i]));
    for (std::size_t i = 0; i < dtemp.size(); ++i) r.dtemp[i] = double(A(A(r.dtemp[i]) + dtemp[i]));
    return r;
}

// A matrix whose rows lie `gap` elements further apart than they are wide; the gap stays poisoned.
template <class T, class Dev>
struct Strided {
    std::int64_t rows, cols, ld;
    Buffer<T, Dev> buffer;
    Strided(const Dev& d, std::int64_t r, std::int64_t c, std::int64_t gap)
        : rows(r), cols(c), ld(c + gap), buffer(d, static_cast<std::size_t>(r * (c + gap))) {}
    Strided(const Dev& d, std::int64_t r, std::int64_t c, std::int64_t gap, const Values& v) : Strided(d, r, c, gap) {
        auto all = buffer.host();
        for (std::int64_t i = 0; i < r * c; ++i)
            all[static_cast<std::size_t>(i / c * ld + i % c)] = narrow<T>(v[static_cast<std::size_t>(i)]);
        copy_to_device(d, buffer.data(), all.data(), buffer.bytes());
    }
    Mat<T> mat() const { return {buffer.data(), rows, cols, ld}; }
    Values values() const {
        const Values all = buffer.values();
        Values v;
        for (std::int64_t i = 0; i < rows * cols; ++i)
            v.push_back(all[static_cast<std::size_t>(i / cols * ld + i % cols)]);
        std::size_t touched = 0;
        for (std::int64_t i = 0; i < rows * ld; ++i)
            if (i % ld >= cols && std::isfinite(all[static_cast<std::size_t>(i)])) ++touched;
        EXPECT_EQ(touched, 0u) << "columns of others were written";
        return v;
    }
};

// pending: instead of scratch.
template <class T, class Dev>
Result run(const Dev& d, const Problem& p, bool uniform, std::int64_t gap, PendingSums<acc_t<T>>* pending = nullptr) {
    using A = acc_t<T>;
    const std::int64_t n = p.tokens, half = p.half();
    const Buffer<std::int32_t, Dev> offsets(d, p.ragged.offsets), begin(d, p.ragged.begin), end(d, p.ragged.end);
    Packed seq = p.ragged.packed();
    seq.offsets = offsets.data(), seq.begin = begin.data(), seq.end = end.data();
    if (uniform) seq = Packed::uniform(seq.count, p.ragged.end[0]);
    const Strided<A, Dev> s(d, n, 2 * half, gap, p.s), da(d, n, half, 0, p.da), db(d, n, half, gap, p.db);
    const Strided<A, Dev> a(d, n, half, 0), b(d, n, half, gap);
    const Strided<T, Dev> ds(d, n, 2 * half, gap);
    const Buffer<A, Dev> w(d, to<A>(p.w)), log_temp(d, to<A>(p.log_temp)), dw(d, to<A>(p.dw0)),
        dtemp(d, to<A>(p.dtemp0));
    const Buffer<A, Dev> scratch(d, static_cast<std::size_t>(coordinate_pending_elements(n, 2 * half, p.heads)));
    CoordinateForward<A> f;
    f.a = a.mat(), f.b = b.mat(), f.s = s.mat(), f.log_temp = log_temp.vec(), f.seq = seq;
    CoordinateBackward<T> g;
    if (p.convolution) f.w = g.w = w.mat(2 * half, 4), g.dw = dw.mat(2 * half, 4);
    coordinate_forward(d, f);
    g.ds = ds.mat(), g.dlog_temp = dtemp.vec(), g.da = da.mat(), g.db = db.mat(), g.a = a.mat(), g.b = b.mat();
    g.s = s.mat(), g.log_temp = log_temp.vec(), g.seq = seq, g.pending = pending;
    if (!pending) g.scratch = scratch.vec();
    coordinate_backward(d, g);
    if (pending) finish_sums(d, *pending);
    return {a.values(), b.values(), ds.values(), dw.values(), dtemp.values()};
}

// Results of several problems under one computed tolerance: a few numbers alone can be exact by luck in `low`.
template <class T>
struct Comparison {
    Result got, ref, low;
    void add(const Result& result, const Problem& p) {
        got.append(result);
        ref.append(naive<double>(p));
        Result rounded = naive<acc_t<T>>(p);
        rounded.ds = round_to<T>(rounded.ds);
        low.append(rounded);
    }
    void expect_close(double ulp) const {
        EXPECT_TRUE(close(got.a, ref.a, low.a, ulp));
        EXPECT_TRUE(close(got.b, ref.b, low.b, ulp));
        EXPECT_TRUE(close(got.ds, ref.ds, low.ds, ulp));
        EXPECT_TRUE(close(got.dw, ref.dw, low.dw, ulp));
        EXPECT_TRUE(close(got.dtemp, ref.dtemp, low.dtemp, ulp));
    }
};
void expect_identical(const Result& x, const Result& y) {
    const auto same = [](const Values& u, const Values& v) {
        return identical(u.data(), v.data(), u.size() * sizeof(double));
    };
    EXPECT_TRUE(same(x.a, y.a));
    EXPECT_TRUE(same(x.b, y.b));
    EXPECT_TRUE(same(x.ds, y.ds));
    EXPECT_TRUE(same(x.dw, y.dw));
    EXPECT_TRUE(same(x.dtemp, y.dtemp));
}

const std::vector<Lengths> kPackings = {
    {1}, {3}, {7}, {64}, {129}, {1000}, {1, 2, 0, 3, 4, 5, 1, 1, 9, 8, 16, 24, 55}, {5, 5, 5, 5, 5}};
bool equal_lengths(const Lengths& l) {
    return std::all_of(l.begin(), l.end(), [&](int n) { return n == l[0]; });
}

template <class T, class Dev>
void check_all(const Dev& d, double ulp) {
    const std::int64_t shapes[][2] = {{1, 1}, {6, 1}, {7, 1},  {16, 1}, {1, 2},
                                      {6, 4}, {6, 8}, {1, 16}, {9, 16}};  // 9 x 16: above one block
    for (const auto& [heads, scalars] : shapes) {
        SCOPED_TRACE(testing::Message() << heads << " heads, R " << scalars);
        Comparison<T> all;
        for (const auto& lengths : kPackings)
            for (const bool convolution : {false, true})
                for (const std::int64_t gap : {3, 2, 0}) {  // on Cuda: one column at a time, two, or four
                    const Problem p(heads, scalars, lengths, convolution);
                    const Result got = run<T>(d, p, false, gap);
                    all.add(got, p);
                    EXPECT_TRUE(convolution || got.dw == p.dw0);
                    if (equal_lengths(lengths)) expect_identical(got, run<T>(d, p, true, gap));
                }
        all.expect_close(ulp);
    }
}

TEST(Coordinate, DoubleMatchesNaiveLoops) { check_all<double>(Cpu{}, 1e-14); }
TEST(Coordinate, FloatMatchesDouble) { check_all<float>(Cpu{}, 1.2e-7); }
TEST(Coordinate, ThreadsDoNotMatter) {
    const Problem p(6, 8, {1000}, true);
    expect_identical(run<float>(Cpu{1}, p, true, 0), run<float>(Cpu{3}, p, true, 0));
}
TEST(Coordinate, IdentityConvolutionChangesNothing) {
    Problem p(6, 2, {5, 9}, true);
    for (std::size_t i = 0; i < p.w.size(); ++i) p.w[i] = i % 4 == 3;
    const Result with = run<double>(Cpu{}, p, false, 0);
    p.convolution = false;
    const Result without = run<double>(Cpu{}, p, false, 0);
    EXPECT_TRUE(close_to(with.a, without.a, 1e-15));
    EXPECT_TRUE(close_to(with.ds, without.ds, 1e-15));
}
TEST(Coordinate, GradientsMatchFiniteDifferences) {
    for (const bool convolution : {false, true}) {
        Problem p(3, 2, {1, 2, 6, 4}, convolution);
        std::fill(p.dw0.begin(), p.dw0.end(), 0);
        std::fill(p.dtemp0.begin(), p.dtemp0.end(), 0);
        const Result analytic = run<double>(Cpu{}, p, false, 1);
        const auto objective = [&] {
            const Result r = run<double>(Cpu{}, p, false, 0);
            return inner(p.da, r.a) + inner(p.db, r.b);
        };
        EXPECT_TRUE(gradient_matches(analytic.ds, p.s, objective));
        EXPECT_TRUE(gradient_matches(analytic.dtemp, p.log_temp, objective));
        EXPECT_TRUE(!convolution || gradient_matches(analytic.dw, p.w, objective));
    }
}
TEST(Coordinate, SequencesDoNotSeeEachOther) {
    Problem p(1, 2, {4, 4}, true);
    const Result before = run<double>(Cpu{}, p, false, 0);
    for (std::size_t i = 0; i < p.s.size() / 2; ++i) p.s[i] += 1;              // first sequence
    for (std::size_t i = p.da.size() / 2; i < p.da.size(); ++i) p.da[i] += 1;  // second sequence
    const Result after = run<double>(Cpu{}, p, false, 0);
    const auto part = [](const Values& v, bool second) {
        const auto middle = v.begin() + static_cast<std::ptrdiff_t>(v.size() / 2);
        return second ? Values(middle, v.end()) : Values(v.begin(), middle);
    };
    EXPECT_EQ(part(before.a, true), part(after.a, true));
    EXPECT_NE(part(before.a, false), part(after.a, false));
    EXPECT_EQ(part(before.ds, false), part(after.ds, false));
    EXPECT_NE(part(before.ds, true), part(after.ds, true));
}

#if FIEDLER_CUDA
TEST(Coordinate, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    check_all<bf16>(gpu(), 1.2e-7);
}
TEST(Coordinate, GpuManyTokensAndBitEqual) {  // more runs than there are rows of partial sums
    FIEDLER_GPU_OR_SKIP();
    for (const int scalars : {8, 1}) {
        const Problem p(6, scalars, scalars == 1 ? Lengths{40000, 1, 30000} : Lengths{8000, 1, 9000}, true);
        for (const std::int64_t gap : {3, 2, 0}) {
            const Result got = run<bf16>(gpu(), p, false, gap);
            Comparison<bf16> all;
            all.add(got, p);
            all.expect_close(1.2e-7);
            expect_identical(got, run<bf16>(gpu(), p, false, gap));
        }
    }
}
TEST(Coordinate, GpuPendingSumsAreTheSame) {
    FIEDLER_GPU_OR_SKIP();
    struct Case {
        int heads, scalars;
        bool convolution;
        std::int64_t gap;
    };
    const Buffer<float, Cuda> memory(gpu(), std::size_t(coordinate_pending_elements(5001, 2 * 9 * 16, 9)));
    PendingSums<float> pending(memory.vec());
    for (const Case c : {Case{6, 1, true, 0},
                         {6, 1, true, 3},
                         {6, 1, false, 0},
                         {6, 2, true, 0},
                         {6, 8, true, 0},
                         {6, 8, false, 3},
                         {9, 16, true, 3}}) {
        SCOPED_TRACE(testing::Message() << c.heads << " heads, R " << c.scalars << ", gap " << c.gap);
        const Problem p(c.heads, c.scalars, {2000, 1, 3000}, c.convolution);
        expect_identical(run<bf16>(gpu(), p, false, c.gap), run<bf16>(gpu(), p, false, c.gap, &pending));
    }
}
TEST(Coordinate, GpuRefusesScratchBetweenMultiplesOf16Bytes) {
    FIEDLER_GPU_OR_SKIP();
    const Problem p(1, 1, {4}, true);
    const Buffer<float, Cuda> memory(gpu(), std::size_t(1 + coordinate_pending_elements(4, 2, 1)));
    PendingSums<float> pending({memory.data() + 1, std::int64_t(memory.size()) - 1});
    EXPECT_THROW(run<bf16>(gpu(), p, true, 0, &pending), ContractError);
}
TEST(Coordinate, GpuRefusesWeightsBetweenMultiplesOf16Bytes) {
    FIEDLER_GPU_OR_SKIP();
    const Buffer<float, Cuda> s(gpu(), 16), a(gpu(), 8), b(gpu(), 8), w(gpu(), 17), log_temp(gpu(), 1);
    CoordinateForward<float> f;
    f.a = a.mat(4, 2), f.b = b.mat(4, 2), f.s = s.mat(4, 4), f.w = Mat<const float>(w.data() + 1, 4, 4);
    f.log_temp = log_temp.vec(), f.seq = Packed::uniform(1, 4);
    EXPECT_THROW(coordinate_forward(gpu(), f), ContractError);
}
TEST(Coordinate, GpuOptionalOutputs) {
    FIEDLER_GPU_OR_SKIP();
    const Problem p(6, 2, {33}, false);
    const Result ref = run<bf16>(gpu(), p, true, 0);
    const Buffer<float, Cuda> s(gpu(), p.s), da(gpu(), p.da), db(gpu(), p.db), a(gpu(), ref.a), b(gpu(), ref.b);
    const Buffer<float, Cuda> log_temp(gpu(), p.log_temp);
    const Buffer<bf16, Cuda> ds(gpu(), p.s.size());
    CoordinateBackward<bf16> g;
    g.ds = ds.mat(33, 24), g.da = da.mat(33, 12), g.db = db.mat(33, 12), g.a = a.mat(33, 12), g.b = b.mat(33, 12);
    g.s = s.mat(33, 24), g.log_temp = log_temp.vec(), g.seq = Packed::uniform(1, 33);
    coordinate_backward(gpu(), g);  // no scratch either
    EXPECT_EQ(ds.values(), ref.ds);
}
#endif

}  // namespace
}  // namespace fiedler::test
