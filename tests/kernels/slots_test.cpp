// slots: every step of many sequences side by side against the functions for one sequence over all its tokens: the
// convolution, scalars and gate carried from token to token, attention over a growing cache, idle slots left alone.
#include "kernels/slots.h"

#include "kernels/attention.h"
#include "kernels/conv.h"
#include "kernels/coordinate.h"
#include "kernels/dot.h"
#include "kernels/gate.h"
#include "kernels/matmul.h"
#include "kernels/rotary.h"
#include "tests/support/padded.h"

namespace fiedler::test {
namespace {

using Ints = std::vector<std::int32_t>;

// ---- append ----------------------------------------------------------------------------------------------------------

struct AppendCase {
    std::int64_t split, values, heads, scalars;  // M, C, heads, R; scalars 0: none
    bool conv = true, conv_scalars = true, gate = true;
};
void PrintTo(const AppendCase& c, std::ostream* out) {
    *out << c.split << "+" << c.values << ", " << c.heads << " heads, R " << c.scalars << (c.conv ? ", conv" : "")
         << (c.conv_scalars ? ", conv of scalars" : "") << (c.gate ? ", gate" : "");
}

// Slots whose sequences begin at different steps: slot s takes tokens from step start[s] on, and ends before step end[s].
struct AppendProblem {
    AppendCase c;
    std::int64_t capacity = 9, steps = 9;
    Ints start = {0, 2, 9, 1}, end = {9, 9, 9, 5};  // slot 2 never has a token
    Values x, w, s, w_scalars, log_temp, z, bias;   // x: [steps][slots][columns]

