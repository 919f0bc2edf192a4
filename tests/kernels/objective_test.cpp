// objective: closed forms, finite differences of every kind with missing targets, and the GPU in each width of a row.
#include "kernels/objective.h"

#include <cstring>
#include <functional>

#include "tests/support/gradcheck.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

constexpr ObjectiveKind kKinds[] = {ObjectiveKind::classes, ObjectiveKind::binary, ObjectiveKind::squared,
                                    ObjectiveKind::absolute, ObjectiveKind::huber};

struct Problem {
    ObjectiveKind kind;
    std::int64_t rows, outputs;
    Values o;
    std::vector<std::int32_t> classes;
    Values targets, weights, shift, scale;  // the last three may be empty
    double factor = 0.125, smoothing = 0, delta = 0.7;
    double scale_by = 0;  // 0: absent

    Problem(ObjectiveKind k, std::int64_t r, std::int64_t n, bool extras = true) : kind(k), rows(r), outputs(n) {
        const auto size = std::size_t(r * n);
        o = random_values(size, 1, 2.0);
        classes = random_ints(std::size_t(r), 2, -1, std::int32_t(n));
        classes[0] = std::int32_t(n - 1);
        if (k == ObjectiveKind::binary) {
            for (const std::int32_t t : random_ints(size, 3, 0, 2)) targets.push_back(t);
        } else {
            targets = round_to<float>(random_values(size, 3));
        }
        for (std::size_t i = 1; i < size; i += 5) targets[i] = std::nan("");  // missing
        if (r > 2)
            for (std::int64_t c = 0; c < n; ++c) targets[std::size_t(n + c)] = std::nan("");  // a whole row
        if (!extras) return;
        weights = round_to<float>(random_uniform(std::size_t(r), 4, 0.5, 2));
        scale_by = 0.75;
        smoothing = 0.125;
        if (is_number(k)) {
            shift = round_to<float>(random_values(std::size_t(r), 5));
            scale = round_to<float>(random_uniform(std::size_t(r), 6, 0.5, 2));
        }
    }
};

struct Answer {
    Values losses, doutputs, predictions;
    std::vector<std::int32_t> counts;
    bool operator==(const Answer&) const = default;
};

// The contract once more, term by term.
Answer naive(const Problem& q) {
    Answer a{Values(std::size_t(q.rows), 0.0), {}, {}, std::vector<std::int32_t>(std::size_t(q.rows), 0)};
    const double factor = q.factor * (q.scale_by != 0 ? q.scale_by : 1);
    for (std::int64_t i = 0; i < q.rows; ++i) {
        const auto row = std::size_t(i);
        const double* o = q.o.data() + i * q.outputs;
        const double weight = q.weights.empty() ? 1 : q.weights[row];
        double total = 0;
        for (std::int64_t k = 0; k < q.outputs; ++k) total += std::exp(o[k]);
        for (std::int64_t k = 0; k < q.outputs; ++k) {
            const double t = q.targets[std::size_t(i * q.outputs + k)];
            const double stretch = q.scale.empty() ? 1 : q.scale[row];
            const double g = (q.shift.empty() ? 0 : q.shift[row]) + stretch * o[k], e = g - t;
            double loss = 0, gradient = 0, prediction = g;
            bool known = !std::isnan(t);
            if (q.kind == ObjectiveKind::classes) {
                known = q.classes[row] >= 0;
                prediction = std::exp(o[k]) / total;
                const double wanted = (1 - q.smoothing) * (k == q.classes[row]) + q.smoothing / double(q.outputs);
                loss = -wanted * std::log(prediction);
                gradient = prediction - wanted;
                a.counts[row] = known;
            } else {
                a.counts[row] += known;
            }
            if (q.kind == ObjectiveKind::binary) {
                prediction = 1 / (1 + std::exp(-o[k]));
                const double wanted = (1 - q.smoothing) * t + q.smoothing / 2;
                loss = -wanted * std::log(prediction) - (1 - wanted) * std::log(1 - prediction);
                gradient = prediction - wanted;
            } else if (q.kind == ObjectiveKind::squared) {
                loss = e * e, gradient = 2 * e * stretch;
            } else if (q.kind == ObjectiveKind::absolute) {
                loss = std::abs(e), gradient = (e > 0 ? 1 : -1) * stretch;
            } else if (q.kind == ObjectiveKind::huber) {
                const bool near = std::abs(e) <= q.delta;
                loss = near ? e * e / 2 : q.delta * (std::abs(e) - q.delta / 2);
                gradient = (near ? e : e > 0 ? q.delta : -q.delta) * stretch;
            }
            a.losses[row] += known ? weight * loss : 0;
            a.doutputs.push_back(known ? factor * weight * gradient : 0);
            a.predictions.push_back(prediction);
        }
    }
    return a;
}

