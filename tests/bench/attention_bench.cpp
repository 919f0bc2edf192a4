// Scalar-distance attention at training shapes: one scalar a head (global), eight (global and in a window), decoding.
#include "kernels/attention.h"

#include "tests/bench/harness.h"

namespace fiedler::bench {
namespace {

struct Shape {
    std::int32_t count, length, heads, width, scalars, window;
    bool causal;
};

void add_shape(Suite& suite, const Shape& s) {
    const std::int64_t n = std::int64_t(s.count) * s.length, values = std::int64_t(s.heads) * s.width,
                       scalars = std::int64_t(s.heads) * s.scalars;
    AttentionForward<Storage> f;
    f.o = {suite.zeros<Storage>(n * values), n, values};
    f.lse = {suite.zeros<Accum>(n * s.heads), n, s.heads};
    f.a = Mat<Accum>(suite.random<Accum>(n * scalars), n, scalars);
    f.b = Mat<Accum>(suite.random<Accum>(n * scalars), n, scalars);
    if (s.causal) f.F = Mat<Accum>(suite.zeros<Accum>(n * s.heads), n, s.heads);  // open gate: no tile may be skipped
    f.v = Mat<Storage>(suite.random<Storage>(n * values), n, values);
    const auto scratch = attention_forward_scratch_elements(n, s.heads, s.scalars);
    f.scratch = {suite.zeros<Accum>(scratch), scratch};
    f.seq = Packed::uniform(s.count, s.length);
    f.heads = s.heads, f.scalars = s.scalars, f.window = s.window, f.causal = s.causal;

    AttentionBackward<Storage> b;
    b.da = {suite.zeros<Accum>(n * scalars), n, scalars};
    b.db = {suite.zeros<Accum>(n * scalars), n, scalars};
    if (s.causal) b.dF = {suite.zeros<Accum>(n * s.heads), n, s.heads};
    b.dv = {suite.zeros<Storage>(n * values), n, values};
    b.delta = {suite.zeros<Accum>(n * s.heads), n, s.heads};
    const auto partial = attention_partial_elements(f.seq, 0, s.heads, s.width, s.scalars, s.window, s.causal);
    b.partial = {suite.zeros<Accum>(partial), partial};
    b.a = f.a, b.b = f.b, b.F = f.F, b.v = f.v, b.o = f.o, b.lse = f.lse;
    b.do_ = Mat<Storage>(suite.random<Storage>(n * values), n, values);
    b.seq = f.seq, b.heads = f.heads, b.scalars = f.scalars, b.window = f.window, b.causal = f.causal;
    attention_forward(suite.device, f);  // o and lse as the backward pass finds them

    const std::string name = std::to_string(s.count) + "x" + std::to_string(s.length) + " H" + std::to_string(s.heads) +
                             " D" + std::to_string(s.width) + " R" + std::to_string(s.scalars) +
                             (s.window > 0 ? std::string(" window ") + std::to_string(s.window) : "") +
                             (s.causal ? "" : " bidirectional");
    suite.add(
        "forward " + name, traffic(f), [=, &suite] { attention_forward(suite.device, f); }, true);
    suite.add(
        "backward " + name, traffic(b), [=, &suite] { attention_backward(suite.device, b); }, true);
#if FIEDLER_BENCH_CUDA
    if (s.count != 64) return;  // the anchor: beside it, the way of other architectures
    suite.add(
        "forward " + name + " general", traffic(f),
        [=, &suite] { attention_forward_by_path(suite.device, f, AttentionPath::general); }, true);
    suite.add(
        "backward " + name + " general", traffic(b),
        [=, &suite] { attention_backward_by_path(suite.device, b, AttentionPath::general); }, true);
#endif
}

void add_decode(Suite& suite, std::int32_t length, std::int32_t heads, std::int32_t width, std::int32_t scalars) {
    const std::int64_t values = std::int64_t(heads) * width, per_token = std::int64_t(heads) * scalars;
    AttentionDecode<Storage> d;
    d.o = {suite.zeros<Storage>(values), values};
    d.a = Vec<Accum>(suite.random<Accum>(per_token), per_token);
    d.b = Mat<Accum>(suite.random<Accum>(length * per_token), length, per_token);
    d.F = Mat<Accum>(suite.zeros<Accum>(std::int64_t(length) * heads), length, heads);
    d.v = Mat<Storage>(suite.random<Storage>(length * values), length, values);
    d.heads = heads, d.scalars = scalars;
    const double n = length;
    const Traffic t{n * (double(values) * sizeof(Storage) + double(per_token + heads) * sizeof(Accum)),
                    n * double(heads) * (2.0 * width + 2.0 * scalars + 1)};
    suite.add("decode " + std::to_string(length) + " keys H" + std::to_string(heads) + " D" + std::to_string(width) +
                  " R" + std::to_string(scalars),
              t, [=, &suite] { attention_decode(suite.device, d); });
}

}  // namespace

FIEDLER_BENCH(attention) {
    if (suite.small) {
        add_shape(suite, {4, 256, 4, 32, 1, 0, true});
        add_shape(suite, {4, 256, 4, 32, 8, 0, true});
        add_decode(suite, 1024, 4, 32, 8);
        return;
    }
    for (const std::int32_t scalars : {1, 2, 4, 8, 16}) add_shape(suite, {32, 1024, 6, 64, scalars, 0, true});
    add_shape(suite, {64, 1024, 6, 64, 1, 0, true});  // DESIGN 7's anchor
    add_shape(suite, {64, 1024, 6, 64, 8, 0, true});
    add_shape(suite, {32, 1024, 6, 64, 8, 256, true});
    add_shape(suite, {32, 1024, 6, 64, 1, 0, false});
    add_shape(suite, {16, 4096, 6, 64, 1, 0, true});
    add_shape(suite, {4, 16384, 6, 64, 1, 0, true});
    add_shape(suite, {16, 4096, 6, 64, 8, 1024, true});
    add_shape(suite, {32, 1024, 12, 32, 8, 0, true});
    add_shape(suite, {32, 1024, 3, 128, 8, 0, true});
    add_decode(suite, 1024, 6, 64, 8);
}

}  // namespace fiedler::bench