    explicit AppendProblem(const AppendCase& k) : c(k) {
        x = random_values(std::size_t(steps * slots() * columns()), 1);
        w = random_values(std::size_t(columns() * 4), 2);
        s = random_values(std::size_t(steps * slots() * 2 * hr()), 3);
        w_scalars = random_values(std::size_t(2 * hr() * 4), 4);
        log_temp = random_values(std::size_t(c.heads), 5, 0.5);
        z = random_values(std::size_t(steps * slots() * c.heads), 6, 2);
        bias = random_uniform(std::size_t(c.heads), 7, 0, 4);
        x = round_to<bf16>(x);
        for (Values* v : {&w, &s, &w_scalars, &log_temp, &z, &bias}) *v = round_to<float>(*v);
    }
    std::int64_t slots() const { return std::int64_t(start.size()); }
    std::int64_t columns() const { return c.split + c.values; }
    std::int64_t hr() const { return c.heads * c.scalars; }
    std::int32_t length(std::int64_t slot, std::int64_t step) const {
        const auto i = std::size_t(slot);
        return step < start[i] || step >= end[i] ? -1 : std::int32_t(step - start[i]);
    }
    std::int64_t tokens(std::int64_t slot) const { return end[std::size_t(slot)] - start[std::size_t(slot)]; }
    // One column block of a slot's sequence, [tokens, columns].
    Values sequence(const Values& all, std::int64_t width, std::int64_t slot) const {
        Values v;
        for (std::int64_t t = start[std::size_t(slot)]; t < end[std::size_t(slot)]; ++t) {
            const auto* row = all.data() + (t * slots() + slot) * width;
            v.insert(v.end(), row, row + width);
        }
        return v;
    }
};

struct Appended {
    Values mixed, v, a, b, F;  // mixed, a: [steps][slots][..]; caches [slots capacity][..]
};

template <class T, class Dev>
Appended append(const Dev& dev, const AppendProblem& q) {
    using A = acc_t<T>;
    const std::int64_t n = q.slots(), rows = n * q.capacity, hr = q.hr(), h = q.c.heads;
    const Padded<T, Dev> v(dev, rows, q.c.values, q.c.values + 8), mixed(dev, n, q.c.split, q.c.split + 16);
    const Buffer<A, Dev> w(dev, to<A>(q.w)), w_scalars(dev, to<A>(q.w_scalars)), log_temp(dev, to<A>(q.log_temp)),
        bias(dev, to<A>(q.bias));
    Buffer<T, Dev> past(dev, std::size_t(kSlotPast * n * q.columns()));
    Buffer<A, Dev> past_scalars(dev, std::size_t(kSlotPast * n * 2 * hr)), carry(dev, std::size_t(n * h)),
        a(dev, std::size_t(n * hr)), b(dev, std::size_t(rows * hr)), F(dev, std::size_t(rows * h));
    past.zero(), past_scalars.zero(), carry.zero();
    Appended out;
    for (std::int64_t step = 0; step < q.steps; ++step) {
        Ints lengths;
        for (std::int64_t s = 0; s < n; ++s) lengths.push_back(q.length(s, step));
        const auto of_step = [&](const Values& all, std::int64_t width) {
            const auto first = all.begin() + std::ptrdiff_t(step * n * width);
            return Values(first, first + std::ptrdiff_t(n * width));
        };
        const Buffer<std::int32_t, Dev> length(dev, lengths);
        const Padded<T, Dev> x(dev, n, q.columns(), q.columns() + 8, of_step(q.x, q.columns()));
        const Padded<A, Dev> s(dev, n, 2 * hr, 2 * hr + 3, of_step(q.s, 2 * hr)), z(dev, n, h, h + 1, of_step(q.z, h));
        SlotAppend<T> p;
        p.length = length.vec(), p.capacity = q.capacity, p.v = v.mat(), p.x = x.mat();
        if (q.c.split > 0) p.mixed = mixed.mat();
        if (q.c.conv) p.w = w.mat(q.columns(), 4), p.past = past.mat(kSlotPast * n, q.columns());
        if (q.c.scalars > 0) {
            p.a = a.mat(n, hr), p.b = b.mat(rows, hr), p.s = s.mat(), p.log_temp = log_temp.vec();
            if (q.c.conv_scalars)
                p.w_scalars = w_scalars.mat(2 * hr, 4), p.past_scalars = past_scalars.mat(kSlotPast * n, 2 * hr);
        }
        if (q.c.gate) p.F = F.mat(rows, h), p.z = z.mat(), p.bias = bias.vec(), p.carry = carry.mat(n, h);
        slot_append(dev, p);
        const auto add = [](Values& all, const Values& more) { all.insert(all.end(), more.begin(), more.end()); };
        add(out.mixed, mixed.values());
        add(out.a, a.values());
    }
    out.v = v.values(), out.b = b.values(), out.F = F.values();
    return out;
}

// Of each slot's sequence what the functions for whole sequences make of it; NaN where no token came.
template <class T>
Appended whole(const AppendProblem& q) {
    using A = acc_t<T>;
    const std::int64_t n = q.slots(), hr = q.hr(), h = q.c.heads, width = q.columns();
    const auto nan = [](std::int64_t k) { return Values(std::size_t(k), std::nan("")); };
    Appended out{nan(q.steps * n * q.c.split), nan(n * q.capacity * q.c.values), nan(q.steps * n * hr),
                 nan(n * q.capacity * hr), nan(n * q.capacity * h)};
    for (std::int64_t slot = 0; slot < n; ++slot) {
        const std::int64_t tokens = q.tokens(slot);
        if (tokens == 0) continue;
        const Packed seq = Packed::uniform(1, std::int32_t(tokens));
        std::vector<T> x = to<T>(q.sequence(q.x, width, slot)), y = x;
        const std::vector<A> w = to<A>(q.w), s = to<A>(q.sequence(q.s, 2 * hr, slot)), ws = to<A>(q.w_scalars),
                             lt = to<A>(q.log_temp), z = to<A>(q.sequence(q.z, h, slot)), bias = to<A>(q.bias);
        std::vector<A> a(std::size_t(tokens * hr)), b = a, F(std::size_t(tokens * h));
        if (q.c.conv)
            conv_forward(Cpu{}, ConvForward<T>{.y = {y.data(), tokens, width},
                                               .x = {x.data(), tokens, width},
                                               .w = {w.data(), width, 4},
                                               .seq = seq});
        if (q.c.scalars > 0)
            coordinate_forward(
                Cpu{}, CoordinateForward<A>{.a = {a.data(), tokens, hr},
                                            .b = {b.data(), tokens, hr},
                                            .s = {s.data(), tokens, 2 * hr},
                                            .w = q.c.conv_scalars ? Mat<const A>{ws.data(), 2 * hr, 4} : Mat<const A>{},
                                            .log_temp = {lt.data(), h},
                                            .seq = seq});
        gate_forward(Cpu{}, GateForward<A>{.F = {F.data(), tokens, h},
                                           .z = {z.data(), tokens, h},
                                           .bias = {bias.data(), h},
                                           .seq = seq,
                                           .carry = {}});
        for (std::int64_t i = 0; i < tokens; ++i) {
            const std::int64_t step = q.start[std::size_t(slot)] + i, row = slot * q.capacity + i;
            const auto put = [](Values& all, std::int64_t to_row, std::int64_t cols, const auto* from) {
                for (std::int64_t c = 0; c < cols; ++c) all[std::size_t(to_row * cols + c)] = double(from[c]);
            };
            // Rows of outputs keep what they have while a slot is idle.
            for (std::int64_t later = step; later < q.steps; ++later) {
                put(out.mixed, later * n + slot, q.c.split, y.data() + i * width);
                put(out.a, later * n + slot, hr, a.data() + i * hr);
            }
            put(out.v, row, q.c.values, y.data() + i * width + q.c.split);
            put(out.b, row, hr, b.data() + i * hr);
            put(out.F, row, h, F.data() + i * h);
        }
    }
    if (q.c.scalars == 0) out.a = out.b = {};
    if (!q.c.gate) out.F = {};
    return out;
}

// The same elements are absent, the others are compared.
template <class Compare>
void expect_same_where_there(const Values& got, const Values& want, const Compare& compare) {
    ASSERT_GE(got.size(), want.size());
    Values g, w;
    for (std::size_t i = 0; i < want.size(); ++i) {
        ASSERT_EQ(std::isnan(got[i]), std::isnan(want[i])) << i;
        if (!std::isnan(want[i])) g.push_back(got[i]), w.push_back(want[i]);
    }
    if (!w.empty()) compare(g, w);
}
template <class Compare>
void expect_appended(const AppendCase& c, const Appended& got, const Appended& want, const Compare& compare) {
    if (c.split > 0) expect_same_where_there(got.mixed, want.mixed, compare);
    expect_same_where_there(got.v, want.v, compare);
    if (c.scalars > 0) expect_same_where_there(got.a, want.a, compare), expect_same_where_there(got.b, want.b, compare);
    if (c.gate) expect_same_where_there(got.F, want.F, compare);
}

const std::vector<AppendCase> kAppendCases = {{0, 64, 4, 2},
                                              {128, 64, 4, 0},
                                              {16, 8, 1, 16},
                                              {0, 384, 6, 8},
                                              {32, 16, 2, 1, false, false, false},
                                              {0, 16, 3, 5, true, false, true},
                                              {0, 16, 3, 5, false, true, true}};

TEST(Slots, AppendContinuesWholeSequences) {
    for (const AppendCase& c : kAppendCases) {
        SCOPED_TRACE(testing::PrintToString(c));
        const AppendProblem q(c);
        expect_appended(c, append<double>(Cpu{}, q), whole<double>(q),
                        [](const Values& g, const Values& w) { EXPECT_TRUE(close_to(g, w, 1e-14)); });
        expect_appended(c, append<float>(Cpu{}, q), whole<float>(q),
                        [](const Values& g, const Values& w) { EXPECT_TRUE(close_to(g, w, 3e-7)); });
    }
}

// ---- attention -------------------------------------------------------------------------------------------------------

struct CacheProblem {
    std::int64_t width = 64, heads = 2, scalars = 1, capacity = 0;
    std::int32_t window = 0;
    bool gate = true;
    Ints lengths;  // before the new token; -1: idle
    Values q, k, v, a, b, F;