enum class Ask { all, losses, predictions };

template <class T, class Dev>
Answer run(const Dev& dev, const Problem& q, std::int64_t gap = 0, std::int64_t padding = 0, Ask ask = Ask::all) {
    using A = acc_t<T>;
    const std::int64_t n = q.outputs;
    const Padded<A, Dev> outputs(dev, q.rows, n, n + gap, q.o), predictions(dev, q.rows, n, n + 2 * gap);
    const Padded<T, Dev> doutputs(dev, q.rows, n + padding, n + padding + gap);
    const Padded<float, Dev> targets(dev, q.rows, n, n + gap, q.targets);
    const Buffer<std::int32_t, Dev> classes(dev, q.classes), counts(dev, std::size_t(q.rows));
    const Buffer<float, Dev> weights(dev, to<float>(q.weights)), shift(dev, to<float>(q.shift)),
        scale(dev, to<float>(q.scale));
    const Buffer<A, Dev> losses(dev, std::size_t(q.rows)), scale_by(dev, to<A>(Values{q.scale_by}));
    Objective<T> p;
    p.outputs = outputs.mat(), p.kind = q.kind;
    p.scale = A(q.factor), p.smoothing = A(q.smoothing), p.delta = A(q.delta);
    if (ask != Ask::losses) p.predictions = predictions.mat();
    if (ask != Ask::predictions) {
        p.losses = losses.vec(), p.counts = counts.vec();
        if (q.kind == ObjectiveKind::classes)
            p.classes = classes.vec();
        else
            p.targets = targets.mat();
    }
    if (ask == Ask::all) p.doutputs = doutputs.mat();
    if (!q.weights.empty()) p.weights = weights.vec();
    if (!q.shift.empty()) p.row_shift = shift.vec();
    if (!q.scale.empty()) p.row_scale = scale.vec();
    if (q.scale_by != 0) p.scale_by = scale_by.vec();
    objective(dev, p);
    Answer a;
    if (ask != Ask::losses) a.predictions = predictions.values();
    if (ask != Ask::predictions) a.losses = losses.values(), a.counts = counts.host();
    if (ask == Ask::all) {
        const Values all = doutputs.values();
        for (std::int64_t i = 0; i < q.rows; ++i)
            for (std::int64_t k = 0; k < n + padding; ++k) {
                const double v = all[std::size_t(i * (n + padding) + k)];
                if (k < n)
                    a.doutputs.push_back(v);
                else
                    EXPECT_EQ(v, 0.0) << "row " << i << ", column " << k << " beyond the outputs";
            }
    }
    return a;
}

TEST(Objective, MatchesTheFormulas) {
    for (const ObjectiveKind kind : kKinds)
        for (const std::int64_t n : {1, 2, 7, 65})
            for (const bool extras : {false, true}) {
                SCOPED_TRACE(testing::Message() << "kind " << int(kind) << ", outputs " << n);
                Problem q(kind, 9, n, extras);
                q.o = round_to<float>(q.o);
                q.delta = 0.75;
                const Answer ref = naive(q), d = run<double>(Cpu{}, q, 3, 2), f = run<float>(Cpu{}, q, 3, 2);
                for (const auto& [got, tolerance] : {std::pair{&d, 1e-12}, std::pair{&f, 5e-6}}) {
                    EXPECT_EQ(got->counts, ref.counts);
                    EXPECT_TRUE(close_to(got->losses, ref.losses, tolerance));
                    EXPECT_TRUE(close_to(got->doutputs, ref.doutputs, tolerance));
                    EXPECT_TRUE(close_to(got->predictions, ref.predictions, tolerance));
                }
                EXPECT_EQ(run<double>(Cpu{}, q, 0, 0, Ask::losses).losses, d.losses);
                EXPECT_EQ(run<double>(Cpu{}, q, 0, 0, Ask::predictions).predictions, d.predictions);
            }
}

