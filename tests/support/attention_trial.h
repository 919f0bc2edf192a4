// tests/support/attention_trial.h: cases of dense scalar-distance attention (kernels/attention.h), their inputs, the contract
// in naive loops, and one of them in the memory of a device.
#pragma once
#include <algorithm>
#include <bit>
#include <sstream>

#include "kernels/attention.h"
#include "tests/support/buffer.h"
#include "tests/support/compare.h"

#if !defined(FIEDLER_SM90A)  // whether the kernels of sm_90a are in this build
#define FIEDLER_SM90A 0
#endif

// A namespace of its own: attention_tree_trial.h, of the same program, has cases of the same names.
namespace fiedler::test::attention_trial {

inline const Cpu kCpu;

enum class Points { kNormal, kTied, kFar };  // how a and b lie: at random, many equal, up to 1e4 apart

struct Case {
    std::vector<std::int32_t> lengths;  // equal lengths run as a uniform packing
    std::int32_t heads = 1, scalars = 1, width = 16, window = 0;
    bool causal = true, gate = false;
    Points points = Points::kNormal;
    std::int32_t slabs = 0;  // room for the backward's parts of da on the GPU; 0: as much as is of use
    bool skip = true;

    bool uniform() const {
        return std::all_of(lengths.begin(), lengths.end(), [&](auto n) { return n == lengths[0]; });
    }
    std::string name() const {
        std::ostringstream s;
        s << "lengths";
        for (const auto n : lengths) s << ' ' << n;
        s << ", H " << heads << ", R " << scalars << ", D " << width << ", window " << window;
        s << (causal ? ", causal" : "") << (gate ? ", gate" : "") << ", points " << int(points);
        if (slabs > 0) s << ", slabs " << slabs;
        if (!skip) s << ", no skipping";
        return s.str();
    }
};

// Inputs of a case, all exactly representable in the precision of their role on the GPU.
struct Inputs {
    Case c;
    Ragged ragged;
    Values a, b, F, v, dout;

