// tests/support/attention_tree_trial.h: cases of near-linear attention (kernels/attention_tree) and one of them in the memory
// of a device, to be run by the tree or by the dense family.
#pragma once
#include <algorithm>
#include <sstream>

#include "kernels/attention_tree.h"
#include "tests/support/buffer.h"
#include "tests/support/compare.h"

namespace fiedler::test {

enum class Points { kNormal, kTied, kEqual, kSorted, kReversed, kFar, kNarrow };
enum class Gate {
    kNone,
    kMild,
    kOpen,
    kClosing,
    kShut
};  // falls by 0.3 to 3, not at all, by hundreds now and then, by 50

struct Case {
    std::vector<std::int32_t> lengths;  // equal lengths run as a uniform packing
    std::int32_t heads = 1, width = 16;
    bool causal = true;
    Gate gate = Gate::kNone;
    Points points = Points::kNormal;
    std::int32_t leaf = 1024, together = 0;
    bool skip = true, known = true;  // known: the length of the longest sequence is told

    bool uniform() const {
        return std::all_of(lengths.begin(), lengths.end(), [&](auto n) { return n == lengths[0]; });
    }
    std::string name() const {
        std::ostringstream s;
        s << "lengths";
        for (const auto n : lengths) s << ' ' << n;
        s << ", H " << heads << ", D " << width << (causal ? ", causal" : "") << ", gate " << int(gate) << ", points "
          << int(points) << ", leaf " << leaf << ", together " << together << (skip ? "" : ", no skipping")
          << (known ? "" : ", longest not known");
        return s.str();
    }
};

double scalar_of_case(Points points, std::size_t i, std::size_t n, double x) {
    const double place = double(i) / double(n);
    switch (points) {
        case Points::kTied:
            return std::round(x);
        case Points::kEqual:
            return 0.7;
        case Points::kSorted:
            return 6 * place;
        case Points::kReversed:
            return -6 * place;
        case Points::kFar:
            return 2500 * x;
        case Points::kNarrow:
            return 0.01 * x;
        default:
            return x;
    }
}

// Inputs of a case, all exactly representable in the precision of their role on the GPU.
struct Inputs {
    Case c;
    Ragged ragged;
    Values a, b, F, v, dout;

    explicit Inputs(const Case& c_, std::uint64_t seed = 1) : c(c_), ragged(c_.lengths) {
        const auto n = std::size_t(tokens()) * std::size_t(c.heads);
        a = random_values(n, seed), b = random_values(n, seed + 1);
        for (std::size_t i = 0; i < n; ++i) {
            a[i] = scalar_of_case(c.points, i, n, a[i]);
            b[i] = scalar_of_case(c.points, i, n, b[i]);
        }
        a = round_to<float>(a), b = round_to<float>(b);
        v = round_to<bf16>(random_values(n * std::size_t(c.width), seed + 2));
        dout = round_to<bf16>(random_values(v.size(), seed + 3));
        if (c.gate != Gate::kNone) set_gate(seed + 4);
    }
    void set_gate(std::uint64_t seed) {
        F = random_uniform(a.size(), seed, -3, 0);
        for (std::int32_t i = 0; i < tokens(); ++i)
            for (std::int32_t h = 0; h < c.heads; ++h) {
                const auto k = std::size_t(i * c.heads + h);
                const bool first = i == ragged.begin[std::size_t(i)];
                if (c.gate == Gate::kOpen) F[k] = 0;
                if (c.gate == Gate::kMild) F[k] *= std::exp(-double(h) - 2);
                if (c.gate == Gate::kClosing) F[k] = 0.01 * F[k] - (i % 90 == 89 ? 300 : 0);
                if (c.gate == Gate::kShut) F[k] = -50;
                if (!first) F[k] += F[k - std::size_t(c.heads)];
            }
        F = round_to<float>(F);
    }
    std::int32_t tokens() const { return ragged.tokens(); }
    std::int64_t values() const { return std::int64_t(c.heads) * c.width; }
    std::int32_t longest() const { return *std::max_element(c.lengths.begin(), c.lengths.end()); }
    std::int32_t told() const { return c.known ? longest() : 0; }
    Packed packed() const {
        return c.uniform() ? Packed::uniform(std::int32_t(c.lengths.size()), c.lengths[0]) : ragged.packed();
    }
    bool alone() const { return longest() == 1; }
    // What is left of ds where it would vanish: two sums of do v over the width.
    double rounding_of_ds() const {
        double largest = 0;
        for (std::size_t row = 0; row < v.size(); row += std::size_t(c.width)) {
            double sum = 0;
            for (std::size_t d = row; d < row + std::size_t(c.width); ++d) sum += std::abs(dout[d] * v[d]);
            largest = std::max(largest, sum);
        }
        return 8 * 1.2e-7 * largest;
    }
};

struct Outputs {
    Values o, lse, da, db, dF, dv;
};

// One case in the memory of a device, with padding between the rows of v, o and their gradients.
template <class T, class Dev>
struct Trial {
    using A = acc_t<T>;
    static constexpr std::int64_t kPad = 8;
    const Dev& dev;
    const Inputs& in;
    std::int64_t n, ld;
    Buffer<A, Dev> a, b, F, lse, delta, da, db, dF, partial;
    Buffer<T, Dev> v, o, dout, dv;
    Buffer<unsigned char, Dev> forward_scratch, backward_scratch;
    Packing<Dev> packing;