    CacheProblem(std::int64_t w, std::int64_t h, std::int64_t r, std::int64_t room, std::int32_t win, bool g, Ints n)
        : width(w), heads(h), scalars(r), capacity(room), window(win), gate(g), lengths(std::move(n)) {
        const std::int64_t rows = slots() * capacity;
        q = round_to<bf16>(random_values(std::size_t(slots() * columns()), 1));
        k = round_to<bf16>(random_values(std::size_t(rows * columns()), 2));
        v = round_to<bf16>(random_values(std::size_t(rows * columns()), 3));
        a = round_to<float>(random_values(std::size_t(slots() * heads * scalars), 4));
        b = round_to<float>(random_values(std::size_t(rows * heads * scalars), 5));
        F.resize(std::size_t(rows * heads));
        for (std::int64_t s = 0; s < slots(); ++s)  // falling, as the gate's sums do
            for (std::int64_t i = 0; i < capacity; ++i)
                for (std::int64_t j = 0; j < heads; ++j)
                    F[std::size_t((s * capacity + i) * heads + j)] =
                        -0.01 * double(i) * double(j + 1) - 0.3 * double(s);
        F = round_to<float>(F);
    }
    std::int64_t slots() const { return std::int64_t(lengths.size()); }
    std::int64_t columns() const { return heads * width; }
    double scale() const { return 1 / std::sqrt(double(width)); }
};

enum class Kind { scalar, dot };

// Beyond a slot's tokens the caches hold NaN: nothing may look there.
template <class U>
std::vector<U> poisoned(const CacheProblem& p, const Values& all, std::int64_t columns) {
    std::vector<U> r = to<U>(all);
    for (std::int64_t s = 0; s < p.slots(); ++s)
        for (std::int64_t i = p.lengths[std::size_t(s)] + 1; i < p.capacity; ++i)
            for (std::int64_t c = 0; c < columns; ++c)
                r[std::size_t((s * p.capacity + i) * columns + c)] = narrow<U>(std::nan(""));
    return r;
}

template <class T, class Dev>
Values decode(const Dev& dev, const CacheProblem& p, Kind kind) {
    using A = acc_t<T>;
    const std::int64_t n = p.slots(), rows = n * p.capacity, c = p.columns(), hr = p.heads * p.scalars;
    const Buffer<T, Dev> k(dev, poisoned<T>(p, p.k, c)), v(dev, poisoned<T>(p, p.v, c));
    const Buffer<A, Dev> a(dev, to<A>(p.a)), b(dev, poisoned<A>(p, p.b, hr)), F(dev, poisoned<A>(p, p.F, p.heads)),
        partial(dev, std::size_t(std::max<std::int64_t>(1, slot_partial_elements(n, p.capacity, p.heads, p.width))));
    const Buffer<std::int32_t, Dev> length(dev, p.lengths);
    const Padded<T, Dev> q(dev, n, c, c + 8, p.q), o(dev, n, c, c + 16);
    if (kind == Kind::scalar)
        slot_attention(dev, SlotAttention<T>{.o = o.mat(),
                                             .a = a.mat(n, hr),
                                             .b = b.mat(rows, hr),
                                             .F = p.gate ? F.mat(rows, p.heads) : Mat<A>{},
                                             .v = v.mat(rows, c),
                                             .length = length.vec(),
                                             .partial = partial.vec(),
                                             .heads = std::int32_t(p.heads),
                                             .scalars = std::int32_t(p.scalars),
                                             .window = p.window});
    else
        slot_dot(dev, SlotDot<T>{.o = o.mat(),
                                 .q = q.mat(),
                                 .k = k.mat(rows, c),
                                 .v = v.mat(rows, c),
                                 .length = length.vec(),
                                 .partial = partial.vec(),
                                 .heads = std::int32_t(p.heads),
                                 .window = p.window,
                                 .scale = A(p.scale())});
    return o.values();
}

// Slot by slot by the function for one sequence; NaN for idle ones.
template <class T>
Values one_by_one(const CacheProblem& p, Kind kind) {
    const std::int64_t c = p.columns(), hr = p.heads * p.scalars;
    const std::vector<T> q = to<T>(p.q), k = to<T>(p.k), v = to<T>(p.v), a = to<T>(p.a), b = to<T>(p.b), F = to<T>(p.F);
    Values all;
    for (std::int64_t s = 0; s < p.slots(); ++s) {
        const std::int64_t n = p.lengths[std::size_t(s)] + 1, first = s * p.capacity;
        std::vector<T> o(std::size_t(c), T(std::nan("")));
        const auto rows = [&](const std::vector<T>& m, std::int64_t cols) {
            return Mat<const T>(m.data() + first * cols, n, cols);
        };
        if (n > 0 && kind == Kind::scalar)
            attention_decode(Cpu{}, AttentionDecode<T>{.o = {o.data(), c},
                                                       .a = {a.data() + s * hr, hr},
                                                       .b = rows(b, hr),
                                                       .F = p.gate ? rows(F, p.heads) : Mat<const T>{},
                                                       .v = rows(v, c),
                                                       .heads = std::int32_t(p.heads),
                                                       .scalars = std::int32_t(p.scalars),
                                                       .window = p.window});
        if (n > 0 && kind == Kind::dot)
            dot_decode(Cpu{}, DotDecode<T>{.o = {o.data(), c},
                                           .q = {q.data() + s * c, c},
                                           .k = rows(k, c),
                                           .v = rows(v, c),
                                           .heads = std::int32_t(p.heads),
                                           .window = p.window,
                                           .scale = T(p.scale())});
        for (const T x : o) all.push_back(double(x));
    }
    return all;
}

// Capacities on both sides of one piece of keys, lengths on both sides of a warp, a block's turn and a piece.
template <class Body>
void for_each_cache(Body&& body) {
    const Ints few = {0, -1, 1, 31, 32}, many = {255, 256, -1, 257, 600, 511};
    for (const std::int64_t width : {16, 32, 64, 128})
        for (const auto& [lengths, capacity] : {std::pair{few, 33}, std::pair{few, 256}, std::pair{many, 601}})
            for (const std::int32_t window : capacity == 33 ? Ints{0, 1, 40} : Ints{0, 300}) {
                SCOPED_TRACE(testing::Message()
                             << "width " << width << ", capacity " << capacity << ", window " << window);
                const std::int64_t scalars = width == 16 ? 1 : width == 32 ? 3 : width == 64 ? 8 : 16;
                body(CacheProblem(width, 2, scalars, capacity, window, window != 40, lengths));
            }
}

TEST(Slots, AttentionOfEachSlotIsThatOfOneSequence) {
    for_each_cache([](const CacheProblem& p) {
        for (const Kind kind : {Kind::scalar, Kind::dot}) {
            const auto same = [](const Values& g, const Values& w) { EXPECT_EQ(g, w); };
            expect_same_where_there(decode<double>(Cpu{}, p, kind), one_by_one<double>(p, kind), same);
            const Values one = decode<float>(Cpu{1}, p, kind);
            expect_same_where_there(one, one_by_one<float>(p, kind), same);
            expect_same_where_there(decode<float>(Cpu{3}, p, kind), one, same);
        }
    });
}

// ---- product, scatter, state -----------------------------------------------------------------------------------------

template <class T>
std::vector<T> product(const Cpu& dev, const std::vector<T>& x, const std::vector<T>& w, const std::vector<T>& residual,
                       std::int64_t depth, bool relu) {
    const auto rows = std::int64_t(x.size()) / depth, out = std::int64_t(w.size()) / depth;
    std::vector<T> y(std::size_t(rows * out));
    SlotProduct<T> p;
    p.y = {y.data(), rows, out}, p.x = {x.data(), rows, depth}, p.w = {w.data(), out, depth};
    if (!residual.empty()) p.residual = {residual.data(), rows, out};
    p.relu_squared = relu;
    slot_product(dev, p);
    return y;
}

TEST(Slots, ProductIsTheProduct) {
    for (const auto& [rows, depth, out] : {std::tuple{1, 1, 1}, std::tuple{3, 7, 5}, std::tuple{4, 8, 2},
                                           std::tuple{9, 33, 17}, std::tuple{5, 384, 41}}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << depth << " x " << out);
        const auto x = to<double>(random_values(std::size_t(rows * depth), 1)),
                   w = to<double>(random_values(std::size_t(out * depth), 2)),
                   residual = to<double>(random_values(std::size_t(rows * out), 3));
        for (const bool relu : {false, true}) {
            Values want;
            for (int r = 0; r < rows; ++r)
                for (int o = 0; o < out; ++o) {
                    double y = residual[std::size_t(r * out + o)];
                    for (int k = 0; k < depth; ++k) y += x[std::size_t(r * depth + k)] * w[std::size_t(o * depth + k)];
                    want.push_back(relu ? std::max(y, 0.0) * std::max(y, 0.0) : y);
                }
            EXPECT_TRUE(close_to(product<double>(Cpu{}, x, w, residual, depth, relu), want, 1e-13));
        }
    }
}

TEST(Slots, RowsOfAProductDoNotDependOnEachOther) {
    constexpr int kRows = 11, kDepth = 101, kOut = 37;
    const auto x = to<float>(random_values(kRows * kDepth, 1)), w = to<float>(random_values(kOut * kDepth, 2)),
               residual = to<float>(random_values(kRows * kOut, 3));
    const std::vector<float> all = product<float>(Cpu{1}, x, w, residual, kDepth, false);
    EXPECT_EQ(product<float>(Cpu{3}, x, w, residual, kDepth, false), all);
    for (int first = 0; first < kRows; ++first)
        for (const int n : {1, 2, 5, 7}) {
            if (first + n > kRows) continue;
            const auto part = [&](const std::vector<float>& m, int cols) {
                return std::vector<float>(m.begin() + first * cols, m.begin() + (first + n) * cols);
            };
            EXPECT_EQ(product<float>(Cpu{1}, part(x, kDepth), w, part(residual, kOut), kDepth, false), part(all, kOut))
                << "rows " << first << " to " << first + n;
        }
}

template <class U, class Dev>
void expect_scatter_and_store(const Dev& dev) {
    const Values rows = round_to<U>(random_values(4 * 5, 1));
    const Ints place = {6, -1, 0, 3}, length = {1, -1, 0, 2};  // store: capacity 3, so rows 1, 6 and 11
    const Buffer<std::int32_t, Dev> places(dev, place), lengths(dev, length);
    const Padded<U, Dev> from(dev, 4, 5, 7, rows), scattered(dev, 7, 5, 6), stored(dev, 12, 5, 8);
    slot_scatter(dev, SlotScatter<U>{.to = scattered.mat(), .rows = from.mat(), .place = places.vec()});
    slot_store(dev, SlotStore<U>{.cache = stored.mat(), .rows = from.mat(), .length = lengths.vec()});
    const auto expect = [&](const Values& got, const Ints& row_of) {
        for (std::size_t r = 0; r < got.size() / 5; ++r) {
            const auto at = std::find(row_of.begin(), row_of.end(), std::int32_t(r));
            for (std::size_t c = 0; c < 5; ++c) {
                if (at == row_of.end())
                    EXPECT_TRUE(std::isnan(got[r * 5 + c]));
                else
                    EXPECT_EQ(got[r * 5 + c], rows[std::size_t(at - row_of.begin()) * 5 + c]);
            }
        }
    };
    expect(scattered.values(), place);
    expect(stored.values(), {1, -1, 6, 11});
}

TEST(Slots, ScatterAndStore) {
    expect_scatter_and_store<float>(Cpu{});
    expect_scatter_and_store<double>(Cpu{});
}

// A row of slots has its length as its position.
template <class T, class Dev>
Values rotated(const Dev& dev, const Ints& lengths) {
    const auto n = std::int64_t(lengths.size());
    const auto ints = [&](std::size_t size) { return Buffer<std::int32_t, Dev>(dev, size); };
    const Buffer<std::int32_t, Dev> token = ints(lengths.size()), length = ints(lengths.size()),
                                    begin = ints(lengths.size()), left = ints(lengths.size());
    const Buffer<std::uint64_t, Dev> seed(dev, lengths.size());
    const Slots slots{token.vec(), length.vec(), begin.vec(), left.vec(), seed.vec()};
    for (std::int64_t s = 0; s < n; ++s)
        slot_begin(dev, SlotBegin{.slots = slots,
                                  .slot = std::int32_t(s),
                                  .token = std::int32_t(100 + s),
                                  .length = lengths[std::size_t(s)],
                                  .left = std::int32_t(10 + s),
                                  .seed = std::uint64_t(1) << (40 + s)});
    EXPECT_EQ(length.host(), lengths);
    for (std::size_t s = 0; s < lengths.size(); ++s) {
        EXPECT_EQ(token.host()[s], std::int32_t(100 + s));
        EXPECT_EQ(left.host()[s], std::int32_t(10 + s));
        EXPECT_EQ(seed.host()[s], std::uint64_t(1) << (40 + s));
    }
    const Buffer<T, Dev> x(dev, to<T>(round_to<bf16>(random_values(lengths.size() * 32, 1)))), y(dev, x.size());
    RotaryForward<T> p;
    p.y = y.mat(n, 32), p.x = x.mat(n, 32), p.seq = slots.packed(), p.heads = 2;
    rotary_forward(dev, p);
    return y.values();
}
Values rotated_one_by_one(const Ints& lengths) {
    const Values x = round_to<bf16>(random_values(lengths.size() * 32, 1));
    Values all;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
        std::vector<double> y(32);
        RotaryForward<double> p;
        p.y = {y.data(), 1, 32}, p.x = {x.data() + s * 32, 1, 32}, p.seq = Packed::uniform(1, 1), p.heads = 2;
        p.position_offset = std::max(lengths[s], 0);
        rotary_forward(Cpu{}, p);
        all.insert(all.end(), y.begin(), y.end());
    }
    return all;
}
const Ints kPositions = {5, -1, 0, 1000, 3};