    explicit Inputs(const Case& c_, std::uint64_t seed = 1) : c(c_), ragged(c_.lengths) {
        const auto n = std::size_t(tokens()), hr = n * std::size_t(c.heads * c.scalars);
        const double spread = c.points == Points::kFar ? 2500 : 1;
        a = round_to<float>(random_values(hr, seed, spread));
        b = round_to<float>(random_values(hr, seed + 1, spread));
        if (c.points == Points::kTied) {
            for (double& x : a) x = std::round(x);
            for (double& x : b) x = std::round(x);
        }
        v = round_to<bf16>(random_values(n * std::size_t(c.heads * c.width), seed + 2));
        dout = round_to<bf16>(random_values(v.size(), seed + 3));
        if (!c.gate) return;
        F = random_uniform(n * std::size_t(c.heads), seed + 4, -3, 0);  // log sigmoid, then its sum from each begin
        for (std::int32_t i = 0; i < tokens(); ++i)
            for (std::int32_t h = 0; h < c.heads; ++h) {
                const auto k = std::size_t(i * c.heads + h);
                F[k] *= std::exp(-double(h));
                if (i > ragged.begin[std::size_t(i)]) F[k] += F[k - std::size_t(c.heads)];
            }
        F = round_to<float>(F);
    }
    std::int32_t tokens() const { return ragged.tokens(); }
    std::int64_t values() const { return std::int64_t(c.heads) * c.width; }
    Packed packed() const {
        return c.uniform() ? Packed::uniform(std::int32_t(c.lengths.size()), c.lengths[0]) : ragged.packed();
    }
    bool sees(std::int32_t i, std::int32_t j) const {
        return ragged.begin[std::size_t(i)] == ragged.begin[std::size_t(j)] && (!c.causal || j <= i) &&
               (c.window == 0 || std::abs(i - j) < c.window);
    }
    // Every query sees itself only: ds is zero, but for the rounding of two sums of do v over the width in float.
    bool alone() const {
        return c.window == 1 || std::all_of(c.lengths.begin(), c.lengths.end(), [](auto n) { return n == 1; });
    }
    double rounding_of_ds() const {
        double largest = 0;
        for (std::size_t row = 0; row < v.size(); row += std::size_t(c.width)) {
            double sum = 0;
            for (std::size_t d = row; d < row + std::size_t(c.width); ++d) sum += std::abs(dout[d] * v[d]);
            largest = std::max(largest, sum);
        }
        return 8 * 1.2e-7 * largest * c.scalars;
    }
};

// F of every head falls by `step` a token, and by `jump` at every 100th; sums restart with the sequences.
inline void set_gate(Inputs& in, double step, double jump) {
    for (std::int32_t i = 0; i < in.tokens(); ++i)
        for (std::int32_t h = 0; h < in.c.heads; ++h) {
            const auto k = std::size_t(i * in.c.heads + h);
            const double before = i > in.ragged.begin[std::size_t(i)] ? in.F[k - std::size_t(in.c.heads)] : 0;
            in.F[k] = before - step - (i % 100 == 99 ? jump : 0);
        }
    in.F = round_to<float>(in.F);
}
struct Outputs {
    Values o, lse, da, db, dF, dv;
};

// Does an sm_90 kernel take the forward pass, on such a device and in a build that has it?
inline bool is_sm90_forward(const Case& c) {
    return c.width == 64 && c.scalars <= 8 && c.window == 0 && c.uniform() && c.lengths[0] % 128 == 0;
}
// Its lse. Of one scalar: of a scalar up to 2^-10 from a_i, and of weights each of which may be off by 2^-8
// (attention_forward_sm90.cuh). The root mean square: of the first 0.4 x 2^-10 where all keys lie on one side; of the second,
// with the weight of a query on 4 keys or more, less than that. But not of ties, whose weights are all off by the same.
// Of several: of weights that are off by 2^-9, at a root mean square of 0.8 x 2^-10, beyond what packing costs (`low`).
inline testing::AssertionResult close_to_rounded_lse(const Case& c, const Values& got, const Values& want,
                                                     const Values& low) {
    const Error e = measure(got, want);
    double most = 0x1p-10 + 0x1p-8, rms = 0x1p-10;
    if (c.scalars > 1) {
        const Error of_packing = measure(low, want);
        most = 0x1p-9 + 2 * of_packing.max, rms += 2 * of_packing.rms;
    }
    if (got.size() == want.size() && e.count > 0 && e.nonfinite == 0 && e.max <= most &&
        e.rms <= (c.points == Points::kTied ? most : rms))
        return testing::AssertionSuccess();
    return testing::AssertionFailure() << "largest error " << e.max << " of " << most << ", rms " << e.rms << " of "
                                       << rms << ", of " << e.count << ", " << e.nonfinite << " not finite";
}

// What a GPU makes of more than one scalar (kernels/attention_packed.cuh), as long as they are in range: f16 numbers,
// in base 2. ir, jr: where the R numbers of a query and a key begin in a and b.
class Packing {
  public:
    // of_part: scalars whose distances are added up in f16, first by twos.
    Packing(const Inputs& in, std::size_t of_part) : R(std::size_t(in.c.scalars)), part_(of_part / 2) {
        a_ = numbers(in.a), b_ = numbers(in.b);
    }
    bool in_range(std::size_t ir, std::size_t jr) const {
        for (std::size_t r = 0; r < R; ++r)
            if (!std::isfinite(a_[ir + r] - b_[jr + r])) return false;
        return true;
    }
    int sign(std::size_t ir, std::size_t jr) const { return a_[ir] > b_[jr] ? 1 : a_[ir] < b_[jr] ? -1 : 0; }
    // sum |a - b| in natural units.
    double distance(std::size_t ir, std::size_t jr) {
        double sum = 0;
        for (std::size_t from = 0; from < R; from += 2 * part_.size()) {
            for (std::size_t i = 0; i < part_.size(); ++i) {
                part_[i] = 0;
                for (std::size_t r = from + 2 * i; r < std::min(from + 2 * i + 2, R); ++r)
                    part_[i] = half(part_[i] + std::abs(half(a_[ir + r] - b_[jr + r])));
            }
            for (std::size_t n = part_.size() / 2; n > 0; n /= 2)
                for (std::size_t i = 0; i < n; ++i) part_[i] = half(part_[i] + part_[i + n]);
            sum += part_[0];
        }
        return sum * std::log(2.0);
    }

  private:
    std::size_t R;
    Values part_, a_, b_;  // NaN: out of range

