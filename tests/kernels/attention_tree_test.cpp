// Near-linear scalar-distance attention: CPU against direct sums (kernels/attention) and finite differences; geometry of
// the GPU's blocks on the host; GPU against the CPU and the dense kernel; sorted runs for decoding.
#include "kernels/attention_tree.h"

#include <algorithm>
#include <iterator>

#include "kernels/attention_runs.h"
#include "tests/support/attention_tree_trial.h"
#include "tests/support/gradcheck.h"

namespace fiedler::test {
namespace {

const Cpu kCpu;

template <class T>
Outputs tree(const Inputs& in, const Cpu& dev = kCpu) {
    Trial<T, Cpu> run(dev, in);
    run.forward(), run.backward();
    return run.outputs();
}
template <class T>
Outputs direct(const Inputs& in) {
    Trial<T, Cpu> run(kCpu, in);
    run.dense_forward(), run.dense_backward();
    return run.outputs();
}
void expect_close(const Outputs& got, const Outputs& want, double tolerance, const Inputs& in) {
    EXPECT_TRUE(close_to(got.o, want.o, tolerance)) << "o";
    EXPECT_TRUE(close_to(got.lse, want.lse, tolerance)) << "lse";
    EXPECT_TRUE(close_to(got.dv, want.dv, tolerance)) << "dv";
    // Where a query has one key with all the weight, ds is the rounding of a difference of equal numbers.
    const auto gradient = [&](const Values& x, const Values& y, const char* name) {
        const Error e = measure(x, y);
        EXPECT_EQ(x.size(), y.size());
        EXPECT_EQ(e.nonfinite, 0u) << name;
        EXPECT_LE(e.max, tolerance * e.scale + 1e-9 * in.rounding_of_ds()) << name;
    };
    gradient(got.da, want.da, "da");
    gradient(got.db, want.db, "db");
    gradient(got.dF, want.dF, "dF");
    if (in.c.points != Points::kEqual) return;
    for (const Values* x : {&got.da, &got.db})
        for (const double y : *x) ASSERT_EQ(y, 0);
}

TEST(AttentionTree, MatchesDirectSums) {
    for (const std::int32_t n : {1, 2, 3, 17, 63, 64, 65, 128, 129, 1000})
        for (const Points points : {Points::kNormal, Points::kTied, Points::kEqual, Points::kSorted, Points::kReversed,
                                    Points::kFar, Points::kNarrow})
            for (const Gate gate : {Gate::kNone, Gate::kMild, Gate::kClosing, Gate::kShut})
                for (const bool causal : {true, false}) {
                    if (!causal && gate != Gate::kNone) continue;
                    const Inputs in({.lengths = {n}, .heads = 2, .causal = causal, .gate = gate, .points = points});
                    SCOPED_TRACE(in.c.name());
                    // lse of up to 1e4 has an absolute error of 1e-12, which the weights of the far points inherit
                    expect_close(tree<double>(in), direct<double>(in), points == Points::kFar ? 1e-10 : 1e-12, in);
                }
}
TEST(AttentionTree, MatchesDirectSumsOnPackings) {
    for (const auto& lengths : std::vector<std::vector<std::int32_t>>{{1, 3, 170, 64, 257, 1}, {200, 200, 200}})
        for (const bool causal : {true, false})
            for (const bool skip : {true, false}) {
                const Inputs in({.lengths = lengths,
                                 .heads = 3,
                                 .width = 5,
                                 .causal = causal,
                                 .gate = causal ? Gate::kMild : Gate::kNone,
                                 .skip = skip});
                SCOPED_TRACE(in.c.name());
                expect_close(tree<double>(in), direct<double>(in), 1e-12, in);
            }
}
TEST(AttentionTree, FloatMatchesDouble) {
    for (const Points points : {Points::kNormal, Points::kTied, Points::kSorted})
        for (const bool causal : {true, false}) {
            const Inputs in({.lengths = {1000}, .heads = 2, .causal = causal, .points = points});
            SCOPED_TRACE(in.c.name());
            const Outputs got = tree<float>(in), want = direct<double>(in), low = direct<float>(in);
            EXPECT_TRUE(close(got.o, want.o, low.o));
            EXPECT_TRUE(close(got.lse, want.lse, low.lse));
            EXPECT_TRUE(close(got.dv, want.dv, low.dv));
            EXPECT_TRUE(close(got.da, want.da, low.da));
            EXPECT_TRUE(close(got.db, want.db, low.db));
        }
}
TEST(AttentionTree, GradientsMatchFiniteDifferences) {
    for (const Case& c : std::vector<Case>{{.lengths = {70, 66}, .heads = 1, .width = 3, .gate = Gate::kMild},
                                           {.lengths = {9, 3}, .width = 4, .causal = false}}) {
        SCOPED_TRACE(c.name());
        Inputs in(c);
        // a on multiples of 0.1 and b half-way between: no difference within 10 h of the kink at zero
        for (double& x : in.a) x = std::round(10 * x) / 10;
        for (double& x : in.b) x = std::round(10 * x) / 10 + 0.05;
        const Outputs grad = tree<double>(in);
        const auto loss = [&] {
            Trial<double, Cpu> run(kCpu, in);
            run.forward();
            return inner(in.dout, run.compact(run.o));
        };
        EXPECT_TRUE(gradient_matches(grad.da, in.a, loss));
        EXPECT_TRUE(gradient_matches(grad.db, in.b, loss));
        EXPECT_TRUE(gradient_matches(grad.dv, in.v, loss));
        if (c.gate != Gate::kNone) {
            EXPECT_TRUE(gradient_matches(grad.dF, in.F, loss));
        }
    }
}
TEST(AttentionTree, ResultsDoNotDependOnThreads) {
    const Inputs in({.lengths = {1, 300, 170, 64}, .heads = 3, .gate = Gate::kMild});
    const Outputs one = tree<float>(in, Cpu{1}), four = tree<float>(in, Cpu{4});
    const auto same = [](const Values& x, const Values& y) { return identical(x.data(), y.data(), x.size() * 8); };
    EXPECT_TRUE(same(one.o, four.o));
    EXPECT_TRUE(same(one.lse, four.lse));
    EXPECT_TRUE(same(one.da, four.da));
    EXPECT_TRUE(same(one.db, four.db));
    EXPECT_TRUE(same(one.dF, four.dF));
    EXPECT_TRUE(same(one.dv, four.dv));
}
TEST(AttentionTree, RefusesBrokenContracts) {
    const Inputs in({.lengths = {8}, .gate = Gate::kMild});
    Trial<float, Cpu> run(kCpu, in);
    AttentionTreeForward<float> p = run.forward_args();
    EXPECT_NO_THROW(attention_tree_forward(kCpu, p));
    p.causal = false;  // a gate needs causality
    EXPECT_THROW(attention_tree_forward(kCpu, p), ContractError);
    p.causal = true, p.tuning.leaf = 100;
    EXPECT_THROW(attention_tree_forward(kCpu, p), ContractError);
}

// ---- geometry of the GPU's blocks ------------------------------------------------------------------------------------
using namespace attention_tree;

TEST(AttentionTree, EntriesKeepOrderAndContent) {
    const Values x = {-1e30, -3, -1e-40, -0.0, 0.0, 1e-40, 0.5, 2, 1e30};
    for (std::size_t i = 0; i < x.size(); ++i)
        for (std::size_t j = 0; j < x.size(); ++j) {
            const auto p = float(x[i]), q = float(x[j]);
            const Entry e = entry_of(p, 7, true), f = entry_of(q, 8, false);
            EXPECT_EQ(scalar_of(e), p);
            EXPECT_EQ(token_of(e), 7);
            EXPECT_TRUE(is_query(e) && !is_query(f));
            if (p != q) {
                EXPECT_EQ(e < f, p < q);
            } else {
                EXPECT_LT(f, e) << "ties: keys first";
            }
        }
}
// Every position is in one block of its sequence, and no two blocks share a slot.
TEST(AttentionTree, BlocksCoverEveryPositionOnce) {
    for (const auto& lengths :
         std::vector<std::vector<std::int32_t>>{{1}, {64, 64}, {65, 65, 65}, {1, 1, 1, 200, 63, 64, 65, 129, 2}})
        for (const std::int64_t size : {64ll, 128ll, 1ll << 40})
            for (const std::int32_t axis : {1, 2})
                for (const bool uniform : {true, false}) {
                    if (uniform && lengths.size() > 3) continue;
                    const Ragged ragged(lengths);
                    const Packed seq =
                        uniform ? Packed::uniform(std::int32_t(lengths.size()), lengths[0]) : ragged.packed();
                    Blocks blocks = Blocks::of(seq, size, axis);
                    std::vector<Block> table(std::size_t(blocks.slots));
                    if (!uniform) blocks.table = table.data();
                    for (std::int32_t s = 0; !uniform && s < seq.count; ++s)
                        for (std::int32_t k = 0; blocks.note(seq, s, k); ++k)
                            ASSERT_LT(blocks.slot(s, seq.sequence_begin(s) * axis, k), blocks.slots);
                    std::vector<int> seen(std::size_t(seq.tokens * axis));
                    for (std::int32_t slot = 0; slot < blocks.slots; ++slot) {
                        const Block b = blocks.at(slot);
                        if (b.start < 0) continue;
                        const std::int32_t begin = seq.sequence_begin(b.sequence) * axis;
                        EXPECT_EQ(blocks.slot(b.sequence, begin, std::int32_t((b.start - begin) / size)), slot);
                        const auto end = std::min<std::int64_t>(b.start + size, seq.sequence_end(b.sequence) * axis);
                        for (std::int64_t i = b.start; i < end; ++i) ++seen[std::size_t(i)];
                    }
                    for (const int n : seen) ASSERT_EQ(n, 1);
                }
}
// Over all levels and the leaves, every causal pair is met once.
TEST(AttentionTree, NodesMeetEveryPairOnce) {
    const Ragged ragged({1, 300, 64, 65, 129});
    const Packed seq = ragged.packed();
    const std::int32_t leaf = 64, n = seq.tokens;
    std::vector<int> met(std::size_t(n * n));
    for (std::int32_t i = 0; i < n; ++i)
        for (std::int32_t j = seq.first(i) + (i - seq.first(i)) / leaf * leaf; j <= i; ++j)
            ++met[std::size_t(i * n + j)];
    for (std::int32_t l = 0; l < levels_of(300, leaf); ++l)
        for (std::int32_t i = 0; i < n; ++i) {
            const Node node = Level{seq, leaf << (l + 1)}.at(i);
            EXPECT_TRUE(node.lo <= i && i < node.hi && node.lo >= seq.first(i) && node.hi <= seq.last(i));
            if (node.works() && i >= node.mid)
                for (std::int32_t j = node.lo; j < node.mid; ++j) ++met[std::size_t(i * n + j)];
        }
    for (std::int32_t i = 0; i < n; ++i)
        for (std::int32_t j = 0; j < n; ++j)
            ASSERT_EQ(met[std::size_t(i * n + j)], seq.first(i) == seq.first(j) && j <= i) << i << ' ' << j;
}
// A token is first and last touched in the first and last level in which it has partners.
TEST(AttentionTree, TokensKnowTheirFirstAndLastLevel) {
    const Ragged ragged({1, 300, 64, 65, 129, 1000, 513});
    const Packed seq = ragged.packed();
    const std::int32_t leaf = 64, levels = levels_of(1000, leaf);
    for (std::int32_t i = 0; i < seq.tokens; ++i) {
        std::vector<std::int32_t> as_query, as_key;
        for (std::int32_t l = 0; l < levels; ++l) {
            const Node node = Level{seq, leaf << (l + 1), leaf, l}.at(i);
            if (node.works()) (i < node.mid ? as_key : as_query).push_back(l);
        }
        for (const std::int32_t l : as_query) {
            const Touch touch = Level{seq, leaf << (l + 1), leaf, l}.of_query(i);
            ASSERT_EQ(touch.first, l == as_query.front()) << i << ' ' << l;
            ASSERT_EQ(touch.last, l == as_query.back()) << i << ' ' << l;
        }
        for (const std::int32_t l : as_key) {
            const Touch touch = Level{seq, leaf << (l + 1), leaf, l}.of_key(i);
            ASSERT_EQ(touch.first, l == as_key.front()) << i << ' ' << l;
            ASSERT_EQ(touch.last, l == as_key.back()) << i << ' ' << l;
        }
    }
}
TEST(AttentionTree, CutsOfMergedRunsAreExact) {
    for (const auto& [m, n] :
         std::vector<std::pair<std::int32_t, std::int32_t>>{{0, 5}, {5, 0}, {1, 1}, {100, 37}, {700, 900}})
        for (const int kind : {0, 1, 2}) {
            std::vector<Entry> a, b, all;
            const auto x = random_ints(std::size_t(m), 1, 0, 1000), y = random_ints(std::size_t(n), 2, 0, 1000);
            for (std::int32_t i = 0; i < m; ++i)
                a.push_back(entry_of(float(kind == 0 ? x[std::size_t(i)] : 0), i, false));
            for (std::int32_t i = 0; i < n; ++i)
                b.push_back(entry_of(float(kind == 0 ? y[std::size_t(i)] : kind == 1 ? 0 : -1), i, true));
            std::sort(a.begin(), a.end()), std::sort(b.begin(), b.end());
            std::merge(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(all));
            std::int32_t from_a = 0;
            for (std::int32_t d = 0; d <= m + n; ++d) {
                Cut cut(m, n, d);
                int rounds = 0;
                for (; cut.open() && rounds < 10; ++rounds) {
                    std::int32_t taken = 0;
                    for (std::int32_t lane = 0; lane < 32; ++lane) {
                        const auto i = std::size_t(cut.probe(lane));
                        taken += a.at(i) < b.at(std::size_t(d) - 1 - i);
                    }
                    cut.narrow(taken);
                }
                EXPECT_LT(rounds, 10);
                ASSERT_EQ(cut.lo, from_a) << d;
                if (d < m + n) from_a += !is_query(all[std::size_t(d)]);
            }
        }
}

// ---- sorted runs ----------------------------------------------------------------------------------------------------
// Every token of head 0, decoded as it comes, against the forward pass.
template <class T>
Values decoded(const Inputs& in) {
    AttentionRuns<T> runs(in.c.width);
    const auto a = to<T>(in.a), b = to<T>(in.b), F = to<T>(in.F), v = to<T>(in.v);
    std::vector<T> o(v.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
        const T gate = F.empty() ? T(0) : F[i];
        runs.append(b[i], gate, v.data() + i * std::size_t(in.c.width));
        runs.query(a[i], gate, o.data() + i * std::size_t(in.c.width));
    }
    EXPECT_EQ(runs.length(), std::int64_t(a.size()));
    return from(o);
}
TEST(AttentionTree, SortedRunsDecodeTheForwardPass) {
    for (const std::int32_t n : {1, 2, 63, 64, 65, 128, 129, 1000, 1024, 3000})
        for (const Points points : {Points::kNormal, Points::kTied, Points::kEqual, Points::kSorted, Points::kReversed,
                                    Points::kFar, Points::kNarrow})
            for (const Gate gate : {Gate::kNone, Gate::kMild, Gate::kClosing}) {
                const Inputs in({.lengths = {n}, .gate = gate, .points = points});
                SCOPED_TRACE(in.c.name());
                const Values want = direct<double>(in).o;
                EXPECT_TRUE(close_to(decoded<double>(in), want, points == Points::kFar ? 1e-10 : 1e-12));
                // F of -1e4 rounds by 1e-3 as a float, here as in the direct sum
                if (points != Points::kFar && gate != Gate::kClosing) {
                    EXPECT_TRUE(close_to(decoded<float>(in), want, 1e-5));
                }
            }
}

// A context of a million keys: the last query against the direct sum in double.
TEST(AttentionTree, SortedRunsDecodeAMillionKeys) {
    const std::int32_t n = 1 << 20, width = 8;
    const Values b = round_to<float>(random_values(n, 1)), v = round_to<float>(random_values(n * width, 2));
    Values F(n);
    for (std::int32_t j = 0; j < n; ++j) F[std::size_t(j)] = double(float(-1e-5 * j));
    const auto b32 = to<float>(b), v32 = to<float>(v), F32 = to<float>(F);
    AttentionRuns<float> runs(width);
    for (std::int32_t j = 0; j < n; ++j)
        runs.append(b32[std::size_t(j)], F32[std::size_t(j)], v32.data() + std::int64_t(j) * width);
    EXPECT_LT(double(runs.bytes()), 4.0 * n * (width + 2 + (width + 3) / 16.0) * 1.01);
    for (const double a : {0.0, -3.7, 50.0}) {
        Values want(width), query{a};
        AttentionDecode<double> p;
        p.o = {want.data(), width}, p.a = Vec<double>(query.data(), 1);
        p.b = Mat<const double>(b.data(), n, 1), p.F = Mat<const double>(F.data(), n, 1);
        p.v = Mat<const double>(v.data(), n, width);
        attention_decode(kCpu, p);
        std::vector<float> got(width);
        runs.query(float(a), F32.back(), got.data());
        for (std::size_t d = 0; d < width; ++d) EXPECT_NEAR(got[d], want[d], 1e-5) << a;
    }
}

#if FIEDLER_CUDA
// The contract, pair by pair, in float with the weights of matrix products, the leaves' shares of o and dv, and o and dv
// themselves as bf16: the yardstick.
struct Rounded {
    Outputs forward, backward;  // backward: from o and lse as given
};
Rounded naive(const Inputs& in, const Values& o_given, const Values& lse_given) {
    const auto n = in.tokens(), H = in.c.heads, D = in.c.width;
    const auto a = to<float>(in.a), b = to<float>(in.b), F = to<float>(in.F), v = to<float>(in.v),
               g = to<float>(in.dout);
    std::vector<float> o(v.size()), lse(a.size()), da(a.size()), db(a.size()), dF(F.size()), dv(v.size()),
        dv_rest(v.size());
    const auto rounded = [](float x) { return float(bf16(x)); };
    const Packed seq = in.ragged.packed();
    for (std::int32_t h = 0; h < H; ++h)
        for (std::int32_t i = 0; i < n; ++i) {
            const auto ih = std::size_t(i * H + h);
            const auto score = [&](std::int32_t j) {
                const auto jh = std::size_t(j * H + h);
                return -std::abs(a[ih] - b[jh]) + (F.empty() ? 0.f : F[ih] - F[jh]);
            };
            const std::int32_t from = seq.first(i), to = in.c.causal ? i + 1 : seq.last(i);
            const std::int32_t leaf = in.c.causal ? from + (i - from) / in.c.leaf * in.c.leaf : to;  // from here: bf16
            float top = -INFINITY, sum = 0, others = 0, delta = 0;
            std::vector<float> rest(std::size_t(D), 0.f);
            for (std::int32_t j = from; j < to; ++j) top = std::max(top, score(j));
            for (std::int32_t j = from; j < to; ++j) {
                const float p = std::exp(score(j) - top);
                (j < leaf ? others : sum) += p;
                for (std::int32_t d = 0; d < D; ++d)
                    (j < leaf ? rest[std::size_t(d)] : o[ih * D + d]) += rounded(p) * v[std::size_t(j * H + h) * D + d];
            }
            for (std::int32_t d = 0; d < D; ++d)
                o[ih * D + d] =
                    ((sum > 0 ? rounded(o[ih * D + d] / sum) : 0.f) * sum + rest[std::size_t(d)]) / (sum + others);
            sum += others;
            lse[ih] = top + std::log(sum);
            for (std::int32_t d = 0; d < D; ++d) delta += g[ih * D + d] * float(o_given[ih * D + d]);
            for (std::int32_t j = from; j < to; ++j) {
                const auto jh = std::size_t(j * H + h);
                const float p = std::exp(score(j) - float(lse_given[ih])), sign = a[ih] > b[jh]   ? 1
                                                                                  : a[ih] < b[jh] ? -1
                                                                                                  : 0;
                float dp = 0;
                for (std::int32_t d = 0; d < D; ++d) {
                    dp += g[ih * D + d] * v[jh * D + d];
                    (j < leaf ? dv_rest : dv)[jh * D + d] += rounded(p) * g[ih * D + d];
                }
                const float ds = p * (dp - delta);
                da[ih] -= sign * ds, db[jh] += sign * ds;
                if (!F.empty()) dF[jh] -= ds;
            }
        }
    for (std::size_t k = 0; k < dv.size(); ++k) dv[k] = rounded(dv[k]) + dv_rest[k];
    const Outputs all = {round_to<bf16>(from(o)), from(lse), from(da), from(db), from(dF), round_to<bf16>(from(dv))};
    return {all, all};
}

void expect_within(const Outputs& got, const Outputs& want, const Outputs& low, const Inputs& in) {
    EXPECT_TRUE(close(got.dv, want.dv, low.dv)) << "dv";
    if (in.alone()) {
        for (const Values* gradient : {&got.da, &got.db, &got.dF})
            for (const double x : *gradient) EXPECT_LE(std::abs(x), in.rounding_of_ds());
        return;
    }
    // A query may have one key with all the weight: then ds is the difference of two equal numbers, and what is left is
    // their rounding, whatever the size of the gradient.
    const bool lonely = in.c.points == Points::kFar || in.c.gate == Gate::kClosing || in.c.gate == Gate::kShut;
    const auto coarse = [&](Values gradient) {
        if (lonely)
            for (double& x : gradient) x += in.rounding_of_ds() / 8;
        return gradient;
    };
    if (in.c.points != Points::kEqual) {
        EXPECT_TRUE(close(got.da, want.da, coarse(low.da))) << "da";
        EXPECT_TRUE(close(got.db, want.db, coarse(low.db))) << "db";
    } else {
        for (const Values* gradient : {&got.da, &got.db})
            for (const double x : *gradient) ASSERT_EQ(x, 0);
    }
    if (in.c.gate != Gate::kNone) {
        EXPECT_TRUE(close(got.dF, want.dF, coarse(low.dF))) << "dF";
    }
}
void expect_identical(const Outputs& x, const Outputs& y) {
    const auto same = [](const Values& p, const Values& q) { return identical(p.data(), q.data(), p.size() * 8); };
    EXPECT_TRUE(same(x.o, y.o) && same(x.lse, y.lse)) << "forward";
    EXPECT_TRUE(same(x.da, y.da) && same(x.db, y.db) && same(x.dv, y.dv)) << "backward";
    if (!x.dF.empty()) {
        EXPECT_TRUE(same(x.dF, y.dF)) << "dF";
    }
}
// dense: the yardstick is the dense kernel, where loops over all pairs take too long.
void check_gpu(const Inputs& in, bool dense = false) {
    SCOPED_TRACE(in.c.name());
    Trial<double, Cpu> reference(kCpu, in);
    reference.forward();
    const Values want_o = reference.compact(reference.o), want_lse = reference.lse.values();
    const Values o = round_to<bf16>(want_o), lse = round_to<float>(want_lse);
    reference.give(o, lse);
    reference.backward();
    Outputs low_forward, low;
    if (dense) {
        Trial<bf16, Cuda> yardstick(gpu(), in);
        yardstick.dense_forward();
        low_forward.o = yardstick.compact(yardstick.o), low_forward.lse = yardstick.lse.values();
        yardstick.give(o, lse);
        yardstick.dense_backward();
        low = yardstick.outputs();
    } else {
        const Rounded rounded = naive(in, o, lse);
        low_forward = rounded.forward, low = rounded.backward;
    }
    Outputs first;
    for (const int turn : {0, 1}) {
        Trial<bf16, Cuda> run(gpu(), in);
        run.forward();
        const Values got_o = run.compact(run.o), got_lse = run.lse.values();
        run.give(o, lse);
        run.backward();
        Outputs got = run.outputs();
        if (turn == 0) {
            EXPECT_TRUE(close(got_o, want_o, low_forward.o)) << "o";
            EXPECT_TRUE(close(got_lse, want_lse, low_forward.lse)) << "lse";
            expect_within(got, reference.outputs(), low, in);
        }
        got.o = got_o, got.lse = got_lse;
        if (turn == 0) first = got;
        if (turn == 1) expect_identical(first, got);  // bit-equal from run to run
    }
}
void check_gpu(const Case& c) { check_gpu(Inputs(c)); }

TEST(AttentionTree, GpuMatchesReferenceAtEveryWidth) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t width : {16, 32, 64, 128})
        for (const bool causal : {true, false})
            check_gpu({.lengths = {700},
                       .heads = 2,
                       .width = width,
                       .causal = causal,
                       .gate = causal ? Gate::kMild : Gate::kNone,
                       .leaf = 128});
}
TEST(AttentionTree, GpuMatchesReferenceAtEveryLength) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t n : {1, 3, 63, 64, 65, 127, 128, 129, 192, 193, 257, 512, 514})
        for (const std::int32_t count : {1, 3}) {
            const std::vector<std::int32_t> lengths(std::size_t(count), n);
            const std::int32_t heads = n < 63 ? 8 : 2;  // enough values for an error to be typical
            check_gpu({.lengths = lengths, .heads = heads, .gate = Gate::kMild, .leaf = 64});
            check_gpu({.lengths = lengths, .heads = heads, .causal = false, .leaf = 64});
        }
}
TEST(AttentionTree, GpuMatchesReferenceOnRaggedSequences) {
    FIEDLER_GPU_OR_SKIP();
    for (const auto& lengths :
         std::vector<std::vector<std::int32_t>>{{1, 3, 70, 64, 129},
                                                {400, 1},
                                                {1, 300, 129, 128, 127},
                                                {5, 9, 1, 1, 2, 30, 7, 7, 11, 222, 4, 19, 3, 63, 65}})
        for (const std::int32_t leaf : {64, 128}) {
            check_gpu({.lengths = lengths, .heads = 2, .gate = Gate::kMild, .leaf = leaf, .known = leaf == 64});
            check_gpu(
                {.lengths = lengths, .heads = 2, .width = 32, .causal = false, .leaf = leaf, .known = leaf == 128});
        }
}
TEST(AttentionTree, GpuMatchesReferenceAtTiesAndInEveryOrder) {
    FIEDLER_GPU_OR_SKIP();
    for (const Points points :
         {Points::kTied, Points::kEqual, Points::kSorted, Points::kReversed, Points::kFar, Points::kNarrow})
        for (const Gate gate : {Gate::kNone, Gate::kMild}) {
            check_gpu({.lengths = {900}, .heads = 2, .gate = gate, .points = points, .leaf = 64});
            if (gate == Gate::kNone)
                check_gpu({.lengths = {900}, .heads = 2, .causal = false, .points = points, .leaf = 64});
        }
}
TEST(AttentionTree, GpuGateClosesCompletely) {
    FIEDLER_GPU_OR_SKIP();
    for (const Gate gate : {Gate::kOpen, Gate::kClosing, Gate::kShut})
        for (const Points points : {Points::kNormal, Points::kFar})
            for (const bool skip : {true, false})
                check_gpu({.lengths = {900}, .heads = 2, .gate = gate, .points = points, .leaf = 64, .skip = skip});
}
TEST(AttentionTree, GpuHeadsInGroupsGiveTheSame) {
    FIEDLER_GPU_OR_SKIP();
    const auto run = [](std::int32_t together) {
        const Inputs in({.lengths = {300, 300}, .heads = 5, .gate = Gate::kMild, .leaf = 64, .together = together});
        Trial<bf16, Cuda> trial(gpu(), in);
        trial.forward(), trial.backward();
        return trial.outputs();
    };
    const Outputs all = run(0);
    for (const std::int32_t together : {1, 2, 5, 9}) expect_identical(all, run(together));
}
// What is skipped is below a rounding.
TEST(AttentionTree, GpuSkippingChangesNothingInFloat) {
    FIEDLER_GPU_OR_SKIP();
    const auto run = [](bool skip) {
        const Inputs in({.lengths = {2000}, .heads = 2, .gate = Gate::kClosing, .leaf = 64, .skip = skip});
        Trial<bf16, Cuda> trial(gpu(), in);
        trial.forward(), trial.backward();
        return trial.outputs();
    };
    const Outputs with = run(true), without = run(false);
    EXPECT_TRUE(close_to(with.lse, without.lse, 1e-6));  // a few roundings of a sum, one for each level
    EXPECT_TRUE(close_to(with.o, without.o, 4e-3));      // a rounding of bf16
    EXPECT_TRUE(close_to(with.dv, without.dv, 4e-3));
    EXPECT_TRUE(close_to(with.da, without.da, 1e-5));
    EXPECT_TRUE(close_to(with.db, without.db, 1e-5));
    EXPECT_TRUE(close_to(with.dF, without.dF, 1e-5));
}
// The default leaf, and levels with more than one segment of the scan.
TEST(AttentionTree, GpuMatchesReferenceAtSomeThousands) {
    FIEDLER_GPU_OR_SKIP();
    check_gpu({.lengths = {4096}, .heads = 2, .gate = Gate::kMild});
    check_gpu({.lengths = {5001}, .points = Points::kTied});
    check_gpu({.lengths = {3000}, .causal = false});
    check_gpu({.lengths = {3000, 77, 1500}, .heads = 2, .gate = Gate::kMild, .leaf = 256});
}
// Leaves that the dense family has kernels of their own for on some architectures.
TEST(AttentionTree, GpuMatchesReferenceWithEqualLeaves) {
    FIEDLER_GPU_OR_SKIP();
    for (const Gate gate : {Gate::kNone, Gate::kMild})
        check_gpu({.lengths = {1024, 1024}, .heads = 2, .width = 64, .gate = gate, .leaf = 256});
}
TEST(AttentionTree, GpuMatchesReferenceAndDenseKernelAtLongSequences) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::int32_t n : {16384, 65536, 131072})
        check_gpu(Inputs({.lengths = {n}, .heads = n > 65536 ? 1 : 2, .width = 64, .gate = Gate::kMild}), true);
    check_gpu(Inputs({.lengths = {65536}, .width = 64, .gate = Gate::kOpen, .points = Points::kTied}), true);
    check_gpu(Inputs({.lengths = {30000, 41, 30001}, .width = 32}), true);
    check_gpu(Inputs({.lengths = {32768}, .width = 64, .causal = false}), true);
}
TEST(AttentionTree, GpuCanBeRecorded) {
    FIEDLER_GPU_OR_SKIP();
    const Inputs in({.lengths = {700}, .heads = 2, .gate = Gate::kMild, .leaf = 64});
    Trial<bf16, Cuda> run(gpu(), in), recorded(gpu(), in);
    run.forward(), run.backward();
    recorded.forward(), recorded.backward();  // modules are loaded at the first call
    recorded.o.poison(), recorded.dv.poison(), recorded.da.poison();
    CudaGraph* graph = graph_record(gpu(), [&] { recorded.forward(), recorded.backward(); });
    graph_launch(gpu(), graph);
    synchronize(gpu());
    const Values o = run.o.values(), again = recorded.o.values(), da = run.da.values(), da_again = recorded.da.values();
    EXPECT_TRUE(close_to(recorded.compact(recorded.dv), run.compact(run.dv), 0));
    EXPECT_TRUE(close_to(recorded.compact(recorded.o), run.compact(run.o), 0)) << o.size() << again.size();
    EXPECT_TRUE(close_to(da_again, da, 0));
    graph_free(graph);
}
#endif

}  // namespace
}  // namespace fiedler::test