TEST(Slots, BeginGivesARowItsPosition) {
    EXPECT_EQ(rotated<double>(Cpu{}, kPositions), rotated_one_by_one(kPositions));
}

TEST(Slots, RejectsBrokenContracts) {
    std::vector<float> x(64), v(128), o(64);
    std::vector<std::int32_t> length(4, 0);
    SlotDot<float> p;
    p.o = {o.data(), 4, 16}, p.q = {x.data(), 4, 16}, p.k = p.v = {v.data(), 8, 16}, p.length = {length.data(), 4};
    p.heads = 2;
    EXPECT_NO_THROW(slot_dot(Cpu{}, p));
    p.v = p.k = {v.data(), 7, 16};  // no whole number of rows a slot
    EXPECT_THROW(slot_dot(Cpu{}, p), ContractError);
    SlotAppend<float> a;
    a.length = p.length, a.capacity = 2, a.v = {v.data(), 8, 16}, a.x = {x.data(), 4, 16};
    EXPECT_NO_THROW(slot_append(Cpu{}, a));
    a.w = {x.data(), 16, 4};  // without the rows before
    EXPECT_THROW(slot_append(Cpu{}, a), ContractError);
    a.w = {}, a.capacity = 3;
    EXPECT_THROW(slot_append(Cpu{}, a), ContractError);
}