    static Values numbers(const Values& x) {
        Values y(x.size(), NAN);
        for (std::size_t k = 0; k < x.size(); ++k)
            if (std::abs(x[k]) <= 32) y[k] = half(std::nearbyint(double(float(x[k]) * 1.44269504f) * 8192) / 8192);
        return y;
    }
    static double half(double x) {  // to 11 bits, ties to even; multiples of 2^-13 stay clear of the ends of f16
        constexpr int kLost = 53 - 11;
        auto bits = std::bit_cast<std::uint64_t>(x);
        bits += (std::uint64_t(1) << (kLost - 1)) - 1 + (bits >> kLost & 1);
        return std::bit_cast<double>(bits >> kLost << kLost);
    }
};

inline std::size_t scalars_added_in_f16(std::int32_t scalars) {
    const std::int32_t R = attention_padded_scalars(scalars);
#if FIEDLER_CUDA
    if (!tuning::scores_on_tensor_cores(gpu().arch)) return std::size_t(R);
#endif
    return R == 16 ? 4 : 2;
}

// The contract, pair by pair, in arithmetic A; weights of the two matrix products rounded to W, o and dv to S. packed:
// more than one scalar as the GPU packs them, scores and signs, and ds rounded to W too.
template <class A, class W, class S>
Outputs naive(const Inputs& in, const Values& o_given = {}, const Values& lse_given = {}, bool packed = false) {
    packed &= in.c.scalars > 1;
    Packing packing(in, packed ? scalars_added_in_f16(in.c.scalars) : 2);
    const auto n = in.tokens(), H = in.c.heads, R = in.c.scalars, D = in.c.width;
    const auto a = to<A>(in.a), b = to<A>(in.b), F = to<A>(in.F), v = to<A>(in.v), g = to<A>(in.dout);
    std::vector<A> o(v.size()), lse(std::size_t(n * H)), da(a.size()), db(a.size()), dF(F.size()), dv(v.size());
    std::vector<A> scores(static_cast<std::size_t>(n));
    for (std::int32_t h = 0; h < H; ++h)
        for (std::int32_t i = 0; i < n; ++i) {
            const auto score = [&](std::int32_t j) {
                const auto ir = std::size_t((i * H + h) * R), jr = std::size_t((j * H + h) * R);
                A s = 0;
                if (packed && packing.in_range(ir, jr))
                    s = -A(packing.distance(ir, jr));
                else
                    for (std::size_t r = 0; r < std::size_t(R); ++r) s -= std::abs(a[ir + r] - b[jr + r]);
                return F.empty() ? s : s + (F[std::size_t(i * H + h)] - F[std::size_t(j * H + h)]);
            };
            const auto ih = std::size_t(i * H + h);
            A top = -INFINITY, sum = 0;
            for (std::int32_t j = 0; j < n; ++j)
                if (in.sees(i, j)) top = std::max(top, scores[std::size_t(j)] = score(j));
            for (std::int32_t j = 0; j < n; ++j) {
                if (!in.sees(i, j)) continue;
                const A p = std::exp(scores[std::size_t(j)] - top);
                sum += p;
                for (std::int32_t d = 0; d < D; ++d)
                    o[ih * D + d] += A(widen(narrow<W>(p))) * v[std::size_t(j * H + h) * D + d];
            }
            for (std::int32_t d = 0; d < D; ++d) o[ih * D + d] /= sum;
            lse[ih] = lse_given.empty() ? top + std::log(sum) : A(lse_given[ih]);
            A delta = 0;
            for (std::int32_t d = 0; d < D; ++d)
                delta += g[ih * D + d] * (o_given.empty() ? o[ih * D + d] : A(o_given[ih * D + d]));
            for (std::int32_t j = 0; j < n; ++j) {
                if (!in.sees(i, j)) continue;
                const auto jh = std::size_t(j * H + h);
                const A p = std::exp(scores[std::size_t(j)] - lse[ih]);
                A dp = 0;
                for (std::int32_t d = 0; d < D; ++d) {
                    dp += g[ih * D + d] * v[jh * D + d];
                    dv[jh * D + d] += A(widen(narrow<W>(p))) * g[ih * D + d];
                }
                const bool rounded = packed && packing.in_range(ih * R, jh * R);
                const A exact_ds = p * (dp - delta), ds = packed ? A(widen(narrow<W>(exact_ds))) : exact_ds;
                for (std::size_t r = 0; r < std::size_t(R); ++r) {
                    const A x = a[ih * R + r], y = b[jh * R + r];
                    const A sign = rounded ? packing.sign(ih * R + r, jh * R + r) : x > y ? 1 : x < y ? -1 : 0;
                    da[ih * R + r] -= sign * ds;
                    db[jh * R + r] += sign * ds;
                }
                if (!F.empty()) dF[jh] -= ds;
            }
        }
    return {round_to<S>(from(o)), from(lse), from(da), from(db), from(dF), round_to<S>(from(dv))};
}

// One case in the memory of a device, with padding between the rows of v, o and their gradients.
template <class T, class Dev>
struct Trial {
    using A = acc_t<T>;
    static constexpr std::int64_t kPad = 8;
    const Dev& dev;
    const Inputs& in;
    std::int64_t n, ld;
    Buffer<A, Dev> a, b, F, lse, delta, da, db, dF, partial, scratch;
    Buffer<T, Dev> v, o, dout, dv;
    Buffer<std::int32_t, Dev> offsets, begin, end;