TEST(Objective, GradientMatchesFiniteDifferences) {
    for (const ObjectiveKind kind : kKinds) {
        SCOPED_TRACE(int(kind));
        Problem q(kind, 5, 4);
        const Values d = run<double>(Cpu{1}, q).doutputs;
        const auto total = [&] {
            return q.factor * q.scale_by * inner(Values(5, 1.0), run<double>(Cpu{1}, q, 0, 0, Ask::losses).losses);
        };
        EXPECT_TRUE(gradient_matches(d, q.o, total));
    }
}

TEST(Objective, LargeOutputsStayFiniteAndNanShows) {
    for (const ObjectiveKind kind : {ObjectiveKind::classes, ObjectiveKind::binary}) {
        Problem q(kind, 4, 6);
        for (double& v : q.o) v *= 1e4;
        for (const double v : run<float>(Cpu{}, q).losses) EXPECT_TRUE(std::isfinite(v));
        for (const double v : run<float>(Cpu{}, q).doutputs) EXPECT_TRUE(std::isfinite(v));
    }
    for (const ObjectiveKind kind : kKinds) {
        Problem q(kind, 4, 6);
        q.o[5] = q.o[6] = std::nan("");  // rows 0 and 1; the second has no targets
        q.classes[1] = -1;
        const Answer a = run<float>(Cpu{}, q);
        EXPECT_TRUE(std::isnan(a.losses[0])) << int(kind);
        EXPECT_EQ(a.losses[1], 0.0) << int(kind);
        EXPECT_EQ(a.doutputs[6], 0.0) << int(kind);
    }
}

TEST(Objective, DoesNotDependOnThreads) {
    for (const ObjectiveKind kind : kKinds) {
        const Problem q(kind, 100, 33);
        EXPECT_TRUE(run<float>(Cpu{1}, q) == run<float>(Cpu{5}, q));
    }
}

TEST(Objective, SumAddsToTotalAndCount) {
    Values losses = random_values(1001, 9);
    std::vector<std::int32_t> counts = random_ints(1001, 10, 0, 5);
    double total = 5, ref = 5;
    std::int64_t count = 7, count_ref = 7;
    for (std::size_t i = 0; i < 1001; ++i) ref += losses[i], count_ref += counts[i];
    objective_sum(Cpu{}, ObjectiveSum<double>{{&total, 1}, {&count, 1}, {losses.data(), 1001}, {counts.data(), 1001}});
    EXPECT_NEAR(total, ref, 1e-11);
    EXPECT_EQ(count, count_ref);
}

TEST(Objective, BrokenContractThrows) {
    Problem q(ObjectiveKind::classes, 3, 4);
    EXPECT_NO_THROW(run<float>(Cpu{}, q));
    q.classes[2] = 4;
    EXPECT_THROW(run<float>(Cpu{}, q), ContractError);
    q = Problem(ObjectiveKind::binary, 3, 4);
    q.scale = Values(3, 2.0);
    EXPECT_THROW(run<float>(Cpu{}, q), ContractError);
    q = Problem(ObjectiveKind::huber, 3, 4);
    q.delta = 0;
    EXPECT_THROW(run<float>(Cpu{}, q), ContractError);
}

#if FIEDLER_CUDA
TEST(Objective, GpuMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const ObjectiveKind kind : kKinds)
        for (const std::int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 12, 31, 32, 33, 96, 720, 1025})
            for (const std::int64_t rows : {33, 130})
                for (const bool extras : {false, true}) {
                    SCOPED_TRACE(testing::Message() << "kind " << int(kind) << ", " << rows << " x " << n);
                    Problem q(kind, rows, n, extras);
                    q.o = round_to<float>(q.o), q.delta = 0.75;
                    const Answer ref = run<double>(Cpu{}, q), low = run<float>(Cpu{}, q),
                                 got = run<bf16>(gpu(), q, 3, 5);
                    EXPECT_EQ(got.counts, ref.counts);
                    EXPECT_TRUE(close(got.losses, ref.losses, low.losses));
                    EXPECT_TRUE(close(got.doutputs, ref.doutputs, round_to<bf16>(low.doutputs)));
                    EXPECT_TRUE(close(got.predictions, ref.predictions, low.predictions));
                    EXPECT_TRUE(got == run<bf16>(gpu(), q, 3, 5));
                    EXPECT_EQ(run<bf16>(gpu(), q, 0, 0, Ask::losses).losses, got.losses);
                    EXPECT_EQ(run<bf16>(gpu(), q, 0, 0, Ask::predictions).predictions, got.predictions);
                }
}