// ---- gpu -------------------------------------------------------------------------------------------------------------

#if FIEDLER_CUDA

TEST(Slots, GpuAppendMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for (const AppendCase& c : kAppendCases) {
        SCOPED_TRACE(testing::PrintToString(c));
        const AppendProblem q(c);
        const Appended got = append<bf16>(gpu(), q), again = append<bf16>(gpu(), q), want = append<double>(Cpu{}, q);
        const Appended low = append<float>(Cpu{}, q);
        const auto compare = [&](const Values& g, const Values& w, const Values& l, bool rounded) {
            if (w.empty()) return;
            Values there_g, there_w, there_l;
            for (std::size_t i = 0; i < w.size(); ++i) {
                ASSERT_EQ(std::isnan(g[i]), std::isnan(w[i])) << i;
                if (!std::isnan(w[i])) there_g.push_back(g[i]), there_w.push_back(w[i]), there_l.push_back(l[i]);
            }
            EXPECT_TRUE(close(there_g, there_w, rounded ? round_to<bf16>(there_l) : there_l));
        };
        if (c.split > 0) compare(got.mixed, want.mixed, low.mixed, true);
        compare(got.v, want.v, low.v, true);
        if (c.scalars > 0) compare(got.a, want.a, low.a, false), compare(got.b, want.b, low.b, false);
        if (c.gate) compare(got.F, want.F, low.F, false);
        expect_appended(c, again, got, [](const Values& g, const Values& w) { EXPECT_EQ(g, w); });
    }
}