    Trial(const Dev& d, const Inputs& i)
        : dev(d),
          in(i),
          n(i.tokens()),
          ld(i.values() + kPad),
          a(d, to<A>(i.a)),
          b(d, to<A>(i.b)),
          F(d, to<A>(i.F)),
          lse(d, i.a.size()),
          delta(d, i.a.size()),
          da(d, i.a.size()),
          db(d, i.a.size()),
          dF(d, i.F.size()),
          partial(d, partial_elements(i)),
          v(d, padded(i.v)),
          o(d, v.size()),
          dout(d, padded(i.dout)),
          dv(d, v.size()),
          forward_scratch(d, scratch_bytes(i, false)),
          backward_scratch(d, scratch_bytes(i, true)),
          packing(d, i.c.lengths, i.c.uniform()) {}

    static std::size_t scratch_bytes([[maybe_unused]] const Inputs& i, [[maybe_unused]] bool backward) {
#if FIEDLER_CUDA
        const AttentionTreeTuning tuning{i.c.leaf, i.c.together};
        if constexpr (std::is_same_v<Dev, Cuda>)
            return std::size_t((backward ? attention_tree_backward_bytes : attention_tree_forward_bytes)(
                i.packed(), i.told(), i.c.heads, i.c.width, i.c.causal, tuning));
#endif
        return 0;
    }
    static std::size_t partial_elements(const Inputs& i) {
        if constexpr (std::is_same_v<Dev, Cpu>) return 0;
        return std::size_t(attention_partial_elements(i.packed(), i.told(), i.c.heads, i.c.width, 1, 0, i.c.causal));
    }
    std::vector<T> padded(const Values& x) const {
        std::vector<T> y(std::size_t(n * ld), narrow<T>(NAN));
        for (std::int64_t i = 0; i < n; ++i)
            for (std::int64_t k = 0; k < in.values(); ++k)
                y[std::size_t(i * ld + k)] = narrow<T>(x[std::size_t(i * in.values() + k)]);
        return y;
    }
    // Without the padding, which must still hold the poison.
    Values compact(const Buffer<T, Dev>& x) const {
        const auto all = x.host();
        Values y;
        std::int64_t spoilt = 0;
        for (std::int64_t i = 0; i < n * ld; ++i) {
            if (i % ld < in.values())
                y.push_back(widen(all[std::size_t(i)]));
            else
                spoilt += !std::isnan(widen(all[std::size_t(i)]));
        }
        EXPECT_EQ(spoilt, 0) << "padding written";
        return y;
    }
    Mat<A> numbers(const Buffer<A, Dev>& x) const { return x.mat(n, in.c.heads); }
    Mat<T> rows(const Buffer<T, Dev>& x) const { return {x.data(), n, in.values(), ld}; }

    template <class P>
    void set(P& p) const {
        p.a = numbers(a), p.b = numbers(b), p.v = rows(v), p.seq = packing.seq;
        p.heads = in.c.heads, p.causal = in.c.causal;
        if (in.c.gate != Gate::kNone) p.F = numbers(F);
    }
    template <class P>
    void set_backward(P& p) const {
        set(p);
        p.da = numbers(da), p.db = numbers(db), p.dv = rows(dv), p.delta = numbers(delta);
        p.o = rows(o), p.do_ = rows(dout), p.lse = numbers(lse), p.longest = in.told();
        if (p.F) p.dF = numbers(dF);
    }
    AttentionTreeForward<T> forward_args() const {
        AttentionTreeForward<T> p;
        set(p);
        p.o = rows(o), p.lse = numbers(lse), p.longest = in.told(), p.skip = in.c.skip;
        p.tuning = {in.c.leaf, in.c.together};
        p.scratch = forward_scratch.vec();
        return p;
    }
    AttentionTreeBackward<T> backward_args() const {
        AttentionTreeBackward<T> p;
        set_backward(p);
        p.tuning = {in.c.leaf, in.c.together}, p.scratch = backward_scratch.vec(), p.skip = in.c.skip;
        return p;
    }
    void forward() { attention_tree_forward(dev, forward_args()); }
    void backward() { attention_tree_backward(dev, backward_args()); }
    // The same by the dense family.
    void dense_forward() {
        AttentionForward<T> p;
        set(p);
        p.o = rows(o), p.lse = numbers(lse);
        attention_forward(dev, p);
    }
    void dense_backward() {
        AttentionBackward<T> p;
        set_backward(p);
        p.partial = partial.vec();
        attention_backward(dev, p);
    }
    // o and lse as the backward pass finds them
    void give(const Values& o_values, const Values& lse_values) {
        const auto x = padded(o_values);
        const auto y = to<A>(lse_values);
        copy_to_device(dev, o.data(), x.data(), o.bytes());
        copy_to_device(dev, lse.data(), y.data(), lse.bytes());
    }
    Outputs outputs() const { return {compact(o), lse.values(), da.values(), db.values(), dF.values(), compact(dv)}; }
};

}  // namespace fiedler::test