    Trial(const Dev& d, const Inputs& i)
        : dev(d),
          in(i),
          n(i.tokens()),
          ld(i.values() + kPad),
          a(d, to<A>(i.a)),
          b(d, to<A>(i.b)),
          F(d, to<A>(i.F)),
          lse(d, std::size_t(n * i.c.heads)),
          delta(d, lse.size()),
          da(d, i.a.size()),
          db(d, i.a.size()),
          dF(d, i.F.size()),
          partial(d, partial_elements(i)),
          scratch(d, std::is_same_v<Dev, Cpu>
                         ? 0
                         : std::size_t(attention_forward_scratch_elements(n, i.c.heads, i.c.scalars))),
          v(d, padded(i.v)),
          o(d, v.size()),
          dout(d, padded(i.dout)),
          dv(d, v.size()),
          offsets(d, i.ragged.offsets),
          begin(d, i.ragged.begin),
          end(d, i.ragged.end) {}

    static std::size_t partial_elements(const Inputs& i) {
        if constexpr (std::is_same_v<Dev, Cpu>) return 0;
        const Case& c = i.c;
        const auto slab = attention_slab_elements(i.tokens(), c.heads, c.scalars),
                   numbers = attention_numbers_elements(i.tokens(), c.heads, c.width, c.scalars);
        return std::size_t(c.slabs > 0 ? c.slabs * slab + numbers
                                       : attention_partial_elements(i.packed(), longest(i), c.heads, c.width, c.scalars,
                                                                    c.window, c.causal));
    }
    static std::int32_t longest(const Inputs& i) { return *std::max_element(i.c.lengths.begin(), i.c.lengths.end()); }
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
        for (std::int64_t i = 0; i < n * ld; ++i) {
            if (i % ld < in.values())
                y.push_back(widen(all[std::size_t(i)]));
            else
                EXPECT_TRUE(std::isnan(widen(all[std::size_t(i)]))) << "padding written at " << i;
        }
        return y;
    }
    Packed packed() const {
        Packed p = in.packed();
        if (p.length == 0) p.offsets = offsets.data(), p.begin = begin.data(), p.end = end.data();
        return p;
    }
    Mat<A> scalars(const Buffer<A, Dev>& x) const { return x.mat(n, in.c.heads * in.c.scalars); }
    Mat<A> numbers(const Buffer<A, Dev>& x) const { return x.mat(n, in.c.heads); }
    Mat<T> rows(const Buffer<T, Dev>& x) const { return {x.data(), n, in.values(), ld}; }

    AttentionForward<T> forward_arguments() const {
        AttentionForward<T> p;
        p.scratch = scratch.vec();
        p.o = rows(o), p.lse = numbers(lse), p.a = scalars(a), p.b = scalars(b), p.v = rows(v);
        if (in.c.gate) p.F = numbers(F);
        p.seq = packed(), p.heads = in.c.heads, p.scalars = in.c.scalars, p.window = in.c.window,
        p.causal = in.c.causal, p.skip = in.c.skip;
        return p;
    }
    void forward() { attention_forward(dev, forward_arguments()); }
    AttentionBackward<T> backward_arguments() const {
        AttentionBackward<T> p;
        p.da = scalars(da), p.db = scalars(db), p.dv = rows(dv), p.delta = numbers(delta);
        p.a = scalars(a), p.b = scalars(b), p.v = rows(v), p.o = rows(o), p.do_ = rows(dout), p.lse = numbers(lse);
        p.partial = partial.vec(), p.longest = longest(in);
        if (in.c.gate) p.F = numbers(F), p.dF = numbers(dF);
        p.seq = packed(), p.heads = in.c.heads, p.scalars = in.c.scalars, p.window = in.c.window,
        p.causal = in.c.causal, p.skip = in.c.skip;
        return p;
    }
    void backward() { attention_backward(dev, backward_arguments()); }
    // o and lse as the backward pass finds them
    void give(const Values& o_values, const Values& lse_values) {
        const auto x = padded(o_values);
        const auto y = to<A>(lse_values);
        copy_to_device(dev, o.data(), x.data(), o.bytes());
        copy_to_device(dev, lse.data(), y.data(), lse.bytes());
    }
    Outputs outputs() const { return {compact(o), lse.values(), da.values(), db.values(), dF.values(), compact(dv)}; }
};

}  // namespace fiedler::test::attention_trial