TEST(Slots, GpuAttentionMatchesReference) {
    FIEDLER_GPU_OR_SKIP();
    for_each_cache([](const CacheProblem& p) {
        for (const Kind kind : {Kind::scalar, Kind::dot}) {
            const Values got = decode<bf16>(gpu(), p, kind), ref = one_by_one<double>(p, kind),
                         low = one_by_one<float>(p, kind), again = decode<bf16>(gpu(), p, kind);
            Values there;
            for (const double x : low)
                if (!std::isnan(x)) there.push_back(x);
            expect_same_where_there(
                got, ref, [&](const Values& g, const Values& w) { EXPECT_TRUE(close(g, w, round_to<bf16>(there))); });
            expect_same_where_there(again, got, [](const Values& g, const Values& w) { EXPECT_EQ(g, w); });
        }
    });
}

// A slot's result does not depend on what is beside it, on its place, or on how much room there is.
TEST(Slots, GpuSlotsAreIndependent) {
    FIEDLER_GPU_OR_SKIP();
    for (const Kind kind : {Kind::scalar, Kind::dot}) {
        const CacheProblem all(64, 3, 8, 601, 0, true, {17, 600, 255, 256});
        const Values together = decode<bf16>(gpu(), all, kind);
        for (std::int64_t s = 0; s < all.slots(); ++s) {
            const std::int32_t n = all.lengths[std::size_t(s)];
            CacheProblem alone(64, 3, 8, n + 1, 0, true, {n});
            const auto take = [&](Values& to, const Values& from, std::int64_t rows, std::int64_t width) {
                const auto first = from.begin() + std::ptrdiff_t(s * rows * width);
                to.assign(first, first + std::ptrdiff_t((rows == 1 ? 1 : n + 1) * width));
            };
            take(alone.q, all.q, 1, all.columns()), take(alone.a, all.a, 1, 24);
            take(alone.k, all.k, 601, all.columns()), take(alone.v, all.v, 601, all.columns());
            take(alone.b, all.b, 601, 24), take(alone.F, all.F, 601, 3);
            const auto row = together.begin() + std::ptrdiff_t(s * all.columns());
            EXPECT_EQ(decode<bf16>(gpu(), alone, kind), Values(row, row + std::ptrdiff_t(all.columns()))) << s;
        }
    }
}

TEST(Slots, GpuScatterAndStore) {
    FIEDLER_GPU_OR_SKIP();
    expect_scatter_and_store<bf16>(gpu());
    expect_scatter_and_store<float>(gpu());
}

TEST(Slots, GpuBeginGivesARowItsPosition) {
    FIEDLER_GPU_OR_SKIP();
    const Values want = rotated_one_by_one(kPositions);
    EXPECT_TRUE(close(rotated<bf16>(gpu(), kPositions), want, round_to<bf16>(rotated<float>(Cpu{}, kPositions))));
}

#endif

}  // namespace
}  // namespace fiedler::test