TEST(Objective, GpuRowDependsOnItselfAlone) {
    FIEDLER_GPU_OR_SKIP();
    for (const ObjectiveKind kind : kKinds)
        for (const std::int64_t n : {1, 12, 17, 100}) {
            SCOPED_TRACE(testing::Message() << "kind " << int(kind) << ", outputs " << n);
            const Problem q(kind, 40, n);
            for (const std::int64_t row : {0, 7, 39}) {
                Problem one = q;
                const auto i = std::ptrdiff_t(row);
                const auto keep = [&](auto& values, std::ptrdiff_t width) {
                    if (values.empty()) return;
                    values.erase(values.begin() + (i + 1) * width, values.end());
                    values.erase(values.begin(), values.begin() + i * width);
                };
                one.rows = 1;
                keep(one.o, n), keep(one.targets, n), keep(one.classes, 1);
                keep(one.weights, 1), keep(one.shift, 1), keep(one.scale, 1);
                const Answer all = run<bf16>(gpu(), q), alone = run<bf16>(gpu(), one);
                const auto part = [&](const Values& v) { return Values(v.begin() + i * n, v.begin() + (i + 1) * n); };
                EXPECT_EQ(alone.losses[0], all.losses[std::size_t(row)]);
                EXPECT_EQ(alone.counts[0], all.counts[std::size_t(row)]);
                EXPECT_EQ(alone.doutputs, part(all.doutputs));
                EXPECT_EQ(alone.predictions, part(all.predictions));
            }
        }
}

TEST(Objective, GpuNanShowsAndMissingRowsAreZero) {
    FIEDLER_GPU_OR_SKIP();
    for (const ObjectiveKind kind : kKinds)
        for (const std::int64_t n : {6, 100}) {
            Problem q(kind, 4, n);
            q.o[std::size_t(n - 2)] = q.o[std::size_t(n)] = std::nan("");
            q.targets[std::size_t(n - 2)] = 1;
            q.classes[1] = -1;
            const Answer a = run<bf16>(gpu(), q);
            EXPECT_TRUE(std::isnan(a.losses[0])) << int(kind);
            EXPECT_EQ(a.losses[1], 0.0) << int(kind);
            EXPECT_EQ(a.doutputs[std::size_t(n)], 0.0) << int(kind);
        }
}

TEST(Objective, GpuClassBeyondTheOutputsShows) {
    FIEDLER_GPU_OR_SKIP();
    Problem q(ObjectiveKind::classes, 3, 4);
    q.classes[2] = 4;
    EXPECT_TRUE(std::isnan(run<bf16>(gpu(), q).losses[2]));
}

TEST(Objective, GpuSumAddsToTotalAndCount) {
    FIEDLER_GPU_OR_SKIP();
    for (const std::size_t n : {1, 3, 1023, 1024, 1025, 8194}) {
        SCOPED_TRACE(n);
        const Values values = round_to<float>(random_uniform(n, 10, 0, 12));
        const std::vector<std::int32_t> numbers = random_ints(n, 11, 0, 1000000);
        double ref = 2.5;
        std::int64_t count_ref = 7;
        for (std::size_t i = 0; i < n; ++i) ref += values[i], count_ref += numbers[i];
        const Buffer<float, Cuda> losses(gpu(), values), total(gpu(), Values{2.5});
        const Buffer<std::int32_t, Cuda> counts(gpu(), numbers);
        const Buffer<std::int64_t, Cuda> count(gpu(), std::vector<std::int64_t>{7});
        objective_sum(gpu(), ObjectiveSum<float>{total.vec(), count.vec(), losses.vec(), counts.vec()});
        EXPECT_EQ(float(total.values()[0]), float(ref)) << "f64 inside, one rounding";
        EXPECT_EQ(count.host()[0], count_ref);
    }
}
#endif

}  // namespace
}  // namespace fiedler::test
